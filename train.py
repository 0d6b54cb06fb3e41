"""Train a talking head: data set folder -> model folder.

    python train.py -s data/x                                    # writes model/x, continues it if it was interrupted
    python train.py -s data/x --configs arguments/fast.py        # for machines without a GPU
    python train.py -s data/x --part all --max_points 70000 --batch_size 16 --model_path model/y

Two stages. Coarse: a static head; surfels start on the fitted face, grow where the picture pulls, and the tri-plane learns
space. Fine: speech, expression, camera and frame code deform every surfel through the attention. Order of settings:
defaults < --configs < command line (python train.py --help lists them).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

import arguments
from gaussian_renderer import Rendering, render_surfels
from scene import Scene, TalkingHead, embedding_width
from scene.dataset import Batch, TrainingSet
from scene.gaussian_model import GaussianModel
from scene.initial_points import read_face
from utils.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from utils.device import choose_device, keep_freed_memory
from utils.errors import UserError, command_line
from utils.image_metrics import psnr
from utils.losses import image_losses
from utils.perceptual import PerceptualLoss
from utils.priors import AttentionRegions, Neighbours, surfel_losses
from utils.progress import progress

# parameter -> (setting that holds its learning rate, factor, final / initial rate within a stage)
SURFEL_RATES = {
    "xyz": ("xyz_lr", 1.0, 0.01), "features_dc": ("feature_lr", 1.0, 1.0), "features_rest": ("feature_lr", 0.05, 1.0),
    "opacity": ("opacity_lr", 1.0, 1.0), "scaling": ("scaling_lr", 1.0, 1.0), "rotation": ("rotation_lr", 1.0, 1.0),
    "embedding": ("embedding_lr", 1.0, 0.1),
}  # fmt: skip


def create_optimizer(head: TalkingHead, config: argparse.Namespace) -> torch.optim.Adam:
    """One Adam over everything; each group knows its first learning rate and how far it falls within a stage."""
    planes = [] if head.deformation.tri_plane is None else list(head.deformation.tri_plane.parameters())
    known = {id(p) for p in planes}
    networks = [p for p in head.deformation.parameters() if id(p) not in known]
    groups = [
        {"params": [head.gaussians.values[name]], "initial": getattr(config, rate) * factor, "final": final}
        for name, (rate, factor, final) in SURFEL_RATES.items() if name in head.gaussians.values
    ]
    groups += [{"params": planes, "initial": config.plane_lr, "final": 0.1}] * bool(planes)
    groups.append({"params": networks, "initial": config.network_lr, "final": 0.1})
    return torch.optim.Adam(groups, lr=0.0, eps=1e-15)


def set_learning_rates(optimizer: torch.optim.Optimizer, progress_in_stage: float) -> None:
    """Log-linear decay from `initial` to `initial * final` over the stage (0 to 1)."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial"] * group["final"] ** progress_in_stage


