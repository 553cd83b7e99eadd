"""Jobs, events, and what every executor shares. Nothing here imports torch: workers set their threads first.

A job is a few strings: a worker finds everything else through the manifest file, so no live object crosses a process.
"""

from __future__ import annotations

import importlib
import os
import shlex
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

from bench.errors import BenchError, NotApplicable, StoreBusy

PATIENCE = 5.0
"""Seconds to wait for what another process is computing, where nothing else is left to do meanwhile."""
COMMAND = "BENCH_COMMAND"
"""Environment variable that tells workers the command line that they work for."""


def command_line() -> str:
    """What was typed to run this; a worker's is that of the process that started it."""
    name = Path(sys.argv[0]).name
    words = ["python", "-m", "bench"] if name == "__main__.py" else [name]
    return os.environ.get(COMMAND) or shlex.join([*words, *sys.argv[1:]])


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Attributes:
        kind: "craft" or "cell".
        key: its content key, unique among the jobs of a run.
        group: jobs of one group use the same target model; a worker stays with a group, so weights load once.
        cost: estimated seconds.
        after: keys that must be finished before; those that are no jobs of the run count as finished.
        patience: seconds to wait for another process that computes the same, -1 = for ever; the schedule sets it.
        timed: whether `cost` is from the pace of the same work; otherwise it is a guess, which may be off by far.
    """

    kind: str
    key: str
    group: str = ""
    cost: float = 1.0
    after: tuple[str, ...] = ()
    patience: float = -1.0
    timed: bool = True


@dataclass(frozen=True)
class Event:
    """What happened to a job. Every job ends with exactly one `finished` or `failed`, unless the run is interrupted.

    Attributes:
        kind: `started`; `progress` (done, total); `finished` (seconds; reason, when it turned out not applicable);
            `failed` (text, is_user_error, traceback, seconds); `postponed`, since another process computes the same:
            it will start again; `message` (text, no job: key is "").
        key: the job's key.
        done, total: images.
        text: one line.
        reason: why the job is not applicable; "" when it was done.
        seconds: wall time.
        is_user_error: the failure is a BenchError; otherwise it is a bug, or the worker died.
        traceback: of a bug.
    """

    kind: Literal["started", "progress", "message", "finished", "failed", "postponed"]
    key: str = ""
    done: int = 0
    total: int = 0
    text: str = ""
    reason: str = ""
    seconds: float = 0.0
    is_user_error: bool = False
    traceback: str = ""


OnEvent = Callable[[Event], None]

Work = Callable[[Path, Job, str, Callable[[int, int], None]], str | None]
"""`work(manifest, job, device, report)`: does the job, calling `report(done, total)` now and then.

Returns the reason when the job turns out not to be applicable; raises StoreBusy when another process computes the same
for longer than `job.patience`, and BenchError for what a user can mend.
"""


class Executor(ABC):
    """Runs jobs.

    Args:
        work: `module:function`, a `Work`.
        workers: processes per device.
        devices: device names.
    """

    def __init__(self, work: str, workers: int, devices: tuple[str, ...]) -> None:
        self.work = work
        self.workers = workers
        self.devices = devices

    @abstractmethod
    def run(self, jobs: Sequence[Job], manifest: Path, on_event: OnEvent) -> None:
        """Run all jobs; the failure of one does not stop the others, except those that need it.

        Args:
            jobs: in the order to be preferred.
            manifest: file the work function reads.
            on_event: called in this thread; what it raises ends the run.

        Raises:
            KeyboardInterrupt: after all workers have stopped.
            ValueError: two jobs have one key, or jobs wait for each other.
        """


def resolve(work: str) -> Work:
    """The function behind `module:function`."""
    module, _, name = work.partition(":")
    return cast(Work, getattr(importlib.import_module(module), name))


def run_job(work: Work, manifest: Path, job: Job, device: str, emit: OnEvent) -> None:
    """Do one job, turning what happens into events. Interrupts pass through."""
    began = time.perf_counter()

    def report(done: int, total: int) -> None:
        emit(Event("progress", job.key, done=done, total=total))

    def failed(text: str, is_user_error: bool = False, trace: str = "") -> Event:
        return Event(
            "failed",
            job.key,
            text=text,
            is_user_error=is_user_error,
            traceback=trace,
            seconds=time.perf_counter() - began,
        )

    emit(Event("started", job.key))
    try:
        reason = work(manifest, job, device, report)
    except NotApplicable as error:
        reason = error.reason
    except StoreBusy:
        emit(Event("postponed", job.key))
        return
    except BenchError as error:
        emit(failed(str(error), is_user_error=True))
        return
    except (Exception, SystemExit) as error:  # whatever a plug-in raises ends this job only, and is reported
        emit(failed(_bug(error), trace="".join(traceback.format_exception(error))))
        return
    emit(Event("finished", job.key, reason=reason or "", seconds=time.perf_counter() - began))


def _bug(error: BaseException) -> str:
    """`KeyError: 'x' (bench/runner.py:12)`: what and where, on one line."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}{': ' + lines[0] if lines else ''}{where}"


