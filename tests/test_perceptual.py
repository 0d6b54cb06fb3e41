"""ST-LPIPS: its weights load strictly, equal pictures are at distance 0, worse pictures farther, shifted ones hardly at all."""

from types import SimpleNamespace

import pytest
import torch

from utils import model_store
from utils.errors import UserError
from utils.image_metrics import blur, gaussian_kernel
from utils.losses import perceptual_distance, random_square, square_crops
from utils.perceptual import BlurPool, PerceptualLoss, _alex_slices, _Network, _vgg_slices, distance

BINOMIAL = torch.tensor([1.0, 2.0, 1.0]) * torch.tensor([[1.0], [2.0], [1.0]]) / 16


def picture(size=96):
    """Three discs with soft texture on a gradient."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    planes = [0.3 + 0.2 * x, 0.5 + 0.2 * y, 0.4 - 0.1 * x * y]
    for c, (a, b, r) in enumerate(((-0.3, 0.1, 0.4), (0.4, -0.2, 0.3), (0.1, 0.5, 0.25))):
        planes[c] = planes[c] + 0.4 * torch.sigmoid((r - ((x - a) ** 2 + (y - b) ** 2).sqrt()) * 60)
    texture = blur(torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1)), gaussian_kernel(0.8), "replicate")
    return (torch.stack(planes)[None] + 0.2 * texture).clamp(0, 1)


@pytest.fixture(scope="module")
def loss():
    weights = model_store.find("stlpips_alex")
    if weights is None:
        pytest.skip("needs the ST-LPIPS weights (python -m utils.model_store fetch stlpips_alex)")
    return PerceptualLoss("alex", weights)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_published_weights_load_strictly_and_give_zero_for_equal_pictures(net):
    weights = model_store.find(f"stlpips_{net}")
    if weights is None:
        pytest.skip(f"needs the ST-LPIPS weights (python -m utils.model_store fetch stlpips_{net})")
    x = picture(64)
    with torch.no_grad():
        assert (loss := PerceptualLoss(net, weights))(x, x).item() == 0
    for name, filt in loss.network.state_dict().items():
        if name.endswith("filt"):  # what utils/fused_pool.py takes for granted
            torch.testing.assert_close(filt, BINOMIAL.expand_as(filt))


def test_the_distance_grows_with_blur_and_noise(loss):
    x = picture()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    blurred = [loss(blur(x, gaussian_kernel(s), "replicate"), x).item() for s in (0.7, 1.5, 3.0)]
    noisy = [loss((x + s * noise).clamp(0, 1), x).item() for s in (0.02, 0.05, 0.1)]
    assert 0 < blurred[0] < blurred[1] < blurred[2] and 0 < noisy[0] < noisy[1] < noisy[2]


def test_a_shift_by_a_pixel_costs_less_than_noise_of_the_same_mean_square_error(loss):
    x = picture()
    shifted = torch.cat([x[..., :1], x[..., :-1]], -1)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    noisy = x + noise * (shifted - x).square().mean().sqrt() / noise.square().mean().sqrt()
    assert loss(shifted, x).item() < 0.2 * loss(noisy, x).item()


def test_the_gradient_points_downhill_and_kept_target_features_give_the_same_distance(loss):
    y = picture().repeat(2, 1, 1, 1)
    x = (y + 0.05 * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))).requires_grad_()
    before = loss(x, y)
    assert before.shape == (2,)
    before.sum().backward()
    with torch.no_grad():
        after = loss(x - 0.002 * x.grad.sign(), loss.features(y))
        torch.testing.assert_close(loss(x, loss.features(y)), before)
    assert (after < before).all()
    assert all(parameter.grad is None for parameter in loss.parameters())


@pytest.mark.parametrize("shape", [(2, 64, 5, 7), (3, 48, 3, 3)], ids=["power of two", "padded"])
def test_the_fused_distance_and_its_gradient_equal_the_plain_ones(shape):
    fused = pytest.importorskip("utils.fused_distance", reason="triton is not installed (torch's CUDA builds for Linux bring it)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand((2, *shape), generator=generator)
    a, weight = a.requires_grad_(), torch.rand((1, shape[1], 1, 1), generator=generator)
    want = distance(a, b, weight)
    got = fused.distance(*(x.to(device) for x in (a, b, weight)))
    torch.testing.assert_close(got.cpu(), want)
    each = torch.arange(1.0, 1 + len(a))
    torch.testing.assert_close(torch.autograd.grad((got.cpu() * each).sum(), a)[0], torch.autograd.grad((want * each).sum(), a)[0])


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("size", [(5, 8), (6, 7), (9, 19)])
def test_the_fused_pool_and_its_gradient_equal_the_plain_ones(window, size):
    fused = pytest.importorskip("utils.fused_pool", reason="triton is not installed (torch's CUDA builds for Linux bring it)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = BlurPool(70, window)
    plain.filt.copy_(BINOMIAL)
    x = torch.randn(2, 70, *size, generator=torch.Generator().manual_seed(0)).relu().requires_grad_()  # half are equal, at zero
    want, got = plain(x), fused.pool(x.to(device), window)
    torch.testing.assert_close(got.cpu(), want)
    each = torch.randn(want.shape)
    gradients = [torch.autograd.grad((out.cpu() * each).sum(), x)[0] for out in (got, want)]
    torch.testing.assert_close(*gradients)


def test_a_random_square_is_cut_out_as_it_is_and_the_same_in_every_picture():
    images = torch.rand(3, 3, 70, 90)
    boxes = random_square(images, 64)
    left, top, right, bottom = boxes[0, 0].tolist()
    assert (boxes == boxes[0]).all() and 0 <= left and right == left + 64 <= 90 and 0 <= top and bottom == top + 64 <= 70
    torch.testing.assert_close(square_crops(images, boxes, 64), images[:, :, top:bottom, left:right], rtol=0, atol=1e-4)


def test_views_count_the_same_together_and_apart(loss):
    x, y, lips = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64), torch.tensor([[[4, 8, 40, 44]], [[0, 0, 0, 0]]])

    def total(*views):
        config = SimpleNamespace(perceptual_on=views, perceptual_side=64)
        return perceptual_distance(config, loss, x, y, lips)

    torch.testing.assert_close(total("lips", "window", "square"), total("lips") + total("window") + total("square"))


@pytest.mark.parametrize("damage", ["truncated", "another network", "no weights"])
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, damage):
    path = tmp_path / "alex.pth"
    torch.save(_Network((_vgg_slices if damage == "another network" else _alex_slices)()).state_dict(), path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:100_000])
    if damage == "no weights":
        torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="alex.pth"):
        PerceptualLoss("alex", path)
