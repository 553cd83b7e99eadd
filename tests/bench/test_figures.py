"""Figures: their numbers are those worked out by hand, they come out as files, and mistakes are one line."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from torch import nn

from bench.cli import main
from bench.errors import BenchError, GridError, StoreError
from bench.figures import FigureSpec
from bench.figures.bars import WIDEST, Bars, broken
from bench.figures.base import Source
from bench.figures.layers import blocks, relative
from bench.figures.noise import fit, reach, spacing
from bench.figures.output import figure_kinds
from bench.figures.tsne import TSNE, agreement, first_of_each, legend_of, signs_of
from bench.plan import Cell, Options, make_plan
from bench.store import Store
from tasks.classification.cifar_nets import VGG
from tasks.classification.model import LogitsClassifier
from tasks.heads import named_layer

PLUGINS = Path(__file__).resolve().parents[1] / "plugins"
CPU = torch.device("cpu")
SPREAD = {"kind": "layers", "series": {"bare": {"defense": "none"}, "dark": {"defense": "darken"}}}
FIGURES: list[dict[str, Any]] = [
    {"name": "curves", "kind": "curve", "x": "size", "y": ["fooling_rate", "feature_distance", "accuracy"],
     "panels": "defense", "distance": {"name": "cafa", "mode": "paper"}},
    {"name": "bars", "kind": "bars", "y": ["error_rate"], "title": "Errors"},
    {"name": "layers", **SPREAD, "where": {"attack": "bright-0.1"}},
    {"name": "noise", "kind": "noise", "where": {"attack": "bright-0.1"}},
    {"name": "tsne", "kind": "tsne", "where": {"attack": "bright-0.1", "defense": "darken"}, "points": 5},
    {"name": "pictures", "kind": "pictures", "where": {"attack": "bright-0.1"}, "images": [1, 0], "cam": True,
     "columns": ["truth", "clean", "attacked", "purified", "clean_purified", "noise", "left"]},
]  # fmt: skip
GRID: dict[str, Any] = {
    "name": "plain",
    "plugins": [str(PLUGINS / "figures.py")],
    "attacks": {
        "bright-0.02": {"name": "brighten", "size": 0.02},
        "bright-0.1": {"name": "brighten", "size": 0.1},
    },
    "evaluate": {"metrics": ["denoising_loss"]},
    "blocks": [
        {
            "roles": ["classification"],
            "defenses": ["none", "darken"],
            "attacks": ["bright-0.02", "bright-0.1"],
            "threats": ["oblivious"],
        }
    ],
    "tables": [{"name": "main", "metric": "accuracy"}],
    "figures": FIGURES,
}


def write(folder: Path, copies: int = 1, **changes: Any) -> Path:
    role = {"dataset": {"name": "plain_colours", "copies": copies}, "model": "plain_linear"}
    (folder / "profile.yaml").write_text(yaml.safe_dump({"name": "plain", "roles": {"classification": role}}))
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({**GRID, "profile": str(folder / "profile.yaml"), **changes}))
    return path


def bench(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a grid that has run, its store `s` and its output `o`."""
    folder = tmp_path_factory.mktemp("figures")
    bench("run", "-g", write(folder), "--store", folder / "s", "--out", folder / "o", "-q", "--device", "cpu")
    return folder


def numbers(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / "o" / f"{name}.csv")


def computed(folder: Path, **figure: Any) -> pd.DataFrame:
    """The numbers of a figure that the grid does not have."""
    plan = make_plan(Options(folder / "grid.yaml"))
    spec = FigureSpec.model_validate({"name": "other", **figure})
    plan = replace(plan, grid=plan.grid.model_copy(update={"figures": [spec]}))
    ((_, kind),) = figure_kinds(plan)
    return kind.compute(Source(plan, Store(folder / "s"), CPU))


