"""What attacks share that look for the nearest adversarial image instead of filling a budget.

They have no eps. Success is the victim's margin, taken from the same forward pass as the gradient (and, where something
is stochastic, as the mean over the same EOT draws). Every image keeps its own state and leaves the batch when it is
done, so that what it gets does not depend on its company. An image for which nothing is found comes back clean; so does
one that the victim gets wrong already.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from attacks.scores import Watched, as_labels, margin, over_draws
from attacks.steps import finite
from bench.errors import NotApplicable
from bench.protocols import Attack, ImageRNG, Oracle

Score = Callable[[Tensor], Tensor]
"""Values (B,) to be increased, from logits (B, K)."""


def lengths(delta: Tensor) -> Tensor:
    """L2 norm of each perturbation, (B,), summed in double precision."""
    flat = delta.flatten(1).double()
    total: Tensor = flat.mul(flat).sum(1).sqrt()
    return total.to(delta.dtype)


def per_image(values: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


@dataclass(frozen=True)
class Look:
    """The victim at some images.

    Attributes:
        margin: (B,), how far beyond the decision boundary, as a mean over EOT draws: positive exactly when the attack
            has succeeded. max_{k != y} z_k - z_y of a true label y, z_t - max_{k != t} z_k of a target t.
        logits: (B, K), as a mean over EOT draws.
        grad: gradient of the score, (B, 3, H, W), finite.
    """

    margin: Tensor
    logits: Tensor
    grad: Tensor


class _Scored(Watched):
    """`score` of the logits, or the margin where there is none, with the margins kept beside it."""

    def __init__(self, labels: Tensor, targeted: bool, score: Score | None) -> None:
        super().__init__(labels, targeted)
        self.score = score
        self.margins: list[Tensor] = []

    def value(self, logits: Tensor) -> Tensor:
        """Values (B,) to be increased."""
        beyond = margin(logits, self.labels)
        reached = -beyond if self.targeted else beyond
        self.margins.append(reached.detach())
        return reached if self.score is None else self.score(logits)


def look(oracle: Oracle, images: Tensor, labels: Tensor, targeted: bool, score: Score | None = None) -> Look:
    """Margins at `images` and the gradient of `score` (of the margin itself unless given), in one pass.

    Args:
        oracle: the victim, bound to these images.
        images: (B, 3, H, W) in [0,1].
        labels: true labels, or wrong ones to reach, (B,).
        targeted: which of both.
        score: what to take the gradient of.
    """
    scored = _Scored(labels, targeted, score)
    grad = oracle.gradient(images, scored).grad
    return Look(over_draws(scored.margins), scored.logits(), finite(grad))


@dataclass(frozen=True)
class Working:
    """Images an attack is still working on; attacks add their own per-image tensors.

    Attributes:
        oracle: the victim, bound to them.
        index: their places in the batch, (n,).
        clean: (n, 3, H, W).
        labels: true labels, or wrong ones to reach, (n,).
    """

    oracle: Oracle
    index: Tensor
    clean: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.index)


W = TypeVar("W", bound=Working)


def keep(working: W, mask: Tensor) -> W:
    """Those of the images where `mask` (n,) is true: every field narrowed."""
    if bool(mask.all()):
        return working
    kept = mask.nonzero()[:, 0]
    narrowed: dict[str, Any] = {}
    for field in fields(working):
        value = getattr(working, field.name)
        narrowed[field.name] = value[kept] if isinstance(value, Tensor) else value.select(kept.cpu())
    return replace(working, **narrowed)


class Closest:
    """The nearest adversarial image found for each image of the batch; the clean one where there is none.

    Attributes:
        images: (B, 3, H, W).
        distance: (B,), infinite where nothing was found.
    """

    def __init__(self, clean: Tensor) -> None:
        self.images = clean.clone()
        self.distance = torch.full((len(clean),), float("inf"), dtype=clean.dtype, device=clean.device)

    def offer(self, index: Tensor, images: Tensor, distance: Tensor, success: Tensor) -> None:
        """Keep the `images` at places `index` that succeed and are nearer than what is known."""
        better = (success & (distance < self.distance[index])).nonzero()[:, 0]
        if len(better):
            at = index[better]
            self.images[at], self.distance[at] = images[better], distance[better]


class MinimalNorm(Attack):
    """Base of the attacks of this kind, on classifiers."""

    needs = frozenset({"gradient", "logits"})
    tasks = frozenset({"classification"})
    norm: Literal["linf", "l2"] | None = None
    monotone = False
    returns_clean = True

    def run(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], rng: ImageRNG) -> Tensor:
        """Adversarial images (B, 3, H, W) in [0,1]; the clean image where none was found.

        Raises:
            NotApplicable: the victim has a single class.
        """
        if oracle.num_classes < 2:
            raise NotApplicable(f"attack '{self.name}' needs at least 2 classes")
        clean = images.detach()
        index = torch.arange(len(clean), device=clean.device)
        # Images that still work have all asked equally often, so EOT draws do not depend on who else was there.
        with torch.no_grad():
            return self.search(Working(oracle, index, clean, as_labels(targets, clean.device)), rng)

    @abstractmethod
    def search(self, start: Working, rng: ImageRNG) -> Tensor:
        """`run`, without gradients being recorded."""
