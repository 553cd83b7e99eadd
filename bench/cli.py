"""The command line: `python -m bench COMMAND`.

A user's mistake is one line on stderr and exit code 2, also when it shows only in some cells (the others still run). A
bug is exit code 1, its traceback in the store's failures.log. Ctrl-C is exit code 130 and says how to go on.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)  # fmt: skip
from rich.table import Table

from bench.claims import claims_command
from bench.errors import BenchError, GridError, MissingCheckpoint, NotApplicable, StoreError, unknown
from bench.files import check_folder, save, write_text
from bench.paper import paper_app
from bench.report import report_command

if TYPE_CHECKING:
    from bench.plan import Cell, Options, Plan
    from bench.store import Store
    from defenses.training.session import Training

app = typer.Typer(
    help="Benchmark input-purification defenses against adversarial attacks, across tasks.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
)  # fmt: skip
zoo_app = typer.Typer(
    help="The embedded target models: list them, rebuild their weights.", no_args_is_help=True
)
app.add_typer(zoo_app, name="zoo")
app.add_typer(paper_app, name="paper")
app.command("claims")(claims_command)
app.command("report")(report_command)
# Into a file or pipe, tables are as wide as their content.
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 1000)
err = Console(stderr=True, highlight=False, soft_wrap=True)

GridOption = Annotated[Path, typer.Option("--grid", "-g", help="Grid file (YAML).")]
StoreOption = Annotated[
    Path,
    typer.Option("--store", envvar="BENCH_STORE", help="Folder of cached results and adversarial images."),
]
ProfileOption = Annotated[str | None, typer.Option(help="Profile that binds roles to data and weights.")]
SeedOption = Annotated[int | None, typer.Option(min=0, help="Seed, instead of the grid's.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="At most N images per role.")]
WithoutOption = Annotated[
    list[str],
    typer.Option(
        "--without", help="Role, defense or attack to leave out: LABEL, or defense:LABEL; may be repeated."
    ),
]
PluginOption = Annotated[list[Path], typer.Option("--plugin", help="Python file that registers plug-ins.")]
AuditImagesOption = Annotated[
    int, typer.Option("--audit-images", min=0, help="Images of the extra cells; 0 = 100, 24 or 20 by task.")
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="Folder for tables and figures; default results/GRID, where the shipped ones are, and results/GRID-limit8 "
        "and the like for runs that are not as the grid says.",
    ),
]
DEFAULT_STORE = Path(".bench")
CHECKPOINTS = "checkpoints"
Format = Literal["markdown", "csv", "latex", "html", "parquet"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: turns user errors into one line and exit code 2."""
    root = logging.getLogger()
    root.setLevel(os.environ.get("BENCH_LOG", "WARNING").upper())
    if not any(isinstance(handler, _LogLines) for handler in root.handlers):
        root.addHandler(_LogLines())
    interrupted = "interrupted; everything finished is kept: the same command goes on from here"
    try:
        code = app(args=arguments, standalone_mode=False)
    except BenchError as error:
        fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        fail(interrupted, 130)
    except BrokenPipeError:
        # The reader (head, less) is gone; silence the flush at exit too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        # A wrong option or argument; which click raises it depends on typer's version.
        if hasattr(error, "format_message"):
            # Without a command: the usage is on the screen by now, and there is nothing to add.
            fail(error.format_message(), 2) if error.format_message() else sys.exit(2)
        raise
    if code == 130:
        fail(interrupted, 130)
    if isinstance(code, int) and code != 0:
        sys.exit(code)


