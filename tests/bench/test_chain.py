"""Chains and BPDA on defenses small enough to differentiate by hand."""

from __future__ import annotations

import pytest
import torch

from bench.chain import Chain, bpda
from bench.errors import CheckError, NotApplicable, PluginError
from bench.protocols import Defense, Geometry, Warped
from bench.registry import DEFENSES, load_plugin
from bench.rng import ImageRNG


def rng(n=2, key="k"):
    return ImageRNG.for_images(key, [str(i) for i in range(n)])


def named(defense, name):
    defense.name = name
    return defense


class Floor(Defense):
    """Quantises to tenths; its surrogate is x^2, whose derivative depends on where it is taken."""

    differentiable = False

    def forward(self, images):
        return (images.detach() * 10).floor() / 10

    def surrogate(self, images):
        return images**2


class Square(Defense):
    def forward(self, images):
        return images**2

    def surrogate(self, images):
        return images**2


class Cube(Defense):
    """Differentiable; BPDA through the identity, as inherited."""

    def forward(self, images):
        return images**3


class Jitter(Defense):
    """Adds a random number per image; its surrogate multiplies by another draw from the same stream."""

    stochastic = True
    differentiable = False

    def forward(self, images, rng):
        return (images + 0.2 * rng.uniform((1, 1, 1), device=images.device)).detach()

    def surrogate(self, images, rng):
        return images * rng.uniform((1, 1, 1), device=images.device)


class Double(Defense):
    """Repeats every pixel 2x2 and pads one row on top: moves pixels."""

    def forward(self, images):
        big = torch.nn.functional.pad(images.repeat_interleave(2, 2).repeat_interleave(2, 3), (0, 0, 1, 0))
        n, _, height, width = images.shape
        geometry = Geometry(
            torch.full((n, 2), 2.0),
            torch.tensor([[1.0, 0.0]]).repeat(n, 1),
            (height, width),
            (2 * height + 1, 2 * width),
        )
        return Warped(big, geometry)

    def surrogate(self, images):
        return self.forward(images)


class Small(Defense):
    tasks = frozenset({"classification", "segmentation"})

    def forward(self, images):
        return images

    def check_input(self, size):
        if max(size) > 8:
            raise NotApplicable(f"images of {size} are too large")


@pytest.fixture
def images():
    return 0.1 + 0.8 * torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))


def gradient(function, images):
    images = images.clone().requires_grad_()
    out = function(images)
    (grad,) = torch.autograd.grad((out.images if isinstance(out, Warped) else out).sin().sum(), images)
    return grad


def test_bpda_value_is_the_defense_and_gradient_is_the_surrogate(images):
    out = bpda(Floor(), images)
    assert torch.equal(out.images, Floor()(images))
    expected = Floor()(images).cos() * 2 * images
    assert torch.allclose(gradient(lambda x: bpda(Floor(), x), images), expected)


def test_bpda_with_itself_is_the_own_gradient_and_with_the_identity_is_not(images):
    own = gradient(lambda x: Square().purify(x), images)
    assert torch.equal(gradient(lambda x: bpda(Square(), x), images), own)

    class Itself(Square):
        def forward(self, images):
            calls.append(1)
            return images**2

        surrogate = forward

    calls: list[int] = []
    assert torch.equal(gradient(lambda x: bpda(Itself(), x), images), own) and len(calls) == 1
    own = gradient(lambda x: Cube().purify(x), images)
    identity = gradient(lambda x: bpda(Cube(), x), images)
    assert torch.allclose(identity, (images**3).cos()) and not torch.allclose(identity, own)


def test_chain_is_the_composition_in_order(images):
    chain = Chain([Floor(), Cube()])
    assert torch.equal(chain.purify(images).images, Floor()(images) ** 3)
    assert not torch.equal(chain.purify(images).images, Chain([Cube(), Floor()]).purify(images).images)


