"""Builds libknn_cuda.so (C interface, loaded by cuda.py through ctypes) where nvcc is found; without it, points on a GPU go
through the k-d tree too. CUDA_HOME, NVCC, CXX and TORCH_CUDA_ARCH_LIST are honoured; SURFEL_BUILD_CUDA=0 leaves the kernel out."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = Path(__file__).resolve().parent / "csrc" / "knn.cu"


def find_nvcc() -> str | None:
    if os.environ.get("SURFEL_BUILD_CUDA") == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    places = [os.environ.get("NVCC"), home and f"{home}/bin/nvcc", "nvcc"]
    found = next((path for path in (shutil.which(place) for place in places if place) if path), None)
    if not found and os.environ.get("SURFEL_BUILD_CUDA") == "1":
        sys.exit("simple-knn: SURFEL_BUILD_CUDA=1, but nvcc was not found: put it on PATH or set CUDA_HOME")
    return found


NVCC = find_nvcc()
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
        host = ["-ccbin", shlex.split(os.environ["CXX"])[0]] if os.environ.get("CXX") else []
        if subprocess.run([NVCC, *options, *host, *architectures(), str(SOURCE), "-o", str(target)]).returncode:
            sys.exit("simple-knn: nvcc failed (its messages are above); SURFEL_BUILD_CUDA=0 installs without the CUDA kernel")


if NVCC:
    setup(ext_modules=[Extension("simple_knn.libknn_cuda", ["csrc/knn.cu"])], cmdclass={"build_ext": BuildKernel})
else:
    print("simple-knn: no nvcc, so this build is for the CPU only")
    for stale in SOURCE.parents[1].glob("build/lib*/simple_knn/libknn_cuda.so"):  # left by an earlier build with nvcc
        stale.unlink()
    setup()
