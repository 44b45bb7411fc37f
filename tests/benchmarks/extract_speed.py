"""What `extract-pose` costs beside its networks, against a plain loop over rtmlib, as tables.

    python tests/benchmarks/extract_speed.py [--quick] [--models sized|toy] [--threads 1]
        [--cores N] [--rounds 3] [--parts speed memory accuracy] [--json FILE]

Needs rtmlib without its two builds of OpenCV, and onnx:

    pip install --no-deps rtmlib==0.0.16 && pip install onnx tqdm

Two sides make a pose video of 832x480 and a face video of 512x512 from the same clip, with the same
ONNX files and as many threads for each network, one after the other in every round, each time in a
new process (not on Windows):

rtmlib loop   cv2.VideoCapture, rtmlib's YOLOX and RTMPose on every frame, drawing, face crop with
              Pillow and two H.264 encoders of PyAV, all in line. It is spared some costs: it draws
              with our code, which takes a quarter of the time of the released preprocessing, and
              its decoder and encoders run as many threads as they like.
everanimate   The command `everanimate extract-pose` with its defaults.

The networks of `--models sized` have the inputs and outputs of YOLOX and RTMW-l and convolutions of
the size asked for; whatever they see, they find a person who stands in the middle. Those of a real
pair take longer, which makes everything else count for less. `--models toy` are the embedded ones.

How time outside the networks is measured: for each side, wall time of the process from start to
exit, less the time within `InferenceSession.run`, less the same of a clip of one frame of that size
(imports, loading, opening), over the number of the other frames. What one side does in other
threads while a network runs is not in it, and that is meant: it is what a user waits for besides
the networks. Therefore the processor time of the whole process is there as well, and what is left
of it without the networks (their calls times what a call takes, measured alone in the same round)
and without the start. `--cores 1` leaves nothing to be overlapped. Ratios are taken between the
neighbours of a round, and their median counts. Peak memory is that of the process.

The memory part compares a clip with the same clip many times over. The accuracy part takes rendered
dances and the embedded models: keypoints with the detector on every frame against rtmlib's classes
on the same frames, and against those with the detector on every eighth frame.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The peak memory of a process that is started from this one is never less than that of this one:
# so it imports nothing heavy, and whatever needs numpy runs in a process of its own.
from tables import describe_machine, lay_out_targets, table

from everanimate_cli.settings import HUB_PRESET, ExtractSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

SIDES = {"rtmlib": "rtmlib loop", "everanimate": "everanimate"}
LIBRARIES = ("rtmlib", "onnxruntime", "av", "numpy")
INSTALL = "pip install --no-deps rtmlib==0.0.16 && pip install onnx tqdm"

FPS = 30
DETECT_EVERY = ExtractSettings(video=Path()).detect_every
CANVAS = (HUB_PRESET.height, HUB_PRESET.width)
FACE_SIZE = HUB_PRESET.face_size
CRF = ExtractSettings(video=Path()).crf
SEED = 4_000_000  # people whom the embedded models have not seen

# Interfaces of YOLOX-m and RTMW-l.
DETECTOR_PX = (640, 640)  # (height, width)
POSE_PX = (384, 288)
NUM_KEYPOINTS = 133
BINS_PER_PX = 2
TINY_GFLOP = 0.05  # in the memory part, whose frames are many
# The person in the middle of a 16:9 clip, as the sized detector finds it, in its input's pixels.
PERSON_BOX = (240.0, 26.0, 400.0, 350.0)
# Our tracker takes the extent of body and face, so much larger, for the next box: with joints that
# fill this part of a box, the box stays where it is.
BOX_OVER_EXTENT = 1.2
BOX_PADDING = 1.25  # of the crop that a pose model looks at
SCORE = 0.9

MAX_OUTSIDE_RATIO = 0.5
MAX_MEMORY_RATIO = 1.10
MAX_KEYPOINT_PX = 1e-3
MAX_DRIFT_SHARE = 0.01  # of the box's height
OPENING_LOOKS = 10  # of the detector, to choose the person in the first second
SEEN_SCORE = 0.5


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A driving video to be rendered.

    Attributes:
        height: Of its frames.
        width: Of its frames.
        seconds: Length of what is rendered.
        repeats: How many times that is shown.
    """

    height: int
    width: int
    seconds: float
    repeats: int = 1

    @classmethod
    def parse(cls, text: str) -> Clip:
        """A clip from "WIDTHxHEIGHT:SECONDS" or "WIDTHxHEIGHT:SECONDS:REPEATS"."""
        size, seconds, *repeats = text.split(":")
        width, height = (int(side) for side in size.split("x"))
        return cls(
            height=height,
            width=width,
            seconds=float(seconds),
            repeats=int(repeats[0]) if repeats else 1,
        )

    @property
    def name(self) -> str:
        """Such as "10 s 1920x1080"."""
        return f"{self.repeats * self.seconds:g} s {self.width}x{self.height}"

    @property
    def num_frames(self) -> int:
        """Frames of the whole clip."""
        return self.repeats * self.num_rendered

    @property
    def num_rendered(self) -> int:
        """Frames before they are repeated."""
        return max(1, round(self.seconds * FPS))

    def path(self, folder: Path) -> Path:
        """Where it lies."""
        return folder / f"{self.width}x{self.height}-{self.num_rendered}x{self.repeats}.mp4"

    @property
    def once(self) -> Clip:
        """The clip without repeats."""
        return Clip(height=self.height, width=self.width, seconds=self.seconds)

    @property
    def first_frame(self) -> Clip:
        """The clip that tells what is done once."""
        return Clip(height=self.height, width=self.width, seconds=1 / FPS)


