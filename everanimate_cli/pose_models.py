"""Find the people in a frame, and 133 keypoints of each, with ONNX networks.

Boxes are (x0, y0, x1, y1) and keypoints COCO-WholeBody rows (x_px, y_px, score), both in pixels of
the frame, which is RGB. Scores are the network's own: their scale differs from model to model, see
`Thresholds` and `calibrate`. What a file is follows from its inputs and outputs, so that any export
of these kinds can be given.

The arithmetic of YOLOX and SimCC networks is that of rtmlib 0.0.16, and that of YOLOv10 and heatmap
networks is that of the preprocessing released with Wan2.2-Animate, down to the same numbers. rtmlib
itself is not needed: it brings two more builds of OpenCV along, and takes the whole frame for a
person where nobody is found.

Source: pose page sections 2 and 11; golden file `pose_golden.json`.
"""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, Protocol, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from everanimate_cli.downloads import fetch
from everanimate_cli.errors import RunError, SettingsError, WeightsError
from everanimate_cli.events import Note, OnEvent
from everanimate_cli.hashes import hash_file
from everanimate_cli.model_table import (
    DETECTORS,
    POSE_MODELS,
    TOY,
    Channels,
    DetectorModel,
    PoseModel,
    Thresholds,
    check_models,
    is_local,
    local_file,
)
from everanimate_cli.skeleton import FACE_ROWS, HAND_ROWS, NUM_KEYPOINTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from everanimate_cli.settings import Provider

FrameU8: TypeAlias = NDArray[np.uint8]
Boxes: TypeAlias = NDArray[np.float64]
Keypoints: TypeAlias = NDArray[np.float64]
Blob: TypeAlias = NDArray[np.float32]
Pair: TypeAlias = NDArray[np.float64]  # (x, y) or (width, height)
Table: TypeAlias = NDArray[np.float32]
DetectorKind: TypeAlias = Literal["yolox", "yolox-nms", "yolov10"]

TOY_FOLDER: Final = Path(__file__).parent / "toy_pose"
# Beside a pose model that is a file, and what is assumed of such a file.
DEFAULT_DETECTOR: Final = "yolox-m"
DEFAULT_THRESHOLDS: Final = Thresholds(body=0.5, hand=0.5, face=0.3)

_CUDA: Final = "CUDAExecutionProvider"
_CPU: Final = "CPUExecutionProvider"
_SILENT: Final = 4  # onnxruntime's level for fatal errors only

_USUAL_SIDE_PX: Final = 640  # of a detector whose input size is open
_GREY: Final = 114  # beside a letterboxed frame
_STRIDES: Final = (8, 16, 32)  # of the three grids of a YOLOX network
_BOX_COLUMNS: Final = 5  # a box and a score; a raw export has a score for each kind of thing behind
_PERSON: Final = 0  # in COCO's list of things
# Boxes with this score or less are dropped, as in rtmlib and in the released preprocessing.
_LEAST_SCORES: Final[Mapping[DetectorKind, float]] = {
    "yolox-nms": 0.3,
    "yolox": 0.7,
    "yolov10": 0.05,
}
_YOLOX_OVERLAP: Final = 0.45
_YOLOV10_OVERLAP: Final = 0.5

_LEAST_THRESHOLD: Final = 1e-6
_BOX_PADDING: Final = 1.25
_MAX_BATCH: Final = 16  # crops in one run
_BINS_PER_PX: Final = 2  # of a SimCC network
_BLUR_CELLS: Final = 11  # side of the Gaussian over a heatmap; OpenCV derives sigma 2 from it
_LEAST_HEAT: Final = 1e-10

# ImageNet's, of RGB in 0..255.
_MEAN: Final = np.array([123.675, 116.28, 103.53])
_STD: Final = np.array([58.395, 57.12, 57.375])
_VALUES: Final = np.arange(256)  # of a pixel


# --- what the rest of the program sees -----------------------------------------------------------


@dataclass(frozen=True)
class Detections:
    """The people in one frame.

    Attributes:
        boxes: [P, 4] float64, within the frame; P is 0 where nobody is found.
        scores: [P] float64, falling.
    """

    boxes: Boxes
    scores: NDArray[np.float64]


class Detector(Protocol):
    """Finds people.

    Attributes:
        name: As given with `--detector`.
        num_calls: Frames looked at so far.
    """

    name: str
    num_calls: int

    def detect(self, frame_u8: FrameU8) -> Detections:
        """Find the people in an RGB frame `[H, W, 3]`."""


class PoseEstimator(Protocol):
    """Finds the keypoints of people whose boxes are known.

    Attributes:
        name: As given with `--pose-model`.
        thresholds: Scores from which its points count as seen.
    """

    name: str
    thresholds: Thresholds

    def estimate(self, frame_u8: FrameU8, boxes: Boxes) -> Keypoints:
        """Keypoints `[P, 133, 3]` of the people in the boxes `[P, 4]` of one RGB frame."""

    def estimate_batch(self, frames_u8: Sequence[FrameU8], boxes: Boxes) -> Keypoints:
        """Keypoints `[B, 133, 3]` of one person in each of B frames, in the boxes `[B, 4]`."""


