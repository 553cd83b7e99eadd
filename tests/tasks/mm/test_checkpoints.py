"""Checkpoints in OpenMMLab's format: training history is skipped, code is refused."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import save_checkpoint
from torch import nn

from bench.errors import WeightsError
from tasks.mm.checkpoints import load_checkpoint, load_into


class Net(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, classes)


def write(path: Path, model: nn.Module, **extra: object) -> None:
    history = HistoryBuffer()
    for value in (1.5, 0.5, 0.25):
        history.update(value)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    content = {
        "meta": {"epoch": 2, "dataset_meta": {"classes": ("a", "b", "c")}, "mmengine_version": "0.10.7"},
        "state_dict": model.state_dict(),
        "message_hub": {
            "log_scalars": {"train/loss": history},
            "runtime_info": {"iter": 3},
            "resumed_keys": {},
        },
        "optimizer": optimizer.state_dict(),
        **extra,
    }
    save_checkpoint(content, str(path))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    write(tmp_path / "epoch_2.pth", Net())
    return tmp_path / "epoch_2.pth"


def test_history_needs_unpickling_without_the_list(file: Path) -> None:
    from bench.weights import load_state

    with pytest.raises(WeightsError, match="HistoryBuffer"):
        load_state(file)


def test_weights_and_meta(file: Path) -> None:
    torch.manual_seed(0)
    written = Net()
    write(file, written)
    model = Net()
    weights = load_into(model, file, what="model 'net'")
    assert weights.meta["dataset_meta"]["classes"] == ("a", "b", "c")
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), written.state_dict().values(), strict=True)
    )


def test_history_written_under_numpy_1(file: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.pth"
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(old, "w", zipfile.ZIP_STORED) as target:
        for entry in source.infolist():
            data = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in data
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            target.writestr(entry, data)
    assert load_checkpoint(old).state.keys() == Net().state_dict().keys()


def test_only_history_is_let_in(file: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(mark),)

    class Reach:
        # getattr is named by honest histories; here it fetches a function, which must neither work nor be called.
        def __reduce__(self) -> tuple[object, ...]:
            return getattr, (HistoryBuffer, "update")

    for extra in ({"x": Evil()}, {"x": [Reach(), Evil()]}):
        write(tmp_path / "evil.pth", Net(), **extra)
        with pytest.raises(WeightsError, match=r"refused: its pickle asks for .*mkdir"):
            load_checkpoint(tmp_path / "evil.pth")
    write(tmp_path / "numpy.pth", Net(), x=torch.nn.ReLU())
    with pytest.raises(WeightsError, match="refused"):
        load_checkpoint(tmp_path / "numpy.pth")
    assert not mark.exists()


def test_wrong_model_truncated_and_missing(file: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as error:
        load_into(Net(classes=5), file, what="model 'net5'")
    assert "model 'net5'" in str(error.value) and "head.weight (3, 4) instead of (5, 4)" in str(error.value)
    with pytest.raises(WeightsError, match=r"another model: .* missing .* unexpected"):
        load_into(nn.Linear(2, 2), file, what="model 'linear'")
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(WeightsError, match="truncated"):
        load_checkpoint(file)
    with pytest.raises(WeightsError, match=r"nowhere\.pth does not exist: download it"):
        load_checkpoint(tmp_path / "nowhere.pth", hint="download it")
