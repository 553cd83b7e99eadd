"""`python -m bench audit`: which results of a grid are suspect, why, and what to run next.

All that is stored is judged by `bench.checks`. The costly checks vary a cell (more steps, another eps, other losses,
random search, more draws) and compare it with its parent image by image: these extra cells are ordinary cells with
ordinary keys, run by the same planner, runner and store, and are in no table. They exist only for cells whose attack
sees the pipeline it is judged on, since only there must more effort do more harm.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.checks import (
    DRAWS,
    FLAGS,
    Finding,
    by_gradient,
    direct,
    reference_findings,
    sees,
    undefended,
    undone_by_noise,
)
from bench.errors import BenchError, NotApplicable
from bench.files import save
from bench.frame import cell_metrics, findings, load_rows, summarise
from bench.grid import GRIDS
from bench.keys import canonical, content_key
from bench.plan import Cell, Craft, Plan, reference_of
from bench.protocols import Attack, Defense, Geometry, ImageRNG, TargetModel
from bench.registry import ATTACKS, DEFENSES
from bench.runner import broken, cell_record, not_applicable, verified_path
from bench.stats import paired_scores
from bench.store import Store
from bench.threat import ModelOracle, Victim
from bench.written import Written

logger = logging.getLogger(__name__)

IMAGES = {"classification": 100, "segmentation": 24, "detection": 20}
"""Images of the extra cells, by task."""

_EFFORT = ("steps", "queries", "iterations", "max_iterations")
_HUGE = Fraction(128, 255)
COSTLY: dict[str, str] = {
    "V5": "the attack on the undefended model, where the grid lacks it",
    "V6": "the best of 100 random draws",
    "V7": "2 and 5 times the steps, 5 restarts",
    "V8": "half, double and unlimited eps",
    "V9": "a single step",
    "V12": "random search over scores (Square, 1000 queries)",
    "V13": "20 draws a step",
    "V14": "the best iterate",
    "V16": "other losses, and a wrong target",
    "V20": "minimal perturbations on a noise defense",
    "V22": "the other image format",
}


@dataclass(frozen=True)
class Extra:
    """A varied cell.

    Attributes:
        check: the check it serves.
        what: what was varied, as reports call it.
        cell: the varied cell.
        parent: the cell it is compared with.
    """

    check: str
    what: str
    cell: Cell
    parent: Cell


# -- extra cells --------------------------------------------------------------------------------------------------
def vary(attack: Attack, **changes: Any) -> Attack | None:
    """The same attack with other parameters; None when it has no such parameter or refuses the value."""
    if not changes.keys() <= {p.name for p in ATTACKS.parameters(attack.name)}:
        return None
    return _make(attack.name, {**attack.params, **changes})


def _make(name: str, params: Mapping[str, Any]) -> Attack | None:
    try:
        attack: Attack = ATTACKS.create(name, params)
    except BenchError:
        return None
    return attack


def extras(plan: Plan, images: int = 0) -> list[Extra]:
    """The extra cells of the costly checks.

    Args:
        plan: the grid's.
        images: at most this many images a cell; 0 = `IMAGES`.
    """
    out: list[Extra] = []
    cells = {c.key: c for c in plan.cells if c.skip is None and c.attack is not None and c.craft is not None}
    bare = {(c.target.role, c.attack_label) for c in cells.values() if undefended(c)}
    twins = {
        (c.target.role, c.defense_label, c.attack_label, c.level_label, c.image_format)
        for c in cells.values()
    }
    for cell in cells.values():
        assert cell.attack is not None
        if not direct(cell.attack) or cell.image_format != "float":
            continue
        target = replace(cell.target, ids=cell.target.ids[: images or IMAGES.get(cell.target.task, 20)])
        parent = replace(cell, target=target)
        if sees(cell):
            for check, what, attack in _variants(cell.attack, cell.target.task):
                if attack.tasks is None or cell.target.task in attack.tasks:
                    varied = _varied(parent, attack, what=what)
                    # Losses that the grid has are in its worst case already.
                    if check != "V16" or varied.key not in cells:
                        out.append(Extra(check, what, varied, parent))
            assert cell.craft is not None
            averaged = cell.craft.eot >= DRAWS or cell.attack.averages
            if cell.defense.stochastic and cell.level != "oblivious" and not averaged:
                out.append(
                    Extra(
                        "V13",
                        f"eot {DRAWS}",
                        _varied(parent, cell.attack, eot=DRAWS, what=f"eot {DRAWS}"),
                        parent,
                    )
                )
            twin = (cell.target.role, cell.defense_label, cell.attack_label, cell.level_label, "uint8")
            # An image that left at its first success is at the boundary: another rounding of it says nothing.
            if twin not in twins and cell.attack.params.get("stop_when_fooled") is not True:
                payload = {**cell.payload, "image_format": "uint8"}
                other = replace(parent, key=content_key(payload), payload=payload, image_format="uint8")
                out.append(Extra("V22", "uint8", other, parent))
            if not undefended(cell) and (cell.target.role, cell.attack_label) not in bare:
                bare.add((cell.target.role, cell.attack_label))
                out.append(Extra("V5", "undefended", _undefended(parent), parent))
        elif undone_by_noise(cell):
            out.append(Extra("V20", "noise defense", _defended(parent, "noise", {"eps": "8/255"}), parent))
    return out


def extended(plan: Plan, images: int) -> Plan:
    """The plan with the extra cells of the costly checks."""
    return replace(plan, cells=(*plan.cells, *(extra.cell for extra in extras(plan, images))))


def _variants(attack: Attack, task: str) -> list[tuple[str, str, Attack]]:
    """(check, what was varied, attack) of the costly checks that apply."""
    out: list[tuple[str, str, Attack | None]] = []
    params = attack.params
    effort = next((name for name in _EFFORT if name in params), None)
    # A step that shrinks as steps grow would hide what more steps do.
    alpha: dict[str, Any] = {}
    if params.get("alpha", 0) is None and attack.eps is not None:
        alpha = {"alpha": str(Fraction(attack.eps) / 4)}
    if attack.eps is not None and (effort is None or int(params[effort]) == 1):
        # A single step need not reach what many do, at any eps.
        loss = "cls" if task == "detection" else "ce"
        draws = _make("noise", {"eps": str(attack.eps), "draws": 100, "loss": loss})
        return [("V6", "noise, best of 100", draws)] if draws is not None and attack.norm == "linf" else []
    if effort is not None:
        n = int(params[effort])
        for factor in (2, 5):
            steps = {effort: factor * n}
            out.append(("V7", f"{effort} {factor * n}", vary(attack, **steps, **alpha)))
        if attack.eps is not None and "alpha" in params and n > 1:
            out.append(("V9", "a single step", vary(attack, **{effort: 1}, alpha=str(attack.eps))))
    if params.get("restarts") == 1:
        out.append(("V7", "restarts 5", vary(attack, restarts=5)))
    if "return_best" in params and not params["return_best"]:
        out.append(("V14", "best iterate", vary(attack, return_best=True)))
    if attack.eps is not None and attack.norm == "linf":
        eps = Fraction(attack.eps)
        for name, radius in (("half eps", eps / 2), ("double eps", min(2 * eps, Fraction(1)))):
            out.append(("V8", name, vary(attack, eps=str(radius), **_scaled(params, radius / eps))))
        huge: dict[str, Any] = {"eps": str(_HUGE)}
        if "alpha" in params:
            huge["alpha"] = str(_HUGE / 4)
        if effort is not None:
            huge[effort] = max(20, int(params[effort]))
        out.append(("V8", "eps 128/255", vary(attack, **huge)))
        loss = {"classification": "ce", "segmentation": "ce", "detection": "cls"}.get(task, "ce")
        noise = {"eps": str(eps), "draws": 100, "loss": loss}
        out.append(("V6", "noise, best of 100", _make("noise", noise)))
    if task == "classification" and attack.eps is not None and attack.target is None:
        square = {"eps": str(attack.eps), "norm": attack.norm, "queries": 1000}
        out.append(("V12", "square", _make("square", square)))
        # APGD's target classes belong to the loss that is left out here.
        default = {p.name: p.default for p in ATTACKS.parameters(attack.name)}
        own = {"classes": default["classes"]} if attack.name == "apgd" else {}
        losses = [
            vary(attack, loss=loss, **own) for loss in ("ce", "margin", "dlr") if loss != params.get("loss")
        ]
        out.extend(("V16", f"loss {a.params['loss']}", a) for a in losses if a is not None)
        out.append(("V16", "target next", vary(attack, target="next")))
    elif task == "segmentation" and attack.eps is not None and "steps" in params:
        own = {k: params[k] for k in ("eps", "alpha", "steps") if params.get(k) is not None}
        out.extend(("V16", name, _make(name, own)) for name in ("cw_seg", "segpgd") if name != attack.name)
    elif task == "detection" and attack.target is None:
        for loss in ("cls", "loc", "cls+loc"):
            if loss != params.get("loss"):
                out.append(("V16", f"loss {loss}", vary(attack, loss=loss)))
    return [(check, what, made) for check, what, made in out if made is not None]


def _scaled(params: Mapping[str, Any], factor: Fraction) -> dict[str, str]:
    """The step size that goes with an eps `factor` times as large."""
    return {"alpha": str(Fraction(params["alpha"]) * factor)} if params.get("alpha") is not None else {}


def _oracle(
    known: Mapping[str, Any], attack: Attack, behind: Defense | None, **changes: Any
) -> dict[str, Any]:
    """What a craft's key says of its oracle, with changes."""
    kept = {key: value for key, value in known.items() if key != "reference"}
    return {**kept, **changes, **reference_of(attack, behind)}


