"""Model sources: weights written in the published format come back as the same network, or as one clear line."""

import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bench.errors import BenchError, GridError, WeightsError
from bench.grid import load_profile, split_spec
from bench.protocols import Sample
from bench.registry import MODELS
from tasks.classification import sources

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_caches(tmp_path, monkeypatch):
    """Weights that happen to lie in the user's caches must not decide a test."""
    monkeypatch.setenv("BENCH_WEIGHTS", str(tmp_path / "zoo"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    yield


def randomised(network: nn.Module) -> nn.Module:
    """Random batch statistics too, so that a lost buffer shows."""
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
    return network.eval()


def image(size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    pixels = np.array(Image.fromarray(pixels).resize((size[0], size[1]), Image.Resampling.BILINEAR))
    return pixels, Sample(torch.from_numpy(pixels).permute(2, 0, 1).float() / 255, 7, "x")


def check_adapter(model, network, images, atol=0.0):
    with torch.no_grad():
        expected = torch.cat([network(x[None]) for x in images])
    actual = model.logits(images)
    assert expected.std() > 0 and torch.allclose(actual, expected, rtol=0, atol=atol)
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


# -- RobustBench ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def zoo():
    """RobustBench's model zoo, imported the way the source does."""
    MODELS.create("robustbench", {"id": "Wong2020Fast"})._check_id()
    from robustbench.model_zoo import model_dicts
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

    return model_dicts[BenchmarkDataset.cifar_10][ThreatModel.Linf]


@pytest.mark.slow
def test_robustbench_carmon(zoo, tmp_path):
    """The checkpoint of Carmon2019Unlabeled: a dictionary with `state_dict`, every name behind `module.`."""
    network = randomised(zoo["Carmon2019Unlabeled"]["model"]())
    path = tmp_path / "zoo" / "models" / "cifar10" / "Linf" / "Carmon2019Unlabeled.pt"
    path.parent.mkdir(parents=True)
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 200, "num_classes": 10}, path)
    source = MODELS.create("robustbench", {"id": "Carmon2019Unlabeled"})
    identity = source.identity()
    assert len(identity["sha256"]) == 64 and str(tmp_path) not in str(identity)
    model = source.load(CPU)
    assert model.num_classes == 10
    check_adapter(model, network, torch.rand(2, 3, 32, 32))
    # The same file named by hand is the same model.
    assert (
        MODELS.create("robustbench", {"id": "Carmon2019Unlabeled", "weights": str(path)}).identity()
        == identity
    )


def test_robustbench_old_checkpoint_without_constants(zoo, tmp_path):
    """Wong2020Fast: published without its normalisation constants, which the code then supplies."""
    network = randomised(zoo["Wong2020Fast"]["model"]())
    path = tmp_path / "w.pt"
    torch.save({k: v for k, v in network.state_dict().items() if k not in ("mu", "sigma")}, path)
    model = MODELS.create("robustbench", {"id": "Wong2020Fast", "weights": str(path)}).load(CPU)
    check_adapter(model, network, torch.rand(2, 3, 32, 32))
    with pytest.raises(BenchError, match="32x32"):
        model.prepare(image((40, 40))[1])


def test_robustbench_wrong_checkpoint(zoo, tmp_path):
    path = tmp_path / "w.pt"
    torch.save(nn.Linear(3, 2).state_dict(), path)
    with pytest.raises(WeightsError, match="another model"):
        MODELS.create("robustbench", {"id": "Wong2020Fast", "weights": str(path)}).load(CPU)


def test_robustbench_missing_weights(zoo, tmp_path):
    source = MODELS.create("robustbench", {"id": "Wong2020Fast"})
    for touch in (source.identity, lambda: source.load(CPU)):
        with pytest.raises(WeightsError) as error:
            touch()
        text = str(error.value)
        assert str(tmp_path / "zoo" / "models" / "cifar10" / "Linf" / "Wong2020Fast.pt") in text
        assert "Google Drive" in text and "mini_resnet" in text and "\n" not in text


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"id": "Carmon2019Unlabelled"}, "did you mean 'Carmon2019Unlabeled'"),
        ({"id": "x", "dataset": "imagenet", "threat": "L2"}, "no L2 models for imagenet"),
    ],
)
def test_robustbench_unknown_names(params, said):
    with pytest.raises(GridError, match=said):
        MODELS.create("robustbench", params).identity()


