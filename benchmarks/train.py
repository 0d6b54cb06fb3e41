"""Train a recipe, time its steps and measure held-out PSNR, on any device; needs neither PyAV nor mediapipe.

    python benchmarks/train.py -s data/x --configs arguments/custom.py [any setting of train.py]

Prints milliseconds a step of each stage (median over the stage, synchronised), peak device memory, and PSNR of the held-out
frames: head over the true torso and plate against the raw frames, as metrics.py measures it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import arguments
import train
from gaussian_renderer import render_batch
from gaussian_renderer.compositing import composite, from_bytes
from scene import load_avatar
from utils.constants import HEAD_CLASSES
from utils.image_metrics import psnr


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def held_out(trainer: train.Trainer) -> tuple[float, float]:
    """Mean PSNR (dB) of the held-out frames: full picture, head."""
    reader, device = trainer.scene.reader, trainer.device
    head = load_avatar(trainer.scene.model_path, device=device)
    full, of_head = [], []
    for i in reader.splits["val"]:
        with torch.inference_mode():
            drawn = render_batch(head, reader.conditions([i]).to(device), reader.width, reader.height)
            backdrop, truth = (from_bytes(torch.from_numpy(x)[None].to(device)) for x in (reader.backdrop(i), reader.image(i)))
            picture = composite(drawn.rgb, drawn.alpha, backdrop, 0.0).clamp(0, 1)
            mask = torch.from_numpy(np.isin(reader.parsing(i), HEAD_CLASSES))[None, None].float().to(device)
            full.append(float(psnr(picture, truth)))
            of_head.append(float(psnr(picture, truth, mask)))
    return statistics.mean(full), statistics.mean(of_head)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_arguments(parser)
    config = arguments.merge(parser.parse_args())
    trainer = train.Trainer(config)
    begin = time.monotonic()
    stages = (("coarse", trainer.coarse_data, config.coarse_iterations), ("fine", trainer.fine_data, config.iterations))
    for name, data, end in stages:
        times = []
        for batch in data.batches(trainer.iteration, end):
            start = time.monotonic()
            trainer.step(batch)
            synchronise(trainer.device)
            times.append(1000 * (time.monotonic() - start))
        step, count = statistics.median(times), len(trainer.head.gaussians)
        print(f"{name:7} {len(times):6d} steps of {data.batch_size:3d} {step:8.1f} ms, {count} surfels", flush=True)
    seconds = time.monotonic() - begin
    trainer.head.save(trainer.scene.model_path)
    if trainer.device.type == "cuda":
        print(f"peak device memory {torch.cuda.max_memory_allocated(trainer.device) / 2**30:.2f} GiB")
    full, of_head = held_out(trainer)
    print(f"trained in {seconds:.0f} s; held-out PSNR {full:.2f} dB full frame, {of_head:.2f} dB head")


if __name__ == "__main__":
    main()
