"""`everanimate animate` in several processes: the video of one, and one line of what goes wrong."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from forks import run_programs
from parallel_work import run_command
from studio import Animate, Outcome, frames_of, made_files

WORDS = ("animate", "anna.png", "dance", "--model", "tiny")
SILENCE = Outcome(0, "", "")


def together(place: Path, *words: str, count: int = 2, fault: str = "none") -> list[Outcome]:
    """What each process says."""
    return run_programs(count, run_command, place, [*WORDS, *words], fault)


def test_torchrun_makes_the_video_of_one_process(animate: Animate, place: Path) -> None:
    """Only the main process speaks, and nothing is left behind."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "-m", "everanimate_cli"),
            *(*WORDS, "-o", "two.mp4"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert (done.returncode, done.stdout) == (0, "two.mp4\n"), done.stderr
    line = "in 3 chunks of 2 steps, tiny on cpu in float32, ulysses over 2 processes\n"
    assert done.stderr.count(line) == 1
    assert done.stderr.count("chunk 3/3") == 1
    assert made_files(place) == ["two.json", "two.mp4"]
    speed = json.loads(Path("two.json").read_text())["result"]["speed"]
    assert speed["parallel"] == "ulysses over 2 processes"
    assert animate("-o", "one.mp4").code == 0
    assert Path("one.mp4").read_bytes() == Path("two.mp4").read_bytes()


def test_a_spare_process_decodes_what_the_others_sample(animate: Animate, place: Path) -> None:
    """Three processes, two with the transformer, whose blocks come and go.

    With guidance, and a step cache that all must plan alike.
    """
    words = ["--guidance-scale", "3", "--clip-image", "reference", "--steps", "4", "--json", "-q"]
    words += ["--step-cache", "mag", "--step-cache-threshold", "0.5", "--frames", "10"]
    words += ["--offload", "group"]
    main_one, *others = together(place, "--spare-rank", *words, "-o", "three.mp4", count=3)
    assert (main_one.code, main_one.err) == (0, "")
    assert others == [SILENCE, SILENCE]
    alone = animate(*words, "-o", "one.mp4")
    speed = json.loads(main_one.out)["speed"]
    assert speed["parallel"] == "ulysses over 2 processes, VAE in a spare one"
    assert alone.code == 0
    frames, expected = frames_of("three.mp4"), frames_of("one.mp4")
    # Two parts of the ratios are summed apart; the frames have been through an encoder.
    assert np.abs(frames.astype(int) - expected).max() <= 2


def test_ctrl_c_ends_all_and_the_same_command_goes_on(animate: Animate, place: Path) -> None:
    """With the same bytes as without a break; a second signal, of the launcher, changes nothing."""
    words = ("--frames", "10", "--steps", "1")  # two chunks
    first, second = together(place, "-o", "anna.mp4", "-q", *words, fault="interrupted")
    assert (first.code, first.out) == (130, "")
    assert first.err == "interrupted. Run the same command again to continue.\n"
    assert second == SILENCE
    assert "anna.mp4.run" in made_files(place)
    again, second = together(place, "-o", "anna.mp4", *words)
    assert (again.code, again.out) == (0, "anna.mp4\n")
    assert "1 done already" in again.err
    assert second == SILENCE
    assert animate("-o", "one.mp4", *words).code == 0
    assert Path("anna.mp4").read_bytes() == Path("one.mp4").read_bytes()


@pytest.mark.parametrize(
    ("fault", "code", "message", "partner_code"),
    [
        (
            "disk full",
            1,
            "error: disk full: [Errno 28] No space left on device. "
            "Free some space, then run the same command again to continue.\n",
            0,
        ),
        ("partner fails to load", 2, "error: the weights are gone.\n", 0),
        (
            "partner out of memory",
            1,
            "error: out of memory with precision full, offload none,",
            0,
        ),
        (
            "partner killed",
            1,
            "error: another process of this run is gone. Run the same command again.\n",
            -signal.SIGKILL,
        ),
    ],
)
def test_one_line_tells_which_process_failed(
    place: Path, fault: str, code: int, message: str, partner_code: int
) -> None:
    """No process waits for one that has failed, and a partner says nothing itself."""
    first, second = together(place, "--frames", "9", "--steps", "1", "-q", fault=fault)
    assert (first.code, first.out) == (code, "")
    assert first.err.startswith(message)
    assert first.err.count("\n") == 1
    assert second == Outcome(partner_code, "", "")
    # What is refused leaves nothing; what can be gone on with stays.
    runs = [name for name in made_files(place) if name.endswith(".run")]
    assert bool(runs) == (code == 1 and "memory" not in message)


def test_a_bug_in_a_partner_keeps_its_trace(place: Path) -> None:
    first, second = together(place, "--frames", "9", "-q", fault="bug in partner")
    assert (first.code, first.err) == (1, "error: process 1 failed: TypeError: a bug\n")
    assert second.code == 1
    assert second.err.endswith("\nTypeError: a bug\n")


@pytest.mark.parametrize(
    ("words", "code", "out", "err"),
    [
        (
            ["--parallel", "ring"],
            2,
            "",
            "error: --parallel ring needs CUDA devices. "
            "Give --device cuda, or --parallel ulysses.\n",
        ),
        (
            ["--offload", "disk"],
            2,
            "",
            "error: --offload disk is for one process: each would write a copy of its own. "
            "Give --offload group, or start one process.\n",
        ),
        (["--steps", "0"], 2, "", "error: --steps 0 is too small. Give 1 or more.\n"),
        (["--dry-run"], 0, "parallel ulysses over 2 processes", ""),
        (["--help"], 0, "--parallel", ""),
    ],
)
def test_the_others_go_when_there_is_nothing_to_do(
    place: Path, words: list[str], code: int, out: str, err: str
) -> None:
    first, second = together(place, *words)
    assert (first.code, first.err) == (code, err)
    assert out in first.out
    assert second == SILENCE
    assert made_files(place) == ["rank-0.err", "rank-0.out", "rank-1.err", "rank-1.out"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--parallel", "ulysses"],
            "error: --parallel ulysses has no effect on one process. "
            "Start several: torchrun --nproc-per-node 2 -m everanimate_cli animate ...\n",
        ),
        (
            ["--spare-rank"],
            "error: --spare-rank has no effect on one process. "
            "Start several: torchrun --nproc-per-node 2 -m everanimate_cli animate ...\n",
        ),
    ],
)
def test_one_process_shares_nothing(animate: Animate, words: list[str], message: str) -> None:
    assert animate(*words) == Outcome(2, "", message)
