"""CDA: the published generator's names and sizes, its objective by hand, training by command, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from attacks._train_cda import main, relativistic_loss, train
from attacks.cross_domain import Generator, smoothed
from bench.errors import WeightsError
from bench.registry import ATTACKS, DATASETS, MODELS
from bench.weights import load_state, save_safetensors

SMALL = {"blocks": 2, "width": 4}


@pytest.fixture
def weights(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_safetensors(tmp_path / "generator.safetensors", Generator(**SMALL).state_dict())
    return str(tmp_path / "generator.safetensors")


def test_parameters_are_the_published_ones():
    with torch.device("meta"):
        state = Generator().state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert shapes["block1.1.weight"] == (64, 3, 7, 7) and "block1.1.bias" not in shapes
    assert shapes["block3.0.weight"] == (256, 128, 3, 3) and shapes["block3.1.running_var"] == (256,)
    assert shapes["resblock6.block.6.weight"] == (256, 256, 3, 3) and "resblock7.block.1.weight" not in shapes
    assert shapes["upsampl1.0.weight"] == (256, 128, 3, 3) and shapes["upsampl2.1.bias"] == (64,)
    assert shapes["blockf.1.weight"] == (3, 64, 7, 7) and shapes["blockf.1.bias"] == (3,)


@pytest.mark.parametrize("size", [(32, 32), (33, 31), (30, 29)])
def test_sizes(size):
    generator = Generator(**SMALL).eval()
    with torch.no_grad():
        out = generator(torch.rand(2, 3, *size))
    assert out.shape == (2, 3, *size) and out.min() >= 0 and out.max() <= 1


def test_smoothing_is_a_gaussian():
    image = torch.zeros(1, 3, 7, 7)
    image[0, 1, 3, 3] = 1
    out = smoothed(image)
    assert float(out[0, 1, 3, 3] / out[0, 1, 3, 4]) == pytest.approx(math.exp(0.5), rel=1e-5)
    assert float(out.sum()) == pytest.approx(1, rel=1e-5) and (out[0, [0, 2]] == 0).all()


def test_it_asks_nothing_of_the_victim(lab, weights):
    images, _ = lab.batch(3, (16, 14))
    for smooth in (False, True):
        attack = ATTACKS.create("cda", {"weights": weights, "smooth": smooth, **SMALL})
        assert not attack.needs and attack.tasks is None
        out = attack.run(None, images, [None] * 3, lab.rng(3))
        generator = Generator(**SMALL)
        generator.load_state_dict(load_state(weights).state)
        with torch.no_grad():
            made = generator.eval()(images)
        made = smoothed(made) if smooth else made
        expected = torch.clamp(made, images - 10 / 255, images + 10 / 255)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_the_key_holds_a_digest_and_no_path(weights):
    attack = ATTACKS.create("cda", {"weights": weights, **SMALL})
    assert weights not in str(attack.identity()) and len(attack.identity()["params"]["weights"]) == 64


def test_objective_by_hand():
    clean, adversarial = torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[1.0, 2.0, 0.0]])
    # Differences -2, 1, 0; the clean prediction is class 0.
    expected = math.log(math.exp(-2) + math.e + 1) + 2
    assert float(relativistic_loss(clean, adversarial)) == pytest.approx(expected, rel=1e-6)


def test_training_fools_what_it_trains_on(lab):
    target = lab.Classifier(lab.convnet(), 5)
    images, _ = lab.batch(24)
    options = {"eps": 16 / 255, "batch": 8, "lr": 0.01, **SMALL}
    state = torch.get_rng_state()
    trained = train(target, images, steps=40, **options)
    assert torch.equal(torch.get_rng_state(), state)
    fresh = train(target, images, steps=0, **options)

    def loss(generator):
        with torch.no_grad():
            x = torch.clamp(generator(images), images - 16 / 255, images + 16 / 255).clamp(0, 1)
            return F.cross_entropy(target.logits(x), target.logits(images).argmax(1))

    assert loss(trained) > loss(fresh) + 0.15


def test_training_by_command(lab, tmp_path, caplog):
    out = tmp_path / "cda.safetensors"
    size = ["--blocks", "2", "--width", "4", "--batch", "2", "--steps", "2"]
    data = "{name: mini_digits, split: train, count: 4}"
    assert main(["--dataset", data, "--model", "mini_vgg", "--out", str(out), *size]) == 0
    images, _ = lab.batch(2)
    attack = ATTACKS.create("cda", {"weights": str(out)})  # the file knows its size
    assert attack.run(None, images, [0, 0], lab.rng(2)).shape == images.shape
    assert main(["--dataset", data, "--model", "mini_vg", "--out", str(out), *size]) == 2
    assert "did you mean 'mini_vgg'" in caplog.text


def test_the_shipped_generator_does_more_harm_than_noise(lab):
    model = MODELS.create("mini_resnet", {}).load(torch.device("cpu"))
    data = DATASETS.create("mini_digits", {"count": 100})
    samples = [model.prepare(data[i]) for i in range(len(data))]
    images, labels = torch.stack([s.image for s in samples]), torch.tensor([int(s.target) for s in samples])

    def wrong(name, **params):
        out = ATTACKS.create(name, params).run(None, images, labels, lab.rng(100))
        with torch.no_grad():
            return int((model.logits(out).argmax(1) != labels).sum())

    assert wrong("cda", weights="cda-mini-resnet", eps="16/255") > 10 + wrong(
        "gaussian_noise", sigma="16/255"
    )


def test_bad_weights(lab, weights, tmp_path):
    with pytest.raises(WeightsError, match="does not exist: the published generators are listed at"):
        ATTACKS.create("cda", {"weights": str(tmp_path / "none.pth")})
    images, _ = lab.batch(1)
    with pytest.raises(WeightsError, match="attack 'cda', weights file"):
        ATTACKS.create("cda", {"weights": weights}).run(None, images, [0], lab.rng(1))
