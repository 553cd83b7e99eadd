"""The shipped checkpoints are what today's recipes, data and targets would make, fit their defenses and stay small."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench.cli import main
from bench.errors import MissingCheckpoint
from bench.grid import GRIDS, load_grid
from bench.plan import Options, make_plan
from bench.progress import duration
from bench.registry import DEFENSES
from bench.rng import ImageRNG
from bench.weights import read_meta
from defenses._learned import SHIPPED
from defenses.training.session import plan_training
from tasks.classification.datasets import FashionMnist
from tests.tasks.classification.fashion import write_fashion

FILES = sorted(SHIPPED.glob("*.safetensors"))
MEGABYTES = 25


@pytest.fixture(autouse=True, scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Images of noise that pass for those of Fashion-MNIST, which are not shipped: all else of a key is checked."""
    root = tmp_path_factory.mktemp("data")
    write_fashion(root, train=2000, test=1000)
    metas = (read_meta(path) for path in FILES)
    (train,) = {m["payload"]["data"]["fingerprint"] for m in metas if m["profile"] == "fashion"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENCH_DATA", str(root))
        patch.setattr(FashionMnist, "fingerprint", lambda self: train if self.split == "train" else "test")
        yield


def needs(profile: str, request: pytest.FixtureRequest) -> None:
    """Skip where the packages of a profile are not installed."""
    if profile == "imagenet20":
        request.getfixturevalue("imagenet20")


def test_there_are_some_and_they_are_small() -> None:
    assert FILES
    embedded = [path for path in FILES if read_meta(path)["profile"] == "mini"]
    assert sum(path.stat().st_size for path in embedded) <= MEGABYTES * 1_000_000


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_is_what_its_recipe_makes(path: Path, request: pytest.FixtureRequest) -> None:
    meta = read_meta(path)
    needs(meta["profile"], request)
    training = plan_training(meta["profile"], meta["role"], meta["recipe"], meta["seed"])
    assert path.stem == training.name and meta["rebuild"] == training.command
    assert meta["key"] == training.key, (
        f"{path.name} is stale: {training.command} --out {SHIPPED} --overwrite"
    )
    defense = DEFENSES.create(training.recipe.defense, {"weights": str(path)}).eval()
    # A generator makes images of the size it was trained for.
    size = meta["network"]["args"].get("size", (32, 32))
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = defense.purify(images, ImageRNG([0, 1]) if defense.stochastic else None).images
    assert out.shape == images.shape and not torch.equal(out, images)
    # Recorded on images it was not trained on; an attack that does no harm would make every score look good.
    scores = meta["scores"]
    metric = next(
        name.removesuffix("_attacked_defended") for name in scores if name.endswith("_attacked_defended")
    )
    assert scores[f"{metric}_attacked"] < 0.5 * scores[f"{metric}_clean"]
    assert meta["seconds"] > 0 and meta["losses"]


@pytest.mark.parametrize("grid", sorted(GRIDS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_grids_find_everything(grid: Path, request: pytest.FixtureRequest) -> None:
    needs(load_grid(grid).profile, request)
    try:
        make_plan(Options(grid))
    except MissingCheckpoint as error:
        pytest.fail(f"{grid.name} lacks {', '.join(sorted(training.name for training in error.trainings))}")


def test_the_list_adds_up(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The list ends with what training all of them took."""
    main(["list", "checkpoints", "--store", str(tmp_path)])
    files = list(SHIPPED.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files) / 1e6
    seconds = sum(read_meta(path)["seconds"] for path in files)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == f"{len(files)} shipped: {size:.1f} MB, {duration(seconds)} of training"
