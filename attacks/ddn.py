"""DDN: a minimal L2 attack that moves direction and norm apart from each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from attacks.iterative import Steps
from attacks.minimal import Closest, Look, MinimalNorm, Score, Working, keep, lengths, look, per_image
from attacks.scores import asked
from bench.protocols import ImageRNG
from bench.registry import ATTACKS

BEYOND = 0.005
"""Share of its norm by which a perturbation that fails aims beyond the boundary, with Newton's steps."""


@dataclass(frozen=True)
class _Moving(Working):
    """Images under attack.

    Attributes:
        rng: streams for directions where there is no gradient.
        delta: perturbations, (n, 3, H, W). radius: the norms they were scaled to, (n,). longest: what the range allows.
    """

    rng: ImageRNG
    delta: Tensor
    radius: Tensor
    longest: Tensor


@ATTACKS.register_module(name="ddn")
class DDN(MinimalNorm):
    """Decoupled direction and norm (Rony et al., CVPR 2019, algorithm 1).

    A step of length alpha along the normalised gradient of the cross-entropy, then the perturbation is scaled to a norm
    that shrinks by 1 - gamma where the last image was adversarial and grows by 1 + gamma where it was not; alpha falls
    to 0.01 on a cosine. The nearest adversarial image over all steps is returned. Where the gradient is zero the
    direction is random (the authors' code).

    Args:
        steps: number of steps.
        gamma: by how much the norm changes at a step.
        initial_norm: the first norm.
        levels: grey levels that images are rounded to at every step (256 in the paper); None = no rounding.
        refine: halvings, after the last step, of the gap between the nearest adversarial image and the clean one along
            the line that joins them; not in the paper. A few make up for fewer steps.
        target: rule for a wrong target to reach; None = untargeted.
        alpha: the first step's length.
        newton: the norm moves to where the margin vanishes to first order along the perturbation, by a share of gamma
            at most; not in the paper. As near in less than half the steps, with gamma 0.7 and alpha 3.
    """

    added: ClassVar[Mapping[str, Any]] = {"alpha": 1.0, "newton": False}

    def __init__(
        self,
        steps: Steps = 100,
        gamma: Annotated[float, Field(gt=0, lt=1)] = 0.05,
        initial_norm: Annotated[float, Field(gt=0)] = 1.0,
        levels: Annotated[int, Field(ge=2)] | None = 256,
        refine: Annotated[int, Field(ge=0)] = 0,
        target: str | None = None,
        alpha: Annotated[float, Field(gt=0)] = 1.0,
        newton: bool = False,
    ) -> None:
        self.steps, self.gamma, self.initial_norm = steps, gamma, initial_norm
        self.levels, self.refine, self.target = levels, refine, target
        self.alpha, self.newton = alpha, newton

    def passes(self) -> int:
        return self.steps + self.refine

    def search(self, start: Working, rng: ImageRNG) -> Tensor:
        best = Closest(start.clean)
        clean = start.clean
        longest = lengths(torch.maximum(clean, 1 - clean))
        work = _Moving(
            start.oracle, start.index, clean, start.labels, rng, torch.zeros_like(clean),
            torch.full_like(longest, self.initial_norm), longest,
        )  # fmt: skip
        for step in range(self.steps):
            images = work.clean + work.delta
            seen = look(work.oracle, images, work.labels, self.target is not None, self._score(work.labels))
            success = seen.margin > 0
            length = lengths(work.delta)
            best.offer(work.index, images, length, success)
            alpha = 0.01 + (self.alpha - 0.01) * (1 + math.cos(math.pi * step / self.steps)) / 2
            delta = work.delta + alpha * _unit(seen.grad, work.rng)
            if not self.newton:
                radius = work.radius * torch.where(success, 1 - self.gamma, 1 + self.gamma)
            elif step > 0:
                radius = self._boundary(seen, work, length)
            else:
                radius = work.radius
            radius = torch.minimum(radius, work.longest)
            delta = delta * per_image(radius / lengths(delta).clamp(min=1e-12))
            delta = self._image(work.clean + delta) - work.clean
            # Nothing is nearer than the clean image itself.
            work = keep(replace(work, delta=delta, radius=radius), best.distance[work.index] > 0)
            if not len(work):
                break
        if self.refine:
            self._refine(work, best)
        return best.images

    def _boundary(self, seen: Look, work: _Moving, length: Tensor) -> Tensor:
        """Norms (n,) at which the perturbations, now of lengths `length`, should end at the decision boundary."""
        steepest = lengths(seen.grad)
        along = (seen.grad.double() * work.delta.double()).flatten(1).sum(1).to(length.dtype)
        # A perturbation that hardly follows the gradient says little of where the boundary is.
        slope = torch.maximum(along / length.clamp(min=1e-12), 0.3 * steepest).clamp(min=1e-12)
        change = -seen.margin / slope
        # From without, the boundary is only reached by a step beyond it.
        change = torch.where(seen.margin > 0, change, change + BEYOND * length)
        # Rounding to grey levels may have left nothing of a perturbation.
        most = self.gamma * torch.maximum(length, work.radius)
        return length + torch.maximum(torch.minimum(change, most), -most)

    def _score(self, labels: Tensor) -> Score:
        """The cross-entropy; for Newton's steps the log-odds: the same direction, with a slope like the margin's."""
        sign = 1.0 if self.target is None else -1.0
        if not self.newton:
            return lambda logits: sign * F.cross_entropy(logits, labels, reduction="none")

        def odds(logits: Tensor) -> Tensor:
            true = logits.gather(1, labels[:, None])
            others = logits.scatter(1, labels[:, None], -torch.inf)
            return sign * (others.logsumexp(1) - true[:, 0])

        return odds

    def _image(self, images: Tensor) -> Tensor:
        if self.levels is not None:
            images = (images * (self.levels - 1)).round() / (self.levels - 1)
        return images.clamp(0, 1)

    def _refine(self, work: _Moving, best: Closest) -> None:
        """Bisect between the clean image and the nearest adversarial one, where there is one."""
        work = keep(work, best.distance[work.index].isfinite() & (best.distance[work.index] > 0))
        if not len(work):
            return
        delta = best.images[work.index] - work.clean
        low, high = torch.zeros_like(work.radius), torch.ones_like(work.radius)
        for _ in range(self.refine):
            middle = (low + high) / 2
            images = self._image(work.clean + per_image(middle) * delta)
            margin, _ = asked(work.oracle, images, "margin", work.labels, self.target is not None)
            success = margin > 0
            best.offer(work.index, images, lengths(images - work.clean), success)
            low, high = torch.where(success, low, middle), torch.where(success, middle, high)


def _unit(grad: Tensor, rng: ImageRNG) -> Tensor:
    """Gradients at unit length, (n, 3, H, W); a random direction where there is none."""
    length = lengths(grad)
    none = (length == 0).nonzero()[:, 0]
    if len(none):
        noise = rng.select(none.cpu()).normal(grad.shape[1:], grad.device).to(grad.dtype)
        grad = grad.index_copy(0, none, noise)
        length = lengths(grad)
    return grad / per_image(length.clamp(min=1e-12))
