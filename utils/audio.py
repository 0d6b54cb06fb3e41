"""Audio in and out: whatever the file holds, whole or in pieces; speech is 16 kHz mono float32."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import wave
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np

from utils.constants import SAMPLE_RATE
from utils.errors import UserError
from utils.files import atomic_path

AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
GAP = 0.02  # seconds by which time stamps may run ahead of the sound itself


def load_audio(path: Path, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """(S,) float32 in [-1, 1], mono, resampled to `sample_rate`, from any audio or video file FFmpeg reads.

    Raises UserError if there is no file, no audio track, nothing decodable or no sample.
    """
    return np.concatenate(list(_decode(Path(path), sample_rate, "mono")), axis=1)[0]


def load_sound(path: Path) -> tuple[np.ndarray, int]:
    """(C, S) float32 in [-1, 1] and the sample rate: the sound as it is, to go beside a picture.

    One or two channels (more are mixed to two); a rate that AAC does not know becomes 48000. Errors as `load_audio`.
    """
    sound = open_sound(path)
    return np.concatenate(list(sound.blocks()), axis=1), sound.rate


@dataclasses.dataclass(frozen=True)
class Sound:
    """Sound to go beside a picture: `blocks()` gives it from its beginning, in consecutive (C, n) float32 pieces.

    It can be pickled, for a process of its own (utils/video_process.py).
    """

    rate: int
    channels: int
    blocks: Callable[[], Iterator[np.ndarray]]

    @classmethod
    def of(cls, samples: np.ndarray, rate: int) -> Sound:
        """(S,) or (C, S) float32 samples that are in memory already."""
        samples = np.atleast_2d(samples)
        return cls(rate, len(samples), functools.partial(iter, (samples,)))


def open_sound(path: Path) -> Sound:
    """What `load_sound` reads, decoded while it is used: an hour takes no more memory than a second. Errors as `load_audio`."""
    path = Path(path)
    with _open(path) as container:
        stream = container.streams.audio[0]
        rate = stream.rate if stream.rate in AAC_RATES else 48_000
        layout = "mono" if stream.channels == 1 else "stereo"
    return Sound(rate, 1 if layout == "mono" else 2, functools.partial(_decode, path, rate, layout))


class Recording:
    """The speech of a file as 16 kHz mono float32 samples that slice like an array, decoded where they are read.

    Only `window` samples before the last one read are held, so that hours take no more memory than minutes; reading further
    back starts again from the beginning. Making one decodes the whole file once, since only that tells its length, and so
    raises what `load_audio` would.
    """

    def __init__(self, path: Path, window: int = 10 * SAMPLE_RATE):
        self._path, self._window = Path(path), window
        self._length = sum(block.shape[1] for block in self.blocks())
        self._restart()

    def blocks(self) -> Iterator[np.ndarray]:
        """(1, n) pieces from the beginning."""
        return _decode(self._path, SAMPLE_RATE, "mono")

    def _restart(self) -> None:
        self._blocks, self._first, self._held = self.blocks(), 0, np.zeros(0, np.float32)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, key: slice | np.ndarray) -> np.ndarray:
        """The samples of a slice, or those that (n,) indices from 0 on name."""
        if not isinstance(key, slice):
            low = int(key.min())
            return self[low : int(key.max()) + 1][key - low]
        start, stop, _ = key.indices(self._length)
        if start < self._first:
            self._restart()
        parts, end = [self._held], self._first + len(self._held)
        while end < stop:
            parts.append(next(self._blocks)[0])
            end += len(parts[-1])
            if end < start - self._window:  # a long way forward: what is passed is not kept
                self._first, parts = end, []
        held = np.concatenate(parts) if len(parts) != 1 else parts[0]
        result = held[start - self._first : stop - self._first].copy()
        if len(held) > 3 * self._window:
            passed = max(0, start - self._window - self._first)
            held, self._first = held[passed:].copy(), self._first + passed
        self._held = held
        return result


def _open(path: Path) -> av.container.InputContainer:
    if not path.is_file():
        raise UserError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; give an audio file")
    try:
        container = av.open(str(path.absolute()))  # FFmpeg would take "talk:1.mp4" for a protocol
    except av.FFmpegError as error:
        raise _undecodable(path, error) from None
    if not container.streams.audio:
        container.close()
        raise UserError(f"{path} has no audio track; add one (the mouth is learned from it) or choose another file")
    return container


def _undecodable(path: Path, error: av.FFmpegError) -> UserError:
    return UserError(f"{path} is not audio that can be decoded ({error.strerror}); convert it to WAV and try again")


class _Resampler:
    """av.AudioResampler that goes on where the sound changes its rate or channels midway, as files glued together do."""

    def __init__(self, **target):
        self._target, self._source = target, None
        self._inner = av.AudioResampler(**target)

    def resample(self, frame: av.AudioFrame | None) -> list[av.AudioFrame]:
        source = frame and (frame.sample_rate, frame.layout.name, frame.format.name)
        rest = []
        if frame is not None and source != self._source:
            if self._source is not None:
                rest, self._inner = self._inner.resample(None), av.AudioResampler(**self._target)
            self._source = source
        return rest + self._inner.resample(frame)


def _in_time(frames: Iterator[av.AudioFrame]) -> Iterator[av.AudioFrame]:
    """The frames of a track, with silence where their time stamps jump ahead: what is missing does not bring the rest forward."""
    end = None  # seconds
    for frame in frames:
        end = frame.time if end is None else end
        while frame.time is not None and frame.time - end > GAP:
            missing = round((frame.time - end) * frame.sample_rate)
            silence = av.AudioFrame(frame.format.name, frame.layout.name, min(missing, frame.sample_rate))
            for plane in silence.planes:
                plane.update((b"\x80" if frame.format.name in ("u8", "u8p") else b"\0") * plane.buffer_size)
            silence.sample_rate = frame.sample_rate
            yield silence
            end += silence.samples / frame.sample_rate
        yield frame
        end = None if end is None else end + frame.samples / frame.sample_rate


def _decode(path: Path, rate: int, layout: str) -> Iterator[np.ndarray]:
    """(C, n) float32 pieces of about a second."""
    parts: list[np.ndarray] = []
    count = total = 0
    with _open(path) as container:
        resampler = _Resampler(format="fltp", layout=layout, rate=rate)
        try:
            # None draws out what the resampler holds back
            for frame in itertools.chain(_in_time(container.decode(audio=0)), [None]):
                for out in resampler.resample(frame):
                    parts.append(np.nan_to_num(out.to_ndarray(), posinf=0, neginf=0))  # what is no number is silence
                    count += out.samples
                if count >= rate or (frame is None and count):
                    total += count
                    yield np.concatenate(parts, axis=1).astype(np.float32, copy=False)
                    parts, count = [], 0
        except av.FFmpegError as error:
            raise _undecodable(path, error) from None
    if total == 0:
        raise UserError(f"{path} holds no audio samples; give a recording with sound in it")


def save_wav(path: Path, samples: np.ndarray, sample_rate: int = SAMPLE_RATE) -> None:
    """Write (S,) or (S, C) float samples as 16-bit PCM WAV, atomically."""
    with atomic_path(path) as temporary:
        with wave.open(str(temporary), "wb") as file:
            file.setparams((samples.shape[1] if samples.ndim == 2 else 1, 2, sample_rate, 0, "NONE", ""))
            file.writeframes(np.rint(np.clip(samples, -1.0, 1.0) * 32767).astype("<i2").tobytes())
