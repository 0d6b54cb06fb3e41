"""The head and the folder it lives in.

`TalkingHead` is the avatar: canonical surfels (gaussian_model.py) and the deformation that animates them (deformation.py).
`Scene` ties a data set (talking_dataset_readers.py) to the model folder that train.py writes; `load_avatar` reads one back.
"""

from __future__ import annotations

import argparse
import re
import struct
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from arguments import read_cfg_args, write_cfg_args
from scene.cameras import camera_json
from scene.condition import Conditions
from scene.corrections import FrameCorrections
from scene.deformation import Deformation, Surfels, feature_width
from scene.gaussian_model import GaussianModel
from scene.inference import FrozenDeformation
from scene.initial_points import initial_points
from scene.talking_dataset_readers import TalkingDatasetReader
from utils.errors import UserError
from utils.files import atomic_path, write_json
from utils.ply import write_mesh

SPAN_POINTS = 2_000  # points on the silhouettes that show how far the modelled part reaches


def embedding_width(config: argparse.Namespace) -> int:
    """Width of the vector each surfel carries; 0 where the tri-plane alone describes it."""
    return 0 if config.surfel_features == "plane" else feature_width(config)


class TalkingHead(nn.Module):
    """Canonical surfels and the network that deforms them: conditions of B frames -> (B, N, ...) surfels."""

    def __init__(self, config: argparse.Namespace, gaussians: GaussianModel):
        super().__init__()
        self.config = config
        self.iteration = 0
        self.gaussians = gaussians
        self.deformation = Deformation(config, config.audio_features)
        self.corrections = FrameCorrections(getattr(config, "frames", 0), config.pose_lr > 0, config.exposure_lr > 0)
        self._frozen: FrozenDeformation | None = None

    @property
    def token_names(self) -> tuple[str, ...]:
        return self.deformation.token_names

    def canonical(self) -> Surfels:
        """The static head of the coarse stage."""
        return self.deformation.canonical(self.gaussians.surfels)

    def forward(self, conditions: Conditions) -> Surfels:
        if self._frozen is not None:
            return self._frozen(conditions)
        surfels = self.deformation(self.gaussians.surfels, conditions)
        return self.corrections.posed(surfels, conditions.frame) if self.training else surfels

    @torch.no_grad()
    def bake(self) -> None:
        """End of the coarse stage: write what the decoder reads from the features into the surfels."""
        surfels = self.canonical()
        values = self.gaussians.values
        values["opacity"].copy_(surfels.opacity)
        values["features_dc"].copy_(surfels.sh[:, :1])
        values["features_rest"].copy_(surfels.sh[:, 1:])

    def freeze(self) -> TalkingHead:
        """For rendering: no gradients, and what no frame changes is worked out once (scene/inference.py)."""
        self.eval().requires_grad_(False)
        self._frozen = FrozenDeformation(self.deformation, self.gaussians.surfels)
        return self

    def save(self, model_path: Path) -> None:
        """Write point_cloud/iteration_N/{point_cloud.ply, deformation.safetensors}."""
        folder = Path(model_path) / "point_cloud" / f"iteration_{self.iteration}"
        self.gaussians.save_ply(folder / "point_cloud.ply")
        weights = dict(self.deformation.state_dict())
        if "embedding" in self.gaussians.values:
            weights["embedding"] = self.gaussians.values["embedding"]
        weights = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        with atomic_path(folder / "deformation.safetensors") as temporary:
            safetensors.torch.save_file(weights, temporary)


class Scene:
    """A data set and the model folder being trained from it."""

    def __init__(self, config: argparse.Namespace):
        """Read the data set. Fills in what `config` leaves open: model_path, audio_encoder, audio_features, frames."""
        self.reader = TalkingDatasetReader(config.source_path, config.audio_encoder)
        config.source_path = str(Path(config.source_path).resolve())
        config.model_path = config.model_path or str(Path("model") / Path(config.source_path).name)
        config.audio_encoder, config.audio_features = self.reader.encoder, self.reader.audio.shape[1]
        config.frames = self.reader.ids[-1] + 1
        self.config, self.model_path = config, Path(config.model_path)

    def create_head(self, write: bool = True) -> TalkingHead:
        """A head at iteration 0: surfels on the fitted face and the seeds, statistics of the clip in the token encoders.

        With `write` the model folder gets what viewers want to see: cfg_args, cameras.json, input.ply.
        """
        c = self.config
        cloud = initial_points(self.reader, c.part, c.seed_points, c.seed)
        # the tri-plane spans what is modelled, hair and body too, however few of the surfels begin there
        span = (cloud if c.seed_points >= SPAN_POINTS else initial_points(self.reader, c.part, SPAN_POINTS, c.seed)).points
        if len(cloud.points) > c.max_points:
            keep = torch.randperm(len(cloud.points), generator=torch.Generator().manual_seed(c.seed))
            for name in ("points", "normals", "colours"):
                setattr(cloud, name, getattr(cloud, name)[keep[: c.max_points]])
        surfels = GaussianModel.from_points(cloud, c.sh_degree, embedding_width(c))
        head = TalkingHead(c, surfels)
        if head.deformation.tri_plane is not None:
            head.deformation.tri_plane.set_box(span)
        head.deformation.conditions.fit(self.reader.conditions(self.reader.splits["train"]))
        if not write:
            return head
        r = self.reader
        write_mesh(self.model_path / "input.ply", cloud.points.numpy(), cloud.normals.numpy(), cloud.colours.numpy())
        cameras = [camera_json(k, f"{i}", r.views[i], r.focal, r.width, r.height) for k, i in enumerate(r.ids)]
        write_json(self.model_path / "cameras.json", cameras)
        write_cfg_args(self.model_path, c)
        return head


def saved_iterations(model_path: Path) -> list[int]:
    """Iterations under <model>/point_cloud that were written completely, ascending."""
    found = []
    for folder in (Path(model_path) / "point_cloud").glob("iteration_*"):
        match = re.fullmatch(r"iteration_(\d+)", folder.name)
        if match and (folder / "deformation.safetensors").exists():
            found.append(int(match[1]))
    return sorted(found)


def load_avatar(model_path: Path | str, iteration: int | None = None, device: torch.device | str = "cpu") -> TalkingHead:
    """Read a trained head, ready to render; `iteration` None is the latest.

    Raises UserError if the folder holds no model or a file of it is damaged.
    """
    config = read_cfg_args(model_path)
    found = saved_iterations(Path(model_path))
    if not found or (iteration is not None and iteration not in found):
        wanted = "trained head" if iteration is None else f"iteration {iteration}"
        have = f"choose one of {', '.join(map(str, found))}" if found else "run train.py first"
        raise UserError(f"{model_path} holds no {wanted}; {have}")
    iteration = found[-1] if iteration is None else iteration
    folder = Path(model_path) / "point_cloud" / f"iteration_{iteration}"
    head = TalkingHead(config, GaussianModel.load_ply(folder / "point_cloud.ply", embedding_width(config)))
    path = folder / "deformation.safetensors"
    try:
        weights = safetensors.torch.load_file(path)
        if embedding_width(config):
            head.gaussians.load_state_dict({"values.embedding": weights.pop("embedding")}, strict=False)
        head.deformation.load_state_dict(weights)
    except (SafetensorError, RuntimeError, KeyError, struct.error) as error:
        raise UserError(f"{path} is damaged or of another version ({str(error).splitlines()[0]}); "
                        "train again or choose another --iteration") from None  # fmt: skip
    head.iteration = iteration
    return head.to(device).freeze()
