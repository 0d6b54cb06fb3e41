"""What a preprocessing stage is, when it is stale, and the record it leaves in `.state/` once it is done."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from utils.dataset_folder import DatasetFolder
from utils.files import read_json, sha256, write_json

VIDEO = "video"  # the name of the source clip among a stage's inputs

# option that chooses a back end -> where its table stands, and whether the best comes first (1) or last (-1)
BACKENDS = {
    "audio": ("utils.speech", "ENCODERS", 1), "parsing": ("data_utils.face_parsing", "BACK_ENDS", 1),
    "landmarks": ("data_utils.landmarks", "BACKENDS", 1), "face_model": ("data_utils.face_tracking.facemodel", "BACKENDS", -1),
    "flow": ("data_utils.optical_flow", "BACKENDS", -1), "blendshapes": ("data_utils.blendshape_capture", "BACKENDS", 1),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Stage:
    """One row of the table in process.py.

    `module` has `run(folder, options) -> dict` (JSON-able facts; "backend" and "warnings" are read by the report) and may have
    `VERSION`, an int to raise when its results change. Inputs and outputs are paths or globs relative to the data set folder,
    or "video"; an input ending in "?" is used where it exists. `options` are the fields of the command line that matter.
    """

    number: int
    name: str
    module: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    options: tuple[str, ...] = ()

    def load(self) -> ModuleType:
        return importlib.import_module(self.module)

    def record_path(self, folder: DatasetFolder) -> Path:
        return folder.state / f"{self.name}.json"

    def record(self, folder: DatasetFolder) -> dict[str, Any] | None:
        """What the finished stage left, or None."""
        path = self.record_path(folder)
        return read_json(path) if path.exists() else None


def why_stale(stage: Stage, folder: DatasetFolder, options: argparse.Namespace) -> str | None:
    """Why the stage has to run, as a clause; None if its outputs are up to date."""
    record = stage.record(folder)
    if record is None:
        return "not done yet"
    if record["version"] != _version(stage):
        return "its code changed"
    for name, value in _options(stage, options).items():
        before = record["options"].get(name, False)  # a switch that came since the record was off
        if value != before and not (before == "auto" and value == record["facts"].get("backend")):
            return f"--{name} was {before}, now {value}"
        if value == "auto" and (better := _better_backend(name, record["facts"].get("backend"))):
            return f"{better} is there now, which is better than {record['facts']['backend']}"
    for pattern, digest in inputs_digest(stage, folder, options).items():
        if record["inputs"].get(pattern) != digest:
            return f"{pattern} changed"
    for pattern, count in record["outputs"].items():
        if len(_matches(folder, pattern)) < count:
            return f"{pattern} is missing or incomplete"
    return None


def _better_backend(option: str, used: str | None) -> str | None:
    """A back end that "auto" would prefer to `used` today: its weights came after the stage ran. (Not: one that went away.)"""
    if option not in BACKENDS:
        return None
    module, table, order = BACKENDS[option]
    table = getattr(importlib.import_module(module), table)
    ranked = list(table.values() if isinstance(table, dict) else table)[::order]
    names = [backend.name for backend in ranked]
    if used not in names:
        return None
    return next((backend.name for backend in ranked[: names.index(used)] if backend.available()), None)


def run_stage(stage: Stage, folder: DatasetFolder, options: argparse.Namespace) -> dict[str, Any]:
    """Run a stage and record it: done only at its end, so that a kill at any moment leaves it to be run again.

    A stage that was begun with the same inputs and options finds its files of last time and may go on from them; files of any
    other attempt are removed first, so that no frame of an older clip stays behind.
    """
    key = {"version": _version(stage), "options": _options(stage, options), "inputs": inputs_digest(stage, folder, options)}
    begun = folder.state / f"{stage.name}.begun.json"
    goes_on = not options.force and begun.exists() and read_json(begun) == key
    _remove_frames(stage, folder, finished=not goes_on)
    stage.record_path(folder).unlink(missing_ok=True)
    if stage.outputs:  # a stage that writes nothing leaves nothing behind when it refuses a clip, not even a folder
        write_json(begun, key)
    reset = _reset_peak_memory()
    start = time.monotonic()
    facts = json.loads(json.dumps(stage.load().run(folder, options), default=_plain))
    seconds = time.monotonic() - start
    outputs = {pattern: len(_matches(folder, pattern)) for pattern in stage.outputs}
    for pattern, count in outputs.items():
        if not count:
            raise RuntimeError(f"stage {stage.number} ({stage.name}) ended without writing {folder.root / pattern}")
    record = {
        "stage": stage.number, "name": stage.name, **key, "outputs": outputs, "facts": facts, "seconds": round(seconds, 2),
        "peak_memory_mb": _peak_memory_mb(), "peak_memory_is_of": "stage" if reset else "process",
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }  # fmt: skip
    write_json(stage.record_path(folder), record)
    begun.unlink(missing_ok=True)
    return record


def require_inputs(stage: Stage, folder: DatasetFolder) -> None:
    """Raises UserError naming the first missing input and the stage that makes it."""
    for pattern in stage.inputs:
        if pattern != VIDEO and not pattern.endswith("?") and not _matches(folder, pattern):
            folder.require(folder.root / pattern)


def inputs_digest(stage: Stage, folder: DatasetFolder, options: argparse.Namespace) -> dict[str, str]:
    """Digest of each input: of the content of a file, of the names and sizes of many. Copying a data set keeps it."""
    digests = {}
    for pattern in stage.inputs:
        if pattern == VIDEO:
            digests[pattern] = video_digest(options.video)
            continue
        files = _matches(folder, pattern.rstrip("?"))
        if "*" in pattern:
            listing = "\n".join(f"{path.name} {path.stat().st_size}" for path in sorted(files))
            digests[pattern] = f"{len(files)} files {hashlib.sha256(listing.encode()).hexdigest()[:16]}"
        else:
            digests[pattern] = sha256(files[0])[:16] if files else "absent"
    return digests


def video_digest(path: Path) -> str:
    """Of size, first and last megabyte: the same clip is known again wherever it lies, without reading gigabytes."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(1 << 20))
        file.seek(max(0, size - (1 << 20)))
        digest.update(file.read())
    return f"{size} bytes {digest.hexdigest()[:16]}"


