"""The adapter in front of MMDetection: gradients, channel order, coordinates, independence of images."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bench.errors import GridError, NotApplicable, WeightsError
from bench.protocols import Geometry, ImageRNG, Sample
from bench.registry import MODELS
from tasks.detection.datasets import MiniScenes
from tasks.detection.model import Detector, loss_group
from tasks.detection.objects import Objects
from tasks.mm.configs import InputSpec

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    scenes = MiniScenes(count=4)
    return [scenes[i] for i in range(4)]


def stacked(samples: list[Sample]) -> tuple[Tensor, list[Objects]]:
    return torch.stack([s.image for s in samples]), [s.target for s in samples]


def rng(count: int, seed: int = 0) -> ImageRNG:
    return ImageRNG([seed * 1000 + i for i in range(count)])


# -- gradients ------------------------------------------------------------------------------------------------------
@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Callable[[Detector], Detector]:
    """A copy of a model that computes in float64; mmdet's own `.float()` calls then widen instead of narrowing."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)

    def convert(model: Detector) -> Detector:
        exact = copy.deepcopy(model).double()
        for module in exact.modules():
            priors = getattr(module, "prior_generator", None)
            if priors is not None:  # anchors are no buffers, and laid out in float32 unless told otherwise
                priors.base_anchors = [anchors.double() for anchors in priors.base_anchors]
                priors.grid_priors = functools.partial(priors.grid_priors, dtype=torch.float64)
        return exact

    return convert


