"""What a training run says of itself: the progress bar, and TensorBoard in the model folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from gaussian_renderer import Rendering
from scene.dataset import Batch
from utils.image_metrics import psnr
from utils.progress import progress


class TrainingLog:
    """Scalars under the names of the 2DGS family; pictures of held-out frames."""

    def __init__(self, model_path: Path, iteration: int, iterations: int):
        self._writer = SummaryWriter(model_path, purge_step=iteration + 1)  # what a killed run logged beyond its checkpoint
        self._bar = progress(label="training", total=iterations, initial=iteration, unit="step")

    def step(self) -> None:
        self._bar.update()

    def scalars(self, stage: str, iteration: int, losses: dict[str, Tensor], batch: Batch, rgb: Tensor, points: int,
                optimizer: torch.optim.Optimizer) -> None:  # fmt: skip
        """Losses of a step, PSNR (dB) of what was drawn (B, 3, H, W, over black), number of surfels, learning rates."""
        values = {name: float(value) for name, value in losses.items()}
        for name, value in {**values, "total_loss": sum(values.values())}.items():
            self._writer.add_scalar(f"{stage}/train_loss_patches/{name}", value, iteration)
        for group in optimizer.param_groups:
            self._writer.add_scalar(f"{stage}/learning_rate/{group['name']}", float(group["lr"]), iteration)
        quality = self._quality(batch, rgb)
        self._writer.add_scalar(f"{stage}/head_psnr", quality, iteration)
        self._writer.add_scalar(f"{stage}/total_points", points, iteration)
        self._bar.set_postfix_str(f"{stage} {quality:.1f} dB, {points} surfels", refresh=False)

    def held_out(self, stage: str, iteration: int, batch: Batch, drawn: Rendering, tokens: tuple[str, ...]) -> None:
        """PSNR (dB) of held-out frames, and their pictures: filmed, drawn, and where surfels attend to each token."""
        self._writer.add_scalar(f"{stage}/held_out_psnr", self._quality(batch, drawn.rgb), iteration)
        pictures = {"truth": batch.image / 255.0 * batch.mask, "render": drawn.rgb}
        if drawn.attention is not None:
            pictures |= {f"attention_{name}": drawn.attention[:, k : k + 1] for k, name in enumerate(tokens)}
        for name, images in pictures.items():
            self._writer.add_images(f"held_out/{name}", images.clamp(0, 1).cpu(), iteration)

    def _quality(self, batch: Batch, rgb: Tensor) -> float:
        mask = batch.mask.float()
        return float(psnr(rgb, batch.image / 255.0 * mask, mask).mean())

    def flush(self) -> None:
        """Write what was logged so far: a checkpoint says that these steps are done, and none of them is logged again."""
        self._writer.flush()

    def close(self) -> None:
        self._bar.close()
        self._writer.close()
