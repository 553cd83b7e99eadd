"""Reports: what is on the page, what its plots show, and how it behaves in a real browser."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shlex
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from bench.checks import FLAGS
from bench.cli import main
from bench.pictures import COLUMNS, HEADINGS
from bench.report.page import MEANINGS
from bench.report.pictures import chosen_cells
from bench.report.plots import main_lines, make_plots
from bench.tables import LEVELS
from tests.bench.browser import MISSING, Browser
from tests.bench.test_run import GRID

PARAMS = {"alpha": "2/255", "loss": "ce", "norm": "linf"}


def line(defense: str, attack: str, level: str, value: float | None, **other: Any) -> dict[str, Any]:
    there = value is not None
    swept = re.fullmatch(r"pgd-(\d+)-(\d+)", attack)
    params = {**PARAMS, "eps": f"{swept[1]}/255", "steps": int(swept[2])} if swept else {}
    return {
        "grid": "nowhere", "profile": "mini", "cell": "" if attack == "worst case" else f"{defense}{attack}{level}",
        "role": "digits", "task": "classification", "dataset": "toy", "model": "net", "defense": defense,
        "attack": attack, "level": level, "level_label": level, "seed": 3, "image_format": "float",
        "metric": "accuracy", "unit": "%", "higher_is_better": True, "value": value if there else "",
        "low": max(value - 0.05, 0) if there else "", "high": min(value + 0.05, 1) if there else "",
        "n": 40 if there else 0, "n_total": 40, "repeats": 1, "value_worst": "",
        "status": "ok" if there else "skip", "reason": "" if there else "no true gradient", "flags": "",
        "attack_name": "pgd" if swept else "", "attack_params": json.dumps(params),
        "defense_params": json.dumps({"name": defense, "params": {"strength": 7}, "version": 1}),
        "weights": json.dumps({"sha256": "ab" * 32}), "forwards": 120, "backwards": 80, "linf_max": 0.03,
    } | other  # fmt: skip


def made() -> pd.DataFrame:
    """Two defenses; the second holds until the attacker knows of it. Names that need escaping."""
    lines = []
    for defense, clean, oblivious, bpda in (("none", 0.95, 0.05, 0.05), ("<b>&blur", 0.9, 0.6, 0.1)):
        lines.append(line(defense, "clean", "clean", clean))
        for eps in (2, 4, 8):
            lines.append(line(defense, f"pgd-{eps}-10", "oblivious", oblivious + (8 - eps) / 100))
            lines.append(line(defense, f"pgd-{eps}-10", "bpda", bpda + (8 - eps) / 100))
        lines.append(line(defense, "pgd-8-20", "bpda", bpda, flags="below-noise"))
        lines.append(line(defense, "pgd-8-40", "bpda", bpda))
        lines.append(line(defense, "pgd-8-10", "white_box", None))
        lines.append(line(defense, "worst case", "oblivious", oblivious))
        lines.append(line(defense, "worst case", "bpda", bpda))
        lines.append(line(defense, "worst case", "adaptive", bpda))
    errors = [{**x, "metric": "error_rate", "higher_is_better": False} for x in lines]
    for x in errors:
        if x["value"] != "":
            x.update(value=1 - x["value"], low=1 - x["high"], high=1 - x["low"])
    return pd.DataFrame([x for pair in zip(lines, errors, strict=True) for x in pair])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    made().to_csv(folder / "results.csv", index=False)
    main(["report", str(folder)])
    return folder


class Outline(HTMLParser):
    """Balance of tags, addresses that would be fetched, ids, and rows of tables."""

    VOID = {"meta", "link", "br", "input", "img"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [found["id"]] if found.get("id") else []
        self.fetched += [v for k, v in attrs if v and (k == "src" or (k == "href" and tag == "link"))]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def test_the_page_is_whole_and_alone(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    outline = Outline(text)
    assert outline.stack == []
    assert len(outline.ids) == len(set(outline.ids))
    assert all(address.startswith("data:") for address in outline.fetched)
    assert "@import" not in text and "url(http" not in text
    # What is a name in the results is no markup in the page.
    assert "<b>&blur" not in text and "&lt;b&gt;&amp;blur" in text
    assert FLAGS["below-noise"].text in text and "no true gradient" in text
    for level in ("oblivious", "bpda", "white_box", "adaptive"):
        assert MEANINGS[level] in text
    assert tuple(MEANINGS) == LEVELS


def test_worst_cases_and_the_gap(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    table = text[text.index('id="worst-table"') : text.index("</table>")]
    rows = re.findall(r"<tbody>(.*?)</tbody>", table, re.S)
    values = [re.findall(r'data-v="([^"]*)"', row) for row in rows]
    # defense, clean, oblivious, bpda, white_box (no worst case: not run), adaptive, gap
    assert values == [
        ["none", "95.0", "5.0", "5.0", "", "5.0", "+0.0"],
        ["&lt;b&gt;&amp;blur", "90.0", "60.0", "10.0", "", "10.0", "-50.0"],
    ]


def test_no_gap_without_an_attacker_who_knows(tmp_path: Path) -> None:
    lines = made()
    kept = lines[~lines["level"].isin(["bpda", "white_box"])]
    kept.to_csv(tmp_path / "results.csv", index=False)
    main(["report", str(tmp_path)])
    text = (tmp_path / "report.html").read_text()
    assert "digits (no attacker who knows the defense)" in text
    table = text[text.index('id="worst-table"') : text.index("</table>")]
    assert [v[-1] for v in (re.findall(r'data-v="([^"]*)"', r) for r in table.split("<tbody>")[1:])] == [
        "",
        "",
    ]


def test_commands_can_be_pasted(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    shown = re.search(r'<pre class="command"><code>(.*?)</code>', text, re.S)
    assert shown is not None
    words = shlex.split(shown[1])
    assert words == [
        "python", "-m", "bench", "run", "--grid", "nowhere.yaml", "--profile", "mini", "--seed", "3", "--limit", "40"
    ]  # fmt: skip


def commands(report: Path) -> list[list[str]]:
    """What the page prints to be pasted, as a shell reads it."""
    blocks = re.findall(r'<pre class="command"><code>(.*?)</code>', report.read_text(), re.S)
    return [shlex.split(line) for block in blocks for line in html.unescape(block).splitlines() if line]


def test_commands_name_the_store_of_the_report(
    stored: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    grid, folder = stored
    store = tmp_path / "my store"
    shutil.copytree(folder / "s", store)
    profile = tmp_path / "own.yaml"
    shutil.copy(GRID["profile"], profile)
    root = Path.cwd()
    # From another folder, by names that mean nothing in the project's.
    monkeypatch.chdir(tmp_path)
    shutil.copy(grid, "toy.yaml")
    main(["report", "--grid", "toy.yaml", "--store", "my store", "--profile", "own.yaml", "--out", "o"])
    monkeypatch.chdir(root)
    printed = commands(tmp_path / "o" / "report.html")
    options = ["--grid", str(tmp_path / "toy.yaml"), "--profile", str(profile), "--seed", "0"]
    assert printed[0] == ["python", "-m", "bench", "run", *options, "--store", str(store)]
    shown = [words for words in printed if words[3] == "show"]
    capsys.readouterr()
    main(shown[0][3:])
    assert f"key {shown[0][4]}" in capsys.readouterr().out
    # In the project's folder a name stays as it was given.
    source = tmp_path / "p"
    monkeypatch.setattr("bench.grid.GRIDS", source / "grids")
    shutil.copytree(grid.parent, source / "grids")
    for name in ("s", ".bench"):
        shutil.copytree(store, source / name)
    monkeypatch.chdir(source)
    for name, option in (("s", ["--store", "s"]), (".bench", [])):
        main(["report", "--grid", "grids/toy.yaml", "--store", name, "--out", name])
        # The profile is a file that the grid names: no option for it.
        expected = ["--grid", "grids/toy.yaml", "--seed", "0", *option]
        assert commands(source / name / "report.html")[0][4:] == expected


def test_plots_hold_the_numbers(folder: Path) -> None:
    names = {
        "levels-digits",
        "scatter-digits",
        "eps-digits-pgd-oblivious",
        "eps-digits-pgd-bpda",
        "steps-digits-pgd-bpda",
    }
    assert {path.stem for path in (folder / "plots").glob("*.svg")} == names
    for path in (folder / "plots").iterdir():
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
                assert min(image.size) > 300
        else:
            assert ET.parse(path).getroot().tag.endswith("svg")
    by_name = {plot.name: plot for plot in make_plots(read(folder))}
    assert "<b>&blur 60.0 to 10.0" in by_name["levels-digits"].text
    assert "<b>&blur 90.0 and 10.0" in by_name["scatter-digits"].text
    assert "none 11.0 at 2, 9.0 at 4, 5.0 at 8" in by_name["eps-digits-pgd-oblivious"].text
    assert "none 5.0 at 10, 5.0 at 20, 5.0 at 40" in by_name["steps-digits-pgd-bpda"].text
    for plot in by_name.values():
        # The same bytes each time, and colours that follow the page's.
        assert (folder / "plots" / f"{plot.name}.svg").read_text() == plot.svg
        assert "#1f1f1f" not in plot.inline() and "currentColor" in plot.inline()


def test_sweeps_of_namesakes_say_what_tells_them_apart(folder: Path) -> None:
    lines = read(folder)
    targeted = lines[lines["attack_name"] == "pgd"].copy()
    assert len(targeted)
    targeted["attack"] = targeted["attack"] + "-t"
    targeted["attack_params"] = [
        json.dumps({**json.loads(params), "target": "next"}) for params in targeted["attack_params"]
    ]
    plots = {plot.name: plot.title for plot in make_plots(pd.concat([lines, targeted], ignore_index=True))}
    assert plots["eps-digits-pgd-no-target-oblivious"] == "digits: pgd (no target), oblivious"
    assert plots["eps-digits-pgd-target-next-oblivious"] == "digits: pgd (target next), oblivious"
    # Without an attacker who knows the defense the title says so, once.
    naive = lines[lines["level"].isin(["clean", "oblivious"])]
    titles = [plot.title for plot in make_plots(naive) if plot.name.startswith("levels-")]
    assert titles and all(title.count("no attacker who knows") == 1 for title in titles)


def read(folder: Path) -> pd.DataFrame:
    from bench.written import read_results

    return read_results(folder)


def test_seeds_are_averaged_in_plots(folder: Path) -> None:
    lines = read(folder)
    other = lines.assign(seed=4, value=lines["value"] + 0.02, high=lines["high"] + 0.02)
    merged = main_lines(pd.concat([lines, other], ignore_index=True))
    alone = main_lines(lines)
    assert set(merged["metric"]) == {"accuracy"} and len(merged) == len(alone)
    assert (merged["value"] - alone["value"]).round(9).eq(0.01).all()
    assert merged["low"].equals(alone["low"]) and (merged["high"] - alone["high"]).round(9).eq(0.02).all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give a folder of results"),
        (["{tmp}/repot"], "did you mean"),
        (["{tmp}/empty"], "empty has no results.csv: unknown folder of results"),
        (["{tmp}/a.md"], "a.md is a file: unknown folder of results"),
        (["{tmp}/bad"], "not a table of results: no column"),
        (["{tmp}/params"], "attack_params: expected a JSON mapping"),
        (["{tmp}/level"], "unknown level 'whitebox': did you mean 'white_box'?"),
        (["{tmp}/none"], "has no lines"),
        (["--grid", "grids/tabel1.yaml", "--store", "{tmp}"], "unknown grid file"),
        (["--grid", "grids/table1.yaml", "--store", "{tmp}/absent"], "there is no folder"),
        (
            ["--grid", "grids/table1.yaml", "--store", "{tmp}/a.md"],
            "a.md is a file, expected the folder of a store",
        ),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    for name in ("report", "empty", "bad", "params", "level", "none"):
        (tmp_path / name).mkdir()
    (tmp_path / "a.md").write_text("no folder")
    (tmp_path / "bad" / "results.csv").write_text("a,b\n1,2\n")
    made().assign(attack_params="{").to_csv(tmp_path / "params" / "results.csv", index=False)
    made().assign(level="whitebox").to_csv(tmp_path / "level" / "results.csv", index=False)
    made().iloc[:0].to_csv(tmp_path / "none" / "results.csv", index=False)
    with pytest.raises(SystemExit) as ended:
        main(["report", *(a.format(tmp=tmp_path) for a in arguments)])
    printed = capsys.readouterr().err
    assert ended.value.code == 2
    assert said in printed and printed.count("\n") == 1


def test_only_folders_with_results_are_suggested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (".git", "src", "results/table1", "results/papers/fig1"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("results/table1", "results/papers/fig1"):
        (tmp_path / name / "results.csv").touch()
    monkeypatch.chdir(tmp_path)
    for given in ("README.md", "results", "results/tabel1"):
        with pytest.raises(SystemExit):
            main(["report", given])
        assert capsys.readouterr().err.endswith("available: results/papers/fig1, results/table1\n"), given


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A grid that has run in a folder: its store s, its results o."""
    folder = tmp_path_factory.mktemp("stored")
    block = {
        "roles": ["classification"],
        "defenses": ["none", "jpeg"],
        "attacks": ["pgd"],
        "threats": ["oblivious"],
    }
    table = {"name": "all", "rows": ["defense"], "columns": ["level_label", "attack"], "metric": "accuracy"}
    grid = folder / "grids" / "toy.yaml"
    grid.parent.mkdir()
    grid.write_text(
        yaml.safe_dump(
            {
                **GRID,
                "images": {"classification": 3},
                "blocks": [block],
                "evaluate": {"repeats": 1},
                "tables": [table],
            }
        )
    )
    main(["run", "--grid", str(grid), "--store", str(folder / "s"), "--out", str(folder / "o"), "-q"])
    return grid, folder


