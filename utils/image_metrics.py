"""How good a rendered head is: pictures (PSNR, SSIM, seam) as tensors, landmarks (lips, jitter) as arrays.

Every number of metrics.py comes from here; the training losses use `ssim` too. Pictures are (B, 3, H, W) in [0, 1].
Landmarks are (F, 68, 2) pixels in the iBUG order, NaN rows where no face was found.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterable

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.constants import NECK_CLASSES, TORSO_CLASSES

MOUTH_LANDMARKS = slice(48, 68)
INNER_LIP_PAIRS = ((61, 67), (62, 66), (63, 65))  # upper and lower inner lip, right to left
EYES = ((36, 39, (37, 41), (38, 40)), (42, 45, (43, 47), (44, 46)))  # of each its corners and pairs of upper and lower lid
OUTER_EYE_CORNERS = (36, 45)
RIGID_LANDMARKS = (27, 28, 29, 30, 36, 39, 42, 45)  # nose bridge and eye corners: what the jaw and brows do not move


def blur(maps: Tensor, kernel: Tensor, padding: str = "valid") -> Tensor:
    """Convolve (B, C, H, W) with the separable kernel (K,) along both axes.

    `padding` "valid" shrinks each side by K - 1, "replicate" keeps the size. All planes run as groups of one
    convolution, by far the fastest way on a CPU (16 ms for 48 planes of 256x256 with gradient, single channels 470 ms).
    """
    b, c, h, w = maps.shape
    if padding == "replicate":
        half = len(kernel) // 2
        maps = F.pad(maps, (half, half, half, half), mode="replicate")
    planes, kernel = maps.reshape(1, b * c, *maps.shape[-2:]), kernel.to(maps)
    planes = F.conv2d(planes, kernel.view(1, 1, 1, -1).expand(b * c, -1, -1, -1), groups=b * c)
    planes = F.conv2d(planes, kernel.view(1, 1, -1, 1).expand(b * c, -1, -1, -1), groups=b * c)
    return planes.view(b, c, *planes.shape[-2:])


@functools.cache
def _ssim_window(device: torch.device) -> Tensor:
    return gaussian_kernel(1.5, 5, device)


def gaussian_kernel(sigma: float, radius: int | None = None, device: torch.device | None = None) -> Tensor:
    """(2 radius + 1,) samples of a Gaussian, sum 1; `radius` defaults to 3 sigma."""
    radius = max(1, round(3 * sigma)) if radius is None else radius
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=device) / sigma) ** 2)
    return kernel / kernel.sum()


def psnr(x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B,) dB over the whole picture, or over `mask` (B, 1, H, W) of weights. Equal pictures give 100 dB (8 bits reach 48)."""
    error = (x - y).square().mean(1, keepdim=True)
    if mask is None:
        mse = error.mean((1, 2, 3))
    else:
        mse = (error * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp_min(1e-8)
    return -10 * torch.log10(mse.clamp_min(1e-10))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """(B,) structural similarity, differentiable; Wang et al. 2004: Gaussian window 11 of sigma 1.5, range 1, no padding.

    Sides must be at least 11 pixels. The formula needs only the sum of the two variances, so four blurs do.
    """
    b = x.shape[0]
    means = blur(torch.cat([x, y, x * x + y * y, x * y]), _ssim_window(x.device))
    mean_x, mean_y, squares, product = means.split(b)
    both, cross = mean_x * mean_x + mean_y * mean_y, mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * cross + c1) * (2 * (product - cross) + c2) / ((both + c1) * (squares - both + c2))
    return similarity.mean((1, 2, 3))


def inter_ocular(landmarks: np.ndarray) -> np.ndarray:
    """(F,) distance of the outer eye corners, pixels: the unit that makes faces of any size comparable."""
    return _distance(landmarks, *OUTER_EYE_CORNERS)


def _distance(landmarks: np.ndarray, a: int, b: int) -> np.ndarray:
    """(F,) pixels from landmark a to b."""
    return np.linalg.norm(landmarks[:, a] - landmarks[:, b], axis=-1)


