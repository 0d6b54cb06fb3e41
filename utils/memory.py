"""How much memory a training run will take, said before it is taken, and one sentence when there is not enough."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from utils.errors import UserError

GIB = 1 << 30
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
