"""DeepFool: steps to the nearest linearised decision boundary, in the L2 and the L-infinity norm."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from attacks.iterative import Radius, Steps
from attacks.minimal import Closest, MinimalNorm, Score, Working, keep, lengths, look, per_image
from attacks.projections import make_projection
from attacks.scores import Scored, over_draws
from attacks.steps import finite
from bench.errors import GridError
from bench.protocols import ImageRNG, Oracle, Pixels
from bench.registry import ATTACKS

CANDIDATES = 10
"""Classes that the authors' code considers."""

MARGIN = 1e-4
"""Added to each step's length, as in the authors' code."""

TINY = 1e-8

Count = Annotated[int, Field(ge=2)]
Overshoot = Annotated[float, Field(ge=0)]


class _Differences:
    """z_k - z_0 for the candidates k = `first`, `first` + 1, ... of each image, all gradients from one forward pass.

    The objective itself is the last of them; the gradients of the others are taken on the way.
    """

    def __init__(self, classes: Tensor, first: int = 2) -> None:
        self.classes, self.first = classes, first
        self.grads: list[list[Tensor]] = [[] for _ in range(classes.shape[1] - first - 1)]
        self.logits: list[Tensor] = []

    def __call__(self, oracle: Oracle, images: Tensor) -> Tensor:
        logits = oracle.logits(images)
        self.logits.append(logits.detach())
        gaps = logits.gather(1, self.classes[:, self.first :]) - logits.gather(1, self.classes[:, :1])
        for k, grads in enumerate(self.grads):
            grads.append(torch.autograd.grad(gaps[:, k].sum(), images, retain_graph=True)[0])
        # The oracle counts one backward pass for the value it is given.
        for trace in getattr(oracle, "traces", ()):
            trace.backwards += len(self.grads)
        return gaps[:, -1]

    def gradients(self, oracle: Oracle, images: Tensor) -> list[Tensor]:
        """One gradient (n, 3, H, W) for each candidate from `first` on, as means over EOT draws."""
        last = oracle.gradient(images, self).grad
        return [finite(torch.stack(grads).mean(0)) for grads in self.grads] + [finite(last)]


@dataclass(frozen=True)
class _Stepping(Working):
    """Images under attack.

    Attributes:
        classes: the victim's own class for the clean image, then the candidates, likeliest first, (n, candidates).
        images: where they are. total: sum of the steps, without overshoot.
    """

    classes: Tensor
    images: Tensor
    total: Tensor


