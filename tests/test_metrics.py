"""The metrics give known values on pictures and curves whose answer is known."""

import itertools
import json
import shutil
import sys
import types

import cv2
import numpy as np
import pytest
import torch
from tiny_dataset import write_tiny_dataset

import metrics
from scene.talking_dataset_readers import TalkingDatasetReader
from utils import model_store
from utils.compare_models import worst_frames
from utils.constants import CLOTH, HAIR, HEAD_CLASSES, NECK, PART_CLASSES, SKIN
from utils.files import write_json
from utils.image import read_rgb, write_rgb
from utils.image_metrics import (
    correlation_and_lag,
    eye_opening,
    head_rim,
    inter_ocular,
    jitter,
    lip_opening,
    lmd,
    masked_error,
    neck_ring,
    psnr,
    ssim,
)
from utils.video import read_frames


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


def test_the_opening_of_the_eyes_is_the_gap_of_their_lids_in_widths_of_an_eye():
    marks = face(3)
    for eye in (slice(36, 42), slice(42, 48)):  # corner, two of the upper lid, corner, two of the lower lid
        marks[:, eye] = (100, 100) + 20.0 * np.array([[0, 0], [0.3, -0.2], [0.6, -0.2], [1, 0], [0.6, 0.1], [0.3, 0.1]])
    marks[1, [37, 38]] += (0, 6.0)  # the upper lid of one eye comes down
    np.testing.assert_allclose(eye_opening(marks), [0.3, 0.15, 0.3], atol=1e-6)
    marks[2, 0] = np.nan
    marks[2, 36:48] = np.nan
    assert np.isnan(eye_opening(marks)[2])


def test_a_mouth_that_never_moves_has_no_correlation():
    value, lag = correlation_and_lag(np.full(40, 0.1), np.sin(np.arange(40)))
    assert np.isnan(value) and lag == 0


def test_jitter_measures_shaking_and_not_steady_motion():
    texture = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 255, (240, 320), np.uint8), (0, 0), 3)
    texture = cv2.cvtColor(cv2.normalize(texture, None, 0, 255, cv2.NORM_MINMAX), cv2.COLOR_GRAY2RGB)

    def film(places):
        """A textured face whose place is given by `places` (F,), pixels to the right."""
        moves = [cv2.warpAffine(texture, np.float32([[1, 0, x], [0, 1, 0]]), (320, 240)) for x in places]
        return moves, face(len(places)) + np.array([100.0, 100.0]) + np.stack([places, 0 * places], 1)[:, None]

    steady = 1.3 * np.arange(12.0)
    assert jitter(*film(steady)) < 0.1
    shaking = steady + 0.25 * (-1.0) ** np.arange(12)  # second difference 4 x 0.25
    frames, marks = film(shaking)
    assert jitter(frames, marks) == pytest.approx(1.0, abs=0.1)
    marks[5] = np.nan
    assert jitter(frames, marks) == pytest.approx(1.0, abs=0.1)
    assert np.isnan(jitter(frames[:2], marks))


def test_the_neck_ring_lies_where_the_head_meets_the_body():
    classes = np.zeros((60, 60), np.uint8)
    classes[10:40, 15:45] = SKIN
    classes[5:10, 15:45] = HAIR
    classes[40:50, 22:38] = NECK
    classes[50:, 5:55] = CLOTH
    ring = neck_ring(classes, HEAD_CLASSES, 4)
    assert ring[37:44, 25:35].all() and not ring[:34].any() and not ring[46:].any()
    assert not neck_ring(classes, PART_CLASSES["all"], 4).any()


def test_the_rim_goes_around_the_head_and_leaves_the_neck_out():
    classes = np.zeros((60, 60), np.uint8)
    classes[10:40, 15:45] = SKIN
    classes[5:10, 15:45] = HAIR
    classes[40:50, 22:38] = NECK
    rim = head_rim(classes, HEAD_CLASSES, 4)
    for rows, columns in ((slice(2, 9), 30), (25, slice(12, 19)), (25, slice(42, 49)), (slice(37, 44), 17)):
        assert rim[rows, columns].all()  # above, to either side, at the jaw
    assert not rim[12:34, 20:40].any() and not rim[:, :10].any() and not (rim & neck_ring(classes, HEAD_CLASSES, 4)).any()
    assert not rim[36:45, 24:36].any()


