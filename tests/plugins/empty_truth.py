"""Scenes whose ground truth holds nothing: every pixel ignored, no object."""

from __future__ import annotations

from dataclasses import replace

import torch

from bench.protocols import Sample
from bench.registry import DATASETS
from tasks.detection.datasets import MiniScenes
from tasks.mini.datasets import MiniScenesSeg


@DATASETS.register_module(name="ignored_scenes")
class IgnoredScenes(MiniScenesSeg):
    """Every pixel is ignored."""

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        return replace(sample, target=torch.full_like(sample.target, 255))


@DATASETS.register_module(name="empty_scenes")
class EmptyScenes(MiniScenes):
    """No object in any image."""

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        truth = sample.target
        none = {"boxes": truth.boxes[:0], "labels": truth.labels[:0], "masks": ()}
        return replace(sample, target=replace(truth, crowd=None, ignore=None, **none))
