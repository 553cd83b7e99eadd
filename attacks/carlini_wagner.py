"""The attacks of Carlini and Wagner (2017): L2, L-infinity, and projected descent on their loss.

`cw_l2` and `cw_linf` look for the nearest adversarial image and have no eps. `cw_pgd` is what papers that give eps and
a step size mean by C&W in the L-infinity norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from attacks.iterative import Iterative, Steps
from attacks.minimal import Closest, MinimalNorm, Working, keep, lengths, look, per_image
from attacks.scores import Stop
from bench.protocols import ImageRNG, Pixels
from bench.registry import ATTACKS

Positive = Annotated[float, Field(gt=0)]
Confidence = Annotated[float, Field(ge=0)]

SHRINK = 0.999999
"""Pixels are pulled this far towards grey before atanh, which is infinite at the ends of the range."""

CHECKS = 10
"""How often a run of the optimiser is asked whether it still makes progress."""

PATIENCE = 10
"""Fewest steps from one such check to the next: Adam's momentum carries a loss uphill for about as long."""


WITHIN = 1.02
"""Up to this factor a largest change counts as no larger than tau, where tau moves at every step."""


def to_tanh(images: Tensor) -> Tensor:
    """Numbers w with (tanh(w) + 1) / 2 = images, nearly (eq. 7 of the paper)."""
    # In double precision: atanh of a float differs in its last bits by the place of a pixel in memory.
    return torch.atanh(((images * 2 - 1) * SHRINK).double()).to(images.dtype)


def from_tanh(w: Tensor) -> Tensor:
    """Images in [0,1], exactly."""
    return (w.tanh() + 1) / 2


def falling(first: float, last: float | None, step: int, steps: int) -> float:
    """`first` at step 0, `last` at the last of `steps`, on a cosine; `first` throughout where there is no `last`."""
    if last is None:
        return first
    return last + (first - last) * (1 + math.cos(math.pi * step / max(steps - 1, 1))) / 2


@dataclass(frozen=True)
class Adam:
    """First and second moments of each image's gradient (Kingma and Ba 2015), (n, 3, H, W) each."""

    first: Tensor
    second: Tensor

    @classmethod
    def like(cls, images: Tensor) -> Adam:
        """Before the first step."""
        return cls(torch.zeros_like(images), torch.zeros_like(images))

    def __getitem__(self, index: Tensor) -> Adam:
        return Adam(self.first[index], self.second[index])

    def select(self, index: Tensor) -> Adam:
        """The moments of some of the images."""
        return self[index.to(self.first.device)]

    def step(self, grad: Tensor, number: int | Tensor, lr: float, beta1: float = 0.9) -> Tensor:
        """The step for gradient `number` (from 1; (n, 1, 1, 1) where images differ); updates the moments."""
        self.first.mul_(beta1).add_(grad, alpha=1 - beta1)
        self.second.mul_(0.999).addcmul_(grad, grad, value=0.001)
        return lr * (self.first / (1 - beta1**number)) / ((self.second / (1 - 0.999**number)).sqrt() + 1e-8)


@dataclass(frozen=True)
class _Descent(Working):
    """Images in one descent of `cw_l2`.

    Attributes:
        w: clean images in tanh space. origin: what they come back as. delta: what has been added to w.
        c: weight of the margin. adam: the optimiser.
        lowest, lowest_before: smallest loss so far, and at the previous check.
    """

    w: Tensor
    origin: Tensor
    delta: Tensor
    c: Tensor
    adam: Adam
    lowest: Tensor
    lowest_before: Tensor


