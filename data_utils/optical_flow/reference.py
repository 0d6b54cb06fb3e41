"""Reference frames of the head stabiliser: which frames, and what they say about every pixel of the face."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np

from data_utils.face_tracking.fit import REFERENCE_SIDE, Fit
from data_utils.face_tracking.surface import subdivide, vertex_normals
from data_utils.pose_solver import Poses, project
from utils.constants import EARS, FACE_CLASSES, HAIR, HEAD_CLASSES
from utils.dataset_folder import DatasetFolder
from utils.image import nearest, read_parsing, read_rgb

MOST_REFERENCES = 4
REFERENCE_SPACING = np.radians(6.0)  # a view further than this from every reference gets its own
CANDIDATES = 12  # frames whose sharpness is compared
KEYPOINTS = 500  # at most, over all references
KEYPOINT_SPACING = 5  # px at 512
OUTLINE = 8  # px at 512: so near to the outline of the head pictures show now this hair, now that
FACE_ANCHOR, HAIR_ANCHOR = 0.05, 0.5  # dm, deviation of a keypoint about its first guess: hair has no surface yet
RIGID_SHARE = 0.5  # of the vertices around a pixel that must be rigid for a keypoint there
DENSE_ENOUGH = 10_000  # triangles: a coarser face is subdivided, so that its outline and slopes are smooth
MARGIN = 24  # px at 512 around the rigid region


@dataclasses.dataclass
class Reference:
    """A reference frame, cropped to the rigid region. Crop pixels count from its corner, their centres at integers (OpenCV)."""

    frame: int  # index among the valid frames
    corner: np.ndarray  # (2,) px of the crop's first pixel in the frame
    image: np.ndarray  # (h, w, 3) uint8
    surface: np.ndarray  # (h, w, 3) dm: the point of the head that each pixel shows (continued smoothly off the face)
    keypoints: np.ndarray  # (K, 2) crop pixels
    points: np.ndarray  # (K, 3) dm, of the keypoints
    normals: np.ndarray  # (K, 3) outward
    anchors: np.ndarray  # (K,) dm, how far the points may be off

    def map_to(self, pose: Poses, focal: float, centre: np.ndarray) -> np.ndarray:
        """(h, w, 2) float32: where each crop pixel's surface point lies in a frame of that pose (one frame), OpenCV pixels."""
        pixels = project(self.surface.reshape(-1, 3), pose, focal, centre)
        return (pixels.reshape(*self.surface.shape[:2], 2) - 0.5).astype(np.float32)


def view_directions(poses: Poses) -> np.ndarray:
    """(F, 3) unit vectors from the head to the camera, in the head's frame: what turning changes and in-plane motion does not."""
    centres = -(poses.rotation.transpose(0, 2, 1) @ poses.translation[..., None])[..., 0]
    return centres / np.linalg.norm(centres, axis=1, keepdims=True)


def choose_references(fit: Fit, folder: DatasetFolder, ids: np.ndarray, blink: np.ndarray) -> list[int]:
    """Indices of the reference frames, the main one first: frontal, neutral, eyes open, at rest, sharp; then turned views.

    blink (F,) is 0 with open eyes. A further reference is taken wherever the head turns REFERENCE_SPACING away from all others.
    """
    views = view_directions(fit.poses)
    typical = np.median(views, axis=0)
    # of an expression: its size; of motion: pixels a frame of a point on the head
    expression = np.linalg.norm(fit.expression - np.median(fit.expression, 0), axis=1) / np.sqrt(max(1, fit.expression.shape[1]))
    pixels = project(fit.model.mean[fit.model.rigid][::10], fit.poses, fit.focal, np.zeros(2)).mean(1)
    speed = np.linalg.norm(np.gradient(pixels, axis=0), axis=1) if len(ids) > 1 else np.zeros(1)
    rest = expression + 2 * blink + np.minimum(speed / (0.002 * fit.focal), 3)

    def best(direction: np.ndarray) -> int:
        angle = np.arccos(np.clip(views @ (direction / np.linalg.norm(direction)), -1, 1))
        order = np.argsort(rest + angle / np.radians(3))[:CANDIDATES]
        sharpness = np.array([_sharpness(folder, int(ids[i]), pixels[i]) for i in order])
        return int(order[np.argmax(sharpness / sharpness.max() - 0.1 * (rest[order] + angle[order] / np.radians(3)))])

    chosen = [best(typical)]
    usual = np.percentile(np.arccos(np.clip(views @ views[chosen[0]], -1, 1)), 99)
    while len(chosen) < MOST_REFERENCES:
        turned = np.arccos(np.clip(views @ views[chosen].T, -1, 1))
        nearest = np.where(turned[:, 0] <= usual, turned.min(1), 0)  # a wild pose is no place for a reference
        if nearest.max() < REFERENCE_SPACING:
            break
        candidate = best(views[nearest.argmax()])
        if turned[candidate].min() < REFERENCE_SPACING / 2:
            break
        chosen.append(candidate)
    return chosen


