"""How good the embedded detector and pose model are, on held-out people, as a table.

    python tests/benchmarks/toy_pose_quality.py [--characters 24] [--frames 10] [--sheet FILE]

The files run through rtmlib's own YOLOX and RTMPose classes (BGR for the detector, RGB for the pose
model), every box of the detector through the pose model, as a video would. Errors are in % of the
person's height. A point is hidden if the world says so or if it lies outside the frame. Points that
other people cover count as visible. Needs rtmlib (`pip install --no-deps rtmlib`) and onnxruntime.
"""

import argparse
import contextlib
import io
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import rtmlib

from everanimate_cli import skeleton
from everanimate_cli.images import write_png
from everanimate_cli.toy_pose_training import DETECTOR_SIZE_PX, POSE_HEIGHT_PX, POSE_WIDTH_PX
from everanimate_cli.toyworld import Actor, Dance, GroupFrame, StandingPose, ToyGroup

MODELS = Path(__file__).parents[2] / "everanimate_cli" / "toy_pose"
FIRST_SEED = 3_000_000
START_S, PERIOD_S = 50.0, 1.3
BODY, FACE, HANDS = slice(0, 23), slice(23, 91), slice(91, 133)
PAIRS = ((5, 6), (11, 12), (13, 14), (15, 16))  # left and right shoulder, hip, knee, ankle

# (row, limit, aim, whether more is better)
TARGETS = {
    "median error, body and feet [%]": (2.5, 1.0, False),
    "visible body points with score >= 0.5 [%]": (95, 98, True),
    "hidden body points with score < 0.5 [%]": (95, 98, True),
    "detector recall [%]": (99, 99.9, True),
    "detector precision [%]": (99, 99.9, True),
}


