"""Stand-in for ``mmcv._ext``, mmcv's compiled operators, through torchvision.

``mmcv-lite`` has all of mmcv but the compiled extension; building that takes half an hour.  The models used
here need three operators of it: ``nms``, ``roi_align_forward`` and ``roi_align_backward``.  :func:`install`
puts a module with those three into ``sys.modules`` before mmdet imports ``mmcv.ops``; every other operator
raises :class:`MissingOperator` when it is called.  Where compiled mmcv exists, nothing is done.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor

from bench.errors import BenchError

__all__ = ["MissingOperator", "backend", "install"]

_NAME = "mmcv._ext"
_AVERAGE = 1  # mmcv's code for pool_mode="avg"; 0 is "max"


class MissingOperator(BenchError, NotImplementedError):
    """An operator of ``mmcv._ext`` that the torchvision stand-in does not have."""


def _missing(operator: str) -> MissingOperator:
    return MissingOperator(
        f"mmcv operator {operator!r} is not available with mmcv-lite (available: nms, RoIAlign with "
        "pool_mode='avg'); for the others replace mmcv-lite by compiled mmcv: "
        "pip uninstall mmcv-lite && pip install 'mmcv>=2.0.0rc4,<2.2.0' (builds C++ code, about half an hour)"
    )


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """Indices of the boxes kept by greedy non-maximum suppression, by falling score.

    Args:
        boxes: (N, 4) as x1, y1, x2, y2.
        scores: (N,).
        iou_threshold: a box is dropped when its IoU with a kept one is larger.
        offset: 0, or 1 for the old convention in which a width is ``x2 - x1 + 1``.

    Returns:
        (K,) int64.
    """
    if offset:
        # (x2 - x1 + 1) for every width, the intersection's included, is a shift of x2 and y2.
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    keep: Tensor = torchvision.ops.nms(boxes, scores, float(iou_threshold))
    return keep


def _align(
    features: Tensor, rois: Tensor, size: tuple[int, int], scale: float, ratio: int, aligned: bool
) -> Tensor:
    # torchvision adapts the number of samples for -1, mmcv for 0.
    ratio = ratio if ratio > 0 else -1
    pooled: Tensor = torchvision.ops.roi_align(features, rois, size, float(scale), ratio, bool(aligned))
    return pooled


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign of ``input`` (B, C, H, W) at ``rois`` (K, 5), written into ``output`` (K, C, h, w).

    Raises:
        MissingOperator: for max pooling, which torchvision does not have.
    """
    if pool_mode != _AVERAGE:
        raise _missing("roi_align with pool_mode='max'")
    size = (aligned_height, aligned_width)
    with torch.no_grad():
        output.copy_(_align(input, rois, size, spatial_scale, sampling_ratio, aligned))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """The gradient of :func:`roi_align_forward` for its input, added to ``grad_input`` (B, C, H, W)."""
    if pool_mode != _AVERAGE:
        raise _missing("roi_align with pool_mode='max'")
    size = (aligned_height, aligned_width)
    with torch.enable_grad():
        # RoIAlign is linear in its input, so its gradient is the same at every point: zeros will do.
        point = torch.zeros_like(grad_input, requires_grad=True)
        pooled = _align(point, rois.detach(), size, spatial_scale, sampling_ratio, aligned)
        (gradient,) = torch.autograd.grad(pooled, point, grad_output)
    grad_input.add_(gradient)


class _Extension(ModuleType):
    """Answers every attribute: mmcv asserts at import that its operators exist, used or not."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def operator(*_: Any, **__: Any) -> Any:
            raise _missing(name)

        operator.__name__ = name
        return operator


def backend() -> Literal["compiled", "torchvision", "absent"]:
    """Where mmcv's operators come from in this process; ``absent`` before :func:`install`, or without mmcv."""
    module = sys.modules.get(_NAME)
    if isinstance(module, _Extension):
        return "torchvision"
    if module is not None:
        return "compiled"
    if importlib.util.find_spec("mmcv") is None:
        return "absent"
    return "compiled" if importlib.util.find_spec(_NAME) is not None else "absent"


def install() -> Literal["compiled", "torchvision"]:
    """Makes ``mmcv.ops`` importable.  Call before importing mmdet or ``mmcv.ops``; calling again is free.

    Returns:
        ``"compiled"`` when mmcv has its own operators (nothing was done), else ``"torchvision"``.
    """
    found = backend()
    if found != "absent":
        return found
    extension = _Extension(_NAME, "torchvision's operators under mmcv's names")
    # No __spec__: without one, find_spec raises ValueError where mmcv looks for the compiled module.
    extension.__spec__ = importlib.util.spec_from_loader(_NAME, loader=None)
    for function in (nms, roi_align_forward, roi_align_backward):
        setattr(extension, function.__name__, function)
    sys.modules[_NAME] = extension
    return "torchvision"
