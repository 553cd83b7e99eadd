"""Training by name: from a profile to a checkpoint that grids find, and every way it can be refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bench.errors import BenchError, MissingCheckpoint
from bench.frame import cell_frame
from bench.plan import Options, make_plan
from bench.protocols import Batch, Sample
from bench.registry import ATTACKS as ATTACK
from bench.registry import load_plugin
from bench.store import Store
from bench.weights import load_state, read_meta
from defenses.training.adversary import AttackAdversary
from defenses.training.recipe import RECIPES
from defenses.training.session import Prepared, _asks_labels, cropped, plan_training
from tasks.classification.model import LogitsClassifier
from tests.tasks.classification.coco import write_coco_images

ROOT = Path(__file__).resolve().parents[3]
TOY = ROOT / "tests" / "plugins" / "toy.py"
RECIPE = {"network_args": {"width": 2}, "critic_args": {"width": 2}, "epochs": 2, "batch": 8}
TRAINING: dict[str, Any] = {
    "dataset": {"size": 16},
    "score": {"dataset": {"size": 8}, "images": 8, "attack": {"name": "fgsm", "eps": "16/255"}},
    "recipes": {"apegan": RECIPE},
}
PROFILE: dict[str, Any] = {
    "name": "toy",
    "roles": {
        "classification": {"dataset": "toy_images", "model": "toy_linear"},
        "source": {"dataset": "toy_images", "model": {"name": "toy_linear", "scale": 0.3}},
    },
    "training": {"classification": TRAINING},
}
ATTACKS = {"fgsm": {"name": "fgsm", "eps": "16/255"}}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    load_plugin(TOY)
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(PROFILE))
    return tmp_path


def grid(
    folder: Path, defenses: list[Any], threats: list[Any], roles: tuple[str, ...] = ("classification",)
) -> Path:
    path = folder / "grid.yaml"
    block = {"roles": list(roles), "defenses": defenses, "attacks": ["fgsm"], "threats": threats}
    content = {
        "name": "toy", "profile": str(folder / "profile.yaml"), "plugins": [str(TOY)], "attacks": ATTACKS,
        "blocks": [block],
        "tables": [{"name": "main", "rows": ["defense"], "columns": ["level_label", "attack"], "metric": "accuracy"}],
    }  # fmt: skip
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def train(bench: Run) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        chosen = () if "--task" in arguments else ("--role", "classification")
        return bench(
            "train", "--profile", "profile.yaml", "--device", "cpu", "--store", "s", "--plugin", str(TOY), *chosen,
            *arguments,
        )  # fmt: skip

    return run


def options(path: Path) -> Options:
    return Options(path, checkpoints=(str(path.parent / "s" / "checkpoints"),))


def test_one_command_leaves_a_checkpoint_curves_and_scalars(place: Path, train: Run) -> None:
    code, out, err = train("--defense", "apegan", "--task", "classification")
    assert code == 0, err
    assert "accuracy_attacked_defended" in out
    path = place / "s" / "checkpoints" / "apegan-toy-classification.safetensors"
    meta = read_meta(path)
    training = plan_training("profile.yaml", "classification", "apegan")
    assert meta["key"] == training.key and meta["payload"] == json.loads(json.dumps(training.payload))
    assert meta["rebuild"] == "python -m bench train --defense apegan --role classification --profile toy"
    assert set(meta["scores"]) == {
        f"accuracy_{kind}{suffix}" for kind in ("clean", "attacked") for suffix in ("", "_defended")
    }
    # What was attacked is the bare model, which loses; scores are those of unseen images.
    assert meta["scores"]["accuracy_attacked"] < meta["scores"]["accuracy_clean"] == 1
    own = place / "s" / "training" / training.key[:16]
    assert (own / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len((own / "history.jsonl").read_text().splitlines()) == 2
    assert list((own / "tensorboard").glob("events*"))
    assert not (own / "state.safetensors").exists()
    assert any(t.dtype == torch.float16 for t in load_state(path).state.values())

    code, out, _ = train("--defense", "apegan")
    assert code == 0 and "is there already" in out
    before = path.read_bytes()
    code, out, _ = train("--defense", "apegan", "--overwrite")
    facts = read_meta(path)
    assert code == 0 and {**facts, "seconds": 0} == {**meta, "seconds": 0}
    assert load_state(path).state.keys() == load_state(path).state.keys() and len(path.read_bytes()) == len(
        before
    )


def test_tensorboard_scalars_are_the_terms(place: Path, train: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train("--defense", "apegan")
    (folder,) = (place / "s" / "training").glob("*/tensorboard")
    events = EventAccumulator(str(folder)).Reload()
    assert set(events.Tags()["scalars"]) == {"loss/image", "loss/gan", "loss/critic"}
    assert [e.step for e in events.Scalars("loss/image")] == [1, 2, 3, 4]


def test_a_grid_says_what_is_missing_and_trains_it(place: Path, bench: Run) -> None:
    path = grid(place, ["none", "apegan"], ["oblivious", {"level": "gray_box", "surrogate_seed": 1}])
    command = ("run", "--grid", str(path), "--store", "s", "--out", "o", "--device", "cpu", "--workers", "1")
    code, _, err = bench(*command)
    assert code == 2 and len(err.splitlines()) == 1
    assert "no checkpoint apegan-toy-classification" in err and "and 1 more" in err
    assert "python -m bench train --defense apegan --role classification --profile toy" in err
    code, _, err = bench(*command, "--train-missing")
    assert code == 0, err
    lines = err.splitlines()
    assert any(line.startswith("to train: apegan-toy-classification-s1, about ") for line in lines)
    told = next(i for i, line in enumerate(lines) if line.startswith("2 trainings, about "))
    assert told < next(i for i, line in enumerate(lines) if line.startswith("wrote s/checkpoints/apegan"))
    code, _, err = bench(*command, "--train-missing")
    assert code == 0 and "to train" not in err and "0 crafts and 0 cells to run" in err

    plan = make_plan(options(path))
    frame = cell_frame(plan, Store(place / "s"))
    defended = frame[(frame["defense"] == "apegan") & (frame["status"] == "ok")]
    trained = {"profile": "toy", "recipe": "apegan", "role": "classification", "seed": 0}
    assert all(json.loads(params)["trained"] == trained for params in defended["defense_params"])
    gray = next(c for c in plan.cells if c.level == "gray_box" and c.defense_label == "apegan")
    assert gray.craft is not None and gray.craft.defense is not None
    assert gray.craft.defense.identity()["trained"]["seed"] == 1
    # Nothing in front of the target cannot be retrained: the level is skipped with a reason.
    bare = next(c for c in plan.cells if c.level == "gray_box" and c.defense_label == "none")
    assert bare.skip is not None and "nothing to train" in bare.skip


def test_a_checkpoint_of_another_recipe_does_not_count(place: Path, train: Run) -> None:
    train("--defense", "apegan")
    path = grid(place, ["apegan"], ["oblivious"])
    make_plan(options(path))
    changed = json.loads(json.dumps(PROFILE))
    changed["training"]["classification"]["recipes"]["apegan"]["epochs"] = 3
    (place / "other.yaml").write_text(yaml.safe_dump(changed))
    with pytest.raises(MissingCheckpoint, match="was made by another recipe"):
        make_plan(Options(path, profile=str(place / "other.yaml"), checkpoints=options(path).checkpoints))


def test_one_trained_for_another_role_says_so(place: Path, train: Run) -> None:
    train("--defense", "apegan")
    spec = {"name": "apegan", "trained_for": "classification"}
    path = grid(place, [spec, [spec, {"name": "bit_depth", "bits": 8}]], ["oblivious"], ("source",))
    plan = make_plan(options(path))
    assert {c.target.role for c in plan.cells} == {"source"}
    first, chain = plan.cells[0].defense.identity(), plan.cells[-1].defense.identity()
    assert first["trained"]["role"] == chain["members"][0]["trained"]["role"] == "classification"
    assert not set(first["params"]) & {"weights", "recipe", "trained_for", "train_seed"}


def test_profile_values_replace_and_merge(place: Path) -> None:
    changed = json.loads(json.dumps(PROFILE))
    changed["training"]["source"] = {
        "images": 4,
        "dataset": {},
        "recipes": {
            "nrp": {"network_args": {"width": 8, "blocks": 1}, "epochs": 7},
            "nrp_unet": {"network_args": {"depth": 2}},
            "nrp_gnp": {
                "network_args": {"blocks": 2},
                "attacks": [{"name": "noise", "params": {"eps": "8/255"}}],
            },
        },
    }
    (place / "sized.yaml").write_text(yaml.safe_dump(changed))
    plain = plan_training("sized.yaml", "source", "nrp", 3)
    assert plain.name == "nrp-toy-source-s3" and plain.images == 4
    assert plain.recipe.network_args == {"width": 8, "blocks": 1} and plain.recipe.epochs == 7
    assert plain.recipe.objective == RECIPES["nrp"].objective and plain.recipe.seed == 3
    # Another network shares the length, not the sizes.
    unet = plan_training("sized.yaml", "source", "nrp_unet").recipe
    assert unet.network_args == {"depth": 2} and unet.epochs == 7
    noise = plan_training("sized.yaml", "source", "nrp_gnp")
    assert noise.recipe.network_args == {"width": 8, "blocks": 2}
    assert [attack.name for attack, _ in noise.attacks] == ["noise"]
    # A role without an entry of its own uses its task's.
    assert plan_training("sized.yaml", "classification", "apegan").recipe.epochs == 2


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"recipes": {"apegam": {}}},
            "training.source.recipes: unknown recipe or defense 'apegam': did you mean 'apegan",
        ),
        (
            {"recipes": {"nrp": {"epoch": 1}}},
            "recipes.nrp: recipe of nrp: unknown value 'epoch': did you mean 'epochs'",
        ),
        ({"images": 400}, "training.source.images: 400 images asked for, toy_images has 12"),
        (
            {"dataset": {"split": "train"}},
            "training.source.dataset: dataset 'toy_images': unknown parameter 'split'",
        ),
        ({"epochs": 3}, "training.source: unknown key 'epochs'"),
    ],
)
def test_mistakes_in_a_profile_are_one_line(place: Path, entry: dict[str, Any], message: str) -> None:
    base = {} if "dataset" in entry else {"dataset": {}}
    changed = {**PROFILE, "training": {"source": {**base, **entry}}}
    (place / "wrong.yaml").write_text(yaml.safe_dump(changed))
    with pytest.raises(BenchError, match=r"wrong\.yaml") as error:
        plan_training("wrong.yaml", "source", "nrp")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--defense", "cafdd"], "unknown defense 'cafdd': did you mean 'cafd'"),
        (["--defense", "jpeg"], "--defense: 'jpeg': there is nothing to train; trainable are "),
        (["--defense", "fpd"], "no public code"),
        (["--defense", "hgd", "--recipe", "hgd_logit"], "did you mean 'hgd_"),
        (["--defense", "hgd", "--recipe", "cafd"], "'cafd' is a recipe of defense 'cafd', not of 'hgd'"),
        (["--defense", "apegan", "--task", "classification", "--role", "source"], "either --role or --task"),
        (["--defense", "apegan", "--task", "detection"], "unknown task 'detection'"),
        (["--defense", "apegan", "--precision", "float8"], "unknown precision 'float8'"),
        (["--defense", "apegan", "--precision", "float16"], "float16 needs a GPU"),
        (["--defense", "cafd"], "linear"),
    ],
)
def test_what_cannot_be_trained_is_one_line(
    place: Path, train: Run, arguments: list[str], message: str
) -> None:
    code, _, err = train(*arguments)
    assert code == 2 and len(err.splitlines()) == 1 and message in err
    assert not list(place.glob("s/checkpoints/*"))


def test_an_attack_on_a_loss_that_the_task_lacks_is_refused_before_anything_runs(place: Path) -> None:
    (place / "profile.yaml").write_text(yaml.safe_dump({
        **PROFILE, "training": {"classification": {**TRAINING, "recipes": {
            "apegan": {**RECIPE, "attacks": [{"name": "fgsm", "params": {"loss": "cls"}}]},
        }}},
    }))  # fmt: skip
    with pytest.raises(BenchError, match=r"attack 'fgsm': unknown loss of task classification 'cls'"):
        _ = plan_training(str(place / "profile.yaml"), "classification", "apegan").attacks


def test_crops_are_the_same_square_of_image_and_label_map() -> None:
    image = torch.arange(3 * 20 * 30, dtype=torch.float32).view(3, 20, 30)
    labels = image[0].long()
    made = [cropped(Sample(image, labels, name), 8) for name in ("a", "a", "b")]
    for sample in made:
        assert sample.image.shape == (3, 8, 8)
        assert torch.equal(sample.image[0].long(), sample.target)
    assert torch.equal(made[0].image, made[1].image) and not torch.equal(made[0].image, made[2].image)
    assert cropped(Sample(image, 4, "a"), 8).target == 4
    with pytest.raises(BenchError, match=r"image a is 20x30 pixels, a crop of 21 does not fit"):
        cropped(Sample(image, 4, "a"), 21)
    with pytest.raises(BenchError, match=r"ground truth of image a is list; only labels and label maps"):
        cropped(Sample(image, [], "a"), 8)


def test_trained_on_crops(place: Path, train: Run) -> None:
    whole = plan_training("profile.yaml", "classification", "apegan")
    (place / "crops.yaml").write_text(
        yaml.safe_dump({**PROFILE, "training": {"classification": {**TRAINING, "crop": 8}}})
    )
    small = plan_training("crops.yaml", "classification", "apegan")
    assert (
        small.key != whole.key and small.payload["data"]["crop"] == 8 and "crop" not in whole.payload["data"]
    )
    target = small.source.load(torch.device("cpu"))
    assert {tuple(small.samples(target)[i].image.shape) for i in range(small.images)} == {(3, 8, 8)}


def test_crops_drawn_anew_are_other_squares_in_every_epoch() -> None:
    """A function of seed, epoch and image; without a seed an image keeps the square that it always had."""
    images = [Sample(torch.rand(3, 40, 30), k, str(k)) for k in range(4)]
    fixed, drawn, again, other = (Prepared(images, None, 4, 8, seed) for seed in (None, 3, 3, 4))
    for k, image in enumerate(images):
        assert torch.equal(fixed.shown(k, 5).image, cropped(image, 8).image)
        squares = [drawn.shown(k, epoch) for epoch in range(6)]
        assert {(s.image.shape, s.target, s.id) for s in squares} == {((3, 8, 8), k, str(k))}
        assert len({tuple(s.image.flatten().tolist()) for s in squares}) >= 5
        assert torch.equal(drawn[k].image, squares[0].image)
        for epoch in (5, 0):  # in any order
            assert torch.equal(again.shown(k, epoch).image, squares[epoch].image)
        assert not torch.equal(other.shown(k, 0).image, squares[0].image)


def test_crops_reach_every_place() -> None:
    image = torch.arange(12 * 10, dtype=torch.float32).view(1, 12, 10).expand(3, 12, 10)
    drawn = Prepared([Sample(image, -1, "a")], None, 1, 8, 0)
    corners = {divmod(int(drawn.shown(0, epoch).image[0, 0, 0]), 10) for epoch in range(300)}
    assert corners == {(y, x) for y in range(5) for x in range(3)}


def planned(place: Path, recipe: str = "apegan", **training: Any) -> Any:
    """A training of the toy profile with other settings."""
    path = place / f"profile{len(list(place.iterdir()))}.yaml"
    path.write_text(yaml.safe_dump({**PROFILE, "training": {"classification": {**TRAINING, **training}}}))
    return plan_training(str(path), "classification", recipe)


def test_settings_that_came_later_leave_keys_as_they_were(place: Path) -> None:
    plain, cropping = planned(place), planned(place, crop=8)
    assert planned(place, crop_anew=False, resize=True).key == plain.key
    assert planned(place, crop=8, crop_anew=False, resize=True).key == cropping.key
    assert "crop_anew" not in cropping.payload["data"]
    anew = planned(place, crop=8, crop_anew=True, recipes={"apegan": {**RECIPE, "static": False}})
    assert anew.payload["data"] == {**cropping.payload["data"], "crop_anew": True}


COCO = {"name": "unlabelled", "folder": "coco/train2017", "size": 40}
FREE = {
    **RECIPE,
    "static": False,
    "batch": 2,
    "attacks": [{"name": "fgsm", "params": {"labels": "predicted"}}],
}
UNLABELLED: dict[str, Any] = {
    "dataset": COCO, "images": 5, "crop": 32, "crop_anew": True, "resize": False,
    "score": None, "recipes": {"apegan": FREE, "hgd": {}},
}  # fmt: skip


@pytest.fixture
def coco(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place with a data root of six images in COCO's layout."""
    monkeypatch.setenv("BENCH_DATA", "data")
    write_coco_images(place / "data")
    return place


