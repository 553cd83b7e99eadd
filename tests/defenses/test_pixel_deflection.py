import numpy as np
import pytest
import torch

from bench.errors import PluginError
from bench.registry import DEFENSES
from defenses import _wavelet


def deflect(images, rng, **params):
    return DEFENSES.create("pixel_deflection", {"sigma": 0, **params})(images, rng)


def test_values_come_from_the_window_in_the_same_channel(streams):
    """With values that name their own place, every changed value tells where it came from."""
    size = 40
    place = torch.arange(size * size, dtype=torch.float64).view(1, 1, size, size) / size**2
    images = place.expand(2, 3, size, size)
    out = deflect(images, streams(2), deflections=60, window=3)
    changed = (out != images).nonzero()
    assert 90 < len(changed) <= 120
    row, column = changed[:, 2], changed[:, 3]
    origin = (out[tuple(changed.T)] * size**2).round().long()
    distance = torch.stack([origin // size - row, origin % size - column]).abs()
    assert (distance.max(0).values <= 3).float().mean() > 0.9  # a value may be passed on
    assert (distance <= 9).all() and (origin // size >= 1).all() and (origin % size >= 1).all()
    channels = [set(map(tuple, changed[changed[:, 1] == c][:, [0, 2, 3]].tolist())) for c in range(3)]
    assert channels[0] != channels[1] != channels[2]


def test_follows_the_sequential_loop(streams):
    images = torch.rand(2, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    out = deflect(images, streams(2), deflections=100, window=2)
    draws = streams(2).uniform((34, 3, 4)).double()
    expected = images.clone()
    for i in range(2):
        for step in range(34):
            for c in range(3):
                u = draws[i, step, c]
                r, k = int(u[0] * 9), int(u[1] * 7)
                rows = range(max(1, r - 2), min(8, r + 2) + 1)
                columns = range(max(1, k - 2), min(6, k + 2) + 1)
                r0, k0 = rows[int(u[2] * len(rows))], columns[int(u[3] * len(columns))]
                expected[i, c, r, k] = expected[i, c, r0, k0]
    assert torch.equal(out, expected)


@pytest.mark.parametrize(("size", "most"), [(32, 6), (96, 39), (224, 201)])
def test_default_count_follows_the_area(size, most, streams):
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    changed = (deflect(images, streams(2)) != images).sum((1, 2, 3))
    assert (changed <= most).all() and (changed >= most * 0.8).all()


def test_one_pixel_images_work(streams):
    images = torch.rand(2, 3, 1, 1)
    assert torch.equal(deflect(images, streams(2), deflections=30), images)


def test_nothing_to_do_is_the_identity(photos, streams):
    images = photos(2, 32, 32)
    assert torch.equal(deflect(images, streams(2), deflections=0), images)
    smoothed = DEFENSES.create("pixel_deflection", {"deflections": 0, "sigma": 1e-6})(images, streams(2))
    assert torch.allclose(smoothed, images, atol=1e-6)


def haar_matrix(n):
    """Rows: means and differences of neighbouring pairs of n samples (n even), orthonormal."""
    low, high = np.zeros((n // 2, n)), np.zeros((n // 2, n))
    for i in range(n // 2):
        low[i, 2 * i : 2 * i + 2] = np.sqrt(0.5)
        high[i, 2 * i : 2 * i + 2] = np.sqrt(0.5), -np.sqrt(0.5)
    return low, high


def shrink(plane, variance, levels):
    """One plane of even sides, from the definition."""
    if levels == 0:
        return plane
    (lr, hr), (lc, hc) = haar_matrix(plane.shape[0]), haar_matrix(plane.shape[1])
    out = lr.T @ shrink(lr @ plane @ lc.T, variance, levels - 1) @ lc
    for left, right in ((lr, hc), (hr, lc), (hr, hc)):
        band = left @ plane @ right.T
        threshold = variance / np.sqrt(max((band**2).mean() - variance, np.finfo(np.float32).eps))
        out += left.T @ (np.sign(band) * np.maximum(np.abs(band) - threshold, 0)) @ right
    return out


@pytest.mark.parametrize(("size", "levels"), [((32, 32), 2), ((96, 64), 3), ((10, 12), 1)])
def test_wavelets_shrink_as_defined(size, levels, photos):
    planes = photos(1, *size)[0].double().numpy()
    variance = torch.full((1, 3, 1, 1), 0.04**2, dtype=torch.float64)
    got = _wavelet._shrink(torch.from_numpy(planes)[None], variance)[0].numpy()
    expected = np.stack([shrink(plane, 0.04**2, levels) for plane in planes])
    assert np.abs(got - expected).max() < 1e-12
    assert np.abs(got - planes).mean() > 1e-3


@pytest.mark.parametrize("size", [(32, 32), (31, 45), (96, 96)])
@pytest.mark.parametrize("sigma", [0.01, 0.04])
def test_wavelets_equal_skimage(size, sigma, photos):
    pytest.importorskip("pywt")
    from skimage import color
    from skimage.restoration import denoise_wavelet

    images = photos(2, *size)
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        expected = denoise_wavelet(image, sigma=sigma, convert2ycbcr=True, channel_axis=-1)
        got = _wavelet.denoise(images, sigma, "image")[i].permute(1, 2, 0).numpy()
        assert np.abs(got - expected).max() < 2e-6
        ycc = color.rgb2ycbcr(image)
        for c in range(3):
            low, high = ycc[..., c].min(), ycc[..., c].max()
            ycc[..., c] = (
                denoise_wavelet((ycc[..., c] - low) / (high - low), sigma=sigma) * (high - low) + low
            )
        got = _wavelet.denoise(images, sigma, "channel")[i].permute(1, 2, 0).numpy()
        assert np.abs(got - color.ycbcr2rgb(ycc)).max() < 2e-6


def test_constant_and_grey_images_survive(streams):
    images = torch.full((2, 3, 16, 16), 0.5)
    images[1] = torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
    for units in ("image", "channel"):
        out = _wavelet.denoise(images, 0.04, units)
        assert torch.isfinite(out).all()
        assert torch.allclose(out[0], images[0], atol=1e-6)
        assert torch.allclose(out[1, 0], out[1, 2], atol=1e-5)
        x = images.clone().requires_grad_()
        _wavelet.denoise(x, 0.04, units).square().sum().backward()
        assert torch.isfinite(x.grad).all() and x.grad.abs().max() < 100


@pytest.mark.parametrize("units", ["image", "channel"])
def test_gradient_agrees_with_finite_differences(units, streams):
    images = torch.rand(2, 3, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    defense = DEFENSES.create("pixel_deflection", {"deflections": 12, "sigma_units": units})
    assert torch.autograd.gradcheck(lambda x: defense(x, streams(2)), images.requires_grad_(), fast_mode=True)


def test_bad_parameters_are_one_line():
    for params, message in (
        ({"deflections": -1}, "deflections"),
        ({"window": 0}, "window"),
        ({"sigma": -0.1}, "sigma"),
    ):
        with pytest.raises(PluginError, match=f"pixel_deflection.*{message}"):
            DEFENSES.create("pixel_deflection", params)
