"""Median filter, equal to SciPy's, on the device of the images."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bench.protocols import Defense
from bench.registry import DEFENSES


@DEFENSES.register_module(name="median_filter")
class MedianFilter(Defense):
    """Replaces every value by the median of the size x size window around it, each channel by itself.

    Source: Xu, Evans, Qi, NDSS 2018 (feature squeezing; windows 2 and 3), window 3 in NRP's table 2. Same values as
    `scipy.ndimage.median_filter(size=size, mode="reflect")`: the border is mirrored with the edge repeated, an even
    window reaches one pixel further up and left, and of an even number of values the upper middle is taken.

    Differentiable almost everywhere: the gradient goes to the selected pixel; among equal ones to the first in
    reading order. The surrogate is the filter itself.

    Limitations: broken by gradients through the selection and by BPDA (Athalye et al. 2018; He et al. 2017 for
    feature squeezing).

    Args:
        size: side of the window in pixels.

    Raises:
        ValueError: size is below 1.
    """

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """Filtered images, same shape."""
        rows = _mirrored(images.shape[-2], self.size, images.device)
        columns = _mirrored(images.shape[-1], self.size, images.device)
        padded = images.index_select(2, rows).index_select(3, columns)
        out: Tensor = _Select.apply(padded, self.size)  # type: ignore[no-untyped-call]  # torch does not annotate it
        return out

    surrogate = forward


class _Select(torch.autograd.Function):
    """The middle value of each window of (B, C, H + k - 1, W + k - 1), and the gradient to where it came from."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, size: int) -> Tensor:
        values: list[Tensor] = _windows(padded, size)
        # A sorting network works on whole tensors; sorting each window is some twenty times slower.
        for low, high, keep_low, keep_high in _comparators(size * size):
            a, b = values[low], values[high]
            if keep_low:
                values[low] = torch.minimum(a, b)
            if keep_high:
                values[high] = torch.maximum(a, b)
        middle = values[size * size // 2]
        middle = middle.clone() if size == 1 else middle
        ctx.save_for_backward(padded, middle)
        ctx.size = size
        return middle

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        padded, middle = ctx.saved_tensors
        out = torch.zeros_like(padded)
        left = grad
        for source, target in zip(_windows(padded, ctx.size), _windows(out, ctx.size), strict=True):
            hit = source == middle
            target += left * hit
            left = left * ~hit
        return out, None


def _windows(padded: Tensor, size: int) -> list[Tensor]:
    """Views of `padded` shifted by every position of the window, in reading order."""
    height, width = padded.shape[-2] - size + 1, padded.shape[-1] - size + 1
    return [padded[..., y : y + height, x : x + width] for y in range(size) for x in range(size)]


def _mirrored(length: int, size: int, device: torch.device) -> Tensor:
    """Source index of each padded position: ... 1 0 | 0 1 ... n-1 | n-1 n-2 ..., however far it reaches."""
    position = torch.arange(-(size // 2), length + (size - 1) // 2, device=device) % (2 * length)
    return torch.minimum(position, 2 * length - 1 - position)


@lru_cache
def _comparators(count: int) -> tuple[tuple[int, int, bool, bool], ...]:
    """What the value of rank count // 2 depends on: (low, high, is the smaller needed, is the larger needed).

    Batcher's merge exchange (Knuth, TAOCP 3, 5.2.2, algorithm M) without the comparisons that only order the rest.
    """
    pairs: list[tuple[int, int]] = []
    top = 1 << max((count - 1).bit_length() - 1, 0)
    p = top
    while p > 0:
        q, r, d = top, 0, p
        while True:
            pairs.extend((i, i + d) for i in range(count - d) if i & p == r)
            if q == p:
                break
            q, r, d = q // 2, p, q - p
        p //= 2
    needed = {count // 2}
    kept: list[tuple[int, int, bool, bool]] = []
    for low, high in reversed(pairs):
        if low in needed or high in needed:
            kept.append((low, high, low in needed, high in needed))
            needed |= {low, high}
    return tuple(reversed(kept))
