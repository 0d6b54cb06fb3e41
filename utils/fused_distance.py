"""The distance of two feature maps for utils/perceptual.py on a GPU, forward and backward as one Triton kernel each.

Op by op the five maps of a picture pass through some forty elementwise kernels, as long together as the convolutions.
The reference, and the path of CPUs, is `distance` in perceptual.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

EPSILON = tl.constexpr(1e-12)  # as in perceptual.distance


@triton.jit
def _unit(pointer, at, inside):
    """Rows (ROWS, BLOCK) of length 1, and what they were multiplied by."""
    x = tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) + EPSILON)
    return x * scale[:, None], scale


@triton.jit
def _pixels(a, b, weight, pixels, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """This program's pixels: their numbers (ROWS,), where their channels lie and which exist (ROWS, BLOCK), both maps there at
    length 1, what the first was multiplied by, and the weights (BLOCK,)."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (row[:, None] < pixels) & (column[None, :] < CHANNELS)
    at = row[:, None] * CHANNELS + column[None, :]
    x, scale = _unit(a, at, inside)
    y, _ = _unit(b, at, inside)
    return row, at, inside, x, y, scale, tl.load(weight + column, mask=column < CHANNELS, other=0.0)


@triton.jit
def distances_forward(a, b, weight, out, pixels, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    row, _, _, x, y, _, w = _pixels(a, b, weight, pixels, CHANNELS, BLOCK, ROWS)
    tl.store(out + row, tl.sum(w[None, :] * (x - y) * (x - y), 1), mask=row < pixels)


@triton.jit
def distances_backward(a, b, weight, gradient, out, pixels, area, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    row, at, inside, x, y, scale, w = _pixels(a, b, weight, pixels, CHANNELS, BLOCK, ROWS)
    incoming = tl.load(gradient + row // area, mask=row < pixels, other=0.0) * (2.0 / area)
    slope = incoming[:, None] * w[None, :] * (x - y)
    slope = scale[:, None] * (slope - x * tl.sum(slope * x, 1)[:, None])
    tl.store(out + at, slope.to(out.dtype.element_ty), mask=inside)


def _rows(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B h w, C), without a copy where channels lie last in memory."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).contiguous()


class _Distance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, weight):
        rows, out = (_rows(a), _rows(b)), torch.empty(a.shape[0] * a.shape[2] * a.shape[3], device=a.device)
        ctx.sizes = {"CHANNELS": a.shape[1], "BLOCK": triton.next_power_of_2(a.shape[1])}
        ctx.sizes["ROWS"] = max(1, 4096 // ctx.sizes["BLOCK"])
        ctx.grid = (triton.cdiv(len(out), ctx.sizes["ROWS"]),)
        weight = weight.flatten().contiguous()
        distances_forward[ctx.grid](*rows, weight, out, len(out), **ctx.sizes)
        ctx.save_for_backward(*rows, weight)
        ctx.shape = a.shape
        return out.view(len(a), -1).mean(1)

    @staticmethod
    def backward(ctx, gradient):
        a, b, weight = ctx.saved_tensors
        batch, channels, height, width = ctx.shape
        out = torch.empty_like(a)
        distances_backward[ctx.grid](a, b, weight, gradient.contiguous(), out, len(a), height * width, **ctx.sizes)
        return out.view(batch, height, width, channels).permute(0, 3, 1, 2), None, None


def distance(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """As perceptual.distance, differentiable in `a` alone."""
    return _Distance.apply(a, b, weight)