class Schedule:
    """Which job comes next: those that another process is busy with come last.

    Args:
        jobs: in the order to be preferred.

    Raises:
        ValueError: two jobs have one key, or jobs wait for each other.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = {job.key: job for job in jobs}
        if len(self._jobs) != len(jobs):
            raise ValueError("jobs must have different keys")
        self._waiting = dict(self._jobs)
        self._running: set[str] = set()
        self._postponed: set[str] = set()
        self._needs = {job.key: {key for key in job.after if key in self._jobs} for job in jobs}
        self._check_order()

    def _check_order(self) -> None:
        settled: set[str] = set()
        left = set(self._jobs)
        while left:
            free = {key for key in left if self._needs[key] <= settled}
            if not free:
                raise ValueError(f"jobs wait for each other: {', '.join(sorted(left))}")
            settled |= free
            left -= free

    def __bool__(self) -> bool:
        """Whether a job has not ended yet."""
        return bool(self._waiting or self._running)

    @property
    def waiting(self) -> int:
        """Number of jobs not started."""
        return len(self._waiting)

    def next(self) -> Job | None:
        """The first job that can start; what was postponed stands behind all the others."""
        return self._start(next(self._ready(), None))

    def next_for(self, group: str | None, busy: AbstractSet[str]) -> Job | None:
        """The job for a worker that comes from `group` while other workers are in the groups `busy`.

        It stays in its group; else it opens the group with the most work left that nobody is in; else it helps where
        the most work is left.
        """
        ready = list(self._ready())
        if not ready:
            return None
        left: dict[str, float] = {}
        for job in self._waiting.values():
            left[job.group] = left.get(job.group, 0.0) + job.cost

        def rank(job: Job) -> tuple[bool, bool, bool, float]:
            return (job.key in self._postponed, job.group != group, job.group in busy, -left[job.group])

        return self._start(min(ready, key=rank))

    def finish(self, key: str) -> None:
        """Job `key` is done: jobs that wait for it may start."""
        self._running.discard(key)
        for needs in self._needs.values():
            needs.discard(key)

    def postpone(self, key: str) -> None:
        """Another process is at job `key`: it starts again after all the others that can."""
        self._running.discard(key)
        self._postponed.add(key)
        self._waiting[key] = self._jobs[key]

    def give_up(self, event: Event) -> Iterator[Event]:
        """A job failed or is not applicable: the same is true of all that need it, directly or not."""
        self._running.discard(event.key)
        for job in list(self._waiting.values()):
            if event.key in self._needs[job.key] and job.key in self._waiting:
                del self._waiting[job.key]
                if event.kind == "failed":
                    passed = Event("failed", job.key, text=event.text, is_user_error=event.is_user_error)
                else:
                    passed = Event("finished", job.key, reason=event.reason)
                yield passed
                yield from self.give_up(passed)

    def settle(self, event: Event) -> Iterator[Event]:
        """Take note of how a job ended; the events of jobs that cannot run any more follow from it."""
        if event.kind == "postponed":
            self.postpone(event.key)
        elif event.kind == "finished" and not event.reason:
            self.finish(event.key)
        elif event.kind in ("finished", "failed"):
            yield from self.give_up(event)

    def _ready(self) -> Iterator[Job]:
        return (job for job in self._waiting.values() if not self._needs[job.key])

    def _start(self, job: Job | None) -> Job | None:
        if job is None:
            return None
        del self._waiting[job.key]
        self._running.add(job.key)
        # A job that comes again does so because no other can start.
        return replace(job, patience=PATIENCE if job.key in self._postponed else 0.0)
