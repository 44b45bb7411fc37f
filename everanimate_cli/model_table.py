"""The published pose models: which there are, and what a name on the command line means.

Standard library only, so that checks of options load nothing heavy.

Where a checksum is given, two or more unrelated public projects state the same one for that file.
The eight digits in OpenMMLab's file names are no help: they are the start of the hash of the
training checkpoint (the `.pth` file of the same name), from which the ONNX file was exported.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final, Literal

from everanimate_cli.errors import InputError, SettingsError

Channels = Literal["rgb", "bgr"]
TOY: Final = "toy"
# ViTPose-H is published as a folder of 394 files whose weights lie beside the ONNX file.
FOLDER_MEMBER: Final = "end2end.onnx"
_OPENMMLAB = "https://download.openmmlab.com/mmpose/v1/projects/"
_HUB = "https://huggingface.co/"
_DWPOSE_COMMIT = "f7c16a3d45ad3783db41471848c80fbc281cabac"
_VITPOSE = "Kijai/vitpose_comfy"
_VITPOSE_COMMIT = "ae68f4e542151cebec0995b8469c70b07b8c3df4"
# rtmlib's author keeps the same archives there, and rtmlib falls back to it as well.
_OPENMMLAB_MIRROR = f"{_HUB}Tau-J/RTMPose/resolve/main/"


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Scores from which a pose model's points count as seen, on the model's own scale.

    Attributes:
        body: Of a joint of the body or the feet.
        hand: Of a point of a hand; infinite if the model's hands are never to be drawn.
        face: Of the mean over the 68 points of the face.
    """

    body: float
    hand: float
    face: float


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """One file of a published model.

    Attributes:
        name: What it is called in the cache; rtmlib calls it the same.
        urls: Where it can be had, in the order to try; of a zip the member `end2end.onnx`.
        num_mb: Its size in 10^6 bytes, for the reader.
        sha256: Of the file itself, not of the zip; None if nobody states one.
    """

    name: str
    urls: tuple[str, ...]
    num_mb: int
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class PoseModel:
    """A published pose model with 133 keypoints.

    Attributes:
        files: The ONNX file, then the files with its weights if there are any; empty for the toy.
        detector: The one that goes with it.
        thresholds: See `Thresholds`.
        channels: Order of colours that it was trained with.
    """

    files: tuple[ModelFile, ...]
    detector: str
    thresholds: Thresholds
    channels: Channels = "rgb"


@dataclass(frozen=True, kw_only=True)
class DetectorModel:
    """A published person detector.

    Attributes:
        files: See `PoseModel`.
        score_threshold: Boxes with less are dropped; None for the usual one of its kind.
        channels: Order of colours that it was trained with.
    """

    files: tuple[ModelFile, ...]
    score_threshold: float | None = None
    channels: Channels = "bgr"


def _openmmlab_file(
    folder: str, name: str, num_mb: int, sha256: str | None = None, *more_urls: str
) -> ModelFile:
    tail = f"{folder}/onnx_sdk/{name}.zip"
    urls = (f"{_OPENMMLAB}{tail}", f"{_OPENMMLAB_MIRROR}{tail}", *more_urls)
    return ModelFile(name=f"{name}.onnx", urls=urls, num_mb=num_mb, sha256=sha256)


def _hub_file(
    repository: str, path: str, num_mb: int, sha256: str | None = None, revision: str = "main"
) -> ModelFile:
    name = PurePosixPath(path).name
    url = f"{_HUB}{repository}/resolve/{revision}/{path}"
    return ModelFile(name=name, urls=(url,), num_mb=num_mb, sha256=sha256)


