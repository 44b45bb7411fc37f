"""Train the embedded person detector and whole-body pose model of the toy world.

    python -m everanimate_cli.toy_pose_training render   --work DIR
    python -m everanimate_cli.toy_pose_training detector --work DIR --minutes 15
    python -m everanimate_cli.toy_pose_training pose     --work DIR --minutes 60
    python -m everanimate_cli.toy_pose_training export   --work DIR

The two files have the interfaces of the real ones, so that the same code runs either pair:
`detector.onnx` is a raw YOLOX export and `pose.onnx` a SimCC export as RTMPose's. They know the toy
world's people and nobody else.

Every stage can be stopped and started again: it goes on from its last checkpoint in DIR, at most a
minute old, and adds to the minutes already spent. `export` may run while a stage is training. On a
GPU everything runs unchanged, with larger batches. Only `export` needs the package `onnx`, which
comes with the extra `test`.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from everanimate_cli import skeleton, toyworld
from everanimate_cli.toy_loop import Loss, LossFunction, TrainingPlan, load_average, train
from everanimate_cli.toyworld import NUM_KEYPOINTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Frame = NDArray[np.uint8]
    Points = NDArray[np.float64]

log = logging.getLogger("everanimate.toy_training")

# --- the rendered set ----------------------------------------------------------------------------

# Longest side of a stored frame, and its share of the scenes: thumbnails, the demo's driving video,
# and pictures whose people the crop shrinks a lot.
FRAME_SIDES_PX = {128: 0.2, 256: 0.7, 512: 0.1}
FRAMES_PER_SCENE = 4
MAX_PEOPLE = 3
LONGEST_S = 100.0


@dataclass(frozen=True)
class FrameSet:
    """Rendered frames of one size, on disk.

    Attributes:
        rgb: [N, side, side, 3] uint8, each frame in the top left corner.
        sizes: [N, 2] int16 height and width of the frames.
        keypoints: [N, MAX_PEOPLE, 133, 3] float32 in frame pixels, far people first.
        boxes: [N, MAX_PEOPLE, 4] float32, not clipped; NaN for nobody.
    """

    rgb: NDArray[np.uint8]
    sizes: NDArray[np.int16]
    keypoints: NDArray[np.float32]
    boxes: NDArray[np.float32]


def _shapes(num_frames: int, side_px: int) -> dict[str, tuple[tuple[int, ...], type]]:
    return {
        "rgb": ((num_frames, side_px, side_px, 3), np.uint8),
        "sizes": ((num_frames, 2), np.int16),
        "keypoints": ((num_frames, MAX_PEOPLE, NUM_KEYPOINTS, 3), np.float32),
        "boxes": ((num_frames, MAX_PEOPLE, 4), np.float32),
    }


def _draw_actor(rng: np.random.Generator, seed: int, *, alone: bool) -> toyworld.Actor:
    """Somebody who walks through the picture, or stands where a `ToyScene` has its person."""
    kind = rng.random()
    dance: toyworld.Dance
    if kind < 0.08:
        dance = toyworld.StandingPose()
    else:  # half of the dances keep turning, so that backs are as common as fronts
        dance = toyworld.Dance(seed, turn_after_s=0.0 if kind < 0.54 else None)
    if alone and rng.random() < 0.5:
        return toyworld.Actor(person_seed=seed, dance=dance)
    stations = []
    for time_s in (0.0, LONGEST_S):
        reach = 0.6 if rng.random() < 0.35 else 0.35  # the far ones are cut by the frame
        scale = rng.uniform(0.4, 1.25 if alone else 1.0)
        # Small people stand anywhere, large ones keep their feet near the bottom or below it.
        y = rng.uniform(-0.5, 0.15) * (1.1 - min(scale, 1.0)) + (rng.random() < 0.15) * 0.4
        stations.append((time_s, float(rng.uniform(-reach, reach)), float(y), float(scale)))
    return toyworld.Actor(person_seed=seed, dance=dance, path=tuple(stations))


def _render_scene(task: tuple[int, int]) -> dict[str, NDArray[Any]]:
    """The frames of one scene with all labels; a scene follows from its seed and size."""
    seed, side_px = task
    cv2.setNumThreads(1)
    rng = np.random.default_rng([seed, side_px, 11])
    num_people = int(rng.choice(MAX_PEOPLE + 1, p=[0.06, 0.54, 0.28, 0.12]))
    short_px = round(side_px * float(rng.choice([1.0, 1.0, 0.5625, 0.667, 0.75])))
    height, width = (side_px, short_px) if rng.random() < 0.5 else (short_px, side_px)
    actors = [
        _draw_actor(rng, MAX_PEOPLE * seed + index, alone=num_people == 1)
        for index in range(num_people)
    ]
    camera: toyworld.Camera = "moving" if rng.random() < 0.4 else "still"
    group = toyworld.ToyGroup(
        actors,
        height=height,
        width=width,
        background_seed=seed,
        camera=camera,
        camera_seed=seed,
    )
    result: dict[str, NDArray[Any]] = {
        name: np.zeros(shape, dtype)
        for name, (shape, dtype) in _shapes(FRAMES_PER_SCENE, side_px).items()
    }
    result["boxes"][:] = np.nan
    for row in range(FRAMES_PER_SCENE):
        time_s = float(rng.uniform(0, LONGEST_S))
        frame = group.frame_at(time_s)
        result["rgb"][row, :height, :width] = _worsened_source(rng, frame.rgb)
        result["sizes"][row] = height, width
        order = sorted(range(num_people), key=lambda i: actors[i].station(time_s)[2])
        for place, index in enumerate(order):
            result["keypoints"][row, place] = frame.figures[index].keypoints
            result["boxes"][row, place] = frame.figures[index].box
    return result


def _worsened_source(rng: np.random.Generator, frame_u8: Frame) -> Frame:
    """Often the frame itself, sometimes soft or compressed as videos are."""
    if rng.random() < 0.2:
        sigma = rng.uniform(0.4, 1.0) * max(frame_u8.shape[:2]) / 256
        frame_u8 = np.asarray(cv2.GaussianBlur(frame_u8, (0, 0), sigma), np.uint8)
    if rng.random() < 0.4:
        frame_u8 = _compressed(frame_u8, int(rng.integers(35, 96)))
    return frame_u8


def _compressed(frame_u8: Frame, quality: int) -> Frame:
    """Through JPEG, with the coarse colours of 4:2:0 video."""
    _, code = cv2.imencode(".jpg", frame_u8, (cv2.IMWRITE_JPEG_QUALITY, quality))
    return np.asarray(cv2.imdecode(code, cv2.IMREAD_COLOR), np.uint8)


def _rendered_scenes(
    tasks: list[tuple[int, int]], processes: int
) -> Iterator[dict[str, NDArray[Any]]]:
    """All scenes in order."""
    if processes == 1:
        yield from map(_render_scene, tasks)
    else:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            yield from pool.imap(_render_scene, tasks, chunksize=8)


def render(work: Path, num_scenes: int, processes: int) -> None:
    """Draw the training frames into memory-mapped arrays `frames_SIDE_NAME.npy`."""
    work.mkdir(parents=True, exist_ok=True)
    started_s = time.monotonic()
    for side_px, share in FRAME_SIDES_PX.items():
        count = max(1, round(num_scenes * share))
        arrays = {
            name: np.lib.format.open_memmap(
                work / f"frames_{side_px}_{name}.partial.npy", mode="w+", dtype=dtype, shape=shape
            )
            for name, (shape, dtype) in _shapes(count * FRAMES_PER_SCENE, side_px).items()
        }
        tasks = [(seed, side_px) for seed in range(count)]
        for index, scene in enumerate(_rendered_scenes(tasks, processes)):
            rows = slice(index * FRAMES_PER_SCENE, (index + 1) * FRAMES_PER_SCENE)
            for name, values in scene.items():
                arrays[name][rows] = values
        for name, array in arrays.items():
            array.flush()
            partial = work / f"frames_{side_px}_{name}.partial.npy"
            partial.replace(work / f"frames_{side_px}_{name}.npy")
        spent_s = time.monotonic() - started_s
        log.info("rendered %d scenes of %d px, %.0f s", count, side_px, spent_s)


def open_frames(work: Path) -> list[FrameSet]:
    """The rendered sets, read from disk as needed."""
    return [
        FrameSet(
            **{
                name: np.load(work / f"frames_{side_px}_{name}.npy", mmap_mode="r")
                for name in _shapes(1, side_px)
            }
        )
        for side_px in FRAME_SIDES_PX
    ]


def _draw_frame(rng: np.random.Generator, sets: list[FrameSet]) -> tuple[FrameSet, int]:
    """A random set and row, all rows alike."""
    lengths = [len(frames.rgb) for frames in sets]
    index = int(rng.integers(sum(lengths)))
    for frames, length in zip(sets, lengths, strict=True):
        if index < length:
            return frames, index
        index -= length
    raise AssertionError("the lengths do not add up")


def _clipped(boxes: Points, height: int, width: int) -> Points:
    """[..., 4] boxes cut at the frame's edges."""
    return np.clip(boxes, 0, (width, height, width, height))


