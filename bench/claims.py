"""The papers' conclusions as data, each tested on results: holds, fails, undecided or not run.

A claim (`results/paper/claims.yaml`) selects lines of the long frame (`bench.frame.cell_frame`), pairs those that agree
in all but what it compares, and says where the difference must lie. A claim about a table or figure looks at that grid
of `grids/papers` alone; any other grid counts for every claim. Two cells with stored rows are compared image by image:
0/1 values by `bench.stats.paired_proportions` and McNemar's exact test, others by `paired_difference`. Where rows are
missing, the interval of a difference comes from the two intervals in the frame (MOVER: Zou and Donner 2008), which is
wider.

A claim about every comparison holds when each of them does, which needs no correction (an intersection-union test); it
fails when one of them fails, and there the level is corrected for their number (Bonferroni).
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from bench.errors import GridError, MissingCheckpoint, NothingLeft, unknown
from bench.files import write_text
from bench.paper import PAPERS, ROOT, frame_metric, values

if TYPE_CHECKING:
    import pandas as pd

    from bench.plan import Plan
    from bench.store import Store

logger = logging.getLogger(__name__)

__all__ = [
    "FIELD",
    "VERDICTS",
    "Claim",
    "Compared",
    "Rows",
    "claims_command",
    "comparisons",
    "evaluate",
    "load_claims",
    "reference_frame",
    "render_claims",
]

VERDICTS = ("holds", "fails", "undecided", "not run")
FIELD = "field"
"""In place of a paper: what the whole field holds of attacks and purifiers."""
KINDS = ("order", "drop", "bound", "sign")
Selector = Mapping[str, Sequence[Any]]

# What lines of one comparison agree in, unless the claim compares just that.
_KEY = (
    "grid",
    "profile",
    "role",
    "dataset",
    "defense",
    "attack",
    "level",
    "sources",
    "seed",
    "image_format",
    "metric",
)
_FREES = {
    "defense": ("defense",),
    "guide": ("defense",),
    "attack": ("attack",),
    "level": ("level", "sources"),
}
_EXTRA = ("profile", "attack_name", "attack_id", "attack_params", "defense_params")
_ALPHA = 0.05
_ABOUT = re.compile(rf"({'|'.join(PAPERS)})_(table|fig)\d+")


# -- claims ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Claim:
    """One conclusion of a paper. Thresholds are in points (percent) for metrics in percent.

    Attributes:
        id: PAPER.NAME, or `FIELD`.NAME.
        statement: what is claimed, in our words; `section` says where in the paper.
        kind: order: `first` is better than `second`, by more than `margin`. drop: the value falls from `second` to
            `first` by at least / at most / to within so much; `relative`: in percent of `second`. bound: the value of
            `where` is at least / at most so much. sign: `first` minus `second` is positive / negative.
        tables, figures: of this paper that the claim is about.
        where: what all lines have: facet -> values, any of them. Facets: task, dataset, role, model, defense, attack,
            level, metric, eps (units of 1/255), source (of transferred images), guide (own: the defense was trained
            for the role it stands in front of; other; none: nothing in it was trained for a role).
        first, second: what each side has besides.
        across: facets in which the two sides may differ besides those they select (role: another model).
        reference: what the paper's own values must have besides.
        ours: the same for lines of `grids/papers`, in its roles; any other grid brings its own data and models.
        at_least, at_most, within, relative, margin, positive: see `kind`.
        over: each comparison, or their mean.
        reading: how a statement without numbers was made exact.
        rerun: it can be tested on results at all.
    """

    id: str
    paper: str
    statement: str
    kind: Literal["order", "drop", "bound", "sign"]
    section: str = ""
    tables: Sequence[str] = ()
    figures: Sequence[str] = ()
    where: Selector = field(default_factory=dict)
    first: Selector = field(default_factory=dict)
    second: Selector = field(default_factory=dict)
    across: Sequence[str] = ()
    reference: Selector = field(default_factory=dict)
    ours: Selector = field(default_factory=dict)
    at_least: float | None = None
    at_most: float | None = None
    within: float | None = None
    relative: bool = False
    margin: float = 0.0
    positive: bool = True
    over: Literal["each", "mean"] = "each"
    reading: str = ""
    rerun: bool = True

    @property
    def grids(self) -> list[str]:
        """Names of the grids under `grids/papers` that are about it."""
        return [f"{self.paper}_{what}" for what in (*self.tables, *self.figures)]

    def named(self) -> dict[str, list[str]]:
        """Defenses and attacks the claim names: each of them must have been run."""
        found: dict[str, dict[str, None]] = {"defense": {}, "attack": {}}
        for selector in (self.where, self.first, self.second):
            for facet in found:
                found[facet].update(dict.fromkeys(selector.get(facet, ())))
        return {facet: list(names) for facet, names in found.items()}


@lru_cache
def _book() -> dict[str, Any]:
    from bench.grid import read_yaml

    return read_yaml(ROOT / "claims.yaml")


def load_claims(papers: Iterable[str] = PAPERS) -> list[Claim]:
    """The shipped claims of some papers, in their order, and those of `FIELD` if asked for.

    Raises:
        GridError: no such paper.
    """
    wanted = list(papers)
    for paper in wanted:
        if paper not in (*PAPERS, FIELD):
            raise GridError(unknown("paper", paper, (*PAPERS, FIELD)))
    return [
        Claim(id=f"{paper}.{name}", paper=paper, **spec)
        for paper, own in {**_book()["claims"], FIELD: _book()[FIELD]}.items()
        for name, spec in own.items()
        if paper in wanted
    ]


# -- lines and what they are ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Line:
    """A line of a frame with what claims ask of it."""

    key: Mapping[str, Any]
    facets: Mapping[str, Any]
    defense: _Plugin
    attack: _Plugin
    cell: str
    value: float
    low: float
    high: float
    scale: float
    higher_is_better: bool
    n: int
    suspect: bool

    @property
    def of_a_paper(self) -> bool:
        """It is of a grid about one table or figure, as those of `grids/papers` are named."""
        return _ABOUT.fullmatch(self.facets["grid"]) is not None

    def matches(self, selector: Selector) -> bool:
        return all(self._one(facet, wanted) for facet, wanted in selector.items())

    def is_a(self, facet: str, name: str) -> bool:
        return _is_a(self.defense if facet == "defense" else self.attack, facet, name, self.facets["role"])

    def _one(self, facet: str, wanted: Sequence[Any]) -> bool:
        if facet in ("defense", "attack"):
            return any(self.is_a(facet, name) for name in wanted)
        found = self.facets[facet]
        if facet == "eps":
            return found is not None and any(
                math.isclose(found, float(value), abs_tol=0.02) for value in wanted
            )
        return found in wanted


class _Plugin(NamedTuple):
    """A defense or attack as a frame names it: its label, and its identity as JSON."""

    label: str
    identity: str


@cache
def _is_a(plugin: _Plugin, facet: str, name: str, role: str) -> bool:
    """It is what claims call `name`: by label, or by registered name, parameters, recipe or members."""
    names = _book()["names"]
    identity = json.loads(plugin.identity)
    known = names[f"{facet}s"].get(name, [{"name": name}])
    if facet == "defense" and _base_role(identity, plugin.label, role) != role:
        # A retrained model is a defense itself, also where the grid calls the empty place before it none.
        known = [pattern for pattern in known if "role" in pattern]
        if name == plugin.label == "none":
            return False
    if name in (plugin.label, identity.get("id")):
        return True
    return any(_fits(pattern, identity, role) for pattern in known)


def _fits(pattern: Mapping[str, Any], identity: Mapping[str, Any], role: str) -> bool:
    if "members" in pattern:
        members = identity.get("members", [])
        return len(members) == len(pattern["members"]) and all(
            _fits(wanted, member, role) for wanted, member in zip(pattern["members"], members, strict=True)
        )
    if "role" in pattern and role != pattern["role"]:
        return False
    if "name" in pattern and identity.get("name") not in _listed(pattern["name"]):
        return False
    if "recipe" in pattern and identity.get("trained", {}).get("recipe") not in _listed(pattern["recipe"]):
        return False
    params = identity.get("params", {})
    return all(_agrees(params.get(name), wanted) for name, wanted in pattern.get("params", {}).items())


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _agrees(found: Any, wanted: Any) -> bool:
    """`*` is any value but null; numbers agree as numbers (8/255)."""
    if wanted == "*":
        return found is not None
    return any(found == option or _number(found) == _number(option) is not None for option in _listed(wanted))


def _number(value: Any) -> Fraction | None:
    try:
        return None if value is None or isinstance(value, bool) else Fraction(str(value))
    except ValueError:
        return None


def _lines(frame: pd.DataFrame) -> list[_Line]:
    """The finished lines of a frame."""
    found = []
    for raw in frame[frame["status"] == "ok"].to_dict("records"):
        line = {str(name): value for name, value in raw.items()}
        identity = json.loads(line["defense_params"])
        params = json.loads(line["attack_params"])
        role = _base_role(identity, str(line["defense"]), str(line["role"]))
        facets = {
            **{name: str(line[name]) for name in ("task", "dataset", "role", "model", "level", "metric")},
            "eps": None if (eps := _number(params.get("eps"))) is None else float(eps * 255),
            "guide": _guide(identity, str(line["role"]), str(line["task"])),
            "source": str(line["level_label"]).partition(" from ")[2],
            "grid": str(line["grid"]),
        }
        attack = json.dumps({"name": line["attack_name"], "id": line.get("attack_id"), "params": params})
        transfer = line["level"] == "transfer"
        key = {**{name: str(line[name]) for name in _KEY if name in line}, "role": role}
        key["sources"] = str(line["level_label"]) if transfer else ""
        found.append(
            _Line(
                key, facets, _Plugin(str(line["defense"]), str(line["defense_params"])),
                _Plugin(str(line["attack"]), attack),
                str(line["cell"]), float(line["value"]), float(line["low"]), float(line["high"]),
                100.0 if line["unit"] == "%" else 1.0, bool(line["higher_is_better"]), int(line["n"]),
                bool(len(line["flags"])),
            )
        )  # fmt: skip
    return found


def _base_role(identity: Mapping[str, Any], label: str, role: str) -> str:
    """The role a line is compared in: adversarial training is a defense of the model that it starts from."""
    names = _book()["names"]
    if identity.get("name") != "none":
        return role
    if role in names["retrained"]:
        return str(names["retrained"][role])
    base, _, suffix = role.rpartition("_")
    # A grid may attack such a model as a target like any other: then it calls the empty place before it none.
    return base if suffix in names["retrained_suffixes"] and label != "none" else role


def _guide(identity: Mapping[str, Any], role: str, task: str) -> str:
    trained = [member["trained"] for member in identity.get("members", [identity]) if "trained" in member]
    if not trained:
        return "none"
    return "own" if all(_own(one, role, task) for one in trained) else "other"


def _own(trained: Mapping[str, Any], role: str, task: str) -> bool:
    """What was trained so, was trained for `role`: roles of equal model and training images share checkpoints."""
    from defenses.training.session import training_role

    try:
        shared = training_role(trained["profile"], role, task) if "profile" in trained else role
    except GridError:
        # A profile known by its path alone.
        shared = role
    return trained.get("role", role) in (role, shared)


def reference_frame(papers: Iterable[str] = PAPERS) -> pd.DataFrame:
    """The papers' own values as a frame of `bench.frame`: exact, so each interval is the value itself.

    `grid` is the table; `role` and `model` are the target model, `defense` and `attack` our ids.
    """
    import pandas as pd

    from bench.tables import COLUMNS

    lines: list[dict[str, Any]] = []
    for paper in papers:
        for value in values(paper):
            if not value.text:
                continue
            # The sets are named after what the attacker had; who guided the denoiser is another matter.
            level, source = value.level, value.source_model
            if value.attack == "black_test_set":
                level, source = "transfer", "IncV4"
            percent = value.metric.endswith("_percent") or value.metric in ("top1", "top5")
            number = value.number / 100 if percent else value.number
            guide = (
                value.source_model
                if value.threat in ("cross_model", "model_transfer")
                else value.target_model
            )
            if value.defense_label == "IncV3 guided LGD":
                guide = "IncV3"
            lines.append(
                {
                    "grid": f"{paper}/{value.table}", "profile": "paper", "cell": "", "role": value.target_model,
                    "task": value.task,
                    "dataset": value.dataset, "model": value.target_model, "defense": value.defense,
                    "attack": value.attack + (f"@{value.eps}" if value.eps else ""), "level": level,
                    "level_label": f"transfer from {source}" if level == "transfer" else level,
                    "seed": 0, "image_format": "float", "metric": frame_metric(value) or value.metric,
                    "unit": "%" if percent else "", "higher_is_better": value.higher_is_better, "value": number,
                    "low": number, "high": number, "n": 0, "n_total": 0, "repeats": 1, "value_worst": math.nan,
                    "status": "ok", "reason": "", "flags": (), "attack_name": "", "attack_id": value.attack,
                    "attack_params": json.dumps({"eps": str(Fraction(value.eps) / 255)} if value.eps else {}),
                    "defense_params": json.dumps({"id": value.defense, "trained": {"role": guide}}),
                }
            )  # fmt: skip
    return pd.DataFrame(lines, columns=[*COLUMNS, *_EXTRA])


# -- comparisons ----------------------------------------------------------------------------------------------------
class Compared(NamedTuple):
    """One comparison of a claim (or one value, for a bound).

    Numbers are in points where the metric is in percent. `effect` is what `Claim.kind` is about, with its 95 %
    interval; `p` is McNemar's, NaN unless both sides are 0/1 values of the same images; `paired` says whether the
    interval is.
    """

    claim: str
    where: str
    first: float
    second: float
    effect: float
    low: float
    high: float
    p: float
    n: int
    paired: bool
    suspect: bool
    verdict: str


class _Interval(NamedTuple):
    value: float
    low: float
    high: float


class Pairing(NamedTuple):
    """Two cells on the same images: difference of a metric (first minus second) and McNemar's p, NaN if not 0/1."""

    value: float
    low: float
    high: float
    p: float


