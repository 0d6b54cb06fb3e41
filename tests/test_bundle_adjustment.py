"""The solver, the tracks and the bundle adjustment, on scenes whose truth is known."""

from __future__ import annotations

import argparse
import dataclasses
import json

import cv2
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from data_utils import bundle_adjustment
from data_utils.bundle_adjustment import Bundle, adjust, read_bundle_adjustment, rigid_observations, write_bundle_adjustment
from data_utils.face_tracking.facemodel import FaceModel
from data_utils.face_tracking.fit import Fit
from data_utils.face_tracking.params import read_fit, write_params
from data_utils.optical_flow import load_flow
from data_utils.optical_flow.tracks import Tracks, track
from data_utils.pose_solver import Poses, SmoothMotion, linearise, project, solve_arrow, still_jitter, tensor
from utils.dataset_folder import DatasetFolder
from utils.errors import UserError
from utils.image import write_rgb
from utils.pose import euler_to_matrix
from utils.pose import project as project_torch

CENTRE, FOCAL = np.array([256.0, 256.0]), 1200.0


def head_motion(frames: int, still_from: int | None = None) -> Poses:
    """A head that nods and turns by some degrees, and from `still_from` on keeps still."""
    time = np.minimum(np.arange(frames), still_from or frames) / 25
    turn = np.stack([0.06 * np.sin(2 * time), 0.12 * np.sin(1.3 * time + 1), 0.04 * np.sin(3.1 * time)], 1)
    shift = np.stack([0.2 * np.sin(1.1 * time), 0.1 * np.sin(1.7 * time), -7 + 0.2 * np.sin(0.7 * time)], 1)
    return Poses(Rotation.from_rotvec(turn).as_matrix(), shift)


def shaken(poses: Poses, random: np.random.Generator, angle: float = 0.01, shift: float = 0.01) -> Poses:
    return poses.moved(random.normal(0, 1, (len(poses.translation), 6)) * ([angle] * 3 + [shift] * 3))


def degrees(a: Poses, b: Poses, aligned: bool = False) -> float:
    """RMS angle between two clips' rotations; `aligned`: after the one rotation of the whole that fits best."""
    turn = Rotation.from_matrix(a.rotation @ b.rotation.transpose(0, 2, 1))
    turn = turn.mean().inv() * turn if aligned else turn
    return float(np.degrees(np.sqrt((turn.magnitude() ** 2).mean())))


@pytest.fixture
def scene():
    """100 frames of 80 rigid points; tracks with 0.3 px of noise, 5% gross outliers and 10% hidden; the tracker's poses shake."""
    random = np.random.default_rng(0)
    poses = head_motion(100, still_from=60)
    points = random.uniform(-0.7, 0.7, (80, 3)) * (1, 1, 0.6)
    pixels = project(points, poses, FOCAL, CENTRE) + random.normal(0, 0.3, (100, 80, 2))
    wrong = random.random((100, 80)) < 0.05
    pixels[wrong] += random.normal(0, 15, (wrong.sum(), 2))
    guess = points + random.normal(0, 0.02, points.shape)
    tracks = Tracks(pixels.astype(np.float32), random.random((100, 80)) > 0.1, guess, np.full(80, 0.05), [0])
    start = Bundle(shaken(poses, random), tracks.points, FOCAL * 1.01)
    return poses, points, tracks, start


def test_projection_is_that_of_utils_pose():
    poses, points = head_motion(3), np.random.default_rng(0).normal(size=(5, 3))
    ours = project(points, poses, FOCAL, CENTRE)
    theirs = project_torch(*map(torch.from_numpy, (points, poses.rotation, poses.translation)), FOCAL, *CENTRE)
    assert np.allclose(ours, theirs.numpy())