@dataclass(frozen=True, kw_only=True)
class Networks:
    """A pair of ONNX files.

    Attributes:
        detector: Like YOLOX with its suppression of overlapping boxes.
        pose: Like RTMW.
        given: What `extract-pose` is told instead, if not the paths.
    """

    detector: Path
    pose: Path
    given: tuple[str, str] | None = None

    @property
    def options(self) -> list[str]:
        """For the command line of `extract-pose`."""
        detector, pose = self.given or (str(self.detector), str(self.pose))
        return ["--detector", detector, "--pose-model", pose]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was seen of one process.

    Attributes:
        side: Key of `SIDES`.
        clip: Name.
        num_frames: Frames of the result.
        wall_s: From start to exit.
        cpu_s: Processor time, of all threads.
        networks_s: Within `InferenceSession.run`.
        detector_calls: Frames that the detector looked at.
        pose_calls: Frames that the pose model looked at.
        peak_mib: Most memory.
    """

    side: str
    clip: str
    num_frames: int
    wall_s: float
    cpu_s: float
    networks_s: float
    detector_calls: int
    pose_calls: int
    peak_mib: float

    @property
    def outside_s(self) -> float:
        """Wall time without the networks."""
        return self.wall_s - self.networks_s


@dataclass(frozen=True, kw_only=True)
class CallCosts:
    """Processor seconds of one call of each network, alone on the machine."""

    detector_s: float
    pose_s: float

    def outside_cpu_s(self, made: Measurement) -> float:
        """Processor time of a process without its networks."""
        inside_s = made.detector_calls * self.detector_s + made.pose_calls * self.pose_s
        return made.cpu_s - inside_s


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One side's part of a round: the whole clip, its first frame alone, and the networks alone."""

    clip: Measurement
    first: Measurement
    costs: CallCosts

    @property
    def outside_frame_s(self) -> float:
        """Wall time outside the networks per frame, without the start."""
        return (self.clip.outside_s - self.first.outside_s) / self._num_frames

    @property
    def outside_frame_cpu_s(self) -> float:
        """The same of processor time."""
        both = (self.costs.outside_cpu_s(made) for made in (self.clip, self.first))
        return (next(both) - next(both)) / self._num_frames

    @property
    def _num_frames(self) -> int:
        return self.clip.num_frames - self.first.num_frames


# --- in processes of their own: making the inputs -------------------------------------------------


def prepare(folder: Path, clips: Sequence[Clip], gflop: tuple[float, float] | None) -> None:
    """Render clips, and write a detector and a pose model of these sizes."""
    for clip in clips:
        render_clip(clip.path(folder), clip)
    if gflop is not None:
        build_networks(folder, *gflop)


def render_clip(path: Path, clip: Clip) -> None:
    """Write a dance of the toy world, scaled up, with the grain of a camera."""
    import cv2  # noqa: PLC0415  # see the comment above
    import numpy as np  # noqa: PLC0415

    from everanimate_cli.encode import VideoWriter  # noqa: PLC0415
    from everanimate_cli.joining import join_videos  # noqa: PLC0415
    from everanimate_cli.toyworld import Dance, ToyScene  # noqa: PLC0415

    if clip.repeats > 1:
        join_videos([clip.once.path(path.parent)] * clip.repeats, path)  # rendered before
        return
    scene_height = min(clip.height, 360)
    scene_width = round(scene_height * clip.width / clip.height / 2) * 2
    dance = Dance(SEED, turn_after_s=20.0)
    scene = ToyScene(SEED, dance, height=scene_height, width=scene_width)
    rng = np.random.default_rng(SEED)
    # Without grain a picture is decoded in less time than any film.
    grains = [
        np.repeat(rng.normal(0, 1.5, (clip.height, clip.width, 1)), 3, axis=2).astype(np.int16)
        for _ in range(4)
    ]
    size = {"height": clip.height, "width": clip.width}
    with VideoWriter(path, **size, rate=FPS, crf=22, preset="veryfast", threads=2) as writer:
        for index, frame in enumerate(scene.frames(clip.num_rendered, rate_fps=FPS)):
            large = cv2.resize(frame.rgb, (clip.width, clip.height))
            grain = grains[index % len(grains)]
            writer.write(np.asarray(cv2.add(large, grain, dtype=cv2.CV_8U), np.uint8)[None])


