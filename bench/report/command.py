"""`python -m bench report`: options, where the lines come from, where the files go. Heavy imports wait for the call."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.errors import GridError, StoreError, unknown
from bench.files import save

if TYPE_CHECKING:
    import pandas as pd

    from bench.grid import Grid
    from bench.plan import Plan
    from bench.report.page import Source
    from bench.store import Store

LOG = logging.getLogger(__name__)
PAGE = "report.html"
PLOTS = "plots"
STORE = Path(".bench")


def report_command(
    folder: Annotated[
        Path | None,
        typer.Argument(
            help="Folder with results.csv, such as results/table1; with --grid, where to write.",
            show_default=False,
        ),
    ] = None,
    grid: Annotated[
        Path | None,
        typer.Option("--grid", "-g", help="Grid whose stored rows to report, with versions."),
    ] = None,
    store: Annotated[
        Path,
        typer.Option(
            "--store", envvar="BENCH_STORE", help="Folder of cached results and adversarial images."
        ),
    ] = STORE,
    profile: Annotated[str | None, typer.Option(help="Profile that binds roles to data and weights.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed, instead of the grid's.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most N images per role.")] = None,
    pictures: Annotated[int, typer.Option(min=0, help="At most N cells with a picture; 0 = none.")] = 60,
    max_mb: Annotated[
        float, typer.Option("--max-mb", min=0, help="Size of the page, in MB, that pictures may fill.")
    ] = 10,
    image: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Position of the pictured image in its dataset; default: the first one right when clean.",
        ),
    ] = None,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Folder to write to; default: the one with the results.")
    ] = None,
    without: Annotated[
        list[str], typer.Option("--without", help="With --grid: what was left out of the run, as there.")
    ] = [],  # noqa: B006
    plugin: Annotated[list[Path], typer.Option("--plugin", help="Python file that registers plug-ins.")] = [],  # noqa: B006
) -> None:
    """Write results as one HTML page that needs nothing else, and its plots as PNG and SVG; runs nothing."""
    from bench.cli import _open, _options
    from bench.frame import VOLATILE, cell_frame
    from bench.grid import results_folder
    from bench.report.page import Pictures, Source, render_page
    from bench.report.plots import make_plots
    from bench.store import check_store

    versions: dict[str, str] = {}
    plugins = tuple(str(_from_root(p)) for p in plugin)
    stored: tuple[Plan, Store] | str
    if grid is not None or store != STORE:
        check_store(store)
    if grid is not None:
        from bench.report.pictures import versions_of

        plan, opened = _open(_options(grid, profile, seed, limit, plugin, store, without=without), store)
        lines = _plain(cell_frame(plan, opened).drop(columns=list(VOLATILE)))
        if not (lines["n"] > 0).any():
            raise StoreError(f"store {store} holds no results of {grid}: run the grid first")
        versions = versions_of(plan, opened)
        stored = plan, opened
        named = _profile_option(profile, plan.grid)
        source = Source(
            _from_root(grid), plan.grid, named, limit, plugins, _store_option(store), tuple(without)
        )
        target = out_dir or folder or results_folder(grid, plan.grid)
    elif folder is not None:
        lines = read_results(folder)
        path, found = _grid_of(str(lines["grid"].iloc[0]))
        source = Source(path, found, None, _limit(lines, found), plugins, _store_option(store))
        target = out_dir or folder
        stored = _stored(source, lines, store) if pictures else ""
    else:
        raise GridError("give a folder of results, such as results/table1, or --grid FILE")

    plots = make_plots(lines)
    why = stored if isinstance(stored, str) else ""
    shown = Pictures(missing=why if pictures else "--pictures 0 asked for none")
    page = render_page(lines, source, plots, shown, versions)
    if pictures and not isinstance(stored, str):
        from bench.report.pictures import examples_of

        room = int(max_mb * 1e6) - len(page.encode())
        shown = examples_of(*stored, lines, pictures, image, room)
        page = render_page(lines, source, plots, shown, versions)
    for plot in plots:
        save(target / PLOTS / f"{plot.name}.svg", plot.svg.encode())
        save(target / PLOTS / f"{plot.name}.png", plot.png)
    save(target / PAGE, page.encode())
    typer.echo(
        f"wrote {target / PAGE} ({len(page.encode()) / 1000:,.0f} kB) and {len(plots)} plots", err=True
    )


def _stored(source: Source, lines: pd.DataFrame, store: Path) -> tuple[Plan, Store] | str:
    """The plan behind written lines and the store of its images, or why they are not to be had."""
    from bench.cli import _open, _options
    from bench.errors import BenchError
    from bench.grid import GRIDS, load_profile

    if source.path is None or source.grid is None:
        return "the grid of these results is not among the shipped ones"
    if not store.is_dir():
        return f"there is no store {store}"
    seeds = sorted(set(map(int, lines["seed"])))
    profile: str | None = str(lines["profile"].iloc[0])
    try:
        if load_profile(source.grid.profile)[0].name == profile:
            profile = None  # the grid's own, which may be a path
        path, seed = GRIDS.parent / source.path, seeds[0] if len(seeds) == 1 else None
        return _open(
            _options(path, profile, seed, source.limit, list(map(Path, source.plugins)), store), store
        )
    except BenchError as error:
        return str(error)


def _from_root(path: Path) -> Path:
    """A path given here, as a command in the project's folder takes it."""
    from bench.grid import GRIDS

    return path if Path.cwd() == GRIDS.parent.resolve() else path.resolve()


def _store_option(store: Path) -> Path | None:
    """What `--store` takes there to be this store; None = it is the default one, or none at all."""
    from bench.grid import GRIDS

    default = store.resolve() == (GRIDS.parent / STORE).resolve()
    return None if default or not store.is_dir() else _from_root(store)


def _profile_option(given: str | None, grid: Grid) -> str:
    """What `--profile` takes there to be this profile; "" = nothing: the grid's own is a file that it names."""
    name = grid.profile if given is None else given
    if Path(name).suffix not in (".yaml", ".yml"):
        return name
    return "" if given is None else str(_from_root(Path(given)))


def read_results(folder: Path) -> pd.DataFrame:
    """The lines in `folder`/results.csv.

    Raises:
        StoreError: no such folder or file, or no lines in it.
    """
    from bench.report.page import STATUS
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


def _folders_near(folder: Path) -> list[str]:
    """Folders with results inside `folder` and beside it; where there are none, those of results/."""
    for place in (folder, folder.parent, Path("results")):
        found = [
            p.parent.as_posix() for p in (*place.glob("*/results.csv"), *place.glob("papers/*/results.csv"))
        ]
        if found:
            return found
    return []


def _plain(frame: pd.DataFrame) -> pd.DataFrame:
    """Without ordered categories: as a file of results is read."""
    return frame.astype(dict.fromkeys(frame.select_dtypes("category"), object))


def _grid_of(name: str) -> tuple[Path | None, Grid | None]:
    """The shipped grid file of this name; (None, None) when there is none."""
    from bench.errors import BenchError
    from bench.grid import GRIDS, load_grid, read_yaml

    for path in sorted(GRIDS.rglob("*.yaml")):
        if "profiles" in path.relative_to(GRIDS).parts:
            continue
        try:
            if read_yaml(path).get("name") == name:
                return path.relative_to(GRIDS.parent), load_grid(path)
        except BenchError as error:
            LOG.warning("grid file skipped: %s", error)
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
