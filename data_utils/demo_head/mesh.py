"""The head as a set of grids, how speech deforms it, and how neck and torso hang on it.

Every part is a (rows, columns) grid of points with texture coordinates in one atlas (layout: ATLAS, in decimetres of
texture). The skin is two grids that meet at the line of the lips, so that the mouth is a real opening with teeth behind it.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from data_utils.demo_head import face_shape as shape
from data_utils.demo_head.face_shape import AXIS_Z, AZIMUTH, BOTTOM, MOUTH_HALF, MOUTH_Y, TOP, smoothstep

# name: (left, top, width, height) of its texture in the atlas; the skin's is the chart (azimuth, y) itself
ATLAS_WIDTH, ATLAS_HEIGHT = 2 * AZIMUTH, 5.45
ATLAS = {
    "skin": (0.0, 0.0, 2 * AZIMUTH, TOP - BOTTOM),
    "torso": (0.0, 3.30, 4.4, 1.30),
    "ear": (0.0, 4.65, 0.60, 0.80),
    "upper_teeth": (0.70, 4.65, 0.70, 0.35),
    "lower_teeth": (0.70, 5.05, 0.70, 0.35),
    "cavity": (1.50, 4.65, 0.70, 0.70),
    "tongue": (2.30, 4.65, 0.50, 0.50),
    "inner_upper": (2.90, 4.65, 0.60, 0.30),
    "inner_lower": (2.90, 5.05, 0.60, 0.30),
}
SHAPES = ("jaw", "wide", "round", "press", "raise", "lower", "tuck")  # articulation, in the order of its last axis
JAW_ANGLE = 0.19  # radians at jaw = 1
NECK_LINE = (-0.98, -1.55)  # the neck follows the head above, the torso below


@dataclasses.dataclass
class Part:
    """A grid of points. Row 0 is its top, column 0 its left as the camera sees it (so that triangles face the camera)."""

    name: str
    points: np.ndarray  # (rows, columns, 3) neutral, head frame
    uv: np.ndarray  # (rows, columns, 2) in [0, 1] of its texture
    jaw: np.ndarray | float = 0.0  # (rows, columns) share of the jaw's rotation
    upper: bool | None = None  # which lip's side of the mouth line a skin grid is
    on_torso: bool = False


def _rows() -> tuple[np.ndarray, np.ndarray]:
    """Heights of the skin's grid rows over and under the mouth line (which ends the first and begins the second)."""
    crown = TOP - 0.62 * np.linspace(0.004, 1, 30) ** 2
    upper = [crown, np.arange(0.66, 0.36, -0.022), np.arange(0.345, -0.10, -0.015), np.arange(-0.11, -0.34, -0.009),
             np.arange(-0.345, -0.445, -0.012), np.linspace(-0.45, MOUTH_Y, 13)]  # fmt: skip
    lower = [np.linspace(MOUTH_Y, -0.61, 22), np.arange(-0.622, -0.84, -0.016), np.arange(-0.85, -1.12, -0.011),
             np.linspace(-1.14, BOTTOM, 26)]  # fmt: skip
    return np.concatenate(upper), np.concatenate(lower)


def _columns() -> np.ndarray:
    half = np.concatenate(
        [np.arange(0, 0.30, 0.0165), np.arange(0.30, 0.62, 0.021), np.arange(0.63, 1.7, 0.030), np.linspace(1.72, AZIMUTH, 10)]
    )
    return np.concatenate([-half[:0:-1], half])