Pair = Callable[[str, str, str, int], "Pairing | None"]
"""Cell, other cell, metric and number of images -> their paired difference; None where rows are missing."""


class Rows:
    """Paired differences from stored rows.

    Args:
        opened: plans with the stores that hold their rows.
    """

    def __init__(self, opened: Iterable[tuple[Plan, Store]]) -> None:
        cells = [(store, cell) for plan, store in opened for cell in plan.cells]
        # A cell's key says nothing of how many images a grid asks for: the one with the most stands for all.
        cells.sort(key=lambda item: len(item[1].target.ids))
        self._cells = {cell.key[:16]: (store, cell) for store, cell in cells}
        self._rows: dict[str, dict[str, dict[str, Any]]] = {}

    def __call__(self, first: str, second: str, metric: str, images: int) -> Pairing | None:
        """First minus second, as a fraction, with its 95 % interval, on the first so many images that both have.

        None where they have fewer in common.
        """
        from bench.frame import Repeated
        from bench.registry import METRICS
        from bench.stats import mcnemar, paired_difference, paired_proportions

        if first not in self._cells or second not in self._cells:
            return None
        common = self._load(first).keys() & self._load(second).keys()
        if len(common) < images:
            return None
        # Another grid may have run one of them on more images.
        ids = [id for id in self._load(first) if id in common][:images]
        sides = [[self._load(cell)[id] for id in ids] for cell in (first, second)]
        plain = METRICS.create(metric)
        repeated = Repeated(plain)
        prepared = [repeated.prepare(rows) for rows in sides]
        single = all(len(row["stats"]) == 1 for rows in sides for row in rows)
        if plain.interval == "wilson" and single and not math.isnan(repeated.value(prepared[0])):
            # Each image's own value: a row's score says whether it is right, which not every such metric is about.
            one, other = ([plain.value(plain.prepare(row["stats"])) for row in rows] for rows in sides)
            return Pairing(*paired_proportions(one, other), mcnemar(one, other))
        found = paired_difference(repeated, prepared[0], prepared[1], len(ids), self._cells[first][1].seed)
        if found.low == found.high:
            # Where all images have the same difference, resampling finds no spread, which does not show that there is
            # none: so many images bound the share of others, of which each counts for 1 at most.
            spread = 1 - (_ALPHA / 2) ** (1 / len(ids)) if plain.unit == "%" else math.inf
            found = found._replace(low=found.value - spread, high=found.value + spread)
        return Pairing(*found, math.nan)

    def _load(self, cell: str) -> dict[str, dict[str, Any]]:
        from bench.frame import load_rows
        from bench.runner import cell_record

        if cell not in self._rows:
            store, found = self._cells[cell]
            rows = load_rows(cell_record(store, found), found.target.ids)
            self._rows[cell] = {row["id"]: row for row in rows}
        return self._rows[cell]


