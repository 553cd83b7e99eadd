"""Executors: every job ends once, after what it needs, whatever happens to the workers."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.errors import BenchError, GridError
from bench.executors import Event, Job, create_executor
from bench.executors.base import Schedule
from bench.executors.processes import placement

REPO = Path(__file__).parents[2]

WORK = '''
"""A work function that does what the manifest says for the job's key."""
import json, logging, os, signal, subprocess, sys, time
from pathlib import Path
from bench.errors import DataError, NotApplicable, StoreBusy

AT_IMPORT = {"torch": "torch" in sys.modules, "omp": os.environ.get("OMP_NUM_THREADS"),
             "cuda": os.environ.get("CUDA_VISIBLE_DEVICES")}

def work(manifest, job, device, report):
    folder = Path(manifest).parent
    action = json.loads(Path(manifest).read_text()).get(job.key, "ok")
    (folder / f"{job.key}.pid").write_text(str(os.getpid()))
    report(0, 2)
    name, _, argument = action.partition(" ")
    if name == "skip":
        raise NotApplicable("no gradient")
    if name == "reason":
        return "not for this size"
    if name == "user":
        raise DataError("images.csv: no such\\nfile")
    if name == "bug":
        {}["x"]
    if name == "systemexit":
        sys.exit("library gave up")
    if name == "print":
        print("noise" * 1000); os.write(1, b"more noise\\n")
    if name == "log":
        logging.getLogger("toy").warning("look at %s", job.key)
        logging.getLogger("toy").info("not shown")
    if name == "busy" and job.patience == 0:
        raise StoreBusy("another process is at it")
    if name == "sleep":
        time.sleep(float(argument))
    if name == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(float(argument))
    if name == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "abort":
        os.abort()
    if name == "exit":
        sys.stderr.write("disk on fire\\n"); sys.stderr.flush(); os._exit(3)
    if name == "orphan":
        if os.fork() == 0:
            (folder / "orphan").write_text(str(os.getpid()))
            time.sleep(60); os._exit(0)
        while not (folder / "orphan").exists(): time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    report(2, 2)
    out = {"job": [job.kind, job.key, list(job.after)], "device": device, **AT_IMPORT}
    (folder / f"{job.key}.out").write_text(json.dumps(out))
