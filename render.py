"""Render a trained head: model folder (+ any speech) -> mp4.

    python render.py --custom_aud speech.wav                    # the newest model under model/ speaks
    python render.py -m model/x --custom_aud a.mp3 --ss 00:01:00   # poses and background from the clip's 2nd minute on
    python render.py -m model/x --visualize_attention           # the clip itself: training and held-out (test) frames

Writes <model>/{train,test,custom}/ours_<iteration>/. The test split also goes to renders/*.png and gt/*.png, untouched by
any codec; metrics.py reads those. Frames flow: decode threads -> batched drawing and compositing -> one encoder thread a
video, through bounded queues, so that memory does not grow with the length (gaussian_renderer/outputs.py).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch

from arguments import read_cfg_args
from gaussian_renderer import render_batch
from gaussian_renderer.attention_maps import AttentionMaps
from gaussian_renderer.compositing import from_bytes, to_bytes
from gaussian_renderer.outputs import Clip, Outputs
from gaussian_renderer.paste import PASTES, Backdrops, put_on
from gaussian_renderer.planes import joined, to_planes
from gaussian_renderer.replay import Replayed
from gaussian_renderer.transfer import DeviceBackdrops, Download
from scene import TalkingHead, load_avatar
from scene.cameras import enlarged
from scene.condition import AUDIO_WINDOW, Conditions
from scene.talking_dataset_readers import TalkingDatasetReader
from utils import driving, encoders, speech
from utils.audio import Recording, Sound, load_audio, open_sound
from utils.constants import BLINK_COLUMNS, FPS, IMAGE_SIZE, JAW_OPEN_COLUMN, SAMPLE_RATE, SAMPLES_PER_FRAME, UPPER_FACE_COLUMNS
from utils.device import choose_device, keep_freed_memory
from utils.errors import UserError, command_line
from utils.export import write_surfels
from utils.files import read_npy, writable, write_json
from utils.memory import one_sentence_when_full
from utils.pipeline import Rows, prefetch
from utils.progress import progress

# Default softness of the edge. The learned alpha is soft already, and beneath a head lies no head but the plate: on held-out
# frames of dfrf_cnn2 (256 px) 0 gives 32.4 dB and the most natural hair; 1 gives 30.1, 3 gives 27.8 and shines at the jaw.
FEATHER = 0.0


def parse_time(text: str) -> float:
    """Seconds of "hh:mm:ss", "mm:ss" or "ss", each with a fraction if wanted. Raises argparse.ArgumentTypeError."""
    if not re.fullmatch(r"(\d+:){0,2}\d+(\.\d*)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write hh:mm:ss, mm:ss or seconds")
    return functools.reduce(lambda total, part: 60 * total + float(part), text.split(":"), 0.0)


def newest_model(root: Path = Path("model")) -> Path:
    """The model folder under `root` whose latest trained head is the youngest. Raises UserError if there is none."""
    heads = list(root.glob("*/point_cloud/iteration_*/deformation.safetensors"))
    if not heads:
        raise UserError(f"there is no trained head under {root.resolve()}; train one with train.py -s data/<name>, "
                        "or name its folder with --model_path")  # fmt: skip
    return max(heads, key=lambda path: path.stat().st_mtime).parents[2]


def split_clip(reader, split: str, prefix: str, pictures: bool) -> Clip:
    """The frames of a split as they were filmed, with their own sound."""
    ids = reader.splits["val" if split == "test" else split]
    return Clip(split, f"{prefix}_{split}", ids, Sound.of(reader.sound(ids), SAMPLE_RATE), truth=True, pictures=pictures)


def custom_clip(reader, args: argparse.Namespace, recording: Recording, prefix: str) -> Clip:
    """Any speech; poses run forth and back over the usable frames from --ss on. Speech is encoded while it is rendered."""
    if args.ss is not None and args.ss * FPS > reader.ids[-1]:
        raise UserError(f"--ss {args.ss:g} s lies beyond the end of {reader.folder.root} ({reader.ids[-1] / FPS:.1f} s); "
                        "choose an earlier start")  # fmt: skip
    frames = max(1, len(recording) // SAMPLES_PER_FRAME)
    path = driving.replayed_path(reader.ids, frames, None if args.ss is None else round(args.ss * FPS))
    views = driving.views_between(reader.ids, reader.views[reader.ids].numpy(), path)
    expression = driving.between(reader.ids, reader.expression[reader.ids], path)
    rows = speech.stream(reader.encoder, recording, frames)
    if args.smooth_lips:
        rows = driving.smoothed(rows)
    if args.close_mouth:
        levels = driving.frame_levels((block[0] for block in recording.blocks()), frames)
        rows = driving.gated(rows, driving.silence(levels), silent_row(reader))
    name = shortened(f"{prefix}_custom_{args.custom_aud.stem}")
    return Clip("custom", name, driving.nearest(reader.ids, path), open_sound(args.custom_aud), Rows(rows), views,
                driven_expression(reader, expression, args.blink), pictures=args.pictures)  # fmt: skip


def shortened(name: str, most: int = 180) -> str:
    """`name` cut to `most` bytes: file systems take 255, and what each file holds is still added."""
    return name.encode()[:most].decode(errors="ignore")


def silent_row(reader) -> np.ndarray:
    """(D,) audio features with which the speaker's mouth is shut, from the source clip."""
    rows = reader.audio_rows[reader.ids].numpy()
    jaw = np.full(max(len(reader.audio), int(rows.max()) + 1), np.inf, np.float32)
    blendshapes = reader.folder.blendshapes
    jaw[rows] = read_npy(blendshapes)[reader.ids, JAW_OPEN_COLUMN] if blendshapes.exists() else 0.0
    samples = load_audio(reader.folder.require(reader.folder.audio))
    levels = driving.frame_levels([samples], len(jaw))
    return driving.closed_mouth_row(reader.audio, levels, jaw, rows.tolist())


