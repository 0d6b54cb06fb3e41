"""How much memory a training run will take, said before it is taken, and one sentence when there is not enough."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from utils.device import runs_triton
from utils.errors import UserError

GIB = 1 << 30
PROGRAM = GIB // 2  # bytes of torch, the model and its optimizer
HOST_PROGRAM = 2 * GIB  # RAM of a process that trains on a GPU: CUDA itself, and frames on their way
HOST_CACHE = 2 * GIB  # frames kept in RAM at most
REMEDY = "lower --batch_size or --max_points, or process the clip again at a smaller --size"


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on the device: of a GPU what it and our cache have free, else RAM; None where it is unknown."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        with open("/proc/meminfo") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # macOS tells no more
    except (AttributeError, ValueError, OSError):
        return None


def step_bytes(config, batch_size: int, pixels: int, device: torch.device) -> int:
    """About what one fine step takes above the data: activations of the network, and the pictures with their losses.

    Fitted to peaks of plain torch, which keeps every activation (within a fifth), and of the fused network, which keeps few.
    """
    width = config.plane_channels * len(config.plane_multires)
    a_surfel = 4 * (3 * width + 2.5 * (len(config.deform) * config.net_width + config.layers * config.ffn_hidden))
    if runs_triton(device) and config.layers == 1 and config.dropout == 0:
        a_surfel = 1200
    a_pixel = 250 + 440 * (config.lambda_perceptual > 0 and "window" in config.perceptual_on)
    return int(batch_size * (config.max_points * a_surfel + pixels * a_pixel))


def plan(config, batch_size: int, pixels: int, frames: int, device: torch.device, say: bool) -> bool:
    """Print what training will take, and return whether the `frames` bytes of pictures can stay on the device.

    Raises UserError if a step alone does not fit.
    """
    step, free, ram = step_bytes(config, batch_size, pixels, device), free_memory(device), free_memory(torch.device("cpu"))
    if free is not None and step + PROGRAM > free:
        takes = f"training takes about {(step + PROGRAM) / GIB:.2f} GiB on {device}, and {free / GIB:.2f} GiB are free"
        raise UserError(f"{takes}; {REMEDY}")
    room = HOST_CACHE if device.type == "cpu" else frames
    held = frames <= room and (free is None or frames + step + PROGRAM <= 0.9 * free)
    there = PROGRAM + step + frames * held
    host = there if device.type == "cpu" else HOST_PROGRAM
    if say:
        parts = [f"about {there / GIB:.1f} GiB on {device}" + (f" of {free / GIB:.1f} free" if free is not None else "")]
        parts += [f"{host / GIB:.1f} GiB of RAM"] * (device.type != "cpu")
        kept = "stay there" if held else "are decoded as they are needed"
        print(f"memory: {', '.join(parts)}; {frames / GIB:.1f} GiB of frames {kept}", flush=True)
    if device.type != "cpu" and ram is not None and host > ram:
        raise UserError(f"training takes about {host / GIB:.1f} GiB of RAM, and {ram / GIB:.1f} GiB are free; close other programs")
    return held


@contextlib.contextmanager
def one_sentence_when_full(doing: str) -> Iterator[None]:
    """Turn running out of memory, on any device, into a UserError that names what to lower."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise UserError(f"memory ran out while {doing}; {REMEDY}") from error
    except RuntimeError as error:  # the CPU allocator of torch has no class of its own
        if "can't allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        raise UserError(f"memory ran out while {doing}; {REMEDY}") from error
