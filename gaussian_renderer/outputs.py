"""Every file that one rendered clip becomes, each written by a thread of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gaussian_renderer.compositing import PLANAR_COLOURS, colour_map
from gaussian_renderer.paste import Place
from gaussian_renderer.planes import Planes
from utils import encoders
from utils.audio import Sound
from utils.contact_sheet import fit, inscribe, label
from utils.files import writable
from utils.image import write_rgb
from utils.interrupt import Interrupt
from utils.pipeline import Consumer, Rows
from utils.video import VideoWriter

MOSAIC_TILE = 256  # height of a tile of the attention mosaic


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
    """Every file of one clip, each written by a thread of its own. A context manager; `put` takes batches.

    While it is open, Ctrl-C only sets `interrupted`: whoever puts looks at it between batches, so that every file has the same
    frames and none is closed while its thread still writes.
    """

    def __init__(self, clip: Clip, folder: Path, stem: str, place: Place, size: tuple[int, int], tokens: tuple[str, ...] = (),
                 alpha: str | None = None, **quality):  # fmt: skip
        """`place`: of the rendering in the frames; `size`: width, height of the rendering itself.

        `tokens`: names of the attention maps to draw, none if empty. `alpha`: frames come as RGBA and go to a "prores" video
        or a "png" sequence. `quality`: encoder, crf, lossless of utils.encoders.codec, for the videos of pictures without alpha.
        """
        self._clip, self._folder, self._stem, self._tokens = clip, folder, stem, tokens
        self._place, self._size, self._alpha = place, size, alpha
        self._codec = encoders.codec(**quality)
        self._tile = MOSAIC_TILE * size[0] // size[1] // 2 * 2, MOSAIC_TILE
        self._stack = contextlib.ExitStack()
        self._interrupt = Interrupt("Ctrl-C: finishing the file; another one changes nothing")
        self._writers: list[VideoWriter] = []
        self._consumers: dict[str, list[Consumer]] = {"renders": [], "gt": [], "attention": []}
        suffix = {None: ".mp4", "prores": ".mov", "png": ""}[alpha]
        self.result = folder / f"{stem}_renders{suffix}"  # what was asked for: a video, or a folder of pictures

    def __enter__(self) -> Outputs:
        with contextlib.ExitStack() as self._stack:
            self._stack.enter_context(self._interrupt)
            if self._alpha == "png":
                self._pictures("renders", self.result)
            else:
                codec = encoders.codec(alpha=True) if self._alpha else self._codec
                self._movie("renders", self.result, None, (self._place.width, self._place.height), codec)
            if self._clip.truth:
                self._movie("gt", self._named("gt"), None, self._size, self._codec)
            for kind in ("renders", "gt")[: 1 + self._clip.truth] if self._clip.pictures else ():
                self._pictures(kind, self._folder / kind)
            for k, token in enumerate(self._tokens):
                draw = functools.partial(self._map, k)
                self._movie("attention", self._named(f"attention_{token}"), draw, self._size, encoders.codec(sketch=1), silent=True)
            if self._tokens:
                codec = encoders.codec(sketch=3)
                self._movie("attention", self._named("attention"), self._mosaic, self._mosaic_size, codec)
            self._stack = self._stack.pop_all()
        return self

    def _named(self, name: str) -> Path:
        return self._folder / f"{self._stem}_{name}.mp4"

    def _movie(self, kind: str, path: Path, draw: Callable | None, size: tuple[int, int], codec: encoders.Codec,
               silent: bool = False) -> None:  # fmt: skip
        """A video of what is put, on a thread of its own, or of what `draw` makes of it on another."""
        writer = self._stack.enter_context(VideoWriter(path, *size, None if silent else self._clip.sound, codec=codec))
        self._writers.append(writer)

        def write(frames: np.ndarray) -> None:
            for frame in frames:
                writer.add(frame)

        if draw is None:
            self._consume(kind, write)
        else:
            drawn = self._stack.enter_context(Consumer(write))
            self._consume(kind, lambda batch: drawn.put(draw(*batch)))

    def _pictures(self, kind: str, folder: Path) -> None:
        for old in writable(folder).glob("[0-9]*.png"):
            old.unlink()
        paths = (folder / f"{k:05d}.png" for k in range(len(self._clip.pose_ids)))
        self._consume(kind, lambda frames: [write_rgb(next(paths), frame) for frame in frames])

    def _consume(self, kind: str, consume: Callable) -> None:
        self._consumers[kind].append(self._stack.enter_context(Consumer(consume)))

    def _map(self, k: int, frames: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """(B, 3 H / 2, W) planes of map k."""
        values, planes = np.array(weights[:, k]), Planes(len(weights), *self._size)
        inscribe(values, self._tokens[k])
        planes.look_up(values, PLANAR_COLOURS)
        return planes.buffer

    def _mosaic(self, frames: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """RGB and the attention maps as labelled tiles in rows of three, the last cell explaining the colours."""
        p, sheet = self._place, Planes(len(frames), *self._mosaic_size)
        sheet.put(self._scale[None], *self._corner(len(self._tokens) + 1))
        if p.side is not None:
            frames = frames[:, p.y : p.y + p.side, p.x : p.x + p.side]
        sheet.put(label(self._tiles(frames[..., :3]), "render"))
        for k, token in enumerate(self._tokens):
            tiles = self._tiles(weights[:, k])
            inscribe(tiles, token)
            sheet.look_up(tiles, PLANAR_COLOURS, *self._corner(k + 1))
        return sheet.buffer

    def _tiles(self, pictures: np.ndarray) -> np.ndarray:
        """New pictures as large as a tile of the mosaic."""
        return np.stack([fit(picture, *self._tile) for picture in pictures])

    def _corner(self, k: int) -> tuple[int, int]:
        """x, y of tile k of the mosaic."""
        return k % 3 * self._tile[0], k // 3 * self._tile[1]

    @property
    def _mosaic_size(self) -> tuple[int, int]:
        """Width, height: the picture, a map a token and the scale."""
        return 3 * self._tile[0], self._corner(len(self._tokens) + 1)[1] + self._tile[1]

    @functools.cached_property
    def _scale(self) -> np.ndarray:
        """The tile that explains the colours."""
        tile = np.zeros((*self._tile[::-1], 3), np.uint8)
        bar = np.linspace(0, 255, self._tile[0] - 40).astype(np.uint8)
        tile[100:130, 20 : 20 + len(bar)] = colour_map(bar[None])
        return label(tile, "weight: 0 to 1")

    def put(self, frames: np.ndarray, weights: np.ndarray | None, truth: np.ndarray | None) -> None:
        """A batch: frames (B, H, W, 3 or 4), attention weights (B, T, H, W), what was filmed (B, H, W, 3), all uint8."""
        for kind, items in (("renders", frames), ("gt", truth)):
            for consumer in self._consumers[kind]:
                consumer.put(items)
        for consumer in self._consumers["attention"]:
            consumer.put((frames, weights))

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
