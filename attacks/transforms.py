"""What happens to the input before the gradient (input diversity) and to the gradient before the step.

Gradient transforms are applied in order: translation invariance, then momentum, as in the published code.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from attacks.objectives import BoundLoss
from attacks.steps import norms
from bench.protocols import Geometry, ImageRNG, Oracle, Warped

MomentumNorm = Literal["mean", "l2", "sign", "none"]
Canvas = Literal["enlarged", "native"]
Interpolation = Literal["nearest", "bilinear"]


class GradientTransform(Protocol):
    """Maps a gradient (B, 3, H, W) and its memory of earlier steps to the next of both."""

    def __call__(self, grad: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`memory` is None at the first step; its first dimension is the batch."""
        ...


class Momentum:
    """g <- decay * g + grad / mean|grad| (Dong et al. 2018, MI-FGSM, eq. 6).

    The paper divides by the L1 norm, the authors' code by the mean of |grad| per image: a constant factor apart, which
    neither the sign nor the ratio between steps sees. An image whose gradient is exactly zero at some step (0/0 in the
    published code, a NaN that never leaves the momentum and whose sign torch takes as 0) adds nothing and keeps the
    momentum it has. The oracle counts such steps.

    Args:
        decay: the decay factor mu.
        normalise: `mean` (the authors' code), `l2` (unit L2 norm), `sign` (signs are accumulated, as foolbox does) or
            `none`.
    """

    def __init__(self, decay: float = 1.0, normalise: MomentumNorm = "mean") -> None:
        self.decay, self.normalise = decay, normalise

    def __call__(self, grad: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        """The accumulated gradient, twice."""
        if self.normalise == "sign":
            grad = grad.sign()
        elif self.normalise != "none":
            scale = norms(grad) if self.normalise == "l2" else _mean_abs(grad)
            grad = grad / scale.masked_fill(scale == 0, 1.0)
        total = grad if memory is None else torch.add(grad, memory, alpha=self.decay)
        return total, total


class TranslationInvariance:
    """Convolve each colour channel of the gradient with a Gaussian, zeros outside (Dong et al. 2019, eq. 7).

    The weights are a standard normal density sampled at `size` points of [-sigmas, sigmas] and normalised: `sigmas` is
    where the Gaussian is cut off, not its width. Size 15 and 3 sigmas mean a standard deviation of 14/6 = 2.33 pixels.

    Args:
        size: odd number of taps.
        sigmas: cut-off in standard deviations.
    """

    def __init__(self, size: int = 15, sigmas: float = 3.0) -> None:
        if size < 3 or size % 2 == 0:
            raise ValueError(f"the TI kernel needs an odd size of at least 3, got {size}")
        self.size, self.sigmas = size, sigmas
        at = [-sigmas + 2 * sigmas * i / (size - 1) for i in range(size)]
        density = [math.exp(-(x**2) / 2) for x in at]
        self.weights = [value / sum(density) for value in density]

    def kernel(self) -> Tensor:
        """The two-dimensional kernel, (size, size), sum 1."""
        line = torch.tensor(self.weights, dtype=torch.float64)
        return torch.outer(line, line).float()

    def __call__(self, grad: Tensor, memory: Tensor | None) -> tuple[Tensor, None]:
        """The smoothed gradient, and nothing to remember."""
        # The kernel is separable. Sums of shifted images are faster than a depthwise convolution on the CPU and
        # add in one fixed order, whatever the batch size.
        return self._smooth(self._smooth(grad, -1), -2), None

    def _smooth(self, grad: Tensor, dim: int) -> Tensor:
        half, length = self.size // 2, grad.shape[dim]
        padded = F.pad(grad, (half, half, 0, 0) if dim == -1 else (0, 0, half, half))
        out = torch.zeros_like(grad)
        for shift, weight in enumerate(self.weights):
            out.add_(padded.narrow(dim, shift, length), alpha=weight)
        return out


def _mean_abs(grad: Tensor) -> Tensor:
    """mean|g| of each image, (B, 1, 1, 1); in double, see `norms`."""
    return grad.abs().flatten(1).mean(1, dtype=torch.float64).to(grad.dtype).view(-1, 1, 1, 1)


# -- input diversity ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Placement:
    """Where one step puts each image of a batch on the canvas.

    Attributes:
        applied: (B,) bool, which images are moved at all.
        size: (B, 2) height and width after resizing.
        corner: (B, 2) top and left of the image on the canvas.
        canvas: (H, W) of the canvas.
    """

    applied: Tensor
    size: Tensor
    corner: Tensor
    canvas: tuple[int, int]


class InputDiversity:
    """Enlarge at random, pad with zeros at random, with a probability (Xie et al. 2019, DI2-FGSM, section 3.3).

    As in the authors' code: the canvas is 330/299 of the image, the image is enlarged to a size drawn uniformly from
    [299, 330) by nearest neighbour and lands at a uniformly drawn place. Each image draws for itself. Images that are
    not square keep their aspect ratio up to rounding. Pixels move, so the target gets `Warped` images: boxes, masks
    and label maps follow. Few sizes are left for small images: at 32 pixels the canvas is 35 and the sizes are 32, 33
    and 34; below 15 pixels there is one. Raise `ratio` there.

    A `ratio` below 1 shrinks instead, as torchattacks does (its `resize_rate` is 0.9, with bilinear interpolation): the
    canvas is the image's own size, the sizes are those from `ratio` of it, rounded down, up to one pixel less.

    Args:
        prob: chance that an image is moved at a step.
        ratio: canvas size over image size, in (1, 2]; or the smallest size over image size, in (0, 1).
        canvas: `enlarged` = the victim sees the canvas at its size, as published (images that are not moved are seen at
            their own size); `native` = the canvas is resized back by the same interpolation, as many
            re-implementations do and victims of a fixed input size need. Where images shrink it is the same.
        interpolation: `nearest` (published) or `bilinear`, between pixel centres and without smoothing, as
            `torch.nn.functional.interpolate` has both.
    """

    def __init__(
        self,
        prob: float = 0.5,
        ratio: Fraction | float = Fraction(330, 299),
        canvas: Canvas = "enlarged",
        interpolation: Interpolation = "nearest",
    ) -> None:
        if not 0 < prob <= 1:
            raise ValueError(f"input diversity needs a probability in (0, 1], got {prob}")
        if not 0 < ratio <= 2 or ratio == 1:
            raise ValueError(
                f"input diversity enlarges by a ratio in (1, 2] or shrinks by one in (0, 1), got {ratio}"
            )
        self.prob, self.ratio, self.canvas = prob, Fraction(ratio), canvas
        self.interpolation = interpolation
        self.keeps_size = canvas == "native" or ratio < 1

    def draw(self, rng: ImageRNG, size: tuple[int, int]) -> Placement:
        """Placements of one step for images of `size` (H, W); always four numbers from each stream."""
        canvas = (self._canvas(size[0]), self._canvas(size[1]))
        smallest, outer = torch.tensor([self._smallest(length) for length in size]), torch.tensor(canvas)
        u = rng.uniform((4,)).double()
        resized = smallest + _below(u[:, 1:2], outer - smallest)
        corner = _below(u[:, 2:4], outer - resized)
        return Placement(u[:, 0] < self.prob, resized, corner, canvas)

    def _canvas(self, length: int) -> int:
        return length if self.ratio < 1 else max(round(length * self.ratio), length + 1)

    def _smallest(self, length: int) -> int:
        return length if self.ratio > 1 else max(math.floor(length * self.ratio), 1)

    def apply(self, images: Tensor, placement: Placement) -> Warped:
        """The canvases of all `images` (B, 3, H, W), differentiable.

        On an enlarged canvas every image is moved; where images keep their size those that are not `applied` stay as
        they are.
        """
        inner = (int(images.shape[-2]), int(images.shape[-1]))
        seen = inner if self.keeps_size else placement.canvas
        scale = placement.size / torch.tensor(inner)
        offset = placement.corner.float()
        if self.keeps_size:
            if seen != placement.canvas:
                back = torch.tensor(inner) / torch.tensor(placement.canvas)
                scale, offset = scale * back, offset * back
            moved = placement.applied[:, None]
            scale, offset = torch.where(moved, scale, 1.0), torch.where(moved, offset, 0.0)
        move = self._bilinear if self.interpolation == "bilinear" else self._nearest
        return Warped(
            move(images, placement, inner, seen), Geometry(scale.float(), offset.float(), inner, seen)
        )

    def _nearest(
        self, images: Tensor, placement: Placement, inner: tuple[int, int], seen: tuple[int, int]
    ) -> Tensor:
        sources = []
        for axis in (0, 1):
            # Output pixel -> canvas pixel -> image pixel, each by nearest neighbour: floor(i * in / out).
            at = torch.arange(seen[axis]) * placement.canvas[axis] // seen[axis]
            inside = at[None] - placement.corner[:, axis, None]
            size = placement.size[:, axis, None]
            source = torch.div(inside * inner[axis], size, rounding_mode="floor")
            sources.append(torch.where((inside >= 0) & (inside < size), source, -1))
        if self.keeps_size:
            for axis in (0, 1):
                sources[axis][~placement.applied] = torch.arange(inner[axis])
            if images.device.type == "cpu":
                return _indexed(images, *sources)
        rows, columns = (_selector(sources[axis], inner[axis], images) for axis in (0, 1))
        return rows @ images @ columns.transpose(-1, -2)

    def _bilinear(
        self, images: Tensor, placement: Placement, inner: tuple[int, int], seen: tuple[int, int]
    ) -> Tensor:
        moved = placement.applied.nonzero()[:, 0] if self.keeps_size else torch.arange(len(images))
        sizes, corners = placement.size[moved], placement.corner[moved]
        both: list[Tensor] = []
        for axis in (0, 1):
            length, canvas, out = inner[axis], placement.canvas[axis], seen[axis]
            table = _hat_table(self._smallest(length), length, canvas, out, images.dtype)
            if table is not None and inner[0] == inner[1]:
                both = list(table[sizes - self._smallest(length), corners].to(images.device).unbind(1))
                break
            weights = _hats(sizes[:, axis], corners[:, axis], length, canvas, out, images.dtype)
            both.append(weights.to(images.device))
        resized: Tensor = _Resized.apply(images, moved.to(images.device), *both)  # type: ignore[no-untyped-call]
        return resized

    def objective(self, bound: BoundLoss, placement: Placement) -> DiverseObjective:
        """`bound` as seen through one step's placement."""
        return DiverseObjective(self, bound, placement)


@dataclass(frozen=True)
class DiverseObjective:
    """An objective whose images pass through input diversity; the placement is the same for every EOT draw."""

    diversity: InputDiversity
    bound: BoundLoss
    placement: Placement

    def __call__(self, oracle: Oracle, images: Tensor) -> Tensor:
        """Values (B,)."""
        applied = self.placement.applied
        if not applied.any():
            return self.bound(oracle, images)
        if self.diversity.keeps_size or applied.all():
            return self.bound(oracle, self.diversity.apply(images, self.placement))
        # Moved and unmoved images differ in size, so the victim sees them in two batches.
        moved, still = applied.nonzero()[:, 0], (~applied).nonzero()[:, 0]
        canvases = self.diversity.apply(images[moved.to(images.device)], _part(self.placement, moved))
        values = torch.cat(
            [
                self.bound.select(moved)(oracle.select(moved), canvases),
                self.bound.select(still)(oracle.select(still), images[still.to(images.device)]),
            ]
        )
        return values[torch.cat([moved, still]).argsort().to(values.device)]


def _part(placement: Placement, index: Tensor) -> Placement:
    return Placement(
        placement.applied[index], placement.size[index], placement.corner[index], placement.canvas
    )


def _below(u: Tensor, limit: Tensor) -> Tensor:
    """Integers uniform in [0, limit) from uniform numbers in [0, 1); 0 where the limit is below 1."""
    return torch.minimum((u * limit).floor().long(), limit - 1).clamp(min=0)


def _indexed(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pixels of `images` at source rows (B, H') and columns (B, W'), 0 where either is -1: (B, 3, H', W').

    The same pixels as by `_selector`, in half the time on a CPU, where the backward pass sums in a fixed order, too.
    """
    at = rows.clamp(min=0)[:, :, None] * images.shape[-1] + columns.clamp(min=0)[:, None]
    known = (rows >= 0)[:, :, None] & (columns >= 0)[:, None]
    found = images.flatten(2).gather(2, at.flatten(1)[:, None].expand(-1, images.shape[1], -1))
    return found.view(*images.shape[:2], *at.shape[1:]) * known[:, None]


def _selector(source: Tensor, length: int, like: Tensor) -> Tensor:
    """(B, out) source indices, -1 for none, as 0/1 matrices (B, 1, out, length).

    A product with a 0/1 matrix copies pixels exactly, and its backward pass sums in a fixed order, which indexing does
    not on a GPU.
    """
    picks = source[..., None] == torch.arange(length)
    return picks[:, None].to(device=like.device, dtype=like.dtype)


@functools.lru_cache(maxsize=16)
def _hat_table(smallest: int, length: int, canvas: int, seen: int, dtype: torch.dtype) -> Tensor | None:
    """`_hats` of every size and corner there can be, (sizes, corners, seen, length); None where that is large."""
    count = canvas - smallest + 1
    if count * count * seen * length > _TABLE:
        return None
    places = torch.cartesian_prod(torch.arange(count), torch.arange(count))
    weights = _hats(places[:, 0] + smallest, places[:, 1], length, canvas, seen, dtype)
    return weights.view(count, count, seen, length)


_TABLE = 1 << 20
"""Weights that are kept: what 32 pixels need, far less than 224 would."""


def _hats(size: Tensor, corner: Tensor, length: int, canvas: int, seen: int, dtype: torch.dtype) -> Tensor:
    """Weights (B, seen, length) of bilinear resizing: `length` pixels to `size` (B,), put at `corner` (B,) of `canvas`.

    Where `seen` differs, the canvas is resized to it. Weights fall off linearly from the place where a pixel's centre
    comes from; outside the resized image they are 0.
    """
    if seen != canvas:
        whole = _hats(torch.tensor([seen]), torch.tensor([0]), canvas, seen, seen, dtype)
        return whole @ _hats(size, corner, length, canvas, canvas, dtype)
    at = torch.arange(canvas) - corner[:, None]
    centre = ((at + 0.5) * length / size[:, None].double() - 0.5).clamp(0, length - 1)
    weights = (1 - (centre[..., None] - torch.arange(length)).abs()).clamp(min=0)
    return (weights * ((at >= 0) & (at < size[:, None]))[..., None]).to(dtype)


class _Resized(torch.autograd.Function):
    """Images (B, 3, H, W), those `moved` replaced by rows @ image @ columns^T; the others stay, if sizes do.

    On a CPU products with dense matrices take the time of torch's own resizing of a whole batch to one size at 32
    pixels, and 2 % of a ResNet-50's at 224; their backward passes sum in a fixed order on a GPU, too.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, moved: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(moved, rows, columns)
        return _placed(images, moved, rows, columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        moved, rows, columns = ctx.saved_tensors
        return _placed(grad, moved, rows.transpose(-1, -2), columns.transpose(-1, -2)), None, None, None


def _placed(images: Tensor, moved: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    all_moved = len(moved) == len(images)
    # Channels beside columns: both products are then of one matrix an image, and nothing is copied between them.
    chosen = images.transpose(1, 2)
    chosen = chosen if all_moved else chosen[moved]
    count, height, channels, width = chosen.shape
    across = rows @ chosen.reshape(count, height, channels * width)
    product = across.view(count, -1, width) @ columns.transpose(-1, -2)
    product = product.view(count, rows.shape[1], channels, columns.shape[1]).transpose(1, 2)
    if all_moved:
        return product.contiguous()
    out = images.clone()
    out[moved] = product
    return out


def select_memory(memory: Sequence[Tensor | None], index: Tensor) -> list[Tensor | None]:
    """What gradient transforms remember of some of the images."""
    return [None if item is None else item[index] for item in memory]
