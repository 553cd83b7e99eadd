"""Classifiers by id: RobustBench, timm and torchvision build the network, a local file gives the weights.

Nothing is downloaded. Weights are the file named by `weights:`, else the library's own cached file where it has one;
when neither exists, one line says which file is wanted and where it comes from. In a grid `robustbench:NAME` is short
for `{name: robustbench, id: NAME}`, and likewise for the others.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import sys
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from PIL import Image
from torch import Tensor, nn

from bench.errors import GridError, WeightsError, unknown
from bench.protocols import ModelSource
from bench.registry import MODELS
from bench.weights import apply_state, load_state, sha256_file
from tasks.classification.model import LogitsClassifier, Preparation

__all__ = ["RobustBench", "Timm", "Torchvision"]


class _Zoo(ModelSource):
    """A network of a library's model zoo with weights from files."""

    task = "classification"
    id: str
    weights: str | None
    origin: str | None = None

    @abstractmethod
    def _check_id(self) -> None:
        """Raise GridError, naming the nearest, when the library has no such model."""

    @abstractmethod
    def _wanted(self) -> tuple[Path, str]:
        """Where the library would keep the weights, and where they come from."""

    @abstractmethod
    def _build(self) -> tuple[nn.Module, int]:
        """The network without weights, and its number of classes."""

    def _cached(self) -> Sequence[Path]:
        """The weights files to use when `weights` is not given."""
        return [self._wanted()[0]]

    def _files(self) -> list[Path]:
        files = [Path(self.weights).expanduser()] if self.weights else list(self._cached())
        for file in files:
            if not file.is_file():
                self._check_id()
                where, source = self._wanted()
                place = "" if self.weights else " or name the file with weights:"
                wanted = file if self.weights else where
                get = f"get it from {source}" if self.origin is None else f"it is {self.origin}: make it"
                raise WeightsError(
                    f"model {self._label()}: weights file {wanted} does not exist; {get} and put it "
                    f"there{place}; without it use an embedded model (mini_vgg, mini_resnet, mini_wrn)"
                )
        return files

    def _label(self) -> str:
        return f"{getattr(self, 'name', type(self).__name__.lower())}:{self.id}"

    def _digest(self) -> dict[str, Any]:
        digests = [sha256_file(file) for file in self._files()]
        return {"sha256": digests[0] if len(digests) == 1 else digests}

    def _state(self) -> dict[str, Tensor]:
        return load_state(self._files()[0]).state


