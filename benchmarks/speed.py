"""How fast a head renders on this machine: one table of milliseconds a frame for every part, and frames a second end to end.

    python benchmarks/speed.py -m model/x                     # a trained head, over its data set
    python benchmarks/speed.py --surfels 50000 --size 512     # a random head of that many surfels, if there is none
    python benchmarks/speed.py --surfels 20000 --configs arguments/fast.py --batch 4

Parts are timed alone, synchronised, as medians; "network + raster" is both together, on a GPU as one graph, as render.py draws;
"to memory" is the pipeline of render.py without encoder, "to mp4" all of it, sound included, and "to mp4, attention" with the
videos of --visualize_attention: a map a token and the mosaic. These three run in turn, several times, and are medians too. With -m
the result also goes to <model>/speed.json, which metrics.py quotes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import arguments
from gaussian_renderer import Rendering, render_batch, render_surfels
from gaussian_renderer.attention_maps import AttentionMaps
from gaussian_renderer.compositing import from_bytes
from gaussian_renderer.outputs import Clip, Outputs
from gaussian_renderer.paste import Backdrops, put_on
from gaussian_renderer.planes import joined, to_planes
from gaussian_renderer.replay import Replayed
from gaussian_renderer.transfer import Download
from render import render_clip
from scene import TalkingHead, embedding_width, load_avatar
from scene.cameras import intrinsics
from scene.condition import Conditions
from scene.gaussian_model import GaussianModel, PointCloud
from scene.talking_dataset_readers import TalkingDatasetReader
from utils.audio import Sound
from utils.constants import FPS, SAMPLE_RATE
from utils.device import choose_device, keep_freed_memory
from utils.driving import replayed_ids
from utils.errors import UserError, command_line
from utils.files import write_json
from utils.image import over, read_rgba, write_rgb
from utils.video import VideoWriter

FEATURES = 384  # width of the random head's audio features: whisper-tiny's
FRAMES = 32  # that the random head's data set has


class RandomClip:
    """What render.py asks of a data set, for a head that has none: pictures of noise on disk, random driving signals."""

    def __init__(self, folder: Path, size: int):
        self.width = self.height = size
        self.ids, self._folder = list(range(FRAMES)), folder
        rng = np.random.default_rng(0)
        self.plate = np.clip(rng.normal(128, 6, (size, size, 3)), 0, 255).astype(np.uint8)
        torso = np.zeros((size, size, 4), np.uint8)
        torso[size * 3 // 4 :] = np.dstack([rng.normal(90, 6, (size // 4, size, 3)), np.full((size // 4, size), 255)])
        for i in self.ids:
            write_rgb(folder / f"{i}.png", torso)
        generator = torch.Generator().manual_seed(0)
        self._signals = torch.randn(FRAMES, 8, FEATURES, generator=generator), torch.rand(FRAMES, 7, generator=generator)

    def torso(self, i: int) -> np.ndarray:
        return read_rgba(self._folder / f"{i}.png")

    def backdrop(self, i: int) -> np.ndarray:
        return over(self.torso(i), self.plate)

    def conditions(self, ids: list[int]) -> Conditions:
        rows = torch.as_tensor(ids)
        view = torch.eye(4).repeat(len(rows), 1, 1)
        view[:, 2, 3] = 7.0  # dm; a head 1.8 dm high fills half the picture
        camera = intrinsics(2.0 * self.width, self.width / 2, self.height / 2)
        return Conditions(*(s[rows] for s in self._signals), view, camera.expand(len(rows), 3, 3), rows)


def random_head(count: int, configs: str | None, device: torch.device) -> TalkingHead:
    """`count` surfels on an ellipsoid as large as a head, and a network whose every layer does something."""
    config = arguments.merge(argparse.Namespace(configs=configs))
    config.audio_features, config.frames = FEATURES, FRAMES
    generator = torch.Generator().manual_seed(0)
    normals = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=1)
    points = normals * torch.tensor([0.7, 0.9, 0.8])
    cloud = PointCloud(points, normals, torch.rand(count, 3, generator=generator))
    head = TalkingHead(config, GaussianModel.from_points(cloud, config.sh_degree, embedding_width(config)))
    if head.deformation.tri_plane is not None:
        head.deformation.tri_plane.set_box(points)
    for layer in head.deformation.heads.last.values():
        torch.nn.init.normal_(layer.weight, std=0.01)
    return head.to(device).freeze()


class Timer:
    """Median seconds of a call, waiting for the device before and after."""

    def __init__(self, device: torch.device, repeats: int):
        self._wait = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
        self._repeats = repeats

    def __call__(self, call: Callable) -> float:
        seconds = []
        for k in range(self._repeats + 2):
            self._wait()
            begin = time.perf_counter()
            call()
            self._wait()
            if k >= 2:
                seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds)


class Nowhere:
    """Takes frames as Outputs does and keeps none."""

    interrupted, attention, planar = False, None, True

    def __enter__(self) -> Nowhere:
        return self

    def __exit__(self, *error) -> None:
        pass

    def put(self, frames, maps, truth) -> None:
        pass


def measure(head: TalkingHead, reader, device: torch.device, batch: int, frames: int, repeats: int, rounds: int,
            folder: Path) -> dict:  # fmt: skip
    """One column of the table: ms a frame of the parts, frames a second of the whole, MiB."""
    timer, size = Timer(device, repeats), (reader.width, reader.height)
    backdrops = Backdrops(reader, head.config.part)
    pose_ids = replayed_ids(reader.ids, max(frames, batch))
    conditions = reader.conditions(pose_ids[:batch]).to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    row = {}
    with torch.inference_mode():
        surfels = head(conditions)
        drawn = render_surfels(surfels, conditions, *size)
        behind = from_bytes(torch.from_numpy(backdrops.batch(pose_ids[:batch])).to(device))

        def planes() -> np.ndarray:
            frames = put_on(drawn.rgb, drawn.alpha, behind, 0.0, backdrops.place).clamp_(0, 1)
            return Download(joined(*to_planes(frames))).arrays()[0]

        def drawing(attention: bool, *inputs: torch.Tensor) -> Rendering:
            return draw(Conditions(*inputs), attention=attention)

        pictures = planes()
        with VideoWriter(folder / "part.mp4", *size) as writer:
            row["encode"] = timer(lambda: [writer.add(picture) for picture in pictures])
        row["backdrop decode"] = timer(lambda: backdrops.batch(pose_ids[:batch]))
        row["deformation"] = timer(lambda: head(conditions))
        row["raster"] = timer(lambda: render_surfels(surfels, conditions, *size))
        row["raster + 4 attention maps"] = timer(lambda: render_surfels(surfels, conditions, *size, attention=True))
        row["composite, to host"] = timer(planes)
        draw = functools.partial(render_batch, head, width=size[0], height=size[1])
        both = {attention: timer(functools.partial(Replayed(functools.partial(drawing, attention), device), *conditions.tensors()))
                for attention in (False, True)}  # fmt: skip
    row = {name: 1000 * seconds / batch for name, seconds in row.items()}
    speed = {"network + raster": batch / both[False], "network + raster, attention": batch / both[True]}
    sound = Sound.of(np.zeros(len(pose_ids) * SAMPLE_RATE // FPS, np.float32), SAMPLE_RATE)
    clip = Clip("speed", "speed", pose_ids, sound)
    written = functools.partial(Outputs, clip, folder, "speed", backdrops.place, size)
    with_maps, maps = functools.partial(draw, attention=True), AttentionMaps(head.token_names, backdrops.place, size, device)
    ways = {"to memory": (draw, Nowhere), "to mp4": (draw, written), "to mp4, attention": (with_maps, lambda: written(maps))}
    seconds = {name: [] for name in ways}
    for name in list(ways) * rounds:  # in turn: what else the machine does comes and goes
        drawing, outputs = ways[name]
        begin = time.perf_counter()
        with contextlib.redirect_stderr(open(os.devnull, "w")):  # noqa: SIM115  progress bars between the lines of the table
            if not render_clip(clip, reader, drawing, backdrops, outputs(), device, batch, 0.0):
                raise KeyboardInterrupt
        seconds[name].append(time.perf_counter() - begin)
    speed |= {name: len(pose_ids) / statistics.median(taken) for name, taken in seconds.items()}
    memory = {"host MiB, peak so far": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if device.type == "cuda":
        memory["GPU MiB, peak"] = torch.cuda.max_memory_allocated(device) / 2**20
    return {"ms": row, "fps": speed, "memory": memory}


def table(columns: dict[int, dict]) -> str:
    lines = [f"{'':32}" + "".join(f"{f'batch {batch}':>12}" for batch in columns)]
    for group, unit, digits in (("ms", "ms a frame", 2), ("fps", "frames/s", 1), ("memory", "", 0)):
        for name in next(iter(columns.values()))[group]:
            values = "".join(f"{column[group][name]:>12.{digits}f}" for column in columns.values())
            lines.append(f"{name:32}{values}  {unit}")
    return "\n".join(lines)


@command_line
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model_path", type=Path, help="model folder (default: a random head)")
    parser.add_argument("-s", "--source_path", type=Path, help="data set folder (default: the one the model was trained on)")
    parser.add_argument("--surfels", type=int, default=50_000, help="of the random head (%(default)s)")
    parser.add_argument("--size", type=int, default=512, help="side of the random head's picture (%(default)s)")
    parser.add_argument("--configs", help="settings file of the random head's network (arguments/fast.py)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16], help="frames drawn at once (%(default)s)")
    parser.add_argument("--frames", type=int, help="frames of the end-to-end runs (2000 on a GPU, 200 on a CPU)")
    parser.add_argument("--repeats", type=int, default=9, help="calls a median is taken of (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="end-to-end runs of each kind, in turn; medians (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: its own choice)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    args = parser.parse_args(argv)
    counts = (*args.batch, args.repeats, args.rounds, args.surfels, *(x for x in (args.frames, args.threads) if x is not None))
    if min(counts) < 1 or args.size < 16 or args.size % 2:
        raise UserError("--batch, --frames, --repeats, --rounds, --surfels and --threads must be at least 1, --size even and at "
                        "least 16")  # fmt: skip
    device = choose_device(args.device)
    frames = args.frames or (2000 if device.type == "cuda" else 200)
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        if args.model_path:
            head = load_avatar(args.model_path, None, device)
            reader = TalkingDatasetReader(args.source_path or head.config.source_path, head.config.audio_encoder)
        else:
            head, reader = random_head(args.surfels, args.configs, device), RandomClip(Path(folder), args.size)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        machine = f"{name}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
        print(f"{args.model_path or 'random head'}: {len(head.gaussians)} surfels, {reader.width}x{reader.height}; {machine}")
        columns = {batch: measure(head, reader, device, batch, frames, args.repeats, args.rounds, Path(folder))
                   for batch in args.batch}  # fmt: skip
    print(table(columns))
    if args.model_path:
        write_json(args.model_path / "speed.json", {
            "iteration": head.iteration, "surfels": len(head.gaussians), "size": [reader.width, reader.height],
            "machine": machine, "batch": {str(batch): column for batch, column in columns.items()},
        })  # fmt: skip


if __name__ == "__main__":
    main()
