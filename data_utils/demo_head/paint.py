"""What the head's parts look like: one atlas of colours and one of classes, painted by formulas and seeded noise."""

from __future__ import annotations

import cv2
import numpy as np

from data_utils.demo_head import face_shape as shape
from data_utils.demo_head.face_shape import AZIMUTH, BOTTOM, MOUTH_HALF, MOUTH_Y, TOP, bump, smoothstep
from data_utils.demo_head.mesh import ATLAS, ATLAS_HEIGHT, ATLAS_WIDTH
from utils.constants import CLASS_NAMES, CLOTH, HAIR, LOWER_LIP, MOUTH, NECK, SKIN, UPPER_LIP

DENSITY = 260  # texels a decimetre of the painted atlas
SKIN_TONE, LIP_TONE, HAIR_TONE = (216, 166, 140), (182, 98, 94), (66, 45, 32)
LEFT_BROW, RIGHT_BROW, NOSE = (CLASS_NAMES.index(n) for n in ("left_brow", "right_brow", "nose"))
LEFT_EAR, RIGHT_EAR = (CLASS_NAMES.index(n) for n in ("left_ear", "right_ear"))


def _noise(rng: np.random.Generator, height: int, width: int, cell_y: float, cell_x: float) -> np.ndarray:
    """Smooth noise of unit variance with features of the given size in texels."""
    coarse = rng.normal(size=(max(int(height / cell_y), 2) + 2, max(int(width / cell_x), 2) + 2)).astype(np.float32)
    fine = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return (fine - fine.mean()) / fine.std()


def _blend(colour: np.ndarray, over: tuple | np.ndarray, share: np.ndarray) -> None:
    colour += (np.asarray(over, np.float32) - colour) * share[..., None].astype(np.float32)


