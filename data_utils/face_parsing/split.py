"""Parsing without a parsing network: person mask + face mesh + the clip's own colours, learned over the whole clip.

The person mask says where the person is and the mesh where the face is. What remains, hair, neck and cloth, is told apart by
colour and place. Both are learned from the clip itself: seeds that geometry makes certain (cheeks are skin, above the forehead is
hair, the shoulders are cloth) give a first colour histogram of each region; a few rounds of expectation-maximisation over frames
spread through the clip refine the histograms and a map of where each region lies relative to the head.
"""

from __future__ import annotations

import cv2
import numpy as np

from data_utils.face_parsing.mesh import CHIN, OVAL, HeadFrame, fill
from utils.errors import UserError

FACE_, NECK_, CLOTH_, HAIR_ = range(4)  # the regions the person is split into
BINS = 32  # per Lab axis
GRID, GRID_SPAN = 96, 3.0  # the place map: side in cells, side in head units (mesh heights)
GRID_TOP = -1.1  # v of its upper edge
ROUNDS = 4
EAR_BOTTOM = 0.36  # v of the ear lobes of a level head (mouth 0.4, chin 0.68)
REACH_V = np.arange(0.25, 0.56, 0.06)
COLOUR_WEIGHT = 0.7  # neighbouring pixels are not independent: their evidence counts less than Bayes would have it


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-np.clip(x, -40, 40)))


def normalised(weights: np.ndarray) -> np.ndarray:
    """(4, ...) weights scaled in place to sum to 1 over the regions (written out: numpy sums a short axis slowly)."""
    weights /= weights[0] + weights[1] + weights[2] + weights[3]
    return weights


def lab_cells(rgb: np.ndarray) -> np.ndarray:
    """(h, w, 3) float32 RGB in [0, 1] -> (h, w) int32 cell of the Lab histogram."""
    lab = cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB)
    light = np.clip(lab[..., 0] * (BINS / 100), 0, BINS - 1).astype(np.int32)
    a, b = (np.clip((lab[..., c] + 48) * (BINS / 112), 0, BINS - 1).astype(np.int32) for c in (1, 2))
    return (light * BINS + a) * BINS + b


class Place:
    """Where the pixels of one frame lie relative to the head."""

    def __init__(self, points: np.ndarray, head: HeadFrame, height: int, width: int, scale: float):
        """`points` (478, 2) pixels of the frame; the arrays are (height, width), the frame scaled by `scale`."""
        a, b = head.to_pixels(points)
        self._to_grid = a, b, scale
        x = (np.arange(width) + 0.5) / scale
        y = (np.arange(height) + 0.5) / scale
        z = (x[None, :] + 1j * y[:, None] - b) / a
        self.u, self.v = z.real.astype(np.float32), z.imag.astype(np.float32)
        self.ear_bottom = EAR_BOTTOM + head.ear_shift(points, a, b)
        oval = fill(points[list(OVAL)], height, width, scale)
        unit = abs(a) * scale
        pad = cv2.copyMakeBorder(oval, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)  # an oval cut by the frame still has an outside
        inside = cv2.distanceTransform(pad, cv2.DIST_L2, 5)[1:-1, 1:-1]
        outside = cv2.distanceTransform(1 - pad, cv2.DIST_L2, 5)[1:-1, 1:-1]
        self.distance = (outside - inside) / unit  # signed, head units, negative inside
        chin = (points[CHIN, 0] + 1j * points[CHIN, 1] - b) / a
        self.below_chin = self.v - np.float32(chin.imag)
        self.chin_u = np.float32(chin.real)

    def grid(self) -> tuple[np.ndarray, np.ndarray]:
        """Map coordinates (column, row) of each pixel in the place map."""
        cell = GRID / GRID_SPAN
        return (self.u + GRID_SPAN / 2) * cell - 0.5, (self.v - GRID_TOP) * cell - 0.5


