"""Detection data: the embedded scenes, and COCO and VOC folders as they are published.

COCO and VOC take `root`, the folder their files lie in or under; without it the environment variable `BENCH_DATA`
says where data lie, else `./data`. Nothing is downloaded, and files are read on first use.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

from bench.errors import DataError, WeightsError, unknown
from bench.protocols import Dataset, Sample
from bench.registry import DATASETS
from bench.weights import sha256_file
from tasks.detection.objects import Objects
from tasks.files import data_root

__all__ = ["Coco", "MiniScenes", "Voc"]

#: Class names of VOC, in mmdet's label order.
VOC_CLASSES: tuple[str, ...] = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


def _find(root: Path, names: Sequence[str], what: str) -> Path:
    """The first of `names` that exists under `root`.

    Raises:
        DataError: none does; says what to put where, and what runs without.
    """
    for name in names:
        if (root / name).exists():
            return root / name
    tried = ", ".join(str(root / name) for name in names[:3])
    raise DataError(
        f"{what} not found (looked for {tried}): download it by hand, unpack it there and give `root` or BENCH_DATA; "
        "the embedded dataset 'mini_scenes_det' needs no files"
    )


def read_image(path: Path) -> Tensor:
    """The RGB image (3, H, W) in [0,1] in `path`, decoded by OpenCV as mmdet does.

    Raises:
        DataError: the file is missing or no readable image.
    """
    import cv2

    if not path.is_file():
        raise DataError(f"image {path} does not exist")
    pixels = cv2.imdecode(np.frombuffer(path.read_bytes() or b"\0", dtype=np.uint8), cv2.IMREAD_COLOR)
    if pixels is None:
        raise DataError(f"image {path} cannot be read: it is no image, or damaged")
    return torch.from_numpy(np.ascontiguousarray(pixels[:, :, ::-1].transpose(2, 0, 1))).float() / 255


@DATASETS.register_module(name="mini_scenes_det")
class MiniScenes(Dataset):
    """Scenes of one to three handwritten digits on photographs, with boxes and masks; embedded, no files needed.

    Args:
        split: `train`, `val` or `test`; they share neither digits nor parts of the photographs.
        count: number of scenes.
        contrast: contrast of the digits in 1/255; the one the mini detectors are trained for unless given.
    """

    task: ClassVar[str] = "detection"

    def __init__(
        self, split: Literal["train", "val", "test"] = "test", count: int = 200, contrast: int | None = None
    ) -> None:
        from tasks.mini import data, zoo_detection

        if count < 1:
            raise DataError(f"dataset 'mini_scenes_det': count is {count}, expected 1 or more")
        self.split, self.count = split, count
        self.contrast = zoo_detection.CONTRAST if contrast is None else contrast
        self.classes = data.CLASSES

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        from tasks.mini import data

        if not 0 <= index < self.count:
            raise IndexError(index)
        scene = data.scene(self.split, index, contrast=self.contrast)
        image = torch.from_numpy(np.ascontiguousarray(scene.image.transpose(2, 0, 1))).float() / 255
        boxes = scene.boxes.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        size = (int(scene.image.shape[0]), int(scene.image.shape[1]))
        target = Objects(boxes, scene.labels, size, len(self.classes), masks=_encode(scene.masks))
        return Sample(image, target, f"{self.split}_{index:06d}")

    def ids(self) -> Sequence[str]:
        """`test_000000` and so on."""
        return [f"{self.split}_{index:06d}" for index in range(self.count)]

    def fingerprint(self) -> str:
        """Digest of the data sources and of what is drawn from them; scenes depend on their index alone."""
        from tasks.mini import data

        return hashlib.sha256(
            f"{data.fingerprint()} scenes {self.split} {self.contrast}".encode()
        ).hexdigest()


def _encode(masks: np.ndarray) -> tuple[dict[str, Any], ...]:
    from pycocotools import mask as coco_mask

    return tuple(coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks)


class _Files(Dataset):
    """Images in a folder, with annotations that are read once."""

    task: ClassVar[str] = "detection"

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Sample:
        path, target = self._index[index]
        image = read_image(path)
        if tuple(image.shape[1:]) != target.size:
            raise DataError(
                f"image {path} has {image.shape[2]}x{image.shape[1]} pixels, its annotation says "
                f"{target.size[1]}x{target.size[0]}"
            )
        return Sample(image, target, path.stem)

    def ids(self) -> Sequence[str]:
        """File names without suffix."""
        return [path.stem for path, _ in self._index]

    @functools.cached_property
    def _index(self) -> list[tuple[Path, Objects]]:
        return self._read()

    def _read(self) -> list[tuple[Path, Objects]]:
        raise NotImplementedError(f"{type(self).__name__} does not read annotations")


@DATASETS.register_module(name="coco")
class Coco(_Files):
    """COCO, or any data in its layout: `annotations/instances_SPLIT.json` and images in `SPLIT/` or `images/SPLIT/`.

    Labels follow the category ids in rising order, which is mmdet's order.

    Args:
        root: folder with `annotations`; see the module.
        split: such as `val2017`.
    """

    def __init__(self, root: str | None = None, split: str = "val2017") -> None:
        self.root, self.split = data_root(root), split

    @functools.cached_property
    def _annotations(self) -> Path:
        name = f"annotations/instances_{self.split}.json"
        return _find(self.root, [name, f"coco/{name}", f"COCO/{name}"], f"COCO {self.split}")

    @functools.cached_property
    def _content(self) -> Mapping[str, Any]:
        try:
            content = json.loads(self._annotations.read_text(encoding="utf-8"))
            missing = [key for key in ("images", "annotations", "categories") if key not in content]
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"annotations {self._annotations} cannot be read: {error}") from None
        if missing:
            raise DataError(
                f"annotations {self._annotations} lack {', '.join(missing)}: not in COCO's layout"
            )
        return content  # type: ignore[no-any-return]

    @property
    def classes(self) -> Sequence[str]:  # type: ignore[override]
        """Category names by rising id."""
        return [str(c["name"]) for c in sorted(self._content["categories"], key=lambda c: c["id"])]

    def fingerprint(self) -> str:
        """SHA-256 of the annotations, which name every image and its size."""
        return _digest(self._annotations)

    def _read(self) -> list[tuple[Path, Objects]]:
        base = self._annotations.parents[1]
        folder = _find(base, [self.split, f"images/{self.split}"], f"images of COCO {self.split}")
        labels = {
            c["id"]: k for k, c in enumerate(sorted(self._content["categories"], key=lambda c: c["id"]))
        }
        by_image: dict[Any, list[Mapping[str, Any]]] = {}
        for annotation in self._content["annotations"]:
            by_image.setdefault(annotation["image_id"], []).append(annotation)
        index = []
        try:
            for image in self._content["images"]:
                size = (int(image["height"]), int(image["width"]))
                index.append(
                    (folder / image["file_name"], _coco_objects(by_image.get(image["id"], []), size, labels))
                )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"annotations {self._annotations} are damaged: {type(error).__name__} {error}"
            ) from None
        return index


def _coco_objects(
    annotations: Sequence[Mapping[str, Any]], size: tuple[int, int], labels: Mapping[Any, int]
) -> Objects:
    masks: list[dict[str, Any]] = []
    for annotation in annotations:
        if annotation.get("segmentation"):
            masks.append(_run_lengths(annotation["segmentation"], size))
    return Objects(
        boxes=np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4),
        labels=np.array([labels[a["category_id"]] for a in annotations], dtype=np.int64),
        size=size,
        num_classes=len(labels),
        masks=tuple(masks) if len(masks) == len(annotations) else None,
        crowd=np.array([bool(a.get("iscrowd", 0)) for a in annotations], dtype=bool),
    )


def _run_lengths(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    from pycocotools import mask as coco_mask

    if isinstance(segmentation, list):
        encoded: dict[str, Any] = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
    elif isinstance(segmentation["counts"], list):
        encoded = coco_mask.frPyObjects(segmentation, *size)
    else:
        counts = segmentation["counts"]
        encoded = {"size": list(size), "counts": counts.encode() if isinstance(counts, str) else counts}
    return encoded


@DATASETS.register_module(name="voc")
class Voc(_Files):
    """PASCAL VOC, boxes only: `Annotations`, `JPEGImages` and `ImageSets/Main/SPLIT.txt`.

    Boxes count pixels from 1 in the files and from 0 here. Objects marked difficult are neither targets nor counted.

    Args:
        root: folder of the year (`VOC2007`), or one above; see the module.
        split: such as `test`.
        year: which year under `root`, or several, such as `2007+2012`.
        classes: class names in label order; VOC's twenty unless given.
    """

    def __init__(
        self,
        root: str | None = None,
        split: str = "test",
        year: str = "2007",
        classes: list[str] | None = None,
    ) -> None:
        self.root, self.split, self.year = data_root(root), split, year
        self.classes = tuple(classes) if classes else VOC_CLASSES

    def _folder(self, year: str) -> Path:
        name = f"VOC{year}"
        places = [name, f"VOCdevkit/{name}", f"voc/{name}", f"voc/VOCdevkit/{name}"]
        if year == self.year:
            places.insert(0, ".")
        split = f"ImageSets/Main/{self.split}.txt"
        return _find(self.root, [f"{place}/{split}" for place in places], f"{name} {self.split}").parents[2]

    @functools.cached_property
    def _names(self) -> list[tuple[Path, str]]:
        """Folder of the year and name of every image."""
        names = []
        for folder in map(self._folder, self.year.split("+")):
            path = folder / "ImageSets" / "Main" / f"{self.split}.txt"
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"list {path} cannot be read: {error}") from None
            found = [(folder, line.split()[0]) for line in lines if line.strip()]
            if not found:
                raise DataError(f"list {path} names no images")
            names += found
        return names

    def fingerprint(self) -> str:
        """SHA-256 over the annotations of the split, and the class names."""
        digest = hashlib.sha256(",".join(self.classes).encode())
        for folder, name in self._names:
            digest.update(f"\n{name} {_digest(folder / 'Annotations' / f'{name}.xml')}".encode())
        return digest.hexdigest()

    def _read(self) -> list[tuple[Path, Objects]]:
        return [
            (folder / "JPEGImages" / f"{name}.jpg", self._objects(folder / "Annotations" / f"{name}.xml"))
            for folder, name in self._names
        ]

    def _objects(self, path: Path) -> Objects:
        boxes, labels, difficult = [], [], []
        try:
            tree = ElementTree.fromstring(path.read_bytes())  # noqa: S314 - expat expands no external entities
            size = (int(_text(tree, "size/height")), int(_text(tree, "size/width")))
            for item in tree.findall("object"):
                label = _text(item, "name")
                if label not in self.classes:
                    raise DataError(f"annotation {path}: " + unknown("class", label, self.classes))
                x1, y1, x2, y2 = (
                    float(_text(item, f"bndbox/{key}")) - 1 for key in ("xmin", "ymin", "xmax", "ymax")
                )
                boxes.append((x1, y1, x2 - x1, y2 - y1))
                labels.append(self.classes.index(label))
                difficult.append((item.findtext("difficult") or "0").strip() == "1")
        except (OSError, ElementTree.ParseError, ValueError) as error:
            raise DataError(f"annotation {path} cannot be read: {error}") from None
        return Objects(
            boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
            labels=np.array(labels, dtype=np.int64),
            size=size,
            num_classes=len(self.classes),
            ignore=np.array(difficult, dtype=bool),
        )


def _text(node: ElementTree.Element, path: str) -> str:
    text = node.findtext(path)
    if text is None:
        raise ValueError(f"no <{path}> in <{node.tag}>")
    return text.strip()


def _digest(path: Path) -> str:
    try:
        return sha256_file(path)
    except WeightsError as error:
        raise DataError(str(error).replace("weights file", "annotation file")) from None
