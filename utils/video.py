"""Video in and out through PyAV: frames are decoded lazily at 25 fps and encoded one by one; nothing holds a whole clip."""

from __future__ import annotations

import collections
import dataclasses
import functools
import heapq
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter

from utils import encoders, hdr
from utils.audio import Sound
from utils.constants import FPS, SAMPLE_RATE
from utils.encoders import Codec
from utils.errors import UserError
from utils.files import atomic_path

Show = Callable[[], np.ndarray]  # makes the (H, W, 3) uint8 RGB picture: not all that are decoded are wanted
Picture = tuple[float, Show]  # and its seconds


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
        return av.open(str(path.absolute()))  # FFmpeg would take "talk:1.mp4" for a protocol
    except av.FFmpegError as error:
        raise UserError(f"{path} cannot be read as a video ({error.strerror}); it may be truncated, or no video at all") from None


def video_stream(container: av.container.InputContainer) -> av.VideoStream | None:
    """The first track of moving pictures, which a cover picture is not; None if there is none."""
    return next((s for s in container.streams.video if not s.disposition & Disposition.attached_pic), None)


def probe(path: Path) -> VideoInfo:
    """Raises UserError if the file is absent, unreadable or has no picture."""
    with _open(path) as container:
        stream = video_stream(container)
        if stream is None:
            raise UserError(f"{path} has no video track; give a video of one talking person")
        seconds = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
        rate, sound = float(stream.average_rate or FPS), next(iter(container.streams.audio), None)
        sound_start = None if sound is None or sound.start_time is None else float(sound.start_time * sound.time_base)
        starts_at_zero = container.format.name == "avi"  # both tracks do; its pictures' own stamps are guesses
    time, show = _first(path)
    height, width = show().shape[:2]
    offset = 0.0 if sound_start is None else sound_start - (0.0 if starts_at_zero else time)
    return VideoInfo(width, height, rate, seconds, sound is not None, offset)


def _first(path: Path) -> Picture:
    first = next(_decoded(path), None)
    if first is None:
        raise UserError(f"{path} holds no decodable picture: it is truncated or damaged; export it again as H.264 mp4")
    return first


def sample_frames(path: Path, count: int) -> Iterator[tuple[float, np.ndarray]]:
    """Yield up to `count` (seconds from the first picture, (H, W, 3) uint8 RGB) pairs spread over the whole clip, in order.

    Fast: keyframes serve where one lies near enough. Raises UserError if the file ends before the length its header promises.
    """
    times, keys = _packet_times(path)
    start, end = times[0], times[-1]
    spacing = (end - start) / count
    pictures, position, last = None, -np.inf, -np.inf
    for k in range(count):
        target = start + (k + 0.5) * spacing
        near = keys[np.abs(keys - target).argmin()]
        target = near if abs(near - target) <= spacing / 2 else target
        target = times[np.searchsorted(times, target, side="right") - 1]
        if target <= last:
            continue
        if pictures is None or keys[np.searchsorted(keys, target, side="right") - 1] > position:
            pictures = _decoded(path, keys, target)
        found = next((picture for picture in pictures if picture[0] >= target - 1e-6), None)
        if found is None:
            return
        position, show = found
        last = target
        yield float(position - start), show()


