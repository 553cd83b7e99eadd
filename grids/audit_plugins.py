"""Planted faults: attacks, defenses and models that are broken on purpose, one for each automatic check.

`grids/audit.yaml` runs them beside sound ones, `grids/audit_costly.yaml` those that only the costly checks can find;
every one of them must be found, and nothing else.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from bench.checks import recorded
from bench.protocols import (
    Attack,
    Dataset,
    Defense,
    Geometry,
    ImageRNG,
    ModelSource,
    Oracle,
    Pixels,
    Sample,
    TargetModel,
)
from bench.registry import ATTACKS, DATASETS, DEFENSES, MODELS


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

    def step_size(self, step: int) -> float:
        """That of the step number `step`, from 0."""
        return self._alpha

    def run(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], rng: ImageRNG) -> Tensor:
        """Adversarial images."""
        x = images
        for step in range(self.steps):
            grad = oracle.gradient(x, lambda o, v: self.objective(o, v, images, targets)).grad
            x = x + self.step_size(step) * grad.sign()
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


@ATTACKS.register_module(name="planted_schedule")
class PlantedSchedule(_SignSteps):
    """A step size that falls linearly and reaches zero at step 12, whatever `steps` says: from there it goes back."""

    def step_size(self, step: int) -> float:
        """Negative after step 12."""
        return 2 * self._alpha * (1 - step / 12)


@ATTACKS.register_module(name="planted_overflow")
class PlantedOverflow(_SignSteps):
    """Keeps its perturbation in a number too small for it: what lies beyond 49/255 comes round from the other side."""

    def run(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], rng: ImageRNG) -> Tensor:
        """Images that a large eps moves less than a small one."""
        delta, most = super().run(oracle, images, targets, rng) - images, 49 / 255
        return (images + (delta + most).remainder(2 * most) - most).clamp(0, 1)


@ATTACKS.register_module(name="planted_bounce")
class PlantedBounce(_SignSteps):
    """Its last step leads almost back to the clean image; `return_best` would have kept what it had."""

    def __init__(
        self,
        eps: Pixels = Fraction(8, 255),
        alpha: Pixels = Fraction(2, 255),
        steps: int = 20,
        loss: str = "ce",
        return_best: bool = False,
    ) -> None:
        super().__init__(eps, alpha, steps, loss)
        self.return_best = return_best

    def run(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], rng: ImageRNG) -> Tensor:
        """Adversarial images, or what is left of them."""
        x = super().run(oracle, images, targets, rng)
        return x if self.return_best else images + 0.1 * (x - images)


@DEFENSES.register_module(name="planted_reversed")
class PlantedReversed(Defense):
    """Changes nothing, but a gradient that crosses it comes out with the wrong sign.

    Args:
        where: in the defense itself (`forward`), or in the stand-in that BPDA differentiates (`surrogate`).
    """

    def __init__(self, where: Literal["forward", "surrogate"]) -> None:
        super().__init__()
        self.where = where

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """The images."""
        return _backwards(images) if self.where == "forward" else images

    def surrogate(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """The images."""
        return _backwards(images) if self.where == "surrogate" else images


def _backwards(images: Tensor) -> Tensor:
    return 2 * images.detach() - images


@DEFENSES.register_module(name="planted_jitter")
class PlantedJitter(Defense):
    """Changes nothing, but weighs every entry of the gradient at random: one draw says little, many agree.

    Args:
        sigma: standard deviation of the weights, whose mean is 1.
    """

    stochastic = True

    def __init__(self, sigma: float = 10.0) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, images: Tensor, rng: ImageRNG) -> Tensor:  # type: ignore[override]
        """The images."""
        weight = 1 + self.sigma * rng.normal(images.shape[1:], images.device).to(images.dtype)
        return images.detach() + weight * (images - images.detach())


@DEFENSES.register_module(name="planted_gain")
class PlantedGain(Defense):
    """Six times the distance from the nearest of the ten hues: so much larger does every perturbation arrive."""

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """Images with the contrast of their noise raised."""
        known = torch.tensor(hues(), device=images.device, dtype=images.dtype)
        nearest = known[torch.cdist(images.detach().mean((2, 3)), known).argmin(1)][..., None, None]
        return nearest + 6 * (images - nearest)


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
        if self.fault == "fine_print":
            last_bits = images * 255 - (images * 255).round().detach()
            sides = 1.0 - 2 * (torch.arange(self.num_classes, device=images.device) % 2)
            logits = logits + 50 * last_bits.flatten(1).mean(1, keepdim=True) * sides
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
    """A classifier with red and blue `swapped`, with logits so large that softmax is exact (`saturated`), or one that
    decides by what 8-bit images do not hold (`fine_print`).
    """

    task = "classification"

    def __init__(
        self, fault: Literal["swapped", "saturated", "fine_print"], base: str = "mini_resnet"
    ) -> None:
        self.fault = fault
        self.base: ModelSource = MODELS.create(base)

    def recorded(self) -> dict[str, float]:
        """What is known of the base."""
        return recorded(self.base)

    def identity(self) -> dict[str, Any]:
        """The fault and what it was planted in."""
        return {"name": "planted_model", "fault": self.fault, "base": self.base.identity()}

    def load(self, device: torch.device) -> TargetModel:
        """The faulty model."""
        return _Faulty(self.base.load(device), self.fault).to(device).eval()

    def input_spec(self) -> dict[str, Any]:
        """That of the base."""
        return self.base.input_spec()


@DATASETS.register_module(name="colours")
class Colours(Dataset):
    """Noisy patches of ten hues, the class: what a model that sees colours cannot mistake.

    The mini classifiers hardly look at colours (their digits are grey): a swap of red and blue does not show on them.

    Args:
        size: number of images.
        rounded: to 8 bits, as files hold them.
    """

    task = "classification"
    classes: ClassVar[Sequence[str]] = tuple(f"hue {36 * k}" for k in range(10))

    def __init__(self, size: int = 40, rounded: bool = False) -> None:
        self.size, self.rounded = size, rounded

    def __len__(self) -> int:
        return self.size

    def fingerprint(self) -> str:
        """Of the rule that makes the images."""
        return "colours-1" + ("-8-bit" if self.rounded else "")

    def __getitem__(self, index: int) -> Sample:
        generator = torch.Generator().manual_seed(index)
        colour = torch.tensor(hues()[index % 10]).view(3, 1, 1)
        image = (colour + 0.1 * torch.randn(3, 16, 16, generator=generator)).clamp(0, 1)
        return Sample((image * 255).round() / 255 if self.rounded else image, index % 10, str(index))


def hues() -> list[tuple[float, float, float]]:
    """Ten colours around the wheel."""
    return [colorsys.hsv_to_rgb(k / 10, 0.7, 0.8) for k in range(10)]


class _NearestHue(TargetModel):
    task = "classification"
    losses: ClassVar[tuple[str, ...]] = ("ce",)
    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("hues", torch.tensor(hues()))

    def logits(self, images: Tensor, *, geometry: Geometry | None = None) -> Tensor:
        means = images.flatten(2).mean(2)
        out: Tensor = -20 * (means[:, None] - self.hues).square().sum(2)
        return out

    def loss(
        self, images: Tensor, targets: Sequence[Any], kind: str, *,
        geometry: Geometry | None = None, rng: ImageRNG | None = None,
    ) -> Tensor:  # fmt: skip
        return self.loss_from_logits(self.logits(images), targets, kind)

    def loss_from_logits(self, logits: Tensor, targets: Sequence[Any], kind: str) -> Tensor:
        labels = torch.as_tensor(list(targets), device=logits.device)
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    def predict(self, images: Tensor, *, geometry: Geometry | None = None) -> list[Any]:
        return [int(label) for label in self.logits(images).argmax(1)]


@MODELS.register_module(name="nearest_hue")
class NearestHue(ModelSource):
    """The hue nearest to an image's mean colour."""

    task = "classification"

    def identity(self) -> dict[str, Any]:
        """It has no weights."""
        return {"name": "nearest_hue", "version": 1}

    def load(self, device: torch.device) -> TargetModel:
        """The model."""
        return _NearestHue().to(device).eval()

    def recorded(self) -> dict[str, float]:
        """Its rule is exact."""
        return {"clean": 1.0}
