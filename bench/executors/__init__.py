"""Where jobs run: in this process, or in one process per device or worker. The results are the same.

A new kind (a cluster) is a subclass of `Executor` whose workers call `bench.executors.base.run_job`, and a line in
`EXECUTORS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from bench.errors import GridError, unknown
from bench.executors.base import Event, Executor, Job

__all__ = ["EXECUTORS", "Event", "Executor", "Job", "create_executor"]

EXECUTORS = {
    "inprocess": "bench.executors.inprocess:InProcessExecutor",
    "processes": "bench.executors.processes:ProcessExecutor",
}
"""Name -> `module:class`, imported when asked for."""


def create_executor(
    name: str, workers: int = 1, devices: Sequence[str] = ("cpu",), work: str = "bench.runner:work"
) -> Executor:
    """The executor called `name`.

    Args:
        name: a key of EXECUTORS.
        workers: processes per device.
        devices: device names such as "cpu", "cuda:0".
        work: `module:function` that does one job, see `bench.executors.base.Work`.

    Raises:
        GridError: there is no such executor, or a number or device is wrong.
    """
    if name not in EXECUTORS:
        raise GridError(unknown("executor", name, EXECUTORS))
    if workers < 1:
        raise GridError(f"workers: expected at least 1, got {workers}")
    if not devices:
        raise GridError("devices: expected at least one, such as cpu or cuda:0")
    module, _, attribute = EXECUTORS[name].partition(":")
    made: Executor = getattr(importlib.import_module(module), attribute)(work, workers, tuple(devices))
    return made