def test_every_figure_comes_out_as_png_svg_and_csv(ran: Path) -> None:
    for spec in FIGURES:
        assert (ran / "o" / f"{spec['name']}.png").read_bytes().startswith(b"\x89PNG")
        svg = (ran / "o" / f"{spec['name']}.svg").read_text()
        assert "<svg" in svg and "profile plain" in svg and "oblivious" in svg
        assert len(numbers(ran, spec["name"])) > 0
    assert ">Errors<" in (ran / "o" / "bars.svg").read_text()


def test_the_same_again_whatever_the_batches(ran: Path, tmp_path: Path) -> None:
    chosen = ("curves", "noise")
    grid = ("-g", ran / "grid.yaml", "--store", ran / "s", "--device", "cpu")
    bench("figure", *chosen, *grid, "--out", tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{name}.{suffix}" for name in chosen for suffix in ("png", "svg", "csv")}
    for name in names:
        assert (tmp_path / name).read_bytes() == (ran / "o" / name).read_bytes(), name
    source = Source(make_plan(Options(ran / "grid.yaml", batch_size=3)), Store(ran / "s"), CPU)
    for spec, kind in figure_kinds(source.plan):
        lines = kind.compute(source).to_csv(index=False, lineterminator="\n")
        assert lines == (ran / "o" / f"{spec.name}.csv").read_text(), spec.name


def test_fooling_rate_and_feature_distance(ran: Path) -> None:
    lines = numbers(ran, "curves")
    assert set(lines["attack"]) == {"bright"} and set(lines["at"]) == {0.02, 0.1}
    bare = lines[(lines["defense"] == "none") & (lines["at"] == 0.1)].set_index("quantity")
    # Maps (r, 2g - b), weights (1, 0) of red and (0, 3) of green, 16 pixels; brighter by 0.1, the second image is
    # green, and the fourth, whose 2g - b is below 0, stays red.
    distances = [0.4, sqrt(16 * (0.5**2 + 0.75**2)), 1.2, 0.4]
    assert bare.loc["feature_distance", "value"] == pytest.approx(np.mean(distances), rel=1e-5)
    assert bare.loc["fooling_rate", "value"] == 0.25 and bare.loc["fooling_rate", "n"] == 4
    assert bare.loc["accuracy", "value"] == 0.75
    dark = lines[(lines["defense"] == "darken") & (lines["at"] == 0.1)].set_index("quantity")
    # Half of it is undone: the second image has logits (0.55, 0.6), and the clean one, darker, (0.45, 0.3).
    distances = [0.2, sqrt(16 * (0.5**2 + 0.6**2)), 0.6, 0.2]
    assert dark.loc["feature_distance", "value"] == pytest.approx(np.mean(distances), rel=1e-5)
    assert dark.loc["fooling_rate", "value"] == 0.25
    ssp: Any = {"name": "ssp", "mode": "paper"}
    bare = {"defense": "none"}
    maps = computed(ran, kind="curve", x="size", y=["feature_distance"], where=bare, distance=ssp)
    maps = maps.set_index("at")["value"]
    assert maps.to_dict() == pytest.approx({0.02: 0.02, 0.1: 0.1}, rel=1e-4)
    errors = numbers(ran, "bars").set_index(["attack", "defense"])["value"]
    assert errors["bright-0.1", "none"] == 0.25 and errors["clean", "none"] == 0


def test_bars_of_a_metric_taken_from_pixels(ran: Path) -> None:
    lines = computed(ran, kind="bars", y=["denoising_loss"]).set_index(["defense", "attack"])
    expected = {("none", "clean"): 0.0, ("none", "bright-0.02"): 0.02, ("none", "bright-0.1"): 0.1}
    # `darken` takes 0.05 away, more than the weak attack adds.
    expected |= {("darken", "clean"): 0.05, ("darken", "bright-0.02"): 0.03, ("darken", "bright-0.1"): 0.05}
    assert lines["value"].to_dict() == pytest.approx(expected, abs=1e-6)
    assert set(lines["n"]) == {4}


def test_layerwise_perturbation(ran: Path) -> None:
    lines = numbers(ran, "layers")
    assert list(dict.fromkeys(lines["layer"])) == ["pixels", "conv", "head.2"]
    found = lines.set_index(["series", "layer"])["value"]
    # In each channel of the maps r and 2g - b grow by what a pixel grows by.
    colours = [(0.9, 0.1, 0.1), (0.5, 0.2, 0.25), (0.1, 0.4, 0.1), (0.3, 0.3, 0.7)]
    for name, d in (("bare", 0.1), ("dark", 0.05)):
        pixels = np.mean([3 * d / (r + g + b) for r, g, b in colours])
        conv = np.mean([2 * d / (r + abs(2 * g - b)) for r, g, b in colours])
        top = np.mean([4 * d / (r + 3 * abs(2 * g - b)) for r, g, b in colours])
        assert found[name].to_dict() == pytest.approx(
            {"pixels": pixels, "conv": conv, "head.2": top}, rel=1e-4
        )
    euclid = np.mean([sqrt(0.1**2 + 0.3**2) / sqrt(r**2 + (6 * g - 3 * b) ** 2) for r, g, b in colours])
    lines = computed(ran, **SPREAD, where={"attack": "bright-0.1"}, norm=2, layers=["head.2"])
    found = lines.set_index(["series", "layer"])["value"]
    assert found["bare", "head.2"] == pytest.approx(euclid, rel=1e-4)


def test_relative_norms() -> None:
    clean, moved = torch.tensor([[3.0, -1.0], [0.0, 0.0]]), torch.tensor([[3.0, 1.0], [0.0, 0.0]])
    assert relative(moved, clean, 1).tolist() == [0.5, 0]
    assert relative(moved, clean, 2).tolist() == pytest.approx([2 / sqrt(10), 0])


def test_removed_noise(ran: Path) -> None:
    lines = numbers(ran, "noise").groupby("defense")
    slopes = lines["slope"].first()
    assert slopes.to_dict() == pytest.approx({"none": 0, "darken": 0.5}, abs=1e-5)
    assert set(lines["count"].sum()) == {4 * 3 * 16}
    slope, correlation = fit(np.array([1.0, 2, -1]), np.array([2.0, 4, -3]))
    assert slope == pytest.approx(13 / 6) and correlation == pytest.approx(
        np.corrcoef([1, 2, -1], [2, 4, -3])[0, 1]
    )


def test_a_fit_has_the_same_digits_with_any_number_of_threads() -> None:
    code = (
        "import numpy as np; from bench.figures.noise import fit; "
        "r = np.random.default_rng(0); x = r.normal(size=300_000); print(*fit(x, 0.5 * x + r.normal(size=300_000)))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": threads},
        ).stdout
        for threads in ("1", "2")
    }  # fmt: skip
    assert len(found) == 1


