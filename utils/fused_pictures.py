"""What utils/losses.py compares, on a GPU: forward and backward as one Triton kernel each.

Op by op, pictures, mask and squares pass through some twenty elementwise kernels, which take as long as the loss of the pictures.
The reference, and the path of CPUs, is `pictures` in losses.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PIXELS = 1024  # of a program


@triton.jit
def _pixels(mask, alpha, b, area, PIXELS: tl.constexpr):
    """Of this program: its pixels in frame b, which exist, the mask there and alpha."""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < area
    part = tl.load(mask + b * area + pixel, mask=inside, other=0).to(tl.float32)
    return pixel, inside, part, tl.load(alpha + b * area + pixel, mask=inside, other=0.0)


@triton.jit
def pictures_forward(rgb, alpha, filmed, filmed_stride, mask, plain, squares, image, target, weight, missed, width, area,
                     SQUARES: tl.constexpr, PIXELS: tl.constexpr):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    pixel, inside, part, cover = _pixels(mask, alpha, b, area, PIXELS)
    at = b * 3 * area + pixel
    for c in tl.static_range(3):
        behind = tl.load(plain + b * 3 + c)
        drawn = tl.load(rgb + at + c * area, mask=inside, other=0.0)
        tl.store(image + at + c * area, drawn + (1 - cover) * behind, mask=inside)
        true = tl.load(filmed + b * filmed_stride + c * area + pixel, mask=inside, other=0).to(tl.float32) * (1 / 255)
        tl.store(target + at + c * area, behind + part * (true - behind), mask=inside)
    x, y = pixel % width, pixel // width
    tl.store(weight + at, tl.full((PIXELS,), 1.0, tl.float32), mask=inside)
    within = tl.zeros((PIXELS,), tl.int1)
    for k in tl.static_range(SQUARES):  # the first is that of the lips
        box = squares + (b * SQUARES + k) * 4
        here = (x >= tl.load(box)) & (x < tl.load(box + 2)) & (y >= tl.load(box + 1)) & (y < tl.load(box + 3))
        if k == 0:
            tl.store(weight + at + area, here.to(tl.float32), mask=inside)
        else:
            within = within | here
    tl.store(weight + at + 2 * area, within.to(tl.float32), mask=inside)
    tl.store(missed + b * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.where(inside, tl.abs(cover - part), 0.0), 0))


@triton.jit
def pictures_backward(alpha, mask, plain, image_gradient, missed_gradient, alpha_gradient, area, PIXELS: tl.constexpr):
    b = tl.program_id(1).to(tl.int64)
    pixel, inside, part, cover = _pixels(mask, alpha, b, area, PIXELS)
    off = cover - part
    gradient = tl.load(missed_gradient + b) * ((off > 0).to(tl.float32) - (off < 0).to(tl.float32))
    for c in tl.static_range(3):
        incoming = tl.load(image_gradient + (b * 3 + c) * area + pixel, mask=inside, other=0.0)
        gradient -= incoming * tl.load(plain + b * 3 + c)
    tl.store(alpha_gradient + b * area + pixel, gradient, mask=inside)


class _Pictures(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rgb, alpha, filmed, mask, plain, squares):
        batch, _, height, width = rgb.shape
        area = height * width
        grid = triton.cdiv(area, PIXELS), batch
        rgb, alpha, mask, plain, squares = (x.contiguous() for x in (rgb, alpha, mask, plain, squares))
        if filmed.stride()[1:] != (area, width, 1):
            filmed = filmed.contiguous()
        image, target, weight = (torch.empty_like(rgb) for _ in range(3))
        missed = rgb.new_empty(batch, grid[0])
        with torch.cuda.device_of(rgb):
            pictures_forward[grid](rgb, alpha, filmed, filmed.stride(0), mask, plain, squares, image, target, weight, missed,
                                   width, area, SQUARES=squares.shape[1], PIXELS=PIXELS)  # fmt: skip
        ctx.save_for_backward(alpha, mask, plain)
        ctx.mark_non_differentiable(target, weight)
        return image, target, weight, missed.sum(1) / area

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, image_gradient, _target, _weight, missed_gradient):
        alpha, mask, plain = ctx.saved_tensors
        batch, _, height, width = alpha.shape
        area, image_gradient = height * width, image_gradient.contiguous()
        alpha_gradient, missed_gradient = torch.empty_like(alpha), missed_gradient / area
        with torch.cuda.device_of(alpha):
            pictures_backward[triton.cdiv(area, PIXELS), batch](alpha, mask, plain, image_gradient, missed_gradient.contiguous(),
                                                               alpha_gradient, area, PIXELS=PIXELS)  # fmt: skip
        return image_gradient, alpha_gradient, None, None, None, None


def pictures(rgb: Tensor, alpha: Tensor, filmed: Tensor, mask: Tensor, plain: Tensor, lips: Tensor, eyes: Tensor):
    """As losses.pictures."""
    return _Pictures.apply(rgb, alpha, filmed, mask, plain, torch.cat([lips, eyes], 1))
