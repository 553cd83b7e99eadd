"""`bench train-target`: it learns, goes on after a kill to the same bits, and leaves a checkpoint that a grid takes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from bench.errors import BenchError
from bench.frame import cell_frame
from bench.plan import Options, make_plan
from bench.protocols import Dataset, Sample
from bench.registry import DATASETS, MODELS, load_plugin
from bench.store import Store
from bench.weights import load_state, read_meta, sha256_file
from tasks.classification import _training as training
from tasks.classification._training import TargetRecipe, TargetTrainer
from tasks.classification.model import LogitsClassifier

ROOT = Path(__file__).resolve().parents[3]
TOY = ROOT / "tests" / "plugins" / "toy.py"
CPU = torch.device("cpu")
Run = Callable[..., tuple[int, str, str]]
DIGITS = "{name: mini_digits, count: 96}"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with training.steady(CPU):
        yield


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def train(bench: Run) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        chosen = () if "--dataset" in arguments else ("--dataset", DIGITS)
        return bench(
            "train-target", "--arch", "mini_vgg", *chosen, "--device", "cpu", "--store", "s", "--score-images", "8",
            *arguments,
        )  # fmt: skip

    return run


@pytest.mark.parametrize("arch", ["wrn-34-10", "vgg-19", "resnet-50"])
def test_the_papers_networks_train(arch: str, place: Path, bench: Run) -> None:
    """One step each; wrn-28-20, of the same class as wrn-34-10, takes half a minute and 300 MB."""
    few = "{name: mini_digits, split: train, count: 2}"
    code, _, err = bench(
        "train-target", "--arch", arch, "--dataset", few, "--device", "cpu", "--store", "s", "--score-images", "1",
        "--epochs", "1", "--batch-size", "2", "--out", "w.safetensors",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads((place / "w.json").read_text())["arch"] == arch
    profile = {"checkpoint": str(place / "w.safetensors")}
    model = MODELS.create("cifar", profile).load(CPU)
    assert model.logits(torch.rand(1, 3, 32, 32)).shape == (1, 10)


SMALL = ("--epochs", "2", "--batch-size", "32", "--out", "w.safetensors")


def test_training_learns_and_its_checkpoint_runs_in_a_grid(place: Path, bench: Run, train: Run) -> None:
    options = ("--epochs", "16", "--batch-size", "16", "--lr", "0.05", "--padding", "0")
    code, out, err = train(*options, "--out", "nets/w.safetensors")
    assert code == 0, err
    assert "clean 0." in out and "pgd20_8/255 0." in out and "wrote nets/w.safetensors and w.json" in err
    path = place / "nets" / "w.safetensors"
    told = json.loads((place / "nets" / "w.json").read_text())
    assert told["sha256"] == sha256_file(path)
    assert read_meta(path) == {name: value for name, value in told.items() if name != "sha256"}
    assert told["command"] == (
        f"python -m bench train-target --arch mini_vgg --dataset '{DIGITS}' --epochs 16 --batch-size 16 --lr 0.05 "
        "--padding 0 --out nets/w.safetensors"
    )
    data = DATASETS.create("mini_digits", {"split": "train", "count": 96})
    assert told["payload"]["data"]["fingerprint"] == data.fingerprint()
    assert told["payload"]["recipe"]["flip"] is False
    assert told["scored"]["dataset"] == "mini_digits" and told["scored"]["images"] == 8
    assert told["scored"]["fingerprint"] == DATASETS.create("mini_digits", {"split": "test"}).fingerprint()
    (own,) = (place / "s" / "training").iterdir()
    epochs = [json.loads(line)["ce"] for line in (own / "history.jsonl").read_text().splitlines()]
    assert len(epochs) == 16 and epochs[-1] < 0.5 * epochs[0] < 0.5 * 3
    assert (own / "curves.png").read_bytes().startswith(b"\x89PNG") and list(
        (own / "tensorboard").glob("ev*")
    )
    assert not (own / "state.safetensors").exists() and not (own / "unscored.safetensors").exists()

    # On what it was trained on, the model of the checkpoint is right far more often than by chance.
    model = MODELS.create("cifar", {"checkpoint": str(path)}).load(CPU)
    samples = [data[i] for i in range(96)]
    found = model.predict(torch.stack([s.image for s in samples]))
    assert sum(d.label == s.target for d, s in zip(found, samples, strict=True)) > 0.7 * 96

    profile = {
        "name": "mine",
        "roles": {
            "classification": {
                "dataset": {"name": "mini_digits", "split": "train", "count": 12},
                "model": {"name": "cifar", "arch": "mini_vgg", "checkpoint": "nets/w.safetensors", "num_classes": 10},
            }
        },
    }  # fmt: skip
    grid = {
        "name": "g", "profile": "profile.yaml", "attacks": {"fgsm": {"name": "fgsm", "eps": "16/255"}},
        "blocks": [
            {"roles": ["classification"], "defenses": ["none"], "attacks": ["fgsm"], "threats": ["oblivious"]}
        ],
        "tables": [{"name": "main", "rows": ["defense"], "columns": ["level_label", "attack"], "metric": "accuracy"}],
    }  # fmt: skip
    (place / "profile.yaml").write_text(yaml.safe_dump(profile))
    (place / "grid.yaml").write_text(yaml.safe_dump(grid))
    code, _, err = bench(
        "run", "--grid", "grid.yaml", "--store", "s", "--out", "o", "--device", "cpu", "--workers", "1",
        "--quiet",
    )  # fmt: skip
    assert code == 0, err
    frame = cell_frame(make_plan(Options(place / "grid.yaml")), Store(place / "s"))
    left = frame[frame["metric"] == "accuracy"].groupby("attack", observed=True)["value"].max()
    assert left["clean"] > 0.5 > left["fgsm"]


KILLED = """
import os, sys, signal
from pathlib import Path
import torch
sys.path[:0] = [{root!r}]
from tasks.classification import _training as t
data, test = t.find_data({spec!r})
job = t.TargetTraining(t.TargetRecipe("mini_vgg", 2, 32, flip=False), data, test, {spec!r})
own = Path("s", "training", job.key[:16])
kill = lambda done, total, note: os.kill(os.getpid(), signal.SIGKILL) if done == 5 else None
t.train_target(job, own, Path("w.safetensors"), device=torch.device("cpu"), progress=kill)
"""


def test_a_killed_training_goes_on_to_the_same_bits(place: Path, train: Run) -> None:
    code = KILLED.format(root=str(ROOT), spec=DIGITS)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=120)
    assert done.returncode == -9, done.stderr.decode()[-500:]
    (state,) = place.glob("s/training/*/state.safetensors")
    assert read_meta(state)["step"] == 3 and not (place / "w.safetensors").exists()
    assert train(*SMALL)[0] == 0
    assert not state.exists()
    straight = ("--epochs", "2", "--batch-size", "32", "--out", "straight.safetensors", "--store", "other")
    assert train(*straight)[0] == 0
    one, two = (load_state(place / f"{name}.safetensors") for name in ("w", "straight"))
    assert one.state.keys() == two.state.keys()
    assert all(torch.equal(one.state[name], two.state[name]) for name in one.state)
    for name in ("key", "losses", "scores", "steps"):
        assert one.meta[name] == two.meta[name]

    # The same command finds it; another one does not replace it unasked.
    code, out, _ = train(*SMALL)
    assert code == 0 and "w.safetensors is there already" in out
    before = sha256_file(place / "w.safetensors")
    code, _, err = train(*SMALL, "--seed", "1")
    assert code == 2 and "was made by another training; --overwrite replaces it" in err
    assert sha256_file(place / "w.safetensors") == before
    assert train(*SMALL, "--no-normalise", "--seed", "1", "--overwrite")[0] == 0
    assert sha256_file(place / "w.safetensors") != before
    facts = read_meta(place / "w.safetensors")
    assert (facts["mean"], facts["std"]) == ([0, 0, 0], [1, 1, 1])
    assert " --no-normalise --seed 1 --out w.safetensors" in facts["command"]


# -- the loop ---------------------------------------------------------------------------------------------------------
def samples(count: int = 12, size: int = 16) -> list[Sample]:
    images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))
    return [Sample(image, i % 4, str(i)) for i, image in enumerate(images)]


def trainer(state: Path | None = None, **changes: Any) -> TargetTrainer:
    recipe = TargetRecipe(**{"arch": "mini_wrn", "epochs": 2, "batch_size": 4, "padding": 2, **changes})
    return TargetTrainer(recipe, samples(), 4, [0.5] * 3, [0.25] * 3, key="k", state=state)


def weights(t: TargetTrainer) -> Tensor:
    return torch.cat([v.flatten().double() for v in t.network.state_dict().values()])


@pytest.mark.parametrize("adversarial", ["none", "pgd", "trades", "free", "doa"])
def test_resumed_trainings_end_with_the_same_bits(adversarial: str, tmp_path: Path) -> None:
    straight = trainer(adversarial=adversarial)
    history = straight.run()
    assert set(history.epochs[0]) == ({"ce", "kl"} if adversarial == "trades" else {"ce"})
    state = tmp_path / "state.safetensors"
    trainer(state, adversarial=adversarial).run(until=2)
    again = trainer(state, adversarial=adversarial)
    assert again.step == 2 and again.run().epochs == history.epochs
    assert torch.equal(weights(again), weights(straight))


def test_seeds_precision_and_adversaries_make_other_weights() -> None:
    found = [
        weights(t)
        for t in (
            trainer(epochs=1), trainer(epochs=1), trainer(epochs=1, seed=1), trainer(epochs=1, adversarial="pgd"),
            trainer(epochs=1, adversarial="free"), trainer(epochs=1, precision="bfloat16"), trainer(epochs=1, size=12),
            trainer(epochs=1, label_smoothing=0.1), trainer(epochs=1, adversarial="doa"),
        )
        if t.run()
    ]  # fmt: skip
    assert torch.equal(found[0], found[1])
    for other in found[2:]:
        assert torch.isfinite(other).all() and not torch.equal(other, found[0])


def test_one_step_by_hand() -> None:
    """A step without crops and flips is torch's own SGD on the cross entropy of normalised images."""
    t = trainer(padding=0, flip=False, lr=0.1, epochs=1, batch_size=12)
    twin = trainer(padding=0, flip=False).network
    images, labels = torch.stack([s.image for s in samples()]), torch.arange(12) % 4
    optimizer = torch.optim.SGD(twin.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    loss = F.cross_entropy(twin((images - 0.5) / 0.25), labels)
    loss.backward()
    optimizer.step()
    history = t.run()
    assert history.epochs[0]["ce"] == pytest.approx(loss.item(), rel=1e-5)
    for name, value in twin.state_dict().items():
        assert torch.allclose(t.network.state_dict()[name], value, atol=1e-6), name


def test_a_square_hides_what_counts_most() -> None:
    """The class is told by one bright place alone: that is where the square goes, and it becomes dark there."""
    network = Brightest()
    attack = training.Occlusion(LogitsClassifier(network, 2), side=3, alpha=0.125, steps=2)
    images = torch.full((2, 3, 8, 9), 0.25)
    images[0, :, 2:5, 4:7] = 1
    images[1, :, 5:8, 0:3] = 1
    found = attack(images, [1, 1], ["a", "b"])
    for k, (top, left) in enumerate([(2, 4), (5, 0)]):
        changed = (found[k] != images[k]).all(0)
        expected = torch.zeros(8, 9, dtype=torch.bool)
        expected[top : top + 3, left : left + 3] = True
        # From grey, two steps down.
        assert torch.equal(changed, expected) and torch.allclose(found[k][:, expected], torch.tensor(0.25))
        assert torch.equal(found[k][:, ~expected], images[k][:, ~expected])
    assert network.training and not found.requires_grad
    with pytest.raises(BenchError, match="doa needs images of 7 pixels a side, these have 6"):
        TargetTrainer(
            TargetRecipe("mini_wrn", 1, 2, adversarial="doa"),
            samples(size=6),
            4,
            [0.5] * 3,
            [0.5] * 3,
            key="k",
        )


class Brightest(torch.nn.Module):
    """Class 1 by the mean of the brightest square of 3x3."""

    def forward(self, x: Tensor) -> Tensor:
        brightest = F.avg_pool2d(x, 3, 1).mean(1).amax((1, 2))
        return torch.stack([-brightest, brightest], 1)


# -- going on from a checkpoint ---------------------------------------------------------------------------------------
def test_a_training_starts_from_given_weights(place: Path, train: Run) -> None:
    assert train(*SMALL)[0] == 0
    on = ("--epochs", "1", "--batch-size", "32", "--init", "w.safetensors", "--out", "on.safetensors")
    # Steps that change nothing: what comes out is what went in.
    code, _, err = train(*on, "--lr", "1e-30", "--weight-decay", "0")
    assert code == 0, err
    first, still = load_state(place / "w.safetensors"), load_state(place / "on.safetensors")
    assert all(torch.equal(first.state[n], v) for n, v in still.state.items() if v.ndim > 1)
    facts = json.loads((place / "on.json").read_text())
    assert facts["payload"]["init"] == sha256_file(place / "w.safetensors")
    assert (
        " --init w.safetensors " in facts["command"]
        and "init" not in json.loads((place / "w.json").read_text())["payload"]
    )
    # Normalised as those weights were, whatever the images.
    assert train(*SMALL, "--no-normalise", "--overwrite")[0] == 0
    assert train(*on, "--overwrite")[0] == 0
    assert read_meta(place / "on.safetensors")["mean"] == [0, 0, 0]
    # Another file is another training.
    code, _, err = train(*on, "--overwrite", "--adversarial", "pgd", "--out", "other.safetensors")
    assert code == 0, err
    assert read_meta(place / "other.safetensors")["key"] != read_meta(place / "on.safetensors")["key"]


def test_a_resumed_training_from_given_weights_ends_with_the_same_bits(tmp_path: Path) -> None:
    begun = trainer(epochs=1, seed=3)
    begun.run()
    start = training.Start(tmp_path / "w", begun.network.state_dict(), "0" * 64)
    recipe = TargetRecipe("mini_wrn", 2, 4, padding=2)

    def going_on(state: Path | None = None) -> TargetTrainer:
        own = training.Start(start.path, {n: v.clone() for n, v in start.state.items()}, start.sha256)
        return TargetTrainer(recipe, samples(), 4, [0.5] * 3, [0.25] * 3, key="k", state=state, start=own)

    straight = going_on()
    assert torch.equal(weights(straight), weights(begun))
    straight.run()
    state = tmp_path / "state.safetensors"
    going_on(state).run(until=2)
    again = going_on(state)
    assert again.step == 2
    again.run()
    assert torch.equal(weights(again), weights(straight)) and not torch.equal(
        weights(again), weights(trainer())
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--init", "none.safetensors"), "--init: weights file none.safetensors does not exist"),
        (("--init", "x.pth"), "--init: x.pth, as mini_vgg: a checkpoint of another model: 22 missing"),
        (("--arch", "mini_wrn"), "--init: w.safetensors is a mini_vgg, --arch says mini_wrn"),
        (("--dataset", "toy_images"), "--init: w.safetensors has 10 classes, the training images have 4"),
        (("--no-normalise",), "--init: w.safetensors was trained on normalised images: leave out --no-normalise"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_one_line(
    place: Path, train: Run, arguments: tuple[str, ...], message: str
) -> None:
    assert train(*SMALL)[0] == 0
    torch.save({"x": torch.zeros(1)}, place / "x.pth")
    code, _, err = train(
        "--epochs", "1", "--init", "w.safetensors", "--out", "n.safetensors", "--plugin", str(TOY), *arguments
    )  # fmt: skip
    assert code == 2 and message in err and len(err.splitlines()) == 1, err
    assert not (place / "n.safetensors").exists()


def test_learning_rates() -> None:
    cosine = TargetRecipe("mini_wrn", epochs=10, lr=0.2)
    assert [cosine.learning_rate(e) for e in (0, 5)] == pytest.approx([0.2, 0.1])
    assert cosine.learning_rate(9, 0.5) == pytest.approx(0.1 * (1 + math.cos(0.95 * math.pi)))
    steps = TargetRecipe("mini_wrn", schedule="multistep", milestones=(60, 120), gamma=0.2)
    assert [steps.learning_rate(e) for e in (59, 60, 120)] == pytest.approx([0.1, 0.02, 0.004])


def test_crops_and_flips() -> None:
    images = torch.rand(1, 3, 5, 6)
    padded = F.pad(images, (2,) * 4)
    seen = set()
    for draw in range(50):
        out = training.augmented(images, [draw], 2, flip=True)[0]
        top, left, turned = draw % 5, draw // 5 % 5, draw // 25 % 2
        crop = padded[0, :, top : top + 5, left : left + 6]
        assert torch.equal(out, crop.flip(2) if turned else crop)
        seen.add((top, left, turned))
    assert len(seen) == 50
    assert torch.equal(training.augmented(images, [49], 0, flip=False), images)


def test_channel_statistics() -> None:
    pixels = torch.stack([s.image for s in samples()]).double()
    mean, std = training.channel_statistics(samples())
    assert mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=6e-5)
    assert std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=6e-5)
    assert training.spread(10, 4) == [0, 2, 5, 7] and training.spread(3, 9) == [0, 1, 2]


# -- data -------------------------------------------------------------------------------------------------------------
def test_training_and_scores_use_different_images() -> None:
    data, test = training.find_data("mini_digits")
    assert (data.params["split"], test.params["split"]) == ("train", "test")
    data, test = training.find_data("{name: mini_digits, split: test}")
    assert (data.params["split"], test.params["split"]) == ("test", "val")
    data, test = training.find_data("mini_digits", "{name: mini_digits, split: val, count: 3}")
    assert (data.params["split"], len(test)) == ("train", 3)
    load_plugin(TOY)
    whole: Dataset = DATASETS.create("toy_images", {"size": 25})
    data, test = training.find_data("{name: toy_images, size: 25}")
    assert [test[i].id for i in range(len(test))] == ["toy-0", "toy-10", "toy-20"]
    assert {data[i].id for i in range(len(data))} == set(whole.ids()) - {"toy-0", "toy-10", "toy-20"}
    assert len({data.fingerprint(), test.fingerprint(), whole.fingerprint()}) == 3
    assert training.shows_digits(DATASETS.create("svhn", {}).classes)
    assert training.shows_digits(DATASETS.create("mini_digits", {}).classes)
    assert not training.shows_digits(DATASETS.create("fashion_mnist", {}).classes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--arch", "wrn-29-10"), "arch 'wrn-29-10': depth: 29 is not 4 more"),
        (("--arch", "vgg-19", "--dataset", "toy_images"), "vgg-19 needs images of 32x32 pixels, these have 8"),
        (("--dataset", "mini_digit"), "--dataset: unknown dataset 'mini_digit': did you mean 'mini_digits'"),
        (("--dataset", "mini_scenes_seg"), "'mini_scenes_seg' is for segmentation, expected a dataset of classif"),
        (("--dataset", "photographs"), "--dataset: the images of 'photographs' have no labels, expected a dataset"),
        (("--test", "photographs"), "--test: the images of 'photographs' have no labels, expected a dataset"),
        (("--dataset", "{name: mini_digits"), "--dataset: while parsing a flow mapping"),
        (("--dataset", "[1]"), "--dataset: expected a dataset such as {name: cifar10"),
        (("--dataset", "{name: mini_digits, splits: train}"), "unknown parameter 'splits': did you mean 'split'"),
        (("--dataset", "{name: fashion_mnist, root: nowhere}"), "nowhere/FashionMNIST/raw/train-images-idx3-ubyte"),
        (("--dataset", "{name: toy_images, size: 3}"), "toy_images has 3 images, too few to hold some out"),
        (("--test", "nothing"), "--test: unknown dataset 'nothing'"),
        (("--out", "w.pt"), "--out: w.pt does not end in .safetensors"),
        (("--out", "file/w.safetensors"), "--out: file/w.safetensors cannot be written"),
        (("--schedule", "cosin"), "--schedule: unknown schedule 'cosin': did you mean 'cosine'"),
        (("--adversarial", "fgsm"), "--adversarial: unknown adversarial 'fgsm'"),
        (("--precision", "half"), "--precision: unknown precision 'half'"),
        (("--precision", "float16"), "precision float16 needs a GPU, not cpu"),
        (("--milestones", "9,3"), "--milestones: [9, 3] are not rising numbers of epochs"),
        (("--milestones", "late"), "--milestones: expected epochs such as 60,120,160, got 'late'"),
        (("--lr", "0"), "--lr: 0.0 is not above 0"),
        (("--label-smoothing", "1"), "--label-smoothing: 1.0 is not in [0, 1)"),
        (("--epochs", "0"), "Invalid value for '--epochs'"),
        (("--device", "cuda:77"), "--device cuda:77 cannot be used"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(place: Path, train: Run, arguments: tuple[str, ...], message: str) -> None:
    (place / "file").write_text("")
    code, _, err = train(*SMALL, *arguments, "--plugin", str(TOY))
    assert code == 2, err
    assert message in err and len(err.splitlines()) == 1
    assert not list(place.rglob("*.safetensors"))


def test_a_training_that_diverges_says_so(place: Path, train: Run) -> None:
    code, _, err = train(*SMALL, "--lr", "1e30")
    assert code == 2 and "training of mini_vgg diverged at step" in err and len(err.splitlines()) == 1


def test_recipes_are_checked() -> None:
    with pytest.raises(BenchError, match="--batch-size: 0 is not 1 or more"):
        TargetRecipe("mini_wrn", batch_size=0)
