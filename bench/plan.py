"""From a grid to cells: every combination resolved, keyed and, where it cannot be run, skipped with a reason.

A cell is one (role, defense, attack, threat model, seed, image format); its key is a hash of everything that can
change its numbers. A craft is a set of adversarial images; its key holds what the oracle was made of, so that images
crafted without a defense (oblivious, transfer) are shared by the cells of all defenses. Neither key holds device,
batch size, workers, order, paths or the number of images: rows are stored per image, and a larger run reuses them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from bench.chain import Chain
from bench.errors import (
    BenchError,
    GridError,
    MissingCheckpoint,
    NotApplicable,
    NothingLeft,
    PluginError,
    WeightsError,
    listed,
    unknown,
)
from bench.grid import (
    Block,
    DefenseSpec,
    Grid,
    PluginSpec,
    ThreatSpec,
    beside,
    load_grid,
    load_profile,
    profile_names,
    results_folder,
    shipped_profiles,
    split_spec,
)
from bench.keys import content_key
from bench.protocols import Attack, Dataset, Defense, ModelSource, PixelMetric, Site, Task
from bench.registry import ATTACKS, DATASETS, DEFENSES, METRICS, MODELS, TASKS, load_plugin
from bench.threat import settled
from bench.without import cut

CLEAN = "clean"


@dataclass(frozen=True)
class Options:
    """What the command line adds to a grid. All of it except `seed` and `profile` leaves the numbers unchanged.

    Attributes:
        grid: the grid file.
        profile, seed: replace the grid's.
        limit: at most this many images per role.
        batch_size: images per batch; by default the task's.
        plugins: more plug-in files.
        checkpoints: folders of trained checkpoints, besides the shipped ones.
        without: roles, defenses and attacks to leave out, such as those whose files are not there: a label, or
            `defense:LABEL` where an attack is called so, too.
    """

    grid: Path
    profile: str | None = None
    seed: int | None = None
    limit: int | None = None
    batch_size: int | None = None
    plugins: tuple[str, ...] = ()
    checkpoints: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def words(self, store: Path | None = None) -> list[str]:
        """What says the same on a command line, behind the grid; `store` where it is not the default one."""
        words = ["--profile", self.profile] if self.profile is not None else []
        words += ["--seed", str(self.seed)] if self.seed is not None else []
        words += ["--limit", str(self.limit)] if self.limit is not None else []
        words += [word for label in self.without for word in ("--without", label)]
        words += ["--store", str(store)] if store is not None else []
        return words + [word for plugin in self.plugins for word in ("--plugin", plugin)]


@dataclass(frozen=True)
class Target:
    """A role with its data and model."""

    role: str
    task: str
    dataset: Dataset
    model: ModelSource
    ids: tuple[str, ...]

    def data_identity(self) -> dict[str, Any]:
        """The dataset part of a key."""
        return {"task": self.task, "dataset": self.dataset.name, "fingerprint": self.dataset.fingerprint()}


@dataclass(frozen=True)
class Craft:
    """A set of adversarial images to make."""

    key: str
    payload: Mapping[str, Any]
    target: Target
    sources: tuple[Target, ...]
    attack: Attack
    defense: Defense | None
    mode: str
    eot: int

    def cost(self) -> float:
        """Forward-backward passes per image."""
        return float(self.attack.passes() * self.eot * len(self.sources))


@dataclass(frozen=True)
class Cell:
    """One number of a table, per metric."""

    key: str
    payload: Mapping[str, Any]
    target: Target
    defense: Defense
    defense_label: str
    attack: Attack | None
    attack_label: str
    level: str
    level_label: str
    seed: int
    image_format: str
    repeats: int
    craft: Craft | None
    skip: str | None = None
    metrics: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """How messages call the cell."""
        parts = [self.target.role, self.defense_label, self.attack_label]
        if self.attack is not None:
            parts.append(self.level_label)
        return " / ".join(parts) + ("" if self.image_format == "float" else f" [{self.image_format}]")


@dataclass(frozen=True)
class Plan:
    """A grid, resolved.

    Attributes:
        orders: column of the frame -> its labels, in the grid's order.
        left_out: column of the frame -> labels that nothing has, since their blocks are for other profiles or left out.
    """

    grid: Grid
    options: Options
    profile: str
    targets: Mapping[str, Target]
    cells: tuple[Cell, ...]
    orders: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    left_out: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def folder(self) -> Path:
        """Where its results go by default: that of the grid, and one beside it for a run that is not as the grid says.

        results/table1-limit8, so that what is shipped or complete is not written over by less or by something else.
        """
        own, options = results_folder(self.options.grid, self.grid), self.options
        changed = [self.profile] if options.profile not in (None, self.grid.profile) else []
        changed += [f"seed{options.seed}"] if options.seed not in (None, self.grid.seed) else []
        changed += [f"limit{options.limit}"] if options.limit is not None else []
        changed += [f"without_{re.sub(r'[^A-Za-z0-9_.]+', '_', label)}" for label in options.without]
        return own.with_name("-".join([own.name, *changed]))

    def crafts(self) -> dict[str, Craft]:
        """Crafts of all cells, by key."""
        return {cell.craft.key: cell.craft for cell in self.cells if cell.craft is not None}

    def cell(self, name: str) -> Cell:
        """The cell whose key starts with `name` or whose label is `name`.

        Raises:
            GridError: none or several match.
        """
        wanted = " ".join(name.split())
        found = [c for c in self.cells if c.label == wanted or (len(name) >= 4 and c.key.startswith(name))]
        if len({c.key for c in found}) == 1:
            return found[0]
        if found:
            raise GridError(f"cell '{name}' is ambiguous: {', '.join(sorted(c.key[:12] for c in found))}")
        raise GridError(unknown("cell", name, (c.label for c in self.cells)))


def make_plan(options: Options) -> Plan:
    """Resolve a grid into cells.

    Raises:
        MissingCheckpoint: a learned defense has not been trained; it lists everything that is missing.
        BenchError: the grid, the profile or a plug-in is wrong; one line says where.
    """
    grid = load_grid(options.grid)
    for index, plugin in enumerate(grid.plugins):
        load_plugin(beside(options.grid, plugin), f"{options.grid}, plugins[{index}]")
    for plugin in options.plugins:
        load_plugin(Path(plugin), "--plugin")
    return _Planner(grid, options).plan()


class _Planner:
    def __init__(self, grid: Grid, options: Options) -> None:
        self.grid = grid
        self.options = options
        self.source = str(options.grid)
        if options.profile is not None:
            self.profile, self.profile_source = load_profile(options.profile, "--profile")
        else:
            self.profile, self.profile_source = load_profile(
                grid.profile, f"{self.source}, profile", options.grid
            )
        self.seed = grid.seed if options.seed is None else options.seed
        self.metrics = _measured(grid, f"{options.grid}, evaluate.metrics")
        self.targets: dict[str, Target] = {}
        self.crafts: dict[str, Craft] = {}
        self.cells: dict[tuple[str, ...], Cell] = {}
        self.orders: dict[str, dict[str, None]] = {}
        self._defenses: dict[str, tuple[str, Defense]] = {}
        self._attacks: dict[str, tuple[str, Attack]] = {}
        self._resolving: set[str] = set()
        self._placed: dict[tuple[int, str], tuple[Defense, Defense | None]] = {}
        self._others: dict[tuple[int, int], tuple[Defense, Defense]] = {}
        self._missing: dict[str, MissingCheckpoint] = {}
        self._own: dict[tuple[int, str, bool], tuple[Defense | Attack, Defense | Attack]] = {}
        self._said: dict[int, tuple[Defense | Attack, frozenset[str]]] = {}
        self._limited = False
        self._several_eot = _with_several_eot(grid)
        self._check_overrides()
        self._blocks, self._left_out = self._chosen_blocks()
        self._leave_out(options.without)

    def plan(self) -> Plan:
        for index, block in self._left_out.items():
            self._only_check_block(block, f"blocks[{index}]")
        unneeded = _labels(self.grid, self._left_out.values()) - _labels(self.grid, self._blocks.values())
        for label, spec in self.grid.defenses.items():
            if ("defenses", label) in unneeded:
                self._only_check("defenses", spec, f"defenses.{label}")
            else:
                self._defense(spec, f"defenses.{label}", label)
        for label, attack in self.grid.attacks.items():
            if label == CLEAN:
                raise GridError(
                    f"{self.source}, attacks.{label}: '{CLEAN}' is the label of the unattacked images"
                )
            if ("attacks", label) in unneeded:
                self._only_check("attacks", attack, f"attacks.{label}")
            else:
                self._attack(attack, f"attacks.{label}", label)
        for index, block in self._blocks.items():
            self._block(block, f"blocks[{index}]")
        if self._missing:
            errors = list(self._missing.values())
            more = f" (and {len(errors) - 1} more checkpoints)" if len(errors) > 1 else ""
            trainings = [training for error in errors for training in error.trainings]
            raise MissingCheckpoint(f"{self.source}: {errors[0]}{more}", *trainings)
        for name in self.grid.images:
            roles = {target.role for target in self.targets.values()}
            tasks = {target.task for target in self.targets.values()}
            elsewhere = {role for block in self._left_out.values() for role in _roles(block)}
            if name not in roles | tasks | elsewhere | set(self.profile.roles) | set(TASKS):
                raise GridError(f"{self.source}, images: {unknown('role or task', name, roles | tasks)}")
        left_out = {
            column: frozenset(
                label for block in self._left_out.values() for label in labels(block, self._several_eot)
            )
            - frozenset(self.orders.get(column, ()))
            for column, labels in _COLUMNS.items()
        }
        return Plan(
            self._cut_grid(left_out) if self._left_out else self.grid,
            self.options,
            self.profile.name,
            self.targets,
            tuple(self.cells.values()),
            {column: tuple(values) for column, values in self.orders.items()},
            left_out,
        )

    def _cut_grid(self, left_out: Mapping[str, frozenset[str]]) -> Grid:
        """The grid with tables and figures of what is left."""
        tasks = {target.task for target in self.targets.values()}
        metrics = {name for task in tasks for name in TASKS.resolve(task).metrics} | set(self.metrics)
        gone = {
            **left_out, "task": frozenset(TASKS.names()) - tasks, "metric": frozenset(METRICS.names()) - metrics,
        }  # fmt: skip
        cells = [
            {"role": cell.target.role, "task": cell.target.task, "defense": cell.defense_label, "level": cell.level,
             "attack": cell.attack_label, "level_label": cell.level_label}
            for cell in self.cells.values()
        ]  # fmt: skip
        return cut(self.grid, gone, cells)

    # -- what is for other profiles ----------------------------------------------------------------------------------
    def _chosen_blocks(self) -> tuple[dict[int, Block], dict[int, Block]]:
        """The blocks for this profile and those for others, by their places in the grid."""
        known = {*shipped_profiles(), self.profile.name}
        for index, block in enumerate(self.grid.blocks):
            for i, name in enumerate(block.profiles):
                beside_it = set() if name in known else profile_names(self.options.grid.expanduser().parent)
                if name not in known | beside_it:
                    at = f"{self.source}, blocks[{index}].profiles[{i}]"
                    raise GridError(f"{at}: {unknown('profile', name, known | beside_it)}")
        chosen = {i: block for i, block in enumerate(self.grid.blocks) if block.is_for(self.profile.name)}
        if not chosen:
            names = {name for block in self.grid.blocks for name in block.profiles}
            raise GridError(
                f"{self.source}, blocks: none is for profile {self.profile.name}, all are for {listed(sorted(names))}"
            )
        return chosen, {i: block for i, block in enumerate(self.grid.blocks) if i not in chosen}

    def _leave_out(self, names: Sequence[str]) -> None:
        """Take roles, defenses and attacks out of the chosen blocks, and with them what needs them."""
        if not names:
            return
        known = _labels_by_kind(self.grid)
        gone: dict[str, set[str]] = {kind: set() for kind in known}
        for name in names:
            kind, _, label = name.partition(":")
            found = [(kind, label)] if kind in known else [(k, name) for k in known if name in known[k]]
            if len(found) > 1:
                ways = " or ".join(f"{k}:{name}" for k, _ in found)
                raise GridError(
                    f"--without {name}: several things of {self.source} are called so: expected {ways}"
                )
            if not found or found[0][1] not in known[found[0][0]]:
                near = unknown("role, defense or attack", name, can_be_left_out(self.grid))
                raise GridError(f"--without: {near} in {self.source}")
            gone[found[0][0]].add(found[0][1])
        for index, block in list(self._blocks.items()):
            left: dict[str, list[Any]] = {
                "roles": [role for role in block.roles if role not in gone["role"]],
                "defenses": [spec for spec in block.defenses if not self._has(spec, gone["defense"])],
                "attacks": [spec for spec in block.attacks if _shown(spec) not in gone["attack"]],
                "threats": [
                    threat for threat in block.threats
                    if not gone["role"].intersection(threat.sources)
                    and not (threat.surrogate is not None and self._has(threat.surrogate, gone["defense"]))
                ],
            }  # fmt: skip
            if all(len(kept) == len(getattr(block, key)) for key, kept in left.items()):
                continue
            self._left_out[index] = block
            if all(left.values()):
                self._blocks[index] = block.model_copy(update=left)
            else:
                del self._blocks[index]
        if not self._blocks:
            raise NothingLeft(f"--without: nothing of {self.source} is left")

    def _has(self, spec: DefenseSpec, labels: Set[str], inside: Set[str] = frozenset()) -> bool:
        """Whether a defense, or one that it is a chain of, is called so."""
        shown = _shown(spec)
        if shown in labels or shown in inside:
            return shown in labels
        members = self.grid.defenses.get(spec) if isinstance(spec, str) else spec
        return isinstance(members, list) and any(self._has(m, labels, inside | {shown}) for m in members)

    def _only_check_block(self, block: Block, where: str) -> None:
        """What a block that is left out says in place of labels."""
        for i, spec in enumerate(block.defenses):
            if not (isinstance(spec, str) and spec in self.grid.defenses):
                self._only_check("defenses", spec, f"{where}.defenses[{i}]")
        for i, attack in enumerate(block.attacks):
            if not (isinstance(attack, str) and attack in self.grid.attacks):
                self._only_check("attacks", attack, f"{where}.attacks[{i}]")

    def _only_check(self, kind: Literal["defenses", "attacks"], spec: DefenseSpec, where: str) -> None:
        """Name and parameters of what only other profiles have, made of nothing: its files may not be there."""
        if isinstance(spec, list):
            for i, member in enumerate(spec):
                if not (isinstance(member, str) and member in self.grid.defenses):
                    self._only_check(kind, member, f"{where}[{i}]")
            return
        at = f"{self.source}, {where}"
        registry, labels = (
            (DEFENSES, self.grid.defenses) if kind == "defenses" else (ATTACKS, self.grid.attacks)
        )
        name, params, _ = split_spec(_as_library(spec) if kind == "attacks" else spec, at)
        if name not in registry.names():
            raise GridError(f"{at}: {unknown(registry.kind, name, {*registry.names(), *labels})}")
        registry.validate(name, params, at)

    # -- what the profile gives in place of the grid -----------------------------------------------------------------
    def _check_overrides(self) -> None:
        for name, entry in self.profile.overrides.items():
            at = f"{self.profile_source}, overrides"
            if name not in self.profile.roles and name not in TASKS.names():
                raise GridError(
                    f"{at}: {unknown('role or task', name, [*self.profile.roles, *TASKS.names()])}"
                )
            for kind, changes, known in (
                ("defense", entry.defenses, DEFENSES.names()),
                ("attack", entry.attacks, ATTACKS.names()),
            ):
                for plugin in changes:
                    if plugin not in known:
                        raise GridError(f"{at}.{name}.{kind}s: {unknown(kind, plugin, known)}")

    def _overridden(
        self, kind: Literal["defenses", "attacks"], plugin: str, target: Target
    ) -> dict[str, Any]:
        entry = self.profile.overrides.get(target.role, self.profile.overrides.get(target.task))
        return {} if entry is None else getattr(entry, kind).get(plugin, {})

    def _changes(
        self, kind: Literal["defenses", "attacks"], plugin: Defense | Attack, target: Target
    ) -> dict[str, Any]:
        """What the profile replaces of a plug-in's parameters on the data of `target`."""
        changes = self._overridden(kind, plugin.name, target)
        # A block that names its profiles says for them what it says.
        kept = self._said[id(plugin)][1] if self._limited and id(plugin) in self._said else ()
        return {name: value for name, value in changes.items() if name not in kept}

    def _own_defense(self, defense: Defense, target: Target) -> Defense:
        """`defense` with the parameters that the profile gives it on the data of `target`."""
        key = (id(defense), target.role, self._limited)
        if key not in self._own:
            own = defense
            if isinstance(defense, Chain):
                members = [self._own_defense(member, target) for member in defense.members]
                if any(a is not b for a, b in zip(members, defense.members, strict=True)):
                    own = Chain(members)
            elif changes := self._changes("defenses", defense, target):
                at = f"{self.profile_source}, overrides, role {target.role}"
                own = DEFENSES.create(defense.name, {**defense.params, **changes}, at)
                own.eval().requires_grad_(False)
            # With the original, which must live as long as its id is a key.
            self._own[key] = (defense, own)
        return cast(Defense, self._own[key][1])

    def _own_attack(self, attack: Attack, target: Target) -> Attack:
        """`attack` with the parameters that the profile gives it on the data of `target`."""
        key = (id(attack), target.role, self._limited)
        if key not in self._own:
            own = attack
            if changes := self._changes("attacks", attack, target):
                at = f"{self.profile_source}, overrides, role {target.role}"
                own = ATTACKS.create(attack.name, {**attack.params, **changes}, at)
            self._own[key] = (attack, own)
        return cast(Attack, self._own[key][1])

    # -- resolution -----------------------------------------------------------------------------------------------
    def _target(self, role: str, where: str) -> Target:
        if role in self.targets:
            return self.targets[role]
        if role not in self.profile.roles:
            raise GridError(f"{self.source}, {where}: {unknown('role', role, self.profile.roles)}")
        binding = self.profile.roles[role]
        at = f"{self.profile_source}, roles.{role}"
        name, params, _ = split_spec(binding.dataset, f"{at}.dataset")
        dataset: Dataset = DATASETS.create(name, params, f"{at}.dataset")
        name, params, _ = split_spec(binding.model, f"{at}.model")
        model: ModelSource = MODELS.create(name, params, f"{at}.model")
        if dataset.task != model.task:
            raise GridError(f"{at}: dataset is for task {dataset.task}, the model for task {model.task}")
        ids = list(dataset.ids())
        limit = self.grid.images.get(role, self.grid.images.get(dataset.task))
        if limit is not None and limit > len(ids):
            raise GridError(
                f"{self.source}, images: {limit} images asked for {role}, dataset {dataset.name} has {len(ids)}"
            )
        ids = ids[: min(x for x in (limit, self.options.limit, len(ids)) if x is not None)]
        target = Target(role, dataset.task, dataset, model, tuple(ids))
        self.targets[role] = target
        return target

    def _defense(self, spec: DefenseSpec, where: str, label: str | None = None) -> tuple[str, Defense]:
        at = f"{self.source}, {where}"
        if isinstance(spec, list):
            if label is not None and label in self._defenses:
                return self._defenses[label]
            if not spec:
                raise GridError(f"{at}: expected at least one defense, got an empty list")
            members = [self._defense(s, f"{where}[{i}]") for i, s in enumerate(spec)]
            chain = Chain([member for _, member in members])
            name = label or " + ".join(name for name, _ in members)
            return self._defenses.setdefault(name, (name, chain)) if label else (name, chain)
        if label is None and isinstance(spec, str):
            if spec in self._resolving:
                raise GridError(f"{at}: '{spec}' is defined by itself")
            if spec not in self._defenses and spec in self.grid.defenses:
                # A chain may name a label that the file defines further down.
                self._resolving.add(spec)
                self._defense(self.grid.defenses[spec], f"defenses.{spec}", spec)
                self._resolving.discard(spec)
            if spec in self._defenses:
                return self._defenses[spec]
        if label is not None and label in self._defenses:
            return self._defenses[label]
        name, params, own = split_spec(spec, at)
        if name not in DEFENSES.names():
            raise GridError(f"{at}: {unknown('defense', name, {*DEFENSES.names(), *self.grid.defenses})}")
        defense: Defense = DEFENSES.create(name, params, at)
        defense.eval().requires_grad_(False)
        # With the plug-in, which must live as long as its id is a key.
        self._said[id(defense)] = (defense, frozenset(params))
        shown = label or own or _label(name, params)
        if label or own:
            self._defenses[shown] = (shown, defense)
        return shown, defense

    def _place(self, defense: Defense, role: str) -> Defense | None:
        """`defense` in front of `role`; None, and noted, when it has not been trained.

        Raises:
            NotApplicable: it cannot be trained for this role.
        """
        key = (id(defense), role)
        if key not in self._placed:
            site = Site(self.profile_source, role, tuple(Path(p) for p in self.options.checkpoints))
            placed: Defense | None = None
            try:
                placed = defense.placed(site)
            except MissingCheckpoint as error:
                self._missing.setdefault(str(error), error)
            except PluginError as error:
                raise PluginError(f"{self.source}, role {role}: {error}") from error
            # With the original, which must live as long as its id is a key.
            self._placed[key] = (defense, placed)
        return self._placed[key][1]

    def _surrogate(self, target: Target, original: Defense, threat: ThreatSpec, where: str) -> Defense | None:
        """The defense that the attacker trained; None when it is missing."""
        if threat.surrogate is None:
            other = self._retrained(original, int(threat.surrogate_seed or 0))
        else:
            other = self._own_defense(self._defense(threat.surrogate, f"{where}.surrogate")[1], target)
        return self._place(other, target.role)

    def _retrained(self, defense: Defense, seed: int) -> Defense:
        key = (id(defense), seed)
        if key not in self._others:
            self._others[key] = (defense, defense.retrained(seed))
        return self._others[key][1]

    def _attack(self, spec: PluginSpec, where: str, label: str | None = None) -> tuple[str, Attack]:
        at = f"{self.source}, {where}"
        if label is None and isinstance(spec, str) and spec in self._attacks:
            return self._attacks[spec]
        name, params, own = split_spec(_as_library(spec), at)
        if name not in ATTACKS.names():
            raise GridError(f"{at}: {unknown('attack', name, {*ATTACKS.names(), *self.grid.attacks})}")
        attack: Attack = ATTACKS.create(name, params, at)
        self._said[id(attack)] = (attack, frozenset(params))
        shown = label or own or _label(name, params)
        if label or own:
            self._attacks[shown] = (shown, attack)
        return shown, attack

    # -- expansion ------------------------------------------------------------------------------------------------
    def _block(self, block: Block, where: str) -> None:
        self._limited = bool(block.profiles)
        targets = [self._target(role, f"{where}.roles[{i}]") for i, role in enumerate(block.roles)]
        defenses = [self._defense(spec, f"{where}.defenses[{i}]") for i, spec in enumerate(block.defenses)]
        attacks = [self._attack(spec, f"{where}.attacks[{i}]") for i, spec in enumerate(block.attacks)]
        for target in targets:
            for i, (label, attack) in enumerate(attacks):
                self._check_attack(self._own_attack(attack, target), label, target, f"{where}.attacks[{i}]")
            for defense_label, given in defenses:
                defense = self._own_defense(given, target)
                if block.clean:
                    self._add(target, defense_label, defense, CLEAN, None, None, where)
                for threat_index, threat in enumerate(block.threats):
                    for attack_label, attack in attacks:
                        at = f"{where}.threats[{threat_index}]"
                        own = self._own_attack(attack, target)
                        self._add(target, defense_label, defense, attack_label, own, threat, at)

    def _check_attack(self, attack: Attack, label: str, target: Target, where: str) -> None:
        if attack.tasks is not None and target.task not in attack.tasks:
            raise GridError(
                f"{self.source}, {where}: attack '{label}' cannot attack role {target.role} (task {target.task}); "
                f"it is for {', '.join(sorted(attack.tasks))}"
            )
        task: type[Task] = TASKS.resolve(target.task)
        for kind in attack.loss_kinds():
            if kind not in task.losses:
                raise GridError(
                    f"{self.source}, {where}: attack '{label}' on role {target.role}: "
                    + unknown(f"loss of task {target.task}", kind, task.losses)
                )
        # Not every dataset knows its classes before its files are read; the model is asked again when it runs.
        count = len(getattr(target.dataset, "classes", ()))
        if count:
            try:
                attack.check_classes(count)
                if attack.target is not None:
                    task_instance(target.task).check_target(attack.target, count)
            except GridError as error:
                raise GridError(
                    f"{self.source}, {where}, attack '{label}' on role {target.role}: {error}"
                ) from None

    def _shared(self, attack: Attack, level: str, defense: Defense) -> bool:
        """Whether fooled images may leave the attack: only the pipeline that it attacks will see them, as it did."""
        if self.grid.full_course and "gradient" in attack.needs:
            return False
        judged_here = level in ("bpda", "white_box") and not _bare(defense)
        return judged_here and not defense.stochastic and self.grid.evaluate.formats == ["float"]

    def _add(
        self,
        target: Target,
        defense_label: str,
        defense: Defense,
        attack_label: str,
        attack: Attack | None,
        threat: ThreatSpec | None,
        where: str,
    ) -> None:
        craft: Craft | None = None
        skip: str | None = None
        original = defense
        level, level_label = CLEAN, CLEAN
        if defense.unavailable is not None:
            skip = defense.unavailable
        elif defense.tasks is not None and target.task not in defense.tasks:
            skip = f"defense '{defense_label}' is for {', '.join(sorted(defense.tasks))}, not {target.task}"
        else:
            try:
                placed = self._place(defense, target.role)
            except NotApplicable as reason:
                skip = reason.reason
            else:
                if placed is None:
                    if threat is not None and threat.behind_surrogate:
                        with contextlib.suppress(NotApplicable):
                            self._surrogate(target, original, threat, where)  # to note that it is missing too
                    return
                defense = placed
        if attack is not None and threat is not None:
            level = threat.level
            level_label = self._level_label(threat, where)
            if skip is None:
                attack = settled(attack, target.task, self._shared(attack, level, defense))
                try:
                    craft = self._craft(target, original, defense, attack, threat, where)
                except NotApplicable as reason:
                    skip = reason.reason
                if craft is None and skip is None:
                    return
        for image_format in self.grid.evaluate.formats:
            identity = (target.role, defense_label, attack_label, level_label, image_format)
            if identity in self.cells:
                self._check_same(self.cells[identity], craft, where)
                continue
            repeats = self.grid.evaluate.repeats if defense.stochastic else 1
            payload: dict[str, Any] = {
                "kind": "cell",
                "data": target.data_identity(),
                "input": target.model.input_spec(),
                "target": target.model.identity(),
                "defense": defense.identity() if skip is None else _told(defense),
                "craft": None if craft is None else craft.payload,
                "image_format": image_format,
                "repeats": repeats,
                "seed": self.seed,
            }
            if self.metrics:
                payload["metrics"] = list(self.metrics)
            if skip is not None:
                payload["skip"] = [attack_label, level_label, skip]
            self.cells[identity] = Cell(
                content_key(payload), payload, target, defense, defense_label, attack, attack_label,
                level, level_label, self.seed, image_format, repeats, None if skip else craft, skip, self.metrics,
            )  # fmt: skip
            for column, value in zip(
                ("role", "defense", "attack", "level_label", "image_format", "task", "level"),
                (*identity, target.task, level),
                strict=True,
            ):
                self.orders.setdefault(column, {}).setdefault(value)

    def _check_same(self, known: Cell, craft: Craft | None, where: str) -> None:
        """Blocks may name a cell twice, but not mean two things by it: the second would never run."""
        if known.craft is None or craft is None or known.craft.key == craft.key:
            return
        how = (
            f"eot {known.craft.eot}, here {craft.eot}; list both in the threats of one block, and the level says which"
            if known.craft.eot != craft.eot
            else "other settings; give one of them a name of its own"
        )
        raise GridError(f"{self.source}, {where}: '{known.label}' is in an earlier block with {how}")

    def _level_label(self, threat: ThreatSpec, where: str) -> str:
        if threat.surrogate is None:
            return _shown_level(threat, self._several_eot)
        label, _ = self._defense(threat.surrogate, f"{where}.surrogate")
        return _shown_level(threat, self._several_eot, label)

    def _craft(
        self,
        target: Target,
        original: Defense,
        defense: Defense,
        attack: Attack,
        threat: ThreatSpec,
        where: str,
    ) -> Craft | None:
        """The adversarial images a cell needs; None when a surrogate has not been trained.

        Args:
            original: the defense as the grid gives it; `defense` is the same with the role's weights.
        """
        sources: tuple[Target, ...] = (target,)
        behind: Defense | None = None
        mode = "none"
        if threat.level == "transfer":
            sources = tuple(self._target(role, f"{where}.sources") for role in threat.sources)
            for source in sources:
                if source.task != target.task:
                    raise GridError(
                        f"{self.source}, {where}.sources: {source.role} is a {source.task} model, "
                        f"{target.role} needs {target.task}"
                    )
                if source.role == target.role:
                    raise NotApplicable(f"transfer from {source.role} to itself is not a transfer")
        if threat.behind_surrogate:
            behind = self._surrogate(target, original, threat, where)
            if behind is None:
                return None
            mode = "exact"
        elif threat.level in ("bpda", "white_box"):
            behind, mode = defense, "exact" if threat.level == "white_box" else "bpda"
        if behind is not None and _bare(behind):
            behind, mode = None, "none"
        by_scores = "gradient" not in attack.needs
        if mode == "exact" and behind is not None and not (behind.differentiable or by_scores):
            raise NotApplicable("the defense is not differentiable: no true gradient exists (bpda applies)")
        if mode == "bpda" and by_scores:
            mode = "exact"  # the same values, and nothing else is asked for
        if not attack.needs:
            # An attack that never asks the victim makes the same images at every level.
            sources, behind, mode = (target,), None, "none"
        eot = threat.eot if behind is not None and behind.stochastic else 1
        payload: dict[str, Any] = {
            "kind": "craft",
            "data": target.data_identity(),
            "input": target.model.input_spec(),
            "oracle": {
                "models": [source.model.identity() for source in sources] if attack.needs else [],
                "defense": None if behind is None else behind.identity(),
                "mode": "bpda where not differentiable" if mode == "bpda" and _mixed(behind) else mode,
                "eot": eot,
            },
            "attack": attack.identity(),
            "seed": self.seed,
        }
        if by_scores and attack.needs and behind is not None and behind.stochastic:
            payload["oracle"]["scores"] = "mean over draws"
        payload["oracle"].update(reference_of(attack, behind))
        key = content_key(payload)
        if key not in self.crafts:
            self.crafts[key] = Craft(key, payload, target, sources, attack, behind, mode, eot)
        return self.crafts[key]


