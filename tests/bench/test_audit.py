"""Every planted fault is found, nothing else is, and the report says what to do."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.audit import Audit, _given, _next, _variants, audit, extended, extras, report, unit_findings
from bench.checks import FLAGS
from bench.cli import main
from bench.errors import BenchError
from bench.frame import cell_frame
from bench.grid import GRIDS
from bench.plan import Options, Plan, make_plan
from bench.registry import ATTACKS
from bench.runner import pending
from bench.store import Store
from bench.written import Written

ROOT = Path(__file__).resolve().parents[2]
EPS = "20/255"
STEPS = {"eps": EPS, "alpha": "5/255", "steps": 12}
PROFILE = """
name: planted
roles:
  classification: {dataset: {name: toy_images, size: 40}, model: toy_linear}
  saturated: {dataset: {name: toy_images, size: 40}, model: {name: planted_model, fault: saturated, base: toy_linear}}
  swapped: {dataset: {name: toy_images, size: 40}, model: {name: planted_model, fault: swapped, base: toy_linear}}
"""
GRID: dict[str, Any] = {
    "name": "planted",
    "profile": "profile.yaml",
    "plugins": [str(ROOT / "tests" / "plugins" / "toy.py"), str(ROOT / "grids" / "audit_plugins.py")],
    "evaluate": {"repeats": 2},
    "defenses": {
        "jpeg": {"name": "jpeg", "quality": 90},
        "random": {"name": "noise", "eps": "8/255"},
        "quantise": "planted_quantise",
        "global": "planted_global_noise",
    },
    "attacks": {
        "noise": {"name": "noise", "eps": EPS},
        "pgd": {"name": "pgd", **STEPS},
        "bim": {"name": "bim", **STEPS},
        "fgsm": {"name": "fgsm", "eps": EPS},
        "few": {"name": "bim", "eps": EPS, "alpha": "3/255", "steps": 2},
        "descent": {"name": "planted_descent", **STEPS},
        "clean_start": {"name": "planted_clean_start", **STEPS},
        "overshoot": {"name": "planted_overshoot", **STEPS},
        "meddler": {"name": "planted_meddler", **{**STEPS, "steps": 1}},
    },
    "blocks": [
        {"roles": ["classification"], "defenses": ["none"], "threats": ["oblivious"],
         "attacks": ["noise", "pgd", "bim", "fgsm", "few", "descent", "clean_start", "overshoot", "meddler"]},
        {"roles": ["classification"], "defenses": ["jpeg"], "attacks": ["noise", "pgd"],
         "threats": ["oblivious", "bpda"]},
        {"roles": ["classification"], "defenses": ["random"], "attacks": ["noise", "bim"],
         "threats": [{"level": "white_box", "eot": 8}]},
        {"roles": ["classification"], "defenses": ["random"], "attacks": ["pgd"],
         "threats": [{"level": "white_box", "eot": 1}]},
        {"roles": ["classification"], "defenses": ["quantise"], "attacks": ["noise", "pgd"],
         "threats": ["bpda", "white_box"]},
        {"roles": ["classification"], "defenses": ["global"], "attacks": ["pgd"], "threats": ["white_box"]},
        {"roles": ["saturated", "swapped"], "defenses": ["none"], "attacks": ["noise", "pgd"],
         "threats": ["oblivious"]},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which the planted grid has run."""
    where = tmp_path_factory.mktemp("audit")
    (where / "profile.yaml").write_text(PROFILE)
    (where / "planted.yaml").write_text(yaml.safe_dump({**GRID, "profile": str(where / "profile.yaml")}))
    arguments = ["--store", str(where / "s"), "--out", str(where / "o"), "--workers", "1", "-q"]
    with pytest.raises(SystemExit) as stopped:
        main(["run", "--grid", str(where / "planted.yaml"), *arguments])
    assert stopped.value.code == 2  # the planted hard failures
    return where


@pytest.fixture(scope="module")
def plan(folder: Path) -> Plan:
    return make_plan(Options(folder / "planted.yaml"))


@pytest.fixture(scope="module")
def judged(folder: Path, plan: Plan) -> Audit:
    return audit(plan, Store(folder / "s"))


def suspicions(result: Audit) -> dict[tuple[str, ...], set[str]]:
    return {
        (c.target.role, c.defense_label, c.attack_label, c.level): {f.flag for f in found if f.suspect}
        for c, found in result.suspect
    }


