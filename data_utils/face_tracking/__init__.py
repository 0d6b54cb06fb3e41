"""Stage 7: fit a face model to the landmarks of the whole clip -> track_params.pt and the canonical face fused.ply.

With --photometric the poses are then refined on the pictures (photometric.py).
"""

from __future__ import annotations

import argparse

import cv2
import numpy as np
from scipy.spatial import cKDTree

from data_utils.face_tracking.facemodel import load_face_model
from data_utils.face_tracking.fit import REFERENCE_SIDE, Fit, fit_clip
from data_utils.face_tracking.linear_face import COEFFICIENT_BOUND
from data_utils.face_tracking.params import read_landmarks, write_params
from data_utils.face_tracking.photometric import refine
from data_utils.face_tracking.surface import subdivide, vertex_normals
from data_utils.pose_solver import Poses, project, still_jitter
from utils.dataset_folder import DatasetFolder
from utils.errors import UserError
from utils.image import read_rgb
from utils.ply import write_mesh
from utils.progress import solver_progress

VERSION = 2  # 2: the identity basis is stored
FUSED_VERTICES = 5000  # fused.ply is subdivided until it has at least as many
COLOUR_FRAMES = 12


def run(folder: DatasetFolder, options: argparse.Namespace) -> dict:
    """Writes track_params.pt and fused.ply; returns facts for the report."""
    model = load_face_model(getattr(options, "face_model", "auto"))
    ids = np.array(folder.valid_ids())
    landmarks = read_landmarks(folder)
    count, landmarks = len(landmarks), landmarks[ids]
    device = getattr(options, "device", "cpu")
    height, width = read_rgb(folder.require(folder.frame(int(ids[0])))).shape[:2]
    centre = np.array([width / 2, height / 2])
    with solver_progress("face tracking") as each:
        fit = fit_clip(model, landmarks, ids, centre, each, device)
    told = {}
    if getattr(options, "photometric", False):
        fit, told = refine(fit, folder, ids, centre, device)

    write_params(folder, fit, ids, count)
    points, normals, colours, faces = canonical_face(fit, folder, ids, centre)
    write_mesh(folder.fused, points, normals, colours, faces)
    facts = _facts(fit, landmarks, ids, centre) | {"fused_vertices": len(points)}
    facts["warnings"] += told.pop("warnings", [])
    return facts | ({"photometric": told} if told else {})


def canonical_face(fit: Fit, folder: DatasetFolder, ids: np.ndarray, centre: np.ndarray) -> tuple[np.ndarray, ...]:
    """The subject's face, mean identity and mean expression, subdivided, with the colours that the video shows there.

    Returns points (V, 3) dm, normals (V, 3), colours (V, 3) in [0, 1], faces (T, 3).
    A vertex's colour is the median over frames in which its surface is turned to the camera.
    """
    points, faces = fit.model.vertices(fit.identity, fit.expression.mean(0)), fit.model.triangles
    moving = fit.vertices(some := np.unique(np.linspace(0, len(ids) - 1, COLOUR_FRAMES).astype(int)))
    while len(points) < FUSED_VERTICES:
        split = [subdivide(shape, faces)[0] for shape in moving]
        points, faces = subdivide(points, faces)
        moving = np.stack(split)
    poses = fit.poses[some]
    pixels = project(moving, poses, fit.focal, centre)
    camera = moving @ poses.rotation.transpose(0, 2, 1) + poses.translation[:, None]
    colours = np.full((len(some), len(points), 3), np.nan)
    for k, frame in enumerate(ids[some]):
        image = read_rgb(folder.frame(int(frame)))
        facing = -(vertex_normals(camera[k], faces) * camera[k]).sum(1) / np.linalg.norm(camera[k], axis=1)
        # pixel centres lie at +0.5 in our pixels, at integers in OpenCV's
        at = (pixels[k] - 0.5).astype(np.float32)
        inside = ((at >= 0) & (at <= np.array(image.shape[1::-1]) - 1)).all(1)
        seen = inside & (facing > 0.3)
        colours[k, seen] = cv2.remap(image, at[seen, None], None, cv2.INTER_LINEAR)[:, 0]
    known = np.isfinite(colours).any((0, 2))
    if not known.any():
        raise UserError(f"{folder.root}: the fitted face lies outside the pictures; the landmarks of stage 2 are unusable")
    colour = np.zeros((len(points), 3))
    colour[known] = np.nanmedian(colours[:, known], 0)
    colour[~known] = colour[known][cKDTree(points[known]).query(points[~known])[1]]
    return points, vertex_normals(points, faces), colour / 255, faces


def _facts(fit: Fit, landmarks: np.ndarray, ids: np.ndarray, centre: np.ndarray) -> dict:
    scale = REFERENCE_SIDE / (centre.max() * 2)
    model = fit.model
    pixels = project(fit.landmarks(), fit.poses, fit.focal, centre)
    squared = ((pixels - landmarks[:, model.landmark_ids, :2]) ** 2).sum(-1) * scale**2
    counts = model.outermost(pixels[..., 0]) & (model.landmark_noise <= 1)  # the exact ones
    steady, squared = squared[:, model.landmark_steady], squared[counts]
    jitter, still = still_jitter(rigid_pixels(fit.poses, fit.focal, model.mean[model.rigid], centre) * scale, ids)
    warnings = []
    if squared.mean() > 3**2:
        warnings.append(f"the face model misses the landmarks by {squared.mean() ** 0.5:.1f} px; look at 3dmm_render.mp4")
    if np.abs(fit.expression).max() >= COEFFICIENT_BOUND:
        frames = ids[(np.abs(fit.expression) >= COEFFICIENT_BOUND).any(1)]
        warnings.append(f"expression at its bound in {len(frames)} frames, the first {frames[0]}")
    return {
        "backend": model.name,
        "focal": round(fit.focal, 1),
        "distance_dm": round(float(-fit.poses.translation[:, 2].mean()), 2),
        "landmark_error_px": round(float(squared.mean() ** 0.5), 3),
        "rigid_error_px": round(float(steady.mean() ** 0.5), 3),
        "still_jitter_px": jitter,
        "still_frames": still,
        "warnings": warnings,
    }


def rigid_pixels(poses: Poses, focal: float, points: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """(F, N, 2) projections of at most 50 of the given points (N, 3): what the jitter score is measured on."""
    return project(points[:: max(1, len(points) // 50)], poses, focal, centre)