class Models:
    """rtmlib's classes on two files, one thread."""

    def __init__(self, folder: Path) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.detector = rtmlib.YOLOX(
                str(folder / "detector.onnx"), model_input_size=(DETECTOR_SIZE_PX, DETECTOR_SIZE_PX)
            )
            self.pose = rtmlib.RTMPose(
                str(folder / "pose.onnx"), model_input_size=(POSE_WIDTH_PX, POSE_HEIGHT_PX)
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        for tool in (self.detector, self.pose):
            tool.session = onnxruntime.InferenceSession(
                tool.onnx_model, options, providers=["CPUExecutionProvider"]
            )

    def boxes(self, frame_u8: np.ndarray) -> np.ndarray:
        """[P, 4] of an RGB frame."""
        found = self.detector(np.ascontiguousarray(frame_u8[..., ::-1]))
        return np.asarray(found, np.float64).reshape(-1, 4)

    def keypoints(self, frame_u8: np.ndarray, box: np.ndarray) -> np.ndarray:
        """[133, 3] of an RGB frame."""
        places, scores = self.pose(frame_u8, [box])
        return np.concatenate([places[0], scores[0][:, None]], axis=1)


@dataclass
class Figures:
    """What is collected over one kind of scene."""

    errors: dict[str, list[float]] = field(default_factory=dict)
    scores: dict[str, list[float]] = field(default_factory=dict)
    overlaps: list[float] = field(default_factory=list)
    face_overlaps: list[float] = field(default_factory=list)
    num_people: int = 0
    num_boxes: int = 0
    num_hits: int = 0
    swaps: int = 0
    swap_chances: int = 0

    def table(self) -> dict[str, float]:
        """Row to value."""
        rows: dict[str, float] = {
            "people": self.num_people,
            "detector recall [%]": 100 * self.num_hits / max(self.num_people, 1),
            "detector precision [%]": 100 * self.num_hits / max(self.num_boxes, 1),
            "mean IoU of found boxes": float(np.mean(self.overlaps or [np.nan])),
            "mean IoU of face boxes": float(np.mean(self.face_overlaps or [np.nan])),
            "pairs seen left for right": self.swaps,
            "pairs": self.swap_chances,
        }
        for name, label in (("body", "body and feet"), ("face", "face"), ("hands", "hands")):
            values = self.errors.get(name, [np.nan])
            rows[f"median error, {label} [%]"] = float(np.median(values))
            rows[f"95th percentile, {label} [%]"] = float(np.percentile(values, 95))
            for kind in ("visible", "hidden"):
                values = np.array(self.scores.get(f"{kind} {name}", []))
                if len(values):
                    good = values >= 0.5 if kind == "visible" else values < 0.5
                    sign = ">=" if kind == "visible" else "<"
                    rows[f"{kind} {name} points with score {sign} 0.5 [%]"] = 100 * good.mean()
        return rows


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """IoU of two boxes."""
    low, high = np.maximum(first[:2], second[:2]), np.minimum(first[2:], second[2:])
    both = np.prod(np.maximum(high - low, 0))
    areas = [np.prod(box[2:] - box[:2]) for box in (first, second)]
    return float(both / (sum(areas) - both))


def count_frame(
    figures: Figures, models: Models, frame: GroupFrame, heights_px: list[float]
) -> list[np.ndarray]:
    """Add one frame; returns the keypoints of every box found."""
    height, width = frame.rgb.shape[:2]
    boxes = models.boxes(frame.rgb)
    found = [models.keypoints(frame.rgb, box) for box in boxes]
    figures.num_boxes += len(boxes)
    free = set(range(len(boxes)))
    for figure, height_px in zip(frame.figures, heights_px, strict=True):
        truth_box = np.clip(figure.box, 0, (width, height, width, height))
        if np.prod(np.maximum(truth_box[2:] - truth_box[:2], 0)) < 0.25 * np.prod(
            figure.box[2:] - figure.box[:2]
        ):
            for index in list(free):  # hardly in the picture: to be found or not
                if overlap(boxes[index], truth_box) > 0.3:
                    free.remove(index)
                    figures.num_boxes -= 1
            continue
        figures.num_people += 1
        candidates = [(overlap(boxes[index], truth_box), index) for index in free]
        best, index = max(candidates, default=(0.0, -1))
        if best < 0.5:
            continue
        free.remove(index)
        figures.num_hits += 1
        figures.overlaps.append(best)
        compare(figures, found[index], figure.keypoints, (height, width), height_px)
    return found


def compare(
    figures: Figures,
    found: np.ndarray,
    truth: np.ndarray,
    size: tuple[int, int],
    height_px: float,
) -> None:
    """Add one person's points."""
    height, width = size
    x, y = truth[:, 0], truth[:, 1]
    visible = truth[:, 2] > 0.5
    visible[HANDS] = True  # the models take them for visible however small they are
    visible &= (x >= -0.5) & (x < width - 0.5) & (y >= -0.5) & (y < height - 0.5)
    error = np.linalg.norm(found[:, :2] - truth[:, :2], axis=1) / height_px * 100
    for name, rows in (("body", BODY), ("face", FACE), ("hands", HANDS)):
        figures.errors.setdefault(name, []).extend(error[rows][visible[rows]])
        for kind, mask in (("visible", visible[rows]), ("hidden", ~visible[rows])):
            figures.scores.setdefault(f"{kind} {name}", []).extend(found[rows, 2][mask])
    if visible[FACE].all():
        boxes = [skeleton.face_box(points, height, width) for points in (found, truth)]
        if boxes[0] and boxes[1]:
            figures.face_overlaps.append(overlap(*(np.array(b, float) for b in boxes)))
    for left, right in PAIRS:
        apart = np.linalg.norm(truth[left, :2] - truth[right, :2]) / height_px
        if visible[left] and visible[right] and apart > 0.06:
            figures.swap_chances += 1
            straight = found[[left, right], :2] - truth[[left, right], :2]
            crossed = found[[left, right], :2] - truth[[right, left], :2]
            lengths = [np.linalg.norm(d, axis=1).sum() for d in (straight, crossed)]
            figures.swaps += bool(lengths[1] < lengths[0])


def scenes(kind: str, index: int, side_px: int) -> tuple[ToyGroup, list[float]]:
    """One group of held-out people, and how tall each is in pixels."""
    seed = FIRST_SEED + 10 * index
    rng = np.random.default_rng([seed, 12])
    dance = Dance(seed, turn_after_s=START_S if index % 2 else None)
    sizes = [
        (side_px, side_px),
        (side_px, side_px * 16 // 9 & ~1),
        (side_px * 16 // 9 & ~1, side_px),
    ]
    height, width = sizes[0] if kind.startswith("one") else sizes[index % 3]
    if kind == "one":
        actors = [Actor(person_seed=seed, dance=dance)]
    elif kind == "one, standing":
        actors = [Actor(person_seed=seed, dance=StandingPose())]
    elif kind == "cut by the frame":
        x, y = [(-0.5, 0), (0.5, 0), (0, 0.45), (0.35, 0.25)][index % 4]
        actors = [Actor(person_seed=seed, dance=dance, path=((0, x, y, 1.0),))]
    elif kind in ("two", "three"):
        count = 2 if kind == "two" else 3
        places = np.linspace(-0.3, 0.3, count) * (1.0 if width >= height else 1.1)
        actors = [
            Actor(
                person_seed=seed + i,
                dance=Dance(seed + i, turn_after_s=START_S if i % 2 else None),
                path=((0, float(x), float(rng.uniform(-0.1, 0)), float(rng.uniform(0.5, 0.85))),),
            )
            for i, x in enumerate(places)
        ]
    else:
        actors = []
    camera = "moving" if index % 4 >= 2 else "still"
    group = ToyGroup(
        actors, height=height, width=width, background_seed=seed, camera=camera, camera_seed=seed
    )
    heights_px = [0.86 * min(height, width) * actor.station(0.0)[2] for actor in actors]
    return group, heights_px


def drawn(frame_u8: np.ndarray, found: list[np.ndarray]) -> np.ndarray:
    """The skeletons over the darkened frame, at twice the size."""
    large = cv2.resize(frame_u8, None, fx=2, fy=2, interpolation=cv2.INTER_LINEAR) // 2
    for keypoints in found:
        scaled = keypoints.copy()
        scaled[:, :2] = scaled[:, :2] * 2 + 0.5
        pose = skeleton.draw_pose(scaled, *large.shape[:2])
        pose = cv2.dilate(pose, np.ones((2, 2), np.uint8))
        large = np.where(pose.any(-1, keepdims=True), pose, large)
        for x, y, score in scaled[FACE]:
            if score >= 0.5:
                cv2.circle(large, (round(x), round(y)), 0, (255, 255, 255), -1)
    return large


def sheet(pictures: list[np.ndarray], columns: int) -> np.ndarray:
    """All pictures in cells of one size."""
    cells = []
    for picture in pictures:
        cell = np.zeros((384, 384, 3), np.uint8)
        scale = 384 / max(picture.shape[:2])
        small = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        cell[: small.shape[0], : small.shape[1]] = small[:384, :384]
        cells.append(cell)
    cells += [np.zeros_like(cells[0])] * (-len(cells) % columns)
    rows = [np.hstack(cells[i : i + columns]) for i in range(0, len(cells), columns)]
    return np.vstack(rows)


def speed_ms(models: Models, side_px: int) -> dict[str, float]:
    """Median milliseconds of one frame with one person, one thread."""
    cv2.setNumThreads(1)
    group, _ = scenes("one", 0, side_px)
    frame = group.frame_at(START_S).rgb
    box = models.boxes(frame)[0]
    blank = {
        "detector": np.zeros((1, 3, DETECTOR_SIZE_PX, DETECTOR_SIZE_PX), np.float32),
        "pose": np.zeros((1, 3, POSE_HEIGHT_PX, POSE_WIDTH_PX), np.float32),
    }
    calls = {
        "detector, network": lambda: models.detector.session.run(
            None, {"input": blank["detector"]}
        ),
        "pose, network": lambda: models.pose.session.run(None, {"input": blank["pose"]}),
        "detector, rtmlib": lambda: models.boxes(frame),
        "pose, rtmlib": lambda: models.keypoints(frame, box),
    }
    result = {}
    for name, call in calls.items():
        spent_s = []
        for _ in range(60):
            started_s = time.perf_counter()
            call()
            spent_s.append(time.perf_counter() - started_s)
        result[name] = 1000 * float(np.median(spent_s[10:]))
    return result


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--characters", type=int, default=24)
    parser.add_argument("--frames", type=int, default=10, help="frames of each character")
    parser.add_argument("--side", type=int, default=256, help="shorter side of the frames in px")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sheet", type=Path, help="PNG of skeletons over frames")
    options = parser.parse_args()
    models = Models(options.models)
    kinds = ("one", "one, standing", "cut by the frame", "two", "three", "nobody")
    tables: dict[str, dict[str, float]] = {}
    pictures = []
    for kind in kinds:
        figures = Figures()
        for index in range(options.characters):
            group, heights_px = scenes(kind, index, options.side)
            for row in range(options.frames):
                frame = group.frame_at(START_S + PERIOD_S * row)
                found = count_frame(figures, models, frame, heights_px)
                if row == index % options.frames and kind != "nobody":
                    pictures.append(drawn(frame.rgb, found))
        tables[kind] = figures.table()
    names = list(tables["one"])
    print(f"{options.characters} held-out characters, {options.frames} frames each,", end=" ")
    print(f"shorter side {options.side} px")
    print(f"| figure | {' | '.join(kinds[:-1])} | must | aim |")
    print("|--|" + "--:|" * (len(kinds) + 1))
    for name in names:
        values = [f"{tables[kind].get(name, np.nan):.4g}" for kind in kinds[:-1]]
        limits = [f"{v:g}" for v in TARGETS[name][:2]] if name in TARGETS else ["", ""]
        print(f"| {name} | {' | '.join(values + limits)} |")
    empty = options.characters * options.frames
    wrong = 0
    for index in range(options.characters):
        group, _ = scenes("nobody", index, options.side)
        frames = [group.frame_at(START_S + PERIOD_S * row).rgb for row in range(options.frames)]
        wrong += sum(len(models.boxes(frame)) > 0 for frame in frames)
    print(f"empty rooms with a box: {wrong} of {empty}")
    times_ms = speed_ms(models, options.side)
    print(", ".join(f"{name} {value:.2f} ms" for name, value in times_ms.items()))
    sizes = {path.name: path.stat().st_size for path in sorted(options.models.glob("*.onnx"))}
    print(", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in sizes.items()))
    if options.json:
        record = {"tables": tables, "empty_with_box": wrong, "ms": times_ms, "bytes": sizes}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if options.sheet:
        write_png(options.sheet, sheet(pictures, 8))


if __name__ == "__main__":
    main()
