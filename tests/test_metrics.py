"""The metrics give known values on pictures and curves whose answer is known."""

import numpy as np
import pytest
import torch

from utils.constants import CLOTH, HAIR, HEAD_CLASSES, NECK, PART_CLASSES, SKIN
from utils.image_metrics import correlation_and_lag, jitter, lip_opening, lmd, masked_error, neck_ring, psnr, ssim


def picture(seed=0, size=48, batch=2):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def face(frames=60, scale=100.0, opening=None):
    """(F, 68, 2): eye corners `scale` apart, a nose bridge, inner lips `opening` (F,) of that distance apart."""
    points = np.random.default_rng(0).normal(size=(68, 2)) * scale * 0.1
    points[36], points[45] = (0, 0), (scale, 0)
    points = np.repeat(points[None], frames, 0)
    for upper, lower in ((61, 67), (62, 66), (63, 65)):
        points[:, upper] = (50, 80)
        points[:, lower, 0] = 50
        points[:, lower, 1] = 80 + scale * (np.zeros(frames) if opening is None else opening)
    return points


def test_psnr_of_a_constant_error_is_its_formula_inside_and_outside_a_mask():
    x, y = torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 16, 16)
    y[:, :, :8] = 0.1
    mask = torch.zeros(2, 1, 16, 16)
    mask[:, :, :8] = 1
    torch.testing.assert_close(psnr(x, y, mask), torch.tensor([20.0, 20.0]))
    torch.testing.assert_close(psnr(x, y), torch.full((2,), 20.0 + 10 * np.log10(2)).float())


def test_ssim_agrees_with_the_formula_evaluated_window_by_window():
    x, y = picture(0, 14, 1), (picture(0, 14, 1) * 0.7 + 0.3 * picture(1, 14, 1))
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for c in range(3):
        for i in range(4):
            for j in range(4):
                a, b = (p[0, c, i : i + 11, j : j + 11].double().numpy() for p in (x, y))
                ma, mb = (window * a).sum(), (window * b).sum()
                va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
                cov = (window * (a - ma) * (b - mb)).sum()
                values.append((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    assert float(ssim(x, y)[0]) == pytest.approx(np.mean(values), abs=1e-5)


def test_ssim_is_one_for_equal_pictures_a_value_per_picture_and_differentiable():
    x = picture()
    noisy = x.clone()
    noisy[1] = picture(1)[1]
    noisy.requires_grad_()
    values = ssim(noisy, x)
    assert values.shape == (2,) and values[0].item() == pytest.approx(1, abs=1e-5) and values[1].item() < 0.2
    values.sum().backward()
    assert torch.isfinite(noisy.grad).all() and noisy.grad[1].abs().sum() > 0
    assert torch.autograd.gradcheck(lambda a: ssim(a, x[:1, :, :12, :12].double()),
                                    picture(3, 12, 1).double().requires_grad_())  # fmt: skip


def test_lmd_ignores_where_the_head_is_and_sees_how_the_lips_are():
    true = face()
    pixels, relative = lmd(true + np.array([13.0, -7.0]), true)
    np.testing.assert_allclose(pixels, 0, atol=1e-9)
    wider = true.copy()
    wider[:, 48:68, 0] = wider[:, 48:68, 0] * 1.2
    pixels, relative = lmd(wider, true)
    assert pixels.min() > 0.5 and np.allclose(relative, pixels / 100)


def test_the_lag_of_a_late_mouth_is_positive_and_its_correlation_high():
    time = np.arange(120)
    opening = 0.1 + 0.05 * np.sin(time / 3) * np.cos(time / 11)
    true = lip_opening(face(120, opening=opening))
    np.testing.assert_allclose(true, opening, atol=1e-9)
    late = lip_opening(face(120, scale=250, opening=np.roll(opening, 3)))
    value, lag = correlation_and_lag(late, true)
    assert lag == 3 and value < 0.9
    assert correlation_and_lag(true, true) == (pytest.approx(1), 0)
    late[40:50] = np.nan  # frames in which no face was found
    assert correlation_and_lag(late, true)[1] == 3


def test_a_mouth_that_never_moves_has_no_correlation():
    value, lag = correlation_and_lag(np.full(40, 0.1), np.sin(np.arange(40)))
    assert np.isnan(value) and lag == 0


def test_jitter_sees_shaking_and_not_steady_motion():
    steady = face() + np.arange(60)[:, None, None] * 1.5
    assert jitter(steady) == pytest.approx(0, abs=1e-9)
    shaking = steady + 0.25 * (-1.0) ** np.arange(60)[:, None, None] * np.array([1.0, 0.0])
    assert jitter(shaking) == pytest.approx(1.0)
    shaking[10] = np.nan
    assert jitter(shaking) == pytest.approx(1.0)


def test_the_neck_ring_lies_where_the_head_meets_the_body():
    classes = np.zeros((60, 60), np.uint8)
    classes[10:40, 15:45] = SKIN
    classes[5:10, 15:45] = HAIR
    classes[40:50, 22:38] = NECK
    classes[50:, 5:55] = CLOTH
    ring = neck_ring(classes, HEAD_CLASSES, 4)
    assert ring[37:44, 25:35].all() and not ring[:34].any() and not ring[46:].any()
    assert not neck_ring(classes, PART_CLASSES["all"], 4).any()


def test_the_error_in_a_mask_is_that_of_its_pixels_only():
    x, y = torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    y[..., :4] = 0.2
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:4] = 1
    assert float(masked_error(x, y, mask)) == pytest.approx(51)
    assert torch.isnan(masked_error(x, y, mask * 0)).all()
