"""Gradients guessed from scores: SPSA (Uesato et al., ICML 2018) and NES (Ilyas et al., ICML 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from attacks.iterative import Factor, Steps
from attacks.projections import make_projection
from attacks.scores import Stop, as_labels, asked
from attacks.steps import sign
from bench.protocols import Attack, ImageRNG, Oracle, Pixels
from bench.registry import ATTACKS

# Directions whose scores are asked for in one call.
BLOCK = 16
Samples = Annotated[int, Field(ge=1)]


class _Estimated(Attack):
    """Ascent on a gradient estimated from pairs of scores at x + d v and x - d v; a family's parts are its own."""

    tasks = frozenset({"classification"})
    needs = frozenset({"logits"})
    stochastic = True

    def __init__(
        self,
        eps: Fraction,
        delta: Fraction,
        samples: int,
        steps: int,
        loss: str,
        target: str | None,
        stop: Stop,
    ) -> None:
        self.eps, self.target = eps, target
        self._eps, self._delta = float(eps), float(delta)
        self.samples, self.steps = samples, steps
        self.loss, self.stop_when_fooled = loss, stop is not False

    def _directions(self, rng: ImageRNG, count: int, images: Tensor) -> Tensor:
        """Random directions, (B, count, 3, H, W)."""
        raise NotImplementedError

    def _update(self, grad: Tensor, memory: Tensor | None, step: int) -> tuple[Tensor, Tensor]:
        """The step for an estimated gradient and what to remember of it, (B, m, 3, H, W)."""
        raise NotImplementedError

    def passes(self) -> int:
        """In units of a forward and a backward pass; every sample is two forward passes."""
        return max(1, (2 * self.samples + 1) * self.steps // 3)

    def run(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], rng: ImageRNG) -> Tensor:
        """Adversarial images (B, 3, H, W) in [0,1] and inside the budget; no gradient is asked for."""
        with torch.no_grad():
            return self._climb(oracle, images.detach(), as_labels(targets, images.device), rng)

    def _climb(self, oracle: Oracle, clean: Tensor, labels: Tensor, rng: ImageRNG) -> Tensor:
        device, targeted = clean.device, self.target is not None
        project = make_projection("linf", clean, self._eps)
        x, out, memory = clean.clone(), clean.clone(), None
        best = torch.full((len(clean),), float("-inf"), device=device)  # as the oracle's values, float32
        done = torch.zeros(len(clean), dtype=torch.bool, device=device)
        at = torch.arange(len(clean), device=device)
        for step in range(self.steps + 1):
            value, hit = asked(oracle, x, self.loss, labels, targeted)
            better = (hit & ~done[at]) | ((hit == done[at]) & (value > best[at]))
            out[at[better]], best[at[better]] = x[better], value[better]
            done[at] |= hit
            kept = (~hit if self.stop_when_fooled else torch.ones_like(hit)).nonzero()[:, 0]
            if step == self.steps or len(kept) == 0:
                break
            if len(kept) < len(at):
                at, x, labels, project = at[kept], x[kept], labels[kept], project.select(kept)
                oracle, rng = oracle.select(kept), rng.select(kept)
                memory = None if memory is None else memory[kept]
            move, memory = self._update(self._estimate(oracle, x, labels, rng), memory, step)
            x = project(x + move)
        return out

    def _estimate(self, oracle: Oracle, x: Tensor, labels: Tensor, rng: ImageRNG) -> Tensor:
        """The gradient at `x`, (B, 3, H, W): the mean over samples of v * (J(x + d v) - J(x - d v)) / 2d."""
        total = torch.zeros_like(x)
        left = self.samples
        while left:
            count = min(left, BLOCK)
            left -= count
            v = self._directions(rng, count, x)
            moved = torch.cat([x[:, None] + self._delta * v, x[:, None] - self._delta * v], 1).clamp(0, 1)
            # One call for all of an image's samples: a stochastic defense then draws alike for both ends of a pair,
            # and their difference is the image's and not the noise's.
            repeated = torch.arange(len(x)).repeat_interleave(2 * count)
            several, at = oracle.select(repeated), repeated.to(labels.device)
            values, _ = asked(several, moved.flatten(0, 1), self.loss, labels[at], self.target is not None)
            values = values.view(len(x), 2, count)
            slope = (values[:, 0] - values[:, 1]) / (2 * self._delta)
            for sample in range(count):
                total += slope[:, sample].view(-1, 1, 1, 1) * v[:, sample]
        return total / self.samples


