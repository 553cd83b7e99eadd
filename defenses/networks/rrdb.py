"""The purifiers of NRP (Naseer et al., CVPR 2020): residual-in-residual dense blocks, and plain residual blocks.

Parameter names are those of the published `NRP.pth` and `NRP_resG.pth`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _DenseBlock(nn.Module):
    """Four convolutions that each see everything before them, and a fifth back to `width` channels."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        for i in range(1, 6):
            outputs = growth if i < 5 else width
            self.add_module(f"conv{i}", nn.Conv2d(width + (i - 1) * growth, outputs, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for i in range(1, 5):
            seen.append(F.leaky_relu(self.get_submodule(f"conv{i}")(torch.cat(seen, 1)), 0.2))
        out: Tensor = x + 0.2 * self.get_submodule("conv5")(torch.cat(seen, 1))
        return out


class _RRDB(nn.Module):
    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.RDB1 = _DenseBlock(width, growth)
        self.RDB2 = _DenseBlock(width, growth)
        self.RDB3 = _DenseBlock(width, growth)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + 0.2 * self.RDB3(self.RDB2(self.RDB1(x)))
        return out


class RRDBPurifier(nn.Module):
    """NRP: convolution, RRDB blocks, convolution; no normalisation and no residual over the whole.

    The published size (64, 23, 32) has 16,550,275 parameters; the README says about 14 million.

    Args:
        width: channels (nf).
        blocks: RRDB blocks (nb).
        growth: channels each dense convolution adds (gc).
    """

    def __init__(self, width: int = 64, blocks: int = 23, growth: int = 32) -> None:
        super().__init__()
        self.conv_first = nn.Conv2d(3, width, 3, padding=1)
        self.RRDB_trunk = nn.Sequential(*(_RRDB(width, growth) for _ in range(blocks)))
        self.trunk_conv = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0,1] to the same, not clamped."""
        out: Tensor = self.trunk_conv(self.RRDB_trunk(self.conv_first(images)))
        return out


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        for conv in (self.conv1, self.conv2):
            # A tenth of the usual scale: without normalisation deep stacks start close to the identity.
            nn.init.kaiming_normal_(conv.weight)
            conv.weight.data.mul_(0.1)
            conv.bias.data.zero_()  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv2(F.relu(self.conv1(x)))
        return out


class ResG(nn.Module):
    """NRP_resG: convolution with leaky ReLU 0.1, residual blocks, convolution; 1,702,211 parameters as published.

    Args:
        width: channels (nf).
        blocks: residual blocks (nb).
    """

    def __init__(self, width: int = 64, blocks: int = 23) -> None:
        super().__init__()
        self.conv_first = nn.Conv2d(3, width, 3, padding=1)
        self.recon_trunk = nn.Sequential(*(_Residual(width) for _ in range(blocks)))
        self.conv_last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0,1] to the same, not clamped."""
        out: Tensor = self.conv_last(self.recon_trunk(F.leaky_relu(self.conv_first(images), 0.1)))
        return out
