"""Reading OpenMMLab checkpoints without unpickling their training history.

A checkpoint of mmengine is a dictionary with `meta`, `state_dict` and, beside optimizer state, a `message_hub` whose
log curves are `HistoryBuffer` objects over numpy arrays. Nothing here needs the curves, so exactly the names that
such an object's pickle uses are replaced by an inert stand-in; every other class or function is refused.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from bench.weights import Allowed, Inert, Weights, apply_state, load_state

__all__ = ["HISTORY", "load_checkpoint", "load_into"]

#: Names in the pickle of a `HistoryBuffer` with numpy 1 and 2, Python 2 and 3 spellings.
HISTORY: tuple[Allowed, ...] = tuple(
    (Inert, name)
    for name in (
        "mmengine.logging.history_buffer.HistoryBuffer",
        "numpy._core.multiarray._reconstruct",
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy.core.multiarray.scalar",
        "numpy.ndarray",
        "numpy.dtype",
        "builtins.getattr",  # its statistics methods, pickled as getattr(HistoryBuffer, "mean")
        "__builtin__.getattr",
    )
)


def load_checkpoint(path: str | Path, *, hint: str = "") -> Weights:
    """The weights and `meta` in a checkpoint of mmdet or mmseg, or in a safetensors file.

    Raises:
        WeightsError: the file is missing, damaged, asks for code, or holds no weights.
    """
    return load_state(path, HISTORY, hint=hint)


def load_into(model: nn.Module, path: str | Path, *, what: str, hint: str = "") -> Weights:
    """Read a checkpoint into `model`; every name and shape must match.

    Args:
        model: the network.
        path: the file.
        what: the network, for messages ("model 'ssd300_coco'").
        hint: said when the file is missing.

    Raises:
        WeightsError: as `load_checkpoint`, or the checkpoint belongs to another model.
    """
    weights = load_checkpoint(path, hint=hint)
    apply_state(model, weights.state, what=f"{what}, weights file {path}")
    return weights