def _sharpness(folder: DatasetFolder, frame: int, middle: np.ndarray) -> float:
    grey = cv2.cvtColor(read_rgb(folder.frame(frame)), cv2.COLOR_RGB2GRAY)
    half = grey.shape[0] // 6
    x, y = (middle + np.array(grey.shape[::-1]) / 2).astype(int)
    face = grey[max(0, y - half) : y + half, max(0, x - half) : x + half]
    return float(cv2.Laplacian(face, cv2.CV_32F).var()) + 1e-6 if face.size else 1e-6


def make_reference(fit: Fit, folder: DatasetFolder, ids: np.ndarray, frame: int, centre: np.ndarray, keypoints: int) -> Reference:
    """Prepare the reference at index `frame` with at most `keypoints` well-textured points of the rigid region.

    A third of them lie on hair and ears, where there are any: the front of a face is nearly flat and its skin moves, so that alone
    it leaves the head's turn in doubt by half a degree. Their depth is a guess that bundle adjustment mends.
    """
    image = read_rgb(folder.frame(int(ids[frame])))
    scale = max(image.shape[:2]) / REFERENCE_SIDE
    points, faces = fit.vertices(slice(frame, frame + 1))[0], fit.model.triangles
    rigid = fit.model.rigid.astype(float)[:, None]
    for _ in range(2):
        if len(faces) >= DENSE_ENOUGH:
            break
        flags = subdivide(np.repeat(rigid, 3, 1), faces)[0][:, :1]
        points, faces = subdivide(points, faces)
        rigid = flags
    normals = vertex_normals(points, faces)
    pose = fit.poses[frame : frame + 1]
    pixels = project(points, pose, fit.focal, centre)[0] - 0.5

    parsing = read_parsing(folder.parsing(int(ids[frame]))) if folder.parsing(int(ids[frame])).exists() else None
    bone = _hair_and_ears(parsing, scale)
    region = np.concatenate([pixels[rigid[:, 0] > 0.5], np.argwhere(bone)[:, ::-1]])
    low = np.maximum(np.floor(region.min(0) - MARGIN * scale), 0).astype(int)
    high = np.minimum(np.ceil(region.max(0) + MARGIN * scale) + 1, image.shape[1::-1]).astype(int)
    size = tuple(high - low)
    local = pixels - low
    toward = -(pose.rotation[0] @ points.T).T - pose.translation[0]
    facing = ((pose.rotation[0] @ normals.T).T * toward).sum(1) > 0
    front = facing[faces].all(1)
    surface, covered = _rasterise(local, points, toward[:, 2], faces[front], size)
    mask, _ = _rasterise(local, np.repeat(rigid, 3, 1), toward[:, 2], faces[front], size)
    inside = slice(low[1], high[1]), slice(low[0], high[0])
    allowed = covered & (mask[..., 0] > RIGID_SHARE)
    if parsing is not None:  # hair over the forehead and hands are not bone
        allowed &= np.isin(parsing, FACE_CLASSES)[inside]
    allowed = _eroded(allowed, 2 * scale)

    crop = np.ascontiguousarray(image[inside])
    grey = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)

    def textured(mask: np.ndarray, most: int) -> np.ndarray:
        found = cv2.goodFeaturesToTrack(grey, most, 0.005, KEYPOINT_SPACING * scale, mask=mask.astype(np.uint8), blockSize=7)
        return np.zeros((0, 2), np.float32) if found is None else found[:, 0]

    on_bone = textured(bone[inside] & ~allowed, keypoints // 3) if bone.any() else np.zeros((0, 2), np.float32)
    on_face = textured(allowed, keypoints - len(on_bone))
    found = np.concatenate([on_face, on_bone])
    anchors = np.repeat([FACE_ANCHOR, HAIR_ANCHOR], [len(on_face), len(on_bone)])
    at = tuple(np.round(found).astype(int).T[::-1])
    everywhere = _continued(surface, covered, pose, fit.focal, centre - low)
    return Reference(frame, low, crop, everywhere, found, everywhere[at], normals[_nearest(local, found)], anchors)


def _hair_and_ears(parsing: np.ndarray | None, scale: float) -> np.ndarray:
    """(H, W) bool: hair and ears away from the head's outline, which turns with the view."""
    if parsing is None:
        return np.zeros((1, 1), bool)
    head = _eroded(np.isin(parsing, HEAD_CLASSES), OUTLINE * scale)
    return head & _eroded(np.isin(parsing, (HAIR, *EARS)), 2 * scale)


def _eroded(mask: np.ndarray, reach: float) -> np.ndarray:
    return cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8), iterations=max(1, round(reach)), borderValue=0) > 0


