"""The registries that everything pluggable goes through.

```python
from bench.protocols import Defense
from bench.registry import DEFENSES

@DEFENSES.register_module(name="invert")
class Invert(Defense):
    def forward(self, images): return 1 - images
```

A plug-in is found when its file lies in the registry's package (`defenses/`, `attacks/`, `tasks/`), when a grid or the
command line names the file (`plugins: [my_defense.py]`), or when an installed package declares an entry point in the
group `bench.plugins` that points at the module. The constructor's annotated arguments are the plug-in's parameters:
they are validated, completed with their defaults and recorded in every result row.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import sys
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from mmengine.registry import Registry
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from bench.errors import BenchError, PluginError, nearest, reason, unknown

ENTRY_POINT_GROUP = "bench.plugins"
T = TypeVar("T")


@dataclass(frozen=True)
class Parameter:
    """One constructor argument of a plug-in, as `list` prints it."""

    name: str
    annotation: str
    required: bool
    default: Any


class PluginRegistry(Registry, Generic[T]):  # type: ignore[misc]
    """mmengine's Registry with typed look-up, validated construction and errors that name the nearest plug-in.

    Args:
        kind: what is registered, in the singular ("defense").
        packages: packages whose modules are imported before the first look-up.
        base: `module:Class` every plug-in must derive from (a string, since the protocols import this module).
    """

    def __init__(self, kind: str, packages: tuple[str, ...], base: str) -> None:
        super().__init__(kind)
        self.kind = kind
        self.packages = packages
        self._base = base
        self._discovered = False

    # -- registration -------------------------------------------------------------------------------------------
    def _base_class(self) -> type:
        module, name = self._base.split(":")
        return typing.cast(type, getattr(importlib.import_module(module), name))

    def _register_module(
        self, module: Any, module_name: str | list[str] | None = None, force: bool = False
    ) -> None:
        base = self._base_class()
        if not (inspect.isclass(module) and issubclass(module, base)):
            raise PluginError(
                f"{self.kind} {getattr(module, '__name__', module)!r} must be a class derived from {base.__name__}"
            )
        names = [module_name] if isinstance(module_name, str) else (module_name or [module.__name__])
        for name in names:
            known = self._module_dict.get(name)
            if known is not None and not force and _origin(known) != _origin(module):
                raise PluginError(
                    f"{self.kind} '{name}' is defined twice: {_origin(known)} and {_origin(module)}"
                )
            self._module_dict[name] = module

    # -- look-up ------------------------------------------------------------------------------------------------
    def discover(self) -> None:
        """Import the built-in modules and the installed entry points, once."""
        if self._discovered:
            return
        self._discovered = True
        for package in self.packages:
            for module in _walk(package):
                importlib.import_module(module)
        load_entry_points()

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self.discover()
        return sorted(self._module_dict)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def resolve(self, name: str, where: str = "") -> type[T]:
        """The class registered as `name`.

        Raises:
            PluginError: no such plug-in; names the nearest.
        """
        self.discover()
        if name not in self._module_dict:
            prefix = f"{where}: " if where else ""
            raise PluginError(prefix + unknown(self.kind, str(name), self._module_dict))
        return typing.cast("type[T]", self._module_dict[name])

    def parameters(self, name: str) -> list[Parameter]:
        """The parameters of plug-in `name` with annotations and defaults."""
        schema = parameter_model(self.resolve(name))  # type: ignore[arg-type]
        return [
            Parameter(
                field_name,
                _annotation_text(field.annotation),
                field.is_required(),
                None if field.is_required() else jsonable(field.get_default(call_default_factory=True)),
            )
            for field_name, field in schema.model_fields.items()
        ]

    def validate(self, name: str, params: Mapping[str, Any], where: str = "") -> dict[str, Any]:
        """`params` checked against the constructor of `name` and completed with its defaults.

        Raises:
            PluginError: an unknown, missing or wrong parameter.
        """
        cls = self.resolve(name, where)
        at = f"{where}: " if where else ""
        schema = parameter_model(cls)  # type: ignore[arg-type]
        for key in params:
            if key not in schema.model_fields:
                raise PluginError(
                    f"{at}{self.kind} '{name}': " + unknown("parameter", str(key), schema.model_fields)
                )
        try:
            checked = schema(**params)
        except ValidationError as error:
            first = error.errors()[0]
            path = ".".join(str(part) for part in first["loc"])
            given, hint = params.get(path), ""
            if (self.kind, path) == ("attack", "target") and type(given) is int:
                hint = f": did you mean 'class:{given}'?"
            raise PluginError(f"{at}{self.kind} '{name}', {path}: {reason(first)}{hint}") from None
        return {field: getattr(checked, field) for field in schema.model_fields}

    def create(self, name: str, params: Mapping[str, Any] | None = None, where: str = "") -> T:
        """An instance of `name`; its `params` attribute holds the complete, JSON-ready parameters.

        Raises:
            PluginError: unknown name or wrong parameters.
        """
        values = self.validate(name, params or {}, where)
        cls = self.resolve(name, where)
        try:
            instance = cls(**values)
        except BenchError as error:
            if not where or str(error).startswith(where):
                raise
            raise type(error)(f"{where}: {error}") from None
        except (TypeError, ValueError) as error:
            at = f"{where}: " if where else ""
            raise PluginError(f"{at}{self.kind} '{name}': {error}") from None
        instance.name = name  # type: ignore[attr-defined]
        instance.params = {key: jsonable(value) for key, value in values.items()}  # type: ignore[attr-defined]
        return instance


DEFENSES: PluginRegistry[Any] = PluginRegistry("defense", ("defenses",), "bench.protocols:Defense")
ATTACKS: PluginRegistry[Any] = PluginRegistry("attack", ("attacks",), "bench.protocols:Attack")
TASKS: PluginRegistry[Any] = PluginRegistry("task", ("tasks",), "bench.protocols:Task")
MODELS: PluginRegistry[Any] = PluginRegistry("model", ("tasks",), "bench.protocols:ModelSource")
DATASETS: PluginRegistry[Any] = PluginRegistry("dataset", ("tasks",), "bench.protocols:Dataset")
METRICS: PluginRegistry[Any] = PluginRegistry("metric", ("tasks",), "bench.protocols:Metric")
FIGURES: PluginRegistry[Any] = PluginRegistry(
    "figure kind", ("bench.figures",), "bench.figures.base:FigureKind"
)


def load_plugin(path: Path, where: str = "") -> ModuleType:
    """Import a user's plug-in file; importing the same file twice is a no-op.

    Args:
        path: of a Python file.
        where: what named it, such as `--plugin`, for the message of a missing file.

    Raises:
        PluginError: the file is missing or fails to import.
    """
    path = path.expanduser().resolve()
    if not path.is_file():
        near = [p.name for p in path.parent.glob("*.py")]
        close = nearest(path.name, near)
        hint = f": did you mean '{close}'?" if close else ""
        raise PluginError(f"{where}{': ' if where else ''}plug-in file {path} does not exist{hint}")
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:12]
    name = f"bench_plugin_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PluginError(f"plug-in file {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BenchError as error:
        del sys.modules[name]
        raise PluginError(f"plug-in file {path}: {error}") from None
    except Exception as error:
        del sys.modules[name]
        raise PluginError(f"plug-in file {path} failed to import: {type(error).__name__}: {error}") from error
    return module


_entry_points_loaded = False


def load_entry_points() -> None:
    """Import what installed packages declare in the group `bench.plugins`, once.

    Raises:
        PluginError: a declared module fails to import.
    """
    global _entry_points_loaded
    if _entry_points_loaded:
        return
    _entry_points_loaded = True
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry.load()
        except Exception as error:
            raise PluginError(
                f"entry point '{entry.name}' ({entry.value}) failed to import: {type(error).__name__}: {error}"
            ) from error


@functools.cache
def parameter_model(cls: type) -> type[BaseModel]:
    """A pydantic model of a plug-in's constructor arguments.

    A constructor that ends in `**rest` hands them to the next one up, whose parameters are then its own too.
    """
    fields: dict[str, Any] = {}
    passed_on = False
    for owner in cls.__mro__:
        init = vars(owner).get("__init__")
        if init is None or not _is_plugin_class(owner):
            continue
        passed_on = False
        hints = typing.get_type_hints(init, include_extras=True)
        for name, parameter in list(inspect.signature(init).parameters.items())[1:]:
            if parameter.kind is parameter.VAR_POSITIONAL:
                raise _unnamed(cls)
            if parameter.kind is parameter.VAR_KEYWORD:
                passed_on = True
                continue
            if name not in hints:
                raise PluginError(f"{cls.__name__}: parameter '{name}' needs a type annotation")
            default = ... if parameter.default is parameter.empty else parameter.default
            fields.setdefault(name, (hints[name], default))
        if not passed_on:
            break
    if passed_on:
        raise _unnamed(cls)
    config = ConfigDict(
        extra="forbid", arbitrary_types_allowed=True, validate_default=True, protected_namespaces=()
    )
    return create_model(cls.__name__, __config__=config, **fields)


def _unnamed(cls: type) -> PluginError:
    return PluginError(f"{cls.__name__}: parameters must be named, not *args or **kwargs")


def jsonable(value: Any) -> Any:
    """A parameter value as plain JSON types; fractions become "8/255", tuples lists, paths strings."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(jsonable(item) for item in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def _is_plugin_class(cls: type) -> bool:
    return not cls.__module__.startswith(("torch.", "abc", "typing", "builtins"))


def _origin(obj: Any) -> str:
    return f"{obj.__module__}.{obj.__qualname__}"


def _walk(package: str) -> Iterator[str]:
    root = importlib.import_module(package)
    yield package
    for info in pkgutil.walk_packages(root.__path__, package + "."):
        # configs/ folders hold mmengine config files, which are data and not modules of ours.
        if ".configs" not in info.name and not info.name.rsplit(".", 1)[-1].startswith("_"):
            yield info.name


def _annotation_text(annotation: Any) -> str:
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    return str(annotation).replace("typing.", "")
