"""Audio in and out: 16 kHz mono float32 in memory, whatever the file holds."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import soundfile

from utils.constants import SAMPLE_RATE
from utils.errors import UserError
from utils.files import atomic_path

AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)


def load_audio(path: Path, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """(S,) float32 in [-1, 1], mono, resampled to `sample_rate`, from any audio or video file FFmpeg reads.

    Raises UserError if there is no file, no audio track, nothing decodable or no sample.
    """
    return _decode(Path(path), sample_rate, "mono")[0][0]


def load_sound(path: Path) -> tuple[np.ndarray, int]:
    """(C, S) float32 in [-1, 1] and the sample rate: the sound as it is, to go beside a picture.

    One or two channels (more are mixed to two); a rate that AAC does not know becomes 48000. Errors as `load_audio`.
    """
    return _decode(Path(path), None, None)


def _decode(path: Path, rate: int | None, layout: str | None) -> tuple[np.ndarray, int]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; give an audio file")
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise UserError(f"{path} has no audio track; add one (the mouth is learned from it) or choose another file")
            stream = container.streams.audio[0]
            rate = rate or (stream.rate if stream.rate in AAC_RATES else 48_000)
            layout = layout or ("mono" if stream.channels == 1 else "stereo")
            resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate)
            parts = [out.to_ndarray() for frame in container.decode(audio=0) for out in resampler.resample(frame)]
            parts += [out.to_ndarray() for out in resampler.resample(None)]
    except av.FFmpegError as error:
        raise UserError(f"{path} is not audio that can be decoded ({error.strerror}); convert it to WAV and try again") from None
    if not parts or sum(part.shape[1] for part in parts) == 0:
        raise UserError(f"{path} holds no audio samples; give a recording with sound in it")
    return np.concatenate(parts, axis=1).astype(np.float32, copy=False), rate


def save_wav(path: Path, samples: np.ndarray, sample_rate: int = SAMPLE_RATE) -> None:
    """Write (S,) or (S, C) float samples as 16-bit PCM WAV, atomically."""
    with atomic_path(path) as temporary:
        soundfile.write(temporary, np.clip(samples, -1.0, 1.0), sample_rate, subtype="PCM_16")
