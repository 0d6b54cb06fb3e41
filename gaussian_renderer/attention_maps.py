"""What each token attends to as pictures: a map a token, and one mosaic of them with the rendering, drawn where the head is."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor

from gaussian_renderer.paste import Place
from gaussian_renderer.planes import colour_table, joined, levels, look_up, resized, tiled
from utils.contact_sheet import inscribe, writing

TILE = 256  # height of a tile of the mosaic
COLUMNS = 3
# OpenCV's inferno (256, 3) RGB: 0 is black, 1 bright yellow, and even steps look even. The scale is fixed: frames compare
COLOURS = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_INFERNO)[:, 0, ::-1].copy()


class AttentionMaps:
    """Draws batches as planes (gaussian_renderer/planes.py) on `device`.

    The mosaic shows the rendering, a map a token and the scale, labelled, in rows of three.
    """

    def __init__(self, tokens: tuple[str, ...], place: Place, size: tuple[int, int], device: torch.device):
        """`place`: of the rendering in the frames; `size`: width, height of the rendering itself."""
        self.tokens, self._place = tokens, place
        self.tile = TILE * size[0] // size[1] // 2 * 2, TILE
        rows = -(-(len(tokens) + 2) // COLUMNS)
        self.mosaic_size = COLUMNS * self.tile[0], rows * self.tile[1]
        self._table = colour_table(torch.from_numpy(COLOURS) / 255).to(device)
        texts = "render", *tokens, "weight: 0 to 1"
        self._on_tiles, self._on_maps = ([torch.from_numpy(writing(text, height)).clamp(max=235).to(device) for text in some]
                                         for some, height in ((texts, TILE), (tokens, size[1])))  # fmt: skip
        last = torch.zeros(1, rows * COLUMNS - len(tokens) - 1, *self.tile[::-1])  # the scale, and cells that stay empty
        last[0, 0, 100:130, 20:-20] = torch.linspace(0, 255, self.tile[0] - 40)
        self._last = look_up(last.to(device, torch.uint8), self._table)

    def __call__(self, frames: tuple[Tensor, Tensor], attention: Tensor) -> tuple[Tensor, Tensor]:
        """frames: to_planes of (B, 3, H, W); attention (B, T, h, w) in [0, 1] -> uint8 maps (B, T, 3 h / 2, w), mosaic (B, 3 H / 2,
        W), whose H, W are its own, `mosaic_size`."""
        (luma, chroma), weights, p = frames, levels(attention), self._place
        if p.side is not None:
            x, y, side = p.x // 2, p.y // 2, p.side // 2
            luma = luma[..., 2 * y : 2 * (y + side), 2 * x : 2 * (x + side)]
            chroma = chroma[..., y : y + side, x : x + side]
        width, height = self.tile
        render = resized(luma[:, None], width, height), resized(chroma, width // 2, height // 2)[:, None]
        maps, small = look_up(weights, self._table), resized(weights, width, height)
        small = maps if small is weights else look_up(small, self._table)
        cells = [torch.cat([first, tiles, last.expand(len(weights), *last.shape[1:])], 1)
                 for first, tiles, last in zip(render, small, self._last, strict=True)]  # fmt: skip
        self._label(*cells, self._on_tiles)
        self._label(*maps, self._on_maps)
        return joined(*maps), joined(*(tiled(planes, COLUMNS) for planes in cells))

    @staticmethod
    def _label(luma: Tensor, chroma: Tensor, texts: list[Tensor]) -> None:
        """Write each text, white on a dark bar, into its picture of (B, K, h, w) luma and (B, K, 2, h / 2, w / 2) chroma."""
        for k, written in enumerate(texts):
            inscribe(luma[:, k], written)
            chroma[:, k, :, : written.shape[0] // 2, : written.shape[1] // 2] = 128
