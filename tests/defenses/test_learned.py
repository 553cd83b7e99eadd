"""Learned defenses: weights by path, value ranges, keys, gradients, any size."""

from __future__ import annotations

import pytest
import torch

from bench.chain import Chain, bpda
from bench.errors import NotApplicable, PluginError, WeightsError
from bench.registry import DEFENSES
from bench.rng import ImageRNG
from bench.weights import save_safetensors
from defenses import _learned
from defenses.networks.build import PURIFIERS, purifier

NETWORKS = {
    "hgd": ("dunet", {"width": 4}),
    "hgd-dae": ("dae", {"width": 4, "residual": False}),
    "cafd": ("dunet", {"width": 4, "bias": True, "bn_momentum": 0.9}),
    "nrp": ("nrp", {"width": 8, "blocks": 2, "growth": 4}),
    "nrp-resg": ("nrp_resg", {"width": 8, "blocks": 2}),
    "nrp-unet": ("unet", {"width": 4, "depth": 2}),
    "apegan": ("apegan", {"variant": "official", "width": 4}),
    "apegan-port": ("apegan", {"variant": "port", "width": 4}),
    "alignment": ("global", {"width": 4, "downsamplings": 2, "blocks": 2}),
}
EXTRA = {"nrp-dynamic": ("nrp", {"dynamic": True}), "apegan-image": ("apegan", {"batch_norm": "image"})}
EXTRA["alignment-size"] = ("alignment", {"size": 24})
CASES = [*NETWORKS, *EXTRA]


def checkpoint(folder, case: str, **meta):
    name, args = NETWORKS[case]
    torch.manual_seed(3)
    network = purifier(name, args).train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = (
                1.0  # real statistics after one batch; of 0 and 1 the signal dies out on its way
            )
    with torch.no_grad():
        network(torch.rand(4, 3, 32, 32))
    path = folder / f"{case}.safetensors"
    save_safetensors(path, network.state_dict(), meta={"network": {"name": name, "args": args}, **meta})
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return {case: checkpoint(folder, case) for case in NETWORKS}


@pytest.fixture(params=CASES)
def defense(request, files):
    base, params = EXTRA.get(request.param, (request.param, {}))
    return DEFENSES.create(base.split("-")[0], {"weights": str(files[base]), **params}).eval()


def purify(defense, images, rng):
    return defense.purify(images, rng if defense.stochastic else None).images


@pytest.mark.parametrize("size", [(32, 32), (31, 45), (5, 9)])
def test_shape_range_dtype_and_input_left_alone(defense, size, photos, streams):
    images = photos(3, *size)
    before = images.clone()
    out = purify(defense, images, streams(3))
    assert out.shape == images.shape and out.dtype == torch.float32
    assert 0 <= out.min() and out.max() <= 1
    assert torch.equal(images, before)
    assert torch.equal(purify(defense, images, streams(3)), out)
    assert defense.trained and defense.differentiable


def test_company_does_not_matter(defense, photos, streams):
    images = photos(5, 20, 30)
    whole = purify(defense, images, streams(5))
    for part in ([0], [1, 2], [4, 3]):
        assert torch.equal(purify(defense, images[part], streams(5).select(part)), whole[part])


def test_white_box_gradient_is_the_true_one(defense, photos, true_gradient):
    true_gradient(defense, photos(2, 24, 24))


def test_bpda_has_exact_values_and_the_identity_gradient(defense, photos, streams):
    images = photos(2, 20, 20).requires_grad_()
    out = bpda(defense, images, streams(2)).images
    assert torch.equal(out.detach(), purify(defense, images.detach(), streams(2)))
    (grad,) = torch.autograd.grad(out.sum(), images)
    assert torch.equal(grad, torch.ones_like(grad))


def test_works_in_a_chain_with_rounding(files, photos):
    chain = Chain(
        [
            DEFENSES.create("nrp", {"weights": str(files["nrp"])}),
            DEFENSES.create("bit_depth", {"bits": 8}),
        ]
    )
    out = chain.purify(photos(1, 20, 20)).images * 255
    assert torch.allclose(out, out.round(), atol=1e-4)


