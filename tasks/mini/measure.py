"""Scores that the zoo records for an undefended model: clean, and under plain sign-gradient attacks.

These few lines exist so that a recipe can be judged before any attack plug-in is; they do not feed tables.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Forward = Callable[[Tensor], Tensor]


def sign_attack(
    forward: Forward,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    alpha: float,
    steps: int,
    random_start: bool,
    seed: int = 0,
    ignore: int = -100,
) -> Tensor:
    """PGD (with random start) or BIM (without) under an L-infinity bound, on cross entropy.

    Args:
        forward: images in [0,1] to logits ``(B, K)`` or ``(B, K, H, W)``.
        images: ``(B, 3, H, W)`` in [0,1].
        labels: ``(B,)`` or ``(B, H, W)`` int64.
        eps: radius, in units of [0,1].
        alpha: step, in units of [0,1].
        steps: number of steps.
        random_start: start at a uniform point of the ball.
        seed: seed of the start.
        ignore: label that the loss leaves out.

    Returns:
        Adversarial images, within ``eps`` of ``images`` and in [0,1].
    """
    low, high = (images - eps).clamp(0, 1), (images + eps).clamp(0, 1)
    adv = images.clone()
    if random_start:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.rand(images.shape, generator=generator).to(images.device) * 2 - 1
        adv = (adv + eps * noise).clamp(0, 1)
    for _ in range(steps):
        adv.requires_grad_(True)
        # A sum, so that an image's gradient does not shrink with the batch.
        loss = F.cross_entropy(forward(adv), labels, ignore_index=ignore, reduction="sum")
        (grad,) = torch.autograd.grad(loss, adv)
        adv = torch.max(torch.min(adv.detach() + alpha * grad.sign(), high), low)
    return adv.detach()


def accuracy(forward: Forward, images: Tensor, labels: Tensor, batch: int = 100) -> float:
    """Share of images whose largest logit is the label's."""
    with torch.no_grad():
        right = sum(
            int((forward(x).argmax(1) == y).sum())
            for x, y in zip(images.split(batch), labels.split(batch), strict=True)
        )
    return right / len(labels)


def confusion(predicted: Tensor, labels: Tensor, classes: int, ignore: int = 255) -> Tensor:
    """``(classes, classes)`` counts of pixels, rows = truth, columns = prediction, ignored pixels left out."""
    kept = labels != ignore
    index = labels[kept].long() * classes + predicted[kept].long()
    return torch.bincount(index, minlength=classes * classes).reshape(classes, classes)


def mean_iou(counts: Tensor) -> float:
    """Mean over the classes that occur in truth or prediction of intersection over union."""
    hit = counts.diag().double()
    union = counts.sum(0) + counts.sum(1) - counts.diag()
    present = union > 0
    return float((hit[present] / union[present]).mean())
