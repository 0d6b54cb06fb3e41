"""The surfel rasterizer's gradients: finite differences, the reference's autograd, the clamp, SH, the densification signal."""

import pytest
import torch
from diff_surfel_rasterization import rasterize_surfels, reference
from rasterizer_scenes import AUX, LEAVES, away_from_thresholds, edge_on, leaves, maps, random_loss, relative_error, scene


def gradients(draw, arguments, names=LEAVES, aux=(), **options):
    call = leaves(arguments, names)
    out = draw(**call, aux=aux, **options)
    random_loss(maps(out, aux)).backward()
    return {name: call[name].grad for name in names} | {"screen": out.screen_grad}


def projected(images):
    """Three random linear functions of the maps: all that finite differences need to look at."""
    return torch.stack([random_loss(images, seed) for seed in range(3)])


@pytest.mark.parametrize("aux", [(), *[(name,) for name in AUX], AUX])
def test_finite_differences_of_every_input(aux):
    # Opacities stay below the clamp at 0.99, whose gradient is by design not that of the clamped function.
    arguments = scene(count=5, channels=2, width=11, height=9, seed=4, scales=(0.1, 0.8), top_opacity=0.95)

    def draw(*tensors):
        out = rasterize_surfels(**(arguments | dict(zip(LEAVES, tensors, strict=True))), aux=aux)
        return projected(maps(out, aux))

    assert torch.autograd.gradcheck(draw, tuple(arguments[name].clone().requires_grad_() for name in LEAVES), atol=1e-6, rtol=1e-4)


