"""What the detection and segmentation adapters share: a frozen mmdet or mmseg network behind [0,1] RGB images.

Everything from the image to the network stays inside autograd: [0,1] RGB, to 0..255 in the channel order that the
config's pipeline loads (BGR), padded as the pipeline pads, then through the network's own data preprocessor, which
turns BGR into RGB where the config says so, normalises and pads again.
"""

from __future__ import annotations

import functools
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bench.errors import GridError, WeightsError, unknown
from bench.protocols import Geometry, ModelSource, Sample, TargetModel
from bench.weights import sha256_file
from tasks.microbatch import default_size, micro_batches
from tasks.mm import ops
from tasks.mm.checkpoints import load_into
from tasks.mm.configs import (
    InputSpec,
    Package,
    checkpoint_hint,
    digest,
    find_config,
    input_spec,
    load_config,
    model_config,
)

__all__ = ["MiniSource", "OpenMMLabModel", "OpenMMLabSource", "build_network", "moved", "seeded"]


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run with torch's global streams at `seed`, and put them back afterwards.

    For code of mmdet that draws from the global stream, such as the samplers of Mask R-CNN.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed % (1 << 63))
        yield


def build_network(package: Package, config: Any, name: str) -> nn.Module:
    """The network of a parsed config, with random weights, frozen and in evaluation mode, on the CPU.

    Args:
        package: mmdet or mmseg.
        config: the parsed config.
        name: what to call it in messages.

    Raises:
        GridError: the package cannot build it.
    """
    ops.install()
    from mmengine.registry import DefaultScope

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both packages warn about each other's missing extras at import
        if package == "mmdet":
            import mmdet.models  # noqa: F401 - registers
            from mmdet.registry import MODELS
        else:
            import mmseg.models  # noqa: F401 - registers
            from mmseg.registry import MODELS
        try:
            # The scope decides where nested parts are looked up; another package may have left its own.
            with DefaultScope.overwrite_default_scope(package):
                network = MODELS.build(model_config(config))
        except Exception as error:
            # A registry builds anything a config asks for, so anything may be raised: all of it is the config's fault.
            reason = str(error).strip().splitlines()
            raise GridError(
                f"{package} cannot build the model of {name}: {type(error).__name__}: {reason[0] if reason else ''}"
            ) from error
    if not isinstance(network, nn.Module) or not hasattr(network, "data_preprocessor"):
        raise GridError(
            f"the model of {name} is a {type(network).__name__}, expected a detector or segmenter"
        )
    network.requires_grad_(False)
    return network.eval()