class SplitModel:
    """What the clip taught: colour evidence (4, BINS^3), the density raised to COLOUR_WEIGHT, and the place map (4, GRID, GRID)."""

    def __init__(self):
        self.colour = np.zeros((4, BINS**3), np.float32)
        self.map: np.ndarray | None = None
        self.hair_reach = (np.zeros(len(REACH_V)), np.zeros(len(REACH_V)))  # viewer's left, right: how far down hair may hang

    def place_prior(self, place: Place) -> np.ndarray:
        """(4, h, w) probability of each region of the person from place alone: anatomy, and after learning the clip's own map."""
        u, v, d, below = place.u, place.v, place.distance, place.below_chin
        left, right = (np.interp(v - 0.06, REACH_V, reach).astype(np.float32) for reach in self.hair_reach)
        side = left + (right - left) * _sigmoid(u / 0.05)
        inside = _sigmoid(-d / 0.012)
        upper = _sigmoid((place.ear_bottom - v) / 0.04)  # where ears and forehead lie
        prior = np.empty((4,) + u.shape, np.float32)
        prior[FACE_] = inside + (1 - inside) * upper * np.exp(-((np.maximum(d, 0) / 0.17) ** 2))
        fringe = _sigmoid((0.02 - v) / 0.05) * _sigmoid((d + 0.3) / 0.06)
        lateral = _sigmoid((np.abs(u - place.chin_u) - 0.3) / 0.04)
        falling = np.exp(-np.maximum(below, 0) / 0.6) * (0.02 + 0.98 * np.maximum(lateral, _sigmoid(-below / 0.05)))
        beside = upper + (1 - upper) * side * falling
        prior[HAIR_] = (1 - inside) * beside + inside * (0.25 * fringe + 0.002)
        across = np.abs(u - place.chin_u)
        spread = 0.1 + 0.3 * _sigmoid((below - 0.1) / 0.05)  # the neck is narrower than the jaw, and widens to the shoulders
        central = 0.05 + 0.95 * np.exp(-((np.maximum(across - 0.3, 0) / spread) ** 2))
        prior[NECK_] = (1 - inside) * (1 - upper) * central * np.exp(-np.maximum(below - 0.2, 0) / 0.5)
        shoulder = (1 - upper) * (1 - side) * lateral * 0.05  # beside the jaw, where no hair hangs
        prior[CLOTH_] = (1 - inside) * np.maximum(_sigmoid((below - 0.06 + 0.35 * (across - 0.4)) / 0.05) * 0.9, shoulder)
        prior += 1e-4
        if self.map is not None:
            x, y = place.grid()
            for k in range(4):
                prior[k] *= cv2.remap(self.map[k], x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        return normalised(prior)

    def posterior(self, cells: np.ndarray, place: Place) -> np.ndarray:
        """(4, h, w) float32 probability of each region, given that the pixel shows the person."""
        evidence = np.take(self.colour, cells, axis=1)
        return normalised(self.place_prior(place) * evidence)


def _seeds(place: Place, person: np.ndarray, skin: np.ndarray, lit: np.ndarray) -> np.ndarray:
    """(4, h, w) bool: pixels whose region is almost certain.

    `skin` (h, w): how well the colour could be this person's skin; `lit` (h, w) bool: skin as bright as the cheeks or brighter.
    """
    u, v, d, below = place.u, place.v, place.distance, place.below_chin
    sure = person > 0.9
    across = np.abs(u - place.chin_u)
    seeds = np.zeros((4,) + u.shape, bool)
    forehead = (d < -0.05) & (v < -0.17)  # unless a fringe covers it: then it is darker, or of another hue
    seeds[FACE_] = _cheeks(place) | (forehead & lit)
    seeds[HAIR_] = sure & (v < -0.35) & (d > 0.18) & (d < 0.6)
    seeds[CLOTH_] = sure & (below > 0.1) & (d > 0.1) & (skin < np.where(below > 0.3, 0.5, 0.1)) & ((across < 0.3) | (below > 0.3))
    seeds[NECK_] = sure & (d > 0.02) & (below > -0.1) & (below < 0.4) & (across < 0.4) & (skin > 0.5)
    return seeds


def _cheeks(place: Place) -> np.ndarray:
    """Certain skin: nose, cheeks and chin, without eyes and lips."""
    v, below = place.v, place.below_chin
    return (place.distance < -0.04) & (v > 0.1) & (below < -0.05) & ((v < 0.25) | (np.abs(place.u - place.chin_u) > 0.2))


def _skin_likeness(samples) -> tuple[np.ndarray, np.ndarray]:
    """(BINS^3,) in [0, 1]: could the colour be this person's skin, lit or in shadow? And (BINS^3,) bool: lit skin, highlights too.

    Shade scales R, G and B alike, so log(R/G) and log(G/B) of skin hardly change: a Gaussian in these two, fitted to the cheeks,
    times a wide window on the brightness.
    """
    counts = sum(np.bincount(cells[_cheeks(place)], minlength=BINS**3) for cells, _, place in samples).astype(np.float64)
    if counts.sum() < 100:
        raise UserError("the face is too small in the picture to tell skin from cloth; use a smaller --scale, or film closer")
    rgb = cell_colours()
    ratio = np.log(rgb[:, :2] + 0.03) - np.log(rgb[:, 1:] + 0.03)
    bright = np.log(rgb.sum(1) / 3 + 0.03)
    mean, middle = (np.average(x, axis=0, weights=counts) for x in (ratio, bright))
    spread = np.cov(ratio.T, aweights=counts) + np.eye(2) * 0.045**2  # shadow and red light from the collar bend the hue a little
    centred = ratio - mean
    squared = (centred @ np.linalg.inv(spread) * centred).sum(1)
    offset = bright - middle
    # a clip without colour (black and white) tells skin by brightness alone: then the shade may not be deep
    colourful = mean @ mean / (mean @ mean + 0.003)
    too_bright, too_dark = np.maximum(offset - 0.15, 0), np.maximum(-offset - 0.3 - 0.5 * colourful, 0)
    shade = np.exp(-0.5 * (too_bright / 0.15) ** 2 - 0.5 * (too_dark / (0.1 + 0.3 * colourful)) ** 2)
    hue = np.exp(-0.5 * np.maximum(np.sqrt(squared) - 1.2, 0) ** 2)
    # shade does not grey the skin either: what is half as colourful is cloth
    share = colourful * (ratio @ mean) / (mean @ mean + 1e-9) + 1 - colourful
    hue *= _sigmoid((share - 0.5) / 0.06)
    return (hue * shade).astype(np.float32), (squared < 3**2) & (offset > -0.3)


def cell_colours() -> np.ndarray:
    """(BINS^3, 3) float32 RGB in [0, 1] of the histogram cells' centres."""
    light, a, b = (np.arange(BINS, dtype=np.float32) + 0.5 for _ in range(3))
    lab = np.stack(np.meshgrid(light * (100 / BINS), a * (112 / BINS) - 48, b * (112 / BINS) - 48, indexing="ij"), 3)
    rgb = cv2.cvtColor(lab.reshape(1, -1, 3).astype(np.float32), cv2.COLOR_LAB2RGB)
    return np.clip(rgb.reshape(-1, 3), 0, 1)


def _log_likelihood(counts: np.ndarray) -> np.ndarray:
    """Smoothed log density of (BINS^3,) colour counts, relative to a uniform one."""
    cube = counts.reshape(BINS, BINS, BINS).astype(np.float32)
    total = cube.sum()
    if total < 50:  # not seen in this clip: no opinion
        return np.zeros(BINS**3, np.float32)
    for axis, sigma in enumerate((1.3, 0.9, 0.9)):
        cube = _blur_axis(cube, axis, sigma)
    density = cube / total * BINS**3
    return np.log(density + 0.02).ravel()


def _blur_axis(cube: np.ndarray, axis: int, sigma: float) -> np.ndarray:
    flat = np.moveaxis(cube, axis, -1)
    blurred = cv2.GaussianBlur(np.ascontiguousarray(flat.reshape(-1, BINS)), (0, 0), sigma, sigmaY=1e-6,
                               borderType=cv2.BORDER_REPLICATE)  # fmt: skip
    return np.moveaxis(blurred.reshape(flat.shape), -1, axis)


def learn(samples: list[tuple[np.ndarray, np.ndarray, Place]]) -> SplitModel:
    """Fit a SplitModel to frames spread over the clip: [(cells (h, w), person (h, w), place)]."""
    model = SplitModel()
    model.hair_reach = tuple(_hair_reach(samples, side) for side in (-1, 1))
    skin, lit = _skin_likeness(samples)
    weights = [_seeds(place, person, skin[cells], lit[cells]).astype(np.float32) for cells, person, place in samples]
    model.colour = _fit_colours(samples, weights, skin)
    for _ in range(ROUNDS):
        weights = [model.posterior(cells, place) * person**2 for cells, person, place in samples]
        model.map = _fit_map(samples, weights)
        model.colour = _fit_colours(samples, weights, skin)
    return model


def _hair_reach(samples, side: int) -> np.ndarray:
    """(len(REACH_V),) in [0, 1]: does the person reach beyond the jaw line at these heights, and at all heights between there and
    the ears? Only then can hair hang down on that side (-1 the viewer's left, 1 right); what begins lower is the shoulder."""
    seen = np.zeros((len(samples), len(REACH_V)))
    for row, (_, person, place) in zip(seen, samples, strict=True):
        ring = (place.distance > 0.07) & (place.distance < 0.2) & (place.u * side > 0)
        for k, v in enumerate(REACH_V):
            there = ring & (np.abs(place.v - v) < 0.03)
            row[k] = person[there].mean() if there.any() else row[k - 1]
    return np.clip(np.minimum.accumulate(np.median(seen, 0)) * 1.6 - 0.5, 0.02, 1.0)


def _fit_colours(samples, weights, skin: np.ndarray) -> np.ndarray:
    """(4, BINS^3) colour evidence from the pixels' shares in the regions; the neck is held to skin, the others away from it."""
    counts = np.zeros((4, BINS**3))
    for (cells, _, _), w in zip(samples, weights, strict=True):
        flat = cells.ravel()
        for k in range(4):
            counts[k] += np.bincount(flat, w[k].ravel(), BINS**3)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    for k in (HAIR_, CLOTH_):
        counts[k] *= np.minimum(1.0, (share[k] + 1e-7) / (share[FACE_] + 1e-7)) ** 2
    counts[NECK_] *= skin
    likelihood = np.stack([_log_likelihood(c) for c in counts])
    likelihood[NECK_] = np.logaddexp(likelihood[NECK_], np.log(skin * 2.0 + 1e-3)) + np.log(skin + 0.01)
    return np.exp(COLOUR_WEIGHT * likelihood).astype(np.float32)


def _fit_map(samples, weights) -> np.ndarray:
    """(4, GRID, GRID): share of each region at a place relative to the head, over the clip (1 where the person was never seen)."""
    total = np.zeros((4, GRID, GRID), np.float32)
    for (_, _, place), w in zip(samples, weights, strict=True):
        x, y = (np.clip(np.round(c), 0, GRID - 1).astype(np.int32) for c in place.grid())
        cell = (y * GRID + x).ravel()
        for k in range(4):
            total[k] += np.bincount(cell, w[k].ravel(), GRID * GRID).reshape(GRID, GRID)
    for k in range(4):
        total[k] = cv2.GaussianBlur(total[k], (0, 0), 1.5, borderType=cv2.BORDER_REPLICATE)
    every = total.sum(0)
    certainty = every / (every + every.max() * 0.02 + 1e-6)
    return (0.03 + certainty * total / np.maximum(every, 1e-6) + (1 - certainty) * 0.5).astype(np.float32)
