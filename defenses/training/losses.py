"""Loss terms of the papers, as functions of tensors.

Distances are means over all elements unless the name says otherwise: the published codes use means, the papers often
print norms, and the two differ by the number of elements, which is why weights cannot be exchanged between them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Scores = Sequence[Sequence[Tensor]]
"""What a multi-scale discriminator returns: per scale the outputs of its layers, the last one the scores."""


# -- distances ----------------------------------------------------------------------------------------------------
def l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference: HGD's guidance (its code's mean, not a sum), NRP's L_feat, the alignment terms."""
    return (a - b).abs().mean()


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference."""
    return (a - b).square().mean()


def rmse(a: Tensor, b: Tensor) -> Tensor:
    """Root of the mean squared difference (APE-GAN's official code).

    1e-12 under the root keeps the gradient finite where both are equal; it changes the value by at most 1e-6.
    """
    return (mse(a, b) + 1e-12).sqrt()


def l2_norm(a: Tensor, b: Tensor) -> Tensor:
    """Mean over images of ||a - b||_2, the norm the papers print; its gradient is finite at 0."""
    return ((a - b).flatten(1).square().sum(1) + 1e-12).sqrt().mean()


# -- class activation features (CAFD) -----------------------------------------------------------------------------
def class_activation(features: Tensor, rows: Tensor) -> Tensor:
    """Phi = F * w_c, (B, C, H, W) from maps of that shape and rows of the last linear map, (B, C, 1, 1) or per pixel.

    Per image where one class is predicted (CAFD); per pixel, each with the row of its own class, behind a segmenter.
    """
    return features * rows


def enlarged(maps: Tensor, size: int = 32) -> Tensor:
    """Maps (B, C, H, W) enlarged bilinearly to `size` on each side that is smaller, as CAFD's code does."""
    shape = (max(size, int(maps.shape[-2])), max(size, int(maps.shape[-1])))
    return F.interpolate(maps, size=shape, mode="bilinear", align_corners=False)


def normalised_activation(phi: Tensor, size: int = 32) -> Tensor:
    """CAFA's code: ReLU, minus the minimum, over the maximum of the whole batch, bilinear to `size`."""
    positive = F.relu(phi)
    positive = positive - positive.min()
    positive = positive / positive.max().clamp(min=1e-12)
    return enlarged(positive, size)


def caf_eq6(
    clean: Tensor, restored: Tensor, clean_rows: Tensor, restored_rows: Tensor, form: str = "paper"
) -> Tensor:
    """Equation 6, CAFD': the distance of class activation features.

    Args:
        clean, restored: feature maps (B, C, H, W) of the clean and the denoised images.
        clean_rows, restored_rows: w_c of each, (B, C, 1, 1) or (B, C, H, W).
        form: `paper`: ||Phi_x - Phi_C(x')||_2; `code`: mean squares of the normalised maps, as in CAFA's code.
    """
    a, b = class_activation(clean, clean_rows), class_activation(restored, restored_rows)
    return l2_norm(a, b) if form == "paper" else mse(normalised_activation(a), normalised_activation(b))


def caf_eq7(
    clean: Tensor, restored: Tensor, clean_rows: Tensor, restored_rows: Tensor, form: str = "code"
) -> tuple[Tensor, Tensor]:
    """Equation 7, CAFD: distances of feature maps and of class weights, apart.

    The second has no gradient to the denoiser: an argmax picks rows of a frozen matrix.

    Args:
        clean, restored, clean_rows, restored_rows: as in `caf_eq6`.
        form: `paper`: Euclidean norms; `code`: mean squares, the maps enlarged bilinearly to 32x32.
    """
    if form == "paper":
        return l2_norm(clean, restored), l2_norm(clean_rows, restored_rows)
    return mse(enlarged(clean), enlarged(restored)), mse(clean_rows, restored_rows)


# -- adversarial terms on logits ----------------------------------------------------------------------------------
def _bce(logits: Tensor, value: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, value))


def vanilla_d(real: Tensor, fake: Tensor) -> Tensor:
    """Goodfellow et al. 2014: BCE(real, 1) + BCE(fake, 0)."""
    return _bce(real, 1.0) + _bce(fake, 0.0)


