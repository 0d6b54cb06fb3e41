"""What stage 7 leaves on disk (track_params.pt), and the landmarks it starts from."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from data_utils.face_tracking.facemodel import load_face_model
from data_utils.face_tracking.fit import Fit
from data_utils.pose_solver import Poses
from utils.dataset_folder import DatasetFolder
from utils.errors import UserError
from utils.files import read_npz, write_tensors
from utils.pose import euler_to_matrix, matrix_to_euler


def read_landmarks(folder: DatasetFolder) -> np.ndarray:
    """(F, 478, 3) dense landmarks of every frame, pixels; NaN where no face was found."""
    return read_npz(folder.require(folder.face_landmarks))["points"]


def read_blink(folder: DatasetFolder) -> np.ndarray:
    """(F,) how far the eyes are closed, 0..1; 1 where no face was found."""
    scores = read_npz(folder.require(folder.face_landmarks))["blendshapes"][:, [9, 10]]  # MediaPipe's order
    return np.nan_to_num(scores.mean(1), nan=1.0)


def write_params(folder: DatasetFolder, fit: Fit, ids: np.ndarray, count: int) -> None:
    """track_params.pt: coefficients and poses (dm) of all `count` frames; the dropped ones are interpolated.

    Where expressions are the clip's own (E, V, 3), both bases go along: no file holds them, and computed again, on another machine
    or with other threads, the mesh's identities (K, V, 3) may come out turned, and the coefficients would say something else.
    """
    poses = fit.poses.spread(ids, count)
    expression = np.stack([np.interp(np.arange(count), ids, column) for column in fit.expression.T], 1)
    params = {
        "id": fit.identity[None], "exp": expression, "euler": matrix_to_euler(torch.from_numpy(poses.rotation)),
        "trans": poses.translation, "focal": np.array([fit.focal]),
    }  # fmt: skip
    if fit.model.expression_of_clip:
        params |= {"identity_basis": fit.model.identity, "expression_basis": fit.model.expression}
    write_tensors(folder.track_params, params)


def read_fit(folder: DatasetFolder, face_model: str = "auto") -> Fit:
    """The tracker's result as stage 7 left it, all frames. Raises UserError if it belongs to another face model."""
    params = torch.load(folder.require(folder.track_params), weights_only=True)
    model = load_face_model(face_model)
    basis = params.get("identity_basis")
    if basis is not None and basis.shape[1:] == model.mean.shape:
        model = dataclasses.replace(model.with_expression(params["expression_basis"].double().numpy()),
                                    identity=basis.double().numpy())  # fmt: skip
    elif basis is not None or len(model.identity) != params["id"].shape[1] or len(model.expression) != params["exp"].shape[1]:
        raise UserError(f"{folder.track_params} was not fitted with the face model {model.name!r}; run stage 7 again "
                        "(process.py --task 7), or give the --face_model it was fitted with")  # fmt: skip
    poses = Poses(euler_to_matrix(params["euler"].double()).numpy(), params["trans"].double().numpy())
    return Fit(model, poses, params["id"][0].double().numpy(), params["exp"].double().numpy(), float(params["focal"][0]))