def comparisons(claim: Claim, frame: pd.DataFrame, pair: Pair | None = None) -> list[Compared]:
    """All comparisons the frame allows, each with its own verdict at the 95 % level."""
    return [_judged(claim, item, 1)[0] for item in _measured(claim, _lines(frame), pair)[0]]


def _measured(claim: Claim, lines: Sequence[_Line], pair: Pair | None) -> tuple[list[Compared], list[_Line]]:
    """The comparisons without verdicts, and the lines they used."""
    # A worst case stands for no single attack: it counts only where a claim names it.
    asked = "worst case" in claim.named()["attack"]
    chosen = [
        line for line in lines if line.matches(claim.where) and (asked or line.key["attack"] != "worst case")
    ]
    if claim.kind == "bound":
        items = [
            Compared(
                claim.id, _place(line), line.value * line.scale, math.nan, line.value * line.scale,
                line.low * line.scale, line.high * line.scale, math.nan, line.n, False, line.suspect, "",
            )
            for line in chosen
        ]  # fmt: skip
        return (_mean(items) if claim.over == "mean" and items else items), chosen
    free = set(claim.across)
    for facet in {*claim.first, *claim.second}:
        free.update(_FREES.get(facet, (facet,)))
    sides: list[dict[tuple[Any, ...], list[_Line]]] = []
    for selector in (claim.first, claim.second):
        side: dict[tuple[Any, ...], list[_Line]] = {}
        for line in chosen:
            if line.matches(selector):
                key = tuple(line.key.get(name, "") for name in _KEY if name not in free)
                side.setdefault(key, []).append(line)
        sides.append(side)
    items, seen, used = [], set(), []
    # Of cells that several grids have, those with the most images count.
    for key, firsts in sorted(sides[0].items(), key=lambda item: -max(line.n for line in item[1])):
        for one in firsts:
            for other in sides[1].get(key, ()):
                mark = (one.cell, other.cell, one.key["metric"])
                if one is other or (all(mark[:2]) and mark in seen):
                    continue
                seen.add(mark)
                used += [one, other]
                items.append(_difference(claim, one, other, pair))
    return (_mean(items) if claim.over == "mean" and items else items), used