def render_dances(folder: Path, clip: Clip, num_dances: int) -> None:
    """Write those of the accuracy part; the camera moves in every second one."""
    from everanimate_cli.encode import VideoWriter  # noqa: PLC0415
    from everanimate_cli.toyworld import Dance, ToyScene  # noqa: PLC0415  # see the comment above

    size = {"height": clip.height, "width": clip.width}
    for index in range(num_dances):
        seed = SEED + 1 + index
        scene = ToyScene(seed, Dance(seed), **size, camera="moving" if index % 2 else "still")
        with VideoWriter(dance_video(folder, index), **size, rate=FPS, crf=18) as writer:
            for frame in scene.frames(clip.num_frames, rate_fps=FPS):
                writer.write(frame.rgb[None])


def build_networks(folder: Path, detector_gflop: float, pose_gflop: float) -> None:
    """Write a detector and a pose model that always find the same."""
    import numpy as np  # noqa: PLC0415  # see the comment above

    dets = np.array([[[*PERSON_BOX, SCORE]]], np.float32)
    _build_network(folder / "detector.onnx", DETECTOR_PX, 1, detector_gflop, {"dets": dets})
    places = _standing_places()
    bins = {}
    for axis, name in enumerate(("simcc_x", "simcc_y")):
        num_bins = BINS_PER_PX * POSE_PX[1 - axis]
        bins[name] = np.zeros((1, NUM_KEYPOINTS, num_bins), np.float32)
        peaks = np.rint(places[:, axis] * num_bins).astype(int)
        bins[name][0, np.arange(NUM_KEYPOINTS), peaks] = SCORE
    _build_network(folder / "pose.onnx", POSE_PX, "batch", pose_gflop, bins)


def _standing_places() -> Any:
    """[133, 2] (x, y) from 0 to 1 over the crop: somebody who stands still and fills the box."""
    import numpy as np  # noqa: PLC0415  # see the comment above

    from everanimate_cli.toyworld import StandingPose, ToyScene  # noqa: PLC0415

    scene = ToyScene(SEED, StandingPose(), height=256, width=256)
    points = scene.frame_at(0.0).keypoints[:, :2]
    low, high = points[:91].min(axis=0), points[:91].max(axis=0)
    box_width, box_height = PERSON_BOX[2] - PERSON_BOX[0], PERSON_BOX[3] - PERSON_BOX[1]
    crop_height = BOX_PADDING * max(box_height, box_width * POSE_PX[0] / POSE_PX[1])
    crop_width = crop_height * POSE_PX[1] / POSE_PX[0]
    filled = np.array([box_width / crop_width, box_height / crop_height]) / BOX_OVER_EXTENT
    return 0.5 + ((points - low) / (high - low) - 0.5) * filled


def _build_network(
    path: Path, size: tuple[int, int], batch: int | str, gflop: float, results: dict[str, Any]
) -> None:
    """Convolutions over a picture, which add next to nothing to fixed results."""
    import numpy as np  # noqa: PLC0415  # see the comment above
    import onnx  # noqa: PLC0415
    from onnx import TensorProto, helper, numpy_helper  # noqa: PLC0415

    channels, cell_px = 64, 8
    cells = size[0] // cell_px * (size[1] // cell_px)
    num_layers = max(1, round(gflop * 1e9 / (cells * channels**2 * 9 * 2)))
    rng = np.random.default_rng(0)
    weights = {
        "first": rng.normal(0, 1e-3, (channels, 3, cell_px, cell_px)),
        # So little that a float32 of the size of the results does not change.
        "little": np.array(1e-12),
        "axes": np.array([1, 2, 3]),
    }
    nodes = [helper.make_node("Conv", ["input", "first"], ["value0"], strides=[cell_px] * 2)]
    for index in range(num_layers):
        weights[f"layer{index}"] = rng.normal(0, (9 * channels) ** -0.5, (channels, channels, 3, 3))
        convolved = f"convolved{index}"
        inputs = [f"value{index}", f"layer{index}"]
        nodes.append(helper.make_node("Conv", inputs, [convolved], pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [convolved], [f"value{index + 1}"]))
    nodes.append(helper.make_node("ReduceMean", [f"value{num_layers}", "axes"], ["mean"]))
    nodes.append(helper.make_node("Mul", ["mean", "little"], ["nothing4"]))
    nodes.append(helper.make_node("Squeeze", ["nothing4", "last"], ["nothing"]))  # [B, 1, 1]
    weights["last"] = np.array([3])
    for name, value in results.items():
        weights[f"fixed_{name}"] = value
        nodes.append(helper.make_node("Add", [f"fixed_{name}", "nothing"], [name]))
    integers = ("axes", "last")
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, *size])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, *value.shape[1:]])
            for name, value in results.items()
        ],
        [
            numpy_helper.from_array(
                np.asarray(value, np.int64 if name in integers else np.float32), name
            )
            for name, value in weights.items()
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)


# --- in processes of their own: rtmlib ------------------------------------------------------------