def test_the_error_in_a_mask_is_that_of_its_pixels_only():
    x, y = torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    y[..., :4] = 0.2
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:4] = 1
    assert float(masked_error(x, y, mask)) == pytest.approx(51)
    assert torch.isnan(masked_error(x, y, mask * 0)).all()


# -- the program -------------------------------------------------------------------------------------------------


@pytest.fixture
def rendered(tmp_path):
    """A model folder whose rendered test frames are the filmed ones, but for noise of 10 / 255 in the last."""
    dataset = write_tiny_dataset(tmp_path / "data 数据")
    reader = TalkingDatasetReader(dataset.root)
    folder, ids = tmp_path / "model" / "test" / "ours_30", reader.splits["train"][:9]
    for k, i in enumerate(ids):
        filmed = reader.image(i)
        write_rgb(folder / "gt" / f"{k:05d}.png", filmed)
        noise = np.random.default_rng(0).normal(0, 10, filmed.shape) * (k == 8)
        write_rgb(folder / "renders" / f"{k:05d}.png", np.clip(filmed + noise, 0, 255).astype(np.uint8))
    write_json(folder / "frames.json", {"ids": ids, "iteration": 30, "part": "head", "feather": 0.0,
                                        "source_path": str(dataset.root), "audio_encoder": "mel"})  # fmt: skip
    return tmp_path / "model"


@pytest.fixture
def talking(monkeypatch):
    """Landmarks of a mouth that moves; the rendered one a frame late. The last frame has no face."""
    opening = 0.1 + 0.05 * np.sin(np.arange(9) * 1.3)

    def find(folder, count, label):
        marks = face(count, scale=20.0, opening=np.roll(opening, 1) if folder.name == "renders" else opening) + 22
        marks[-1] = np.nan
        return marks

    monkeypatch.setattr(metrics, "find_landmarks", find)


@pytest.fixture
def needs_stlpips():
    if model_store.find("stlpips_alex") is None:
        pytest.skip("needs the ST-LPIPS weights (python -m utils.model_store fetch stlpips_alex)")


def test_results_hold_every_metric_and_the_protocol_they_were_taken_under(rendered, talking, needs_stlpips, capsys):
    fps = {"network + raster": 90.0, "to memory": 60.0, "to mp4": 50.0}
    write_json(rendered / "speed.json", {"iteration": 30, "machine": "a box", "batch": {"4": {"fps": {}}, "16": {"fps": fps}}})
    metrics.main(["-m", str(rendered), "--device", "cpu"])
    results = json.loads((rendered / "results.json").read_text())["ours_30"]
    views = json.loads((rendered / "per_view.json").read_text())["ours_30"]
    assert views["PSNR"]["00000.png"] == 100 and views["PSNR"]["00008.png"] == pytest.approx(28.3, abs=0.7)
    assert results["PSNR"] == pytest.approx(np.mean(list(views["PSNR"].values())), abs=1e-4)
    assert views["SSIM"]["00000.png"] == pytest.approx(1, abs=1e-5) and views["SSIM"]["00008.png"] < 0.9
    assert views["STLPIPS_alex"]["00000.png"] == 0 < views["STLPIPS_alex"]["00008.png"]
    assert views["Seam"]["00000.png"] == 0 < views["Seam"]["00008.png"] < 12 and results["Seam_true_head"] >= 0
    assert views["Seam_head"]["00008.png"] > 4 and views["Seam_body"]["00008.png"] > 4 and views["Error_head"]["00000.png"] == 0
    assert views["Seam_rim"]["00000.png"] == 0 < views["Seam_rim"]["00008.png"] < 12 and results["Seam_rim_true_head"] > 0
    sides = [results[name] for name in ("Seam_body_true_head", "Seam_true_head")]
    assert sides[0] >= sides[1] >= 0  # the filmed head is right on its own side
    assert results["LipLag"] == 1 and results["LipCorrelation"] < 0.9 and views["LMD"]["00008.png"] is None
    assert 0 <= results["Jitter_gt"] < 3 and 0 <= results["Jitter"] < 3 and results["FacesFound"] == pytest.approx(8 / 9, abs=1e-5)
    protocol = results["protocol"]
    assert protocol["frames"] == 9 and protocol["split"] == "test" and protocol["iteration"] == 30
    assert "never re-encoded" in protocol["pictures"] and "full frame" in protocol["region"] and protocol["machine"]
    assert results["FPS_mp4"] == 50 and "batch 16, a box" in protocol["speed"]
    printed = capsys.readouterr().out
    optional = ("LPIPS", "LSE", "AVOffset")  # need packages or weights of the user's
    assert all(name in printed for name, *_ in metrics.TABLE if not name.startswith(optional)) and "9 frames" in printed
    assert results["Flicker"] > results["Flicker_gt"] > 0  # the noise of the last frame
    flickers = [views["Flicker"][f"{k:05d}.png"] is not None for k in range(9)]
    assert flickers == [0, 1, 0, 0, 1, 1, 1, 1, 0]  # frame 3 of the clip was dropped: there are no neighbours around it


