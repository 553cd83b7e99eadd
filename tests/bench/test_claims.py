"""Claims on frames whose truth is known, on stored rows, and on the papers' own numbers."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from bench.claims import (
    FIELD,
    VERDICTS,
    Claim,
    Pairing,
    Rows,
    comparisons,
    evaluate,
    load_claims,
    reference_frame,
    render_claims,
)
from bench.cli import main
from bench.errors import GridError
from bench.frame import COLUMNS, cell_frame
from bench.grid import GRIDS
from bench.paper import PAPERS, ROOT, table_ids
from bench.plan import Options, make_plan
from bench.stats import mcnemar, paired_proportions, wilson
from bench.store import Store

PLUGINS = Path(__file__).resolve().parents[1] / "plugins"
PGD = {"alpha": "2/255", "eps": "8/255", "loss": "ce", "steps": 20, "target": None}


def line(
    defense: str, wrong: int, n: int = 200, *, recipe: str | None = None, attack: str = "pgd", **changes: Any
) -> dict[str, Any]:
    """One line of error rates: so many of n images wrong."""
    low, high = wilson(wrong, n)
    identity: dict[str, Any] = {"name": defense, "params": changes.pop("params", {}), "version": 1}
    if recipe is not None:
        identity["trained"] = {"recipe": recipe, "role": changes.pop("trained_for", "classification")}
    attack_params = {} if attack == "clean" else {**PGD, **changes.pop("attack_params", {})}
    return {
        **dict.fromkeys(COLUMNS, ""),
        "grid": "g", "profile": "mini", "cell": "", "role": "classification", "task": "classification",
        "dataset": "mini_digits", "model": "mini_resnet", "defense": defense, "attack": attack,
        "attack_name": "" if attack == "clean" else attack, "level": "clean" if attack == "clean" else "oblivious",
        "level_label": "oblivious", "seed": 0, "image_format": "float", "metric": "error_rate", "unit": "%",
        "higher_is_better": False, "value": wrong / n, "low": low, "high": high, "n": n, "status": "ok", "flags": (),
        "attack_params": json.dumps(attack_params), "defense_params": json.dumps(identity),
    } | changes  # fmt: skip


def claim(kind: str = "order", **changes: Any) -> Claim:
    spec: dict[str, Any] = {
        "id": "cafd.test", "paper": "cafd", "section": "1", "statement": "s", "kind": kind,
        "where": {"level": ["oblivious"], "metric": ["error_rate"]},
        "first": {"defense": ["cafd"]}, "second": {"defense": ["hgd"]},
    }  # fmt: skip
    return Claim(**(spec | changes))


def verdict(lines: list[dict[str, Any]], made: Claim | None = None, pair: Any = None) -> tuple[str, str]:
    row = evaluate([made or claim()], pd.DataFrame(lines), pair).iloc[0]
    return row["verdict"], row["reason"]


CAFD, HGD = {"recipe": "cafd"}, {"recipe": "hgd"}


# -- verdicts -------------------------------------------------------------------------------------------------------
def test_a_clear_order_holds_and_its_reverse_fails() -> None:
    assert verdict([line("cafd", 20, **CAFD), line("hgd", 80, **HGD)]) == ("holds", "")
    assert verdict([line("cafd", 80, **CAFD), line("hgd", 20, **HGD)]) == ("fails", "fails in 1 of 1")


def test_direction_is_the_metrics() -> None:
    better = {"metric": "accuracy", "higher_is_better": True}
    made = claim(where={"metric": ["accuracy"]})
    assert (
        verdict([line("cafd", 180, **CAFD, **better), line("hgd", 120, **HGD, **better)], made)[0] == "holds"
    )


def test_too_few_images_leave_it_open() -> None:
    found = verdict([line("cafd", 20, **CAFD), line("hgd", 26, **HGD)])
    assert found == ("undecided", "1 of 1 open, the interval covers the threshold: too few images")
    assert verdict([line("cafd", 2000, 20000, **CAFD), line("hgd", 2600, 20000, **HGD)])[0] == "holds"


def test_equal_values_are_open() -> None:
    assert verdict([line("cafd", 20, **CAFD), line("hgd", 20, **HGD)])[0] == "undecided"


def test_what_is_missing_is_named() -> None:
    assert verdict([line("cafd", 20, **CAFD)]) == ("not run", "not run: hgd")
    unfinished = [line("hgd", 80, **HGD, status=status) for status in ("pending", "skip", "error", "partial")]
    assert verdict([line("cafd", 20, **CAFD), *unfinished]) == ("not run", "not run: hgd")
    elsewhere = line("hgd", 80, **HGD, role="source")
    assert verdict([line("cafd", 20, **CAFD), elsewhere]) == ("not run", "no two finished cells to compare")


def test_a_claim_with_parts_not_run_does_not_hold() -> None:
    lines = [line("cafd", 20, **CAFD), line("hgd", 80, **HGD)]
    every = claim(where={"level": ["oblivious"], "attack": ["pgd", "deepfool"]})
    assert verdict(lines, every) == ("undecided", "holds where run; not run: deepfool")
    lines[0], lines[1] = line("cafd", 80, **CAFD), line("hgd", 20, **HGD)
    assert verdict(lines, every)[0] == "fails"


def test_one_failure_among_many_must_be_clear() -> None:
    def attacks(wrong: int) -> list[dict[str, Any]]:
        rest = [(f"a{i}", 20, 80) for i in range(30)]
        return [
            made
            for attack, ours, theirs in [("pgd", wrong, 20), *rest]
            for made in (line("cafd", ours, attack=attack, **CAFD), line("hgd", theirs, attack=attack, **HGD))
        ]

    assert verdict(attacks(40)[:2])[0] == "fails"
    assert verdict(attacks(40)) == ("undecided", "fails in 1 of 31, which may be chance among so many")
    assert verdict(attacks(80)) == ("fails", "fails in 1 of 31")


def test_the_least_favourable_comparison_is_shown() -> None:
    lines = [
        line("cafd", 20, attack="pgd", **CAFD), line("hgd", 80, attack="pgd", **HGD),
        line("cafd", 30, attack="mim", **CAFD), line("hgd", 60, attack="mim", **HGD),
    ]  # fmt: skip
    row = evaluate([claim()], pd.DataFrame(lines)).iloc[0]
    assert (row["first"], row["second"], row["effect"]) == (15.0, 30.0, pytest.approx(15.0))
    assert "mim" in row["where"]
    assert (row["compared"], row["held"], row["n"]) == (2, 2, 200)


def test_interval_of_a_difference() -> None:
    # Newcombe 1998, Statistics in Medicine 17:873, Table II, method 10: 56/70 against 48/80.
    (found,) = comparisons(
        claim("sign"), pd.DataFrame([line("cafd", 56, 70, **CAFD), line("hgd", 48, 80, **HGD)])
    )
    assert (found.effect, found.low, found.high) == pytest.approx((20.0, 5.24, 33.39), abs=0.005)


def test_kinds() -> None:
    lines = [line("cafd", 2000, 20000, **CAFD), line("hgd", 8000, 20000, **HGD)]  # 10 % and 40 %
    for changes, expected in (
        ({"at_least": 20}, "holds"), ({"at_least": 40}, "fails"), ({"at_least": 30}, "undecided"),
        ({"at_most": 40}, "holds"), ({"at_most": 20}, "fails"), ({"within": 40}, "holds"), ({"within": 20}, "fails"),
        ({"at_least": 70, "relative": True}, "holds"), ({"at_least": 80, "relative": True}, "fails"),
        ({"at_least": 75, "relative": True}, "undecided"),
    ):  # fmt: skip
        assert verdict(lines, claim("drop", **changes))[0] == expected, changes
    assert verdict(lines, claim("order", margin=20))[0] == "holds"
    assert verdict(lines, claim("order", margin=40))[0] == "fails"
    assert verdict(lines, claim("sign", positive=False))[0] == "holds"
    assert verdict(lines, claim("sign"))[0] == "fails"
    whole = {"where": {"defense": ["hgd"]}, "first": {}, "second": {}}
    for changes, expected in (
        ({"at_least": 35}, "holds"), ({"at_least": 45}, "fails"), ({"at_least": 40}, "undecided"),
        ({"at_most": 45}, "holds"), ({"at_most": 35}, "fails"),
    ):  # fmt: skip
        assert verdict(lines, claim("bound", **whole, **changes))[0] == expected, changes


def test_thresholds_on_other_data_are_said_to_be_the_papers() -> None:
    lines = [line("cafd", 20, **CAFD), line("hgd", 80, **HGD)]
    said = "the threshold is the paper's, on other data"
    assert verdict(lines, claim("drop", at_least=5)) == ("holds", said)
    assert verdict(lines, claim("order", margin=5)) == ("holds", said)
    assert verdict([made | {"profile": "paper"} for made in lines], claim("drop", at_least=5)) == (
        "holds",
        "",
    )


def test_relative_drop_shows_the_reduction() -> None:
    lines = [line("cafd", 2000, 20000, **CAFD), line("hgd", 8000, 20000, **HGD)]
    (found,) = comparisons(claim("drop", at_least=70, relative=True), pd.DataFrame(lines))
    assert found.effect == pytest.approx(75.0)
    assert found.low < 75 < found.high


def test_mean_over_comparisons() -> None:
    lines = [
        line("cafd", 1000, 10000, attack="pgd", **CAFD), line("hgd", 3000, 10000, attack="pgd", **HGD),
        line("cafd", 4000, 10000, attack="mim", **CAFD), line("hgd", 3000, 10000, attack="mim", **HGD),
    ]  # fmt: skip
    assert verdict(lines)[0] == "fails"
    (found,) = comparisons(claim(over="mean"), pd.DataFrame(lines))
    assert (found.effect, found.verdict) == (pytest.approx(5.0), "holds")


def test_suspect_attacks_are_mentioned() -> None:
    lines = [line("cafd", 20, **CAFD, flags=("below-noise",)), line("hgd", 80, **HGD)]
    assert verdict(lines) == ("holds", "1 of 1 rest on suspect attacks")


def test_cells_that_two_grids_share_count_once() -> None:
    lines = [
        line(name, wrong, grid=grid, cell=name, recipe=name)
        for grid in ("one", "two")
        for name, wrong in (("cafd", 20), ("hgd", 80))
    ]
    assert len(comparisons(claim(), pd.DataFrame(lines))) == 1


def test_of_shared_cells_those_with_the_most_images_count() -> None:
    lines = [
        line(name, share * n // 200, n, grid=grid, cell=name, recipe=name)
        for grid, n in (("a", 40), ("b", 200))
        for name, share in (("cafd", 20), ("hgd", 80))
    ]
    asked = []

    def pair(first: str, second: str, metric: str, images: int) -> None:
        asked.append(images)

    (found,) = comparisons(claim(), pd.DataFrame(lines), pair)
    assert found.n == 200 and asked == [200]


def test_a_claim_looks_at_the_grids_it_is_about() -> None:
    made = claim(tables=["table1"], figures=["fig5"], ours={"role": ["vgg", "vgg_at"]})

    def compared(grid: str, role: str = "vgg") -> int:
        lines = [
            line("cafd", 20, grid=grid, role=role, **CAFD),
            line("hgd", 80, grid=grid, role=role, **HGD),
        ]
        return int(evaluate([made], pd.DataFrame(lines)).iloc[0]["compared"])

    assert [compared(grid) for grid in ("cafd_table1", "cafd_fig5")] == [1, 1]
    assert [compared(grid) for grid in ("cafd_table2", "cafd_fig6", "nrp_table1")] == [0, 0, 0]
    # Its roles are those of the papers' profiles; a grid of one's own has its own.
    assert (compared("cafd_table1", "resnet"), compared("my_grid", "resnet")) == (0, 1)


def test_a_worst_case_is_no_attack() -> None:
    lines = [
        line(name, wrong, recipe=name, attack=attack, attack_name="pgd")
        for name, wrong in (("cafd", 20), ("hgd", 80))
        for attack in ("pgd", "worst case")
    ]
    assert len(comparisons(claim(), pd.DataFrame(lines))) == 1
    named = claim(where={"attack": ["worst case"]})
    assert len(comparisons(named, pd.DataFrame(lines))) == 1


# -- paired rows ----------------------------------------------------------------------------------------------------
def test_rows_decide_where_they_are_there() -> None:
    lines = [line("cafd", 20, cell="a", **CAFD), line("hgd", 26, cell="b", **HGD)]
    assert verdict(lines)[0] == "undecided"

    def pair(first: str, second: str, metric: str, images: int) -> Pairing:
        assert (first, second, metric, images) == ("a", "b", "error_rate", 200)
        return Pairing(-0.03, -0.05, -0.01, 0.03)

    assert verdict(lines, pair=pair)[0] == "holds"
    (found,) = comparisons(claim(), pd.DataFrame(lines), pair)
    assert (found.effect, found.low, found.high, found.paired) == (3.0, 1.0, 5.0, True)
    # An interval from four images that all point one way is no proof: 2 * 0.5 ** 4 = 0.125.
    assert verdict(lines, pair=lambda *_: Pairing(-1.0, -1.0, -1.0, 0.125))[0] == "undecided"
    assert verdict(lines, pair=lambda *_: None)[0] == "undecided"


GRID: dict[str, Any] = {
    "name": "toy",
    "profile": str(PLUGINS / "toy_profile.yaml"),
    "plugins": [str(PLUGINS / "toy.py")],
    "evaluate": {"repeats": 1},
    "attacks": {"fgsm": {"name": "fgsm", "eps": "4/255"}, "pgd": {"name": "pgd", "eps": "16/255", "steps": 4}},
    "defenses": {"random": {"name": "noise", "eps": "32/255"}},
    "blocks": [
        {
            "roles": ["classification"], "defenses": ["none", "jpeg", "random"], "attacks": ["fgsm", "pgd"],
            "threats": ["oblivious", {"level": "bpda", "eot": 1}],
        }
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished toy grid, toy.yaml, and its store."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy.yaml").write_text(yaml.safe_dump(GRID))
    common = ["--grid", str(folder / "toy.yaml"), "--store", str(folder / "store")]
    main(["run", *common, "--device", "cpu", "--workers", "1", "--quiet", "--out", str(folder / "out")])
    return folder


def test_pairs_come_from_the_stored_rows(finished: Path) -> None:
    from bench.frame import load_rows
    from bench.runner import cell_record

    plan = make_plan(Options(finished / "toy.yaml"))
    store = Store(finished / "store")
    frame, rows = cell_frame(plan, store), Rows([(plan, store)])
    cells = {
        cell.defense_label: cell
        for cell in plan.cells
        if (cell.attack_label, cell.level) == ("fgsm", "oblivious")
    }
    images = len(cells["none"].target.ids)
    found = rows(cells["random"].key[:16], cells["none"].key[:16], "error_rate", images)
    assert found is not None
    right = {
        name: [row["scores"][0] for row in load_rows(cell_record(store, cell), cell.target.ids)]
        for name, cell in cells.items()
    }
    n = len(right["none"])
    assert found.value == pytest.approx((sum(right["none"]) - sum(right["random"])) / n)
    assert found.low <= found.value <= found.high
    assert found.p == mcnemar(right["random"], right["none"])
    wrong = {name: [1 - score for score in right[name]] for name in right}
    assert found[:3] == paired_proportions(wrong["random"], wrong["none"])
    assert rows("0" * 16, cells["none"].key[:16], "error_rate", images) is None
    assert rows(cells["random"].key[:16], cells["none"].key[:16], "error_rate", images + 1) is None
    # Another grid has fewer of the same images: the first ones that both have are compared.
    few = rows(cells["random"].key[:16], cells["none"].key[:16], "error_rate", 3)
    assert few is not None
    assert few.value == pytest.approx((sum(right["none"][:3]) - sum(right["random"][:3])) / 3)
    # A cell equals itself on every image, which does not prove that two such defenses always agree.
    same = rows(cells["none"].key[:16], cells["none"].key[:16], "error_rate", images)
    assert same is not None and same.low < 0 == same.value < same.high
    # Four classes have no top five.
    undefined = rows(cells["random"].key[:16], cells["none"].key[:16], "top5", images)
    assert undefined is not None and math.isnan(undefined.value) and math.isnan(undefined.p)

    made = claim("sign", where={"level": ["oblivious"], "metric": ["error_rate"], "attack": ["fgsm"]},
                 first={"defense": ["random"]}, second={"defense": ["none"]})  # fmt: skip
    (compared,) = comparisons(made, frame, rows)
    assert (compared.paired, compared.n, compared.p) == (True, n, found.p)
    assert compared.effect == pytest.approx(100 * found.value)
    assert compared.first - compared.second == pytest.approx(compared.effect)


def test_command_line(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["claims", "--grid", str(finished / "toy.yaml"), "--store", str(finished / "store")]
    main([*common, "--paper", "cafd", "--reference", "-f", "csv"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["claim"] for row in rows] == [made.id for made in load_claims(["cafd"])]
    assert {row["verdict"] for row in rows} == {"not run"}
    assert Counter(row["paper_verdict"] for row in rows)["holds"] > 0
    main([*common, "--paper", "hgd", "--output", str(finished / "new" / "claims.md")])
    assert "claims: 0 holds, 0 fails, 0 undecided, " in (finished / "new" / "claims.md").read_text(
        encoding="utf-8"
    )
    for wrong, message in (
        (["--paper", "hgdd"], "unknown paper 'hgdd': did you mean 'hgd'"),
        (["-f", "markdwn"], "--format: unknown format 'markdwn': did you mean 'markdown'"),
    ):
        with pytest.raises(SystemExit) as error:
            main([*common, *wrong])
        assert error.value.code == 2
        text = capsys.readouterr().err
        assert message in text
        assert len(text.splitlines()) == 1


def test_written_results_need_no_store(finished: Path, bench: Any, tmp_path: Path) -> None:
    """The same values; intervals without rows are wider, so that less is decided."""
    where = ("--grid", str(finished / "toy.yaml"), "--store", str(finished / "store"))
    assert bench("run", *where, "--out", str(tmp_path / "all" / "toy"), "-q")[0] == 0
    for folder in (tmp_path / "all" / "toy", tmp_path / "all"):
        code, out, _ = bench("claims", str(folder), "--paper", "field", "-f", "csv")
        rows = {row["claim"]: row for row in csv.DictReader(io.StringIO(out))}
        assert code == 0 and list(rows) == [made.id for made in load_claims(["field"])]
    stored = csv.DictReader(io.StringIO(bench("claims", *where, "--paper", "field", "-f", "csv")[1]))
    for row in stored:
        assert {key: rows[row["claim"]][key] for key in ("compared", "missing", "first")} == {
            key: row[key] for key in ("compared", "missing", "first")
        }
    for wrong, said in (
        ((str(folder), "--limit", "3"), "go with a grid file"),
        ((str(folder), *where), "give either"),
        ((str(tmp_path / "al"),), "unknown folder of results"),
    ):
        code, _, err = bench("claims", *wrong)
        assert (code, err.count("\n")) == (2, 1) and said in err


def test_what_the_field_holds_is_tested_on_every_attack(bench: Any) -> None:
    """The committed answers are those of the committed rows, and name all that the grid of attacks has."""
    code, out, _ = bench("claims", str(GRIDS.parent / "results" / "attacks"), "--paper", "field")
    assert code == 0 and out == (GRIDS.parent / "results" / "attacks" / "facts.md").read_text(
        encoding="utf-8"
    )
    assert " 0 not run" in out
    for name in ("oblivious_misleads", "bpda_above_white_box", "noise_undoes_minimal_norm"):
        assert re.search(rf"field\.{name} +\| holds", out)


# -- what counts as what --------------------------------------------------------------------------------------------
def names(**selectors: list[Any]) -> Claim:
    return claim("bound", where=selectors, first={}, second={}, at_least=0)


def count(lines: list[dict[str, Any]], **selectors: list[Any]) -> int:
    return len(comparisons(names(**selectors), pd.DataFrame(lines)))


def test_defenses_by_recipe_label_name_parameters_and_members() -> None:
    assert count([line("purifier", 1, recipe="hgd_features")], defense=["fgd"]) == 1
    assert count([line("purifier", 1, recipe="hgd_features")], defense=["hgd"]) == 0
    # The registered name of every variant is hgd; the recipe tells them apart.
    assert count([line("hgd", 1, recipe="hgd_dae") | {"defense": "x"}], defense=["hgd"]) == 0
    assert count([line("anything", 1) | {"defense": "cafd"}], defense=["cafd"]) == 1
    assert count([line("jpeg", 1, params={"quality": 75})], defense=["jpeg_q75"]) == 1
    assert count([line("jpeg", 1, params={"quality": 50})], defense=["jpeg_q75"]) == 0
    chain = {
        "name": "full+jpeg",
        "members": [{"name": "alignment", "trained": {"recipe": "alignment"}}, {"name": "jpeg"}],
    }
    made = line("full+jpeg", 1) | {"defense_params": json.dumps(chain)}
    assert count([made], defense=["alignment_full_jpeg"]) == 1
    assert count([made], defense=["alignment_full", "jpeg"]) == 0


def test_attacks_by_name_parameters_and_budget() -> None:
    targeted = line("none", 1, attack="pgd_t8", attack_name="pgd", attack_params={"target": "random"})
    plain = line("none", 1, attack="mine", attack_name="pgd")
    assert count([targeted, plain], attack=["pgd_n"]) == 1
    assert count([targeted, plain], attack=["pgd_t"]) == 1
    assert count([plain], attack=["pgd_n_it20"]) == 1
    assert count([plain], attack=["pgd_n_it10"]) == 0
    assert count([plain], eps=[8]) == 1
    assert count([plain], eps=[4, 16]) == 0
    assert (
        count(
            [line("none", 1, attack="b", attack_name="i_fgsm", attack_params={"loss": "cls+loc"})],
            attack=["cls_loc"],
        )
        == 1
    )


def test_a_retrained_model_stands_in_its_base_models_place() -> None:
    lines = [
        line("cafd", 20, **CAFD),
        line("none", 199),
        line("none", 80, role="at", model="mini_resnet_at"),
    ]
    against = claim(second={"defense": ["at"]})
    (found,) = comparisons(against, pd.DataFrame(lines))
    assert found.second == 40.0
    (found,) = comparisons(claim(second={"defense": ["none"]}), pd.DataFrame(lines))
    assert found.second == 99.5


def test_a_retrained_model_of_a_papers_role() -> None:
    def of(role: str, label: str = "at") -> list[dict[str, Any]]:
        cafd = line("cafd", 20, **CAFD, role="cifar10_vgg19")
        return [cafd, {**line("none", 80, role=role), "defense": label}]

    against = claim(second={"defense": ["at"]})
    assert [c.second for c in comparisons(against, pd.DataFrame(of("cifar10_vgg19_at")))] == [40.0]
    undefended = claim(second={"defense": ["none"]})
    assert not comparisons(undefended, pd.DataFrame(of("cifar10_vgg19_at")))
    # A target that happens to be trained so is undefended all the same.
    assert not comparisons(against, pd.DataFrame(of("cifar10_vgg19_at", "none")))
    # So do those that only profile paper has; one that is trained on without attacks is not the undefended one.
    occluded = claim(second={"defense": ["doa"]})
    assert [c.second for c in comparisons(occluded, pd.DataFrame(of("cifar10_vgg19_doa", "doa")))] == [40.0]
    on = claim(second={"defense": ["none_finetune"]})
    finetuned = pd.DataFrame(of("cifar10_vgg19_finetune", "none_finetune"))
    assert [c.second for c in comparisons(on, finetuned)] == [40.0] and not comparisons(undefended, finetuned)
    here = [*of("cifar10_vgg19_at", "none"), line("cafd", 10, **CAFD, role="cifar10_vgg19_at")]
    assert [c.second for c in comparisons(undefended, pd.DataFrame(here))] == [40.0]


def test_roles_that_share_a_checkpoint_are_guided_by_their_own() -> None:
    """On the embedded data a paper's role has the checkpoint of the role with the same model and images."""
    lines = [
        line("cafd", 20, recipe="cafd", trained_for="source", role=role)
        for role in ("svhn_vgg19", "svhn_wrn28")
    ]
    for one in lines:
        identity = json.loads(one["defense_params"])
        identity["trained"]["profile"] = "mini"
        one["defense_params"] = json.dumps(identity)
    made = claim(
        first={"defense": ["cafd"], "guide": ["other"]},
        second={"defense": ["cafd"], "guide": ["own"]},
        across=["role"],
    )
    (found,) = comparisons(made, pd.DataFrame(lines))
    assert "svhn_wrn28 | svhn_vgg19" in found.where


