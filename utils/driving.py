"""What drives the head beyond the speech itself: replayed poses, silence, blinks, steadier lips. Arrays only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from utils.constants import FPS, SAMPLES_PER_FRAME

LONGEST_GAP = 3  # unusable frames in a row that the path passes over; it turns back at a longer gap, where the body would leap
TURN = 12  # frames in which it comes to rest before turning back
SILENT_DB = 30.0  # a frame this far below loud speech is silent
BUMP = 5  # frames; what is louder for less is a bump of the microphone, by which speech is not judged
QUIETEST_DB = -60.0  # below full scale: a recording whose loudest is quieter is silence throughout
SHORTEST_SILENCE = 8  # frames; the closures of plosives are shorter and the mouth knows them
APPROACH = 3  # frames at either end of a silence in which the mouth still finishes or begins a word
MARGIN = 6  # frames around a silent row of the source that must be silent too: the audio window and a rest
BLINK = np.array([0.35, 0.8, 1.0, 0.95, 0.7, 0.45, 0.25, 0.1], np.float32)  # how closed, 25 a second: shuts faster than it opens


# -- poses -------------------------------------------------------------------------------------------------------


def usable_run(ids: list[int], start: int | None = None) -> tuple[int, int]:
    """First and last id of the stretch without a longer gap than LONGEST_GAP that holds frame `start`, or the longest one.

    ids: usable frame ids, ascending. A `start` within a gap belongs to the stretch after it.
    """
    ids = np.asarray(ids)
    cuts = np.flatnonzero(np.diff(ids) > LONGEST_GAP + 1) + 1
    runs = [(int(run[0]), int(run[-1])) for run in np.split(ids, cuts)]
    if start is None:
        return max(runs, key=lambda run: run[1] - run[0])
    return next((run for run in runs if run[1] >= start), runs[-1])


def ping_pong(length: int, count: int, start: int = 0, turn: int = TURN) -> np.ndarray:
    """`count` positions (float64) in 0 .. length-1 from `start` on, forth and back, coming to rest softly at each end.

    Away from the ends the speed is one frame a frame. Within `turn` frames of an end it falls evenly to nothing and rises
    again, so that neither the place nor the speed of the head jumps: half a parabola takes the place of each ramp's end.
    """
    last = length - 1
    if last < 1:
        return np.zeros(count)
    slow = min(turn, last / 2)  # frames of path at each end that are passed in twice the time
    ramp = last + 2 * slow  # time from one end to the other
    rest = min(start, last - start)
    begin = 2 * np.sqrt(slow * rest) if rest < slow else rest + slow  # from the nearer end to `start`
    time = np.arange(count) + (begin if start <= last / 2 else ramp - begin)
    time = np.abs((time + ramp) % (2 * ramp) - ramp)  # fold onto one ramp
    from_end = np.minimum(time, ramp - time)
    near = np.where(from_end < 2 * slow, from_end**2 / (4 * slow), from_end - slow)
    return np.where(time <= ramp / 2, near, last - near)


def replayed_path(ids: list[int], count: int, start: int | None = None) -> np.ndarray:
    """`count` moments (float64, in frames) of the clip, forth and back from frame `start` (or the start of its longest stretch).

    The path runs over frame numbers, not over the list of usable ones, so that a dropped frame is not a jump. Gaps beyond
    LONGEST_GAP are turned back at. Near a turn the moments lie between frames.
    """
    first, last = usable_run(ids, start)
    begin = 0 if start is None else int(np.clip(start, first, last)) - first
    return np.clip(first + ping_pong(last - first + 1, count, begin), first, last)


def nearest(ids: list[int], path: np.ndarray) -> list[int]:
    """The usable frame next to each moment of `path` (F,): its picture is shown then."""
    ids = np.asarray(ids)
    after = np.searchsorted(ids, path).clip(0, len(ids) - 1)
    before = np.maximum(after - 1, 0)
    return ids[np.where(path - ids[before] <= ids[after] - path, before, after)].tolist()


def replayed_ids(ids: list[int], count: int, start: int | None = None) -> list[int]:
    """`count` usable frame ids: those next to `replayed_path`."""
    return nearest(ids, replayed_path(ids, count, start))


def between(ids: list[int], rows: np.ndarray, path: np.ndarray) -> np.ndarray:
    """(F, D) float32: `rows` (len(ids), D) of the usable frames, at the moments of `path` (F,)."""
    return np.stack([np.interp(path, ids, column) for column in rows.T], 1).astype(np.float32)


def views_between(ids: list[int], views: np.ndarray, path: np.ndarray) -> np.ndarray:
    """(F, 4, 4) float32: world-to-camera `views` (len(ids), 4, 4) of the usable frames, at the moments of `path` (F,).

    The head turns evenly from one frame to the next, so that neither its place nor its speed jumps where frames are dropped
    or the path turns back.
    """
    from scipy.spatial.transform import Rotation, Slerp  # slow to import, and --help does without

    if len(ids) == 1:
        return np.repeat(views, len(path), 0)
    result = np.tile(np.eye(4, dtype=np.float32), (len(path), 1, 1))
    result[:, :3, :3] = Slerp(ids, Rotation.from_matrix(views[:, :3, :3]))(path).as_matrix()
    result[:, :3, 3] = between(ids, views[:, :3, 3], path)
    return result


# -- silence -----------------------------------------------------------------------------------------------------


def frame_levels(blocks: Iterable[np.ndarray], frames: int) -> np.ndarray:
    """(frames,) float32: loudness of each frame in dB of full scale (RMS of its 640 samples), from pieces of 16 kHz sound."""
    levels, rest = np.full(frames, -120.0, np.float32), np.zeros(0, np.float32)
    done = 0
    for block in blocks:
        rest = np.concatenate([rest, block])
        count = min(len(rest) // SAMPLES_PER_FRAME, frames - done)
        power = np.square(rest[: count * SAMPLES_PER_FRAME].reshape(count, SAMPLES_PER_FRAME)).mean(1)
        levels[done : done + count] = 10 * np.log10(power + 1e-12)
        rest, done = rest[count * SAMPLES_PER_FRAME :], done + count
    return levels


def silence(levels: np.ndarray) -> np.ndarray:
    """(F,) float32 from 0 (speech) to 1 (silence) of the frames whose `levels` (F,) are given, with soft flanks.

    Silent is what lies SILENT_DB below loud speech for at least SHORTEST_SILENCE frames; its ends belong to the words. Loud speech
    is the 95th percentile of the frames within SILENT_DB of the loudest, so that it is the same however little of the recording
    is speech. Silent throughout is only what never reaches QUIETEST_DB.
    """
    if len(levels) == 0:
        return np.zeros(0, np.float32)
    loudest = np.sort(levels)[-min(BUMP, len(levels))]
    speech = levels[levels > max(loudest - SILENT_DB, QUIETEST_DB)]
    quiet = levels < (np.percentile(speech, 95) - SILENT_DB if len(speech) else np.inf)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], quiet, [False]]).astype(int)))
    gate = np.zeros(len(levels), np.float32)
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        if end - begin < SHORTEST_SILENCE and not quiet.all():
            continue
        k = np.arange(begin, end)
        into = np.where(begin == 0, np.inf, k - begin + 1)  # the recording's own ends are no words
        left = np.where(end == len(levels), np.inf, end - k)
        gate[begin:end] = np.clip(np.minimum(into, left) / (APPROACH + 1), 0, 1)
    return gate


def closed_mouth_row(features: np.ndarray, levels: np.ndarray, jaw: np.ndarray, ids: list[int]) -> np.ndarray:
    """(D,) audio features of the speaker silent with the mouth shut: the mean of the few best frames of the source clip.

    features (F, D), levels (F,) dB, jaw (F,) how open the mouth is, ids the frames that may serve. Frames silent on both
    sides come first, the least open of them; a clip without silence gives its quietest shut mouths.
    """
    ids = np.asarray([i for i in ids if i < min(len(features), len(levels), len(jaw))])
    still = silence(levels) == 1
    around = np.convolve(~still, np.ones(2 * MARGIN + 1), "same")[ids]  # frames of speech nearby
    openness = np.convolve(np.pad(jaw, 1, "edge"), np.ones(3) / 3, "valid")[ids]
    best = np.lexsort((openness, around))
    silent = int((around == 0).sum())
    pool = best[:silent] if silent >= 3 else best[np.argsort(openness[best[: max(5, len(best) // 10)]], kind="stable")]
    return features[ids[pool[:5]]].mean(0)


# -- eyes and lips -----------------------------------------------------------------------------------------------


def blink_count(shut: np.ndarray, least: float = 0.25) -> int:
    """Blinks in a curve (F,) of how shut the eyes are: rises of at least `least` above where they mostly are."""
    above = shut > np.median(shut) + least
    return int((above[1:] & ~above[:-1]).sum() + above[:1].sum())


def blinks(count: int, seed: int = 0) -> np.ndarray:
    """(count,) float32 from 0 (open) to 1 (shut): a blink every 2 to 6 s, at moments that `seed` fixes."""
    rng, shut, at = np.random.default_rng(seed), np.zeros(count, np.float32), 0
    while (at := at + int(rng.uniform(2.0, 6.0) * FPS)) < count:
        piece = BLINK[: count - at]
        shut[at : at + len(piece)] = piece
        at += len(piece)
    return shut


def smoothed(blocks: Iterable[np.ndarray], side: float = 0.175) -> Iterator[np.ndarray]:
    """Blocks (n, D) of consecutive rows through the low pass (side, 1 - 2 side, side); as many rows, none of them late.

    SyncTalk's --smooth_lips mixes 0.35 of the last row into each, which also delays the lips by half a frame. Here the
    same 0.35 comes from both neighbours.
    """
    kept = None
    for block in blocks:
        if len(block) == 0:
            continue
        kept = np.concatenate([block[:1], block]) if kept is None else np.concatenate([kept, block])
        if len(kept) > 2:
            yield side * (kept[:-2] + kept[2:]) + (1 - 2 * side) * kept[1:-1]
            kept = kept[-2:]
    if kept is not None:
        yield side * kept[-2:-1] + (1 - side) * kept[-1:]


def gated(blocks: Iterable[np.ndarray], gate: np.ndarray, row: np.ndarray) -> Iterator[np.ndarray]:
    """Blocks (n, D) of consecutive rows, moved to `row` (D,) where `gate` (F,) says so: 0 leaves a row, 1 replaces it."""
    done = 0
    for block in blocks:
        weight = gate[done : done + len(block), None]
        yield block + weight * (row - block)
        done += len(block)
