"""Images and streams for the tests of defenses."""

from __future__ import annotations

import pytest
import torch
from skimage import data
from torch import Tensor

from bench.rng import ImageRNG


@pytest.fixture(scope="session")
def photos():
    """`photos(n, height, width)`: crops of a photograph, float32 (n, 3, H, W), some exactly black and white pixels."""
    picture = torch.from_numpy(data.astronaut().copy()).permute(2, 0, 1).float() / 255

    def make(n: int, height: int, width: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * height + width)
        crops = []
        for _ in range(n):
            y = int(torch.randint(0, 512 - height, (1,), generator=generator))
            x = int(torch.randint(0, 512 - width, (1,), generator=generator))
            crops.append(picture[:, y : y + height, x : x + width])
        images = torch.stack(crops).contiguous()
        images[:, :, 0, 0] = 0.0
        images[:, :, -1, -1] = 1.0
        return images

    return make


@pytest.fixture(scope="session")
def streams():
    """`streams(n, key)`: fresh streams of images 0..n-1."""

    def make(n: int, key: str = "test") -> ImageRNG:
        return ImageRNG.for_images(key, [str(i) for i in range(n)])

    return make
