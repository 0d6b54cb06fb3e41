"""The embedded parsing back end: person mask, face mesh and the clip's own colours; nothing but what pip brings."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import cv2
import numpy as np

from data_utils.face_parsing.clip import Clip
from data_utils.face_parsing.edges import average_over_time, guided_upsample
from data_utils.face_parsing.mesh import LEFT_EAR, OVAL, RIGHT_EAR, HeadFrame, fill, paint_parts
from data_utils.face_parsing.person import PersonMask
from data_utils.face_parsing.split import CLOTH_, EAR_BOTTOM, FACE_, HAIR_, NECK_, Place, SplitModel, lab_cells, learn
from data_utils.per_frame import THREADS, Lent, ordered_map
from utils.constants import CLOTH, HAIR, NECK, SKIN

WORK_SIDE = 256  # the soft masks are found at this size and moved onto the full frame's edges
SAMPLES = 24  # frames the clip's colours are learned from
KEPT = 2 * THREADS + 8  # soft masks in memory, enough for the threads' windows
TIME_RADIUS = 2  # frames before and after that a still pixel is averaged over
GUIDE_RADIUS, GUIDE_EPSILON = 4, 2e-4
PERSON_LEVEL = 0.4  # below one half: the mask takes in the mixed pixels of the outline, which the plate does not have
NOBODY = 255  # a region beside the four
CLASS_OF = {FACE_: SKIN, NECK_: NECK, CLOTH_: CLOTH, HAIR_: HAIR}


class EmbeddedParsing:
    name = "mediapipe"

    def available(self) -> bool:
        return True

    def run(self, clip: Clip, todo: list[int], device: str = "cpu") -> Iterator[tuple[int, np.ndarray]]:
        """Yield (frame id, (H, W) uint8 classes) for the ids of `todo`, in order; always on the CPU."""
        with Lent(PersonMask, 1 + THREADS // 4) as masks:

            def person(picture: np.ndarray) -> np.ndarray:
                with masks.one() as mask:
                    return mask(picture)

            yield from ordered_map(FrameParser(clip, person).parse, todo)


class FrameParser:
    """Parses single frames of one clip, with what was learned from all of it. The result depends on the frame and its neighbours
    alone, never on which frames were parsed before."""

    def __init__(self, clip: Clip, person: Callable[[np.ndarray], np.ndarray]):
        self._clip, self._person = clip, person
        self._head = HeadFrame(clip.points)
        self._recent: OrderedDict[int, Future] = OrderedDict()
        self._lock = threading.Lock()
        self._model = self._learn()

    def parse(self, i: int) -> tuple[int, np.ndarray]:
        """(frame id, (H, W) uint8 classes). May be called from several threads."""
        found = self._clip.found
        window = [k for k in range(i - TIME_RADIUS, i + TIME_RADIUS + 1) if 0 <= k < len(found) and found[k]]
        frames = [self._soft(k) for k in window]
        soft = average_over_time([small for _, small, _ in frames], [s for _, _, s in frames], window.index(i))
        full, small, _ = self._soft(i)
        guide = full.astype(np.float32) * np.float32(1 / 255)
        soft = guided_upsample(soft, small, guide, GUIDE_RADIUS, GUIDE_EPSILON)
        return i, self._classes(soft, self._clip.points[i])

    def _work_size(self, full: np.ndarray) -> tuple[float, int, int]:
        scale = min(1.0, WORK_SIDE / max(full.shape[:2]))
        return scale, round(full.shape[0] * scale), round(full.shape[1] * scale)

    def _look(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, Place]:
        """Frame, small frame (float RGB), small person probability, and where its pixels lie relative to the head."""
        full = self._clip.frame(i)
        scale, height, width = self._work_size(full)
        small = cv2.resize(full, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32) * np.float32(1 / 255)
        person = cv2.resize(self._person(full), (width, height), interpolation=cv2.INTER_AREA)
        return full, small, person, Place(self._clip.points[i], self._head, height, width, scale)

    def _learn(self) -> SplitModel:
        ids = np.flatnonzero(self._clip.found)
        chosen = ids[np.unique(np.linspace(0, len(ids) - 1, SAMPLES).round().astype(int))]
        samples = []
        for i in chosen:
            _, small, person, place = self._look(int(i))
            samples.append((lab_cells(small), person, place))
        return learn(samples)

    def _soft(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Frame, small frame, (4, h, w) probability of each region (their sum is the probability of the person).

        Neighbouring frames ask for the same ones: the first to ask computes it, the others wait for it.
        """
        with self._lock:
            future = self._recent.get(i)
            mine = future is None
            if mine:
                future = self._recent[i] = Future()
                while len(self._recent) > KEPT:
                    self._recent.popitem(last=False)
        if mine:
            try:
                full, small, person, place = self._look(i)
                future.set_result((full, small, self._model.posterior(lab_cells(small), place) * person))
            except BaseException as error:
                future.set_exception(error)
                raise
        return future.result()

    def _classes(self, soft: np.ndarray, points: np.ndarray) -> np.ndarray:
        """(H, W) classes from the soft regions (4, H, W), which it changes, and the mesh."""
        height, width = soft.shape[1:]
        oval = fill(points[list(OVAL)], height, width).astype(bool)
        a, b = self._head.to_pixels(points)
        x = np.arange(width, dtype=np.float32)[None, :] + np.float32(0.5 - b.real)
        y = np.arange(height, dtype=np.float32)[:, None] + np.float32(0.5 - b.imag)
        u, v = (x * a.real + y * a.imag) / abs(a) ** 2, (y * a.real - x * a.imag) / abs(a) ** 2  # (x + iy) / a
        person = oval | (soft[0] + soft[1] + soft[2] + soft[3] > PERSON_LEVEL)
        shift = self._head.ear_shift(points, a, b)
        soft[FACE_][~oval & (v > EAR_BOTTOM + shift + 0.05)] = 0.0  # below the ears the mesh alone says where the face ends
        soft[FACE_][oval & (v > 0.1)] = 2.0
        region = cv2.medianBlur(_strongest(soft), 5)
        region = _tidy(region, person, oval)
        classes = np.zeros((height, width), np.uint8)
        for k, label in CLASS_OF.items():
            classes[region == k] = label
        ear = (classes == SKIN) & ~oval & (v > shift - 0.12)
        classes[ear & (u < 0)] = LEFT_EAR
        classes[ear & (u > 0)] = RIGHT_EAR
        paint_parts(classes, points)
        return classes


