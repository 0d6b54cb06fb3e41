"""The CUDA kernels on the host (tests/cuda_emulation): the rasterizer's test suite asked of them, and what is theirs alone."""

import ctypes
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "cuda_emulation"))
pytest.importorskip("diff_surfel_rasterization.cuda", reason="the installed rasterizer is older than the sources: reinstall it")
import build_for_host
import emulated
import test_rasterizer
import test_rasterizer_gradients
import test_rasterizer_interface
import test_rasterizer_loss
from diff_surfel_rasterization import Adam, cuda, ops, rasterize_surfels, reference
from rasterizer_scenes import AUX, LEAVES, leaves, maps, random_loss, relative_error, scene

if build_for_host.compiler() is None:
    pytest.skip("needs g++ to compile the CUDA kernels for the host", allow_module_level=True)

# Left out: the CPU's thread counts and instruction sets; opcheck, which compares the opaque state bit by bit (see below).
CPU_ONLY = {
    "test_images_and_gradients_do_not_depend_on_the_number_of_threads",
    "test_other_vector_instructions_give_the_same_image",
    "test_torch_library_checks_pass",
    # slow here; the gradients are compared with the reference's autograd
    "test_finite_differences_of_every_input",
    "test_finite_differences_where_the_low_pass_disc_takes_over",
    "test_finite_differences_of_sh_and_of_the_view_direction",
}
for module in (test_rasterizer, test_rasterizer_gradients, test_rasterizer_interface, test_rasterizer_loss):
    globals().update({name: test for name, test in vars(module).items() if name.startswith("test_") and name not in CPU_ONLY})


@pytest.fixture(scope="session")
def emulation(tmp_path_factory):
    library = tmp_path_factory.mktemp("emulation") / "libsurfel_cuda.so"
    build_for_host.compile_for_the_host(build_for_host.RASTERIZER, library)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="session")
def emulation_of_many_tiles(tmp_path_factory):
    """Draws small pictures as large batches are drawn."""
    library = tmp_path_factory.mktemp("emulation") / "libsurfel_cuda.so"
    build_for_host.compile_for_the_host(build_for_host.RASTERIZER, library, "-DSURFEL_FEW_TILES=0")
    return ctypes.CDLL(str(library))


@pytest.fixture(autouse=True)
def back_end(emulation):
    with emulated.in_place_of_the_cpu(emulated.EmulatedBackEnd(emulation)) as active:
        yield active


