"""The papers' tables against a second reading of their text, and the ways to print them.

`data/paper/PAPER.txt` was read from the papers' text on its own: a line a printed row, its numbers in printed order, B
before a bold one, * after a white-box one, - for a dash, ? where the text is damaged.
Set BENCH_UPDATE_SNAPSHOTS=1 to rewrite the snapshots after an intended change, then read the diff.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from bench.cli import main
from bench.errors import GridError
from bench.paper import (
    LEVEL_OF,
    PAPERS,
    agreement,
    compare,
    comparison_markdown,
    frame_metric,
    layout,
    printed_table,
    render,
    table_ids,
    values,
)

HERE = Path(__file__).parent
CELLS = {
    "cafd": (144, 60, 18),
    "alignment": (84, 84, 204, 204, 72, 84, 84, 204, 204, 36, 36, 168, 156, 204, 96, 96),
    "nrp": (240, 168, 18, 12, 224),
    "hgd": (30, 30, 15, 10, 15),
}
SNAPSHOTS = {
    "cafd/table1": "md",
    "nrp/table2": "md",
    "nrp/table5": "md",
    "alignment/table7": "md",
    "hgd/table2": "csv",
}


def reading(paper: str) -> dict[str, list[list[str]]]:
    """Table -> rows of the second reading."""
    found: dict[str, list[list[str]]] = {}
    for line in (HERE / "data" / "paper" / f"{paper}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            rows = found.setdefault(f"{paper}/{line[2:]}", [])
        else:
            rows.append(line.split("\t")[1:])
    return found


SECOND = {id: rows for paper in PAPERS for id, rows in reading(paper).items()}


def test_all_29_tables_and_3000_cells() -> None:
    assert len(table_ids()) == 29
    assert set(table_ids()) == set(SECOND)
    for paper, counts in CELLS.items():
        by_table = Counter(value.table for value in values(paper))
        assert tuple(by_table.values()) == counts
    assert sum(map(sum, CELLS.values())) == 3000


@pytest.mark.parametrize("id", table_ids())
def test_every_cell_equals_the_second_reading(id: str) -> None:
    printed = [row for panel in printed_table(id).panels for row in panel.cells]
    assert len(printed) == len(SECOND[id])
    for ours, theirs in zip(printed, SECOND[id], strict=True):
        assert len(ours) == len(theirs)
        for cell, text in zip(ours, theirs, strict=True):
            assert cell is not None
            if text == "?":
                assert cell.value.provenance in ("illegible", "other table", "cleaned")
            elif text == "-":
                assert (cell.value.provenance, cell.text) == ("dash", "–")
            else:
                assert cell.value.provenance == "printed"
                assert cell.value.text == text.removeprefix("B").removesuffix("*")
                assert cell.text.endswith("*") == text.endswith("*")


@pytest.mark.parametrize("id", ["nrp/table1", "nrp/table2", "nrp/table5"])
def test_the_rule_for_marks_gives_the_printed_marks(id: str) -> None:
    printed = [cell for panel in printed_table(id).panels for row in panel.cells for cell in row]
    bold = [text.startswith("B") for row in SECOND[id] for text in row]
    assert any(bold)
    assert [cell is not None and cell.bold for cell in printed] == bold


def test_marks_of_cafd_table1() -> None:
    svhn, cifar = printed_table("cafd/table1").panels
    column = svhn.columns.index(("TI-DIM_N",))
    assert [row[column].text for row in svhn.cells if row[column].bold] == ["37.84"]  # type: ignore[union-attr]
    assert [row[column].text for row in svhn.cells if row[column].underline] == ["40.10"]  # type: ignore[union-attr]
    assert not any(row[0].bold or row[0].underline for row in (*svhn.cells, *cifar.cells))  # type: ignore[union-attr]
    marked = [
        cell for row in cifar.cells for cell in row if cell is not None and (cell.bold or cell.underline)
    ]
    assert len(marked) == 16


@pytest.mark.parametrize("id", [i for i in table_ids() if layout(i).marks.basis == "none"])
def test_tables_without_marks_in_the_text_have_none(id: str) -> None:
    cells = [cell for panel in printed_table(id).panels for row in panel.cells for cell in row]
    assert not any(cell and (cell.bold or cell.underline) for cell in cells)


# Typed by hand from the papers: row labels, column labels, what is printed.
SPOTS = [
    ("cafd/table1", "CIFAR-10", ("CAFD",), ("AA_N",), "11.80"),
    ("cafd/table1", "CIFAR-10", ("AT",), ("AA_N",), "30.61"),
    ("cafd/table2", "CIFAR-10", ("PGD_T",), ("Wide-ResNet", "CAFD"), "12.450"),
    ("cafd/table3", "Gray-box adaptive attack", ("CAFD'+VGG-19", "PGD_N", "CAFD"), ("Error rate",), "56.76"),
    ("alignment/table3", "", ("Ours",), ("ImageNet (Accuracy %)", "PGD"), "34.6"),
    ("alignment/table4", "", ("NRP (Naseer et al., 2020)",), ("VOC07+12 (mAP %)", "loc"), "53.2"),
    ("alignment/table7", "", ("No Defense",), ("Cityscapes (mIoU %)", "clean"), "?"),
    ("alignment/table11", "", ("Full with jpeg",), ("VOC07+12 (mAP %)", "cls+loc"), "64.2"),
    ("alignment/table14", "", ("SAT (Xu et al., 2020)",), ("VOC07+12 (mAP %)", "cls"), "–"),
    ("alignment/table16", "", ("Ours",), ("VOC2012 (mIoU %)", "C&W"), "68.9"),
    ("nrp/table1", "", ("Ensemble", "NRP"), ("DIM_TI",), "31.9"),
    ("nrp/table3", "", ("UNet ⊕ Res-v2-152", "DIM_TI ⊕ BPDA", "✓"), ("Inc-v3_ens3",), "27.7"),
    ("nrp/table4", "", ("Object Det.", "RetinaNet"), ("SSP (l∞ ≤ 16)",), "5.16"),
    ("nrp/table5", "", ("Res-152", "MI-FGSM"), ("Naturally Trained", "Res-152", "T-1"), "0.6*"),
    ("hgd/table3", "", ("CGD",), ("WhiteTestSet", "ε = 4"), "75.8%"),
    ("hgd/table4", "", ("IncV3 guided LGD",), ("BlackTestSet", "ε = 16"), "72.7%"),
    ("hgd/table6", "", ("FGD (ours)",), ("Time(s)",), "50.24"),
]


@pytest.mark.parametrize(("id", "part", "row", "column", "text"), SPOTS)
def test_spot_values(id: str, part: str, row: tuple[str, ...], column: tuple[str, ...], text: str) -> None:
    (panel,) = [panel for panel in printed_table(id).panels if panel.title == part]
    cell = panel.cells[panel.rows.index(row)][panel.columns.index(column)]
    assert cell is not None
    assert cell.text == text


def test_fields() -> None:
    for paper in PAPERS:
        keys = Counter(
            (
                v.table,
                v.task,
                v.dataset,
                v.target_model,
                v.source_model,
                v.threat,
                v.defense,
                v.attack,
                v.eps,
                v.metric,
            )
            for v in values(paper)
        )
        assert max(keys.values()) == 1
        for value in values(paper):
            assert value.threat in LEVEL_OF
            assert value.provenance in ("printed", "cleaned", "other table", "dash", "illegible")
            assert bool(value.text) == (value.provenance not in ("dash", "illegible"))
            assert math.isnan(value.number) != bool(value.text)
            if value.provenance not in ("printed", "dash"):
                assert value.note
            frame_metric(value)


def test_headers_merge_as_in_the_paper() -> None:
    text = render("cafd/table2")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"
    ]
    assert rows[0] == ["Attack", "Target Model", "", "", "", ""]
    assert rows[2] == ["", "**VGG-19**", "**ResNet-50**", "", "**Wide-ResNet**", ""]
    assert rows[3] == ["", "**CAFD**", "**None**", "**CAFD**", "**None**", "**CAFD**"]
    assert rows[4] == ["**SVHN**", "", "", "", "", ""]
    assert [row[0] for row in rows].count("**CIFAR-10**") == 1


def test_row_groups_show_their_label_once() -> None:
    rows = [line.split("|")[1].strip() for line in render("nrp/table1").splitlines() if line[:1] == "|"]
    assert [label for label in rows if label and label[0] != ":"] == [
        "Inc-v3", "Inc-v4", "IncRes-v2", "Res-v2-152", "Ensemble",
    ]  # fmt: skip


@pytest.mark.parametrize(("id", "suffix"), SNAPSHOTS.items())
def test_snapshots(id: str, suffix: str) -> None:
    text = render(id, {"md": "markdown", "csv": "csv"}[suffix])
    path = HERE / "snapshots" / "paper" / f"{id.replace('/', '_')}.{suffix}"
    if os.environ.get("BENCH_UPDATE_SNAPSHOTS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("id", table_ids())
def test_csv_holds_every_number(id: str) -> None:
    rows = list(csv.reader(io.StringIO(render(id, "csv"))))
    numbers = Counter(v.text for v in values(layout(id).paper) if f"{v.paper}/{v.table}" == id)
    labels = Counter(
        label for panel in printed_table(id).panels for row in panel.rows for label in (*row, panel.title)
    )
    counted = Counter(cell for row in rows for cell in row)
    assert all(counted[text] - labels[text] == count for text, count in numbers.items() if text)


@pytest.mark.parametrize("id", ["cafd/table1", "nrp/table5", "alignment/table12"])
def test_latex_and_html_keep_marks_and_numbers(id: str) -> None:
    table = printed_table(id)
    cells = [cell for panel in table.panels for row in panel.cells for cell in row if cell is not None]
    latex, html = render(id, "latex"), render(id, "html")
    assert latex.count(r"\textbf{") == html.count("<td><b>") == sum(cell.bold for cell in cells)
    assert latex.count(r"\underline{") == html.count("<u>") == sum(cell.underline for cell in cells)
    assert len(re.findall(r"<td>", html)) == len(cells)
    assert latex.count(r"\begin{table}") == html.count("<figure") == len(table.panels)


def test_unknown_names() -> None:
    with pytest.raises(GridError, match="unknown table 'cafd/tabel1': did you mean 'cafd/table1'"):
        render("cafd/tabel1")
    with pytest.raises(GridError, match="unknown format 'xml': did you mean 'html'"):
        render("cafd/table1", "xml")
    with pytest.raises(GridError, match="unknown paper 'nrpp': did you mean 'nrp'"):
        values("nrpp")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["paper", "list"])
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()[1:]] == list(table_ids())
    main(["paper", "cafd/table1", "--output", str(tmp_path / "new" / "t.md")])
    assert capsys.readouterr().out == ""
    assert (tmp_path / "new" / "t.md").read_text(encoding="utf-8") == render("cafd/table1")
    main(["paper", "hgd/table6", "-f", "csv"])
    assert capsys.readouterr().out == render("hgd/table6", "csv")
    for name in (["HGD/Table3"], ["show", "hgd/TABLE3"]):
        main(["paper", *name])
        assert capsys.readouterr().out == render("hgd/table3")


def test_an_unknown_table_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["paper", "cafd/table4"])
    assert error.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("bench: unknown table 'cafd/table4': did you mean 'cafd/table")
    assert len(line.splitlines()) == 1


# -- our numbers beside the paper's ---------------------------------------------------------------------------------
MAPPING = {
    "table": "cafd/table2",
    "where": {"dataset": "CIFAR-10"},
    "role": {"resnet": "ResNet-50", "wrn": {"target_model": "Wide-ResNet"}},
    "defense": {"bare": "None", "ours": "cafd"},
    "attack": {"pgd": "PGD_N", "pgd to a class": "pgd_t", "ddn": ["DDN_N"]},
}


def measured(role: str, defense: str, attack: str, value: float, **changes: object) -> dict[str, object]:
    return {
        "role": role, "defense": defense, "attack": attack, "level": "oblivious", "level_label": "oblivious",
        "metric": "error_rate", "unit": "%", "value": value, "low": value - 0.01, "high": value + 0.01, "n": 100,
        "seed": 0, "image_format": "float", "status": "ok", "profile": "mini", "model": "m", "dataset": "d",
    } | changes  # fmt: skip


def lines() -> pd.DataFrame:
    return pd.DataFrame(
        [
            measured("resnet", "bare", "pgd", 0.9),
            measured("resnet", "ours", "pgd", 0.3),
            measured("resnet", "ours", "pgd", 0.7, metric="accuracy"),
            measured("resnet", "ours", "pgd", 0.95, level="white_box"),
            measured("resnet", "ours", "pgd to a class", 0.2),
            measured("resnet", "ours", "ddn", 0.4),
            measured("resnet", "other", "pgd", 0.5),
            measured("resnet", "bare", "ddn", math.nan, status="pending"),
            measured("wrn", "ours", "pgd", 0.2),
        ]
    )


def test_comparison_cell_by_cell() -> None:
    found = compare(lines(), MAPPING)
    cells = {(line["row"], line["column"]): line for line in found.to_dict("records")}
    assert list(cells) == [
        ("PGD_N", "ResNet-50 / None"), ("PGD_N", "ResNet-50 / CAFD"), ("PGD_N", "Wide-ResNet / CAFD"),
        ("PGD_T", "ResNet-50 / CAFD"), ("DDN_N", "ResNet-50 / None"), ("DDN_N", "ResNet-50 / CAFD"),
    ]  # fmt: skip
    line = cells["PGD_N", "ResNet-50 / CAFD"]
    assert (line["part"], line["paper"], line["measured"]) == ("CIFAR-10", 18.86, 30.0)
    assert line["difference"] == pytest.approx(11.14)
    assert (line["low"], line["high"], line["undefended"]) == (pytest.approx(29), pytest.approx(31), False)
    assert cells["PGD_N", "ResNet-50 / None"]["undefended"]
    assert math.isnan(cells["PGD_N", "ResNet-50 / None"]["gain"])
    # Defenses run across here; a gain is still between the cells of one attack and one model.
    assert (line["gain"], line["paper_gain"]) == (pytest.approx(30 - 90), pytest.approx(18.86 - 100))
    assert math.isnan(cells["PGD_N", "Wide-ResNet / CAFD"]["gain"])
    signs = agreement(found).set_index("column")
    assert (signs.loc["ResNet-50 / CAFD", "same_sign"], signs.loc["ResNet-50 / CAFD", "signs"]) == (1, 1)
    assert math.isnan(cells["DDN_N", "ResNet-50 / None"]["difference"])


def test_order_and_sign() -> None:
    frame = pd.DataFrame(
        [
            measured("wide", defense, attack, value, metric="accuracy", level=level)
            for attack, level, values in (
                ("clean", "clean", (0.9, 0.8, 0.85)),
                ("pgd", "oblivious", (0.1, 0.5, 0.4)),
            )
            for defense, value in zip(("none", "full", "traditional"), values, strict=True)
        ]
    )
    mapping = {
        "table": "alignment/table1",
        "where": {"dataset": "CIFAR-10"},
        "defense": {"none": "none", "full": "Full", "traditional": "LT"},
        "attack": {"clean": "clean", "pgd": "PGD"},
    }
    found = agreement(compare(frame, mapping)).set_index("column")
    clean, pgd = found.loc["CIFAR10 (Accuracy %) / clean"], found.loc["CIFAR10 (Accuracy %) / PGD"]
    # Paper: 95.1 > 92.9 (LT) > 90.7 (Full) clean, 0.0 < 29.5 (LT) < 85.1 (Full) attacked; ours agree in every pair.
    assert (clean["same_order"], clean["pairs"], clean["tau"]) == (3, 3, pytest.approx(1))
    assert (pgd["same_sign"], pgd["signs"]) == (2, 2)
    frame.loc[frame["defense"] == "full", "value"] = 0.95
    found = agreement(compare(frame, mapping)).set_index("column")
    clean = found.loc["CIFAR10 (Accuracy %) / clean"]
    assert (clean["same_order"], clean["tau"]) == (1, pytest.approx(-1 / 3))
    assert (clean["same_sign"], clean["signs"]) == (1, 2)


def test_columns_without_an_undefended_row_have_no_sign() -> None:
    frame = pd.DataFrame([measured("r", "cafd", "pgd", 0.2), measured("r", "jpeg", "pgd", 0.9)])
    mapping = {
        "table": "cafd/table1",
        "where": {"dataset": "SVHN"},
        "defense": {"cafd": "CAFD", "jpeg": "JPEG"},
        "attack": {"pgd": "PGD_N"},
    }
    (line,) = agreement(compare(frame, mapping)).to_dict("records")
    assert (line["rows"], line["same_order"], line["pairs"], line["signs"]) == (2, 1, 1, 0)


def test_a_retrained_model_is_ranked_among_the_defenses_of_its_model() -> None:
    frame = pd.DataFrame(
        [
            measured("vgg", "cafd", "pgd", 0.9),
            measured("vgg", "jpeg", "pgd", 0.9),
            measured("vgg_at", "at", "pgd", 0.5),
        ]
    )
    mapping = {
        "table": "cafd/table1",
        "where": {"dataset": "SVHN"},
        "defense": {"cafd": "cafd", "jpeg": "jpeg_q75", "at": "at"},
        "attack": {"pgd": "PGD_N"},
    }
    (line,) = agreement(compare(frame, mapping)).to_dict("records")
    assert (line["rows"], line["pairs"], line["same_order"], line["ties"]) == (3, 3, 1, 1)
    assert "(1 are equal here)" in comparison_markdown(compare(frame, mapping))
    # Alone it can be compared with nothing.
    alone = compare(frame[frame["defense"] == "at"], mapping | {"defense": {"at": "at"}})
    assert len(alone) == 1 and agreement(alone).empty
    assert "no column has two rows" in comparison_markdown(alone)


def test_attacks_that_the_paper_prints_as_their_mean() -> None:
    frame = pd.DataFrame(
        [
            measured("inc", "none", "fgsm", 0.2, metric="accuracy"),
            measured("inc", "none", "ifgsm", 0.1, metric="accuracy", level="transfer", n=50),
            measured("inc", "none", "fgsm", 0.02, metric="denoising_loss", unit=""),
        ]
    )
    mapping = {
        "table": "hgd/table2",
        "defense": {"none": "none"},
        "attack": {
            "fgsm": {"eps": 4, "attack": "white_test_set"},
            "ifgsm": {"eps": 4, "attack": "white_test_set"},
        },
        "level": {"oblivious": {"eps": 4}, "transfer": {"eps": 4}},
    }
    each = compare(frame, mapping | {"where": {"metric": "accuracy_percent"}})
    each = each[each["metric"] == "accuracy"]
    assert list(each["measured"]) == [20.0, 10.0]
    whole = compare(
        frame[frame["metric"] == "accuracy"],
        mapping | {"mean": True, "where": {"metric": "accuracy_percent"}},
    )
    (line,) = whole.to_dict("records")
    assert (line["measured"], line["attack"], line["level"]) == (15.0, "fgsm+ifgsm", "oblivious+transfer")
    assert (line["low"], line["high"], line["n"]) == (pytest.approx(14), pytest.approx(16), 50)
    assert (line["paper"], line["difference"]) == (14.5, pytest.approx(0.5))
    # What is no percentage keeps its digits.
    losses = compare(
        frame[frame["metric"] == "denoising_loss"],
        mapping | {"attack": {"fgsm": mapping["attack"]["fgsm"]}, "level": {"oblivious": {"eps": 4}}},
    )  # type: ignore[index]
    assert "| 0.0200 | [0.0100, 0.0300] | 100 | 0.0177 |" in re.sub(" +", " ", comparison_markdown(losses))
    with pytest.raises(GridError, match="paper: mean: expected true or false, got 'yes'"):
        compare(frame, mapping | {"mean": "yes"})


def test_comparison_as_text() -> None:
    found = compare(lines(), MAPPING)
    mini = comparison_markdown(found)
    assert "absolute numbers mean nothing here" in mini
    assert "(profile mini)" in mini
    assert "difference" not in mini
    paper = re.sub(" +", " ", comparison_markdown(found.assign(profile="paper")))
    assert "absolute numbers" not in paper
    assert "| 30.00 | [29.00, 31.00] | 100 | 18.86 | +11.14 |" in paper
    assert "| – | pending | 100 | 99.99 | – |" in paper


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": "cafd/tabel2"}, "unknown table 'cafd/tabel2': did you mean 'cafd/table2'"),
        ({"tables": "x"}, "paper: unknown key 'tables': did you mean 'table'"),
        ({"where": {"datset": "SVHN"}}, "paper: where: unknown field 'datset': did you mean 'dataset'"),
        (
            {"where": {"dataset": "CIFAR-100"}},
            "paper: where: unknown dataset 'CIFAR-100': did you mean 'CIFAR-10'? available: CIFAR-10, SVHN",
        ),
        ({"where": "SVHN"}, "paper: where: expected fields of a printed value"),
        (
            {"where": {}},
            "paper: role resnet, defense bare, attack pgd, level oblivious, metric error_rate meets 2 values",
        ),
        ({"defense": {"our": "cafd"}}, "paper: defense: unknown label 'our': did you mean 'ours'"),
        ({"defense": {"ours": "CAFDD"}}, "paper: defense: ours: unknown defense label 'CAFDD'"),
    ],
)
def test_bad_mappings(changes: dict[str, object], message: str) -> None:
    with pytest.raises(GridError, match=re.escape(message)):
        compare(lines(), MAPPING | changes)


def test_labels_of_other_profiles_may_be_mapped() -> None:
    with_more = MAPPING | {"defense": {**MAPPING["defense"], "elsewhere": "cafd"}}
    with pytest.raises(GridError, match="unknown label 'elsewhere'"):
        compare(lines(), with_more)
    with pytest.raises(GridError, match="unknown label 'elsewhere'"):
        compare(lines(), with_more, {"attack": {"elsewhere"}})
    pd.testing.assert_frame_equal(
        compare(lines(), with_more, {"defense": {"elsewhere"}}), compare(lines(), MAPPING)
    )


def test_a_mapping_needs_a_table() -> None:
    with pytest.raises(GridError, match="paper: this key is required: table"):
        compare(lines(), {"where": {}})
