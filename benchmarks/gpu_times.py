"""The times of gpu_check.py: rasterizer, image loss, Adam and distCUDA2 on the GPU at hand, beside their goals and peers.

Medians between CUDA events, everything included (projection, lists, drawing; gradients of all inputs): launched from
Python, replayed as a graph, and the device's own time, that of the kernels.
"""

from __future__ import annotations

import statistics

import torch

INPUTS = ("means", "quats", "scales", "opacities", "features")
PEERS = {  # ms forward, backward, peak MiB at 70k surfels, 7 channels (H100, docs/rasterizer.md says how measured)
    16: "2DGS rasterizer 11.6 + 18.9 ms 575 MiB, gsplat 1.6 batched 3.4 + 7.7 ms 592 MiB; goal 0.9 + 1.2 ms 400 MiB",
    1: "2DGS rasterizer 1.06 + 1.20 ms 44 MiB, gsplat 1.6 1.09 + 1.05 ms 40 MiB; goal 0.15 + 0.22 ms",
}


def to(arguments: dict, device=None, dtype=None) -> dict:
    return {k: v.detach().to(device=device, dtype=dtype) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def head_parameters() -> list[dict]:
    """Of a head of 50k surfels and its network: groups with gradients and a learning rate on the GPU."""
    surfels = [[(50_000, *size)] for size in ((3,), (1, 3), (3, 3), (1,), (2,), (4,))]
    networks = [[(1, 32, 64 * k, 64 * k) for k in (1, 2)] * 3, [(64, 64), (128, 64), (640, 64), (64,), (22, 128)] * 8]
    groups = []
    for sizes in (*surfels, *networks):
        params = [torch.randn(size, device="cuda", requires_grad=True) for size in sizes]
        for p in params:
            p.grad = torch.randn_like(p)
        groups.append({"params": params, "lr": torch.full((), 1e-3, device="cuda")})
    return groups


def milliseconds(call, repeats: int = 30, before=lambda: None) -> float:
    times = []
    for i in range(repeats + 5):
        before()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if i >= 5:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def kernels(call, repeats: int = 10) -> dict[str, float]:
    """Microseconds of device time a call, by kernel, longest first."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    events = sorted(recorded.key_averages(), key=lambda e: -e.device_time_total)
    return {e.key: e.device_time_total / repeats for e in events if e.device_time_total}


def time_scene(batch: int, count: int, channels: int, aux=(), sigma: float = 1.5, profile: bool = False) -> None:
    from diff_surfel_rasterization import rasterize_surfels
    from rasterizer import head_scene

    scene = to(head_scene(count, batch, 512, channels, sigma), "cuda")
    scene = {k: v.requires_grad_() if k in INPUTS else v for k, v in scene.items()}
    state = {}

    def forward():
        state["out"] = rasterize_surfels(**scene, aux=aux)

    def backward():
        maps = [state["out"].features, *(getattr(state["out"], name) for name in aux)]
        torch.autograd.backward(maps, [state[m.shape] for m in maps])

    def prepare():
        for name in INPUTS:
            scene[name].grad = None

    forward()
    for m in [state["out"].features, *(getattr(state["out"], name) for name in aux)]:
        state[m.shape] = torch.randn_like(m) / m.numel()
    forward_ms = milliseconds(forward)
    backward_ms = milliseconds(backward, before=lambda: (prepare(), forward()))
    state.pop("out")
    prepare()
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    forward()
    backward()
    peak = (torch.cuda.max_memory_allocated() - base) / 2**20
    with torch.no_grad():
        inference_ms = milliseconds(lambda: rasterize_surfels(**scene, aux=aux))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            rasterize_surfels(**scene, aux=aux)
        replay_ms = milliseconds(graph.replay)
    what = f"B={batch:<3} {count // 1000:>4}k {channels:>2} channels, {len(aux)} aux, sigma {sigma}"
    timed = f"forward {forward_ms:6.3f}  backward {backward_ms:6.3f}  inference {inference_ms:6.3f}  graph {replay_ms:6.3f} ms"
    print(f"{what}: {timed}  peak {peak:5.0f} MiB", flush=True)
    if profile:
        first, both = kernels(forward), kernels(lambda: (prepare(), forward(), backward()))
        once, twice = (sum(times.values()) / 1000 for times in (first, both))
        print(f"      kernels: forward {once:.3f}  backward {twice - once:.3f} ms")
        for name, us in both.items():
            print(f"      {us:9.1f} us {name[:90]}")


def time_loss() -> None:
    """SSIM + L1 of 16 pictures, each kernel chain as a replayed CUDA graph, and plain torch called eagerly."""
    from diff_surfel_rasterization import image_loss, ssim_l1
    from test_rasterizer_loss import plain

    target, weight = torch.rand(16, 3, 512, 512, device="cuda"), torch.rand(16, 1, 512, 512, device="cuda")
    image = (target + 0.1 * torch.randn_like(target)).requires_grad_()
    g_ssim, g_l1 = torch.full((16,), -1 / 16, device="cuda"), torch.full((16, 1), 1 / 16, device="cuda")
    _, _, state = image_loss.forward_op(image.detach(), target, weight, True)
    calls = {
        "forward for training": lambda: image_loss.forward_op(image.detach(), target, weight, True),
        "forward alone": lambda: image_loss.forward_op(image.detach(), target, weight, False),
        "backward": lambda: image_loss.backward_op(g_ssim, g_l1, image.detach(), target, weight, state),
    }
    for name, call in calls.items():
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            call()
        print(f"ssim_l1, 16 x 3 x 512 x 512, {name}: {milliseconds(graph.replay):.3f} ms (goal: training's two 0.35)")

    def step(function):
        image.grad = None
        similarity, l1 = function(image, target, weight)
        (l1.mean() - similarity.mean()).backward()

    for name, function in (("ssim_l1", ssim_l1), ("plain torch", plain)):
        print(f"{name}, forward and backward through autograd: {milliseconds(lambda f=function: step(f), 10):.3f} ms")


def time_adam() -> None:
    """A step over the parameters of a head of 50k surfels, as a replayed graph."""
    from diff_surfel_rasterization import Adam

    for name, kind in (("Adam", Adam), ("torch.optim.Adam", lambda g: torch.optim.Adam(g, eps=1e-15, fused=True, capturable=True))):
        groups = head_parameters()
        numbers = sum(p.numel() for group in groups for p in group["params"])
        optimizer = kind(groups)
        optimizer.step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        print(f"{name}, {numbers / 1e6:.1f} million numbers in {len(groups)} groups: {milliseconds(graph.replay):.3f} ms")


def times() -> None:
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    a, b = torch.empty(2**30, dtype=torch.uint8, device="cuda"), torch.empty(2**30, dtype=torch.uint8, device="cuda")
    print(f"copy {2 * 2**30 / milliseconds(lambda b=b, a=a: b.copy_(a)) / 1e9:.2f} TB/s")
    del a, b
    aux = ("depth", "normal", "median_depth", "distortion")
    for batch in (16, 1):
        print(f"-- batch {batch}. For comparison: {PEERS[batch]}")
        time_scene(batch, 70_000, 7, profile=True)
        time_scene(batch, 70_000, 7, sigma=3.0)
        time_scene(batch, 50_000, 7)
        time_scene(batch, 50_000, 3)
        time_scene(batch, 70_000, 7, aux)
    time_loss()
    time_adam()
    from simple_knn import distCUDA2

    points = torch.randn(1_000_000, 3, device="cuda")
    print(f"distCUDA2, 1 million points: {milliseconds(lambda: distCUDA2(points), 10):.2f} ms")
