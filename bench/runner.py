"""Runs cells: craft adversarial images, verify them, evaluate the full defended pipeline, store a row per image.

The parent process plans and schedules; `work` does one job in whatever process the executor chose. A job is a key:
the worker makes the same plan from the manifest and loads what it needs. Everything is stored per batch, so that a
kill loses at most the batch in flight.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import __version__
from bench.checks import (
    ENOUGH,
    Finding,
    check_adversarials,
    check_defense,
    check_frozen,
    check_images,
    digest,
    model_findings,
    norms,
    undefended,
)
from bench.errors import BenchError, CheckError, DataError, NotApplicable, StoreError
from bench.executors import Event, Job, create_executor
from bench.executors.base import command_line
from bench.files import save
from bench.keys import content_key
from bench.memory import keep_freed
from bench.plan import Cell, Craft, Options, Plan, Target, make_plan, task_instance
from bench.protocols import Batch, Defense, ImageRNG, PixelMetric, Sample, TargetModel
from bench.registry import METRICS
from bench.store import Record, Store
from bench.threat import ModelOracle, Victim

logger = logging.getLogger(__name__)
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Manifest:
    """All a worker needs to know, as a JSON file."""

    options: Options
    store: Path
    audit: int | None = None
    """Images a cell of the audit's extra cells (`bench.audit.extended`); None = without them."""

    def write(self, path: Path) -> None:
        """Write to `path` atomically."""
        data: dict[str, Any] = {
            "options": {**asdict(self.options), "grid": str(self.options.grid.resolve())},
            "store": str(self.store),
            "audit": self.audit,
        }
        for key in ("plugins", "checkpoints"):
            data["options"][key] = [str(Path(p).resolve()) for p in getattr(self.options, key)]
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(data), encoding="utf-8")
        temporary.replace(path)

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read what `write` wrote."""
        data = json.loads(path.read_text(encoding="utf-8"))
        options = data["options"]
        options["grid"] = Path(options["grid"])
        for key in ("plugins", "checkpoints"):
            options[key] = tuple(options[key])
        return cls(Options(**options), Path(data["store"]), data.get("audit"))


# -- what the parent does -------------------------------------------------------------------------------------------
def pending(plan: Plan, store: Store) -> tuple[list[Job], int]:
    """Jobs still to be run, crafts before the cells that need them, and the number of cells already complete."""
    crafts: dict[str, list[str]] = {}
    cells: dict[str, Job] = {}
    cached = 0
    waiting: set[tuple[str, tuple[str, ...]]] = set()
    known_paces = _timings(store)
    for cell in plan.cells:
        # Roles with the same data and model share a cell, yet one may want more of its images than another.
        if cell.skip is not None or (cell.key, cell.target.ids) in waiting:
            continue
        missing = cell_record(store, cell).missing(cell.target.ids)
        if not missing:
            cached += 1
            continue
        waiting.add((cell.key, cell.target.ids))
        if not_applicable(store, cell) is not None:
            continue
        after: tuple[str, ...] = ()
        if cell.craft is not None:
            craft_missing = craft_record(store, cell.craft).missing(cell.target.ids)
            if craft_missing or cell.craft.key in crafts:
                known = crafts.setdefault(cell.craft.key, [])
                known.extend(i for i in craft_missing if i not in set(known))
                after = (cell.craft.key,)
        paces = _paces(cell.target, cell.defense, "evaluate")
        cost = _pace(known_paces, paces, cell.target.task) * cell.repeats * len(missing)
        if (known_job := cells.get(cell.key)) is not None:
            cost, after = max(cost, known_job.cost), known_job.after or after
        cells[cell.key] = Job(
            "cell", cell.key, _group(cell.target), cost, after, timed=paces[0] in known_paces
        )
    by_key = plan.crafts()
    jobs: list[Job] = []
    for key, ids in crafts.items():
        craft = by_key[key]
        paces = _craft_paces(craft)
        cost = 3 * _pace(known_paces, paces, craft.target.task) * craft.cost() * len(ids)
        jobs.append(Job("craft", key, _group(craft.target), cost, timed=paces[0] in known_paces))
    order = {role: i for i, role in enumerate(plan.targets)}
    jobs.extend(cells.values())
    by_role = {c.key: c.target.role for c in plan.cells} | {k: c.target.role for k, c in by_key.items()}
    jobs.sort(key=lambda job: (order[by_role[job.key]], job.kind != "craft"))
    return jobs, cached


def run_plan(
    plan: Plan,
    store: Store,
    on_event: Callable[[Event], None],
    executor: str = "inprocess",
    workers: int = 1,
    devices: Sequence[str] = ("cpu",),
    jobs: Sequence[Job] | None = None,
    audit: int | None = None,
) -> None:
    """Run everything the store lacks (`audit`: see `Manifest`).

    Events tell progress, failures and skips; results are read from the store.
    """
    todo = pending(plan, store)[0] if jobs is None else list(jobs)
    if not todo:
        return
    manifest = store.root / f"manifest-{os.getpid()}.json"
    try:
        store.root.mkdir(parents=True, exist_ok=True)
        Manifest(plan.options, store.root, audit).write(manifest)
    except OSError as error:
        raise StoreError(f"store {store.root} cannot be written: {error.strerror or error}") from None
    _PLANS[str(manifest)] = (plan, store)
    try:
        create_executor(executor, workers=workers, devices=tuple(devices), work="bench.runner:work").run(
            todo, manifest, on_event
        )
    finally:
        _PLANS.pop(str(manifest), None)
        manifest.unlink(missing_ok=True)


def overwrite(plan: Plan, store: Store) -> None:
    """Forget the results and adversarial images of the plan's cells."""
    for cell in plan.cells:
        cell_record(store, cell).clear()
    for craft in plan.crafts().values():
        craft_record(store, craft).clear()