class _DeepFool(MinimalNorm):
    """The loop; the norms differ in distance and direction."""

    added: ClassVar[Mapping[str, Any]] = {"later": None}

    def __init__(
        self,
        steps: int,
        candidates: int | None,
        overshoot: float,
        eps: Fraction | None,
        later: int | None,
        norm: Literal["l2", "linf"],
    ) -> None:
        if later is not None and later > (candidates or CANDIDATES):
            raise ValueError(f"later: {later} must be at most candidates = {candidates or CANDIDATES}")
        self.steps, self.candidates, self.overshoot = steps, candidates, overshoot
        self.eps, self.ball, self.later = eps, norm, later
        if eps is not None:
            self.norm = norm

    def passes(self) -> int:
        """At most; images leave once they are misclassified, most after a few steps."""
        return self.steps * ((self.candidates or CANDIDATES) - 1) + 1

    def run(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], rng: ImageRNG) -> Tensor:
        """Adversarial images (B, 3, H, W) in [0,1].

        Raises:
            NotApplicable: the victim has a single class.
            GridError: more candidates than classes.
        """
        self.check_classes(oracle.num_classes)
        return super().run(oracle, images, targets, rng)

    def check_classes(self, num_classes: int) -> None:
        if self.candidates is not None and self.candidates > max(2, num_classes):
            raise GridError(
                f"attack '{self.name}', candidates: {self.candidates} is more than the {num_classes} classes of "
                "the model"
            )

    def search(self, start: Working, rng: ImageRNG) -> Tensor:
        best = Closest(start.clean)
        work = self._thorough(start, best) if self.later is None else self._thrifty(start, best, self.later)
        if self.eps is None:
            return best.images
        best.images[work.index] = work.images
        return make_projection(self.ball, start.clean, float(self.eps))(best.images)

    def _begin(self, start: Working, logits: Tensor, wrong: Tensor) -> _Stepping:
        """The images the victim gets right, with their candidates."""
        # For them the victim's class is the label; the others are adversarial as they are.
        others = logits.scatter(1, start.labels[:, None], float("-inf"))
        count = min(self.candidates or CANDIDATES, start.oracle.num_classes) - 1
        classes = torch.cat([start.labels[:, None], others.topk(count, dim=1).indices], 1)
        still = torch.zeros_like(start.clean)
        every = _Stepping(start.oracle, start.index, start.clean, start.labels, classes, start.clean, still)
        return keep(every, ~wrong)

    def _moved(self, work: _Stepping, step: Tensor) -> _Stepping:
        total = work.total + step
        return replace(work, total=total, images=(work.clean + (1 + self.overshoot) * total).clamp(0, 1))

    def _thorough(self, start: Working, best: Closest) -> _Stepping:
        """All candidates at every step; what comes out goes to `best`, returned is what was not fooled."""
        seen = look(start.oracle, start.clean, start.labels, False)
        wrong = seen.margin > 0
        work, logits, grad = self._begin(start, seen.logits, wrong), seen.logits[~wrong], seen.grad[~wrong]
        for _ in range(self.steps):
            if not len(work):
                break
            work = self._moved(work, self._step(work, logits, grad))
            seen = look(work.oracle, work.images, work.labels, False, _first(work.classes))
            success = seen.margin > 0
            best.offer(work.index, work.images, lengths(work.images - work.clean), success)
            work, logits, grad = keep(work, ~success), seen.logits[~success], seen.grad[~success]
        return work

    def _thrifty(self, start: Working, best: Closest, later: int) -> _Stepping:
        """Gradients of images that are not fooled yet only, after the first step of the `later` nearest candidates."""
        logits, beyond = _margins(start)
        work = self._begin(start, logits, beyond > 0)
        for step in range(self.steps):
            if not len(work):
                break
            differences = _Differences(work.classes, first=1)
            grads = differences.gradients(work.oracle, work.images)
            logits = over_draws(differences.logits)
            gaps = logits.gather(1, work.classes[:, 1:]) - logits.gather(1, work.classes[:, :1])
            work = self._moved(work, self._shortest(gaps, grads))
            if step == 0 and later <= gaps.shape[1]:
                far = torch.stack([self.distance(gaps[:, k], grad) for k, grad in enumerate(grads)], 1)
                # Candidates stay in the order of their logits, which breaks ties.
                near = far.topk(later - 1, dim=1, largest=False).indices.sort(1).values
                work = replace(
                    work, classes=torch.cat([work.classes[:, :1], work.classes.gather(1, near + 1)], 1)
                )
            success = _margins(work, work.images)[1] > 0
            best.offer(work.index, work.images, lengths(work.images - work.clean), success)
            work = keep(work, ~success)
        return work

    def _step(self, work: _Stepping, logits: Tensor, first: Tensor) -> Tensor:
        """The shortest step to a boundary of the linearised victim, given the gradient for the first candidate."""
        gaps = logits.gather(1, work.classes[:, 1:]) - logits.gather(1, work.classes[:, :1])
        grads = [first]
        if gaps.shape[1] > 1:
            grads += _Differences(work.classes).gradients(work.oracle, work.images)
        return self._shortest(gaps, grads)

    def _shortest(self, gaps: Tensor, grads: Sequence[Tensor]) -> Tensor:
        """The step to the nearest of the boundaries with gaps (n, k) and as many gradients (n, 3, H, W)."""
        distance, chosen = self.distance(gaps[:, 0], grads[0]), grads[0]
        for k in range(1, len(grads)):
            other = self.distance(gaps[:, k], grads[k])
            nearer = other < distance
            distance = torch.where(nearer, other, distance)
            chosen = torch.where(per_image(nearer), grads[k], chosen)
        return self.move(distance + MARGIN, chosen)

    @abstractmethod
    def distance(self, gap: Tensor, grad: Tensor) -> Tensor:
        """How far a boundary is, (n,), by the gap of the logits (n,) and its gradient (n, 3, H, W)."""

    @abstractmethod
    def move(self, distance: Tensor, grad: Tensor) -> Tensor:
        """The step of this length along the gradient, (n, 3, H, W)."""


