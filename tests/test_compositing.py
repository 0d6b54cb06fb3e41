"""Compositing: plain alpha is the formula, feathering leaves the inside alone, keeps to the shape and makes no halo."""

import pytest
import torch

from gaussian_renderer.compositing import composite, edge_weight, from_bytes, to_bytes


def disc(size=128, radius=0.6, cx=0.0, cy=0.0, soft=80.0):
    """(1, 1, size, size) alpha of a disc with a slightly soft edge."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    return torch.sigmoid((radius - ((x - cx) ** 2 + (y - cy) ** 2).sqrt()) * soft)[None, None]


def test_without_feather_it_is_the_over_operator():
    generator = torch.Generator().manual_seed(0)
    alpha = torch.rand(2, 1, 8, 8, generator=generator)
    rgb = torch.rand(2, 3, 8, 8, generator=generator) * alpha
    backdrop = torch.rand(2, 3, 8, 8, generator=generator)
    torch.testing.assert_close(composite(rgb, alpha, backdrop), rgb + (1 - alpha) * backdrop)


@pytest.mark.parametrize("feather", [4.0, 8.0, 16.0])
def test_every_pixel_lies_between_head_and_backdrop_so_there_is_no_halo(feather):
    alpha, backdrop = disc(), torch.full((1, 3, 128, 128), 0.2)
    picture = composite(0.8 * alpha.expand(-1, 3, -1, -1), alpha, backdrop, feather)
    assert picture.min() >= 0.2 - 1e-6 and picture.max() <= 0.8 + 1e-6
    row = picture[0, 0, 64]
    assert (row[:64].diff() >= -1e-6).all() and (row[64:].diff() <= 1e-6).all()  # one rise, one fall: no ring
    assert row[64] == pytest.approx(0.8, abs=0.01) and row[0] == pytest.approx(0.2)


def test_a_head_on_a_backdrop_of_its_own_colour_leaves_no_trace():
    alpha, backdrop = disc(), torch.full((1, 3, 128, 128), 0.6)
    picture = composite(0.6 * alpha.expand(-1, 3, -1, -1), alpha, backdrop, 16)
    torch.testing.assert_close(picture, backdrop)


def test_the_feather_softens_the_edge_within_the_shape_and_spares_the_inside():
    alpha, sigma = disc(soft=1e4), 4.0
    weight = edge_weight(alpha, sigma) * alpha
    assert (weight <= alpha + 1e-6).all()
    inside = disc(radius=0.6 - 5.5 * sigma / 64, soft=1e4) > 0.5
    assert weight[inside].min() > 0.98
    row = weight[0, 0, 64]
    assert ((row > 0.15) & (row < 0.85)).sum() >= 2 * sigma  # both edges
    assert row.diff().abs().max() < 0.2


def test_small_holes_in_the_hair_are_not_widened():
    alpha = disc()
    alpha[..., 60:62, 60:62] = 0.3
    weight = edge_weight(alpha, 4.0)
    assert weight[..., 50:72, 50:72].min() > 0.99


def test_a_body_cut_by_the_border_does_not_fade_there():
    alpha = disc(cy=0.9)
    assert edge_weight(alpha, 4.0)[0, 0, -1, 64] > 0.99


def test_feather_scales_with_the_picture():
    small, large = disc(64, soft=1e4), disc(256, soft=1e4)
    profiles = []
    for alpha in (small, large):
        size = alpha.shape[-1]
        ones = torch.ones(1, 3, size, size)
        profiles.append(composite(alpha * ones, alpha, 0 * ones, 24.0)[0, 0, size // 2].view(64, -1).mean(1))
    assert (profiles[0] - profiles[1]).abs().max() < 0.12


def test_bytes_survive_the_trip_to_floats_and_back():
    pictures = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 16, 16, 3)
    assert torch.equal(to_bytes(from_bytes(pictures)), pictures)
    assert to_bytes(torch.tensor([-0.5, 0.5, 2.0]).view(1, 3, 1, 1)).flatten().tolist() == [0, 128, 255]