class TimedSession:
    """A session of the same threads as ours, in the place of rtmlib's; its runs are timed.

    Attributes:
        seconds: Within `run` so far.
        num_calls: Of `run` so far.
    """

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime  # noqa: PLC0415  # see the comment above

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self.get_inputs, self.get_outputs = self._session.get_inputs, self._session.get_outputs
        self.seconds, self.num_calls = 0.0, 0

    @property
    def input_px(self) -> tuple[int, int]:
        """(height, width) of the input."""
        height, width = self.get_inputs()[0].shape[2:]
        return height, width

    def run(self, names: Sequence[str] | None, inputs: dict[str, Any]) -> Any:
        started_s = time.perf_counter()
        outputs = self._session.run(names, inputs)
        self.seconds += time.perf_counter() - started_s
        self.num_calls += 1
        return outputs


def open_rtmlib(networks: Networks, threads: int) -> tuple[Any, Any]:
    """rtmlib's YOLOX and RTMPose, with sessions that are timed."""
    import rtmlib  # noqa: PLC0415  # see the comment above

    tools = []
    for kind, path in ((rtmlib.YOLOX, networks.detector), (rtmlib.RTMPose, networks.pose)):
        session = TimedSession(path, threads)
        height, width = session.input_px
        size = (height, width) if kind is rtmlib.YOLOX else (width, height)
        with contextlib.redirect_stdout(io.StringIO()):  # it tells what it loads
            tool = kind(str(path), model_input_size=size)
        tool.session = session
        tools.append(tool)
    return tools[0], tools[1]


def run_rtmlib(video: Path, output: Path, networks: Networks, threads: int) -> dict[str, Any]:
    """What somebody writes who has rtmlib and a drawing function.

    Returns:
        Facts, as `extract-pose --json` gives them.
    """
    import av  # noqa: PLC0415  # see the comment above
    import cv2  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415

    from everanimate_cli import skeleton  # noqa: PLC0415
    from everanimate_cli.images import fit_points  # noqa: PLC0415
    from everanimate_cli.pose_folder import PRESETS  # noqa: PLC0415

    detector, pose = open_rtmlib(networks, threads)
    output.mkdir(exist_ok=True)
    rows = []
    with (
        av.open(output / "pose.mp4", "w") as pose_file,
        av.open(output / "face.mp4", "w") as face_file,
    ):
        streams = []
        sizes = {"pose": CANVAS, "face": (FACE_SIZE, FACE_SIZE)}
        for file, (name, size) in zip((pose_file, face_file), sizes.items(), strict=True):
            # Both sides encode alike, so that no difference is one of quality.
            quality = {"crf": str(CRF), "preset": PRESETS[name]}
            stream = file.add_stream("libx264", rate=Fraction(FPS), options=quality)
            stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
            streams.append((file, stream))
        capture = cv2.VideoCapture(str(video))
        while True:
            is_frame, frame_bgr = capture.read()
            if not is_frame:
                break
            boxes = detector(frame_bgr)
            frame_u8 = cv2.cvtColor(frame_bgr, cv2.COLOR_BGR2RGB)
            places, scores = pose(frame_u8, boxes)
            largest = 0
            if len(boxes) > 1:
                largest = int(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1).argmax())
            keypoints = np.concatenate([places[largest], scores[largest][:, None]], axis=1)
            height, width = frame_u8.shape[:2]
            moved = fit_points(keypoints, (height, width), CANVAS, "contain")
            pictures = [Image.fromarray(skeleton.draw_pose(moved, *CANVAS))]
            box = skeleton.face_box(keypoints, height, width)
            face = Image.new("RGB", (FACE_SIZE, FACE_SIZE))
            if box is not None:
                face = Image.fromarray(frame_u8).crop(box)
                face = face.resize((FACE_SIZE, FACE_SIZE), Image.Resampling.BILINEAR)
            pictures.append(face)
            for (file, stream), picture in zip(streams, pictures, strict=True):
                file.mux(stream.encode(av.VideoFrame.from_image(picture)))
            rows.append(keypoints)
        capture.release()
        for file, stream in streams:
            file.mux(stream.encode(None))
    np.savez_compressed(output / "keypoints.npz", raw_keypoints=np.array(rows, np.float32))
    return {
        "frames": len(rows),
        "networks_s": detector.session.seconds + pose.session.seconds,
        "detector_calls": detector.session.num_calls,
        "frames_without_person": 0,
    }


def time_networks(networks: Networks, threads: int) -> CallCosts:
    """Run both networks on black pictures, with nothing beside them."""
    import numpy as np  # noqa: PLC0415  # see the comment above

    costs = []
    for path in (networks.detector, networks.pose):
        session = TimedSession(path, threads)
        inputs = {session.get_inputs()[0].name: np.zeros((1, 3, *session.input_px), np.float32)}
        spent_s = []
        for _ in range(15):
            started_s = time.process_time()
            session.run(None, inputs)
            spent_s.append(time.process_time() - started_s)
        costs.append(statistics.median(spent_s[5:]))
    return CallCosts(detector_s=costs[0], pose_s=costs[1])


# --- in processes of their own: comparing ---------------------------------------------------------


