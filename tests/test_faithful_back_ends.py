"""BiSeNet, RAFT-small and AVE: the layouts of the public weights, what goes in and comes out, and how the stages use them."""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import librosa
import numpy as np
import pytest
import torch
from scipy.signal import lfilter

from data_utils import face_parsing
from data_utils.face_parsing import bisenet
from data_utils.optical_flow import BACKENDS, load_flow, raft
from utils import model_store, speech
from utils.dataset_folder import DatasetFolder
from utils.errors import UserError
from utils.files import write_npz
from utils.image import read_parsing, write_rgb
from utils.speech import ave


@pytest.fixture
def store(tmp_path_factory, monkeypatch) -> Path:
    """An empty folder where weights are looked for, and nowhere else."""
    folder = tmp_path_factory.mktemp("models")
    monkeypatch.setenv("SGT_MODELS", str(folder))
    monkeypatch.setattr(model_store, "REPOSITORY", folder / "repository")
    ave._network.cache_clear()
    raft._network.cache_clear()
    return folder


# face parsing


def test_bisenet_has_the_public_checkpoints_tensors():
    state = bisenet.BiSeNetNetwork().state_dict()
    assert len(state) == 191 and sum(p.numel() for p in bisenet.BiSeNetNetwork().parameters()) == 13300416
    for name, shape in {
        "cp.resnet.conv1.weight": (64, 3, 7, 7), "cp.resnet.layer1.0.conv1.weight": (64, 64, 3, 3),
        "cp.resnet.layer2.0.downsample.0.weight": (128, 64, 1, 1), "cp.resnet.layer4.1.bn2.running_mean": (512,),
        "cp.arm16.conv.conv.weight": (128, 256, 3, 3), "cp.arm32.bn_atten.weight": (128,),
        "cp.conv_avg.conv.weight": (128, 512, 1, 1), "ffm.convblk.conv.weight": (256, 256, 1, 1),
        "ffm.conv1.weight": (64, 256, 1, 1), "conv_out.conv_out.weight": (19, 256, 1, 1),
        "conv_out16.conv.conv.weight": (64, 128, 3, 3), "conv_out32.conv_out.weight": (19, 64, 1, 1),
    }.items():  # fmt: skip
        assert tuple(state[name].shape) == shape, name
    assert not any("fc." in name or name.startswith("sp.") for name in state)


def test_bisenet_parses_a_batch_as_it_parses_its_frames_and_fills_the_frame():
    torch.manual_seed(0)
    network = bisenet.BiSeNetNetwork().eval()
    assert network(torch.zeros(1, 3, 64, 96)).shape == (1, 19, 8, 12)
    frames = [np.random.default_rng(k).integers(0, 255, (40, 56, 3), dtype=np.uint8) for k in range(3)]
    together = bisenet.parse(network, frames, side=64)
    assert together.shape == (3, 40, 56) and together.dtype == np.uint8 and together.max() < 19
    assert len(np.unique(together)) > 1
    for frame, classes in zip(frames, together, strict=True):
        assert (bisenet.parse(network, [frame], side=64)[0] == classes).mean() > 0.99


def test_bisenet_sees_imagenets_scale():
    """A frame of ImageNet's mean colour is all zeros to the network."""
    seen = []
    network = bisenet.BiSeNetNetwork().eval()
    network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    frame = np.broadcast_to(np.round(np.array(bisenet.MEAN) * 255), (32, 32, 3)).astype(np.uint8)
    bisenet.parse(network, [frame, frame + np.uint8(57)], side=32)
    assert seen[0].shape == (2, 3, 32, 32) and seen[0][0].abs().max() < 0.01
    np.testing.assert_allclose(seen[0][1].mean((1, 2)), 57 / 255 / np.array(bisenet.DEVIATION), atol=0.01)


def test_parsing_runs_on_bisenet_where_its_weights_are_and_only_there(store, tmp_path, monkeypatch):
    assert face_parsing.choose("auto").name == "mediapipe"
    with pytest.raises(UserError, match="--parsing bisenet cannot run: it needs its weights.*79999_iter.pth.*--parsing auto"):
        face_parsing.choose("bisenet")
    torch.save(bisenet.BiSeNetNetwork().state_dict(), store / "79999_iter.pth")
    assert face_parsing.choose("auto").name == "bisenet"
    monkeypatch.setattr(bisenet, "parse", lambda network, frames: np.stack([frame[..., 0] % 19 for frame in frames]))
    folder, frames = DatasetFolder(tmp_path), 5
    for i in range(frames):
        write_rgb(folder.frame(i), np.full((32, 32, 3), 20 * i, np.uint8))
    points = np.random.default_rng(0).uniform(4, 28, (frames, 478, 3)).astype(np.float32)
    write_npz(folder.face_landmarks, found=np.arange(frames) != 2, points=points)
    facts = face_parsing.run(folder, argparse.Namespace(parsing="auto", force=False, device="cpu"))
    assert facts["backend"] == "bisenet" and facts["parsed_now"] == 4
    assert not folder.parsing(2).exists()
    for i in (0, 1, 3, 4):
        assert (read_parsing(folder.parsing(i)) == 20 * i % 19).all()


