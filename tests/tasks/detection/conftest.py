"""The embedded detectors."""

from __future__ import annotations

import pytest
import torch

from bench.registry import MODELS
from tasks.detection.model import Detector


@pytest.fixture(scope="module", params=["mini_ssd", "mini_mask_rcnn"])
def model(request: pytest.FixtureRequest) -> Detector:
    """One of them, behind its adapter."""
    loaded = MODELS.create(request.param).load(torch.device("cpu"))
    assert isinstance(loaded, Detector)
    return loaded