@dataclass(frozen=True)
class PoseModels:
    """A detector and a pose model, ready to run; each serves one thread at a time.

    Attributes:
        detector: Finds the people.
        estimator: Finds their keypoints.
        record: Names, checksums, sizes and devices, to be saved with a result; JSON values.
    """

    detector: Detector
    estimator: PoseEstimator
    record: Mapping[str, object]
    _networks: tuple[_Network, ...] = ()

    @property
    def seconds_in_network(self) -> float:
        """Time spent inside the two networks so far [s]; the rest is this program's."""
        return sum(network.seconds for network in self._networks)


def calibrate(keypoints: Keypoints, thresholds: Thresholds) -> Keypoints:
    """Bring scores to a scale on which 0.5 is the threshold of every part and every model.

    The limits of the released preprocessing, such as 0.3 and 0.4 for retargeting, belong to a model
    whose threshold is 0.5, and mean something on that scale only.

    Args:
        keypoints: [..., 133, 3] with the scores of a pose model.
        thresholds: That model's.

    Returns:
        [..., 133, 3] float64, a copy. A part with an infinite threshold has the scores 0; with the
        threshold 0, every positive score is large.
    """
    limits = np.full(NUM_KEYPOINTS, thresholds.body)
    limits[FACE_ROWS] = thresholds.face
    for rows in HAND_ROWS:
        limits[rows] = thresholds.hand
    result = np.array(keypoints, np.float64)
    result[..., 2] *= 0.5 / np.maximum(limits, _LEAST_THRESHOLD)
    return result


def load_models(
    pose_model: str,
    detector: str | None,
    *,
    provider: Provider,
    threads: int | None,
    on_event: OnEvent,
    download: bool = True,
) -> PoseModels:
    """Make a detector and a pose model ready, downloading them if they are not here yet.

    Args:
        pose_model: A name in `POSE_MODELS`, an .onnx file, or a folder with `end2end.onnx`.
        detector: A name in `DETECTORS` or the like; None for the one that goes with the pose model.
        provider: "cuda", "cpu", or "auto" for CUDA where it works.
        threads: Of each network on the CPU; None for one per core.
        on_event: Told how far a download is.
        download: False refuses what is not here.

    Returns:
        Both, ready to run.

    Raises:
        SettingsError: If a name is unknown, or CUDA is asked for and does not work.
        InputError: If a path leads nowhere.
        WeightsError: If a file cannot be had, is damaged or holds another kind of network.
    """
    check_models(pose_model, detector)
    known = POSE_MODELS.get(pose_model)
    if detector is None:
        detector = DEFAULT_DETECTOR if known is None else known.detector
    pose_path = _locate("--pose-model", pose_model, on_event, download)
    detector_path = _locate("--detector", detector, on_event, download)
    networks = [
        _Network(path, _open_session(path, provider, threads, on_event))
        for path in (detector_path, pose_path)
    ]
    finder = _build_detector(detector, networks[0], DETECTORS.get(detector))
    estimator = _build_estimator(pose_model, networks[1], known)
    record = {
        "pose_model": {**pose_path.record, **estimator.record},
        "detector": {**detector_path.record, **finder.record},
        "onnxruntime": _import_runtime().__version__,
    }
    return PoseModels(finder, estimator, record, tuple(networks))


@dataclass(frozen=True)
class _ModelPath:
    """A model that is on this machine.

    Attributes:
        option: "--pose-model" or "--detector".
        name: Its value.
        path: The ONNX file.
        sha256: By file name; of what the user gives, without files of weights beside it.
    """

    option: str
    name: str
    path: Path
    sha256: Mapping[str, str]

    @property
    def label(self) -> str:
        return f"{self.option} {self.name}"

    @property
    def record(self) -> dict[str, object]:
        """Its part of `PoseModels.record`."""
        return {"name": self.name, "sha256": dict(self.sha256)}


def _locate(option: str, name: str, on_event: OnEvent, download: bool) -> _ModelPath:
    """Find a model, downloading it if need be."""
    is_pose = option == "--pose-model"
    known: Mapping[str, PoseModel | DetectorModel] = POSE_MODELS if is_pose else DETECTORS
    if is_local(name, known):
        path = local_file(option, name)
    elif name == TOY:
        path = TOY_FOLDER / ("pose.onnx" if is_pose else "detector.onnx")
        if not path.is_file():
            raise WeightsError(
                f"{option} {name} is missing in this installation ({path}). "
                "Install everanimate again."
            )
    else:
        files = [
            fetch(
                file.urls,
                name=file.name,
                sha256=file.sha256,
                label=f"{option} {name}",
                way_out=f"give {option} PATH.onnx",
                on_event=on_event,
                download=download,
            )
            for file in known[name].files
        ]
        return _ModelPath(
            option, name, files[0].path, {file.path.name: file.sha256 for file in files}
        )
    try:
        return _ModelPath(option, name, path, {path.name: hash_file(path)})
    except OSError as error:
        raise WeightsError(f"{option} {name} cannot be read: {error.strerror}.") from error