def test_neighbours_of_its_class() -> None:
    clean = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    kinds = torch.tensor([0, 0, 1, 1])
    # Of 4 things the 3 others are neighbours, one of which is of the class.
    assert agreement(clean, clean, kinds) == pytest.approx(1 / 3)
    many = torch.cat([torch.arange(8.0), 100 + torch.arange(8.0)])[:, None]
    halves = torch.tensor([0] * 8 + [1] * 8)
    assert agreement(many, many, halves) == 1
    assert agreement(many.flip(0), many, halves) == 0
    assert first_of_each(torch.tensor([1, 1, 0, 1, 0]), 2).tolist() == [0, 1, 2, 4]


def test_tsne_shows_the_same_things_in_every_panel(ran: Path) -> None:
    lines = numbers(ran, "tsne")
    assert list(dict.fromkeys(lines["set"])) == ["clean", "attacked", "attacked, purified", "clean, purified"]
    counts = lines.groupby("set")["class"].apply(list)
    assert all(classes == counts["clean"] for classes in counts) and len(counts["clean"]) == 4
    assert np.isfinite(lines[["x", "y"]]).all(axis=None)


def test_signs_of_classes_are_told_and_common_to_all_rows() -> None:
    scenes = [("pspnet", 0, "background"), ("pspnet", 2, "one"), ("pspnet", 1, "zero")]
    lines = pd.DataFrame([*scenes, ("ssd", 1, "one"), ("ssd", 0, "zero")], columns=["role", "class", "name"])
    assert signs_of(lines) == {"background": "A", "zero": "B", "one": "C"}
    assert legend_of(lines) == "A = background, B = zero, C = one"
    digits = pd.DataFrame({"role": "digits", "class": [1, 0], "name": ["1", "0"]})
    assert signs_of(digits) == {"0": "0", "1": "1"} and legend_of(digits) == ""
    many = pd.DataFrame({"role": "many", "class": range(100), "name": [f"n{k}" for k in range(100)]})
    assert signs_of(many) == {} and legend_of(many) == "signs: class numbers"