def _varied(cell: Cell, attack: Attack, what: str, eot: int | None = None) -> Cell:
    """`cell` under another attack, or with other `eot`, at the same level."""
    assert cell.craft is not None
    draws = cell.craft.eot if eot is None else eot
    made: dict[str, Any] = {**cell.craft.payload, "attack": attack.identity()}
    made["oracle"] = _oracle(made["oracle"], attack, cell.craft.defense, eot=draws)
    craft = replace(
        cell.craft, key=content_key(made), payload=made, target=cell.target, attack=attack, eot=draws
    )
    return _with(cell, craft, attack=attack, attack_label=f"{cell.attack_label} ({what})")


def _with(cell: Cell, craft: Craft, **changes: Any) -> Cell:
    payload = {**cell.payload, "craft": craft.payload, **changes.pop("payload", {})}
    return replace(cell, key=content_key(payload), payload=payload, craft=craft, **changes)


def _undefended(cell: Cell) -> Cell:
    """The same attack on the bare model."""
    assert cell.craft is not None
    made: dict[str, Any] = dict(cell.craft.payload)
    made["oracle"] = _oracle(made["oracle"], cell.craft.attack, None, defense=None, mode="none", eot=1)
    craft = replace(
        cell.craft, key=content_key(made), payload=made, target=cell.target, defense=None, mode="none", eot=1
    )
    none = DEFENSES.create("none").eval()
    return _with(
        cell, craft, defense=none, defense_label="none", level="oblivious", level_label="oblivious", repeats=1,
        payload={"defense": none.identity(), "repeats": 1},
    )  # fmt: skip


