"""Lips and sound in time: the offset is found, told, and carried by the rows of the transforms, not by new files."""

import argparse
import itertools

import numpy as np
import pytest
import torch
from tiny_dataset import write_tiny_dataset

import render
from data_utils import transforms
from data_utils.av_offset import ENOUGH, REACH, estimate
from data_utils.demo_head.voice import speak
from data_utils.landmarks import IBUG_68, FaceLandmarker, to_68
from scene.condition import AUDIO_WINDOW
from scene.talking_dataset_readers import TalkingDatasetReader
from utils.audio import load_audio, save_wav
from utils.constants import SAMPLES_PER_FRAME
from utils.dataset_folder import DatasetFolder
from utils.files import read_json, write_json, write_npz
from utils.image import write_rgb
from utils.image_metrics import INNER_LIP_PAIRS, OUTER_EYE_CORNERS, lip_opening
from utils.video import probe, read_frames


@pytest.fixture(scope="module")
def speech():
    """(samples, jaw opening a frame) of the synthetic head saying 12 s of words."""
    utterance = speak(12.0, seed=1)
    return utterance.samples, utterance.articulation[:, 0].astype(np.float32)


def moved(samples: np.ndarray, frames: int) -> np.ndarray:
    """The sound `frames` later (earlier, if negative)."""
    shift = frames * SAMPLES_PER_FRAME
    return np.concatenate([np.zeros(shift, np.float32), samples]) if shift >= 0 else samples[-shift:]


@pytest.mark.parametrize("frames", [-4, -1, 0, 4])
def test_sound_that_is_some_frames_late_or_early_is_found_out(speech, frames):
    samples, opening = speech
    found = estimate(moved(samples, frames), opening)
    assert found.offset == -frames and found.sure
    assert len(found.curve) == 2 * REACH + 1 and max(found.curve) == found.correlation > 0.7


def test_frames_without_a_face_do_not_disturb(speech):
    samples, opening = speech
    opening = opening.copy()
    opening[60:90] = np.nan
    found = estimate(moved(samples, 3), opening)
    assert abs(found.offset + 3) <= 1 and found.sure


def test_sound_of_other_words_gives_no_sure_offset(speech):
    assert not estimate(speak(12.0, seed=5).samples, speech[1]).sure


def test_a_clip_too_short_or_without_speech_gives_none(speech):
    samples, opening = speech
    assert estimate(samples, opening[: ENOUGH - 1]) is None
    assert estimate(np.zeros_like(samples), opening) is None
    assert estimate(samples, np.full_like(opening, 0.1)) is None


@pytest.fixture
def folder(tmp_path, speech) -> DatasetFolder:
    """What stage 10 reads of a clip whose sound comes 4 frames late."""
    samples, opening = speech
    folder = DatasetFolder(tmp_path / "late")
    count = len(opening)
    write_rgb(folder.frame(0), np.zeros((32, 32, 3), np.uint8))
    write_json(folder.valid, {"valid": list(range(count)), "dropped": {}})
    torch.save({"euler": torch.zeros(count, 3), "trans": torch.tensor([[0.0, 0, -0.7]]).expand(count, 3).clone(),
                "focal": torch.tensor([60.0])}, folder.bundle_adjustment)  # fmt: skip
    points = np.zeros((count, 478, 3), np.float32)
    points[:, IBUG_68[OUTER_EYE_CORNERS[1]], 0] = 10
    for _, lower in INNER_LIP_PAIRS:
        points[:, IBUG_68[lower], 1] = 10 * opening
    write_npz(folder.face_landmarks, found=np.ones(count, bool), points=points,
              blendshapes=np.zeros((count, 52), np.float32), faces=np.ones(count, np.uint8))  # fmt: skip
    save_wav(folder.audio, moved(samples, 4))
    return folder


def rows(folder: DatasetFolder) -> set[int]:
    tables = [read_json(folder.transforms(split))["frames"] for split in ("train", "val")]
    return {frame["aud_id"] - frame["img_id"] for frame in itertools.chain(*tables)}


def test_stage_10_moves_the_sound_and_says_so(folder):
    facts = transforms.run(folder, argparse.Namespace(use_3dmm=False, av_offset="auto"))
    assert rows(folder) == {4} and facts["av_offset_applied"] == -4 and facts["av_offset"]["offset"] == -4
    (warning,) = facts["warnings"]
    assert "4 frames late" in warning and "--av_offset 0" in warning


def test_an_offset_given_by_the_user_is_obeyed_and_doubted(folder):
    facts = transforms.run(folder, argparse.Namespace(use_3dmm=False, av_offset=0))
    assert rows(folder) == {0} and "--av_offset -4" in facts["warnings"][0]


def test_one_frame_is_left_alone(folder, speech):
    save_wav(folder.audio, moved(speech[0], 1))
    facts = transforms.run(folder, argparse.Namespace(use_3dmm=False, av_offset="auto"))
    assert rows(folder) == {0} and facts["av_offset"]["offset"] == -1 and facts["warnings"] == []


def test_training_and_rendering_use_the_row_and_the_sound_that_belong_to_a_frame(tmp_path):
    folder = write_tiny_dataset(tmp_path / "tiny")
    for split in ("train", "val"):
        table = read_json(folder.transforms(split))
        for frame in table["frames"]:
            frame["aud_id"] = frame["img_id"] + 2
        write_json(folder.transforms(split), table)
    save_wav(folder.audio, np.repeat(np.arange(22) / 50, SAMPLES_PER_FRAME))
    reader = TalkingDatasetReader(folder.root)
    np.testing.assert_array_equal(reader.conditions([5, 9]).audio[:, AUDIO_WINDOW // 2], reader.audio[[7, 11]])
    np.testing.assert_array_equal(reader.conditions([5], [3]).audio[:, AUDIO_WINDOW // 2], reader.audio[[3]])
    sound = np.concatenate(list(render.split_clip(reader, "test", "tiny", False).sound.blocks()), 1)
    heard = np.round(sound.reshape(-1, SAMPLES_PER_FRAME)[:, 300] * 50).astype(int)
    assert heard.tolist() == [i + 2 if i + 2 < 22 else 0 for i in reader.splits["val"]]


def test_the_sound_of_the_french_clip_starts_3_frames_early_within_one(shared):
    """The container tells two of them, and stage 1 places the sound by it; what is measured comes on top."""
    from data_utils.audio import aligned

    path = shared / "videos" / "dfrf_french.mp4"
    told = probe(path).audio_offset
    samples = aligned(load_audio(path), told)
    marks = []
    with FaceLandmarker(video=True) as landmarker:
        for image in itertools.islice(read_frames(path), 300):
            marks.append(to_68(landmarker.detect(image)[0].points))
    found = estimate(samples, lip_opening(np.array(marks)))
    assert found.sure and abs(round(25 * told) + found.offset + 3) <= 1
