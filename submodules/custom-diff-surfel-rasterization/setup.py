"""Builds libsurfel_cpu.so and, where nvcc is found, libsurfel_cuda.so: plain C-ABI libraries (no Python, no torch headers), loaded
by cpu.py and cuda.py through ctypes.

CPU: the inner kernels are compiled once per CPU generation and chosen at run time, so the library runs on any CPU of the
architecture. CXX and CXXFLAGS are honoured.
CUDA: for the architectures of TORCH_CUDA_ARCH_LIST ("8.0 9.0+PTX"), else for all that run today (ARCHITECTURES). nvcc is taken from
NVCC, CUDA_HOME or PATH; no GPU is needed. SURFEL_BUILD_CUDA=0 builds for the CPU only, =1 makes a missing nvcc an error.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc" / "cpu"
CUDA_SOURCE = ROOT / "csrc" / "cuda" / "rasterize.cu"
FLAGS = (
    "-O3 -std=c++17 -fPIC -fopenmp -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math "
    "-Wall -Wextra -Wno-maybe-uninitialized -Wno-psabi"
).split()
VARIANTS = {"base": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    FLAGS.append("-DSURFEL_X86")
    VARIANTS["avx2"] = ["-mavx2", "-mfma"]
    VARIANTS["avx512"] = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]


def find_compiler() -> list[str]:
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return [name]
    sys.exit(
        "diff-surfel-rasterization needs a C++ compiler to install, and none was found: install one "
        "(Debian/Ubuntu: apt install g++; Fedora: dnf install gcc-c++) or name it in the environment variable CXX."
    )


def run(command: list) -> None:
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    except OSError as error:
        sys.exit(f"diff-surfel-rasterization: {command[0]!r} cannot be run ({error}); set CXX or NVCC to one that can.")
    if done.returncode:
        sys.exit(f"{done.stderr}\ndiff-surfel-rasterization: compilation failed (the compiler's messages are above): {command[0]}")


# Machine code for these runs on every later minor version too (8.0 on 8.6 and 8.9, 12.0 on 12.1); PTX for what comes between.
ARCHITECTURES = {(11, 8): "7.5 8.0 9.0+PTX", (12, 8): "7.5 8.0 9.0+PTX 12.0"}  # from this CUDA version on


def find_nvcc() -> str | None:
    """nvcc, or None for a build without CUDA (why is printed)."""
    wish = os.environ.get("SURFEL_BUILD_CUDA", "")
    if wish == "0":
        print("diff-surfel-rasterization: built for the CPU only (SURFEL_BUILD_CUDA=0)")
        return None
    home = os.environ.get("CUDA_HOME")
    places = [os.environ.get("NVCC"), home and f"{home}/bin/nvcc", "nvcc"]
    found = next((path for path in (shutil.which(place) for place in places if place) if path), None)
    if not found and wish == "1":
        sys.exit("diff-surfel-rasterization: SURFEL_BUILD_CUDA=1, but nvcc was not found: put it on PATH or set CUDA_HOME")
    if not found:
        print("diff-surfel-rasterization: nvcc is not on PATH, so this build is for the CPU only")
    return found


def cuda_version(nvcc: str) -> tuple[int, int]:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release (\d+)\.(\d+)", text)
    if not version or (int(version[1]), int(version[2])) < (11, 8):
        sys.exit(f"diff-surfel-rasterization needs CUDA 11.8 or later; {nvcc} says: {text.strip() or 'nothing'}")
    return int(version[1]), int(version[2])


def architecture_flags(names: str) -> list[str]:
    """nvcc's -gencode options for a list in torch's form: "8.0;9.0+PTX" or "8.0 9.0a"."""
    flags = []
    for name in names.replace(";", " ").replace(",", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", name)
        if not match:
            sys.exit(f'diff-surfel-rasterization: TORCH_CUDA_ARCH_LIST holds {name!r}; write versions like "8.0 9.0+PTX"')
        number = match[1] + match[2]
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if match[3]:
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def cuda_command(nvcc: str, target: Path) -> list:
    version = cuda_version(nvcc)
    default = next(names for least, names in sorted(ARCHITECTURES.items(), reverse=True) if version >= least)
    names = os.environ.get("TORCH_CUDA_ARCH_LIST") or default
    print(f"diff-surfel-rasterization: building for CUDA {version[0]}.{version[1]}, architectures {names}")
    host = ["-ccbin", shlex.split(os.environ["CXX"])[0]] if os.environ.get("CXX") else []
    options = "-O3 -std=c++17 --threads 0 -cudart static -shared -Xcompiler -fPIC,-fvisibility=hidden,-Wall".split()
    return [nvcc, *options, *host, *architecture_flags(names), CUDA_SOURCE, "-o", target]


class BuildLibrary(build_ext):
    def get_ext_filename(self, name: str) -> str:
        return str(Path(*name.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        if ext.name.endswith("cuda"):
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            run(cuda_command(find_nvcc(), target))
        else:
            self.build_cpu(ext)

    def build_cpu(self, ext: Extension) -> None:
        compiler = find_compiler() + FLAGS + shlex.split(os.environ.get("CXXFLAGS", ""))
        target = Path(self.get_ext_fullpath(ext.name))
        objects = Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        jobs = {objects / f"{name}.o": [*compiler, "-c", CSRC / f"{name}.cpp"] for name in ("rasterize", "image_loss")}
        for name, flags in VARIANTS.items():
            jobs[objects / f"{name}.o"] = [*compiler, *flags, f"-DSURFEL_NAMESPACE=surfel_{name}", "-c", CSRC / "kernels.cpp"]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, [[*command, "-o", path] for path, command in jobs.items()]))
        run([*compiler, "-shared", *jobs, "-o", target])


def sources(folder: Path, pattern: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in folder.glob(pattern))


extensions = [Extension("diff_surfel_rasterization.libsurfel_cpu", sources(CSRC, "*.cpp"))]
if find_nvcc():
    extensions.append(Extension("diff_surfel_rasterization.libsurfel_cuda", sources(CUDA_SOURCE.parent, "*.cu")))
else:  # a library that an earlier build with nvcc left in build/ would be installed too
    for stale in ROOT.glob("build/lib*/diff_surfel_rasterization/libsurfel_cuda.so"):
        stale.unlink()
setup(ext_modules=extensions, cmdclass={"build_ext": BuildLibrary})