def _defended(cell: Cell, name: str, params: Mapping[str, Any]) -> Cell:
    """The same adversarial images in front of another defense."""
    assert cell.craft is not None
    defense = DEFENSES.create(name, params).eval()
    return _with(
        cell,
        cell.craft,
        defense=defense,
        defense_label=f"{name} (audit)",
        payload={"defense": defense.identity()},
    )


# -- what they say ------------------------------------------------------------------------------------------------
def extra_findings(found: Sequence[Extra], store: Store) -> tuple[dict[str, list[Finding]], list[Extra]]:
    """Findings by the parent's key, and the extra cells that have not run."""
    groups: dict[str, list[Extra]] = {}
    missing: list[Extra] = []
    rows: dict[str, list[dict[str, Any]]] = {}
    for extra in found:
        if cell_record(store, extra.cell).missing(extra.cell.target.ids):
            if not_applicable(store, extra.cell) is None:
                missing.append(extra)
            continue
        for cell in (extra.parent, extra.cell):
            if cell.key not in rows:
                rows[cell.key] = load_rows(cell_record(store, cell), cell.target.ids)
        groups.setdefault(extra.parent.key, []).append(extra)
    scores = {key: {str(row["id"]): float(row["score"]) for row in lines} for key, lines in rows.items()}
    out = {key: _judge(group, scores, rows) for key, group in groups.items()}
    return {key: f for key, f in out.items() if f}, missing


