"""Feature vectors of ground-truth boxes: cells by hand, gradients, channel order, which boxes count."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.registry import MODELS
from tasks.detection.datasets import MiniScenes
from tasks.detection.model import Detector, _cropped


@pytest.fixture(scope="module", params=["mini_ssd", "mini_mask_rcnn"])
def model(request: pytest.FixtureRequest) -> Detector:
    loaded = MODELS.create(request.param).load(torch.device("cpu"))
    assert isinstance(loaded, Detector)
    return loaded


@pytest.fixture(scope="module")
def scenes():
    data = MiniScenes(count=4)
    return [data[i] for i in range(4)]


def stacked(scenes) -> tuple[Tensor, list]:
    return torch.stack([s.image for s in scenes]), [s.target for s in scenes]


def test_cells_that_a_box_touches() -> None:
    maps = torch.arange(32.0).view(2, 1, 4, 4)  # images of 8x8: cells of 2x2 pixels
    boxes = torch.tensor([
        [0, 0, 0, 2, 2],  # the first cell alone
        [0, 1, 3, 5, 4],  # columns 0 to 2 of row 1: 4, 5, 6
        [1, 6.5, 6.5, 8, 8],  # the last cell of the second image
        [1, 2, 0, 6, 8],  # columns 1 and 2 of all rows: 17, 18, 21, 22, ...
    ])  # fmt: skip
    assert _cropped(maps, boxes, (8, 8)).flatten().tolist() == [0, 5, 31, 23.5]
    assert _cropped(maps, boxes[:0], (8, 8)).shape == (0, 1)


def test_vectors_are_what_the_network_has_there(model: Detector, scenes) -> None:
    images, targets = stacked(scenes)
    found, labels = model.class_features(images, targets)
    assert labels.tolist() == [k for t in targets for k in t.labels.tolist()] and len(found) == len(labels)
    assert torch.equal(found, model.class_features(images, targets, model.feature_maps(images))[0])
    network = model.network
    row = 0
    for image, target in zip(images, targets, strict=True):
        inputs = model.preprocess(image[None], model.new_samples(image[None]))
        for x1, y1, x2, y2 in target.corners().tolist():
            if hasattr(network, "roi_head"):
                roi = torch.tensor([[0, x1, y1, x2, y2]], dtype=torch.float32)
                head = network.roi_head
                expected = head._bbox_forward(network.extract_feat(inputs), roi)["bbox_feats"].mean((2, 3))[0]
            else:
                last = network.backbone(inputs)[-1]  # cells of 16x16 pixels
                cells = [
                    last[0, :, i, j]
                    for i in range(6)
                    for j in range(6)
                    if i * 16 < y2 and (i + 1) * 16 > y1 and j * 16 < x2 and (j + 1) * 16 > x1
                ]
                expected = torch.stack(cells).mean(0)
            assert torch.allclose(found[row], expected, atol=1e-5)
            row += 1
    assert row == len(found)


def test_gradients_by_finite_differences(model: Detector, scenes) -> None:
    images, targets = stacked(scenes[:2])
    generator = torch.Generator().manual_seed(0)
    x = images.clone().requires_grad_()
    vectors, _ = model.class_features(x, targets)
    weights = torch.randn(vectors.shape, generator=generator)
    (grad,) = torch.autograd.grad((vectors * weights).sum(), x)
    assert (grad != 0).flatten(1).any(1).all()
    # A step along the gradient, small enough that few ReLUs switch and large enough for float32.
    direction = grad / grad.norm()
    values = []
    for h in (1e-3, -1e-3):
        with torch.no_grad():
            moved = model.class_features(images + h * direction, targets)[0]
            values.append(float((moved.double() * weights.double()).sum()))
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(float((grad * direction).sum()), rel=1e-2)


def test_red_and_blue_are_not_the_same(model: Detector, scenes) -> None:
    images, targets = stacked(scenes)
    first, swapped = (model.class_features(x, targets)[0] for x in (images, images.flip(1)))
    assert not torch.allclose(first, swapped, rtol=1e-2)


def test_images_do_not_depend_on_each_other_one_at_a_time(model: Detector, scenes) -> None:
    images, targets = stacked(scenes)
    together, _ = model.class_features(images, targets)
    alone = torch.cat([model.class_features(images[i : i + 1], targets[i : i + 1])[0] for i in range(4)])
    assert torch.equal(together, alone)
    model.micro_batch = 4
    try:
        assert torch.allclose(model.class_features(images, targets)[0], alone, atol=1e-4)
    finally:
        model.micro_batch = None


def test_crowds_and_difficult_objects_have_no_vector(model: Detector, scenes) -> None:
    images, targets = stacked(scenes)
    skipped = [replace(t, crowd=np.ones(len(t), dtype=bool)) for t in targets]
    found, labels = model.class_features(images, skipped)
    assert found.shape == (0, model.class_features(images, targets)[0].shape[1]) and labels.shape == (0,)
    first = replace(targets[0], ignore=np.arange(len(targets[0])) > 0)
    assert len(model.class_features(images[:1], [first])[1]) == 1


def test_features_of_several_maps_are_joined(model: Detector, scenes) -> None:
    images, _ = stacked(scenes[:2])
    inputs = model.preprocess(images, model.new_samples(images))
    maps = model.network.backbone(inputs)
    joined = model.features(images, "backbone")
    assert torch.allclose(joined, torch.cat([m.flatten(1) for m in maps], 1), atol=1e-4)
    neck = model.features(images, "neck")
    assert torch.allclose(
        neck, torch.cat([m.flatten(1) for m in model.network.extract_feat(inputs)], 1), atol=1e-4
    )
    assert model.features(images, "backbone.layer2").ndim == 4
