"""Attacks on label maps: SegPGD, and what C&W and DeepFool become where every pixel has a label.

All run in the loop of `attacks.iterative`. An image without a labelled pixel comes back clean.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from attacks.iterative import Iterative, Steps
from attacks.pixels import PixelLoss, PixelMargin, RightMargin, SegPGDLoss
from bench.protocols import ImageRNG, Oracle, Pixels
from bench.registry import ATTACKS
from tasks.segmentation.task import IGNORE


def restore_unlabelled(images: Tensor, clean: Tensor, targets: Sequence[Any]) -> Tensor:
    """`images` (B, 3, H, W), with the `clean` one where a label map holds no label: there is nothing to attack."""
    empty = torch.tensor([bool((torch.as_tensor(target) == IGNORE).all()) for target in targets])
    return torch.where(empty.view(-1, 1, 1, 1).to(images.device), clean, images)


class _PixelAttack(Iterative):
    """The loop with a loss of label maps."""

    def __init__(
        self,
        loss: PixelLoss,
        eps: Fraction,
        alpha: Fraction,
        steps: int,
        start: Literal["none", "uniform"],
        target: str | None = None,
    ) -> None:
        super().__init__(eps=eps, alpha=alpha, steps=steps, start=start, target=target)
        self.loss = loss
        # Pixels that are wrong leave the objective, or weigh more with every step.
        self.monotone = False
        self.needs = frozenset({"gradient", *loss.needs})
        self.tasks = loss.tasks

    def run(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], rng: ImageRNG) -> Tensor:
        """Adversarial images (B, 3, H, W) in [0,1] and inside the budget."""
        return restore_unlabelled(super().run(oracle, images, targets, rng), images, targets)


@ATTACKS.register_module(name="segpgd")
class SegPGD(_PixelAttack):
    """PGD on cross-entropy that moves from right pixels to all (Gu et al., ECCV 2022, algorithm 1).

    x' = P(x' + alpha * sign grad ((1 - lambda) CE(right) + lambda CE(wrong))) with lambda(t) = (t - 1) / 2N at step
    t = 1..N (`SegPGDLoss`), from a uniform start.

    Args:
        eps: radius in [0,1] pixel units.
        alpha: step size.
        steps: number of steps N.
        start: `uniform` in the ball, or `none`.
    """

    def __init__(
        self,
        eps: Pixels = Fraction(8, 255),
        alpha: Pixels = Fraction(2, 255),
        steps: Steps = 20,
        start: Literal["none", "uniform"] = "uniform",
    ) -> None:
        super().__init__(SegPGDLoss(), eps, alpha, steps, start)


@ATTACKS.register_module(name="cw_seg")
class CWSeg(_PixelAttack):
    """PGD on the margin of Carlini and Wagner 2017 (f_6), pixel by pixel.

    The mean over labelled pixels of min(max_{k != y} z_k - z_y, kappa): pixels that are wrong by kappa have no
    gradient. Papers that attack segmenters with "C&W" inside an L-infinity ball state eps and step size but neither
    form nor steps: this form, and as many steps as their BIM, are a choice.

    Args:
        eps: radius in [0,1] pixel units.
        alpha: step size.
        steps: number of steps.
        kappa: confidence.
        start: `none`, or `uniform` in the ball.
        target: rule for a wrong label map to reach; None = untargeted.
    """

    def __init__(
        self,
        eps: Pixels = Fraction(3, 100),
        alpha: Pixels = Fraction(1, 100),
        steps: Steps = 4,
        kappa: Annotated[float, Field(ge=0)] = 0.0,
        start: Literal["none", "uniform"] = "none",
        target: str | None = None,
    ) -> None:
        super().__init__(PixelMargin(kappa, target is not None), eps, alpha, steps, start, target)


@ATTACKS.register_module(name="deepfool_seg")
class DeepFoolSeg(_PixelAttack):
    """DeepFool (Moosavi-Dezfooli et al. 2016) on all right pixels at once, projected onto the ball.

    DeepFool steps to where the linearised margin of an image is 0. Here the margin is m = sum over right pixels of
    best wrong minus true logit, so that a step costs one gradient w = grad m instead of one a pixel and class: the
    L-infinity step is (1 + overshoot) |m| / ||w||_1 * sign w, at most eps. Papers that name DeepFool among attacks on
    segmenters do not say how it is applied: this form is a choice.

    Args:
        eps: radius in [0,1] pixel units.
        steps: largest number of steps.
        overshoot: how far beyond the linearised boundary a step goes.
        goal: share of wrong pixels at which an image is done.
    """

    def __init__(
        self,
        eps: Pixels = Fraction(3, 100),
        steps: Steps = 50,
        overshoot: Annotated[float, Field(ge=0)] = 0.02,
        goal: Annotated[float, Field(gt=0, le=1)] = 0.99,
    ) -> None:
        super().__init__(RightMargin(goal), eps, eps, steps, "none")
        self.overshoot = overshoot

    def _move(self, value: Tensor, grad: Tensor) -> Tensor:
        slope = grad.abs().flatten(1).sum(1, dtype=torch.float64)
        length = (1 + self.overshoot) * value.double().abs() / slope.masked_fill(slope == 0, 1.0)
        return length.clamp(max=self._alpha).to(grad.dtype).view(-1, 1, 1, 1) * grad.sign()
