"""Ascent that chooses its own step size: the loop of Auto-PGD (Croce and Hein, ICML 2020, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from attacks.projections import Projection
from attacks.steps import Step, finite
from bench.protocols import Gradient


@dataclass
class Ascent:
    """Where each image of a run stands; the first dimension of every tensor is the batch.

    At each checkpoint an image whose objective rose in at most `rho` of the steps since the last one, or whose best
    value and step size are what they were, halves its step and returns to its best point. Checkpoints lie
    max(0.22 N, 1) steps from the start and then ever closer, down to 0.06 N.

    Attributes:
        project: onto the budget.
        direction: the steepest ascent under the norm.
        steps: number of steps N of the run.
        rho: share of rising steps below which the step size halves.
        momentum: weight of the new step against the last one.
        window, since: steps between the last checkpoint and the next, and those of them that are done.
        weight: the momentum that applies now; the first step has none.
        x, previous: the iterate and the one before it, (B, 3, H, W).
        grad: gradient at `x`.
        best, best_grad, best_value: image of largest objective so far, with its gradient and value.
        last: value at `x`, (B,).
        step: step size, (B, 1, 1, 1).
        rises: steps since the last checkpoint that raised the objective, (B,).
        reduced: the last checkpoint halved the step, (B,) bool.
        best_before: best value at the last checkpoint.
    """

    project: Projection
    direction: Step
    steps: int
    rho: float
    momentum: float
    window: int
    x: Tensor
    previous: Tensor
    grad: Tensor
    best: Tensor
    best_grad: Tensor
    best_value: Tensor
    last: Tensor
    step: Tensor
    rises: Tensor
    reduced: Tensor
    best_before: Tensor
    since: int = 0
    weight: float = 1.0

    @classmethod
    def start(
        cls, x: Tensor, found: Gradient, project: Projection, direction: Step,
        *, eps: float, steps: int, rho: float, momentum: float,
    ) -> Ascent:  # fmt: skip
        """A run from `x`, inside the budget, where `found` was seen; the first step has length 2 eps."""
        value, grad = found.value, finite(found.grad.detach())
        count, device = len(x), x.device
        return cls(
            project, direction, steps, rho, momentum, window=max(int(0.22 * steps), 1),
            x=x, previous=x, grad=grad, best=x, best_grad=grad, best_value=value, last=value,
            step=torch.full((count, 1, 1, 1), 2 * eps, device=device), rises=torch.zeros(count, device=device),
            reduced=torch.ones(count, dtype=torch.bool, device=device), best_before=value,
        )  # fmt: skip

    def select(self, index: Tensor) -> Ascent:
        """The run of some of the images."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        part: dict[str, Any] = {
            name: value[index] for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, project=self.project.select(index), **part)

    def propose(self) -> Tensor:
        """The next iterate, (B, 3, H, W) inside the budget."""
        ahead = self.project(self.x + self.step.to(self.x.dtype) * self.direction(self.grad))
        drift = (1 - self.weight) * (self.x - self.previous)
        return self.project(self.x + self.weight * (ahead - self.x) + drift)

    def arrive(self, x: Tensor, found: Gradient) -> None:
        """Take what was proposed, and what was seen there; halves steps where a checkpoint is due."""
        value, grad = found.value, finite(found.grad.detach())
        self.rises = self.rises + (value > self.last)
        better = value > self.best_value
        wide = better.view(-1, 1, 1, 1)
        self.best = torch.where(wide, x, self.best)
        self.best_grad = torch.where(wide, grad, self.best_grad)
        self.best_value = torch.where(better, value, self.best_value)
        self.previous, self.x, self.grad, self.last = self.x, x, grad, value
        self.weight = self.momentum
        self.since += 1
        if self.since == self.window:
            self.check()
            self.window = max(self.window - max(int(0.03 * self.steps), 1), max(int(0.06 * self.steps), 1))
            self.since = 0

    def check(self) -> None:
        """A checkpoint: conditions 1 and 2 of the paper."""
        stuck = ~self.reduced & (self.best_before >= self.best_value)
        self.reduced = (self.rises <= self.rho * self.window) | stuck
        self.best_before, self.rises = self.best_value, torch.zeros_like(self.rises)
        wide = self.reduced.view(-1, 1, 1, 1)
        self.step = torch.where(wide, self.step / 2, self.step)
        self.x = torch.where(wide, self.best, self.x)
        self.grad = torch.where(wide, self.best_grad, self.grad)