def test_planted_faults_are_found_and_sound_cells_are_not(judged: Audit) -> None:
    role = "classification"
    found = suspicions(judged)
    swapped = found.pop(("swapped", "none", "clean", "clean"))
    assert swapped == {"channels-swapped"}
    found = {key: flags for key, flags in found.items() if key[0] != "swapped"}
    assert found.pop(("saturated", "none", "pgd", "oblivious")) >= {"zero-gradient"}
    assert found.pop((role, "quantise", "pgd", "white_box")) >= {"zero-gradient", "full-gradient-suspect"}
    assert found.pop((role, "random", "pgd", "white_box")) == {"no-eot"}
    assert found.pop((role, "none", "few", "oblivious")) >= {"fails-unit-test"}
    assert found.pop((role, "none", "descent", "oblivious")) >= {"below-noise", "fails-unit-test"}
    assert found.pop((role, "none", "clean_start", "oblivious")) >= {
        "zero-gradient",
        "unchanged",
        "below-noise",
    }
    assert found == {}


def test_the_shipped_grid_finds_its_faults_and_nothing_else(tmp_path: Path) -> None:
    """The same faults in front of a trained network."""
    grid = GRIDS / "audit.yaml"
    with pytest.raises(SystemExit) as stopped:
        main(
            [
                "run",
                "--grid",
                str(grid),
                "--store",
                str(tmp_path / "s"),
                "--out",
                str(tmp_path),
                "--workers",
                "1",
            ]
        )
    assert stopped.value.code == 2
    result = audit(make_plan(Options(grid)), Store(tmp_path / "s"))
    role, weak = "classification", {"below-single-step", "fails-unit-test"}
    lost = weak | {"below-noise", "weak-on-undefended"}
    assert suspicions(result) == {
        (role, "none", "few_steps", "oblivious"): weak,
        (role, "none", "descent", "oblivious"): lost,
        (role, "none", "clean_start", "oblivious"): lost | {"zero-gradient", "unchanged"},
        (role, "quantise", "pgd", "white_box"): {"zero-gradient", "below-noise", "full-gradient-suspect"},
        (role, "random", "pgd", "white_box"): {"no-eot"},
        ("saturated", "none", "pgd", "oblivious"): {"zero-gradient", "below-noise", "weak-on-undefended"},
        ("swapped", "none", "clean", "clean"): {"channels-swapped", "clean-off-reference"},
        ("swapped", "none", "noise", "oblivious"): {"channels-swapped"},
        ("swapped", "none", "descent", "oblivious"): {"channels-swapped", "below-noise", "fails-unit-test"},
        (role, "reversed", "pgd_16", "white_box"): {
            "oblivious-above-adaptive", "transfer-above-adaptive", "gray-above-adaptive", "full-gradient-suspect",
            "query-beats-gradient", "loss-fell",
        },
        (role, "misleading", "pgd_16", "bpda"): {"oblivious-above-adaptive", "query-beats-stand-in", "loss-fell"},
    }  # fmt: skip
    notes = {
        (c.target.role, c.defense_label, c.attack_label): {f.flag for f in found if not f.suspect}
        for c, found in result.judged
    }
    assert notes[role, "jpeg", "deepfool"] == {"noise-defends-too"}
    assert notes["colours", "gain", "pgd_12"] == {"defense-hurts"}
    assert notes["swapped", "none", "descent"] == {"attack-helps"}
    planted = {(role, "jpeg", "deepfool"), ("colours", "gain", "pgd_12"), ("swapped", "none", "descent")}
    others = set().union(*(found for key, found in notes.items() if key not in planted))
    assert not others & {"noise-defends-too", "defense-hurts", "attack-helps"}
    assert {(c.defense_label, c.attack_label) for c, _ in result.stopped} == {
        ("none", "overshoot"), ("none", "meddler"), ("global", "clean"), ("global", "pgd")
    }  # fmt: skip
    assert len(result.judged) == 44


