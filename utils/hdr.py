"""High dynamic range video (phones' HLG, discs' PQ) as the ordinary 8-bit pictures that every other part expects.

Transfer curves: ITU-R BT.2100; reference white 203 cd/m2: BT.2408; primaries: BT.2020 to BT.709, BT.2087.
"""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image, ImageFilter

PQ, HLG = 16, 18  # as files number transfer curves (ITU-T H.273)
WHITE, PEAK = 203.0, 1000.0  # cd/m2: of white paper in an HDR picture, and of the display HLG is shown on
KNEE = 0.5  # of white: below it light stays as it is, above it highlights are drawn together
NODES = 65  # of the table, a side
BT2020_LUMINANCE = np.array([0.2627, 0.6780, 0.0593])
BT2020_TO_BT709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])


def to_standard_range(image: np.ndarray, transfer: int) -> np.ndarray:
    """(H, W, 3) uint8 code values of a BT.2020 picture, `transfer` PQ or HLG -> (H, W, 3) uint8 sRGB."""
    return np.asarray(Image.fromarray(image).filter(_table(transfer)))


@functools.cache
def _table(transfer: int) -> ImageFilter.Color3DLUT:
    steps = np.linspace(0, 1, NODES)
    code = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)[:, ::-1]  # red varies fastest
    light = _light(code, transfer) / WHITE @ BT2020_TO_BT709.T
    light = np.maximum(light, 0)
    # each channel by itself: keeping hues exact makes the table so crooked that greys between its nodes would go dark
    light = np.minimum(light, KNEE) + (1 - KNEE) * (1 - np.exp(-np.maximum(light - KNEE, 0) / (1 - KNEE)))
    srgb = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return ImageFilter.Color3DLUT(NODES, srgb.ravel().tolist())


def _light(code: np.ndarray, transfer: int) -> np.ndarray:
    """(N, 3) cd/m2 on the display of code values in 0..1."""
    if transfer == PQ:
        root = code ** (32 / 2523)
        return 10_000 * (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (8192 / 1305)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)
    return PEAK * scene * (scene @ BT2020_LUMINANCE)[:, None] ** 0.2
