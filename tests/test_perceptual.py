"""ST-LPIPS: its weights load strictly, equal pictures are at distance 0, worse pictures farther, shifted ones hardly at all."""

import pytest
import torch

from utils import model_store
from utils.errors import UserError
from utils.image_metrics import blur, gaussian_kernel
from utils.perceptual import PerceptualLoss, _alex_slices, _Network, _vgg_slices


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
        assert PerceptualLoss(net, weights)(x, x).item() == 0


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
