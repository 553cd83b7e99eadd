"""A dataset and two linear models small enough that a whole grid runs in a second."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench.protocols import Dataset, Geometry, ImageRNG, ModelSource, Sample, TargetModel
from bench.registry import DATASETS, MODELS

CLASSES = 4
SIZE = 8


def template(label: int) -> Tensor:
    """The pattern of a class: what both models look for."""
    generator = torch.Generator().manual_seed(1000 + label)
    return torch.randn(3, SIZE, SIZE, generator=generator).sign()


@DATASETS.register_module(name="toy_images")
class ToyImages(Dataset):
    """A faint class pattern on a random image."""

    task = "classification"
    classes: ClassVar[Sequence[str]] = tuple("abcd")

    def __init__(self, size: int = 12, contrast: float = 0.06, poison: str = "") -> None:
        self.size, self.contrast, self.poison = size, contrast, poison

    def __len__(self) -> int:
        return self.size

    def fingerprint(self) -> str:
        return f"toy-1-{self.contrast}"

    def ids(self) -> list[str]:
        return [f"toy-{i}" for i in range(self.size)]

    def __getitem__(self, index: int) -> Sample:
        generator = torch.Generator().manual_seed(index)
        label = index % CLASSES
        image = 0.5 + 0.1 * torch.randn(3, SIZE, SIZE, generator=generator) + self.contrast * template(label)
        if self.poison == "nan" and index == 1:
            image = image * float("nan")
        if self.poison == "unreadable" and index == 1:
            raise OSError("truncated file")
        return Sample(image if self.poison else image.clamp(0, 1), label, f"toy-{index}")


class ToyLinear(TargetModel):
    """Correlates the image with every class pattern."""

    task = "classification"
    losses = ("ce", "margin", "dlr")
    num_classes = CLASSES

    def __init__(self, scale: float, memory: int) -> None:
        super().__init__()
        self.memory = memory
        self.register_buffer("weight", torch.stack([template(c) for c in range(CLASSES)]).flatten(1) * scale)

    def logits(self, images: Tensor, *, geometry: Geometry | None = None) -> Tensor:
        if len(images) > self.memory:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        if images.shape[-1] != SIZE:
            images = torch.nn.functional.interpolate(images, (SIZE, SIZE))
        # Not a matrix product: its rounding may depend on the number of rows.
        return ((images - 0.5).flatten(1)[:, None] * self.weight).sum(-1)

    def loss(
        self, images: Tensor, targets: Sequence[Any], kind: str, *,
        geometry: Geometry | None = None, rng: ImageRNG | None = None,
    ) -> Tensor:  # fmt: skip
        return self.loss_from_logits(self.logits(images), targets, kind)

    def loss_from_logits(self, logits: Tensor, targets: Sequence[Any], kind: str) -> Tensor:
        labels = torch.as_tensor(targets, device=logits.device)
        if kind == "ce":
            return torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        own = logits.gather(1, labels[:, None])[:, 0]
        other = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
        return other - own

    def predict(self, images: Tensor, *, geometry: Geometry | None = None) -> list[Any]:
        return [int(label) for label in self.logits(images).argmax(1)]


@MODELS.register_module(name="toy_linear")
class ToyLinearSource(ModelSource):
    """A linear model."""

    task = "classification"

    def __init__(self, scale: float = 0.2, memory: int = 1000, fail: bool = False) -> None:
        self.scale, self.memory, self.fail = scale, memory, fail

    def identity(self) -> dict[str, Any]:
        return {"name": "toy_linear", "scale": self.scale, "weights_sha256": "none"}

    def load(self, device: torch.device) -> TargetModel:
        if self.fail:
            from bench.errors import WeightsError

            raise WeightsError("toy.pth: no such file; put it there")
        log = os.environ.get("TOY_LOG")
        if log:
            with Path(log).open("a") as out:
                out.write(f"load {self.scale}\n")
        return ToyLinear(self.scale, self.memory).to(device).eval()
