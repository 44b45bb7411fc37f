"""What the tests of whole runs share: a character, a dance with sound, and how to look at results."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from media import Frames, decode_video, numbered_frames, tone_bursts, write_media

INPUTS = ("anna.png", "back.png", "dance", "tiny")

# The dance: every frame tells its number by its brightness, see `media.frame_numbers`.
DANCE_FRAMES = 30
DANCE_FPS = 25


@dataclass(frozen=True)
class Outcome:
    """What a call of the program leaves behind."""

    code: int
    out: str
    err: str


Animate = Callable[..., Outcome]


def picture(height: int, width: int, phase: float) -> Frames:
    """A colourful picture [H, W, 3]."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 9 + phase), np.cos(y / 7 - phase), np.sin((x + y) / 11 + 2 * phase)]
    return (127 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)


def write_dance(folder: Path, num_frames: int = DANCE_FRAMES) -> Path:
    """A driving folder, as extracting the pose from a video with sound makes it."""
    folder.mkdir()
    frames = numbered_frames(num_frames, height=48, width=64)
    write_media(folder / "pose.mp4", frames, rate=DANCE_FPS, options={"crf": "1"})
    write_media(folder / "face.mp4", numbered_frames(num_frames)[:, :, :32], rate=DANCE_FPS)
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