class OpenMMLabModel(TargetModel):
    """A frozen network of mmdet or mmseg.

    Args:
        network: as `build_network` makes it, with weights.
        spec: what happens to an image before the data preprocessor.
        num_classes: number of classes it predicts.

    Attributes:
        micro_batch: images per call where images can be taken together (see `tasks.microbatch`); None = the device's
            safe default.
    """

    micro_batch: int | None = None

    def __init__(self, network: nn.Module, spec: InputSpec, num_classes: int) -> None:
        super().__init__()
        self.network: Any = network
        self.spec = spec
        self.num_classes = num_classes
        self.requires_grad_(False)
        self.eval()

    def to(self, *args: Any, **kwargs: Any) -> OpenMMLabModel:
        """Moves the network through mmengine's own `to`, which also tells the data preprocessor where it is."""
        self.network.to(*args, **kwargs)
        super().to(*args, **kwargs)
        return self

    def train(self, mode: bool = True) -> OpenMMLabModel:
        """Stays in evaluation mode, whatever is asked: a target is frozen."""
        super().train(False)
        return self

    def prepare(self, sample: Sample) -> Sample:
        """The image resized as the config's test pipeline does it; the ground truth follows."""
        image, scale = self.spec.resize(sample.image)
        return Sample(image, self.resize_target(sample.target, scale), sample.id)

    @abstractmethod
    def resize_target(self, target: Any, scale: tuple[float, float]) -> Any:
        """Ground truth of an image that was resized by (y, x) factors."""

    def pixels(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) in [0,1] as the data preprocessor takes them: 0..255, BGR, padded; differentiable."""
        return [self.spec.pad(image.flip(0) * 255) for image in images]

    def collate(self, images: Tensor, samples: Sequence[Any]) -> tuple[Tensor, list[Any]]:
        """Network input (B, 3, H', W') for images in [0,1], and copies of the samples that know their padded shape.

        Differentiable. `training=False` in the data preprocessor: no batch augmentation, and padding as in inference.
        """
        data = self.network.data_preprocessor(
            {"inputs": self.pixels(images), "data_samples": list(samples)}, False
        )
        return data["inputs"], list(data["data_samples"])

    def preprocess(self, images: Tensor, samples: Sequence[Any]) -> Tensor:
        """The network input of `collate` alone."""
        return self.collate(images, samples)[0]

    def padded_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) after the pipeline's own padding; the data preprocessor may pad further."""
        rows, columns = self.spec.padding(size)
        return size[0] + rows, size[1] + columns

    def new_samples(self, images: Tensor) -> list[Any]:
        """One data sample of the package for each image, with its sizes and no ground truth."""
        size = self.padded_size((int(images.shape[-2]), int(images.shape[-1])))
        shapes = {"img_shape": size, "ori_shape": size, "pad_shape": size, "scale_factor": (1.0, 1.0)}
        return [self.new_sample({**shapes, "img_id": index}) for index in range(len(images))]

    @abstractmethod
    def new_sample(self, metainfo: dict[str, Any]) -> Any:
        """An empty data sample of the package."""

    def features(self, images: Tensor, layer: str) -> Tensor:
        """Output of module `layer` of the network (such as `backbone.layer2`), (B, C, ...).

        A module that returns several maps (`backbone`, `neck`) gives the activations of all of them, (B, N).

        Raises:
            GridError: no such layer, it is not run, or it does not return tensors with a row per image.
        """
        modules = {name: module for name, module in self.network.named_modules() if name}
        if layer not in modules:
            raise GridError(unknown(f"layer of {type(self.network).__name__}", layer, modules))

        def run(group: Tensor) -> Tensor:
            seen: list[Any] = []
            hook = modules[layer].register_forward_hook(
                lambda _module, _inputs, out: seen.append(_copied(out))
            )
            try:
                self.run_up_to(layer, self.preprocess(group, self.new_samples(group)))
            finally:
                hook.remove()
            if not seen:
                raise GridError(f"layer '{layer}' of {type(self.network).__name__} is not run for features")
            maps = [seen[-1]] if isinstance(seen[-1], Tensor) else seen[-1]
            if not isinstance(maps, list) or not all(
                isinstance(x, Tensor) and len(x) == len(group) for x in maps
            ):
                raise GridError(
                    f"layer '{layer}' of {type(self.network).__name__} does not return one row per image"
                )
            return maps[0] if len(maps) == 1 else torch.cat([x.flatten(1) for x in maps], 1)

        return micro_batches(run, images, self.micro_batch or default_size(images.device)).float()

    def run_up_to(self, layer: str, inputs: Tensor) -> None:
        """Run the part of the network that contains `layer` on preprocessed images; its output is not needed."""
        self.network.extract_feat(inputs)


def _copied(out: Any) -> Any:
    # At once: an in-place ReLU after the layer would overwrite what it returned.
    if isinstance(out, list | tuple):
        return [_copied(x) for x in out]
    return out.clone() if isinstance(out, Tensor) else out


