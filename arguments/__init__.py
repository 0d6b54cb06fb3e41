"""Settings: four groups of defaults, a Python file of overrides (custom.py unless another is named), the command line. Later
beats earlier.

The merged settings are written to <model>/cfg_args as the text of an argparse Namespace (SIBR reads it too) and read back
with ast: nothing a user was handed is ever executed.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import sys
from dataclasses import field
from pathlib import Path

from utils.errors import UserError
from utils.files import write_bytes

TOKENS = ("audio", "expression", "camera", "frame", "null")
DEFORMABLE = ("xyz", "scaling", "rotation", "opacity", "sh")
UNBOUNDED = sys.float_info.max  # what is no larger is finite
WINNER = Path(__file__).with_name("custom.py")  # what --configs is unless given


def option(default, text: str, minimum: float = 0, maximum: float = UNBOUNDED, **extra):
    """A setting with its default and its line of --help; a number is finite and lies between `minimum` and `maximum`."""
    return field(default=default, metadata={"help": text, "minimum": minimum, "maximum": maximum, **extra})


@dataclasses.dataclass
class ModelParams:
    """What is learned from what, and where it goes."""

    source_path: str = option("", "data set folder that data_utils/process.py wrote", short="-s")
    model_path: str = option("", "model folder to write (default model/<name of the data set>)", short="-m")
    part: str = option("head", "what the surfels model", choices=("head", "face", "all"))
    audio_encoder: str = option("auto", "which aud_<encoder>.npy drives the mouth; auto takes the one stage 1 made, else the best")
    sh_degree: int = option(1, "degree of the view-dependent colour, 0 to 3", maximum=3)
    max_points: int = option(50_000, "surfels never grow beyond this number", minimum=100)
    seed_points: int = option(8_000, "points added to the face mesh for hair, ears and mouth before training")


@dataclasses.dataclass
class PipelineParams:
    """How it runs."""

    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    seed: int = option(6666, "two runs with one seed on one CPU are the same; on a GPU sums come in order of arrival, and they "
                       "part slowly", maximum=2**32 - 1)  # fmt: skip
    checkpoint_interval: int = option(500, "iterations between checkpoints that a killed run continues from", minimum=1)
    log_interval: int = option(10, "iterations between TensorBoard scalars", minimum=1)


@dataclasses.dataclass
class OptimizationParams:
    """The recipe."""

    iterations: int = option(18_000, "all iterations, coarse and fine", minimum=1)
    coarse_iterations: int = option(8_000, "iterations of the static head before the conditions come in")
    batch_size: int = option(16, "frames a fine iteration; the coarse stage uses a quarter", minimum=1)
    xyz_lr: float = option(1.6e-4, "surfel positions, dm; falls to 1/100 within each stage")
    plane_lr: float = option(1.6e-3, "tri-plane; falls to 1/10")
    embedding_lr: float = option(2.5e-3, "embeddings of the surfels; falls to 1/10")
    network_lr: float = option(5e-4, "attention, heads and token encoders; falls to 1/10")
    feature_lr: float = option(2.5e-3, "colour (higher SH degrees a twentieth of it)")
    opacity_lr: float = option(0.05, "opacity logits")
    scaling_lr: float = option(5e-3, "log scales")
    rotation_lr: float = option(1e-3, "quaternions")
    lambda_ssim: float = option(0.2, "weight of 1 - SSIM; L1 has the rest", maximum=1)
    lambda_lips: float = option(0.4, "weight of the L1 inside the lip square")
    lambda_eyes: float = option(0.2, "weight of the L1 inside the eye squares: blinks are short and small")
    lambda_mask: float = option(0.4, "weight of |alpha - mask|")
    lambda_perceptual: float = option(0.01, "weight of the ST-LPIPS distance (0 saves its network)")
    perceptual_net: str = option("alex", "perceptual distance: ST-LPIPS on AlexNet or VGG-16, or LPIPS itself, where the packages "
                                "lpips and torchvision are", choices=("alex", "vgg", "lpips_alex", "lpips_vgg"))  # fmt: skip
    perceptual_on: tuple[str, ...] = option(("window",), "what it compares: all that is trained, the lip square, a random square",
                                            choices=("window", "lips", "square"))  # fmt: skip
    perceptual_side: int = option(64, "pixels a side of those squares, at least 48; the lips are resampled to it", minimum=48)
    perceptual_from: int = option(0, "first iteration with the perceptual distance")
    lip_sampling: float = option(0.0, "how much more often a frame with a wide or fast mouth is drawn (1: up to twice)")
    blink_share: float = option(0.05, "least share of the pictures drawn that show shut eyes: rare blinks are hardly learned",
                                maximum=0.5)  # fmt: skip
    blink_weight: float = option(1.0, "how much more lambda_eyes weighs in frames that show shut eyes, for a head that "
                                 "does not shut its own (4, with lambda_lips 0.8: docs/benchmarks.md)", minimum=1)  # fmt: skip
    lambda_attention: float = option(1e-3, "audio attention to the lower face, expression to the upper, frame off the face")
    lambda_opacity: float = option(0.0, "mean opacity: fewer half-seen surfels")
    lambda_scale: float = option(0.0, "surfels larger than 0.08 dm")
    lambda_motion: float = option(0.0, "difference of the motion of neighbouring surfels, dm")
    lambda_embedding: float = option(0.0, "squared difference of the embeddings of neighbouring surfels")
    pose_lr: float = option(0.0, "corrections of single frames' poses, rad and dm (0 leaves them as tracked)")
    lambda_pose: float = option(1e-3, "square of a frame's correction, a pixel costs 1")
    exposure_lr: float = option(0.0, "gain and offset of single frames (0 leaves them as filmed)")
    lambda_exposure: float = option(1e-3, "square of a frame's exposure, a fiftieth costs 1")
    lambda_normal: float = option(0.0, "normal consistency of 2DGS")
    lambda_distortion: float = option(0.0, "depth distortion of 2DGS")
    densify_from: int = option(500, "first iteration that grows surfels")
    densify_until: int = option(7_000, "last iteration that grows surfels")
    densify_interval: int = option(100, "iterations between growths", minimum=1)
    densify_fraction: float = option(0.05, "share of the surfels that grows each time", maximum=1)
    min_opacity: float = option(0.005, "fainter surfels are pruned", maximum=1)


@dataclasses.dataclass
class ModelHiddenParams:
    """The network."""

    surfel_features: str = option("plane", "what the network knows of a surfel: the tri-plane where it is, its own learned "
                                  "embedding, or their sum", choices=("plane", "embedding", "both"))  # fmt: skip
    deform: tuple[str, ...] = option(DEFORMABLE, "attributes that the conditions change", choices=DEFORMABLE)
    plane_resolution: int = option(64, "cells a side of the coarsest plane", minimum=2)
    plane_multires: tuple[int, ...] = option((1, 2), "resolutions, as multiples of the coarsest", minimum=1)
    plane_channels: int = option(32, "channels a plane and resolution; the model width is channels x resolutions", minimum=1)
    tokens: tuple[str, ...] = option(TOKENS[:4], "what surfels attend to", choices=TOKENS)
    heads: int = option(2, "attention heads", minimum=1)
    layers: int = option(1, "attention layers", minimum=1)
    ffn_hidden: int = option(128, "hidden width of an attention layer", minimum=1)
    net_width: int = option(128, "hidden width of the deformation heads", minimum=1)
    audio_window: int = option(8, "rows of speech features that a frame hears", choices=(8, 16))
    frame_code: str = option("sinusoidal", "frame token: slow waves of the frame index, or a learned code a frame",
                             choices=("sinusoidal", "embedding"))  # fmt: skip
    code_dropout: float = option(0.3, "share of training pictures that do without their learned frame code", maximum=0.9)
    condition_noise: float = option(0.2, "noise on audio, expression and camera in training, in their deviations")
    dropout: float = option(0.0, "dropout inside the attention", maximum=0.9)


GROUPS = (ModelParams, PipelineParams, OptimizationParams, ModelHiddenParams)
# a checkpoint continues with these alone: they are the shape of the model, its data, or what the stages made of it
FIXED = {f.name for f in dataclasses.fields(ModelHiddenParams)} | {
    "part", "audio_encoder", "audio_features", "frames", "sh_degree", "seed_points", "coarse_iterations",
}  # fmt: skip
SWITCHES = ("pose_lr", "exposure_lr")  # whether they are 0 decides what there is to learn; how large they are may change


def _literal(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every setting as a flag. Flags that are not given stay out of the Namespace, so that --configs can sit between."""
    usual = read_config_file(WINNER)
    for group_class in GROUPS:
        group = parser.add_argument_group(group_class.__name__, group_class.__doc__)
        for f in dataclasses.fields(group_class):
            names = [f"--{f.name}"] + ([f.metadata["short"]] if "short" in f.metadata else [])
            text = f"{f.metadata['help']} ({usual.get(f.name, f.default)!r})"
            kwargs = {"dest": f.name, "default": argparse.SUPPRESS, "help": text}
            if isinstance(f.default, bool):
                kwargs["action"] = argparse.BooleanOptionalAction
            elif isinstance(f.default, tuple):
                kwargs |= {"nargs": "+", "type": _literal, "choices": f.metadata.get("choices")}
            else:
                kwargs |= {"type": type(f.default), "choices": f.metadata.get("choices")}
            group.add_argument(*names, **kwargs)
    parser.add_argument("--configs", help="Python file of NAME = value lines (arguments/custom.py, whose values stand above)")


