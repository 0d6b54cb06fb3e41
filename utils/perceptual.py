"""ST-LPIPS: a learned perceptual distance that a shift of a pixel hardly moves. Metric of metrics.py and training loss.

Ghildyal and Liu, "Shift-tolerant Perceptual Similarity Metric" (ECCV 2022), on LPIPS (Zhang et al., CVPR 2018) with the
anti-aliased AlexNet and VGG-16 of Zhang, "Making Convolutional Networks Shift-Invariant Again" (ICML 2019). The network
here is our own, laid out by the names and shapes in the published weights (BSD-2, see utils/model_store.py). Shapes do
not tell the stride of AlexNet's first convolution; it is the ICML paper's 2 + 2 in place of 4, and of the candidates the
one least moved by shifts. Values have not been compared with the authors' program: they compare pictures, not papers.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import model_store
from utils.device import runs_triton
from utils.errors import UserError


class BlurPool(nn.Module):
    """The largest of every `window` x `window` pixels of (B, C, H, W), then every second sample after a fixed low-pass filter
    (`filt` of the weights: binomial 3x3). On a GPU one kernel (fused_pool.py)."""

    def __init__(self, channels: int, window: int = 1):
        super().__init__()
        self.window = window
        self.register_buffer("filt", torch.empty(channels, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        if runs_triton(x.device):
            from utils import fused_pool

            return fused_pool.pool(x, self.window)
        if self.window > 1:
            x = F.max_pool2d(x, self.window, 1)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.filt, stride=2, groups=x.shape[1])


def _pool(channels: int, window: int) -> list[nn.Module]:
    return [nn.Identity(), BlurPool(channels, window)]  # in the published numbering the largest is a layer of its own


def _alex_slices() -> list[list[nn.Module]]:
    def block(inputs: int, outputs: int, size: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, size, padding=size // 2), nn.ReLU(inplace=True)]

    return [
        [nn.Conv2d(3, 64, 11, stride=2, padding=2), BlurPool(64), nn.ReLU(inplace=True)],
        _pool(64, 3) + block(64, 192, 5),
        _pool(192, 3) + block(192, 384, 3),
        block(384, 256, 3),
        block(256, 256, 3),
    ]


def _vgg_slices() -> list[list[nn.Module]]:
    slices, inputs = [], 3
    for outputs, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        layers = _pool(inputs, 2) if slices else []
        for _ in range(convolutions):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True)]
            inputs = outputs
        slices.append(layers)
    return slices


class _Network(nn.Module):
    """The published module tree: scaling_layer, net.slice1..5 (layers numbered through), lin0..4.model.1."""

    def __init__(self, slices: list[list[nn.Module]]):
        super().__init__()
        self.scaling_layer = nn.Module()
        self.scaling_layer.register_buffer("shift", torch.empty(1, 3, 1, 1))
        self.scaling_layer.register_buffer("scale", torch.empty(1, 3, 1, 1))
        self.net = nn.Module()
        number = 0
        for k, layers in enumerate(slices):
            numbered = nn.Sequential()
            for layer in layers:
                numbered.add_module(str(number), layer)
                number += 1
            self.net.add_module(f"slice{k + 1}", numbered)
            channels = [layer for layer in layers if isinstance(layer, nn.Conv2d)][-1].out_channels
            head = nn.Module()
            head.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))
            self.add_module(f"lin{k}", head)


def distance(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """(B,): mean over pixels of the weighted squared difference of maps (B, C, h, w), each pixel's channels brought to length 1.

    `weight` (1, C, 1, 1). Differentiable in `a`; on a GPU as one kernel (fused_distance.py).
    """
    if runs_triton(a.device):
        from utils import fused_distance

        return fused_distance.distance(a, b, weight)
    a, b = (x.float() / (x.float().square().sum(1, keepdim=True) + 1e-12).sqrt() for x in (a, b))
    return F.conv2d((a - b).square(), weight).mean((1, 2, 3))


class PerceptualLoss(nn.Module):
    """`PerceptualLoss("alex")(x, y)`: (B, 3, H, W) in [0, 1], twice -> (B,) distances, 0 for equal pictures.

    "alex" is small and fast, "vgg" slower and finer. Differentiable with respect to x; the weights are frozen. The
    features of an unchanging target may be kept: `y` may be what `features(target)` gave. Sides of at least 48 pixels.
    `precision` is that of the convolutions: training on a GPU takes torch.bfloat16.
    Raises UserError if the weights cannot be had or do not fit.
    """

    def __init__(self, net: str = "alex", weights: Path | None = None, precision: torch.dtype = torch.float32):
        super().__init__()
        self.precision = precision
        self.network = _Network({"alex": _alex_slices, "vgg": _vgg_slices}[net]())
        weights = model_store.fetch(f"stlpips_{net}") if weights is None else Path(weights)
        try:
            self.network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True), strict=True)
        except Exception as error:  # torch.load and load_state_dict raise many kinds; all mean one thing here
            raise UserError(f"{weights} does not hold the ST-LPIPS weights ({type(error).__name__}); delete it and run "
                            f"python -m utils.model_store fetch stlpips_{net}") from error  # fmt: skip
        self.network.net.to(precision, memory_format=torch.channels_last)
        self.eval().requires_grad_(False)

    def features(self, x: Tensor) -> list[Tensor]:
        """Five maps (B, C, h, w) of (B, 3, H, W) in [0, 1]."""
        x = (2 * x - 1 - self.network.scaling_layer.shift) / self.network.scaling_layer.scale
        x, maps = x.to(self.precision, memory_format=torch.channels_last), []
        for layers in self.network.net.children():
            x = layers(x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor, y: Tensor | list[Tensor]) -> Tensor:
        if isinstance(y, Tensor):
            with torch.no_grad():
                y = self.features(y)
        weights = (self.network.get_submodule(f"lin{k}.model.1").weight for k in range(len(y)))
        return sum(map(distance, self.features(x), y, weights))


class Lpips(nn.Module):
    """`Lpips("alex")(x, y)`: as PerceptualLoss, but LPIPS itself, from the package lpips on a network of torchvision, in float32.

    Raises UserError if a package or the weights, which they download, cannot be had.
    """

    def __init__(self, net: str):
        super().__init__()
        try:
            import lpips  # neither is among our requirements

            with contextlib.redirect_stdout(None):
                self.network = lpips.LPIPS(net=net, verbose=False)
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not fit this torch
            raise UserError(f"LPIPS ({net}) needs the packages lpips and torchvision ({error}); install them (pip install lpips "
                            f"torchvision), or take ST-LPIPS (--perceptual_net {net})") from None  # fmt: skip
        except OSError as error:  # no network, and not downloaded before
            raise UserError(f"the weights of LPIPS ({net}) could not be downloaded ({error}); try again with a network, or take "
                            f"ST-LPIPS (--perceptual_net {net})") from None  # fmt: skip
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.network(x, y, normalize=True).flatten()


def perceptual_loss(name: str, precision: torch.dtype) -> nn.Module:
    """What --perceptual_net names: "alex", "vgg" (ST-LPIPS), "lpips_alex", "lpips_vgg"."""
    kind, _, net = name.rpartition("_")
    return Lpips(net) if kind else PerceptualLoss(net, precision=precision)
