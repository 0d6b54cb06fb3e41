"""Make 3DMM_info.npz, the Basel face this project reads, of the Basel Face Model 2009 and AD-NeRF's tables.

    python data_utils/face_tracking/convert_BFM.py [--path data_utils/face_tracking/3DMM]

The folder holds 01_MorphableModel.mat (by registration at the University of Basel), exp_info.npy, topology_info.npy and
keys_info.npy (AD-NeRF). A 3DMM_info.npy made by the original programs serves in place of the .mat and exp_info.npy. The .npy tables
are pickles: they are read without executing what they may hold. Of the 53 490 vertices the 34 650 of the face are kept.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import scipy.io

from utils.errors import UserError, command_line
from utils.files import atomic_path
from utils.safe_pickle import read_pickled_dict

VERTICES, TRIANGLES, COMPONENTS, WHOLE = 34650, 68746, 199, 53490
FOLDER = Path(__file__).resolve().parent / "3DMM"
RESULT = "3DMM_info.npz"
INDICES = {"tris", "keyinds", "left_contour", "right_contour", "rigid_ids"}


def shapes() -> dict[str, tuple[int | str, ...]]:
    """Of the tables of 3DMM_info.npz: xyz or RGB interleaved, micrometres; E >= 79 expressions; R rigid vertices."""
    numbers, some = 3 * VERTICES, COMPONENTS
    return {
        "mu_shape": (numbers,), "b_shape": (some, numbers), "sig_shape": (some,),
        "mu_exp": (numbers,), "b_exp": ("E", numbers), "sig_exp": ("E",),
        "mu_tex": (numbers,), "b_tex": (some, numbers), "sig_tex": (some,),
        "tris": (TRIANGLES, 3), "keyinds": (68,), "left_contour": (8, 20), "right_contour": (8, 20), "rigid_ids": ("R",),
    }  # fmt: skip


def convert(folder: Path) -> Path:
    """Write 3DMM_info.npz into the folder and return its path. Raises UserError naming the file that is absent or unfit."""
    topology = read_pickled_dict(folder / "topology_info.npy")
    keys = read_pickled_dict(folder / "keys_info.npy")
    morphable, made_before = folder / "01_MorphableModel.mat", folder / "3DMM_info.npy"
    if morphable.exists() or not made_before.exists():
        bases = _reduced(morphable, topology, folder) | _expressions(folder / "exp_info.npy")
    else:
        bases = {name: _flat(value) if np.ndim(value) and name[:2] != "b_" else value
                 for name, value in read_pickled_dict(made_before).items()}  # fmt: skip
    tables = {**bases, "tris": topology.get("tris"), **{name: keys.get(name) for name in INDICES if name != "tris"}}
    tables = {name: tables.get(name) for name in shapes()}
    check(tables, folder)
    target = folder / RESULT
    with atomic_path(target) as temporary:  # not compressed: random mantissas do not shrink
        np.savez(temporary, **{n: np.asarray(v, np.int32 if n in INDICES else np.float32) for n, v in tables.items()})
    return target


def check(tables: dict[str, np.ndarray], source: Path) -> None:
    """Raises UserError if an array is absent, of another shape, or its indices point nowhere."""
    free: dict[str, int] = {}
    for name, shape in shapes().items():
        value = tables.get(name)
        given = np.shape(value) if value is not None else None
        wanted = tuple(free.get(side, side) for side in shape)
        fits = given is not None and len(given) == len(wanted)
        fits = fits and all(isinstance(w, str) or g == w for g, w in zip(given, wanted, strict=True))
        if not fits or np.asarray(value).dtype.kind not in "iuf":
            size = "absent" if given is None else " x ".join(map(str, given)) or "a single value"
            raise UserError(f"{source}: the table {name} is {size}, not {' x '.join(map(str, wanted))}; the files do not belong to "
                            "the Basel Face Model 2009 as AD-NeRF uses it, get them again")  # fmt: skip
        free |= {side: g for side, g in zip(shape, given, strict=True) if isinstance(side, str)}
        if name in INDICES and (np.min(value) < 0 or np.max(value) >= VERTICES):
            raise UserError(f"{source}: the table {name} names vertices beyond the {VERTICES} of the face; get the files again")
        if name not in INDICES and not np.isfinite(value).all():
            raise UserError(f"{source}: the table {name} holds numbers that are not finite; get the files again")


def _reduced(path: Path, topology: dict, folder: Path) -> dict[str, np.ndarray]:
    """Shape and texture of the kept vertices from the .mat of Basel: xyz (or RGB) interleaved, one component a row."""
    if not path.exists():
        raise UserError(f"{path} does not exist; register at https://faces.dmi.unibas.ch/bfm for it")
    try:
        model = scipy.io.loadmat(path, variable_names=[f"{kind}{part}" for kind in ("shape", "tex") for part in ("PC", "EV", "MU")])
    except Exception as error:  # a damaged file can fail in any way
        raise UserError(f"{path} is no MATLAB file of the Basel Face Model ({type(error).__name__}); get it again") from None
    kept = np.asarray(topology.get("sub_inds", ()))
    if kept.shape != (VERTICES,) or kept.dtype.kind not in "iu" or kept.min() < 0 or kept.max() >= WHOLE:
        raise UserError(f"{folder / 'topology_info.npy'} does not say which {VERTICES} vertices are kept (sub_inds); get it again")
    tables = {}
    for kind, name in (("shape", "shape"), ("tex", "tex")):
        for part, shape in (("PC", (3 * WHOLE, COMPONENTS)), ("EV", (COMPONENTS, 1)), ("MU", (3 * WHOLE, 1))):
            value = model.get(kind + part)
            if value is None or value.shape != shape:
                size = "absent" if value is None else " x ".join(map(str, value.shape))
                raise UserError(f"{path}: {kind + part} is {size}, not {shape[0]} x {shape[1]}; is it the model of 2009?")
        tables[f"mu_{name}"] = model[f"{kind}MU"].reshape(WHOLE, 3)[kept].ravel()
        tables[f"b_{name}"] = model[f"{kind}PC"].T.reshape(COMPONENTS, WHOLE, 3)[:, kept].reshape(COMPONENTS, -1)
        tables[f"sig_{name}"] = model[f"{kind}EV"].ravel()
    return tables


def _expressions(path: Path) -> dict[str, np.ndarray]:
    info = read_pickled_dict(path)
    return {"mu_exp": _flat(info.get("mu_exp")), "b_exp": info.get("base_exp"), "sig_exp": _flat(info.get("sig_exp"))}


def _flat(value):
    return None if value is None else np.ravel(value)


@command_line
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, default=FOLDER, help="folder of the downloaded files (default %(default)s)")
    print(convert(parser.parse_args(arguments).path))


if __name__ == "__main__":
    main()
