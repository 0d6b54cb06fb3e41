"""Small errors of single training frames, learned beside the head so that it need not learn them: pose and exposure.

Only what changes from frame to frame is corrected: the mean over a second on either side is taken away, so that the head stays
where held-out frames and replayed poses expect it. Rendering uses none of this, and the model folder does not keep it.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scene.deformation import Surfels
from utils.constants import FPS

POSE_UNIT = 0.005  # rad and dm: about a pixel at 512 for a head; corrections of this size cost 1
EXPOSURE_UNIT = 0.02  # of the brightness


class FrameCorrections(nn.Module):
    """A turn and a shift of the head (6), a gain and an offset of the colour (6) for each of `frames` frame ids."""

    def __init__(self, frames: int, pose: bool, exposure: bool):
        super().__init__()
        self.pose = nn.Parameter(torch.zeros(frames, 6)) if pose else None  # rotation vector, translation
        self.exposure = nn.Parameter(torch.zeros(frames, 6)) if exposure else None  # gain - 1 and offset of R, G, B

    def posed(self, surfels: Surfels, frame: Tensor) -> Surfels:
        """Deformed surfels turned and shifted as the frames (B,) need it; to first order, since the angles are tiny."""
        if self.pose is None:
            return surfels
        turn, shift = _unsteady(self.pose)[frame][:, None].split(3, -1)  # (B, 1, 3)
        xyz = surfels.xyz + torch.linalg.cross(turn.expand(-1, surfels.xyz.shape[-2], -1), surfels.xyz.expand(len(frame), -1, -1))
        w, v = surfels.rotation.split((1, 3), -1)
        w, v = w.expand(len(frame), -1, -1), v.expand(len(frame), -1, -1)
        half = (0.5 * turn).expand_as(v)
        rotation = torch.cat([w - (half * v).sum(-1, keepdim=True), v + half * w + torch.linalg.cross(half, v)], -1)
        return dataclasses.replace(surfels, xyz=xyz + shift, rotation=rotation)

    def exposed(self, rgb: Tensor, alpha: Tensor, frame: Tensor) -> Tensor:
        """Premultiplied colour (B, 3, H, W) over alpha (B, 1, H, W) as bright as the frames (B,) are."""
        if self.exposure is None:
            return rgb
        gain, offset = _unsteady(self.exposure)[frame][..., None, None].split(3, 1)
        return rgb * (1 + gain) + alpha * offset

    def losses(self, config) -> dict[str, Tensor]:
        """Weighted squares of the corrections in their units."""
        terms = {}
        if self.pose is not None:
            terms["pose"] = config.lambda_pose * (self.pose / POSE_UNIT).square().mean()
        if self.exposure is not None:
            terms["exposure"] = config.lambda_exposure * (self.exposure / EXPOSURE_UNIT).square().mean()
        return terms


def _unsteady(values: Tensor) -> Tensor:
    """(F, 6) per frame, less the mean of the frames within a second."""
    mean = F.avg_pool1d(values.T[None], 2 * FPS + 1, 1, FPS, count_include_pad=False)[0].T
    return values - mean