def apart_shares(first: Path, second: Path) -> list[float]:
    """How far the keypoints of two results are from each other, in heights of the person.

    Args:
        first: Folder of a result of `extract-pose`, whose boxes tell the height.
        second: Folder of another one, or of the rtmlib loop.

    Returns:
        Median and 95th percentile over the points that both see.
    """
    import numpy as np  # noqa: PLC0415  # see the comment above

    with np.load(first / "keypoints.npz") as one, np.load(second / "keypoints.npz") as other:
        points, others, boxes = one["raw_keypoints"], other["raw_keypoints"], one["boxes"]
    distances_px = np.linalg.norm(points[..., :2] - others[..., :2], axis=2)
    shares = distances_px / (boxes[:, 3] - boxes[:, 1])[:, None]
    seen = np.minimum(points[..., 2], others[..., 2]) >= SEEN_SCORE  # false for NaN
    return [float(value) for value in np.percentile(shares[seen], [50, 95])]


def compare_dance(folder: Path, dance: int, networks: Networks) -> dict[str, float]:
    """One dance's keypoints against rtmlib's, and with rarer looks of the detector."""
    made = [folder / f"dance{dance}-{step}" for step in (1, DETECT_EVERY)]
    median, percentile = apart_shares(*made)
    return {
        "from_rtmlib_px": farthest_from_rtmlib_px(dance_video(folder, dance), made[0], networks),
        "drift_share": median,
        "drift_share_95": percentile,
    }


def farthest_from_rtmlib_px(video: Path, folder: Path, networks: Networks) -> float:
    """How far keypoints are from those that rtmlib's classes find in the same frames.

    Args:
        video: The clip.
        folder: Result of `extract-pose` with the detector on every frame.
        networks: What both ran.

    Returns:
        The largest difference of a coordinate over all frames [px].
    """
    import numpy as np  # noqa: PLC0415  # see the comment above

    from everanimate_cli.video import VideoReader  # noqa: PLC0415

    detector, pose = open_rtmlib(networks, 1)
    with np.load(folder / "keypoints.npz") as arrays:
        found, boxes = arrays["raw_keypoints"], arrays["boxes"]
    worst_px = 0.0
    with VideoReader(video) as reader:
        for index, (keypoints, box) in enumerate(zip(found, boxes, strict=True)):
            frame_u8 = reader.read([index])[0]
            if np.isnan(box).any():  # nobody, where rtmlib would take the whole frame
                continue
            theirs = np.asarray(detector(frame_u8[..., ::-1]), np.float64).reshape(-1, 4)
            # Ours end at the frame's edge.
            height, width = frame_u8.shape[:2]
            theirs = np.clip(theirs, 0, [width, height, width, height])
            nearest = int(np.abs(theirs - box).sum(axis=1).argmin())
            places, _ = pose(frame_u8, theirs[[nearest]])
            worst_px = max(worst_px, float(np.abs(places[0] - keypoints[:, :2]).max()))
    return worst_px


# --- in the main process --------------------------------------------------------------------------


def in_new_process(call: Callable[..., Any], *arguments: Any) -> Any:
    """What the call returns; what it imports is gone afterwards."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as new_process:
        return new_process.submit(call, *arguments).result()


def everanimate_words(
    video: Path, output: Path, networks: Networks, threads: int, *options: str
) -> list[str]:
    """The command line that makes `output`."""
    words = [sys.executable, "-m", "everanimate_cli", "extract-pose", str(video)]
    words += ["--output", str(output), "--overwrite", "--no-resume", "--json", "--quiet"]
    words += [*networks.options, "--provider", "cpu", "--threads", str(threads)]
    return [*words, "--fps", str(FPS), *options]


def rtmlib_words(video: Path, output: Path, networks: Networks, threads: int) -> list[str]:
    """The command line that runs `run_rtmlib`."""
    paths = [str(path) for path in (video, output, networks.detector, networks.pose)]
    return [sys.executable, __file__, "--rtmlib-loop", *paths, str(threads)]


def measure(side: str, clip: Clip, folder: Path, networks: Networks, threads: int) -> Measurement:
    """Let one side work through a clip, in a new process."""
    words_of = rtmlib_words if side == "rtmlib" else everanimate_words
    words = words_of(clip.path(folder), result_folder(side, clip, folder), networks, threads)
    with tempfile.TemporaryFile() as printed:
        started_s = time.perf_counter()
        process = subprocess.Popen(words, stdout=printed)
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - started_s
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{SIDES[side]} failed on {clip.name}")
        printed.seek(0)
        facts = json.loads(printed.read())
    if facts["frames"] != clip.num_frames or facts["frames_without_person"]:
        raise SystemExit(f"{SIDES[side]} did not see the person in each frame of {clip.name}")
    return Measurement(
        side=side,
        clip=clip.name,
        num_frames=facts["frames"],
        wall_s=wall_s,
        cpu_s=usage.ru_utime + usage.ru_stime,
        networks_s=facts["networks_s"],
        detector_calls=facts["detector_calls"],
        pose_calls=facts["frames"],
        # KiB, on macOS bytes
        peak_mib=usage.ru_maxrss / (2**20 if platform.system() == "Darwin" else 2**10),
    )


def result_folder(side: str, clip: Clip, folder: Path) -> Path:
    """Where a side's result lies."""
    return folder / f"{clip.path(folder).stem}-{side}"


