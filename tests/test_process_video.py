"""Videos as people have them: turned phone video, odd sizes, uneven frame times, cut-off files."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from data_utils.audio import aligned
from utils import hdr
from utils.audio import load_audio, save_wav
from utils.errors import UserError
from utils.video import FrameReader, VideoWriter, probe, read_frames, sample_frames


def encode(path, frames, times=None, rate=25, container="mp4", tick=1000):
    """Lossless; `times` in ticks."""
    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream("libx264rgb", rate=rate, options={"qp": "0", "bf": "0"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "rgb24"
        stream.codec_context.time_base = Fraction(1, tick)
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = times[i] if times is not None else i * tick // rate
            picture.time_base = Fraction(1, tick)
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))
    return path


def corners(height=48, width=80):
    """Red top left, green top right, blue bottom left, white bottom right."""
    image = np.zeros((height, width, 3), np.uint8)
    h, w = height // 2, width // 2
    image[:h, :w], image[:h, w:], image[h:, :w], image[h:, w:] = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
    return image


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_a_phone_video_is_shown_upright(tmp_path, turn):
    """The picture is stored turned, and the track's matrix turns it back, clockwise by `turn`, as phones write it."""
    upright = corners()
    stored = np.ascontiguousarray(np.rot90(upright, turn // 90))
    path = encode(tmp_path / "phone.mp4", [stored] * 5)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # version 0: the matrix follows 40 bytes of header fields
    a, b = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[turn]
    matrix = [a * 65536, b * 65536, 0, -b * 65536, a * 65536, 0, 0, 0, 1 << 30]
    data[at : at + 36] = b"".join(int(value).to_bytes(4, "big", signed=True) for value in matrix)
    path.write_bytes(data)
    info = probe(path)
    assert (info.width, info.height) == (80, 48)
    for image in read_frames(path):
        np.testing.assert_array_equal(image, upright)
    np.testing.assert_array_equal(next(sample_frames(path, 2))[1], upright)


@pytest.mark.parametrize(("aspect", "width"), [(Fraction(4, 3), 80), (Fraction(8, 9), 54)])
def test_pixels_that_are_not_square_are_shown_as_they_were_filmed(tmp_path, aspect, width):
    """HDV stores 1440 x 1080 of 16:9: a disc is a disc in what is read, everywhere the same."""
    y, x = np.mgrid[:48, :60]
    stored = (np.hypot((x - 29.5) * float(aspect), y - 23.5) < 18).astype(np.uint8)[..., None].repeat(3, 2) * 255
    path = tmp_path / "camera.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264rgb", rate=25, width=60, height=48, pix_fmt="rgb24", options={"qp": "0"})
        stream.codec_context.sample_aspect_ratio = aspect
        for i in range(5):
            picture = av.VideoFrame.from_ndarray(stored, format="rgb24")
            picture.pts, picture.time_base = i, Fraction(1, 25)
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))
    info, reader = probe(path), FrameReader(path)
    assert (info.width, info.height) == (reader.width, reader.height) == (width, 48)
    for image in (next(read_frames(path)), next(sample_frames(path, 2))[1], reader[0]):
        rows, columns = (np.flatnonzero((image[..., 0] > 127).any(axis)) for axis in (1, 0))
        assert image.shape == (48, width, 3) and abs(len(rows) - len(columns)) <= 2


