"""The task `detection`: boxes (and instance masks), judged by COCO's mean average precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from bench.protocols import Metric, Task
from bench.registry import METRICS, TASKS
from tasks.detection.objects import THRESHOLDS, Detections, Objects, match

__all__ = ["BoxMAP", "BoxMAP50", "Detection", "MaskMAP", "MaskMAP50"]

#: Recall levels 0:.01:1, as pycocotools computes them.
_RECALLS: np.ndarray = np.linspace(0.0, 1.00, int(np.round((1.00 - 0.0) / 0.01)) + 1, endpoint=True)


@TASKS.register_module(name="detection")
class Detection(Task):
    """Objects with a class, a box and, where model and dataset have them, a mask.

    Rows hold, for boxes and for masks, every detection's score and whether it is matched at IoU .5:.05:.95, with the
    number of objects: what COCO's average precision is made of. `score` is the image's own average precision of boxes
    at IoU 0.5, averaged over the classes it shows; for an image without objects, 1 minus the highest score of a
    detection, all of which are false.
    """

    metrics: ClassVar[tuple[str, ...]] = ("box_map50", "box_map", "mask_map50", "mask_map")
    losses: ClassVar[tuple[str, ...]] = ("cls", "loc", "cls+loc", "mask", "total")
    batch_size: ClassVar[int] = 8

    def rows(self, prediction: Any, target: Any) -> dict[str, Any]:
        """`score`, `box` and `mask` (None where model or dataset has no masks) and `objects`, the number of objects."""
        if not isinstance(prediction, Detections) or not isinstance(target, Objects):
            raise TypeError("detection compares Detections with Objects")
        boxes = match(prediction, target, "box")
        masks = None
        if prediction.masks is not None and target.masks is not None:
            masks = match(prediction, target, "mask")
        objects = sum(entry["n"] for entry in boxes)
        if objects:
            score = average_precision(_gather([boxes]), thresholds=1)
        else:
            score = 1.0 - max((s for entry in boxes for s, g in zip(entry["s"], entry["g"], strict=True) if not g & 1),
                              default=0.0)  # fmt: skip
        return {"score": float(score), "objects": objects, "box": boxes, "mask": masks}


@dataclass(frozen=True)
class _Class:
    """One class over all images; detections in order of falling score.

    Attributes:
        image: (D,) index of each detection's image.
        true, false: (T, D) whether it is a true or false positive at each IoU threshold; neither when ignored.
        count: (n_images,) objects of the class.
    """

    image: np.ndarray
    true: np.ndarray
    false: np.ndarray
    count: np.ndarray


def _gather(rows: Sequence[Sequence[Mapping[str, Any]]]) -> list[_Class]:
    """All images' matches by class; classes without any object are left out, as COCO leaves them out of its mean."""
    by_class: dict[int, list[tuple[int, Mapping[str, Any]]]] = {}
    for index, entries in enumerate(rows):
        for entry in entries:
            by_class.setdefault(entry["c"], []).append((index, entry))
    bits = (1 << np.arange(len(THRESHOLDS)))[:, None]
    result = []
    for label in sorted(by_class):
        entries_of = by_class[label]
        count = np.zeros(len(rows))
        for index, entry in entries_of:
            count[index] = entry["n"]
        if not count.any():
            continue
        image = np.concatenate([np.full(len(entry["s"]), index) for index, entry in entries_of]).astype(
            np.int64
        )
        scores, matched, ignored = (
            np.concatenate([np.asarray(entry[key], dtype=kind) for _, entry in entries_of])
            for key, kind in (("s", np.float64), ("m", np.int64), ("g", np.int64))
        )
        order = np.argsort(-scores, kind="mergesort")
        hit, out = (matched[order] & bits) != 0, (ignored[order] & bits) != 0
        result.append(_Class(image[order], hit & ~out, ~hit & ~out, count))
    return result


def average_precision(
    classes: Sequence[_Class], *, thresholds: int = len(THRESHOLDS), weights: np.ndarray | None = None
) -> float:
    """Mean over classes and the first `thresholds` IoU thresholds of the 101-point interpolated average precision.

    The same sums as COCOeval.accumulate. `weights` counts how often each image is in the sample; a repeated detection
    moves along the precision-recall curve without adding a recall level of its own, so weighting equals repeating.

    Returns:
        A value in [0,1], or NaN when no class has an object.
    """
    values = []
    for item in classes:
        weight = np.ones(len(item.count)) if weights is None else np.asarray(weights, dtype=np.float64)
        objects = float(weight @ item.count)
        if objects == 0:
            continue
        each = weight[item.image]
        for t in range(thresholds):
            true = np.cumsum(item.true[t] * each)
            false = np.cumsum(item.false[t] * each)
            recall = true / objects
            precision = true / (false + true + np.spacing(1))
            # The highest precision at this recall or beyond.
            envelope = np.maximum.accumulate(precision[::-1])[::-1]
            at = np.searchsorted(recall, _RECALLS, side="left")
            values.append(float(np.mean(np.append(envelope, 0.0)[at])))
    return float(np.mean(values)) if values else float("nan")


class _MAP(Metric):
    """Mean average precision of COCO (area all, at most 100 detections of a class in an image)."""

    task: ClassVar[str] = "detection"
    kind: ClassVar[str]
    thresholds: ClassVar[int]

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> list[_Class] | None:
        """Matches gathered by class; None when an image has none of this kind."""
        found = [row[self.kind] for row in rows]
        return None if any(entries is None for entries in found) else _gather(found)

    def value(self, prepared: Any, weights: np.ndarray | None = None) -> float:
        """The metric in [0,1]; NaN without objects, or without masks where masks are judged."""
        if prepared is None:
            return float("nan")
        return average_precision(prepared, thresholds=self.thresholds, weights=weights)


@METRICS.register_module(name="box_map50")
class BoxMAP50(_MAP):
    """Box mAP at IoU 0.5."""

    kind: ClassVar[str] = "box"
    thresholds: ClassVar[int] = 1


@METRICS.register_module(name="box_map")
class BoxMAP(_MAP):
    """Box mAP averaged over IoU 0.5:0.05:0.95."""

    kind: ClassVar[str] = "box"
    thresholds: ClassVar[int] = len(THRESHOLDS)


@METRICS.register_module(name="mask_map50")
class MaskMAP50(_MAP):
    """Mask mAP at IoU 0.5."""

    kind: ClassVar[str] = "mask"
    thresholds: ClassVar[int] = 1


@METRICS.register_module(name="mask_map")
class MaskMAP(_MAP):
    """Mask mAP averaged over IoU 0.5:0.05:0.95."""

    kind: ClassVar[str] = "mask"
    thresholds: ClassVar[int] = len(THRESHOLDS)
