"""What every attack has to beat: random noise of the same size, and nothing at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from attacks.projections import Linf
from bench.protocols import Attack, ImageRNG, Oracle, Pixels
from bench.registry import ATTACKS


@ATTACKS.register_module(name="none")
class NoAttack(Attack):
    """The images themselves: the clean cell."""

    needs = frozenset()
    norm = None
    stochastic = False

    def run(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], rng: ImageRNG) -> Tensor:
        """A copy of `images`."""
        return images.clone()

    def passes(self) -> int:
        return 0


@ATTACKS.register_module(name="noise")
class NoiseAttack(Attack):
    """Random noise at eps, clipped to [0,1]; an attack that does no more harm than this is broken or is masked.

    Args:
        eps: size in [0,1] pixel units.
        kind: `sign` = +-eps in every pixel and channel, `uniform` in [-eps, eps).
        draws: with more than one, the draw of largest loss is kept for each image.
        loss: loss kind that chooses among draws; unused for one draw.
    """

    stochastic = True

    def __init__(
        self,
        eps: Pixels = Fraction(8, 255),
        kind: Literal["sign", "uniform"] = "sign",
        draws: Annotated[int, Field(ge=1)] = 1,
        loss: str = "ce",
    ) -> None:
        self.eps, self.kind, self.draws, self.loss = eps, kind, draws, loss
        self._eps = float(eps)
        # One draw asks nothing of the victim, so its images serve every level.
        self.needs = frozenset({"gradient"} if draws > 1 else ())

    def run(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], rng: ImageRNG) -> Tensor:
        """Noisy images, (B, 3, H, W)."""
        clean = images.detach()
        project = Linf(clean, self._eps)
        best = self._draw(clean, project, rng)
        if self.draws == 1:
            return best
        with torch.no_grad():
            value = oracle.loss(best, targets, self.loss)
            for _ in range(self.draws - 1):
                candidate = self._draw(clean, project, rng)
                loss = oracle.loss(candidate, targets, self.loss)
                better = loss > value
                best = torch.where(better.view(-1, 1, 1, 1), candidate, best)
                value = torch.where(better, loss, value)
        return best

    def _draw(self, clean: Tensor, project: Linf, rng: ImageRNG) -> Tensor:
        shape, eps = clean.shape[1:], self._eps
        if self.kind == "sign":
            return project(clean + eps * rng.signs(shape, clean.device))
        return project(clean + rng.uniform(shape, -eps, eps, clean.device))

    def passes(self) -> int:
        return 0 if self.draws == 1 else self.draws

    def loss_kinds(self) -> Iterable[str]:
        return () if self.draws == 1 else (self.loss,)


@ATTACKS.register_module(name="gaussian_noise")
class GaussianNoise(Attack):
    """Gaussian noise, clipped to [0,1]: what the ablation GNP of NRP trains against; no budget.

    Args:
        sigma: standard deviation in [0,1] pixel units; the paper gives none.
    """

    needs = frozenset()
    norm = None
    stochastic = True

    def __init__(self, sigma: Pixels = Fraction(16, 255)) -> None:
        self.sigma = float(sigma)

    def run(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], rng: ImageRNG) -> Tensor:
        """Noisy images, (B, 3, H, W)."""
        return (images + self.sigma * rng.normal(images.shape[1:], images.device)).clamp(0, 1)

    def passes(self) -> int:
        return 0
