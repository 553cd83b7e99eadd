"""Rows and metrics of detection against pycocotools' own evaluation."""

from __future__ import annotations

import contextlib
import io
import json
import math
import time
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from bench.registry import METRICS, TASKS
from tasks.detection import task
from tasks.detection.objects import Detections, Objects, match, warp_masks
from tasks.detection.task import Detection

CLASSES, SIZE = 4, (60, 80)


def ellipse(box: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    x, y, w, h = box
    yy, xx = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    mask = ((xx - x - w / 2) / (w / 2)) ** 2 + ((yy - y - h / 2) / (h / 2)) ** 2 <= rng.uniform(0.6, 1.0)
    if not mask.any():
        mask[int(y), int(x)] = True
    return mask


def image(rng: np.random.Generator, crowds: bool, ties: bool = True) -> tuple[Detections, Objects]:
    """A random image: some objects, noisy copies of them, false alarms; half of the images have tied scores."""
    count = int(rng.integers(0, 6))
    corner = rng.uniform(0, 45, (count, 2))
    boxes = np.concatenate([corner, rng.uniform(4, 15, (count, 2))], axis=1)
    labels = rng.integers(0, CLASSES - 1, count)  # the last class never has an object
    crowd = (rng.random(count) < 0.25) & crowds
    masks = tuple(coco_mask.encode(np.asfortranarray(ellipse(b, rng).astype(np.uint8))) for b in boxes)
    truth = Objects(boxes, labels.astype(np.int64), SIZE, CLASSES, masks=masks, crowd=crowd)

    found, said = [], []
    for box, label in zip(boxes, labels, strict=True):
        for _ in range(int(rng.integers(0, 4))):
            noisy = box + rng.normal(0, rng.choice([0.3, 1.5, 4.0]), 4)
            noisy[2:] = noisy[2:].clip(2)
            found.append(noisy)
            said.append(int(label) if rng.random() < 0.8 else int(rng.integers(0, CLASSES)))
    for _ in range(int(rng.integers(0, 4))):
        found.append(np.concatenate([rng.uniform(0, 45, 2), rng.uniform(4, 15, 2)]))
        said.append(int(rng.integers(0, CLASSES)))
    array = np.array(found).reshape(-1, 4)
    corners = array.copy()
    corners[:, 2:] += corners[:, :2]
    scores = np.round(rng.random(len(array)), 1 if ties and rng.random() < 0.5 else 6).astype(np.float32)
    bitmaps = np.array([ellipse(b, rng) for b in array]).reshape(-1, *SIZE).astype(bool)
    return (
        Detections(
            torch.from_numpy(corners).float(),
            torch.from_numpy(scores),
            torch.tensor(said, dtype=torch.long),
            torch.from_numpy(bitmaps),
        ),
        truth,
    )


def coco_eval(images: list[tuple[Detections, Objects]], kind: str) -> np.ndarray:
    """COCOeval's precision, area all, 100 detections, averaged as its summary does: (mAP at each threshold)."""
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for index, (found, truth) in enumerate(images, start=1):
        assert truth.masks is not None and truth.crowd is not None and found.masks is not None
        for k in range(len(truth)):
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": index, "category_id": int(truth.labels[k]) + 1,
                    "bbox": truth.boxes[k].tolist(), "area": float(np.prod(truth.boxes[k][2:])),
                    "iscrowd": int(truth.crowd[k]), "segmentation": truth.masks[k],
                }
            )  # fmt: skip
        for k in range(len(found)):
            x1, y1, x2, y2 = found.boxes[k].tolist()
            result = {
                "image_id": index, "category_id": int(found.labels[k]) + 1, "score": float(found.scores[k]),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
            }  # fmt: skip
            if kind == "segm":
                del result["bbox"]
                result["segmentation"] = coco_mask.encode(
                    np.asfortranarray(found.masks[k].numpy().astype(np.uint8))
                )
            results.append(result)
    with contextlib.redirect_stdout(io.StringIO()):
        truth_api = COCO()
        truth_api.dataset = {
            "images": [{"id": i, "height": SIZE[0], "width": SIZE[1]} for i in range(1, len(images) + 1)],
            "annotations": annotations,
            "categories": [{"id": k + 1, "name": str(k)} for k in range(CLASSES)],
        }
        truth_api.createIndex()
        evaluation = COCOeval(truth_api, truth_api.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    return np.array([p[p > -1].mean() for p in precision])


@pytest.fixture(scope="module", params=[(0, False), (1, True), (2, True)])
def images(request: pytest.FixtureRequest) -> list[tuple[Detections, Objects]]:
    seed, crowds = request.param
    rng = np.random.default_rng(seed)
    return [image(rng, crowds) for _ in range(40)]


def rows_of(images: list[tuple[Detections, Objects]]) -> list[dict[str, Any]]:
    # Through JSON, as the store keeps them.
    return [json.loads(json.dumps(Detection().rows(found, truth))) for found, truth in images]


@pytest.mark.parametrize(("kind", "name"), [("bbox", "box"), ("segm", "mask")])
def test_equals_cocoeval(images: list[tuple[Detections, Objects]], kind: str, name: str) -> None:
    expected = coco_eval(images, kind)
    rows = rows_of(images)
    half, full = METRICS.create(f"{name}_map50"), METRICS.create(f"{name}_map")
    assert abs(half.value(half.prepare(rows)) - expected[0]) < 1e-12
    assert abs(full.value(full.prepare(rows)) - expected.mean()) < 1e-12
    assert 0.05 < expected.mean() < 0.95  # the comparison is about something


@pytest.mark.parametrize("seed", range(3))
def test_weights_equal_repeats(seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Without ties: where scores are equal the order, and with it the curve, is arbitrary.
    rows = rows_of([image(rng, True, ties=False) for _ in range(40)])
    for name in ("box_map", "mask_map50"):
        metric = METRICS.create(name)
        prepared = metric.prepare(rows)
        for _ in range(5):
            drawn = rng.integers(0, len(rows), len(rows))
            weights = np.bincount(drawn, minlength=len(rows)).astype(float)
            repeated = [rows[i] for i in np.sort(drawn)]
            assert abs(metric.value(prepared, weights) - metric.value(metric.prepare(repeated))) < 1e-12
        assert metric.value(prepared, np.ones(len(rows))) == metric.value(prepared)


def test_many_samples_at_once_and_fast(
    images: list[tuple[Detections, Objects]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)
    rows = rows_of(images)
    for name in Detection.metrics:
        metric = METRICS.create(name)
        prepared = metric.prepare(rows)
        weights = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=1000)
        weights[0] = 0
        begun = time.process_time()
        values = metric.values(prepared, weights)
        assert time.process_time() - begun < 2.0  # a bootstrap must not cost more than the attack
        assert math.isnan(values[0])
        assert values[1:20].tolist() == [metric.value(prepared, w) for w in weights[1:20]]
        with monkeypatch.context() as patch:
            patch.setattr(task, "_CHUNK", 5000)
            assert np.array_equal(metric.values(prepared, weights), values, equal_nan=True)


def test_more_than_a_hundred_detections_of_a_class() -> None:
    rng = np.random.default_rng(3)
    _, truth = image(rng, False)
    boxes = torch.rand(250, 4) * 20
    boxes[:, 2:] += boxes[:, :2] + 5
    found = Detections(
        boxes, torch.rand(250), torch.zeros(250, dtype=torch.long), torch.zeros(250, *SIZE, dtype=torch.bool)
    )
    (entry,) = (e for e in match(found, truth, "box") if e["c"] == 0)
    assert len(entry["s"]) == 100 and entry["s"] == sorted(found.scores.double().tolist(), reverse=True)[:100]


def test_perfect_and_empty_predictions() -> None:
    rng = np.random.default_rng(8)
    _, truth = image(rng, False)
    assert len(truth) > 0
    corners = torch.from_numpy(truth.corners())
    masks = torch.from_numpy(truth.bitmaps(np.ones(len(truth), dtype=bool)))
    perfect = Detections(corners, torch.ones(len(truth)), torch.from_numpy(truth.labels), masks)
    row = Detection().rows(perfect, truth)
    assert row["score"] == pytest.approx(1) and row["objects"] == len(truth)
    metric = METRICS.create("mask_map")
    assert metric.value(metric.prepare([row])) == pytest.approx(1)
    row = Detection().rows(Detections.empty(SIZE), truth)
    assert row["score"] == 0.0
    assert metric.value(metric.prepare([row])) == 0.0


def test_image_without_objects() -> None:
    truth = Objects(np.zeros((0, 4)), np.zeros(0, dtype=np.int64), SIZE, CLASSES, masks=())
    assert Detection().rows(Detections.empty(SIZE), truth)["score"] == 1.0
    found = Detections(torch.tensor([[0.0, 0, 5, 5]]), torch.tensor([0.75]), torch.tensor([1]))
    row = Detection().rows(found, truth)
    assert row["score"] == 0.25 and row["objects"] == 0 and row["mask"] is None
    # Its false positive counts against the class elsewhere.
    other = Objects(np.array([[0.0, 0, 5, 5]]), np.array([1]), SIZE, CLASSES)
    good = Detection().rows(
        Detections(torch.tensor([[0.0, 0, 5, 5]]), torch.tensor([0.5]), torch.tensor([1])), other
    )
    metric = METRICS.create("box_map50")
    assert metric.value(metric.prepare([good])) == pytest.approx(1)
    assert metric.value(metric.prepare([row, good])) == pytest.approx(0.5)
    assert math.isnan(metric.value(metric.prepare([row])))
    assert math.isnan(METRICS.create("mask_map50").value(METRICS.create("mask_map50").prepare([good])))


def test_difficult_objects_are_neither_hits_nor_misses() -> None:
    truth = Objects(
        np.array([[0.0, 0, 10, 10], [30.0, 30, 10, 10]]),
        np.array([1, 1]),
        SIZE,
        CLASSES,
        ignore=np.array([True, False]),
    )
    both = Detections(
        torch.tensor([[0.0, 0, 10, 10], [30.0, 30, 40, 40]]), torch.tensor([0.9, 0.8]), torch.tensor([1, 1])
    )
    row = Detection().rows(both, truth)
    assert row["objects"] == 1 and row["score"] == pytest.approx(1)
    (entry,) = row["box"]
    assert entry["g"] == [1023, 0] and entry["m"] == [1023, 1023]


def test_boxes_of_a_resized_image_are_judged_in_original_pixels() -> None:
    rng = np.random.default_rng(8)
    found, truth = image(rng, False)
    scale = (1.5, 2.0)
    bigger = Detections(
        found.boxes * torch.tensor([2.0, 1.5, 2.0, 1.5]), found.scores, found.labels,
        torch.from_numpy(warp_masks(found.masks.numpy(), scale, (0.0, 0.0), (90, 160))),
    )  # fmt: skip
    before, after = Detection().rows(found, truth), Detection().rows(bigger, truth.resized(scale))
    assert [e["m"] for e in before["box"]] == [e["m"] for e in after["box"]]
    assert before["mask"] == after["mask"]  # enlarging and shrinking a bitmap by nearest pixel is exact


def test_registered_with_directions() -> None:
    kinds = ("cls", "loc", "cls+loc", "mask", "total", "objectness", "emptiness", "swap")
    assert TASKS.create("detection").losses == kinds
    for name in Detection.metrics:
        metric = METRICS.create(name)
        assert metric.task == "detection" and metric.higher_is_better and metric.interval == "bootstrap"


def test_warp_masks() -> None:
    masks = np.zeros((1, 4, 6), dtype=bool)
    masks[0, 1:3, 2:5] = True
    assert np.array_equal(warp_masks(masks, (1.0, 1.0), (0.0, 0.0), (4, 6)), masks)
    padded = warp_masks(masks, (1.0, 1.0), (2.0, 3.0), (10, 12))
    assert padded.sum() == masks.sum() and padded[0, 3:5, 5:8].all()
    doubled = warp_masks(masks, (2.0, 2.0), (0.0, 0.0), (8, 12))
    assert np.array_equal(doubled, masks.repeat(2, 1).repeat(2, 2))
    assert np.array_equal(warp_masks(doubled, (0.5, 0.5), (0.0, 0.0), (4, 6)), masks)
