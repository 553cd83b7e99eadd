"""CIFAR-kind networks at their published sizes, and the checkpoints that the model `cifar` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.errors import BenchError, GridError, WeightsError
from bench.registry import MODELS
from bench.weights import save_safetensors, sha256_file
from tasks.classification import cifar_nets
from tasks.classification.cifar import like_ours

CPU = torch.device("cpu")
PLAIN = {"mean": [0, 0, 0], "std": [1, 1, 1]}


def randomised(network: nn.Module) -> nn.Module:
    """Random batch statistics and biases too, so that a lost one shows."""
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return network.eval()


def images(count: int = 2, size: int = 32) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


# -- networks ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arch", "classes", "parameters"),
    [
        # Zagoruyko and Komodakis 2016, table 5: 2.7 M, 36.5 M; Madry-type baselines: 46.2 M. ResNets with the 3x3 stem
        # and VGG-19 as in the common CIFAR repositories: 11.17 M, 23.52 M, 20.04 M.
        ("wrn-16-4", 10, 2_748_890),
        ("wrn-28-10", 10, 36_479_194),
        ("wrn-34-10", 10, 46_160_474),
        ("wrn-28-10", 100, 36_536_884),
        ("resnet-18", 10, 11_173_962),
        ("resnet-50", 10, 23_520_842),
        ("vgg-19", 10, 20_035_018),
    ],
)
def test_parameter_counts(arch: str, classes: int, parameters: int) -> None:
    with torch.device("meta"):
        assert cifar_nets.parameter_count(cifar_nets.build(arch, classes)) == parameters


def test_wrn_28_20_has_as_many_parameters_as_another_implementation() -> None:
    with torch.device("meta"):
        other = published("wrn-28-20")
        assert cifar_nets.parameter_count(cifar_nets.build("wrn-28-20")) == sum(
            p.numel() for p in other.parameters()
        )


def test_the_smallest_input_is_that_of_the_poolings() -> None:
    network = cifar_nets.VGG((1, 1, 1), (2, 2, 2))
    assert cifar_nets.smallest_input(network) == 8
    assert network.eval()(images(1, 8)).shape == (1, 10)
    with pytest.raises(RuntimeError):
        network(images(1, 7))
    assert cifar_nets.smallest_input(cifar_nets.mini_wrn()) == 1


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("wrn-29-10", "arch 'wrn-29-10': depth: 29 is not 4 more than a multiple of 6"),
        ("wrn-28", "unknown arch 'wrn-28': did you mean 'wrn-28-[12]0'"),
        ("vgg-18", "unknown arch 'vgg-18': did you mean 'vgg-1"),
        ("vgg19", "did you mean 'vgg-19'"),
        ("wrn-16-0", "WideResNets are wrn-DEPTH-WIDTH"),
    ],
)
def test_unknown_networks(arch: str, message: str) -> None:
    with pytest.raises(GridError, match=message) as error:
        cifar_nets.build(arch)
    assert "\n" not in str(error.value)


# -- other people's layouts -------------------------------------------------------------------------------------------
def kuangliu_vgg() -> nn.Module:
    """VGG-11 as kuangliu's pytorch-cifar has it: biases, torchvision's order, one linear layer `classifier`."""
    from torchvision.models.vgg import cfgs, make_layers

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = make_layers(cfgs["A"], batch_norm=True)
            self.classifier = nn.Linear(512, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.features(x).flatten(1))

    return Net()


def torchvision_resnet() -> nn.Module:
    """torchvision's ResNet-18 with a CIFAR stem."""
    from torchvision.models import resnet18

    network = resnet18(num_classes=10)
    network.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    network.maxpool = nn.Identity()
    return network


def published(name: str) -> nn.Module:
    from tasks.classification.sources import _robustbench

    with _robustbench():
        from robustbench.model_zoo.architectures import resnet, wide_resnet
    if name == "wrn-28-20":
        return wide_resnet.WideResNet(28, 10, 20)
    if name == "wrn-16-2":  # with TRADES' unused block
        return wide_resnet.WideResNet(16, 10, 2, sub_block1=True)
    assert name == "resnet-50"
    return resnet.ResNet50()


LAYOUTS = {
    "wrn-16-2": lambda: published("wrn-16-2"),
    "resnet-50": lambda: published("resnet-50"),
    "vgg-11": kuangliu_vgg,
    "resnet-18": torchvision_resnet,
}


@pytest.mark.parametrize("arch", LAYOUTS)
def test_published_checkpoints_give_the_published_logits(arch: str, tmp_path: Path) -> None:
    """Independent implementations of the same networks: names are understood, and the forward pass is the same."""
    network = randomised(LAYOUTS[arch]())
    path = tmp_path / "published.pt"
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, path)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    source = MODELS.create("cifar", {"checkpoint": str(path), "arch": arch, "mean": mean, "std": std})
    assert source.identity()["sha256"] == sha256_file(path) and str(tmp_path) not in str(source.identity())
    model, x = source.load(CPU), images()
    assert model.num_classes == 10
    with torch.no_grad():
        normalised = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        expected = network(normalised)
        found = model.logits(x)
    assert expected.std() > 1e-3
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_our_own_names_stay() -> None:
    for arch in ("mini_vgg", "mini_resnet", "mini_wrn"):
        state = cifar_nets.build(arch).state_dict()
        assert like_ours(state).keys() == state.keys()


