"""Optical flow by RAFT-small (Teed & Deng, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow", ECCV 2020).

Own module, written from the paper and from the names and shapes of the public weights raft-small.pth (106 tensors). Two files fit:
raft-small.pth itself ("module." before each name) and the checkpoint of UNFaceFlow, the same network fine-tuned on faces ("net_C",
beside "net_W", importance weights that nothing here needs).
"""

from __future__ import annotations

import functools
import threading
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import model_store
from utils.weights import load_strictly, read_tensors

STEP = 8  # pixels a cell of the feature maps
HIDDEN, CONTEXT, FEATURES = 96, 64, 128  # channels
LEVELS, RADIUS = 4, 3  # of the correlation pyramid and its lookup
ITERATIONS = 12
BATCH = {"cpu": 8, "cuda": 32}  # an H100 takes 329 pairs of 200 x 264 a second by 8, 1129 by 32, in 0.7 GB


class Bottleneck(nn.Module):
    """Residual block 1x1, 3x3 (with the stride), 1x1; `norm` is instance normalisation or nothing, and has no weights."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: type[nn.Module]):
        super().__init__()
        between = outputs // 4
        self.conv1 = nn.Conv2d(inputs, between, 1)
        self.conv2 = nn.Conv2d(between, between, 3, stride, 1)
        self.conv3 = nn.Conv2d(between, outputs, 1)
        self.norm, self.wide_norm = norm(between), norm(outputs)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv1(x)))
        y = F.relu(self.norm(self.conv2(y)))
        y = F.relu(self.wide_norm(self.conv3(y)))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Encoder(nn.Module):
    """(B, 3, H, W) in -1..1 -> (B, outputs, H / 8, W / 8)."""

    def __init__(self, outputs: int, norm: type[nn.Module]):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 32, 7, 2, 3), norm(32)
        self.layer1 = nn.Sequential(Bottleneck(32, 32, 1, norm), Bottleneck(32, 32, 1, norm))
        self.layer2 = nn.Sequential(Bottleneck(32, 64, 2, norm), Bottleneck(64, 64, 1, norm))
        self.layer3 = nn.Sequential(Bottleneck(64, 96, 2, norm), Bottleneck(96, 96, 1, norm))
        self.conv2 = nn.Conv2d(96, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.layer3(self.layer2(self.layer1(F.relu(self.norm(self.conv1(x)))))))


class MotionEncoder(nn.Module):
    """Correlations and flow -> 82 channels, the last two the flow itself."""

    def __init__(self) -> None:
        super().__init__()
        self.convc1 = nn.Conv2d(LEVELS * (2 * RADIUS + 1) ** 2, 96, 1)
        self.convf1 = nn.Conv2d(2, 64, 7, padding=3)
        self.convf2 = nn.Conv2d(64, 32, 3, padding=1)
        self.conv = nn.Conv2d(128, 80, 3, padding=1)

    def forward(self, flow: Tensor, correlation: Tensor) -> Tensor:
        motion = F.relu(self.convf2(F.relu(self.convf1(flow))))
        both = torch.cat([F.relu(self.convc1(correlation)), motion], 1)
        return torch.cat([F.relu(self.conv(both)), flow], 1)


class ConvGRU(nn.Module):
    def __init__(self, hidden: int, inputs: int):
        super().__init__()
        self.convz = nn.Conv2d(hidden + inputs, hidden, 3, padding=1)
        self.convr = nn.Conv2d(hidden + inputs, hidden, 3, padding=1)
        self.convq = nn.Conv2d(hidden + inputs, hidden, 3, padding=1)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        both = torch.cat([h, x], 1)
        update, reset = torch.sigmoid(self.convz(both)), torch.sigmoid(self.convr(both))
        return (1 - update) * h + update * torch.tanh(self.convq(torch.cat([reset * h, x], 1)))


class FlowHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(HIDDEN, 128, 3, padding=1)
        self.conv2 = nn.Conv2d(128, 2, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(h)))


class UpdateBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = MotionEncoder()
        self.gru = ConvGRU(HIDDEN, CONTEXT + 82)
        self.flow_head = FlowHead()

    def forward(self, hidden: Tensor, context: Tensor, correlation: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.gru(hidden, torch.cat([context, self.encoder(flow, correlation)], 1))
        return hidden, self.flow_head(hidden)


class RaftSmall(nn.Module):
    """Two pictures (B, 3, H, W), RGB 0..255, sides multiples of 8 and at least 128 -> (B, 2, H, W) flow (x, y) in pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.fnet = Encoder(FEATURES, nn.InstanceNorm2d)
        self.cnet = Encoder(HIDDEN + CONTEXT, nn.Identity)
        self.update_block = UpdateBlock()

    def forward(self, source: Tensor, target: Tensor, iterations: int = ITERATIONS) -> Tensor:
        source, target = source / 127.5 - 1, target / 127.5 - 1
        pyramid = correlation_pyramid(*self.fnet(torch.cat([source, target])).chunk(2))
        hidden, context = self.cnet(source).split([HIDDEN, CONTEXT], 1)
        hidden, context = torch.tanh(hidden), F.relu(context)
        height, width = hidden.shape[2:]
        y, x = torch.meshgrid(torch.arange(height, device=source.device), torch.arange(width, device=source.device), indexing="ij")
        grid = torch.stack([x, y]).to(source.dtype)  # (2, h, w)
        flow = grid.new_zeros(len(source), 2, height, width)
        for _ in range(iterations):
            hidden, step = self.update_block(hidden, context, look_up(pyramid, grid + flow), flow)
            flow = flow + step
        return STEP * F.interpolate(flow, scale_factor=STEP, mode="bilinear", align_corners=True)


