"""Planted faults: attacks, defenses and models that are broken on purpose, one for each automatic check.

`grids/audit.yaml` runs them beside sound ones; every one of them must be found, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from bench.protocols import (
    Attack,
    Defense,
    Geometry,
    ImageRNG,
    ModelSource,
    Oracle,
    Pixels,
    Sample,
    TargetModel,
)
from bench.registry import ATTACKS, DEFENSES, MODELS


class _SignSteps(Attack):
    """Sign steps on an objective, `steps` times, inside the ball and [0,1]."""

    tasks = frozenset({"classification"})
    needs = frozenset({"gradient", "logits"})

    def __init__(
        self,
        eps: Pixels = Fraction(8, 255),
        alpha: Pixels = Fraction(2, 255),
        steps: int = 20,
        loss: str = "ce",
    ) -> None:
        self.eps, self.steps, self.loss = eps, steps, loss
        self._eps, self._alpha = float(eps), float(alpha)

    def objective(self, oracle: Any, x: Tensor, clean: Tensor, targets: Sequence[Any]) -> Tensor:
        """What is increased, (B,)."""
        out: Tensor = oracle.loss(x, targets, self.loss)
        return out

    def run(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], rng: ImageRNG) -> Tensor:
        """Adversarial images."""
        x = images
        for _ in range(self.steps):
            grad = oracle.gradient(x, lambda o, v: self.objective(o, v, images, targets)).grad
            x = x + self._alpha * grad.sign()
            x = torch.minimum(torch.maximum(x, images - self._eps), images + self._eps).clamp(0, 1)
        return x


@ATTACKS.register_module(name="planted_descent")
class PlantedDescent(_SignSteps):
    """Wrong sign: makes the true class more likely."""

    def objective(self, oracle: Any, x: Tensor, clean: Tensor, targets: Sequence[Any]) -> Tensor:
        """Minus the loss."""
        return -super().objective(oracle, x, clean, targets)


@ATTACKS.register_module(name="planted_clean_start")
class PlantedCleanStart(_SignSteps):
    """CAFA's form without a random start: a distance to the clean image's own logits, whose gradient there is zero."""

    def objective(self, oracle: Any, x: Tensor, clean: Tensor, targets: Sequence[Any]) -> Tensor:
        """Squared distance from the clean logits."""
        with torch.no_grad():
            reference = oracle.logits(clean)
        out: Tensor = (oracle.logits(x) - reference).square().sum(1)
        return out


@ATTACKS.register_module(name="planted_overshoot")
class PlantedOvershoot(_SignSteps):
    """Leaves its budget by a tenth."""

    def run(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], rng: ImageRNG) -> Tensor:
        """Images that moved too far."""
        x = super().run(oracle, images, targets, rng)
        return (images + 1.1 * (x - images)).clamp(0, 1)


@ATTACKS.register_module(name="planted_meddler")
class PlantedMeddler(_SignSteps):
    """Changes the weights of the model it attacks."""

    def run(self, oracle: Any, images: Tensor, targets: Sequence[Any], rng: ImageRNG) -> Tensor:
        """Adversarial images of a model that is not the one that was loaded."""
        state = next(iter(oracle.victim.models[0].state_dict().values()))
        state.mul_(1.01)
        return super().run(oracle, images, targets, rng)


@DEFENSES.register_module(name="planted_quantise")
class PlantedQuantise(Defense):
    """Rounds to 16 levels and says that it is differentiable: the gradient of rounding is zero."""

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """Rounded images."""
        return (images * 15).round() / 15


@DEFENSES.register_module(name="planted_global_noise")
class PlantedGlobalNoise(Defense):
    """Random, does not say so, and draws from torch's global generator."""

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """Noisy images."""
        return (images + 0.03 * torch.randn_like(images)).clamp(0, 1)


class _Faulty(TargetModel):
    task = "classification"

    def __init__(self, inner: TargetModel, fault: str) -> None:
        super().__init__()
        self.inner, self.fault = inner, fault
        self.losses = inner.losses  # type: ignore[misc]
        self.num_classes = inner.num_classes

    def prepare(self, sample: Sample) -> Sample:
        return self.inner.prepare(sample)

    def logits(self, images: Tensor, *, geometry: Geometry | None = None) -> Tensor:
        if self.fault == "swapped":
            images = images.flip(1)
        logits = self.inner.logits(images, geometry=geometry)
        return logits * 1e4 if self.fault == "saturated" else logits

    def loss(
        self, images: Tensor, targets: Sequence[Any], kind: str, *,
        geometry: Geometry | None = None, rng: ImageRNG | None = None,
    ) -> Tensor:  # fmt: skip
        return self.loss_from_logits(self.logits(images, geometry=geometry), targets, kind)

    def loss_from_logits(self, logits: Tensor, targets: Sequence[Any], kind: str) -> Tensor:
        return self.inner.loss_from_logits(logits, targets, kind)

    def predict(self, images: Tensor, *, geometry: Geometry | None = None) -> list[Any]:
        return [int(label) for label in self.logits(images, geometry=geometry).argmax(1)]


@MODELS.register_module(name="planted_model")
class PlantedModel(ModelSource):
    """A classifier with red and blue `swapped`, or with logits so large that softmax is exact (`saturated`)."""

    task = "classification"

    def __init__(self, fault: Literal["swapped", "saturated"], base: str = "mini_resnet") -> None:
        self.fault = fault
        self.base: ModelSource = MODELS.create(base)

    def identity(self) -> dict[str, Any]:
        """The fault and what it was planted in."""
        return {"name": "planted_model", "fault": self.fault, "base": self.base.identity()}

    def load(self, device: torch.device) -> TargetModel:
        """The faulty model."""
        return _Faulty(self.base.load(device), self.fault).to(device).eval()

    def input_spec(self) -> dict[str, Any]:
        """That of the base."""
        return self.base.input_spec()