def _difference(claim: Claim, one: _Line, other: _Line, pair: Pair | None) -> Compared:
    """The effect a claim is about: a combination of both values."""
    better = 1.0 if one.higher_is_better else -1.0
    a, b = {"order": (better, -better), "drop": (-1.0, 1.0), "sign": (1.0, -1.0)}[claim.kind]
    found, p, paired = _combined(a, one, b, other), math.nan, False
    if pair is not None and one.cell and other.cell:
        rows = pair(one.cell, other.cell, one.key["metric"], min(one.n, other.n))
        if rows is not None:
            ends = sorted((a * rows.low, a * rows.high))
            found, p, paired = _Interval(a * rows.value, ends[0], ends[1]), rows.p, True
    scale = one.scale
    if claim.relative:
        # (second - first) / second >= r exactly where (1 - r) second - first >= 0; the interval is that of the second
        # form at the threshold, which no paired rows give.
        share = 1 - (claim.at_least or 0.0) / 100
        found = _combined(-1.0, one, share, other)
        effect, scale, p, paired = 1 - one.value / other.value, 100.0, math.nan, False
        reach = ((found.low - found.value) / other.value, (found.high - found.value) / other.value)
        found = _Interval(effect, effect + reach[0], effect + reach[1])
    return Compared(
        claim.id, _place(one, other), one.value * one.scale, other.value * other.scale, found.value * scale,
        found.low * scale, found.high * scale, p, min(one.n, other.n), paired, one.suspect or other.suspect, "",
    )  # fmt: skip


