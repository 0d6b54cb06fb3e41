"""The canonical mesh, the joint fit, and what stage 7 writes, on faces made from known coefficients and poses."""

from __future__ import annotations

import argparse
import json
import zipfile

import numpy as np
import pytest
import torch
from scipy.spatial import Delaunay
from scipy.spatial.transform import Rotation

from data_utils import face_tracking
from data_utils.face_tracking.facemodel import LIPS, FaceModel, load_face_model, read_canonical_mesh
from data_utils.face_tracking.fit import Fit, fit_clip
from data_utils.face_tracking.params import read_fit
from data_utils.face_tracking.photometric import FEWEST_FRAMES, refine
from data_utils.face_tracking.surface import subdivide, vertex_normals
from data_utils.pose_solver import Poses, project
from utils import model_store
from utils.dataset_folder import DatasetFolder
from utils.errors import UserError
from utils.image import write_rgb
from utils.ply import read_mesh

FOCAL, CENTRE, FRAMES = 1150.0, np.array([256.0, 256.0]), 60


@pytest.fixture(scope="module")
def model() -> FaceModel:
    if model_store.find("face_landmarker") is None:
        pytest.skip("needs face_landmarker.task (python -m utils.model_store fetch face_landmarker)")
    return load_face_model("mesh")


@pytest.fixture(scope="module")
def clip(model):
    """Landmarks (F, 478, 3) of a face that turns and opens its mouth, with a pixel of noise; and its true poses and shape."""
    random = np.random.default_rng(0)
    time = np.arange(FRAMES) / 25
    turn = np.stack([0.1 * np.sin(2 * time), 0.2 * np.sin(1.5 * time), 0.05 * np.sin(3 * time)], 1)
    shift = np.stack([0.2 * np.sin(time), 0.1 * np.cos(time), -7 + 0.2 * np.sin(time)], 1)
    poses = Poses(Rotation.from_rotvec(turn).as_matrix(), shift)
    shape = model.vertices(random.normal(0, 0.5, len(model.identity)), np.zeros((0,)))
    opening = np.zeros_like(shape)
    opening[model.mean[:, 1] < model.mean[list(LIPS), 1].mean(), 1] = -0.12  # the jaw falls
    points = shape + np.clip(np.sin(6 * time), 0, 1)[:, None, None] * opening
    camera = points @ poses.rotation.transpose(0, 2, 1) + shift[:, None]
    z = -(camera[..., 2] - shift[:, None, 2]) * FOCAL / 7
    landmarks = np.concatenate([project(points, poses, FOCAL, CENTRE), z[..., None]], 2) + random.normal(0, 1, (*z.shape, 3))
    landmarks = np.concatenate([landmarks, np.zeros((FRAMES, 10, 3))], 1).astype(np.float32)  # irises, unused
    return landmarks, poses, shape


def test_canonical_mesh_is_a_face_of_real_size_in_the_heads_frame(model):
    assert model.mean.shape == (468, 3) and model.triangles.shape == (898, 3)
    width, height, _ = np.ptp(model.mean, axis=0)
    assert 1.3 < width < 1.7 and 1.5 < height < 2.0  # dm
    assert np.abs(model.mean.mean(0)).max() < 1e-9
    nose, chin, forehead, right = model.mean[[4, 152, 10, 454]]
    assert nose[2] > 0.2 and chin[1] < -0.7 and forehead[1] > 0.7 and right[0] > 0.7
    assert (vertex_normals(model.mean, model.triangles)[:, 2] > 0).mean() > 0.9
    mirrored = model.mean * (-1, 1, 1)
    assert np.linalg.norm(mirrored[:, None] - model.mean, axis=2).min(1).max() < 1e-6


def test_identities_are_smooth_faces_of_the_same_size_and_place(model):
    for component in model.identity[:5]:
        assert np.abs(component.mean(0)).max() < 1e-9
        assert abs((component * model.mean).sum()) < 1e-6  # no change of size
    assert np.sqrt((model.identity**2).sum((0, 2)).mean()) == pytest.approx(0.035, rel=0.01)


