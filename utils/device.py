"""The device is chosen once, at the entry point, and passed down."""

from __future__ import annotations

import torch

from utils.errors import UserError


def choose_device(name: str = "auto") -> torch.device:
    """The device `--device` names: "auto" (the first CUDA GPU, else the CPU), "cpu", "cuda" or "cuda:1".

    Raises UserError if the name is none of these, or a GPU is asked for and absent.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    kind, colon, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (colon and not (kind == "cuda" and index.isdecimal())):
        raise UserError(f"--device {name} is not known; use auto, cpu, cuda, or cuda:N")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        reason = "this torch was built without CUDA" if torch.version.cuda is None else "no NVIDIA GPU or driver was found"
        raise UserError(f"--device {name}: {reason}; use --device cpu, or run python -m utils.doctor for the remedy")
    count = torch.cuda.device_count()
    if int(index or 0) >= count:
        raise UserError(f"--device {name}: this machine has {count} GPU{'s' if count > 1 else ''}, counted from cuda:0")
    return torch.device("cuda", int(index or 0))
