"""The adapter in front of mmseg: inference as mmseg does it, masked losses, gradients to the pixels, geometry."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench.errors import DataError, GridError, WeightsError
from bench.protocols import Batch, Geometry, Sample
from bench.registry import DATASETS, DEFENSES, METRICS, MODELS, TASKS
from tasks.mini import manifest
from tasks.mm.base import build_network
from tasks.mm.configs import load_config
from tasks.segmentation.model import _MiniSegmenter

CPU = torch.device("cpu")
PSP, ASPP = "type='PSPHead', pool_scales=(1, 2, 3)", "type='ASPPHead', dilations=(1, 2, 3)"
WHOLE, SLIDE = "dict(mode='whole')", "dict(mode='slide', crop_size=(24, 24), stride=(16, 16))"
CONFIG = """
default_scope = "mmseg"
norm = dict(type="SyncBN", requires_grad=True)
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor", mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375],
        bgr_to_rgb={bgr_to_rgb}, pad_val=0, seg_pad_val=255, size=(64, 64), test_cfg=dict(size_divisor={divisor}),
    ),
    pretrained="open-mmlab://resnet50_v1c",
    backbone=dict(type="ResNetV1c", depth=18, base_channels=8, stem_channels=8, num_stages=4,
                  out_indices=(0, 1, 2, 3), strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), norm_cfg=norm),
    decode_head=dict({head}, in_channels=64, in_index=3, channels=8, dropout_ratio=0.1, num_classes=5,
                     norm_cfg=norm, align_corners=False, loss_decode=dict(type="CrossEntropyLoss")),
    auxiliary_head=dict(type="FCNHead", in_channels=32, in_index=2, channels=8, num_convs=1, num_classes=5,
                        norm_cfg=norm, align_corners=False, loss_decode=dict(type="CrossEntropyLoss")),
    train_cfg=dict(), test_cfg={test},
)
test_pipeline = [
    dict(type="LoadImageFromFile"), dict(type="Resize", scale=(40, 32), keep_ratio=True),
    dict(type="LoadAnnotations"), dict(type="PackSegInputs"),
]
"""


def randomised(network):
    """Random weights with class scores that differ, and random batch statistics."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    nn.init.normal_(network.decode_head.conv_seg.weight, std=0.5)
    return network


def checkpoint(network, path):
    """As OpenMMLab publishes them: weights with a history of log curves beside."""
    from mmengine.logging import HistoryBuffer

    buffer = HistoryBuffer()
    buffer.update(0.5)
    hub = {"log_scalars": {"train/loss": buffer}, "runtime_info": {"iter": 40000}, "resumed_keys": {}}
    meta = {"mmseg_version": "1.2.2", "dataset_meta": {"classes": ["a"]}, "iter": 40000}
    torch.save({"meta": meta, "message_hub": hub, "state_dict": network.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("segmenters")


MADE = {}


def make(folder, head=PSP, test=WHOLE, divisor=1, bgr_to_rgb=True, scale=None):
    """A segmenter read from a config file and a checkpoint file; its network built apart from it beside."""
    key = (head, test, divisor, bgr_to_rgb, scale)
    if key not in MADE:
        stem = folder / f"model{len(MADE)}"
        config = stem.with_suffix(".py")
        config.write_text(CONFIG.format(head=head, test=test, divisor=divisor, bgr_to_rgb=bgr_to_rgb))
        network = randomised(build_network("mmseg", load_config("mmseg", str(config)), "test"))
        path = checkpoint(network, stem.with_suffix(".pth"))
        params = {"config": str(config), "checkpoint": str(path), "scale": scale}
        source = MODELS.create("mmseg", params)
        MADE[key] = SimpleNamespace(source=source, model=source.load(CPU), network=network, params=params)
    return MADE[key]


def images(n=2, size=(32, 40)):
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(7 + n))


def labels(n=2, size=(32, 40), classes=5):
    generator = torch.Generator().manual_seed(11)
    coarse = torch.randint(0, classes, (n, 1, 4, 5), generator=generator).float()
    maps = F.interpolate(coarse, size=size, mode="nearest").long()[:, 0]
    maps[:, ::7] = 255
    return list(maps)


def by_mmseg(network, x):
    """Class scores by mmseg's own predict, fed as its data loader does."""
    from mmengine.config import ConfigDict
    from mmseg.structures import SegDataSample

    network.test_cfg = ConfigDict(network.test_cfg)
    shape = tuple(x.shape[-2:])
    sample = SegDataSample(metainfo={"ori_shape": shape, "img_shape": shape, "pad_shape": shape})
    bgr = (x.flip(0) * 255).float()
    data = network.data_preprocessor({"inputs": [bgr], "data_samples": [sample]}, False)
    with torch.no_grad():
        return network.predict(data["inputs"], data["data_samples"])[0]


# -- inference ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("head", "test", "divisor"), [(PSP, WHOLE, 1), (ASPP, WHOLE, 1), (PSP, SLIDE, 1), (PSP, WHOLE, 32)]
)
def test_logits_and_labels_are_mmsegs(folder, head, test, divisor):
    made = make(folder, head, test, divisor)
    x = images()
    logits, said = made.model.logits(x), made.model.predict(x)
    assert logits.shape == (2, 5, 32, 40) and logits.std() > 0.05
    for i in range(2):
        expected = by_mmseg(made.network, x[i])
        assert torch.allclose(logits[i], expected.seg_logits.data, atol=1e-5)
        # Where two scores tie to the last bits either label is right.
        top = logits[i].topk(2, dim=0).values
        clear = top[0] - top[1] > 1e-4
        assert (
            torch.equal(said[i][clear], expected.pred_sem_seg.data[0][clear]) and clear.float().mean() > 0.99
        )
    assert said[0].dtype == torch.int64 and (logits.std(dim=(2, 3)) > 0.01).all()