def test_rigid_region_leaves_out_mouth_eyes_and_brows(model):
    assert 80 < model.rigid.sum() < 250
    assert model.rigid[[6, 10, 168]].all()  # bridge and top of the forehead
    assert not model.rigid[[0, 17, 33, 133, 159, 105, 334, 152]].any()  # lips, eye corners, lid, brows, chin


def test_a_file_that_is_no_landmarker_is_refused(tmp_path):
    plain, bundle = tmp_path / "plain.task", tmp_path / "cut.task"
    plain.write_bytes(b"<html>not found</html>")
    with zipfile.ZipFile(bundle, "w") as archive:
        archive.writestr("geometry_pipeline_metadata_landmarks.binarypb", b"\x0a\x20\x1d\x00\x00")
    for path in (plain, bundle):
        with pytest.raises(UserError, match="holds no canonical face mesh"):
            read_canonical_mesh(path)


def test_an_unknown_face_model_is_refused():
    with pytest.raises(UserError, match="mesh"):
        load_face_model("nobody")


def test_joint_fit_recovers_poses_shape_and_expression(model, clip):
    landmarks, poses, shape = clip
    fit = fit_clip(model, landmarks, np.arange(FRAMES), CENTRE)
    turn = fit.poses.rotation @ poses.rotation.transpose(0, 2, 1)
    offset = Rotation.from_matrix(turn).mean()
    error = np.degrees((Rotation.from_matrix(turn) * offset.inv()).magnitude())
    assert np.sqrt((error**2).mean()) < 0.5
    assert np.degrees(offset.magnitude()) < 3
    pixels = project(fit.vertices(), fit.poses, fit.focal, CENTRE)
    assert np.sqrt(((pixels - landmarks[:, :468, :2]) ** 2).sum(2).mean()) < 2.0
    rigid, open_mouth = model.rigid, fit.vertices()[:, 17, 1]
    assert np.corrcoef(open_mouth, np.clip(np.sin(6 * np.arange(FRAMES) / 25), 0, 1))[0, 1] < -0.95
    found = model.vertices(fit.identity, np.zeros(0))
    scale = (found[rigid] * shape[rigid]).sum() / (shape[rigid] ** 2).sum()
    assert np.sqrt(((found / scale - shape)[rigid] ** 2).sum(1).mean()) < 0.05
    assert max(np.abs(fit.identity).max(), np.abs(fit.expression).max()) <= 5


def test_coefficients_stay_within_five_deviations(model, clip):
    landmarks = clip[0].copy()
    landmarks[20, 200:300, :2] += 150  # one wild frame
    fit = fit_clip(model, landmarks, np.arange(FRAMES), CENTRE)
    assert max(np.abs(fit.identity).max(), np.abs(fit.expression).max()) <= 5


def test_subdivision_keeps_a_closed_surface_closed_and_smooths_it():
    points = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]], float)
    faces = np.array([[0, 2, 4], [2, 1, 4], [1, 3, 4], [3, 0, 4], [2, 0, 5], [1, 2, 5], [3, 1, 5], [0, 3, 5]])
    for _ in range(3):
        points, faces = subdivide(points, faces)
    assert (len(points), len(faces)) == (258, 512)  # Euler: V - E + F = 2
    assert (((vertex_normals(points, faces) * points).sum(1) / np.linalg.norm(points, axis=1)) > 0.9).all()
    radius = np.linalg.norm(points, axis=1)
    assert radius.max() / radius.min() < 1.25