def hair_thickness(azimuth: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Decimetres of hair over the skin: thick on the crown, thin at the temples, nothing in front of the hairline."""
    over = y - shape.hairline(azimuth)
    full = 0.045 + 0.115 * smoothstep(0.25, 1.05, y)
    swept = 1 + 0.28 * smoothstep(0.35, -0.45, azimuth) * smoothstep(0.75, 1.0, y)  # combed over from the parting
    clumps = 1 + 0.10 * np.sin(17 * azimuth + 5 * y) * np.sin(7 * azimuth - 9 * y) + 0.06 * np.sin(31 * azimuth - 6 * y)
    return full * swept * clumps * smoothstep(-0.03, 0.26, over)


def _skin() -> list[Part]:
    upper, lower = _rows()
    azimuth = _columns()
    parts = []
    for name, rows, is_upper in (("skin_upper", upper, True), ("skin_lower", lower, False)):
        a, y = np.meshgrid(azimuth, rows)
        points = shape.skin_point(a, y)
        out = np.stack([np.sin(a), 0.9 * smoothstep(0.4, 1.2, y), np.cos(a)], -1)
        points = points + hair_thickness(a, y)[..., None] * out / np.linalg.norm(out, axis=-1, keepdims=True)
        uv = np.stack([a / (2 * AZIMUTH) + 0.5, (TOP - y) / (TOP - BOTTOM)], -1)
        parts.append(Part(name, points, uv, jaw_share(points, is_upper), is_upper))
    # the inside of the lips rolls back from the mouth line
    seam = parts[1].points[0]
    inside = np.flatnonzero(np.abs(seam[:, 0]) <= MOUTH_HALF + 1e-6)
    line = seam[inside]
    roll = 1 - (line[:, 0] / MOUTH_HALF) ** 2
    steps = np.linspace(0, 1, 6)[:, None]
    for name, sign in (("inner_upper", 1.0), ("inner_lower", -1.0)):
        points = np.repeat(line[None], 6, 0)
        points[..., 2] -= 0.30 * steps
        points[..., 1] += sign * (0.10 * roll + 0.01) * steps**1.3
        u = np.broadcast_to(line[:, 0] / 0.6 + 0.5, points.shape[:2])
        v = np.broadcast_to(steps, points.shape[:2])
        points, uv, edge = points, np.stack([u, v], -1), jaw_share(line, sign > 0)
        if sign > 0:  # the top row must be the upper one, so that the grid faces the camera
            points, uv = points[::-1], uv[::-1]
        parts.append(Part(name, points, uv, np.broadcast_to(edge, points.shape[:2]), sign > 0))
    return parts


def jaw_share(points: np.ndarray, upper: bool) -> np.ndarray:
    """How much of the jaw's rotation skin points (..., 3) follow, on the upper or the lower lip's side of the mouth line."""
    x, y, z = np.moveaxis(points, -1, 0)
    side = smoothstep(-0.24, -0.86, y) * smoothstep(-0.15, 0.45, z)
    s = np.clip(np.abs(x) / MOUTH_HALF, 0, 1)
    lip = (1 - s**2.4) ** 0.75
    reach = np.exp(-(((y - MOUTH_Y) / 0.30) ** 2))
    share = side + lip * reach * ((0.0 if upper else 1.0) - side)
    if not upper:
        share = np.maximum(share, smoothstep(-0.62, -0.80, y) * smoothstep(0.62, 0.30, np.abs(x)) * smoothstep(0.1, 0.6, z))
    return share * smoothstep(-1.30, -0.98, y)


def _curved_strip(
    name: str, depth: float, half: float, y_top: float, y_bottom: float, bend: float, jaw: float, shrink: float = 0.0
) -> Part:
    """A strip behind the lips that bends back to both sides (teeth)."""
    s, t = np.meshgrid(np.linspace(-1, 1, 41), np.linspace(0, 1, 9))
    y = y_top + (y_bottom - y_top) * t + shrink * s**2 * t
    points = np.stack([half * np.sin(s * 1.25) / np.sin(1.25), y, depth - bend * s**2 - 0.02 * (2 * t - 1) ** 2], -1)
    return Part(name, points, np.stack([(s + 1) / 2, t], -1), jaw)


def _mouth() -> list[Part]:
    s, t = np.meshgrid(np.linspace(-1, 1, 25), np.linspace(-1, 1, 25))
    rim = np.maximum(s**2, t**2)
    hollow = np.stack(
        [0.38 * s * (1 - 0.35 * t**2), MOUTH_Y - 0.02 - 0.22 * t, 0.80 - 0.42 * (1 - rim) - 0.20 * s**2 - 0.05 * t**2], -1
    )
    cavity = Part("cavity", hollow, np.stack([(s + 1) / 2, (t + 1) / 2], -1), smoothstep(-0.6, 0.8, t))
    s, t = np.meshgrid(np.linspace(-1, 1, 21), np.linspace(0, 1, 17))
    broad = 0.175 * s * np.sqrt(1 - 0.8 * (t - 0.35) ** 2)
    high = (
        -0.575 - 0.07 * s**2 - 0.014 * np.exp(-((s / 0.2) ** 2)) - 0.18 * np.clip(t - 0.45, 0, 1) ** 1.2
    )  # a groove, a falling tip
    tongue_points = np.stack([broad, high, 0.42 + 0.42 * np.sin(t * np.pi / 2)], -1)
    tongue = Part("tongue", tongue_points, np.stack([(s + 1) / 2, t], -1), 0.9)
    return [
        cavity,
        tongue,
        _curved_strip("upper_teeth", 0.905, 0.235, MOUTH_Y + 0.16, MOUTH_Y - 0.028, 0.20, 0.0, 0.020),
        _curved_strip("lower_teeth", 0.880, 0.205, MOUTH_Y - 0.018, MOUTH_Y - 0.16, 0.20, 1.0),
    ]


EAR_ROOT, EAR_TILT = np.array([0.690, 0.085, -0.02]), 0.62  # where the right-hand ear meets the head; its angle to the head's side


def ear_relief(a: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Relief of the ear over its plane; a backwards 0..0.34, t upwards -0.3..0.3."""
    angle, far = np.arctan2(t, a - 0.10), np.hypot((a - 0.10) / 0.20, t / 0.29)
    helix = 0.030 * np.exp(-(((far - 0.86) / 0.10) ** 2)) * smoothstep(-1.5, -0.6, np.sin(angle) + 0.3)
    inner = 0.020 * np.exp(-(((np.hypot((a - 0.08) / 0.12, (t - 0.02) / 0.17) - 0.90) / 0.20) ** 2))
    bowl = -0.055 * np.exp(-(((a - 0.06) / 0.065) ** 2) - ((t + 0.02) / 0.10) ** 2)
    tragus = 0.030 * np.exp(-(((a + 0.005) / 0.025) ** 2) - ((t + 0.03) / 0.04) ** 2)
    return helix + inner + bowl + tragus


def _ears() -> list[Part]:
    angle, far = np.meshgrid(np.linspace(0, 2 * np.pi, 49), np.linspace(0.02, 1, 21))
    c, s = np.cos(angle), np.sin(angle)
    reach_a = np.where(c > 0, 0.205 - 0.055 * smoothstep(0.0, -1.0, s), 0.14 - 0.04 * np.abs(s))
    a, t = 0.09 + far * reach_a * c, far * (0.285 + 0.02 * s) * s
    along, out = np.array([np.sin(EAR_TILT), 0.0, -np.cos(EAR_TILT)]), np.array([np.cos(EAR_TILT), 0.0, np.sin(EAR_TILT)])
    points = (
        EAR_ROOT
        + a[..., None] * along
        + t[..., None] * np.array([-0.05, 1.0, -0.12])
        + (ear_relief(a, t) - 0.10 * far**6 * 0.3)[..., None] * out
    )
    uv = np.stack([(a + 0.1) / 0.6, 0.5 - t / 0.8], -1)
    mirror = points * np.array([-1.0, 1.0, 1.0])
    return [Part("right_ear", points, uv), Part("left_ear", mirror[:, ::-1], uv[:, ::-1])]


def _torso() -> list[Part]:
    from scipy.interpolate import PchipInterpolator

    y = np.concatenate([[-1.50, -1.43, -1.405, -1.40, -1.412, -1.435], np.linspace(-1.46, -2.9, 44)])
    grow = np.array([-0.10, -0.06, -0.03, 0.0, 0.022, 0.03])
    knots = [-2.9, -2.3, -2.05, -1.90, -1.80, -1.70, -1.60, -1.52, -1.46]
    width = PchipInterpolator(knots, [2.05, 2.10, 2.02, 1.85, 1.62, 1.25, 0.93, 0.74, 0.655])
    front = PchipInterpolator(knots, [0.85, 0.78, 0.70, 0.63, 0.58, 0.53, 0.47, 0.44, 0.42])
    w = np.concatenate([0.62 + grow, width(y[6:])])
    f = np.concatenate([0.385 + grow, front(y[6:])])
    theta = np.linspace(-1.75, 1.75, 121)
    a, rows = np.meshgrid(theta, np.arange(len(y)))
    wide, deep = w[rows], f[rows] - AXIS_Z
    x = wide * np.sin(a)
    # the neckline dips in front and climbs towards the nape
    dip = 0.09 * np.cos(a) * smoothstep(-2.0, -1.45, y[rows])
    fold = 0.012 * np.sin(9 * x + 4 * y[rows]) * smoothstep(-1.55, -1.9, y[rows])
    points = np.stack([x, y[rows] - dip, AXIS_Z - 0.10 + deep * np.cos(a) + fold], -1)
    uv = np.stack([(a + 1.75) / 3.5, rows / (len(y) - 1)], -1)
    return [Part("torso", points, uv, on_torso=True)]


class HeadMesh:
    """All parts in flat arrays, and what an articulation does to them.

    points (V, 3) neutral; uv (V, 2) in decimetres of the atlas; triangles (T, 3); part_of (T,) index into `parts`.
    """

    def __init__(self) -> None:
        self.parts = _skin() + _mouth() + _ears() + _torso()
        self.start, flat, triangles, part_of = {}, 0, [], []
        for index, part in enumerate(self.parts):
            self.start[part.name] = flat
            rows, columns = part.points.shape[:2]
            ids = flat + np.arange(rows * columns).reshape(rows, columns)
            a, b, c, d = ids[:-1, :-1].ravel(), ids[:-1, 1:].ravel(), ids[1:, :-1].ravel(), ids[1:, 1:].ravel()
            triangles.append(np.stack([np.stack([a, c, b], 1), np.stack([b, c, d], 1)], 1).reshape(-1, 3))
            part_of.append(np.full(len(triangles[-1]), index, np.uint8))
            flat += rows * columns
        self.triangles = np.concatenate(triangles).astype(np.int32)
        self.part_of = np.concatenate(part_of)
        self.points = np.concatenate([p.points.reshape(-1, 3) for p in self.parts])
        self.uv = np.concatenate([self._atlas_uv(p).reshape(-1, 2) for p in self.parts]).astype(np.float32)
        self.on_torso = np.concatenate([np.full(p.points.shape[0] * p.points.shape[1], p.on_torso) for p in self.parts])
        self.jaw = np.concatenate([np.broadcast_to(p.jaw, p.points.shape[:2]).ravel() for p in self.parts])
        self.basis = np.stack([np.concatenate([self._shape(p, name).reshape(-1, 3) for p in self.parts]) for name in SHAPES[1:]])
        self._used = np.flatnonzero((np.abs(self.basis).max((0, 2)) > 1e-6) | (self.jaw > 1e-6))
        follow = smoothstep(NECK_LINE[0], NECK_LINE[1], self.points[:, 1])
        self.torso_share = np.where(self.on_torso, 1.0, follow)[:, None]
        mid = self.parts[0].points.shape[1] // 2
        rows, columns = self.parts[0].points.shape[:2]
        self.upper_seam = self.start["skin_upper"] + (rows - 1) * columns + np.arange(columns)
        self.lower_seam = self.start["skin_lower"] + np.arange(columns)
        self.middle = mid

    @staticmethod
    def _atlas_uv(part: Part) -> np.ndarray:
        name = {"skin_upper": "skin", "skin_lower": "skin", "right_ear": "ear", "left_ear": "ear"}.get(part.name, part.name)
        left, top, width, height = ATLAS[name]
        return np.array([left, top]) + part.uv * np.array([width, height])

    @staticmethod
    def _shape(part: Part, name: str) -> np.ndarray:
        """(rows, columns, 3) offset of one speech shape at full strength (lips and what surrounds them)."""
        offset = np.zeros_like(part.points)
        if part.upper is None:
            return offset
        x, y, _ = np.moveaxis(part.points, -1, 0)
        s = np.clip(np.abs(x) / MOUTH_HALF, 0, 1)
        body = (1 - s**2.2) ** 0.8
        around = np.exp(-((np.abs(x) / 0.44) ** 4) - (np.abs((y - MOUTH_Y) / 0.22) ** 2)) * smoothstep(-0.24, -0.42, y)
        near = np.exp(-(((y - MOUTH_Y) / 0.13) ** 2)) * smoothstep(-0.27, -0.38, y)
        up = bool(part.upper)
        if name == "wide":  # the corners draw apart and back, the lips thin
            corner = np.exp(-(((np.abs(x) - MOUTH_HALF) / 0.20) ** 2))
            offset[..., 0] = np.sign(x) * 0.062 * around * np.minimum(s * 1.1, 1) * (0.4 + 0.6 * corner)
            offset[..., 1] = 0.016 * around * corner - 0.10 * (y - MOUTH_Y) * near * body
            offset[..., 2] = -0.035 * around * s**2
        elif name == "round":  # the corners draw together, the lips come forward
            offset[..., 0] = -0.38 * x * around
            offset[..., 2] = 0.085 * around * np.exp(-((np.abs(x) / 0.26) ** 2)) + 0.02 * around
            offset[..., 1] = (0.010 if up else -0.018) * near * body
        elif name == "press":  # the red rolls in towards the mouth line
            offset[..., 1] = (
                -0.34 * (y - MOUTH_Y) * np.exp(-(((y - MOUTH_Y) / 0.11) ** 2)) * smoothstep(1.25, 0.6, np.abs(x) / MOUTH_HALF)
            )
            offset[..., 2] = -0.022 * near * body
        elif name == "raise" and up:
            offset[..., 1] = 0.060 * near * body
        elif name == "lower" and not up:
            offset[..., 1] = -0.060 * near * body
        elif name == "tuck" and not up:  # lower lip under the upper teeth
            offset[..., 1] = 0.040 * near * body
            offset[..., 2] = -0.050 * near * body
        return offset

    def deform(self, articulation: np.ndarray) -> np.ndarray:
        """(V, 3) points, head frame, for one articulation (7,) in the order of SHAPES, each 0..1."""
        points = self.points.copy()
        used = self._used
        moved = points[used] + np.tensordot(articulation[1:], self.basis[:, used], 1)
        angle = JAW_ANGLE * articulation[0] * self.jaw[used]
        c, s = np.cos(angle), np.sin(angle)
        y, z = (moved - shape.JAW_HINGE)[:, 1], (moved - shape.JAW_HINGE)[:, 2]
        moved[:, 1], moved[:, 2] = shape.JAW_HINGE[1] + c * y - s * z, shape.JAW_HINGE[2] + s * y + c * z
        points[used] = moved
        # lips touch, they do not pass through each other
        up, low = points[self.upper_seam], points[self.lower_seam]
        cross = np.minimum(up[:, 1] - low[:, 1], 0.0) / 2
        if (cross < 0).any():
            points[self.upper_seam, 1] -= cross
            points[self.lower_seam, 1] += cross
        return points

    def normals(self, points: np.ndarray) -> np.ndarray:
        """(V, 3) unit normals of deformed points, from each grid's tangents; smooth across the skin's own seam."""
        result = np.empty_like(points)
        for part in self.parts:
            rows, columns = part.points.shape[:2]
            at = slice(self.start[part.name], self.start[part.name] + rows * columns)
            grid = points[at].reshape(rows, columns, 3)
            across, down = np.empty_like(grid), np.empty_like(grid)
            across[:, 1:-1], across[:, 0], across[:, -1] = (
                grid[:, 2:] - grid[:, :-2],
                grid[:, 1] - grid[:, 0],
                grid[:, -1] - grid[:, -2],
            )
            down[1:-1], down[0], down[-1] = grid[2:] - grid[:-2], grid[1] - grid[0], grid[-1] - grid[-2]
            result[at] = _cross(down, across).reshape(-1, 3)
        gone = np.abs(self.points[self.lower_seam, 0]) > MOUTH_HALF * 0.97
        above, below = self.upper_seam[gone], self.lower_seam[gone]
        result[above] = result[below] = result[above] + result[below]
        return result / np.maximum(np.sqrt(np.einsum("ij,ij->i", result, result)), 1e-12)[:, None]


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    ax, ay, az = np.moveaxis(a, -1, 0)
    bx, by, bz = np.moveaxis(b, -1, 0)
    return np.stack([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx], -1)
