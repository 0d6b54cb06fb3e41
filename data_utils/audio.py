"""Stage 1: the clip's sound -> aud.wav (16 kHz mono) and aud_<encoder>.npy, one feature row a frame."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from utils import speech
from utils.audio import load_audio, save_wav
from utils.constants import SAMPLE_RATE, SAMPLES_PER_FRAME
from utils.dataset_folder import DatasetFolder
from utils.errors import UserError
from utils.files import write_npy
from utils.video import probe

VERSION = 1
SILENT = -60.0  # dBFS of the loud parts of a clip without speech
_PAUSE = -45.0  # dB of a pause below the loud parts
_LONG_PAUSE = 3.0  # seconds without speech that are worth a word: the mouth learns little there


def run(folder: DatasetFolder, options: argparse.Namespace) -> dict[str, Any]:
    """Write aud.wav and aud_<encoder>.npy (F, D) float32, F = ceil(25 x duration), row i centred on the middle of frame i.

    The sound is placed against the first picture as the container says. Raises UserError naming the video if it has no audio track
    or is silent (unless options.force), and if options.audio names no encoder.
    """
    name = options.audio
    if name != "auto" and name not in speech.ENCODERS:
        raise UserError(f"--audio {name} is not known; use auto, {', '.join(speech.ENCODERS)}")
    info = probe(options.video)
    samples = aligned(load_audio(options.video), info.audio_offset)
    if len(samples) == 0:
        raise UserError(f"{options.video}: its sound ends before its first picture; export it again with both together")
    facts, warnings = sound_facts(samples), []
    if facts["loudness_db"] < SILENT and not options.force:
        raise UserError(f"{options.video} is silent ({facts['loudness_db']:.0f} dB), and the mouth is learned from the sound; use "
                        "a clip with speech, or --force to go on regardless")  # fmt: skip
    if facts["longest_silence"] > _LONG_PAUSE:
        warnings.append(f"nothing is heard for {facts['longest_silence']:.1f} s; speech throughout teaches the mouth more")
    missing = info.duration - facts["seconds"]
    if missing > 0.2:
        warnings.append(f"the sound is {missing:.1f} s shorter than the picture; the last frames have no sound and are left out")
    if name == "auto":
        name = speech.best_encoder()
        best = next(n for n, encoder in speech.ENCODERS.items() if n == name or not encoder.by_user)
        if name != best:
            warnings.append(f"speech features are {name}, lips follow {best} better; get its weights (python -m utils.model_store)")
    frames = -(-len(samples) // SAMPLES_PER_FRAME)
    features = speech.encode(name, samples, frames, label="" if options.quiet else f"speech features ({name})")
    save_wav(folder.audio, samples)
    write_npy(folder.audio_features(name), features)
    return {"backend": name, **facts, "frames": frames, "width": features.shape[1],
            "audio_offset_seconds": round(info.audio_offset, 3), "warnings": warnings}  # fmt: skip


def aligned(samples: np.ndarray, offset: float) -> np.ndarray:
    """Samples from the first picture on, for sound (S,) that begins `offset` seconds after it (before, if negative)."""
    shift = round(offset * SAMPLE_RATE)
    return samples[-shift:] if shift < 0 else np.concatenate([np.zeros(shift, samples.dtype), samples])


def levels(samples: np.ndarray) -> np.ndarray:
    """(n,) dBFS of (S,) samples at 16 kHz, in pieces of 0.1 s (the last, shorter one left out; a clip below that is one piece)."""
    tenth = min(SAMPLE_RATE // 10, len(samples))
    power = np.square(samples[: len(samples) // tenth * tenth].reshape(-1, tenth)).mean(1)
    return 10 * np.log10(power + 1e-12)


def sound_facts(samples: np.ndarray) -> dict[str, float]:
    """What is measured of (S,) samples at 16 kHz, in pieces of 0.1 s.

    loudness_db: level that the loudest tenth of the pieces exceeds, dBFS; silence_share: part of the pieces 45 dB below it;
    longest_silence: seconds.
    """
    level = levels(samples)
    loud = float(np.percentile(level, 90))
    silent = level < max(loud + _PAUSE, SILENT)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], silent, [0]])))
    longest = float((edges[1::2] - edges[::2]).max(initial=0)) / 10
    return {"seconds": round(len(samples) / SAMPLE_RATE, 3), "loudness_db": round(loud, 1),
            "silence_share": round(float(silent.mean()), 3), "longest_silence": round(longest, 1)}  # fmt: skip