def test_a_cover_picture_is_not_taken_for_the_video(tmp_path):
    path = tmp_path / "album.mp4"
    with av.open(str(path), "w") as out:
        cover, video = (out.add_stream(codec, rate=25, width=48, height=32, pix_fmt=pixels)
                        for codec, pixels in (("mjpeg", "yuvj420p"), ("libx264", "yuv420p")))  # fmt: skip
        cover.disposition = Disposition.attached_pic
        for i in range(10):
            picture = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 20 * i, np.uint8), format="rgb24")
            picture.pts, picture.time_base = i, Fraction(1, 25)
            out.mux(video.encode(picture))
            out.mux(cover.encode(av.VideoFrame.from_ndarray(np.full((32, 48, 3), 255, np.uint8), format="rgb24")) if i == 0 else [])
        out.mux([*cover.encode(None), *video.encode(None)])
    data = path.read_bytes()  # the cover lies in the user data at the end of the header: some programs write these first
    header, user = data.index(b"moov") + 4, data.index(b"udta") - 4
    path.write_bytes(data[:header] + data[user:] + data[header:user])
    with av.open(str(path)) as container:
        assert container.streams.video[0].disposition & Disposition.attached_pic
    assert [round(int(frame[16, 24, 0]) / 20) for frame in read_frames(path)] == list(range(10))
    assert round(25 * probe(path).duration) == 10 and len(list(sample_frames(path, 4))) == 4
    assert round(int(FrameReader(path)[9][16, 24, 0]) / 20) == 9


def test_a_name_that_looks_like_an_address_is_a_file(tmp_path, monkeypatch):
    clip = encode(tmp_path / "clip.mkv", [corners()] * 3, container="matroska")
    save_wav(tmp_path / "talk:1.wav", np.full(1600, 0.5, np.float32))
    clip.rename(tmp_path / "talk:1.mkv")
    monkeypatch.chdir(tmp_path)
    assert probe(Path("talk:1.mkv")).width == 80 and len(load_audio(Path("talk:1.wav"))) == 1600


def test_uneven_frame_times_come_out_even(tmp_path):
    """A screen recorder writes a frame when something changes: frame i is what was shown at i / 25 s."""
    times = [0, 10, 200, 210, 800, 1000]
    path = encode(tmp_path / "uneven.mp4", [np.full((16, 16, 3), 40 * k, np.uint8) for k in range(6)], times)
    shown = [int(frame[0, 0, 0]) // 40 for frame in read_frames(path)]
    expected = [max(k for k in range(6) if times[k] <= 40 * i + 10) for i in range(26)]
    assert shown == expected


@pytest.mark.parametrize("rate", [15, 24, 30, 60])
def test_every_rate_keeps_its_length_and_its_time(tmp_path, rate):
    path = encode(tmp_path / "rate.mp4", [np.full((16, 16, 3), k, np.uint8) for k in range(2 * rate)], rate=rate)
    shown = np.array([int(frame[0, 0, 0]) for frame in read_frames(path)])
    assert len(shown) in (49, 50, 51)
    assert np.abs(shown / rate - np.arange(len(shown)) / 25).max() <= 1 / rate + 0.011


@pytest.mark.parametrize("width", [50, 70, 322])
def test_frames_of_odd_widths_are_plain_arrays(tmp_path, width):
    image = np.random.default_rng(0).integers(0, 255, (34, width, 3), np.uint8)
    for frame in read_frames(encode(tmp_path / "odd.mp4", [image] * 3)):
        assert frame.flags["C_CONTIGUOUS"]
        np.testing.assert_array_equal(frame, image)


@pytest.mark.parametrize(("container", "suffix"), [("mov", "mov"), ("matroska", "mkv"), ("avi", "avi")])
def test_other_containers_are_read(tmp_path, container, suffix):
    frames = [np.full((16, 16, 3), 8 * k, np.uint8) for k in range(20)]
    path = encode(tmp_path / f"clip.{suffix}", frames, container=container, tick=1000 if suffix == "mkv" else 25)
    assert [int(frame[0, 0, 0]) // 8 for frame in read_frames(path)] == list(range(20))


def encode_reordered(path, codec, count=50, skipped=(), reordered=3):
    """Grey frames, 4 levels brighter each, some of which (B-frames) refer to later ones and are stored behind them."""
    with av.open(str(path), "w") as out:
        options = {"bf": str(reordered), "g": "12"} | ({} if codec == "libx264" else {"qmin": "1", "qmax": "1"})
        stream = out.add_stream(codec, rate=25, width=48, height=32, pix_fmt="yuv420p", options=options)
        stream.codec_context.time_base = Fraction(1, 25)
        for i in set(range(count)) - set(skipped):
            picture = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 20 + 4 * i, np.uint8), format="rgb24")
            picture.pts, picture.time_base = i, Fraction(1, 25)
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))
    return path