def test_robustbench_imagenet_is_cropped_and_prefixed(tmp_path):
    """Salman2020Do_R18: published as a bare ResNet, used behind a normalisation layer at 224 pixels."""
    source = MODELS.create("robustbench", {"id": "Salman2020Do_R18", "dataset": "imagenet"})
    network = randomised(source._build()[0])
    path = tmp_path / "w.pt"
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.model.state_dict().items()}}, path)
    source = MODELS.create(
        "robustbench", {"id": "Salman2020Do_R18", "dataset": "imagenet", "weights": str(path)}
    )
    assert source.input_spec() == {"resize": 256, "interpolation": "bilinear", "crop": [224, 224]}
    model = source.load(CPU)
    from robustbench.data import PREPROCESSINGS

    pixels, sample = image((300, 280))
    prepared = model.prepare(sample)
    assert torch.equal(prepared.image, PREPROCESSINGS["Res256Crop224"](Image.fromarray(pixels)))
    assert prepared.target == 7 and prepared.id == "x"
    check_adapter(model, network, prepared.image[None])


# -- timm -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_timm(tmp_path, suffix):
    import timm
    from safetensors.torch import save_file

    network = randomised(timm.create_model("mobilenetv3_small_050"))
    path = tmp_path / f"w.{suffix}"
    save_file(network.state_dict(), path) if suffix == "safetensors" else torch.save(
        network.state_dict(), path
    )
    source = MODELS.create("timm", {"id": "mobilenetv3_small_050.lamb_in1k", "weights": str(path)})
    model = source.load(CPU)
    # timm's own validation transform, which ends in the normalisation that the adapter has in its gradient path.
    from timm.data import create_transform, resolve_data_config

    pixels, sample = image((260, 240))
    expected = create_transform(**resolve_data_config(model=network))(Image.fromarray(pixels))
    prepared = model.prepare(sample).image
    assert torch.allclose((prepared - model.mean[0]) / model.std[0], expected, atol=1e-6)
    assert source.input_spec()["input_size"] == [3, 224, 224]
    check_adapter(model, lambda x: network((x - model.mean) / model.std), prepared[None])
    assert source.identity() == {
        "source": "timm", "id": "mobilenetv3_small_050.lamb_in1k", "num_classes": None,
        "sha256": source.identity()["sha256"],
    }  # fmt: skip


def test_timm_small_images_and_classes(tmp_path):
    import timm

    network = randomised(timm.create_model("mobilenetv3_small_050", num_classes=7))
    torch.save(network.state_dict(), tmp_path / "w.pth")
    params = {
        "id": "mobilenetv3_small_050",
        "weights": str(tmp_path / "w.pth"),
        "num_classes": 7,
        "resize": False,
    }
    source = MODELS.create("timm", params)
    model = source.load(CPU)
    sample = image((32, 32))[1]
    assert source.input_spec() == {} and model.prepare(sample) is sample and model.num_classes == 7
    check_adapter(model, lambda x: network((x - model.mean) / model.std), sample.image[None])
    with pytest.raises(WeightsError, match="another model"):
        MODELS.create("timm", {**params, "num_classes": 8}).load(CPU)


def test_transformers_see_their_own_size_whatever_a_defense_did(tmp_path):
    import timm

    network = timm.create_model("vit_tiny_patch16_224", num_classes=3).eval()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    params = {"id": "vit_tiny_patch16_224", "weights": str(tmp_path / "w.pth"), "num_classes": 3}
    model = MODELS.create("timm", params).load(CPU)
    images = torch.rand(1, 3, 240, 236, requires_grad=True)
    logits = model.logits(images)
    small = nn.functional.interpolate(images.detach(), size=(224, 224), mode="bilinear", align_corners=False)
    assert torch.equal(logits, model.logits(small))
    assert torch.autograd.grad(logits.sum(), images)[0].abs().sum() > 0


def test_timm_errors(tmp_path):
    with pytest.raises(GridError, match="did you mean 'resnet18'"):
        MODELS.create("timm", {"id": "resnet_18"}).identity()
    with pytest.raises(GridError, match=r"resnet18\.a1_in1k"):
        MODELS.create("timm", {"id": "resnet18.a1_in1"}).identity()
    with pytest.raises(WeightsError) as error:
        MODELS.create("timm", {"id": "resnet18.a1_in1k"}).identity()
    assert str(tmp_path / "hub") in str(error.value) and "resnet18_a1_0-d63eafa0.pth" in str(error.value)
    assert "mini_vgg" in str(error.value) and "\n" not in str(error.value)


