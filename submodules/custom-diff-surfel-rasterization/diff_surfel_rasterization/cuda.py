"""CUDA back end: loads libsurfel_cuda.so (csrc/cuda/), owns its buffers, and registers its kernels for the ops of ops.py.

The number of (surfel, tile) pairs is known on the device only. Pair buffers therefore have a capacity: PAIRS_PER_SURFEL for what is
kept between forward and backward, more where a call of the same sizes needed more. The first call of its sizes, and every call
without gradients, reads the count back (about 30 us); the other calls queue everything without waiting, with a quarter to spare,
and the count is looked at once it has arrived. A count above the capacity leaves tiles empty, which is warned of then.
"""

import ctypes
import warnings
from collections import deque
from pathlib import Path

import torch
from torch import Tensor

from . import abi, image_loss, ops

EDGE, LONGEST_SIDE, MOST_IMAGES = 8, 65535, 65535
PAIRS_PER_SURFEL, PAIRS_PER_IMAGE = 5, 1024
LOSS_EDGE = {torch.float32: 32, torch.float64: 16}  # pixels of a block of the image loss
OPS = (ops.forward_op, ops.backward_op, ops.sh_op, ops.sh_backward_op, image_loss.forward_op, image_loss.backward_op)
COUNTERS_BYTES = 8 + 2 * 64 * 4
LISTS = ("records", "normals", "tile_start", "tile_count", "tile_order", "ids")
PIXELS = ("transmittance", "moments", "last", "median")


class CudaCall(ctypes.Structure):  # mirrors struct CudaCall of csrc/cuda/device.h
    _fields_ = (
        [("call", abi.Call)]
        + abi.fields(abi.I64, "capacity geometry_sums")
        + abi.fields(abi.POINTER, "records normals tile_start tile_count tile_order ids transmittance moments last median")
        + abi.fields(abi.POINTER, "boxes keys cursor counters sums")
    )


