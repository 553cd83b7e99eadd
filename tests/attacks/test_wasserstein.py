"""FWA: plans keep mass, cost and range; the oracle against a linear program; it beats its own start."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from attacks.wasserstein import Transport
from bench.errors import PluginError
from bench.registry import ATTACKS


def images(count: int, size: tuple[int, int], seed: int, channels: int = 3) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(count, channels, *size, generator=g) * 1.4 - 0.2).clamp(0, 1)


def test_nothing_moves_in_the_first_plan():
    x = images(2, (5, 6), 0)
    transport = Transport(x, 3)
    assert torch.equal(transport.arrivals(transport.still()), x)
    assert transport.spent(transport.still()).abs().max() == 0


def test_what_is_sent_arrives():
    x = torch.zeros(1, 1, 3, 4)
    x[0, 0, 1, 1] = 1.0
    transport = Transport(x, 3)
    plan = torch.zeros(1, 1, 9, 3, 4)
    plan[0, 0, 5, 1, 1], plan[0, 0, 6, 1, 1] = 0.25, 0.75  # one to the right; one down and one to the left
    out = transport.arrivals(plan)
    assert out[0, 0, 1, 2] == 0.25 and out[0, 0, 2, 0] == 0.75 and out.sum() == 1
    assert float(transport.spent(plan)) == pytest.approx(0.25 + 0.75 * 2**0.5)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    size=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    side=st.sampled_from([3, 5]),
    radius=st.sampled_from([0.001, 0.02, 0.3, 2.0]),
    seed=st.integers(0, 999),
)
def test_plans_stay_in_their_ball(size, side, radius, seed):
    x = images(2, size, seed)
    transport = Transport(x, side)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    plan = transport.fit(transport.best_plan(grad, radius, 1e-2, 25))
    assert (plan >= -1e-6).all()
    torch.testing.assert_close(plan.sum(2), x, rtol=0, atol=1e-5)
    assert (transport.spent(plan) <= radius * x.flatten(1).double().sum(1) * (1 + 1e-5) + 1e-6).all()
    out = transport.arrivals(plan)
    assert out.min() >= -1e-6 and out.max() <= 1 + 1e-4
    torch.testing.assert_close(out.sum((1, 2, 3)), x.sum((1, 2, 3)), rtol=1e-5, atol=1e-4)


def test_the_oracle_solves_the_linear_program():
    """With little entropy its gain is that of the best plan that a simplex solver finds."""
    x = images(1, (3, 3), 4, channels=1).double()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    transport = Transport(x, 3)
    radius = 0.2
    plan = transport.best_plan(grad, radius, 1e-3, 50)
    gain = float((transport.arrivals(plan) * grad).sum())
    cells = [(i, j) for i in range(3) for j in range(3)]
    pairs = [(a, b) for a in range(9) for b in range(9) if max(abs(np.subtract(cells[a], cells[b]))) <= 1]
    value = grad.flatten().numpy()
    rows = np.zeros((9, len(pairs)))
    for k, (a, _) in enumerate(pairs):
        rows[a, k] = 1
    cost = np.array([[np.hypot(*np.subtract(cells[a], cells[b])) for a, b in pairs]])
    best = linprog(
        [-value[b] for _, b in pairs],
        cost,
        [radius * float(x.sum())],
        rows,
        x.flatten().numpy(),
        method="highs",
    )
    assert gain <= -best.fun + 1e-6
    assert gain == pytest.approx(-best.fun, abs=0.02 * (-best.fun - float((x * grad).sum())))
    assert gain > float((x * grad).sum())


def test_it_moves_mass_and_fools(lab):
    target = lab.Classifier(lab.convnet(), 5, one_by_one=True)
    x, _ = lab.batch(5)
    labels = target.predict(x)
    attack = ATTACKS.create("fwa", {"radius": 0.1, "steps": 15})
    out = lab.run(attack, target, x, labels)
    assert sum(p != y for p, y in zip(target.predict(out), labels, strict=True)) >= 3
    torch.testing.assert_close(out.sum((1, 2, 3)), x.sum((1, 2, 3)), rtol=1e-4, atol=1e-2)
    small = lab.run(ATTACKS.create("fwa", {"radius": 0.001, "steps": 15}), target, x, labels)
    assert (small - x).abs().sum() < 0.2 * (out - x).abs().sum()
    gain = target.loss(small, labels, "ce") - target.loss(x, labels, "ce")
    assert (gain >= 0).all() and gain.sum() > 0
    assert attack.norm is None and attack.eps is None
    assert (attack.excess(x, out) < 1e-3).all()
    assert (ATTACKS.create("fwa", {"radius": 0.01}).excess(x, out) > 0).all()


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    radius=st.sampled_from([0.01, 0.5]),
    seed=st.integers(0, 99),
)
def test_what_is_refused_has_no_plan(size, radius, seed):
    """The bounds never exceed the cheapest plan, which a simplex solver finds; on a line they are it."""
    x = images(1, size, seed, channels=1).double()
    order = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(seed))
    moved = x.flatten()[order].view(x.shape)
    cells = [(i, j) for i in range(size[0]) for j in range(size[1])]
    cost = np.array([[np.hypot(*np.subtract(a, b)) for b in cells] for a in cells])
    count = len(cells)
    rows = np.concatenate([np.kron(np.eye(count), np.ones(count)), np.kron(np.ones(count), np.eye(count))])
    sums = np.concatenate([x.flatten().numpy(), moved.flatten().numpy()])
    least = linprog(cost.flatten(), A_eq=rows, b_eq=sums, method="highs").fun
    mass = max(float(x.sum()), 1e-12)
    exact = least / (radius * mass) - 1
    bound = float(ATTACKS.create("fwa", {"radius": radius}).excess(x, moved))
    # Without a plan that costs more than nothing, what is left is the mass lost: none.
    assert bound <= max(exact, 0) + 1e-6
    if 1 in size and exact > 0:
        assert bound == pytest.approx(exact, rel=1e-6, abs=1e-6)


def test_mass_that_appears_is_refused(lab):
    x, _ = lab.batch(2)
    assert (ATTACKS.create("fwa").excess(x, (x * 1.01).clamp(0, 1)) > 0.1).all()


@pytest.mark.parametrize(
    ("params", "message"), [({"window": 4}, "odd"), ({"radius": 0}, "radius"), ({"steps": 0}, "steps")]
)
def test_bad_input(params, message):
    with pytest.raises(PluginError, match=message):
        ATTACKS.create("fwa", params)