def test_sliding_window_differs_from_whole_and_repeats(folder):
    """mmseg's sliding window writes into its arguments: a second call must give the same."""
    whole, slide = make(folder).model, make(folder, test=SLIDE).model
    x = images()
    assert not torch.allclose(whole.logits(x), slide.logits(x), atol=1e-3)
    assert torch.equal(slide.logits(x), slide.logits(x))


def test_swapping_red_and_blue_changes_the_output(folder):
    x = images()
    model, other = make(folder).model, make(folder, bgr_to_rgb=False).model
    assert not torch.allclose(model.logits(x), model.logits(x.flip(1)), atol=1e-3)
    # A config that does not flip channels sees BGR, as the file loader of mmseg gives it.
    other.network.load_state_dict(model.network.state_dict())
    mean = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
    std = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    seen = []
    hook = other.network.backbone.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    other.logits(x[:1])
    hook.remove()
    assert torch.allclose(seen[0][0], (x[0].flip(0) * 255 - mean) / std, atol=1e-5)


def test_frozen_without_synchronised_batch_norm(folder):
    model = make(folder).model
    model.train()
    assert not any(m.training for m in model.modules()) and not any(
        p.requires_grad for p in model.parameters()
    )
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())


def test_data_preprocessor_follows_to_another_device(folder):
    """Without a second device: the meta device shows whether the preprocessor notices a move."""
    made = make(folder)
    model = type(made.model)(
        build_network("mmseg", load_config("mmseg", made.params["config"]), "x"), made.model.spec, 5
    )
    assert model.to("meta").network.data_preprocessor.device.type == "meta"


# -- losses ---------------------------------------------------------------------------------------------------------
def test_losses_by_hand(folder):
    model = make(folder).model
    z, y = torch.randn(2, 5, 6, 7), [t[:6, :7] for t in labels()]
    ce, margin = model.loss_from_logits(z, y, "ce"), model.loss_from_logits(z, y, "margin")
    for i in range(2):
        terms, margins = [], []
        for r in range(6):
            for c in range(7):
                k = int(y[i][r, c])
                if k == 255:
                    continue
                scores = z[i, :, r, c]
                terms.append(float(-scores.log_softmax(0)[k]))
                others = torch.cat([scores[:k], scores[k + 1 :]])
                margins.append(min(float(others.max() - scores[k]), 0.0))
        assert float(ce[i]) == pytest.approx(np.mean(terms), abs=1e-5)
        assert float(margin[i]) == pytest.approx(np.mean(margins), abs=1e-5)


def test_ignored_and_wrong_pixels_get_no_gradient(folder):
    model = make(folder).model
    z = torch.randn(1, 5, 6, 7, requires_grad=True)
    y = labels()[0][:6, :7]
    (ce,) = torch.autograd.grad(model.loss_from_logits(z, [y], "ce").sum(), z)
    (margin,) = torch.autograd.grad(model.loss_from_logits(z, [y], "margin").sum(), z)
    ignored, right = y == 255, z[0].argmax(0) == y
    assert ignored.any() and right.any()
    assert (ce[0][:, ignored] == 0).all() and (ce[0][:, ~ignored] != 0).all()
    assert (margin[0][:, ~right] == 0).all() and (margin[0][:, right].abs().sum(0) > 0).all()


