"""Time and measure the whole product on one clip: the figures of README.md and docs/benchmarks.md come from this.

    python benchmarks/clip.py ../shared/videos/dfrf_cnn2_25fps.mp4 --seconds 20 --speech ../shared/audio/synctalk_test.wav
    python benchmarks/clip.py ../shared/videos/dfrf_cnn2_25fps.mp4 --size 512 --seconds 300 --only process

Runs the real programs as a user would, in data/bench_<name> and model/bench_<name>, and prints a line a program: wall
seconds and the peak memory of the process; then the table of metrics.py.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import av

ROOT = Path(__file__).resolve().parents[1]
STEPS = ("process", "train", "render test", "metrics", "render speech")


def cut(source: Path, target: Path, seconds: float | None) -> None:
    """Copy the first `seconds` of a video without encoding it again, from the start again where it is shorter (None: all, once)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(target), "w") as out:
        begin, streams, last = 0.0, {}, {}
        while begin < (seconds or 1e-6):
            with av.open(str(source)) as inside:
                video = inside.streams.video[0]
                kept = [stream for stream in inside.streams if stream.type in ("video", "audio")]
                streams = streams or {stream.index: out.add_stream_from_template(stream) for stream in kept}
                for packet in inside.demux():
                    if packet.dts is None or packet.stream.index not in streams:
                        continue
                    shift, index = round(begin / packet.time_base), packet.stream.index
                    inside_time = seconds is None or begin + packet.pts * packet.time_base < seconds
                    # sound may outlast the picture
                    if inside_time and packet.dts + shift > last.get(index, packet.dts + shift - 1):
                        packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                        last[index] = packet.dts
                        packet.stream = streams[index]
                        out.mux(packet)
                begin += float(video.frames / video.average_rate)


def timed(name: str, command: list[str]) -> str:
    """Run a program, print its wall time and peak memory, return what it printed; stop where it fails."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{name} failed\n{output}")
    print(f"{name:14} {time.monotonic() - start:8.1f} s {usage.ru_maxrss / 1024:8.0f} MB", flush=True)
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path)
    parser.add_argument("--seconds", type=float, help="the first so many seconds, the clip repeated where it is shorter")
    parser.add_argument("--size", default="256")
    parser.add_argument("--configs", default="arguments/fast.py")
    parser.add_argument("--speech", type=Path, help="audio to speak at the end")
    parser.add_argument("--only", choices=STEPS, help="run this step alone")
    args = parser.parse_args()
    name = f"bench_{args.video.stem}_{args.size}" + (f"_{args.seconds:g}s" if args.seconds else "")
    data, model = ROOT / "data" / name, ROOT / "model" / name
    if args.only in (None, "process"):
        shutil.rmtree(data, ignore_errors=True)
        cut(args.video, data / "clip.mp4", args.seconds)
    if args.only in (None, "train"):
        shutil.rmtree(model, ignore_errors=True)
    commands = {
        "process": ["data_utils/process.py", str(data / "clip.mp4"), "--size", args.size],
        "train": ["train.py", "-s", str(data), "--model_path", str(model), "--configs", args.configs],
        "render test": ["render.py", "-m", str(model), "--skip_train", "--paste", "headless"],
        "metrics": ["metrics.py", "-m", str(model)],
        "render speech": ["render.py", "-m", str(model), "--custom_aud", str(args.speech)],
    }
    outputs = {}
    for step in STEPS:
        if args.only in (None, step) and (step != "render speech" or args.speech):
            outputs[step] = timed(step, commands[step])
        if step == "process" and step in outputs:
            size = sum(path.stat().st_size for path in data.rglob("*") if path.is_file())
            print(f"{'data set':14} {size / 1e9:8.2f} GB on disk")
    print(outputs.get("metrics", ""), outputs.get("render speech", ""), sep="\n")


if __name__ == "__main__":
    main()
