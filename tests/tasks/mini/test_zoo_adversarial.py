"""The adversarially trained targets: what their steps train on, their recipes in miniature, the shipped weights."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.grid import load_profile
from bench.registry import DATASETS, MODELS
from tasks.classification import cifar_nets
from tasks.mini import data, manifest, measure, zoo, zoo_adversarial, zoo_classification, zoo_detection
from tasks.mini import zoo_segmentation as zoo_seg
from tasks.mm.configs import load_config

CLASSIFIERS = ("mini_resnet_at", "mini_resnet_trades", "mini_resnet_free")
SIBLINGS = {
    **dict.fromkeys(CLASSIFIERS, "mini_resnet"),
    "mini_pspnet_sat": "mini_pspnet",
    "mini_ssd_mtd": "mini_ssd",
}
#: Those whose weights lie in the folder; `test_zoo` checks that the manifest lists the same.
SHIPPED = tuple(name for name in SIBLINGS if manifest.weights_path(name).is_file())
EPS = 8 / 255


def digits(count: int) -> tuple[Tensor, Tensor]:
    arrays, labels = data.samples("train", range(count))
    return zoo_classification.to_tensor(arrays), torch.from_numpy(labels)


def resnet() -> nn.Module:
    network = cifar_nets.mini_resnet()
    network.load_state_dict(manifest.load("mini_resnet"))
    return network


# -- what a step trains on ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe", ["mini_resnet_at", "mini_resnet_trades"])
def test_opponent_raises_the_loss_with_the_statistics_that_the_recipe_names(recipe: str) -> None:
    adversary = {"mini_resnet_at": zoo_adversarial.AT, "mini_resnet_trades": zoo_adversarial.TRADES}[recipe][
        "adversary"
    ]
    images, labels = digits(24)
    network = resnet()
    opponent = zoo_adversarial.classifier_opponent(network, adversary, "key")
    before = network.state_dict()["bn1.running_mean"].clone()
    adv = opponent(images, labels.tolist(), range(24))
    assert network.training and all(p.requires_grad for p in network.parameters())
    assert torch.equal(network.state_dict()["bn1.running_mean"], before) == (
        adversary["batch_norm"] == "running"
    )
    eps = {"mini_resnet_at": EPS, "mini_resnet_trades": 0.031}[recipe]
    assert (adv - images).abs().max() <= eps + 1e-6 and adv.min() >= 0 and adv.max() <= 1
    network.train(adversary["batch_norm"] == "training")
    with torch.no_grad():
        clean, moved = (F.cross_entropy(zoo_classification.logits(network, x), labels) for x in (images, adv))
    assert moved > clean + 1
    again = zoo_adversarial.classifier_opponent(resnet(), adversary, "key")(
        images, labels.tolist(), range(24)
    )
    other = zoo_adversarial.classifier_opponent(resnet(), adversary, "other")(
        images, labels.tolist(), range(24)
    )
    assert torch.equal(adv, again) and not torch.equal(adv, other)


class Linear(nn.Module):
    """Two logits, linear in the pixels of a 1x1 image."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, -1.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


def pixels(*values: list[float]) -> Tensor:
    return torch.tensor(values)[:, :, None, None]


def fixed(adv: Tensor) -> Any:
    """An opponent that returns `adv`, and checks the numbers of the images."""

    def opponent(images: Tensor, targets: list[int], ids: range) -> Tensor:
        assert list(ids) == [6, 7] and len(targets) == len(images)
        return adv

    return opponent


def test_madry_trains_on_adversarial_images_alone() -> None:
    model, labels = Linear(), torch.tensor([0, 1])
    clean, adv = pixels([0.5, 0.5, 0.5], [0.1, 0.2, 0.3]), pixels([0.6, 0.4, 0.6], [0.2, 0.1, 0.2])
    loss = zoo_adversarial.madry(fixed(adv))(model, clean, labels, 3)
    assert torch.equal(loss, F.cross_entropy(model((adv - 0.5) / 0.25), labels))


