"""Kernel, momentum and input diversity against scipy, interpolate-and-pad, and planted pixels."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import ndimage, signal
from torch import Tensor
from torch.nn import functional as F

from attacks.iterative import Iterative
from attacks.objectives import TaskLoss
from attacks.transforms import (
    InputDiversity,
    Momentum,
    Placement,
    TranslationInvariance,
    _indexed,
    _selector,
)
from bench.protocols import Defense, Warped
from bench.registry import ATTACKS


# -- translation invariance ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(("size", "std"), [(15, 14 / 6), (7, 1.0), (5, 4 / 6), (3, 2 / 6)])
def test_kernel_is_a_gaussian_of_that_width(size, std):
    line = signal.windows.gaussian(size, std)
    expected = np.outer(line, line) / line.sum() ** 2
    np.testing.assert_allclose(
        TranslationInvariance(size, 3).kernel().numpy(), expected, rtol=1e-5, atol=1e-8
    )
    x = np.arange(size) - size // 2
    measured = np.sqrt((TranslationInvariance(size, 3).kernel().double().sum(0).numpy() * x**2).sum())
    if size == 15:  # 2.33 pixels, less what the cut-off takes away
        assert 2.28 < measured < 2.34


@pytest.mark.parametrize("size", [(20, 20), (9, 31), (4, 5)])
def test_smoothing_is_depthwise_with_zeros_outside(size):
    grad = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    part = TranslationInvariance(15, 3)
    out, memory = part(grad, None)
    assert memory is None
    kernel = part.kernel().double().numpy()
    for b in range(2):
        for c in range(3):
            expected = ndimage.convolve(grad[b, c].double().numpy(), kernel, mode="constant", cval=0.0)
            np.testing.assert_allclose(out[b, c].numpy(), expected, atol=1e-6)


def test_smoothing_comes_before_normalising_and_momentum():
    attack = ATTACKS.create("mi_fgsm_ti", {})
    assert [type(t) for t in attack.transforms] == [TranslationInvariance, Momentum]
    attack = ATTACKS.create("ti_fgsm", {})
    assert [type(t) for t in attack.transforms] == [TranslationInvariance]


# -- momentum -----------------------------------------------------------------------------------------------------
def test_momentum_recursion():
    g = torch.randn(3, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    for kind, scale in {
        "mean": lambda x: x.abs().mean((1, 2, 3), keepdim=True),
        "l2": lambda x: x.flatten(1).norm(dim=1).view(-1, 1, 1, 1),
        "none": lambda x: torch.ones(4, 1, 1, 1),
    }.items():
        part, memory, expected = Momentum(0.7, kind), None, torch.zeros_like(g[0])
        for step in g:
            out, memory = part(step, memory)
            expected = 0.7 * expected + step / scale(step)
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


# -- input diversity ----------------------------------------------------------------------------------------------
def place(
    size: tuple[int, int], corner: tuple[int, int], canvas: tuple[int, int], count: int = 1
) -> Placement:
    return Placement(
        torch.ones(count, dtype=torch.bool),
        torch.tensor([size] * count),
        torch.tensor([corner] * count),
        canvas,
    )


def test_every_size_equals_interpolate_and_pad():
    image = torch.rand(1, 3, 299, 299, generator=torch.Generator().manual_seed(0))
    part = InputDiversity()
    for r in (299, 300, 307, 314, 320, 329):
        top, left = (330 - r) // 3, (330 - r) // 2
        out = part.apply(image, place((r, r), (top, left), (330, 330)))
        expected = F.pad(
            F.interpolate(image, size=(r, r), mode="nearest"), (left, 330 - r - left, top, 330 - r - top)
        )
        assert torch.equal(out.images, expected), r
    flat = torch.rand(1, 3, 20, 31, generator=torch.Generator().manual_seed(0))
    out = InputDiversity(1.0, Fraction(3, 2)).apply(flat, place((27, 41), (2, 4), (30, 46)))
    assert torch.equal(out.images, F.pad(F.interpolate(flat, size=(27, 41), mode="nearest"), (4, 1, 2, 1)))
    assert out.geometry.in_size == (20, 31) and out.geometry.out_size == (30, 46)


@pytest.mark.parametrize("canvas", ["enlarged", "native"])
@pytest.mark.parametrize(
    ("ratio", "inner", "size", "corner", "outer"),
    [
        ("9/10", (32, 32), (28, 28), (1, 3), (32, 32)),
        ("9/10", (32, 32), (31, 31), (0, 0), (32, 32)),
        ("1/2", (20, 31), (13, 20), (6, 2), (20, 31)),
        ("3/2", (20, 31), (27, 41), (2, 4), (30, 46)),
        ("3/2", (20, 31), (20, 31), (9, 0), (30, 46)),
        ("1/3", (1, 3), (1, 1), (0, 1), (1, 3)),
    ],
)
def test_bilinear_resizing_is_that_of_interpolate(ratio, inner, size, corner, outer, canvas):
    image = torch.rand(1, 3, *inner, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    part = InputDiversity(1.0, Fraction(ratio), canvas, "bilinear")
    out = part.apply(image, place(size, corner, outer))
    (top, left), (bottom, right) = corner, (outer[i] - size[i] - corner[i] for i in (0, 1))
    expected = F.pad(F.interpolate(image, size=size, mode="bilinear"), (left, right, top, bottom))
    if canvas == "native":
        expected = F.interpolate(expected, size=inner, mode="bilinear")
    torch.testing.assert_close(out.images, expected, rtol=0, atol=1e-12)
    assert out.geometry.out_size == expected.shape[-2:]


def bilinear(image: Tensor, size: tuple[int, int], corner: tuple[int, int]) -> Tensor:
    """Shrink one channel (H, W) and place it on a canvas of its size, pixel by pixel."""
    out = torch.zeros_like(image)
    for y in range(size[0]):
        for x in range(size[1]):
            v, u = ((at + 0.5) * n / s - 0.5 for at, n, s in zip((y, x), image.shape, size, strict=True))
            v, u = min(max(v, 0), len(image) - 1), min(max(u, 0), image.shape[1] - 1)
            value = 0
            for i in (int(v), int(v) + 1):
                for j in (int(u), int(u) + 1):
                    weight = (1 - abs(v - i)) * (1 - abs(u - j))
                    if weight:
                        value = value + weight * image[i, j]
            out[corner[0] + y, corner[1] + x] = value
    return out


def test_shrunk_images_and_their_gradients_are_those_of_a_loop_over_pixels(lab):
    part = InputDiversity(0.7, Fraction(3, 5), interpolation="bilinear")
    x = lab.rng(5).uniform((1, 8, 11)).double().requires_grad_()
    placement = part.draw(lab.rng(5), (8, 11))
    assert placement.applied.any() and not placement.applied.all()
    assert len({tuple(row) for row in placement.size.tolist()}) > 1
    out = part.apply(x, placement).images
    looped = torch.stack([
        bilinear(image[0], size, corner)[None] if moved else image
        for image, moved, size, corner in zip(
            x, placement.applied.tolist(), placement.size.tolist(), placement.corner.tolist(), strict=True
        )
    ])  # fmt: skip
    torch.testing.assert_close(out, looped, rtol=0, atol=1e-12)
    assert torch.equal(out[~placement.applied], x[~placement.applied])
    weight = torch.randn_like(out)
    gradients = (torch.autograd.grad((made * weight).sum(), x)[0] for made in (out, looped))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: part.apply(x, placement).images, x)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_shrunk_images_stay_in_one_batch_of_their_size(lab, interpolation):
    """Whatever the canvas is called: it has the images' size, and those that are not moved are seen untouched."""
    images, labels = lab.batch(6, (40, 30))
    runs = []
    for canvas in ("enlarged", "native"):
        target = lab.Classifier(lab.convnet(), 5)
        params = {"ratio": "9/10", "canvas": canvas, "interpolation": interpolation}
        attack = ATTACKS.create("dim", params)
        runs.append(lab.run(attack, target, images, labels))
        assert {tuple(s) for s in target.sizes} == {(6, 3, 40, 30)}
        placement = attack.diversity.draw(lab.rng(6), (40, 30))
        moved = attack.diversity.apply(images, placement)
        still = ~placement.applied
        assert 0 < int(still.sum()) < 6 and torch.equal(moved.images[still], images[still])
        assert (moved.geometry.scale[still] == 1).all() and (moved.geometry.scale[~still] < 1).all()
    assert torch.equal(*runs)
    assert not torch.equal(
        runs[0], lab.run(ATTACKS.create("dim", {"canvas": "native"}), target, images, labels)
    )


