"""What training minimises: each term has one function and one weight (arguments/__init__.py)."""

from __future__ import annotations

import torch
from diff_surfel_rasterization import ssim_l1
from torch import Tensor

from gaussian_renderer import Rendering, depth_to_normal
from scene.dataset import Batch
from utils.device import runs_triton


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


def pictures(rgb: Tensor, alpha: Tensor, filmed: Tensor, mask: Tensor, plain: Tensor, lips: Tensor,
             eyes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What is compared: the drawn picture and the filmed one (B, 3, H, W), both on the colour `plain` (B, 3, 1, 1) a frame; weights
    (B, 3, H, W) that are 1 everywhere, in the squares of the lips, and of the eyes; and how much of each mask alpha misses (B,).

    rgb (B, 3, H, W) premultiplied, alpha (B, 1, H, W), filmed (B, 3, H, W) uint8, mask (B, 1, H, W) bool, lips (B, 1, 4) and eyes
    (B, K, 4): left, top, right, bottom. Differentiable in rgb and alpha; on a GPU as one kernel (fused_pictures.py).
    """
    if runs_triton(rgb.device):
        from utils import fused_pictures

        return fused_pictures.pictures(rgb, alpha, filmed, mask, plain, lips, eyes)
    inside = mask.float()
    image, target = rgb + (1 - alpha) * plain, torch.lerp(plain, filmed.float() / 255.0, inside)
    in_lips, in_eyes = (box_mask(boxes, *rgb.shape[-2:]).float() for boxes in (lips, eyes))
    weight = torch.cat([torch.ones_like(in_lips), in_lips, in_eyes], 1)
    return image, target, weight, (alpha - inside).abs().mean((1, 2, 3))


def image_losses(config, drawn: Rendering, batch: Batch, plain: Tensor, perceptual) -> dict[str, Tensor]:
    """Weighted terms that compare a drawn batch with its frames; their sum is minimised.

    Both are put on `plain` (B, 3, 1, 1), a random colour, new each time, so that alpha cannot hide behind any background.
    Every term is a mean over frames, so that shares of a batch can be averaged. Nothing waits for the device.
    """
    given = batch.image, batch.mask, plain, batch.lips, batch.eyes
    image, target, weight, missed = pictures(drawn.rgb, drawn.alpha, *given)
    similarity, l1 = ssim_l1(image, target, weight)
    l1, in_lips, in_eyes = (l1 / weight.mean((2, 3)).clamp_min(1e-6)).unbind(1)  # means over each picture and its squares
    in_eyes = torch.where(batch.shut, config.blink_weight * in_eyes, in_eyes)
    terms = {
        "l1": (1 - config.lambda_ssim) * l1.mean(),
        "ssim": config.lambda_ssim * (1 - similarity).mean(),
        "lips": config.lambda_lips * in_lips.mean(),
        "eyes": config.lambda_eyes * in_eyes.mean(),
        "mask": config.lambda_mask * missed.mean(),
    }
    if perceptual is not None:
        distance = perceptual_distance(config, perceptual, image, target, batch.lips)
        terms["perceptual"] = config.lambda_perceptual * distance
    if config.lambda_normal:
        depth = drawn.maps.depth / drawn.alpha.clamp_min(1e-6)
        agreement = (drawn.maps.normal * depth_to_normal(depth, batch.conditions.intrinsics)).sum(1, keepdim=True)
        terms["normal"] = config.lambda_normal * ((drawn.alpha.detach() - agreement) * batch.mask).mean()
    if config.lambda_distortion:
        terms["distortion"] = config.lambda_distortion * drawn.maps.distortion.mean()
    return terms
