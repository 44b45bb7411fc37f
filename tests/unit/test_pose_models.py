"""Detectors and pose models on tiny random networks with the interfaces of the real ones.

Where rtmlib has the same network class, the numbers must be its numbers, bit for bit: the input is
the same to the last bit (tables instead of its float64 arithmetic, rounded once in the same way),
and what follows is done in its order and precision. Differences are stated in the tests' names.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from rtmlib import YOLOX, RTMPose

from everanimate_cli import pose_models
from everanimate_cli.errors import (
    EverAnimateError,
    InputError,
    RunError,
    SettingsError,
    WeightsError,
)
from everanimate_cli.events import Event, Note
from everanimate_cli.hashes import hash_file
from everanimate_cli.model_table import (
    DETECTORS,
    POSE_MODELS,
    DetectorModel,
    ModelFile,
    PoseModel,
    Thresholds,
)
from everanimate_cli.pose_models import Detections, PoseModels, calibrate, load_models

FrameU8 = NDArray[np.uint8]
Shape = list[int | str]

PICTURE_PX = (160, 160)  # (height, width) of the detectors' input
CROP_PX = (128, 96)  # of the pose models' input
BOXES = np.array(
    [
        [100.0, 50.0, 200.0, 250.0],  # taller than the crop
        [-20.0, 30.0, 470.0, 250.0],  # wider, and beyond the frame
        [300.3, 10.7, 310.9, 15.2],  # small
        [400.0, 100.0, 600.0, 500.0],  # mostly outside
    ]
)


def ignore(_event: Event) -> None:
    """An `on_event` for nobody."""


# --- networks ------------------------------------------------------------------------------------


class Builder:
    """Puts an ONNX file together."""

    def __init__(self, size: tuple[int, int], batch: int | str = 1) -> None:
        self.size = size
        self.batch = batch
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, NDArray[Any]] = {}

    def add(self, kind: str, *inputs: str | NDArray[Any], output: str = "", **options: Any) -> str:
        """One node; arrays become weights. Gives the name of its output."""
        names = []
        for value in inputs:
            name = value if isinstance(value, str) else f"weight{len(self.weights)}"
            if not isinstance(value, str):
                self.weights[name] = value
            names.append(name)
        output = output or f"value{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, names, [output], **options))
        return output

    def see(self, cell_px: int) -> tuple[str, int]:
        """The picture as one row of numbers per picture, and how many."""
        pooled = self.add("AveragePool", "input", kernel_shape=[cell_px] * 2, strides=[cell_px] * 2)
        height, width = self.size
        return self.add("Flatten", pooled), 3 * (height // cell_px) * (width // cell_px)

    def leave_rows_open(self, rows: str, output: str) -> None:
        """Only a run tells how many there are: those with a score above -1, which is all."""
        scores = self.add("Gather", rows, np.array(4), axis=2)
        is_kept = self.add("Greater", scores, np.array(-1, np.float32))
        flat = self.add("Reshape", is_kept, np.array([-1]))
        self.add("Compress", rows, flat, output=output, axis=1)

    def draw(self, *shape: int, scale: float = 1.0) -> NDArray[np.float32]:
        return (scale * self.rng.normal(size=shape)).astype(np.float32)

    def save(
        self,
        path: Path,
        outputs: dict[str, Shape],
        *,
        input_shape: Shape | None = None,
        data: str | None = None,
    ) -> Path:
        shape = input_shape or [self.batch, 3, *self.size]
        graph = helper.make_graph(
            self.nodes,
            "tiny",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, sides)
                for name, sides in outputs.items()
            ],
            [numpy_helper.from_array(value, name) for name, value in self.weights.items()],
        )
        opsets = [helper.make_opsetid("", 17)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        onnx.checker.check_model(model)
        if data is None:
            onnx.save(model, path)
        else:
            onnx.save(model, path, save_as_external_data=True, location=data)
        return path


def build_simcc(
    path: Path,
    *,
    batch: int | str = "batch",
    num_keypoints: int = 133,
    bins_per_px: int = 2,
    names: tuple[str, str] = ("simcc_x", "simcc_y"),
    rows_first: bool = False,
    inner_batch: int = -1,
) -> Path:
    """RTMPose's interface; `inner_batch` 1 breaks the batch that the file promises."""
    builder = Builder(CROP_PX, batch)
    row, length = builder.see(16)
    outputs: dict[str, Shape] = {}
    for name, side in zip(names, CROP_PX[::-1], strict=True):
        bins = bins_per_px * side
        code = builder.add("MatMul", row, builder.draw(length, num_keypoints * 12, scale=0.1))
        code = builder.add("Reshape", code, np.array([inner_batch, num_keypoints, 12]))
        builder.add("MatMul", code, builder.draw(12, bins), output=name)
        outputs[name] = [batch, num_keypoints, bins]
    if rows_first:
        outputs = dict(reversed(outputs.items()))
    return builder.save(path, outputs)


