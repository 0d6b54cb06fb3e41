"""Learned face models, tied to the pictures by the 68 iBUG landmarks: the Basel Face Model 2009 and the ICT Face Model."""

from __future__ import annotations

import numpy as np

from data_utils.face_tracking import convert_BFM, convert_ICT
from data_utils.face_tracking.linear_face import CM_PER_DM, FaceModel, rigid_region
from data_utils.landmarks import IBUG_68
from utils import model_store
from utils.errors import UserError
from utils.files import read_npz

JAW, BROWS, EYES, LIPS = slice(0, 17), slice(17, 27), slice(36, 48), slice(48, 68)
NOSE_BASE, CHIN = 33, 8
STEADY = [*range(27, 36), 36, 39, 42, 45]  # nose, corners of the eyes
JAW_NOISE = 4.0  # the contour is the least exact of the landmarks, and the models' and the networks' are not the same
FOREHEAD = 0.6  # dm above the brows

UM_PER_DM = 1e5
BASEL_IDENTITIES, BASEL_EXPRESSIONS = 100, 79  # the lineage's

ICT_DEVIATION = 0.3  # of an expression's weight, which is 0..1
# The dense landmarks that ICT's contour points meet in a frontal picture; in space they lie up to 27 mm apart, hence JAW_NOISE
ICT_JAW = (162, 234, 93, 132, 58, 136, 149, 148, 152, 377, 378, 365, 288, 361, 323, 454, 389)
ICT_NOSE = 29, 195  # lower on the bridge than the point of IBUG_68
ICT_INNER = np.array([0.0, 0.047, 0.065])  # dm: where the mean of landmarks 17..67 goes, as in the canonical mesh


class BaselFace:
    """Basel Face Model 2009 with AD-NeRF's expressions: 3DMM_info.npz of convert_BFM.py. The contour moves with the pose."""

    name = "bfm"

    def available(self) -> bool:
        return model_store.find("bfm") is not None

    def load(self) -> FaceModel:
        path = model_store.fetch("bfm")
        tables = read_npz(path)
        convert_BFM.check(tables, path)
        shape = (-1, convert_BFM.VERTICES, 3)
        mean = (tables["mu_shape"].astype(float) + tables["mu_exp"]).reshape(shape[1:])
        mean = (mean - mean.mean(0)) / UM_PER_DM
        identity = _scaled(tables, "shape", BASEL_IDENTITIES).reshape(shape)
        expression = _scaled(tables, "exp", BASEL_EXPRESSIONS).reshape(shape)

        keys, left, right = (tables[name].astype(int) for name in ("keyinds", "left_contour", "right_contour"))
        fixed = np.array([CHIN, *range(17, 68)])  # all but the contour's 0..7 and 9..16
        sliding = np.array([*range(0, CHIN), *range(CHIN + 1, 17)])
        candidates = np.concatenate([left, right])  # (16, 20) vertices, in the order of `sliding`
        points = np.concatenate([fixed, np.repeat(sliding, candidates.shape[1])])  # which iBUG point each landmark is
        vertices = np.concatenate([keys[fixed], candidates.ravel()])
        contour = len(fixed) + np.arange(candidates.size).reshape(candidates.shape)
        steady = np.isin(points, STEADY)
        noise = np.where(points < 17, JAW_NOISE, 1.0)
        triangles, rigid = tables["tris"].astype(int), _rigid(mean, mean[keys])
        return FaceModel(self.name, mean, identity, expression, triangles, IBUG_68[points], vertices, rigid,
                         steady, noise, contour, np.repeat([-1.0, 1.0], 8))  # fmt: skip


class IctFace:
    """ICT Face Model of face, head and neck: the file of convert_ICT.py. Expression coefficients are weights over ICT_DEVIATION."""

    name = "ict"

    def available(self) -> bool:
        return model_store.find("ict") is not None

    def load(self) -> FaceModel:
        path = model_store.fetch("ict")
        tables = read_npz(path)
        count = convert_ICT.VERTICES
        wanted = {"neutral": (count, 3), "identity": (convert_ICT.IDENTITIES, count, 3), "landmarks68": (68,),
                  "expression": (len(convert_ICT.EXPRESSIONS), count, 3), "faces": (-1, 4)}  # fmt: skip
        for name, shape in wanted.items():
            given = tables[name].shape if name in tables else ()
            if len(given) != len(shape) or any(w not in (-1, g) for w, g in zip(shape, given, strict=True)):
                raise UserError(f"{path} is no packed ICT face model ({name} is {given or 'absent'}, not {shape}); {_again()}")
            if not np.isfinite(tables[name]).all() or (tables[name].dtype.kind == "i" and
                                                       not 0 <= tables[name].min() <= tables[name].max() < count):  # fmt: skip
                raise UserError(f"{path} is damaged ({name} holds impossible values); {_again()}")
        mean = tables["neutral"].astype(float) / CM_PER_DM
        keys = tables["landmarks68"]
        mean += ICT_INNER - mean[keys[17:]].mean(0)
        identity = tables["identity"].astype(float) / CM_PER_DM
        expression = tables["expression"].astype(float) * (ICT_DEVIATION / CM_PER_DM)
        quads = tables["faces"].astype(int)
        triangles = np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])
        noise = np.ones(68)
        noise[JAW] = JAW_NOISE
        dense = IBUG_68.copy()
        dense[JAW], dense[ICT_NOSE[0]] = ICT_JAW, ICT_NOSE[1]
        steady = np.isin(np.arange(68), STEADY)
        rigid = _rigid(mean, mean[keys])
        return FaceModel(self.name, mean, identity, expression, triangles, dense, keys, rigid, steady, noise)


def _again() -> str:
    return "run data_utils/face_tracking/convert_ICT.py again"


def _scaled(tables: dict[str, np.ndarray], kind: str, count: int) -> np.ndarray:
    """The first `count` components, each times its deviation, dm."""
    return tables[f"b_{kind}"][:count].astype(float) * tables[f"sig_{kind}"][:count, None].astype(float) / UM_PER_DM


def _rigid(points: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """(V,) bool: the bony region, without what lies beyond the face: scalp, ears, neck."""
    low, high = landmarks[0], landmarks[16]
    face = (points[:, 0] > 0.9 * low[0]) & (points[:, 0] < 0.9 * high[0]) & (points[:, 2] > (low[2] + high[2]) / 2)
    face &= points[:, 1] < landmarks[BROWS, 1].max() + FOREHEAD
    return face & rigid_region(points, landmarks[LIPS], landmarks[EYES], landmarks[BROWS], landmarks[NOSE_BASE])
