"""A network, an attack and a defense whose figures can be worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bench.protocols import Attack, Dataset, Defense, ImageRNG, ModelSource, Oracle, Sample
from bench.registry import ATTACKS, DATASETS, DEFENSES, MODELS
from tasks.classification.model import LogitsClassifier

COLOURS = ((0.9, 0.1, 0.1), (0.5, 0.2, 0.25), (0.1, 0.4, 0.1), (0.3, 0.3, 0.7))


@DATASETS.register_module(name="plain_colours")
class PlainColours(Dataset):
    """Images of one colour; class 1 where 3 (2 g - b) is more than r."""

    task = "classification"
    classes: ClassVar[Sequence[str]] = ("red", "green")

    def __init__(self, copies: int = 1) -> None:
        self.copies = copies

    def __len__(self) -> int:
        return self.copies * len(COLOURS)

    def fingerprint(self) -> str:
        return "plain-1"

    def __getitem__(self, index: int) -> Sample:
        r, g, b = COLOURS[index % len(COLOURS)]
        image = torch.tensor([r, g, b])[:, None, None].expand(3, 4, 4) + 0.001 * (index // len(COLOURS))
        return Sample(image.clone(), int(3 * (2 * g - b) > r), str(index))


class Linear(nn.Module):
    """Maps (r, 2 g - b), averaged, and logits (r, 3 (2 g - b))."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1, bias=False)
        self.conv.weight.data = torch.tensor([[1.0, 0, 0], [0, 2, -1]])[:, :, None, None]
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2, bias=False))
        self.head[2].weight.data = torch.tensor([[1.0, 0], [0, 3]])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.conv(x))
        return out


@MODELS.register_module(name="plain_linear")
class PlainLinear(ModelSource):
    """`Linear` as a target."""

    task = "classification"

    def identity(self) -> dict[str, Any]:
        return {"name": "plain_linear", "weights_sha256": "none"}

    def load(self, device: torch.device) -> LogitsClassifier:
        return LogitsClassifier(Linear(), 2).to(device)


@ATTACKS.register_module(name="brighten")
class Brighten(Attack):
    """x + size."""

    needs = frozenset()
    norm = None

    def __init__(self, size: float = 0.1) -> None:
        self.size = size

    def run(self, oracle: Oracle, images: Tensor, targets: Sequence[Any], rng: ImageRNG) -> Tensor:
        return images + self.size


@DEFENSES.register_module(name="darken")
class Darken(Defense):
    """x - size."""

    def __init__(self, size: float = 0.05) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        return images - self.size
