"""The image transforms of the defense that came third at NIPS 2017."""

from __future__ import annotations

import functools
import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bench.protocols import Defense, Geometry, Warped
from bench.registry import DEFENSES
from bench.rng import ImageRNG
from defenses import _jpeg


@DEFENSES.register_module(name="nips_r3")
class NipsR3(Defense):
    """One of the random distortions of Thomas and Elibol's NIPS 2017 defense ("NIPS-r3").

    Source: their code (anlthms/nips-2017, `mmd`). It is an ensemble: four fixed networks see differently distorted
    images and their logits are summed with fixed weights (0.7 `ens` + 0.1 JPEG 50 into IncRes-v2-ens, 0.2 `inc` +
    0.1 JPEG 50 into adv-Inc-v3, 0.1 and 0.05 `vgg` into VGG-16 and ResNet-v2-152, auxiliary logits times 0.8). A
    purifier has no network of its own, so its distortions stand here alone (its JPEG is `jpeg` with quality 50) and
    numbers are not those of the ensemble.

    - `ens`: shear pi/128, shift 2 %, zoom 0.95, rotation -pi/128, each times a random number of 0.95..1.05, one after
      the other, nearest neighbour, grey where nothing is. Shifts are whole pixels: none below 50 pixels.
    - `inc`: Gaussian noise (standard deviation 2/255 in [0,1]), rotation by 2 or 3 degrees to either side, zoom of
      1.05..1.1 per axis, centre crop; cubic splines, grey corners.
    - `vgg`: JPEG of quality 50, rotation as in `inc`, zoom of 0.75..0.8 per axis, centre crop to 224/299 of the size
      (`Warped`); cubic splines, black corners.

    Rotation and zoom are those of `scipy.ndimage.rotate` and `zoom`, on the device of the images. For classification
    only: a box does not stay a box.

    Differentiable (`ens` copies values, `inc` is linear) but for the JPEG in `vgg`, whose surrogate is a
    differentiable JPEG. The others are their own surrogates.

    Limitations: small random distortions fall to EOT (Athalye, Engstrom, Ilyas, Kwok 2018).

    Args:
        transform: `ens`, `inc` or `vgg`, see above.
    """

    stochastic = True
    tasks = frozenset({"classification"})

    def __init__(self, transform: Literal["ens", "inc", "vgg"] = "ens") -> None:
        super().__init__()
        self.transform = transform
        self.differentiable = transform != "vgg"

    def forward(self, images: Tensor, rng: ImageRNG) -> Tensor | Warped:
        """Distorted images, same shape, or (B, 3, round(224/299 H), round(224/299 W)) as `Warped` for `vgg`."""
        if self.transform == "vgg":
            return _vgg(_jpeg.codec(images, 50, "4:2:0", torch.round), rng)
        return _ens(images, rng) if self.transform == "ens" else _inc(images, rng)

    def surrogate(self, images: Tensor, rng: ImageRNG) -> Tensor | Warped:
        """The same, with a differentiable JPEG."""
        if self.transform == "vgg":
            levels = _jpeg.straight_through(images * 255, torch.round)
            return _vgg(_jpeg.differentiable_jpeg(levels, 50, "4:2:0", _jpeg.cubic_round) / 255, rng)
        return self.forward(images, rng)


# -- ens: nearest neighbour ---------------------------------------------------------------------------------------
def _ens(images: Tensor, rng: ImageRNG) -> Tensor:
    height, width = int(images.shape[-2]), int(images.shape[-1])
    factors = rng.integers(95, 106, (6,)).numpy() / 100.0
    sources = np.stack([_ens_sources(tuple(row), height, width) for row in factors.tolist()])
    index = torch.from_numpy(sources).to(images.device)[:, None].expand(-1, images.shape[1], -1)
    moved = images.flatten(2).gather(2, index.clamp(min=0))
    return torch.where(index >= 0, moved, torch.full_like(moved, 0.5)).view_as(images)


