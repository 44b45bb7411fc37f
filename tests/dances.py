"""Rendered driving videos: people who dance, cross, leave and come back."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from everanimate_cli.encode import VideoWriter
from everanimate_cli.toyworld import Actor, Dance, GroupFrame, ToyGroup, ToyScene

FPS = 12.5

Station = tuple[float, float, float, float]


def write_dance_video(path: Path, *, num_frames: int, height: int = 256, width: int = 256) -> Path:
    """Person 1000001 dancing dance 1000000, as the demo does."""
    dance = Dance(1_000_000, turn_after_s=9.0)
    scene = ToyScene(1_000_001, dance, height=height, width=width)
    with VideoWriter(path, height=height, width=width, rate=FPS, crf=12) as writer:
        for frame in scene.frames(num_frames, rate_fps=FPS):
            writer.write(frame.rgb[None])
    return path


def dancer(number: int, *path: Station) -> Actor:
    """Somebody who faces the camera; `path` has rows (time_s, x, y, scale), see `Actor`."""
    dance = Dance(1_000_000 + number, turn_after_s=99.0)
    return Actor(person_seed=1_000_001 + number, dance=dance, path=path or ((0, 0, 0, 1),))


def absent(path: Sequence[Station], *gaps: tuple[float, float]) -> tuple[Station, ...]:
    """The path with somebody far away from each time up to another, and back at once."""
    rows = list(path)
    for begin_s, end_s in gaps:
        _, x, y, scale = rows[-1]
        rows += [
            (begin_s - 0.01, x, y, scale),
            (begin_s, 9.0, y, scale),
            (end_s - 0.01, 9.0, y, scale),
            (end_s, x, y, scale),
        ]
    return tuple(rows)


def group_frames(
    actors: Sequence[Actor],
    num_frames: int,
    *,
    height: int = 96,
    width: int = 128,
    rate_fps: float = FPS,
    room: int = 25,
) -> list[GroupFrame]:
    """Frames of a group, or of an empty room, with what is exactly in them."""
    group = ToyGroup(actors, height=height, width=width, background_seed=room)
    return list(group.frames(num_frames, rate_fps=rate_fps))


def pixels(frames: Sequence[GroupFrame]) -> np.ndarray:
    """[S, H, W, 3] uint8."""
    return np.stack([frame.rgb for frame in frames])


def write_group_video(path: Path, frames: Sequence[GroupFrame], rate_fps: float = FPS) -> Path:
    """Encode them well."""
    height, width = frames[0].rgb.shape[:2]
    with VideoWriter(path, height=height, width=width, rate=rate_fps, crf=12) as writer:
        writer.write(pixels(frames))
    return path
