"""Small random scenes for the rasterizer's tests."""

import math

import torch
from diff_surfel_rasterization.reference import MIN_ALPHA, MIN_TRANSMITTANCE, rotation_matrices

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


def edge_on(arguments: dict, cosines=(0.003, 0.03), every=3, seed=0) -> dict:
    """Every so many surfels of a scene of one image turned until the camera sees them under such a cosine, from either side."""
    rng = torch.Generator().manual_seed(seed)
    view, quats, low, high = arguments["viewmats"][0], arguments["quats"].clone(), *cosines
    means = arguments["means"][0, ::every]
    sight = torch.nn.functional.normalize(means + view[:3, :3].T @ view[:3, 3], dim=1)
    across = torch.nn.functional.normalize(torch.linalg.cross(sight, torch.randn(sight.shape, generator=rng).to(sight)), dim=1)
    cosine = low * (high / low) ** torch.rand(len(sight), 1, generator=rng).to(sight)
    cosine[::2] *= -1
    x, y, z = (across * (1 - cosine**2).sqrt() + sight * cosine).T  # the normal: where the rotation takes the z axis
    half = math.pi * torch.rand(len(sight), generator=rng).to(sight)  # ... after a turn about it
    w, (c, s) = 1 + z, (half.cos(), half.sin())
    quats[0, ::every] = torch.stack([w * c, x * s - y * c, x * c + y * s, w * s], 1)
    return arguments | {"quats": quats}


def away_from_thresholds(arguments: dict, margin=1e-3, near=0.2, least_cosine=0.0) -> dict:
    """A scene of one image without the surfels that meet a threshold in some pixel, to within `margin`.

    Thresholds are what makes the image or its gradient jump: the least alpha, the plane's Gaussian against the disc, nearness, the
    horizon of the plane (where the rule of 10^6 depths cuts: no pixel may meet it beyond 100 times the centre's depth), the stop,
    the half transmittance of the median, and the order of equal depths. Surfels seen under less than `least_cosine` go as well.
    """
    a = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    view, K = a["viewmats"][0], a["Ks"][0]
    y, x = torch.meshgrid(*(torch.arange(a[n]).double() + 0.5 for n in ("height", "width")), indexing="ij")
    ray = torch.stack([(x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1], torch.ones_like(x)]).flatten(1)  # (3, pixels)
    keep = torch.argsort(a["means"][0] @ view[2, :3])  # front to back
    while True:
        p = a["means"][0, keep] @ view[:3, :3].T + view[:3, 3]
        axes, scales = view[:3, :3] @ rotation_matrices(a["quats"][0, keep]), a["scales"][0, keep]
        sight = (axes[:, :, 2] * p).sum(1, keepdim=True)
        w = axes[:, :, 2] @ ray / sight * p[:, 2:]  # z/depth
        along = torch.einsum("nck,cp->knp", axes[:, :, :2], ray) * (p[:, 2:] / w)
        u, v = ((along - torch.einsum("nck,nc->kn", axes[:, :, :2], p)[..., None]) / scales.T[..., None]).unbind()
        plane = u * u + v * v
        tangents = axes[:, :, :2] * scales[:, None]
        f = 9 * tangents[:, 2] ** 2
        box = (9 * (tangents[:, :2] * tangents[:, 2:]).sum(2) - p[:, :2] * p[:, 2:]) / (f.sum(1, keepdim=True) - p[:, 2:] ** 2)
        disc = 2 * ((K.diagonal()[:2, None, None] * (ray[:2, None] - box.T[..., None])) ** 2).sum(0)
        raw, close = a["opacities"][0, keep, None] * torch.exp(-torch.minimum(plane, disc) / 2), p[:, 2:] / w / near
        seen = (raw >= MIN_ALPHA) & (w > 1e-6) & (close >= 1)
        alpha = torch.where(seen, raw.clamp_max(0.99), 0)
        after = torch.cumprod(1 - alpha, 0)
        at = lambda value, threshold: (value / threshold - 1).abs() < margin  # noqa: E731
        visible = raw >= MIN_ALPHA * (1 - margin)
        meets = visible & ((w.abs() < 0.01) | at(close, 1) | at(raw, MIN_ALPHA) | (seen & at(plane, disc)))
        meets |= seen & (at(after, MIN_TRANSMITTANCE) | at(after, 0.5))
        meets = meets.any(1) | (sight[:, 0].abs() < least_cosine * p.norm(dim=1))
        meets[1:] |= p[1:, 2] - p[:-1, 2] < 1e-6 * p[1:, 2]
        if not meets.any():
            break
        keep = keep[~meets]
    keep = keep.sort().values  # a scene is stored in any order
    return arguments | {name: arguments[name][:, keep] for name in LEAVES[:5]}


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