def _area(boxes: Points) -> Points:
    """[...] areas of [..., 4] boxes; 0 for empty ones."""
    sides = np.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    return np.asarray(sides[..., 0] * sides[..., 1])


def _covered_share(boxes: Points, index: int) -> float:
    """How much of a person's box lies behind the boxes of those in front, at most one of them."""
    own = boxes[index]
    area = float(_area(own))
    shares = [0.0]
    for other in boxes[index + 1 :]:
        both = np.concatenate([np.maximum(own[:2], other[:2]), np.minimum(own[2:], other[2:])])
        shares.append(float(_area(both)) / max(area, 1e-6))
    return max(shares)


def _worsened_input(rng: np.random.Generator, picture_u8: Frame) -> Frame:
    """Other light and colours, sometimes blur, noise or compression, at the network's own size."""
    if rng.random() < 0.8:
        gain = rng.uniform(0.75, 1.25) * rng.uniform(0.92, 1.08, 3)
        offset = rng.uniform(-20, 20) + rng.uniform(-6, 6, 3)
        levels = np.arange(256)[:, None] * gain + offset
        table = np.clip(levels, 0, 255).astype(np.uint8)[None]
        picture_u8 = np.asarray(cv2.LUT(picture_u8, table), np.uint8)
    if rng.random() < 0.25:
        picture_u8 = np.asarray(
            cv2.GaussianBlur(picture_u8, (0, 0), rng.uniform(0.3, 0.9)), np.uint8
        )
    if rng.random() < 0.25:
        noise = rng.standard_normal(picture_u8.shape, np.float32) * rng.uniform(1, 9)
        picture_u8 = np.clip(picture_u8 + noise, 0, 255).astype(np.uint8)
    if rng.random() < 0.15:
        picture_u8 = _compressed(picture_u8, int(rng.integers(45, 96)))
    return picture_u8


