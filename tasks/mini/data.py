"""Embedded data: real handwritten digits on real photographs, offline and deterministic.

The digits are scikit-learn's ``load_digits`` (1,797 scans of 8x8 pixels, UCI test set of NIST forms), the
photographs its ``load_sample_images`` (two colour pictures of 427x640). A digit is enlarged, moved, and added to
or subtracted from a photo crop at a fixed contrast, in the manner of MNIST-M.

Two kinds of item exist:

* :func:`sample`: one digit on a 32x32 crop, for classification;
* :func:`scene`: one to three digits on a larger crop, with boxes, instance masks and a label map.

Splits share nothing: each scanned digit belongs to one split, and each split crops from its own vertical strip of
the photographs. (The scans do not name their writers, so one writer can appear in two splits.)

An item is a pure function of ``(seed, split, index)``. Random draws are raw Philox words, and everything from
there to the uint8 image is integer arithmetic, so that items do not depend on the numpy version or the platform.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib.util
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

UInt8 = NDArray[np.uint8]
Int64 = NDArray[np.int64]

#: Raise it when the drawing code changes what an item looks like.
VERSION = 1
SPLITS: tuple[str, ...] = ("train", "val", "test")
#: Scanned digits in each split; ``sample(split, i)`` shows digit ``i % SPLIT_SIZES[split]``.
SPLIT_SIZES: dict[str, int] = {"train": 1197, "val": 100, "test": 500}
#: Columns [start, stop) of both photographs that a split may crop from.
PHOTO_COLUMNS: dict[str, tuple[int, int]] = {"train": (0, 384), "val": (384, 496), "test": (496, 640)}
#: Names of the ten classes, in label order.
CLASSES: tuple[str, ...] = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
#: Names of the segmentation classes: label 0 is the background, label ``1 + k`` is digit ``k``.
SEG_CLASSES: tuple[str, ...] = ("background", *CLASSES)
#: One RGB colour for each segmentation class.
SEG_PALETTE: tuple[tuple[int, int, int], ...] = (
    (0, 0, 0), (230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48),
    (145, 30, 180), (70, 240, 240), (240, 50, 230), (210, 245, 60), (250, 190, 212),
)  # fmt: skip
#: Label of pixels that no metric counts.
IGNORE_LABEL = 255
IMAGE_SIZE = 32
SCENE_SIZE = 96
#: Digit contrast in 1/255 (the one knob of each kind, tuned on undefended models with the validation split).
CONTRAST = 120
SCENE_CONTRAST = 96
#: Contrast of the photographs in percent of their own, around mid grey, so that a digit stands out on any of them.
PHOTO_CONTRAST = 70
#: Ink (0..255) from which a pixel belongs to the digit's instance mask.
MASK_INK = 51
#: Ink below the first bound is background and from the second bound on digit; the band between is ignored.
LABEL_BAND = (31, 77)
#: Smallest and largest side in pixels of a digit in a scene (side of its 8x8 scan once enlarged).
SCENE_DIGIT = (36, 56)

_CELL = 8  # pixels of one scan pixel in the enlarged glyph
_MARGIN = 1  # empty scan pixels around the glyph, so that its ink fades out inside the canvas
_GLYPH = _CELL * (8 + 2 * _MARGIN)
_FIX = 1 << 16  # fixed point unit of the affine map


class Stream:
    """Integers drawn from raw Philox words.

    ``numpy.random.Generator`` may change how it maps words to numbers between versions; the words themselves and
    ``SeedSequence`` are guaranteed not to change.
    """

    def __init__(self, *key: int | str) -> None:
        words = [zlib.crc32(k.encode()) if isinstance(k, str) else k for k in key]
        self._bits = np.random.Philox(np.random.SeedSequence(words))

    def below(self, n: int) -> int:
        """An integer in ``[0, n)``."""
        return ((int(self._bits.random_raw()) >> 32) * n) >> 32

    def between(self, low: int, high: int) -> int:
        """An integer in ``[low, high]``."""
        return low + self.below(high - low + 1)

    def permutation(self, n: int) -> list[int]:
        """The integers ``0..n-1`` in random order (Fisher-Yates)."""
        order = list(range(n))
        for i in range(n - 1, 0, -1):
            j = self.below(i + 1)
            order[i], order[j] = order[j], order[i]
        return order


@dataclass(frozen=True)
class Scene:
    """One scene with its ground truth.

    Attributes:
        image: ``(H, W, 3)`` uint8, RGB.
        boxes: ``(N, 4)`` float32, ``x1, y1, x2, y2`` in pixels, the tight box of each mask (``x2``, ``y2`` exclusive).
        labels: ``(N,)`` int64, digit values 0..9.
        masks: ``(N, H, W)`` bool, disjoint instance masks.
        label_map: ``(H, W)`` uint8, 0 background, ``1 + digit`` on digits, 255 on the thin band at their edge.
    """

    image: UInt8
    boxes: NDArray[np.float32]
    labels: Int64
    masks: NDArray[np.bool_]
    label_map: UInt8


# ---------------------------------------------------------------- sources


def _source(name: str) -> Path | None:
    """A data file inside scikit-learn. Importing that library takes seconds and is not needed to read a file."""
    spec = importlib.util.find_spec("sklearn")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "datasets" / name
        if path.is_file():
            return path
    return None


@functools.lru_cache(maxsize=1)
def _scans() -> tuple[Int64, Int64]:
    path = _source("data/digits.csv.gz")
    if path is not None:
        with gzip.open(path, "rt", encoding="ascii") as file:
            rows = np.array([[int(float(v)) for v in line.split(",")] for line in file], dtype=np.int64)
        return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1]
    from sklearn.datasets import load_digits

    data = load_digits()
    return np.rint(data.images).astype(np.int64), np.asarray(data.target, dtype=np.int64)


@functools.lru_cache(maxsize=1)
def _photos() -> tuple[UInt8, ...]:
    paths = [_source(f"images/{name}.jpg") for name in ("china", "flower")]
    if None not in paths:
        photos = tuple(np.array(Image.open(path).convert("RGB")) for path in paths if path)
    else:
        from sklearn.datasets import load_sample_images

        photos = tuple(np.array(p, dtype=np.uint8) for p in load_sample_images().images)
    for photo in photos:
        photo.setflags(write=False)
    return photos


@functools.lru_cache(maxsize=1)
def split_digits() -> dict[str, tuple[int, ...]]:
    """Indices into ``load_digits`` for each split: fixed, disjoint, stratified by label, together all digits."""
    labels = _scans()[1]
    stream = Stream("mini digits split")
    order = sorted(stream.permutation(len(labels)), key=lambda i: int(labels[i]))

    def take(items: list[int], count: int) -> tuple[list[int], list[int]]:
        # Every (len / count)-th item of a list sorted by label: each label gets its share to within one.
        picked = [(k + 1) * count // len(items) > k * count // len(items) for k in range(len(items))]
        return [i for i, p in zip(items, picked, strict=True) if p], [
            i for i, p in zip(items, picked, strict=False) if not p
        ]

    test, rest = take(order, SPLIT_SIZES["test"])
    val, train = take(rest, SPLIT_SIZES["val"])
    shuffle = Stream("mini digits order")
    return {
        name: tuple(ids[k] for k in shuffle.permutation(len(ids)))
        for name, ids in (("train", train), ("val", val), ("test", test))
    }


@functools.lru_cache(maxsize=1)
def _enlarge_matrix() -> NDArray[np.float64]:
    """Keys' cubic (a = -1/2) from 10 to 80 pixels. Entries are multiples of 2**-13, so products stay exact."""
    n = 8 + 2 * _MARGIN
    matrix = np.zeros((_GLYPH, n))
    for out in range(_GLYPH):
        position = (2 * out + 1 - _CELL) / (2 * _CELL)
        first = math.floor(position) - 1
        for k in range(first, first + 4):
            t = abs(position - k)
            if 0 <= k < n and t < 2:
                matrix[out, k] = (
                    1.5 * t**3 - 2.5 * t**2 + 1 if t <= 1 else -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
                )
    return matrix


