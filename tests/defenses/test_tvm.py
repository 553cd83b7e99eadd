import numpy as np
import pytest
import torch
from skimage.restoration import denoise_tv_bregman, denoise_tv_chambolle

from bench.errors import PluginError
from bench.registry import DEFENSES
from defenses import _tv

SIZES = [(32, 32), (31, 45), (2, 5), (5, 2)]


def as_arrays(images):
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("weight", [10.0, 30.0, 1 / 0.03, 1 / 0.003])
def test_bregman_equals_skimage(size, weight, photos):
    images = photos(4, *size)
    out = DEFENSES.create("tvm", {"weight": weight, "weight_is": "bregman"})(images)
    expected = np.stack([denoise_tv_bregman(image, weight, channel_axis=None) for image in as_arrays(images)])
    assert np.abs(as_arrays(out) - expected).max() < 5e-6


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("weight", [0.003, 0.03, 0.1])
def test_chambolle_equals_skimage(size, weight, photos):
    images = photos(4, *size)
    out = DEFENSES.create("tvm", {"weight": weight, "method": "chambolle"})(images)
    expected = np.stack([denoise_tv_chambolle(image, weight, channel_axis=-1) for image in as_arrays(images)])
    assert np.abs(as_arrays(out) - expected).max() < 2e-5


def test_limits_on_iterations_are_skimages(photos):
    images = photos(2, 20, 30)
    for iterations in (1, 3, 8, 9, 17):
        options = {"max_iter": iterations, "tolerance": 0.0}
        out = DEFENSES.create("tvm", {"weight": 0.1, **options})(images)
        expected = np.stack(
            [denoise_tv_bregman(i, 10, iterations, 0.0, channel_axis=None) for i in as_arrays(images)]
        )
        assert np.abs(as_arrays(out) - expected).max() < 5e-6
        out = DEFENSES.create("tvm", {"weight": 0.1, "method": "chambolle", **options})(images)
        expected = np.stack(
            [denoise_tv_chambolle(i, 0.1, 0.0, iterations, channel_axis=-1) for i in as_arrays(images)]
        )
        assert np.abs(as_arrays(out) - expected).max() < 2e-5


def test_images_stop_on_their_own(photos):
    """A flat image stops at once, a busy one goes on: the batch holds neither back nor on."""
    images = photos(3, 32, 32)
    images[1] = 0.5
    images[2] = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    for method in ("bregman", "chambolle"):
        defense = DEFENSES.create("tvm", {"method": method})
        together = defense(images)
        for i in range(3):
            assert torch.equal(together[i : i + 1], defense(images[i : i + 1]))


def test_conventions_of_the_weight(photos):
    images = photos(2, 32, 32)
    for method in ("bregman", "chambolle"):
        create = lambda m=method, **p: DEFENSES.create("tvm", {"method": m, **p})(images)  # noqa: E731
        assert torch.allclose(create(weight=0.1), create(weight=10.0, weight_is="bregman"), atol=1e-6)

    def total_variation(x):
        return (x.diff(dim=2).abs().mean() + x.diff(dim=3).abs().mean()).item()

    def strength(**params):
        return total_variation(DEFENSES.create("tvm", params)(images))

    assert (
        strength(weight=10, weight_is="bregman")
        < strength(weight=30, weight_is="bregman")
        < total_variation(images)
    )
    assert strength(weight=0.03) < strength(weight=0.003)


def test_identity_as_the_weight_vanishes(photos):
    images = photos(2, 32, 32)
    assert torch.allclose(
        DEFENSES.create("tvm", {"weight": 1e-7, "method": "chambolle"})(images), images, atol=1e-5
    )
    converged = DEFENSES.create("tvm", {"weight": 1e-7, "tolerance": 1e-8, "max_iter": 500})(images)
    # scikit-image's border pulls the first row and column towards the second, whatever the weight.
    assert torch.allclose(converged[..., 1:, 1:], images[..., 1:, 1:], atol=1e-3)


def random_images(*shape):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("weight", [0.03, 0.3])
@pytest.mark.parametrize("method", ["bregman", "chambolle"])
def test_gradient_agrees_with_finite_differences(method, weight):
    defense = DEFENSES.create("tvm", {"method": method, "weight": weight})
    images = random_images(2, 2, 4, 5)
    images[1] = 0.5 + 0.1 * images[1]  # stops earlier than the other
    assert torch.autograd.gradcheck(defense, images.requires_grad_(), fast_mode=True)


