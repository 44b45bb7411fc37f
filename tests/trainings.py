"""Trainings in two processes, see `ranks`: their clips, their launch and what they made."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from media import write_media
from ranks import Command
from safetensors.torch import load_file
from studio import Outcome, picture

RANKS = Path(__file__).with_name("ranks.py")


def words(output: str, *more: str) -> list[str]:
    given = ["--model", "tiny", "--fps", "25", "--device", "cpu", "--rank", "3", "--lr", "0.01"]
    rest = ["--checkpoint-every", "2", "--no-tensorboard", "-o", output]
    return ["train-lora", "clips.csv", *given, *rest, *more]


def write_clips(folder: Path) -> None:
    """Two short clips with pose and face, and their manifest `clips.csv`."""
    rows = ["video,pose,face"]
    for name in ("one", "two"):
        for suffix, size in {"": (48, 64), "_pose": (48, 64), "_face": (32, 32)}.items():
            phase = len(rows) + len(suffix)
            frames = np.stack([picture(*size, phase + 0.2 * i) for i in range(24)])
            write_media(folder / f"{name}{suffix}.mp4", frames, rate=25, options={"crf": "4"})
        rows.append(f"{name}.mp4,{name}_pose.mp4,{name}_face.mp4")
    (folder / "clips.csv").write_text("\n".join(rows) + "\n")


def launch(folder: Path, commands: Sequence[Command]) -> list[list[Outcome]]:
    """Run the commands in two processes; what each of them said to each command."""
    (folder / "commands.json").write_text(json.dumps([asdict(command) for command in commands]))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    made = subprocess.run(
        [*launcher, "--nproc-per-node", "2", str(RANKS), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )
    assert made.returncode == 0, made.stderr
    said = [
        [Outcome(**answer) for answer in json.loads((folder / f"rank-{rank}.json").read_text())]
        for rank in range(2)
    ]
    return [list(answers) for answers in zip(*said, strict=True)]


def largest_difference(one: Path, other: Path) -> float:
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    return max(float((value - second[key]).abs().max()) for key, value in first.items())


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]
