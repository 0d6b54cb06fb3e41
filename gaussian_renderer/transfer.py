"""Pictures on their way to the device and back while it draws: backdrops that stay there, frames that come down behind."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gaussian_renderer.paste import Backdrops

SHARE = 4  # a quarter of the free device memory may hold backdrops


class DeviceBackdrops:
    """Backdrops as uint8 on the device. A GPU keeps those it has seen while they fit, since poses run forth and back.

    `decode` runs on prefetch threads and reads only what is not held; `batch` runs where the drawing does. What is held stays,
    so whatever `decode` left out is there when its batch comes. A CPU keeps none: there the memory is the user's.
    """

    def __init__(self, backdrops: Backdrops, device: torch.device):
        self._backdrops, self._device = backdrops, device
        self._held: dict[int, Tensor] = {}
        self._budget = torch.cuda.mem_get_info(device)[0] // SHARE if device.type == "cuda" else 0

    def decode(self, ids: list[int]) -> tuple[list[int], Tensor | None]:
        """The ids of a batch that are not held, each once, and their pictures (n, H, W, 3 or 4) uint8 on the host."""
        missing = [i for i in dict.fromkeys(ids) if i not in self._held]
        if not missing:
            return [], None
        pictures = torch.from_numpy(self._backdrops.batch(missing))
        return missing, pictures.pin_memory() if self._device.type == "cuda" else pictures

    def batch(self, ids: list[int], decoded: tuple[list[int], Tensor | None]) -> Tensor:
        """(B, H, W, 3 or 4) uint8 on the device: the pictures of `ids`, of which decode(ids) brought some."""
        new, pictures = decoded
        if not new:
            return torch.stack([self._held[i] for i in ids])
        pictures = pictures.to(self._device, non_blocking=True)
        for i, picture in zip(new, pictures, strict=True):
            if i not in self._held and picture.nbytes <= self._budget:
                self._held[i] = picture.clone()
                self._budget -= picture.nbytes
        if new == ids:
            return pictures
        own = dict(zip(new, pictures, strict=True))
        return torch.stack([own[i] if i in own else self._held[i] for i in ids])


class Download:
    """Tensors on their way to the host, while the device goes on; on a CPU they are there already."""

    def __init__(self, *tensors: Tensor):
        self._event = None
        self._tensors = [self._send(x) for x in tensors]

    def _send(self, x: Tensor) -> Tensor:
        if x.device.type != "cuda":
            return x
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        host.copy_(x, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()
        return host

    def arrays(self) -> list[np.ndarray]:
        """What arrived, once it has."""
        if self._event is not None:
            self._event.synchronize()
        return [x.numpy() for x in self._tensors]
