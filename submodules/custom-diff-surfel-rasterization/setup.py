"""Builds libsurfel_cpu.so: a plain C-ABI library (no Python, no torch headers), loaded by cpu.py through ctypes.

The inner kernels are compiled once per CPU generation and chosen at run time, so the library runs on any CPU of the architecture.
CXX and CXXFLAGS are honoured.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).resolve().parent / "csrc" / "cpu"
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
        sys.exit(f"diff-surfel-rasterization: the C++ compiler {command[0]!r} cannot be run ({error}); set CXX to one that can.")
    if done.returncode:
        sys.exit(f"{done.stderr}\ndiff-surfel-rasterization: compilation failed (the compiler's messages are above): {command[0]}")


class BuildLibrary(build_ext):
    def get_ext_filename(self, name: str) -> str:
        return str(Path(*name.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        compiler = find_compiler() + FLAGS + shlex.split(os.environ.get("CXXFLAGS", ""))
        target = Path(self.get_ext_fullpath(ext.name))
        objects = Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        jobs = {objects / "rasterize.o": [*compiler, "-c", CSRC / "rasterize.cpp"]}
        for name, flags in VARIANTS.items():
            jobs[objects / f"{name}.o"] = [*compiler, *flags, f"-DSURFEL_NAMESPACE=surfel_{name}", "-c", CSRC / "kernels.cpp"]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, [[*command, "-o", path] for path, command in jobs.items()]))
        run([*compiler, "-shared", *jobs, "-o", target])


sources = sorted(str(p.relative_to(Path(__file__).resolve().parent)) for p in CSRC.glob("*.cpp"))
setup(ext_modules=[Extension("diff_surfel_rasterization.libsurfel_cpu", sources)], cmdclass={"build_ext": BuildLibrary})