class Trainer:
    """Everything a step needs. `iteration` counts finished steps over both stages."""

    def __init__(self, config: argparse.Namespace):
        self.config = config
        self.device = choose_device(config.device)
        self.scene = Scene(config)
        train_ids = self.scene.reader.splits["train"]
        # the static stage needs fewer frames a step: all of them show the same head
        self.coarse_data = TrainingSet(self.scene.reader, train_ids, config.part, max(1, config.batch_size // 4), config.seed)
        self.fine_data = TrainingSet(self.scene.reader, train_ids, config.part, config.batch_size, config.seed + 1)
        self.perceptual = PerceptualLoss("alex").to(self.device) if config.lambda_perceptual else None
        face = read_face(self.scene.reader)
        self.regions, self.neighbours = AttentionRegions(face.points.numpy()), Neighbours()
        self.aux = ("depth", "normal") * bool(config.lambda_normal) + ("distortion",) * bool(config.lambda_distortion)
        checkpoint = latest_checkpoint(self.scene.model_path)
        torch.manual_seed(config.seed)
        if checkpoint is None:
            self.head = self.scene.create_head().to(self.device)
            self.optimizer = create_optimizer(self.head, config)
            self.iteration = 0
        else:
            self.resume(checkpoint)

    def resume(self, path: Path) -> None:
        """Continue exactly where the checkpoint was written; settings that shape the model must be the same."""
        state = load_checkpoint(path)
        saved = arguments.read_cfg_args(self.scene.model_path)
        free = {"device", "checkpoint_interval", "log_interval", "model_path", "source_path", "iterations"}
        changed = [k for k, v in vars(self.config).items() if k not in free and getattr(saved, k, v) != v]
        if changed:
            raise UserError(f"{self.scene.model_path} was trained with another {', '.join(changed)}; "
                            "choose a new --model_path, or delete that folder to start again")  # fmt: skip
        count = len(state["head"]["gaussians.gradient"])
        self.head = TalkingHead(self.config, GaussianModel(self.config.sh_degree, count, embedding_width(self.config)))
        self.head.load_state_dict(state["head"])
        self.head.to(self.device)
        self.optimizer = create_optimizer(self.head, self.config)
        self.optimizer.load_state_dict(state["optimizer"])
        self.iteration = self.head.iteration = state["iteration"]
        arguments.write_cfg_args(self.scene.model_path, self.config)

    # -- one step ------------------------------------------------------------------------------------------------

    def draw(self, batch: Batch, coarse: bool) -> Rendering:
        conditions = batch.conditions.to(self.device)
        surfels = self.head.canonical() if coarse else self.head(conditions)
        return render_surfels(surfels, conditions, batch.image.shape[-1], batch.image.shape[-2], aux=self.aux)

    def losses(self, batch: Batch, drawn: Rendering) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.config.seed + self.iteration)
        terms = image_losses(self.config, drawn, batch, self.perceptual, generator)
        terms |= surfel_losses(self.config, self.head.gaussians.surfels, drawn.surfels, self.neighbours)
        attention = drawn.surfels.attention
        if attention is not None and self.config.lambda_attention:
            ramp = self.iteration / self.config.iterations
            xyz = self.head.gaussians.values["xyz"]
            unwanted = self.regions.loss(attention, self.head.token_names, xyz)
            terms["attention"] = self.config.lambda_attention * ramp * unwanted
        if not torch.isfinite(sum(terms.values())):
            name, value = next((n, v) for n, v in terms.items() if not torch.isfinite(v))
            raise UserError(f"the {name} loss is {float(value)} at iteration {self.iteration}, frames {batch.ids}; the last "
                            f"checkpoint in {self.scene.model_path} is intact: lower the learning rates and resume")  # fmt: skip
        return terms

    def step(self, batch: Batch) -> tuple[dict[str, torch.Tensor], Rendering]:
        """One optimisation step on one batch; all randomness follows from seed and iteration, so a resumed run is exact."""
        c, k = self.config, self.iteration
        coarse = k < c.coarse_iterations
        torch.manual_seed(c.seed * 1_000_003 + k)
        first, length = (0, c.coarse_iterations) if coarse else (c.coarse_iterations, c.iterations - c.coarse_iterations)
        set_learning_rates(self.optimizer, (k - first) / max(length, 1))
        if k == c.coarse_iterations:
            self.head.bake()
            self.optimizer = create_optimizer(self.head, c)
            set_learning_rates(self.optimizer, 0.0)
        drawn = self.draw(batch, coarse)
        terms = self.losses(batch, drawn)
        sum(terms.values()).backward()
        growing = k < c.densify_until
        if growing:
            self.head.gaussians.observe(drawn.maps.screen_grad, drawn.maps.radii)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.iteration = self.head.iteration = k + 1
        if growing and c.densify_from <= k and (k + 1) % c.densify_interval == 0:
            generator = torch.Generator().manual_seed(c.seed + k)
            self.head.gaussians.densify_and_prune(self.optimizer, c.densify_fraction, c.min_opacity, c.max_points, generator)
        return terms, drawn

    # -- the loop ------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train to the last iteration, with checkpoints on the way; the result is saved for render.py."""
        c = self.config
        log = SummaryWriter(self.scene.model_path, purge_step=self.iteration)
        bar = progress(label="training", total=c.iterations, initial=self.iteration, unit="step")
        for data, end in ((self.coarse_data, min(c.coarse_iterations, c.iterations)), (self.fine_data, c.iterations)):
            for batch in data.batches(self.iteration, end):
                terms, drawn = self.step(batch)
                if self.iteration % c.log_interval == 0:
                    self.report(log, bar, terms, batch, drawn)
                if self.iteration % c.checkpoint_interval == 0:
                    save_checkpoint(self.scene.model_path, self.head, self.optimizer)
                bar.update()
        bar.close()
        log.close()
        self.head.save(self.scene.model_path)
        save_checkpoint(self.scene.model_path, self.head, self.optimizer)
        print(f"saved {self.scene.model_path} at iteration {self.iteration}; next: "
              f"python render.py --model_path {self.scene.model_path} --custom_aud speech.wav")  # fmt: skip

    @torch.no_grad()
    def report(self, log: SummaryWriter, bar, terms: dict, batch: Batch, drawn: Rendering) -> None:
        """TensorBoard scalars under the names of the 2DGS family, and the head's PSNR on the bar."""
        stage = "coarse" if self.iteration <= self.config.coarse_iterations else "fine"
        mask = batch.mask.to(self.device)
        quality = psnr(drawn.rgb, batch.image.to(self.device) / 255.0 * mask, mask).mean()
        for name, value in {**terms, "total_loss": sum(terms.values())}.items():
            log.add_scalar(f"{stage}/train_loss_patches/{name}", float(value), self.iteration)
        log.add_scalar(f"{stage}/head_psnr", float(quality), self.iteration)
        log.add_scalar(f"{stage}/total_points", len(self.head.gaussians), self.iteration)
        bar.set_postfix_str(f"{stage} {float(quality):.1f} dB, {len(self.head.gaussians)} surfels", refresh=False)


@command_line
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_arguments(parser)
    config = arguments.merge(parser.parse_args(argv))
    if not config.source_path:
        raise UserError("give the data set to learn from: python train.py -s data/<name>")
    keep_freed_memory()
    Trainer(config).fit()


if __name__ == "__main__":
    main()