def test_true_gradient_of_a_differentiable_chain(images):
    chain = Chain([Square(), Cube()])
    assert chain.differentiable
    assert torch.allclose(gradient(chain.purify, images), (images**6).cos() * 6 * images**5, atol=1e-6)


def test_bpda_of_a_chain_differentiates_each_surrogate_at_its_own_input(images):
    """d sin(b(a(x))) with a = floor, surrogate x^2 at x, and b = x^2 at floor(x), not at the surrogate's value."""
    chain = Chain([Floor(), Square(), Floor()])
    x, a = images, Floor()(images)
    b = a**2
    expected = Floor()(b).cos() * (2 * b) * (2 * a) * (2 * x)
    assert torch.allclose(gradient(lambda x: bpda(chain, x), images), expected)
    wrong_input = Floor()(b).cos() * (2 * (x**2) ** 2) * (2 * x**2) * (2 * x)
    assert not torch.allclose(gradient(lambda x: bpda(chain, x), images), wrong_input, atol=1e-2)
    assert torch.equal(bpda(chain, images).images, chain.purify(images).images)


def test_bpda_of_a_mixed_chain_replaces_only_what_has_no_gradient(images):
    """Cube's surrogate is the identity: a chain that can be differentiated uses it, a mixed one must not."""
    chain = Chain([Cube(), Floor()])
    x, a = images, images**3
    assert chain.mixed
    assert torch.equal(bpda(chain, images).images, chain.purify(images).images)
    expected = Floor()(a).cos() * (2 * a) * (3 * x**2)
    assert torch.allclose(gradient(lambda x: bpda(chain, x), images), expected)
    chain = Chain([Cube(), Square()])
    assert not chain.mixed
    assert torch.allclose(gradient(lambda x: bpda(chain, x), images), (images**6).cos() * 2 * images**3)


def test_non_differentiable_member_makes_the_chain_so(images):
    chain = Chain([Square(), Floor()])
    assert not chain.differentiable and not chain.stochastic
    assert not chain.purify(images.requires_grad_()).images.requires_grad


def test_value_and_surrogate_see_the_same_draws(images):
    out = bpda(Jitter(), images, rng())
    draws = rng().uniform((1, 1, 1))
    assert torch.equal(out.images, Jitter().purify(images, rng()).images)
    grad = gradient(lambda x: bpda(Jitter(), x, rng()), images)
    assert torch.allclose(grad, out.images.cos() * draws)


def test_streams_go_on_so_that_repeated_calls_draw_anew(images):
    for defense in (Jitter(), Chain([Jitter(), Cube()])):
        for call in (defense.purify, lambda x, r, d=defense: bpda(d, x, r)):
            running = rng()
            first, second = call(images, running).images, call(images, running).images
            assert not torch.equal(first, second)
            again = rng()
            assert torch.equal(call(images, again).images, first)
            assert torch.equal(call(images, again).images, second)


def test_members_of_a_chain_draw_independently(images):
    zero = torch.zeros_like(images)
    once = Chain([named(Jitter(), "a")]).purify(zero, rng()).images
    twice = Chain([named(Jitter(), "a"), named(Jitter(), "a")]).purify(zero, rng()).images
    assert not torch.allclose(twice, 2 * once)
    assert torch.equal(Chain([named(Jitter(), "a"), Square()]).purify(zero, rng()).images, once**2)


def test_chain_does_not_depend_on_the_batch_split(images):
    chain = Chain([Jitter(), Double(), Jitter()])
    whole = chain.purify(images, rng())
    part = chain.purify(images[1:], rng().select([1]))
    assert torch.equal(part.images, whole.images[1:])
    assert torch.equal(part.geometry.offset, whole.geometry.offset[1:])


