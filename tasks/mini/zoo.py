"""The mini zoo: how each shipped target model is trained, as code.

A recipe is a function ``build(out_dir, *, seed, device, progress) -> scores`` that trains a model, writes
``out_dir/NAME.safetensors`` and measures the written weights. It depends on its seed and parameters alone, so the
same machine gives the same file again; other machines round differently and reach about the same scores.

Recipes live in ``tasks/mini/zoo_*.py``, which register them with :func:`recipe`. Those modules import mmdet and mmseg
inside their functions only.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from bench.errors import BenchError, WeightsError, unknown
from tasks.microbatch import one_thread
from tasks.mini import manifest

logger = logging.getLogger(__name__)

#: Called with steps done, steps in all, and a short note such as the loss.
Progress = Callable[[int, int, str], None]


class Build(Protocol):
    """A recipe's function."""

    def __call__(
        self, out_dir: Path, *, seed: int, device: str | torch.device, progress: Progress
    ) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Recipe:
    """How one model is made.

    Attributes:
        name: the model's name, also that of its weights file.
        build: the training function.
        seed: seed of the shipped weights.
        parameters: everything else the training depends on, for the manifest.
        summary: one line for listings.
    """

    name: str
    build: Build
    seed: int
    parameters: Mapping[str, Any]
    summary: str


RECIPES: dict[str, Recipe] = {}


def recipe(
    name: str, *, seed: int, parameters: Mapping[str, Any], summary: str | None = None
) -> Callable[[Build], Build]:
    """Register the decorated function as the recipe of ``name``; its docstring's first line is the summary."""

    def register(build: Build) -> Build:
        if name in RECIPES and RECIPES[name].build.__module__ != build.__module__:
            raise BenchError(f"recipe '{name}' is defined twice")
        text = summary or (build.__doc__ or name).strip().splitlines()[0]
        RECIPES[name] = Recipe(name, build, seed, dict(parameters), text)
        return build

    return register


def recipes() -> dict[str, Recipe]:
    """All recipes, sorted by name; imports the ``zoo_*`` modules beside this one."""
    import tasks.mini

    for info in pkgutil.iter_modules(tasks.mini.__path__):
        if info.name.startswith("zoo_"):
            importlib.import_module(f"tasks.mini.{info.name}")
    return dict(sorted(RECIPES.items()))


def build(
    name: str,
    out_dir: Path | None = None,
    *,
    seed: int | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train ``name``, write its weights and its manifest entry, and return the entry.

    Args:
        name: a key of :func:`recipes`.
        out_dir: folder of weights and manifest; the shipped one unless given.
        seed: another seed than the shipped one's.
        device: where to train.
        progress: told about each stretch of training.

    Raises:
        WeightsError: there is no such recipe, or the folder cannot be written.
    """
    known = recipes()
    if name not in known:
        raise WeightsError(unknown("zoo model", name, known))
    chosen = known[name]
    folder = manifest.WEIGHTS_DIR if out_dir is None else out_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeightsError(f"{folder}: cannot be written ({error.strerror})") from None
    seed = chosen.seed if seed is None else seed

    def report(done: int, total: int, note: str) -> None:
        logger.info("%s: %d/%d %s", name, done, total, note)
        if progress is not None:
            progress(done, total, note)

    start = time.perf_counter()
    with one_thread():
        result = dict(chosen.build(folder, seed=seed, device=device, progress=report))
    seconds = float(result.pop("seconds", time.perf_counter() - start))
    return manifest.record(
        name, scores=result, recipe={"seed": seed, **chosen.parameters}, seconds=seconds, folder=folder
    )
