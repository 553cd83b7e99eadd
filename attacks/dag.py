"""DAG, dense adversary generation for detectors (Xie et al., ICCV 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from torch import Tensor

from attacks.iterative import Iterative, Radius, Steps
from attacks.objectives import BoundLoss, TaskLoss
from bench.protocols import Oracle
from bench.registry import ATTACKS


class _Swap(TaskLoss):
    """The detector's `swap` loss: its targets hold true and wrong labels, and it is increased."""

    def __init__(self) -> None:
        super().__init__("swap")

    def bind(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], targeted: bool) -> BoundLoss:
        """The objective; wrong minus true logits rise, though the attack is targeted."""
        return super().bind(oracle, images, targets, targeted=False)


@ATTACKS.register_module(name="dag")
class DAG(Iterative):
    """Every candidate box on an object is pushed from its true to a wrong label until none is right (algorithm 1).

    x' = P(x' + gamma * g / ||g||_inf), g the gradient of the sum of wrong minus true logits over the candidates that
    are still right (loss kind `swap` of the detector): candidates that are fooled drop out, and an image without any
    left stays as it is. Candidates are the anchors of a dense head or a two-stage detector's proposals at a suppression
    overlap of 0.9; the paper keeps the clean image's proposals, here they are those of the current image, which the
    detector will use. The paper bounds nothing but the steps, so `eps` is null by default: give one to compare it with
    other attacks. An image without objects comes back clean.

    Args:
        gamma: largest change of a pixel by one step, in [0,1] pixel units.
        steps: largest number of steps.
        eps: radius in [0,1] pixel units; null = none.
        target: rule for the wrong labels; the paper maps classes to classes at random.
    """

    def __init__(
        self,
        gamma: Radius = Fraction(1, 510),
        steps: Steps = 150,
        eps: Radius | None = None,
        target: str = "random",
    ) -> None:
        super().__init__(
            loss="swap",
            norm="none" if eps is None else "linf",
            eps=eps,
            alpha=gamma,
            steps=steps,
            step="linf",
            target=target,
        )
        self.loss = _Swap()
        # Boxes that are fooled leave the objective.
        self.monotone = False
        self.tasks = frozenset({"detection"})
