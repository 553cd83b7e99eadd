"""CAFA and SSP: they move, increase their distance, stay in the budget, and refuse a start that cannot move."""

from __future__ import annotations

import hashlib
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.vgg import cfgs, make_layers

from attacks.feature import ClassActivationDistance, FeatureDistance
from bench.errors import GridError, NotApplicable, PluginError, WeightsError
from bench.protocols import Batch, ImageRNG
from bench.registry import ATTACKS, DATASETS, MODELS
from bench.threat import ModelOracle, Victim
from bench.weights import save_safetensors
from tasks.classification.model import LogitsClassifier


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, 2, 1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def target() -> LogitsClassifier:
    torch.manual_seed(0)
    return LogitsClassifier(Net(), 4)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


ATTACK = {
    "cafa-code": ("cafa", {"mode": "code", "steps": 10}),
    "cafa-paper": ("cafa", {"mode": "paper", "steps": 10}),
    "ssp-code": ("ssp", {"mode": "code", "layer": "conv", "steps": 10}),
    "ssp-paper": ("ssp", {"mode": "paper", "layer": "conv", "steps": 10, "start": "sign"}),
}


@pytest.fixture(params=list(ATTACK))
def attack(request):
    return ATTACKS.create(*ATTACK[request.param])


def oracle(attack, target, rng: ImageRNG) -> ModelOracle:
    return ModelOracle(Victim((target,)), attack, rng)


def distance(attack, target, clean: Tensor, moved: Tensor) -> Tensor:
    view = oracle(attack, target, ImageRNG(range(len(clean))))
    with torch.no_grad():
        return attack.loss.bind(view, clean, (), False)(view, moved)


def test_moves_and_increases_its_distance(attack, target, images):
    rng = ImageRNG(range(4))
    view = oracle(attack, target, rng)
    before = images.clone()
    out = attack.run(view, images, [0, 1, 2, 3], rng.fork("run"))
    eps = float(attack.eps)
    assert torch.equal(images, before)
    assert (out - images).abs().max() <= eps + 1e-6 and 0 <= out.min() and out.max() <= 1
    assert ((out - images).abs().flatten(1).amax(1) > eps / 2).all()
    assert all(trace.nonfinite == 0 and trace.zero == 0 for trace in view.traces)
    noise = (images + eps * ImageRNG(range(4)).signs(images.shape[1:])).clamp(0, 1)
    assert (distance(attack, target, images, out) > 1.5 * distance(attack, target, images, noise)).all()


def test_labels_do_not_matter(attack, target, images):
    first, second = (
        attack.run(oracle(attack, target, ImageRNG(range(4))), images, y, ImageRNG(range(4)))
        for y in ([0, 1, 2, 3], [3, 3, 3, 3])
    )
    assert torch.equal(first, second)


def test_company_does_not_matter(attack, target, images):
    whole = attack.run(oracle(attack, target, ImageRNG(range(4))), images, [0] * 4, ImageRNG(range(4)))
    part = attack.run(oracle(attack, target, ImageRNG([2, 1])), images[[2, 1]], [0] * 2, ImageRNG([2, 1]))
    assert torch.equal(part, whole[[2, 1]])


@pytest.mark.parametrize("name", ["cafa", "ssp"])
def test_a_clean_start_is_refused(name):
    with pytest.raises(PluginError, match="'none' would never move: the gradient at the clean image is zero"):
        ATTACKS.create(name, {"start": "none"})


@pytest.mark.parametrize("mode", ["code", "paper"])
def test_the_gradient_at_the_clean_image_is_zero_and_finite(mode, target, images):
    attack = ATTACKS.create("cafa", {"mode": mode})
    view = oracle(attack, target, ImageRNG(range(4)))
    bound = attack.loss.bind(view, images, (0,) * 4, False)
    result = view.gradient(images, bound)
    assert torch.isfinite(result.grad).all() and not result.grad.any()


