"""Tracks of keypoints on the rigid part of the face, from the reference frames to every frame of the clip.

The tracker's pose and surface predict where each reference pixel lies in a frame; the frame is warped back by that prediction, and
the flow has only the small rest to find. Every frame is compared with the reference itself, so errors do not add up over time.
"""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np

from data_utils.face_tracking.fit import REFERENCE_SIDE, Fit
from data_utils.optical_flow.reference import KEYPOINTS, Reference, choose_references, make_reference, view_directions
from data_utils.per_frame import ordered_map
from data_utils.pose_solver import Poses
from utils.dataset_folder import DatasetFolder
from utils.errors import UserError
from utils.image import read_rgb
from utils.progress import progress

CONSISTENT = 0.6  # px at 512: how far forward and backward flow may disagree
WIDEST_TURN = np.radians(30)  # a reference is of no use to a frame turned further away from it
FACING = 0.25  # least cosine between a keypoint's normal and the view
FEWEST_KEYPOINTS = 20


@dataclasses.dataclass
class Tracks:
    """K keypoints over F valid frames."""

    pixels: np.ndarray  # (F, K, 2) float32 px (centres at +0.5)
    visible: np.ndarray  # (F, K) bool
    points: np.ndarray  # (K, 3) dm: where the tracker's surface has them
    anchors: np.ndarray  # (K,) dm: how far they may be from there
    references: list[int]  # indices of the reference frames among the valid ones


def track(fit: Fit, folder: DatasetFolder, ids: np.ndarray, centre: np.ndarray, flow, blink: np.ndarray) -> Tracks:
    """Follow the keypoints of the reference frames through all frames `ids`; each frame is read once."""
    chosen = choose_references(fit, folder, ids, blink)
    share = KEYPOINTS // len(chosen)
    references = [make_reference(fit, folder, ids, frame, centre, share) for frame in chosen]
    found = [len(reference.keypoints) for reference in references]
    if sum(found) < FEWEST_KEYPOINTS:
        raise UserError(f"{folder.root}: only {sum(found)} points of forehead, nose and cheeks can be followed "
                        "(is the face blurred or covered?); run process.py with --use_3dmm")  # fmt: skip
    views = view_directions(fit.poses)

    def follow(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images = [read_rgb(folder.frame(int(ids[index]))) for index in indices]
        parts = [_follow(reference, images, fit.poses[indices], fit.focal, centre, flow, views[indices] @ views[reference.frame])
                 for reference in references]  # fmt: skip
        return tuple(np.concatenate(part, 1) for part in zip(*parts, strict=True))

    pixels, visible = np.zeros((len(ids), sum(found), 2), np.float32), np.zeros((len(ids), sum(found)), bool)
    batches = [np.arange(i, min(i + flow.batch, len(ids))) for i in range(0, len(ids), flow.batch)]
    with progress(label=f"optical flow ({flow.name})", total=len(ids)) as bar:
        for indices, result in zip(batches, ordered_map(follow, batches), strict=True):
            pixels[indices], visible[indices] = result
            bar.update(len(indices))
    points, anchors = (np.concatenate([getattr(reference, name) for reference in references]) for name in ("points", "anchors"))
    return Tracks(pixels, visible, points, anchors, chosen)


def _follow(reference: Reference, images: list[np.ndarray], poses: Poses, focal: float, centre: np.ndarray, flow,
            cosines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Pixels (B, K, 2) of a reference's keypoints in some frames, and which of them can be trusted (B, K)."""
    shape = (len(images), len(reference.keypoints))
    pixels, trusted = np.zeros((*shape, 2), np.float32), np.zeros(shape, bool)
    near = np.flatnonzero(cosines >= np.cos(WIDEST_TURN))
    if not len(near) or not shape[1]:
        return pixels, trusted
    scale = max(images[0].shape[:2]) / REFERENCE_SIDE
    maps = [reference.map_to(poses[i : i + 1], focal, centre) for i in near]
    warped = [cv2.remap(images[i], there, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
              for i, there in zip(near, maps, strict=True)]  # fmt: skip
    still = [reference.image] * len(near)
    size = np.array(images[0].shape[1::-1])
    for i, there, forward, backward in zip(near, maps, flow.flows(still, warped), flow.flows(warped, still), strict=True):
        found = reference.keypoints + _sample(forward, reference.keypoints)
        back = found + _sample(backward, found)
        pixels[i] = _sample(there, found) + 0.5

        camera = reference.points @ poses.rotation[i].T + poses.translation[i]
        facing = -((reference.normals @ poses.rotation[i].T) * camera).sum(1) / np.linalg.norm(camera, axis=1)
        inside = ((pixels[i] > 1) & (pixels[i] < size - 1)).all(1)
        agrees = np.linalg.norm(back - reference.keypoints, axis=1) < CONSISTENT * scale
        trusted[i] = inside & agrees & (facing > FACING)
    return pixels, trusted


def _sample(field: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Bilinear values (K, 2) of a field (h, w, 2) at pixels (K, 2)."""
    return cv2.remap(field, at[None].astype(np.float32), None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)[0]
