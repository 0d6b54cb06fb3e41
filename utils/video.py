"""Video in and out through PyAV: frames are decoded lazily at 25 fps and encoded one by one; nothing holds a whole clip."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from utils.constants import FPS, SAMPLE_RATE
from utils.errors import UserError
from utils.files import atomic_path


@dataclasses.dataclass
class VideoInfo:
    """What a container says of its first video track (after its display rotation)."""

    width: int
    height: int
    fps: float
    duration: float  # seconds, estimated from the container; decoding decides
    has_audio: bool
    audio_offset: float = 0.0  # seconds from the first picture to the first sound; negative where the sound starts earlier


def _open(path: Path) -> av.container.InputContainer:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the path of a video file")
    try:
        return av.open(str(path))
    except av.FFmpegError as error:
        raise UserError(f"{path} cannot be read as a video ({error.strerror}); it may be truncated, or no video at all") from None


def probe(path: Path) -> VideoInfo:
    """Raises UserError if the file is absent, unreadable or has no picture."""
    with _open(path) as container:
        if not container.streams.video:
            raise UserError(f"{path} has no video track; give a video of one talking person")
        stream = container.streams.video[0]
        seconds = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
        try:
            first = next(container.decode(video=0), None)
        except av.FFmpegError as error:
            raise UserError(f"{path} cannot be decoded ({error.strerror}): it is truncated or damaged; export it again as "
                            "H.264 mp4") from None  # fmt: skip
        if first is None:
            raise UserError(f"{path} holds no decodable picture: it is truncated or damaged; export it again as H.264 mp4")
        width, height = first.width, first.height
        if first.rotation % 180:
            width, height = height, width
        offset = 0.0
        if container.streams.audio and container.streams.audio[0].start_time is not None and first.time is not None:
            sound = container.streams.audio[0]
            offset = float(sound.start_time * sound.time_base) - first.time
        return VideoInfo(width, height, float(stream.average_rate or FPS), seconds, bool(container.streams.audio), offset)


def sample_frames(path: Path, count: int) -> Iterator[tuple[float, np.ndarray]]:
    """Yield up to `count` (seconds from the first picture, (H, W, 3) uint8 RGB) pairs spread over the whole clip, in order.

    Fast: keyframes serve where one lies near enough. Raises UserError if the file ends before the length its header promises.
    """
    with _open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        times, keys = _packet_times(path, container, stream)
        start, end = times[0], times[-1]
        spacing = (end - start) / count
        frames, position, last = None, -np.inf, -np.inf
        for k in range(count):
            target = start + (k + 0.5) * spacing
            near = keys[np.abs(keys - target).argmin()]
            target = near if abs(near - target) <= spacing / 2 else target
            target = times[np.searchsorted(times, target, side="right") - 1]
            if target <= last:
                continue
            key = keys[np.searchsorted(keys, target, side="right") - 1]
            try:
                if frames is None or key > position:
                    container.seek(round(key / stream.time_base), stream=stream)
                    frames = container.decode(stream)
                for frame in frames:
                    position = float(frame.pts * stream.time_base) if frame.pts is not None else position
                    if position >= target - 1e-6:
                        break
                else:
                    return
            except av.FFmpegError as error:
                raise UserError(f"{path} is damaged {target - start:.1f} s from its start ({error.strerror}); "
                                "cut the clip before that point or export it again") from None  # fmt: skip
            last = target
            yield float(position - start), _to_rgb(frame)


def _packet_times(path: Path, container: av.container.InputContainer, stream: av.VideoStream) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of every picture and of every keyframe, ascending, without decoding; refuses a file that ends too early."""
    times, keys, end = [], [], 0.0
    try:
        for packet in container.demux(stream):
            if packet.pts is not None:
                times.append(float(packet.pts * stream.time_base))
                end = max(end, times[-1] + float((packet.duration or 0) * stream.time_base))
                if packet.is_keyframe:
                    keys.append(times[-1])
    except av.FFmpegError as error:
        raise UserError(f"{path} is damaged ({error.strerror}); export it again") from None
    if not times or not keys:
        raise UserError(f"{path} holds no decodable picture: it is truncated or damaged; export it again as H.264 mp4")
    promised = float(stream.duration * stream.time_base) if stream.duration else 0.0
    held = end - min(times)
    if held < promised - max(0.25, 0.01 * promised):
        raise UserError(f"{path} is truncated: it holds {held:.1f} s of the {promised:.1f} s its header promises; "
                        "copy or export it again")  # fmt: skip
    return np.sort(times), np.sort(keys)