def _judge(
    group: Sequence[Extra],
    scores: Mapping[str, Mapping[str, float]],
    rows: Mapping[str, list[dict[str, Any]]],
) -> list[Finding]:
    """One parent's extra cells against it; every comparison is on the images of the extra cells."""
    parent = group[0].parent
    headline = summarise(rows[parent.key], cell_metrics(parent)[:1], parent.seed)[0]
    if math.isnan(headline["value"]):
        return []  # no ground truth: scores of images mean nothing
    ids = [i for i in scores[parent.key] if i in scores[group[0].cell.key]]

    def of(cell: Cell) -> np.ndarray:
        return np.array([scores[cell.key][i] for i in ids])

    own = of(parent)
    tolerance = 0.01 if parent.target.task == "classification" else 0.02
    out: list[Finding] = []

    def harm(extra: Extra, flag: str, least: float = tolerance) -> None:
        gap = paired_scores(own, of(extra.cell))
        if gap.low > 0 and gap.value > least:
            out.append(Finding(flag, f"{extra.what}: {100 * gap.value:.1f} points lower"))

    flags = {
        "V6": "noise-of-many-draws", "V7": "not-converged", "V9": "below-single-step", "V13": "eot-too-few",
        "V14": "last-is-worse",
    }  # fmt: skip
    sweep = {"eps": own}
    for extra in group:
        if extra.check in flags:
            harm(extra, flags[extra.check], 0.005 if extra.check in ("V6", "V9") else tolerance)
        if extra.check == "V7" and "restarts" not in extra.what:
            gap = paired_scores(of(extra.cell), own)
            if gap.low > 0 and gap.value > tolerance:
                out.append(Finding("more-steps-weaker", f"{extra.what}: {100 * gap.value:.1f} points higher"))
        if extra.check == "V8":
            sweep[extra.what] = of(extra.cell)
            if extra.what == "eps 128/255":
                line = summarise(rows[extra.cell.key], cell_metrics(extra.cell), parent.seed)[0]
                if line["low"] > 0.05:
                    out.append(Finding("unbounded-not-broken", f"{line['metric']} {line['value']:.3f}"))
        if extra.check == "V22":
            gap = paired_scores(own, of(extra.cell))
            if gap.low > 0.005 or gap.high < -0.005:
                out.append(Finding("rounding-matters", f"{100 * gap.value:.1f} points of the score"))
        if extra.check == "V20" and own.mean() > 0.1 and of(extra.cell).mean() >= 0.9 * own.mean():
            out.append(
                Finding(
                    "noise-defends-too", f"noise leaves {of(extra.cell).mean():.3f}, this {own.mean():.3f}"
                )
            )
        if extra.check == "V5":
            metrics = summarise(rows[extra.cell.key], cell_metrics(extra.cell), parent.seed)
            out.extend(reference_findings(extra.cell, metrics))
    order = [name for name in ("half eps", "eps", "double eps", "eps 128/255") if name in sweep]
    for small, large in itertools.pairwise(order):
        gap = paired_scores(sweep[large], sweep[small])
        if gap.low > 0 and gap.value > tolerance:
            out.append(
                Finding("eps-not-monotone", f"{large} leaves {100 * gap.value:.1f} points more than {small}")
            )
    _judge_unions(group, own, of, out)
    return out


