"""Builds libknn_cuda.so (C interface, loaded by cuda.py through ctypes) where nvcc is on PATH; without it, points on a GPU go
through the k-d tree too. TORCH_CUDA_ARCH_LIST is honoured; SURFEL_BUILD_CUDA=0 leaves the kernel out."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = Path(__file__).resolve().parent / "csrc" / "knn.cu"
NVCC = None if os.environ.get("SURFEL_BUILD_CUDA") == "0" else shutil.which(os.environ.get("NVCC", "nvcc"))
DEFAULT = "7.5+PTX"  # a kernel this small is compiled for the GPU at hand when it is loaded


def architectures() -> list[str]:
    flags = []
    for name in (os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT).replace(";", " ").split():
        number = name.removesuffix("+PTX").replace(".", "")
        flags += [f"-gencode=arch=compute_{number},code=sm_{number}"]
        if name.endswith("+PTX"):
            flags += [f"-gencode=arch=compute_{number},code=compute_{number}"]
    return flags


class BuildKernel(build_ext):
    def get_ext_filename(self, name: str) -> str:
        return str(Path(*name.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        options = "-O3 -std=c++17 -cudart static -shared -Xcompiler -fPIC,-fvisibility=hidden".split()
        if subprocess.run([NVCC, *options, *architectures(), str(SOURCE), "-o", str(target)]).returncode:
            sys.exit("simple-knn: nvcc failed (its messages are above); SURFEL_BUILD_CUDA=0 installs without the CUDA kernel")


if NVCC:
    setup(ext_modules=[Extension("simple_knn.libknn_cuda", ["csrc/knn.cu"])], cmdclass={"build_ext": BuildKernel})
else:
    print("simple-knn: nvcc is not on PATH, so this build is for the CPU only")
    for stale in SOURCE.parents[1].glob("build/lib*/simple_knn/libknn_cuda.so"):  # left by an earlier build with nvcc
        stale.unlink()
    setup()