def test_from_a_store_with_pictures(stored: tuple[Path, Path], tmp_path: Path) -> None:
    grid, folder = stored
    shutil.copytree(folder / "o", tmp_path / "o")
    common = ["--grid", str(grid), "--store", str(folder / "s"), "--out", str(tmp_path / "o"), "--limit", "3"]
    main(["report", *common])
    text = (tmp_path / "o" / "report.html").read_text()
    pictures = re.findall(
        r'<tbody id="cell-\d+"(?:(?!</tbody>).)*?<figure class="picture" aria-label="([^"]*)">(.*?)</figure>',
        text,
        re.S,
    )
    assert [label.split(",")[0] for label, _ in pictures] == [
        f"classification: {defense} against pgd" for defense in ("none", "jpeg")
    ]
    panels = [
        re.findall(r'src="data:image/webp;base64,([^"]+)" alt="([^"]*)"', inner) for _, inner in pictures
    ]
    for row in panels:
        assert [alt.split(":")[0] for _, alt in row] == [HEADINGS[column] for column in COLUMNS]
        sizes = set()
        for data, _ in row:
            with Image.open(io.BytesIO(base64.b64decode(data))) as image:
                sizes.add(image.size)
                # Each holds its own image whole: the frame has four sides, with white around it.
                dark = np.asarray(image.convert("L")) < 110
                across, down = dark.mean(0) > 0.6, dark.mean(1) > 0.6
                assert across[: len(across) // 4].any() and across[-len(across) // 4 :].any()
                assert down.sum() >= 2 and not across[0] and not across[-1]
        assert len(sizes) == 1
    assert text.count("versions, set 1</dt>") == 1 and "torch 2" in text
    assert f"--grid {grid} --seed" in text and "--limit 3" in text
    # The pictured image is one that is right when clean, so that what the attack does is seen.
    truth, clean = (alt.split(": ")[1] for _, alt in panels[0][:2])
    assert clean.split()[0] == truth
    # No room, no picture; and the page says so.
    main(["report", *common, "--max-mb", "0.01", "--out", str(tmp_path / "small")])
    small = (tmp_path / "small" / "report.html").read_text()
    assert "data:image/webp" not in small and "the page has no room" in small
    # The stored lines and the written ones make the same rows.
    main(["report", str(tmp_path / "o"), "--out", str(tmp_path / "again")])
    again = (tmp_path / "again" / "report.html").read_text()
    rows = [re.findall(r'<td data-l="score"[^>]*>.*?</td>', page, re.S) for page in (text, again)]
    assert rows[0] == rows[1] and len(rows[0]) > 3
    assert "No cell shows an image: the grid of these results is not among the shipped ones" in again


def test_written_lines_of_a_shipped_grid_find_their_pictures(
    stored: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, folder = stored
    monkeypatch.setattr("bench.grid.GRIDS", grid.parent)
    report = ["report", str(folder / "o"), "--out", str(tmp_path)]
    main([*report, "--store", str(folder / "s"), "--pictures", "1"])
    text = (tmp_path / "report.html").read_text()
    assert text.count('<figure class="picture"') == 1 and text.count('data-pictured="with a picture"') == 1
    # Once the images are gone the page tells how many cells lack them.
    shutil.copytree(folder / "s" / "cells", tmp_path / "bare" / "cells")
    main([*report, "--store", str(tmp_path / "bare")])
    text = (tmp_path / "report.html").read_text()
    assert "data:image/webp" not in text and "2 cells whose adversarial image is not in" in text
    with pytest.raises(SystemExit):
        main([*report, "--store", str(tmp_path / "absent")])


def test_the_costliest_attacks_are_pictured_first(folder: Path) -> None:
    lines = read(folder)
    ran = lines["cell"] != ""
    names = {cell: f"{place:016d}" for place, cell in enumerate(dict.fromkeys(lines["cell"][ran]))}
    lines["cell"] = lines["cell"].map(names).fillna("")
    cells = [
        SimpleNamespace(key=key + "f" * 48, level_label=level)
        for key, level in lines[ran].drop_duplicates("cell")[["cell", "level_label"]].to_numpy()
    ]
    order = [cell.key[:16] for cell in chosen_cells(SimpleNamespace(cells=cells), lines)]  # type: ignore[arg-type]
    blur = "<b>&blur"
    # Attackers who know before those who do not, no defense first; clean and skipped cells never.
    expected = [f"{defense}pgd-8-10{level}" for level in ("bpda", "oblivious") for defense in ("none", blur)]
    assert order[:4] == [names[cell] for cell in expected]
    # The next costliest then: pgd-8-20 is as costly as pgd-8-10, oblivious has pgd-4-10 only.
    expected = [f"{d}pgd-{a}" for a in ("8-20bpda", "4-10oblivious") for d in ("none", blur)]
    assert order[4:8] == [names[cell] for cell in expected]
    # Three oblivious attacks and five that know, before two defenses.
    assert len(order) == len(set(order)) == 16


# -- in a browser ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if MISSING is not None:
        pytest.skip(MISSING)
    found = Browser(tmp_path_factory.mktemp("browser"))
    yield found
    found.quit()


@pytest.fixture()
def page(browser: Browser, folder: Path) -> Browser:
    browser.size(1280, 900)
    browser.open(folder / "report.html")
    return browser


SHOWN = "return [...document.querySelectorAll('#cells-table tbody')].filter((t) => t.offsetHeight)"
COUNT = "return document.querySelector('#filters output').textContent"


def column(page: Browser, table: str, place: int) -> list[str]:
    script = (
        "const [table, place] = arguments;"
        "return [...document.querySelector(table).tBodies].map((t) => t.rows[0].cells[place].dataset.v)"
    )
    found: list[str] = page.run(script, table, place)
    return found


def test_browser_fetches_nothing_and_says_nothing(browser: Browser, folder: Path) -> None:
    browser.open(Path("/dev/null"))
    browser.requests()
    browser.log("browser")
    browser.open(folder / "report.html")
    asked = [address for address in browser.requests() if not address.startswith("data:")]
    assert asked == [(folder / "report.html").resolve().as_uri()]
    browser.click("#cells-table thead th:nth-child(5) button")
    browser.type("#filters [type=search]", "pgd")
    browser.click("#cells-table .more")
    assert browser.log("browser") == []
    assert all(address.startswith("data:") for address in browser.requests())


def test_sorting(page: Browser) -> None:
    for table, place in (("#cells-table", 4), ("#worst-table", 4)):
        order = column(page, table, place)
        head = f"{table} thead th:nth-child({place + 1})"
        numbers = sorted(float(v) for v in order if v)
        missing = [v for v in order if not v]
        page.click(f"{head} button")
        assert column(page, table, place) == [*map(str, numbers), *missing]
        assert page.run("return document.querySelector(arguments[0]).ariaSort", head) == "ascending"
        page.click(f"{head} button")
        assert column(page, table, place) == [*map(str, reversed(numbers)), *missing]
        page.click(f"{head} button")
        assert column(page, table, place) == order


def choose(page: Browser, select: str, value: str) -> None:
    page.run(
        "const s = document.querySelector(arguments[0]); s.value = arguments[1];"
        "s.dispatchEvent(new Event('input', {bubbles: true})); return s.value",
        select, value,
    )  # fmt: skip


def test_filtering(page: Browser) -> None:
    total = 2 * 13
    assert page.run(COUNT) == f"{total} of {total} cells"
    choose(page, "[data-filter=level]", "bpda")
    assert page.run(COUNT) == f"12 of {total} cells"
    assert page.run(SHOWN + ".length") == 12
    choose(page, "[data-filter=defense]", "<b>&blur")
    assert page.run(SHOWN + ".map((t) => t.dataset.defense + t.dataset.level)") == ["<b>&blurbpda"] * 6
    page.type("#filters [type=search]", "below-NOISE steps")
    assert page.run(SHOWN + ".map((t) => t.dataset.attack)") == ["pgd-8-20"]
    choose(page, "[data-filter=state]", "skipped")
    assert page.run(COUNT) == f"0 of {total} cells"
    page.click("#filters button[type=reset]")
    page.run("return new Promise((done) => setTimeout(done, 50))")
    assert page.run(COUNT) == f"{total} of {total} cells"
    # Commands name the grid in every cell, which tells none from another.
    page.type("#filters [type=search]", "--grid")
    assert page.run(COUNT) == f"0 of {total} cells"
    page.click("#filters button[type=reset]")
    page.run("return new Promise((done) => setTimeout(done, 50))")
    assert page.run(COUNT) == f"{total} of {total} cells"


def test_unfolding(page: Browser) -> None:
    more = "#cells-table tbody:nth-of-type(2) .more"
    detail = "return document.querySelector('#cells-table tbody:nth-of-type(2) .detail')"
    assert page.run(detail + ".offsetHeight") == 0
    page.click(more)
    text = page.run(detail + ".innerText")
    for part in (
        "eps = 2/255",
        "strength = 7",
        "ab" * 32,
        "120 forward",
        "error_rate",
        "bench run",
        "bench show",
    ):
        assert part in text
    assert page.run("return document.querySelector(arguments[0]).ariaExpanded", more) == "true"
    page.click(more)
    assert page.run(detail + ".offsetHeight") == 0


@pytest.mark.parametrize("width", [320, 390, 768])
def test_no_width_is_too_small(page: Browser, width: int) -> None:
    page.size(width, 800)
    assert page.run("return document.documentElement.scrollWidth") <= width
    page.run("document.querySelector('#cells-table .more').click()")
    assert page.run("return document.documentElement.scrollWidth") <= width
    if width < 640:
        # Cards: no heading to click, so a list to sort by.
        choose(page, "#filters .sort-by", "4 descending")
        assert column(page, "#cells-table", 4)[0] == "95.0"
        assert page.run("return document.querySelector('#filters .sort-by').offsetHeight") > 0


@pytest.mark.parametrize("width", [320, 390])
def test_numbers_of_the_worst_case_stand_on_a_phone(page: Browser, width: int) -> None:
    page.size(width, 800)
    row = "[...document.querySelectorAll('#worst-table tbody tr')].at(-1)"
    right = f"return [...{row}.querySelectorAll('td[data-v]')].map((c) => c.getBoundingClientRect().right)"
    assert page.run(right)[1] <= width  # clean and oblivious; the rest scrolls
    # What is no column of its own stands under the defense, which stays in sight.
    assert page.run(f"return {row}.innerText.trim().split(/\\s*\\n\\s*/).slice(0, 3)") == [
        "<b>&blur", "digits", "accuracy (%)\xa0↑"
    ]  # fmt: skip
    page.run("document.querySelector('#worst .scroll').scrollLeft = 1000")
    assert page.run(right)[-1] <= width
    left, end = page.run(
        f"const r = {row}.querySelector('th').getBoundingClientRect(); return [r.left, r.right]"
    )
    assert 0 <= left and end < width / 2
    page.size(1280, 900)
    assert page.run(f"return {row}.querySelector('.under').offsetHeight") == 0


def test_light_dark_and_print(page: Browser) -> None:
    color = "return getComputedStyle(document.body).backgroundColor"
    seen = []
    for scheme in ("light", "dark"):
        page.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        seen.append(page.run(color))
    page.cdp("Emulation.setEmulatedMedia", media="print", features=[])
    page.size(700, 1000)  # A4 less its margins
    try:
        assert seen[0] == "rgb(255, 255, 255)" != seen[1]
        assert page.run("return document.getElementById('filters').offsetHeight") == 0
        for table in ("worst-table", "cells-table"):
            width, height = page.run(
                f"const t = document.getElementById('{table}'); return [t.scrollWidth, t.scrollHeight]"
            )
            assert 0 < width <= 700 and height > 0
    finally:
        page.cdp("Emulation.setEmulatedMedia", media="", features=[])


@pytest.fixture()
def pictured(browser: Browser, stored: tuple[Path, Path], tmp_path: Path) -> Browser:
    grid, folder = stored
    main(["report", "--grid", str(grid), "--store", str(folder / "s"), "--out", str(tmp_path)])
    browser.size(1280, 900)
    browser.open(tmp_path / "report.html")
    return browser


def test_tables_of_the_grid_sort_and_filter(pictured: Browser) -> None:
    page = pictured
    page.click("details.table summary")
    # defense, clean, oblivious / pgd
    order = column(page, "#table-0", 2)
    assert len(order) == 2
    head = "#table-0 thead tr:last-child th:nth-child(3)"
    for direction in (1, -1):
        page.click(f"{head} button")
        assert column(page, "#table-0", 2) == sorted(order, key=lambda v: direction * float(v))
    page.click(f"{head} button")
    assert column(page, "#table-0", 2) == order
    form = "form[data-table=table-0]"
    choose(page, f"{form} [data-filter=h1]", "jpeg")
    names = "return [...document.getElementById('table-0').tBodies].filter((t) => t.offsetHeight)"
    assert page.run(names + ".map((t) => t.dataset.h1)") == ["jpeg"]
    assert page.run(f"return document.querySelector('{form} output').textContent") == "1 of 2 rows"
    assert page.run(COUNT).startswith("{0} of {0} ".format(len(column(page, "#cells-table", 4))))


def test_pictures_stand_in_their_rows(pictured: Browser) -> None:
    page = pictured
    size = "const i = document.querySelector('#cells-table .detail img'); return [i.naturalWidth, i.offsetHeight]"
    width, height = page.run(size)
    assert width > 100 and height == 0
    page.click("#pictures a")
    page.run("return new Promise((done) => setTimeout(done, 50))")
    assert page.run(size)[1] > 50
    choose(page, "[data-filter=pictured]", "with a picture")
    assert page.run(SHOWN + ".map((t) => t.dataset.defense)") == ["none", "jpeg"]
    page.size(390, 800)
    assert page.run("return document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize(("width", "across"), [(320, 2), (390, 2), (600, 3), (768, 3), (1280, 6)])
def test_every_panel_of_a_picture_is_in_sight(pictured: Browser, width: int, across: int) -> None:
    page = pictured
    page.click("#pictures a")
    page.size(width, 800)
    panels = page.run(
        "return [...document.querySelectorAll('#cells-table .detail:not([hidden]) img')]"
        ".map((i) => i.getBoundingClientRect()).map((r) => [r.left, r.right, r.top])"
    )
    assert len(panels) == 6
    assert all(0 <= left and right <= width and right - left > 100 for left, right, _ in panels)
    assert len({top for _, _, top in panels}) == 6 // across


def test_paper_has_what_is_folded(pictured: Browser) -> None:
    page = pictured
    height = "return [...document.querySelectorAll(arguments[0])].map((e) => e.checkVisibility())"
    parts = ("#cells-table tbody:not([hidden]) .detail .command", "#table-0")
    choose(page, "[data-filter=defense]", "jpeg")
    assert not any(shown for part in parts for shown in page.run(height, part))
    page.cdp("Emulation.setEmulatedMedia", media="print", features=[])
    try:
        page.run("return new Promise((done) => setTimeout(done, 100))")
        for part in parts:
            shown = page.run(height, part)
            assert shown and all(shown)
        # What a filter hides stays off the paper.
        assert not any(page.run(height, "#cells-table tbody[hidden] .command"))
    finally:
        page.cdp("Emulation.setEmulatedMedia", media="", features=[])
    page.run("return new Promise((done) => setTimeout(done, 100))")
    assert page.run(height, "#table-0") == [False]
    # As a browser that prints announces it.
    page.run("dispatchEvent(new Event('beforeprint'))")
    assert page.run(height, "#table-0") == [True]
    page.run("dispatchEvent(new Event('afterprint'))")
    assert page.run(height, "#table-0") == [False]
