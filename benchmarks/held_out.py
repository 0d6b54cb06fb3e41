"""How good a trained head draws the held-out frames: metrics.py without its landmarks, so without mediapipe and PyAV too.

The head lies over the filmed torso and background, as with render.py --paste headless.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from gaussian_renderer import render_batch
from gaussian_renderer.compositing import composite, from_bytes
from gaussian_renderer.paste import Backdrops
from scene import load_avatar
from scene.dataset import TrainingSet, Window
from utils import model_store
from utils.constants import HEAD_CLASSES
from utils.image_metrics import psnr, ssim
from utils.losses import box_mask
from utils.perceptual import PerceptualLoss

SCORED = ("PSNR", "PSNR_head", "PSNR_lips")


class HeldOut:
    """The held-out frames as bytes on the device, and how good a head draws them: as metrics.py measures, less the landmarks.

    PSNR_plate is that of the full frame over the torso and the still background plate, PSNR_lips that of the lips' square.
    """

    def __init__(self, reader, part: str, device: torch.device):
        self.reader, self.device = reader, device
        self.ids, w, h = reader.splits["val"], reader.width, reader.height
        self.truth = np.stack([reader.image(i) for i in self.ids])
        self.behind, self.plate = (Backdrops(reader, part, paste).batch(self.ids) for paste in ("headless", "none"))
        self.head = np.stack([np.isin(reader.parsing(i), HEAD_CLASSES) for i in self.ids])
        self.lips = box_mask(TrainingSet(reader, self.ids, part, window=Window(0, 0, w, h)).lips, h, w)
        weights = model_store.find("stlpips_alex")
        self.perceptual = PerceptualLoss("alex", weights).to(device) if weights else None

    @torch.inference_mode()
    def measure(self, model: Path) -> dict[str, float]:
        head, rows = load_avatar(model, device=self.device), []
        for k, i in enumerate(self.ids):
            drawn = render_batch(head, self.reader.conditions([i]).to(self.device), self.reader.width, self.reader.height)
            truth, behind, plate = (
                from_bytes(torch.from_numpy(x[k : k + 1]).to(self.device)) for x in (self.truth, self.behind, self.plate)
            )
            picture, on_plate = (composite(drawn.rgb, drawn.alpha, x).clamp(0, 1) for x in (behind, plate))
            mask = torch.from_numpy(self.head[k])[None, None].to(self.device).float()
            lips = self.lips[k : k + 1].to(self.device).float()
            row = [psnr(picture, truth), psnr(picture, truth, mask), psnr(picture, truth, lips), psnr(on_plate, truth)]
            row += [ssim(picture, truth)] + ([self.perceptual(picture, truth)] if self.perceptual else [])
            rows.append(torch.stack(row).flatten())
        means = torch.stack(rows).mean(0).tolist()
        return dict(zip((*SCORED, "PSNR_plate", "SSIM", "STLPIPS_alex"), means, strict=False))
