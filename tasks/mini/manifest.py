"""The shipped weights: half-precision safetensors files and the manifest that describes them.

``manifest.json`` maps a model's name to::

    {"sha256": ..., "bytes": ..., "scores": {...}, "rebuild": "python -m bench zoo build NAME",
     "seconds": training time, "recipe": {all parameters of the training}}

Writers lock the file, so that several builds may run at once. Scores are measured with the rounded weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.errors import WeightsError, unknown

#: Folder of the shipped weights.
WEIGHTS_DIR = Path(__file__).parent / "weights"
_MANIFEST = "manifest.json"


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def entries(folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """The manifest of ``folder`` (the shipped one unless given); empty when there is none.

    Raises:
        WeightsError: the manifest is not JSON.
    """
    path = (folder or WEIGHTS_DIR) / _MANIFEST
    if not path.is_file():
        return {}
    try:
        found: dict[str, dict[str, Any]] = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path}: not valid JSON ({error})") from None
    return found


def entry(name: str, folder: Path | None = None) -> dict[str, Any]:
    """The manifest entry of one model.

    Raises:
        WeightsError: there is none; names the nearest.
    """
    known = entries(folder)
    if name not in known:
        raise WeightsError(unknown("mini model", name, known))
    return known[name]


def weights_path(name: str, folder: Path | None = None) -> Path:
    """Where the weights of ``name`` lie."""
    return (folder or WEIGHTS_DIR) / f"{name}.safetensors"


def save_half(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a state dict in half precision (integers as they are), atomically.

    Raises:
        WeightsError: a weight is not finite in half precision.
    """
    half: dict[str, Tensor] = {}
    for key, value in state.items():
        value = value.detach().cpu().contiguous()
        half[key] = value.half() if value.is_floating_point() else value
        if value.is_floating_point() and not torch.isfinite(half[key]).all():
            raise WeightsError(f"{path.name}: weight {key} does not fit half precision")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        save_file(half, temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_float(path: Path) -> dict[str, Tensor]:
    """Read a state dict; half precision becomes float32.

    Raises:
        WeightsError: the file is missing or damaged.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights; rebuild with `python -m bench zoo build {path.stem}`")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path}: damaged ({error}); rebuild with `python -m bench zoo build {path.stem}`"
        ) from None
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def write_rounded(model: nn.Module, name: str, folder: Path | None = None) -> None:
    """Write the weights of ``model`` as those of ``name``, and give it back what was written, rounding included."""
    path = weights_path(name, folder)
    save_half(model.state_dict(), path)
    model.load_state_dict(load_float(path))


def load(name: str, folder: Path | None = None) -> dict[str, Tensor]:
    """The weights of ``name`` as float32, checked against the manifest.

    Raises:
        WeightsError: unknown, missing, damaged, or not the file that the manifest describes.
    """
    known = entry(name, folder)
    path = weights_path(name, folder)
    if path.is_file() and (found := sha256(path)) != known["sha256"]:
        raise WeightsError(
            f"{path}: SHA-256 {found[:12]}… is not {known['sha256'][:12]}… of the manifest; "
            f"rebuild with `python -m bench zoo build {name}`"
        )
    return load_float(path)


def record(
    name: str,
    *,
    scores: Mapping[str, Any],
    recipe: Mapping[str, Any],
    seconds: float,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Describe the weights file of ``name`` in the manifest, under a lock; returns the new entry.

    Raises:
        WeightsError: the weights file is missing.
    """
    path = weights_path(name, folder)
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights to record")
    new = {
        "sha256": sha256(path),
        "bytes": path.stat().st_size,
        "scores": dict(scores),
        "rebuild": f"python -m bench zoo build {name}",
        "seconds": round(seconds),
        "recipe": dict(recipe),
    }
    manifest = path.parent / _MANIFEST
    # The lock lies outside the folder, which belongs to the repository.
    place = hashlib.sha256(str(path.parent.resolve()).encode()).hexdigest()[:16]
    lock = Path(tempfile.gettempdir()) / f"bench-manifest-{place}.lock"
    with FileLock(lock):
        known = entries(path.parent)
        known[name] = new
        temporary = manifest.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(dict(sorted(known.items())), indent=2, default=str) + "\n", "utf-8")
        temporary.replace(manifest)
    return new
