"""CUDA back end: loads libsurfel_cuda.so (csrc/cuda/), owns its buffers, and registers its kernels for the ops of ops.py.

The number of (surfel, tile) pairs is known on the device only. Pair buffers therefore have a capacity: PAIRS_PER_SURFEL for what is
kept between forward and backward, more where a call of the same sizes needed more. The first call of its sizes, and every call
without gradients, reads the count back (about 30 us); the other calls queue everything without waiting, with a quarter to spare,
and captured CUDA graphs replay with half to spare. Kernels note the greatest count in memory that the host reads (Watch). A count
above the capacity leaves tiles empty, in the image and in its gradients alike; that is warned of at the next call.

The state that autograd keeps has a size that follows from the shapes. Lists too long for it are kept beside it until the backward
or the next forward of the same sizes, whichever comes first; in the latter case the backward makes them again.
"""

import ctypes
import warnings
from pathlib import Path

import torch
from torch import Tensor

from . import abi, image_loss, ops

EDGE, LONGEST_SIDE, MOST_IMAGES = 8, 65535, 65535
PAIRS_PER_SURFEL, PAIRS_PER_IMAGE = 5, 1024
LOSS_EDGE = {torch.float32: 32, torch.float64: 16}  # pixels of a block of the image loss
OPS = (ops.forward_op, ops.backward_op, ops.sh_op, ops.sh_backward_op, image_loss.forward_op, image_loss.backward_op)
COUNTERS_BYTES = 8 + 2 * 64 * 4
LISTS = ("records", "normals", "tile_start", "tile_order", "counters", "tile_count", "ids")
PIXELS = ("transmittance", "moments", "last", "median")


class CudaCall(ctypes.Structure):  # mirrors struct CudaCall of csrc/cuda/device.h
    _fields_ = (
        [("call", abi.Call)]
        + abi.fields(abi.I64, "capacity geometry_sums")
        + abi.fields(abi.POINTER, "records normals tile_start tile_count tile_order ids transmittance moments last median")
        + abi.fields(abi.POINTER, "counters boxes keys cursor most_pairs most_pairs_host sums")
    )


