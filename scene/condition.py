"""What drives the head in one frame, and the tokens the attention reads it through (lineage.md 3.3, 4.3, 6.1)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from utils.distributed import batch_kept, batch_noise

AUDIO_WINDOW = 16  # rows i-8 .. i+7 of the audio features go with frame i; a model hears its middle `audio_window` of them


@dataclasses.dataclass
class Conditions:
    """The driving signals of B frames."""

    audio: Tensor  # (B, 16, D) rows of the speech encoder around each frame
    expression: Tensor  # (B, 7) upper-face blendshapes
    view: Tensor  # (B, 4, 4) world to camera, OpenCV axes, dm
    intrinsics: Tensor  # (B, 3, 3) pixels
    frame: Tensor  # (B,) frame ids of the video whose appearance is replayed

    def tensors(self) -> list[Tensor]:
        return [getattr(self, f.name) for f in dataclasses.fields(self)]

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditions:
        """The same with every tensor replaced by `function` of it."""
        return Conditions(*map(function, self.tensors()))

    def to(self, device: torch.device | str) -> Conditions:
        return self.map(lambda x: x.to(device))


class Standardise(nn.Module):
    """Subtract the mean and divide by the deviation of the training data; unseen values are bounded at 4 deviations.

    In training, `noise` deviations of Gaussian noise are added: exact values of audio, pose or expression name a frame of a
    short clip as well as its number would, and the network would learn the mouth by heart instead of from the sound.
    """

    def __init__(self, width: int, noise: float = 0.0):
        super().__init__()
        self.noise = noise
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    def fit(self, data: Tensor) -> None:
        """Take mean and deviation from (F, width) rows."""
        self.mean.copy_(data.mean(0))
        deviation = data.std(0)
        self.deviation.copy_(deviation.clamp_min(1e-4 + 0.05 * deviation.max()))  # no noise from columns that stand still

    def forward(self, x: Tensor) -> Tensor:
        x = ((x - self.mean) / self.deviation).clamp(-4.0, 4.0)
        return x + self.noise * batch_noise(x) if self.training and self.noise else x


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
        layers += [nn.Linear(a, b)] + ([nn.ReLU()] if i < len(widths) - 2 else [])
    return nn.Sequential(*layers)


class AudioToken(nn.Module):
    """Each row 512 -> 32, then a learned weighting of the `window` rows (SyncTalk's AudioNet_ave and AudioAttNet, batched)."""

    def __init__(self, features: int, d_model: int, noise: float, window: int):
        super().__init__()
        self.window = window
        self.standardise = Standardise(features, noise)
        self.rows = nn.Sequential(
            nn.Linear(features, 256), nn.LeakyReLU(0.02), nn.Linear(256, 128), nn.LeakyReLU(0.02), nn.Linear(128, 32)
        )
        convolutions: list[nn.Module] = []
        for a, b in ((32, 16), (16, 8), (8, 4), (4, 2), (2, 1)):
            convolutions += [nn.Conv1d(a, b, 3, padding=1), nn.LeakyReLU(0.02)]
        self.weights = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(window, window), nn.Softmax(-1))
        self.out = mlp(32, d_model, d_model)

    def forward(self, conditions: Conditions) -> Tensor:
        first = (conditions.audio.shape[1] - self.window) // 2
        rows = self.rows(self.standardise(conditions.audio[:, first : first + self.window]))  # (B, window, 32)
        weights = self.weights(rows.transpose(1, 2))  # (B, window)
        return self.out((weights[..., None] * rows).sum(1))


class ExpressionToken(nn.Module):
    """The upper-face blendshapes: brows and blinks."""

    def __init__(self, d_model: int, noise: float):
        super().__init__()
        self.standardise = Standardise(7, noise)
        self.out = mlp(7, d_model, d_model)

    def forward(self, conditions: Conditions) -> Tensor:
        return self.out(self.standardise(conditions.expression))


class CameraToken(nn.Module):
    """Rotation and translation of the view, for what moves with the pose: hair, shading, the neck."""

    def __init__(self, d_model: int, noise: float):
        super().__init__()
        self.standardise = Standardise(12, noise)
        self.out = mlp(12, d_model, d_model)

    def forward(self, conditions: Conditions) -> Tensor:
        return self.out(self.standardise(conditions.view[:, :3].flatten(1)))