def _roles(block: Block) -> Iterator[str]:
    """Every role of a block, those of its transfers too."""
    yield from block.roles
    for threat in block.threats:
        yield from threat.sources


def was_left_out(grid: Grid, profile: str, there: Mapping[str, Collection[str]]) -> tuple[str, ...]:
    """What `--without` took out of a run, as it takes it.

    Args:
        grid: what was run.
        profile: the name of the profile that it was run on.
        there: role, defense and attack -> the labels of the lines that came out.
    """
    gone = {
        f"{kind}:{label}": None
        for block in grid.blocks if block.is_for(profile)
        for kind, labels in there.items()
        for label in _COLUMNS[kind](block, frozenset()) if label not in labels
    }  # fmt: skip
    return tuple(gone)


def can_be_left_out(grid: Grid) -> set[str]:
    """What `--without` takes: labels of roles, defenses and attacks, plain and behind their kind (`role:ssd`)."""
    return {
        name for kind, labels in _labels_by_kind(grid).items() for x in labels for name in (x, f"{kind}:{x}")
    }


def _labels_by_kind(grid: Grid) -> dict[str, set[str]]:
    surrogates = (threat.surrogate for block in grid.blocks for threat in block.threats if threat.surrogate)
    return {
        "role": {role for block in grid.blocks for role in _roles(block)},
        "defense": {*grid.defenses, *(_shown(spec) for block in grid.blocks for spec in block.defenses),
                    *map(_shown, surrogates)},
        "attack": {*grid.attacks, *(_shown(spec) for block in grid.blocks for spec in block.attacks)},
    }  # fmt: skip


