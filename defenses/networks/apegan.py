"""Generator and discriminator of APE-GAN (Shen et al. 2017): the official code's, and those of its PyTorch port."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from defenses.networks.padding import padded
from defenses.networks.pix2pixhd import init_gan

Variant = Literal["official", "port"]


class APEGenerator(nn.Module):
    """Two convolutions of stride 2 and two transposed ones, batch norm, tanh; no residual.

    `official`: 5x5 kernels, leaky ReLU 0.2 in the encoder, ReLU in the decoder. `port`: 4x4 kernels and leaky ReLU
    0.01 everywhere. Sizes not divisible by 4 are padded and cropped back.

    Args:
        variant: official or port.
        width: channels of the first convolution.
    """

    def __init__(self, variant: Variant = "official", width: int = 64) -> None:
        super().__init__()
        official = variant == "official"
        kernel, padding, extra = (5, 2, 1) if official else (4, 1, 0)
        slope = 0.2 if official else 0.01
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, kernel, 2, padding), nn.BatchNorm2d(width), nn.LeakyReLU(slope, inplace=True),
            nn.Conv2d(width, 2 * width, kernel, 2, padding), nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(slope, inplace=True),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(2 * width, width, kernel, 2, padding, output_padding=extra), nn.BatchNorm2d(width),
            nn.ReLU(inplace=True) if official else nn.LeakyReLU(slope, inplace=True),
            nn.ConvTranspose2d(width, 3, kernel, 2, padding, output_padding=extra), nn.Tanh(),
        )  # fmt: skip
        if official:
            init_gan(self)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to the same, in [-1,1]."""
        return padded(lambda x: self.decoder(self.encoder(x)), images, 4)


class APEDiscriminator(nn.Module):
    """Three convolutions of stride 2 (batch norm on all but the first), then one logit.

    Args:
        variant: `official` (5x5, padded, leaky ReLU 0.2) or `port` (3x3, not padded, leaky ReLU 0.01).
        width: channels of the first convolution.
        size: (H, W) of the images.
    """

    def __init__(
        self, variant: Variant = "official", width: int = 64, size: tuple[int, int] = (32, 32)
    ) -> None:
        super().__init__()
        kernel, padding, slope = (5, 2, 0.2) if variant == "official" else (3, 0, 0.01)
        layers: list[nn.Module] = []
        channels, (height, breadth) = 3, size
        for i, outputs in enumerate((width, 2 * width, 4 * width)):
            layers.append(nn.Conv2d(channels, outputs, kernel, 2, padding))
            if i:
                layers.append(nn.BatchNorm2d(outputs))
            layers.append(nn.LeakyReLU(slope, inplace=True))
            channels = outputs
            height, breadth = ((side + 2 * padding - kernel) // 2 + 1 for side in (height, breadth))
        if min(height, breadth) < 1:
            raise ValueError(f"images of {size[0]}x{size[1]} pixels are too small for this discriminator")
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * breadth, 1))
        if variant == "official":
            init_gan(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 1); the probability that an image is clean is their sigmoid."""
        logits: Tensor = self.body(images)
        return logits
