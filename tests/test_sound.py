"""Sound that streams: equal to the sound read at once, in memory that does not grow, and never out of step with the frames."""

import tracemalloc
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
import torch

from benchmarks.speed import RandomClip
from gaussian_renderer import Rendering
from gaussian_renderer.outputs import Clip, Outputs
from gaussian_renderer.paste import Backdrops
from render import render_clip
from scene.condition import AUDIO_WINDOW
from utils import speech
from utils.audio import Recording, load_audio, load_sound, open_sound
from utils.driving import replayed_ids
from utils.errors import UserError
from utils.pipeline import Rows
from utils.video import VideoWriter, read_frames


def write(path, seconds, rate=48_000, channels=2):
    """Noise that swells, written piece by piece."""
    rng = np.random.default_rng(0)
    with soundfile.SoundFile(path, "w", rate, channels) as file:
        for k in range(seconds):
            file.write(0.1 * (1 + k % 3) * rng.uniform(-1, 1, (rate, channels)))
    return path


def test_a_recording_slices_like_the_array_it_is(tmp_path):
    path = write(tmp_path / "a.wav", 20, 44_100)
    whole, recording = load_audio(path), Recording(path, window=16_000)
    assert len(recording) == len(whole)
    for start, stop in ((0, 100), (90, 40_000), (20_000, 90_000), (200_000, 200_010), (10, 20), (300_000, 10**9), (5, 5)):
        np.testing.assert_array_equal(recording[start:stop], whole[start:stop])
    index = np.array([70_000, 70_003, 70_001, 64_000])
    np.testing.assert_array_equal(recording[index], whole[index])


def test_speech_features_of_a_recording_equal_those_of_its_samples(tmp_path):
    path = write(tmp_path / "a.wav", 50, 16_000, 1)
    whole = speech.encode("mel", load_audio(path), 1250)
    blocks = list(speech.stream("mel", Recording(path), 1250))
    np.testing.assert_array_equal(np.concatenate(blocks), whole)
    assert len(blocks) > 1


def test_rows_are_as_many_as_asked_for_though_the_sound_ends_sooner_or_later(tmp_path):
    samples = load_audio(write(tmp_path / "a.wav", 2, 16_000, 1))
    longer = np.concatenate(list(speech.stream("mel", samples, 70)))
    assert len(longer) == 70 and (longer[50:] == longer[49]).all()
    assert sum(len(block) for block in speech.stream("mel", samples, 20)) == 20


def test_an_hour_takes_no_more_memory_than_a_minute(tmp_path):
    """Reading for speech, and muxing, of two lengths: the peak may not follow the length (whole: 17 and 52 MB as floats)."""
    peaks = []
    for seconds in (45, 135):
        path = write(tmp_path / "a.wav", seconds)
        tracemalloc.start()
        for _ in speech.stream("mel", Recording(path), seconds * 25):
            pass
        with VideoWriter(tmp_path / "a.mp4", 32, 32, open_sound(path)) as writer:
            for _ in range(seconds * 25):
                writer.add(np.zeros((32, 32, 3), np.uint8))
        peaks.append(tracemalloc.get_traced_memory()[1] / 2**20)
        tracemalloc.stop()
    assert peaks[1] < peaks[0] * 1.2 + 1, peaks


def test_the_last_click_of_a_long_file_is_heard_with_its_frame(tmp_path):
    rate, seconds = 44_100, 90
    sound = np.zeros((seconds * rate, 2), np.float32)
    for second in (1, seconds - 1):
        sound[second * rate : second * rate + 200] = 0.8
    soundfile.write(tmp_path / "a.flac", sound, rate)
    with VideoWriter(tmp_path / "a.mp4", 32, 32, open_sound(tmp_path / "a.flac")) as writer:
        for k in range(seconds * 25):
            writer.add(np.full((32, 32, 3), 255 if k in (25, 25 * (seconds - 1)) else 0, np.uint8))
    heard = load_sound(tmp_path / "a.mp4")[0][0]
    clicks = np.flatnonzero(np.abs(heard) > 0.4)
    flashes = [k for k, frame in enumerate(read_frames(tmp_path / "a.mp4")) if frame.mean() > 128]
    assert flashes == [25, 25 * (seconds - 1)]
    for flash, click in zip(flashes, (clicks[0], clicks[-1]), strict=True):
        assert abs(click / rate - flash / 25) < 0.01  # the codec's own smear


