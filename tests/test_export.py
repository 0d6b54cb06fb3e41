"""Exported clouds, read back byte by byte as the formats are documented, not with our own reader."""

import shutil

import numpy as np
import pytest
import torch
from test_model import cloud
from test_render import dataset, failure, model, trained  # noqa: F401  fixtures

import render
from scene import load_avatar
from scene.gaussian_model import GaussianModel
from scene.talking_dataset_readers import TalkingDatasetReader
from utils.export import write_surfels
from utils.sh import rgb_to_sh


def read_plainly(path):
    """(header lines, {property: (N,) float32}) of a binary little-endian .ply whose only element is vertex, all float."""
    data = path.read_bytes()
    header, body = data.split(b"end_header\n", 1)
    lines = header.decode("ascii").splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    (count,) = [int(line.split()[2]) for line in lines if line.startswith("element vertex ")]
    assert sum(line.startswith("element") for line in lines) == 1
    properties = [line.split() for line in lines if line.startswith("property")]
    assert all(kind == "float" for _, kind, _ in properties)
    table = np.frombuffer(body, "<f4").reshape(count, len(properties))
    return lines, {name: column for (_, _, name), column in zip(properties, table.T, strict=True)}


def surfels(degree):
    made = GaussianModel.from_points(cloud(50), degree)
    with torch.no_grad():
        for value in made.values.values():
            value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(value.dim())))
    return made.surfels


@pytest.mark.parametrize("degree", [0, 1, 3])
@pytest.mark.parametrize("three", [False, True])
def test_a_cloud_is_written_as_the_ecosystems_document_it(tmp_path, degree, three):
    s = surfels(degree)
    write_surfels(tmp_path / "a.ply", s, three_scales=three)
    lines, v = read_plainly(tmp_path / "a.ply")
    rest = 3 * ((degree + 1) ** 2 - 1)
    assert list(v) == (["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"] + [f"f_rest_{i}" for i in range(rest)]
                       + ["opacity"] + [f"scale_{i}" for i in range(2 + three)] + [f"rot_{i}" for i in range(4)])  # fmt: skip
    assert ("comment SplatRenderMode: 2dgs" in lines) == (not three)
    np.testing.assert_array_equal(np.stack([v["x"], v["y"], v["z"]], 1), s.xyz.detach())
    np.testing.assert_array_equal(v["opacity"], s.opacity.detach()[:, 0])  # logit
    np.testing.assert_array_equal(np.stack([v["scale_0"], v["scale_1"]], 1), s.scaling.detach())  # log
    np.testing.assert_array_equal(np.stack([v[f"rot_{i}"] for i in range(4)], 1), s.rotation.detach())  # w x y z
    for channel in range(3):  # all coefficients of red, then green, then blue
        np.testing.assert_array_equal(v[f"f_dc_{channel}"], s.sh.detach()[:, 0, channel])
        for k in range(rest // 3):
            np.testing.assert_array_equal(v[f"f_rest_{channel * rest // 3 + k}"], s.sh.detach()[:, 1 + k, channel])
    w, x, y, z = np.stack([v[f"rot_{i}"] for i in range(4)]) / np.linalg.norm([v[f"rot_{i}"] for i in range(4)], axis=0)
    normal = np.stack([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)])  # third column of the rotation
    np.testing.assert_allclose(np.stack([v["nx"], v["ny"], v["nz"]]), normal, atol=1e-5)
    if three:
        extent = max(np.ptp(v[axis]) for axis in "xyz")
        np.testing.assert_allclose(np.exp(v["scale_2"]), 1e-6 * extent, rtol=1e-4)  # flat
    if not three:
        back = GaussianModel.load_ply(tmp_path / "a.ply").surfels
        for name in ("xyz", "scaling", "rotation", "opacity", "sh"):
            torch.testing.assert_close(getattr(back, name), getattr(s, name))


def test_the_colour_of_a_viewer_is_half_plus_the_first_coefficient(tmp_path):
    s = surfels(0)
    s.sh = rgb_to_sh(torch.full((50, 1, 3), 0.25))
    write_surfels(tmp_path / "a.ply", s)
    np.testing.assert_allclose(0.5 + 0.28209479 * read_plainly(tmp_path / "a.ply")[1]["f_dc_1"], 0.25, atol=1e-6)


def test_the_head_is_exported_at_rest_and_as_in_a_frame(model, dataset, capsys):  # noqa: F811
    render.main(["-m", str(model), "--export_ply"])
    render.main(["-m", str(model), "--export_ply", "9"])
    names = {path.name for path in (model / "export").iterdir()}
    assert names == {f"ours_7_{what}_{kind}.ply" for what in ("canonical", "frame_9") for kind in ("2dgs", "3dgs")}
    assert not (model / "test").exists()
    head = load_avatar(model)
    deformed = head(TalkingDatasetReader(dataset).conditions([9]))
    v = read_plainly(model / "export/ours_7_frame_9_3dgs.ply")[1]
    np.testing.assert_allclose(np.stack([v["x"], v["y"], v["z"]], 1), deformed.xyz[0], atol=1e-6)
    np.testing.assert_allclose(v["opacity"], deformed.opacity[0, :, 0], atol=1e-5)
    stored = read_plainly(model / "point_cloud/iteration_7/point_cloud.ply")
    assert read_plainly(model / "export/ours_7_canonical_2dgs.ply")[1].keys() == stored[1].keys()
    shutil.rmtree(model / "export")
    (model / "export").write_text("a file where the folder should be")
    assert "nothing can be written into" in failure(capsys, "-m", model, "--export_ply")
    assert "no usable frame 3" in failure(capsys, "-m", model, "--export_ply", "3")
