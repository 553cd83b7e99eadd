"""VGG-like discriminators of NRP and CAFD: pairs of a 3x3 convolution and a 4x4 one with stride 2, then two layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class VGGDiscriminator(nn.Module):
    """One block per entry of `channels`, each halving the size, then 100 hidden units and a logit.

    Convolutions have no bias and batch norm, but for the first, which has a bias and no norm; leaky ReLU 0.2.

    Args:
        channels: outputs of each block.
        size: (H, W) of the images, at least 2^blocks.

    Raises:
        ValueError: the images are too small.
    """

    def __init__(self, channels: Sequence[int], size: tuple[int, int]) -> None:
        super().__init__()
        height, width = (side // 2 ** len(channels) for side in size)
        if min(height, width) < 1:
            raise ValueError(f"images of {size[0]}x{size[1]} pixels are too small for {len(channels)} blocks")
        layers: list[nn.Module] = []
        inputs = 3
        for i, outputs in enumerate(channels):
            layers.append(nn.Conv2d(inputs, outputs, 3, 1, 1, bias=i == 0))
            if i:
                layers.append(nn.BatchNorm2d(outputs))
            layers += [nn.LeakyReLU(0.2, inplace=True), nn.Conv2d(outputs, outputs, 4, 2, 1, bias=False)]
            layers += [nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2, inplace=True)]
            inputs = outputs
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Sequential(
            nn.Linear(inputs * height * width, 100), nn.LeakyReLU(0.2, inplace=True), nn.Linear(100, 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 1): larger means more like a clean image."""
        logits: Tensor = self.head(self.body(images))
        return logits


class CAFDDiscriminator(VGGDiscriminator):
    """Eight convolutions in four blocks, as in CAFD's code (the paper says three blocks); for 32x32 there.

    Args:
        width: channels of the first block.
        size: (H, W) of the images.
    """

    def __init__(self, width: int = 32, size: tuple[int, int] = (32, 32)) -> None:
        super().__init__([width, 2 * width, 4 * width, 4 * width], size)


class NRPDiscriminator(VGGDiscriminator):
    """Five blocks, then fully connected layers, as NRP's paper says; it is not published.

    What the paper leaves open (kernels, 100 hidden units, no norm on the first convolution) follows the discriminator
    of ESRGAN, on whose code NRP builds. 14,499,401 parameters at the paper's crops of 128x128.

    Args:
        width: channels of the first block.
        size: (H, W) of the images.
    """

    def __init__(self, width: int = 64, size: tuple[int, int] = (128, 128)) -> None:
        super().__init__([width, 2 * width, 4 * width, 8 * width, 8 * width], size)