def _strands(rng: np.random.Generator, height: int, width: int, slant: float) -> np.ndarray:
    """Hair: fine streaks of several widths, running down with a slant (texels of u a texel of v)."""
    streaks = sum(a * _noise(rng, height, width, *cell) for a, cell in ((1.0, (70, 2.2)), (0.8, (110, 5)), (0.4, (160, 16))))
    v, u = np.mgrid[:height, :width].astype(np.float32)
    bend = slant * v + 10 * np.sin(v / 60)
    return cv2.remap(streaks.astype(np.float32), u + bend, v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def _skin(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    width, height = round(2 * AZIMUTH * DENSITY), round((TOP - BOTTOM) * DENSITY)
    azimuth = ((np.arange(width) + 0.5) / width - 0.5) * 2 * AZIMUTH
    a, y = np.meshgrid(azimuth, TOP - (np.arange(height) + 0.5) / height * (TOP - BOTTOM))
    x = shape.skin_point(a, y)[..., 0]
    front = np.abs(a) < 1.3
    colour = np.empty((height, width, 3), np.float32)
    colour[:] = SKIN_TONE
    # complexion: rosy cheeks and nose, a yellower forehead, cooler round the mouth and jaw
    _blend(colour, (214, 132, 112), 0.34 * bump(x, y, 0.42, -0.12, 0.22, 0.20) + 0.30 * bump(x, y, 0, -0.17, 0.13, 0.12))
    _blend(colour, (216, 178, 142), 0.35 * bump(x, y, 0, 0.72, 0.5, 0.22))
    _blend(colour, (188, 146, 128), 0.30 * smoothstep(-0.45, -0.75, y))
    _blend(colour, (178, 118, 104), 0.55 * bump(x, y, shape.EYE_X, 0.235, 0.17, 0.10) * front)
    # blotches, pores, freckles: what optical flow holds on to
    grain = (0.35 + 0.65 * smoothstep(-1.0, -0.8, y))[..., None].astype(np.float32)  # the chart is stretched on the neck
    for cell, strength in ((46, 0.010), (18, 0.012), (7, 0.018), (3, 0.022)):
        colour *= 1 + strength * grain * _noise(rng, height, width, cell, cell)[..., None]
    colour[..., 0] *= 1 + 0.02 * _noise(rng, height, width, 30, 30)
    spots = np.zeros((height, width), np.float32)
    for _ in range(750):
        u, v = rng.uniform(0.2, 0.8) * width, (TOP - rng.normal(0.05, 0.42)) / (TOP - BOTTOM) * height
        radius, strength = rng.uniform(0.8, 2.6), float(rng.uniform(0.06, 0.34))
        cv2.circle(spots, (int(u * 16), int(v * 16)), int(radius * 16), strength, -1, cv2.LINE_AA, 4)
    _blend(colour, (150, 92, 68), cv2.GaussianBlur(spots, (0, 0), 1.1) * smoothstep(-0.95, -0.6, y))
    # baked occlusion
    dark = 0.85 * bump(x, y, 0.064, -0.262, 0.032, 0.014) + 0.20 * bump(x, y, 0.0, -0.290, 0.12, 0.020)
    dark += 0.12 * bump(x, y, 0.180, -0.225, 0.020, 0.05) + 0.16 * bump(x, y, 0, -0.645, 0.16, 0.035)
    dark += 0.25 * bump(x, y, 0.195, 0.245, 0.05, 0.055) + 0.14 * bump(x, y, shape.EYE_X, 0.315, 0.16, 0.030)
    dark += 0.10 * bump(x, y, shape.EYE_X - 0.02, 0.13, 0.13, 0.022)
    dark += 0.10 * shape.nasolabial(x, y, 0.020) + 0.20 * bump(x, y, MOUTH_HALF + 0.012, MOUTH_Y, 0.024, 0.020)
    dark += 0.50 * smoothstep(-0.90, -1.0, y) * smoothstep(-1.5, -1.02, y) * smoothstep(1.6, 0.3, np.abs(a))
    dark += 0.35 * smoothstep(-1.40, -1.56, y)
    _blend(colour, (70, 28, 22), np.clip(dark, 0, 0.85))
    classes = np.full((height, width), SKIN, np.uint8)
    nose = (np.abs(x) < 0.185 - 0.09 * smoothstep(-0.18, 0.1, y)) & (y > -0.285) & (y < 0.27) & front
    classes[nose] = NOSE
    _brows(rng, colour, classes, x, y, front)
    _lips(rng, colour, classes, x, y, front)
    classes[y < -0.93 + 0.42 * smoothstep(0.2, 1.3, np.abs(a))] = NECK
    # hair over everything, ragged at the line
    ragged = 0.022 * _noise(rng, height, width, 26, 2.2) + 0.010 * _noise(rng, height, width, 30, 9)
    over = y - shape.hairline(a) + ragged
    strands = _strands(rng, height, width, 0.75)
    brightness = (1 + 0.26 * strands) * (0.80 + 0.30 * smoothstep(0.0, 0.22, over))
    tone = np.asarray(HAIR_TONE, np.float32) * brightness[..., None]
    _blend(colour, (112, 74, 58), 0.42 * smoothstep(-0.10, 0.02, over))
    hair = smoothstep(-0.040, 0.045, over)
    colour += (np.clip(tone, 8, 200) - colour) * hair[..., None]
    classes[hair > 0.5] = HAIR
    return colour, classes


def _brows(rng, colour, classes, x, y, front) -> None:
    s = (np.abs(x) - shape.BROW_X) / shape.BROW_LENGTH
    middle = shape.brow_middle(s)
    thick = 0.040 * (1 - 0.72 * np.clip(s, 0, 1) ** 1.6) * (0.45 + 0.55 * smoothstep(-0.03, 0.20, s)) * smoothstep(1.05, 0.85, s)
    height, width = x.shape
    hairs = _noise(rng, height, width, 3, 10) * 0.35 + _noise(rng, height, width, 7, 2.5) * 0.35
    inside = smoothstep(1.25, 0.55, np.abs(y - middle) / np.maximum(thick, 1e-4) + 0.25 * hairs) * front * (s > -0.05) * (s < 1.06)
    _blend(colour, np.asarray(HAIR_TONE) * 0.9, np.clip(inside * (0.74 + 0.20 * hairs) * smoothstep(-0.06, 0.16, s), 0, 0.93))
    classes[(inside > 0.5) & (x < 0)], classes[(inside > 0.5) & (x > 0)] = RIGHT_BROW, LEFT_BROW


def _lips(rng, colour, classes, x, y, front) -> None:
    inside_x = np.abs(x) < MOUTH_HALF
    top, bottom = shape.lip_top(x), shape.lip_bottom(x)
    soft = 0.010
    across = smoothstep(MOUTH_HALF + 0.015, MOUTH_HALF - 0.020, np.abs(x)) * front
    red = smoothstep(-soft, soft, top - y) * smoothstep(-soft, soft, y - bottom) * across
    height, width = x.shape
    lines = _noise(rng, height, width, 14, 3.2)
    tone = np.asarray(LIP_TONE, np.float32) * (1 + 0.05 * lines[..., None]) * (1 - 0.13 * (y > MOUTH_Y))[..., None]
    colour += (tone - colour) * (0.88 * red)[..., None]
    _blend(colour, (60, 18, 20), 0.72 * np.exp(-(((y - MOUTH_Y) / 0.0075) ** 2)) * across)
    classes[(y <= top) & (y >= MOUTH_Y) & inside_x & front] = UPPER_LIP
    classes[(y >= bottom) & (y < MOUTH_Y) & inside_x & front] = LOWER_LIP


def _torso(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    v, u = np.mgrid[:height, :width].astype(np.float32)
    colour = np.empty((height, width, 3), np.float32)
    colour[:] = (58, 92, 118)
    knit = np.sin(u * 0.62 + 1.2 * np.abs((v * 0.35 / np.pi) % 2 - 1)) * np.sin(v * 0.45)
    colour *= (1 + 0.07 * knit + 0.05 * _noise(rng, height, width, 40, 40) + 0.05 * _noise(rng, height, width, 5, 3))[..., None]
    rib = v < 0.10 * height
    colour[rib] *= (0.82 + 0.10 * np.sin(u[rib] * 0.55))[:, None]
    return colour


def _teeth(width: int, height: int, upper: bool) -> np.ndarray:
    s, t = np.meshgrid(np.linspace(-1, 1, width), np.linspace(0, 1, height))
    if not upper:
        t = 1 - t
    edges = np.array([0.0, 0.19, 0.35, 0.52, 0.68, 0.84, 1.0]) if upper else np.array([0.0, 0.14, 0.29, 0.46, 0.62, 0.80, 1.0])
    gap = np.min(np.abs(np.abs(s)[..., None] - edges), -1)
    colour = np.empty((height, width, 3), np.float32)
    colour[:] = (232, 222, 204)
    _blend(colour, (150, 120, 100), 0.55 * np.exp(-((gap / 0.012) ** 2)))
    gum = smoothstep(0.52, 0.40, t + 0.16 * np.exp(-((gap / 0.05) ** 2)) * -1 + 0.05)
    _blend(colour, (172, 88, 86), gum)
    return colour


def _fill(width: int, height: int, tone: tuple, rng: np.random.Generator, grain: float) -> np.ndarray:
    colour = np.empty((height, width, 3), np.float32)
    colour[:] = tone
    return colour * (1 + grain * _noise(rng, height, width, 6, 6)[..., None])


def _ear(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    a, t = np.meshgrid(np.linspace(0, 0.6, width) - 0.1, 0.4 - np.linspace(0, 0.8, height))
    colour = _fill(width, height, (212, 146, 124), rng, 0.03)
    dark = 0.60 * np.exp(-(((a - 0.06) / 0.055) ** 2) - ((t + 0.03) / 0.085) ** 2)
    far = np.hypot((a - 0.10) / 0.20, t / 0.29)
    dark += 0.30 * np.exp(-(((far - 0.68) / 0.07) ** 2)) * smoothstep(-0.12, 0.05, t)
    _blend(colour, (84, 32, 26), np.clip(dark, 0, 0.8))
    return colour


def paint(seed: int, density: float) -> tuple[np.ndarray, np.ndarray]:
    """(colours (H, W, 3) uint8 RGB, classes (H, W) uint8) of the atlas at `density` texels a decimetre (at most DENSITY)."""
    rng = np.random.default_rng(seed)
    colours = np.zeros((round(ATLAS_HEIGHT * DENSITY), round(ATLAS_WIDTH * DENSITY), 3), np.float32)
    classes = np.zeros(colours.shape[:2], np.uint8)

    def place(name: str, make, label: int | None) -> None:
        left, top, width, height = (round(v * DENSITY) for v in ATLAS[name])
        made = make(width, height)
        colours[top : top + height, left : left + width] = made if label is not None else made[0]
        classes[top : top + height, left : left + width] = label if label is not None else made[1]

    place("skin", lambda w, h: _skin(rng), None)
    place("torso", lambda w, h: _torso(rng, w, h), CLOTH)
    place("ear", lambda w, h: _ear(rng, w, h), LEFT_EAR)
    place("upper_teeth", lambda w, h: _teeth(w, h, True), MOUTH)
    place("lower_teeth", lambda w, h: _teeth(w, h, False), MOUTH)
    place("cavity", lambda w, h: _fill(w, h, (92, 30, 32), rng, 0.04), MOUTH)
    place("tongue", lambda w, h: _fill(w, h, (186, 92, 92), rng, 0.05), MOUTH)
    place("inner_upper", lambda w, h: _fill(w, h, (142, 66, 66), rng, 0.03), UPPER_LIP)
    place("inner_lower", lambda w, h: _fill(w, h, (158, 74, 74), rng, 0.03), LOWER_LIP)
    size = round(ATLAS_WIDTH * density), round(ATLAS_HEIGHT * density)
    colours = np.clip(colours, 0, 255).astype(np.uint8)
    if density < DENSITY:
        colours = cv2.resize(colours, size, interpolation=cv2.INTER_AREA)
        classes = cv2.resize(classes, size, interpolation=cv2.INTER_NEAREST)
    return colours, classes


def backdrop(seed: int, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8: a plain studio wall, lit from the left, a little grain."""
    rng = np.random.default_rng(seed + 1)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    light = 1.08 - 0.55 * np.hypot((x - 0.36) * 0.9, (y - 0.40) * 0.8)
    wall = np.array([150, 163, 168], np.float32) * light[..., None]
    cloud = _noise(rng, height, width, height / 6, width / 6) * 2.2 + _noise(rng, height, width, height / 40, width / 40) * 0.8
    return np.clip(wall + cloud[..., None] + rng.normal(size=(height, width, 1)), 0, 255).astype(np.uint8)
