"""Pack the ICT Face Model (MIT licence) from its OBJ files into the one file this project reads.

    git clone https://github.com/ICT-VGL/ICT-FaceKit
    python data_utils/face_tracking/convert_ICT.py ICT-FaceKit/FaceXModel [--output checkpoints]

Kept are face, head and neck (the first 11 248 vertices), 100 identities and 53 expressions, as offsets from the neutral face.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from utils import model_store
from utils.errors import UserError, command_line
from utils.files import write_npz
from utils.progress import progress

VERTICES, IDENTITIES = 11248, 100
_PAIRS = ("browDown", "browInnerUp", "browOuterUp", "cheekPuff", "cheekSquint", "eyeBlink", "eyeLookDown", "eyeLookIn",
          "eyeLookOut", "eyeLookUp", "eyeSquint", "eyeWide", "mouthDimple", "mouthFrown", "mouthLowerDown", "mouthPress",
          "mouthSmile", "mouthStretch", "mouthUpperUp", "noseSneer")  # fmt: skip
_SINGLE = ("jawForward", "jawLeft", "jawOpen", "jawRight", "mouthClose", "mouthFunnel", "mouthLeft", "mouthPucker", "mouthRight",
           "mouthRollLower", "mouthRollUpper", "mouthShrugLower", "mouthShrugUpper")  # fmt: skip
EXPRESSIONS = tuple(sorted([f"{name}_{side}" for name in _PAIRS for side in "LR"] + list(_SINGLE)))
LANDMARKS_68 = (  # vertices of the iBUG points
    1225, 1888, 1052, 367, 1719, 1722, 2199, 1447, 966, 3661, 4390, 3927, 3924, 2608, 3272, 4088, 3443,
    268, 493, 1914, 2044, 1401, 3615, 4240, 4114, 2734, 2509, 978, 4527, 4942, 4857, 1140, 2075, 1147, 4269, 3360,
    1507, 1542, 1537, 1528, 1518, 1511, 3742, 3751, 3756, 3721, 3725, 3732,
    5708, 5695, 2081, 0, 4275, 6200, 6213, 6346, 6461, 5518, 5957, 5841, 5702, 5711, 5533, 6216, 6207, 6470, 5517, 5966,
)  # fmt: skip


def read_obj(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (V, 3) and the quads (Q, 4) among the faces, counted from 0. Raises UserError if it is no OBJ file."""
    vertices, quads = [], []
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("v "):
                    vertices.append(line.split()[1:4])
                elif line.startswith("f "):
                    corners = line.split()[1:]
                    if len(corners) == 4:
                        quads.append([corner.partition("/")[0] for corner in corners])
        points, faces = np.array(vertices, float), np.array(quads, int).reshape(-1, 4) - 1
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the FaceXModel folder of ICT-FaceKit") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); clone ICT-FaceKit again") from None
    if len(points) < VERTICES or points.shape[1:] != (3,) or not np.isfinite(points).all():
        raise UserError(f"{path} has {len(points)} vertices, not the ICT model's {VERTICES} of face, head and neck and more; clone "
                        "ICT-FaceKit again")  # fmt: skip
    return points, faces


def convert(folder: Path, output: Path) -> Path:
    """Write the packed model into `output` and return its path."""
    neutral, quads = read_obj(folder / "generic_neutral_mesh.obj")
    names = [f"identity{i:03d}" for i in range(IDENTITIES)] + list(EXPRESSIONS)
    offsets = np.zeros((len(names), VERTICES, 3), np.float16)
    for i, name in enumerate(progress(names, label="ICT face model")):
        points, _ = read_obj(folder / f"{name}.obj")
        if len(points) != len(neutral):
            raise UserError(f"{folder / name}.obj has {len(points)} vertices, the neutral face {len(neutral)}; clone ICT-FaceKit "
                            "again")  # fmt: skip
        offsets[i] = (points - neutral)[:VERTICES]
    target = model_store.MODELS["ict"].path_in(output)
    write_npz(target, neutral=neutral[:VERTICES].astype(np.float32), faces=quads[(quads < VERTICES).all(1)].astype(np.int32),
              identity=offsets[:IDENTITIES], expression=offsets[IDENTITIES:], expression_names=np.array(EXPRESSIONS),
              landmarks68=np.array(LANDMARKS_68))  # fmt: skip
    return target


@command_line
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="FaceXModel of ICT-FaceKit")
    parser.add_argument("--output", type=Path, default=model_store.REPOSITORY / "checkpoints", help="default %(default)s")
    options = parser.parse_args(arguments)
    print(convert(options.folder, options.output))


if __name__ == "__main__":
    main()