def measure_in_turn(
    clips: Sequence[Clip], folder: Path, networks: Networks, options: argparse.Namespace
) -> list[list[Turn]]:
    """All clips and sides in every round; one line of progress for each."""
    rounds = []
    for round_index in range(options.rounds):
        rounds.append([])
        for clip in clips:
            costs = in_new_process(time_networks, networks, options.threads)
            for side in SIDES:
                first, whole = (
                    measure(side, part, folder, networks, options.threads)
                    for part in (clip.first_frame, clip)
                )
                turn = Turn(clip=whole, first=first, costs=costs)
                rounds[-1].append(turn)
                sys.stderr.write(
                    f"round {round_index + 1} of {options.rounds}, {clip.name}, {side}: "
                    f"{whole.wall_s:.1f} s, outside {1000 * turn.outside_frame_s:.1f} ms a frame, "
                    f"{whole.peak_mib:.0f} MiB\n"
                )
    return rounds


@dataclass(frozen=True, kw_only=True)
class Row:
    """Medians over the rounds of one side on one clip; ratios are to the rtmlib loop.

    Attributes:
        side: Key of `SIDES`.
        clip: Name.
        num_frames: Length.
        total_s: Wall time, with the start.
        total_ratio: That over the other's.
        start_s: Wall time of the clip's first frame alone, with the networks.
        networks_ms: Wall time in the networks per frame.
        outside_ms: Wall time outside the networks per frame, without the start.
        outside_ratio: That over the other's.
        cpu_ms: Processor time per frame, with everything.
        cpu_ratio: That over the other's.
        outside_cpu_ms: Processor time outside the networks per frame, without the start.
        outside_cpu_ratio: That over the other's.
        detector_calls: Frames that the detector looked at.
        peak_mib: Most memory.
    """

    side: str
    clip: str
    num_frames: int
    total_s: float
    total_ratio: float
    start_s: float
    networks_ms: float
    outside_ms: float
    outside_ratio: float
    cpu_ms: float
    cpu_ratio: float
    outside_cpu_ms: float
    outside_cpu_ratio: float
    detector_calls: int
    peak_mib: float


def summarise(rounds: Sequence[Sequence[Turn]]) -> list[Row]:
    """One row per clip and side."""
    num_sides, rows = len(SIDES), []
    for index in range(len(rounds[0])):
        turns = [one_round[index] for one_round in rounds]
        peers = [one_round[index - index % num_sides] for one_round in rounds]

        def middle(value: Callable[[Turn], float], turns: Sequence[Turn] = turns) -> float:
            return statistics.median(value(turn) for turn in turns)

        def ratio(
            value: Callable[[Turn], float],
            pairs: Sequence[tuple[Turn, Turn]] = tuple(zip(turns, peers, strict=True)),
        ) -> float:
            return statistics.median(value(turn) / value(peer) for turn, peer in pairs)

        clip = turns[0].clip
        rows.append(
            Row(
                side=clip.side,
                clip=clip.clip,
                num_frames=clip.num_frames,
                total_s=middle(lambda turn: turn.clip.wall_s),
                total_ratio=ratio(lambda turn: turn.clip.wall_s),
                start_s=middle(lambda turn: turn.first.wall_s),
                networks_ms=1000 * middle(lambda turn: turn.clip.networks_s) / clip.num_frames,
                outside_ms=1000 * middle(lambda turn: turn.outside_frame_s),
                outside_ratio=ratio(lambda turn: turn.outside_frame_s),
                cpu_ms=1000 * middle(lambda turn: turn.clip.cpu_s) / clip.num_frames,
                cpu_ratio=ratio(lambda turn: turn.clip.cpu_s),
                outside_cpu_ms=1000 * middle(lambda turn: turn.outside_frame_cpu_s),
                outside_cpu_ratio=ratio(lambda turn: turn.outside_frame_cpu_s),
                detector_calls=round(middle(lambda turn: turn.clip.detector_calls)),
                peak_mib=middle(lambda turn: turn.clip.peak_mib),
            )
        )
    return rows


def check_speed(rows: Iterable[Row]) -> list[tuple[str, float, float]]:
    """(what, value, limit) for each clip."""
    targets = []
    for row in rows:
        if row.side == "everanimate":
            most_calls = math.ceil(row.num_frames / DETECT_EVERY) + OPENING_LOOKS
            targets += [
                (
                    f"time outside the networks over rtmlib's, {row.clip}",
                    row.outside_ratio,
                    MAX_OUTSIDE_RATIO,
                ),
                (
                    f"calls of the detector per frame, {row.clip}",
                    row.detector_calls / row.num_frames,
                    most_calls / row.num_frames,
                ),
            ]
    return targets


