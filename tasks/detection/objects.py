"""Ground truth and predictions of detection, and the matching between them as COCO defines it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["THRESHOLDS", "Detections", "Objects", "match", "warp_masks"]

#: IoU thresholds .5:.05:.95, as pycocotools computes them.
THRESHOLDS: np.ndarray = np.linspace(0.5, 0.95, int(np.round((0.95 - 0.5) / 0.05)) + 1, endpoint=True)
#: Detections that count for one image and class.
MAX_DETECTIONS = 100


@dataclass(frozen=True)
class Objects:
    """The objects of one image.

    Boxes and masks are kept as annotated, in original coordinates, and judged there; `scale` says how the image was
    resized since.

    Attributes:
        boxes: (N, 4) float64 as x, y, width, height in original pixels.
        labels: (N,) int64.
        size: (H, W) of the original image.
        num_classes: classes of the dataset.
        masks: one run-length encoding in original pixels per object; None when the dataset has boxes only.
        crowd: (N,) bool: regions of many objects. Never a target of a loss; a detection inside one is not counted.
        ignore: (N,) bool: objects too difficult to count (VOC). Not a target of a loss either.
        scale: (y, x) factors from original to current coordinates.
        true_labels: (N,) what `labels` were before an attack's target rule replaced them.
    """

    boxes: np.ndarray
    labels: np.ndarray
    size: tuple[int, int]
    num_classes: int
    masks: tuple[dict[str, Any], ...] | None = None
    crowd: np.ndarray | None = None
    ignore: np.ndarray | None = None
    scale: tuple[float, float] = (1.0, 1.0)
    true_labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def relabelled(self, labels: np.ndarray) -> Objects:
        """The same objects with other `labels` (N,), the target of an attack."""
        return replace(self, labels=np.asarray(labels, dtype=np.int64), true_labels=self.labels)

    def skipped(self) -> np.ndarray:
        """(N,) bool: crowds and ignored objects."""
        out = np.zeros(len(self), dtype=bool)
        for flags in (self.crowd, self.ignore):
            if flags is not None:
                out |= flags
        return out

    def resized(self, scale: tuple[float, float]) -> Objects:
        """The same objects after the image was resized by (y, x) factors."""
        return replace(self, scale=(self.scale[0] * scale[0], self.scale[1] * scale[1]))

    def corners(self) -> np.ndarray:
        """(N, 4) float64 boxes as x1, y1, x2, y2 in current coordinates."""
        x, y, w, h = self.boxes.reshape(-1, 4).T
        sy, sx = self.scale
        return np.stack([x * sx, y * sy, (x + w) * sx, (y + h) * sy], axis=1)

    def bitmaps(self, keep: np.ndarray) -> np.ndarray:
        """(K, H, W) bool masks of the objects in `keep`, at original size; filled boxes where there are no masks."""
        picked = np.flatnonzero(keep)
        out = np.zeros((len(picked), *self.size), dtype=bool)
        if self.masks is not None:
            from pycocotools import mask as coco_mask

            for k, i in enumerate(picked):
                out[k] = coco_mask.decode(self.masks[i]).astype(bool)
        else:
            for k, i in enumerate(picked):
                x, y, w, h = self.boxes[i]
                out[k, int(y) : int(np.ceil(y + h)), int(x) : int(np.ceil(x + w))] = True
        return out


@dataclass(frozen=True)
class Detections:
    """What a detector found in one image, in the coordinates of the image it was prepared to.

    Attributes:
        boxes: (N, 4) float32 as x1, y1, x2, y2.
        scores: (N,) float32 in [0,1].
        labels: (N,) int64.
        masks: (N, H, W) bool, or None.
        class_scores: (N, K) scores of all classes, or None where the detector does not tell.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None
    class_scores: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def empty(cls, mask_size: tuple[int, int] | None = None) -> Detections:
        """Nothing found."""
        masks = None if mask_size is None else torch.zeros((0, *mask_size), dtype=torch.bool)
        return cls(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long), masks)

    def above(self, threshold: float) -> Detections:
        """The detections with at least this score."""
        keep = self.scores >= threshold
        masks, of_class = self.masks, self.class_scores
        return Detections(
            self.boxes[keep],
            self.scores[keep],
            self.labels[keep],
            None if masks is None else masks[keep],
            None if of_class is None else of_class[keep],
        )

    def as_objects(self, truth: Objects) -> Objects:
        """The detections as objects, boxes only, of the image that `truth` describes."""
        sy, sx = truth.scale
        boxes = self.boxes.double().cpu().numpy().reshape(-1, 4) / np.array([sx, sy, sx, sy])
        boxes[:, 2:] -= boxes[:, :2]
        labels = self.labels.cpu().numpy().astype(np.int64)
        return Objects(boxes, labels, truth.size, truth.num_classes, scale=truth.scale)


