"""The table of outcomes in docs/preprocessing.md: every real clip is usable, or refused with the true reason.

SGT_SLOW=1 also processes every usable clip to the end, at 256 pixels, and takes first training steps from it (half an hour).
"""

import os
import re
from pathlib import Path

import pytest
from test_train import SMALL

import train
from data_utils import process
from data_utils.quality import check
from utils.errors import UserError
from utils.files import read_json

# clip -> side of the window in source pixels, or what the refusal says
OUTCOMES = {
    "WDA_AlexandriaOcasioCortez_000": 512,
    "dfrf_cnn2_25fps": 512,
    "dfrf_french": 512,
    "hard_hamilton_cuts_noface": r"a face is seen in only \d+ of 48 .* the scene changes at least \d",
    "hard_iplap_129_tightcrop_noaudio": "no audio track",
    "hard_lp_d3_yaw_silent": "sound is silent",
    "latentsync_demo1": 614,
    "marlin_video02": 558,
    "marlin_video03": 136,
    "marlin_video05": r"only 3\.0 s long",
    "real3d_May_5s": 512,
    "retalking_face1": 512,
    "styletalk_KristiNoem_muxed": 256,
    "styletalk_Obama_clip1_muxed": 256,
    "styletalk_feifeili_clip1_muxed": 256,
    "styletalk_reagan_clip1_muxed": 256,
    "synctalk_short_demo": 512,
}
USABLE = [name for name, outcome in OUTCOMES.items() if isinstance(outcome, int)]


@pytest.mark.parametrize("name", OUTCOMES)
def test_a_real_clip_is_usable_or_refused_with_the_true_reason(shared, name):
    clip, outcome = shared / "videos" / f"{name}.mp4", OUTCOMES[name]
    if isinstance(outcome, int):
        side = check(clip, 512, 1.0, force=False).facts["crop"]["side"]
        assert abs(side - outcome) <= 0.04 * outcome
    else:
        with pytest.raises(UserError, match=f"{re.escape(name)}.mp4 cannot become a talking head: .*{outcome}"):
            check(clip, 512, 1.0, force=False)


def test_the_table_names_every_clip_with_its_outcome(shared):
    assert {path.stem for path in (shared / "videos").glob("*.mp4")} == set(OUTCOMES)
    document = (Path(__file__).parents[1] / "docs" / "preprocessing.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")[1:3]] for line in document.splitlines() if line.startswith("| ")]
    rows = {name: outcome for name, outcome in cells if outcome in ("usable", "refused")}
    for name, outcome in OUTCOMES.items():
        assert rows.get(name) == ("usable" if isinstance(outcome, int) else "refused"), name


@pytest.mark.skipif(not os.environ.get("SGT_SLOW"), reason="half an hour; set SGT_SLOW=1")
@pytest.mark.parametrize("name", USABLE)
def test_a_usable_clip_becomes_a_data_set_that_trains(shared, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    process.main([str(shared / "videos" / f"{name}.mp4"), "--size", "256"])
    summary = read_json(Path("data") / name / "report.json")
    assert summary["complete"] and summary["valid"] >= 0.6 * summary["frames"]
    train.main(["-s", f"data/{name}", "--model_path", "m", *SMALL, "--iterations", "4", "--coarse_iterations", "2"])
    assert (tmp_path / "m" / "point_cloud" / "iteration_4" / "point_cloud.ply").exists()
    print(name, summary["valid"], summary["frames"], summary["figures"], [warning["text"] for warning in summary["warnings"]])
