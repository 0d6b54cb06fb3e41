"""What is expected of surfels whatever the pictures say: attention by region, smooth motion, few and small surfels."""

import argparse
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import arguments
from scene.deformation import Surfels
from utils.priors import LARGE, AttentionRegions, Neighbours, surfel_losses

# a face in the plane z = 0 with the tip of its nose in the middle
FACE = np.array([[x, y, 0.2 * (x == 0 and y == 0)] for x in np.linspace(-1, 1, 21) for y in np.linspace(-1, 1, 21)], np.float32)
CHIN, BROW, HAIR = (0.0, -0.8, 0.05), (0.3, 0.7, 0.05), (0.0, 1.5, -0.3)


def surfels(count=50, batch=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = (count,) if batch is None else (batch, count)
    return Surfels(*(nn.Parameter(torch.randn(*shape, n, generator=g)) for n in (3, 2, 4, 1)), torch.zeros(*shape, 1, 3))


def config(**weights):
    return arguments.merge(argparse.Namespace(**weights))


def test_audio_belongs_to_the_lower_face_expression_to_the_upper_and_the_frame_code_off_the_face():
    unwanted = AttentionRegions(FACE).unwanted(torch.tensor([CHIN, BROW, HAIR]), ("audio", "expression", "camera", "frame"))
    assert unwanted.tolist() == [[0, 1, 0.5, 1], [1, 0, 0.5, 1], [1, 1, 0, 0]]


def test_attention_costs_what_goes_to_tokens_a_surfel_has_no_use_for():
    regions, names = AttentionRegions(FACE), ("audio", "camera")
    xyz = nn.Parameter(torch.tensor([CHIN, BROW]))
    attention = torch.tensor([[[0.9, 0.1], [0.3, 0.7]]], requires_grad=True)
    loss = regions.loss(attention, names, xyz)
    assert loss.item() == pytest.approx((0.5 * 0.1 + 0.3 + 0.5 * 0.7) / 2)
    loss.backward()
    assert attention.grad.tolist() == [[[0, 0.25], [0.5, 0.25]]]


def test_regions_and_neighbours_are_worked_out_again_only_when_surfels_are_replaced(monkeypatch):
    regions, neighbours = AttentionRegions(FACE), Neighbours()
    first = nn.Parameter(torch.randn(30, 3))
    a = regions.unwanted(first, ("audio",))
    neighbours.draw(first)
    monkeypatch.setattr("utils.priors._tree", None)
    neighbours.draw(first)
    assert regions.unwanted(first, ("audio",)) is a
    assert regions.unwanted(nn.Parameter(torch.randn(30, 3)), ("audio",)) is not a
    with pytest.raises(TypeError):
        neighbours.draw(nn.Parameter(torch.randn(30, 3)))


def test_a_neighbour_is_one_of_the_nearest_surfels_and_never_the_surfel_itself():
    xyz = torch.randn(200, 3)
    neighbours, order = Neighbours(4), torch.cdist(xyz, xyz).argsort(1)[:, 1:5]
    seen = torch.stack([neighbours.draw(xyz) for _ in range(40)], 1)
    assert (seen[:, :, None] == order[:, None]).any(2).all()
    assert all(len(set(row)) == 4 for row in seen[:20].tolist())


@pytest.mark.parametrize(
    "weight, attribute", [("lambda_opacity", "opacity"), ("lambda_scale", "scaling"), ("lambda_motion", "xyz")]
)
def test_each_prior_pulls_its_attribute_towards_less_and_is_absent_without_its_weight(weight, attribute):
    canonical, drawn, neighbours = surfels(), surfels(batch=2, seed=1), Neighbours()
    assert surfel_losses(config(), canonical, drawn, neighbours) == {}
    terms = surfel_losses(config(**{weight: 1.0}), canonical, drawn, neighbours)
    (loss,) = terms.values()
    loss.backward()
    value = getattr(drawn, attribute)
    with torch.no_grad():
        value -= 0.5 * value.grad / value.grad.abs().max()
    torch.manual_seed(0)
    before = surfel_losses(config(**{weight: 1.0}), canonical, surfels(batch=2, seed=1), neighbours)
    torch.manual_seed(0)
    after = surfel_losses(config(**{weight: 1.0}), canonical, drawn, neighbours)
    assert after.popitem()[1] < before.popitem()[1]


def test_small_surfels_and_a_head_that_moves_as_one_cost_nothing():
    canonical, neighbours = surfels(), Neighbours()
    drawn = Surfels(canonical.xyz[None] + 0.3, torch.full((1, 50, 2), float(np.log(LARGE / 2))), *(
        getattr(canonical, name)[None] for name in ("rotation", "opacity", "sh")))  # fmt: skip
    terms = surfel_losses(config(lambda_scale=1.0, lambda_motion=1.0), canonical, drawn, neighbours)
    assert terms["scale"].item() == 0 and terms["motion"].item() == pytest.approx(0, abs=1e-6)


def test_a_head_that_does_not_deform_has_no_motion_to_smooth():
    copied = dataclasses.replace(surfels(), xyz=surfels().xyz.clone())  # as a benchmark takes a coarse step apart
    assert surfel_losses(config(lambda_motion=1.0), surfels(), copied, Neighbours()) == {}


def test_embeddings_of_neighbours_are_drawn_together():
    canonical = surfels()
    canonical.embedding = nn.Parameter(torch.randn(50, 8))
    neighbours, optimizer = Neighbours(), torch.optim.Adam([canonical.embedding], 0.05)
    spread = canonical.embedding.std(0).mean().item()
    for _ in range(50):
        optimizer.zero_grad()
        surfel_losses(config(lambda_embedding=1.0), canonical, canonical, neighbours)["embedding"].backward()
        optimizer.step()
    assert canonical.embedding.std(0).mean().item() < 0.5 * spread
