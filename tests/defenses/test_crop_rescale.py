import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from bench.errors import PluginError
from bench.registry import DEFENSES


@pytest.mark.parametrize("position", ["random", "center"])
@pytest.mark.parametrize("size", [(32, 32), (31, 45)])
def test_is_a_resized_window(position, size, photos, streams):
    images = photos(6, *size)
    defense = DEFENSES.create("crop_rescale", {"fraction": 0.7, "position": position})
    out = defense.purify(images, streams(6))
    height, width = int(size[0] * 0.7), int(size[1] * 0.7)
    offsets = set()
    for i in range(6):
        scale, offset = out.geometry.scale[i], out.geometry.offset[i]
        assert scale.tolist() == pytest.approx([size[0] / height, size[1] / width])
        top, left = (-offset / scale).round().int().tolist()
        offsets.add((top, left))
        window = images[i : i + 1, :, top : top + height, left : left + width]
        assert window.shape[-2:] == (height, width)
        expected = F.interpolate(window, size=size, mode="bilinear", align_corners=False)
        assert torch.equal(out.images[i], expected[0])
    assert (len(offsets) > 1) == (position == "random")
    if position == "center":
        assert offsets == {((size[0] - height) // 2, (size[1] - width) // 2)}


def test_agrees_with_pils_bilinear_resize(photos):
    images = photos(1, 32, 32)
    out = DEFENSES.create("crop_rescale", {"fraction": 0.5, "position": "center"}).purify(images).images
    for channel, got in zip(images[0, :, 8:24, 8:24].numpy(), out[0].numpy(), strict=True):
        expected = np.asarray(Image.fromarray(channel).resize((32, 32), Image.Resampling.BILINEAR))
        assert np.abs(expected - got).max() < 1e-5


def test_all_places_occur(streams):
    images = torch.zeros(300, 3, 8, 8)
    offset = DEFENSES.create("crop_rescale", {"fraction": 0.625})(images, streams(300)).geometry.offset
    assert sorted(((-offset / 1.6).round().unique()).tolist()) == [0, 1, 2, 3]


def test_fraction_1_is_the_identity(photos, streams):
    images = photos(3, 31, 45)
    out = DEFENSES.create("crop_rescale", {"fraction": 1.0}).purify(images, streams(3))
    assert torch.equal(out.images, images) and not out.geometry.offset.any()


def test_window_of_the_paper():
    geometry = DEFENSES.create("crop_rescale", {"position": "center"})(torch.zeros(1, 3, 224, 224)).geometry
    assert geometry.scale.tolist() == [[pytest.approx(224 / 90)] * 2]


def test_gradient_agrees_with_finite_differences(streams):
    images = torch.rand(2, 3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    defense = DEFENSES.create("crop_rescale", {"fraction": 0.6})
    assert torch.autograd.gradcheck(lambda x: defense(x, streams(2)).images, images.requires_grad_())


def test_fraction_out_of_range_is_refused():
    with pytest.raises(PluginError, match=r"crop_rescale.*\(0, 1\], got 1.5"):
        DEFENSES.create("crop_rescale", {"fraction": 1.5})
