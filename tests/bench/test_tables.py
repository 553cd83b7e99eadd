"""Tables from a small invented frame: snapshots of every format, and what a table must refuse or say.

Set BENCH_UPDATE_SNAPSHOTS=1 to rewrite the snapshots after an intended change, then read the diff.
"""

from __future__ import annotations

import html as html_escape
import io
import math
import os
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pydantic import ValidationError

from bench.errors import GridError, StoreError
from bench.tables import (
    COLUMNS,
    LEVELS,
    Table,
    TableSpec,
    build,
    long_csv,
    markdown,
    notes,
    pivot,
    read_long,
    render,
    write_tables,
)

HERE = Path(__file__).parent
TEXT_FORMATS = {"markdown": "md", "csv": "csv", "latex": "tex", "html": "html"}
ORDERS = {
    "defense": ["none", "noise", "jpeg", "tvm"],
    "attack": ["clean", "PGD-20", "MI-FGSM", "BIM cls", "BIM loc"],
    "role": ["resnet", "ssd"],
}
SPECS = [
    TableSpec(
        name="defenses",
        title="Four defenses",
        where={"role": "resnet", "seed": 0},
        columns=["level_label", "attack"],
        metric="top-1",
        interval=True,
        repeats=True,
    ),
    TableSpec(
        name="levels",
        title="By threat level & metric",
        where={"seed": 0, "attack": ["clean", "PGD-20", "BIM cls", "BIM loc"]},
        columns=["level", "attack"],
        image_format="uint8",
        transpose=True,
    ),
    TableSpec(
        name="seeds",
        where={"level": "oblivious", "attack": "PGD-20", "defense": ["none", "jpeg"]},
        columns=["attack"],
    ),
]


@pytest.fixture(scope="module")
def lines() -> pd.DataFrame:
    return read_long(HERE / "data" / "frame.csv")


def line(**changes: Any) -> dict[str, Any]:
    """One finished line; tests change what they are about."""
    return {
        "grid": "g",
        "cell": "c0",
        "role": "r",
        "task": "t",
        "dataset": "d",
        "model": "m",
        "defense": "none",
        "attack": "PGD",
        "level": "oblivious",
        "level_label": "oblivious",
        "seed": 0,
        "image_format": "float",
        "metric": "acc",
        "unit": "%",
        "higher_is_better": True,
        "value": 0.5,
        "low": math.nan,
        "high": math.nan,
        "n": 100,
        "n_total": 100,
        "repeats": 1,
        "value_worst": math.nan,
        "status": "ok",
        "reason": "",
        "flags": (),
    } | changes


