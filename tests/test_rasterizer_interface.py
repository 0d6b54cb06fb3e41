"""The rasterizer's interface: arguments and their errors, dtypes, inference, torch.library, the 2DGS call interface."""

import pytest
import torch
from diff_surfel_rasterization import GaussianRasterizationSettings, GaussianRasterizer, ops, rasterize_surfels, reference
from rasterizer_scenes import AUX, LEAVES, leaves, maps, random_loss, relative_error, scene


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(means=torch.zeros(40, 3)), r"means must have shape \(B or 1, N, 3\), got \(40, 3\)"),
        (dict(quats=torch.zeros(1, 39, 4)), r"quats must have shape \(B or 1, 40, 4\), got \(1, 39, 4\)"),
        (dict(scales=torch.zeros(1, 40, 3)), r"scales must have shape \(B or 1, 40, 2\)"),
        (dict(opacities=torch.zeros(1, 40, 1)), r"opacities must have shape \(B or 1, 40\)"),
        (dict(features=torch.zeros(40, 3)), r"features must have shape \(B or 1, 40, F\)"),
        (dict(features=torch.zeros(1, 40, 0)), "features must have at least one channel"),
        (dict(features=(torch.zeros(1, 40, 1, 3), None)), "needs sh_degree"),
        (dict(sh_degree=2, features=torch.zeros(1, 40, 4, 3)), "sh_degree 2 needs 9 SH coefficients"),
        (dict(sh_degree=4, features=torch.zeros(1, 40, 25, 3)), "sh_degree must be 0, 1, 2, 3 or None"),
        (dict(viewmats=torch.eye(4)), r"viewmats must have shape \(B, 4, 4\)"),
        (dict(viewmats=torch.eye(4)[None].requires_grad_()), "viewmats has requires_grad"),
        (dict(Ks=torch.eye(3)[None].requires_grad_()), "Ks has requires_grad"),
        (dict(Ks=torch.eye(4)[None]), r"Ks must have shape \(B, 3, 3\)"),
        (dict(Ks=torch.eye(3).expand(3, 3, 3), viewmats=torch.eye(4).expand(2, 4, 4)), "leading size 3, but the batch is 2"),
        (dict(background=torch.zeros(3)), r"background must have shape \(4,\) or \(B, 4\), got \(1, 3\)"),
        (dict(width=0), "width must be a positive whole number"),
        (dict(height=2.5), "height must be a positive whole number"),
        (dict(near=0.0), "0 < near < far"),
        (dict(cutoff="hbb1"), 'cutoff must be "exact" or "2dgs"'),
        (dict(aux=("depth", "colour")), "aux may hold depth, normal, median_depth, distortion; got 'colour'"),
        (dict(opacities=torch.zeros(1, 40, dtype=torch.int64)), "opacities must hold floating-point numbers"),
        (dict(means=[[0, 0, 0]]), "means must be a tensor"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_expected(changes, message):
    with pytest.raises(ValueError, match=message):
        rasterize_surfels(**(scene(dtype=torch.float32) | changes))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_cast(dtype):
    half = scene(dtype=dtype)
    out = rasterize_surfels(**half)
    single = rasterize_surfels(**{k: v.float() if isinstance(v, torch.Tensor) else v for k, v in half.items()})
    assert out.features.dtype == torch.float32 and torch.equal(out.features, single.features)
    call = leaves(half)
    random_loss(maps(rasterize_surfels(**call))).backward()
    assert all(call[name].grad.dtype == dtype and call[name].grad.isfinite().all() for name in LEAVES)


def test_non_contiguous_inputs_give_the_same_result():
    plain = scene(channels=7, dtype=torch.float32)
    strided = {
        k: torch.stack([v, v], -1)[..., 0] if isinstance(v, torch.Tensor) else v
        for k, v in plain.items()
    }  # fmt: skip
    assert not strided["means"].is_contiguous()
    a, b = leaves(plain), {k: v.requires_grad_() if k in LEAVES else v for k, v in strided.items()}
    for call in (a, b):
        random_loss(maps(rasterize_surfels(**call))).backward()
    assert all(torch.equal(a[name].grad, b[name].grad) for name in LEAVES)


def test_without_a_wanted_gradient_no_training_state_is_kept():
    arguments = scene(dtype=torch.float32)
    call = leaves(arguments)
    trained = rasterize_surfels(**call, aux=AUX)
    with torch.no_grad():
        drawn = rasterize_surfels(**call, aux=AUX)
    assert drawn.features.grad_fn is None and drawn.screen_grad is None
    assert all(torch.equal(image, maps(drawn, AUX)[name]) for name, image in maps(trained, AUX).items())
    state = op_call(arguments, save=False)[-1], op_call(arguments, save=True)[-1]
    assert state[0].numel() == 0 and state[1].numel() > 0


def test_screen_grad_is_there_after_backward_only():
    call = leaves(scene(batch=2))
    out = rasterize_surfels(**call)
    assert out.screen_grad is None
    random_loss(maps(out)).backward()
    assert out.screen_grad.shape == (2, 40, 2) and out.screen_grad.abs().sum() > 0


def test_aux_maps_not_asked_for_are_none():
    out = rasterize_surfels(**scene(), aux="normal")
    assert out.normal.shape == (1, 3, 29, 37) and out.depth is None and out.median_depth is None and out.distortion is None


def test_bytes_are_the_rounded_and_clamped_features():
    arguments = scene(channels=7, batch=2, dtype=torch.float32)
    arguments["features"] = 2.5 * arguments["features"] - 0.5
    want = rasterize_surfels(**arguments, aux="depth")
    got = rasterize_surfels(**arguments, aux="depth", as_bytes=True)
    assert got.features.dtype == torch.uint8 and torch.equal(got.depth, want.depth) and torch.equal(got.alpha, want.alpha)
    assert torch.equal(got.features, (want.features * 255 + 0.5).clamp(0, 255).to(torch.uint8))
    assert 0 < (got.features == 0).float().mean() < 1 and (got.features == 255).any()


def test_bytes_have_no_gradient_and_say_so():
    with pytest.raises(ValueError, match="as_bytes is for drawing without gradients"):
        rasterize_surfels(**leaves(scene()), as_bytes=True)


def op_arguments(arguments, save, aux="depth,distortion"):
    tensors = [arguments[name] for name in (*LEAVES[:5], "viewmats", "Ks")]
    screen = torch.zeros(*arguments["means"].shape[:2], 2, dtype=arguments["means"].dtype, requires_grad=save)
    size = arguments["width"], arguments["height"]
    return *tensors, arguments["background"][None], screen, *size, 0.2, 100.0, "exact", aux, False, save


def op_call(arguments, save):
    return ops.forward_op(*op_arguments(arguments, save))


def test_torch_library_checks_pass():
    arguments = leaves(scene(count=9, batch=2, width=20, height=12, dtype=torch.float32))
    torch.library.opcheck(ops.forward_op, op_arguments(arguments, True))
    torch.library.opcheck(ops.sh_op, (arguments["means"], torch.randn(1, 9, 9, 3, requires_grad=True), arguments["viewmats"], 2))


def test_it_compiles_into_one_graph():
    arguments = scene(count=9, width=20, height=12, dtype=torch.float32)

    def draw(means, quats):
        return rasterize_surfels(**{**arguments, "means": means, "quats": quats}, aux=("depth",)).features

    results = []
    for f in (draw, torch.compile(draw, fullgraph=True, backend="aot_eager")):
        call = leaves(arguments)
        image = f(call["means"], call["quats"])
        image.square().sum().backward()
        results.append((image, call["means"].grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- the call interface of the 2DGS rasterizer ---


def settings(width=50, height=37, **changes):
    view = torch.eye(4)
    view[:3, :3] = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2)))[0]
    view[:3, :3] *= torch.linalg.det(view[:3, :3])
    view[2, 3] = 4.0
    tan_x, tan_y, near, far = 0.4, 0.3, 0.01, 100.0
    projection = torch.zeros(4, 4)
    projection[0, 0], projection[1, 1] = 1 / tan_x, 1 / tan_y
    projection[2, 2], projection[2, 3], projection[3, 2] = far / (far - near), -far * near / (far - near), 1.0
    transposed = view.T.contiguous()
    values = dict(
        image_height=height, image_width=width, tanfovx=tan_x, tanfovy=tan_y, bg=torch.tensor([0.2, 0.5, 0.9]), scale_modifier=1.0,
        viewmatrix=transposed, projmatrix=transposed @ projection.T, sh_degree=3, campos=torch.linalg.inv(view)[:3, 3],
        prefiltered=False, debug=False,
    )  # fmt: skip
    return GaussianRasterizationSettings(**(values | changes))


