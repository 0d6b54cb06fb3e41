"""The rasterizer in plain torch, dense over surfels x pixels: the truth the tests compare with.

Written from the plane-intersection form (each pixel is the meeting of two planes with the surfel's, found with cross products) and
straight blending formulas, independently of the kernels' centre-relative homography and suffix sums. Autograd differentiates it.
It needs B N H W floats several times over: keep it to small images.
"""

import torch
from torch import Tensor

from .surfels import SurfelImages, check_arguments

MIN_ALPHA, MAX_ALPHA, MIN_TRANSMITTANCE = 1 / 255, 0.99, 1e-4


def rotation_matrices(quats: Tensor) -> Tensor:
    """(..., 4) wxyz, any length -> (..., 3, 3)."""
    w, x, y, z = torch.nn.functional.normalize(quats, dim=-1, eps=0).unbind(-1)
    rows = (
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    )  # fmt: skip
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def sh_colours(means: Tensor, sh: Tensor, viewmats: Tensor, degree: int) -> Tensor:
    """(B, N, 3) colours of SH coefficients seen from the cameras, offset by 1/2 and clamped at 0."""
    eye = -(viewmats[:, :3, :3].mT @ viewmats[:, :3, 3:]).mT
    x, y, z = torch.nn.functional.normalize(means - eye, dim=-1, eps=0).unbind(-1)
    basis = [torch.full_like(x, 0.28209479177387814)]
    if degree >= 1:
        basis += [-0.4886025119029199 * y, 0.4886025119029199 * z, -0.4886025119029199 * x]
    if degree >= 2:
        k, r2 = 1.0925484305920792, x * x + y * y + z * z
        basis += [k * x * y, -k * y * z, 0.31539156525252005 * (3 * z * z - r2), -k * x * z, k / 2 * (x * x - y * y)]
    if degree >= 3:
        basis += [
            -0.5900435899266435 * y * (3 * x * x - y * y), 2.890611442640554 * x * y * z,
            -0.4570457994644658 * y * (4 * z * z - x * x - y * y), 0.3731763325901154 * z * (2 * z * z - 3 * x * x - 3 * y * y),
            -0.4570457994644658 * x * (4 * z * z - x * x - y * y), 1.445305721320277 * z * (x * x - y * y),
            -0.5900435899266435 * x * (x * x - 3 * y * y),
        ]  # fmt: skip
    basis = torch.stack(basis, -1)[..., None]
    return ((basis * sh[:, :, : basis.shape[2]]).sum(2) + 0.5).clamp_min(0)