class _LogLines(logging.Handler):
    """Log records as lines on stderr, above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        err.print(f"bench: {escape(record.getMessage())}")


def fail(message: str, code: int) -> None:
    """Print one line and exit."""
    err.print(f"bench: {escape(message)}", markup=True)
    sys.exit(code)


def _options(
    grid: Path, profile: str | None, seed: int | None, limit: int | None, plugin: Sequence[Path], store: Path,
    batch_size: int | None = None, without: Sequence[str] = (),
) -> Options:  # fmt: skip
    from bench.plan import Options

    return Options(
        grid, profile, seed, limit, batch_size, tuple(str(p) for p in plugin), (str(store / CHECKPOINTS),),
        tuple(without),
    )  # fmt: skip


def _open(
    options: Options, store: Path, absent: bool = False, instead: Callable[[Plan], str] | None = None
) -> tuple[Plan, Store]:
    """The plan and its store, which only what `absent` says may be missing (`instead`: what can be read then)."""
    from bench.plan import make_plan
    from bench.store import Store, check_store

    plan = make_plan(options)
    check_store(store, absent, instead(plan) if instead is not None else "")
    return plan, Store(store)


# -- run ------------------------------------------------------------------------------------------------------------
@app.command()
def run(
    grid: GridOption,
    profile: ProfileOption = None,
    seed: SeedOption = None,
    limit: LimitOption = None,
    without: WithoutOption = [],  # noqa: B006
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:0,cuda:1 …; default: every GPU, else the CPU.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes per device; default: 1 per GPU, or the CPU's cores, at most 8."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images per batch; never changes results.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--overwrite", help="Reuse stored results, or recompute.")
    ] = True,
    train_missing: Annotated[
        bool,
        typer.Option("--train-missing", help="First train the learned defenses that have no checkpoint."),
    ] = False,
    store: StoreOption = DEFAULT_STORE,
    out_dir: OutOption = None,
    plugin: PluginOption = [],  # noqa: B006
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no tables; only files.")] = False,
    audit: Annotated[
        bool, typer.Option("--audit", help="Also run the extra cells of the costly checks, and report.")
    ] = False,
    audit_images: AuditImagesOption = 0,
) -> None:
    """Run what a grid lacks, then write and print its tables."""
    from bench.frame import cell_frame
    from bench.progress import Display
    from bench.runner import environment, overwrite, pending, run_plan
    from bench.tables import complete, notes

    if audit:
        from bench.audit import judged
    options = _options(grid, profile, seed, limit, plugin, store, batch_size, without)
    devices = _devices(device)
    if train_missing:
        _train_missing(options, store, devices[0])
    plan, opened = _open(options, store, absent=True)
    _check_tables(plan)
    folder = out_dir or plan.folder()
    check_folder(folder, "--out")
    kept = f"{folder} keeps its complete results" if complete(folder) else ""
    if not resume:
        overwrite(plan, opened)
    jobs, cached = pending(plan, opened)
    skipped = sum(cell.skip is not None for cell in plan.cells)
    environment()
    with Display(
        err, jobs, {c.key: c.label for c in plan.cells}, plan, quiet, store / "failures.log", kept
    ) as display:
        display.say(
            f"{plan.grid.name} on profile {plan.profile}: {len(plan.cells)} cells, {cached} cached, {skipped} skipped, "
            f"{sum(j.kind == 'craft' for j in jobs)} crafts and {sum(j.kind == 'cell' for j in jobs)} cells to run"
        )
        workers = workers or _default_workers(devices, sum(job.cost for job in jobs))
        pool = len(devices) * workers > 1
        run_plan(
            plan,
            opened,
            display,
            "processes" if pool else "inprocess",
            workers=workers,
            devices=devices,
            jobs=jobs,
        )
    failed = bool(display.errors)
    frame = cell_frame(plan, opened, display.errors)
    if not (failed and kept):
        _write(plan, frame, folder)
    if audit:
        # The tables are there by now, whatever becomes of the extra cells; what these find marks the rows.
        _run_extras(plan, opened, store, devices, workers, audit_images, quiet)
        frame = cell_frame(plan, opened, display.errors)
        if not (failed and kept):
            _write(plan, frame, folder)
    if not quiet:
        _print_tables(plan, frame)
        # Why cells failed is on the screen already, and below the tables.
        for line in notes(frame.assign(reason=frame["reason"].where(frame["status"] != "error", ""))):
            out.print(escape(line))
        if not (failed and kept):
            err.print(f"wrote {escape(str(folder))}")
        if plan.grid.figures and failed:
            err.print("figures are not drawn: some of their cells may have failed")
    if plan.grid.figures and not failed:
        _draw(plan, opened, folder, devices[0], None, quiet)
    if audit:
        for line in judged(plan, opened, audit_images)[0]:
            out.print(escape(line))
    if failed:
        raise typer.Exit(1 if display.bugs else 2)


def _run_extras(
    plan: Plan, opened: Store, store: Path, devices: tuple[str, ...], workers: int, images: int, quiet: bool
) -> None:
    """Run the extra cells of the costly checks."""
    from bench.audit import extended, extras, note_audited
    from bench.progress import Display
    from bench.runner import cell_record, pending, run_plan

    whole = extended(plan, images)
    known = {cell.key for cell in plan.cells} | set(plan.crafts())
    # What a hard check stopped has nothing to be compared with.
    wanted: set[str] = set()
    for extra in extras(plan, images):
        if not cell_record(opened, extra.parent).missing(extra.parent.target.ids):
            wanted |= {extra.cell.key} | ({extra.cell.craft.key} if extra.cell.craft is not None else set())
    jobs = [job for job in pending(whole, opened)[0] if job.key in wanted - known]
    labels = {c.key: c.label for c in whole.cells}
    with Display(err, jobs, labels, whole, quiet, store / "failures.log") as display:
        display.say(f"audit: {len(jobs)} extra crafts and cells to run")
        pool = len(devices) * workers > 1
        run_plan(
            whole, opened, display, "processes" if pool else "inprocess",
            workers=workers, devices=devices, jobs=jobs, audit=images,
        )  # fmt: skip
    note_audited(plan, opened, images)


@app.command("audit")
def audit_command(
    what: Annotated[
        Path | None,
        typer.Argument(metavar="[RESULTS|GRID]", help="results/NAME of a shipped grid, or a grid file."),
    ] = None,
    grid: Annotated[Path | None, typer.Option("--grid", "-g", help="Grid file (YAML).")] = None,
    costly: Annotated[
        bool, typer.Option("--costly", help="First run the extra cells of the costly checks.")
    ] = False,
    images: AuditImagesOption = 0,
    profile: ProfileOption = None,
    seed: SeedOption = None,
    limit: LimitOption = None,
    without: WithoutOption = [],  # noqa: B006
    device: Annotated[str | None, typer.Option(help="cpu, cuda …; default: every GPU, else the CPU.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes per device.")] = 1,
    store: StoreOption = DEFAULT_STORE,
    plugin: PluginOption = [],  # noqa: B006
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Say which results are suspect, why, and what to run next.

    Those of results/NAME are judged from their stored rows; where the store lacks any, they are shown as marked.
    Exit code 0: every cell has run and is sound; 1: some are suspect, stopped or not run.
    """
    from bench.audit import audit_written, judged
    from bench.written import Written, check_alone

    if (what is None) == (grid is None):
        raise GridError("give either results/NAME or a grid file")
    if what is not None and what.suffix not in (".yaml", ".yml"):
        check_alone(what, profile, seed, limit, without)
        written = Written(what)
        behind = written.behind(store, tuple(map(str, plugin)))
        if costly:
            if isinstance(behind, str):
                raise StoreError(f"--costly: {behind}")
            _run_extras(*behind, store, _devices(device), workers, images, quiet)
        lines, sound = audit_written(written, behind, images)
    else:
        path = grid if what is None else what
        assert path is not None
        plan, opened = _open(_options(path, profile, seed, limit, plugin, store, without=without), store)
        if costly:
            _run_extras(plan, opened, store, _devices(device), workers, images, quiet)
        lines, sound = judged(plan, opened, images)
    for line in lines:
        out.print(escape(line))
    if not sound:
        raise typer.Exit(1)


