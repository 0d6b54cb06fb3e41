"""Surfels for other programs: .ply files of the 2DGS and 3DGS ecosystems, of the canonical head or of one frame.

Both are binary little-endian float32: x y z nx ny nz f_dc_0..2 f_rest_.. (channel-major) opacity scale_.. rot_0..3, values
before activation (logit, log, quaternion w x y z of any length). A surfel has two scales and the tag "SplatRenderMode: 2dgs",
which viewers that draw surfels look for; the others want a third scale, so they get a very small one: a flat Gaussian.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from plyfile import PlyData, PlyElement

from utils.files import atomic_path
from utils.pose import quaternion_to_matrix

if TYPE_CHECKING:
    from scene.deformation import Surfels

TAG = "SplatRenderMode: 2dgs"
THINNESS = 1e-6  # third scale as a share of the cloud's extent (the longest side of its box)


def write_surfels(path: Path, surfels: Surfels, three_scales: bool = False) -> None:
    """Write (N, ...) surfels, before activation, atomically; with `three_scales` as a 3DGS cloud, else tagged as 2DGS."""
    s = {name: getattr(surfels, name).detach().cpu().float() for name in ("xyz", "scaling", "rotation", "opacity", "sh")}
    count = len(s["xyz"])
    normal = quaternion_to_matrix(s["rotation"])[..., 2]
    rest = s["sh"][:, 1:].transpose(1, 2).reshape(count, -1)
    scaling = s["scaling"]
    if three_scales:
        extent = (s["xyz"].amax(0) - s["xyz"].amin(0)).max().clamp_min(1e-3) if count else torch.tensor(1.0)
        scaling = torch.cat([scaling, (THINNESS * extent).log().expand(count, 1)], 1)
    columns = torch.cat([s["xyz"], normal, s["sh"][:, 0], rest, s["opacity"], scaling, s["rotation"]], 1)
    names = ["x", "y", "z", "nx", "ny", "nz"] + [f"f_dc_{i}" for i in range(3)]
    names += [f"f_rest_{i}" for i in range(rest.shape[1])] + ["opacity"]
    names += [f"scale_{i}" for i in range(scaling.shape[1])] + [f"rot_{i}" for i in range(4)]
    vertices = np.ascontiguousarray(columns.numpy(), dtype="<f4").view([(name, "<f4") for name in names])[:, 0]
    comments = [] if three_scales else [TAG]
    with atomic_path(path) as temporary:
        PlyData([PlyElement.describe(vertices, "vertex")], byte_order="<", comments=comments).write(temporary)
