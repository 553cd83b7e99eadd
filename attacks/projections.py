"""Projections onto the budget: always inside the ball around the clean image and inside [0,1] at once."""

from __future__ import annotations

from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor

from attacks.steps import norms


def check_radius(norm: str | None, radius: Fraction | None, name: str = "eps") -> None:
    """Refuse lengths in 0..255.

    Raises:
        ValueError: an L-infinity radius above 1.
    """
    if norm == "linf" and radius is not None and radius > 1:
        raise ValueError(
            f"{name}: {radius} is outside (0, 1]: images are in [0,1], did you mean {radius}/255?"
        )


class Projection(Protocol):
    """Maps images into the budget around fixed clean images."""

    def __call__(self, images: Tensor) -> Tensor:
        """The projection of `images` (B, 3, H, W)."""
        ...

    def select(self, index: Tensor) -> Projection:
        """The projection for some of the images."""
        ...


class Linf:
    """Clip to [x - eps, x + eps] and [0,1].

    The intersection of both boxes is a box, computed once: clipping to it can leave neither, in whatever order float
    rounding would have the two clips act.
    """

    def __init__(self, clean: Tensor, eps: float) -> None:
        self.lower = (clean - eps).clamp_(0, 1)
        self.upper = (clean + eps).clamp_(0, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) inside the box."""
        return torch.clamp(images, self.lower, self.upper)

    def select(self, index: Tensor) -> Linf:
        """The boxes of some of the images."""
        part = Linf.__new__(Linf)
        part.lower, part.upper = self.lower[index], self.upper[index]
        return part


class L2:
    """Scale the perturbation down to ||d||_2 <= eps, then clip to [0,1].

    The clip moves every pixel towards the clean image, which lies in [0,1], so the norm only shrinks. This is the
    alternating form in common use; it is inside the budget but not the nearest point of the intersection.
    """

    def __init__(self, clean: Tensor, eps: float) -> None:
        self.clean, self.eps = clean, eps

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) inside the ball and the range."""
        delta = images - self.clean
        length = norms(delta)
        delta = torch.where(length > self.eps, delta * (self.eps / length.clamp(min=self.eps)), delta)
        return (self.clean + delta).clamp_(0, 1)

    def select(self, index: Tensor) -> L2:
        """The balls of some of the images."""
        return L2(self.clean[index], self.eps)


class Box:
    """Clip to [0,1]: no budget at all."""

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0,1]."""
        return images.clamp(0, 1)

    def select(self, index: Tensor) -> Box:
        """Itself: the range is the same for all images."""
        return self


def make_projection(norm: str, clean: Tensor, eps: float | None) -> Projection:
    """The projection onto the ball of `norm` (linf, l2) and radius `eps` around `clean`; `none` is the range alone."""
    if norm == "none" or eps is None:
        return Box()
    return Linf(clean, eps) if norm == "linf" else L2(clean, eps)
