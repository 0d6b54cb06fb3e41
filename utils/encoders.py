"""The video encoders that a rendering may go through: FFmpeg's name -> pixel format and the options that mean one quality."""

from __future__ import annotations

import dataclasses

import av

from utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Encoder:
    """`quality` is the option that takes --crf (0 best, 51 worst)."""

    pixels: str = "yuv420p"
    quality: str | None = "crf"
    options: tuple[tuple[str, str], ...] = ()


ENCODERS = {
    "libx264": Encoder(options=(("preset", "veryfast"),)),
    "libx265": Encoder(options=(("preset", "veryfast"), ("x265-params", "log-level=error"))),
    "h264_nvenc": Encoder(quality="cq", options=(("preset", "p4"), ("rc", "vbr"))),
    "hevc_nvenc": Encoder(quality="cq", options=(("preset", "p4"), ("rc", "vbr"))),
}
LOSSLESS = Encoder("rgb24", None, (("qp", "0"), ("preset", "veryfast")))  # libx264rgb: decoded frames equal the ones given
# libx264, for coloured maps: a third of the work of the above, 50 dB
SKETCH = Encoder(quality=None, options=(("preset", "ultrafast"), ("qp", "20")))
ALPHA = Encoder("yuva444p10le", None, (("profile", "4444"),))  # prores_ks


@dataclasses.dataclass(frozen=True)
class Codec:
    """What a stream is opened with."""

    name: str
    pixels: str
    options: dict[str, str]


def codec(encoder: str = "libx264", crf: int = 18, lossless: bool = False, alpha: bool = False, sketch: int = 0) -> Codec:
    """`lossless`, `sketch` and `alpha` have codecs of their own: RGB H.264, quick H.264 on so many threads (several are written at
    once), ProRes 4444, whose frames carry alpha."""
    name, kind = encoder, ENCODERS[encoder]
    for chosen, other in ((lossless, ("libx264rgb", LOSSLESS)), (sketch, ("libx264", SKETCH)), (alpha, ("prores_ks", ALPHA))):
        name, kind = other if chosen else (name, kind)
    quality = {kind.quality: str(crf)} if kind.quality else {}
    threads = {"threads": str(sketch)} if sketch else {}
    return Codec(name, kind.pixels, dict(kind.options) | quality | threads)


def check(chosen: Codec, width: int, height: int, remedy: str = "choose another --encoder") -> None:
    """Open the encoder once and let it go. Raises UserError if this FFmpeg lacks it, or this machine what it runs on."""
    level = av.logging.get_level()
    av.logging.set_level(av.logging.PANIC)  # NVENC without a driver tells stderr at length what the sentence below says
    try:
        context = av.CodecContext.create(chosen.name, "w")
        context.width, context.height, context.pix_fmt, context.framerate = width, height, chosen.pixels, 25
        context.options = chosen.options
        context.open()
    except av.codec.codec.UnknownCodecError:
        raise UserError(f"video encoder {chosen.name} is not part of this FFmpeg (PyAV {av.__version__}); {remedy}") from None
    except av.FFmpegError as error:
        reason = (error.log[2] if error.log else error.strerror).strip()
        raise UserError(f"video encoder {chosen.name} does not work on this machine for pictures of {width}x{height} ({reason}); "
                        f"{remedy}") from None  # fmt: skip
    finally:
        av.logging.set_level(level)
