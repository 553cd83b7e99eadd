"""Images and streams for the tests of defenses."""

from __future__ import annotations

import pytest
import torch
from skimage import data
from torch import Tensor

from bench.protocols import Defense
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


@pytest.fixture(scope="session")
def true_gradient(streams):
    """`true_gradient(defense, images)`: asserts that the gradient of `forward` is the slope of its values.

    Both are turned into double precision. Along the gradient the value must grow at the rate the gradient says; where
    values are cut off (cascades, clipped estimates) defenses are only nearly linear, hence the tolerance.
    """

    def check(defense: Defense, images: Tensor) -> None:
        defense.double()
        images = images.double() * 0.8 + 0.1
        x = images.clone().requires_grad_()
        weight = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))

        def value(pixels: Tensor) -> Tensor:
            return (defense(pixels, *([streams(len(images))] if defense.stochastic else [])) * weight).sum()

        (grad,) = torch.autograd.grad(value(x), x)
        assert torch.isfinite(grad).all() and (grad != 0).float().mean() > 0.5
        step = 1e-6 * grad / grad.norm()
        with torch.no_grad():
            rise = (value(images + step) - value(images - step)) / 2
        assert float(rise) == pytest.approx(1e-6 * float(grad.norm()), rel=1e-2)

    return check
