"""The canonical surfels: parameters, growing and pruning under a budget, and the .ply they live in."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from plyfile import PlyData, PlyParseError
from torch import Tensor, nn

from scene.deformation import Surfels
from utils.errors import UserError
from utils.export import write_surfels
from utils.pose import quaternion_of_normal, quaternion_to_matrix
from utils.sh import rgb_to_sh

EMBEDDING_PERIOD = 1.0  # dm: embeddings start as waves about this long over the head, alike for neighbours
LARGEST_SCALE = 0.35  # dm: larger surfels are pruned (a head is about 2 dm wide)
SPLIT_SCALE = 0.02  # dm: surfels larger than this split, smaller ones are cloned


@dataclasses.dataclass
class PointCloud:
    """Where surfels start: (N, 3) positions dm, unit normals, colours in [0, 1]."""

    points: Tensor
    normals: Tensor
    colours: Tensor


class GaussianModel(nn.Module):
    """N surfels in the canonical (head) frame, before activation: opacity logit, log scale, unnormalised quaternion.

    With `embedding` > 0 each also carries a learned vector of that width for the deformation (EmbedTalk, anchors.md B.1).
    """

    def __init__(self, sh_degree: int, count: int = 0, embedding: int = 0):
        super().__init__()
        self.sh_degree = sh_degree
        rest = (sh_degree + 1) ** 2 - 1
        shapes = {"xyz": (3,), "features_dc": (1, 3), "features_rest": (rest, 3), "opacity": (1,), "scaling": (2,),
                  "rotation": (4,)} | ({"embedding": (embedding,)} if embedding else {})  # fmt: skip
        self.values = nn.ParameterDict({name: nn.Parameter(torch.zeros(count, *shape)) for name, shape in shapes.items()})
        self.register_buffer("gradient", torch.zeros(count))  # summed screen gradient since the last growth
        self.register_buffer("seen", torch.zeros(count))  # frames in which the surfel was on screen

    def __len__(self) -> int:
        return len(self.values["xyz"])

    @property
    def surfels(self) -> Surfels:
        v = self.values
        sh = torch.cat([v["features_dc"], v["features_rest"]], 1)
        embedding = v["embedding"] if "embedding" in v else None
        return Surfels(v["xyz"], v["scaling"], v["rotation"], v["opacity"], sh, embedding)

    @classmethod
    def from_points(cls, cloud: PointCloud, sh_degree: int, embedding: int = 0) -> GaussianModel:
        """One surfel a point, facing along its normal, as large as the distance to its neighbours."""
        from simple_knn import distCUDA2  # brings SciPy, slow to import: --help answers without

        model = cls(sh_degree, len(cloud.points), embedding)
        distance = distCUDA2(cloud.points.float()).clamp_min(1e-7).sqrt()
        with torch.no_grad():
            model.values["xyz"].copy_(cloud.points)
            model.values["features_dc"].copy_(rgb_to_sh(cloud.colours)[:, None])
            model.values["opacity"].fill_(float(torch.logit(torch.tensor(0.5))))
            model.values["scaling"].copy_(distance.clamp_max(LARGEST_SCALE / 2).log()[:, None].expand(-1, 2))
            model.values["rotation"].copy_(quaternion_of_normal(cloud.normals))
            if embedding:
                waves = torch.randn(3, embedding) * (2 * torch.pi / EMBEDDING_PERIOD)
                model.values["embedding"].copy_(0.5 * (cloud.points @ waves + 2 * torch.pi * torch.rand(embedding)).sin())
        return model

    # -- growing and pruning -------------------------------------------------------------------------------------

    def observe(self, screen_gradient: Tensor, radii: Tensor) -> None:
        """Accumulate the norm of (B, N, 2) screen gradients over the frames in which a surfel has a radius (B, N)."""
        visible = radii > 0
        self.gradient += (screen_gradient.norm(dim=-1) * visible).sum(0)
        self.seen += visible.sum(0)

    @torch.no_grad()
    def densify_and_prune(self, optimizer: torch.optim.Optimizer, fraction: float, min_opacity: float, max_points: int,
                          generator: torch.Generator, iteration: int) -> None:  # fmt: skip
        """Prune faint and oversized surfels, then grow the `fraction` that pulls hardest at the picture.

        The published rule compares the mean screen gradient with a threshold, whose right value changes with resolution,
        loss weights and batch; ranking needs none, and the number of surfels grows on schedule up to `max_points`.
        Small surfels are cloned, large ones split in two along their tangent plane (scale / 1.6). Raises UserError with the
        `iteration` if hardly a surfel is left.
        """
        v = self.values
        scale = v["scaling"].exp().amax(1)
        keep = (v["opacity"].sigmoid()[:, 0] > min_opacity) & (scale < LARGEST_SCALE)
        if keep.sum() < 4:
            raise UserError(f"at iteration {iteration} almost every surfel had become transparent or huge; lower --opacity_lr, "
                            "--scaling_lr or --min_opacity and resume from the last checkpoint, or train anew")  # fmt: skip
        score = torch.where(keep, self.gradient / self.seen.clamp_min(1.0), -1.0)
        room = max(max_points - int(keep.sum()), 0)
        count = min(int(fraction * len(self)), room, int((score > 0).sum()))
        grown = score.topk(count).indices.sort().values  # ranks of surfels that pull alike are rounding's, and decide nothing more
        large = scale[grown] > SPLIT_SCALE
        split, cloned = grown[large], grown[~large]

        # two children of each split surfel replace it; a clone is added beside its original
        parents = torch.cat([split, split, cloned])
        extra = {name: value[parents].clone() for name, value in v.items()}
        children = 2 * len(split)
        places = torch.randn(2, len(self), 2, generator=generator).to(scale.device)  # of all: a surfel's do not hang on others
        offset = places[:, split].flatten(0, 1) * extra["scaling"][:children].exp()
        tangents = quaternion_to_matrix(extra["rotation"][:children])[..., :2]
        extra["xyz"][:children] += (tangents @ offset[..., None])[..., 0]
        extra["scaling"][:children] -= float(np.log(1.6))
        keep[split] = False
        self._replace(optimizer, keep, extra)

    @torch.no_grad()
    def keep_most_opaque(self, optimizer: torch.optim.Optimizer, count: int) -> None:
        """Leave no more than `count` surfels: for a budget that was lowered after they had grown."""
        if len(self) > count:
            keep = torch.zeros(len(self), dtype=torch.bool, device=self.gradient.device)
            keep[self.values["opacity"][:, 0].topk(count).indices] = True
            self._replace(optimizer, keep, {name: value[:0] for name, value in self.values.items()})

    def _replace(self, optimizer: torch.optim.Optimizer, keep: Tensor, extra: dict[str, Tensor]) -> None:
        """Keep the surfels of the mask and append `extra`, in the parameters and in the optimizer's moments alike."""
        for name, old in list(self.values.items()):
            new = nn.Parameter(torch.cat([old.detach()[keep], extra[name]]))
            state = optimizer.state.pop(old, None)
            for group in optimizer.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]
            if state is not None:
                for moment in ("exp_avg", "exp_avg_sq"):
                    state[moment] = torch.cat([state[moment][keep], torch.zeros_like(extra[name])])
                optimizer.state[new] = state
            self.values[name] = new
        self.gradient = torch.zeros(len(self), device=keep.device)
        self.seen = torch.zeros(len(self), device=keep.device)

    # -- the .ply of the 2DGS ecosystem --------------------------------------------------------------------------

    def save_ply(self, path: Path) -> None:
        """Binary .ply of the 2DGS ecosystem (utils/export.py)."""
        write_surfels(path, self.surfels)

    @classmethod
    def load_ply(cls, path: Path, embedding: int = 0) -> GaussianModel:
        """Read what `save_ply` wrote; embeddings, which no .ply carries, are zero.

        Raises UserError naming the file if it is absent, truncated or something else.
        """
        try:
            vertices = PlyData.read(path)["vertex"].data
            rest = sorted((n for n in vertices.dtype.names if n.startswith("f_rest_")), key=lambda n: int(n[7:]))

            def columns(names):
                return torch.from_numpy(np.stack([vertices[n].astype(np.float32) for n in names], 1))

            model = cls(round((len(rest) / 3 + 1) ** 0.5) - 1, len(vertices), embedding)
            loaded = {
                "xyz": columns("xyz"),
                "features_dc": columns([f"f_dc_{i}" for i in range(3)])[:, None],
                "opacity": columns(["opacity"]),
                "scaling": columns(["scale_0", "scale_1"]),
                "rotation": columns([f"rot_{i}" for i in range(4)]),
            }
            if rest:
                loaded["features_rest"] = columns(rest).unflatten(1, (3, -1)).transpose(1, 2)
            with torch.no_grad():
                for name, value in loaded.items():
                    model.values[name].copy_(value)
        except FileNotFoundError:
            raise UserError(f"{path} does not exist; train a model first (python train.py -s data/...)") from None
        except (ValueError, KeyError, RuntimeError, OSError, EOFError, PlyParseError) as error:
            raise UserError(f"{path} is damaged or no surfel cloud ({error}); train again or choose another --iteration") from None
        return model
