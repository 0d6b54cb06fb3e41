"""Write the synthetic talking head: python data_utils/make_demo.py [--out data/demo] [--seconds 12] [--size 256] [--seed 0]

Everything is made by formulas: a 3D head (data_utils/demo_head), a voice, and the truth of what is seen.

    demo.mp4            the clip, 25 fps with sound: what a user would film
    speech.wav          another utterance of the same voice, not in the clip
    truth/truth.npz     of the clip, a row a frame: landmarks68 (F,68,2) px, points68 (F,68,3) dm in the head frame, visible (F,68),
                        euler (F,3) rad, trans (F,3) dm, focal px (utils/pose.py: tracker camera), lip_opening (F,) = inner lip gap
                        over the distance of the outer eye corners, blink (F,) 0..1, articulation (F,7); phonemes (P,),
                        phoneme_times (P,2) s
    truth/speech.npz    of speech.wav: lip_opening (F2,), articulation (F2,7), phonemes, phoneme_times
    truth/masks/{i}.png CelebAMask classes of frame i (left and right are the subject's)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_utils.demo_head.landmarks import Landmarks, lip_opening  # noqa: E402
from data_utils.demo_head.mesh import HeadMesh  # noqa: E402
from data_utils.demo_head.motion import DISTANCE, poses  # noqa: E402
from data_utils.demo_head.shading import HeadRenderer  # noqa: E402
from data_utils.demo_head.voice import Utterance, speak  # noqa: E402
from utils.audio import save_wav  # noqa: E402
from utils.errors import UserError, command_line  # noqa: E402
from utils.files import write_npz  # noqa: E402
from utils.image import write_parsing  # noqa: E402
from utils.pose import project  # noqa: E402
from utils.progress import progress  # noqa: E402
from utils.video import VideoWriter  # noqa: E402

FOCAL = 1200 / 512  # in frame sides
HELD_OUT = 1000  # added to the seed for the utterance that is not in the clip


def make_speech(out: Path, seconds: float = 6.0, seed: int = 0, mesh: HeadMesh | None = None) -> Utterance:
    """Write out/speech.wav and out/truth/speech.npz: the held-out utterance."""
    mesh = mesh or HeadMesh()
    utterance = speak(seconds, seed + HELD_OUT)
    marks = Landmarks(mesh)
    opening = np.array([lip_opening(marks.points(mesh.deform(row), 0.0)) for row in utterance.articulation])
    save_wav(out / "speech.wav", utterance.samples)
    write_npz(out / "truth" / "speech.npz", lip_opening=opening.astype(np.float32), **_spoken(utterance))
    return utterance


def make_clip(out: Path, seconds: float = 12.0, size: int = 256, seed: int = 0, masks: bool = True) -> None:
    """Write out/demo.mp4 and its truth."""
    utterance = speak(seconds, seed)
    focal = FOCAL * size
    renderer = HeadRenderer(size, focal, seed, DISTANCE)
    marks = Landmarks(renderer.mesh)
    frames, euler, trans = poses(len(utterance.articulation), seed)
    points = []
    with VideoWriter(out / "demo.mp4", size, size, audio=utterance.samples, crf=12) as writer:
        for i, pose in enumerate(progress(frames, label="demo head")):
            picture, classes = renderer.render(pose, utterance.articulation[i])
            writer.add(picture)
            if masks:
                write_parsing(out / "truth" / "masks" / f"{i}.png", classes)
            points.append(marks.points(renderer.mesh.deform(utterance.articulation[i]), pose.blink))
    points = np.stack(points)
    rotation = np.stack([p.rotation for p in frames])
    camera = points @ rotation.transpose(0, 2, 1) + trans[:, None]
    pixels = project(*(torch.from_numpy(a) for a in (points, rotation, trans)), focal, size / 2, size / 2).numpy()
    write_npz(
        out / "truth" / "truth.npz",
        landmarks68=pixels.astype(np.float32), points68=points.astype(np.float32), visible=_visible(camera),
        euler=euler.astype(np.float32), trans=trans.astype(np.float32), focal=np.float32(focal),
        lip_opening=lip_opening(points).astype(np.float32), blink=np.array([p.blink for p in frames], np.float32),
        **_spoken(utterance),
    )  # fmt: skip


def _spoken(utterance: Utterance) -> dict[str, np.ndarray]:
    return {
        "articulation": utterance.articulation.astype(np.float32),
        "phonemes": np.array([symbol for symbol, _, _ in utterance.phonemes]),
        "phoneme_times": np.array([(start, end) for _, start, end in utterance.phonemes], np.float32),
    }


def _visible(camera: np.ndarray) -> np.ndarray:
    """(F, 68) bool: only the contour's ends can turn away; one is hidden when it lies inside the outline of its half."""
    visible = np.ones(camera.shape[:2], bool)
    screen = camera[..., 0] / -camera[..., 2]
    left, right = screen[:, :8], screen[:, 9:17]
    visible[:, :7] = left[:, :7] <= left[:, 1:] + 1e-3
    visible[:, 10:17] = right[:, 1:] >= right[:, :-1] - 1e-3
    return visible


@command_line
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/demo"), help="folder to write")
    parser.add_argument("--seconds", type=float, default=12.0, help="length of the clip")
    parser.add_argument("--size", type=int, default=256, help="side of its frames, pixels")
    parser.add_argument("--seed", type=int, default=0, help="another seed: other words, movements and skin")
    parser.add_argument("--speech-seconds", type=float, default=6.0, help="length of the held-out utterance")
    parser.add_argument("--speech-only", action="store_true", help="write only speech.wav and its truth")
    options = parser.parse_args(arguments)
    if min(options.seconds, options.speech_seconds) < 1:
        raise UserError("a clip or speech shorter than 1 second says nothing; give --seconds and --speech-seconds of at least 1")
    if options.size < 64 or options.size % 2:
        raise UserError(f"--size {options.size}: the video needs an even side of at least 64 pixels")
    make_speech(options.out, options.speech_seconds, options.seed)
    if not options.speech_only:
        make_clip(options.out, options.seconds, options.size, options.seed)
    print(options.out / ("speech.wav" if options.speech_only else "demo.mp4"))


if __name__ == "__main__":
    main()
