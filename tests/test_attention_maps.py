"""What tokens attend to, as pictures: the colours, the planes videos store, the mosaic."""

import cv2
import numpy as np
import pytest
import torch

from gaussian_renderer.attention_maps import COLOURS, AttentionMaps
from gaussian_renderer.paste import Place
from gaussian_renderer.planes import colour_table, joined, look_up, resized, to_planes
from utils.video import VideoWriter, read_frames

TOKENS = ("audio", "expression", "camera", "frame")


def pixels(planes: np.ndarray) -> np.ndarray:
    """(H, W, 3) RGB of (3 H / 2, W) planes, as a player shows them: exact but for chroma's resolution."""
    height, width = planes.shape[0] * 2 // 3, planes.shape[1]
    y = planes[:height].astype(np.float32) - 16
    cb, cr = planes[height:].reshape(2, height // 2, width // 2).repeat(2, 1).repeat(2, 2).astype(np.float32) - 128
    rgb = [y / 219 + 1.5748 * cr / 224, y / 219 - 0.1873 * cb / 224 - 0.4681 * cr / 224, y / 219 + 1.8556 * cb / 224]
    return np.clip(255 * np.stack(rgb, -1), 0, 255)


def test_the_attention_scale_is_fixed_and_rises_in_brightness():
    brightness = COLOURS.astype(float).sum(1)
    assert brightness[0] < 30 and (np.diff(brightness[::15]) > 0).all()
    draw = AttentionMaps(("audio",), Place(64, 64), (64, 64), torch.device("cpu"))
    black = torch.zeros(2, 3, 64, 64)
    attention = torch.full((2, 1, 64, 64), 0.3)
    attention[1, 0, :8] = 1.0  # a peak changes nothing elsewhere
    maps = draw(to_planes(black), attention)[0][:, 0].numpy()
    alone, beside_a_peak = (pixels(planes)[40] for planes in maps)
    assert (alone == beside_a_peak).all() and np.abs(alone - COLOURS[round(0.3 * 255)]).max() < 3


def test_planes_decode_to_what_their_pixels_do(tmp_path):
    values = torch.linspace(0, 255, 48).to(torch.uint8).repeat_interleave(4)[None].repeat(64, 1)
    given = COLOURS[values]
    planes = {"looked up": look_up(values, colour_table(torch.from_numpy(COLOURS) / 255)),
              "pictures": to_planes(torch.from_numpy(given).movedim(-1, 0) / 255)}  # fmt: skip
    with VideoWriter(tmp_path / "pixels.mp4", 192, 64, crf=1) as writer:
        writer.add(given)
    expected = next(read_frames(tmp_path / "pixels.mp4")).astype(int)
    for name, drawn in planes.items():
        with VideoWriter(tmp_path / f"{name}.mp4", 192, 64, crf=1) as writer:
            writer.add(joined(*drawn).numpy())
        decoded = next(read_frames(tmp_path / f"{name}.mp4"))
        assert np.abs(expected - decoded).max() <= 6
        assert np.abs(decoded.astype(int) - given).mean() < 3  # chroma at half resolution


@pytest.mark.parametrize("size", [(64, 64), (100, 90), (200, 120)])
def test_a_resized_picture_is_the_mean_of_what_its_pixels_cover(size):
    picture = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (128, 128), np.uint8), (0, 0), 6)
    got = resized(torch.from_numpy(picture)[None, None], *size)[0, 0].numpy().astype(int)
    assert got.shape == size[::-1]
    assert np.abs(got - cv2.resize(picture, size, interpolation=cv2.INTER_AREA)).max() <= 3


def test_a_halved_picture_is_the_rounded_mean_of_four_pixels():
    pictures = torch.randint(0, 256, (2, 3, 10, 14), dtype=torch.uint8)
    corners = [pictures[..., y::2, x::2].int() for y in (0, 1) for x in (0, 1)]
    assert torch.equal(resized(pictures, 7, 5), ((sum(corners) + 2) // 4).to(torch.uint8))


@pytest.mark.parametrize("tokens", [TOKENS[:1], TOKENS])
def test_the_mosaic_shows_the_rendering_every_map_and_the_scale_in_rows_of_three(tokens):
    place = Place(300, 200, x=10, y=20, side=128)  # the head lies somewhere in a larger picture
    draw = AttentionMaps(tokens, place, (128, 128), torch.device("cpu"))
    frames = torch.full((2, 3, 200, 300), 0.1)
    frames[:, :, 20:148, 10:138] = torch.tensor([200.0, 100.0, 50.0])[:, None, None] / 255
    weights = torch.arange(1, len(tokens) + 1) / (len(tokens) + 1)
    maps, mosaic = draw(to_planes(frames), weights[None, :, None, None].expand(2, -1, 128, 128))
    assert maps.shape == (2, len(tokens), 192, 128) and mosaic.shape == (2, 3 * draw.mosaic_size[1] // 2, 3 * 256)
    assert draw.mosaic_size == (768, 256 if len(tokens) == 1 else 512)
    sheet = pixels(mosaic[1].numpy())
    cells = [sheet[y : y + 256, x : x + 256] for y in range(0, len(sheet), 256) for x in range(0, 768, 256)]
    expected = [(200, 100, 50), *(COLOURS[int(w * 255 + 0.5)] for w in weights)]
    for cell, colour in zip(cells, expected, strict=False):
        assert np.abs(cell[100:, :] - np.array(colour)).max() < 4
        assert cell[2:24, 2:60].max() > 230  # its label
    scale = cells[len(expected)]
    assert np.abs(scale[115, [20, 235]] - COLOURS[[0, 255]]).max() < 4 and scale[200:].max() < 12
    for k, w in enumerate(weights):
        assert np.abs(pixels(maps[0, k].numpy())[60:] - COLOURS[int(w * 255 + 0.5)]).max() < 4


def test_cells_of_the_mosaic_that_nothing_is_drawn_in_are_black():
    draw = AttentionMaps(TOKENS[:2], Place(64, 64), (64, 64), torch.device("cpu"))
    _, mosaic = draw(to_planes(torch.zeros(1, 3, 64, 64)), torch.ones(1, 2, 64, 64))
    assert draw.mosaic_size == (768, 512) and pixels(mosaic[0].numpy())[256:, 256:].max() < 12
