"""Joint fit of a face model to the dense landmarks of a whole clip: one identity and focal length, a pose and expression a frame.

The solver is Levenberg-Marquardt on all frames at once (data_utils/pose_solver.py); expressions are eliminated frame by frame
before the poses are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from data_utils.face_tracking.linear_face import COEFFICIENT_BOUND, FaceModel
from data_utils.pose_solver import (
    Poses,
    SmoothMotion,
    cauchy,
    chunks,
    levenberg_marquardt,
    linearise,
    project,
    project_tensor,
    solve_arrow,
    tensor,
)

# All pixel figures below are for a picture side of 512 and scale with it.
REFERENCE_SIDE = 512
LANDMARK_NOISE = 1.5  # px, before the clip has shown its own
MOTION_DEVIATION = 1.0  # px a frame squared, of the prior on the second difference of the pose
FOCAL, FOCAL_DEVIATION = 1200.0, 0.05  # px, and of its logarithm: the lineage's usual value; landmarks themselves say little
FOCAL_BOUNDS = (600.0, 1600.0)
INDEPENDENT = 30  # a network's landmarks err together: as informative as about so many independent ones,
INDEPENDENT_FRAMES = 5  # and much of the error is the same in every frame: to the shape, a clip says no more than so many frames
ROBUST = 2.5  # deviations at which the Cauchy loss turns
EXPRESSIONS = 24
SHAPE_FRAMES = 300  # frames that determine the identity before all frames join in


@dataclasses.dataclass
class Fit:
    """A fitted clip. Poses in dm (utils/pose.py), coefficients in standard deviations, focal in pixels."""

    model: FaceModel
    poses: Poses
    identity: np.ndarray  # (K,)
    expression: np.ndarray  # (F, E)
    focal: float

    def vertices(self, frames=slice(None), chosen=slice(None)) -> np.ndarray:
        """(F, V, 3) dm, all vertices or the `chosen` ones."""
        return self.model.vertices(self.identity, self.expression[frames], chosen)

    def landmarks(self) -> np.ndarray:
        """(F, L, 3) dm of the model's landmarks."""
        return self.vertices(chosen=self.model.landmark_vertices)


