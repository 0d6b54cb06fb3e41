"""What lies behind the rendered head, frame by frame, and how the head is put on it.

* none: the body without its head over the clip's background plate, or over another background
* headless: the filmed frame with its head taken out: true body and background, which may move, and behind the head the above
* original: the frame as it was filmed; only around the jaw, which moves differently now, the body without its head
* full: the same within the whole picture of the source video, back through crop.json
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageColor
from torch import Tensor

from gaussian_renderer.compositing import composite, edge_weight, rim_recoloured, straight
from utils.constants import HAIR, HAT, IMAGE_SIZE, PART_CLASSES
from utils.errors import UserError
from utils.files import read_json
from utils.image import read_rgb

PASTES = ("none", "headless", "original", "full")
GREEN = "#00ff00"
REACH = 8  # pixels at 512 around the filmed head or jaw that are taken from the body without its head, and of skin at the hairline
KEY_EDGE = 2.0  # softness at 512 of the person's edge when cut out of the filmed background
KEY_RIM = 6.0  # how far in, at 512, the filmed background colours the person: compositing.rim_recoloured
UPPER_LIP = 51  # of the 68 landmarks: what lies higher does not move with the jaw


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the rendering goes: a square of `side` pixels at (x, y) of a width x height picture.

    In a source video larger than the data set's frames the head is drawn with `scale` times as many pixels a side, the
    video's own; elsewhere 1.
    """

    width: int
    height: int
    x: int = 0
    y: int = 0
    side: int | None = None  # None: the rendering is the picture
    scale: float = 1.0

    def drawn(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the drawing where the data set's frames have width x height; even, as video wants."""
        return (width, height) if self.scale == 1 else (self.side + self.side % 2,) * 2


def read_background(text: str, width: int, height: int) -> np.ndarray:
    """(H, W, 3) uint8 of a picture file (filled and centred, cut where the shape differs), a colour or "green".

    Raises UserError if `text` is neither.
    """
    if Path(text).is_file():
        try:
            image = read_rgb(Path(text))
        except UserError:
            raise UserError(f"--background {text} is no picture that can be read; give a PNG or JPEG file, or a colour") from None
        scale = max(width / image.shape[1], height / image.shape[0])
        size = max(width, round(image.shape[1] * scale)), max(height, round(image.shape[0] * scale))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
        y, x = (size[1] - height) // 2, (size[0] - width) // 2
        return np.ascontiguousarray(image[y : y + height, x : x + width])
    try:
        colour = ImageColor.getrgb(GREEN if text == "green" else text)[:3]
    except ValueError:
        raise UserError(f"--background {text} is neither a picture that exists nor a colour; give a file, green, white or "
                        "#rrggbb") from None  # fmt: skip
    return np.full((height, width, 3), colour, np.uint8)


class Backdrops:
    """Pictures behind the head that `part` models: `place` says how large they are, `batch(ids)` makes them.

    reader: TalkingDatasetReader. `background`: see read_background; `transparent` leaves it out. With either, `keyed` is true, the
    pictures are RGBA and hold only the person; what comes behind is `background` (H, W, 3) uint8, if anything.
    Raises UserError where the source video is gone or is another one.
    """

    def __init__(self, reader, part: str, paste: str = "none", background: str | None = None, transparent: bool = False):
        self.reader, self.part, self.paste = reader, part, paste
        self.place = Place(reader.width, reader.height)
        self.keyed = transparent or background is not None  # the person is cut out of the filmed background
        self.background = None if background is None else read_background(background, reader.width, reader.height)
        if paste == "full":
            self._open_source()

    def _open_source(self) -> None:
        from utils.video import FrameReader  # brings PyAV, which the other ways do without

        crop = read_json(self.reader.folder.require(self.reader.folder.crop))
        path = Path(crop.get("video", ""))
        if not path.is_file():
            raise UserError(f"--paste full needs the source video {path}, which is gone; put it back, or use --paste original")
        self._source = FrameReader(path)
        size, wanted = (self._source.width, self._source.height), (crop["source_width"], crop["source_height"])
        if size != wanted:
            raise UserError(f"{path} is not the video that was processed: it has {size[0]}x{size[1]} pixels, crop.json says "
                            f"{wanted[0]}x{wanted[1]}; put the right one there or run process.py again")  # fmt: skip
        # H.264 wants even sides: an odd one loses its last row or column
        self.place = Place(self._source.width // 2 * 2, self._source.height // 2 * 2, crop["x"], crop["y"], crop["side"],
                           max(1.0, crop["side"] / self.reader.width))  # fmt: skip

    def batch(self, ids: list[int]) -> np.ndarray:
        """(B, H, W, 3 or 4) uint8."""
        if self.paste != "full":
            return np.stack([self[i] for i in ids])
        filmed = self._source.batch(ids)
        return np.stack([self._within(picture, i) for picture, i in zip(filmed, ids, strict=True)])

    def __getitem__(self, i: int) -> np.ndarray:
        """(H, W, 3 or, keyed, 4) uint8 of frame `i`."""
        if self.paste == "none":
            return self._body(i)
        if self.paste == "full":
            return self._within(self._source[i], i)
        return _mix(self.reader.image(i), self._body(i), self._replaced(i))

    def _within(self, picture: np.ndarray, i: int) -> np.ndarray:
        """Frame `i` of the source video, `picture`, with what is replaced in the window of the data set."""
        p, behind, weight = self.place, self._body(i), self._replaced(i)
        picture = picture[: p.height, : p.width].copy()
        window = picture[p.y : p.y + p.side, p.x : p.x + p.side]
        shape = window.shape[1::-1]
        behind, weight = (cv2.resize(m, (p.side, p.side), interpolation=cv2.INTER_LINEAR) for m in (behind, weight))
        window[:] = _mix(window, behind[: shape[1], : shape[0]], weight[: shape[1], : shape[0]])
        return picture

    def _body(self, i: int) -> np.ndarray:
        """The body without what is rendered, over the background: without its head, its face, or the background alone."""
        if self.part == "all":
            plate = self.reader.plate
            return np.zeros((*plate.shape[:2], 4), np.uint8) if self.keyed else plate
        body = self.reader.torso(i) if self.keyed else self.reader.backdrop(i)
        return self._with_hair(body, i) if self.part == "face" else body

    def _with_hair(self, body: np.ndarray, i: int) -> np.ndarray:
        """`body` and the filmed hair, which a face without hair leaves where it is, with the skin of the hairline."""
        classes = self.reader.parsing(i)
        hair = (_widened(np.isin(classes, (HAIR, HAT))) > 0) & np.isin(classes, PART_CLASSES["head"])
        body = body.copy()
        body[hair, :3] = self.reader.image(i)[hair]
        body[hair, 3:] = 255
        return body

    def _replaced(self, i: int) -> np.ndarray:
        """(H, W) float32 in [0, 1]: 1 on the filmed lower face, or the whole head, and just around it: it must not show."""
        classes = self.reader.parsing(i)
        gone = np.isin(classes, PART_CLASSES[self.part if self.paste == "headless" else "face"])
        if self.paste != "headless":
            lip = int(np.clip(self.reader.landmarks(i)[UPPER_LIP, 1], 0, len(classes) - 1))
            gone[:lip] = False
        return cv2.GaussianBlur(_widened(gone), (0, 0), max(0.5, _reach(gone) / 3))


def _reach(picture: np.ndarray) -> int:
    """REACH in pixels of this picture."""
    return max(1, round(REACH * picture.shape[1] / IMAGE_SIZE))


def _widened(mask: np.ndarray) -> np.ndarray:
    """(H, W) float32: 1 within REACH of the mask."""
    size = 2 * _reach(mask) + 1
    return cv2.dilate(mask.astype(np.float32), cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size)))


