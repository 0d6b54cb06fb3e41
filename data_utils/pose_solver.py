"""Least squares over a clip: a pose a frame, coupled in time, and unknowns that all frames share.

Both the landmark fit (stage 7) and the bundle adjustment (stage 8) are this problem. The normal equations have the shape of an
arrow: a band of 6x6 pose blocks and a dense border for the shared unknowns (points or coefficients, and the focal length). There
are far more poses than shared unknowns, so the poses are eliminated by a banded Cholesky factorisation and the Schur complement
is formed over the shared ones; then Levenberg-Marquardt as usual (Triggs et al., Bundle Adjustment - A Modern Synthesis, 2000).

Camera: utils/pose.py. A pose step (w, d) means R <- exp(w) R, t <- t + d.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import numpy as np
from scipy.linalg import cho_factor, cho_solve, solveh_banded
from scipy.ndimage import uniform_filter1d
from scipy.spatial.transform import Rotation, Slerp
from threadpoolctl import threadpool_limits

from data_utils.per_frame import ordered_map

HEAD_RADIUS = 0.7  # dm: how far points lie from the head's origin; turns radians into displacement
CHUNK = 64  # frames linearised at once


@dataclasses.dataclass
class Poses:
    """World-to-camera of F frames: X_cam = rotation X + translation."""

    rotation: np.ndarray  # (F, 3, 3)
    translation: np.ndarray  # (F, 3)

    def moved(self, step: np.ndarray) -> Poses:
        """The poses after steps (F, 6) = (rotation vector, translation)."""
        return Poses(Rotation.from_rotvec(step[:, :3]).as_matrix() @ self.rotation, self.translation + step[:, 3:])

    def __getitem__(self, frames) -> Poses:
        return Poses(self.rotation[frames], self.translation[frames])

    def spread(self, ids: np.ndarray, count: int) -> Poses:
        """Poses of frames `ids` (ascending) -> poses of frames 0..count-1, interpolated in between, held at the ends."""
        frames = np.clip(np.arange(count), ids[0], ids[-1])
        translation = np.stack([np.interp(frames, ids, column) for column in self.translation.T], 1)
        if len(ids) == 1:
            return Poses(np.repeat(self.rotation, count, 0), translation)
        return Poses(Slerp(ids, Rotation.from_matrix(self.rotation))(frames).as_matrix(), translation)


def project(points: np.ndarray, poses: Poses, focal: float, centre: np.ndarray) -> np.ndarray:
    """(L, 3) or (F, L, 3) points -> (F, L, 2) pixels (the numpy twin of utils.pose.project)."""
    camera = points @ poses.rotation.transpose(0, 2, 1) + poses.translation[:, None]
    return centre + focal * camera[..., :2] / camera[..., 2:] * (-1, 1)


@dataclasses.dataclass
class Linearised:
    """Normal equations of the reprojection errors of a chunk of frames, before the points' own parametrisation."""

    pose: np.ndarray  # (F, 6, 6)
    pose_gradient: np.ndarray  # (F, 6)
    point: np.ndarray  # (F, L, 3, 3)
    point_gradient: np.ndarray  # (F, L, 3)
    pose_point: np.ndarray  # (F, L, 6, 3)
    pose_focal: np.ndarray  # (F, 6), with respect to log focal
    point_focal: np.ndarray  # (F, L, 3)
    focal: float
    focal_gradient: float