def _matches(folder: DatasetFolder, pattern: str) -> list[Path]:
    return list(_iterate(folder.root, pattern))


def _iterate(root: Path, pattern: str) -> Iterator[Path]:
    directory, _, name = pattern.rpartition("/")
    if "*" not in name:
        if (root / pattern).exists():
            yield root / pattern
        return
    for path in (root / directory).glob(name):
        if not path.name.startswith("."):  # an unfinished file of utils.files.atomic_path
            yield path


def _remove_frames(stage: Stage, folder: DatasetFolder, finished: bool) -> None:
    """Remove what a kill left unfinished among the per-frame files of a stage, and if wanted the finished ones."""
    for pattern in stage.outputs:
        directory, _, name = pattern.rpartition("/")
        if directory and name.startswith("*"):
            for path in (folder.root / directory).glob(name):
                if ".part" in path.name or (finished and path.stem.isdecimal()):
                    path.unlink()


def _plain(value: Any) -> Any:
    """numpy and path values of a stage's facts as JSON has them."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a stage's facts hold a {type(value).__name__}, which is not JSON")


def _version(stage: Stage) -> int:
    return getattr(stage.load(), "VERSION", 1)


def _options(stage: Stage, options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in stage.options}


def _reset_peak_memory() -> bool:
    """Linux only: forget the high-water mark of this process, so that the next reading is the stage's own."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_memory_mb() -> float:
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return round(int(line.split()[1]) / 1024, 1)
    import resource  # POSIX only

    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)


def free_space(folder: Path) -> int:
    """Bytes free on the disk that holds `folder` (which need not exist yet)."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