def test_trades_loss_and_its_gradient_by_hand() -> None:
    model, labels = Linear(), torch.tensor([0, 1])
    clean, adv = pixels([0.5, 0.5, 0.5], [0.1, 0.2, 0.3]), pixels([0.6, 0.4, 0.6], [0.2, 0.1, 0.2])
    loss = zoo_adversarial.trades(fixed(adv), 6.0)(model, clean, labels, 3)
    (grad,) = torch.autograd.grad(loss, model.weight)

    def by_hand(weight: np.ndarray) -> float:
        def probabilities(images: Tensor) -> np.ndarray:
            z = ((images.flatten(1).double().numpy() - 0.5) / 0.25) @ weight.T
            e = np.exp(z - z.max(1, keepdims=True))
            return e / e.sum(1, keepdims=True)

        p, q = probabilities(clean), probabilities(adv)
        ce = -np.log(p[[0, 1], [0, 1]]).mean()
        return float(ce + 6.0 * (p * (np.log(p) - np.log(q))).sum(1).mean())

    weight = model.weight.detach().double().numpy()
    assert loss.item() == pytest.approx(by_hand(weight), abs=1e-5)
    # Both terms are trained through: the whole derivative, by finite differences.
    for i, j in np.ndindex(weight.shape):
        step = np.zeros_like(weight)
        step[i, j] = 1e-5
        slope = (by_hand(weight + step) - by_hand(weight - step)) / 2e-5
        assert grad[i, j].item() == pytest.approx(slope, abs=1e-3)


def test_free_moves_the_perturbation_with_the_gradient_of_the_step_before() -> None:
    model, labels = Linear(), torch.tensor([0, 1])
    images = pixels([0.5, 0.5, 0.99], [0.1, 0.2, 0.3])
    free = zoo_adversarial.Free(eps=0.1, alpha=0.06)
    first = free(model, images, labels, 0)
    assert torch.equal(first, zoo_classification.cross_entropy(model, images, labels, 0))
    first.backward()
    # d CE / dx has the sign of w_other - w_true here: label 0 -> w1 - w0, label 1 -> w0 - w1.
    towards = torch.tensor([[-1.0, 1.0, -1.0], [1.0, -1.0, 1.0]])[:, :, None, None]
    second = free(model, images, labels, 1)
    assert torch.allclose(free.perturbation, 0.06 * towards)
    moved = (images + 0.06 * towards).clamp(0, 1)
    assert torch.allclose(second, zoo_classification.cross_entropy(model, moved, labels, 1))
    second.backward()
    # Another batch takes the perturbation over; it stays within eps.
    free(model, images.flip(0), labels, 2)
    assert torch.allclose(free.perturbation, 0.1 * towards)


