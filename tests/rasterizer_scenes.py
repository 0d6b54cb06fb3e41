"""Small random scenes for the rasterizer's tests."""

import math

import torch

AUX = ("depth", "normal", "median_depth", "distortion")
LEAVES = ("means", "quats", "scales", "opacities", "features", "background")


def scene(count=40, batch=1, channels=4, width=37, height=29, seed=0, dtype=torch.float64, scales=(0.02, 0.35), top_opacity=1.0):
    """Arguments of rasterize_surfels: surfels of all orientations before turned cameras with an off-centre principal point.

    Scales reach from below a pixel (where the low-pass disc wins) to a quarter of the image, opacities from 0 to `top_opacity`.
    """
    rng = torch.Generator().manual_seed(seed)
    rand = lambda *n: torch.rand(*n, generator=rng, dtype=torch.float64)  # noqa: E731
    views, Ks = [], []
    for b in range(batch):
        c, s = math.cos(0.2 + 0.1 * b), math.sin(0.2 + 0.1 * b)
        views.append([[c, 0, s, 0.05 * b], [0, 1, 0, -0.03], [-s, 0, c, 4.0], [0, 0, 0, 1]])
        Ks.append([[2.0 * width, 0, width / 2 + 1.3], [0, 1.9 * width, height / 2 - 0.7], [0, 0, 1]])
    low, high = scales
    tensors = dict(
        means=(rand(batch, count, 3) - 0.5) * torch.tensor([2.0, 1.6, 1.5], dtype=torch.float64),
        quats=torch.randn(batch, count, 4, generator=rng, dtype=torch.float64),
        scales=low * (high / low) ** rand(batch, count, 2),
        opacities=rand(batch, count) * top_opacity,
        features=rand(batch, count, channels),
        background=rand(channels),
        viewmats=torch.tensor(views, dtype=torch.float64),
        Ks=torch.tensor(Ks, dtype=torch.float64),
    )
    return {name: t.to(dtype) for name, t in tensors.items()} | dict(width=width, height=height)


def leaves(arguments: dict, names=LEAVES) -> dict:
    """A copy whose named tensors want gradients."""
    copy = {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    for name in names:
        copy[name].requires_grad_()
    return copy


def maps(out, aux=()):
    return {"features": out.features, "alpha": out.alpha} | {name: getattr(out, name) for name in aux}


def random_loss(images: dict, seed=1):
    """A fixed random linear function of every pixel of every map."""
    rng = torch.Generator().manual_seed(seed)
    return sum((m * torch.randn(m.shape, generator=rng, dtype=torch.float64).to(m)).sum() for m in images.values())


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))
