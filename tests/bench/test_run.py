"""The run as a whole, on a toy task: sharing, resuming, and the same table whatever the way it was computed."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench import runner
from bench.frame import load_rows
from bench.grid import GRIDS, load_grid, results_folder
from bench.plan import Options, Plan, make_plan
from bench.registry import ATTACKS
from bench.runner import cell_record, craft_record, pending, work
from bench.store import Store
from bench.threat import settled

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "tests" / "plugins"

BLOCK: dict[str, Any] = {
    "roles": ["classification"],
    "defenses": ["none", "random", "jpeg", "chain"],
    "attacks": ["pgd", "fgsm", "noise"],
    "threats": [
        "oblivious",
        {"level": "transfer", "sources": ["source"]},
        {"level": "bpda", "eot": 2},
        "white_box",
    ],
}
GRID: dict[str, Any] = {
    "name": "toy",
    "profile": str(PLUGINS / "toy_profile.yaml"),
    "plugins": [str(PLUGINS / "toy.py")],
    "evaluate": {"repeats": 2, "formats": ["float", "uint8"]},
    "attacks": {
        "pgd": {"name": "pgd", "eps": "16/255", "alpha": "4/255", "steps": 4},
        "fgsm": {"name": "fgsm", "eps": "16/255"},
        "noise": {"name": "noise", "eps": "16/255"},
    },
    "defenses": {"random": {"name": "noise", "eps": "8/255"}, "chain": ["bit_depth", "random"]},
    "blocks": [BLOCK],
    "tables": [{"name": "main", "rows": ["defense"], "columns": ["level_label", "attack"], "metric": "accuracy"}],
}  # fmt: skip

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(GRID))
    return path


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def run(bench: Run, grid: Path, *arguments: str, store: str = "store", out: str = "out") -> dict[str, bytes]:
    code, _, err = bench("run", "--grid", str(grid), "--store", store, "--out", out, *arguments)
    assert code == 0, err
    return files(grid.parent / out)


@pytest.fixture
def reference(bench: Run, grid: Path) -> dict[str, bytes]:
    """The tables of an undisturbed run in one process."""
    return run(bench, grid, "--workers", "1", store="reference", out="reference-out")


def test_crafts_are_shared_and_skips_have_reasons(bench: Run, grid: Path) -> None:
    plan = make_plan(Options(grid))
    oblivious = [c for c in plan.crafts().values() if c.defense is None]
    # Oblivious pgd and fgsm, transfer pgd and fgsm, and one set of noise: five, for four defenses.
    assert len(oblivious) == 5
    served = [c for c in plan.cells if c.level in ("oblivious", "transfer")]
    assert len(served) == 4 * 3 * 2 * 2 and {c.craft.key for c in served if c.craft} == {
        c.key for c in oblivious
    }
    skips = {(c.defense_label, c.attack_label): c.skip for c in plan.cells if c.skip}
    assert set(skips) == {(d, a) for d in ("jpeg", "chain") for a in ("pgd", "fgsm")}
    assert all("not differentiable" in reason for reason in skips.values())
    # A level that knows about `none` is the oblivious level.
    by_level = {(c.level, c.attack_label): c.key for c in plan.cells if c.defense_label == "none"}
    assert by_level["white_box", "pgd"] == by_level["bpda", "pgd"] == by_level["oblivious", "pgd"]
    run(bench, grid)
    store = Store(grid.parent / "store")
    assert len(list(store.find("crafts"))) == len(plan.crafts())
    assert pending(plan, store) == ([], len([c for c in plan.cells if not c.skip]))


def test_results_lie_as_the_shipped_grids_do(grid: Path) -> None:
    """What a clone has under results/ is what its grids write."""
    for path in (GRIDS / "table1.yaml", *sorted((GRIDS / "papers").glob("*_fig1.yaml"))):
        assert list((GRIDS.parent / results_folder(path, load_grid(path))).glob("*.md"))
    assert results_folder(grid, load_grid(grid)) == Path("results/toy")


def test_a_run_that_is_not_as_the_grid_says_has_a_folder_of_its_own(bench: Run, grid: Path) -> None:
    """Fewer images, another seed or profile do not write over what is shipped or complete."""
    for changed, name in (
        ({}, "toy"),
        ({"seed": 0}, "toy"),
        ({"limit": 8}, "toy-limit8"),
        ({"seed": 3, "limit": 8}, "toy-seed3-limit8"),
        ({"profile": GRID["profile"]}, "toy"),
        ({"without": ("attack:pgd", "jpeg")}, "toy-without_attack_pgd-without_jpeg"),
    ):
        assert make_plan(Options(grid, **changed)).folder() == Path("results") / name
    for options in ([], ["--limit", "3"]):
        code, _, err = bench("run", "--grid", str(grid), "-q", *options)
        assert (code, err) == (0, "")
    whole, some = (
        list(csv.DictReader(Path("results", name, "results.csv").open())) for name in ("toy", "toy-limit3")
    )
    assert {row["n_total"] for row in some} == {"3"} and "3" not in {row["n_total"] for row in whole}


def test_rows_carry_the_command_that_was_typed_whoever_computes(
    bench: Run, grid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bench/__main__.py", "run", "--grid", "a b.yaml"])
    for known in (runner.environment, runner.environment_text):
        known.cache_clear()
    for workers in ("1", "2"):
        run(bench, grid, "--limit", "2", "--workers", workers, store=f"store{workers}")
        store, plan = Store(grid.parent / f"store{workers}"), make_plan(Options(grid, limit=2))
        rows = [load_rows(cell_record(store, c), c.target.ids) for c in plan.cells if not c.skip]
        said = {json.loads(row["environment"])["command"] for of in rows for row in of}
        assert said == {"python -m bench run --grid 'a b.yaml'"}
    for known in (runner.environment, runner.environment_text):
        known.cache_clear()


def test_numbers_of_draws_are_told_apart(bench: Run, grid: Path) -> None:
    """A block may have a level with several; two blocks may not mean different things by one label."""
    level = {"level": "white_box"}
    block = {"roles": ["classification"], "defenses": ["random", "none"], "attacks": ["pgd"]}
    several = {**block, "threats": [{**level, "eot": 1}, "oblivious", {**level, "eot": 3}]}
    grid.write_text(yaml.safe_dump({**GRID, "blocks": [several]}))
    plan = make_plan(Options(grid))
    draws = {
        (c.defense_label, c.level_label): c.craft.eot
        for c in plan.cells
        if c.craft is not None and c.image_format == "float"
    }
    assert draws == {
        ("random", "white_box (EOT 1)"): 1,
        ("random", "oblivious"): 1,
        ("random", "white_box (EOT 3)"): 3,
        # Nothing is drawn here.
        ("none", "white_box (EOT 1)"): 1,
        ("none", "oblivious"): 1,
        ("none", "white_box (EOT 3)"): 1,
    }
    assert b"white_box (EOT 3)" in run(bench, grid)["main.md"]
    one, other = ({**block, "threats": [{**level, "eot": k}]} for k in (1, 3))
    # One label means one thing all over a grid.
    bim = {**other, "attacks": ["fgsm"]}
    grid.write_text(yaml.safe_dump({**GRID, "blocks": [several, bim, one]}))
    plan = make_plan(Options(grid))
    assert {c.level_label for c in plan.cells if c.attack_label == "fgsm"} == {"white_box (EOT 3)"}
    grid.write_text(yaml.safe_dump({**GRID, "blocks": [several, bim]}))
    assert len(make_plan(Options(grid)).cells) == len(plan.cells)  # the last block says nothing new
    grid.write_text(yaml.safe_dump({**GRID, "blocks": [one, other]}))
    code, _, err = bench("plan", "--grid", str(grid))
    assert (code, err.count("\n")) == (2, 1)
    assert (
        "blocks[1].threats[0]: 'classification / random / pgd / white_box' is in an earlier block with eot 1"
        in err
    )
    # The same twice is once.
    grid.write_text(yaml.safe_dump({**GRID, "blocks": [one, one]}))
    assert bench("plan", "--grid", str(grid))[0] == 0


def test_estimates_say_how_much_of_them_is_a_guess(bench: Run, grid: Path) -> None:
    options = ("--grid", str(grid), "--store", "store")
    jobs = len(pending(make_plan(Options(grid)), Store(grid.parent / "store"))[0])
    assert f"{jobs} of {jobs} jobs by a guess" in " ".join(bench("plan", *options)[1].split())
    run(bench, grid)
    # The same models, defenses and uses; other images.
    again = " ".join(bench("plan", *options, "--seed", "1")[1].split())
    assert "on one device" in again and "guess" not in again


def test_fooled_images_leave_only_where_they_are_judged(grid: Path) -> None:
    """Images that another pipeline will see, or the same one with other draws, run their full course."""
    attacks = {
        "scores": {"name": "square", "queries": 9}, "steps": "pgd",
        "stop": {"name": "square", "stop_when_fooled": True}, "stay": {"name": "pgd", "stop_when_fooled": False},
    }  # fmt: skip
    block = {**BLOCK, "attacks": [*attacks], "defenses": ["none", "random", "jpeg"]}

    def leaving(formats: tuple[str, ...] = ("float",), **settings: object) -> set[tuple[str, str, str]]:
        grid.write_text(
            yaml.safe_dump(
                {
                    **GRID,
                    "attacks": attacks,
                    "blocks": [block],
                    "evaluate": {"formats": list(formats)},
                    **settings,
                }
            )
        )
        stops = {
            (c.defense_label, c.level, c.attack_label): c.craft.payload["attack"]["params"][
                "stop_when_fooled"
            ]
            for c in make_plan(Options(grid)).cells
            if c.craft
        }
        assert all(stop for key, stop in stops.items() if key[2] == "stop")
        return {key for key, stop in stops.items() if stop and key[2] != "stop"}

    scores = {("jpeg", "bpda", "scores"), ("jpeg", "white_box", "scores")}
    # JPEG has no true gradient.
    assert leaving() == {*scores, ("jpeg", "bpda", "steps")}
    assert leaving(full_course=True) == scores
    # 8-bit images are others than those the attack saw.
    assert leaving(("float", "uint8")) == set()


def test_labels_can_be_left_out(bench: Run, grid: Path) -> None:
    """With what needs them, as if the grid had never named them; the rest is the same."""
    absent = {"name": "hgd", "weights": "nowhere.safetensors"}
    tables = [
        *GRID["tables"],
        {
            "name": "two",
            "columns": ["level_label", "attack"],
            "where": {"defense": ["jpeg", "away"], "level": ["bpda"]},
        },
        {"name": "gone", "columns": ["level_label", "attack"], "where": {"defense": "away"}},
        {"name": "passed", "columns": ["level_label", "attack"], "where": {"level": "transfer"}},
    ]
    figures = [
        {
            "name": "bars",
            "kind": "bars",
            "y": ["accuracy"],
            "where": {"defense": ["none", "away"], "level": "oblivious"},
        }
    ]
    block = {**BLOCK, "defenses": ["none", "away", "jpeg"]}
    grid.write_text(yaml.safe_dump({**GRID, "blocks": [BLOCK]}))
    whole = {cell.label: cell.key for cell in make_plan(Options(grid)).cells}
    changed = {
        "defenses": {**GRID["defenses"], "away": absent},
        "blocks": [block],
        "tables": tables,
        "figures": figures,
    }
    grid.write_text(yaml.safe_dump({**GRID, **changed}))
    code, _, err = bench("plan", "--grid", str(grid), "--store", "store")
    assert code == 2 and "nowhere.safetensors" in err and len(err.strip().splitlines()) == 1
    plan = make_plan(Options(grid, without=("away", "source", "noise")))
    left = {cell.label: cell.key for cell in plan.cells}
    assert left.items() <= whole.items() and not any(
        "noise" in label or "transfer" in label for label in left
    )
    assert len(left) == len({(c.defense_label, c.attack_label, c.level, c.image_format) for c in plan.cells})
    assert [(t.name, t.where) for t in plan.grid.tables] == [
        ("main", {}), ("two", {"defense": ["jpeg"], "level": ["bpda"]})
    ]  # fmt: skip
    assert plan.grid.figures[0].parameters["where"] == {"defense": ["none"], "level": "oblivious"}
    assert plan.left_out["defense"] == {"away"} and plan.left_out["attack"] == {"noise"}
    options = ("--grid", str(grid), "--store", "store", "--without", "away", "--without", "noise")
    assert run(bench, grid, "--without", "away", "--without", "noise")["main.md"].count(b"| jpeg") == 1
    code, out, err = bench("table", *options, "--name", "two")
    assert code == 0 and "jpeg" in out and "away" not in out, err
    code, out, _ = bench("show", "classification / jpeg / pgd / bpda", *options)
    assert code == 0 and "--without away --without noise --store store" in out


def test_a_defense_or_an_attack_of_one_name_is_left_out(grid: Path) -> None:
    """And a chain with each of its members."""
    changed = {
        "defenses": {"noise": {"name": "noise"}, "chain": ["jpeg", "noise"], "random": {"name": "noise"}}
    }
    block = {**BLOCK, "defenses": ["none", "noise", "chain", ["random", "jpeg"]]}
    grid.write_text(yaml.safe_dump({**GRID, **changed, "blocks": [block]}))

    def left(*names: str) -> tuple[set[str], set[str]]:
        cells = make_plan(Options(grid, without=names)).cells
        return {c.defense_label for c in cells}, {c.attack_label for c in cells} - {"clean"}

    assert left("attack:noise") == ({"none", "noise", "chain", "random + jpeg"}, {"pgd", "fgsm"})
    assert left("defense:noise") == ({"none", "random + jpeg"}, {"pgd", "fgsm", "noise"})
    assert left("random")[0] == {"none", "noise", "chain"}


def test_a_remark_says_what_was_left_out(bench: Run, grid: Path) -> None:
    shown = run(bench, grid, "--without", "chain")["README.md"].decode()
    assert "Left out (`--without`): chain. Worst cases and `adaptive` are over what is left." in shown
    options = ("--grid", str(grid), "--store", "store", "--out", "page", "--without", "chain")
    assert bench("report", *options)[0] == 0
    assert "--without chain" in (grid.parent / "page" / "report.html").read_text()


def test_tables_may_name_what_only_another_profile_has(bench: Run, grid: Path) -> None:
    other = {**BLOCK, "defenses": ["tvm"], "profiles": ["mine"]}
    (grid.parent / "mine.yaml").write_text("name: mine\nroles: {}\n")
    table = {"name": "a", "columns": ["level_label", "attack"], "where": {"defense": ["jpeg", "tvm"]}}
    grid.write_text(yaml.safe_dump({**GRID, "blocks": [BLOCK, other], "tables": [table]}))
    assert make_plan(Options(grid)).grid.tables[0].where == {"defense": ["jpeg"]}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["jpgg"], "--without: unknown role, defense or attack 'jpgg': did you mean 'jpeg'?"),
        (["none", "random", "jpeg", "chain"], "--without: nothing of "),
        (["classification"], "--without: nothing of "),
        (["twice"], "--without twice: several things of "),
        (["defense:pgd"], "--without: unknown role, defense or attack 'defense:pgd'"),
    ],
)
def test_what_cannot_be_left_out(bench: Run, grid: Path, names: list[str], message: str) -> None:
    attacks = {**GRID["attacks"], "twice": "fgsm"}
    grid.write_text(
        yaml.safe_dump({**GRID, "attacks": attacks, "defenses": {**GRID["defenses"], "twice": "jpeg"}})
    )
    given = [word for name in names for word in ("--without", name)]
    code, _, err = bench("plan", "--grid", str(grid), "--store", "store", *given)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1


def test_only_classes_leave() -> None:
    for task, stop in (("classification", True), ("segmentation", False), ("detection", False)):
        assert settled(ATTACKS.create("bim", {}), task, shared=True).params["stop_when_fooled"] is stop
        assert settled(ATTACKS.create("bim", {}), task, shared=False).params["stop_when_fooled"] is False
    kept = ATTACKS.create("fgsm", {})
    assert settled(kept, "classification", shared=True) is kept


@pytest.mark.parametrize("images", [{"classification": 4, "twin": 9}, {"classification": 9, "twin": 4}])
def test_roles_that_share_cells_get_all_the_images_they_ask_for(
    bench: Run, grid: Path, images: dict[str, int]
) -> None:
    profile = yaml.safe_load((PLUGINS / "toy_profile.yaml").read_text())
    profile["roles"]["twin"] = profile["roles"]["classification"]
    (grid.parent / "twins.yaml").write_text(yaml.safe_dump(profile))
    block = {
        "roles": ["classification", "twin"], "defenses": ["none"], "attacks": ["fgsm"], "threats": ["oblivious"],
    }  # fmt: skip
    changes = {"profile": "twins.yaml", "images": images, "evaluate": {}, "blocks": [block], "tables": []}
    grid.write_text(yaml.safe_dump({**GRID, **changes}))
    run(bench, grid)
    plan, store = make_plan(Options(grid)), Store(grid.parent / "store")
    assert len({cell.key for cell in plan.cells}) == 2 and len(plan.cells) == 4
    for cell in plan.cells:
        assert len(cell_record(store, cell).read_rows(cell.target.ids)) == images[cell.target.role]
    assert pending(plan, store)[0] == []


def test_an_attack_without_gradients_needs_none_of_the_defense(bench: Run, grid: Path) -> None:
    block = {
        "roles": ["classification"],
        "defenses": ["jpeg"],
        "attacks": ["square"],
        "threats": ["white_box"],
    }
    square = {"name": "square", "eps": "16/255", "queries": 20}
    grid.write_text(yaml.safe_dump({**GRID, "attacks": {"square": square}, "blocks": [block], "tables": []}))
    run(bench, grid)
    cell = make_plan(Options(grid)).cell("classification / jpeg / square / white_box")
    rows = cell_record(Store(grid.parent / "store"), cell).read_rows()
    assert len(rows) == 12 and sum(row["craft_forwards"] for row in rows) > 12


def test_the_second_run_computes_nothing_and_prints_the_same(bench: Run, grid: Path) -> None:
    arguments = ("run", "--grid", str(grid), "--store", "s", "--out", "o")
    first = bench(*arguments)
    tables = files(grid.parent / "o")
    second = bench(*arguments)
    assert first[0] == second[0] == 0 and first[1] == second[1] != ""
    assert "0 crafts and 0 cells to run" in second[2]
    assert files(grid.parent / "o") == tables


@pytest.mark.parametrize("arguments", [["--batch-size", "1"], ["--batch-size", "5"], ["--workers", "2"]])
def test_tables_do_not_depend_on_how_they_were_computed(
    bench: Run, grid: Path, reference: dict[str, bytes], arguments: list[str]
) -> None:
    assert run(bench, grid, *arguments) == reference


def test_a_smaller_run_is_reused_by_a_larger_one(bench: Run, grid: Path, reference: dict[str, bytes]) -> None:
    run(bench, grid, "--limit", "5")
    plan = make_plan(Options(grid))
    cell = next(c for c in plan.cells if c.craft)
    store = Store(grid.parent / "store")
    assert cell.craft is not None
    assert len(craft_record(store, cell.craft).missing(cell.target.ids)) == 7
    assert run(bench, grid) == reference


def test_another_seed_is_another_result(bench: Run, grid: Path) -> None:
    run(bench, grid)
    store = Store(grid.parent / "store")
    assert len(pending(make_plan(Options(grid, seed=1)), store)[0]) > 0


def test_damage_is_named_and_recomputed(bench: Run, grid: Path, reference: dict[str, bytes]) -> None:
    run(bench, grid)
    shards = sorted((grid.parent / "store").rglob("part-*.safetensors")) + sorted(
        (grid.parent / "store").rglob("part-*.parquet")
    )
    for shard in (shards[0], shards[-1]):
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(bytes(data))
    code, _, err = bench("run", "--grid", str(grid), "--store", "store", "--out", "out")
    assert code == 0 and shards[-1].name in err and "damaged" in err
    assert files(grid.parent / "out") == reference


SLOW = """
import time
from bench.protocols import Defense
from bench.registry import DEFENSES

