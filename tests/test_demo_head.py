"""The synthetic head: its picture, its voice and its truth agree, and MediaPipe takes it for a face."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data_utils.demo_head import face_shape
from data_utils.demo_head.clip import make_clip, make_speech
from data_utils.demo_head.landmarks import Landmarks, lip_opening
from data_utils.demo_head.mesh import HeadMesh
from data_utils.demo_head.raster import rasterize
from data_utils.demo_head.voice import CLOSURES, VOWELS, speak
from data_utils.make_demo import main
from utils.audio import load_audio
from utils.constants import CLASS_NAMES, CLOTH, FPS, HAIR, HEAD_CLASSES, MOUTH, SAMPLES_PER_FRAME
from utils.image import read_parsing
from utils.pose import euler_to_matrix, project
from utils.video import probe, read_frames

SECONDS, SIZE = 3.0, 192
FRAMES = round(SECONDS * FPS)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo head")
    main(["--out", str(out), "--seconds", str(SECONDS), "--size", str(SIZE), "--speech-seconds", "2"])
    return out


@pytest.fixture(scope="module")
def truth(demo) -> dict[str, np.ndarray]:
    with np.load(demo / "truth" / "truth.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def frames(demo) -> list[np.ndarray]:
    return list(read_frames(demo / "demo.mp4"))


@pytest.fixture(scope="module")
def long_speech():
    """14 seconds of the voice and the lip opening of each frame (no pictures)."""
    utterance, mesh = speak(14.0, 5), HeadMesh()
    marks = Landmarks(mesh)
    return utterance, np.array([lip_opening(marks.points(mesh.deform(row), 0.0)) for row in utterance.articulation])


def middle_frames(utterance, symbols: str) -> np.ndarray:
    """Frames nearest to the middles of the given phonemes."""
    return np.array([round(0.5 * (start + end) * FPS) for symbol, start, end in utterance.phonemes if symbol in symbols])


def test_the_clip_the_speech_and_their_truth_lie_where_the_docstring_says(demo, truth):
    files = {str(p.relative_to(demo)) for p in demo.rglob("*") if p.is_file()}
    masks = {f"truth/masks/{i}.png" for i in range(FRAMES)}
    assert files == {"demo.mp4", "speech.wav", "truth/truth.npz", "truth/speech.npz"} | masks
    assert truth["landmarks68"].shape == (FRAMES, 68, 2) and truth["euler"].shape == truth["trans"].shape == (FRAMES, 3)
    assert truth["visible"].shape == (FRAMES, 68)
    assert truth["lip_opening"].shape == truth["blink"].shape == (FRAMES,)
    with np.load(demo / "truth" / "speech.npz") as speech:
        assert len(speech["lip_opening"]) == 2 * FPS == len(load_audio(demo / "speech.wav")) // SAMPLES_PER_FRAME


def test_the_clip_is_25_fps_with_sound_of_the_same_length(demo, frames):
    info = probe(demo / "demo.mp4")
    assert (info.width, info.height, info.fps, info.has_audio) == (SIZE, SIZE, FPS, True)
    assert len(frames) == FRAMES
    assert abs(len(load_audio(demo / "demo.mp4")) / SAMPLES_PER_FRAME - FRAMES) <= 2  # AAC pads to its block


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_clip(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make_clip(tmp_path / name, seconds=1.0, size=64, seed=seed)
        make_speech(tmp_path / name, seconds=1.0, seed=seed)
    for file in ("demo.mp4", "speech.wav", "truth/masks/7.png"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
        assert (tmp_path / "a" / file).read_bytes() != (tmp_path / "c" / file).read_bytes(), file


def test_the_held_out_speech_is_not_the_clips(demo):
    clip, speech = load_audio(demo / "demo.mp4"), load_audio(demo / "speech.wav")
    shared = min(len(clip), len(speech))
    assert abs(np.corrcoef(clip[:shared], speech[:shared])[0, 1]) < 0.2


def test_truth_landmarks_are_the_projections_of_the_heads_points(truth):
    rotation, points = euler_to_matrix(torch.from_numpy(truth["euler"])), torch.from_numpy(truth["points68"])
    pixels = project(points, rotation, torch.from_numpy(truth["trans"]), float(truth["focal"]), SIZE / 2, SIZE / 2)
    np.testing.assert_allclose(pixels.numpy(), truth["landmarks68"], atol=1e-3)
    assert (truth["landmarks68"] > 0).all() and (truth["landmarks68"] < SIZE).all()


def test_upper_face_points_do_not_move_on_the_head_while_it_speaks(truth):
    rigid = truth["points68"][:, list(range(17, 31)) + [36, 39, 42, 45]]
    assert np.ptp(truth["lip_opening"]) > 0.1
    assert np.ptp(rigid, axis=0).max() < 2e-3


def test_the_head_moves_a_little_and_smoothly(truth):
    degrees = np.degrees(truth["euler"])
    assert 1 < np.ptp(degrees, axis=0).max() < 40 and np.abs(degrees).max() < 20
    assert np.abs(np.diff(degrees, axis=0)).max() < 2.5
    assert np.abs(np.diff(truth["trans"], axis=0)).max() < 0.1


def test_lips_are_shut_in_closures_and_silences_and_open_in_vowels(long_speech):
    utterance, opening = long_speech
    assert len(middle_frames(utterance, CLOSURES)) > 10
    assert opening[middle_frames(utterance, CLOSURES)].max() < 0.01
    pauses = [round(0.5 * (a + b) * FPS) for s, a, b in utterance.phonemes if s == " " and b - a > 0.25]
    assert opening[pauses].max() < 0.01
    mean = {v: opening[middle_frames(utterance, v)].mean() for v in VOWELS}
    assert mean["a"] > mean["o"] > mean["u"] > 0.02
    assert mean["a"] > mean["e"] > mean["i"] > 0.02


def test_vowels_differ_in_the_width_of_the_mouth():
    mesh = HeadMesh()
    marks = Landmarks(mesh)
    width = {}
    for name, shape in (("wide", [0.2, 1, 0, 0, 0, 0, 0]), ("rest", [0.2, 0, 0, 0, 0, 0, 0]), ("round", [0.2, 0, 1, 0, 0, 0, 0])):
        points = marks.points(mesh.deform(np.array(shape, float)), 0.0)
        width[name] = np.linalg.norm(points[48] - points[54])
    assert width["wide"] > 1.1 * width["rest"] > 1.4 * width["round"]


def test_the_mouth_opens_with_the_sound(long_speech):
    utterance, opening = long_speech
    centred = np.pad(utterance.samples, (SAMPLES_PER_FRAME // 2, 0))[: len(utterance.samples)]  # row i: the audio around frame i
    energy = np.sqrt((centred.reshape(-1, SAMPLES_PER_FRAME) ** 2).mean(1))
    assert np.corrcoef(energy, opening)[0, 1] > 0.6
    lagged = [np.corrcoef(np.roll(energy, k), opening)[0, 1] for k in range(-3, 4)]
    assert np.argmax(lagged) == 3  # no lag between what is heard and what is seen


def test_a_vowels_sound_peaks_at_its_formants(long_speech):
    utterance, _ = long_speech
    centroid = {}
    for vowel in "iu":
        spectra = []
        for symbol, start, end in utterance.phonemes:
            if symbol == vowel:
                at = int(8000 * (start + end))
                spectra.append(np.abs(np.fft.rfft(utterance.samples[at - 512 : at + 512] * np.hanning(1024))) ** 2)
        power, hertz = np.mean(spectra, 0), np.fft.rfftfreq(1024, 1 / 16000)
        band = (hertz > 600) & (hertz < 3200)
        centroid[vowel] = (power * hertz)[band].sum() / power[band].sum()
    assert centroid["i"] > 1900 and centroid["u"] < 1300


def test_masks_cover_the_head_and_nothing_but_the_person(demo, truth, frames):
    for i in (0, FRAMES // 2, FRAMES - 1):
        classes = read_parsing(demo / "truth" / "masks" / f"{i}.png")
        assert classes.shape == (SIZE, SIZE) and classes.max() < len(CLASS_NAMES)
        present = set(np.unique(classes))
        wanted = "background skin left_brow right_brow left_ear nose upper_lip lower_lip neck cloth hair"
        assert set(wanted.split()) <= {CLASS_NAMES[c] for c in present}
        column, row = truth["landmarks68"][i][17:].astype(int).T  # inside the contour
        assert np.isin(classes[row, column], HEAD_CLASSES).all()
        top = np.flatnonzero((classes == HAIR).any(1))[0]
        bottom = np.flatnonzero((classes == CLOTH).any(1))[-1]
        assert top > 2 and bottom == SIZE - 1  # the whole head is in the picture, the torso leaves it
        left, right = (np.flatnonzero((classes == CLASS_NAMES.index(name)).any(0)) for name in ("right_brow", "left_brow"))
        assert left.max() < right.min()  # the subject's right brow is on the viewer's left


def test_what_is_drawn_lies_where_the_landmarks_say(demo, truth):
    hits = {"brow": [], "lid": [], "lip": []}
    for i in range(0, FRAMES, 5):
        classes, marks = read_parsing(demo / "truth" / "masks" / f"{i}.png"), truth["landmarks68"][i]

        def at(point, classes=classes):
            return CLASS_NAMES[classes[tuple(np.floor(point).astype(int)[::-1])]]

        hits["brow"] += [at(marks[19]) == "right_brow", at(marks[24]) == "left_brow"]
        if truth["blink"][i] < 0.05:
            hits["lid"] += [at(marks[36:42].mean(0)) == "right_eye", at(marks[42:48].mean(0)) == "left_eye"]
        hits["lip"] += [at((marks[51] + marks[62]) / 2) == "upper_lip", at((marks[57] + marks[66]) / 2) == "lower_lip"]
    assert {name: np.mean(found) > 0.9 for name, found in hits.items()} == dict.fromkeys(hits, True), hits
    widest = int(truth["lip_opening"].argmax())
    between = truth["landmarks68"][widest][[62, 66]].mean(0).astype(int)
    assert read_parsing(demo / "truth" / "masks" / f"{widest}.png")[between[1], between[0]] == MOUTH


def test_the_background_stands_still(demo, frames):
    still = np.all([read_parsing(demo / "truth" / "masks" / f"{i}.png") == 0 for i in range(FRAMES)], 0)
    still[1:-1, 1:-1] &= still[:-2, 1:-1] & still[2:, 1:-1] & still[1:-1, :-2] & still[1:-1, 2:]
    values = np.stack([f[still] for f in frames[::10]]).astype(float)
    assert still.mean() > 0.3 and values.std(0).mean() < 2.0  # what the codec leaves


def test_the_rasterizer_keeps_the_nearest_triangle_and_leaves_no_gaps():
    points = np.array([[0, 0], [8, 0], [8, 8], [0, 8], [2, 2], [6, 2], [4, 6]], np.float32)
    depth = np.array([5, 5, 5, 5, 3, 3, 3], np.float32)
    triangles = np.array([[0, 2, 1], [0, 3, 2], [4, 6, 5], [4, 5, 6]])  # a square, a nearer triangle, and its culled back
    pixels, triangle, weights = rasterize(points, depth, triangles, 8, 8)
    assert sorted(pixels) == list(range(64))
    seen = np.zeros(64, int)
    seen[pixels] = triangle
    assert seen.reshape(8, 8)[3, 4] == 2 and 3 not in triangle and seen.reshape(8, 8)[0, 7] in (0, 1)
    corners = points[triangles[triangle]]
    np.testing.assert_allclose((corners * weights[..., None]).sum(1), np.stack([pixels % 8, pixels // 8], 1) + 0.5, atol=1e-4)


def test_chart_inverts_the_skin():
    azimuth = face_shape.chart(np.array([-0.4, 0.0, 0.3]), np.array([0.2, -0.5, -0.1]))
    np.testing.assert_allclose(face_shape.skin_point(azimuth, np.array([0.2, -0.5, -0.1]))[:, 0], [-0.4, 0.0, 0.3], atol=1e-6)


@pytest.mark.parametrize("arguments", [["--seconds", "0.5"], ["--size", "31"], ["--size", "129"]])
def test_impossible_sizes_and_lengths_are_refused_before_anything_is_written(tmp_path, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path / "out"), *arguments])
    assert stop.value.code == 2 and arguments[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_speech_only_writes_no_clip(tmp_path):
    main(["--out", str(tmp_path), "--speech-only", "--speech-seconds", "1"])
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["speech.npz", "speech.wav"]


def face_landmarker() -> Path:
    try:
        from utils import model_store
    except ImportError:
        pytest.skip("utils.model_store is absent")
    found = model_store.find("face_landmarker")
    if found is None:
        pytest.skip("needs face_landmarker.task: python -m utils.model_store fetch face_landmarker")
    return found


def test_mediapipe_finds_the_face_in_every_frame_and_sees_mouth_and_blinks_move_as_they_do(frames, truth):
    model = face_landmarker()
    mediapipe = pytest.importorskip("mediapipe")
    from mediapipe.tasks.python import BaseOptions, vision

    options = vision.FaceLandmarkerOptions(
        base_options=BaseOptions(model_asset_path=str(model)), running_mode=vision.RunningMode.VIDEO,
        output_face_blendshapes=True, num_faces=2)  # fmt: skip
    points, scores = [], []
    with vision.FaceLandmarker.create_from_options(options) as landmarker:
        for i, frame in enumerate(frames):
            image = mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=frame)
            seen = landmarker.detect_for_video(image, i * 1000 // FPS)
            assert len(seen.face_landmarks) == 1, f"{len(seen.face_landmarks)} faces in frame {i}"
            points.append([(p.x * SIZE, p.y * SIZE) for p in seen.face_landmarks[0]])
            scores.append({c.category_name: c.score for c in seen.face_blendshapes[0]})
    points = np.array(points)
    face = np.linalg.norm(points[:, 33] - points[:, 263], axis=1)
    gap = np.linalg.norm(points[:, 13] - points[:, 14], axis=1) / face
    assert np.corrcoef(gap, truth["lip_opening"])[0, 1] > 0.9
    assert np.corrcoef([s["jawOpen"] for s in scores], truth["lip_opening"])[0, 1] > 0.8
    blinks = np.array([s["eyeBlinkLeft"] + s["eyeBlinkRight"] for s in scores]) / 2
    assert np.corrcoef(blinks, truth["blink"])[0, 1] > 0.9
    assert blinks[truth["blink"] > 0.95].min() > 0.4 and blinks[truth["blink"] < 0.05].mean() < 0.15
    pairs = {36: 33, 45: 263, 39: 133, 42: 362, 48: 61, 54: 291, 8: 152, 51: 0, 57: 17, 62: 13, 66: 14}
    error = np.linalg.norm(points[:, list(pairs.values())] - truth["landmarks68"][:, list(pairs)], axis=-1)
    assert error.mean() < 0.06 * face.mean()
