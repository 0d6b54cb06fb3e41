"""The optimizer of a head: which setting gives each parameter its learning rate, and how far it falls within a stage."""

from __future__ import annotations

import argparse

from diff_surfel_rasterization import Adam

from scene import TalkingHead

# parameter -> (setting that holds its learning rate, factor, final / initial rate within a stage)
SURFEL_RATES = {
    "xyz": ("xyz_lr", 1.0, 0.01), "features_dc": ("feature_lr", 1.0, 1.0), "features_rest": ("feature_lr", 0.05, 1.0),
    "opacity": ("opacity_lr", 1.0, 1.0), "scaling": ("scaling_lr", 1.0, 1.0), "rotation": ("rotation_lr", 1.0, 1.0),
    "embedding": ("embedding_lr", 1.0, 0.1),
}  # fmt: skip


def create_optimizer(head: TalkingHead, config: argparse.Namespace) -> Adam:
    """One Adam over everything; each group knows its first learning rate and how far it falls within a stage."""
    planes = [] if head.deformation.tri_plane is None else list(head.deformation.tri_plane.parameters())
    known = {id(p) for p in planes}
    networks = [p for p in head.deformation.parameters() if id(p) not in known]
    groups = [
        {"name": name, "params": [head.gaussians.values[name]], "initial": getattr(config, rate) * factor, "final": final}
        for name, (rate, factor, final) in SURFEL_RATES.items() if name in head.gaussians.values
    ]
    groups += [{"name": "planes", "params": planes, "initial": config.plane_lr, "final": 0.1}] * bool(planes)
    groups.append({"name": "networks", "params": networks, "initial": config.network_lr, "final": 0.1})
    groups += [
        {"name": name, "params": [value], "initial": getattr(config, f"{name}_lr"), "final": 0.1}
        for name, value in head.corrections.named_parameters()
    ]
    return Adam(groups)
