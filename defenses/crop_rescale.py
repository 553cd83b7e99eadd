"""Crop and enlarge."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.protocols import Defense, Geometry, Warped
from bench.registry import DEFENSES
from bench.rng import ImageRNG


@DEFENSES.register_module(name="crop_rescale")
class CropRescale(Defense):
    """Cuts a window out of each image and enlarges it to the original size, bilinearly.

    Source: Guo, Rana, Cisse, van der Maaten, ICLR 2018: windows of 90 pixels from 224. There the classifier sees 30
    random windows, its probabilities are averaged, and it was trained on such windows. A purifier returns one image:
    this is one window per draw, in front of a network trained on whole images, and therefore weaker. Averaging over
    draws happens where the harness repeats stochastic defenses.

    What differs further: the code resizes 8-bit images with PIL (which is also bilinear when enlarging); here floats
    are interpolated (`torch.nn.functional.interpolate`, align_corners=False).

    Differentiable: the gradient of each draw is exact; the surrogate is the defense itself. Returns `Warped` of the
    same size; objects may lie partly or wholly outside.

    Limitations: broken by EOT (Athalye, Carlini, Wagner 2018).

    Args:
        fraction: side of the window over side of the image, in (0, 1]; rounded down to whole pixels, at least 1.
        position: `random` or `center`, which makes the defense deterministic.

    Raises:
        ValueError: fraction is outside (0, 1].
    """

    def __init__(self, fraction: float = 90 / 224, position: Literal["random", "center"] = "random") -> None:
        super().__init__()
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {fraction}")
        self.fraction = fraction
        self.stochastic = position == "random"

    def forward(self, images: Tensor, rng: ImageRNG | None = None) -> Warped:
        """Enlarged windows (B, 3, H, W), and which window each is."""
        batch, channels, height, width = images.shape
        # A fraction written as a decimal must not lose a pixel to its last digit.
        window = [max(1, int(side * self.fraction + 1e-6)) for side in (height, width)]
        room = torch.tensor([height - window[0], width - window[1]])
        if self.stochastic:
            assert rng is not None
            offset = (rng.uniform((2,)).double() * (room + 1)).long()
        else:
            offset = (room // 2).expand(batch, 2)
        rows = (offset[:, :1] + torch.arange(window[0])).to(images.device)
        columns = (offset[:, 1:] + torch.arange(window[1])).to(images.device)
        cut = images.gather(2, rows[:, None, :, None].expand(batch, channels, window[0], width))
        cut = cut.gather(3, columns[:, None, None, :].expand(batch, channels, *window))
        scale = torch.tensor([height / window[0], width / window[1]]).expand(batch, 2)
        geometry = Geometry(scale.clone(), -offset * scale, (height, width), (height, width))
        return Warped(
            F.interpolate(cut, size=(height, width), mode="bilinear", align_corners=False), geometry
        )

    surrogate = forward
