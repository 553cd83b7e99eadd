"""VGG16 and VGG19 as judges of images: the frozen networks whose features NRP and perceptual losses compare."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.errors import GridError, WeightsError, unknown
from bench.weights import Weights, load_state

__all__ = ["VGGFeatures", "vgg_features"]

_BLOCKS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}  # convolutions between poolings, by depth
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VGGFeatures(nn.Module):
    """The convolutions of a VGG16 or VGG19 without batch normalisation, frozen.

    Args:
        weights: checkpoint in torchvision's layout (`features.0.weight` ... ); its classifier is not used. The number
            of convolutions says which network it is.

    Attributes:
        depth: 16 or 19.
        sha256: digest of the file.

    Raises:
        WeightsError: the file is missing, unsafe, damaged or of another network.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: Path) -> None:
        super().__init__()
        loaded = load_state(weights, hint="torchvision publishes vgg16 and vgg19")
        self.depth, filters = _filters(loaded, weights)
        self.sha256 = loaded.sha256
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)
        blocks = enumerate(_BLOCKS[self.depth], 1)
        self.names = [f"relu{block}_{k}" for block, size in blocks for k in range(1, size + 1)]
        self.convolutions = nn.ModuleList(_convolution(weight, bias) for weight, bias in filters)
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor, layers: Iterable[str], *, normalise: bool = True) -> list[Tensor]:
        """Activations after ReLU of `layers` (`relu3_3` and so on), each (B, C, H, W), in the order asked for.

        Args:
            images: (B, 3, H, W).
            layers: names; nothing behind the last of them is computed.
            normalise: subtract and divide by ImageNet's mean and standard deviation, for images in [0,1].

        Raises:
            GridError: no such layer.
        """
        wanted = list(layers)
        for name in wanted:
            if name not in self.names:
                raise GridError(unknown(f"layer of VGG{self.depth}", name, self.names))
        x = (images - self.mean) / self.std if normalise else images
        found: dict[str, Tensor] = {}
        for name, convolution in zip(self.names, self.convolutions, strict=True):
            if name.endswith("_1") and name != "relu1_1":
                x = nn.functional.max_pool2d(x, 2)
            x = nn.functional.relu(convolution(x))
            found[name] = x
            if len(found.keys() & set(wanted)) == len(set(wanted)):
                break
        return [found[name] for name in wanted]


@functools.lru_cache(maxsize=2)
def vgg_features(weights: Path) -> VGGFeatures:
    """The network of this file, on the CPU; the last two stay loaded.

    Raises:
        WeightsError: as `VGGFeatures`.
    """
    return VGGFeatures(weights)


def _filters(loaded: Weights, path: Path) -> tuple[int, list[tuple[Tensor, Tensor]]]:
    """The depth, and weight and bias of every convolution in order."""
    what = f"weights file {path} is no VGG16 or VGG19 without batch normalisation in torchvision's layout"
    numbers = sorted(int(m[1]) for n in loaded.state if (m := re.fullmatch(r"features\.(\d+)\.weight", n)))
    depth = next((depth for depth in _BLOCKS if _numbers(depth) == numbers), None)
    if depth is None:
        raise WeightsError(f"{what}: it has {len(numbers)} layers called features.N")
    filters = []
    channels = 3
    for n in numbers:
        weight, bias = loaded.state[f"features.{n}.weight"], loaded.state.get(f"features.{n}.bias")
        if weight.shape[1:] != (channels, 3, 3) or bias is None or bias.shape != weight.shape[:1]:
            raise WeightsError(f"{what}: features.{n}.weight has shape {tuple(weight.shape)}")
        filters.append((weight.float(), bias.float()))
        channels = len(weight)
    return depth, filters


def _numbers(depth: int) -> list[int]:
    """Places of the convolutions among torchvision's modules: a ReLU follows each, a pooling each block."""
    numbers: list[int] = []
    place = 0
    for size in _BLOCKS[depth]:
        numbers += range(place, place + 2 * size, 2)
        place += 2 * size + 1
    return numbers


def _convolution(weight: Tensor, bias: Tensor) -> nn.Conv2d:
    made: nn.Conv2d = nn.utils.skip_init(nn.Conv2d, weight.shape[1], weight.shape[0], 3, padding=1)
    with torch.no_grad():
        made.weight.copy_(weight)
        made.bias = nn.Parameter(bias)
    return made
