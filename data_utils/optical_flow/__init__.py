"""Optical flow behind one interface: a back end has `name`, `batch`, `available()`, `load(device)`, `flows(sources, targets)`."""

from __future__ import annotations

import threading

import cv2
import numpy as np

from data_utils.optical_flow.raft import RaftFlow
from utils.errors import UserError


class DenseInverseSearch:
    """OpenCV's DIS flow (Kroeger et al. 2016), the embedded default; runs on the CPU and may be called by several threads."""

    name, batch = "dis", 1  # pairs it wants at once

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def available(self) -> bool:
        return True

    def load(self, device: str = "cpu") -> DenseInverseSearch:
        return self

    def flows(self, sources: list[np.ndarray], targets: list[np.ndarray]) -> np.ndarray:
        """Pairs of (H, W, 3) uint8 RGB pictures of one size -> (B, H, W, 2) float32, pixel p of a source lies at p + flow(p)."""
        if not hasattr(self._of_thread, "dis"):
            self._of_thread.dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        pairs = (cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for pair in zip(sources, targets, strict=True) for picture in pair)
        return np.stack([self._of_thread.dis.calc(source, target, None) for source, target in zip(pairs, pairs, strict=True)])


BACKENDS = {backend.name: backend for backend in (
    RaftFlow("raft", "raft_small"),
    RaftFlow("unfaceflow", "unfaceflow", side=(240, 320)),
    DenseInverseSearch(),
)}  # best last: RAFT's maps at 1/8 miss known sub-pixel shifts by 0.11 px where DIS misses them by 0.06  # fmt: skip


def load_flow(name: str = "auto", device: str = "cpu") -> DenseInverseSearch | RaftFlow:
    """The flow of a back end, ready to run; "auto" takes the best one that is available."""
    if name == "auto":
        name = next(n for n in reversed(BACKENDS) if BACKENDS[n].available())
    if name not in BACKENDS:
        raise UserError(f"there is no optical flow {name!r}; choose one of: auto, {', '.join(BACKENDS)}")
    if not BACKENDS[name].available():
        raise UserError(f"--flow {name} cannot run: {BACKENDS[name].needs}; or use --flow auto")
    return BACKENDS[name].load(device)
