"""The store: what is written comes back, and nothing that happens to it is misread."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bench.store
from bench.errors import StoreBusy, StoreError
from bench.keys import content_key
from bench.store import Record, Store

REPO = Path(__file__).parents[2]
PAYLOAD = {"attack": {"name": "pgd", "steps": 10}, "seed": 0}
KEY = content_key(PAYLOAD)


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where the system has one: for tests of many writes, whose flushes would take seconds."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


FORKER = """
import itertools, json, os, signal, sys, time, torch
from bench.store import Store
torch.set_num_threads(1)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
def image(i): return torch.full((1, 3, 64, 64), float(i) / 7)
for line in sys.stdin:
    root, key, payload, code = json.loads(line)
    child = os.fork()
    if child == 0:
        try:
            exec(code, {**globals(), "record": Store(root).record("crafts", key, payload)})
        finally:
            os._exit(0)
    print(child, flush=True)
"""


@dataclass(frozen=True)
class Child:
    pid: int

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def alive(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def wait(self) -> None:
        while self.alive():
            time.sleep(0.001)


class Forker:
    """Starts processes that use the store without paying for their imports: forks of one that has them."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPO
        )

    def start(self, root: Path, code: str) -> Child:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(root), KEY, PAYLOAD, textwrap.dedent(code)]) + "\n")
        self.process.stdin.flush()
        return Child(int(self.process.stdout.readline()))


@pytest.fixture(scope="module")
def forker() -> Iterator[Forker]:
    forker = Forker()
    yield forker
    forker.process.communicate()


def crafts(root: Path) -> Record:
    return Store(root).record("crafts", KEY, PAYLOAD)


def cells(root: Path) -> Record:
    return Store(root).record("cells", KEY, PAYLOAD)


def image(name: str, size: int = 4) -> torch.Tensor:
    return torch.rand(3, size, size, generator=torch.Generator().manual_seed(hash_of(name)))


def hash_of(name: str) -> int:
    return int(content_key(name)[:8], 16)


def write(record: Record, *names: str, size: int = 4) -> None:
    record.write_images(names, torch.stack([image(n, size) for n in names]), [{"n": n} for n in names])


def parts(record: Record) -> list[Path]:
    return sorted(p for p in record.path.iterdir() if p.suffix in (".safetensors", ".parquet"))


def leftovers(root: Path) -> list[Path]:
    return sorted(root.rglob(".tmp-*"))


# -- images -------------------------------------------------------------------------------------------------------
def test_nothing_is_touched_before_the_first_write(tmp_path: Path) -> None:
    record = crafts(tmp_path / "store")
    assert record.missing(["b", "a"]) == ["b", "a"]
    assert record.note("checks") is None
    assert list(Store(tmp_path / "store").find("crafts")) == []
    assert not (tmp_path / "store").exists()


def test_images_come_back_exactly_whatever_the_split(tmp_path: Path) -> None:
    names = [f"val/{i}" for i in range(7)]
    results = []
    for step in (1, 3, 7):
        record = crafts(tmp_path / str(step))
        for i in range(0, 7, step):
            write(record, *names[i : i + step])
        images, infos = crafts(tmp_path / str(step)).read_images(names[::-1])
        assert infos == [{"n": n} for n in names[::-1]]
        results.append(images)
    assert all(torch.equal(results[0], r) for r in results)
    assert torch.equal(results[0], torch.stack([image(n) for n in names[::-1]]))


def test_float32_bits_survive(tmp_path: Path) -> None:
    values = torch.tensor([0.0, -0.0, 1e-45, 1 / 3, 1.0, 8 / 255]).repeat(6).reshape(1, 3, 3, 4)
    crafts(tmp_path).write_images(["a"], values.permute(0, 1, 3, 2), [{}])
    back, _ = crafts(tmp_path).read_images(["a"])
    assert back.numpy().tobytes() == values.permute(0, 1, 3, 2).contiguous().numpy().tobytes()


def test_images_of_several_sizes_share_a_record(tmp_path: Path) -> None:
    record = crafts(tmp_path)
    write(record, "a", size=4)
    write(record, "b", size=6)
    assert record.read_images(["b"])[0].shape == (1, 3, 6, 6)
    with pytest.raises(ValueError, match="one size"):
        record.read_images(["a", "b"])


