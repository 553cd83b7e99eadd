"""Image quilting: the image rebuilt from patches of clean images."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from bench.errors import DataError, NotApplicable
from bench.protocols import Dataset, Defense
from bench.registry import DATASETS, DEFENSES
from bench.rng import ImageRNG, derive_seed

# Of the surrogate: the best attack on the embedded digits among 8..128 neighbors and temperatures of 0.05..1.
SOFT_NEIGHBORS, SOFT_TEMPERATURE = 16, 0.1


@DEFENSES.register_module(name="quilting")
class Quilting(Defense):
    """Replaces every patch by a similar one from a database of clean patches and sews them together.

    Source: Guo, Rana, Cisse, van der Maaten, ICLR 2018 (after Efros, Freeman 2001): patches of 5x5 pixels that overlap
    by 2; 1,000,000 patches from 20,000 training images; seams along the minimum graph cut of the overlap (Kwatra et
    al. 2003). "Quilting + TVM" is the chain `[quilting, tvm]`.

    - `seam: graph_cut` cuts as the paper says: the outermost row and column of an overlap stay old, what lies past
      the overlap is new, and between neighbours s and t of different origin the cost is |old - new| at s plus at t.
    - `seam: overwrite` is what the released code comes to: it pins no pixel to the old image, so that its minimum cut
      is empty and every new patch covers the overlap.

    `neighbors` = 1 takes the most similar patch (the code's default, deterministic); k > 1 draws one of the k most
    similar for each patch (10 in the paper), which makes the defense stochastic.

    What differs: the search is exact (the code's is approximate: product quantisation after PCA); the last patches
    are moved so that they end at the image border, where the code leaves 3 rows and columns black; 20,000 patches by
    default, since the exact search takes time in proportion. Draw them from *training* images: patches of the
    evaluated images would undo any attack.

    No gradient. The surrogate, by `gradient`, is `soft`: every patch becomes the mean of its 16 nearest, weighted by
    softmax(-d / (0.1 m)) of their squared distances d with mean m, overlaps are averaged; so the gradient knows in
    which directions the database lets a patch move. Or it is the `identity`, as in Athalye et al.; on small images
    that attack leaves most of the accuracy, and no number of steps helps it.

    Limitations: broken by BPDA with the identity, averaged over draws, on ImageNet (Athalye, Carlini, Wagner 2018).
    There is no true gradient: what the strongest attack leaves is an upper bound of the robustness.

    Args:
        dataset: name of the dataset that the patches are cut from.
        dataset_params: its parameters; None for `{split: train}`.
        patches: size of the database.
        images: at most this many images of the dataset are used, evenly spaced.
        size: side of a patch in pixels, 2 to 10.
        overlap: rows and columns that neighbouring patches share, 1 to size - 1.
        neighbors: 1, or how many patches to draw from.
        seam: `graph_cut` or `overwrite`, see above.
        gradient: `soft` or `identity`, see above.
        seed: seed of the places where patches are cut.

    Raises:
        ValueError: a number is out of range.
        PluginError: no such dataset or parameter.
        DataError: the dataset has no image as large as a patch.
    """

    differentiable = False
    database: Tensor

    def __init__(
        self,
        dataset: str = "mini_digits",
        dataset_params: dict[str, Any] | None = None,
        patches: int = 20_000,
        images: int = 20_000,
        size: int = 5,
        overlap: int = 2,
        neighbors: int = 1,
        seam: Literal["graph_cut", "overwrite"] = "graph_cut",
        gradient: Literal["soft", "identity"] = "soft",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 2 <= size <= 10:
            raise ValueError(f"size must be in 2..10, got {size}")
        if not 1 <= overlap < size:
            raise ValueError(f"overlap must be in 1..{size - 1} for patches of {size} pixels, got {overlap}")
        if not 1 <= neighbors <= patches:
            raise ValueError(f"neighbors must be in 1..{patches}, the number of patches, got {neighbors}")
        if images < 1:
            raise ValueError(f"images must be at least 1, got {images}")
        self.source: Dataset = DATASETS.create(
            dataset, {"split": "train"} if dataset_params is None else dataset_params
        )
        self.count, self.images, self.seed = patches, images, seed
        self.size, self.overlap = size, overlap
        self.neighbors = neighbors
        self.stochastic = neighbors > 1
        self.seam = seam
        self.gradient = gradient
        self.register_buffer("database", torch.empty(0), persistent=False)
        # The last search: patches of the images, the database, indices of the nearest. BPDA asks `surrogate` for the
        # images that `forward` has just seen, and the search is nearly all of either's time.
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def identity(self) -> dict[str, Any]:
        """Name and parameters, with the digest of the dataset in place of where it lies."""
        params = {key: value for key, value in self.params.items() if key != "dataset_params"}
        return {
            "name": self.name,
            "params": params,
            "version": self.version,
            "patches_from": self.source.fingerprint(),
        }

    def check_input(self, size: tuple[int, int]) -> None:
        """Images must be as large as a patch."""
        if min(size) < self.size:
            raise NotApplicable(
                f"images of {size[0]}x{size[1]} pixels are smaller than a patch ({self.size})"
            )

    @torch.no_grad()
    def forward(self, images: Tensor, rng: ImageRNG | None = None) -> Tensor:
        """Quilted images, same shape."""
        batch, channels, height, width = images.shape
        windows, rows, columns = self._windows(images)
        database = self._patches(images)
        nearest = self._search(windows.flatten(0, 2), database)
        pick = torch.zeros(len(nearest), dtype=torch.long, device=images.device)
        if self.neighbors > 1:
            assert rng is not None
            pick = rng.integers(0, self.neighbors, (len(rows) * len(columns),)).flatten().to(images.device)
        found = database[nearest.gather(1, pick[:, None])[:, 0]]
        found = found.view(batch, len(rows), len(columns), channels, self.size, self.size)
        return self._sew(found, rows, columns, (height, width))

    def surrogate(self, images: Tensor, rng: ImageRNG | None = None) -> Tensor:
        """A differentiable quilt of averaged patches, or the identity; same shape. Does not draw."""
        if self.gradient == "identity":
            return images
        windows, rows, columns = self._windows(images)
        database = self._patches(images)
        queries = windows.flatten(0, 2)
        nearest = self._search(queries.detach(), database)[:, :SOFT_NEIGHBORS]
        candidates = database[nearest]
        distance = (queries[:, None] - candidates).square().sum(2)
        scale = SOFT_TEMPERATURE * distance.detach().mean(1, keepdim=True)
        weight = torch.softmax(-distance / scale.clamp(min=1e-12), 1)
        soft = (weight[..., None] * candidates).sum(1)
        soft = soft.view(*windows.shape[:3], -1, self.size**2).permute(0, 3, 1, 2, 4).flatten(2)
        inside = torch.arange(self.size, device=images.device)
        y = (torch.tensor(rows, device=images.device)[:, None] + inside)[:, None, :, None]
        x = (torch.tensor(columns, device=images.device)[:, None] + inside)[None, :, None, :]
        place = (y * images.shape[-1] + x).flatten()
        total = torch.zeros_like(images).flatten(2).index_add(2, place, soft)
        return (total / place.bincount(minlength=total.shape[2])).view_as(images)

    def _search(self, queries: Tensor, database: Tensor) -> Tensor:
        """Indices (n, k) of the patches nearest to each query, nearest first, enough for either use."""
        if self._last is None or self._last[1] is not database or not torch.equal(self._last[0], queries):
            count = self.neighbors if self.gradient == "identity" else max(self.neighbors, SOFT_NEIGHBORS)
            self._last = queries, database, _nearest(queries, database, min(count, len(database)))
        return self._last[2]

    def _windows(self, images: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """The patches of images, (B, rows, columns, C s s), and the rows and columns they start at."""
        height, width = int(images.shape[-2]), int(images.shape[-1])
        self.check_input((height, width))
        rows, columns = _starts(height, self.size, self.overlap), _starts(width, self.size, self.overlap)
        windows = images.unfold(2, self.size, 1).unfold(3, self.size, 1)
        windows = windows[:, :, rows][:, :, :, columns].permute(0, 2, 3, 1, 4, 5)
        return windows.flatten(3), rows, columns

    def _patches(self, images: Tensor) -> Tensor:
        """The database (count, C s s) on the device of `images`; cut when first needed."""
        if self.database.numel() == 0:
            self.database = self._cut_patches()
        return self.database.to(images.device, images.dtype)

    def _sew(self, found: Tensor, rows: list[int], columns: list[int], size: tuple[int, int]) -> Tensor:
        """Put patches (B, rows, columns, C, s, s) onto a canvas, in reading order as far as they touch."""
        batch, _, _, channels, side, _ = found.shape
        canvas = found.new_zeros(batch, channels, *size)
        for group in _waves(rows, columns, side):
            new = torch.stack([found[:, i, j] for i, j in group], 1)
            if self.seam == "graph_cut":
                spans = [
                    (slice(rows[i], rows[i] + side), slice(columns[j], columns[j] + side)) for i, j in group
                ]
                old = torch.stack([canvas[:, :, y, x] for y, x in spans], 1)
                # Rows and columns of the patch that are covered already.
                down = [rows[i - 1] + side - rows[i] if i else 0 for i, _ in group]
                right = [columns[j - 1] + side - columns[j] if j else 0 for _, j in group]
                new = torch.where(_cut(old, new, down, right)[:, :, None], new, old)
            for n, (i, j) in enumerate(group):
                canvas[:, :, rows[i] : rows[i] + side, columns[j] : columns[j] + side] = new[:, n]
        return canvas

    def _cut_patches(self) -> Tensor:
        """Patches (count, 3 * size * size) from random places of evenly spaced images."""
        total = len(self.source)
        used = min(self.images, total, self.count)
        each = [self.count // used + (n < self.count % used) for n in range(used)]
        out: list[Tensor] = []
        for n in range(used):
            image = self.source[n * total // used].image
            room = [int(side) - self.size for side in image.shape[-2:]]
            if min(room) < 0:
                continue
            generator = torch.Generator().manual_seed(derive_seed("quilting", self.seed, n))
            y = torch.randint(0, room[0] + 1, (each[n],), generator=generator)
            x = torch.randint(0, room[1] + 1, (each[n],), generator=generator)
            windows = image.unfold(1, self.size, 1).unfold(2, self.size, 1)
            out.append(windows[:, y, x].transpose(0, 1).flatten(1))
        patches = torch.cat(out) if out else torch.empty(0)
        if len(patches) < self.neighbors:
            raise DataError(
                f"dataset '{self.source.name}' has only {len(patches)} patches of {self.size}x{self.size} pixels"
            )
        return patches


def _starts(length: int, size: int, overlap: int) -> list[int]:
    """First rows (or columns) of patches that cover `length` pixels; the last patch ends at the border."""
    starts = list(range(0, length - size + 1, size - overlap))
    return starts if starts[-1] == length - size else [*starts, length - size]


def _waves(rows: list[int], columns: list[int], side: int) -> Iterator[list[tuple[int, int]]]:
    """Groups of patches that do not touch each other, after all that touch them and precede in reading order."""
    reach = max(sum(c < other < c + side for other in columns) for c in columns)
    for time in range(len(columns) + (reach + 1) * (len(rows) - 1)):
        group = [(i, time - (reach + 1) * i) for i in range(len(rows))]
        group = [(i, j) for i, j in group if 0 <= j < len(columns)]
        if group:
            yield group


def _nearest(queries: Tensor, database: Tensor, count: int, budget: int = 1 << 25) -> Tensor:
    """Indices (n, count) of the patches nearest to each query, nearest first, ties to the lower index."""
    squares = database.square().sum(1)
    found: list[Tensor] = []
    for part in queries.split(max(1, budget // len(database))):
        scores = torch.addmm(squares[None], part, database.t(), alpha=-2)
        candidates = scores.topk(min(count + 7, len(database)), 1, largest=False).indices.sort(1).values
        # The product rounds differently for other batch sizes: decide between candidates by the difference itself.
        exact = (part[:, None].double() - database[candidates].double()).square().sum(2)
        order = exact.sort(dim=1, stable=True).indices[:, :count]
        found.append(candidates.gather(1, order))
    return torch.cat(found)


def _cut(old: Tensor, new: Tensor, down: list[int], right: list[int]) -> Tensor:
    """Which pixels are taken from `new`, by the minimum cut: bool (B, n, s, s) for patches (B, n, C, s, s).

    Exact, by dynamic programming over the pixels in reading order; the state is the origin of the last pixel in each
    column, bit c for column c (1 = new).

    Args:
        old, new: patches.
        down: for each of the n patches, how many of its first rows are covered already; 0 at the upper border.
        right: likewise for columns.
    """
    batch, count, _, side, _ = old.shape
    fixed_old, fixed_new = _pinned(tuple(down), tuple(right), side)
    fixed_old, fixed_new = fixed_old.to(old.device), fixed_new.to(old.device)
    difference = (old - new).abs().sum(2)
    cost = difference.new_full((batch, count, 2**side), torch.inf)
    cost[..., 0] = 0
    choices: list[Tensor] = []
    for y in range(side):
        for x in range(side):
            state = cost.view(batch, count, 2 ** (side - 1 - x), 2, 2**x)
            here = difference[:, :, y, x]
            above = (here + difference[:, :, y - 1, x])[..., None, None] if y else 0.0
            before = (here + difference[:, :, y, x - 1])[..., None] if x else 0.0
            origin = torch.arange(2**x, device=old.device) >> (x - 1) if x else None
            options = []
            for label in (0, 1):
                same, other = state[..., label, :], state[..., 1 - label, :] + above
                taken = other < same
                best = torch.where(taken, other, same)
                if origin is not None:
                    best = best + (before * (origin != label))[:, :, None]
                banned = (fixed_new if label == 0 else fixed_old)[:, y, x].view(1, count, 1, 1)
                options.append((best.masked_fill(banned, torch.inf), taken ^ bool(label)))
            cost = torch.stack([best for best, _ in options], 3).view(batch, count, -1)
            choices.append(torch.stack([taken for _, taken in options], 3).view(batch, count, -1))
    state = cost.argmin(-1)
    out = torch.zeros(batch, count, side, side, dtype=torch.bool, device=old.device)
    for position in reversed(range(side * side)):
        y, x = divmod(position, side)
        out[:, :, y, x] = (state >> x & 1).bool()
        previous = choices[position].gather(2, state[..., None])[..., 0].long()
        state = (state & ~(1 << x)) | previous << x
    return out


@functools.lru_cache(maxsize=256)
def _pinned(down: tuple[int, ...], right: tuple[int, ...], side: int) -> tuple[Tensor, Tensor]:
    """Pixels (n, s, s) that must stay old, and those that must be new."""
    row, column = torch.arange(side)[:, None], torch.arange(side)[None]
    old, new = [], []
    for covered_down, covered_right in zip(down, right, strict=True):
        first_row = (row == 0) & (covered_down > 0)
        first_column = (column == 0) & (covered_right > 0)
        old.append((first_row | first_column).expand(side, side))
        new.append((row >= covered_down) & (column >= covered_right))
    return torch.stack(old), torch.stack(new)
