"""Score what `make demo` made against the synthetic head's ground truth (issue bars: PSNR 28 dB, lips 0.8, pose 1.5 degrees).

    python benchmarks/demo.py [--data data/demo] [--model model/demo]
    python benchmarks/demo.py --data data/demo --pose        # only the estimated poses

Needs the finished demo: data set, trained model, rendered test split with metrics.py's results.json, rendered speech; with --pose
the data set alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_utils.bundle_adjustment import read_bundle_adjustment
from data_utils.face_tracking import rigid_pixels
from data_utils.face_tracking.facemodel import load_face_model
from data_utils.landmarks import FaceLandmarker, to_68
from data_utils.pose_solver import Poses, still_jitter
from scene.talking_dataset_readers import TalkingDatasetReader
from utils.dataset_folder import DatasetFolder
from utils.errors import UserError, command_line
from utils.files import read_json
from utils.image_metrics import correlation_and_lag, lip_opening
from utils.pose import FLIP, euler_to_matrix
from utils.video import read_frames


def pose_errors(views: torch.Tensor, euler: torch.Tensor, trans: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimated views (F, 4, 4) against true tracker poses (F, 3), (F, 3): angle in degrees and camera distance error, per frame.

    The two heads may be placed differently in their own frames, and be larger and farther alike: one similarity over the whole
    clip is taken out.
    """
    flip = torch.tensor(FLIP)
    true = flip[:, None] * euler_to_matrix(euler)
    estimated = views[:, :3, :3]
    u, _, vt = torch.linalg.svd((estimated.transpose(1, 2) @ true).sum(0))
    align = u @ torch.diag(torch.tensor([1.0, 1.0, float(torch.linalg.det(u @ vt))])) @ vt  # estimated R @ align = true R
    cosine = ((estimated @ align @ true.transpose(1, 2)).diagonal(dim1=1, dim2=2).sum(1) - 1) / 2
    # scale x t_true = t_estimated + R_estimated s for one shift s of the origin and one scale, which pictures cannot tell
    unknown = torch.cat([estimated, -(flip * trans)[..., None]], 2).double()
    given = views[:, :3, 3].double()
    solution = torch.linalg.lstsq(unknown.reshape(-1, 4), -given.reshape(-1, 1)).solution[:, 0]
    residual = (unknown @ solution + given).norm(dim=1) / given.norm(dim=1)
    return torch.rad2deg(torch.acos(cosine.clamp(-1, 1))), residual


def print_pose(folder: DatasetFolder, truth: np.lib.npyio.NpzFile) -> None:
    """How far the poses of a data set are from the true ones, and how much they tremble where the true head is still."""
    reader = TalkingDatasetReader(folder.root)
    ids = np.array(reader.ids)
    euler, trans = (torch.from_numpy(truth[name]) for name in ("euler", "trans"))
    angle, residual = pose_errors(reader.views[ids], euler[ids], trans[ids])
    print(f"pose error           {angle.square().mean().sqrt():7.3f} degrees RMS, largest {angle.max():.3f}")
    print(f"translation error    {100 * residual.square().mean().sqrt():7.3f} % of the distance, RMS")

    centre, scale = np.array([reader.width, reader.height]) / 2, 512 / reader.width
    poses, focal = read_bundle_adjustment(folder)
    bone = (model := load_face_model("mesh")).mean[model.rigid]
    true = Poses(euler_to_matrix(euler.double()).numpy(), trans.double().numpy())
    seen = scale * rigid_pixels(poses[ids], focal, bone, centre)
    there = scale * rigid_pixels(true[ids], float(truth["focal"]), bone, centre)
    (ours, still), (heads, _) = still_jitter(seen, ids, there), still_jitter(there, ids, there)
    print(f"jitter, still head   {ours:7.3f} px at 512 ({still} frames; the true head's own {heads:.3f})")


def lips_of_video(path: Path) -> np.ndarray:
    """(F,) lip opening of every frame of a video, NaN where no face is found."""
    openings = []
    with FaceLandmarker(video=True) as landmarker:
        for frame in read_frames(path):
            faces = landmarker.detect(frame)
            openings.append(lip_opening(to_68(faces[0].points)[None])[0] if faces else np.nan)
    return np.array(openings)


@command_line
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/demo"))
    parser.add_argument("--model", type=Path, default=Path("model/demo"))
    parser.add_argument("--pose", action="store_true", help="only the poses, no model is needed")
    args = parser.parse_args(argv)
    truth, speech = (np.load(args.data / "truth" / f"{name}.npz") for name in ("truth", "speech"))
    print_pose(DatasetFolder(args.data), truth)
    if args.pose:
        return
    videos = sorted(args.model.glob("custom/ours_*/*_speech_*renders.mp4"), key=lambda p: p.stat().st_mtime)
    if not videos:
        raise UserError(f"{args.model} holds no rendered speech; run make demo first")
    correlation, lag = correlation_and_lag(lips_of_video(videos[-1]), speech["lip_opening"])
    results = read_json(args.model / "results.json")
    held_out = results[videos[-1].parent.name]
    for name in ("PSNR_head", "PSNR", "LipCorrelation", "LipLag"):
        print(f"{'held-out ' + name:20} {held_out[name]:7.2f}")
    print(f"unseen speech        {correlation:7.2f} correlation of the lip opening with its truth, lag {lag} frames")


if __name__ == "__main__":
    main()