# --- networks ------------------------------------------------------------------------------------


class _Convolution(nn.Sequential):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class _Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _Convolution(channels, channels)
        self.second = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, h, w] to the same shape."""
        return functional.relu(features + self.norm(self.second(self.first(features))))


def _stage(inputs: int, outputs: int, num_blocks: int) -> nn.Sequential:
    """Half the size, then residual blocks."""
    blocks = [_Residual(outputs) for _ in range(num_blocks)]
    return nn.Sequential(_Convolution(inputs, outputs, stride=2), *blocks)


DETECTOR_SIZE_PX = 160
STRIDES = (8, 16, 32)  # fixed by the YOLOX export


class DetectorNetwork(nn.Module):
    """Three levels of features, one shared head: a small YOLOX."""

    def __init__(self) -> None:
        super().__init__()
        width = 48
        self.stem = nn.Sequential(_Convolution(3, 16, stride=2), _stage(16, 32, 1))
        self.down_8, self.down_16 = _stage(32, 64, 1), _stage(64, 80, 1)
        self.down_32 = _stage(80, 96, 1)
        self.side_8, self.side_16 = nn.Conv2d(64, width, 1), nn.Conv2d(80, width, 1)
        self.side_32 = nn.Conv2d(96, width, 1)
        self.heads = nn.ModuleList(
            nn.Sequential(_Convolution(width, width), _Convolution(width, width)) for _ in STRIDES
        )
        predict = [nn.Conv2d(width, 6, 1) for _ in STRIDES]
        self.predict = nn.ModuleList(predict)
        with torch.no_grad():
            for layer in predict:
                layer.weight.mul_(0.1)
                layer.bias = nn.Parameter(torch.tensor([0.5, 0.5, 1.0, 1.0, -4.0, 0.0]))

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] BGR 0..255 to [B, N, 6]: cx, cy, log w, log h in cells, and two logits."""
        features_8: Tensor = self.down_8(self.stem(pixels / 128 - 1))
        features_16: Tensor = self.down_16(features_8)
        level_32 = self.side_32(self.down_32(features_16))
        level_16 = self.side_16(features_16) + functional.interpolate(level_32, scale_factor=2.0)
        level_8 = self.side_8(features_8) + functional.interpolate(level_16, scale_factor=2.0)
        rows = []
        for level, head, predict in zip(
            (level_8, level_16, level_32), self.heads, self.predict, strict=True
        ):
            rows.append(predict(head(level)).flatten(2).transpose(1, 2))
        return torch.cat(rows, 1)


