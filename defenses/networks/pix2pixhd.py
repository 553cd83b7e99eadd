"""GlobalGenerator and multi-scale discriminator of pix2pixHD (Wang et al., CVPR 2018), used by the alignment defense.

The generator's parameter names are those of pix2pixHD. Instance norm has neither parameters nor running statistics, so
training and evaluation do not differ.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from defenses.networks.padding import padded


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width), nn.ReLU(inplace=True),
            nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv_block(x)
        return out


class GlobalGenerator(nn.Module):
    """[-1,1] images to [-1,1] images: encoder, residual blocks, decoder, tanh.

    With the defaults 11,378,179 parameters; with `downsamplings` 4 (segmentation, detection) 182,443,267. Sizes not
    divisible by 2^downsamplings are padded and cropped back.

    Args:
        width: channels of the first convolution (ngf).
        downsamplings: stages of stride 2.
        blocks: residual blocks.
        size: side that images are resized to before the network and back from after it (bilinear, corners aligned, as
            the alignment code); None = it runs at their own size.
    """

    def __init__(
        self, width: int = 64, downsamplings: int = 2, blocks: int = 9, size: int | None = None
    ) -> None:
        super().__init__()
        if size is not None and size < 8:
            raise ValueError(f"size must be at least 8, got {size}")
        self.downsamplings, self.size = downsamplings, size
        layers: list[nn.Module] = [
            nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7), nn.InstanceNorm2d(width), nn.ReLU(inplace=True)
        ]  # fmt: skip
        channels = width
        for _ in range(downsamplings):
            layers += [nn.Conv2d(channels, 2 * channels, 3, 2, 1), nn.InstanceNorm2d(2 * channels)]
            layers.append(nn.ReLU(inplace=True))
            channels *= 2
        layers += [_Residual(channels) for _ in range(blocks)]
        for _ in range(downsamplings):
            layers.append(nn.ConvTranspose2d(channels, channels // 2, 3, 2, 1, output_padding=1))
            layers += [nn.InstanceNorm2d(channels // 2), nn.ReLU(inplace=True)]
            channels //= 2
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh()]
        self.model = nn.Sequential(*layers)
        init_gan(self)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1,1] to the same."""
        step = 2**self.downsamplings
        # Reflection needs more pixels than it pads: 3 at the full size, 1 at the smallest (instance norm also needs 2).
        if self.size is None:
            return padded(self.model, images, step, max(4, 2 * step))
        inner = F.interpolate(images, size=(self.size, self.size), mode="bilinear", align_corners=True)
        out = padded(self.model, inner, step, max(4, 2 * step))
        return F.interpolate(out, size=images.shape[-2:], mode="bilinear", align_corners=True)


class _Scale(nn.Module):
    """A PatchGAN discriminator that returns the output of every layer."""

    def __init__(self, inputs: int, width: int, layers: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(inputs, width, 4, 2, 2), nn.LeakyReLU(0.2, inplace=True))]
        )
        channels = width
        for i in range(1, layers + 1):
            outputs = min(2 * channels, 8 * width)
            self.stages.append(
                nn.Sequential(
                    nn.Conv2d(channels, outputs, 4, 2 if i < layers else 1, 2),
                    nn.InstanceNorm2d(outputs),
                    nn.LeakyReLU(0.2, inplace=True),
                )
            )
            channels = outputs
        self.stages.append(nn.Sequential(nn.Conv2d(channels, 1, 4, 1, 2)))

    def forward(self, x: Tensor) -> list[Tensor]:
        out = []
        for stage in self.stages:
            x = stage(x)
            out.append(x)
        return out


class MultiscaleDiscriminator(nn.Module):
    """PatchGAN discriminators at the full and at halved sizes, with their intermediate features.

    Args:
        inputs: channels of the images, with those of the condition: the alignment code adds one plane per class.
        width: channels of the first convolution (ndf).
        layers: convolutions with normalisation in each scale (n_layers).
        scales: number of discriminators (num_D).
    """

    def __init__(self, inputs: int = 3, width: int = 64, layers: int = 3, scales: int = 2) -> None:
        super().__init__()
        self.layers = layers
        self.scales = nn.ModuleList(_Scale(inputs, width, layers) for _ in range(scales))
        init_gan(self)

    def forward(self, images: Tensor) -> list[list[Tensor]]:
        """For each scale, the outputs of its layers; the last one is the map of scores."""
        out = []
        for i, scale in enumerate(self.scales):
            if i:
                images = F.avg_pool2d(images, 3, 2, 1, count_include_pad=False)
            out.append(scale(images))
        return out


def init_gan(network: nn.Module) -> None:
    """N(0, 0.02) for convolution weights, zero for biases."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0.0, 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
