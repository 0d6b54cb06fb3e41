"""The data set folder as SyncTalk, ER-NeRF and GaussianTalker document it: written for our reader, read from our folders.

Only json, numpy, OpenCV and torch are used, as those tools do, and nothing of this repository but a source to write from.
"""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import torch

HEAD, NECK, TORSO, BACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)  # of parsing/{i}.png as OpenCV reads it (BGR)


def rewrite_as_lineage(root: Path, unit: str, audio: str, expression: str) -> None:
    """Turn the small data set at `root` (tests/tiny_dataset.py) into one of another tool.

    `unit` mm (SyncTalk) or dm (GaussianTalker) is that of track_params.pt, which with dm holds the vertices of every frame too;
    `audio` is the feature file; `expression` bs.npy or au.csv.
    """
    tables = {}
    for split in ("train", "val"):
        path = root / f"transforms_{split}.json"
        tables[split] = json.loads(path.read_text())
        path.write_text(json.dumps({key: tables[split][key] for key in ("focal_len", "cx", "cy", "frames")}))
    for name in ("valid.json", "crop.json", "fused.ply", "aud_mel.npy", "bs.npy"):
        (root / name).unlink(missing_ok=True)
    for path in (root / "parsing").glob("*.png"):  # ours reads the same through OpenCV; this is their three-channel file
        cv2.imwrite(str(path), cv2.imread(str(path)))
    frames = len(list((root / "ori_imgs").glob("*.jpg")))
    rng = np.random.default_rng(0)
    poses = {frame["img_id"]: np.array(frame["transform_matrix"]) for table in tables.values() for frame in table["frames"]}
    trans = np.zeros((frames, 3))
    for i, pose in poses.items():
        trans[i] = -pose[:3, :3].T @ pose[:3, 3]
    params = {"id": torch.zeros(1, 100), "exp": torch.zeros(frames, 79), "euler": torch.zeros(frames, 3),
              "trans": torch.from_numpy(trans * {"mm": 1000, "dm": 10}[unit]).float(),
              "focal": torch.tensor([tables["train"]["focal_len"]])}  # fmt: skip
    if unit == "dm":
        params["vertices"] = torch.from_numpy(rng.normal(size=(frames, 500, 3))).float()
    torch.save(params, root / "track_params.pt")
    shape = {"aud_ave.npy": (frames + 1, 512), "aud_ds.npy": (frames, 16, 29), "aud.npy": (frames, 16, 29),
             "aud_hu.npy": (frames, 2, 1024)}[audio]  # fmt: skip
    np.save(root / audio, rng.normal(size=shape))
    if expression == "bs.npy":
        np.save(root / "bs.npy", rng.uniform(size=(frames, 52)))
    else:
        blink = [f"{i + 1}, {i / 25:.3f}, 1, {min(5, 0.5 * i):.2f}, 0.00" for i in range(frames)]
        (root / "au.csv").write_text("\n".join(["frame, timestamp, success, AU45_r, AU01_r", *blink]) + "\n")


def read_as_lineage(root: Path) -> dict:
    """Read a folder as those tools do, with their assumptions asserted; (image, masks, torso, pose, audio window, blinks) by id."""
    sets = {split: json.loads((root / f"transforms_{split}.json").read_text()) for split in ("train", "val")}
    table = sets["train"]
    height, width = int(2 * table["cy"]), int(2 * table["cx"])
    assert table["focal_len"] > 0 and all(sets["val"][key] == table[key] for key in ("focal_len", "cx", "cy"))
    background = cv2.imread(str(root / "bc.jpg"), cv2.IMREAD_UNCHANGED)
    assert background.shape == (height, width, 3)
    shapes = np.load(root / "bs.npy")
    assert shapes.ndim == 2 and shapes.shape[1] == 52
    params = torch.load(root / "track_params.pt", weights_only=True)
    assert set(params) >= {"id", "exp", "euler", "trans", "focal"} and params["id"].shape[0] == 1
    assert params["euler"].shape == params["trans"].shape == (len(params["exp"]), 3) and params["focal"].shape == (1,)
    refined = torch.load(root / "bundle_adjustment.pt", weights_only=True)
    assert set(refined) == {"euler", "trans", "focal"} and refined["euler"].shape == refined["trans"].shape
    features = np.load(next(iter(sorted(root.glob("aud_*.npy")))))
    assert features.ndim == 2
    padded = np.pad(features, ((4, 4), (0, 0)))
    frames = {}
    for frame in sets["train"]["frames"] + sets["val"]["frames"]:
        i = frame["img_id"]
        image = cv2.imread(str(root / "ori_imgs" / f"{i}.jpg"), cv2.IMREAD_UNCHANGED)
        codes = cv2.imread(str(root / "parsing" / f"{i}.png")).reshape(-1, 3)
        assert {tuple(code) for code in np.unique(codes, axis=0)} <= {HEAD, NECK, TORSO, BACK}
        torso = cv2.imread(str(root / "torso_imgs" / f"{i}.png"), cv2.IMREAD_UNCHANGED)
        truth = cv2.imread(str(root / "gt_imgs" / f"{i}.jpg"), cv2.IMREAD_UNCHANGED)
        assert image.shape == truth.shape == (height, width, 3) and torso.shape == (height, width, 4)
        lips = np.loadtxt(root / "ori_imgs" / f"{i}.lms")
        assert lips.shape == (68, 2)
        camera_to_world = np.array(frame["transform_matrix"])
        assert np.allclose(camera_to_world[:3, :3] @ camera_to_world[:3, :3].T, np.eye(3), atol=1e-5)
        # the tracker's camera: the same pose, in metres, as bundle_adjustment.pt has it
        assert np.allclose(-camera_to_world[:3, :3].T @ camera_to_world[:3, 3], refined["trans"][i], atol=1e-4)
        row = frame["aud_id"]
        frames[i] = {
            "image": image, "head": (codes == HEAD).all(1).reshape(height, width), "torso": torso,
            "audio": padded[row : row + 8], "blink": shapes[i, [8, 9]], "distance": np.linalg.norm(camera_to_world[:3, 3]),
        }  # fmt: skip
    return {"frames": frames, "train": [frame["img_id"] for frame in sets["train"]["frames"]], "width": width, "height": height}
