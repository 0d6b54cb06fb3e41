"""Compiles, without a GPU, every Triton kernel that a training step of a recipe would run on a GeForce RTX 30, and checks that
it fits on such a chip; test_fused_deformation.py calls it.

    python tests/compile_triton.py arguments/fast.py ...

Triton's interpreter runs what its compiler refuses (a variable that changes its shape within a loop, say), and shapes follow from
the recipe. What the kernels compute is not looked at.
"""

import argparse
import sys
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import arguments
from scene import fused_deformation, fused_tri_plane
from scene.deformation import Deformation
from utils import fused_distance, fused_pictures, fused_pool

TARGET, ON_CHIP, ROWS = GPUTarget("cuda", 86, 32), 99 * 1024, 32  # the smallest memory on chip of what runs them
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.uint8: "*u8", torch.bool: "*i1"}
AUDIO = 384  # width of the speech features
compiled = set()


def compile_only(kernel: JITFunction, *args, grid, warmup, num_warps: int = 4, **constants) -> None:
    """In place of JITFunction.run: the kernel as these arguments specialise it."""

    def kind(value):
        return tuple(map(kind, value)) if isinstance(value, tuple) else "i32" if isinstance(value, int) else POINTERS[value.dtype]

    names = kernel.arg_names
    signature = dict(zip(names, map(kind, args), strict=False)) | dict.fromkeys(constants, "constexpr")
    values = {(names.index(name),): value for name, value in constants.items()}
    made = triton.compile(ASTSource(kernel, signature, values, {}), target=TARGET, options={"num_warps": num_warps})
    if made.metadata.shared > ON_CHIP:
        sys.exit(f"{kernel.__name__} needs {made.metadata.shared} bytes on chip, of {ON_CHIP}")
    compiled.add(kernel.__name__)


def run_recipe(config: argparse.Namespace) -> None:
    """Forward and backward of the recipe's deformation at a size that is no matter."""
    config.frames = 30  # as Scene counts them
    network = Deformation(config, AUDIO)
    if network.tri_plane is not None:
        points = torch.rand(70, 3, requires_grad=True)
        network.tri_plane.set_box(points.detach())
        planes = list(network.tri_plane.planes)
        fused_tri_plane.sample(planes, network.tri_plane.box, points).sum().backward()
    layer, heads = network.attention[0], network.heads
    width = layer.query.in_features
    features, tokens = torch.rand(70, width, requires_grad=True), torch.rand(2, len(config.tokens), width, requires_grad=True)
    base = {name: torch.rand(70, size) for name, size in heads.sizes.items()}
    outputs, attention = fused_deformation.deform(layer, heads, features, tokens, base)
    (sum(value.sum() for value in outputs.values()) + attention.sum()).backward()
    with torch.no_grad():
        fused_deformation.deform(layer, heads, features, tokens, base)
    maps = torch.rand(2, 1, 384, 4, 5, requires_grad=True).to(torch.bfloat16)
    fused_distance.distance(*maps, torch.rand(384)).sum().backward()
    for window in (1, 2, 3):
        fused_pool.pool(maps[0].detach().requires_grad_(), window).sum().backward()
    drawn, alpha = torch.rand(2, 3, 5, 7, requires_grad=True), torch.rand(2, 1, 5, 7, requires_grad=True)
    filmed, squares = torch.zeros(2, 3, 5, 7, dtype=torch.uint8), torch.zeros(2, 3, 4, dtype=torch.int64)
    shown = fused_pictures.pictures(drawn, alpha, filmed, filmed[:, :1] > 0, drawn[..., :1, :1], squares[:, :1], squares[:, 1:])
    (shown[0].sum() + shown[3].sum()).backward()


if __name__ == "__main__":
    JITFunction.run = compile_only
    fused_deformation._on_chip = lambda device: (ROWS, 64)
    for path in sys.argv[1:]:
        config = arguments.merge(argparse.Namespace(configs=path))
        run_recipe(config)
        print(f"{path}: {', '.join(sorted(compiled))}")
        compiled.clear()