# --- networks ------------------------------------------------------------------------------------


def _import_runtime() -> Any:
    # It takes a third of a second, which only who runs a network should pay.
    import onnxruntime  # type: ignore[import-untyped]  # noqa: PLC0415

    return onnxruntime


def _open_session(
    model: _ModelPath, provider: Provider, threads: int | None, on_event: OnEvent
) -> Any:
    """An onnxruntime session of a file, on the device asked for."""
    runtime = _import_runtime()
    has_cuda = _CUDA in runtime.get_available_providers()
    if provider == "cuda" and not has_cuda:
        raise SettingsError(
            f"--provider cuda is not in the installed onnxruntime {runtime.__version__}. "
            "Install onnxruntime-gpu in its place, or give --provider cpu."
        )
    # Its log goes to stderr, which is the console's; what matters is raised as well.
    runtime.set_default_logger_severity(_SILENT)
    options = runtime.SessionOptions()
    options.inter_op_num_threads = 1
    if threads is not None:
        options.intra_op_num_threads = threads

    def open_on(*providers: str) -> Any:
        # Its own fallback would print on stdout, which is for results.
        return runtime.InferenceSession(
            str(model.path), options, providers=providers, enable_fallback=0
        )

    if has_cuda and provider != "cpu":
        # Without a driver this fails; with missing libraries it gives a session for the CPU.
        with suppress(*_runtime_errors()):
            session = open_on(_CUDA, _CPU)
            if _CUDA in session.get_providers():
                return session
    try:
        session = open_on(_CPU)
    except _runtime_errors() as error:
        raise WeightsError(
            f"{model.label} cannot be loaded: {_first_line(error)}. Give another ONNX file; "
            "weights in files of their own must lie beside it."
        ) from error
    if has_cuda and provider != "cpu":
        problem = "CUDA does not start (no driver, or another version of CUDA or cuDNN is needed)"
        if provider == "cuda":
            raise SettingsError(f"--provider cuda: {problem}. Mend it, or give --provider cpu.")
        on_event(Note(text=f"{model.label} runs on the CPU: {problem}"))
    return session


class _Network:
    """A session that takes pictures; the time of its runs is counted.

    Attributes:
        label: Option and value, for messages.
        height: Of a picture [px]; None if the file leaves it open.
        width: Of a picture [px]; None if the file leaves it open.
        is_batched: Whether the file says that it takes several pictures at once.
        device: "cpu" or "cuda".
        seconds: Time in runs so far [s].

    Raises:
        WeightsError: If the file wants something else than pictures.
    """

    def __init__(self, model: _ModelPath, session: Any) -> None:
        self.label = model.label
        self.device = "cuda" if _CUDA in session.get_providers() else "cpu"
        self.seconds = 0.0
        self._session = session
        self._errors = _runtime_errors()
        inputs = session.get_inputs()
        shape = inputs[0].shape if len(inputs) == 1 else []
        is_picture = len(shape) == 4 and (shape[1] == 3 or not isinstance(shape[1], int))  # noqa: PLR2004
        if not is_picture or inputs[0].type != "tensor(float)":
            found = "; ".join(f"{each.name} {each.type} {each.shape}" for each in inputs)
            raise WeightsError(
                f"{self.label} takes {found or 'nothing'}. "
                "A network is needed that takes tensor(float) [batch, 3, height, width]."
            )
        batch, _, self.height, self.width = (
            side if isinstance(side, int) else None for side in shape
        )
        if batch not in (None, 1):
            raise WeightsError(
                f"{self.label} takes {batch} pictures at once. "
                "A network is needed that takes one, or any number."
            )
        self.is_batched = batch is None
        self._input_name = inputs[0].name

    def run(self, blob: Blob) -> list[NDArray[np.float32]]:
        """The outputs for the pictures `[B, 3, H, W]`.

        Raises:
            RunError: If the network fails.
        """
        start_s = time.perf_counter()
        try:
            outputs: list[NDArray[np.float32]] = self._session.run(None, {self._input_name: blob})
        except self._errors as error:
            raise RunError(f"{self.label} failed: {_first_line(error)}.") from error
        self.seconds += time.perf_counter() - start_s
        return outputs

    def stated_shapes(self) -> list[list[object]]:
        """Shapes of the outputs without the batch; names or None for what the file leaves open."""
        return [list(output.shape[1:]) for output in self._session.get_outputs()]

    def output_shapes(self) -> list[list[int]]:
        """Shapes of the outputs for one picture; what the file leaves open, a black one tells."""
        stated = self.stated_shapes()
        shapes = [[side for side in shape if isinstance(side, int)] for shape in stated]
        if shapes == stated:
            return shapes
        size = (self.height or _USUAL_SIDE_PX, self.width or _USUAL_SIDE_PX)
        outputs = self.run(np.zeros((1, 3, *size), np.float32))
        self.seconds = 0.0
        return [list(output.shape[1:]) for output in outputs]

    def describe_outputs(self) -> str:
        """Names and shapes, for a message."""
        names = [output.name for output in self._session.get_outputs()]
        pairs = zip(names, self.output_shapes(), strict=True)
        return " and ".join(f"{name} {shape}" for name, shape in pairs)


