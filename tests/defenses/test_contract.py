"""What every defense promises, whatever it does inside."""

from __future__ import annotations

import pytest
import torch

from bench.chain import Chain, bpda
from bench.protocols import Defense, Warped
from bench.registry import DEFENSES
from bench.rng import ImageRNG

CASES = {
    "none": ("none", {}),
    "noise": ("noise", {}),
    "noise-uniform": ("noise", {"kind": "uniform"}),
    "noise-gaussian": ("noise", {"kind": "gaussian"}),
    "jpeg": ("jpeg", {}),
    "jpeg-444-truncate": ("jpeg", {"quality": 20, "subsampling": "4:4:4", "rounding": "truncate"}),
    "jpeg-422-straight": ("jpeg", {"subsampling": "4:2:2", "gradient": "straight_through"}),
    "median_filter": ("median_filter", {}),
    "median_filter-2": ("median_filter", {"size": 2}),
    "bit_depth": ("bit_depth", {}),
    "bit_depth-ares": ("bit_depth", {"bits": 4, "rule": "ares"}),
    "tvm": ("tvm", {}),
    "tvm-chambolle": ("tvm", {"method": "chambolle"}),
    "tvm-drop": ("tvm", {"p": 0.5}),
    "feature_distillation": ("feature_distillation", {}),
    "feature_distillation-ycbcr": ("feature_distillation", {"variant": "ycbcr"}),
    "crop_rescale": ("crop_rescale", {"fraction": 0.8}),
    "crop_rescale-center": ("crop_rescale", {"fraction": 0.8, "position": "center"}),
    "pixel_deflection": ("pixel_deflection", {}),
    "pixel_deflection-image": ("pixel_deflection", {"deflections": 50, "sigma_units": "image"}),
    "quilting": ("quilting", {"patches": 300}),
    "quilting-random": ("quilting", {"patches": 300, "neighbors": 10, "gradient": "identity"}),
    "nips_r3-ens": ("nips_r3", {}),
    "nips_r3-inc": ("nips_r3", {"transform": "inc"}),
    "nips_r3-vgg": ("nips_r3", {"transform": "vgg"}),
    "random_resize_pad": ("random_resize_pad", {}),
    "random_resize_pad-paper": ("random_resize_pad", {"mode": "paper"}),
}


@pytest.fixture(params=list(CASES))
def defense(request) -> Defense:
    return DEFENSES.create(*CASES[request.param]).eval()


@pytest.fixture(params=[(32, 32), (31, 45)], ids=["32x32", "31x45"])
def size(request):
    return request.param


def purify(defense: Defense, images: torch.Tensor, rng: ImageRNG) -> Warped:
    return defense.purify(images, rng if defense.stochastic else None)


def test_shape_range_dtype_and_input_left_alone(defense, size, photos, streams):
    images = photos(3, *size)
    before = images.clone()
    out = purify(defense, images, streams(3))
    assert out.images.dtype == torch.float32 and out.images.device == images.device
    assert out.images.shape == (3, 3, *out.geometry.out_size)
    assert out.geometry.in_size == size
    assert 0 <= out.images.min() and out.images.max() <= 1
    assert torch.equal(images, before)
    assert defense.check_input(size) is None


def test_same_seed_same_output(defense, size, photos, streams):
    images = photos(3, *size)
    first, second = (purify(defense, images, streams(3)) for _ in range(2))
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.geometry.offset, second.geometry.offset)


def test_draws_differ_between_calls_and_seeds(defense, photos, streams):
    images = photos(3, 32, 32)
    rng = streams(3)
    outputs = [purify(defense, images, r) for r in (rng, rng, streams(3, "other"))]
    for other in outputs[1:]:
        same = torch.equal(outputs[0].images, other.images)
        assert same != defense.stochastic


def test_batch_split_does_not_matter(defense, size, photos, streams):
    images = photos(5, *size)
    whole = purify(defense, images, streams(5))
    for part in ([0], [1, 2], [4, 3]):
        split = purify(defense, images[part], streams(5).select(part))
        assert torch.equal(split.images, whole.images[part])
        assert torch.equal(split.geometry.scale, whole.geometry.scale[part])
        assert torch.equal(split.geometry.offset, whole.geometry.offset[part])


def test_gradient_flows_or_its_absence_is_declared(defense, size, photos, streams):
    images = photos(2, *size).requires_grad_()
    out = purify(defense, images, streams(2)).images
    if not defense.differentiable:
        # A gradient that is zero or missing must not be mistaken for a robust defense.
        if out.requires_grad:
            (grad,) = torch.autograd.grad(out.sum(), images, allow_unused=True)
            assert grad is None or not grad.any()
        return
    (grad,) = torch.autograd.grad(out.square().sum(), images)
    assert torch.isfinite(grad).all() and (grad != 0).float().mean() > 0.2


def test_bpda_has_exact_values_and_a_gradient(defense, size, photos, streams):
    images = photos(2, *size).requires_grad_()
    expected = purify(defense, images.detach(), streams(2))
    out = bpda(defense, images, streams(2))
    assert torch.equal(out.images, expected.images)
    assert torch.equal(out.geometry.offset, expected.geometry.offset)
    (grad,) = torch.autograd.grad(out.images.square().sum(), images)
    assert torch.isfinite(grad).all() and (grad != 0).float().mean() > 0.05


@pytest.mark.parametrize("case", ["none", "noise", "median_filter", "random_resize_pad", "crop_rescale"])
def test_bpda_of_a_defense_with_its_own_gradient_is_that_gradient(case, photos, streams):
    defense = DEFENSES.create(*CASES[case])
    images = photos(2, 31, 45).requires_grad_()
    (own,) = torch.autograd.grad(purify(defense, images, streams(2)).images.square().sum(), images)
    (through,) = torch.autograd.grad(bpda(defense, images, streams(2)).images.square().sum(), images)
    assert torch.equal(own, through)


def test_works_in_a_chain(defense, photos, streams):
    chain = Chain([DEFENSES.create("noise"), defense])
    images = photos(2, 32, 32)
    out = chain.purify(images, streams(2))
    assert out.images.shape == (2, 3, *out.geometry.out_size)


def test_parameters_are_recorded_with_defaults(defense):
    names = {parameter.name for parameter in DEFENSES.parameters(defense.name)}
    assert set(defense.params) == names
    identity = defense.identity()
    assert identity["name"] == defense.name and identity["version"] == defense.version
    # What is missing is a place on disk, named by its content instead.
    assert set(identity["params"]) == names or len(identity) > 3
    assert type(defense).__doc__