def test_linearised_gradient_agrees_with_finite_differences():
    random = np.random.default_rng(1)
    poses, points = head_motion(2), random.normal(0, 0.5, (4, 3))
    observed, weight = project(points, poses, FOCAL, CENTRE) + random.normal(0, 3, (2, 4, 2)), random.uniform(0.5, 2, (2, 4))

    def loss(moved: Poses, shape: np.ndarray, focal: float) -> float:
        return 0.5 * float((weight[..., None] * (project(shape, moved, focal, CENTRE) - observed) ** 2).sum())

    part, step = linearise(tensor(points), poses, FOCAL, CENTRE, tensor(observed), tensor(weight)), 1e-6
    for frame, axis in ((0, 0), (0, 4), (1, 2), (1, 5)):
        move = np.zeros((2, 6))
        move[frame, axis] = step
        numeric = (loss(poses.moved(move), points, FOCAL) - loss(poses.moved(-move), points, FOCAL)) / (2 * step)
        assert part.pose_gradient[frame, axis] == pytest.approx(numeric, rel=1e-4)
    move = np.zeros((4, 3))
    move[2, 1] = step
    numeric = (loss(poses, points + move, FOCAL) - loss(poses, points - move, FOCAL)) / (2 * step)
    assert part.point_gradient[:, 2, 1].sum() == pytest.approx(numeric, rel=1e-4)
    numeric = (loss(poses, points, FOCAL * np.exp(step)) - loss(poses, points, FOCAL * np.exp(-step))) / (2 * step)
    assert part.focal_gradient == pytest.approx(numeric, rel=1e-4)


def test_arrow_solver_agrees_with_the_dense_solution():
    random = np.random.default_rng(2)
    frames, shared, damping = 7, 5, 0.1
    poses = head_motion(frames)
    motion = SmoothMotion(np.arange(frames), poses, FOCAL, 0.5)
    root = random.normal(size=(6 * frames + shared, 200))
    dense = root @ root.T
    for f in range(frames):  # poses are coupled by the motion prior alone
        for g in range(frames):
            if f != g:
                dense[6 * f : 6 * f + 6, 6 * g : 6 * g + 6] = 0
    pose = np.stack([dense[6 * f : 6 * f + 6, 6 * f : 6 * f + 6] for f in range(frames)])
    border = dense[: 6 * frames, 6 * frames :].reshape(frames, 6, shared)
    corner, gradient = dense[6 * frames :, 6 * frames :], random.normal(size=6 * frames + shared)
    pose_gradient, shared_gradient = gradient[: 6 * frames].reshape(frames, 6), gradient[6 * frames :]
    step, shared_step = solve_arrow(pose, pose_gradient, border, corner, shared_gradient, damping, poses, motion)

    band, added = np.zeros((18, 6 * frames)), np.zeros((frames, 6))
    motion.add(band, added, poses)
    for k in range(18):
        for j in range(6 * frames - k):
            dense[j + k, j] += band[k, j]
            if k:
                dense[j, j + k] += band[k, j]
    dense += np.diag(damping * np.diag(dense))
    expected = -np.linalg.solve(dense, gradient + np.r_[added.ravel(), np.zeros(shared)])
    assert np.allclose(np.r_[step.ravel(), shared_step], expected, rtol=1e-5, atol=1e-8)


def test_motion_prior_gradient_agrees_with_finite_differences():
    poses = shaken(head_motion(6), np.random.default_rng(3), 0.002, 0.01)
    motion = SmoothMotion(np.arange(6), poses, FOCAL, 0.5)
    gradient = np.zeros((6, 6))
    motion.add(np.zeros((18, 36)), gradient, poses)
    for frame, axis in ((0, 0), (2, 1), (3, 4), (5, 5)):
        move = np.zeros((6, 6))
        move[frame, axis] = 1e-6
        numeric = (motion.cost(poses.moved(move)) - motion.cost(poses.moved(-move))) / 2e-6
        assert gradient[frame, axis] == pytest.approx(numeric, rel=0.02)


