"""Stage 8, the head stabiliser: optical flow tracks and bundle adjustment -> tracks.npz and bundle_adjustment.pt (metres).

Unknown are the 3D keypoints, all poses, and one focal length. The gauge is fixed by what the tracker knows: keypoints are drawn
towards its surface and poses, weakly, towards its poses. process.py skips the stage with --use_3dmm.
"""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np
import torch
from torch import Tensor

from data_utils.face_tracking import rigid_pixels
from data_utils.face_tracking.fit import FOCAL_BOUNDS, REFERENCE_SIDE
from data_utils.face_tracking.params import read_blink, read_fit
from data_utils.optical_flow import load_flow
from data_utils.optical_flow.tracks import Tracks, track
from data_utils.pose_solver import (
    Poses,
    SmoothMotion,
    cauchy,
    chunks,
    levenberg_marquardt,
    linearise,
    project,
    project_tensor,
    solve_arrow,
    still_jitter,
    tensor,
)
from utils.constants import DM_PER_M
from utils.dataset_folder import DatasetFolder
from utils.files import write_npz, write_tensors
from utils.image import read_rgb
from utils.pose import euler_to_matrix, matrix_to_euler
from utils.progress import solver_progress

VERSION = 3  # 2: fewer, more rigid tracks; 3: tracks on hair and ears too
# All pixel figures are for a picture side of 512 and scale with it.
TRACK_NOISE = 0.35  # px, before the clip has shown each track's own, which is held within
NOISE_BOUNDS = (0.1, 1.0)
NOISE_FACTOR = 2.0  # neighbouring frames err alike, and skin is not bone: more doubt than the median error alone would say
ROBUST = 1.0  # deviations at which the Cauchy loss turns
INDEPENDENT = 40  # neighbouring tracks err together: all of a frame are as informative as about so many independent ones,
INDEPENDENT_FRAMES = 50  # and to the structure a clip says no more than so many frames
FOCAL_DEVIATION = 0.02  # of the logarithm, about the tracker's
POSE_DEVIATION = (np.radians(3), 0.3)  # of a pose about the tracker's: rad, dm
MOTION_DEVIATION = 0.1  # px a frame squared; halves 6 Hz tremor of tenths of a pixel, leaves nods and all that is larger
STRUCTURE_FRAMES = 1500  # frames that determine points and focal; a longer clip's other frames only get their poses
# keypoints of a frame, px of all views and share of rigid ones beyond which the report warns; good clips have up to 0.66, from 0.84
FEWEST_VISIBLE, LARGEST_ERROR, SMALLEST_SHARE = 15, 1.0, 0.75
RAYLEIGH_MEDIAN = 1.177  # median length of a 2D Gaussian of deviation 1
WORST_TRACKS = 0.6  # share of the keypoints left out after a first look: skin that brows, lids and cheeks move
RIGID = 1.0  # px: what is further from where the head's pose has it does not move with the head in that frame


@dataclasses.dataclass
class Bundle:
    """Poses (dm), keypoints (K, 3) dm, focal length px."""

    poses: Poses
    points: np.ndarray
    focal: float


def run(folder: DatasetFolder, options: argparse.Namespace) -> dict:
    """Writes tracks.npz and bundle_adjustment.pt; returns facts for the report (pixels are those of a 512-pixel side)."""
    device = getattr(options, "device", "cpu")
    flow = load_flow(getattr(options, "flow", "auto"), device)
    fit, ids = read_fit(folder, getattr(options, "face_model", "auto")), np.array(folder.valid_ids())
    count = len(fit.expression)
    fit = dataclasses.replace(fit, poses=fit.poses[ids], expression=fit.expression[ids])
    height, width = read_rgb(folder.frame(int(ids[0]))).shape[:2]
    centre = np.array([width / 2, height / 2])
    tracks = track(fit, folder, ids, centre, flow, read_blink(folder)[ids])

    start = Bundle(fit.poses, tracks.points, fit.focal)
    with solver_progress("bundle adjustment") as each:
        bundle, keep = adjust(start, tracks, ids, centre, each, device=device)
    followed = len(tracks.points)
    tracks = dataclasses.replace(tracks, pixels=tracks.pixels[:, keep], visible=tracks.visible[:, keep])
    rigid = rigid_observations(bundle, tracks, centre)
    write_npz(folder.tracks, tracks=tracks.pixels, visible=rigid, ids=ids, points=bundle.points.astype(np.float32))
    write_bundle_adjustment(folder, bundle, ids, count)
    told = {"backend": flow.name, "followed": followed}
    return told | facts(bundle, start, tracks, rigid, ids, centre, fit.model.mean[fit.model.rigid])


