"""The task `classification`: one label per image, judged right or wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from bench.errors import GridError
from bench.protocols import ImageRNG, Metric, Task
from bench.registry import METRICS, TASKS
from tasks.targets import check_rule

__all__ = ["TOP", "Accuracy", "Classification", "Decision", "ErrorRate"]

#: How many of the likeliest labels a decision names.
TOP = 5

_RULES = ("cafd", "class:K", "next", "random")


@dataclass(frozen=True)
class Decision:
    """What a classifier says about one image.

    Attributes:
        label: the predicted class.
        confidence: its softmax probability.
        margin: its logit minus the runner-up's.
        top: the five likeliest labels (all of them where there are fewer), likeliest first; empty where unknown.
    """

    label: int
    confidence: float
    margin: float
    top: tuple[int, ...] = ()

    def __int__(self) -> int:
        return self.label


@TASKS.register_module(name="classification")
class Classification(Task):
    """One of `num_classes` labels per image; targets are integers."""

    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "error_rate")
    losses: ClassVar[tuple[str, ...]] = ("ce", "margin", "dlr")
    batch_size: ClassVar[int] = 64

    def rows(self, prediction: Any, target: Any) -> dict[str, Any]:
        """`score` 1 or 0, `correct`, `label` (truth), `prediction`; its `confidence`, `margin` and `top` labels."""
        label, said = int(target), int(prediction)
        correct = int(said == label)
        row: dict[str, Any] = {
            "score": float(correct),
            "correct": correct,
            "label": label,
            "prediction": said,
        }
        if isinstance(prediction, Decision):
            row |= {"confidence": prediction.confidence, "margin": prediction.margin}
            if prediction.top:
                row["top"] = list(prediction.top)
        return row

    def draw(self, axes: Any, prediction: Any, classes: Sequence[str]) -> str:
        """Draws nothing: the caption says it (`words`)."""
        return self.words(prediction, classes)

    def words(self, prediction: Any, classes: Sequence[str]) -> str:
        """The class, with the model's confidence where it is known."""
        sure = f" {prediction.confidence:.0%}" if isinstance(prediction, Decision) else ""
        return f"{classes[int(prediction)]}{sure}"

    def verdict(self, prediction: Any, target: Any) -> str:
        """A tick or a cross."""
        return "✓" if int(prediction) == int(target) else "✗"

    def check_target(self, rule: str, num_classes: int) -> None:
        self._number(rule, num_classes)

    def check_truth(self, target: Any, num_classes: int) -> None:
        """The label must be one of the model's classes; data without labels says -1 or None."""
        label = -1 if target is None else int(target)
        if label < 0:
            raise ValueError("it has no label: attacks and accuracy need one")
        if label >= num_classes:
            raise ValueError(f"label {label}, but the model's classes are 0..{num_classes - 1}")

    def _number(self, rule: str, num_classes: int) -> int | None:
        """K of `class:K`; refuses what no image could follow."""
        number = check_rule(rule, self.name, num_classes, _RULES)
        if rule == "cafd" and num_classes < 4:
            raise GridError(f"target '{rule}': class 3 does not exist, the model has {num_classes} classes")
        return number

    def attack_targets(
        self, rule: str, targets: Sequence[Any], num_classes: int, rng: ImageRNG
    ) -> tuple[int, ...]:
        """Wrong labels by `rule`.

        `cafd`: class 3, or 1 where the label is 3 (Zhou et al. 2021, their code). `next`: the label plus one, the
        last class goes to 0. `random`: any wrong class with equal chance, from the image's own stream. `class:K`:
        class K for every image.

        Raises:
            GridError: unknown rule, a class the model does not have, or a target equal to an image's label.
        """
        labels = [int(t) for t in targets]
        number = self._number(rule, num_classes)
        if rule == "cafd":
            chosen = [1 if label == 3 else 3 for label in labels]
        elif rule == "next":
            chosen = [(label + 1) % num_classes for label in labels]
        elif rule == "random":
            steps = rng.integers(1, num_classes).tolist()
            chosen = [(label + step) % num_classes for label, step in zip(labels, steps, strict=True)]
        else:
            assert number is not None
            chosen = [number] * len(labels)
        for label, wrong in zip(labels, chosen, strict=True):
            if wrong == label:
                raise GridError(
                    f"target '{rule}': an image has label {label} itself; use cafd, next or random"
                )
        return tuple(chosen)


class _Mean(Metric):
    """The mean over images of one 0/1 entry of the rows."""

    task: ClassVar[str] = "classification"
    interval: ClassVar[Literal["wilson", "bootstrap"]] = "wilson"

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """`correct` of every image as float64."""
        return np.array([row["correct"] for row in rows], dtype=np.float64)

    def value(self, prepared: Any, weights: np.ndarray | None = None) -> float:
        """The mean, in [0,1]; NaN without images."""
        total = len(prepared) if weights is None else float(np.sum(weights))
        if total == 0:
            return float("nan")
        return float(np.sum(prepared) if weights is None else np.dot(prepared, weights)) / total


@METRICS.register_module(name="accuracy")
class Accuracy(_Mean):
    """Share of images whose predicted label is the true one (top-1)."""


@METRICS.register_module(name="error_rate")
class ErrorRate(_Mean):
    """Share of images whose predicted label is not the true one; for targeted attacks too (Zhou et al. 2021)."""

    higher_is_better: ClassVar[bool] = False

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """1 - `correct` of every image."""
        return 1.0 - super().prepare(rows)