def test_stage_writes_parameters_of_all_frames_and_a_coloured_face(model, clip, tmp_path):
    landmarks, poses, _ = clip
    folder, ids = DatasetFolder(tmp_path), np.array([i for i in range(FRAMES) if i not in (0, 30, 31)])
    image = np.zeros((512, 512, 3), np.uint8)
    image[:, :256], image[:, 256:] = (200, 60, 40), (40, 160, 60)
    for i in range(FRAMES):
        write_rgb(folder.frame(i), image)
    landmarks = landmarks.copy()
    landmarks[[0, 30, 31]] = np.nan
    np.savez(folder.face_landmarks, points=landmarks)
    folder.valid.write_text(json.dumps({"valid": ids.tolist(), "dropped": {}}))
    facts = face_tracking.run(folder, argparse.Namespace(face_model="auto"))

    params = torch.load(folder.track_params, weights_only=True)
    assert params["id"].shape[0] == 1 and params["exp"].shape[0] == FRAMES
    assert params["euler"].shape == params["trans"].shape == (FRAMES, 3) and params["focal"].shape == (1,)
    assert all(torch.isfinite(value).all() for value in params.values())
    assert torch.equal(params["trans"][0], params["trans"][1])
    assert (params["trans"][:, 2] < -5).all()
    between = params["trans"][29] + (params["trans"][32] - params["trans"][29]) / 3
    assert torch.allclose(params["trans"][30], between, atol=1e-4)
    fit = read_fit(folder, "mesh")
    assert np.abs(project(fit.vertices(), fit.poses, fit.focal, CENTRE)[ids] - landmarks[ids, :468, :2]).mean() < 1.5

    mesh = read_mesh(folder.fused)
    assert 5000 <= len(mesh.points) <= 9000 and facts["fused_vertices"] == len(mesh.points)
    assert np.allclose(np.linalg.norm(mesh.normals, axis=1), 1, atol=1e-4)
    left, right = (mesh.colours[mesh.points[:, 0] * side > 0.4].mean(0) * 255 for side in (-1, 1))
    assert np.abs(left - (200, 60, 40)).max() < 12 and np.abs(right - (40, 160, 60)).max() < 12
    assert facts["backend"] == "mesh" and facts["landmark_error_px"] < 2 and "photometric" not in facts
    assert json.dumps(facts)

    told = face_tracking.run(folder, argparse.Namespace(face_model="auto", photometric=True))["photometric"]
    assert 0 <= told["explained_before"] <= told["explained_after"] <= 1 and 0 <= told["frames_kept"] <= len(ids)


RADII, SIDE = np.array([0.7, 0.9, 0.6]), 192  # dm; px
MIDDLE, LENS = np.full(2, SIDE / 2), 2.3 * SIDE


@pytest.fixture(scope="module")
def egg():
    """A painted ellipsoid as a face model, 24 true poses of it, and its pictures (F, SIDE, SIDE)."""
    angle = np.arange(2500) * np.pi * (3 - 5**0.5)
    x, y = 0.85 * np.sqrt(np.arange(2500) / 2500) * np.stack([np.cos(angle), np.sin(angle)])
    triangles = Delaunay(np.stack([x, y], 1)).simplices
    points = np.stack([x, y, np.sqrt(1 - x**2 - y**2)], 1) * RADII
    a, b, c = points[triangles].swapaxes(0, 1)
    inwards = np.cross(b - a, c - a)[:, 2] < 0
    triangles[inwards] = triangles[inwards][:, ::-1]
    model = FaceModel("egg", points, np.zeros((0, 2500, 3)), np.zeros((0, 2500, 3)), triangles, np.arange(10), np.arange(10),
                      np.ones(2500, bool))  # fmt: skip

    time = np.arange(24) / 25
    turn = np.stack([0.08 * np.sin(3 * time), 0.15 * np.sin(4 * time), 0.05 * np.sin(2 * time)], 1)
    poses = Poses(Rotation.from_rotvec(turn).as_matrix(), np.stack([0.1 * np.sin(5 * time), 0 * time, -6 + 0.1 * time], 1))
    v, u = np.mgrid[:SIDE, :SIDE] + 0.5
    rays = np.stack([(u - MIDDLE[0]) / LENS, (MIDDLE[1] - v) / LENS, -np.ones_like(u)], 2)
    waves = np.random.default_rng(0).normal(0, 30, (3, 12))
    pictures = []
    for rotation, translation in zip(poses.rotation, poses.translation, strict=True):
        start, way = -rotation.T @ translation / RADII, rays @ rotation / RADII  # the ellipsoid becomes the unit sphere
        p, q, r = (way**2).sum(2), way @ start, start @ start - 1
        hit = start + ((-q - np.sqrt(np.maximum(q**2 - p * r, 0))) / p)[..., None] * way
        pictures.append(np.where(q**2 > p * r, 128 + 10 * np.sin(RADII * hit @ waves).sum(2), 90))
    return model, poses, np.array(pictures)


