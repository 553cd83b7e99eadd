"""CIFAR-kind networks with free width and depth: VGG, ResNet and WideResNet for 32x32 inputs.

The same classes give the narrow nets of the embedded zoo and the sizes used in papers:

* ``build("vgg-19")``: Simonyan and Zisserman 2015, configuration E, with batch normalisation and one linear layer;
* ``build("resnet-50")``: ResNet-50 of He et al. 2016 with a 3x3 stem of stride 1 and no pooling after it;
* ``build("wrn-34-10")``: WRN-34-10 of Zagoruyko and Komodakis 2016 (pre-activation blocks).

All map ``(B, 3, 32, 32)`` normalised images to ``(B, num_classes)`` logits and accept larger inputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from bench.errors import GridError, unknown

#: Convolutions per stage of VGG-11, 13, 16 and 19 (table 1, configurations A, B, D, E).
VGG_DEPTHS: dict[int, tuple[int, ...]] = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


def _init(module: nn.Module) -> None:
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.BatchNorm2d):
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)
        elif isinstance(m, nn.Linear):
            nn.init.zeros_(m.bias)


class VGG(nn.Module):
    """Stages of 3x3 convolutions, each closed by a 2x2 max pooling, then global average pooling and one linear.

    Args:
        convs: number of convolutions of each stage.
        widths: output channels of each stage, as many as ``convs``.
        num_classes: number of logits.
    """

    def __init__(self, convs: Sequence[int], widths: Sequence[int], num_classes: int = 10) -> None:
        super().__init__()
        if len(convs) != len(widths):
            raise ValueError(
                f"convs and widths: {len(convs)} and {len(widths)} stages, expected as many of each"
            )
        layers: list[nn.Module] = []
        channels = 3
        for count, width in zip(convs, widths, strict=True):
            for _ in range(count):
                layers += [
                    nn.Conv2d(channels, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                ]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, num_classes)
        _init(self)

    @classmethod
    def of_depth(cls, depth: int, width: int = 64, num_classes: int = 10) -> VGG:
        """VGG-11, 13, 16 or 19 with ``width`` channels in the first stage (64 in the paper)."""
        if depth not in VGG_DEPTHS:
            raise ValueError(f"depth: {depth} is not one of {', '.join(map(str, VGG_DEPTHS))}")
        return cls(VGG_DEPTHS[depth], (width, 2 * width, 4 * width, 8 * width, 8 * width), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 3, H, W)`` normalised images to ``(B, num_classes)`` logits."""
        logits: Tensor = self.fc(self.features(x).mean(dim=(2, 3)))
        return logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = width * self.expansion
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a shortcut, four times as wide at its ends."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = width * self.expansion
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        out: Tensor = self.relu(self.bn3(self.conv3(y)) + self.shortcut(x))
        return out


#: Kind and number of the blocks in each stage of a ResNet (table 1).
RESNET_DEPTHS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


