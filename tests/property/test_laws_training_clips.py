"""Laws of clips: pictures, poses and faces of a frame belong together, whatever is asked for."""

import hashlib
import json
from fractions import Fraction
from math import ceil, floor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from media import frame_numbers, numbered_frames, write_media

from everanimate_cli.settings import HUB_PRESET
from everanimate_cli.train_settings import TrainSettings, resolve_training
from everanimate_cli.training_clips import TrainingClip, needed_frames, open_clips

VIDEO_FPS = 10
NUM_FRAMES = 60
EXTRACTIONS = {  # name: (first frame of the video, step)
    "whole": (0, 1),
    "late": (13, 1),
    "half_rate": (20, 2),
}


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    frames = numbered_frames(NUM_FRAMES, 16, 16)
    video = write_media(folder / "a.mp4", frames, rate=VIDEO_FPS)
    for name, (first, step) in EXTRACTIONS.items():
        (folder / name).mkdir()
        for file in ("pose.mp4", "face.mp4"):
            rate = Fraction(VIDEO_FPS, step)
            write_media(folder / name / file, frames[first::step], rate=rate)
        record = {
            "source_sha256": hashlib.sha256(video.read_bytes()).hexdigest(),
            "start_s": first / VIDEO_FPS,
            "fps": VIDEO_FPS / step,
        }
        (folder / name / "extract.json").write_text(json.dumps(record))
    return folder


def open_clip(studio: Path, row: dict[str, object], fps: float) -> TrainingClip:
    manifest = studio / "list.jsonl"
    manifest.write_text(json.dumps({"video": "a.mp4", **row}))
    options = TrainSettings(dataset=manifest, fps=fps, size="16x16", frames_per_chunk=5)
    (clip,) = open_clips(resolve_training(options, HUB_PRESET), 16, lambda _: None).clips
    return clip


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(sorted(EXTRACTIONS)),
    start=st.integers(0, 400).map(lambda hundredths: hundredths / 100),
    length=st.none() | st.integers(200, 600).map(lambda hundredths: hundredths / 100),
    fps=st.sampled_from([5.0, 8.0, 10.0, 12.5, 24.0, 30.0]),
    place=st.floats(0, 1),
    count=st.integers(1, 9),
)
def test_every_window_shows_its_times_in_all_three(
    studio: Path,
    name: str,
    start: float,
    length: float | None,
    fps: float,
    place: float,
    count: int,
) -> None:
    first, step = EXTRACTIONS[name]
    origin = first / VIDEO_FPS
    end = None if length is None else start + length
    stop_s = min(NUM_FRAMES / VIDEO_FPS, NUM_FRAMES / VIDEO_FPS if end is None else end)
    assume((stop_s - max(start, origin)) * fps > needed_frames(5) + 1)
    row: dict[str, object] = {"pose_folder": name, "start": start}
    clip = open_clip(studio, row if end is None else row | {"end": end}, fps)

    # Every frame of the timeline within the part, none beyond it.
    skipped = ceil(max(0.0, start - origin) * fps - 1e-6)
    assert clip.num_frames == floor((stop_s - origin) * fps + 1e-6) - skipped

    begin = round(place * (clip.num_frames - count))
    frames = clip.read(begin, count)
    rgb, pose, face = map(frame_numbers, (frames.rgb_u8, frames.pose_u8, frames.face_u8))
    assert pose == face
    times = (origin + (skipped + begin + np.arange(count)) / fps) * VIDEO_FPS
    # Half a frame apart at most; the last one stays until its end.
    assert np.abs(rgb - np.minimum(times, NUM_FRAMES - 1)).max() <= 0.5 + 1e-6
    assert np.abs(pose - np.minimum(times, NUM_FRAMES - step)).max() <= step / 2 + 1e-6
