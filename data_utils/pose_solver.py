"""Least squares over a clip: a pose a frame, coupled in time, and unknowns that all frames share.

Both the landmark fit (stage 7) and the bundle adjustment (stage 8) are this problem. The normal equations have the shape of an
arrow: a band of 6x6 pose blocks and a dense border for the shared unknowns (points or coefficients, and the focal length). There
are far more poses than shared unknowns, so the poses are eliminated by a banded Cholesky factorisation and the Schur complement
is formed over the shared ones; then Levenberg-Marquardt as usual (Triggs et al., Bundle Adjustment - A Modern Synthesis, 2000).

What grows with the landmarks of all frames is torch in float64, on any device, a chunk of frames at a time; what is left of it, the
arrow, is numpy's.

Camera: utils/pose.py. A pose step (w, d) means R <- exp(w) R, t <- t + d.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol, TypeVar

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve, solveh_banded
from scipy.ndimage import uniform_filter1d
from scipy.spatial.transform import Rotation, Slerp
from torch import Tensor

import utils.pose

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

    def step_from(self, other: Poses) -> np.ndarray:
        """(F, 6): the steps that lead from `other` here, the inverse of `moved`."""
        turn = Rotation.from_matrix(self.rotation @ other.rotation.transpose(0, 2, 1)).as_rotvec()
        return np.concatenate([turn, self.translation - other.translation], 1)

    def __getitem__(self, frames) -> Poses:
        return Poses(self.rotation[frames], self.translation[frames])

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return tensor(self.rotation, device), tensor(self.translation, device)

    def spread(self, ids: np.ndarray, count: int) -> Poses:
        """Poses of frames `ids` (ascending) -> poses of frames 0..count-1, interpolated in between, held at the ends."""
        frames = np.clip(np.arange(count), ids[0], ids[-1])
        translation = np.stack([np.interp(frames, ids, column) for column in self.translation.T], 1)
        if len(ids) == 1:
            return Poses(np.repeat(self.rotation, count, 0), translation)
        return Poses(Slerp(ids, Rotation.from_matrix(self.rotation))(frames).as_matrix(), translation)


def tensor(values: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """In float64, as the solver works."""
    return torch.as_tensor(values, dtype=torch.float64, device=device)


def project(points: np.ndarray, poses: Poses, focal: float, centre: np.ndarray) -> np.ndarray:
    """(L, 3) or (F, L, 3) points -> (F, L, 2) pixels."""
    return project_tensor(tensor(points), poses, focal, centre).numpy()


def project_tensor(points: Tensor, poses: Poses, focal: float, centre: np.ndarray) -> Tensor:
    """`project`, on the device of the points."""
    return utils.pose.project(points, *poses.on(points.device), focal, *centre.tolist())


@dataclasses.dataclass
class Linearised:
    """Normal equations of the reprojection errors of a chunk of frames, before the points' own parametrisation."""

    pose: Tensor  # (F, 6, 6)
    pose_gradient: Tensor  # (F, 6)
    point: Tensor  # (F, L, 3, 3)
    point_gradient: Tensor  # (F, L, 3)
    pose_point: Tensor  # (F, L, 6, 3)
    pose_focal: Tensor  # (F, 6), with respect to log focal
    point_focal: Tensor  # (F, L, 3)
    focal: Tensor  # ()
    focal_gradient: Tensor  # ()


def linearise(points: Tensor, poses: Poses, focal: float, centre: np.ndarray, observed: Tensor, weight: Tensor) -> Linearised:
    """Gauss-Newton terms of 1/2 sum weight |projection - observed|^2; points (L, 3) or (F, L, 3) dm, observed (F, L, 2) px,
    weight (F, L)."""
    rotation, translation = poses.on(points.device)
    rotated = points @ rotation.transpose(1, 2)
    x, y, z = (rotated + translation[:, None]).unbind(-1)
    root = weight.sqrt()
    scale = root * focal / z
    zero = torch.zeros_like(z)
    camera = torch.stack([-scale, zero, scale * x / z, zero, scale, -scale * y / z], -1).unflatten(-1, (2, 3))
    by_focal = torch.stack([-scale * x, scale * y], -1)
    error = by_focal + root[..., None] * (tensor(centre, points.device) - observed)
    residual = torch.where(root[..., None] > 0, error, 0.0)

    # d(w x X)/dw: the row a of `camera` gives a . (w x X) = w . (X x a)
    by_pose = torch.cat([torch.linalg.cross(rotated[:, :, None].expand_as(camera), camera), camera], -1)  # (F, L, 2, 6)
    by_point = (camera.flatten(1, 2) @ rotation).view_as(camera)
    flat = by_pose.flatten(1, 2).transpose(1, 2)  # (F, 6, 2L)
    return Linearised(
        pose=flat @ flat.transpose(1, 2),
        pose_gradient=(flat @ residual.reshape(len(z), -1, 1))[..., 0],
        point=_pairs(by_point, by_point),
        point_gradient=_pairs(by_point, residual[..., None])[..., 0],
        pose_point=_pairs(by_pose, by_point),
        pose_focal=(flat @ by_focal.reshape(len(z), -1, 1))[..., 0],
        point_focal=_pairs(by_point, by_focal[..., None])[..., 0],
        focal=(by_focal**2).sum(),
        focal_gradient=(by_focal * residual).sum(),
    )


def _pairs(a: Tensor, b: Tensor) -> Tensor:
    """a^T b of (F, L, 2, n) and (F, L, 2, m), written out: products of matrices this small are mostly overhead."""
    return a[..., 0, :, None] * b[..., 0, None, :] + a[..., 1, :, None] * b[..., 1, None, :]


def cauchy(squared: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Cauchy loss of squared residuals: (loss, weight = d loss / d squared), both equal to least squares near zero."""
    ratio = squared / scale**2
    return scale**2 * ratio.log1p(), 1 / (1 + ratio)


def chunks(frames: int) -> list[slice]:
    return [slice(i, min(i + CHUNK, frames)) for i in range(0, frames, CHUNK)]


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
        return 0.5 * float(self._robust(self.residual(poses))[0].sum())

    def _robust(self, residual: np.ndarray) -> tuple[Tensor, Tensor]:
        return cauchy(tensor((residual**2).sum(1)), 2.0)

    def add(self, band: np.ndarray, gradient: np.ndarray, poses: Poses) -> None:
        """Add to the lower band (18, 6F) and the gradient (F, 6). Frame-to-frame turns are small: d log(R1 R0^T) = w1 - w0."""
        residual = self.residual(poses)
        weight = self._robust(residual)[1].numpy()[:, None]
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


@dataclasses.dataclass
class Smoothing:
    """Poses that move smoothly, near the `measured` ones by their `information` (F, 6, 6): a problem for levenberg_marquardt."""

    measured: Poses
    information: np.ndarray
    motion: SmoothMotion

    def cost(self, poses: Poses) -> float:
        away = poses.step_from(self.measured)
        return 0.5 * float(np.einsum("fi,fij,fj", away, self.information, away)) + self.motion.cost(poses)

    def propose(self, poses: Poses, damping: float) -> Poses:
        gradient = np.einsum("fij,fj->fi", self.information, poses.step_from(self.measured))
        none = np.zeros((len(gradient), 6, 0)), np.zeros((0, 0)), np.zeros(0)
        return poses.moved(solve_arrow(self.information, gradient, *none, damping, poses, self.motion)[0])


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
