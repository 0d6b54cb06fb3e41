"""Two measured models side by side: their results in one table, and the frames where either does worst in one picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from utils.contact_sheet import fit, grid, label
from utils.errors import UserError
from utils.files import read_json, writable
from utils.image import read_rgb, write_rgb

APART = 8  # frames between two of the sheet: neighbours look alike
TILE = 256  # height of a picture of the sheet


def measured(model: Path, split: str, iteration: int) -> tuple[Path, dict, dict]:
    """(rendered folder, results, per-view values) of what metrics.py measured last, or of `iteration`. Raises UserError."""
    path = Path(model) / "results.json"
    results = read_json(path) if path.exists() else {}
    suffix = "" if split == "test" else f"_{split}"
    found = {value["protocol"]["iteration"]: key for key, value in results.items()
             if isinstance(value, dict) and value.get("protocol", {}).get("split") == split}  # fmt: skip
    wanted = max(found, default=None) if iteration < 0 else iteration
    if wanted not in found:
        raise UserError(f"{model} was not measured{'' if iteration < 0 else f' at iteration {iteration}'}; "
                        f"run metrics.py -m {model}{f' --split {split}' if suffix else ''} first")  # fmt: skip
    key = found[wanted]
    return Path(model) / split / f"ours_{wanted}", results[key], read_json(Path(model) / "per_view.json")[key]


def side_by_side(a: dict, b: dict, rows: tuple[tuple[str, str, str], ...]) -> list[str]:
    """Lines "name, value of A, value of B, B - A, unit"; * marks the better one where one is better.

    rows: (name, unit, better), where better is "higher", "lower", "0" or "1" to be near to, or anything else for neither.
    """
    lines = [f"{'':20} {'A':>10}  {'B':>10}  {'B - A':>10}"]
    for name, unit, better in rows:
        values = a.get(name), b.get(name)
        if None in values:
            shown = "  ".join(f"{'none' if v is None else f'{v:.4g}':>9} " for v in values)
            lines.append(f"{name:20} {shown}  {'':10} {unit}")
            continue
        cost = {"higher": lambda v: -v, "lower": lambda v: v, "0": abs, "1": lambda v: abs(v - 1)}.get(better, lambda v: 0.0)
        distance = [cost(v) for v in values]
        marks = ["*" if x < y else " " for x, y in (distance, distance[::-1])]
        lines.append(f"{name:20} {values[0]:>9.4g}{marks[0]}  {values[1]:>9.4g}{marks[1]}  {values[1] - values[0]:>+10.3g} {unit}")
    return lines


def worst_frames(a: dict[str, float], b: dict[str, float], count: int) -> list[str]:
    """Up to `count` names, in order, of the frames where the lower of two per-view values is lowest, some frames apart."""
    names = [name for name in a if name in b and a[name] is not None and b[name] is not None]
    chosen: list[str] = []
    for name in sorted(names, key=lambda name: min(a[name], b[name])):
        if all(abs(int(name[:-4]) - int(other[:-4])) >= APART for other in chosen):
            chosen.append(name)
        if len(chosen) == count:
            break
    return sorted(chosen)


def compare(models: tuple[Path, Path], rows: tuple[tuple[str, str, str], ...], split: str = "test", iteration: int = -1,
            count: int = 8) -> tuple[list[str], Path]:  # fmt: skip
    """Lines of the table, and the sheet <A>/compare_<B>.png: A, B and what was filmed, of the worst frames by PSNR_head.

    Raises UserError if a model was not measured, or other frames were.
    """
    (folder_a, a, views_a), (folder_b, b, views_b) = (measured(model, split, iteration) for model in models)
    facts = [read_json(folder / "frames.json") for folder in (folder_a, folder_b)]
    if facts[0]["ids"] != facts[1]["ids"]:
        raise UserError(f"{models[0]} and {models[1]} were measured on different frames; render and measure both on one data set")
    if a["protocol"]["size"] != b["protocol"]["size"]:
        sizes = " and ".join("x".join(map(str, m["protocol"]["size"])) for m in (a, b))
        raise UserError(f"{models[0]} and {models[1]} have frames of {sizes}: measure both at one size")
    sheet = writable(Path(models[0])) / f"compare_{Path(models[1]).resolve().name}.png"
    tiles = []
    for name in worst_frames(views_a["PSNR_head"], views_b["PSNR_head"], count):
        pictures = [folder_a / "renders" / name, folder_b / "renders" / name, folder_a / "gt" / name]
        shown = [fit(image, round(TILE * image.shape[1] / image.shape[0]), TILE) for image in map(read_rgb, pictures)]
        texts = [f"A {name[:-4]}: {views_a['PSNR_head'][name]:.1f} dB", f"B: {views_b['PSNR_head'][name]:.1f} dB", "filmed"]
        tiles.append(np.concatenate([label(image, text) for image, text in zip(shown, texts, strict=True)], axis=1))
    write_rgb(sheet, grid(tiles, 2))
    return side_by_side(a, b, rows), sheet