def test_identity_names_the_content_and_not_the_path(files, tmp_path):
    copy = tmp_path / "elsewhere.safetensors"
    copy.write_bytes(files["hgd"].read_bytes())
    one, two = (DEFENSES.create("hgd", {"weights": str(path)}).identity() for path in (files["hgd"], copy))
    assert one == two and "weights" not in one["params"] and len(one["weights"]) == 64
    assert one != DEFENSES.create("hgd", {"weights": str(files["hgd-dae"])}).identity()
    assert one != DEFENSES.create("hgd", {"weights": str(files["hgd"]), "space": "imagenet"}).identity()


@pytest.mark.parametrize("name", ["hgd", "cafd", "nrp", "apegan", "alignment"])
def test_without_weights_there_is_one_clear_line(name, photos):
    defense = DEFENSES.create(name)
    assert not defense.ready
    for run in (lambda: defense.purify(photos(1, 8, 8), None), defense.identity):
        with pytest.raises(WeightsError, match=f"bench train --defense {name} --role ROLE") as error:
            run()
        assert "\n" not in str(error.value) and "parameter 'weights'" in str(error.value)


def test_wrong_and_missing_files(files, tmp_path):
    with pytest.raises(WeightsError, match="holds network 'nrp', defense 'cafd' needs dunet"):
        DEFENSES.create("cafd", {"weights": str(files["nrp"])})
    with pytest.raises(WeightsError, match=r"does not exist: its authors publish NRP\.pth"):
        DEFENSES.create("nrp", {"weights": str(tmp_path / "no.pth")})
    other = tmp_path / "other.safetensors"
    save_safetensors(other, {"fc.weight": torch.zeros(2, 2)})
    with pytest.raises(WeightsError, match="holds an unknown network, defense 'hgd' needs dunet or dae"):
        DEFENSES.create("hgd", {"weights": str(other)})
    damaged = tmp_path / "damaged.safetensors"
    save_safetensors(
        damaged,
        {"last.weight": torch.zeros(3, 4, 1, 1)},
        meta={"network": {"name": "dunet", "args": {"width": 4}}},
    )
    with pytest.raises(WeightsError, match=r"network 'dunet' from .*: a checkpoint of another model"):
        DEFENSES.create("hgd", {"weights": str(damaged)})
    odd = tmp_path / "odd.safetensors"
    save_safetensors(odd, {"x": torch.zeros(1)}, meta={"network": {"name": "dunet", "args": {"depth": 4}}})
    with pytest.raises(WeightsError, match="does not take"):
        DEFENSES.create("hgd", {"weights": str(odd)})


