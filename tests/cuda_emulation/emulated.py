"""Runs the CUDA back end on the host: its kernel sources compiled with g++ against cuda_runtime.h of this folder, its host code as
it is, put in the place of the CPU kernels. So every test of the rasterizer can be asked of the CUDA kernels, without a GPU."""

import contextlib

import torch
from diff_surfel_rasterization import cuda, ops


class EmulatedBackEnd(cuda.BackEnd):
    """On CPU tensors, where what is queued is done at once."""

    def on(self, device):
        return contextlib.nullcontext()

    def stream(self, device):
        return 0

    def capturing(self):
        return False

    def host_memory(self):
        return torch.zeros(1, dtype=torch.int64)


@contextlib.contextmanager
def in_place_of_the_cpu(back_end: EmulatedBackEnd):
    """The ops run on `back_end` for CPU tensors."""
    before, state_bytes = [op._backend_fns["cpu"] for op in cuda.OPS], ops.STATE_BYTES["cpu"]
    back_end.register("cpu")
    ops.STATE_BYTES["cpu"] = ops.STATE_BYTES["cuda"]
    try:
        yield back_end
    finally:
        for op, kernel in zip(cuda.OPS, before, strict=True):
            op.register_kernel("cpu")(kernel)
        ops.STATE_BYTES["cpu"] = state_bytes