def _tiles(batch, width, height):
    return batch * ((width + EDGE - 1) // EDGE) * ((height + EDGE - 1) // EDGE)


def _kept_capacity(batch, surfels):
    return batch * (PAIRS_PER_SURFEL * surfels + PAIRS_PER_IMAGE)


def _list_bytes(dtype, batch, surfels, width, height, aux, capacity) -> list:
    """Bytes of the arrays named LISTS."""
    number, tiles = (8 if dtype == torch.float64 else 4), _tiles(batch, width, height)
    normals = 3 * number * batch * surfels if "normal" in aux else 0
    return [12 * number * batch * surfels, normals, 8 * tiles, 4 * tiles, COUNTERS_BYTES, 4 * tiles, 4 * capacity]


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


class Watch:
    """The greatest pair count of the calls of one kind (sizes, dtype, device): kept on the device, copied to pinned host memory by
    whichever kernel meets a greater one."""

    def __init__(self, device: torch.device, host: Tensor):
        self.on_device, self.on_host = torch.zeros(1, dtype=torch.int64, device=device), host
        self.pairs = 0
        self.promised = self.captured = None  # capacity of the last call that did not wait, of the last one captured
        self.long_lists: tuple[int, Tensor, int] | None = None  # of the last call: address of its state, ids, capacity

    def look(self) -> None:
        arrived = self.on_host.item()
        if arrived <= self.pairs:
            return
        self.pairs = arrived
        limit = min((c for c in (self.promised, self.captured) if c is not None), default=arrived)
        if arrived > limit:
            warnings.warn(
                f"surfel rasterizer: an earlier call had {arrived} pairs of surfels and tiles, its buffer held {limit}; tiles of "
                "its images were left empty. The next calls have a larger buffer; a captured CUDA graph must be captured again.",
                RuntimeWarning,
                stacklevel=2,
            )


class BackEnd:
    """The kernels over a loaded library. What depends on a real device stands in the methods that the emulation replaces."""

    def __init__(self, library: ctypes.CDLL):
        sizes = [ctypes.sizeof(CudaCall), ctypes.sizeof(abi.ShCall), COUNTERS_BYTES, ctypes.sizeof(abi.LossCall)]
        sizes.append(ctypes.sizeof(abi.AdamCall))
        library.surfel_cuda_call_size.restype = abi.I64
        library.surfel_cuda_error.restype = ctypes.c_char_p
        if [library.surfel_cuda_call_size(i) for i in range(len(sizes))] != sizes:
            raise ImportError("libsurfel_cuda.so is of another version than this package: reinstall diff-surfel-rasterization")
        self.library = library
        self.watches: dict[tuple, Watch] = {}

    # --- what the device does

    def on(self, device: torch.device):
        return torch.cuda.device(device)

    def stream(self, device: torch.device) -> int:
        return torch.cuda.current_stream(device).cuda_stream

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def host_memory(self) -> Tensor:
        """A zero that kernels can write to and the host can read."""
        return torch.zeros(1, dtype=torch.int64, pin_memory=True)

    # --- the pair buffer's capacity

    def capacity(self, watch: Watch, batch: int, surfels: int) -> int:
        """For calls that do not wait, and their backward: never less than what the state holds."""
        spare = 1.5 if self.capturing() else 1.25
        return max(_kept_capacity(batch, surfels), int(watch.pairs * spare))

    def graph_overflowed(self) -> bool:
        """See `graph_overflowed` below."""
        for watch in self.watches.values():
            watch.look()
        full = [w for w in self.watches.values() if w.captured is not None and w.pairs > w.captured]
        for watch in full:
            watch.captured = None  # told once: a graph that is gone, its sizes still drawn otherwise, must not be told of for ever
        return bool(full)

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

    def watch(self, call: CudaCall, key) -> tuple[Watch, bool]:
        """The watch over calls like this one, and whether it is new."""
        new = key not in self.watches
        if new:
            if self.capturing():
                raise RuntimeError("draw once with these sizes before capturing a CUDA graph (the pair buffer's size)")
            self.watches[key] = Watch(key[0], self.host_memory())
        watch = self.watches[key]
        call.most_pairs, call.most_pairs_host = watch.on_device.data_ptr(), watch.on_host.data_ptr()
        return watch, new

    def forward(
        self, means, quats, scales, opacities, features, viewmats, Ks, background, screen,
        width, height, near, far, cutoff, aux, as_bytes, save,
    ):  # fmt: skip
        inputs, names = (means, quats, scales, opacities, features, viewmats, Ks, background), ops.split_aux(aux)
        device, dtype, surfels = means.device, means.dtype, means.shape[1]
        with self.on(device):
            outputs = ops.empty_outputs(*inputs, width, height, names, as_bytes, save)
            batch, state = outputs[0].shape[0], outputs[-1]
            call, _keep, key = self.prepare(inputs, width, height, near, far, cutoff, names, batch)
            watch, new = self.watch(call, key)
            call.call.as_bytes = as_bytes
            abi.fill(call.call, abi.MAPS, outputs[:6], "out_")
            call.call.radii = abi.pointer(outputs[6])
            kept = _kept_capacity(batch, surfels)
            sizes = _list_bytes(dtype, batch, surfels, width, height, names, kept)
            if save:
                end = _carve(call, LISTS, sizes, state)
                _carve(call, PIXELS, _pixel_bytes(dtype, batch, width, height, names), state, end)
                lists = state
            else:
                lists = _allocate(call, LISTS[:-1], sizes[:-1], device)
            _scratch = self.scratch(call, batch, surfels, width, height, device)
            waits = not self.capturing() and (new or not save)
            if waits:
                self.run("surfel_cuda_count", call, dtype, device)
                start = call.counters - lists.data_ptr()
                pairs = int(lists[start : start + 8].view(torch.int64))
                watch.pairs = max(watch.pairs, pairs)
            else:
                watch.look()
            if self.capturing():
                watch.captured = capacity = self.capacity(watch, batch, surfels)
                watch.promised = None  # capturing began with a wait for the calls before, whose counts have been looked at
            elif save:
                watch.promised = capacity = self.capacity(watch, batch, surfels)
            else:
                capacity = pairs
            if not save or capacity > kept:
                ids = _allocate(call, ("ids",), (4 * capacity,), device)
            if save:
                watch.long_lists = (state.data_ptr(), ids, capacity) if capacity > kept else None
            _keys = self.keys(call, capacity, device)
            if waits:
                self.run("surfel_cuda_list", call, dtype, device)
                self.run("surfel_cuda_forward", call, dtype, device)
            else:
                self.run("surfel_cuda_draw", call, dtype, device)
        return outputs

    def scratch(self, call: CudaCall, batch, surfels, width, height, device) -> Tensor:
        return _allocate(call, ("boxes", "cursor"), (8 * batch * surfels, 4 * _tiles(batch, width, height)), device)

    def keys(self, call: CudaCall, capacity: int, device) -> Tensor:
        call.capacity = capacity
        return _allocate(call, ("keys",), (8 * capacity,), device)

    def backward(
        self, grads, means, quats, scales, opacities, features, viewmats, Ks, background, state,
        width, height, near, far, cutoff, aux,
    ):  # fmt: skip
        inputs, names = (means, quats, scales, opacities, features, viewmats, Ks, background), ops.split_aux(aux)
        device, dtype, surfels, batch = means.device, means.dtype, means.shape[1], ops.batch_size(*inputs)
        with self.on(device):
            call, _keep, key = self.prepare(inputs, width, height, near, far, cutoff, names, batch)
            watch = self.watches[key]
            kept, capacity = _kept_capacity(batch, surfels), self.capacity(watch, batch, surfels)
            sizes = _list_bytes(dtype, batch, surfels, width, height, names, kept)
            end = _carve(call, LISTS, sizes, state)
            _carve(call, PIXELS, _pixel_bytes(dtype, batch, width, height, names), state, end)
            call.capacity = kept
            long_lists, watch.long_lists = watch.long_lists, None
            if long_lists and long_lists[0] == state.data_ptr():
                _, ids, call.capacity = long_lists
                call.ids = ids.data_ptr()
            elif capacity > kept:  # another call came between
                _lists = _allocate(call, LISTS, [*sizes[:-1], 4 * capacity], device)
                _scratch = self.scratch(call, batch, surfels, width, height, device)
                _keys = self.keys(call, capacity, device)
                self.run("surfel_cuda_count", call, dtype, device)
                self.run("surfel_cuda_list", call, dtype, device)
            _incoming = abi.fill(call.call, abi.MAPS, grads, "g_")
            call.geometry_sums = 12 if all(g is None for g in grads[2:]) else 16
            sums = means.new_empty(batch, surfels, call.geometry_sums)
            call.sums = abi.pointer(sums)
            outputs = ops.gradient_outputs(inputs, batch)
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

    def adam(self, arrays: list[tuple[Tensor, ...]], betas: tuple[float, float], epsilon: float, skip: Tensor | None) -> None:
        """A step of Adam on arrays, contiguous, of one dtype and on one device: for each its value, gradient, mean and mean
        square, its learning rate and the number of the step, counted from 1 (float32 scalars). `skip`: a float32 scalar; not 0,
        and nothing changes. A launch for every 48 arrays. ValueError if they differ in dtype or are not contiguous."""
        if any(not t.is_contiguous() or t.dtype != arrays[0][0].dtype for row in arrays for t in row[:4]):
            raise ValueError("Adam takes contiguous parameters of one dtype")
        most, value = abi.AdamCall.MOST, arrays[0][0]
        for start in range(0, len(arrays), most):
            part = arrays[start : start + most]
            call = abi.AdamCall(used=len(part), beta1=betas[0], beta2=betas[1], epsilon=epsilon, skip=abi.pointer(skip))
            for k, row in enumerate(part):
                call.arrays[k] = abi.AdamArray(*map(abi.pointer, row), row[0].numel())
            with self.on(value.device):
                self.run("surfel_cuda_adam", call, value.dtype, value.device)

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


def graph_overflowed() -> bool:
    """Whether a captured CUDA graph has met more (surfel, tile) pairs than the buffer it was captured with holds: tiles of its
    images stay empty, so capture it again (the buffer will be larger). Says so once. Looks at the replays that are done; does not
    wait. Of several graphs of the same sizes the last one captured is judged."""
    return back_end is not None and back_end.graph_overflowed()


back_end = BackEnd(ctypes.CDLL(str(library_path()))) if available() else None
if back_end is not None:
    back_end.register("cuda")
else:
    for _op in OPS:
        _op.register_kernel("cuda")(_missing)