def _devices(device: str | None) -> tuple[str, ...]:
    import torch

    if device is None:
        count = torch.cuda.device_count()
        return tuple(f"cuda:{i}" for i in range(count)) or ("cpu",)
    chosen = tuple(part.strip() for part in device.split(",") if part.strip())
    for name in chosen:
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:
            known = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
            reason = str(error).splitlines()[0]
            raise GridError(
                f"--device {name} cannot be used ({reason}); available: {', '.join(known)}"
            ) from None
    if not chosen:
        raise GridError("--device: expected a device such as cpu or cuda:0")
    return chosen


def _default_workers(devices: Sequence[str], seconds: float) -> int:
    from bench.executors.processes import cores

    # Starting a worker costs seconds of imports; short work does not repay it.
    return min(cores(), 8) if tuple(devices) == ("cpu",) and seconds > 30 else 1


def _check_tables(plan: Plan) -> None:
    """Build every table on cells that have not run: a table or figure that cannot be made must not cost a run first."""
    from bench.frame import cell_frame
    from bench.tables import build

    frame = cell_frame(plan, None)
    for index, spec in enumerate(plan.grid.tables):
        try:
            build(frame, spec)
        except GridError as error:
            raise GridError(f"{plan.options.grid}, tables[{index}]: {error}") from None
    if plan.grid.figures:
        from bench.figures.output import check_figures

        check_figures(plan)


def _write(plan: Plan, frame: Any, folder: Path) -> None:
    """Write the tables of a frame."""
    from bench.errors import StoreError
    from bench.frame import VOLATILE
    from bench.tables import write_tables

    try:
        write_tables(
            frame.drop(columns=list(VOLATILE)),
            plan.grid.tables,
            folder,
            title=plan.grid.title or plan.grid.name,
            remark=_remark(plan),
        )
    except OSError as error:
        raise StoreError(f"tables cannot be written to {folder}: {error.strerror or error}") from None


def _remark(plan: Plan) -> str:
    """What the tables do not show of how they came about."""
    gone = ", ".join(plan.options.without)
    return (
        f"Left out (`--without`): {gone}. Worst cases and `adaptive` are over what is left." if gone else ""
    )


def _print_tables(plan: Plan, frame: Any) -> None:
    from bench.tables import markdown

    if plan.options.without:
        out.print(escape(_remark(plan)), markup=True)
        out.print()

    for spec in plan.grid.tables:
        out.print(escape(markdown(frame, spec)), markup=True)
        out.print()


# -- training -------------------------------------------------------------------------------------------------------
@app.command()
def train(
    defense: Annotated[str, typer.Option(help="A learned defense of `list defenses`.")],
    task: Annotated[str | None, typer.Option(help="Train for the profile's first role of this task.")] = None,
    role: Annotated[str | None, typer.Option(help="Train for this role of the profile.")] = None,
    profile: Annotated[str, typer.Option(help="Profile that binds roles to data and weights.")] = "mini",
    recipe: Annotated[str | None, typer.Option(help="Recipe; default: the defense's own.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of initial weights, order and attacks.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda:N; default: the first GPU, else the CPU.")
    ] = None,
    precision: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    store: StoreOption = DEFAULT_STORE,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Folder for the checkpoint; default: STORE/checkpoints.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Train again what is there already.")
    ] = False,
    plugin: PluginOption = [],  # noqa: B006
) -> None:
    """Train a learned defense; the same command goes on where an interrupted one stopped."""
    from bench.registry import DEFENSES, load_plugin
    from defenses.training.session import Precision, plan_training

    for file in plugin:
        load_plugin(file, "--plugin")
    name = _trainable(defense, recipe)
    if precision not in get_args(Precision):
        raise GridError(f"--precision: {unknown('precision', precision, get_args(Precision))}")
    try:
        training = plan_training(profile, _role(profile, role, task), name, seed)
    except NotApplicable as error:
        raise GridError(error.reason) from None
    if training.recipe.defense != defense:
        DEFENSES.resolve(defense)
        raise GridError(
            f"--recipe: '{name}' is a recipe of defense '{training.recipe.defense}', not of '{defense}'"
        )
    folder = out_dir or store / CHECKPOINTS
    check_folder(store, "--store")
    check_folder(folder, "--out" if out_dir else "--store")
    path, _ = training.find([folder])
    if path is not None and not overwrite:
        out.print(f"{training.name} is there already: {path}")
        return
    _train(training, store, folder, _devices(device)[0], precision)


