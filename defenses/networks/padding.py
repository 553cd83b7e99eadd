"""Images whose size a network cannot take: padded at the bottom and right, and cropped back."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F


def padded(network: Callable[[Tensor], Tensor], images: Tensor, multiple: int, minimum: int = 1) -> Tensor:
    """`network(images)` at a size divisible by `multiple`, cropped to the size of `images`.

    The border is repeated (`replicate`), which works for any size, also below the padding.

    Args:
        network: keeps the size of its input.
        images: (B, C, H, W).
        multiple: what height and width must be divisible by.
        minimum: smallest height and width the network can take.
    """
    height, width = int(images.shape[-2]), int(images.shape[-1])
    down, right = (-(-max(size, minimum) // multiple) * multiple - size for size in (height, width))
    if down == right == 0:
        return network(images)
    out = network(F.pad(images, (0, right, 0, down), mode="replicate"))
    return out[..., :height, :width]
