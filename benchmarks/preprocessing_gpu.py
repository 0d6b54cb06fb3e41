"""Speed of the preprocessing networks on a device: BiSeNet (stage 3) and RAFT-small (stage 8), in frames a second.

    python benchmarks/preprocessing_gpu.py [--device cuda] [--frames 400] [--references 4]

Needs no weights and no clip: the speed of a network does not hang on its weights, so they are random, and so are the pictures
(512 x 512 JPEG of the size that frames have). Stage 3 runs as process.py runs it, with reading, batching and writing. Of stage 8
the flow is run both ways between each reference and each frame, on crops of the rigid face of dfrf_cnn2's size, with the warp
before it. Prints both, and what they make of five minutes of video.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
import torch

from data_utils import face_parsing
from data_utils.face_parsing.bisenet import BiSeNetNetwork
from data_utils.optical_flow.raft import RaftFlow, RaftSmall
from data_utils.per_frame import ordered_map
from utils.constants import FPS, IMAGE_SIZE
from utils.dataset_folder import DatasetFolder
from utils.device import choose_device
from utils.files import write_npz
from utils.image import read_rgb, write_rgb

FIVE_MINUTES = 300 * FPS
CROP = (200, 264)  # height, width of the rigid region of dfrf_cnn2 with its margin


def picture(random: np.random.Generator) -> np.ndarray:
    """(S, S, 3) uint8 with detail at all scales."""
    image = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    for cells in (4, 16, 64, 256):
        small = random.normal(0, 1, (cells, cells, 3)).astype(np.float32)
        image += cv2.resize(small, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_CUBIC) * (30 / cells**0.5)
    return np.clip(image + 128, 0, 255).astype(np.uint8)


def parsing_speed(folder: DatasetFolder, frames: int, device: str) -> float:
    """Frames a second of stage 3, the second half of the frames (the first warms up)."""
    found = np.ones(frames, bool)
    write_npz(folder.face_landmarks, found=found, points=np.zeros((frames, 478, 3), np.float32))
    torch.save(BiSeNetNetwork().state_dict(), folder.root / "79999_iter.pth")
    options = argparse.Namespace(parsing="bisenet", device=device, force=False)
    for i in range(frames // 2, frames):  # done before: these are left out of the first run
        folder.parsing(i).parent.mkdir(exist_ok=True)
        folder.parsing(i).write_bytes(b"IEND\xaeB`\x82")
    face_parsing.run(folder, options)
    for i in range(frames // 2, frames):
        folder.parsing(i).unlink()
    start = time.monotonic()
    done = face_parsing.run(folder, options)["parsed_now"]
    return done / (time.monotonic() - start)


def flow_speed(folder: DatasetFolder, frames: int, references: int, device: str) -> float:
    """Frames a second of reading, warping and RAFT both ways between each frame and every reference."""
    torch.save(RaftSmall().state_dict(), folder.root / "raft.pth")
    flow = RaftFlow("raft", "raft_small").load(device, folder.root / "raft.pth")
    height, width = CROP
    there = np.stack(np.meshgrid(np.arange(width) + 150.3, np.arange(height) + 90.6), -1).astype(np.float32)
    still = [read_rgb(folder.frame(r))[90 : 90 + height, 150 : 150 + width] for r in range(references)]

    def follow(indices: range) -> None:
        images = [read_rgb(folder.frame(i)) for i in indices]
        for reference in still:
            warped = [cv2.remap(image, there, None, cv2.INTER_LINEAR) for image in images]
            flow.flows([reference] * len(warped), warped)
            flow.flows(warped, [reference] * len(warped))

    batches = [range(i, min(i + flow.batch, frames)) for i in range(0, frames, flow.batch)]
    warm = max(1, len(batches) // 4)
    list(ordered_map(follow, batches[:warm]))
    start = time.monotonic()
    list(ordered_map(follow, batches[warm:]))
    return sum(map(len, batches[warm:])) / (time.monotonic() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--frames", type=int, default=400)
    parser.add_argument("--references", type=int, default=4, help="of the head stabiliser, 4 at most")
    args = parser.parse_args()
    device = str(choose_device(args.device))
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, {args.frames} frames")
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as root:
        os.environ["SGT_MODELS"] = root
        folder = DatasetFolder(Path(root))
        for i in range(args.frames):
            write_rgb(folder.frame(i), picture(random))
        print(f"  a frame takes {folder.frame(0).stat().st_size / 1000:.0f} kB")
        for label, speed in (
            ("stage 3, bisenet", parsing_speed(folder, args.frames, device)),
            (f"stage 8, raft, {args.references} references", flow_speed(folder, args.frames, args.references, device)),
        ):
            print(f"  {label:32} {speed:7.1f} frames/s, five minutes of video in {FIVE_MINUTES / speed:5.0f} s", flush=True)


if __name__ == "__main__":
    main()
