"""`everanimate animate` from files to file: what it prints and what it leaves behind."""

import json
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from media import burst_times, decode_video, mp4_boxes, sound_length
from studio import Animate, Outcome, frames_of, made_files

from everanimate_cli.cli import main


def test_the_path_goes_to_stdout_and_progress_to_stderr(animate: Animate, place: Path) -> None:
    done = animate("-o", "anna.mp4")
    assert (done.code, done.out) == (0, "anna.mp4\n")
    lines = done.err.splitlines()
    assert lines[0] == (
        "15 frames of 64x48 at 12.5 fps in 3 chunks of 2 steps, tiny on cpu in float32"
    )
    # A slow machine also shows the chunk between: a line comes at most every ten seconds of work.
    chunks = [line.partition(":")[0] for line in lines[1:]]
    assert (chunks[0], chunks[-1]) == ("chunk 1/3", "chunk 3/3")
    assert set(chunks) <= {"chunk 1/3", "chunk 2/3", "chunk 3/3"}
    assert made_files(place) == ["anna.json", "anna.mp4"]


def test_the_file_is_an_ordinary_mp4(animate: Animate) -> None:
    assert animate("-o", "anna.mp4").code == 0
    path = Path("anna.mp4")
    boxes = mp4_boxes(path)
    assert boxes.index("moov") < boxes.index("mdat")  # faststart
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (context.width, context.height) == (64, 48)
        assert context.colorspace == Colorspace.ITU709
        assert context.color_primaries == ColorPrimaries.BT709
        assert context.color_trc == ColorTrc.BT709
        assert context.color_range == ColorRange.MPEG
        assert stream.average_rate == Fraction(25, 2)
        # 1.2 s of dance at 12.5 fps.
        assert (stream.frames, stream.duration * stream.time_base) == (15, Fraction(6, 5))
    times, frames = decode_video(path)
    assert frames.shape == (15, 48, 64, 3)
    assert len(set(np.diff(times))) == 1
    # The tiny network's pictures are nonsense, but they are pictures, and they move.
    assert frames.std() > 10
    assert np.abs(np.diff(frames.astype(int), axis=0)).mean() > 1


def test_the_sound_is_kept_cut_or_left_out(animate: Animate) -> None:
    assert json.loads(animate("-o", "whole.mp4", "--json", "--steps", "1").out)["audio"] == "copied"
    assert burst_times(Path("whole.mp4")) == pytest.approx([0.5], abs=0.03)
    assert sound_length(Path("whole.mp4")) == pytest.approx(1.2, abs=0.001)
    # Cut at the end of the picture; a longer picture goes on in silence.
    animate("-o", "short.mp4", "--frames", "9", "--steps", "1")
    assert sound_length(Path("short.mp4")) == pytest.approx(0.72, abs=0.001)
    animate("-o", "long.mp4", "--frames", "17", "--steps", "1")
    assert sound_length(Path("long.mp4")) == pytest.approx(1.2, abs=0.03)
    assert burst_times(Path("long.mp4")) == pytest.approx([0.5], abs=0.03)
    animate("-o", "late.mp4", "--start", "0.2", "--frames", "9", "--steps", "1")
    assert burst_times(Path("late.mp4")) == pytest.approx([0.3], abs=0.03)
    done = animate("-o", "mute.mp4", "--no-audio", "--json", "--frames", "9", "--steps", "1")
    assert json.loads(done.out)["audio"] == "absent"
    assert sound_length(Path("mute.mp4")) == 0


def test_the_sound_of_another_video_is_left_out(animate: Animate, place: Path) -> None:
    """The name in extract.json is used only if it leads to the very video that was extracted."""
    record = json.loads(Path("dance/extract.json").read_text())
    dance = place / "waltz"
    dance.mkdir()
    for name in ("pose.mp4", "face.mp4", "driving.mp4"):
        (dance / name).symlink_to(place / "dance" / name)
    (dance / "extract.json").write_text(json.dumps({**record, "source_sha256": "0" * 64}))
    words = ("--json", "--frames", "9", "--steps", "1")
    done = animate("-o", "anna.mp4", *words, inputs=("anna.png", "waltz"))
    assert json.loads(done.out)["audio"] == "absent"
    assert "no sound: driving.mp4, the driving video, is gone or has changed\n" in done.err
    (dance / "extract.json").write_text(json.dumps({**record, "start_s": 0.25}))
    done = animate("-o", "b.mp4", *words, inputs=("anna.png", "waltz"))
    assert json.loads(done.out)["audio"] == "copied"
    assert burst_times(Path("b.mp4")) == pytest.approx([0.25], abs=0.03)