# optical flow


def test_flow_stays_with_dis_and_raft_has_to_be_asked_for(store):
    assert load_flow("auto").name == "dis"
    for name in ("raft", "unfaceflow"):
        with pytest.raises(UserError, match=f"--flow {name} cannot run: it needs its weights: download http"):
            load_flow(name)


def test_raft_gives_a_flow_for_pictures_of_any_size(store):
    torch.manual_seed(0)
    torch.save({f"module.{k}": v for k, v in raft.RaftSmall().state_dict().items()}, store / "sgd_NNRT_model_epoch19008_50000.pth")
    flow = load_flow("unfaceflow")
    pictures = [np.random.default_rng(k).integers(0, 255, (90, 141, 3), dtype=np.uint8) for k in range(4)]
    together = flow.flows(pictures[:2], pictures[2:])
    assert together.shape == (2, 90, 141, 2) and together.dtype == np.float32 and np.isfinite(together).all()
    alone = flow.flows(pictures[1:2], pictures[3:])
    np.testing.assert_allclose(together[1:], alone, atol=1e-2 * np.abs(alone).max())


def test_flow_of_pictures_brought_to_another_size_is_in_their_own_pixels(store, monkeypatch):
    back_end = raft.RaftFlow("sized", "raft_small", side=(240, 320))
    back_end._network = raft.RaftSmall()
    monkeypatch.setattr(raft.RaftSmall, "forward", lambda self, x, y: torch.ones(len(x), 2, *x.shape[2:]))
    picture = np.zeros((160, 480, 3), np.uint8)
    np.testing.assert_allclose(back_end.flows([picture], [picture])[0, 80, 240], (2, 0.5))


def test_correlations_are_looked_up_where_the_flow_points():
    """Features that are one-hot by position: the correlation is 1 where source cell p meets target cell p + flow, else 0."""
    size = 16
    features = torch.eye(size * size).reshape(1, size * size, size, size)
    pyramid = raft.correlation_pyramid(features, features.roll((2, 3), (2, 3)))  # target cell (y + 2, x + 3) is source (y, x)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    at = torch.stack([x + 3, y + 2])[None].float()
    found = raft.look_up(pyramid, at).reshape(1, 4, 7, 7, size, size) * size
    inside = (slice(None), 0, 3, 3, slice(0, size - 2), slice(0, size - 3))
    assert (found[inside] - 1).abs().max() < 1e-4, "the middle of the first level's grid"
    assert found[0, 0, :, :, 4, 4].sum() == pytest.approx(1, abs=1e-4)
    off = raft.look_up(pyramid, at + torch.tensor([1.0, 0.0])[:, None, None]).reshape(1, 4, 7, 7, size, size) * size
    assert off[0, 0, 2, 3, 4, 4] == pytest.approx(1, abs=1e-4), "x is the first of the two offsets"


