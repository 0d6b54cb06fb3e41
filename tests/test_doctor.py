"""The doctor names what is missing with its remedy; the device is the one asked for, or refused."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from utils import doctor
from utils.device import choose_device
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def report(capsys):
    """Run the doctor; its exit code and what it printed."""

    def run() -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            doctor.main()
        return end.value.code, capsys.readouterr().out

    return run


def broken_import(monkeypatch, broken: str, error: Exception) -> None:
    real = importlib.import_module

    def attempt(name: str, *args):
        if name == broken:
            raise error
        return real(name, *args)

    monkeypatch.setattr(doctor.importlib, "import_module", attempt)


def test_the_report_names_the_environment_packages_extensions_codecs_and_models(report):
    _, text = report()
    installed = f"torch {importlib.metadata.version('torch')}"  # on a GPU torch.__version__ ends in +cu130, say, and this does not
    for word in ("python:", "memory:", "disk:", "C++ compiler:", installed, "CUDA:", "diff_surfel_rasterization", "simple_knn",
                 "libx264", "aac", "face_landmarker", "whisper_tiny_en", "bfm"):  # fmt: skip
        assert word in text


def test_a_missing_package_is_named_with_its_remedy_and_fails(report, monkeypatch):
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "plyfile":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    code, text = report()
    assert code == 1
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if "plyfile is not installed" in line)
    assert lines[at].startswith("MISSING") and "pip install plyfile==" in lines[at + 1]


def test_a_package_that_cannot_be_imported_is_named_with_the_reason(report, monkeypatch):
    broken_import(monkeypatch, "soundfile", OSError("libsndfile.so: cannot open shared object file"))
    code, text = report()
    assert code == 1 and "soundfile 0" in text and "libsndfile.so: cannot open" in text


def test_a_package_for_one_option_only_is_noted_but_does_not_fail(monkeypatch):
    broken_import(monkeypatch, "face_alignment", ImportError("No module named 'face_alignment'"))
    found = [finding for finding in doctor.examine() if "face-alignment" in finding.what]
    assert [finding.state for finding in found] == [doctor.NOTE] and "fan landmarks" in found[0].what


def test_an_extension_that_is_not_built_fails_with_the_command_that_builds_it(report, monkeypatch):
    broken_import(monkeypatch, "simple_knn", ImportError("No module named 'simple_knn'"))
    code, text = report()
    assert code == 1 and "pip install submodules/simple-knn" in text


def test_another_version_than_the_tested_one_is_noted(monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "0.1" if name == "tqdm" else real(name))
    found = [finding for finding in doctor.examine() if "tqdm" in finding.what]
    assert found[0].state == doctor.NOTE and "tested with" in found[0].what


def test_a_codec_that_is_absent_fails(monkeypatch):
    import av

    monkeypatch.setattr(av, "codecs_available", {"aac"})
    found = {finding.what: finding.state for finding in doctor.examine() if finding.topic == "codec"}
    assert found == {"libx264 is not in this PyAV": doctor.MISSING, "aac": doctor.OK}


def test_the_doctor_works_where_no_package_is_installed():
    """-I -S: neither the environment's packages nor the user's."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from utils import doctor; doctor.main()"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "torch is not installed" in done.stdout and "Traceback" not in done.stderr


def test_requirements_are_pinned_exactly_and_both_builds_of_cv2_to_one_version():
    versions = doctor.requirements()
    assert all(version.count(".") >= 1 and version.replace(".", "").isdigit() for version in versions.values())
    assert versions["opencv-python"] == versions["opencv-contrib-python"]


# utils/device.py


@pytest.fixture()
def two_gpus(monkeypatch):
    """A torch that says it sees two GPUs; the list of those that were made the current one."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")


def test_auto_is_the_first_gpu_where_there_is_one(two_gpus):
    assert choose_device("auto") == torch.device("cuda:0")


def test_the_gpu_that_is_chosen_becomes_the_current_one(two_gpus):
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert two_gpus == [1]


def test_a_gpu_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: .*use --device cpu"):
        choose_device("cuda")


def test_a_gpu_beyond_the_last_is_refused(two_gpus):
    with pytest.raises(UserError, match="cuda:2: this machine has 2 GPUs"):
        choose_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cpu:1", ""])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(UserError, match="is not known"):
        choose_device(name)