def test_published_interpolation_is_not_in_keys():
    for name, parameter in (
        ("di_fgsm", "interpolation"), ("dim", "interpolation"), ("dim_ti", "interpolation"),
        ("iterative", "di_interpolation"),
    ):  # fmt: skip
        plain = ATTACKS.create(name, {}).identity()
        assert parameter not in plain["params"]
        assert ATTACKS.create(name, {parameter: "nearest"}).identity() == plain
        assert ATTACKS.create(name, {parameter: "bilinear"}).identity()["params"][parameter] == "bilinear"


def test_gradient_of_diversity_is_its_adjoint():
    part = InputDiversity(1.0, Fraction(3, 2))
    x = torch.rand(2, 3, 16, 24, dtype=torch.double, requires_grad=True)
    direction = torch.rand(2, 3, 16, 24, dtype=torch.double)
    placement = place((18, 30), (3, 1), (24, 36), 2)
    seen = part.apply(x, placement).images
    weight = torch.rand_like(seen)
    (grad,) = torch.autograd.grad((seen * weight).sum(), x)
    # Linear in x, so <A d, w> = <d, A^T w> for every direction d.
    torch.testing.assert_close(
        (part.apply(direction, placement).images * weight).sum(), (grad * direction).sum()
    )


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize(("ratio", "canvas"), [("7/5", "enlarged"), ("7/5", "native"), ("3/5", "native")])
@pytest.mark.parametrize("size", [(33, 32), (24, 45), (45, 24)])
def test_a_bright_spot_moves_as_the_geometry_says(lab, size, ratio, canvas, interpolation):
    part = InputDiversity(0.8, Fraction(ratio), canvas, interpolation)
    count = 30
    spots = lab.rng(count).uniform((2,)).double() * 6 + 9
    # Wide enough that resizing hardly changes where its middle is.
    distance = [torch.arange(n)[None] + 0.5 - spots[:, axis, None] for axis, n in enumerate(size)]
    row, column = (torch.exp(-(d**2) / 8) for d in distance)
    images = (row[:, :, None] * column[:, None])[:, None].expand(-1, 3, -1, -1)
    placement = part.draw(lab.rng(count), size)
    moved = part.apply(images, placement)
    assert placement.applied.any() and not placement.applied.all()
    for axis, across in ((0, 2), (1, 1)):
        line = moved.images[:, 0].sum(across)
        middle = (line * (torch.arange(line.shape[1]) + 0.5)).sum(1) / line.sum(1)
        expected = spots[:, axis] * moved.geometry.scale[:, axis] + moved.geometry.offset[:, axis]
        # The nearest neighbour is taken at a pixel's edge, once or twice.
        assert (middle - expected).abs().max() < (1.0 if interpolation == "nearest" else 0.1)