def frame(made: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(made, columns=list(COLUMNS))


def spec(**changes: Any) -> TableSpec:
    return TableSpec(**({"name": "x", "rows": ["defense"], "columns": ["level", "attack"]} | changes))


def texts(table: Table) -> dict[tuple[str, ...], str]:
    return {(*row, *column): entry.text + entry.marks() for (row, column), entry in table.entries.items()}


# -- snapshots ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("table_spec", SPECS, ids=lambda s: s.name)
@pytest.mark.parametrize("format", TEXT_FORMATS)
def test_snapshot(lines: pd.DataFrame, table_spec: TableSpec, format: str) -> None:
    path = HERE / "snapshots" / f"{table_spec.name}.{TEXT_FORMATS[format]}"
    got = render(lines, table_spec, format, ORDERS)
    if os.environ.get("BENCH_UPDATE_SNAPSHOTS"):
        path.write_text(got, encoding="utf-8")
        pytest.skip(f"rewrote {path.name}")
    assert got == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("table_spec", SPECS, ids=lambda s: s.name)
def test_bytes_depend_on_the_grid_order_alone(lines: pd.DataFrame, table_spec: TableSpec) -> None:
    """Neither the order in which cells finished nor how the order was given changes a byte."""
    orders = ORDERS | {column: list(dict.fromkeys(lines[column])) for column in ("level_label", "metric")}
    shuffled = lines.sample(frac=1, random_state=3).assign(seconds=99.0)
    categories = shuffled.assign(
        **{
            column: pd.Categorical(
                shuffled[column], [*values, *(["worst case"] if column == "attack" else [])], ordered=True
            )
            for column, values in orders.items()
        }
    )
    for format in TEXT_FORMATS:
        expected = render(lines, table_spec, format, orders)
        assert render(shuffled, table_spec, format, orders) == expected, format
        assert render(categories, table_spec, format) == expected, format


def test_latex_is_balanced_and_escaped(lines: pd.DataFrame) -> None:
    for table_spec in SPECS:
        text = render(lines, table_spec, "latex", ORDERS)
        assert text.count("{") == text.count("}")
        assert text.count(r"\begin{") == text.count(r"\end{") == 2
        assert text.isascii()
        body = text[text.index(r"\midrule") : text.index(r"\bottomrule")].splitlines()[1:]
        columns = re.search(r"\\begin\{tabular\}\{(\w+)\}", text)
        assert columns is not None
        assert {len(re.split(r"(?<!\\)&", row)) for row in body} == {len(columns[1])}


def test_html_escapes_names() -> None:
    text = render(frame([line(defense="<script>", attack="a&b")]), spec(title="T<i>"), "html")
    assert "<script>" not in text and "<i>" not in text
    assert html_escape.escape("<script>") in text and "a&amp;b" in text and text.isascii()


def test_markdown_escapes_pipes() -> None:
    assert "a\\|b" in markdown(frame([line(defense="a|b")]), spec())


# -- values -------------------------------------------------------------------------------------------------------
def test_pivot_holds_strings_under_named_headers(lines: pd.DataFrame) -> None:
    got = pivot(lines, SPECS[0], ORDERS)
    assert got.index.name == "defense" and list(got.index) == ORDERS["defense"]
    assert got.columns.names == ["threat model", "attack"]
    assert got.loc["jpeg", ("oblivious", "MI-FGSM ↑")] == "**51.5 [46.5, 56.5]**"
    assert all(isinstance(value, str) for value in got.to_numpy().ravel())


def test_levels_run_from_least_to_most_knowledge_and_worst_case_comes_last() -> None:
    made = [
        line(level=level, level_label=level, attack=attack, cell=f"{level}{attack}")
        for level in reversed(LEVELS)
        for attack in ("worst case", "PGD", "FGSM")
    ]
    table = build(frame(made), spec())
    assert [column[0] for column in table.columns[::3]] == list(LEVELS)
    assert [column[1] for column in table.columns[:3]] == ["PGD ↑", "FGSM ↑", "worst case ↑"]


def test_unit_and_decimals() -> None:
    percent = build(frame([line(value=0.12345)]), spec())
    plain = build(frame([line(value=0.12345, unit="", higher_is_better=False)]), spec())
    assert list(texts(percent)) == [("none", "oblivious", "PGD ↑")]
    assert texts(percent)["none", "oblivious", "PGD ↑"] == "12.3"
    assert texts(plain) == {("none", "oblivious", "PGD ↓"): "0.123"}
    assert (
        texts(build(frame([line(value=0.12345)]), spec(decimals=2)))["none", "oblivious", "PGD ↑"] == "12.35"
    )


def test_several_metrics_become_a_header_with_their_own_arrows() -> None:
    made = frame([line(), line(metric="lpips", unit="", higher_is_better=False, value=0.25)])
    assert texts(build(made, spec())) == {
        ("none", "oblivious", "PGD", "acc (%) ↑"): "50.0",
        ("none", "oblivious", "PGD", "lpips ↓"): "0.250",
    }
    assert texts(build(made, spec(metric="lpips"))) == {("none", "oblivious", "PGD ↓"): "0.250"}
    assert next(iter(texts(build(made, spec(rows=["defense", "metric"]))))) == (
        "none",
        "acc (%) ↑",
        "oblivious",
        "PGD",
    )


def test_image_formats_are_kept_apart() -> None:
    made = frame([line(), line(image_format="uint8", value=0.6)])
    assert set(texts(build(made, spec())).values()) == {"50.0"}
    assert "float images" in build(made, spec()).caption
    assert set(texts(build(made, spec(image_format="uint8"))).values()) == {"60.0"}
    both = build(made, spec(columns=["level", "image_format"]))
    assert texts(both) == {("none", "oblivious", "float ↑"): "50.0", ("none", "oblivious", "uint8 ↑"): "60.0"}


def test_seeds_are_averaged_only_when_all_finished() -> None:
    made = [line(seed=s, cell=f"c{s}", value=v) for s, v in enumerate((0.5, 0.6, 0.7))]
    table = build(frame(made), spec())
    assert set(texts(table).values()) == {"60.0 ± 10.0"}
    assert "over 3 seeds" in table.caption
    made[1] |= {"status": "error", "reason": "out of memory", "value": math.nan}
    table = build(frame(made), spec())
    assert set(texts(table).values()) == {"err¹"}
    assert table.notes == ("error (1 of 3 seeds): out of memory",)
    assert (
        texts(build(frame(made), spec(rows=["defense", "seed"])))["none", "2", "oblivious", "PGD ↑"] == "70.0"
    )


def test_undefined_metric_is_not_a_number() -> None:
    table = build(frame([line(value=math.nan)]), spec())
    assert set(texts(table).values()) == {"n/a¹"} and table.notes == ("undefined on these images",)


def test_unfinished_cells_say_why() -> None:
    made = [
        line(status="skip", reason="no gradient"),
        line(defense="a", status="skip", reason="no gradient"),
        line(defense="b", status="error", reason="NaN loss"),
        line(defense="c", status="pending"),
        line(defense="d", n=48, n_total=50, status="partial"),
        line(defense="e", flags=("zero gradient",)),
    ]
    table = build(frame(made), spec(), {"defense": ["none"]})
    assert list(texts(table).values()) == ["–¹", "–¹", "err²", "…³", "50.0 n=48/50", "50.0†⁴"]
    assert table.notes == (
        "skip: no gradient",
        "error: NaN loss",
        "pending: not run yet",
        "suspect attack: zero gradient",
    )
    text = markdown(frame(made), spec(), {"defense": ["none"]})
    assert "¹ skip: no gradient" in text and "⁴ suspect attack: zero gradient" in text


def test_interval_and_repeats_are_printed_on_demand() -> None:
    made = frame([line(low=0.4, high=0.61, repeats=5, value_worst=0.45)])
    assert set(texts(build(made, spec())).values()) == {"50.0"}
    assert set(texts(build(made, spec(interval=True))).values()) == {"50.0 [40.0, 61.0]"}
    assert set(texts(build(made, spec(repeats=True))).values()) == {"50.0 (worst of 5: 45.0)"}


# -- bold ---------------------------------------------------------------------------------------------------------
def bold(table: Table) -> set[str]:
    return {row[0] for (row, _), entry in table.entries.items() if entry.bold}


def test_bold_follows_the_direction_of_the_metric_and_ties_share_it() -> None:
    made = [line(defense=d, value=v) for d, v in (("a", 0.5), ("b", 0.6001), ("c", 0.6002))]
    assert bold(build(frame(made), spec())) == {"b", "c"}
    lower = [item | {"higher_is_better": False} for item in made]
    assert bold(build(frame(lower), spec())) == {"a"}
    assert bold(build(frame(made), spec(bold="none"))) == set()
    assert bold(build(frame(made[:1]), spec())) == set()


def test_suspect_and_partial_cells_are_never_bold() -> None:
    made = [
        line(defense="a", value=0.9, flags=("zero gradient",)),
        line(defense="b", value=0.8, n=50),
        line(defense="c", value=0.6),
        line(defense="d", value=0.5),
    ]
    assert bold(build(frame(made), spec())) == {"c"}


def test_bold_never_compares_attacks_levels_or_models() -> None:
    made = [line(attack=a, value=v) for a, v in (("PGD", 0.1), ("MI", 0.9))]
    assert not any(entry.bold for entry in build(frame(made), spec()).entries.values())
    assert not any(
        e.bold for e in build(frame(made), spec(rows=["attack"], columns=["level"])).entries.values()
    )


def test_transpose_swaps_the_axes_and_keeps_the_content(lines: pd.DataFrame) -> None:
    straight = build(lines, SPECS[0].model_copy(update={"transpose": False}), ORDERS)
    turned = build(lines, SPECS[0].model_copy(update={"transpose": True}), ORDERS)
    assert len(turned.rows) == len(straight.columns) and len(turned.columns) == len(straight.rows)
    content = lambda table: sorted((e.text, e.bold) for e in table.entries.values())  # noqa: E731
    assert content(turned) == content(straight)
    assert turned.row_names == straight.column_names


# -- threat levels ------------------------------------------------------------------------------------------------
def test_levels_that_no_header_tells_apart_are_refused() -> None:
    made = frame([line(), line(attack="MI", level="bpda", level_label="bpda")])
    with pytest.raises(GridError, match=r"2 threat models \(bpda, oblivious\) without saying which"):
        build(made, spec(columns=["attack"]))


def test_one_level_outside_the_headers_is_named_in_every_format() -> None:
    made = frame([line(level="bpda", level_label="bpda (EOT 10)")])
    for format in TEXT_FORMATS:
        assert "bpda (EOT 10)" in render(made, spec(columns=["attack"]), format), format


def test_labels_within_one_level_get_a_footnote() -> None:
    made = frame(
        [
            line(level="bpda", level_label="bpda"),
            line(level="bpda", level_label="bpda (EOT 10)", defense="noise"),
            line(level="transfer", level_label="transfer from vgg"),
        ]
    )
    table = build(made, spec())
    assert texts(table) == {
        ("none", "bpda", "PGD ↑"): "50.0",
        ("noise", "bpda", "PGD ↑"): "50.0¹",
        ("none", "transfer from vgg", "PGD ↑"): "50.0",
    }
    assert table.notes == ("bpda (EOT 10)",)


def test_labels_of_one_level_never_share_a_cell() -> None:
    made = [line(level="transfer", level_label=f"transfer from {m}") for m in ("vgg", "wrn")]
    with pytest.raises(GridError, match=r"differ in level_label \(transfer from vgg, transfer from wrn\)"):
        build(frame(made), spec())


# -- refusals -----------------------------------------------------------------------------------------------------
def test_lines_that_share_a_cell_are_named() -> None:
    made = frame([line(model="a"), line(model="b")])
    with pytest.raises(
        GridError, match=r"2 lines fall into one cell \(defense none, level oblivious, attack PGD\)"
    ):
        build(made, spec())
    with pytest.raises(GridError, match=r"they differ in model \(a, b\)"):
        build(made, spec())
    with pytest.raises(GridError, match=r"differ in nothing a table can show \(cells c1, c2\)"):
        build(frame([line(cell="c1"), line(cell="c2")]), spec())


def test_unknown_values_and_metrics_name_the_nearest(lines: pd.DataFrame) -> None:
    with pytest.raises(GridError, match="unknown defense 'jpg': did you mean 'jpeg'"):
        build(lines, spec(where={"defense": "jpg"}), ORDERS)
    with pytest.raises(GridError, match="unknown metric 'top1': did you mean 'top-1'"):
        build(lines, spec(metric="top1"), ORDERS)


def test_a_known_value_without_lines_is_no_typo_but_an_empty_table_is_refused(lines: pd.DataFrame) -> None:
    orders = {"defense": ["none", "crop"]}
    got = build(
        lines, SPECS[2].model_copy(update={"where": SPECS[2].where | {"defense": ["none", "crop"]}}), orders
    )
    assert [row[0] for row in got.rows] == ["none"]
    with pytest.raises(GridError, match="selects none of the"):
        build(lines, spec(where={"defense": "crop"}), orders)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"where": {"defence": "none"}}, "unknown column 'defence': did you mean 'defense'"),
        ({"rows": ["defense"], "columns": ["defense"]}, "named twice"),
        ({"rows": []}, "at least 1 item"),
        ({"colums": ["attack"]}, "Extra inputs"),
        ({"name": "../x"}, "match pattern"),
    ],
)
def test_a_wrong_spec_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        spec(**changes)