@app.command("train-target")
def train_target_command(
    arch: Annotated[
        str, typer.Option(help="wrn-DEPTH-WIDTH, vgg-DEPTH, resnet-DEPTH or a network of the zoo (mini_wrn).")
    ],
    dataset: Annotated[
        str, typer.Option(help="As in a profile: '{name: cifar10, root: /data}'; its split `train` is meant.")
    ],
    out_file: Annotated[Path, typer.Option("--out", help="Checkpoint to write (safetensors).")],
    epochs: Annotated[int, typer.Option(min=1, help="Times that each image is shown.")] = 200,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step.")] = 128,
    lr: Annotated[float, typer.Option(help="Learning rate of SGD with Nesterov momentum 0.9.")] = 0.1,
    weight_decay: Annotated[float, typer.Option(min=0, help="Of all weights.")] = 5e-4,
    schedule: Annotated[str, typer.Option(help="cosine or multistep.")] = "cosine",
    milestones: Annotated[
        str, typer.Option(help="Epochs after which multistep multiplies the learning rate.")
    ] = "60,120,160",
    gamma: Annotated[float, typer.Option(min=0, help="By how much multistep multiplies it.")] = 0.2,
    padding: Annotated[
        int, typer.Option(min=0, help="Black pixels around an image that crops are taken from.")
    ] = 4,
    flip: Annotated[
        bool | None, typer.Option("--flip/--no-flip", help="Mirror half of the images; default: not digits.")
    ] = None,
    normalise: Annotated[
        bool, typer.Option("--normalise/--no-normalise", help="Centre and scale pixels inside the model.")
    ] = True,
    label_smoothing: Annotated[float, typer.Option(help="Probability that the other classes share.")] = 0.0,
    adversarial: Annotated[
        str,
        typer.Option(
            help="none, pgd, trades, free (which shows each batch eight times) or doa (a square of 7x7 pixels, tried "
            "at every place)."
        ),
    ] = "none",
    init: Annotated[
        Path | None,
        typer.Option(help="Checkpoint to start from, of the same network and classes; default: new weights."),
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="Resize images to this many pixels a side inside the model.")
    ] = None,
    test: Annotated[
        str | None, typer.Option(help="Dataset for the scores; default: the test or val split, else a tenth.")
    ] = None,
    score_images: Annotated[int, typer.Option(min=1, help="At most N images for the scores.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of initial weights, order, crops, flips, attacks.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda:N; default: the first GPU, else the CPU.")
    ] = None,
    precision: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Train again what is there already.")
    ] = False,
    store: StoreOption = DEFAULT_STORE,
    plugin: PluginOption = [],  # noqa: B006
) -> None:
    """Train a target classifier of the CIFAR kind; the same command goes on where an interrupted one stopped."""
    import torch

    from bench.progress import duration
    from bench.registry import load_plugin
    from tasks.classification import _training as training

    for file in plugin:
        load_plugin(file, "--plugin")
    training.check_out(out_file)
    check_folder(store, "--store")
    data, held_out = training.find_data(dataset, test)
    try:
        steps = tuple(int(part) for part in milestones.split(","))
    except ValueError:
        raise GridError(f"--milestones: expected epochs such as 60,120,160, got '{milestones}'") from None
    recipe = training.TargetRecipe(
        arch, epochs, batch_size, lr, weight_decay=weight_decay, schedule=schedule, milestones=steps,  # type: ignore[arg-type]
        gamma=gamma, padding=padding, flip=not training.shows_digits(data.classes) if flip is None else flip,
        normalise=normalise, label_smoothing=label_smoothing, adversarial=adversarial, size=size,  # type: ignore[arg-type]
        precision=precision, seed=seed,  # type: ignore[arg-type]
    )  # fmt: skip
    start = None if init is None else training.starting_point(init, recipe, len(data.classes))
    job = training.TargetTraining(recipe, data, held_out, dataset, test, score_images, start)
    if not overwrite and training.existing(out_file, job.key):
        out.print(escape(f"{out_file} is there already"))
        return
    own = store / "training" / job.key[:16]
    chosen = torch.device(_devices(device)[0])
    with _bars() as progress:
        facts = training.train_target(
            job, own, out_file, device=chosen, progress=_training(out_file.stem, progress)
        )
    scores = ", ".join(f"{name} {value:.3f}" for name, value in facts["scores"].items())
    out.print(escape(f"{out_file.stem}: {duration(facts['seconds'])}; {scores}"))
    err.print(escape(f"wrote {out_file} and {out_file.with_suffix('.json').name}; curves in {own}"))


def _trainable(defense: str, recipe: str | None) -> str:
    from bench.registry import DEFENSES
    from defenses.training.recipe import RECIPES

    cls = DEFENSES.resolve(defense, "--defense")
    known = {name for name, r in RECIPES.items() if r.defense == defense}
    if not known:
        trained = sorted({r.defense for r in RECIPES.values()})
        reason = cls.unavailable or "there is nothing to train"
        raise GridError(f"--defense: '{defense}': {reason}; trainable are {', '.join(trained)}")
    if recipe is not None and recipe not in RECIPES:
        raise GridError(f"--recipe: {unknown(f'recipe of {defense}', recipe, known)}")
    return recipe or defense


