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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.errors import UserError, command_line  # noqa: E402


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
    from data_utils.demo_head.clip import make_clip, make_speech  # seconds to import, and --help does without

    make_speech(options.out, options.speech_seconds, options.seed)
    if not options.speech_only:
        make_clip(options.out, options.seconds, options.size, options.seed)
    print(options.out / ("speech.wav" if options.speech_only else "demo.mp4"))


if __name__ == "__main__":
    main()