def write_bundle_adjustment(folder: DatasetFolder, bundle: Bundle, ids: np.ndarray, count: int) -> None:
    """bundle_adjustment.pt: euler, trans in metres, of all `count` frames (interpolated where dropped), and focal in pixels."""
    poses = bundle.poses.spread(ids, count)
    params = {
        "euler": matrix_to_euler(torch.from_numpy(poses.rotation)),
        "trans": poses.translation / DM_PER_M,
        "focal": np.array([bundle.focal]),
    }
    write_tensors(folder.bundle_adjustment, params)


def read_bundle_adjustment(folder: DatasetFolder) -> tuple[Poses, float]:
    """Refined poses of all frames (dm) and focal length (px)."""
    params = torch.load(folder.require(folder.bundle_adjustment), weights_only=True)
    poses = Poses(euler_to_matrix(params["euler"].double()).numpy(), params["trans"].double().numpy() * DM_PER_M)
    return poses, float(params["focal"][0])


def rigid_observations(bundle: Bundle, tracks: Tracks, centre: np.ndarray) -> np.ndarray:
    """(F, K) bool: which of the visible keypoints move with the head, frame by frame: a brow that is raised now is left out now."""
    return tracks.visible & (_errors(bundle, tracks, centre) < RIGID * centre.max() * 2 / REFERENCE_SIDE)


def _errors(bundle: Bundle, tracks: Tracks, centre: np.ndarray) -> np.ndarray:
    """(F, K) px."""
    return np.linalg.norm(project(bundle.points, bundle.poses, bundle.focal, centre) - tracks.pixels, axis=2)


def facts(bundle: Bundle, start: Bundle, tracks: Tracks, rigid: np.ndarray, ids: np.ndarray, centre: np.ndarray,
          face: np.ndarray) -> dict:  # fmt: skip
    """What the report says of a bundle and the tracks it stands on. face (N, 3) dm: where the jitter is measured."""
    scale = REFERENCE_SIDE / (centre.max() * 2)
    errors = _errors(bundle, tracks, centre) * scale
    lengths = errors[rigid] if rigid.any() else errors[tracks.visible]
    error, error_all = (float(np.sqrt((of**2).mean())) for of in (lengths, errors[tracks.visible]))
    share = float(rigid.sum() / max(1, tracks.visible.sum()))
    head = rigid_pixels(bundle.poses, bundle.focal, face, centre) * scale
    jitter, still = still_jitter(head, ids)
    before, _ = still_jitter(rigid_pixels(start.poses, start.focal, face, centre) * scale, ids)
    noise, _ = still_jitter(np.where(rigid[..., None], tracks.pixels, np.nan) * scale, ids, head)
    seen = rigid.sum(1)
    lost = ids[seen < FEWEST_VISIBLE]
    turn = np.linalg.norm(bundle.poses.step_from(start.poses)[:, :3], axis=1)
    warnings = []
    if error_all > LARGEST_ERROR or share < SMALLEST_SHARE:  # `error` knows nothing of what is not rigid
        warnings.append(f"points of the head miss their tracks by {error_all:.2f} px, and {share:.0%} of their views move with it; "
                        "the head may be blurred, covered, or cut to")  # fmt: skip
    if len(lost):
        warnings.append(f"hardly any point could be followed in {len(lost)} frames, first {lost[0]}; their pose is a guess")
    return {
        "references": [int(ids[i]) for i in tracks.references],
        "keypoints": len(bundle.points),
        "visible_share": round(float(tracks.visible.mean()), 3),
        "rigid_share": round(share, 3),
        "reprojection_error_px": round(error, 3),
        "reprojection_median_px": round(float(np.median(lengths)), 3),
        "reprojection_error_all_px": round(error_all, 3),
        "still_jitter_px": jitter,
        "still_jitter_tracks_px": noise,
        "still_jitter_3dmm_px": before,
        "still_frames": still,
        "focal": round(bundle.focal, 1),
        "turned_from_3dmm_degrees": round(float(np.degrees(np.sqrt((turn**2).mean()))), 3),
        "warnings": warnings,
    }