def cloud(count=80):
    rng = torch.Generator().manual_seed(5)
    return dict(
        means3D=(torch.rand(count, 3, generator=rng) - 0.5) * 2, opacities=torch.rand(count, 1, generator=rng),
        scales=torch.rand(count, 2, generator=rng) * 0.2 + 0.02, rotations=torch.randn(count, 4, generator=rng),
        shs=torch.randn(count, 16, 3, generator=rng) * 0.3,
    )  # fmt: skip


def test_the_2dgs_interface_equals_the_reference():
    s, c = settings(scale_modifier=1.3), cloud()
    color, radii, allmap = GaussianRasterizer(s)(c["means3D"], torch.zeros(80, 3), **{k: v for k, v in c.items() if k != "means3D"})
    W, H = s.image_width, s.image_height
    K = torch.tensor([[W / 2 / s.tanfovx, 0, W / 2], [0, H / 2 / s.tanfovy, H / 2], [0, 0, 1]])
    want = reference.rasterize_surfels(
        c["means3D"][None].double(), c["rotations"][None].double(), c["scales"][None].double() * 1.3, c["opacities"].T.double(),
        c["shs"][None].double(), s.viewmatrix.T[None].double(), K[None].double(), W, H, s.bg, 3, AUX, cutoff="2dgs",
    )  # fmt: skip
    assert color.shape == (3, H, W) and allmap.shape == (7, H, W) and radii.dtype == torch.int32
    assert relative_error(color, want.features[0]) < 1e-4
    stacked = torch.cat([want.depth, want.alpha, want.normal, want.median_depth, want.distortion], 1)[0]
    for plane in range(7):
        assert relative_error(allmap[plane], stacked[plane]) < 2e-4, plane
    assert torch.equal(radii > 0, want.radii[0] > 0)


