"""Hours of speech through render.py: does memory stay flat, is every frame there, is the sound the given one, does sync hold?

    python benchmarks/long.py -m model/x --minutes 60
    python benchmarks/long.py -m model/x --minutes 10 --device cuda

Makes speech-like sound (syllables with pauses), renders it as a user would, watches the memory of the process, then decodes the
video: frames are counted, the sound is compared in windows from the first second to the last, and the mouth (how dark the picture
is between the lips) is held against the loudness at the beginning and at the end. Exit status 1 if anything is not as promised.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arguments import read_cfg_args
from scene.talking_dataset_readers import TalkingDatasetReader
from utils.audio import Recording
from utils.constants import FPS, SAMPLE_RATE
from utils.driving import frame_levels, replayed_ids
from utils.errors import UserError, command_line
from utils.image_metrics import correlation_at

ROOT = Path(__file__).resolve().parents[1]
WINDOW = 2 * SAMPLE_RATE  # of sound that is compared at once
CLEAR = 0.3  # correlation of mouth and loudness below which their lag means nothing
SYNCED = 60 * FPS  # frames at either end whose mouth is held against the sound, or a tenth of all if that is more
REACH = 5  # frames of lag that are tried
HOST, CUDA_LIBRARIES = 2048, 1536  # MiB that rendering may take of the host, and what CUDA's libraries take there besides
DRIFT = 0.5  # frames between the lags of both ends that a mouth which follows loosely may seem to drift


def speech_like(seconds: float, seed: int = 0) -> Iterator[np.ndarray]:
    """(n,) float32 pieces of 16 kHz sound: voiced syllables of two formants, two to five a word, words with pauses between."""
    rng, left = np.random.default_rng(seed), round(seconds * SAMPLE_RATE)
    while left > 0:
        pieces = []
        for _ in range(rng.integers(2, 6)):
            time = np.arange(int(rng.uniform(0.12, 0.28) * SAMPLE_RATE)) / SAMPLE_RATE
            pitch, first, second = rng.uniform(90, 140), rng.uniform(300, 900), rng.uniform(900, 2400)
            harmonics = np.arange(1, 28)[:, None] * pitch
            gains = np.exp(-(((harmonics - first) / 150) ** 2)) + 0.5 * np.exp(-(((harmonics - second) / 220) ** 2))
            shape = np.sin(np.pi * np.arange(len(time)) / len(time)) ** 0.5
            pieces.append(0.12 * shape * (gains * np.sin(2 * np.pi * harmonics * time)).sum(0))
        pieces.append(rng.normal(0, 1e-4, int(rng.uniform(0.3, 1.2) * SAMPLE_RATE)))
        word = np.concatenate(pieces).astype(np.float32)[:left]
        left -= len(word)
        yield word


def write_speech(path: Path, seconds: float) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        for piece in speech_like(seconds):
            file.writeframes((np.clip(piece, -1, 1) * 32767).astype("<i2").tobytes())


def resident(pid: int) -> float:
    """MiB of memory that a running process holds (Linux); 0 when it has ended."""
    try:
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def on_gpu(pid: int) -> float:
    """MiB of GPU memory that a process holds; 0 without a GPU."""
    try:
        query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
        rows = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.splitlines()
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return 0.0
    return sum(float(row.split(",")[1]) for row in rows if row.split(",")[0].strip() == str(pid))


def watched(command: list[str], every: float = 2.0) -> tuple[str, float, np.ndarray]:
    """What a program printed, its wall seconds, and (n, 3) its seconds, host MiB and GPU MiB; UserError if it failed."""
    begin, samples = time.monotonic(), []
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, env=os.environ)
        while process.poll() is None:
            samples.append((time.monotonic() - begin, resident(process.pid), on_gpu(process.pid)))
            time.sleep(every)
        seconds = time.monotonic() - begin
        output.seek(0)
        printed = output.read()
    if process.returncode:
        raise UserError(f"{' '.join(command)} failed with status {process.returncode}")
    return printed, seconds, np.array([s for s in samples if s[1]])


def sound_agreement(given: Path, video: Path) -> list[tuple[float, float, int]]:
    """(second, correlation, shift in samples) of windows from the first to the last second: the video's sound against the given."""
    a, b = Recording(given), Recording(video)
    rows = []
    for start in np.linspace(0, min(len(a), len(b)) - 2 * WINDOW, 12).astype(int):
        x, y = a[start : start + WINDOW].astype(np.float64), b[start : start + WINDOW].astype(np.float64)
        spectrum = np.fft.rfft(y, 2 * WINDOW) * np.fft.rfft(x, 2 * WINDOW).conj()
        shift = int(np.argmax(np.fft.irfft(spectrum)))
        shift = shift - 2 * WINDOW if shift > WINDOW else shift
        rows.append((start / SAMPLE_RATE, float(np.corrcoef(x, y)[0, 1]), shift))
    return rows


