"""Writes scenes as COCO, VOC and Cityscapes folder trees, for the stock dataset classes of mmdet and mmseg.

Images are lossless: PNG everywhere. The VOC classes of mmdet insist on the suffix ``.jpg``; there the files hold PNG
data under that name, which every image reader accepts, since they look at the content.

A tree is written beside its place and renamed, and carries a marker with the SHA-256 of every file: a tree that is
incomplete, damaged or of other parameters is built again, whole ones are left alone. Several processes may ask for
the same tree at once.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image

from bench.errors import DataError, unknown
from tasks.mini import data

#: Name of the marker file inside a finished tree.
MARKER = "complete.json"
_VERSION = 1
Files = Iterator[tuple[str, bytes]]


def _png(array: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="png", compress_level=6)
    return buffer.getvalue()


def _palette_png(array: NDArray[np.uint8]) -> bytes:
    image = Image.fromarray(array, mode="P")
    # All 256 colours: with fewer, Pillow stores fewer bits and the ignore label 255 is lost. VOC's is off-white.
    colours = [*data.SEG_PALETTE, *[(224, 224, 192)] * (256 - len(data.SEG_PALETTE))]
    image.putpalette([value for colour in colours for value in colour])
    buffer = io.BytesIO()
    image.save(buffer, format="png", compress_level=6)
    return buffer.getvalue()


def rle(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """COCO's uncompressed run-length encoding of an ``(H, W)`` mask: column-major runs, zeros first."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate(([0], edges, [flat.size]))).tolist()
    return {"size": [int(mask.shape[0]), int(mask.shape[1])], "counts": ([0] if flat[0] else []) + runs}


def _coco(split: str, count: int, size: int, seed: int) -> Files:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        scene = data.scene(split, index, size, seed=seed)
        name = f"{split}_{index:06d}.png"
        images.append({"id": index + 1, "file_name": name, "height": size, "width": size})
        for box, label, mask in zip(scene.boxes.tolist(), scene.labels.tolist(), scene.masks, strict=True):
            x1, y1, x2, y2 = box
            annotations.append({
                "id": len(annotations) + 1, "image_id": index + 1, "category_id": label + 1, "iscrowd": 0,
                "bbox": [x1, y1, x2 - x1, y2 - y1], "area": int(mask.sum()), "segmentation": rle(mask),
            })  # fmt: skip
        yield f"images/{split}/{name}", _png(scene.image)
    document = {
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": k + 1, "name": name, "supercategory": "digit"} for k, name in enumerate(data.CLASSES)
        ],
    }
    yield f"annotations/instances_{split}.json", json.dumps(document).encode()


def _voc(split: str, count: int, size: int, seed: int) -> Files:
    names = []
    for index in range(count):
        scene = data.scene(split, index, size, seed=seed)
        name = f"{split}_{index:06d}"
        names.append(name)
        root = ElementTree.Element("annotation")
        ElementTree.SubElement(root, "filename").text = f"{name}.jpg"
        shape = ElementTree.SubElement(root, "size")
        for key, value in (("width", size), ("height", size), ("depth", 3)):
            ElementTree.SubElement(shape, key).text = str(value)
        for box, label in zip(scene.boxes.astype(int).tolist(), scene.labels.tolist(), strict=True):
            item = ElementTree.SubElement(root, "object")
            ElementTree.SubElement(item, "name").text = data.CLASSES[label]
            ElementTree.SubElement(item, "difficult").text = "0"
            bounds = ElementTree.SubElement(item, "bndbox")
            # VOC counts pixels from 1 and includes the last; readers subtract 1 from every bound.
            for key, value in zip(("xmin", "ymin", "xmax", "ymax"), (v + 1 for v in box), strict=True):
                ElementTree.SubElement(bounds, key).text = str(value)
        yield f"JPEGImages/{name}.jpg", _png(scene.image)
        yield f"SegmentationClass/{name}.png", _palette_png(scene.label_map)
        yield f"Annotations/{name}.xml", ElementTree.tostring(root)
    for kind in ("Main", "Segmentation"):
        yield f"ImageSets/{kind}/{split}.txt", "".join(f"{name}\n" for name in names).encode()


def _cityscapes(split: str, count: int, size: int, seed: int) -> Files:
    for index in range(count):
        scene = data.scene(split, index, size, seed=seed)
        name = f"mini_{index:06d}_000000"
        yield f"leftImg8bit/{split}/mini/{name}_leftImg8bit.png", _png(scene.image)
        yield f"gtFine/{split}/mini/{name}_gtFine_labelTrainIds.png", _png(scene.label_map)


FORMATS: dict[str, Callable[[str, int, int, int], Files]] = {
    "coco": _coco,
    "voc": _voc,
    "cityscapes": _cityscapes,
}


def _complete(tree: Path, description: dict[str, Any]) -> bool:
    try:
        marker = json.loads((tree / MARKER).read_text("utf-8"))
        if marker["description"] != description:
            return False
        return all(
            hashlib.sha256((tree / name).read_bytes()).hexdigest() == digest
            for name, digest in marker["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False  # whatever is wrong with it, the tree can be made again


def write_tree(
    root: Path, layout: str, split: str, count: int, *, size: int = data.SCENE_SIZE, seed: int = 0
) -> Path:
    """The folder tree of ``count`` scenes, built under ``root`` unless a whole one is there.

    Args:
        root: folder that holds the trees; made if missing.
        layout: ``coco``, ``voc`` or ``cityscapes``.
        split: ``train``, ``val`` or ``test``.
        count: number of scenes.
        size: height and width of the scenes.
        seed: seed of the scenes.

    Returns:
        The tree's folder, ``root/LAYOUT_SPLIT_COUNT_SIZE_SEED``. In it:

        * coco: ``images/SPLIT/*.png``, ``annotations/instances_SPLIT.json`` (run-length masks);
        * voc: ``JPEGImages``, ``Annotations``, ``SegmentationClass``, ``ImageSets/{Main,Segmentation}/SPLIT.txt``;
        * cityscapes: ``leftImg8bit/SPLIT/mini``, ``gtFine/SPLIT/mini/*_labelTrainIds.png``.

    Raises:
        DataError: unknown layout or split, no scenes asked for, or the folder cannot be written.
    """
    if layout not in FORMATS:
        raise DataError(unknown("layout", layout, FORMATS))
    if split not in data.SPLITS:
        raise DataError(unknown("split", split, data.SPLITS))
    if count < 1:
        raise DataError(f"count: {count} scenes asked for, expected 1 or more")
    tree = root / f"{layout}_{split}_{count}_{size}_{seed}"
    description = {
        "version": _VERSION, "layout": layout, "split": split, "count": count, "size": size, "seed": seed,
        "data": data.fingerprint(),
    }  # fmt: skip
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{tree.name}.lock"):
            if _complete(tree, description):
                return tree
            building = Path(tempfile.mkdtemp(prefix=f".{tree.name}.", dir=root))
            try:
                digests: dict[str, str] = {}
                for name, content in FORMATS[layout](split, count, size, seed):
                    path = building / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
                    digests[name] = hashlib.sha256(content).hexdigest()
                (building / MARKER).write_text(
                    json.dumps({"description": description, "files": digests}), "utf-8"
                )
                building.chmod(0o755)
                if tree.exists():
                    shutil.rmtree(tree)
                building.replace(tree)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        raise DataError(f"{root}: cannot write the {layout} tree ({error.strerror or error})") from None
    return tree