def read_config_file(path: str | Path) -> dict:
    """`name = literal` lines of a Python file -> dict; nothing is executed. Raises UserError naming the line."""
    names = {f.name for group in GROUPS for f in dataclasses.fields(group)}
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--configs {path} does not exist") from None
    except SyntaxError as error:
        raise UserError(f"--configs {path}, line {error.lineno}: {error.msg}") from None
    values = {}
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # the docstring
        try:
            (target,) = node.targets
            values[target.id] = ast.literal_eval(node.value)
        except (AttributeError, ValueError):
            raise UserError(f"--configs {path}, line {node.lineno}: only lines like  iterations = 10_000  are understood") from None
        if target.id not in names:
            raise UserError(f"--configs {path}, line {node.lineno}: there is no setting {target.id!r} (see train.py --help)")
    return values


def _check(f: dataclasses.Field, value) -> None:
    """Raises UserError if `value` is none that the setting can have."""
    many, choices, low, high = isinstance(f.default, tuple), *(f.metadata.get(name) for name in ("choices", "minimum", "maximum"))
    items = value if many and isinstance(value, (tuple, list)) else (value,)
    number = type(f.default[0] if many else f.default)
    if choices and not (items and all(item in choices for item in items)):
        raise UserError(f"{f.name} = {value!r} is not understood; choose from {', '.join(map(str, choices))}")
    if choices or number is str:
        return
    allowed = f"{'a whole' if number is int else 'a'} number of at least {low}" + (
        f" and at most {high}" if high < UNBOUNDED else ""
    )
    kinds = (int,) if number is int else (int, float)
    if not (items and all(type(item) in kinds and low <= item <= high for item in items)):
        raise UserError(f"{f.name} = {value!r} is not understood; give {allowed}")