def test_a_batch_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "SPLIT_SIZES", {**data.SPLIT_SIZES, "train": 24})
    seen: list[Tensor] = []

    def objective(model: nn.Module, images: Tensor, labels: Tensor, step: int) -> Tensor:
        seen.append(images)
        return zoo_classification.cross_entropy(model, images, labels, step)

    zoo_classification.train_classifier(
        cifar_nets.mini_vgg(), epochs=2, seed=0, device="cpu", progress=lambda *_: None, batch=4, lr=1e-3,
        weight_decay=0.0, warmup=0.4, easy_share=0.5, contrast=data.CONTRAST, objective=objective, replays=4,
    )  # fmt: skip
    assert len(seen) == 12
    for step, images in enumerate(seen):
        assert torch.equal(images, seen[step // 4 * 4])
    assert not torch.equal(seen[0], seen[4]) and not torch.equal(seen[4], seen[8])


def scenes(name: str, count: int) -> tuple[dict[str, Any], nn.Module]:
    """Packed training scenes as mmengine's loader gives them, and the standard network."""
    from mmengine.dataset import pseudo_collate

    model: Any = MODELS.create(name).load(torch.device("cpu"))
    if name == "mini_pspnet":
        from tasks.mini._streams import MiniSceneStream

        stream: Any = MiniSceneStream("train", count)
    else:
        from tasks.mini._detection_stream import MiniDetectionStream

        stream = MiniDetectionStream("train", count, zoo_detection.CONTRAST)
    return pseudo_collate([stream[i] for i in range(count)]), model.network


@pytest.mark.parametrize("recipe", ["mini_pspnet_sat", "mini_ssd_mtd"])
def test_the_first_half_stays_clean_and_the_second_becomes_harder(recipe: str) -> None:
    if recipe == "mini_pspnet_sat":
        made, eps = (
            (zoo_adversarial._segmenter, zoo_adversarial._label_map, zoo_adversarial.SAT["adversary"]),
            0.03,
        )
    else:
        made, eps = (
            (zoo_adversarial._detector, zoo_adversarial._objects, zoo_adversarial.MTD["adversary"]),
            EPS,
        )
    batch, network = scenes(SIBLINGS[recipe], 4)
    clean = [image.clone() for image in batch["inputs"]]
    samples = list(batch["data_samples"])
    state = {key: value.clone() for key, value in network.state_dict().items()}
    half = zoo_adversarial.AdversarialHalf(*made, "key")
    half(network, 0, batch)
    assert network.training and all(p.requires_grad for p in network.parameters())
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert batch["data_samples"] == samples
    for k in (0, 1):
        assert batch["inputs"][k].dtype == torch.uint8 and torch.equal(batch["inputs"][k], clean[k])
    for k in (2, 3):
        moved = batch["inputs"][k] - clean[k]
        assert 0 < moved.abs().max() <= 255 * eps + 1e-3
        assert 0 <= batch["inputs"][k].min() and batch["inputs"][k].max() <= 255

    def loss(images: list[Tensor]) -> Tensor:
        rgb = torch.stack([image.flip(0).float() / 255 for image in images])
        target = made[0](network)
        kind = "total" if "total" in target.losses else "ce"
        return target.loss(rgb, [made[1](sample) for sample in samples[2:]], kind)

    with torch.no_grad():
        assert (loss(batch["inputs"][2:]) > loss(clean[2:])).all()


def test_of_several_attacks_each_image_gets_the_one_with_the_largest_total_loss() -> None:
    batch, network = scenes("mini_ssd", 3)
    images = torch.stack([image.flip(0).float() / 255 for image in batch["inputs"]])
    truth = [zoo_adversarial._objects(sample) for sample in batch["data_samples"]]
    adversary = zoo_adversarial.MTD["adversary"]

    def run(attacks: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        target = zoo_adversarial._detector(network)
        adv = zoo_adversarial.Opponent(target, {**adversary, "attacks": attacks}, "key")(
            images, truth, range(3)
        )
        network.eval()
        with torch.no_grad():
            return adv, target.loss(adv, truth, "total")

    both, total = run(adversary["attacks"])
    singles = [run([attack]) for attack in adversary["attacks"]]
    best = torch.stack([losses for _, losses in singles]).argmax(0)
    assert not torch.equal(singles[0][0], singles[1][0])
    for k in range(3):
        assert torch.equal(both[k], singles[int(best[k])][0][k])
    assert torch.equal(total, torch.stack([losses for _, losses in singles]).amax(0))


def test_truth_of_a_packed_scene_is_the_truth_of_the_dataset() -> None:
    batch, _ = scenes("mini_ssd", 1)
    item = DATASETS.create("mini_scenes_det", {"split": "train", "count": 1})[0]
    found = zoo_adversarial._objects(batch["data_samples"][0])
    assert np.array_equal(found.boxes, item.target.boxes) and np.array_equal(found.labels, item.target.labels)
    assert found.size == item.target.size and found.num_classes == item.target.num_classes


# -- the recipes --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SIBLINGS)
def test_recipe_trains_and_writes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole recipe in miniature, deterministic for a seed; the weights load as the standard network."""
    for parameters in (zoo_adversarial.AT, zoo_adversarial.TRADES, zoo_adversarial.FREE):
        for key, value in {"epochs": 1, "batch": 8}.items():
            monkeypatch.setitem(parameters, key, value)
    monkeypatch.setattr(data, "SPLIT_SIZES", {**data.SPLIT_SIZES, "train": 24})
    for module in (zoo_seg, zoo_detection):
        folder = tmp_path / module.__name__
        shutil.copytree(module.CONFIGS, folder)
        for path in folder.glob("*_*_*.py"):
            text = path.read_text().replace("iters // 10", "1").replace("iters * 16", "iters * 4")
            text = text.replace("train_dataloader = dict(", "train_dataloader = dict(batch_size=4, ")
            path.write_text(re.sub(r"^iters = \d+", "iters = 2", text, flags=re.M))
        monkeypatch.setattr(module, "CONFIGS", folder)
    for module, scorer in (
        (zoo_classification, "classifier"),
        (zoo_seg, "segmenter"),
        (zoo_detection, "detector"),
    ):
        monkeypatch.setattr(module, f"score_{scorer}", lambda *_, **__: {"clean": 1.0})
    told: list[tuple[int, int]] = []
    built = [
        zoo.build(
            name, tmp_path / folder, seed=seed, progress=lambda done, total, note: told.append((done, total))
        )
        for folder, seed in (("first", 7), ("second", 7), ("third", 8))
    ]
    assert built[0]["sha256"] == built[1]["sha256"] != built[2]["sha256"]
    assert told[-1] in {(3, 3), (2, 2)}
    start = manifest.load(SIBLINGS[name])
    state = manifest.load(name, tmp_path / "first")
    assert state.keys() == start.keys()
    assert any(not torch.equal(state[key], start[key]) for key in state)


def test_recipes_are_those_of_the_papers() -> None:
    recipes = zoo.recipes()
    (pgd,) = recipes["mini_resnet_at"].parameters["adversary"]["attacks"]
    assert (pgd["name"], pgd["eps"], pgd["alpha"], pgd["steps"]) == ("pgd", "8/255", "2/255", 7)
    trades = recipes["mini_resnet_trades"].parameters
    (kl,) = trades["adversary"]["attacks"]
    assert trades["beta"] == 6.0
    assert (kl["loss"], kl["start"], kl["alpha"], kl["steps"]) == ("kl", "normal", "0.007", 10)
    assert recipes["mini_resnet_free"].parameters["replays"] == 8
    (bim,) = recipes["mini_pspnet_sat"].parameters["adversary"]["attacks"]
    assert (bim["name"], bim["eps"], bim["alpha"], bim["steps"]) == ("bim", "0.03", "0.01", 3)
    assert [a["loss"] for a in recipes["mini_ssd_mtd"].parameters["adversary"]["attacks"]] == ["cls", "loc"]


# -- the shipped weights ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_are_the_standard_network_and_the_manifest_knows_them(name: str) -> None:
    source = MODELS.create(name)
    identity = source.identity()
    assert manifest.entry(name)["sha256"] in identity.values()
    assert abs(manifest.entry(name)["bytes"] - manifest.entry(SIBLINGS[name])["bytes"]) < 2000
    model: Any = source.load(torch.device("cpu"))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert source.task == MODELS.create(SIBLINGS[name]).task
    role = {"mini_resnet_at": "at", "mini_resnet_trades": "trades", "mini_resnet_free": "free"}.get(
        name, name[5:]
    )
    assert load_profile("mini")[0].roles[role].model == name


@pytest.mark.parametrize(("name", "package"), [("mini_pspnet_sat", "mmseg"), ("mini_ssd_mtd", "mmdet")])
def test_config_changes_the_training_alone(name: str, package: Any) -> None:
    folder = zoo_seg.CONFIGS if package == "mmseg" else zoo_detection.CONFIGS
    own, standard = (load_config(package, str(folder / f"{n}.py")) for n in (name, SIBLINGS[name]))
    assert own.model == standard.model and own.get("test_pipeline") == standard.get("test_pipeline")
    assert own.train_dataloader.dataset.length == own.train_dataloader.batch_size * own.train_cfg.max_iters


@pytest.mark.parametrize("name", [name for name in CLASSIFIERS if name in SHIPPED])
def test_recorded_scores_are_those_of_the_weights(name: str) -> None:
    network = cifar_nets.mini_resnet()
    network.load_state_dict(manifest.load(name))
    network.eval()
    arrays, labels = data.samples("test", range(500))
    images, truth = zoo_classification.to_tensor(arrays), torch.from_numpy(labels)
    scores = manifest.entry(name)["scores"]
    assert scores["clean"] >= 0.8 and scores["pgd20_8/255"] >= 0.3

    def forward(x: Tensor) -> Tensor:
        return zoo_classification.logits(network, x)

    assert measure.accuracy(forward, images, truth) == pytest.approx(scores["clean"], abs=0.0021)
    few, some = images[:100], truth[:100]
    adv = measure.sign_attack(forward, few, some, eps=EPS, alpha=2 / 255, steps=10, random_start=True)
    # Ten steps on a fifth of the images: near the twenty steps on all of them.
    assert measure.accuracy(forward, adv, some) == pytest.approx(scores["pgd20_8/255"], abs=0.1)
