"""`everanimate eval` on the toy drift set: ours, diffusers' own pipeline, the VAE's ceiling.

    python tests/benchmarks/drift_eval.py --work DIR [--characters 1] [--seconds 90] \
        [--report drift_report.html]

For each kind of camera it renders held-out characters of `drift.py` (truth, pose, face, reference),
animates them with the toy model through `everanimate animate` and through diffusers'
`WanAnimatePipeline` (image-space carry of one frame, the same noise levels and noise), sends the
truth through the VAE, and lets `everanimate eval` compare the three: DIR/report.html (pictures, no
videos), DIR/eval.json and a table on stdout. Videos that are there already are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import shutil
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import animate_speed
import drift

from everanimate_cli.chunks import ChunkPlan
from everanimate_cli.cli import main as everanimate
from everanimate_cli.encode import VideoWriter
from everanimate_cli.hub import TOY_FOLDER
from everanimate_cli.images import fit_frame, write_png
from everanimate_cli.settings import MODEL_DEFAULTS_FILE, ModelDefaults, read_model_defaults

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from everanimate_cli.toyworld import Camera

STEPS = drift.NUM_STEPS
CRF = 6  # what the encoder adds must not decide
OVERLAPS = {"diffusers": animate_speed.OVERLAP}  # where it is not the model's
MARGIN_FRAMES = 40  # diffusers makes whole chunks only


def model_before(work: Path, camera: Camera) -> Path:
    """The toy model with the prompt for a kind of camera."""
    folder = work / f"model_{camera}"
    if not folder.exists():
        shutil.copytree(TOY_FOLDER, folder)
        path = folder / MODEL_DEFAULTS_FILE
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings["prompt"] = drift.camera_prompts()[0][camera] + drift.camera_prompts()[1]
        path.write_text(json.dumps(settings), encoding="utf-8")
    return folder


def write_video(
    path: Path, frames: Iterable[drift.Frame], side: tuple[int, int], rate_fps: float
) -> None:
    with VideoWriter(path, height=side[0], width=side[1], rate=rate_fps, crf=CRF) as writer:
        for frame in frames:
            writer.write(frame[None])


def render(folder: Path, world: drift.World, num_frames: int, defaults: ModelDefaults) -> None:
    """Truth, pose, face and reference of a character."""
    size, face = (defaults.height, defaults.width), defaults.face_size
    write_png(folder / "reference.png", world.frame(0).rgb)
    rate = defaults.fps
    indices = range(num_frames)
    write_video(folder / "truth.mp4", (world.frame(i).rgb for i in indices), size, rate)
    write_video(folder / "pose.mp4", (world.frame(i).pose for i in indices), size, rate)
    faces = (fit_frame(world.frame(i).face, face, face, "stretch") for i in indices)
    write_video(folder / "face.mp4", faces, (face, face), rate)


def make_ours(folder: Path, model: Path, num_frames: int, output: Path) -> None:
    words = ["animate", str(folder / "reference.png"), "--model", str(model), "--device", "cpu"]
    words += ["--pose", str(folder / "pose.mp4"), "--face", str(folder / "face.mp4")]
    words += ["--frames", str(num_frames), "--steps", str(STEPS), "--crf", str(CRF), "--quiet"]
    if everanimate([*words, "-o", str(output), "--seed", str(animate_speed.SEED)]):
        raise SystemExit(f"{output} could not be made")


def make_diffusers(folder: Path, model: Path, num_frames: int, output: Path) -> None:
    defaults = read_model_defaults(model)
    stride = defaults.frames_per_chunk - animate_speed.OVERLAP
    job = animate_speed.Job(
        side="diffusers",
        model=model,
        inputs=folder,
        output=output,
        num_chunks=1 + -(-(num_frames - defaults.frames_per_chunk) // stride),
        steps=STEPS,
        threads=1,
    )
    animate_speed.run_diffusers(job, animate_speed.Stopwatch())


def make_ceiling(world: drift.World, num_frames: int, output: Path) -> None:
    pipeline, defaults = drift.load("toy", None, "cpu")
    plan = ChunkPlan(
        num_frames=num_frames,
        frames_per_chunk=defaults.frames_per_chunk,
        overlap=defaults.overlap,
    )
    chunks = drift._through_vae(world, plan, pipeline)
    kept = (chunk[plan.kept_frames(index)] for index, chunk in enumerate(chunks))
    frames = islice((frame for chunk in kept for frame in chunk), num_frames)
    write_video(output, frames, (defaults.height, defaults.width), defaults.fps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--characters", type=int, default=1, help="before each camera")
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--report", type=Path, help="copy of the report")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    for camera in drift.CAMERAS:
        model = model_before(options.work, camera)
        defaults = read_model_defaults(model)
        num_frames = round(options.seconds * defaults.fps)
        for index in range(options.characters):
            folder = options.work / f"{camera}-{index}"
            folder.mkdir(parents=True, exist_ok=True)
            world = drift.World(camera, index, defaults)
            if not (folder / "face.mp4").exists():
                render(folder, world, num_frames + MARGIN_FRAMES, defaults)
            makers: dict[str, Callable[[Path], None]] = {
                "everanimate": lambda path: make_ours(folder, model, num_frames, path),  # noqa: B023
                "diffusers": lambda path: make_diffusers(folder, model, num_frames, path),  # noqa: B023
                "ceiling": lambda path: make_ceiling(world, num_frames, path),  # noqa: B023
            }
            for method, make in makers.items():
                path = folder / f"{method}.mp4"
                if not path.exists():
                    print(f"{folder.name}: {method}", flush=True)
                    make(path)
                rows.append(
                    {
                        "generated": f"{folder.name}/{method}.mp4",
                        "method": method,
                        "sample": folder.name,
                        "truth": f"{folder.name}/truth.mp4",
                        "reference": f"{folder.name}/reference.png",
                        "frames_per_chunk": defaults.frames_per_chunk,
                        "overlap": OVERLAPS.get(method, defaults.overlap),
                    }
                )
    # From within, so that the page names files as the list does.
    with contextlib.chdir(options.work):
        with Path("eval.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        words = ["eval", "--manifest", "eval.csv", "--model", "toy", "--overwrite", "--quiet"]
        words += ["-o", "eval.json", "--pose-model", "toy"]
        # diffusers makes whole chunks, and so a little more than was asked for.
        words += ["--horizons", "0-10,10-30,30-60,60-90"]
        code = everanimate([*words, "--report", "report.html", "--report-media", "stills"])
    if options.report is not None and not code:
        shutil.copyfile(options.work / "report.html", options.report)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
