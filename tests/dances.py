"""Rendered driving videos: people who dance, cross, leave and come back."""

from pathlib import Path

from everanimate_cli.toyworld import Dance, ToyScene
from everanimate_cli.video import VideoWriter

FPS = 12.5


def write_dance_video(
    path: Path, *, num_frames: int, height: int = 256, width: int = 256, turn_after_s: float = 9.0
) -> Path:
    """Person 1000001 dancing dance 1000000, as the demo does."""
    dance = Dance(1_000_000, turn_after_s=turn_after_s)
    scene = ToyScene(1_000_001, dance, height=height, width=width)
    with VideoWriter(path, height=height, width=width, rate=FPS, crf=12) as writer:
        for frame in scene.frames(num_frames, rate_fps=FPS):
            writer.write(frame.rgb[None])
    return path
