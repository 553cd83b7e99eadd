"""One step of training behind segmentation and detection targets."""

from __future__ import annotations

import pytest
import torch

from bench.errors import WeightsError
from bench.registry import ATTACKS, DATASETS, MODELS
from defenses.training.adversary import AttackAdversary
from defenses.training.loop import Trainer
from defenses.training.recipe import recipe


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(model: str, dataset: str):
    target = MODELS.create(model, {}).load(torch.device("cpu"))
    data = DATASETS.create(dataset, {"split": "train", "count": 2})
    return target, [target.prepare(data[i]) for i in range(2)]


@pytest.fixture(scope="module")
def segmenter():
    return load("mini_pspnet", "mini_scenes_seg")


@pytest.fixture(scope="module")
def detector():
    return load("mini_ssd", "mini_scenes_det")


def step(name: str, target, samples, attack: str, **objective_args):
    r = recipe(name)
    network = {"global": {"width": 4, "downsamplings": 2, "blocks": 1}, "dunet": {"width": 4}}[r.network]
    args = {**r.objective_args, **objective_args}
    critic = {"critic_args": {"width": 4}} if r.critic else {}
    r = r.but(network_args=network, objective_args=args, epochs=1, batch=2, **critic)
    adversary = AttackAdversary([(ATTACKS.create(attack, {"steps": 1}), 1.0)], target)
    t = Trainer(r, samples, adversary, target, key="k")
    before = torch.cat([p.detach().flatten().clone() for p in t.network.parameters()])
    history = t.run()
    assert not torch.equal(before, torch.cat([p.detach().flatten() for p in t.network.parameters()]))
    return history.epochs[0]


def test_alignment_per_pixel(segmenter):
    terms = step("alignment", *segmenter, "bim")
    names = {"reconstruction", "gan", "matching", "features", "task", "align", "intra", "inter", "critic"}
    assert set(terms) == names
    assert all(terms[name] > 0 for name in names - {"inter"})


def test_logits_guide_a_segmenter(segmenter):
    assert step("hgd", *segmenter, "bim")["logits"] > 0


def test_alignment_without_classes_behind_a_detector(detector):
    layer = next(n for n, m in detector[0].network.named_modules() if isinstance(m, torch.nn.Conv2d))
    terms = step("alignment_lif", *detector, "det_pgd", conditioned=False, layer=layer, task_weight=1.0)
    assert terms["task"] > 0 and terms["features"] > 0


def test_features_guide_a_detector(detector):
    layer = next(n for n, m in detector[0].network.named_modules() if isinstance(m, torch.nn.Conv2d))
    assert step("hgd_features", *detector, "det_pgd", layer=layer)["features"] > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hgd", "the loss needs logits, which the detection target .* does not have"),
        ("cafd", "class activation features need a target that ends in a linear layer"),
        ("alignment", "needs a class label per image or per pixel"),
    ],
)
def test_what_a_detector_cannot_give_is_said_in_one_line(name, message, detector):
    with pytest.raises(WeightsError, match=message):
        step(name, *detector, "det_pgd")