# -- RobustBench --------------------------------------------------------------------------------------------------
@MODELS.register_module(name="robustbench")
class RobustBench(_Zoo):
    """A model of the RobustBench zoo (Croce et al. 2021), e.g. `robustbench:Carmon2019Unlabeled`.

    Adversarially trained baselines of the papers' tables: AT is `Engstrom2019Robustness`, TRADES is
    `Zhang2019Theoretically`. Free has no checkpoint here: `Wong2020Fast` is the nearest.

    Args:
        id: name on the leaderboard.
        dataset: what it was trained on.
        threat: leaderboard it belongs to.
        weights: its checkpoint as RobustBench publishes it; by default RobustBench's own place for it,
            `models/<dataset>/<threat>/<id>.pt`, under the folder that BENCH_WEIGHTS names or else the current one.
    """

    def __init__(
        self,
        id: str,
        dataset: Literal["cifar10", "cifar100", "imagenet"] = "cifar10",
        threat: Literal["Linf", "L2", "corruptions"] = "Linf",
        weights: str | None = None,
    ) -> None:
        self.id = id
        self.dataset = dataset
        self.threat = threat
        self.weights = weights

    def identity(self) -> dict[str, Any]:
        """Zoo, id, leaderboard and weights."""
        return {
            "source": "robustbench", "id": self.id, "dataset": self.dataset, "threat": self.threat, **self._digest(),
        }  # fmt: skip

    def input_spec(self) -> dict[str, Any]:
        """Resizing and cropping for ImageNet models; CIFAR models take 32x32 as it is."""
        return dict(self._preparation.spec)

    def load(self, device: torch.device) -> LogitsClassifier:
        """The network with its own normalisation inside."""
        path = self._files()[0]
        network, num_classes = self._build()
        state = _like_robustbench(load_state(path).state, network)
        if "Swin" in self.id:
            state = _renamed_swin(state, network)
        apply_state(network, state, what=f"model {self._label()}, weights file {path}")
        preparation = self._preparation
        return LogitsClassifier(
            network, num_classes, preparation=preparation, fixed_size=preparation.size
        ).to(device)

    def _check_id(self) -> None:
        self._entry()

    def _zoo(self) -> Mapping[str, Mapping[str, Any]]:
        with _robustbench():
            from robustbench.model_zoo import model_dicts
            from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
        boards = model_dicts[BenchmarkDataset(self.dataset)]
        if ThreatModel(self.threat) not in boards:
            raise GridError(
                f"model {self._label()}: RobustBench has no {self.threat} models for {self.dataset}"
            )
        zoo: Mapping[str, Mapping[str, Any]] = boards[ThreatModel(self.threat)]
        return zoo

    def _entry(self) -> Mapping[str, Any]:
        zoo = self._zoo()
        if self.id not in zoo:
            raise GridError(unknown(f"RobustBench model ({self.dataset}, {self.threat})", self.id, zoo))
        return zoo[self.id]

    def _wanted(self) -> tuple[Path, str]:
        root = Path(os.environ.get("BENCH_WEIGHTS") or ".").expanduser() / "models"
        source = self._entry()["gdrive_id"]
        where = (
            f"Google Drive (file {source})"
            if isinstance(source, str) and source
            else "RobustBench's model zoo"
        )
        return root / self.dataset / self.threat / f"{self.id}.pt", where

    def _cached(self) -> Sequence[Path]:
        root = Path(os.environ.get("BENCH_WEIGHTS") or ".").expanduser() / "models"
        return [root / self.dataset / self.threat / f"{self.id}.pt"]

    def _build(self) -> tuple[nn.Module, int]:
        entry = self._entry()
        if isinstance(entry["gdrive_id"], list):
            raise WeightsError(
                f"model {self._label()} is made of several checkpoints, which is not supported"
            )
        if entry["gdrive_id"] == "":
            raise WeightsError(
                f"model {self._label()} is torchvision's own: use {{name: torchvision, id: resnet50}}"
            )
        with _robustbench(), _without_fetching():
            network: nn.Module = entry["model"]()
        return network, {"cifar10": 10, "cifar100": 100, "imagenet": 1000}[self.dataset]

    @functools.cached_property
    def _preparation(self) -> Preparation:
        if self.dataset != "imagenet":
            return Preparation(spec={"size": [32, 32]}, size=(32, 32))
        entry = self._entry()
        with _robustbench():
            from robustbench.data import get_preprocessing
            from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
        name = entry.get("preprocessing")
        if name is None:
            return self._as_timm_says()
        steps = get_preprocessing(BenchmarkDataset.imagenet, ThreatModel(self.threat), None, name).transforms
        return _from_transforms(steps)

    def _as_timm_says(self) -> Preparation:
        """For the models that RobustBench registers with timm; as `robustbench.data` reads it from the network."""
        from torchvision.transforms import CenterCrop, InterpolationMode, Resize

        network, _ = self._build()
        inner = network.get_submodule("model") if isinstance(network, nn.Sequential) else network
        config = cast("Mapping[str, Any]", inner.default_cfg)
        size = int(config["input_size"][1])
        larger = math.floor(size / config["crop_pct"])
        return _from_transforms(
            [Resize(larger, InterpolationMode(config["interpolation"])), CenterCrop(size)]
        )


