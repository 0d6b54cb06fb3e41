"""Face models behind one interface (linear_face.py): a back end has `name`, `available()` and `load() -> FaceModel`.

`bfm` and `ict` (models68.py) are learned models, tied to the 68 iBUG landmarks. The embedded back end `mesh` is MediaPipe's
canonical face (468 vertices, inside face_landmarker.task). It has no learned bases, so it brings its own: identity is a Gaussian
prior on smooth, mostly symmetric deformations (eigenvectors of the mesh Laplacian), expression a PCA of the clip's own residuals.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_utils.face_tracking.linear_face import CM_PER_DM, FaceModel, rigid_region
from data_utils.face_tracking.models68 import BaselFace, IctFace
from utils import model_store
from utils.errors import UserError

VERTICES, CORNERS = 468, 898 * 3

# Prior of the canonical mesh's identity. Adult faces differ by a few millimetres once size is set aside; asymmetry is rarer.
IDENTITY_DEVIATION = 0.035  # dm, RMS over the vertices
ASYMMETRY = 0.35  # deviation of asymmetric relative to symmetric deformations
IDENTITY_MODES, IDENTITY_COMPONENTS = 40, 60

# Dense landmark ids (= vertex ids of the canonical mesh) of the parts that move with speech, gaze and emotion.
LIPS = (61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 409, 270, 269, 267, 0, 37, 39, 40, 185)
EYES = (33, 7, 163, 144, 145, 153, 154, 155, 133, 173, 157, 158, 159, 160, 161, 246,
        263, 249, 390, 373, 374, 380, 381, 382, 362, 398, 384, 385, 386, 387, 388, 466)  # fmt: skip
BROWS = (46, 53, 52, 65, 55, 70, 63, 105, 66, 107, 276, 283, 282, 295, 285, 300, 293, 334, 296, 336)
NOSE_TIP, NOSE_BASE, FOREHEAD_TOP = 4, 2, 10


class CanonicalMesh:
    """MediaPipe's canonical face mesh (Apache-2.0); needs face_landmarker.task, which landmark detection needs anyway."""

    name = "mesh"

    def available(self) -> bool:
        return model_store.find("face_landmarker") is not None

    def load(self) -> FaceModel:
        mean, triangles = read_canonical_mesh(model_store.fetch("face_landmarker"))
        rigid = _rigid_region(mean)
        ids = np.arange(len(mean))
        no_expression = np.zeros((0, *mean.shape))
        return FaceModel(self.name, mean, _smooth_deformations(mean, triangles), no_expression, triangles, ids, ids, rigid)


BACKENDS = {backend.name: backend for backend in (IctFace(), BaselFace(), CanonicalMesh())}  # best last


def load_face_model(name: str = "auto") -> FaceModel:
    """The face model of a back end; "auto" takes the best one whose files are present, else the embedded default."""
    if name == "auto":
        name = next((n for n in reversed(BACKENDS) if BACKENDS[n].available()), CanonicalMesh.name)
    if name not in BACKENDS:
        raise UserError(f"there is no face model {name!r}; choose one of: auto, {', '.join(BACKENDS)}")
    return BACKENDS[name].load()


def read_canonical_mesh(task_file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Canonical face in a MediaPipe FaceLandmarker bundle: (468, 3) dm with the mean vertex at the origin, (898, 3) triangles.

    The .task file is a zip; its geometry metadata is a protobuf message whose field 1 is the mesh: field 3 vertex floats
    (x, y, z in centimetres, u, v), field 4 triangle corners.
    """
    try:
        with zipfile.ZipFile(task_file) as bundle:
            name = next(n for n in bundle.namelist() if "geometry_pipeline_metadata" in n)
            data = bundle.read(name)
        mesh = next(value for field, value in _fields(data) if field == 1)
        floats = b"".join(value for field, value in _fields(mesh) if field == 3)
        corners = [value for field, value in _fields(mesh) if field == 4]
        if len(floats) != VERTICES * 5 * 4 or len(corners) != CORNERS:
            raise ValueError(f"{len(floats) // 20} vertices and {len(corners) // 3} triangles, not 468 and 898")
    except (zipfile.BadZipFile, StopIteration, ValueError, IndexError) as error:
        raise UserError(f"{task_file} holds no canonical face mesh ({error}); delete it and run "
                        "python -m utils.model_store fetch face_landmarker") from None  # fmt: skip
    xyz = np.frombuffer(floats, "<f4").reshape(VERTICES, 5)[:, :3].astype(float) / CM_PER_DM
    return xyz - xyz.mean(0), np.array(corners).reshape(-1, 3)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) pairs of one protobuf message; varints as int, everything else as its bytes."""
    i = 0
    while i < len(message):
        key, i = _varint(message, i)
        kind = key & 7
        if kind == 0:
            value, i = _varint(message, i)
        else:
            if kind == 2:
                size, i = _varint(message, i)
            elif kind in (1, 5):
                size = 8 if kind == 1 else 4
            else:
                raise ValueError(f"unknown protobuf wire type {kind}")
            value = message[i : i + size]
            if len(value) != size:
                raise ValueError("the message is cut short")
            i += size
        yield key >> 3, value


def _varint(message: bytes, i: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[i]
        value |= (byte & 127) << shift
        i, shift = i + 1, shift + 7
        if byte < 128:
            return value, i


def _rigid_region(mean: np.ndarray) -> np.ndarray:
    """(V,) bool of the canonical mesh."""
    return rigid_region(mean, mean[list(LIPS)], mean[list(EYES)], mean[list(BROWS)], mean[NOSE_BASE])


def _smooth_deformations(mean: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """(K, V, 3) principal components of a Gaussian prior: smooth, mostly symmetric, without rigid motion or change of size.

    Size is left out because a single camera cannot tell a larger head from a nearer one.
    """
    count = len(mean)
    adjacency = np.zeros((count, count))
    for a, b in ((0, 1), (1, 2), (2, 0)):
        adjacency[triangles[:, a], triangles[:, b]] = adjacency[triangles[:, b], triangles[:, a]] = 1
    values, vectors = np.linalg.eigh(np.diag(adjacency.sum(1)) - adjacency)
    modes = vectors[:, 1 : 1 + IDENTITY_MODES] / np.sqrt(1 + values[1 : 1 + IDENTITY_MODES] / values[3])  # (V, M), falling
    factor = np.kron(modes, np.eye(3))  # (3V, 3M): covariance = factor factor^T

    mirrored = mean * (-1, 1, 1)
    twin = np.linalg.norm(mirrored[:, None] - mean, axis=2).argmin(1)
    reflected = (factor.reshape(count, 3, -1)[twin] * np.array([-1.0, 1, 1])[:, None]).reshape(3 * count, -1)
    factor = np.concatenate([(factor + reflected) / 2, ASYMMETRY * (factor - reflected) / 2], 1)

    similarity = np.concatenate([np.tile(np.eye(3), (count, 1)), mean.reshape(-1, 1),
                                 *(np.cross(axis, mean).reshape(-1, 1) for axis in np.eye(3))], 1)  # fmt: skip
    basis = np.linalg.qr(similarity)[0]
    factor -= basis @ (basis.T @ factor)
    components, deviations, _ = np.linalg.svd(factor, full_matrices=False)
    components, deviations = components[:, :IDENTITY_COMPONENTS], deviations[:IDENTITY_COMPONENTS]
    deviations *= IDENTITY_DEVIATION * np.sqrt(count) / np.linalg.norm(deviations)
    return (components * deviations).T.reshape(-1, count, 3)