def correlation_pyramid(source: Tensor, target: Tensor) -> list[Tensor]:
    """Dot products of all pairs of features (B, C, h, w) over sqrt(C), averaged over ever larger cells of the target:
    (B h w, 1, h / 2^k, w / 2^k) for k = 0..3."""
    batch, channels, height, width = source.shape
    products = source.flatten(2).transpose(1, 2) @ target.flatten(2) / channels**0.5
    level = products.reshape(batch * height * width, 1, height, width)
    pyramid = [level]
    while len(pyramid) < LEVELS:
        pyramid.append(level := F.avg_pool2d(level, 2))
    return pyramid


def look_up(pyramid: list[Tensor], at: Tensor) -> Tensor:
    """(B, 4 * 49, h, w): each level bilinearly read on a 7x7 grid about `at` (B, 2, h, w; cells, x first), zero outside.

    Of the 49 offsets the weights count x slowly and y fast (told from real weights: the other order does not track).
    """
    batch, _, height, width = at.shape
    span = torch.arange(-RADIUS, RADIUS + 1, device=at.device, dtype=at.dtype)
    offsets = torch.stack(torch.meshgrid(span, span, indexing="ij"), -1)  # (7, 7, 2) x, y
    centres = at.permute(0, 2, 3, 1).reshape(-1, 1, 1, 2)
    found = []
    for k, level in enumerate(pyramid):
        size = at.new_tensor([level.shape[3] - 1, level.shape[2] - 1])
        places = (centres / 2**k + offsets) * (2 / size) - 1
        values = F.grid_sample(level, places, align_corners=True)
        found.append(values.reshape(batch, height, width, -1))
    return torch.cat(found, -1).permute(0, 3, 1, 2)


def load_network(path: Path, model: str, device: str | torch.device = "cpu") -> RaftSmall:
    """RAFT-small with the weights of a file in either layout. Raises UserError if they do not fit exactly."""
    tensors = read_tensors(path, model)
    parts = {name: name.split(".") for name in tensors}
    if any("net_C" in part for part in parts.values()):
        tensors = {name: tensor for name, tensor in tensors.items() if "net_C" in parts[name]}
    wrappers = ("module", "net_C", "state_dict", "model")
    tensors = {".".join(part for part in parts[name] if part not in wrappers): tensor for name, tensor in tensors.items()}
    with torch.device("meta"):
        network = RaftSmall()
    network.to_empty(device="cpu")
    load_strictly(network, tensors, path, model)
    return network.eval().requires_grad_(False).to(device)


class RaftFlow:
    """RAFT-small as a flow back end. `side` (width, height): pictures are brought to this size, the one of its training."""

    batch = BATCH["cpu"]  # pairs it wants at once

    def __init__(self, name: str, model: str, side: tuple[int, int] | None = None):
        self.name, self.model, self.side = name, model, side
        self.needs = f"it needs its weights: {model_store.remedy(model)}"
        self._lock = threading.Lock()  # one batch at a time: memory for one, and torch has threads of its own

    def available(self) -> bool:
        return model_store.find(self.model) is not None

    def load(self, device: str | torch.device = "cpu", path: Path | None = None) -> RaftFlow:
        """Get ready to run on a device, with the weights of the model store or of another file; it is read once a process."""
        self.batch = BATCH[torch.device(device).type]
        self._network = _network(str(path or model_store.find(self.model)), self.model, str(device))
        return self

    @torch.inference_mode()
    def flows(self, sources: list[np.ndarray], targets: list[np.ndarray]) -> np.ndarray:
        """Pairs of (H, W, 3) uint8 RGB pictures of one size -> (B, H, W, 2) float32, pixel p of a source lies at p + flow(p)."""
        height, width = sources[0].shape[:2]
        wide, high = self.side or (width, height)
        wide, high = max(wide, 16 * STEP), max(high, 16 * STEP)
        device = next(self._network.parameters()).device
        x, y = (_as_tensor(pictures, wide, high, device) for pictures in (sources, targets))
        with self._lock:
            flow = self._network(x, y)[..., :high, :wide]
        if (wide, high) != (width, height):
            stretch = flow.new_tensor([width / wide, height / high])[:, None, None]
            flow = F.interpolate(flow, (height, width), mode="bilinear") * stretch
        return flow.permute(0, 2, 3, 1).cpu().numpy()


@functools.cache
def _network(path: str, model: str, device: str) -> RaftSmall:
    return load_network(Path(path), model, device)


def _as_tensor(pictures: list[np.ndarray], width: int, height: int, device: torch.device) -> Tensor:
    """(B, 3, H, W) float32 0..255 of the given size, its edge repeated to multiples of the network's step."""
    if pictures[0].shape[:2] != (height, width):
        pictures = [cv2.resize(picture, (width, height), interpolation=cv2.INTER_LINEAR) for picture in pictures]
    x = torch.from_numpy(np.stack(pictures)).to(device).permute(0, 3, 1, 2).float()
    return F.pad(x, (0, -width % STEP, 0, -height % STEP), mode="replicate")
