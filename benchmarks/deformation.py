"""The deformation network alone: fused against plain, numbers and times, at the sizes of a training step.

    python benchmarks/deformation.py                    # 16 frames, 50k surfels, the default network
    python benchmarks/deformation.py --batch 2 --surfels 2000 --device cpu
    python benchmarks/deformation.py --sweep            # times of each kernel by tile (rows, warps, stages)

Errors are relative (norm of the difference over norm) to the plain network in float64, of the gradients of a squared distance
to the outputs of a network with other weights; "autocast" is the plain network under torch.autocast in bfloat16. Where a ReLU
is decided by rounding, a gradient changes whole: with white noise as the gradient of the outputs both err by 5 to 10 %. Times
are medians of device time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import arguments
from scene.attention import TokenAttention
from scene.deformation import MOTION, ResidualHeads
from scene.tri_plane import TriPlane

CANDIDATES = {
    "forward": [(64, 4, 2), (64, 4, 3), (128, 8, 3)],
    "gather": [(64, 4, 1)],
    "heads_backward": [(64, 4, 2), (64, 4, 3), (64, 4, 4), (128, 8, 3)],
    "weights_backward": [(64, 4, 2), (64, 4, 3), (64, 8, 2), (64, 8, 3), (64, 8, 4), (128, 8, 2), (128, 8, 3), (256, 8, 2)],
    "layer_backward": [(64, 4, 1), (64, 8, 1), (128, 8, 1)],
}


class Case:
    """Random network, surfels and tokens; `run` returns outputs, `step` also the gradients of everything."""

    def __init__(self, config, batch: int, count: int, device: torch.device):
        torch.manual_seed(0)
        width = config.plane_channels * len(config.plane_multires)
        sizes = {"xyz": 3, "scaling": 2, "rotation": 4, "opacity": 1, "sh": 3 * (config.sh_degree + 1) ** 2}
        self.layer = TokenAttention(width, config.heads, config.ffn_hidden, 0.0)
        self.heads = ResidualHeads(width, config.net_width, sizes, {"xyz": MOTION})
        for head in self.heads.last.values():
            torch.nn.init.normal_(head.weight, std=0.05)
        self.layer, self.heads = self.layer.to(device), self.heads.to(device)
        inputs = {"features": 0.5 * torch.rand(count, width), "tokens": torch.randn(batch, len(config.tokens), width)}
        inputs |= {name: torch.randn(count, size) for name, size in sizes.items()}
        self.inputs = {name: value.to(device).requires_grad_() for name, value in inputs.items()}
        with torch.no_grad():
            there = self.plain()
            parameters = [*self.layer.parameters(), *self.heads.parameters()]
            kept = [parameter.clone() for parameter in parameters]
            for parameter in parameters:
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
            elsewhere = self.plain()
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
        self.weights = {name: there[name] - elsewhere[name] for name in there}  # gradients of the outputs

    def double(self) -> None:
        self.layer, self.heads = self.layer.double(), self.heads.double()
        self.inputs = {name: value.detach().double().requires_grad_() for name, value in self.inputs.items()}
        self.weights = {name: value.double() for name, value in self.weights.items()}

    def plain(self) -> dict[str, torch.Tensor]:
        x, attention = self.layer(self.inputs["features"], self.inputs["tokens"])
        return {n: self.inputs[n] + v for n, v in self.heads(x).items()} | {"attention": attention}

    def autocast(self) -> dict[str, torch.Tensor]:
        with torch.autocast(self.inputs["tokens"].device.type, torch.bfloat16):
            return {name: value.float() for name, value in self.plain().items()}

    def fused(self) -> dict[str, torch.Tensor]:
        from scene.fused_deformation import deform

        inputs = self.inputs
        values, attention = deform(self.layer, self.heads, inputs["features"], inputs["tokens"], inputs)
        return values | {"attention": attention}

    def leaves(self) -> dict[str, torch.Tensor]:
        return {**self.inputs, **dict(self.layer.named_parameters("layer")), **dict(self.heads.named_parameters("heads"))}

    def step(self, run) -> tuple[dict, dict]:
        out, leaves = run(), self.leaves()
        names = list(out)
        gradients = torch.autograd.grad([out[n] for n in names], list(leaves.values()), [self.weights[n] for n in names])
        return out, dict(zip(leaves, gradients, strict=True))


def errors(case: Case, paths: dict) -> None:
    got = {name: case.step(run) for name, run in paths.items()}
    case.double()
    want = case.step(case.plain)
    for part, title in enumerate(("outputs", "gradients")):
        for key in want[part]:
            truth = want[part][key].detach()
            row = [float((g[part][key].detach().double() - truth).norm() / truth.norm()) for g in got.values()]
            print(f"  {title[:-1]:9} {key:30}" + "".join(f"{name:>10} {e:.1e}" for name, e in zip(got, row, strict=True)))


def milliseconds(call, device: torch.device, repeats: int = 20) -> float:
    times = []
    for i in range(repeats + 3):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            elapsed = start.elapsed_time(end)
        else:
            begin = time.perf_counter()
            call()
            elapsed = 1000 * (time.perf_counter() - begin)
        if i >= 3:
            times.append(elapsed)
    return statistics.median(times)


def kernel_times(call, repeats: int = 5) -> list[tuple[str, float]]:
    """(name, microseconds) of every kernel of a call, in order; medians."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    runs = []
    for _ in range(repeats):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        runs.append([(e.name, e.device_time) for e in sorted(events, key=lambda e: e.time_range.start)])
    length = min(map(len, runs))
    return [(runs[0][i][0], statistics.median(run[i][1] for run in runs if len(run) == length)) for i in range(length)]


