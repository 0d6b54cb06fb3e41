"""What the tokens attend to: do the attention maps of a trained head mean something?

    python benchmarks/attention.py -m model/x [--frames 40]

Draws held-out frames with their attention and prints the mean weight of each token (a share of 1 a pixel, weighted by alpha)
within regions of the filmed head: the lower face (below the tip of the nose, face classes of parsing/), the eyes and brows
(boxes around their landmarks), and the rest of the head outside each. The last lines are the two ratios that count.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arguments import read_cfg_args
from gaussian_renderer import render_batch
from scene import load_avatar
from scene.talking_dataset_readers import TalkingDatasetReader
from utils.constants import FACE_CLASSES, HEAD_CLASSES
from utils.device import choose_device
from utils.errors import UserError, command_line

NOSE_TIP = 30  # landmark
EYES = (slice(17, 22), slice(36, 42)), (slice(22, 27), slice(42, 48))  # brow and eye of either side
MARGIN = 0.25  # of the box around a brow and its eye


def regions(classes: np.ndarray, landmarks: np.ndarray) -> dict[str, np.ndarray]:
    """(H, W) bool each: the lower face, eyes and brows, and what of the head lies outside them."""
    head, face = np.isin(classes, HEAD_CLASSES), np.isin(classes, FACE_CLASSES)
    rows = np.arange(len(classes))[:, None]
    lower = face & (rows > landmarks[NOSE_TIP, 1])
    eyes = np.zeros_like(head)
    for parts in EYES:
        points = np.concatenate([landmarks[part] for part in parts])
        pad = MARGIN * np.ptp(points[:, 0])
        (left, top), (right, bottom) = np.maximum(points.min(0) - pad, 0).astype(int), (points.max(0) + pad + 1).astype(int)
        eyes[top:bottom, left:right] = True
    eyes &= head
    return {"lower face": lower, "outside it": head & ~lower, "eyes and brows": eyes, "outside them": head & ~eyes}


@torch.inference_mode()
def measure(model: Path, frames: int, device: torch.device, source: Path | None = None) -> dict[str, dict[str, float]]:
    """Token -> region -> mean attention over `frames` held-out frames spread evenly."""
    reader = TalkingDatasetReader(source or read_cfg_args(model).source_path, read_cfg_args(model).audio_encoder)
    head = load_avatar(model, device=device)
    ids = reader.splits["val"][:: max(1, len(reader.splits["val"]) // frames)][:frames]
    if not ids:
        raise UserError(f"{reader.folder.root} has no held-out frames to look at; process a longer clip")
    weights: dict[str, dict[str, float]] = {name: {} for name in head.token_names}
    pixels: dict[str, float] = {}
    for i in ids:
        drawn = render_batch(head, reader.conditions([i]).to(device), reader.width, reader.height, attention=True)
        maps, alpha = drawn.attention[0].cpu().numpy(), drawn.alpha[0, 0].cpu().numpy()
        for region, mask in regions(reader.parsing(i), reader.landmarks(i)).items():
            pixels[region] = pixels.get(region, 0.0) + alpha[mask].sum()
            for name, values in zip(head.token_names, maps, strict=True):
                weights[name][region] = weights[name].get(region, 0.0) + values[mask].sum()
    shares = {region: max(count, 1e-9) for region, count in pixels.items()}
    return {name: {region: float(total / shares[region]) for region, total in of.items()} for name, of in weights.items()}


@command_line
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model_path", type=Path, required=True)
    parser.add_argument("-s", "--source_path", type=Path, help="data set folder (default: the one the model was trained on)")
    parser.add_argument("--frames", type=int, default=40)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    table = measure(args.model_path, args.frames, choose_device(args.device), args.source_path)
    names = list(next(iter(table.values())))
    print(f"{'':12}" + "".join(f"{region:>16}" for region in names))
    for name, of in table.items():
        print(f"{name:12}" + "".join(f"{of[region]:16.3f}" for region in names))
    for name, inside, outside, wanted in (("audio", *names[:2], 2.0), ("expression", *names[2:], 1.5)):
        if name in table:
            ratio = table[name][inside] / max(table[name][outside], 1e-9)
            print(f"{name}: {ratio:.2f} times as much {inside} as {outside} (wanted: {wanted})")


if __name__ == "__main__":
    main()