def check_memory(
    clip: Clip, folder: Path, options: argparse.Namespace
) -> tuple[list[Measurement], list[tuple[str, float, float]]]:
    """Both lengths with small networks; the second list is of targets."""
    lengths, made = [clip.once, clip], []
    networks = prepared(folder / "memory", lengths, (TINY_GFLOP, TINY_GFLOP))
    for length in lengths:
        made.append(measure("everanimate", length, folder / "memory", networks, options.threads))
        sys.stderr.write(f"memory, {length.name}: {made[-1].peak_mib:.0f} MiB\n")
    ratio = made[1].peak_mib / made[0].peak_mib
    what = f"peak memory, {lengths[1].name} over {lengths[0].name}"
    return made, [(what, ratio, MAX_MEMORY_RATIO)]


def check_accuracy(
    clip: Clip, num_dances: int, folder: Path
) -> tuple[list[dict[str, Any]], list[tuple[str, float, float]]]:
    """Dances with the embedded models; the second list is of targets."""
    networks, dances = toy_networks(), []
    in_new_process(render_dances, folder, clip, num_dances)
    for dance in range(num_dances):
        facts = []
        for step in (1, DETECT_EVERY):
            words = everanimate_words(
                dance_video(folder, dance), folder / f"dance{dance}-{step}", networks, 1
            )
            words += ["--detect-every", str(step)]
            done = subprocess.run(words, stdout=subprocess.PIPE, check=True)
            facts.append(json.loads(done.stdout))
        dances.append(
            {
                "frames": facts[0]["frames"],
                "frames_without_person": [fact["frames_without_person"] for fact in facts],
                "detector_calls": [fact["detector_calls"] for fact in facts],
                **in_new_process(compare_dance, folder, dance, networks),
            }
        )
        sys.stderr.write(f"accuracy, dance {dance}: {dances[-1]}\n")
    limits = {"from_rtmlib_px": MAX_KEYPOINT_PX, "drift_share": MAX_DRIFT_SHARE}
    names = {
        "from_rtmlib_px": "keypoints where the detector looked, from rtmlib's [px]",
        "drift_share": f"keypoints, detector on every {DETECT_EVERY}th frame or on every one, "
        "median distance over the box's height",
    }
    return dances, [
        (names[key], max(dance[key] for dance in dances), limit) for key, limit in limits.items()
    ]


def dance_video(folder: Path, index: int) -> Path:
    """Where a dance of the accuracy part lies."""
    return folder / f"dance{index}.mp4"


def prepared(folder: Path, clips: Sequence[Clip], gflop: tuple[float, float] | None) -> Networks:
    """Make the inputs; the networks are the embedded ones if no size is given."""
    folder.mkdir()
    in_new_process(prepare, folder, clips, gflop)
    if gflop is None:
        return toy_networks()
    return Networks(detector=folder / "detector.onnx", pose=folder / "pose.onnx")


def toy_networks() -> Networks:
    """The embedded files."""
    folder = Path(__file__).parents[2] / "everanimate_cli" / "toy_pose"
    files = {name: folder / f"{name}.onnx" for name in ("detector", "pose")}
    return Networks(**files, given=("toy", "toy"))


def judged(targets: Iterable[tuple[str, float, float]]) -> list[dict[str, Any]]:
    """The targets: what, its value, its limit and whether it is met."""
    return [
        {"target": what, "value": value, "limit": limit, "met": value <= limit}
        for what, value, limit in targets
    ]


# --- tables ---------------------------------------------------------------------------------------


def lay_out_rows(rows: Iterable[Row]) -> str:
    """The figures of the speed part; "x" is the ratio to the line above."""
    head = ["clip, side", "total s", "x", "start s", "networks ms / frame", "outside ms / frame"]
    head += ["x", "CPU ms / frame", "x", "CPU outside ms / frame", "x", "detector calls"]
    head += ["peak MiB"]
    lines = [
        [
            f"{row.clip}, {SIDES[row.side]}",
            f"{row.total_s:.1f}",
            f"{row.total_ratio:.2f}",
            f"{row.start_s:.2f}",
            f"{row.networks_ms:.1f}",
            f"{row.outside_ms:.1f}",
            f"{row.outside_ratio:.2f}",
            f"{row.cpu_ms:.1f}",
            f"{row.cpu_ratio:.2f}",
            f"{row.outside_cpu_ms:.1f}",
            f"{row.outside_cpu_ratio:.2f}",
            f"{row.detector_calls} of {row.num_frames}",
            f"{row.peak_mib:.0f}",
        ]
        for row in rows
    ]
    return table(head, lines)


def lay_out_memory(made: Iterable[Measurement]) -> str:
    """The figures of the memory part."""
    lines = [
        [
            one.clip,
            f"{one.num_frames}",
            f"{one.wall_s:.1f}",
            f"{1000 * one.wall_s / one.num_frames:.1f}",
            f"{one.peak_mib:.0f}",
        ]
        for one in made
    ]
    return table(["clip, small networks", "frames", "total s", "ms / frame", "peak MiB"], lines)


