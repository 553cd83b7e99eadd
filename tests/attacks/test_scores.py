"""Square, SPSA and NES: what they ask, what they find without a gradient, what they do to a defense that has none."""

from __future__ import annotations

import math

import pytest
import torch

from attacks.square import _bump, bumps
from bench.errors import PluginError
from bench.protocols import Defense
from bench.registry import ATTACKS


@pytest.fixture
def victim(lab):
    target = lab.Classifier(lab.convnet(), 5, one_by_one=True)
    images, _ = lab.batch(6)
    return target, images, target.predict(images)


def standing(target, images, labels) -> int:
    return sum(p == y for p, y in zip(target.predict(images), labels, strict=True))


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("square", {"queries": 200}),
        ("square", {"queries": 200, "norm": "l2", "eps": 1}),
        ("spsa", {"steps": 12, "samples": 24}),
        ("nes", {"steps": 12, "samples": 24}),
    ],
)
def test_breaks_a_pipeline_without_gradient(lab, victim, name, params):
    """Eight grey levels have no gradient; scores show the way all the same."""
    target, images, labels = victim

    class Quantise(Defense):
        differentiable = False

        def forward(self, x):
            return (x.detach() * 7).round() / 7

    attack = ATTACKS.create(name, {"eps": "16/255", **params})
    assert attack.needs == {"logits"}
    oracle = lab.oracle(target, attack, 6, Quantise())
    labels = target.predict(Quantise()(images))
    out = attack.run(oracle, images, labels, lab.rng(6))
    noise = lab.run(ATTACKS.create("noise", {"eps": "16/255"}), target, images, labels)
    assert standing(target, Quantise()(out), labels) < standing(target, Quantise()(noise), labels)
    assert all(trace.backwards == 0 for trace in oracle.traces)


@pytest.mark.parametrize(
    ("name", "params", "asked"),
    [
        ("square", {"queries": 9}, 10),
        ("spsa", {"steps": 3, "samples": 20}, 124),
        ("nes", {"steps": 3, "samples": 5}, 34),
    ],
)
def test_queries_are_counted_and_images_leave(lab, victim, name, params, asked):
    target, images, labels = victim
    full = ATTACKS.create(name, {**params, "eps": "1/255", "stop_when_fooled": False})
    oracle = lab.oracle(target, full, 6)
    full.run(oracle, images, labels, lab.rng(6))
    assert {trace.forwards for trace in oracle.traces} == {asked}
    early = ATTACKS.create(name, {**params, "eps": "1/255"})
    oracle = lab.oracle(target, early, 6)
    # An image that is wrong to begin with costs its first query.
    out = early.run(oracle, images, [(labels[0] + 1) % 5, *labels[1:]], lab.rng(6))
    assert oracle.traces[0].forwards == 1
    if name != "square":
        assert torch.equal(out[0], images[0])


def test_failures_come_back_at_their_best(lab, victim):
    target, images, labels = victim
    weak = {"eps": "1/255"}
    for name, params in (("square", {"queries": 60}), ("spsa", {"steps": 8, "samples": 16})):
        out = lab.run(ATTACKS.create(name, {**weak, **params}), target, images, labels)
        gain = target.loss(out, labels, "ce") - target.loss(images, labels, "ce")
        assert standing(target, out, labels) > 0 and gain.mean() > 0


@pytest.mark.parametrize("name", ["spsa", "nes"])
def test_the_estimate_is_the_gradient(lab, name):
    """On a linear model J(x + d v) - J(x - d v) = 2 d v.w, so the estimate is the mean of v (v.w): close to w."""
    weight = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0)) / 7
    images = torch.full((2, 3, 4, 4), 0.5)
    attack = ATTACKS.create(
        name, {"samples": 3000, "loss": "margin"} | ({"sigma": "1/100"} if name == "nes" else {})
    )
    oracle = lab.oracle(lab.Classifier(lab.Linear(weight), 2), attack, 2)
    with torch.no_grad():
        grad = attack._estimate(oracle, images, torch.tensor([0, 1]), lab.rng(2))
    expected = 2 * torch.stack([weight, -weight])
    assert torch.nn.functional.cosine_similarity(grad.flatten(1), expected.flatten(1)).min() > 0.97
    assert (grad - expected).flatten(1).norm(dim=1).max() < 0.25 * expected[0].norm()


def test_targets_are_reached(lab, victim):
    target, images, labels = victim
    wrong = [(y + 1) % 5 for y in labels]
    for name, params in (("square", {"queries": 300}), ("spsa", {"steps": 20, "samples": 16})):
        attack = ATTACKS.create(name, {"eps": "1/4", "target": "next", **params})
        assert standing(target, lab.run(attack, target, images, wrong), wrong) >= 4


# -- parts of Square ----------------------------------------------------------------------------------------------
def test_stripes_and_squares(lab):
    images = torch.full((1, 3, 20, 20), 0.5)
    square = ATTACKS.create("square", {"queries": 1, "eps": "1/10"})
    start = square._start(images, lab.rng(1)) - images
    torch.testing.assert_close(start.abs(), torch.full_like(start, 0.1))
    assert (start == start[:, :, :1]).all() and (start != start[:, :, :, :1]).any()
    u = torch.tensor([[0.5, 0.99, 0, 0, 0, 0.9, 0.1, 0.9]])
    moved = square._move_linf(images, images, 4, u) - images
    # 17 places: 0.5 * 17 = 8, 0.99 * 17 = 16.
    assert (moved != 0).all(1)[0].nonzero().aminmax().min == 8
    assert torch.equal((moved != 0)[0, 0].nonzero().amin(0), torch.tensor([8, 16]))
    assert torch.equal((moved != 0)[0, 0].nonzero().amax(0), torch.tensor([11, 19]))
    torch.testing.assert_close(moved[0, :, 8, 16], torch.tensor([0.2, -0.2, 0.2]))


def test_sizes_follow_the_published_schedule():
    images = torch.zeros(1, 3, 32, 32)
    square = ATTACKS.create("square", {"queries": 10000, "p": 0.8})
    for query, share in (
        (0, 0.8),
        (10, 0.8),
        (11, 0.4),
        (51, 0.2),
        (201, 0.1),
        (1001, 0.025),
        (9000, 0.8 / 512),
    ):
        assert square._side(query, images) == max(round(math.sqrt(share) * 32), 1)
    quick = ATTACKS.create("square", {"queries": 1000, "p": 0.8})
    assert quick._side(900, images) == square._side(9000, images)
    counted = ATTACKS.create("square", {"queries": 1000, "p": 0.8, "rescale": False})
    assert counted._side(900, images) == square._side(900, images)


@pytest.mark.parametrize("side", [1, 2, 3, 5, 8])
def test_bumps(side):
    eta = bumps(side, torch.device("cpu"))
    assert eta.shape == (side, side) and abs(float(eta.norm()) - 1) < 1e-6
    if side > 1:
        assert (eta[: side // 2] >= 0).all() and (eta[side // 2 :] <= 0).all()
    assert abs(float(_bump(3, 5).norm()) - 1) < 1e-6 and _bump(3, 5).argmax() == 7


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("square", {"eps": 8}, "did you mean 8/255"),
        ("square", {"queries": 0}, "queries"),
        ("square", {"loss": "kl"}, "loss"),
        ("spsa", {"samples": 0}, "samples"),
        ("spsa", {"sampels": 3}, "did you mean 'samples'"),
        ("nes", {"sigma": 0}, "sigma"),
    ],
)
def test_bad_input(name, params, message):
    with pytest.raises(PluginError, match=message):
        ATTACKS.create(name, params)
