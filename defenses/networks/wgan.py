"""Generator and critic of Defense-GAN (Samangouei et al., ICLR 2018): convolutions of WGAN-GP's code, no batch norm."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class WGANGenerator(nn.Module):
    """Latent vectors to images: a linear layer, then transposed 5x5 convolutions of stride 2 with ReLU, tanh.

    The first maps are about 4x4 with 4 `width` channels; each stage doubles the side and halves the channels down to
    `width`. At 28 and 32 pixels this is the paper's MNIST generator (with three colours), at 64 its CelebA generator,
    of which the code leaves out one ReLU between the last two convolutions. A size that is no multiple of the stages'
    stride is cropped from a larger image.

    Args:
        size: (H, W) of the images, 8 or more.
        width: channels of the last but one layer (net_dim).
        latent: length of the latent vectors (latent_dim).
    """

    def __init__(self, size: Sequence[int] = (64, 64), width: int = 64, latent: int = 128) -> None:
        super().__init__()
        if len(size) != 2 or min(size) < 8:
            raise ValueError(f"size must be (height, width), 8 or more each, got {tuple(size)}")
        self.size, self.latent = (int(size[0]), int(size[1])), latent
        stages = round(math.log2(min(self.size) / 4))
        self.first = (4 * width, *(-(-side // 2**stages) for side in self.size))
        self.input = nn.Linear(latent, math.prod(self.first))
        channels = [max(width, 4 * width >> i) for i in range(stages)]
        self.stages = nn.ModuleList(
            nn.ConvTranspose2d(a, b, 5, 2, 2, output_padding=1)
            for a, b in zip(channels, [*channels[1:], 3], strict=True)
        )
        init_wgan(self)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, latent) to (B, 3, H, W) in [-1,1]."""
        x = self.input(latents).unflatten(1, self.first)
        for stage in self.stages:
            x = stage(F.relu(x))
        out: Tensor = x[..., : self.size[0], : self.size[1]].tanh()
        return out


class WGANCritic(nn.Module):
    """5x5 convolutions of stride 2 with leaky ReLU 0.2 (`width`, 2 and 4 times as many channels), one linear layer.

    Without batch norm, which would make the gradient penalty of one image depend on the others.

    Args:
        width: channels of the first convolution.
        size: (H, W) of the images.
    """

    def __init__(self, width: int = 64, size: Sequence[int] = (64, 64)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, (height, breadth) = 3, size
        for outputs in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(channels, outputs, 5, 2, 2), nn.LeakyReLU(0.2)]
            channels, height, breadth = outputs, -(-height // 2), -(-breadth // 2)
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * breadth, 1))
        init_wgan(self)

    def forward(self, images: Tensor) -> Tensor:
        """Scores (B, 1), larger for real images, of any range."""
        scores: Tensor = self.body(images)
        return scores


def scaled(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (B, 3, H, W) at another size (bilinear, smoothed where they become smaller); as they are where it fits."""
    if tuple(images.shape[-2:]) == size:
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)


def init_wgan(module: nn.Module) -> None:
    """Initial weights of WGAN-GP's code: uniform, He-scaled for convolutions, Glorot-scaled for linear layers."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
        elif isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            inputs, outputs = (
                float(channels * math.prod(layer.kernel_size))
                for channels in (layer.in_channels, layer.out_channels)
            )
            stride = math.prod(layer.stride)
            if isinstance(layer, nn.Conv2d):
                outputs /= stride
            else:
                inputs /= stride
            bound = math.sqrt(3 * 4 / (inputs + outputs))
            nn.init.uniform_(layer.weight, -bound, bound)
        else:
            continue
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
