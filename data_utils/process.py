"""Turn a video of one talking person into a data set that train.py reads.

    python data_utils/process.py video.mp4                      # all stages, into data/video/
    python data_utils/process.py data/anna/clip.mp4             # a video inside data/<name>/ is processed where it lies
    python data_utils/process.py video.mp4 --check              # only say what will go wrong with this clip, in seconds
    python data_utils/process.py video.mp4 --task 2 --end_task 4

Stages: 1 audio, 2 frames, 3 parsing, 4 background, 5 torso, 6 landmarks, 7 face_tracking, 8 bundle_adjustment (optical flow),
9 blendshapes, 10 transforms; then report.html. Running it again does only what is stale; after a kill it goes on where it was.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # called as a script, Python looks in data_utils/ only
    sys.path.insert(0, str(ROOT))

from data_utils.stage import VIDEO, Stage, free_space, require_inputs, run_stage, video_digest, why_stale  # noqa: E402
from utils.constants import FPS, IMAGE_SIZE, PART_CLASSES  # noqa: E402
from utils.dataset_folder import DatasetFolder  # noqa: E402
from utils.errors import UserError, command_line  # noqa: E402
from utils.files import read_json  # noqa: E402

FRAMES, DENSE = "ori_imgs/*.jpg", "face_landmarks.npz"

STAGES = (
    Stage(0, "quality", "data_utils.quality", (VIDEO,), (), ("size", "scale")),
    Stage(1, "audio", "data_utils.audio", (VIDEO,), ("aud.wav", "aud_*.npy"), ("audio",)),
    Stage(2, "frames", "data_utils.frames", (VIDEO,), (FRAMES, "crop.json", DENSE), ("size", "scale")),
    Stage(3, "parsing", "data_utils.face_parsing", (FRAMES, DENSE), ("parsing/*.png",), ("parsing",)),
    Stage(4, "background", "data_utils.background", (FRAMES, "parsing/*.png"), ("bc.jpg",)),
    Stage(5, "torso", "data_utils.torso", (FRAMES, "parsing/*.png", "bc.jpg"), ("gt_imgs/*.jpg", "torso_imgs/*.png")),
    Stage(6, "landmarks", "data_utils.landmarks", (FRAMES, DENSE), ("ori_imgs/*.lms", "valid.json"), ("landmarks",)),
    Stage(7, "face_tracking", "data_utils.face_tracking", (FRAMES, DENSE, "valid.json"),
          ("track_params.pt", "fused.ply"), ("face_model", "photometric")),
    Stage(8, "bundle_adjustment", "data_utils.bundle_adjustment", (FRAMES, DENSE, "parsing/*.png", "valid.json", "track_params.pt"),
          ("tracks.npz", "bundle_adjustment.pt"), ("flow",)),
    Stage(9, "blendshapes", "data_utils.blendshape_capture", (DENSE,), ("bs.npy",), ("blendshapes",)),
    Stage(10, "transforms", "data_utils.transforms", (DENSE, "valid.json", "track_params.pt", "bundle_adjustment.pt?", "aud.wav?"),
          ("transforms_train.json", "transforms_val.json"), ("use_3dmm", "av_offset")),
)  # fmt: skip
LAST = STAGES[-1].number
BYTES_A_PIXEL = 1.5  # on disk, of one frame in all its forms (frame, torso, parsing); 1.3 measured


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("video", type=Path, help="video of one person speaking to a still camera")
    add("--task", type=int, metavar="N", help="run stage N only, or with --end_task M stages N to M (inclusive)")
    add("--end_task", type=int, metavar="M", help="last stage to run")
    add("--size", type=int, default=IMAGE_SIZE, help="side of the frames in pixels (default %(default)s)")
    add("--scale", type=float, default=1.0, help="enlarge the window around the head, e.g. 1.2 (default %(default)s)")
    add("--part", choices=tuple(PART_CLASSES), default="head", help="what train.py will model (default %(default)s)")
    add("--use_3dmm", action="store_true", help="take the face tracker's own pose; no optical flow, no bundle adjustment")
    add("--photometric", action="store_true", help="refine the face tracker's poses on the pictures, not on landmarks alone")
    add("--av_offset", type=_av_offset, default="auto", metavar="FRAMES", help="move the sound by so many frames of 1/25 s, "
        "negative = earlier; auto moves it where lips and sound are surely more than a frame apart (%(default)s)")  # fmt: skip
    add("--force", action="store_true", help="redo the stages even if they are up to date, and take clips that would be refused")
    add("--check", action="store_true", help="only the quality check: its verdict, in seconds")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default %(default)s)")
    for stage in ("audio", "parsing", "landmarks", "face_model", "flow", "blendshapes"):
        add(f"--{stage}", default="auto", metavar="BACKEND", help="back end of this stage (default: the best available)")
    options = parser.parse_args(argv)
    options.same_again = _same_again(parser, options)
    options.quiet = False
    return options


def _same_again(parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """The words of a command that makes the same data set to its end: --task, --end_task, --check and --force are of one run."""
    words = [str(options.video)]
    for name, value in vars(options).items():
        if name not in ("video", "task", "end_task", "check", "force") and value != parser.get_default(name):
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return shlex.join(words)


def _av_offset(text: str) -> str | int:
    return text if text == "auto" else int(text)


def data_folder(video: Path) -> DatasetFolder:
    """The folder of a video that lies in any data/<name>/, else data/<stem>/ under the current folder."""
    inside = video.resolve().parent.parent.name == "data"
    return DatasetFolder(video.parent if inside else Path("data") / video.stem)


def chosen_stages(options: argparse.Namespace) -> list[Stage]:
    """The stages --task and --end_task name, the quality check before them where stage 1 or 2 is among them."""
    first = 1 if options.task is None else options.task
    last = options.end_task if options.end_task is not None else (LAST if options.task is None else options.task)
    if not 1 <= first <= last <= LAST:
        raise UserError(f"--task {first} --end_task {last}: stages are numbered 1 to {LAST}, and the last is not before the first")
    return [stage for stage in STAGES if first <= stage.number <= last or (stage.number == 0 and first <= 2)]


def check_options(options: argparse.Namespace) -> None:
    """Raises UserError for values no stage can work with, before anything is done."""
    if not options.video.is_file():
        raise UserError(f"{options.video} does not exist; give the path of a video file")
    if not 64 <= options.size <= 2048 or options.size % 16:
        raise UserError(f"--size {options.size}: the frames' side must be a multiple of 16 from 64 to 2048")
    if not 0.5 <= options.scale <= 4:
        raise UserError(f"--scale {options.scale}: the window around the head can be enlarged by 0.5 to 4")
    if options.av_offset != "auto" and abs(options.av_offset) > FPS:
        raise UserError(f"--av_offset {options.av_offset}: the sound can be moved by up to {FPS} frames either way")


def check_folder(folder: DatasetFolder, options: argparse.Namespace) -> None:
    """Refuse to replace the data set of another video, and to begin what the disk cannot hold."""
    made_from = folder.crop
    if made_from.exists() and not options.force:
        before = Path(read_json(made_from).get("video", options.video.resolve()))
        other = before != options.video.resolve()
        if other and before.is_file() and video_digest(before) != video_digest(options.video):
            raise UserError(f"{folder.root} was made from another video ({before}); rename {options.video}, or replace it with "
                            "--force")  # fmt: skip


def check_space(folder: DatasetFolder, seconds: float, options: argparse.Namespace) -> None:
    needed = seconds * FPS * options.size**2 * BYTES_A_PIXEL
    free = free_space(folder.root)
    if free < needed and not options.force:
        raise UserError(f"the disk of {folder.root} has {free / 1e9:.1f} GB free, and about {needed / 1e9:.1f} GB are needed; "
                        "free some space, or use a smaller --size")  # fmt: skip


@command_line(resumes=True)
def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    check_options(options)
    stages = chosen_stages(options)
    if options.check:
        print_verdict(options)
        return
    import cv2

    from data_utils import report
    from utils.device import choose_device, keep_freed_memory

    keep_freed_memory()
    cv2.setNumThreads(1)  # stages work at several frames at once (data_utils/per_frame.py): more threads only fight for the cores
    options.device = str(choose_device(options.device))
    folder = data_folder(options.video)
    check_folder(folder, options)
    ran = 0
    for stage in stages:
        reason = "--force" if options.force else why_stale(stage, folder, options)
        title = f"[{stage.number}/{LAST}] {stage.name}"
        if stage.name == "bundle_adjustment" and options.use_3dmm:
            print(f"{title}: not needed with --use_3dmm")
        elif reason is None:
            print(f"{title}: up to date")
        else:
            print(f"{title}: {reason}", flush=True)
            require_inputs(stage, folder)
            record = run_stage(stage, folder, options)
            if stage.number == 0:
                check_space(folder, record["facts"]["seconds"], options)
            for warning in record["facts"].get("warnings", []):
                print(f"    warning: {warning}")
            ran += 1
    page = report.write(folder, STAGES, options)
    print(f"report: {page}" + ("" if ran else " (nothing was stale; --force redoes stages)"))
    print(f"next: {read_json(folder.report)['next']}")


def print_verdict(options: argparse.Namespace) -> None:
    from data_utils import quality

    result = quality.check(options.video, options.size, options.scale, options.force)
    facts, crop = result.facts, result.facts["crop"]
    print(f"{options.video}: usable, {facts['seconds']:.1f} s at {facts['fps']:g} fps, face {facts['face_height']:.0f} px high, "
          f"window {crop['side']} x {crop['side']} at ({crop['x']}, {crop['y']}) of {facts['width']} x {facts['height']}")
    for warning in result.warnings:
        print(f"    warning: {warning}")


if __name__ == "__main__":
    main()
