"""What tests of whole runs share: a character, a dance with sound, how to look at results."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from media import (
    Frames,
    decode_video,
    frame_numbers,
    numbered_frames,
    tone_bursts,
    write_media,
)

INPUTS = ("anna.png", "back.png", "dance", "tiny")

DANCE_FRAMES = 30
DANCE_FPS = 25


@dataclass(frozen=True)
class Outcome:
    """What a call of the program leaves behind."""

    code: int
    out: str
    err: str


Program = Callable[..., Outcome]
Animate = Callable[..., Outcome]


def picture(height: int, width: int, phase: float) -> Frames:
    """A colourful picture [H, W, 3]."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 9 + phase), np.cos(y / 7 - phase), np.sin((x + y) / 11 + 2 * phase)]
    return (127 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)


def dance_frames(num_frames: int, height: int = 48, width: int = 64) -> Frames:
    """Frames [S, H, W, 3] that tell their number, 0 to 29, by their brightness.

    In steps of 8, which survive being encoded twice.
    """
    return numbered_frames(2 * num_frames, height, width)[::2]


def dance_numbers(frames: Frames) -> list[int]:
    """The numbers that `dance_frames` gave to frames [S, H, W, 3]."""
    return [round(number / 2) for number in frame_numbers(frames)]


def write_dance(folder: Path, num_frames: int = DANCE_FRAMES) -> Path:
    """A driving folder, as extracting the pose from a video with sound makes it."""
    folder.mkdir()
    frames = dance_frames(num_frames)
    write_media(folder / "pose.mp4", frames, rate=DANCE_FPS, options={"crf": "1"})
    write_media(folder / "face.mp4", dance_frames(num_frames, 32, 32), rate=DANCE_FPS)
    sound = tone_bursts(num_frames / DANCE_FPS, 44100)
    video = write_media(folder / "driving.mp4", frames, rate=DANCE_FPS, sound=sound)
    record = {
        "format_version": 1,
        "source": video.name,
        "source_sha256": hashlib.sha256(video.read_bytes()).hexdigest(),
        "start_s": 0.0,
    }
    (folder / "extract.json").write_text(json.dumps(record))
    return folder


def made_files(folder: Path) -> list[str]:
    """Names of all files and folders but the inputs."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.relative_to(folder).parts[0] not in INPUTS
    )


def frames_of(name: str) -> Frames:
    return decode_video(Path(name))[1]
