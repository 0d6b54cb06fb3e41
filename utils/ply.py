"""Meshes and coloured point clouds as .ply: x y z nx ny nz red green blue, faces where there are any."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from plyfile import PlyData, PlyElement, PlyParseError

from utils.errors import UserError
from utils.files import atomic_path

_FIELDS = [(name, "<f4") for name in ("x", "y", "z", "nx", "ny", "nz")] + [(name, "u1") for name in ("red", "green", "blue")]


@dataclasses.dataclass
class Mesh:
    """(V, 3) float32 points and unit normals, (V, 3) float32 colours in [0, 1], (T, 3) int32 faces (T may be 0)."""

    points: np.ndarray
    normals: np.ndarray
    colours: np.ndarray
    faces: np.ndarray


def write_mesh(path: Path, points: np.ndarray, normals: np.ndarray, colours: np.ndarray, faces: np.ndarray | None = None) -> None:
    """Write binary little-endian .ply, atomically; colours in [0, 1] become bytes."""
    vertex = np.empty(len(points), _FIELDS)
    for name, column in zip(("x", "y", "z"), points.T, strict=True):
        vertex[name] = column
    for name, column in zip(("nx", "ny", "nz"), normals.T, strict=True):
        vertex[name] = column
    for name, column in zip(("red", "green", "blue"), np.clip(colours.T * 255 + 0.5, 0, 255), strict=True):
        vertex[name] = column
    elements = [PlyElement.describe(vertex, "vertex")]
    if faces is not None and len(faces):
        face = np.empty(len(faces), [("vertex_indices", "<i4", (3,))])
        face["vertex_indices"] = faces
        elements.append(PlyElement.describe(face, "face"))
    with atomic_path(path) as temporary:
        PlyData(elements, byte_order="<").write(temporary)


def read_mesh(path: Path) -> Mesh:
    """Read what `write_mesh`, or a tool of the 3DGS family, wrote. Raises UserError if the file is damaged or lacks a field."""
    try:
        data = PlyData.read(path)
        vertex = data["vertex"].data
        points, normals, colours = (
            np.stack([vertex[name] for name in names], 1).astype(np.float32)
            for names in (("x", "y", "z"), ("nx", "ny", "nz"), ("red", "green", "blue"))
        )
        faces = np.stack(data["face"]["vertex_indices"]).astype(np.int32) if "face" in data else np.zeros((0, 3), np.int32)
    except (ValueError, KeyError, PlyParseError, EOFError) as error:
        raise UserError(f"{path} is damaged or no coloured mesh with normals ({error}); make it again") from None
    return Mesh(points, normals, colours / 255.0, faces)
