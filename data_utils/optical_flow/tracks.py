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

    def follow(index: int) -> tuple[np.ndarray, np.ndarray]:
        image = read_rgb(folder.frame(int(ids[index])))
        pose = fit.poses[index : index + 1]
        parts = [_follow(reference, image, pose, fit.focal, centre, flow, float(views[index] @ views[reference.frame]))
                 for reference in references]  # fmt: skip
        return tuple(np.concatenate(part) for part in zip(*parts, strict=True))

    pixels, visible = np.zeros((len(ids), sum(found), 2), np.float32), np.zeros((len(ids), sum(found)), bool)
    for index, result in enumerate(progress(ordered_map(follow, range(len(ids))), label="optical flow", total=len(ids))):
        pixels[index], visible[index] = result
    return Tracks(pixels, visible, np.concatenate([reference.points for reference in references]), chosen)


def _follow(reference: Reference, image: np.ndarray, pose: Poses, focal: float, centre: np.ndarray, flow,
            cosine: float) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Pixels (K, 2) of a reference's keypoints in one frame, and which of them can be trusted (K,)."""
    count = len(reference.keypoints)
    if count == 0 or cosine < np.cos(WIDEST_TURN):
        return np.zeros((count, 2), np.float32), np.zeros(count, bool)
    scale = max(image.shape[:2]) / REFERENCE_SIDE
    there = reference.map_to(pose, focal, centre)
    warped = cv2.remap(image, there, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    forward, backward = flow(reference.image, warped), flow(warped, reference.image)
    found = reference.keypoints + _sample(forward, reference.keypoints)
    back = found + _sample(backward, found)
    pixels = _sample(there, found) + 0.5

    camera = reference.points @ pose.rotation[0].T + pose.translation[0]
    facing = -((reference.normals @ pose.rotation[0].T) * camera).sum(1) / np.linalg.norm(camera, axis=1)
    size = np.array(image.shape[1::-1])
    inside = ((pixels > 1) & (pixels < size - 1)).all(1)
    agrees = np.linalg.norm(back - reference.keypoints, axis=1) < CONSISTENT * scale
    return pixels, inside & agrees & (facing > FACING)


def _sample(field: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Bilinear values (K, 2) of a field (h, w, 2) at pixels (K, 2)."""
    return cv2.remap(field, at[None].astype(np.float32), None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)[0]