# -- our checkpoints --------------------------------------------------------------------------------------------------
@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    network = randomised(cifar_nets.build("mini_wrn", 7))
    path = tmp_path / "w.safetensors"
    meta = {
        "arch": "mini_wrn", "num_classes": 7, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1], "size": 16,
        "scores": {"clean": 0.5},
    }  # fmt: skip
    save_safetensors(path, network.state_dict(), meta=meta, half=True)
    return path


def test_a_checkpoint_says_what_it_is(checkpoint: Path) -> None:
    source = MODELS.create("cifar", {"checkpoint": str(checkpoint)})
    model = source.load(CPU)
    assert (model.num_classes, model.fixed_size) == (7, (16, 16))
    assert model.mean.flatten().tolist() == pytest.approx([0.5, 0.4, 0.3])
    assert model.std.flatten().tolist() == pytest.approx([0.2, 0.2, 0.1])
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert source.recorded() == {"clean": 0.5}
    assert source.identity() == {
        "source": "cifar", "arch": "mini_wrn", "num_classes": 7, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1],
        "size": 16, "sha256": sha256_file(checkpoint),
    }  # fmt: skip
    # Saying what it says anyway changes nothing.
    named = {"checkpoint": str(checkpoint), "arch": "mini_wrn", "num_classes": 7}
    assert MODELS.create("cifar", named).identity() == source.identity()
    plain = MODELS.create("cifar", {**named, **PLAIN}).load(CPU)
    assert not torch.equal(plain.logits(images()), model.logits(images()))


def refused(params: dict[str, Any], message: str) -> str:
    with pytest.raises(BenchError, match=message) as error:
        MODELS.create("cifar", params).load(CPU)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_wrong_checkpoints_are_refused_in_one_line(checkpoint: Path, tmp_path: Path) -> None:
    own = {"checkpoint": str(checkpoint)}
    refused({**own, "arch": "mini_vgg"}, "it says arch mini_wrn, the profile arch mini_vgg")
    refused({**own, "num_classes": 10}, "it says num_classes 7, the profile num_classes 10")
    refused({**own, "mean": [0, 0, 0]}, "mean and std go together")
    refused({**own, "size": 0}, "size: 0 is not 1 or more")
    text = refused(
        {"checkpoint": str(tmp_path / "no.safetensors"), "arch": "vgg-19"}, "there is no such file"
    )
    assert "python -m bench train-target --arch vgg-19 --dataset DATASET --out" in text

    bare = tmp_path / "bare.pt"
    torch.save(cifar_nets.build("mini_vgg", 7).state_dict(), bare)
    refused({"checkpoint": str(bare)}, "does not say which network it is; name it with arch:")
    refused({"checkpoint": str(bare), "arch": "mini_vgg"}, "does not say how images are normalised")
    named = {"checkpoint": str(bare), "arch": "mini_vgg", **PLAIN}
    assert MODELS.create("cifar", named).load(CPU).num_classes == 7
    refused({**named, "num_classes": 10}, "it has 7 classes, num_classes says 10")
    refused({**named, "arch": "mini_wrn"}, "arch mini_wrn: a checkpoint of another model: .* missing")
    refused({**named, "arch": "mini-wrn"}, "unknown arch 'mini-wrn': did you mean 'mini_wrn'")
    # Whatever the file, and without advice that cannot work.
    for file in (str(bare), str(tmp_path / "no.pt")):
        text = refused({"checkpoint": file, "arch": "wrn-33-10"}, r"arch 'wrn-33-10': .*\(10, 16, 22, 28, 34")
        assert "train-target" not in text

    torch.save({"features.0.weight": torch.zeros(1)}, bare)
    refused(named, "no mini_vgg of the CIFAR kind")
    torch.save(Path, bare)
    with pytest.raises(WeightsError, match="refused: its pickle asks for pathlib"):
        MODELS.create("cifar", named).load(CPU)
    # First of all, whether it is a checkpoint; what it does not say comes after.
    untold = ({"checkpoint": str(bare), "arch": "mini_vgg"}, {"checkpoint": str(bare)})
    for params in untold:
        assert "does not say" not in refused(params, "refused: its pickle asks for pathlib")
    bare.write_bytes(b"no checkpoint")
    refused(named, "damaged, truncated or no checkpoint")
    for params in untold:
        refused(params, "damaged, truncated or no checkpoint")


# -- shipped ----------------------------------------------------------------------------------------------------------
def test_the_shipped_target_goes_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = MODELS.create("cifar", {"checkpoint": "fashion_wrn.safetensors"})
    assert source.load(CPU).logits(images(size=28)).shape == (2, 10)
    scores = source.recorded()
    assert scores["clean"] > 0.9 and scores["pgd20_8/255"] < 0.05
    # A file of the user's own comes first.
    (tmp_path / "fashion_wrn.safetensors").write_bytes(b"damaged")
    with pytest.raises(WeightsError, match=r"fashion_wrn\.safetensors"):
        MODELS.create("cifar", {"checkpoint": "fashion_wrn.safetensors"}).load(CPU)