def test_who_guided_a_defense() -> None:
    own = line("lgd", 20, recipe="hgd", role="source", trained_for="source")
    other = line("lgd (resnet)", 22, recipe="hgd", role="source", trained_for="classification")
    made = claim(
        first={"defense": ["lgd"], "guide": ["other"]}, second={"defense": ["lgd"], "guide": ["own"]}
    )
    (found,) = comparisons(made, pd.DataFrame([own, other]))
    assert (found.first, found.second) == (11.0, 10.0)
    away = line("lgd", 30, recipe="hgd")
    across = claim(
        first={"defense": ["lgd"], "guide": ["other"]},
        second={"defense": ["lgd"], "guide": ["own"]},
        across=["role"],
    )
    assert len(comparisons(across, pd.DataFrame([own, other, away]))) == 2
    assert count([own, other, line("jpeg", 1)], guide=["none"]) == 1


def test_levels_with_other_labels_still_pair() -> None:
    rp = '{"name": "random_resize_pad"}'
    lines = [
        line("cafd", 40, level="bpda", level_label="bpda", **CAFD),
        line("rp", 80, level="bpda", level_label="bpda (EOT 10)", defense_params=rp),
        line("cafd", 20, level="transfer", level_label="transfer from source", **CAFD),
        line("rp", 80, level="transfer", level_label="transfer from other", defense_params=rp),
    ]  # fmt: skip
    made = claim(where={"metric": ["error_rate"]}, second={"defense": ["rp"]})
    assert [found.first for found in comparisons(made, pd.DataFrame(lines))] == [20.0]