def test_poses_are_recovered_in_spite_of_noise_outliers_and_hidden_points(scene):
    poses, _, tracks, start = scene
    bundle, keep = adjust(start, tracks, np.arange(100), CENTRE)
    assert degrees(start.poses, poses) > 0.8
    assert degrees(bundle.poses, poses) < 0.25
    assert np.abs(bundle.poses.translation - poses.translation).max() < 0.005 * 7
    assert 20 <= len(keep) < 80


def test_a_still_head_shakes_less_than_with_a_pose_for_each_frame_alone(scene):
    _, points, tracks, start = scene
    ids = np.arange(100)
    bundle, _ = adjust(start, tracks, ids, CENTRE)
    alone = []
    for frame in ids:
        shown = tracks.visible[frame]
        camera = np.array([[-FOCAL, 0, 256], [0, FOCAL, 256], [0, 0, 1]])  # x / z with z < 0
        _, turn, shift = cv2.solvePnP(points[shown], tracks.pixels[frame, shown].astype(float), camera, None,
                                      cv2.Rodrigues(start.poses.rotation[frame])[0], start.poses.translation[frame, :, None].copy(),
                                      useExtrinsicGuess=True)  # fmt: skip
        alone.append((cv2.Rodrigues(turn)[0], shift[:, 0]))
    alone = Poses(np.array([a for a, _ in alone]), np.array([b for _, b in alone]))
    ours, frames = still_jitter(project(points, bundle.poses, bundle.focal, CENTRE), ids)
    theirs, _ = still_jitter(project(points, alone, FOCAL, CENTRE), ids)
    assert frames > 20
    assert ours < 0.1
    assert ours < theirs / 3


def test_motion_is_not_lagged_or_damped(scene):
    poses, _, tracks, start = scene
    bundle, _ = adjust(start, tracks, np.arange(100), CENTRE)
    true, found = (Rotation.from_matrix(p.rotation[:60]).as_rotvec()[:, 0] for p in (poses, bundle.poses))
    slope = np.polyfit(true - true.mean(), found - found.mean(), 1)[0]
    assert slope == pytest.approx(1, abs=0.05)
    errors = [np.abs(found[3 + lag : 57 + lag] - true[3:57]).mean() for lag in range(-3, 4)]
    assert int(np.argmin(errors)) == 3


def test_a_jump_of_the_pose_is_not_smeared(scene):
    poses, points, tracks, start = scene
    after = np.arange(100) >= 50
    poses.translation[after] += (0.3, 0, 0)
    start.poses.translation[after] += (0.3, 0, 0)
    tracks.pixels[after, :, 0] += FOCAL * 0.3 / 7
    tracks.pixels[:] = project(points, poses, FOCAL, CENTRE)
    bundle, _ = adjust(start, tracks, np.arange(100), CENTRE)
    assert np.abs(bundle.poses.translation[48:52, 0] - poses.translation[48:52, 0]).max() < 0.01


def test_the_gauge_is_the_trackers(scene):
    _, points, tracks, start = scene
    bundle, keep = adjust(start, tracks, np.arange(100), CENTRE)
    shift, turn = bundle.points.mean(0) - points[keep].mean(0), bundle.poses.rotation @ start.poses.rotation.transpose(0, 2, 1)
    assert np.abs(shift).max() < 0.02
    assert np.degrees(Rotation.from_matrix(turn).mean().magnitude()) < 0.5


def test_a_long_clip_takes_structure_from_some_frames_and_poses_from_all(scene, monkeypatch):
    poses, _, tracks, start = scene
    monkeypatch.setattr(bundle_adjustment, "STRUCTURE_FRAMES", 30)
    bundle, _ = adjust(start, tracks, np.arange(100), CENTRE)
    assert bundle.poses.rotation.shape == (100, 3, 3)
    assert degrees(bundle.poses, poses, aligned=True) < 0.15  # where the whole points to is the guess's doing