def _ens_sources(factors: tuple[float, ...], height: int, width: int) -> np.ndarray:
    """For each output pixel the index of the input pixel, -1 where there is none; the four steps composed."""
    shear, theta = factors[0] * math.pi / 128, -factors[1] * math.pi / 128
    # As in the code: the first axis, rows, is shifted by a share of the width, the second by one of the height.
    shift = (int(factors[2] * width * 0.02), int(factors[3] * height * 0.02))
    steps = [
        _centred([[1, -math.sin(shear)], [0, math.cos(shear)]], height, width),
        (np.eye(2), np.array(shift, float)),
        _centred([[factors[4] * 0.95, 0], [0, factors[5] * 0.95]], height, width),
        _centred([[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]], height, width),
    ]
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij")).reshape(2, -1)
    limit = np.array([[height - 1], [width - 1]])
    composed = np.arange(height * width)
    for matrix, offset in steps:
        place = matrix @ grid + offset[:, None]
        inside = ((place >= 0) & (place <= limit)).all(0)
        nearest = np.floor(place + 0.5).clip(0, limit).astype(np.int64)
        step = np.where(inside, nearest[0] * width + nearest[1], -1)
        composed = np.where(step >= 0, composed[step], -1)
    return composed


def _centred(matrix: list[list[float]], height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A linear map about the centre, as Keras places it: (matrix, offset)."""
    centre = np.array([height / 2 + 0.5, width / 2 + 0.5])
    linear = np.array(matrix, float)
    return linear, centre - linear @ centre


# -- inc and vgg: cubic splines -----------------------------------------------------------------------------------
def _inc(images: Tensor, rng: ImageRNG) -> Tensor:
    size = (int(images.shape[-2]), int(images.shape[-1]))
    # In [-1,1], where the code works and zero is grey.
    noisy = images * 2 - 1 + 4 / 255 * rng.normal(images.shape[1:], images.device).to(images.dtype)
    noisy = _jpeg.straight_through(noisy, lambda x: x.clamp(-1, 1))
    return (_turn_and_zoom(noisy, (1.05, 1.1), size, rng)[0] + 1) / 2


def _vgg(images: Tensor, rng: ImageRNG) -> Warped:
    size = (int(images.shape[-2]), int(images.shape[-1]))
    out = (max(1, round(size[0] * 224 / 299)), max(1, round(size[1] * 224 / 299)))
    moved, scale = _turn_and_zoom(images, (0.75, 0.8), out, rng)
    # Scale about the centre; the rotation of two or three degrees is left out.
    offset = (torch.tensor(out) - torch.tensor(size) * scale) / 2
    return Warped(moved, Geometry(scale.float(), offset.float(), size, out))


def _turn_and_zoom(
    images: Tensor, zoom: tuple[float, float], out: tuple[int, int], rng: ImageRNG
) -> tuple[Tensor, Tensor]:
    """Rotate by 2 or 3 degrees to either side, zoom each axis, crop the centre; also the zooms (B, 2)."""
    degrees = rng.integers(2, 4) * (rng.integers(0, 2) * 2 - 1)
    zooms = rng.uniform((2,), *zoom).double()
    result = []
    for image, angle, factors in zip(images.double(), degrees.tolist(), zooms.tolist(), strict=True):
        turned = _rotate(image, angle)
        for axis, (factor, length) in enumerate(zip(factors, out, strict=True)):
            # Both are matrices along one axis, so only the rows of the crop are computed.
            whole = turned.shape[axis + 1]
            scaled = max(round(whole * factor), length)
            start = (scaled - length) // 2
            matrix = _zoom_matrix(whole, scaled)[start : start + length].to(turned.device)
            turned = torch.tensordot(matrix, turned, ([1], [axis + 1])).movedim(0, axis + 1)
        result.append(turned)
    return torch.stack(result).to(images.dtype), zooms


def _rotate(image: Tensor, degrees: int) -> Tensor:
    """`scipy.ndimage.rotate` of (C, H, W) with its defaults: cubic spline, enlarged to hold all, zero outside."""
    height, width = int(image.shape[1]), int(image.shape[2])
    index, weight, size = _rotation(height, width, degrees)
    rows, columns = _spline_coefficients(height), _spline_coefficients(width)
    coefficients = rows.to(image.device) @ image @ columns.to(image.device).T
    flat = coefficients.flatten(1)
    index, weight = index.to(image.device), weight.to(image.device)
    out = torch.zeros(len(flat), index.shape[1], dtype=image.dtype, device=image.device)
    for k in range(16):
        out = out + flat[:, index[k]] * weight[k]
    return out.view(-1, *size)


@functools.lru_cache(maxsize=64)
def _rotation(height: int, width: int, degrees: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Indices and weights (16, n) of the spline coefficients that each of the n output pixels is made of."""
    angle = math.radians(degrees)
    matrix = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    corners = matrix @ np.array([[0, 0, height, height], [0, width, 0, width]])
    size = (np.ptp(corners, axis=1) + 0.5).astype(int)
    offset = (np.array([height, width]) - 1) / 2 - matrix @ ((size - 1) / 2)
    grid = np.stack(np.meshgrid(np.arange(size[0]), np.arange(size[1]), indexing="ij")).reshape(2, -1)
    place = matrix @ grid + offset[:, None]
    limit = np.array([[height - 1], [width - 1]])
    inside = ((place >= 0) & (place <= limit)).all(0)
    row, row_weight = _spline_taps(place[0], height)
    column, column_weight = _spline_taps(place[1], width)
    index = (row[:, None] * width + column[None]).reshape(16, -1)
    weight = (row_weight[:, None] * column_weight[None]).reshape(16, -1) * inside
    return torch.from_numpy(index), torch.from_numpy(weight), (int(size[0]), int(size[1]))


@functools.lru_cache(maxsize=256)
def _zoom_matrix(length: int, scaled: int) -> Tensor:
    """`scipy.ndimage.zoom` along one axis as a matrix (scaled, length): cubic spline, ends on ends."""
    step = (length - 1) / (scaled - 1) if scaled > 1 else 0.0
    place = np.minimum(np.arange(scaled) * step, length - 1)
    taps, weights = _spline_taps(place, length)
    matrix = np.zeros((scaled, length))
    for index, weight in zip(taps, weights, strict=True):
        np.add.at(matrix, (np.arange(scaled), index), weight)
    return torch.from_numpy(matrix) @ _spline_coefficients(length)


@functools.lru_cache(maxsize=256)
def _spline_coefficients(length: int) -> Tensor:
    """The matrix from samples to cubic B-spline coefficients, mirrored at the ends (about the end samples)."""
    if length == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    samples = np.zeros((length, length))
    for offset, weight in ((-1, 1 / 6), (0, 2 / 3), (1, 1 / 6)):
        np.add.at(samples, (np.arange(length), _mirrored(np.arange(length) + offset, length)), weight)
    return torch.from_numpy(np.linalg.inv(samples))


def _spline_taps(place: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and weights (4, n) of the cubic B-splines that overlap each place."""
    below = np.floor(place).astype(np.int64)
    t = place - below
    weights = np.stack(
        [(1 - t) ** 3 / 6, (4 - 6 * t**2 + 3 * t**3) / 6, (1 + 3 * t + 3 * t**2 - 3 * t**3) / 6, t**3 / 6]
    )
    return np.stack([_mirrored(below + k, length) for k in (-1, 0, 1, 2)]), weights


def _mirrored(index: np.ndarray, length: int) -> np.ndarray:
    """Reflected about the first and last sample: ... 2 1 | 0 1 ... n-1 | n-2 ..."""
    if length == 1:
        return np.zeros_like(index)
    period = 2 * (length - 1)
    index = np.abs(index) % period
    folded: np.ndarray = np.minimum(index, period - index)
    return folded
