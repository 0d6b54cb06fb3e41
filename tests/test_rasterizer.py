"""The surfel rasterizer's images: equal to the plain-torch reference, and true to what rendering surfels must satisfy."""

import os
import subprocess
import sys

import pytest
import torch
from diff_surfel_rasterization import rasterize_surfels, reference
from rasterizer_scenes import AUX, LEAVES, leaves, maps, random_loss, relative_error, scene


def assert_same_images(arguments, tolerance, aux=AUX, **options):
    got = rasterize_surfels(**arguments, aux=aux, **options)
    want = reference.rasterize_surfels(**arguments, aux=aux, **options)
    for name, image in maps(got, aux).items():
        assert image.shape == maps(want, aux)[name].shape
        torch.testing.assert_close(image, maps(want, aux)[name], atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    return got, want


@pytest.mark.parametrize("cutoff", ["exact", "2dgs"])
@pytest.mark.parametrize("channels", [1, 3, 4, 7, 8, 20])
def test_images_and_aux_maps_equal_the_reference(channels, cutoff):
    got, want = assert_same_images(scene(channels=channels, batch=2, seed=channels), 1e-8, cutoff=cutoff)
    assert got.alpha.max() > 0.9 and got.alpha.min() < 0.2  # the scene has both
    both = (got.radii > 0) & (want.radii > 0)
    assert torch.equal(got.radii[both], want.radii[both]) and (got.radii[want.radii > 0] > 0).all()


@pytest.mark.parametrize("width, height", [(1, 1), (16, 16), (17, 15), (64, 3), (5, 70)])
def test_any_image_size_equals_the_reference(width, height):
    arguments = scene(count=25, width=width, height=height) | dict(Ks=scene(width=24, height=20)["Ks"])
    arguments["Ks"][0, 0, 2], arguments["Ks"][0, 1, 2] = width / 2, height / 2
    assert_same_images(arguments, 1e-8)


def test_float32_images_are_within_rounding_of_the_float64_reference():
    arguments = scene(count=60, seed=3)
    single = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    got, want = rasterize_surfels(**single, aux=AUX), reference.rasterize_surfels(**arguments, aux=AUX)
    assert got.features.dtype == torch.float32
    for name, image in maps(got, AUX).items():
        assert relative_error(image, maps(want, AUX)[name]) < 1e-4, name


def test_needles_of_aspect_one_thousand_lose_no_pixel():
    arguments = scene(count=50, seed=5, channels=3)
    arguments["scales"] = torch.tensor([0.5, 0.0005], dtype=torch.float64).expand(1, 50, 2)
    assert_same_images(arguments, 1e-7)
    single = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    error = (rasterize_surfels(**single).features.double() - reference.rasterize_surfels(**arguments).features).abs()
    assert error.median() < 1e-5 and error.max() < 1.5 / 255


def test_the_2dgs_cutoff_drops_what_lies_outside_the_tiles_of_the_3_sigma_square():
    # One opaque surfel whose 3-sigma square just stays inside the left tile: its faint rim (alpha > 1/255) reaches into the next.
    arguments = scene(count=1, channels=1, width=32, height=16, dtype=torch.float32)
    arguments |= dict(
        means=torch.zeros(1, 1, 3), quats=torch.tensor([[[1.0, 0, 0, 0]]]), scales=torch.full((1, 1, 2), 2.65 / 100),
        opacities=torch.tensor([[0.99]]), viewmats=torch.eye(4)[None].clone(),
        Ks=torch.tensor([[[100.0, 0, 8], [0, 100, 8], [0, 0, 1]]]), background=None,
    )  # fmt: skip
    arguments["viewmats"][0, 2, 3] = 1.0
    exact, square = (rasterize_surfels(**arguments, cutoff=c) for c in ("exact", "2dgs"))
    assert square.radii.item() == 8
    assert exact.alpha[..., 16:].max() > 1 / 255 and square.alpha[..., 16:].max() == 0
    assert torch.equal(exact.alpha[..., :16], square.alpha[..., :16])


# --- the six properties (lineage B.4; finite differences are in test_rasterizer_gradients.py) ---


def test_a_payload_of_ones_without_background_is_alpha():
    arguments = scene(channels=3) | dict(background=None)
    arguments["features"] = torch.ones_like(arguments["features"])
    out = rasterize_surfels(**arguments)
    torch.testing.assert_close(out.features, out.alpha.expand(-1, 3, -1, -1))


def test_attention_channels_that_sum_to_one_render_to_alpha():
    arguments = scene(channels=7) | dict(background=None)
    arguments["features"][..., 3:] = arguments["features"][..., 3:].mul(5).softmax(-1)
    out = rasterize_surfels(**arguments)
    torch.testing.assert_close(out.features[:, 3:].sum(1, keepdim=True), out.alpha)


@pytest.mark.parametrize("channels", [4, 7, 8, 11])
def test_many_channels_equal_a_stack_of_single_channel_renders(channels):
    arguments = scene(channels=channels, dtype=torch.float32)
    whole = rasterize_surfels(**arguments).features
    for k in range(channels):
        one = arguments | dict(features=arguments["features"][..., k : k + 1], background=arguments["background"][k : k + 1])
        assert torch.equal(rasterize_surfels(**one).features[:, 0], whole[:, k])


def test_the_order_in_which_surfels_are_stored_does_not_matter():
    arguments, order = scene(dtype=torch.float32), torch.randperm(40, generator=torch.Generator().manual_seed(1))
    shuffled = arguments | {name: arguments[name][:, order] for name in LEAVES[:5]}
    a, b = rasterize_surfels(**arguments, aux=AUX), rasterize_surfels(**shuffled, aux=AUX)
    for name, image in maps(a, AUX).items():
        assert torch.equal(image, maps(b, AUX)[name]), name
    assert torch.equal(a.radii[:, order], b.radii)


def test_a_single_surfel_has_no_distortion_and_two_apart_have():
    one, two = scene(count=1, top_opacity=0.9, scales=(0.3, 0.3)), scene(count=2, scales=(0.9, 0.9), seed=2)
    assert rasterize_surfels(**one, aux=("distortion",)).distortion.abs().max() == 0
    assert rasterize_surfels(**two, aux=("distortion",)).distortion.max() > 1e-7


# --- batches ---


def test_each_image_of_a_batch_equals_its_own_call():
    arguments = scene(batch=3, channels=7, dtype=torch.float32)
    whole = rasterize_surfels(**arguments, aux=AUX)
    for b in range(3):
        one = {k: v[b : b + 1] if isinstance(v, torch.Tensor) and k != "background" else v for k, v in arguments.items()}
        for name, image in maps(rasterize_surfels(**one, aux=AUX), AUX).items():
            assert torch.equal(image[0], maps(whole, AUX)[name][b]), name


@pytest.mark.parametrize("shared", [*LEAVES[:5], "viewmats", "Ks"])
def test_an_argument_with_a_batch_of_one_serves_all_images_and_sums_its_gradient(shared):
    arguments = scene(batch=3, channels=3)
    arguments[shared] = arguments[shared][:1]
    narrow, wide = leaves(arguments), leaves(arguments | {shared: arguments[shared].expand(3, *arguments[shared].shape[1:])})
    for call in (narrow, wide):
        random_loss(maps(rasterize_surfels(**call))).backward()
    for name in LEAVES:
        want = wide[name].grad.sum(0, keepdim=True) if name == shared else wide[name].grad
        torch.testing.assert_close(narrow[name].grad, want)


def test_a_background_for_each_image():
    arguments = scene(batch=2, channels=3)
    arguments["background"] = torch.tensor([[0.0, 0.5, 1.0], [1.0, 0.0, 0.25]], dtype=torch.float64)
    assert_same_images(arguments, 1e-8)


# --- the same result everywhere ---


def test_images_and_gradients_do_not_depend_on_the_number_of_threads():
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            call = leaves(scene(count=700, batch=2, channels=7, width=70, height=50, dtype=torch.float32))
            out = rasterize_surfels(**call, aux=AUX)
            random_loss(maps(out, AUX)).backward()
            results.append([*maps(out, AUX).values(), out.screen_grad, *(call[name].grad for name in LEAVES)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("level", ["base", "avx2"])
def test_other_vector_instructions_give_the_same_image(level, tmp_path):
    arguments = scene(count=300, channels=7, dtype=torch.float32)
    here = leaves(arguments)
    out = rasterize_surfels(**here, aux=AUX)
    random_loss(maps(out, AUX)).backward()
    torch.save(arguments, tmp_path / "scene.pt")
    script = (
        "import sys, torch; sys.path.insert(0, 'tests')\n"
        "from diff_surfel_rasterization import rasterize_surfels; from diff_surfel_rasterization.cpu import cpu_level\n"
        "from rasterizer_scenes import *\n"
        "folder = sys.argv[1]; call = leaves(torch.load(folder + '/scene.pt'))\n"
        "out = rasterize_surfels(**call, aux=AUX); random_loss(maps(out, AUX)).backward()\n"
        "images = {k: v.detach() for k, v in maps(out, AUX).items()}\n"
        "torch.save([cpu_level(), images, {n: call[n].grad for n in LEAVES}], folder + '/out.pt')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=os.environ | {"SURFEL_CPU": level}, check=True)
    used, images, gradients = torch.load(tmp_path / "out.pt")
    assert used in (level, "base")  # a CPU without AVX2 stays at base
    for name in ("features", "alpha"):
        assert (images[name] - maps(out)[name]).abs().max() < 1e-5
    for name in LEAVES:
        assert relative_error(gradients[name], here[name].grad) < 1e-4, name


# --- surfels that are hard ---


@pytest.mark.parametrize("name", LEAVES[:5])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_surfel_that_is_not_finite_is_left_out_and_spreads_nothing(name, value):
    arguments = scene(count=20, dtype=torch.float32)
    clean = leaves({k: torch.cat([v[:, :7], v[:, 8:]], 1) if k in LEAVES[:5] else v for k, v in arguments.items()})
    arguments[name][0, 7] = value
    broken = leaves(arguments)
    images = rasterize_surfels(**clean, aux=AUX), rasterize_surfels(**broken, aux=AUX)
    for out in images:
        random_loss(maps(out, AUX)).backward()
    assert images[1].radii[0, 7] == 0
    for key, image in maps(images[0], AUX).items():
        assert torch.equal(image, maps(images[1], AUX)[key]), key
    for key in LEAVES[:5]:
        gradient = broken[key].grad
        assert (gradient[:, 7] == 0).all()
        assert torch.equal(torch.cat([gradient[:, :7], gradient[:, 8:]], 1), clean[key].grad), key


def test_without_surfels_the_image_is_the_background():
    call = leaves(scene(count=0, batch=2, channels=3))
    out = rasterize_surfels(**call, aux=AUX)
    assert torch.equal(out.features, call["background"][None, :, None, None].expand_as(out.features))
    assert out.alpha.abs().max() == 0 and out.depth.abs().max() == 0 and out.radii.shape == (2, 0)
    out.features.sum().backward()
    torch.testing.assert_close(call["background"].grad, torch.full((3,), 2.0 * 37 * 29, dtype=torch.float64))


def single(**changes):
    """One surfel of one channel straight ahead, 3 units away, in a 48x32 image."""
    arguments = dict(
        means=torch.tensor([[[0.02, -0.01, 3.0]]]), quats=torch.tensor([[[1.0, 0, 0, 0]]]), scales=torch.tensor([[[0.2, 0.1]]]),
        opacities=torch.tensor([[0.8]]), features=torch.ones(1, 1, 1), viewmats=torch.eye(4)[None],
        Ks=torch.tensor([[[60.0, 0, 24], [0, 60, 16], [0, 0, 1]]]), width=48, height=32,
    )  # fmt: skip
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in (arguments | changes).items()}


@pytest.mark.parametrize(
    "what, changes, visible",
    [
        ("plain", {}, True),
        ("behind the camera", dict(means=torch.tensor([[[0.0, 0, -3]]])), False),
        ("at the camera", dict(means=torch.zeros(1, 1, 3)), False),
        ("nearer than near", dict(means=torch.tensor([[[0.0, 0, 0.19]]])), False),
        ("edge-on", dict(means=torch.tensor([[[0.0, 0, 3]]]), quats=torch.tensor([[[1.0, 1, 0, 0]]])), False),
        ("nearly edge-on", dict(quats=torch.tensor([[[1.0, 0.97, 0.1, 0]]])), True),
        ("below a pixel", dict(scales=torch.full((1, 1, 2), 1e-4)), True),
        ("filling the screen", dict(scales=torch.full((1, 1, 2), 30.0)), True),
        ("crossing the camera plane", dict(scales=torch.full((1, 1, 2), 4.0), quats=torch.tensor([[[1.0, 0.6, 0.2, 0]]])), True),
        ("off the image", dict(means=torch.tensor([[[9.0, 0, 3]]])), False),
        ("too faint", dict(opacities=torch.tensor([[1 / 256]])), False),
        ("opacity one", dict(opacities=torch.ones(1, 1), scales=torch.full((1, 1, 2), 2.0)), True),
        ("flat", dict(scales=torch.tensor([[[0.2, 0.0]]])), False),
    ],
)
def test_a_single_hard_surfel_equals_the_reference(what, changes, visible):
    got, want = assert_same_images(single(**changes), 1e-8)
    assert (got.alpha.max() > 0) == visible and (got.radii > 0).all() == visible and (want.radii > 0).all() == visible
    if what == "opacity one":
        assert abs(got.alpha.max().item() - 0.99) < 1e-12  # the clamp
    if what == "below a pixel":
        assert got.alpha.max() > 0.2  # the low-pass disc keeps it alive


def test_a_pixel_stops_before_its_transmittance_falls_under_one_in_ten_thousand():
    stack = single(
        means=torch.tensor([[[0.0, 0, 2 + 0.1 * i] for i in range(12)]]), quats=torch.tensor([[[1.0, 0, 0, 0]] * 12]),
        scales=torch.full((1, 12, 2), 5.0), opacities=torch.full((1, 12), 0.9), features=torch.eye(12)[None],
    )  # fmt: skip
    got, _ = assert_same_images(stack, 1e-9)
    weights = got.features[0, :, 16, 24]
    assert (weights[:3] > 0).all() and (weights[4:] == 0).all() and got.alpha.max() <= 1 - 1e-4