def test_class_activation_distance_by_hand(target, images):
    attack = ATTACKS.create("cafa")
    view = oracle(attack, target, ImageRNG(range(4)))
    moved = (images + 0.1).clamp(0, 1)

    def phi(x):
        return (
            target.features(x, "conv") * target.network.fc.weight[target.logits(x).argmax(1)][..., None, None]
        )

    def normal(p):
        p = F.relu(p)
        p = (p - p.min()) / (p.max() - p.min())
        return F.interpolate(p[None], size=32, mode="bilinear")[0]

    with torch.no_grad():
        paper = ClassActivationDistance("paper", "conv")
        got = paper(view, moved, (), paper.reference(view, images))
        assert torch.allclose(got, (phi(moved) - phi(images)).flatten(1).norm(dim=1), rtol=1e-4)
        code = ClassActivationDistance("code", "conv")
        got = code(view, moved, (), code.reference(view, images))
        expected = [
            (normal(a) - normal(b)).square().mean() for a, b in zip(phi(moved), phi(images), strict=True)
        ]
        assert torch.allclose(got, torch.stack(expected), rtol=1e-4)
        for kind, reduce in (("mse", torch.square), ("mae", torch.abs)):
            loss = FeatureDistance("conv", kind)
            gap = target.features(moved, "conv") - target.features(images, "conv")
            assert torch.allclose(
                loss(view, moved, (), loss.reference(view, images)), reduce(gap).mean((1, 2, 3))
            )


def test_ssp_code_starts_from_pure_noise(target, images):
    attack = ATTACKS.create("ssp", {"layer": "conv", "steps": 1, "alpha": "1/100000"})
    out = attack.run(oracle(attack, target, ImageRNG(range(4))), images, [0] * 4, ImageRNG(range(4)))
    noise = ImageRNG(range(4)).normal(images.shape[1:])
    eps = 16 / 255
    corner = torch.minimum(torch.maximum(noise, images - eps), images + eps).clamp(0, 1)
    assert (out - corner).abs().max() < 2e-5


def test_missing_layers(target, images):
    attack = ATTACKS.create("ssp", {"layer": "conv3"})
    with pytest.raises(GridError, match="did you mean 'conv'"):
        attack.run(oracle(attack, target, ImageRNG(range(4))), images, [0] * 4, ImageRNG(range(4)))
    headless = LogitsClassifier(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 4)
    attack = ATTACKS.create("cafa")
    with pytest.raises(NotApplicable, match="ends in a linear layer"):
        attack.run(oracle(attack, headless, ImageRNG(range(4))), images, [0] * 4, ImageRNG(range(4)))


def test_ssp_finds_a_layer(target, images):
    rng = ImageRNG(range(4))
    free, named = (
        ATTACKS.create("ssp", {"layer": layer, "steps": 3}).run(
            oracle(ATTACKS.create("ssp"), target, rng), images, [0] * 4, rng.fork("run")
        )
        for layer in (None, "conv")
    )
    assert torch.equal(free, named)


# -- other tasks ----------------------------------------------------------------------------------------------------
def load(model: str, dataset: str):
    loaded = MODELS.create(model).load(torch.device("cpu"))
    data = DATASETS.create(dataset, {"split": "train", "count": 2})
    return loaded, Batch.of([loaded.prepare(data[i]) for i in range(2)])


@pytest.fixture(scope="module")
def segmenter():
    return load("mini_pspnet", "mini_scenes_seg")


@pytest.fixture(scope="module")
def detector():
    return load("mini_ssd", "mini_scenes_det")


@pytest.mark.parametrize(("name", "params"), [("cafa", {"mode": "paper"}), ("cafa", {}), ("ssp", {})])
def test_segmenters_are_attacked(name, params, segmenter):
    victim, batch = segmenter
    attack = ATTACKS.create(name, {**params, "steps": 5})
    view = oracle(attack, victim, ImageRNG(range(2)))
    out = attack.run(view, batch.images, batch.targets, ImageRNG(range(2)))
    eps = float(attack.eps)
    assert 0.9 * eps < (out - batch.images).abs().max() <= eps + 1e-6
    assert all(t.nonfinite == 0 and t.zero == 0 and t.last_loss > t.first_loss for t in view.traces)