# -- the shipped claims ---------------------------------------------------------------------------------------------
def test_shipped_claims_are_well_formed() -> None:
    from defenses.training.recipe import RECIPES

    made = load_claims([*PAPERS, FIELD])
    facets = {
        "task",
        "dataset",
        "role",
        "model",
        "defense",
        "attack",
        "level",
        "metric",
        "eps",
        "source",
        "guide",
    }
    assert len({item.id for item in made}) == len(made)
    assert all(8 <= count <= 20 for count in Counter(item.paper for item in made).values())
    assert {item.paper for item in made} == {*PAPERS, FIELD}
    assert {item.paper for item in load_claims()} == set(PAPERS)
    for item in made:
        assert item.kind in ("order", "drop", "bound", "sign")
        assert {f"{item.paper}/{table}" for table in item.tables} <= set(table_ids())
        for selector in (item.where, item.first, item.second, item.reference, item.ours):
            assert set(selector) <= facets
        # What it looks at exists, and so do the roles and sources it chooses there.
        if item.rerun and item.paper != FIELD:
            assert item.grids
            text = "".join(
                (GRIDS / "papers" / f"{name}.yaml").read_text(encoding="utf-8") for name in item.grids
            )
            chosen = [*item.ours.get("role", ()), *"+".join(item.ours.get("source", ())).split("+")]
            assert all(role in text for role in chosen)
        assert bool(item.first and item.second) == (item.kind != "bound")
        limits = [item.at_least, item.at_most, item.within]
        assert sum(limit is not None for limit in limits) == (item.kind in ("drop", "bound"))
        assert item.statement and bool(item.section) == (item.paper != FIELD)
        assert "metric" in item.where
    book = yaml.safe_load((ROOT / "claims.yaml").read_text(encoding="utf-8"))
    for patterns in book["names"]["defenses"].values():
        for pattern in [part for p in patterns for part in (p, *p.get("members", []))]:
            wanted = pattern.get("recipe", [])
            assert set(wanted if isinstance(wanted, list) else [wanted]) <= set(RECIPES)


