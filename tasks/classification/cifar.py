"""Classifiers of the CIFAR kind from a checkpoint: of `python -m bench train-target`, or as others publish them."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.errors import GridError, WeightsError
from bench.protocols import ModelSource
from bench.registry import MODELS
from bench.weights import apply_state, find_weights, load_state, read_meta, sha256_file
from tasks.classification import cifar_nets
from tasks.classification.model import LogitsClassifier

__all__ = ["SHIPPED", "Cifar"]

SHIPPED = Path(__file__).parent / "weights"


@MODELS.register_module(name="cifar")
class Cifar(ModelSource):
    """A WideResNet, VGG or ResNet of the CIFAR kind, e.g. `{name: cifar, arch: wrn-28-10, checkpoint: PATH}`.

    A checkpoint of `train-target` says by itself what it is. Of other people's state dictionaries the layouts of the
    usual repositories are understood (WideResNet: xternalz, TRADES; ResNet and VGG: kuangliu, torchvision's names).

    Args:
        checkpoint: safetensors file, or a state dictionary saved by torch; a bare name is also looked for among
            the shipped ones.
        arch: `wrn-DEPTH-WIDTH`, `vgg-DEPTH`, `resnet-DEPTH`, or a network of the zoo.
        num_classes: number of logits.
        mean, std: of each channel, in [0,1] units; (0, 0, 0) and (1, 1, 1) for a network on plain pixels.
        size: images of other sizes are resized to this many pixels a side, inside the gradient; None = never.
        made_with: further options of `train-target` that make the checkpoint, said when it is missing.
    """

    task = "classification"

    def __init__(
        self,
        checkpoint: str,
        arch: str | None = None,
        num_classes: int | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        size: int | None = None,
        made_with: str = "",
    ) -> None:
        if (mean is None) != (std is None):
            raise ValueError("mean and std go together")
        if size is not None and size < 1:
            raise ValueError(f"size: {size} is not 1 or more")
        if arch is not None:
            cifar_nets.check_arch(arch)
        self.path = find_weights(checkpoint, SHIPPED)
        self.made_with = made_with
        self.given = {"arch": arch, "num_classes": num_classes, "mean": mean, "std": std, "size": size}

    def identity(self) -> dict[str, Any]:
        """Network, classes, normalisation and digest of the checkpoint."""
        return {"source": "cifar", **self._facts, "sha256": sha256_file(self.path)}

    def input_spec(self) -> dict[str, Any]:
        """Images are taken as they are."""
        return {}

    def recorded(self) -> dict[str, float]:
        """Scores that `train-target` wrote into the checkpoint."""
        return {name: float(value) for name, value in self._said.get("scores", {}).items()}

    def load(self, device: torch.device) -> LogitsClassifier:
        """The frozen network; half-precision weights are widened to float32."""
        facts, what = self._facts, f"model cifar, checkpoint {self.path}"
        state = like_ours(load_state(self.path).state)
        head = state.get("fc.weight")
        if head is None or head.ndim != 2:
            raise WeightsError(
                f"{what}: no {facts['arch']} of the CIFAR kind, it does not end in one linear layer"
            )
        classes = facts["num_classes"] or len(head)
        if len(head) != classes:
            raise WeightsError(f"{what}: it has {len(head)} classes, num_classes says {classes}")
        network = cifar_nets.build(facts["arch"], classes)
        apply_state(network, state, what=f"{what}, arch {facts['arch']}")
        size = None if facts["size"] is None else (facts["size"], facts["size"])
        return LogitsClassifier(network, classes, mean=facts["mean"], std=facts["std"], fixed_size=size).to(
            device
        )

    @functools.cached_property
    def _said(self) -> dict[str, Any]:
        return read_meta(self.path) if self.path.suffix == ".safetensors" else {}

    @functools.cached_property
    def _facts(self) -> dict[str, Any]:
        """What the constructor was told, else what the checkpoint says."""
        what = f"model cifar, checkpoint {self.path}"
        if not self.path.is_file():
            arch = self.given["arch"] or "wrn-28-10"
            options = f" {self.made_with}" if self.made_with else ""
            raise WeightsError(
                f"{what}: there is no such file; make it with `python -m bench train-target --arch {arch} --dataset "
                f"DATASET{options} --out {self.path}`, or put a published state dictionary there"
            )
        said = self._said
        facts = {name: said.get(name) if value is None else value for name, value in self.given.items()}
        for name in ("arch", "num_classes"):
            if None not in (said.get(name), self.given[name]) and said[name] != self.given[name]:
                raise WeightsError(
                    f"{what}: it says {name} {said[name]}, the profile {name} {self.given[name]}"
                )
        if None in (facts["arch"], facts["mean"]):
            # What a file that is no checkpoint does not say is not worth asking for.
            load_state(self.path)
        if facts["arch"] is None:
            raise GridError(f"{what}: it does not say which network it is; name it with arch: (wrn-28-10, …)")
        if facts["mean"] is None:
            raise GridError(
                f"{what}: it does not say how images are normalised; give mean: and std:, or mean: [0, 0, 0] and "
                "std: [1, 1, 1] for a network on plain pixels"
            )
        return {name: list(value) if isinstance(value, tuple) else value for name, value in facts.items()}


#: Names of the usual repositories, and ours.
_NAMES: tuple[tuple[str, str], ...] = (
    (r"\bdownsample\.", "shortcut."),
    (r"\bconvShortcut\.", "shortcut."),
    (r"^linear\.", "fc."),
    (r"^classifier\.(?=weight|bias)", "fc."),
)


def like_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state with the names that `cifar_nets` has.

    The convolutions of published VGGs have biases. Batch normalisation follows them, so that each is the same as a
    running mean that is smaller by it.
    """
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        name = re.sub(r"^(module|model|net)\.", "", name)
        if name.startswith("sub_block1."):  # TRADES keeps a block here that its forward pass leaves out
            continue
        name = re.sub(r"^(?:block|layer)(\d)\.(?:layer\.)?", lambda m: f"stages.{int(m[1]) - 1}.", name)
        for published, ours in _NAMES:
            name = re.sub(published, ours, name)
        renamed[name] = value
    for name in [n for n in renamed if re.fullmatch(r"features\.\d+\.bias", n)]:
        index = int(name.split(".")[1])
        mean = f"features.{index + 1}.running_mean"
        if renamed[name.replace("bias", "weight")].ndim == 4 and mean in renamed:
            renamed[mean] = renamed[mean] - renamed.pop(name)
    return renamed
