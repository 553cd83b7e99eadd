"""The last linear map of a network and the feature maps it weighs: what class activation maps are made of.

A classifier ends in a linear layer on pooled maps. A segmenter ends in a 1x1 convolution, the same linear map at every
pixel: there each pixel has a class c of its own, and its class activation feature is F * w_c at that pixel. The papers
define class activation features for classification alone; the form for segmenters is this project's. A detector has no
single linear map from feature maps to classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import padding

from bench.errors import GridError, NotApplicable
from bench.protocols import TargetModel

__all__ = [
    "class_activation_maps",
    "class_rows",
    "feature_layer",
    "final_linear",
    "last_convolution",
    "last_maps",
    "maps_of",
    "named_layer",
    "stage_ends",
]


def final_linear(model: TargetModel) -> nn.Linear | nn.Conv2d:
    """The last linear map: of a classifier a linear layer, of a segmenter a 1x1 convolution, one output per class.

    Raises:
        NotApplicable: the model does not end in one.
    """
    network = _network(model)
    if model.task == "detection":
        raise NotApplicable(
            "class activation features need one linear map from feature maps to classes, which a detector "
            f"({type(network).__name__}) does not have"
        )
    if model.task == "segmentation":
        head = getattr(network, "decode_head", None)
        last = getattr(head[-1] if isinstance(head, nn.ModuleList) else head, "conv_seg", None)
        if (
            not isinstance(last, nn.Conv2d)
            or last.kernel_size != (1, 1)
            or last.out_channels != model.num_classes
        ):
            raise NotApplicable(
                "class activation features need a segmenter that ends in a 1x1 convolution with one output per class "
                f"({model.num_classes}); {type(network).__name__} has none"
            )
        return last
    linears = [m for m in network.modules() if isinstance(m, nn.Linear)]
    if not linears or linears[-1].out_features != model.num_classes:
        raise NotApplicable(
            "class activation features need a target that ends in a linear layer with one output per class "
            f"({model.num_classes}); {type(network).__name__} has none"
        )
    return linears[-1]


def class_rows(linear: nn.Linear | nn.Conv2d, maps: Tensor, logits: Callable[[], Tensor]) -> Tensor:
    """The rows w_c of the last linear map that belong to the predicted classes, in the shape that multiplies maps.

    No gradient: an argmax picks rows of a frozen matrix.

    Args:
        linear: as `final_linear` finds it.
        maps: its feature maps (B, C, H, W).
        logits: gives the model's logits (B, K); asked for a linear layer alone, since a 1x1 convolution says itself
            what it makes of each pixel.

    Returns:
        (B, C, 1, 1) for a linear layer, (B, C, H, W) for a convolution.
    """
    with torch.no_grad():
        if isinstance(linear, nn.Conv2d):
            return linear.weight.flatten(1)[linear(maps).argmax(1)].permute(0, 3, 1, 2)
        return linear.weight[logits().argmax(1)][:, :, None, None]


def class_activation_maps(model: TargetModel, images: Tensor) -> Tensor:
    """What each place of the last feature maps adds to the predicted class: sum_k w_k^c f_k (Zhou et al. 2016).

    The mean of a map, with the class's bias, is the logit.

    Args:
        model: a classifier that averages its last maps for a linear layer.
        images: (B, 3, H, W) in [0,1].

    Returns:
        (B, h, w) of the size of the maps, no gradient.

    Raises:
        NotApplicable: another task, or a network whose logits are not these means.
    """
    if model.task != "classification":
        raise NotApplicable(
            f"class activation maps need one class for the image, which {model.task} does not have"
        )
    linear = final_linear(model)
    assert isinstance(linear, nn.Linear)
    with torch.no_grad():
        logits, maps = model.logits(images), model.features(images, last_maps(model, images))
        # Networks that do anything else between the maps and the linear layer have no such maps.
        if not torch.allclose(linear(maps.mean((2, 3))), logits, rtol=1e-3, atol=1e-3):
            raise NotApplicable(
                f"{type(_network(model)).__name__} has no class activation maps: its logits are not what its last "
                "linear layer makes of the averages of its last maps"
            )
        found: Tensor = (maps * class_rows(linear, maps, lambda: logits)).sum(1)
    return found


def last_convolution(model: TargetModel) -> str:
    """Name of the last convolution, in the order modules are declared, with the channels the last linear map takes.

    In a residual network this is one branch of the last block, perhaps its shortcut; see `last_maps`.

    Raises:
        NotApplicable: there is none.
    """
    linear = final_linear(model)
    modules = _network(model).named_modules()
    names: list[str] = [
        name
        for name, m in modules
        if isinstance(m, nn.Conv2d) and m is not linear and m.out_channels == _channels(linear)
    ]
    if not names:
        raise NotApplicable(
            f"no convolution of {type(_network(model)).__name__} has the {_channels(linear)} channels "
            "that its last linear layer takes"
        )
    return names[-1]


def last_maps(model: TargetModel, images: Tensor) -> str:
    """Name of the module whose output (B, C, H, W) is the last before the last linear map, and before any pooling.

    Found by running the model: the last output with as many channels as the linear map takes, larger than 1x1 where
    there is one.

    Args:
        model: a classifier or a segmenter.
        images: one image or more, (B, 3, H, W) in [0,1], of the size it will see.

    Raises:
        NotApplicable: no module returns such maps.
    """
    linear = final_linear(model)
    channels = _channels(linear)
    found: list[tuple[bool, str]] = []

    def watch(name: str) -> Any:
        def look(_module: nn.Module, _inputs: Any, out: Any) -> None:
            if isinstance(out, Tensor) and out.ndim == 4 and out.shape[1] == channels:
                found.append((out.shape[-1] * out.shape[-2] > 1, name))

        return look

    modules = _network(model).named_modules()
    hooks = [m.register_forward_hook(watch(name)) for name, m in modules if name and m is not linear]
    try:
        with torch.no_grad():
            model.logits(images[:1])
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise NotApplicable(
            f"no layer of {type(_network(model)).__name__} returns maps with the {channels} channels "
            "that its last linear layer takes"
        )
    large = [name for wide, name in found if wide]
    return large[-1] if large else found[-1][1]


def feature_layer(model: TargetModel, images: Tensor) -> str:
    """The layer whose activations stand for what a model sees, where nobody names one.

    The maps pooled for a classifier's linear layer, the backbone of a segmenter or a detector.

    Args:
        model: any target.
        images: as in `last_maps`.

    Raises:
        NotApplicable: the model has neither.
    """
    if model.task == "classification":
        return last_maps(model, images)
    if not hasattr(_network(model), "backbone"):
        raise NotApplicable(f"{type(_network(model)).__name__} has no backbone: name a layer of features")
    return "backbone"


def named_layer(model: TargetModel, images: Tensor, name: str | None) -> str:
    """The layer meant by `name`: None = `feature_layer`, `stage:K` = the last at the K-th size of maps, or a module.

    `stage:K` means something in every network: of a VGG it is the last ReLU of block K.

    Args:
        model: any target.
        images: as in `last_maps`.
        name: as grids and recipes say it.

    Raises:
        GridError: the model has no such stage.
        NotApplicable: as `feature_layer`, or it has no maps.
    """
    if name is None:
        return feature_layer(model, images)
    if not name.startswith("stage:"):
        return name
    found = stage_ends(_network(model), lambda: model.predict(images[:1]))
    number = name.removeprefix("stage:")
    if not number.isdecimal() or not 1 <= int(number) <= len(found):
        raise GridError(
            f"layer '{name}': {type(_network(model)).__name__} has stages 1 to {len(found)} ({', '.join(found)})"
        )
    return found[int(number) - 1]


def maps_of(
    network: nn.Module, run: Callable[[], object], kind: type[nn.Module] = nn.Module
) -> list[tuple[str, Tensor]]:
    """Modules of `kind` that run once and return maps (B, C, H, W), with these maps, as they end.

    Args:
        network: whose modules.
        run: runs it once.
        kind: of modules.
    """
    ends: list[tuple[str, Any]] = []

    def end(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, out: ends.append((name, out))

    hooks = [m.register_forward_hook(end(n)) for n, m in network.named_modules() if n and isinstance(m, kind)]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    names = [name for name, _ in ends]
    return [
        (name, out)
        for name, out in ends
        if isinstance(out, Tensor) and out.ndim == 4 and names.count(name) == 1
    ]


def stage_ends(network: nn.Module, run: Callable[[], object]) -> list[str]:
    """The last module at each size of maps larger than 1, in the order the sizes appear; arguments as `maps_of`.

    Raises:
        NotApplicable: no module returns maps.
    """
    last: dict[tuple[int, ...], str] = {}
    modules = dict(network.named_modules())
    for name, out in maps_of(network, run):
        # Padding that is a module of its own, as in EfficientNets, would make sizes that are no stages.
        if out.shape[-1] > 1 and type(modules[name]).__module__ != padding.__name__:
            last[tuple(out.shape[-2:])] = name
    if not last:
        raise NotApplicable("the network has no layer that returns maps")
    return list(last.values())


def _channels(linear: nn.Linear | nn.Conv2d) -> int:
    return linear.in_channels if isinstance(linear, nn.Conv2d) else linear.in_features


def _network(model: TargetModel) -> nn.Module:
    network: nn.Module = getattr(model, "network", model)
    return network