def _judge_unions(group: Sequence[Extra], own: np.ndarray, of: Any, out: list[Finding]) -> None:
    """V12 and V16: against the per-image worst of the variants of the same budget."""
    losses = [extra for extra in group if extra.check == "V16"]
    if losses:
        union = np.minimum.reduce([own, *(of(extra.cell) for extra in losses)])
        gap = paired_scores(own, union)
        if gap.low > 0 and gap.value > 0.02:
            best = min(losses, key=lambda extra: float(of(extra.cell).mean()))
            out.append(
                Finding("one-loss-is-not-enough", f"{100 * gap.value:.1f} points, most by {best.what}")
            )
    same = [e for e in group if e.check in ("V7", "V9", "V14", "V16")]
    gradient = np.minimum.reduce([own, *(of(extra.cell) for extra in same)])
    for extra in group:
        if extra.check == "V12":
            falls = int(((gradient > 0.5) & (of(extra.cell) < 0.5)).sum())
            if falls and falls / len(own) > 0.002:
                out.append(Finding("query-beats-gradient", f"{falls} of {len(own)} images"))


# -- V18 ----------------------------------------------------------------------------------------------------------
class _Planted(TargetModel):
    """Two classes that differ by the brightness of the image: fooled by 0.9 eps in the right direction, always.

    (Zimmermann et al. 2022: an attack must find perturbations that were planted.)
    """

    task = "classification"
    losses: ClassVar[tuple[str, ...]] = ("ce",)
    num_classes = 10

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def logits(self, images: Tensor, *, geometry: Geometry | None = None) -> Tensor:
        t = self.slope * (images - 0.5).flatten(1).sum(1)
        rest = torch.full((len(images), 8), -8.0, device=images.device) - torch.arange(
            8, device=images.device
        )
        return torch.cat([torch.stack([4 - t, t], 1), rest], 1)

    def loss(
        self, images: Tensor, targets: Sequence[Any], kind: str, *,
        geometry: Geometry | None = None, rng: ImageRNG | None = None,
    ) -> Tensor:  # fmt: skip
        return self.loss_from_logits(self.logits(images), targets, kind)

    def loss_from_logits(self, logits: Tensor, targets: Sequence[Any], kind: str) -> Tensor:
        return F.cross_entropy(logits, torch.as_tensor(list(targets), device=logits.device), reduction="none")

    def predict(self, images: Tensor, *, geometry: Geometry | None = None) -> list[Any]:
        return [int(label) for label in self.logits(images).argmax(1)]


