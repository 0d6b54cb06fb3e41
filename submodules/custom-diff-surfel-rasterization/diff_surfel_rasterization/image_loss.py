"""`ssim_l1`: what training compares pictures with, SSIM and weighted L1 in one pass, as two torch.library operators.

The forward kernel leaves the gradient of the SSIM behind (one number a pixel, when a gradient is wanted), so that backward only
scales it and adds the L1's. Kernels: csrc/*/ssim.h, registered by cpu.py and cuda.py.
"""

import torch
from torch import Tensor

from .ops import no_kernel

forward_op = torch.library.custom_op(
    "surfel::ssim_l1",
    no_kernel("ssim_l1"),
    mutates_args=(),
    device_types=(),
    schema="(Tensor image, Tensor target, Tensor? weight, bool save) -> (Tensor ssim, Tensor l1, Tensor d_similarity)",
)
backward_op = torch.library.custom_op(
    "surfel::ssim_l1_backward",
    no_kernel("ssim_l1_backward"),
    mutates_args=(),
    device_types=(),
    schema="(Tensor? g_ssim, Tensor? g_l1, Tensor image, Tensor target, Tensor? weight, Tensor d_similarity) -> Tensor",
)


def empty_outputs(image: Tensor, weight: Tensor | None, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised outputs of the forward op."""
    batch, weights = image.shape[0], 1 if weight is None else weight.shape[1]
    return image.new_empty(batch), image.new_empty(batch, weights), image.new_empty(image.shape if save else 0)


@forward_op.register_fake
def _(image, target, weight, save):
    return empty_outputs(image, weight, save)


@backward_op.register_fake
def _(g_ssim, g_l1, image, target, weight, d_similarity):
    return image.new_empty(image.shape)


def _context(ctx, inputs, output):
    image, target, weight, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(image, target, weight, output[2])


def _gradient(ctx, g_ssim, g_l1, _):
    image, target, weight, d_similarity = ctx.saved_tensors
    wanted = g_ssim is not None or g_l1 is not None
    return (backward_op(g_ssim, g_l1, image, target, weight, d_similarity) if wanted else None), None, None, None


forward_op.register_autograd(_gradient, setup_context=_context)


def ssim_l1(image: Tensor, target: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Structural similarity (B,) and weighted mean absolute differences (B, K) of pictures, differentiable in `image`.

    image, target (B, C, H, W), sides of at least 11 pixels; SSIM as in Wang et al. 2004: Gaussian window 11 of sigma 1.5, range 1,
    windows inside the picture only, mean over channels and windows. l1[b, k] is the mean over channels and pixels of
    weight[b, k] |image - target|, with weight (B or 1, K, H, W); without weight K is 1 and every pixel counts alike.
    Work is done in float64 when `image` is float64, else in float32. ValueError names the argument that is wrong.
    """
    if image.dim() != 4 or min(image.shape) < 1 or min(image.shape[2:]) < 11:
        raise ValueError(f"image must have shape (B, C, H, W) with sides of at least 11 pixels, got {tuple(image.shape)}")
    if target.shape != image.shape:
        raise ValueError(f"target must have image's shape {tuple(image.shape)}, got {tuple(target.shape)}")
    b, _, h, w = image.shape
    sizes = (b, 1, h, w) if weight is None else weight.shape
    if len(sizes) != 4 or sizes[0] not in (1, b) or sizes[1] < 1 or sizes[2:] != (h, w):
        raise ValueError(f"weight must have shape ({b} or 1, K, {h}, {w}), got {tuple(weight.shape)}")
    for name, t in (("target", target), ("weight", weight)):
        if t is not None and t.requires_grad:
            raise ValueError(f"{name} has requires_grad, but ssim_l1 is differentiable in image only: pass {name}.detach()")
        if t is not None and t.device != image.device:
            raise ValueError(f"{name} is on {t.device}, image on {image.device}")
    dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
    image, target, weight = (t if t is None else t.to(dtype) for t in (image, target, weight))
    ssim, l1, _ = forward_op(image, target, weight, torch.is_grad_enabled() and image.requires_grad)
    return ssim, l1