def linearise(points: np.ndarray, poses: Poses, focal: float, centre: np.ndarray, observed: np.ndarray,
              weight: np.ndarray) -> Linearised:  # fmt: skip
    """Gauss-Newton terms of 1/2 sum weight |projection - observed|^2; observed (F, L, 2) px, weight (F, L)."""
    rotated = points @ poses.rotation.transpose(0, 2, 1)
    x, y, z = np.moveaxis(rotated + poses.translation[:, None], -1, 0)
    root = np.sqrt(weight)
    scale = root * focal / z
    zero = np.zeros_like(z)
    camera = np.stack([-scale, zero, scale * x / z, zero, scale, -scale * y / z], -1).reshape(*z.shape, 2, 3)
    by_focal = np.stack([-scale * x, scale * y], -1)
    residual = np.where(root[..., None] > 0, by_focal + root[..., None] * (centre - observed), 0.0)

    # d(w x X)/dw: the row a of `camera` gives a . (w x X) = w . (X x a)
    by_rotation = np.cross(rotated[:, :, None], camera)
    by_pose = np.concatenate([by_rotation, camera], -1)  # (F, L, 2, 6)
    by_point = camera @ poses.rotation[:, None]
    flat, flat_residual = by_pose.reshape(len(z), -1, 6), residual.reshape(len(z), -1, 1)
    flat_focal = by_focal.reshape(len(z), -1, 1)
    point_t = by_point.swapaxes(-1, -2)
    return Linearised(
        pose=flat.swapaxes(1, 2) @ flat,
        pose_gradient=(flat.swapaxes(1, 2) @ flat_residual)[..., 0],
        point=point_t @ by_point,
        point_gradient=(point_t @ residual[..., None])[..., 0],
        pose_point=by_pose.swapaxes(-1, -2) @ by_point,
        pose_focal=(flat.swapaxes(1, 2) @ flat_focal)[..., 0],
        point_focal=(point_t @ by_focal[..., None])[..., 0],
        focal=float((by_focal**2).sum()),
        focal_gradient=float((by_focal * residual).sum()),
    )