@functools.lru_cache(maxsize=2048)
def _glyph(index: int) -> Int64:
    """Digit ``index`` of ``load_digits`` enlarged to 80x80 ink values 0..255, zero at the border."""
    scan = np.pad(_scans()[0][index], _MARGIN).astype(np.float64)
    matrix = _enlarge_matrix()
    ink = np.floor(np.clip(matrix @ scan @ matrix.T, 0.0, 16.0) * 255.0 / 16.0 + 0.5).astype(np.int64)
    ink[[0, -1], :] = 0
    ink[:, [0, -1]] = 0
    return ink


# ---------------------------------------------------------------- drawing


@dataclass(frozen=True)
class _Pose:
    """Where and how a glyph is drawn: side of the 8x8 scan in pixels, centre in half pixels, angle, shear, aspect."""

    side: int
    cx2: int
    cy2: int
    angle: int = 0  # in 1/10 degree
    shear: int = 0  # in 1/1000
    aspect: int = 1000  # width over height, in 1/1000


def _draw(index: int, pose: _Pose, top: int, left: int, height: int, width: int) -> Int64:
    """Ink 0..255 of a posed glyph on the window of ``height`` x ``width`` pixels at (``top``, ``left``)."""
    glyph = _glyph(index)
    angle = math.radians(pose.angle / 10)
    cos, sin = math.cos(angle), math.sin(angle)
    step = 8 * _CELL / pose.side  # glyph pixels for one image pixel
    xx, xy = cos * step * 1000 / pose.aspect, sin * step * 1000 / pose.aspect
    # Rounding to 1/65536 makes the map the same whatever the last bits of cos and sin are.
    a, b = round(xx * _FIX), round(xy * _FIX)
    c, d = (
        round((-sin + pose.shear / 1000 * cos) * step * _FIX),
        round((cos + pose.shear / 1000 * sin) * step * _FIX),
    )
    dx = 2 * np.arange(left, left + width, dtype=np.int64) + 1 - pose.cx2
    dy = 2 * np.arange(top, top + height, dtype=np.int64) + 1 - pose.cy2
    # Pixel centres in the glyph, in 1/256 pixel; halves because dx and dy count half pixels.
    centre = (_GLYPH - 1) * 128
    gx = ((a * dx[None, :] + c * dy[:, None]) >> 9) + centre
    gy = ((-b * dx[None, :] + d * dy[:, None]) >> 9) + centre
    limit = (_GLYPH - 2) * 256 + 255
    np.clip(gx, 0, limit, out=gx)
    np.clip(gy, 0, limit, out=gy)
    fx, fy = gx & 255, gy & 255
    flat = (gy >> 8) * _GLYPH + (gx >> 8)
    values = glyph.ravel()
    upper = (256 - fx) * values.take(flat) + fx * values.take(flat + 1)
    lower = (256 - fx) * values.take(flat + _GLYPH) + fx * values.take(flat + _GLYPH + 1)
    return ((256 - fy) * upper + fy * lower + (1 << 15)) >> 16