def test_nothing_labelled_is_loss_zero(folder):
    model = make(folder).model
    x = images(1).requires_grad_(True)
    loss = model.loss(x, [torch.full((32, 40), 255)], "ce")
    assert loss.tolist() == [0.0] and (torch.autograd.grad(loss.sum(), x)[0] == 0).all()


def test_ce_is_mmsegs_decode_loss(folder):
    """mmseg averages over all pixels, ignored ones too; here the mean is over the labelled ones."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    made = make(folder)
    x, y = images(1), labels(1)
    sample = SegDataSample(metainfo={"img_shape": (32, 40)}, gt_sem_seg=PixelData(data=y[0][None]))
    inputs = made.model.preprocess(x, made.model.new_samples(x))
    theirs = made.network.loss(inputs, [sample])["decode.loss_ce"]
    share = float((y[0] != 255).float().mean())
    assert float(made.model.loss(x, y, "ce")) * share == pytest.approx(float(theirs), abs=1e-5)


def test_wrong_requests(folder):
    model = make(folder).model
    with pytest.raises(GridError, match="did you mean 'margin'"):
        model.loss(images(1), labels(1), "margn")
    with pytest.raises(DataError, match="label 7, the model predicts 5 classes"):
        model.loss(images(1), [torch.full((32, 40), 7)], "ce")
    with pytest.raises(GridError, match="prepare the samples first"):
        model.loss(images(1), labels(1, (30, 40)), "ce")
    with pytest.raises(GridError, match=r"did you mean 'backbone\.layer2'"):
        model.features(images(1), "backbone.layr2")


# -- gradients ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["ce", "margin"])
@pytest.mark.parametrize(("head", "test"), [(PSP, WHOLE), (ASPP, WHOLE), (PSP, SLIDE)])
def test_gradient_against_finite_differences(folder, head, test, kind):
    model = make(folder, head, test).model
    y = labels(1)
    # Nothing is clipped: a step out of [0,1] is no matter here.
    x = (images(1) * 0.8 + 0.1).requires_grad_(True)
    (grad,) = torch.autograd.grad(model.loss(x, y, kind).sum(), x)
    generator = torch.Generator().manual_seed(5)
    directions = [torch.randn(x.shape, generator=generator) for _ in range(3)]
    # Along the gradient, and along it with some noise, the signal is far above float32's rounding.
    unit = grad / grad.norm()
    for direction in [unit, *(0.6 * unit + 0.8 * d / d.norm() for d in directions)]:
        h = 1e-3
        with torch.no_grad():
            up, down = (float(model.loss(x + s * h * direction, y, kind).double()) for s in (1, -1))
        numeric, analytic = (up - down) / (2 * h), float((grad * direction).sum())
        assert numeric == pytest.approx(analytic, rel=0.05), (numeric, analytic)


@pytest.mark.parametrize("head", [PSP, ASPP])
def test_bitwise_the_same_in_any_batch(folder, head):
    """For networks run one at a time and, as the mini segmenters are, four at a time."""
    made = make(folder, head)
    four = _MiniSegmenter(made.network, made.model.spec, 5)
    x, y = images(7), labels(7)
    for model in (made.model, four):
        results = {}
        for size in (7, 1, 2, 5):
            losses, grads = [], []
            for start in range(0, 7, size):
                part = x[start : start + size].clone().requires_grad_(True)
                loss = model.loss(part, y[start : start + size], "ce")
                grads.append(torch.autograd.grad(loss.sum(), part)[0])
                losses.append(loss.detach())
            results[size] = torch.cat(losses), torch.cat(grads)
        for loss, grad in results.values():
            assert torch.equal(loss, results[7][0]) and torch.equal(grad, results[7][1])


def test_features(folder):
    made = make(folder)
    x = images()
    features = made.model.features(x, "backbone.layer2")
    expected = made.network.backbone(made.model.preprocess(x, made.model.new_samples(x)))[1]
    assert torch.allclose(features, expected, atol=1e-4)


# -- ground truth and geometry --------------------------------------------------------------------------------------
def test_prepare_resizes_label_map_with_the_image(folder):
    """A picture of its own label map: after resizing, colours still say what the labels say."""
    model = make(folder).model
    target = labels(1, (64, 80))[0]
    target[target == 255] = 0
    sample = Sample(target.float()[None].expand(3, -1, -1) / 5, target, "a")
    prepared = model.prepare(sample)
    assert prepared.image.shape == (3, 32, 40) and prepared.target.shape == (32, 40)
    agree = (prepared.image[0] * 5).round() == prepared.target
    assert agree.float().mean() > 0.8 and agree[2:6, 2:6].all()
    # Nearest neighbour invents no label, and mmseg's own transform gives the same map.
    from mmseg.datasets.transforms import Resize

    step = Resize(scale=(40, 32), keep_ratio=True)
    pixels = (sample.image * 255).round().byte().permute(1, 2, 0).numpy()
    theirs = step(
        {"img": pixels, "gt_seg_map": target.numpy().astype(np.uint8), "seg_fields": ["gt_seg_map"]}
    )
    assert np.array_equal(theirs["gt_seg_map"], prepared.target.numpy())
    assert np.array_equal(theirs["img"], (prepared.image * 255).round().byte().permute(1, 2, 0).numpy())


def test_labels_the_model_does_not_have(folder):
    with pytest.raises(DataError, match="do not belong together"):
        make(folder).model.prepare(Sample(images(1)[0], torch.full((32, 40), 19), "a"))


def geometry(scales, offsets, in_size, out_size):
    return Geometry(torch.tensor(scales), torch.tensor(offsets), in_size, out_size)


def colour_is_label(x):
    """In place of a network's inference: scores are one-hot of the red channel times 5."""
    return F.one_hot((x[:, 0] * 5).round().long().clamp(0, 4), 5).permute(0, 3, 1, 2).float() * 10


