import pytest
import torch
from torch.nn import functional as F

from bench.chain import bpda
from bench.errors import PluginError, WeightsError
from bench.registry import DEFENSES
from bench.rng import ImageRNG
from bench.weights import save_safetensors
from defenses.networks.edsr import EDSR


def identity_network() -> EDSR:
    """An EDSR that repeats every pixel: the first three channels pass the image, all residuals are zero."""
    network = EDSR(width=4, blocks=2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        for channel in range(3):
            network.head[0].weight[channel, channel, 1, 1] = 1
            for position in range(4):
                network.tail[0][0].weight[4 * channel + position, channel, 1, 1] = 1
            network.tail[1].weight[channel, channel, 1, 1] = 1
    return network


@pytest.fixture
def identity_file(tmp_path):
    save_safetensors(tmp_path / "identity.safetensors", identity_network().state_dict())
    return tmp_path / "identity.safetensors"


@pytest.fixture
def random_file(tmp_path):
    torch.manual_seed(0)
    state = EDSR(width=8, blocks=2).state_dict()
    # As published: with the fixed shifts of the mean colour, as a plain torch file.
    state["sub_mean.weight"], state["sub_mean.bias"] = torch.eye(3).view(3, 3, 1, 1), torch.zeros(3)
    state["add_mean.weight"], state["add_mean.bias"] = torch.eye(3).view(3, 3, 1, 1), torch.zeros(3)
    torch.save(state, tmp_path / "random.pt")
    return tmp_path / "random.pt"


def create(path, **params):
    return DEFENSES.create("sr", {"weights": str(path), **params})


def test_baseline_has_the_published_size_and_names():
    network = EDSR()
    assert sum(p.numel() for p in network.parameters()) == 1_369_859
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    assert shapes["head.0.weight"] == (64, 3, 3, 3) and shapes["body.15.body.2.bias"] == (64,)
    assert shapes["body.16.weight"] == (64, 64, 3, 3)
    assert shapes["tail.0.0.weight"] == (256, 64, 3, 3) and shapes["tail.1.weight"] == (3, 64, 3, 3)


@pytest.mark.parametrize("size", [(32, 32), (31, 45)])
def test_identity_network_repeats_pixels(size, identity_file, photos):
    images = photos(2, *size)
    assert torch.allclose(create(identity_file, sigma=0).purify(images).images, images, atol=1e-5)
    out = create(identity_file, sigma=0, output="x2").purify(images)
    assert torch.allclose(out.images, F.interpolate(images, scale_factor=2, mode="nearest"), atol=1e-5)
    assert out.geometry.out_size == (2 * size[0], 2 * size[1]) and (out.geometry.scale == 2).all()


def test_network_follows_the_definition(random_file, photos):
    images = photos(1, 12, 9)
    defense = create(random_file, sigma=0, output="x2")
    state = dict(defense.network.named_parameters())

    def conv(x, name):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)

    mean = torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1) * 255
    x = first = conv(images * 255 - mean, "head.0")
    for block in range(2):
        x = x + conv(conv(x, f"body.{block}.body.0").relu(), f"body.{block}.body.2")
    x = conv(x, "body.2") + first
    x = conv(F.pixel_shuffle(conv(x, "tail.0.0"), 2), "tail.1") + mean
    assert torch.allclose(defense(images).images * 255, x, atol=1e-3)


def test_wavelets_and_the_hidden_jpeg_act_in_between(identity_file, photos):
    images = photos(2, 32, 32)
    smooth = create(identity_file, sigma=0.04)
    expected = DEFENSES.create("pixel_deflection", {"deflections": 0, "sigma": 0.04})
    assert torch.allclose(
        smooth.purify(images).images, expected.purify(images, ImageRNG([0, 1])).images, atol=1e-5
    )
    squeezed = create(identity_file, sigma=0, between="jpeg")
    jpeg = DEFENSES.create("jpeg", {"rounding": "truncate"})
    assert torch.allclose(squeezed.purify(images).images, jpeg.purify(images).images, atol=1e-5)
    assert not squeezed.differentiable and smooth.differentiable


def test_gradients(random_file, photos):
    images = photos(2, 16, 16).requires_grad_()
    for params in ({}, {"output": "x2"}):
        defense = create(random_file, **params)
        (own,) = torch.autograd.grad(defense.purify(images).images.square().sum(), images)
        (through,) = torch.autograd.grad(bpda(defense, images).images.square().sum(), images)
        assert torch.isfinite(own).all() and own.abs().max() > 0
        assert torch.allclose(own, through, atol=1e-5)
    defense = create(random_file, between="jpeg")
    assert not defense.purify(images).images.requires_grad
    (through,) = torch.autograd.grad(bpda(defense, images).images.square().sum(), images)
    assert torch.isfinite(through).all() and through.abs().max() > 0


def test_batch_split_does_not_matter(random_file, photos):
    images = photos(4, 31, 45)
    defense = create(random_file)
    whole = defense.purify(images).images
    assert torch.allclose(defense.purify(images[1:3]).images, whole[1:3], atol=1e-6)
    assert torch.equal(defense.purify(images).images, whole)


def test_identity_names_the_weights_not_their_place(random_file, tmp_path):
    copy = tmp_path / "elsewhere.pt"
    copy.write_bytes(random_file.read_bytes())
    identity = create(random_file).identity()
    assert identity == create(copy).identity() and len(identity["weights"]) == 64
    assert str(tmp_path) not in str(identity)


def test_wrong_weights_are_one_line(random_file, tmp_path):
    with pytest.raises(WeightsError, match=r"nothing\.pt does not exist.*edsr_baseline_x2"):
        create(tmp_path / "nothing.pt")
    save_safetensors(tmp_path / "other.safetensors", {"conv.weight": torch.zeros(2, 2)})
    with pytest.raises(WeightsError, match=r"other\.safetensors is of another network: expected EDSR x2"):
        create(tmp_path / "other.safetensors")
    state = EDSR(width=8, blocks=2).state_dict()
    del state["tail.1.bias"]
    save_safetensors(tmp_path / "part.safetensors", state)
    with pytest.raises(WeightsError, match=r"EDSR x2 from .*missing.*tail\.1\.bias"):
        create(tmp_path / "part.safetensors")
    with pytest.raises(PluginError, match="sigma must not be negative"):
        create(random_file, sigma=-1)