def _strongest(soft: np.ndarray) -> np.ndarray:
    """(H, W) uint8 index of the largest of the masks (argmax over a short axis, written out: four times faster)."""
    best, region = soft[0].copy(), np.zeros(soft.shape[1:], np.uint8)
    for k in range(1, len(soft)):
        region[soft[k] > best] = k
        np.maximum(best, soft[k], out=best)
    return region


def _tidy(region: np.ndarray, person: np.ndarray, oval: np.ndarray) -> np.ndarray:
    """(H, W) regions, NOBODY off the person, without what anatomy forbids: people apart from the head's own body, and small
    islands of one region inside others."""
    person = cv2.medianBlur(person.astype(np.uint8), 5)
    count, labels = cv2.connectedComponents(person, connectivity=4)
    if count > 2:
        mine = np.bincount(labels[oval & (person > 0)], minlength=count).argmax()
        person &= labels == mine
    region = np.where(person > 0, region, NOBODY)
    smallest = region.size // 2000
    for k in range(4):
        count, labels, stats, _ = cv2.connectedComponentsWithStats((region == k).astype(np.uint8), connectivity=4)
        for c in range(1, count):
            x, y, w, h, area = stats[c]
            if area >= smallest:
                continue
            near = np.s_[max(y - 1, 0) : y + h + 1, max(x - 1, 0) : x + w + 1]
            island = (labels[near] == c).astype(np.uint8)
            around = region[near][cv2.dilate(island, np.ones((3, 3), np.uint8)) > island]
            around = around[around != NOBODY]
            if around.size:
                region[near][island > 0] = np.bincount(around).argmax()
    return region
