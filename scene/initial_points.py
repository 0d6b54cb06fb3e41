"""Where surfels start: the fitted face mesh, and points for hair, ears and the mouth that no face mesh has."""

from __future__ import annotations

import cv2
import numpy as np
import torch

from scene.cameras import intrinsics
from scene.gaussian_model import PointCloud
from scene.landmark_face import landmark_face
from scene.talking_dataset_readers import TalkingDatasetReader
from utils.constants import MOUTH, PART_CLASSES
from utils.ply import read_mesh

SEED_FRAMES = 8  # frames over the clip whose pixels give points, and as many with the widest open mouth
MOUTH_DEPTH = 0.25  # dm behind the tip of the nose: where teeth and tongue are


def read_face(reader: TalkingDatasetReader) -> PointCloud:
    """The vertices of fused.ply, or where another tool made the data set, a surface through its landmarks.

    Raises UserError if fused.ply is damaged or lacks a field, or is missing though process.py made the folder.
    """
    folder = reader.folder
    if not folder.fused.exists() and not folder.crop.exists():
        return landmark_face(reader)
    mesh = read_mesh(folder.require(folder.fused))
    normals = torch.nn.functional.normalize(torch.from_numpy(mesh.normals), dim=-1)
    return PointCloud(torch.from_numpy(mesh.points), normals, torch.from_numpy(mesh.colours))


def initial_points(reader: TalkingDatasetReader, part: str, seeds: int, seed: int = 0) -> PointCloud:
    """The face mesh plus about `seeds` points on what it does not cover, canonical frame, dm.

    A pixel of the part becomes a point on its viewing ray. Its depth comes from inflating the silhouette: on the outline
    the plane of the ears, towards the middle up to the depth of the forehead; mouth pixels lie just behind the lips.
    """
    face = read_face(reader)
    rng = np.random.default_rng(seed)
    train = reader.splits["train"]
    spread = train[:: max(1, len(train) // SEED_FRAMES)][:SEED_FRAMES]
    gaps = {i: np.linalg.norm(np.subtract(*reader.landmarks(i)[[62, 66]])) for i in train[:: max(1, len(train) // 1000)]}
    widest = sorted(gaps, key=gaps.get)[-SEED_FRAMES:]

    clouds = [face]
    for frames, classes, share in ((spread, PART_CLASSES[part], 0.9), (widest, (MOUTH,), 0.1)):
        for i in frames:
            clouds.append(_from_pixels(reader, face.points, i, classes, int(seeds * share / len(frames)), rng))
    return PointCloud(*(torch.cat([getattr(c, name) for c in clouds]) for name in ("points", "normals", "colours")))


def _from_pixels(reader, face_points, i, classes, count, rng) -> PointCloud:
    from scipy.ndimage import distance_transform_edt  # slow to import: --help answers without

    inside = np.isin(reader.parsing(i), classes)
    view = reader.views[i]
    face_camera = face_points @ view[:3, :3].T + view[:3, 3]  # OpenCV axes: z grows away from the camera
    if classes == (MOUTH,):
        free = inside
        depth = np.full(inside.shape, float(face_camera[:, 2].min()) + MOUTH_DEPTH, np.float32)
    else:
        pixels = (face_camera @ _k(reader).T)[:, :2] / face_camera[:, 2:]
        free = inside & ~_covered(pixels.numpy(), inside.shape)
        ears, forehead = float(face_camera[:, 2].max()), float(face_camera[:, 2].quantile(0.3))
        distance = distance_transform_edt(inside)
        bulge = np.sqrt(1 - (1 - distance / max(distance.max(), 1.0)) ** 2)
        depth = (ears + (forehead - ears) * bulge).astype(np.float32)
    rows, columns = np.nonzero(free)
    if len(rows) == 0 or count == 0:
        return PointCloud(*(torch.zeros(0, 3) for _ in range(3)))
    chosen = rng.choice(len(rows), min(count, len(rows)), replace=False)
    rows, columns = rows[chosen], columns[chosen]
    z = torch.from_numpy(depth[rows, columns])
    pixel = torch.from_numpy(np.stack([columns + 0.5, rows + 0.5, np.ones(len(rows))], 1).astype(np.float32))
    camera = (pixel @ torch.linalg.inv(_k(reader)).T) * z[:, None]
    points = (camera - view[:3, 3]) @ view[:3, :3]
    facing = torch.nn.functional.normalize((-view[:3, 3]) @ view[:3, :3] - points, dim=-1)  # towards the camera
    colours = torch.from_numpy(reader.image(i)[rows, columns].astype(np.float32) / 255.0)
    return PointCloud(points, facing, colours)


def _k(reader: TalkingDatasetReader) -> torch.Tensor:
    return intrinsics(reader.focal, reader.cx, reader.cy)


def _covered(pixels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: pixels inside the convex outline of the projected face."""
    covered = np.zeros(shape, np.uint8)
    cv2.fillConvexPoly(covered, cv2.convexHull(pixels.astype(np.float32)).astype(np.int32), 1)
    return covered.astype(bool)