@ATTACKS.register_module(name="spsa")
class SPSA(_Estimated):
    """Simultaneous perturbation stochastic approximation (Uesato et al. 2018, algorithm 1): Adam on +-1 directions.

    Needs no gradient, so a defense that hides gradients gains nothing: it runs against any pipeline at level white_box.
    An image comes back as its first success, else at its largest loss.

    Args:
        eps: radius in [0,1] pixel units.
        steps: number of steps.
        samples: pairs of queries a step; the paper takes up to 4096.
        delta: distance at which scores are compared.
        lr: Adam's learning rate.
        loss: what is increased: `margin` (the paper's), or `ce`.
        target: rule for a wrong target to reach; None = untargeted.
        stop_when_fooled: off = go on raising the loss, for images that another pipeline will see; None = off for those.
    """

    def __init__(
        self,
        eps: Pixels = Fraction(8, 255),
        steps: Steps = 100,
        samples: Samples = 128,
        delta: Pixels = Fraction(1, 100),
        lr: Pixels = Fraction(1, 100),
        loss: Literal["margin", "ce"] = "margin",
        target: str | None = None,
        stop_when_fooled: Stop = None,
    ) -> None:
        super().__init__(eps, delta, samples, steps, loss, target, stop_when_fooled)
        self._lr = float(lr)

    def _directions(self, rng: ImageRNG, count: int, images: Tensor) -> Tensor:
        return rng.signs((count, *images.shape[1:]), images.device)

    def _update(self, grad: Tensor, memory: Tensor | None, step: int) -> tuple[Tensor, Tensor]:
        first, second = (0.1 * grad, 0.001 * grad.square())
        if memory is not None:
            first, second = first + 0.9 * memory[:, 0], second + 0.999 * memory[:, 1]
        mean, spread = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        return self._lr * mean / (spread.sqrt() + 1e-8), torch.stack([first, second], 1)


@ATTACKS.register_module(name="nes")
class NES(_Estimated):
    """Natural evolution strategies (Ilyas et al. 2018, algorithm 1 and section 3): PGD on antithetic Gaussian samples.

    Needs no gradient, see `spsa`.

    Args:
        eps: radius in [0,1] pixel units.
        steps: number of steps.
        samples: pairs of queries a step; 25 in the paper.
        sigma: standard deviation of the directions.
        alpha: step size.
        decay: weight of the last direction, as in momentum.
        loss: what is increased: `ce` (the paper's), or `margin`.
        target: rule for a wrong target to reach; None = untargeted.
        stop_when_fooled: off = go on raising the loss, for images that another pipeline will see; None = off for those.
    """

    def __init__(
        self,
        eps: Pixels = Fraction(8, 255),
        steps: Steps = 100,
        samples: Samples = 25,
        sigma: Pixels = Fraction(1, 1000),
        alpha: Pixels = Fraction(1, 100),
        decay: Factor = 0.9,
        loss: Literal["margin", "ce"] = "ce",
        target: str | None = None,
        stop_when_fooled: Stop = None,
    ) -> None:
        super().__init__(eps, sigma, samples, steps, loss, target, stop_when_fooled)
        self._alpha, self._decay = float(alpha), decay

    def _directions(self, rng: ImageRNG, count: int, images: Tensor) -> Tensor:
        return rng.normal((count, *images.shape[1:]), images.device)

    def _update(self, grad: Tensor, memory: Tensor | None, step: int) -> tuple[Tensor, Tensor]:
        if memory is not None:
            grad = self._decay * memory[:, 0] + (1 - self._decay) * grad
        return self._alpha * sign(grad), grad[:, None]
