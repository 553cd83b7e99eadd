"""SEA, the segmentation ensemble attack (Croce, Singh, Hein, ECCV 2024): APGD with shrinking radius on three losses."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from attacks.adaptive import Ascent
from attacks.iterative import Steps
from attacks.pixels import (
    JensenShannon,
    MaskedCE,
    MaskedUnitLogit,
    PixelLoss,
    SegPGDLoss,
    label_maps,
    over_labelled,
    right,
)
from attacks.projections import Projection, make_projection
from attacks.scores import over_draws
from attacks.segmentation import restore_unlabelled
from attacks.starts import start as perturbed
from attacks.steps import sign
from bench.protocols import Attack, Gradient, ImageRNG, Oracle, Pixels
from bench.registry import ATTACKS

LossName = Literal["mask_ce", "mask_ce_balanced", "js", "segpgd", "mask_logit"]
#: Radii as multiples of eps and shares of the steps they get (section 3.5).
_STAGES = ((2.0, 0.3), (1.5, 0.3), (1.0, 0.4))


@ATTACKS.register_module(name="sea")
class SEA(Attack):
    """For each loss one run of APGD in three stages of radius 2 eps, 1.5 eps and eps; each image keeps its worst.

    The losses are masked cross-entropy, the same balanced over classes, and the Jensen-Shannon divergence
    (`attacks.pixels`). A stage starts from the projection of the last one's best iterate, where best, here and between
    losses, is the lowest share of right pixels. This ensemble of the paper is the default; its code has two more
    losses, which can be asked for: SegPGD's, whose weights move over the steps of a stage, and the label's logit at
    unit length. As published the ensemble minimises pixel accuracy image by image; its greedy search for the lowest
    mIoU of a whole data set is no attack on an image and not part of this.

    Against a defense that draws random numbers the share of right pixels is the mean over the threat model's draws.

    Args:
        eps: radius in [0,1] pixel units.
        steps: gradient steps for each loss, of all stages together.
        losses: which losses: `mask_ce`, `mask_ce_balanced`, `js`, `segpgd`, `mask_logit`.
        shrink: the three radii; off = all steps at eps.
        start: `none` or `uniform` in the first stage's ball; the paper does not say, its code starts at the image.
        class_pixels: pixels of each class in the training set, which the balanced loss divides by; None = those of the
            image itself.
        rho: share of rising steps below which APGD halves its step size.
        momentum: APGD's weight of the new step against the last one.
    """

    tasks = frozenset({"segmentation"})
    needs = frozenset({"gradient", "logits"})
    monotone = False

    def __init__(
        self,
        eps: Pixels = Fraction(8, 255),
        steps: Steps = 300,
        losses: Annotated[tuple[LossName, ...], Field(min_length=1)] = ("mask_ce", "mask_ce_balanced", "js"),
        shrink: bool = True,
        start: Literal["none", "uniform"] = "none",
        class_pixels: tuple[float, ...] | None = None,
        rho: Annotated[float, Field(gt=0, le=1)] = 0.75,
        momentum: Annotated[float, Field(gt=0, le=1)] = 0.75,
    ) -> None:
        self.eps, self.start = eps, start
        self.rho, self.momentum = rho, momentum
        self.stochastic = start != "none"
        of: dict[str, PixelLoss] = {
            "mask_ce": MaskedCE(),
            "mask_ce_balanced": MaskedCE("image" if class_pixels is None else class_pixels),
            "js": JensenShannon(),
            "segpgd": SegPGDLoss(),
            "mask_logit": MaskedUnitLogit(),
        }
        self.losses = [of[name] for name in losses]
        self.stages = _stages(float(eps), steps) if shrink else [(float(eps), steps)]

    def passes(self) -> int:
        return len(self.losses) * sum(steps + 1 for _, steps in self.stages)

    def run(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], rng: ImageRNG) -> Tensor:
        """Adversarial images (B, 3, H, W) in [0,1] and inside the budget.

        Raises:
            GridError: `class_pixels` is not one number a class.
        """
        clean = images.detach()
        labels = label_maps(targets, oracle.num_classes, clean.device)
        worst = _Worst(clean)
        for loss in self.losses:
            x = clean
            if self.start == "uniform":
                x = perturbed("uniform", self.stages[0][0], "linf", clean, rng)
            for eps, steps in self.stages:
                best = _Worst(x)
                self._climb(
                    _Objective(loss, labels), oracle, make_projection("linf", clean, eps), eps, steps, best
                )
                x = best.images
            worst.offer(best.images, best.right, earlier_wins_ties=True)
        return restore_unlabelled(worst.images, clean, targets)

    def _climb(
        self, objective: _Objective, oracle: Oracle, project: Projection, eps: float, steps: int, best: _Worst
    ) -> None:
        """One stage, from the images of `best`, which then holds what it found."""

        def look(x: Tensor, step: int) -> Gradient:
            result = oracle.gradient(x, objective.at(step, steps))
            best.offer(x, objective.take())
            return result

        x = project(best.images)
        ascent = Ascent.start(
            x, look(x, 0), project, sign, eps=eps, steps=steps, rho=self.rho, momentum=self.momentum
        )
        for step in range(1, steps + 1):
            x = ascent.propose()
            ascent.arrive(x, look(x, step))


def _stages(eps: float, steps: int) -> list[tuple[float, int]]:
    """(radius, steps) of each stage that has any; the last takes what rounding down leaves."""
    counts = [int(share * steps) for _, share in _STAGES[:-1]]
    counts.append(steps - sum(counts))
    return [(factor * eps, count) for (factor, _), count in zip(_STAGES, counts, strict=True) if count]


class _Worst:
    """For each image the iterate with the lowest share of right pixels."""

    def __init__(self, images: Tensor) -> None:
        self.images = images.clone()
        self.right = torch.full((len(images),), float("inf"), device=images.device)

    def offer(self, images: Tensor, share: Tensor, earlier_wins_ties: bool = False) -> None:
        """Keep `images` (B, 3, H, W) whose `share` (B,) is lower, or equal unless the earlier one wins."""
        lower = share < self.right if earlier_wins_ties else share <= self.right
        self.images = torch.where(lower.view(-1, 1, 1, 1), images, self.images)
        self.right = torch.where(lower, share, self.right)


class _Objective:
    """A loss of fixed label maps; it remembers the share of right pixels, so that knowing it costs no pass."""

    def __init__(self, loss: PixelLoss, labels: Tensor) -> None:
        self.loss, self.labels = loss, labels
        self._seen: list[Tensor] = []

    def __call__(self, oracle: Oracle, images: Tensor) -> Tensor:
        """Values (B,) to be increased."""
        logits = oracle.logits(images).float()
        self._seen.append(over_labelled(right(logits, self.labels).float(), self.labels))
        return self.loss.of(logits, self.labels)

    def at(self, step: int, steps: int) -> _Objective:
        """Itself, with the loss of `step` (from 0) of `steps`."""
        self.loss = self.loss.at(step, steps)
        return self

    def take(self) -> Tensor:
        """Mean share of right pixels (B,) over the draws since the last call."""
        seen, self._seen = self._seen, []
        return over_draws(seen)