def _runtime_errors() -> tuple[type[Exception], ...]:
    """What onnxruntime raises; its own exceptions have no common ancestor."""
    own = [
        value
        for value in vars(_import_runtime().capi.onnxruntime_pybind11_state).values()
        if isinstance(value, type) and issubclass(value, Exception)
    ]
    return (*own, RuntimeError, ValueError)


def _first_line(error: Exception) -> str:
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : ", "", str(error)).strip()
    return (text.partition("\n")[0] or type(error).__name__).rstrip(".")


def _split(picture_u8: FrameU8, channels: Channels) -> Sequence[FrameU8]:
    """The planes [H, W] of an RGB picture in a network's order."""
    planes = [np.asarray(plane, np.uint8) for plane in cv2.split(picture_u8)]
    return planes if channels == "rgb" else planes[::-1]


def _write_planes(
    target: Blob, picture_u8: FrameU8, channels: Channels, tables: Sequence[Table]
) -> None:
    """Write a picture into `[3, H, W]`, each plane through its table of 256 values.

    A table holds what a value becomes, computed in double precision and rounded once.
    """
    for result, plane, table in zip(target, _split(picture_u8, channels), tables, strict=True):
        cv2.LUT(plane, table, dst=result)


# --- detectors -----------------------------------------------------------------------------------


class _BaseDetector:
    """What all detectors have.

    Attributes:
        name: As given with `--detector`.
        num_calls: Frames looked at so far.
    """

    def __init__(
        self,
        name: str,
        network: _Network,
        *,
        kind: DetectorKind,
        channels: Channels,
        score_threshold: float,
    ) -> None:
        self.name = name
        self.num_calls = 0
        self._network = network
        self._height = network.height or _USUAL_SIDE_PX
        self._width = network.width or _USUAL_SIDE_PX
        self._kind = kind
        self._channels = channels
        self._score_threshold = score_threshold

    @property
    def record(self) -> dict[str, object]:
        """Its part of `PoseModels.record`."""
        return {
            "kind": self._kind,
            "input_height": self._height,
            "input_width": self._width,
            "channels": self._channels,
            "score_threshold": self._score_threshold,
            "device": self._network.device,
        }


