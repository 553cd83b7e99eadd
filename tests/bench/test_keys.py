"""Content keys: equal meaning, equal key; anything else, another key."""

from __future__ import annotations

import enum
import json
import math
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import bench.keys
from bench.keys import canonical, content_key, explain, plain

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
payloads = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def test_canonical_is_sorted_compact_ascii() -> None:
    assert canonical({"b": [1, True, None], "a": "é"}) == '{"a":"\\u00e9","b":[1,true,null]}'


def test_a_key_stays_the_same_until_the_key_version_is_raised() -> None:
    payload = {"attack": {"name": "pgd", "eps": Fraction(8, 255)}}
    assert bench.keys.KEY_VERSION == 1
    assert content_key(payload) == "b6918c3bb8dbef528e89e14792ed4a4e95213e081df365c20f0ffafebcde4ea1"


@given(payloads)
def test_order_of_entries_does_not_count_and_lists_keep_theirs(payload: object) -> None:
    def reverse(value: object) -> object:
        if isinstance(value, dict):
            return {k: reverse(value[k]) for k in reversed(list(value))}
        return [reverse(v) for v in value] if isinstance(value, list) else value

    assert content_key(payload) == content_key(reverse(payload))
    assert json.loads(canonical(payload)) == plain(payload)
    assert plain(plain(payload)) == plain(payload)
    assert explain(payload, reverse(payload)) == []


@given(payloads, payloads)
def test_keys_differ_exactly_when_there_is_a_difference_to_show(one: object, other: object) -> None:
    assert (content_key(one) == content_key(other)) == (not explain(one, other))


def test_same_number_same_key() -> None:
    assert content_key({"w": 30}) == content_key({"w": 30.0})
    assert content_key({"w": 0.0}) == content_key({"w": -0.0})
    assert content_key({"w": 0.1}) != content_key({"w": 0.1 + 2**-56})
    assert content_key({"w": 1}) != content_key({"w": True})
    assert content_key({"w": 1}) != content_key({"w": "1"})


def test_fractions_tuples_sets_and_enums() -> None:
    class Kind(str, enum.Enum):
        CE = "ce"

    assert canonical({"eps": Fraction(16, 510)}) == '{"eps":"8/255"}'
    assert canonical((1, 2)) == canonical([1, 2]) != canonical([2, 1])
    assert canonical({3, 1, 2}) == canonical(frozenset([2, 3, 1])) == "[1,2,3]"
    assert canonical(Kind.CE) == '"ce"'


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_is_refused_with_its_place(bad: float) -> None:
    with pytest.raises(ValueError, match=r"payload\.attack\.alpha\[1\] is"):
        content_key({"attack": {"alpha": [0.5, bad]}})


def test_objects_and_paths_are_refused_with_their_place() -> None:
    with pytest.raises(TypeError, match=r"payload\.weights is a \w*Path"):
        content_key({"weights": Path("a.pt")})
    with pytest.raises(TypeError, match="mapping key"):
        content_key({(1, 2): 3})
    with pytest.raises(ValueError, match="two entries spelled '1'"):
        content_key({1: 2, "1": 3})


def test_the_key_version_is_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    before = content_key({"a": 1})
    monkeypatch.setattr(bench.keys, "KEY_VERSION", bench.keys.KEY_VERSION + 1)
    assert content_key({"a": 1}) != before


def test_explain_names_each_difference() -> None:
    old = {
        "attack": {"name": "pgd", "params": {"eps": Fraction(4, 255), "steps": 10}},
        "defense": [{"q": 75}],
        "x": 1,
    }
    new = {
        "attack": {"name": "pgd", "params": {"eps": Fraction(8, 255), "steps": 10}},
        "defense": [{"q": 80}],
        "y": 2,
    }
    assert explain(old, new) == [
        "attack.params.eps: 4/255 -> 8/255",
        "defense[0].q: 75 -> 80",
        "x: gone, was 1",
        "y: new, 2",
    ]


def test_explain_sums_up_long_lists() -> None:
    ids = [f"image-{i}" for i in range(100)]
    other = [*ids[:40], "image-x", *ids[41:]]
    assert explain({"ids": ids}, {"ids": other}) == [
        "ids: 1 of 100 items differ, first [40]: image-40 -> image-x"
    ]
    assert explain({"ids": ids}, {"ids": ids[:50]}) == [
        "ids: 100 items -> 50 items, first difference at [50]"
    ]
    assert explain({"d": ["a"]}, {"d": ["a", "b"]}) == ['d: ["a"] -> ["a","b"]']
    (line,) = explain({"text": "a" * 500}, {"text": "b" * 500})
    assert len(line) < 140
