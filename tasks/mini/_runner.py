"""mmengine's Runner, as the recipes of segmenters and detectors use it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope, Registry
from mmengine.runner import Runner
from torch import nn

from tasks.mini import data, manifest
from tasks.mini.zoo import Progress
from tasks.mini.zoo_classification import BackboneClassifier, train_classifier

#: Changes a batch in place before it is trained on: the network in training mode, the step, and the batch as
#: ``pseudo_collate`` packs it (``inputs``: uint8 BGR images, ``data_samples``: their ground truth).
BeforeStep = Callable[[nn.Module, int, dict[str, Any]], None]


class _Required(TypedDict):
    seed: int
    device: str | torch.device
    progress: Progress


class BuildOptions(_Required, total=False):
    """How to build a segmenter or detector, whichever it is.

    Attributes:
        seed: of the first weights and of the scenes.
        device: where to train.
        progress: told about the training.
        start: shipped model whose weights to start from; a new one unless given.
        before: may change each batch.
    """

    start: str | None
    before: BeforeStep | None


class _Steps(Hook):  # type: ignore[misc]
    """Passes each batch to ``before`` and the loss on to ``report``."""

    def __init__(self, report: Callable[[int, str], None], before: BeforeStep | None) -> None:
        self.report, self.before = report, before

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if self.before is not None:
            self.before(runner.model, runner.iter, data_batch)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Mapping[str, Any] | None = None
    ) -> None:
        done = runner.iter + 1
        if (done % 20 == 0 or done == runner.max_iters) and outputs:
            self.report(done, f"loss {outputs['loss'].item():.3f}")


def run(
    name: str,
    model: nn.Module,
    config: Any,
    *,
    seed: int,
    report: Callable[[int, str], None],
    before: BeforeStep | None = None,
) -> None:
    """Train ``model`` in place as ``config`` says.

    Args:
        name: of the model, for mmengine's registers.
        model: a network of mmseg or mmdet.
        config: its parsed config, with data, optimizer and schedule.
        seed: of mmengine's own draws.
        report: told the steps done and the loss, every 20 steps and at the end.
        before: may change each batch.
    """
    with tempfile.TemporaryDirectory() as work_dir:
        runner = Runner(
            model=model,
            work_dir=work_dir,
            train_dataloader=config.train_dataloader,
            train_cfg=config.train_cfg,
            optim_wrapper=config.optim_wrapper,
            param_scheduler=config.param_scheduler,
            default_hooks=config.default_hooks,
            custom_hooks=[_Steps(report, before)],
            randomness={"seed": seed, "deterministic": False},
            default_scope=config.default_scope,
            log_level=config.log_level,
            experiment_name=f"{name}_{time.time_ns()}",
        )
        runner.train()


def build(
    name: str,
    models: Registry,
    config: Config,
    out_dir: Path,
    *,
    seed: int,
    device: str | torch.device,
    progress: Progress,
    pretrain: Mapping[str, Any] | None,
    start: str | None = None,
    before: BeforeStep | None = None,
) -> tuple[nn.Module, float]:
    """Train a network as its config says and write its weights in half precision.

    Args:
        name: of the weights.
        models: the registry that builds the network.
        config: its parsed config.
        out_dir: folder of the weights.
        seed, device, progress, start, before: see `BuildOptions`.
        pretrain: how a new network's backbone is trained on digits first, see `train_classifier`; None = it is not.

    Returns:
        The network with the weights as written, and the seconds that the training took.
    """
    total = int(config.train_cfg.max_iters)
    ahead = 0
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]), DefaultScope.overwrite_default_scope(config.default_scope):
        torch.manual_seed(seed)
        model = models.build(config.model)
        # Else every tensor's initialisation is told.
        MMLogger.get_current_instance().setLevel(config.log_level)
        model.init_weights()
        classifier = BackboneClassifier(model.backbone, model.backbone.feat_dim)
    if start:
        model.load_state_dict(manifest.load(start))
    elif pretrain is not None:
        ahead = pretrain["epochs"] * (data.SPLIT_SIZES["train"] // pretrain["batch"])
        train_classifier(
            classifier, seed=seed, device=device, **pretrain,
            progress=lambda done, count, note: progress(done, count + total, f"backbone {note}"),
        )  # fmt: skip
    run(
        name, model, config, seed=seed, before=before,
        report=lambda done, note: progress(ahead + done, ahead + total, note),
    )  # fmt: skip
    seconds = time.perf_counter() - began
    manifest.write_rounded(model, name, out_dir)
    return model, seconds
