"""Run folders: what a stopped run continues from, how a video gets longer, who may touch what."""

import errno
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from kill_resume import kill_and_resume, start_program
from media import numbered_frames, tone_bursts, write_media
from PIL import Image
from studio import Animate, Outcome, frames_of, made_files
from tiny import write_tiny_checkpoint

from everanimate_cli import weights
from everanimate_cli.cli import main
from everanimate_cli.rollout import Rollout
from everanimate_cli.runs import RunFolder

ANNA = "anna.mp4"
RUN = RunFolder(Path("anna.mp4.run"))
FULL = OSError(errno.ENOSPC, "No space left on device", "disk")


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder but the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


def stop_after(monkeypatch: pytest.MonkeyPatch, num_chunks: int, error: BaseException) -> None:
    """Let the next run fail when it begins the chunk after so many."""
    generate = Rollout._conditioning

    def conditioning(rollout: Rollout, state: Any, *driving: Any) -> Any:
        if state.next_chunk == num_chunks:
            monkeypatch.setattr(Rollout, "_conditioning", generate)
            raise error
        return generate(rollout, state, *driving)

    monkeypatch.setattr(Rollout, "_conditioning", conditioning)


def count_chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects the indices of the chunks that are generated from now on."""
    made: list[int] = []
    generate = Rollout._conditioning

    def conditioning(rollout: Rollout, state: Any, *driving: Any) -> Any:
        made.append(state.next_chunk)
        return generate(rollout, state, *driving)

    monkeypatch.setattr(Rollout, "_conditioning", conditioning)
    return made


@pytest.mark.parametrize(
    "words", [[], ["--memory", "pixel"], ["--view", "back.png", "--guidance-scale", "2"]]
)
def test_a_resumed_run_is_the_uninterrupted_run(
    animate: Animate, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    assert animate("-o", "whole.mp4", "--keep-run", *words).code == 0
    stop_after(monkeypatch, 1, FULL)
    assert animate("-o", ANNA, "--keep-run", *words).code == 1
    assert RUN.count_finished() == 1
    made = count_chunks(monkeypatch)
    done = animate("-o", ANNA, "--keep-run", *words)
    assert done.code == 0
    assert " done already\n" in done.err
    assert made[0] == 1
    assert Path(ANNA).read_bytes() == Path("whole.mp4").read_bytes()
    # The state after every chunk, all encoded chunks and the request too.
    assert content(RUN.path) == content(Path("whole.mp4.run"))


def test_killed_runs_resume_to_the_same_bytes(place: Path) -> None:
    words = ["animate", "anna.png", "dance", "--model", "tiny", "--frames", "14"]
    report = kill_and_resume(words, place, num_kills=4, rng=random.Random(0))
    assert report.num_kills == 4
    assert report.num_videos >= 1


def test_ctrl_c_says_how_to_go_on_and_a_second_process_is_refused(
    animate: Animate, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["animate", "anna.png", "dance", "--model", "tiny", "-o", ANNA]
    process = start_program([*words, "--frames", "5000"], place)
    while RUN.count_finished() < 2 and process.is_alive():
        time.sleep(0.01)
    before = made_files(place)
    assert animate("-o", ANNA, "--frames", "14") == Outcome(
        2,
        "",
        "error: --output anna.mp4 is being made by another process. Wait for it, or give another "
        "--output.\n",
    )
    assert set(before) <= set(made_files(place))
    assert main(["runs", "--remove"]) == 0
    assert re.fullmatch(
        r"anna\.mp4\.run: \d+ chunks, \d\.\d MiB, at work, not removed\n", capsys.readouterr().out
    )
    assert RUN.count_finished() >= 2
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode == 130
    printed = Path("log").read_text()
    assert printed.splitlines()[-1] == "interrupted. Run the same command again to continue."
    assert "Traceback" not in printed
    assert not Path(ANNA).exists()
    assert animate("-o", ANNA, "--frames", "14").code == 0
    assert animate("-o", "whole.mp4", "--frames", "14").code == 0
    assert Path(ANNA).read_bytes() == Path("whole.mp4").read_bytes()
    assert made_files(place) == ["anna.json", "anna.mp4", "log", "whole.json", "whole.mp4"]


def test_an_interrupted_run_waits_for_its_own_command(
    animate: Animate, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 1, KeyboardInterrupt())
    stopped = animate("-o", ANNA, "--no-resume")
    assert (stopped.code, stopped.out) == (130, "")
    assert stopped.err.splitlines()[-1] == (
        "interrupted. Run the same command without --no-resume to continue."
    )
    # Another run beside it says that it is there.
    done = animate("-o", "other.mp4", "--frames", "5")
    assert done.code == 0
    assert (
        "anna.mp4.run is an unfinished run (1 chunk, 0.0 MiB, 0 min old). Its own command "
        "continues it; to delete it: everanimate runs --remove anna.mp4.run\n"
    ) in done.err
    assert animate("-o", ANNA).code == 0


# --- a full disk ---------------------------------------------------------------------------------


class Disk:
    """Fills up at the n-th time that a file is written to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_writes = 0
        self.last_write: int | None = None
        self._sync = os.fsync
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, file: int) -> None:
        """Stands in for `os.fsync`, where a file system that writes late tells of a full disk."""
        self.num_writes += 1
        if self.last_write is not None and self.num_writes > self.last_write:
            raise FULL
        self._sync(file)