def test_gradient_of_many_chunks_with_images_stopping_in_different_ones():
    images = random_images(3, 1, 5, 4)
    images[0] = 0.5 + 0.01 * images[0]
    images[2] = images[2].round()
    bregman = lambda x: _tv.bregman(x, 5.0, 1e-4, 100)  # noqa: E731
    chambolle = lambda x: _tv.chambolle(x, 0.2, 1e-5, 200)  # noqa: E731
    for solver in (bregman, chambolle):
        for seed in range(3):
            torch.manual_seed(seed)  # of the direction that gradcheck tries
            assert torch.autograd.gradcheck(solver, images.clone().requires_grad_(), fast_mode=True)


def test_gradient_is_finite_on_flat_images():
    images = torch.full((1, 3, 8, 8), 0.5)
    images[:, :, 4:] = 0.7
    for params in ({}, {"method": "chambolle"}):
        x = images.clone().requires_grad_()
        DEFENSES.create("tvm", params)(x).square().sum().backward()
        assert torch.isfinite(x.grad).all() and x.grad.abs().max() < 100


def sequential(image, kept, mu, tolerance, max_iter, sweeps, quarter):
    """Guo et al.'s solver pixel by pixel on one image (C, H, W)."""
    _, height, width = image.shape
    lam = 2 * mu
    u, previous = image.copy(), image.copy()
    d, b = np.zeros((2, *image.shape)), np.zeros((2, *image.shape))
    steps = ((0, 1), (1, 0))
    for _ in range(max_iter):
        flow = (b - d).sum(0)
        flow[:, :, 1:] += (d - b)[0, :, :, :-1]
        flow[:, 1:] += (d - b)[1, :, :-1]
        for _ in range(sweeps):
            for c, y, x in np.ndindex(*image.shape):
                around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
                around = [u[c, i, j] for i, j in around if 0 <= i < height and 0 <= j < width]
                total, n = flow[c, y, x] + sum(around), len(around)
                if kept[c, y, x]:
                    u[c, y, x] = (lam * total + mu * image[c, y, x]) / (mu + n * lam)
                else:
                    u[c, y, x] = total / (4 if quarter else n)
        for c, y, x in np.ndindex(*image.shape):
            t = np.zeros(2)
            for axis, (dy, dx) in enumerate(steps):
                if y + dy < height and x + dx < width:
                    t[axis] = u[c, y + dy, x + dx] - u[c, y, x]
            t += b[:, c, y, x]
            s = np.sqrt((t**2).sum())
            d[:, c, y, x] = s * lam * t / (s * lam + 1)
            b[:, c, y, x] = t - d[:, c, y, x]
        rms = np.sqrt(((u - previous) ** 2).mean())
        previous = u.copy()
        if rms <= tolerance:
            break
    return u


@pytest.mark.parametrize("quarter", [False, True])
def test_fill_in_equals_the_sequential_solver(quarter):
    images = random_images(2, 2, 6, 5)
    kept = random_images(2, 2, 6, 5).flip(2) > 0.5
    out = _tv.masked_bregman(images * kept, kept, 1 / 0.03, 1e-2, 100, quarter=quarter)
    for image, keep, got in zip(images * kept, kept, out, strict=True):
        expected = sequential(image.numpy(), keep.numpy(), 1 / 0.03, 1e-2, 100, 10, quarter)
        assert np.abs(got.numpy() - expected).max() < 1e-12


def test_fill_in_restores_dropped_values_and_differentiates(photos, streams):
    images = photos(3, 32, 32)
    defense = DEFENSES.create("tvm", {"p": 0.5})
    assert defense.stochastic
    kept = streams(3).uniform((3, 32, 32)) >= 0.5
    dropped = torch.where(kept, images, 0.0)
    restored = defense(images, streams(3))
    assert (restored - images).abs().mean() < 0.2 * (dropped - images).abs().mean()
    darker = DEFENSES.create("tvm", {"p": 0.5, "border": "code"})(images, streams(3))
    edge = torch.ones(32, 32, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    assert darker[..., edge].mean() < restored[..., edge].mean() - 0.01
    kept = random_images(2, 1, 4, 5).flip(2) > 0.4
    assert torch.autograd.gradcheck(
        lambda x: _tv.masked_bregman(x * kept, kept, 1 / 0.03, 1e-2, 100),
        (0.1 + random_images(2, 1, 4, 5)).requires_grad_(),
        fast_mode=True,
    )


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"weight": 0}, "weight must be positive"),
        ({"p": 1}, r"p must be in \[0, 1\)"),
        ({"p": 0.5, "method": "chambolle"}, "needs method 'bregman'"),
        ({"max_iter": 0}, "max_iter must be at least 1"),
        ({"method": "bregmann"}, "method"),
    ],
)
def test_bad_parameters_are_one_line(params, message):
    with pytest.raises(PluginError, match=f"tvm.*{message}"):
        DEFENSES.create("tvm", params)
