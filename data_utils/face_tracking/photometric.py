"""Optional end of stage 7 (`--photometric`): poses that show the same face in every frame, where landmarks leave them open.

The rigid part of the fitted face is sampled in the pictures. What most frames show at a point is the face's texture there; each
frame's pose takes Levenberg-Marquardt steps until its picture shows that texture (Lucas and Kanade 1981, on a surface), from
blurred pictures to sharp ones; texture and poses alternate. Compared is the grey picture less its low frequencies, up to a gain a
frame: shades change as a head turns under a lamp, and would turn the pose. The landmarks' pose is the prior. At the end motion is
held smooth, as far as each frame's picture leaves it open. Identity, expressions and focal length stay the landmarks'.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample

from data_utils.face_tracking.fit import REFERENCE_SIDE, Fit
from data_utils.face_tracking.surface import dense_part
from data_utils.per_frame import ordered_map
from data_utils.pose_solver import Poses, Smoothing, SmoothMotion, cauchy, levenberg_marquardt, project
from utils.dataset_folder import DatasetFolder
from utils.image import read_rgb
from utils.image_metrics import blur as blurred
from utils.image_metrics import gaussian_kernel
from utils.progress import progress

# Pixels are those of a picture side of 512 and scale with it.
BLURS = (4.0, 2.0, 1.0)  # px, deviation; rounds after the first need the last only
LIGHT = 3.0  # what is left after a blur so many times wider is light, not texture
ROUNDS, STEPS = 3, 5  # of texture and poses; LM steps of a frame at each blur
FEWEST_FRAMES, TEXTURE_FRAMES = 10, 100  # with fewer there is no texture to speak of; more hardly change it
FRAMES, MARGIN = 16, 30.0  # in memory at once, px of them around the face
FEWEST_POINTS = 2000  # of the rigid surface that frames are compared on
FACING, SEEN = 0.3, 0.2  # least cosine between surface and view, least share of the texture's frames that see a point
NOISE_FLOOR = 0.1  # grey levels squared: rounding and JPEG
ROBUST = 2.5  # deviations at which the Cauchy loss turns
INDEPENDENT = 300  # neighbouring points err together: all say no more than so many independent ones
PRECISION = np.repeat((np.radians(2), 0.2), 3) ** -2.0  # of a pose about the landmarks', from deviations in rad, dm
MOTION_DEVIATION = 0.15  # px a frame squared
SHOWN = 0.3  # of the texture must a frame explain, or it keeps its pose: covered, blurred, or another picture

Arrays = TypeVar("Arrays")  # Poses or Look: a dataclass of arrays (F, ...)
Sampler = Callable[[Poses], tuple[Tensor, Tensor, Tensor]]


@dataclasses.dataclass
class Look:
    """How well F frames show the texture, with given poses."""

    cost: np.ndarray  # (F,) what a pose minimises: mismatch and prior
    gradient: np.ndarray  # (F, 6)
    information: np.ndarray  # (F, 6, 6)
    explained: np.ndarray  # (F,) share of the texture: 1 is all of it, 0 what an empty picture explains


def refine(fit: Fit, folder: DatasetFolder, ids: np.ndarray, centre: np.ndarray, device: torch.device | str = "cpu",
           texture_of: np.ndarray | None = None) -> tuple[Fit, dict]:  # fmt: skip
    """The fit of frames `ids` with its poses refined, and facts for the report; centre (2,) px.

    The texture comes from frames at the indices `texture_of` (all). A frame that shows it no better than before keeps its pose, and
    so do all where there are too few frames.
    """
    every = np.arange(len(ids))
    shown = every if texture_of is None else texture_of
    if len(shown) < FEWEST_FRAMES:
        return fit, {"warnings": [f"--photometric needs {FEWEST_FRAMES} usable frames and was left out: there are {len(shown)}"]}
    shown = shown[np.unique(np.linspace(0, len(shown) - 1, min(TEXTURE_FRAMES, len(shown))).astype(int))]
    face, poses = Face(fit, folder, ids, centre, device), fit.poses
    with progress(label="photometric refinement", total=ROUNDS * len(ids)) as bar:
        for blurs in (BLURS, *[BLURS[-1:]] * (ROUNDS - 1)):
            textures, parts = face.textures(poses, shown, blurs), []
            for frames, grey, corner in face.windows(every, poses):
                samplers = [face.sampler(grey, corner, blur) for blur in blurs]
                parts.append(face.improved(poses[frames], fit.poses[frames], samplers, textures))
                bar.update(len(frames))
            poses, before, after = (_joined(part) for part in zip(*parts, strict=True))
    better = after.explained > np.maximum(before.explained, SHOWN)
    poses = _where(better, poses, fit.poses)
    information = np.where(better[:, None, None], after.information, 1e6 * after.information)
    motion = SmoothMotion(ids, poses, fit.focal, MOTION_DEVIATION * face.scale)
    smooth = levenberg_marquardt(Smoothing(poses, information, motion), poses, 10)
    refined = dataclasses.replace(fit, poses=_where(better, smooth, fit.poses))
    return refined, face.facts(refined.poses, before, after, better)


class Face:
    """The rigid surface of a fit (P points) and the clip's pictures of it."""

    def __init__(self, fit: Fit, folder: DatasetFolder, ids: np.ndarray, centre: np.ndarray, device: torch.device | str):
        face = fit.model.vertices(fit.identity, fit.expression.mean(0))
        surface = dense_part(face, fit.model.triangles, fit.model.rigid, FEWEST_POINTS)
        self.points, self.normals = (torch.as_tensor(x, dtype=torch.float32, device=device) for x in surface)
        self.fit, self.folder, self.ids, self.centre, self.device = fit, folder, ids, centre, device
        self.scale = centre.max() * 2 / REFERENCE_SIDE

    def pixels(self, poses: Poses) -> np.ndarray:
        """(F, N, 2): where some of the points are seen."""
        return project(self.points[::10].double().cpu().numpy(), poses, self.fit.focal, self.centre)

    def windows(self, frames: np.ndarray, poses: Poses) -> Iterator[tuple[np.ndarray, Tensor, np.ndarray]]:
        """FRAMES at a time: indices (F,), grey pictures (F, 1, H, W) uint8 cut to where `poses` have the face, corner (2,) px."""
        size, margin = (2 * self.centre).astype(int), MARGIN * self.scale
        for some in (frames[i : i + FRAMES] for i in range(0, len(frames), FRAMES)):
            pixels = self.pixels(poses[some])
            low = np.clip(pixels.min((0, 1)) - margin, 0, size - 32).astype(int)
            high = np.clip(pixels.max((0, 1)) + margin, low + 32, size).astype(int)
            cut = [image[low[1] : high[1], low[0] : high[0]] for image in ordered_map(self._grey, some)]
            yield some, torch.from_numpy(np.stack(cut))[:, None].to(self.device), low

    def _grey(self, index: int) -> np.ndarray:
        return cv2.cvtColor(read_rgb(self.folder.frame(int(self.ids[index]))), cv2.COLOR_RGB2GRAY)

    def sampler(self, grey: Tensor, corner: np.ndarray, blur: float) -> Sampler:
        """poses -> grey levels (F, P) without light, their derivatives (F, P, 6) by the pose, how far the points face us, or 0."""
        step = max(1, int(blur * self.scale))  # a blurred picture needs fewer pixels
        deviation = blur * self.scale / step
        image = blurred(avg_pool2d(grey.float(), step), gaussian_kernel(deviation), "replicate")
        image = image - blurred(image, gaussian_kernel(LIGHT * deviation), "replicate")
        by_v, by_u = torch.gradient(image, dim=(2, 3))
        images = torch.cat([image, by_u / step, by_v / step], 1)
        extent = step * torch.tensor([image.shape[3], image.shape[2]], device=self.device)
        (u0, v0), focal = (self.centre - corner).tolist(), self.fit.focal

        def sample(poses: Poses) -> tuple[Tensor, Tensor, Tensor]:
            rotation, translation = (x.float() for x in poses.on(self.device))
            rotated = self.points @ rotation.transpose(1, 2)
            camera = rotated + translation[:, None]
            x, y, z = camera.unbind(-1)
            at = 2 * torch.stack([u0 - focal * x / z, v0 + focal * y / z], -1) / extent - 1
            value, by_u, by_v = grid_sample(images, at[:, None], align_corners=False)[:, :, 0].unbind(1)
            by_point = focal / z[..., None] * torch.stack([-by_u, by_v, (by_u * x - by_v * y) / z], -1)
            by_pose = torch.cat([torch.linalg.cross(rotated, by_point), by_point], -1)
            facing = -((self.normals @ rotation.transpose(1, 2)) * camera).sum(-1) / camera.norm(dim=-1)
            return value, by_pose, facing * ((facing > FACING) & (at.abs() < 1).all(-1))

        return sample

    def textures(self, poses: Poses, frames: np.ndarray, blurs: tuple[float, ...]) -> list[tuple[Tensor, Tensor]]:
        """Of each blur what these frames show (P,), and its precision (P,), one over the variance, 0 where hardly any shows it."""
        looks = [[self.sampler(grey, corner, blur)(poses[some])[::2] for blur in blurs]
                 for some, grey, corner in self.windows(frames, poses)]  # fmt: skip
        result = []
        for of_blur in zip(*looks, strict=True):
            value, seen = (torch.cat(part) for part in zip(*of_blur, strict=True))
            texture, weight = _mean(value, seen), seen
            for _ in range(4):
                matched = _gain(value, texture, weight) * value
                texture = _mean(matched, weight)
                squared = (matched - texture) ** 2
                variance = _mean(squared, weight) + NOISE_FLOOR
                weight = seen * cauchy(squared / variance, ROBUST)[1]
            result.append((texture, ((seen > 0).float().mean(0) > SEEN) / variance))
        return result

    def look(self, poses: Poses, start: Poses, sample: Sampler, texture: Tensor, precision: Tensor) -> Look:
        value, by_pose, seen = sample(poses)
        seen = seen * (INDEPENDENT / len(self.points))
        robust = seen * precision
        for _ in range(3):
            gain = _gain(value, texture, robust)
            residual = gain * value - texture
            loss, weight = cauchy(residual**2 * precision, ROBUST)
            robust = seen * precision * weight
        empty = (seen * cauchy(texture**2 * precision, ROBUST)[0]).sum(1).double().cpu().numpy() / 2
        mismatch = (seen * loss).sum(1).double().cpu().numpy() / 2
        jacobian = torch.cat([gain[..., None] * by_pose, value[..., None]], 2)  # the gain's column last
        both = torch.cat([jacobian, residual[..., None]], 2)
        normal = ((robust[..., None] * jacobian).transpose(1, 2) @ both).double().cpu().numpy()  # (F, 7, 8)
        normal = normal[:, :6] - normal[:, :6, 6:7] * normal[:, 6:] / (normal[:, 6:, 6:7] + 1e-9)  # without the gain
        away = poses.step_from(start)
        return Look(mismatch + (PRECISION * away**2).sum(1) / 2, normal[..., 7] + PRECISION * away,
                    normal[..., :6] + np.diag(PRECISION), 1 - mismatch / np.maximum(empty, 1e-9))  # fmt: skip

    def improved(self, poses: Poses, start: Poses, samplers: list[Sampler],
                 textures: list[tuple[Tensor, Tensor]]) -> tuple[Poses, Look, Look]:  # fmt: skip
        """Poses after some LM steps at each blur, and how well the sharpest picture shows the texture at `start` and with them."""
        for sample, texture in zip(samplers, textures, strict=True):
            here, damping = self.look(poses, start, sample, *texture), np.full((len(poses.rotation), 1), 1e-3)
            for _ in range(STEPS):
                damped = here.information + damping[..., None] * here.information * np.eye(6)
                there = poses.moved(-np.linalg.solve(damped, here.gradient[..., None])[..., 0])
                new = self.look(there, start, sample, *texture)
                better = new.cost < here.cost
                poses, here = _where(better, there, poses), _where(better, new, here)
                damping = np.where(better[:, None], damping / 5, damping * 8)
        return poses, self.look(start, start, sample, *texture), here

    def facts(self, poses: Poses, before: Look, after: Look, better: np.ndarray) -> dict:
        """For the report; pixels at 512."""
        moved = np.linalg.norm(self.pixels(poses) - self.pixels(self.fit.poses), axis=2) / self.scale
        shares, kept = (before.explained, np.where(better, after.explained, before.explained)), self.ids[~better]
        lost = f"--photometric left the pose of {len(kept)} frames as it was, first {kept[0]}" if len(kept) else ""
        return {"explained_before": round(float(shares[0].mean()), 3), "explained_after": round(float(shares[1].mean()), 3),
                "moved_px": round(float(np.sqrt((moved**2).mean())), 3), "frames_kept": len(kept),
                "warnings": [lost] if len(kept) > 0.1 * len(better) else []}  # fmt: skip


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    """(P,) over the frames."""
    return (weight * values).sum(0) / weight.sum(0).clamp_min(1e-9)


def _gain(values: Tensor, texture: Tensor, weight: Tensor) -> Tensor:
    """(F, 1): what each frame's values are to be multiplied by."""
    return (weight * values * texture).sum(1, keepdim=True) / ((weight * values**2).sum(1, keepdim=True) + 1e-9)


def _where(which: np.ndarray, a: Arrays, b: Arrays) -> Arrays:
    """Frame by frame a's or b's."""
    return type(a)(*(np.where(which.reshape(-1, *[1] * (x.ndim - 1)), x, vars(b)[name]) for name, x in vars(a).items()))


def _joined(parts: tuple[Arrays, ...]) -> Arrays:
    return type(parts[0])(*(np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])))
