"""Results that were written to a folder, such as results/table1, read back: their rows and the grid they are of."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import BenchError, GridError, StoreError, unknown

if TYPE_CHECKING:
    import pandas as pd

    from bench.grid import Grid
    from bench.plan import Plan
    from bench.store import Store

__all__ = ["STATUS", "Written", "check_alone", "grid_order", "plain", "read_results"]

logger = logging.getLogger(__name__)

STATUS = {"ok": "", "partial": "partly run", "skip": "skipped", "error": "failed", "pending": "not run"}
"""What the status of a line says where it is not all well."""


class Written:
    """A folder of results.

    Args:
        folder: with the `results.csv` that `run` wrote.

    Attributes:
        folder: as given.
        lines: of `bench.frame.cell_frame`, without ordered categories and what differs from run to run.
        path: the shipped grid file they are of, below the project's folder; None = none has that name.
        grid: what it says.
        limit: the `--limit` that gives the images of `lines`; None = the grid's own numbers do.
        without: what `--without` took out of the run.

    Raises:
        StoreError: no such folder or file, or no lines in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = read_results(folder)
        self.path, self.grid = _grid_named(str(self.lines["grid"].iloc[0]))
        self.limit = _limit(self.lines, self.grid)
        self.without = _without(self.lines, self.grid)

    def shipped(self) -> tuple[Path, Grid]:
        """The shipped grid, where it stands and what it says.

        Raises:
            GridError: no shipped grid has that name.
        """
        if self.path is None or self.grid is None:
            name = str(self.lines["grid"].iloc[0])
            raise GridError(
                f"{self.folder}: its grid is not below grids/: {unknown('grid', name, _shipped())}"
            )
        return self.path, self.grid

    def behind(self, store: Path, plugins: tuple[str, ...] = ()) -> tuple[Plan, Store] | str:
        """The plan that makes these lines and the store of its rows, or why they are not to be had."""
        from bench.cli import _open, _options
        from bench.grid import GRIDS, load_profile

        if self.path is None or self.grid is None:
            return "the grid of these results is not among the shipped ones"
        if not store.is_dir():
            return f"there is no store {store}"
        seeds = sorted(set(map(int, self.lines["seed"])))
        profile: str | None = str(self.lines["profile"].iloc[0])
        try:
            if load_profile(self.grid.profile)[0].name == profile:
                profile = None  # the grid's own, which may be a path
            path, seed = GRIDS.parent / self.path, seeds[0] if len(seeds) == 1 else None
            options = _options(
                path, profile, seed, self.limit, list(map(Path, plugins)), store, without=self.without
            )
            return _open(options, store)
        except BenchError as error:
            return str(error)


def read_results(folder: Path) -> pd.DataFrame:
    """The lines in `folder`/results.csv.

    Raises:
        StoreError: no such folder or file, or no lines in it.
    """
    from bench.tables import LEVELS, read_long

    path = folder / "results.csv"
    if not path.is_file():
        found = unknown("folder of results", folder.as_posix(), _folders_near(folder))
        why = f"{folder} has no results.csv: " if folder.is_dir() else f"{folder} is a file: "
        raise StoreError((why if folder.exists() else "") + found)
    lines = read_long(path)
    if not len(lines):
        raise StoreError(f"{path} has no lines")
    for column, known in (("level", LEVELS), ("status", STATUS)):
        for value in set(lines[column]) - set(known):
            raise StoreError(f"{path}: {unknown(column, value, known)}")
    return lines


def grid_order(lines: pd.DataFrame) -> dict[str, list[str]]:
    """For `bench.tables.build`: labels in the order in which the lines of a grid first have them."""
    columns = ("role", "defense", "attack", "level_label", "image_format")
    return {column: list(dict.fromkeys(lines[column])) for column in columns}


def check_alone(
    folder: Path, profile: str | None, seed: int | None, limit: int | None, without: Sequence[str]
) -> None:
    """Written results are as they are.

    Raises:
        GridError: an option asks for others.
    """
    if profile is not None or seed is not None or limit is not None or without:
        raise GridError(f"{folder}: --profile, --seed, --limit and --without go with a grid file")


def plain(frame: pd.DataFrame) -> pd.DataFrame:
    """Without ordered categories: as a file of results is read."""
    return frame.astype(dict.fromkeys(frame.select_dtypes("category"), object))


def _folders_near(folder: Path) -> list[str]:
    """Folders with results inside `folder` and beside it; where there are none, those of results/."""
    for place in (folder, folder.parent, Path("results")):
        found = [
            p.parent.as_posix() for p in (*place.glob("*/results.csv"), *place.glob("papers/*/results.csv"))
        ]
        if found:
            return found
    return []


def _shipped() -> dict[str, Path]:
    """Names of the shipped grids -> their files, below the project's folder."""
    from bench.grid import GRIDS, read_yaml

    found = {}
    for path in sorted(GRIDS.rglob("*.yaml")):
        if "profiles" not in path.relative_to(GRIDS).parts:
            try:
                found[str(read_yaml(path).get("name", ""))] = path.relative_to(GRIDS.parent)
            except BenchError as error:
                logger.warning("grid file skipped: %s", error)
    return found


def _grid_named(name: str) -> tuple[Path | None, Grid | None]:
    """The shipped grid file of this name; (None, None) when there is none."""
    from bench.grid import GRIDS, load_grid

    path = _shipped().get(name)
    if path is None:
        return None, None
    try:
        return path, load_grid(GRIDS.parent / path)
    except BenchError as error:
        logger.warning("grid file skipped: %s", error)
        return None, None


def _limit(lines: pd.DataFrame, grid: Grid | None) -> int | None:
    """The --limit that gives the images of `lines`, None when the grid's own numbers do.

    The largest number of images of any role is such a limit: the other roles have no more, for reasons of their own.
    """
    largest = int(lines["n_total"].max())
    if grid is None:
        return largest
    for _, line in lines.drop_duplicates("role").iterrows():
        asked = grid.images.get(str(line["role"]), grid.images.get(str(line["task"])))
        if asked is None or int(line["n_total"]) < asked:
            return largest
    return None


def _without(lines: pd.DataFrame, grid: Grid | None) -> tuple[str, ...]:
    """The labels that blocks of the grid have and no line has."""
    from bench.plan import was_left_out

    if grid is None:
        return ()
    there = {column: set(lines[column]) for column in ("role", "defense", "attack")}
    return was_left_out(grid, str(lines["profile"].iloc[0]), there)
