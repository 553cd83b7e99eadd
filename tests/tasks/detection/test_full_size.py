"""Full-size MMDetection models from their packaged configs: one image from clean to attacked to defended to mAP.

Weights are random, but go through a checkpoint file in OpenMMLab's format, and the image through COCO's layout.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mmengine.logging import HistoryBuffer
from mmengine.runner import save_checkpoint
from PIL import Image

from bench.cli import main
from bench.errors import WeightsError
from bench.plan import Options, make_plan
from bench.registry import DATASETS, MODELS
from bench.runner import cell_record, craft_record
from bench.store import Store
from tasks.mini.data import scene
from tasks.mm.base import build_network
from tasks.mm.configs import load_config

pytestmark = pytest.mark.slow


def coco_folder(root: Path) -> Path:
    """One 150x120 picture with two objects, as COCO lays it out; 80 classes with COCO's gaps in the ids."""
    drawn = scene("test", 3)
    pixels = np.asarray(Image.fromarray(drawn.image).resize((150, 120), Image.Resampling.BILINEAR))
    (root / "val2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    Image.fromarray(pixels).save(root / "val2017" / "000000000139.png")
    boxes = [[20.0, 15.0, 60.0, 70.0], [90.0, 40.0, 40.0, 50.0]]
    annotations = [
        {
            "id": k + 1, "image_id": 139, "category_id": 1 + 2 * k, "bbox": box, "area": box[2] * box[3], "iscrowd": 0,
            "segmentation": [[box[0], box[1], box[0] + box[2], box[1], box[0] + box[2], box[1] + box[3]]],
        }
        for k, box in enumerate(boxes)
    ]  # fmt: skip
    content = {
        "images": [{"id": 139, "file_name": "000000000139.png", "height": 120, "width": 150}],
        "annotations": annotations,
        "categories": [{"id": k + 1 + (k > 40), "name": f"class {k}"} for k in range(80)],
    }
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return root


def write_checkpoint(config: str, path: Path) -> None:
    torch.manual_seed(0)
    network = build_network("mmdet", load_config("mmdet", config), config)
    from mmdet.models.necks.ssd_neck import L2Norm  # needs the operators that build_network installs

    for module in network.modules():
        if isinstance(module, L2Norm):
            # Allocated and left to `init_weights`, which would look for pretrained weights.
            torch.nn.init.constant_(module.weight, module.scale)
    history = HistoryBuffer()
    history.update(1.0)
    save_checkpoint(
        {
            "meta": {"epoch": 12, "dataset_meta": {"classes": ("a",)}},
            "state_dict": network.state_dict(),
            "message_hub": {"log_scalars": {"train/loss": history}, "runtime_info": {}, "resumed_keys": {}},
        },
        str(path),
    )


@pytest.mark.parametrize(
    ("config", "scale", "kind"),
    [
        ("ssd300_coco", None, "cls"),
        ("mask-rcnn_r50_fpn_1x_coco", [160, 128], "cls+loc"),
        ("retinanet_r50_fpn_1x_coco", [160, 128], "loc"),
    ],
)
def test_one_image_cell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str, scale: list[int] | None, kind: str
) -> None:
    checkpoint = tmp_path / f"{config}.pth"
    write_checkpoint(config, checkpoint)
    root = coco_folder(tmp_path / "coco")
    model = {"name": "mmdet", "config": config, "checkpoint": str(checkpoint), "scale": scale}
    (tmp_path / "profile.yaml").write_text(
        yaml.safe_dump(
            {
                "name": "full",
                "roles": {"detector": {"dataset": {"name": "coco", "root": str(root)}, "model": model}},
            }
        )
    )
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        yaml.safe_dump(
            {
                "name": "full",
                "profile": str(tmp_path / "profile.yaml"),
                "attacks": {
                    "attack": {"name": "bim", "loss": kind, "eps": "8/255", "alpha": "8/255", "steps": 1}
                },
                "blocks": [
                    {
                        "roles": ["detector"],
                        "defenses": [{"name": "jpeg", "quality": 75}],
                        "attacks": ["attack"],
                        "threats": ["oblivious"],
                    }
                ],
                "tables": [
                    {
                        "name": "main",
                        "rows": ["defense"],
                        "columns": ["level_label", "attack"],
                        "metric": "box_map50",
                    }
                ],
            }
        )
    )
    store = tmp_path / "store"
    arguments = ("run", "--grid", str(grid), "--store", str(store), "--out", str(tmp_path / "out"))
    try:
        main([*arguments, "--workers", "1", "--device", "cpu", "--quiet"])
    except SystemExit as stop:
        assert not stop.code, capsys.readouterr().err
    plan = make_plan(Options(grid))
    attacked = next(cell for cell in plan.cells if cell.craft is not None)
    images, infos = craft_record(Store(store), attacked.craft).read_images(["000000000139"])
    sample = DATASETS.create("coco", {"root": str(root)})[0]
    clean = MODELS.create("mmdet", {k: v for k, v in model.items() if k != "name"}).load(torch.device("cpu"))
    prepared = clean.prepare(sample)
    assert images.shape[1:] == prepared.image.shape
    moved = (images[0] - prepared.image).abs()
    assert moved.max() <= 8 / 255 + 1e-6
    # One signed step moves nearly every pixel: the gradient reaches all of the image.
    assert (moved > 0).float().mean() > 0.9
    assert infos[0]["backwards"] == 1
    for cell in plan.cells:
        rows = cell_record(Store(store), cell).read_rows(cell.target.ids)
        stats = json.loads(rows[0]["stats"])[0]
        assert stats["objects"] == 2
        assert (stats["mask"] is not None) == ("mask" in config)
        assert math.isfinite(rows[0]["score"])
    assert (tmp_path / "out").is_dir()


def test_checkpoint_of_another_detector(tmp_path: Path) -> None:
    write_checkpoint("retinanet_r50_fpn_1x_coco", tmp_path / "retinanet.pth")
    source = MODELS.create("mmdet", {"config": "ssd300_coco", "checkpoint": str(tmp_path / "retinanet.pth")})
    with pytest.raises(
        WeightsError, match=r"model of ssd300_coco, .*retinanet\.pth: a checkpoint of another model"
    ):
        source.load(torch.device("cpu"))
    source = MODELS.create("mmdet", {"config": "ssd300_coco", "checkpoint": str(tmp_path / "none.pth")})
    with pytest.raises(
        WeightsError, match=r"none.pth does not exist: download .*ssd300_coco_20210803.*\.pth"
    ):
        source.identity()
