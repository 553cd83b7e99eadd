"""The embedded data as datasets of a grid: `mini_digits` (classification) and `mini_scenes_seg` (segmentation)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from bench.errors import DataError
from bench.protocols import Dataset, Sample
from bench.registry import DATASETS
from tasks.mini import data

__all__ = ["MiniDigits", "MiniScenesSeg"]

Split = Literal["train", "val", "test"]


def _image(pixels: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 as (3, H, W) in [0,1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float() / 255


class _Mini(Dataset):
    """Items drawn one by one from their split and index."""

    kind: ClassVar[str]
    split: str
    count: int

    def __len__(self) -> int:
        return self.count

    def ids(self) -> Sequence[str]:
        """`test_000000` and so on."""
        return [f"{self.split}_{index:06d}" for index in range(self.count)]

    def fingerprint(self) -> str:
        """Digest of the sources and of what is drawn from them; an item depends on its index alone, not on `count`."""
        return hashlib.sha256(f"{data.fingerprint()} {self.kind} {self.split}".encode()).hexdigest()

    def _index(self, index: int) -> int:
        if not 0 <= index < self.count:
            raise IndexError(f"{self.kind} has {self.count} items, no item {index}")
        return index


@DATASETS.register_module(name="mini_digits")
class MiniDigits(_Mini):
    """Handwritten digits on photographs, 32x32, ten classes; embedded, no files needed.

    Args:
        split: `train` (1,197 digits), `val` (100) or `test` (500); they share neither digits nor parts of the
            photographs.
        count: number of images; the split's number of digits unless given. More shows digits again, blended anew.
    """

    task: ClassVar[str] = "classification"
    kind: ClassVar[str] = "digits"

    def __init__(self, split: Split = "test", count: int | None = None) -> None:
        self.split = split
        self.count = data.SPLIT_SIZES[split] if count is None else count
        self.classes = data.CLASSES
        if self.count < 1:
            raise DataError(f"dataset 'mini_digits': count is {count}, expected 1 or more")

    def __getitem__(self, index: int) -> Sample:
        pixels, label = data.sample(self.split, self._index(index), augment=False)
        return Sample(_image(pixels), label, f"{self.split}_{index:06d}")


@DATASETS.register_module(name="mini_scenes_seg")
class MiniScenesSeg(_Mini):
    """Scenes of one to three handwritten digits on photographs with label maps, 96x96; embedded, no files needed.

    Targets are (H, W) int64 label maps: 0 background, 1 to 10 the digits 0 to 9, 255 ignored (the thin edge of a
    digit).

    Args:
        split: `train`, `val` or `test`; they share neither digits nor parts of the photographs.
        count: number of scenes.
    """

    task: ClassVar[str] = "segmentation"
    kind: ClassVar[str] = "scenes"
    ignore_label: ClassVar[int] = data.IGNORE_LABEL

    def __init__(self, split: Split = "test", count: int = 200) -> None:
        self.split, self.count = split, count
        self.classes = data.SEG_CLASSES
        if count < 1:
            raise DataError(f"dataset 'mini_scenes_seg': count is {count}, expected 1 or more")

    def __getitem__(self, index: int) -> Sample:
        scene = data.scene(self.split, self._index(index), augment=False)
        target = torch.from_numpy(scene.label_map.astype(np.int64))
        return Sample(_image(scene.image), target, f"{self.split}_{index:06d}")
