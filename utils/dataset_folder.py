"""The data set folder: every file name stands here once (DESIGN.md section 4), for the stages that write and the readers."""

from __future__ import annotations

from pathlib import Path

from utils.errors import UserError
from utils.files import read_json

# which stage of data_utils/process.py makes what; used in messages when a file is missing
STAGE_OF = {
    "aud.wav": 1, "ori_imgs": 2, "crop.json": 2, "parsing": 3, "bc.jpg": 4, "gt_imgs": 5, "torso_imgs": 5, "valid.json": 6,
    "face_landmarks.npz": 2, "track_params.pt": 7, "fused.ply": 7, "tracks.npz": 8, "bundle_adjustment.pt": 8, "bs.npy": 9,
    "transforms_train.json": 10, "transforms_val.json": 10,
}  # fmt: skip


class DatasetFolder:
    """Paths of one data set. Frame ids are those of the 25 fps video, from 0."""

    def __init__(self, root: Path):
        self.root = Path(root)

    def frame(self, i: int) -> Path:
        return self.root / "ori_imgs" / f"{i}.jpg"

    def landmarks(self, i: int) -> Path:
        """68 rows "x y", pixels."""
        return self.root / "ori_imgs" / f"{i}.lms"

    def parsing(self, i: int) -> Path:
        return self.root / "parsing" / f"{i}.png"

    def gt(self, i: int) -> Path:
        return self.root / "gt_imgs" / f"{i}.jpg"

    def torso(self, i: int) -> Path:
        return self.root / "torso_imgs" / f"{i}.png"

    def audio_features(self, encoder: str) -> Path:
        return self.root / f"aud_{encoder}.npy"

    def transforms(self, split: str) -> Path:
        """`split` is "train" or "val"."""
        return self.root / f"transforms_{split}.json"

    background = property(lambda self: self.root / "bc.jpg")
    audio = property(lambda self: self.root / "aud.wav")
    crop = property(lambda self: self.root / "crop.json")
    face_landmarks = property(lambda self: self.root / "face_landmarks.npz")  # our addition: the dense landmarks
    valid = property(lambda self: self.root / "valid.json")
    blendshapes = property(lambda self: self.root / "bs.npy")
    track_params = property(lambda self: self.root / "track_params.pt")
    tracks = property(lambda self: self.root / "tracks.npz")
    bundle_adjustment = property(lambda self: self.root / "bundle_adjustment.pt")
    fused = property(lambda self: self.root / "fused.ply")
    report = property(lambda self: self.root / "report.json")
    state = property(lambda self: self.root / ".state")

    def frame_count(self) -> int:
        """Frames on disk, counted as the run 0, 1, 2, ... without a hole."""
        count = len(list((self.root / "ori_imgs").glob("[0-9]*.jpg")))
        if count and not self.frame(count - 1).exists():
            raise UserError(f"{self.root / 'ori_imgs'} has {count} frames but no {count - 1}.jpg; run process.py --task 2 again")
        return count

    def valid_ids(self) -> list[int]:
        """Ids of the usable frames, ascending (every stage after landmarks and every reader goes by them)."""
        return read_json(self.require(self.valid))["valid"]

    def require(self, path: Path) -> Path:
        """Return `path` if it exists, else raise UserError naming the stage of process.py that makes it."""
        if path.exists():
            return path
        name = path.relative_to(self.root).parts[0]
        stage = STAGE_OF.get(name, 1 if name.startswith("aud_") else None)
        made_by = f"; stage {stage} of data_utils/process.py makes it (--task {stage} --end_task {stage})" if stage else ""
        raise UserError(f"{path} is missing{made_by}")