def _one_image(means, quats, scales, opacities, payload, viewmat, K, width, height, background, near, far, cutoff):
    """One image of one set of surfels (no batch dimension): (planes by name, radii (N,), T_u2/T_v2 leaves (N, 2))."""
    n, dtype, device = means.shape[0], means.dtype, means.device
    finite = torch.cat([t.detach().reshape(n, -1) for t in (means, quats, scales, opacities, payload)], 1).isfinite().all(1)
    R = rotation_matrices(torch.where(finite[:, None], quats, quats.new_tensor([1.0, 0, 0, 0])))
    means, scales, payload = (torch.where(finite[:, None], t, torch.ones_like(t)) for t in (means, scales, payload))
    opacities = torch.where(finite, opacities, torch.zeros_like(opacities))
    view_R, view_t = viewmat[:3, :3], viewmat[:3, 3]
    centre = means @ view_R.T + view_t
    axes = view_R @ R  # columns: tangents and normal in camera space
    H = torch.stack([axes[:, :, 0] * scales[:, :1], axes[:, :, 1] * scales[:, 1:], centre], -1)
    K = K * K.new_tensor([[1, 0, 1], [0, 1, 1], [0, 0, 1]])  # no skew
    T = K @ H  # (N, 3, 3): pixel (x, y, 1) times depth = T (u, v, 1)
    screen = T[:, :2, 2]  # kept apart so that its gradient can be read
    if screen.requires_grad:
        screen.retain_grad()
    Tu = torch.cat([T[:, 0, :2], screen[:, :1]], 1)
    Tv = torch.cat([T[:, 1, :2], screen[:, 1:]], 1)
    Tw = T[:, 2]

    # 3-sigma box: its centre is the low-pass centre, its half side the radius
    t = T.new_tensor([9.0, 9.0, -1.0])
    denominator = (t * Tw * Tw).sum(1, keepdim=True)
    f = t / denominator
    box = torch.stack([(f * Tu * Tw).sum(1), (f * Tv * Tw).sum(1)], 1)
    half2 = box**2 - torch.stack([(f * Tu * Tu).sum(1), (f * Tv * Tv).sum(1)], 1)
    radius = half2.amax(1).clamp_min(1e-4).sqrt().clamp(2.121318, 2**20).ceil()
    with torch.no_grad():
        edge = (axes[:, :, 2] * centre).sum(1)
        alive = finite & (centre[:, 2] > near) & (opacities > MIN_ALPHA) & (denominator[:, 0] != 0)
        alive &= (edge**2 > 1e-12 * (centre * centre).sum(1)) & (scales != 0).all(1)  # seen edge-on; without area
    order = torch.argsort(torch.where(alive, centre[:, 2], torch.inf).float(), stable=True)
    count = int(alive.sum())
    order = order[:count]

    rows, columns = (torch.arange(size, dtype=dtype, device=device) + 0.5 for size in (height, width))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    x, y = x.reshape(1, -1, 1), y.reshape(1, -1, 1)
    Tu, Tv, Tw, box_o, o = Tu[order, None], Tv[order, None], Tw[order, None], box[order, None], opacities[order, None]
    h = torch.linalg.cross(x * Tw - Tu, y * Tw - Tv)
    usable = h[..., 2] != 0
    hz = torch.where(usable, h[..., 2], torch.ones_like(h[..., 2]))
    u, v = h[..., 0] / hz, h[..., 1] / hz
    depth = u * Tw[..., 0] + v * Tw[..., 1] + Tw[..., 2]
    disc = 2 * ((x[..., 0] - box_o[..., 0]) ** 2 + (y[..., 0] - box_o[..., 1]) ** 2)
    plane = u * u + v * v
    rho = torch.where(plane <= disc, plane, disc)
    raw = o * torch.exp(-0.5 * rho)
    with torch.no_grad():
        seen = usable & (depth >= near) & (depth < 1e6 * Tw[..., 2]) & (raw >= MIN_ALPHA)
        if cutoff == "2dgs":  # 16x16 tiles touched by the square, in integer pixel coordinates
            corner = box_o[:, 0] - 0.5
            reach = radius[order, None]
            first, last = ((corner - reach) / 16).floor(), ((corner + reach + 15) / 16).floor() - 1
            tile = torch.stack([(x[..., 0] / 16).floor(), (y[..., 0] / 16).floor()], -1)
            seen &= ((tile >= first[:, None]) & (tile <= last[:, None])).all(-1)
            tiles = torch.tensor([-(-width // 16), -(-height // 16)], device=device)
            visible = ((last >= 0) & (first < tiles)).all(-1)
        else:
            visible = seen.any(1)  # the kernels may also count a surfel that just misses every pixel
        radii = torch.zeros(n, dtype=torch.int32, device=device)
        radii[order] = torch.where(visible, radius[order], radius.new_zeros(())).int()
    alpha = raw + (raw.clamp_max(MAX_ALPHA) - raw).detach()  # the clamp lets gradients through
    alpha = torch.where(seen, alpha, torch.zeros_like(alpha))
    with torch.no_grad():  # the surfel that would take T under 1e-4, and all behind it, are not blended
        blended = seen & (torch.cumprod(1 - alpha, 0) >= MIN_TRANSMITTANCE)
    alpha = torch.where(blended, alpha, torch.zeros_like(alpha))
    after = torch.cumprod(1 - alpha, 0)
    before = torch.cat([torch.ones_like(after[:1]), after[:-1]])
    weight = alpha * before
    final = after[-1] if count else torch.ones(height * width, dtype=dtype, device=device)

    images = {"features": payload[order].T @ weight, "alpha": (1 - final)[None]}
    if background is not None:
        images["features"] = images["features"] + background[:, None] * final
    depth = torch.where(blended, depth, torch.ones_like(depth))
    images["depth"] = (weight * depth).sum(0, keepdim=True)
    normals = axes[:, :, 2]
    normals = torch.where((normals * centre).sum(1, keepdim=True) > 0, -normals, normals)
    images["normal"] = normals[order].T @ weight
    index = torch.arange(1, count + 1, device=device)[:, None]
    median = (index * (blended & (before > 0.5))).amax(0) if count else torch.zeros(height * width, dtype=torch.long, device=device)
    images["median_depth"] = torch.where(
        median > 0, depth.gather(0, (median - 1).clamp_min(0)[None]) if count else final[None], final.new_zeros(1, 1)
    )
    m = far / (far - near) * (1 - near / depth)
    past = lambda q: torch.cumsum(q, 0) - q  # noqa: E731
    gap = m * m * past(weight) + past(weight * m * m) - 2 * m * past(weight * m)
    images["distortion"] = (weight * gap).sum(0, keepdim=True)
    return {name: t.reshape(-1, height, width) for name, t in images.items()}, radii, screen, centre[:, 2]


class ReferenceImages(SurfelImages):
    _leaves: list

    @property
    def screen_grad(self) -> Tensor | None:
        rows = []
        for screen, depth, size in self._leaves:
            if screen.grad is None:
                return None
            rows.append(screen.grad * depth.detach()[:, None] * 0.5 * screen.new_tensor(size))
        return torch.stack(rows)


def rasterize_surfels(
    means, quats, scales, opacities, features, viewmats, Ks, width, height,
    background=None, sh_degree=None, aux=(), near=0.2, far=100.0, cutoff="exact",
) -> ReferenceImages:  # fmt: skip
    """The same arguments and results as `diff_surfel_rasterization.rasterize_surfels`."""
    c = check_arguments(
        means, quats, scales, opacities, features, viewmats, Ks, width, height, background, sh_degree, aux, near, far, cutoff
    )
    payload = c.features
    if c.sh is not None:
        payload = sh_colours(c.means, c.sh, c.viewmats, sh_degree)
        if c.features is not None:
            size = max(payload.shape[0], c.features.shape[0])
            payload = torch.cat([payload.expand(size, -1, -1), c.features.expand(size, -1, -1)], 2)
    tensors = (c.means, c.quats, c.scales, c.opacities, payload, c.viewmats, c.Ks)
    results = []
    for b in range(c.batch):
        one = [t[b if t.shape[0] > 1 else 0] for t in tensors]
        back = None if c.background is None else c.background[b if c.background.shape[0] > 1 else 0]
        results.append(_one_image(*one, width, height, back, near, far, cutoff))
    planes = {name: torch.stack([r[0][name] for r in results]) for name in ("features", "alpha", *c.aux)}
    out = ReferenceImages(**planes, radii=torch.stack([r[1] for r in results]))
    out._leaves = [(r[2], r[3], (width, height)) for r in results]
    return out