def test_a_frame_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="no column 'model'"):
        build(frame([line()]).drop(columns="model"), spec())
    with pytest.raises(ValueError, match="unknown level 'whitebox': did you mean 'white_box'"):
        build(frame([line(level="whitebox")]), spec())
    with pytest.raises(ValueError, match="unknown status 'done'"):
        build(frame([line(status="done")]), spec())
    with pytest.raises(ValueError, match="lines without defense"):
        build(frame([line(defense=None)]), spec())
    with pytest.raises(ValueError, match="different unit or direction"):
        build(frame([line(), line(defense="a", higher_is_better=False)]), spec())


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(GridError, match="unknown text format 'latx': did you mean 'latex'"):
        render(frame([line()]), spec(), "latx")


# -- notes and files ----------------------------------------------------------------------------------------------
def test_notes_count_cells_by_reason_and_explain_flags(lines: pd.DataFrame) -> None:
    got = notes(lines)
    assert "2 cells skipped: defense 'jpeg' is not differentiable" in got  # float and uint8
    assert "4 cells not run: not run yet" in got
    assert any(note.startswith("2 cells suspect: below-noise (random noise of the same eps") for note in got)
    assert notes(frame([line(), line(metric="lpips")])) == []


def test_results_csv_reads_back_exactly(lines: pd.DataFrame, tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text(long_csv(lines), encoding="utf-8")
    back = read_long(tmp_path / "results.csv")
    assert list(back.columns) == list(COLUMNS)
    pd.testing.assert_frame_equal(back, lines, check_exact=True)


def test_unreadable_results_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.csv").write_text("a,b\n1,2\n")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    for name in ("text.csv", "bytes.csv", "missing.csv"):
        with pytest.raises(StoreError, match=name):
            read_long(tmp_path / name)


def test_write_tables_makes_every_format_and_replaces_it(lines: pd.DataFrame, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "results"
    formats = [*TEXT_FORMATS, "parquet"]
    paths = write_tables(lines, SPECS, folder, title="Demo", formats=formats, orders=ORDERS)
    names = {"README.md", "results.csv", "results.parquet"}
    names |= {f"{s.name}.{suffix}" for s in SPECS for suffix in TEXT_FORMATS.values()}
    assert {path.name for path in folder.iterdir()} == {path.name for path in paths} == names
    before = {path: path.read_bytes() for path in paths}
    write_tables(lines, SPECS, folder, title="Demo", formats=formats, orders=ORDERS)
    assert {path: path.read_bytes() for path in paths} == before
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert page.startswith("# Demo\n\n### Four defenses\n") and "### seeds" in page
    assert "- 2 cells skipped" in page
    stored = pd.read_parquet(folder / "results.parquet")
    assert stored["value"].equals(lines["value"]) and list(stored.columns) == list(COLUMNS)


def test_write_tables_touches_nothing_when_a_table_is_wrong(lines: pd.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(GridError, match="unknown metric"):
        write_tables(lines, [*SPECS, spec(metric="nope")], tmp_path, orders=ORDERS)
    with pytest.raises(GridError, match="unknown table format 'xls'"):
        write_tables(lines, SPECS, tmp_path, formats=["xls"], orders=ORDERS)
    with pytest.raises(GridError, match="give the table another name"):
        write_tables(lines, [SPECS[0], SPECS[0]], tmp_path, orders=ORDERS)
    with pytest.raises(GridError, match=r"results\.csv is written already"):
        write_tables(lines, [SPECS[0].model_copy(update={"name": "results"})], tmp_path, orders=ORDERS)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        write_tables(lines, SPECS, tmp_path / "file", orders=ORDERS)


def test_wide_csv_reads_back_as_numbers(lines: pd.DataFrame) -> None:
    back = pd.read_csv(io.StringIO(render(lines, SPECS[0], "csv", ORDERS)), index_col="defense")
    assert back.loc["tvm", "oblivious / PGD-20"] == 0.4805
    assert back.loc["none", "clean"] == 0.965
    assert back["white_box / PGD-20"].isna().loc["jpeg"]
