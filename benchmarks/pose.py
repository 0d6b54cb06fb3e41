"""How well does each back end's pose explain the pictures? Photometric error of the rigid face on frames held out, and what the
tracks say: the table in docs/preprocessing.md.

    python benchmarks/pose.py data/NAME [--face_models mesh ict] [--flows dis raft] [--blocks 8]

Needs a folder that process.py has brought to stage 6 at least, and writes nothing there. Of each back end, on `--blocks` runs of 40
consecutive frames spread over the clip: the rigid part of a face is painted with the mean of what three runs in four show there;
that texture, carried into the frames of every fourth run by their poses, misses their pictures by so many grey levels (RMS; each
frame's own gain and offset set aside). The face is for all poses the one fitted with `mesh`, placed into the head of another model
by one similarity. Structure and focal length of the flow poses come from the other runs alone; the face models' shape from all
frames, which is to their advantage. --photometric has its texture from the other runs too.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import cv2
import numpy as np
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_utils.bundle_adjustment import Bundle, adjust, facts, rigid_observations
from data_utils.face_tracking import rigid_pixels
from data_utils.face_tracking.facemodel import load_face_model
from data_utils.face_tracking.fit import Fit, fit_clip
from data_utils.face_tracking.params import read_blink, read_landmarks
from data_utils.face_tracking.photometric import refine
from data_utils.face_tracking.surface import dense_part
from data_utils.optical_flow import load_flow
from data_utils.optical_flow.tracks import track
from data_utils.pose_solver import Poses, project, still_jitter
from utils.constants import FACE_CLASSES
from utils.dataset_folder import DatasetFolder
from utils.errors import command_line
from utils.image import read_parsing, read_rgb

RUN, HELD_OUT = 40, 4  # frames of a run; every which run is held out
EVERY = 4  # frames of a run that the pictures are compared on
DENSE_ENOUGH = 5000  # points of the rigid surface
FACING = 0.4  # least cosine between the surface and the view


class Pictures:
    """Grey pictures of some frames and where they show skin."""

    def __init__(self, folder: DatasetFolder, ids: np.ndarray, held_out: np.ndarray):
        self.indices = np.arange(0, len(ids), EVERY)
        self.grey = [cv2.cvtColor(read_rgb(folder.frame(int(ids[i]))), cv2.COLOR_RGB2GRAY) for i in self.indices]
        self.skin = [np.isin(read_parsing(folder.parsing(int(ids[i]))), FACE_CLASSES).astype(np.uint8) for i in self.indices]
        self.held_out = held_out[self.indices]
        self.centre = np.array(self.grey[0].shape[::-1]) / 2

    def error(self, points: np.ndarray, normals: np.ndarray, poses: Poses, focal: float) -> float:
        """RMS grey levels by which the texture of the other frames misses the held-out ones, on a surface (P, 3) dm."""
        colour, seen = np.zeros((2, len(self.indices), len(points)))
        for k, i in enumerate(self.indices):
            at = (project(points, poses[i : i + 1], focal, self.centre)[0] - 0.5).astype(np.float32)[:, None]
            camera = points @ poses.rotation[i].T + poses.translation[i]
            facing = -((normals @ poses.rotation[i].T) * camera).sum(1) / np.linalg.norm(camera, axis=1)
            skin = cv2.remap(self.skin[k], at, None, cv2.INTER_NEAREST, borderValue=0)[:, 0] > 0
            colour[k] = cv2.remap(self.grey[k], at, None, cv2.INTER_CUBIC)[:, 0]
            seen[k] = skin & (facing > FACING)
        shown = seen[~self.held_out].sum(0)
        texture = (colour * seen)[~self.held_out].sum(0) / np.maximum(shown, 1)
        known = shown > 0.5 * (~self.held_out).sum()
        squared = []
        for grey, here in zip(colour[self.held_out], (seen[self.held_out] > 0) & known, strict=True):
            exposure = np.polyfit(texture[here], grey[here], 1)
            squared.append(((grey[here] - np.polyval(exposure, texture[here])) ** 2).mean())
        return float(np.sqrt(np.mean(squared)))


def rigid_surface(fit: Fit) -> tuple[np.ndarray, np.ndarray]:
    """Points (P, 3) dm and normals of the rigid part of the clip's mean face, about one a pixel."""
    return dense_part(fit.model.vertices(fit.identity, fit.expression.mean(0)), fit.model.triangles, fit.model.rigid, DENSE_ENOUGH)


