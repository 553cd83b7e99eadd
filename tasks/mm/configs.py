"""OpenMMLab configs: finding them offline, and reading from them what the adapters need.

A config is named by the path of a file, or by its short name among those packaged in mmdet / mmseg
(`ssd300_coco`, `pspnet_r50-d8_4xb2-40k_cityscapes-512x1024`) and those of this project (`segnet_basic_camvid`).
`mmengine.hub.get_config` is never used: it runs `pip install` when a distribution name is missing. mmengine, mmdet and
mmseg are imported only when needed.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.util
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import yaml
from torch import Tensor

from bench.errors import GridError

if TYPE_CHECKING:
    from mmengine.config import Config, ConfigDict

__all__ = ["InputSpec", "Package", "checkpoint_hint", "config_names", "digest", "find_config", "input_spec",
           "load_config", "model_config"]  # fmt: skip

Package = Literal["mmdet", "mmseg"]
_DISTRIBUTION = {"mmdet": "mmdet==3.3.0", "mmseg": "mmsegmentation==1.2.2"}
#: Configs of this project that take a checkpoint of the user's.
_OWN: dict[str, tuple[Path, ...]] = {
    "mmdet": (),
    "mmseg": (Path(__file__).parents[1] / "segmentation" / "configs" / "segnet_basic_camvid.py",),
}


# -- finding ----------------------------------------------------------------------------------------------------
def _config_root(package: Package) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise GridError(f"{package} is not installed: pip install {_DISTRIBUTION[package]}")
    return Path(next(iter(spec.submodule_search_locations))) / ".mim" / "configs"


@functools.lru_cache(maxsize=2)
def config_names(package: Package) -> Mapping[str, Path]:
    """The configs packaged in mmdet or mmseg: `name` (where unique) and `folder/name`, with their paths; and our own.

    Raises:
        GridError: the package is not installed.
    """
    root = _config_root(package)
    paths = sorted(p for p in root.glob("*/*.py") if p.parent.name != "_base_")
    stems: dict[str, list[Path]] = {}
    for path in paths:
        stems.setdefault(path.stem, []).append(path)
    found = {f"{path.parent.name}/{path.stem}": path for path in paths}
    found.update({stem: same[0] for stem, same in stems.items() if len(same) == 1})
    found.update({path.stem: path for path in _OWN[package]})
    return found


def find_config(package: Package, name: str) -> Path:
    """The file of a config given by path (anything that ends in `.py`) or by short name.

    Raises:
        GridError: there is no such file or name; names the nearest ones.
    """
    if name.endswith(".py"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise GridError(f"{package} config {path} does not exist")
        return path
    known = config_names(package)
    if name in known:
        return known[name]
    starting = [key for key in known if key.startswith(name)]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6) or starting[:3]
    hint = f"did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    more = f"{len(starting)} names start with it; " if len(starting) > 1 else ""
    raise GridError(
        f"unknown {package} config '{name}': {hint}{more}give the path of a .py file or one of the "
        f"{len(known)} names packaged in {package} ({_config_root(package)})"
    )


def load_config(package: Package, name: str) -> Config:
    """The parsed config, bases merged.

    Raises:
        GridError: the config is unknown, fails to parse or has no model.
    """
    from mmengine.config import Config

    path = find_config(package, name)
    try:
        config = Config.fromfile(path)
    except Exception as error:
        # A config is Python: anything can come out of it, and all of it is the file's fault.
        raise GridError(f"{package} config {path} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(config.get("model"), Mapping):
        raise GridError(f"{package} config {path} has no 'model'")
    return config


def checkpoint_hint(package: Package, name: str) -> str:
    """Where OpenMMLab publishes weights for a packaged config, for the message about a missing file."""
    path = Path(name) if name.endswith(".py") else find_config(package, name)
    if name.endswith(".py") or path in _OWN[package]:
        return f"train it with {package} or give the checkpoint that belongs to {path.name}"
    for metafile in (path.parent / "metafile.yml", path.parent / "metafile.yaml"):
        if not metafile.is_file():
            continue
        content = yaml.safe_load(metafile.read_text(encoding="utf-8"))
        models = content.get("Models", []) if isinstance(content, dict) else []
        for model in models:
            if str(model.get("Name")) == path.stem and model.get("Weights"):
                return f"download {model['Weights']} and put it there"
    return f"OpenMMLab publishes no weights under the name {path.stem}; put a checkpoint of this config there"


# -- the model --------------------------------------------------------------------------------------------------
_SYNC_BN = frozenset({"SyncBN", "MMSyncBN", "naiveSyncBN", "NaiveSyncBatchNorm2d", "SyncBatchNorm"})


def _type_name(node: Mapping[str, Any]) -> str:
    kind = node.get("type", "")
    return kind if isinstance(kind, str) else getattr(kind, "__name__", "")


def _is_download(init: Any) -> bool:
    return isinstance(init, Mapping) and _type_name(init).rsplit(".", 1)[-1] in (
        "Pretrained",
        "PretrainedInit",
    )


def _offline(node: Any) -> Any:
    """A copy without synchronised batch norm and without anything that fetches weights."""
    if isinstance(node, (list, tuple)):
        return type(node)(_offline(item) for item in node)
    if not isinstance(node, Mapping):
        return node
    clean: dict[str, Any] = {}
    for key, value in node.items():
        if key == "pretrained" and isinstance(value, (str, bool)):
            # A path or URL, or timm's "fetch it while building".
            clean[key] = False if isinstance(value, bool) else None
        elif key == "init_cfg" and _is_download(value):
            continue
        elif key == "init_cfg" and isinstance(value, (list, tuple)):
            clean[key] = [_offline(item) for item in value if not _is_download(item)]
        elif key == "type" and _type_name(node).rsplit(".", 1)[-1] in _SYNC_BN:
            clean[key] = "BN"  # the same arithmetic in one process, and it runs on a CPU
        else:
            clean[key] = _offline(value)
    return clean


def model_config(config: Config) -> ConfigDict:
    """The `model` part, ready to build anywhere: plain BN instead of SyncBN, nothing fetched."""
    from mmengine.config import ConfigDict

    raw = config.model.to_dict() if hasattr(config.model, "to_dict") else dict(config.model)
    # Networks read their settings by attribute, so nested parts must be ConfigDicts too.
    return ConfigDict(_offline(raw))


def digest(config: Config) -> str:
    """SHA-256 of what decides the model's output (model and test pipeline), independent of where the file lies."""
    content = {
        "model": model_config(config),
        "pipeline": [_offline(dict(step)) for step in _pipeline(config)],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> str:
    # Classes and functions, in configs of the lazy kind; never an address.
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"


# -- the input --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class InputSpec:
    """What a test pipeline does to an image between file and data preprocessor.

    Attributes:
        scale: (width, height) to resize to; None to keep the size.
        keep_ratio: fit inside `scale` instead of warping to it.
        scale_factor: (x, y) factors instead of `scale`.
        interpolation: mmcv's name of the filter.
        pad_size: (width, height) to pad to at the right and bottom, before normalisation.
        pad_divisor: pad to multiples of this, before normalisation.
        pad_square: pad the shorter side first.
        pad_value: 0..255, in the pipeline's channel order (BGR).
    """

    scale: tuple[int, int] | None = None
    keep_ratio: bool = False
    scale_factor: tuple[float, float] | None = None
    interpolation: str = "bilinear"
    pad_size: tuple[int, int] | None = None
    pad_divisor: int | None = None
    pad_square: bool = False
    pad_value: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def with_scale(self, scale: tuple[int, int]) -> InputSpec:
        """The same with another (width, height); a fixed padded size follows."""
        return replace(self, scale=scale, scale_factor=None, pad_size=scale if self.pad_size else None)

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) after resizing an image of `size` (height, width)."""
        height, width = size
        if self.scale_factor is not None:
            return int(height * self.scale_factor[1] + 0.5), int(width * self.scale_factor[0] + 0.5)
        if self.scale is None:
            return size
        if not self.keep_ratio:
            return self.scale[1], self.scale[0]
        # mmcv.rescale_size: the longer side fits the larger number, the shorter side the smaller one.
        factor = min(max(self.scale) / max(size), min(self.scale) / min(size))
        return int(height * factor + 0.5), int(width * factor + 0.5)

    def resize(self, image: Tensor) -> tuple[Tensor, tuple[float, float]]:
        """An image (3, H, W) in [0,1] resized as the pipeline does it (on 8-bit values), with its (y, x) factors."""
        size = (int(image.shape[-2]), int(image.shape[-1]))
        out = self.resized(size)
        if out == size:
            return image, (1.0, 1.0)
        import mmcv

        pixels = np.ascontiguousarray(
            (image * 255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
        )
        small = mmcv.imresize(pixels, (out[1], out[0]), interpolation=self.interpolation, backend="cv2")
        resized = torch.from_numpy(np.ascontiguousarray(small)).permute(2, 0, 1).to(image) / 255
        return resized, (out[0] / size[0], out[1] / size[1])

    def padding(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows below and columns to the right that the pipeline adds to an image of `size` (height, width)."""
        height, width = size
        if self.pad_square:
            height = width = max(height, width)
        if self.pad_size is not None:
            height, width = max(height, self.pad_size[1]), max(width, self.pad_size[0])
        if self.pad_divisor is not None:
            height = math.ceil(height / self.pad_divisor) * self.pad_divisor
            width = math.ceil(width / self.pad_divisor) * self.pad_divisor
        return height - size[0], width - size[1]

    def pad(self, image: Tensor) -> Tensor:
        """An image (3, H, W) of 0..255 in the pipeline's channel order, padded; differentiable."""
        rows, columns = self.padding((int(image.shape[-2]), int(image.shape[-1])))
        if not rows and not columns:
            return image
        fill = torch.tensor(self.pad_value, dtype=image.dtype, device=image.device).view(3, 1, 1)
        # Padding the difference keeps one value per channel.
        return torch.nn.functional.pad(image - fill, (0, columns, 0, rows)) + fill

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, for keys."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}