def test_the_shipped_grid_of_costly_checks_finds_its_faults(tmp_path: Path) -> None:
    """Nothing is seen of them without the extra cells, but for what saturated logits give away."""
    grid, store = GRIDS / "audit_costly.yaml", str(tmp_path / "s")
    main(["run", "--grid", str(grid), "--store", store, "--out", str(tmp_path), "--workers", "1", "-q"])
    first = suspicions(audit(make_plan(Options(grid)), Store(tmp_path / "s"), 24))
    with pytest.raises(SystemExit) as stopped:
        main(["audit", "--grid", str(grid), "--store", store, "--costly", "--audit-images", "24", "-q"])
    assert stopped.value.code == 1
    result = audit(make_plan(Options(grid)), Store(tmp_path / "s"), 24)
    assert result.unchecked == {}
    # From then on the rows are marked with what they find.
    main(["run", "--grid", str(grid), "--store", store, "--out", str(tmp_path), "--workers", "1", "-q"])
    marks = Written(tmp_path).lines
    marked = {cell: set(flags) for cell, flags in zip(marks["cell"], marks["flags"], strict=True) if flags}
    assert marked == {c.key[:16]: {f.flag for f in found if f.suspect} for c, found in result.suspect}
    flags = {
        (c.target.role, c.defense_label, c.attack_label): {f.flag for f in found}
        for c, found in result.judged
    }
    for key, expected in {
        ("colours", "none", "schedule"): "more-steps-weaker",
        ("colours", "none", "overflow"): "eps-not-monotone",
        ("colours", "none", "bounce"): "last-is-worse",
        ("colours", "jitter", "bim"): "eot-too-few",
        ("colours_saturated", "none", "bim"): "one-loss-is-not-enough",
        ("colours_rounded", "none", "hairline"): "rounding-matters",
    }.items():
        assert expected in flags[key], key
        assert expected not in first.get((*key, "oblivious"), set())
    suspect = {(c.target.role, c.defense_label, c.attack_label) for c, _ in result.suspect}
    assert not suspect & {
        ("colours", "none", "bim"),
        ("colours", "none", "noise"),
        ("colours", "none", "clean"),
    }


def test_what_breaks_the_rules_is_stopped(judged: Audit) -> None:
    reasons = {(c.defense_label, c.attack_label): reason for c, reason in judged.stopped}
    assert set(reasons) == {
        ("none", "overshoot"),
        ("none", "meddler"),
        ("global", "clean"),
        ("global", "pgd"),
    }
    assert "moved by" in reasons["none", "overshoot"]
    assert "changed weights" in reasons["none", "meddler"]
    assert "random numbers must come from the rng" in reasons["global", "clean"]


def test_the_report_gives_reason_numbers_and_next_step(judged: Audit, plan: Plan, folder: Path) -> None:
    text = "\n".join(report(judged, plan, Store(folder / "s")))
    assert (
        "4 stopped by a hard check" in text and "STOPPED  classification / none / meddler / oblivious" in text
    )
    assert "V6 below-noise: random noise of the same eps" in text and "leaves a score of 1.000, noise" in text
    assert "V13 no-eot" in text and "next: threats: [{level: white_box, eot: 20}]" in text
    assert "Not checked (python -m bench audit " in text and "V7: 2 and 5 times the steps" in text
    assert "V20: minimal perturbations on a noise defense: no cell here needs or allows it" in text


