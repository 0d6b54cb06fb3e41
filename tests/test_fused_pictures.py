"""What losses compare, as one kernel (utils/fused_pictures.py), against plain torch (utils/losses.py)."""

import pytest
import torch

from utils.losses import pictures

fused = pytest.importorskip("utils.fused_pictures", reason="triton is not installed (torch's CUDA builds for Linux bring it)")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def given(batch, height, width):
    """rgb, alpha, filmed, mask, plain, lips, eyes; the filmed pictures are the first channels of four, as TrainingSet has them."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(batch, 5, height, width, generator=generator)
    pixels = torch.randint(256, (batch, 4, height, width), generator=generator, dtype=torch.uint8)
    lips = torch.tensor([[[1, 2, 6, 5]], [[0, 0, 0, 0]]])[:batch]
    eyes = torch.tensor([[[0, 0, 4, 3], [3, 1, width, 4]], [[2, 2, 3, 3], [5, 0, 5, 9]]])[:batch]
    rgb, alpha = drawn[:, :3].contiguous().requires_grad_(), drawn[:, 3:4].contiguous().requires_grad_()
    return rgb, alpha, pixels[:, :3], pixels[:, 3:] > 127, torch.rand(batch, 3, 1, 1, generator=generator), lips, eyes


@pytest.mark.parametrize(("height", "width"), [(5, 7), (40, 33)])
def test_pictures_weights_and_gradients_of_the_kernel_are_those_of_plain_torch(height, width):
    arguments = given(2, height, width)
    want, got = pictures(*arguments), fused.pictures(*(x.to(DEVICE) for x in arguments))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-6)
        assert a.requires_grad == b.requires_grad
    to_image, to_missed = torch.randn(want[0].shape), torch.tensor([2.0, -3.0])
    totals = [(out[0].cpu() * to_image).sum() + (out[3].cpu() * to_missed).sum() for out in (got, want)]
    for a, b in zip(*(torch.autograd.grad(total, arguments[:2]) for total in totals), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_what_the_plain_colour_hides_counts_for_nothing_but_the_mask():
    rgb, alpha, filmed, mask, *others = given(2, 5, 7)
    shown = pictures(torch.zeros_like(rgb), torch.zeros_like(alpha), filmed, torch.zeros_like(mask), *others)
    assert torch.equal(shown[0], shown[1]) and shown[3].eq(0).all()
    assert shown[2][:, 0].eq(1).all() and shown[2][0, 1].sum() == 15 and shown[2][1, 1:].sum() == 1
