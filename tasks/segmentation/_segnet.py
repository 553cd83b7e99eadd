"""SegNet-Basic as a backbone of mmseg, and its loss; a config asks for them with `custom_imports`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class SegNetBasic(BaseModule):  # type: ignore[misc]  # mmengine has no types
    """Encoder and decoder of SegNet-Basic (Badrinarayanan et al. 2017, section 4.1; Badrinarayanan et al. 2015).

    Four times convolution, batch normalisation, ReLU and 2x2 max-pooling, then four times unpooling, convolution and
    batch normalisation without ReLU. Unpooling puts each value where its maximum was and zeros elsewhere. All
    convolutions are 7x7 with 64 channels and no bias; the classifier is the decode head's. As in the authors' Caffe
    model, images are 0..255 in BGR and pass local response normalisation first, and pooling keeps a last odd row or
    column.

    Args:
        channels: channels of every convolution.
        depth: number of encoders and of decoders.
    """

    #: Where two values of a block change places as its maximum, the unpooled one moves by a pixel.
    jumps = True

    def __init__(self, channels: int = 64, depth: int = 4) -> None:
        super().__init__(init_cfg={"type": "Kaiming", "layer": "Conv2d", "mode": "fan_in"})
        shape = {"kernel_size": 7, "padding": 3, "norm_cfg": {"type": "BN"}}
        self.normalise = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75)
        self.encoders = nn.ModuleList(
            ConvModule(channels if k else 3, channels, **shape) for k in range(depth)
        )
        self.decoders = nn.ModuleList(
            ConvModule(channels, channels, act_cfg=None, **shape) for _ in range(depth)
        )

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Features (B, channels, H, W) of images (B, 3, H, W)."""
        x = self.normalise(images)
        pooled = []
        for encoder in self.encoders:
            x = encoder(x)
            size = x.shape[-2:]
            x, indices = F.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
            pooled.append((indices, size))
        for decoder in self.decoders:
            indices, size = pooled.pop()
            x = decoder(F.max_unpool2d(x, indices, (2, 2), output_size=size))
        return (x,)


@MODELS.register_module()
class BalancedCrossEntropy(nn.Module):
    """Cross-entropy with a weight a class, averaged over the labelled pixels by their weights.

    mmseg's own loss looks up a weight for ignored labels too, which have none.

    Args:
        class_weight: one weight a class.
    """

    loss_name = "loss_ce"
    class_weight: Tensor

    def __init__(self, class_weight: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("class_weight", torch.tensor(class_weight), persistent=False)

    def forward(self, logits: Tensor, labels: Tensor, *, ignore_index: int, **_: Any) -> Tensor:
        """The loss of logits (B, K, H, W) against labels (B, H, W), a scalar."""
        return F.cross_entropy(logits, labels, self.class_weight, ignore_index=ignore_index)
