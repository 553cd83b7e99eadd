"""JPEG: the real codec, a differentiable copy of it, and the blockwise DCT both sides of it are made of."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

Subsampling = Literal["4:4:4", "4:2:2", "4:2:0"]
Rounding = Callable[[Tensor], Tensor]

# ITU-T T.81, Annex K, tables K.1 and K.2.
LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8 for _ in range(4)),
)
# JFIF (ITU-T T.871): YCbCr = FORWARD @ RGB + (0, 128, 128), all in 0..255.
FORWARD = ((0.299, 0.587, 0.114), (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411))
BACKWARD = ((1.0, 0.0, 1.402), (1.0, -0.344136286, -0.714136286), (1.0, 1.772, 0.0))


def codec(images: Tensor, quality: int, subsampling: Subsampling, to_int: Rounding) -> Tensor:
    """Images (B, 3, H, W) in [0,1], made 8-bit by `to_int`, through libjpeg-turbo: multiples of 1/255, no gradient."""
    pixels = to_int(images.detach().clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    decoded = np.stack([_codec(image, quality, subsampling) for image in pixels])
    out = torch.from_numpy(decoded).to(images.device).permute(0, 3, 1, 2).to(images.dtype) / 255
    return out.contiguous()


def differentiable_jpeg(levels: Tensor, quality: int, subsampling: Subsampling, quantise: Rounding) -> Tensor:
    """JPEG on grey levels 0..255, (B, 3, H, W), with `quantise` in place of the rounding of DCT coefficients.

    With `quantise` = `hard_round` it reproduces libjpeg-turbo up to the rounding inside its integer DCT: about 0.1 grey
    levels on average, more in the few blocks where a coefficient at a tie falls to the other side.
    """
    height, width = levels.shape[-2:]
    ycc = straight_through(rgb_to_ycc(levels), torch.round)
    step_y, step_x = {"4:4:4": (1, 1), "4:2:2": (1, 2), "4:2:0": (2, 2)}[subsampling]
    luma = _component(ycc[:, :1], table(LUMA, quality), quantise)
    small = _downsample(ycc[:, 1:], step_y, step_x)
    small = _component(small, table(CHROMA, quality), quantise)
    small = small[..., : math.ceil(height / step_y), : math.ceil(width / step_x)]
    chroma = _upsample(small, step_y, step_x)[..., :height, :width]
    return straight_through(ycc_to_rgb(torch.cat([luma, chroma], 1)), lambda x: x.round().clamp(0, 255))


def rgb_to_ycc(levels: Tensor) -> Tensor:
    """YCbCr of RGB grey levels (B, 3, H, W), both in 0..255; not rounded."""
    shift = levels.new_tensor((0.0, 128.0, 128.0)).view(3, 1, 1)
    return torch.einsum("ck,bkhw->bchw", levels.new_tensor(FORWARD), levels) + shift


def ycc_to_rgb(levels: Tensor) -> Tensor:
    """RGB of YCbCr grey levels (B, 3, H, W), neither rounded nor clamped."""
    shift = levels.new_tensor((0.0, 128.0, 128.0)).view(3, 1, 1)
    return torch.einsum("ck,bkhw->bchw", levels.new_tensor(BACKWARD), levels - shift)


def table(base: tuple[tuple[int, ...], ...], quality: int) -> list[list[float]]:
    """A standard quantisation table scaled by quality as libjpeg scales it."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return [[float(min(max((entry * scale + 50) // 100, 1), 255)) for entry in row] for row in base]