def _combined(a: float, one: _Line, b: float, other: _Line) -> _Interval:
    """The sum a * first + b * second with its interval from theirs (MOVER)."""
    value = a * one.value + b * other.value
    down = up = 0.0
    for factor, line in ((a, one), (b, other)):
        ends = (line.low, line.high) if factor > 0 else (line.high, line.low)
        down += (factor * (line.value - ends[0])) ** 2
        up += (factor * (ends[1] - line.value)) ** 2
    return _Interval(value, value - math.sqrt(down), value + math.sqrt(up))


def _mean(items: Sequence[Compared]) -> list[Compared]:
    """Their mean; its interval as wide as if all erred together, because they share images."""

    def mean(name: str) -> float:
        return math.fsum(getattr(item, name) for item in items) / len(items)

    return [
        items[0]._replace(
            where=f"mean of {len(items)}", first=mean("first"), second=mean("second"), effect=mean("effect"),
            low=mean("low"), high=mean("high"), p=math.nan, n=min(item.n for item in items),
            paired=all(item.paired for item in items), suspect=any(item.suspect for item in items),
        )
    ]  # fmt: skip


def _place(one: _Line, other: _Line | None = None) -> str:
    """What is compared: what both sides share, and where they differ `first | second`."""
    parts = []
    for name in ("role", "dataset", "defense", "attack", "level", "metric"):
        mine = str(one.key[name])
        theirs = mine if other is None else str(other.key[name])
        if mine not in ("", "clean") or theirs != mine:
            parts.append(mine if mine == theirs else f"{mine or '–'} | {theirs or '–'}")
        elif name == "level":
            parts.append("clean")
    return " / ".join(parts)


def _region(claim: Claim) -> tuple[float, float, bool]:
    """Where the effect must lie, and whether the ends belong to it."""
    if claim.kind == "order":
        return claim.margin, math.inf, False
    if claim.kind == "sign":
        return (0.0, math.inf, False) if claim.positive else (-math.inf, 0.0, False)
    if claim.within is not None:
        return -claim.within, claim.within, True
    low = -math.inf if claim.at_least is None else claim.at_least
    high = math.inf if claim.at_most is None else claim.at_most
    return low, high, True