def moved(geometry: Geometry | None, index: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """(y, x) scale and offset of image `index`; the identity without a geometry."""
    if geometry is None:
        return (1.0, 1.0), (0.0, 0.0)
    (sy, sx), (oy, ox) = geometry.scale[index].tolist(), geometry.offset[index].tolist()
    return (sy, sx), (oy, ox)


class OpenMMLabSource(ModelSource):
    """A config of mmdet or mmseg and the checkpoint that belongs to it.

    Attributes:
        package: mmdet or mmseg.
        adapter: the target model class its network is put behind.
        config: path of a config file, or short name of a packaged one.
        checkpoint: path of the weights.
        scale: (width, height) instead of the one in the test pipeline.
        weights_sha256: digest the weights must have, where it is known.
        origin: what the checkpoint is, said when it is missing; None = the one published for the config.
    """

    package: ClassVar[Package]
    adapter: ClassVar[type[OpenMMLabModel]]
    config: str
    checkpoint: Path
    scale: tuple[int, int] | None = None
    weights_sha256: str | None = None
    origin: str | None = None

    def identity(self) -> dict[str, Any]:
        """Config's name and digest, and the weights' SHA-256."""
        return {
            "package": self.package,
            "config": find_config(self.package, self.config).stem,
            "config_sha256": self._digest,
            "weights_sha256": self._weights_digest(),
        }

    def input_spec(self) -> dict[str, Any]:
        """Resizing and padding of the test pipeline."""
        return self._input.as_dict()

    def load(self, device: torch.device) -> TargetModel:
        """The frozen model on `device`.

        Raises:
            GridError: the config is unknown or cannot be built.
            WeightsError: the checkpoint is missing, unsafe, damaged or of another model.
        """
        network = build_network(self.package, self._parsed, f"config {self.config}")
        self._weights_digest()
        load_into(network, self.checkpoint, what=f"model of {self.config}", hint=self._hint())
        return self.adapter(network, self._input, self.classes(network)).to(device)

    def classes(self, network: nn.Module) -> int:
        """Number of classes the network predicts."""
        raise NotImplementedError(f"{type(self).__name__} does not know its number of classes")

    # A plan asks every cell for its model's identity: the config is read once.
    @functools.cached_property
    def _parsed(self) -> Any:
        return load_config(self.package, self.config)

    @functools.cached_property
    def _digest(self) -> str:
        return digest(self._parsed)

    @functools.cached_property
    def _input(self) -> InputSpec:
        return self._spec(self._parsed)

    def _spec(self, parsed: Any) -> InputSpec:
        spec = input_spec(parsed, f"config {self.config}")
        return spec.with_scale(self.scale) if self.scale is not None else spec

    def _hint(self) -> str:
        return checkpoint_hint(self.package, self.config) if self.origin is None else f"it is {self.origin}"

    def _weights_digest(self) -> str:
        if not self.checkpoint.is_file():
            raise WeightsError(f"weights file {self.checkpoint} does not exist: {self._hint()}")
        found = sha256_file(self.checkpoint)
        if self.weights_sha256 is not None and found != self.weights_sha256:
            raise WeightsError(
                f"weights file {self.checkpoint} has SHA-256 {found[:12]}…, expected {self.weights_sha256[:12]}…: "
                f"{self._hint()}"
            )
        return found


class MiniSource(OpenMMLabSource):
    """A network of the mini zoo: a config of this project, and the shipped weights.

    Attributes:
        folder: where the configs lie.
        zoo_name: name of the config and of the weights.

    Raises:
        WeightsError: the manifest of the mini zoo does not know it.
    """

    folder: ClassVar[Path]
    zoo_name: ClassVar[str]

    def __init__(self) -> None:
        from tasks.mini import manifest

        self.config = str(self.folder / f"{self.zoo_name}.py")
        self.checkpoint = manifest.weights_path(self.zoo_name)
        known = manifest.entries().get(self.zoo_name)
        if known is None:
            raise WeightsError(
                f"model '{self.zoo_name}' is not in the manifest of the mini zoo: {self._hint()}"
            )
        self.weights_sha256 = str(known["sha256"])

    def _hint(self) -> str:
        return f"rebuild it with `python -m bench zoo build {self.zoo_name}`"
