"""What benchmarks/long.py measures with: sound of the asked length, and shifts of it that are found."""

import numpy as np
import pytest
import soundfile

from benchmarks import long
from utils.errors import UserError


def test_made_up_speech_has_its_length_words_and_pauses(tmp_path):
    samples = np.concatenate(list(long.speech_like(20)))
    assert len(samples) == 20 * 16_000 and np.isfinite(samples).all() and np.abs(samples).max() < 1
    levels = long.frame_levels([samples], 500)
    assert 0.15 < (levels < -60).mean() < 0.7
    long.write_speech(tmp_path / "a.wav", 3.5)
    read, rate = soundfile.read(tmp_path / "a.wav")
    assert rate == 16_000 and len(read) == 56_000
    np.testing.assert_allclose(read, samples[:56_000], atol=1e-4)


def test_sound_that_comes_late_or_is_another_is_noticed(tmp_path):
    samples = np.concatenate(list(long.speech_like(10)))
    for name, other in (("same", samples), ("late", np.roll(samples, 640)), ("other", samples[::-1])):
        soundfile.write(tmp_path / f"{name}.wav", other, 16_000)
    rows = {name: long.sound_agreement(tmp_path / "same.wav", tmp_path / f"{name}.wav") for name in ("same", "late", "other")}
    assert all(value > 0.999 and shift == 0 for _, value, shift in rows["same"])
    assert all(shift == 640 for *_, shift in rows["late"])
    assert max(value for _, value, _ in rows["other"]) < 0.5


def test_a_program_is_watched_to_its_end_and_its_failure_is_told():
    printed, seconds, memory = long.watched([long.sys.executable, "-c", "import time; time.sleep(0.5); print('done')"], every=0.1)
    assert printed == "done\n" and seconds > 0.4 and len(memory) >= 2
    assert (memory[1:, 1] > 1).all()  # the first look may find a process that has not begun
    with pytest.raises(UserError, match="status 3"):
        long.watched([long.sys.executable, "-c", "raise SystemExit(3)"], every=0.1)


def test_the_lag_of_a_mouth_is_found_to_a_fraction_of_a_frame():
    time = np.arange(1500)
    loud = sum(np.sin(time / period + phase) for period, phase in ((2.1, 0), (3.7, 1), (9.3, 2)))
    mouth = sum(np.sin((time - 1.4) / period + phase) for period, phase in ((2.1, 0), (3.7, 1), (9.3, 2)))
    value, lag = long.peak_of_correlation(mouth, loud)
    assert lag == pytest.approx(1.4, abs=0.15) and value > 0.9
    assert long.peak_of_correlation(-loud, loud)[0] < 0.9