def test_the_figure_says_what_agreement_is(ran: Path) -> None:
    drawn = TSNE().draw(numbers(ran, "tsne"))
    assert "5 nearest clean points" in drawn.get_supxlabel()


def test_many_bars_go_into_several_panels() -> None:
    assert broken(["a", "b", "c"], [3, 3, 3], 6) == [["a", "b"], ["c"]]
    assert broken(["a", "b"], [9, 1], 6) == [["a"], ["b"]]
    made = [
        {"role": "r", "defense": d, "attack": a, "level_label": "oblivious", "quantity": "accuracy",
         "value": 0.5, "low": 0.4, "high": 0.6, "n": 9}
        for a in ("a", "b", "c", "d", "e", "f") for d in ("none", "p", "q", "s", "t", "u")
        if (a, d) != ("a", "u")
    ]  # fmt: skip
    figure = Bars(["accuracy"]).draw(pd.DataFrame(made))
    assert figure.get_figwidth() <= WIDEST and len(figure.axes) == 2
    shown = [[text.get_text() for text in axes.get_xticklabels()] for axes in figure.axes]
    assert shown == [["a", "b", "c", "d"], ["e", "f"]]
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    # One legend, also of what the first panel does not show.
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["none", "p", "q", "s", "t", "u"]
    few = pd.DataFrame([line for line in made if line["attack"] in "ab"])
    assert len(Bars(["accuracy"]).draw(few).axes) == 1


def test_pictures_say_what_the_target_says(ran: Path) -> None:
    lines = numbers(ran, "pictures")
    panels = [
        "ground truth",
        "clean",
        "attacked",
        "attacked, purified",
        "clean, purified",
        "noise x10",
        "noise left x10",
    ]
    maps = [f"class activation, {name}" for name in panels[1:5]]
    # Image by image in the order asked for, the cells of each together.
    rows = [(1, "none"), (1, "darken"), (0, "none"), (0, "darken")]
    assert list(dict.fromkeys(zip(lines["image"], lines["defense"], strict=True))) == rows
    assert all(list(part["panel"]) == panels + maps for _, part in lines.groupby(["image", "defense"]))
    found = lines.set_index(["image", "defense", "panel"])
    said, score = found["prediction"], found["score"]
    # The second image, logits (0.5, 0.45), is green when brighter by 0.1, (0.6, 0.75), and also by 0.05, (0.55, 0.6).
    assert said[1, "none", "ground truth"] == "red" and np.isnan(score[1, "none", "ground truth"])
    assert said[1, "none", "clean"].startswith("red") and score[1, "none", "clean"] == 1
    for defense in ("none", "darken"):
        assert said[1, defense, "attacked, purified"].startswith("green")
        assert score[1, defense, "attacked, purified"] == 0
    sure = torch.tensor([0.55, 0.6]).softmax(0)[1]
    assert said[1, "darken", "attacked, purified"] == f"green {sure:.0%}"
    assert said[1, "darken", "clean, purified"].startswith("red")
    assert found["noise"][1, "darken", "noise x10"] == pytest.approx(25.5, rel=1e-5)
    assert found["noise"][1, "darken", "noise left x10"] == pytest.approx(12.75, rel=1e-5)
    # Images of one colour have flat maps, which are not like any other.
    assert lines["cam_like_clean"].isna().all()
    (row, *_) = computed(ran, **FIGURES[-1]).attrs["strips"]
    clean, attacked, *_ = (panel.cam for panel in row.panels if panel.cam is not None)
    assert torch.allclose(clean, torch.full((4, 4), 0.5)) and torch.allclose(
        attacked, torch.full((4, 4), 0.75)
    )
    assert row.title == "none\nimage 1"


