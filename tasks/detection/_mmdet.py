"""mmdet's readers of COCO and VOC, made to keep every object with its box as annotated.

mmdet's classes read for training there: they leave out what its losses could not use, and cut the fractions off VOC's
boxes. Published evaluation counts those objects, and takes boxes as they are. So do the classes here: an instance also
has `box`, the annotated x, y, width and height, whose last bits mmdet's corners would lose.

Importing this imports mmdet, whose operators must be there: see `tasks.mm.ops`.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdet.datasets import CocoDataset, VOCDataset
from mmdet.datasets.api_wrappers import COCO

from bench.errors import DataError

__all__ = ["Box", "CocoReader", "VocReader"]

#: x, y, width, height, in pixels from 0.
Box = tuple[float, float, float, float]
#: Nothing is transformed, dropped or copied; `data_list` holds what is found.
_AS_FOUND: dict[str, Any] = {"pipeline": [], "test_mode": True, "filter_cfg": None, "serialize_data": False}


class CocoReader(CocoDataset):  # type: ignore[misc]
    """COCO's annotations, from content that has been validated.

    Args:
        content: what the file `ann_file` holds, parsed: `images`, `annotations`, each with an `id` of its own and
            without the key `ignore`, which COCO's evaluation does not heed, and `categories` in label order.
        arguments: of mmdet's class.
    """

    def __init__(self, content: dict[str, Sequence[Mapping[str, Any]]], **arguments: Any) -> None:
        self._content = content
        super().__init__(**_AS_FOUND, **arguments)

    def COCOAPI(self, _path: str) -> COCO:  # noqa: N802 - mmdet's name
        """The index that mmdet takes images, annotations and categories from, of the content rather than the file.

        So the file is read once, and mmdet sees what was validated: numbers that the file has as text, say.
        """
        index = COCO()
        index.dataset = self._content
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints what it does
            index.createIndex()
        return index

    def parse_data_info(self, raw_data_info: dict[str, Any]) -> dict[str, Any]:
        """One image with all its objects.

        mmdet leaves out boxes thinner than a pixel and objects without area. COCO's evaluation counts them, so mmdet
        sees a box and an area that it takes.
        """
        image, objects = raw_data_info["raw_img_info"], raw_data_info["raw_ann_info"]
        taken = {"bbox": (0, 0, image["width"], image["height"]), "area": 1}
        info: dict[str, Any] = super().parse_data_info(
            {"raw_img_info": image, "raw_ann_info": [{**item, **taken} for item in objects]}
        )
        for instance, item in zip(info["instances"], objects, strict=True):
            x, y, width, height = instance["box"] = item["bbox"]
            instance["bbox"] = [x, y, x + width, y + height]
        return info


class VocReader(VOCDataset):  # type: ignore[misc]
    """VOC's annotations, each file validated before mmdet reads it.

    Args:
        validated: the boxes of the objects in an annotation file; raises DataError where it is wrong.
        arguments: of mmdet's class.
    """

    def __init__(self, validated: Callable[[Path], Sequence[Box]], **arguments: Any) -> None:
        self._validated = validated
        super().__init__(**_AS_FOUND, **arguments)

    def load_data_list(self) -> list[dict[str, Any]]:
        """The images that the list names; a blank line is none."""
        return [info for info in super().load_data_list() if info is not None]

    def parse_data_info(self, img_info: dict[str, str]) -> dict[str, Any] | None:
        """One line of the list: the image it names with its objects, None for a blank one.

        mmdet takes the whole line for the name, while the lists of single classes have a second column, and cuts the
        fractions off boxes, which VOC has from 2011 on.
        """
        words = img_info["img_id"].split()
        if not words:
            return None
        path = Path(self.sub_data_root, self.ann_subdir, f"{words[0]}.xml")
        image = {"img_id": words[0], "file_name": f"{self.img_subdir}/{words[0]}.jpg", "xml_path": str(path)}
        boxes = self._validated(path)
        try:
            info: dict[str, Any] = super().parse_data_info(image)
        except ValueError as error:
            # Whole numbers only, where validation takes 30.0 for a size and yes for a mark.
            raise DataError(f"annotations {path} cannot be read: {error}") from None
        for instance, box in zip(info["instances"], boxes, strict=True):
            instance["box"] = box
        return info

    def _parse_instance_info(self, raw_ann_info: Any, minus_one: bool = True) -> list[dict[str, Any]]:
        # To mmdet a name with a line break in it would be another class, and its object none.
        for name in raw_ann_info.iterfind("object/name"):
            name.text = (name.text or "").strip()
        instances: list[dict[str, Any]] = super()._parse_instance_info(raw_ann_info, minus_one)
        return instances