def cauchy(squared: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Cauchy loss of squared residuals: (loss, weight = d loss / d squared), both equal to least squares near zero."""
    ratio = squared / scale**2
    return scale**2 * np.log1p(ratio), 1 / (1 + ratio)


class SmoothMotion:
    """Prior on the second difference of consecutive poses, robust so that a quick nod or a cut is not smeared.

    The residuals are pixels a frame squared: a rotation counts as the displacement of a point at HEAD_RADIUS, a translation as its
    projection. `deviation` (px) is the acceleration at which the prior starts to give way.
    """

    def __init__(self, ids: np.ndarray, poses: Poses, focal: float, deviation: float):
        self.middle = 1 + np.flatnonzero((np.diff(ids)[:-1] == 1) & (np.diff(ids)[1:] == 1))
        pixels = focal / np.abs(np.median(poses.translation[:, 2]))  # px a dm at the head
        depth = pixels * HEAD_RADIUS / np.abs(np.median(poses.translation[:, 2]))
        self.scale = np.array([HEAD_RADIUS * pixels] * 3 + [pixels] * 2 + [depth]) / deviation

    def residual(self, poses: Poses) -> np.ndarray:
        """(T, 6), in deviations."""
        velocity = np.concatenate([
            Rotation.from_matrix(poses.rotation[1:] @ poses.rotation[:-1].transpose(0, 2, 1)).as_rotvec(),
            np.diff(poses.translation, axis=0),
        ], 1)  # fmt: skip
        return (velocity[self.middle] - velocity[self.middle - 1]) * self.scale

    def cost(self, poses: Poses) -> float:
        return 0.5 * float(cauchy((self.residual(poses) ** 2).sum(1), 2.0)[0].sum())

    def add(self, band: np.ndarray, gradient: np.ndarray, poses: Poses) -> None:
        """Add to the lower band (18, 6F) and the gradient (F, 6). Frame-to-frame turns are small: d log(R1 R0^T) = w1 - w0."""
        residual = self.residual(poses)
        weight = cauchy((residual**2).sum(1), 2.0)[1][:, None]
        columns = band.reshape(18, -1, 6)
        stencil = (1.0, -2.0, 1.0)
        for i, a in enumerate(stencil):
            np.add.at(gradient, self.middle - 1 + i, a * weight * self.scale * residual)
            for j, b in enumerate(stencil[: i + 1]):
                np.add.at(columns[6 * (i - j)], self.middle - 1 + j, a * b * weight * self.scale**2)


def solve_arrow(pose: np.ndarray, pose_gradient: np.ndarray, border: np.ndarray, corner: np.ndarray, corner_gradient: np.ndarray,
                damping: float, poses: Poses, motion: SmoothMotion | None) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Levenberg-Marquardt step of the arrow system; `motion` couples neighbouring poses.

    pose (F, 6, 6), pose_gradient (F, 6), border (F, 6, S), corner (S, S), corner_gradient (S,) -> steps (F, 6) and (S,).
    """
    frames, shared = len(pose), len(corner)
    band = np.zeros((18, 6 * frames))
    for a in range(6):
        for b in range(a + 1):
            band[a - b, b::6] = pose[:, a, b]
    gradient = pose_gradient.copy()
    if motion is not None:
        motion.add(band, gradient, poses)
    band[0] = band[0] * (1 + damping) + 1e-9
    right = np.concatenate([gradient.reshape(-1, 1), border.reshape(6 * frames, shared)], 1)
    solved = solveh_banded(band, right, lower=True, overwrite_ab=True, overwrite_b=True, check_finite=False)
    if not shared:
        return -solved.reshape(frames, 6), np.zeros(0)
    flat = border.reshape(6 * frames, shared)
    damped = corner + np.diag(damping * np.diag(corner) + 1e-9)
    step = -cho_solve(cho_factor(damped - flat.T @ solved[:, 1:]), corner_gradient - flat.T @ solved[:, 0])
    return -(solved[:, 0] + solved[:, 1:] @ step).reshape(frames, 6), step


Part = TypeVar("Part")


def in_chunks(function: Callable[[slice], Part], frames: int) -> Iterator[tuple[slice, Part]]:
    """(chunk, function(chunk)) over all frames, in order, a thread a chunk: the matrices are too small for threads of their own."""
    chunks = [slice(i, i + CHUNK) for i in range(0, frames, CHUNK)]
    with threadpool_limits(1, "blas"):
        yield from zip(chunks, ordered_map(function, chunks), strict=True)


State = TypeVar("State")


class Problem(Protocol[State]):
    def cost(self, state: State) -> float: ...

    def propose(self, state: State, damping: float) -> State: ...


def levenberg_marquardt(problem: Problem[State], state: State, iterations: int, tolerance: float = 1e-5,
                        each: Callable[[float], None] | None = None) -> State:  # fmt: skip
    """Minimise problem.cost from `state`; stops when an accepted step lowers the cost by less than `tolerance` of it."""
    cost, damping = problem.cost(state), 1e-3
    for _ in range(iterations):
        candidate = problem.propose(state, damping)
        new = problem.cost(candidate)
        if each:
            each(min(cost, new))
        if not new < cost:
            damping *= 8
            if damping > 1e6:
                break
            continue
        done = cost - new < tolerance * cost
        state, cost, damping = candidate, new, max(damping / 5, 1e-7)
        if done:
            break
    return state


def still_jitter(pixels: np.ndarray, ids: np.ndarray, head: np.ndarray | None = None,
                 speed: float = 0.5) -> tuple[float | None, int]:  # fmt: skip
    """Mean length (px) of the second difference of points (F, N, 2) where the head is still, NaN where a point is not seen.

    Still: the mean of `head` (F, M, 2), by default the points themselves, averaged over 9 frames, moves less than `speed` px a
    frame. Returns (None, 0) if it never is.
    """
    if len(ids) < 3:
        return None, 0
    middle = uniform_filter1d((pixels if head is None else head).mean(1), 9, axis=0, mode="nearest")
    slow = np.linalg.norm(np.gradient(middle, axis=0), axis=1) < speed
    runs = (np.diff(ids)[:-1] == 1) & (np.diff(ids)[1:] == 1) & slow[:-2] & slow[1:-1] & slow[2:]
    second = np.linalg.norm(np.diff(pixels, 2, axis=0)[runs], axis=-1)
    return (round(float(np.nanmean(second)), 4), int(runs.sum())) if np.isfinite(second).any() else (None, 0)
