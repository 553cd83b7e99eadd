"""Jobs in worker processes of their own: one or more per device.

Workers are fresh interpreters that talk JSON lines over pipes: no pickles, and threads and visible devices are set in
their environment before anything is imported. They are in sessions of their own, so Ctrl-C reaches this process
only, which then stops them.
"""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.errors import BenchError, GridError
from bench.executors.base import COMMAND, Event, Executor, Job, OnEvent, Schedule, command_line

_log = logging.getLogger(__name__)

_BOOT = (
    # Without the current folder, so that no file there stands in for json; then with the parent's path.
    "import sys; sys.path[:] = [p for p in sys.path if p]; "
    "import json; sys.path[:] = json.loads(sys.stdin.readline()); "
    "from bench.executors.worker import main; main()"
)
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_TICK = 0.25
_POLL = 0.01
_DRAIN_SECONDS = 1.0
_GRACE_SECONDS = 2.0
_EXIT_SECONDS = 10.0
_MAX_FALSE_STARTS = 3
_TAIL = 200

_Message = dict[str, Any]
_Inbox = queue.SimpleQueue[tuple["_Worker", _Message | None]]


class ProcessExecutor(Executor):
    """Runs jobs in `workers` processes per device."""

    def run(self, jobs: Sequence[Job], manifest: Path, on_event: OnEvent) -> None:
        schedule = Schedule(jobs)
        if not schedule:
            return
        places = [device for _ in range(self.workers) for device in self.devices][: len(jobs)]
        with _Pool(self.work, manifest, places) as pool:
            _Run(schedule, pool, on_event).loop()


class _Run:
    """The parent's side of one run: gives jobs to workers and passes on what they say."""

    def __init__(self, schedule: Schedule, pool: _Pool, on_event: OnEvent) -> None:
        self.schedule = schedule
        self.pool = pool
        self.on_event = on_event
        self.false_starts = 0

    def loop(self) -> None:
        while self.schedule:
            self._deal()
            message = self.pool.receive()
            if message is None:
                continue
            worker, content = message
            if content is None:
                self._ended(worker)
            else:
                self._take(worker, content)

    def _deal(self) -> None:
        for worker in self.pool.workers:
            if worker.ready and worker.job is None:
                busy = {other.job.group for other in self.pool.workers if other.job is not None}
                job = self.schedule.next_for(worker.group, busy)
                if job is None:
                    return
                worker.give(job)

    def _take(self, worker: _Worker, content: _Message) -> None:
        kind = content.pop("type")
        if kind == "event":
            event = Event(**content)
            if event.kind in ("finished", "failed", "postponed"):
                worker.job = None
            self._emit(event)
        elif kind == "log":
            # As if it had been logged here.
            logging.getLogger(content["name"]).log(content["level"], "%s", content["text"])
        elif kind == "ready":
            worker.ready = True
            self.false_starts = 0
        elif kind == "broken":
            if content["user"]:
                raise BenchError(content["text"])
            raise RuntimeError(f"a worker could not start: {content['text']}\n{content['traceback']}")

    def _emit(self, event: Event) -> None:
        self.on_event(event)
        for follower in self.schedule.settle(event):
            self.on_event(follower)

    def _ended(self, worker: _Worker) -> None:
        """A worker is gone though nobody asked: its job failed, the others go on with a new worker."""
        reason = worker.end_reason()
        self.pool.remove(worker)
        if worker.job is not None:
            seconds = time.monotonic() - worker.job_began
            self._emit(Event("failed", worker.job.key, text=reason, seconds=seconds))
        elif worker.ready:
            self.on_event(Event("message", text=f"{reason}; another takes its place"))
        else:
            self.false_starts += 1
            if self.false_starts >= _MAX_FALSE_STARTS:
                raise BenchError(
                    f"{reason} {self.false_starts} times before it had started: no worker can run"
                )
        if self.schedule.waiting:
            self.pool.start(worker.device)