def _shown(spec: DefenseSpec) -> str:
    """What a defense or an attack is called in tables, before it is made."""
    if isinstance(spec, list):
        return " + ".join(_shown(member) for member in spec)
    if isinstance(spec, str):
        return spec
    name, params, own = split_spec(_as_library(spec), "")
    return own or _label(name, params)


def _but_eot(threat: ThreatSpec) -> str:
    """What threats that differ in the number of draws alone have in common."""
    return threat.model_dump_json(exclude={"eot"})


def _with_several_eot(grid: Grid) -> set[str]:
    """Levels (`_but_eot`) that some block has with several numbers of draws: in every block their labels say which."""
    return {
        _but_eot(one)
        for block in grid.blocks
        for one, other in itertools.combinations(block.threats, 2)
        if one.eot != other.eot and _but_eot(one) == _but_eot(other)
    }


def _shown_level(threat: ThreatSpec, several_eot: Set[str], surrogate: str | None = None) -> str:
    """A level and its settings as in tables; `surrogate` is the label of its defense where that has been made."""
    label: str = threat.level
    if threat.sources:
        label += " from " + "+".join(threat.sources)
    if threat.surrogate_seed is not None:
        label += f" via seed {threat.surrogate_seed}"
    elif threat.surrogate is not None:
        label += " via " + (surrogate or _shown(threat.surrogate))
    return f"{label} (EOT {threat.eot})" if several_eot and _but_eot(threat) in several_eot else label