def peak_of_correlation(mouth: np.ndarray, loud: np.ndarray) -> tuple[float, float]:
    """Largest correlation of two curves (F,) over the lags within REACH, and where: fractions of a frame by a parabola."""
    lags = range(-REACH - 1, REACH + 2)
    values = [correlation_at(mouth, loud, lag) for lag in lags]
    k = 1 + int(np.argmax(values[1:-1]))
    before, peak, after = values[k - 1 : k + 2]
    bend = before - 2 * peak + after
    return float(peak), float(lags[k] + (0.5 * (before - after) / bend if bend < 0 else 0.0))


def mouth_curves(reader: TalkingDatasetReader, video: Path, frames: int, ends: int) -> tuple[int, np.ndarray]:
    """Frames in the video, and (frames,) how dark it is between the lips in the `ends` frames at both ends, NaN between."""
    poses = replayed_ids(reader.ids, frames)
    darkness, count = np.full(frames, np.nan), 0
    with av.open(str(video)) as container:
        container.streams.video[0].thread_type = "AUTO"
        for k, frame in enumerate(container.decode(video=0)):
            count += 1
            if k < frames and (k < ends or k >= frames - ends):
                lips = reader.landmarks(poses[k])[60:68]
                (x0, y0), (x1, y1) = lips.min(0).astype(int) - 1, lips.max(0).astype(int) + 3
                darkness[k] = -float(frame.to_ndarray(format="gray")[y0:y1, x0:x1].mean())
    return count, darkness


@command_line
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model_path", type=Path, required=True, help="model folder")
    parser.add_argument("-s", "--source_path", type=Path, help="data set folder (default: the one the model was trained on)")
    parser.add_argument("--minutes", type=float, default=60.0, help="length of the speech (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    args = parser.parse_args(argv)
    if args.minutes < 1:
        raise UserError("--minutes must be at least 1: sync is compared over the first and the last minute")
    source = args.source_path or Path(read_cfg_args(args.model_path).source_path)
    with tempfile.TemporaryDirectory() as folder:
        speech = Path(folder) / "long.wav"
        write_speech(speech, 60 * args.minutes)
        command = [sys.executable, "render.py", "-m", str(args.model_path.resolve()), "-s", str(source.resolve()),
                   "--custom_aud", str(speech), "--device", args.device]  # fmt: skip
        printed, seconds, memory = watched(command)
        wanted = int(60 * args.minutes * FPS)
        print(f"{args.minutes:g} min of speech in {seconds / 60:.1f} min, {wanted / seconds:.0f} frames/s", flush=True)
        tenths = memory[np.linspace(0, len(memory) - 1, 11).astype(int)[1:]]
        for column, name in ((1, "host"), (2, "GPU")):
            if memory[:, column].any():
                print(f"{name} memory, MiB, after each tenth of the time: {' '.join(f'{v:.0f}' for v in tenths[:, column])}; "
                      f"at most {memory[:, column].max():.0f}", flush=True)  # fmt: skip
        video = Path(re.search(r"^(.*_renders\.mp4)  \(", printed, re.MULTILINE)[1])
        reader = TalkingDatasetReader(source)
        synced = max(SYNCED, wanted // 10)
        count, darkness = mouth_curves(reader, video, wanted, synced)
        sound = sound_agreement(speech, video)
        levels = frame_levels((block[0] for block in Recording(speech).blocks()), wanted)
    loud = np.clip(levels, -50, None)
    ends = [peak_of_correlation(darkness[piece], loud[piece]) for piece in (slice(0, synced), slice(-synced, None))]
    print(f"{count} frames of {wanted}")
    worst = min(value for _, value, _ in sound)
    print(f"sound: correlation with the given one at least {worst:.4f}, shifts {sorted({shift for *_, shift in sound})} samples "
          f"(at {', '.join(f'{second:.0f}' for second, *_ in sound)} s)")  # fmt: skip
    for name, (value, lag) in zip(("first", "last"), ends, strict=True):
        print(f"mouth against loudness, {name} {synced / FPS / 60:g} min: correlation {value:.2f}, lag {lag:.2f} frames")
    growth = (tenths[-1] - tenths[4])[1:].max()  # of host and GPU; by half of the time all is loaded and recorded
    faults = []
    if count != wanted:
        faults.append("frames are missing")
    if growth > 100 or memory[:, 1].max() > HOST + CUDA_LIBRARIES * memory[:, 2].any():
        faults.append(f"memory grew by {growth:.0f} MiB")
    if worst < 0.95 or any(shift for *_, shift in sound):
        faults.append("the sound is not the given one")
    if not min(value for value, _ in ends) > CLEAR:
        faults.append("sync cannot be judged: this head's mouth follows the loudness too weakly; take a better trained one")
    elif abs(ends[0][1] - ends[1][1]) > DRIFT:
        faults.append("the end is not in sync with the beginning")
    print("all as promised" if not faults else "; ".join(faults))
    if faults:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