def test_pictures_are_of_the_first_images_that_the_target_gets_right(tmp_path: Path, ran: Path) -> None:
    lines = computed(ran, kind="pictures", where={"attack": "bright-0.1", "defense": "none"}, images=2)
    assert list(dict.fromkeys(lines["image"])) == ["0", "1"] and set(lines["n"]) == {2}
    assert list(dict.fromkeys(lines["panel"])) == ["clean", "attacked", "attacked, purified"]
    assert not {"noise", "cam_like_clean"} & set(lines)
    many = computed(ran, kind="pictures", where={"attack": "bright-0.1", "defense": "none"}, images=9)
    assert list(dict.fromkeys(many["image"])) == ["0", "1", "2", "3"]


def test_blocks_and_stages() -> None:
    model = LogitsClassifier(VGG((1, 2), (4, 6), 3), 3)
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert blocks(model, images) == ["features.0", "features.4", "features.7", "fc"]
    assert named_layer(model, images, "stage:1") == "features.2"
    assert named_layer(model, images, "stage:2") == "features.9"
    with pytest.raises(GridError, match=r"VGG has stages 1 to 3 \(features.2, features.9, features\)"):
        named_layer(model, images, "stage:4")


class _Lists(nn.Module):
    """A backbone that returns a list, which is taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        first = self.one(x)
        return [first, self.two(first)]


class _OnLists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)
        self.backbone, self.fc = _Lists(), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc(self.backbone(x)[-1].mean((2, 3)))
        return out


def test_blocks_of_a_backbone_that_returns_several_maps() -> None:
    model = LogitsClassifier(_OnLists(), 2)
    assert blocks(model, torch.rand(1, 3, 4, 4)) == ["backbone.one", "backbone.two", "fc"]


PICTURES: dict[str, Any] = {"kind": "pictures", "x": ..., "y": ..., "panels": ..., "distance": ...}
BAD = [
    ({"kind": "curv"}, "figures[0]: unknown figure kind 'curv': did you mean 'curve'?"),
    ({"name": "bars"}, "two tables or figures are called 'bars'"),
    ({"name": "main"}, "two tables or figures are called 'main'"),
    ({"where": {"attack": "bright0.1"}}, "where.attack: unknown attack 'bright0.1': did you mean 'bright-0.1'?"),
    ({"where": {"defence": "none"}}, "figures[0]: where: unknown column 'defence': did you mean 'defense'?"),
    ({"where": {"attack": "clean"}}, "figures[0]: where: every cell is clean, expected attacked ones"),
    ({"y": ["acuracy"], "distance": None}, "quantity of task classification 'acuracy': did you mean 'accuracy'?"),
    ({"x": "sizes"}, "x: attack 'bright-0.02': unknown parameter 'sizes': did you mean 'size'?"),
    ({"panels": None}, "are one point: choose with `where` among defense, or name it in `curves` or `panels`"),
    ({"curves": "defense"}, "curves and panels are both 'defense'"),
    ({"distance": None}, "`distance` belongs to the quantity 'feature_distance', and that needs it"),
    ({"distance": "pgd"}, "distance: attack 'pgd' does not ascend a distance of features; cafa and ssp do"),
    ({"distance": "caffa"}, "distance: unknown attack 'caffa': did you mean 'cafa'?"),
    ({"colour": "red"}, "figure kind 'curve': unknown parameter 'colour'"),
    ({"kind": 3}, "figures[0].kind: expected a string"),
    ({**SPREAD, "x": None}, "unknown parameter"),
    ({**PICTURES, "images": [4]}, "figures[0]: image 4: cell 'classification / none / bright-0.02 / oblivious' has"),
    ({**PICTURES, "images": 0}, "figure kind 'pictures', images"),
    ({**PICTURES, "columns": ["clean", "purfied"]}, "figure kind 'pictures', columns.1"),
    ({**PICTURES, "columns": ["noise"], "cam": True}, "cam: expected a column that is predicted, such as clean"),
    ({**PICTURES, "where": {"attack": "clean"}}, "figures[0]: where: every cell is clean, expected attacked ones"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_mistakes_are_one_line_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    figures = copy.deepcopy(FIGURES)
    figures[0] = {key: value for key, value in {**figures[0], **change}.items() if value is not ...}
    with pytest.raises(SystemExit, match="2"):
        bench("run", "-g", write(tmp_path, figures=figures), "--store", tmp_path / "s", "-q")
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and "grid.yaml" in err
    assert not (tmp_path / "s").exists()


def test_bins_as_wide_as_the_steps() -> None:
    counts = np.array([5, 90, 5])
    assert spacing(np.array([-3, 8, 16]), counts) == 8 and spacing(np.array([-3, 2, 5]), counts) == 2
    assert reach(np.array([-30, 2, 5]), np.array([1, 98, 1])) == 5


def test_class_activation_maps_are_of_classifiers(tmp_path: Path) -> None:
    block = {"roles": ["pspnet"], "defenses": ["none"], "attacks": ["bright-0.1"], "threats": ["oblivious"]}
    figure = {"name": "f", "kind": "pictures", "cam": True}
    path = write(tmp_path, blocks=[block], figures=[figure], profile="mini", tables=[])
    with pytest.raises(
        GridError, match=r"figures\[0\]: cam: cell 'pspnet / .*' is of task segmentation, expected cells"
    ):
        figure_kinds(make_plan(Options(path)))


def test_mistakes_in_series(tmp_path: Path) -> None:
    for series, message in (
        ({"a": {"defense": "drken"}}, r"series\.a\.defense: unknown defense 'drken': did you mean 'darken'"),
        ({"a": {}}, r"series\.a: expected one cell, got '.*' and '.*'"),
        ({}, "series: expected at least one"),
    ):
        figure = {"name": "f", "kind": "layers", "series": series}
        plan = make_plan(Options(write(tmp_path, figures=[figure])))
        with pytest.raises(BenchError, match=message):
            figure_kinds(plan)


def test_mistakes_of_the_command(ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = ("figure", "--grid", ran / "grid.yaml", "--out", tmp_path / "o", "--store")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ((*grid, ran / "s", "noisy"), "unknown figure 'noisy': did you mean 'noise'?"),
        ((*grid, tmp_path / "empty", "noise"), "figure 'noise': cell 'classification / none / bright-0.1 / "
         "oblivious', image 0 has not been attacked yet: run the grid first"),
        ((*grid, tmp_path / "empty", "bars"), "is pending: not run yet: run the grid first"),
        (("figure", "-g", write(tmp_path, figures=[]), "--store", ran / "s"), "no figures (key `figures`)"),
    ):  # fmt: skip
        with pytest.raises(SystemExit, match="2"):
            bench(*arguments)
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_a_layer_that_does_not_exist_is_named(ran: Path) -> None:
    with pytest.raises(GridError, match=r"unknown layer of Linear 'head2': did you mean 'head.2'"):
        computed(ran, **SPREAD, where={"attack": "bright-0.1"}, layers=["head2"])


def test_cells_without_meaning_are_left_out(
    ran: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def reason(store: Store, cell: Cell) -> str | None:
        return "too small" if cell.defense_label == "darken" else None

    monkeypatch.setattr("bench.figures.base.not_applicable", reason)
    lines = computed(ran, kind="bars", y=["accuracy"], where={"attack": "bright-0.1"})
    assert list(lines["defense"]) == ["none"]
    assert "not drawn: classification / darken / bright-0.1 / oblivious: too small" in caplog.text
    with pytest.raises(StoreError, match="has no images: too small"):
        computed(ran, kind="noise", where={"defense": "darken"})
