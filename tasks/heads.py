"""The last linear layer of a classifier and the feature maps it weighs: what class activation maps are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench.errors import NotApplicable
from bench.protocols import TargetModel

__all__ = ["final_linear", "last_convolution", "last_maps"]


def final_linear(model: TargetModel) -> nn.Linear:
    """The last linear layer, (num_classes, channels).

    Raises:
        NotApplicable: the model does not end in one.
    """
    linears = [m for m in _network(model).modules() if isinstance(m, nn.Linear)]
    if not linears or linears[-1].out_features != model.num_classes:
        raise NotApplicable(
            "class activation features need a target that ends in a linear layer with one output per class "
            f"({model.num_classes}); {type(_network(model)).__name__} has none"
        )
    return linears[-1]


def last_convolution(model: TargetModel) -> str:
    """Name of the last convolution, in the order modules are declared, with the channels the linear layer takes.

    In a residual network this is one branch of the last block, perhaps its shortcut; see `last_maps`.

    Raises:
        NotApplicable: there is none.
    """
    channels = final_linear(model).in_features
    modules = _network(model).named_modules()
    names = [name for name, m in modules if isinstance(m, nn.Conv2d) and m.out_channels == channels]
    if not names:
        raise NotApplicable(
            f"no convolution of {type(_network(model)).__name__} has the {channels} channels "
            "that its last linear layer takes"
        )
    return names[-1]


def last_maps(model: TargetModel, images: Tensor) -> str:
    """Name of the module whose output (B, C, H, W) is the last before it is pooled for the linear layer.

    Found by running the model: the last output with as many channels as the linear layer takes, larger than 1x1 where
    there is one.

    Args:
        model: a classifier.
        images: one image or more, (B, 3, H, W) in [0,1], of the size it will see.

    Raises:
        NotApplicable: no module returns such maps.
    """
    channels = final_linear(model).in_features
    found: list[tuple[bool, str]] = []

    def watch(name: str) -> Any:
        def look(_module: nn.Module, _inputs: Any, out: Any) -> None:
            if isinstance(out, Tensor) and out.ndim == 4 and out.shape[1] == channels:
                found.append((out.shape[-1] * out.shape[-2] > 1, name))

        return look

    hooks = [m.register_forward_hook(watch(name)) for name, m in _network(model).named_modules() if name]
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


def _network(model: TargetModel) -> nn.Module:
    network: nn.Module = getattr(model, "network", model)
    return network
