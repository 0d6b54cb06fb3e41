"""What is expected of the surfels themselves, whatever the pictures say: attention by region, smooth motion, few and small ones.

Nothing here waits for the device: what depends on where surfels lie is worked out when they are replaced (growth), not each step.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from scene.deformation import Surfels

NEIGHBOURS = 8
LARGE = 0.08  # dm: what a surfel's radius may be for nothing


def _tree(points: np.ndarray):
    from scipy.spatial import cKDTree  # slow to import: --help answers without

    return cKDTree(points)


class AttentionRegions:
    """How little use a surfel has for each token, from the canonical face mesh (after lineage.md 6.1).

    Lower is below the tip of the nose (SyncTalk's split, lineage.md 4.5); a surfel within 0.15 dm of the mesh is face. Audio
    belongs to the lower face, expression to the upper, the frame code off the face, and the camera anywhere, but on the face only
    half: if it cost nothing there, the cheapest attention would be to the camera alone, and the maps would say nothing.
    """

    def __init__(self, face_points: np.ndarray, reach: float = 0.15):
        self.tree, self.reach = _tree(face_points), reach
        self.nose_tip = float(face_points[face_points[:, 2].argmax(), 1])
        self._of: tuple[Tensor, tuple[str, ...], Tensor] | None = None

    def unwanted(self, xyz: Tensor, names: tuple[str, ...]) -> Tensor:
        """(N, 3) canonical positions -> (N, T) cost of a surfel's attention to a token; kept for the same tensor `xyz`."""
        if self._of is None or self._of[0] is not xyz or self._of[1] != names:
            self._of = (xyz, names, self._columns(xyz, names).to(xyz.device))
        return self._of[2]

    def _columns(self, xyz: Tensor, names: tuple[str, ...]) -> Tensor:
        points = xyz.detach().cpu().numpy()
        face = self.tree.query(points, distance_upper_bound=self.reach)[0] < self.reach
        lower = face & (points[:, 1] < self.nose_tip)
        of = {"audio": ~lower, "expression": ~face | lower, "frame": face}
        return torch.from_numpy(np.stack([of.get(name, 0.5 * face).astype(np.float32) for name in names], 1))

    def renew(self) -> None:
        """Work it out again from where the surfels are now, into the same tensor."""
        if self._of is not None:
            xyz, names, columns = self._of
            columns.copy_(self._columns(xyz, names))

    def loss(self, attention: Tensor, names: tuple[str, ...], xyz: Tensor) -> Tensor:
        """(B, N, T) attention -> the cost of a surfel's attention, mean over surfels."""
        return (attention * self.unwanted(xyz, names)).sum(-1).mean()


class Neighbours:
    """The nearest surfels of each surfel; a random one a step stands for all of them."""

    def __init__(self, count: int = NEIGHBOURS):
        self.count = count
        self._of: tuple[Tensor, Tensor] | None = None

    def draw(self, xyz: Tensor) -> Tensor:
        """(N, 3) positions -> (N,) index of a neighbour each. The neighbours are kept until `xyz` is another tensor."""
        if self._of is None or self._of[0] is not xyz:
            self._of = (xyz, self._nearest(xyz).to(xyz.device))
        nearest = self._of[1]
        return nearest.gather(1, torch.randint(nearest.shape[1], (len(nearest), 1), device=xyz.device))[:, 0]

    def _nearest(self, xyz: Tensor) -> Tensor:
        points = xyz.detach().cpu().numpy()
        return torch.from_numpy(_tree(points).query(points, min(self.count + 1, len(points)))[1][:, 1:])

    def renew(self) -> None:
        """Find them again where the surfels are now, into the same tensor."""
        if self._of is not None:
            self._of[1].copy_(self._nearest(self._of[0]))


def surfel_losses(config, canonical: Surfels, drawn: Surfels, neighbours: Neighbours) -> dict[str, Tensor]:
    """Weighted terms, each there only if its weight is set: opacity, scale, smooth motion, smooth embeddings."""
    terms = {}
    if config.lambda_opacity:
        terms["opacity"] = config.lambda_opacity * drawn.opacity.sigmoid().mean()
    if config.lambda_scale:
        terms["scale"] = config.lambda_scale * (drawn.scaling.exp() - LARGE).relu().mean()
    if config.lambda_motion and drawn.xyz.dim() == 3:  # (B, N, 3): deformed
        motion = drawn.xyz - canonical.xyz
        terms["motion"] = config.lambda_motion * (motion - motion[:, neighbours.draw(canonical.xyz)]).abs().mean()
    if config.lambda_embedding and canonical.embedding is not None:
        other = canonical.embedding[neighbours.draw(canonical.xyz)]
        terms["embedding"] = config.lambda_embedding * (canonical.embedding - other).square().mean()
    return terms
