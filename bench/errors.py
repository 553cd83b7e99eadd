"""Errors a user can cause, and the one line each of them gets.

Every error below becomes a single line on stderr and exit code 2; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class BenchError(Exception):
    """Base of all errors with a message meant for the user.

    The message says which file, key and value is wrong and what was expected, on one line.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class GridError(BenchError):
    """A grid, profile or command-line value is wrong."""


class NothingLeft(GridError):
    """What is left out of a grid is all of it."""


class PluginError(BenchError):
    """A plug-in file, entry point or registered class cannot be used."""


class DataError(BenchError):
    """A dataset is missing, incomplete or unreadable."""


class WeightsError(BenchError):
    """A checkpoint is missing, unsafe, damaged or belongs to another model."""


class MissingCheckpoint(WeightsError):
    """Learned defenses have no checkpoint for the role they stand in front of.

    Attributes:
        trainings: what would make them (`defenses.training.session.Training`).
    """

    def __init__(self, message: str, *trainings: Any) -> None:
        super().__init__(message)
        self.trainings = trainings


class StoreError(BenchError):
    """The result store cannot be read or written."""


class StoreBusy(StoreError):
    """Another process holds a record's lock."""


class CheckError(BenchError):
    """A hard check on an attack or adapter failed: its numbers would be wrong."""


class NotApplicable(Exception):
    """This combination cannot be run, for a reason worth printing: the cell becomes a `skip`, not a number."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


#: Names that one line shows.
SHOWN = 8


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice most like `name`, or None when nothing is close."""
    lowered: dict[str, str] = {}
    for choice in choices:
        lowered.setdefault(choice.lower(), choice)
    found = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.5)
    return lowered[found[0]] if found else None


def unknown(what: str, name: str, choices: Iterable[str]) -> str:
    """One line for a name that is not known: the nearest valid name first, then what there is (`listed`)."""
    names = sorted(choices)
    close = nearest(name, names)
    hint = f"did you mean '{close}'? " if close else ""
    return f"unknown {what} '{name}': {hint}available: {listed(names, name)}"


def listed(names: Iterable[str], like: str = "") -> str:
    """Names in order, at most 8 of them: those most like `like` where it is given, and how many more there are."""
    every = sorted(names)
    kept = every[:SHOWN]
    if like and len(every) > SHOWN:
        score = {name: difflib.SequenceMatcher(None, like.lower(), name.lower()).ratio() for name in every}
        kept = sorted(sorted(every, key=lambda name: -score[name])[:SHOWN])
    more = f" … and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return (", ".join(kept) + more) or "none"


#: Phrases of pydantic, in the words of every other message here; the order matters.
_WORDS = {
    ", unable to parse string as an integer": "",
    ", unable to parse string as a number": "",
    " after validation": "",
    "List should have": "expected",
    "Input should be greater": "expected a number greater",
    "Input should be less": "expected a number less",
    "Input should be": "expected",
    "a valid dictionary": "a mapping {key: value}",
    "a valid list": "a list [value, …]",
    "a valid integer": "an integer",
    "a valid array": "an array",
    "an object": "a mapping",
    "a valid ": "a ",
}


def expected(message: str) -> str:
    """A message of pydantic as the others here are put: `expected an integer`."""
    message = message.removeprefix("Value error, ")
    for theirs, ours in _WORDS.items():
        message = message.replace(theirs, ours)
    return message


def reason(error: Mapping[str, Any]) -> str:
    """What one of pydantic's errors says of a parameter: `expected an integer, got 'abc'`."""
    if error["type"] == "missing":
        return "is required"
    message, shown = expected(str(error["msg"])), error.get("input")
    return message if repr(shown) in message or str(shown) in message else f"{message}, got {shown!r}"