# The thresholds could not be tried where this was written, for want of the weights. SimCC maxima
# are no probabilities and their scale differs from model to model (pose page section 11.6):
# - "rtmw": public projects that ran this file report 1.8 to 8 for what is in the picture, and that
#   a body keypoint at 5.6 is as sure as one at 0.93 of ViTPose-H; 3.0 is then its 0.5, 1.8 its 0.3.
#   rtmlib's demos take 0.43 for it, which draws nearly everything.
# - "rtmw-m": for the sister of this size people report up to 1.1, and below 0.33 on empty frames.
# - "dwpose": what its users commonly take.
# - "vitpose": body and hand are those of the released preprocessing, which knows none for the face.
POSE_MODELS: Final[Mapping[str, PoseModel]] = {
    # RTMW-l at 384x288, the most accurate.
    "rtmw": PoseModel(
        files=(
            _openmmlab_file(
                "rtmw",
                "rtmw-dw-x-l_simcc-cocktail14_270e-384x288_20231122",
                229,
                "bd033156e5104c4f5d2edfe0453e02661e30a2f3da453ec93c8764d561b83054",
                f"{_HUB}bukuroo/RTMW-ONNX/resolve/main/rtmw-l-384.onnx",
            ),
        ),
        detector="yolox-m",
        thresholds=Thresholds(body=3.0, hand=3.0, face=1.8),
    ),
    # RTMW-m at 256x192, the fastest.
    "rtmw-m": PoseModel(
        files=(_openmmlab_file("rtmw", "rtmw-dw-l-m_simcc-cocktail14_270e-256x192_20231122", 130),),
        detector="yolox-tiny",
        thresholds=Thresholds(body=0.5, hand=0.5, face=0.3),
    ),
    "dwpose": PoseModel(
        files=(
            _hub_file(
                "yzd-v/DWPose",
                "dw-ll_ucoco_384.onnx",
                134,
                "724f4ff2439ed61afb86fb8a1951ec39c6220682803b4a8bd4f598cd913b1843",
                _DWPOSE_COMMIT,
            ),
        ),
        detector="yolox-l",
        thresholds=Thresholds(body=0.3, hand=0.3, face=0.3),
    ),
    # ViTPose-H at 256x192, which Wan2.2-Animate was released with.
    "vitpose": PoseModel(
        # The original's own copy is a folder of 394 files; this is the same network in two.
        files=(
            _hub_file(_VITPOSE, "onnx/vitpose_h_wholebody_model.onnx", 1, revision=_VITPOSE_COMMIT),
            _hub_file(
                _VITPOSE, "onnx/vitpose_h_wholebody_data.bin", 2549, revision=_VITPOSE_COMMIT
            ),
        ),
        detector="yolov10m",
        thresholds=Thresholds(body=0.5, hand=0.5, face=0.3),
        # Differs from the released preprocessing, which hands it BGR with RGB statistics by
        # swapping the channels of its RGB frames once too often (pose page section 2).
        channels="rgb",
    ),
    "vitpose-l": PoseModel(
        files=(
            _hub_file(
                "JunkyByte/easy_ViTPose",
                "onnx/wholebody/vitpose-l-wholebody.onnx",
                1235,
                "89bdf6692d9224dbd5004dcef23a9ba2d54c5776212b359d5a5b5068ac14fd08",
            ),
        ),
        detector="yolov10m",
        thresholds=Thresholds(body=0.5, hand=0.5, face=0.3),
    ),
    # For the figures of the demo only.
    TOY: PoseModel(
        files=(),
        detector=TOY,
        # The toy transformer was trained on pictures too small for hands.
        thresholds=Thresholds(body=0.5, hand=float("inf"), face=0.5),
    ),
}

DETECTORS: Final[Mapping[str, DetectorModel]] = {
    # For people and drawn figures, as its small sister below.
    "yolox-m": DetectorModel(
        files=(
            _openmmlab_file(
                "rtmposev1",
                "yolox_m_8xb8-300e_humanart-c2c7a14a",
                101,
                "3dea6513388889f0fff4b77bf7a26013600321b9eb9ceb0e9a400a82572f5f23",
            ),
        ),
    ),
    "yolox-tiny": DetectorModel(
        files=(
            _openmmlab_file(
                "rtmposev1",
                "yolox_tiny_8xb8-300e_humanart-6f3252f9",
                20,
                "ceb11c07298f95c50d7c5abeb906d03340c85f23aa79e3e66966e7fb6c307250",
            ),
        ),
    ),
    # For 80 kinds of things, of which people are kept.
    "yolox-l": DetectorModel(
        files=(
            _hub_file(
                "yzd-v/DWPose",
                "yolox_l.onnx",
                217,
                "7860ae79de6c89a3c1eb72ae9a2756c0ccfbe04b7791bb5880afabd97855a411",
                _DWPOSE_COMMIT,
            ),
        ),
        score_threshold=0.3,  # as in the exports with NMS; rtmlib's 0.7 for the others misses many
    ),
    # Which Wan2.2-Animate was released with.
    "yolov10m": DetectorModel(
        files=(
            _hub_file(
                "Wan-AI/Wan2.2-Animate-14B",
                "process_checkpoint/det/yolov10m.onnx",
                62,
                "89b526498a6d55f869a6ab52e3a2eb20ad45b3711c1f7de3dd9ca0b399dfd6d7",
            ),
        ),
        channels="rgb",
    ),
    TOY: DetectorModel(
        files=(),
        score_threshold=0.5,
    ),
}


def is_local(model: str, known: Mapping[str, object]) -> bool:
    """Whether the value of `--pose-model` or `--detector` is a path and not a name."""
    return model not in known and (
        model.endswith(".onnx") or PurePosixPath(model).name != model or Path(model).exists()
    )


def check_models(pose_model: str, detector: str | None) -> None:
    """Refuse names that nobody knows and files that are not there; asks no network.

    Args:
        pose_model: Value of `--pose-model`.
        detector: Value of `--detector`; None for the one that goes with the pose model.

    Raises:
        SettingsError: If a name is unknown; lists the known ones.
        InputError: If a path leads to no ONNX file.
    """
    _check_model("--pose-model", pose_model, POSE_MODELS)
    if detector is not None:
        _check_model("--detector", detector, DETECTORS)


def _check_model(option: str, model: str, known: Mapping[str, object]) -> None:
    if is_local(model, known):
        local_file(option, model)
    elif model not in known:
        raise SettingsError(
            f"{option} {model} is unknown. Known: {', '.join(known)}, or give an .onnx file."
        )


def local_file(option: str, model: str) -> Path:
    """The ONNX file that a path given by the user means: itself, or `end2end.onnx` in a folder.

    Raises:
        InputError: If there is none.
    """
    path = Path(model)
    if path.is_dir():
        path /= FOLDER_MEMBER
        if not path.is_file():
            raise InputError(f"{option} {model} has no {FOLDER_MEMBER}. Give an .onnx file.")
    elif not path.exists():
        raise InputError(f"{option} {model} does not exist. Give an .onnx file.")
    return path
