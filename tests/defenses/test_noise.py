import pytest
import torch

from bench.errors import PluginError
from bench.registry import DEFENSES

EPS = 8 / 255


def drawn(kind, photos, streams):
    images = photos(4, 64, 64) * 0.5 + 0.25
    return DEFENSES.create("noise", {"kind": kind})(images, streams(4)) - images


def test_sign_noise_is_plus_or_minus_eps_at_every_pixel_and_channel(photos, streams):
    noise = drawn("sign", photos, streams)
    assert torch.allclose(noise.abs(), torch.tensor(EPS), atol=1e-6)
    assert abs(noise.mean()) < 0.02 * EPS * 3
    assert not torch.equal(noise[:, 0].sign(), noise[:, 1].sign())


def test_uniform_and_gaussian_noise_have_the_declared_size(photos, streams):
    uniform = drawn("uniform", photos, streams)
    assert uniform.abs().max() <= EPS + 1e-6 and uniform.std() == pytest.approx(EPS / 3**0.5, rel=0.03)
    assert drawn("gaussian", photos, streams).std() == pytest.approx(EPS, rel=0.03)


def test_images_get_different_noise(photos, streams):
    noise = drawn("sign", photos, streams)
    assert not torch.equal(noise[0], noise[1])


def test_purified_images_stay_in_range_and_keep_the_budget(photos, streams):
    images = photos(4, 32, 32)
    out = DEFENSES.create("noise", {"eps": "16/255"}).purify(images, streams(4)).images
    assert (out - images).abs().max() <= 16 / 255 + 1e-6
    assert out.min() >= 0 and out.max() <= 1


def test_eps_in_grey_levels_is_refused_in_one_line():
    with pytest.raises(PluginError, match=r"noise.*eps.*8/255"):
        DEFENSES.create("noise", {"eps": 8})
