"""Results read back from their folders: committed tables and comparisons come out of committed rows alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.grid import GRIDS
from bench.tables import render
from bench.written import Written, grid_order
from tests.bench.test_run import GRID

RESULTS = GRIDS.parent / "results"
FOLDERS = sorted(path.parent for path in RESULTS.rglob("results.csv"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.relative_to(RESULTS).as_posix())
def test_committed_tables_come_out_of_committed_rows(folder: Path) -> None:
    written = Written(folder)
    _, grid = written.shipped()
    assert grid.tables or grid.figures
    for spec in grid.tables:
        text = render(written.lines, spec, "markdown", grid_order(written.lines))
        assert text.strip() == (folder / f"{spec.name}.md").read_text(encoding="utf-8").strip()


@pytest.mark.parametrize(
    "page", sorted(RESULTS.glob("papers/*/compare.md")), ids=lambda page: page.parent.name
)
def test_committed_comparisons_come_out_of_committed_rows(page: Path, bench: Any) -> None:
    code, out, err = bench("table", str(page.parent), "--compare", "paper")
    assert (code, err) == (0, "")
    assert out.replace("\r", "") == page.read_text(encoding="utf-8")


def test_what_was_left_out_is_known_from_the_rows(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that commands made from them leave it out, too."""
    for folder in FOLDERS:
        assert Written(folder).without == (), folder
    monkeypatch.setattr("bench.grid.GRIDS", tmp_path / "grids")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grids").mkdir()
    blocks = [
        {"roles": ["classification"], "defenses": ["jpeg", ["jpeg", "random"], "none"], "attacks": ["fgsm", "pgd"],
         "threats": ["oblivious"]},
        {"roles": ["classification"], "defenses": ["random"], "attacks": ["noise"], "threats": ["oblivious"],
         "profiles": ["paper"]},
    ]  # fmt: skip
    (tmp_path / "grids" / "toy.yaml").write_text(yaml.safe_dump({**GRID, "blocks": blocks}))
    options = ("--grid", "grids/toy.yaml", "--limit", "3", "--without", "pgd", "--without", "defense:none")
    code, _, err = bench("run", *options, "-q")
    assert (code, err) == (0, "")
    folder = Path("results/toy-limit3-without_pgd-without_defense_none")
    written = Written(folder)
    assert written.without == ("defense:none", "attack:pgd") and written.limit == 3
    plan, _ = written.behind(Path(".bench"))
    assert {c.key[:16] for c in plan.cells} == set(written.lines["cell"]) - {""}
    assert bench("report", str(folder))[0] == 0
    assert "--without defense:none --without attack:pgd" in (folder / "report.html").read_text()


def test_rows_that_are_cut_off_are_one_line(bench: Any, tmp_path: Path) -> None:
    rows = (RESULTS / "table1" / "results.csv").read_text(encoding="utf-8").splitlines()
    (tmp_path / "results.csv").write_text("\n".join([*rows[:3], ",".join(rows[3].split(",")[:5])]) + "\n")
    code, out, err = bench("table", str(tmp_path))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "results.csv: not a table of results: row 4, seed: expected a number, found ''" in err
    text = (RESULTS / "table1" / "results.csv").read_text(encoding="utf-8")[:3000]
    (tmp_path / "results.csv").write_text(text, encoding="utf-8")
    for command in ("table", "claims", "audit", "report"):
        code, out, err = bench(command, str(tmp_path))
        assert (code, out, err.count("\n")) == (2, "", 1) and "it is cut off in its last line" in err, command


def test_the_command_takes_a_folder_or_a_grid(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    block = {
        "roles": ["classification"], "defenses": ["jpeg"], "attacks": ["fgsm"], "threats": ["oblivious"],
    }  # fmt: skip
    Path("toy.yaml").write_text(yaml.safe_dump({**GRID, "blocks": [block]}))
    assert bench("run", "--grid", "toy.yaml", "--out", "out", "-q", "--limit", "4")[0] == 0
    folder = str(RESULTS / "table1")
    code, out, _ = bench("table", folder, "--name", "classification")
    assert code == 0 and out.strip() == (RESULTS / "table1" / "classification.md").read_text().strip()
    for arguments, said in (
        ((), "give either results/NAME or --grid FILE"),
        ((folder, "--grid", "toy.yaml"), "give either results/NAME or --grid FILE"),
        ((folder, "--seed", "1"), "go with a grid file"),
        ((folder, "--name", "clasification"), "did you mean 'classification'"),
        ((str(RESULTS / "tabel1"),), "did you mean"),
        (("out",), "its grid is not below grids/: unknown grid 'toy'"),
        ((folder, "--compare", "paper"), "no table says which printed one it repeats"),
    ):
        code, out, err = bench("table", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1) and said in err, err