def placed(points: np.ndarray, normals: np.ndarray, of: tuple[Poses, float], into: tuple[Poses, float],
           centre: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The surface moved and scaled so that the poses `into` show it, over all frames, where the poses `of` do."""
    frames, some = slice(None, None, max(1, len(of[0].translation) // 40)), points[:: max(1, len(points) // 60)]
    target = project(some, of[0][frames], of[1], centre)

    def residual(x: np.ndarray) -> np.ndarray:
        moved = np.exp(x[6]) * some @ Rotation.from_rotvec(x[:3]).as_matrix().T + x[3:6]
        return (project(moved, into[0][frames], into[1], centre) - target).ravel()

    x = least_squares(residual, np.zeros(7)).x
    turn = Rotation.from_rotvec(x[:3]).as_matrix()
    return np.exp(x[6]) * points @ turn.T + x[3:6], normals @ turn.T


@command_line
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--face_models", nargs="+", default=["mesh"])
    parser.add_argument("--flows", nargs="+", default=["dis"])
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--device", default="cpu", help="of the flow networks and of --photometric")
    args = parser.parse_args(argv)
    folder = DatasetFolder(args.folder)
    every = np.array(folder.valid_ids())
    starts = np.linspace(0, max(0, len(every) - RUN), args.blocks).astype(int)
    chosen = np.unique(np.concatenate([np.arange(s, min(s + RUN, len(every))) for s in starts]))
    held_out = np.searchsorted(starts, chosen, "right") % HELD_OUT == HELD_OUT // 2
    ids = every[chosen]
    pictures = Pictures(folder, ids, held_out)
    scale, centre = 512 / (2 * pictures.centre.max()), pictures.centre

    print(f"{args.folder}: {len(ids)} frames, {held_out.sum()} held out; px at 512\n")
    print("| pose | held-out error, grey levels | jitter, still head, px | rigid tracks missed by, RMS px | kept |")
    print("|---|---|---|---|---|")

    def fitted(name: str) -> Fit:
        fit = fit_clip(load_face_model(name), read_landmarks(folder)[every], every, centre)
        return dataclasses.replace(fit, poses=fit.poses[chosen], expression=fit.expression[chosen])

    mesh = fitted("mesh")
    surface = rigid_surface(mesh)

    for name in args.face_models:
        fit = mesh if name == "mesh" else fitted(name)
        face = placed(*surface, (mesh.poses, mesh.focal), (fit.poses, fit.focal), centre)
        rigid = fit.model.mean[fit.model.rigid]
        refined = refine(fit, folder, ids, centre, args.device, texture_of=np.flatnonzero(~held_out))[0]
        for poses, how in ((fit.poses, ""), (refined.poses, " --photometric")):
            jitter, _ = still_jitter(rigid_pixels(poses, fit.focal, rigid, centre) * scale, ids)
            print(f"| --use_3dmm{how}, {name} | {pictures.error(*face, poses, fit.focal):.2f} | {jitter} | | |", flush=True)
        for flow in args.flows:
            tracks = track(fit, folder, ids, centre, load_flow(flow, args.device), read_blink(folder)[ids])
            start = Bundle(fit.poses, tracks.points, fit.focal)
            bundle, keep = adjust(start, tracks, ids, centre, structure=np.flatnonzero(~held_out))
            kept = dataclasses.replace(tracks, pixels=tracks.pixels[:, keep], visible=tracks.visible[:, keep])
            told = facts(bundle, start, kept, rigid_observations(bundle, kept, centre), ids, centre, rigid)
            share = f"{len(keep)} of {len(tracks.points)} points, {told['rigid_share']:.0%} of their views"
            jitter = f"{told['still_jitter_px']} (tracks {told['still_jitter_tracks_px']})"
            missed = f"{pictures.error(*face, bundle.poses, bundle.focal):.2f} | {jitter} | {told['reprojection_error_px']}"
            print(f"| {flow}, {name} | {missed} | {share} |", flush=True)


if __name__ == "__main__":
    main()
