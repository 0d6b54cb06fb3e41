"""Speech features: row i is frame i, for any length, from any chunk, at any loudness; and stage 1, which writes them."""

from __future__ import annotations

import argparse
import tracemalloc
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile

from data_utils import audio as stage
from data_utils.demo_head.voice import speak
from utils import model_store, speech
from utils.constants import SAMPLE_RATE, SAMPLES_PER_FRAME
from utils.dataset_folder import DatasetFolder
from utils.errors import UserError
from utils.speech.log_mel import log_mel
from utils.video import VideoWriter


@pytest.fixture(params=list(speech.ENCODERS))
def encoder(request) -> str:
    """Each encoder in turn; one whose weights can neither be found nor fetched is skipped."""
    try:
        speech.ENCODERS[request.param].prepare()
    except UserError as error:
        pytest.skip(str(error))
    return request.param


def noise(seconds: float, level: float = 0.1, seed: int = 0) -> np.ndarray:
    """Noise that swells and fades like syllables."""
    count = round(seconds * SAMPLE_RATE)
    rng, knots = np.random.default_rng(seed), count // 3000 + 2
    swell = np.interp(np.arange(count) / 3000, np.arange(knots), rng.uniform(0, 1, knots))
    return (level * swell * rng.normal(size=count)).astype(np.float32)