'''  # fmt: skip


class Toy:
    """A folder with the work module above and a manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = folder / "manifest.json"
        (folder / "toy_work.py").write_text(WORK)

    def run(self, name: str, jobs: list[Job], actions: dict[str, str], **kwargs: Any) -> list[Event]:
        self.manifest.write_text(json.dumps(actions))
        events: list[Event] = []
        create_executor(name, work="toy_work:work", **kwargs).run(jobs, self.manifest, events.append)
        return events

    def out(self, key: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / f"{key}.out").read_text())
        return content

    def pid(self, key: str) -> int:
        return int((self.folder / f"{key}.pid").read_text())

    def wait_for(self, *names: str) -> None:
        deadline = time.monotonic() + 30
        while not all((self.folder / name).exists() and (self.folder / name).read_text() for name in names):
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Toy]:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy_work", raising=False)
    yield Toy(tmp_path)
    sys.modules.pop("toy_work", None)


both = pytest.mark.parametrize(("name", "workers"), [("inprocess", 1), ("processes", 2)])


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A killed orphan may be a zombie for as long as nobody collects it.
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def gone(pid: int, within: float = 5.0) -> bool:
    deadline = time.monotonic() + within
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not alive(pid)


def ends(events: list[Event]) -> dict[str, Event]:
    last = [e for e in events if e.kind in ("finished", "failed")]
    assert len({e.key for e in last}) == len(last)
    return {e.key: e for e in last}


# -- what happens to jobs -----------------------------------------------------------------------------------------
@both
def test_every_outcome_is_one_event_and_the_others_go_on(toy: Toy, name: str, workers: int) -> None:
    actions = {
        "a": "ok",
        "b": "skip",
        "c": "user",
        "d": "bug",
        "e": "reason",
        "f": "print",
        "g": "systemexit",
    }
    jobs = [Job("cell", key) for key in actions]
    events = toy.run(name, jobs, actions, workers=workers)
    end = ends(events)
    assert sorted(end) == list(actions)
    assert [end[k].kind for k in "abcdefg"] == [
        "finished", "finished", "failed", "failed", "finished", "finished", "failed",
    ]  # fmt: skip
    assert [end[k].reason for k in "abef"] == ["", "no gradient", "not for this size", ""]
    assert end["c"].text == "images.csv: no such file" and end["c"].is_user_error and not end["c"].traceback
    assert end["d"].text.startswith("KeyError: 'x' (toy_work.py:") and not end["d"].is_user_error
    assert "Traceback" in end["d"].traceback and end["d"].seconds > 0
    assert end["g"].text.startswith("SystemExit: library gave up")
    for key in "af":
        mine = [(e.kind, e.done, e.total) for e in events if e.key == key]
        assert mine == [("started", 0, 0), ("progress", 0, 2), ("progress", 2, 2), ("finished", 0, 0)]
        assert toy.out(key)["job"] == ["cell", key, []]


@both
def test_jobs_wait_for_what_they_need_and_share_its_fate(toy: Toy, name: str, workers: int) -> None:
    jobs = [
        Job("cell", "needs-good", after=("good", "long-done")),
        Job("cell", "needs-bad", after=("good", "bad")),
        Job("cell", "needs-needs-bad", after=("needs-bad",)),
        Job("cell", "needs-skip", after=("skip",)),
        Job("craft", "good"),
        Job("craft", "bad"),
        Job("craft", "skip"),
    ]
    events = toy.run(name, jobs, {"good": "sleep 0.1", "bad": "user", "skip": "skip"}, workers=workers)
    end = ends(events)
    order = [(e.kind, e.key) for e in events]
    assert order.index(("finished", "good")) < order.index(("started", "needs-good"))
    assert end["needs-good"].reason == ""
    assert end["needs-bad"].text == end["needs-needs-bad"].text == end["bad"].text
    assert end["needs-bad"].is_user_error
    assert end["needs-skip"].reason == "no gradient"
    assert ("started", "needs-bad") not in order and ("started", "needs-skip") not in order
    assert toy.out("needs-good")["job"] == ["cell", "needs-good", ["good", "long-done"]]


@both
def test_a_job_of_another_process_is_postponed(toy: Toy, name: str, workers: int) -> None:
    jobs = [Job("craft", "there"), Job("cell", "needs-there", after=("there",)), Job("cell", "here")]
    events = toy.run(name, jobs, {"there": "busy", "here": "sleep 0.1"}, workers=workers)
    assert sorted(ends(events)) == ["here", "needs-there", "there"]
    order = [(e.kind, e.key) for e in events]
    assert order.count(("started", "there")) == 2 and order.count(("postponed", "there")) == 1
    if workers == 1:
        assert order.index(("finished", "here")) < order.index(("finished", "there"))
    assert order.index(("finished", "there")) < order.index(("started", "needs-there"))


def test_in_process_keeps_the_given_order(toy: Toy) -> None:
    jobs = [Job("cell", "c", cost=1), Job("cell", "a", after=("b",)), Job("cell", "b", cost=9)]
    assert list(ends(toy.run("inprocess", jobs, {}))) == ["c", "b", "a"]


@both
def test_warnings_logged_in_a_worker_arrive_as_log_records(
    toy: Toy, name: str, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    toy.run(name, [Job("cell", "a")], {"a": "log"}, workers=workers)
    assert [(r.name, r.levelname, r.getMessage()) for r in caplog.records] == [
        ("toy", "WARNING", "look at a")
    ]


@both
def test_an_error_in_the_callback_ends_the_run(toy: Toy, name: str, workers: int) -> None:
    toy.manifest.write_text(json.dumps({"b": "sleep 60"} if name == "processes" else {}))

    class Enough(Exception):
        pass

    def stop(event: Event) -> None:
        if event.kind == "finished":
            raise Enough

    executor = create_executor(name, workers, work="toy_work:work")
    with pytest.raises(Enough):
        executor.run([Job("cell", "a"), Job("cell", "b")], toy.manifest, stop)
    if name == "processes":
        assert gone(toy.pid("a"), within=0)


@both
def test_no_jobs_is_nothing_to_do(toy: Toy, name: str, workers: int) -> None:
    assert toy.run(name, [], {}, workers=workers) == []


@both
def test_jobs_that_can_never_run_are_refused(toy: Toy, name: str, workers: int) -> None:
    with pytest.raises(ValueError, match="wait for each other: a, b"):
        toy.run(name, [Job("cell", "a", after=("b",)), Job("cell", "b", after=("a",)), Job("cell", "c")], {})
    with pytest.raises(ValueError, match="different keys"):
        toy.run(name, [Job("cell", "a"), Job("craft", "a")], {})


# -- workers ------------------------------------------------------------------------------------------------------
def test_a_worker_that_dies_fails_its_job_and_is_replaced(toy: Toy) -> None:
    actions = {"a": "kill", "b": "abort", "c": "exit", "d": "ok", "e": "ok", "f": "orphan", "g": "ok"}
    end = ends(toy.run("processes", [Job("cell", key) for key in actions], actions, workers=1))
    assert [end[k].kind for k in actions] == ["failed"] * 3 + ["finished"] * 2 + ["failed", "finished"]
    assert end["a"].text.startswith("worker process was killed (SIGKILL), most likely because memory ran out")
    assert end["b"].text == "worker process crashed (SIGABRT) (Fatal Python error: Aborted)"
    assert end["c"].text == "worker process ended with exit code 3 (disk on fire)"
    assert not any(e.is_user_error for e in end.values())
    assert toy.pid("d") == toy.pid("e") and len({toy.pid(k) for k in actions}) == 5
    # A process that the dead worker left behind neither hides its end nor stays.
    assert end["f"].text.startswith("worker process was killed")
    assert gone(int((toy.folder / "orphan").read_text()))


def test_workers_get_their_share_of_threads_and_their_device_before_torch(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.executors.processes.cores", lambda: 9)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    jobs = [Job("cell", "a", "one"), Job("cell", "b", "two")]
    actions = {"a": "sleep 0.3", "b": "sleep 0.3"}
    toy.run("processes", jobs, actions, devices=("cuda:0", "cuda:1"))
    outs = [toy.out("a"), toy.out("b")]
    assert sorted(out["cuda"] for out in outs) == ["5", "7"]
    assert [(out["device"], out["omp"], out["torch"]) for out in outs] == [("cuda:0", "4", False)] * 2
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    toy.run("processes", jobs[:1], actions)
    assert toy.out("a") == {"job": ["cell", "a", []], "device": "cpu", "omp": "3", "cuda": "", "torch": False}


def test_a_work_function_that_cannot_be_imported_ends_the_run(toy: Toy) -> None:
    executor = create_executor("processes", 2, work="no_such_module:work")
    with pytest.raises(RuntimeError, match="a worker could not start: ModuleNotFoundError"):
        executor.run([Job("cell", "a"), Job("cell", "b")], toy.manifest, lambda event: None)
    (toy.folder / "dies.py").write_text(
        "import os, sys; sys.stderr.write('no GPU\\n'); sys.stderr.flush(); os._exit(7)"
    )
    executor = create_executor("processes", 1, work="dies:work")
    with pytest.raises(BenchError, match=r"exit code 7 \(no GPU\) 3 times before it had started"):
        executor.run([Job("cell", "a")], toy.manifest, lambda event: None)
    (toy.folder / "wrong.py").write_text(
        "from bench.errors import PluginError\nraise PluginError('my.py: no class')"
    )
    executor = create_executor("processes", 1, work="wrong:work")
    with pytest.raises(BenchError, match=r"^my.py: no class$"):
        executor.run([Job("cell", "a")], toy.manifest, lambda event: None)


SCRIPT = """
import sys
from pathlib import Path
from bench.executors import Job, create_executor
folder = Path(sys.argv[1])
sys.path.insert(0, str(folder))
jobs = [Job("cell", key) for key in sys.argv[2:]]
try:
    create_executor("processes", len(jobs), work="toy_work:work").run(jobs, folder / "manifest.json", lambda e: None)
except KeyboardInterrupt:
    sys.exit(130)
"""


def start(toy: Toy, actions: dict[str, str]) -> subprocess.Popen[bytes]:
    toy.manifest.write_text(json.dumps(actions))
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(toy.folder), *actions],
        cwd=REPO,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # A test run started in the background may ignore SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    toy.wait_for(*(f"{key}.pid" for key in actions))
    return process


def test_ctrl_c_stops_all_workers_promptly(toy: Toy) -> None:
    process = start(toy, {"a": "sleep 60", "b": "deaf 60"})
    time.sleep(0.1)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
    _, err = process.communicate(timeout=20)
    assert time.monotonic() - began < 6
    assert process.returncode == 130 and err == b""
    assert gone(toy.pid("a"), within=0) and gone(toy.pid("b"), within=0)
    assert not list(toy.folder.glob("*.out"))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_worker_outlives_its_parent(toy: Toy, how: signal.Signals) -> None:
    process = start(toy, {"a": "sleep 60", "b": "deaf 60"})
    process.send_signal(how)
    process.communicate(timeout=20)
    assert gone(toy.pid("a")) and gone(toy.pid("b"))


# -- names, devices -----------------------------------------------------------------------------------------------
def test_bad_choices_are_one_line() -> None:
    with pytest.raises(GridError, match="unknown executor 'process': did you mean 'processes'"):
        create_executor("process")
    with pytest.raises(GridError, match="workers: expected at least 1, got 0"):
        create_executor("processes", workers=0)
    with pytest.raises(GridError, match="devices"):
        create_executor("processes", devices=())


def test_a_worker_sees_its_device_only() -> None:
    assert placement("cpu", {"CUDA_VISIBLE_DEVICES": "3"}) == ({"CUDA_VISIBLE_DEVICES": ""}, "cpu")
    assert placement("cuda:2", {}) == ({"CUDA_VISIBLE_DEVICES": "2"}, "cuda:0")
    assert placement("cuda", {}) == ({"CUDA_VISIBLE_DEVICES": "0"}, "cuda:0")
    assert placement("cuda:1", {"CUDA_VISIBLE_DEVICES": "4, GPU-abc"}) == (
        {"CUDA_VISIBLE_DEVICES": "GPU-abc"},
        "cuda:0",
    )
    assert placement("mps", {}) == ({}, "mps")
    with pytest.raises(GridError, match="device cuda:1: CUDA_VISIBLE_DEVICES='4' leaves 1"):
        placement("cuda:1", {"CUDA_VISIBLE_DEVICES": "4"})


# -- the schedule -------------------------------------------------------------------------------------------------
def test_a_worker_stays_in_its_group_and_otherwise_goes_where_most_is_left() -> None:
    jobs = [
        Job("cell", "a1", "a", 1), Job("cell", "a2", "a", 1),
        Job("cell", "b1", "b", 5), Job("cell", "b2", "b", 5), Job("cell", "b3", "b", 5),
        Job("cell", "c1", "c", 3),
    ]  # fmt: skip
    schedule = Schedule(jobs)
    taken = []
    for group, busy in [(None, ""), (None, "b"), ("b", "c"), ("c", "b"), ("a", "b"), ("a", "b"), ("a", "b")]:
        job = schedule.next_for(group, set(busy))
        taken.append(job.key if job else None)
    assert taken == ["b1", "c1", "b2", "a1", "a2", "b3", None]


def test_what_another_process_is_at_comes_last_and_is_waited_for() -> None:
    schedule = Schedule([Job("cell", "a"), Job("cell", "b"), Job("cell", "c", after=("a",))])
    first = schedule.next()
    assert first is not None and (first.key, first.patience) == ("a", 0)
    assert list(schedule.settle(Event("postponed", "a"))) == [] and schedule
    second = schedule.next()
    assert second is not None and (second.key, second.patience) == ("b", 0)
    schedule.finish("b")
    again = schedule.next_for("x", set())
    assert again is not None and again.key == "a" and again.patience > 0
    schedule.finish("a")
    last = schedule.next()
    assert last is not None and (last.key, last.patience) == ("c", 0)


@st.composite
def graphs(draw: st.DrawFn) -> list[Job]:
    count = draw(st.integers(1, 8))
    jobs = []
    for i in range(count):
        after = draw(st.sets(st.integers(0, i), max_size=3)) - {i}
        jobs.append(
            Job("cell", str(i), draw(st.sampled_from("xy")), draw(st.floats(0, 9)), tuple(map(str, after)))
        )
    return draw(st.permutations(jobs))


@settings(max_examples=200, deadline=None)
@given(graphs(), st.randoms(use_true_random=False))
def test_every_job_ends_once_and_starts_after_its_needs(jobs: list[Job], random: Any) -> None:
    schedule = Schedule(jobs)
    by_key = {job.key: job for job in jobs}
    running: list[Job] = []
    done: set[str] = set()
    ended: list[str] = []
    while schedule:
        job = schedule.next_for(random.choice("xyz"), set(random.choice(["", "x", "xy"])))
        if job is not None:
            assert set(job.after) <= done
            running.append(job)
        assert running, "nothing runs and nothing can start"
        if job is None or random.random() < 0.5:
            over = running.pop(random.randrange(len(running)))
            kind, reason = random.choice(
                [("finished", ""), ("finished", ""), ("finished", "skip"), ("failed", "")]
            )
            event = Event(kind, over.key, reason=reason)
            if not reason and kind == "finished":
                done.add(over.key)
            ended.append(over.key)
            for follower in schedule.settle(event):
                assert set(by_key[follower.key].after) & set(ended)
                ended.append(follower.key)
    assert sorted(ended) == sorted(by_key) and not running
