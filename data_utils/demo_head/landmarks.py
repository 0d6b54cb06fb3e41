"""Ground truth: the 68 landmarks (iBUG order) as points of the head, and the lip opening they give."""

from __future__ import annotations

import numpy as np

from data_utils.demo_head import face_shape as shape
from data_utils.demo_head.face_shape import EYE_HALF, EYE_X, EYE_Y, MOUTH_HALF
from data_utils.demo_head.mesh import HeadMesh

_JAW = [
    (80, 0.22),
    (79, 0.05),
    (77, -0.13),
    (74, -0.31),
    (68, -0.49),
    (56, -0.66),
    (40, -0.80),
    (21, -0.885),
    (0, -0.925),
]  # degrees, y
_BROW = [1.0, 0.91, 0.72, 0.45, 0.06]  # outer to inner
_UPPER_OUTER, _LOWER_OUTER, _INNER = (-0.180, -0.070, 0.0, 0.070, 0.180), (0.180, 0.085, 0.0, -0.085, -0.180), (-0.065, 0.0, 0.065)


class Landmarks:
    """`points(deformed, blink)` gives the (68, 3) landmarks of one frame in the head frame, decimetres."""

    def __init__(self, mesh: HeadMesh):
        azimuth = [np.radians(a) * side for side, row in ((-1, _JAW), (1, _JAW[-2::-1])) for a, _ in row]
        height = [y for row in (_JAW, _JAW[-2::-1]) for _, y in row]
        jaw = shape.skin_point(azimuth, height)
        s = np.array(_BROW)
        brow_x, brow_y = shape.BROW_X + shape.BROW_LENGTH * s, shape.brow_middle(s) + 0.015
        brows = self._front(np.concatenate([-brow_x, brow_x[::-1]]), np.concatenate([brow_y, brow_y[::-1]]))
        nose = self._front(
            np.array([0, 0, 0, 0, -0.125, -0.062, 0, 0.062, 0.125]),
            np.array([0.25, 0.11, -0.03, -0.165, -0.255, -0.275, -0.288, -0.275, -0.255]),
        )
        upper = self._front(np.array(_UPPER_OUTER), shape.lip_top(np.array(_UPPER_OUTER)))
        lower = self._front(np.array(_LOWER_OUTER), shape.lip_bottom(np.array(_LOWER_OUTER)))
        face = np.concatenate([jaw, brows, nose])
        skin = np.concatenate([np.arange(mesh.start[n], mesh.start[n] + np.prod(p.points.shape[:2]))
                               for n, p in ((p.name, p) for p in mesh.parts) if n.startswith("skin")])  # fmt: skip
        low = skin[skin >= mesh.start["skin_lower"]]

        def nearest(targets: np.ndarray, among: np.ndarray) -> np.ndarray:
            return among[((mesh.points[among][None] - targets[:, None]) ** 2).sum(-1).argmin(1)]

        def seam(row: np.ndarray, xs: tuple) -> np.ndarray:
            return row[np.abs(mesh.points[row, 0][None] - np.array(xs)[:, None]).argmin(1)]

        left, right = seam(mesh.upper_seam, (-MOUTH_HALF, MOUTH_HALF))
        self._vertex = np.concatenate([
            nearest(face, skin), np.zeros(12, int), [left], nearest(upper, skin), [right], nearest(lower, low),
            seam(mesh.upper_seam, (-0.92 * MOUTH_HALF, *_INNER, 0.92 * MOUTH_HALF)),
            seam(mesh.lower_seam, _INNER[::-1])])  # fmt: skip
        outer_to_inner = np.array([1, 0.4, -0.4, -1, -0.4, 0.4])
        self._along = np.concatenate([outer_to_inner, [-1, -0.4, 0.4, 1, 0.4, -0.4]])
        self._side = np.repeat([-1.0, 1.0], 6)
        self._is_upper = np.tile([True, True, True, True, False, False], 2)

    @staticmethod
    def _front(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return shape.skin_point(shape.chart(x, y), y)

    def points(self, deformed: np.ndarray, blink: float) -> np.ndarray:
        result = deformed[self._vertex].copy()
        up, down = shape.lids(self._along, blink)
        y = EYE_Y + np.where(self._is_upper, up, down)
        result[36:48] = self._front(self._side * (EYE_X + EYE_HALF * self._along), y)
        return result


def lip_opening(points: np.ndarray) -> np.ndarray:
    """Gap between the inner lips' middles (62, 66) over the distance of the outer eye corners (36, 45); (..., 68, 3) -> (...)."""
    return np.linalg.norm(points[..., 62, :] - points[..., 66, :], axis=-1) / np.linalg.norm(
        points[..., 36, :] - points[..., 45, :], axis=-1
    )