def deviation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How far the rows of a and b lie apart, as a part of how far rows lie from their mean."""
    return np.linalg.norm(a - b, axis=1) / np.linalg.norm(a - a.mean(0), axis=1).mean()


def test_a_tone_within_one_frame_lights_the_row_of_that_frame(encoder):
    def with_tone(frame: int) -> np.ndarray:
        samples = np.random.default_rng(0).normal(0, 1e-3, 60 * SAMPLES_PER_FRAME).astype(np.float32)
        inside = np.arange(frame * SAMPLES_PER_FRAME, (frame + 1) * SAMPLES_PER_FRAME)
        samples[inside] += 0.5 * np.sin(2 * np.pi * 700 / SAMPLE_RATE * inside) * np.hanning(SAMPLES_PER_FRAME)
        return speech.encode(encoder, samples, 60)

    change = np.linalg.norm(with_tone(20) - with_tone(37), axis=1)
    assert sorted(np.argsort(change)[-2:]) == [20, 37]


def test_a_mel_row_lies_on_the_middle_of_its_frame():
    """So the features of the reversed recording are the reversed features; half a frame aside they would not be."""
    samples = noise(2)
    backwards = speech.encode("mel", samples[::-1].copy(), 50)[::-1]
    forwards = speech.encode("mel", samples, 50)
    assert deviation(forwards[2:-2], backwards[2:-2]).mean() < 0.05
    assert deviation(forwards[2:-2], backwards[1:-3]).mean() > 0.3


def test_the_log_mel_is_whispers_at_the_beginning_the_middle_and_the_end():
    samples = noise(2.3)
    padded = np.concatenate([samples, np.zeros(SAMPLE_RATE, np.float32)])
    spectrum = librosa.stft(padded, n_fft=400, hop_length=160, window="hann", center=True, pad_mode="reflect")
    power = np.abs(spectrum[:, :-1]) ** 2
    expected = np.log10(np.maximum(librosa.filters.mel(sr=16000, n_fft=400, n_mels=80) @ power, 1e-10)).T
    whole = log_mel(samples, 0, len(expected))
    np.testing.assert_allclose(whole, expected, atol=2e-3)
    pieces = [log_mel(samples, a, a + 37) for a in range(-37, 300, 37)]
    np.testing.assert_allclose(np.concatenate(pieces)[37 : 37 + len(whole)], whole[: 10 * 37 - 37], atol=1e-5)
    assert (pieces[0] == -10).all(), "silence before the recording"


def test_a_row_does_not_depend_on_how_long_the_recording_is(encoder):
    samples = speak(9, seed=0).samples
    whole = speech.encode(encoder, samples, 225)
    cut = 75  # not a multiple of the windows' step
    part = speech.encode(encoder, samples[cut * SAMPLES_PER_FRAME :], 225 - cut)
    # where both hear the same 2 seconds before; Whisper in one chunk each gives 1.2: the position shows more than the speech
    assert deviation(whole[cut:], part)[50:].mean() < 0.15


def test_there_are_no_seams(encoder):
    """Steps between rows are no larger where one batch of windows ends than elsewhere."""
    features = speech.encode(encoder, noise(26), 650)
    steps = np.linalg.norm(np.diff(features, axis=0), axis=1)
    seams = np.array([k * 100 + offset for k in range(1, 6) for offset in (9, 10, 89, 90, 99, 0)]) - 1
    assert steps[seams].mean() < 1.3 * steps.mean()


@pytest.mark.parametrize("encoder", ["whisper", "mel"], indirect=True)  # ave was trained on absolute levels
def test_the_same_speech_at_a_quarter_of_the_level_gives_the_same_features(encoder):
    samples = noise(3)
    np.testing.assert_allclose(speech.encode(encoder, samples / 4, 75), speech.encode(encoder, samples, 75), atol=0.03)


@pytest.mark.parametrize("count", [1, 100, 639, 640, 641, 5 * 640 + 7])
def test_any_length_gives_as_many_rows_as_asked_for(encoder, count):
    samples = noise(1)[:count]
    rows = sum(len(block) for block in speech.ENCODERS[encoder].stream(samples))
    assert rows == -(-count // SAMPLES_PER_FRAME)
    features = speech.encode(encoder, samples, rows + 3)
    assert features.shape == (rows + 3, speech.ENCODERS[encoder].dim) and features.dtype == np.float32
    assert np.isfinite(features).all()
    assert (features[rows:] == features[rows - 1]).all(), "rows after the end repeat the last one"


def test_silence_gives_finite_features(encoder):
    assert np.isfinite(speech.encode(encoder, np.zeros(SAMPLE_RATE, np.float32), 25)).all()


def test_no_samples_and_unknown_encoders_are_refused(encoder):
    with pytest.raises(UserError, match="no samples"):
        speech.encode(encoder, np.zeros(0, np.float32), 5)
    with pytest.raises(UserError, match="there are ave, whisper, mel"):
        speech.encode("parrot", noise(1), 25)


def test_the_memory_of_encoding_does_not_grow_with_the_length(encoder):
    tracemalloc.start()
    peaks = []
    for minutes in (1, 4):
        samples = np.broadcast_to(np.float32(0.01), minutes * 60 * SAMPLE_RATE)  # takes no memory itself
        tracemalloc.reset_peak()
        for _, block in zip(range(3), speech.ENCODERS[encoder].stream(samples), strict=False):
            assert len(block) <= 1000
        peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert peaks[1] < 60e6 and peaks[1] < 1.5 * peaks[0]


def test_without_whisper_the_best_encoder_is_mel_and_the_reason_is_said(monkeypatch, capsys):
    def absent(name: str):
        raise UserError(f"{name} could not be fetched")

    monkeypatch.setattr(model_store, "fetch", absent)
    assert speech.best_encoder() == "mel"
    assert "whisper cannot be used: whisper_tiny_en could not be fetched" in capsys.readouterr().err


# stage 1


def film(path: Path, samples: np.ndarray | None, frames: int = 50) -> Path:
    with VideoWriter(path, 64, 64, audio=samples) as writer:
        for _ in range(frames):
            writer.add(np.full((64, 64, 3), 128, np.uint8))
    return path


def options(video: Path, **changes) -> argparse.Namespace:
    return argparse.Namespace(**{"video": video, "audio": "mel", "force": False, "quiet": True, **changes})


def test_the_stage_writes_the_sound_and_a_row_a_frame(tmp_path):
    folder = DatasetFolder(tmp_path / "data")
    facts = stage.run(folder, options(film(tmp_path / "clip.mp4", noise(2))))
    samples, rate = soundfile.read(folder.audio)
    assert rate == SAMPLE_RATE and samples.ndim == 1 and abs(len(samples) / rate - 2) < 0.1
    features = np.load(folder.audio_features("mel"))
    assert features.shape == (facts["frames"], 80) and 50 <= facts["frames"] <= 52
    assert facts["backend"] == "mel" and facts["warnings"] == []


def test_a_clip_without_an_audio_track_is_refused_with_its_name(tmp_path):
    with pytest.raises(UserError, match="mute.mp4 has no audio track"):
        stage.run(DatasetFolder(tmp_path), options(film(tmp_path / "mute.mp4", None)))


def test_a_silent_clip_is_refused_unless_forced(tmp_path):
    video = film(tmp_path / "silent.mp4", np.zeros(2 * SAMPLE_RATE, np.float32))
    with pytest.raises(UserError, match="silent.mp4 is silent"):
        stage.run(DatasetFolder(tmp_path / "data"), options(video))
    assert not (tmp_path / "data").exists()
    stage.run(DatasetFolder(tmp_path / "data"), options(video, force=True))
    assert np.isfinite(np.load(tmp_path / "data" / "aud_mel.npy")).all()


def test_sound_that_ends_early_or_pauses_long_is_warned_of(tmp_path):
    samples = np.concatenate([noise(1), np.zeros(4 * SAMPLE_RATE, np.float32), noise(1)])
    facts = stage.run(DatasetFolder(tmp_path / "data"), options(film(tmp_path / "clip.mp4", samples, frames=175)))
    assert 3.8 <= facts["longest_silence"] <= 4.2
    assert any("nothing is heard for" in warning for warning in facts["warnings"])
    assert any("shorter than the picture" in warning for warning in facts["warnings"])


def test_sound_that_begins_before_or_after_the_picture_is_moved_to_it():
    samples = np.arange(1, 6401, dtype=np.float32)
    assert (stage.aligned(samples, -0.08) == samples[1280:]).all()
    late = stage.aligned(samples, 0.04)
    assert len(late) == 6400 + 640 and (late[:640] == 0).all() and (late[640:] == samples).all()
    assert (stage.aligned(samples, 0.0) == samples).all()


def test_auto_says_in_the_report_that_it_fell_back(tmp_path, monkeypatch):
    monkeypatch.setattr(stage.speech, "best_encoder", lambda: "mel")
    facts = stage.run(DatasetFolder(tmp_path / "data"), options(film(tmp_path / "clip.mp4", noise(2)), audio="auto"))
    assert facts["backend"] == "mel" and "lips follow whisper better" in facts["warnings"][0]


def test_an_unknown_encoder_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="--audio parrot is not known; use auto, ave, whisper, mel"):
        stage.run(DatasetFolder(tmp_path), options(tmp_path / "clip.mp4", audio="parrot"))
