"""The classifiers of the mini zoo, in front of the embedded digits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from bench.errors import WeightsError
from bench.protocols import ModelSource
from bench.registry import MODELS
from bench.weights import apply_state, load_state, sha256_file
from tasks.classification import cifar_nets
from tasks.classification.model import LogitsClassifier, Preparation
from tasks.mini import data, manifest

__all__ = ["MiniResNet", "MiniResNetAT", "MiniResNetFree", "MiniResNetTrades", "MiniVGG", "MiniWRN"]


#: Images per call of these networks; at 8 no result depends on an image's place, which larger batches do not promise.
MICRO_BATCH = 8


class _Mini(ModelSource):
    """A shipped classifier: its weights are checked against the manifest before they are used."""

    task = "classification"
    zoo_name: ClassVar[str]
    build: ClassVar[Callable[[], nn.Module]]

    def identity(self) -> dict[str, Any]:
        """Zoo, name and digest of the weights."""
        return {"source": "mini", "id": self.zoo_name, "sha256": self._checked()[1]}

    def input_spec(self) -> dict[str, Any]:
        """The nets take 32x32 images as they are."""
        return {}

    def load(self, device: torch.device) -> LogitsClassifier:
        """The frozen network; half-precision weights are widened to float32."""
        path, _ = self._checked()
        network = type(self).build()
        apply_state(network, load_state(path).state, what=f"model {self.zoo_name}, weights file {path}")
        side = data.IMAGE_SIZE
        adapter = LogitsClassifier(
            network, len(data.CLASSES), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25),
            preparation=Preparation(size=(side, side)), micro_batch=MICRO_BATCH,
        )  # fmt: skip
        return adapter.to(device)

    def _checked(self) -> tuple[Path, str]:
        path = manifest.weights_path(self.zoo_name)
        rebuild = f"restore it, or rebuild it with `python -m bench zoo build {self.zoo_name}`"
        if not path.is_file():
            raise WeightsError(f"weights file {path} does not exist: {rebuild}")
        found, recorded = sha256_file(path), str(manifest.entry(self.zoo_name)["sha256"])
        if found != recorded:
            raise WeightsError(
                f"weights file {path} is damaged or of another training (SHA-256 {found[:12]}, manifest "
                f"{recorded[:12]}): {rebuild}"
            )
        return path, found


@MODELS.register_module(name="mini_vgg")
class MiniVGG(_Mini):
    """VGG of four convolutions for 32x32 digits, trained on the embedded data."""

    zoo_name: ClassVar[str] = "mini_vgg"
    build: ClassVar[Callable[[], nn.Module]] = cifar_nets.mini_vgg


@MODELS.register_module(name="mini_resnet")
class MiniResNet(_Mini):
    """ResNet-8 for 32x32 digits, trained on the embedded data."""

    zoo_name: ClassVar[str] = "mini_resnet"
    build: ClassVar[Callable[[], nn.Module]] = cifar_nets.mini_resnet


@MODELS.register_module(name="mini_wrn")
class MiniWRN(_Mini):
    """WRN-10-2 with a stem of 8 channels for 32x32 digits, trained on the embedded data."""

    zoo_name: ClassVar[str] = "mini_wrn"
    build: ClassVar[Callable[[], nn.Module]] = cifar_nets.mini_wrn


@MODELS.register_module(name="mini_resnet_at")
class MiniResNetAT(MiniResNet):
    """`mini_resnet` after adversarial training (Madry et al. 2018)."""

    zoo_name: ClassVar[str] = "mini_resnet_at"


@MODELS.register_module(name="mini_resnet_trades")
class MiniResNetTrades(MiniResNet):
    """`mini_resnet` after training with TRADES (Zhang et al. 2019)."""

    zoo_name: ClassVar[str] = "mini_resnet_trades"


@MODELS.register_module(name="mini_resnet_free")
class MiniResNetFree(MiniResNet):
    """`mini_resnet` after free adversarial training (Shafahi et al. 2019)."""

    zoo_name: ClassVar[str] = "mini_resnet_free"