def _rasterise(pixels: np.ndarray, values: np.ndarray, depth: np.ndarray, faces: np.ndarray,
               size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Interpolate vertex values (V, 3) over the pixels of a (w, h) picture: (h, w, 3) and what is covered. Far faces first."""
    out, covered = np.zeros((size[1], size[0], 3)), np.zeros((size[1], size[0]), bool)
    for face in faces[np.argsort(-depth[faces].mean(1))]:
        a, b, c = pixels[face]
        low = np.maximum(np.ceil(np.min([a, b, c], 0)), 0).astype(int)
        high = np.minimum(np.floor(np.max([a, b, c], 0)) + 1, size).astype(int)
        area = (b[0] - a[0]) * (c[1] - a[1]) - (c[0] - a[0]) * (b[1] - a[1])
        if (high <= low).any() or abs(area) < 1e-9:
            continue
        x, y = np.meshgrid(np.arange(low[0], high[0]), np.arange(low[1], high[1]))
        v = ((x - a[0]) * (c[1] - a[1]) - (c[0] - a[0]) * (y - a[1])) / area
        w = ((b[0] - a[0]) * (y - a[1]) - (x - a[0]) * (b[1] - a[1])) / area
        inside = (v >= -1e-6) & (w >= -1e-6) & (v + w <= 1 + 1e-6)
        weights = np.stack([1 - v - w, v, w], -1)[inside]
        out[y[inside], x[inside]] = weights @ values[face]
        covered[y[inside], x[inside]] = True
    return out, covered


def _continued(surface: np.ndarray, covered: np.ndarray, pose: Poses, focal: float, centre: np.ndarray) -> np.ndarray:
    """The surface with depth continued from the nearest covered pixel, so that a warp by it has no tears."""
    rotation, translation = pose.rotation[0], pose.translation[0]
    depth = (surface @ rotation.T + translation)[..., 2]
    filled = depth.ravel()[nearest(covered)[0]]
    smooth = cv2.GaussianBlur(filled, (0, 0), 0.02 * max(depth.shape))
    filled = np.where(covered, filled, smooth)
    x, y = np.meshgrid(np.arange(depth.shape[1]) + 0.5, np.arange(depth.shape[0]) + 0.5)
    camera = np.stack([-(x - centre[0]) * filled / focal, (y - centre[1]) * filled / focal, filled], -1)
    return (camera - translation) @ rotation


def _nearest(points: np.ndarray, queries: np.ndarray) -> np.ndarray:
    return np.linalg.norm(points[None] - queries[:, None], axis=2).argmin(1) if len(queries) else np.zeros(0, int)
