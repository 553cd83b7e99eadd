"""Values with a unit: eps and alpha are fractions of the [0,1] pixel range, exact from YAML to result row."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema


def parse_fraction(value: Any) -> Fraction:
    """`"8/255"`, `0.031` or `1` as an exact Fraction; a decimal keeps the digits it was written with.

    Raises:
        ValueError: the value is not a number or a fraction.
    """
    if isinstance(value, Fraction):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"expected a fraction such as 8/255, got {value!r}")
    try:
        return Fraction(str(value).replace(" ", ""))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"expected a fraction such as 8/255, got {value!r}") from None


def _pixel_fraction(value: Any) -> Fraction:
    fraction = parse_fraction(value)
    if fraction > 1:
        raise ValueError(f"{value} is outside (0, 1]: images are in [0,1], did you mean {value}/255?")
    if fraction <= 0:
        raise ValueError(f"{value} is outside (0, 1]: expected a positive fraction such as 8/255")
    return fraction


Pixels = Annotated[
    Fraction,
    BeforeValidator(_pixel_fraction),
    PlainSerializer(str, return_type=str),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": r"^\s*[0-9.]+\s*(/\s*[0-9.]+)?\s*$"},
                {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
            ],
            "description": "a length in the [0,1] pixel range, written as a fraction such as 8/255",
        }
    ),
]
"""Annotation for eps, alpha and other pixel lengths in (0, 1]; accepts `8/255`, `0.031`."""