def _codec(pixels: np.ndarray, quality: int, subsampling: Subsampling) -> np.ndarray:
    """One uint8 image (H, W, 3) through the codec."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality, subsampling=subsampling)
    with Image.open(stream) as image:
        return np.asarray(image)


def straight_through(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """The value of `function`, the gradient of the identity."""
    return function(x.detach()) + (x - x.detach())


def hard_round(x: Tensor) -> Tensor:
    """Round to nearest, ties away from zero, as libjpeg quantises."""
    return x.sign() * (x.abs() + 0.5).floor()


def straight_round(x: Tensor) -> Tensor:
    """Round to nearest with derivative 1."""
    return straight_through(x, hard_round)


def cubic_round(x: Tensor) -> Tensor:
    """round(x) + (x - round(x))^3, with derivative 3 (x - round(x))^2 (Shin and Song 2017)."""
    nearest = hard_round(x.detach())
    return nearest + (x - nearest) ** 3


@lru_cache
def _dct_matrix() -> Tensor:
    """The orthonormal 8x8 DCT-II of a flattened block, (64, 64)."""
    k, n = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    basis = torch.cos((2 * n + 1) * k * math.pi / 16) / 2
    basis[0] /= math.sqrt(2)
    return torch.kron(basis, basis)


def blockwise(plane: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `function` to the DCT coefficients (N, 64) of each 8x8 block of (B, C, H, W), and transform back.

    Other sizes are filled up with copies of the last row and column, as JPEG does, and cut back.
    """
    batch, channels, height, width = plane.shape
    padded = F.pad(plane, (0, -width % 8, 0, -height % 8), mode="replicate")
    rows, columns = padded.shape[-2] // 8, padded.shape[-1] // 8
    blocks = padded.reshape(batch, channels, rows, 8, columns, 8).transpose(3, 4).reshape(-1, 64)
    dct = _dct_matrix().to(plane)
    blocks = function(blocks @ dct.T) @ dct
    out = blocks.reshape(batch, channels, rows, columns, 8, 8).transpose(3, 4).reshape(padded.shape)
    return out[..., :height, :width]


def _component(plane: Tensor, divisors: list[list[float]], quantise: Rounding) -> Tensor:
    """One colour component of JPEG, in grey levels."""
    steps = plane.new_tensor(divisors).reshape(64)

    def squeeze(coefficients: Tensor) -> Tensor:
        # libjpeg's DCT keeps three fractional bits, which decides many ties in the quantisation.
        return quantise(straight_through(coefficients, lambda x: (x * 8).round() / 8) / steps) * steps

    return straight_through(blockwise(plane - 128, squeeze) + 128, lambda x: x.round().clamp(0, 255))


def _downsample(plane: Tensor, step_y: int, step_x: int) -> Tensor:
    """Mean over step_y x step_x pixels, rounded down and up in alternating columns as libjpeg does."""
    if step_x == 1:
        return plane
    # libjpeg extends rows of pixels to the right up to a whole chroma block, but repeats the last *averaged* row
    # downwards; the latter is left to blockwise.
    height, width = plane.shape[-2:]
    wide = F.pad(plane, (0, -width % (8 * step_x), 0, -height % step_y), mode="replicate")
    mean = F.avg_pool2d(wide, (step_y, step_x))
    count = step_y * step_x
    bias = mean.new_tensor((0.0, 1.0) if count == 2 else (1.0, 2.0)).repeat(mean.shape[-1] // 2)
    return straight_through(mean, lambda x: ((x * count).round() + bias).div(count).floor())


def _upsample(plane: Tensor, step_y: int, step_x: int) -> Tensor:
    """Chroma back to full size with libjpeg's triangle filter ("fancy upsampling")."""
    if step_x == 1:
        return plane
    if plane.shape[-1] <= 2:  # too narrow for the filter: libjpeg repeats pixels
        return plane.repeat_interleave(step_y, -2).repeat_interleave(step_x, -1)
    around = F.pad(plane, (1, 1, 1, 1), mode="replicate")
    if step_y == 2:
        near = 3 * around[..., 1:-1, :]
        around = torch.stack([near + around[..., :-2, :], near + around[..., 2:, :]], -2).flatten(-3, -2)
    else:
        around = around[..., 1:-1, :]
    near = 3 * around[..., 1:-1]
    total = torch.stack([near + around[..., :-2], near + around[..., 2:]], -1).flatten(-2)
    divisor, bias = (16, (8.0, 7.0)) if step_y == 2 else (4, (1.0, 2.0))
    offset = plane.new_tensor(bias).repeat(plane.shape[-1])
    return straight_through(total / divisor, lambda x: (x * divisor + offset).div(divisor).floor())
