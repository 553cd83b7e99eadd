"""The documentation says what is so: its plug-ins run, its YAML is valid, its commands, links and recipes exist."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import typer
import yaml
from pydantic import TypeAdapter

from bench.claims import FIELD
from bench.cli import app, main
from bench.grid import Grid, Profile, Threat, load_profile, parse
from bench.paper import PAPERS, table_ids
from bench.registry import (
    ATTACKS,
    DATASETS,
    DEFENSES,
    ENTRY_POINT_GROUP,
    FIGURES,
    METRICS,
    MODELS,
    TASKS,
    load_plugin,
)
from defenses.networks.build import PURIFIERS
from defenses.training.objectives import OBJECTIVES
from defenses.training.recipe import CRITICS, RECIPES, Recipe
from tasks.classification.task import Classification
from tasks.detection.task import Detection
from tasks.segmentation.task import Segmentation

ROOT = Path(__file__).resolve().parents[1]
PLUGINS = ROOT / "tests" / "plugins"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
GUIDE = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def files(language: str) -> dict[str, str]:
    """Blocks of the guide by the file name in their first line."""
    found = {}
    for block in blocks(GUIDE, language):
        name = re.match(r"# ([a-z_]+\.(?:py|yaml))\n", block)
        assert name is not None, f"a block without a file name: {block[:60]}"
        found[name[1]] = block
    return found


MODULES = files("python")
YAML = files("yaml")
#: What pages name beside plug-ins and options: values of options, and letters of the papers.
VALUES = {"paper", "ragan", "unit", "imagenet", "symmetric", "logits", "features", "relu3_3", "at", "w"}
MODEL_LOSSES = (Classification, Detection, Segmentation)
TOY_BUDGET = {"eps": "32/255", "alpha": "8/255"}
GRIDS = sorted(name for name, text in YAML.items() if "blocks" in yaml.safe_load(text))


@pytest.fixture
def guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the guide's files, on toy data where they name the embedded one; what they register is removed."""
    load_plugin(PLUGINS / "toy.py")
    for registry in (DEFENSES, ATTACKS, DATASETS, MODELS, METRICS, TASKS, FIGURES):
        registry.discover()
        monkeypatch.setattr(registry, "_module_dict", dict(registry._module_dict))
    tables: tuple[dict[str, Any], ...] = (PURIFIERS, OBJECTIVES, RECIPES)
    before = [dict(table) for table in tables]
    for name, text in MODULES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    for name, text in YAML.items():
        (tmp_path / name).write_text(yaml.safe_dump(on_toy_data(yaml.safe_load(text))), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)
    for name in [
        n for n, m in sys.modules.items() if str(getattr(m, "__file__", "")).startswith(str(tmp_path))
    ]:
        del sys.modules[name]


def on_toy_data(data: dict[str, Any]) -> dict[str, Any]:
    """A grid or profile of the guide, on the toy data in place of the embedded, whose classes lie further apart."""
    if data.get("profile") == "mini":
        data["profile"] = str(PLUGINS / "toy_profile.yaml")
        for attack in data["attacks"].values():
            attack |= {key: value for key, value in TOY_BUDGET.items() if key in attack}
    if "plugins" in data:
        data["plugins"] = [*data["plugins"], str(PLUGINS / "toy.py")]
    if data.get("roles", {}).get("classification", {}).get("model") == "mini_resnet":
        data["roles"] = yaml.safe_load((PLUGINS / "toy_profile.yaml").read_text())["roles"]
        data["training"]["classification"] |= {"dataset": {}, "images": 12}
    return data


def bench(*arguments: str) -> int:
    """The exit code of a command."""
    try:
        main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