def unit_test(attack: Attack) -> float | None:
    """Check V18: the share of 4 planted images that the attack fools; None where the test has no meaning.

    The test needs an untargeted attack on logits or losses of classifiers, with a budget that cannot leave [0,1], that
    spends all of it uphill: not on chance before a single step, and not away from the clean image whichever way.
    """
    classifies = attack.tasks is None or "classification" in attack.tasks
    known = set(attack.loss_kinds()) <= {"ce"}
    if (
        not (by_gradient(attack) and classifies and known and attack.target is None)
        or "features" in attack.needs
    ):
        return None
    if attack.eps is None or attack.norm is None:
        return None
    if not attack.labelled or (attack.stochastic and attack.passes() == 1):
        return None
    size = 3 * 32 * 32
    reach = float(attack.eps) * (size if attack.norm == "linf" else math.sqrt(size))
    if reach > 0.4 * size:
        return None
    generator = torch.Generator().manual_seed(0)
    images = 0.5 + 0.05 * (torch.rand(4, 3, 32, 32, generator=generator) - 0.5)
    images = images - images.mean((1, 2, 3), keepdim=True) + 0.5
    model = _Planted(2 / (0.9 * reach)).eval()
    rng = ImageRNG.for_images("unit test", [str(i) for i in range(4)])
    try:
        oracle = ModelOracle(Victim((model,)), attack, rng.fork("oracle"))
        out = attack.run(oracle, images, (0,) * 4, rng.fork("attack"))
    except (NotApplicable, NotImplementedError):
        return None
    except Exception as error:
        # It ran on the model of its cell: that it asks more of a model than this one has is no fault of it.
        logger.debug("no unit test of attack '%s': %s: %s", attack.name, type(error).__name__, error)
        return None
    return sum(int(label) != 0 for label in model.predict(out.detach())) / len(images)


def unit_findings(attack: Attack | None) -> list[Finding]:
    """Check V18 of one attack, made once for each in a process."""
    if attack is None or not by_gradient(attack):
        return []
    name = canonical(attack.identity())
    if name not in _SHARES:
        _SHARES[name] = unit_test(attack)
    share = _SHARES[name]
    if share is None or share == 1:
        return []
    return [Finding("fails-unit-test", f"{100 * share:.0f} % of the images fooled")]


_SHARES: dict[str, float | None] = {}


# -- what has been audited -------------------------------------------------------------------------------------------
def note_audited(plan: Plan, store: Store, images: int) -> None:
    """Note that the costly checks of a plan have been run, so that its rows are marked with what they find."""
    save(_audited_path(plan, store), json.dumps({"images": images}).encode())


def audited(plan: Plan, store: Store) -> int | None:
    """How many images the costly checks of a plan were asked for (see `extras`); None = they have not been run."""
    try:
        return int(json.loads(_audited_path(plan, store).read_text(encoding="utf-8"))["images"])
    except (OSError, ValueError, KeyError):
        return None


def _audited_path(plan: Plan, store: Store) -> Path:
    return verified_path(store, {"check": "audit", "cells": sorted({cell.key for cell in plan.cells})})


# -- the report ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Audit:
    """What is known about a grid's results.

    Attributes:
        judged: finished cells with their findings; cells that are the same are one.
        stopped: cells that a hard check stopped, and its message.
        waiting: cells that have not run.
        partial: cells that have run on some of their images only; they are judged on those.
        unchecked: checks that have not been made, and why.
        not_applicable: why some costly or direct checks have no meaning here.
    """

    judged: list[tuple[Cell, list[Finding]]]
    stopped: list[tuple[Cell, str]]
    waiting: list[Cell]
    partial: list[Cell]
    unchecked: dict[str, str]
    not_applicable: list[str]

    @property
    def suspect(self) -> list[tuple[Cell, list[Finding]]]:
        """Cells with more than notes."""
        return [(cell, found) for cell, found in self.judged if any(f.suspect for f in found)]

    @property
    def sound(self) -> bool:
        """Every cell has run on all its images, nothing is suspect and nothing was stopped."""
        return not (self.suspect or self.stopped or self.waiting or self.partial)

    def flags(self, *names: str) -> set[str]:
        """Flags of the cells whose label holds all `names`, notes included."""
        cells = [(c, f) for c, f in self.judged if set(names) <= set(c.label.split(" / "))]
        return {finding.flag for _, found in cells for finding in found}


