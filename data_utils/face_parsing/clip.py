"""The clip a parsing back end works on."""

from __future__ import annotations

import numpy as np

from data_utils.face_parsing.mesh import smooth_landmarks
from utils.dataset_folder import DatasetFolder
from utils.errors import UserError
from utils.image import read_rgb


class Clip:
    """Frames and face meshes of a data set.

    found (F,) bool; points (F, 478, 2) float32 pixels, the detector's jitter removed, NaN where no face.
    """

    def __init__(self, folder: DatasetFolder):
        self.folder = folder
        path = folder.require(folder.face_landmarks)
        with np.load(path, allow_pickle=False) as data:
            self.found, points = data["found"], data["points"]
        if not self.found.any():
            raise UserError(f"{path} has no frame with a face; use a video that shows one person's face")
        self.points = smooth_landmarks(np.where(self.found[:, None, None], points, np.nan))

    @property
    def ids(self) -> list[int]:
        """Frames with a face, ascending."""
        return np.flatnonzero(self.found).tolist()

    def frame(self, i: int) -> np.ndarray:
        return read_rgb(self.folder.frame(i))
