"""The task `segmentation`: one label per pixel, judged by intersection over union."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from bench.errors import DataError
from bench.protocols import ImageRNG, Metric, Task
from bench.registry import METRICS, TASKS
from tasks.targets import check_rule, check_wrong, wrong_classes

__all__ = ["IGNORE", "MeanIoU", "PixelAccuracy", "Segmentation"]

#: Label of pixels that no loss and no metric counts.
IGNORE = 255


@TASKS.register_module(name="segmentation")
class Segmentation(Task):
    """A label map (H, W) per image; targets and predictions are int64 tensors, 255 in a target is ignored."""

    metrics: ClassVar[tuple[str, ...]] = ("miou", "pixel_accuracy")
    losses: ClassVar[tuple[str, ...]] = ("ce", "margin")
    batch_size: ClassVar[int] = 8

    def rows(self, prediction: Any, target: Any) -> dict[str, Any]:
        """Pixel counts of one image.

        `score` is the pixel accuracy (1 where every pixel is ignored); `correct` and `pixels` count labelled pixels;
        `classes` are the labels that occur in truth or prediction, with their `intersection` and `union`.

        Raises:
            DataError: prediction and target differ in size.
        """
        said, truth = np.asarray(prediction), np.asarray(target)
        if said.shape != truth.shape:
            raise DataError(f"the label map has {truth.shape} pixels, the prediction {said.shape}")
        counted = truth != IGNORE
        said, truth = said[counted].astype(np.int64), truth[counted].astype(np.int64)
        size = int(max(said.max(initial=0), truth.max(initial=0))) + 1
        intersection = np.bincount(truth[said == truth], minlength=size)
        union = np.bincount(said, minlength=size) + np.bincount(truth, minlength=size) - intersection
        classes = np.flatnonzero(union)
        correct, pixels = int(intersection.sum()), len(truth)
        return {
            "score": correct / pixels if pixels else 1.0,
            "correct": correct,
            "pixels": pixels,
            "classes": classes.tolist(),
            "intersection": intersection[classes].tolist(),
            "union": union[classes].tolist(),
        }

    def draw(self, axes: Any, prediction: Any, classes: Sequence[str]) -> str:
        """Label 0 left as it is, every other label in a colour of its own; ignored pixels grey."""
        import matplotlib

        labels = np.asarray(prediction)
        colours = matplotlib.colormaps["tab20"](np.arange(256) % 20)
        colours[:, 3], colours[IGNORE], colours[0, 3] = 0.6, (0.5, 0.5, 0.5, 0.6), 0.0
        axes.imshow(colours[labels.astype(np.int64)], interpolation="none")
        present = _present(labels, classes)
        return ", ".join(present[:4]) + (", …" if len(present) > 4 else "")

    def words(self, prediction: Any, classes: Sequence[str]) -> str:
        """The labels that occur, label 0 left out."""
        return ", ".join(_present(np.asarray(prediction), classes))

    def verdict(self, prediction: Any, target: Any) -> str:
        """The share of pixels that are right."""
        return f"{self.rows(prediction, target)['score']:.0%} of pixels right"

    def check_target(self, rule: str, num_classes: int) -> None:
        check_rule(rule, self.name, num_classes)

    def attack_targets(
        self, rule: str, targets: Sequence[Any], num_classes: int, rng: ImageRNG
    ) -> tuple[torch.Tensor, ...]:
        """Wrong label maps by `rule` (`tasks.targets.wrong_classes`); ignored pixels stay ignored.

        Raises:
            GridError: unknown rule, a class the model does not have, or a target equal to all of an image's labels.
            DataError: labels that the model does not have.
        """
        maps = []
        for target, wrong in zip(targets, wrong_classes(rule, self.name, num_classes, rng), strict=True):
            labels = label_map(target, num_classes)
            table = torch.from_numpy(np.concatenate([wrong, np.full(IGNORE + 1 - num_classes, IGNORE)]))
            counted = labels != IGNORE
            check_wrong(rule, labels[counted].numpy(), table[labels][counted].numpy())
            maps.append(table[labels])
        return tuple(maps)


def _present(labels: np.ndarray, classes: Sequence[str]) -> list[str]:
    return [classes[k] for k in np.unique(labels).tolist() if 0 < k < len(classes)]


@dataclass(frozen=True)
class _Counts:
    """Per image (rows) and class (columns)."""

    intersection: np.ndarray
    union: np.ndarray


@METRICS.register_module(name="miou")
class MeanIoU(Metric):
    """Mean over classes of intersection / union, both summed over all images first.

    Classes that occur neither in the truth nor in a prediction are left out of the mean (mmseg's `IoUMetric`), also
    in each bootstrap sample.
    """

    task: ClassVar[str] = "segmentation"

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> _Counts:
        """Counts as (n_images, n_classes) arrays."""
        classes = 1 + max((max(row["classes"], default=0) for row in rows), default=0)
        intersection, union = np.zeros((2, len(rows), classes))
        for i, row in enumerate(rows):
            intersection[i, row["classes"]] = row["intersection"]
            union[i, row["classes"]] = row["union"]
        return _Counts(intersection, union)

    def value(self, prepared: Any, weights: np.ndarray | None = None) -> float:
        """Mean IoU in [0,1]; NaN without a labelled pixel."""
        w = np.ones(len(prepared.union)) if weights is None else np.asarray(weights, dtype=np.float64)
        intersection, union = w @ prepared.intersection, w @ prepared.union
        seen = union > 0
        return float(np.mean(intersection[seen] / union[seen])) if seen.any() else float("nan")


@METRICS.register_module(name="pixel_accuracy")
class PixelAccuracy(Metric):
    """Share of labelled pixels, over all images, whose predicted label is the true one (mmseg's aAcc)."""

    task: ClassVar[str] = "segmentation"

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """(2, n_images): correct and labelled pixels."""
        return np.array([[row["correct"] for row in rows], [row["pixels"] for row in rows]], dtype=np.float64)

    def value(self, prepared: Any, weights: np.ndarray | None = None) -> float:
        """Share in [0,1]; NaN without a labelled pixel."""
        correct, pixels = (
            prepared.sum(1) if weights is None else prepared @ np.asarray(weights, dtype=np.float64)
        )
        return float(correct / pixels) if pixels else float("nan")


def label_map(target: Any, num_classes: int) -> torch.Tensor:
    """A target as an int64 label map.

    Raises:
        DataError: labels that the model does not have.
    """
    labels = torch.as_tensor(target).long()
    valid = labels[labels != IGNORE]
    if len(valid) and not (0 <= int(valid.min()) and int(valid.max()) < num_classes):
        raise DataError(
            f"a label map holds label {int(valid.max())}, the model predicts {num_classes} classes (and {IGNORE} means "
            "ignored): model and dataset do not belong together"
        )
    return labels