def test_trained_on_crops_of_unlabelled_images(coco: Path) -> None:
    """The same seed gives the same checkpoint, another one other crops; and a run resumes."""

    def weights(training: Any, state: Path | None = None, until: int | None = None) -> torch.Tensor:
        target = training.source.load(torch.device("cpu"))
        trainer = training.trainer(target, state, torch.device("cpu"))
        trainer.run(until=until)
        return torch.cat([value.flatten().double() for value in trainer.network.state_dict().values()])

    training = planned(coco, **UNLABELLED)
    target = training.source.load(torch.device("cpu"))
    assert training.images == 5 and training.payload["data"]["crop_anew"] is True
    shown = [training.samples(target).shown(0, epoch).image for epoch in range(4)]
    assert {image.shape for image in shown} == {(3, 32, 32)}
    assert len({tuple(image.flatten().tolist()) for image in shown}) > 1
    first = weights(training)
    assert torch.equal(weights(planned(coco, **UNLABELLED)), first)
    kept = planned(coco, **{**UNLABELLED, "crop_anew": False})
    assert kept.key != training.key and not torch.equal(weights(kept), first)
    state = coco / "own" / "state.safetensors"
    weights(training, state, until=3)
    assert torch.equal(weights(training, state), first)


def test_images_as_they_are_are_not_prepared_for_the_target(
    coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, resized = planned(coco, **UNLABELLED), planned(coco, **{**UNLABELLED, "resize": True})
    target = training.source.load(torch.device("cpu"))

    def prepare(sample: Sample) -> Sample:
        raise AssertionError("it was prepared")

    monkeypatch.setattr(target, "prepare", prepare)
    assert training.samples(target)[0].image.shape == (3, 32, 32)
    with pytest.raises(AssertionError, match="it was prepared"):
        resized.samples(target)[0]


def test_preparation_is_in_the_key_where_there_is_one(coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, resized = planned(coco, **UNLABELLED), planned(coco, **{**UNLABELLED, "resize": True})
    for made in (training, resized):
        monkeypatch.setattr(made.source, "input_spec", lambda: {"resize": 256})
    assert training.payload["data"]["input"] == {} and resized.payload["data"]["input"] == {"resize": 256}


def attacked_by(name: str) -> dict[str, Any]:
    return {"recipes": {"apegan": {**FREE, "attacks": [{"name": name}]}}}


AT = r"profile1\.yaml, training\.classification"
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("apegan", {"images": 25000}, rf"{AT}\.images: 25000 images asked for, unlabelled has 6$"),
    (
        "apegan",
        {"dataset": {**COCO, "folder": "coco/val2017"}},
        rf"{AT}\.dataset: dataset unlabelled: data/coco/val2017 does not exist; expected a folder of images",
    ),
    (
        "apegan",
        {"dataset": {**COCO, "folder": "empty"}},
        rf"{AT}\.dataset: dataset unlabelled: data/empty holds no images$",
    ),
    ("apegan", {"dataset": {**COCO, "size": "480x480"}}, rf"{AT}\.dataset.* size: .*'480x480'"),
    ("apegan", {"crop": None}, rf"{AT}: `crop_anew` needs `crop`, the side of the square"),
    ("apegan", {"crop_anew": "random"}, rf"{AT}\.crop_anew.*random"),
    (
        "hgd",
        {},
        rf"{AT}\.crop_anew: true, but recipe 'hgd' attacks each image once and keeps the result \(static: true\); "
        "expected `static: false`",
    ),
    (
        "apegan",
        attacked_by("fgsm"),
        "attack 'fgsm' needs labels, which dataset unlabelled does not have; expected .*`labels: predicted`$",
    ),
    ("apegan", attacked_by("pgd"), "attack 'pgd' needs labels, .*; expected one without, such as ssp$"),
    (
        "hgd_labels",
        {"recipes": {"hgd": {"static": False, "attacks": [{"name": "noise"}]}}},
        "recipe hgd_labels: its loss needs labels, which dataset unlabelled does not have$",
    ),
]


@pytest.mark.parametrize(("recipe", "changes", "said"), WRONG)
def test_one_line_for_unlabelled_images_that_cannot_be_trained_on(
    coco: Path, bench: Run, recipe: str, changes: dict[str, Any], said: str
) -> None:
    (coco / "data" / "empty").mkdir()
    path = coco / "profile1.yaml"
    path.write_text(yaml.safe_dump({**PROFILE, "training": {"classification": {**UNLABELLED, **changes}}}))
    code, _, err = bench(
        "train", "--profile", str(path), "--device", "cpu", "--store", "s", "--plugin", str(TOY),
        "--role", "classification", "--defense", RECIPES[recipe].defense, "--recipe", recipe,
    )  # fmt: skip
    assert code == 2 and len(err.strip().splitlines()) == 1 and re.search(said, err.strip()), err


def test_a_crop_that_does_not_fit_is_one_line(coco: Path) -> None:
    training = planned(coco, **{**UNLABELLED, "crop": 41})
    with pytest.raises(BenchError, match=r"training\.crop: image \d+\.jpg is 40x40 pixels, a crop of 41"):
        training.trainer(training.source.load(torch.device("cpu")), None, torch.device("cpu"))


FEW = {"steps": 2}
ATTACKED: list[tuple[str, dict[str, Any], bool]] = [
    ("none", {}, False), ("noise", {}, False), ("noise", {"draws": 3}, True), ("gaussian_noise", {}, False),
    ("fgsm", {}, True), ("fgsm", {"labels": "predicted"}, False), ("r_fgsm", {}, True), ("bim", FEW, True),
    ("bim", {**FEW, "labels": "predicted"}, False), ("pgd", FEW, True), ("mi_fgsm", FEW, True), ("tap", FEW, True),
    ("pgd", {**FEW, "loss": "margin"}, True), ("pgd", {**FEW, "loss": "kl", "start": "normal"}, False),
    ("ssp", FEW, False), ("ssp", {**FEW, "mode": "paper", "layer": "conv"}, False), ("fff", FEW, False),
    ("cafa", FEW, False), ("hgd_ensemble", FEW, False), ("hgd_ensemble", {**FEW, "labels": "true"}, True),
    ("apgd", {"steps": 4}, True), ("ddn", {"steps": 30}, True), ("deepfool", {"steps": 50}, True),
    ("cw_l2", {"steps": 50, "binary_search_steps": 1, "initial_c": 100, "lr": 0.1}, True),
    ("square", {"queries": 20}, True), ("stadv", FEW, True), ("spsa", {"steps": 1}, True),
]  # fmt: skip


class Maps(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 6, 3, 2)
        self.pool = torch.nn.AdaptiveAvgPool2d(1)
        self.fc = torch.nn.Linear(6, 4, bias=False)  # decisions that minimal-norm attacks can reach
        torch.nn.init.normal_(self.fc.weight, std=10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(torch.relu(self.conv(x))).flatten(1))


@pytest.mark.parametrize(("name", "params", "asks"), ATTACKED)
def test_attacks_that_follow_a_label_are_known(name: str, params: dict[str, Any], asks: bool) -> None:
    """By what they do: with other labels their images are others, or nothing is different at all."""
    torch.manual_seed(0)
    target = LogitsClassifier(Maps(), 4)
    images = torch.rand(4, 3, 16, 16)
    labels = [int(p.label) for p in target.predict(images)]

    def made(targets: list[int]) -> torch.Tensor:
        adversary = AttackAdversary([(ATTACK.create(name, params), 1.0)], target)
        return adversary(Batch(images, tuple(targets), tuple("abcd")), "draw")

    assert _asks_labels(ATTACK.create(name, params)) == asks
    right, wrong = made(labels), made([(label + 1) % 4 for label in labels])
    assert torch.equal(right, wrong) != asks
    if not asks:
        assert torch.equal(made([-1] * 4), right)


@pytest.mark.parametrize(
    ("dataset", "model", "crop"),
    [("mini_scenes_seg", "mini_pspnet", 64), ("mini_scenes_det", "mini_ssd", None)],
)
def test_a_generator_of_small_images_is_trained_on_scenes(
    place: Path, bench: Run, dataset: str, model: str, crop: int | None
) -> None:
    """As profile paper trains it: whole images, or crops, scaled to the generator, which stands before whole ones."""
    own = {
        "network_args": {"size": [16, 16], "width": 4, "latent": 6},
        "critic_args": {"width": 4},
        "epochs": 1,
    }
    recipes = {"defense_gan": {**own, "batch": 2, "objective_args": {"resize": True}}}
    settings = {"dataset": {"split": "train", "count": 4}, "recipes": recipes}
    if crop is not None:
        settings["crop"] = crop
    profile = {
        "name": "scenes",
        "roles": {"scenes": {"dataset": {"name": dataset, "count": 2}, "model": model}},
        "training": {"scenes": settings},
    }
    # Trainings are remembered by the profile's name: not the same one twice.
    (place / f"{model}.yaml").write_text(yaml.safe_dump(profile))
    block = {"roles": ["scenes"], "defenses": ["gan"], "attacks": ["noise"], "threats": ["oblivious"]}
    content = {
        "name": "scenes", "profile": f"{model}.yaml", "blocks": [block], "evaluate": {"repeats": 1},
        "defenses": {"gan": {"name": "defense_gan", "resize": True, "R": 1, "L": 2}},
    }  # fmt: skip
    (place / "grid.yaml").write_text(yaml.safe_dump(content))
    command = (
        "run",
        "--grid",
        "grid.yaml",
        "--store",
        "s",
        "--out",
        "o",
        "--device",
        "cpu",
        "--workers",
        "1",
        "--quiet",
    )
    assert bench(*command)[0] == 2
    code, _, err = bench(*command, "--train-missing")
    assert code == 0, err
    frame = cell_frame(make_plan(options(place / "grid.yaml")), Store(place / "s"))
    assert set(frame["status"]) == {"ok"} and set(frame["n"]) == {2}
