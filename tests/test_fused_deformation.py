"""The fused deformation against the plain one, its reference: the Triton kernels run in Triton's interpreter on the CPU."""

import os

import pytest
import torch

os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="triton is not installed (torch's CUDA builds bring it)")

from triton.runtime import interpreter

from scene import fused_deformation, fused_tri_plane
from scene.attention import TokenAttention
from scene.deformation import SCALES, ResidualHeads
from scene.tri_plane import TriPlane


def case(width=32, heads=2, tokens=4, hidden=32, units=16, batch=2, count=75, outputs=None, seed=0):
    torch.manual_seed(seed)
    outputs = outputs or {"xyz": 3, "scaling": 2, "rotation": 4, "opacity": 1, "sh": 12}
    layer, network = TokenAttention(width, heads, hidden, 0.0), ResidualHeads(width, units, outputs)
    for parameter in (*layer.parameters(), *network.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    leaves = {name: torch.randn(count, size) for name, size in outputs.items()}
    leaves |= {"features": torch.randn(count, width), "tokens": torch.randn(batch, tokens, width)}
    leaves = {name: value.requires_grad_() for name, value in leaves.items()}
    return layer, network, leaves


def plain(layer, network, leaves):
    x, attention = layer(leaves["features"], leaves["tokens"])
    return {name: leaves[name] + SCALES.get(name, 1.0) * value for name, value in network(x).items()}, attention


def fused(layer, network, leaves):
    return fused_deformation.deform(layer, network, leaves["features"], leaves["tokens"], leaves, SCALES)


def outputs_and_gradients(run, layer, network, leaves):
    values, attention = run(layer, network, leaves)
    out = values | {"attention": attention}
    generator = torch.Generator().manual_seed(1)
    loss = sum((value * torch.randn(value.shape, generator=generator)).sum() for value in out.values())
    parameters = {**leaves, **dict(layer.named_parameters(prefix="layer")), **dict(network.named_parameters(prefix="heads"))}
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return out, dict(zip(parameters, gradients, strict=True))


def relative(got, want):
    return float((got - want).detach().norm() / want.detach().norm().clamp_min(1e-6))


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Small tiles, and numpy 2.4 for the interpreter: it makes integers of arrays of one element, an error by now."""
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_tensor)
    monkeypatch.setattr(fused_deformation, "PRODUCTS", torch.float32)  # the interpreter cannot multiply bfloat16
    monkeypatch.setattr(fused_deformation, "TILES", {name: (32, 4, 1) for name in fused_deformation.TILES})


@pytest.mark.parametrize("sizes", [
    {},
    {"width": 48, "heads": 3, "tokens": 5, "hidden": 40, "units": 24, "outputs": {"xyz": 3, "sh": 27}, "count": 33},
], ids=["powers of two", "padded"])  # fmt: skip
def test_the_fused_deformation_and_every_gradient_equal_the_plain_ones(sizes):
    made = case(**sizes)
    want, want_gradients = outputs_and_gradients(plain, *made)
    got, got_gradients = outputs_and_gradients(fused, *made)
    for name, value in want.items():
        assert got[name].shape == value.shape and relative(got[name], value) < 1e-5, name
    torch.testing.assert_close(got["attention"].sum(-1), torch.ones_like(got["attention"][..., 0]))
    for name, gradient in want_gradients.items():
        if name == "layer.key.bias":  # moves all scores of a surfel alike: no gradient but rounding
            continue
        assert relative(got_gradients[name], gradient) < 1e-4, name


def test_the_fused_tri_plane_and_its_gradients_equal_the_plain_ones_inside_and_outside_the_box():
    torch.manual_seed(0)
    planes = TriPlane(channels=5, resolution=6, multires=(1, 3))
    planes.set_box(torch.tensor([[-1.0, -2.0, -1.0], [1.0, 1.0, 3.0]]))
    points = (2.5 * torch.randn(70, 3)).requires_grad_()
    leaves = [points, *planes.planes]
    want, got = planes(points), fused_tri_plane.sample(list(planes.planes), planes.box, points)
    torch.testing.assert_close(got, want)
    weights = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad(out, leaves, weights) for out in (got, want)), strict=True):
        torch.testing.assert_close(a, b)
