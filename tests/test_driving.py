"""What drives the head: poses that neither jump nor stop, silence that is silence, blinks where none are, lips without lag."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from utils.driving import (
    APPROACH,
    LONGEST_GAP,
    between,
    blink_count,
    blinks,
    closed_mouth_row,
    frame_levels,
    gated,
    ping_pong,
    replayed_ids,
    replayed_path,
    silence,
    smoothed,
    usable_run,
    views_between,
)


@pytest.mark.parametrize("length, start", [(100, 0), (100, 40), (100, 3), (30, 29), (9, 4)])
def test_the_path_begins_where_it_is_told_and_its_speed_never_jumps(length, start):
    path = ping_pong(length, 2000, start)
    assert path[0] == pytest.approx(start) and path.min() >= 0 and path.max() <= length - 1
    speed = np.diff(path)
    assert np.abs(speed).max() <= 1 + 1e-9
    slow = min(12, (length - 1) / 2)
    assert np.abs(np.diff(speed)).max() <= 1 / (2 * slow) + 1e-9  # a hard turn would be a step of 2
    assert np.ptp(path[-400:]) > 0.9 * (length - 1)  # and it does use the whole clip


def test_away_from_the_ends_the_clip_runs_at_its_own_speed():
    path = ping_pong(200, 150, 20)
    np.testing.assert_allclose(np.diff(path[:100]), 1)


def test_a_clip_of_one_frame_stands_still():
    assert ping_pong(1, 3).tolist() == [0, 0, 0] and replayed_ids([7], 3) == [7, 7, 7]


def test_dropped_frames_are_bridged_in_the_clips_own_time_by_their_neighbours():
    ids = [i for i in range(100) if i not in (40, 41, 42, 60)]
    path = replayed_ids(ids, 60, start=20)
    assert set(path) <= set(ids) and path[:20] == list(range(20, 40))
    assert path[20:24] in ([39, 39, 43, 43], [39, 43, 43, 43])  # 40 .. 43: the nearest usable one
    assert path[24:40] == list(range(44, 60)) and path[40] in (59, 61)


def test_the_shown_frames_never_leap_over_more_than_a_short_gap():
    ids = [i for i in range(400) if i % 50 not in (20, 21, 22) and i % 170 > 12]
    path = replayed_ids(ids, 2000)
    assert np.abs(np.diff(path)).max() <= LONGEST_GAP + 1 and len(path) == 2000 and set(path) <= set(ids)


def test_the_head_moves_evenly_over_dropped_frames_and_around_the_turn():
    angle, place = 0.8 * np.sin(np.arange(120) / 15), np.sin(np.arange(120) / 9)
    views = np.tile(np.eye(4), (120, 1, 1))
    views[:, :3, :3] = Rotation.from_rotvec(angle[:, None] * [0, 1, 0]).as_matrix()
    views[:, 0, 3] = place
    ids = [i for i in range(120) if i not in (30, 31, 32, 77)]
    path = replayed_path(ids, 500)
    moved = views_between(ids, views[ids], path)
    turned = Rotation.from_matrix(moved[:, :3, :3]).as_rotvec()[:, 1]
    for curve, own in ((turned, angle), (moved[:, 0, 3], place)):
        assert np.abs(np.diff(curve, 2)).max() < 2 * np.abs(np.diff(own, 2)).max() + 0.1 * np.abs(np.diff(own)).max()
    whole = path == np.round(path)
    shown = np.isin(path, ids) & whole
    np.testing.assert_allclose(moved[shown], views[path[shown].astype(int)], atol=1e-6)  # elsewhere it is as it was tracked
    assert shown.mean() > 0.5
    np.testing.assert_allclose(between(ids, place[ids, None], path)[:, 0], moved[:, 0, 3])
    np.testing.assert_allclose(views_between([7], views[7:8], np.full(3, 7.0)), views[[7] * 3], atol=1e-6)


def test_the_path_turns_back_at_a_long_gap_instead_of_leaping_over_it():
    ids = [*range(0, 50), *range(67, 200)]
    assert usable_run(ids) == (67, 199) and usable_run(ids, 10) == (0, 49) and usable_run(ids, 55) == (67, 199)
    assert max(replayed_ids(ids, 500, start=10)) == 49 and min(replayed_ids(ids, 500, start=60)) == 67
    assert set(replayed_ids(ids, 600)) == set(range(67, 200))


def speech(frames=200, loud=(20, 120)):
    """Noise at -16 dB in the frames `loud`, at -66 dB elsewhere, as pieces of uneven length."""
    amplitude = np.full(frames, 0.0005)
    amplitude[slice(*loud)] = 0.16
    samples = (np.random.default_rng(0).normal(size=frames * 640) * np.repeat(amplitude, 640)).astype(np.float32)
    return np.split(samples, [1000, 50_000])


def test_levels_are_decibels_of_full_scale_whatever_the_pieces():
    levels = frame_levels(speech(), 203)
    np.testing.assert_allclose(levels[30:110], -16, atol=1.0)
    np.testing.assert_allclose(levels[130:200], -66, atol=1.0)
    assert (levels[200:] == -120).all()  # frames beyond the sound


def test_silence_is_found_with_soft_flanks_that_leave_the_words_alone():
    gate = silence(frame_levels(speech(), 200))
    assert (gate[20:120] == 0).all() and (gate[:16] == 1).all() and (gate[124:] == 1).all()
    np.testing.assert_allclose(gate[120:124], np.arange(1, 5) / (APPROACH + 1))


def test_a_short_pause_is_part_of_speech_and_a_silent_recording_is_silent():
    levels = np.full(60, -16.0)
    levels[30:35] = -80  # a plosive
    assert silence(levels).max() == 0
    assert silence(np.full(60, -90.0)).min() == 1 and len(silence(np.zeros(0))) == 0


@pytest.mark.parametrize("room", [-120.0, -66.0, -55.0])
def test_a_word_in_a_long_silence_is_speech_and_the_room_around_it_is_not(room):
    levels = np.full(1000, room)
    levels[500:530] = -16 - 5 * np.abs(np.sin(np.arange(30)))  # 3 % of the recording
    gate = silence(levels)
    assert (gate[500:530] == 0).all() and (gate[:490] == 1).all() and (gate[540:] == 1).all()


def test_a_bump_of_the_microphone_does_not_make_quiet_speech_silent():
    levels = np.full(300, -36.0)
    levels[100:103] = -1
    assert silence(levels).max() == 0


def test_the_silent_row_is_the_shut_mouth_of_the_silent_speaker():
    levels, features = frame_levels(speech(), 200), np.arange(200, dtype=np.float32)[:, None]
    jaw = np.full(200, 0.5)
    jaw[150:160] = 0.0  # silent and shut
    jaw[60:90] = 0.0  # shut, but speaking
    row = closed_mouth_row(features, levels, jaw, list(range(200)))
    assert 150 <= row[0] <= 159
    always = closed_mouth_row(features, np.full(200, -16.0), jaw, list(range(200)))  # never silent: the shut mouth decides
    assert 60 <= always[0] <= 159  # a mean of shut frames, from the speech or the rest


def test_the_gate_replaces_silent_rows_across_blocks_and_leaves_speech():
    rows, gate = np.ones((10, 2), np.float32), np.array([0, 0, 0, 0.5, 1, 1, 1, 0.5, 0, 0], np.float32)
    result = np.concatenate(list(gated(iter(np.split(rows, [3, 4])), gate, np.zeros(2, np.float32))))
    np.testing.assert_allclose(result[:, 0], 1 - gate)


@pytest.mark.parametrize("cuts", [[], [1], [4, 5], [1, 2, 3]])
def test_smoothing_is_the_same_in_any_blocks_keeps_the_count_and_does_not_lag(cuts):
    rows = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    smooth = np.concatenate(list(smoothed(iter(np.split(rows, cuts)))))
    padded = np.pad(rows, ((1, 1), (0, 0)), "edge")
    np.testing.assert_allclose(smooth, 0.65 * rows + 0.175 * (padded[:-2] + padded[2:]), atol=1e-6)


def test_blinks_come_every_few_seconds_and_can_be_counted():
    shut = blinks(25 * 120, seed=3)
    assert 20 <= blink_count(shut) <= 60 and shut.min() == 0 and shut.max() == 1
    assert (shut > 0).mean() < 0.15  # the eyes are mostly open
    np.testing.assert_array_equal(shut, blinks(25 * 120, seed=3))
    assert blink_count(np.full(100, 0.3)) == 0
