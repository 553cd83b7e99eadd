"""Progress of a run: live bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from bench.executors import Event, Job

LINE_EVERY = 10.0


def duration(seconds: float) -> str:
    """`95` as "1 min 35 s"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Display:
    """Consumes executor events; `errors` holds what failed, by job key.

    A failure is one line, when it happens; what else fails for the same reason adds none.

    The time left is the estimated cost of what remains, scaled by how the finished part compared with its estimate.

    Args:
        console: where to write (stderr).
        jobs: what will run.
        labels: cell key -> label; a craft is named after the cells it serves.
        quiet: only warnings and failures.
        log: file that gets the tracebacks of unexpected failures.
        kept: said with the first failure: what becomes of earlier results.
    """

    def __init__(
        self,
        console: Console,
        jobs: Sequence[Job],
        labels: Mapping[str, str],
        plan: Any,
        quiet: bool = False,
        log: Path | None = None,
        kept: str = "",
    ) -> None:
        self.console = console
        self.quiet = quiet
        self.jobs = {job.key: job for job in jobs}
        self.labels = dict(labels)
        for cell in plan.cells:
            if cell.craft is not None:
                self.labels.setdefault(cell.craft.key, f"craft {cell.label}")
        self.errors: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self.bugs = 0
        self.log = log
        self.kept = kept
        self._part: dict[str, float] = dict.fromkeys(self.jobs, 0.0)
        self._began = time.monotonic()
        self._last_line = self._began
        self._live = console.is_terminal and not quiet and bool(jobs)
        self._bars: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"), console=console, transient=True,
        )  # fmt: skip
        self._total: TaskID | None = None

    def __enter__(self) -> Display:
        if self._live:
            self._progress.start()
            self._total = self._progress.add_task("cells and crafts", total=len(self.jobs), left="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._progress.stop()

    def say(self, message: str) -> None:
        """One line, above the bars."""
        if not self.quiet:
            self.console.print(escape(message))

    def warn(self, message: str) -> None:
        """One line, even when quiet."""
        self.console.print(f"bench: {escape(message)}")

    def remaining(self) -> float | None:
        """Estimated seconds left, or None before anything is known."""
        done = sum(self.jobs[key].cost * part for key, part in self._part.items())
        left = sum(self.jobs[key].cost * (1 - part) for key, part in self._part.items())
        elapsed = time.monotonic() - self._began
        return None if done <= 0 or elapsed < 1 else left * elapsed / done

    def __call__(self, event: Event) -> None:
        """Take one event."""
        handler = getattr(self, f"_on_{event.kind}", None)
        if handler is not None:
            handler(event)
        self._refresh(event)

    def _on_started(self, event: Event) -> None:
        if self._live:
            label = self.labels.get(event.key, event.key[:12])
            self._bars[event.key] = self._progress.add_task(escape(label), total=None, left="")

    def _on_progress(self, event: Event) -> None:
        if event.key in self._part and event.total:
            self._part[event.key] = event.done / event.total
        if event.key in self._bars:
            self._progress.update(self._bars[event.key], completed=event.done, total=event.total)

    def _on_message(self, event: Event) -> None:
        self.warn(event.text)

    def _on_finished(self, event: Event) -> None:
        if event.reason:
            self.skipped[event.key] = event.reason
        self._end(event)

    def _on_postponed(self, event: Event) -> None:
        if event.key in self._bars:
            self._progress.remove_task(self._bars.pop(event.key))

    def _on_failed(self, event: Event) -> None:
        said = [event.text]
        if not event.is_user_error:
            self.bugs += 1
        if event.traceback and self._keep(event):
            said.append(f"the traceback is in {self.log}")
        if self.kept and not self.errors:
            said.append(self.kept)
        # What stops a craft stops its cells too, and a broken image or model many of them: once is enough.
        if event.text not in self.errors.values():
            self.warn(f"{self.labels.get(event.key, event.key[:12])}: {'; '.join(said)}")
        self.errors[event.key] = event.text
        self._end(event)

    def _keep(self, event: Event) -> bool:
        """Whether the traceback is in the log."""
        if self.log is None:
            return False
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a", encoding="utf-8") as file:
                file.write(f"{self.labels.get(event.key, event.key)}\n{event.traceback}\n")
        except OSError:
            return False
        return True

    def _end(self, event: Event) -> None:
        if event.key in self._part:
            self._part[event.key] = 1.0
        if event.key in self._bars:
            self._progress.remove_task(self._bars.pop(event.key))
        if self._total is not None:
            self._progress.advance(self._total)

    def _refresh(self, event: Event) -> None:
        left = self.remaining()
        text = "" if left is None else f"about {duration(left)} left"
        if self._total is not None:
            self._progress.update(self._total, left=text)
            return
        now = time.monotonic()
        if not self.quiet and event.kind != "started" and now - self._last_line >= LINE_EVERY:
            self._last_line = now
            done = sum(part >= 1 for part in self._part.values())
            label = self.labels.get(event.key, event.key[:12])
            self.console.print(escape(f"{done} of {len(self.jobs)} done, {text or 'estimating'}: {label}"))