@contextmanager
def _robustbench() -> Iterator[None]:
    """Lets RobustBench be imported: it wants `autoattack`, which PyPI has as `pyautoattack`."""
    if "autoattack" not in sys.modules and importlib.util.find_spec("autoattack") is None:
        try:
            import pyautoattack
            import pyautoattack.state
        except ImportError as error:
            raise WeightsError(f"RobustBench needs pyautoattack: {error}; pip install pyautoattack") from None
        sys.modules["autoattack"] = pyautoattack
        sys.modules["autoattack.state"] = pyautoattack.state
    try:
        with warnings.catch_warnings():
            # Of its import; it says nothing about what is asked for.
            warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
            yield
    except ImportError as error:
        raise WeightsError(
            f"RobustBench cannot be imported: {error}; pip install 'robustbench==1.1.1' 'setuptools<81'"
        ) from None


@contextmanager
def _without_fetching() -> Iterator[None]:
    """Networks that RobustBench's zoo takes from timm are built without pretrained weights."""
    import timm

    create = timm.create_model

    def create_model(*args: Any, **kwargs: Any) -> nn.Module:
        kwargs["pretrained"] = False
        network: nn.Module = create(*args, **kwargs)
        return network

    timm.create_model = create_model
    try:
        yield
    finally:
        timm.create_model = create


