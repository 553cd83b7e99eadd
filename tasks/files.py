"""Files of data sets: where they lie, reading images, and digests of what they hold."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from bench.errors import DataError, WeightsError
from bench.weights import sha256_file

__all__ = ["IMAGE_SUFFIXES", "UNLABELLED", "data_root", "fingerprint_files", "read_image", "to_image"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

#: What images without a label say in its place.
UNLABELLED = -1

#: Trees of more files than this are fingerprinted by names and sizes instead of content.
_CONTENT_LIMIT = 4096


def data_root(root: str | None) -> Path:
    """`root`, else what BENCH_DATA names, else ./data."""
    return Path(root or os.environ.get("BENCH_DATA") or "data").expanduser()


def to_image(pixels: Any) -> Tensor:
    """(H, W, 3) or (H, W) 8-bit pixels as an image (3, H, W) in [0,1]; grey is repeated."""
    array = np.asarray(pixels, dtype=np.uint8)
    if array.ndim == 2:
        array = np.repeat(array[:, :, None], 3, axis=2)
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1))).float() / 255


def read_image(path: Path) -> Image.Image:
    """The RGB image in `path`.

    Raises:
        DataError: the file is missing or no readable image.
    """
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"image {path} does not exist") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error) if str(path) not in str(error) else type(error).__name__
        raise DataError(f"image {path} cannot be read: {reason}") from None


def fingerprint_files(paths: Iterable[tuple[str, Path]]) -> str:
    """Digest of (name, file) pairs: of their content, or of names and sizes when they are more than a few thousand.

    Raises:
        DataError: a file cannot be read.
    """
    listed = sorted(paths)
    digest = hashlib.sha256(f"{len(listed)} files".encode())
    for name, path in listed:
        try:
            content = sha256_file(path) if len(listed) <= _CONTENT_LIMIT else str(path.stat().st_size)
        except OSError as error:
            raise DataError(f"data file {path} cannot be read: {error.strerror or error}") from None
        except WeightsError as error:
            raise DataError(str(error).replace("weights file", "data file")) from None
        digest.update(f"\n{name}\t{content}".encode())
    return digest.hexdigest()
