"""What a training run says of itself: the progress bar, and TensorBoard in the model folder."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from utils.progress import progress


class TrainingLog:
    """Scalars under the names of the 2DGS family; pictures of held-out frames."""

    def __init__(self, model_path: Path, iteration: int, iterations: int):
        self._writer = SummaryWriter(model_path, purge_step=iteration)
        self._bar = progress(label="training", total=iterations, initial=iteration, unit="step")

    def step(self) -> None:
        self._bar.update()

    def scalars(self, stage: str, iteration: int, losses: dict[str, float], psnr: float, points: int,
                rates: dict[str, float]) -> None:  # fmt: skip
        """Losses and PSNR (dB) of a batch, number of surfels, learning rates."""
        for name, value in {**losses, "total_loss": sum(losses.values())}.items():
            self._writer.add_scalar(f"{stage}/train_loss_patches/{name}", value, iteration)
        for name, value in rates.items():
            self._writer.add_scalar(f"{stage}/learning_rate/{name}", value, iteration)
        self._writer.add_scalar(f"{stage}/head_psnr", psnr, iteration)
        self._writer.add_scalar(f"{stage}/total_points", points, iteration)
        self._bar.set_postfix_str(f"{stage} {psnr:.1f} dB, {points} surfels", refresh=False)

    def held_out(self, stage: str, iteration: int, psnr: float, pictures: dict[str, Tensor]) -> None:
        """PSNR (dB) of held-out frames, and pictures (B, 3 or 1, H, W) in [0, 1] by name."""
        self._writer.add_scalar(f"{stage}/held_out_psnr", psnr, iteration)
        for name, images in pictures.items():
            self._writer.add_images(f"held_out/{name}", images.clamp(0, 1).cpu(), iteration)

    def close(self) -> None:
        self._bar.close()
        self._writer.close()
