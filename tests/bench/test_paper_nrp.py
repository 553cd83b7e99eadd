"""NRP on the papers' profile: trained as the paper trains it, on images of COCO that nobody labelled."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.grid import load_profile
from defenses.training import session
from defenses.training.loop import Trainer
from defenses.training.session import Training, plan_training
from tasks.classification.model import LogitsClassifier
from tasks.classification.sources import Torchvision
from tasks.vgg import vgg_features
from tests.bench.test_paper_grids import _trainings
from tests.tasks.classification.coco import GREY, IMAGES, write_coco_images

ROLES = ("nips_res_152", "nips_vgg16")
RECIPES = sorted(
    (role, recipe) for role, recipe in _trainings() if role in ROLES and recipe.startswith("nrp")
)
# FGSM needs what no other has: a label.
RECIPES.append(("nips_res_152", "nrp_fgsp"))
CPU = torch.device("cpu")
COUNT = 25_000
SMALL: dict[str, dict[str, Any]] = {
    "nrp": {"width": 4, "blocks": 1, "growth": 4},
    "nrp_resg": {"width": 4, "blocks": 1},
    "unet": {"width": 4, "depth": 2},
}


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data root with 25,003 files in COCO's layout and sizes, six images by many names; weights of a narrow VGG16."""
    place = tmp_path_factory.mktemp("coco")
    write_coco_images(place / "data", enlarged=10)
    folder = place / "data" / "coco" / "train2017"
    for k in range(COUNT + 3 - len(IMAGES)):
        os.link(folder / list(IMAGES)[k % len(IMAGES)], folder / f"{100_000 + k:012d}.jpg")
    generator, state, channels = torch.Generator().manual_seed(0), {}, 3
    for number in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28):
        state[f"features.{number}.weight"] = torch.randn(6, channels, 3, 3, generator=generator) / 4
        state[f"features.{number}.bias"] = torch.zeros(6)
        channels = 6
    torch.save(state, place / "vgg16-397923af.pth")
    torch.save({"x": torch.zeros(1)}, place / "resnet152-394f9c45.pth")
    session._plan_training.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("BENCH_DATA", "data")
        yield place
    session._plan_training.cache_clear()
    vgg_features.cache_clear()


class Small(nn.Module):
    """In the place of VGG16 and ResNet-152: maps, pooled for a linear layer over ImageNet's classes."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Sequential(nn.Conv2d(3, 6, 5, 4), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(6, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.maps(x)).flatten(1))


@pytest.fixture(scope="module")
def target() -> LogitsClassifier:
    torch.manual_seed(0)
    return LogitsClassifier(Small(), 1000)


def small(training: Training, images: int = 4, **changes: Any) -> Training:
    """The same training at a size that a test can afford: narrow networks, two images a batch, two steps of SSP."""
    recipe = training.recipe
    attacks = [dict(spec, params=dict(spec.get("params", {}))) for spec in recipe.attacks]
    for spec in attacks:
        if spec["name"] == "ssp":
            spec["params"]["steps"] = 2
    made = recipe.but(
        network_args=SMALL[recipe.network], critic_args={"width": 4}, attacks=tuple(attacks), batch=2, epochs=2,
        **changes,
    )  # fmt: skip
    return dataclasses.replace(training, recipe=made, images=images)


def trained(
    training: Training, target: LogitsClassifier, state: Path | None = None, until: int | None = None
) -> Trainer:
    trainer = training.trainer(target, state, CPU)
    trainer.run(until=until)
    return trainer


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([value.flatten().double() for value in trainer.network.state_dict().values()])


# -- what is planned ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("role", "recipe"), RECIPES)
def test_nrp_learns_from_coco_as_the_paper_says(coco: Path, role: str, recipe: str) -> None:
    """Section 4.1: 25k random images of MS-COCO, 480x480, random crops of 128x128, batch 16, rate 1e-4."""
    training = plan_training("paper", role, recipe)
    assert (training.data.name, training.images, training.settings.crop) == ("unlabelled", COUNT, 128)
    assert (training.recipe.batch, training.recipe.lr, training.recipe.static) == (16, 1e-4, False)
    assert not training.data.labelled and len(training.data) == COUNT + 3
    # Not the first by name, of which the six images of this test are.
    assert not set(IMAGES) <= set(training.data.ids()[:100])
    facts = training.payload["data"]
    assert (facts["images"], facts["crop"], facts["crop_anew"], facts["input"]) == (COUNT, 128, True, {})
    if role == "nips_vgg16":
        # Features of VGG16, but where the recipe has none.
        assert training.recipe.objective_args["vgg"] == "vgg16-397923af.pth"
    ((attack, _),) = training.attacks
    if recipe == "nrp_fgsp":
        assert attack.name == "fgsm" and attack.params["labels"] == "predicted"
        assert Fraction(attack.params["eps"]) == Fraction(16, 255)
    else:
        assert attack.name == ("gaussian_noise" if recipe == "nrp_gnp" else "ssp")


def test_no_other_training_of_the_profile_draws_crops_anew(coco: Path) -> None:
    """Label maps keep theirs, and detectors their images."""
    settings = load_profile("paper")[0].training
    assert {name for name, s in settings.items() if s.crop_anew or not s.resize} == set(ROLES)
    assert settings["coco_mask_rcnn"].dataset == {"split": "train2017"}


def test_targets_take_crops_of_128() -> None:
    """The real networks, without their weights' values: neither wants a size of its own."""
    for role in ROLES:
        model = load_profile("paper")[0].roles[role].model
        assert isinstance(model, dict)
        source = Torchvision(id=model["id"], variant=model["variant"], weights=model["weights"])
        with torch.device("meta"):
            network, classes = source._build()
            assert network.eval()(torch.zeros(2, 3, 128, 128)).shape == (2, classes) == (2, 1000)


