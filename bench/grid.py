"""Grid files: what to cross, on which profile, and which tables to print.

A grid is YAML validated by the models below (`python -m bench schema` prints their JSON schema for editors). Every
mistake is reported as one line with the file, the key and the nearest valid name.
"""

from __future__ import annotations

import contextlib
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from bench.errors import GridError, expected, listed, unknown
from bench.figures import FigureSpec
from bench.tables import Header, TableSpec

ROOT = Path(__file__).resolve().parent.parent
GRIDS = ROOT / "grids"
PROFILES = GRIDS / "profiles"

Level = Literal["oblivious", "transfer", "gray_box", "bpda", "white_box"]
ImageFormat = Literal["float", "uint8"]

PluginSpec = str | dict[str, Any]
DefenseSpec = str | dict[str, Any] | list[str | dict[str, Any]]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class ThreatSpec(_Strict):
    """How much the attacker knows.

    `oblivious`: gradients of the bare target. `transfer`: gradients of other models (`sources`), bare or behind a
    surrogate. `gray_box`: gradients of the target behind a `surrogate` defense, or behind the deployed one trained anew
    with `surrogate_seed`. `bpda`:
    forward through the defense, backward through its stand-in. `white_box`: true gradient through the defense. Where a
    defense draws random numbers, gradients are averaged over `eot` draws; where a block has a level with several
    numbers of draws, the level's label names them ("white_box (EOT 5)").
    """

    level: Level
    sources: list[str] = Field(
        default_factory=list, description="transfer: roles whose models craft the images"
    )
    surrogate: DefenseSpec | None = Field(
        default=None, description="gray_box, transfer: the defense the attacker trained"
    )
    surrogate_seed: int | None = Field(
        default=None,
        ge=0,
        description="gray_box, transfer: or the deployed defense, trained with this other seed",
    )
    eot: int = Field(default=10, ge=1, description="gradient draws per step for stochastic defenses")

    @model_validator(mode="after")
    def _complete(self) -> ThreatSpec:
        if self.level == "transfer" and not self.sources:
            raise ValueError("level transfer needs `sources`, a list of roles")
        if self.level != "transfer" and self.sources:
            raise ValueError(f"`sources` belongs to level transfer, not {self.level}")
        given = [key for key in ("surrogate", "surrogate_seed") if getattr(self, key) is not None]
        if (self.level == "gray_box" and not given) or len(given) == 2:
            raise ValueError(f"level {self.level} needs a `surrogate` defense or a `surrogate_seed`")
        if given and self.level not in ("gray_box", "transfer"):
            raise ValueError(f"`{given[0]}` belongs to levels gray_box and transfer, not {self.level}")
        return self

    @property
    def behind_surrogate(self) -> bool:
        """The attacker's gradients go through a defense of its own."""
        return self.surrogate is not None or self.surrogate_seed is not None


Threat = Annotated[
    ThreatSpec,
    BeforeValidator(
        lambda item: {"level": item} if isinstance(item, str) else item,
        json_schema_input_type=Level | ThreatSpec,
    ),
]


class Evaluate(_Strict):
    """How defended predictions are taken."""

    repeats: int = Field(
        default=3, ge=1, description="evaluations of a stochastic defense, each with its own draws"
    )
    formats: list[ImageFormat] = Field(
        default=["float"], min_length=1, description="image formats to evaluate"
    )
    metrics: list[str] = Field(
        default_factory=list,
        description="metrics to take from pixels besides the task's, such as denoising_loss",
    )


class Block(_Strict):
    """One cross product: roles x defenses x attacks x threats."""

    roles: list[str] = Field(min_length=1)
    defenses: list[DefenseSpec] = Field(min_length=1, description="labels, registered names or inline specs")
    attacks: list[PluginSpec] = Field(min_length=1)
    threats: list[Threat] = Field(min_length=1, description="levels, or levels with their settings")
    clean: bool = Field(default=True, description="also evaluate every defense on clean images")
    profiles: list[str] = Field(
        default_factory=list,
        min_length=1,
        description="names of the only profiles this block is for; on others it is left out, with the roles, defenses "
        "and attacks that no other block has. What it says of a defense or attack no `overrides` replace. All profiles "
        "when absent",
    )

    def is_for(self, profile: str) -> bool:
        """Whether the profile of this name has the block."""
        return not self.profiles or profile in self.profiles