def _background(stream: Stream, split: str, size: int, zoom: int, augment: bool) -> Int64:
    """A ``size`` x ``size`` RGB crop of the split's part of a photograph, shrunk ``zoom`` times."""
    photos = _photos()
    photo = photos[stream.below(len(photos))]
    start, stop = PHOTO_COLUMNS[split]
    side = size * zoom
    left = stream.between(start, stop - side)
    top = stream.between(0, photo.shape[0] - side)
    crop = photo[top : top + side, left : left + side].astype(np.int64)
    if zoom > 1:
        crop = (crop.reshape(size, zoom, size, zoom, 3).sum(axis=(1, 3)) + zoom * zoom // 2) // (zoom * zoom)
    if stream.below(2):
        crop = crop[:, ::-1]
    if augment:
        if stream.below(2):
            crop = crop[::-1]
        if stream.below(2):
            crop = crop.transpose(1, 0, 2)
        crop = crop[:, :, stream.permutation(3)]
    return 128 + (crop - 128) * PHOTO_CONTRAST // 100


def _blend(stream: Stream, background: Int64, ink: Int64, contrast: int) -> None:
    """Add (on a dark background) or subtract (on a bright one) a slightly coloured digit, in place, unclipped."""
    total = int(ink.sum())
    light = int((background.sum(axis=2) * ink).sum())
    sign = 1 if light < 3 * 128 * total else -1
    for channel in range(3):
        delta = contrast * stream.between(70, 100)
        background[:, :, channel] += sign * ((delta * ink + 12750) // 25500)


def _check(split: str, index: int) -> None:
    if split not in SPLIT_SIZES:
        raise ValueError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
    if index < 0:
        raise ValueError(f"index: {index} is negative")


def sample(
    split: str,
    index: int,
    *,
    seed: int = 0,
    size: int = IMAGE_SIZE,
    contrast: int | None = None,
    augment: bool | None = None,
) -> tuple[UInt8, int]:
    """One digit on a photo crop.

    ``index`` has no upper end: it shows digit ``index % SPLIT_SIZES[split]`` in a blend of its own. The data sets
    are the first ``SPLIT_SIZES[split]`` indices of ``val`` and ``test``; training takes a new range each epoch.

    Args:
        split: ``train``, ``val`` or ``test``.
        index: item number, 0 or more.
        seed: another seed gives other blends of the same digits.
        size: height and width, 32 to 64; the digit grows with it.
        contrast: digit contrast in 1/255; ``CONTRAST`` unless given.
        augment: wide changes of the digit's pose and of the crop; only for ``train`` unless given.

    Returns:
        ``(size, size, 3)`` uint8 RGB image and the digit's value.
    """
    _check(split, index)
    if not IMAGE_SIZE <= size <= 2 * IMAGE_SIZE:
        raise ValueError(f"size: {size} is not between {IMAGE_SIZE} and {2 * IMAGE_SIZE}")
    contrast = CONTRAST if contrast is None else contrast
    augment = split == "train" if augment is None else augment
    ids = split_digits()[split]
    digit = ids[index % len(ids)]
    stream = Stream("mini sample", seed, split, index)
    # Small images show the photograph at one or one half of its size, larger ones at its size only.
    zoom = 1 + stream.below(2) if size == IMAGE_SIZE else 1
    image = _background(stream, split, size, zoom, augment)

    def scaled(low: int, high: int) -> int:
        return stream.between(low * size // IMAGE_SIZE, high * size // IMAGE_SIZE)

    if augment:
        pose = _Pose(
            side=scaled(19, 28), cx2=size + scaled(-6, 6), cy2=size + scaled(-6, 6),
            angle=stream.between(-150, 150), shear=stream.between(-200, 200), aspect=stream.between(850, 1150),
        )  # fmt: skip
    else:
        pose = _Pose(side=scaled(23, 25), cx2=size + scaled(-3, 3), cy2=size + scaled(-3, 3))
    _blend(stream, image, _draw(digit, pose, 0, 0, size, size), contrast)
    return np.clip(image, 0, 255).astype(np.uint8), int(_scans()[1][digit])


def samples(
    split: str,
    indices: Sequence[int],
    *,
    seed: int = 0,
    size: int = IMAGE_SIZE,
    contrast: int | None = None,
    augment: bool | None = None,
) -> tuple[UInt8, Int64]:
    """Several :func:`sample` items stacked: ``(B, size, size, 3)`` uint8 images and ``(B,)`` int64 labels."""
    items = [sample(split, int(i), seed=seed, size=size, contrast=contrast, augment=augment) for i in indices]
    return np.stack([image for image, _ in items]), np.array([label for _, label in items], dtype=np.int64)


def scene(
    split: str,
    index: int,
    size: int = SCENE_SIZE,
    *,
    seed: int = 0,
    contrast: int | None = None,
    augment: bool | None = None,
) -> Scene:
    """One to three digits of 36 to 56 pixels on a photo crop, with exact ground truth.

    Masks never touch each other. A digit that finds no free place is left out, so a scene has at least one.

    Args:
        split: ``train``, ``val`` or ``test``.
        index: item number, 0 or more, without upper end.
        size: height and width of the scene; 64 or more, and no wider than the split's strip (112 for ``val``).
        seed: another seed gives other scenes.
        contrast: digit contrast in 1/255; ``SCENE_CONTRAST`` unless given.
        augment: wide changes of pose and crop; only for ``train`` unless given.
    """
    _check(split, index)
    start, stop = PHOTO_COLUMNS[split]
    if not 64 <= size <= stop - start:
        raise ValueError(f"size: {size} is not between 64 and {stop - start} for split {split!r}")
    contrast = SCENE_CONTRAST if contrast is None else contrast
    augment = split == "train" if augment is None else augment
    ids = split_digits()[split]
    stream = Stream("mini scene", seed, split, index)
    image = _background(stream, split, size, 1, augment)
    ink_map = np.zeros((size, size), dtype=np.int64)
    label_map = np.zeros((size, size), dtype=np.uint8)
    masks: list[NDArray[np.bool_]] = []
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    wanted = 1 + stream.below(3)
    largest = SCENE_DIGIT[1] if wanted == 1 else SCENE_DIGIT[1] - 4 * wanted
    tries = 0
    while len(masks) < wanted and (tries < 48 or not masks):
        tries += 1
        digit = ids[stream.below(len(ids))]
        side = stream.between(SCENE_DIGIT[0], largest)
        pose = _Pose(
            side=side, cx2=stream.between(side, 2 * size - side), cy2=stream.between(side, 2 * size - side),
            angle=stream.between(-120, 120) if augment else 0, shear=stream.between(-150, 150) if augment else 0,
            aspect=stream.between(900, 1100) if augment else 1000,
        )  # fmt: skip
        # The glyph's canvas, turned and sheared, stays within 0.9 sides of its centre.
        reach = side * 9 // 10 + 1
        top, bottom = max(0, pose.cy2 // 2 - reach), min(size, pose.cy2 // 2 + reach)
        left, right = max(0, pose.cx2 // 2 - reach), min(size, pose.cx2 // 2 + reach)
        window = (slice(top, bottom), slice(left, right))
        ink = _draw(digit, pose, top, left, bottom - top, right - left)
        if np.any((ink > 0) & (ink_map[window] > 0)):
            continue
        mask = np.zeros((size, size), dtype=bool)
        mask[window] = ink >= MASK_INK
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if min(rows[0], columns[0]) == 0 or max(rows[-1], columns[-1]) == size - 1:
            continue
        ink_map[window] += ink
        label = int(_scans()[1][digit])
        part = label_map[window]
        part[ink >= LABEL_BAND[0]] = IGNORE_LABEL
        part[ink >= LABEL_BAND[1]] = 1 + label
        crop = image[window]
        _blend(stream, crop, ink, contrast)
        masks.append(mask)
        boxes.append((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))
        labels.append(label)
    return Scene(
        image=np.clip(image, 0, 255).astype(np.uint8),
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        labels=np.array(labels, dtype=np.int64),
        masks=np.stack(masks),
        label_map=label_map,
    )


def curriculum_contrast(step: int, total: int, final: int, easy_share: float) -> int:
    """Digit contrast at training ``step``: falls linearly from twice ``final`` to ``final``.

    The fall takes the first ``easy_share`` of the ``total`` steps. Faint digits on texture give a new network almost
    no gradient; starting clear makes it learn several times faster.
    """
    left = max(0.0, 1.0 - step / (total * easy_share)) if easy_share > 0 else 0.0
    return int(final * (1.0 + left))


@functools.lru_cache(maxsize=1)
def fingerprint() -> str:
    """SHA-256 over the sources (decoded pixels) and every constant that shapes an item."""
    digest = hashlib.sha256()
    constants = (
        VERSION, SPLIT_SIZES, PHOTO_COLUMNS, IMAGE_SIZE, CONTRAST, SCENE_CONTRAST, PHOTO_CONTRAST, MASK_INK,
        LABEL_BAND, SCENE_DIGIT,
    )  # fmt: skip
    digest.update(repr(constants).encode())
    scans, labels = _scans()
    for array in (scans.astype("<i8"), labels.astype("<i8"), *_photos()):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
