"""Triangle surfaces: normals, subdivision, and a part of one as points."""

from __future__ import annotations

import numpy as np


def vertex_normals(points: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """(V, 3) unit normals, weighted by the area of the faces that meet."""
    a, b, c = (points[faces[:, i]] for i in range(3))
    normals = np.zeros_like(points)
    np.add.at(normals, faces.ravel(), np.repeat(np.cross(b - a, c - a), 3, 0))
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)


def subdivide(points: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One step of Loop subdivision (C. Loop 1987; Warren's weights): every face becomes four and the surface smoother."""
    corners = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1)
    edges, edge_of, uses = np.unique(corners, axis=0, return_inverse=True, return_counts=True)
    edge_of = edge_of.reshape(3, -1).T  # (T, 3): edges 01, 12, 20 of each face
    middles = points[edges].mean(1)
    opposite = np.zeros_like(middles)
    np.add.at(opposite, edge_of, points[faces[:, [2, 0, 1]]])
    inner = uses == 2
    middles[inner] = 0.75 * middles[inner] + 0.125 * opposite[inner]

    rim = np.zeros(len(points), bool)
    rim[edges[~inner]] = True
    smooth = points.copy()
    for chosen, weights in ((inner, None), (~inner, 0.125)):
        links = np.concatenate([edges[chosen], edges[chosen][:, ::-1]])
        total, degree = np.zeros_like(points), np.zeros(len(points))
        np.add.at(total, links[:, 0], points[links[:, 1]])
        np.add.at(degree, links[:, 0], 1)
        if weights is None:
            own = ~rim & (degree > 0)
            weight = np.where(degree == 3, 3 / 16, 3 / (8 * np.maximum(degree, 1)))[own, None]
            smooth[own] = points[own] * (1 - degree[own, None] * weight) + weight * total[own]
        else:
            smooth[rim] = 0.75 * points[rim] + weights * total[rim]
    a, b, c = faces.T
    ab, bc, ca = (edge_of + len(points)).T
    split = np.concatenate([np.stack(f, 1) for f in ((a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca))])
    return np.concatenate([smooth, middles]), split


def dense_part(points: np.ndarray, faces: np.ndarray, part: np.ndarray, fewest: int) -> tuple[np.ndarray, np.ndarray]:
    """Points (P, 3) and normals of the vertices `part` (V,) bool and the surface between them, subdivided until P >= fewest."""
    weight = np.repeat(part.astype(float)[:, None], 3, 1)
    while (weight[:, 0] > 0.5).sum() < fewest:
        weight = subdivide(weight, faces)[0]
        points, faces = subdivide(points, faces)
    chosen = weight[:, 0] > 0.5
    return points[chosen], vertex_normals(points, faces)[chosen]
