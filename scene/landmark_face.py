"""The face of a data set that brings no mesh (SyncTalk, ER-NeRF): a surface through its 68 landmarks, placed by its own poses."""

from __future__ import annotations

import numpy as np
import torch

from scene.gaussian_model import PointCloud
from scene.talking_dataset_readers import TalkingDatasetReader

FRAMES, STEPS, POINTS = 100, 6, 5000
LANDMARK_NOISE = 1.5 / 512  # of the frame's side
DEPTH_DEVIATION = 0.7  # dm, about the plane through the head's centre: decides only where the head never turns


def triangulate(reader: TalkingDatasetReader) -> np.ndarray:
    """(68, 3) canonical landmarks, dm: least reprojection error over up to 100 training frames, by Gauss-Newton."""
    train = reader.splits["train"]
    ids = train[:: max(1, len(train) // FRAMES)]
    views = reader.views[ids].double().numpy()
    rotation, translation = views[:, None, :3, :3], views[:, None, :3, 3]  # (F, 1, ...)
    marks = (np.stack([reader.landmarks(i) for i in ids]) - (reader.cx, reader.cy)) / reader.focal
    noise = LANDMARK_NOISE * reader.width / reader.focal
    points = np.zeros((68, 3))
    for _ in range(STEPS):
        camera = (rotation @ points[..., None])[..., 0] + translation
        seen, depth = camera[..., :2] / camera[..., 2:], camera[..., 2:, None]
        slope = (rotation[..., :2, :] - seen[..., None] * rotation[..., 2:, :]) / depth / noise  # (F, 68, 2, 3)
        normal = np.einsum("fkia,fkib->kab", slope, slope)
        value = np.einsum("fkia,fki->ka", slope, (marks - seen) / noise)
        normal[:, 2, 2] += DEPTH_DEVIATION**-2
        value[:, 2] -= points[:, 2] / DEPTH_DEVIATION**2
        points = points + np.linalg.solve(normal, value[..., None])[..., 0]
    return points


def landmark_face(reader: TalkingDatasetReader) -> PointCloud:
    """Points spread over the triangles between the landmarks, with the colours of a frame in the middle of the clip."""
    from scipy.spatial import Delaunay  # slow to import: --help answers without

    corners = triangulate(reader)
    triangles = corners[Delaunay(corners[:, :2]).simplices]  # (T, 3, 3)
    cross = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    cross *= np.sign(cross[:, 2:])  # out of the face
    area = np.linalg.norm(cross, axis=1)
    rng = np.random.default_rng(0)
    chosen = rng.choice(len(triangles), POINTS, p=area / area.sum())
    weights = rng.dirichlet(np.ones(3), POINTS)
    points = torch.from_numpy((triangles[chosen] * weights[..., None]).sum(1)).float()
    normals = torch.from_numpy(cross[chosen] / area[chosen, None]).float()

    frame = reader.splits["train"][len(reader.splits["train"]) // 2]
    image, view = reader.image(frame), reader.views[frame]
    camera = points @ view[:3, :3].T + view[:3, 3]
    pixels = (camera[:, :2] / camera[:, 2:] * reader.focal + torch.tensor([reader.cx, reader.cy])).int().numpy()
    column, row = np.clip(pixels, 0, (reader.width - 1, reader.height - 1)).T
    return PointCloud(points, normals, torch.from_numpy(image[row, column].astype(np.float32) / 255))
