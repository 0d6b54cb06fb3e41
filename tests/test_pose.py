"""Cameras: every conversion is checked by projecting points."""

import torch

from utils import pose


def random_pose(seed: int):
    generator = torch.Generator().manual_seed(seed)
    euler = torch.rand(4, 3, generator=generator, dtype=torch.float64) * 1.2 - 0.6
    translation = torch.tensor([0.1, -0.2, -7.0]) + torch.rand(4, 3, generator=generator, dtype=torch.float64)
    points = torch.rand(20, 3, generator=generator, dtype=torch.float64) * 2 - 1
    return euler, translation, points


def test_euler_angles_survive_the_round_trip_through_a_matrix():
    euler, _, _ = random_pose(0)
    torch.testing.assert_close(pose.matrix_to_euler(pose.euler_to_matrix(euler)), euler)


def test_rotation_is_rx_ry_and_the_transposed_rz():
    a = torch.tensor(0.3, dtype=torch.float64)
    c, s = a.cos(), a.sin()
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    rx = torch.stack([one, zero, zero, zero, c, -s, zero, s, c]).view(3, 3)
    ry = torch.stack([c, zero, s, zero, one, zero, -s, zero, c]).view(3, 3)
    rz_transposed = torch.stack([c, s, zero, -s, c, zero, zero, zero, one]).view(3, 3)
    torch.testing.assert_close(pose.euler_to_matrix(torch.stack([a, a, a])), rx @ ry @ rz_transposed)


def test_a_world_to_view_matrix_projects_points_to_the_tracker_cameras_pixels():
    euler, translation, points = random_pose(1)
    rotation = pose.euler_to_matrix(euler)
    expected = pose.project(points, rotation, translation, 1200.0, 256.0, 250.0)
    view = pose.world_to_view(pose.camera_to_world(rotation, translation))
    camera = points @ view[:, :3, :3].transpose(-1, -2) + view[:, None, :3, 3]
    pixels = 1200.0 * camera[..., :2] / camera[..., 2:] + torch.tensor([256.0, 250.0])
    assert (camera[..., 2] > 0).all()
    torch.testing.assert_close(pixels, expected)


def test_a_normals_quaternion_turns_z_onto_it_even_when_it_points_backwards():
    normals = torch.nn.functional.normalize(torch.randn(50, 3, dtype=torch.float64), dim=-1)
    normals = torch.cat([normals, torch.tensor([[0.0, 0.0, -1.0], [0.0, 0.0, 1.0]], dtype=torch.float64)])
    turned = pose.quaternion_to_matrix(pose.quaternion_of_normal(normals))[..., :, 2]
    torch.testing.assert_close(turned, normals, atol=1e-5, rtol=0)