def test_poses_are_stored_in_metres_and_dropped_frames_are_interpolated(tmp_path):
    folder, poses = DatasetFolder(tmp_path), head_motion(6)
    ids = np.array([1, 2, 5])
    write_bundle_adjustment(folder, Bundle(poses[ids], np.zeros((1, 3)), 900.0), ids, 7)
    stored = torch.load(folder.bundle_adjustment, weights_only=True)
    assert stored["trans"].shape == stored["euler"].shape == (7, 3)
    assert np.allclose(stored["trans"][2].numpy(), poses.translation[2] / 10, atol=1e-6)
    assert np.allclose(stored["trans"][3].numpy(), (2 * poses.translation[2] + poses.translation[5]) / 30, atol=1e-6)
    assert torch.equal(stored["trans"][0], stored["trans"][1]) and torch.equal(stored["trans"][5], stored["trans"][6])
    assert np.allclose(euler_to_matrix(stored["euler"])[5].numpy(), poses.rotation[5], atol=1e-6)
    back, focal = read_bundle_adjustment(folder)
    assert np.allclose(back.translation[2], poses.translation[2], atol=1e-5) and focal == 900


def wall(folder: DatasetFolder, frames: int, side: int = 192) -> tuple[Fit, Poses]:
    """A data set whose head is a textured wall, turning and shifting; and its true poses. The fit's poses shake about them."""
    random = np.random.default_rng(4)
    x, y = np.meshgrid(np.linspace(-0.8, 0.8, 9), np.linspace(-0.8, 0.8, 9))
    mean = np.stack([x.ravel(), y.ravel(), np.zeros(81)], 1)
    quads = np.array([[r * 9 + c, r * 9 + c + 1, r * 9 + c + 10, r * 9 + c + 9] for r in range(8) for c in range(8)])
    ids = np.arange(81)
    model = FaceModel("wall", mean, np.zeros((1, 81, 3)), np.zeros((1, 81, 3)), np.concatenate([quads[:, :3], quads[:, [0, 2, 3]]]),
                      ids, ids, np.ones(81, bool))  # fmt: skip
    poses, focal, centre = head_motion(frames), FOCAL * side / 512, np.array([side, side]) / 2
    texture = cv2.GaussianBlur(random.integers(0, 256, (400, 400, 3), dtype=np.uint8), (0, 0), 3)
    texture = cv2.normalize(texture, None, 0, 255, cv2.NORM_MINMAX)
    corners = np.array([[-0.8, 0.8, 0], [0.8, 0.8, 0], [0.8, -0.8, 0], [-0.8, -0.8, 0]])
    for i, pixels in enumerate(project(corners, poses, focal, centre)):
        edge = np.array([[0, 0], [399, 0], [399, 399], [0, 399]], np.float32)
        matrix = cv2.getPerspectiveTransform(edge, (pixels - 0.5).astype(np.float32))
        write_rgb(folder.frame(i), cv2.warpPerspective(texture, matrix, (side, side), borderValue=(90, 90, 90)))
    shaky = shaken(poses, random, 0.01, 0.01)
    return Fit(model, shaky, np.zeros(1), np.zeros((frames, 1)), focal), poses


def test_flow_tracks_and_adjustment_find_the_pose_of_a_textured_wall(tmp_path):
    folder, frames = DatasetFolder(tmp_path), 12
    fit, poses = wall(folder, frames)
    ids, centre = np.arange(frames), np.array([96.0, 96.0])
    tracks = track(fit, folder, ids, centre, load_flow("dis"), np.zeros(frames))
    assert tracks.visible.mean() > 0.6
    bundle, _ = adjust(Bundle(fit.poses, tracks.points, fit.focal), tracks, ids, centre)

    def relative(p: Poses) -> Poses:  # the gauge is free: compare turns from the first frame
        return Poses(p.rotation @ p.rotation[0].T, p.translation)

    before, after = (degrees(relative(p), relative(poses)) for p in (fit.poses, bundle.poses))
    assert after < 0.4
    assert after < before / 2