def test_the_2dgs_interface_samples_pixels_at_integers_of_its_own_projection():
    """One surfel's alpha worked out by hand from projmatrix with x_pix = (W x_ndc + W - 1)/2 at integer pixels."""
    s, W, H = settings(), 50, 37
    mean, scale, q = torch.tensor([[0.1, -0.2, 0.3]]), torch.tensor([[0.5, 0.3]]), torch.tensor([[0.9, 0.2, -0.1, 0.3]])
    _, _, allmap = GaussianRasterizer(s)(
        mean, None, torch.tensor([[0.9]]), colors_precomp=torch.ones(1, 3), scales=scale, rotations=q
    )  # fmt: skip
    R = reference.rotation_matrices(q)[0].double()
    patch = torch.zeros(4, 3, dtype=torch.float64)
    patch[:3, 0], patch[:3, 1], patch[:3, 2], patch[3, 2] = R[:, 0] * scale[0, 0], R[:, 1] * scale[0, 1], mean[0], 1
    to_pixel = torch.tensor([[W / 2, 0, 0, (W - 1) / 2], [0, H / 2, 0, (H - 1) / 2], [0, 0, 0, 1]], dtype=torch.float64)
    T = to_pixel @ s.projmatrix.T.double() @ patch
    y, x = torch.meshgrid(torch.arange(H, dtype=torch.float64), torch.arange(W, dtype=torch.float64), indexing="ij")
    uv = torch.linalg.solve(T, torch.stack([x, y, torch.ones_like(x)], -1).reshape(-1, 3).T)
    plane = ((uv[0] / uv[2]) ** 2 + (uv[1] / uv[2]) ** 2).reshape(H, W)
    f = torch.tensor([9.0, 9.0, -1.0], dtype=torch.float64)
    f = f / (f * T[2] * T[2]).sum()
    disc = 2 * ((x - (f * T[0] * T[2]).sum()) ** 2 + (y - (f * T[1] * T[2]).sum()) ** 2)
    alpha = 0.9 * torch.exp(-0.5 * torch.minimum(plane, disc))
    inside = alpha > 0.1  # far from the cutoffs
    assert inside.sum() > 100
    torch.testing.assert_close(allmap[1][inside].double(), alpha[inside], atol=1e-5, rtol=1e-4)


def test_means2d_receives_the_densification_signal():
    s, c = settings(), cloud()
    means2D = torch.zeros(80, 3, requires_grad=True)
    color, _, _ = GaussianRasterizer(s)(means2D=means2D, **{k: v.requires_grad_() for k, v in c.items()})
    random_loss({"color": color}).backward()
    assert means2D.grad[:, :2].abs().sum() > 0 and (means2D.grad[:, 2] == 0).all() and c["shs"].grad.abs().sum() > 0


def test_the_2dgs_interface_refuses_what_it_cannot_do():
    c, draw = cloud(), GaussianRasterizer(settings())
    with pytest.raises(ValueError, match="exactly one of shs"):
        draw(means2D=None, colors_precomp=torch.ones(80, 3), **c)
    with pytest.raises(ValueError, match="cov3D_precomp"):
        draw(means2D=None, cov3D_precomp=torch.ones(80, 9), **c)
    with pytest.raises(ValueError, match="projmatrix must be"):
        GaussianRasterizer(settings(projmatrix=torch.ones(4, 4)))(means2D=None, **c)


def test_mark_visible_is_beyond_the_near_plane():
    s = settings(viewmatrix=torch.eye(4))
    points = torch.tensor([[0, 0, 0.1], [0, 0, 0.3], [0, 0, -1.0]])
    assert GaussianRasterizer(s).markVisible(points).tolist() == [False, True, False]