@pytest.mark.parametrize("canvas", ["enlarged", "native"])
@pytest.mark.parametrize("size", [(32, 32), (24, 45), (45, 24)])
def test_a_planted_pixel_lands_where_the_geometry_says(lab, size, canvas):
    part = InputDiversity(0.8, Fraction(7, 5), canvas)
    count = 30
    placement = part.draw(lab.rng(count), size)
    spots = [(int(y), int(x)) for y, x in lab.rng(count).integers(6, 18, (2,))]
    images = torch.zeros(count, 3, *size)
    for image, (y, x) in zip(images, spots, strict=True):
        image[:, y, x] = 1
    moved = part.apply(images, placement)
    scale, offset = moved.geometry.scale, moved.geometry.offset
    assert moved.images.shape[-2:] == moved.geometry.out_size
    seen = 0
    for i, spot in enumerate(spots):
        lit = moved.images[i, 0].nonzero()
        assert len(lit) == 0 or set(moved.images[i].unique().tolist()) == {0.0, 1.0}
        seen += len(lit) > 0
        for axis in (0, 1):
            # The pixel covers [p, p + 1); on the canvas it covers that interval scaled and shifted.
            low = spot[axis] * scale[i, axis] + offset[i, axis]
            high = low + scale[i, axis]
            for position in lit[:, axis].tolist():
                # A nearest-neighbour copy starts inside its source's interval, up to one more rounding for `native`.
                slack = 1e-4 if canvas == "enlarged" else 1.0
                assert low - slack <= position < high + slack
        if canvas == "enlarged":
            assert len(lit) > 0
    assert seen > count / 2


