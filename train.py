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

import numpy as np
import torch

import arguments
from gaussian_renderer import Rendering, render_surfels
from scene import Scene, TalkingHead, embedding_width
from scene.condition import Conditions
from scene.dataset import Batch, TrainingSet
from scene.gaussian_model import GaussianModel
from scene.initial_points import read_face
from scene.schedule import Schedule
from utils import memory
from utils.captured import Captured, side_stream
from utils.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from utils.device import keep_freed_memory
from utils.distributed import Team
from utils.errors import UserError, command_line
from utils.losses import image_losses
from utils.optimizer import create_optimizer
from utils.perceptual import perceptual_loss
from utils.priors import AttentionRegions, Neighbours, surfel_losses
from utils.training_log import TrainingLog
from utils.watch import Watch

HELD_OUT = 4  # held-out frames drawn at every checkpoint


class Trainer:
    """Everything a step needs. `iteration` counts finished steps over both stages."""

    def __init__(self, config: argparse.Namespace):
        self.config, self.team = config, Team(config.device)
        self.device = self.team.device
        # the static stage needs fewer frames a step: all of them show the same head
        self.batch_sizes = {"coarse": max(1, config.batch_size // 4), "fine": config.batch_size}
        self.team.check_batch(*self.batch_sizes.values())
        self.scene = Scene(config)
        reader = self.scene.reader
        few = reader.splits["val"][:: -(-len(reader.splits["val"]) // HELD_OUT) or 1]
        self.data = TrainingSet(reader, reader.splits["train"], config.part, self.device)
        w, share = self.data.window, config.batch_size // self.team.size
        if memory.plan(config, share, w.width * w.height, self.data.bytes, self.device, self.team.leader):
            self.data.hold()
        self.held_out = TrainingSet(reader, few, config.part, self.device, w).hold() if few else None
        precision = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        perceptual = perceptual_loss(config.perceptual_net, precision) if config.lambda_perceptual else None
        self.perceptual = perceptual and perceptual.to(self.device)
        self.regions, self.neighbours = AttentionRegions(read_face(reader).points.numpy()), Neighbours()
        self.aux = ("depth", "normal") * bool(config.lambda_normal) + ("distortion",) * bool(config.lambda_distortion)
        halves = (self.step,) if self.team.size == 1 else (self.learn, self.update)
        self.captured = Captured(self.device, *halves, between=self.average)
        self.generator = torch.cuda.default_generators[self.device.index] if self.device.type == "cuda" else torch.default_generator
        torch.manual_seed(config.seed)
        checkpoint = latest_checkpoint(self.scene.model_path)
        if checkpoint is None:
            self.head = self.scene.create_head(write=self.team.leader).to(self.device)
            self.optimizer = create_optimizer(self.head, config)
            self.iteration = 0
            self.team.wait()  # nobody looks for a checkpoint after the first one was written
        else:
            self.resume(checkpoint)

    def resume(self, path: Path) -> None:
        """Continue exactly where the checkpoint was written; what shapes the model or its data must be the same. Other settings
        may change, and count from here on: batches are then those of a run that had them from the start."""
        state = load_checkpoint(path)
        refused, allowed = arguments.changes(arguments.read_cfg_args(self.scene.model_path), self.config)
        if refused:
            raise UserError(f"{self.scene.model_path} was trained with other settings ({', '.join(refused)}); "
                            "choose a new --model_path, or delete that folder to start again")  # fmt: skip
        if allowed and self.team.leader:
            print(f"going on from iteration {state['iteration']} with other settings: {', '.join(allowed)}", flush=True)
        count = len(state["head"]["gaussians.gradient"])
        self.head = TalkingHead(self.config, GaussianModel(self.config.sh_degree, count, embedding_width(self.config)))
        self.head.load_state_dict(state["head"])
        self.head.to(self.device)
        self.optimizer = create_optimizer(self.head, self.config)
        for saved, now in zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True):
            saved["initial"] = now["initial"]  # moments are the checkpoint's, learning rates those of the settings
        self.optimizer.load_state_dict(state["optimizer"])
        self.head.gaussians.keep_most_opaque(self.optimizer, self.config.max_points)
        self.iteration = self.head.iteration = state["iteration"]
        self.team.wait()
        if self.team.leader:
            arguments.write_cfg_args(self.scene.model_path, self.config)
        else:
            self.head.gaussians.gradient.zero_()  # the leader has the sums of all
            self.head.gaussians.seen.zero_()

    def enter(self, stage: str) -> None:
        """Begin a stage, or go on within it."""
        c = self.config
        first, end = {"coarse": (0, c.coarse_iterations), "fine": (c.coarse_iterations, c.iterations)}[stage]
        if stage == "fine" and self.iteration == first:
            self.head.bake()
            self.optimizer = create_optimizer(self.head, c)
        self.stage = stage
        weights = self.data.weights(c.lip_sampling, c.blink_share) if stage == "fine" else np.ones(len(self.data))
        self.schedule = Schedule(c, first, end, self.batch_sizes[stage], weights, self.optimizer, self.team)
        self.schedule.at(self.iteration)
        self.watch: Watch | None = None
        self.captured.forget()

    def draw(self, conditions: Conditions, attention: bool = False) -> Rendering:
        surfels = self.head.canonical() if self.stage == "coarse" else self.head(conditions)
        w = self.data.window
        drawn = render_surfels(surfels, conditions, w.width, w.height, attention and surfels.attention is not None, self.aux)
        if self.head.training:
            drawn.rgb = self.head.corrections.exposed(drawn.rgb, drawn.alpha, conditions.frame)
        return drawn

    def losses(self, batch: Batch, drawn: Rendering) -> dict[str, torch.Tensor]:
        perceptual = self.perceptual if self.iteration >= self.config.perceptual_from else None
        terms = image_losses(self.config, drawn, batch, self.schedule.plain, perceptual)
        terms |= surfel_losses(self.config, self.head.gaussians.surfels, drawn.surfels, self.neighbours)
        terms |= self.head.corrections.losses(self.config)
        attention = drawn.surfels.attention
        if attention is not None and self.config.lambda_attention:
            unwanted = self.regions.loss(attention, self.head.token_names, self.head.gaussians.values["xyz"])
            terms["attention"] = self.config.lambda_attention * self.schedule.ramp * unwanted
        return terms

    def step(self) -> None:
        """One optimisation step on the batch the schedule stands at. Nothing in it waits for the device or asks the host, so
        that a GPU can replay it as a graph; what it leaves in `terms` and `drawn` is read every log_interval steps."""
        self.learn()
        self.average()
        self.update()

    def learn(self) -> None:
        """The losses of our frames and their gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.set_rates()
        self.batch = self.data.batch(self.schedule.rows)
        drawn = self.draw(self.batch.conditions)
        terms = self.losses(self.batch, drawn)
        sum(terms.values()).backward()
        if self.iteration < self.config.densify_until:
            self.head.gaussians.observe(drawn.maps.screen_grad / self.team.size, drawn.maps.radii)
        self.terms, self.drawn = {name: value.detach() for name, value in terms.items()}, drawn.rgb.detach()

    def average(self) -> None:
        """Make gradients and losses those of the whole batch."""
        self.team.average([*self.gradients(), *self.terms.values()])

    def update(self) -> None:
        """Step along the gradients, unless one is no number."""
        if self.watch is None:
            self.watch = Watch((*self.terms, "gradient"), self.device)
            self.optimizer.found_inf = self.watch.bad  # the fused kernel then leaves weights and moments as they are
        norm = torch.stack(torch._foreach_norm(self.gradients())).sum()
        self.watch.look(self.schedule.row, torch.stack([*self.terms.values(), norm]))
        self.optimizer.step()
        self.schedule.advance()

    def optimized(self) -> list[torch.nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self.optimized() if p.grad is not None]

    def advance(self) -> None:
        """A step and what follows from its number; all randomness comes from seed and iteration, so a resumed run is exact."""
        c, k, gaussians = self.config, self.iteration, self.head.gaussians
        self.generator.manual_seed(c.seed * 1_000_003 + k)
        self.captured()
        self.iteration = self.head.iteration = k + 1
        if c.densify_from <= k < c.densify_until and (k + 1) % c.densify_interval == 0:
            statistics = (gaussians.gradient, gaussians.seen)
            self.team.gather(statistics)
            self.team.share_out(statistics)
            self.optimizer.zero_grad(set_to_none=True)
            generator = torch.Generator().manual_seed(c.seed + k)
            gaussians.densify_and_prune(self.optimizer, c.densify_fraction, c.min_opacity, c.max_points, generator, k + 1)
            self.captured.forget()
        elif k + 1 == c.densify_until:
            self.captured.forget()
        if k + 1 == c.perceptual_from:
            self.check()
            self.captured.forget()
            self.watch = None  # there are more terms to look at

    def fit(self) -> None:
        """Train to the last iteration, with checkpoints on the way; the result is saved for render.py."""
        c, path = self.config, self.scene.model_path
        log = TrainingLog(path, self.iteration, c.iterations) if self.team.leader else None
        with side_stream(self.device):
            for stage, end in (("coarse", min(c.coarse_iterations, c.iterations)), ("fine", c.iterations)):
                if self.iteration >= end:
                    continue
                self.enter(stage)
                for _ in self.data.fed(self.schedule.our_rows, self.schedule.first, self.iteration, end):
                    self.advance()
                    if self.iteration % c.log_interval == 0:
                        self.report(log)
                    if self.iteration % c.checkpoint_interval == 0 or self.iteration == c.iterations:
                        self.save(log)
                    if log:
                        log.step()
        if log:
            log.close()
            if self.iteration <= c.coarse_iterations:
                self.head.bake()  # the fine stage has not: without its decoder the saved head would be another one
            self.head.save(path)
            print(f"saved {path} at iteration {self.iteration}; next: "
                  f"python render.py --model_path {path} --custom_aud speech.wav")  # fmt: skip

    def check(self) -> None:
        """Raises UserError if a loss or the gradient has become NaN or infinite since the stage began."""
        if self.watch is not None:
            rows = self.schedule.all_rows
            self.watch.check(self.schedule.first, lambda k: [self.data.ids[i] for i in rows[k].tolist()], self.scene.model_path)

    @torch.no_grad()
    def report(self, log: TrainingLog | None) -> None:
        """The numbers of the last step."""
        self.check()
        if log:
            log.scalars(self.stage, self.iteration, self.terms, self.batch, self.drawn, len(self.head.gaussians), self.optimizer)

    @torch.no_grad()
    def save(self, log: TrainingLog | None) -> None:
        """Write a checkpoint, and draw the held-out frames."""
        self.check()
        self.regions.renew()  # a run resumed here works them out here as well
        self.neighbours.renew()
        self.team.gather((self.head.gaussians.gradient, self.head.gaussians.seen))
        if not log:
            return
        log.flush()
        save_checkpoint(self.scene.model_path, self.head, self.optimizer)
        if self.held_out is None:
            return
        self.head.eval()
        batch = self.held_out.batch(torch.arange(len(self.held_out), device=self.device))
        drawn = self.draw(batch.conditions, attention=True)
        self.head.train()
        log.held_out(self.stage, self.iteration, batch, drawn, self.head.token_names)


@command_line(resumes=True)
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_arguments(parser)
    config = arguments.merge(parser.parse_args(argv))
    if not config.source_path:
        raise UserError("give the data set to learn from: python train.py -s data/<name>")
    keep_freed_memory()
    with memory.one_sentence_when_full("training"):
        trainer = Trainer(config)
        trainer.fit()
    trainer.team.leave()


if __name__ == "__main__":
    main()