POSE_HEIGHT_PX, POSE_WIDTH_PX = 128, 96
BINS_PER_PX = 2  # SimCC split ratio
PIXEL_MEAN = (123.675, 116.28, 103.53)  # RGB, as RTMPose
PIXEL_STD = (58.395, 57.12, 57.375)
_BOX_PADDING = 1.25
_POSE_STRIDE = 8
_TOKEN = 160


class PoseNetwork(nn.Module):
    """One map per keypoint, read as a token, from which position and visibility follow."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_Convolution(3, 24, stride=2), _stage(24, 40, 1))
        self.down_8, self.down_16 = _stage(40, 80, 2), _stage(80, 128, 2)
        self.side = nn.Conv2d(128, 80, 1)
        self.merge = nn.Sequential(_Convolution(80, 112), nn.Conv2d(112, NUM_KEYPOINTS, 1))
        cells = (POSE_HEIGHT_PX // _POSE_STRIDE) * (POSE_WIDTH_PX // _POSE_STRIDE)
        self.read = nn.Linear(cells, _TOKEN)
        self.context = nn.Linear(128, _TOKEN)
        self.name = nn.Parameter(torch.zeros(NUM_KEYPOINTS, _TOKEN))
        self.think = nn.Sequential(
            nn.LayerNorm(_TOKEN), nn.Linear(_TOKEN, _TOKEN), nn.ReLU(), nn.Linear(_TOKEN, _TOKEN)
        )
        self.norm = nn.LayerNorm(_TOKEN)
        self.to_x = nn.Linear(_TOKEN, BINS_PER_PX * POSE_WIDTH_PX)
        self.to_y = nn.Linear(_TOKEN, BINS_PER_PX * POSE_HEIGHT_PX)
        self.to_visible = nn.Linear(_TOKEN, 1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, 3, H, W] to logits over x [B, 133, 2W], y [B, 133, 2H] and of visibility [B, 133]."""
        features_8 = self.down_8(self.stem(pixels))
        features_16 = self.down_16(features_8)
        raised = functional.interpolate(self.side(features_16), scale_factor=2.0)
        maps = self.merge(functional.relu(features_8 + raised))  # [B, 133, H/8, W/8]
        tokens = self.read(maps.flatten(2)) + self.name
        tokens = tokens + self.context(features_16.mean((2, 3)))[:, None]
        tokens = tokens + self.think(tokens)
        tokens = self.norm(tokens)
        return self.to_x(tokens), self.to_y(tokens), self.to_visible(tokens)[..., 0]


# --- stage: detector -----------------------------------------------------------------------------

DETECTOR_BATCH = 24
# Longest side in network pixels that a level is responsible for; where two levels meet both are.
_LEVEL_SIDES_PX = ((0, 44), (32, 90), (70, 10_000))
# How far from the middle of a person, in cells, a cell sees them, may see them, learns their box.
_PERSON_CELLS, _EITHER_CELLS, _PLACED_CELLS = 1.0, 1.4, 2.0
_UNSEEN_PX = 24.0  # around the middle of somebody who is hardly seen, nothing is asked
_TINY_SHARE, _COVERED_SHARE = 0.15, 0.75  # less to see than that: neither a person nor background


def letterbox(frame_u8: Frame, size_px: int) -> tuple[Frame, float]:
    """The frame in the corner of a grey square, as rtmlib's YOLOX puts it, and its ratio."""
    height, width = frame_u8.shape[:2]
    ratio = min(size_px / height, size_px / width)
    size = (int(width * ratio), int(height * ratio))
    result = np.full((size_px, size_px, 3), 114, np.uint8)
    result[: size[1], : size[0]] = cv2.resize(frame_u8, size, interpolation=cv2.INTER_LINEAR)
    return result, ratio


def _detector_sample(rng: np.random.Generator, sets: list[FrameSet]) -> tuple[Frame, Points]:
    """[S, S, 3] BGR and [MAX_PEOPLE, 5] box in network pixels, 1 = person, 0 = ignore, NaN = none.

    A person who is nearly covered or nearly outside is to be ignored.
    """
    frames, row = _draw_frame(rng, sets)
    height, width = (int(v) for v in frames.sizes[row])
    picture, ratio = letterbox(frames.rgb[row, :height, :width], DETECTOR_SIZE_PX)
    filled = picture[: int(height * ratio), : int(width * ratio)]
    filled[:] = _worsened_input(rng, np.ascontiguousarray(filled))
    boxes = frames.boxes[row].astype(np.float64)
    clipped = _clipped(boxes, height, width)
    labels = np.full((MAX_PEOPLE, 5), np.nan)
    for index, box in enumerate(clipped):
        share = float(_area(box)) / max(float(_area(boxes[index])), 1e-6)
        if np.isnan(box).any() or share <= 0:
            continue
        seen = share > _TINY_SHARE and _covered_share(clipped, index) < _COVERED_SHARE
        labels[index] = (*(box * ratio), float(seen))
    return np.ascontiguousarray(picture[..., ::-1]), labels


