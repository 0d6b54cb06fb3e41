"""What is installed, what is missing, and the remedy: python -m utils.doctor

Exit code 1 if something that the three programs cannot do without is missing.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
EXTENSIONS = {"diff_surfel_rasterization": "submodules/custom-diff-surfel-rasterization", "simple_knn": "submodules/simple-knn"}
# what a package is called when imported, where that differs from its name on PyPI
MODULES = {"opencv-python": "cv2", "opencv-contrib-python": "cv2", "pillow": "PIL", "face-alignment": "face_alignment"}
OPTIONAL = {
    "face-alignment": "the fan landmarks", "pytest": "the tests", "ruff": "development", "imageio": "user scripts",
    "rich": "user scripts",
}  # fmt: skip
ENCODERS = ("libx264", "aac")
GIGABYTE = 1e9
MEMORY_GB, DISK_GB = 8, 10  # what a 5-minute clip asks for

OK, NOTE, OPTION, MISSING = "ok", "note", "option", "MISSING"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report. MISSING: the programs cannot do without it; NOTE: worth knowing; OPTION: could be added."""

    topic: str
    what: str
    state: str = OK
    remedy: str = ""


def examine() -> Iterator[Finding]:
    """Everything there is to say, in the order of the report."""
    yield from _machine()
    yield from _packages()
    yield from _torch()
    yield from _extensions()
    yield from _codecs()
    yield from _models()


def _machine() -> Iterator[Finding]:
    supported = (3, 11) <= sys.version_info[:2] <= (3, 12)
    yield Finding("python", f"{platform.python_version()} at {sys.executable}", OK if supported else MISSING,
                  "" if supported else "install Python 3.11 or 3.12, then make setup PYTHON=/path/to/it")  # fmt: skip
    yield Finding("system", f"{platform.platform()}, {os.cpu_count()} cores")
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIGABYTE
    except (AttributeError, ValueError, OSError):
        memory = None  # Windows has no sysconf
    if memory is not None:
        enough = memory >= MEMORY_GB * 0.95
        yield Finding("memory", f"{memory:.1f} GB", OK if enough else NOTE, "" if enough else
                      f"below {MEMORY_GB} GB: use short clips and --size 256")  # fmt: skip
    free = shutil.disk_usage(ROOT).free / GIGABYTE
    enough = free >= DISK_GB
    yield Finding("disk", f"{free:.1f} GB free at {ROOT}", OK if enough else NOTE, "" if enough else
                  f"below {DISK_GB} GB: a 5-minute clip may not fit; free some space")  # fmt: skip
    compiler = find_compiler()
    yield Finding("C++ compiler", compiler or "none, and the submodules are built with one", OK if compiler else NOTE,
                  "" if compiler else "Debian/Ubuntu: sudo apt install g++; Fedora: sudo dnf install gcc-c++; macOS: xcode-select "
                  "--install")  # fmt: skip
    yield Finding("nvcc", shutil.which("nvcc") or "none (only needed to build CUDA code)")


def find_compiler() -> str | None:
    """The C++ compiler that the submodules would be built with: $CXX, else the first of g++, c++, clang++."""
    return next(filter(None, map(shutil.which, [*shlex.split(os.environ.get("CXX", ""))[:1], "g++", "c++", "clang++"])), None)


def requirements() -> dict[str, str]:
    """Package -> version pinned in requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = (line.partition("#")[0].partition(";")[0].strip() for line in lines)  # without comments and markers
    return dict(pin.split("==") for pin in pins if pin)


def _packages() -> Iterator[Finding]:
    for name, wanted in requirements().items():
        lack, purpose = (NOTE, f"; only {OPTIONAL[name]} need it") if name in OPTIONAL else (MISSING, "")
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name in ("opencv-python", "opencv-contrib-python") and _imports("cv2") is None:
                yield Finding("package", f"{name} is absent, but another build of it serves", NOTE)
            else:
                yield Finding("package", f"{name} is not installed{purpose}", lack, f"pip install {name}=={wanted}, or make setup")
            continue
        error = _imports(MODULES.get(name, name.replace("-", "_")))
        if error:
            yield Finding("package", f"{name} {found} cannot be imported ({error}){purpose}", lack,
                          f"pip install --force-reinstall {name}=={wanted}")  # fmt: skip
        elif re.sub(r"\+.*", "", found) != wanted:
            yield Finding("package", f"{name} {found}, tested with {wanted}", NOTE,
                          f"if it misbehaves: pip install {name}=={wanted}")  # fmt: skip
        else:
            yield Finding("package", f"{name} {found}")


def _imports(module: str) -> str | None:
    """Why the module cannot be imported, in a few words; None if it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a half-installed package raises anything, and the doctor is here to say so
        return (str(error) or type(error).__name__).splitlines()[0]
    return None


def _torch() -> Iterator[Finding]:
    if _imports("torch"):
        return
    import torch

    driver = _driver()
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Finding("CUDA", f"{', '.join(names)}; driver {driver}, torch built for CUDA {torch.version.cuda}")
    elif driver and torch.version.cuda is None:
        yield Finding("CUDA", f"there is a GPU (driver {driver}), but torch was built without CUDA", NOTE,
                      "see https://pytorch.org/get-started/locally for the build that uses it")  # fmt: skip
    elif driver:
        yield Finding("CUDA", f"torch is built for CUDA {torch.version.cuda}, but cannot use the GPU with driver {driver}", NOTE,
                      "update the NVIDIA driver")  # fmt: skip
    else:
        yield Finding("CUDA", "no NVIDIA GPU: everything runs on the CPU")


def _driver() -> str | None:
    """Version of the NVIDIA driver, None without one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None


def _extensions() -> Iterator[Finding]:
    for module, folder in EXTENSIONS.items():
        error = _imports(module)
        yield Finding("extension", f"{module}{f' cannot be imported ({error})' if error else ''}", MISSING if error else OK,
                      f"pip install {folder}, or make setup" if error else "")  # fmt: skip


def _codecs() -> Iterator[Finding]:
    if _imports("av"):
        return
    import av

    for name in ENCODERS:
        present = name in av.codecs_available
        yield Finding("codec", f"{name}{'' if present else ' is not in this PyAV'}", OK if present else MISSING, "" if present else
                      "pip install --force-reinstall --only-binary=:all: av, whose wheels bring FFmpeg")  # fmt: skip


def _models() -> Iterator[Finding]:
    if _imports("utils.model_store"):  # it needs numpy
        return
    from utils import model_store

    for name, model in model_store.MODELS.items():
        try:
            path = model_store.find(name)
        except UserError as error:
            yield Finding("model", f"{name} is damaged", NOTE, str(error))
            continue
        if path:
            yield Finding("model", f"{name} at {path}")
        elif model.sources:
            yield Finding("model", f"{name}: fetched at its first use ({model.use})", NOTE, model_store.remedy(name))
        else:
            yield Finding("model", f"{name}: {model.use}", OPTION)


def main() -> None:
    findings = []
    for finding in examine():
        findings.append(finding)
        print(f"{finding.state:8}{finding.topic + ':':14}{finding.what}")
        if finding.remedy:
            print(f"{'':22}-> {finding.remedy}")
    missing = [finding for finding in findings if finding.state == MISSING]
    print(f"\n{len(missing)} of the things required missing: see the lines marked {MISSING}" if missing else
          "\neverything that is required is here (python -m utils.model_store says how to get the optional models)")  # fmt: skip
    raise SystemExit(1 if missing else 0)


if __name__ == "__main__":
    main()
