"""CPU back end: loads libsurfel_cpu.so and registers its kernels for the ops of ops.py."""

import ctypes
from pathlib import Path

import torch

from . import ops

_I, _P, _D = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double
AUX_BIT = {"depth": 1, "normal": 2, "median_depth": 4, "distortion": 8}
CUTOFF = {"exact": 0, "2dgs": 1}


def _fields(kind, names: str) -> list:
    return [(name, kind) for name in names.split()]


class _Call(ctypes.Structure):  # mirrors struct Call of csrc/cpu/call.h
    _fields_ = (
        _fields(_I, "batch surfels channels width height aux cutoff threads")
        + _fields(_D, "near far")
        + _fields(_I, "s_means s_quats s_scales s_opacities s_features s_viewmats s_Ks s_background")
        + _fields(_P, "means quats scales opacities features viewmats Ks background")
        + _fields(_P, "out_features out_alpha out_depth out_normal out_median_depth out_distortion radii state")
        + _fields(_P, "g_features g_alpha g_depth g_normal g_median_depth g_distortion")
        + _fields(_P, "d_means d_quats d_scales d_opacities d_features d_background d_screen")
    )


class _ShCall(ctypes.Structure):  # mirrors struct ShCall
    _fields_ = _fields(_I, "batch surfels coefficients degree threads s_means s_sh s_viewmats") + _fields(
        _P, "means sh viewmats colours g_colours d_means d_sh"
    )


def _load() -> ctypes.CDLL:
    path = Path(__file__).with_name("libsurfel_cpu.so")
    if not path.is_file():
        raise ImportError(
            f"{path} is missing: install the package (pip install submodules/custom-diff-surfel-rasterization) "
            "instead of importing its source folder"
        )
    library = ctypes.CDLL(str(path))
    library.surfel_cpu_level.restype = ctypes.c_char_p
    library.surfel_call_size.restype = _I
    if (library.surfel_call_size(0), library.surfel_call_size(1)) != (ctypes.sizeof(_Call), ctypes.sizeof(_ShCall)):
        raise ImportError(f"{path} is of another version than this package: reinstall diff-surfel-rasterization")
    return library


_library = _load()


def cpu_level() -> str:
    """The vector instructions the kernels use on this machine: 'avx512', 'avx2' or 'base'."""
    return _library.surfel_cpu_level().decode()


def _stride(t: torch.Tensor | None) -> int:
    """Elements from one image to the next; 0 when all images share one array."""
    return 0 if t is None or t.shape[0] == 1 else t[0].numel()


def _pointer(t: torch.Tensor | None) -> int | None:
    return None if t is None or t.numel() == 0 else t.data_ptr()


def _call(means, quats, scales, opacities, features, viewmats, Ks, background, width, height, near, far, cutoff, aux, batch):
    inputs = dict(means=means, quats=quats, scales=scales, opacities=opacities, features=features, viewmats=viewmats, Ks=Ks)
    inputs["background"] = background
    inputs = {name: None if t is None else t.contiguous() for name, t in inputs.items()}
    call = _Call(
        batch=batch, surfels=means.shape[1], channels=features.shape[2], width=width, height=height, near=near, far=far,
        aux=sum(AUX_BIT[name] for name in aux), cutoff=CUTOFF[cutoff], threads=torch.get_num_threads(),
    )  # fmt: skip
    for name, t in inputs.items():
        setattr(call, name, _pointer(t))
        setattr(call, "s_" + name, _stride(t))
    return call, inputs  # the caller keeps the inputs alive


def _check(status: int) -> None:
    if status:
        raise MemoryError("the surfel rasterizer ran out of memory")


@ops.forward_op.register_kernel("cpu")
def _forward(
    means, quats, scales, opacities, features, viewmats, Ks, background, screen, width, height, near, far, cutoff, aux, save
):
    names = ops.split_aux(aux)
    outputs = ops.empty_outputs(means, quats, scales, opacities, features, viewmats, Ks, background, width, height, names, save)
    batch = outputs[0].shape[0]
    call, _keep = _call(
        means, quats, scales, opacities, features, viewmats, Ks, background, width, height, near, far, cutoff, names, batch
    )
    targets = ("out_features", "out_alpha", "out_depth", "out_normal", "out_median_depth", "out_distortion", "radii", "state")
    for name, t in zip(targets, outputs, strict=True):
        setattr(call, name, _pointer(t))
    _check(_library.surfel_forward(ctypes.byref(call), int(means.dtype == torch.float64)))
    return outputs


@ops.backward_op.register_kernel("cpu")
def _backward(
    grads, means, quats, scales, opacities, features, viewmats, Ks, background, state, width, height, near, far, cutoff, aux
):
    batch = ops.batch_size(means, quats, scales, opacities, features, viewmats, Ks, background)
    names = ops.split_aux(aux)
    call, _keep = _call(
        means, quats, scales, opacities, features, viewmats, Ks, background, width, height, near, far, cutoff, names, batch
    )
    call.state = _pointer(state)
    incoming = [None if g is None else g.contiguous() for g in grads]
    for name, g in zip(("features", "alpha", "depth", "normal", "median_depth", "distortion"), incoming, strict=True):
        setattr(call, "g_" + name, _pointer(g))
    outputs = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (means, quats, scales, opacities, features)]
    outputs.append(means.new_zeros(0) if background is None else torch.zeros_like(background))
    outputs.append(means.new_zeros(batch, means.shape[1], 2))
    for name, t in zip(("means", "quats", "scales", "opacities", "features", "background", "screen"), outputs, strict=True):
        setattr(call, "d_" + name, _pointer(t))
    _check(_library.surfel_backward(ctypes.byref(call), int(means.dtype == torch.float64)))
    return tuple(outputs)


def _sh_call(means, sh, viewmats, degree, batch):
    inputs = [t.contiguous() for t in (means, sh, viewmats)]
    call = _ShCall(batch=batch, surfels=means.shape[1], coefficients=sh.shape[2], degree=degree, threads=torch.get_num_threads())
    for name, t in zip(("means", "sh", "viewmats"), inputs, strict=True):
        setattr(call, name, _pointer(t))
        setattr(call, "s_" + name, _stride(t))
    return call, inputs


@ops.sh_op.register_kernel("cpu")
def _sh_forward(means, sh, viewmats, degree):
    batch = ops.batch_size(means, sh, viewmats)
    colours = means.new_empty(batch, means.shape[1], 3)
    call, _keep = _sh_call(means, sh, viewmats, degree, batch)
    call.colours = _pointer(colours)
    _library.surfel_sh_forward(ctypes.byref(call), int(means.dtype == torch.float64))
    return colours


@ops.sh_backward_op.register_kernel("cpu")
def _sh_backward(grad, means, sh, viewmats, degree):
    call, _keep = _sh_call(means, sh, viewmats, degree, grad.shape[0])
    grad = grad.contiguous()
    d_means, d_sh = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (means, sh))
    call.g_colours, call.d_means, call.d_sh = _pointer(grad), _pointer(d_means), _pointer(d_sh)
    _library.surfel_sh_backward(ctypes.byref(call), int(means.dtype == torch.float64))
    return d_means, d_sh