def _cells() -> tuple[Tensor, Tensor, Tensor]:
    """[N, 2] corners of all cells in cells, [N] strides, [N] levels, in the order of the export."""
    corners, strides, levels = [], [], []
    for level, stride in enumerate(STRIDES):
        count = DETECTOR_SIZE_PX // stride
        y, x = torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij")
        corners.append(torch.stack([x, y], -1).view(-1, 2).float())
        strides.append(torch.full((count * count,), float(stride)))
        levels.append(torch.full((count * count,), level))
    return torch.cat(corners), torch.cat(strides), torch.cat(levels)


def _detector_targets(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which cell is responsible for whom.

    Args:
        labels: [B, MAX_PEOPLE, 5] as `_detector_sample` makes them.

    Returns:
        [B, N] 1 = person, 0 = background, -1 = either; [B, N] whether the cell learns a box, which
        more cells do than see a person, so that a neighbour that answers all the same answers
        right; [B, N, 4] that box.
    """
    corners, strides, levels = (part.to(labels.device) for part in _cells())
    centres = (corners + 0.5) * strides[:, None]  # [N, 2]
    boxes = labels[..., :4]
    exists = ~labels.isnan().any(-1, keepdim=True)  # [B, P, 1]
    seen = exists & (labels[..., 4:] > 0)
    middle = (boxes[..., :2] + boxes[..., 2:]) / 2
    longest = (boxes[..., 2:] - boxes[..., :2]).amax(-1)  # [B, P]
    away = (centres[None, None] - middle[:, :, None]).abs().amax(-1) / strides  # [B, P, N]
    low, high = (torch.tensor(v, device=labels.device) for v in zip(*_LEVEL_SIDES_PX, strict=True))
    fits = (longest[..., None] > low[levels]) & (longest[..., None] <= high[levels])
    placed = seen & fits & (away < _PLACED_CELLS)
    positive = seen & fits & (away < _PERSON_CELLS)
    either = seen & fits & (away < _EITHER_CELLS)
    either |= exists & ~seen & (away * strides < _UNSEEN_PX)
    nearest = torch.where(placed, away, torch.inf).argmin(1)  # [B, N]
    states = torch.where(positive.any(1), 1, torch.where(either.any(1), -1, 0))
    chosen = boxes.gather(1, nearest[..., None].expand(-1, -1, 4))
    has_box = placed.any(1)
    return states, has_box, torch.where(has_box[..., None], chosen, 0.0)


def _decoded(rows: Tensor) -> Tensor:
    """[B, N, 4] raw centres and log sizes in cells to corners in pixels."""
    corners, strides, _ = (part.to(rows.device) for part in _cells())
    middle = (rows[..., :2] + corners) * strides[:, None]
    half = rows[..., 2:4].clamp(-3, 5).exp() * strides[:, None] / 2
    return torch.cat([middle - half, middle + half], -1)


def _overlaps(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU of [..., 4] boxes."""

    def area(low: Tensor, high: Tensor) -> Tensor:
        return (high - low).clamp(min=0).prod(-1)

    both = area(
        torch.maximum(first[..., :2], second[..., :2]),
        torch.minimum(first[..., 2:], second[..., 2:]),
    )
    either = area(first[..., :2], first[..., 2:]) + area(second[..., :2], second[..., 2:]) - both
    hull = area(
        torch.minimum(first[..., :2], second[..., :2]),
        torch.maximum(first[..., 2:], second[..., 2:]),
    )
    overlap = both / either.clamp(min=1e-6)
    return overlap, overlap - (hull - either) / hull.clamp(min=1e-6)


def _detector_loss(work: Path, device: torch.device) -> LossFunction:
    sets = open_frames(work)
    batch = DETECTOR_BATCH * (8 if device.type == "cuda" else 1)

    def loss(model: nn.Module, rng: np.random.Generator) -> Loss:
        samples = [_detector_sample(rng, sets) for _ in range(batch)]
        pixels = _to_batch([picture for picture, _ in samples], device)
        labels = torch.from_numpy(np.stack([label for _, label in samples])).float().to(device)
        rows = model(pixels).float()
        states, has_box, boxes = _detector_targets(labels)
        overlap, generalised = _overlaps(_decoded(rows)[has_box], boxes[has_box])
        quality = ((overlap.detach() - 0.3) / 0.4).clamp(0, 1)
        cross_entropy = functional.binary_cross_entropy_with_logits
        found = cross_entropy(rows[..., 4], (states == 1).float(), reduction="none")
        found = (found * (states >= 0)).sum() / (states == 1).sum().clamp(min=1)
        count = has_box.sum().clamp(min=1)
        classed = cross_entropy(rows[..., 5][has_box], quality, reduction="sum") / count
        placed = (1 - generalised).sum() / count
        total = found + 0.3 * classed + 2 * placed
        return {"loss": total, "object": found.detach(), "iou": overlap.detach().mean()}

    return loss


def train_detector(work: Path, minutes: float, processes: int) -> None:
    """Stage `detector`."""
    plan = TrainingPlan(name="detector", minutes=minutes, processes=processes, adam_lr=2e-3)
    train(work, plan, DetectorNetwork, _detector_loss, use_adam=_is_edge)


def _is_edge(name: str) -> bool:
    """First and last layers learn better with AdamW."""
    return name.startswith(("stem.0.", "predict.", "to_", "name"))


def _to_batch(pictures_u8: list[Frame], device: torch.device) -> Tensor:
    """[B, 3, H, W] float32 0..255."""
    return torch.from_numpy(np.stack(pictures_u8)).to(device).permute(0, 3, 1, 2).float()


# --- stage: pose ---------------------------------------------------------------------------------

POSE_BATCH = 32
_TARGET_SIGMA_BINS = 2.0
# What a group of points weighs in the loss, all of its points together.
_GROUPS = ((slice(0, 23), 1.0), (slice(23, 91), 0.4), (slice(91, 133), 0.4))
_GUESS_WEIGHT = 0.25


def crop_matrix(box: Points) -> Points:
    """[2, 3] affine map from the frame to the pose network's input, as RTMPose crops a box."""
    centre = (box[:2] + box[2:]) / 2
    width, height = (box[2:] - box[:2]) * _BOX_PADDING
    width = max(width, height * POSE_WIDTH_PX / POSE_HEIGHT_PX)
    zoom = POSE_WIDTH_PX / width
    shift = np.array([POSE_WIDTH_PX, POSE_HEIGHT_PX]) / 2 - zoom * centre
    return np.array([[zoom, 0.0, shift[0]], [0.0, zoom, shift[1]]])


def cut_crop(frame_u8: Frame, matrix: Points) -> Frame:
    """[H, W, 3] the pose network's input, black outside the frame."""
    size = (POSE_WIDTH_PX, POSE_HEIGHT_PX)
    return np.asarray(cv2.warpAffine(frame_u8, matrix, size, flags=cv2.INTER_LINEAR), np.uint8)


def _shaken_box(
    rng: np.random.Generator, box: Points, keypoints: Points, height: int, width: int
) -> Points:
    """A box as a detector or a tracker may give it, never quite right."""
    inside = keypoints[:23, :2][_is_inside(keypoints[:23], height, width)]
    if rng.random() < 0.3 and len(inside) > 5:  # a tracker's: the extent of body and feet
        box = np.concatenate([inside.min(0), inside.max(0)])
        grow = (box[2:] - box[:2]) * rng.uniform(0.05, 0.16)
        box = np.concatenate([box[:2] - grow, box[2:] + grow])
    sides = np.tile(box[2:] - box[:2], 2)
    box = box + sides * rng.normal(0, 0.025, 4)
    if rng.random() < 0.1:  # partly cut
        side = int(rng.integers(4))
        box[side] += (1 if side < 2 else -1) * sides[side] * rng.uniform(0.05, 0.3)
    if rng.random() < 0.5:
        middle, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
        middle = middle + half * rng.normal(0, 0.08, 2)
        half = half * rng.uniform(0.85, 1.3)
        box = np.concatenate([middle - half, middle + half])
    return np.asarray(box)


def _is_inside(points: Points, height: int, width: int) -> NDArray[np.bool_]:
    """[n] whether (x, y) lie on a picture; pixel centres have whole coordinates."""
    x, y = points[:, 0], points[:, 1]
    return (x >= -0.5) & (x < width - 0.5) & (y >= -0.5) & (y < height - 0.5)


def _pose_sample(rng: np.random.Generator, sets: list[FrameSet]) -> tuple[Frame, Points]:
    """A crop with its labels.

    Returns:
        [H, W, 3] RGB and [133, 4]: x and y in input pixels, visibility 0 or 1, and weight of the
        position in the loss. Differs from the toy world: hands are visible however small they are,
        as a crop does not tell how large the picture was.
    """
    while True:
        frames, row = _draw_frame(rng, sets)
        height, width = (int(v) for v in frames.sizes[row])
        boxes = frames.boxes[row].astype(np.float64)
        clipped = _clipped(boxes, height, width)
        index = int(rng.integers(MAX_PEOPLE))
        area = float(_area(boxes[index]))  # NaN for nobody
        if not float(_area(clipped[index])) > 0.3 * area:
            continue
        if _covered_share(clipped, index) < 0.5:
            break
    keypoints = frames.keypoints[row, index].astype(np.float64)
    matrix = crop_matrix(_shaken_box(rng, clipped[index], keypoints, height, width))
    crop = cut_crop(frames.rgb[row, :height, :width], matrix)
    labels = np.empty((NUM_KEYPOINTS, 4))
    labels[:, :2] = keypoints[:, :2] @ matrix[:, :2].T + matrix[:, 2]
    in_crop = _is_inside(labels, POSE_HEIGHT_PX, POSE_WIDTH_PX)
    visible = keypoints[:, 2] > 0.5
    visible[skeleton.HAND_ROWS[0].start :] = True
    labels[:, 2] = visible & in_crop & _is_inside(keypoints, height, width)
    # The place of a point that is hidden or outside the frame is a guess, but should be a good one.
    labels[:, 3] = np.where(labels[:, 2] > 0, 1.0, _GUESS_WEIGHT * in_crop)
    return _worsened_input(rng, crop), labels


def _simcc_loss(logits: Tensor, places_px: Tensor) -> Tensor:
    """[B, 133] cross entropy of bins [B, 133, n] against a bell around the true place."""
    bins = torch.arange(logits.shape[-1], device=logits.device)
    distance = bins - places_px[..., None] * BINS_PER_PX
    target = torch.softmax(-0.5 * (distance / _TARGET_SIGMA_BINS).square(), -1)
    return -(target * torch.log_softmax(logits.float(), -1)).sum(-1)


def _grouped(values: Tensor) -> Tensor:
    """The weighted sum over groups of points of a mean over [B, 133]."""
    return sum((weight * values[:, rows].mean() for rows, weight in _GROUPS), torch.zeros(()))


def _pose_loss(work: Path, device: torch.device) -> LossFunction:
    sets = open_frames(work)
    batch = POSE_BATCH * (8 if device.type == "cuda" else 1)

    def loss(model: nn.Module, rng: np.random.Generator) -> Loss:
        samples = [_pose_sample(rng, sets) for _ in range(batch)]
        pixels = normalised(_to_batch([picture for picture, _ in samples], device))
        labels = torch.from_numpy(np.stack([label for _, label in samples])).float().to(device)
        x_logits, y_logits, visible_logits = model(pixels)
        places, visible = labels[..., :2], labels[..., 2]
        placed = _simcc_loss(x_logits, places[..., 0]) + _simcc_loss(y_logits, places[..., 1])
        seen = functional.binary_cross_entropy_with_logits(
            visible_logits.float(), visible, reduction="none"
        )
        total = _grouped(placed * labels[..., 3]) + 2 * _grouped(seen)
        found = torch.stack([x_logits.argmax(-1), y_logits.argmax(-1)], -1) / BINS_PER_PX
        error = (found - places).norm(dim=-1)[:, :23]
        body = visible[:, :23] > 0
        return {
            "loss": total,
            "body_px": error[body].median(),
            "body_mean_px": error[body].mean(),
            "seen": _grouped(seen.detach()),
        }

    return loss


def normalised(pixels: Tensor) -> Tensor:
    """[B, 3, H, W] RGB 0..255 to RTMPose's range."""
    mean, std = (
        torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD)
    )
    return (pixels - mean) / std