@DEFENSES.register_module(name="slow")
class Slow(Defense):
    gradient = "exact"

    def forward(self, images, *args):
        time.sleep(0.02 * len(images))
        return images * 0.999
"""


def test_a_slow_defense_makes_no_other_cell_look_slow(bench: Run, grid: Path) -> None:
    """What is to come is estimated by the pace of each defense, in each use, once it has been seen."""
    (grid.parent / "slow.py").write_text(SLOW)
    block = {
        "roles": ["classification"], "defenses": ["slow", "none"], "attacks": ["fgsm"],
        "threats": ["oblivious", "white_box"],
    }  # fmt: skip
    more = {"plugins": [*GRID["plugins"], str(grid.parent / "slow.py")], "blocks": [block]}
    grid.write_text(yaml.safe_dump({**GRID, **more}))
    run(bench, grid, "--limit", "4", "--workers", "1")
    plan = make_plan(Options(grid, limit=4, seed=1))
    jobs = pending(plan, Store(grid.parent / "store"))[0]
    costs: dict[tuple[str, bool], float] = {}
    for cell in plan.cells:
        for key, kind in ((cell.key, "cell"), (cell.craft.key if cell.craft else "", "craft")):
            for job in jobs:
                if (job.key, job.kind) == (key, kind):
                    behind = cell.defense_label == "slow" and (kind == "cell" or cell.level == "white_box")
                    costs[kind, behind] = max(costs.get((kind, behind), 0.0), job.cost)
    for kind in ("cell", "craft"):
        assert costs[kind, True] > 4 * 0.02 > 2 * costs[kind, False]


def test_overwrite_recomputes(bench: Run, grid: Path) -> None:
    run(bench, grid)
    code, _, err = bench("run", "--grid", str(grid), "--store", "store", "--out", "out", "--overwrite")
    assert code == 0 and ", 0 cached" in err


def command(grid: Path, *arguments: str) -> list[str]:
    return [
        sys.executable, "-m", "bench", "run", "--grid", str(grid), "--store", str(grid.parent / "store"),
        "--out", str(grid.parent / "out"), "--quiet", "--batch-size", "2", *arguments,
    ]  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def shards(grid: Path) -> int:
    return len(list((grid.parent / "store").rglob("part-*.*")))


def wait_for_shards(process: subprocess.Popen[bytes], grid: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while shards(grid) < count and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_goes_on_where_it_was(
    bench: Run, grid: Path, reference: dict[str, bytes], stop: signal.Signals
) -> None:
    process = subprocess.Popen(
        command(grid), env=environment(), stderr=subprocess.PIPE, cwd=grid.parent,
        # A test run started in the background may ignore SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    wait_for_shards(process, grid, 12)
    process.send_signal(stop)
    _, err = process.communicate(timeout=60)
    if stop == signal.SIGINT:
        assert process.returncode == 130 and b"the same command goes on from here" in err
        assert b"Traceback" not in err
    else:
        assert process.returncode == -signal.SIGKILL
    kept = shards(grid)
    assert 12 <= kept
    assert run(bench, grid) == reference
    assert shards(grid) > kept


def test_two_processes_share_a_store(grid: Path, reference: dict[str, bytes]) -> None:
    log = grid.parent / "log"
    processes = [
        subprocess.Popen(command(grid), env=environment(TOY_LOG=str(log)), cwd=grid.parent) for _ in range(2)
    ]
    assert [p.wait(timeout=180) for p in processes] == [0, 0]
    assert files(grid.parent / "out") == reference


def test_what_another_process_computes_is_left_to_it(grid: Path, reference: dict[str, bytes]) -> None:
    """A process does all the rest first and then waits."""
    plan, store = make_plan(Options(grid)), Store(grid.parent / "store")
    theirs = next(c for c in plan.crafts().values() if c.attack is not None and c.attack.name == "fgsm")
    waiting = {c.key for c in plan.cells if c.craft is not None and c.craft.key == theirs.key and not c.skip}
    rest = {c.key for c in plan.cells if not c.skip} - waiting
    with craft_record(store, theirs).lock():
        process = subprocess.Popen(
            command(grid, "--workers", "1"), env=environment(), stderr=subprocess.PIPE, cwd=grid.parent
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if not pending_keys(plan, store) & rest:
                break
            time.sleep(0.1)
        assert process.poll() is None and waiting <= pending_keys(plan, store)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert files(grid.parent / "out") == reference


def pending_keys(plan: Plan, store: Store) -> set[str]:
    return {job.key for job in pending(plan, store)[0]}


def test_out_of_memory_halves_the_batch(
    bench: Run, grid: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = grid.parent / "small.yaml"
    profile.write_text(
        "name: toy\nroles:\n  classification: {dataset: toy_images, model: {name: toy_linear, memory: 3}}\n"
        "  source: {dataset: toy_images, model: {name: toy_linear, scale: 0.3}}\n"
    )
    code, _, err = bench(
        "run",
        "--grid",
        str(grid),
        "--store",
        "store",
        "--out",
        "out",
        "--profile",
        str(profile),
        "--workers",
        "1",
    )
    assert code == 0 and "going on with batches of 3" in err
    assert files(grid.parent / "out") == reference


def test_a_failing_cell_does_not_stop_the_others(bench: Run, grid: Path) -> None:
    profile = grid.parent / "broken.yaml"
    profile.write_text(
        "name: broken\nroles:\n  classification: {dataset: toy_images, model: toy_linear}\n"
        "  source: {dataset: toy_images, model: {name: toy_linear, scale: 0.3, fail: true}}\n"
    )
    code, out, err = bench(
        "run", "--grid", str(grid), "--store", "s", "--out", "o", "--profile", str(profile)
    )
    assert code == 2 and "toy.pth: no such file; put it there" in err and "err" in out
    assert "Traceback" not in err
    store = Store(grid.parent / "s")
    plan = make_plan(Options(grid, profile=str(profile)))
    left = {job.key for job in pending(plan, store)[0]}
    failed = {c.key for c in plan.cells if c.level == "transfer" and c.attack_label != "noise"}
    assert failed <= left and left <= failed | {
        c.craft.key for c in plan.cells if c.key in failed and c.craft
    }


def broken_profile(folder: Path, unreadable: bool, fail: bool) -> str:
    """A profile whose target cannot read an image, whose source cannot be loaded, or both."""
    profile = yaml.safe_load((PLUGINS / "toy_profile.yaml").read_text())
    if unreadable:
        profile["roles"]["classification"]["dataset"] = {"name": "toy_images", "poison": "unreadable"}
    profile["roles"]["source"]["model"] = {"name": "toy_linear", "scale": 0.3, "fail": fail}
    (folder / "broken.yaml").write_text(yaml.safe_dump(profile))
    return str(folder / "broken.yaml")


UNREADABLE = "dataset toy_images, image toy-1 cannot be read: truncated file"
NO_FILE = "toy.pth: no such file; put it there"


@pytest.mark.parametrize(
    ("workers", "reasons"), [("1", [UNREADABLE]), ("1", [NO_FILE]), ("2", [UNREADABLE, NO_FILE])]
)
def test_a_fault_that_shows_in_the_run_is_one_line(
    bench: Run, grid: Path, workers: str, reasons: list[str]
) -> None:
    profile = broken_profile(grid.parent, UNREADABLE in reasons, NO_FILE in reasons)
    options = ("run", "--grid", str(grid), "--profile", profile, "--workers", workers, "--out", "o")
    code, out, err = bench(*options, "--store", "quiet", "--quiet")
    assert (code, out) == (2, "")
    said = [line for line in err.splitlines() if line]
    assert len(said) == len(reasons), err
    for reason in reasons:
        (line,) = [line for line in said if line.endswith(reason)]
        assert line.startswith("bench: ") and "classification / " in line
    # The tables say what is missing from them, and the number of cells comes last, without the reasons.
    code, out, err = bench(*options, "--store", "loud")
    assert code == 2 and err.count("bench: ") == len(reasons) and err.endswith("wrote o\n")
    assert all(err.count(reason) == 1 for reason in reasons)
    last = [line for line in out.splitlines() if line.endswith(" failed")]
    assert len(last) == 1 and not any(reason in out.split(last[0])[1] for reason in reasons)
    assert any(
        f"failed: {reasons[0]}" in text for text in map(bytes.decode, files(grid.parent / "o").values())
    )


def test_a_quiet_run_says_nothing(bench: Run, grid: Path) -> None:
    arguments = ("--grid", str(grid), "--store", "s", "--out", "o", "--workers", "1", "--quiet")
    assert bench("run", *arguments) == (0, "", "")
    assert (grid.parent / "o" / "README.md").is_file()


def test_a_failed_run_leaves_complete_results_as_they_are(bench: Run, grid: Path) -> None:
    good = run(bench, grid)
    profile = broken_profile(grid.parent, unreadable=True, fail=True)
    broken = ("run", "--grid", str(grid), "--store", "s", "--profile", profile, "--workers", "1")
    code, _, err = bench(*broken, "--out", "out")
    assert code == 2 and files(grid.parent / "out") == good
    faults = [line for line in err.splitlines() if line.startswith("bench: ")]
    assert len(faults) == 2 and "wrote" not in err
    # Said once, with the first fault.
    assert err.count("keeps its complete results") == 1
    assert faults[0].endswith("; out keeps its complete results")
    assert bench(*broken, "--out", "out", "--quiet")[2].count("\n") == 2
    assert files(grid.parent / "out") == good

    # A new folder, and one that is incomplete already, get what there is.
    code, _, err = bench(*broken, "--out", "new")
    assert code == 2 and "wrote new" in err and "keeps" not in err
    first = files(grid.parent / "new")
    assert "error" in first["results.csv"].decode()
    (grid.parent / "new" / "README.md").unlink()
    code, _, err = bench(*broken, "--out", "new")
    assert code == 2 and "keeps" not in err and files(grid.parent / "new") == first
    # A run without faults replaces either.
    assert run(bench, grid, out="new") == good
    assert run(bench, grid, "--limit", "5") != good


def test_a_bug_is_exit_1_and_keeps_its_traceback(bench: Run, grid: Path) -> None:
    (grid.parent / "buggy.py").write_text(
        "from bench.protocols import Defense\nfrom bench.registry import DEFENSES\n"
        '@DEFENSES.register_module(name="buggy")\nclass Buggy(Defense):\n'
        "    def forward(self, images): return images[None].nonsense\n"
    )
    spec = {
        **GRID,
        "plugins": [*GRID["plugins"], "buggy.py"],
        "blocks": [{**BLOCK, "defenses": ["buggy", "none"]}],
    }
    grid.write_text(yaml.safe_dump(spec))
    code, out, err = bench("run", "--grid", str(grid), "--store", "s", "--out", "o")
    assert code == 1 and "AttributeError" in err and "Traceback" not in err and "none" in out
    (line,) = [line for line in err.splitlines() if line.startswith("bench: ")]
    assert line.endswith("; the traceback is in s/failures.log")
    assert "Traceback" in (grid.parent / "s" / "failures.log").read_text()


def test_what_turns_out_not_applicable_is_a_skip_and_not_tried_again(bench: Run, grid: Path) -> None:
    (grid.parent / "picky.py").write_text(
        "from bench.errors import NotApplicable\nfrom bench.protocols import Defense\n"
        "from bench.registry import DEFENSES\n"
        '@DEFENSES.register_module(name="picky")\nclass Picky(Defense):\n'
        "    def forward(self, images): return images\n"
        "    def check_input(self, size): raise NotApplicable('needs larger images')\n"
    )
    spec = {
        **GRID,
        "plugins": [*GRID["plugins"], "picky.py"],
        "blocks": [{**BLOCK, "defenses": ["picky", "none"]}],
    }
    grid.write_text(yaml.safe_dump(spec))
    arguments = ("run", "--grid", str(grid), "--store", "s", "--out", "o")
    code, out, err = bench(*arguments)
    assert code == 0 and "needs larger images" in out, err
    code, again, err = bench(*arguments)
    assert code == 0 and again == out and "0 crafts and 0 cells to run" in err


@pytest.mark.parametrize(
    ("poison", "message"),
    [
        ("nan", "image toy-1: NaN or infinite pixels"),
        ("unreadable", "image toy-1 cannot be read: truncated file"),
    ],
)
def test_bad_images_are_named(bench: Run, grid: Path, poison: str, message: str) -> None:
    profile = grid.parent / "bad.yaml"
    profile.write_text(
        f"name: bad\nroles:\n  classification: {{dataset: {{name: toy_images, poison: {poison}}}, model: toy_linear}}\n"
        "  source: {dataset: toy_images, model: toy_linear}\n"
    )
    code, _, err = bench("run", "--grid", str(grid), "--store", "s", "--out", "o", "--profile", str(profile))
    assert code == 2 and message in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": [{**BLOCK, "roles": ["clasification"]}]}, "did you mean 'classification'?"),
        ({"blocks": [{**BLOCK, "attacks": ["pdg"]}]}, "unknown attack 'pdg': did you mean 'pgd'?"),
        ({"blocks": [{**BLOCK, "defenses": ["jpg"]}]}, "unknown defense 'jpg': did you mean 'jpeg'?"),
        ({"blocks": [{**BLOCK, "defenses": [[]]}]}, "expected at least one defense"),
        ({"attacks": {"pgd": {"name": "pgd", "eps": 8}}}, "did you mean 8/255?"),
        ({"attacks": {"pgd": {"name": "pgd", "eps": "8/255", "steps": 0}}}, "steps"),
        ({"attacks": {"pgd": {"name": "pgd", "eps": "8/255", "stps": 3}}}, "did you mean 'steps'?"),
        ({"attacks": {"pgd": {"name": "bim", "loss": "loc"}}}, "unknown loss of task classification 'loc'"),
        ({"images": {"classification": 13}}, "13 images asked for classification, dataset toy_images has 12"),
        ({"images": {"clasification": 3}}, "did you mean 'classification'?"),
        ({"plugins": ["absent.py"]}, "does not exist"),
        ({"profile": "mimi"}, "did you mean 'mini'?"),
        ({"tables": [{"name": "t", "metric": "accurracy"}]}, "did you mean 'accuracy'?"),
        ({"tables": [{"name": "t", "where": {"role": "clasification"}}]}, "did you mean 'classification'?"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_exit_2(
    bench: Run, grid: Path, change: dict[str, object], message: str
) -> None:
    grid.write_text(yaml.safe_dump({**GRID, **change}))
    code, out, err = bench("run", "--grid", str(grid), "--store", "s", "--out", "o")
    assert code == 2 and message in err, err
    assert err.count("\n") == 1 and "Traceback" not in err and out == ""
    assert not (grid.parent / "s").exists() or not list((grid.parent / "s").rglob("part-*"))


def test_an_unwritable_store_is_one_line(bench: Run, grid: Path) -> None:
    (grid.parent / "file").write_text("")
    code, _, err = bench("run", "--grid", str(grid), "--store", "file/store", "--out", "o")
    assert code == 2 and "file/store" in err and "Traceback" not in err


def test_looking_at_a_run(bench: Run, grid: Path) -> None:
    options = ("--grid", str(grid), "--store", "store")
    code, out, _ = bench("plan", *options)
    assert code == 0 and "0 cached" in out and "crafts; about" in out and "skip: the defense is not" in out
    run(bench, grid, "--limit", "4")
    code, out, _ = bench("why", "classification / jpeg / pgd / bpda", *options)
    assert code == 0 and "rows: 4 of 12 images stored" in out
    run(bench, grid)
    code, out, _ = bench("why", "classification / jpeg / pgd / bpda", *options)
    assert code == 0 and "cached: every image has a row" in out
    code, out, _ = bench("why", "classification / jpeg / pgd / bpda", *options, "--seed", "3")
    assert code == 0 and "which differs in" in out and "seed: 0 -> 3" in out
    code, out, _ = bench("show", "classification / jpeg / pgd / bpda", *options)
    assert code == 0
    for part in (
        "accuracy:",
        "backward passes",
        '"eps": "16/255"',
        '"steps": 4',
        '"versions"',
        "reproduce: python -m bench run --grid",
        "--store store",
    ):
        assert part in out
    code, _, err = bench("show", "classification / jpeg / pgd / bdpa", *options)
    assert code == 2 and "did you mean 'classification / jpeg / pgd / bpda'?" in err
    for kind in ("markdown", "csv", "latex", "html"):
        code, out, _ = bench("table", *options, "--format", kind)
        assert code == 0 and "jpeg" in out
    code, _, _ = bench("table", *options, "--format", "parquet", "-o", "rows.parquet")
    assert code == 0 and (grid.parent / "rows.parquet").stat().st_size > 1000
    code, _, err = bench("table", *options, "--format", "excel")
    assert code == 2 and "unknown format 'excel'" in err


def test_backward_passes_that_nobody_counts_are_no_zero(bench: Run, grid: Path) -> None:
    pytest.importorskip("foolbox")
    attacks = {
        **GRID["attacks"],
        "ddn": {"library": "foolbox", "attack": "DDNAttack", "params": {"steps": 2}},
        "aa": {"name": "autoattack", "attacks": ["apgd-ce"], "steps": 2},
    }
    block = {**BLOCK, "defenses": ["none"], "attacks": ["ddn", "aa", "pgd"], "threats": ["oblivious"]}
    grid.write_text(
        yaml.safe_dump({**GRID, "attacks": attacks, "blocks": [block], "tables": [], "evaluate": {}})
    )
    run(bench, grid, "--limit", "2")
    options = ("--grid", str(grid), "--store", "store", "--limit", "2")
    for attack, counted in (("ddn", False), ("aa", False), ("pgd", True)):
        code, out, _ = bench("show", f"classification / none / {attack} / oblivious", *options)
        assert code == 0 and ("backward passes not counted" in out) != counted
        assert ("and 8 backward passes" in out) == counted and "and 0 backward" not in out
    code, _, err = bench("report", *options, "--out", "page", "--pictures", "0")
    assert code == 0, err
    (page,) = (grid.parent / "page").glob("*.html")
    text = page.read_text(encoding="utf-8")
    assert text.count("backward passes not counted") == 2 and "and 8 backward passes" in text


def test_listing(bench: Run) -> None:
    for kind, names in {
        "defenses": ("jpeg", "tvm", "quality=75"), "attacks": ("pgd", "dim_ti", "steps="), "tasks": ("detection",),
        "models": ("mini_vgg", "robustbench"), "datasets": ("mini_digits",), "metrics": ("accuracy", "miou"),
        "grids": ("table1.yaml",),
    }.items():  # fmt: skip
        code, out, err = bench("list", kind)
        assert code == 0, err
        assert all(name in out for name in names), out
    code, _, err = bench("list", "defences")
    assert code == 2 and "did you mean 'defenses'?" in err


def test_a_job_runs_from_a_manifest_alone(grid: Path, tmp_path: Path) -> None:
    """Workers get keys, not objects."""
    from bench.runner import Manifest

    store = Store(tmp_path / "store")
    plan = make_plan(Options(grid))
    jobs, _ = pending(plan, store)
    store.root.mkdir()
    manifest = tmp_path / "store" / "manifest.json"
    Manifest(plan.options, store.root).write(manifest)
    seen: list[tuple[int, int]] = []
    job = next(j for j in jobs if j.kind == "craft")
    assert work(manifest, job, "cpu", lambda done, total: seen.append((done, total))) is None
    assert seen[0] == (0, 12) and seen[-1] == (12, 12)
    cell = next(c for c in plan.cells if c.craft and c.craft.key == job.key)
    assert craft_record(store, plan.crafts()[job.key]).missing(cell.target.ids) == []
    assert len(cell_record(store, cell).missing(cell.target.ids)) == 12


def test_a_surrogate_in_front_of_other_models(tmp_path: Path) -> None:
    """The attacker has neither the target nor the defense: gradients go through both of its own."""
    threats = [
        {"level": "transfer", "sources": ["source"], "surrogate": "bit_depth"},
        {"level": "gray_box", "surrogate": "random"},
        {"level": "transfer", "sources": ["source"], "surrogate": "random"},
    ]
    block = {**BLOCK, "defenses": ["random"], "attacks": ["pgd"], "threats": threats}
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump({**GRID, "evaluate": {}, "blocks": [block]}))
    cells = {cell.level_label: cell for cell in make_plan(Options(path)).cells if cell.attack is not None}
    refused = cells["transfer from source via bit_depth"]
    assert refused.skip is not None and "not differentiable" in refused.skip
    target, other = cells["gray_box via random"], cells["transfer from source via random"]
    assert target.craft is not None and other.craft is not None and other.level == "transfer"
    assert [t.role for t in target.craft.sources] == ["classification"]
    assert [t.role for t in other.craft.sources] == ["source"]
    assert other.craft.defense is not None and other.craft.defense.name == "noise"
    assert (other.craft.mode, other.craft.eot) == ("exact", 10)
    assert target.craft.key != other.craft.key