def test_labels_follow_the_pixels(lab):
    """A box around the lit region, moved by the geometry, is the box around the lit region of the moved image."""
    part = InputDiversity(1.0, Fraction(4, 3))
    size, count = (30, 48), 20
    placement = part.draw(lab.rng(count), size)
    images = torch.zeros(count, 3, *size)
    images[:, :, 5:17, 10:33] = 1
    moved = part.apply(images, placement)
    for i in range(count):
        lit = moved.images[i, 0].nonzero()
        low, high = lit.min(0).values, lit.max(0).values + 1
        scale, offset = moved.geometry.scale[i], moved.geometry.offset[i]
        expected = torch.tensor([[5.0, 10.0], [17.0, 33.0]]) * scale + offset
        assert (torch.stack([low, high]) - expected).abs().max() <= 1.0


@pytest.mark.parametrize("size", [(32, 32), (299, 299), (20, 61)])
def test_draws_cover_the_published_ranges(lab, size):
    part = InputDiversity(0.7)
    draws = part.draw(lab.rng(4000), size)
    if size == (299, 299):
        assert draws.canvas == (330, 330)
        assert int(draws.size.min()) == 299 and int(draws.size.max()) == 329
    if size == (32, 32):
        assert draws.canvas == (35, 35) and set(draws.size[:, 0].tolist()) == {32, 33, 34}
    assert abs(float(draws.applied.float().mean()) - 0.7) < 0.03
    free = torch.tensor(draws.canvas) - draws.size
    assert (draws.corner >= 0).all() and (draws.corner < free.clamp(min=1)).all()
    if size[0] == size[1]:
        assert torch.equal(draws.size[:, 0], draws.size[:, 1])
        smallest = draws.size[:, 0] == size[0]
        corners = draws.corner[smallest, 0]
        assert int(corners.min()) == 0 and int(corners.max()) == draws.canvas[0] - size[0] - 1
    ratio = draws.size / torch.tensor(size)
    assert (ratio[:, 0] - ratio[:, 1]).abs().max() < 1 / min(size)


@pytest.mark.parametrize(("size", "smallest"), [((32, 32), (28, 28)), ((20, 61), (18, 54)), ((4, 9), (3, 8))])
def test_shrinking_draws_cover_the_range_of_torchattacks(lab, size, smallest):
    draws = InputDiversity(0.5, Fraction(9, 10)).draw(lab.rng(4000), size)
    assert draws.canvas == size
    for axis in (0, 1):
        assert set(draws.size[:, axis].tolist()) == set(range(smallest[axis], size[axis]))
        free = size[axis] - draws.size[:, axis]
        corners = draws.corner[:, axis]
        assert (corners >= 0).all() and (corners < free).all()
        assert set(corners[free == free.max()].tolist()) == set(range(size[axis] - smallest[axis]))
    if size[0] == size[1]:
        assert torch.equal(draws.size[:, 0], draws.size[:, 1])
        assert set(torch.bincount(draws.size[:, 0])[28:].gt(900).tolist()) == {True}


def test_unmoved_images_are_seen_as_they_are(lab):
    """The victim sees canvases at their size and the rest at its own; values come back in order."""
    target = lab.Classifier(lab.convnet(), 5, one_by_one=True)
    images, labels = lab.batch(6, (40, 30))
    attack = ATTACKS.create("dim", {"prob": 0.5})
    placement = attack.diversity.draw(lab.rng(6), (40, 30))
    moved = placement.applied
    assert 0 < int(moved.sum()) < 6
    oracle = lab.oracle(target, attack, 6)
    objective = attack.diversity.objective(attack.loss.bind(oracle, images, labels, False), placement)
    result = oracle.gradient(images, objective)
    assert {tuple(s[-2:]) for s in target.sizes} == {(40, 30), (44, 33)}
    assert [trace.forwards for trace in oracle.traces] == [1] * 6
    for i in range(6):
        x = images[i : i + 1].clone().requires_grad_()
        one = Placement(
            moved[i : i + 1], placement.size[i : i + 1], placement.corner[i : i + 1], placement.canvas
        )
        seen = attack.diversity.apply(x, one).images if moved[i] else x
        loss = F.cross_entropy(target.net(seen), torch.tensor(labels[i : i + 1]))
        loss.backward()
        assert torch.equal(result.value[i], loss.detach()) and torch.equal(result.grad[i], x.grad[0])