def warped(image: np.ndarray, flow: np.ndarray) -> np.ndarray:
    x, y = np.meshgrid(np.arange(image.shape[1]), np.arange(image.shape[0]))
    at = np.stack([x, y], -1) + flow
    return cv2.remap(image, at.astype(np.float32), None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def test_raft_small_explains_most_of_the_motion_between_real_frames(shared, monkeypatch):
    import av

    monkeypatch.setenv("SGT_MODELS", str(shared / "models"))
    with av.open(str(shared / "videos/synctalk_short_demo.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame, _ in zip(video.decode(video=0), range(9), strict=False)]
    source, target = (cv2.resize(frames[i], (256, 256), interpolation=cv2.INTER_AREA) for i in (0, 8))
    flows = {name: load_flow(name).flows([source], [target])[0] for name in ("raft", "dis")}
    error = {name: np.abs(warped(target, flow).astype(float) - source).mean() for name, flow in flows.items()}
    still = np.abs(target.astype(float) - source).mean()
    assert error["raft"] < 0.6 * still
    assert np.linalg.norm(flows["raft"] - flows["dis"], axis=2).mean() < 0.5 * np.linalg.norm(flows["dis"], axis=2).mean()


def test_raft_small_finds_a_known_shift(shared, monkeypatch):
    monkeypatch.setenv("SGT_MODELS", str(shared / "models"))
    random = np.random.default_rng(0)
    picture = cv2.GaussianBlur(random.integers(0, 255, (170, 170, 3), dtype=np.uint8), (0, 0), 2)
    picture = cv2.normalize(picture, None, 0, 255, cv2.NORM_MINMAX)
    flow = load_flow("raft").flows([picture[10:154, 10:154]], [picture[6:150, 13:157]])[0]  # p is found at p + (-3, 4)
    error = np.linalg.norm(flow[20:-20, 20:-20] - (-3, 4), axis=2)
    assert np.median(error) < 0.3 and set(BACKENDS) == {"raft", "unfaceflow", "dis"}


# audio-visual encoder


def test_ave_has_the_public_layout():
    network = ave.make_network()
    assert len(network) == 13 and sum(p.numel() for p in network.parameters()) == 2812672
    sizes, x = [], torch.zeros(2, 1, 80, 16)
    for block in network:
        x = block(x)
        sizes.append(tuple(x.shape[2:]))
    assert sizes == [(80, 16)] * 3 + [(27, 16)] * 3 + [(9, 6)] * 3 + [(3, 3)] * 2 + [(1, 1)] * 2
    assert x.shape == (2, 512, 1, 1) and (x >= 0).all()
    state = network.state_dict()
    assert tuple(state["0.conv_block.0.weight"].shape) == (32, 1, 3, 3) and "12.conv_block.1.running_mean" in state


def test_aves_mel_is_that_of_an_independent_stft():
    samples = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)
    samples[4000:6000] = 0
    emphasised = lfilter([1, -0.97], [1], samples)
    spectrum = np.abs(librosa.stft(emphasised, n_fft=800, hop_length=200, win_length=800, pad_mode="constant"))
    mel = librosa.filters.mel(sr=16000, n_fft=800, n_mels=80, fmin=55, fmax=7600) @ spectrum
    decibels = 20 * np.log10(np.maximum(1e-5, mel)) - 20
    expected = np.clip(8 * (decibels + 100) / 100 - 4, -4, 4).T
    assert len(expected) == ave.mel_count(len(samples)) == 81
    np.testing.assert_allclose(ave.mel_frames(samples, 0, 81), expected, atol=2e-3)
    np.testing.assert_allclose(ave.mel_frames(samples, 30, 50), expected[30:50], atol=2e-3)
    assert expected.min() == -4 and expected.max() > 0, "silence and noise are both in it"


def test_the_number_of_windows_is_the_lineages():
    assert ave.window_count(1065) == 329  # 13.3 s
    assert [ave.window_count(t) for t in (16, 17, 19, 20, 96)] == [2, 2, 2, 3, 27]


@pytest.fixture
def ave_weights(store) -> Path:
    torch.manual_seed(0)
    network = ave.make_network()
    for block in network:
        torch.nn.init.kaiming_normal_(block.conv_block[0].weight)
    torch.save(network.state_dict(), store / "audio_visual_encoder.pth")
    return store


def test_a_row_of_ave_is_the_window_that_begins_two_frames_before(ave_weights):
    samples = np.random.default_rng(1).normal(0, 0.1, round(1.3 * 16000)).astype(np.float32)
    features = speech.encode("ave", samples, 33)
    network = ave.load_network(ave_weights / "audio_visual_encoder.pth")
    mel = ave.mel_frames(samples, 0, ave.mel_count(len(samples)))
    count = ave.window_count(len(mel))
    begins = [min(int(80.0 * i / 25), len(mel) - 16) for i in range(count)]
    windows = network(torch.from_numpy(np.stack([mel[b : b + 16].T for b in begins]))[:, None]).flatten(1).numpy()
    rows = np.concatenate([windows[:1]] * 2 + [windows] + [windows[-1:]] * 2)  # count + 4, the lineage's padding
    assert len(rows) >= 33
    np.testing.assert_allclose(features, rows[:33], atol=1e-4)


def test_ave_streams_in_blocks_and_takes_any_length(ave_weights, monkeypatch):
    samples = np.random.default_rng(2).normal(0, 0.1, 16000).astype(np.float32)
    whole = speech.encode("ave", samples, 25)
    monkeypatch.setattr(ave, "BATCH", 7)
    np.testing.assert_allclose(speech.encode("ave", samples, 25), whole, atol=1e-4)
    for count in (1, 639, 641, 3201):
        assert sum(len(block) for block in speech.ENCODERS["ave"].stream(samples[:count])) == -(-count // 640)
    assert whole.shape == (25, 512) and (whole >= 0).all() and len(np.unique(whole.round(3), axis=0)) > 20


def test_ave_is_preferred_where_its_weights_are_and_not_missed_elsewhere(store, monkeypatch, capsys):
    monkeypatch.setattr(speech.ENCODERS["whisper"], "prepare", lambda: None)
    assert speech.best_encoder() == "whisper" and capsys.readouterr().err == ""
    with pytest.raises(UserError, match="audio_visual_encoder.pth"):
        speech.encode("ave", np.ones(640, np.float32), 1)
    torch.save(ave.make_network().state_dict(), store / "audio_visual_encoder.pth")
    assert speech.best_encoder() == "ave"
