"""Grids from an empty store: how long each takes, and whether it writes what is committed.

    python -m benchmarks.grid_times --markdown times.md        # those of grids/papers
    python -m benchmarks.grid_times grids/table1.yaml

Each grid runs by `python -m bench run` in a process of its own with a store of its own, workers as by default.
`seconds` is wall-clock time, start included; `cells` is what ran, skipped ones left out; `differs` names the tables and
rows (.md, .csv) of its folder of results that are not the committed ones to the last byte, or says why nothing ran.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from bench.grid import GRIDS, load_grid, results_folder
from bench.written import read_results

HEADS = ("grid", "seconds", "cells", "differs")


def measure(grid: Path) -> tuple[str, str, str, str]:
    """One line of the table: a grid run from nothing."""
    committed = GRIDS.parent / results_folder(grid, load_grid(grid))
    with tempfile.TemporaryDirectory() as place:
        store, out = Path(place) / "store", Path(place) / "out"
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "bench", "run", "--grid", str(grid), "--store", str(store), "--out", str(out), "-q"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return grid.stem, "", "", f"exit code {done.returncode}: {last}"
        lines = read_results(out)
        ran = lines[(lines["cell"] != "") & (lines["status"] == "ok")]["cell"].nunique()
        written = sorted(path for path in out.iterdir() if path.suffix in (".md", ".csv"))
        differs = [path.name for path in written if not same(path, committed / path.name)]
    return grid.stem, f"{seconds:.0f}", str(ran), ", ".join(differs) or "–"


def same(path: Path, other: Path) -> bool:
    """Both files are there and hold the same bytes."""
    return other.is_file() and path.read_bytes() == other.read_bytes()


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, line by line as grids finish."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grids", nargs="*", type=Path, help="grid files; default: those of grids/papers")
    parser.add_argument("--markdown", type=Path, help="file to write the table to, too")
    given = parser.parse_args(arguments)
    rows = []
    for grid in given.grids or sorted((GRIDS / "papers").glob("*.yaml")):
        rows.append(measure(grid))
        print("  ".join(rows[-1]), flush=True)
    table = tabulate(
        rows,
        headers=HEADS,
        tablefmt="pipe",
        disable_numparse=True,
        colalign=("left", "right", "right", "left"),
    )
    if given.markdown is not None:
        given.markdown.write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
