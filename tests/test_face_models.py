"""Learned face models: converted without running what pickles hold, loaded to the documented shapes, fitted by 68 landmarks."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from scipy.spatial.transform import Rotation

from data_utils.face_tracking import _facts, convert_BFM, convert_ICT
from data_utils.face_tracking.facemodel import BACKENDS, CanonicalMesh, load_face_model
from data_utils.face_tracking.fit import fit_clip
from data_utils.face_tracking.params import read_fit, read_landmarks, write_params
from data_utils.face_tracking.surface import vertex_normals
from data_utils.landmarks import IBUG_68
from data_utils.pose_solver import Poses, project
from utils import model_store
from utils.dataset_folder import DatasetFolder
from utils.errors import UserError
from utils.safe_pickle import read_pickled_dict

FOCAL, CENTRE = 1200.0, np.array([256.0, 256.0])


class Malice:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


# pickled tables


@pytest.mark.parametrize("protocol", range(5))
def test_pickled_tables_come_back_as_they_were(protocol, tmp_path):
    swapped = np.asfortranarray(np.arange(6, dtype=">i8").reshape(2, 3))
    tables = {"a": np.arange(6.0).reshape(2, 3), "b": swapped, "c": np.float32(3),
              "nested": {"list": [1, 2.5, "x", None], "flags": np.array([True, False])}}  # fmt: skip
    (tmp_path / "bare.npy").write_bytes(pickle.dumps(tables, protocol))
    np.save(tmp_path / "saved.npy", tables)
    for name in ("bare.npy", "saved.npy"):
        back = read_pickled_dict(tmp_path / name)
        assert (back["a"] == tables["a"]).all() and (back["b"] == tables["b"]).all() and back["c"] == 3
        assert back["nested"]["list"] == [1, 2.5, "x", None] and back["nested"]["flags"].tolist() == [True, False]


@pytest.mark.parametrize("protocol", range(6))
def test_code_in_a_pickled_table_is_refused_and_not_run(protocol, tmp_path):
    path, trap = tmp_path / "exp_info.npy", tmp_path / "trap"
    path.write_bytes(pickle.dumps({"mu_exp": Malice(trap)}, protocol))
    with pytest.raises(UserError, match=r"exp_info.npy wants to run code \(.*mkdir\), which was not done"):
        read_pickled_dict(path)
    np.save(path, {"mu_exp": np.array([Malice(trap)], object)})
    with pytest.raises(UserError, match="wants to run code"):
        read_pickled_dict(path)
    for attack in (b"c__builtin__\neval\n(S'1'\ntR.", b"cnumpy\nload\n.", b"cbuiltins\ngetattr\n.", b"P0\n."):
        path.write_bytes(attack)
        with pytest.raises(UserError, match="exp_info.npy"):
            read_pickled_dict(path)
    assert not trap.exists()


def test_what_is_no_table_is_refused_in_one_sentence(tmp_path):
    path = tmp_path / "keys_info.npy"
    np.save(path, {"keyinds": np.arange(68)})
    whole = path.read_bytes()
    plain = tmp_path / "plain.npy"
    np.save(plain, np.arange(5))
    unfit = [pickle.dumps(value) for value in ([1], {"a": np.array(["x"])}, {"a": {1, 2}})]
    for data in (b"", whole[:7], whole[:-20], b"<html>", plain.read_bytes(), *unfit):
        path.write_bytes(data)
        with pytest.raises(UserError, match="keys_info.npy is no table of arrays") as error:
            read_pickled_dict(path)
        assert "\n" not in str(error.value)


# Basel Face Model


@pytest.fixture
def basel(tmp_path, monkeypatch):
    """The files of BFM 2009 and AD-NeRF in their layout, made small: the canonical mesh with made-up bases, micrometres."""
    if not CanonicalMesh().available():
        pytest.skip("needs face_landmarker.task (python -m utils.model_store fetch face_landmarker)")
    mesh, random = load_face_model("mesh"), np.random.default_rng(0)
    kept, whole, components, expressions = len(mesh.mean), 500, 12, 80
    for name, value in {"VERTICES": kept, "TRIANGLES": len(mesh.triangles), "COMPONENTS": components, "WHOLE": whole}.items():
        monkeypatch.setattr(convert_BFM, name, value)
    chosen = np.sort(random.permutation(whole)[:kept])
    shape = np.zeros((whole, 3))
    shape[chosen] = mesh.mean * 1e5 + 700  # the model is centred when it is loaded
    basis = np.zeros((components, whole, 3))
    basis[:, chosen] = mesh.identity[:components] * 1e5
    scale = np.linspace(2, 1, components)
    opening = np.zeros((expressions, kept, 3))
    opening[0, mesh.mean[:, 1] < -0.35, 1] = -1e4  # the jaw falls by a millimetre a deviation
    opening[1:] = random.normal(0, 1, (expressions - 1, kept, 3))
    unscaled = (basis / scale[:, None, None]).reshape(components, -1).T
    scipy.io.savemat(tmp_path / "01_MorphableModel.mat", {
        "shapeMU": shape.reshape(-1, 1), "shapePC": unscaled, "shapeEV": scale[:, None],
        "texMU": np.full((3 * whole, 1), 128.0), "texPC": np.zeros((3 * whole, components)), "texEV": np.ones((components, 1)),
    })  # fmt: skip
    np.save(tmp_path / "exp_info.npy", {"mu_exp": np.zeros(3 * kept), "base_exp": opening.reshape(expressions, -1),
                                        "sig_exp": np.ones(expressions)})  # fmt: skip
    np.save(tmp_path / "topology_info.npy", {"tris": mesh.triangles, "vert_tris": np.zeros((kept, 8), int), "sub_inds": chosen})
    near = np.linalg.norm(mesh.mean[IBUG_68[:17], None] - mesh.mean, axis=2).argsort(1)[:, :20]
    np.save(tmp_path / "keys_info.npy", {"keyinds": IBUG_68, "left_contour": near[:8], "right_contour": near[9:],
                                         "rigid_ids": np.arange(464)})  # fmt: skip
    monkeypatch.setenv("SGT_MODELS", str(tmp_path))
    monkeypatch.setattr(model_store, "REPOSITORY", tmp_path / "repository")
    return tmp_path, mesh


def test_the_documented_shapes_of_the_basel_tables():
    shapes = convert_BFM.shapes()
    assert shapes["b_shape"] == shapes["b_tex"] == (199, 103950) and shapes["b_exp"] == ("E", 103950)
    assert shapes["tris"] == (68746, 3) and shapes["left_contour"] == (8, 20) and convert_BFM.WHOLE == 53490


def test_the_basel_face_is_converted_and_loaded_in_decimetres(basel):
    folder, mesh = basel
    assert not BACKENDS["bfm"].available()
    convert_BFM.main(["--path", str(folder)])
    assert BACKENDS["bfm"].available()
    model = load_face_model("bfm")
    assert np.abs(model.mean - mesh.mean).max() < 1e-5 and np.abs(model.mean.mean(0)).max() < 1e-6
    assert model.identity.shape == (12, 468, 3) and model.expression.shape == (79, 468, 3)
    assert np.abs(model.identity - mesh.identity[:12]).max() < 1e-5, "a component times its deviation"
    assert model.landmark_count == 68 and len(model.landmark_ids) == 52 + 16 * 20
    assert model.landmark_ids[model.contour[0]].tolist() == [IBUG_68[0]] * 20 and model.rigid.sum() > 50
    (folder / "3DMM_info.npz").unlink()


def test_a_3dmm_info_of_the_original_programs_serves_in_place_of_the_mat(basel):
    folder, mesh = basel
    tables = np.load(convert_BFM.convert(folder))
    np.save(folder / "3DMM_info.npy", {name: tables[name] for name in tables.files if name[:2] in ("mu", "b_", "si")})
    for name in ("01_MorphableModel.mat", "exp_info.npy", "3DMM_info.npz"):
        (folder / name).unlink()
    convert_BFM.convert(folder)
    assert np.abs(load_face_model("bfm").mean - mesh.mean).max() < 1e-5


def test_of_contour_candidates_the_outermost_in_the_picture_counts(basel):
    convert_BFM.convert(basel[0])
    model = load_face_model("bfm")
    x = np.random.default_rng(0).normal(size=(3, len(model.landmark_ids)))
    counts = model.outermost(x)
    assert (counts.sum(1) == 68).all() and counts[:, :52].all()
    for frame in range(3):
        for group, side in zip(model.contour, model.contour_side, strict=True):
            best = group[(side * x[frame, group]).argmax()]
            assert counts[frame, best] and counts[frame, group].sum() == 1


def landmarks_of(points: np.ndarray, poses: Poses, ids: np.ndarray) -> np.ndarray:
    """(F, 478, 3) dense landmarks of which only `ids` (L,) are set, as the network gives them: z nearer = smaller."""
    camera = points @ poses.rotation.transpose(0, 2, 1) + poses.translation[:, None]
    z = -(camera[..., 2] - poses.translation[:, None, 2]) * FOCAL / 7
    landmarks = np.full((len(points), 478, 3), np.nan)
    landmarks[:, ids] = np.concatenate([project(points, poses, FOCAL, CENTRE), z[..., None]], 2)
    return landmarks


def motion(frames: int) -> Poses:
    time = np.arange(frames) / 25
    turn = np.stack([0.1 * np.sin(2 * time), 0.25 * np.sin(1.5 * time), 0.05 * np.sin(3 * time)], 1)
    return Poses(Rotation.from_rotvec(turn).as_matrix(), np.stack([0.2 * np.sin(time), 0.1 * np.cos(time), -7 + 0.2 * time], 1))


def test_the_basel_face_is_fitted_by_68_landmarks_with_a_moving_contour(basel):
    convert_BFM.convert(basel[0])
    model, frames = load_face_model("bfm"), 30
    poses, opening = motion(frames), 2 * np.sin(np.arange(frames) / 4) ** 2
    expression = np.zeros((frames, 79))
    expression[:, 0] = opening
    points = model.vertices(np.full(12, 0.3), expression, model.landmark_vertices)
    counts = model.outermost(project(points, poses, FOCAL, CENTRE)[..., 0])
    landmarks = landmarks_of(points, poses, model.landmark_ids)
    for frame in range(frames):  # the seen contour is the outermost candidate's place
        landmarks[frame, model.landmark_ids[counts[frame]]] = landmarks_of(
            points[frame : frame + 1, counts[frame]], poses[frame : frame + 1], model.landmark_ids[counts[frame]]
        )[0, model.landmark_ids[counts[frame]]]
    fit = fit_clip(model, landmarks, np.arange(frames), CENTRE)
    facts = _facts(fit, landmarks, np.arange(frames), CENTRE)
    assert facts["backend"] == "bfm" and facts["landmark_error_px"] < 1
    turn = Rotation.from_matrix(fit.poses.rotation @ poses.rotation.transpose(0, 2, 1)).magnitude()
    assert np.degrees(turn).max() < 2
    assert np.corrcoef(fit.expression[:, 0], opening)[0, 1] > 0.95
    assert max(np.abs(fit.identity).max(), np.abs(fit.expression).max()) <= 5


def test_basel_files_that_do_not_belong_are_named(basel):
    folder, _ = basel
    keys = read_pickled_dict(folder / "keys_info.npy")
    np.save(folder / "keys_info.npy", keys | {"left_contour": np.zeros((8, 19), int)})
    with pytest.raises(UserError, match="the table left_contour is 8 x 19, not 8 x 20"):
        convert_BFM.convert(folder)
    np.save(folder / "keys_info.npy", keys | {"keyinds": np.full(68, 10**6)})
    with pytest.raises(UserError, match="keyinds names vertices beyond"):
        convert_BFM.convert(folder)
    mat = (folder / "01_MorphableModel.mat").read_bytes()
    for damaged in (mat[: len(mat) // 2], b"<html>"):
        (folder / "01_MorphableModel.mat").write_bytes(damaged)
        with pytest.raises(UserError, match="01_MorphableModel.mat is no MATLAB file|shapePC is absent"):
            convert_BFM.convert(folder)
    scipy.io.savemat(folder / "01_MorphableModel.mat", {"shapePC": np.zeros((30, 4))})
    with pytest.raises(UserError, match="shapePC is 30 x 4, not 1500 x 12"):
        convert_BFM.convert(folder)
    (folder / "01_MorphableModel.mat").unlink()
    with pytest.raises(UserError, match="01_MorphableModel.mat does not exist; register"):
        convert_BFM.convert(folder)
    assert not (folder / "3DMM_info.npz").exists()
    np.savez(folder / "3DMM_info.npz", mu_shape=np.zeros(7))
    with pytest.raises(UserError, match="the table mu_shape is 7, not 1404"):
        load_face_model("bfm")


# ICT Face Model


def write_obj(path: Path, points: np.ndarray, faces: str = "") -> None:
    path.write_text("# made for a test\n" + "".join("v {:.5f} {:.5f} {:.5f}\n".format(*point) for point in points) + faces)


def test_the_ict_objs_are_packed_as_offsets_from_the_neutral_face(tmp_path, monkeypatch):
    monkeypatch.setattr(convert_ICT, "VERTICES", 6)
    random = np.random.default_rng(0)
    neutral = random.normal(size=(8, 3))
    faces = "f 1/1/1 2/2/2 3/3/3 4/4/4\nf 3/1 4/2 5/3 6/4\nf 5/1 6/1 7/1 8/1\nf 1 2 3\n"
    write_obj(tmp_path / "generic_neutral_mesh.obj", neutral, faces)
    offsets = random.normal(size=(153, 8, 3))
    names = [f"identity{i:03d}" for i in range(100)] + list(convert_ICT.EXPRESSIONS)
    for name, offset in zip(names, offsets, strict=True):
        write_obj(tmp_path / f"{name}.obj", neutral + offset)
    packed = np.load(convert_ICT.convert(tmp_path, tmp_path / "out"))
    assert packed["faces"].tolist() == [[0, 1, 2, 3], [2, 3, 4, 5]], "quads beyond face, head and neck are left out"
    np.testing.assert_allclose(packed["neutral"], neutral[:6], atol=1e-4)
    np.testing.assert_allclose(packed["identity"], offsets[:100, :6], atol=5e-3)
    np.testing.assert_allclose(packed["expression"], offsets[100:, :6], atol=5e-3)
    assert packed["expression_names"][26] == "jawOpen" and len(packed["landmarks68"]) == 68
    write_obj(tmp_path / "jawOpen.obj", neutral[:7])
    with pytest.raises(UserError, match="jawOpen.obj has 7 vertices, the neutral face 8"):
        convert_ICT.convert(tmp_path, tmp_path / "out")
    (tmp_path / "jawOpen.obj").write_text("v 1 2 x\n")
    with pytest.raises(UserError, match="jawOpen.obj is damaged"):
        convert_ICT.convert(tmp_path, tmp_path / "out")
    (tmp_path / "jawOpen.obj").unlink()
    with pytest.raises(UserError, match="jawOpen.obj does not exist"):
        convert_ICT.convert(tmp_path, tmp_path / "out")


def test_a_file_that_is_no_packed_ict_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SGT_MODELS", str(tmp_path))
    path = model_store.MODELS["ict"].path_in(tmp_path)
    np.savez(path, neutral=np.zeros((5, 3)))
    with pytest.raises(UserError, match=r"is no packed ICT face model \(neutral is \(5, 3\), not \(11248, 3\)\)"):
        load_face_model("ict")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="is damaged"):
        load_face_model("ict")


@pytest.fixture
def ict(shared, monkeypatch):
    monkeypatch.setenv("SGT_MODELS", str(shared / "models"))
    return load_face_model("ict")


def test_the_ict_face_is_a_face_of_real_size_in_the_heads_frame(ict):
    assert ict.mean.shape == (11248, 3) and ict.identity.shape == (100, 11248, 3) and ict.expression.shape == (53, 11248, 3)
    left_eye, right_eye, nose, chin = ict.mean[ict.landmark_vertices[[36, 45, 30, 8]]]
    assert 0.8 < right_eye[0] - left_eye[0] < 1.0 and nose[2] > 0.2 and chin[1] < -0.6
    assert 1000 < ict.rigid.sum() < 3000
    normals = vertex_normals(ict.mean, ict.triangles)
    assert (normals[ict.rigid, 2] > 0).mean() > 0.95
    jaw = convert_ICT.EXPRESSIONS.index("jawOpen")
    assert ict.expression[jaw][ict.landmark_vertices[8], 1] < -0.05, "the chin falls"


def test_the_ict_face_finds_the_pose_of_its_own_landmarks(ict):
    frames, random = 20, np.random.default_rng(1)
    poses = motion(frames)
    points = ict.vertices(random.normal(0, 0.5, 100), random.uniform(0, 1, (frames, 53)), ict.landmark_vertices)
    fit = fit_clip(ict, landmarks_of(points, poses, ict.landmark_ids), np.arange(frames), CENTRE)
    turn = Rotation.from_matrix(fit.poses.rotation @ poses.rotation.transpose(0, 2, 1))
    offset = turn.mean()
    assert np.degrees((turn * offset.inv()).magnitude()).max() < 2 and np.degrees(offset.magnitude()) < 5


def test_the_ict_face_fits_the_demo_clip_and_its_parameters_come_back(ict, processed, tmp_path):
    source, _ = processed
    ids = np.array(source.valid_ids())[:25]
    landmarks, centre = read_landmarks(source)[ids], np.array([64.0, 64.0])
    fit = fit_clip(ict, landmarks, ids, centre)
    assert _facts(fit, landmarks, ids, centre)["landmark_error_px"] < 4
    folder = DatasetFolder(tmp_path)
    write_params(folder, fit, ids, ids[-1] + 1)
    assert folder.track_params.stat().st_size < 100_000, "a learned model's expressions are not stored again"
    back = read_fit(folder, "ict")
    np.testing.assert_allclose(back.vertices()[ids], fit.vertices(), atol=1e-4)
