"""mmengine's Runner, as the recipes of segmenters and detectors use it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

#: Changes a batch in place before it is trained on: the network in training mode, the step, and the batch as
#: ``pseudo_collate`` packs it (``inputs``: uint8 BGR images, ``data_samples``: their ground truth).
BeforeStep = Callable[[nn.Module, int, dict[str, Any]], None]


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