def test_scores_that_need_what_the_user_brings_are_there_when_it_is(rendered, talking, needs_stlpips, monkeypatch):
    """LPIPS through the package of its name, SyncNet through its weights, each beside the filmed frames' own score."""

    class Distance(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            if net == "vgg":
                raise OSError("no route to host")

        def forward(self, x, y, normalize):
            assert normalize
            return (x - y).abs().mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=Distance))
    monkeypatch.setattr(metrics, "load_syncnet", lambda: torch.nn.Identity())
    heard = []

    def scores(network, frames, marks, samples):
        heard.append((sum(1 for _ in frames), len(marks), len(samples)))
        return {"LSE_D": 7.0 + len(heard), "LSE_C": 8.0, "AVOffset": 0}

    monkeypatch.setattr(metrics, "scores", scores)
    metrics.main(["-m", str(rendered), "--device", "cpu"])
    results = json.loads((rendered / "results.json").read_text())["ours_30"]
    views = json.loads((rendered / "per_view.json").read_text())["ours_30"]
    assert views["LPIPS_alex"]["00000.png"] == 0 < views["LPIPS_alex"]["00008.png"] and "LPIPS_vgg" not in results
    assert (results["LSE_D"], results["LSE_D_gt"], results["LSE_C"]) == (8, 9, 8) and heard == [(9, 9, 9 * 640)] * 2


def test_a_folder_that_takes_no_results_is_said_before_anything_is_measured(rendered, monkeypatch, capsys):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    monkeypatch.setattr(metrics, "picture_metrics", None)
    with pytest.raises(SystemExit) as stop:
        metrics.main(["-m", str(rendered), "--device", "cpu"])
    assert stop.value.code == 2 and "nothing can be written into" in capsys.readouterr().err


def test_results_of_other_iterations_stay(rendered, talking, needs_stlpips):
    write_json(rendered / "results.json", {"ours_10": {"PSNR": 20.0}})
    metrics.main(["-m", str(rendered), "--iteration", "30", "--device", "cpu"])
    results = json.loads((rendered / "results.json").read_text())
    assert results["ours_10"] == {"PSNR": 20.0} and results["ours_30"]["PSNR"] > 28
    assert "FPS_mp4" not in results["ours_30"]  # nobody timed this iteration


