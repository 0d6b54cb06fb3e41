"""Measure the rendered test frames against what was filmed: results.json and per_view.json in the model folder.

    python render.py -m model/x --skip_train
    python metrics.py -m model/x
    python metrics.py --compare model/x model/y      # both measured: one table, and their worst frames in one picture

Reads the PNG frames that render.py wrote, which no codec has touched. Lip opening, its lag and the jitter are measured on
both sides with the same landmark detector, and the filmed frames' own jitter stands beside ours.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from data_utils.landmarks import FaceLandmarker, to_68
from gaussian_renderer.compositing import composite, from_bytes
from gaussian_renderer.paste import Backdrops
from scene.talking_dataset_readers import TalkingDatasetReader
from utils import image_metrics as measure
from utils.compare_models import compare
from utils.constants import IMAGE_SIZE, PART_CLASSES
from utils.device import choose_device
from utils.errors import UserError, command_line
from utils.files import read_json, writable, write_json
from utils.image import read_rgb
from utils.perceptual import Lpips, PerceptualLoss
from utils.pipeline import prefetch
from utils.progress import progress
from utils.syncnet import load_syncnet, scores

BATCH = 4
BEHIND = {"none": "torso and background plate", "headless": "the filmed torso and background (--paste headless)",
          "original": "the filmed frame (--paste original)"}  # fmt: skip
RING = 6  # half width of the neck ring and of the head's rim, pixels at 512
# name, unit, better; the rest of a line of the table is the value
TABLE = (
    ("PSNR", "dB", "higher"), ("PSNR_head", "dB", "higher"), ("SSIM", "", "higher"), ("STLPIPS_alex", "", "lower"),
    ("LPIPS_alex", "", "lower"), ("LPIPS_vgg", "", "lower"),
    ("LMD_px", "px", "lower"), ("LMD", "eye distances", "lower"), ("LipCorrelation", "", "higher"), ("LipLag", "frames", "0"),
    ("EyeCorrelation", "", "higher"),
    ("LSE_D", "", "lower"), ("LSE_D_gt", "", "the filmed frames' own"), ("LSE_C", "", "higher"),
    ("LSE_C_gt", "", "the filmed frames' own"), ("AVOffset", "frames", "0"), ("AVOffset_gt", "frames", "the filmed frames' own"),
    ("Jitter", "px", "lower"), ("Jitter_gt", "px", "the filmed frames' own"), ("Flicker", "of 255", "lower"),
    ("Flicker_gt", "of 255", "the filmed frames' own"), ("Seam", "of 255", "lower"),
    ("Seam_true_head", "of 255", "the filmed head put on the same way"), ("Seam_body", "of 255", "lower"),
    ("Seam_body_true_head", "of 255", "the filmed head put on the same way"), ("Seam_head", "of 255", "lower"),
    ("Error_head", "of 255", "all of the head, beside its side of the seam"), ("Seam_rim", "of 255", "lower"),
    ("Seam_rim_true_head", "of 255", "the filmed head put on the same way"), ("FacesFound", "share", "1"),
    ("FPS_network_raster", "frames/s", "higher"), ("FPS_memory", "frames/s", "higher"), ("FPS_mp4", "frames/s", "higher"),
)  # fmt: skip


def rendered_folder(model: Path, split: str, iteration: int) -> Path:
    """<model>/<split>/ours_N with a complete set of frames; iteration -1 is the latest. Raises UserError if there is none."""
    found = {int(path.parent.name[5:]): path.parent for path in model.glob(f"{split}/ours_*/frames.json")
             if re.fullmatch(r"ours_\d+", path.parent.name)}  # fmt: skip
    wanted = max(found, default=None) if iteration < 0 else iteration
    if wanted not in found:
        more = "--skip_train" if split == "test" else "--skip_test --pictures"
        raise UserError(f"{model} holds no complete {split} frames{'' if iteration < 0 else f' of iteration {iteration}'}; "
                        f"run render.py -m {model} {more}")  # fmt: skip
    return found[wanted]


def find_landmarks(folder: Path, count: int, label: str) -> np.ndarray:
    """(F, 68, 2) pixels of the largest face in 00000.png, 00001.png, ...; NaN where none is found."""
    marks = np.full((count, 68, 2), np.nan)
    with FaceLandmarker(video=True) as landmarker:
        for k, image in enumerate(prefetch(lambda k: read_rgb(folder / f"{k:05d}.png"), progress(range(count), label=label))):
            faces = landmarker.detect(image)
            if faces:
                marks[k] = to_68(max(faces, key=lambda face: face.height).points)
    return marks


def picture_metrics(folder: Path, facts: dict, reader: TalkingDatasetReader, device: torch.device) -> dict[str, np.ndarray]:
    """Per-frame values (F,) of everything measured on pixels."""
    distances = {"STLPIPS_alex": PerceptualLoss("alex").to(device)} | lpips_distances(device)
    part = PART_CLASSES[facts["part"]]
    backdrops = Backdrops(reader, facts["part"], facts.get("paste", "none"))
    radius = max(1, round(RING * reader.width / IMAGE_SIZE))

    def load(start: int) -> tuple[torch.Tensor, ...]:
        numbers = range(start, min(start + BATCH, len(facts["ids"])))
        ids = [facts["ids"][k] for k in numbers]
        pictures = [np.stack([read_rgb(folder / kind / f"{k:05d}.png") for k in numbers]) for kind in ("renders", "gt")]
        classes = [reader.parsing(i) for i in ids]
        masks = [np.stack([np.isin(c, PART_CLASSES["head"]) for c in classes]), np.stack([np.isin(c, part) for c in classes])]
        masks += [np.stack([seam(c, part, radius) for c in classes]) for seam in (measure.neck_ring, measure.head_rim)]
        pictures.append(backdrops.batch(ids))
        return *(torch.from_numpy(p) for p in pictures), *(torch.from_numpy(m)[:, None] for m in masks)

    values: dict[str, list[np.ndarray]] = {}
    recent = {"Flicker": [], "Flicker_gt": []}  # the last two frames of each, with the head's mask
    starts = progress(range(0, len(facts["ids"]), BATCH), label="pictures", unit="batch")
    for batch in prefetch(load, starts, ahead=2):
        rendered, true, backdrop = (from_bytes(pictures.to(device)) for pictures in batch[:3])
        head, shape, ring, rim = (mask.to(device).float() for mask in batch[3:])
        true_head = composite(true * shape, shape, backdrop, facts["feather"])
        for name, value in {
            "PSNR": measure.psnr(rendered, true),
            "PSNR_head": measure.psnr(rendered, true, head),
            "SSIM": measure.ssim(rendered, true),
            "Seam": measure.masked_error(rendered, true, ring),
            "Seam_true_head": measure.masked_error(true_head, true, ring),
            "Seam_body": measure.masked_error(rendered, true, ring * (1 - shape)),
            "Seam_body_true_head": measure.masked_error(true_head, true, ring * (1 - shape)),
            "Seam_head": measure.masked_error(rendered, true, ring * shape),
            "Seam_rim": measure.masked_error(rendered, true, rim),
            "Seam_rim_true_head": measure.masked_error(true_head, true, rim),
            "Error_head": measure.masked_error(rendered, true, head),
            **{name: distance(rendered, true) for name, distance in distances.items()},
        }.items():
            values.setdefault(name, []).append(value.cpu().numpy())
        for (name, held), pictures in zip(recent.items(), (rendered, true), strict=True):
            held += zip(pictures, head, strict=True)
            shimmer = [measure.flicker(a[None], b[None], c[None], mask[None]) for (a, _), (b, mask), (c, _) in windows(held, 3)]
            values.setdefault(name, []).append(np.array([float(value) for value in shimmer]))
            del held[:-2]
    result = {name: np.concatenate(parts) for name, parts in values.items()}
    steady = np.ptp(np.array(windows(facts["ids"], 3)).reshape(-1, 3), axis=1) == 2  # consecutive frames of the clip
    for name in recent:
        result[name] = np.pad(np.where(steady, result[name], np.nan), 1, constant_values=np.nan)[: len(facts["ids"])]
    return result


def windows(items: list, count: int) -> list[list]:
    """All runs of `count` neighbours."""
    return [items[k : k + count] for k in range(len(items) - count + 1)]


def lpips_distances(device: torch.device) -> dict[str, Callable]:
    """LPIPS on AlexNet and VGG where the packages lpips and torchvision are, and their weights can be had; else nothing."""
    try:
        import lpips  # noqa: F401
    except (ImportError, RuntimeError):  # RuntimeError: a torchvision that does not fit this torch
        return {}
    networks = {}
    for net in ("alex", "vgg"):
        try:
            networks[f"LPIPS_{net}"] = Lpips(net).to(device)
        except UserError as error:
            print(f"warning: LPIPS ({net}) is left out: {error}", file=sys.stderr)
    return networks


def face_metrics(folder: Path, count: int, samples: np.ndarray,
                 device: torch.device) -> tuple[dict[str, np.ndarray], dict[str, float]]:  # fmt: skip
    """Per-frame and whole-clip values of the landmarks on our frames and the filmed ones, whose sound is `samples`."""
    rendered, true = (find_landmarks(folder / kind, count, f"landmarks ({kind})") for kind in ("renders", "gt"))
    pixels, relative = measure.lmd(rendered, true)
    openings = measure.lip_opening(rendered), measure.lip_opening(true)
    correlation, lag = measure.correlation_and_lag(*openings)
    eyes = measure.eye_opening(rendered), measure.eye_opening(true)
    frames = {"LMD_px": pixels, "LMD": relative, "LipOpening": openings[0], "LipOpening_gt": openings[1],
              "EyeOpening": eyes[0], "EyeOpening_gt": eyes[1]}  # fmt: skip
    clip = {"LipCorrelation": correlation, "LipLag": lag, "EyeCorrelation": measure.correlation_at(*eyes, 0)}
    clip["FacesFound"] = float(np.isfinite(rendered[:, 0, 0]).mean())
    network = load_syncnet()
    for suffix, kind, marks in (("", "renders", rendered), ("_gt", "gt", true)):

        def pictures(kind: str = kind) -> Iterator[np.ndarray]:
            return prefetch(lambda k: read_rgb(folder / kind / f"{k:05d}.png"), range(count))

        clip[f"Jitter{suffix}"] = measure.jitter(pictures(), marks)
        if network is not None and np.isfinite(marks).any():
            synced = scores(network.to(device), pictures(), marks, samples)
            clip |= {f"{name}{suffix}": value for name, value in synced.items()}
    return frames, clip


def evaluate(model: Path, split: str = "test", iteration: int = -1, source: Path | None = None,
             device: torch.device | str = "cpu") -> dict:  # fmt: skip
    """Measure, write results.json and per_view.json, and return this iteration's results. Raises UserError."""
    folder = rendered_folder(model, split, iteration)
    facts = read_json(folder / "frames.json")
    writable(model)  # before minutes of measuring
    reader = TalkingDatasetReader(source or facts["source_path"], facts["audio_encoder"])
    with torch.inference_mode():
        frames = picture_metrics(folder, facts, reader, torch.device(device))
        of_faces, clip = face_metrics(folder, len(facts["ids"]), reader.sound(facts["ids"]), torch.device(device))
    speed, measured_on = known_speed(model, facts["iteration"])
    clip |= speed
    frames |= of_faces
    means = {name: float(np.nanmean(value)) if np.isfinite(value).any() else float("nan") for name, value in frames.items()}
    results = {name: _plain((means | clip)[name]) for name, *_ in TABLE if name in means | clip}
    results["protocol"] = {
        "frames": len(facts["ids"]), "split": split, "iteration": facts["iteration"], "size": [reader.width, reader.height],
        "pictures": "raw frames (PNG), never re-encoded; head with feather "
                    f"{facts['feather']} px at 512 over {BEHIND[facts.get('paste', 'none')]}, against the filmed frames",
        "region": "full frame; PSNR_head: head classes of parsing/ (face, hair, ears, hat); Seam: within "
                  f"{RING} px (at 512) of both the rendered part ({facts['part']}) and the body; Seam_body and Seam_head: the two "
                  f"sides of it, of which the head's holds whatever error the head has; Seam_rim: within {RING} px of both the "
                  "rendered part and the rest of the picture, away from that seam",
        "averages": "mean over frames of each frame's value; correlation, lag, jitter and LSE over the clip",
        "landmarks": "MediaPipe FaceLandmarker on both sides, 68 of its points",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {_name(torch.device(device))}, torch {torch.__version__}",
    }  # fmt: skip
    if measured_on:
        results["protocol"]["speed"] = measured_on
    names = [f"{k:05d}.png" for k in range(len(facts["ids"]))]
    per_view = {name: dict(zip(names, map(_plain, value.tolist()), strict=True)) for name, value in frames.items()}
    key = folder.name if split == "test" else f"{folder.name}_{split}"
    for path, value in ((model / "results.json", results), (model / "per_view.json", per_view)):
        write_json(path, (read_json(path) if path.exists() else {}) | {key: value})
    return results


