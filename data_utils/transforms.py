"""Stage 10: poses of the usable frames -> transforms_train.json and transforms_val.json."""

from __future__ import annotations

import argparse

import torch

from utils.constants import DM_PER_M, TRAIN_SPLIT
from utils.dataset_folder import DatasetFolder
from utils.errors import UserError
from utils.files import write_json
from utils.image import read_rgb
from utils.pose import camera_to_world, euler_to_matrix

METRES_PER_UNIT = {"bundle_adjustment.pt": 1.0, "track_params.pt": 1 / DM_PER_M}


def run(folder: DatasetFolder, options: argparse.Namespace) -> dict:
    """The pose is the bundle adjustment's, or with options.use_3dmm the tracker's; UserError if it does not cover the clip."""
    source = folder.require(folder.track_params if options.use_3dmm else folder.bundle_adjustment)
    params = torch.load(source, weights_only=True)
    ids = folder.valid_ids()
    if len(params["euler"]) <= max(ids):
        raise UserError(f"{source} has {len(params['euler'])} poses, but frame {max(ids)} is in use; run process.py --task 7 again")
    height, width = read_rgb(folder.require(folder.frame(ids[0]))).shape[:2]
    matrices = camera_to_world(euler_to_matrix(params["euler"].double()), params["trans"].double() * METRES_PER_UNIT[source.name])
    train, val = split(ids)
    for name, part in (("train", train), ("val", val)):
        frames = [{"img_id": i, "aud_id": i, "transform_matrix": matrices[i].tolist()} for i in part]
        write_json(folder.transforms(name), {
            "focal_len": float(params["focal"][0]), "cx": width / 2, "cy": height / 2, "unit": "m",
            "width": width, "height": height, "frames": frames,
        })  # fmt: skip
    return {"backend": "3dmm" if options.use_3dmm else "flow", "train": len(train), "val": len(val), "warnings": []}


def split(ids: list[int]) -> tuple[list[int], list[int]]:
    """(training, validation) ids: the first int(F * 10 / 11) of the usable frames train, in time order, the rest validates."""
    count = len(ids) * TRAIN_SPLIT[0] // TRAIN_SPLIT[1]
    return ids[:count], ids[count:]
