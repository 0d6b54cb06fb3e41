"""What crosses the C interface of the compiled back ends: the structures of csrc/common/call.h, and how tensors fill them."""

import ctypes

from torch import Tensor

I64, POINTER, DOUBLE = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double
AUX_BIT = {"depth": 1, "normal": 2, "median_depth": 4, "distortion": 8}
CUTOFF = {"exact": 0, "2dgs": 1}
INPUTS = ("means", "quats", "scales", "opacities", "features", "viewmats", "Ks", "background")
MAPS = ("features", "alpha", "depth", "normal", "median_depth", "distortion")
GRADIENTS = ("means", "quats", "scales", "opacities", "features", "background", "screen")


def fields(kind, names: str) -> list:
    return [(name, kind) for name in names.split()]


class Call(ctypes.Structure):
    _fields_ = (
        fields(I64, "batch surfels channels width height aux cutoff threads as_bytes")
        + fields(DOUBLE, "near far")
        + fields(I64, " ".join(f"s_{name}" for name in INPUTS))
        + fields(POINTER, " ".join(INPUTS))
        + fields(POINTER, " ".join(f"out_{name}" for name in MAPS) + " radii state")
        + fields(POINTER, " ".join(f"g_{name}" for name in MAPS))
        + fields(POINTER, " ".join(f"d_{name}" for name in GRADIENTS))
    )


class ShCall(ctypes.Structure):
    _fields_ = fields(I64, "batch surfels coefficients degree threads s_means s_sh s_viewmats") + fields(
        POINTER, "means sh viewmats colours g_colours d_means d_sh"
    )


class LossCall(ctypes.Structure):
    _fields_ = fields(I64, "batch channels height width weights threads s_weight") + fields(
        POINTER, "image target weight ssim l1 d_similarity partial g_ssim g_l1 d_image"
    )


class AdamArray(ctypes.Structure):
    _fields_ = fields(POINTER, "value gradient mean square rate step") + fields(I64, "count first_block")


class AdamCall(ctypes.Structure):
    MOST = 48  # arrays
    _fields_ = (
        [("arrays", AdamArray * MOST)] + fields(I64, "used") + fields(DOUBLE, "beta1 beta2 epsilon") + fields(POINTER, "skip")
    )


def image_stride(t: Tensor | None) -> int:
    """Elements from one image to the next; 0 when all images share one array."""
    return 0 if t is None or t.shape[0] == 1 else t.numel() // t.shape[0]


def pointer(t: Tensor | None) -> int | None:
    return None if t is None or t.numel() == 0 else t.data_ptr()


def fill(call: ctypes.Structure, names, tensors, prefix: str = "", strides: bool = False) -> list:
    """Sets the pointers (and strides) `prefix + name` to contiguous forms of the tensors, which the caller must keep alive."""
    kept = [None if t is None else t.contiguous() for t in tensors]
    for name, t in zip(names, kept, strict=True):
        setattr(call, prefix + name, pointer(t))
        if strides:
            setattr(call, "s_" + name, image_stride(t))
    return kept


def make_call(inputs, width, height, near, far, cutoff, aux, batch, threads=1) -> tuple[Call, list]:
    """The call for the tensors named INPUTS, and what must be kept alive with it."""
    call = Call(
        batch=batch, surfels=inputs[0].shape[1], channels=inputs[4].shape[2], width=width, height=height, near=near, far=far,
        aux=sum(AUX_BIT[name] for name in aux), cutoff=CUTOFF[cutoff], threads=threads,
    )  # fmt: skip
    return call, fill(call, INPUTS, inputs, strides=True)


def make_sh_call(means, sh, viewmats, degree, batch, threads=1) -> tuple[ShCall, list]:
    call = ShCall(batch=batch, surfels=means.shape[1], coefficients=sh.shape[2], degree=degree, threads=threads)
    return call, fill(call, ("means", "sh", "viewmats"), (means, sh, viewmats), strides=True)


def make_loss_call(image, target, weight, threads=1) -> tuple[LossCall, list]:
    batch, channels, height, width = image.shape
    weights = 1 if weight is None else weight.shape[1]
    call = LossCall(batch=batch, channels=channels, height=height, width=width, weights=weights, threads=threads)
    call.s_weight = image_stride(weight)
    return call, fill(call, ("image", "target", "weight"), (image, target, weight))
