"""Stage 10: poses of the usable frames and the sound that belongs to each -> transforms_train.json and transforms_val.json."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from data_utils import av_offset
from data_utils.landmarks import read_dense, to_68
from utils.audio import load_audio
from utils.constants import DM_PER_M, MISSING_ROWS, SAMPLES_PER_FRAME, TRAIN_SPLIT
from utils.dataset_folder import DatasetFolder
from utils.errors import UserError
from utils.files import read_json, write_json
from utils.image import read_rgb
from utils.image_metrics import lip_opening
from utils.pose import camera_to_world, euler_to_matrix

VERSION = 3
METRES_PER_UNIT = {"bundle_adjustment.pt": 1.0, "track_params.pt": 1 / DM_PER_M}


def run(folder: DatasetFolder, options: argparse.Namespace) -> dict:
    """The pose is the bundle adjustment's, or with options.use_3dmm the tracker's; UserError if it does not cover the clip.

    `aud_id` is the row of the features (and the 640 samples of aud.wav) that belong to a frame: its id less the A/V offset. No file
    is rewritten for it. Frames whose sound would lie before the start or after the end of the clip are left out.
    """
    source = folder.require(folder.track_params if options.use_3dmm else folder.bundle_adjustment)
    params = torch.load(source, weights_only=True)
    ids = folder.valid_ids()
    if len(params["euler"]) <= max(ids):
        raise UserError(f"{source} has {len(params['euler'])} poses, but frame {max(ids)} is in use; run process.py --task 7 again")
    height, width = read_rgb(folder.require(folder.frame(ids[0]))).shape[:2]
    matrices = camera_to_world(euler_to_matrix(params["euler"].double()), params["trans"].double() * METRES_PER_UNIT[source.name])
    offset, facts = sound_offset(folder, options.av_offset)
    last = max(ids)
    if folder.audio.exists():
        last = min(last, -(-len(load_audio(folder.audio)) // SAMPLES_PER_FRAME) - 1 + MISSING_ROWS)
    train, val = split([i for i in ids if 0 <= i - offset <= last])
    for name, part in (("train", train), ("val", val)):
        frames = [{"img_id": i, "aud_id": i - offset, "transform_matrix": matrices[i].tolist()} for i in part]
        write_json(folder.transforms(name), {
            "focal_len": float(params["focal"][0]), "cx": width / 2, "cy": height / 2, "unit": "m",
            "width": width, "height": height, "frames": frames,
        })  # fmt: skip
    return {"backend": "3dmm" if options.use_3dmm else "flow", "train": len(train), "val": len(val)} | facts


def pose_file(folder: DatasetFolder) -> Path:
    """The file whose poses the transforms were made from; before they are made, the best there is (which need not exist)."""
    record = folder.state / "transforms.json"
    refined = read_json(record)["facts"]["backend"] != "3dmm" if record.exists() else folder.bundle_adjustment.exists()
    return folder.bundle_adjustment if refined else folder.track_params


def sound_offset(folder: DatasetFolder, wanted: str | int) -> tuple[int, dict]:
    """(frames the sound is moved by, facts for the report): `wanted`, or for "auto" the measured offset where it is sure and more
    than a frame. Negative moves the sound to an earlier time."""
    found, warnings = None, []
    if not folder.audio.exists():
        warnings.append("there is no aud.wav, so nobody knows whether lips and sound are in time; run process.py --task 1")
    else:
        found = av_offset.estimate(load_audio(folder.audio), lip_opening(to_68(read_dense(folder)["points"])))
    worth_it = found is not None and found.sure and abs(found.offset) > av_offset.TOLERANCE
    applied = wanted if wanted != "auto" else found.offset if worth_it else 0
    if worth_it and applied == found.offset:
        warnings.append(f"the sound comes {abs(found.offset)} frames {'late' if found.offset < 0 else 'early'} to the lips and was "
                        "moved by as much; watch the lips in the clip: --av_offset 0 leaves it where it was")  # fmt: skip
    elif worth_it and abs(applied - found.offset) > av_offset.TOLERANCE:
        warnings.append(f"the lips ask for --av_offset {found.offset}, not {applied}; speech will be out of time")
    return applied, {"av_offset_applied": applied, "av_offset": found and dataclasses.asdict(found), "warnings": warnings}


def split(ids: list[int]) -> tuple[list[int], list[int]]:
    """(training, validation) ids: the first int(F * 10 / 11) of the usable frames train, in time order, the rest validates."""
    count = len(ids) * TRAIN_SPLIT[0] // TRAIN_SPLIT[1]
    return ids[:count], ids[count:]