class FaceProblem:
    """The fit as a least-squares problem. observed (F, L, 2) px of the model's landmarks, noise (L,) px."""

    def __init__(self, model: FaceModel, observed: np.ndarray, noise: np.ndarray, centre: np.ndarray, motion: SmoothMotion | None,
                 device: torch.device | str = "cpu"):  # fmt: skip
        chosen = model.landmark_vertices
        self.model, self.centre, self.motion, self.device = model, centre, motion, device
        self.observed, self.noise, self.mean = (tensor(x, device) for x in (observed, noise, model.mean[chosen]))
        self.identity = tensor(model.identity[:, chosen].reshape(-1, 3 * len(chosen)), device)  # (K, 3L)
        self.expression = tensor(model.expression[:, chosen].reshape(-1, 3 * len(chosen)), device)  # (E, 3L)
        self.share = min(1.0, INDEPENDENT / model.landmark_count)
        self.prior = max(1.0, len(observed) / INDEPENDENT_FRAMES)  # weight of the priors of what all frames share
        self.focal_prior = np.log(FOCAL * centre.max() * 2 / REFERENCE_SIDE)

    def points(self, fit: Fit, frames: slice) -> Tensor:
        shape = tensor(fit.identity, self.device) @ self.identity + tensor(fit.expression[frames], self.device) @ self.expression
        return self.mean + shape.unflatten(-1, self.mean.shape)

    def squared(self, fit: Fit, frames: slice) -> tuple[Tensor, Tensor]:
        """(F, L) squared reprojection errors, in deviations, and which of them count (the contour is where the pose has it)."""
        pixels = project_tensor(self.points(fit, frames), fit.poses[frames], fit.focal, self.centre)
        counts = self.model.outermost(pixels[..., 0].cpu().numpy())
        return ((pixels - self.observed[frames]) ** 2).sum(-1) / self.noise**2, torch.as_tensor(counts, device=self.device)

    def cost(self, fit: Fit) -> float:
        data = 0.0
        for frames in chunks(len(self.observed)):
            squared, counts = self.squared(fit, frames)
            data += (counts * cauchy(squared, ROBUST)[0]).sum()
        shared = (fit.identity**2).sum() + ((np.log(fit.focal) - self.focal_prior) / FOCAL_DEVIATION) ** 2
        prior = self.prior * shared + (fit.expression**2).sum()
        return 0.5 * float(self.share * data + prior) + (self.motion.cost(fit.poses) if self.motion else 0.0)

    def propose(self, fit: Fit, damping: float) -> Fit:
        parts = [self.reduced(fit, damping, chunk) for chunk in chunks(len(self.observed))]
        precision = self.prior * np.r_[np.ones(len(fit.identity)), FOCAL_DEVIATION**-2]
        corner = np.diag(precision) + sum(part.corner for part in parts).cpu().numpy()
        corner_gradient = precision * np.r_[fit.identity, np.log(fit.focal) - self.focal_prior]
        corner_gradient += sum(part.corner_gradient for part in parts).cpu().numpy()
        shape = _blocks_times(sum(part.point for part in parts)[None], self.identity)[0] @ self.identity.T
        corner[:-1, :-1] += shape.cpu().numpy()
        per_frame = ("pose", "pose_gradient", "border", "solved")
        pose, pose_gradient, border, solved = (torch.cat([getattr(p, name) for p in parts]).cpu().numpy() for name in per_frame)
        pose_step, step = solve_arrow(pose, pose_gradient, border, corner, corner_gradient, damping, fit.poses, self.motion)
        steps = np.concatenate([pose_step, np.tile(step, (len(pose_step), 1))], 1)
        expression_step = -(solved[..., 0] + (solved[..., 1:] @ steps[..., None])[..., 0])
        low, high = np.array(FOCAL_BOUNDS) * self.centre.max() * 2 / REFERENCE_SIDE
        bound = COEFFICIENT_BOUND
        return Fit(fit.model, fit.poses.moved(pose_step), np.clip(fit.identity + step[:-1], -bound, bound),
                   np.clip(fit.expression + expression_step, -bound, bound),
                   float(np.clip(fit.focal * np.exp(np.clip(step[-1], -0.2, 0.2)), low, high)))  # fmt: skip

    def reduced(self, fit: Fit, damping: float, chunk: slice) -> Reduced:
        """The chunk's normal equations without its expressions."""
        squared, counts = self.squared(fit, chunk)
        weight = self.share * counts * cauchy(squared, ROBUST)[1] / self.noise**2
        part = linearise(self.points(fit, chunk), fit.poses[chunk], fit.focal, self.centre, self.observed[chunk], weight)
        pose_point = part.pose_point.transpose(1, 2).flatten(2)  # (F, 6, 3L)
        point_focal = part.point_focal.flatten(1)[..., None]
        border = torch.cat([pose_point @ self.identity.T, part.pose_focal[..., None]], 2)
        of_focal = self.identity @ point_focal.sum(0)  # (K, 1)
        corner = of_focal.new_zeros(len(of_focal) + 1, len(of_focal) + 1)
        corner[:-1, -1:], corner[-1:, :-1], corner[-1, -1] = of_focal, of_focal.T, part.focal
        corner_gradient = torch.cat([self.identity @ part.point_gradient.sum(0).flatten(), part.focal_gradient.view(1)])

        # per frame: the expression block, and what couples it to [itself's gradient | pose | shared]
        curved = _blocks_times(part.point, self.expression)  # (F, E, 3L)
        block = curved @ self.expression.T + torch.eye(len(self.expression), dtype=curved.dtype, device=self.device)
        block += damping * torch.diag_embed(block.diagonal(dim1=1, dim2=2))
        gradient = part.point_gradient.flatten(1) @ self.expression.T + tensor(fit.expression[chunk], self.device)
        coupling = torch.cat([gradient[..., None], self.expression @ pose_point.transpose(1, 2),
                              curved @ self.identity.T, self.expression @ point_focal], 2)  # fmt: skip
        solved = torch.linalg.solve(block, coupling)
        reduced = coupling[..., 1:].transpose(1, 2) @ solved  # (F, 6 + S, 1 + 6 + S)
        return Reduced(part.pose - reduced[:, :6, 1:7], part.pose_gradient - reduced[:, :6, 0], border - reduced[:, :6, 7:],
                       corner - reduced[:, 6:, 7:].sum(0), corner_gradient - reduced[:, 6:, 0].sum(0), part.point.sum(0),
                       solved)  # fmt: skip


@dataclasses.dataclass
class Reduced:
    """What a chunk of frames adds to the arrow system (S shared unknowns) once its expressions are eliminated."""

    pose: Tensor  # (F, 6, 6)
    pose_gradient: Tensor  # (F, 6)
    border: Tensor  # (F, 6, S)
    corner: Tensor  # (S, S), without what the identity has in `point`
    corner_gradient: Tensor  # (S,)
    point: Tensor  # (L, 3, 3)
    solved: Tensor  # (F, E, 1 + 6 + S): expressions of gradient, pose and shared


