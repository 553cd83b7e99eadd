"""Small fixed-weight victims behind the real oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.protocols import Attack, Defense, Geometry, ImageRNG, Oracle, TargetModel
from bench.threat import ModelOracle, Victim


class Classifier(TargetModel):
    """A network as a target; `one_by_one` sends images through it singly, so that the batch cannot matter at all."""

    task = "classification"
    losses = ("ce",)

    def __init__(self, net: nn.Module, num_classes: int, one_by_one: bool = False) -> None:
        super().__init__()
        self.net, self.num_classes, self.one_by_one = (
            net.eval().requires_grad_(False),
            num_classes,
            one_by_one,
        )
        self.sizes: list[tuple[int, ...]] = []

    def logits(self, images: Tensor, *, geometry: Geometry | None = None) -> Tensor:
        self.sizes.append(tuple(images.shape))
        if self.one_by_one:
            return torch.cat([self.net(image[None]) for image in images])
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
        assert kind in self.losses
        return F.cross_entropy(self.logits(images), torch.tensor(list(targets)), reduction="none")

    def predict(self, images: Tensor, *, geometry: Geometry | None = None) -> list[Any]:
        return [int(i) for i in self.logits(images).argmax(1)]


class Linear(nn.Module):
    """Logits (-w.x, w.x): the closed form of every attack is known."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, images: Tensor) -> Tensor:
        score = (images * self.weight).flatten(1).sum(1)
        return torch.stack([-score, score], 1)


def convnet(classes: int = 5, seed: int = 0) -> nn.Module:
    """A strongly curved network of random weights for images of any size; its classes are about equally frequent."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(64, classes),
        )
        with torch.no_grad():
            net[0].weight *= 3
            net[2].weight *= 4
            net[6].weight *= 6
            net[6].bias -= net(torch.rand(64, 3, 12, 12)).mean(0)
    return net


def batch(
    count: int = 4, size: tuple[int, int] = (12, 12), seed: int = 1, classes: int = 5
) -> tuple[Tensor, list[int]]:
    """Images in [0,1], some pixels at the ends of the range, with labels."""
    g = torch.Generator().manual_seed(seed)
    images = (torch.rand(count, 3, *size, generator=g) * 1.2 - 0.1).clamp(0, 1)
    return images, torch.randint(0, classes, (count,), generator=g).tolist()


class Bench:
    """What the tests build with."""

    Classifier, Linear = Classifier, Linear
    convnet = staticmethod(convnet)
    batch = staticmethod(batch)

    @staticmethod
    def oracle(
        target: TargetModel, attack: Attack, count: int, defense: Defense | None = None, eot: int = 1
    ) -> ModelOracle:
        mode = "none" if defense is None else "exact"
        return ModelOracle(Victim((target,), defense, mode, eot), attack, Bench.rng(count, "oracle"))

    @staticmethod
    def rng(count: int, key: str = "attack") -> ImageRNG:
        return ImageRNG.for_images(key, [str(i) for i in range(count)])

    @staticmethod
    def run(
        attack: Attack, target: TargetModel, images: Tensor, targets: Sequence[Any], key: str = "attack"
    ) -> Tensor:
        oracle: Oracle = Bench.oracle(target, attack, len(images))
        return attack.run(oracle, images, targets, Bench.rng(len(images), key))


@pytest.fixture(scope="session")
def lab() -> type[Bench]:
    return Bench
