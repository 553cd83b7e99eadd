"""Crops of photographs nobody labelled, for trainings that need no labels."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import yaml
from PIL import Image
from pydantic import Field

from bench.errors import DataError
from bench.protocols import Dataset, ImageRNG, Sample
from bench.registry import DATASETS
from bench.weights import sha256_file
from tasks.files import IMAGE_SUFFIXES, UNLABELLED, data_root, fingerprint_files, read_image, to_image

__all__ = ["Photographs"]

#: The photographs by package, with the SHA-256 of each; `tools/photographs.sh` collects them.
LISTED = Path(__file__).with_name("photographs.yaml")

Pixels = Annotated[int, Field(ge=1)]


@DATASETS.register_module(name="photographs")
class Photographs(Dataset):
    """Random square crops of natural photographs, without labels (each says -1).

    Every photograph is reduced to `side` pixels on its shorter side. A crop shows a square of one to two times `size`
    pixels of it, at a place drawn by `seed`, reduced to `size`; the photographs take turns.

    Args:
        root: folder of the photographs; by default `photographs` under the data root.
        listed: take the files of the shipped list, and refuse others of their names, so that everybody trains on the
            same; false takes every image in the folder.
        size: pixels of each side of a crop.
        count: number of crops.
        side: pixels of the shorter side of a photograph before it is cropped.
        seed: of the crops.
    """

    task: ClassVar[str] = "classification"
    labelled: ClassVar[bool] = False
    classes = ()

    def __init__(
        self,
        root: str | None = None,
        listed: bool = True,
        size: Pixels = 128,
        count: Pixels = 1000,
        side: Pixels = 512,
        seed: Annotated[int, Field(ge=0)] = 0,
    ) -> None:
        if side < size:
            raise ValueError(f"side: {side} is less than size, {size}")
        self.root = Path(root).expanduser() if root else data_root(None) / "photographs"
        self.listed, self.size, self.count, self.side, self.seed = listed, size, count, side, seed
        self._kept: dict[str, Image.Image] = {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.count:
            raise IndexError(index)
        names = list(self._files)
        photograph = self._reduced(names[index % len(names)])
        scale, x, y = ImageRNG.for_images(("photographs", self.seed), [str(index)]).uniform((3,))[0].tolist()
        window = min(round(self.size * (1 + scale)), *photograph.size)
        left, top = (
            int(place * (full - window + 1)) for place, full in zip((x, y), photograph.size, strict=True)
        )
        crop = photograph.resize(
            (self.size, self.size), Image.Resampling.BICUBIC, (left, top, left + window, top + window)
        )
        return Sample(to_image(crop), UNLABELLED, str(index))

    def fingerprint(self) -> str:
        """Digest of the files and of how they are cropped; of the listed files as the list says, present or not."""
        files = (
            fingerprint_files((n, self.root / n) for n in self._files)
            if not self.listed
            else str(self._files)
        )
        return hashlib.sha256(f"{files} {self.size} {self.side} {self.seed}".encode()).hexdigest()

    def absent(self) -> list[str]:
        """Names of the listed photographs that are not there."""
        return [name for name in self._files if not (self.root / name).is_file()]

    @functools.cached_property
    def _files(self) -> Mapping[str, str]:
        """Name and SHA-256 ("" where any will do) of the photographs, in order."""
        if self.listed:
            packages: Mapping[str, Mapping[str, str]] = yaml.safe_load(LISTED.read_text(encoding="utf-8"))
            return dict(sorted(item for files in packages.values() for item in files.items()))
        if not self.root.is_dir():
            raise DataError(f"dataset photographs: {self.root} does not exist; expected a folder of images")
        found = sorted(p.name for p in self.root.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise DataError(f"dataset photographs: {self.root} holds no images")
        return dict.fromkeys(found, "")

    def _reduced(self, name: str) -> Image.Image:
        if name not in self._kept:
            self._kept[name] = self._read(self.root / name, self._files[name])
        return self._kept[name]

    def _read(self, path: Path, digest: str) -> Image.Image:
        if not path.is_file():
            raise DataError(
                f"dataset photographs: {path} does not exist; collect the photographs with "
                f"`bash tools/photographs.sh {self.root}`, or take your own with listed: false"
            )
        if digest and sha256_file(path) != digest:
            raise DataError(
                f"dataset photographs: {path} is not the listed photograph (its SHA-256 differs); collect it with "
                f"`bash tools/photographs.sh {self.root}`, or take what is there with listed: false"
            )
        image = read_image(path)
        scale = self.side / min(image.size)
        size: Any = tuple(max(self.side, round(length * scale)) for length in image.size)
        return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