def test_geometry_is_composed_and_gradient_flows_through_warped(images):
    chain = Chain([Double(), Floor(), Double()])
    out = chain.purify(images)
    assert out.images.shape == (2, 3, 19, 20)
    assert out.geometry.in_size == (4, 5) and out.geometry.out_size == (19, 20)
    assert (
        out.geometry.scale.tolist() == [[4.0, 4.0]] * 2 and out.geometry.offset.tolist() == [[3.0, 0.0]] * 2
    )
    # The pixel at (1, 2) lies at (1, 2) * 4 + (3, 0).
    assert torch.equal(out.images[:, :, 7:11, 8:12], Floor()(images)[:, :, 1:2, 2:3].expand(-1, -1, 4, 4))
    through = bpda(chain, images)
    assert torch.equal(through.images, out.images) and through.geometry.out_size == (19, 20)
    # Sixteen copies of every pixel, the surrogate's slope, and cos at the exact value.
    expected = 16 * Floor()(images).cos() * 2 * images
    assert torch.allclose(gradient(lambda x: bpda(chain, x), images), expected, atol=1e-5)


def test_members_are_clamped_before_the_next_one(images):
    class Bright(Defense):
        def forward(self, images):
            return images + 1

    assert Chain([Bright(), Cube()]).purify(images).images.max() == 1


def test_identity_names_all_members_and_nesting_is_flat(images):
    a, b = DEFENSES.create("noise"), DEFENSES.create("jpeg", {"quality": 50})
    chain = Chain([Chain([a]), b])
    assert chain.name == "noise+jpeg" and chain.stochastic and not chain.differentiable and not chain.trained
    assert chain.identity() == {"name": "noise+jpeg", "members": [a.identity(), b.identity()]}
    assert chain.params["members"][1] == {"name": "jpeg", "params": dict(b.params)}
    assert Chain([b, a]).identity() != chain.identity()


def test_sizes_and_tasks_of_members_hold_for_the_chain():
    Chain([Small(), Double()]).check_input((8, 8))
    with pytest.raises(NotApplicable, match=r"\(17, 16\)"):
        Chain([Double(), Small()]).check_input((8, 8))
    assert Chain([Double(), Small()]).tasks == {"classification", "segmentation"}
    assert Chain([Double()]).tasks is None


def test_members_move_with_the_chain():
    class Linear(Defense):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, images):
            return images * self.weight

    assert next(Chain([Linear()]).to(torch.float64).parameters()).dtype == torch.float64


def test_empty_chain_and_wrong_surrogate_are_refused(images):
    with pytest.raises(PluginError, match="at least one"):
        Chain([])

    class Shrinks(Double):
        def surrogate(self, images):
            return images

    with pytest.raises(CheckError, match=r"surrogate returns shape .*4, 5.*9, 10"):
        bpda(Shrinks(), images)


def test_stochastic_chain_without_streams_is_refused(images):
    with pytest.raises(ValueError, match="needs an ImageRNG"):
        Chain([Jitter()]).purify(images)


def test_a_users_file_is_enough(tmp_path, images):
    path = tmp_path / "my_defense.py"
    path.write_text(
        "from bench.protocols import Defense\n"
        "from bench.registry import DEFENSES\n\n"
        '@DEFENSES.register_module(name="invert_for_test")\n'
        "class Invert(Defense):\n"
        "    def __init__(self, strength: float = 1.0) -> None:\n"
        "        super().__init__()\n"
        "        self.strength = strength\n\n"
        "    def forward(self, images):\n"
        "        return self.strength - images\n"
    )
    load_plugin(path)
    try:
        assert "invert_for_test" in DEFENSES.names()
        chain = Chain(
            [DEFENSES.create("invert_for_test"), DEFENSES.create("invert_for_test", {"strength": 0.9})]
        )
        assert torch.allclose(chain.purify(images).images, (images - 0.1).clamp(0, 1), atol=1e-6)
        assert chain.identity()["members"][0]["params"] == {"strength": 1.0}
        assert torch.allclose(gradient(chain.purify, images), chain.purify(images).images.cos())
    finally:
        DEFENSES.module_dict.pop("invert_for_test")