def _packet_times(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of every picture and of every keyframe, ascending, without decoding; refuses a file that ends too early."""
    times, keys, end = [], [], 0.0
    with _open(path) as container:
        stream = video_stream(container)
        try:
            for packet in container.demux(stream):
                if packet.pts is not None:
                    times.append(float(packet.pts * stream.time_base))
                    end = max(end, times[-1] + float((packet.duration or 0) * stream.time_base))
                    if packet.is_keyframe:
                        keys.append(times[-1])
        except av.FFmpegError as error:
            raise UserError(f"{path} is damaged ({error.strerror}); export it again") from None
        promised = float(stream.duration * stream.time_base) if stream.duration else 0.0
        stampless = container.format.name == "mpeg"  # a program stream entered midway counts its pictures' times from a guess
    if not times or not keys:
        raise UserError(f"{path} holds no decodable picture: it is truncated or damaged; export it again as H.264 mp4")
    held = end - min(times)
    if held < promised - max(0.25, 0.01 * promised):
        raise UserError(f"{path} is truncated: it holds {held:.1f} s of the {promised:.1f} s its header promises; "
                        "copy or export it again")  # fmt: skip
    return np.sort(times), np.sort(keys)[: 1 if stampless else None]


def _decoded(path: Path, keys: Sequence[float] = (), time: float = -np.inf) -> Iterator[Picture]:
    """The pictures of a video in their order, from a keyframe at or before `time` on, or from the first.

    keys: seconds of the keyframes, ascending. Raises UserError naming the moment if the stream is damaged.
    """
    before = [key for key in keys[1:] if key <= time][::-1]
    for key in (*before[:2], *before[3:4], None):  # a seek may end a keyframe late; None: the beginning
        with _open(path) as container:
            stream, last = video_stream(container), None
            stream.thread_type = "AUTO"
            try:
                if key is not None:
                    container.seek(round(key / stream.time_base), stream=stream)
                for last, picture in _timed(stream, key is not None):
                    if key is not None and last > time:
                        break
                    key = None  # it was entered in time
                    yield last, picture
                if key is None:
                    return
            except av.FFmpegError as error:
                if key is not None:
                    continue  # there is no way in here; the beginning will tell
                if last is None:
                    raise UserError(f"{path} cannot be decoded ({error.strerror}): it is truncated or damaged; export it again as "
                                    "H.264 mp4") from None  # fmt: skip
                start = float((stream.start_time or 0) * stream.time_base)
                raise UserError(f"{path} is damaged {last - start:.1f} s from its start ({error.strerror}); "
                                "cut the clip before that point or export it again") from None  # fmt: skip


def _timed(stream: av.VideoStream, from_keyframe: bool) -> Iterator[Picture]:
    """The pictures of a stream from where it stands (or from the first keyframe there), with times that ascend.

    Pictures come out of a decoder in the order they are shown in. AVI knows no times but that pictures are stored at, and not
    in this order: the next one shown has the earliest. Elsewhere a stamp that is missing or goes back is not believed.
    """
    stored, times, begin = stream.container.format.name == "avi", [], None
    tick, aspect, last = 1 / float(stream.average_rate or FPS), stream.sample_aspect_ratio or 1, None
    for packet in stream.container.demux(stream):
        if packet.pts is not None:
            begin = packet.pts if begin is None and packet.is_keyframe else begin
            if stored:
                heapq.heappush(times, packet.pts)
        for frame in packet.decode():
            from_keyframe &= not frame.key_frame
            if from_keyframe:
                continue  # shown before the keyframe, it needs pictures that were passed over
            while times and begin is not None and times[0] < begin:
                heapq.heappop(times)
            stamp = heapq.heappop(times) if times else frame.pts
            time = 0.0 if stamp is None else float(stamp * stream.time_base)
            last = time if last is None or time > last else last + tick
            yield last, functools.partial(_to_rgb, frame, aspect)


def _at_rate(pictures: Iterator[Picture], fps: int, index: int = 0, origin: float | None = None) -> Iterator[tuple[int, Show]]:
    """Yield (i, picture) for i = index, index + 1, ...: what is on display i / fps s after `origin`, by default the first picture.

    The last picture is shown once; it is the only one where the video has ended before.
    """
    shown = None
    for time, show in pictures:
        origin = time if origin is None else origin
        # a quarter of a frame of tolerance, so that 25 fps material maps one to one
        while shown is not None and (index + 0.25) / fps < time - origin:
            yield index, shown
            index += 1
        shown = show
    if shown is not None:
        yield index, shown


def read_frames(path: Path, fps: int = FPS, start: int = 0) -> Iterator[np.ndarray]:
    """Yield (H, W, 3) uint8 RGB frames at `fps`, upright, of square pixels: frame i is what is shown at i / fps s from the first.

    Frames before `start` are decoded but not converted. Raises UserError naming the moment if the stream is damaged.
    """
    for index, show in _at_rate(_decoded(path), fps):
        if index >= start:
            yield show()


def _to_rgb(frame: av.VideoFrame, aspect: Fraction | int = 1) -> np.ndarray:
    """(H, W, 3) uint8, upright; pixels `aspect` times as wide as they are high become square ones, the width an even number."""
    width = frame.width if aspect == 1 else max(2, 2 * round(frame.width * aspect / 2))
    scaling = (Interpolation.BILINEAR if aspect == 1 else Interpolation.BICUBIC) | EXACTLY
    image = frame.to_ndarray(format="rgb24", width=width, interpolation=scaling, threads=1)  # more would be started for every frame
    if frame.color_trc in (hdr.PQ, hdr.HLG):
        image = hdr.to_standard_range(image, frame.color_trc)
    # frame.rotation is the counter-clockwise turn (degrees) that shows the picture upright
    # FFmpeg pads its rows where the width is odd or no multiple of 32; what takes a bare buffer (MediaPipe) would read that askew
    return np.ascontiguousarray(np.rot90(image, frame.rotation // 90) if frame.rotation else image)


class FrameReader:
    """Frames of a video by number, as `read_frames` counts them, forth or back: those around the last one are held.

    Going back means decoding from a keyframe on, so a block of frames is decoded at a time; two blocks are held, 250 MB of
    a video of any size. Safe to call from several threads, which should ask for all they want at once.
    """

    BYTES = 125_000_000  # of a block

    def __init__(self, path: Path, fps: int = FPS):
        self._path, self._fps, self._lock = path, fps, threading.Lock()
        self._keys = _packet_times(path)[1].tolist()
        self._origin, show = _first(path)
        self.height, self.width = show().shape[:2]
        self._block = max(4, self.BYTES // (3 * self.width * self.height))
        self._blocks: collections.OrderedDict[int, list[np.ndarray]] = collections.OrderedDict()

    def __getitem__(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB; the last frame for any index beyond the end. Raises UserError if the video is damaged there."""
        return self.batch([index])[0]

    def batch(self, indices: Sequence[int]) -> list[np.ndarray]:
        """The frames of these numbers, each as `self[index]`; no other thread's wish comes in between."""
        with self._lock:
            return [self._frame(index) for index in indices]

    def _frame(self, index: int) -> np.ndarray:
        number = index // self._block
        if number not in self._blocks:
            while len(self._blocks) > 1:
                self._blocks.popitem(last=False)
            self._blocks[number] = self._decode(number * self._block)
        self._blocks.move_to_end(number)
        frames = self._blocks[number]
        return frames[min(index % self._block, len(frames) - 1)]

    def _decode(self, first: int) -> list[np.ndarray]:
        pictures = _decoded(self._path, self._keys, self._origin + (first + 0.25) / self._fps)
        frames: list[np.ndarray] = []
        before = None
        for _, show in itertools.islice(_at_rate(pictures, self._fps, first, self._origin), self._block):
            frames.append(frames[-1] if show is before else show())
            before = show
        return frames


# without these FFmpeg converts colours in a quarter of the time, and what is read is a level too dark, of green one and a half
EXACTLY = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
# what HD players expect, and what every file of ours says of itself; untagged, some would take BT.601 for it and shift the hues
BT709 = {"dst_colorspace": Colorspace.ITU709, "dst_color_range": ColorRange.MPEG,
         "dst_color_primaries": ColorPrimaries.BT709, "dst_color_trc": ColorTrc.BT709}  # fmt: skip
# threads that convert colours: left to itself FFmpeg starts one a core, however many there are
CONVERTING = min(4, os.cpu_count() or 1)
MOST_AHEAD = 64  # frames that a picture is decoded before it is shown, at most; encoders keep to 16
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
            self._colours = {"format": codec.pixels, "threads": CONVERTING,
                             "interpolation": Interpolation.BILINEAR | EXACTLY} | BT709  # fmt: skip
            self._reformatter = VideoReformatter()  # a frame's own one would be made, with its threads, anew for every frame
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
        """Append one (H, W, 3) RGB or (H, W, 4) RGBA uint8 frame and the audio that belongs to it.

        Where the codec stores yuv420p the frame may also be (3 H / 2, W): the planes Y, Cb, Cr of BT.709 one after the other.
        """
        kind = "yuv420p" if frame.ndim == 2 else {3: "rgb24", 4: "rgba"}[frame.shape[2]]
        picture = av.VideoFrame.from_numpy_buffer(np.ascontiguousarray(frame), format=kind)  # no copy: it would hold up all threads
        if self._colours and frame.ndim == 3:
            picture = self._reformatter.reformat(picture, **self._colours)
        picture.pts = self._frames
        picture.time_base = Fraction(1, FPS)
        self._mux(picture)
        self._frames += 1
        if self._frames % FPS == 0:  # a second of sound at once: frame by frame it would hold up the pictures
            self._add_audio()

    def _mux(self, picture: av.VideoFrame | None) -> None:
        """Encode a picture, or with None what the encoder holds back. x265 leaves the decoding times of one or two pictures unset
        (its issue 934), whatever memory held: such pictures are decoded in the order in which they are shown."""
        for packet in self._video.encode(picture):
            if packet.dts is None or not 0 <= packet.pts - packet.dts <= MOST_AHEAD:
                packet.dts = packet.pts
            self._container.mux(packet)

    def end_with_last_frame(self) -> None:
        """Leave out the audio for which no frame was added: for a rendering that stops early."""
        self._to_the_end = False

    def _add_audio(self, rest: bool = False) -> None:
        """Encode the sound of the frames so far, or also all the `rest`; it comes in pieces of about a second."""
        if self._blocks is None:
            return
        until = sys.maxsize if rest else self._frames * self._rate // FPS
        while self._samples < until:
            if self._held.shape[1] == 0:
                self._held = next(self._blocks, self._held)
                if self._held.shape[1] == 0:
                    return
            chunk = self._held[:, : until - self._samples]
            self._held = self._held[:, chunk.shape[1] :]
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(chunk, dtype=np.float32), format="fltp", layout=self._layout)
            frame.sample_rate, frame.pts, frame.time_base = self._rate, self._samples, Fraction(1, self._rate)
            self._container.mux(self._track.encode(frame))
            self._samples += chunk.shape[1]

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self._add_audio(rest=self._to_the_end)
            self._mux(None)
            if self._blocks is not None:
                self._container.mux(self._track.encode(None))
        self._container.close()
        self._atomic.__exit__(kind, error, trace)
