"""benchmarks/speed.py runs on a trained and on a random head and says what it measured."""

import json

from test_render import dataset, model, trained  # noqa: F401  fixtures

from benchmarks import speed

PARTS = ("encode", "backdrop decode", "deformation", "raster", "raster + 4 attention maps", "composite, to host")
SPEEDS = ("network + raster", "network + raster, attention", "to memory", "to mp4", "to mp4, attention")


def test_every_part_of_a_trained_head_is_timed_and_kept_for_metrics(model, capsys):  # noqa: F811
    speed.main(["-m", str(model), "--batch", "1", "3", "--frames", "7", "--repeats", "1", "--device", "cpu"])
    table = capsys.readouterr().out
    facts = json.loads((model / "speed.json").read_text())
    assert facts["iteration"] == 7 and facts["size"] == [64, 64] and set(facts["batch"]) == {"1", "3"}
    for column in facts["batch"].values():
        assert set(column["ms"]) == set(PARTS) and set(column["fps"]) == set(SPEEDS)
        assert all(value > 0 for group in column.values() for value in group.values())
    assert all(name in table for name in (*PARTS, *SPEEDS, "batch 3", "MiB"))


def test_a_random_head_needs_no_model_and_no_data(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    speed.main(["--surfels", "300", "--size", "32", "--batch", "2", "--frames", "4", "--repeats", "1", "--device", "cpu"])
    assert "300 surfels, 32x32" in capsys.readouterr().out and list(tmp_path.iterdir()) == []