class Grid(_Strict):
    """A grid file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="names the folder under results/")
    title: str = ""
    profile: str = "mini"
    seed: int = Field(default=0, ge=0)
    plugins: list[str] = Field(
        default_factory=list,
        description="plug-in files, beside the grid file or in the current folder",
    )
    images: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict,
        description="images per role or task (the first N of the dataset); all when absent",
    )
    defenses: dict[str, DefenseSpec] = Field(
        default_factory=dict, description="labels for configured defenses"
    )
    attacks: dict[str, PluginSpec] = Field(default_factory=dict, description="labels for configured attacks")
    evaluate: Evaluate = Field(default_factory=Evaluate)
    full_course: bool = Field(
        default=False,
        description="attacks on gradients take all their steps; else a fooled image leaves where no pipeline but the "
        "attacked one will see it",
    )
    blocks: list[Block] = Field(min_length=1)
    tables: list[TableSpec] = Field(
        default_factory=list, description="where neither tables nor figures are named: one of everything"
    )
    figures: list[FigureSpec] = Field(default_factory=list)

    @model_validator(mode="after")
    def _one_of_everything(self) -> Grid:
        if not {"tables", "figures"} & self.model_fields_set:
            rows: list[Header] = ["role", "metric", "defense"]
            self.tables = [
                TableSpec(name="all", title="All results", rows=rows, columns=["level_label", "attack"])
            ]
        return self

    @model_validator(mode="after")
    def _files(self) -> Grid:
        names = [*(table.name for table in self.tables), *(figure.name for figure in self.figures)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two tables or figures are called '{name}': their files would be one")
            if name in ("results", "README"):
                raise ValueError(
                    f"'{name}' is no name for a table or figure: a file of every grid is called so"
                )
        return self


class Role(_Strict):
    """What a role is bound to in a profile."""

    dataset: PluginSpec
    model: PluginSpec


class Score(_Strict):
    """How a trained defense is scored: its target on clean and on obliviously attacked images it was not trained on."""

    dataset: dict[str, Any] = Field(
        default_factory=lambda: {"split": "val"},
        description="parameters that replace those of the role's dataset",
    )
    images: int = Field(default=200, ge=1)
    attack: PluginSpec


class TrainingSettings(_Strict):
    """How defenses are trained for a role, or for all roles of a task."""

    dataset: dict[str, Any] = Field(
        default_factory=lambda: {"split": "train"},
        description="parameters that replace those of the role's dataset",
    )
    images: int | None = Field(default=None, ge=1, description="the first N images; all when absent")
    crop: int | None = Field(
        default=None,
        ge=1,
        description="train on a square of this side from each image, at a place drawn once; whole images when absent",
    )
    crop_anew: bool = Field(default=False, description="draw the place of `crop` anew in every epoch")
    resize: bool = Field(
        default=True,
        description="prepare images as the target expects them; false takes those of the dataset as they are",
    )
    score: Score | None = None
    recipes: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="values that replace a recipe's, by defense (for all its recipes), then by recipe",
    )

    @model_validator(mode="after")
    def _cropped(self) -> TrainingSettings:
        if self.crop_anew and self.crop is None:
            raise ValueError("`crop_anew` needs `crop`, the side of the square")
        return self


class Overrides(_Strict):
    """What a grid's defenses and attacks take on a profile's data instead of what the grid says."""

    defenses: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="parameters, by registered name of the defense"
    )
    attacks: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="parameters, by registered name of the attack"
    )


class Profile(_Strict):
    """A profile file: roles bound to data and weights, how defenses are trained on them, and what differs there."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.]*$")
    title: str = ""
    roles: dict[str, Role] = Field(min_length=1)
    training: dict[str, TrainingSettings] = Field(
        default_factory=dict, description="by role or task; the role's own entry replaces its task's"
    )
    overrides: dict[str, Overrides] = Field(
        default_factory=dict,
        description="parameters that replace a grid's, by role or task; the role's own entry replaces its task's",
    )


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice and reads only true/false as booleans."""


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key '{key}' is written twice", key_node.start_mark
            )
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=deep)


_Loader.add_constructor(
    yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG,
    lambda loader, node: _mapping(
        typing.cast(_Loader, loader), typing.cast(yaml.MappingNode, node), deep=True
    ),
)


def results_folder(path: Path, grid: Grid) -> Path:
    """Where a grid's results go by default: results/NAME, for those of grids/papers/ results/papers/NAME."""
    place = path.resolve().parent
    below = place.relative_to(GRIDS) if place.is_relative_to(GRIDS) else Path()
    return Path("results") / below / grid.name


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        GridError: missing, a folder, not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        from bench.paper import no_grid

        why = no_grid(path.stem.lower())
        raise GridError(
            f"unknown grid file '{path}': {why}" if why else unknown("grid file", str(path), _shipped())
        ) from None
    except IsADirectoryError:
        # results/NAME is written from the grid NAME.
        same = {p.stem: p for p in map(Path, _shipped())}
        meant = same.get(path.resolve().name)
        hint = f": did you mean '{meant.as_posix()}'?" if meant is not None else ", such as grids/table1.yaml"
        raise GridError(f"{path} is a folder, expected a grid file{hint}") from None
    except OSError as error:
        raise GridError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise GridError(f"{path} cannot be read: {error}") from None
    try:
        data = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise GridError(f"{path}{at}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(data, dict):
        raise GridError(
            f"{path}: expected a mapping with keys such as name and blocks, got {type(data).__name__}"
        )
    return data


def _shipped() -> list[str]:
    """Paths of the shipped grids, as a command run in the project's folder names them."""
    paths = (p.relative_to(GRIDS) for p in GRIDS.rglob("*.yaml"))
    return [f"{GRIDS.name}/{p.as_posix()}" for p in paths if p.parts[0] != PROFILES.name]


def parse(model: type[Any], data: Mapping[str, Any], source: str) -> Any:
    """`data` as `model`.

    Raises:
        GridError: the first mistake, as `source, key: reason`.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise GridError(f"{source}, {_explain(model, error, data)}") from None


def load_grid(path: Path) -> Grid:
    """The grid in `path`, its structure validated (names are resolved when it is planned).

    Raises:
        GridError: see `parse`.
    """
    return typing.cast(Grid, parse(Grid, read_yaml(path), str(path)))


def load_profile(name: str, where: str = "", grid: Path | None = None) -> tuple[Profile, str]:
    """A profile by shipped name or by path, and what to call it in messages.

    Args:
        name: a shipped name, or the path of a YAML file.
        where: what named it, such as `--profile`, for the message.
        grid: the grid file that names it; a path is looked up as by `beside`.

    Raises:
        GridError: no such profile, or a mistake in it.
    """
    path = Path(name)
    at = f"{where}: " if where else ""
    shipped = shipped_profiles()
    if path.suffix not in (".yaml", ".yml"):
        path = PROFILES / f"{name}.yaml"
        if not path.is_file():
            raise GridError(at + unknown("profile", name, shipped))
    else:
        path = beside(grid, name)
        if path.is_dir():
            raise GridError(f"{at}{path} is a folder, expected a profile file or one of {listed(shipped)}")
        if not path.is_file():
            near = (str(Path(name).with_name(other)) for other in _profiles_in(path.parent))
            raise GridError(at + unknown("profile file", name, [*shipped, *near]))
    return typing.cast(Profile, parse(Profile, read_yaml(path), str(path))), str(path)


def shipped_profiles() -> list[str]:
    """Names of the profiles that come with the project."""
    return sorted(p.stem for p in PROFILES.glob("*.yaml"))


def beside(grid: Path | None, name: str) -> Path:
    """The file that a grid names: beside the grid file, or else in the current folder.

    Args:
        grid: the grid file; None = the current folder alone.
        name: relative or absolute path; where neither file exists, the one beside the grid is returned.
    """
    path = Path(name).expanduser()
    if grid is None or path.is_absolute():
        return path
    near = grid.parent / path
    return path if path.is_file() and not near.is_file() else near


def _profiles_in(folder: Path) -> Iterator[str]:
    """Names of the profile files in a folder."""
    for path in folder.glob("*.y*ml"):
        with contextlib.suppress(GridError):
            if "roles" in read_yaml(path):
                yield path.name


def profile_names(folder: Path) -> set[str]:
    """Names that the profile files in a folder give themselves; those that cannot be read are left out."""
    return {str(read_yaml(folder / file).get("name", "")) for file in _profiles_in(folder)}


def split_spec(spec: PluginSpec, where: str) -> tuple[str, dict[str, Any], str | None]:
    """(name, parameters, label) of a plug-in spec: `jpeg`, `robustbench:ID` or `{name: jpeg, quality: 50}`.

    Raises:
        GridError: a mapping without a name.
    """
    if isinstance(spec, str):
        name, _, rest = spec.partition(":")
        return (name, {"id": rest}, None) if rest else (name, {}, None)
    params = dict(spec)
    name = params.pop("name", None)
    label = params.pop("label", None)
    if not isinstance(name, str) or not name:
        raise GridError(
            f"{where}: expected a `name` of a registered plug-in, got keys {sorted(spec) or 'none'}"
        )
    return name, params, None if label is None else str(label)


def _explain(model: type[BaseModel], error: ValidationError, data: Mapping[str, Any]) -> str:
    # In a union pydantic reports every branch; the deepest, then first, is the one the user meant.
    errors = error.errors()
    unknown_key = [e for e in errors if e["type"] == "extra_forbidden"]
    chosen = unknown_key[0] if unknown_key else max(errors, key=lambda e: len(e["loc"]))
    keys: list[str] = []
    current: Any = data
    for part in chosen["loc"]:
        if isinstance(part, int):
            keys.append(f"[{part}]")
            current = current[part] if isinstance(current, list) and part < len(current) else None
        elif isinstance(current, Mapping) and part in current:
            keys.append(f".{part}")
            current = current[part]
        elif chosen["type"] == "missing" and part == chosen["loc"][-1]:
            keys.append(f".{part}")
    path = "".join(keys).lstrip(".") or "top level"
    if chosen["type"] == "extra_forbidden":
        last = str(chosen["loc"][-1])
        owner = _model_at(model, chosen["loc"][:-1])
        if owner is not None:
            parent = path[: -len(last)].rstrip(".") if path.endswith(last) else path
            return f"{parent or 'top level'}: " + unknown("key", last, owner.model_fields)
    message = expected(str(chosen["msg"]))
    if chosen["type"] == "missing":
        return f"{path}: this key is required"
    if chosen["type"] == "literal_error" and isinstance(chosen.get("input"), str):
        valid = re.findall(r"'([^']*)'", str(chosen.get("ctx", {}).get("expected", "")))
        return f"{path}: {unknown('value', chosen['input'], valid)}"
    shown = repr(chosen.get("input"))
    return f"{path}: {message}" + (f", got {shown}" if len(shown) < 120 and shown not in message else "")


def _model_at(model: Any, location: Iterable[Any]) -> type[BaseModel] | None:
    """The model class a pydantic error location leads to."""
    current: Any = model
    for part in location:
        options = [o for o in _options(current) if isinstance(o, type) and issubclass(o, BaseModel)]
        if isinstance(part, str) and any(o.__name__ == part for o in options):
            current = next(o for o in options if o.__name__ == part)
            continue
        for option in options:
            if isinstance(part, str) and part in option.model_fields:
                current = option.model_fields[part].annotation
                break
        else:
            inner = [a for o in _options(current) for a in typing.get_args(o)]
            if not inner:
                return None
            current = inner[-1]
    return next((o for o in _options(current) if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _options(annotation: Any) -> list[Any]:
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _options(typing.get_args(annotation)[0])
    if origin is typing.Union or origin is types.UnionType:
        return [o for a in typing.get_args(annotation) for o in _options(a)]
    return [annotation]