def merge(command_line: argparse.Namespace) -> argparse.Namespace:
    """defaults < --configs < command line. Raises UserError if a value is none of a setting's choices or out of its bounds."""
    given = dict(vars(command_line))
    configs = given.pop("configs", None) or WINNER
    values = {f.name: f.default for group in GROUPS for f in dataclasses.fields(group)}
    values |= read_config_file(configs) | given
    for f in (f for group in GROUPS for f in dataclasses.fields(group)):
        _check(f, values[f.name])
    if (width := values["plane_channels"] * len(values["plane_multires"])) % values["heads"]:
        raise UserError(f"heads = {values['heads']} cannot share the model width of {width} (plane_channels times the number of "
                        "plane_multires) evenly; choose a divisor of it")  # fmt: skip
    return argparse.Namespace(**values)


def changes(saved: argparse.Namespace, config: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Where `config` differs from the settings `saved` with a checkpoint, as "batch_size 16 -> 8": what cannot be resumed, and
    what can. Paths, device and intervals are not named: no step depends on them."""
    refused, allowed = [], []
    for name, new in vars(config).items():
        old = getattr(saved, name, new)
        same = list(old) == list(new) if isinstance(new, (tuple, list)) else old == new  # argparse makes lists of our tuples
        if same or name in ("source_path", "model_path", "device", "checkpoint_interval", "log_interval"):
            continue
        fixed = name in FIXED or (name in SWITCHES and bool(old) != bool(new))
        (refused if fixed else allowed).append(f"{name} {old} -> {new}")
    return refused, allowed


def write_cfg_args(model_path: str | Path, config: argparse.Namespace) -> None:
    write_bytes(Path(model_path) / "cfg_args", str(config).encode())


def read_cfg_args(model_path: str | Path) -> argparse.Namespace:
    """The settings a model was trained with. Raises UserError if the file is absent or no Namespace of literals."""
    path = Path(model_path) / "cfg_args"
    try:
        call = ast.parse(path.read_text(encoding="utf-8"), mode="eval").body
        values = {f.name: f.default for group in GROUPS for f in dataclasses.fields(group)}  # settings younger than the model
        return argparse.Namespace(**values | {k.arg: ast.literal_eval(k.value) for k in call.keywords})
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give a model folder that train.py wrote (--model_path model/<name>)") from None
    except (SyntaxError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); train again or restore it from a backup") from None
