"""Where class activation features come from, in networks of several shapes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.errors import NotApplicable
from tasks.classification import cifar_nets
from tasks.classification.model import LogitsClassifier
from tasks.heads import final_linear, last_convolution, last_maps

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


def test_maps_before_a_pooling_module():
    network = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)
    )
    target = LogitsClassifier(network, 3)
    assert last_maps(target, IMAGES) == "1" and last_convolution(target) == "0"


def test_networks_without_them():
    headless = LogitsClassifier(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 4)
    with pytest.raises(NotApplicable, match=r"one output per class \(4\); Sequential has none"):
        final_linear(headless)
    flat = LogitsClassifier(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)), 4)
    for find in (lambda: last_convolution(flat), lambda: last_maps(flat, IMAGES)):
        with pytest.raises(NotApplicable, match="3072 channels"):
            find()