def test_indexing_copies_the_pixels_and_sums_the_gradients_that_the_product_does(lab, monkeypatch):
    taken = []
    monkeypatch.setattr("attacks.transforms._indexed", lambda *args: taken.append(args) or _indexed(*args))
    images = torch.rand(12, 3, 20, 31).requires_grad_()
    part = InputDiversity(0.7, Fraction(3, 2), "native")
    moved = part.apply(images, part.draw(lab.rng(12), (20, 31))).images
    weight = torch.rand_like(moved)
    ((_, rows, columns),) = taken
    assert (rows < 0).any() and (columns < 0).any()
    product = _selector(rows, 20, images) @ images @ _selector(columns, 31, images).transpose(-1, -2)
    assert torch.equal(moved, product)
    gradients = (torch.autograd.grad((out * weight).sum(), images)[0] for out in (moved, product))
    torch.testing.assert_close(*gradients)


def test_native_canvas_keeps_the_size(lab):
    target = lab.Classifier(lab.convnet(), 5)
    images, labels = lab.batch(6, (40, 30))
    lab.run(ATTACKS.create("dim", {"canvas": "native"}), target, images, labels)
    assert {tuple(s) for s in target.sizes} == {(6, 3, 40, 30)}


def test_diversity_stands_before_the_defense(lab):
    class Seen(Defense):
        sizes: list[tuple[int, ...]] = []

        def forward(self, images: Tensor) -> Tensor:
            self.sizes.append(tuple(images.shape[-2:]))
            return images

    defense = Seen()
    attack = ATTACKS.create("dim", {"prob": 1.0, "steps": 2})
    images, labels = lab.batch(3, (40, 30))
    oracle = lab.oracle(lab.Classifier(lab.convnet(), 5), attack, 3, defense)
    attack.run(oracle, images, labels, lab.rng(3))
    assert set(defense.sizes) == {(44, 33)}


def test_warped_images_reach_task_losses(lab):
    """A detector's loss gets the geometry of what it sees, so its boxes can follow."""
    seen = []

    class Detector(lab.Classifier):
        losses = ("cls",)

        def loss(self, images, targets, kind, *, geometry=None, rng=None):
            seen.append((tuple(images.shape[-2:]), geometry))
            return images.flatten(1).sum(1)

    images, _ = lab.batch(4, (20, 30))
    attack = Iterative(loss="cls", di_prob=1.0, di_ratio=Fraction(3, 2), steps=3)
    assert isinstance(attack.loss, TaskLoss) and list(attack.loss_kinds()) == ["cls"]
    lab.run(attack, Detector(lab.convnet(), 5), images, [{}] * 4)
    assert len(seen) == 3
    for size, geometry in seen:
        assert size == (30, 45) == geometry.out_size and geometry.in_size == (20, 30)
        assert geometry.scale.shape == (4, 2) and (geometry.scale >= 1).all() and (geometry.scale < 1.5).all()
    assert len({tuple(g.scale.flatten().tolist()) for _, g in seen}) == 3, "one draw for all steps"
    assert len({tuple(row) for row in seen[0][1].scale.tolist()}) > 1, "one draw for all images"


def test_diversity_refuses_nonsense():
    for prob, ratio in ((0.0, 1.1), (1.2, 1.1), (0.5, 1.0), (0.5, 3.0), (0.5, 0.0), (0.5, -0.5)):
        with pytest.raises(ValueError, match="input diversity"):
            InputDiversity(prob, ratio)
    assert isinstance(
        InputDiversity(1.0).apply(torch.rand(1, 3, 8, 8), place((8, 8), (0, 0), (9, 9))), Warped
    )
