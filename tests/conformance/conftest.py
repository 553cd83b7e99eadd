"""One fixed network, seen by our oracle and by other libraries alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.protocols import Attack, Geometry, ImageRNG, TargetModel
from bench.registry import ATTACKS
from bench.threat import ModelOracle, Victim


class Target(TargetModel):
    task = "classification"
    losses = ("ce",)
    num_classes = 10

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def logits(self, images: Tensor, *, geometry: Geometry | None = None) -> Tensor:
        return self.net(images)

    def loss(
        self,
        images: Tensor,
        targets: Sequence[Any],
        kind: str,
        *,
        geometry: Geometry | None = None,
        rng: ImageRNG | None = None,
    ) -> Tensor:
        return F.cross_entropy(self.net(images), torch.as_tensor(targets), reduction="none")

    def predict(self, images: Tensor, *, geometry: Geometry | None = None) -> list[Any]:
        return [int(i) for i in self.net(images).argmax(1)]


class Setting:
    """A smooth random network, images that touch the ends of the range, labels, and wrong targets.

    Everything is float64: the order in which a library sums then cannot flip the sign of a gradient near zero.
    """

    def __init__(
        self, dtype: torch.dtype = torch.float64, size: tuple[int, int] = (20, 20), count: int = 8
    ) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.net = nn.Sequential(
                nn.Conv2d(3, 12, 3, padding=1),
                nn.Tanh(),
                nn.Conv2d(12, 16, 3, stride=2, padding=1),
                nn.SiLU(),
                nn.AdaptiveAvgPool2d(2),
                nn.Flatten(),
                nn.Linear(64, 10),
            )
            with torch.no_grad():
                self.net[0].weight *= 3
                self.net[2].weight *= 4
                self.net[6].weight *= 6
                self.net[6].bias -= self.net(torch.rand(64, 3, 20, 20)).mean(0)
            self.images = (torch.rand(count, 3, *size) * 1.2 - 0.1).clamp(0, 1).to(dtype)
        self.net = self.net.to(dtype).eval().requires_grad_(False)
        self.target = Target(self.net)
        self.labels = self.net(self.images).argmax(1)
        self.wrong = (self.labels + 3) % 10

    def rng(self) -> ImageRNG:
        return ImageRNG.for_images("conformance", map(str, range(len(self.images))))

    def run(self, name: str, params: dict[str, Any], targeted: bool = False) -> Tensor:
        attack: Attack = ATTACKS.create(name, {**params, "target": "random"} if targeted else params)
        oracle = ModelOracle(Victim((Target(self.net),)), attack, self.rng())
        targets = (self.wrong if targeted else self.labels).tolist()
        return attack.run(oracle, self.images, targets, self.rng())


@pytest.fixture(scope="session")
def setting() -> Setting:
    return Setting()
