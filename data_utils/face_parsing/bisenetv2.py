"""Parsing by BiSeNetV2 trained on CelebAMask-HQ (TensorFlow Lite, 448 x 448), where ai-edge-litert and the weights are present."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import cv2
import numpy as np

from data_utils.face_parsing.clip import Clip
from data_utils.face_parsing.person import PersonMask
from data_utils.face_parsing.steady import Parsed, steadied, with_neighbours
from utils import model_store
from utils.constants import BACKGROUND, CLOTH, HAIR

CROP = 2.1  # side of the head crop, in sizes of the face mesh's box (measured best)
_OUTSIDE = 255


class BiSeNetV2:
    name = "bisenetv2"
    needs = ("it needs `pip install ai-edge-litert` and bisenetv2_celebamaskhq_448x448_integer_quant.tflite "
             "in checkpoints/ or the folder that SGT_MODELS names")  # fmt: skip

    def available(self) -> bool:
        return importlib.util.find_spec("ai_edge_litert") is not None and model_store.find("bisenetv2") is not None

    def run(self, clip: Clip, todo: list[int], device: str = "cpu") -> Iterator[tuple[int, np.ndarray]]:
        """Yield (frame id, (H, W) uint8 classes) for the ids of `todo`, in order; always on the CPU."""
        yield from steadied(self._parsed(clip, with_neighbours(todo, clip.found)), todo)

    def _parsed(self, clip: Clip, ids: list[int]) -> Iterator[Parsed]:
        from ai_edge_litert.interpreter import Interpreter

        network = Interpreter(str(model_store.find("bisenetv2")))
        network.allocate_tensors()
        entry, result = network.get_input_details()[0], network.get_output_details()[0]
        side = int(entry["shape"][1])
        with PersonMask() as person:
            for i in ids:
                frame = clip.frame(i)
                to_crop = crop_transform(clip.points[i], side)
                crop = cv2.warpAffine(frame, to_crop, (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
                network.set_tensor(entry["index"], (crop[None].astype(np.float32) / 255 - 0.5) / 0.5)
                network.invoke()
                labels = network.get_tensor(result["index"]).reshape(side, side).astype(np.uint8)
                yield i, frame, paste(labels, to_crop, person(frame), clip.points[i])


def crop_transform(points: np.ndarray, side: int) -> np.ndarray:
    """(2, 3) affine map from the frame to the head crop of the network; points (478, 2) pixels."""
    low, high = points.min(0), points.max(0)
    scale = side / ((high - low).max() * CROP)
    shift = side / 2 - (low + high) / 2 * scale
    return np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])


def paste(labels: np.ndarray, to_crop: np.ndarray, person: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(H, W) classes from the crop's; beyond the crop the person mask decides: cloth below the chin, hair above."""
    height, width = person.shape
    classes = cv2.warpAffine(labels, to_crop, (width, height), flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP,
                             borderValue=_OUTSIDE)  # fmt: skip
    below = np.arange(height)[:, None] > points[:, 1].max()
    beyond = np.where(person > 0.5, np.where(below, CLOTH, HAIR), BACKGROUND).astype(np.uint8)
    return np.where(classes == _OUTSIDE, beyond, classes)
