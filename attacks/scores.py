"""What attacks read off logits: labels as tensors, margins, and whether an image fools its victim."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.protocols import Oracle, Warped

Stop = bool | None
"""Whether a fooled image leaves its attack. None leaves that to the harness: it does where the victim is the very
pipeline that will be evaluated and draws nothing, and never where another one will see the image too. Without a harness
it leaves an attack on scores, and stays in one on gradients to the end, as in every library."""


def as_labels(targets: Sequence[Any], device: torch.device) -> Tensor:
    """Class labels as an integer tensor (B,) on `device`."""
    return torch.tensor([int(target) for target in targets], dtype=torch.long, device=device)


def runner_up(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest logit of the other classes, (B,), from logits (B, K)."""
    return logits.scatter(1, labels[:, None], float("-inf")).max(1).values


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """max_{k != y} z_k - z_y, (B,): positive exactly when another class wins (Carlini and Wagner 2017, f_6)."""
    return runner_up(logits, labels) - logits.gather(1, labels[:, None])[:, 0]


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """The margin over the gap between the first and the third largest logit, (B,) (Croce and Hein 2020, eq. 6)."""
    top = logits.topk(3, dim=1).values
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)


def fooled(logits: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    """(B,) bool: the label does not win, or, `targeted`, it does. A tie goes to the lower class, as at evaluation."""
    wins = (logits == logits.amax(1, keepdim=True)).int().argmax(1) == labels
    return wins if targeted else ~wins


def score(loss: str, logits: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    """What an attack on scores increases, (B,): the loss of the label, or minus that of the target.

    Args:
        loss: `ce`, `margin` or `dlr`.
        logits: (B, K).
        labels: (B,), true labels or wrong targets.
        targeted: whether `labels` are to be reached.
    """
    if loss == "ce":
        value = F.cross_entropy(logits, labels, reduction="none")
    else:
        value = margin(logits, labels) if loss == "margin" else dlr(logits, labels)
    return -value if targeted else value


def over_draws(values: Sequence[Tensor]) -> Tensor:
    """Mean of one tensor a draw."""
    return values[0] if len(values) == 1 else torch.stack(list(values)).mean(0)


class Watched(ABC):
    """An objective on logits that remembers them, so that knowing a success costs no pass of its own."""

    def __init__(self, labels: Tensor, targeted: bool) -> None:
        self.labels, self.targeted = labels, targeted
        self._seen: list[Tensor] = []

    @abstractmethod
    def value(self, logits: Tensor) -> Tensor:
        """Values (B,) to be increased, from logits (B, K)."""

    def __call__(self, oracle: Oracle, images: Tensor) -> Tensor:
        """`value` of the oracle's logits."""
        logits = oracle.logits(images)
        self._seen.append(logits.detach())
        return self.value(logits)

    def logits(self) -> Tensor:
        """Logits (B, K) of the last call, the mean over its draws."""
        seen, self._seen = self._seen, []
        return over_draws(seen)

    def hit(self) -> Tensor:
        """(B,) bool: the images of the last call fool the victim, by the mean logits of its draws."""
        return fooled(self.logits(), self.labels, self.targeted)


class Scored(Watched):
    """`score` as an objective."""

    def __init__(self, loss: str, labels: Tensor, targeted: bool) -> None:
        super().__init__(labels, targeted)
        self.loss = loss

    def value(self, logits: Tensor) -> Tensor:
        """Values (B,) to be increased."""
        return score(self.loss, logits, self.labels, self.targeted)


class Seen:
    """An oracle that keeps the logits it gives: where an objective asks for them, knowing a success costs no pass more.

    Stands in for a classifier's oracle inside one objective, whose images it must be asked about once.

    Args:
        oracle: the victim.
        kept: where the logits (B, K) go, one entry a draw.
    """

    def __init__(self, oracle: Oracle, kept: list[Tensor]) -> None:
        self.num_classes, self.stochastic = oracle.num_classes, oracle.stochastic
        self._oracle, self._kept = oracle, kept

    def logits(self, images: Tensor | Warped) -> Tensor:
        """The oracle's."""
        logits = self._oracle.logits(images)
        self._kept.append(logits.detach())
        return logits

    def loss(self, images: Tensor | Warped, targets: Sequence[Any], kind: str) -> Tensor:
        """`ce` of the logits, (B,), which is what a classifier's is."""
        assert kind == "ce"
        logits = self.logits(images)
        return score(kind, logits, as_labels(targets, logits.device), targeted=False)


def asked(oracle: Oracle, images: Tensor, loss: str, labels: Tensor, targeted: bool) -> tuple[Tensor, Tensor]:
    """`score` (B,) and whether the images fool the victim (B,), by the mean over its EOT draws, without a gradient."""
    objective = Scored(loss, labels, targeted)
    return oracle.value(images, objective), objective.hit()