FAILING = {
    # DDN: 14.90 against 11.25, 11.92 and 10.99 on SVHN, 9.24 against 9.18 on CIFAR-10.
    "cafd.oblivious_preprocessing": (64, 4, -3.91),
    # CIFAR-100: 71.2 - 67.9.
    "alignment.pixel_constraint_price": (6, 1, 3.3),
    # ImageNet: 62.9 against 63.2; CIFAR-10 is equal.
    "alignment.class_constraint_clean": (6, 1, -0.3),
    # loc: NRP 53.2, full 52.0.
    "alignment.best_scenes": (87, 1, -1.2),
    # ImageNet DeepFool: Denoise 57.8, full 57.6.
    "alignment.best_other_model": (117, 1, -0.2),
    # loc: 65.0 - 58.6.
    "alignment.jpeg_other_models": (24, 1, 6.4),
    # CIFAR-100 DeepFool, printed 61.5: TRADES 62.6, Free-adv 49.0, NRP 66.6, Denoise 66.7, APE 65.7.
    "alignment.black_box": (81, 4, -5.2),
    # FGSM from Inc-v3 and Inc-v4: HGD 2.1 and 2.6, NRP 3.2 and 3.1.
    "nrp.attacks_all": (210, 2, -1.1),
    # APE-GAN 74.5 - 31.9.
    "nrp.ensemble_drop": (7, 1, 42.6),
    # Detection 59.9 - 54.4, segmentation 56.8 - 51.3.
    "nrp.keeps_clean": (3, 2, 5.5),
    # UNet: 1 - 18.8 / 47.7.
    "nrp.bpda_gain_ens": (2, 1, 100 * (1 - 18.8 / 47.7)),
    # VGG-19: SSP 2.7, MI-FGSM 1.5, DIM 0.6.
    "nrp.ssp_top1_natural": (30, 2, 2.1),
    # MI-FGSM 42.0 and 62.0, SSP 40.2 and 58.0.
    "nrp.ssp_top1_ensemble": (4, 2, 4.0),
    # White-box at 16: CGD 73.2, LGD 69.2.
    "hgd.variants_alike": (10, 1, -4.0),
}
FIGURES = {
    "cafd.ablation_feature", "cafd.ablation_adversarial", "nrp.ablation_feature", "nrp.ablation_pixel",
    "nrp.ablation_gan", "nrp.ablation_training", "nrp.ablation_fgsp",
}  # fmt: skip


