import numpy as np
import pytest
import torch
from scipy.ndimage import median_filter

from bench.errors import PluginError
from bench.registry import DEFENSES
from defenses.median_filter import _comparators


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("shape", [(32, 32), (31, 45), (2, 3)])
def test_equals_scipy_everywhere(size, shape, photos):
    images = photos(2, *shape)
    out = DEFENSES.create("median_filter", {"size": size})(images)
    for image, got in zip(images.numpy(), out.numpy(), strict=True):
        expected = np.stack([median_filter(channel, size=size, mode="reflect") for channel in image])
        assert np.array_equal(got, expected)


@pytest.mark.parametrize("count", [1, 4, 9, 16, 25])
def test_network_selects_the_rank_for_every_order_of_zeros_and_ones(count):
    """A network of comparators that is right on all 0/1 inputs is right on all inputs (the 0-1 principle)."""
    codes = range(2**count) if count <= 16 else np.random.default_rng(0).integers(0, 2**count, 20000)
    bits = (np.asarray(codes)[:, None] >> np.arange(count)) & 1
    values = [bits[:, i] for i in range(count)]
    for low, high, _, _ in _comparators(count):
        values[low], values[high] = (
            np.minimum(values[low], values[high]),
            np.maximum(values[low], values[high]),
        )
    assert np.array_equal(values[count // 2], np.sort(bits, 1)[:, count // 2])


def test_constant_images_are_unchanged():
    images = torch.full((2, 3, 9, 7), 0.3)
    assert torch.equal(DEFENSES.create("median_filter")(images), images)


def test_size_1_is_the_identity(photos):
    images = photos(2, 16, 16)
    assert torch.equal(DEFENSES.create("median_filter", {"size": 1})(images), images)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_gradient_agrees_with_finite_differences(size):
    images = torch.rand(1, 3, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    defense = DEFENSES.create("median_filter", {"size": size})
    assert torch.autograd.gradcheck(defense, images.requires_grad_(), eps=1e-7)


def test_at_ties_the_gradient_goes_to_one_pixel():
    images = torch.full((1, 3, 5, 5), 0.5, requires_grad=True)
    DEFENSES.create("median_filter")(images).sum().backward()
    assert images.grad.sum() == pytest.approx(75)
    assert torch.equal(images.grad, images.grad.round())


def test_size_0_is_refused():
    with pytest.raises(PluginError, match=r"median_filter.*at least 1, got 0"):
        DEFENSES.create("median_filter", {"size": 0})
