"""What training minimises: each term has one function and one weight (arguments/__init__.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from gaussian_renderer import Rendering, depth_to_normal
from scene.dataset import Batch
from utils.image_metrics import ssim


def masked_l1(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Mean absolute difference of (B, C, H, W) pictures under a (B, 1, H, W) weight."""
    return ((x - y).abs() * weight).sum() / (weight.sum() * x.shape[1]).clamp_min(1.0)


def square_crops(images: Tensor, boxes: Tensor, size: int = 64) -> Tensor:
    """Bilinear crops (B, C, size, size) of (B, C, H, W) where the (B, 1, H, W) mask `boxes` is set (one rectangle each)."""
    height, width = images.shape[-2:]
    grids = []
    for box in boxes[:, 0]:
        rows, columns = box.any(1).nonzero()[:, 0], box.any(0).nonzero()[:, 0]
        if len(rows) == 0:  # the lips lie outside the window: the whole picture stands in
            rows, columns = torch.tensor([0, height - 1]), torch.tensor([0, width - 1])
        y = torch.linspace(float(rows[0]) + 0.5, float(rows[-1]) + 0.5, size) / height * 2 - 1
        x = torch.linspace(float(columns[0]) + 0.5, float(columns[-1]) + 0.5, size) / width * 2 - 1
        grids.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), -1))
    return torch.nn.functional.grid_sample(images, torch.stack(grids).to(images), align_corners=False)


def image_losses(config, drawn: Rendering, batch: Batch, perceptual, generator: torch.Generator) -> dict[str, Tensor]:
    """Weighted terms that compare a drawn batch with its frames; their sum is minimised.

    Both are put on the same random colour, new each time, so that alpha cannot hide behind any background.
    """
    device = drawn.rgb.device
    mask = batch.mask.to(device).float()
    plain = torch.rand(len(batch.ids), 3, 1, 1, generator=generator).to(device)
    image = drawn.rgb + (1 - drawn.alpha) * plain
    target = batch.image.to(device).float() / 255.0 * mask + plain * (1 - mask)
    terms = {
        "l1": (1 - config.lambda_ssim) * (image - target).abs().mean(),
        "ssim": config.lambda_ssim * (1 - ssim(image, target)).mean(),
        "lips": config.lambda_lips * masked_l1(image, target, batch.lips.to(device)),
        "eyes": config.lambda_eyes * masked_l1(image, target, batch.eyes.to(device)),
        "mask": config.lambda_mask * (drawn.alpha - mask).abs().mean(),
    }
    if perceptual is not None:
        pair = (image, target)
        if config.perceptual_lips_only:
            pair = tuple(square_crops(x, batch.lips) for x in pair)
        terms["perceptual"] = config.lambda_perceptual * perceptual(*pair).mean()
    if config.lambda_normal:
        depth = drawn.maps.depth / drawn.alpha.clamp_min(1e-6)
        agreement = (drawn.maps.normal * depth_to_normal(depth, batch.conditions.intrinsics.to(device))).sum(1, keepdim=True)
        terms["normal"] = config.lambda_normal * ((drawn.alpha.detach() - agreement) * mask).mean()
    if config.lambda_distortion:
        terms["distortion"] = config.lambda_distortion * drawn.maps.distortion.mean()
    return terms