def test_json_tells_what_was_made(animate: Animate) -> None:
    done = animate("-o", "anna.mp4", "--json", "--quiet")
    facts = json.loads(done.out)
    measured = {name: facts.pop(name) for name in ("timings", "seconds_per_frame")}
    peak_memory_mib = facts.pop("peak_memory_mib")
    assert facts == {
        "output": "anna.mp4",
        "frames": 15,
        "seconds": 1.2,
        "fps": 12.5,
        "size": "64x48",
        "chunks": 3,
        "frames_per_chunk": 9,
        "overlap": 4,
        "steps": 2,
        "driving_frames": 15,
        "model": "tiny",
        "device": "cpu",
        "dtype": "float32",
        "placement": {
            "precision": "full",
            "offload": "none",
            "vae_tiling": "off",
            "text_device": "device",
        },
        "loras": [],
        "speed": {
            "steps": "2",
            "guidance": "off",
            "attention": "sdpa",
            "compile": "off",
            "step_cache": "off",
        },
        "audio": "copied",
        "settings_file": "anna.json",
    }
    timings = measured["timings"]
    assert list(timings) == ["load_s", "chunks_s", "encode_s", "total_s"]
    assert 0 < timings["encode_s"] < timings["chunks_s"] < timings["total_s"]
    assert measured["seconds_per_frame"] == pytest.approx(timings["chunks_s"] / 15, abs=1e-3)
    assert 50 < peak_memory_mib < 20_000


def test_the_settings_are_saved_and_run_again_to_the_same_bytes(animate: Animate) -> None:
    words = ["--seed", "3", "--steps", "1", "--frames", "10", "--crf", "30", "--pose-beside"]
    assert animate("-o", "anna.mp4", *words).code == 0
    record = json.loads(Path("anna.json").read_text())
    assert record["settings"]["seed"] == 3
    assert record["settings"]["overlap"] is None
    assert record["effective"]["overlap"] == 4
    assert record["result"]["frames"] == 10
    assert record["request"]["torch version"] == torch.__version__
    assert re.fullmatch("[0-9a-f]{64}", record["request"]["REF sha256"])
    assert len(record["anchor_frame_indices"]) == 3
    assert "overwrite" not in record["settings"]
    assert main(["animate", "--config", "anna.json", "-o", "again.mp4"]) == 0
    assert Path("again.mp4").read_bytes() == Path("anna.mp4").read_bytes()


def test_the_same_command_gives_the_same_bytes(animate: Animate) -> None:
    for name in ("a.mp4", "b.mp4"):
        assert animate("-o", name, "--frames", "10").code == 0
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()


def test_quiet_writes_nothing_on_stderr(place: Path) -> None:
    """In a process of its own, so that what libraries write past Python is seen too."""
    command = [sys.executable, "-m", "everanimate_cli", "animate", "anna.png", "dance"]
    done = subprocess.run(
        [*command, "--model", "tiny", "--frames", "5", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "dance_anna.mp4\n", "")
    assert made_files(place) == ["dance_anna.json", "dance_anna.mp4"]


def test_a_dry_run_tells_the_plan_and_writes_nothing(animate: Animate, place: Path) -> None:
    done = animate("--dry-run", "--seconds", "10")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == [
        "output: dance_anna.mp4",
        "frames: 125",
        "seconds: 10.0",
        "fps: 12.5",
        "size: 64x48",
        "chunks: 25",
        "frames per chunk: 9",
        "overlap: 4",
        "steps: 2",
        "driving frames: 15",
        "model: tiny",
        "device: cpu",
        "dtype: float32",
        "placement: precision full, offload none, vae tiling off, text device device",
        "loras: none",
        "speed: steps 2, guidance off, attention sdpa, compile off, step cache off",
        "downloads: none",
        "weights: transformer 0.7, vae 0.6, text encoder 0.1, image encoder 0.1 MiB",
        "phases: text 0, encode 4, denoise 2, decode 4 MiB",
        "estimated memory: 4 MiB",
        "main memory: 0 MiB",
        "loading: 1 MiB",
        "disk: 0 MiB",
    ]
    plan = json.loads(animate("--dry-run", "--seconds", "10", "--json").out)
    assert plan["chunks"] == 25
    assert list(plan["weights_mib"]) == ["transformer", "vae", "text_encoder", "image_encoder"]
    assert made_files(place) == []


def test_an_existing_result_is_replaced_with_overwrite_only(animate: Animate) -> None:
    Path("anna.mp4").write_bytes(b"precious")
    refused = animate("-o", "anna.mp4", "--frames", "5")
    assert refused == Outcome(
        2,
        "",
        "error: --output anna.mp4 exists. Add --overwrite to replace it, or give another name.\n",
    )
    assert Path("anna.mp4").read_bytes() == b"precious"
    assert animate("-o", "anna.mp4", "--frames", "5", "--steps", "1", "--overwrite").code == 0
    assert len(frames_of("anna.mp4")) == 5


def test_a_settings_file_of_an_earlier_result_is_replaced(animate: Animate) -> None:
    """Whoever deletes a video to make it again need not hunt for its settings as well."""
    assert animate("-o", "anna.mp4", "--frames", "1", "--steps", "1").code == 0
    Path("anna.mp4").unlink()
    assert animate("-o", "anna.mp4", "--frames", "2", "--steps", "1").code == 0
    assert json.loads(Path("anna.json").read_text())["result"]["frames"] == 2
