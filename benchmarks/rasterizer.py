"""Times the surfel rasterizer (medians after warm-up), forward and backward with everything included.

    python benchmarks/rasterizer.py [--quick] [--threads 2]

Rows: size, images a call, surfels, channels, forward ms, backward ms, growth of the process's peak memory. The last rows set the
rasterizer beside the dense plain-torch reference at a size which that can run.
"""

from __future__ import annotations

import argparse
import math
import resource
import statistics
import time

import torch
from diff_surfel_rasterization import rasterize_surfels, reference
from diff_surfel_rasterization.cpu import cpu_level

FOCAL, DISTANCE = 1200.0, 4.0  # pixels at 512, scene units


def quaternions_to(normals: torch.Tensor, spin: torch.Tensor) -> torch.Tensor:
    """(N, 4) wxyz: rotations whose third column is the normal, turned about it by `spin` radians."""
    w, x, y = 1 + normals[:, 2], -normals[:, 1], normals[:, 0]
    c, s = torch.cos(spin / 2), torch.sin(spin / 2)
    q = torch.stack([w * c, x * c + y * s, y * c - x * s, w * s], 1)
    return q / q.norm(dim=1, keepdim=True).clamp_min(1e-9)


def head_scene(count: int, batch: int, size: int, channels: int, sigma_px: float = 1.5, seed: int = 0) -> dict:
    """Arguments of `rasterize_surfels` for a head-like cloud: an ellipsoid over a torso, thin shells of small surfels.

    Log-normal sizes about `sigma_px` pixels at 512, opacity 50/30/20 % high/middle/low, storage order random; one slightly turned
    camera and slightly deformed means for each image, as training has them. float32.
    """
    rng = torch.Generator().manual_seed(seed)
    normal, uniform = (lambda *n: torch.randn(*n, generator=rng)), (lambda *n: torch.rand(*n, generator=rng))

    def shell(n, axes, centre):
        direction = torch.nn.functional.normalize(normal(n, 3), dim=1)
        outward = torch.nn.functional.normalize(direction / torch.tensor(axes), dim=1)
        return direction * torch.tensor(axes) + torch.tensor(centre) + 0.006 * normal(n, 1) * outward, outward

    torso = count // 4
    parts = [shell(count - torso, (0.40, 0.54, 0.46), (0.0, -0.12, 0.0)), shell(torso, (0.80, 0.42, 0.36), (0.0, 0.78, 0.05))]
    storage = torch.randperm(count, generator=rng)
    means, facing = (torch.cat(t)[storage] for t in zip(*parts, strict=True))
    facing = torch.nn.functional.normalize(facing + 0.15 * normal(count, 3), dim=1)
    kind, level = uniform(count), uniform(count)
    opacity = torch.where(kind < 0.5, 0.80 + 0.19 * level, torch.where(kind < 0.8, 0.30 + 0.50 * level, 0.02 + 0.28 * level))
    cameras = []
    for i in range(batch):
        yaw, pitch = 0.15 * math.sin(1.3 * i), 0.05 * math.sin(0.7 * i)
        cy, sy, cp, sp = math.cos(yaw), math.sin(yaw), math.cos(pitch), math.sin(pitch)
        view = torch.eye(4)
        view[:3, :3] = torch.tensor([[1, 0, 0], [0, cp, -sp], [0, sp, cp]]) @ torch.tensor([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
        view[2, 3] = DISTANCE
        cameras.append(view)
    phase = 0.7 * torch.arange(batch)[:, None]
    wave = torch.stack([(9 * means[:, 1] + phase).sin(), (7 * means[:, 0] + phase).cos(), (8 * means[:, 2] - phase).sin()], 2)
    focal = FOCAL * size / 512
    return dict(
        means=means + 0.01 * wave * (phase[..., None] > 0),
        quats=quaternions_to(facing, 2 * math.pi * uniform(count)).expand(batch, -1, -1).contiguous(),
        scales=(sigma_px * DISTANCE / FOCAL * torch.exp(0.5 * normal(count, 2))).expand(batch, -1, -1).contiguous(),
        opacities=opacity.expand(batch, -1).contiguous(),
        features=uniform(batch, count, channels),
        viewmats=torch.stack(cameras),
        Ks=torch.tensor([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1.0]])[None],
        width=size,
        height=size,
    )


def time_call(draw, scene: dict, aux: tuple[str, ...], repeats: int) -> tuple[float, float]:
    """Median milliseconds of forward (in training mode) and backward (gradients of every input)."""
    scene = {k: v.requires_grad_() if k in ("means", "quats", "scales", "opacities", "features") else v for k, v in scene.items()}
    forward, backward = [], []
    for i in range(repeats + 2):
        for name in ("means", "quats", "scales", "opacities", "features"):
            scene[name].grad = None
        start = time.perf_counter()
        out = draw(**scene, aux=aux)
        middle = time.perf_counter()
        maps = [out.features, *(getattr(out, name) for name in aux)]
        grads = [torch.full_like(m, 1 / m.numel()) for m in maps]
        before = time.perf_counter()
        torch.autograd.backward(maps, grads)
        end = time.perf_counter()
        if i >= 2:
            forward.append((middle - start) * 1e3)
            backward.append((end - before) * 1e3)
    return statistics.median(forward), statistics.median(backward)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="the acceptance row only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, kernels: {cpu_level()}")
    print(f"{'what':<22}{'size':>6}{'B':>4}{'surfels':>9}{'channels':>10}{'forward ms':>12}{'backward ms':>13}{'peak MiB':>10}")

    def row(what, draw, size, batch, count, channels, aux=(), repeats=args.repeats):
        scene = head_scene(count, batch, size, channels)
        base = peak_mib()
        forward, backward = time_call(draw, scene, aux, repeats)
        peak = max(peak_mib() - base, 0)  # of the process so far: only growth shows
        print(f"{what:<22}{size:>6}{batch:>4}{count:>9}{channels:>10}{forward:>12.1f}{backward:>13.1f}{peak:>10.0f}", flush=True)

    row("rasterizer", rasterize_surfels, 512, 1, 50_000, 7)
    if args.quick:
        return
    row("rasterizer", rasterize_surfels, 512, 1, 50_000, 3)
    row("rasterizer, aux maps", rasterize_surfels, 512, 1, 50_000, 7, ("depth", "normal", "median_depth", "distortion"))
    for channels in (3, 7, 8):
        row("rasterizer", rasterize_surfels, 256, 4, 15_000, channels, repeats=5)
    row("rasterizer", rasterize_surfels, 256, 8, 15_000, 7, repeats=3)
    row("rasterizer", rasterize_surfels, 48, 1, 2_000, 7)
    row("plain-torch reference", reference.rasterize_surfels, 48, 1, 2_000, 7, repeats=3)


if __name__ == "__main__":
    main()
