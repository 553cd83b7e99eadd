"""The task `detection`: boxes (and instance masks), judged by COCO's mean average precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np

from bench.protocols import ImageRNG, Metric, Task
from bench.registry import METRICS, TASKS
from tasks.detection.objects import THRESHOLDS, Detections, Objects, match
from tasks.targets import check_rule, check_wrong, wrong_classes

__all__ = ["BoxMAP", "BoxMAP50", "Detection", "MaskMAP", "MaskMAP50"]

#: What is drawn: detections, or ground truth.
_Found = TypeVar("_Found", Detections, Objects)

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
    losses: ClassVar[tuple[str, ...]] = (
        "cls", "loc", "cls+loc", "mask", "total", "objectness", "emptiness", "swap",
    )  # fmt: skip
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
            score = average_precision(_gather([boxes], 1), np.ones((1, 1)))[0]
        else:
            score = 1.0 - max((s for entry in boxes for s, g in zip(entry["s"], entry["g"], strict=True) if not g & 1),
                              default=0.0)  # fmt: skip
        return {"score": float(score), "objects": objects, "box": boxes, "mask": masks}

    def draw(self, axes: Any, prediction: Any, classes: Sequence[str]) -> str:
        """Boxes of detections that score at least 0.3 (all of ground truth), masks filled; the caption counts them."""
        import matplotlib
        from matplotlib.patches import Rectangle

        shown: Detections | Objects = _shown(prediction)
        palette = matplotlib.colormaps["tab10"]
        boxes = shown.boxes.cpu().numpy() if isinstance(shown, Detections) else shown.corners()
        masks = (
            shown.masks.cpu().numpy() if isinstance(shown, Detections) and shown.masks is not None else None
        )
        for (x1, y1, x2, y2), label in zip(boxes, shown.labels, strict=True):
            colour = palette(int(label) % 10)
            axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.5))
        for mask, label in zip(() if masks is None else masks, shown.labels, strict=masks is not None):
            layer = np.zeros((*mask.shape, 4))
            layer[mask] = (*palette(int(label) % 10)[:3], 0.45)
            axes.imshow(layer, interpolation="none")
        names = _names(shown, classes)
        for (x, y), name, label in zip(_places(boxes, names, axes), names, shown.labels, strict=True):
            box = {"color": palette(int(label) % 10), "pad": 0.5}
            axes.text(x, y, name, color="white", fontsize=6, va="bottom", bbox=box)
        return f"{len(boxes)} found" if isinstance(shown, Detections) else ""

    def words(self, prediction: Any, classes: Sequence[str]) -> str:
        """The classes of what `draw` shows, with the scores of detections."""
        return ", ".join(_names(_shown(prediction), classes))

    def verdict(self, prediction: Any, target: Any) -> str:
        """How many objects what `draw` shows has found (class, and IoU of boxes 0.5), and how much of it is false."""
        entries = match(_shown(prediction), target, "box")
        hits = [
            bool(m & 1) for entry in entries for m, g in zip(entry["m"], entry["g"], strict=True) if not g & 1
        ]
        objects = sum(entry["n"] for entry in entries)
        return f"{sum(hits)} of {objects} right, {len(hits) - sum(hits)} false"

    def check_target(self, rule: str, num_classes: int) -> None:
        check_rule(rule, self.name, num_classes)

    def attack_targets(
        self, rule: str, targets: Sequence[Any], num_classes: int, rng: ImageRNG
    ) -> tuple[Objects, ...]:
        """The objects with wrong labels by `rule` (`tasks.targets.wrong_classes`); boxes and masks stay.

        Raises:
            GridError: unknown rule, a class the model does not have, or a target equal to the class of all objects
                of an image.
        """
        wanted = []
        for target, wrong in zip(targets, wrong_classes(rule, self.name, num_classes, rng), strict=True):
            counted = ~target.skipped()
            check_wrong(rule, target.labels[counted], wrong[target.labels[counted]])
            wanted.append(target.relabelled(wrong[target.labels]))
        return tuple(wanted)


def _shown(prediction: _Found) -> _Found:
    if isinstance(prediction, Detections):
        return prediction.above(0.3)
    return prediction


def _names(shown: Detections | Objects, classes: Sequence[str]) -> list[str]:
    names = [classes[int(label)] for label in shown.labels]
    if isinstance(shown, Objects):
        return names
    return [f"{name} {score:.1f}" for name, score in zip(names, shown.scores.tolist(), strict=True)]


def _places(boxes: np.ndarray, names: Sequence[str], axes: Any) -> list[tuple[float, float]]:
    """Where labels start (left, bottom): above their boxes, or where they hide no other and stay in the image.

    Their sizes are those of 6 point letters in a panel of about 2 inches.
    """
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    unit = max(abs(right - left), abs(bottom - top))
    high = 0.075 * unit
    taken: list[tuple[float, float, float]] = []
    for (x1, y1, _, y2), name in zip(boxes.tolist(), names, strict=True):
        wide = unit * (0.03 * len(name) + 0.02)
        x = min(max(x1, left), right - wide)
        inside = [y1 + (k + 1) * high for k in range(3)]
        choices = [y for y in (y1, y2 + high, *inside) if top + high <= y <= bottom] or [y1]
        free = [
            y
            for y in choices
            if not any(abs(y - other) < high and x < end and start < x + wide for start, end, other in taken)
        ]
        y = (free or choices)[0]
        taken.append((x, x + wide, y))
    return [(x, y) for x, _, y in taken]


@dataclass(frozen=True)
class _Curves:
    """The precision-recall curves of a set of images: one for each class and IoU threshold, laid end to end.

    Only what moves a curve is kept: true and false positives in order of falling score, up to a curve's last true
    positive (behind it recall stands still and precision only falls).

    Attributes:
        image: (E,) index of each detection's image.
        true: (E,) whether it is a true positive; a false one otherwise.
        at: (M,) places of the true positives in `image`.
        start: (M,) where the curve of each true positive starts in `image`.
        curve, slot: (M,) the curve of each true positive, and its place among that curve's.
        class_of: (P,) class, as a row of `count`, of each curve.
        count: (K, n_images) objects of each class that has any.
    """

    image: np.ndarray
    true: np.ndarray
    at: np.ndarray
    start: np.ndarray
    curve: np.ndarray
    slot: np.ndarray
    class_of: np.ndarray
    count: np.ndarray


def _gather(rows: Sequence[Sequence[Mapping[str, Any]]], thresholds: int) -> _Curves:
    """All images' matches as curves of the first `thresholds` IoU thresholds.

    Classes without any object are left out, as COCO leaves them out of its mean.
    """
    by_class: dict[int, list[tuple[int, Mapping[str, Any]]]] = {}
    for index, entries in enumerate(rows):
        for entry in entries:
            by_class.setdefault(entry["c"], []).append((index, entry))
    counts: list[np.ndarray] = []
    images, trues, ats, starts, curves, slots, class_of = ([] for _ in range(7))  # type: ignore[var-annotated]
    length = 0
    for label in sorted(by_class):
        count = np.zeros(len(rows))
        for index, entry in by_class[label]:
            count[index] = entry["n"]
        if not count.any():
            continue
        image = np.concatenate([np.full(len(entry["s"]), index) for index, entry in by_class[label]])
        scores, matched, ignored = (
            np.concatenate([np.asarray(entry[key], dtype=kind) for _, entry in by_class[label]])
            for key, kind in (("s", np.float64), ("m", np.int64), ("g", np.int64))
        )
        order = np.argsort(-scores, kind="mergesort")
        image, matched, ignored = image[order].astype(np.int64), matched[order], ignored[order]
        for t in range(thresholds):
            counted = (ignored >> t) & 1 == 0
            true = ((matched >> t) & 1 == 1)[counted]
            at = np.flatnonzero(true)
            end = int(at[-1]) + 1 if len(at) else 0
            images.append(image[counted][:end])
            trues.append(true[:end])
            ats.append(at + length)
            starts.append(np.full(len(at), length))
            curves.append(np.full(len(at), len(class_of)))
            slots.append(np.arange(len(at)))
            class_of.append(len(counts))
            length += end
        counts.append(count)

    def joined(parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    return _Curves(
        joined(images),
        joined(trues).astype(bool),
        joined(ats),
        joined(starts),
        joined(curves),
        joined(slots),
        np.array(class_of, dtype=np.int64),
        np.array(counts).reshape(-1, len(rows)),
    )


#: Numbers held at once while many samples are computed.
_CHUNK = 1 << 22


def average_precision(curves: _Curves, weights: np.ndarray) -> np.ndarray:
    """Mean over curves of the 101-point interpolated average precision, for many samples of the images.

    The same sums as COCOeval.accumulate. A repeated detection moves along the precision-recall curve without adding a
    recall level of its own, so weighting an image equals repeating it.

    Args:
        curves: the images' curves.
        weights: (S, n_images) how often each image is in each sample.

    Returns:
        (S,) values in [0,1]; NaN for samples in which no class has an object.
    """
    weights = np.asarray(weights, dtype=np.float64)
    longest = int(curves.slot.max()) + 1 if len(curves.slot) else 0
    size = max(1, len(curves.image), len(curves.class_of) * longest)
    step = max(1, _CHUNK // size)
    parts = [_average_precision(curves, weights[i : i + step], longest) for i in range(0, len(weights), step)]
    return np.concatenate(parts) if parts else np.zeros(0)


def _average_precision(curves: _Curves, weights: np.ndarray, longest: int) -> np.ndarray:
    samples, total = len(weights), len(curves.class_of)
    objects = (weights @ curves.count.T)[:, curves.class_of]  # (S, P)
    valid = objects > 0
    each = weights[:, curves.image]
    # Running sums over all curves, with a zero in front; a curve's own sums are differences to its start.
    true, every = (np.zeros((samples, len(curves.image) + 1)) for _ in range(2))
    np.cumsum(each * curves.true, axis=1, out=true[:, 1:])
    np.cumsum(each, axis=1, out=every[:, 1:])
    hits = true[:, curves.at + 1] - true[:, curves.start]
    seen = every[:, curves.at + 1] - every[:, curves.start]
    precision = np.zeros((samples, total, longest))
    precision[:, curves.curve, curves.slot] = hits / (seen + np.spacing(1))
    # The highest precision at this recall or beyond.
    envelope = np.maximum.accumulate(precision[:, :, ::-1], axis=2)[:, :, ::-1]
    recall = hits / np.where(valid, objects, 1.0)[:, curves.curve]
    levels = np.searchsorted(_RECALLS, recall, side="right")  # recall levels reached at each true positive
    new = levels - np.where(curves.slot > 0, np.roll(levels, 1, axis=1), 0)
    gained = np.zeros((samples, total, longest))
    gained[:, curves.curve, curves.slot] = new
    values = (envelope * gained).sum(axis=2) / len(_RECALLS)
    with np.errstate(invalid="ignore"):
        mean: np.ndarray = np.where(valid, values, 0.0).sum(axis=1) / np.where(
            valid.any(1), valid.sum(1), np.nan
        )
    return mean


class _MAP(Metric):
    """Mean average precision of COCO (area all, at most 100 detections of a class in an image)."""

    task: ClassVar[str] = "detection"
    kind: ClassVar[str]
    thresholds: ClassVar[int]

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> _Curves | None:
        """Precision-recall curves; None when an image has no matches of this kind."""
        found = [row[self.kind] for row in rows]
        return None if any(entries is None for entries in found) else _gather(found, self.thresholds)

    def value(self, prepared: Any, weights: np.ndarray | None = None) -> float:
        """The metric in [0,1]; NaN without objects, or without masks where masks are judged."""
        if prepared is None:
            return float("nan")
        once = np.ones(prepared.count.shape[1]) if weights is None else np.asarray(weights)
        return float(average_precision(prepared, once[None])[0])

    def values(self, prepared: Any, weights: np.ndarray) -> np.ndarray:
        """`value` for each row of `weights` (S, n_images), in one go: (S,)."""
        if prepared is None:
            return np.full(len(weights), np.nan)
        return average_precision(prepared, weights)


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
