"""Detection data: the embedded scenes, and COCO and VOC folders as they are published, read by mmdet's own classes.

COCO and VOC take `root`, the folder their files lie in or under; without it the environment variable `BENCH_DATA`
says where data lie, else `./data`. Nothing is downloaded, and files are read on first use.

What is wrong in a file gets one line that names the entry, where mmdet would skip it or fail: files are validated here
before mmdet's classes list images and parse annotations, and what those find becomes `Objects`. `_mmdet` says what they
would leave out of published data and do not here.
"""

from __future__ import annotations

import functools
import hashlib
import reprlib
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal
from xml.etree import ElementTree

import numpy as np
import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveInt,
    Tag,
    ValidationError,
    ValidationInfo,
)
from torch import Tensor

from bench.errors import DataError, WeightsError, expected, unknown
from bench.protocols import Dataset, Sample
from bench.registry import DATASETS
from bench.weights import sha256_file
from tasks.detection.objects import Objects
from tasks.files import data_root

if TYPE_CHECKING:
    from tasks.detection._mmdet import Box

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


def _runs(counts: Any) -> Any:
    """Run lengths from pycocotools' compressed text (`rleFrString` of its maskApi.c); anything else as it is.

    Raises:
        ValueError: a character that such text cannot hold, or an end within a number.
    """
    if not isinstance(counts, str):
        return counts
    runs: list[int] = []
    value = shift = 0
    for digit in (ord(character) - 48 for character in counts):
        if not 0 <= digit < 64:
            raise ValueError("not run lengths as pycocotools writes them")
        value |= (digit & 31) << shift
        shift += 5
        if not digit & 32:
            value -= (digit & 16) << (shift - 4)
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    if shift:
        raise ValueError("run lengths end within a number")
    return runs


def _entries(entries: list[Any], info: ValidationInfo) -> list[Any]:
    if not entries:
        raise ValueError(f"holds no {info.field_name}")
    number, count = Counter(entry.id for entry in entries).most_common(1)[0]
    if count > 1:
        raise ValueError(f"the id {number!r} is there {count} times, expected once")
    return entries


class _CocoImage(BaseModel):
    id: int | str
    file_name: str
    height: PositiveInt
    width: PositiveInt


class _CocoCategory(BaseModel):
    id: int
    name: str


class _RunLengths(BaseModel):
    size: tuple[int, int]
    counts: Annotated[list[NonNegativeInt], BeforeValidator(_runs)]


class _CocoObject(BaseModel):
    image_id: int | str
    category_id: int
    bbox: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]
    iscrowd: bool = False
    segmentation: (
        Annotated[
            Annotated[_RunLengths, Tag("RLE")] | Annotated[list[list[FiniteFloat]], Tag("polygons")],
            Discriminator(lambda value: "RLE" if isinstance(value, dict) else "polygons"),
        ]
        | None
    ) = None


class _CocoFile(BaseModel):
    images: Annotated[list[_CocoImage], AfterValidator(_entries)]
    annotations: list[_CocoObject]
    categories: Annotated[list[_CocoCategory], AfterValidator(_entries)]


class _VocSize(BaseModel):
    width: PositiveInt
    height: PositiveInt


class _VocBounds(BaseModel):
    xmin: FiniteFloat
    ymin: FiniteFloat
    xmax: FiniteFloat
    ymax: FiniteFloat


class _VocObject(BaseModel):
    name: str
    difficult: bool = False
    bndbox: _VocBounds


class _VocFile(BaseModel):
    size: _VocSize
    objects: list[_VocObject] = Field(alias="object")


def _wrong(path: Path, where: str, what: str) -> DataError:
    return DataError(f"annotations {path}: {where}: {what}")


