"""Jobs one after the other, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.executors.base import Event, Executor, Job, OnEvent, Schedule, resolve, run_job


class InProcessExecutor(Executor):
    """Runs jobs in the given order on the first device; the number of workers has no meaning here."""

    def run(self, jobs: Sequence[Job], manifest: Path, on_event: OnEvent) -> None:
        schedule = Schedule(jobs)
        work = resolve(self.work)

        def emit(event: Event) -> None:
            on_event(event)
            for follower in schedule.settle(event):
                on_event(follower)

        while (job := schedule.next()) is not None:
            run_job(work, manifest, job, self.devices[0], emit)
