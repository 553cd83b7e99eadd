"""EDSR (Lim et al., CVPRW 2017): super-resolution with residual blocks that normalise nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

DIV2K_MEAN = (0.4488, 0.4371, 0.4040)


class ResidualBlock(nn.Module):
    """Two convolutions around a ReLU, times `res_scale`, added to their input; no normalisation."""

    def __init__(self, width: int, res_scale: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        )
        self.res_scale = res_scale

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) to the same."""
        out: Tensor = x + self.res_scale * self.body(x)
        return out


class EDSR(nn.Module):
    """Enhanced deep residual network for twofold super-resolution, [0,1] to about [0,1].

    Parameter names are those of EDSR-PyTorch, without its fixed shifts by the mean colour (`sub_mean`, `add_mean`).
    """

    mean: Tensor

    def __init__(self, width: int = 64, blocks: int = 16, res_scale: float = 1.0) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, width, 3, padding=1))
        body: list[nn.Module] = [ResidualBlock(width, res_scale) for _ in range(blocks)]
        self.body = nn.Sequential(*body, nn.Conv2d(width, width, 3, padding=1))
        enlarge = nn.Sequential(nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2))
        self.tail = nn.Sequential(enlarge, nn.Conv2d(width, 3, 3, padding=1))
        self.register_buffer("mean", torch.tensor(DIV2K_MEAN).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, 3, 2 H, 2 W)."""
        x = self.head((images - self.mean) * 255)
        out: Tensor = self.tail(self.body(x) + x) / 255 + self.mean
        return out