def refined(egg, root, change=lambda pictures: pictures) -> tuple[Poses, Poses, Poses, dict]:
    """True, disturbed and refined poses, and what is told, where the pictures are changed so."""
    model, true, pictures = egg
    folder, count = DatasetFolder(root), len(pictures)
    for i, picture in enumerate(np.clip(change(pictures.copy()), 0, 255).astype(np.uint8)):
        write_rgb(folder.frame(i), np.repeat(picture[..., None], 3, 2))
    random = np.random.default_rng(1)
    start = true.moved(random.normal(0, 1, (count, 6)) * [0.015, 0.015, 0.01, 0.01, 0.01, 0.04])
    fit, told = refine(Fit(model, start, np.zeros(0), np.zeros((count, 0)), LENS), folder, np.arange(count), MIDDLE)
    return true, start, fit.poses, told


def off(poses: Poses, true: Poses) -> tuple[float, float]:
    """RMS of rotation in degrees and of translation in dm, each without its mean, which pictures do not tell."""
    away = poses.step_from(true)
    away = away - away.mean(0)
    return np.degrees(np.sqrt((away[:, :3] ** 2).sum(1).mean())), np.sqrt((away[:, 3:] ** 2).sum(1).mean())


def test_photometric_refinement_brings_disturbed_poses_back(egg, tmp_path):
    true, start, found, told = refined(egg, tmp_path)
    assert off(start, true)[0] > 1 and off(start, true)[1] > 0.03
    assert off(found, true)[0] < 0.15 and off(found, true)[1] < 0.01
    assert told["frames_kept"] == 0 and told["explained_after"] > told["explained_before"] and not told["warnings"]


def test_photometric_refinement_leaves_frames_that_do_not_show_the_face(egg, tmp_path):
    def cover(pictures):
        pictures[5] = 0
        pictures[12, :, :] = np.random.default_rng(2).normal(128, 40, (SIDE, SIDE))
        pictures[20:23] = 255
        return pictures

    true, start, found, told = refined(egg, tmp_path, cover)
    gone = np.isin(np.arange(24), (5, 12, 20, 21, 22))
    assert np.array_equal(found.rotation[gone], start.rotation[gone])
    assert np.array_equal(found.translation[gone], start.translation[gone])
    assert off(found[~gone], true[~gone])[0] < 0.2
    assert told["frames_kept"] == 5 and "left the pose of 5 frames as it was, first 5" in told["warnings"][0]


def test_photometric_refinement_is_not_moved_by_exposure_and_light(egg, tmp_path):
    across = np.linspace(-1, 1, SIDE)

    def expose(pictures):
        gain, lamp = np.linspace(0.6, 1.1, 24)[:, None, None], np.linspace(-30, 30, 24)[:, None, None]
        return gain * pictures + lamp * (1 + across) / 2

    _, _, plain, _ = refined(egg, tmp_path / "plain")
    true, _, exposed, _ = refined(egg, tmp_path / "exposed", expose)
    assert off(exposed, true)[0] < 0.2
    rim = egg[0].mean[::50]
    assert np.abs(project(rim, exposed, LENS, MIDDLE) - project(rim, plain, LENS, MIDDLE)).max() < 0.15


def test_photometric_refinement_is_left_out_where_there_are_too_few_frames(egg, tmp_path):
    model, true, pictures = egg
    few = FEWEST_FRAMES - 1
    _, start, found, told = refined((model, true[:few], pictures[:few]), tmp_path)
    assert np.array_equal(found.rotation, start.rotation) and np.array_equal(found.translation, start.translation)
    assert f"there are {few}" in told["warnings"][0]