def _judged(claim: Claim, item: Compared, tests: int) -> tuple[Compared, bool]:
    """The comparison with its verdict at 95 %, and whether it still fails when it is one of so many tests."""
    low, high, closed = _region(claim)
    # Printed numbers are decimal; sums of them in binary miss a closed end by a rounding error.
    slack = 1e-9 if closed else -1e-9
    inside = item.low >= low - slack and item.high <= high + slack
    outside = item.high < low - 1e-9 or item.low > high + 1e-9
    if not math.isnan(item.p) and (low, high) in ((0.0, math.inf), (-math.inf, 0.0)):
        # On few images the bootstrap is too sure of itself; the exact test is not.
        inside, outside = inside and item.p < _ALPHA, outside and item.p < _ALPHA
    verdict = "holds" if inside else "fails" if outside else "undecided"
    factor = _widening(tests)
    wide = (item.effect + (item.low - item.effect) * factor, item.effect + (item.high - item.effect) * factor)
    clear = wide[1] < low - 1e-9 or wide[0] > high + 1e-9
    if not math.isnan(item.p):
        clear = clear and item.p < _ALPHA / tests
    return item._replace(verdict=verdict), verdict == "fails" and clear


@lru_cache
def _widening(tests: int) -> float:
    """How much wider a normal interval is at level 1 - 0.05 / tests."""
    from scipy import stats as scipy_stats

    return float(scipy_stats.norm.ppf(1 - _ALPHA / 2 / tests) / scipy_stats.norm.ppf(1 - _ALPHA / 2))


# -- verdicts -------------------------------------------------------------------------------------------------------
def evaluate(
    claims: Sequence[Claim], frame: pd.DataFrame, pair: Pair | None = None, *, reference: bool = False
) -> pd.DataFrame:
    """Each claim's verdict on a frame, with the numbers of its least favourable comparison.

    Args:
        claims: see `load_claims`.
        frame: of `bench.frame.cell_frame`, or several of them one below the other, or `reference_frame`.
        pair: paired differences from rows, see `Rows`; without it intervals come from the frame alone.
        reference: the frame holds the papers' own values: each claim looks at its paper's tables only.

    Returns:
        One line a claim: claim, paper, tables, section, kind, statement, reading, verdict, reason, compared, held,
        failed, open (numbers of comparisons), missing (what was not run) and the fields of `Compared`.
    """
    import pandas as pd

    lines = _lines(frame)
    rows = []
    for claim in claims:
        if reference:
            own = {"grid": [f"{claim.paper}/{table}" for table in claim.tables], **claim.reference}
            seen = [line for line in lines if line.matches(own)]
        else:
            own = {"grid": claim.grids, **claim.ours}
            seen = [line for line in lines if claim.rerun and (not line.of_a_paper or line.matches(own))]
        rows.append(_row(claim, seen, pair, reference))
    return pd.DataFrame(rows, columns=_COLUMNS)


_COUNTED = {"held": "holds", "failed": "fails", "open": "undecided"}
_COLUMNS = [
    "claim", "paper", "tables", "section", "kind", "statement", "reading", "verdict", "reason", "compared", "held",
    "failed", "open", "missing", "where", "first", "second", "effect", "low", "high", "p", "n", "paired", "suspect",
]  # fmt: skip


def _row(claim: Claim, lines: Sequence[_Line], pair: Pair | None, reference: bool) -> dict[str, Any]:
    items, used = _measured(claim, lines, pair)
    judged = [_judged(claim, item, len(items)) for item in items]
    # Without a single comparison, what no cell at all has says more than what none was compared in.
    missing = [
        name
        for facet, names in claim.named().items()
        for name in names
        if not any(line.is_a(facet, name) for line in used or lines)
    ]
    verdict, reason = _verdict(claim, judged, missing, reference)
    sized = claim.paper != FIELD and (claim.kind in ("drop", "bound") or claim.margin != 0)
    if judged and sized and any(line.key.get("profile") not in ("", "paper") for line in used):
        # Order and sign carry over to other data and models; sizes need not.
        reason = "; ".join(filter(None, [reason, "the threshold is the paper's, on other data"]))
    row: dict[str, Any] = {
        "claim": claim.id, "paper": claim.paper, "tables": ", ".join(claim.tables), "section": claim.section,
        "kind": claim.kind, "statement": claim.statement, "reading": claim.reading, "verdict": verdict,
        "reason": reason, "compared": len(items), "missing": ", ".join(missing),
        **{name: sum(item.verdict == verdict for item, _ in judged) for name, verdict in _COUNTED.items()},
    }  # fmt: skip
    if judged:
        worst = min((item for item, _ in judged), key=lambda item: _distance(claim, item))
        row.update({name: value for name, value in worst._asdict().items() if name not in row})
    return row


