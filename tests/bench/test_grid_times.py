"""The benchmark that times grids: what it says of one that runs, of one that does not, and of other files."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from bench.grid import GRIDS
from benchmarks.grid_times import main, same
from tests.bench.test_run import GRID


def test_a_grid_from_an_empty_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    block = {
        "roles": ["classification"], "defenses": ["jpeg"], "attacks": ["fgsm"], "threats": ["oblivious"],
    }  # fmt: skip
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump({**GRID, "blocks": [block]}))
    untrained = GRIDS / "papers" / "alignment_table12.yaml"
    main([str(tmp_path / "toy.yaml"), str(untrained), "--markdown", str(tmp_path / "times.md")])
    ran, not_ran = capsys.readouterr().out.splitlines()
    name, seconds, cells, differs = ran.split("  ")
    # Clean and attacked images, as floats and in 8 bits; nothing is committed for it.
    assert (name, cells) == ("toy", "4") and float(seconds) > 0 and "results.csv" in differs
    assert "exit code 2" in not_ran and "--train-missing" in not_ran
    assert len((tmp_path / "times.md").read_text().splitlines()) == 4


def test_files_are_the_same_to_the_last_byte(tmp_path: Path) -> None:
    for name, text in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).write_text(text)
    a, b, c = (tmp_path / name for name in "abc")
    assert same(a, b) and not same(a, c) and not same(a, tmp_path / "d")
