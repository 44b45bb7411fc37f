"""Kill a run at random moments, resume it, and compare the file with that of a run left alone.

    python tests/kill_resume.py [--kills 100] [--model toy|FOLDER] [--seconds 4] [--seed 0]

Every process runs the whole command line. It is forked from a server that has the libraries
loaded, so that a kill costs a second and falls into the work, not into the imports.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from everanimate_cli.cli import main
from everanimate_cli.runs import RunFolder
from everanimate_cli.settings import run_folder

LOADED = ["everanimate_cli.animate", "everanimate_cli.train_lora", "everanimate_cli.console"]
KILLED = -9  # exit code of a process that got SIGKILL
REFUSED = 2
# When to kill: at any moment, or soon after such a file has come about.
CHUNK = "shot.mp4.run/.0*.part"  # a chunk is being written
JOINED = "shot.mp4.run/.joined*.part"  # the result is being written
RESULT = "shot.mp4"  # the run folder is about to be removed
MOMENTS = (None, CHUNK, JOINED, None, CHUNK, RESULT)
TAIL_S = 0.02
POLL_S = 0.0003


@dataclass
class Report:
    """What happened.

    Attributes:
        num_videos: Videos that were finished, all of them right.
        num_starts: Processes that were started.
        left_behind: What the killed processes had left: how far the run was -> how often.
        num_torn: Kills that fell into the writing of a file.
    """

    num_videos: int = 0
    num_starts: int = 0
    left_behind: Counter[str] = field(default_factory=Counter)
    num_torn: int = 0

    @property
    def num_kills(self) -> int:
        return self.left_behind.total()

    def __str__(self) -> str:
        stages = ", ".join(f"{count} {stage}" for stage, count in sorted(self.left_behind.items()))
        return (
            f"{self.num_kills} kills ({stages}; {self.num_torn} while a file was written), "
            f"{self.num_starts} starts, {self.num_videos} videos, all byte-identical"
        )


def kill_and_resume(
    words: Sequence[str], folder: Path, *, num_kills: int, rng: random.Random
) -> Report:
    """Make a video again and again under fire.

    Args:
        words: Of the command line, after the program's name and without `--output`.
        folder: Current folder of the processes, where the videos are made.
        num_kills: How many processes to kill.
        rng: Draws the moments.

    Returns:
        What happened.

    Raises:
        AssertionError: If a file differs, a finished chunk is lost, anything is left behind, or a
            process ends in another way than it should.
    """

    def start(name: str) -> BaseProcess:
        return start_program([*words, "--output", name], folder)

    inputs = set(folder.rglob("*"))
    start("warm.mp4").join()  # the server is up from now on
    started_s = time.monotonic()
    start("whole.mp4").join()
    duration_s = time.monotonic() - started_s
    expected = (folder / "whole.mp4").read_bytes()
    assert (folder / "warm.mp4").read_bytes() == expected, "two runs differ without any kill"
    _remove_new(folder, inputs)

    output = folder / "shot.mp4"
    run = RunFolder(run_folder(output))
    report = Report()
    while True:
        num_before = run.count_finished()
        report.num_starts += 1
        known = set(folder.rglob("*"))
        process = start(output.name)
        if report.num_kills < num_kills:
            pattern = MOMENTS[report.num_kills % len(MOMENTS)]
            _kill(
                process, folder, pattern, known, rng.uniform(0, TAIL_S if pattern else duration_s)
            )
        process.join()
        if process.exitcode == KILLED:
            is_gone = output.exists() and not run.request_path.exists()
            num_after = run.count_finished()
            stage = "at the end" if output.exists() else f"after {num_after} chunks"
            report.left_behind[stage] += 1
            report.num_torn += any(folder.rglob("*.part"))
            assert num_after >= num_before or is_gone, "a finished chunk is lost"
            continue
        log = (folder / "log").read_text()
        # Killed while the run folder was removed: the video was whole by then.
        is_told = process.exitcode == REFUSED and "shot.mp4 exists. Add --overwrite" in log
        assert process.exitcode == 0 or is_told, log
        assert output.read_bytes() == expected, "another file"
        names = {path.name for path in set(folder.rglob("*")) - inputs}
        assert names == {"shot.mp4", "shot.json", "log"}, f"left behind: {names}"
        report.num_videos += 1
        _remove_new(folder, inputs)
        if report.num_kills >= num_kills:
            return report


def start_program(words: Sequence[str], folder: Path) -> BaseProcess:
    """Run a command line in a process of its own, whose output goes to `log` in its folder."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    process = context.Process(target=_work, args=(words, folder))
    process.start()
    return process


def _work(words: Sequence[str], folder: Path) -> None:
    """Run the command line in this process."""
    # A shell without job control lets its children ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.exit(main(words))


def _kill(
    process: BaseProcess, folder: Path, pattern: str | None, known: set[Path], delay_s: float
) -> None:
    """Kill a process some time after a file has come about, unless the process ends before."""
    while pattern is not None and process.is_alive() and not _find(folder, pattern) - known:
        time.sleep(POLL_S)
    process.join(delay_s)
    process.kill()


def _find(folder: Path, pattern: str) -> set[Path]:
    try:
        return set(folder.glob(pattern))
    except FileNotFoundError:  # the run folder was removed while it was searched
        return set()


def _remove_new(folder: Path, inputs: set[Path]) -> None:
    for path in set(folder.iterdir()) - inputs:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--model", help="default: a tiny checkpoint with random weights")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of the video")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    return parser.parse_args()


def _shoot(given: argparse.Namespace, folder: Path) -> Report:
    """Make the inputs in a folder and a video of them under fire."""
    # Late: these are slow to load, and every forked process loads this file.
    from PIL import Image  # noqa: PLC0415
    from studio import picture, write_dance  # noqa: PLC0415
    from tiny import write_tiny_checkpoint  # noqa: PLC0415

    Image.fromarray(picture(60, 80, 0.0)).save(folder / "anna.png")
    write_dance(folder / "dance")
    model = given.model or str(write_tiny_checkpoint(folder / "tiny"))
    words = ["animate", "anna.png", "dance", "--model", model, "--seconds", f"{given.seconds:g}"]
    rng = random.Random(given.seed)
    return kill_and_resume(words, folder, num_kills=given.kills, rng=rng)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        print(_shoot(_parse(), Path(name)))  # noqa: T201