def cell_record(store: Store, cell: Cell) -> Record:
    """The stored rows of a cell."""
    return store.record("cells", cell.key, cell.payload)


def craft_record(store: Store, craft: Craft) -> Record:
    """The stored adversarial images of a craft."""
    return store.record("crafts", craft.key, craft.payload)


def not_applicable(store: Store, cell: Cell) -> str | None:
    """Why a cell turned out to have no meaning when it was run, for example images of a size its defense refuses."""
    reason = cell_record(store, cell).note("skip")
    if reason is None and cell.craft is not None:
        reason = craft_record(store, cell.craft).note("skip")
    return None if reason is None else str(reason)


def broken(store: Store, cell: Cell) -> str | None:
    """The hard check that stopped a cell, or its craft, the last time it was run."""
    reason = cell_record(store, cell).note("broken")
    if reason is None and cell.craft is not None:
        reason = craft_record(store, cell.craft).note("broken")
    return None if reason is None else str(reason)


def _group(target: Target) -> str:
    return f"{target.role}:{target.model.name}"


#: Rough seconds per image and pass of the embedded models on one CPU core, until the store has measured the model.
_DEFAULT_SECONDS = {"classification": 0.001, "segmentation": 0.009, "detection": 0.012}


def _paces(target: Target, defense: Defense | None, use: str) -> tuple[str, ...]:
    """Under what names the store knows seconds per image and pass: of this defense in this use, of the bare model.

    Defenses differ by a factor of a thousand, and so does one of them by whether gradients go through it.
    """
    bare = _group(target)
    return (bare,) if defense is None else (f"{bare} behind {defense.name}, {use}", bare)


def _craft_paces(craft: Craft) -> tuple[str, ...]:
    return _paces(craft.target, None if craft.mode == "none" else craft.defense, craft.mode)