class BundleProblem:
    """Reprojection errors of tracks of `noise` (K,) px, with `start` as the prior, its points within `anchors` (K,) dm.

    not `free_structure`: points and focal stay.
    """

    def __init__(self, start: Bundle, pixels: np.ndarray, visible: np.ndarray, noise: np.ndarray, anchors: np.ndarray,
                 centre: np.ndarray, motion: SmoothMotion | None, free_structure: bool = True,
                 device: torch.device | str = "cpu"):  # fmt: skip
        self.start, self.centre, self.motion, self.device = start, centre, motion, device
        self.free_structure = free_structure
        side = centre.max() * 2
        self.pixels, self.noise = tensor(pixels, device), tensor(noise, device)
        self.visible = torch.as_tensor(visible, device=device)
        self.share = min(1.0, INDEPENDENT / max(1, len(start.points)))
        structure = max(1.0, len(pixels) / INDEPENDENT_FRAMES) * self.share
        self.anchor = structure / anchors[:, None] ** 2
        self.focal_precision = max(1.0, len(pixels) / INDEPENDENT_FRAMES) / FOCAL_DEVIATION**2
        self.pose_precision = np.repeat(np.array(POSE_DEVIATION) ** -2.0, 3)
        self.bounds = np.array(FOCAL_BOUNDS) * side / REFERENCE_SIDE

    def squared(self, bundle: Bundle, frames: slice) -> Tensor:
        """(F, K) squared reprojection errors in deviations, zero where invisible."""
        points = tensor(bundle.points, self.device)
        error = project_tensor(points, bundle.poses[frames], bundle.focal, self.centre) - self.pixels[frames]
        return torch.where(self.visible[frames], (error**2).sum(-1) / self.noise**2, 0.0)

    def cost(self, bundle: Bundle) -> float:
        data = sum(cauchy(self.squared(bundle, frames), ROBUST)[0].sum() for frames in chunks(len(self.pixels)))
        prior = (self.anchor * (bundle.points - self.start.points) ** 2).sum()
        prior += self.focal_precision * np.log(bundle.focal / self.start.focal) ** 2
        prior += (self.pose_precision * bundle.poses.step_from(self.start.poses) ** 2).sum()
        return 0.5 * float(self.share * data + prior) + (self.motion.cost(bundle.poses) if self.motion else 0.0)

    def propose(self, bundle: Bundle, damping: float) -> Bundle:
        count, shared = len(bundle.points), 3 * len(bundle.points) + 1 if self.free_structure else 0
        pose = np.tile(np.diag(self.pose_precision), (len(self.pixels), 1, 1))
        pose_gradient = self.pose_precision * bundle.poses.step_from(self.start.poses)
        border = np.zeros((len(self.pixels), 6, shared))
        point = self.anchor[..., None] * np.eye(3)
        point_gradient = self.anchor * (bundle.points - self.start.points)
        point_focal, focal = np.zeros((count, 3)), self.focal_precision
        focal_gradient = self.focal_precision * np.log(bundle.focal / self.start.focal)
        keypoints = tensor(bundle.points, self.device)
        for chunk in chunks(len(self.pixels)):
            weight = self.share * self.visible[chunk] * cauchy(self.squared(bundle, chunk), ROBUST)[1] / self.noise**2
            part = linearise(keypoints, bundle.poses[chunk], bundle.focal, self.centre, self.pixels[chunk], weight)
            pose[chunk] += part.pose.cpu().numpy()
            pose_gradient[chunk] += part.pose_gradient.cpu().numpy()
            if self.free_structure:
                border[chunk, :, :-1] = part.pose_point.transpose(1, 2).flatten(2).cpu().numpy()
                border[chunk, :, -1] = part.pose_focal.cpu().numpy()
                point += part.point.sum(0).cpu().numpy()
                point_gradient += part.point_gradient.sum(0).cpu().numpy()
                point_focal += part.point_focal.sum(0).cpu().numpy()
                focal += float(part.focal)
                focal_gradient += float(part.focal_gradient)
        corner, corner_gradient = np.zeros((shared, shared)), np.zeros(shared)
        if self.free_structure:
            blocks = corner[:-1, :-1].reshape(count, 3, count, 3)
            blocks[np.arange(count), :, np.arange(count)] = point
            corner[:-1, -1] = corner[-1, :-1] = point_focal.ravel()
            corner[-1, -1] = focal
            corner_gradient[:] = np.r_[point_gradient.ravel(), focal_gradient]
        step, shared_step = solve_arrow(pose, pose_gradient, border, corner, corner_gradient, damping, bundle.poses, self.motion)
        points, new_focal = bundle.points, bundle.focal
        if self.free_structure:
            points = points + shared_step[:-1].reshape(-1, 3)
            new_focal = float(np.clip(new_focal * np.exp(np.clip(shared_step[-1], -0.2, 0.2)), *self.bounds))
        return Bundle(bundle.poses.moved(step), points, new_focal)