def _role(profile: str, role: str | None, task: str | None) -> str:
    """The role that is meant by either option."""
    from bench.grid import load_profile, split_spec
    from bench.registry import MODELS

    bound, source = load_profile(profile)
    if (role is None) == (task is None):
        raise GridError("give either --role or --task")
    if role is not None:
        if role not in bound.roles:
            raise GridError(f"{source}, --role: {unknown('role', role, bound.roles)}")
        return role
    tasks: dict[str, str] = {}
    for name, binding in bound.roles.items():
        model, params, _ = split_spec(binding.model, f"{source}, roles.{name}.model")
        tasks.setdefault(MODELS.create(model, params, f"{source}, roles.{name}.model").task, name)
    if task not in tasks:
        raise GridError(f"{source}, --task: {unknown('task', str(task), tasks)}")
    return tasks[str(task)]


def _train(training: Training, store: Path, folder: Path, device: str, precision: str = "float32") -> None:
    import torch

    from bench.progress import duration
    from defenses.training.session import train as run_training

    own = store / "training" / training.key[:16]
    with _bars() as progress:
        meta = run_training(
            training, own, folder, device=torch.device(device), precision=precision,  # type: ignore[arg-type]
            progress=_training(training.name, progress),
        )  # fmt: skip
    scores = ", ".join(f"{name} {value:.3f}" for name, value in meta.get("scores", {}).items())
    out.print(escape(f"{training.name}: {duration(meta['seconds'])}; {scores or 'not scored'}"))
    err.print(escape(f"wrote {folder / training.name}.safetensors; curves in {own}"))


def _train_missing(options: Options, store: Path, device: str) -> None:
    """Train what the grid lacks, after telling how long it will take."""
    import torch

    from bench.plan import make_plan
    from bench.progress import duration

    try:
        make_plan(options)
        return
    except MissingCheckpoint as error:
        trainings = {training.key: training for training in error.trainings}
    total = 0.0
    for training in trainings.values():
        seconds = training.estimate(torch.device(device))
        total += seconds
        err.print(escape(f"to train: {training.name}, about {duration(seconds)}"))
    err.print(escape(f"{len(trainings)} trainings, about {duration(total)} on {device}"))
    for training in trainings.values():
        _train(training, store, store / CHECKPOINTS, device)


# -- looking --------------------------------------------------------------------------------------------------------
@app.command("plan")
def plan_command(
    grid: GridOption,
    profile: ProfileOption = None,
    seed: SeedOption = None,
    limit: LimitOption = None,
    without: WithoutOption = [],  # noqa: B006
    store: StoreOption = DEFAULT_STORE,
    plugin: PluginOption = [],  # noqa: B006
) -> None:
    """Show a grid's cells, what is cached and the time the rest will take."""
    from bench.progress import duration
    from bench.runner import pending

    plan, opened = _open(
        _options(grid, profile, seed, limit, plugin, store, without=without), store, absent=True
    )
    _check_tables(plan)
    jobs, cached = pending(plan, opened)
    waiting = {job.key: job for job in jobs}
    table = Table("cell", "role", "defense", "attack", "level", "images", "state", box=None, pad_edge=False)
    for cell in plan.cells:
        state = f"skip: {cell.skip}" if cell.skip else ("to run" if cell.key in waiting else "cached")
        table.add_row(
            cell.key[:12], cell.target.role, cell.defense_label, cell.attack_label, cell.level_label,
            str(len(cell.target.ids)), escape(state),
        )  # fmt: skip
    out.print(table)
    skipped = sum(cell.skip is not None for cell in plan.cells)
    guessed = sum(not job.timed for job in jobs)
    guess = (
        f", {guessed} of {len(jobs)} jobs by a guess, since their like has not run in this store"
        if guessed
        else ""
    )
    out.print(
        f"{len(plan.cells)} cells: {cached} cached, {skipped} skipped, {sum(j.kind == 'cell' for j in jobs)} to run "
        f"with {sum(j.kind == 'craft' for j in jobs)} of {len(plan.crafts())} crafts; "
        f"about {duration(sum(job.cost for job in jobs))} on one device{guess}"
    )


