"""Parsing by BiSeNet (Yu et al., ECCV 2018) with a ResNet-18 context path, 19 CelebAMask-HQ classes: the lineage's parser.

The network is laid out by the names and shapes of the public weights 79999_iter.pth (docs/preprocessing.md lists them). Unlike the
paper it has no spatial path: ResNet's features at 1/8 take its place. The two auxiliary heads of training are in the file and
loaded, and not run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_utils.face_parsing.clip import Clip
from data_utils.face_parsing.steady import Parsed, steadied, with_neighbours
from data_utils.per_frame import ordered_map
from utils import model_store
from utils.constants import CLASS_NAMES
from utils.weights import load_strictly, read_tensors

SIDE = 512  # the network's input
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
BATCH = {"cpu": 2, "cuda": 16}


class ConvBlock(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, size: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet18(nn.Module):
    """(B, 3, H, W) -> features at 1/8 (128 channels), 1/16 (256), 1/32 (512)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        for k, (inputs, outputs) in enumerate(((64, 64), (64, 128), (128, 256), (256, 512)), 1):
            blocks = nn.Sequential(BasicBlock(inputs, outputs, 1 if k == 1 else 2), BasicBlock(outputs, outputs, 1))
            self.add_module(f"layer{k}", blocks)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        eighth = self.layer2(self.layer1(x))
        sixteenth = self.layer3(eighth)
        return eighth, sixteenth, self.layer4(sixteenth)


class AttentionRefinement(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = ConvBlock(inputs, outputs, 3)
        self.conv_atten = nn.Conv2d(outputs, outputs, 1, bias=False)
        self.bn_atten = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * torch.sigmoid(self.bn_atten(self.conv_atten(x.mean((2, 3), keepdim=True))))


class ContextPath(nn.Module):
    """(B, 3, H, W) -> ResNet's features at 1/8 and the context at 1/8, 128 channels each."""

    def __init__(self) -> None:
        super().__init__()
        self.resnet = ResNet18()
        self.arm16 = AttentionRefinement(256, 128)
        self.arm32 = AttentionRefinement(512, 128)
        self.conv_head32 = ConvBlock(128, 128, 3)
        self.conv_head16 = ConvBlock(128, 128, 3)
        self.conv_avg = ConvBlock(512, 128, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        eighth, sixteenth, x = self.resnet(x)
        context = self.arm32(x) + self.conv_avg(x.mean((2, 3), keepdim=True))  # one value spread over the map
        context = self.conv_head32(F.interpolate(context, sixteenth.shape[2:]))
        context = self.arm16(sixteenth) + context
        return eighth, self.conv_head16(F.interpolate(context, eighth.shape[2:]))


class FeatureFusion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convblk = ConvBlock(256, 256, 1)
        self.conv1 = nn.Conv2d(256, 64, 1, bias=False)
        self.conv2 = nn.Conv2d(64, 256, 1, bias=False)

    def forward(self, eighth: Tensor, context: Tensor) -> Tensor:
        x = self.convblk(torch.cat([eighth, context], 1))
        return x + x * torch.sigmoid(self.conv2(F.relu(self.conv1(x.mean((2, 3), keepdim=True)))))


class Output(nn.Module):
    def __init__(self, inputs: int, between: int, classes: int):
        super().__init__()
        self.conv = ConvBlock(inputs, between, 3)
        self.conv_out = nn.Conv2d(between, classes, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.conv(x))


class BiSeNetNetwork(nn.Module):
    """(B, 3, H, W) RGB, ImageNet-normalised, sides multiples of 32 -> (B, 19, H / 8, W / 8) scores of the classes."""

    def __init__(self, classes: int = len(CLASS_NAMES)):
        super().__init__()
        self.cp = ContextPath()
        self.ffm = FeatureFusion()
        self.conv_out = Output(256, 256, classes)
        self.conv_out16 = Output(128, 64, classes)  # auxiliary, of training
        self.conv_out32 = Output(128, 64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.ffm(*self.cp(x)))


def load_network(path: Path, device: str | torch.device = "cpu") -> BiSeNetNetwork:
    """The network with the weights of 79999_iter.pth. Raises UserError if they do not fit exactly."""
    with torch.device("meta"):
        network = BiSeNetNetwork()
    network.to_empty(device="cpu")
    load_strictly(network, read_tensors(path, "bisenet"), path, "bisenet")
    return network.eval().requires_grad_(False).to(device)


@torch.inference_mode()
def parse(network: BiSeNetNetwork, frames: list[np.ndarray], side: int = SIDE) -> np.ndarray:
    """(B, H, W) uint8 classes of (H, W, 3) uint8 RGB frames of one size, seen by the network at `side` x `side`."""
    device = next(network.parameters()).device
    height, width = frames[0].shape[:2]
    shrink = cv2.INTER_AREA if max(height, width) > side else cv2.INTER_LINEAR
    squares = np.stack([cv2.resize(frame, (side, side), interpolation=shrink) for frame in frames])
    x = torch.from_numpy(squares).to(device).permute(0, 3, 1, 2).float() / 255
    x = (x - x.new_tensor(MEAN)[:, None, None]) / x.new_tensor(DEVIATION)[:, None, None]
    scores = F.interpolate(network(x), (height, width), mode="bilinear", align_corners=True)
    return scores.argmax(1).to(torch.uint8).cpu().numpy()


class BiSeNet:
    name = "bisenet"
    needs = f"it needs its weights: {model_store.remedy('bisenet')}"

    def available(self) -> bool:
        return model_store.find("bisenet") is not None

    def run(self, clip: Clip, todo: list[int], device: str = "cpu") -> Iterator[tuple[int, np.ndarray]]:
        """Yield (frame id, (H, W) uint8 classes) for the ids of `todo`, in order."""
        network = load_network(model_store.find("bisenet"), device)
        yield from steadied(_parsed(network, clip, with_neighbours(todo, clip.found)), todo)


def _parsed(network: BiSeNetNetwork, clip: Clip, ids: list[int]) -> Iterator[Parsed]:
    size = BATCH[next(network.parameters()).device.type]
    pictures = ordered_map(lambda i: (i, clip.frame(i)), ids)
    while batch := list(itertools.islice(pictures, size)):
        numbers, frames = zip(*batch, strict=True)
        yield from zip(numbers, frames, parse(network, list(frames)), strict=True)