def _timings(store: Store) -> dict[str, Any]:
    """The paces that the store knows, by name."""
    try:
        known: dict[str, Any] = json.loads((store.root / "timings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known


def _pace(known: Mapping[str, Any], paces: Sequence[str], task: str) -> float:
    """Seconds per image and pass."""
    measured = (float(known[pace]) for pace in paces if pace in known)
    return next(measured, _DEFAULT_SECONDS.get(task, 0.05))


def _learn_timing(store: Store, paces: Sequence[str], seconds_per_pass: float) -> None:
    """Keep a pace, under the first of its names, for later estimates; losing an update is harmless."""
    path = store.root / "timings.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        known[paces[0]] = round(seconds_per_pass, 6)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(known, sort_keys=True), encoding="utf-8")
        temporary.replace(path)
    except (OSError, ValueError) as error:
        logger.debug("timings not kept: %s", error)


# -- what a worker does ---------------------------------------------------------------------------------------------
_PLANS: dict[str, tuple[Plan, Store]] = {}


def work(manifest: Path, job: Job, device: str, report: Report) -> str | None:
    """Run one job; returns the reason when the job turned out to be not applicable.

    Raises:
        StoreBusy: another process is at it for longer than the job's patience.
        BenchError: the job cannot be done; one line says why.
    """
    if str(manifest) not in _PLANS:
        read = Manifest.read(manifest)
        made = make_plan(read.options)
        if read.audit is not None:
            from bench.audit import extended

            made = extended(made, read.audit)
        _PLANS[str(manifest)] = (made, Store(read.store))
    plan, store = _PLANS[str(manifest)]
    torch_device = torch.device(device)
    if torch_device.type == "cpu":
        # Kernels split their sums by the number of threads: with one thread everywhere, the numbers are the same for
        # any number of workers, and workers are the better use of cores for small networks anyway.
        torch.set_num_threads(1)
        keep_freed()
    # One for each role's choice of images.
    parts: list[Callable[[torch.device, int | None, Report, float], None]]
    if job.kind == "craft":
        craft = plan.crafts()[job.key]
        targets = {c.target.ids: c.target for c in plan.cells if c.craft and c.craft.key == job.key}
        record = craft_record(store, craft)
        parts = [functools.partial(run_craft, replace(craft, target=t), store) for t in targets.values()]
    else:
        cells = {c.target.ids: c for c in plan.cells if c.key == job.key and c.skip is None}
        record = cell_record(store, next(iter(cells.values())))
        parts = [functools.partial(run_cell, cell, store) for cell in cells.values()]
    try:
        for run_part in parts:
            run_part(torch_device, plan.options.batch_size, report, job.patience)
    except NotApplicable as error:
        record.set_note("skip", error.reason)
        return error.reason
    except CheckError as error:
        # The audit tells which cells a hard check stopped; a model that was tampered with must not be used again.
        record.set_note("broken", str(error))
        _load.cache_clear()
        raise
    if record.note("broken") is not None:
        record.set_note("broken", None)
    return None


@contextlib.contextmanager
def _taken(record: Record, ids: Sequence[str], report: Report, patience: float) -> Iterator[list[str]]:
    """The images of `ids` that `record` lacks, which no other process computes meanwhile."""
    with record.lock(patience):
        missing = record.missing(ids)
        report(len(ids) - len(missing), len(ids))
        yield missing


def run_craft(
    craft: Craft,
    store: Store,
    device: torch.device,
    batch_size: int | None,
    report: Report,
    patience: float = -1.0,
) -> None:
    """Make the adversarial images of `craft` for its target that the store lacks.

    Raises:
        StoreBusy: another process is making them and goes on for longer than `patience` seconds (-1: for ever).
    """
    record = craft_record(store, craft)
    ids = craft.target.ids
    with _taken(record, ids, report, patience) as missing:
        if not missing:
            return
        done = len(ids) - len(missing)
        models = tuple(load_model(source, device) for source in craft.sources)
        prepare = load_model(craft.target, device)
        defense = None if craft.defense is None else craft.defense.to(device)
        victim = Victim(models, defense, craft.mode, craft.eot)  # type: ignore[arg-type]
        if "gradient" in craft.attack.needs:
            victim.check()
        frozen = [*zip(craft.sources, models, strict=True), (craft.target, prepare)]
        intact = None if defense is None else digest(defense)
        blamed = f"attack '{craft.attack.name}'"
        started, passes = time.perf_counter(), 0

        def attack(batch: Batch) -> None:
            nonlocal done, passes
            if done == len(ids) - len(missing):
                verify_model(store, craft.target, prepare, batch)
            begun = time.perf_counter()
            adversarial, infos = craft_batch(craft, victim, batch)
            for source, model in frozen:
                check_frozen(model, _DIGESTS[id(model)], f"model '{source.model.name}'", blamed)
            if defense is not None and intact is not None:
                check_frozen(defense, intact, f"defense '{defense.name}'", blamed)
            seconds = (time.perf_counter() - begun) / len(batch)
            made = {"seconds": round(seconds, 6), "environment": environment_text()}
            record.write_images(batch.ids, adversarial.cpu(), [{**info, **made} for info in infos])
            passes += sum(int(info["forwards"]) + 2 * int(info["backwards"]) for info in infos)
            done += len(batch)
            report(done, len(ids))

        for_each_batch(craft.target, prepare, missing, batch_size, device, attack)
        if passes:
            _learn_timing(store, _craft_paces(craft), (time.perf_counter() - started) / passes)


def craft_batch(craft: Craft, victim: Victim, batch: Batch) -> tuple[Tensor, list[dict[str, Any]]]:
    """Adversarial images of one batch, verified, with one record per image."""
    attack = craft.attack
    rng = ImageRNG.for_images(craft.key, batch.ids)
    if victim.defense is not None:
        victim.defense.check_input((int(batch.images.shape[-2]), int(batch.images.shape[-1])))
    targets: Sequence[Any] = batch.targets
    if attack.target is not None:
        task = task_instance(craft.target.task)
        targets = task.attack_targets(
            attack.target, batch.targets, victim.models[0].num_classes, rng.fork("target")
        )
    oracle = ModelOracle(victim, attack, rng.fork("oracle"))
    before = batch.images.clone()
    adversarial = attack.run(oracle, batch.images, targets, rng.fork("attack")).detach()
    if not torch.equal(before, batch.images):
        raise CheckError(f"attack '{attack.name}' modified the clean images it was given")
    check_adversarials(attack, before, adversarial, batch.ids)
    adversarial = adversarial.clamp(0, 1)
    linf, l2 = norms(before, adversarial)
    infos = []
    for i, trace in enumerate(oracle.traces):
        infos.append({**trace.record(), "linf": float(linf[i]), "l2": float(l2[i])})
    return adversarial, infos


def run_cell(
    cell: Cell,
    store: Store,
    device: torch.device,
    batch_size: int | None,
    report: Report,
    patience: float = -1.0,
) -> None:
    """Evaluate `cell` on the images the store has no row for.

    Raises:
        StoreBusy: another process is evaluating it and goes on for longer than `patience` seconds (-1: for ever).
    """
    record = cell_record(store, cell)
    ids = cell.target.ids
    with _taken(record, ids, report, patience) as missing:
        if not missing:
            return
        done = len(ids) - len(missing)
        model = load_model(cell.target, device)
        defense = cell.defense.to(device)
        crafts = None if cell.craft is None else craft_record(store, cell.craft)

        intact = digest(defense)
        blamed = f"defense '{cell.defense_label}'"

        spent = 0.0

        def evaluate(batch: Batch) -> None:
            nonlocal done, spent
            first = done == len(ids) - len(missing)
            if first:
                verify_model(store, cell.target, model, batch)
                verify_defense(store, cell, defense, batch)
            begun = time.perf_counter()
            infos: Sequence[Mapping[str, Any]] = [{}] * len(batch)
            attacked = batch
            if crafts is not None:
                images, infos = crafts.read_images(batch.ids)
                attacked = Batch(images.to(device), batch.targets, batch.ids)
            rows = evaluate_batch(cell, model, defense, attacked, batch.images)
            if first:
                check_frozen(model, _DIGESTS[id(model)], f"model '{cell.target.model.name}'", blamed)
                check_frozen(defense, intact, blamed, "the evaluation")
            took = time.perf_counter() - begun
            spent += took
            seconds = took / len(batch)
            made = {"seconds": round(seconds, 6), "environment": environment_text()}
            record.write_rows(
                [
                    {**row, **{f"craft_{k}": v for k, v in info.items()}, **made}
                    for row, info in zip(rows, infos, strict=True)
                ]
            )
            done += len(batch)
            report(done, len(ids))

        for_each_batch(cell.target, model, missing, batch_size, device, evaluate)
        paces = _paces(cell.target, cell.defense, "evaluate")
        _learn_timing(store, paces, spent / (len(missing) * cell.repeats))


def in_format(images: Tensor, image_format: str) -> Tensor:
    """Images (B, 3, H, W) as the format keeps them: `float` as they are, `uint8` rounded to what a PNG file holds."""
    return (images * 255).round() / 255 if image_format == "uint8" else images


def evaluate_batch(
    cell: Cell, model: TargetModel, defense: Any, batch: Batch, clean: Tensor
) -> list[dict[str, Any]]:
    """One row per image: `score` (mean over repeats), `scores` and `stats` (JSON lists, one entry a repeat)."""
    task = task_instance(cell.target.task)
    metrics = [METRICS.create(name) for name in cell.metrics]
    images = in_format(batch.images, cell.image_format)
    defense.check_input((int(images.shape[-2]), int(images.shape[-1])))
    rng = ImageRNG.for_images(cell.key, batch.ids)
    stats: list[list[dict[str, Any]]] = [[] for _ in batch.ids]
    purifying = predicting = 0.0
    with torch.no_grad():
        for repeat in range(cell.repeats):
            begun = _clock(images.device)
            purified = defense.purify(images, rng.fork("repeat", repeat))
            between = _clock(images.device)
            predictions = model.predict(purified.images, geometry=purified.geometry)
            purifying, predicting = purifying + between - begun, predicting + _clock(images.device) - between
            if undefended(cell) and not torch.equal(purified.images, images):
                raise CheckError(f"defense '{cell.defense_label}' is none, yet it changes images")
            measured = _pixels(metrics, clean, purified.images)
            for image_stats, prediction, target, numbers in zip(
                stats, predictions, batch.targets, measured, strict=True
            ):
                image_stats.append({**task.rows(prediction, target), **numbers})
    rows = []
    passes = len(batch) * cell.repeats
    for image_id, image_stats in zip(batch.ids, stats, strict=True):
        scores = [float(s["score"]) for s in image_stats]
        rows.append(
            {
                "id": image_id,
                "score": sum(scores) / len(scores),
                "scores": json.dumps(scores),
                "stats": json.dumps(image_stats, sort_keys=True, separators=(",", ":")),
                "seconds_purify": round(purifying / passes, 7),
                "seconds_predict": round(predicting / passes, 7),
            }
        )
    return rows


def _pixels(metrics: Sequence[PixelMetric], clean: Tensor, purified: Tensor) -> list[dict[str, float | None]]:
    """Each image's numbers, by name; None where sizes differ, as JSON has no NaN."""
    rows: list[dict[str, float | None]] = [{} for _ in clean]
    for metric in metrics:
        same = purified.shape == clean.shape
        numbers = metric.measure(clean, purified).tolist() if same else [None] * len(clean)
        for row, number in zip(rows, numbers, strict=True):
            row[metric.name] = number
    return rows


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# -- checks done once -------------------------------------------------------------------------------------------------
_VERIFIED: set[Path] = set()


def verified_path(store: Store, what: Mapping[str, Any]) -> Path:
    """Where the store notes that a model or a defense has passed its checks."""
    return store.root / "checked" / f"{content_key(what)[:24]}.json"


def _once(path: Path, check: Callable[[], list[Finding]]) -> None:
    """Run a check that the store has no note of; what it finds is kept there."""
    if path in _VERIFIED:
        return
    if not path.exists():
        save(path, json.dumps([asdict(f) for f in check()]).encode())
    _VERIFIED.add(path)


def _model_check(target: Target, images: int = ENOUGH) -> dict[str, Any]:
    """The check on a batch of so many images. Fewer than `ENOUGH` say less: what they pass is to be checked again."""
    few = {"images": images} if images < ENOUGH else {}
    return {
        "check": "model", "version": 1, "model": target.model.identity(), "data": target.data_identity(), **few,
    }  # fmt: skip


def verify_model(store: Store, target: Target, model: TargetModel, batch: Batch) -> None:
    """Checks V19, V25 and V26 of a model on its first clean batch, once in a store for batches of `ENOUGH` images.

    Raises:
        CheckError: see `bench.checks.model_findings`.
    """
    rng = ImageRNG.for_images("model check", batch.ids)
    _once(
        verified_path(store, _model_check(target, len(batch))),
        lambda: model_findings(model, f"model '{target.model.name}'", batch, rng),
    )


def verify_defense(store: Store, cell: Cell, defense: Any, batch: Batch) -> None:
    """Check V13 of a defense on one image, once in a store for each dataset.

    Raises:
        CheckError: see `bench.checks.check_defense`.
    """
    what = {
        "check": "defense",
        "version": 1,
        "defense": cell.defense.identity(),
        "data": cell.target.data_identity(),
    }
    defense.check_input((int(batch.images.shape[-2]), int(batch.images.shape[-1])))

    def check() -> list[Finding]:
        check_defense(defense, batch.images[:1], ImageRNG.for_images("defense check", batch.ids[:1]))
        return []

    _once(verified_path(store, what), check)


def noted_findings(store: Store, target: Target) -> list[Finding]:
    """What `verify_model` found out about a model, on the most images."""
    for images in range(ENOUGH, 0, -1):
        try:
            noted = json.loads(verified_path(store, _model_check(target, images)).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return [Finding(**entry) for entry in noted]
    return []


# -- loading --------------------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=4)
def _load(source: Any, device: str) -> TargetModel:
    model: TargetModel = source.load(torch.device(device))
    if model.training or any(p.requires_grad for p in model.parameters()):
        raise CheckError(f"model '{source.name}' is not frozen: expected eval() and requires_grad_(False)")
    _DIGESTS[id(model)] = digest(model)
    return model


#: id of a loaded model -> its weights' checksum when it was loaded; `_load` renews it with the id.
_DIGESTS: dict[int, tuple[int, ...]] = {}


def load_model(target: Target, device: torch.device) -> TargetModel:
    """The frozen model of a target; the last few stay loaded."""
    return _load(target.model, str(device))


#: Role -> largest batch that may fit, once a larger one did not.
_FITS: dict[str, int] = {}


def for_each_batch(
    target: Target,
    model: TargetModel,
    ids: Sequence[str],
    batch_size: int | None,
    device: torch.device,
    consume: Callable[[Batch], None],
) -> None:
    """Feed `consume` batches of equal-sized images, in order.

    A batch that runs out of memory is redone in halves, and the size stays halved.

    Raises:
        BenchError: a single image does not fit.
    """
    wanted = batch_size or task_instance(target.task).batch_size
    size = min(wanted, _FITS.get(target.role, wanted))
    index = {image_id: i for i, image_id in enumerate(target.dataset.ids())}
    start = 0
    while start < len(ids):
        samples: list[Sample] = []
        for image_id in ids[start : start + size]:
            sample = _sample(target, model, index[image_id])
            if samples and sample.image.shape != samples[0].image.shape:
                break
            samples.append(sample)
        batch = Batch.of(samples)
        check_images(batch.images, batch.ids, f"dataset {target.dataset.name}")
        try:
            consume(batch.to(device))
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            if len(batch) == 1:
                raise BenchError(f"out of memory with a single image ({batch.ids[0]}) on {device}") from None
            size = _FITS[target.role] = len(batch) // 2
        else:
            start += len(batch)
            continue
        # Outside the except block: the traceback would keep the tensors alive.
        logger.warning(
            "out of memory on %s with %d images: going on with batches of %d", device, len(batch), size
        )
        del batch
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError))
        or "out of memory" in text
        or "can't allocate memory" in text
    )