def test_finite_differences_where_the_low_pass_disc_takes_over():
    # Surfels of about 0.7 pixel: in some pixels the plane's Gaussian wins, in others the disc.
    arguments = scene(count=6, channels=2, width=10, height=8, seed=1, scales=(0.08, 0.25), top_opacity=0.95)
    names = ("means", "quats", "scales", "opacities")

    def draw(*tensors):
        out = rasterize_surfels(**(arguments | dict(zip(names, tensors, strict=True))))
        return projected(maps(out))

    disc = reference.rasterize_surfels(**(arguments | dict(scales=arguments["scales"] * 1e-4))).alpha  # the disc alone
    plain = rasterize_surfels(**arguments).alpha
    assert ((plain - disc).abs() < 1e-12).any() and ((plain - disc) > 1e-3).any()
    assert torch.autograd.gradcheck(draw, tuple(arguments[name].clone().requires_grad_() for name in names), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_finite_differences_of_sh_and_of_the_view_direction(degree):
    arguments = scene(count=4, channels=5, width=9, height=7, seed=2, scales=(0.2, 0.8), top_opacity=0.9)
    sh = torch.randn(1, 4, 16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(degree)) * 0.4
    extra = arguments["features"][..., :2]

    def draw(means, sh, extra):
        return projected(maps(rasterize_surfels(**(arguments | dict(means=means, features=(sh, extra))), sh_degree=degree)))

    inputs = tuple(t.clone().requires_grad_() for t in (arguments["means"], sh, extra))
    assert torch.autograd.gradcheck(draw, inputs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("cutoff", ["exact", "2dgs"])
@pytest.mark.parametrize("channels, aux", [(3, ()), (4, AUX), (7, ()), (7, AUX), (8, ("depth",)), (20, AUX)])
def test_gradients_equal_the_references_autograd(channels, aux, cutoff):
    # Opacity up to 1 and crowded pixels: the clamp, the stop and the background are all met.
    arguments = scene(count=60, batch=2, channels=channels, seed=channels)
    got, want = (gradients(draw, arguments, aux=aux, cutoff=cutoff) for draw in (rasterize_surfels, reference.rasterize_surfels))
    for name in got:
        assert relative_error(got[name], want[name]) < 1e-7, name


def cast(arguments, dtype):
    return {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def images_and_gradients(draw, arguments, aux):
    call = leaves(arguments)
    out = draw(**call, aux=aux)
    random_loss(maps(out, aux)).backward()
    gradient = {f"gradient of {name}": call[name].grad for name in LEAVES} | {"screen_grad": out.screen_grad}
    return {name: image.detach() for name, image in maps(out, aux).items()} | gradient


def float32_errors(arguments, aux):
    """Relative errors of float32 against the float64 reference given the same numbers, and the reference's results."""
    want = images_and_gradients(reference.rasterize_surfels, cast(arguments, torch.float64), aux)
    got = images_and_gradients(rasterize_surfels, arguments, aux)
    return {name: relative_error(got[name], want[name]) for name in want}, want


def last_place_moved(arguments, rng):
    """The scene in float64 with every surfel and camera number moved by up to one unit in float32's last place."""
    copy = cast(arguments, torch.float64)
    for name in (*LEAVES, "viewmats"):
        copy[name] *= 1 + 2**-23 * (2 * torch.rand(copy[name].shape, generator=rng, dtype=torch.float64) - 1)
    return copy


@pytest.mark.parametrize("aux", [(), AUX])
@pytest.mark.parametrize("seed", [0, 1, 9, 25, 26, 28])
def test_away_from_thresholds_float32_images_and_all_gradients_are_within_1e_4_of_the_float64_reference(seed, aux):
    """Surfels of all orientations down to a cosine of 0.03, one in three under less than 0.3."""
    turned = edge_on(scene(count=60, width=32, height=32, seed=seed), (0.03, 0.3), seed=seed)
    arguments = away_from_thresholds(cast(turned, torch.float32), least_cosine=0.03)
    assert arguments["means"].shape[1] > 45  # most are away from them
    errors, _ = float32_errors(arguments, aux)
    for name, error in errors.items():
        assert error < 1e-4, name


@pytest.mark.parametrize("seed", [3, 4, 6])
def test_nearly_edge_on_float32_is_as_exact_as_the_last_place_of_its_inputs_allows(seed):
    """One surfel in three under a cosine of 0.003 to 0.03: a unit in the last place of the inputs moves gradients by up to 1e-3."""
    turned = edge_on(scene(count=60, width=32, height=32, seed=seed), (0.003, 0.03), seed=seed)
    arguments = away_from_thresholds(cast(turned, torch.float32))
    errors, want = float32_errors(arguments, AUX)
    rng = torch.Generator().manual_seed(seed)
    moved = [images_and_gradients(rasterize_surfels, last_place_moved(arguments, rng), AUX) for _ in range(5)]
    for name, error in errors.items():
        inherent = max(relative_error(m[name], want[name]) for m in moved)
        assert error < (max(1e-4, 3 * inherent) if "grad" in name else 1e-4), name


def test_the_clamp_at_099_lets_the_gradient_through():
    arguments = scene(count=1, channels=1, scales=(2.0, 2.0)) | dict(
        means=torch.zeros(1, 1, 3, dtype=torch.float64), background=None
    )
    arguments |= dict(opacities=torch.ones(1, 1, dtype=torch.float64), features=torch.ones(1, 1, 1, dtype=torch.float64))
    call = leaves(arguments, ("opacities",))
    alpha = rasterize_surfels(**call).alpha
    middle = alpha.flatten().argmax()
    assert alpha.flatten()[middle] == 0.99
    alpha.flatten()[middle].backward()
    assert 0.99 < call["opacities"].grad.item() <= 1


def test_sh_with_extra_features_equals_the_reference():
    arguments = scene(count=40, batch=2, channels=4, seed=8)
    arguments["background"] = torch.rand(7, dtype=torch.float64)
    sh = torch.randn(1, 40, 16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.4
    results = []
    for draw in (rasterize_surfels, reference.rasterize_surfels):
        call, coefficients = leaves(arguments, ("means", "features")), sh.clone().requires_grad_()
        images = maps(draw(**(call | dict(features=(coefficients, call["features"]))), sh_degree=3))
        random_loss(images).backward()
        results.append([images["features"], coefficients.grad, call["means"].grad, call["features"].grad])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-8, rtol=1e-7)
    assert (results[0][1][:, :, 0] == 0).any()  # some colours are clamped at 0


def test_more_sh_coefficients_than_the_degree_uses_get_no_gradient():
    arguments, sh = scene(channels=3), torch.randn(1, 40, 16, 3, dtype=torch.float64, requires_grad=True)
    rasterize_surfels(**(arguments | dict(features=sh)), sh_degree=1).features.sum().backward()
    assert (sh.grad[:, :, 4:] == 0).all() and sh.grad[:, :, :4].abs().sum() > 0


def test_the_image_moves_with_the_surfels_as_the_gradient_says():
    # A step against the gradient of a distance to a target image makes the image more like the target.
    target = rasterize_surfels(**scene(count=30, seed=6)).features
    call = leaves(scene(count=30, seed=6) | dict(means=scene(count=30, seed=6)["means"] + 0.01), ("means",))
    loss = (rasterize_surfels(**call).features - target).square().sum()
    loss.backward()
    with torch.no_grad():
        step = call["means"] - 1e-4 * call["means"].grad / call["means"].grad.norm()
        assert (rasterize_surfels(**(call | dict(means=step))).features - target).square().sum() < loss


def test_only_the_maps_in_the_loss_matter():
    arguments = scene(channels=3)
    call = leaves(arguments)
    rasterize_surfels(**call, aux=AUX).alpha.sum().backward()
    alone = leaves(arguments)
    rasterize_surfels(**alone).alpha.sum().backward()
    for name in ("means", "quats", "scales", "opacities"):
        torch.testing.assert_close(call[name].grad, alone[name].grad)
    assert (call["features"].grad == 0).all()
