"""Train a recipe, time its steps and measure the held-out frames, on any device; needs neither PyAV nor mediapipe.

    python benchmarks/train.py -s data/x --configs arguments/custom.py [any setting of train.py]
    python benchmarks/train.py -s data/x --iterations 400 --coarse_iterations 200        # the step times alone matter

Prints milliseconds a step of each stage as the training loop runs it (on a GPU as a CUDA graph), the same step taken apart,
forward and backward together (on a GPU every part as a graph of its own), peak memory, and how good the held-out frames are:
head over the true torso and background against the raw frames, as metrics.py measures frames of `render.py --paste headless`, but
without landmarks.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import arguments
import train
from benchmarks.held_out import HeldOut
from utils.captured import Captured, side_stream
from utils.device import keep_freed_memory
from utils.training_log import TrainingLog

CHUNK = 20  # steps between two looks at the clock


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median of a repetition, synchronised; on a GPU `work` is replayed as a graph."""
    call, times = Captured(device, work), []
    for k in range(repeats + 2):  # the first call warms up, the second records
        synchronise(device)
        start = time.perf_counter()
        call()
        synchronise(device)
        times += [1000 * (time.perf_counter() - start)] * (k > 1)
    return statistics.median(times)


def report_and_save(trainer: train.Trainer, log: TrainingLog) -> float:
    """What train.py does between steps; the seconds it took, once the steps before were done."""
    reports, saves = (trainer.iteration % n == 0 for n in (trainer.config.log_interval, trainer.config.checkpoint_interval))
    if not (reports or saves):
        return 0.0
    synchronise(trainer.device)
    start = time.perf_counter()
    if reports:
        trainer.report(log)
    if saves:
        trainer.save(log)
    return time.perf_counter() - start


def step_parts(trainer: train.Trainer, repeats: int) -> dict[str, float]:
    """Milliseconds of each part of a step at the state the trainer is in, which is put back: the optimizer's part steps on."""
    head, optimizer, window = trainer.head, trainer.optimizer, trainer.data.window
    parameters = [p for p in trainer.optimized() if p.requires_grad]
    batch = trainer.data.batch(trainer.schedule.rows)
    moments = [value for state in optimizer.state.values() for value in state.values()]
    before = [(tensor, tensor.detach().clone()) for tensor in (*trainer.optimized(), *moments)]

    def gradient(outputs, inputs, incoming=None):
        pairs = [(o, g) for o, g in zip(outputs, incoming or [None] * len(outputs), strict=True) if o.requires_grad]
        return torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)

    def deform():
        return head.canonical() if trainer.stage == "coarse" else head(batch.conditions)

    def tensors(record) -> dict[str, torch.Tensor]:
        named = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
        return {name: value for name, value in named.items() if isinstance(value, torch.Tensor) and value.is_floating_point()}

    def leaves(record):
        return dataclasses.replace(record, **{name: t.detach().requires_grad_() for name, t in tensors(record).items()})

    def draw(surfels):
        return train.render_surfels(surfels, batch.conditions, window.width, window.height, aux=trainer.aux)

    def pictures(drawn) -> list[torch.Tensor]:
        return [drawn.rgb, drawn.alpha, *(t for name, t in tensors(drawn.maps).items() if name in trainer.aux)]

    surfels = leaves(deform())
    drawn = draw(surfels)
    shown = dataclasses.replace(drawn, rgb=drawn.rgb.detach().requires_grad_(), alpha=drawn.alpha.detach().requires_grad_())

    def losses():
        return gradient([sum(trainer.losses(batch, shown).values())], [shown.rgb, shown.alpha])

    to_pictures = [torch.ones_like(picture) for picture in pictures(drawn)]
    to_surfels = [torch.ones_like(t) for t in tensors(surfels).values()]
    work = {
        "data": lambda: trainer.data.batch(trainer.schedule.rows),
        "deformation": lambda: gradient(list(tensors(deform()).values()), parameters, to_surfels),
        "raster": lambda: gradient(pictures(draw(surfels)), list(tensors(surfels).values()), to_pictures),
        "losses": losses,
        "optimizer": optimizer.step,
    }
    found = {name: milliseconds(part, trainer.device, repeats) for name, part in work.items()}
    with torch.no_grad():
        for tensor, value in before:
            tensor.copy_(value)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_arguments(parser)
    parser.add_argument("--repeats", type=int, default=20, help="of every part of the step (20)")
    config = arguments.merge(parser.parse_args())
    repeats = vars(config).pop("repeats")
    keep_freed_memory()
    start = time.perf_counter()
    trainer = train.Trainer(config)
    device = trainer.device
    print(f"ready in {time.perf_counter() - start:.1f} s: {len(trainer.data)} frames, window {trainer.data.window}", flush=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    begin = time.perf_counter()
    log = TrainingLog(trainer.scene.model_path, 0, config.iterations)
    apart, kept = 0.0, 0.0  # seconds of taking steps apart, of logs and checkpoints
    reserved = 0  # bytes of the device while training
    with side_stream(device):
        for stage, end in (("coarse", config.coarse_iterations), ("fine", config.iterations)):
            trainer.enter(stage)
            times, mark, first = [], time.perf_counter(), trainer.iteration
            kept_before = kept
            for _ in trainer.data.fed(trainer.schedule.our_rows, trainer.schedule.first, first, end):
                trainer.advance()
                kept += report_and_save(trainer, log)
                if (trainer.iteration - first) % CHUNK == 0:
                    trainer.check()
                    times.append(1000 * (time.perf_counter() - mark - (kept - kept_before)) / CHUNK)
                    mark, kept_before = time.perf_counter(), kept
            synchronise(device)
            count, size = len(trainer.head.gaussians), trainer.batch_sizes[stage]
            print(f"{stage}: {end - first} steps of {size} frames, {count} surfels: a step takes {statistics.median(times):.2f} ms "
                  f"(median), {statistics.mean(times):.2f} (mean), {times[-1]:.2f} (last)", flush=True)  # fmt: skip
            mark = time.perf_counter()
            if device.type == "cuda":
                reserved = max(reserved, torch.cuda.max_memory_reserved(device))
            trainer.schedule.at(first)
            parts = step_parts(trainer, repeats)
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            apart += time.perf_counter() - mark
            parts["sum"] = sum(parts.values())
            print("  " + ", ".join(f"{name} {ms:.2f} ms" for name, ms in parts.items()), flush=True)
    seconds = time.perf_counter() - begin - apart
    log.close()
    trainer.head.save(trainer.scene.model_path)
    memory = f"peak RAM {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"
    if device.type == "cuda":
        memory += f", device {reserved / 2**30:.2f} GiB"
    print(memory)
    held_out = HeldOut(trainer.scene.reader, config.part, device).measure(trainer.scene.model_path)
    scores = ", ".join(f"{name} {value:.4f}" for name, value in held_out.items())
    print(f"trained in {seconds:.0f} s, {kept:.0f} of them for logs and checkpoints; held-out {scores}")


if __name__ == "__main__":
    main()