def build_heatmap(
    path: Path, *, batch: int | str = "batch", num_keypoints: int = 133, data: str | None = None
) -> Path:
    """ViTPose's interface, with soft peaks."""
    builder = Builder(CROP_PX, batch)
    row, length = builder.see(16)
    height, width = CROP_PX[0] // 4, CROP_PX[1] // 4
    coarse = [num_keypoints, height // 4, width // 4]
    code = builder.add("MatMul", row, builder.draw(length, int(np.prod(coarse)), scale=0.002))
    code = builder.add("Reshape", code, np.array([-1, *coarse]))
    zoom = np.array([1, 1, 4, 4], np.float32)
    maps = builder.add("Resize", code, "", zoom, mode="linear")
    builder.add(
        "Add", maps, builder.draw(1, num_keypoints, height, width, scale=0.01), output="heatmap"
    )
    return builder.save(path, {"heatmap": [batch, num_keypoints, height, width]}, data=data)


def build_yolox(path: Path, *, num_kinds: int = 1, states_rows: bool = True) -> Path:
    """A raw export: rows of cell offsets, logarithmic sizes and probabilities, stride by stride."""
    builder = Builder(PICTURE_PX)
    columns = 5 + num_kinds
    parts, num_rows = [], 0
    for stride in (8, 16, 32):
        options = {"kernel_shape": [stride] * 2, "strides": [stride] * 2}
        cells = builder.add("AveragePool", "input", **options)
        weight = builder.draw(columns, 3, 1, 1, scale=0.02)
        bias = 1 - 128 * weight.sum(axis=(1, 2, 3))
        cells = builder.add("Conv", cells, weight, bias)
        parts.append(builder.add("Reshape", cells, np.array([1, columns, -1])))
        num_rows += (PICTURE_PX[0] // stride) * (PICTURE_PX[1] // stride)
    rows = builder.add("Transpose", builder.add("Concat", *parts, axis=2), perm=[0, 2, 1])
    # Every cell its own bias: on the grey border all scores would be the same otherwise.
    rows = builder.add("Add", rows, builder.draw(1, num_rows, columns, scale=0.3))
    first, fourth, last, axis = (np.array([value]) for value in (0, 4, columns, 2))
    boxes = builder.add("Slice", rows, first, fourth, axis)
    scores = builder.add("Sigmoid", builder.add("Slice", rows, fourth, last, axis))
    builder.add("Concat", boxes, scores, output="output", axis=2)
    if not states_rows:
        builder.leave_rows_open("output", "some")
    output = "output" if states_rows else "some"
    return builder.save(path, {output: [1, num_rows if states_rows else "rows", columns]})


def build_rows(
    path: Path, *, columns: int, num_rows: int = 60, states_rows: bool = True, least: float = -0.1
) -> Path:
    """Rows of corners and score that shift with the picture: YOLOX with NMS (5), YOLOv10 (6)."""
    builder = Builder(PICTURE_PX)
    row, length = builder.see(16)
    height, width = PICTURE_PX
    centres = builder.rng.uniform(0, [width, height], (num_rows, 2))
    halves = builder.rng.uniform(3, 30, (num_rows, 2))
    scores = np.sort(builder.rng.uniform(least, 0.9, (num_rows, 1)), axis=0)[::-1]
    base = np.concatenate([centres - halves, centres + halves, scores], axis=1)
    scale = np.tile(np.array([5e-2, 5e-2, 5e-2, 5e-2, 2e-6]), num_rows) / length
    scale *= 255 if columns == 6 else 1  # YOLOv10 sees 0..1
    weight = (builder.draw(length, num_rows * 5) * scale).astype(np.float32)
    moved = builder.add("MatMul", row, weight)
    moved = builder.add("Reshape", moved, np.array([1, num_rows, 5]))
    name = "dets" if columns == 5 else "boxes"
    moved = builder.add("Add", moved, base[None].astype(np.float32), output=name)
    if columns == 6:
        kinds = builder.rng.integers(0, 2, (1, num_rows, 1)).astype(np.float32)
        builder.add("Concat", moved, kinds, output="output", axis=2)
        name = "output"
    if not states_rows:
        builder.leave_rows_open(name, name := "some")
    return builder.save(path, {name: [1, num_rows if states_rows else "rows", columns]})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of networks that no test may change."""
    folder = tmp_path_factory.mktemp("tiny")
    build_simcc(folder / "simcc.onnx")
    build_simcc(folder / "simcc1.onnx", batch=1)
    build_heatmap(folder / "heatmap.onnx")
    build_yolox(folder / "yolox.onnx")
    build_rows(folder / "yolox-nms.onnx", columns=5)
    build_rows(folder / "yolov10.onnx", columns=6)
    return folder


@pytest.fixture
def load(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., PoseModels]:
    """Load by the names of the files in `tiny`, from there."""
    monkeypatch.chdir(tiny)

    def load_named(
        pose_model: str = "simcc.onnx", detector: str = "yolox-nms.onnx", **options: Any
    ) -> PoseModels:
        options = {"provider": "cpu", "threads": 1, "on_event": ignore, **options}
        return load_models(pose_model, detector, **options)

    return load_named


def make_frame(height: int = 270, width: int = 480, seed: int = 3) -> FrameU8:
    """Soft colours, so that a shift or a swap of channels shows."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 16, 3), np.uint8)
    frame = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.asarray(frame, np.uint8)


def to_bgr(frame_u8: FrameU8) -> FrameU8:
    return np.ascontiguousarray(frame_u8[..., ::-1])


def cut_at_edge(boxes: NDArray[np.floating], frame_u8: FrameU8) -> NDArray[np.float64]:
    """What this program makes of boxes that reach beyond the frame."""
    height, width = frame_u8.shape[:2]
    cut = np.clip(np.asarray(boxes, np.float64), 0, [width, height, width, height])
    return cut[(cut[:, :2] < cut[:, 2:]).all(axis=1)]


def assert_same_boxes(found: Detections, expected: NDArray[np.float64]) -> None:
    """The same boxes; rtmlib's come in the network's order and have no score."""
    order = np.lexsort(found.boxes.T)
    np.testing.assert_array_equal(found.boxes[order], expected[np.lexsort(expected.T)])
    assert (np.diff(found.scores) <= 0).all()


FRAMES = {
    "wide": make_frame(),
    "tall": make_frame(500, 111),
    "1080p": make_frame(1080, 1920),
    "as the input": make_frame(*PICTURE_PX),
    "small": make_frame(60, 90),
}
frames = pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES)


# --- the same numbers as rtmlib ------------------------------------------------------------------


@frames
@pytest.mark.parametrize("name", ["yolox", "yolox-nms"])
def test_boxes_are_rtmlibs_cut_at_the_edge(
    load: Callable[..., PoseModels], frame: FrameU8, name: str
) -> None:
    reference = YOLOX(f"{name}.onnx", PICTURE_PX, backend="onnxruntime")
    expected = reference(to_bgr(frame))
    found = load(detector=f"{name}.onnx").detector.detect(frame)
    assert len(expected) > 10
    assert_same_boxes(found, cut_at_edge(expected, frame))


def test_only_people_of_many_kinds(tmp_path: Path, load: Callable[..., PoseModels]) -> None:
    """rtmlib in its usual mode gives things of all kinds for people."""
    path = build_yolox(tmp_path / "coco.onnx", num_kinds=5)
    frame = FRAMES["wide"]
    reference = YOLOX(str(path), PICTURE_PX, det_mode="multiclass", backend="onnxruntime")
    boxes, kinds = reference(to_bgr(frame))
    assert set(kinds) == {0, 1, 2, 3, 4}
    found = load(detector=str(path)).detector.detect(frame)
    assert_same_boxes(found, cut_at_edge(boxes[kinds == 0], frame))


@frames
@pytest.mark.parametrize("name", ["simcc", "simcc1"])
def test_keypoints_are_rtmlibs(load: Callable[..., PoseModels], frame: FrameU8, name: str) -> None:
    reference = RTMPose(f"{name}.onnx", CROP_PX[::-1], backend="onnxruntime")
    boxes = BOXES * (frame.shape[0] / 270)
    places, scores = reference(frame, bboxes=boxes)  # rtmlib hands its network what it gets
    keypoints = load(f"{name}.onnx").estimator.estimate(frame, boxes)
    np.testing.assert_array_equal(keypoints[..., :2], places)
    np.testing.assert_array_equal(keypoints[..., 2], scores)


def test_points_without_response_are_rtmlibs(
    load: Callable[..., PoseModels], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bins that are nowhere above 0 give one and the same place beside the crop."""
    shift = [np.float32(20)]

    def lower(run: Any) -> Any:
        return lambda *args, **kwargs: [output - shift[0] for output in run(*args, **kwargs)]

    reference = RTMPose("simcc.onnx", CROP_PX[::-1], backend="onnxruntime")
    models = load()
    monkeypatch.setattr(reference, "inference", lower(reference.inference))
    network = models._networks[1]
    monkeypatch.setattr(network, "run", lower(network.run))
    places, scores = reference(FRAMES["wide"], bboxes=BOXES)
    assert 0.2 < (scores <= 0).mean() < 1
    keypoints = models.estimator.estimate(FRAMES["wide"], BOXES)
    np.testing.assert_array_equal(keypoints[..., :2], places)
    np.testing.assert_array_equal(keypoints[..., 2], scores)


@pytest.mark.parametrize("detector", ["yolox", "yolox-nms", "yolov10"])
def test_channel_order_of_detectors_shows(load: Callable[..., PoseModels], detector: str) -> None:
    """The comparisons above could not fail for a swap otherwise."""
    models = load(detector=f"{detector}.onnx")
    boxes = models.detector.detect(FRAMES["wide"]).boxes
    swapped = models.detector.detect(to_bgr(FRAMES["wide"])).boxes
    assert boxes.shape != swapped.shape or (boxes != swapped).any()


# --- the same numbers as the released preprocessing ----------------------------------------------


def released_detections(session: Any, frame: FrameU8) -> tuple[NDArray[Any], NDArray[Any]]:
    """Boxes and scores by the words of the pose page, section 2, with OpenCV's own suppression."""
    height, width = frame.shape[:2]
    stretched = cv2.resize(frame, PICTURE_PX[::-1]) / 255.0
    blob = stretched.transpose(2, 0, 1)[None].astype(np.float32)
    rows = session.run(None, {"input": blob})[0][0]
    rows = rows[rows[:, 4] >= 0.05]
    rows[:, [0, 2]] *= width / PICTURE_PX[1]
    rows[:, [1, 3]] *= height / PICTURE_PX[0]
    rows[:, 2:4] -= rows[:, :2]
    whole = rows[:, :4].astype(np.int32)
    kept = cv2.dnn.NMSBoxes(whole.tolist(), rows[:, 4].tolist(), 0.05, 0.5)
    kept = np.array([index for index in kept if rows[index, 5] == 0 and rows[index, 4] > 0.05])
    boxes = whole[kept].astype(np.float64)
    boxes[:, 2:] += boxes[:, :2]
    return boxes, rows[kept, 4]


@frames
def test_boxes_are_the_released_ones_cut_at_the_edge(
    load: Callable[..., PoseModels], frame: FrameU8
) -> None:
    models = load(detector="yolov10.onnx")
    boxes, scores = released_detections(onnxruntime.InferenceSession("yolov10.onnx"), frame)
    assert 5 < len(boxes) < 40  # of 60, half of them people
    found = models.detector.detect(frame)
    np.testing.assert_array_equal(found.boxes, cut_at_edge(boxes, frame))
    assert len(found.scores) == len(scores)
    np.testing.assert_array_equal(found.scores, scores.astype(np.float64))


@pytest.fixture
def publish(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., ModelFile]:
    """Put copies of tiny networks into the cache, as if they had been downloaded."""
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("EVERANIMATE_CACHE", str(cache))

    def copy(name: str) -> ModelFile:
        shutil.copy(tiny / name, cache / name)
        return ModelFile(name=name, urls=(f"https://models.invalid/{name}",), num_mb=1)

    return copy


@pytest.mark.parametrize("channels", ["rgb", "bgr"])
def test_heatmap_network_sees_the_released_crop(
    load: Callable[..., PoseModels],
    publish: Callable[..., ModelFile],
    monkeypatch: pytest.MonkeyPatch,
    channels: Any,
) -> None:
    """Black outside the frame before normalisation, bilinear in floats."""
    vitpose = PoseModel(
        files=(publish("heatmap.onnx"),),
        detector="toy",
        thresholds=Thresholds(body=1, hand=1, face=1),
        channels=channels,
    )
    monkeypatch.setitem(POSE_MODELS, "vitpose", vitpose)
    models = load("vitpose")
    seen = record_runs(monkeypatch, models)
    frame = FRAMES["wide"]
    models.estimator.estimate(frame, np.array([[-20.0, 30.0, 470.0, 250.0]]))
    # Centre (225, 140); 490 wide, so 612.5 x 816.67: from (-81, -268) to (531, 548).
    patch = np.zeros((816, 612, 3), np.float32)
    patch[268 : 268 + 270, 81 : 81 + 480] = frame
    crop = cv2.resize(patch, CROP_PX[::-1])[..., :: 1 if channels == "rgb" else -1]
    expected = (crop / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(seen[0][0], expected.transpose(2, 0, 1), rtol=0, atol=2e-6)
    record: Any = models.record
    assert record["pose_model"]["channels"] == channels


def record_runs(monkeypatch: pytest.MonkeyPatch, models: PoseModels) -> list[NDArray[np.float32]]:
    """What the pose model's network is given from now on."""
    network, seen = models._networks[1], []
    run = network.run

    def run_and_record(blob: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        seen.append(blob.copy())
        return run(blob)

    monkeypatch.setattr(network, "run", run_and_record)
    return seen


# --- detectors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("detector", ["yolox-nms", "yolox", "yolov10"])
def test_nobody_is_nobody(
    load: Callable[..., PoseModels], monkeypatch: pytest.MonkeyPatch, detector: str
) -> None:
    """rtmlib would take the whole frame, and so would the released preprocessing."""
    models = load(detector=f"{detector}.onnx")
    network = models._networks[0]
    run = network.run

    def unsure(blob: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        (rows, *rest) = run(blob)
        rows[..., 4] = 0.04
        return [rows, *rest]

    monkeypatch.setattr(network, "run", unsure)
    found = models.detector.detect(FRAMES["wide"])
    assert found.boxes.shape == (0, 4)
    assert found.scores.shape == (0,)
    assert found.boxes.dtype == found.scores.dtype == np.float64


def test_no_number_is_no_box(
    load: Callable[..., PoseModels], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = load()
    rows = np.array([[[1, 2, 30, 40, 0.9], [np.nan, 2, 30, 40, 0.9], [1, 2, 30, 40, np.nan]]])
    monkeypatch.setattr(models._networks[0], "run", lambda _blob: [rows.astype(np.float32)])
    found = models.detector.detect(FRAMES["as the input"])
    np.testing.assert_array_equal(found.boxes, [[1, 2, 30, 40]])


def test_frames_of_changing_size(load: Callable[..., PoseModels]) -> None:
    """The grey border of one frame is not left over in the next."""
    fresh = [load().detector.detect(frame) for frame in FRAMES.values()]
    detector = load().detector
    for frame, expected in zip(FRAMES.values(), fresh, strict=True):
        np.testing.assert_array_equal(detector.detect(frame).boxes, expected.boxes)
    assert detector.num_calls == len(FRAMES)


def test_score_threshold_of_the_table(
    load: Callable[..., PoseModels],
    publish: Callable[..., ModelFile],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = (publish("yolox.onnx"),)
    counts = []
    for score in (None, 0.3, 0.9):
        entry = DetectorModel(files=files, score_threshold=score)
        monkeypatch.setitem(DETECTORS, "yolox-l", entry)
        counts.append(len(load(detector="yolox-l").detector.detect(FRAMES["wide"]).boxes))
    usual, many, few = counts
    assert many > usual > few > 0


# --- pose models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["simcc", "heatmap"])
def test_one_person_in_each_of_several_frames(
    load: Callable[..., PoseModels], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    models = load(f"{name}.onnx")
    estimator = models.estimator
    some = [FRAMES["wide"], FRAMES["tall"], FRAMES["1080p"], FRAMES["small"]]
    alone = [
        estimator.estimate(frame, box[None])[0] for frame, box in zip(some, BOXES, strict=True)
    ]
    seen = record_runs(monkeypatch, models)
    together = estimator.estimate_batch(some, BOXES)
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-3)
    assert [len(blob) for blob in seen] == [4]


def test_many_people_take_several_runs(
    load: Callable[..., PoseModels], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = load()
    seen = record_runs(monkeypatch, models)
    keypoints = models.estimator.estimate(FRAMES["wide"], np.tile(BOXES, (10, 1)))
    assert [len(blob) for blob in seen] == [16, 16, 8]
    np.testing.assert_array_equal(keypoints[:4], keypoints[36:])


@pytest.mark.parametrize("name", ["simcc1.onnx", "broken.onnx"])
def test_networks_that_take_one_picture(
    tmp_path: Path, load: Callable[..., PoseModels], name: str
) -> None:
    """Said by the file, or found out by trying."""
    path = Path(name)
    if name == "broken.onnx":
        path = build_simcc(tmp_path / name, inner_batch=1)
    models = load(str(path))
    for _ in range(2):
        keypoints = models.estimator.estimate(FRAMES["wide"], BOXES)
        np.testing.assert_array_equal(keypoints, load().estimator.estimate(FRAMES["wide"], BOXES))


def test_a_network_that_fails(
    load: Callable[..., PoseModels], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = load()
    session = models._networks[1]._session

    class Failing:
        def run(self, *_args: Any) -> Any:
            return session.run(None, {"input": np.zeros((1, 3, 7, 7), np.float32)})

    monkeypatch.setattr(models._networks[1], "_session", Failing())
    with pytest.raises(RunError) as caught:
        models.estimator.estimate(FRAMES["wide"], BOXES)
    message = str(caught.value)
    assert message.startswith("--pose-model simcc.onnx failed: INVALID_ARGUMENT : ")
    assert "\n" not in message


def test_nobody_has_no_keypoints(load: Callable[..., PoseModels]) -> None:
    models = load()
    keypoints = models.estimator.estimate(FRAMES["wide"], np.zeros((0, 4)))
    assert keypoints.shape == (0, 133, 3)
    assert models.seconds_in_network == 0


@pytest.mark.parametrize("name", ["simcc", "heatmap"])
def test_boxes_without_extent_or_far_away(load: Callable[..., PoseModels], name: str) -> None:
    """A tracker may come to such boxes; the numbers mean little, but they are numbers."""
    boxes = np.array([[50, 50, 50, 50], [-900, -900, -800, -700], [60, 50, 40, 10]], np.float64)
    keypoints = load(f"{name}.onnx").estimator.estimate(FRAMES["wide"], boxes)
    assert np.isfinite(keypoints).all()


@pytest.mark.parametrize(("boxes", "count"), [([[0, 0, np.nan, 9]], 1), (BOXES, 3)])
def test_boxes_that_are_a_mistake(load: Callable[..., PoseModels], boxes: Any, count: int) -> None:
    with pytest.raises(ValueError, match="do not go with the boxes"):
        load().estimator.estimate_batch([FRAMES["wide"]] * count, np.array(boxes))


@pytest.mark.parametrize("name", ["simcc", "heatmap"])
def test_scores_that_are_no_numbers_count_as_nothing(
    load: Callable[..., PoseModels], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    models = load(f"{name}.onnx")
    run = models._networks[1].run

    def spoil(blob: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        outputs = run(blob)
        for output in outputs:
            output[:, 3] = np.nan
        return outputs

    monkeypatch.setattr(models._networks[1], "run", spoil)
    keypoints = models.estimator.estimate(FRAMES["wide"], BOXES)
    assert np.isfinite(keypoints).all()
    assert (keypoints[:, 3, 2] == 0).all()
    assert (keypoints[:, 4, 2] != 0).all()


@pytest.mark.parametrize("rows_first", [False, True])
def test_outputs_are_told_by_their_lengths(
    tmp_path: Path, load: Callable[..., PoseModels], rows_first: bool
) -> None:
    """Other exporters have other names, and perhaps another order."""
    names = ("out_0", "out_1")
    path = build_simcc(tmp_path / "other.onnx", names=names, rows_first=rows_first)
    keypoints = load(str(path)).estimator.estimate(FRAMES["wide"], BOXES)
    np.testing.assert_array_equal(keypoints, load().estimator.estimate(FRAMES["wide"], BOXES))


def test_calibrated_scores() -> None:
    keypoints = np.arange(133 * 3, dtype=np.float64).reshape(133, 3)
    keypoints[:, 2] = 3.0
    thresholds = Thresholds(body=3.0, hand=6.0, face=1.5)
    result = calibrate(np.stack([keypoints, keypoints]), thresholds)
    np.testing.assert_array_equal(result[0, :, :2], keypoints[:, :2])
    np.testing.assert_allclose(result[1, :23, 2], 0.5)
    np.testing.assert_allclose(result[1, 23:91, 2], 1.0)
    np.testing.assert_allclose(result[1, 91:, 2], 0.25)
    assert (keypoints[:, 2] == 3).all()
    never = calibrate(keypoints, Thresholds(body=0.5, hand=float("inf"), face=0.5))
    assert (never[91:, 2] == 0).all()
    always = calibrate(keypoints, Thresholds(body=0, hand=0, face=0))
    assert (always[:, 2] > 1000).all()


# --- loading -------------------------------------------------------------------------------------


def test_record(load: Callable[..., PoseModels], tiny: Path) -> None:
    models = load("simcc.onnx", "yolox.onnx")
    assert models.record == {
        "pose_model": {
            "name": "simcc.onnx",
            "sha256": {"simcc.onnx": hash_file(tiny / "simcc.onnx")},
            "kind": "simcc",
            "input_height": 128,
            "input_width": 96,
            "channels": "rgb",
            "device": "cpu",
        },
        "detector": {
            "name": "yolox.onnx",
            "sha256": {"yolox.onnx": hash_file(tiny / "yolox.onnx")},
            "kind": "yolox",
            "input_height": 160,
            "input_width": 160,
            "channels": "bgr",
            "score_threshold": 0.7,
            "device": "cpu",
        },
        "onnxruntime": onnxruntime.__version__,
    }
    assert models.estimator.name == "simcc.onnx"
    assert models.detector.name == "yolox.onnx"


def test_published_models_come_as_a_pair(
    publish: Callable[..., ModelFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pose model's own thresholds and detector; every file is in the record."""
    vitpose = PoseModel(
        files=(publish("heatmap.onnx"), publish("simcc.onnx")),  # the second stands for weights
        detector="yolov10m",
        thresholds=POSE_MODELS["vitpose"].thresholds,
    )
    yolo = DetectorModel(files=(publish("yolov10.onnx"),), channels="rgb")
    monkeypatch.setitem(POSE_MODELS, "vitpose", vitpose)
    monkeypatch.setitem(DETECTORS, "yolov10m", yolo)
    models = load_models("vitpose", None, provider="cpu", threads=1, on_event=ignore)
    assert models.detector.name == "yolov10m"
    assert models.estimator.thresholds == Thresholds(body=0.5, hand=0.5, face=0.3)
    record: Any = models.record
    assert list(record["pose_model"]["sha256"]) == ["heatmap.onnx", "simcc.onnx"]
    assert record["detector"]["kind"] == "yolov10"


def test_the_embedded_pair(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pose_models, "TOY_FOLDER", tmp_path)
    shutil.copy(tiny / "simcc.onnx", tmp_path / "pose.onnx")
    shutil.copy(tiny / "yolox.onnx", tmp_path / "detector.onnx")
    models = load_models("toy", None, provider="cpu", threads=1, on_event=ignore)
    assert (models.estimator.name, models.detector.name) == ("toy", "toy")
    assert models.estimator.thresholds.hand == float("inf")
    (tmp_path / "pose.onnx").unlink()
    with pytest.raises(WeightsError) as caught:
        load_models("toy", None, provider="cpu", threads=1, on_event=ignore)
    assert str(caught.value) == (
        f"--pose-model toy is missing in this installation ({tmp_path / 'pose.onnx'}). "
        "Install everanimate again."
    )


def test_a_file_has_the_usual_detector(
    load: Callable[..., PoseModels], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EVERANIMATE_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"^--detector yolox-m is not in the cache"):
        load("simcc.onnx", None, download=False)


def test_weights_in_a_file_of_their_own(tmp_path: Path, load: Callable[..., PoseModels]) -> None:
    """Networks above 2 GB come so; a folder like the released one is taken too."""
    folder = tmp_path / "vitpose_h_wholebody.onnx"
    folder.mkdir()
    build_heatmap(folder / "end2end.onnx", data="weights.bin")
    assert (folder / "weights.bin").stat().st_size > 10_000
    keypoints = load(str(folder)).estimator.estimate(FRAMES["wide"], BOXES)
    expected = load("heatmap.onnx").estimator.estimate(FRAMES["wide"], BOXES)
    np.testing.assert_array_equal(keypoints, expected)
    (folder / "weights.bin").unlink()
    message = refusal(load, str(folder))
    assert message.startswith(f"--pose-model {folder} cannot be loaded: ")
    assert message.endswith("weights in files of their own must lie beside it.")


def refusal(
    load: Callable[..., PoseModels],
    *args: Any,
    error: type[EverAnimateError] = WeightsError,
    **options: Any,
) -> str:
    with pytest.raises(error) as caught:
        load(*args, **options)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x08\x08" + bytes(5000)])
def test_no_onnx_file(
    tmp_path: Path, load: Callable[..., PoseModels], content: bytes, capfd: Any
) -> None:
    (tmp_path / "damaged.onnx").write_bytes(content)
    message = refusal(load, str(tmp_path / "damaged.onnx"))
    assert message.startswith(f"--pose-model {tmp_path / 'damaged.onnx'} cannot be loaded: ")
    assert capfd.readouterr() == ("", "")


def test_missing_file(load: Callable[..., PoseModels]) -> None:
    assert refusal(load, "simcc.onnx", "yolo.onnx", error=InputError) == (
        "--detector yolo.onnx does not exist. Give an .onnx file."
    )


def test_a_body_model_is_not_enough(tmp_path: Path, load: Callable[..., PoseModels]) -> None:
    path = build_simcc(tmp_path / "body.onnx", num_keypoints=17)
    assert refusal(load, str(path)) == (
        f"--pose-model {path} knows 17 keypoints (simcc_x [17, 192] and simcc_y [17, 256]). "
        "133 are needed, in the order of COCO-WholeBody."
    )
    path = build_heatmap(tmp_path / "coco25.onnx", num_keypoints=25)
    assert "knows 25 keypoints (heatmap [25, 32, 24])" in refusal(load, str(path))


def test_files_mixed_up(load: Callable[..., PoseModels]) -> None:
    assert refusal(load, "yolox.onnx", "yolox.onnx") == (
        "--pose-model yolox.onnx gives output [525, 6]. A pose model is needed, which gives "
        "simcc_x and simcc_y, or heatmaps: give its .onnx file, or one of rtmw, rtmw-m, dwpose, "
        "vitpose, vitpose-l, toy."
    )
    assert refusal(load, "simcc.onnx", "simcc.onnx") == (
        "--detector simcc.onnx gives simcc_x [133, 192] and simcc_y [133, 256] for a picture of "
        "128x96. A YOLOX or YOLOv10 detector is needed: give its .onnx file, or one of yolox-m, "
        "yolox-tiny, yolox-l, yolov10m, toy."
    )


def test_another_resolution_of_bins(tmp_path: Path, load: Callable[..., PoseModels]) -> None:
    path = build_simcc(tmp_path / "fine.onnx", bins_per_px=3)
    assert refusal(load, str(path)) == (
        f"--pose-model {path} gives simcc_x [133, 288] and simcc_y [133, 384] for a picture of "
        "128x96. 2 bins per pixel are needed: simcc_x 192, simcc_y 256."
    )


def save_identity(path: Path, shape: Shape, kind: int = TensorProto.FLOAT) -> Path:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["pixels"], ["same"])],
        "identity",
        [helper.make_tensor_value_info("pixels", kind, shape)],
        [helper.make_tensor_value_info("same", kind, shape)],
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


@pytest.mark.parametrize(
    ("shape", "kind", "words"),
    [
        ([1, 3, 8, 6], TensorProto.UINT8, "takes pixels tensor(uint8) [1, 3, 8, 6]."),
        ([1, 8, 6, 3], TensorProto.FLOAT, "takes pixels tensor(float) [1, 8, 6, 3]."),
        ([1, 144], TensorProto.FLOAT, "takes pixels tensor(float) [1, 144]."),
        ([4, 3, 8, 6], TensorProto.FLOAT, "takes 4 pictures at once."),
        (["n", 3, "h", "w"], TensorProto.FLOAT, "leaves the size of its input open."),
        ([1, 3, 8, 6], TensorProto.FLOAT, "knows 3 keypoints (same [3, 8, 6])."),
    ],
)
def test_networks_for_something_else(
    tmp_path: Path, load: Callable[..., PoseModels], shape: Shape, kind: int, words: str
) -> None:
    path = save_identity(tmp_path / "other.onnx", shape, kind)
    assert refusal(load, str(path)).startswith(f"--pose-model {path} {words} ")


@pytest.mark.parametrize("columns", [5, 6])
def test_open_number_of_rows(tmp_path: Path, load: Callable[..., PoseModels], columns: int) -> None:
    """Exports with NMS leave open how many they find; a run on black tells the rest."""
    path = build_rows(tmp_path / "open.onnx", columns=columns, states_rows=False)
    stated = {5: "yolox-nms.onnx", 6: "yolov10.onnx"}[columns]
    models = load(detector=str(path))
    assert models.seconds_in_network == 0
    np.testing.assert_array_equal(
        models.detector.detect(FRAMES["wide"]).boxes,
        load(detector=stated).detector.detect(FRAMES["wide"]).boxes,
    )


def test_raw_export_with_an_open_number_of_rows(
    tmp_path: Path, load: Callable[..., PoseModels]
) -> None:
    path = build_yolox(tmp_path / "open.onnx", states_rows=False)
    models = load(detector=str(path))
    record: Any = models.record
    assert record["detector"]["kind"] == "yolox"
    assert models.seconds_in_network == 0


# --- where and how networks run ------------------------------------------------------------------


def test_threads(load: Callable[..., PoseModels]) -> None:
    for threads in (1, 2):
        for network in load(threads=threads)._networks:
            options = network._session.get_session_options()
            assert options.intra_op_num_threads == threads
            assert options.inter_op_num_threads == 1


def test_time_in_the_networks_is_counted(load: Callable[..., PoseModels]) -> None:
    models = load()
    models.detector.detect(FRAMES["wide"])
    first = models.seconds_in_network
    models.estimator.estimate(FRAMES["wide"], BOXES)
    assert 0 < first < models.seconds_in_network < 60


def test_cuda_that_is_not_installed(load: Callable[..., PoseModels]) -> None:
    assert refusal(load, provider="cuda", error=SettingsError) == (
        f"--provider cuda is not in the installed onnxruntime {onnxruntime.__version__}. "
        "Install onnxruntime-gpu in its place, or give --provider cpu."
    )


@pytest.mark.parametrize("has_driver", [False, True])
@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider'")
def test_cuda_that_does_not_start(
    load: Callable[..., PoseModels],
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
    has_driver: bool,
) -> None:
    """Without libraries onnxruntime takes the CPU by itself; without a driver it raises."""
    pretend_cuda(monkeypatch)
    if not has_driver:
        refuse_cuda(monkeypatch)
    problem = "CUDA does not start (no driver, or another version of CUDA or cuDNN is needed)"
    assert refusal(load, provider="cuda", error=SettingsError) == (
        f"--provider cuda: {problem}. Mend it, or give --provider cpu."
    )
    events: list[Event] = []
    models = load(provider="auto", on_event=events.append)
    assert events == [
        Note(text=f"--detector yolox-nms.onnx runs on the CPU: {problem}"),
        Note(text=f"--pose-model simcc.onnx runs on the CPU: {problem}"),
    ]
    assert len(models.detector.detect(FRAMES["wide"]).boxes) > 0
    assert capfd.readouterr() == ("", "")


def pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this were onnxruntime-gpu."""
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)


def refuse_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens inside on a machine without a GPU; the library prints when it falls back."""
    create = onnxruntime.InferenceSession._create_inference_session

    def refuse(self: Any, providers: Any, *args: Any) -> None:
        if "CUDAExecutionProvider" in providers:
            raise RuntimeError("CUDA failure 100: no CUDA-capable device is detected")
        create(self, providers, *args)

    monkeypatch.setattr(onnxruntime.InferenceSession, "_create_inference_session", refuse)


def test_a_damaged_file_is_not_blamed_on_cuda(
    tmp_path: Path, load: Callable[..., PoseModels], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_cuda(monkeypatch)
    refuse_cuda(monkeypatch)
    (tmp_path / "damaged.onnx").write_bytes(b"\x08")
    assert "cannot be loaded" in refusal(
        load, "simcc.onnx", str(tmp_path / "damaged.onnx"), provider="cuda"
    )


def test_nothing_is_printed(tmp_path: Path, load: Callable[..., PoseModels], capfd: Any) -> None:
    """onnxruntime would warn of weights that nothing uses."""
    model = onnx.load("simcc.onnx")
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(9, np.float32), "unused"))
    onnx.save(model, tmp_path / "noisy.onnx")
    models = load(str(tmp_path / "noisy.onnx"), "yolox.onnx")
    models.estimator.estimate(FRAMES["wide"], BOXES)
    models.detector.detect(FRAMES["wide"])
    assert capfd.readouterr() == ("", "")


def test_what_is_imported() -> None:
    """Not torch; and onnxruntime only for who loads a network."""
    program = (
        "import sys, everanimate_cli.pose_models\n"
        "print([name for name in ('onnxruntime', 'rtmlib', 'torch') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_loading_does_without_torch(tiny: Path) -> None:
    program = (
        "import sys\n"
        "from everanimate_cli.pose_models import load_models\n"
        "load_models('simcc.onnx', 'yolox.onnx', provider='auto', threads=None, on_event=print)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tiny, capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"False\n", done.stdout)
    assert done.stderr == ""
