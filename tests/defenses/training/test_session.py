"""Training by name: from a profile to a checkpoint that grids find, and every way it can be refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bench.errors import BenchError, MissingCheckpoint
from bench.frame import cell_frame
from bench.plan import Options, make_plan
from bench.protocols import Sample
from bench.registry import load_plugin
from bench.store import Store
from bench.weights import load_state, read_meta
from defenses.training.recipe import RECIPES
from defenses.training.session import cropped, plan_training

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