def hold_proposals(model: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the proposals of the first call: mmdet detaches them, so their motion is no part of the gradient."""
    head = getattr(model.network, "rpn_head", None)
    if head is None:
        return
    original, kept = head.predict_by_feat, []

    def held(*args: object, **kwargs: object) -> object:
        kept.append(copy.deepcopy(original(*args, **kwargs)))
        return copy.deepcopy(kept[0])

    monkeypatch.setattr(head, "predict_by_feat", held)


def misnamed(target: Objects) -> Objects:
    """The objects with wrong labels, which loss `swap` needs; the others do not care."""
    return target.relabelled((target.labels + 1) % target.num_classes)


def test_finite_differences(
    model: Detector,
    samples: list[Sample],
    double: Callable[[Detector], Detector],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exact = double(model)
    image, target = samples[0].image.double()[None], misnamed(samples[0].target)
    generator = torch.Generator().manual_seed(0)
    hold_proposals(exact, monkeypatch)
    for kind in exact.losses:

        def loss(x: Tensor, kind: str = kind) -> Tensor:
            return exact.loss(x, [target], kind, rng=rng(1))[0]

        x = image.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(x), x)
        assert gradient.abs().max() > 0
        directions = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for _ in range(3)]
        for direction in [*directions, gradient / gradient.norm()]:
            h = 1e-8  # small, so that few ReLUs and pooling windows switch in between
            with torch.no_grad():
                numeric = (loss(image + h * direction) - loss(image - h * direction)) / (2 * h)
            analytic = (gradient * direction).sum()
            assert torch.isclose(numeric, analytic, rtol=1e-4, atol=1e-6), (
                kind,
                float(numeric),
                float(analytic),
            )


def test_gradient_reaches_every_pixel_and_no_parameter(model: Detector, samples: list[Sample]) -> None:
    images, targets = stacked(samples[:2])
    images.requires_grad_(True)
    (gradient,) = torch.autograd.grad(model.loss(images, targets, "cls+loc", rng=rng(2)).sum(), images)
    assert torch.isfinite(gradient).all()
    assert (gradient != 0).float().mean() > 0.95
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert not model.train().training


def test_ascending_the_loss_increases_it(
    model: Detector, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    hold_proposals(model, monkeypatch)
    images, targets = stacked(samples[:1])
    targets = [misnamed(target) for target in targets]
    for kind in model.losses:
        x = images.clone().requires_grad_(True)
        value = model.loss(x, targets, kind, rng=rng(1))
        (gradient,) = torch.autograd.grad(value.sum(), x)
        after = model.loss((images + 0.25 / 255 * gradient.sign()).clamp(0, 1), targets, kind, rng=rng(1))
        assert after.item() > value.item()


def test_kinds_add_up(model: Detector, samples: list[Sample]) -> None:
    images, targets = stacked(samples)
    kinds = [kind for kind in model.losses if kind not in ("objectness", "emptiness", "swap")]
    values = {kind: model.loss(images, targets, kind, rng=rng(4)) for kind in kinds}
    assert torch.allclose(values["cls"] + values["loc"], values["cls+loc"], rtol=1e-5)
    whole = values["cls+loc"] + values["mask"] if "mask" in values else values["cls+loc"]
    assert torch.allclose(whole, values["total"], rtol=1e-5)
    assert all((v > 0).all() for v in values.values())


def test_swapping_red_and_blue_changes_the_output(model: Detector, samples: list[Sample]) -> None:
    images, targets = stacked(samples)
    swapped = images.flip(1)
    assert not torch.allclose(
        model.loss(images, targets, "cls", rng=rng(4)),
        model.loss(swapped, targets, "cls", rng=rng(4)),
        rtol=1e-2,
    )
    first, second = model.predict(images), model.predict(swapped)
    assert any(
        len(a) != len(b) or not torch.allclose(a.scores, b.scores, atol=1e-3)
        for a, b in zip(first, second, strict=True)
    )


def test_channel_order_reaches_the_network_as_the_config_says(model: Detector) -> None:
    red = torch.zeros(1, 3, 96, 96)
    red[:, 0] = 1.0
    pixels = model.pixels(red)[0]
    assert pixels[2].min() == 255 and pixels[:2].max() == 0  # as cv2 loads it: BGR
    mean, std = model.network.data_preprocessor.mean.flatten(), model.network.data_preprocessor.std.flatten()
    inputs = model.preprocess(red, model.new_samples(red))
    assert torch.allclose(inputs[0, :, 5, 5], (torch.tensor([255.0, 0, 0]) - mean) / std)


# -- independence and determinism -----------------------------------------------------------------------------------
def test_no_image_depends_on_another(model: Detector, samples: list[Sample]) -> None:
    images, targets = stacked(samples)
    streams = rng(4)

    def run(order: list[int]) -> dict[int, tuple[Tensor, Tensor]]:
        x = images[order].clone().requires_grad_(True)
        losses = model.loss(x, [targets[i] for i in order], "cls+loc", rng=streams.select(order))
        (gradient,) = torch.autograd.grad(losses.sum(), x)
        return {i: (losses[k].detach(), gradient[k]) for k, i in enumerate(order)}

    together = run([0, 1, 2, 3])
    for order in ([3, 1], [2], [0, 3, 2]):
        for i, (value, gradient) in run(order).items():
            assert torch.equal(value, together[i][0])
            assert torch.equal(gradient, together[i][1])
    alone = [model.predict(image[None])[0] for image in images]
    for one, other in zip(alone, model.predict(images), strict=True):
        assert torch.equal(one.boxes, other.boxes) and torch.equal(one.scores, other.scores)


def test_sampling_follows_the_stream_and_leaves_the_global_one(
    model: Detector, samples: list[Sample]
) -> None:
    images, targets = stacked(samples)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = model.loss(images, targets, "cls+loc", rng=rng(4, seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(first, model.loss(images, targets, "cls+loc", rng=rng(4, seed=1)))
    other = model.loss(images, targets, "cls+loc", rng=rng(4, seed=2))
    # SSD mines its negatives by rank; Mask R-CNN draws its anchors and proposals.
    assert torch.equal(first, other) == (not model.with_mask)
    assert torch.equal(model.loss(images, targets, "cls"), model.loss(images, targets, "cls"))


# -- ground truth -----------------------------------------------------------------------------------------------------
def enlarged(sample: Sample, size: tuple[int, int]) -> Sample:
    """The scene stretched to (height, width), boxes and masks with it."""
    from pycocotools import mask as coco_mask

    pixels = Image.fromarray((sample.image * 255).round().byte().permute(1, 2, 0).numpy())
    image = np.asarray(pixels.resize((size[1], size[0]), Image.Resampling.BILINEAR))
    factor = np.array([size[1] / 96, size[0] / 96] * 2)
    masks = []
    for mask in sample.target.bitmaps(np.ones(len(sample.target), dtype=bool)):
        grown = np.asarray(Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST))
        masks.append(coco_mask.encode(np.asfortranarray(grown.astype(np.uint8))))
    target = Objects(sample.target.boxes * factor, sample.target.labels, size, 10, masks=tuple(masks))
    return Sample(torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255, target, sample.id)


@pytest.mark.parametrize("size", [(150, 110), (120, 240), (96, 96), (70, 64)])
def test_ground_truth_meets_the_network_input(
    model: Detector, samples: list[Sample], size: tuple[int, int], tmp_path: Path
) -> None:
    """Against mmdet's own transforms with LoadAnnotations before Resize, as in training."""
    from mmcv.transforms import Compose
    from mmdet.structures.mask import BitmapMasks

    original = enlarged(samples[1], size)
    path = tmp_path / "image.png"
    Image.fromarray((original.image * 255).round().byte().permute(1, 2, 0).numpy()).save(path)
    prepared = model.prepare(original)
    sample = model._with_truth(prepared.image[None], prepared.target, (1.0, 1.0), (0.0, 0.0))
    masks = original.target.bitmaps(np.ones(len(original.target), dtype=bool))
    stock = Compose(
        [
            {"type": "LoadImageFromFile"},
            {"type": "mmdet.Resize", "scale": (96, 96), "keep_ratio": model.spec.keep_ratio},
        ]
    )(
        {
            "img_path": str(path),
            "gt_bboxes": original.target.corners().astype(np.float32),
            "gt_masks": BitmapMasks(masks.astype(np.uint8), *size),
        }
    )
    expected = torch.from_numpy(np.asarray(stock["gt_bboxes"], dtype=np.float32))
    if model.spec.keep_ratio and size[0] != size[1]:
        assert prepared.image.shape[1] != prepared.image.shape[2]
    # Our image is what cv2 makes of the file, in RGB.
    pixels = (prepared.image * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(pixels[:, :, ::-1], stock["img"])
    assert torch.allclose(sample.gt_instances.bboxes, expected, atol=2e-2)
    assert sample.img_shape == stock["img"].shape[:2]
    if model.with_mask:
        ours, theirs = sample.gt_instances.masks.masks.astype(bool), stock["gt_masks"].masks.astype(bool)
        assert ours.shape == theirs.shape
        overlap = (ours & theirs).sum((1, 2)) / (ours | theirs).sum((1, 2))
        assert overlap.min() > (0.99 if size == (96, 96) else 0.75)
        # Masks and boxes describe the same place.
        for box, mask in zip(sample.gt_instances.bboxes.numpy(), ours, strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            tight = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert np.abs(box - tight).max() < 1.6


def test_wrong_coordinates_give_another_loss(model: Detector, samples: list[Sample]) -> None:
    """The trap of test pipelines: ground truth left in original coordinates attacks the wrong place."""
    original = enlarged(samples[1], (192, 192))
    prepared = model.prepare(original)
    right = model.loss(prepared.image[None], [prepared.target], "cls+loc", rng=rng(1))
    wrong = model.loss(prepared.image[None], [original.target], "cls+loc", rng=rng(1))
    same = model.loss(samples[1].image[None], [samples[1].target], "cls+loc", rng=rng(1))
    assert wrong > 3 * right
    assert abs(right - same) < 1.0 + same


def test_predictions_equal_mmdets_own(model: Detector, samples: list[Sample], tmp_path: Path) -> None:
    """Through mmdet's test pipeline, preprocessor and rescaling to the original image."""
    from mmcv.transforms import Compose

    size = (150, 110)
    original = enlarged(samples[1], size)
    path = tmp_path / "image.png"
    Image.fromarray((original.image * 255).round().byte().permute(1, 2, 0).numpy()).save(path)
    pipeline = Compose(
        [
            {"type": "LoadImageFromFile"},
            {"type": "mmdet.Resize", "scale": (96, 96), "keep_ratio": model.spec.keep_ratio},
            {"type": "mmdet.PackDetInputs", "meta_keys": ("ori_shape", "img_shape", "scale_factor")},
        ]
    )
    packed = pipeline({"img_path": str(path)})
    with torch.no_grad():
        data = model.network.data_preprocessor(
            {"inputs": [packed["inputs"]], "data_samples": [packed["data_samples"]]}, False
        )
        (stock,) = model.network.predict(data["inputs"], data["data_samples"], rescale=True)
    prepared = model.prepare(original)
    (ours,) = model.predict(prepared.image[None])
    assert len(ours) == len(stock.pred_instances) > 0
    assert torch.equal(ours.labels, stock.pred_instances.labels)
    assert torch.allclose(ours.scores, stock.pred_instances.scores, atol=1e-5)
    sy, sx = prepared.target.scale
    back = ours.boxes / torch.tensor([sx, sy, sx, sy])
    assert torch.allclose(back, stock.pred_instances.bboxes, atol=1e-2)


def test_detects_the_scenes(model: Detector, samples: list[Sample]) -> None:
    """Coordinates come out where they went in: the best boxes lie on the digits."""
    from tasks.detection.task import Detection

    images, targets = stacked(samples)
    scores = [
        Detection().rows(found, target)["score"]
        for found, target in zip(model.predict(images), targets, strict=True)
    ]
    assert np.mean(scores) > 0.6


# -- geometry ---------------------------------------------------------------------------------------------------------
def placed(
    images: Tensor, scale: float, offset: tuple[int, int], size: tuple[int, int]
) -> tuple[Tensor, Geometry]:
    """Images enlarged and put on a grey canvas, as a resizing and padding defense does."""
    height, width = round(images.shape[-2] * scale), round(images.shape[-1] * scale)
    small = torch.nn.functional.interpolate(
        images, size=(height, width), mode="bilinear", align_corners=False
    )
    canvas = torch.full((len(images), 3, *size), 0.5)
    canvas[:, :, offset[0] : offset[0] + height, offset[1] : offset[1] + width] = small
    count = len(images)
    shift = torch.tensor([offset], dtype=torch.float32).expand(count, 2)
    return canvas, Geometry(torch.full((count, 2), scale), shift, (96, 96), size)


def test_boxes_and_masks_follow_a_moving_defense(model: Detector, samples: list[Sample]) -> None:
    images, _ = stacked(samples)
    canvas, geometry = placed(images, 1.0, (16, 32), (128, 144))
    matched = 0
    for plain, moved in zip(model.predict(images), model.predict(canvas, geometry=geometry), strict=True):
        sure = plain.scores > 0.8
        assert moved.boxes.min() >= 0 and moved.boxes.max() <= 96
        if moved.masks is not None:
            assert moved.masks.shape[1:] == (96, 96)
        for k in torch.nonzero(sure).flatten().tolist():
            distance = (moved.boxes - plain.boxes[k]).abs().amax(1)
            distance[moved.labels != plain.labels[k]] = 1e3
            best = int(distance.argmin())
            if distance[best] < 3:
                matched += 1
                if moved.masks is not None and plain.masks is not None:
                    a, b = moved.masks[best], plain.masks[k]
                    assert (a & b).sum() / (a | b).sum() > 0.6
    assert matched >= 3


def test_ground_truth_follows_a_moving_defense(model: Detector, samples: list[Sample]) -> None:
    images, targets = stacked(samples)
    canvas, geometry = placed(images, 1.25, (3, 7), (130, 131))
    for index, target in enumerate(targets):
        scale, offset = (1.25, 1.25), (3.0, 7.0)
        sample = model._with_truth(canvas[index : index + 1], target, scale, offset)
        expected = torch.from_numpy(target.corners() * 1.25 + np.array([7, 3, 7, 3])).float()
        assert torch.allclose(sample.gt_instances.bboxes, expected)
        if model.with_mask:
            box, mask = expected[0].numpy(), sample.gt_instances.masks.masks[0]
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert np.abs(box - [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).max() < 1.3
    still = Geometry(torch.ones(4, 2), torch.zeros(4, 2), (96, 96), (96, 96))
    plain = model.loss(images, targets, "cls", rng=rng(4))
    assert torch.equal(plain, model.loss(images, targets, "cls", geometry=still, rng=rng(4)))
    followed = model.loss(canvas, targets, "cls+loc", geometry=geometry, rng=rng(4))
    ignored = model.loss(canvas, targets, "cls+loc", rng=rng(4))
    assert (followed < ignored).all()


def test_objects_moved_out_of_the_image_are_no_targets(model: Detector, samples: list[Sample]) -> None:
    image, target = samples[0].image[None], samples[0].target
    assert model._with_truth(image, target, (1.0, 1.0), (0.0, 200.0)) is None
    clipped = model._with_truth(image, target, (4.0, 4.0), (0.0, 0.0))
    assert clipped is None or clipped.gt_instances.bboxes.max() <= 96


# -- special images and wrong use -----------------------------------------------------------------------------------
def test_image_without_ground_truth_stays_clean(model: Detector, samples: list[Sample]) -> None:
    empty = Objects(np.zeros((0, 4)), np.zeros(0, dtype=np.int64), (96, 96), 10, masks=())
    crowd = Objects(
        samples[1].target.boxes, samples[1].target.labels, (96, 96), 10, masks=samples[1].target.masks,
        crowd=np.ones(len(samples[1].target), dtype=bool),
    )  # fmt: skip
    images = torch.stack([samples[0].image, samples[1].image, samples[0].image]).requires_grad_(True)
    losses = model.loss(images, [empty, crowd, samples[0].target], "cls+loc", rng=rng(3))
    (gradient,) = torch.autograd.grad(losses.sum(), images)
    assert losses[:2].tolist() == [0.0, 0.0] and losses[2] > 0
    assert gradient[:2].abs().max() == 0 and gradient[2].abs().max() > 0
    assert len(model.predict(images[:1].detach())) == 1


def test_wrong_losses_and_classes(model: Detector, samples: list[Sample]) -> None:
    images, targets = stacked(samples[:1])
    with pytest.raises(GridError, match="unknown loss of task detection 'clas': did you mean 'cls'"):
        model.loss(images, targets, "clas")
    boxes_only = Objects(targets[0].boxes, targets[0].labels, (96, 96), 10)
    if model.with_mask:
        with pytest.raises(NotApplicable, match="the dataset has no masks"):
            model.loss(images, [boxes_only], "mask")
    else:
        assert model.losses == ("cls", "loc", "cls+loc", "total", "objectness", "emptiness", "swap")
        with pytest.raises(NotApplicable, match="no mask loss"):
            model.loss(images, targets, "mask")
    assert model.loss(images, [boxes_only], "cls", rng=rng(1)).isfinite().all()
    other = Objects(targets[0].boxes, targets[0].labels, (96, 96), 20)
    with pytest.raises(GridError, match="predicts 10 classes, the dataset has 20"):
        model.prepare(Sample(images[0], other, "x"))


def test_the_preprocessor_knows_where_the_network_is() -> None:
    loaded = MODELS.create("mini_ssd").load(CPU)
    assert loaded.to("meta").network.data_preprocessor.device == torch.device("meta")


def test_features(model: Detector, samples: list[Sample]) -> None:
    images, _ = stacked(samples[:2])
    images.requires_grad_(True)
    found = model.features(images, "backbone.layer2")
    assert found.shape == (2, 48, 12, 12)
    (gradient,) = torch.autograd.grad(found.sum(), images)
    assert gradient.abs().max() > 0
    with pytest.raises(GridError, match=r"did you mean 'backbone\.layer2'"):
        model.features(images, "backbone.layer22")


def test_padding_of_the_pipeline(model: Detector, samples: list[Sample]) -> None:
    spec = InputSpec(pad_divisor=32, pad_value=(114.0, 114.0, 114.0))
    padded = Detector(model.network, spec, 10)
    images = torch.stack([samples[0].image[:, :90, :70]])
    inputs, data = padded.collate(images, padded.new_samples(images))
    assert inputs.shape[-2:] == (96, 96) and data[0].img_shape == (96, 96)
    preprocessor = model.network.data_preprocessor
    grey = ((torch.full((3,), 114.0) - preprocessor.mean.flatten()) / preprocessor.std.flatten()).tolist()
    assert inputs[0, :, -1, -1].tolist() == pytest.approx(grey)
    (found,) = padded.predict(images)
    assert found.masks is None or found.masks.shape[1:] == (90, 70)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("loss_cls", "cls"), ("loss_rpn_cls", "cls"), ("s1.loss_cls", "cls"), ("loss_conf", "cls"), ("loss_obj", "cls"),
        ("loss_center_heatmap", "cls"), ("loss_bbox", "loc"), ("loss_rpn_bbox", "loc"), ("d3.loss_iou", "loc"),
        ("loss_centerness", "loc"), ("loss_dfl", "loc"), ("loss_xy", "loc"), ("loss_wh", "loc"), ("loss_mask", "mask"),
        ("loss_mask_iou", "mask"), ("acc", None), ("s0.acc", None), ("recall@thr", None),
    ],
)  # fmt: skip
def test_loss_groups(name: str, group: str | None) -> None:
    assert loss_group(name) == group


def test_unknown_loss_is_reported() -> None:
    with pytest.raises(GridError, match="'loss_surprise'"):
        loss_group("loss_surprise")


def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = MODELS.create("mini_ssd")
    identity = source.identity()
    assert identity["config"] == "mini_ssd" and len(identity["weights_sha256"]) == 64
    assert str(tmp_path.root) not in str(identity).replace("mini_ssd", "")
    assert source.input_spec()["scale"] == [96, 96]
    source.checkpoint = tmp_path / "mini_ssd.safetensors"
    with pytest.raises(WeightsError, match="rebuild it with `python -m bench zoo build mini_ssd`"):
        source.load(CPU)
    source.checkpoint.write_bytes(MODELS.create("mini_mask_rcnn").checkpoint.read_bytes())
    with pytest.raises(WeightsError, match="has SHA-256"):
        source.load(CPU)
    source.weights_sha256 = None
    with pytest.raises(WeightsError, match="another model"):
        source.load(CPU)
