import pytest
import torch
from torch.nn import functional as F

from bench.registry import DEFENSES
from bench.rng import ImageRNG


def streams_of(n):
    return ImageRNG.for_images("many", [str(i) for i in range(n)])


@pytest.mark.parametrize("mode", ["code", "paper"])
@pytest.mark.parametrize("size", [(32, 32), (31, 45)])
def test_is_nearest_resize_plus_padding(mode, size, photos, streams):
    images = photos(6, *size)
    out = DEFENSES.create("random_resize_pad", {"mode": mode})(images, streams(6))
    height, width = out.geometry.out_size
    assert (height, width) == tuple(-(-side * 331 // 299) for side in size)
    for i in range(6):
        inner = [round(float(s) * side) for s, side in zip(out.geometry.scale[i], size, strict=True)]
        top, left = (int(o) for o in out.geometry.offset[i])
        resized = F.interpolate(images[i : i + 1], size=inner, mode="nearest")
        pad = (left, width - left - inner[1], top, height - top - inner[0])
        assert min(pad) >= 0
        assert torch.equal(F.pad(resized, pad, value=0.5)[0], out.images[i])


def test_sizes_and_places_at_299_are_those_of_the_code_and_the_paper():
    images = torch.zeros(250, 1, 299, 299)
    for mode, low, last in (("code", 310, 1), ("paper", 299, 0)):
        geometry = DEFENSES.create("random_resize_pad", {"mode": mode})(images, streams_of(250)).geometry
        assert geometry.out_size == (331, 331)
        inner = (geometry.scale * 299).round()
        assert inner.min() == low and inner.max() == 330
        assert torch.equal(inner[:, 0], inner[:, 1])
        room = 331 - inner - geometry.offset
        assert room.min() == last and geometry.offset.min() == 0


def test_sizes_at_32():
    out = DEFENSES.create("random_resize_pad")(torch.rand(200, 3, 32, 32), streams_of(200))
    inner = (out.geometry.scale * 32).round().unique()
    assert out.images.shape == (200, 3, 36, 36) and inner.tolist() == [33, 34, 35]


def test_each_image_draws_its_own(photos, streams):
    out = DEFENSES.create("random_resize_pad")(photos(1, 64, 64).repeat(20, 1, 1, 1), streams(20))
    draws = torch.cat([out.geometry.scale, out.geometry.offset], 1)
    assert len(draws.unique(dim=0)) > 10


def test_geometry_finds_a_marked_pixel_again(streams):
    images = torch.zeros(8, 3, 32, 32)
    images[:, :, 10, 20] = 1.0
    out = DEFENSES.create("random_resize_pad")(images, streams(8))
    for image, scale, offset in zip(out.images, out.geometry.scale, out.geometry.offset, strict=True):
        y, x = (image[0] == 1).nonzero().float().add(0.5).mean(0)
        assert abs(y - (10.5 * scale[0] + offset[0])) <= 1 and abs(x - (20.5 * scale[1] + offset[1])) <= 1


def test_gradient_agrees_with_finite_differences(streams):
    images = torch.rand(2, 3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    defense = DEFENSES.create("random_resize_pad")
    assert torch.autograd.gradcheck(lambda x: defense(x, streams(2)).images, images.requires_grad_())


def test_one_pixel_images_work(streams):
    for mode in ("code", "paper"):
        out = DEFENSES.create("random_resize_pad", {"mode": mode})(torch.rand(2, 3, 1, 1), streams(2))
        assert out.images.shape[-2:] == out.geometry.out_size == (2, 2)
