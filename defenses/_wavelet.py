"""BayesShrink wavelet denoising in YCbCr, batched and differentiable."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

SigmaUnits = Literal["image", "channel"]

# ITU-R BT.601 for RGB in [0,1]: Y in 16..235, Cb and Cr in 16..240.
YCC = ((65.481, 128.553, 24.966), (-37.797, -74.203, 112.0), (112.0, -93.786, -18.214))
SHIFT = (16.0, 128.0, 128.0)


def denoise(images: Tensor, sigma: float, units: SigmaUnits) -> Tensor:
    """Soft BayesShrink of Haar coefficients (Chang, Yu, Vetterli 2000), each YCbCr channel scaled to [0,1].

    Equals `skimage.restoration.denoise_wavelet(image, sigma, convert2ycbcr=True, rescale_sigma=True,
    channel_axis=-1)` with its defaults (Haar, soft thresholds, all but the three coarsest levels), computed in
    float64.

    Args:
        images: (B, 3, H, W) in [0,1].
        sigma: standard deviation of the noise.
        units: `image`: sigma is in [0,1] pixel units and is scaled with each channel, as scikit-image does since
            0.16. `channel`: sigma applies to each YCbCr channel after it was scaled to [0,1], as scikit-image did
            before, when the papers used it; smooths channels of narrow range less.
    """
    forward = torch.tensor(YCC, dtype=torch.float64)
    ycc = _mix(images.double(), forward) + _column(SHIFT, images)
    low, high = ycc.amin((2, 3), keepdim=True), ycc.amax((2, 3), keepdim=True)
    flat = high - low < 1e-6  # constant, but for rounding: the chroma of a grey image
    scale = torch.where(flat, torch.ones_like(low), high - low)
    deviation = torch.full_like(scale, sigma)
    if units == "image":
        deviation = sigma * _column(forward.square().sum(1).sqrt().tolist(), images) / scale
    smooth = _shrink((ycc - low) / scale, deviation**2) * scale + low
    # A constant channel has no coefficients to shrink.
    smooth = torch.where(flat, ycc, smooth)
    back = torch.linalg.inv(forward)
    return _mix(smooth - _column(SHIFT, images), back).to(images.dtype)


def _shrink(planes: Tensor, variance: Tensor) -> Tensor:
    """Denoise (B, C, H, W) of noise `variance` (B, C, 1, 1)."""
    levels = max(int(math.log2(max(min(planes.shape[-2:]), 1))) - 3, 1)
    low, details, sizes = planes, [], []
    for _ in range(levels):
        sizes.append(low.shape[-2:])
        low, *rest = _haar(low)
        details.append([_soft(detail, variance) for detail in rest])
    for size, rest in zip(reversed(sizes), reversed(details), strict=True):
        low = _unhaar(low, *rest)[..., : size[0], : size[1]]
    return low


def _soft(detail: Tensor, variance: Tensor) -> Tensor:
    """Soft threshold at variance / standard deviation of the signal, which is estimated per image and channel."""
    power = detail.square().flatten(2).mean(-1)[..., None, None]
    # scikit-image's floor for bands that look like pure noise, in the precision it is given (float32).
    threshold = variance / (power - variance).clamp(min=torch.finfo(torch.float32).eps).sqrt()
    return detail.sign() * (detail.abs() - threshold).clamp(min=0)


def _haar(planes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One level of the orthonormal transform; odd sizes repeat the last row or column."""
    planes = F.pad(planes, (0, planes.shape[-1] % 2, 0, planes.shape[-2] % 2), mode="replicate")
    a, b = planes[..., ::2, ::2], planes[..., ::2, 1::2]
    c, d = planes[..., 1::2, ::2], planes[..., 1::2, 1::2]
    return (a + b + c + d) / 2, (a - b + c - d) / 2, (a + b - c - d) / 2, (a - b - c + d) / 2


def _unhaar(low: Tensor, across: Tensor, down: Tensor, diagonal: Tensor) -> Tensor:
    top = torch.stack([low + across + down + diagonal, low - across + down - diagonal], -1).flatten(-2)
    bottom = torch.stack([low + across - down - diagonal, low - across - down + diagonal], -1).flatten(-2)
    return torch.stack([top, bottom], -2).flatten(-3, -2) / 2


def _mix(images: Tensor, matrix: Tensor) -> Tensor:
    """Channels multiplied by a 3x3 matrix, term by term: the same bits for any batch size."""
    red, green, blue = images.unbind(1)
    return torch.stack([m[0] * red + m[1] * green + m[2] * blue for m in matrix.tolist()], 1)


def _column(values: tuple[float, ...] | list[float], images: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=images.device).view(1, 3, 1, 1)
