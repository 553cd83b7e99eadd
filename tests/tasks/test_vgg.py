"""VGG features from files of torchvision's layout, against torchvision's own network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models.vgg import cfgs, make_layers

from bench.errors import GridError, WeightsError
from bench.weights import save_safetensors
from tasks.vgg import VGGFeatures

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
INDEX = {
    "D": {"relu1_1": 1, "relu1_2": 3, "relu2_2": 8, "relu3_3": 15, "relu4_3": 22, "relu5_3": 29},
    "E": {"relu1_1": 1, "relu2_1": 6, "relu3_1": 11, "relu4_1": 20, "relu5_1": 29, "relu5_4": 35},
}


def narrow(letter: str) -> nn.Sequential:
    widths = [v if v == "M" else int(v) // 16 for v in cfgs[letter]]
    torch.manual_seed(0)
    layers = make_layers(widths).eval()
    for module in layers:
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.bias, 0.1, 0.1)
    return layers


def write(path: Path, features: nn.Module) -> Path:
    state = {f"features.{k}": v for k, v in features.state_dict().items()}
    save_safetensors(path, {**state, "classifier.0.weight": torch.zeros(2, 2)})
    return path


@pytest.mark.parametrize(("letter", "depth"), [("D", 16), ("E", 19)])
def test_activations_are_those_of_torchvision(letter, depth, tmp_path):
    reference = narrow(letter)
    vgg = VGGFeatures(write(tmp_path / "w.safetensors", reference))
    assert vgg.depth == depth
    assert not any(p.requires_grad for p in vgg.parameters())
    normal = (IMAGES - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    with torch.no_grad():
        for given, x in ((True, normal), (False, IMAGES)):
            expected = {name: reference[: i + 1](x) for name, i in INDEX[letter].items()}
            names = list(reversed(INDEX[letter]))
            for name, found in zip(names, vgg(IMAGES, names, normalise=given), strict=True):
                assert expected[name].std() > 0
                assert torch.allclose(found, expected[name], atol=1e-5), name


def test_gradients_reach_the_pixels(tmp_path):
    vgg = VGGFeatures(write(tmp_path / "w.safetensors", narrow("D")))
    x = IMAGES.clone().requires_grad_()
    vgg(x, ["relu3_3"])[0].sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0


def test_other_files_are_refused(tmp_path):
    missing = tmp_path / "none.pth"
    with pytest.raises(WeightsError, match="does not exist: torchvision publishes vgg16 and vgg19"):
        VGGFeatures(missing)
    widths = [v if v == "M" else int(v) // 64 for v in cfgs["A"]]
    with pytest.raises(WeightsError, match=r"is no VGG16 or VGG19 .* it has 8 layers called features\.N"):
        VGGFeatures(write(tmp_path / "a.safetensors", make_layers(widths)))
    with pytest.raises(WeightsError, match="is no VGG16 or VGG19 without batch normalisation"):
        VGGFeatures(write(tmp_path / "bn.safetensors", make_layers(widths, batch_norm=True)))
    other = narrow("D")
    other[0] = nn.Conv2d(1, 1, 3)
    with pytest.raises(WeightsError, match=r"features\.0\.weight has shape \(1, 1, 3, 3\)"):
        VGGFeatures(write(tmp_path / "grey.safetensors", other))


def test_unknown_layers_are_refused(tmp_path):
    vgg = VGGFeatures(write(tmp_path / "w.safetensors", narrow("D")))
    with pytest.raises(GridError, match="unknown layer of VGG16 'relu3_4'"):
        vgg(IMAGES, ["relu3_4"])