def known_speed(model: Path, iteration: int) -> tuple[dict[str, float], str]:
    """Frames a second of the largest batch that benchmarks/speed.py timed of this iteration, and where; empty if it did not."""
    path = model / "speed.json"
    facts = read_json(path) if path.exists() else {}
    if facts.get("iteration") != iteration:
        return {}, ""
    batch = max(facts["batch"], key=int)
    fps = facts["batch"][batch]["fps"]
    names = {"FPS_network_raster": "network + raster", "FPS_memory": "to memory", "FPS_mp4": "to mp4"}
    return {name: fps[key] for name, key in names.items()}, f"benchmarks/speed.py, batch {batch}, {facts['machine']}"


def _plain(value: float) -> float | None:
    """JSON has no NaN."""
    return None if value is None or np.isnan(value) else round(value, 6)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU used"


@command_line
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("-m", "--model_path", type=Path, help="model folder whose rendered frames are measured")
    what.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="two measured models, side by side")
    parser.add_argument("-s", "--source_path", type=Path, help="data set folder (default: the one that was rendered)")
    parser.add_argument("--iteration", type=int, default=-1, help="which rendering (default: the latest iteration)")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="which frames (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    args = parser.parse_args(argv)
    if args.compare:
        lines, sheet = compare(tuple(args.compare), TABLE, args.split, args.iteration)
        print(f"A {args.compare[0]}\nB {args.compare[1]}", *lines, sheet, sep="\n")
        return
    results = evaluate(args.model_path, args.split, args.iteration, args.source_path, choose_device(args.device))
    protocol = results["protocol"]
    print(f"{args.model_path}, {args.split} split, iteration {protocol['iteration']}, {protocol['frames']} frames, raw pictures")
    for name, unit, better in TABLE:
        if name not in results:
            continue
        value = "none" if results[name] is None else f"{results[name]:.4g}"
        print(f"  {name:20} {value:>8} {unit:14} {better}")


if __name__ == "__main__":
    main()