_COLUMNS: dict[str, Callable[[Block, Set[str]], Iterable[str]]] = {
    "role": lambda block, _: block.roles,
    "defense": lambda block, _: map(_shown, block.defenses),
    "attack": lambda block, _: map(_shown, block.attacks),
    "level": lambda block, _: (threat.level for threat in block.threats),
    "level_label": lambda block, several_eot: (_shown_level(t, several_eot) for t in block.threats),
}
"""Column of the frame -> a block's labels of it, given the levels that the grid has with several numbers of draws."""


def _labels(grid: Grid, blocks: Iterable[Block]) -> set[tuple[str, str]]:
    """Labels of the grid's defenses and attacks that blocks use, those inside chains too: (defenses, LABEL)."""
    found: set[tuple[str, str]] = set()
    for block in blocks:
        found |= {
            ("attacks", spec) for spec in block.attacks if isinstance(spec, str) and spec in grid.attacks
        }
        open_: list[Any] = [*block.defenses, *(threat.surrogate for threat in block.threats)]
        while open_:
            spec = open_.pop()
            if isinstance(spec, list):
                open_ += spec
            elif isinstance(spec, str) and spec in grid.defenses and ("defenses", spec) not in found:
                found.add(("defenses", spec))
                # Outside a chain a label means a registered name, not another label.
                open_ += grid.defenses[spec] if isinstance(grid.defenses[spec], list) else []
    return found


