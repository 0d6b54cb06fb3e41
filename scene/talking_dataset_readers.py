"""Reads a data set folder (DESIGN.md section 4). Only paths and small tables are held; pictures are decoded on demand."""

from __future__ import annotations

import csv
import functools
from pathlib import Path

import numpy as np
import torch

from scene.cameras import intrinsics
from scene.condition import Conditions, audio_windows
from utils.constants import BLINK_COLUMNS, DM_PER_M, SAMPLES_PER_FRAME, UPPER_FACE_COLUMNS
from utils.dataset_folder import DatasetFolder
from utils.errors import UserError
from utils.files import read_json, read_npy
from utils.image import over, read_parsing, read_rgb, read_rgba
from utils.pose import world_to_view

ENCODER_PREFERENCE = ("ave", "whisper", "hubert", "deepspeech", "mel")
OTHER_NAMES = {"hubert": ("aud_hu.npy",), "deepspeech": ("aud_ds.npy", "aud.npy")}  # what GaussianTalker and SyncTalk call them
ROWS_SHORT = 8  # rows that features of other tools may end before the sound, as SyncTalk's mel windows do: the last one serves
BLINK_UNIT = "AU45_r"  # OpenFace's column, intensity 0 to 5; 2 is a closed eye


class TalkingDatasetReader:
    """One person's clip: ids, cameras, driving signals, and pictures by frame id.

    Attributes: `splits` {"train", "val"}: lists of ids; `ids`: both, ascending; `width`, `height`, `focal`, `cx`, `cy`
    pixels; `encoder` and `audio` (F, D); `expression` (F, 7); `views` (F, 4, 4) world to camera, dm, rows of ids only;
    `audio_rows` (F,): the row of `audio`, and the 640 samples of aud.wav, that belong to a frame (its aud_id).
    Folders of SyncTalk, ER-NeRF and GaussianTalker are read too (docs/preprocessing.md). Raises UserError naming the missing file
    and the stage that makes it.
    """

    def __init__(self, source_path: Path | str, encoder: str = "auto"):
        self.folder = DatasetFolder(source_path)
        if not self.folder.root.is_dir():
            raise UserError(f"{source_path} is no folder; give the data set that data_utils/process.py wrote (data/<name>)")
        require = self.folder.require
        for path in (self.folder.transforms("train"), self.folder.transforms("val"), self.folder.root / "ori_imgs",
                     self.folder.root / "parsing", self.folder.root / "torso_imgs", self.folder.background):  # fmt: skip
            require(path)
        self.splits: dict[str, list[int]] = {}
        poses: dict[int, np.ndarray] = {}
        rows: dict[int, int] = {}
        for split in ("train", "val"):
            table = read_json(self.folder.transforms(split))
            unit = {"m": DM_PER_M, "dm": 1.0, "mm": 0.01}.get(table.get("unit", "m"))
            if unit is None:
                raise UserError(f"{self.folder.transforms(split)}: unknown unit {table['unit']!r}; m, dm and mm are understood")
            for frame in table["frames"]:
                pose = np.array(frame["transform_matrix"], dtype=np.float64)
                pose[:3, 3] *= unit
                poses[frame["img_id"]] = pose
                rows[frame["img_id"]] = frame.get("aud_id", frame["img_id"])
            self.splits[split] = [frame["img_id"] for frame in table["frames"]]
        self.ids = sorted(poses)
        if not self.splits["train"]:
            raise UserError(f"{self.folder.transforms('train')} lists no frame; run process.py again on a longer clip")
        self.focal, self.cx, self.cy = (float(table[key]) for key in ("focal_len", "cx", "cy"))
        self.height, self.width = self.image(self.ids[0]).shape[:2]

        matrices = torch.from_numpy(np.stack([poses[i] for i in self.ids]))
        self.views = torch.zeros(self.ids[-1] + 1, 4, 4)
        self.views[self.ids] = world_to_view(matrices).float()
        self.audio_rows = torch.arange(self.ids[-1] + 1)
        self.audio_rows[self.ids] = torch.tensor([rows[i] for i in self.ids])
        self.encoder = self._choose_encoder(encoder)
        file = require(self._audio_file(self.encoder))
        features = read_npy(file)
        if len(features) + ROWS_SHORT <= (last := int(self.audio_rows[self.ids].max())):
            raise UserError(f"{file} has {len(features)} rows, but row {last} is wanted (aud_id in transforms_*.json); "
                            "run process.py --task 1 and then --task 10 again")  # fmt: skip
        self.audio = features.reshape(len(features), -1).astype(np.float32)  # DeepSpeech: (F, 16, 29), HuBERT: (F, 2, 1024)
        self.expression = self._read_expression()

    def _choose_encoder(self, wanted: str) -> str:
        if wanted != "auto":
            return wanted
        record = self.folder.state / "audio.json"  # files of an older clip may lie beside the one that stage 1 made last
        made = (read_json(record)["facts"]["backend"],) if record.exists() else ()
        for name in (*made, *ENCODER_PREFERENCE):
            if self._audio_file(name).exists():
                return name
        raise UserError(f"{self.folder.root} holds no audio features (aud_<encoder>.npy); "
                        "run data_utils/process.py --task 1 --end_task 1")  # fmt: skip

    def _audio_file(self, encoder: str) -> Path:
        names = [self.folder.audio_features(encoder), *(self.folder.root / name for name in OTHER_NAMES.get(encoder, ()))]
        return next((path for path in names if path.exists()), names[0])

    def _read_expression(self) -> np.ndarray:
        """(F, 7) from bs.npy, else only the blinks from OpenFace's au.csv (GaussianTalker, ER-NeRF), the brows held at 0."""
        path, units = self.folder.blendshapes, self.folder.root / "au.csv"
        if path.exists() or not units.exists():
            rows = read_npy(self.folder.require(path)).astype(np.float32)
            expression = rows[:, list(UPPER_FACE_COLUMNS)]
        else:
            path = units
            with open(units, newline="", encoding="utf-8-sig") as file:
                table = list(csv.DictReader(file, skipinitialspace=True))
            try:
                blink = np.array([float(row[BLINK_UNIT]) for row in table], np.float32)
            except (KeyError, TypeError, ValueError):
                raise UserError(f"{units} has no column of numbers {BLINK_UNIT}; write it again with OpenFace, or run process.py "
                                "--task 9") from None  # fmt: skip
            expression = np.zeros((len(blink), len(UPPER_FACE_COLUMNS)), np.float32)
            for column in BLINK_COLUMNS:
                expression[:, UPPER_FACE_COLUMNS.index(column)] = np.clip(blink, 0, 2) / 2
        if len(expression) <= self.ids[-1]:
            raise UserError(f"{path} has {len(expression)} rows but frame {self.ids[-1]} is listed; run process.py --task 9 again")
        return expression

    def image(self, i: int) -> np.ndarray:
        """(H, W, 3) uint8: the frame as filmed."""
        return read_rgb(self.folder.require(self.folder.frame(i)))

    def parsing(self, i: int) -> np.ndarray:
        """(H, W) uint8 CelebAMask classes."""
        return read_parsing(self.folder.require(self.folder.parsing(i)))

    def torso(self, i: int) -> np.ndarray:
        """(H, W, 4) uint8 RGBA: the body without its head, transparent elsewhere."""
        return read_rgba(self.folder.require(self.folder.torso(i)))

    def backdrop(self, i: int) -> np.ndarray:
        """(H, W, 3) uint8: the torso without its head over the background plate; what the rendered head is put on."""
        return over(self.torso(i), self.plate)

    @functools.cached_property
    def plate(self) -> np.ndarray:
        """(H, W, 3) uint8: the background without the person."""
        return read_rgb(self.folder.background)

    def landmarks(self, i: int) -> np.ndarray:
        """(68, 2) float32 pixels, iBUG order. Raises UserError naming the file if it holds anything else."""
        path = self.folder.require(self.folder.landmarks(i))
        try:
            points = np.array(path.read_text().split(), np.float32)
        except ValueError:
            points = np.zeros(0, np.float32)
        if points.size != 136 or not np.isfinite(points).all():
            raise UserError(f"{path} does not hold 68 points of two finite numbers; run process.py --task 6 again, or take frame "
                            f"{i} out of transforms_*.json")  # fmt: skip
        return points.reshape(68, 2)

    def sound(self, ids: list[int]) -> np.ndarray:
        """(S,) float32 at 16 kHz: the 640 samples of each frame one after the other, so that gaps in `ids` stay in sync."""
        from utils.audio import load_audio  # brings PyAV, which training does without

        samples = load_audio(self.folder.require(self.folder.audio))
        starts = SAMPLES_PER_FRAME * self.audio_rows[ids].numpy()
        index = starts[:, None] + np.arange(SAMPLES_PER_FRAME)
        return np.append(samples, np.float32(0))[np.minimum(index, len(samples))].ravel()  # silence beyond its end

    def conditions(self, pose_ids: list[int], audio_rows: list[int] | None = None,
                   audio: np.ndarray | None = None) -> Conditions:  # fmt: skip
        """Driving signals of a batch: pose, expression and frame code of `pose_ids`, speech of `audio_rows`.

        `audio` (F, D) defaults to the clip's own features, `audio_rows` to the rows that belong to the frames.
        """
        poses = torch.as_tensor(pose_ids)
        rows = self.audio_rows[poses] if audio_rows is None else torch.as_tensor(audio_rows)
        return Conditions(
            audio=audio_windows(torch.from_numpy(self.audio if audio is None else audio), rows),
            expression=torch.from_numpy(self.expression)[poses],
            view=self.views[poses],
            intrinsics=intrinsics(self.focal, self.cx, self.cy).expand(len(poses), 3, 3),
            frame=poses,
        )
