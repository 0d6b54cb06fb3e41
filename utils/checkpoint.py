"""chkpnt_N.pt: everything an interrupted training run needs to continue as if nothing had happened."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import torch

from utils.errors import UserError
from utils.files import atomic_path

KEPT = 2  # the newest checkpoints that stay on disk


def _checkpoints(model_path: Path) -> list[tuple[int, Path]]:
    found = [(re.fullmatch(r"chkpnt_(\d+)\.pt", path.name), path) for path in Path(model_path).glob("chkpnt_*.pt")]
    return sorted((int(match[1]), path) for match, path in found if match)


def latest_checkpoint(model_path: Path) -> Path | None:
    found = _checkpoints(model_path)
    return found[-1][1] if found else None


def save_checkpoint(model_path: Path, head: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    """Write chkpnt_<iteration>.pt (tensors and plain values only) and delete all but the newest ones.

    There is no random state to keep: a step draws its numbers from seed and iteration (train.py).
    """
    path = Path(model_path) / f"chkpnt_{head.iteration}.pt"
    with atomic_path(path) as temporary:
        torch.save({"iteration": head.iteration, "head": head.state_dict(), "optimizer": optimizer.state_dict()}, temporary)
    for _, old in _checkpoints(model_path)[:-KEPT]:
        old.unlink()
    return path


def load_checkpoint(path: Path) -> dict:
    """Raises UserError if the file is truncated or no checkpoint of ours; nothing in it is executed."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not {"iteration", "head", "optimizer"} <= set(state):
            raise ValueError("entries are missing")
    except (RuntimeError, ValueError, TypeError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is damaged ({reason}); delete it, training continues from the one before") from None
    return state