def _margins(work: Working, images: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits (n, K) and margins (n,) at `images`, or the clean ones, by a forward pass alone."""
    objective = Scored("margin", work.labels, False)
    beyond = work.oracle.value(work.clean if images is None else images, objective)
    return objective.logits(), beyond


def _first(classes: Tensor) -> Score:
    return lambda logits: logits.gather(1, classes[:, 1:2])[:, 0] - logits.gather(1, classes[:, :1])[:, 0]


@ATTACKS.register_module(name="deepfool")
class DeepFool(_DeepFool):
    """DeepFool in the L2 norm (Moosavi-Dezfooli et al., CVPR 2016, algorithm 2).

    x + (1 + overshoot) * sum of r, where each r goes to the nearest of the boundaries between the label and the
    candidates as they are linearised at the last image: |f_k| / ||w_k||_2 along w_k. Clipped to [0,1] at every step. An
    image stops when it is misclassified. It is clean where that never happens, unless there is an eps.

    Args:
        steps: number of steps at most.
        candidates: classes considered, the label and the likeliest others at the clean image; None = 10, or all classes
            where there are fewer.
        overshoot: by how much the sum of the steps is stretched.
        eps: with it, what comes out is projected onto the ball of this radius, successful or not: an attack with a
            budget, which papers compare with PGD. None = the nearest adversarial image.
        later: classes considered after the first step, the label and those whose boundaries were nearest there; fooled
            images get no more gradients. As many as `candidates` find what None, the published search, finds, with
            fewer passes; fewer than that are not in the paper.
    """

    def __init__(
        self,
        steps: Steps = 50,
        candidates: Count | None = None,
        overshoot: Overshoot = 0.02,
        eps: Radius | None = None,
        later: Count | None = None,
    ) -> None:
        super().__init__(steps, candidates, overshoot, eps, later, "l2")

    def distance(self, gap: Tensor, grad: Tensor) -> Tensor:
        return gap.abs() / (lengths(grad) + TINY)

    def move(self, distance: Tensor, grad: Tensor) -> Tensor:
        return per_image(distance / (lengths(grad) + TINY)) * grad


@ATTACKS.register_module(name="deepfool_linf")
class DeepFoolLinf(_DeepFool):
    """DeepFool in the L-infinity norm: |f_k| / ||w_k||_1 along sign w_k (Moosavi-Dezfooli et al. 2016, section 3.3).

    Otherwise as `deepfool`.

    Args:
        steps: number of steps at most.
        candidates: see `deepfool`.
        overshoot: see `deepfool`.
        eps: see `deepfool`.
        later: see `deepfool`.
    """

    def __init__(
        self,
        steps: Steps = 50,
        candidates: Count | None = None,
        overshoot: Overshoot = 0.02,
        eps: Pixels | None = None,
        later: Count | None = None,
    ) -> None:
        super().__init__(steps, candidates, overshoot, eps, later, "linf")

    def distance(self, gap: Tensor, grad: Tensor) -> Tensor:
        return gap.abs() / (grad.flatten(1).abs().double().sum(1).to(grad.dtype) + TINY)

    def move(self, distance: Tensor, grad: Tensor) -> Tensor:
        return per_image(distance) * grad.sign()
