"""Pictures in the form that videos store (tensors, on any device): planes Y, Cb, Cr of BT.709, limited range, chroma at half
resolution.

What comes so VideoWriter need not convert: on a GPU nothing is left for the host but to encode, and half as much to fetch.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# RGB of 0 to 1 -> Y, Cb, Cr of 0 to 255: weights and what is added (ITU-R BT.709, sections 3 and 4)
_LUMA = np.array([0.2126, 0.7152, 0.0722])
_WEIGHTS = np.stack([219 * _LUMA, 224 * (np.eye(3)[2] - _LUMA) / 1.8556, 224 * (np.eye(3)[0] - _LUMA) / 1.5748]).tolist()
_ZERO = (16, 128, 128)


def to_planes(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Luma (..., h, w) and chroma (..., 2, h / 2, w / 2) uint8 of RGB (..., 3, h, w) in [0, 1]; h, w even."""
    coarse = _means(pictures)
    return _level(0, pictures, -3), torch.stack([_level(k, coarse, -3) for k in (1, 2)], -3)


def colour_table(colours: Tensor) -> Tensor:
    """(3, 256) Y, Cb, Cr uint8 of (256, 3) RGB in [0, 1], for look_up."""
    return torch.stack([_level(k, colours, -1) for k in range(3)])


def levels(fractions: Tensor) -> Tensor:
    """(..., h, w) in [0, 1] -> the same of 0 to 255, uint8."""
    if fractions.device.type == "cpu":  # in one step, a quarter of the work
        rows = fractions.reshape(-1, fractions.shape[-1]).numpy()
        return torch.from_numpy(cv2.convertScaleAbs(rows, alpha=255)).view(fractions.shape)
    return _rounded(255 * fractions)


def look_up(values: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """As to_planes, of pictures whose pixels (..., h, w) uint8 have the colours of `table`. Chroma is that of the mean of four."""
    coarse = halved(values)
    return _of(table[0], values), torch.stack([_of(table[k], coarse) for k in (1, 2)], -3)


def halved(pictures: Tensor) -> Tensor:
    """(..., h, w) uint8 -> (..., h / 2, w / 2) uint8: means of 2 x 2."""
    height, width = pictures.shape[-2:]
    if pictures.device.type == "cpu":  # one tall picture, ten times as fast
        small = cv2.resize(pictures.reshape(-1, width).numpy(), None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        return torch.from_numpy(small).view(*pictures.shape[:-2], height // 2, width // 2)
    return _rounded(_means(pictures.float()))


def resized(pictures: Tensor, width: int, height: int) -> Tensor:
    """(B, C, h, w) uint8 -> (B, C, height, width) uint8: every pixel a mean over what it covers."""
    if pictures.shape[-2:] == (height, width):
        return pictures
    if pictures.shape[-2:] == (2 * height, 2 * width):
        return halved(pictures)
    values = pictures if pictures.device.type == "cpu" else pictures.float()  # of bytes no GPU can, and a CPU five times as fast
    values = F.interpolate(values, (height, width), mode="bilinear", antialias=True)
    return values if values.dtype == torch.uint8 else _rounded(values)


def tiled(tiles: Tensor, columns: int) -> Tensor:
    """(B, K, ..., h, w), K a multiple of `columns` -> (B, ..., K / columns x h, columns x w): row by row."""
    return torch.cat([torch.cat(row.unbind(1), -1) for row in tiles.split(columns, 1)], -2)


def joined(luma: Tensor, chroma: Tensor) -> Tensor:
    """(..., H, W), (..., 2, H / 2, W / 2) -> (..., 3 H / 2, W): plane after plane, as VideoWriter takes it."""
    return torch.cat([luma, chroma.reshape(*luma.shape[:-2], -1, luma.shape[-1])], -2)


def _level(k: int, colours: Tensor, dim: int) -> Tensor:
    """Y, Cb or Cr uint8 of RGB along `dim`."""
    (red, green, blue), (r, g, b) = _WEIGHTS[k], colours.unbind(dim)
    return _rounded((red * r).add_(g, alpha=green).add_(b, alpha=blue).add_(_ZERO[k]))


def _rounded(values: Tensor) -> Tensor:
    return values.add_(0.5).to(torch.uint8)


def _means(maps: Tensor) -> Tensor:
    rows = maps[..., ::2, :] + maps[..., 1::2, :]
    return (rows[..., ::2] + rows[..., 1::2]).mul_(0.25)


def _of(column: Tensor, values: Tensor) -> Tensor:
    """column[values], ten times as fast."""
    if values.device.type == "cpu":
        return torch.from_numpy(cv2.LUT(values.reshape(-1, values.shape[-1]).numpy(), column.numpy())).view(values.shape)
    return column.index_select(0, values.flatten().int()).view(values.shape)
