"""The four operators (rasterize, SH colour, and their gradients) as torch.library declarations, without any kernel.

A back end registers kernels for its device (cpu.py) and nothing else changes. The schema is functional: nothing is mutated, no
output aliases an input, and every output shape follows from the input shapes. `state` is what a back end keeps for its own
backward, an opaque byte tensor; it is empty when no gradient is wanted (save = False).
"""

import torch
from torch import Tensor

AUX_NAMES = ("depth", "normal", "median_depth", "distortion")


def split_aux(aux: str) -> tuple[str, ...]:
    """Names in the op's `aux` argument (names joined by commas; torch schemas have no list of strings)."""
    return tuple(name for name in aux.split(",") if name)


def batch_size(*tensors: Tensor | None) -> int:
    """The images of a call: the largest leading size (all others are 1)."""
    sizes = [t.shape[0] for t in tensors if t is not None and t.shape[0] != 1]
    return sizes[0] if sizes else 1


# Bytes that a back end keeps for its backward: (dtype, batch, surfels, width, height, aux) -> int, by device type. Shapes may be
# symbolic (torch.compile), so these functions hold no condition on them.
STATE_BYTES = {}


def empty_outputs(means, quats, scales, opacities, features, viewmats, Ks, background, width, height, aux, as_bytes, save):
    """Uninitialised outputs of the forward op: features, alpha, depth, normal, median_depth, distortion, radii, state."""
    batch = batch_size(means, quats, scales, opacities, features, viewmats, Ks, background)
    planes = {"features": features.shape[2], "alpha": 1, "depth": 1, "normal": 3, "median_depth": 1, "distortion": 1}
    kinds = {"features": torch.uint8} if as_bytes else {}
    images = [
        means.new_empty((batch, count, height, width) if name in ("features", "alpha", *aux) else 0, dtype=kinds.get(name))
        for name, count in planes.items()
    ]
    radii = means.new_empty(batch, means.shape[1], dtype=torch.int32)
    size = STATE_BYTES[means.device.type](means.dtype, batch, means.shape[1], width, height, aux) if save else 0
    return (*images, radii, means.new_empty(size, dtype=torch.uint8))


def gradient_outputs(inputs, batch: int, make=torch.empty_like) -> tuple[Tensor, ...]:
    """Outputs of the backward op for the inputs of the forward op (means .. background): one each but for the cameras, and the
    screen-space gradient (B, N, 2)."""
    means, background = inputs[0], inputs[-1]
    outputs = [make(t, memory_format=torch.contiguous_format) for t in inputs[:5]]
    outputs.append(make(means.new_empty(0) if background is None else background, memory_format=torch.contiguous_format))
    return (*outputs, make(means.new_empty(batch, means.shape[1], 2)))


def no_kernel(name: str):
    def missing(*args, **kwargs):
        raise NotImplementedError(f"diff_surfel_rasterization has no {name} kernel for this device")

    return missing


_SURFELS = "Tensor means, Tensor quats, Tensor scales, Tensor opacities, Tensor features"
_INPUTS = f"{_SURFELS}, Tensor viewmats, Tensor Ks, Tensor? background"
_VIEW = "int width, int height, float near, float far, str cutoff, str aux"

forward_op = torch.library.custom_op(
    "surfel::rasterize",
    no_kernel("rasterize"),
    mutates_args=(),
    device_types=(),
    schema=f"({_INPUTS}, Tensor? screen, {_VIEW}, bool as_bytes, bool save) -> "
    "(Tensor features, Tensor alpha, Tensor depth, Tensor normal, Tensor median_depth, Tensor distortion, "
    "Tensor radii, Tensor state)",
)
backward_op = torch.library.custom_op(
    "surfel::rasterize_backward",
    no_kernel("rasterize_backward"),
    mutates_args=(),
    device_types=(),
    schema=f"(Tensor?[] grads, {_INPUTS}, Tensor state, {_VIEW}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
sh_op = torch.library.custom_op(
    "surfel::sh_colour",
    no_kernel("sh_colour"),
    mutates_args=(),
    device_types=(),
    schema="(Tensor means, Tensor sh, Tensor viewmats, int degree) -> Tensor",
)
sh_backward_op = torch.library.custom_op(
    "surfel::sh_colour_backward",
    no_kernel("sh_colour_backward"),
    mutates_args=(),
    device_types=(),
    schema="(Tensor grad, Tensor means, Tensor sh, Tensor viewmats, int degree) -> (Tensor, Tensor)",
)


@forward_op.register_fake
def _(means, quats, scales, opacities, features, viewmats, Ks, background, screen, width, height, near, far, cutoff, aux, as_bytes,
      save):  # fmt: skip
    inputs = (means, quats, scales, opacities, features, viewmats, Ks, background)
    return empty_outputs(*inputs, width, height, split_aux(aux), as_bytes, save)


@backward_op.register_fake
def _(grads, means, quats, scales, opacities, features, viewmats, Ks, background, state, width, height, near, far, cutoff, aux):
    inputs = (means, quats, scales, opacities, features, viewmats, Ks, background)
    return gradient_outputs(inputs, batch_size(*inputs))


@sh_op.register_fake
def _(means, sh, viewmats, degree):
    return means.new_empty(batch_size(means, sh, viewmats), means.shape[1], 3)


@sh_backward_op.register_fake
def _(grad, means, sh, viewmats, degree):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (means, sh))


def _forward_context(ctx, inputs, output):
    means, quats, scales, opacities, features, viewmats, Ks, background, screen, *view = inputs
    ctx.set_materialize_grads(False)
    ctx.has_screen, ctx.view = screen is not None, view[:-2]
    ctx.save_for_backward(means, quats, scales, opacities, features, viewmats, Ks, background, output[-1])


def _forward_gradient(ctx, *grads):
    *tensors, state = ctx.saved_tensors
    incoming = [g if g is not None and g.numel() else None for g in grads[:6]]
    nothing = [None] * 8  # width .. save
    if all(g is None for g in incoming):
        return (*[None] * 9, *nothing)
    *gradients, background, screen = backward_op(incoming, *tensors, state, *ctx.view)
    background = background if tensors[-1] is not None else None
    return (*gradients, None, None, background, screen if ctx.has_screen else None, *nothing)


def _sh_context(ctx, inputs, output):
    means, sh, viewmats, ctx.degree = inputs
    ctx.save_for_backward(means, sh, viewmats)


def _sh_gradient(ctx, grad):
    return (*sh_backward_op(grad, *ctx.saved_tensors, ctx.degree), None, None)


forward_op.register_autograd(_forward_gradient, setup_context=_forward_context)
sh_op.register_autograd(_sh_gradient, setup_context=_sh_context)