def read_frames(path: Path, fps: int = FPS, start: int = 0) -> Iterator[np.ndarray]:
    """Yield (H, W, 3) uint8 RGB frames at `fps`, upright: frame i is the picture shown at i / fps s from the first one.

    Frames before `start` are decoded but not converted. Raises UserError naming the moment if the stream is damaged.
    """
    with _open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        index, origin, shown = 0, None, None
        try:
            for count, frame in enumerate(container.decode(stream)):
                time = float(frame.pts * stream.time_base) if frame.pts is not None else count / float(stream.average_rate or fps)
                origin = time if origin is None else origin
                # half a source tick of tolerance, so that 25 fps material maps one to one
                while shown is not None and (index + 0.5) / fps < time - origin + 0.25 / fps:
                    if index >= start:
                        yield _to_rgb(shown)
                    index += 1
                shown = frame
        except av.FFmpegError as error:
            raise UserError(f"{path} is damaged {index / fps:.1f} s from its start ({error.strerror}); "
                            "cut the clip before that point or export it again") from None  # fmt: skip
        if shown is not None and index >= start:
            yield _to_rgb(shown)


def _to_rgb(frame: av.VideoFrame) -> np.ndarray:
    image = frame.to_ndarray(format="rgb24")
    # frame.rotation is the counter-clockwise turn (degrees) that shows the picture upright
    # FFmpeg pads its rows where the width is odd or no multiple of 32; what takes a bare buffer (MediaPipe) would read that askew
    return np.ascontiguousarray(np.rot90(image, frame.rotation // 90) if frame.rotation else image)


class VideoWriter:
    """H.264 (+ AAC) mp4, one frame at a time, the audio exactly the samples given; the file appears when it is complete.

    with VideoWriter(path, width, height, audio=samples) as writer: writer.add(frame)
    `audio` is (S,) or (C, S) float32, one or two channels, at `sample_rate`; both tracks start at time zero, so there is no
    drift by construction.
    """

    def __init__(self, path: Path, width: int, height: int, audio: np.ndarray | None = None,
                 sample_rate: int = SAMPLE_RATE, crf: int = 18, lossless: bool = False):  # fmt: skip
        if width % 2 or height % 2:
            raise UserError(f"{path}: H.264 needs even sides, not {width}x{height}")
        self._atomic = atomic_path(Path(path))
        self._container = av.open(str(self._atomic.__enter__()), "w", format="mp4", options={"movflags": "+faststart"})
        codec, pixels = ("libx264rgb", "rgb24") if lossless else ("libx264", "yuv420p")
        options = {"qp": "0", "preset": "veryfast"} if lossless else {"crf": str(crf), "preset": "veryfast"}
        self._video = self._container.add_stream(codec, rate=FPS, options=options)
        self._video.width, self._video.height, self._video.pix_fmt = width, height, pixels
        self._video.codec_context.time_base = Fraction(1, FPS)
        self._audio = None if audio is None else np.atleast_2d(audio)
        self._frames = self._samples = 0
        self._to_the_end = True
        if audio is not None:
            self._rate, self._layout = sample_rate, ("mono", "stereo")[len(self._audio) - 1]
            self._track = self._container.add_stream("aac", rate=sample_rate, layout=self._layout, options={"b": "128k"})

    def add(self, frame: np.ndarray) -> None:
        """Append one (H, W, 3) uint8 RGB frame and the audio that belongs to it."""
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture.pts = self._frames
        picture.time_base = Fraction(1, FPS)
        self._container.mux(self._video.encode(picture))
        self._frames += 1
        self._add_audio(self._frames * self._rate // FPS if self._audio is not None else 0)

    def end_with_last_frame(self) -> None:
        """Leave out the audio for which no frame was added: for a rendering that stops early."""
        self._to_the_end = False

    def _add_audio(self, until: int) -> None:
        if self._audio is None:
            return
        chunk = self._audio[:, self._samples : until]
        if chunk.shape[1] == 0:
            return
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(chunk, dtype=np.float32), format="fltp", layout=self._layout)
        frame.sample_rate, frame.pts, frame.time_base = self._rate, self._samples, Fraction(1, self._rate)
        self._container.mux(self._track.encode(frame))
        self._samples += chunk.shape[1]

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self._add_audio(self._audio.shape[1] if self._audio is not None and self._to_the_end else 0)
            for stream in self._container.streams:
                self._container.mux(stream.encode(None))
        self._container.close()
        self._atomic.__exit__(kind, error, trace)
