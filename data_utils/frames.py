"""Stage 2: the 25 fps frames, cropped around the head, and the dense landmarks, in one pass over the video."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from data_utils.crop import Crop, head_window
from data_utils.landmarks import ELSEWHERE, POINTS, SAME_SIZE, Face, FaceLandmarker
from data_utils.per_frame import THREADS, Lent, ordered_map
from data_utils.quality import main_face_boxes
from utils.constants import FPS
from utils.dataset_folder import DatasetFolder
from utils.errors import UserError
from utils.files import write_json, write_npz
from utils.image import write_rgb
from utils.pipeline import Consumer
from utils.progress import progress
from utils.video import probe, read_frames

VERSION = 1
QUALITY = 96  # JPEG, 4:4:4
CHUNK = 32  # frames that a landmarker follows in a row
MOST_PIXELS = 1024  # side of the picture the landmarks are sought in; MediaPipe itself looks at 256 x 256 around the face


def run(folder: DatasetFolder, options: argparse.Namespace) -> dict:
    """Write ori_imgs/{i}.jpg, crop.json and face_landmarks.npz (INTERFACES: found, points, blendshapes, faces).

    Landmarks are sought in the crop before it is made smaller, and given in pixels of ori_imgs. `faces` counts the faces of like
    size: a passer-by far behind does not make a frame unusable. Memory does not grow with length but for 6 kB a frame.
    """
    info = probe(options.video)
    boxes = main_face_boxes(folder, options)
    crop = head_window(boxes, info.width, info.height, options.size, options.scale)
    count = round(info.duration * FPS) or None
    follow = _Follower(boxes, crop)
    rows: list[tuple[np.ndarray, np.ndarray, int] | None] = []
    with Consumer(lambda item: write_rgb(*item, QUALITY)) as writer:

        def pictures() -> Iterator[np.ndarray]:
            for i, image in enumerate(read_frames(options.video)):
                if image.shape[:2] != (info.height, info.width):
                    raise UserError(f"{options.video}: the picture's size changes at {i / FPS:.1f} s; give a clip of one size")
                cut = np.ascontiguousarray(crop.cut(image))
                writer.put((folder.frame(i), crop.resize(cut)))
                yield _shrink(cut, crop)

        with contextlib.closing(_detect(pictures())) as detected:
            for faces in progress(detected, label="frames", total=count):
                rows.append(follow(faces, crop))
    found = np.array([row is not None for row in rows])
    missing = (np.full((POINTS, 3), np.nan, np.float32), np.full(52, np.nan, np.float32), 0)
    points, scores, faces = zip(*[row or missing for row in rows], strict=True)
    write_npz(folder.face_landmarks, found=found, points=np.array(points, np.float32),
              blendshapes=np.array(scores, np.float32), faces=np.array(faces, np.uint8))  # fmt: skip
    write_json(folder.crop, {**dataclasses.asdict(crop), "video": str(options.video.resolve())})
    return {
        "backend": "mediapipe", "frames": len(rows), "frames_with_face": int(found.sum()), "source_fps": round(info.fps, 3),
        "crop": dataclasses.asdict(crop), "warnings": [],
    }  # fmt: skip


def _detect(pictures: Iterable[np.ndarray]) -> Iterator[list[Face]]:
    """The faces of each picture, in order. Several landmarkers take a chunk each; a black picture makes them forget the last one,
    so that the result does not depend on how many there are."""
    count = max(1, THREADS // 2)  # reading, cutting and writing take the other cores
    source = iter(pictures)
    chunks = iter(lambda: list(itertools.islice(source, CHUNK)), [])
    with Lent(lambda: FaceLandmarker(video=True), count) as landmarkers:

        def detect(chunk: list[np.ndarray]) -> list[list[Face]]:
            with landmarkers.one() as landmarker:
                landmarker.detect(np.zeros_like(chunk[0]))
                return [landmarker.detect(picture) for picture in chunk]

        with contextlib.closing(ordered_map(detect, chunks, count)) as results:
            for faces in results:
                yield from faces


def _shrink(cut: np.ndarray, crop: Crop) -> np.ndarray:
    if crop.side <= MOST_PIXELS:
        return cut
    return dataclasses.replace(crop, size=MOST_PIXELS).resize(cut)


class _Follower:
    """Keeps to the same face from frame to frame, and starts at the place the quality check saw it."""

    def __init__(self, boxes: np.ndarray, crop: Crop):
        x0, y0, x1, y1 = np.median(boxes, axis=0)
        scale = crop.size / crop.side
        self._centre = np.array([(x0 + x1) / 2 - crop.x, (y0 + y1) / 2 - crop.y]) * scale
        self._height = (y1 - y0) * scale

    def __call__(self, faces: list[Face], crop: Crop) -> tuple[np.ndarray, np.ndarray, int] | None:
        """(points in ori_imgs pixels, scores, faces of like size) of the face that is nearest, None if there is none."""
        if not faces:
            return None
        scale = crop.size / min(crop.side, MOST_PIXELS)
        for face in faces:
            face.points *= np.float32(scale)
        face = min(faces, key=lambda face: face.distance(self._centre, self._height))
        if face.distance(self._centre, self._height) > ELSEWHERE:
            return None
        self._centre, self._height = face.centre, face.height
        return face.points, face.blendshapes, sum(f.height >= SAME_SIZE * face.height for f in faces)