def test_class_activation_of_every_pixel_by_hand(segmenter):
    victim, batch = segmenter
    loss = ClassActivationDistance("paper", "decode_head.bottleneck")
    view = oracle(ATTACKS.create("cafa"), victim, ImageRNG(range(2)))
    moved = (batch.images + 0.1).clamp(0, 1)

    def phi(x):
        maps, last = victim.features(x, "decode_head.bottleneck"), victim.network.decode_head.conv_seg
        out = torch.empty_like(maps)
        scores = torch.einsum("kc,bchw->bkhw", last.weight[:, :, 0, 0], maps) + last.bias[:, None, None]
        for b, i, j in itertools.product(range(2), range(0, 24, 5), range(0, 24, 5)):
            out[b, :, i, j] = maps[b, :, i, j] * last.weight[scores[b, :, i, j].argmax(), :, 0, 0]
        return out[:, :, ::5, ::5]

    with torch.no_grad():
        assert torch.allclose(loss.reference(view, moved)[:, :, ::5, ::5], phi(moved), atol=1e-5)
        got = loss(view, moved, (), loss.reference(view, batch.images))
        gap = loss.reference(view, moved) - loss.reference(view, batch.images)
        assert torch.allclose(got, gap.flatten(1).norm(dim=1), rtol=1e-4)


def test_detectors_are_attacked_by_ssp_alone(detector):
    victim, batch = detector
    attack = ATTACKS.create("ssp", {"steps": 3})
    view = oracle(attack, victim, ImageRNG(range(2)))
    out = attack.run(view, batch.images, batch.targets, ImageRNG(range(2)))
    assert (out - batch.images).abs().max() > 0.9 * float(attack.eps)
    assert all(t.zero == 0 and t.last_loss > t.first_loss for t in view.traces)
    cafa = ATTACKS.create("cafa")
    with pytest.raises(NotApplicable, match=r"which a detector \(SingleStageDetector\) does not have"):
        cafa.run(oracle(cafa, victim, ImageRNG(range(2))), batch.images, batch.targets, ImageRNG(range(2)))


def test_ssp_on_a_vgg_of_its_own(target, images, tmp_path):
    path = tmp_path / "vgg.safetensors"
    widths = [v if v == "M" else int(v) // 16 for v in cfgs["D"]]
    torch.manual_seed(0)
    save_safetensors(path, {f"features.{k}": v for k, v in make_layers(widths).state_dict().items()})
    attack = ATTACKS.create("ssp", {"vgg": str(path), "steps": 3})
    assert attack.needs == {"gradient"}
    large = F.interpolate(images, size=(32, 32))
    view = oracle(attack, target, ImageRNG(range(4)))
    out = attack.run(view, large, [0] * 4, ImageRNG(range(4)))
    assert all(t.zero == 0 and t.last_loss > t.first_loss and t.forwards == 0 for t in view.traces)
    assert (out - large).abs().max() > 0.9 * float(attack.eps)
    moved = path.rename(tmp_path / "other.safetensors")
    again = ATTACKS.create("ssp", {"vgg": str(moved), "steps": 3})
    with pytest.raises(WeightsError, match="cannot be read"):
        attack.identity()
    assert again.identity()["params"]["vgg"] == hashlib.sha256(moved.read_bytes()).hexdigest()


def test_needs_are_declared():
    assert ATTACKS.create("cafa").needs == {"gradient", "features", "logits"}
    assert ATTACKS.create("ssp").needs == {"gradient", "features"}
    assert ATTACKS.create("cafa").tasks == {"classification", "segmentation"}
    assert ATTACKS.create("ssp").tasks is None
    assert ATTACKS.create("cafa").passes() == 100


def test_gaussian_noise(images, target):
    attack = ATTACKS.create("gaussian_noise", {"sigma": "0.1"})
    grey = torch.full((2, 3, 32, 32), 0.5)
    out = attack.run(oracle(attack, target, ImageRNG([0, 1])), grey, [0, 0], ImageRNG([0, 1]))
    assert float((out - 0.5).std()) == pytest.approx(0.1, rel=0.05) and not torch.equal(out[0], out[1])