# -- torchvision ----------------------------------------------------------------------------------------------------
def test_torchvision_from_the_hub_cache(tmp_path):
    import torchvision

    network = randomised(torchvision.models.squeezenet1_1())
    weights = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    path = tmp_path / "hub" / "hub" / "checkpoints" / weights.url.rsplit("/", 1)[1]
    path.parent.mkdir(parents=True)
    torch.save(network.state_dict(), path)
    source = MODELS.create("torchvision", {"id": "squeezenet1_1"})
    model = source.load(CPU)
    pixels, sample = image((260, 300))
    prepared = model.prepare(sample).image
    expected = weights.transforms()(Image.fromarray(pixels))
    assert torch.allclose((prepared - model.mean[0]) / model.std[0], expected, atol=1e-6)
    assert source.input_spec() == {"resize": 256, "interpolation": "bilinear", "crop": [224, 224]}
    check_adapter(model, lambda x: network((x - model.mean) / model.std), prepared[None])


def test_torchvision_variants_differ_in_their_input():
    first, second = (
        MODELS.create("torchvision", {"id": "resnet50", "variant": f"IMAGENET1K_V{v}"}).input_spec()
        for v in (1, 2)
    )
    assert (first["resize"], second["resize"]) == (256, 232)
    with pytest.raises(GridError, match="IMAGENET1K_V2"):
        MODELS.create("torchvision", {"id": "resnet50", "variant": "IMAGENET1K_V3"}).input_spec()


def test_torchvision_errors(tmp_path):
    with pytest.raises(GridError, match="did you mean 'resnet50'"):
        MODELS.create("torchvision", {"id": "resnet_50"}).identity()
    with pytest.raises(WeightsError) as error:
        MODELS.create("torchvision", {"id": "resnet50"}).identity()
    assert str(tmp_path / "hub") in str(error.value) and "https://" in str(error.value)
    missing = tmp_path / "none.pth"
    with pytest.raises(WeightsError, match=f"weights file {missing} does not exist"):
        MODELS.create("torchvision", {"id": "resnet50", "weights": str(missing)}).identity()


# -- what the papers' profile names ---------------------------------------------------------------------------------
FROM = {"timm": "the Hugging Face repository timm/", "torchvision": "https://download.pytorch.org/models/"}


def published() -> dict[str, dict[str, str]]:
    """Weights file of the profile -> its model: those that timm and torchvision build."""
    specs = [split_spec(binding.model, role)[:2] for role, binding in load_profile("paper")[0].roles.items()]
    return {params["weights"]: {"name": name, **params} for name, params in specs if name in FROM}


@pytest.mark.parametrize("file", sorted(published()))
def test_the_papers_models_exist_and_say_which_file_they_lack(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = published()[file]
    name = params.pop("name")
    source = MODELS.create(name, params)
    for touch in (source.identity, lambda: source.load(CPU)):
        with pytest.raises(WeightsError) as error:
            touch()
        text = str(error.value)
        # What nobody publishes is named; else where it is found.
        origin = params.get("origin")
        found = f"it is {origin}: make it" if origin else f"get it from {FROM[name]}"
        assert f"weights file {file} does not exist; {found}" in text
        assert "put it there" in text and "\n" not in text
        # torchvision's file has its published name, so that the right variant is fetched.
        assert name == "timm" or f"models/{file} " in text
        assert origin or name == "torchvision" or f"timm/{params['id']} " in text
    # Shapes alone: no memory is taken, no weights are drawn.
    with torch.device("meta"):
        network, classes = source._build()
        logits = network.eval()(torch.empty(1, 3, *source._preparation.size))
    assert logits.shape == (1, classes) == (1, 1000)
    assert source._preparation.size == ((299, 299) if name == "timm" else (224, 224))


class Payload:
    def __reduce__(self):
        return Path.touch, (Path("/tmp/bench-payload-ran"),)


def test_code_in_a_checkpoint_is_refused(tmp_path):
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"state_dict": Payload()}))
    with pytest.raises(WeightsError, match=r"evil\.pth"):
        MODELS.create("torchvision", {"id": "squeezenet1_1", "weights": str(path)}).load(CPU)
    assert not Path("/tmp/bench-payload-ran").exists()


def test_truncated_weights(tmp_path):
    import torchvision

    path = tmp_path / "w.pth"
    torch.save(torchvision.models.squeezenet1_1().state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(WeightsError, match=r"w\.pth (is damaged|cannot be read)"):
        MODELS.create("torchvision", {"id": "squeezenet1_1", "weights": str(path)}).load(CPU)


def test_the_warning_of_robustbenchs_import_is_not_the_users() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with sources._robustbench():
            warnings.warn("pkg_resources is deprecated as an API. See ...", UserWarning, stacklevel=1)
            warnings.warn("another", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["another"]