def _like_robustbench(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """A published state with names as `network` has them, by the rules of `robustbench.utils.load_model`.

    Prefixes `module.` and `model.` are dropped, `model.` is put back for networks inside a normalisation layer,
    normalisation constants that old checkpoints lack come from the code, and entries of layers that inference does
    not use are left out.
    """
    wanted = network.state_dict()
    bare = {name.removeprefix("module.").removeprefix("model."): value for name, value in state.items()}
    inside = {f"model.{name}": value for name, value in bare.items()}
    named = max((bare, inside), key=lambda s: len(wanted.keys() & s.keys()))
    named = {
        name: value
        for name, value in named.items()
        if not (name.startswith("model_preact_hl1.") or name.endswith(".scores")) or name in wanted
    }
    for name, value in network.named_buffers():
        if name.rsplit(".", 1)[-1] in ("mu", "sigma", "mean", "std") and name not in named:
            named[name] = value
    return named


def _renamed_swin(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Older timm numbered Swin's downsampling layers differently."""
    if state.keys() == network.state_dict().keys():
        return state
    from timm.models.swin_transformer import checkpoint_filter_fn

    prefix = "model." if all(name.startswith(("model.", "normalize.")) for name in state) else ""
    inner = network.model if prefix else network
    body = {name.removeprefix(prefix): v for name, v in state.items() if not name.startswith("normalize.")}
    rest = {name: v for name, v in state.items() if name.startswith("normalize.")}
    try:
        return rest | {prefix + name: v for name, v in checkpoint_filter_fn(body, inner).items()}
    except (KeyError, AttributeError, RuntimeError):
        # Not a Swin checkpoint at all: the comparison of names says so better.
        return state


# -- timm ---------------------------------------------------------------------------------------------------------
@MODELS.register_module(name="timm")
class Timm(_Zoo):
    """A classifier of timm, e.g. `{name: timm, id: resnet18.a1_in1k, weights: resnet18.safetensors}`.

    Args:
        id: architecture, with the tag of its pretrained weights after a dot.
        weights: its state as timm publishes or saves it; by default the copy in the Hugging Face or torch hub cache.
        num_classes: when it differs from the pretrained model's.
        resize: resize and crop images as the pretrained model expects; false takes the dataset's images as they are.
        origin: what the weights are, said when they are missing; None = the published ones.
    """

    def __init__(
        self,
        id: str,
        weights: str | None = None,
        num_classes: int | None = None,
        resize: bool = True,
        origin: str | None = None,
    ) -> None:
        self.id = id
        self.weights = weights
        self.num_classes = num_classes
        self.resize = resize
        self.origin = origin

    def identity(self) -> dict[str, Any]:
        """Library, id, classes and weights."""
        return {"source": "timm", "id": self.id, "num_classes": self.num_classes, **self._digest()}

    def input_spec(self) -> dict[str, Any]:
        """Resizing and cropping from timm's data config."""
        return dict(self._preparation.spec)

    def load(self, device: torch.device) -> LogitsClassifier:
        """The network with timm's normalisation in front."""
        path = self._files()[0]
        network, num_classes = self._build()
        apply_state(network, load_state(path).state, what=f"model {self._label()}, weights file {path}")
        config = self._data_config()
        size = tuple(config["input_size"][-2:]) if self._fixed() else None
        return LogitsClassifier(
            network, num_classes, mean=config["mean"], std=config["std"], preparation=self._preparation,
            fixed_size=size,
        ).to(device)  # fmt: skip

    def _check_id(self) -> None:
        import timm

        architecture, _, tag = self.id.partition(".")
        if not timm.is_model(architecture):
            raise GridError(unknown("timm model", self.id, timm.list_models()))
        if tag and self.id not in timm.list_pretrained(f"{architecture}.*"):
            raise GridError(
                unknown(f"pretrained timm {architecture}", self.id, timm.list_pretrained(f"{architecture}.*"))
            )

    def _pretrained(self) -> Any:
        import timm

        self._check_id()
        found = timm.get_pretrained_cfg(self.id, allow_unregistered=True)
        if found is None:
            raise GridError(f"model {self._label()}: timm has no data configuration for it")
        return found

    def _fixed(self) -> bool:
        return bool(self._pretrained().fixed_input_size)

    def _data_config(self) -> dict[str, Any]:
        from timm.data import resolve_data_config

        config: dict[str, Any] = resolve_data_config(pretrained_cfg=self._pretrained().to_dict())
        return config

    @functools.cached_property
    def _preparation(self) -> Preparation:
        if not self.resize:
            return Preparation()
        from timm.data import create_transform

        config = self._data_config()
        # crop_mode as in timm's own validation; its last steps make a normalised tensor, which is not ours to do.
        steps = create_transform(**config, is_training=False).transforms
        spec = {k: config[k] for k in ("input_size", "interpolation", "crop_pct", "crop_mode")}
        return Preparation(
            _chain([s for s in steps if type(s).__name__ not in ("ToTensor", "MaybeToTensor", "Normalize")]),
            {key: list(value) if isinstance(value, tuple) else value for key, value in spec.items()},
            tuple(config["input_size"][-2:]),
        )

    def _hub(self) -> tuple[str | None, str | None]:
        config = self._pretrained()
        return config.hf_hub_id, config.url

    def _cached(self) -> Sequence[Path]:
        hub, url = self._hub()
        found: list[Path] = []
        if hub:
            from huggingface_hub import try_to_load_from_cache

            for name in ("model.safetensors", "pytorch_model.bin"):
                path = try_to_load_from_cache(hub, name)
                if isinstance(path, str):
                    found.append(Path(path))
        if url:
            found.append(_hub_file(url))
        return [next((path for path in found if path.is_file()), self._wanted()[0])]

    def _wanted(self) -> tuple[Path, str]:
        hub, url = self._hub()
        if url:
            return _hub_file(url), url
        if hub:
            return Path(f"{self.id}.safetensors"), f"the Hugging Face repository {hub} (model.safetensors)"
        return Path(f"{self.id}.safetensors"), "your own training: timm publishes no weights for it"

    def _build(self) -> tuple[nn.Module, int]:
        import timm

        classes = self.num_classes or self._pretrained().num_classes
        network: nn.Module = timm.create_model(self.id, pretrained=False, num_classes=classes)
        return network, int(classes)


# -- torchvision --------------------------------------------------------------------------------------------------
#: What torchvision's builders set when they load pretrained weights.
_AS_PRETRAINED: dict[str, dict[str, Any]] = {
    "inception_v3": {"transform_input": True, "init_weights": False},
    "googlenet": {"transform_input": True, "init_weights": False},
}


@MODELS.register_module(name="torchvision")
class Torchvision(_Zoo):
    """An ImageNet classifier of torchvision, e.g. `{name: torchvision, id: resnet50, weights: resnet50.pth}`.

    Args:
        id: the builder's name.
        variant: which published weights they are (`IMAGENET1K_V1`), which decides how images are resized;
            by default torchvision's own default.
        weights: the file torchvision publishes, or a state dictionary; by default the copy in the torch hub cache.
        num_classes: when it differs from 1000.
        resize: resize and crop images as the published weights expect; false takes the dataset's images as they are.
    """

    def __init__(
        self,
        id: str,
        variant: str | None = None,
        weights: str | None = None,
        num_classes: int = 1000,
        resize: bool = True,
    ) -> None:
        self.id = id
        self.variant = variant
        self.weights = weights
        self.num_classes = num_classes
        self.resize = resize

    def identity(self) -> dict[str, Any]:
        """Library, id, classes and weights."""
        return {"source": "torchvision", "id": self.id, "num_classes": self.num_classes, **self._digest()}

    def input_spec(self) -> dict[str, Any]:
        """Resizing and cropping of the published weights."""
        return dict(self._preparation.spec)

    def load(self, device: torch.device) -> LogitsClassifier:
        """The network with the published normalisation in front."""
        path = self._files()[0]
        network, num_classes = self._build()
        apply_state(network, load_state(path).state, what=f"model {self._label()}, weights file {path}")
        preset = self._published().transforms()
        # These compute position embeddings for one size only.
        fixed = (preset.crop_size[0],) * 2 if self.id.startswith(("vit_", "maxvit")) else None
        return LogitsClassifier(
            network,
            num_classes,
            mean=preset.mean,
            std=preset.std,
            preparation=self._preparation,
            fixed_size=fixed,
        ).to(device)

    def _check_id(self) -> None:
        from torchvision import models

        known = models.list_models(module=models)
        if self.id not in known:
            raise GridError(unknown("torchvision classifier", self.id, known))

    def _published(self) -> Any:
        from torchvision import models

        self._check_id()
        listed = models.get_model_weights(self.id)
        if self.variant is None:
            return listed.DEFAULT
        if self.variant not in listed.__members__:
            raise GridError(unknown(f"variant of torchvision {self.id}", self.variant, listed.__members__))
        return listed[self.variant]

    @functools.cached_property
    def _preparation(self) -> Preparation:
        if not self.resize:
            return Preparation()
        preset = self._published().transforms()
        size = (preset.crop_size[0], preset.crop_size[0])

        def transform(image: Image.Image) -> Image.Image:
            from torchvision.transforms.functional import center_crop, resize

            small = resize(
                image, preset.resize_size, interpolation=preset.interpolation, antialias=preset.antialias
            )
            cropped: Image.Image = center_crop(small, preset.crop_size)
            return cropped

        spec = {
            "resize": preset.resize_size[0],
            "interpolation": preset.interpolation.value,
            "crop": list(size),
        }
        return Preparation(transform, spec, size)

    def _wanted(self) -> tuple[Path, str]:
        url = self._published().url
        return _hub_file(url), url

    def _build(self) -> tuple[nn.Module, int]:
        from torchvision import models

        self._check_id()
        extra = _AS_PRETRAINED.get(self.id, {})
        network: nn.Module = models.get_model(self.id, weights=None, num_classes=self.num_classes, **extra)
        return network, self.num_classes


# -- helpers ------------------------------------------------------------------------------------------------------
def _hub_file(url: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]


def _chain(steps: Sequence[Callable[[Image.Image], Image.Image]]) -> Callable[[Image.Image], Image.Image]:
    def transform(image: Image.Image) -> Image.Image:
        for step in steps:
            image = step(image)
        return image

    return transform


def _from_transforms(steps: Sequence[Any]) -> Preparation:
    """A preparation from torchvision transforms that end in ToTensor."""
    kept = [step for step in steps if type(step).__name__ != "ToTensor"]
    spec: dict[str, Any] = {}
    size: tuple[int, int] | None = None
    for step in kept:
        if type(step).__name__ == "Resize":
            spec |= {"resize": step.size, "interpolation": step.interpolation.value}
            size = tuple(step.size) if isinstance(step.size, (list, tuple)) and len(step.size) == 2 else None
        elif type(step).__name__ == "CenterCrop":
            size = (int(step.size[0]), int(step.size[1]))
            spec["crop"] = list(size)
    return Preparation(_chain(kept), spec, size)
