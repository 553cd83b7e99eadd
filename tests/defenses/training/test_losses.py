"""Every loss term against a value computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from defenses.training import losses
from tasks.heads import class_rows

A = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
B = torch.tensor([[0.0, 4.0], [3.0, 2.0]])  # differences 1, -2, 0, 4


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def value(x) -> float:
    return float(x)


def test_distances():
    assert value(losses.l1(A, B)) == pytest.approx(7 / 4)
    assert value(losses.mse(A, B)) == pytest.approx(21 / 4)
    assert value(losses.rmse(A, B)) == pytest.approx(math.sqrt(21 / 4))
    assert value(losses.l2_norm(A, B)) == pytest.approx((math.sqrt(5) + 4) / 2)


@pytest.mark.parametrize("loss", [losses.rmse, losses.l2_norm])
def test_root_losses_have_a_finite_gradient_at_a_perfect_fit(loss):
    x = A.clone().requires_grad_()
    loss(x, A).backward()
    assert torch.isfinite(x.grad).all()


FEATURES = torch.tensor([1.0, 2.0, 3.0, 4.0, -1.0, 0.0, 1.0, 2.0]).view(1, 2, 2, 2)
RESTORED = torch.tensor([1.0, 2.0, 3.0, 0.0, -1.0, 3.0, 1.0, 2.0]).view(1, 2, 2, 2)  # differences 4 and -3
WEIGHT = torch.tensor([[2.0, -1.0], [1.0, 3.0]])


def rows(*values: float) -> torch.Tensor:
    """One image's row of the last linear layer."""
    return torch.tensor([values], dtype=torch.float32)[:, :, None, None]


def test_class_activation_features():
    phi = losses.class_activation(FEATURES, rows(2, -1))
    assert phi.flatten().tolist() == [2, 4, 6, 8, 1, 0, -1, -2]
    # ReLU: minimum 0, maximum 8; constant maps survive the enlargement.
    normal = losses.normalised_activation(phi, 2)
    assert normal.flatten().tolist() == pytest.approx([0.25, 0.5, 0.75, 1, 0.125, 0, 0, 0])
    # Behind a segmenter every pixel brings the row of its own class: (2, -1) in the first column, (1, 3) in the second.
    own = torch.tensor([[2.0, 1.0], [2.0, 1.0], [-1.0, 3.0], [-1.0, 3.0]]).view(1, 2, 2, 2)
    assert losses.class_activation(FEATURES, own).flatten().tolist() == [2, 2, 6, 4, 1, 0, -1, 6]


def test_only_small_maps_are_enlarged():
    assert losses.enlarged(torch.ones(1, 2, 8, 4)).shape == (1, 2, 32, 32)
    large = torch.rand(1, 2, 40, 48)
    assert torch.equal(losses.enlarged(large), large)
    assert losses.enlarged(torch.ones(1, 2, 8, 48)).shape == (1, 2, 32, 48)


def test_caf_equation_6():
    w = rows(2, -1)
    paper = losses.caf_eq6(FEATURES, RESTORED, w, w, "paper")
    assert value(paper) == pytest.approx(math.sqrt(8**2 + 3**2))
    same = torch.ones(1, 1, 2, 2)
    # Each side is divided by its own maximum: twice the map is the same map.
    assert value(losses.caf_eq6(same, 2 * same, rows(1), rows(1), "code")) == pytest.approx(0)
    left = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).view(1, 1, 2, 2)
    # 2 to 32 columns, bilinear: the left map falls from 1 to 0, the right one rises; their difference is 1 - 2t.
    t = ((torch.arange(32) + 0.5) / 16 - 0.5).clamp(0, 1)
    expected = float((1 - 2 * t).square().mean())
    assert value(losses.caf_eq6(left, left.flip(3), rows(1), rows(1), "code")) == pytest.approx(
        expected, rel=1e-5
    )


def test_caf_equation_7():
    w, v = rows(2, -1), rows(1, 3)
    maps, weights = losses.caf_eq7(FEATURES, RESTORED, w, v, "paper")
    assert value(maps) == pytest.approx(5.0) and value(weights) == pytest.approx(math.sqrt(17))
    flat, shifted = torch.zeros(1, 2, 2, 2), torch.full((1, 2, 2, 2), 3.0)
    maps, weights = losses.caf_eq7(flat, shifted, w, v, "code")
    assert value(maps) == pytest.approx(9.0) and value(weights) == pytest.approx(17 / 2)


def test_rows_of_the_predicted_classes_have_no_gradient():
    linear = nn.Linear(2, 2, bias=False)
    linear.weight.data.copy_(WEIGHT)
    x = FEATURES.clone().requires_grad_()
    # Pooled to (2.5, 0.5): logits 4.5 and 4.
    w = class_rows(linear, x, lambda: linear(x.mean((2, 3))))
    assert w.tolist() == rows(2, -1).tolist() and not w.requires_grad
    _, distance = losses.caf_eq7(FEATURES, x, rows(1, 3), w)
    assert value(distance) == pytest.approx((1 + 16) / 2) and not distance.requires_grad


