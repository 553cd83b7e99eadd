"""Losses computed from logits, against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attacks.objectives import KL, make_loss
from bench.errors import NotApplicable

LOGITS = torch.tensor([[2.0, -1.0, 0.5, 1.0], [0.0, 3.0, 3.5, -2.0], [1.0, 1.0, 1.0, 0.0]])
LABELS = [0, 1, 3]


class Fixed:
    """An oracle whose logits are given."""

    def __init__(self, logits: Tensor) -> None:
        self.given, self.num_classes = logits, logits.shape[1]

    def logits(self, images: Tensor) -> Tensor:
        return self.given


def value(name: str, logits: Tensor = LOGITS, targeted: bool = False, kappa: float | None = None) -> Tensor:
    oracle = Fixed(logits)
    return make_loss(name, kappa).bind(oracle, logits, LABELS, targeted)(oracle, logits)


def test_margin():
    expected = torch.tensor([1.0 - 2.0, 3.5 - 3.0, 1.0 - 0.0])
    assert torch.equal(value("margin"), expected)
    assert torch.equal(value("margin", targeted=True), -expected)
    # Confidence: nothing is gained beyond kappa, in either direction.
    assert torch.equal(value("margin", kappa=0.0), expected.clamp(max=0))
    assert torch.equal(value("margin", targeted=True, kappa=0.25), (-expected).clamp(max=0.25))


def test_margin_gradient_stops_at_kappa():
    for kappa, moving in ((None, 3), (0.0, 1), (0.75, 2)):
        logits = LOGITS.clone().requires_grad_()
        value("margin", logits, kappa=kappa).sum().backward()
        assert int((logits.grad.abs().sum(1) > 0).sum()) == moving


def test_dlr():
    # The third image has three equal largest logits: the ratio is huge, but finite.
    expected = torch.tensor([-(2 - 1) / (2 - 0.5), -(3 - 3.5) / (3.5 - 0), -(0 - 1) / 1e-12])
    torch.testing.assert_close(value("dlr"), expected)
    torch.testing.assert_close(value("dlr", targeted=True), -expected)


def test_dlr_ignores_shift_and_scale():
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(value("dlr", logits * 50 + 3), value("dlr", logits), rtol=1e-4, atol=1e-5)
    with pytest.raises(NotApplicable, match="at least 3 classes"):
        value("dlr", logits[:, :2])


def test_kl_of_labels_and_of_maps():
    g = torch.Generator().manual_seed(0)
    for shape in ((3, 5), (3, 5, 4, 6)):
        clean, moved = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
        oracle = Fixed(clean)
        bound = KL().bind(oracle, clean, [None] * 3, False)
        zero = bound(oracle, clean)
        torch.testing.assert_close(zero, torch.zeros(3), rtol=0, atol=1e-6)
        oracle.given = moved
        p, q = clean.softmax(1), moved.softmax(1)
        expected = (
            (p * (p / q).log()).sum(1).flatten(1).mean(1) if len(shape) > 2 else (p * (p / q).log()).sum(1)
        )
        torch.testing.assert_close(bound(oracle, moved), expected)
        assert torch.equal(bound.select([2, 0]).reference, p[[2, 0]])


def test_kl_gradient_is_zero_at_the_clean_image():
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    oracle = Fixed(logits)
    KL().bind(oracle, logits.detach(), [None] * 3, False)(oracle, logits).sum().backward()
    assert logits.grad.abs().max() < 1e-7
