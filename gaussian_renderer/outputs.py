"""Every file that one rendered clip becomes, each written by a thread of its own; attention videos by another process's."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gaussian_renderer.attention_maps import AttentionMaps
from gaussian_renderer.paste import Place
from utils import encoders
from utils.audio import Sound
from utils.files import writable
from utils.image import write_rgb
from utils.interrupt import Interrupt
from utils.pipeline import Consumer, Rows
from utils.video import VideoWriter
from utils.video_process import VideoProcess


@dataclasses.dataclass
class Clip:
    """What to draw: frame k shows the backdrop, pose and expression of `pose_ids[k]`, speaking row k of the audio."""

    split: str  # train, test or custom
    name: str  # of its files
    pose_ids: list[int]
    sound: Sound  # for the video
    features: Rows | None = None  # one row a frame; None: the data set's own, at the rows of its frames
    views: np.ndarray | None = None  # (len(pose_ids), 4, 4) world to camera, dm; None: the data set's own, of its frames
    expression: np.ndarray | None = None  # (len(pose_ids), 7); None: the data set's own
    truth: bool = False  # also write what was filmed
    pictures: bool = False  # also write every frame as PNG


class Outputs:
    """Every file of one clip. A context manager; `put` takes batches.

    While it is open, Ctrl-C only sets `interrupted`: whoever puts looks at it between batches, so that every file has the same
    frames and none is closed while its thread still writes.
    """

    def __init__(self, clip: Clip, folder: Path, stem: str, place: Place, size: tuple[int, int],
                 attention: AttentionMaps | None = None, alpha: str | None = None, **quality):  # fmt: skip
        """`place`: of the rendering in the frames; `size`: width, height of the rendering itself.

        `attention`: what draws the maps that are written too. `alpha`: frames come as RGBA and go to a "prores" video or a "png"
        sequence. `quality`: encoder, crf, lossless of utils.encoders.codec, for the videos of pictures without alpha.
        """
        self.attention = attention
        self._clip, self._folder, self._stem = clip, folder, stem
        self._place, self._size, self._alpha = place, size, alpha
        self._codec = encoders.codec(**quality)
        # frames come as planes (gaussian_renderer/planes.py), unless somebody wants RGB
        self.planar = self._codec.pixels == "yuv420p" and not alpha and not clip.pictures
        self._stack = contextlib.ExitStack()
        self._interrupt = Interrupt("Ctrl-C: finishing the file; another one changes nothing")
        self._writers: list[VideoWriter | VideoProcess] = []
        self._consumers: dict[str, list[Consumer]] = collections.defaultdict(list)
        suffix = {None: ".mp4", "prores": ".mov", "png": ""}[alpha]
        self.result = folder / f"{stem}_renders{suffix}"  # what was asked for: a video, or a folder of pictures

    def __enter__(self) -> Outputs:
        with contextlib.ExitStack() as self._stack:
            self._stack.enter_context(self._interrupt)
            if self._alpha == "png":
                self._pictures("renders", self.result)
            else:
                codec = encoders.codec(alpha=True) if self._alpha else self._codec
                self._movie("renders", self.result, (self._place.width, self._place.height), codec)
            if self._clip.truth:
                self._movie("gt", self._named("gt"), self._size, self._codec)
            for kind in ("renders", "gt")[: 1 + self._clip.truth] if self._clip.pictures else ():
                self._pictures(kind, self._folder / kind)
            if self.attention:
                self._beside()
            self._stack = self._stack.pop_all()
        return self

    def _named(self, name: str) -> Path:
        return self._folder / f"{self._stem}_{name}.mp4"

    def _movie(self, kind: str, path: Path, size: tuple[int, int], codec: encoders.Codec) -> None:
        writer = self._stack.enter_context(VideoWriter(path, *size, self._clip.sound, codec=codec))
        self._writers.append(writer)

        def write(frames: np.ndarray) -> None:
            for frame in frames:
                writer.add(frame)

        self._consume(kind, write)

    def _beside(self) -> None:
        """A silent video a token, and the mosaic with the sound."""
        videos = [functools.partial(VideoWriter, self._named(f"attention_{token}"), *self._size, codec=encoders.codec(sketch=1))
                  for token in self.attention.tokens]  # fmt: skip
        videos.append(functools.partial(VideoWriter, self._named("attention"), *self.attention.mosaic_size, self._clip.sound,
                                        codec=encoders.codec(sketch=3)))  # fmt: skip
        writers = self._stack.enter_context(VideoProcess(videos))
        self._writers.append(writers)
        self._consume("attention", lambda drawn: writers.add([*drawn[0].swapaxes(0, 1), drawn[1]]))

    def _pictures(self, kind: str, folder: Path) -> None:
        for old in writable(folder).glob("[0-9]*.png"):
            old.unlink()
        paths = (folder / f"{k:05d}.png" for k in range(len(self._clip.pose_ids)))
        self._consume(kind, lambda frames: [write_rgb(next(paths), frame) for frame in frames])

    def _consume(self, kind: str, consume: Callable) -> None:
        self._consumers[kind].append(self._stack.enter_context(Consumer(consume)))

    def put(self, frames: np.ndarray, maps: list[np.ndarray], truth: np.ndarray | None) -> None:
        """A batch: frames (B, H, W, 3 or 4) or planes (B, 3 H / 2, W), what `attention` draws, if anything, what was filmed
        (B, H, W, 3), all uint8."""
        items = {"renders": frames, "gt": truth, "attention": maps}
        for kind, consumers in self._consumers.items():
            for consumer in consumers:
                consumer.put(items[kind])

    @property
    def interrupted(self) -> bool:
        """Ctrl-C was pressed since the files were opened."""
        return self._interrupt.asked

    def end_early(self) -> None:
        """What was put so far is all there is: the videos end there, with their sound."""
        for writer in self._writers:
            writer.end_with_last_frame()

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)
