"""The worker process: reads jobs from stdin, writes events to what was its stdout, one JSON object a line.

It is started with the thread and device variables already set (`bench.executors.processes`), and nothing before
`main` imports torch. It ends when its stdin does: at once, so that no worker outlives the process it works for.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import queue
import signal
import sys
import threading
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from bench.errors import BenchError
from bench.executors.base import Event, Job, resolve, run_job


class _Stop(BaseException):
    """Raised in the main thread on SIGTERM: leave, running the `finally` blocks on the way."""


def _terminate(*_: object) -> NoReturn:
    raise _Stop


class _Channel:
    """Writes messages to the parent; any thread may."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "w", encoding="utf-8")
        self._lock = threading.Lock()

    def send(self, message: str, /, **content: Any) -> None:
        line = json.dumps({"type": message, **content}) + "\n"
        try:
            with self._lock:
                self._file.write(line)
                self._file.flush()
        except BrokenPipeError:
            # The parent is gone; nobody is left to tell.
            os._exit(1)

    def event(self, event: Event) -> None:
        self.send("event", **asdict(event))


class _Forward(logging.Handler):
    """Hands log records to the parent, whose handlers decide."""

    def __init__(self, channel: _Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        self._channel.send("log", name=record.name, level=record.levelno, text=record.getMessage())


def main() -> None:
    """Work until stdin ends."""
    # Before anything may print: stdout is the channel, so whatever libraries print goes to stderr.
    channel = _Channel(os.dup(1))
    os.dup2(2, 1)
    faulthandler.enable()
    # Ctrl-C is the parent's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        _serve(channel)
    except _Stop:
        # Buffers and threads of libraries have no say in how long this takes.
        os._exit(0)


def _serve(channel: _Channel) -> None:
    hello = json.loads(sys.stdin.readline())
    logging.basicConfig(level=hello["level"], handlers=[_Forward(channel)])
    jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
    busy = threading.Event()
    busy.set()
    threading.Thread(target=_read, args=(jobs, busy), daemon=True).start()
    try:
        work = resolve(hello["work"])
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(hello["threads"])
    except Exception as error:  # reported to the parent, which stops the run
        user = isinstance(error, BenchError)
        text = str(error) if user else f"{type(error).__name__}: {error}"
        channel.send("broken", text=text, user=user, traceback=traceback.format_exc())
        return
    channel.send("ready")
    while True:
        busy.clear()
        job = jobs.get()
        if job is None:
            return
        busy.set()
        run_job(work, Path(hello["manifest"]), job, hello["device"], channel.event)


def _read(jobs: queue.SimpleQueue[Job | None], busy: threading.Event) -> None:
    for line in sys.stdin:
        content = json.loads(line)
        jobs.put(Job(**{**content, "after": tuple(content["after"])}))
    if busy.is_set():
        # The parent is gone or gives up. The store survives this at any moment.
        os._exit(1)
    jobs.put(None)
