"""Errors of single training frames are learned beside the head, not by it."""

import argparse

import torch

import arguments
from scene.corrections import FrameCorrections
from scene.deformation import Surfels
from utils.pose import quaternion_to_matrix


def surfels(batch=3, count=40):
    torch.manual_seed(0)
    rotation = torch.nn.functional.normalize(torch.randn(batch, count, 4), dim=-1)
    xyz, still = torch.randn(batch, count, 3), torch.zeros(1, count, 2)
    return Surfels(xyz, still, rotation, still[..., :1], still[..., :1, None].expand(-1, -1, -1, 3))


def test_a_correction_turns_and_shifts_the_whole_head_as_one():
    made = FrameCorrections(200, pose=True, exposure=False)
    with torch.no_grad():
        made.pose[100] = torch.tensor([0.004, -0.006, 0.003, 0.02, 0.0, -0.01])
    before, frame = surfels(), torch.tensor([10, 100, 190])
    after = made.posed(before, frame)
    applied = made.pose[100] * (1 - 1 / 51)  # less the mean over a second on either side
    turn = torch.linalg.matrix_exp(torch.tensor([[0, -1, 0], [1, 0, 0], [0, 0, 0.0]]) * applied[2]
                                   + torch.tensor([[0, 0, 1], [0, 0, 0], [-1, 0, 0.0]]) * applied[1]
                                   + torch.tensor([[0, 0, 0], [0, 0, -1], [0, 1, 0.0]]) * applied[0])  # fmt: skip
    torch.testing.assert_close(after.xyz[1], before.xyz[1] @ turn.T + applied[3:], atol=2e-4, rtol=0)
    got, wanted = quaternion_to_matrix(after.rotation[1]), turn @ quaternion_to_matrix(before.rotation[1])
    torch.testing.assert_close(got, wanted, atol=2e-4, rtol=0)
    torch.testing.assert_close(after.xyz[::2], before.xyz[::2])
    assert after.opacity is before.opacity


def test_a_drift_of_the_whole_clip_is_not_corrected_and_cannot_move_the_head_away_from_held_out_frames():
    made = FrameCorrections(200, pose=True, exposure=True)
    with torch.no_grad():
        made.pose.copy_(torch.linspace(0, 0.01, 200)[:, None].expand(-1, 6))
        made.exposure.fill_(0.1)
    before, frame = surfels(), torch.tensor([60, 100, 140])
    torch.testing.assert_close(made.posed(before, frame).xyz, before.xyz, atol=1e-5, rtol=0)
    rgb = torch.rand(3, 3, 8, 8)
    torch.testing.assert_close(made.exposed(rgb, torch.ones(3, 1, 8, 8), frame), rgb)


def test_exposure_leaves_the_empty_picture_empty():
    made = FrameCorrections(200, pose=False, exposure=True)
    with torch.no_grad():
        made.exposure[100] = 0.05
    alpha = torch.zeros(1, 1, 8, 8)
    alpha[..., :4] = 1
    drawn = made.exposed(0.5 * alpha.expand(-1, 3, -1, -1), alpha, torch.tensor([100]))
    assert (drawn[..., 4:] == 0).all() and (drawn[..., :4] > 0.56).all()


def test_corrections_cost_by_their_size_and_nothing_where_they_are_off():
    config = arguments.merge(argparse.Namespace(lambda_pose=1.0))
    made = FrameCorrections(10, pose=True, exposure=False)
    assert made.losses(config)["pose"] == 0
    with torch.no_grad():
        made.pose.fill_(0.005)
    torch.testing.assert_close(made.losses(config)["pose"], torch.tensor(1.0))
    off = FrameCorrections(10, pose=False, exposure=False)
    assert off.losses(config) == {} and not list(off.parameters())


def test_the_head_learns_the_pose_of_a_frame_that_is_off():
    """A head seen from a frame whose pose is wrong by a turn and a shift: the correction finds them."""
    torch.manual_seed(0)
    made = FrameCorrections(120, pose=True, exposure=False)
    still, frame = surfels(1), torch.tensor([60])
    error = torch.tensor([0.003, 0.005, -0.004, 0.01, -0.02, 0.0])
    target = still.xyz + torch.linalg.cross(error[:3].expand_as(still.xyz), still.xyz) + error[3:]
    optimizer = torch.optim.Adam(made.parameters(), 1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        (made.posed(still, frame).xyz - target).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(made.posed(still, frame).xyz, target, atol=1e-3, rtol=0)
