import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from bench.chain import bpda
from bench.registry import DEFENSES
from defenses import nips_r3

SIZES = [(32, 32), (31, 45), (60, 52)]


def keras_offset(matrix, height, width):
    there = np.array([[1, 0, height / 2 + 0.5], [0, 1, width / 2 + 0.5], [0, 0, 1]])
    back = np.array([[1, 0, -height / 2 - 0.5], [0, 1, -width / 2 - 0.5], [0, 0, 1]])
    full = np.eye(3)
    full[:2, :2] = matrix
    return there @ full @ back


@pytest.mark.parametrize("size", SIZES)
def test_ens_equals_scipys_affine_transforms(size, photos, streams):
    images = photos(3, *size)
    height, width = size
    out = DEFENSES.create("nips_r3", {"transform": "ens"})(images, streams(3))
    jitter = streams(3).integers(95, 106, (6,)).numpy() / 100
    for image, got, j in zip(images.numpy(), out.numpy(), jitter, strict=True):
        shear, theta = j[0] * np.pi / 128, -j[1] * np.pi / 128
        shift = np.array([[1, 0, int(j[2] * width * 0.02)], [0, 1, int(j[3] * height * 0.02)], [0, 0, 1]])
        steps = [
            keras_offset([[1, -math.sin(shear)], [0, math.cos(shear)]], height, width),
            shift,
            keras_offset([[0.95 * j[4], 0], [0, 0.95 * j[5]]], height, width),
            keras_offset(
                [[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]], height, width
            ),
        ]
        for channel, result in zip(image * 2 - 1, got, strict=True):
            for step in steps:
                channel = ndimage.affine_transform(channel, step[:2, :2], step[:2, 2], order=0, cval=0.0)
            assert np.abs((channel + 1) / 2 - result).max() < 1e-6


def scipy_turn_and_zoom(channel, angle, zoom, out):
    turned = ndimage.rotate(channel, angle, reshape=True)
    zoomed = ndimage.zoom(turned, zoom)
    start = [(zoomed.shape[axis] - out[axis]) // 2 for axis in (0, 1)]
    return zoomed[start[0] : start[0] + out[0], start[1] : start[1] + out[1]]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("zoom", [(1.05, 1.1), (0.75, 0.8)])
def test_turn_and_zoom_equal_scipys(size, zoom, photos, streams):
    images = photos(4, *size).double()
    out = size if zoom[0] > 1 else tuple(round(side * 224 / 299) for side in size)
    got, factors = nips_r3._turn_and_zoom(images, zoom, out, streams(4))
    rng = streams(4)
    degrees = rng.integers(2, 4) * (rng.integers(0, 2) * 2 - 1)
    assert set(degrees.abs().tolist()) <= {2, 3}
    for image, result, angle, factor in zip(
        images.numpy(), got.numpy(), degrees.tolist(), factors, strict=True
    ):
        for channel, plane in zip(image, result, strict=True):
            expected = scipy_turn_and_zoom(channel, angle, factor.tolist(), out)
            assert expected.shape == plane.shape
            assert np.abs(expected - plane).max() < 1e-9


def test_angles_and_zooms_cover_what_the_code_draws(streams):
    rng = streams(200)
    degrees = rng.integers(2, 4) * (rng.integers(0, 2) * 2 - 1)
    assert sorted(degrees.unique().tolist()) == [-3, -2, 2, 3]
    _, zooms = nips_r3._turn_and_zoom(torch.zeros(200, 1, 4, 4), (1.05, 1.1), (4, 4), streams(200))
    assert zooms.min() >= 1.05 and zooms.max() <= 1.1 and zooms.std() > 0.01


def test_inc_adds_noise_of_the_declared_size(streams):
    images = torch.full((8, 3, 48, 48), 0.5)
    out = DEFENSES.create("nips_r3", {"transform": "inc"})(images, streams(8))
    assert out.shape == images.shape
    centre = out[..., 16:32, 16:32] - 0.5
    assert abs(centre.mean()) < 1e-3 and 1 / 255 < centre.std() < 2.2 / 255  # interpolation averages a little


def test_vgg_compresses_and_shrinks(photos, streams):
    images = photos(3, 299, 299)
    defense = DEFENSES.create("nips_r3", {"transform": "vgg"})
    out = defense.purify(images, streams(3))
    assert out.images.shape == (3, 3, 224, 224) and out.geometry.out_size == (224, 224)
    assert out.geometry.scale.min() >= 0.75 and out.geometry.scale.max() <= 0.8
    decoded = DEFENSES.create("jpeg", {"quality": 50})(images)
    expected, _ = nips_r3._turn_and_zoom(decoded, (0.75, 0.8), (224, 224), streams(3))
    assert torch.equal(out.images, expected.clamp(0, 1))


@pytest.mark.parametrize("transform", ["ens", "inc"])
def test_gradient_agrees_with_finite_differences(transform, streams):
    images = 0.3 + 0.4 * torch.rand(
        2, 3, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    defense = DEFENSES.create("nips_r3", {"transform": transform})
    assert defense.differentiable
    assert torch.autograd.gradcheck(lambda x: defense(x, streams(2)), images.requires_grad_(), fast_mode=True)


def test_vgg_has_no_gradient_but_a_surrogate(photos, streams):
    defense = DEFENSES.create("nips_r3", {"transform": "vgg"})
    assert not defense.differentiable
    images = photos(2, 32, 32).requires_grad_()
    out = bpda(defense, images, streams(2))
    assert torch.equal(out.images, defense.purify(images.detach(), streams(2)).images)
    (grad,) = torch.autograd.grad(out.images.square().sum(), images)
    assert torch.isfinite(grad).all() and (grad != 0).float().mean() > 0.5


@pytest.mark.parametrize("transform", ["ens", "inc", "vgg"])
@pytest.mark.parametrize("size", [(1, 1), (3, 2)])
def test_tiny_images_work(transform, size, streams):
    out = DEFENSES.create("nips_r3", {"transform": transform}).purify(torch.rand(2, 3, *size), streams(2))
    assert out.images.shape[-2:] == out.geometry.out_size


def test_classification_only():
    assert DEFENSES.create("nips_r3").tasks == {"classification"}
