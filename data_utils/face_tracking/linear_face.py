"""What a face model is: mean, identity and expression bases, triangles, landmarks, rigid region.

Geometry is in decimetres in the head's frame (x to the viewer's right, y up, z out of the face, the face's middle at the origin);
coefficients are in units of their standard deviation and bounded at 5.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.spatial import cKDTree

COEFFICIENT_BOUND = 5.0  # standard deviations
CM_PER_DM = 10.0


@dataclasses.dataclass(frozen=True)
class FaceModel:
    """A linear face: vertices = mean + identity coefficients x identity + expression coefficients x expression."""

    name: str
    mean: np.ndarray  # (V, 3) dm
    identity: np.ndarray  # (K, V, 3) dm a standard deviation
    expression: np.ndarray  # (E, V, 3) dm a standard deviation; E = 0 until a clip has given its own
    triangles: np.ndarray  # (T, 3) vertex ids, counter-clockwise seen from outside
    landmark_ids: np.ndarray  # (L,) of the 478 dense landmarks ...
    landmark_vertices: np.ndarray  # (L,) ... and the vertex each is
    rigid: np.ndarray  # (V,) bool: skin over bone (forehead, nose, cheekbones), unmoved by speech, gaze and emotion
    landmark_steady: np.ndarray | None = None  # (L,) bool: hardly moved by speech, gaze and emotion; else those of `rigid`
    landmark_noise: np.ndarray | None = None  # (L,) error as a multiple of an exact landmark's; else 1
    # contour landmarks have no vertex of their own: of C candidates the outermost in the picture counts. Rows are G such landmarks
    contour: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 1), int))  # (G, C) indices among the L
    contour_side: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))  # (G,) -1 left-most, 1 right-most in x
    expression_of_clip: bool = False  # the expressions are a clip's own, not the model's

    def __post_init__(self) -> None:
        if self.landmark_steady is None:
            object.__setattr__(self, "landmark_steady", self.rigid[self.landmark_vertices])
        if self.landmark_noise is None:
            object.__setattr__(self, "landmark_noise", np.ones(len(self.landmark_ids)))

    def vertices(self, identity: np.ndarray, expression: np.ndarray, chosen=slice(None)) -> np.ndarray:
        """(K,) and (..., E) coefficients -> (..., V, 3) dm, all vertices or the `chosen` ones."""
        neutral = self.mean[chosen] + np.tensordot(identity, self.identity[:, chosen], 1)
        return neutral + np.tensordot(expression, self.expression[:, chosen], 1)

    def with_expression(self, expression: np.ndarray) -> FaceModel:
        """The same face with a clip's own (E, V, 3) expression basis."""
        return dataclasses.replace(self, expression=np.asarray(expression, float), expression_of_clip=True)

    def outermost(self, x: np.ndarray) -> np.ndarray:
        """(F, L) bool from the landmarks' x in the picture (F, L): of a contour landmark's candidates only the outermost."""
        counts = np.ones(x.shape, bool)
        counts[:, self.contour.ravel()] = False
        best = (x[:, self.contour] * self.contour_side[:, None]).argmax(2)  # (F, G)
        counts[np.arange(len(x))[:, None], self.contour[np.arange(len(self.contour)), best]] = True
        return counts

    @property
    def landmark_count(self) -> int:
        """Landmarks in a frame, a contour landmark's candidates counted once."""
        return len(self.landmark_ids) - self.contour.size + len(self.contour)


def rigid_region(points: np.ndarray, lips: np.ndarray, eyes: np.ndarray, brows: np.ndarray, nose_base: np.ndarray) -> np.ndarray:
    """(V,) bool: points (V, 3) dm on forehead, nose bridge and cheekbones, told by the places (n, 3) of the parts that move.

    Distances chosen by eye on faces; what lies beyond the face (scalp, ears, neck) is for the caller to leave out.
    """

    def distance(part: np.ndarray) -> np.ndarray:
        return cKDTree(part).query(points)[0]

    above_nose_base = points[:, 1] > nose_base[1] + 0.05
    return above_nose_base & (distance(lips) > 0.3) & (distance(eyes) > 0.12) & (distance(brows) > 0.08)
