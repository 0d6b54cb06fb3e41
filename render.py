"""Render a trained head: model folder (+ any speech) -> mp4.

    python render.py --custom_aud speech.wav                    # the newest model under model/ speaks
    python render.py -m model/x --custom_aud a.mp3 --ss 00:01:00   # poses and background from the clip's 2nd minute on
    python render.py -m model/x --visualize_attention           # the clip itself: training and held-out (test) frames

Writes <model>/{train,test,custom}/ours_<iteration>/. The test split also goes to renders/*.png and gt/*.png, untouched by
any codec; metrics.py reads those. Frames flow: decode threads -> batched drawing and compositing -> one encoder thread a
video, through bounded queues, so that memory does not grow with the length.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from arguments import read_cfg_args
from gaussian_renderer import render_batch
from gaussian_renderer.compositing import colour_map, composite, from_bytes, to_bytes
from scene import load_avatar
from scene.talking_dataset_readers import TalkingDatasetReader
from utils import speech
from utils.audio import load_audio, load_sound
from utils.constants import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME
from utils.contact_sheet import fit, grid, label
from utils.device import choose_device
from utils.errors import UserError, command_line
from utils.files import write_json
from utils.image import write_rgb
from utils.pipeline import Consumer, prefetch
from utils.progress import progress
from utils.video import VideoWriter

# Default softness of the edge. The learned alpha is soft already, and beneath a head lies no head but the plate: on held-out
# frames of dfrf_cnn2 (256 px) 0 gives 32.4 dB and the most natural hair; 1 gives 30.1, 3 gives 27.8 and shines at the jaw.
FEATHER = 0.0
MOSAIC_TILE = 256  # height of a tile of the attention mosaic


@dataclasses.dataclass
class Clip:
    """What to draw: frame k shows the pose, expression and backdrop of `pose_ids[k]`, speaking row k of the audio."""

    split: str  # train, test or custom
    name: str  # of its files
    pose_ids: list[int]
    sound: np.ndarray  # (C, S) for the video
    rate: int
    features: np.ndarray | None = None  # (len(pose_ids), D); None: the data set's own, at the rows of its frames
    truth: bool = False  # also write what was filmed
    pictures: bool = False  # also write every frame as PNG


def parse_time(text: str) -> float:
    """Seconds of "hh:mm:ss", "mm:ss" or "ss", each with a fraction if wanted. Raises argparse.ArgumentTypeError."""
    if not re.fullmatch(r"(\d+:){0,2}\d+(\.\d*)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write hh:mm:ss, mm:ss or seconds")
    return functools.reduce(lambda total, part: 60 * total + float(part), text.split(":"), 0.0)


def ping_pong(length: int, count: int, start: int = 0) -> list[int]:
    """`count` indices into `length` things from `start` on, to the end and back and so on, no index twice at a turn."""
    period = max(1, 2 * (length - 1))
    return [min(k % period, period - k % period) if length > 1 else 0 for k in range(start, start + count)]


def newest_model(root: Path = Path("model")) -> Path:
    """The model folder under `root` whose latest trained head is the youngest. Raises UserError if there is none."""
    heads = list(root.glob("*/point_cloud/iteration_*/deformation.safetensors"))
    if not heads:
        raise UserError(f"there is no trained head under {root.resolve()}; train one with train.py -s data/<name>, "
                        "or name its folder with --model_path")  # fmt: skip
    return max(heads, key=lambda path: path.stat().st_mtime).parents[2]


def split_clip(reader, split: str, prefix: str, pictures: bool) -> Clip:
    """The frames of a split as they were filmed, with their own sound (640 samples a frame, so gaps stay in sync)."""
    ids = reader.splits["val" if split == "test" else split]
    samples = load_audio(reader.folder.require(reader.folder.audio))
    rows = reader.audio_rows[ids].tolist()
    samples = np.pad(samples, (0, max(0, (rows[-1] + 1) * SAMPLES_PER_FRAME - len(samples)))) if ids else samples
    pieces = [samples[row * SAMPLES_PER_FRAME : (row + 1) * SAMPLES_PER_FRAME] for row in rows]
    sound = np.concatenate(pieces)[None] if pieces else np.zeros((1, 0), np.float32)
    return Clip(split, f"{prefix}_{split}", ids, sound, SAMPLE_RATE, truth=True, pictures=pictures)


def custom_clip(reader, path: Path, samples: np.ndarray, start: float, prefix: str, pictures: bool) -> Clip:
    """Any speech `samples` (S,) at 16 kHz; poses run forth and back over the usable frames from second `start` on."""
    if start * FPS > reader.ids[-1]:
        raise UserError(f"--ss {start:g} s lies beyond the end of {reader.folder.root} ({reader.ids[-1] / FPS:.1f} s); "
                        "choose an earlier start")  # fmt: skip
    frames = max(1, len(samples) // SAMPLES_PER_FRAME)
    first = int(np.searchsorted(reader.ids, start * FPS))
    pose_ids = [reader.ids[k] for k in ping_pong(len(reader.ids), frames, first)]
    sound, rate = load_sound(path)
    return Clip("custom", f"{prefix}_custom_{path.stem}", pose_ids, sound, rate,
                features=speech.encode(reader.encoder, samples, frames, "speech"), pictures=pictures)  # fmt: skip


class Outputs:
    """Every file of one clip, each written by a thread of its own. A context manager; `put` takes batches."""

    def __init__(self, clip: Clip, folder: Path, stem: str, width: int, height: int, tokens: tuple[str, ...],
                 **quality):  # fmt: skip
        """`tokens`: names of the attention maps to draw, none if empty. `quality`: crf, lossless of VideoWriter."""
        self._clip, self._folder, self._stem, self._tokens, self._quality = clip, folder, stem, tokens, quality
        self._size = width, height
        self._tile = MOSAIC_TILE * width // height // 2 * 2, MOSAIC_TILE
        self._stack = contextlib.ExitStack()
        self._writers: list[VideoWriter] = []
        self._consumers: dict[str, list[Consumer]] = {"renders": [], "gt": [], "attention": []}
        self.video = folder / f"{stem}_renders.mp4"

    def __enter__(self) -> Outputs:
        with contextlib.ExitStack() as self._stack:
            self._movie("renders", "renders", lambda frame: frame)
            if self._clip.truth:
                self._movie("gt", "gt", lambda frame: frame)
            for kind in ("renders", "gt")[: 1 + self._clip.truth] if self._clip.pictures else ():
                self._pictures(kind)
            for k, token in enumerate(self._tokens):
                self._movie("attention", f"attention_{token}", functools.partial(self._map, k))
            if self._tokens:
                rows = -(-(len(self._tokens) + 2) // 3)
                self._movie("attention", "attention", self._mosaic, (3 * self._tile[0], rows * self._tile[1]))
            self._stack = self._stack.pop_all()
        return self

    def _movie(self, kind: str, name: str, draw: Callable, size: tuple[int, int] | None = None) -> None:
        path = self._folder / f"{self._stem}_{name}.mp4"
        writer = VideoWriter(path, *(size or self._size), self._clip.sound, self._clip.rate, **self._quality)
        self._writers.append(self._stack.enter_context(writer))
        self._consume(kind, lambda items: [writer.add(draw(item)) for item in items])

    def _pictures(self, kind: str) -> None:
        folder = self._folder / kind
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("[0-9]*.png"):
            old.unlink()
        paths = (folder / f"{k:05d}.png" for k in range(len(self._clip.pose_ids)))
        self._consume(kind, lambda frames: [write_rgb(next(paths), frame) for frame in frames])

    def _consume(self, kind: str, consume: Callable) -> None:
        self._consumers[kind].append(self._stack.enter_context(Consumer(consume)))

    def _map(self, k: int, item: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        return label(colour_map(item[1][k]), self._tokens[k])

    def _mosaic(self, item: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """RGB and the attention maps as labelled tiles in rows of three, the last cell explaining the colours."""
        frame, weights = item
        tiles = [label(fit(frame, *self._tile), "render")]
        tiles += [label(colour_map(fit(w, *self._tile)), token) for token, w in zip(self._tokens, weights, strict=True)]
        scale = np.zeros((*self._tile[::-1], 3), np.uint8)
        bar = np.linspace(0, 255, self._tile[0] - 40).astype(np.uint8)
        scale[100:130, 20 : 20 + len(bar)] = colour_map(bar[None])
        return grid([*tiles, label(scale, "weight: 0 to 1")], 3, gap=0)

    def put(self, frames: np.ndarray, weights: np.ndarray | None, truth: np.ndarray | None) -> None:
        """A batch: frames (B, H, W, 3), attention weights (B, T, H, W), what was filmed (B, H, W, 3), all uint8."""
        for kind, items in (("renders", frames), ("gt", truth)):
            for consumer in self._consumers[kind]:
                consumer.put(items)
        for consumer in self._consumers["attention"]:
            consumer.put(list(zip(frames, weights, strict=True)))

    def end_early(self) -> None:
        """What was put so far is all there is: the videos end there, with their sound."""
        for writer in self._writers:
            writer.end_with_last_frame()

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)


def render_clip(clip: Clip, reader, draw: Callable, outputs: Outputs, device, batch: int, feather: float) -> bool:
    """Draw all frames of `clip` into `outputs`; `draw(conditions)` gives a gaussian_renderer.Rendering.

    Returns False if Ctrl-C ended it early (what was drawn is kept), True otherwise.
    """

    def load(start: int):
        ids = clip.pose_ids[start : start + batch]
        rows = None if clip.features is None else list(range(start, start + len(ids)))
        truth = np.stack([reader.image(i) for i in ids]) if clip.truth else None
        return reader.conditions(ids, rows, clip.features), torch.from_numpy(np.stack([reader.backdrop(i) for i in ids])), truth

    done = 0
    batches = prefetch(load, range(0, len(clip.pose_ids), batch))
    bar = progress(label=f"render {clip.split}", total=len(clip.pose_ids))
    with outputs, contextlib.closing(batches), bar, torch.inference_mode():
        try:
            for conditions, backdrops, truth in batches:
                rendering = draw(conditions.to(device))
                frames = composite(rendering.rgb, rendering.alpha, from_bytes(backdrops.to(device)), feather)
                weights = rendering.attention
                if weights is not None:
                    weights = weights.mul(255).add_(0.5).clamp_(0, 255).to(torch.uint8).cpu().numpy()
                outputs.put(to_bytes(frames).cpu().numpy(), weights, truth)
                done += len(backdrops)
                bar.update(len(backdrops))
        except KeyboardInterrupt:
            if done == 0:
                raise
            outputs.end_early()
    return done == len(clip.pose_ids)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model_path", type=Path, help="model folder (default: the newest under model/)")
    parser.add_argument("-s", "--source_path", type=Path, help="data set folder (default: the one the model was trained on)")
    parser.add_argument("--iteration", type=int, default=-1, help="which saved iteration (default: the latest)")
    parser.add_argument("--custom_aud", type=Path, help="speech to render: any audio or video file, any length")
    parser.add_argument("--ss", type=parse_time, metavar="hh:mm:ss", help="with --custom_aud: where in the clip poses start (0)")
    parser.add_argument("--skip_train", action="store_true", help="do not render the training frames")
    parser.add_argument("--skip_test", action="store_true", help="do not render the held-out frames")
    parser.add_argument("--visualize_attention", action="store_true", help="also write what each token attends to")
    parser.add_argument("--still_frame_code", action="store_true", help="hold the frame code at the first frame: steadier")
    parser.add_argument("--feather", type=float, default=FEATHER, help="softness of the head's edge, pixels at 512 (%(default)s)")
    parser.add_argument("--pictures", action="store_true", help="write every frame as PNG too (the test split always does)")
    parser.add_argument("--batch", type=int, help="frames drawn at once (16 on a GPU, 4 on a CPU)")
    parser.add_argument("--crf", type=int, default=18, help="H.264 quality, 0 (best) to 51 (%(default)s)")
    parser.add_argument("--lossless", action="store_true", help="lossless RGB H.264: large, few players show it")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    args = parser.parse_args(argv)
    for name, valid in (("batch", args.batch is None or args.batch > 0), ("feather", args.feather >= 0),
                        ("crf", 0 <= args.crf <= 51)):  # fmt: skip
        if not valid:
            parser.error(f"--{name} {getattr(args, name)} is out of range")
    if args.ss is not None and not args.custom_aud:
        parser.error("--ss goes with --custom_aud: the splits are rendered as they are")
    if args.skip_train and args.skip_test and not args.custom_aud:
        parser.error("--skip_train and --skip_test leave nothing to render; give --custom_aud or drop one")
    return args


@command_line
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    samples = load_audio(args.custom_aud) if args.custom_aud else None  # the likeliest mistake, so it is found first
    model = args.model_path or newest_model()
    source = args.source_path or Path(read_cfg_args(model).source_path)
    if not source.is_dir():
        raise UserError(f"the data set {source} of {model} is not there; say where it is with --source_path")
    device = choose_device(args.device)
    head = load_avatar(model, None if args.iteration < 0 else args.iteration, device)
    reader = TalkingDatasetReader(source, head.config.audio_encoder)
    if reader.audio.shape[1] != head.config.audio_features:
        raise UserError(f"{model} was trained on audio features of width {head.config.audio_features}, but {source} has "
                        f"{reader.audio.shape[1]}; give the data set it was trained on with --source_path")  # fmt: skip
    if args.still_frame_code and "frame" in head.token_names:
        head.deformation.conditions.tokens["frame"].still = reader.splits["train"][0]

    prefix = model.resolve().name
    if args.custom_aud:
        clips = [custom_clip(reader, args.custom_aud, samples, args.ss or 0.0, prefix, args.pictures)]
    else:
        clips = [] if args.skip_train else [split_clip(reader, "train", prefix, args.pictures)]
        clips += [] if args.skip_test else [split_clip(reader, "test", prefix, True)]
    draw = functools.partial(render_batch, head, width=reader.width, height=reader.height, attention=args.visualize_attention)
    batch = args.batch or (16 if device.type == "cuda" else 4)
    for clip in clips:
        if not clip.pose_ids:
            print(f"{clip.split}: the data set has no such frames, nothing rendered")
            continue
        folder = model / clip.split / f"ours_{head.iteration}"
        (folder / "frames.json").unlink(missing_ok=True)
        outputs = Outputs(clip, folder, f"{clip.name}_{head.iteration}iter", reader.width, reader.height,
                          head.token_names if args.visualize_attention else (), crf=args.crf, lossless=args.lossless)  # fmt: skip
        begin = time.monotonic()
        complete = render_clip(clip, reader, draw, outputs, device, batch, args.feather)
        seconds = time.monotonic() - begin
        if not complete:
            print(f"{outputs.video}  (stopped by Ctrl-C: it plays, and ends early)")
            raise SystemExit(130)
        if clip.pictures:
            write_json(folder / "frames.json", {
                "ids": clip.pose_ids, "iteration": head.iteration, "part": head.config.part, "feather": args.feather,
                "source_path": str(source.resolve()), "audio_encoder": reader.encoder,
            })  # fmt: skip
        print(f"{outputs.video}  ({len(clip.pose_ids)} frames in {seconds:.1f} s, {len(clip.pose_ids) / seconds:.1f} frames/s)")


if __name__ == "__main__":
    main()
