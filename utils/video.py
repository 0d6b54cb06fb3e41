"""Video in and out through PyAV: frames are decoded lazily at 25 fps and encoded one by one; nothing holds a whole clip."""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from utils import encoders, hdr
from utils.audio import Sound
from utils.constants import FPS, SAMPLE_RATE
from utils.encoders import Codec
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
    if frame.color_trc in (hdr.PQ, hdr.HLG):
        image = hdr.to_standard_range(image, frame.color_trc)
    # frame.rotation is the counter-clockwise turn (degrees) that shows the picture upright
    # FFmpeg pads its rows where the width is odd or no multiple of 32; what takes a bare buffer (MediaPipe) would read that askew
    return np.ascontiguousarray(np.rot90(image, frame.rotation // 90) if frame.rotation else image)


class FrameReader:
    """Frames of a video by number, as `read_frames` counts them, forth or back: those around the last one are held.

    Going back means decoding from a keyframe on, so a block of frames is decoded at a time; two blocks are held, 250 MB of
    a video of any size. Safe to call from several threads.
    """

    BYTES = 125_000_000  # of a block

    def __init__(self, path: Path, fps: int = FPS):
        self._path, self._fps, self._lock = path, fps, threading.Lock()
        with _open(path) as container:
            stream = container.streams.video[0]
            self._times, self._keys = _packet_times(path, container, stream)
        info = probe(path)
        self.width, self.height = info.width, info.height
        self._block = max(4, self.BYTES // (3 * info.width * info.height))
        self._blocks: collections.OrderedDict[int, list[np.ndarray]] = collections.OrderedDict()

    def __getitem__(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB; the last frame for any index beyond the end. Raises UserError if the video is damaged there."""
        number = index // self._block
        with self._lock:
            if number not in self._blocks:
                while len(self._blocks) > 1:
                    self._blocks.popitem(last=False)
                self._blocks[number] = self._decode(number * self._block)
            self._blocks.move_to_end(number)
            frames = self._blocks[number]
        return frames[min(index % self._block, len(frames) - 1)]

    def _decode(self, first: int) -> list[np.ndarray]:
        wanted = self._times[0] + (np.arange(first, first + self._block) + 0.25) / self._fps  # tolerance as in read_frames
        shown = np.unique(self._times[np.maximum(np.searchsorted(self._times, wanted, side="right") - 1, 0)], return_inverse=True)
        pictures: list[np.ndarray] = []
        with _open(self._path) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            key = self._keys[np.searchsorted(self._keys, shown[0][0], side="right") - 1]
            try:
                container.seek(round(key / stream.time_base), stream=stream)
                for frame in container.decode(stream):
                    if abs(float(frame.pts * stream.time_base) - shown[0][len(pictures)]) < 1e-6:
                        pictures.append(_to_rgb(frame))
                        if len(pictures) == len(shown[0]):
                            break
            except av.FFmpegError as error:
                raise UserError(f"{self._path} is damaged about {first / self._fps:.1f} s from its start ({error.strerror}); "
                                "export it again as H.264 mp4") from None  # fmt: skip
        if not pictures:
            raise UserError(f"{self._path} ends before {first / self._fps:.1f} s; export it again as H.264 mp4")
        return [pictures[min(k, len(pictures) - 1)] for k in shown[1]]


# what HD players expect, and what every file of ours says of itself; untagged, some would take BT.601 for it and shift the hues
BT709 = {"dst_colorspace": Colorspace.ITU709, "dst_color_range": ColorRange.MPEG,
         "dst_color_primaries": ColorPrimaries.BT709, "dst_color_trc": ColorTrc.BT709}  # fmt: skip
AAC = {"b": "128k", "aac_coder": "fast"}  # a third of the work of FFmpeg's default coder, for 0.7 of 40 dB on speech


class VideoWriter:
    """A video with sound, one frame at a time, the sound exactly the one given; the file appears when it is complete.

    with VideoWriter(path, width, height, audio=samples) as writer: writer.add(frame)
    `audio` is a utils.audio.Sound, or (S,) or (C, S) float32 samples, one or two channels, at `sample_rate`; it is read as
    the frames come in. Both tracks start at time zero, so there is no drift by construction. The suffix of `path` names the
    container, and `codec` (utils.encoders) what the frames are encoded with: H.264 at its default quality unless given. Colours
    are written as BT.709 of limited range, and tagged so; a codec that stores RGB keeps them as they are.
    """

    def __init__(self, path: Path, width: int, height: int, audio: np.ndarray | Sound | None = None,
                 sample_rate: int = SAMPLE_RATE, crf: int = 18, lossless: bool = False, codec: Codec | None = None):  # fmt: skip
        codec = codec or encoders.codec(crf=crf, lossless=lossless)
        if (width % 2 or height % 2) and codec.pixels == "yuv420p":
            raise UserError(f"{path}: H.264 needs even sides, not {width}x{height}")
        self._atomic = atomic_path(Path(path))
        options = {"movflags": "+faststart"} if Path(path).suffix in (".mp4", ".mov") else {}
        self._container = av.open(str(self._atomic.__enter__()), "w", options=options)
        self._video = self._container.add_stream(codec.name, rate=FPS, options=codec.options)
        self._video.width, self._video.height, self._video.pix_fmt = width, height, codec.pixels
        context = self._video.codec_context
        context.time_base = Fraction(1, FPS)
        self._colours = {}
        if codec.pixels.startswith("yuv"):
            self._colours = {"format": codec.pixels} | BT709
            context.colorspace, context.color_range, context.color_primaries, context.color_trc = BT709.values()
        sound = audio if isinstance(audio, Sound) or audio is None else Sound.of(audio, sample_rate)
        self._blocks = None if sound is None else sound.blocks()
        self._frames = self._samples = 0
        self._to_the_end = True
        if sound is not None:
            self._rate, self._layout = sound.rate, ("mono", "stereo")[sound.channels - 1]
            self._held = np.zeros((sound.channels, 0), np.float32)
            self._track = self._container.add_stream("aac", rate=sound.rate, layout=self._layout, options=AAC)

    def add(self, frame: np.ndarray) -> None:
        """Append one (H, W, 3) RGB or (H, W, 4) RGBA uint8 frame and the audio that belongs to it."""
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgba" if frame.shape[2] == 4 else "rgb24")
        if self._colours:
            picture = picture.reformat(**self._colours)
        picture.pts = self._frames
        picture.time_base = Fraction(1, FPS)
        self._container.mux(self._video.encode(picture))
        self._frames += 1
        if self._blocks is not None:
            self._add_audio(self._frames * self._rate // FPS)

    def end_with_last_frame(self) -> None:
        """Leave out the audio for which no frame was added: for a rendering that stops early."""
        self._to_the_end = False

    def _add_audio(self, until: int | None) -> None:
        """Encode the sound up to sample `until`, or all that is left; it comes in pieces of about a second."""
        while until is None or self._samples < until:
            if self._held.shape[1] == 0:
                self._held = next(self._blocks, self._held)
                if self._held.shape[1] == 0:
                    return
            chunk = self._held[:, : None if until is None else until - self._samples]
            self._held = self._held[:, chunk.shape[1] :]
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(chunk, dtype=np.float32), format="fltp", layout=self._layout)
            frame.sample_rate, frame.pts, frame.time_base = self._rate, self._samples, Fraction(1, self._rate)
            self._container.mux(self._track.encode(frame))
            self._samples += chunk.shape[1]

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            if self._blocks is not None and self._to_the_end:
                self._add_audio(None)
            for stream in self._container.streams:
                self._container.mux(stream.encode(None))
        self._container.close()
        self._atomic.__exit__(kind, error, trace)