def numbers(frames):
    """Which of encode_reordered's frames are shown."""
    return [round((int(frame[16, 24, 0]) - 20) / 4) for frame in frames]


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.avi", "libx264"), ("b.avi", "mpeg4"), ("a.ts", "libx264"), ("a.mpg", "mpeg2video"), ("a.mkv", "libx264"),
     ("a.mp4", "libx264")],
)  # fmt: skip
def test_reordered_frames_come_in_the_order_they_are_shown_in_from_any_container(tmp_path, monkeypatch, name, codec):
    path = encode_reordered(tmp_path / name, codec)
    assert numbers(read_frames(path)) == list(range(50))
    monkeypatch.setattr(FrameReader, "BYTES", 3 * 48 * 32 * 7)
    frames = FrameReader(path)
    order = [*range(50), *range(49, -1, -3), 30, 0, 49, 60]
    assert numbers(frames[i] for i in order) == [min(i, 49) for i in order]
    samples = list(sample_frames(path, 8))
    assert len(samples) == 8 and numbers(image for _, image in samples) == [round(25 * seconds) for seconds, _ in samples]


def test_pictures_that_an_avi_leaves_out_leave_the_others_at_their_time(tmp_path):
    path = encode_reordered(tmp_path / "gaps.avi", "mpeg4", skipped=(20, 21, 22), reordered=0)
    assert numbers(read_frames(path)) == [19 if i in (20, 21, 22) else i for i in range(50)]


def test_samples_are_spread_in_order_and_true(tmp_path):
    path = tmp_path / "long.mp4"
    with VideoWriter(path, 32, 32, lossless=True) as writer:
        for i in range(500):
            writer.add(np.full((32, 32, 3), i // 2, np.uint8))
    samples = list(sample_frames(path, 20))
    times = np.array([seconds for seconds, _ in samples])
    assert len(samples) == 20 and (np.diff(times) > 0).all() and times[0] < 1.2 and times[-1] > 18.8
    for seconds, image in samples:
        assert image[0, 0, 0] == round(seconds * 25) // 2


def test_a_cut_off_file_is_found_out_without_decoding_it(tmp_path):
    path = tmp_path / "torn.mp4"
    noise = np.random.default_rng(0)
    with VideoWriter(path, 64, 64) as writer:
        for _ in range(100):
            writer.add(noise.integers(0, 255, (64, 64, 3), np.uint8))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4])
    with pytest.raises(UserError, match=r"torn\.mp4 is truncated: it holds \d\.\d s of the 4\.0 s"):
        next(sample_frames(path, 10))


def test_sound_that_starts_before_the_picture_is_told(shared):
    assert abs(probe(shared / "videos" / "dfrf_french.mp4").audio_offset + 0.08) < 0.001
    assert abs(probe(shared / "videos" / "dfrf_cnn2_25fps.mp4").audio_offset) < 0.001