def _blocks_times(blocks: Tensor, basis: Tensor) -> Tensor:
    """(F, L, 3, 3) symmetric blocks x (K, 3L) basis -> (F, K, 3L)."""
    vectors = basis.unflatten(1, (-1, 3))  # (K, L, 3)
    return sum(vectors[:, :, j, None] * blocks[:, None, :, j] for j in range(3)).flatten(2)


def fit_clip(model: FaceModel, landmarks: np.ndarray, ids: np.ndarray, centre: np.ndarray,
             each: Callable[[float], None] | None = None, device: torch.device | str = "cpu") -> Fit:  # fmt: skip
    """Fit all frames of a clip. landmarks (F, 478, 3) px of frames `ids` (z smaller = nearer), centre (2,) px."""
    scale = centre.max() * 2 / REFERENCE_SIDE
    observed = landmarks[:, model.landmark_ids, :2].astype(float)
    steady = model.landmark_steady
    focal = FOCAL * scale
    bones = landmarks[:, model.landmark_ids[steady]].astype(float)
    poses = _initial_poses(model.mean[model.landmark_vertices[steady]], bones, focal, centre)

    # the subject: size, proportions and focal length from frames all over the clip, mostly by what expressions do not move
    noise = LANDMARK_NOISE * scale * model.landmark_noise
    some = np.unique(np.linspace(0, len(ids) - 1, min(SHAPE_FRAMES, len(ids))).astype(int))
    start = Fit(model, poses[some], np.zeros(len(model.identity)), np.zeros((len(some), len(model.expression))), focal)
    doubtful = np.where(steady, 1, 1 if len(model.expression) else 4) * noise
    shape = levenberg_marquardt(FaceProblem(model, observed[some], doubtful, centre, None, device), start, 20, 1e-4, each)

    # every frame's pose for that subject
    fit = Fit(model, poses, shape.identity, np.zeros((len(ids), len(model.expression))), shape.focal)
    fit.poses.translation[:, 2] *= shape.focal / focal
    motion = SmoothMotion(ids, fit.poses, fit.focal, MOTION_DEVIATION * scale)
    fit = levenberg_marquardt(FaceProblem(model, observed, doubtful, centre, motion, device), fit, 10, 1e-4, each)

    if not len(model.expression):
        model = model.with_expression(_expressions_of_the_clip(fit, observed, centre))
        fit = dataclasses.replace(fit, model=model, expression=np.zeros((len(ids), len(model.expression))))
    return levenberg_marquardt(FaceProblem(model, observed, noise, centre, motion, device), fit, 12, 1e-4, each)


def _initial_poses(points: np.ndarray, landmarks: np.ndarray, focal: float, centre: np.ndarray) -> Poses:
    """Scaled-orthographic poses: points (L, 3) dm aligned with landmarks (F, L, 3) px, whose z is the network's (Umeyama 1991)."""
    target = landmarks * (1, -1, -1)
    middle, origin = target.mean(1), points.mean(0)
    u, s, vt = np.linalg.svd((target - middle[:, None]).swapaxes(1, 2) @ (points - origin))
    flip = np.ones_like(s)
    flip[:, 2] = np.sign(np.linalg.det(u @ vt))
    rotation = (u * flip[:, None]) @ vt
    scale = (s * flip).sum(1) / ((points - origin) ** 2).sum()  # px a dm
    depth = -focal / scale
    camera = np.stack([(middle[:, 0] - centre[0]) / scale, (middle[:, 1] + centre[1]) / scale, depth], 1)
    return Poses(rotation, camera - rotation @ origin)


def _expressions_of_the_clip(fit: Fit, observed: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """(E, V, 3) principal components of what the rigid fit leaves over, lifted to the head's frame parallel to the picture.

    They are taken about zero, not about their mean: what the identity cannot express goes into the mean expression.
    """
    points = fit.landmarks()
    error = observed - project(points, fit.poses, fit.focal, centre)
    depth = (points @ fit.poses.rotation.transpose(0, 2, 1) + fit.poses.translation[:, None])[..., 2:]
    camera = np.concatenate([error * depth / fit.focal * (-1, 1), np.zeros_like(depth)], 2)
    offsets = (camera @ fit.poses.rotation).reshape(len(error), -1)
    some = offsets[np.unique(np.linspace(0, len(offsets) - 1, min(2000, len(offsets))).astype(int))]
    values, vectors = np.linalg.eigh(some.T @ some / len(some))
    count = min(EXPRESSIONS, len(some) - 1)
    components = (vectors[:, ::-1][:, :count] * np.sqrt(np.maximum(values[::-1][:count], 1e-12))).T
    basis = np.zeros((count, *fit.model.mean.shape))
    basis[:, fit.model.landmark_vertices] = components.reshape(count, -1, 3)
    return basis