def test_stage_writes_tracks_and_poses_and_reports_its_figures(tmp_path, monkeypatch):
    folder, frames = DatasetFolder(tmp_path), 8
    fit, _ = wall(folder, frames)
    ids = np.array([0, 1, 2, 3, 5, 6, 7])
    folder.valid.write_text(json.dumps({"valid": ids.tolist(), "dropped": {"4": "no face"}}))
    np.savez(folder.face_landmarks, blendshapes=np.zeros((frames, 52), np.float32))
    write_params(folder, Fit(fit.model, fit.poses[ids], fit.identity, fit.expression[ids], fit.focal), ids, frames)
    monkeypatch.setattr("data_utils.face_tracking.params.load_face_model", lambda name: fit.model)
    facts = bundle_adjustment.run(folder, argparse.Namespace(flow="auto", face_model="auto", use_3dmm=False))
    stored = np.load(folder.tracks)
    assert stored["ids"].tolist() == ids.tolist()
    assert stored["tracks"].shape == (7, facts["keypoints"], 2) and stored["tracks"].dtype == np.float32
    assert stored["visible"].shape == (7, facts["keypoints"]) and stored["visible"].dtype == bool
    assert torch.load(folder.bundle_adjustment, weights_only=True)["euler"].shape == (frames, 3)
    assert facts["backend"] == "dis" and facts["reprojection_error_px"] < 1.5
    assert json.dumps(facts)


def test_a_data_set_tracked_with_another_face_model_is_refused_with_the_way_out(tmp_path, monkeypatch):
    folder = DatasetFolder(tmp_path / "of mesh")
    fit, _ = wall(folder, 3)
    fit = dataclasses.replace(fit, model=fit.model.with_expression(np.zeros((1, 81, 3))))  # stored beside the coefficients
    write_params(folder, fit, np.arange(3), 3)
    other = dataclasses.replace(fit.model, name="ict", mean=np.zeros((90, 3)), identity=np.zeros((1, 90, 3)))
    monkeypatch.setattr("data_utils.face_tracking.params.load_face_model", lambda name: other)
    with pytest.raises(UserError, match="not fitted with the face model 'ict'; run stage 7 again"):
        read_fit(folder, "ict")


@pytest.mark.parametrize(("noise", "warned"), [(0.3, False), (3.0, True)])
def test_tracks_that_miss_the_head_are_warned_of_though_the_rigid_ones_are_near_by_choice(noise, warned):
    random, poses, ids = np.random.default_rng(0), head_motion(40), np.arange(40)
    points = random.uniform(-0.7, 0.7, (80, 3))
    pixels = project(points, poses, FOCAL, CENTRE) + random.normal(0, noise, (40, 80, 2))
    tracks, bundle = Tracks(pixels, np.ones((40, 80), bool), points, np.full(80, 0.05), [0]), Bundle(poses, points, FOCAL)
    told = bundle_adjustment.facts(bundle, bundle, tracks, rigid_observations(bundle, tracks, CENTRE), ids, CENTRE, points)
    assert told["reprojection_error_px"] < 1 and told["reprojection_error_all_px"] == pytest.approx(noise * 2**0.5, rel=0.05)
    assert any(f"miss their tracks by {told['reprojection_error_all_px']:.2f} px" in text for text in told["warnings"]) == warned


def test_a_face_without_texture_is_refused_with_the_way_out(tmp_path):
    folder = DatasetFolder(tmp_path)
    fit, _ = wall(folder, 3)
    for i in range(3):
        write_rgb(folder.frame(i), np.full((192, 192, 3), 120, np.uint8))
    with pytest.raises(UserError, match="--use_3dmm"):
        track(fit, folder, np.arange(3), np.array([96.0, 96.0]), load_flow("dis"), np.zeros(3))


def test_an_unknown_flow_is_refused():
    with pytest.raises(UserError, match="dis"):
        load_flow("nothing")
