"""Weights that others trained: read without executing anything in them, and taken only if they fit to the last tensor."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils import model_store
from utils.errors import UserError

_COUNTER = "num_batches_tracked"  # of batch norms; absent from old checkpoints, and of no use in inference


def read_tensors(path: Path, model: str) -> dict[str, Tensor]:
    """All tensors of a .pth file, nested dictionaries flattened with dots ("net_C.fnet.conv1.weight"); other values are left out.

    `model` is the name in utils.model_store, for the remedy. Raises UserError, in one sentence, if the file is cut short, no
    torch file, or holds anything but tensors and plain values.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise many kinds; what matters is that nothing in the file was run
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        fault = f"holds code ({foreign[1]}), which was not run" if foreign else "is cut short or no file of torch"
        raise UserError(f"{path} {fault}; delete it and get {model} again: {model_store.remedy(model)}") from None
    return dict(_tensors(content, ""))


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _tensors(part, f"{name}.{key}" if name else str(key))


def load_strictly(network: nn.Module, tensors: dict[str, Tensor], path: Path, model: str) -> None:
    """Fill `network` with `tensors`: exactly its names and shapes, all numbers finite. Raises UserError in one sentence."""
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(_COUNTER)}
    expected = {name: tensor for name, tensor in network.state_dict().items() if not name.endswith(_COUNTER)}
    faults = []
    for names, what in ((expected.keys() - tensors.keys(), "missing"), (tensors.keys() - expected.keys(), "unknown")):
        if names:
            faults.append(f"{len(names)} of its tensors {'is' if len(names) == 1 else 'are'} {what} (first {min(names)})")
    for name in sorted(expected.keys() & tensors.keys()):
        if tensors[name].shape != expected[name].shape:
            faults.append(f"{name} is {_size(tensors[name])} where {_size(expected[name])} is wanted")
            break
        if not tensors[name].isfinite().all():
            faults.append(f"{name} holds numbers that are not finite")
            break
    if faults:
        raise UserError(f"{path} does not fit {model}: {', '.join(faults)}; put the right file there ({model_store.remedy(model)})")
    network.load_state_dict(tensors, strict=False)  # all but the counters, as just checked


def _size(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a number"
