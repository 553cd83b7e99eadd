"""Where class activation features come from, in networks of several shapes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.errors import NotApplicable
from bench.registry import MODELS
from tasks.classification import cifar_nets
from tasks.classification.model import LogitsClassifier
from tasks.heads import (
    class_activation_maps,
    class_rows,
    feature_layer,
    final_linear,
    last_convolution,
    last_maps,
    stage_ends,
)

IMAGES = torch.rand(2, 3, 32, 32)


def pooled(target: LogitsClassifier, layer: str) -> torch.Tensor:
    return target.features(IMAGES, layer).mean((2, 3))


@pytest.mark.parametrize("name", ["mini_vgg", "mini_resnet", "mini_wrn"])
def test_the_linear_layer_of_the_pooled_maps_gives_the_logits(name):
    target = LogitsClassifier(getattr(cifar_nets, name)(), 10)
    layer = last_maps(target, IMAGES)
    logits = final_linear(target)(pooled(target, layer))
    assert torch.allclose(logits, target.logits(IMAGES), atol=1e-4)
    convolution = dict(target.network.named_modules())[last_convolution(target)]
    assert isinstance(convolution, nn.Conv2d)
    assert convolution.out_channels == final_linear(target).in_features


def test_padding_is_no_stage():
    """A module that pads makes maps of a size of its own; `stage:K` counts those of the layers."""
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(4, 5, 3, stride=2)]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3))
    assert stage_ends(network, lambda: network(IMAGES)) == ["0", "2"]


def test_maps_before_a_pooling_module():
    network = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)
    )
    target = LogitsClassifier(network, 3)
    assert last_maps(target, IMAGES) == "1" and last_convolution(target) == "0"


def test_class_activation_maps_by_hand():
    convolution, linear = nn.Conv2d(3, 2, 1, bias=False), nn.Linear(2, 3)
    convolution.weight.data = torch.tensor([[1.0, 0, 0], [0, 2, -1]])[:, :, None, None]
    linear.weight.data, linear.bias.data = (
        torch.tensor([[1.0, 0], [0, 3], [-2, 1]]),
        torch.tensor([0.0, 0, 5]),
    )
    target = LogitsClassifier(nn.Sequential(convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear), 3)
    # Maps r and 2 g - b. Image 0: red on the left only; averages (0.5, -0.5), logits (0.5, -1.5, 3.5). Image 1: green
    # below; averages (0, 1), logits (0, 3, 6). Image 2, the same with 2 green and no red above: (0, 2.25, 5.75).
    images = torch.zeros(2, 3, 2, 2)
    images[0, 0, :, 0], images[0, 2, 1] = 1, 1
    images[1, 1, 1] = 1
    maps = class_activation_maps(target, images)
    # Class 2 for both: -2 r + (2 g - b).
    assert maps.tolist() == [[[-2, 0], [-3, -1]], [[0, 0], [2, 2]]]
    linear.bias.data[2] = 0
    # Now (0.5, -1.5, -1.5) and (0, 3, 1): class 0, which is r, and class 1, 3 (2 g - b).
    maps = class_activation_maps(target, images)
    assert maps.tolist() == [[[1, 0], [1, 0]], [[0, 0], [6, 6]]]
    assert not maps.requires_grad


@pytest.mark.parametrize("name", ["mini_vgg", "mini_resnet", "mini_wrn"])
def test_the_mean_of_a_class_activation_map_is_the_logit_but_for_the_bias(name):
    target = MODELS.create(name).load(torch.device("cpu"))
    maps, logits = class_activation_maps(target, IMAGES), target.logits(IMAGES)
    assert maps.shape[0] == 2 and maps.shape[1] == maps.shape[2] > 1
    top, label = logits.max(1)
    bias = final_linear(target).bias[label]
    assert torch.allclose(maps.mean((1, 2)) + bias, top, atol=1e-4) and (top - bias).abs().min() > 0.1


def test_networks_without_class_activation_maps():
    # The largest value of each map in place of its average; a hidden layer as wide as the maps.
    for rest in (
        [nn.AdaptiveMaxPool2d(1), nn.Flatten()],
        [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 5)],
    ):
        target = LogitsClassifier(nn.Sequential(nn.Conv2d(3, 5, 3), *rest, nn.Linear(5, 3)), 3)
        with pytest.raises(
            NotApplicable, match="Sequential has no class activation maps: its logits are not what"
        ):
            class_activation_maps(target, IMAGES)
    target.task = "detection"
    with pytest.raises(NotApplicable, match="need one class for the image, which detection does not have"):
        class_activation_maps(target, IMAGES)


def test_networks_without_them():
    headless = LogitsClassifier(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 4)
    with pytest.raises(NotApplicable, match=r"one output per class \(4\); Sequential has none"):
        final_linear(headless)
    flat = LogitsClassifier(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)), 4)
    for find in (lambda: last_convolution(flat), lambda: last_maps(flat, IMAGES)):
        with pytest.raises(NotApplicable, match="3072 channels"):
            find()


@pytest.mark.parametrize("name", ["mini_pspnet", "mini_deeplabv3"])
def test_a_segmenter_ends_in_a_linear_map_of_every_pixel(name):
    target = MODELS.create(name).load(torch.device("cpu"))
    images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    layer, last = last_maps(target, images), final_linear(target)
    maps = target.features(images, layer)
    with torch.no_grad():
        logits = nn.functional.interpolate(last(maps), size=(96, 96), mode="bilinear")
        assert torch.allclose(logits, target.logits(images), atol=1e-4)
        # The class activation features of a pixel, summed over channels, are the score of its class, but for the bias.
        rows = class_rows(last, maps, lambda: pytest.fail("not asked for"))
        best = (last(maps) - last.bias[:, None, None]).gather(1, last(maps).argmax(1, keepdim=True))
        assert torch.allclose((maps * rows).sum(1, keepdim=True), best, atol=1e-4)
    convolution = dict(target.network.named_modules())[last_convolution(target)]
    assert isinstance(convolution, nn.Conv2d) and convolution.out_channels == last.in_channels
    assert convolution is not last
    assert feature_layer(target, images) == "backbone"
    assert target.features(images, "backbone.layer4").shape[0] == 2


def test_rows_of_a_classifier():
    target = LogitsClassifier(cifar_nets.mini_vgg(), 10)
    layer = last_maps(target, IMAGES)
    assert feature_layer(target, IMAGES) == layer
    maps = target.features(IMAGES, layer)
    rows = class_rows(final_linear(target), maps, lambda: target.logits(IMAGES))
    with torch.no_grad():
        best = (
            target.logits(IMAGES).max(1).values - final_linear(target).bias[target.logits(IMAGES).argmax(1)]
        )
        assert torch.allclose((maps * rows).sum(1).mean((1, 2)), best, atol=1e-4)


def test_a_detector_has_no_linear_map_from_maps_to_classes():
    target = MODELS.create("mini_mask_rcnn").load(torch.device("cpu"))
    with pytest.raises(NotApplicable, match=r"which a detector \(MaskRCNN\) does not have"):
        final_linear(target)
    assert feature_layer(target, torch.rand(1, 3, 96, 96)) == "backbone"
    segmenter = MODELS.create("mini_pspnet").load(torch.device("cpu"))
    segmenter.num_classes = 7
    with pytest.raises(NotApplicable, match=r"ends in a 1x1 convolution with one output per class \(7\)"):
        final_linear(segmenter)