def _mix(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: a + weight (b - a) for (H, W) weights."""
    return (a + weight[..., None] * (b.astype(np.float32) - a) + 0.5).astype(np.uint8)


def put_on(rgb: Tensor, alpha: Tensor, behind: Tensor, feather: float, place: Place, background: Tensor | None = None) -> Tensor:
    """The rendering (premultiplied `rgb` (B, 3, h, w), `alpha` (B, 1, h, w)) on the picture `behind`, all in [0, 1].

    `behind` (B, 3, H, W), or (B, 4, H, W) of what else is seen of the person: head and body are then cut out together and
    put on `background` (1, 3, H, W), or without one the result is RGBA with straight (not premultiplied) alpha.
    `feather`: compositing.composite.
    """
    if place.side is not None:
        return _into(rgb, alpha, behind, feather, place)
    if behind.shape[1] == 3:
        return composite(rgb, alpha, behind, feather)
    body = behind[:, 3:]
    person = composite(torch.cat([rgb, alpha], 1), alpha, torch.cat([behind[:, :3] * body, body], 1), feather)
    # as one shape: its outermost pixels hold the filmed background's colour, and where head meets body there is no edge
    pixel = alpha.shape[-1] / IMAGE_SIZE
    person = rim_recoloured(person, KEY_RIM * pixel) * edge_weight(person[:, 3:], KEY_EDGE * pixel)
    if background is not None:
        return torch.addcmul(person[:, :3], 1 - person[:, 3:], background)
    return torch.cat([straight(person), person[:, 3:]], 1)


def _into(rgb: Tensor, alpha: Tensor, behind: Tensor, feather: float, place: Place) -> Tensor:
    """The rendering, reduced if it is larger, in its square of a larger picture `behind`."""
    weight = edge_weight(alpha, feather * alpha.shape[-1] / IMAGE_SIZE) if feather > 0 else 1.0
    head = torch.cat([rgb * weight, alpha * weight], 1)
    if place.scale == 1 and place.side != head.shape[-1]:
        head = F.interpolate(head, (place.side, place.side), mode="bicubic", antialias=True, align_corners=False).clamp_(0, 1)
    head = head[..., : min(place.side, place.height - place.y), : min(place.side, place.width - place.x)]
    rows, columns = slice(place.y, place.y + head.shape[-2]), slice(place.x, place.x + head.shape[-1])
    picture = behind.clone()
    picture[..., rows, columns] = composite(head[:, :3], head[:, 3:], behind[..., rows, columns])
    return picture