def test_commands_can_be_pasted(
    judged: Audit, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all that the audit itself was given, and the folder that it was given it in."""
    monkeypatch.chdir(folder)
    store = Store(folder / "s")
    given = make_plan(
        Options(folder / "planted.yaml", seed=0, limit=30, profile=str(folder / "profile.yaml"))
    )
    lines = report(audit(given, store), given, store)
    (found,) = (line for line in lines if line.startswith("Not checked"))
    command = found.removeprefix("Not checked (").removesuffix(" --costly):")
    assert command == (
        f"python -m bench audit planted.yaml --profile {folder / 'profile.yaml'} --seed 0 --limit 30 --store s"
    )
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(shlex.split(command)[3:])
    assert stopped.value.code == 1 and capsys.readouterr().out.splitlines()[0] == lines[0]
    cell = judged.judged[0][0]
    words = _next(FLAGS["nonfinite-gradient"].next, cell, _given(given, store)).partition(";")[0]
    main(shlex.split(words)[3:])
    assert cell.key in capsys.readouterr().out
    monkeypatch.chdir(folder.parent)
    assert _given(given, Store(folder.parent / ".bench")).split()[0] == f"{folder.name}/planted.yaml"
    assert "--store" not in _given(given, Store(folder.parent / ".bench"))


def test_other_losses_leave_behind_what_belongs_to_one() -> None:
    attack = ATTACKS.create("apgd", {"loss": "dlr_targeted", "classes": 2})
    losses = {
        a.params["loss"] for _, what, a in _variants(attack, "classification") if what.startswith("loss ")
    }
    assert losses == {"ce", "margin", "dlr"}


def test_flags_are_in_the_rows_and_notes_are_not(folder: Path, plan: Plan, judged: Audit) -> None:
    frame = cell_frame(plan, Store(folder / "s"))
    flags = {flag for flags in frame["flags"] for flag in flags}
    assert {"zero-gradient", "no-eot", "below-noise", "full-gradient-suspect"} <= flags
    assert all(FLAGS[flag].level == "flag" for flag in flags)
    assert "still-rising" in judged.flags("classification", "none", "few")
    defended = frame[
        (frame["defense"] == "jpeg") & (frame["status"] == "ok") & (frame["attack"] != "worst case")
    ]
    assert (defended["cost"] > 1).all()


def test_the_command_exits_with_1_and_reads_results_folders(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["audit", str(folder / "planted.yaml"), "--store", str(folder / "s")])
    assert stopped.value.code == 1 and "SUSPECT" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["audit", str(ROOT / "results" / "tabel1")])
    assert stopped.value.code == 2 and "did you mean" in capsys.readouterr().err


def test_fewer_images_are_no_pass_and_leave_nothing_unchecked(tmp_path: Path, bench: Any) -> None:
    """Colours swapped show on eight images or more: a first run on four must not stand for all of them."""
    grid, store = str(GRIDS / "audit.yaml"), str(tmp_path / "s")
    spec = yaml.safe_load(Path(grid).read_text(encoding="utf-8"))
    spec["blocks"] = [
        {"roles": ["swapped"], "defenses": ["none"], "attacks": ["noise"], "threats": ["oblivious"]}
    ]
    spec["tables"] = []
    spec["plugins"] = [str(GRIDS / name) for name in spec["plugins"]]
    spec["profile"] = str(GRIDS / spec["profile"]) if spec["profile"].endswith(".yaml") else spec["profile"]
    (tmp_path / "swapped.yaml").write_text(yaml.safe_dump(spec))
    where = ("--grid", str(tmp_path / "swapped.yaml"), "--store", store)
    assert bench("run", *where, "--limit", "4", "--out", str(tmp_path / "o"), "-q")[0] == 0
    code, out, _ = bench("audit", *where)
    assert code == 1 and "channels-swapped" not in out and "on some of their images only" in out
    assert bench("run", *where, "--out", str(tmp_path / "o"), "-q")[0] == 0
    code, out, _ = bench("audit", *where)
    assert code == 1 and "channels-swapped" in out and "only" not in out.splitlines()[0]


def test_an_attack_that_asks_more_of_a_model_has_no_unit_test(folder: Path, plan: Plan) -> None:
    """The meddler looks for weights, of which the planted model has none."""
    attacks = {cell.attack_label: cell.attack for cell in plan.cells}
    assert unit_findings(attacks["meddler"]) == [] == unit_findings(attacks["pgd"])
    assert [found.flag for found in unit_findings(attacks["descent"])] == ["fails-unit-test"]


def test_nothing_run_is_no_pass(folder: Path, plan: Plan) -> None:
    with pytest.raises(BenchError, match=r"nothing of .* has run: python -m bench run --grid"):
        audit(plan, Store(folder / "empty"))


@pytest.fixture(scope="module")
def costly(folder: Path) -> tuple[Plan, Audit]:
    """A part of the grid with its extra cells."""
    part = {
        **GRID,
        "profile": str(folder / "profile.yaml"),
        "blocks": [
            {"roles": ["classification"], "defenses": ["none"], "attacks": ["bim", "few"], "threats": ["oblivious"]},
            {"roles": ["classification"], "defenses": ["quantise"], "attacks": ["pgd"], "threats": ["white_box"]},
        ],
    }  # fmt: skip
    grid = folder / "costly.yaml"
    grid.write_text(yaml.safe_dump(part))
    with pytest.raises(SystemExit):
        main(
            [
                "audit",
                "--grid",
                str(grid),
                "--store",
                str(folder / "s"),
                "--costly",
                "-q",
                "--audit-images",
                "16",
            ]
        )
    plan = make_plan(Options(grid))
    return plan, audit(plan, Store(folder / "s"), 16)


def test_extra_cells_find_what_needs_more_effort(costly: tuple[Plan, Audit]) -> None:
    found = suspicions(costly[1])
    masked = found.pop(("classification", "quantise", "pgd", "white_box"))
    assert masked >= {"unbounded-not-broken", "query-beats-gradient"}
    few = found.pop(("classification", "none", "few", "oblivious"))
    assert few >= {"not-converged", "below-single-step"}
    assert found == {}
    assert costly[1].unchecked == {}


def test_extra_cells_are_in_no_table_and_run_once(folder: Path, costly: tuple[Plan, Audit]) -> None:
    plan, _ = costly
    store = Store(folder / "s")
    whole = extended(plan, 16)
    assert len(whole.cells) == len(plan.cells) + len(extras(plan, 16)) and pending(whole, store)[0] == []
    frame = cell_frame(plan, store)
    assert not any("(" in str(name) for name in frame["attack"])
    for extra in extras(plan, 16):
        assert len(extra.cell.target.ids) == 16 and extra.cell.target.ids == extra.parent.target.ids


def test_a_loss_that_the_grid_has_is_no_extra(folder: Path) -> None:
    both = {**STEPS, "name": "bim", "loss": "margin"}
    block = {"roles": ["classification"], "defenses": ["none"], "attacks": ["bim"], "threats": ["oblivious"]}
    grid = folder / "losses.yaml"
    for attacks, expected in (["bim"], {"loss margin", "loss dlr"}), (["bim", both], {"loss dlr"}):
        spec = {**GRID, "profile": str(folder / "profile.yaml"), "blocks": [{**block, "attacks": attacks}]}
        grid.write_text(yaml.safe_dump(spec))
        found = extras(make_plan(Options(grid)), 4)
        losses = {e.what for e in found if e.what.startswith("loss") and e.parent.attack_label == "bim"}
        assert losses == expected


@pytest.mark.parametrize(("name", "sound"), [("audit", False), ("attacks", False), ("table1", True)])
def test_committed_results_are_audited_without_their_store(
    name: str, sound: bool, bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the rows are marked with: every suspect cell of the report beside them, with what to run next."""
    folder = GRIDS.parent / "results" / name
    monkeypatch.chdir(tmp_path)
    code, out, err = bench("audit", str(folder))
    assert (code, err) == (0 if sound else 1, "")
    if sound:
        assert "0 suspect" in out
        return
    report = (folder / "audit.txt").read_text()
    for kind in ("SUSPECT", "STOPPED"):
        shown, known = (re.findall(rf"^{kind} .*\[(\w+)\]$", text, re.MULTILINE) for text in (out, report))
        assert sorted(shown) == sorted(known)
    assert "      next: " in out and "audit.txt" in out
    # So they are where a store is named that is empty or not there.
    for store in ("absent", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        again, shown, _ = bench("audit", str(folder), "--store", store)
        assert again == 1 and shown.splitlines()[3:] == out.splitlines()[3:]
    (tmp_path / "audit").mkdir()
    code, _, err = bench("audit", str(tmp_path / "audit"))
    assert code == 2 and "results.csv" in err and "Traceback" not in err
    code, _, err = bench("audit", str(folder), "--limit", "3")
    assert (code, err.count("\n")) == (2, 1) and "go with a grid file" in err


def test_what_other_grids_left_in_a_store_is_no_audit_of_written_results(
    folder: Path, bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few cells in common say nothing of the others: the marks are shown, until every cell is in the store."""
    monkeypatch.setattr("bench.grid.GRIDS", tmp_path / "grids")
    (tmp_path / "grids").mkdir()
    spec = {
        **GRID,
        "name": "mine",
        "profile": str(folder / "profile.yaml"),
        "blocks": [
            {"roles": ["classification"], "defenses": ["none"], "threats": ["oblivious"],
             "attacks": ["noise", "bim", "descent"]},
        ],
    }  # fmt: skip
    grid = tmp_path / "grids" / "mine.yaml"
    grid.write_text(yaml.safe_dump(spec))
    written = tmp_path / "mine"
    where = ("--store", str(folder / "s"), "--out", str(written))
    code, _, err = bench("run", "--grid", str(grid), *where, "-q")
    assert (code, err) == (0, "")
    # In full: judged from the rows.
    code, out, _ = bench("audit", str(written), "--store", str(folder / "s"))
    assert code == 1 and "cells judged, 1 suspect" in out and " 0 not run" in out
    # In part: as marked, which is suspect all the same.
    some = {**spec, "blocks": [{**spec["blocks"][0], "attacks": ["noise", "bim"]}]}
    (tmp_path / "some.yaml").write_text(yaml.safe_dump(some))
    part = str(tmp_path / "part")
    elsewhere = ("--store", part, "--out", str(tmp_path / "o"), "-q")
    assert bench("run", "--grid", str(tmp_path / "some.yaml"), *elsewhere)[0] == 0
    code, out, _ = bench("audit", str(written), "--store", part)
    assert code == 1 and "not judged anew: 1 of its cells are not in" in out and out.count("SUSPECT") == 1
    # A grid file is judged by what has run, and what has not is no pass.
    code, out, _ = bench("audit", str(tmp_path / "some.yaml"), "--store", part)
    assert code == 0 and "0 suspect" in out
    more = {**some, "blocks": [{**spec["blocks"][0], "attacks": ["noise", "bim", "fgsm"]}]}
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(more))
    code, out, _ = bench("audit", str(tmp_path / "more.yaml"), "--store", part)
    assert code == 1 and "0 suspect, 0 stopped by a hard check, 1 not run" in out
