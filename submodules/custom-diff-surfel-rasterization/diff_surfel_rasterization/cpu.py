"""CPU back end: loads libsurfel_cpu.so and registers its kernels for the ops of ops.py."""

import ctypes
from pathlib import Path

import torch

from . import abi, image_loss, ops


def _load() -> ctypes.CDLL:
    path = Path(__file__).with_name("libsurfel_cpu.so")
    if not path.is_file():
        raise ImportError(
            f"{path} is missing: install the package (pip install submodules/custom-diff-surfel-rasterization) "
            "instead of importing its source folder"
        )
    library = ctypes.CDLL(str(path))
    library.surfel_cpu_level.restype = ctypes.c_char_p
    library.surfel_call_size.restype = abi.I64
    if [library.surfel_call_size(i) for i in range(3)] != [ctypes.sizeof(c) for c in (abi.Call, abi.ShCall, abi.LossCall)]:
        raise ImportError(f"{path} is of another version than this package: reinstall diff-surfel-rasterization")
    return library


_library = _load()


def cpu_level() -> str:
    """The vector instructions the kernels use on this machine: 'avx512', 'avx2' or 'base'."""
    return _library.surfel_cpu_level().decode()


def _state_bytes(dtype: torch.dtype, batch, surfels, width, height, aux) -> int:
    """Transmittance and last index a pixel, and what some aux maps need besides."""
    number = 8 if dtype == torch.float64 else 4
    return batch * width * height * (number * (4 if "distortion" in aux else 1) + 4 * (2 if "median_depth" in aux else 1))


ops.STATE_BYTES["cpu"] = _state_bytes


def _check(status: int) -> None:
    if status:
        raise MemoryError("the surfel rasterizer ran out of memory")


@ops.forward_op.register_kernel("cpu")
def _forward(
    means, quats, scales, opacities, features, viewmats, Ks, background, screen,
    width, height, near, far, cutoff, aux, as_bytes, save,
):  # fmt: skip
    inputs, names = (means, quats, scales, opacities, features, viewmats, Ks, background), ops.split_aux(aux)
    outputs = ops.empty_outputs(*inputs, width, height, names, as_bytes, save)
    batch = outputs[0].shape[0]
    call, _keep = abi.make_call(inputs, width, height, near, far, cutoff, names, batch, torch.get_num_threads())
    call.as_bytes = as_bytes
    abi.fill(call, abi.MAPS, outputs[:6], "out_")
    abi.fill(call, ("radii", "state"), outputs[6:])
    _check(_library.surfel_forward(ctypes.byref(call), int(means.dtype == torch.float64)))
    return outputs


@ops.backward_op.register_kernel("cpu")
def _backward(
    grads, means, quats, scales, opacities, features, viewmats, Ks, background, state, width, height, near, far, cutoff, aux
):
    inputs = (means, quats, scales, opacities, features, viewmats, Ks, background)
    batch = ops.batch_size(*inputs)
    call, _keep = abi.make_call(inputs, width, height, near, far, cutoff, ops.split_aux(aux), batch, torch.get_num_threads())
    call.state = abi.pointer(state)
    _incoming = abi.fill(call, abi.MAPS, grads, "g_")
    outputs = ops.gradient_outputs(inputs, batch, torch.zeros_like)
    abi.fill(call, abi.GRADIENTS, outputs, "d_")
    _check(_library.surfel_backward(ctypes.byref(call), int(means.dtype == torch.float64)))
    return outputs


@ops.sh_op.register_kernel("cpu")
def _sh(means, sh, viewmats, degree):
    batch = ops.batch_size(means, sh, viewmats)
    call, _keep = abi.make_sh_call(means, sh, viewmats, degree, batch, torch.get_num_threads())
    colours = means.new_empty(batch, means.shape[1], 3)
    call.colours = abi.pointer(colours)
    _library.surfel_sh_forward(ctypes.byref(call), int(means.dtype == torch.float64))
    return colours


@ops.sh_backward_op.register_kernel("cpu")
def _sh_backward(grad, means, sh, viewmats, degree):
    call, _keep = abi.make_sh_call(means, sh, viewmats, degree, grad.shape[0], torch.get_num_threads())
    _incoming = abi.fill(call, ("g_colours",), (grad,))
    outputs = tuple(torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (means, sh))
    abi.fill(call, ("d_means", "d_sh"), outputs)
    _library.surfel_sh_backward(ctypes.byref(call), int(means.dtype == torch.float64))
    return outputs


@image_loss.forward_op.register_kernel("cpu")
def _ssim_l1(image, target, weight, save):
    outputs = image_loss.empty_outputs(image, weight, save)
    call, _keep = abi.make_loss_call(image, target, weight, torch.get_num_threads())
    abi.fill(call, ("ssim", "l1", "d_similarity"), outputs)
    _check(_library.surfel_loss_forward(ctypes.byref(call), int(image.dtype == torch.float64)))
    return outputs


@image_loss.backward_op.register_kernel("cpu")
def _ssim_l1_backward(g_ssim, g_l1, image, target, weight, d_similarity):
    call, _keep = abi.make_loss_call(image, target, weight, torch.get_num_threads())
    output = image.new_empty(image.shape)
    _incoming = abi.fill(call, ("g_ssim", "g_l1", "d_similarity", "d_image"), (g_ssim, g_l1, d_similarity, output))
    _library.surfel_loss_backward(ctypes.byref(call), int(image.dtype == torch.float64))
    return output