def _damaged(path: Path, error: OSError | ElementTree.ParseError | ValidationError) -> DataError:
    """The first fault of the annotations in `path`, as one line."""
    if not isinstance(error, ValidationError):
        return DataError(f"annotations {path} cannot be read: {error}")
    fault = error.errors(include_url=False)[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"])
    what = expected(fault["msg"])
    if not where:
        return DataError(f"annotations {path} cannot be read: {what}")
    if fault["type"] == "missing":
        what = "required, but missing"
    elif fault["type"] != "value_error":
        what += f", not {reprlib.repr(fault['input'])}"
    return _wrong(path, where.lstrip("."), what)


def _check_box(box: Sequence[float], size: tuple[int, int]) -> None:
    """Refuse a box x, y, width, height, in pixels from 0, that cannot lie in an image of `size` (H, W).

    Published data have boxes of no area, and edges that lie a little outside: those pass.

    Raises:
        ValueError: it has a negative side, misses the image, or reaches beyond it by more than half its size.
    """
    for axis, first, length, pixels in zip("xy", box[:2], box[2:], reversed(size), strict=True):
        last = first + length
        if length < 0 or first > pixels or last < 0 or first < -pixels / 2 or last > 1.5 * pixels:
            raise ValueError(
                f"the box goes from {axis} = {first:g} to {last:g} as counted from 0, "
                f"expected rising values in 0..{pixels}"
            )


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
        return [(Path(info["img_path"]), self._objects(info)) for info in self._infos()]

    def _infos(self) -> Iterable[dict[str, Any]]:
        """What mmdet's class says of each image."""
        raise NotImplementedError(f"{type(self).__name__} does not read annotations")

    def _objects(self, info: dict[str, Any]) -> Objects:
        """The objects of an image, all of which count."""
        instances = info["instances"]
        return Objects(
            boxes=np.array([item["box"] for item in instances], dtype=np.float64).reshape(-1, 4),
            labels=np.array([item["bbox_label"] for item in instances], dtype=np.int64),
            size=(info["height"], info["width"]),
            num_classes=len(self.classes),
        )


def _flags(info: dict[str, Any]) -> np.ndarray:
    """(N,) bool: what mmdet ignores, COCO's crowds and VOC's difficult objects."""
    return np.array([item["ignore_flag"] for item in info["instances"]], dtype=bool)


def _readers() -> ModuleType:
    """`_mmdet`, which imports mmdet."""
    from tasks.mm import ops

    ops.install()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tasks.detection import _mmdet
    return _mmdet


@DATASETS.register_module(name="coco")
class Coco(_Files):
    """COCO, or any data in its layout: `annotations/instances_SPLIT.json` and images in `SPLIT/` or `images/SPLIT/`.

    Labels follow the category ids in rising order, which is mmdet's order. Boxes thinner than a pixel, which published
    files have, stay: COCO's evaluation counts them, and losses leave them out as mmdet does.

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
    def _content(self) -> _CocoFile:
        try:
            return _CocoFile.model_validate_json(self._annotations.read_bytes())
        except (OSError, ValidationError) as error:
            raise _damaged(self._annotations, error) from None

    @functools.cached_property
    def _categories(self) -> list[_CocoCategory]:
        return sorted(self._content.categories, key=lambda category: category.id)

    @functools.cached_property
    def classes(self) -> Sequence[str]:  # type: ignore[override]
        """Category names by rising id."""
        return [category.name for category in self._categories]

    def fingerprint(self) -> str:
        """SHA-256 of the annotations, which name every image and its size."""
        return _digest(self._annotations)

    def _infos(self) -> Iterable[dict[str, Any]]:
        base = self._annotations.parents[1]
        folder = _find(base, [self.split, f"images/{self.split}"], f"images of COCO {self.split}")
        self._check_objects()
        content = {
            "images": [dict(image) for image in self._content.images],
            # The place in the file is an id that every entry has and no two share; files may lack their own.
            "annotations": [dict(item) | {"id": k} for k, item in enumerate(self._content.annotations)],
            # mmdet labels in the order of the file, which for published files is this one.
            "categories": [dict(category) for category in self._categories],
        }
        reader = _readers().CocoReader(
            content,
            ann_file=str(self._annotations),
            data_prefix={"img": str(folder)},
            metainfo={"classes": self.classes},
        )
        infos: list[dict[str, Any]] = reader.data_list
        return infos

    def _check_objects(self) -> None:
        """Refuse the first object of no image or category, or whose box or mask cannot be its image's."""
        sizes = {image.id: (image.height, image.width) for image in self._content.images}
        categories = {category.id for category in self._categories}
        for number, item in enumerate(self._content.annotations):
            key = "image_id"
            try:
                if item.image_id not in sizes:
                    raise ValueError(f"{item.image_id!r} is the id of no image in the file")
                key = "category_id"
                if item.category_id not in categories:
                    raise ValueError(f"{item.category_id!r} is the id of no category in the file")
                key = "bbox"
                _check_box(item.bbox, sizes[item.image_id])
                key = "segmentation"
                if item.segmentation:
                    _check_mask(item.segmentation, sizes[item.image_id])
            except ValueError as error:
                raise _wrong(self._annotations, f"annotations[{number}].{key}", str(error)) from None

    def _objects(self, info: dict[str, Any]) -> Objects:
        objects = super()._objects(info)
        masks = [_run_lengths(item["mask"], objects.size) for item in info["instances"] if "mask" in item]
        return replace(
            objects, masks=tuple(masks) if len(masks) == len(objects) else None, crowd=_flags(info)
        )


def _polygons(segmentation: list[list[float]]) -> list[list[float]]:
    """Those of three points or more, as mmdet does: pycocotools takes four numbers for a box."""
    return [points for points in segmentation if len(points) >= 6 and len(points) % 2 == 0]


def _check_mask(segmentation: _RunLengths | list[list[float]], size: tuple[int, int]) -> None:
    """Refuse a mask that cannot be drawn in an image of `size` (H, W).

    Raises:
        ValueError: nothing to draw, or run lengths of another image size.
    """
    if isinstance(segmentation, list):
        if not _polygons(segmentation):
            raise ValueError(
                "no polygon has three points or more, expected [[x1, y1, x2, y2, x3, y3, ...], ...]"
            )
        return
    # pycocotools checks neither, and reads memory that is not its own where run lengths fall short.
    if segmentation.size != size:
        raise ValueError(f"size is {list(segmentation.size)}, expected the image's {list(size)}")
    if (total := sum(segmentation.counts)) != size[0] * size[1]:
        raise ValueError(f"counts cover {total} pixels, expected the image's {size[0] * size[1]}")


def _run_lengths(segmentation: _RunLengths | list[list[float]], size: tuple[int, int]) -> dict[str, Any]:
    """The mask as pycocotools keeps it."""
    from pycocotools import mask as coco_mask

    encoded: dict[str, Any]
    if isinstance(segmentation, list):
        encoded = coco_mask.merge(coco_mask.frPyObjects(_polygons(segmentation), *size))
    else:
        encoded = coco_mask.frPyObjects(segmentation.model_dump(), *size)
    return encoded


def _year(value: Any) -> Any:
    """YAML reads a year as a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


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
        year: Annotated[str, BeforeValidator(_year)] = "2007",
        classes: list[str] | None = None,
    ) -> None:
        self.root, self.split, self.year = data_root(root), split, year
        self._list = f"ImageSets/Main/{split}.txt"
        self.classes = tuple(classes) if classes else VOC_CLASSES

    def _folder(self, year: str) -> Path:
        name = f"VOC{year}"
        places = [name, f"VOCdevkit/{name}", f"voc/{name}", f"voc/VOCdevkit/{name}"]
        if year == self.year:
            places.insert(0, ".")
        return _find(
            self.root, [f"{place}/{self._list}" for place in places], f"{name} {self.split}"
        ).parents[2]

    @functools.cached_property
    def _lists(self) -> list[tuple[Path, list[str]]]:
        """Folder of each year and the images that its list names."""
        lists = []
        for folder in map(self._folder, self.year.split("+")):
            path = folder / self._list
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"list {path} cannot be read: {error}") from None
            names = [line.split()[0] for line in lines if line.strip()]
            if not names:
                raise DataError(f"list {path} names no images")
            lists.append((folder, names))
        return lists

    def fingerprint(self) -> str:
        """SHA-256 over the annotations of the split, and the class names."""
        digest = hashlib.sha256(",".join(self.classes).encode())
        for folder, names in self._lists:
            for name in names:
                digest.update(f"\n{name} {_digest(folder / 'Annotations' / f'{name}.xml')}".encode())
        return digest.hexdigest()

    def _infos(self) -> Iterable[dict[str, Any]]:
        for folder, _ in self._lists:
            reader = _readers().VocReader(
                self._boxes,
                ann_file=str(folder / self._list),
                data_prefix={"sub_data_root": str(folder)},
                metainfo={"classes": self.classes},
            )
            yield from reader.data_list

    def _boxes(self, path: Path) -> list[Box]:
        """The boxes in `path`, of objects that mmdet's class will all find there."""
        try:
            tree = ElementTree.fromstring(path.read_bytes())  # noqa: S314 - expat expands no external entities
            content = _VocFile.model_validate(
                {
                    "size": _texts(tree.find("size")),
                    "object": [
                        _texts(o) | {"bndbox": _texts(o.find("bndbox"))} for o in tree.iterfind("object")
                    ],
                }
            )
        except (OSError, ElementTree.ParseError, ValidationError) as error:
            raise _damaged(path, error) from None
        boxes = []
        for number, item in enumerate(content.objects):
            if item.name not in self.classes:
                raise _wrong(path, f"object[{number}].name", unknown("class", item.name, self.classes))
            bounds = item.bndbox
            box = (bounds.xmin - 1, bounds.ymin - 1, bounds.xmax - bounds.xmin, bounds.ymax - bounds.ymin)
            try:
                _check_box(box, (content.size.height, content.size.width))
            except ValueError as error:
                raise _wrong(path, f"object[{number}].bndbox", str(error)) from None
            boxes.append(box)
        return boxes

    def _objects(self, info: dict[str, Any]) -> Objects:
        return replace(super()._objects(info), ignore=_flags(info))


def _texts(node: ElementTree.Element | None) -> dict[str, Any]:
    # The first of a tag, as mmdet takes it.
    return {} if node is None else {child.tag: (child.text or "").strip() for child in reversed(node)}


def _digest(path: Path) -> str:
    try:
        return sha256_file(path)
    except WeightsError as error:
        raise DataError(str(error).replace("weights file", "annotation file")) from None