def warp_masks(
    masks: np.ndarray, scale: tuple[float, float], offset: tuple[float, float], size: tuple[int, int]
) -> np.ndarray:
    """Masks (N, H, W) after position_out = position_in * scale + offset, on a canvas of `size`; nearest pixel."""
    if scale == (1.0, 1.0) and offset == (0.0, 0.0) and masks.shape[1:] == size:
        return masks
    axes = []
    for axis in (0, 1):
        source = np.floor((np.arange(size[axis]) + 0.5 - offset[axis]) / scale[axis]).astype(np.int64)
        inside = (source >= 0) & (source < masks.shape[1 + axis])
        axes.append((np.clip(source, 0, masks.shape[1 + axis] - 1), inside))
    (rows, row_in), (columns, column_in) = axes
    out: np.ndarray = masks[:, rows[:, None], columns[None, :]] & row_in[:, None] & column_in[None, :]
    return out


def _encode(masks: np.ndarray) -> list[dict[str, Any]]:
    from pycocotools import mask as coco_mask

    encoded: list[dict[str, Any]] = coco_mask.encode(
        np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8))
    )
    return encoded


def match(detections: Detections, objects: Objects, kind: str) -> list[dict[str, Any]]:
    """Match detections to objects class by class, as COCOeval.evaluateImg does for area "all".

    Args:
        detections: of one image, in current coordinates.
        objects: its ground truth.
        kind: "box" or "mask".

    Returns:
        For each class with an object or a detection, JSON-ready: `c` the class, `n` the objects that count, `s` the
        scores in falling order, `m` and `g` bit masks per detection: bit t of `m` is set when it is matched at
        THRESHOLDS[t], bit t of `g` when it is ignored there (matched to a crowd or an ignored object).
    """
    from pycocotools import mask as coco_mask

    sy, sx = objects.scale
    corners = detections.boxes.double().cpu().numpy().reshape(-1, 4) / np.array([sx, sy, sx, sy])
    scores = detections.scores.double().cpu().numpy()
    said = detections.labels.cpu().numpy()
    skipped = objects.skipped()
    crowd = np.zeros(len(objects), dtype=bool) if objects.crowd is None else objects.crowd
    found: list[Any]
    truth: list[Any]
    if kind == "mask":
        if detections.masks is None or objects.masks is None:
            raise ValueError("masks were asked for, but the model or the dataset has none")
        back = (1.0 / sy, 1.0 / sx)
        found = (
            _encode(warp_masks(detections.masks.cpu().numpy(), back, (0.0, 0.0), objects.size))
            if len(said)
            else []
        )
        truth = list(objects.masks)
    else:
        wide = corners.copy()
        wide[:, 2:] -= wide[:, :2]
        found, truth = list(wide), list(objects.boxes.reshape(-1, 4))
    result = []
    for label in sorted(set(objects.labels.tolist()) | set(said.tolist())):
        gt = np.flatnonzero(objects.labels == label)
        # Objects that count come first, so that a detection prefers them.
        gt = gt[np.argsort(skipped[gt], kind="mergesort")]
        dt = np.flatnonzero(said == label)
        dt = dt[np.argsort(-scores[dt], kind="mergesort")][:MAX_DETECTIONS]
        matched, ignored = [0] * len(dt), [0] * len(dt)
        if len(dt) and len(gt):
            pairs: list[Any] = [[found[i] for i in dt], [truth[i] for i in gt]]
            if kind == "box":
                pairs = [np.stack(boxes) for boxes in pairs]
            ious = coco_mask.iou(*pairs, crowd[gt].astype(np.uint8))
            for t, threshold in enumerate(THRESHOLDS):
                _greedy(np.asarray(ious), skipped[gt], crowd[gt], float(threshold), 1 << t, matched, ignored)
        result.append(
            {
                "c": int(label),
                "n": int((~skipped[gt]).sum()),
                "s": scores[dt].tolist(),
                "m": matched,
                "g": ignored,
            }
        )
    return result


def _greedy(
    ious: np.ndarray,
    skipped: np.ndarray,
    crowd: np.ndarray,
    threshold: float,
    bit: int,
    matched: list[int],
    ignored: list[int],
) -> None:
    """Give each detection, best score first, the free object it overlaps most (COCOeval.evaluateImg)."""
    taken = np.zeros(ious.shape[1], dtype=bool)
    for d in range(ious.shape[0]):
        best = min(threshold, 1 - 1e-10)
        chosen = -1
        for g in range(ious.shape[1]):
            if taken[g] and not crowd[g]:
                continue
            if chosen > -1 and not skipped[chosen] and skipped[g]:
                break
            if ious[d, g] < best:
                continue
            best, chosen = float(ious[d, g]), g
        if chosen > -1:
            taken[chosen] = True
            matched[d] |= bit
            if skipped[chosen]:
                ignored[d] |= bit