def lay_out_dances(dances: Iterable[dict[str, Any]]) -> str:
    """The figures of the accuracy part."""
    head = ["dance", "frames", "without person", "detector calls", "from rtmlib px"]
    head += ["drift, median", "drift, 95 %"]
    lines = [
        [
            f"{index}",
            f"{dance['frames']}",
            " / ".join(str(number) for number in dance["frames_without_person"]),
            " / ".join(str(number) for number in dance["detector_calls"]),
            f"{dance['from_rtmlib_px']:.5f}",
            f"{dance['drift_share']:.2%}",
            f"{dance['drift_share_95']:.2%}",
        ]
        for index, dance in enumerate(dances)
    ]
    return table(head, lines)


def read_options() -> argparse.Namespace:
    """The command line; `--quick` changes defaults only."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    quick, parts = "--quick" in sys.argv, ["speed", "memory", "accuracy"]
    clips = ["1920x1080:3", "1280x720:6"] if quick else ["1920x1080:10", "1280x720:60"]
    memory = "854x480:10:6" if quick else "854x480:60:10"
    parser.add_argument("--quick", action="store_true", help="short clips, one round")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--models", choices=["sized", "toy"], default="sized")
    parser.add_argument("--detector-gflop", type=float, default=5.0, help="of --models sized")
    parser.add_argument("--pose-gflop", type=float, default=2.0, help="of --models sized")
    parser.add_argument("--threads", type=int, default=1, help="of each network")
    parser.add_argument("--cores", type=int, help="how many the processes may use (Linux)")
    parser.add_argument("--rounds", type=int, default=1 if quick else 3)
    clip_help = "WIDTHxHEIGHT:SECONDS, 16:9"
    parser.add_argument("--clips", nargs="+", default=clips, help=f"of the speed part, {clip_help}")
    parser.add_argument("--memory-clip", default=memory, help=f"{clip_help}:REPEATS")
    dances = "854x480:2" if quick else "854x480:5"
    parser.add_argument("--dance-clip", default=dances, help=f"of the accuracy part, {clip_help}")
    parser.add_argument("--dances", type=int, default=2 if quick else 6)
    parser.add_argument("--json", type=Path, help="file for all figures")
    return parser.parse_args()


def main() -> None:
    """Measure and print the tables."""
    options = read_options()
    if importlib.util.find_spec("rtmlib") is None:
        raise SystemExit(f"rtmlib is not installed: {INSTALL}")
    if options.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    targets: list[tuple[str, float, float]] = []
    figures: dict[str, Any] = {}
    printed = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "speed" in options.parts:
            clips = [Clip.parse(text) for text in options.clips]
            parts = [part for clip in clips for part in (clip.first_frame, clip)]
            gflop = (options.detector_gflop, options.pose_gflop)
            networks = prepared(
                folder / "speed", parts, gflop if options.models == "sized" else None
            )
            rounds = measure_in_turn(clips, folder / "speed", networks, options)
            rows = summarise(rounds)
            targets += check_speed(rows)
            apart = []
            for clip in clips:
                ours, theirs = (
                    result_folder(side, clip, folder / "speed")
                    for side in ("everanimate", "rtmlib")
                )
                apart.append(in_new_process(apart_shares, ours, theirs)[0])
            figures |= {
                "rows": [asdict(row) for row in rows],
                "rounds": [[asdict(turn) for turn in one_round] for one_round in rounds],
                "apart_share": max(apart),
            }
            same_work = f"Keypoints of both sides, median distance: {max(apart):.2%} of the height."
            printed += [same_work, "", lay_out_rows(rows)]
        if "memory" in options.parts:
            made, of_memory = check_memory(Clip.parse(options.memory_clip), folder, options)
            targets += of_memory
            figures["memory"] = [asdict(one) for one in made]
            printed.append(lay_out_memory(made))
        if "accuracy" in options.parts:
            clip = Clip.parse(options.dance_clip)
            dances, of_accuracy = check_accuracy(clip, options.dances, folder)
            targets += of_accuracy
            figures["dances"] = dances
            printed.append(lay_out_dances(dances))
    sizes = f" ({options.detector_gflop:g} and {options.pose_gflop:g} GFLOP)"
    setting = (
        f"Networks of the speed part: {options.models}{sizes if options.models == 'sized' else ''}"
        f", {options.threads} thread(s) each; {options.cores or 'all'} core(s), "
        f"median of {options.rounds}; {describe_machine(*LIBRARIES)}."
    )
    figures |= {"setting": setting, "targets": judged(targets)}
    sys.stdout.write("\n".join([setting, *printed, lay_out_targets(figures["targets"], digits=4)]))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rtmlib-loop"]:
        clip_path, result, detector_path, pose_path = (Path(word) for word in sys.argv[2:6])
        pair = Networks(detector=detector_path, pose=pose_path)
        print(json.dumps(run_rtmlib(clip_path, result, pair, int(sys.argv[6]))))
    else:
        main()
