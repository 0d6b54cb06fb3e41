"""Builds the CUDA rasterizer, checks it against the float64 reference and the CPU, and times it: one command, with a GPU.

    python benchmarks/gpu_check.py [--no-build] [--skip-checks] [--skip-times] [--sanitizer]

Needs torch with CUDA, and nvcc for the build (into build/gpu_check, nothing is installed). Exit code 1 when a check fails.
gpu_times.py says how times are taken.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from gpu_times import INPUTS, head_parameters, times, to

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "gpu_check"


def build() -> None:
    """Both packages, compiled for the GPU at hand."""
    major, minor = torch.cuda.get_device_capability()
    environment = os.environ | {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "SURFEL_BUILD_CUDA": "1"}
    shutil.rmtree(BUILD, ignore_errors=True)
    for name in ("custom-diff-surfel-rasterization", "simple-knn"):
        start = time.time()
        source = BUILD / "source" / name
        shutil.copytree(ROOT / "submodules" / name, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
        if not (source / "setup.py").is_file():
            (source / "setup.py").write_text("from setuptools import setup\nsetup()\n")
        command = [sys.executable, "setup.py", "-q", "build", "--build-lib", BUILD / "site"]
        subprocess.run(command, cwd=source, env=environment, check=True)
        print(f"built {name} in {time.time() - start:.0f} s", flush=True)


class Checks:
    """Runs checks, prints a row each, counts the failures."""

    def __init__(self):
        self.failures = 0

    def row(self, name: str, good: bool, detail: str = "") -> None:
        self.failures += not good
        print(f"{'ok  ' if good else 'FAIL'} {name:<78} {detail}", flush=True)

    def below(self, name: str, value: float, limit: float) -> None:
        self.row(name, value < limit, f"{value:.1e} < {limit:.0e}")


def check_against_reference(check: Checks) -> None:
    from diff_surfel_rasterization import rasterize_surfels, reference
    from rasterizer_scenes import AUX, LEAVES, leaves, maps, random_loss, relative_error, scene

    def compare(name, arguments, dtype=torch.float32, aux=AUX, limit=1e-4, gradient_limit=1e-4, draw=rasterize_surfels, **options):
        given = leaves(to(arguments, "cuda", dtype))
        truth = leaves(to(given, "cuda", torch.float64))  # of the same numbers: rounding the inputs is no error of the kernels
        want, got = reference.rasterize_surfels(**truth, aux=aux, **options), draw(**given, aux=aux, **options)
        for out in (want, got):
            random_loss(maps(out, aux)).backward()
        images = {k: relative_error(v.detach(), maps(want, aux)[k].detach()) for k, v in maps(got, aux).items()}
        gradients = {k: relative_error(given[k].grad, truth[k].grad) for k in LEAVES}
        gradients["screen"] = relative_error(got.screen_grad, want.screen_grad)
        check.below(f"{name}: images ({max(images, key=images.get)})", max(images.values()), limit)
        check.below(f"{name}: gradients ({max(gradients, key=gradients.get)})", max(gradients.values()), gradient_limit)

    for channels, aux in ((3, ()), (4, AUX), (7, ()), (7, AUX), (8, ()), (8, AUX), (1, AUX), (20, AUX)):
        for cutoff in ("exact", "2dgs"):
            arguments = scene(channels=channels, batch=2, count=60)
            compare(f"{channels} channels, {len(aux)} aux maps, {cutoff}, float32", arguments, aux=aux, cutoff=cutoff)
    compare("float64", scene(channels=7, batch=2, count=60), torch.float64, limit=1e-9, gradient_limit=1e-8)
    for width, height in ((1, 1), (16, 16), (17, 15), (64, 3), (5, 70), (131, 77)):
        arguments = scene(count=30, width=width, height=height) | dict(Ks=scene(width=24, height=20)["Ks"])
        arguments["Ks"][0, 0, 2], arguments["Ks"][0, 1, 2] = width / 2, height / 2
        compare(f"size {width} x {height}, float64", arguments, torch.float64, limit=1e-9, gradient_limit=1e-7)
    shared = scene(batch=3, channels=7)
    for name in INPUTS:
        compare(f"{name} shared by the batch", shared | {name: shared[name][:1]}, torch.float64, limit=1e-9, gradient_limit=1e-8)
    for name, scales in (("sub-pixel", (1e-5, 1e-3)), ("screen-filling", (1.0, 3.0))):
        compare(f"{name} surfels, float64", scene(scales=scales, top_opacity=0.5), torch.float64, limit=1e-9, gradient_limit=1e-6)
    hard = scene(count=200, channels=3, seed=11)
    hard["means"] = hard["means"] * torch.tensor([3.0, 3.0, 8.0], dtype=torch.float64)  # behind the camera, outside the image
    kind = torch.arange(200) % 3
    hard["opacities"] = torch.where(kind == 0, 0.0, torch.where(kind == 1, 1.0, hard["opacities"]))
    compare("behind the camera, outside, opacity 0 and 1, float64", hard, torch.float64, limit=1e-9, gradient_limit=1e-7)
    for count in (1, 500, 600, 5000):
        arguments = scene(count=count, channels=3, width=16, height=16, scales=(0.1, 0.5), top_opacity=0.05 if count > 1 else 1.0)
        compare(f"{count} surfels over four tiles, float64", arguments, torch.float64, limit=1e-8, gradient_limit=1e-6)


def check_properties(check: Checks) -> None:
    from diff_surfel_rasterization import rasterize_surfels
    from rasterizer import head_scene
    from rasterizer_scenes import AUX, leaves, maps, random_loss, relative_error, scene

    small = to(scene(channels=7, batch=2, count=80), "cuda", torch.float32)
    big = to(head_scene(20_000, 2, 256, 7), "cuda")
    names = INPUTS

    def step(arguments, aux=()):
        given = leaves(arguments, names)
        out = rasterize_surfels(**given, aux=aux)
        random_loss(maps(out, aux)).backward()
        return maps(out, aux), {k: given[k].grad for k in names}

    on_gpu, on_cpu, exact = step(big), step(to(big, "cpu")), step(to(big, "cpu", torch.float64))
    error = {"image": [relative_error(out[0]["features"].cpu(), exact[0]["features"]) for out in (on_gpu, on_cpu)]}
    error |= {f"gradient of {k}": [relative_error(out[1][k].cpu(), exact[1][k]) for out in (on_gpu, on_cpu)] for k in names}
    for name, (cuda, cpu) in error.items():
        detail = f"{cuda:.1e} (CPU {cpu:.1e})"
        check.row(f"20k surfels at 256, {name}: as near to float64 as the CPU's", cuda < max(2 * cpu, 1e-5), detail)
    again = step(big)
    check.row("two runs give the same image bit for bit", all(torch.equal(again[0][k], on_gpu[0][k]) for k in again[0]))
    with torch.no_grad():
        image = rasterize_surfels(**big).features
        check.row("inference gives the same image bit for bit", torch.equal(image, on_gpu[0]["features"]))
        as_bytes = rasterize_surfels(**big, as_bytes=True).features
        check.row("the image as bytes is its rounding", torch.equal(as_bytes, (image * 255 + 0.5).clamp(0, 255).byte()))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = step(big)
    stream.synchronize()
    check.row("another stream gives the same image", torch.equal(on_stream[0]["features"], on_gpu[0]["features"]))

    graph, static = torch.cuda.CUDAGraph(), to(big, "cuda")
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = rasterize_surfels(**static).features
    static["means"].add_(0.02)
    graph.replay()
    torch.cuda.synchronize()
    with torch.no_grad():
        check.row("a CUDA graph replays with new inputs", torch.equal(captured, rasterize_surfels(**static).features))

    nothing = {k: v[:, :0] if k in names else v for k, v in small.items()}
    out = rasterize_surfels(**leaves(nothing, names))
    check.row("no surfels: the background", bool((out.features == small["background"][None, :, None, None]).all()))
    for value in (float("nan"), float("inf")):
        spoiled = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in small.items()}
        for i, name in enumerate(names):
            spoiled[name][:, i] = value
        images, gradients = step(spoiled, AUX)
        finite = all(t.isfinite().all() for t in (*images.values(), *gradients.values()))
        check.row(f"surfels holding {value} spread nothing", finite)
    for dtype in (torch.float16, torch.bfloat16):
        images, gradients = step({k: v.to(dtype) if k in names else v for k, v in small.items()})
        check.row(f"{dtype} inputs", all(t.isfinite().all() for t in (*images.values(), *gradients.values())))
    swapped = {k: v.transpose(1, 2).contiguous().transpose(1, 2) if k in ("means", "features") else v for k, v in small.items()}
    check.row("non-contiguous inputs", torch.equal(step(swapped)[0]["features"], step(small)[0]["features"]))

    from diff_surfel_rasterization import ops
    from test_rasterizer_interface import op_arguments

    given = leaves(to(scene(count=9, batch=2, width=20, height=12), "cuda", torch.float32))
    arguments = op_arguments(given, True)
    arguments = [t.detach().cuda().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t for t in arguments]
    for test in ("test_schema", "test_autograd_registration", "test_faketensor"):
        result = torch.library.opcheck(ops.forward_op, arguments, test_utils=test, raise_exception=False)
        check.row(f"torch.library.opcheck {test}", result[test] == "SUCCESS", str(result[test])[:90])

    with torch.no_grad():
        million = to(head_scene(1_000_000, 1, 512, 3), "cuda")
        image = rasterize_surfels(**million).features
        check.row("1 million surfels", bool(image.isfinite().all()) and float(image.max()) > 0.1)
        wide = to(head_scene(2_000, 40, 2048, 4), "cuda")  # 2.7 GB of output
        image = rasterize_surfels(**wide).features
        alone = {k: v[-1:] if isinstance(v, torch.Tensor) else v for k, v in wide.items()}
        last = rasterize_surfels(**alone).features
        size = image.numel() * 4 / 2**30
        check.row(f"{size:.1f} GiB of output: the last image equals its own call", torch.equal(image[-1:], last))


def check_knn(check: Checks) -> None:
    from simple_knn import distCUDA2

    for count in (4, 33, 1000, 200_000):
        points = torch.randn(count, 3, generator=torch.Generator().manual_seed(count))
        got, want = distCUDA2(points.cuda()).cpu(), distCUDA2(points)
        check.below(f"distCUDA2, {count} points against the k-d tree", float(((got - want).abs() / want).max()), 1e-5)


def check_loss(check: Checks) -> None:
    from diff_surfel_rasterization import ssim_l1
    from rasterizer_scenes import relative_error
    from test_rasterizer_loss import pictures, plain

    for height, width in ((11, 11), (32, 32), (45, 70), (260, 137)):
        for dtype, limit in ((torch.float32, 2e-5), (torch.float64, 1e-6)):
            image, target, weight = (t.cuda() for t in pictures(height=height, width=width, dtype=dtype))
            leaf, truth = image.clone().requires_grad_(), image.double().requires_grad_()
            got, want = ssim_l1(leaf, target, weight), plain(truth, target.double(), weight.double())
            for out in (got, want):
                (out[0].sum() + (out[1] * torch.tensor([1.0, 3.0], device="cuda")).sum()).backward()
            error = max(relative_error(a, b) for a, b in zip((*got, leaf.grad), (*want, truth.grad), strict=True))
            check.below(f"ssim_l1 {height} x {width}, {dtype}: values and gradient", error, limit)
            again = ssim_l1(leaf, target, weight)
            check.row("   twice the same bit for bit", all(torch.equal(a, b) for a, b in zip(got, again, strict=True)))


def check_adam(check: Checks) -> None:
    from diff_surfel_rasterization import Adam

    torch.manual_seed(0)
    groups = head_parameters()
    copies = [group | {"params": [p.detach().clone().requires_grad_() for p in group["params"]]} for group in groups]
    one, other = Adam(groups), torch.optim.Adam(copies, eps=1e-15, fused=True, capturable=True)
    pairs = [pair for a, b in zip(groups, copies, strict=True) for pair in zip(a["params"], b["params"], strict=True)]
    for _ in range(20):
        for a, b in pairs:
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        one.step()
        other.step()
    check.below("Adam, 20 steps: as torch's", max(float((a - b).detach().abs().max()) for a, b in pairs), 2e-6)
    one.found_inf = torch.ones((), device="cuda")
    before = [a.detach().clone() for a, _ in pairs]
    one.step()
    check.row("Adam, a step to be skipped changes nothing", all(torch.equal(a, b) for (a, _), b in zip(pairs, before, strict=True)))


def sanitize(check: Checks) -> None:
    tool = shutil.which("compute-sanitizer")
    if not tool:
        print("compute-sanitizer is not installed: skipped")
        return
    for kind in ("memcheck", "racecheck", "initcheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, __file__, "--no-build", "--sanitized"]
        done = subprocess.run(command, capture_output=True, text=True)
        summary = (done.stdout + done.stderr)[-300:].replace("\n", " | ")
        check.row(f"compute-sanitizer {kind}", done.returncode == 0, summary)


def small_suite() -> None:
    from diff_surfel_rasterization import Adam, rasterize_surfels, ssim_l1
    from rasterizer_scenes import AUX, leaves, maps, random_loss, scene
    from test_rasterizer_loss import pictures

    for channels, aux, count in ((7, (), 60), (4, AUX, 60), (3, AUX, 700)):
        given = leaves(to(scene(channels=channels, batch=2, count=count), "cuda", torch.float32))
        random_loss(maps(rasterize_surfels(**given, aux=aux), aux)).backward()
    for dtype in (torch.float32, torch.float64):
        image, target, weight = (t.cuda() for t in pictures(dtype=dtype))
        ssim_l1(image, target, weight)
        sum(out.sum() for out in ssim_l1(image.requires_grad_(), target, weight)).backward()
    Adam(head_parameters()).step()
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-build", action="store_true", help="use what an earlier run built")
    parser.add_argument("--skip-checks", action="store_true")
    parser.add_argument("--skip-times", action="store_true")
    parser.add_argument("--sanitizer", action="store_true", help="also run a small suite under compute-sanitizer")
    parser.add_argument("--sanitized", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_check needs a GPU that torch can use; tests/test_rasterizer_cuda.py checks the kernels without one")
    if not args.no_build:
        build()
    sys.path[:0] = [str(BUILD / "site"), str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
    if args.sanitized:
        small_suite()
        return
    check = Checks()
    if not args.skip_checks:
        for part in (check_against_reference, check_properties, check_loss, check_adam, check_knn):
            part(check)
        print(f"{check.failures} failures" if check.failures else "all checks passed", flush=True)
    if args.sanitizer:
        sanitize(check)
    if not args.skip_times:
        times()
    sys.exit(bool(check.failures))


if __name__ == "__main__":
    main()
