"""The fused deformation and tri-plane against the plain ones, their reference: compiled on a GPU, else in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_inference import NAMES, head
from test_model import conditions

import scene.deformation
from scene.attention import TokenAttention
from scene.deformation import ResidualHeads
from scene.tri_plane import TriPlane

WHY = "triton is not installed (torch's CUDA builds for Linux bring it)"
fused_deformation = pytest.importorskip("scene.fused_deformation", reason=WHY)
fused_tri_plane = pytest.importorskip("scene.fused_tri_plane", reason=WHY)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def case(width=32, heads=2, tokens=4, hidden=32, units=16, batch=2, count=75, outputs=None, seed=0):
    torch.manual_seed(seed)
    outputs = outputs or {"xyz": 3, "scaling": 2, "rotation": 4, "opacity": 1, "sh": 12}
    layer, network = TokenAttention(width, heads, hidden, 0.0), ResidualHeads(width, units, outputs, {"xyz": 0.1})
    for parameter in (*layer.parameters(), *network.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    leaves = {name: torch.randn(count, size) for name, size in outputs.items()}
    leaves |= {"features": torch.randn(count, width), "tokens": torch.randn(batch, tokens, width)}
    leaves = {name: value.to(DEVICE).requires_grad_() for name, value in leaves.items()}
    made = layer.to(DEVICE), network.to(DEVICE), leaves
    if DEVICE == "cuda":
        with_decided_relus(*made)
    return made


@torch.no_grad()
def with_decided_relus(layer, network, leaves):
    """Moves the biases before each ReLU until every second unit lets all surfels through and the others none: what a GPU rounds
    (TF32, bfloat16) then turns no ReLU, which would change the gradients of so small a network by up to a quarter."""

    def decide(module, given, out):
        sides = torch.ones_like(module.bias)
        sides[1::2] = -1
        moved = sides * (out.flatten(0, -2).abs().amax(0) + 0.5)
        module.bias += moved
        return out + moved

    hooks = [module.register_forward_hook(decide) for module in (layer.hidden[0], layer.norm_hidden, network.first)]
    plain(layer, network, leaves)
    for hook in hooks:
        hook.remove()


def plain(layer, network, leaves):
    x, attention = layer(leaves["features"], leaves["tokens"])
    return {name: leaves[name] + value for name, value in network(x).items()}, attention


def fused(layer, network, leaves):
    return fused_deformation.deform(layer, network, leaves["features"], leaves["tokens"], leaves)


def outputs_and_gradients(run, layer, network, leaves):
    values, attention = run(layer, network, leaves)
    out = values | {"attention": attention}
    generator = torch.Generator().manual_seed(1)
    loss = sum((value * torch.randn(value.shape, generator=generator).to(DEVICE)).sum() for value in out.values())
    parameters = {**leaves, **dict(layer.named_parameters(prefix="layer")), **dict(network.named_parameters(prefix="heads"))}
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return out, dict(zip(parameters, gradients, strict=True))


def relative(got, want):
    return float((got - want).detach().norm() / want.detach().norm().clamp_min(1e-6))


@pytest.fixture(autouse=True)
def small_tiles_in_the_interpreter(monkeypatch):
    """It is slow, and cannot multiply bfloat16."""
    if DEVICE == "cpu":
        monkeypatch.setattr(fused_deformation, "PRODUCTS", torch.float32)
        monkeypatch.setattr(fused_deformation, "TILES", {name: (32, 4, 1) for name in fused_deformation.TILES})


# what products multiply, and how far outputs and gradients may be off: twice what was seen on an H200 (TF32 and bfloat16)
PRECISIONS = [(torch.float32, 1e-5, 1e-4)] if DEVICE == "cpu" else [(torch.float32, 2e-3, 6e-3), (torch.bfloat16, 7e-3, 3e-2)]


@pytest.mark.parametrize("sizes", [
    {},
    {"width": 48, "heads": 3, "tokens": 5, "hidden": 40, "units": 24, "outputs": {"xyz": 3, "sh": 27}, "count": 33},
], ids=["powers of two", "padded"])  # fmt: skip
@pytest.mark.parametrize(("products", "limit", "gradient_limit"), PRECISIONS)
def test_the_fused_deformation_and_every_gradient_equal_the_plain_ones(monkeypatch, sizes, products, limit, gradient_limit):
    monkeypatch.setattr(fused_deformation, "PRODUCTS", products)
    made = case(**sizes)
    want, want_gradients = outputs_and_gradients(plain, *made)
    got, got_gradients = outputs_and_gradients(fused, *made)
    for name, value in want.items():
        assert got[name].shape == value.shape and relative(got[name], value) < limit, name
    torch.testing.assert_close(got["attention"].sum(-1), torch.ones_like(got["attention"][..., 0]))
    for name, gradient in want_gradients.items():
        if name == "layer.key.bias":  # moves all scores of a surfel alike: no gradient but rounding
            continue
        assert relative(got_gradients[name], gradient) < gradient_limit, name


def test_the_fused_tri_plane_and_its_gradients_equal_the_plain_ones_inside_and_outside_the_box():
    torch.manual_seed(0)
    planes = TriPlane(channels=5, resolution=6, multires=(1, 3)).to(DEVICE)
    planes.set_box(torch.tensor([[-1.0, -2.0, -1.0], [1.0, 1.0, 3.0]], device=DEVICE))
    points = (2.5 * torch.randn(70, 3, device=DEVICE)).requires_grad_()
    leaves = [points, *planes.planes]
    want, got = planes.plain(points), fused_tri_plane.sample(list(planes.planes), planes.box, points)
    torch.testing.assert_close(got, want)
    weights = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad(out, leaves, weights) for out in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_head_deforms_the_same_fused_or_not_in_training_and_rendering(monkeypatch):
    driving = conditions(batch=2).to(DEVICE)

    def run(triton):
        monkeypatch.setattr(scene.deformation, "runs_triton", lambda device: triton)
        made = head(count=70).to(DEVICE).eval()
        with torch.no_grad():
            return made(driving), made.freeze()(driving)

    for got, want in zip(run(True), run(False), strict=True):
        for name in NAMES:
            assert getattr(got, name).shape == getattr(want, name).shape, name
            assert relative(getattr(got, name), getattr(want, name)) < (1e-5 if DEVICE == "cpu" else 1e-2), name


@pytest.mark.parametrize("change", [{"layers": 2}, {"dropout": 0.1}, {"ffn_hidden": 200}])
def test_a_network_that_the_kernels_cannot_hold_stays_in_plain_torch(change):
    assert fused_deformation.holds(head().deformation, torch.device(DEVICE))
    assert not fused_deformation.holds(head(**change).deformation, torch.device(DEVICE))


def test_the_kernels_compile_for_a_gpu_of_99_kib_at_the_shapes_of_the_recipes():
    """Triton's interpreter runs what its compiler refuses."""
    recipes = (ROOT / "arguments" / name for name in ("fast.py", "custom.py"))
    command = [sys.executable, ROOT / "tests" / "compile_triton.py", *recipes]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("layer_backward") == 2