def _tiles(batch, width, height):
    return batch * ((width + EDGE - 1) // EDGE) * ((height + EDGE - 1) // EDGE)


def _kept_capacity(batch, surfels):
    return batch * (PAIRS_PER_SURFEL * surfels + PAIRS_PER_IMAGE)


def _list_bytes(dtype, batch, surfels, width, height, aux, capacity) -> list:
    """Bytes of the arrays named LISTS."""
    number, tiles = (8 if dtype == torch.float64 else 4), _tiles(batch, width, height)
    normals = 3 * number * batch * surfels if "normal" in aux else 0
    return [12 * number * batch * surfels, normals, 8 * tiles, 4 * tiles, 4 * tiles, 4 * capacity]


def _pixel_bytes(dtype, batch, width, height, aux) -> list:
    """Bytes of the arrays named PIXELS."""
    number, pixels = (8 if dtype == torch.float64 else 4), batch * width * height
    moments = 3 * number * pixels if "distortion" in aux else 0
    return [number * pixels, moments, 4 * pixels, 4 * pixels if "median_depth" in aux else 0]


def _aligned(size):
    return (size + 255) // 256 * 256


def _state_bytes(dtype, batch, surfels, width, height, aux):
    sizes = _list_bytes(dtype, batch, surfels, width, height, aux, _kept_capacity(batch, surfels))
    return sum(_aligned(size) for size in (*sizes, *_pixel_bytes(dtype, batch, width, height, aux)))


ops.STATE_BYTES["cuda"] = _state_bytes


def _carve(call: CudaCall, names, sizes, memory: Tensor, offset: int = 0) -> int:
    """Points the call's arrays into `memory`, one after the other (null where the size is 0); returns the end."""
    for name, size in zip(names, sizes, strict=True):
        setattr(call, name, memory.data_ptr() + offset if size else None)
        offset += _aligned(size)
    return offset


def _allocate(call: CudaCall, names, sizes, device) -> Tensor:
    memory = torch.empty(max(sum(map(_aligned, sizes)), 1), dtype=torch.uint8, device=device)
    _carve(call, names, sizes, memory)
    return memory


class BackEnd:
    """The kernels over a loaded library. What depends on a real device stands in the methods that the emulation replaces."""

    def __init__(self, library: ctypes.CDLL):
        sizes = [ctypes.sizeof(CudaCall), ctypes.sizeof(abi.ShCall), COUNTERS_BYTES, ctypes.sizeof(abi.LossCall)]
        library.surfel_cuda_call_size.restype = abi.I64
        library.surfel_cuda_error.restype = ctypes.c_char_p
        if [library.surfel_cuda_call_size(i) for i in range(4)] != sizes:
            raise ImportError("libsurfel_cuda.so is of another version than this package: reinstall diff-surfel-rasterization")
        self.library = library
        self.most_pairs = {}  # by the sizes of a call
        self.awaited = deque()  # (key, capacity, event, pinned count)

    # --- what the device does

    def on(self, device: torch.device):
        return torch.cuda.device(device)

    def stream(self, device: torch.device) -> int:
        return torch.cuda.current_stream(device).cuda_stream

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def await_count(self, key, capacity: int, count: Tensor) -> None:
        """Has the pair count looked at when it has arrived on the host."""
        host = torch.empty(1, dtype=torch.int64, pin_memory=True)
        host.copy_(count, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.awaited.append((key, capacity, event, host))

    # --- the pair buffer's capacity

    def look_at_counts(self) -> None:
        while self.awaited and self.awaited[0][2].query():
            key, capacity, _, host = self.awaited.popleft()
            self.note(key, capacity, int(host))

    def note(self, key, capacity: int, pairs: int) -> None:
        self.most_pairs[key] = max(self.most_pairs.get(key, 0), pairs)
        if pairs > capacity:
            warnings.warn(
                f"surfel rasterizer: an earlier call had {pairs} pairs of surfels and tiles, its buffer held {capacity}; "
                "tiles of its images were left empty. The buffer has been enlarged for the calls from now on.",
                RuntimeWarning,
                stacklevel=2,
            )

    def capacity(self, key, batch: int, surfels: int) -> int:
        """For calls that keep their lists: never less than what the state holds."""
        return max(_kept_capacity(batch, surfels), self.most_pairs.get(key, 0) * 5 // 4)

    # --- kernels

    def run(self, name: str, call, dtype: torch.dtype, device: torch.device) -> None:
        status = getattr(self.library, name)(
            ctypes.byref(call), int(dtype == torch.float64), ctypes.c_void_p(self.stream(device))
        )
        if status:
            raise RuntimeError(f"{name}: CUDA error {status}: {self.library.surfel_cuda_error(status).decode()}")

    def prepare(self, inputs, width, height, near, far, cutoff, names, batch):
        if max(width, height) > LONGEST_SIDE or batch * inputs[4].shape[2] > MOST_IMAGES:
            raise ValueError(f"CUDA draws up to {LONGEST_SIDE} pixels a side and {MOST_IMAGES} images times channels")
        base, keep = abi.make_call(inputs, width, height, near, far, cutoff, names, batch)
        key = (inputs[0].device, inputs[0].dtype, batch, inputs[0].shape[1], width, height)
        return CudaCall(call=base), keep, key

    def count(self, call: CudaCall, dtype, device, tiles: int) -> tuple[Tensor, Tensor]:
        """Counts the pairs; returns the scratch (to be kept until the lists are made) and the count, on the device."""
        boxes = 8 * call.call.batch * call.call.surfels
        scratch = _allocate(call, ("counters", "boxes", "cursor"), (COUNTERS_BYTES, boxes, 4 * tiles), device)
        self.run("surfel_cuda_count", call, dtype, device)
        return scratch, scratch[:8].view(torch.int64)

    def list_pairs(self, call: CudaCall, capacity: int, dtype, device) -> None:
        call.capacity = capacity
        _keys = _allocate(call, ("keys",), (8 * capacity,), device)
        self.run("surfel_cuda_list", call, dtype, device)

    def forward(
        self, means, quats, scales, opacities, features, viewmats, Ks, background, screen,
        width, height, near, far, cutoff, aux, save,
    ):  # fmt: skip
        inputs, names = (means, quats, scales, opacities, features, viewmats, Ks, background), ops.split_aux(aux)
        device, dtype, surfels = means.device, means.dtype, means.shape[1]
        with self.on(device):
            outputs = ops.empty_outputs(*inputs, width, height, names, save)
            batch, state = outputs[0].shape[0], outputs[-1]
            call, _keep, key = self.prepare(inputs, width, height, near, far, cutoff, names, batch)
            abi.fill(call.call, abi.MAPS, outputs[:6], "out_")
            call.call.radii = abi.pointer(outputs[6])
            kept = _kept_capacity(batch, surfels)
            sizes = _list_bytes(dtype, batch, surfels, width, height, names, kept)
            if save:
                end = _carve(call, LISTS, sizes, state)
                _carve(call, PIXELS, _pixel_bytes(dtype, batch, width, height, names), state, end)
            else:
                _lists = _allocate(call, LISTS[:-1], sizes[:-1], device)
            _scratch, count = self.count(call, dtype, device, _tiles(batch, width, height))
            if self.capturing():
                if key not in self.most_pairs:
                    raise RuntimeError("draw once with these sizes before capturing a CUDA graph (the pair buffer's size)")
                capacity = self.capacity(key, batch, surfels)
            elif save and key in self.most_pairs:
                self.look_at_counts()
                capacity = self.capacity(key, batch, surfels)
                self.await_count(key, capacity, count)
            else:
                capacity = int(count)
                self.most_pairs[key] = max(self.most_pairs.get(key, 0), capacity)
                capacity = self.capacity(key, batch, surfels) if save else capacity
            if not save or capacity > kept:
                _ids = _allocate(call, ("ids",), (4 * capacity,), device)
            self.list_pairs(call, capacity, dtype, device)
            self.run("surfel_cuda_forward", call, dtype, device)
        return outputs

    def backward(
        self, grads, means, quats, scales, opacities, features, viewmats, Ks, background, state,
        width, height, near, far, cutoff, aux,
    ):  # fmt: skip
        inputs, names = (means, quats, scales, opacities, features, viewmats, Ks, background), ops.split_aux(aux)
        device, dtype, surfels, batch = means.device, means.dtype, means.shape[1], ops.batch_size(*inputs)
        with self.on(device):
            call, _keep, key = self.prepare(inputs, width, height, near, far, cutoff, names, batch)
            kept, capacity = _kept_capacity(batch, surfels), self.capacity(key, batch, surfels)
            sizes = _list_bytes(dtype, batch, surfels, width, height, names, kept)
            end = _carve(call, LISTS, sizes, state)
            _carve(call, PIXELS, _pixel_bytes(dtype, batch, width, height, names), state, end)
            call.capacity = kept
            if capacity > kept:  # the lists were too long to be kept: make them again
                _lists = _allocate(call, LISTS, [*sizes[:-1], 4 * capacity], device)
                _scratch, _ = self.count(call, dtype, device, _tiles(batch, width, height))
                self.list_pairs(call, capacity, dtype, device)
            _incoming = abi.fill(call.call, abi.MAPS, grads, "g_")
            call.geometry_sums = 12 if all(g is None for g in grads[2:]) else 16
            sums = means.new_zeros(batch, surfels, call.geometry_sums)
            call.sums = abi.pointer(sums)
            outputs = ops.gradient_outputs(inputs, batch)
            outputs[4].zero_()
            outputs[5].zero_()
            abi.fill(call.call, abi.GRADIENTS, outputs, "d_")
            self.run("surfel_cuda_backward", call, dtype, device)
        return outputs

    def sh(self, means, sh, viewmats, degree):
        batch = ops.batch_size(means, sh, viewmats)
        with self.on(means.device):
            call, _keep = abi.make_sh_call(means, sh, viewmats, degree, batch)
            colours = means.new_empty(batch, means.shape[1], 3)
            call.colours = abi.pointer(colours)
            self.run("surfel_cuda_sh_forward", call, means.dtype, means.device)
        return colours

    def sh_backward(self, grad, means, sh, viewmats, degree):
        with self.on(means.device):
            call, _keep = abi.make_sh_call(means, sh, viewmats, degree, grad.shape[0])
            _incoming = abi.fill(call, ("g_colours",), (grad,))
            outputs = tuple(torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (means, sh))
            abi.fill(call, ("d_means", "d_sh"), outputs)
            self.run("surfel_cuda_sh_backward", call, means.dtype, means.device)
        return outputs

    def ssim_l1(self, image, target, weight, save):
        (batch, channels, height, width), dtype = image.shape, image.dtype
        if batch * channels > MOST_IMAGES:
            raise ValueError(f"CUDA compares up to {MOST_IMAGES} images times channels in a call")
        with self.on(image.device):
            outputs = image_loss.empty_outputs(image, weight, save)
            call, _keep = abi.make_loss_call(image, target, weight)
            abi.fill(call, ("ssim", "l1", "d_similarity"), outputs)
            edge = LOSS_EDGE[dtype]
            blocks = batch * channels * -(-height // edge) * -(-width // edge)
            partial = image.new_empty(blocks * (1 + call.weights))
            call.partial = abi.pointer(partial)
            self.run("surfel_cuda_loss_forward", call, dtype, image.device)
        return outputs

    def ssim_l1_backward(self, g_ssim, g_l1, image, target, weight, d_similarity):
        with self.on(image.device):
            call, _keep = abi.make_loss_call(image, target, weight)
            output = image.new_empty(image.shape)
            _incoming = abi.fill(call, ("g_ssim", "g_l1", "d_similarity", "d_image"), (g_ssim, g_l1, d_similarity, output))
            self.run("surfel_cuda_loss_backward", call, image.dtype, image.device)
        return output

    def register(self, device_type: str) -> None:
        """Makes these the kernels of the ops for a device type."""
        kernels = (self.forward, self.backward, self.sh, self.sh_backward, self.ssim_l1, self.ssim_l1_backward)
        for op, kernel in zip(OPS, kernels, strict=True):
            op.register_kernel(device_type)(kernel)


def available() -> bool:
    """Whether the package was built with CUDA (nvcc was on PATH when it was installed)."""
    return library_path().is_file()


def library_path() -> Path:
    return Path(__file__).with_name("libsurfel_cuda.so")


def _missing(*args, **kwargs):
    raise NotImplementedError(
        "diff_surfel_rasterization was built without CUDA: put nvcc on PATH and reinstall it "
        "(pip install --force-reinstall --no-deps submodules/custom-diff-surfel-rasterization), or move the tensors to the CPU"
    )


if available():
    BackEnd(ctypes.CDLL(str(library_path()))).register("cuda")
else:
    for _op in OPS:
        _op.register_kernel("cuda")(_missing)