def adjust(start: Bundle, tracks: Tracks, ids: np.ndarray, centre: np.ndarray, each=None,
           structure: np.ndarray | None = None, device: torch.device | str = "cpu") -> tuple[Bundle, np.ndarray]:  # fmt: skip
    """Bundle adjustment of a clip. Returns the result and the indices (K',) of the keypoints it stands on.

    A first solution on frames all over the clip shows how well each keypoint moves with the head: the worst are left out of the
    second, the others weigh by their own error. Points and focal length come from the frames at the indices `structure` (all).
    """
    side = centre.max() * 2 / REFERENCE_SIDE
    some = np.arange(len(ids)) if structure is None else structure
    some = some[np.unique(np.linspace(0, len(some) - 1, min(STRUCTURE_FRAMES, len(some))).astype(int))]
    keep = np.flatnonzero(tracks.visible.mean(0) > 0.02)
    noise = np.full(len(keep), TRACK_NOISE * side)

    def solve(bundle: Bundle, frames: np.ndarray, free_structure: bool = True) -> Bundle:
        motion = SmoothMotion(ids[frames], bundle.poses, bundle.focal, MOTION_DEVIATION * side)
        pixels, visible = tracks.pixels[frames][:, keep], tracks.visible[frames][:, keep]
        problem = BundleProblem(bundle, pixels, visible, noise, tracks.anchors[keep], centre, motion, free_structure, device)
        return levenberg_marquardt(problem, bundle, 15, 1e-4, each)

    look = some[:: max(1, len(some) // 300)]
    first = solve(Bundle(start.poses[look], start.points[keep], start.focal), look)
    error = np.linalg.norm(project(first.points, first.poses, first.focal, centre) - tracks.pixels[look][:, keep], axis=2)
    shown = tracks.visible[look][:, keep]
    error = np.array([np.median(error[shown[:, k], k]) if shown[:, k].any() else np.inf for k in range(len(keep))])
    steady = error <= np.quantile(error, 1 - WORST_TRACKS)
    keep, noise = keep[steady], np.clip(NOISE_FACTOR * error[steady] / RAYLEIGH_MEDIAN, *(np.array(NOISE_BOUNDS) * side))

    bundle = solve(Bundle(start.poses[some], start.points[keep], start.focal), some)
    if len(some) < len(ids):
        bundle = solve(Bundle(start.poses, bundle.points, bundle.focal), np.arange(len(ids)), free_structure=False)
    return bundle, keep
