"""APGD: projected gradient ascent that chooses its own step size (Croce and Hein, ICML 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from attacks.adaptive import Ascent
from attacks.iterative import Best, Climb, Radius, Steps
from attacks.projections import Projection, check_radius, make_projection
from attacks.scores import Stop, Watched, as_labels, score
from attacks.steps import STEPS, l2
from bench.errors import GridError, NotApplicable
from bench.protocols import Attack, Gradient, ImageRNG, Oracle
from bench.registry import ATTACKS

LossName = Literal["ce", "dlr", "dlr_targeted", "margin"]
CLASSES = 9
"""Target classes of AutoAttack's targeted parts."""


@ATTACKS.register_module(name="apgd")
class APGD(Attack):
    """Auto-PGD: momentum, and a step size of 2 eps that halves when progress stalls (Croce and Hein 2020, algorithm 1).

    The loop is `attacks.adaptive.Ascent`. The start is random, at distance eps.

    An image comes back as its best successful iterate. With a stochastic defense the gradient is the mean over the
    threat model's draws and success is read off the mean logits of the same draws.

    Args:
        loss: `ce`, `dlr` (difference of logits ratio, eq. 6), `margin`, or `dlr_targeted` (eq. 7): one run towards
            each of the `classes` likeliest wrong classes.
        norm: linf or l2.
        eps: radius in [0,1] pixel units.
        steps: number of steps N of a run.
        restarts: random starts; images fooled by one take no part in the next.
        classes: target classes of `dlr_targeted`, and of it alone; at most the wrong classes that the model has; the
            published 9 stands for all of them where there are fewer.
        rho: share of rising steps below which the step size halves.
        momentum: weight of the new step against the last one, 0.75 as published.
        target: rule for a wrong target to reach; None = untargeted.
        failed: what becomes of an image that was not fooled: its `best` iterate, or the `clean` image, as AutoAttack
            has it.
        stop_when_fooled: a fooled image leaves at once; see `attacks.scores.Stop`.
    """

    tasks = frozenset({"classification"})
    needs = frozenset({"gradient", "logits"})
    stochastic = True

    def __init__(
        self,
        loss: LossName = "ce",
        norm: Literal["linf", "l2"] = "linf",
        eps: Radius = Fraction(8, 255),
        steps: Steps = 100,
        restarts: Annotated[int, Field(ge=1)] = 1,
        classes: Annotated[int, Field(ge=1)] = CLASSES,
        rho: Annotated[float, Field(gt=0, le=1)] = 0.75,
        momentum: Annotated[float, Field(gt=0, le=1)] = 0.75,
        target: str | None = None,
        failed: Literal["best", "clean"] = "best",
        stop_when_fooled: Stop = None,
    ) -> None:
        if target is not None and loss == "dlr_targeted":
            raise ValueError(
                "loss 'dlr_targeted' picks its targets itself: use ce, dlr or margin with a target rule"
            )
        if classes != CLASSES and loss != "dlr_targeted":
            raise ValueError(
                f"classes: {classes} belongs to loss dlr_targeted, loss '{loss}' has no target classes"
            )
        check_radius(norm, eps)
        self.loss, self.norm, self.eps, self.target = loss, norm, eps, target
        self._eps, self._norm = float(eps), norm
        self.steps, self.restarts, self.classes = steps, restarts, classes
        self.rho, self.momentum = rho, momentum
        self.failed, self.stop_when_fooled = failed, stop_when_fooled is True
        self.monotone = restarts == 1 and loss != "dlr_targeted"
        self.returns_clean = failed == "clean"

    def passes(self) -> int:
        runs = self.restarts * (self.classes if self.loss == "dlr_targeted" else 1)
        return runs * (self.steps + 1)

    def check_classes(self, num_classes: int) -> None:
        if self.loss == "dlr_targeted" and self.classes > max(num_classes - 1, CLASSES):
            raise GridError(
                f"attack '{self.name}', classes: {self.classes} is more than the {num_classes - 1} wrong classes of "
                "the model"
            )

    def run(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], rng: ImageRNG) -> Tensor:
        """Adversarial images (B, 3, H, W) in [0,1] and inside the budget.

        Raises:
            NotApplicable: the loss needs more classes than the victim has.
            GridError: more target classes than wrong ones (`check_classes`).
        """
        least = {"dlr": 3, "dlr_targeted": 4}.get(self.loss, 2)
        if oracle.num_classes < least:
            raise NotApplicable(
                f"loss '{self.loss}' needs {least} classes, the model has {oracle.num_classes}"
            )
        self.check_classes(oracle.num_classes)
        clean = images.detach()
        best = Best(clean)
        climb = Climb(oracle, clean, tuple(targets), rng, torch.arange(len(clean)))
        goals = self._goals(climb) if self.loss == "dlr_targeted" else None
        for turn in range(1 if goals is None else goals.shape[1]):
            for _ in range(self.restarts):
                if len(climb.index) == 0:
                    break
                goal = None if goals is None else goals[climb.index.to(goals.device), turn]
                self._climb(climb, best, goal)
                climb = climb.select((~best.fooled[climb.index]).nonzero()[:, 0])
        if self.failed == "clean":
            lost = (~best.fooled).nonzero()[:, 0].to(clean.device)
            best.images[lost] = clean[lost]
        return best.images

    def _goals(self, climb: Climb) -> Tensor:
        """The likeliest wrong classes at the clean images, (B, n)."""
        with torch.no_grad():
            logits = climb.oracle.logits(climb.clean)
        labels = as_labels(climb.targets, logits.device)
        others = logits.scatter(1, labels[:, None], float("-inf"))
        return others.topk(min(self.classes, logits.shape[1] - 1), dim=1).indices

    def _climb(self, climb: Climb, best: Best, goal: Tensor | None) -> None:
        """One run from one start; what it finds goes to `best`."""
        device = climb.clean.device
        objective = _Objective(self.loss, self.target is not None, as_labels(climb.targets, device), goal)
        project: Projection = make_projection(self._norm, climb.clean, self._eps)
        x = project(climb.clean + self._eps * self._start(climb))
        ascent = Ascent.start(
            x, self._look(climb, best, objective, x), project, STEPS["l2" if self._norm == "l2" else "sign"],
            eps=self._eps, steps=self.steps, rho=self.rho, momentum=self.momentum,
        )  # fmt: skip
        for _ in range(self.steps):
            if self.stop_when_fooled:
                out = best.fooled[climb.index]
                if out.any():
                    kept = (~out).nonzero()[:, 0]
                    if len(kept) == 0:
                        return
                    climb, objective = climb.select(kept), objective.select(kept)
                    ascent = ascent.select(kept.to(device))
            x = ascent.propose()
            ascent.arrive(x, self._look(climb, best, objective, x))

    def _start(self, climb: Climb) -> Tensor:
        """Perturbations of length 1 in the norm."""
        shape, device = climb.clean.shape[1:], climb.clean.device
        if self._norm == "l2":
            return l2(climb.rng.normal(shape, device).to(climb.clean.dtype))
        noise = climb.rng.uniform(shape, -1, 1, device).to(climb.clean.dtype)
        return noise / noise.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)

    def _look(self, climb: Climb, best: Best, objective: _Objective, x: Tensor) -> Gradient:
        """Objective and gradient at `x`; a success or a new best is kept."""
        result = climb.oracle.gradient(x, objective)
        best.offer(climb.index, x, result.value.float(), objective.hit().cpu())
        return result


class _Objective(Watched):
    """The loss of fixed images; `goal` are the target classes of `dlr_targeted`."""

    def __init__(self, loss: LossName, targeted: bool, labels: Tensor, goal: Tensor | None) -> None:
        super().__init__(labels, targeted)
        self.loss, self.goal = loss, goal

    def value(self, logits: Tensor) -> Tensor:
        """Values (B,) to be increased."""
        if self.goal is None:
            return score(self.loss, logits, self.labels, self.targeted)
        top = logits.topk(4, dim=1).values
        gap = (logits.gather(1, self.goal[:, None]) - logits.gather(1, self.labels[:, None]))[:, 0]
        return gap / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)

    def select(self, index: Tensor) -> _Objective:
        at = index.to(self.labels.device)
        goal = None if self.goal is None else self.goal[at]
        return _Objective(self.loss, self.targeted, self.labels[at], goal)