def audit(plan: Plan, store: Store, images: int = 0) -> Audit:
    """Judge everything stored of `plan`, with those of its extra cells (`extended`) that have been run.

    Args:
        plan: the grid's.
        store: where its rows are.
        images: see `extras`.

    Raises:
        BenchError: nothing has been run.
    """
    stored = findings(plan, store)
    cells: dict[str, Cell] = {}
    for cell in plan.cells:
        if cell.skip is None:
            cells.setdefault(cell.key, cell)
    stopped = [(c, reason) for c in cells.values() if c.key not in stored and (reason := broken(store, c))]
    if not stored and not stopped:
        raise BenchError(
            f"nothing of {plan.options.grid} has run: python -m bench run --grid {_given(plan, store)}"
        )
    judged = {key: list(found) for key, found in stored.items()}
    not_run = {cell.key for cell, _ in stopped}
    waiting = [
        c
        for key, c in cells.items()
        if key not in judged and key not in not_run and not_applicable(store, c) is None
    ]
    partial = [cells[key] for key in judged if cell_record(store, cells[key]).missing(cells[key].target.ids)]
    idle = (
        [] if any(by_gradient(c.attack) for c in cells.values()) else ["V3, V18: no attack follows gradients"]
    )
    unchecked: dict[str, str] = {}
    possible = extras(plan, images)
    for check in sorted(COSTLY, key=lambda name: int(name[1:])):
        if not any(extra.check == check for extra in possible):
            idle.append(f"{check}: {COSTLY[check]}: no cell here needs or allows it")
    more, missing = extra_findings([e for e in possible if e.parent.key in judged], store)
    for key, found in more.items():
        judged[key].extend(found)
    for check in COSTLY:
        count = sum(extra.check == check for extra in missing)
        if count:
            unchecked[check] = f"{COSTLY[check]} ({count} cells)"
    return Audit(
        [(cells[key], unique(found)) for key, found in judged.items()],
        stopped, waiting, partial, unchecked, idle,
    )  # fmt: skip


def unique(found: Iterable[Finding]) -> list[Finding]:
    """One finding a flag, with all details, suspicions first."""
    out: dict[str, Finding] = {}
    for finding in found:
        known = out.get(finding.flag)
        detail = finding.detail if known is None else f"{known.detail}; {finding.detail}"
        out[finding.flag] = Finding(finding.flag, detail)
    return sorted(out.values(), key=lambda f: (not f.suspect, int(FLAGS[f.flag].check[1:])))


def report(result: Audit, plan: Plan, store: Store) -> list[str]:
    """The audit as lines of text; its commands run as they are."""
    given = _given(plan, store)
    lines = [
        f"{plan.grid.name} on profile {plan.profile}: {len(result.judged)} cells judged, "
        f"{len(result.suspect)} suspect, {len(result.stopped)} stopped by a hard check, {len(result.waiting)} not run"
        + (f", {len(result.partial)} on some of their images only" if result.partial else "")
    ]
    for cell, reason in result.stopped:
        lines += ["", f"STOPPED  {cell.label}  [{cell.key[:12]}]", f"  {reason}"]
    for cell, found in result.suspect:
        lines += ["", f"SUSPECT  {cell.label}  [{cell.key[:12]}]"]
        for finding in found:
            flag = FLAGS[finding.flag]
            numbers = f" ({finding.detail})" if finding.detail else ""
            mark = "" if finding.suspect else "note: "
            lines.append(f"  {flag.check} {finding.flag}: {mark}{flag.text}{numbers}")
            if finding.suspect:
                lines.append(f"      next: {_next(flag.next, cell, given)}")
    quiet = [(cell, found) for cell, found in result.judged if found and not any(f.suspect for f in found)]
    if quiet:
        lines += ["", "Notes, which make nothing suspect:"]
        for cell, found in quiet:
            notes = "; ".join(f"{FLAGS[f.flag].check} {f.flag} ({f.detail})" for f in found)
            lines.append(f"  {cell.label}: {notes}")
    if result.unchecked:
        lines += ["", f"Not checked (python -m bench audit {given} --costly):"]
        lines += [f"  {check}: {what}" for check, what in result.unchecked.items()]
    if result.not_applicable:
        lines += ["", "Not applicable:", *(f"  {reason}" for reason in result.not_applicable)]
    return lines


