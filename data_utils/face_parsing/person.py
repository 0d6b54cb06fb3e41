"""Person mask: MediaPipe's selfie segmentation network, soft and at the frame's size."""

from __future__ import annotations

import numpy as np

from data_utils.landmarks import quiet_stderr
from utils import model_store


class PersonMask:
    """with PersonMask() as person: person(rgb) -> (H, W) float32 probability of "person"; one thread at a time."""

    def __init__(self):
        # the bytes, not the path: MediaPipe cannot open every file name
        weights = model_store.fetch("selfie_segmentation").read_bytes()
        import mediapipe
        from mediapipe.tasks.python import BaseOptions, vision

        self._image = lambda rgb: mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=rgb)
        options = vision.ImageSegmenterOptions(base_options=BaseOptions(model_asset_buffer=weights),
                                               output_confidence_masks=True, output_category_mask=False)  # fmt: skip
        with quiet_stderr():
            self._segmenter = vision.ImageSegmenter.create_from_options(options)

    def __call__(self, rgb: np.ndarray) -> np.ndarray:
        result = self._segmenter.segment(self._image(np.ascontiguousarray(rgb)))
        mask = np.array(result.confidence_masks[0].numpy_view(), np.float32)
        return mask.reshape(rgb.shape[:2])

    def __enter__(self) -> PersonMask:
        return self

    def __exit__(self, *_) -> None:
        self._segmenter.close()