def _distance(claim: Claim, item: Compared) -> float:
    """How far inside its region an effect lies; negative outside."""
    low, high, _ = _region(claim)
    return min(item.effect - low, high - item.effect)


def _verdict(
    claim: Claim, judged: Sequence[tuple[Compared, bool]], missing: Sequence[str], reference: bool
) -> tuple[str, str]:
    lacking = f"not run: {', '.join(missing)}" if missing else ""
    if not judged:
        if reference and not claim.tables:
            return "not run", "only a figure shows it"
        if not reference and not claim.rerun:
            return "not run", "cannot be run again"
        return "not run", lacking or "no two finished cells to compare"
    total = len(judged)
    suspect = sum(item.suspect for item, _ in judged)
    remarks = [f"{suspect} of {total} rest on suspect attacks"] if suspect else []
    failed = sum(item.verdict == "fails" for item, _ in judged)
    opened = sum(item.verdict == "undecided" for item, _ in judged)
    if any(certain for _, certain in judged):
        return "fails", "; ".join([f"fails in {failed} of {total}", *remarks])
    if failed:
        remarks.insert(0, f"fails in {failed} of {total}, which may be chance among so many")
    if opened:
        why = "equal as printed" if reference else "the interval covers the threshold: too few images"
        remarks.insert(0, f"{opened} of {total} open, {why}")
    if missing:
        remarks.insert(0, lacking if failed or opened else f"holds where run; {lacking}")
    return ("undecided" if failed or opened or missing else "holds"), "; ".join(remarks)


# -- printing -------------------------------------------------------------------------------------------------------
_FORMATS = ("markdown", "csv")


def render_claims(result: pd.DataFrame, format: str = "markdown", own: pd.DataFrame | None = None) -> str:
    """Verdicts as a table, those on the papers' own numbers beside them if given, and how many there are of each.

    Raises:
        GridError: no such format.
    """
    if format not in _FORMATS:
        raise GridError(unknown("format", format, _FORMATS))
    if format == "csv":
        found = (
            result if own is None else result.assign(paper_verdict=own["verdict"], paper_effect=own["effect"])
        )
        return str(found.to_csv(index=False, lineterminator="\n"))
    from tabulate import tabulate

    heads = ["claim", "verdict", "numbers (least favourable)", "n", "compared", "why", "statement"]
    if own is not None:
        heads.insert(2, "on the paper's numbers")
    rows = []
    for index, line in enumerate(result.to_dict("records")):
        section = f" ({line['section']})" if line["section"] else ""
        statement = f"{line['statement']}{section}" + (
            f"; read as: {line['reading']}" if line["reading"] else ""
        )
        count = f"{line['held']} of {line['compared']}" if line["compared"] else ""
        images = str(int(line["n"])) if line["compared"] and line["n"] else ""
        cells = [line["claim"], line["verdict"], _numbers(line), images, count, line["reason"], statement]
        if own is not None:
            cells.insert(2, own["verdict"].iloc[index])
        rows.append([str(cell).replace("|", "\\|") for cell in cells])
    counted = ", ".join(f"{int((result['verdict'] == verdict).sum())} {verdict}" for verdict in VERDICTS)
    table = tabulate(rows, headers=heads, tablefmt="pipe", disable_numparse=True)
    return f"{table}\n\n{len(rows)} claims: {counted}\n"


def _numbers(line: Mapping[Any, Any]) -> str:
    if not line["compared"]:
        return ""
    interval = "" if line["low"] == line["high"] else f" [{_short(line['low'])}, {_short(line['high'])}]"
    if math.isnan(line["second"]):
        return f"{_short(line['first'])}{interval} ({line['where']})"
    p = "" if math.isnan(line["p"]) else f", p = {line['p']:.2g}"
    sides = f"{_short(line['first'])} and {_short(line['second'])}"
    return f"{_short(line['effect'])}{interval}{p}: {sides} ({line['where']})"


def _short(value: float) -> str:
    # Adding 0 takes the sign off a zero.
    return f"{value + 0.0:.1f}" if abs(value) >= 1 or value == 0 else f"{value:.2g}"


