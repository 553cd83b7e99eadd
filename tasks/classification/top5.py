"""Top-5 accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.registry import METRICS
from tasks.classification.task import TOP, Accuracy


@METRICS.register_module(name="top5")
class Top5(Accuracy):
    """Share of images whose true label is among the five that the model finds likeliest.

    Undefined (NaN) for models of fewer than five classes, and for predictions that are a label and no more.
    """

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """1 or 0 for every image as float64; NaN where it is undefined."""
        hits = [row["label"] in row["top"] if len(row.get("top", ())) == TOP else np.nan for row in rows]
        return np.array(hits, dtype=np.float64)
