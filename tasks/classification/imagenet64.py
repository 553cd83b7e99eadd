"""Downsampled ImageNet, 64x64, from the batches it is published in."""

from __future__ import annotations

import functools
import itertools
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bench.errors import DataError
from bench.registry import DATASETS
from tasks.classification.datasets import Published
from tasks.files import data_root

__all__ = ["ImageNet64"]

_SIZE = 64
_BATCHES = 10


@DATASETS.register_module(name="imagenet64")
class ImageNet64(Published):
    """ImageNet-1k reduced to 64x64 pixels (Chrabaszcz et al. 2017): `val_data`, `train_data_batch_1` to `10`.

    The batches are read as `.npz` files, or as pickles that may hold arrays and plain values only: whatever else one
    asks for is refused before it is made. They number classes from 1 in the order of ILSVRC's development kit; here
    labels follow the WordNet ids, as in dataset `imagenet` and in published models.

    Args:
        root: folder of the batches, or the one above `imagenet64`.
        split: `val` or `train`.
        batches: how many of the ten training batches to read; each takes 1.6 GB of memory.
    """

    title = "the extracted Imagenet64_val and Imagenet64_train archives (pickles or .npz)"
    folders = (".", "imagenet64")

    def __init__(
        self, root: str | None = None, split: Literal["val", "train"] = "val", batches: int = _BATCHES
    ) -> None:
        if not 1 <= batches <= _BATCHES:
            raise ValueError(f"batches: {batches} is not 1 to {_BATCHES}")
        self.root = data_root(root)
        self.names = (
            ["val_data"] if split == "val" else [f"train_data_batch_{k}" for k in range(1, batches + 1)]
        )

    @functools.cached_property
    def classes(self) -> Sequence[str]:  # type: ignore[override]
        """The thousand class names in label order."""
        from torchvision.models._meta import _IMAGENET_CATEGORIES

        return list(_IMAGENET_CATEGORIES)

    def _files(self) -> Sequence[str]:
        return [name + self._suffix for name in self.names]

    @functools.cached_property
    def _suffix(self) -> str:
        places = (self.root / folder / f"{self.names[0]}.npz" for folder in self.folders)
        return ".npz" if any(path.is_file() for path in places) else ""

    def _open(self, folder: Path) -> tuple[Sequence[np.ndarray], Sequence[int]]:
        parts = [self._batch(folder / name) for name in self._files()]
        # Views of single images: joining the training batches would take their 16 GB a second time.
        images = list(itertools.chain.from_iterable(images for images, _ in parts))
        return images, _wordnet_order()[np.concatenate([labels for _, labels in parts]) - 1].tolist()

    def _batch(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """Images (N, 64, 64, 3) and labels 1 to 1000 of one file."""
        where = f"dataset {self._name()}: {path}"
        try:
            data, labels = _read_npz(path) if self._suffix else _read_pickle(path)
        except _Refused as error:
            raise DataError(
                f"{where} is refused: its pickle asks for {error}, and code in data is never run"
            ) from None
        except Exception as error:
            # A damaged file can make pickle, zipfile and numpy raise anything.
            raise DataError(f"{where} cannot be read: {type(error).__name__}: {error}") from None
        if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * _SIZE * _SIZE:
            raise DataError(
                f"{where} holds data {data.shape} {data.dtype}, expected (N, {3 * _SIZE * _SIZE}) uint8"
            )
        if labels.shape != (len(data),) or labels.dtype.kind not in "iu":
            raise DataError(f"{where} holds {len(data)} images, expected as many whole numbers as labels")
        wrong = labels[(labels < 1) | (labels > 1000)]
        if len(wrong):
            raise DataError(f"{where} holds label {wrong[0]}, expected 1 to 1000")
        return data.reshape(-1, 3, _SIZE, _SIZE).transpose(0, 2, 3, 1), labels


@functools.cache
def _wordnet_order() -> np.ndarray:
    """Label of each class of the development kit: its place among the sorted WordNet ids."""
    ids: list[str] = json.loads(Path(__file__).with_name("imagenet_devkit.json").read_text(encoding="utf-8"))
    return np.argsort(np.argsort(ids))


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path, allow_pickle=False) as content:
        return content["data"], content["labels"]


def _read_pickle(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with path.open("rb") as file:
        content = _Unpickler(file, encoding="latin1").load()
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}, expected a dictionary")
    return np.asarray(content["data"]), np.asarray(content["labels"])


class _Refused(Exception):
    """A pickle asked for something that is no array."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """What a pickled array is made of, and nothing else."""
        wanted = f"{module.replace('numpy.core', 'numpy._core')}.{name}"
        if wanted not in _ALLOWED:
            raise _Refused(f"{module}.{name}")
        return _ALLOWED[wanted]


def _encode(text: str, _encoding: str) -> bytes:
    # How protocol 2, which has no bytes, writes them.
    return text.encode("latin1")


#: Names that pickles of arrays use, by protocol 2 to 5; numpy 1 says `numpy.core`.
_ALLOWED: dict[str, type | Callable[..., Any]] = {
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "numpy._core.multiarray._reconstruct": np.empty(0).__reduce__()[0],  # type: ignore[dict-item]
    "numpy._core.numeric._frombuffer": np.empty(1).__reduce_ex__(5)[0],  # type: ignore[dict-item]
    "_codecs.encode": _encode,
}
