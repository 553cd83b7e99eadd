"""What an attack increases: losses of the victim, one value per image.

A `Loss` says what it asks the oracle for; `Loss.bind` fixes the images' targets (and the reference at the clean image,
where there is one) and gives the objective that the loop hands to `Oracle.gradient`. Objectives are always increased:
a targeted attack increases minus the loss towards its wrong targets.

A reference belongs to a draw: where the victim draws random numbers, it is taken anew in every draw, from the clean
images. Compared with another draw's, the noise of the defense would be most of the distance, and its gradient that of
the noise.

`margin`, `dlr` and `kl` are computed here from logits. Every other name is a loss kind of the target itself
(`ce` for labels and label maps; `cls`, `loc`, `cls+loc`, `mask` for detectors), asked for through `Oracle.loss`, so
that ground truth, ignore labels and geometry stay inside the task.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attacks.scores import as_labels, dlr, margin
from bench.errors import NotApplicable
from bench.protocols import Needs, Oracle, Warped


class Loss(ABC):
    """A loss of each image; larger means a worse prediction.

    Attributes:
        name: what the user calls it.
        needs: what it asks the oracle for, beside gradients.
        kinds: loss kinds it asks of the target.
        tasks: tasks it is defined for; None = every task that has `kinds`.
        targeted: it can be decreased towards a wrong target.
        flat_at_clean: its gradient at the clean image is exactly zero, so an attack must start elsewhere.
        compares: it has a `reference` that it asks the victim for, as every class that defines one, unless it says not.
    """

    name: str
    needs: frozenset[Needs] = frozenset()
    kinds: tuple[str, ...] = ()
    tasks: frozenset[str] | None = None
    targeted: bool = True
    flat_at_clean: bool = False
    compares: bool = False

    def __init_subclass__(cls) -> None:
        if "reference" in vars(cls) and "compares" not in vars(cls):
            cls.compares = True

    @abstractmethod
    def __call__(
        self, oracle: Oracle, images: Tensor | Warped, targets: Sequence[Any], reference: Tensor | None
    ) -> Tensor:
        """Loss of each image, (B,), differentiable to `images` (B, 3, H, W)."""

    def reference(self, oracle: Oracle, images: Tensor) -> Tensor | None:
        """What the loss compares with, at the clean `images`, without a gradient; its first dimension is the batch."""
        return None

    def at(self, step: int, steps: int) -> Loss:
        """The loss at `step` (from 0) of `steps`; itself unless it has a schedule."""
        return self

    def bind(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], targeted: bool) -> BoundLoss:
        """The objective for `images` (B, 3, H, W) with `targets`."""
        # Stand-ins for oracles draw nothing.
        drawn = self.compares and getattr(oracle, "stochastic", False)
        reference = None if drawn else self.reference(oracle, images)
        clean = images if drawn else None
        return BoundLoss(self, tuple(targets), reference, -1.0 if targeted else 1.0, clean=clean)


@dataclass(frozen=True)
class BoundLoss:
    """An objective (`bench.protocols.Objective`): the loss of fixed images, with the sign that makes it increase.

    Attributes:
        loss: what is increased.
        targets: of each image.
        reference: what the loss compares with, where one serves all draws.
        sign: -1 where the loss is to fall.
        clean: the clean images (B, 3, H, W), where every draw has a reference of its own; else None.
    """

    loss: Loss
    targets: tuple[Any, ...]
    reference: Tensor | None
    sign: float
    clean: Tensor | None = field(default=None, kw_only=True)

    def __call__(self, oracle: Oracle, images: Tensor | Warped) -> Tensor:
        """Values (B,) to be increased."""
        reference = self.reference if self.clean is None else self.loss.reference(oracle, self.clean)
        return self.sign * self.loss(oracle, images, self.targets, reference)

    def at(self, step: int, steps: int) -> BoundLoss:
        """The objective at `step` (from 0) of `steps`; the same one unless the loss has a schedule."""
        scheduled = self.loss.at(step, steps)
        return self if scheduled is self.loss else replace(self, loss=scheduled)

    def select(self, index: Sequence[int] | Tensor) -> BoundLoss:
        """The objective of some of the images."""
        chosen = torch.as_tensor(index, dtype=torch.long)

        def part(whole: Tensor | None) -> Tensor | None:
            return None if whole is None else whole[chosen.to(whole.device)]

        targets = tuple(self.targets[i] for i in chosen.tolist())
        return replace(self, targets=targets, reference=part(self.reference), clean=part(self.clean))


class TaskLoss(Loss):
    """A loss kind of the target model, by name (`TargetModel.losses`)."""

    def __init__(self, kind: str) -> None:
        self.name = kind
        self.kinds = (kind,)

    def __call__(
        self, oracle: Oracle, images: Tensor | Warped, targets: Sequence[Any], reference: Tensor | None
    ) -> Tensor:
        """`oracle.loss` of this kind."""
        return oracle.loss(images, targets, self.name)


class Margin(Loss):
    """max_{k != y} z_k - z_y, cut off at `kappa` (Carlini and Wagner 2017, eq. 6, f_6 with the sign of a loss).

    Positive exactly when the image is misclassified. `kappa` 0 is the hinge of the paper, whose gradient vanishes as
    soon as the image is misclassified; None (no cut-off) goes on increasing the margin.
    """

    name = "margin"
    needs = frozenset({"logits"})
    tasks = frozenset({"classification"})

    def __init__(self, kappa: float | None = None) -> None:
        self.kappa = kappa

    def __call__(
        self, oracle: Oracle, images: Tensor | Warped, targets: Sequence[Any], reference: Tensor | None
    ) -> Tensor:
        """Margins (B,), not cut off: the objective that `bind` gives is."""
        logits = oracle.logits(images)
        return margin(logits, as_labels(targets, logits.device))

    def bind(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], targeted: bool) -> BoundLoss:
        """The objective, cut off where the attack has reached its confidence."""
        bound = super().bind(oracle, images, targets, targeted)
        return (
            bound if self.kappa is None else _Capped(bound.loss, bound.targets, None, bound.sign, self.kappa)
        )


@dataclass(frozen=True)
class _Capped(BoundLoss):
    """An objective that has no gradient above `cap`."""

    cap: float

    def __call__(self, oracle: Oracle, images: Tensor | Warped) -> Tensor:
        return super().__call__(oracle, images).clamp(max=self.cap)


class DLR(Loss):
    """Difference of logits ratio, -(z_y - max_{k != y} z_k) / (z_pi1 - z_pi3) (Croce and Hein 2020, eq. 6).

    Invariant to shift and scale of the logits, so saturated models do not hide their gradient. Needs three classes.
    The paper's targeted form (its eq. 7) needs the true label beside the target; here a targeted attack decreases the
    same ratio towards the target.
    """

    name = "dlr"
    needs = frozenset({"logits"})
    tasks = frozenset({"classification"})

    def __call__(
        self, oracle: Oracle, images: Tensor | Warped, targets: Sequence[Any], reference: Tensor | None
    ) -> Tensor:
        """Ratios (B,)."""
        logits = oracle.logits(images)
        return dlr(logits, as_labels(targets, logits.device))

    def bind(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], targeted: bool) -> BoundLoss:
        """The objective.

        Raises:
            NotApplicable: the victim has fewer than three classes.
        """
        if oracle.num_classes < 3:
            raise NotApplicable(f"the DLR loss needs at least 3 classes, the model has {oracle.num_classes}")
        return super().bind(oracle, images, targets, targeted)


class KL(Loss):
    """KL(softmax z(x) || softmax z(x')) with z(x) at the clean image; no label (Zhang et al. 2019, TRADES, eq. 5).

    A label map's divergence is the mean over its pixels. Its minimum, with zero gradient, is the clean image.
    """

    name = "kl"
    needs = frozenset({"logits"})
    tasks = frozenset({"classification", "segmentation"})
    targeted = False
    flat_at_clean = True

    def reference(self, oracle: Oracle, images: Tensor) -> Tensor:
        """Class probabilities at the clean images, (B, K, ...)."""
        with torch.no_grad():
            return oracle.logits(images).softmax(1)

    def __call__(
        self, oracle: Oracle, images: Tensor | Warped, targets: Sequence[Any], reference: Tensor | None
    ) -> Tensor:
        """Divergences (B,)."""
        assert reference is not None
        divergence = F.kl_div(oracle.logits(images).log_softmax(1), reference, reduction="none").sum(1)
        return divergence.flatten(1).mean(1) if divergence.ndim > 1 else divergence


def make_loss(name: str, kappa: float | None = None) -> Loss:
    """The loss called `name`: `margin`, `dlr`, `kl`, or any loss kind of the target.

    Args:
        name: its name.
        kappa: confidence at which `margin` stops; None = never.
    """
    if name == "margin":
        return Margin(kappa)
    if kappa is not None:
        raise ValueError(f"kappa belongs to loss 'margin', not to '{name}'")
    if name == "dlr":
        return DLR()
    return KL() if name == "kl" else TaskLoss(name)