def lmd(rendered: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Landmark distance of the mouth (F,) in pixels and (F,) in inter-ocular distances of the true face.

    Chen et al. 2018: mean distance of the mouth's landmarks after each frame's own mean is taken away, so that the shape
    of the lips counts and not the place of the head.
    """
    mouths = [landmarks[:, MOUTH_LANDMARKS] for landmarks in (rendered, true)]
    a, b = (mouth - mouth.mean(1, keepdims=True) for mouth in mouths)
    pixels = np.linalg.norm(a - b, axis=-1).mean(1)
    return pixels, pixels / inter_ocular(true)


def lip_opening(landmarks: np.ndarray) -> np.ndarray:
    """(F,) mean gap between the inner lips in inter-ocular distances."""
    gaps = [_distance(landmarks, a, b) for a, b in INNER_LIP_PAIRS]
    return np.mean(gaps, 0) / inter_ocular(landmarks)


def eye_opening(landmarks: np.ndarray) -> np.ndarray:
    """(F,) gap between the lids in widths of the eye, mean of both eyes: some 0.3 open, below 0.15 shut (Soukupova & Cech 2016)."""
    openings = []
    for inner, outer, one, other in EYES:
        width = _distance(landmarks, inner, outer).clip(min=1e-6)
        openings.append((_distance(landmarks, *one) + _distance(landmarks, *other)) / (2 * width))
    return np.mean(openings, 0)


def correlation_at(rendered: np.ndarray, true: np.ndarray, lag: int) -> float:
    """Pearson correlation of two curves (F,), the first read `lag` frames later: positive lags find a curve that comes late.

    NaN frames are left out; NaN where a curve is constant or fewer than 3 frames are shared.
    """
    late, early = (rendered[lag:], true[: len(true) - lag]) if lag >= 0 else (rendered[:lag], true[-lag:])
    seen = np.isfinite(late) & np.isfinite(early)
    if seen.sum() < 3 or late[seen].std() < 1e-8 or early[seen].std() < 1e-8:
        return float("nan")
    return float(np.corrcoef(late[seen], early[seen])[0, 1])


def correlation_and_lag(rendered: np.ndarray, true: np.ndarray, reach: int = 5) -> tuple[float, int]:
    """Pearson correlation of two curves (F,) at lag 0, and the lag in frames where it is greatest within +-`reach`.

    A positive lag means that the rendered curve comes late. NaN frames are left out; NaN and lag 0 where a curve is
    constant or fewer than 3 frames are shared, since there is no correlation to speak of.
    """
    lags = [lag for lag in range(-reach, reach + 1) if abs(lag) < len(true)]
    values = [correlation_at(rendered, true, lag) for lag in lags]
    best = 0 if np.isnan(values).all() else lags[int(np.nanargmax(values))]
    return correlation_at(rendered, true, 0), best


def jitter(frames: Iterable[np.ndarray], landmarks: np.ndarray) -> float:
    """Mean length (pixels) of the second difference of the head's motion: what shakes, steady motion left out.

    frames: (H, W, 3) uint8, consecutive; landmarks (F, 68, 2) say where the rigid points lie. Their motion to the next and
    from the last frame is measured on the pictures (pyramidal Lucas-Kanade), since a detector shakes by itself more than a
    head does; of the points of a frame the median counts, so that a blink does not. NaN if there are no three frames.
    """
    lengths, grey = [], collections.deque(maxlen=3)
    for k, frame in enumerate(frames):
        grey.append(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY))
        points = landmarks[k - 1, RIGID_LANDMARKS].astype(np.float32)
        if k < 2 or not np.isfinite(points).all():
            continue
        window = max(9, round(0.15 * float(inter_ocular(landmarks[k - 1 : k])[0])))
        options = {"winSize": (window, window), "maxLevel": 3, "criteria": (3, 30, 0.005)}
        last, seen_last, _ = cv2.calcOpticalFlowPyrLK(grey[1], grey[0], points, None, **options)
        following, seen_following, _ = cv2.calcOpticalFlowPyrLK(grey[1], grey[2], points, None, **options)
        seen = (seen_last & seen_following)[:, 0] == 1
        if seen.any():
            lengths.append(np.median(np.linalg.norm((last + following - 2 * points)[seen], axis=-1)))
    return float(np.mean(lengths)) if lengths else float("nan")


def flicker(last: Tensor, this: Tensor, following: Tensor, mask: Tensor) -> Tensor:
    """(B,) mean absolute second difference in time (x255) of pictures (B, 3, H, W) over `mask` (B, 1, H, W): what shimmers."""
    return masked_error(last + following, 2 * this, mask)


def neck_ring(classes: np.ndarray, part: tuple[int, ...], radius: int) -> np.ndarray:
    """(H, W) bool: pixels within `radius` of both the rendered part and the neck or torso below it.

    `classes` (H, W) are CelebAMask classes, `part` the classes that the model renders. There a composited head meets
    the real body, and a seam shows first. Empty if the model renders the body too.
    """
    rendered = np.isin(classes, part)
    return _meeting(rendered, np.isin(classes, NECK_CLASSES + TORSO_CLASSES) & ~rendered, radius)


def head_rim(classes: np.ndarray, part: tuple[int, ...], radius: int) -> np.ndarray:
    """(H, W) bool: pixels within `radius` of both the rendered part and the rest of the picture, less `neck_ring`.

    There a composited head meets the background: hair that is cut, a halo of the filmed background.
    """
    rendered = np.isin(classes, part)
    return _meeting(rendered, ~rendered, radius) & ~neck_ring(classes, part, radius)


def _meeting(a: np.ndarray, b: np.ndarray, radius: int) -> np.ndarray:
    """(H, W) bool: pixels within `radius` of both masks (H, W)."""
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    near_a, near_b = (cv2.dilate(mask.astype(np.uint8), kernel) for mask in (a, b))
    return (near_a & near_b).astype(bool)


def masked_error(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """(B,) mean absolute error (x255) of (B, 3, H, W) pictures over `mask` (B, 1, H, W); NaN where a mask is empty."""
    error = (x - y).abs().mean(1, keepdim=True) * 255
    return (error * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))
