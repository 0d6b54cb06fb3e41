"""report.json and report.html: what ran, with what, how long, what was dropped and why, and what the result looks like."""

from __future__ import annotations

import argparse
import base64
import html
import io
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import soundfile
from PIL import Image

from data_utils.audio import levels
from data_utils.landmarks import draw
from data_utils.stage import Stage
from data_utils.transforms import METRES_PER_UNIT, pose_file
from utils.constants import CLOTH, FPS, HAIR, NECK_CLASSES
from utils.dataset_folder import DatasetFolder
from utils.files import read_json, read_npy, write_bytes, write_json
from utils.image import read_parsing, read_rgb

THUMBNAIL, SHOWN, DROPPED_SHOWN = 224, 8, 12
MOST_ITEMS = 24  # of a list or table among a stage's facts: longer ones are for other stages, not for people
TINTS = {"face": (60, 140, 255), "hair": (200, 90, 255), "neck": (60, 220, 120), "cloth": (255, 90, 70)}
COLOURS = ("#3b7dd8", "#d8693b", "#3ba55d")

# What a warning will cost, worst first: the first phrase a warning holds gives its place. What spoils every frame of the result
# stands before what spoils some, and what is seen in the mouth and the head's hold before what is seen at the rim.
COSTS = (
    "two faces of like size", "the scene changes", "is silent", "speech will be out of time", "a face is seen in only",
    "miss their tracks", "could be followed", "misses the landmarks", "the face is only", "to the lips and was",
    "sounds it lacks will be guessed", "very quiet", "speech features are", "are left out", "camera or background moves",
    "is turned more than", "no blink is seen", "is clipped", "shorter than the picture", "nothing is heard", "top of the head",
    "expression at its bound", "no neck is visible", "of the background was ever seen", "a second face", "no aud.wav",
)  # fmt: skip

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;width:100%}td,th{padding:.25em .6em;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums}.row{display:flex;flex-wrap:wrap;gap:8px}figure{margin:0}
figcaption{font-size:12px;color:#666}.warning{background:#fff3d6;padding:.3em .8em;margin:.3em 0;border-left:4px solid #e0a000}
.facts{font-size:12px;color:#555;overflow-wrap:anywhere}
pre{background:#f4f4f4;padding:.6em;overflow-x:auto}svg{width:100%;height:auto;background:#fafafa}"""


def write(folder: DatasetFolder, stages: Sequence[Stage], options: argparse.Namespace) -> Path:
    """Write both files from the stages' records and what lies in the folder; the path of the page."""
    records = [record for stage in stages if (record := stage.record(folder))]
    tracked = pose_file(folder) == folder.track_params  # of a bundle adjustment that is not used, figures and warnings say nothing
    used = [record for record in records if not (tracked and record["name"] == "bundle_adjustment")]
    needed = [stage for stage in stages if not (options.use_3dmm and stage.name == "bundle_adjustment")]
    done = len([stage for stage in needed if stage.record(folder)]) == len(needed)
    facts = {record["name"]: record["facts"] for record in used}
    summary = {
        "data_set": str(folder.root), "video": str(options.video), "complete": done, "next": next_command(folder, options, done),
        "warnings": _warnings(used), **_frames_summary(folder), "figures": _figures(facts),
        "stages": [{**{key: record[key] for key in ("stage", "name", "options", "seconds", "peak_memory_mb", "peak_memory_is_of",
                                                    "finished")},
                    "facts": {key: value for key, value in record["facts"].items() if not _bulky(value)}} for record in records],
    }  # fmt: skip
    write_json(folder.report, summary)
    page = folder.report.with_suffix(".html")
    write_bytes(page, _page(folder, summary).encode())
    return page


def _bulky(value: Any) -> bool:
    return isinstance(value, (list, dict)) and len(value) > MOST_ITEMS


def _warnings(records: list[dict]) -> list[dict[str, str]]:
    """What every stage warned of, by what it will cost."""
    found = [{"stage": record["name"], "text": text} for record in records for text in record["facts"].get("warnings", [])]
    return sorted(found, key=lambda warning: next((k for k, phrase in enumerate(COSTS) if phrase in warning["text"]), len(COSTS)))


def _figures(facts: dict[str, dict]) -> dict[str, Any]:
    """The few numbers that say how good a data set is; None where the stage has not run or could not tell.

    av_offset_frames: where the sound has to begin against the first picture, in frames; the sum of what the container's time
    stamps tell (corrected by stage 1) and of what lips and sound tell beyond (corrected by stage 10 as av_offset_applied says).
    """
    audio, transforms = facts.get("audio", {}), facts.get("transforms", {})
    pose = facts.get("bundle_adjustment") or facts.get("face_tracking", {})
    told = round(FPS * audio["audio_offset_seconds"]) if "audio_offset_seconds" in audio else None
    measured = transforms.get("av_offset")
    return {
        "reprojection_error_px": pose.get("reprojection_error_px", pose.get("rigid_error_px")),
        "reprojection_error_all_px": pose.get("reprojection_error_all_px"),
        "rigid_share": pose.get("rigid_share"),
        "jitter_px": pose.get("still_jitter_px"),
        "loudness_db": audio.get("loudness_db"),
        "av_offset_frames": told + measured["offset"] if told is not None and measured else None,
        "av_offset_of_time_stamps": told,
        "av_offset_measured_beyond": measured["offset"] if measured else None,
        "av_offset_correlation": measured["correlation"] if measured else None,
        "av_offset_stability": measured["stability"] if measured else None,
        "av_offset_applied": transforms.get("av_offset_applied"),
    }


def next_command(folder: DatasetFolder, options: argparse.Namespace, done: bool) -> str:
    """What to type next: training, or the rest of the preprocessing."""
    if not done:
        return f"python data_utils/process.py {options.same_again}"
    part = "" if options.part == "head" else f" --part {options.part}"
    return f"python train.py -s {shlex.quote(str(folder.root))}{part}"


def _frames_summary(folder: DatasetFolder) -> dict:
    if not folder.valid.exists():
        return {}
    valid = read_json(folder.valid)
    reasons: dict[str, int] = {}
    for reason in valid["dropped"].values():
        reasons[reason] = reasons.get(reason, 0) + 1
    frames = len(valid["valid"]) + len(valid["dropped"])
    return {"frames": frames, "seconds_of_video": round(frames / FPS, 2), "valid": len(valid["valid"]), "dropped": reasons}


def _page(folder: DatasetFolder, summary: dict) -> str:
    text = html.escape
    name = text(folder.root.name)
    body = [f"<h1>{name}</h1><p>{text(summary['video'])}</p><p>Next:</p><pre>{text(summary['next'])}</pre>"]
    if summary["warnings"]:
        body.append("<h2>Warnings, by what they will cost</h2>")
        body += [f"<div class=warning>{text(w['stage'])}: {text(w['text'])}</div>" for w in summary["warnings"]]
    if "frames" in summary:
        reasons = ", ".join(f"{count} {text(reason)}" for reason, count in summary["dropped"].items()) or "none"
        body.append(f"<h2>Frames</h2><p>{summary['valid']} of {summary['frames']} frames ({summary['seconds_of_video']} s at "
                    f"{FPS} fps) are used; dropped: {reasons}.</p>")  # fmt: skip
    body += [_figures_table(summary["figures"]), _dropped(folder), _samples(folder), _pose(folder), _sound(folder, summary),
             _expressions(folder), _stage_table(summary)]  # fmt: skip
    return (f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{name}: preprocessing report</title>"
            f"<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n")  # fmt: skip


def _figures_table(figures: dict) -> str:
    rows = []

    def row(name: str, value: str, wanted: str) -> None:
        rows.append(f"<tr><td>{name}<td>{html.escape(value)}<td>{html.escape(wanted)}")

    if figures["reprojection_error_px"] is not None:
        row("reprojection error of rigid points", f"{figures['reprojection_error_px']:.2f} px", "at most 0.5, at 512")
    if figures["reprojection_error_all_px"] is not None:
        row("the same of all tracked points", f"{figures['reprojection_error_all_px']:.2f} px", "at most 1, at 512")
        row("share of them that moves with the head", f"{figures['rigid_share']:.0%}", "at least 75 %")
    if figures["jitter_px"] is not None:
        row("jitter of a still head", f"{figures['jitter_px']:.2f} px", "at most 0.15, at 512")
    if figures["loudness_db"] is not None:
        row("loudness of the speech", f"{figures['loudness_db']:.0f} dBFS", "above -38")
    if figures["av_offset_of_time_stamps"] is not None:
        row("A/V offset, of the file", _offset_text(figures), "")
    return f"<h2>Figures</h2><table><tr><th><th>here<th>wanted{''.join(rows)}</table>" if rows else ""


def _offset_text(figures: dict) -> str:
    told, beyond = figures["av_offset_of_time_stamps"], figures["av_offset_measured_beyond"]
    if beyond is None:
        return f"{told:+d} frames by its time stamps (corrected); too little is said to measure more"
    corrected = figures["av_offset_applied"]
    return (f"{told + beyond:+d} frames: {told:+d} by its time stamps (corrected), {beyond:+d} beyond by lips and sound "
            f"(correlation {figures['av_offset_correlation']:.2f}, agreement {figures['av_offset_stability']:.0%}; "
            f"{f'sound moved by {corrected:+d}' if corrected else 'left as it is'})")  # fmt: skip


def _stage_table(summary: dict) -> str:
    rows = []
    for stage in summary["stages"]:
        facts = {key: value for key, value in stage["facts"].items() if key not in ("backend", "warnings")}
        shown = html.escape("; ".join(f"{key}: {_short(value)}" for key, value in facts.items()))
        rows.append(f"<tr><td>{stage['stage']} {stage['name']}<td>{html.escape(str(stage['facts'].get('backend', '')))}"
                    f"<td class=n>{stage['seconds']:.1f}<td class=n>{stage['peak_memory_mb']:.0f}"
                    f"<td class=facts>{shown}")  # fmt: skip
    total = sum(stage["seconds"] for stage in summary["stages"])
    return ("<h2>Stages</h2><table><tr><th>stage<th>back end<th>seconds<th>peak MB<th>facts" + "".join(rows)
            + f"<tr><td>all<td><td class=n>{total:.1f}<td><td></table>")  # fmt: skip


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items())
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value[:8]))}{', ...' if len(value) > 8 else ''}]"
    return str(value)


