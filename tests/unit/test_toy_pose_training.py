"""The toy detector and pose model: their training script, and the embedded files."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from benchmarks import toy_pose_quality as quality
from rtmlib import YOLOX, RTMPose
from rtmlib.tools.pose_estimation.pre_processings import bbox_xyxy2cs, top_down_affine

from everanimate_cli import toy_pose_training as training
from everanimate_cli.toyworld import Actor, Dance, ToyGroup, ToyScene

POSE_SIZE = (training.POSE_WIDTH_PX, training.POSE_HEIGHT_PX)
DETECTOR_SIZE = (training.DETECTOR_SIZE_PX, training.DETECTOR_SIZE_PX)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten small scenes."""
    folder = tmp_path_factory.mktemp("toy_pose")
    training.render(folder, 10, 1)
    return folder


@pytest.fixture(scope="module")
def embedded() -> quality.Models:
    return quality.Models(quality.MODELS)


@pytest.mark.parametrize("size", [(90, 160), (160, 90), (256, 256), (160, 160)])
def test_letterbox_is_rtmlibs(size: tuple[int, int]) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    tool = SimpleNamespace(model_input_size=DETECTOR_SIZE)
    expected, ratio = YOLOX.preprocess(tool, frame)
    made, made_ratio = training.letterbox(frame, training.DETECTOR_SIZE_PX)
    np.testing.assert_array_equal(made, expected)
    assert made_ratio == ratio


@pytest.mark.parametrize("box", [(20.0, 10.0, 60.0, 150.0), (5.5, 30.0, 160.0, 90.0)])
def test_crop_is_rtmposes(box: tuple[float, ...]) -> None:
    """A tall and a wide box."""
    frame = np.random.default_rng(0).integers(0, 256, (170, 180, 3), np.uint8)
    centre, scale = bbox_xyxy2cs(np.array(box), padding=1.25)
    expected, full = top_down_affine(POSE_SIZE, scale, centre, frame)
    matrix = training.crop_matrix(np.array(box))
    made = training.cut_crop(frame, matrix)
    np.testing.assert_allclose(made.astype(int), expected, atol=1)
    # The way back, as rtmlib goes it.
    place = np.array([30.25, 70.5])
    back = place / POSE_SIZE * full + centre - full / 2
    np.testing.assert_allclose(matrix[:, :2] @ back + matrix[:, 2], place, atol=1e-6)


def test_detector_targets_are_what_rtmlib_decodes() -> None:
    """Rows that fulfil the targets perfectly come back as the boxes, each once."""
    boxes = np.array([[10.0, 12, 40, 90], [70, 20, 100, 60], [98, 100, 116, 128]])
    labels = torch.full((1, 3, 5), torch.nan)
    labels[0, :, :4] = torch.from_numpy(boxes)
    labels[0, :, 4] = 1.0
    states, has_box, targets = training._detector_targets(labels)
    corners, strides, levels = training._cells()
    positive = states[0] == 1
    assert {int(v) for v in levels[positive]} == {0, 1, 2}
    rows = torch.zeros(1, len(strides), 6)
    middle, size = (targets[..., :2] + targets[..., 2:]) / 2, targets[..., 2:] - targets[..., :2]
    rows[..., :2] = middle / strides[:, None] - corners
    rows[..., 2:4] = (size.clamp(min=1e-3) / strides[:, None]).log()
    rows[..., 4:] = has_box[..., None].float() * 0.9
    assert (has_box[0] | ~positive).all()
    torch.testing.assert_close(training._decoded(rows)[0, has_box[0]], targets[0, has_box[0]])
    tool = SimpleNamespace(
        model_input_size=DETECTOR_SIZE, nms_thr=0.45, score_thr=0.7, det_mode="human"
    )
    found = YOLOX.postprocess(tool, rows.numpy(), 1.0)
    np.testing.assert_allclose(sorted(found.tolist()), sorted(boxes.tolist()), atol=1e-3)


def test_who_is_hardly_seen_is_neither_person_nor_background() -> None:
    labels = torch.full((1, 3, 5), torch.nan)
    labels[0, 0] = torch.tensor([40.0, 40, 80, 120, 0])
    states, has_box, _ = training._detector_targets(labels)
    assert not (states == 1).any()
    assert (states == -1).any()
    assert not has_box.any()
    states, has_box, _ = training._detector_targets(torch.full((1, 3, 5), torch.nan))
    assert (states == 0).all()
    assert not has_box.any()


def test_overlaps() -> None:
    first = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 1]])
    second = torch.tensor([[1.0, 0, 3, 2], [2, 0, 3, 1]])
    overlap, generalised = training._overlaps(first, second)
    torch.testing.assert_close(overlap, torch.tensor([1 / 3, 0.0]))
    torch.testing.assert_close(generalised, torch.tensor([1 / 3, -1 / 3]))


def test_the_pose_loss_is_least_at_the_true_place() -> None:
    places = torch.tensor([[10.25, 40.0]])
    bins = torch.arange(2 * training.POSE_WIDTH_PX).float()

    def loss(shift_px: float) -> torch.Tensor:
        distance = bins - (places[..., None] + shift_px) * training.BINS_PER_PX
        return training._simcc_loss(-0.5 * (distance / 2).square(), places)

    assert (loss(0.0) < loss(0.5)).all()
    assert (loss(0.0) < loss(-0.5)).all()