def test_sound_that_changes_its_channels_and_rate_midway_is_read_to_its_end(tmp_path):
    for name, rate, layout in (("a", 44_100, "stereo"), ("b", 48_000, "mono")):
        with av.open(str(tmp_path / f"{name}.mp3"), "w", options={"write_xing": "0", "id3v2_version": "0"}) as container:
            stream = container.add_stream("libmp3lame", rate=rate, layout=layout)
            for start in range(0, rate, 1152):
                tone = 0.5 * np.sin(2 * np.pi * 440 / rate * np.arange(start, start + 1152))
                samples = np.tile(tone.astype(np.float32), (len(av.AudioLayout(layout).channels), 1))
                frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
                frame.sample_rate = rate
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    (tmp_path / "glued.mp3").write_bytes((tmp_path / "a.mp3").read_bytes() + (tmp_path / "b.mp3").read_bytes())
    samples = load_audio(tmp_path / "glued.mp3")
    assert abs(len(samples) - 32_000) < 2500 and samples[2000:15_000].std() > 0.3 and samples[18_000:30_000].std() > 0.3
    assert load_sound(tmp_path / "glued.mp3")[0].shape[1] > 1.9 * 44_100


def test_samples_that_are_no_numbers_are_silence(tmp_path):
    samples = np.full(16_000, 0.1, np.float32)
    samples[[100, 200]] = np.nan, np.inf
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    heard = load_audio(tmp_path / "a.wav")
    assert heard[100] == heard[200] == 0 and np.isfinite(heard).all() and heard[300] == samples[300]


def test_a_folder_given_for_sound_is_called_one(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        load_audio(tmp_path)


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "pcm_u8"), ("a.mp4", "aac")])
def test_packets_that_are_missing_leave_silence_and_all_that_follows_at_its_time(tmp_path, name, codec):
    """A tone starts after 3 s; the packets from 0.7 to 2.7 s are left out."""
    rate = 16_000
    tone = (0.4 * np.sin(np.arange(4 * rate) / 5) * (np.arange(4 * rate) >= 3 * rate)).astype(np.float32)
    with av.open(str(tmp_path / name), "w") as out:
        stream = out.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        pieces = av.AudioResampler(stream.format.name, "mono", rate, frame_size=1024).resample(frame)
        for packet in [packet for piece in (*pieces, None) for packet in stream.encode(piece)]:
            if packet.pts is None or not 0.7 < packet.pts * packet.time_base < 2.7:
                out.mux(packet)
    samples = load_audio(tmp_path / name)
    assert abs(len(samples) / rate - 4) < 0.1 and abs(np.flatnonzero(np.abs(samples) > 0.2)[0] / rate - 3) < 0.01
    assert np.abs(samples[rate : 2 * rate]).max() < 1e-6


def test_a_file_damaged_in_its_middle_is_refused_before_anything_is_rendered(tmp_path):
    with av.open(str(tmp_path / "mute.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 64
        container.mux(stream.encode(av.VideoFrame(64, 64, "yuv420p")))
        container.mux(stream.encode(None))
    for path in (tmp_path / "mute.mp4", tmp_path / "absent.wav"):
        for read in (Recording, open_sound):
            with pytest.raises(UserError, match=path.name):
                read(path)


def test_a_rendering_of_any_length_takes_the_memory_of_a_short_one(tmp_path):
    """The whole pipeline but the head itself, one against three parts: sound, features, backdrops, composite, encoder."""

    class Reader(RandomClip):
        def conditions(self, ids, rows, features):
            assert len(features) <= 4 + 2 * AUDIO_WINDOW  # a window of the stream, never the whole
            return super().conditions(ids)

    def draw(conditions):
        nothing = torch.zeros(len(conditions.frame), 4, 32, 32)
        return Rendering(nothing[:, :3], nothing[:, 3:], None, None, None)

    peaks, reader = [], Reader(tmp_path, 32)
    for seconds in (45, 135):
        path = write(tmp_path / "a.wav", seconds)
        frames = seconds * 25
        rows = Rows(speech.stream("mel", Recording(path), frames), kept=500)
        clip = Clip("custom", "a", replayed_ids(reader.ids, frames), open_sound(path), rows)
        backdrops = Backdrops(reader, "head")
        tracemalloc.start()
        outputs = Outputs(clip, tmp_path, "a", backdrops.place, (32, 32))
        assert render_clip(clip, reader, draw, backdrops, outputs, torch.device("cpu"), 4, 0.0)
        peaks.append(tracemalloc.get_traced_memory()[1] / 2**20)
        tracemalloc.stop()
    assert peaks[1] < peaks[0] * 1.2 + 1, peaks