def test_a_repeated_id_may_be_read_twice_but_not_written_twice_at_once(tmp_path: Path) -> None:
    record = crafts(tmp_path)
    write(record, "a")
    assert torch.equal(*record.read_images(["a", "a"])[0])
    with pytest.raises(ValueError, match="unique"):
        write(record, "b", "b")
    with pytest.raises(ValueError, match="float32"):
        record.write_images(["c"], torch.zeros(1, 3, 2, 2, dtype=torch.float64), [{}])


def test_asking_for_an_absent_id_is_one_line(tmp_path: Path) -> None:
    write(crafts(tmp_path), "a")
    with pytest.raises(StoreError, match="does not hold 1 of the ids asked for"):
        crafts(tmp_path).read_images(["a", "b"])


# -- rows ---------------------------------------------------------------------------------------------------------
ROWS: list[dict[str, Any]] = [
    {"id": "a", "score": 1.0, "n": 1, "ok": True, "why": None},
    {"id": "b", "n": 2**70, "score": float("inf"), "extra": '{"boxes": [1, 2]}'},
    {"id": "c", "score": 1, "ok": "yes", "why": ""},
    {"id": "d"},
    {"why": "x", "score": 0.1, "id": "e", "ok": False},
]


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_rows_come_back_exactly_whatever_the_split(tmp_path: Path, step: int) -> None:
    record = cells(tmp_path)
    for i in range(0, len(ROWS), step):
        record.write_rows(ROWS[i : i + step])
    back = cells(tmp_path).read_rows()
    assert json.dumps(back) == json.dumps(ROWS)
    assert cells(tmp_path).read_rows(["d", "a"]) == [ROWS[3], ROWS[0]]


values = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=True)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
)
row_lists = st.lists(
    st.dictionaries(st.sampled_from(["score", "n", "ok", "why"]), values, max_size=4), min_size=1, max_size=6
)


@settings(max_examples=60, deadline=None)
@given(rows=row_lists, cut=st.integers(0, 6))
def test_any_flat_rows_survive_any_split(
    tmp_path_factory: pytest.TempPathFactory, rows: Any, cut: int
) -> None:
    root = tmp_path_factory.mktemp("rows")
    full = [{**row, "id": str(i)} for i, row in enumerate(rows)]
    record = cells(root)
    record.write_rows(full[:cut])
    record.write_rows(full[cut:])
    assert repr(cells(root).read_rows()) == repr(full)


def test_other_tools_can_read_the_parquet(tmp_path: Path) -> None:
    import pandas as pd

    record = cells(tmp_path)
    record.write_rows([{"id": "a", "score": 0.5, "ok": True}, {"id": "b", "score": 1.0, "ok": False}])
    frame = pd.read_parquet(parts(record)[0])
    assert frame.to_dict("list") == {"id": ["a", "b"], "score": [0.5, 1.0], "ok": [True, False]}


def test_nested_values_are_refused_with_the_column(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="row column 'boxes' holds a list"):
        cells(tmp_path).write_rows([{"id": "a", "boxes": [1]}])
    assert leftovers(tmp_path) == []


def test_of_two_rows_with_one_id_the_last_writer_wins_without_clocks(tmp_path: Path) -> None:
    record = cells(tmp_path)
    record.write_rows([{"id": "a", "v": 1}, {"id": "b", "v": 1}])
    first = parts(record)[0]
    cells(tmp_path).write_rows([{"id": "a", "v": 2}])
    os.utime(first, (2e9, 2e9))
    assert cells(tmp_path).read_rows() == [{"id": "a", "v": 2}, {"id": "b", "v": 1}]


# -- notes, keys, housekeeping ------------------------------------------------------------------------------------
def test_notes(tmp_path: Path) -> None:
    record = cells(tmp_path)
    record.set_note("checks", {"V1": "ok", "x": [1.5, None]})
    record.set_note("checks", {"V1": "suspect"})
    assert cells(tmp_path).note("checks") == {"V1": "suspect"}
    with pytest.raises(ValueError, match="name"):
        record.set_note("../x", 1)
    path = record.path / "note-checks.json"
    path.write_text(path.read_text().replace("suspect", "suspecT"))
    assert record.note("checks") is None
    assert "note-checks.json is damaged" in record.warnings[0]


def test_find_payload_usage_and_prune(tmp_path: Path) -> None:
    store = Store(tmp_path)
    keys = []
    for seed in range(3):
        payload = {"seed": seed}
        keys.append(content_key(payload))
        store.record("cells", keys[-1], payload).write_rows([{"id": "a"}])
    write(crafts(tmp_path), "a")
    assert list(store.find("cells")) == sorted(keys)
    assert store.payload("cells", keys[1]) == {"seed": 1}
    before = store.usage()
    assert before["crafts"] > 0 and before["cells"] > 0
    freed = store.prune({keys[0], KEY})
    assert list(store.find("cells")) == [keys[0]] and list(store.find("crafts")) == [KEY]
    after = store.usage()
    assert freed > 0 and before["cells"] - after["cells"] == freed and after["crafts"] == before["crafts"]
    with pytest.raises(StoreError, match="no readable record"):
        store.payload("cells", keys[1])


