"""Triton kernels of the fused deformation (fused_deformation.py): everything between a surfel and its residuals stays on chip.

Sizes: N surfels, B frames, D width of the model (WIDTH before padding), F hidden width of the layer, U hidden units of all
heads in BLOCKS blocks of W, C = heads x tokens (each padded), O attributes that deform. Padding, with zeros, goes to powers of
two. Products take the type of the weights (bfloat16) and sum in float32; softmax, layer norms and the residual stream are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

EPSILON = tl.constexpr(1e-5)  # of nn.LayerNorm


@triton.jit
def _matrix(pointer, ROWS: tl.constexpr, COLUMNS: tl.constexpr, stride):
    """A (ROWS, COLUMNS) piece of a weight."""
    return tl.load(pointer + tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def _normalise(x, columns, WIDTH: tl.constexpr):
    """(rows, D) -> rows of mean 0 and variance 1 over their first WIDTH columns, and what they were divided by, inverted."""
    mean = tl.sum(x, 1) / WIDTH
    centred = tl.where(columns[None, :] < WIDTH, x - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + EPSILON)
    return centred * scale[:, None], scale


@triton.jit
def _affine(x, norm, D: tl.constexpr):
    """Weight and bias of a norm. Such vectors are read where they are needed: kept, they would fill the registers."""
    column = tl.arange(0, D)
    return x * tl.load(norm + column)[None, :] + tl.load(norm + D + column)[None, :]


@triton.jit
def _normalise_backward(gradient, x, scale, norm, WIDTH: tl.constexpr):
    """Gradient of _affine(_normalise(...)) for its input; `x` is the normalised one."""
    gradient = gradient * tl.load(norm + tl.arange(0, x.shape[1]))[None, :]
    mean = tl.sum(gradient, 1) / WIDTH
    along = tl.sum(gradient * x, 1) / WIDTH
    columns = tl.arange(0, x.shape[1])
    return tl.where(columns[None, :] < WIDTH, scale[:, None] * (gradient - mean[:, None] - x * along[:, None]), 0.0)


@triton.jit
def _column_sums(x):
    """(rows, D) -> (rows / 16, D): sums within a warp, so that no warp waits for another."""
    return tl.sum(tl.reshape(x, (x.shape[0] // 16, 16, x.shape[1])), 1)


@triton.jit
def _attend(x, key, bias, TOKENS: tl.constexpr, HEADS_PADDED: tl.constexpr, TOKENS_PADDED: tl.constexpr):
    """(rows, D) features, (C, D) keys and (C,) their biases -> weights (rows, heads, tokens)."""
    scores = tl.dot(x.to(key.dtype), tl.trans(key)) + tl.load(bias + tl.arange(0, key.shape[0]))[None, :]
    scores = tl.reshape(scores, (x.shape[0], HEADS_PADDED, TOKENS_PADDED))
    token = tl.arange(0, TOKENS_PADDED)[None, None, :]
    scores = tl.where(token < TOKENS, scores, float("-inf"))
    power = tl.exp(scores - tl.max(scores, 2)[:, :, None])
    return power / tl.sum(power, 2)[:, :, None]


@triton.jit
def _attribute_columns(pointers, SIZES: tl.constexpr, O: tl.constexpr):
    """Where attribute column c of row 0 lies, the step between rows, and how many columns there are."""
    column = tl.arange(0, O)
    pointer, size = pointers[0] + column, tl.zeros((O,), tl.int64)
    start = 0
    for i in tl.static_range(len(SIZES)):
        pointer = tl.where(column >= start, pointers[i] + (column - start), pointer)
        size = tl.where(column >= start, SIZES[i], size)
        start += SIZES[i]
    return pointer, size, start


@triton.jit
def forward(features, keys, key_biases, values, norms, w1, b1, w2, b2, first, first_bias, last, base,
            outputs, attention, hidden,
            N, B, HEADS: tl.constexpr, TOKENS: tl.constexpr, HEADS_PADDED: tl.constexpr, TOKENS_PADDED: tl.constexpr,
            WIDTH: tl.constexpr, D: tl.constexpr, F: tl.constexpr, W: tl.constexpr, BLOCKS: tl.constexpr, O: tl.constexpr,
            SIZES: tl.constexpr, KEEP: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Deformed attributes and attention of ROWS surfels for every frame; with KEEP also relu(layer output)."""
    C: tl.constexpr = HEADS_PADDED * TOKENS_PADDED
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column, attribute = tl.arange(0, D), tl.arange(0, O)
    inside = row[:, None] < N
    own = inside & (column[None, :] < WIDTH)
    x0 = tl.load(features + row[:, None] * WIDTH + column[None, :], mask=own, other=0.0)
    pointer, size, total = _attribute_columns(outputs, SIZES, O)
    stored = inside & (attribute[None, :] < total)
    rest = tl.load(base + row[:, None] * total + attribute[None, :], mask=stored, other=0.0)
    u, v = _matrix(w1, F, D, D), _matrix(w2, D, F, F)
    for b in range(B):
        key, value = _matrix(keys + b * C * D, C, D, D), _matrix(values + b * C * D, C, D, D)
        weight = _attend(x0, key, key_biases + b * C, TOKENS, HEADS_PADDED, TOKENS_PADDED)
        x = x0 + tl.dot(tl.reshape(weight, (ROWS, C)).to(value.dtype), value)
        x = _affine(_normalise(x, column, WIDTH)[0], norms, D)
        inner = tl.maximum(tl.dot(x.to(u.dtype), tl.trans(u)) + tl.load(b1 + tl.arange(0, F))[None, :], 0.0)
        x += tl.dot(inner.to(u.dtype), tl.trans(v)) + tl.load(b2 + column)[None, :]
        x = _affine(_normalise(x, column, WIDTH)[0], norms + 2 * D, D)
        x = tl.maximum(x, 0.0).to(u.dtype)
        at = (b * N + row).to(tl.int64)[:, None]
        if KEEP:
            tl.store(hidden + at * D + column[None, :], x, mask=inside)
        out = rest
        for i in tl.range(0, BLOCKS, num_stages=STAGES):
            bias = tl.load(first_bias + i * W + tl.arange(0, W))
            units = tl.maximum(tl.dot(x, tl.trans(_matrix(first + i * W * D, W, D, D))) + bias[None, :], 0.0)
            out = tl.dot(units.to(x.dtype), tl.trans(_matrix(last + i * W, O, W, BLOCKS * W)), out)
        tl.store(pointer[None, :] + at * size[None, :], out, mask=stored)
        head, token = tl.arange(0, HEADS_PADDED), tl.arange(0, TOKENS_PADDED)[None, :]
        mean = tl.sum(tl.where(head[None, :, None] < HEADS, weight, 0.0), 1) / HEADS
        tl.store(attention + at * TOKENS + token, mean, mask=inside & (token < TOKENS))