def _as_library(spec: PluginSpec) -> PluginSpec:
    """An attack of another library, which needs no name."""
    if isinstance(spec, Mapping) and "library" in spec and "name" not in spec:
        return {"name": "library", **spec}
    return spec


def reference_of(attack: Attack, behind: Defense | None) -> dict[str, str]:
    """What a craft's key says of the clean images' own outputs, where the attack compares with them."""
    drawn = attack.compares and behind is not None and behind.stochastic
    return {"reference": "of the same draw"} if drawn else {}


def _bare(defense: Defense) -> bool:
    """Whether it is no defense."""
    return defense.identity().get("name") == "none"


def _told(defense: Defense) -> dict[str, Any]:
    """The identity of a defense that may never have been trained."""
    try:
        return defense.identity()
    except WeightsError:
        return {"name": defense.name, "params": dict(defense.params)}


def _mixed(defense: Defense | None) -> bool:
    return isinstance(defense, Chain) and defense.mixed


def _label(name: str, params: Mapping[str, Any]) -> str:
    if set(params) == {"id"}:
        return f"{name}:{params['id']}"
    return name + (f"({', '.join(f'{k}={v}' for k, v in params.items())})" if params else "")


def _measured(grid: Grid, where: str) -> tuple[str, ...]:
    """The metrics taken from pixels that a grid asks for."""
    if not grid.evaluate.metrics:
        return ()
    known = [name for name in METRICS.names() if issubclass(METRICS.resolve(name), PixelMetric)]
    for name in grid.evaluate.metrics:
        if name not in known:
            raise GridError(f"{where}: {unknown('metric taken from pixels', name, known)}")
    return tuple(dict.fromkeys(grid.evaluate.metrics))


@functools.cache
def task_instance(name: str) -> Task:
    """The registered task `name`."""
    task: Task = TASKS.create(name)
    return task


__all__ = [
    "CLEAN",
    "BenchError",
    "Cell",
    "Craft",
    "Options",
    "Plan",
    "PluginError",
    "Target",
    "make_plan",
]
