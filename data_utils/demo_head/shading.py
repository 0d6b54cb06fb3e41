"""One picture of the head: light on the grids, colour from the atlas, eyes and lids drawn into the sockets."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np

from data_utils.demo_head import face_shape as shape
from data_utils.demo_head.face_shape import EYE_HALF, EYE_X, EYE_Y, smoothstep
from data_utils.demo_head.mesh import HeadMesh
from data_utils.demo_head.paint import LEFT_EAR, RIGHT_EAR, backdrop, paint
from data_utils.demo_head.raster import rasterize
from utils.constants import CLASS_NAMES

SUPERSAMPLE = 2
LEFT_EYE, RIGHT_EYE = CLASS_NAMES.index("left_eye"), CLASS_NAMES.index("right_eye")
IRIS, PUPIL = 0.060, 0.026
# direction to the light (camera axes, y up, z to the camera), colour
LIGHTS = (((-0.48, 0.50, 0.75), (0.98, 0.93, 0.86)), ((0.85, 0.10, 0.50), (0.20, 0.23, 0.28)))
SKY, GROUND = np.array([0.25, 0.26, 0.28]), np.array([0.185, 0.145, 0.13])
WRAP = np.array([0.34, 0.22, 0.17])  # light bleeding round the shadow's edge, most in the red
_LINEAR = ((np.arange(256) / 255.0) ** 2).astype(np.float32)  # a gamma of 2: decoding is a table, encoding a square root


@dataclasses.dataclass
class Pose:
    """Where the head, the torso and the eyes are in one frame (camera axes of utils/pose.py, decimetres)."""

    rotation: np.ndarray  # (3, 3) head
    translation: np.ndarray  # (3,)
    torso_rotation: np.ndarray
    torso_translation: np.ndarray
    blink: float  # 0 open .. 1 closed
    gaze: np.ndarray  # (2,) shift of the irises on the eyeball, dm


class HeadRenderer:
    """Renders the head for square frames of `size` pixels and the given focal length; deterministic for a seed."""

    def __init__(self, size: int, focal: float, seed: int = 0, distance: float = 8.3):
        self.mesh = HeadMesh()
        self.size, self.focal = size, focal
        self.side = size * SUPERSAMPLE
        self.density = min(1.15 * focal * SUPERSAMPLE / distance, 260.0)
        self.colours, self.classes = paint(seed, self.density)
        self.background = backdrop(seed, size, size)
        self._plate = cv2.resize(self.background, (self.side, self.side), interpolation=cv2.INTER_NEAREST).reshape(-1, 3)
        names = [p.name for p in self.mesh.parts]
        self._right_ear = names.index("left_ear")  # the subject's right ear lies on the viewer's left
        self._is_skin = np.isin(np.arange(len(names)), [names.index("skin_upper"), names.index("skin_lower")])
        self._set_materials()
        corners = self.mesh.points[self.mesh.triangles]
        x, y, z = np.moveaxis(corners.mean(1), -1, 0)
        near = (np.abs(np.abs(x) - EYE_X) < 0.23) & (np.abs(y - EYE_Y) < 0.16) & (z > 0.3)
        self._eye_triangle = near & self._is_skin[self.mesh.part_of]

    def _set_materials(self) -> None:
        """Per vertex: gloss, and how much of the light reaches it."""
        mesh = self.mesh
        part = np.concatenate([np.full(p.points.shape[0] * p.points.shape[1], i) for i, p in enumerate(mesh.parts)])
        name = np.array([p.name for p in mesh.parts])[part]
        x, y, z = mesh.points.T
        skin = np.char.startswith(name, "skin")
        azimuth = np.arctan2(x, z - shape.AXIS_Z)
        hair = skin & (y > shape.hairline(azimuth))
        lips = skin & (np.abs(x) < 0.25) & (y < shape.lip_top(x)) & (y > shape.lip_bottom(x)) & (z > 0.5)
        oily = 0.6 + 0.8 * (shape.bump(x, y, 0, -0.1, 0.14, 0.3) + shape.bump(x, y, 0, 0.65, 0.4, 0.2))
        self._gloss = np.where(lips, 2.2, np.where(hair, 0.55, np.where(skin, oily, 0.15)))
        self._gloss[np.char.find(name, "teeth") >= 0] = 2.0
        self._gloss[name == "tongue"] = 1.5
        self._open = np.ones(len(x))
        inside = np.isin(name, ["cavity", "tongue", "upper_teeth", "lower_teeth"])
        self._open[inside] = smoothstep(0.30, 1.05, z[inside]) * 0.95
        self._open[np.char.startswith(name, "inner")] = smoothstep(0.66, 0.97, z[np.char.startswith(name, "inner")]) * 0.9
        self._mouth = inside

    def render(self, pose: Pose, articulation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """((size, size, 3) uint8 RGB, (size, size) uint8 CelebAMask classes)."""
        mesh, side = self.mesh, self.side
        neutral = mesh.deform(articulation)
        camera, rotated = self.to_camera(neutral, pose, mesh.normals(neutral))
        light, gloss = self._light(rotated, camera, articulation)
        depth = -camera[:, 2]
        scale = self.focal * SUPERSAMPLE
        flat = np.stack([side / 2 + scale * camera[:, 0] / depth, side / 2 - scale * camera[:, 1] / depth], 1).astype(np.float32)
        pixel, triangle, weight = rasterize(flat, depth.astype(np.float32), mesh.triangles, side, side)
        values = np.concatenate([mesh.uv * self.density - 0.5, light, gloss[:, None]], 1).astype(np.float32)
        corner = mesh.triangles[triangle]
        mixed = values[corner[:, 0]] * weight[:, :1]
        mixed += values[corner[:, 1]] * weight[:, 1:2]
        mixed += values[corner[:, 2]] * weight[:, 2:]
        u, v = np.zeros((2, side * side), np.float32)
        u[pixel], v[pixel] = mixed[:, 0], mixed[:, 1]
        colour = cv2.remap(self.colours, u.reshape(side, side), v.reshape(side, side), cv2.INTER_LINEAR).reshape(-1, 3)[pixel]
        label = self.classes[(mixed[:, 1] + 0.5).astype(np.int32), (mixed[:, 0] + 0.5).astype(np.int32)]
        label[(label == LEFT_EAR) & (mesh.part_of[triangle] == self._right_ear)] = RIGHT_EAR
        albedo = _LINEAR[colour]
        gloss = mixed[:, 5]
        eyes = np.flatnonzero(self._eye_triangle[triangle])
        if len(eyes):
            at = mesh.points[corner[eyes]]
            at = (at * weight[eyes, :, None]).sum(1)
            self._draw_eyes(at, pose, albedo, gloss, label, eyes)
        shaded = np.sqrt(np.clip(albedo * mixed[:, 2:5] + 0.055 * gloss[:, None], 0, 1)) * 255
        picture = self._plate.astype(np.float32)
        picture[pixel] = shaded
        picture = cv2.resize(picture.reshape(side, side, 3), (self.size, self.size), interpolation=cv2.INTER_AREA)
        covered = np.zeros(side * side, np.uint8)
        covered[pixel] = label
        half = SUPERSAMPLE // 2
        return np.rint(picture).astype(np.uint8), np.ascontiguousarray(
            covered.reshape(side, side)[half::SUPERSAMPLE, half::SUPERSAMPLE]
        )

    def to_camera(self, points: np.ndarray, pose: Pose, normals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Camera coordinates of (V, 3) head-frame points of the whole mesh, and their turned normals."""
        share = self.mesh.torso_share
        moved = points @ pose.rotation.T + pose.translation
        turned = normals @ pose.rotation.T
        below = share[:, 0] > 0
        s = share[below]
        moved[below] += s * (points[below] @ pose.torso_rotation.T + pose.torso_translation - moved[below])
        turned[below] += s * (normals[below] @ pose.torso_rotation.T - turned[below])
        return moved, turned

    def _light(self, normal: np.ndarray, camera: np.ndarray, articulation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        normal, camera = normal.astype(np.float32), camera.astype(np.float32)
        sky = (0.5 + 0.5 * normal[:, 1:2]).astype(np.float32)
        light = (GROUND + (SKY - GROUND) * sky).astype(np.float32)
        view = -camera / np.sqrt(np.einsum("ij,ij->i", camera, camera))[:, None]
        gloss = np.zeros(len(normal), np.float32)
        for direction, tone in LIGHTS:
            direction = np.asarray(direction, np.float32) / np.float32(np.linalg.norm(direction))
            facing = (normal @ direction)[:, None]
            light += (np.clip((facing + WRAP) / (1 + WRAP), 0, None) * tone).astype(np.float32)
            half = view + direction
            half /= np.sqrt(np.einsum("ij,ij->i", half, half))[:, None]
            gloss += np.clip(np.einsum("ij,ij->i", normal, half), 0, 1) ** 24 * tone[1]
        reach = self._open.copy()
        reach[self._mouth] *= 0.45 + 0.55 * min(1.0, articulation[0] + 0.5 * articulation[4] + 0.3 * articulation[1])
        light *= reach[:, None]
        return light, gloss * self._gloss * reach

    def _draw_eyes(
        self, at: np.ndarray, pose: Pose, albedo: np.ndarray, gloss: np.ndarray, label: np.ndarray, rows: np.ndarray
    ) -> None:
        """Paint eyeball, lid edge, lashes and crease into the socket's pixels; at (E, 3) neutral points, rows their pixels."""
        sign = np.sign(at[:, 0])
        out, up = (np.abs(at[:, 0]) - EYE_X), at[:, 1] - EYE_Y
        along = out / EYE_HALF
        top, bottom = shape.lids(along, pose.blink)
        soft = 0.6 / self.density + 0.003
        within = smoothstep(1.03, 0.97, np.abs(along))
        opened = smoothstep(-soft, soft, top - up) * smoothstep(-soft, soft, up - bottom) * within
        # the ball: white, shaded towards the corners and under the lid; the iris looks where gaze says
        ix, iy = at[:, 0] - sign * EYE_X - pose.gaze[0], up - 0.012 - pose.gaze[1]
        far = np.hypot(ix, iy)
        ball = np.empty((len(at), 3), np.float32)
        ball[:] = (0.70, 0.66, 0.62)
        ball *= (1 - 0.42 * np.clip(np.abs(along), 0, 1) ** 2.5)[:, None]
        ring = smoothstep(IRIS + soft, IRIS - soft, far)[:, None]
        angle = np.arctan2(iy, ix)
        fibres = 1 + 0.16 * np.sin(23 * angle) + 0.10 * np.sin(41 * angle + 1.0)
        glow = smoothstep(PUPIL, IRIS, far) * smoothstep(IRIS * 1.05, IRIS * 0.80, far) * fibres
        tone = np.array([0.115, 0.135, 0.080]) * (0.55 + 1.15 * glow)[:, None]
        ball += (tone - ball) * ring
        ball *= 1 - 0.97 * smoothstep(PUPIL + soft, PUPIL - soft, far)[:, None]
        ball *= (1 - 0.55 * smoothstep(0.045, 0.0, top - up))[:, None]
        skin = albedo[rows]
        crease_height = top * 0.35 + 0.65 * shape.lids(along, 0.0)[0] + 0.036
        crease = np.exp(-(((up - crease_height) / 0.009) ** 2)) * smoothstep(1.1, 0.6, np.abs(along))
        crease *= 0.40 * (1 - 0.6 * pose.blink)
        lash = 0.88 * np.exp(-(((up - top - 0.004) / (0.0105 + 0.3 * soft)) ** 2)) * smoothstep(1.12, 0.95, np.abs(along))
        lash = np.maximum(lash, 0.38 * np.exp(-(((up - bottom + 0.003) / (0.006 + 0.3 * soft)) ** 2)) * within)
        skin = skin * (1 - crease[:, None]) + np.array([0.10, 0.03, 0.02]) * crease[:, None]
        eye = skin + (ball - skin) * opened[:, None]
        eye += (np.array([0.022, 0.012, 0.008]) - eye) * lash[:, None]
        albedo[rows] = eye
        glint = smoothstep(0.017 + soft, 0.017 - soft, np.hypot(ix + 0.022, iy - 0.026))
        glint += 0.25 * smoothstep(0.012 + soft, 0.012 - soft, np.hypot(ix - 0.024, iy + 0.018))
        gloss[rows] = gloss[rows] * (1 - opened) + 13.0 * glint * opened * (1 - 0.9 * np.clip(lash, 0, 1))
        seen = opened > 0.5
        label[rows[seen]] = np.where(sign[seen] < 0, RIGHT_EYE, LEFT_EYE)
