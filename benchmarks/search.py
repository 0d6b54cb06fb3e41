"""Search over the settings of train.py, one change at a time, on any device: what wins on held-out frames stays.

    python benchmarks/search.py -s data/x --seconds 600 --candidates candidates.txt [any setting of train.py]

Trains the given recipe, then with each candidate (a line of flags) added to the best so far, in order, until the time is up. A
candidate stays if it raises the score, the mean held-out PSNR (dB) of full frame, head and lips, by --gain or more (a line
that begins with ! is only measured). The frames are read once. Prints a row a run; models lie in <model_path>/<row>.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import shlex
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import arguments
import train
from benchmarks.held_out import SCORED, HeldOut
from scene.dataset import TrainingSet
from utils.captured import side_stream
from utils.device import keep_freed_memory


class Search:
    def __init__(self, fixed: list[str]):
        self.fixed, self.sets = fixed, {}
        self.held_out: HeldOut | None = None

    def config(self, flags: list[str]) -> argparse.Namespace:
        parser = argparse.ArgumentParser()
        arguments.add_arguments(parser)
        return arguments.merge(parser.parse_args([*self.fixed, *flags]))

    def training_set(self, reader, ids, part, device, window=None) -> TrainingSet:
        """As TrainingSet makes it, but read once."""
        key = (tuple(ids), part)
        if key not in self.sets:
            self.sets[key] = TrainingSet(reader, ids, part, device, window).hold()
            self.sets[key].hold = lambda: self.sets[key]
        return self.sets[key]

    def run(self, flags: list[str], path: Path) -> dict[str, float]:
        """Train, measure the held-out frames, and add milliseconds a fine step and the number of surfels."""
        gc.collect()  # the last trainer's graphs
        config = self.config([*flags, "--model_path", str(path)])
        train.TrainingSet = self.training_set
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            trainer = train.Trainer(config)
            if self.held_out is None:
                self.held_out = HeldOut(trainer.scene.reader, config.part, trainer.device)
        with side_stream(trainer.device):
            for stage, end in (("coarse", config.coarse_iterations), ("fine", config.iterations)):
                start, first = time.perf_counter(), trainer.iteration
                trainer.enter(stage)
                for _ in trainer.data.fed(trainer.schedule.our_rows, trainer.schedule.first, first, end):
                    trainer.advance()
                trainer.check()  # waits for the device
        step = 1000 * (time.perf_counter() - start) / max(end - first, 1)
        trainer.head.save(path)
        return self.held_out.measure(path) | {"ms": step, "surfels": len(trainer.head.gaussians)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=Path, required=True, help="a file with a line of flags for each candidate")
    parser.add_argument("--seconds", type=float, default=600, help="no run begins after this time (%(default)s)")
    parser.add_argument("--gain", type=float, default=0.03, help="dB of the score that make a candidate stay (%(default)s)")
    args, fixed = parser.parse_known_args()
    search = Search(fixed)
    base = search.config([])
    root = Path(base.model_path or Path("model") / f"search_{Path(base.source_path).name}")
    lines = [line.split("#")[0].strip() for line in args.candidates.read_text().splitlines()]
    keep_freed_memory()
    begin, best, flags, slowest, winner = time.perf_counter(), -np.inf, [], 0.0, 0
    columns = (*SCORED, "SSIM", "ST-LPIPS", "ms", "surfels", "s")
    print(f"{'row':>3} {'score':>6}  " + " ".join(f"{name:>9}" for name in columns), "  added", flush=True)
    for row, line in enumerate(["", *filter(None, lines)]):
        start = time.perf_counter()
        if start - begin + slowest > args.seconds:
            print(f"time is up; not tried: {lines[lines.index(line) :]}")
            break
        only_measured, added = line.startswith("!"), shlex.split(line.lstrip("! "))
        try:
            found = search.run([*flags, *added], root / str(row))
        except Exception as error:  # one bad candidate must not end the search
            print(f"{row:3}  {type(error).__name__}: {error}  {line}", flush=True)
            continue
        score = float(np.mean([found[name] for name in SCORED]))
        stays = not only_measured and score > best + (args.gain if row else 0)
        if stays:
            best, flags, winner = score, [*flags, *added], row
        slowest = max(slowest, time.perf_counter() - start)
        numbers = [f"{found[n]:9.3f}" for n in SCORED] + [f"{found['SSIM']:9.4f}", f"{found.get('STLPIPS_alex', np.nan):9.5f}"]
        numbers += [f"{found['ms']:9.2f}", f"{found['surfels']:9d}", f"{time.perf_counter() - start:9.1f}"]
        print(f"{row:3} {score:6.3f}{'*' if stays else ' '} " + " ".join(numbers), " ", line or "(the recipe as given)", flush=True)
    print(f"best: {root / str(winner)} with {shlex.join(flags) or 'the recipe as given'}", flush=True)


if __name__ == "__main__":
    main()
