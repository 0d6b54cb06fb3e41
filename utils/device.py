"""The device is chosen once, at the entry point, and passed down."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sys

import torch

from utils.errors import UserError


def choose_device(name: str = "auto") -> torch.device:
    """The device `--device` names: "auto" (the first CUDA GPU, else the CPU), "cpu", "cuda" or "cuda:1"; a GPU becomes the current
    one, on which Triton and NCCL work.

    Raises UserError if the name is none of these, or a GPU is asked for and absent.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, colon, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (colon and not (kind == "cuda" and index.isdecimal())):
        raise UserError(f"--device {name} is not known; use auto, cpu, cuda, or cuda:N")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        reason = "this torch was built without CUDA" if torch.version.cuda is None else "no NVIDIA GPU or driver was found"
        raise UserError(f"--device {name}: {reason}; use --device cpu, or run python -m utils.doctor for the remedy")
    count, number = torch.cuda.device_count(), int(index or 0)
    if number >= count:
        raise UserError(f"--device {name}: this machine has {count} GPU{'s' if count > 1 else ''}, counted from cuda:0")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def keep_freed_memory() -> None:
    """On Linux, let the C library keep large freed blocks instead of returning each to the kernel.

    A CPU training step frees and takes hundreds of megabytes, a rendered batch tens; without this a third of the step's time goes
    to page faults. Elsewhere nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def runs_triton(device: torch.device) -> bool:
    """Whether fused kernels written in Triton run here: on a GPU that multiplies bfloat16 (compute capability 8.0; torch's CUDA
    builds for Linux bring Triton)."""
    return device.type == "cuda" and _triton_is_installed() and torch.cuda.get_device_capability(device) >= (8, 0)
