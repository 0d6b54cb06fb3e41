"""Face landmarks: MediaPipe's 478 dense points, the 68 of iBUG derived from them, and stage 6, which says which frames are usable.

Source of the network: "Attention Mesh", Grishchenko et al. 2020; the 68-point scheme: 300-W, Sagonas et al. 2013.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os

import cv2
import numpy as np

from utils import model_store
from utils.constants import FPS
from utils.dataset_folder import DatasetFolder
from utils.errors import UserError
from utils.files import read_npz, write_bytes, write_json
from utils.image import read_rgb
from utils.progress import progress

VERSION = 1
POINTS = 478  # 468 of the mesh, then 5 of each iris

# The mesh vertex nearest to each iBUG point. Left and right are the picture's: point 0 is the jaw beside the left-most eye.
IBUG_68 = np.array([
    127, 234, 93, 132, 58, 172, 150, 176, 152, 400, 379, 397, 288, 361, 323, 454, 356,  # jaw, 0..16, chin at 8
    70, 63, 105, 66, 107, 336, 296, 334, 293, 300,  # brows, 17..26
    168, 197, 5, 4, 98, 97, 2, 326, 327,  # nose: bridge down to the tip (30), base (33 in the middle)
    33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380,  # eyes: outer or inner corner, upper lid, corner, lower lid
    61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181,  # outer lips from the left corner over the top
    78, 82, 13, 312, 308, 317, 14, 87,  # inner lips
])  # fmt: skip
FACE_OVAL = np.array([
    10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377, 152, 148, 176, 149, 150, 136, 172,
    58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109,
])  # fmt: skip

SMALLEST_FACE = 0.12  # of the frame's side: below it lips are a few pixels
MOST_CUT = 0.05  # share of the dense points that may lie outside the frame
SAME_SIZE = 0.6  # a second face at least this much of the main one's height is a second speaker, not a passer-by
ELSEWHERE = 1.5  # Face.distance beyond which a face is someone else's
ENOUGH_FRAMES, ENOUGH_SHARE = 2 * FPS, 0.6  # fewer usable frames are refused; the share may be forced


@dataclasses.dataclass
class Face:
    """One face in one picture."""

    points: np.ndarray  # (478, 3) float32 pixels; z in the same unit, smaller = nearer the camera
    blendshapes: np.ndarray  # (52,) float32 scores in MediaPipe's order, 0 = _neutral
    matrix: np.ndarray  # (4, 4) head pose: canonical face (cm, y up, z to the viewer) -> camera

    @property
    def box(self) -> np.ndarray:
        """(4,) x0, y0, x1, y1 of the mesh (forehead to chin, ear to ear)."""
        return np.concatenate([self.points[:, :2].min(0), self.points[:, :2].max(0)])

    @property
    def centre(self) -> np.ndarray:
        return self.points[:, :2].mean(0)

    @property
    def height(self) -> float:
        return float(np.ptp(self.points[:, 1]))

    def distance(self, centre: np.ndarray, height: float) -> float:
        """Unlikeness to a face of that place and size: 1 = a face height apart, or e times as high."""
        return float(np.linalg.norm(self.centre - centre) / height + abs(np.log(self.height / height)))

    @property
    def yaw(self) -> float:
        """Degrees; positive = turned to the right of the picture."""
        return float(np.degrees(np.arctan2(self.matrix[0, 2], self.matrix[2, 2])))


class FaceLandmarker:
    """MediaPipe's FaceLandmarker. with FaceLandmarker() as landmarker: landmarker.detect(image)

    `video`: consecutive frames of one clip, tracked from one to the next; otherwise unrelated pictures. Two faces are looked for
    even where one is expected: to notice a second one, and because MediaPipe low-passes the points of a single tracked face over
    time, which delays the lips by half a frame.
    """

    def __init__(self, video: bool = False, faces: int = 2):
        os.environ.setdefault("GLOG_minloglevel", "2")  # before the first import: warnings about nothing we can change
        model = model_store.fetch("face_landmarker").read_bytes()  # bytes: MediaPipe's own open() stumbles over some file names
        import mediapipe
        from mediapipe.tasks.python import BaseOptions, vision

        self._image = lambda rgb: mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=rgb)
        mode = vision.RunningMode.VIDEO if video else vision.RunningMode.IMAGE
        options = vision.FaceLandmarkerOptions(
            base_options=BaseOptions(model_asset_buffer=model), running_mode=mode, num_faces=faces, output_face_blendshapes=True,
            output_facial_transformation_matrixes=True,
        )  # fmt: skip
        with quiet_stderr():
            self._landmarker = vision.FaceLandmarker.create_from_options(options)
        self._video, self._frames = video, 0

    def detect(self, image: np.ndarray) -> list[Face]:
        """Faces in an (H, W, 3) uint8 RGB picture, in no particular order; with `video` the next frame at 25 a second."""
        height, width = image.shape[:2]
        picture = self._image(np.ascontiguousarray(image))
        if self._video:
            found = self._landmarker.detect_for_video(picture, self._frames * 1000 // FPS)
            self._frames += 1
        else:
            found = self._landmarker.detect(picture)
        scale = np.array([width, height, width], np.float32)
        faces = []
        for points, scores, matrix in zip(found.face_landmarks, found.face_blendshapes, found.facial_transformation_matrixes,
                                          strict=True):  # fmt: skip
            positions = np.array([(point.x, point.y, point.z) for point in points], np.float32) * scale
            faces.append(Face(positions, np.array([score.score for score in scores], np.float32), np.asarray(matrix)))
        return faces

    def __enter__(self) -> FaceLandmarker:
        return self

    def __exit__(self, *_) -> None:
        self._landmarker.close()


class quiet_stderr:
    """Keep what native libraries print while they load off the screen (their own switches do not cover it all)."""

    def __enter__(self) -> None:
        self._saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.close(null)

    def __exit__(self, *_) -> None:
        os.dup2(self._saved, 2)
        os.close(self._saved)


def to_68(points: np.ndarray) -> np.ndarray:
    """(..., 478, 3) dense points -> (..., 68, 2) iBUG landmarks, same pixels."""
    return points[..., IBUG_68, :2]


def read_dense(folder: DatasetFolder) -> dict[str, np.ndarray]:
    """face_landmarks.npz: found (F,), points (F, 478, 3), blendshapes (F, 52), faces (F,). Raises UserError if it is missing."""
    return read_npz(folder.require(folder.face_landmarks))


class MediaPipeLandmarks:
    """The 68 points out of the dense ones stage 2 found."""

    name = "mediapipe"

    def available(self) -> bool:
        return True

    def run(self, folder: DatasetFolder, options: argparse.Namespace) -> np.ndarray:
        """(F, 68, 2) float32 pixels, NaN where there is no face."""
        return to_68(read_dense(folder)["points"])


class FanLandmarks:
    """face-alignment's FAN, started from the box of the dense points; its weights are downloaded at first use."""

    name = "fan"

    def available(self) -> bool:
        return importlib.util.find_spec("face_alignment") is not None

    def run(self, folder: DatasetFolder, options: argparse.Namespace) -> np.ndarray:
        """(F, 68, 2) float32 pixels, NaN where there is no face."""
        import face_alignment

        dense = read_dense(folder)
        kind = face_alignment.LandmarksType.TWO_D
        try:
            network = face_alignment.FaceAlignment(kind, device=str(options.device), flip_input=False)
        except OSError as error:  # what urllib raises too
            raise UserError(f"--landmarks fan could not get its weights ({error}); run it once with a connection to the internet, "
                            "or use --landmarks mediapipe") from None  # fmt: skip
        marks = np.full((len(dense["found"]), 68, 2), np.nan, np.float32)
        for i in progress(np.flatnonzero(dense["found"]), label="landmarks (fan)"):
            points = dense["points"][i, :468, :2]
            box = [*points.min(0).tolist(), *points.max(0).tolist()]
            found = network.get_landmarks_from_image(read_rgb(folder.frame(int(i))), detected_faces=[box])
            if found:
                marks[i] = found[0][:, :2]
        return marks


