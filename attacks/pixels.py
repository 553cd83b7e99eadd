"""Losses of label maps, pixel by pixel from logits; ignored pixels count nowhere.

A segmenter is fooled pixel by pixel, so what matters is which pixels an attack still works on. Plain cross-entropy
spends most of its gradient on those that are already wrong; the losses here weigh right and wrong pixels differently.
All are means over the labelled pixels of an image; an image without any has loss 0 and gradient 0.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from attacks.objectives import Loss
from bench.errors import GridError
from bench.protocols import Oracle, Warped
from tasks.segmentation.task import IGNORE, label_map


def label_maps(targets: Sequence[Any], num_classes: int, device: torch.device) -> Tensor:
    """Label maps as one tensor (B, H, W) of int64, `IGNORE` where there is no label."""
    return torch.stack([label_map(target, num_classes) for target in targets]).to(device)


def right(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, H, W) bool: labelled pixels whose label wins, for logits (B, K, H, W)."""
    return logits.detach().argmax(1) == labels


def over_labelled(values: Tensor, labels: Tensor) -> Tensor:
    """Mean of `values` (B, H, W) over the labelled pixels of each image, (B,); 0 without any."""
    counted = labels != IGNORE
    return (values * counted).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)


class PixelLoss(Loss):
    """A loss of label maps that is a mean over labelled pixels."""

    needs = frozenset({"logits"})
    tasks = frozenset({"segmentation"})
    targeted = False

    def __call__(
        self, oracle: Oracle, images: Tensor | Warped, targets: Sequence[Any], reference: Tensor | None
    ) -> Tensor:
        """Loss of each image, (B,)."""
        logits = oracle.logits(images).float()
        return self.of(logits, label_maps(targets, oracle.num_classes, logits.device))

    def of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of each image, (B,), from logits (B, K, H, W) and label maps (B, H, W)."""
        return over_labelled(self.pixels(logits, labels), labels)

    def at(self, step: int, steps: int) -> PixelLoss:
        """The loss at `step` (from 0) of `steps`; itself unless it has a schedule."""
        return self

    @abstractmethod
    def pixels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of each pixel, (B, H, W); what it says where `labels` is `IGNORE` is not used, but must be finite."""


def _ce(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE)


def _gap(logits: Tensor, labels: Tensor) -> Tensor:
    """Best wrong logit minus the label's, (B, H, W)."""
    index = labels.where(labels != IGNORE, 0)[:, None]
    return logits.scatter(1, index, float("-inf")).amax(1) - logits.gather(1, index)[:, 0]


class MaskedCE(PixelLoss):
    """Cross-entropy of the pixels that are still right (Croce et al. 2024, L_MCE).

    Args:
        class_pixels: None = plain; `image` = each pixel over the number of pixels of its class in its own image; a
            list = over these numbers, one a class. The paper (L_MCE-Bal) counts the training set's pixels.
    """

    name = "masked cross-entropy"

    def __init__(self, class_pixels: Literal["image"] | Sequence[float] | None = None) -> None:
        self.class_pixels = class_pixels

    def pixels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(B, H, W)."""
        values = _ce(logits, labels) * right(logits, labels)
        return values if self.class_pixels is None else values * self._weights(logits.shape[1], labels)

    def _weights(self, classes: int, labels: Tensor) -> Tensor:
        known = labels.where(labels != IGNORE, 0)
        if self.class_pixels == "image":
            flat = F.one_hot(labels.where(labels != IGNORE, classes).flatten(1), classes + 1)
            counts = flat.sum(1)[:, :classes].double()
        else:
            assert self.class_pixels is not None
            if len(self.class_pixels) != classes:
                raise GridError(
                    f"class_pixels: {len(self.class_pixels)} numbers for a model of {classes} classes"
                )
            counts = torch.tensor(list(self.class_pixels), dtype=torch.float64, device=labels.device)[None]
            counts = counts.expand(len(labels), -1)
        weights = counts.clamp(min=1).reciprocal()
        # Scaled to a largest weight of 1: the loss keeps its magnitude whatever the size of the images.
        weights = weights / weights.amax(1, keepdim=True)
        return weights.gather(1, known.flatten(1)).view_as(labels).float()


class JensenShannon(PixelLoss):
    """Jensen-Shannon divergence of the prediction from the one-hot label (Croce et al. 2024, L_JS).

    With p the probability of the label it is log 2 + (p log p - (1 + p) log(1 + p)) / 2: between 0 and log 2, with a
    gradient that vanishes as p does, so that pixels that are wrong already drop out by themselves.
    """

    name = "Jensen-Shannon"

    def pixels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(B, H, W)."""
        log_p = -_ce(logits, labels)
        p = log_p.exp()
        return math.log(2) + (p * log_p - (1 + p) * p.log1p()) / 2


class MaskedUnitLogit(PixelLoss):
    """Minus the label's logit at pixels that are still right, logits at unit length (code of Croce et al. 2024).

    -z_y / ||z||_2, in [-1, 1]; it asks for another direction of the logits, whatever their scale. 0 at wrong pixels.
    """

    name = "masked unit logit"

    def pixels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(B, H, W)."""
        index = labels.where(labels != IGNORE, 0)[:, None]
        unit = F.normalize(logits, dim=1)
        return -unit.gather(1, index)[:, 0] * right(logits, labels)


class SegPGDLoss(PixelLoss):
    """(1 - lambda) CE of right pixels + lambda CE of wrong pixels (Gu et al. 2022, eq. 4 and 5).

    lambda grows linearly over the steps t = 1..N, lambda(t) = (t - 1) / 2N: from the right pixels alone to nearly equal
    weights.

    Args:
        share: lambda, in [0, 1/2).
    """

    name = "SegPGD"

    def __init__(self, share: float = 0.0) -> None:
        self.share = share

    def at(self, step: int, steps: int) -> SegPGDLoss:
        """The loss of step t = `step` + 1."""
        return SegPGDLoss(step / (2 * steps))

    def pixels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(B, H, W)."""
        weights = torch.where(right(logits, labels), 1 - self.share, self.share)
        return weights * _ce(logits, labels)


class PixelMargin(PixelLoss):
    """Best wrong minus true logit of each pixel, cut off where the attack has its confidence (Carlini and Wagner 2017).

    Args:
        kappa: confidence; at 0 only pixels that are still right have a gradient.
        towards: the labels are wrong ones to be reached: then cut off where they lead by kappa.
    """

    name = "margin"
    targeted = True

    def __init__(self, kappa: float = 0.0, towards: bool = False) -> None:
        self.kappa, self.towards = kappa, towards

    def pixels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(B, H, W)."""
        gap = _gap(logits, labels)
        return gap.clamp(min=-self.kappa) if self.towards else gap.clamp(max=self.kappa)


class RightMargin(PixelLoss):
    """Best wrong minus true logit of the pixels that are still right; 0 for an image once few enough are.

    Args:
        goal: share of wrong pixels at which an image is done.
    """

    name = "margin of right pixels"

    def __init__(self, goal: float = 0.99) -> None:
        self.goal = goal

    def of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(B,), at most 0."""
        open_ = over_labelled(right(logits, labels).float(), labels) > 1 - self.goal
        return super().of(logits, labels) * open_

    def pixels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(B, H, W)."""
        return _gap(logits, labels) * right(logits, labels)