def claims_command(
    what: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RESULTS]...",
            help="Written results that count, results/NAME or results/papers; need no store.",
            show_default=False,
        ),
    ] = None,
    grid: Annotated[
        list[Path] | None,
        typer.Option("--grid", "-g", help="Grid files whose results count; default: grids/papers."),
    ] = None,
    paper: Annotated[
        list[str] | None,
        typer.Option(
            "--paper", help=f"{', '.join(PAPERS)}, or {FIELD}: what all build on; default: the four."
        ),
    ] = None,
    reference: Annotated[
        bool,
        typer.Option(
            "--reference", help="Test the claims on the papers' own numbers; beside results, on both."
        ),
    ] = False,
    profile: Annotated[str | None, typer.Option(help="Profile that binds roles to data and weights.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed, instead of the grids'.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most N images per role.")] = None,
    without: Annotated[
        list[str],
        typer.Option("--without", help="Role, defense or attack that was left out, wherever a grid has it."),
    ] = [],  # noqa: B006
    store: Annotated[
        Path,
        typer.Option(
            "--store", envvar="BENCH_STORE", help="Folder of cached results and adversarial images."
        ),
    ] = Path(".bench"),
    plugin: Annotated[list[Path], typer.Option("--plugin", help="Python file that registers plug-ins.")] = [],  # noqa: B006
    format: Annotated[str, typer.Option("--format", "-f", help=f"{' or '.join(_FORMATS)}.")] = "markdown",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; default: print.")
    ] = None,
) -> None:
    """Which of the papers' conclusions hold on stored or written results; runs nothing.

    Stored rows are compared image by image; of written ones there are the intervals, so that less can be decided.
    """
    from bench.written import check_alone

    claims = load_claims(paper or PAPERS)
    if format not in _FORMATS:
        raise GridError(f"--format: {unknown('format', format, _FORMATS)}")
    own = None
    if reference:
        own = evaluate(claims, reference_frame([p for p in paper or PAPERS if p != FIELD]), reference=True)
    if what:
        if grid:
            raise GridError("give either results/NAME or --grid FILE")
        check_alone(what[0], profile, seed, limit, without)
        text = render_claims(evaluate(claims, _written(what)), format, own)
        if format == "markdown":
            text += (
                "\nOf written results: intervals come from those of the tables; paired by image, from a store, "
                "more is decided.\n"
            )
    elif own is not None and not grid:
        text = render_claims(own, format)
    else:
        frame, pair = _results(grid, profile, seed, limit, without, plugin, store)
        text = render_claims(evaluate(claims, frame, pair), format, own)
    write_text(text, output)


def _written(folders: Sequence[Path]) -> pd.DataFrame:
    """The lines of written results, one below the other; a folder may hold several."""
    import pandas as pd

    from bench.written import read_results

    inside = {folder: sorted(path.parent for path in folder.glob("*/results.csv")) for folder in folders}
    found = [
        one
        for folder in folders
        for one in ([folder] if (folder / "results.csv").is_file() else inside[folder] or [folder])
    ]
    return pd.concat([read_results(one) for one in found], ignore_index=True)


def _results(
    grids: Sequence[Path] | None, profile: str | None, seed: int | None, limit: int | None, without: Sequence[str],
    plugin: Sequence[Path], store: Path,
) -> tuple[pd.DataFrame, Rows]:  # fmt: skip
    """The frames of all grids, one below the other, and their rows."""
    import pandas as pd

    from bench.cli import _open, _options
    from bench.frame import COLUMNS, cell_frame
    from bench.grid import GRIDS, load_grid
    from bench.plan import can_be_left_out
    from bench.store import check_store

    check_store(store, instead="`python -m bench claims results/papers`, and `claims --reference`")
    chosen = list(grids) if grids else sorted((GRIDS / "papers").glob("*.yaml"))
    labels = {path: can_be_left_out(load_grid(path)) for path in chosen}
    for name in without:
        if not any(name in known for known in labels.values()):
            known = set().union(*labels.values())
            raise GridError(f"--without: {unknown('role, defense or attack', name, known)} in these grids")
    opened = []
    for path in chosen:
        gone = [name for name in without if name in labels[path]]
        try:
            opened.append(_open(_options(path, profile, seed, limit, plugin, store, without=gone), store))
        except NothingLeft:
            if grids:
                raise
            logger.warning("left out %s: nothing of it is left", path.name)
        except MissingCheckpoint as error:
            if grids:
                raise
            # Nothing of it can have run as it stands.
            logger.warning("left out %s: it lacks %d trained checkpoints", path.name, len(error.trainings))
    frames = [cell_frame(plan, found) for plan, found in opened]
    plain = [frame.astype(dict.fromkeys(frame.select_dtypes("category"), object)) for frame in frames]
    return pd.concat(plain, ignore_index=True) if plain else pd.DataFrame(columns=COLUMNS), Rows(opened)