def _datasets(node: Any) -> Iterator[Mapping[str, Any]]:
    while isinstance(node, Mapping):
        yield node
        inner = node.get("dataset", node.get("datasets"))
        node = inner[0] if isinstance(inner, (list, tuple)) and inner else inner


def _pipeline(config: Config) -> Sequence[Mapping[str, Any]]:
    loader = config.get("test_dataloader") or {}
    for dataset in _datasets(loader.get("dataset")):
        if dataset.get("pipeline"):
            return list(dataset["pipeline"])
    return list(config.get("test_pipeline") or [])


_IGNORED = frozenset(
    {"LoadAnnotations", "PackDetInputs", "PackSegInputs", "LoadPanopticAnnotations", "GetInstance"}
)


def input_spec(config: Config, name: str = "config") -> InputSpec:
    """What the config's test pipeline does to an image.

    Args:
        config: a parsed config.
        name: what to call it in messages.

    Raises:
        GridError: the pipeline holds a step that the adapters do not follow.
    """
    spec = InputSpec()
    steps = _pipeline(config)
    if not steps:
        raise GridError(f"{name} has no test pipeline, so the size and padding of its input are unknown")
    for step in steps:
        kind = _type_name(step).rsplit(".", 1)[-1]
        if kind == "LoadImageFromFile":
            if step.get("color_type", "color") != "color":
                raise GridError(
                    f"{name}: test pipeline loads color_type={step['color_type']!r}, expected 'color'"
                )
        elif kind == "Resize":
            spec = _read_resize(spec, step, name)
        elif kind == "Pad":
            spec = _read_pad(spec, step, name)
        elif kind not in _IGNORED:
            raise GridError(
                f"{name}: test pipeline step '{kind}' is not supported (supported: LoadImageFromFile, Resize, Pad, "
                "LoadAnnotations, Pack*Inputs)"
            )
    return spec


