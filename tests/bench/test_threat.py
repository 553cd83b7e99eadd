"""The oracle shows an attack the gradients of its threat level, and nothing it did not ask for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.errors import NotApplicable
from bench.protocols import Attack, Defense, Geometry, ImageRNG, TargetModel
from bench.threat import ModelOracle, Victim


class Linear(TargetModel):
    """Two classes, logits W x; loss ce = logsumexp - z_y."""

    task = "classification"
    losses = ("ce",)
    num_classes = 2

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        weight = torch.linspace(-1, 1, 2 * 3 * 4 * 4).reshape(2, -1)
        self.register_buffer("weight", weight * scale)

    def logits(self, images: Tensor, *, geometry: Geometry | None = None) -> Tensor:
        # Not a matrix product: its rounding may depend on the number of rows.
        return (images.flatten(1)[:, None] * self.weight).sum(-1)

    def loss(
        self, images: Tensor, targets: Sequence[Any], kind: str, *,
        geometry: Geometry | None = None, rng: ImageRNG | None = None,
    ) -> Tensor:  # fmt: skip
        return self.loss_from_logits(self.logits(images), targets, kind)

    def loss_from_logits(self, logits: Tensor, targets: Sequence[Any], kind: str) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="none")

    def predict(self, images: Tensor, *, geometry: Geometry | None = None) -> list[Any]:
        return [int(i) for i in self.logits(images).argmax(1)]


class Square(Defense):
    """x^2, with the surrogate 3x, so that every level has its own gradient."""

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        return images**2

    def surrogate(self, images: Tensor) -> Tensor:  # type: ignore[override]
        return 3 * images


class Flip(Defense):
    """Adds a random sign of 0.1."""

    stochastic = True

    def forward(self, images: Tensor, rng: ImageRNG) -> Tensor:  # type: ignore[override]
        return images * (1 + 0.1 * rng.signs((1, 1, 1)))


class Asks(Attack):
    needs = frozenset({"gradient"})

    def run(self, oracle: Any, images: Tensor, targets: Sequence[Any], rng: ImageRNG) -> Tensor:
        return images


def oracle(victim: Victim, n: int = 2) -> ModelOracle:
    return ModelOracle(victim, Asks(), ImageRNG.for_images("k", [str(i) for i in range(n)]))


def grad(victim: Victim, x: Tensor, n: int = 2) -> Tensor:
    return oracle(victim, n).gradient(x, lambda o, v: o.loss(v, [0, 1][:n], "ce")).grad


def by_hand(x: Tensor, function: Any, model: Linear) -> Tensor:
    x = x.clone().requires_grad_(True)
    loss = model.loss(function(x), [0, 1], "ce").sum()
    return torch.autograd.grad(loss, x)[0]


X = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.1


def test_each_level_has_its_own_gradient() -> None:
    model, square = Linear(), Square()
    torch.testing.assert_close(grad(Victim((model,)), X), by_hand(X, lambda v: v, model))
    torch.testing.assert_close(grad(Victim((model,), square, "exact"), X), by_hand(X, lambda v: v**2, model))
    # BPDA: the loss gradient at the defended image, times the surrogate's slope.
    defended = (X**2).requires_grad_(True)
    expected = torch.autograd.grad(model.loss(defended, [0, 1], "ce").sum(), defended)[0] * 3
    torch.testing.assert_close(grad(Victim((model,), square, "bpda"), X), expected)


def test_ensemble_averages_logits() -> None:
    a, b = Linear(1.0), Linear(-3.0)
    x = X.clone().requires_grad_(True)
    fused = 0.25 * a.logits(x) + 0.75 * b.logits(x)
    expected = torch.autograd.grad(a.loss_from_logits(fused, [0, 1], "ce").sum(), x)[0]
    torch.testing.assert_close(grad(Victim((a, b), weights=(0.25, 0.75)), X), expected)


def test_eot_is_the_mean_of_its_draws_and_independent_of_the_batch() -> None:
    victim = Victim((Linear(),), Flip(), "exact", eot=6)
    whole = grad(victim, X)
    view = oracle(victim).select([1])
    alone = view.gradient(X[[1]], lambda o, v: o.loss(v, [1], "ce")).grad
    assert torch.equal(whole[[1]], alone)
    plus, minus = (by_hand(X, lambda v, s=s: v * (1 + 0.1 * s), Linear()) for s in (1, -1))
    weights = (whole - minus).flatten(1).sum(1) / (plus - minus).flatten(1).sum(1)
    assert torch.all((weights * 6 - (weights * 6).round()).abs() < 1e-3)
    assert not torch.equal(whole, grad(Victim((Linear(),), Flip(), "exact", eot=1), X))


def test_a_view_made_inside_an_objective_keeps_the_draw() -> None:
    """Input diversity splits a batch inside the objective; the parts must see the draw in progress, each once."""
    victim = Victim((Linear(),), Flip(), "exact", eot=6)

    def split(o: Any, v: Tensor) -> Tensor:
        return torch.cat([o.select([i]).loss(v[[i]], [i], "ce") for i in range(2)])

    assert torch.equal(oracle(victim).gradient(X, split).grad, grad(victim, X))


def test_passes_are_counted_per_image() -> None:
    o = oracle(Victim((Linear(), Linear(2.0)), Flip(), "exact", eot=5))
    o.gradient(X, lambda view, v: view.loss(v, [0, 1], "ce"))
    o.select([0]).gradient(X[[0]], lambda view, v: view.loss(v, [0], "ce"))
    assert [(t.forwards, t.backwards, t.steps) for t in o.traces] == [(20, 10, 2), (10, 5, 1)]


def test_zero_and_broken_gradients_are_recorded() -> None:
    o = oracle(Victim((Linear(),)))
    o.gradient(X, lambda view, v: (v * torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)).flatten(1).sum(1))
    o.gradient(X, lambda view, v: (v * torch.tensor([1.0, float("nan")]).view(2, 1, 1, 1)).flatten(1).sum(1))
    assert [(t.zero, t.nonfinite, t.first_zero, t.last_zero) for t in o.traces] == [
        (1, 0, True, False),
        (0, 1, False, False),
    ]


def test_an_attack_gets_only_what_it_declares() -> None:
    with pytest.raises(PermissionError, match="asked for features but declares"):
        oracle(Victim((Linear(),))).features(X, "layer")
    with pytest.raises(PermissionError, match="decision or logits"):
        oracle(Victim((Linear(),))).decision(X)


def test_no_true_gradient_through_a_nondifferentiable_defense() -> None:
    class Round(Defense):
        differentiable = False

    with pytest.raises(NotApplicable, match="not differentiable"):
        Victim((Linear(),), Round(), "exact").check()
    Victim((Linear(),), Round(), "bpda").check()


def test_an_objective_must_be_per_image() -> None:
    with pytest.raises(ValueError, match="one value per image"):
        oracle(Victim((Linear(),))).gradient(X, lambda view, v: view.loss(v, [0, 1], "ce").mean())


def test_a_value_is_that_of_the_gradient_without_its_backward_pass() -> None:
    def objective(oracle: Any, images: Tensor) -> Tensor:
        return oracle.loss(images, [0, 1], "ce")

    victim = Victim((Linear(),), Flip(), "exact", eot=3)
    both, alone = oracle(victim), oracle(victim)
    assert torch.equal(both.gradient(X, objective).value, alone.value(X, objective))
    assert [(t.forwards, t.backwards, t.steps) for t in alone.traces] == [(3, 0, 0)] * 2
    with pytest.raises(ValueError, match="one value per image"):
        alone.value(X, lambda o, v: objective(o, v).sum())
