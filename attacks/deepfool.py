"""DeepFool: steps to the nearest linearised decision boundary, in the L2 and the L-infinity norm."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from attacks.iterative import Radius, Steps
from attacks.minimal import Closest, MinimalNorm, Score, Working, keep, lengths, look, per_image
from attacks.projections import make_projection
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
    """z_k - z_0 for the candidates k = 2, 3, ... of each image, with all gradients from one forward pass.

    The objective itself is the last of them; the gradients of the others are taken on the way.
    """

    def __init__(self, classes: Tensor) -> None:
        self.classes = classes
        self.grads: list[list[Tensor]] = [[] for _ in range(classes.shape[1] - 3)]

    def __call__(self, oracle: Oracle, images: Tensor) -> Tensor:
        logits = oracle.logits(images)
        gaps = logits.gather(1, self.classes[:, 2:]) - logits.gather(1, self.classes[:, :1])
        for k, grads in enumerate(self.grads):
            grads.append(torch.autograd.grad(gaps[:, k].sum(), images, retain_graph=True)[0])
        # The oracle counts one backward pass for the value it is given.
        for trace in getattr(oracle, "traces", ()):
            trace.backwards += len(self.grads)
        return gaps[:, -1]

    def gradients(self, oracle: Oracle, images: Tensor) -> list[Tensor]:
        """One gradient (n, 3, H, W) for each candidate from the third on, as means over EOT draws."""
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

    def __init__(
        self,
        steps: int,
        candidates: int | None,
        overshoot: float,
        eps: Fraction | None,
        norm: Literal["l2", "linf"],
    ) -> None:
        self.steps, self.candidates, self.overshoot = steps, candidates, overshoot
        self.eps, self.ball = eps, norm
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
        seen = look(start.oracle, start.clean, start.labels, False)
        wrong = seen.margin > 0
        # Images the victim gets wrong are adversarial as they are. For the others its class is the label.
        others = seen.logits.scatter(1, start.labels[:, None], float("-inf"))
        count = min(self.candidates or CANDIDATES, start.oracle.num_classes) - 1
        classes = torch.cat([start.labels[:, None], others.topk(count, dim=1).indices], 1)
        every = _Stepping(
            start.oracle,
            start.index,
            start.clean,
            start.labels,
            classes,
            start.clean,
            torch.zeros_like(start.clean),
        )
        work, logits, grad = keep(every, ~wrong), seen.logits[~wrong], seen.grad[~wrong]
        for _ in range(self.steps):
            if not len(work):
                break
            total = work.total + self._step(work, logits, grad)
            images = (work.clean + (1 + self.overshoot) * total).clamp(0, 1)
            work = replace(work, total=total, images=images)
            seen = look(work.oracle, images, work.labels, False, _first(work.classes))
            success = seen.margin > 0
            best.offer(work.index, images, lengths(images - work.clean), success)
            work, logits, grad = keep(work, ~success), seen.logits[~success], seen.grad[~success]
        if self.eps is None:
            return best.images
        best.images[work.index] = work.images
        return make_projection(self.ball, start.clean, float(self.eps))(best.images)

    def _step(self, work: _Stepping, logits: Tensor, first: Tensor) -> Tensor:
        """The shortest step to a boundary of the linearised victim, given the gradient for the first candidate."""
        gaps = logits.gather(1, work.classes[:, 1:]) - logits.gather(1, work.classes[:, :1])
        grads = [first]
        if gaps.shape[1] > 1:
            grads += _Differences(work.classes).gradients(work.oracle, work.images)
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
    """

    def __init__(
        self,
        steps: Steps = 50,
        candidates: Count | None = None,
        overshoot: Overshoot = 0.02,
        eps: Radius | None = None,
    ) -> None:
        super().__init__(steps, candidates, overshoot, eps, "l2")

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
    """

    def __init__(
        self,
        steps: Steps = 50,
        candidates: Count | None = None,
        overshoot: Overshoot = 0.02,
        eps: Pixels | None = None,
    ) -> None:
        super().__init__(steps, candidates, overshoot, eps, "linf")

    def distance(self, gap: Tensor, grad: Tensor) -> Tensor:
        return gap.abs() / (grad.flatten(1).abs().double().sum(1).to(grad.dtype) + TINY)

    def move(self, distance: Tensor, grad: Tensor) -> Tensor:
        return per_image(distance) * grad.sign()