@app.command()
def table(
    what: Annotated[
        Path | None,
        typer.Argument(metavar="[RESULTS]", help="Written results, results/NAME; needs no store."),
    ] = None,
    grid: Annotated[Path | None, typer.Option("--grid", "-g", help="Grid file (YAML).")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Only this table.")] = None,
    format: Annotated[
        str, typer.Option("--format", "-f", help="markdown, csv, latex, html or parquet.")
    ] = "markdown",
    compare: Annotated[
        str | None, typer.Option("--compare", help="`paper`: beside the numbers the paper prints.")
    ] = None,
    profile: ProfileOption = None,
    seed: SeedOption = None,
    limit: LimitOption = None,
    without: WithoutOption = [],  # noqa: B006
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; default: print.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    plugin: PluginOption = [],  # noqa: B006
) -> None:
    """Print a grid's tables from stored or written results, in another format if asked; runs nothing.

    `csv` is the pivot, `parquet` the whole long frame with parameters, weights, counts and seconds. `--compare paper`
    prints measured, paper's and difference for every cell; on other data than the paper's, order and sign.
    """
    from bench.frame import cell_frame
    from bench.tables import FORMATS, parquet, render
    from bench.written import Written, check_alone, grid_order

    if format not in FORMATS:
        raise GridError(f"--format: {unknown('format', format, FORMATS)}")
    if format == "parquet" and output is None:
        raise GridError("--format parquet needs --output FILE")
    if (what is None) == (grid is None):
        raise GridError("give either results/NAME or --grid FILE")
    if what is not None:
        check_alone(what, profile, seed, limit, without)
        written = Written(what)
        path, named = written.shipped()
        frame, specs, orders, left_out = written.lines, named.tables, grid_order(written.lines), None
    else:
        assert grid is not None
        options = _options(grid, profile, seed, limit, plugin, store, without=without)
        plan, opened = _open(options, store, instead=_comparison if compare == "paper" else None)
        _check_tables(plan)
        frame, specs, orders, left_out = cell_frame(plan, opened), plan.grid.tables, None, plan.left_out
        path = grid
    if name is not None:
        known = [spec.name for spec in specs]
        specs = [spec for spec in specs if spec.name == name]
        if not specs:
            raise GridError(f"--name: {unknown('table', name, known)}")
    if compare is not None:
        write_text(_compared(path, frame, specs, left_out, compare, format), output)
        return
    if format == "parquet":
        assert output is not None
        save(output, parquet(frame))
        return
    write_text("\n\n".join(render(frame, spec, format, orders) for spec in specs) + "\n", output)


def _comparison(plan: Plan) -> str:
    """The command that compares the results shipped for a grid with the paper, and "" where there are none."""
    from bench.grid import GRIDS, results_folder

    folder = results_folder(plan.options.grid, plan.grid)
    shipped = (GRIDS.parent / folder / "compare.md").is_file()
    return f"`python -m bench table {folder.as_posix()} --compare paper`" if shipped else ""


def _compared(
    path: Path, frame: Any, specs: Sequence[Any], left_out: Any, with_what: str, format: str
) -> str:
    from bench.paper import compare, comparison_markdown
    from bench.tables import selected

    if with_what != "paper":
        raise GridError(f"--compare: {unknown('reference', with_what, ['paper'])}")
    if format not in ("markdown", "csv"):
        raise GridError(f"--compare prints markdown or csv, not {format}")
    chosen = [spec for spec in specs if spec.paper is not None]
    if not chosen:
        raise GridError(f"{path}: no table says which printed one it repeats (key `paper`)")
    parts = []
    for spec in chosen:
        # Written lines have what ran: labels of blocks that did not were checked when it did.
        mapped = {key: own for key, own in spec.paper.items() if isinstance(own, Mapping)}
        absent = mapped if left_out is None else left_out
        compared = compare(selected(frame, spec), spec.paper, absent)
        text = compared.to_csv(index=False) if format == "csv" else comparison_markdown(compared)
        parts.append(text if format == "csv" else f"### {spec.title or spec.name}\n\n{text}")
    return "\n\n".join(parts) + "\n"


@app.command("list")
def list_command(
    kind: Annotated[
        str,
        typer.Argument(
            help="defenses, attacks, tasks, models, datasets, metrics, figures, grids or checkpoints."
        ),
    ],
    store: StoreOption = DEFAULT_STORE,
    plugin: PluginOption = [],  # noqa: B006
) -> None:
    """List what is registered, with parameters and defaults."""
    from bench import registry
    from bench.grid import GRIDS

    for path in plugin:
        registry.load_plugin(path, "--plugin")
    registries: dict[str, Any] = {
        "defenses": registry.DEFENSES, "attacks": registry.ATTACKS, "tasks": registry.TASKS,
        "models": registry.MODELS, "datasets": registry.DATASETS, "metrics": registry.METRICS,
        "figures": registry.FIGURES,
    }  # fmt: skip
    if kind == "grids":
        from bench.grid import read_yaml

        table = Table("grid", "title", box=None, pad_edge=False)
        for path in sorted(GRIDS.rglob("*.yaml")):
            if "profiles" not in path.parts:
                table.add_row(
                    path.relative_to(GRIDS.parent).as_posix(), escape(str(read_yaml(path).get("title", "")))
                )
        out.print(table)
        return
    if kind == "checkpoints":
        from bench.store import check_store

        check_store(store, absent=store == DEFAULT_STORE)
        _checkpoints(store)
        return
    if kind not in registries:
        raise GridError(unknown("list", kind, [*registries, "grids", "checkpoints"]))
    chosen = registries[kind]
    table = Table("name", "what", "parameters (defaults)", box=None, pad_edge=False)
    for name in chosen.names():
        cls = chosen.resolve(name)
        parameters = [
            f"{p.name}: {p.annotation}" if p.required else f"{p.name}={p.default}"
            for p in chosen.parameters(name)
        ]
        summary = (cls.__doc__ or "").strip().splitlines()
        table.add_row(name, escape(summary[0] if summary else ""), escape(", ".join(parameters)))
    out.print(table)


def _checkpoints(store: Path) -> None:
    """Trained defenses, shipped and in the store, with what they recorded and what all of them cost."""
    from bench.progress import duration
    from bench.weights import read_meta
    from defenses._learned import SHIPPED

    table = Table("checkpoint", "kB", "training", "recorded scores", "rebuild", box=None, pad_edge=False)
    totals = []
    for folder, which in ((SHIPPED, "shipped"), (store / CHECKPOINTS, f"in {store}")):
        paths = sorted(folder.glob("*.safetensors"))
        size, seconds = 0, 0.0
        for path in paths:
            meta = read_meta(path)
            scores = ", ".join(f"{name} {value:.3f}" for name, value in meta.get("scores", {}).items())
            took = duration(meta["seconds"]) if "seconds" in meta else "–"
            size, seconds = size + path.stat().st_size, seconds + meta.get("seconds", 0)
            kilobytes = str(path.stat().st_size // 1000)
            table.add_row(path.stem, kilobytes, took, escape(scores), escape(str(meta.get("rebuild", "–"))))
        if paths:
            totals.append(f"{len(paths)} {which}: {size / 1e6:.1f} MB, {duration(seconds)} of training")
    out.print(table)
    for line in totals:
        out.print(escape(line))


def _find(
    cell: str,
    grid: Path,
    profile: str | None,
    seed: int | None,
    limit: int | None,
    without: list[str],
    plugin: list[Path],
    store: Path,
) -> tuple[Cell, Plan, Store]:
    plan, opened = _open(_options(grid, profile, seed, limit, plugin, store, without=without), store)
    return plan.cell(cell), plan, opened


CellArgument = Annotated[
    str, typer.Argument(help="The first characters of a key, or role / defense / attack / level.")
]


@app.command()
def show(
    cell: CellArgument,
    grid: GridOption,
    profile: ProfileOption = None,
    seed: SeedOption = None,
    limit: LimitOption = None,
    without: WithoutOption = [],  # noqa: B006
    store: StoreOption = DEFAULT_STORE,
    plugin: PluginOption = [],  # noqa: B006
) -> None:
    """Everything about one cell: parameters, weights, versions, cost, result."""
    from bench.frame import cell_frame, passes
    from bench.runner import cell_record

    found, plan, opened = _find(cell, grid, profile, seed, limit, without, plugin, store)
    frame = cell_frame(plan, opened)
    lines = frame[frame["cell"] == found.key[:16]]
    lines = lines[lines["attack"] == found.attack_label]
    out.print(f"[bold]{escape(found.label)}[/bold]\nkey {found.key}")
    for line in lines.drop_duplicates("metric").to_dict("records"):
        if line["status"] in ("ok", "partial"):
            out.print(
                f"{line['metric']}: {line['value']:.4f} [{line['low']:.4f}, {line['high']:.4f}] "
                f"on {line['n']} of {line['n_total']} images, {passes(line)}; {line['seconds']:.1f} s"
            )
        else:
            out.print(f"{line['metric']}: {line['status']}: {escape(line['reason'])}")
    for flag in sorted({f for flags in lines["flags"] for f in flags}):
        from bench.checks import FLAGS

        out.print(f"suspect: {flag}: {FLAGS[flag].text if flag in FLAGS else ''}")
    out.print_json(json.dumps(found.payload))
    rows = cell_record(opened, found).read_rows()
    for environment in sorted({str(row["environment"]) for row in rows}):
        out.print_json(environment)
    given = replace(plan.options, seed=found.seed).words(None if store == DEFAULT_STORE else store)
    words = ["python", "-m", "bench", "run", "--grid", str(grid), *given]
    out.print(f"reproduce: {escape(shlex.join(words))}")


@app.command()
def figure(
    grid: GridOption,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Figures of the grid; default: all.")
    ] = None,
    profile: ProfileOption = None,
    seed: SeedOption = None,
    limit: LimitOption = None,
    without: WithoutOption = [],  # noqa: B006
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda:N; default: the first GPU, else the CPU.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    out_dir: OutOption = None,
    plugin: PluginOption = [],  # noqa: B006
) -> None:
    """Draw the figures of a grid that has run, as PNG and SVG with the numbers as CSV; attacks nothing.

    `run` draws them too, after its tables.
    """
    plan, opened = _open(_options(grid, profile, seed, limit, plugin, store, without=without), store)
    if not plan.grid.figures:
        raise GridError(f"{grid}: no figures (key `figures`)")
    folder = out_dir or plan.folder()
    check_folder(folder, "--out")
    _draw(plan, opened, folder, _devices(device)[0], names or None)


def _draw(
    plan: Plan, opened: Store, folder: Path, device: str, names: Sequence[str] | None, quiet: bool = False
) -> None:
    import torch

    from bench.figures.output import write_figures

    for path in write_figures(plan, opened, folder, torch.device(device), names):
        if path.suffix == ".png" and not quiet:
            err.print(f"wrote {escape(str(path))}, .svg and .csv")


@app.command()
def picture(
    cells: Annotated[list[str], typer.Argument(help="Cells: keys, or role / defense / attack / level.")],
    grid: GridOption,
    image: Annotated[int, typer.Option(min=0, help="Position of the image in its dataset.")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG or SVG file.")] = Path("picture.png"),
    cam: Annotated[bool, typer.Option("--cam", help="Also class activation maps (classifiers).")] = False,
    profile: ProfileOption = None,
    seed: SeedOption = None,
    limit: LimitOption = None,
    without: WithoutOption = [],  # noqa: B006
    store: StoreOption = DEFAULT_STORE,
    plugin: PluginOption = [],  # noqa: B006
) -> None:
    """Draw an image of cells that have run: clean, attacked, purified, and what the model saw in each."""
    import torch

    from bench.pictures import picture as draw
    from bench.pictures import save, strip

    plan, opened = _open(_options(grid, profile, seed, limit, plugin, store, without=without), store)
    device = torch.device("cpu")
    save(draw([strip(plan.cell(cell), opened, image, device, cam=cam) for cell in cells]), output)
    err.print(f"wrote {escape(str(output))}")


@app.command()
def why(
    cell: CellArgument,
    grid: GridOption,
    profile: ProfileOption = None,
    seed: SeedOption = None,
    limit: LimitOption = None,
    without: WithoutOption = [],  # noqa: B006
    store: StoreOption = DEFAULT_STORE,
    plugin: PluginOption = [],  # noqa: B006
) -> None:
    """Why a cell is cached or not: what its key holds, and how the nearest stored cell differs."""
    from bench.keys import explain
    from bench.runner import cell_record, craft_record

    found, _, opened = _find(cell, grid, profile, seed, limit, without, plugin, store)
    out.print(f"[bold]{escape(found.label)}[/bold]\nkey {found.key}")
    if found.skip is not None:
        out.print(f"not run: {escape(found.skip)}")
        return
    total = len(found.target.ids)
    present = total - len(cell_record(opened, found).missing(found.target.ids))
    out.print(f"rows: {present} of {total} images stored")
    if found.craft is not None:
        record = craft_record(opened, found.craft)
        crafted = total - len(record.missing(found.target.ids))
        out.print(f"adversarial images (key {found.craft.key[:12]}): {crafted} of {total} stored")
    if present == total:
        out.print("cached: every image has a row under this key")
        return
    differences = {
        key: explain(opened.payload("cells", key), found.payload)
        for key in opened.find("cells")
        if key != found.key
    }
    if not differences:
        out.print("not cached: the store holds no other cell to compare with")
        return
    closest = min(differences, key=lambda key: (len(differences[key]), key))
    out.print(f"not cached: the nearest stored cell is {closest[:12]}, which differs in")
    for line in differences[closest]:
        out.print(f"  {escape(line)}")


@app.command()
def doctor(store: StoreOption = DEFAULT_STORE) -> None:
    """Check the installation: what is there, what is missing, and the fix."""
    from bench.doctor import diagnose

    findings = diagnose(store)
    for finding in findings:
        mark = "[green]ok[/green]  " if finding.ok else "[red]fail[/red]"
        out.print(f"{mark} {escape(finding.name)}: {escape(finding.detail)}")
        if not finding.ok and finding.fix:
            out.print(f"       fix: {escape(finding.fix)}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


@app.command()
def schema() -> None:
    """JSON schema of grid files, for editors."""
    from bench.grid import Grid

    sys.stdout.write(json.dumps(Grid.model_json_schema(), indent=2) + "\n")


# -- zoo ------------------------------------------------------------------------------------------------------------
@zoo_app.command("list")
def zoo_list() -> None:
    """The shipped weights with recorded scores and rebuild commands."""
    from tasks.mini import manifest, zoo

    table = Table("name", "kB", "recorded scores", "sha256", "what", box=None, pad_edge=False)
    stored = manifest.entries()
    for name, recipe in sorted(zoo.recipes().items()):
        entry = stored.get(name, {})
        scores = ", ".join(f"{k} {v:.3f}" for k, v in entry.get("scores", {}).items() if isinstance(v, float))
        size = str(entry["bytes"] // 1000) if entry else "–"
        table.add_row(name, size, scores, entry.get("sha256", "")[:12], escape(recipe.summary))
    out.print(table)
    out.print("rebuild one: python -m bench zoo build NAME")


@zoo_app.command("build")
def zoo_build(
    name: Annotated[str, typer.Argument(help="A name of `zoo list`, or `all`.")],
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Folder to write to; default: the shipped one.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Default: the seed of the shipped weights.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda:N.")] = "cpu",
) -> None:
    """Train a target model of the embedded profile from scratch and record its score."""
    from tasks.mini import zoo

    names = sorted(zoo.recipes())
    if name != "all" and name not in names:
        raise GridError(unknown("zoo model", name, names))
    (device,) = _devices(device)
    if out_dir is not None:
        check_folder(out_dir, "--out")
    for item in names if name == "all" else [name]:
        with _bars() as progress:
            entry = zoo.build(item, out_dir, seed=seed, device=device, progress=_training(item, progress))
        out.print(f"{item}: " + ", ".join(f"{k} {v}" for k, v in entry["scores"].items()))


def _bars() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=err, disable=not err.is_terminal,
    )  # fmt: skip


def _training(name: str, progress: Progress) -> Callable[[int, int, str], None]:
    """Shows a training's steps: a bar on a terminal, a line every 15 s elsewhere."""
    bar = progress.add_task(name, total=None, note="")
    spoken = time.monotonic()

    def report(done: int, total: int, note: str) -> None:
        nonlocal spoken
        progress.update(bar, completed=done, total=total, note=note)
        if not err.is_terminal and (done == total or time.monotonic() - spoken >= 15):
            spoken = time.monotonic()
            err.print(escape(f"{name}: step {done} of {total} {note}"))

    return report