def encode_high_range(path, transfer, codes):
    """A 10-bit HEVC clip of BT.2020 greys whose luma steps through `codes` (0..1), as phones and cameras write HDR."""
    grey = np.repeat(np.round(64 + 876 * np.repeat(codes, 32)).astype(np.uint16)[None], 64, 0)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx265", rate=25, options={"x265-params": "log-level=error", "crf": "4"})
        stream.height, stream.width, stream.pix_fmt = *grey.shape, "yuv420p10le"
        context = stream.codec_context
        context.color_primaries, context.color_trc, context.colorspace, context.color_range = 9, transfer, 9, 1
        for i in range(3):
            frame = av.VideoFrame(grey.shape[1], grey.shape[0], "yuv420p10le")
            for plane, values in zip(frame.planes, (grey, *[np.full((32, grey.shape[1] // 2), 512, np.uint16)] * 2), strict=True):
                rows = np.zeros((plane.height, plane.line_size // 2), np.uint16)
                rows[:, : values.shape[1]] = values
                plane.update(rows.tobytes())
            frame.pts = i
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(("transfer", "white"), [(hdr.HLG, 0.75), (hdr.PQ, 0.581)])
def test_high_dynamic_range_becomes_an_ordinary_picture(tmp_path, transfer, white):
    """White paper is near white, not grey; highlights beyond it still differ; greys stay grey and in order."""
    path = encode_high_range(tmp_path / "phone.mov", transfer, np.array([0.0, 0.2, 0.4, white, white + 0.05, 1.0]))
    image = next(read_frames(path))[32, 16::32].astype(int)
    assert np.ptp(image, axis=1).max() <= 3 and (np.diff(image[:, 1]) > 3).all()
    assert image[0].max() < 8 and 215 < image[3, 1] < 240 and image[5].min() > 247


def test_ten_bits_of_ordinary_range_keep_their_values(tmp_path):
    path = encode_high_range(tmp_path / "camera.mp4", 1, np.array([0.0, 0.25, 0.5, 0.75, 1.0]))
    assert np.abs(next(read_frames(path))[32, 16::32, 1] - np.array([0, 64, 128, 191, 255])).max() <= 2


@pytest.mark.parametrize(
    ("name", "video", "pixels", "audio", "rate", "layout"),
    [("a.mov", "libx264", "yuv420p", "aac", 48_000, "stereo"), ("a.mkv", "libx264", "yuv422p10le", "flac", 44_100, "stereo"),
     ("a.webm", "libvpx-vp9", "yuv420p", "libopus", 48_000, "stereo"), ("a.avi", "mpeg4", "yuv420p", "pcm_s16le", 22_050, "mono"),
     ("b.avi", "libx264", "yuv420p", "pcm_s16le", 48_000, "stereo"), ("a.ts", "libx264", "yuv420p", "aac", 48_000, "stereo"),
     ("a.mp4", "libx264", "yuv420p", "aac", 48_000, "5.1")],
)  # fmt: skip
def test_sound_of_any_container_rate_and_channels_comes_in_at_its_time(tmp_path, name, video, pixels, audio, rate, layout):
    """Picture and sound change together after one second: grey to white, silence to a tone."""
    path = tmp_path / name
    with av.open(str(path), "w") as out:
        stream = out.add_stream(video, rate=25, width=66, height=50, pix_fmt=pixels)
        sound = out.add_stream(audio, rate=rate, layout=layout)
        resampler = av.AudioResampler(format=sound.codec_context.format, layout=layout, rate=rate, frame_size=1024)
        channels = {"mono": 1, "stereo": 2, "5.1": 6}[layout]
        time = np.arange(2 * rate) / rate
        tone = np.tile((0.4 * np.sin(2 * np.pi * 440 * time) * (time >= 1)).astype(np.float32), (channels, 1))
        for i in range(50):
            picture = av.VideoFrame.from_ndarray(np.full((50, 66, 3), 230 if i >= 25 else 60, np.uint8), format="rgb24")
            picture.pts, picture.time_base = i, Fraction(1, 25)
            out.mux(stream.encode(picture))
            first, last = i * rate // 25, (i + 1) * rate // 25
            piece = av.AudioFrame.from_ndarray(np.ascontiguousarray(tone[:, first:last]), format="fltp", layout=layout)
            piece.sample_rate, piece.pts, piece.time_base = rate, first, Fraction(1, rate)
            out.mux([packet for part in resampler.resample(piece) for packet in sound.encode(part)])
        out.mux([packet for part in resampler.resample(None) for packet in sound.encode(part)])
        out.mux(sound.encode(None))
        out.mux(stream.encode(None))
    frames = [int(frame[25, 33, 0]) for frame in read_frames(path)]
    samples = aligned(load_audio(path), probe(path).audio_offset)
    assert len(frames) == 50 and np.abs(np.array(frames) - np.repeat([60, 230], 25)).max() < 8
    assert abs(len(samples) / 16_000 - 2) < 0.1 and np.abs(samples).max() > 0.2
    assert abs(np.flatnonzero(np.abs(samples) > 0.1)[0] / 16_000 - 1) < 0.02