class YoloxDetector(_BaseDetector):
    """YOLOX, exported with its suppression of overlapping boxes or without.

    The frame goes into the top left corner of the input, 0..255. Differs from rtmlib: of a network
    for many kinds of things only people count, and boxes end at the frame's edge.

    Source: rtmlib 0.0.16 `YOLOX`; pose page sections 11.4 and 11.5.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Kept from call to call: the border of a video's frames is always the same.
        self._blob = np.full((1, 3, self._height, self._width), _GREY, np.float32)
        self._filled = (self._height, self._width)
        self._cells, self._strides = _list_cells(self._height, self._width)

    def detect(self, frame_u8: FrameU8) -> Detections:
        """Find the people in an RGB frame `[H, W, 3]`."""
        self.num_calls += 1
        ratio = self._letterbox(frame_u8)
        rows = self._network.run(self._blob)[0][0]  # [N, 5] or [N, 5 + kinds of things]
        if self._kind == "yolox-nms":
            rows = rows[rows[:, 4] > self._score_threshold]
            return _make_detections(rows[:, :4] / ratio, rows[:, 4], frame_u8)
        scores = rows[:, 4] * rows[:, _BOX_COLUMNS + _PERSON]
        index = np.flatnonzero(scores > self._score_threshold)
        boxes, scores = self._decode(rows, index) / ratio, scores[index]
        kept = _suppress(boxes, scores, overlap=_YOLOX_OVERLAP, edge=1)
        return _make_detections(boxes[kept], scores[kept], frame_u8)

    def _letterbox(self, frame_u8: FrameU8) -> np.float32:
        """Put a frame into the input; gives input pixels per frame pixel."""
        height, width = frame_u8.shape[:2]
        ratio = min(self._height / height, self._width / width)
        size = max(1, int(height * ratio)), max(1, int(width * ratio))
        picture = frame_u8
        if size != (height, width):
            picture = np.asarray(cv2.resize(frame_u8, size[::-1]), np.uint8)
        if size != self._filled:
            self._blob[:] = _GREY
            self._filled = size
        for target, plane in zip(self._blob[0], _split(picture, self._channels), strict=True):
            target[: size[0], : size[1]] = plane
        return np.float32(ratio)

    def _decode(self, rows: NDArray[np.float32], index: NDArray[np.intp]) -> NDArray[np.float32]:
        """Boxes [K, 4] in input pixels, of centres in cells and logarithms of sizes."""
        strides = self._strides[index, None]
        centres = ((rows[index, :2] + self._cells[index]) * strides).astype(np.float32)
        halves = (np.exp(rows[index, 2:4]) * strides).astype(np.float32) / 2
        return np.concatenate([centres - halves, centres + halves], axis=1)


class Yolov10Detector(_BaseDetector):
    """YOLOv10, as the preprocessing released with Wan2.2-Animate runs it.

    The frame is stretched to the input, 0..1. Boxes are in whole pixels, from which the released
    person choice and crop start.

    Source: pose page section 2.
    """

    _TABLE: ClassVar = (_VALUES / 255).astype(np.float32)

    def detect(self, frame_u8: FrameU8) -> Detections:
        """Find the people in an RGB frame `[H, W, 3]`."""
        self.num_calls += 1
        blob = np.empty((1, 3, self._height, self._width), np.float32)
        picture = np.asarray(cv2.resize(frame_u8, (self._width, self._height)), np.uint8)
        _write_planes(blob[0], picture, self._channels, [self._TABLE] * 3)
        rows = self._network.run(blob)[0][0]  # [N, 6]: box, score, kind of thing
        rows = rows[rows[:, 4] > self._score_threshold]
        height, width = frame_u8.shape[:2]
        zoom = np.array([width / self._width, height / self._height] * 2, np.float32)
        corners = rows[:, :4] * zoom
        starts = np.trunc(corners[:, :2])
        sides = np.trunc(corners[:, 2:] - corners[:, :2])
        boxes = np.concatenate([starts, starts + sides], axis=1)
        # All kinds of things take part, so that a person behind a better seen thing goes too.
        kept = _suppress(boxes, rows[:, 4], overlap=_YOLOV10_OVERLAP, edge=0)
        kept = kept[rows[kept, 5] == _PERSON]
        return _make_detections(boxes[kept], rows[kept, 4], frame_u8)


def _build_detector(
    name: str, network: _Network, known: DetectorModel | None
) -> YoloxDetector | Yolov10Detector:
    """The detector that a network's first output makes it."""
    kind = _detector_kind(network)
    score = _LEAST_SCORES[kind]
    channels: Channels = "rgb" if kind == "yolov10" else "bgr"
    if known is not None:
        channels = known.channels
        score = score if known.score_threshold is None else known.score_threshold
    build = Yolov10Detector if kind == "yolov10" else YoloxDetector
    return build(name, network, kind=kind, channels=channels, score_threshold=score)


def _detector_kind(network: _Network) -> DetectorKind:
    # An export with suppression leaves open how many people it finds.
    if network.stated_shapes()[0][1:] == [_BOX_COLUMNS]:
        return "yolox-nms"
    shape = network.output_shapes()[0]
    num_rows, columns = shape if len(shape) == 2 else (0, 0)  # noqa: PLR2004
    height, width = network.height or _USUAL_SIDE_PX, network.width or _USUAL_SIDE_PX
    if columns == _BOX_COLUMNS:
        return "yolox-nms"
    if columns > _BOX_COLUMNS and num_rows == len(_list_cells(height, width)[0]):
        return "yolox"
    if columns == _BOX_COLUMNS + 1:
        return "yolov10"
    raise WeightsError(
        f"{network.label} gives {network.describe_outputs()} for a picture of {height}x{width}. "
        "A YOLOX or YOLOv10 detector is needed: give its .onnx file, or one of "
        f"{', '.join(DETECTORS)}."
    )


