"""What will go wrong with a clip, said before the first expensive stage: `process.py --check`, and stage 0 of every run.

A few dozen frames spread over the clip are looked at; the facts, refusals and warnings go into the report.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from data_utils.audio import SILENT, sound_facts
from data_utils.crop import ABOVE, Crop, head_window
from data_utils.landmarks import ELSEWHERE, MOST_CUT, SAME_SIZE, Face, FaceLandmarker
from data_utils.stage import video_digest
from utils.audio import load_audio
from utils.constants import FPS
from utils.dataset_folder import DatasetFolder
from utils.errors import UserError
from utils.files import read_json
from utils.progress import progress
from utils.video import probe, sample_frames

VERSION = 1
SAMPLES = 48
SHORTEST, SHORT = 4.0, 60.0  # seconds: refused below, warned of below
FACE_SHARE = 0.75  # of the sampled frames must show a face
FACE_PIXELS, SMALL_FACE = 40, 100  # face height in source pixels: refused below, warned of below
TURNED = 30.0  # degrees of yaw beyond which the far cheek is hidden
QUIET = -38.0  # dBFS of the loud parts of speech
MOVING, DRIFTED = 0.004, 0.02  # background motion between samples, and over the clip, of the picture's longer side
SCENE = 320  # longer side of the small pictures the scene is judged by
CUT = 0.4  # correlation of two samples' thumbnails below which the scene is another


@dataclasses.dataclass
class Inspection:
    """Facts of a clip; what forbids its use (`problems`; `fatal` ones even with --force) and what will cost quality.

    Each text reads "what is the matter; what to do".
    """

    facts: dict
    fatal: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)


def inspect(video: Path, size: int, scale: float) -> Inspection:
    """Look at a clip for a few seconds. Raises UserError if it is no readable video."""
    video = Path(video)
    info = probe(video)
    result = Inspection({"width": info.width, "height": info.height, "fps": round(info.fps, 3), "seconds": round(info.duration, 2)})
    judge_audio(result, video, info.has_audio)
    if info.has_audio and abs(info.audio_offset) > 1 / FPS:
        result.facts["audio_offset_seconds"] = round(info.audio_offset, 3)
    times, faces, scenes = _sample(video, result)
    seconds = max(info.duration, times[-1] if times else 0.0)
    if seconds < SHORTEST:
        result.fatal.append(f"it is only {seconds:.1f} s long; {SHORTEST:.0f} s is the least, and minutes give a good model")
    elif seconds < SHORT:
        result.warnings.append(f"the clip is only {seconds:.0f} s long: sounds it lacks will be guessed; 2 to 5 minutes are best")
    if any(faces):
        _judge_faces(result, faces, info.width, info.height, size, scale)
        judge_scene(result, scenes, faces, info.width)
    else:
        result.fatal.append(f"no face is seen in any of {len(times)} sampled frames; give a clip of one person facing the camera")
    return result


def check(video: Path, size: int, scale: float, force: bool) -> Inspection:
    """`inspect`, and raise UserError in one sentence if the clip is refused; what --force overrides becomes warnings."""
    result = inspect(video, size, scale)
    reasons = result.fatal + ([] if force else result.problems)
    if reasons:
        matters, remedies = zip(*(reason.split("; ", 1) for reason in reasons), strict=True)
        end = "" if result.fatal or force else " (or go on with --force)"
        raise UserError(f"{video} cannot become a talking head: {', '.join(matters)}; {remedies[0]}{end}")
    result.warnings = result.problems + result.warnings
    return result


def run(folder: DatasetFolder, options: argparse.Namespace) -> dict:
    """Stage 0: the facts, the warnings and the boxes of the main face, which stage 2 crops by."""
    result = check(options.video, options.size, options.scale, options.force)
    return {**result.facts, "backend": "mediapipe", "warnings": result.warnings}


def main_face_boxes(folder: DatasetFolder, options: argparse.Namespace) -> np.ndarray:
    """(K, 4) boxes x0, y0, x1, y1 of the main face in source pixels: as stage 0 recorded them for this clip, else looked for."""
    record = folder.state / "quality.json"
    if record.exists():
        known = read_json(record)
        if known["inputs"]["video"] == video_digest(options.video):
            return np.array(known["facts"]["face_boxes"])
    return np.array(check(options.video, options.size, options.scale, options.force).facts["face_boxes"])


def _sample(video: Path, result: Inspection) -> tuple[list[float], list[list[Face]], list[np.ndarray]]:
    """Seconds, faces (source pixels) and small grey pictures of the samples."""
    times, faces, scenes = [], [], []
    with FaceLandmarker() as landmarker:
        for seconds, image in progress(sample_frames(video, SAMPLES), label="quality check", total=SAMPLES):
            times.append(seconds)
            faces.append(find_faces(landmarker, image))
            shrink = SCENE / max(image.shape[:2])
            grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
            scenes.append(cv2.resize(grey, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA))
    result.facts["samples"] = len(times)
    return times, faces, scenes


def find_faces(landmarker: FaceLandmarker, image: np.ndarray) -> list[Face]:
    """Faces of a picture in its pixels; where none is found at once, overlapping tiles of half the size are searched."""
    faces = landmarker.detect(image)
    height, width = image.shape[:2]
    side = max(height, width) // 2
    if faces or side < 256:
        return faces
    for y in _starts(height, side):
        for x in _starts(width, side):
            for face in landmarker.detect(image[y : y + side, x : x + side]):
                face.points[:, :2] += (x, y)
                if not any(_overlap(face, other) for other in faces):
                    faces.append(face)
    return faces


def _starts(length: int, side: int) -> list[int]:
    count = max(1, 2 * (length - 1) // side)
    return sorted({round(k * max(0, length - side) / max(1, count - 1)) for k in range(count)})


def _overlap(a: Face, b: Face) -> bool:
    low, high = np.maximum(a.box[:2], b.box[:2]), np.minimum(a.box[2:], b.box[2:])
    return bool((high - low > 0.3 * min(a.height, b.height)).all())


def judge_audio(result: Inspection, video: Path, has_audio: bool) -> None:
    if not has_audio:
        result.fatal.append("it has no audio track, and the mouth is learned from the sound; add the recording's sound")
        return
    samples = load_audio(video)
    loud = sound_facts(samples)["loudness_db"]
    result.facts["loudness_db"] = loud
    if loud < SILENT:
        result.problems.append(f"its sound is silent ({loud:.0f} dB), and the mouth is learned from it; use a clip with speech")
    elif loud < QUIET:
        result.warnings.append(f"the sound is very quiet ({loud:.0f} dB); the mouth may follow it poorly")
    clipped = float((np.abs(samples) > 0.999).mean())
    if clipped > 0.001:
        result.warnings.append(f"the sound is clipped in {100 * clipped:.1f} % of its samples")


def _judge_faces(result: Inspection, faces: list[list[Face]], width: int, height: int, size: int, scale: float) -> None:
    mains, others = split_main(faces)
    seen = sum(face is not None for face in mains)
    boxes = np.array([face.box for face in mains if face is not None])
    crop = head_window(boxes, width, height, size, scale)
    tall = float(np.median(boxes[:, 3] - boxes[:, 1]))
    yaw = np.abs([face.yaw for face in mains if face is not None])
    result.facts |= {
        "frames_with_face": seen, "face_boxes": boxes.round(1).tolist(), "face_height": round(tall, 1),
        "yaw_95": round(float(np.percentile(yaw, 95)), 1), "crop": dataclasses.asdict(crop),
    }  # fmt: skip
    if seen < FACE_SHARE * len(mains):
        result.problems.append(f"a face is seen in only {seen} of {len(mains)} sampled frames; cut the clip to where it is")
    elif seen < len(mains):
        result.warnings.append(f"{len(mains) - seen} of {len(mains)} sampled frames show no face; such frames are left out")
    _judge_second(result, mains, others)
    if tall < FACE_PIXELS:
        result.problems.append(f"the face is only {tall:.0f} pixels high; at least {FACE_PIXELS} are needed: film closer")
    elif tall < SMALL_FACE or crop.side < 0.6 * crop.size:
        result.warnings.append(f"the face is only {tall:.0f} pixels high: the window of {crop.side} pixels is enlarged to "
                               f"{crop.size}; film closer, or use a smaller --size")  # fmt: skip
    cut = sum(_share_inside(face, crop) < 1 - MOST_CUT for face in mains if face is not None)
    if cut:
        worry = result.problems if cut > (1 - FACE_SHARE) * seen else result.warnings
        worry.append(f"the face is cut by the picture's edge in {cut} of {seen} sampled frames; such frames are left out")
    if np.median(boxes[:, 1]) - 0.6 * ABOVE * tall < 0:
        result.warnings.append("the top of the head is cut by the picture's edge: hair will be missing there")
    if (yaw > TURNED).mean() > 0.05:
        result.warnings.append(f"the head is turned more than {TURNED:.0f} degrees in {(yaw > TURNED).sum()} of {seen} sampled "
                               "frames; lips are seen poorly there")  # fmt: skip


def split_main(faces: list[list[Face]]) -> tuple[list[Face | None], list[list[Face]]]:
    """The main face of each sample (or None) and the others: the main one is most like the samples' largest faces.

    A face elsewhere, or of quite another size, is not the main one: after a cut it is someone else.
    """
    largest = [max(seen, key=lambda face: face.height) for seen in faces if seen]
    typical = min(largest, key=lambda face: np.median([face.distance(other.centre, other.height) for other in largest]))
    nearest = [min(seen, key=lambda face: face.distance(typical.centre, typical.height)) if seen else None for seen in faces]
    mains = [face if face is not None and face.distance(typical.centre, typical.height) < ELSEWHERE else None for face in nearest]
    return mains, [[f for f in fs if f is not main] for fs, main in zip(faces, mains, strict=True)]


def _judge_second(result: Inspection, mains: list[Face | None], others: list[list[Face]]) -> None:
    """With a second face of like size nobody knows who speaks, even if the window leaves it out; a smaller one is a passer-by."""
    beside = [(main, rest) for main, rest in zip(mains, others, strict=True) if main is not None]
    like = sum(any(face.height >= SAME_SIZE * main.height for face in rest) for main, rest in beside)
    any_size = sum(bool(rest) for _, rest in beside)
    if like > 0.1 * len(beside):
        result.problems.append(f"two faces of like size are seen in {like} of {len(beside)} sampled frames, and one "
                               "speaker is needed; crop the video to one person")  # fmt: skip
    elif any_size:
        result.warnings.append(f"a second face is seen in {any_size} of {len(beside)} sampled frames; the main one is followed")


def _share_inside(face: Face, crop: Crop) -> float:
    """Share of the dense points that lie in the window."""
    xy = face.points[:, :2] - (crop.x, crop.y)
    return float(((xy >= 0) & (xy <= crop.side)).all(1).mean())


def judge_scene(result: Inspection, scenes: Sequence[np.ndarray], faces: Sequence[list[Face]], width: int) -> None:
    """Scene cuts, by the likeness of successive samples that show a face (no fade from black); else camera motion, by tracking
    what is not the person."""
    scenes, faces = zip(*[(scene, seen) for scene, seen in zip(scenes, faces, strict=True) if seen], strict=True)
    thumbs = np.array([cv2.resize(scene, (24, 24), interpolation=cv2.INTER_AREA).ravel() for scene in scenes], np.float64)
    thumbs -= thumbs.mean(1, keepdims=True)
    thumbs /= np.linalg.norm(thumbs, axis=1, keepdims=True) + 1e-6
    likeness = (thumbs[1:] * thumbs[:-1]).sum(1)
    cuts = int((likeness < CUT).sum())
    result.facts |= {"likeness": round(float(likeness.min(initial=1.0)), 3), "cuts": cuts}
    if cuts:
        times = f"{cuts} time{'s' if cuts > 1 else ''}"
        result.problems.append(f"the scene changes at least {times}; give one uncut take of a still camera")
        return
    moves = _background_motion(scenes, faces, width)
    if len(moves) < 5:
        return
    drift = np.cumsum(moves, axis=0)
    typical = float(np.median(np.linalg.norm(moves, axis=1)))
    most = float(np.linalg.norm(drift - np.median(drift, axis=0), axis=1).max())
    result.facts |= {"background_motion": round(typical, 5), "background_drift": round(most, 5)}
    if typical > MOVING or most > DRIFTED:
        result.warnings.append(f"the camera or background moves (by up to {100 * most:.1f} % of the picture); torso and "
                               "background will be blurred: use a tripod")  # fmt: skip


def _background_motion(scenes: Sequence[np.ndarray], faces: Sequence[list[Face]], width: int) -> np.ndarray:
    """(K, 3) motion of the background between successive samples: x, y of the picture's centre and half the zoom, all in
    parts of the picture's longer side; only of pairs where enough corners move as one."""
    moves = []
    for before, after, seen in zip(scenes[:-1], scenes[1:], faces[:-1], strict=True):
        background = np.full(before.shape, 255, np.uint8)
        for face in seen:  # nothing of the person: a wide box around the head, a wider one below the chin
            x0, y0, x1, y1 = face.box * before.shape[1] / width
            tall = y1 - y0
            for left, right, top in ((x0 - 0.4 * tall, x1 + 0.4 * tall, y0 - 0.5 * tall), (x0 - 2 * tall, x1 + 2 * tall, y1)):
                background[max(0, int(top)) :, max(0, int(left)) : max(0, int(right))] = 0
        corners = cv2.goodFeaturesToTrack(before, 100, 0.02, 6, mask=background)
        if corners is None:
            continue
        there, found, _ = cv2.calcOpticalFlowPyrLK(before, after, corners, None, winSize=(15, 15))
        back, found_again, _ = cv2.calcOpticalFlowPyrLK(after, before, there, None, winSize=(15, 15))
        sure = (found & found_again).ravel().astype(bool) & (np.linalg.norm(back - corners, axis=-1).ravel() < 0.5)
        start, end = corners[sure, 0], there[sure, 0]
        if len(start) < 12 or start[:, 0].std() < 0.2 * before.shape[1]:  # too few, or all in one place: it may be hair
            continue
        affine, inliers = cv2.estimateAffinePartial2D(start, end, ransacReprojThreshold=0.7)
        if affine is not None and inliers.mean() > 0.6:  # they move as one
            centre = np.array([before.shape[1], before.shape[0], 2]) / 2
            zoom = np.hypot(affine[0, 0], affine[1, 0]) - 1
            moves.append([*((affine @ centre - centre[:2]) / SCENE), zoom / 2])
    return np.array(moves).reshape(-1, 3)
