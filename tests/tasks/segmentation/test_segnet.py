"""SegNet-Basic: its blocks by hand, training data through mmseg, and a cell on a CamVid tree."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import Tensor, nn

from bench.cli import main
from bench.errors import WeightsError
from bench.plan import Options, make_plan
from bench.registry import DATASETS, METRICS, MODELS
from bench.runner import cell_record, craft_record
from bench.store import Store
from tasks.mm.base import build_network
from tasks.mm.configs import load_config

NAME = "segnet_basic_camvid"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights whose classes differ."""
    torch.manual_seed(0)
    network = build_network("mmseg", load_config("mmseg", NAME), NAME)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.2, 0.2)
    nn.init.normal_(network.decode_head.conv_seg.weight, std=0.3)
    path = tmp_path_factory.mktemp("segnet") / "segnet.pth"
    torch.save({"meta": {}, "state_dict": network.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def model(weights: Path) -> Any:
    return MODELS.create("mmseg", {"config": NAME, "checkpoint": str(weights), "scale": (60, 45)}).load(CPU)


def images(n: int = 1, size: tuple[int, int] = (45, 60)) -> Tensor:
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(3))


def write_camvid(root: Path, split: str, size: tuple[int, int]) -> Path:
    rng = np.random.default_rng(0)
    for folder, array in (
        (split, rng.integers(0, 256, (*size, 3), dtype=np.uint8)),
        (f"{split}annot", (np.add.outer(np.arange(size[0]), np.arange(size[1])) // 3 % 12).astype(np.uint8)),
    ):
        (root / "CamVid" / folder).mkdir(parents=True)
        Image.fromarray(array).save(root / "CamVid" / folder / "0001TP_006690.png")
    return root / "CamVid"


def test_blocks_are_the_papers(model: Any) -> None:
    """Sizes as the papers give them; every layer's input computed by hand from the one before."""
    backbone = model.network.backbone
    blocks = [*backbone.encoders, *backbone.decoders]
    assert [tuple(b.conv.weight.shape) for b in blocks] == [(64, 3, 7, 7)] + [(64, 64, 7, 7)] * 7
    assert all(b.conv.bias is None for b in blocks) and tuple(
        model.network.decode_head.conv_seg.weight.shape
    ) == (11, 64, 1, 1)
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    hooks = [b.register_forward_hook(lambda m, i, o: seen.__setitem__(m, (i[0], o))) for b in blocks]
    x = images()
    logits = model.logits(x)
    for hook in hooks:
        hook.remove()
    assert logits.shape == (1, 11, 45, 60)

    # Response normalisation over the three channels, all within reach of one another, of BGR values 0..255.
    pixels = x.flip(1) * 255
    expected = pixels / (1 + 1e-4 / 5 * (pixels**2).sum(1, keepdim=True)) ** 0.75
    assert torch.allclose(seen[blocks[0]][0], expected, atol=1e-4)

    outputs = [seen[block][1] for block in blocks]
    assert all((out >= 0).all() for out in outputs[:4]) and all((out < 0).any() for out in outputs[4:])
    assert [tuple(out.shape[2:]) for out in outputs[:4]] == [(45, 60), (23, 30), (12, 15), (6, 8)]
    below = maxima(outputs[3])[0]
    for encoder, decoder in zip(reversed(blocks[:4]), blocks[4:], strict=True):
        # A value returns to where its maximum was, with zeros around it.
        _, place = maxima(seen[encoder][1])
        spread = F.interpolate(below, scale_factor=2)[..., : place.shape[2], : place.shape[3]]
        assert torch.equal(seen[decoder][0], spread * place)
        below = seen[decoder][1]
    assert torch.allclose(model.network.decode_head.conv_seg(below), logits, atol=1e-4)


def maxima(x: Tensor) -> tuple[Tensor, Tensor]:
    """Maxima of 2x2 blocks, a last odd row or column on its own, and a mask of the first place of each."""
    height, width = x.shape[2:]
    padded = F.pad(x, (0, width % 2, 0, height % 2), value=float("-inf"))
    n, c, h, w = padded.shape
    cells = padded.view(n, c, h // 2, 2, w // 2, 2).transpose(3, 4).reshape(n, c, h // 2, w // 2, 4)
    place = (
        F.one_hot(cells.argmax(-1), 4).view(n, c, h // 2, w // 2, 2, 2).transpose(3, 4).reshape(n, c, h, w)
    )
    return cells.amax(-1), place[..., :height, :width].float()


def test_gradient_against_finite_differences(model: Any) -> None:
    """In float64, in steps so small that no maximum changes its place: there the loss jumps, which the model says."""
    backbone = copy.deepcopy(model.network.backbone).double()
    x = (images(size=(23, 31)).double() * 255).requires_grad_(True)
    weight = torch.randn(1, 64, 23, 31, generator=torch.Generator().manual_seed(5)).double()
    (grad,) = torch.autograd.grad((backbone(x)[0] * weight).sum(), x)
    assert (grad != 0).double().mean() > 0.9
    unit, h = grad / grad.norm(), 1e-5
    with torch.no_grad():
        up, down = ((backbone(x + s * h * unit)[0] * weight).sum() for s in (1, -1))
    assert float(up - down) / (2 * h) == pytest.approx(float(grad.norm()), rel=1e-5)
    assert model.jumps and not MODELS.create("mini_pspnet").load(CPU).jumps


def test_gradient_reaches_the_pixels(model: Any) -> None:
    x = images().requires_grad_(True)
    target = [torch.arange(45 * 60).view(45, 60) // 7 % 11]
    (grad,) = torch.autograd.grad(model.loss(x, target, "ce").sum(), x)
    assert torch.isfinite(grad).all() and (grad != 0).float().mean() > 0.9


def test_same_result_in_any_batch(model: Any) -> None:
    x = images(3, (24, 32))
    assert torch.equal(model.logits(x), torch.cat([model.logits(x[i : i + 1]) for i in range(3)]))


def test_the_config_trains_with_mmseg(tmp_path: Path) -> None:
    """Its training data and loss on a small tree; void counts nowhere."""
    from mmengine.dataset import pseudo_collate
    from mmengine.registry import DefaultScope
    from mmseg.registry import DATASETS as MMSEG

    config = load_config("mmseg", NAME)
    spec = config.train_dataloader.dataset
    spec.data_root = str(write_camvid(tmp_path, "train", (24, 32)))
    network = build_network("mmseg", config, NAME).requires_grad_(True).train()
    network.data_preprocessor.size = (24, 32)
    with DefaultScope.overwrite_default_scope("mmseg"):
        dataset = MMSEG.build(spec)
    data = network.data_preprocessor(pseudo_collate([dataset[0]] * 2), True)
    truth = torch.cat([sample.gt_sem_seg.data for sample in data["data_samples"]])
    assert truth.max() == 11
    loss = network.loss(data["inputs"], data["data_samples"])["decode.loss_ce"]
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())

    weight = torch.tensor(config.model.decode_head.loss_decode.class_weight)
    with torch.no_grad():
        logits = network.encode_decode(data["inputs"], [{"img_shape": (24, 32)}] * 2)
    labels = truth[truth != 11]
    chosen = logits.log_softmax(1).movedim(1, -1)[truth != 11][range(len(labels)), labels]
    expected = -(chosen * weight[labels]).sum() / weight[labels].sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)


def test_one_image_cell(
    tmp_path: Path, model: Any, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Clean, attacked, defended, judged, on a CamVid tree through the command line."""
    folder = write_camvid(tmp_path, "test", (45, 60))
    # What the network says of the image as truth: random weights then score 100 % on it.
    said = model.predict(DATASETS.create("camvid", {"root": str(tmp_path)})[0].image[None])[0].byte()
    said[:5] = 11
    Image.fromarray(said.numpy()).save(folder / "testannot" / "0001TP_006690.png")
    source = {"name": "mmseg", "config": NAME, "checkpoint": str(weights), "scale": [60, 45]}
    roles = {"segnet": {"dataset": {"name": "camvid", "root": str(tmp_path)}, "model": source}}
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump({"name": "camvid", "roles": roles}))
    block = {
        "roles": ["segnet"],
        "defenses": ["none", "jpeg"],
        "attacks": ["attack"],
        "threats": ["oblivious"],
    }
    grid = {
        "name": "segnet",
        "profile": str(tmp_path / "profile.yaml"),
        "attacks": {"attack": {"name": "bim", "eps": "8/255", "alpha": "2/255", "steps": 4}},
        "blocks": [block],
        "tables": [
            {
                "name": "main",
                "rows": ["defense"],
                "columns": ["level_label", "attack"],
                "metric": "pixel_accuracy",
            }
        ],
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(grid))
    store = Store(tmp_path / "store")
    arguments = ("run", "--grid", str(path), "--store", str(store.root), "--out", str(tmp_path / "out"))
    try:
        main([*arguments, "--workers", "1", "--device", "cpu", "--quiet"])
    except SystemExit as stop:
        assert not stop.code, capsys.readouterr().err
    plan = make_plan(Options(path))
    sample = DATASETS.create("camvid", {"root": str(tmp_path)})[0]
    metric, values = METRICS.create("pixel_accuracy"), {}
    for cell in plan.cells:
        stats = json.loads(cell_record(store, cell).read_rows(cell.target.ids)[0]["stats"])
        assert stats[0]["pixels"] == 40 * 60 == int((sample.target != 255).sum())
        values[cell.defense_label, cell.attack_label] = metric.value(metric.prepare(stats))
    assert len(values) == 4 and values["none", "clean"] == 1
    assert values["none", "attack"] < 0.5 and values["jpeg", "clean"] < 1
    craft = next(cell.craft for cell in plan.cells if cell.craft is not None)
    attacked, infos = craft_record(store, craft).read_images(["0001TP_006690"])
    moved = (attacked[0] - sample.image).abs()
    assert 0 < moved.max() <= 8 / 255 + 1e-6 and infos[0]["backwards"] == 4


def test_missing_checkpoint_says_what_belongs_there(tmp_path: Path) -> None:
    source = MODELS.create("mmseg", {"config": NAME, "checkpoint": str(tmp_path / "none.pth")})
    with pytest.raises(
        WeightsError, match=r"none\.pth does not exist: train it with mmseg .*segnet_basic_camvid\.py"
    ):
        source.identity()