class _Worker:
    """One worker process and its two reader threads."""

    def __init__(self, work: str, manifest: Path, device: str, threads: int, inbox: _Inbox) -> None:
        self.device = device
        self.ready = False
        self.job: Job | None = None
        self.job_began = 0.0
        self.group: str | None = None
        self.ended_at: float | None = None
        self._tail: collections.deque[str] = collections.deque(maxlen=_TAIL)
        variables, inside = placement(device, os.environ)
        environment = {**os.environ, COMMAND: command_line(), **variables, **_threads_environment(threads)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BOOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        hello = {
            "work": work,
            "manifest": str(manifest),
            "device": inside,
            "threads": threads,
            "level": logging.getLogger().getEffectiveLevel(),
        }
        self._send(json.dumps(sys.path, default=str), json.dumps(hello))
        self._errors = threading.Thread(target=self._read_errors, daemon=True)
        self._errors.start()
        threading.Thread(target=self._read_messages, args=(inbox,), daemon=True).start()

    def give(self, job: Job) -> None:
        self.job, self.group, self.job_began = job, job.group, time.monotonic()
        self._send(json.dumps(asdict(job)))

    def end_reason(self) -> str:
        """One line on how the process ended."""
        _exited(self.process, _DRAIN_SECONDS)
        _close(self.process)
        code = self.process.returncode
        self._errors.join(_DRAIN_SECONDS)
        # Of a crash's Python stack, the line that names the error comes last; of a fatal signal's, first.
        lines = [line for line in self._tail if line.strip()]
        said = [line for line in lines if line.startswith("Fatal Python error")] or lines[-1:]
        tail = f" ({said[0].strip()})" if said else ""
        if code >= 0:
            return f"worker process ended with exit code {code}{tail}"
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        if -code == getattr(signal, "SIGKILL", 9):
            return (
                f"worker process was killed ({name}), most likely because memory ran out: "
                "fewer workers or a smaller batch size need less"
            )
        return f"worker process crashed ({name}){tail}"

    def _send(self, *lines: str) -> None:
        assert self.process.stdin is not None
        # A worker that is gone already is noticed by the end of its messages.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("".join(f"{line}\n" for line in lines))
            self.process.stdin.flush()

    def _read_messages(self, inbox: _Inbox) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            # The last line of a killed worker may be cut.
            with contextlib.suppress(json.JSONDecodeError):
                inbox.put((self, json.loads(line)))
        inbox.put((self, None))

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._tail.append(line)
            _log.debug("worker %d: %s", self.process.pid, line.rstrip())


class _Pool:
    """The worker processes of one run; none of them outlives the `with` block.

    Args:
        work, manifest: passed on.
        places: the device of each worker.
    """

    def __init__(self, work: str, manifest: Path, places: Sequence[str]) -> None:
        self.workers: list[_Worker] = []
        self._inbox: _Inbox = queue.SimpleQueue()
        self._work = work
        self._manifest = manifest
        self._places = places
        self._threads = max(1, cores() // len(places))

    def __enter__(self) -> _Pool:
        try:
            for device in self._places:
                self.start(device)
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._dismiss()
            else:
                self._terminate()
        finally:
            self._kill()

    def start(self, device: str) -> None:
        self.workers.append(_Worker(self._work, self._manifest, device, self._threads, self._inbox))

    def remove(self, worker: _Worker) -> None:
        _close(worker.process)
        self.workers.remove(worker)

    def receive(self) -> tuple[_Worker, _Message | None] | None:
        """The next message of a worker (None as content: it has ended), or None when there is none for a while."""
        while True:
            try:
                worker, content = self._inbox.get(timeout=_TICK)
            except queue.Empty:
                return self._silent_end()
            if worker in self.workers:
                return worker, content

    def _silent_end(self) -> tuple[_Worker, None] | None:
        """A worker that ended while a process it started keeps its pipe open, so that no end of file came."""
        now = time.monotonic()
        for worker in self.workers:
            if _exited(worker.process):
                worker.ended_at = worker.ended_at or now
                if now - worker.ended_at > _DRAIN_SECONDS:
                    return worker, None
        return None

    def _dismiss(self) -> None:
        """Let idle workers leave by themselves."""
        for worker in self.workers:
            assert worker.process.stdin is not None
            with contextlib.suppress(OSError):
                worker.process.stdin.close()
        self._wait(_EXIT_SECONDS)

    def _terminate(self) -> None:
        """Tell workers to drop what they do."""
        for worker in self.workers:
            worker.process.terminate()
        self._wait(_GRACE_SECONDS)

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for worker in self.workers:
            _exited(worker.process, deadline - time.monotonic())

    def _kill(self) -> None:
        for worker in self.workers:
            _close(worker.process)
        self.workers.clear()


def _exited(process: subprocess.Popen[str], seconds: float = 0.0) -> bool:
    """Whether the process ends within `seconds`. It is not collected, so that its number stays taken."""
    deadline = time.monotonic() + seconds
    while True:
        if process.returncode is not None:
            return True
        if hasattr(os, "waitid"):
            ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        else:
            ended = process.poll() is not None
        if ended or time.monotonic() >= deadline:
            return ended
        time.sleep(_POLL)


def _close(process: subprocess.Popen[str]) -> None:
    """End a worker and whatever it started, and collect it."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)  # its session: a loader process it forked goes too
            else:
                process.kill()
        process.wait()
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()


def cores() -> int:
    """CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _threads_environment(threads: int) -> dict[str, str]:
    """Thread limits of a worker: its share of the cores, or less where the user asked for less."""
    out = {}
    for name in _THREAD_VARIABLES:
        asked = os.environ.get(name, "")
        out[name] = str(min(threads, int(asked)) if asked.isdigit() and int(asked) > 0 else threads)
    return out


def placement(device: str, environment: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """Environment variables that show a worker only `device`, and what the device is called inside it.

    Raises:
        GridError: the device is not among those that CUDA_VISIBLE_DEVICES leaves.
    """
    kind, _, number = device.partition(":")
    if kind == "cpu":
        return {"CUDA_VISIBLE_DEVICES": ""}, device
    if kind != "cuda":
        return {}, device
    index = number or "0"
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return {"CUDA_VISIBLE_DEVICES": index}, "cuda:0"
    names = [name.strip() for name in visible.split(",") if name.strip()]
    if not index.isdigit() or int(index) >= len(names):
        raise GridError(f"device {device}: CUDA_VISIBLE_DEVICES='{visible}' leaves {len(names)} devices")
    return {"CUDA_VISIBLE_DEVICES": names[int(index)]}, "cuda:0"