def train_pose(work: Path, minutes: float, processes: int) -> None:
    """Stage `pose`."""
    plan = TrainingPlan(name="pose", minutes=minutes, processes=processes, adam_lr=2e-3)
    train(work, plan, PoseNetwork, _pose_loss, use_adam=_is_edge)


# --- stage: export -------------------------------------------------------------------------------

MAX_EXPORT_BYTES = 4_000_000
_CALIBRATION_BATCHES = 30
_OPSET = 17
_SMALLEST_HALF = 64  # numbers; what is smaller is not worth a cast


class _DetectorExport(nn.Module):
    """Logits become probabilities."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        """[1, 3, S, S] to [1, N, 6] as a raw YOLOX export gives it."""
        rows = self.network(pixels)
        return torch.cat([rows[..., :4], rows[..., 4:].sigmoid()], -1)


class _PoseExport(nn.Module):
    """The highest bin is where the point is, and its value how visible."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] to [B, 133, 2W] and [B, 133, 2H], all values within 0..1."""
        x_logits, y_logits, visible_logits = self.network(pixels)
        visible = visible_logits.sigmoid()[..., None]
        simcc_x = (x_logits - x_logits.amax(-1, keepdim=True)).exp() * visible
        simcc_y = (y_logits - y_logits.amax(-1, keepdim=True)).exp() * visible
        return simcc_x, simcc_y