class FrameToken(nn.Module):
    """A code of the frame index: appearance that no other signal explains.

    Waves whose shortest period is 64 frames, so that neighbours have close codes; beyond the last trained frame the code stays
    there, and `still` pins it to one frame (lineage.md 6.1). Or, with `frames` > 0, a learned code for each frame: what is that
    frame's alone, the error of its pose above all, is then learned apart from what pose and speech bring about. Other frames than
    the trained ones have the code zero, about which the learned ones lie, and all of them have it while `still` is set. In
    training too it takes the place of a share `dropout` of them: what sound and pose can explain is then learned from these.
    """

    def __init__(self, d_model: int, frames: int = 0, dropout: float = 0.0, bands: int = 6):
        super().__init__()
        self.dropout = dropout
        self.codes = nn.Parameter(torch.zeros(frames, 2 * bands)) if frames else None
        self.register_buffer("last", torch.tensor(0))  # highest frame id seen in training
        self.register_buffer("frequencies", 2 * math.pi / (64.0 * 2.0 ** torch.arange(bands)), persistent=False)
        self.out = mlp(2 * bands, d_model, d_model)
        self.still: int | None = None

    def forward(self, conditions: Conditions) -> Tensor:
        frame = torch.minimum(conditions.frame, self.last)
        if self.codes is not None:
            own = (conditions.frame <= self.last) & (self.still is None)
            if self.training and self.dropout:
                own = own & batch_kept(own, self.dropout)
            return self.out(self.codes[frame] * own[:, None])
        frame = frame if self.still is None else torch.full_like(frame, self.still)
        phase = frame[:, None] * self.frequencies
        return self.out(torch.cat([phase.sin(), phase.cos()], 1))


class NullToken(nn.Module):
    """A learned constant for what depends on nothing."""

    def __init__(self, d_model: int):
        super().__init__()
        self.value = nn.Parameter(torch.randn(d_model))

    def forward(self, conditions: Conditions) -> Tensor:
        return self.value.expand(len(conditions.frame), -1)


class ConditionEncoder(nn.Module):
    """The chosen tokens of a batch, stacked: (B, T, d_model)."""

    def __init__(self, names: tuple[str, ...], audio_features: int, d_model: int, noise: float = 0.0, audio_window: int = 8,
                 frames: int = 0, code_dropout: float = 0.0):  # fmt: skip
        """`frames` > 0: how many frames have a learned code, which gives way in training to zero in a share `code_dropout`."""
        super().__init__()
        kinds = {
            "audio": lambda: AudioToken(audio_features, d_model, noise, audio_window),
            "expression": lambda: ExpressionToken(d_model, noise),
            "camera": lambda: CameraToken(d_model, noise),
            "frame": lambda: FrameToken(d_model, frames, code_dropout),
            "null": lambda: NullToken(d_model),
        }
        self.tokens = nn.ModuleDict({name: kinds[name]() for name in names})

    def fit(self, conditions: Conditions) -> None:
        """Take the statistics of the training clip: `conditions` holds all its frames."""
        for name, data in (
            ("audio", conditions.audio[:, conditions.audio.shape[1] // 2]),
            ("expression", conditions.expression),
            ("camera", conditions.view[:, :3].flatten(1)),
        ):
            if name in self.tokens:
                self.tokens[name].standardise.fit(data)
        if "frame" in self.tokens:
            self.tokens["frame"].last.fill_(int(conditions.frame.max()))

    def forward(self, conditions: Conditions) -> Tensor:
        return torch.stack([token(conditions) for token in self.tokens.values()], 1)


def audio_windows(features: Tensor, rows: Tensor) -> Tensor:
    """(F, D) features and (B,) row indices -> (B, 16, D): rows i-8 .. i+7, zeros beyond either end (lineage.md 4.3)."""
    last = len(features) - 1  # the container may hold one frame more than the audio describes
    index = rows.clamp(max=last)[:, None] + torch.arange(AUDIO_WINDOW) - AUDIO_WINDOW // 2
    inside = (index >= 0) & (index <= last)
    return features[index.clamp(0, last)] * inside[..., None]
