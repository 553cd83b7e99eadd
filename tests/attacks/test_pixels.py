"""Losses of label maps on a handful of pixels, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attacks.pixels import (
    JensenShannon,
    MaskedCE,
    PixelLoss,
    PixelMargin,
    RightMargin,
    SegPGDLoss,
    label_maps,
    over_labelled,
)
from bench.errors import DataError, GridError

LN2, LN3 = math.log(2), math.log(3)


def scene() -> tuple[Tensor, Tensor]:
    """One image of 1x4 pixels, three classes: right with p = 2/3, wrong with p = 1/3, right with 1/2, ignored."""
    probabilities = torch.tensor(
        [[2 / 3, 1 / 6, 1 / 6], [1 / 2, 1 / 3, 1 / 6], [1 / 4, 1 / 4, 1 / 2], [0.1, 0.8, 0.1]]
    )
    # Shifting the logits of a pixel changes nothing.
    logits = probabilities.log() + torch.tensor([0.0, 3.0, -2.0, 1.0])[:, None]
    return logits.T[None, :, None, :].clone(), torch.tensor([[[0, 1, 2, 255]]])


#: Cross-entropy of the three labelled pixels.
CE = (math.log(3 / 2), LN3, LN2)
#: Best wrong minus true logit.
GAP = (math.log(1 / 4), math.log(3 / 2), math.log(1 / 2))


def js(p: float) -> float:
    """(KL(q || m) + KL(e || m)) / 2 of q = (p, 1 - p) and e = (1, 0), the definition."""
    m = (p + 1) / 2
    return ((p * math.log(p / m) + (1 - p) * math.log(2)) + math.log(1 / m)) / 2


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (MaskedCE(), (CE[0] + CE[2]) / 3),
        (JensenShannon(), (js(2 / 3) + js(1 / 3) + js(1 / 2)) / 3),
        (SegPGDLoss(), (CE[0] + CE[2]) / 3),
        (SegPGDLoss(0.25), (0.75 * (CE[0] + CE[2]) + 0.25 * CE[1]) / 3),
        (PixelMargin(), (GAP[0] + GAP[2]) / 3),
        (PixelMargin(kappa=0.3), (GAP[0] + 0.3 + GAP[2]) / 3),
        (PixelMargin(kappa=1.0, towards=True), (-1.0 + GAP[1] + GAP[2]) / 3),
        (RightMargin(), (GAP[0] + GAP[2]) / 3),
        (RightMargin(goal=0.3), 0.0),  # a third of the pixels is wrong: done
        (MaskedCE([10, 5, 20]), (0.5 * CE[0] + 0.25 * CE[2]) / 3),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PixelLoss) else "",
)
def test_value(loss: PixelLoss, expected: float) -> None:
    logits, labels = scene()
    torch.testing.assert_close(loss.of(logits, labels), torch.tensor([expected]), rtol=1e-5, atol=1e-6)


def test_only_the_pixels_meant_have_a_gradient() -> None:
    for loss, pixels in (
        (MaskedCE(), [0, 2]),
        (MaskedCE("image"), [0, 2]),
        (SegPGDLoss(), [0, 2]),
        (SegPGDLoss(0.1), [0, 1, 2]),
        (JensenShannon(), [0, 1, 2]),
        (PixelMargin(), [0, 2]),
        (PixelMargin(kappa=1.0), [0, 1, 2]),
        (RightMargin(), [0, 2]),
    ):
        logits, labels = scene()
        logits.requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss.of(logits, labels).sum(), logits)
        assert torch.isfinite(gradient).all()
        assert gradient[0, :, 0].abs().sum(0).nonzero()[:, 0].tolist() == pixels, loss.name


def test_balance_over_the_classes_of_an_image() -> None:
    # Three pixels of class 0 and one of class 1, all right with probability 1/2: each class weighs as much.
    logits = torch.zeros(1, 2, 1, 4)
    logits[0, 0, 0, :3], logits[0, 1, 0, 3] = 1e-4, 1e-4
    labels = torch.tensor([[[0, 0, 0, 1]]])
    weights = MaskedCE("image").pixels(logits, labels) / MaskedCE().pixels(logits, labels)
    torch.testing.assert_close(weights.flatten(), torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0]))
    with pytest.raises(GridError, match="class_pixels: 3 numbers for a model of 2 classes"):
        MaskedCE([1.0, 2.0, 3.0]).of(logits, labels)


def test_segpgd_schedule() -> None:
    # lambda(t) = (t - 1) / 2N at t = 1..N
    assert [SegPGDLoss().at(step, 4).share for step in range(4)] == [0.0, 0.125, 0.25, 0.375]
    assert MaskedCE().at(3, 4).name == MaskedCE.name


def test_jensen_shannon_lets_wrong_pixels_go() -> None:
    sizes = []
    for margin in (0.0, 5.0, 20.0, 200.0):
        logits = torch.tensor([0.0, margin]).view(1, 2, 1, 1).requires_grad_(True)
        value = JensenShannon().of(logits, torch.zeros(1, 1, 1, dtype=torch.long))
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert torch.isfinite(gradient).all() and 0 < value <= LN2 + 1e-6
        sizes.append(float(gradient.abs().sum()))
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 1e-6


@pytest.mark.parametrize(
    "loss", [MaskedCE(), MaskedCE("image"), JensenShannon(), SegPGDLoss(0.2), PixelMargin(1.0), RightMargin()]
)
def test_nothing_labelled(loss: PixelLoss) -> None:
    logits = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    labels = torch.full((2, 2, 2), 255)
    labels[1, 0, 0] = 1
    value = loss.of(logits, labels)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert value[0] == 0 and gradient[0].abs().max() == 0
    assert torch.isfinite(value).all() and torch.isfinite(gradient).all()


def test_label_maps_are_checked() -> None:
    assert label_maps([torch.tensor([[0, 255]])], 3, torch.device("cpu")).tolist() == [[[0, 255]]]
    with pytest.raises(DataError, match="label 3"):
        label_maps([torch.tensor([[0, 3]])], 3, torch.device("cpu"))
    assert over_labelled(torch.tensor([[[1.0, 3.0, 9.0]]]), torch.tensor([[[0, 2, 255]]])).tolist() == [2.0]