def test_the_papers_own_numbers() -> None:
    made = load_claims()
    result = evaluate(made, reference_frame(), reference=True).set_index("claim")
    failing = result[result["verdict"] == "fails"]
    found = {name: (row["compared"], row["failed"], row["effect"]) for name, row in failing.iterrows()}
    assert set(found) == set(FAILING)
    for name, (compared, failed, effect) in FAILING.items():
        assert found[name] == (compared, failed, pytest.approx(effect, abs=1e-9)), name
    assert set(result.index[result["verdict"] == "not run"]) == FIGURES
    assert not result["verdict"].eq("undecided").any()
    assert (result.loc[result["verdict"] == "holds", "missing"] == "").all()
    gains = result.loc[["cafd.bpda_gain_ape", "cafd.bpda_gain_hgd"], "effect"]
    assert list(gains) == pytest.approx([49.87, 39.84], abs=0.005)


def test_the_page_of_the_papers_own_numbers_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    main(["claims", "--reference"])
    page = (ROOT / "claims.md").read_text(encoding="utf-8")
    assert page.endswith(capsys.readouterr().out)


def test_a_contest_is_not_run_again() -> None:
    result = evaluate(load_claims(["hgd"]), reference_frame(["hgd"])).set_index("claim")
    assert result.loc["hgd.contest_score", "verdict"] == "not run"
    assert result.loc["hgd.contest_score", "reason"] == "cannot be run again"