def times(case: Case, paths: dict, device: torch.device) -> None:
    for name, run in paths.items():
        with torch.no_grad():
            inference = milliseconds(run, device)
        forward, both = milliseconds(run, device), milliseconds(lambda run=run: case.step(run), device)
        line = f"{name:6} inference {inference:8.3f}  forward {forward:8.3f}  forward + backward {both:8.3f} ms"
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_allocated()
            case.step(run)
            torch.cuda.synchronize()
            line += f"  peak {(torch.cuda.max_memory_allocated() - base) / 2**20:.0f} MiB"
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                case.step(run)
            line += f"  as a graph {milliseconds(graph.replay, device):.3f} ms"
            del graph
        print(line, flush=True)


def sweep(case: Case, only: tuple[int, int] | None) -> None:
    """Times of each kernel by tile; `only` (i, n): just compile every n-th, from the i-th."""
    from scene import fused_deformation as fused

    default, k = dict(fused.TILES), 0
    for name, candidates in CANDIDATES.items():
        for tile in candidates:
            k += 1
            if only and k % only[1] != only[0]:
                continue
            fused.TILES[name] = tile
            try:
                if only:
                    case.step(case.fused)
                    continue
                found = [f"{t:8.1f}" for n, t in kernel_times(lambda: case.step(case.fused)) if n == name]
                print(f"  {name:18} {str(tile):14} {' '.join(found)} us", flush=True)
            except Exception as error:  # noqa: BLE001  a tile that does not fit is a result too
                print(f"  {name:18} {str(tile):14} {type(error).__name__} {str(error)[:80]}", flush=True)
            finally:
                fused.TILES[name] = default[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_arguments(parser)
    parser.add_argument("--surfels", type=int, default=50_000, help="(%(default)s)")
    parser.add_argument("--sweep", action="store_true", help="times of each kernel by tile")
    parser.add_argument("--compile", type=int, nargs=2, help=argparse.SUPPRESS)
    args = arguments.merge(parser.parse_args())
    device = torch.device("cuda" if args.device == "auto" and torch.cuda.is_available() else args.device.replace("auto", "cpu"))
    case = Case(args, args.batch_size, args.surfels, device)
    if args.compile:
        sweep(case, tuple(args.compile))
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}: {args.batch_size} frames, {args.surfels} surfels, {len(args.tokens)} tokens")
    paths = {"plain": case.plain} | ({"fused": case.fused} if device.type == "cuda" else {})
    small = Case(args, 2, min(args.surfels, 5000), device)
    reduced = {"autocast": small.autocast} | ({"fused": small.fused} if device.type == "cuda" else {})
    errors(small, {"plain": small.plain} | reduced)
    if device.type == "cuda":
        found = kernel_times(lambda: case.step(case.fused))
        print(f"kernels of a fused step, {sum(t for _, t in found):.0f} us in all, the longer ones:")
        for kernel, t in found:
            if t > 4:
                print(f"  {t:8.1f} {kernel[:80]}")
    if args.sweep:
        sweep(case, None)
    times(case, paths, device)
    planes = TriPlane(args.plane_channels, args.plane_resolution, tuple(args.plane_multires)).to(device)
    points = (2 * torch.rand(args.surfels, 3, device=device) - 1).requires_grad_()
    inputs, gradient = [points, *planes.parameters()], torch.rand(args.surfels, planes.width, device=device)
    for name, run in {"plain": planes.plain, "fused": planes}.items():
        if name == "plain" or device.type == "cuda":
            both = milliseconds(lambda run=run: torch.autograd.grad(run(points), inputs, gradient), device)
            error = [float((a - b).norm() / b.norm()) for a, b in zip(
                torch.autograd.grad(run(points), inputs, gradient), torch.autograd.grad(planes.plain(points), inputs, gradient),
                strict=True)]  # fmt: skip
            print(f"tri-plane {name}: forward {milliseconds(lambda run=run: run(points), device):.3f}, + backward {both:.3f} ms, "
                  f"gradients from plain {max(error):.1e}")  # fmt: skip
    if device.type == "cuda":
        for t in kernel_times(lambda: torch.autograd.grad(planes(points), inputs, gradient)):
            print(f"  {t[1]:8.1f} {t[0][:60]}")


if __name__ == "__main__":
    main()
