import io

import numpy as np
import pytest
import torch
from PIL import Image

from bench.chain import bpda
from bench.errors import PluginError
from bench.registry import DEFENSES
from defenses._jpeg import CHROMA, LUMA, cubic_round, differentiable_jpeg, hard_round, table


def pillow(pixels: np.ndarray, **options) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", **options)
    return np.asarray(Image.open(stream))


@pytest.mark.parametrize(("subsampling", "code"), [("4:4:4", 0), ("4:2:2", 1), ("4:2:0", 2)])
@pytest.mark.parametrize("size", [(32, 32), (31, 45)])
def test_forward_is_the_codec(subsampling, code, size, photos):
    images = photos(3, *size)
    out = DEFENSES.create("jpeg", {"quality": 60, "subsampling": subsampling})(images)
    for image, got in zip(images, out, strict=True):
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        expected = pillow(np.ascontiguousarray(pixels), quality=60, subsampling=code)
        assert np.array_equal((got * 255).round().byte().permute(1, 2, 0).numpy(), expected)


def test_default_is_pillows_own_default(photos):
    images = photos(1, 40, 40)
    pixels = np.ascontiguousarray((images[0] * 255).round().byte().permute(1, 2, 0).numpy())
    expected = torch.from_numpy(pillow(pixels).copy()).permute(2, 0, 1).float() / 255
    assert torch.equal(DEFENSES.create("jpeg")(images)[0], expected)


def test_truncation_is_topilimage(photos):
    images = photos(1, 32, 32) * 0.77
    pixels = np.ascontiguousarray(images[0].mul(255).byte().permute(1, 2, 0).numpy())  # what ToPILImage does
    expected = torch.from_numpy(pillow(pixels, quality=75).copy()).permute(2, 0, 1).float() / 255
    assert torch.equal(DEFENSES.create("jpeg", {"rounding": "truncate"})(images)[0], expected)
    assert not torch.equal(DEFENSES.create("jpeg")(images)[0], expected)


@pytest.mark.parametrize("quality", [1, 20, 50, 75, 95, 100])
def test_tables_are_the_codecs(quality):
    stream = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(stream, "JPEG", quality=quality)
    tables = Image.open(stream).quantization
    assert [e for row in table(LUMA, quality) for e in row] == list(tables[0])
    assert [e for row in table(CHROMA, quality) for e in row] == list(tables[1])


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("size", [(96, 96), (31, 45), (5, 3), (16, 4)])
def test_own_jpeg_reproduces_the_codec(subsampling, size, photos):
    images = photos(8, *size)
    for quality in (20, 75, 95):
        exact = DEFENSES.create("jpeg", {"quality": quality, "subsampling": subsampling})(images) * 255
        own = differentiable_jpeg((images * 255).round(), quality, subsampling, hard_round)
        difference = (own - exact).abs()
        # The rest are single coefficients at a rounding tie.
        limit = 0.25 if min(size) > 8 else 0.5
        assert difference.mean() < limit and (difference > 0.5).float().mean() < limit


@pytest.mark.parametrize(("gradient", "limit"), [("cubic", 0.8), ("straight_through", 0.25)])
def test_surrogate_values_are_close_to_the_codec(gradient, limit, photos):
    images = photos(8, 64, 64)
    defense = DEFENSES.create("jpeg", {"gradient": gradient})
    change = (defense(images) - images).abs().mean() * 255
    assert (defense.surrogate(images) - defense(images)).abs().mean() * 255 < limit < change


def test_quality_100_is_nearly_the_identity(photos):
    images = photos(3, 32, 32)
    out = DEFENSES.create("jpeg", {"quality": 100, "subsampling": "4:4:4"})(images)
    difference = (out - images).abs() * 255
    assert difference.max() < 4.5 and difference.mean() < 0.6


def test_straight_through_gradient_at_full_resolution_is_the_identity(photos):
    """Without chroma subsampling and with rounding passed through, the pipeline is T^-1 T."""
    images = photos(2, 31, 45).requires_grad_()
    defense = DEFENSES.create("jpeg", {"subsampling": "4:4:4", "gradient": "straight_through"})
    cotangent = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    (grad,) = torch.autograd.grad(bpda(defense, images).images, images, cotangent)
    interior = (slice(None), slice(None), slice(0, 24), slice(0, 40))  # whole blocks: no replicated edge
    assert torch.allclose(grad[interior], cotangent[interior], atol=1e-4)


def test_cubic_rounding_has_the_derivative_of_shin_and_song():
    x = torch.linspace(-2.3, 2.3, 41, dtype=torch.float64).requires_grad_()
    y = cubic_round(x)
    assert (y - x.detach().round()).abs().max() <= 0.125
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(grad, 3 * (x - x.round()) ** 2)


def test_quality_out_of_range_is_one_line():
    with pytest.raises(PluginError, match=r"jpeg.*quality must be in 1\.\.100, got 0"):
        DEFENSES.create("jpeg", {"quality": 0})
