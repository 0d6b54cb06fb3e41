"""SyncNet: the published layout, loaded to the last tensor; MFCCs as published; the score finds a shift of the sound."""

import numpy as np
import pytest
import scipy.fft
import torch

from utils import model_store
from utils.errors import UserError
from utils.syncnet import SyncNet, crop, face_boxes, load_syncnet, mfcc, scores


def test_the_layers_have_the_names_and_shapes_of_the_published_weights():
    shapes = {name: tuple(tensor.shape) for name, tensor in SyncNet().state_dict().items()}
    assert shapes["netcnnaud.4.weight"] == (192, 64, 3, 3) and shapes["netcnnaud.18.weight"] == (512, 256, 5, 4)
    assert shapes["netcnnlip.0.weight"] == (96, 3, 5, 7, 7) and shapes["netcnnlip.18.weight"] == (512, 256, 1, 6, 6)
    assert shapes["netfcaud.3.weight"] == shapes["netfclip.3.weight"] == (1024, 512)
    assert 54.5e6 < 4 * sum(np.prod(shape) for shape in shapes.values()) < 54.6e6  # the file is 52 MiB


def test_weights_are_taken_whole_or_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(model_store, "find", lambda name: None)
    assert load_syncnet() is None
    path, tensors = tmp_path / "syncnet_v2.model", SyncNet().state_dict()
    monkeypatch.setattr(model_store, "find", lambda name: path)
    torch.save(tensors, path)
    network = load_syncnet()
    assert torch.equal(network.netcnnlip[8].weight, tensors["netcnnlip.8.weight"])
    assert network.sound(torch.randn(2, 13, 20)).shape == network.lips(torch.rand(2, 3, 5, 224, 224) * 255).shape == (2, 1024)
    del tensors["netfclip.0.bias"]
    torch.save(tensors, path)
    with pytest.raises(UserError, match="netfclip.0.bias"):
        load_syncnet()


def test_mfccs_are_those_of_the_published_front_end():
    """Step by step: pre-emphasis, rectangular windows, 26 triangles, orthonormal DCT, lifter 22, log energy in place of row 0."""
    samples = np.random.default_rng(0).normal(0, 0.1, 2000).astype(np.float32)
    signal = samples.astype(np.float64) * 32768
    signal = np.append(signal[0], signal[1:] - 0.97 * signal[:-1])
    mel = lambda hz: 2595 * np.log10(1 + hz / 700)  # noqa: E731
    bins = [int(513 * 700 * (10 ** (m / 2595) - 1) / 16000) for m in np.linspace(mel(0), mel(8000), 28)]
    got = mfcc(samples)
    assert got.shape == (13, 11)
    for t in (0, 5, 10):
        power = np.abs(np.fft.rfft(np.pad(signal, (0, 400))[160 * t : 160 * t + 400], 512)) ** 2 / 512
        energies = []
        for a, b, c in zip(bins, bins[1:], bins[2:], strict=False):
            up = sum(power[i] * (i - a) / (b - a) for i in range(a, b))
            energies.append(up + sum(power[i] * (c - i) / (c - b) for i in range(b, c)))
        wanted = scipy.fft.dct(np.log(energies), norm="ortho")[:13] * (1 + 11 * np.sin(np.pi * np.arange(13) / 22))
        wanted[0] = np.log(power.sum())
        np.testing.assert_allclose(got[:, t], wanted, rtol=1e-4, atol=1e-3)


def marks(count, x=60.0, y=50.0, half=20.0):
    """(F, 68, 2): a face whose brows lie at y - 0.6 half, its chin at y + half, as wide as it is high with its forehead."""
    face = np.full((count, 68, 2), (x, y))
    face[:, 0], face[:, 16], face[:, 8], face[:, 24] = (x - half, y), (x + half, y), (x, y + half), (x, y - 0.6 * half)
    return face


def test_the_crop_is_the_face_with_a_margin_in_bgr_and_grey_beyond_the_picture():
    landmarks = marks(20)
    landmarks[4] = np.nan
    landmarks[10, :, 0] += 9  # one slip of the detector
    boxes = face_boxes(landmarks)
    np.testing.assert_allclose(boxes, np.broadcast_to([60, 50, 20], (20, 3)), atol=0.01)
    frame = np.zeros((100, 120, 3), np.uint8)
    frame[50:, :, 0] = 200  # red below the middle of the face
    face = crop(frame, boxes[0])
    assert face.shape == (224, 224, 3)
    edge = round(224 * 20 / 56)  # the box begins at the top, its middle is half a box below
    assert face[edge - 6, 112].tolist() == [0, 0, 0] and face[edge + 6, 112].tolist() == [0, 0, 200]
    assert (crop(frame, np.array([60.0, 0.0, 40.0]))[:20] == 110).all()
    with pytest.raises(UserError, match="no frame shows a face"):
        face_boxes(landmarks * np.nan)


@pytest.mark.parametrize("early", [0, 3, -2])
def test_the_score_finds_by_how_much_the_sound_comes_early(early):
    """Towers that read off brightness and energy: with both driven by one curve, the distance is least at their shift."""
    rng = np.random.default_rng(1)
    curve = rng.uniform(0.2, 1.0, 80)
    frames = [np.full((100, 120, 3), round(200 * value), np.uint8) for value in curve]
    samples = np.repeat(np.roll(curve, -early), 640) * rng.normal(0, 0.1, 80 * 640)
    network = SyncNet().eval()
    network.lips = lambda w: w[:, 0, :, 112, 112] / 200
    network.sound = lambda w: ((w[:, 0].view(-1, 5, 4)[:, :, 1:3].mean(-1) - 22.1) / 2).exp()
    found = scores(network, frames, marks(80), samples.astype(np.float32))
    assert found["AVOffset"] == early and found["LSE_C"] > 0.1 and found["LSE_D"] < 2
    with pytest.raises(UserError, match="longer clip"):
        scores(network, frames[:4], marks(4), samples[: 4 * 640])
