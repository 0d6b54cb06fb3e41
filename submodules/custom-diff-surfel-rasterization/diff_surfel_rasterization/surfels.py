"""`rasterize_surfels`: the public function. Checks, casts, evaluates SH, calls the op."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops


@dataclass
class SurfelImages:
    """What `rasterize_surfels` returns; aux maps that were not asked for are None.

    features (B, F, H, W), uint8 with `as_bytes`; alpha (B, 1, H, W); depth, median_depth, distortion (B, 1, H, W); normal
    (B, 3, H, W), camera space; radii (B, N) int32, 3-sigma radius in pixels, 0 for surfels that touch no pixel.
    """

    features: Tensor
    alpha: Tensor
    radii: Tensor
    depth: Tensor | None = None
    normal: Tensor | None = None
    median_depth: Tensor | None = None
    distortion: Tensor | None = None
    _screen: Tensor | None = None

    @property
    def screen_grad(self) -> Tensor | None:
        """(B, N, 2) after `backward()`, else None: (dL/dT_u2, dL/dT_v2) depth (W, H)/2, the densification signal of 2DGS,
        T being each surfel's world-to-pixel homography. Filled by `backward()`; None after `torch.autograd.grad` or under
        `torch.compile`."""
        return None if self._screen is None else self._screen.grad


def _check(name: str, t, shape: Sequence[int | None], text: str) -> None:
    """Raises ValueError unless t is a tensor of that shape (None: any size)."""
    if not isinstance(t, Tensor):
        raise ValueError(f"{name} must be a tensor of shape {text}, got {type(t).__name__}")
    if t.dim() != len(shape) or any(want is not None and size != want for size, want in zip(t.shape, shape, strict=True)):
        raise ValueError(f"{name} must have shape {text}, got {tuple(t.shape)}")
    if not t.is_floating_point():
        raise ValueError(f"{name} must hold floating-point numbers, got {t.dtype}")


@dataclass
class SurfelCall:
    """The checked arguments of one call, cast to one dtype; shared by `rasterize_surfels` and the reference."""

    means: Tensor
    quats: Tensor
    scales: Tensor
    opacities: Tensor
    sh: Tensor | None
    features: Tensor | None
    viewmats: Tensor
    Ks: Tensor
    background: Tensor | None
    batch: int
    width: int
    height: int
    sh_degree: int | None
    aux: tuple[str, ...]
    near: float
    far: float
    cutoff: str


def check_arguments(
    means, quats, scales, opacities, features, viewmats, Ks, width, height, background, sh_degree, aux, near, far, cutoff
) -> SurfelCall:
    """Raises ValueError, naming the argument and its expected shape, or returns the arguments ready for use."""
    _check("means", means, (None, None, 3), "(B or 1, N, 3)")
    n = means.shape[1]
    _check("quats", quats, (None, n, 4), f"(B or 1, {n}, 4)")
    _check("scales", scales, (None, n, 2), f"(B or 1, {n}, 2)")
    _check("opacities", opacities, (None, n), f"(B or 1, {n})")
    _check("viewmats", viewmats, (None, 4, 4), "(B, 4, 4)")
    _check("Ks", Ks, (None, 3, 3), "(B, 3, 3)")
    for name, t in (("viewmats", viewmats), ("Ks", Ks)):
        if t.requires_grad:
            raise ValueError(f"{name} has requires_grad, but the rasterizer computes no gradient for cameras: pass {name}.detach()")

    sh = None
    if sh_degree is not None:
        if sh_degree not in (0, 1, 2, 3):
            raise ValueError(f"sh_degree must be 0, 1, 2, 3 or None, got {sh_degree!r}")
        sh, features = features if isinstance(features, (tuple, list)) else (features, None)
        _check("features (SH coefficients, since sh_degree is given)", sh, (None, n, None, 3), f"(B or 1, {n}, K, 3)")
        if sh.shape[2] < (sh_degree + 1) ** 2:
            raise ValueError(
                f"sh_degree {sh_degree} needs {(sh_degree + 1) ** 2} SH coefficients a channel, features has {sh.shape[2]}"
            )
    elif isinstance(features, (tuple, list)):
        raise ValueError("features is a pair (SH, extra features), which needs sh_degree")
    if features is not None or sh is None:
        _check("features", features, (None, n, None), f"(B or 1, {n}, F)")
        if features.shape[2] == 0 and sh is None:
            raise ValueError(f"features must have at least one channel, got shape {tuple(features.shape)}")

    channels = (3 if sh is not None else 0) + (features.shape[2] if features is not None else 0)
    if background is not None:
        if isinstance(background, Tensor) and background.dim() == 1:
            background = background[None]
        _check("background", background, (None, channels), f"({channels},) or (B, {channels})")

    batched = dict(
        means=means, quats=quats, scales=scales, opacities=opacities, sh=sh, features=features, viewmats=viewmats, Ks=Ks,
        background=background,
    )  # fmt: skip
    batched = {name: t for name, t in batched.items() if t is not None}
    if any(t.shape[0] == 0 for t in batched.values()):
        raise ValueError("the batch is empty: every argument needs a leading size of at least 1")
    batch = ops.batch_size(*batched.values())
    for name, t in batched.items():
        if t.shape[0] != 1 and t.shape[0] != batch:
            raise ValueError(f"{name} has leading size {t.shape[0]}, but the batch is {batch} (or 1, to be shared by all images)")
        if t.device != means.device:
            raise ValueError(f"{name} is on {t.device}, means on {means.device}")

    for name, value in (("width", width), ("height", height)):
        if isinstance(value, bool) or int(value) != value or value < 1:
            raise ValueError(f"{name} must be a positive whole number of pixels, got {value!r}")
    if not 0 < near < far:
        raise ValueError(f"near and far must satisfy 0 < near < far, got {near!r} and {far!r}")
    if cutoff not in ("exact", "2dgs"):
        raise ValueError(f'cutoff must be "exact" or "2dgs", got {cutoff!r}')
    aux = (aux,) if isinstance(aux, str) else tuple(aux)
    for name in aux:
        if name not in ops.AUX_NAMES:
            raise ValueError(f"aux may hold {', '.join(ops.AUX_NAMES)}; got {name!r}")

    dtype = torch.float64 if means.dtype == torch.float64 else torch.float32
    cast = {name: t.to(dtype) for name, t in batched.items()}
    optional = {name: cast.get(name) for name in ("sh", "features", "background")}
    view = dict(width=int(width), height=int(height), sh_degree=sh_degree, near=float(near), far=float(far), cutoff=cutoff)
    return SurfelCall(**{**cast, **optional}, batch=batch, aux=aux, **view)


def draw(c: SurfelCall, screen: Tensor | None, as_bytes: bool = False) -> SurfelImages:
    """Runs the op. `screen` (B, N, 2): its values are not used; its gradient is the densification signal (see `screen_grad`)."""
    payload = c.features
    if c.sh is not None:
        payload = ops.sh_op(c.means, c.sh, c.viewmats, c.sh_degree)
        if c.features is not None:
            parts = (payload, c.features)
            payload = torch.cat([t.expand(ops.batch_size(*parts), -1, -1) for t in parts], dim=2)
    inputs = (c.means, c.quats, c.scales, c.opacities, payload, c.viewmats, c.Ks, c.background)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*inputs, screen))
    if save and as_bytes:
        raise ValueError("as_bytes is for drawing without gradients: call it under torch.no_grad() or with detached inputs")
    if save and screen is None and not torch.compiler.is_compiling():  # a compiled graph cannot hand out a new leaf
        screen = c.means.new_zeros(c.batch, c.means.shape[1], 2).requires_grad_()
    *images, _state = ops.forward_op(*inputs, screen, c.width, c.height, c.near, c.far, c.cutoff, ",".join(c.aux), as_bytes, save)
    named = dict(zip(("features", "alpha", *ops.AUX_NAMES, "radii"), images, strict=True))
    named.update({name: None for name in ops.AUX_NAMES if name not in c.aux})
    return SurfelImages(**named, _screen=screen)


def rasterize_surfels(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    features: Tensor | tuple[Tensor, Tensor | None],
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    background: Tensor | None = None,
    sh_degree: int | None = None,
    aux: Sequence[str] = (),
    near: float = 0.2,
    far: float = 100.0,
    cutoff: str = "exact",
    as_bytes: bool = False,
) -> SurfelImages:
    """Draws B images of N surfels: every channel of the payload, and the aux maps, in one pass; differentiable.

    means (B or 1, N, 3) world; quats (.., 4) wxyz, normalised inside; scales (.., 2), standard deviations along the first two
    columns of the rotation; opacities (.., N) in [0, 1]; features (B or 1, N, F), or with `sh_degree` SH coefficients
    (B or 1, N, K, 3), or a pair (SH, extra features): SH colour first, then the extras. viewmats (B, 4, 4) world to camera (rigid,
    OpenCV axes, column vectors), Ks (B, 3, 3) (skew is ignored): pixel (i, j) is sampled at (j + 0.5, i + 0.5). background (F,),
    (B, F) or None for zeros. aux: any of "depth" (sum of weight times depth), "normal" (camera space, facing the camera),
    "median_depth", "distortion". `near` culls centres and single intersections; `far` only scales the distortion.
    cutoff: "exact" blends a surfel wherever its alpha reaches 1/255; "2dgs" only in the 16x16 tiles that its 3-sigma square
    touches, as the 2DGS rasterizer does. as_bytes: features come as uint8, 255 for 1, rounded and clamped, for drawing without
    gradients. A leading size of 1 is shared by all images, its gradient summed.

    Work is done in float64 when `means` is float64, else in float32 (float16 and bfloat16 are cast); images have that dtype.
    Surfels with a NaN or infinity in any input are left out. Gradients flow to everything but cameras. ValueError names the
    argument that is wrong. Mathematics: docs/rasterizer.md.
    """
    c = check_arguments(
        means, quats, scales, opacities, features, viewmats, Ks, width, height, background, sh_degree, aux, near, far, cutoff
    )
    return draw(c, None, as_bytes)
