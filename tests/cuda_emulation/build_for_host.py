"""Compiles CUDA sources with g++ against cuda_runtime.h of this folder."""

import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
SUBMODULES = HERE.parents[1] / "submodules"
RASTERIZER = SUBMODULES / "custom-diff-surfel-rasterization" / "csrc" / "cuda" / "rasterize.cu"
KNN = SUBMODULES / "simple-knn" / "csrc" / "knn.cu"
FLAGS = "-x c++ -std=c++17 -O1 -fPIC -shared -fvisibility=hidden -Wall -Wno-unknown-pragmas -Wno-maybe-uninitialized".split()
FLAGS.append("-U_FORTIFY_SOURCE")  # Ubuntu's default, with which longjmp refuses to change from one coroutine's stack to another's


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def compile_for_the_host(source: Path, target: Path, *options: str) -> None:
    subprocess.run([compiler(), *FLAGS, *options, "-I", HERE, source, "-o", target], check=True)