def test_value_ranges(tmp_path, photos):
    images = photos(2, 16, 16)
    for space, mean, std in (
        ("unit", 0.0, 1.0),
        ("symmetric", 0.5, 0.5),
        ("imagenet", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ):
        path = checkpoint(tmp_path, "hgd", space=space)
        defense = DEFENSES.create("hgd", {"weights": str(path)})
        m, s = (torch.tensor(v).expand(3).view(1, 3, 1, 1) for v in (mean, std))
        with torch.no_grad():
            expected = torch.cat([defense.network((x[None] - m) / s) * s + m for x in images])
        assert torch.allclose(defense(images), expected, atol=1e-6)
    with pytest.raises(WeightsError, match="was trained in value range 'imagenet', but space is 'unit'"):
        DEFENSES.create("hgd", {"weights": str(path), "space": "unit"})
    with pytest.raises(PluginError, match="space"):
        DEFENSES.create("hgd", {"weights": str(path), "space": "bgr"})


def test_apegan_ranges_differ_by_a_rescaling(files, photos):
    images = photos(1, 16, 16)
    official = DEFENSES.create("apegan", {"weights": str(files["apegan"])})
    port = DEFENSES.create("apegan", {"weights": str(files["apegan"]), "space": "unit"})
    assert torch.allclose(official(images), port(images * 2 - 1) / 2 + 0.5, atol=1e-6)


def test_apegan_statistics_of_the_image(files, photos):
    images = photos(2, 16, 16)
    image = DEFENSES.create("apegan", {"weights": str(files["apegan"]), "batch_norm": "image"})
    running = DEFENSES.create("apegan", {"weights": str(files["apegan"])})
    network = purifier(*NETWORKS["apegan"]).train()
    network.load_state_dict(running.network.state_dict())
    with torch.no_grad():
        expected = network(images[1:] * 2 - 1) / 2 + 0.5
    assert torch.allclose(image(images)[1:], expected, atol=1e-6)
    assert not torch.allclose(running(images)[1:], expected, atol=1e-3)
    assert torch.equal(image(images), image(images))


def test_dynamic_inference_noise(files):
    params = {"weights": str(files["nrp"]), "dynamic": True}
    defense = DEFENSES.create("nrp", params)
    assert defense.stochastic and not DEFENSES.create("nrp", {"weights": str(files["nrp"])}).stochastic
    noise = defense.disturbed(torch.full((2, 3, 64, 64), 0.5), ImageRNG([1, 2])) - 0.5
    eps = 16 / 255
    assert noise.abs().max() <= eps + 1e-6
    # P(|N| > eps / 0.05 = 1.2549) = 0.2095: that share sits at the ends.
    assert float((noise.abs() > eps - 1e-5).float().mean()) == pytest.approx(0.2095, abs=0.01)
    assert not torch.equal(noise[0], noise[1])
    black = defense.disturbed(torch.zeros(1, 3, 8, 8), ImageRNG([1]))
    assert black.min() == 0 and black.max() > 0


def test_alignment_runs_at_its_own_size(files, photos):
    images = photos(1, 31, 45)
    seen = []
    defense = DEFENSES.create("alignment", {"weights": str(files["alignment"]), "size": 24})
    defense.network.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    defense.purify(images)
    assert seen[0].shape[-2:] == (24, 24)
    corner = images[0, :, 0, 0] * 2 - 1
    assert torch.allclose(seen[0][0, :, 0, 0], corner, atol=1e-5)


@pytest.mark.parametrize("case", ["nrp", "nrp-resg", "alignment"])
def test_published_layouts_load_without_metadata(case, files, tmp_path, photos):
    """As the authors save them: a bare state dictionary, of any width and depth."""
    with_meta = DEFENSES.create(case.split("-")[0], {"weights": str(files[case])})
    path = tmp_path / "published.pth"
    torch.save(with_meta.network.state_dict(), path)
    defense = DEFENSES.create(case.split("-")[0], {"weights": str(path)})
    images = photos(1, 16, 16)
    assert torch.equal(defense(images), with_meta(images))


@pytest.mark.parametrize(("network", "file"), [("nrp", "NRP.pth"), ("nrp_resg", "NRP_resG.pth")])
def test_published_nrp_files_at_their_size(network, file, tmp_path):
    state = purifier(network, {}).state_dict()
    torch.save(state, tmp_path / file)
    defense = DEFENSES.create("nrp", {"weights": str(tmp_path / file)})
    assert type(defense.network) is PURIFIERS[network]
    assert sum(p.numel() for p in defense.parameters()) == sum(v.numel() for v in state.values())
    # A name that differs from the published one must not load.
    state["conv_first.weights"] = state.pop("conv_first.bias")
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(WeightsError, match="missing"):
        DEFENSES.create("nrp", {"weights": str(tmp_path / "bad.pth")})


def test_half_precision_checkpoints(tmp_path, files, photos):
    defense = DEFENSES.create("cafd", {"weights": str(files["cafd"])})
    path = tmp_path / "half.safetensors"
    meta = {"network": {"name": "dunet", "args": NETWORKS["cafd"][1]}}
    save_safetensors(path, defense.network.state_dict(), meta=meta, half=True)
    half = DEFENSES.create("cafd", {"weights": str(path)})
    assert all(p.dtype == torch.float32 for p in half.parameters())
    images = photos(1, 16, 16)
    assert torch.allclose(half(images), defense(images), atol=3e-2)


def test_shipped_checkpoints_go_by_their_name(files, tmp_path, monkeypatch):
    monkeypatch.setattr(_learned, "SHIPPED", tmp_path)
    (tmp_path / "tiny.safetensors").write_bytes(files["hgd"].read_bytes())
    assert DEFENSES.create("hgd", {"weights": "tiny"}).ready
    with pytest.raises(WeightsError, match="tinny does not exist"):
        DEFENSES.create("hgd", {"weights": "tinny"})


def test_fpd_is_listed_and_unavailable(photos):
    assert "fpd" in DEFENSES
    defense = DEFENSES.create("fpd")
    assert defense.unavailable is not None and "no public code" in defense.unavailable
    with pytest.raises(NotApplicable, match="no public code"):
        defense.purify(photos(1, 8, 8))
