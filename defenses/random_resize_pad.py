"""Random resizing and padding."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bench.protocols import Defense, Geometry, Warped
from bench.registry import DEFENSES
from bench.rng import ImageRNG

# Sizes of Xie et al. for 299 pixels; other images get the same proportions.
BASE, LOW, OUT = 299, 310, 331


@DEFENSES.register_module(name="random_resize_pad")
class RandomResizePad(Defense):
    """Enlarges each image to a random size and pads it with grey to a fixed one ("R&P").

    Source: Xie, Wang, Zhang, Ren, Yuille, ICLR 2018, and their NIPS 2017 competition code. A 299-pixel image becomes r
    pixels by nearest-neighbour resizing and lies at a random place in 331 pixels of value 0.5 (0 in the [-1,1] range
    of their models). Other sizes keep the proportions: n pixels become r in {n * low // 299, ..., out - 1} in
    out = ceil(331 n / 299), for example 33..35 in 36 for n = 32. r is drawn for the longer side; the shorter keeps
    the aspect ratio.

    - `code`: low = 310; the last row and column of the canvas are always padding, since the code's random integers
      exclude their upper bound.
    - `paper`: low = 299 and every place that fits (12,528 patterns at 299 pixels).

    Every image has its own draws, where the code shares one over a batch. Not included: the competition's flips and
    30 passes (the harness repeats stochastic defenses and averages), its ensemble of models, and ARES' variant, which
    shrinks.

    Differentiable: pixels are copied, so autograd gives the true gradient of each draw; the surrogate is the defense
    itself. Returns `Warped`: the target must accept the larger size.

    Limitations: broken by EOT (Athalye, Carlini, Wagner 2018).

    Args:
        mode: `code` or `paper`, see above.
    """

    stochastic = True

    def __init__(self, mode: Literal["code", "paper"] = "code") -> None:
        super().__init__()
        self.mode = mode

    def forward(self, images: Tensor, rng: ImageRNG) -> Warped:
        """Images (B, 3, out_h, out_w) and where each one lies in them."""
        size = (int(images.shape[-2]), int(images.shape[-1]))
        canvas = (-(-size[0] * OUT // BASE), -(-size[1] * OUT // BASE))
        longer = max(size)
        low = longer if self.mode == "paper" else longer * LOW // BASE
        resized = rng.integers(low, max(max(canvas), low + 1))
        # Rounded to nearest in integers; exact for the longer side.
        inner = torch.stack([(2 * resized * side + longer) // (2 * longer) for side in size], 1)
        inner = torch.minimum(inner, torch.tensor(canvas))
        room = torch.tensor(canvas) - inner
        places = room + 1 if self.mode == "paper" else room.clamp(min=1)
        offset = (rng.uniform((2,)).double() * places).long()
        rows, rows_inside = _sources(inner[:, 0], offset[:, 0], size[0], canvas[0], images.device)
        columns, columns_inside = _sources(inner[:, 1], offset[:, 1], size[1], canvas[1], images.device)
        batch, channels = images.shape[:2]
        moved = images.gather(2, rows[:, None, :, None].expand(batch, channels, canvas[0], size[1]))
        moved = moved.gather(3, columns[:, None, None, :].expand(batch, channels, *canvas))
        inside = rows_inside[:, None, :, None] & columns_inside[:, None, None, :]
        moved = torch.where(inside, moved, torch.tensor(0.5, dtype=images.dtype, device=images.device))
        scale = inner.float() / torch.tensor(size)
        return Warped(moved, Geometry(scale, offset.float(), size, canvas))

    surrogate = forward


def _sources(
    inner: Tensor, offset: Tensor, length: int, out: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """For each image and output position along one axis: the input position (B, out), and whether it is image.

    Nearest neighbour as torch and TensorFlow have it: floor(position * length / inner), in exact integers.
    """
    position = torch.arange(out)[None] - offset[:, None]
    inside = (position >= 0) & (position < inner[:, None])
    source = (position * length // inner[:, None]).clamp(0, length - 1)
    return source.to(device), inside.to(device)
