"""Training images of nothing in particular."""

from __future__ import annotations

import pytest
import torch

from bench.protocols import Sample


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    """Twelve images of 16 x 16 in four classes."""
    images = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return [Sample(image, i % 4, str(i)) for i, image in enumerate(images)]