def judged(plan: Plan, store: Store, images: int = 0) -> tuple[list[str], bool]:
    """The audit of stored rows as lines of text, and whether all is sound; arguments as `audit`."""
    result = audit(plan, store, images)
    return report(result, plan, store), result.sound


def audit_written(
    written: Written, behind: tuple[Plan, Store] | str, images: int = 0
) -> tuple[list[str], bool]:
    """The audit of written results as lines of text, and whether all is sound.

    They are judged from stored rows where the store has those of every cell, and else shown as they are marked: what
    other grids have left in a store says little of these.

    Args:
        written: a folder of results.
        behind: the plan and store of its rows, or why they are not to be had (`Written.behind`).
        images: see `extras`.
    """
    if isinstance(behind, str):
        return _marked(written, behind)
    plan, store = behind
    try:
        result = audit(plan, store, images)
    except BenchError as error:
        return _marked(written, str(error))
    if result.waiting or result.partial:
        lacking = len(result.waiting) + len(result.partial)
        return _marked(written, f"{lacking} of its cells are not in {_here(store.root)}, or on fewer images")
    return report(result, plan, store), result.sound


def _marked(written: Written, why: str) -> tuple[list[str], bool]:
    """What the rows are marked with, and whether all is sound. `why`: they are not judged anew."""
    lines = written.lines
    given = (
        f"{lines['grid'].iloc[0]}.yaml" if written.path is None else str(_here(GRIDS.parent / written.path))
    )
    rows = (
        lines[(lines["cell"] != "") & (lines["status"] != "skip")].drop_duplicates("cell").to_dict("records")
    )
    suspect: list[str] = []
    stopped: list[str] = []
    for row in rows:
        words = (row["role"], row["defense"], row["attack"], row["level_label"])
        label = " / ".join(dict.fromkeys(words)) + f"  [{row['cell'][:12]}]"
        if row["status"] == "error":
            stopped += ["", f"STOPPED  {label}", f"  {row['reason']}"]
        found = [(name, FLAGS[name]) for name in row["flags"] if name in FLAGS]
        if any(flag.level == "flag" for _, flag in found):
            suspect += ["", f"SUSPECT  {label}"]
            for name, flag in found:
                suspect += [f"  {flag.check} {name}: {flag.text}"]
                suspect += [
                    f"      next: {_filled(flag.next, row['level'], row['model'], row['cell'], given)}"
                ]
    count = sum(line.startswith("SUSPECT") for line in suspect)
    waiting = sum(row["status"] in ("pending", "partial") for row in rows)
    head = [
        f"{written.folder}: {len(rows)} cells, {count} suspect, "
        f"{sum(line.startswith('STOPPED') for line in stopped)} stopped by a hard check, {waiting} not run",
        f"As their rows are marked, not judged anew: {why}.",
    ]
    report = written.folder / "audit.txt"
    if report.is_file():
        head.append(f"What each check measured: {report}")
    return [*head, *stopped, *suspect], not (stopped or suspect or waiting)


def _next(text: str, cell: Cell, given: str) -> str:
    return _filled(text, cell.level, cell.target.model.name, cell.key, given)


def _filled(text: str, level: str, model: str, key: str, given: str) -> str:
    for word, value in (("LEVEL", level), ("MODEL", model), ("CELL", key[:12]), ("GRID", given)):
        text = text.replace(word, value)
    return text


def _given(plan: Plan, store: Store) -> str:
    """The grid and what else the plan was made with, as words of a command line."""
    options, root = plan.options, _here(store.root)
    default = root == Path(".bench")
    return shlex.join([str(_here(options.grid)), *options.words(None if default else root)])


def _here(path: Path) -> Path:
    """A path as seen from the working directory: the same text on every machine."""
    return path.relative_to(Path.cwd()) if path.is_absolute() and path.is_relative_to(Path.cwd()) else path
