"""Largest of a window, blurred and halved, for utils/perceptual.py on a GPU: forward and backward as one Triton kernel each.

Op by op, a picture passes through max pooling, a pad that loses the order of memory (channels last), a copy that restores it and a
convolution of single channels: with VGG-16 two thirds of the whole distance. The reference, and the path of CPUs, is
`BlurPool.forward` in perceptual.py. Along an axis of H rows, windows begin at rows s = 0 .. M - 1, M = H + 1 - window; row i of the
result is 1/4, 1/2, 1/4 of the windows 2 i - 1, 2 i, 2 i + 1, reflected into 0 .. M - 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS, CHANNELS = 16, 64  # of a program


@triton.jit
def _tile(width, channels, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):
    """Of this program: its columns (COLUMNS, 1), its channels (1, CHANNELS), which of both exist, its row and its picture."""
    blocks = tl.cdiv(width, COLUMNS)
    column = (tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS))[:, None]
    channel = (tl.program_id(0) // blocks * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    return column, channel, (column < width) & (channel < channels), tl.program_id(1), tl.program_id(2).to(tl.int64)


@triton.jit
def _reflected(s, size):
    s = tl.where(s < 0, -s, s)
    return tl.where(s >= size, 2 * size - 2 - s, s)


@triton.jit
def pool_forward(x, out, height, width, channels, WINDOW: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):
    rows, columns = height + 1 - WINDOW, width + 1 - WINDOW
    out_width = (columns + 1) // 2
    j, channel, inside, i, picture = _tile(out_width, channels, COLUMNS, CHANNELS)
    x += picture * height * width * channels
    total = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    for a in tl.static_range(3):
        top = _reflected(2 * i + a - 1, rows)
        for b in tl.static_range(3):
            left = _reflected(2 * j + b - 1, columns)
            largest = tl.full((COLUMNS, CHANNELS), float("-inf"), tl.float32)
            for u in tl.static_range(WINDOW):
                for v in tl.static_range(WINDOW):
                    here = tl.load(x + ((top + u) * width + left + v) * channels + channel, mask=inside, other=0.0)
                    largest = tl.maximum(largest, here.to(tl.float32))
            total += largest * ((1 + a % 2) * (1 + b % 2) / 16)
    at = ((picture * ((rows + 1) // 2) + i) * out_width + j) * channels + channel
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _weight(s, size, second: tl.constexpr):
    """How much window s counts in row s // 2 of the result, or in the next one if `second`."""
    odd, last = s % 2 == 1, (s == size - 2) & (size % 2 == 1)
    if second:
        return tl.where(odd & (s // 2 + 1 < (size + 1) // 2), tl.where(last, 0.5, 0.25), 0.0)
    return tl.where(odd & (s != 1), 0.25, 0.5)


@triton.jit
def pool_backward(x, gradient, out, height, width, channels, WINDOW: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):
    """To every pixel the gradients of the windows whose largest it is, the first of equals as with torch."""
    rows, columns = height + 1 - WINDOW, width + 1 - WINDOW
    out_width = (columns + 1) // 2
    q, channel, inside, p, picture = _tile(width, channels, COLUMNS, CHANNELS)
    x += picture * height * width * channels
    out += picture * height * width * channels
    gradient += picture * ((rows + 1) // 2) * out_width * channels
    at = (p * width + q) * channels + channel
    own = tl.load(x + at, mask=inside, other=0.0)
    total = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    for u in tl.static_range(WINDOW):
        for v in tl.static_range(WINDOW):  # our place in the window that begins at s, t
            s, t = p - u, q - v
            wins = inside & (s >= 0) & (s < rows) & (t >= 0) & (t < columns)
            exists = wins
            for k in tl.static_range(WINDOW * WINDOW):
                if k != u * WINDOW + v:
                    other = tl.load(x + ((s + k // WINDOW) * width + t + k % WINDOW) * channels + channel, mask=exists, other=0.0)
                    wins = wins & ((own > other) | ((own == other) & (k > u * WINDOW + v)))
            for a in tl.static_range(2):
                for b in tl.static_range(2):
                    weight = _weight(s, rows, a == 1) * _weight(t, columns, b == 1)
                    passed = tl.load(gradient + ((s // 2 + a) * out_width + t // 2 + b) * channels + channel,
                                     mask=wins & (weight > 0), other=0.0)  # fmt: skip
                    total += weight * passed.to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, window):
        x = x.contiguous(memory_format=torch.channels_last)
        batch, channels, height, width = x.shape
        size = [(side + 2 - window) // 2 for side in (height, width)]
        out = torch.empty((batch, channels, *size), device=x.device, dtype=x.dtype, memory_format=torch.channels_last)
        ctx.sizes = {"WINDOW": window, "COLUMNS": COLUMNS, "CHANNELS": CHANNELS}
        pool_forward[_grid(out)](x, out, height, width, channels, **ctx.sizes)
        ctx.save_for_backward(x)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        out, gradient = torch.empty_like(x), gradient.contiguous(memory_format=torch.channels_last)
        pool_backward[_grid(out)](x, gradient, out, *x.shape[2:], x.shape[1], **ctx.sizes)
        return out, None


def _grid(out: Tensor) -> tuple[int, int, int]:
    batch, channels, height, width = out.shape
    return triton.cdiv(width, COLUMNS) * triton.cdiv(channels, CHANNELS), height, batch


def pool(x: Tensor, window: int) -> Tensor:
    """As BlurPool.forward with that window, its filter the binomial one."""
    return _Pool.apply(x, window)