@triton.jit
def gather(gradients, packed, base_gradient, N, B, O: tl.constexpr, SIZES: tl.constexpr, ROWS: tl.constexpr):
    """Gradients of the attributes -> one narrow row (O) a surfel and frame, and their sums over the frames."""
    row, attribute = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, O)
    pointer, size, total = _attribute_columns(gradients, SIZES, O)
    inside = row[:, None] < N
    own = inside & (attribute[None, :] < total)
    summed = tl.zeros((ROWS, O), tl.float32)
    for b in range(B):
        at = (b * N + row).to(tl.int64)[:, None]
        gradient = tl.load(pointer[None, :] + at * size[None, :], mask=own, other=0.0)
        summed += gradient
        tl.store(packed + at * O + attribute[None, :], gradient, mask=inside)
    tl.store(base_gradient + row[:, None] * total + attribute[None, :], summed, mask=own)


@triton.jit
def heads_backward(hidden, packed, first, first_bias, last, hidden_gradient, R, BLOCKS: tl.constexpr,
                   D: tl.constexpr, W: tl.constexpr, O: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Gradient of the layer's output through all heads: ROWS of the R = B N rows."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column, attribute = tl.arange(0, D)[None, :], tl.arange(0, O)[None, :]
    x = tl.load(hidden + row * D + column, mask=row < R, other=0.0)
    out = tl.load(packed + row * O + attribute, mask=row < R, other=0.0)
    gradient = tl.zeros((ROWS, D), tl.float32)
    for i in tl.range(0, BLOCKS, num_stages=STAGES):
        bias = tl.load(first_bias + i * W + tl.arange(0, W))
        a = _matrix(first + i * W * D, W, D, D)
        inner = tl.dot(x, tl.trans(a)) + bias[None, :]
        back = tl.dot(out, _matrix(last + i * W, O, W, BLOCKS * W))
        gradient = tl.dot(tl.where(inner > 0, back, 0.0).to(x.dtype), a, gradient)
    tl.store(hidden_gradient + row * D + column, tl.where(x > 0, gradient, 0.0), mask=row < R)


@triton.jit
def weights_backward(x_rows, out_gradient, first, first_bias, last, first_gradient, bias_gradient, last_gradient, R,
                     D: tl.constexpr, W: tl.constexpr, O: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Weight gradients of last(relu(first(x))) over the R rows of x (D columns) and of the gradient (O columns).

    Program axis 1 is the block of W hidden units, axis 0 every so many tiles of rows: a partial sum a program.
    """
    part, parts, i, blocks = tl.program_id(0), tl.num_programs(0), tl.program_id(1), tl.num_programs(1)
    column, attribute, unit = tl.arange(0, D), tl.arange(0, O), tl.arange(0, W)
    a, c = _matrix(first + i * W * D, W, D, D), tl.trans(_matrix(last + i * W, O, W, blocks * W))
    bias = tl.load(first_bias + i * W + unit)
    d_first, d_last, d_bias = tl.zeros((W, D), tl.float32), tl.zeros((W, O), tl.float32), tl.zeros((W,), tl.float32)
    for tile in tl.range(part, tl.cdiv(R, ROWS), parts, num_stages=STAGES):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        x = tl.load(x_rows + row * D + column[None, :], mask=row < R, other=0.0)
        out = tl.load(out_gradient + row * O + attribute[None, :], mask=row < R, other=0.0)
        # hidden units by rows, so that what comes out of one product goes into the next in registers
        inner = tl.maximum(tl.dot(a, tl.trans(x)) + bias[:, None], 0.0)
        back = tl.where(inner > 0, tl.dot(c, tl.trans(out)), 0.0)
        d_bias += tl.sum(back, 1)
        d_first = tl.dot(back.to(x.dtype), x, d_first)
        d_last = tl.dot(inner.to(x.dtype), out, d_last)
    at = part * blocks + i
    tl.store(first_gradient + (at * W + unit[:, None]) * D + column[None, :], d_first)
    tl.store(bias_gradient + at * W + unit, d_bias)
    tl.store(last_gradient + (at * W + unit[:, None]) * O + attribute[None, :], d_last)


@triton.jit
def layer_backward(features, keys, key_biases, values, norms, w1, b1, w2, b2, hidden_gradient, attention_gradient,
                   features_gradient, scores_gradient, values_gradient, norms_gradient, b2_gradient, inputs, outputs_gradient,
                   N, B, HEADS: tl.constexpr, TOKENS: tl.constexpr, HEADS_PADDED: tl.constexpr, TOKENS_PADDED: tl.constexpr,
                   WIDTH: tl.constexpr, D: tl.constexpr, F: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Through norms, hidden layer and attention, whose forward values are worked out again, for ROWS surfels and all frames.

    Writes gradients of the features, the scores (N, B, PAIRS) and, in parts, the values (tiles, B, PAIRS, D), norms (tiles, B,
    ROWS / 16, D, 4) and b2; and what `weights_backward` needs of the hidden layer: its input and the gradient of its output.
    Summing norms and b2 over the frames here would take registers that it does not have: twice the time.
    """
    C: tl.constexpr = HEADS_PADDED * TOKENS_PADDED
    PAIRS: tl.constexpr = HEADS * TOKENS_PADDED
    PARTS: tl.constexpr = ROWS // 16
    tile = tl.program_id(0)
    row, column, pair = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, C)
    part, kind = tl.arange(0, PARTS), tl.arange(0, 2)[None, None, :]  # weight or bias
    inside = row[:, None] < N
    own = inside & (column[None, :] < WIDTH)
    u, v = _matrix(w1, F, D, D), _matrix(w2, D, F, F)
    d_features = tl.zeros((ROWS, D), tl.float32)
    for b in range(B):
        at = (b * N + row).to(tl.int64)[:, None]
        x = tl.load(features + row[:, None] * WIDTH + column[None, :], mask=own, other=0.0)
        key, value = _matrix(keys + b * C * D, C, D, D), _matrix(values + b * C * D, C, D, D)
        weight = _attend(x, key, key_biases + b * C, TOKENS, HEADS_PADDED, TOKENS_PADDED)
        mixing = tl.reshape(weight, (ROWS, C)).to(u.dtype)
        normal1, inverse1 = _normalise(x + tl.dot(mixing, value), column, WIDTH)
        x = _affine(normal1, norms, D)
        narrow = x.to(u.dtype)
        tl.store(inputs + at * D + column[None, :], narrow, mask=inside)
        inner = tl.maximum(tl.dot(narrow, tl.trans(u)) + tl.load(b1 + tl.arange(0, F))[None, :], 0.0).to(u.dtype)
        normal2, inverse2 = _normalise(x + tl.dot(inner, tl.trans(v)) + tl.load(b2 + column)[None, :], column, WIDTH)

        gradient = tl.load(hidden_gradient + at * D + column[None, :], mask=inside, other=0.0).to(tl.float32)
        place = ((tile * B + b) * PARTS + part[:, None]) * D + column[None, :]
        d_norm = tl.join(_column_sums(gradient * normal2), _column_sums(gradient))
        tl.store(norms_gradient + place[:, :, None] * 4 + 2 + kind, d_norm)
        gradient = _normalise_backward(gradient, normal2, inverse2, norms + 2 * D, WIDTH)
        tl.store(b2_gradient + place, _column_sums(gradient))
        back = gradient.to(u.dtype)
        tl.store(outputs_gradient + at * D + column[None, :], back, mask=inside)
        back = tl.where(inner > 0, tl.dot(back, v), 0.0).to(u.dtype)
        gradient = tl.dot(back, u, gradient)
        d_norm = tl.join(_column_sums(gradient * normal1), _column_sums(gradient))
        tl.store(norms_gradient + place[:, :, None] * 4 + kind, d_norm)
        gradient = _normalise_backward(gradient, normal1, inverse1, norms, WIDTH)
        d_features += gradient
        back = gradient.to(u.dtype)
        d_value = tl.dot(tl.trans(back), mixing)  # (D, C)
        at_pair = values_gradient + ((tile * B + b) * PAIRS + pair[None, :]) * D + column[:, None]
        tl.store(at_pair, d_value, mask=pair[None, :] < PAIRS)
        d_weight = tl.reshape(tl.dot(back, tl.trans(value)), (ROWS, HEADS_PADDED, TOKENS_PADDED))
        token = tl.arange(0, TOKENS_PADDED)[None, :]
        mean = tl.load(attention_gradient + at * TOKENS + token, mask=inside & (token < TOKENS), other=0.0) / HEADS
        d_weight += mean[:, None, :]
        d_scores = tl.reshape(weight * (d_weight - tl.sum(weight * d_weight, 2)[:, :, None]), (ROWS, C)).to(u.dtype)
        d_features = tl.dot(d_scores, key, d_features)
        at_score = scores_gradient + (row[:, None].to(tl.int64) * B + b) * PAIRS + pair[None, :]
        tl.store(at_score, d_scores, mask=inside & (pair[None, :] < PAIRS))
    tl.store(features_gradient + row[:, None] * WIDTH + column[None, :], d_features, mask=own)
