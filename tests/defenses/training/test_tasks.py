"""Training behind segmentation and detection targets: every term by hand, defaults, and what cannot be had."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.vgg import cfgs, make_layers

from bench.errors import GridError, WeightsError
from bench.protocols import ImageRNG
from bench.registry import ATTACKS, DATASETS, MODELS
from bench.weights import save_safetensors, sha256_file
from defenses.training.adversary import AttackAdversary
from defenses.training.guide import Guide, label_planes
from defenses.training.loop import Trainer
from defenses.training.objectives import Step, objective
from defenses.training.recipe import recipe
from tasks.classification.model import LogitsClassifier
from tasks.detection.objects import Objects
from tasks.vgg import VGGFeatures


def load(model: str, dataset: str):
    target = MODELS.create(model, {}).load(torch.device("cpu"))
    data = DATASETS.create(dataset, {"split": "train", "count": 2})
    return target, [target.prepare(data[i]) for i in range(2)]


@pytest.fixture(scope="module")
def segmenter():
    return load("mini_pspnet", "mini_scenes_seg")


@pytest.fixture(scope="module")
def ssd():
    return load("mini_ssd", "mini_scenes_det")


@pytest.fixture(scope="module")
def mask_rcnn():
    return load("mini_mask_rcnn", "mini_scenes_det")


# -- whole steps ----------------------------------------------------------------------------------------------------
def train(name: str, target, samples, attack: str, **objective_args):
    r = recipe(name)
    networks = {
        "global": {"width": 4, "downsamplings": 2, "blocks": 1}, "dunet": {"width": 4},
        "nrp": {"width": 4, "blocks": 1, "growth": 4}, "apegan": {"width": 4},
    }  # fmt: skip
    args = {**r.objective_args, **objective_args}
    critic = {"critic_args": {"width": 4}} if r.critic else {}
    r = r.but(network_args=networks[r.network], objective_args=args, epochs=1, batch=2, **critic)
    adversary = AttackAdversary([(ATTACKS.create(attack, {"steps": 1}), 1.0)], target)
    t = Trainer(r, samples, adversary, target, key="k")
    before = torch.cat([p.detach().flatten().clone() for p in t.network.parameters()])
    history = t.run()
    assert not torch.equal(before, torch.cat([p.detach().flatten() for p in t.network.parameters()]))
    assert all(p.grad is None for p in target.parameters())
    return history.epochs[0], t


FULL = {"reconstruction", "gan", "matching", "features", "task", "align", "intra", "inter", "critic"}


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("hgd", {"logits"}),
        ("hgd_features", {"features"}),
        ("hgd_labels", {"labels"}),
        ("cafd", {"caf", "rows", "gan", "critic"}),
        ("cafd_prime", {"caf", "gan", "critic"}),
        ("nrp", {"features", "image", "gan", "critic"}),
        ("apegan", {"image", "gan", "critic"}),
        ("alignment", FULL),
    ],
)
def test_recipes_behind_a_segmenter(name, terms, segmenter):
    found, _ = train(name, *segmenter, "bim")
    assert set(found) == terms
    assert all(found[term] > 0 for term in terms - {"inter"})


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("hgd", {"features"}),
        ("hgd_labels", {"labels"}),
        ("nrp", {"features", "image", "gan", "critic"}),
        ("apegan", {"image", "gan", "critic"}),
        ("alignment", FULL - {"intra"}),
        ("alignment_lf", {"features", "task"}),
    ],
)
@pytest.mark.parametrize("kind", ["ssd", "mask_rcnn"])
def test_recipes_behind_a_detector(name, terms, kind, request):
    found, _ = train(name, *request.getfixturevalue(kind), "det_pgd")
    assert set(found) == terms
    assert all(found[term] > 0 for term in terms - {"inter"})


def test_layers_chosen_where_none_is_named(segmenter, ssd, caplog):
    with caplog.at_level(logging.INFO):
        _, t = train("hgd", *ssd, "det_pgd")
    assert t.objective.chosen == {"guide": "features", "layer": "neck"}
    assert "the detection target has no logits, its features guide the denoiser instead" in caplog.text
    image = ssd[1][0].image[None]
    for target, name, args, chosen in (
        (ssd[0], "nrp", {}, "backbone"),
        (segmenter[0], "nrp", {}, "backbone"),
        (segmenter[0], "hgd", {"guide": "features"}, "decode_head.bottleneck"),
        (segmenter[0], "cafd", {}, "decode_head.bottleneck"),
        (segmenter[0], "cafd", {"layer": "convolution"}, "decode_head.bottleneck.conv"),
        (segmenter[0], "alignment", {"layer": "maps"}, "decode_head.bottleneck"),
        (segmenter[0], "alignment", {}, None),
    ):
        made = objective(name, args)
        made.check(Guide(target), image)
        assert made.chosen.get("layer") == chosen


# -- terms by hand --------------------------------------------------------------------------------------------------
def half(x: Tensor) -> Tensor:
    return x * 0.5


def hand_step(target, samples) -> Step:
    clean = torch.stack([s.image for s in samples])
    noise = torch.rand(clean.shape, generator=torch.Generator().manual_seed(3))
    adversarial = (clean + 0.06 * (noise - 0.5)).clamp(0, 1)
    return Step(clean, adversarial, [s.target for s in samples], half, lambda x: 2 * x - 1, Guide(target))


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().mean())


def test_cafd_per_pixel_by_hand(segmenter):
    target, samples = segmenter
    step = hand_step(target, samples)
    last = target.network.decode_head.conv_seg
    with torch.no_grad():
        maps = [target.features(x, "decode_head.bottleneck") for x in (step.clean, half(step.adversarial))]
        rows = []
        for m in maps:
            classes = F.conv2d(m, last.weight, last.bias).argmax(1)
            rows.append(last.weight[:, :, 0, 0][classes].permute(0, 3, 1, 2))
        assert rows[0].shape == maps[0].shape == (2, 32, 24, 24)
        phi = [m * r for m, r in zip(maps, rows, strict=True)]
        paper6 = objective("cafd", {"gan": 0.0, "equation": 6, "form": "paper", "caf": 10.0}).generator(step)
        expected = 10 * (phi[0] - phi[1]).flatten(1).norm(dim=1).mean()
        assert float(paper6["caf"]) == pytest.approx(float(expected), rel=1e-5)
        code7 = objective("cafd", {"gan": 0.0}).generator(step)
        large = [F.interpolate(m, size=32, mode="bilinear") for m in maps]
        assert float(code7["caf"]) == pytest.approx(
            1e3 * float((large[0] - large[1]).square().mean()), rel=1e-5
        )
        assert float(code7["rows"]) == pytest.approx(
            1e-3 * float((rows[0] - rows[1]).square().mean()), rel=1e-5
        )


def test_cafd_per_pixel_trains_by_the_maps_alone(segmenter):
    step = hand_step(*segmenter)
    scale = torch.tensor(0.5, requires_grad=True)
    step.purify = lambda x: x * scale
    terms = objective("cafd", {"gan": 0.0}).generator(step)
    assert not terms["rows"].requires_grad
    (grad,) = torch.autograd.grad(terms["caf"], scale)
    h = 1e-3
    values = []
    for s in (0.5 + h, 0.5 - h):
        step.purify = lambda x, s=s: x * s
        with torch.no_grad():
            values.append(float(objective("cafd", {"gan": 0.0}).generator(step)["caf"]))
    assert float(grad) == pytest.approx((values[0] - values[1]) / (2 * h), rel=2e-2)


def test_alignment_per_pixel_by_hand(segmenter):
    target, samples = segmenter
    step = hand_step(target, samples)
    maps = torch.stack([s.target for s in samples])
    maps[:, :10] = 255  # ignored: no class, and no part of the task loss
    step.targets = list(maps)
    args = {"image": False, "margin": 50.0}
    with torch.no_grad():
        terms = objective("alignment", args).generator(step)
        z = {
            n: target.logits(x)
            for n, x in (("x", step.clean), ("c", half(step.clean)), ("r", half(step.adversarial)))
        }
        assert float(terms["features"]) == pytest.approx(
            4 * (gap(z["c"], z["x"]) + gap(z["r"], z["x"])), rel=1e-5
        )
        task = sum(
            F.cross_entropy(z[n][b : b + 1], maps[b : b + 1], ignore_index=255) / 2
            for n in "cr"
            for b in (0, 1)
        )
        assert float(terms["task"]) == pytest.approx(2 * float(task), rel=1e-4)
        present = [k for k in range(11) if (maps == k).any()]
        pixels = {(n, k): z[n].permute(0, 2, 3, 1)[maps == k] for n in "xr" for k in present}
        m = {key: p.mean(0) for key, p in pixels.items()}
        align = 0.1 * sum(gap(m["x", k], m["r", k]) for k in present)
        assert float(terms["align"]) == pytest.approx(align, rel=1e-4)
        intra = sum(gap(pixels["r", k], m["r", k].expand_as(pixels["r", k])) for k in present)
        assert float(terms["intra"]) == pytest.approx(intra, rel=1e-4)
        inter = sum(max(0.0, 50 - gap(m["r", k], m["r", i])) for k in present for i in present if i != k)
        assert inter > 0
        assert float(terms["inter"]) == pytest.approx(0.005 * inter, rel=1e-4)


@pytest.mark.parametrize("kind", ["ssd", "mask_rcnn"])
def test_alignment_per_box_by_hand(kind, request):
    target, samples = request.getfixturevalue(kind)
    step = hand_step(target, samples)
    # Each image gets a second object, a quarter of its first; class 3 is in both images.
    step.targets = [
        replace(
            t,
            boxes=np.concatenate([t.boxes[:1], t.boxes[:1] * [1, 1, 0.5, 0.5]]),
            labels=np.array([t.labels[0], 3]),
            masks=t.masks[:1] * 2,
        )
        for t in step.targets
    ]
    with torch.no_grad():
        terms = objective("alignment", {"image": False, "margin": 50.0, "intra": 1.0}).generator(step)
        images = {"x": step.clean, "c": half(step.clean), "r": half(step.adversarial)}
        flat = {n: torch.cat([m.flatten(1) for m in target.feature_maps(i)], 1) for n, i in images.items()}
        expected = 4 * (gap(flat["c"], flat["x"]) + gap(flat["r"], flat["x"]))
        assert float(terms["features"]) == pytest.approx(expected, rel=1e-4)
        rng = ImageRNG.for_images(step.seed, ["0", "1"])
        task = sum(target.loss(images[n], step.targets, "total", rng=rng).mean() for n in "cr")
        assert float(terms["task"]) == pytest.approx(float(task), rel=1e-4)
        labels = np.concatenate([t.labels for t in step.targets])
        assert labels.tolist() == [3, 3, 5, 3]
        z = {n: target.class_features(images[n], step.targets)[0] for n in "xr"}
        m = {(n, k): z[n][labels == k].mean(0) for n in "xr" for k in set(labels)}
        classes = sorted(set(labels))
        # All three terms ten times, as the code has them for detection.
        align = 10 * 0.1 * sum(gap(m["x", k], m["r", k]) for k in classes)
        assert float(terms["align"]) == pytest.approx(align, rel=1e-4)
        spread = sum(gap(z["r"][labels == k], m["r", k].expand_as(z["r"][labels == k])) for k in classes)
        assert float(terms["intra"]) == pytest.approx(10 * spread, rel=1e-4, abs=1e-6)
        inter = sum(max(0.0, 50 - gap(m["r", k], m["r", i])) for k in classes for i in classes if i != k)
        assert float(terms["inter"]) == pytest.approx(10 * 0.005 * inter, rel=1e-4)


def test_hgd_and_nrp_by_hand_behind_a_detector(ssd):
    target, samples = ssd
    step = hand_step(target, samples)
    image = step.clean[:1]
    with torch.no_grad():
        for name, args, layer in (("hgd", {}, "neck"), ("nrp", {"gan": 0.0, "img": 0.0}, "backbone")):
            made = objective(name, args)
            made.check(step.guide, image)
            inputs = [
                target.preprocess(x, target.new_samples(x)) for x in (step.clean, half(step.adversarial))
            ]
            levels = [
                target.network.extract_feat(x) if layer == "neck" else target.network.backbone(x)
                for x in inputs
            ]
            flat = [torch.cat([m.flatten() for m in group]) for group in levels]
            assert float(made.generator(step)["features"]) == pytest.approx(gap(*flat), rel=1e-4)


def vgg(tmp_path, letter: str):
    widths = [v if v == "M" else int(v) // 16 for v in cfgs[letter]]
    torch.manual_seed(0)
    path = tmp_path / f"{letter}.safetensors"
    save_safetensors(path, {f"features.{k}": v for k, v in make_layers(widths).state_dict().items()})
    return path


def test_nrp_by_the_features_of_a_vgg(ssd, tmp_path):
    path = vgg(tmp_path, "D")
    step = hand_step(*ssd)
    step.guide = None
    made = objective("nrp", {"vgg": str(path), "gan": 0.0})
    assert not made.guided and made.files() == {"vgg": sha256_file(path)}
    made.check(None, step.clean)
    assert made.chosen == {"layer": "relu3_3"}
    judge = VGGFeatures(path)
    with torch.no_grad():
        maps = [judge(x, ["relu3_3"])[0] for x in (step.clean, half(step.adversarial))]
        assert float(made.generator(step)["features"]) == pytest.approx(gap(*maps), rel=1e-5)
    with pytest.raises(GridError, match="unknown layer of VGG16 'relu3_9'"):
        objective("nrp", {"vgg": str(path), "layer": "relu3_9"}).check(None, step.clean)
    with pytest.raises(WeightsError, match="does not exist"):
        objective("nrp", {"vgg": str(tmp_path / "none.pth")}).check(None, step.clean)


@pytest.mark.parametrize(
    ("letter", "layers"),
    [
        ("E", {"relu1_1": 1 / 32, "relu2_1": 1 / 16, "relu3_1": 1 / 8, "relu4_1": 1 / 4, "relu5_1": 1.0}),
        ("D", {"relu1_2": 1.0, "relu2_2": 1.0, "relu3_3": 1.0, "relu4_3": 1.0, "relu5_3": 1.0}),
    ],
)
@pytest.mark.parametrize("pairs", ["new", "traditional"])
def test_perceptual_loss_of_a_vgg_by_hand(letter, layers, pairs, ssd, tmp_path):
    path = vgg(tmp_path, letter)
    step = hand_step(*ssd)
    step.critic = lambda x: [[x.mean((1, 2, 3))] * 5] * 2
    args = {"vgg": str(path), "pairs": pairs, "feature": False, "classes": False, "conditioned": False}
    made = objective("alignment", args)
    assert not made.guided
    judge = VGGFeatures(path)
    with torch.no_grad():
        made.check(None, step.clean)
        found = made.generator(step)["perceptual"]
        maps = {
            n: judge(2 * x - 1, layers, normalise=False)
            for n, x in (("x", step.clean), ("c", half(step.clean)), ("r", half(step.adversarial)))
        }
        wanted = maps["c"] if pairs == "new" else maps["x"]
        expected = sum(
            10 * w * (gap(maps["c"][i], maps["x"][i]) + gap(maps["r"][i], wanted[i]))
            for i, w in enumerate(layers.values())
        )
        assert float(found) == pytest.approx(expected, rel=1e-5)


# -- boxes ----------------------------------------------------------------------------------------------------------
def boxes(*rows: tuple[float, float, float, float, int], **more) -> Objects:
    return Objects(np.array([r[:4] for r in rows], dtype=float).reshape(-1, 4),
                   np.array([r[4] for r in rows], dtype=np.int64), (8, 8), 3, **more)  # fmt: skip


def test_planes_of_boxes():
    planes = label_planes([boxes((1, 2, 3, 4, 2), (0, 0, 2, 2, 0)), boxes()], 3, (8, 8), torch.device("cpu"))
    assert planes.shape == (2, 3, 8, 8) and not planes[1].any()
    expected = torch.zeros(3, 8, 8)
    expected[2, 2:6, 1:4] = 1
    expected[0, :2, :2] = 1
    assert torch.equal(planes[0], expected)


def test_images_without_objects_have_class_terms_of_zero(ssd):
    target, samples = ssd
    step = hand_step(target, samples)
    step.targets = [replace(t, crowd=np.ones(len(t), dtype=bool)) for t in step.targets]
    scale = torch.tensor(0.5, requires_grad=True)
    step.purify = lambda x: x * scale
    terms = objective("alignment", {"image": False}).generator(step)
    assert all(terms[name].item() == 0 for name in ("align", "inter", "task"))
    assert terms["features"] > 0
    torch.stack(list(terms.values())).sum().backward()
    assert torch.isfinite(scale.grad)


# -- what cannot be had ---------------------------------------------------------------------------------------------
def test_what_a_detector_cannot_give_is_said_in_one_line(ssd, mask_rcnn):
    with pytest.raises(
        WeightsError, match=r"need one linear map from feature maps to classes, which a detector"
    ):
        train("cafd", *ssd, "det_pgd")
    with pytest.raises(WeightsError, match=r"loss needs logits, which the detection target .* does not have"):
        objective("hgd", {}).generator(hand_step(*ssd))  # nothing was checked, so nothing was chosen
    target, samples = mask_rcnn
    bare = [replace(s, target=replace(s.target, masks=None)) for s in samples]
    with pytest.raises(WeightsError, match="loss 'total': the dataset has no masks"):
        train("hgd_labels", target, bare, "det_pgd")


def test_classes_of_pixels_need_maps(segmenter):
    step = hand_step(*segmenter)
    with pytest.raises(WeightsError, match="classes of pixels need a layer of maps; 'backbone' returns"):
        objective("alignment", {"image": False, "layer": "backbone"}).generator(step)


def test_classes_of_images_by_their_pooled_maps():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)
    )
    guide = Guide(LogitsClassifier(network, 4))
    images = torch.rand(3, 3, 8, 8)
    maps, vectors, labels = guide.aligned(images, [2, 0, 7], guide.layer("maps", images))
    assert torch.allclose(maps, network[:2](images), atol=1e-6)
    assert torch.allclose(network[4](vectors), network(images), atol=1e-5)
    assert labels.tolist() == [2, 0, -1]
    logits, vectors, _ = guide.aligned(images, [2, 0, 1], None)
    assert torch.equal(logits, vectors) and logits.shape == (3, 4)
