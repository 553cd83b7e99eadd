"""DISCO (Ho and Vasconcelos, NeurIPS 2022): an EDSR encoder, and colours predicted from local features."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from defenses.networks.edsr import ResidualBlock


class DISCONet(nn.Module):
    """Per-pixel features of EDSR-baseline, and a local implicit function that turns them into colours.

    The implicit function (LIIF, Chen et al., CVPR 2021) sees, for every pixel, the 3x3 features around it, where the
    pixel lies relative to them and how large it is, and knows nothing else of the image. Its first layer is applied to
    the features as a 3x3 convolution, which is the same product without the copies. 1,567,299 parameters with the
    defaults.

    The nearest features are used alone. LIIF blends four neighbouring predictions, but where the output has the size
    of the input, as in the defense, their weights are 1, 0, 0, 0 (in its code not so in the last row and column, where
    a clamp makes them equal).

    Args:
        width: channels of the features.
        blocks: residual blocks of the encoder.
        hidden: width of the implicit function's layers.
        layers: number of them.
        res_scale: factor of the encoder's residual blocks.
    """

    def __init__(
        self, width: int = 64, blocks: int = 16, hidden: int = 256, layers: int = 4, res_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.Sequential(
            *(ResidualBlock(width, res_scale) for _ in range(blocks)), nn.Conv2d(width, width, 3, padding=1)
        )
        self.local = nn.Conv2d(width, hidden, 3, padding=1)
        self.place = nn.Linear(4, hidden, bias=False)
        tail: list[nn.Module] = [nn.ReLU()]
        for _ in range(layers - 1):
            tail += [nn.Conv2d(hidden, hidden, 1), nn.ReLU()]
        self.tail = nn.Sequential(*tail, nn.Conv2d(hidden, 3, 1))
        # Both are columns of one linear layer with 9 width + 4 inputs.
        bound = 1 / math.sqrt(9 * width + 4)
        for parameter in (*self.local.parameters(), *self.place.parameters()):
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, images: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """(B, 3, H, W) to the same, or to (B, 3, *size), not clamped."""
        x = self.head(images)
        x = self.local(self.body(x) + x)
        inside = (int(x.shape[-2]), int(x.shape[-1]))
        outside = inside if size is None else (int(size[0]), int(size[1]))
        rows, columns, where = local_coordinates(inside, outside)
        if outside != inside:
            x = x[:, :, rows.to(x.device)][:, :, :, columns.to(x.device)]
        else:
            where = where[:1, :1]  # the same for every pixel
        out: Tensor = self.tail(x + self.place(where.to(x)).permute(2, 0, 1))
        return out


def local_coordinates(inside: Sequence[int], outside: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Where the pixels of an image lie among feature cells that cover the same area.

    Args:
        inside: (h, w) of the feature maps.
        outside: (H, W) of the image.

    Returns:
        rows (H,) and columns (W,) of the nearest cells, and (H, W, 4) of what the implicit function sees beside
        features: position (y, x) relative to the cell's centre, in half cells ([-1,1]), then height and width of a
        pixel, in half cells.
    """
    nearest, offsets = [], []
    for cells, pixels in zip(inside, outside, strict=True):
        centre = (torch.arange(pixels, dtype=torch.float64) + 0.5) * cells / pixels  # in cells
        index = centre.floor().clamp(max=cells - 1)
        nearest.append(index.long())
        offsets.append((2 * (centre - index - 0.5)).float())
    extent = torch.tensor([2 * cells / pixels for cells, pixels in zip(inside, outside, strict=True)])
    position = torch.stack(torch.meshgrid(*offsets, indexing="ij"), -1)
    return nearest[0], nearest[1], torch.cat([position, extent.expand(*outside, 2)], -1)
