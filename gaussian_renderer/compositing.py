"""The rendered head over its backdrop (tensors, on any device).

Pictures are (B, 3, H, W) in [0, 1], RGB. A rendering is premultiplied: its colour over black, with alpha beside it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.constants import IMAGE_SIZE
from utils.image_metrics import blur, gaussian_kernel


def composite(rgb: Tensor, alpha: Tensor, backdrop: Tensor, feather: float = 0.0) -> Tensor:
    """(B, 3, H, W): the rendering `rgb` (premultiplied), `alpha` (B, 1, H, W) over `backdrop`.

    `feather` is the standard deviation of the soft edge in pixels of a 512 picture; 0 trusts alpha alone. Feathering
    scales colour and alpha alike, so that no dark or bright halo can appear.
    """
    if feather > 0:
        weight = edge_weight(alpha, feather * alpha.shape[-1] / IMAGE_SIZE)
        rgb, alpha = rgb * weight, alpha * weight
    return torch.addcmul(rgb, 1 - alpha, backdrop)


def edge_weight(alpha: Tensor, sigma: float) -> Tensor:
    """(B, 1, H, W) in [0, 1]: 1 inside the shape `alpha`, about 0.1 at its edge (more where sigma < 1).

    The shape (alpha with its small holes closed) is eroded, then blurred with a Gaussian. What the picture's border cuts
    off counts as inside, so that shoulders do not fade at the bottom. A wide edge is made at a lower resolution, with a
    sigma of 1 to 2 pixels there.
    """
    height, width = alpha.shape[-2:]
    factor = 2 ** max(0, math.floor(math.log2(sigma)))
    shape = F.interpolate(alpha, (height // factor, width // factor), mode="area").sub(0.05).div(0.9).clamp(0, 1)
    sigma /= factor
    reach = round(1.25 * sigma)
    closed = _shrink(-_shrink(-shape, reach), reach)
    weight = blur(_shrink(closed, reach), gaussian_kernel(sigma, device=closed.device), "replicate")
    return F.interpolate(weight, (height, width), mode="bilinear", align_corners=False) if factor > 1 else weight


def rim_recoloured(shape: Tensor, sigma: float) -> Tensor:
    """(B, 4, H, W) premultiplied RGBA, its alpha kept: towards the edge, over about 2 sigma, colours of within take over.

    For a shape cut out of a picture: its outermost pixels hold what was behind it there. What is too thin to have a within
    takes its own mean.
    """
    alpha, inner = shape[:, 3:], edge_weight(shape[:, 3:], sigma)
    spread = blur(shape * (inner.square() + 1e-3), gaussian_kernel(sigma, device=shape.device), "replicate")
    return torch.cat([torch.lerp(straight(spread), straight(shape), inner) * alpha, alpha], 1)


def straight(picture: Tensor) -> Tensor:
    """(B, 3, H, W) the colours of a premultiplied (B, 4, H, W) RGBA picture, not premultiplied; black where it is clear."""
    return picture[:, :3] / picture[:, 3:].clamp_min(1e-4)


def _shrink(maps: Tensor, reach: int) -> Tensor:
    """Minimum over squares of side 2 reach + 1 (along rows, then columns); what lies outside the picture has no say."""
    maps = F.max_pool2d(-maps, (1, 2 * reach + 1), 1, (0, reach))
    return -F.max_pool2d(maps, (2 * reach + 1, 1), 1, (reach, 0))


def to_bytes(pictures: Tensor) -> Tensor:
    """(B, 3 or 4, H, W) in [0, 1] -> (B, H, W, 3 or 4) uint8, rounded, on the same device."""
    return pictures.mul(255).add_(0.5).clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def from_bytes(pictures: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [0, 1], on the same device."""
    return pictures.permute(0, 3, 1, 2).contiguous().float().div_(255)
