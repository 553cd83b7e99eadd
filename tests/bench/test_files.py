"""Files and stores that cannot be had: one line and exit code 2, whatever the command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from bench.errors import StoreError
from bench.files import check_folder, save, write_text
from tests.bench.test_run import GRID, ROOT

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A grid of one cell with a figure, in the current folder beside the file `plain` and the folder `s`."""
    block = {
        "roles": ["classification"], "defenses": ["jpeg"], "attacks": ["fgsm"], "threats": ["oblivious"],
    }  # fmt: skip
    path = tmp_path / "toy.yaml"
    figures = [{"name": "seen", "kind": "pictures"}]
    path.write_text(yaml.safe_dump({**GRID, "blocks": [block], "figures": figures}))
    (tmp_path / "plain").touch()
    (tmp_path / "s").mkdir()
    monkeypatch.chdir(tmp_path)
    return path


NOWHERE = ("plain/x", "/proc/nope/x")


@pytest.mark.parametrize("where", NOWHERE)
@pytest.mark.parametrize(
    "command",
    [
        "paper cafd/table1 -o {}",
        "claims --reference -o {}",
        "claims --grid {grid} --store s -o {}",
        "table --grid {grid} --store s -o {}",
        "table --grid {grid} --store s --format parquet -o {}",
        "run --grid {grid} --store s --out {}",
        "figure --grid {grid} --store s --out {}",
        "train --defense hgd --role classification --out {}",
        "train --defense hgd --role classification --store {}",
        "zoo build mini_vgg --out {}",
    ],
)
def test_what_cannot_be_written_is_one_line(bench: Run, grid: Path, command: str, where: str) -> None:
    code, _, err = bench(*command.format(where, grid=grid).split())
    assert (code, err.count("\n")) == (2, 1), err
    assert f"cannot write {where}: " in err and (grid.parent / "plain").is_file()


def test_a_folder_is_not_written_over(bench: Run, grid: Path) -> None:
    for command in ("paper cafd/table1", "claims --reference", "table --grid toy.yaml --store s"):
        code, _, err = bench(*command.split(), "-o", "s")
        assert (code, err) == (2, "bench: cannot write s: Is a directory\n")
    assert list((grid.parent / "s").iterdir()) == []


@pytest.mark.parametrize(
    "command", ["table", "figure", "audit", "claims", "report", "picture CELL", "show CELL", "why CELL"]
)
def test_results_are_not_read_where_no_store_is(bench: Run, grid: Path, command: str) -> None:
    arguments = command.replace("CELL", "classification/jpeg/fgsm/oblivious").split()
    for store, said in (("absent", "there is no folder absent: run"), ("plain", "plain is a file, expected")):
        code, out, err = bench(*arguments, "--grid", str(grid), "--store", store)
        assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith(f"bench: --store: {said}"), err
    assert not (grid.parent / "absent").exists()


def test_where_no_store_is_what_is_shipped_is_named(bench: Run, grid: Path) -> None:
    no_store = "bench: --store: there is no folder .bench: run the grid first, or name its store"
    code, _, err = bench("claims")
    assert (code, err.count("\n")) == (2, 1)
    assert err == (
        f"{no_store}; without a store there is `python -m bench claims results/papers`, and `claims --reference`\n"
    )
    for name, there in (("cafd_table1", True), ("cafd_fig1", False)):
        options = ("--grid", str(ROOT / "grids" / "papers" / f"{name}.yaml"), "--compare", "paper")
        code, _, err = bench("table", *options)
        instead = f"table results/papers/{name} --compare paper"
        said = f"; without a store there is `python -m bench {instead}`" if there else ""
        assert (code, err) == (2, f"{no_store}{said}\n")
        # What was compared is no answer to another question.
        assert bench("table", *options[:2])[2] == f"{no_store}\n"


def test_what_needs_no_results_needs_no_store(bench: Run, grid: Path) -> None:
    for command in ("plan", "run"):
        code, _, err = bench(command, "--grid", str(grid), "--store", "plain")
        assert (code, err) == (2, "bench: --store: plain is a file, expected the folder of a store\n")
    assert bench("plan", "--grid", str(grid), "--store", "absent")[0] == 0
    assert bench("claims", "--reference", "--store", "absent")[0] == 0
    assert bench("list", "checkpoints")[0] == 0
    code, _, err = bench("list", "checkpoints", "--store", "absent")
    assert code == 2 and "there is no folder absent" in err


@pytest.mark.parametrize("command", [(), ("paper",), ("zoo",)])
def test_without_a_command_the_usage_is_all(bench: Run, command: tuple[str, ...]) -> None:
    code, out, err = bench(*command)
    assert code == 2 and "Usage" in out + err and "bench: " not in err


def test_files_are_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a"
    write_text("one", path)
    save(path, b"two")
    assert path.read_bytes() == b"two" and [p.name for p in path.parent.iterdir()] == ["a"]
    link = tmp_path / "link"
    link.symlink_to(path)
    save(link, b"three")
    assert link.is_symlink() and path.read_bytes() == b"three"
    save(Path("/dev/null"), b"four")
    assert Path("/dev/null").is_char_device()


def test_folders_are_checked_and_not_made(tmp_path: Path) -> None:
    check_folder(tmp_path / "a" / "b", "--out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"^--out: cannot write .*/file/b: Not a directory$"):
        check_folder(tmp_path / "file" / "b", "--out")