def test_two_models_are_compared_in_a_table_and_by_their_worst_frames(
    rendered, talking, needs_stlpips, tmp_path, capsys, monkeypatch
):
    other = shutil.copytree(rendered, tmp_path / "other")
    for k in (0, 8):  # worse than the first model by far, and two frames that are not neighbours
        path = other / "test/ours_30/renders" / f"{k:05d}.png"
        write_rgb(path, 255 - read_rgb(path))
    for model in (rendered, other):
        metrics.main(["-m", str(model), "--device", "cpu"])
    capsys.readouterr()
    metrics.main(["--compare", str(rendered), str(other)])
    lines = capsys.readouterr().out.splitlines()
    (psnr_line,) = [line.split() for line in lines if line.startswith("PSNR ")]
    assert psnr_line[1].endswith("*") and not psnr_line[2].endswith("*") and float(psnr_line[3]) < -5
    sheet = read_rgb(rendered / "compare_other.png")
    assert lines[-1].endswith("compare_other.png") and sheet.shape == (256, 2 * 3 * 256 + 2, 3)  # two frames: A, B, filmed
    left, middle, right = (sheet[100:200, x + 50 : x + 200].astype(int) for x in (0, 256, 512))
    assert np.abs(left - right).mean() < 1 and np.abs(middle - right).mean() > 40
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(SystemExit):
        metrics.main(["--compare", str(rendered), str(other)])
    assert "nothing can be written into" in capsys.readouterr().err


def test_models_measured_on_different_frames_or_not_at_all_are_not_compared(rendered, talking, needs_stlpips, tmp_path, capsys):
    other = shutil.copytree(rendered, tmp_path / "other")
    metrics.main(["-m", str(rendered), "--device", "cpu"])
    with pytest.raises(SystemExit):
        metrics.main(["--compare", str(rendered), str(other)])
    assert "was not measured" in capsys.readouterr().err
    metrics.main(["-m", str(other), "--device", "cpu"])
    facts = json.loads((other / "test/ours_30/frames.json").read_text())
    write_json(other / "test/ours_30/frames.json", facts | {"ids": facts["ids"][1:]})
    with pytest.raises(SystemExit):
        metrics.main(["--compare", str(rendered), str(other)])
    assert "different frames" in capsys.readouterr().err


def test_the_worst_frames_are_not_each_others_neighbours():
    a = {f"{k:05d}.png": 30.0 - (20 <= k < 26) * 10 - (k == 50) * 5 for k in range(60)}
    b = {name: 31.0 for name in a} | {"00040.png": 12.0, "00003.png": None}
    assert worst_frames(a, b, 3) == ["00020.png", "00040.png", "00050.png"]


def test_frames_that_were_not_rendered_to_the_end_are_refused_with_the_command_that_does(rendered, capsys):
    for arguments in (["--iteration", "40"], ["--split", "train"]):
        with pytest.raises(SystemExit) as stop:
            metrics.main(["-m", str(rendered), *arguments])
        assert stop.value.code == 2 and "render.py" in capsys.readouterr().err
    (rendered / "test/ours_30/frames.json").unlink()
    with pytest.raises(SystemExit) as stop:
        metrics.main(["-m", str(rendered)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "render.py -m" in said and said.count("\n") == 1


def test_landmarks_are_found_on_real_frames_and_follow_their_shift(shared, tmp_path):
    if model_store.find("face_landmarker") is None:
        pytest.skip("needs the face landmarker (python -m utils.model_store fetch face_landmarker)")
    frames = itertools.islice(read_frames(shared / "videos" / "dfrf_cnn2_25fps.mp4"), 6)
    for k, frame in enumerate(frames):
        write_rgb(tmp_path / "a" / f"{k:05d}.png", frame)
        write_rgb(tmp_path / "b" / f"{k:05d}.png", np.roll(frame, 8, axis=1))
    a, b = (metrics.find_landmarks(tmp_path / name, 6, name) for name in "ab")
    assert np.isfinite(a).all() and np.median((b - a)[..., 0]) == pytest.approx(8, abs=0.5)
    assert 100 < inter_ocular(a).mean() < 300
    write_rgb(tmp_path / "c" / "00000.png", np.full((64, 64, 3), 90, np.uint8))
    assert np.isnan(metrics.find_landmarks(tmp_path / "c", 1, "c")).all()