def _samples(folder: DatasetFolder) -> str:
    """Frames spread over the clip with landmarks, and with the parsing tinted in."""
    if not folder.valid.exists() or not (ids := folder.valid_ids()):
        return ""
    chosen = [ids[k] for k in np.linspace(0, len(ids) - 1, min(SHOWN, len(ids))).astype(int)]
    figures = []
    for i in chosen:
        image = read_rgb(folder.frame(i))
        marks = np.loadtxt(folder.landmarks(i)) if folder.landmarks(i).exists() else np.zeros((0, 2))
        figures.append(_figure(draw(image, marks), f"frame {i}"))
        if folder.parsing(i).exists():
            figures.append(_figure(_tint(image, read_parsing(folder.parsing(i))), f"parsing {i}"))
    return f"<h2>Sample frames</h2><div class=row>{''.join(figures)}</div>"


def _tint(image: np.ndarray, classes: np.ndarray) -> np.ndarray:
    mixed = image.astype(np.float32)
    groups = {"face": (classes > 0) & (classes < 14), "hair": classes >= HAIR, "neck": np.isin(classes, NECK_CLASSES),
              "cloth": classes == CLOTH}  # fmt: skip
    for group, mask in groups.items():
        mixed[mask] = 0.55 * mixed[mask] + 0.45 * np.array(TINTS[group], np.float32)
    return mixed.astype(np.uint8)


