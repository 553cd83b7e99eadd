"""The README shows what the repository holds, not what somebody remembered."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_table_is_the_committed_result() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = text.split("<!-- table1:begin -->")[1].split("<!-- table1:end -->")[0].strip()
    assert shown == (ROOT / "results" / "table1" / "summary.md").read_text(encoding="utf-8").strip()
