"""Freed memory stays with a process that will want it again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.memory import keep_freed

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import resource, torch
from bench.memory import keep_freed
assert keep_freed()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for step in range(60):
    if step == 20:
        before = faults()
    tensors = [torch.full((1 << 20,), 1.0) for _ in range(3)]
    del tensors
print(faults() - before)
"""


@pytest.mark.skipif(not keep_freed(), reason="the C library is not glibc")
def test_steps_ask_the_system_for_no_memory() -> None:
    # In a process of its own: what ran here before has shaped the heap.
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    # 40 steps of three tensors of 1024 pages.
    assert int(out.stdout) < 2000
