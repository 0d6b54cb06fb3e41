"""How much a head flickers where it should be still, with the frame code moving and held.

    python benchmarks/flicker.py -m model/x [--seconds 2]

Flicker is the mean change (of 255) from one frame to the next of the head's pixels away from mouth and eyes, on the stretch of
the training frames where the filmed head moves least (beyond them the code stands still anyway, and it is these frames that a
rendering replays). Nobody holds quite still, and pixels change as a head turns, which is no flicker: so it is measured twice, with
the pose as filmed, beside the filmed frames' own change, noise of the camera included, and with the pose of the middle frame
throughout, while speech, expression and code go on. PSNR is that of a sample of the training frames and of the held-out ones.
Holding the frame code (render.py --still_frame_code) should take a fifth of the flicker and cost at most 0.3 dB.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arguments import read_cfg_args
from gaussian_renderer import render_batch
from gaussian_renderer.compositing import composite, from_bytes
from scene import TalkingHead, load_avatar
from scene.talking_dataset_readers import TalkingDatasetReader
from utils.constants import FPS, HEAD_CLASSES
from utils.device import choose_device
from utils.errors import UserError, command_line
from utils.image_metrics import psnr

MOVING = (slice(36, 42), slice(42, 48), slice(48, 68))  # eyes and mouth
SAMPLE = 100  # training frames whose PSNR is measured
REACH = 0.25  # of the distance of the outer eye corners: what lies nearer to them is not still


def stillest(reader: TalkingDatasetReader, length: int) -> list[int]:
    """The `length` consecutive training frames in which the pose changes least."""
    ids = reader.splits["train"]
    runs = [ids[k : k + length] for k in range(len(ids) - length + 1)]
    runs = [run for run in runs if run[-1] - run[0] == length - 1]
    if not runs:
        raise UserError(f"{reader.folder.root} has no {length} consecutive training frames; give a smaller --seconds")
    return min(runs, key=lambda run: float((reader.views[run[1:]] - reader.views[run[:-1]]).square().sum()))


def still_pixels(reader: TalkingDatasetReader, i: int) -> np.ndarray:
    """(H, W) bool: the head without the surroundings of eyes and mouth, and without its edge."""
    head = np.isin(reader.parsing(i), HEAD_CLASSES).astype(np.uint8)
    marks = reader.landmarks(i)
    reach = REACH * float(np.linalg.norm(marks[36] - marks[45]))
    moving = np.zeros_like(head)
    for part in MOVING:
        cv2.fillConvexPoly(moving, cv2.convexHull(marks[part]).astype(np.int32), 1)
    side = 2 * int(reach) + 1
    moving = cv2.dilate(moving, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)))
    return (cv2.erode(head, np.ones((5, 5), np.uint8)) > 0) & (moving == 0)


@torch.inference_mode()
def pictures(head: TalkingHead, reader: TalkingDatasetReader, ids: list[int], device: torch.device, pose: int | None = None):
    """Yield (3, H, W) renderings in [0, 1] over what was filmed behind the head; all posed as in frame `pose`, if one is given."""
    behind = (lambda i: reader.plate) if head.config.part == "all" else reader.backdrop
    for i in ids:
        conditions, place = reader.conditions([i]), i if pose is None else pose
        conditions.view = reader.views[[place]]
        drawn = render_batch(head, conditions.to(device), reader.width, reader.height)
        backdrop = from_bytes(torch.from_numpy(behind(place))[None].to(device))
        yield composite(drawn.rgb, drawn.alpha, backdrop).clamp(0, 1)[0].cpu()


def change(frames, masks: list[np.ndarray]) -> float:
    """Mean |difference| (of 255) of consecutive (3, H, W) pictures where both frames' masks are set."""
    last, changes = None, []
    for frame, mask in zip(frames, masks, strict=True):
        if last is not None:
            both = torch.from_numpy(mask & last[1])
            changes.append(float((frame - last[0]).abs()[:, both].mean()) * 255)
        last = frame, mask
    return float(np.mean(changes))


def quality(frames, reader: TalkingDatasetReader, ids: list[int]) -> float:
    truths = (from_bytes(torch.from_numpy(reader.image(i))[None]) for i in ids)
    return float(np.mean([float(psnr(frame[None], truth)) for frame, truth in zip(frames, truths, strict=True)]))


@command_line
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model_path", type=Path, required=True)
    parser.add_argument("-s", "--source_path", type=Path, help="data set folder (default: the one the model was trained on)")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of the still stretch (%(default)s)")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    config, device = read_cfg_args(args.model_path), choose_device(args.device)
    reader = TalkingDatasetReader(args.source_path or config.source_path, config.audio_encoder)
    head = load_avatar(args.model_path, device=device)
    if "frame" not in head.token_names:
        raise UserError(f"{args.model_path} has no frame token to hold still (it has {', '.join(head.token_names)})")
    ids = stillest(reader, max(2, round(args.seconds * FPS)))
    samples = {"training": reader.splits["train"][:: -(-len(reader.splits["train"]) // SAMPLE)], "held-out": reader.splits["val"]}
    masks, middle = [still_pixels(reader, i) for i in ids], len(ids) // 2
    filmed = change((from_bytes(torch.from_numpy(reader.image(i))[None])[0] for i in ids), masks)
    print(f"frames {ids[0]} to {ids[-1]}; the filmed ones change by {filmed:.3f} of 255")
    found, good = {}, {}
    for name, still in (("moving", None), ("held", reader.splits["train"][0])):
        head.deformation.conditions.tokens["frame"].still = still
        good[name] = {split: quality(pictures(head, reader, of, device), reader, of) for split, of in samples.items() if of}
        found[name] = (change(pictures(head, reader, ids, device), masks),
                       change(pictures(head, reader, ids, device, ids[middle]), [masks[middle]] * len(ids)))  # fmt: skip
        print(f"frame code {name:6}: {found[name][0]:.3f} of 255, {found[name][1]:.3f} with the pose held; PSNR "
              + ", ".join(f"{value:.2f} dB {split}" for split, value in good[name].items()))  # fmt: skip
    less = (f"{100 * (1 - after / before):.0f}%" for before, after in zip(found["moving"], found["held"], strict=True))
    lost = (f"{good['moving'][split] - dB:+.2f} dB lost on {split} frames" for split, dB in good["held"].items())
    print("held still: {} less, {} with the pose held; ".format(*less) + ", ".join(lost))


if __name__ == "__main__":
    main()