def test_prune_sweeps_what_was_set_aside_and_spares_fresh_temporary_files(tmp_path: Path) -> None:
    record = crafts(tmp_path)
    write(record, "a")
    fresh, stale = record.path / ".tmp-1", record.path / ".tmp-2"
    for file in (fresh, stale, record.path / "part-x.damaged"):
        file.write_bytes(b"x" * 10)
    os.utime(stale, (1e9, 1e9))
    assert Store(tmp_path).prune({KEY}) == 20
    assert fresh.exists() and not stale.exists()


def test_a_killed_writers_files_go_with_the_next_write(tmp_path: Path) -> None:
    write(crafts(tmp_path), "a")
    stale = crafts(tmp_path).path / ".tmp-2"
    stale.write_bytes(b"x")
    os.utime(stale, (1e9, 1e9))
    write(crafts(tmp_path), "b")
    assert not stale.exists()


def test_clear(tmp_path: Path) -> None:
    record = cells(tmp_path)
    record.write_rows([{"id": "a", "v": 1}])
    record.set_note("checks", 1)
    other = cells(tmp_path)
    assert other.done() == {"a"}
    record.clear()
    assert record.done() == other.done() == set() and record.note("checks") is None
    record.write_rows([{"id": "a", "v": 2}])
    assert other.read_rows() == [{"id": "a", "v": 2}] and other.warnings == []
    assert list(Store(tmp_path).find("cells")) == [KEY]


def test_another_key_version_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = cells(tmp_path)
    record.write_rows([{"id": "a", "v": 1}])
    record.set_note("checks", 1)
    monkeypatch.setattr(bench.store, "KEY_VERSION", bench.store.KEY_VERSION + 1)
    new = cells(tmp_path)
    assert list(Store(tmp_path).find("cells")) == []
    assert new.done() == set() and new.note("checks") is None and new.warnings == []
    new.write_rows([{"id": "a", "v": 2}])
    assert new.read_rows() == [{"id": "a", "v": 2}]
    assert list(Store(tmp_path).find("cells")) == [KEY]


def test_a_shard_copied_from_another_record_is_ignored(tmp_path: Path) -> None:
    other = Store(tmp_path).record("cells", content_key({"seed": 9}), {"seed": 9})
    other.write_rows([{"id": "z", "v": 1}])
    record = cells(tmp_path)
    record.write_rows([{"id": "a", "v": 1}])
    source = parts(other)[0]
    (record.path / source.name).write_bytes(source.read_bytes())
    assert cells(tmp_path).done() == {"a"}


def test_the_lock_excludes_and_names_the_record(tmp_path: Path) -> None:
    with cells(tmp_path).lock(timeout=1):
        with pytest.raises(StoreBusy, match=f"{KEY} is in use"):
            with cells(tmp_path).lock(timeout=0):
                pass
    with cells(tmp_path).lock(timeout=0):
        pass


