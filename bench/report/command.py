"""`python -m bench report`: options, where the lines come from, where the files go. Heavy imports wait for the call."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.errors import GridError, StoreError
from bench.files import save

if TYPE_CHECKING:
    from bench.grid import Grid
    from bench.plan import Plan
    from bench.store import Store

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
    from bench.report.page import Pictures, Source, render_page
    from bench.report.plots import make_plots
    from bench.store import check_store
    from bench.written import Written, plain

    versions: dict[str, str] = {}
    plugins = tuple(str(_from_root(p)) for p in plugin)
    stored: tuple[Plan, Store] | str
    if grid is not None or store != STORE:
        check_store(store)
    if grid is not None:
        from bench.report.pictures import versions_of

        plan, opened = _open(_options(grid, profile, seed, limit, plugin, store, without=without), store)
        lines = plain(cell_frame(plan, opened).drop(columns=list(VOLATILE)))
        if not (lines["n"] > 0).any():
            raise StoreError(f"store {store} holds no results of {grid}: run the grid first")
        versions = versions_of(plan, opened)
        stored = plan, opened
        named = _profile_option(profile, plan.grid)
        source = Source(
            _from_root(grid), plan.grid, named, limit, plugins, _store_option(store), tuple(without)
        )
        target = out_dir or folder or plan.folder()
    elif folder is not None:
        written = Written(folder)
        lines = written.lines
        source = Source(
            written.path, written.grid, None, written.limit, plugins, _store_option(store), written.without
        )
        target = out_dir or folder
        stored = written.behind(store, plugins) if pictures else ""
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
