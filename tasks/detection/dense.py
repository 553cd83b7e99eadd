"""What a detector scores before it suppresses and thresholds: every anchor, or every region proposal.

Attacks on the whole of a detector's output (DAG, TOG) need these scores; mmdet returns none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou

from bench.errors import NotApplicable

__all__ = ["Candidates", "candidates", "class_probabilities", "emptiness", "objectness", "swap_margin"]


@dataclass(frozen=True)
class Candidates:
    """All candidates of one image.

    Attributes:
        boxes: (P, 4) x1, y1, x2, y2 in pixels of the network input, constants to the gradient: anchors, or proposals.
        logits: (P, C) class scores before softmax (the last column is the background) or, with `sigmoid`, before it.
        sigmoid: C independent classes instead of a softmax over classes and background.
        proposal_logits: (A, 1) scores of a region proposal network's anchors, None without one.
    """

    boxes: Tensor
    logits: Tensor
    sigmoid: bool
    proposal_logits: Tensor | None = None


def candidates(network: Any, inputs: Tensor, samples: Sequence[Any], nms: float | None = None) -> Candidates:
    """The candidates of one image.

    Args:
        network: a detector of mmdet with an anchor head, or with a region proposal network and a single box head.
        inputs: (1, 3, H, W) as the network takes it.
        samples: its data sample.
        nms: overlap from which proposals suppress each other, instead of the config's; all that are scored are then
            kept. Anchors are never suppressed.

    Raises:
        NotApplicable: another kind of detector.
    """
    features = network.extract_feat(inputs)
    if getattr(network, "with_roi_head", False):
        return _proposals(network, features, samples, nms)
    head: Any = getattr(network, "bbox_head", None)
    if not hasattr(head, "prior_generator") or not hasattr(head, "cls_out_channels"):
        raise NotApplicable(f"{type(network).__name__} has no anchors that could be scored one by one")
    levels = head(features)[0]
    priors = head.prior_generator.grid_priors([level.shape[-2:] for level in levels], device=inputs.device)
    return Candidates(
        torch.cat(list(priors)), _rows(levels, head.cls_out_channels), bool(head.use_sigmoid_cls)
    )


def _proposals(network: Any, features: Any, samples: Sequence[Any], nms: float | None) -> Candidates:
    rpn, roi = getattr(network, "rpn_head", None), network.roi_head
    box_head = getattr(roi, "bbox_head", None)
    if rpn is None or not isinstance(box_head, nn.Module) or isinstance(box_head, nn.ModuleList):
        raise NotApplicable(
            f"{type(network).__name__} has no region proposals that a single box head would score"
        )
    out = rpn(features)
    config = deepcopy(network.test_cfg.rpn)
    if nms is not None:
        config.nms.iou_threshold, config.max_per_img = nms, config.nms_pre * len(out[0])
    with torch.no_grad():
        found = rpn.predict_by_feat(*out, batch_img_metas=[sample.metainfo for sample in samples], cfg=config)
    boxes = found[0].bboxes.detach()
    rois = torch.cat([boxes.new_zeros(len(boxes), 1), boxes], 1)
    pooled = roi.bbox_roi_extractor(features[: roi.bbox_roi_extractor.num_inputs], rois)
    if roi.with_shared_head:
        pooled = roi.shared_head(pooled)
    return Candidates(boxes, box_head(pooled)[0], False, _rows(out[0], rpn.cls_out_channels))


def _rows(levels: Sequence[Tensor], channels: int) -> Tensor:
    """Score maps (1, A * C, H, W) of all levels as (P, C), in the order of the anchors."""
    return torch.cat([level[0].permute(1, 2, 0).reshape(-1, channels) for level in levels])


def objectness(found: Candidates) -> Tensor:
    """Mean cross-entropy of the candidates to "nothing here", a scalar: the more is seen, the larger.

    With a region proposal network the mean over its anchors is added, as the losses of both stages add up.
    """
    return _of_stages(found, lambda logits, sigmoid: _log_odds(logits, sigmoid)[0])


def emptiness(found: Candidates) -> Tensor:
    """Mean cross-entropy of the candidates to "something here, of whatever class", a scalar; stages add up."""
    return _of_stages(found, lambda logits, sigmoid: _log_odds(logits, sigmoid)[1])


def _of_stages(found: Candidates, loss: Callable[[Tensor, bool], Tensor]) -> Tensor:
    stages = [(found.logits, found.sigmoid)]
    if found.proposal_logits is not None:
        stages.append((found.proposal_logits, found.proposal_logits.shape[1] == 1))
    # A mean over no candidates would be NaN.
    return torch.stack([loss(*stage).sum() / max(len(stage[0]), 1) for stage in stages]).sum()


def _log_odds(logits: Tensor, sigmoid: bool) -> tuple[Tensor, Tensor]:
    """-log p(nothing) and -log p(something) of each candidate, (P,) both."""
    if sigmoid:
        nothing = F.softplus(logits).sum(1)
        return nothing, -torch.log(-torch.expm1(-nothing.clamp(min=1e-12)))
    everything = logits.logsumexp(1)
    return everything - logits[:, -1], everything - logits[:, :-1].logsumexp(1)


def swap_margin(found: Candidates, boxes: Tensor, true: Tensor, wrong: Tensor, overlap: float) -> Tensor:
    """Wrong minus true logit, summed over the candidates that still get their true label; a scalar, 0 without any.

    A candidate belongs to the object it overlaps most, if by more than `overlap` (Xie et al. 2017, section 3.3).

    Args:
        found: the candidates.
        boxes: (N, 4) objects in pixels of the network input.
        true, wrong: (N,) their labels.
        overlap: intersection over union.
    """
    iou, owner = box_iou(found.boxes, boxes).max(1)
    label = true[owner]
    active = ((iou > overlap) & (found.logits.detach().argmax(1) == label)).nonzero()[:, 0]
    rows = found.logits[active]
    return (rows.gather(1, wrong[owner[active], None]) - rows.gather(1, label[active, None])).sum()


@contextmanager
def class_probabilities(network: Any) -> Iterator[list[Tensor]]:
    """Collects the class probabilities (P, K) of all candidates during a prediction of one image; empty if unknown."""
    seen: list[Tensor] = []
    head: Any = getattr(getattr(network, "roi_head", None), "bbox_head", None)
    dense = head is None
    if dense:
        head = getattr(network, "bbox_head", None)
    known = isinstance(head, nn.Module) and hasattr(head, "cls_out_channels" if dense else "fc_cls")
    if not known or getattr(head, "use_sigmoid_cls", False) or getattr(head, "custom_activation", False):
        yield seen
        return

    def keep(_module: nn.Module, _inputs: Any, out: Any) -> None:
        logits = _rows(out[0], head.cls_out_channels) if dense else out[0]
        seen.append(logits.softmax(1)[:, :-1])

    handle = head.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()
