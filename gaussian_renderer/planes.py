"""Pictures in the form that videos store (tensors, on any device): planes Y, Cb, Cr of BT.709, limited range, chroma at half
resolution.

What is drawn so VideoWriter need not convert, and on a GPU nothing is left for the host but to encode.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# RGB of 0 to 255 -> Y, Cb, Cr (ITU-R BT.709, sections 3 and 4)
_LUMA = torch.tensor([0.2126, 0.7152, 0.0722])
_MATRIX = torch.stack([219 * _LUMA, 224 * (torch.eye(3)[2] - _LUMA) / 1.8556, 224 * (torch.eye(3)[0] - _LUMA) / 1.5748]) / 255
_ZERO = torch.tensor([16.0, 128.0, 128.0])


def bt709(colours: Tensor) -> Tensor:
    """(..., 3) RGB -> (..., 3) Y, Cb, Cr uint8, of 0 to 255."""
    matrix, zero = _MATRIX.to(colours.device), _ZERO.to(colours.device)
    return (colours.float() @ matrix.T + (zero + 0.5)).to(torch.uint8)


def look_up(values: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Luma (..., h, w) and chroma (..., 2, h / 2, w / 2) uint8 of pictures whose pixels (..., h, w) uint8 have the colours `table`
    (256, 3), as bt709 gives them; h, w even. Chroma is that of the mean of four pixels."""
    coarse = halved(values)
    return _of(table[:, 0], values), torch.stack([_of(table[:, k], coarse) for k in (1, 2)], -3)


def to_planes(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """As look_up, of (..., 3, h, w) uint8 RGB."""
    luma, chroma = (bt709(levels.movedim(-3, -1)).movedim(-1, -3) for levels in (pictures, halved(pictures)))
    return luma[..., 0, :, :], chroma[..., 1:, :, :]


def halved(levels: Tensor) -> Tensor:
    """(..., h, w) uint8 -> (..., h / 2, w / 2) uint8: means of 2 x 2."""
    rows = levels[..., ::2, :].short() + levels[..., 1::2, :]
    return ((rows[..., ::2] + rows[..., 1::2] + 2) >> 2).to(torch.uint8)


def resized(pictures: Tensor, width: int, height: int) -> Tensor:
    """(B, C, h, w) uint8 -> (B, C, height, width) uint8: every pixel a mean over what it covers."""
    if pictures.shape[-2:] == (height, width):
        return pictures
    levels = pictures if pictures.device.type == "cpu" else pictures.float()  # of bytes no GPU can, and a CPU five times as fast
    levels = F.interpolate(levels, (height, width), mode="bilinear", antialias=True)
    return levels if levels.dtype == torch.uint8 else levels.add_(0.5).to(torch.uint8)


def tiled(tiles: Tensor, columns: int) -> Tensor:
    """(B, K, ..., h, w), K a multiple of `columns` -> (B, ..., K / columns x h, columns x w): row by row."""
    return torch.cat([torch.cat(row.unbind(1), -1) for row in tiles.split(columns, 1)], -2)


def joined(luma: Tensor, chroma: Tensor) -> Tensor:
    """(..., H, W), (..., 2, H / 2, W / 2) -> (..., 3 H / 2, W): plane after plane, as VideoWriter takes it."""
    return torch.cat([luma, chroma.reshape(*luma.shape[:-2], -1, luma.shape[-1])], -2)


def _of(column: Tensor, values: Tensor) -> Tensor:
    """column[values]; index_select is ten times as fast."""
    return column.index_select(0, values.flatten().int()).view(values.shape)
