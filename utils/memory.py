"""How much memory a training run will take, said before it is taken, and one sentence when there is not enough."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from utils.device import runs_triton
from utils.errors import UserError

GIB = 1 << 30
PROGRAM = GIB // 2  # bytes of torch, the model and its optimizer
HOST_PROGRAM = 2 * GIB  # RAM of a process that trains on a GPU: CUDA itself, and frames on their way
HOST_CACHE = 2 * GIB  # frames kept in RAM at most
# bytes a pixel that the perceptual distance keeps for its gradient: all storages that autograd saves (saved_tensors_hooks, weights
# left out, one picture of 144 x 144 or more), in plain torch at float32, and at bfloat16 with pools and distance as kernels
PERCEPTUAL = {"alex": (370, 80), "vgg": (4100, 860)}
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# below CGROUPS, by version: where they lie; limit, what is taken, and the line of memory.stat for what the kernel can give back
CGROUP_FILES = {2: (".", "memory.max", "memory.current", "inactive_file"),
                1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}  # fmt: skip
REMEDY = "lower --batch_size or --max_points, or process the clip again at a smaller --size"


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on the device: of a GPU what it and our cache have free, else RAM; None where it is unknown."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return min((free for free in (_machine_memory(), _cgroup_memory()) if free is not None), default=None)


def _machine_memory() -> int | None:
    try:
        with open("/proc/meminfo") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # macOS tells no more
    except (AttributeError, ValueError, OSError):
        return None


def _cgroup_memory() -> int | None:
    """What a container or the job of a cluster leaves of its limit, which /proc/meminfo does not show; None where there is none."""
    free = []
    for line in OWN_CGROUPS.read_text().splitlines() if OWN_CGROUPS.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        place, limit, taken, cache = CGROUP_FILES[1 if controllers else 2]
        own = CGROUPS / place / path.lstrip("/")
        for folder in (own, *own.parents):  # a limit holds for all below it; a container sees its own at the top
            files = [folder / name for name in (limit, taken, "memory.stat")]
            if folder.is_relative_to(CGROUPS) and all(file.exists() for file in files) and files[0].read_text() != "max\n":
                stat = dict(pair.split() for pair in files[2].read_text().splitlines())
                free.append(max(int(files[0].read_text()) - int(files[1].read_text()) + int(stat[cache]), 0))
    return min(free, default=None)


def step_bytes(config, batch_size: int, pixels: int, device: torch.device) -> int:
    """About what one fine step takes above the data: activations of the network, and the pictures with their losses.

    Fitted to peaks of plain torch, which keeps every activation (within a fifth), and of the fused network, which keeps few.
    """
    width = config.plane_channels * len(config.plane_multires)
    a_surfel = 4 * (3 * width + 2.5 * (len(config.deform) * config.net_width + config.layers * config.ffn_hidden))
    if runs_triton(device) and config.layers == 1 and config.dropout == 0:
        a_surfel = 1200
    compared = sum(pixels if name == "window" else config.perceptual_side**2 for name in config.perceptual_on)
    kind, _, net = config.perceptual_net.rpartition("_")  # LPIPS has the same layers and larger strides, and stays in plain torch
    perceptual = compared * PERCEPTUAL[net][runs_triton(device) and not kind] if config.lambda_perceptual else 0
    return int(batch_size * (config.max_points * a_surfel + pixels * 250 + perceptual))


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
def one_sentence_when_full(doing: str, remedy: str = REMEDY) -> Iterator[None]:
    """Turn running out of memory, on any device, into a UserError that names what to lower."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise UserError(f"memory ran out while {doing}; {remedy}") from error
    except RuntimeError as error:  # the CPU allocator of torch has no class of its own
        if "can't allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        raise UserError(f"memory ran out while {doing}; {remedy}") from error