def test_rendering() -> None:
    lines = [line("cafd", 20, **CAFD), line("hgd", 80, **HGD)]
    result = evaluate([claim()], pd.DataFrame(lines))
    text = render_claims(result)
    assert "| cafd.test | holds" in text
    assert (
        "30.0 [21.8, 37.7]: 10.0 and 40.0 (classification / mini_digits / cafd \\| hgd / pgd / oblivious"
        in text
    )
    assert text.endswith("1 claims: 1 holds, 0 fails, 0 undecided, 0 not run\n")
    own = result.assign(verdict="fails")
    assert "on the paper's numbers" in render_claims(result, own=own)
    rows = list(csv.DictReader(io.StringIO(render_claims(result, "csv", own))))
    assert (rows[0]["verdict"], rows[0]["paper_verdict"]) == ("holds", "fails")
    assert not math.isnan(float(rows[0]["effect"]))
    with pytest.raises(GridError, match="unknown format 'markdow': did you mean 'markdown'"):
        render_claims(result, "markdow")
    assert set(result["verdict"]) <= set(VERDICTS)


def test_grids_that_lack_checkpoints_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: Any
) -> None:
    """Of the papers' grids those count that can have run; one that is asked for by name has to be there."""
    lacking = tmp_path / "papers" / "lacking.yaml"
    lacking.parent.mkdir()
    block = "{roles: [wideresnet], defenses: [{name: cafd, train_seed: 9}], attacks: [fgsm], threats: [oblivious]}"
    lacking.write_text(
        f"name: lacking\nprofile: mini\nattacks: {{fgsm: fgsm}}\nblocks: [{block}]\n", encoding="utf-8"
    )
    monkeypatch.setattr("bench.grid.GRIDS", tmp_path)
    (tmp_path / "store").mkdir()
    command = ("claims", "--paper", "cafd", "--store", str(tmp_path / "store"))
    code, out, err = bench(*command)
    assert code == 0 and "not run" in out and "left out lacking.yaml: it lacks 1 trained checkpoints" in err
    code, _, err = bench(*command, "--grid", str(lacking))
    assert code == 2 and "has no checkpoint cafd-mini-wideresnet-s9" in err
    other = tmp_path / "papers" / "other.yaml"
    other.write_text(
        lacking.read_text().replace("lacking", "other").replace("{name: cafd, train_seed: 9}", "none")
    )
    lacking.write_text(lacking.read_text().replace("defenses: [", "defenses: [none, "))
    code, out, err = bench(*command, "--without", "cafd(train_seed=9)")
    assert code == 0 and "left out" not in err and "not run" in out, err
    code, _, err = bench(*command, "--without", "caffd")
    assert code == 2 and "--without: unknown role, defense or attack 'caffd'" in err