class ResNet(nn.Module):
    """CIFAR-kind ResNet: a 3x3 stem of stride 1, then stages that double the width and halve the size.

    Args:
        block: :class:`BasicBlock` or :class:`Bottleneck`.
        blocks: number of blocks of each stage.
        width: channels of the stem and of the first stage.
        num_classes: number of logits.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: Sequence[int],
        width: int = 64,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        stages: list[nn.Module] = []
        channels = width
        for stage, count in enumerate(blocks):
            layers: list[nn.Module] = []
            for k in range(count):
                layers.append(block(channels, width << stage, 2 if stage > 0 and k == 0 else 1))
                channels = (width << stage) * block.expansion
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, num_classes)
        _init(self)

    @classmethod
    def of_depth(cls, depth: int, num_classes: int = 10) -> ResNet:
        """ResNet-18, 34, 50, 101 or 152 at its published width."""
        if depth not in RESNET_DEPTHS:
            raise ValueError(f"depth: {depth} is not one of {', '.join(map(str, RESNET_DEPTHS))}")
        return cls(*RESNET_DEPTHS[depth], 64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 3, H, W)`` normalised images to ``(B, num_classes)`` logits."""
        x = self.stages(self.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


class WideBlock(nn.Module):
    """Pre-activation block of two 3x3 convolutions."""

    def __init__(self, channels: int, width: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.relu = nn.ReLU()
        self.shortcut = (
            nn.Conv2d(channels, width, 1, stride, bias=False) if channels != width or stride != 1 else None
        )

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu(self.bn1(x))
        y = self.conv1(active)
        y = self.conv2(self.dropout(self.relu(self.bn2(y))))
        # As in the paper's code, a projection starts from the activated input and an identity from the raw one.
        out: Tensor = y + (x if self.shortcut is None else self.shortcut(active))
        return out


class WideResNet(nn.Module):
    """WRN-``depth``-``widen``: three stages of ``(depth - 4) / 6`` pre-activation blocks.

    Args:
        depth: 10, 16, 22, 28, 34, 40 ...: four more than a multiple of six.
        widen: width factor k.
        num_classes: number of logits.
        base: channels of the stem and, times ``widen``, of the first stage (16 in the paper).
        dropout: dropout rate between a block's convolutions.
    """

    def __init__(
        self, depth: int = 34, widen: int = 10, num_classes: int = 10, base: int = 16, dropout: float = 0.0
    ) -> None:
        super().__init__()
        _check_depth(depth)
        count = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, base, 3, 1, 1, bias=False)
        stages: list[nn.Module] = []
        channels = base
        for stage in range(3):
            width = (base * widen) << stage
            layers: list[nn.Module] = []
            for k in range(count):
                layers.append(WideBlock(channels, width, 2 if stage > 0 and k == 0 else 1, dropout))
                channels = width
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(channels, num_classes)
        _init(self)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 3, H, W)`` normalised images to ``(B, num_classes)`` logits."""
        x = self.relu(self.bn1(self.stages(self.conv1(x))))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


def _check_depth(depth: int) -> None:
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth: {depth} is not 4 more than a multiple of 6 (10, 16, 22, 28, 34 ...)")


def parameter_count(model: nn.Module) -> int:
    """Number of weights, buffers such as running means not counted."""
    return sum(p.numel() for p in model.parameters())


def mini_vgg(num_classes: int = 10) -> VGG:
    """VGG of four convolutions, 16 to 64 channels."""
    return VGG((1, 1, 2), (16, 32, 64), num_classes)


def mini_resnet(num_classes: int = 10) -> ResNet:
    """ResNet-8: three basic blocks, 16 to 64 channels."""
    return ResNet(BasicBlock, (1, 1, 1), 16, num_classes)


def mini_wrn(num_classes: int = 10) -> WideResNet:
    """WRN-10-2 on a stem of 8 channels: 16 to 64 channels."""
    return WideResNet(10, 2, num_classes, base=8)


MINI: dict[str, Callable[[int], nn.Module]] = {
    "mini_vgg": mini_vgg, "mini_resnet": mini_resnet, "mini_wrn": mini_wrn,
}  # fmt: skip
_WIDE = re.compile(r"wrn-(\d+)-(\d+)")
#: Names that `build` knows; of WideResNets those in use, any other depth and width will do as well.
ARCHS: tuple[str, ...] = (
    *(f"vgg-{depth}" for depth in VGG_DEPTHS), *(f"resnet-{depth}" for depth in RESNET_DEPTHS),
    "wrn-16-4", "wrn-28-10", "wrn-28-20", "wrn-34-10", *MINI,
)  # fmt: skip


def check_arch(arch: str) -> None:
    """Refuse what `build` has no network for.

    Raises:
        GridError: no such network.
    """
    wide = _WIDE.fullmatch(arch)
    if wide is not None and int(wide[2]) > 0:
        try:
            _check_depth(int(wide[1]))
        except ValueError as error:
            raise GridError(f"arch '{arch}': {error}") from None
    elif arch not in ARCHS:
        raise GridError(f"{unknown('arch', arch, ARCHS)}; WideResNets are wrn-DEPTH-WIDTH")


def build(arch: str, num_classes: int = 10) -> nn.Module:
    """The network of this name: ``wrn-DEPTH-WIDTH``, ``vgg-DEPTH``, ``resnet-DEPTH``, or one of the zoo's.

    Raises:
        GridError: no such network.
    """
    check_arch(arch)
    wide = _WIDE.fullmatch(arch)
    if wide is not None:
        return WideResNet(int(wide[1]), int(wide[2]), num_classes)
    if arch in MINI:
        return MINI[arch](num_classes)
    kind, _, depth = arch.partition("-")
    made: nn.Module = (VGG if kind == "vgg" else ResNet).of_depth(int(depth), num_classes=num_classes)
    return made


def smallest_input(network: nn.Module) -> int:
    """Pixels a side that the network needs: each pooling of a VGG halves them."""
    return 1 << sum(isinstance(m, nn.MaxPool2d) for m in network.modules())


__all__ = [
    "ARCHS", "RESNET_DEPTHS", "VGG", "VGG_DEPTHS", "BasicBlock", "Bottleneck", "ResNet", "WideBlock", "WideResNet",
    "build", "check_arch", "mini_resnet", "mini_vgg", "mini_wrn", "parameter_count", "smallest_input",
]  # fmt: skip