@ATTACKS.register_module(name="cw_l2")
class CWL2(MinimalNorm):
    """Carlini and Wagner's L2 attack: minimise ||x' - x||^2 + c * max(z_y - max_{k != y} z_k, -kappa) (section V).

    x' = (tanh(w) + 1) / 2, Adam on w, and a binary search for the smallest c that succeeds: times ten until it does,
    then by halves. The nearest adversarial image over all steps is returned. Targeted: max_{k != t} z_k - z_t.

    Args:
        steps: descents' number of steps (10000 in the paper).
        binary_search_steps: values of c tried for each image; from ten on, the last is the smallest that succeeded.
        initial_c: the first of them; None = for each image that of the problem made linear at the clean image,
            2 (kappa - m) / ||grad m||^2 with its margin m.
        lr: learning rate of Adam.
        kappa: confidence, the margin by which the victim has to be wrong.
        abort_early: a descent ends for an image when a tenth of the steps, at least ten, has not lowered its loss by
            0.01 %; has no say where `c_rate` is given.
        abort_on: which loss. `loss` = that of the last step, as published, until the descent has succeeded; then the
            lowest so far, since about the boundary the loss of one step says little. `lowest` = the lowest throughout,
            which keeps more descents going that will not succeed.
        target: rule for a wrong target to reach; None = untargeted.
        c_rate: c of an image falls by this share after each step at which the victim is wrong and rises by it after
            any other, as a multiplier of the constraint that it be wrong. One descent so (`binary_search_steps: 1`)
            comes as near as a search over several. None = c stays during a descent, as published.
        final_lr: what `lr` falls to at the last step, on a cosine; None = it stays, as published.
        beta1: Adam's decay of the mean gradient; c that moves wants less of a memory than the 0.9 of the paper.
    """

    version = 2

    added: ClassVar[Mapping[str, Any]] = {
        "c_rate": None, "final_lr": None, "beta1": 0.9, "abort_on": "lowest",
    }  # fmt: skip

    def __init__(
        self,
        steps: Steps = 1000,
        binary_search_steps: Steps = 9,
        initial_c: Positive | None = 1e-3,
        lr: Positive = 0.01,
        kappa: Confidence = 0.0,
        abort_early: bool = True,
        target: str | None = None,
        c_rate: Annotated[float, Field(gt=0, lt=1)] | None = None,
        final_lr: Positive | None = None,
        beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9,
        abort_on: Literal["loss", "lowest"] = "loss",
    ) -> None:
        self.abort_on = abort_on
        self.steps, self.binary_search_steps = steps, binary_search_steps
        self.initial_c, self.lr, self.kappa = initial_c, lr, kappa
        self.abort_early, self.target = abort_early, target
        self.c_rate, self.final_lr, self.beta1 = c_rate, final_lr, beta1

    def passes(self) -> int:
        return self.steps * self.binary_search_steps + (self.initial_c is None)

    def search(self, start: Working, rng: ImageRNG) -> Tensor:
        best = Closest(start.clean)
        lower = torch.zeros(len(start), dtype=torch.float64, device=start.clean.device)
        upper = torch.full_like(lower, float("inf"))
        c = self._first_c(start).to(lower)
        for number in range(self.binary_search_steps):
            if number == self.binary_search_steps - 1 and number >= 9:
                c = upper.clamp(max=1e10)
            # Nothing is nearer than the clean image itself.
            working = keep(start, best.distance > 0)
            if not len(working):
                break
            index = working.index
            found = torch.zeros_like(lower, dtype=torch.bool)
            self._descend(working, c[index].to(start.clean.dtype), best, found)
            upper = torch.where(found, c, upper)
            lower = torch.where(found, lower, c)
            c = torch.where(upper.isinf(), c * 10, (lower + upper) / 2)
        return best.images

    def _first_c(self, start: Working) -> Tensor:
        """The first weight for each image, (B,)."""
        if self.initial_c is not None:
            return torch.full_like(start.clean[:, 0, 0, 0], self.initial_c)
        seen = look(start.oracle, start.clean, start.labels, self.target is not None)
        # Nothing moves without a gradient, whatever c is; at 1e10 the search ends.
        return (
            (2 * (self.kappa - seen.margin) / lengths(seen.grad).square()).nan_to_num(1.0).clamp(1e-10, 1e10)
        )

    def _descend(self, start: Working, c: Tensor, best: Closest, found: Tensor) -> None:
        """One descent from weights `c`; what succeeds is offered to `best` and marked in `found` (B,)."""
        w = to_tanh(start.clean)
        lowest = torch.full_like(c, float("inf"))
        work = _Descent(
            # A view of its own: the next descent's EOT draws are the same again, whatever happens in this one.
            start.oracle.select(range(len(start))), start.index, start.clean, start.labels,
            w, from_tanh(w), torch.zeros_like(w), c, Adam.like(w), lowest, lowest.clone(),
        )  # fmt: skip
        every = max(PATIENCE, -(-self.steps // CHECKS))
        for step in range(self.steps):
            images = from_tanh(work.w + work.delta)
            seen = look(work.oracle, images, work.labels, self.target is not None)
            success = seen.margin > self.kappa
            if step == 0 and bool(success.any()):
                # Only rounding separates this image from the clean one.
                best.offer(work.index, work.clean, torch.zeros_like(work.c), success)
            distance = lengths(images - work.clean)
            best.offer(work.index, images, distance, success)
            found[work.index[success]] = True
            gap = images - work.origin
            short = self.kappa - seen.margin
            loss = lengths(gap).square() + work.c * short.clamp(min=0)
            if self.abort_on == "loss":
                work.lowest.copy_(torch.where(found[work.index], torch.minimum(work.lowest, loss), loss))
            else:
                torch.minimum(work.lowest, loss, out=work.lowest)
            # Of x' itself: the victim gives the gradient of the margin, the rest is known in closed form.
            push = torch.where(short > 0, work.c, torch.zeros_like(work.c))
            grad = (2 * gap - per_image(push) * seen.grad) * (2 * images * (1 - images))
            lr = falling(self.lr, self.final_lr, step, self.steps)
            work.delta.sub_(work.adam.step(grad, step + 1, lr, self.beta1))
            going = best.distance[work.index] > 0
            if self.c_rate is not None:
                work.c.mul_(torch.where(success, 1 - self.c_rate, 1 + self.c_rate))
            elif self.abort_early and step % every == 0:
                going &= work.lowest <= 0.9999 * work.lowest_before
                work.lowest_before.copy_(work.lowest)
            work = keep(work, going)
            if not len(work):
                break


@dataclass(frozen=True)
class _Shrinking(Working):
    """Images in `cw_linf`, each with its own tau, c and place in its descent.

    Attributes:
        origin: what clean images come back as from tanh space. w: where the descent began. delta: what was added since.
        tau: part of |x' - x| that costs nothing. c: weight of the margin.
        step: steps at this c. number: steps since the optimiser was new. adam: the optimiser.
    """

    origin: Tensor
    w: Tensor
    delta: Tensor
    tau: Tensor
    c: Tensor
    step: Tensor
    number: Tensor
    adam: Adam


@ATTACKS.register_module(name="cw_linf")
class CWLinf(MinimalNorm):
    """Carlini and Wagner's L-infinity attack (2017, section VI-C; algorithm of the authors' code).

    Minimises sum_i max(|x'_i - x_i| - tau, 0) + c * max(z_y - max_{k != y} z_k, -kappa) by Adam in tanh space. Once the
    victim is fooled with no pixel beyond tau, tau becomes 0.9 times the largest change and the descent starts again
    from there; until then c doubles after every `steps` steps. An image is done when tau is at its end or c too large.
    The nearest adversarial image on the way is returned. Images proceed at their own pace.

    Args:
        steps: steps at one value of c; of the one descent in all where `c_rate` is given.
        lr: learning rate of Adam.
        initial_c: first value of c; None = 0.5 / mean |grad m| for each image, m its margin, at which a pixel's share
            of the margin weighs half of what its place beyond tau costs.
        largest_c: an image whose c reaches this is done; has no say where `c_rate` is given.
        shrink: what tau is multiplied by after a success.
        smallest_tau: an image whose tau falls to this is done.
        kappa: confidence, the margin by which the victim has to be wrong.
        target: rule for a wrong target to reach; None = untargeted.
        c_rate: tau and c move during a single descent. Where the victim is wrong with no pixel beyond tau, tau shrinks;
            where only a pixel is beyond it, c falls by this share; where the victim is right, c rises by it and tau by
            1 - shrink. As near with a fraction of the steps. None = as published.
        final_lr: what `lr` falls to at the last step of that descent, on a cosine; None = it stays.
        beta1: Adam's decay of the mean gradient; c that moves wants less of a memory than the 0.9 of the paper.
    """

    added: ClassVar[Mapping[str, Any]] = {"c_rate": None, "final_lr": None, "beta1": 0.9}

    def __init__(
        self,
        steps: Steps = 1000,
        lr: Positive = 5e-3,
        initial_c: Positive | None = 1e-5,
        largest_c: Positive = 20.0,
        shrink: Annotated[float, Field(gt=0, lt=1)] = 0.9,
        smallest_tau: Pixels = Fraction(1, 256),
        kappa: Confidence = 0.0,
        target: str | None = None,
        c_rate: Annotated[float, Field(gt=0, lt=1)] | None = None,
        final_lr: Positive | None = None,
        beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9,
    ) -> None:
        if initial_c is None and c_rate is None:
            raise ValueError("initial_c: None needs c_rate: the published search doubles c from a small one")
        if initial_c is not None and largest_c <= initial_c:
            raise ValueError(f"largest_c: {largest_c} must be larger than initial_c = {initial_c}")
        if final_lr is not None and c_rate is None:
            raise ValueError("final_lr needs c_rate: the published search has no last step to fall to")
        self.c_rate, self.final_lr, self.beta1 = c_rate, final_lr, beta1
        self.steps, self.lr, self.kappa = steps, lr, kappa
        self.initial_c, self.largest_c = initial_c, largest_c
        self.shrink, self.smallest_tau = shrink, float(smallest_tau)
        self.target = target

    def passes(self) -> int:
        """At most: every c in full, then as many descents as tau can shrink."""
        return self._most() + (self.initial_c is None)

    def _most(self) -> int:
        if self.c_rate is not None or self.initial_c is None:
            return self.steps
        doublings = math.ceil(math.log2(self.largest_c / self.initial_c))
        taus = math.ceil(math.log(self.smallest_tau) / math.log(self.shrink))
        return self.steps * (doublings + taus)

    def _first_c(self, start: Working) -> Tensor:
        """The first weight for each image, (B,)."""
        if self.initial_c is not None:
            return torch.full_like(start.clean[:, 0, 0, 0], self.initial_c)
        seen = look(start.oracle, start.clean, start.labels, self.target is not None)
        steepness = seen.grad.flatten(1).double().abs().mean(1).to(seen.margin.dtype)
        # Nothing moves without a gradient, whatever c is.
        return (0.5 / steepness).clamp(max=1e10)

    def search(self, start: Working, rng: ImageRNG) -> Tensor:
        best = Closest(start.clean)
        w = to_tanh(start.clean)
        ones, count = torch.ones_like(w[:, 0, 0, 0]), torch.zeros_like(start.labels)
        work = _Shrinking(
            start.oracle, start.index, start.clean, start.labels, from_tanh(w), w, torch.zeros_like(w),
            ones, self._first_c(start), count, count.clone(), Adam.like(w),
        )  # fmt: skip
        largest = self.largest_c if self.c_rate is None else math.inf
        for step in range(self._most()):
            images = from_tanh(work.w + work.delta)
            seen = look(work.oracle, images, work.labels, self.target is not None)
            success = seen.margin > self.kappa
            if step == 0 and bool(success.any()):
                best.offer(work.index, work.clean, torch.zeros_like(work.c), success)
            change = (images - work.clean).flatten(1).abs().amax(1)
            best.offer(work.index, images, change, success)
            if self.c_rate is not None:
                work = self._move(work, change, success, self.c_rate)
            gap = images - work.origin
            excess = (gap.abs() - per_image(work.tau)).clamp(min=0)
            short = (self.kappa - seen.margin).clamp(min=0)
            # The authors take the step even when solved; it is undone there by the new start.
            push = torch.where(short > 0, work.c, torch.zeros_like(work.c))
            slope = torch.where(excess > 0, gap.sign(), torch.zeros_like(gap)) - per_image(push) * seen.grad
            number = work.number + 1
            lr = falling(self.lr, self.final_lr, step, self.steps)
            slope *= 2 * images * (1 - images)
            work.delta.sub_(work.adam.step(slope, per_image(number), lr, self.beta1))
            work = replace(work, number=number, step=work.step + 1)
            if self.c_rate is None:
                solved = success & (excess.flatten(1).double().sum(1) <= 1e-4 * work.c)
                work = self._next(work, images, change, solved)
            work = keep(
                work,
                (best.distance[work.index] > 0) & (work.c < largest) & (work.tau > self.smallest_tau),
            )
            if not len(work):
                break
        return best.images

    def _move(self, work: _Shrinking, change: Tensor, success: Tensor, rate: float) -> _Shrinking:
        """The next tau and c, of images whose largest `change` is (n,)."""
        within = change <= WITHIN * work.tau
        shrunk = torch.minimum(work.tau, change) * self.shrink
        tau = torch.where(
            success & within, shrunk, torch.where(success, work.tau, work.tau * (2 - self.shrink))
        )
        factor = torch.where(success, torch.where(within, 1.0, 1 - rate), 1 + rate)
        return replace(work, tau=tau, c=work.c * factor)

    def _next(self, work: _Shrinking, images: Tensor, change: Tensor, solved: Tensor) -> _Shrinking:
        """Smaller tau and a new descent where `solved`; larger c where the steps are used up."""
        spent = ~solved & (work.step >= self.steps)
        c = torch.where(spent, work.c * 2, work.c)
        if not bool(solved.any()):
            return replace(work, c=c, step=work.step.masked_fill(spent, 0))
        here = per_image(solved)
        return replace(
            work,
            c=c,
            step=work.step.masked_fill(spent | solved, 0),
            number=work.number.masked_fill(solved, 0),
            tau=torch.where(solved, torch.minimum(work.tau, change) * self.shrink, work.tau),
            w=torch.where(here, to_tanh(images), work.w),
            delta=work.delta.masked_fill(here, 0),
            adam=Adam(work.adam.first.masked_fill(here, 0), work.adam.second.masked_fill(here, 0)),
        )


@ATTACKS.register_module(name="cw_pgd")
class CWPGD(Iterative):
    """Projected sign steps on the loss of Carlini and Wagner, C&W for papers that give eps and a step size.

    x_{t+1} = P(x_t + alpha * sign grad min(max_{k != y} z_k - z_y, kappa)), the adversary "CW" of Madry et al. 2018,
    whose code has kappa 50. With kappa 0, the hinge of the L2 attack, an image stops as soon as it is misclassified.

    Args:
        eps: radius in [0,1] pixel units.
        alpha: step size; None = eps / steps.
        steps: number of steps.
        kappa: margin at which an image stops; None = never.
        start: `none`, or `uniform` in the ball.
        target: rule for a wrong target; None = untargeted.
        stop_when_fooled: see `iterative`.
    """

    def __init__(
        self,
        eps: Pixels = Fraction(8, 255),
        alpha: Pixels | None = Fraction(2, 255),
        steps: Steps = 20,
        kappa: float | None = 50.0,
        start: Literal["none", "uniform"] = "none",
        target: str | None = None,
        stop_when_fooled: Stop = None,
    ) -> None:
        super().__init__(
            loss="margin",
            kappa=kappa,
            eps=eps,
            alpha=alpha,
            steps=steps,
            start=start,
            target=target,
            stop_when_fooled=stop_when_fooled,
        )
