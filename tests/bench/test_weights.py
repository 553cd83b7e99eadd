"""Checkpoints: what is read, what is refused, and the one line that says why."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from bench.errors import WeightsError
from bench.weights import Inert, apply_state, load_state, save_safetensors, sha256_file


def net(width: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, 2, 1))


def one_line(error: pytest.ExceptionInfo[WeightsError], *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


class Payload:
    """Pickles to a call of os.mkdir, the stand-in for anything worse."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model", "module."])
def test_usual_wrappings(tmp_path: Path, wrap: str) -> None:
    state = net().state_dict()
    content = {
        "plain": state,
        "state_dict": {"meta": {"epoch": 3}, "state_dict": state},
        "model": {"model": state, "optimizer": {"lr": 0.1}},
        "module.": {"state_dict": OrderedDict((f"module.{k}", v) for k, v in state.items())},
    }[wrap]
    path = tmp_path / "net.pth"
    torch.save(content, path)
    weights = load_state(path)
    assert weights.state.keys() == state.keys()
    assert all(torch.equal(weights.state[k], state[k]) for k in state)
    assert weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() == sha256_file(path)
    assert weights.meta == ({"epoch": 3} if wrap == "state_dict" else {})


def test_legacy_torch_format(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save(net().state_dict(), path, _use_new_zipfile_serialization=False)
    assert torch.equal(load_state(path).state["0.weight"], net().state_dict()["0.weight"])


@pytest.mark.parametrize("half", [False, True])
def test_safetensors_round_trip(tmp_path: Path, half: bool) -> None:
    state = net().state_dict()
    state["1.running_var"] = torch.tensor([1e-12, 1.0, 1e6, 2.0])  # outside float16, must survive
    path = tmp_path / "a" / "net.safetensors"
    digest = save_safetensors(path, state, meta={"classes": ["a"], "score": 0.5}, half=half)
    weights = load_state(path)
    assert weights.sha256 == digest == sha256_file(path)
    assert weights.meta == {"classes": ["a"], "score": 0.5}
    assert torch.equal(weights.state["1.running_var"], state["1.running_var"])
    assert weights.state["0.weight"].dtype is (torch.float16 if half else torch.float32)
    other = net()
    nn.init.zeros_(other[0].weight)
    apply_state(other, weights.state, what="net")
    assert other[0].weight.dtype is torch.float32
    expected = state["0.weight"].half().float() if half else state["0.weight"]
    assert torch.equal(other[0].weight, expected)
    assert save_safetensors(path, state, meta={"score": 0.5, "classes": ["a"]}, half=half) == digest
    assert [file.name for file in path.parent.iterdir()] == ["net.safetensors"]


def test_safetensors_under_another_name(tmp_path: Path) -> None:
    path = tmp_path / "net.bin"
    save_safetensors(path, net().state_dict())
    assert load_state(path).state.keys() == net().state_dict().keys()


def test_sha256_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"one")
    first = sha256_file(path)
    path.write_bytes(b"three")
    assert first == hashlib.sha256(b"one").hexdigest()
    assert sha256_file(path) == hashlib.sha256(b"three").hexdigest()


def test_value_too_large_for_half(tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as error:
        save_safetensors(tmp_path / "x.safetensors", {"big": torch.full((2, 2), 1e6)}, half=True)
    one_line(error, "big", "float16")
    assert not list(tmp_path.iterdir())


def test_missing_file_says_where_it_comes_from(tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as error:
        load_state(tmp_path / "net.pth", hint="get it from the model zoo")
    one_line(error, "net.pth", "does not exist", "get it from the model zoo")
    with pytest.raises(WeightsError) as error:
        load_state(tmp_path)
    one_line(error, "is a folder")


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused(tmp_path: Path, zipped: bool) -> None:
    mark = tmp_path / "ran"
    path = tmp_path / "evil.pth"
    torch.save(
        {"state_dict": {"a": torch.ones(1)}, "x": Payload(mark)}, path, _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(WeightsError) as error:
        load_state(path)
    one_line(error, "evil.pth", "refused", "mkdir")
    assert not mark.exists()


def test_bare_pickle_with_code_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(WeightsError) as error:
        load_state(path)
    one_line(error, "evil.pkl")
    assert not mark.exists()


def test_inert_stand_in_does_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = tmp_path / "net.pth"
    torch.save({"state_dict": {"a": torch.ones(1)}, "x": Payload(mark)}, path)
    with pytest.raises(WeightsError):
        load_state(path, allow=[(Inert, "builtins.getattr")])
    assert not mark.exists()


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_file(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    if name.endswith(".pth"):
        torch.save({"state_dict": net().state_dict()}, path)
    else:
        save_safetensors(path, net().state_dict())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(WeightsError) as error:
        load_state(path)
    one_line(error, name, "truncated")


def test_no_weights_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "results.pth"
    torch.save({"accuracy": 0.9, "seed": 1}, path)
    with pytest.raises(WeightsError) as error:
        load_state(path)
    one_line(error, "results.pth", "no network weights", "accuracy")
    (tmp_path / "note.pth").write_text("not a checkpoint\n")
    with pytest.raises(WeightsError) as error:
        load_state(tmp_path / "note.pth")
    one_line(error, "note.pth")


def test_checkpoint_of_another_model() -> None:
    with pytest.raises(WeightsError) as error:
        apply_state(net(4), net(5).state_dict(), what="model 'net' from net.pth")
    one_line(
        error, "model 'net' from net.pth", "another model", "0.weight (5, 3, 3, 3) instead of (4, 3, 3, 3)"
    )
    state = net().state_dict()
    del state["2.bias"]
    state["head.weight"] = torch.ones(1)
    with pytest.raises(WeightsError) as error:
        apply_state(net(), state, what="net")
    one_line(error, "1 missing (2.bias)", "1 unexpected (head.weight)")


def test_batch_counters_may_be_missing_and_extras_ignored() -> None:
    state = {k: v for k, v in net().state_dict().items() if not k.endswith("num_batches_tracked")}
    state["aux.weight"] = torch.ones(1)
    apply_state(net(), state, what="net", ignore=["aux."])
    with pytest.raises(WeightsError):
        apply_state(net(), state, what="net")