def single(arguments):
    return {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def full_screen(count=12, **changes):
    """Surfels that each fill the image, so that a call has count times tiles pairs."""
    arguments = scene(count=count, channels=3, width=128, height=120, top_opacity=0.3, seed=2)
    arguments["scales"] = torch.full_like(arguments["scales"], 3.0)
    arguments["quats"] = torch.tensor([1.0, 0.1, 0, 0], dtype=torch.float64).expand(1, count, 4).contiguous()
    return arguments | changes


@pytest.mark.parametrize("channels, aux", [(3, ()), (4, AUX), (7, ()), (7, AUX), (8, ("depth",)), (11, AUX)])
@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize("library", ["emulation", "emulation_of_many_tiles"])
def test_every_template_agrees_with_the_float64_reference_in_any_order_of_threads(channels, aux, reverse, library, request):
    library = request.getfixturevalue(library)
    given = leaves(single(scene(count=60, channels=channels, batch=1 if channels == 3 else 2, seed=channels)))
    truth = leaves({k: v.double() if isinstance(v, torch.Tensor) else v for k, v in given.items()})
    want = reference.rasterize_surfels(**truth, aux=aux)
    random_loss(maps(want, aux)).backward()
    library.emulation_reverse(reverse)
    try:
        with emulated.in_place_of_the_cpu(emulated.EmulatedBackEnd(library)):
            got = rasterize_surfels(**given, aux=aux)
            random_loss(maps(got, aux)).backward()
    finally:
        library.emulation_reverse(0)
    for name, image in maps(got, aux).items():
        assert relative_error(image.detach(), maps(want, aux)[name].detach()) < 1e-4, name
    for name in LEAVES:
        assert relative_error(given[name].grad, truth[name].grad) < 1e-4, name


@pytest.mark.parametrize("count", [480, 530, 4300])
def test_lists_sorted_by_a_warp_by_a_block_and_in_place_are_front_to_back(count):
    arguments = scene(count=count, channels=3, width=8, height=8, scales=(0.1, 0.5), top_opacity=0.05, seed=3)
    got, want = rasterize_surfels(**arguments), reference.rasterize_surfels(**arguments)
    torch.testing.assert_close(got.features, want.features, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("calls_between", [0, 1])
def test_lists_too_long_for_the_state_are_kept_aside_or_made_again(calls_between, back_end, monkeypatch):
    ran, run = [], back_end.run
    monkeypatch.setattr(back_end, "run", lambda name, *rest: (ran.append(name), run(name, *rest)))
    arguments = leaves(full_screen())
    truth = leaves(full_screen())
    out = rasterize_surfels(**arguments)
    for _ in range(calls_between):
        rasterize_surfels(**leaves(full_screen()))
    ran.clear()
    random_loss(maps(out)).backward()
    random_loss(maps(reference.rasterize_surfels(**truth))).backward()
    (watch,) = back_end.watches.values()
    assert watch.pairs > cuda._kept_capacity(1, 12) and ran.count("surfel_cuda_list") == calls_between and watch.long_lists is None
    for name in LEAVES:
        assert relative_error(arguments[name].grad, truth[name].grad) < 1e-7, name


def test_a_full_pair_buffer_is_told_of_and_enlarged_for_the_next_call():
    small = full_screen()
    small["scales"] = torch.full_like(small["scales"], 0.01)
    rasterize_surfels(**leaves(small))  # the sizes are known from here on: the next call does not wait for its count
    out = rasterize_surfels(**(given := leaves(full_screen())))
    want = reference.rasterize_surfels(**full_screen()).alpha
    assert torch.isclose(out.alpha, want).any() and (out.alpha == 0).any()
    out.features.sum().backward()
    assert all(given[name].grad.isfinite().all() for name in LEAVES)
    with pytest.warns(RuntimeWarning, match="tiles of its images were left empty"):
        again = rasterize_surfels(**leaves(full_screen()))
    torch.testing.assert_close(again.alpha, want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(rasterize_surfels(**leaves(full_screen())).alpha, want)


def test_a_captured_call_needs_one_before_and_its_overflow_can_be_asked_for(back_end, monkeypatch):
    small = full_screen()
    small["scales"] = torch.full_like(small["scales"], 0.01)
    monkeypatch.setattr(back_end, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match="draw once with these sizes"):
        rasterize_surfels(**leaves(small))
    monkeypatch.setattr(back_end, "capturing", lambda: False)
    rasterize_surfels(**leaves(small))
    monkeypatch.setattr(back_end, "capturing", lambda: True)
    rasterize_surfels(**leaves(small))
    assert not back_end.graph_overflowed()
    rasterize_surfels(**leaves(full_screen()))  # stands for a replay with other numbers: the capacity is the captured one
    with pytest.warns(RuntimeWarning, match="must be captured again"):
        assert back_end.graph_overflowed()
    given, truth = leaves(full_screen()), leaves(full_screen())
    random_loss(maps(rasterize_surfels(**given))).backward()
    random_loss(maps(reference.rasterize_surfels(**truth))).backward()
    assert not back_end.graph_overflowed()
    for name in LEAVES:
        assert relative_error(given[name].grad, truth[name].grad) < 1e-7, name


def test_a_graph_that_overflowed_is_told_of_once(back_end, monkeypatch):
    """Training's held-out pictures may have the sizes of a graph of the stage before: their length says nothing of later graphs."""
    small = full_screen()
    small["scales"] = torch.full_like(small["scales"], 0.01)
    rasterize_surfels(**leaves(small))
    monkeypatch.setattr(back_end, "capturing", lambda: True)
    rasterize_surfels(**leaves(small))
    monkeypatch.setattr(back_end, "capturing", lambda: False)
    with torch.no_grad():
        rasterize_surfels(**full_screen())
    assert back_end.graph_overflowed() and not back_end.graph_overflowed()


def test_replays_are_held_to_the_graphs_own_buffer_not_to_a_smaller_one_of_a_call_before_it(back_end, monkeypatch):
    most = full_screen()
    most["opacities"] = most["opacities"].clone()
    most["opacities"][:, 9:] = 0.0  # three of the twelve are not to be seen
    for _ in range(2):  # the second has a buffer with a quarter to spare, a third less than all twelve need
        rasterize_surfels(**leaves(most))
    monkeypatch.setattr(back_end, "capturing", lambda: True)
    rasterize_surfels(**leaves(most))
    (watch,) = back_end.watches.values()
    before = watch.pairs
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rasterize_surfels(**leaves(full_screen()))  # stands for a replay, as above
        assert not back_end.graph_overflowed()
    assert before * 1.25 < watch.pairs < before * 1.5


def test_one_warp_a_tile_and_two_give_the_same_image(monkeypatch):
    """Calls of few tiles are drawn by two warps each: the same pixels one by one as within a large batch."""
    arguments = scene(batch=1, channels=7, count=12, width=16, height=8, dtype=torch.float32)
    many = {k: v.expand(4100, *v.shape[1:]) if k == "viewmats" else v for k, v in arguments.items()}
    few, out = rasterize_surfels(**arguments, aux=AUX), rasterize_surfels(**many, aux=AUX)
    for name, image in maps(few, AUX).items():
        assert torch.equal(maps(out, AUX)[name][-1:], image), name
    few, out = rasterize_surfels(**arguments, as_bytes=True), rasterize_surfels(**many, as_bytes=True)
    assert torch.equal(out.features[-1:], few.features) and few.features.dtype == torch.uint8


def test_sh_with_gradients_equals_the_reference_with_one_set_or_one_for_each_image():
    arguments = scene(batch=2, channels=1, seed=9)
    rng = torch.Generator().manual_seed(0)
    for sh_batch, mean_batch in ((1, 2), (2, 2), (1, 1)):
        results = []
        for draw in (rasterize_surfels, reference.rasterize_surfels):
            given = {k: v for k, v in arguments.items() if k not in ("features", "background")}
            given["means"] = arguments["means"][:mean_batch].clone().requires_grad_()
            coefficients = torch.randn(sh_batch, 40, 16, 3, generator=rng.manual_seed(1), dtype=torch.float64).requires_grad_()
            out = draw(**given, features=coefficients, sh_degree=3)
            random_loss(maps(out)).backward()
            results.append((given["means"].grad, coefficients.grad))
        for got, want in zip(*results, strict=True):
            assert relative_error(got, want) < 1e-9


SIZES = [(1,), (7, 3), (2048,), (2049,), (5, 1), (70, 64)] * 9  # more than a launch takes, and more than a block


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_of_adam_as_one_kernel_is_torchs_and_leaves_out_what_has_no_gradient(dtype, back_end):
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(size, generator=generator, dtype=dtype) for size in SIZES]
    ours, theirs = ([start.clone().requires_grad_() for start in starts] for _ in range(2))
    rates = (0.5, 0.0625, 2.0**-10)
    groups = [[{"params": p[k::3], "lr": rate} for k, rate in enumerate(rates)] for p in (ours, theirs)]
    one, other = Adam(groups[0]), torch.optim.Adam(groups[1], eps=1e-15)
    for step in range(12):
        for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            late = k == 4 and step < 5
            gradient = torch.randn(a.shape, generator=generator, dtype=dtype) * 10.0 ** (k % 7 - 5)
            a.grad, b.grad = (None, None) if late else (gradient, gradient.clone())
        one.step_by(back_end)
        other.step()
    for start, a, b in zip(starts, ours, theirs, strict=True):
        moved, rounding = float((b.detach() - start).abs().max()), 1e-6 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(a, b, rtol=0, atol=rounding * (moved + 1))
        assert one.state[a].keys() == other.state[b].keys() and one.state[a]["step"] == other.state[b]["step"]


def test_a_step_that_is_to_be_skipped_changes_neither_values_nor_moments_nor_the_count(back_end):
    p = torch.ones(5, requires_grad=True)
    optimizer = Adam([p], lr=0.1)
    p.grad = torch.ones(5)
    optimizer.step_by(back_end)
    before = [p.detach().clone(), *(value.clone() for value in optimizer.state[p].values())]
    optimizer.found_inf, p.grad = torch.ones(()), torch.full((5,), torch.nan)
    optimizer.step_by(back_end)
    assert all(torch.equal(x, y) for x, y in zip(before, (p, *optimizer.state[p].values()), strict=True))
    optimizer.found_inf, p.grad = torch.zeros(()), torch.ones(5)
    optimizer.step_by(back_end)
    torch.testing.assert_close(p.detach(), before[0] - 0.1)


def test_parameters_that_one_kernel_cannot_take_are_refused(back_end):
    for other in (torch.zeros(4, 2).T, torch.zeros(3, dtype=torch.float64)):
        params = [torch.zeros(3, requires_grad=True), other.requires_grad_()]
        for p in params:
            p.grad = torch.ones_like(p)
        with pytest.raises(ValueError, match="contiguous parameters of one dtype"):
            Adam(params).step_by(back_end)


def test_torch_library_checks_of_the_cuda_kernels_pass():
    """All but the bit-for-bit comparison of two runs: the opaque state holds lists in no fixed order, and unused bytes."""
    arguments = leaves(scene(count=9, batch=2, width=20, height=12, dtype=torch.float32))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.forward_op, test_rasterizer_interface.op_arguments(arguments, True), test_utils=checks)
    torch.library.opcheck(ops.sh_op, (arguments["means"], torch.randn(1, 9, 9, 3, requires_grad=True), arguments["viewmats"], 2))


@pytest.mark.parametrize("source", [build_for_host.RASTERIZER, build_for_host.KNN], ids=lambda p: p.stem)
def test_nvcc_compiles_the_kernels(source, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH: the CUDA sources were compiled by g++ only")
    command = [nvcc, "-std=c++17", "-ptx", "-arch=compute_80", "-Werror", "all-warnings", source, "-o", tmp_path / "kernels.ptx"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