def test_rows_of_every_pixel_behind_a_segmenter():
    last = nn.Conv2d(2, 2, 1, bias=False)
    last.weight.data.copy_(WEIGHT[:, :, None, None])
    # Pixels (1, -1), (2, 0), (3, 1), (4, 2): logits (3, -2), (4, 2), (5, 6), (6, 10).
    w = class_rows(last, FEATURES, lambda: pytest.fail("a convolution needs no logits"))
    assert w.flatten().tolist() == [2, 2, 1, 1, -1, -1, 3, 3]


REAL, FAKE = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [-2.0]])  # means 2 and -1


def test_vanilla_gan():
    d = (softplus(-1) + softplus(-3)) / 2 + (softplus(0) + softplus(-2)) / 2
    assert value(losses.vanilla_d(REAL, FAKE)) == pytest.approx(d)
    assert value(losses.vanilla_g(REAL, FAKE)) == pytest.approx((softplus(0) + softplus(2)) / 2)


def test_relativistic_average_gan():
    # real - E fake = 2, 4; fake - E real = -2, -4.
    d = ((softplus(-2) + softplus(-4)) / 2 + (softplus(-2) + softplus(-4)) / 2) / 2
    g = ((softplus(2) + softplus(4)) / 2 + (softplus(2) + softplus(4)) / 2) / 2
    assert value(losses.ragan_d(REAL, FAKE)) == pytest.approx(d)
    assert value(losses.ragan_g(REAL, FAKE)) == pytest.approx(g)


def test_ragan_generator_gradient_flows_through_both_terms():
    fake = FAKE.clone().requires_grad_()
    losses.ragan_g(REAL, fake).backward()
    # Term 1: BCE(real - E fake, 0): d/dfake_i = -(s(2) + s(4)) / 2 / 2; term 2: -(1 - s(fake_i - 2)) / 2; all halved.
    s = [1 / (1 + math.exp(-x)) for x in (2, 4)]
    expected = [(-(s[0] + s[1]) / 4 - s[i] / 2) / 2 for i in range(2)]
    assert fake.grad.flatten().tolist() == pytest.approx(expected, rel=1e-5)


def test_relativistic_pairs():
    assert value(losses.relativistic_d(REAL, FAKE)) == pytest.approx((softplus(-1) + softplus(-5)) / 2)
    assert value(losses.relativistic_g(REAL, FAKE)) == pytest.approx((softplus(1) + softplus(5)) / 2)


def scores(*values: float):
    """Two scales of n_layers 3: four features and a score map each."""
    return [[torch.full((1, 2), v)] * 4 + [torch.tensor([v, v + 2])] for v in values]


def test_lsgan_and_feature_matching():
    # (0 - 1)^2, (2 - 1)^2 and (1 - 1)^2, (3 - 1)^2.
    assert value(losses.lsgan(scores(0.0, 1.0), 1.0)) == pytest.approx(1 + 2)
    # Four layers in each of two scales at distance 3: 8 * 3 * 4 / 4 / 2.
    assert value(losses.feature_matching(scores(0.0, 1.0), scores(3.0, 4.0))) == pytest.approx(12)
    real = [[torch.ones(1, requires_grad=True)] * 5]
    fake = [[torch.zeros(1, requires_grad=True)] * 5]
    losses.feature_matching(real, fake).backward()
    assert real[0][0].grad is None and fake[0][0].grad is not None


Z_CLEAN = torch.tensor([[1.0, 1.0], [3.0, 1.0], [0.0, 0.0], [9.0, 9.0]])
Z_ADV = torch.tensor([[2.0, 0.0], [4.0, 2.0], [1.0, 3.0], [5.0, 5.0]])
LABELS = torch.tensor([0, 0, 2, -1])


def test_class_centres_and_terms():
    # Centres: clean (2, 1), (0, 0); restored (3, 1), (1, 3). Class 1 is absent, label -1 is ignored.
    assert {k: m.tolist() for k, m in losses.centres(Z_CLEAN, LABELS).items()} == {0: [2, 1], 2: [0, 0]}
    assert value(losses.class_align(Z_CLEAN, Z_ADV, LABELS)) == pytest.approx((1 + 0) / 2 + (1 + 3) / 2)
    # Class 0: |(2,0)-(3,1)| = 1, |(4,2)-(3,1)| = 1, so 1; class 2 is its own centre.
    assert value(losses.class_intra(Z_ADV, LABELS)) == pytest.approx(1)
    # The centres are 2 apart; two ordered pairs.
    assert value(losses.class_inter(Z_ADV, LABELS, 5)) == pytest.approx(2 * 3)
    assert value(losses.class_inter(Z_ADV, LABELS, 1)) == 0
    assert value(losses.class_inter(Z_ADV, LABELS, 1, hinge=False)) == pytest.approx(-2)


def test_a_single_class_has_no_pairs():
    z = Z_ADV.clone().requires_grad_()
    loss = losses.class_inter(z, torch.zeros(4, dtype=torch.long))
    loss.backward()
    assert value(loss) == 0 and not z.grad.any()
