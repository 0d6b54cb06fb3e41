"""report.json and report.html: what a person needs to judge a data set, in order, and nothing that swells."""

import html.parser
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from data_utils import report
from data_utils.stage import Stage
from tests.tiny_dataset import write_tiny_dataset
from utils.files import read_json, write_json

VOID = {"meta", "img", "br", "tr", "td", "th"}  # the tags HTML lets stay open


class Parsed(html.parser.HTMLParser):
    """Checks that what is opened is closed, in order; gathers the text and the pictures."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.text, self.images, self.lines = [], [], 0, 0
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.images += tag == "img"
        self.lines += tag == "polyline"
        if tag not in VOID | {"polyline"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.lines += tag == "polyline"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


FACTS = {
    "quality": {"warnings": ["the top of the head is cut by the picture's edge", "a thing nobody foresaw",
                             "the clip is only 9 s long: sounds it lacks will be guessed"],
                "face_boxes": [[1.0, 2.0, 3.0, 4.0]] * 48},
    "audio": {"backend": "mel", "loudness_db": -20.0, "audio_offset_seconds": -0.08, "warnings": []},
    "bundle_adjustment": {"backend": "dis", "reprojection_error_px": 0.31, "still_jitter_px": 0.09, "rigid_share": 0.91,
                          "reprojection_error_all_px": 0.62, "warnings": ["points of the head miss their tracks by 2.00 px"]},
    "transforms": {"backend": "flow", "av_offset_applied": 0, "warnings": [],
                   "av_offset": {"offset": -1, "correlation": 0.5, "stability": 0.99, "curve": [0.1, 0.5, 0.1]}},
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder, report.json, page) of a small data set with records of some stages."""
    folder = write_tiny_dataset(tmp_path_factory.mktemp("report") / "a <b> & c")
    write_json(folder.valid, {"valid": list(range(2, 15)), "dropped": {
        **{str(i): "no face" for i in (0, 1, *range(15, 21))}, "21": "several faces"}})  # fmt: skip
    return folder, *write(folder, FACTS)


def write(folder, facts):
    """(report.json, page) where the stages left these facts."""
    stages = [Stage(k, name, "tests.none", (), ()) for k, name in enumerate(facts)]
    for stage in stages:
        write_json(stage.record_path(folder), {
            "stage": stage.number, "name": stage.name, "options": {}, "seconds": 1.5, "peak_memory_mb": 100.0,
            "peak_memory_is_of": "stage", "finished": "2026-01-01T00:00:00", "facts": facts[stage.name]})  # fmt: skip
    page = report.write(folder, stages, types.SimpleNamespace(video="my clip.mp4", use_3dmm=False, part="all"))
    return read_json(folder.report), page.read_text()


def test_the_worst_warning_comes_first_and_an_unknown_one_last(written):
    _, summary, page = written
    starts = [warning["text"][:12] for warning in summary["warnings"]]
    assert starts == ["points of th", "the clip is ", "the top of t", "a thing nobo"]
    assert [page.index(start) for start in starts] == sorted(page.index(start) for start in starts)


def test_lists_for_other_stages_stay_out(written):
    folder, summary, page = written
    assert "face_boxes" not in folder.report.read_text() and "face_boxes" not in page
    assert read_json(folder.state / "quality.json")["facts"]["face_boxes"]


def test_the_figures_say_what_the_stages_found(written):
    _, summary, page = written
    figures = summary["figures"]
    assert (figures["reprojection_error_px"], figures["jitter_px"], figures["loudness_db"]) == (0.31, 0.09, -20.0)
    assert (figures["av_offset_frames"], figures["av_offset_of_time_stamps"], figures["av_offset_measured_beyond"]) == (-3, -2, -1)
    assert "-3 frames: -2 by its time stamps" in page
    assert (figures["reprojection_error_all_px"], figures["rigid_share"]) == (0.62, 0.91) and "0.62 px" in page and "91%" in page


@pytest.mark.parametrize(("backend", "error", "range_mm"), [("flow", 0.31, 20), ("3dmm", 0.77, 60)])
def test_figures_warnings_and_curves_are_of_the_pose_that_the_transforms_hold(tmp_path, backend, error, range_mm):
    """A folder that was made both ways has both files."""
    folder = write_tiny_dataset(tmp_path / "both")
    write_json(folder.valid, {"valid": list(range(22)), "dropped": {}})
    for path, unit in ((folder.bundle_adjustment, 0.01), (folder.track_params, 0.3)):  # m and dm
        place = torch.linspace(-unit, unit, 22)[:, None].repeat(1, 3)
        torch.save({"euler": torch.zeros(22, 3), "trans": place, "focal": torch.ones(1)}, path)
    tracking, transforms = {"backend": "mesh", "rigid_error_px": 0.77}, {**FACTS["transforms"], "backend": backend}
    facts = FACTS | {"face_tracking": tracking, "transforms": transforms}
    summary, page = write(folder, facts)
    assert summary["figures"]["reprojection_error_px"] == error
    assert ("miss their tracks" in page) == (backend == "flow") and len(summary["stages"]) == len(facts)
    curve = page[page.index("mm from the median") - 200 :]
    assert f">{range_mm / 2:.3g}<" in curve and f">-{range_mm / 2:.3g}<" in curve


def test_the_page_is_whole_names_are_escaped_and_every_reason_of_a_drop_is_shown(written):
    folder, summary, page = written
    parsed = Parsed(page)
    text = " ".join(parsed.text)
    assert "a <b> & c" in text and "<b>" not in page
    assert "no face" in text and "frame 21: several faces" in text
    assert parsed.images == 2 * report.SHOWN + 7  # frames with landmarks and masks, six without a face, one with several
    assert parsed.lines == 1 + 1 + 3  # level, lips by offset, three expressions
    assert summary["next"].startswith("python train.py") and "--part all" in summary["next"]
    assert summary["dropped"] == {"no face": 8, "several faces": 1}


def test_every_warning_of_the_stages_has_its_place_in_the_order():
    """The phrases of COSTS stand in the sources of the stages, so that a reworded warning is noticed."""
    sources = "".join(path.read_text() for path in Path(report.__file__).parent.rglob("*.py") if path.name != "report.py")
    assert [phrase for phrase in report.COSTS if phrase not in sources] == []


def test_curves_of_a_long_clip_stay_small():
    drawn = report._curves(np.random.default_rng(0).normal(size=(40_000, 3)), ("a", "b", "c"), "px")
    assert drawn.count("<polyline") == 3 and len(drawn) < 60_000
