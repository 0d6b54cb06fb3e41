"""Class maps of single frames made steady over time, without lag: a pixel that keeps its colour takes its most frequent class."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import cv2
import numpy as np

from data_utils.per_frame import ordered_map

RADIUS = 2  # frames before and after that have a vote
UNCHANGED = 8  # grey levels, of the colour's mean over 5 x 5 pixels: more is motion

Parsed = tuple[int, np.ndarray, np.ndarray]  # frame id, (H, W, 3) uint8 RGB, (H, W) uint8 classes


def with_neighbours(todo: list[int], found: np.ndarray) -> list[int]:
    """The ids of `todo` and of the frames with a vote on them, ascending; found (F,) bool: the frames that can be parsed."""
    wanted = np.zeros(len(found), bool)
    for shift in range(-RADIUS, RADIUS + 1):
        wanted[np.clip(np.array(todo) + shift, 0, len(found) - 1)] = True
    return np.flatnonzero(wanted & found).tolist()


def steadied(parsed: Iterator[Parsed], todo: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (frame id, classes) of `todo` in order. parsed: with_neighbours(todo), in order; a few of them are held at a time."""

    def windows() -> Iterator[tuple[int, dict[int, tuple[np.ndarray, np.ndarray]]]]:
        held: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        due = deque(todo)
        for i, frame, classes in parsed:
            held[i] = cv2.blur(frame, (5, 5)), classes
            while due and due[0] + RADIUS <= i:
                yield due[0], {k: held[k] for k in range(due[0] - RADIUS, due[0] + RADIUS + 1) if k in held}
                due.popleft()
            held = {k: value for k, value in held.items() if k > i - 2 * RADIUS}
        for centre in due:
            yield centre, {k: held[k] for k in range(centre - RADIUS, centre + RADIUS + 1) if k in held}

    yield from ordered_map(lambda window: (window[0], vote(*window)), windows())


def vote(centre: int, window: dict[int, tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """(H, W) uint8: of every pixel the class that most frames of the window give it among those in which its colour is that of
    frame `centre`; of equals, the centre's own. window: frame id -> (blurred picture, classes)."""
    own = window[centre][1]
    differs = np.zeros(own.shape, bool)
    for _, classes in window.values():
        differs |= classes != own
    at = np.flatnonzero(differs)  # few: elsewhere all agree
    labels = np.stack([classes.ravel()[at] for _, classes in window.values()])
    colours = np.stack([picture.reshape(-1, 3)[at] for picture, _ in window.values()]).astype(np.int16)
    mine = list(window).index(centre)
    still = np.abs(colours - colours[mine]).max(2) <= UNCHANGED
    votes = ((labels[:, None] == labels) & still).sum(1, dtype=np.uint8) * still * 2
    votes[mine] += 1
    best = own.copy()
    best.ravel()[at] = np.take_along_axis(labels, votes.argmax(0)[None], 0)[0]
    return best
