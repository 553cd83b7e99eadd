"""Reading and writing network weights without running anybody's code.

A checkpoint is read as safetensors, or by `torch.load(weights_only=True)`; a pickle that wants more than tensors is
refused. Every failure becomes one line that names the file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pickle
import re
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from bench.errors import WeightsError

__all__ = ["Inert", "Weights", "apply_state", "find_weights", "load_state", "save_safetensors", "sha256_file"]

#: Entries that hold the network in the dictionaries people save, in order of preference.
_STATE_KEYS = ("state_dict", "model_state_dict", "model", "net", "weights", "params_ema", "params", "last")
_META = "meta"  # the entry of a safetensors header that holds `Weights.meta` as JSON

#: Whatever the bytes of a damaged pickle make of the unpickler.
_DAMAGE = (
    RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError,
    struct.error, zipfile.BadZipFile,
)  # fmt: skip

#: What `load_state` allows in a pickle beside tensors: a class or function, or a stand-in with the name it replaces.
Allowed = type | Callable[..., Any] | tuple[type | Callable[..., Any], str]


@dataclass(frozen=True)
class Weights:
    """A network's state as a file holds it.

    Attributes:
        state: parameters and buffers by name, on the CPU.
        meta: what the file says about them: a training config, class names, scores.
        sha256: digest of the whole file, in hexadecimal.
    """

    state: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""


class Inert:
    """Stands in for a class or function that a pickle names but nobody needs: takes any arguments, does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; computed again only when size or modification time changed.

    Raises:
        WeightsError: the file cannot be read.
    """
    path = Path(path)
    try:
        stat = path.stat()
        return _sha256(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise _unreadable(path, error) from None


@functools.lru_cache(maxsize=256)
def _sha256(path: Path, size: int, modified: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def load_state(path: str | Path, allow: Iterable[Allowed] = (), *, hint: str = "") -> Weights:
    """The weights in a checkpoint file.

    A plain state dictionary and the usual wrappings of one (`state_dict`, `model`, ...) are understood; a `module.`
    in front of every name, as DataParallel leaves it, is removed.

    Args:
        path: a `.safetensors` file, or what `torch.save` wrote.
        allow: further types and functions the pickle may name; see `torch.serialization.safe_globals`.
        hint: said when the file is missing: where it comes from.

    Raises:
        WeightsError: the file is missing, unreadable, truncated, wants to run code, or holds no weights.
    """
    path = Path(path)
    if path.is_dir():
        raise WeightsError(f"weights file {path} is a folder")
    if not path.exists():
        raise WeightsError(f"weights file {path} does not exist" + (f": {hint}" if hint else ""))
    digest = sha256_file(path)
    content, meta = _read_safetensors(path) if _is_safetensors(path) else _read_torch(path, allow)
    state = _find_state(content)
    if not state:
        held = (
            ", ".join(sorted(map(str, content))[:8])
            if isinstance(content, Mapping)
            else type(content).__name__
        )
        raise WeightsError(f"weights file {path} holds no network weights (found: {held or 'nothing'})")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    if not meta and isinstance(content, Mapping) and isinstance(content.get("meta"), Mapping):
        meta = dict(content["meta"])
    return Weights(state, meta, digest)


def find_weights(weights: str | Path, shipped: Path) -> Path:
    """The file meant by `weights`: the path itself, or the file in `shipped` of this name, suffix or not."""
    path = Path(weights).expanduser()
    if not path.exists() and path.name == str(path):
        for file in (shipped / path.name, shipped / f"{path.name}.safetensors"):
            if file.is_file():
                return file
    return path


def read_meta(path: str | Path) -> dict[str, Any]:
    """What a safetensors file says about itself, without its weights; {} when it says nothing.

    Raises:
        WeightsError: the file is missing, unreadable or damaged.
    """
    path = Path(path)
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
        meta = json.loads(header.get(_META, "{}"))
    except OSError as error:
        raise _unreadable(path, error) from None
    except (safetensors.SafetensorError, ValueError) as error:
        raise WeightsError(f"weights file {path} is damaged or truncated: {error}") from None
    return meta if isinstance(meta, dict) else {}


def apply_state(
    module: nn.Module, state: Mapping[str, Tensor], *, what: str, ignore: Sequence[str] = ()
) -> None:
    """Put a state into a module; every name and shape must match.

    Half-precision values are widened to the module's type. Counters of batches seen (`num_batches_tracked`), which
    old checkpoints lack and inference does not use, may be missing.

    Args:
        module: the network.
        state: its parameters and buffers.
        what: the network and the file, for the message.
        ignore: prefixes of names in `state` that the module does not need.

    Raises:
        WeightsError: names are missing, left over, or of another shape: a checkpoint of another model.
    """
    wanted = module.state_dict()
    given = {name: value for name, value in state.items() if not name.startswith(tuple(ignore))}
    reshaped = [
        f"{name} {tuple(value.shape)} instead of {tuple(wanted[name].shape)}"
        for name, value in given.items()
        if name in wanted and isinstance(wanted[name], Tensor) and wanted[name].shape != value.shape
    ]
    missing: list[str] = []
    unexpected: list[str] = []
    if not reshaped:
        try:
            # Not strict: modules that rename old keys while loading get to do so before names are compared.
            result = module.load_state_dict(given, strict=False)
        except RuntimeError as error:
            raise WeightsError(f"{what}: a checkpoint of another model? {error}") from None
        missing = [name for name in result.missing_keys if not name.endswith("num_batches_tracked")]
        unexpected = list(result.unexpected_keys)
    if reshaped or missing or unexpected:
        parts = [
            _listed(missing, "missing"),
            _listed(unexpected, "unexpected"),
            _listed(reshaped, "of another shape"),
        ]
        raise WeightsError(
            f"{what}: a checkpoint of another model: " + "; ".join(part for part in parts if part)
        )


def save_safetensors(
    path: str | Path,
    state: Mapping[str, Tensor],
    *,
    meta: Mapping[str, Any] | None = None,
    half: bool = False,
) -> str:
    """Write a state as safetensors, all of the file or nothing, the same bytes for the same state.

    Args:
        path: file to write; its folder is created.
        state: parameters and buffers by name.
        meta: JSON-ready facts stored in the header.
        half: store matrices and filters as float16. Vectors (biases, batch statistics) stay float32: they are few,
            and variances leave the range of float16 easily.

    Returns:
        SHA-256 of the file.

    Raises:
        WeightsError: the file cannot be written, or a value does not fit float16.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        kept = value.detach().cpu().contiguous()
        if half and kept.is_floating_point() and kept.ndim >= 2:
            kept = kept.half()
            if not torch.isfinite(kept).all():
                raise WeightsError(f"weights {path}: {name} does not fit float16")
        tensors[name] = kept.clone()  # safetensors refuses tensors that share memory
    header = {_META: json.dumps(meta, sort_keys=True)} if meta else None
    data = safetensors.torch.save(tensors, metadata=header)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise WeightsError(f"weights file {path} cannot be written: {error.strerror or error}") from None
    return hashlib.sha256(data).hexdigest()


