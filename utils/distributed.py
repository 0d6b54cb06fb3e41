"""The processes that torchrun started, one a device: who this one is, and what they add up.

    torchrun --nproc_per_node=2 train.py -s data/x

Every process draws its share of the batch and steps on the mean of the gradients, so all hold the same head at any time; what
one process alone would do with the whole batch comes out, to float rounding. Without torchrun there is one process and
nothing here costs anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from utils.device import choose_device
from utils.errors import UserError


class Team:
    """All processes of one training run."""

    def __init__(self, device: str = "auto"):
        """Join the others; the device is --device, and with several processes the GPU of our own number."""
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.size > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        self.device = choose_device(device)
        if self.size > 1 and not dist.is_initialized():
            on_gpu = self.device.type == "cuda"
            dist.init_process_group("nccl" if on_gpu else "gloo", device_id=self.device if on_gpu else None)

    @property
    def leader(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.rank == 0

    def check_batch(self, coarse: int, fine: int) -> None:
        """Raises UserError if a batch cannot be shared out evenly."""
        if coarse % self.size or fine % self.size:
            raise UserError(f"{self.size} processes cannot share the {coarse} frames of a coarse step and the {fine} of a fine one "
                            f"evenly; make --batch_size a multiple of {4 * self.size}")  # fmt: skip

    def share(self, batch: Tensor) -> Tensor:
        """Our rows of a tensor whose second dimension is the batch: (n, B, ...) -> (n, B / size, ...)."""
        return batch.chunk(self.size, 1)[self.rank].contiguous() if self.size > 1 else batch

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its mean over the processes."""
        if self.size > 1:
            flat = torch.cat([t.detach().flatten() for t in tensors])
            dist.all_reduce(flat)
            flat /= self.size
            for t, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                t.detach().copy_(mean.view_as(t))

    def gather(self, tensors: Sequence[Tensor]) -> None:
        """Add up every tensor over the processes: the leader keeps the sum and the others nothing, so that it stays one."""
        for t in tensors if self.size > 1 else ():
            dist.all_reduce(t)
            if not self.leader:
                t.zero_()

    def share_out(self, tensors: Sequence[Tensor]) -> None:
        """Give every process what the leader has."""
        for t in tensors if self.size > 1 else ():
            dist.broadcast(t, 0)

    def wait(self) -> None:
        """Until all have come here."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """Part, all at once: one that ends while another is still at work has been seen to abort on its way out."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()


def batch_noise(x: Tensor) -> Tensor:
    """Gaussian noise of the shape of x (B, ...): drawn for the whole batch of all processes, of which x is our share."""
    return _our_share(x, lambda *shape: torch.randn(shape, dtype=x.dtype, device=x.device))


def batch_dropout(x: Tensor, p: float) -> Tensor:
    """Dropout of x, whose first dimension (or the outer part of it) is the batch."""
    return x * batch_kept(x, p) / (1 - p)


def batch_kept(x: Tensor, p: float) -> Tensor:
    """Mask of the shape of x, False with probability p: drawn for the whole batch of all processes, of which x is our share."""
    return _our_share(x, lambda *shape: torch.empty(shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p))


def _our_share(x: Tensor, draw: Callable[..., Tensor]) -> Tensor:
    """The rows of draw(size of the whole batch, ...) that belong to x, our part of it."""
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    return draw(size * len(x), *x.shape[1:])[rank * len(x) :][: len(x)]
