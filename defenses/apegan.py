"""APE-GAN: adversarial perturbations eliminated by a generator."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from bench.registry import DEFENSES
from defenses._learned import Learned, Space


@DEFENSES.register_module(name="apegan")
class APEGAN(Learned):
    """A small GAN whose generator maps adversarial images to clean ones (APE-G in CAFD's tables).

    Source: Shen et al. 2017, their TensorFlow code (`official`: 5x5 kernels, range [-1,1]) and a PyTorch port (`port`:
    4x4 kernels); the checkpoint says which. The port feeds [0,1] images to a network that ends in tanh, without
    rescaling: `space: unit`. The authors insist on floats: no 8-bit rounding.

    The official inference normalises with the statistics of the test batch, so that results depend on the company of
    an image. Here `batch_norm: image` takes the statistics of each image alone, which is what the official code does
    for a batch of one; `running`, the default, those of the training.

    Limitations: no gradient is masked.

    Args:
        weights, recipe, trained_for, train_seed: the checkpoint; see `defenses._learned.Learned`.
        space: value range of the network; None = what the checkpoint says, else symmetric ([-1,1]).
        batch_norm: `running` or `image`.

    Raises:
        WeightsError: the checkpoint is missing, unreadable, of another network or of another value range.
    """

    networks = ("apegan",)
    kind = "apegan"
    default_space = "symmetric"

    def __init__(
        self,
        space: Space | None = None,
        batch_norm: Literal["running", "image"] = "running",
        **checkpoint: Any,
    ) -> None:
        super().__init__(**checkpoint)
        self.work_in(space)
        self.alone = batch_norm == "image"
        if self.network is not None and self.alone:
            for module in self.network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.track_running_stats = False
                    module.running_mean = module.running_var = None

    def group(self, device: torch.device) -> int:
        """One image at a time where its own statistics count."""
        return 1 if self.alone else super().group(device)

    def forward(self, images: Tensor) -> Tensor:
        """Purified images, (B, 3, H, W); any size."""
        return super().forward(images)