def test_a_full_disk_keeps_what_is_finished(
    animate: Animate, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--frames", "10", "--steps", "1")
    assert animate("-o", "whole.mp4", *words).code == 0  # from now on the prompt is in the cache
    disk = Disk(monkeypatch)
    assert animate("-o", "whole.mp4", *words, "--overwrite").code == 0
    num_writes = disk.num_writes
    # The request, the prompt, two chunks of two files, the joined video and its place, its settings
    # and theirs; each file and then its folder.
    assert num_writes == 2 * (2 + 4) + 3 + 3
    for last_write in range(0, num_writes, 4):
        disk.num_writes, disk.last_write = 0, last_write
        stopped = animate("-o", ANNA, *words)
        assert (stopped.code, stopped.out) == (1, "")
        assert stopped.err.splitlines()[-1] == (
            "error: disk full: [Errno 28] No space left on device: 'disk'. Free some space, then "
            "run the same command again to continue."
        )
        assert RUN.path.is_dir()
        assert not [name for name in made_files(place) if name.endswith(".part")]
        disk.last_write = None
        assert animate("-o", ANNA, *words).code == 0
        assert Path(ANNA).read_bytes() == Path("whole.mp4").read_bytes()
        assert not RUN.path.exists()
        Path(ANNA).unlink()


# --- another length ------------------------------------------------------------------------------


def test_a_kept_run_becomes_longer_and_shorter(
    animate: Animate, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert animate("-o", ANNA, "--seconds", "0.8", "--keep-run").code == 0  # 10 of 14 frames
    made = count_chunks(monkeypatch)
    longer = animate("-o", ANNA, "--frames", "22", "--keep-run")
    assert longer.code == 0
    assert longer.err.splitlines()[0].endswith(
        "in 4 chunks of 2 steps, tiny on cpu in float32; 2 done already"
    )
    assert made == [2, 3]
    assert animate("-o", "fresh.mp4", "--frames", "22").code == 0
    assert Path(ANNA).read_bytes() == Path("fresh.mp4").read_bytes()
    assert json.loads(Path("anna.json").read_text())["result"]["frames"] == 22
    del made[:]
    # Without --keep-run the folder goes, also if nothing was left to generate.
    assert animate("-o", ANNA, "--frames", "12").code == 0
    assert made == []
    assert animate("-o", "fresh.mp4", "--frames", "12", "--overwrite").code == 0
    assert Path(ANNA).read_bytes() == Path("fresh.mp4").read_bytes()
    assert made_files(place) == ["anna.json", "anna.mp4", "fresh.json", "fresh.mp4"]


def test_only_the_run_of_the_same_result_may_replace_it(animate: Animate) -> None:
    """A kept run folder is no leave to overwrite the result of another request, or of none."""
    words = ("-o", ANNA, "--frames", "5", "--steps", "1")
    assert animate(*words, "--keep-run").code == 0
    old = Path(ANNA).read_bytes()
    exists = (
        "error: --output anna.mp4 exists. Add --overwrite to replace it, or give another name.\n"
    )
    assert animate(*words, "--no-resume") == Outcome(2, "", exists)
    other = animate(*words, "--seed", "1")
    assert (other.code, Path(ANNA).read_bytes()) == (2, old)
    assert "--seed was 0, is 1" in other.err
    assert animate(*words, "--seed", "1", "--overwrite").code == 2
    assert animate(*words, "--seed", "1", "--overwrite", "--no-resume", "--keep-run").code == 0
    assert Path(ANNA).read_bytes() != old
    shutil.rmtree(RUN.path)
    assert animate(*words, "--seed", "1") == Outcome(2, "", exists)


def test_a_result_that_another_process_has_just_finished_is_not_replaced(
    animate: Animate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both passed the first checks; the second got the folder when the first had removed it."""
    holds = RunFolder.hold

    def hold(run: RunFolder) -> Any:
        Path(ANNA).write_bytes(b"just finished")
        return holds(run)

    monkeypatch.setattr(RunFolder, "hold", hold)
    done = animate("-o", ANNA)
    assert done.err.endswith(
        "error: --output anna.mp4 exists. Add --overwrite to replace it, or give another name.\n"
    )
    assert (done.code, Path(ANNA).read_bytes()) == (2, b"just finished")
    assert not RUN.path.exists()


@pytest.mark.parametrize("left", ["*.safetensors", "lock", "nothing"])
def test_a_removal_that_was_killed_is_finished(animate: Animate, place: Path, left: str) -> None:
    """The request goes first, so that chunks of one run never become those of another."""
    assert animate("-o", ANNA, "--frames", "10", "--keep-run").code == 0
    for path in set(RUN.path.iterdir()) - set(RUN.path.glob(left)):
        path.unlink()
    refused = animate("-o", ANNA, "--frames", "10", "--seed", "1")
    assert refused.err == (
        "error: --output anna.mp4 exists. Add --overwrite to replace it, or give another name.\n"
    )
    assert made_files(place) == ["anna.json", "anna.mp4"]
    assert animate("-o", ANNA, "--frames", "10", "--keep-run", "--overwrite").code == 0
    RUN.request_path.unlink()
    assert animate("-o", ANNA, "--frames", "10", "--seed", "1", "--overwrite").code == 0
    assert animate("-o", "fresh.mp4", "--frames", "10", "--seed", "1").code == 0
    assert Path(ANNA).read_bytes() == Path("fresh.mp4").read_bytes()


# --- another request -----------------------------------------------------------------------------


def other_file(name: str) -> None:
    """Give an input another content."""
    path = Path(name)
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data + b"\0")


def other_model() -> None:
    Path("tiny").unlink()
    write_tiny_checkpoint(Path("tiny"), seed=1)


def nothing() -> None:
    """Change no file."""


@pytest.mark.parametrize(
    ("change", "words", "differences"),
    [
        (nothing, ["--seed", "1", "--steps", "1"], "--seed was 0, is 1; --steps was 2, is 1"),
        (
            nothing,
            ["--end", "1", "--pose-beside"],
            "--end was not given, is 1.0; --pose-beside was off, is on",
        ),
        (nothing, ["--view", "back.png"], "--view 1 was not given, is given"),
        (nothing, ["--dtype", "bfloat16"], "--dtype was float32, is bfloat16"),
        (lambda: other_file("anna.png"), [], "REF has another content"),
        (other_model, [], "--model has another content"),
    ],
)
def test_each_difference_to_the_unfinished_run_is_named(
    animate: Animate,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[], object],
    words: list[str],
    differences: str,
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "load_pipeline", interrupt)
    assert animate("-o", ANNA).code == 130
    before = content(RUN.path)
    change()
    assert animate("-o", ANNA, *words) == Outcome(
        2,
        "",
        f"error: --output anna.mp4 has a run folder of another request: {differences}. Give the "
        "same options to continue it, another --output, or --no-resume to start again.\n",
    )
    assert content(RUN.path) == before


def test_the_length_the_names_and_the_sound_may_change(
    animate: Animate, monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    stop_after(monkeypatch, 1, KeyboardInterrupt())
    assert animate("-o", ANNA).code == 130
    made = count_chunks(monkeypatch)
    for name, renamed in (("anna.png", "eve.png"), ("dance", "waltz"), ("tiny", "small")):
        (place / name).rename(renamed)
    words = ["--model", "small", "-o", ANNA, "--frames", "12", "--no-audio", "--device", "cpu"]
    assert main(["animate", "eve.png", "waltz", *words]) == 0
    assert made == [1]


def test_a_damaged_run_folder_is_told(animate: Animate, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 1, KeyboardInterrupt())
    animate("-o", ANNA)
    for name in ("00000.safetensors", "run.json"):
        (RUN.path / name).write_bytes(b"")
        done = animate("-o", ANNA)
        assert done.code == 1
        assert done.err.splitlines()[-1].startswith(f"error: anna.mp4.run/{name} is damaged (")
        assert done.err.endswith("). Start again with --no-resume.\n")
    assert animate("-o", ANNA, "--no-resume").code == 0


def test_files_of_others_in_the_run_folder_stay(animate: Animate, place: Path) -> None:
    RUN.path.mkdir()
    (RUN.path / "notes.txt").write_text("mine")
    assert animate("-o", ANNA, "--frames", "1", "--no-resume").code == 0
    assert made_files(place) == ["anna.json", "anna.mp4", "anna.mp4.run", "anna.mp4.run/notes.txt"]


def test_damaged_sound_is_told_and_costs_no_chunk(
    animate: Animate, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be found only when the chunks are joined."""
    assert place.is_dir()
    whole = write_media(Path("whole.ts"), numbered_frames(30), sound=tone_bursts(1.2, 44100))
    with av.open(str(whole)) as container:
        first = bytes(next(packet for packet in container.demux(audio=0) if packet.pts))
    data = bytearray(whole.read_bytes())
    data[data.index(first[:7]) + 2] = 0xFF  # a header that says nothing that MP4 can store
    Path("pose.ts").write_bytes(data)
    words = ("--pose", "pose.ts", "--face", "whole.ts", "-o", ANNA, "--frames", "10")
    done = animate(*words, inputs=("anna.png",))
    assert (done.code, Path(ANNA).exists()) == (1, False)
    assert done.err.splitlines()[-1].endswith(
        " All chunks are finished and kept in anna.mp4.run: run the same command with --no-audio "
        "if the sound is at fault, else with --no-resume."
    )
    made = count_chunks(monkeypatch)
    assert animate(*words, "--no-audio", inputs=("anna.png",)).code == 0
    assert made == []


# --- pictures ------------------------------------------------------------------------------------


def pictures(folder: str) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted(Path(folder).iterdir())]


def test_an_interrupted_run_goes_on_with_its_pictures(
    animate: Animate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is no longer empty, but what it holds is the run's own."""
    assert animate("-o", "whole.mp4", "--png", "all").code == 0
    stop_after(monkeypatch, 1, KeyboardInterrupt())
    assert animate("-o", ANNA, "--png", "frames").code == 130
    Path("frames/.000012.png.0123abcd.part").touch()  # of a killed process
    assert animate("-o", ANNA, "--png", "frames").code == 0
    assert [path.name for path in sorted(Path("frames").iterdir())] == [
        f"{index:06d}.png" for index in range(15)
    ]
    np.testing.assert_array_equal(pictures("frames"), pictures("all"))


def test_pictures_of_chunks_that_were_finished_without_are_made_afterwards(
    animate: Animate, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert animate("-o", ANNA, "--keep-run").code == 0
    made = count_chunks(monkeypatch)
    assert animate("-o", ANNA, "--keep-run", "--png", "frames").code == 0
    assert made == []
    expected = pictures("frames")
    assert len(expected) == 15
    Path("frames/000003.png").unlink()
    assert animate("-o", ANNA, "--keep-run", "--png", "frames").code == 0
    np.testing.assert_array_equal(pictures("frames"), expected)
    # A folder that holds anything else needs --overwrite, and what is in it is not trusted.
    shutil.copytree("frames", "others")
    Image.new("RGB", (64, 48)).save("others/000000.png")
    assert animate("-o", ANNA, "--keep-run", "--png", "others").err == (
        "error: --png others is not empty. Add --overwrite to write into it, or give another "
        "folder.\n"
    )
    assert animate("-o", ANNA, "--keep-run", "--png", "others", "--overwrite").code == 0
    np.testing.assert_array_equal(pictures("others"), expected)
    assert len(frames_of(ANNA)) == 15