def test_predictions_and_losses_follow_moved_pixels(folder, monkeypatch):
    model = make(folder).model
    monkeypatch.setattr(model, "_inference", colour_is_label)
    target = labels(2)
    for t in target:
        t[t == 255] = 0
    picture = torch.stack(target).float()[:, None].expand(-1, 3, -1, -1) / 5
    still = geometry([[1.0, 1.0]] * 2, [[0.0, 0.0]] * 2, (32, 40), (32, 40))
    assert all(torch.equal(p, t) for p, t in zip(model.predict(picture, geometry=still), target, strict=True))
    # Each image somewhere else on a larger canvas.
    canvas = torch.zeros(2, 3, 50, 60)
    canvas[0, :, 3:35, 5:45], canvas[1, :, 10:42, 20:60] = picture[0], picture[1]
    padded = geometry([[1.0, 1.0]] * 2, [[3.0, 5.0], [10.0, 20.0]], (32, 40), (50, 60))
    assert all(torch.equal(p, t) for p, t in zip(model.predict(canvas, geometry=padded), target, strict=True))
    assert (model.loss(canvas, target, "ce", geometry=padded) < 0.01).all()
    swapped = padded.select([1, 0])
    assert (model.loss(canvas, target, "ce", geometry=swapped) > 1).all()
    # Twice as large, moved: resizing back must not shift by half a pixel.
    large = torch.zeros(2, 3, 70, 90)
    large[:, :, 4:68, 6:86] = F.interpolate(picture, scale_factor=2, mode="nearest")
    resized = geometry([[2.0, 2.0]] * 2, [[4.0, 6.0]] * 2, (32, 40), (70, 90))
    assert all(torch.equal(p, t) for p, t in zip(model.predict(large, geometry=resized), target, strict=True))


def test_gradient_flows_through_geometry(folder):
    model = make(folder).model
    x = images(1, (40, 48)).requires_grad_(True)
    moved = geometry([[1.1, 1.1]], [[2.0, 3.0]], (32, 40), (40, 48))
    (grad,) = torch.autograd.grad(model.loss(x, labels(1), "ce", geometry=moved).sum(), x)
    assert grad.abs().sum() > 0
    direction = grad / grad.norm()
    with torch.no_grad():
        up, down = (
            float(model.loss(x + s * 0.02 * direction, labels(1), "ce", geometry=moved)) for s in (1, -1)
        )
    assert (up - down) / 0.04 == pytest.approx(float(grad.norm()), rel=0.05)