def _list_cells(height: int, width: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Column and row [N, 2] of every cell of a YOLOX network's grids, and its stride [N]."""
    cells, strides = [], []
    for stride in _STRIDES:
        rows, columns = np.indices((height // stride, width // stride))
        cells.append(np.stack([columns, rows], axis=-1).reshape(-1, 2))
        strides.append(np.full(len(cells[-1]), stride))
    return np.concatenate(cells), np.concatenate(strides)


def _suppress(
    boxes: NDArray[np.float32], scores: NDArray[np.float32], *, overlap: float, edge: int
) -> NDArray[np.intp]:
    """Drop each box that shares more than `overlap` of the union with a better one.

    Args:
        boxes: [K, 4].
        scores: [K].
        overlap: Intersection over union that is still allowed.
        edge: Added to every side: 1 if the far ends belong to the boxes, else 0.

    Returns:
        Indices of the boxes kept, best first.
    """
    x0, y0, x1, y1 = boxes.T
    areas = (x1 - x0 + edge) * (y1 - y0 + edge)
    order = np.argsort(-scores, kind="stable")
    kept = []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        width = np.minimum(x1[best], x1[order]) - np.maximum(x0[best], x0[order]) + edge
        height = np.minimum(y1[best], y1[order]) - np.maximum(y0[best], y0[order]) + edge
        shared = np.maximum(width, 0) * np.maximum(height, 0)
        order = order[shared <= overlap * (areas[best] + areas[order] - shared)]
    return np.array(kept, np.intp)


def _make_detections(
    boxes: NDArray[np.float32], scores: NDArray[np.float32], frame_u8: FrameU8
) -> Detections:
    """Boxes cut at the frame's edge, best first; what lies outside or is no number is dropped."""
    height, width = frame_u8.shape[:2]
    inside = np.clip(boxes.astype(np.float64), 0, [width, height, width, height])
    order = np.argsort(-scores, kind="stable")
    order = order[(inside[order, :2] < inside[order, 2:]).all(axis=1)]  # false for NaN
    return Detections(inside[order], scores[order].astype(np.float64))


# --- pose models ---------------------------------------------------------------------------------


class _BaseEstimator(ABC):
    """What all pose models have: crops in, keypoints out, several at once where that works.

    Attributes:
        name: As given with `--pose-model`.
        thresholds: Scores from which its points count as seen.
    """

    _KIND: ClassVar[str]

    def __init__(
        self, name: str, network: _Network, thresholds: Thresholds, channels: Channels
    ) -> None:
        self.name = name
        self.thresholds = thresholds
        self._network = network
        self._channels = channels
        self._is_batched = network.is_batched
        assert network.height is not None  # an open size is refused before
        assert network.width is not None
        self._height, self._width = network.height, network.width

    @property
    def record(self) -> dict[str, object]:
        """Its part of `PoseModels.record`."""
        return {
            "kind": self._KIND,
            "input_height": self._height,
            "input_width": self._width,
            "channels": self._channels,
            "device": self._network.device,
        }

    def estimate(self, frame_u8: FrameU8, boxes: Boxes) -> Keypoints:
        """Keypoints of the people in one frame.

        Args:
            frame_u8: [H, W, 3] uint8 RGB.
            boxes: [P, 4] in its pixels; they may reach beyond it.

        Returns:
            [P, 133, 3] float64. The place of a point with score 0 or less means nothing.

        Raises:
            RunError: If the network fails.
            ValueError: If a box is not finite.
        """
        return self.estimate_batch([frame_u8] * len(boxes), boxes)

    def estimate_batch(self, frames_u8: Sequence[FrameU8], boxes: Boxes) -> Keypoints:
        """Keypoints of one person in each of several frames.

        Args:
            frames_u8: B frames [H, W, 3] uint8 RGB, also of different sizes.
            boxes: [B, 4], one for each frame.

        Returns:
            [B, 133, 3] float64, see `estimate`.

        Raises:
            RunError: If the network fails.
            ValueError: If there are more frames than boxes or fewer, or a box is not finite.
        """
        boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
        if len(boxes) != len(frames_u8) or not np.isfinite(boxes).all():
            raise ValueError(f"{len(frames_u8)} frames do not go with the boxes {boxes.tolist()}")
        result = np.empty((len(boxes), NUM_KEYPOINTS, 3))
        for start in range(0, len(boxes), _MAX_BATCH):
            rows = slice(start, start + _MAX_BATCH)
            result[rows] = self._estimate(frames_u8[rows], boxes[rows])
        return result

    def _estimate(self, frames_u8: Sequence[FrameU8], boxes: Boxes) -> Keypoints:
        centres, sides = choose_crops(boxes, self._height, self._width)
        blob = np.empty((len(boxes), 3, self._height, self._width), np.float32)
        for target, frame_u8, centre, side in zip(blob, frames_u8, centres, sides, strict=True):
            self._crop(target, frame_u8, centre, side)
        places, scores = self._decode(self._run(blob))
        places_px = places * sides[:, None] + centres[:, None] - sides[:, None] / 2
        scores = np.where(np.isfinite(scores), scores, 0)
        return np.concatenate([places_px, scores[..., None]], axis=2)

    def _run(self, blob: Blob) -> list[NDArray[np.float32]]:
        """The outputs for several crops, in one run if the network can."""
        if len(blob) > 1 and self._is_batched:
            # Some exports state an open batch and expect one picture further inside.
            with suppress(RunError):
                outputs = self._network.run(blob)
                if all(len(output) == len(blob) for output in outputs):
                    return outputs
            self._is_batched = False
        runs = [self._network.run(blob[index : index + 1]) for index in range(len(blob))]
        return [np.concatenate(outputs) for outputs in zip(*runs, strict=True)]

    @abstractmethod
    def _crop(self, target: Blob, frame_u8: FrameU8, centre: Pair, side: Pair) -> None:
        """Write the part of a frame around `centre` (x, y) into `[3, H, W]`."""

    @abstractmethod
    def _decode(
        self, outputs: list[NDArray[np.float32]]
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Places [B, 133, 2], from 0 to 1 over the crop, and scores [B, 133]."""


class SimccEstimator(_BaseEstimator):
    """RTMW, RTMPose, DWPose: one distribution over the columns and one over the rows.

    A place is the highest bin of each, half an input pixel wide, and the score is the mean of the
    two heights.

    Source: rtmlib 0.0.16 `RTMPose`; pose page sections 11.4 to 11.6.
    """

    _KIND = "simcc"
    _TABLES: ClassVar = ((_VALUES - _MEAN[:, None]) / _STD[:, None]).astype(np.float32)  # [3, 256]

    def __init__(
        self,
        name: str,
        network: _Network,
        thresholds: Thresholds,
        channels: Channels,
        *,
        has_rows_first: bool,
    ) -> None:
        super().__init__(name, network, thresholds, channels)
        self._order = (1, 0) if has_rows_first else (0, 1)

    def _crop(self, target: Blob, frame_u8: FrameU8, centre: Pair, side: Pair) -> None:
        # The map that takes these three points to those, in the single precision of the original,
        # so that no pixel differs: the centre, the point above it, and left of that.
        source = np.empty((3, 2), np.float32)
        source[0] = centre
        source[1] = centre - [0, side[0] / 2]
        source[2] = source[1] - [source[0, 1] - source[1, 1], 0]
        x, y = self._width / 2, self._height / 2
        goal = np.array([[x, y], [x, y - x], [0, y - x]], np.float32)
        matrix = cv2.getAffineTransform(source, goal)
        crop = cv2.warpAffine(frame_u8, matrix, (self._width, self._height), flags=cv2.INTER_LINEAR)
        _write_planes(target, np.asarray(crop, np.uint8), self._channels, [*self._TABLES])

    def _decode(
        self, outputs: list[NDArray[np.float32]]
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        places, heights = [], []
        for index in self._order:
            bins = outputs[index]  # [B, 133, 2W], then [B, 133, 2H]
            highest = bins.argmax(axis=2)
            places.append(highest / _BINS_PER_PX)
            heights.append(np.take_along_axis(bins, highest[..., None], axis=2)[..., 0])
        scores = np.float32(0.5) * (heights[0] + heights[1])
        place = np.stack(places, axis=2)
        place[~(scores > 0)] = -1 / _BINS_PER_PX
        return place / [self._width, self._height], scores


class HeatmapEstimator(_BaseEstimator):
    """ViTPose: one map per keypoint, as the preprocessing released with Wan2.2-Animate reads it.

    Differs from it: a box of less than 10 px is not replaced by the whole frame.

    Source: pose page section 2; `vitpose_crop_cases`, `heatmap_decode_case`.
    """

    _KIND = "heatmap"

    def _crop(self, target: Blob, frame_u8: FrameU8, centre: Pair, side: Pair) -> None:
        # In floats before it is resized, as in the original: no rounding between two pixels.
        patch = cut_patch(frame_u8, centre, side).astype(np.float32)
        planes = cv2.split(cv2.resize(patch, (self._width, self._height)))
        if self._channels == "bgr":
            planes = planes[::-1]
        for result, plane, mean, std in zip(target, planes, _MEAN, _STD, strict=True):
            np.divide(plane - np.float32(mean), np.float32(std), out=result)

    def _decode(
        self, outputs: list[NDArray[np.float32]]
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        heatmaps = outputs[0]
        height, width = heatmaps.shape[2:]
        cells, scores = decode_heatmaps(heatmaps)
        return cells / [width, height], scores


def choose_crops(
    boxes: Boxes, height: int, width: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What part of the frame a pose model looks at: the box, a quarter larger, in its own aspect.

    Args:
        boxes: [P, 4].
        height: Of the model's input.
        width: Of the model's input.

    Returns:
        Centres (x, y) [P, 2] and sides (width, height) [P, 2], in pixels of the frame.

    Source: rtmlib 0.0.16; pose page section 2, `vitpose_crop_cases`.
    """
    sides = (boxes[:, 2:] - boxes[:, :2]) * _BOX_PADDING
    aspect = width / height
    is_wide = sides[:, 0] > sides[:, 1] * aspect
    sides[is_wide, 1] = sides[is_wide, 0] / aspect
    sides[~is_wide, 0] = sides[~is_wide, 1] * aspect
    return (boxes[:, :2] + boxes[:, 2:]) * 0.5, sides


def cut_patch(frame_u8: FrameU8, centre: Pair, side: Pair) -> FrameU8:
    """The part of a frame between whole pixels, black where there is no frame.

    Args:
        frame_u8: [H, W, 3] uint8.
        centre: (x, y) of the middle of the part.
        side: (width, height) of the part.

    Returns:
        [h, w, 3] uint8.

    Source: pose page section 2; `vitpose_crop_cases`.
    """
    left, top = (int(value) for value in np.rint(centre - side / 2))
    right, bottom = (int(value) for value in np.rint(centre + side / 2))
    patch = np.zeros((max(1, bottom - top), max(1, right - left), 3), np.uint8)
    seen = frame_u8[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
    y, x = max(-top, 0), max(-left, 0)
    if seen.size:
        patch[y : y + seen.shape[0], x : x + seen.shape[1]] = seen
    return patch


def decode_heatmaps(
    heatmaps: NDArray[np.float32],
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Where maps have their peaks, finer than a cell, and how high these are.

    From the highest cell, unless it is next to the border, one step of Newton's method on the
    logarithm of the blurred map.

    Args:
        heatmaps: [B, K, h, w] float32.

    Returns:
        (column, row) [B, K, 2] in cells, (-1, -1) for a map that is nowhere above 0; and the
        greatest value [B, K] of each map.

    Source: pose page section 2; `heatmap_decode_case`.
    """
    height, width = heatmaps.shape[2:]
    maps = heatmaps.reshape(-1, height, width)
    index = maps.reshape(len(maps), -1).argmax(axis=1)
    rows, columns = np.divmod(index, width)
    scores = maps[np.arange(len(maps)), rows, columns]
    cells = np.stack([columns, rows], axis=1).astype(np.float64)
    is_peak = scores > 0
    cells[~is_peak] = -1
    is_inside = (columns > 1) & (columns < width - 2) & (rows > 1) & (rows < height - 2)
    chosen = np.flatnonzero(is_peak & is_inside)
    if len(chosen):
        logs = _log_blurred(maps[chosen], scores[chosen])
        cells[chosen] += _newton_step(logs, rows[chosen], columns[chosen])
    return cells.reshape(*heatmaps.shape[:2], 2), scores.reshape(heatmaps.shape[:2])


def _log_blurred(maps: NDArray[np.float32], peaks: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logarithms of maps [n, h, w] after a blur that leaves their peaks [n] as high as before."""
    border = _BLUR_CELLS // 2
    # All maps in one picture, one below the other with zeros between: one call of OpenCV.
    padded = np.pad(maps, ((0, 0), (border, border), (border, border)))
    tall = cv2.GaussianBlur(padded.reshape(-1, padded.shape[2]), (_BLUR_CELLS, _BLUR_CELLS), 0)
    blurred = np.asarray(tall, np.float32).reshape(padded.shape)
    blurred = blurred[:, border:-border, border:-border]
    highest = np.maximum(blurred.max(axis=(1, 2)), _LEAST_HEAT)
    scaled = blurred * (peaks / highest)[:, None, None]
    return np.asarray(np.log(np.maximum(scaled, _LEAST_HEAT)), np.float32)


def _newton_step(
    logs: NDArray[np.float32], rows: NDArray[np.intp], columns: NDArray[np.intp]
) -> NDArray[np.float64]:
    """(column, row) [n, 2] from a cell of each map to the top of the parabola through it."""

    def at(right: int, down: int) -> NDArray[np.float64]:
        return logs[np.arange(len(logs)), rows + down, columns + right].astype(np.float64)

    dx, dy = (at(1, 0) - at(-1, 0)) / 2, (at(0, 1) - at(0, -1)) / 2
    dxx = (at(2, 0) - 2 * at(0, 0) + at(-2, 0)) / 4
    dyy = (at(0, 2) - 2 * at(0, 0) + at(0, -2)) / 4
    dxy = (at(1, 1) - at(1, -1) - at(-1, 1) + at(-1, -1)) / 4
    determinant = dxx * dyy - dxy**2
    flat = determinant == 0
    step = np.stack([dxy * dy - dyy * dx, dxy * dx - dxx * dy], axis=1)
    return np.where(flat[:, None], 0, step / np.where(flat, 1, determinant)[:, None])


def _build_estimator(
    name: str, network: _Network, known: PoseModel | None
) -> SimccEstimator | HeatmapEstimator:
    """The pose model that a network's outputs make it."""
    if network.height is None or network.width is None:
        raise WeightsError(
            f"{network.label} leaves the size of its input open. "
            "Export it with a fixed height and width."
        )
    thresholds = DEFAULT_THRESHOLDS if known is None else known.thresholds
    channels: Channels = "rgb" if known is None else known.channels
    shapes = network.output_shapes()
    ranks = [len(shape) for shape in shapes]
    if ranks not in ([2, 2], [3]):
        raise WeightsError(
            f"{network.label} gives {network.describe_outputs()}. A pose model is needed, which "
            "gives simcc_x and simcc_y, or heatmaps: give its .onnx file, or one of "
            f"{', '.join(POSE_MODELS)}."
        )
    if any(shape[0] != NUM_KEYPOINTS for shape in shapes):
        raise WeightsError(
            f"{network.label} knows {shapes[0][0]} keypoints ({network.describe_outputs()}). "
            f"{NUM_KEYPOINTS} are needed, in the order of COCO-WholeBody."
        )
    if ranks == [3]:
        return HeatmapEstimator(name, network, thresholds, channels)
    bins = [shape[1] for shape in shapes]
    expected = [_BINS_PER_PX * network.width, _BINS_PER_PX * network.height]
    if bins not in (expected, expected[::-1]):
        raise WeightsError(
            f"{network.label} gives {network.describe_outputs()} for a picture of "
            f"{network.height}x{network.width}. {_BINS_PER_PX} bins per pixel are needed: "
            f"simcc_x {expected[0]}, simcc_y {expected[1]}."
        )
    return SimccEstimator(name, network, thresholds, channels, has_rows_first=bins != expected)