def vanilla_g(real: Tensor, fake: Tensor) -> Tensor:
    """BCE(fake, 1)."""
    return _bce(fake, 1.0)


def ragan_d(real: Tensor, fake: Tensor) -> Tensor:
    """Relativistic average (Jolicoeur-Martineau 2019): half of BCE(real - E fake, 1) + BCE(fake - E real, 0)."""
    return (_bce(real - fake.mean(), 1.0) + _bce(fake - real.mean(), 0.0)) / 2


def ragan_g(real: Tensor, fake: Tensor) -> Tensor:
    """The same with the targets exchanged."""
    return (_bce(real - fake.mean(), 0.0) + _bce(fake - real.mean(), 1.0)) / 2


def relativistic_d(real: Tensor, fake: Tensor) -> Tensor:
    """-log sigmoid(real - fake), pair by pair, as CAFD (equation 8) prints it."""
    return F.softplus(fake - real).mean()


def relativistic_g(real: Tensor, fake: Tensor) -> Tensor:
    """-log sigmoid(fake - real), as CAFD (equation 9) and NRP (equation 4) print it."""
    return F.softplus(real - fake).mean()


GANS = {
    "vanilla": (vanilla_d, vanilla_g),
    "ragan": (ragan_d, ragan_g),
    "relativistic": (relativistic_d, relativistic_g),
}
"""Discriminator and generator term by name."""


# -- multi-scale least squares (alignment) ------------------------------------------------------------------------
def lsgan(scores: Scores, value: float) -> Tensor:
    """Sum over scales of the mean of (score - value)^2."""
    return torch.stack([(scale[-1] - value).square().mean() for scale in scores]).sum()


def feature_matching(real: Scores, fake: Scores) -> Tensor:
    """pix2pixHD: sum over scales and layers but the last of mean |F(real) - F(fake)|, times 4 / (layers + 1) / scales.

    `layers` is the discriminator's n_layers, two fewer than its outputs. The real side has no gradient.
    """
    total = torch.zeros((), device=fake[0][0].device)
    for one, other in zip(real, fake, strict=True):
        for a, b in zip(one[:-1], other[:-1], strict=True):
            total = total + l1(a.detach(), b) * 4 / (len(one) - 1) / len(real)
    return total


# -- class centres (alignment) ------------------------------------------------------------------------------------
def centres(features: Tensor, labels: Tensor) -> dict[int, Tensor]:
    """Mean feature (D,) of every class among `labels` (N,) of `features` (N, D); negative labels are left out."""
    return {int(k): features[labels == k].mean(0) for k in labels.unique().tolist() if k >= 0}


def class_align(clean: Tensor, restored: Tensor, labels: Tensor) -> Tensor:
    """Sum over classes present of |m_c^k - m_a^k|, centres of clean and of restored features (mean absolute)."""
    a, b = centres(clean, labels), centres(restored, labels)
    return _sum([l1(a[k], b[k]) for k in a], restored)


def class_intra(restored: Tensor, labels: Tensor) -> Tensor:
    """Sum over classes of the mean |z - m^k| over the restored features z of class k."""
    own = centres(restored, labels)
    return _sum([l1(restored[labels == k], m) for k, m in own.items()], restored)


def class_inter(restored: Tensor, labels: Tensor, margin: float = 5.0, hinge: bool = True) -> Tensor:
    """Sum over ordered pairs k != i of margin - |m^k - m^i|, cut off at 0.

    Equation 8 of the paper prints no cut-off (`hinge=False`), its code has it.
    """
    own = list(centres(restored, labels).values())
    if len(own) < 2:
        return restored.sum() * 0
    means = torch.stack(own)
    gaps = margin - torch.cdist(means, means, p=1) / means.shape[1]
    pairs = ~torch.eye(len(own), dtype=torch.bool, device=gaps.device)
    return (gaps.clamp(min=0) if hinge else gaps)[pairs].sum()


def _sum(terms: list[Tensor], like: Tensor) -> Tensor:
    # A batch may have nothing with a class: then the term is zero but still part of the graph.
    return torch.stack(terms).sum() if terms else like.sum() * 0