# -- sources --------------------------------------------------------------------------------------------------------
def test_identity_holds_no_paths(folder, tmp_path):
    made = make(folder)
    identity = made.source.identity()
    assert str(folder) not in str(identity) and len(identity["weights_sha256"]) == 64
    assert made.source.input_spec()["scale"] == [40, 32]
    other = MODELS.create("mmseg", {**made.params, "scale": [48, 48]})
    assert other.input_spec()["scale"] == [48, 48] and other.identity() == identity


def test_errors(folder, tmp_path):
    made = make(folder)
    with pytest.raises(WeightsError, match=r"none\.pth does not exist"):
        MODELS.create("mmseg", {**made.params, "checkpoint": str(tmp_path / "none.pth")}).identity()
    with pytest.raises(GridError, match="pspnet_r50-d8"):
        MODELS.create(
            "mmseg", {**made.params, "config": "pspnet_r50-d8_4xb2-40k_cityscape-512x1024"}
        ).identity()
    torch.save({"state_dict": nn.Linear(2, 2).state_dict()}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="another model"):
        MODELS.create("mmseg", {**made.params, "checkpoint": str(tmp_path / "other.pth")}).load(CPU)


def test_importing_the_task_imports_no_openmmlab_package():
    code = (
        "import sys, tasks.segmentation.task, tasks.segmentation.model, tasks.segmentation.datasets; "
        "print([m for m in ('mmseg', 'mmdet', 'mmcv') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- the embedded models --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["mini_pspnet", "mini_deeplabv3"])
def test_mini_segmenters(name):
    """The shipped weights behind the adapter reach their recorded score, whatever the batch."""
    dataset, model = DATASETS.create("mini_scenes_seg"), MODELS.create(name).load(CPU)
    batch = Batch.of([model.prepare(dataset[i]) for i in range(30)])
    task, miou = TASKS.create("segmentation"), METRICS.create("miou")
    rows = [task.rows(p, t) for p, t in zip(model.predict(batch.images), batch.targets, strict=True)]
    recorded = manifest.entry(name)["scores"]["clean"]
    assert miou.value(miou.prepare(rows)) == pytest.approx(recorded, abs=0.1)  # thirty of two hundred scenes
    gradients = []
    for size in (6, 1, 4):
        parts = []
        for start in range(0, 6, size):
            x = batch.images[start : start + size][:6].clone().requires_grad_(True)
            loss = model.loss(x, batch.targets[start : start + len(x)], "ce")
            parts.append(torch.autograd.grad(loss.sum(), x)[0])
        gradients.append(torch.cat(parts)[:6])
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])


# -- full size ------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["pspnet_r50-d8_4xb2-40k_cityscapes-512x1024", "deeplabv3_r50-d8_4xb2-40k_cityscapes-512x1024"]
)
def test_full_size_model_from_packaged_config(tmp_path, name):
    """Clean image, one gradient step, a defense, rows and metrics; weights through a file in OpenMMLab's format."""
    network = build_network("mmseg", load_config("mmseg", name), name)
    torch.manual_seed(0)
    nn.init.normal_(network.decode_head.conv_seg.weight, std=0.3)
    path = checkpoint(network, tmp_path / "w.pth")
    expected = network.decode_head.conv_seg.weight.clone()
    del network
    model = MODELS.create("mmseg", {"config": name, "checkpoint": str(path), "scale": [128, 128]}).load(CPU)
    path.unlink()
    assert torch.equal(model.network.decode_head.conv_seg.weight, expected) and model.num_classes == 19
    original = Sample(images(1, (96, 96))[0], labels(1, (96, 96), 19)[0], "a")
    sample = model.prepare(original)
    assert sample.image.shape == (3, 128, 128) and sample.target.shape == (128, 128)
    task, clean = TASKS.create("segmentation"), sample.image[None]
    x = clean.clone().requires_grad_(True)
    loss = model.loss(x, [sample.target], "ce")
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert torch.isfinite(grad).all() and (grad != 0).float().mean() > 0.9
    attacked = (clean + 8 / 255 * grad.sign()).clamp(0, 1)
    defended = DEFENSES.create("jpeg").purify(attacked)
    said = model.predict(defended.images, geometry=defended.geometry)
    rows = [task.rows(said[0], sample.target)]
    assert rows[0]["pixels"] == int((sample.target != 255).sum())
    assert 0 <= METRICS.create("miou").value(METRICS.create("miou").prepare(rows)) <= 1
    with torch.no_grad():
        assert float(model.loss(attacked, [sample.target], "ce")) > float(loss)
