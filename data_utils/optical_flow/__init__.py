"""Optical flow behind one interface: a back end has `name`, `available()` and is called with two pictures."""

from __future__ import annotations

import threading

import cv2
import numpy as np

from utils.errors import UserError


class DenseInverseSearch:
    """OpenCV's DIS flow (Kroeger et al. 2016), the embedded default; runs on the CPU and may be called by several threads."""

    name = "dis"

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def available(self) -> bool:
        return True

    def __call__(self, source: np.ndarray, target: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 RGB pictures -> (H, W, 2) float32: pixel p of `source` is found at p + flow(p) in `target`."""
        if not hasattr(self._of_thread, "dis"):
            self._of_thread.dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        return self._of_thread.dis.calc(cv2.cvtColor(source, cv2.COLOR_RGB2GRAY), cv2.cvtColor(target, cv2.COLOR_RGB2GRAY), None)


BACKENDS = {backend.name: backend for backend in (DenseInverseSearch(),)}  # best last


def load_flow(name: str = "auto") -> DenseInverseSearch:
    """The flow of a back end; "auto" takes the best one that is available."""
    if name == "auto":
        name = next(n for n in reversed(BACKENDS) if BACKENDS[n].available())
    if name not in BACKENDS:
        raise UserError(f"there is no optical flow {name!r}; choose one of: auto, {', '.join(BACKENDS)}")
    return BACKENDS[name]