def _calibrated(work: Path, name: str, network: nn.Module, make_loss: Any) -> nn.Module:
    """The averaged weights with the batch statistics that belong to them."""
    network = load_average(work, name, network)
    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain mean
    loss_of = make_loss(work, torch.device("cpu"))
    rng = np.random.default_rng(8)
    with torch.no_grad():
        for _ in range(_CALIBRATION_BATCHES):
            loss_of(network, rng)
    return network.eval()


def _with_half_weights(path: Path) -> None:
    """Store the weights of an ONNX file in half precision; they are cast when it is loaded."""
    import onnx  # noqa: PLC0415  (only here; the extra `test` brings it)
    from onnx import TensorProto, helper, numpy_helper  # noqa: PLC0415

    model = onnx.load(path)
    graph = model.graph
    casts = []
    for tensor in graph.initializer:
        name, values = tensor.name, numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.size < _SMALLEST_HALF:
            continue
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}_half"))
        casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    for node in reversed(casts):
        graph.node.insert(0, node)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def export(work: Path, output: Path) -> None:
    """Stage `export`: write those of the two ONNX files that have been trained."""
    torch.manual_seed(0)
    output.mkdir(parents=True, exist_ok=True)
    jobs = (
        ("detector", DetectorNetwork, _detector_loss, _DetectorExport, ("output",)),
        ("pose", PoseNetwork, _pose_loss, _PoseExport, ("simcc_x", "simcc_y")),
    )
    sides = {
        "detector": (DETECTOR_SIZE_PX, DETECTOR_SIZE_PX),
        "pose": (POSE_HEIGHT_PX, POSE_WIDTH_PX),
    }
    for name, build, make_loss, wrap, outputs in jobs:
        if not (work / f"{name}.checkpoint.pt").exists():
            log.info("%s is not trained yet", name)
            continue
        network = wrap(_calibrated(work, name, build(), make_loss))
        path, temporary = output / f"{name}.onnx", output / f"{name}.partial.onnx"
        names = ("input", *outputs)
        with warnings.catch_warnings():
            # The exporter that replaces this one needs another package, onnxscript.
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.onnx.export(
                network.eval(),
                (torch.zeros(1, 3, *sides[name]),),
                str(temporary),
                input_names=["input"],
                output_names=list(outputs),
                dynamic_axes={key: {0: "batch"} for key in names} if name == "pose" else None,
                opset_version=_OPSET,
                dynamo=False,
            )
        _with_half_weights(temporary)
        temporary.replace(path)
        log.info("%s: %.2f MB", path, path.stat().st_size / 1e6)
    size = sum(path.stat().st_size for path in output.glob("*.onnx"))
    if size > MAX_EXPORT_BYTES:
        raise SystemExit(f"the models have {size} bytes, more than {MAX_EXPORT_BYTES}")


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("stage", choices=["render", "detector", "pose", "export"])
    parser.add_argument("--work", type=Path, required=True, help="folder of data and checkpoints")
    parser.add_argument("--minutes", type=float, default=30.0, help="wall time of the stage in all")
    parser.add_argument("--scenes", type=int, default=7000, help="scenes to render")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--output", type=Path, help="folder of the exported models, instead of the embedded ones"
    )
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if options.stage == "render":
        render(options.work, options.scenes, options.processes)
    elif options.stage == "detector":
        train_detector(options.work, options.minutes, options.processes)
    elif options.stage == "pose":
        train_pose(options.work, options.minutes, options.processes)
    elif options.stage == "export":
        export(options.work, options.output or Path(__file__).parent / "toy_pose")


if __name__ == "__main__":
    main()
