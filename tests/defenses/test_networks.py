"""Networks of the learned defenses: sizes as published, any image size, no dependence on the batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from defenses.networks.apegan import APEDiscriminator, APEGenerator
from defenses.networks.padding import padded
from defenses.networks.pix2pixhd import GlobalGenerator, MultiscaleDiscriminator
from defenses.networks.rrdb import ResG, RRDBPurifier
from defenses.networks.unet import DAE, DUNET, UNet
from defenses.networks.vgg_discriminators import CAFDDiscriminator, NRPDiscriminator
from tasks.microbatch import micro_batches

PAPER = {
    # HGD: sum over the layers of its section 3.1; 11.03 M.
    "dunet": (DUNET, {}, 11_033_984),
    # CAFD: the same with 4,867 biases.
    "dunet-cafd": (DUNET, {"bias": True, "bn_momentum": 0.9}, 11_033_984 + 4_867),
    "dae": (DAE, {}, 11_033_984 - 9 * (256 * 256 + 256 * 256 + 128 * 128 + 64 * 64)),
    "nrp": (RRDBPurifier, {}, 16_550_275),
    "nrp_resg": (ResG, {}, 3 * 9 * 64 + 64 + 23 * 2 * (64 * 9 * 64 + 64) + 64 * 9 * 3 + 3),
    "global-2": (GlobalGenerator, {}, 11_378_179),
    "global-4": (GlobalGenerator, {"downsamplings": 4}, 182_443_267),
    "multiscale": (MultiscaleDiscriminator, {}, 2 * 2_764_737),
    "ape-g": (APEGenerator, {}, 4_864 + 204_928 + 204_864 + 4_803 + 2 * (64 + 128 + 64)),
    "ape-g-port": (
        APEGenerator, {"variant": "port"}, 3_136 + 131_200 + 131_136 + 3_075 + 2 * (64 + 128 + 64)
    ),
    "ape-d": (APEDiscriminator, {}, 4_864 + 204_928 + 819_456 + 4_096 + 1 + 2 * (128 + 256)),
    "ape-d-port": (APEDiscriminator, {"variant": "port"}, 1_792 + 73_856 + 295_168 + 2_305 + 2 * 384),
    "cafd-d": (CAFDDiscriminator, {}, 899_465),
    "nrp-d": (NRPDiscriminator, {}, 14_499_401),
}  # fmt: skip

SMALL = {
    "dunet": lambda: DUNET(4),
    "dunet-bias": lambda: DUNET(4, bias=True, bn_momentum=0.9),
    "dae": lambda: DAE(4),
    "unet": lambda: UNet(4, 3),
    "nrp": lambda: RRDBPurifier(8, 2, 4),
    "nrp_resg": lambda: ResG(8, 2),
    "global": lambda: GlobalGenerator(4, 2, 2),
    "ape-g": lambda: APEGenerator("official", 4),
    "ape-g-port": lambda: APEGenerator("port", 4),
}


@pytest.fixture(params=list(SMALL))
def network(request) -> nn.Module:
    torch.manual_seed(0)
    net = SMALL[request.param]()
    # Statistics other than 0 and 1, so that evaluation mode is a test of its own.
    net.train()
    with torch.no_grad():
        net(torch.rand(4, 3, 32, 32))
    return net.eval()


@pytest.mark.parametrize("name", list(PAPER))
def test_parameter_counts_at_paper_size(name):
    make, args, expected = PAPER[name]
    with torch.device("meta"):
        network = make(**args)
    assert sum(p.numel() for p in network.parameters()) == expected


@pytest.mark.parametrize("size", [(32, 32), (31, 45), (1, 5)])
def test_every_size_comes_back(network, size):
    images = torch.rand(2, 3, *size)
    before = images.clone()
    out = network(images)
    assert out.shape == images.shape and out.dtype == torch.float32
    assert torch.isfinite(out).all() and torch.equal(images, before)


def test_gradient_reaches_every_parameter_and_pixel(network):
    images = torch.rand(2, 3, 33, 30, requires_grad=True)
    network.train()(images).square().sum().backward()
    assert images.grad is not None and (images.grad != 0).float().mean() > 0.9
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0 or name.endswith("bias"), name


def test_company_does_not_matter_through_micro_batches(network):
    images = torch.rand(5, 3, 20, 28)
    with torch.no_grad():
        whole = micro_batches(network, images, 2)
        parts = torch.cat([micro_batches(network, images[i : i + 1], 2) for i in range(5)])
    assert torch.allclose(whole, parts, atol=1e-6)
    with torch.no_grad():
        one = micro_batches(network, images, 1)
        alone = torch.cat([micro_batches(network, images[i : i + 1], 1) for i in range(5)])
    assert torch.equal(one, alone)


def test_padding_repeats_the_border_and_is_cropped():
    seen = []

    def network(x):
        seen.append(x)
        return x * 2

    images = torch.rand(1, 3, 5, 8)
    assert torch.equal(padded(network, images, 4), images * 2)
    assert seen[0].shape == (1, 3, 8, 8)
    assert torch.equal(seen[0][..., 5:, :], images[..., 4:5, :].expand(1, 3, 3, 8))
    padded(network, images, 4, minimum=9)
    assert seen[1].shape == (1, 3, 12, 12)
    exact = torch.rand(1, 3, 8, 4)
    padded(network, exact, 4)
    assert seen[2] is exact


def test_laterals_are_enlarged_to_ceil_sizes():
    net = DUNET(4).eval()
    sizes = []
    for block in net.encoder:
        block.register_forward_hook(lambda _m, _i, out: sizes.append(tuple(out.shape[-2:])))
    net(torch.rand(1, 3, 299, 45))
    assert sizes == [(299, 45), (150, 23), (75, 12), (38, 6), (19, 3)]


def test_dunet_predicts_minus_the_noise():
    net = DUNET(4).eval()
    nn.init.zeros_(net.last.weight)
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(net(images), images)
    dae = DAE(4).eval()
    nn.init.zeros_(dae.last.weight)
    assert not dae(images).any()


def test_cafd_batch_norm_follows_the_last_batch():
    momenta = {m.momentum for m in DUNET(4, bn_momentum=0.9).modules() if isinstance(m, nn.BatchNorm2d)}
    assert momenta == {0.9}


def test_published_nrp_layout():
    names = list(RRDBPurifier(8, 2, 4).state_dict())
    assert names[:2] == ["conv_first.weight", "conv_first.bias"]
    assert "RRDB_trunk.1.RDB3.conv5.weight" in names and names[-1] == "trunk_conv.bias"
    names = list(ResG(8, 2).state_dict())
    assert "recon_trunk.1.conv2.weight" in names and names[-1] == "conv_last.bias"


@pytest.mark.parametrize(
    "make",
    [
        lambda size: APEDiscriminator("official", 4, size),
        lambda size: APEDiscriminator("port", 4, size),
        lambda size: CAFDDiscriminator(4, size),
        lambda size: NRPDiscriminator(4, size),
    ],
)
def test_discriminators_give_a_logit_per_image(make):
    net = make((32, 48))
    assert net(torch.rand(2, 3, 32, 48)).shape == (2, 1)


@pytest.mark.parametrize("make", [lambda s: APEDiscriminator("port", 4, s), lambda s: NRPDiscriminator(4, s)])
def test_discriminators_refuse_images_that_vanish(make):
    with pytest.raises(ValueError, match="6x48 pixels are too small"):
        make((6, 48))


def test_multiscale_discriminator_returns_all_features():
    net = MultiscaleDiscriminator(3 + 10, 4)
    out = net(torch.rand(2, 13, 32, 32))
    assert len(out) == 2 and all(len(scale) == 5 for scale in out)
    assert [f.shape[1] for f in out[0]] == [4, 8, 16, 32, 1]
    assert out[0][-1].shape[-1] > out[1][-1].shape[-1]


def test_the_global_generator_runs_at_a_size_of_its_own() -> None:
    torch.manual_seed(0)
    own, plain = GlobalGenerator(4, 2, 1, size=16), GlobalGenerator(4, 2, 1)
    plain.load_state_dict(own.state_dict())
    seen: list[tuple[int, ...]] = []
    own.model.register_forward_hook(lambda _module, inputs, _out: seen.append(tuple(inputs[0].shape)))
    images = torch.rand(1, 3, 20, 26) * 2 - 1
    assert own(images).shape == images.shape and seen == [(1, 3, 16, 16)]
    inside = torch.rand(1, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(own(inside), plain(inside))
    with pytest.raises(ValueError, match="size must be at least 8"):
        GlobalGenerator(4, 2, 1, size=4)
