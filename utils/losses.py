"""What training minimises: each term has one function and one weight (arguments/__init__.py)."""

from __future__ import annotations

import torch
from diff_surfel_rasterization import ssim_l1
from torch import Tensor

from gaussian_renderer import Rendering, depth_to_normal
from scene.dataset import Batch


def box_mask(boxes: Tensor, height: int, width: int) -> Tensor:
    """(B, 1, height, width) bool: inside any of the boxes (B, K, 4) left, top, right, bottom."""
    left, top, right, bottom = boxes[..., None].unbind(2)
    x, y = (torch.arange(size, device=boxes.device) for size in (width, height))
    columns, rows = (x >= left) & (x < right), (y >= top) & (y < bottom)  # (B, K, w), (B, K, h)
    return (rows[..., None] & columns[..., None, :]).any(1, keepdim=True)


def random_square(images: Tensor, side: int) -> Tensor:
    """(B, 1, 4) left, top, right, bottom: a square somewhere in pictures (B, C, H, W), the same in all, smaller where they are."""
    edges = []
    for size in images.shape[:-3:-1]:
        length = min(side, size)
        first = torch.randint(size - length + 1, (1,), device=images.device)
        edges.append((first, first + length))
    (left, right), (top, bottom) = edges
    return torch.cat([left, top, right, bottom]).expand(len(images), 1, 4)


def square_crops(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Bilinear crops (B K, C, size, size) of (B, C, H, W) at boxes (B, K, 4); where one is empty, of the whole picture."""
    height, width = images.shape[-2:]
    left, top, right, bottom = boxes[..., None].float().unbind(2)  # (B, K, 1) each
    seen = (right > left) & (bottom > top)
    left, top, right, bottom = left * seen, top * seen, right.where(seen, width), bottom.where(seen, height)
    t = torch.linspace(0.0, 1.0, size, device=images.device)
    x = ((left + 0.5) * (1 - t) + (right - 0.5) * t) / width * 2 - 1  # (B, K, size)
    y = ((top + 0.5) * (1 - t) + (bottom - 0.5) * t) / height * 2 - 1
    grid = torch.stack([x[:, :, None].expand(-1, -1, size, -1), y[..., None].expand(-1, -1, -1, size)], -1)
    crops = torch.nn.functional.grid_sample(images, grid.flatten(1, 2), align_corners=False)  # (B, C, K size, size)
    return crops.unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)


def perceptual_distance(config, perceptual, image: Tensor, target: Tensor, lips: Tensor) -> Tensor:
    """Sum over the views of config.perceptual_on of the pictures' mean distance. `lips` (B, 1, 4).

    Lips and square go through the network together: a GPU takes hardly longer for both.
    """
    terms, side = [], config.perceptual_side
    boxes = [lips if name == "lips" else random_square(image, side) for name in config.perceptual_on if name != "window"]
    if boxes:
        crops = (square_crops(x, torch.cat(boxes, 1), side) for x in (image, target))
        terms.append(len(boxes) * perceptual(*crops).mean())
    if "window" in config.perceptual_on:
        terms.append(perceptual(image, target).mean())
    return sum(terms)


def image_losses(config, drawn: Rendering, batch: Batch, plain: Tensor, perceptual) -> dict[str, Tensor]:
    """Weighted terms that compare a drawn batch with its frames; their sum is minimised.

    Both are put on `plain` (B, 3, 1, 1), a random colour, new each time, so that alpha cannot hide behind any background.
    Every term is a mean over frames, so that shares of a batch can be averaged. Nothing waits for the device.
    """
    mask = batch.mask.float()
    image = drawn.rgb + (1 - drawn.alpha) * plain
    target = torch.lerp(plain, batch.image.float() / 255.0, mask)
    lips, eyes = (box_mask(boxes, *image.shape[-2:]).float() for boxes in (batch.lips, batch.eyes))
    similarity, l1 = ssim_l1(image, target, torch.cat([torch.ones_like(lips), lips, eyes], 1))
    in_lips, in_eyes = (l1[:, k] / w.mean((1, 2, 3)).clamp_min(1e-6) for k, w in ((1, lips), (2, eyes)))  # means over each square
    terms = {
        "l1": (1 - config.lambda_ssim) * l1[:, 0].mean(),
        "ssim": config.lambda_ssim * (1 - similarity).mean(),
        "lips": config.lambda_lips * in_lips.mean(),
        "eyes": config.lambda_eyes * in_eyes.mean(),
        "mask": config.lambda_mask * (drawn.alpha - mask).abs().mean(),
    }
    if perceptual is not None:
        distance = perceptual_distance(config, perceptual, image, target, batch.lips)
        terms["perceptual"] = config.lambda_perceptual * distance
    if config.lambda_normal:
        depth = drawn.maps.depth / drawn.alpha.clamp_min(1e-6)
        agreement = (drawn.maps.normal * depth_to_normal(depth, batch.conditions.intrinsics)).sum(1, keepdim=True)
        terms["normal"] = config.lambda_normal * ((drawn.alpha.detach() - agreement) * mask).mean()
    if config.lambda_distortion:
        terms["distortion"] = config.lambda_distortion * drawn.maps.distortion.mean()
    return terms
