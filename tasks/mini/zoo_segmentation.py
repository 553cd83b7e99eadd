"""Recipes of the mini segmenters: backbone from digit classification, then mmengine's Runner on fresh scenes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.mini import data, manifest, measure
from tasks.mini.zoo import Progress, recipe
from tasks.mini.zoo_classification import MEAN, STD, to_tensor, train_classifier

CONFIGS = Path(__file__).parents[1] / "segmentation" / "configs"
#: Scenes that the recorded scores are measured on.
TEST_SCENES = 200
_PRETRAIN: dict[str, Any] = {
    "epochs": 40, "batch": 64, "lr": 3e-3, "weight_decay": 0.02, "warmup": 0.2, "easy_share": 0.4,
    "contrast": data.SCENE_CONTRAST, "size": 64,
}  # fmt: skip


class _Classifier(nn.Module):
    """The last stage of a backbone, averaged, and one linear layer."""

    def __init__(self, backbone: nn.Module, channels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.fc = nn.Linear(channels, len(data.CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.backbone(x)[-1].mean(dim=(2, 3)))  # type: ignore[no-any-return]


def segmentation_logits(model: nn.Module, images: Tensor) -> Tensor:
    """``(B, 3, H, W)`` RGB images in [0,1] to ``(B, 11, H, W)`` logits of an mmseg encoder-decoder of this zoo."""
    low = model.decode_head(model.backbone((images - MEAN) / STD))  # type: ignore[operator]
    return F.interpolate(low, size=images.shape[-2:], mode="bilinear", align_corners=False)


#: Attacks whose mIoU is recorded: the grid's usual budget, and the one of the segmentation papers.
ATTACKS: dict[str, dict[str, Any]] = {
    "bim10_8/255": {"eps": 8 / 255, "alpha": 2 / 255, "steps": 10},
    "bim4_0.03": {"eps": 0.03, "alpha": 0.01, "steps": 4},
}


def score_segmenter(
    model: nn.Module,
    split: str = "test",
    count: int = TEST_SCENES,
    device: str | torch.device = "cpu",
    attacks: Sequence[str] = tuple(ATTACKS),
) -> dict[str, float]:
    """Mean IoU over scenes 0 to ``count - 1`` of a split: ``clean``, and under each of the ``attacks``."""
    scenes = [data.scene(split, i) for i in range(count)]
    images = to_tensor(np.stack([s.image for s in scenes])).to(device)
    labels = torch.from_numpy(np.stack([s.label_map for s in scenes]).astype(np.int64)).to(device)
    model = model.to(device).eval()

    def forward(x: Tensor) -> Tensor:
        return segmentation_logits(model, x)

    def score(attack: Mapping[str, Any] | None) -> float:
        counts = torch.zeros(11, 11, dtype=torch.int64, device=device)
        for x, y in zip(images.split(20), labels.split(20), strict=True):
            moved = x
            if attack is not None:
                moved = measure.sign_attack(
                    forward, x, y, random_start=False, ignore=data.IGNORE_LABEL, **attack
                )
            with torch.no_grad():
                counts += measure.confusion(forward(moved).argmax(1), y, 11, data.IGNORE_LABEL)
        return measure.mean_iou(counts)

    return {"clean": score(None), **{name: score(ATTACKS[name]) for name in attacks}}


def _build(
    name: str, out_dir: Path, seed: int, device: str | torch.device, progress: Progress
) -> dict[str, float]:
    from tasks.mm import ops

    ops.install()
    from mmengine.config import Config
    from mmengine.hooks import Hook
    from mmengine.runner import Runner
    from mmseg.registry import MODELS
    from mmseg.utils import register_all_modules

    from tasks.mini import _streams  # noqa: F401  registers MiniSceneStream

    register_all_modules(init_default_scope=True)
    config = Config.fromfile(CONFIGS / f"{name}.py")
    config.train_dataloader.dataset.seed = seed
    total = config.train_cfg.max_iters
    start = time.perf_counter()
    pretrain_steps = _PRETRAIN["epochs"] * (data.SPLIT_SIZES["train"] // _PRETRAIN["batch"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS.build(config.model)
        model.init_weights()
        classifier = _Classifier(model.backbone, model.backbone.feat_dim)
    train_classifier(
        classifier, seed=seed, device=device, **_PRETRAIN,
        progress=lambda done, count, note: progress(done, count + total, f"backbone {note}"),
    )  # fmt: skip

    class Report(Hook):
        """Passes the loss on to ``progress``."""

        def after_train_iter(
            self,
            runner: Any,
            batch_idx: int,
            data_batch: Any = None,
            outputs: Mapping[str, Any] | None = None,
        ) -> None:
            if (runner.iter + 1) % 20 == 0 and outputs:
                note = f"loss {float(outputs['loss']):.3f}"
                progress(pretrain_steps + runner.iter + 1, pretrain_steps + total, note)

    with tempfile.TemporaryDirectory() as work_dir:
        runner = Runner(
            model=model,
            work_dir=work_dir,
            train_dataloader=config.train_dataloader,
            train_cfg=config.train_cfg,
            optim_wrapper=config.optim_wrapper,
            param_scheduler=config.param_scheduler,
            default_hooks=config.default_hooks,
            custom_hooks=[Report()],
            randomness={"seed": seed, "deterministic": False},
            default_scope="mmseg",
            log_level=config.log_level,
            experiment_name=f"{name}_{time.time_ns()}",
        )
        runner.train()
    seconds = time.perf_counter() - start
    path = manifest.weights_path(name, out_dir)
    manifest.save_half(model.state_dict(), path)
    model.load_state_dict(manifest.load_float(path))
    return {**score_segmenter(model, device=device), "seconds": seconds}


def _parameters(name: str) -> dict[str, Any]:
    return {
        "config": f"tasks/segmentation/configs/{name}.py", "backbone": _PRETRAIN, "test_scenes": TEST_SCENES,
        "scene_contrast": data.SCENE_CONTRAST, "photo_contrast": data.PHOTO_CONTRAST,
    }  # fmt: skip


@recipe("mini_pspnet", seed=11, parameters=_parameters("mini_pspnet"))
def build_pspnet(
    out_dir: Path, *, seed: int, device: str | torch.device, progress: Progress
) -> Mapping[str, Any]:
    """PSPNet on a narrow ResNet-18, on the mini scenes."""
    return _build("mini_pspnet", out_dir, seed, device, progress)


@recipe("mini_deeplabv3", seed=12, parameters=_parameters("mini_deeplabv3"))
def build_deeplabv3(
    out_dir: Path, *, seed: int, device: str | torch.device, progress: Progress
) -> Mapping[str, Any]:
    """DeepLabv3 on a narrow ResNet-18, on the mini scenes."""
    return _build("mini_deeplabv3", out_dir, seed, device, progress)
