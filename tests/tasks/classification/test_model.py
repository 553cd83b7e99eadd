"""The adapter in front of classifiers: losses, gradients to the pixels, features, and independence of the batch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench.errors import BenchError, GridError
from bench.protocols import Sample
from tasks.classification import cifar_nets
from tasks.classification.model import LogitsClassifier

NETS = ("mini_vgg", "mini_resnet", "mini_wrn")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def network(name="mini_resnet"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = getattr(cifar_nets, name)()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return net


def classifier(name="mini_resnet", micro_batch=8):
    return LogitsClassifier(network(name), 10, mean=MEAN, std=STD, micro_batch=micro_batch)


def images(n, size=32):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(n))


def labels(n):
    return [i % 10 for i in range(n)]


# -- losses ---------------------------------------------------------------------------------------------------------
def test_losses_by_hand():
    model = classifier()
    z = torch.tensor([[2.0, 1.0, -1.0, 0.5], [0.0, 3.0, 1.0, -2.0]])
    y = [0, 2]
    p = z.exp() / z.exp().sum(1, keepdim=True)
    assert torch.allclose(model.loss_from_logits(z, y, "ce"), -p[[0, 1], y].log())
    assert torch.allclose(model.loss_from_logits(z, y, "margin"), torch.tensor([1.0 - 2.0, 3.0 - 1.0]))
    # Croce and Hein 2020, eq. 6: minus (z_y - best other) over (first - third largest logit).
    expected = torch.tensor([-(2.0 - 1.0) / (2.0 - 0.5), -(1.0 - 3.0) / (3.0 - 0.0)])
    assert torch.allclose(model.loss_from_logits(z, y, "dlr"), expected)


def test_dlr_is_autoattacks():
    pyautoattack = pytest.importorskip("pyautoattack.autopgd_base")
    z, y = torch.randn(50, 10), torch.randint(0, 10, (50,))
    theirs = pyautoattack.APGDAttack.dlr_loss(None, z, y)
    assert torch.allclose(classifier().loss_from_logits(z, y.tolist(), "dlr"), theirs, atol=1e-6)


def test_unknown_loss_names_the_nearest():
    with pytest.raises(GridError, match="did you mean 'margin'"):
        classifier().loss_from_logits(torch.zeros(1, 10), [0], "margn")
    with pytest.raises(GridError, match="three classes"):
        classifier().loss_from_logits(torch.zeros(1, 2), [0], "dlr")


def test_normalisation_is_inside():
    net = network().eval()
    x = images(3)
    normalised = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    model = classifier()
    assert torch.allclose(model.logits(x), net(normalised), atol=1e-5)
    assert torch.allclose(
        model.loss(x, labels(3), "ce"),
        F.cross_entropy(net(normalised), torch.arange(3), reduction="none"),
        atol=1e-5,
    )


def test_predictions():
    model = classifier()
    x = images(4)
    z = model.logits(x)
    for i, said in enumerate(model.predict(x)):
        top = z[i].sort(descending=True).values
        assert int(said) == int(z[i].argmax())
        assert said.confidence == pytest.approx(float(z[i].softmax(0).max()))
        assert said.margin == pytest.approx(float(top[0] - top[1]))
        assert list(said.top) == z[i].argsort(descending=True)[:5].tolist()


def test_tied_labels_come_in_order():
    said = LogitsClassifier(nn.Flatten(), 7).predict(torch.tensor([[0.0, 1, 1, 0, 1, 1, 0]]).view(1, 7, 1, 1))
    assert said[0].top == (1, 2, 4, 5, 0) and int(said[0]) == 1


# -- gradients ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["ce", "margin", "dlr"])
@pytest.mark.parametrize("name", NETS)
def test_gradient_against_finite_differences(name, kind):
    """Along random directions and along the gradient itself, in double precision."""
    model = classifier(name, micro_batch=2).double()
    # Losses are float32, too coarse for a finite difference: it is taken of `precise`, which says the same.
    x = images(2).double().requires_grad_(True)
    z = model.network((x - model.mean) / model.std)
    assert torch.allclose(model.logits(x), z.float(), atol=1e-6)
    (grad,) = torch.autograd.grad(model.loss(x, [1, 7], kind).double().sum(), x)

    def precise(v):
        out = model.network((v - model.mean) / model.std)
        y = torch.tensor([1, 7])
        if kind == "ce":
            return F.cross_entropy(out, y, reduction="none")
        true, wrong = out.gather(1, y[:, None])[:, 0], out.scatter(1, y[:, None], -torch.inf).amax(1)
        top = out.topk(3).values
        return wrong - true if kind == "margin" else (wrong - true) / (top[:, 0] - top[:, 2])

    assert torch.allclose(precise(x).float(), model.loss(x, [1, 7], kind), atol=1e-5)
    generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(x.shape, generator=generator, dtype=torch.double) for _ in range(5)]
    for direction in [*directions, grad.sign()]:
        h = 1e-7  # small, so that hardly a ReLU switches in between
        with torch.no_grad():
            numeric = (precise(x + h * direction) - precise(x - h * direction)) / (2 * h)
        analytic = (grad * direction).flatten(1).sum(1)
        assert torch.allclose(numeric, analytic, rtol=1e-3, atol=1e-6), (numeric, analytic)


def test_swapping_red_and_blue_changes_the_output():
    model, x = classifier(), images(2)
    assert not torch.allclose(model.logits(x), model.logits(x.flip(1)), atol=1e-3)


def test_frozen_and_in_evaluation_mode():
    model = classifier()
    model.train()
    assert not any(m.training for m in model.modules()) and not any(
        p.requires_grad for p in model.parameters()
    )
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = images(4).requires_grad_(True)
    model.loss(x, labels(4), "ce").sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# -- independence of the batch --------------------------------------------------------------------------------------
def results(model, x, y, size):
    losses, grads = [], []
    for start in range(0, len(x), size):
        part = x[start : start + size].clone().requires_grad_(True)
        loss = model.loss(part, y[start : start + size], "ce")
        grads.append(torch.autograd.grad(loss.sum(), part)[0])
        losses.append(loss.detach())
    return torch.cat(losses), torch.cat(grads)


@pytest.mark.parametrize("name", NETS)
def test_bitwise_the_same_in_any_batch(name):
    model, x, y = classifier(name), images(19), labels(19)
    loss, grad = results(model, x, y, 19)
    for size in (1, 2, 7, 32):
        other_loss, other_grad = results(model, x, y, size)
        assert torch.equal(loss, other_loss) and torch.equal(grad, other_grad)
    order = torch.randperm(19, generator=torch.Generator().manual_seed(0))
    other_loss, other_grad = results(model, x[order], [y[i] for i in order], 5)
    assert torch.equal(loss[order], other_loss) and torch.equal(grad[order], other_grad)


def test_unchecked_networks_run_one_image_at_a_time():
    """A squeeze-and-excitation block gives other bits by an image's place in the batch; alone it cannot."""
    import torchvision

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LogitsClassifier(torchvision.models.mobilenet_v3_small(num_classes=10), 10)
    x, y = images(5, 48), labels(5)
    loss, grad = results(model, x, y, 5)
    for size in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip((loss, grad), results(model, x, y, size), strict=True))


