"""The fused image loss (diff_surfel_rasterization.ssim_l1) against plain torch: value, gradient, shapes, errors."""

import pytest
import torch

pytest.importorskip("diff_surfel_rasterization.image_loss", reason="the installed rasterizer is older: reinstall it")
from diff_surfel_rasterization import image_loss, ssim_l1
from rasterizer_scenes import relative_error

from utils.image_metrics import ssim

WINDOW = 1e-6  # utils.image_metrics has its window in float32


def pictures(batch=2, channels=3, height=45, width=70, weights=2, seed=0, dtype=torch.float64):
    """An image, a target like it (equal in one corner), and weights of which one is zero in places."""
    rng = torch.Generator().manual_seed(seed)
    rand = lambda *n: torch.rand(*n, generator=rng, dtype=torch.float64)  # noqa: E731
    target = rand(batch, channels, height, width)
    image = (target + 0.3 * rand(batch, channels, height, width) - 0.15).clamp(0, 1)
    image[..., :6, :20] = target[..., :6, :20]
    weight = rand(batch, weights, height, width)
    weight[:, 0] = (weight[:, 0] > 0.5).double()
    return image.to(dtype), target.to(dtype), weight.to(dtype)


def plain(image, target, weight):
    difference = (image - target).abs()
    weight = torch.ones_like(image[:, :1]) if weight is None else weight
    return ssim(image, target), torch.stack([(difference * w[:, None]).mean((1, 2, 3)) for w in weight.unbind(1)], 1)


def compare(image, target, weight, tolerance, dtype=torch.float64):
    image, truth = (image.detach().to(kind, copy=True).requires_grad_() for kind in (dtype, torch.float64))
    got = ssim_l1(image, target.to(dtype), weight if weight is None else weight.to(dtype))
    want = plain(truth, target, weight)
    rng = torch.Generator().manual_seed(5)
    for out in (got, want):
        sum((v * torch.rand(v.shape, generator=rng.manual_seed(5), dtype=torch.float64).to(v)).sum() for v in out).backward()
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        torch.testing.assert_close(g.double(), w, atol=tolerance, rtol=tolerance)
    assert relative_error(image.grad, truth.grad) < tolerance


# Sides of one window, of one block of pixels, of several with a rest, of more than one band of rows on the CPU.
@pytest.mark.parametrize("height, width", [(11, 11), (12, 33), (32, 32), (45, 70), (135, 20), (260, 37)])
def test_value_and_gradient_equal_plain_torch_at_every_size(height, width):
    compare(*pictures(height=height, width=width), WINDOW)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_float32_is_within_rounding(channels):
    compare(*pictures(channels=channels, batch=3), 2e-5, torch.float32)


def test_no_weight_and_one_shared_by_the_batch():
    image, target, weight = pictures(batch=3)
    compare(image, target, None, WINDOW)
    shared = weight[:1]
    for got, want in zip(ssim_l1(image, target, shared), plain(image, target, shared.expand(3, -1, -1, -1)), strict=True):
        torch.testing.assert_close(got, want)
    results = []
    for w in (shared, shared.expand(3, -1, -1, -1)):
        leaf = image.clone().requires_grad_()
        ssim_l1(leaf, target, w)[1].sum().backward()
        results.append(leaf.grad)
    assert torch.equal(*results)


def test_either_result_alone_has_its_gradient():
    image, target, weight = pictures()
    for which in (0, 1):
        results = []
        for function in (ssim_l1, plain):
            leaf = image.clone().requires_grad_()
            function(leaf, target, weight)[which].sum().backward()
            results.append(leaf.grad)
        assert relative_error(*results) < WINDOW
    small = image[:1, :1, :13, :14].contiguous().requires_grad_()
    other = 1 - small.detach()
    assert torch.autograd.gradcheck(lambda x: ssim_l1(x, other), small)


def test_without_gradient_the_values_are_the_same_and_nothing_is_kept():
    image, target, weight = pictures(dtype=torch.float32, height=140)
    with torch.no_grad():
        alone = ssim_l1(image, target, weight)
    kept = ssim_l1(image.clone().requires_grad_(), target, weight)
    for a, b in zip(alone, kept, strict=True):
        torch.testing.assert_close(a, b.detach(), atol=1e-6, rtol=1e-6)
    assert image_loss.forward_op(image, target, weight, False)[2].numel() == 0


def test_equal_pictures_have_similarity_one_and_a_gradient_of_nothing():
    image, _, _ = pictures(dtype=torch.float32)
    leaf = image.clone().requires_grad_()
    similarity, l1 = ssim_l1(leaf, image)
    (similarity.sum() + l1.sum()).backward()
    torch.testing.assert_close(similarity, torch.ones(2))
    assert (l1 == 0).all() and leaf.grad.abs().max() < 1e-6


def test_other_dtypes_and_strides_are_taken():
    image, target, weight = pictures(dtype=torch.float32)
    want = ssim_l1(image.half().float(), target, weight)
    across = target.transpose(2, 3).contiguous().transpose(2, 3)
    for got, value in zip(ssim_l1(image.half(), across, weight.double()), want, strict=True):
        torch.testing.assert_close(got, value)


@pytest.mark.parametrize("arguments, message", [
    ((torch.rand(2, 3, 10, 40), torch.rand(2, 3, 10, 40)), "at least 11 pixels"),
    ((torch.rand(2, 3, 20, 40), torch.rand(2, 3, 20, 41)), "target must have"),
    ((torch.rand(2, 3, 20, 40), torch.rand(2, 3, 20, 40), torch.rand(3, 1, 20, 40)), "weight must have"),
    ((torch.rand(2, 3, 20, 40), torch.rand(2, 3, 20, 40).requires_grad_()), "target has requires_grad"),
])  # fmt: skip
def test_a_wrong_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ssim_l1(*arguments)


def test_torch_library_checks_of_the_loss_pass():
    image, target, weight = pictures(dtype=torch.float32)
    torch.library.opcheck(image_loss.forward_op, (image.requires_grad_(), target, weight, True))


def test_the_loss_compiles_without_a_break():
    image, target, weight = pictures(dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: sum(v.sum() for v in ssim_l1(*a)), fullgraph=True, backend="aot_eager")
    leaves = [image.clone().requires_grad_() for _ in range(2)]
    for function, leaf in zip((compiled, lambda *a: sum(v.sum() for v in ssim_l1(*a))), leaves, strict=True):
        function(leaf, target, weight).backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)