# -- the guide's plug-ins --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [n for n in GRIDS if n != "smoother.yaml"])
def test_the_guides_plugins_run(guide: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    grid = yaml.safe_load((guide / name).read_text())
    frame = evaluated(guide, name, capsys)
    finished = frame[frame["status"] == "ok"]
    own = name.removesuffix(".yaml")
    levels = {t if isinstance(t, str) else t["level"] for t in grid["blocks"][0]["threats"]}
    assert levels <= set(finished["level"]) | {"bpda", "white_box"}
    skipped = frame[(frame["status"] == "skip") & (frame["attack"] != "worst case")]
    assert all("not differentiable" in reason for reason in skipped["reason"])
    assert set(frame["status"]) <= {"ok", "skip"}
    if own in DEFENSES.names():
        assert own in set(finished["defense"])
    if own in ATTACKS.names():
        bare = finished[(finished["metric"] == "accuracy") & (finished["defense"] == "none")]
        left = {attack: float(part["value"].max()) for attack, part in bare.groupby("attack", observed=True)}
        assert left[own] < 0.5 * left["noise"] <= left["clean"]
    if own in METRICS.names():
        assert own in set(finished["metric"])
    if own in TASKS.names():
        assert set(finished["task"]) == {own} and set(finished["metric"]) == set(TASKS.resolve(own).metrics)
        error = finished[finished["defense"] == "none"].groupby("attack", observed=True)["value"].max()
        assert error["clean"] < error["pgd"] and 5 * error["noise"] < error["pgd"] <= 9 / 255
    if own in FIGURES.names():
        assert {path.name for path in (guide / "out").glob(f"{own}.*")} == {
            f"{own}.{x}" for x in ("png", "svg", "csv")
        }


def test_the_guides_learned_defense_trains_and_runs(guide: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for block in blocks(GUIDE, "sh") for line in block.splitlines() if " train " in line]
    assert len(lines) == 2
    for line in lines:
        arguments = shlex.split(line)[3:]
        code = bench(*arguments, "--plugin", str(PLUGINS / "toy.py"), "--store", "store", "--device", "cpu")
        assert code == 0, capsys.readouterr().err
    made = sorted(path.name for path in (guide / "store" / "checkpoints").glob("*.safetensors"))
    assert made == [
        "smoother-small-classification.safetensors",
        "smoother_pixels-small-classification.safetensors",
    ]
    frame = evaluated(guide, "smoother.yaml", capsys)
    assert set(frame["status"]) == {"ok"} and {"smoother", "pixels"} <= set(frame["defense"])


def test_the_readmes_plugins_run(guide: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = blocks((ROOT / "README.md").read_text(encoding="utf-8"), "python")
    before = [set(registry.names()) for registry in (DEFENSES, ATTACKS, TASKS)]
    for number, block in enumerate(code):
        (guide / f"readme_{number}.py").write_text(block, encoding="utf-8")
        load_plugin(guide / f"readme_{number}.py")
    added = [
        set(registry.names()) - old for registry, old in zip((DEFENSES, ATTACKS, TASKS), before, strict=True)
    ]
    (defense,), (attack,), (task,) = added
    row = TASKS.create(task).rows(0.25, 0.5)
    assert row == {"score": 0.75, "error": 0.25}
    grid = {
        "name": "readme",
        "profile": str(PLUGINS / "toy_profile.yaml"),
        "plugins": [*(f"readme_{number}.py" for number in range(len(code))), str(PLUGINS / "toy.py")],
        "attacks": {attack: {"name": attack, "eps": "32/255"}, "noise": {"name": "noise", "eps": "32/255"}},
        "blocks": [
            {
                "roles": ["classification"],
                "defenses": ["none", defense],
                "attacks": [attack, "noise"],
                "threats": ["oblivious", "white_box"],
            }
        ],
    }
    (guide / "readme.yaml").write_text(yaml.safe_dump(grid), encoding="utf-8")
    frame = evaluated(guide, "readme.yaml", capsys)
    assert set(frame["status"]) == {"ok"} and defense in set(frame["defense"])
    bare = frame[(frame["defense"] == "none") & (frame["metric"] == "accuracy")]
    left = {name: float(part["value"].max()) for name, part in bare.groupby("attack", observed=True)}
    assert left[attack] < 0.5 * left["noise"]


def evaluated(guide: Path, name: str, capsys: pytest.CaptureFixture[str]) -> pd.DataFrame:
    """The frame of a grid of the guide, run in this process."""
    options = ("--store", "store", "--out", "out", "--workers", "1", "--device", "cpu", "--quiet")
    code = bench("run", "--grid", name, *options)
    assert code == 0, capsys.readouterr().err
    target = guide / "frame.parquet"
    assert bench("table", "--grid", name, "--store", "store", "-f", "parquet", "-o", str(target)) == 0
    return pd.read_parquet(target)


def test_every_block_of_the_guide_is_used() -> None:
    assert {name.removesuffix(".py") for name in MODULES} == {name.removesuffix(".yaml") for name in GRIDS}
    assert f'[project.entry-points."{ENTRY_POINT_GROUP}"]' in blocks(GUIDE, "toml")[0]
    assert "smoother.yaml" in GRIDS


# -- every page ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_yaml_is_valid(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8"), "yaml"):
        data = yaml.safe_load(block)
        if "blocks" in data:
            parse(Grid, data, page.name)
        elif "roles" in data:
            parse(Profile, data, page.name)
        elif "threats" in data:
            TypeAdapter(list[Threat]).validate_python(data["threats"])
        else:
            pytest.fail(f"{page.name}: neither a grid, a profile nor threats: {block[:60]}")


def commands(text: str) -> list[str]:
    """`python -m bench COMMAND` of blocks and of inline code, without comments; not where an ellipsis cuts it short."""
    lines = [
        line for language in ("sh", "") for block in blocks(text, language) for line in block.splitlines()
    ]
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    found = [line.partition(" # ")[0].strip() for line in lines if line.startswith("python -m bench ")]
    return [line for line in found if "…" not in line]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_exist(page: Path) -> None:
    learned = set(re.findall(r'RECIPES\["(\w+)"\]', GUIDE))
    for line in commands(page.read_text(encoding="utf-8")):
        chosen = parsed(shlex.split(line)[3:])
        name, values = chosen.info_name, chosen.params
        given = values.get("grid") or ()
        for grid in (given,) if isinstance(given, Path) else given:
            assert (ROOT / grid).is_file() or str(grid) in YAML or str(grid) == "GRID", line
        if name == "train":
            recipe = values["recipe"] or values["defense"]
            assert recipe in learned or RECIPES[recipe].defense == values["defense"], line
            profile = yaml.safe_load(YAML[values["profile"]]) if values["profile"] in YAML else None
            roles = profile["roles"] if profile else load_profile(values["profile"])[0].roles
            assert values["role"] in roles, line
        if chosen.parent is not None and chosen.parent.info_name == "paper" and name == "show":
            assert values["name"] in table_ids(), line
        assert set(values.get("paper") or ()) <= {*PAPERS, FIELD}, line


def parsed(arguments: list[str]) -> Any:
    """The context of the command that `arguments` choose, its options parsed and nothing run.

    Raises:
        click.UsageError: there is no such command or option.
    """
    command: Any = typer.main.get_command(app)
    context = command.make_context("bench", list(arguments))
    while hasattr(command, "commands"):
        rest = (
            [*context._protected_args, *context.args] if hasattr(context, "_protected_args") else context.args
        )
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    return context


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (page.parent / link).exists(), link


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "papers").glob("*.md")), ids=lambda page: page.stem)
def test_a_papers_page_names_its_recipes_and_tables(page: Path) -> None:
    paper, text = page.stem, page.read_text(encoding="utf-8")
    assert paper in PAPERS
    for name, recipe in RECIPES.items():
        if recipe.defense == paper:
            assert f"`{name}`" in text, name
    tables = {int(number) for number in re.findall(r"\btable(\d+)\b", text)}
    for first, last in re.findall(r"\btable(\d+) to table(\d+)\b", text):
        tables |= set(range(int(first), int(last) + 1))
    printed = {int(id.partition("/table")[2]) for id in table_ids() if id.startswith(f"{paper}/")}
    assert printed == tables


def options() -> set[str]:
    """Names that a parameter may have: of recipes, objectives, discriminators, networks, defenses and attacks."""
    found = {field.name for field in dataclasses.fields(Recipe)}
    for table in (OBJECTIVES, PURIFIERS, CRITICS):
        found |= {name for cls in table.values() for name in inspect.signature(cls).parameters}
    for registry in (DEFENSES, ATTACKS):
        found |= {parameter.name for name in registry for parameter in registry.parameters(name)}
    return found


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "papers").glob("*.md")), ids=lambda page: page.stem)
def test_a_papers_page_uses_names_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    known = options() | set(RECIPES) | set(PURIFIERS) | set(CRITICS)
    for registry in (DEFENSES, ATTACKS, METRICS, MODELS):
        known |= set(registry)
    known |= {"oblivious", "transfer", "gray_box", "bpda", "white_box", "surrogate", "sources", "eot"}
    values = {kind for cls in MODEL_LOSSES for kind in cls.losses} | VALUES
    for code in re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)):
        if re.fullmatch(r"\w+", code):
            assert code in known | values, code
        elif option := re.fullmatch(r"(\w+): .*", code):
            assert option[1] in known, code
        elif "/" in code and " " not in code:
            assert (ROOT / code).exists(), code
