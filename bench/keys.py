"""Content keys: what a result is a function of, as a SHA-256.

A payload is plain data: mappings, sequences, strings, numbers, Fractions. Two payloads that mean the same have the
same key: the order of mapping entries and of set members does not count, 30 and 30.0 are one number, a Fraction is its
string. What does not change a result (device, batch size, workers, paths) does not belong in a payload.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from fractions import Fraction
from typing import Any

KEY_VERSION = 1
"""Part of every key. Raise it when keys are built differently: results of other versions are ignored, not misread."""

_MAX_SHOWN = 60
_MAX_ITEMS = 8


def plain(payload: Any) -> Any:
    """The payload as JSON types, in canonical form; equal meaning gives equal objects.

    Raises:
        TypeError: a value is of another type (a Path, a tensor, an object), so it cannot be part of a key.
        ValueError: a number is NaN or infinite, or two mapping keys have the same spelling.
    """
    return _plain(payload, "payload")


def canonical(payload: Any) -> str:
    """Canonical JSON of the payload: sorted keys, no spaces, ASCII, no NaN; see `plain` for what it accepts."""
    return _dump(plain(payload))


def content_key(payload: Any) -> str:
    """SHA-256 (64 hex digits) of the canonical payload and the key version."""
    return hashlib.sha256(canonical({"key_version": KEY_VERSION, "payload": payload}).encode()).hexdigest()


def explain(old: Any, new: Any) -> list[str]:
    """What differs between two payloads, one line each (`attack.params.eps: 4/255 -> 8/255`); [] if nothing."""
    return list(_differences(plain(old), plain(new), ""))


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # the text itself, also of a string enum
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}; a key holds finite numbers only")
        # YAML writes 30 and 30.0 for the same parameter.
        return int(value) if value.is_integer() else float(value)
    if isinstance(value, Fraction):
        return str(value)
    if isinstance(value, Mapping):
        return _plain_mapping(value, where)
    if isinstance(value, AbstractSet):
        return sorted((_plain(item, where) for item in value), key=_dump)
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise TypeError(
        f"{where} is a {type(value).__name__}; a key holds mappings, lists, strings, numbers and Fractions"
    )


def _plain_mapping(value: Mapping[Any, Any], where: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(key, bool) or not isinstance(key, (str, int)):
            raise TypeError(f"{where} has the mapping key {key!r}; expected a string or an integer")
        name = str(key)
        if name in out:
            raise ValueError(f"{where} has two entries spelled '{name}'")
        out[name] = _plain(item, f"{where}.{name}")
    return out


def _differences(old: Any, new: Any, path: str) -> Iterator[str]:
    if _dump(old) == _dump(new):
        return
    here = path or "payload"
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            inner = f"{path}.{name}" if path else name
            if name not in old:
                yield f"{inner}: new, {_short(new[name])}"
            elif name not in new:
                yield f"{inner}: gone, was {_short(old[name])}"
            else:
                yield from _differences(old[name], new[name], inner)
    elif isinstance(old, list) and isinstance(new, list):
        yield from _list_differences(old, new, here)
    else:
        yield f"{here}: {_short(old)} -> {_short(new)}"


def _list_differences(old: list[Any], new: list[Any], here: str) -> Iterator[str]:
    if max(len(old), len(new)) <= _MAX_ITEMS and len(old) != len(new):
        yield f"{here}: {_short(old)} -> {_short(new)}"
        return
    unequal = [i for i, (a, b) in enumerate(zip(old, new, strict=False)) if _dump(a) != _dump(b)]
    if len(old) != len(new):
        first = unequal[0] if unequal else min(len(old), len(new))
        yield f"{here}: {len(old)} items -> {len(new)} items, first difference at [{first}]"
    elif _is_flat(old + new) and len(old) > _MAX_ITEMS:
        i = unequal[0]
        yield f"{here}: {len(unequal)} of {len(old)} items differ, first [{i}]: {_short(old[i])} -> {_short(new[i])}"
    else:
        for i in unequal:
            yield from _differences(old[i], new[i], f"{here}[{i}]")


def _is_flat(values: Iterable[Any]) -> bool:
    return not any(isinstance(value, (dict, list)) for value in values)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else _dump(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 1]}…"