# -- features -------------------------------------------------------------------------------------------------------
def test_features_are_a_modules_output():
    model = classifier("mini_vgg", micro_batch=4)
    x = images(6)
    features = model.features(x, "features.4")  # the second convolution
    normalised = (x - model.mean) / model.std
    assert torch.allclose(features, model.network.features[:5](normalised), atol=1e-5)


def test_features_survive_a_relu_in_place():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 30 * 30, 10))
    model = LogitsClassifier(net, 10)
    x = images(2).requires_grad_(True)
    features = model.features(x, "0")
    assert (features < 0).any() and torch.allclose(features, net[0](x), atol=1e-6)
    (grad,) = torch.autograd.grad(features.pow(2).sum(), x)
    (expected,) = torch.autograd.grad(net[0](x).pow(2).sum(), x)
    assert torch.allclose(grad, expected, atol=1e-4)


def test_unknown_layer_names_the_nearest():
    with pytest.raises(GridError, match=r"did you mean 'stages\.1\.0\.conv2'"):
        classifier().features(images(1), "stage.1.0.conv2")


# -- input ----------------------------------------------------------------------------------------------------------
def test_a_network_for_another_size_is_one_clear_line():
    net = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 10))
    model = LogitsClassifier(net, 10)
    assert model.logits(images(2)).shape == (2, 10)

    class Folds(nn.Module):
        """Like some CIFAR networks: folds what is left of the picture into the batch."""

        def forward(self, x):
            return F.avg_pool2d(x, 8).permute(0, 2, 3, 1).reshape(-1, 3)

    with pytest.raises(BenchError, match="does it take images of this size"):
        LogitsClassifier(Folds(), 3).logits(images(2, 16)[:, :, :, :8])


def test_prepare_leaves_the_sample_alone_without_a_preparation():
    sample = Sample(images(1)[0], 3, "a")
    assert classifier().prepare(sample) is sample


@pytest.mark.parametrize(
    "wrong", [{"mean": (0.5,) * 3}, {"mean": (0.5,) * 3, "std": (0.0, 1.0, 1.0)}, {"micro_batch": 0}]
)
def test_wrong_construction(wrong):
    with pytest.raises(ValueError, match=r"mean|std|micro_batch"):
        LogitsClassifier(network(), 10, **wrong)
