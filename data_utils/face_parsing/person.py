"""Person mask: MediaPipe's selfie segmentation network, soft and at the frame's size."""

from __future__ import annotations

import threading

import mediapipe as mp
import numpy as np
from mediapipe.tasks.python import BaseOptions, vision

from utils import model_store


class PersonMask:
    """with PersonMask() as person: person(rgb) -> (H, W) float32 probability of "person". May be called from several threads."""

    def __init__(self):
        weights = model_store.fetch("selfie_segmentation")
        # the bytes, not the path: MediaPipe cannot open every file name
        options = vision.ImageSegmenterOptions(base_options=BaseOptions(model_asset_buffer=weights.read_bytes()),
                                               output_confidence_masks=True, output_category_mask=False)  # fmt: skip
        self._lock = threading.Lock()
        self._segmenter = vision.ImageSegmenter.create_from_options(options)

    def __call__(self, rgb: np.ndarray) -> np.ndarray:
        with self._lock:
            return self._segment(rgb)

    def _segment(self, rgb: np.ndarray) -> np.ndarray:
        result = self._segmenter.segment(mp.Image(image_format=mp.ImageFormat.SRGB, data=np.ascontiguousarray(rgb)))
        mask = np.array(result.confidence_masks[0].numpy_view(), np.float32)
        return mask.reshape(rgb.shape[:2])

    def __enter__(self) -> PersonMask:
        return self

    def __exit__(self, *_) -> None:
        self._segmenter.close()