# -- what is seen ------------------------------------------------------------------------------------------------------
def test_images_are_480_wide_and_high_and_crops_differ_between_epochs(
    coco: Path, target: LogitsClassifier
) -> None:
    training = plan_training("paper", "nips_vgg16", "nrp")
    ids = list(training.data.ids())
    for name in IMAGES:
        sample = training.data[ids.index(name)]
        assert sample.image.shape == (3, 480, 480) and sample.target == -1
        assert torch.equal(sample.image[0], sample.image[2]) == (name == GREY)
    samples = small(training).samples(target)
    for k in range(4):
        whole = training.data[k].image
        crops = [samples.shown(k, epoch).image for epoch in range(3)]
        assert {crop.shape for crop in crops} == {(3, 128, 128)}
        assert not any(torch.equal(crops[i], crops[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
        # Pixels of the image, not enlarged or reduced ones.
        assert (whole.unfold(1, 128, 1).unfold(2, 128, 1)[:, :, :, 0, 0] == crops[0][:, :1, :1]).all(0).any()


# -- what is trained ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("role", "recipe"), RECIPES)
def test_every_recipe_takes_a_step(coco: Path, target: LogitsClassifier, role: str, recipe: str) -> None:
    training = small(plan_training("paper", role, recipe))
    before = weights(training.trainer(target, None, CPU))
    trainer = training.trainer(target, None, CPU)
    seen: list[tuple[Tensor, Tensor]] = []
    assert trainer.adversary is not None
    made = trainer.adversary

    class Watched:
        identity, prepare = made.identity, made.prepare

        def __call__(self, batch: Any, draw: object) -> Tensor:
            assert set(batch.targets) == {-1}
            adversarial = made(batch, draw)
            seen.append((batch.images, adversarial))
            return adversarial

    trainer.adversary = Watched()
    trainer.run(until=1)
    ((clean, adversarial),) = seen
    assert clean.shape == adversarial.shape == (2, 3, 128, 128)
    distance = (adversarial - clean).abs().amax((1, 2, 3))
    assert (distance > 0).all()
    if recipe != "nrp_gnp":
        assert (distance <= 16 / 255 + 1e-6).all()
    assert not torch.equal(weights(trainer), before)


def test_the_seed_decides(coco: Path, target: LogitsClassifier, tmp_path: Path) -> None:
    """The same seed, the same weights, also after a stop between two epochs and within one; another seed, others."""
    training = small(plan_training("paper", "nips_vgg16", "nrp"))
    whole = trained(training, target)
    assert whole.step == 4 and len(whole.history.epochs) == 2
    assert torch.equal(weights(trained(training, target)), weights(whole))
    for stop in (1, 2, 3):
        state = tmp_path / str(stop) / "state.safetensors"
        trained(training, target, state, until=stop)
        assert torch.equal(weights(trained(training, target, state)), weights(whole))
    other = small(plan_training("paper", "nips_vgg16", "nrp", 1))
    assert other.key != training.key and not torch.equal(weights(trained(other, target)), weights(whole))
    crops = [t.samples(target)[0].image for t in (training, other)]
    assert not torch.equal(*crops)


# -- what is wrong -----------------------------------------------------------------------------------------------------
WHERE = r"profiles/paper\.yaml, training\.{role}"


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            "missing",
            r"\.dataset: dataset unlabelled: root/coco/train2017 does not exist; expected a folder of images",
        ),
        ("empty", r"\.dataset: dataset unlabelled: root/coco/train2017 holds no images$"),
        ("few", r"\.images: 25000 images asked for, unlabelled has 6$"),
    ],
)
def test_images_that_are_missing_are_one_line(
    bench: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    role: str,
    fault: str,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BENCH_DATA", "root")
    if fault == "empty":
        (tmp_path / "root" / "coco" / "train2017").mkdir(parents=True)
    if fault == "few":
        write_coco_images(tmp_path / "root")
    session._plan_training.cache_clear()
    code, _, err = bench("train", "--defense", "nrp", "--role", role, "--profile", "paper", "--device", "cpu")
    assert code == 2 and len(err.strip().splitlines()) == 1
    assert re.search(WHERE.format(role=role) + said, err.strip()), err
