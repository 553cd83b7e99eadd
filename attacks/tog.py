"""TOG, targeted adversarial objectness gradients against detectors (Chow et al., IEEE TPS 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from attacks.iterative import Iterative, Steps
from attacks.objectives import BoundLoss, TaskLoss
from bench.errors import NotApplicable
from bench.protocols import ImageRNG, Oracle, Pixels
from bench.registry import ATTACKS

Mode = Literal["untargeted", "vanishing", "fabrication", "mislabelling"]
#: The detector's loss of each mode; all but the first are decreased.
_KIND = {
    "untargeted": "cls+loc",
    "vanishing": "objectness",
    "fabrication": "emptiness",
    "mislabelling": "cls+loc",
}


class _Decreased(TaskLoss):
    """A loss kind that is decreased, whatever its targets are."""

    def bind(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], targeted: bool) -> BoundLoss:
        """The objective: minus the loss."""
        return super().bind(oracle, images, targets, targeted=True)


@ATTACKS.register_module(name="tog")
class TOG(Iterative):
    """PGD from a uniform start on one of four objectives; no ground truth is used unless `target` is set.

    `untargeted` ascends the detector's class and box losses towards its own clean detections, `mislabelling` descends
    them with wrong labels on the same boxes. `vanishing` descends the cross-entropy of all candidates to the
    background (loss kind `objectness`), `fabrication` that to anything but the background (`emptiness`), as the
    authors' code does for YOLO; for SSD it ascends the former, whose gradient all but vanishes on candidates that are
    background with certainty. An image on which nothing is detected with `confidence` comes back clean from
    `untargeted` and `mislabelling`; the other two need no detections.

    Args:
        mode: which objective.
        eps: radius in [0,1] pixel units.
        alpha: step size.
        steps: number of steps.
        start: `uniform` in the ball, or `none`.
        confidence: score from which a clean detection counts.
        wrong: `mislabelling`: each detection's most likely (`ml`) or least likely (`ll`) other class.
        target: `mislabelling`: a rule for wrong labels of the ground truth's objects, in place of `wrong` labels of
            the detector's own.
    """

    def __init__(
        self,
        mode: Mode = "untargeted",
        eps: Pixels = Fraction(8, 255),
        alpha: Pixels = Fraction(2, 255),
        steps: Steps = 10,
        start: Literal["uniform", "none"] = "uniform",
        confidence: Annotated[float, Field(gt=0, lt=1)] = 0.5,
        wrong: Literal["ml", "ll"] = "ml",
        target: str | None = None,
    ) -> None:
        if target is not None and mode != "mislabelling":
            raise ValueError(f"target: '{target}' belongs to mode mislabelling, not to {mode}")
        super().__init__(loss=_KIND[mode], eps=eps, alpha=alpha, steps=steps, start=start, target=target)
        if mode != "untargeted":
            self.loss = _Decreased(_KIND[mode])
        self.mode, self.confidence, self.wrong = mode, confidence, wrong
        self.tasks = frozenset({"detection"})
        self._own = mode == "untargeted" or (mode == "mislabelling" and target is None)
        # Images on which nothing is detected stay as they are.
        self.returns_clean = self._own
        if self._own:
            self.needs |= {"decision"}

    def run(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], rng: ImageRNG) -> Tensor:
        """Adversarial images (B, 3, H, W) in [0,1] and inside the budget.

        Raises:
            NotApplicable: `mislabelling` of a detector that does not tell the scores of other classes.
        """
        if self._own:
            found = [detections.above(self.confidence) for detections in oracle.decision(images)]
            targets = [self._goal(f, truth) for f, truth in zip(found, targets, strict=True)]
        out = super().run(oracle, images, targets, rng)
        if self.mode in ("vanishing", "fabrication"):
            return out
        idle = torch.tensor([bool(np.all(target.skipped())) for target in targets])
        return torch.where(idle.view(-1, 1, 1, 1).to(out.device), images, out)

    def _goal(self, found: Any, truth: Any) -> Any:
        """What the detector said, as the objects to get away from or, with wrong labels, to get to."""
        objects = found.as_objects(truth)
        if self.mode == "untargeted":
            return objects
        if found.class_scores is None:
            raise NotApplicable(
                "this detector does not tell how likely its other classes are: give the attack a target rule"
            )
        own = torch.nn.functional.one_hot(found.labels, found.class_scores.shape[1]).bool()
        if self.wrong == "ml":
            labels = found.class_scores.masked_fill(own, float("-inf")).argmax(1)
        else:
            labels = found.class_scores.masked_fill(own, float("inf")).argmin(1)
        return objects.relabelled(labels.numpy())
