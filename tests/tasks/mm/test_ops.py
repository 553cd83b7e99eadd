"""The stand-in for mmcv._ext: nms and RoIAlign against references written from their definitions."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torchvision
from torch import Tensor

from tasks.mm import ops

compiled = pytest.mark.skipif(
    ops.install() == "compiled", reason="compiled mmcv is installed: nothing to stand in for"
)


def reference_nms(boxes: Tensor, scores: Tensor, threshold: float, offset: int) -> list[int]:
    order = sorted(range(len(boxes)), key=lambda i: -float(scores[i]))
    kept: list[int] = []
    for i in order:
        x1, y1, x2, y2 = boxes[i].tolist()
        for j in kept:
            a1, b1, a2, b2 = boxes[j].tolist()
            width = max(0.0, min(x2, a2) - max(x1, a1) + offset)
            height = max(0.0, min(y2, b2) - max(y1, b1) + offset)
            area = (x2 - x1 + offset) * (y2 - y1 + offset) + (a2 - a1 + offset) * (b2 - b1 + offset)
            if width * height / (area - width * height) > threshold:
                break
        else:
            kept.append(i)
    return kept


def random_boxes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 60
    size = torch.rand(count, 2, generator=generator) * 30 + 1
    return torch.cat([corner, corner + size], 1), torch.rand(count, generator=generator)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("threshold", [0.1, 0.45, 0.7])
@pytest.mark.parametrize("seed", range(4))
def test_nms(offset: int, threshold: float, seed: int) -> None:
    from mmcv.ops import nms

    boxes, scores = random_boxes(60, seed)
    dets, kept = nms(boxes, scores, threshold, offset=offset)
    expected = reference_nms(boxes, scores, threshold, offset)
    assert kept.tolist() == expected
    assert torch.equal(dets, torch.cat([boxes, scores[:, None]], 1)[expected])


def test_nms_offset_changes_the_result() -> None:
    from mmcv.ops import nms

    # Two 2x2 boxes one pixel apart: IoU 2/6 with offset 0, (2x3)/(9+9-6) = 1/2 with offset 1.
    boxes = torch.tensor([[0.0, 0, 2, 2], [1.0, 0, 3, 2]])
    scores = torch.tensor([0.9, 0.8])
    assert nms(boxes, scores, 0.4, offset=0)[1].tolist() == [0, 1]
    assert nms(boxes, scores, 0.4, offset=1)[1].tolist() == [0]


def test_nms_score_threshold_limit_and_empty() -> None:
    from mmcv.ops import batched_nms, nms

    boxes, scores = random_boxes(40, 7)
    expected = [i for i in reference_nms(boxes, scores, 0.5, 0) if scores[i] > 0.3]
    assert nms(boxes, scores, 0.5, score_threshold=0.3)[1].tolist() == expected
    assert nms(boxes, scores, 0.5, max_num=3)[1].tolist() == reference_nms(boxes, scores, 0.5, 0)[:3]
    dets, kept = nms(boxes[:0], scores[:0], 0.5)
    assert dets.shape == (0, 5) and kept.shape == (0,)
    # Boxes of different classes never suppress each other.
    same = torch.tensor([[0.0, 0, 9, 9], [0.0, 0, 9, 9]])
    _, kept = batched_nms(
        same, torch.tensor([0.9, 0.8]), torch.tensor([0, 1]), {"type": "nms", "iou_threshold": 0.5}
    )
    assert sorted(kept.tolist()) == [0, 1]


def reference_roi_align(
    x: Tensor, rois: Tensor, size: int, scale: float, ratio: int, aligned: bool
) -> Tensor:
    """RoIAlign (He 2017) sample by sample, as mmcv defines it."""
    out = x.new_zeros(len(rois), x.shape[1], size, size)
    height, width = x.shape[-2:]

    def value(plane: Tensor, y: float, z: float) -> Tensor:
        if y < -1 or y > height or z < -1 or z > width:
            return plane.new_zeros(plane.shape[0])
        y, z = max(y, 0.0), max(z, 0.0)
        y0, z0 = min(int(y), height - 1), min(int(z), width - 1)
        y = float(y0) if y0 >= height - 1 else y
        z = float(z0) if z0 >= width - 1 else z
        y1, z1 = min(y0 + 1, height - 1), min(z0 + 1, width - 1)
        dy, dz = y - y0, z - z0
        return (
            (1 - dy) * (1 - dz) * plane[:, y0, z0]
            + (1 - dy) * dz * plane[:, y0, z1]
            + dy * (1 - dz) * plane[:, y1, z0]
            + dy * dz * plane[:, y1, z1]
        )

    for k, roi in enumerate(rois.tolist()):
        shift = 0.5 if aligned else 0.0
        x1, y1, x2, y2 = (v * scale - shift for v in roi[1:])
        w, h = x2 - x1, y2 - y1
        if not aligned:
            w, h = max(w, 1.0), max(h, 1.0)
        rows = ratio if ratio > 0 else math.ceil(h / size)
        columns = ratio if ratio > 0 else math.ceil(w / size)
        for i in range(size):
            for j in range(size):
                total = x.new_zeros(x.shape[1])
                for a in range(rows):
                    for b in range(columns):
                        yy = y1 + (i + (a + 0.5) / rows) * h / size
                        xx = x1 + (j + (b + 0.5) / columns) * w / size
                        total = total + value(x[int(roi[0])], yy, xx)
                out[k, :, i, j] = total / max(rows * columns, 1)
    return out


ROIS = torch.tensor(
    [
        [0, 1.0, 2.0, 13.0, 11.0],
        [1, -3.0, 4.0, 9.5, 17.0],
        [0, 5.3, 5.2, 5.9, 5.6],
        [1, 0.0, 0.0, 16.0, 16.0],
    ],
    dtype=torch.float64,
)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_roi_align_forward(aligned: bool, ratio: int, scale: float) -> None:
    from mmcv.ops import roi_align

    x = torch.randn(2, 3, 12, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = roi_align(x, ROIS, (3, 3), scale, ratio, "avg", aligned)
    expected = reference_roi_align(x, ROIS, 3, scale, ratio, aligned)
    assert torch.allclose(got, expected, rtol=0, atol=1e-12)
    direct = torchvision.ops.roi_align(x, ROIS, (3, 3), scale, ratio or -1, aligned)
    assert torch.equal(got, direct)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align_backward(aligned: bool, ratio: int) -> None:
    from mmcv.ops import roi_align

    x = torch.randn(
        2, 2, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True
    )
    rois = ROIS / 2
    rois[:, 0] = ROIS[:, 0]
    assert torch.autograd.gradcheck(lambda t: roi_align(t, rois, (2, 3), 0.9, ratio, "avg", aligned), (x,))


def test_roi_align_module_and_gradient_values() -> None:
    from mmcv.ops import RoIAlign

    x = torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(2))
    weight = torch.randn(4, 4, 7, 7, generator=torch.Generator().manual_seed(3))
    gradients = []
    for layer in (
        RoIAlign(7, spatial_scale=0.5, sampling_ratio=2, aligned=True),
        torchvision.ops.RoIAlign(7, spatial_scale=0.5, sampling_ratio=2, aligned=True),
    ):
        point = x.clone().requires_grad_()
        # A transposed weight makes the incoming gradient non-contiguous.
        (layer(point, ROIS.float()).transpose(2, 3) * weight).sum().backward()
        gradients.append(point.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert gradients[0].abs().sum() > 0


@compiled
def test_max_pooling_and_other_operators_are_named() -> None:
    import mmcv.ops

    x = torch.ones(1, 1, 4, 4)
    with pytest.raises(ops.MissingOperator, match="pool_mode='max'") as error:
        mmcv.ops.roi_align(x, ROIS[:1].float(), (2, 2), 1.0, 2, "max", True)
    assert "\n" not in str(error.value)
    with pytest.raises(ops.MissingOperator, match=r"'softnms'.*mmcv>=2.0.0rc4,<2.2.0"):
        mmcv.ops.soft_nms(torch.rand(3, 4), torch.rand(3))


@compiled
def test_install_is_idempotent_and_fresh_process_imports_mmdet_ops() -> None:
    assert ops.install() == "torchvision" == ops.backend()
    module = sys.modules["mmcv._ext"]
    ops.install()
    assert sys.modules["mmcv._ext"] is module
    code = (
        "from tasks.mm import ops\n"
        "assert ops.backend() == 'absent'\n"
        "assert ops.install() == 'torchvision'\n"
        "import mmcv.ops, sys\n"
        "from mmcv.utils.ext_loader import load_ext\n"
        "load_ext('_ext', ['nms', 'anything_at_all'])\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


def test_existing_extension_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    real = types.ModuleType("mmcv._ext")
    monkeypatch.setitem(sys.modules, "mmcv._ext", real)
    assert ops.install() == "compiled"
    assert sys.modules["mmcv._ext"] is real
