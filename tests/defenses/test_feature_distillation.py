import numpy as np
import pytest
import torch
from PIL import Image
from scipy.fft import dctn, idctn

from bench.chain import bpda
from bench.registry import DEFENSES


def blocks(plane, steps, shift):
    out = np.empty_like(plane)
    for y in range(0, plane.shape[0], 8):
        for x in range(0, plane.shape[1], 8):
            coefficients = dctn(plane[y : y + 8, x : x + 8] - shift, norm="ortho")
            out[y : y + 8, x : x + 8] = idctn(np.round(coefficients / steps) * steps, norm="ortho") + shift
    return out


def test_rgb_follows_the_authors_code(photos):
    images = photos(3, 32, 48) * 0.83 + 0.01  # away from ties
    steps = np.full((8, 8), 30.0)
    steps[:4, :4] = 25.0
    out = DEFENSES.create("feature_distillation")(images)
    for image, got in zip(images.double().numpy(), out.numpy(), strict=True):
        expected = np.stack([blocks(channel * 255, steps, 0.0) for channel in image]) / 255
        assert np.abs(expected.clip(0, 1) - got).max() < 1e-6


def test_ycbcr_follows_the_port(photos):
    images = photos(3, 32, 48)
    steps = np.where(np.add.outer(np.arange(8), np.arange(8)) < 5, 1.5, 41.5)
    out = DEFENSES.create("feature_distillation", {"variant": "ycbcr"})(images)
    differing = 0.0
    for image, got in zip(images, out, strict=True):
        pixels = (image * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
        ycc = np.array(Image.fromarray(pixels).convert("YCbCr")).astype(float)
        planes = [blocks(ycc[..., c], steps, 128.0) for c in range(3)]
        levels = np.clip(np.stack(planes, -1).round(), 0, 255).astype(np.uint8)
        expected = np.asarray(Image.fromarray(levels, "YCbCr").convert("RGB"))
        difference = np.abs((got * 255).round().permute(1, 2, 0).numpy() - expected)
        differing += (difference > 2).mean() / 3
        assert difference.mean() < 0.4
    assert differing < 0.02  # Pillow converts colours in fixed point, which decides a few ties otherwise


@pytest.mark.parametrize("variant", ["rgb", "ycbcr"])
def test_constant_images_move_by_at_most_half_a_step(variant):
    images = torch.full((2, 3, 16, 16), 0.4)
    out = DEFENSES.create("feature_distillation", {"variant": variant})(images)
    assert (out - images).abs().max() <= (25 / 2 / 8 + 1) / 255
    assert torch.allclose(out, out[:, :, :1, :1].expand_as(out), atol=1e-6)


def test_straight_through_gradient_is_the_identity_inside_whole_blocks(photos):
    images = photos(2, 20, 20).requires_grad_()
    defense = DEFENSES.create("feature_distillation", {"gradient": "straight_through"})
    cotangent = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    (grad,) = torch.autograd.grad(bpda(defense, images).images, images, cotangent)
    assert torch.allclose(grad[..., :16, :16], cotangent[..., :16, :16], atol=1e-5)


def test_cubic_surrogate_is_near_the_defense(photos):
    images = photos(4, 32, 32)
    defense = DEFENSES.create("feature_distillation")
    change = (defense(images) - images).abs().mean()
    assert (defense.surrogate(images) - defense(images)).abs().mean() < 0.5 * change
