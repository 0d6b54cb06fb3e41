"""Runs the CUDA back end on the host: its kernel sources compiled with g++ against cuda_runtime.h of this folder, its host code as
it is, put in the place of the CPU kernels. So every test of the rasterizer can be asked of the CUDA kernels, without a GPU."""

import contextlib
import ctypes
import os
import shutil
import subprocess
from pathlib import Path

from diff_surfel_rasterization import cuda, ops

HERE = Path(__file__).resolve().parent
SUBMODULES = HERE.parents[1] / "submodules"
RASTERIZER = SUBMODULES / "custom-diff-surfel-rasterization" / "csrc" / "cuda" / "rasterize.cu"
FLAGS = "-x c++ -std=c++17 -O1 -fPIC -shared -fvisibility=hidden -Wall -Wno-unknown-pragmas -Wno-maybe-uninitialized".split()


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def build(source: Path, target: Path) -> ctypes.CDLL:
    subprocess.run([compiler(), *FLAGS, "-I", HERE, source, "-o", target], check=True)
    return ctypes.CDLL(str(target))


class EmulatedBackEnd(cuda.BackEnd):
    """On CPU tensors, where what is queued is done at once."""

    def on(self, device):
        return contextlib.nullcontext()

    def stream(self, device):
        return 0

    def capturing(self):
        return False

    def await_count(self, key, capacity, count):
        self.note(key, capacity, int(count))


@contextlib.contextmanager
def in_place_of_the_cpu(back_end: EmulatedBackEnd):
    """The ops run on `back_end` for CPU tensors."""
    kernels = (ops.forward_op, ops.backward_op, ops.sh_op, ops.sh_backward_op)
    before, state_bytes = [op._backend_fns["cpu"] for op in kernels], ops.STATE_BYTES["cpu"]
    back_end.register("cpu")
    ops.STATE_BYTES["cpu"] = ops.STATE_BYTES["cuda"]
    try:
        yield back_end
    finally:
        for op, kernel in zip(kernels, before, strict=True):
            op.register_kernel("cpu")(kernel)
        ops.STATE_BYTES["cpu"] = state_bytes
