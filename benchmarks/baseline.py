"""The copy-nearest-training-frame baseline: what a rendering is worth that only looks frames up.

    python benchmarks/baseline.py -s data/x            # writes model/x_nearest/test/ours_0 as render.py would
    python metrics.py -m model/x_nearest               # and measures it like any model
    python benchmarks/baseline.py -s data/x --own_head # the head each frame was filmed with: what no model can surpass

Rule: for each held-out frame, the training frame with the least sum of squares of (a) how far the head's pose moves its face on
the picture, in units of 2 pixels at 512, and (b) the distance of the speech features of rows i-1 .. i+1 (standardised), in
units of the median distance between a held-out frame and the training frame whose sound is nearest. Its head (the classes of
parsing/) is cut out and put over the held-out frame's own torso and background, as a rendering is (--paste none: over the still
plate).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gaussian_renderer.paste import Backdrops
from scene.cameras import intrinsics
from scene.initial_points import read_face
from scene.talking_dataset_readers import TalkingDatasetReader
from utils.constants import IMAGE_SIZE, PART_CLASSES
from utils.errors import command_line
from utils.files import write_json
from utils.image import write_rgb
from utils.progress import progress

PIXELS = 2.0  # at 512: a pose this far away counts as much as the nearest sound


def nearest_frames(reader: TalkingDatasetReader) -> list[int]:
    """The training frame that stands in for each held-out frame."""
    train, val = (torch.tensor(reader.splits[split]) for split in ("train", "val"))
    points = read_face(reader).points[::50]
    matrix = intrinsics(reader.focal, reader.cx, reader.cy)

    def projected(ids: torch.Tensor) -> torch.Tensor:
        view = reader.views[ids]
        camera = (points @ view[:, :3, :3].transpose(1, 2) + view[:, None, :3, 3]) @ matrix.T
        return (camera[..., :2] / camera[..., 2:]).flatten(1) / len(points) ** 0.5

    def heard(ids: torch.Tensor) -> torch.Tensor:
        rows = reader.audio_rows[ids][:, None] + torch.arange(-1, 2)
        return audio[rows.clamp(0, len(audio) - 1)].flatten(1)

    audio = torch.from_numpy(reader.audio)
    known = audio[reader.audio_rows[train]]
    audio = (audio - known.mean(0)) / known.std(0).clamp_min(1e-4)
    pose = torch.cdist(projected(val), projected(train)) / (PIXELS * reader.width / IMAGE_SIZE)
    sound = torch.cdist(heard(val), heard(train))
    sound /= sound.amin(1).median()
    return train[(pose.square() + sound.square()).argmin(1)].tolist()


@command_line
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-s", "--source_path", type=Path, required=True, help="data set folder")
    parser.add_argument("-m", "--model_path", type=Path, help="folder to write (model/<name>_nearest, or _own_head)")
    parser.add_argument("--part", choices=("face", "head"), default="head", help="what the training frame gives (%(default)s)")
    parser.add_argument("--own_head", action="store_true", help="paste each frame's own head: the limit that the backdrop sets")
    parser.add_argument("--paste", choices=("none", "headless"), default="headless", help="over the filmed torso and background "
                        "(headless), or over the torso and the still plate (none) (%(default)s)")  # fmt: skip
    parser.add_argument("--audio_encoder", default="auto", help="which aud_<encoder>.npy says what is near (%(default)s)")
    args = parser.parse_args(argv)
    reader = TalkingDatasetReader(args.source_path, args.audio_encoder)
    name = f"{args.source_path.resolve().name}_{'own_head' if args.own_head else 'nearest'}"
    folder = (args.model_path or Path("model") / name) / "test" / "ours_0"
    (folder / "frames.json").unlink(missing_ok=True)
    val = reader.splits["val"]
    given = val if args.own_head else nearest_frames(reader)
    backdrops = Backdrops(reader, args.part, args.paste)
    for k, (i, j) in enumerate(zip(val, progress(given, label="pasting"), strict=True)):
        mask = np.isin(reader.parsing(j), PART_CLASSES[args.part])[..., None]
        write_rgb(folder / "renders" / f"{k:05d}.png", np.where(mask, reader.image(j), backdrops[i]))
        write_rgb(folder / "gt" / f"{k:05d}.png", reader.image(i))
    write_json(folder / "frames.json", {
        "ids": val, "iteration": 0, "part": args.part, "feather": 0.0, "paste": args.paste,
        "source_path": str(reader.folder.root.resolve()), "audio_encoder": reader.encoder,
    })  # fmt: skip
    print(f"{folder}: {len(val)} frames; next: python metrics.py -m {folder.parents[1]}")


if __name__ == "__main__":
    main()
