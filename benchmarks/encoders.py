"""Speech encoders swapped by a flag: how well do lips follow each, on the speaker's held-out sound and on other speech?

    python benchmarks/encoders.py -s data/x ../shared/audio/*.wav [--encoders whisper mel] [any setting of train.py]

Trains model/<x>_<encoder> with each (a model that is there is taken as it is), measures its held-out frames, and lets it speak
every recording, a second of silence added at its end. Of other speech there is no true mouth; its opening is held against the
loudness, and in silence against the speaker's filmed one: 0 % of the range is how shut the mouth is in the least open twentieth of
the clip's frames, 100 % how open in the most open one. Silence should stay below 10 %.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.clip import ROOT, timed
from benchmarks.demo import lips_of_video
from scene.talking_dataset_readers import TalkingDatasetReader
from utils import driving, speech
from utils.audio import load_audio, save_wav
from utils.constants import SAMPLE_RATE, SAMPLES_PER_FRAME
from utils.dataset_folder import DatasetFolder
from utils.errors import command_line
from utils.files import read_json, write_npy
from utils.image_metrics import correlation_and_lag, lip_opening

SILENCE = 1.0  # seconds added to every recording
BOUNDS = (5, 95)  # percentiles of the filmed opening that are 0 and 100 % of its range


def encode(folder: DatasetFolder, encoder: str) -> None:
    """Write aud_<encoder>.npy, as process.py --audio <encoder> does, unless it is there."""
    path = folder.audio_features(encoder)
    if not path.exists():
        samples = load_audio(folder.require(folder.audio))
        write_npy(path, speech.encode(encoder, samples, -(-len(samples) // SAMPLES_PER_FRAME)))


def spoken(model: Path, recording: Path, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Lip opening (F,) and loudness (F,) dB of what the model says of a recording with silence at its end."""
    samples = np.concatenate([load_audio(recording), np.zeros(int(SILENCE * SAMPLE_RATE), np.float32)])
    longer = folder / f"{recording.stem}.wav"
    save_wav(longer, samples)
    timed(f"  {recording.stem[:12]}", ["render.py", "-m", str(model), "--custom_aud", str(longer)])
    (video,) = (model / "custom").rglob(f"*_custom_{recording.stem}_*_renders.mp4")
    opening = lips_of_video(video)
    return opening, driving.frame_levels([samples], len(opening))


@command_line
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-s", "--source_path", type=Path, required=True, help="data set folder")
    parser.add_argument("recordings", type=Path, nargs="*", help="speech of anybody")
    parser.add_argument("--encoders", nargs="+", default=["whisper", "mel"], choices=tuple(speech.ENCODERS))
    args, settings = parser.parse_known_args(argv)
    folder = DatasetFolder(args.source_path)
    reader, rows = TalkingDatasetReader(args.source_path), []
    shut, opened = np.percentile(lip_opening(np.stack([reader.landmarks(i) for i in reader.ids])), BOUNDS)
    for encoder in args.encoders:
        encode(folder, encoder)
        model = ROOT / "model" / f"{args.source_path.resolve().name}_{encoder}"
        print(encoder, flush=True)
        if not (model / "point_cloud").exists():
            timed("  train", ["train.py", "-s", str(args.source_path), "-m", str(model), "--audio_encoder", encoder, *settings])
        timed("  render test", ["render.py", "-m", str(model), "--skip_train"])
        timed("  metrics", ["metrics.py", "-m", str(model)])
        result = list(read_json(model / "results.json").values())[-1]
        rows.append(f"| {encoder} | held out | {result['LipCorrelation']:.2f}, {result['LipLag']} | {result['LMD_px']:.2f} px | |")
        with tempfile.TemporaryDirectory() as temporary:
            for recording in args.recordings:
                opening, levels = spoken(model, recording, Path(temporary))
                follows, _ = correlation_and_lag(opening, np.clip(levels, np.percentile(levels, 95) - 40, None))
                silent = 100 * (opening[driving.silence(levels) == 1] - shut) / (opened - shut)
                rows.append(f"| {encoder} | {recording.stem} | loudness {follows:.2f} | | {np.nanmean(silent):.0f} % "
                            f"({len(silent)} frames) |")  # fmt: skip
    print("\n".join(["| encoder | speech | lips: correlation, lag | LMD | opening in silence |", "|---|---|---|---|---|", *rows]))


if __name__ == "__main__":
    main()