def test_samples_have_honest_labels(work: Path) -> None:
    sets = training.open_frames(work)
    rng = np.random.default_rng(1)
    shares = []
    for _ in range(40):
        crop, labels = training._pose_sample(rng, sets)
        assert crop.shape == (training.POSE_HEIGHT_PX, training.POSE_WIDTH_PX, 3)
        inside = (labels[:, :2] > -1).all(1) & (labels[:, :2] < POSE_SIZE).all(1)
        assert not labels[~inside, 2:].any()
        shares.append(labels[:23, 2].mean())
    assert np.mean(shares) > 0.5
    people = set()
    for _ in range(40):
        picture, labels = training._detector_sample(rng, sets)
        assert picture.shape == (*DETECTOR_SIZE, 3)
        boxes = labels[~np.isnan(labels).any(1), :4]
        assert (boxes >= 0).all()
        assert (boxes <= training.DETECTOR_SIZE_PX).all()
        people.add(len(boxes))
    assert len(people) > 1


def test_all_stages_make_models_that_run(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "DETECTOR_BATCH", 4)
    monkeypatch.setattr(training, "POSE_BATCH", 4)
    monkeypatch.setattr(training, "_CALIBRATION_BATCHES", 3)
    training.train_detector(work, 0.01, 1)
    training.train_pose(work, 0.01, 1)
    output = work / "models"
    training.export(work, output)
    detector = onnxruntime.InferenceSession(output / "detector.onnx")
    (rows,) = detector.run(None, {"input": np.full((1, 3, *DETECTOR_SIZE), 99, np.float32)})
    assert rows.shape == (1, 20**2 + 10**2 + 5**2, 6)
    assert (rows[..., 4:] > 0).all()
    assert (rows[..., 4:] < 1).all()
    pose = onnxruntime.InferenceSession(output / "pose.onnx")
    pixels = np.random.default_rng(0).normal(size=(3, 3, *POSE_SIZE[::-1])).astype(np.float32)
    simcc_x, simcc_y = pose.run(None, {"input": pixels})
    assert simcc_x.shape == (3, 133, 2 * POSE_SIZE[0])
    assert simcc_y.shape == (3, 133, 2 * POSE_SIZE[1])
    np.testing.assert_array_equal(simcc_x.max(-1), simcc_y.max(-1))
    # The file says what the network says, but for the rounded weights.
    network = training._calibrated(work, "pose", training.PoseNetwork(), training._pose_loss)
    with torch.no_grad():
        x_logits, _, visible = network(torch.from_numpy(pixels))
    expected = (x_logits - x_logits.amax(-1, keepdim=True)).exp() * visible.sigmoid()[..., None]
    np.testing.assert_allclose(simcc_x, expected.numpy(), atol=0.03)


def test_embedded_files_have_the_interfaces_of_real_ones(embedded: quality.Models) -> None:
    detector, pose = embedded.detector.session, embedded.pose.session
    side = training.DETECTOR_SIZE_PX
    assert [(i.name, i.shape, i.type) for i in detector.get_inputs()] == [
        ("input", [1, 3, side, side], "tensor(float)")
    ]
    assert [o.name for o in detector.get_outputs()] == ["output"]
    assert [(i.name, i.shape, i.type) for i in pose.get_inputs()] == [
        ("input", ["batch", 3, *POSE_SIZE[::-1]], "tensor(float)")
    ]
    assert [o.name for o in pose.get_outputs()] == ["simcc_x", "simcc_y"]
    assert isinstance(embedded.detector, YOLOX)
    assert isinstance(embedded.pose, RTMPose)
    sizes = [path.stat().st_size for path in quality.MODELS.glob("*.onnx")]
    assert sum(sizes) < training.MAX_EXPORT_BYTES


@pytest.mark.parametrize("kind", ["one", "one, standing", "two"])
def test_embedded_models_find_held_out_people(embedded: quality.Models, kind: str) -> None:
    figures = quality.Figures()
    for index in range(5):
        group, heights_px = quality.scenes(kind, index, 256)
        for time_s in (51.0, 53.5, 56.0, 58.5):
            quality.count_frame(figures, embedded, group.frame_at(time_s), heights_px)
    table = figures.table()
    assert table["detector recall [%]"] > 94
    assert table["detector precision [%]"] > 94
    assert table["mean IoU of found boxes"] > 0.8
    assert table["median error, body and feet [%]"] < 1.5
    assert table["visible body points with score >= 0.5 [%]"] > 95
    if table["pairs"]:
        assert table["pairs seen left for right"] / table["pairs"] < 0.03


def test_embedded_detector_finds_nobody_in_an_empty_room(embedded: quality.Models) -> None:
    for index in range(8):
        group, _ = quality.scenes("nobody", index, 256)
        assert len(embedded.boxes(group.frame_at(1.0).rgb)) == 0


def test_embedded_pose_knows_when_the_face_is_away(embedded: quality.Models) -> None:
    dance = Dance(quality.FIRST_SEED, turn_after_s=5.0)
    scene = ToyScene(quality.FIRST_SEED, dance, height=256, width=256)
    group = ToyGroup([Actor(person_seed=quality.FIRST_SEED, dance=dance)], height=256, width=256)
    times_s = np.arange(0, 20, 0.2)
    facing = np.cos([dance.yaw(float(t)) for t in times_s])
    for time_s, away in ((times_s[facing.argmin()], True), (1.0, False)):
        frame = scene.frame_at(float(time_s)).rgb
        box = group.frame_at(float(time_s)).figures[0].box
        score = embedded.keypoints(frame, box)[23:91, 2].mean()
        assert (score < 0.3) == away
        assert (score > 0.7) != away
