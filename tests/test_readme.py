"""The README shows what the repository holds, not what somebody remembered."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.mini import manifest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["table1", "defenses"])
def test_the_table_is_the_committed_result(name: str) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = text.split(f"<!-- {name}:begin -->")[1].split(f"<!-- {name}:end -->")[0].strip()
    assert shown == (ROOT / "results" / name / "summary.md").read_text(encoding="utf-8").strip()


def test_the_zoo_is_the_manifest() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = [
        row
        for row in text.split("<!-- zoo:begin -->")[1].split("\n(")[0].splitlines()
        if row.startswith("| `")
    ]
    rows = [
        f"| `{name}` | {entry['bytes'] // 1000} | "
        + ", ".join(f"{score} {value:.3f}" for score, value in entry["scores"].items())
        + " |"
        for name, entry in sorted(manifest.entries().items())
    ]
    assert shown == rows