def _read_resize(spec: InputSpec, step: Mapping[str, Any], name: str) -> InputSpec:
    factor = step.get("scale_factor")
    scale = step.get("scale")
    if factor is not None:
        x, y = (factor, factor) if isinstance(factor, (int, float)) else factor
        pair = (float(x), float(y))
        return replace(spec, scale_factor=pair, interpolation=step.get("interpolation", "bilinear"))
    if isinstance(scale, int):
        scale = (scale, scale)
    if not isinstance(scale, (list, tuple)) or len(scale) != 2 or not all(isinstance(v, int) for v in scale):
        raise GridError(f"{name}: Resize in the test pipeline has scale={scale!r}, expected (width, height)")
    return replace(
        spec,
        scale=(int(scale[0]), int(scale[1])),
        keep_ratio=bool(step.get("keep_ratio", False)),
        interpolation=step.get("interpolation", "bilinear"),
    )


def _read_pad(spec: InputSpec, step: Mapping[str, Any], name: str) -> InputSpec:
    value = step.get("pad_val", 0)
    if isinstance(value, Mapping):
        value = value.get("img", 0)
    values = [value] * 3 if isinstance(value, (int, float)) else list(value)
    if step.get("padding_mode", "constant") != "constant" or len(values) != 3:
        raise GridError(f"{name}: Pad in the test pipeline must pad with one constant per channel")
    size = step.get("size")
    if isinstance(size, int):
        size = (size, size)
    return replace(
        spec,
        pad_size=tuple(size) if size else None,
        pad_divisor=step.get("size_divisor"),
        pad_square=bool(step.get("pad_to_square", False)),
        pad_value=(float(values[0]), float(values[1]), float(values[2])),
    )