def _sample(target: Target, model: TargetModel, index: int) -> Sample:
    try:
        sample = model.prepare(target.dataset[index])
    except (OSError, ValueError) as error:
        image_id = target.dataset.ids()[index]
        raise DataError(f"dataset {target.dataset.name}, image {image_id} cannot be read: {error}") from None
    try:
        task_instance(target.task).check_truth(sample.target, model.num_classes)
    except ValueError as error:
        raise DataError(f"dataset {target.dataset.name}, image {sample.id}: {error}") from None
    return sample


@functools.lru_cache(maxsize=1)
def environment() -> dict[str, Any]:
    """Versions, git state and machine, recorded with every stored shard and not part of any key."""
    from importlib import metadata

    versions = {"bench": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in (
        "torchvision",
        "numpy",
        "mmengine",
        "mmdet",
        "mmsegmentation",
        "mmcv",
        "mmcv-lite",
        "robustbench",
    ):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "git": git_state(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "command": command_line(),
    }


@functools.lru_cache(maxsize=1)
def environment_text() -> str:
    """`environment` as JSON, as rows carry it."""
    return json.dumps(environment(), sort_keys=True)


def git_state() -> dict[str, Any]:
    """Commit of the source tree and whether it has local changes; {} outside a checkout."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True, text=True, check=True, timeout=10,
        ).stdout.strip()  # fmt: skip

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return {}


__all__ = [
    "BenchError",
    "Manifest",
    "broken",
    "cell_record",
    "craft_record",
    "environment",
    "noted_findings",
    "overwrite",
    "pending",
    "run_cell",
    "run_craft",
    "run_plan",
    "verify_defense",
    "verify_model",
    "work",
]
