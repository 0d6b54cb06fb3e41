"""Stage 3, face parsing: parsing/{i}.png, the CelebAMask class of every pixel, for every frame with a face.

A back end is an object with `name`, `available()` and `run(clip, todo, device)` that yields (frame id, (H, W) uint8 classes 0..18)
in the order of `todo`. BACK_ENDS lists them, best first; `auto` takes the first that is available.
"""

from __future__ import annotations

import argparse

import numpy as np

from data_utils.face_parsing.bisenet import BiSeNet
from data_utils.face_parsing.bisenetv2 import BiSeNetV2
from data_utils.face_parsing.clip import Clip
from data_utils.face_parsing.embedded import EmbeddedParsing
from data_utils.per_frame import is_whole, ordered_map
from utils.dataset_folder import DatasetFolder
from utils.errors import UserError
from utils.image import write_parsing
from utils.progress import progress

BACK_ENDS = (BiSeNet(), BiSeNetV2(), EmbeddedParsing())


def choose(name: str):
    """The back end of that name, or the best available one for "auto". Raises UserError if it is unknown or cannot run."""
    if name == "auto":
        return next(b for b in BACK_ENDS if b.available())
    for back_end in BACK_ENDS:
        if back_end.name == name:
            if not back_end.available():
                raise UserError(f"--parsing {name} cannot run: {back_end.needs}; or use --parsing auto")
            return back_end
    raise UserError(f"--parsing {name} is unknown; choose from auto, {', '.join(b.name for b in BACK_ENDS)}")


def run(folder: DatasetFolder, options: argparse.Namespace) -> dict:
    """Parse every frame with a face. Frames done by an interrupted run are kept, unless options.force."""
    back_end = choose(options.parsing)
    clip = Clip(folder)
    ids = clip.ids
    todo = [i for i in ids if options.force or not is_whole(folder.parsing(i))]

    def write(parsed: tuple[int, np.ndarray]) -> None:
        write_parsing(folder.parsing(parsed[0]), parsed[1])

    with progress(label=f"parsing ({back_end.name})", total=len(ids), initial=len(ids) - len(todo)) as bar:
        if todo:
            for _ in ordered_map(write, back_end.run(clip, todo, getattr(options, "device", "cpu"))):
                bar.update()
    return {"backend": back_end.name, "frames": len(ids), "parsed_now": len(todo), "warnings": []}
