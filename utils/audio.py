"""Audio in and out: 16 kHz mono float32 in memory, whatever the file holds."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import soundfile

from utils.constants import SAMPLE_RATE
from utils.errors import UserError
from utils.files import atomic_path


def load_audio(path: Path, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """(S,) float32 in [-1, 1], mono, resampled to `sample_rate`, from any audio or video file FFmpeg reads.

    Raises UserError if there is no file, no audio track, nothing decodable or no sample.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; give an audio file")
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise UserError(f"{path} has no audio track; add one (the mouth is learned from it) or choose another file")
            resampler = av.AudioResampler(format="flt", layout="mono", rate=sample_rate)
            parts = [out.to_ndarray()[0] for frame in container.decode(audio=0) for out in resampler.resample(frame)]
            parts += [out.to_ndarray()[0] for out in resampler.resample(None)]
    except av.FFmpegError as error:
        raise UserError(f"{path} is not audio that can be decoded ({error.strerror}); convert it to WAV and try again") from None
    samples = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    if samples.size == 0:
        raise UserError(f"{path} holds no audio samples; give a recording with sound in it")
    return samples.astype(np.float32)


def save_wav(path: Path, samples: np.ndarray, sample_rate: int = SAMPLE_RATE) -> None:
    """Write (S,) or (S, C) float samples as 16-bit PCM WAV, atomically."""
    with atomic_path(path) as temporary:
        soundfile.write(temporary, np.clip(samples, -1.0, 1.0), sample_rate, subtype="PCM_16")