def _is_safetensors(path: Path) -> bool:
    if path.suffix == ".safetensors":
        return True
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise _unreadable(path, error) from None
    return len(head) == 9 and head[8:] == b"{" and struct.unpack("<Q", head[:8])[0] < path.stat().st_size


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}
    except OSError as error:
        raise _unreadable(path, error) from None
    except safetensors.SafetensorError as error:
        raise WeightsError(f"weights file {path} is damaged or truncated: {error}") from None
    try:
        meta = json.loads(header[_META]) if _META in header else dict(header)
    except ValueError:
        meta = dict(header)
    return state, meta if isinstance(meta, dict) else {}


def _read_torch(path: Path, allow: Iterable[Allowed]) -> tuple[Any, dict[str, Any]]:
    try:
        with torch.serialization.safe_globals(list(allow)):
            return torch.load(path, map_location="cpu", weights_only=True), {}
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)|function <?([\w. ]+)", str(error))
        if found is None:
            raise WeightsError(f"weights file {path} is damaged, truncated or no checkpoint") from None
        name = found.group(1) or found.group(2)
        raise WeightsError(
            f"weights file {path} is refused: its pickle asks for {name}, and code in a checkpoint is never run; "
            "save the state_dict alone, or convert it to safetensors"
        ) from None
    except _DAMAGE as error:
        raise WeightsError(
            f"weights file {path} is damaged, truncated or no checkpoint ({_first_line(error)})"
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _find_state(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        return {}
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return {str(name): value for name, value in content.items()}
    for key in _STATE_KEYS:
        inner = content.get(key)
        if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
            return {str(name): value for name, value in inner.items() if isinstance(value, Tensor)}
    return {}


def _listed(names: Sequence[str], kind: str) -> str:
    if not names:
        return ""
    return f"{len(names)} {kind} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:120] if text else type(error).__name__


def _unreadable(path: Path, error: OSError) -> WeightsError:
    return WeightsError(f"weights file {path} cannot be read: {error.strerror or error}")
