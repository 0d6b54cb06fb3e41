"""Files appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` (same suffix); it is renamed to `path` on success and removed on failure.

    Raises UserError if a folder has that name.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is to be written, but a folder of that name is there; move it away")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def writable(folder: Path) -> Path:
    """`folder`, made if need be. Raises UserError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK) else "no permission"
    except OSError as error:
        reason = error.strerror
    if reason:
        raise UserError(f"nothing can be written into {folder} ({reason}); free that name, or copy the model to a folder of yours")
    return folder


def write_bytes(path: Path, data: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Raises UserError if the file is absent or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); delete it and run the step that writes it again") from None


def write_npy(path: Path, array: np.ndarray) -> None:
    with atomic_path(path) as temporary:
        np.save(temporary, array, allow_pickle=False)


def read_npy(path: Path) -> np.ndarray:
    """Raises UserError if the file is absent or no plain array (pickles are refused)."""
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} is not a plain numpy array ({error})") from None


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    with atomic_path(path) as temporary:
        np.savez_compressed(temporary, **arrays)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of the file. Raises UserError if it is absent or damaged (pickles are refused)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run the step that writes it again") from None


def write_tensors(path: Path, tensors: dict[str, Any]) -> None:
    """A dict of tensors (or arrays), all as float32, for torch.load(weights_only=True). The same values give the same bytes."""
    import torch  # slow to import, and many who write files do without

    data = io.BytesIO()  # torch.save writes the name of a file into it, here of a temporary one
    torch.save({name: torch.as_tensor(value, dtype=torch.float32) for name, value in tensors.items()}, data)
    write_bytes(path, data.getvalue())


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
