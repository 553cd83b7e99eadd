"""DUNET and DAE of HGD (Liao et al., CVPR 2018, section 3.1), also the network of CAFD, and a plain U-Net for NRP."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Block(nn.Sequential):
    """`count` times 3x3 convolution, batch norm, ReLU; the first convolution has the stride."""

    def __init__(
        self, inputs: int, outputs: int, count: int, stride: int, bias: bool, momentum: float
    ) -> None:
        layers: list[nn.Module] = []
        for i in range(count):
            channels, step = (inputs, stride) if i == 0 else (outputs, 1)
            layers += [
                nn.Conv2d(channels, outputs, 3, step, 1, bias=bias),
                nn.BatchNorm2d(outputs, momentum=momentum),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers)


class DUNET(nn.Module):
    """Denoising U-Net: predicts minus the noise, x + D(x).

    Encoder of 2, 3, 3, 3, 3 convolutions (the first of each three with stride 2), decoder of 3, 3, 3, 2; feature maps
    are enlarged bilinearly to the size of the lateral they are joined with, so any image size works. At the paper's
    width of 64 it has 11,033,984 parameters; CAFD's variant (convolutions with bias, batch norm momentum 0.9) has
    11,038,851.

    Args:
        width: channels of the first stage; the stages have 1, 2, 4, 4, 4 times as many.
        bias: convolutions have a bias (CAFD's code) or not (HGD's code).
        bn_momentum: share of the newest batch in the running statistics; 0.9 in CAFD's code.
        laterals: join encoder maps to the decoder; without, it is the DAE.
        residual: add the input to the output.
    """

    def __init__(
        self,
        width: int = 64,
        bias: bool = False,
        bn_momentum: float = 0.1,
        laterals: bool = True,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.laterals, self.residual = laterals, residual
        stages = [width, 2 * width, 4 * width, 4 * width, 4 * width]
        decoded = [4 * width, 4 * width, 2 * width, width]
        self.encoder = nn.ModuleList()
        inputs = 3
        for i, outputs in enumerate(stages):
            self.encoder.append(_Block(inputs, outputs, 3 if i else 2, 2 if i else 1, bias, bn_momentum))
            inputs = outputs
        self.decoder = nn.ModuleList()
        for outputs, lateral, count in zip(decoded, stages[-2::-1], (3, 3, 3, 2), strict=True):
            joined = inputs + lateral if laterals else inputs
            self.decoder.append(_Block(joined, outputs, count, 1, bias, bn_momentum))
            inputs = outputs
        self.last = nn.Conv2d(width, 3, 1, bias=bias)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to the same, not clamped."""
        maps = []
        x = images
        for block in self.encoder:
            x = block(x)
            maps.append(x)
        for block, lateral in zip(self.decoder, maps[-2::-1], strict=True):
            x = F.interpolate(x, size=lateral.shape[-2:], mode="bilinear", align_corners=False)
            x = block(torch.cat([x, lateral], 1) if self.laterals else x)
        x = self.last(x)
        out: Tensor = images + x if self.residual else x
        return out


class DAE(DUNET):
    """Denoising autoencoder: DUNET without laterals (HGD, section 3.1.1; its code is not published).

    The paper leaves open whether the input is added to the output; its clean error (0.036 against DUNET's 0.015)
    speaks for no, the default.
    """

    def __init__(
        self, width: int = 64, bias: bool = False, bn_momentum: float = 0.1, residual: bool = False
    ) -> None:
        super().__init__(width, bias, bn_momentum, laterals=False, residual=residual)


class UNet(nn.Module):
    """U-Net without normalisation, the third purifier of NRP's table 3 (layers not given there; these are a choice).

    Two 3x3 convolutions with leaky ReLU 0.2 per stage, 2x2 averages down, bilinear up, laterals, a last 3x3
    convolution and no residual over the whole, as in NRP's other purifiers.

    Args:
        width: channels of the first of `depth` stages; each next has twice as many.
        depth: number of stages.
    """

    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        stages = [width * 2**i for i in range(depth)]
        self.encoder = nn.ModuleList(self._pair(a, b) for a, b in zip([3, *stages[:-1]], stages, strict=True))
        self.decoder = nn.ModuleList(
            self._pair(a + b, b) for a, b in zip(stages[:0:-1], stages[-2::-1], strict=True)
        )
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    @staticmethod
    def _pair(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1), nn.LeakyReLU(0.2, inplace=True),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to the same, not clamped."""
        maps: list[Tensor] = []
        x = images
        for i, block in enumerate(self.encoder):
            x = block(F.avg_pool2d(x, 2, ceil_mode=True) if i else x)
            maps.append(x)
        for block, lateral in zip(self.decoder, maps[-2::-1], strict=True):
            x = F.interpolate(x, size=lateral.shape[-2:], mode="bilinear", align_corners=False)
            x = block(torch.cat([x, lateral], 1))
        out: Tensor = self.last(x)
        return out