BACKENDS = {backend.name: backend for backend in (MediaPipeLandmarks(), FanLandmarks())}


def run(folder: DatasetFolder, options: argparse.Namespace) -> dict:
    """Stage 6: write {i}.lms and valid.json. `auto` is MediaPipe: it needs no download and finds the same face as stage 2.

    Raises UserError with the reasons counted if too few frames are usable.
    """
    backend = choose_backend(BACKENDS, options.landmarks, "landmarks")
    marks = backend.run(folder, options)
    dense = read_dense(folder)
    height, width = read_rgb(folder.frame(0)).shape[:2]
    dropped = unusable_frames(marks, dense["found"], dense["points"], dense["faces"], width, height)
    frames = len(marks)
    valid = [i for i in range(frames) if i not in dropped]
    reasons: dict[str, int] = {}
    for reason in dropped.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    counts = ", ".join(f"{reason}: {count}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))
    too_few = len(valid) < ENOUGH_FRAMES
    if too_few or (len(valid) < ENOUGH_SHARE * frames and not options.force):
        raise UserError(f"{options.video}: only {len(valid)} of {frames} frames are usable ({counts}); cut the clip to where "
                        f"one whole face is seen{'' if too_few else ', or go on with --force'}")  # fmt: skip
    for i in progress(np.flatnonzero(~np.isnan(marks).any((1, 2))), label="landmarks"):
        lines = "".join(f"{x:f} {y:f}\n" for x, y in marks[i])
        write_bytes(folder.landmarks(int(i)), lines.encode())
    write_json(folder.valid, {"valid": valid, "dropped": {str(i): reason for i, reason in sorted(dropped.items())}})
    warnings = []
    if len(valid) < 0.95 * frames:
        warnings.append(f"{frames - len(valid)} of {frames} frames are left out ({counts})")
    return {"backend": backend.name, "frames": frames, "valid": len(valid), "dropped": reasons, "warnings": warnings}


def unusable_frames(marks: np.ndarray, found: np.ndarray, points: np.ndarray, faces: np.ndarray, width: int, height: int
                    ) -> dict[int, str]:  # fmt: skip
    """Frame id -> why it cannot be used.

    marks (F, 68, 2) and points (F, 478, 3) pixels (NaN = none), found (F,) bool, faces (F,) comparable faces seen.
    An outlier is a frame whose mean landmark lies further from the median of its 7 neighbours than 8 robust standard deviations
    of that distance over the clip (MAD), and further than 6 % of the face.
    """
    dropped: dict[int, str] = {}
    size = np.ptp(marks[..., 1], axis=1)
    outside = ((points[..., 0] < 0) | (points[..., 0] > width) | (points[..., 1] < 0) | (points[..., 1] > height)).mean(1)
    for i in range(len(marks)):
        if not found[i] or np.isnan(marks[i]).any():
            dropped[i] = "no face"
        elif np.ptp(points[i, :, 1]) < SMALLEST_FACE * height:
            dropped[i] = "face too small"
        elif outside[i] > MOST_CUT:
            dropped[i] = "face cut by the frame"
        elif faces[i] > 1:
            dropped[i] = "several faces"
    good = np.array([i for i in range(len(marks)) if i not in dropped])
    if len(good) >= 7:
        state = np.column_stack([marks[good].mean(1), size[good]])  # a wrong face shows in place or in size
        padded = np.pad(state, ((3, 3), (0, 0)), mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, 7, axis=0)
        jump = np.linalg.norm(state - np.median(windows, axis=-1), axis=1)
        spread = 1.4826 * np.median(np.abs(jump - np.median(jump)))
        limit = np.maximum(np.median(jump) + 8 * spread, 0.06 * np.median(size[good]))
        dropped.update({int(i): "landmarks jump" for i in good[jump > limit]})
    return dropped


def choose_backend(backends: dict, wanted: str, option: str):
    """The back end `--<option>` names; `auto` is the first of the table that is available. Raises UserError naming the choice."""
    if wanted == "auto":
        return next(backend for backend in backends.values() if backend.available())
    if wanted not in backends:
        raise UserError(f"--{option} {wanted} is not known; there are auto, {', '.join(backends)}")
    if not backends[wanted].available():
        raise UserError(f"--{option} {wanted} is not available: its package or weights are missing; see python -m utils.doctor")
    return backends[wanted]


def draw(image: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """A copy of the (H, W, 3) picture with (K, 2) landmarks dotted in green."""
    image = image.copy()
    for x, y in marks:
        cv2.circle(image, (round(float(x)), round(float(y))), max(1, image.shape[0] // 256), (60, 230, 90), -1, cv2.LINE_AA)
    return image