def _dropped(folder: DatasetFolder) -> str:
    dropped = read_json(folder.valid)["dropped"] if folder.valid.exists() else {}
    if not dropped:
        return ""
    of_reason: dict[str, list[str]] = {}
    for i, reason in dropped.items():
        of_reason.setdefault(reason, []).append(i)
    each = max(1, DROPPED_SHOWN // len(of_reason))  # every reason is shown, over the clip
    chosen = [ids[k] for ids in of_reason.values() for k in np.linspace(0, len(ids) - 1, min(each, len(ids))).astype(int)]
    figures = "".join(_figure(read_rgb(folder.frame(int(i))), f"frame {i}: {dropped[i]}") for i in chosen)
    return f"<h2>Dropped frames</h2><div class=row>{figures}</div>"


def _figure(image: np.ndarray, caption: str) -> str:
    small = cv2.resize(image, (THUMBNAIL, THUMBNAIL * image.shape[0] // image.shape[1]), interpolation=cv2.INTER_AREA)
    data = io.BytesIO()
    Image.fromarray(small).save(data, format="JPEG", quality=80)
    source = base64.b64encode(data.getvalue()).decode()
    return f'<figure><img alt="" src="data:image/jpeg;base64,{source}"><figcaption>{html.escape(caption)}</figcaption></figure>'


def _pose(folder: DatasetFolder) -> str:
    """Rotation and translation of the head over the clip, as the transforms have it."""
    import torch

    path = pose_file(folder)
    if not path.exists():
        return ""
    pose = torch.load(path, weights_only=True, map_location="cpu")
    angles = np.degrees(pose["euler"].numpy())
    place = pose["trans"].numpy() * METRES_PER_UNIT[path.name] * 1000
    return ("<h2>Pose</h2>" + _curves(angles, ("pitch", "yaw", "roll"), "degrees")
            + _curves(place - np.median(place, 0), ("x", "y", "z"), "mm from the median"))  # fmt: skip


def _sound(folder: DatasetFolder, summary: dict) -> str:
    """Level over time, and how well the sound foretells the lips at each offset."""
    parts = []
    if folder.audio.exists():
        samples, rate = soundfile.read(folder.audio, dtype="float32", always_2d=True)
        parts.append("<h2>Sound</h2>" + _curves(np.maximum(levels(samples[:, 0]), -80)[:, None], ("level",), "dBFS over the clip"))
    measured = next((stage["facts"].get("av_offset") for stage in summary["stages"] if stage["name"] == "transforms"), None)
    if measured:
        reach = len(measured["curve"]) // 2
        parts.append(_curves(np.array(measured["curve"])[:, None], ("lips foretold by sound",),
                             f"correlation, offset -{reach} to {reach} frames"))  # fmt: skip
    return "".join(parts)


def _expressions(folder: DatasetFolder) -> str:
    if not folder.blendshapes.exists():
        return ""
    from utils.constants import BLINK_COLUMNS, JAW_OPEN_COLUMN

    columns = read_npy(folder.blendshapes)[:, [BLINK_COLUMNS[0], BLINK_COLUMNS[1], JAW_OPEN_COLUMN]]
    return "<h2>Expression</h2>" + _curves(columns, ("left blink", "right blink", "jaw open"), "score")


def _curves(rows: np.ndarray, names: Sequence[str], unit: str) -> str:
    """An inline SVG of (F, C) curves over the frames; long clips are thinned to 1000 points."""
    step = max(1, len(rows) // 1000)
    rows = rows[::step]
    low, high = float(np.nanmin(rows)), float(np.nanmax(rows))
    x = np.linspace(40, 990, len(rows))
    y = 150 - 140 * (rows - low) / max(high - low, 1e-9)
    parts = [f'<text x="2" y="14">{high:.3g}</text><text x="2" y="150">{low:.3g}</text>'
             f'<text x="990" y="172" text-anchor="end">{unit}</text>']  # fmt: skip
    for k, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y[:, k], strict=True))
        parts.append(f'<polyline fill="none" stroke="{colour}" points="{points}"/>'
                     f'<text x="{60 + 130 * k}" y="172" fill="{colour}">{name}</text>')  # fmt: skip
    return f'<svg viewBox="0 0 1000 180" font-size="12">{"".join(parts)}</svg>'