def driven_expression(reader, replayed: np.ndarray, blink: str) -> np.ndarray:
    """(F, 7) the `replayed` expression (F, 7), with generated blinks where they are wanted.

    "auto" generates them where the source clip, or 20 s or more that are replayed of it, has fewer than three a minute;
    "generate" always, "replay" never.
    """
    columns = [UPPER_FACE_COLUMNS.index(column) for column in BLINK_COLUMNS]
    own = reader.expression[reader.ids][:, columns]

    def rare(eyes: np.ndarray) -> bool:
        return 20 * FPS * driving.blink_count(eyes.mean(1)) < len(eyes)

    enough = not rare(own) and (len(replayed) < 20 * FPS or not rare(replayed[:, columns]))
    if blink == "replay" or (blink == "auto" and enough):
        return replayed
    opened = np.median(own, 0)
    shut = np.maximum(np.percentile(own, 99, axis=0), opened + 0.5)
    expression = replayed.copy()
    expression[:, columns] = opened + driving.blinks(len(replayed))[:, None] * (shut - opened)
    return expression


def render_clip(clip: Clip, reader, draw: Callable, backdrops: Backdrops, outputs: Outputs, device, batch: int,
                feather: float) -> bool:  # fmt: skip
    """Draw all frames of `clip` into `outputs`; `draw(conditions)` gives a gaussian_renderer.Rendering.

    Returns False if Ctrl-C ended it early (what was drawn is kept), True otherwise.
    """
    cv2.setNumThreads(1)  # pictures are decoded on threads of ours: OpenCV's own would only fight for the cores
    behind, place, background = DeviceBackdrops(backdrops, device), backdrops.place, backdrops.background
    background = None if background is None else from_bytes(torch.from_numpy(background)[None]).to(device)

    def picture(backdrop: torch.Tensor, *conditions: torch.Tensor) -> list[torch.Tensor]:
        """What goes to the host: a batch as `outputs` takes it."""
        rendering = draw(Conditions(*conditions))
        frames = put_on(rendering.rgb, rendering.alpha, from_bytes(backdrop), feather, place, background).clamp_(0, 1)
        planes = to_planes(frames[:, :3]) if outputs.planar or outputs.attention else None
        maps = outputs.attention(planes, rendering.attention) if outputs.attention else ()
        return [joined(*planes) if outputs.planar else to_bytes(frames), *maps]

    def load(start: int):
        ids = clip.pose_ids[start : start + batch]
        truth = np.stack([reader.image(i) for i in ids]) if clip.truth else None
        return start, ids, heard(clip, start, len(ids)), behind.decode(ids), truth

    done, replayed = 0, Replayed(picture, device)
    threads = min(8, max(2, (os.cpu_count() or 2) // 2))
    batches = prefetch(load, range(0, len(clip.pose_ids), batch), threads, threads + 2)
    drawn: collections.deque[tuple[Download, np.ndarray | None]] = collections.deque()  # on their way to the host

    def hand_out(left: int) -> None:
        nonlocal done
        while len(drawn) > left:
            download, truth = drawn.popleft()
            frames, *maps = download.arrays()
            outputs.put(frames, maps, truth)
            done += len(frames)
            bar.update(len(frames))

    with (outputs, contextlib.closing(batches), progress(label=f"render {clip.split}", total=len(clip.pose_ids)) as bar,
          torch.inference_mode()):  # fmt: skip
        for start, ids, features, decoded, truth in batches:
            conditions = batch_conditions(reader, clip, start, ids, features)
            conditions.intrinsics = enlarged(conditions.intrinsics, place.scale)
            drawn.append((Download(*replayed(behind.batch(ids, decoded), *conditions.tensors())), truth))
            hand_out(1)
            if outputs.interrupted:
                break
        hand_out(0)
        if done < len(clip.pose_ids):
            outputs.end_early()
    return done == len(clip.pose_ids)


def heard(clip: Clip, start: int, count: int) -> np.ndarray | None:
    """Audio features of `count` frames from `start` on and of AUDIO_WINDOW more at either end; None: the data set has them."""
    if clip.features is None:
        return None
    return clip.features[max(0, start - AUDIO_WINDOW) : min(start + count + AUDIO_WINDOW, len(clip.pose_ids))]


def batch_conditions(reader, clip: Clip, start: int, ids: list[int], features: np.ndarray | None) -> Conditions:
    """What drives the frames start, start + 1, ... of `clip`, whose poses are `ids`; `features` are those heard() around them."""
    if features is None:
        return reader.conditions(ids)
    first = min(start, AUDIO_WINDOW)
    conditions = reader.conditions(ids, range(first, first + len(ids)), features)
    for name, rows in (("view", clip.views), ("expression", clip.expression)):
        if rows is not None:
            setattr(conditions, name, torch.from_numpy(rows[start : start + len(ids)]))
    return conditions


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model_path", type=Path, help="model folder (default: the newest under model/)")
    parser.add_argument("-s", "--source_path", type=Path, help="data set folder (default: the one the model was trained on)")
    parser.add_argument("--iteration", type=int, default=-1, help="which saved iteration (default: the latest)")
    parser.add_argument("--custom_aud", type=Path, help="speech to render: any audio or video file, any length")
    parser.add_argument("--blink", choices=("auto", "replay", "generate"), default="auto", help="with --custom_aud: blinks of the "
                        "replayed frames, or generated ones where these have too few (%(default)s)")  # fmt: skip
    parser.add_argument("--smooth_lips", action="store_true", help="with --custom_aud: steadier, slightly softer lips")
    parser.add_argument("--close_mouth", action=argparse.BooleanOptionalAction, default=True, help="with --custom_aud: shut the "
                        "mouth in silence (%(default)s)")  # fmt: skip
    parser.add_argument("--ss", type=parse_time, metavar="hh:mm:ss", help="with --custom_aud: where in the clip poses start")
    parser.add_argument("--skip_train", action="store_true", help="do not render the training frames")
    parser.add_argument("--skip_test", action="store_true", help="do not render the held-out frames")
    parser.add_argument("--visualize_attention", action="store_true", help="also write what each token attends to")
    parser.add_argument("--still_frame_code", action=argparse.BooleanOptionalAction, help="hold the frame code: steadier (default: "
                        "only where learned codes meet other speech, as they know a frame's own mouth)")  # fmt: skip
    parser.add_argument("--feather", type=float, default=FEATHER, help="softness of the head's edge, pixels at 512 (%(default)s)")
    parser.add_argument("--paste", choices=PASTES, default="none", help="put the head on: none, the body over the background "
                        "plate; headless, the filmed frame without its head; original, the filmed frame; full, the whole source "
                        "video (%(default)s)")  # fmt: skip
    parser.add_argument("--background", help="a picture file, a colour (#rrggbb, white, ...) or green, in place of the background")
    parser.add_argument("--alpha", nargs="?", choices=("prores", "png"), const="prores", help="leave the background out: ProRes "
                        "4444 .mov (prores, the default) or a PNG sequence (png)")  # fmt: skip
    parser.add_argument("--export_ply", nargs="?", type=int, const=-1, metavar="FRAME", help="write the head at rest, or as in "
                        "FRAME of the clip, as .ply for 2DGS and 3DGS viewers into <model>/export, and nothing else")  # fmt: skip
    parser.add_argument("--pictures", action="store_true", help="write every frame as PNG too (the test split always does)")
    parser.add_argument("--batch", type=int, help="frames drawn at once (16 on a GPU, 4 on a CPU)")
    parser.add_argument("--fps", type=int, choices=(FPS,), default=FPS, help="frames a second, fixed: what heads are trained at")
    parser.add_argument("--encoder", choices=tuple(encoders.ENCODERS), default="libx264", help="video encoder (%(default)s)")
    parser.add_argument("--crf", type=int, default=18, help="quality of the encoder, 0 (best) to 51 (%(default)s)")
    parser.add_argument("--lossless", action="store_true", help="lossless RGB H.264: large, few players show it")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    args = parser.parse_args(argv)
    for name, valid in (("batch", args.batch is None or args.batch > 0), ("feather", 0 <= args.feather <= 100),
                        ("crf", 0 <= args.crf <= 51)):  # fmt: skip
        if not valid:
            parser.error(f"--{name} {getattr(args, name)} is out of range")
    if not args.custom_aud:
        for name, given in (("ss", args.ss is not None), ("paste full", args.paste == "full"), ("blink", args.blink != "auto"),
                            ("background", args.background), ("alpha", args.alpha), ("smooth_lips", args.smooth_lips)):  # fmt: skip
            if given:
                parser.error(f"--{name} goes with --custom_aud: the splits are rendered as they are")
    if args.background and (args.paste != "none" or args.alpha):
        parser.error("--background goes without --paste and --alpha, which have a background, or none")
    if args.alpha and args.paste != "none":
        parser.error("--alpha goes without --paste: a filmed frame has no alpha")
    if args.lossless and (args.encoder != "libx264" or args.alpha):
        parser.error("--lossless goes with --encoder libx264 and without --alpha (there, --alpha png is lossless)")
    if args.export_ply is not None and args.export_ply < -1:
        parser.error(f"--export_ply {args.export_ply} is no frame id")
    if args.skip_train and args.skip_test and not args.custom_aud and args.export_ply is None:
        parser.error("--skip_train and --skip_test leave nothing to render; give --custom_aud or drop one")
    return args


def export(model: Path, head: TalkingHead, reader: TalkingDatasetReader, frame: int, device: torch.device) -> None:
    """Write <model>/export/ours_N_{canonical or frame}_{2dgs,3dgs}.ply. Raises UserError if `frame` is not usable."""
    if frame >= 0 and frame not in reader.ids:
        raise UserError(f"--export_ply {frame}: {reader.folder.root} has no usable frame {frame}; its ids are {reader.ids[0]} to "
                        f"{reader.ids[-1]}, less those dropped in valid.json")  # fmt: skip
    surfels = head.gaussians.surfels
    if frame >= 0:
        with torch.inference_mode():
            deformed = head(reader.conditions([frame]).to(device))
        surfels = type(deformed)(*(getattr(deformed, name)[0] for name in ("xyz", "scaling", "rotation", "opacity", "sh")))
    for kind in ("2dgs", "3dgs"):
        path = writable(model / "export") / f"ours_{head.iteration}_{'canonical' if frame < 0 else f'frame_{frame}'}_{kind}.ply"
        write_surfels(path, surfels, three_scales=kind == "3dgs")
        print(path)


def open_avatar(args: argparse.Namespace) -> tuple[Path, TalkingHead, TalkingDatasetReader, torch.device]:
    """Model folder, head, data set and device that the arguments name. Raises UserError if they do not belong together."""
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
    if "frame" in head.token_names:
        token = head.deformation.conditions.tokens["frame"]
        hold = args.still_frame_code
        if hold is None:
            hold = token.codes is not None and args.custom_aud is not None
        if hold:
            token.still = reader.splits["train"][0]
    return model, head, reader, device


@command_line
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    recording = Recording(args.custom_aud) if args.custom_aud else None  # the likeliest mistake, so it is found first
    quality = {"encoder": args.encoder, "crf": args.crf, "lossless": args.lossless}
    chosen = encoders.codec(**quality, alpha=args.alpha == "prores")
    remedy = "use --alpha png" if args.alpha == "prores" else "choose another --encoder"
    encoders.check(chosen, IMAGE_SIZE, IMAGE_SIZE, remedy)
    keep_freed_memory()
    model, head, reader, device = open_avatar(args)
    if args.export_ply is not None:
        export(model, head, reader, args.export_ply, device)
        return
    backdrops = Backdrops(reader, head.config.part, args.paste, args.background, bool(args.alpha))
    encoders.check(chosen, backdrops.place.width, backdrops.place.height, remedy)  # it may work here, but not at this size

    prefix = model.resolve().name
    if recording is not None:
        clips = [custom_clip(reader, args, recording, prefix)]
    else:
        clips = [] if args.skip_train else [split_clip(reader, "train", prefix, args.pictures)]
        clips += [] if args.skip_test else [split_clip(reader, "test", prefix, True)]
    size = backdrops.place.drawn(reader.width, reader.height)
    draw = functools.partial(render_batch, head, width=size[0], height=size[1], attention=args.visualize_attention)
    batch = args.batch or (16 if device.type == "cuda" else 4)
    for clip in clips:
        if not clip.pose_ids:
            print(f"{clip.split}: the data set has no such frames, nothing rendered")
            continue
        folder = writable(model / clip.split / f"ours_{head.iteration}")
        (folder / "frames.json").unlink(missing_ok=True)
        maps = AttentionMaps(head.token_names, backdrops.place, size, device) if args.visualize_attention else None
        stem = f"{clip.name}_{head.iteration}iter"
        outputs = Outputs(clip, folder, stem, backdrops.place, size, maps, args.alpha, **quality)
        begin = time.monotonic()
        with one_sentence_when_full("rendering", f"give a smaller --batch than {batch}" if batch > 1 else "give --device cpu"):
            complete = render_clip(clip, reader, draw, backdrops, outputs, device, batch, args.feather)
        seconds = time.monotonic() - begin
        if not complete:
            print(f"{outputs.result}  (stopped by Ctrl-C: it plays, and ends early)")
            raise SystemExit(130)
        if clip.pictures and not args.alpha:
            write_json(folder / "frames.json", {
                "ids": clip.pose_ids, "iteration": head.iteration, "part": head.config.part, "feather": args.feather,
                "paste": args.paste, "source_path": str(reader.folder.root.resolve()), "audio_encoder": reader.encoder,
            })  # fmt: skip
        print(f"{outputs.result}  ({len(clip.pose_ids)} frames in {seconds:.1f} s, {len(clip.pose_ids) / seconds:.1f} frames/s)")
        if outputs.interrupted:  # after its last frame: this clip is complete, the next is not begun
            raise SystemExit(130)


if __name__ == "__main__":
    main()
