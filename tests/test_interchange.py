"""Data sets of SyncTalk, ER-NeRF and GaussianTalker train here. (That ours is read there: test_end_to_end.py.)"""

import numpy as np
import pytest
import torch
from lineage_folder import rewrite_as_lineage
from test_train import SMALL
from tiny_dataset import write_tiny_dataset

import train
from scene import load_avatar
from scene.condition import AUDIO_WINDOW
from scene.landmark_face import landmark_face, triangulate
from scene.talking_dataset_readers import TalkingDatasetReader
from utils.constants import CLOTH, SKIN
from utils.errors import UserError
from utils.files import write_json
from utils.ply import read_mesh
from utils.pose import euler_to_matrix, world_to_view

KINDS = [  # track_params' unit, features, expression, and what our reader calls and makes of the features
    ("mm", "aud_ave.npy", "bs.npy", "ave", 512),
    ("mm", "aud_hu.npy", "bs.npy", "hubert", 2048),
    ("dm", "aud_ds.npy", "au.csv", "deepspeech", 464),
    ("dm", "aud.npy", "au.csv", "deepspeech", 464),
]


@pytest.mark.parametrize(("unit", "audio", "expression", "encoder", "width"), KINDS)
def test_a_folder_of_another_tool_is_read(tmp_path, unit, audio, expression, encoder, width):
    folder = write_tiny_dataset(tmp_path / "x")
    ours = TalkingDatasetReader(folder.root)
    masks = {i: np.isin(ours.parsing(i), CLOTH) for i in ours.ids}
    rewrite_as_lineage(folder.root, unit, audio, expression)
    theirs = TalkingDatasetReader(folder.root)
    assert (theirs.encoder, theirs.audio.shape[1]) == (encoder, width) and theirs.splits == ours.splits
    torch.testing.assert_close(theirs.views, ours.views)
    np.testing.assert_array_equal(theirs.audio[5], np.load(folder.root / audio)[5].ravel().astype(np.float32))
    for i in theirs.ids[::5]:
        np.testing.assert_array_equal(theirs.parsing(i) == CLOTH, masks[i])
        assert (theirs.parsing(i) == SKIN).any()
        np.testing.assert_array_equal(theirs.backdrop(i), ours.backdrop(i))
    assert theirs.expression.shape == (22, 7) and theirs.conditions([4, 7]).audio.shape == (2, AUDIO_WINDOW, width)
    if expression == "au.csv":  # intensity 2 and more is a closed eye; brows are not told
        np.testing.assert_allclose(theirs.expression[:, 5:], np.clip(0.25 * np.arange(22), 0, 1)[:, None].repeat(2, 1), atol=1e-6)
        assert not theirs.expression[:, :5].any()


def test_features_of_the_clip_are_preferred_to_better_ones_of_an_older_clip(tmp_path):
    folder = write_tiny_dataset(tmp_path / "x")
    np.save(folder.audio_features("whisper"), np.zeros((22, 384), np.float32))
    assert TalkingDatasetReader(folder.root).encoder == "whisper"
    write_json(folder.state / "audio.json", {"facts": {"backend": "mel"}})
    assert TalkingDatasetReader(folder.root).encoder == "mel"
    assert TalkingDatasetReader(folder.root, "whisper").encoder == "whisper"
    folder.audio_features("mel").unlink()
    assert TalkingDatasetReader(folder.root).encoder == "whisper"


def test_a_folder_of_another_tool_trains(tmp_path):
    folder = write_tiny_dataset(tmp_path / "x")
    rewrite_as_lineage(folder.root, "dm", "aud_ds.npy", "au.csv")
    short = ["--iterations", "4", "--coarse_iterations", "2"]
    train.main(["-s", str(folder.root), "--model_path", str(tmp_path / "m"), *SMALL, *short])
    head = load_avatar(tmp_path / "m")
    assert head.iteration == 4 and head.config.audio_encoder == "deepspeech" and head.config.audio_features == 464


def test_a_csv_without_blinks_is_refused_by_name(tmp_path):
    folder = write_tiny_dataset(tmp_path / "x")
    folder.blendshapes.unlink()
    (folder.root / "au.csv").write_text("frame, AU01_r\n1, 0.5\n")
    with pytest.raises(UserError, match=r"au\.csv has no column of numbers AU45_r"):
        TalkingDatasetReader(folder.root)


class Seen:
    """A clip of 68 points that do not move in the head frame, as a reader shows it."""

    width = height = 512
    focal, cx, cy = 1200.0, 256.0, 256.0

    def __init__(self, turn: float):
        rng = np.random.default_rng(0)
        self.points = rng.uniform((-0.7, -0.7, 0), (0.7, 0.7, 0.5), (68, 3))
        self.splits = {"train": list(range(60))}
        euler = torch.from_numpy(turn * rng.normal(size=(60, 3)))
        c2w = torch.eye(4, dtype=torch.float64).repeat(60, 1, 1)
        c2w[:, :3, :3] = euler_to_matrix(euler).mT
        c2w[:, :3, 3] = (euler_to_matrix(euler).mT @ torch.tensor([0.0, 0.0, 7.0], dtype=torch.float64)[:, None])[..., 0]
        self.views = world_to_view(c2w).float()
        self._noise = rng.normal(0, 1, (60, 68, 2))

    def landmarks(self, i: int) -> np.ndarray:
        view = self.views[i].double().numpy()
        camera = self.points @ view[:3, :3].T + view[:3, 3]
        return camera[:, :2] / camera[:, 2:] * self.focal + 256 + self._noise[i]

    def image(self, i: int) -> np.ndarray:
        return np.full((512, 512, 3), (200, 100, 50), np.uint8)


def test_landmarks_and_poses_give_back_the_face():
    clip = Seen(turn=0.06)
    assert np.linalg.norm(triangulate(clip) - clip.points, axis=1).mean() < 0.03  # dm
    face = landmark_face(clip)
    assert torch.allclose(face.colours, torch.tensor([200.0, 100.0, 50.0]) / 255) and (face.normals[:, 2] > 0).all()
    assert np.abs(face.points.numpy()).max() < 0.8


def test_a_head_that_never_turns_gives_a_face_at_its_place():
    found = triangulate(clip := Seen(turn=0.0))
    assert np.abs(found[:, :2] - clip.points[:, :2]).max() < 0.1 and np.abs(found[:, 2]).max() < 0.5


def test_the_face_from_landmarks_lies_on_the_fitted_one(tmp_path):
    """On the small data set the mouth is the only landmark that means anything; it lies where the mesh is."""
    reader = TalkingDatasetReader(write_tiny_dataset(tmp_path / "x").root)
    mouth, mesh = triangulate(reader)[48:], read_mesh(reader.folder.fused).points
    assert np.abs(mouth[:, :2].mean(0) - (0, -0.35)).max() < 0.1 and np.abs(mouth).max() < np.abs(mesh).max()