# -- damage -------------------------------------------------------------------------------------------------------
def flip(path: Path, where: int) -> None:
    data = bytearray(path.read_bytes())
    data[where % len(data)] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DAMAGE = {
    "truncated": truncate,
    "emptied": lambda p: p.write_bytes(b""),
    "first byte": lambda p: flip(p, 0),
    "middle byte": lambda p: flip(p, p.stat().st_size // 2),
    "last byte": lambda p: flip(p, -1),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("index", ["kept", "lost", "damaged"])
def test_a_damaged_shard_is_named_set_aside_and_its_ids_are_missing(
    tmp_path: Path, how: str, index: str
) -> None:
    write(crafts(tmp_path), "a", "b")
    (bad,) = parts(crafts(tmp_path))
    write(crafts(tmp_path), "c")
    DAMAGE[how](bad)
    if index == "lost":
        bad.with_suffix(".json").unlink()
    elif index == "damaged":
        flip(bad.with_suffix(".json"), 40)
    record = crafts(tmp_path)
    assert record.missing(["a", "b", "c"]) == ["a", "b"]
    assert len(record.warnings) == 1 and f"{bad} is damaged" in record.warnings[0]
    assert not bad.exists() and list(bad.parent.glob(f"{bad.name}.*.damaged"))
    write(record, "a", "b")
    again = crafts(tmp_path)
    assert torch.equal(again.read_images(["a", "b", "c"])[0], torch.stack([image(n) for n in "abc"]))
    assert again.warnings == []


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_rows_are_never_returned(tmp_path: Path, how: str) -> None:
    cells(tmp_path).write_rows([{"id": "a", "v": 1}])
    record = cells(tmp_path)
    assert record.done() == {"a"}
    DAMAGE[how](parts(record)[0])  # after the check, as a failing disk would
    with pytest.raises(StoreError, match="does not hold 1 of the ids"):
        record.read_rows(["a"])
    assert record.done() == set() and len(record.warnings) == 1


def test_a_shard_damaged_after_its_check_is_noticed_on_reading(tmp_path: Path) -> None:
    record = crafts(tmp_path)
    write(record, "a")
    assert record.done() == {"a"}
    flip(parts(record)[0], -1)
    with pytest.raises(StoreError, match="run the same command again"):
        record.read_images(["a"])
    assert record.missing(["a"]) == ["a"]


def test_damage_is_survived_when_another_shard_has_the_id(tmp_path: Path) -> None:
    record = crafts(tmp_path)
    write(record, "a")
    (old,) = parts(record)
    write(crafts(tmp_path), "a", "b")
    (new,) = set(parts(record)) - {old}
    flip(new, -1)
    assert torch.equal(crafts(tmp_path).read_images(["a"])[0][0], image("a"))


def test_listings_see_a_wrong_size_without_reading(tmp_path: Path) -> None:
    write(crafts(tmp_path), "a")
    truncate(parts(crafts(tmp_path))[0])
    assert crafts(tmp_path).done(verify=False) == set()


@pytest.mark.parametrize("kind", ["crafts", "cells"])
def test_a_lost_index_is_rebuilt_from_the_shard(tmp_path: Path, kind: str) -> None:
    make = {"crafts": crafts, "cells": cells}[kind]
    if kind == "crafts":
        write(make(tmp_path), "a", "b")
    else:
        make(tmp_path).write_rows([{"id": "a"}, {"id": "b"}])
    index = parts(make(tmp_path))[0].with_suffix(".json")
    content = index.read_bytes()
    index.unlink()
    record = make(tmp_path)
    assert record.done() == {"a", "b"} and record.warnings == []
    assert index.read_bytes() == content


def test_a_lost_shard_is_named(tmp_path: Path) -> None:
    write(crafts(tmp_path), "a")
    (part,) = parts(crafts(tmp_path))
    part.unlink()
    record = crafts(tmp_path)
    assert record.done() == set() and "is gone" in record.warnings[0]
    assert crafts(tmp_path).warnings == []


@pytest.mark.parametrize("lost", [True, False])
def test_a_lost_or_damaged_record_file_is_written_again(tmp_path: Path, lost: bool) -> None:
    write(crafts(tmp_path), "a")
    path = crafts(tmp_path).path / "record.json"
    path.unlink() if lost else flip(path, 60)
    assert list(Store(tmp_path).find("crafts")) == []
    assert crafts(tmp_path).done() == {"a"}
    assert list(Store(tmp_path).find("crafts")) == [KEY]
    assert Store(tmp_path).payload("crafts", KEY) == PAYLOAD


# -- full disks and bad folders -----------------------------------------------------------------------------------
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["write", "fsync", "close", "replace"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str, after: int
) -> None:
    write(crafts(tmp_path), "a")
    calls = 0

    def full(real: Any) -> Any:
        def fake(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > after:
                if call == "close":
                    real(*args)
                raise OSError(code, os.strerror(code))
            if call == "write":  # a short write first, as a nearly full disk does it
                return real(args[0], args[1][:10])
            return real(*args)

        return fake

    with monkeypatch.context() as patch:
        if call == "replace":
            patch.setattr(Path, "replace", full(Path.replace))
        else:
            patch.setattr(bench.store.os, call, full(getattr(os, call)))
        record = crafts(tmp_path)
        try:
            write(record, "b")
            failed = False
        except StoreError as error:
            failed = True
            message = str(error)
    if failed:
        assert ("no space left" in message or "quota" in message) and str(record.path) in message
        assert "\n" not in message
    assert failed or after > 0
    assert leftovers(tmp_path) == []
    again = crafts(tmp_path)
    assert again.done() >= {"a"} and again.warnings == []
    write(again, "b")
    assert torch.equal(again.read_images(["a", "b"])[0], torch.stack([image("a"), image("b")]))


def test_a_full_disk_on_the_very_first_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(bench.store.os, "write", full)
        with pytest.raises(StoreError, match=r"cannot write .*record\.json: no space left on the disk"):
            write(crafts(tmp_path), "a")
        with pytest.raises(StoreError, match="no space left"):
            Store(tmp_path).check_writable()
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    write(crafts(tmp_path), "a")


def test_a_root_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot create"):
        write(crafts(tmp_path / "file"), "a")
    with pytest.raises(StoreError, match="cannot"):
        Store(tmp_path / "file").check_writable()

    def denied(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(StoreError, match=r"cannot create .*Permission denied"):
        write(crafts(tmp_path / "new"), "a")
    with pytest.raises(StoreError, match=r"cannot create .*Permission denied"):
        with crafts(tmp_path / "new").lock():
            pass


def test_a_store_that_cannot_be_read_is_an_error_not_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells(tmp_path).write_rows([{"id": "a"}])
    real = Path.read_bytes

    def denied(path: Path) -> bytes:
        if path.suffix == ".parquet":
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(StoreError, match=r"cannot read .*Permission denied"):
        cells(tmp_path).read_rows()
    assert len(parts(cells(tmp_path))) == 1


def test_check_writable_leaves_nothing(tmp_path: Path) -> None:
    Store(tmp_path / "new").check_writable()
    assert list((tmp_path / "new").iterdir()) == []


# -- processes ----------------------------------------------------------------------------------------------------
def test_kill_9_at_any_moment_leaves_everything_readable(memory_path: Path, forker: Forker) -> None:
    code = """
    for i in itertools.count(len(record.done())):
        record.write_images([str(i)], image(i), [{"i": i}])
        record.set_note("last", i)
    """
    rng = random.Random(0)
    before = 0
    for _ in range(30):
        child = forker.start(memory_path, code)
        time.sleep(rng.uniform(0.0, 0.05))
        child.kill()
        child.wait()
        record = crafts(memory_path)
        ids = sorted(record.done(), key=int)
        assert record.warnings == []
        assert ids == [str(i) for i in range(len(ids))] and len(ids) >= before
        before = len(ids)
        if ids:
            images, infos = record.read_images(ids)
            assert torch.equal(images[:, 0, 0, 0], torch.tensor([i / 7 for i in range(len(ids))]))
            assert [info["i"] for info in infos] == list(range(len(ids)))
        assert record.note("last") in {None, *range(len(ids))}
    assert before > 30


def test_two_processes_may_write_one_record_at_once(memory_path: Path, forker: Forker) -> None:
    code = """
    for i in range(25):
        record.write_images([str(i), NAME + str(i)], image(i).repeat(2, 1, 1, 1), [{"i": i}] * 2)
        assert str(i) in record.done()
    assert not record.warnings, record.warnings
    (record.path.parent / NAME).touch()
    """
    writers = [forker.start(memory_path, f"NAME = {name!r}\n{textwrap.dedent(code)}") for name in "xy"]
    while any(writer.alive() for writer in writers):
        reader = crafts(memory_path)
        reader.read_images(sorted(reader.done()))
        assert reader.warnings == []
        time.sleep(0.01)
    record = crafts(memory_path)
    assert all((record.path.parent / name).exists() for name in "xy")
    assert record.done() == {f"{who}{i}" for who in ("", "x", "y") for i in range(25)}
    images, _ = record.read_images([str(i) for i in range(25)])
    assert torch.equal(images[:, 0, 0, 0], torch.tensor([i / 7 for i in range(25)]))
    assert leftovers(memory_path) == []


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path, forker: Forker) -> None:
    code = """
    with record.lock():
        (record.path / "held").touch()
        time.sleep(60)
    """
    child = forker.start(tmp_path, code)
    while not (crafts(tmp_path).path / "held").exists():
        assert child.alive()
        time.sleep(0.01)
    with pytest.raises(StoreBusy):
        with crafts(tmp_path).lock(timeout=0.1):
            pass
    child.kill()
    with crafts(tmp_path).lock(timeout=5):
        pass


def test_a_record_pruned_under_a_writer_is_written_anew(tmp_path: Path) -> None:
    record = cells(tmp_path)
    record.write_rows([{"id": "a"}])
    Store(tmp_path).prune(set())
    record.write_rows([{"id": "b"}])
    assert cells(tmp_path).done() == {"b"} and list(Store(tmp_path).find("cells")) == [KEY]
