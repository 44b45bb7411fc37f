"""Which memory keeps a character from drifting: the paper's claim on the toy world, in figures.

    python tests/benchmarks/drift.py --work DIR --arm all                 # all stages, resumable
    python tests/benchmarks/drift.py --work DIR dataset --videos 1200
    python tests/benchmarks/drift.py --work DIR train --arm latent-rfm --steps 2000
    python tests/benchmarks/drift.py --work DIR evaluate --arm main --processes 3
    python tests/benchmarks/drift.py --work DIR --table --plot drift.png --sheet drift_sheet.png

Every arm is a LoRA of the same base, trained by `everanimate train-lora` on the same videos with
the same seed and number of steps, in two halves: `latent-rfm` spends one on stage 1 and one on
stage 2, the others repeat their own. Then held-out characters dance for 90 s before still and
moving cameras, each animated with its own motion from its first frame (self-reenactment) through
the product's own loader and chunk loop. They face the camera for 15 to 30 s and turn around
afterwards, which shows sides that neither the reference nor chunk 0 has.

Beside the arms stand `copy` (the reference over and over) and `ceiling` (the truth through the
VAE). Squared errors are pooled over a window, then given in dB. "person" counts only the pixels in
which the frame differs from the empty room, "background" the others. Intervals are percentile
bootstraps over characters, those of differences are paired.
"""

from __future__ import annotations

import argparse
import csv
import functools
import hashlib
import json
import math
import multiprocessing
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import cv2
import numpy as np

from everanimate_cli import metrics
from everanimate_cli.atomic_files import atomic_path
from everanimate_cli.chunks import ChunkPlan
from everanimate_cli.encode import VideoWriter
from everanimate_cli.images import fit_frame, read_image, write_png
from everanimate_cli.toyworld import Camera, Dance, ToyFrame, ToyScene

# torch and what stands on it is imported where it is used: rendering and reports start at once.
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from everanimate_cli.pipeline import AnimatePipeline
    from everanimate_cli.settings import Memory, ModelDefaults

Frame = np.ndarray  # [H, W, 3] uint8
_Item, _Made = TypeVar("_Item"), TypeVar("_Made")

CAMERAS: tuple[Camera, ...] = get_args(Camera)

# People whom neither the base nor other benchmarks have seen.
TRAINING_SEED = 5_000_000
HELD_OUT_SEED = 6_000_000

CLIP_S = (6.0, 10.0)
CLIP_START_S = (0.0, 80.0)
TURNING_SHARE = 0.4  # of the clips; a third of the other dances turns too
DEFAULT_PROMPT_SHARE = 0.5  # as in the base's training
TRACKS = ("video", "pose", "face")

START_S = 0.5  # eyes are shut before
FIRST_TURN_S = (15.0, 30.0)
NUM_STEPS = 8
NOISE_SEED = 1
PERSON_THRESHOLD = 0.06 * 255  # a pixel of the person differs this much from the empty room
KEEP_EVERY_S = 10.0  # frames for contact sheets
LONG_S, SHORT_S = 90.0, 30.0


# --- the arms ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One call of `train-lora`: half of an arm's budget.

    Attributes:
        name: Of its folder.
        options: What distinguishes it.
        init: The run whose LoRA it continues.
    """

    name: str
    options: tuple[str, ...]
    init: Run | None = None

    @classmethod
    def twice(cls, name: str, *options: str) -> Run:
        """Both halves alike."""
        return cls(name, options, cls(f"{name}-half", options))


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to animate.

    Attributes:
        title: In tables.
        group: "main", "ablation", "base" or "yardstick".
        memory: What one chunk hands to the next; None for a yardstick, which has no network.
        carry_frames: With pixel memory.
        run: The second half of its training; None for the base.
        draws_anchors: Whether frames of chunk 0 become identity memory; False leaves the reference
            in all slots.
    """

    title: str
    group: str
    memory: Memory | None = None
    carry_frames: int | None = None
    run: Run | None = None
    draws_anchors: bool = True

    @property
    def seconds(self) -> float:
        """Length of its videos where none is asked for."""
        return SHORT_S if self.group == "ablation" else LONG_S


_LATENT = ("--stage", "1", "--memory", "latent")
_RESTORING = ("--stage", "2", "--memory", "latent")
_FIRST_HALF = Run("latent-half", _LATENT)
# With every anchor the reference, memory augmentation does nothing: it moves drawn anchors only.
_NO_ANCHORS = ("--reference-anchor-probability", "1")


def _pixel(count: int) -> Run:
    return Run.twice(
        f"pixel{count}", "--stage", "1", "--memory", "pixel", "--carry-frames", str(count)
    )


def _ablation(title: str, name: str, *options: str) -> Arm:
    run = Run(name, (*_RESTORING, *options), _FIRST_HALF)
    return Arm(title=title, group="ablation", memory="latent", run=run)


ARMS: dict[str, Arm] = {
    "sink": Arm(
        title="sink",
        group="main",
        memory="sink",
        run=Run.twice("sink", "--stage", "1", "--memory", "sink"),
    ),
    "pixel1": Arm(
        title="pixel, 1 frame", group="main", memory="pixel", carry_frames=1, run=_pixel(1)
    ),
    "pixel5": Arm(
        title="pixel, 5 frames", group="main", memory="pixel", carry_frames=5, run=_pixel(5)
    ),
    "latent": Arm(
        title="latent (stage 1)",
        group="main",
        memory="latent",
        run=Run("latent", _LATENT, _FIRST_HALF),
    ),
    "latent-rfm": Arm(
        title="latent + RFM (stage 2)",
        group="main",
        memory="latent",
        run=Run("latent-rfm", _RESTORING, _FIRST_HALF),
    ),
    "no-identity": Arm(
        title="no identity memory",
        group="ablation",
        memory="latent",
        run=Run(
            "no-identity",
            (*_RESTORING, *_NO_ANCHORS),
            Run("no-identity-half", (*_LATENT, *_NO_ANCHORS)),
        ),
        draws_anchors=False,
    ),
    "no-augmentation": _ablation(
        "no memory augmentation", "no-augmentation", "--memory-augmentation", "0"
    ),
    "exact": _ablation("exact correction", "exact", "--correction", "exact"),
    "exact-no-gate": _ablation(
        "exact correction, no gate",
        "exact-no-gate",
        *("--correction", "exact", "--degradation-min-sigma", "0"),
    ),
    "constant": _ablation("constant correction", "constant", "--correction", "constant"),
    "base-sink": Arm(title="base, sink", group="base", memory="sink"),
    "base-pixel1": Arm(title="base, pixel, 1 frame", group="base", memory="pixel", carry_frames=1),
    "base-pixel5": Arm(title="base, pixel, 5 frames", group="base", memory="pixel", carry_frames=5),
    "base-latent": Arm(title="base, latent", group="base", memory="latent"),
    "copy": Arm(title="copy the reference", group="yardstick"),
    "ceiling": Arm(title="VAE's ceiling", group="yardstick"),
}
GROUPS = tuple(dict.fromkeys(arm.group for arm in ARMS.values()))

# Which differences are told; "over" is the arm that is subtracted.
COMPARISONS: tuple[tuple[str, str], ...] = (
    ("latent-rfm", "pixel1"),
    ("latent-rfm", "pixel5"),
    ("latent", "pixel1"),
    ("latent-rfm", "latent"),
    *((name, "sink") for name in ("pixel1", "pixel5", "latent", "latent-rfm")),
    *((name, "latent-rfm") for name, arm in ARMS.items() if arm.group == "ablation"),
    *((name, f"base-{name}") for name in ("sink", "pixel1", "pixel5", "latent")),
    ("latent-rfm", "base-latent"),
)


def choose_arms(names: Sequence[str]) -> list[str]:
    """Names of arms, of groups of them and "all", as a list of arms in the table's order."""
    chosen = set()
    for name in names:
        members = [key for key, arm in ARMS.items() if name in (key, arm.group, "all")]
        if not members:
            known = ", ".join((*ARMS, *GROUPS, "all"))
            raise SystemExit(f"--arm {name} is unknown. Known are {known}.")
        chosen.update(members)
    return [name for name in ARMS if name in chosen]


def write_json(path: Path, record: object) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")


def say(text: str) -> None:
    """A line of progress."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")


def sha256(path: Path) -> str:
    """Of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def model_hash(model: str) -> str:
    """Fingerprint of the base."""
    from everanimate_cli import checkpoint, hub  # noqa: PLC0415

    return checkpoint.checkpoint_hash(hub.locate_model(model, lambda _event: None))


# --- stage: dataset ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A training video; all of it follows from its number.

    Attributes:
        index: Its number.
        folder: Where its files go.
        defaults: Of the model.
    """

    index: int
    folder: Path
    defaults: ModelDefaults

    @property
    def camera(self) -> Camera:
        """Every other one moves."""
        return CAMERAS[self.index % len(CAMERAS)]

    def path(self, track: str) -> Path:
        """File of one of the three `TRACKS`."""
        return self.folder / f"{self.index:05d}_{track}.mp4"

    def prompt(self, camera_prompts: Mapping[Camera, str], default: str) -> str:
        """The camera, then the default prompt or what the person wears."""
        rng = np.random.default_rng([TRAINING_SEED + self.index, 11])
        plain = rng.random() < DEFAULT_PROMPT_SHARE
        words = ToyScene(TRAINING_SEED + self.index, 0).person.words
        return camera_prompts[self.camera] + (default if plain else words)

    def render(self) -> None:
        """Write what is missing of the three files."""
        if all(self.path(track).exists() for track in TRACKS):
            return
        cv2.setNumThreads(1)
        seed = TRAINING_SEED + self.index
        height, width, side = (getattr(self.defaults, n) for n in ("height", "width", "face_size"))
        rng = np.random.default_rng([seed, 10])
        seconds, start_s = rng.uniform(*CLIP_S), rng.uniform(*CLIP_START_S)
        turn_s = start_s + rng.uniform(0, 0.6) * seconds
        dance = Dance(seed, turn_after_s=turn_s if rng.random() < TURNING_SHARE else None)
        scene = ToyScene(seed, dance, height=height, width=width, camera=self.camera)
        rate = self.defaults.fps
        frames = list(scene.frames(round(seconds * rate), start_s=start_s, rate_fps=rate))
        tracks = {
            "video": [frame.rgb for frame in frames],
            "pose": [frame.pose for frame in frames],
            "face": [fit_frame(frame.face, side, side, "stretch") for frame in frames],
        }
        for track, pictures in tracks.items():
            size = {"height": pictures[0].shape[0], "width": pictures[0].shape[1]}
            with VideoWriter(self.path(track), rate=rate, lossless=True, **size) as writer:
                writer.write(np.stack(pictures))


def camera_prompts() -> tuple[dict[Camera, str], str]:
    """How a prompt begins before each camera, and the default that follows."""
    from everanimate_cli.toy_training import CAMERA_PROMPTS, PROMPT  # noqa: PLC0415

    return dict(zip(CAMERAS, CAMERA_PROMPTS, strict=True)), PROMPT


def make_dataset(options: argparse.Namespace, defaults: ModelDefaults) -> Path:
    """Render the training videos and their manifest; what is there already stays."""
    folder = options.work / "dataset"
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / "manifest.csv"
    clips = [Clip(index=i, folder=folder, defaults=defaults) for i in range(options.videos)]
    if manifest.exists() and manifest.read_text(encoding="utf-8").count("\n") == 1 + len(clips):
        return manifest
    for done, _ in enumerate(in_processes(options.processes, Clip.render, clips), start=1):
        if done % 100 == 0 or done == len(clips):
            say(f"dataset: {done} of {len(clips)} videos")
    prompts, default = camera_prompts()
    with (
        atomic_path(manifest) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow([*TRACKS, "prompt"])
        for clip in clips:
            files = [clip.path(track).name for track in TRACKS]
            rows.writerow([*files, clip.prompt(prompts, default)])
    return manifest


def in_processes(
    count: int, call: Callable[[_Item], _Made], items: Sequence[_Item]
) -> Iterator[_Made]:
    """Results as they come, from workers of one thread each; a single one works in this process."""
    if count == 1:
        yield from map(call, items)
        return
    pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))
    try:
        for future in as_completed([pool.submit(call, item) for item in items]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # after a failure the rest need not be waited for


# --- stage: train --------------------------------------------------------------------------------


def lora_of(work: Path, run: Run) -> Path:
    """The file that a run makes."""
    return work / "lora" / run.name / "lora.safetensors"


def training_words(options: argparse.Namespace, run: Run, manifest: Path) -> list[str]:
    """Arguments of `everanimate` for a run."""
    words = ["train-lora", str(manifest), "--output", str(lora_of(options.work, run).parent)]
    words += ["--model", options.model, "--device", options.device, *run.options]
    words += ["--steps", str(options.steps // 2), "--batch-size", str(options.batch_size)]
    words += ["--lr", str(options.lr), "--gradient-checkpointing", "off"]
    words += ["--latent-cache", str(options.work / "latents")]
    if run.init:
        words += ["--init", str(lora_of(options.work, run.init))]
    return words + shlex.split(options.train_options)


def train_run(options: argparse.Namespace, run: Run, manifest: Path) -> None:
    """Make the LoRA of a run, or go on where it stopped; a finished one stays."""
    words = training_words(options, run, manifest)
    request = {
        "words": words,
        "model": model_hash(options.model),
        "manifest": sha256(manifest),
        "init": sha256(lora_of(options.work, run.init)) if run.init else None,
    }
    record = options.work / "lora" / f"{run.name}.json"
    if lora_of(options.work, run).exists():
        before = json.loads(record.read_text(encoding="utf-8"))
        changed = [name for name in request if before[name] != request[name]]
        if changed:
            raise SystemExit(
                f"{record.with_suffix('')} was trained with other {', '.join(changed)}. "
                "Remove it, or give another --work."
            )
        return
    write_json(record, request)
    say(f"train: {run.name}")
    log = record.with_suffix(".log")
    with log.open("ab") as file:
        done = subprocess.run(
            [sys.executable, "-m", "everanimate_cli", *words],
            stdout=file,
            stderr=file,
            check=False,
        )
    if done.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-3:]
        raise SystemExit(f"train-lora for {run.name} failed, see {log}: {' '.join(tail)}")


def train(options: argparse.Namespace, names: Sequence[str], manifest: Path) -> None:
    """The LoRAs of some arms; several at a time, first halves before second ones."""
    seconds = list(dict.fromkeys(run for name in names if (run := ARMS[name].run)))
    firsts = list(dict.fromkeys(run.init for run in seconds if run.init))
    for runs in (firsts, seconds):
        with ThreadPoolExecutor(options.processes) as pool:
            list(pool.map(lambda run: train_run(options, run, manifest), runs))


# --- stage: evaluate -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Job:
    """One character in one arm.

    Attributes:
        arm: Key of `ARMS`.
        camera: Before which it dances.
        index: Which character.
        num_frames: Length of the video.
        num_steps: Euler steps.
        model: As `--model`.
        device: As `--device`.
        lora: File of the arm's LoRA; None for the base and yardsticks.
        identity: What shaped the result; another one is made anew.
        path: JSON file of the result.
    """

    arm: str
    camera: Camera
    index: int
    num_frames: int
    num_steps: int
    model: str
    device: str
    lora: Path | None
    identity: dict[str, Any]
    path: Path

    @property
    def is_done(self) -> bool:
        """Whether the result is there, as long as asked for or longer."""
        if not self.path.exists():
            return False
        found = json.loads(self.path.read_text(encoding="utf-8"))
        return found["identity"] == self.identity and found["num_frames"] >= self.num_frames


class World:
    """A held-out video, rendered as it is asked for."""

    def __init__(self, camera: Camera, index: int, defaults: ModelDefaults) -> None:
        self.seed = HELD_OUT_SEED + len(CAMERAS) * index + CAMERAS.index(camera)
        turn_s = START_S + np.random.default_rng([self.seed, 12]).uniform(*FIRST_TURN_S)
        dance = Dance(self.seed, turn_after_s=turn_s)
        size = {"height": defaults.height, "width": defaults.width}
        self._scene = ToyScene(self.seed, dance, camera=camera, **size)
        self._rate_fps, self._face_size = defaults.fps, defaults.face_size
        # The frames of a chunk are asked for as its driving, then as the truth.
        self.frame = functools.lru_cache(2 * defaults.frames_per_chunk)(self._frame)

    def _time_s(self, index: int) -> float:
        return START_S + index / self._rate_fps

    def _frame(self, index: int) -> ToyFrame:
        return self._scene.frame_at(self._time_s(index))

    def person(self, index: int) -> np.ndarray:
        """[H, W] True where the person is."""
        room = self._scene.room_at(self._time_s(index)).astype(np.int16)
        return np.abs(self.frame(index).rgb - room).max(-1) > PERSON_THRESHOLD

    def stretch(self, start: int, count: int) -> tuple[Frame, Frame, Frame]:
        """Pictures, poses and faces [count, ...] from frame `start` on."""
        frames = [self.frame(index) for index in range(start, start + count)]
        side = self._face_size
        faces = [fit_frame(frame.face, side, side, "stretch") for frame in frames]
        return (
            np.stack([f.rgb for f in frames]),
            np.stack([f.pose for f in frames]),
            np.stack(faces),
        )


@functools.lru_cache(1)
def load(model: str, lora: Path | None, device: str) -> tuple[AnimatePipeline, ModelDefaults]:
    """The networks of an arm, kept for the process's next character."""
    import torch  # noqa: PLC0415

    from everanimate_cli import hub, weights  # noqa: PLC0415
    from everanimate_cli.records import LoraSpec  # noqa: PLC0415

    chosen = weights.choose_device(device)
    if chosen.type == "cpu":
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
    source = hub.locate_model(model, lambda _event: None)
    loras = [(LoraSpec(str(lora)), lora)] if lora else []
    pipeline = weights.load_pipeline(
        source, loras, chosen, torch.float32, with_image_processor=True
    )
    return pipeline, source.defaults


def make_frames(
    job: Job, world: World, pipeline: AnimatePipeline, defaults: ModelDefaults
) -> tuple[Iterator[Frame], list[int]]:
    """The video frame by frame, and the positions of frames that begin a new chunk."""
    arm = ARMS[job.arm]
    reference_u8 = world.frame(0).rgb
    if job.arm == "copy":
        return iter([reference_u8] * job.num_frames), []
    plan = ChunkPlan(
        num_frames=job.num_frames,
        frames_per_chunk=defaults.frames_per_chunk,
        overlap=arm.carry_frames or defaults.overlap,
    )
    chunks = (
        _through_vae(world, plan, pipeline)
        if job.arm == "ceiling"
        else _animate(job, world, plan, pipeline, defaults)
    )
    kept = (frames_u8[plan.kept_frames(index)] for index, frames_u8 in enumerate(chunks))
    seams = [plan.first_frame(k) + plan.overlap for k in range(1, plan.num_chunks)]
    return (frame_u8 for frames_u8 in kept for frame_u8 in frames_u8), seams


def _through_vae(world: World, plan: ChunkPlan, pipeline: AnimatePipeline) -> Iterator[Frame]:
    from everanimate_cli.memory import from_uint8, to_uint8  # noqa: PLC0415

    for chunk_index in range(plan.num_chunks):
        truth_u8, _, _ = world.stretch(plan.first_frame(chunk_index), plan.frames_per_chunk)
        yield to_uint8(pipeline.decode(pipeline.encode_video(from_uint8(truth_u8)))).cpu().numpy()


def _animate(
    job: Job,
    world: World,
    plan: ChunkPlan,
    pipeline: AnimatePipeline,
    defaults: ModelDefaults,
) -> Iterator[Frame]:
    from everanimate_cli.memory import (  # noqa: PLC0415
        chunk_noise,
        count_drawn_frames,
        draw_anchor_indices,
    )
    from everanimate_cli.rollout import Chunk, Rollout  # noqa: PLC0415

    arm = ARMS[job.arm]
    reference_u8 = world.frame(0).rgb
    num_slots = 1 if arm.memory == "pixel" else defaults.identity_slots
    # The reference given as a view stays in its slot in every chunk.
    views_u8 = [] if arm.draws_anchors else [reference_u8] * (num_slots - 1)
    num_drawn = count_drawn_frames(num_slots, len(views_u8)) if arm.memory == "latent" else 0
    seed = NOISE_SEED + job.index
    prompts, default = camera_prompts()
    rollout = Rollout(
        pipeline=pipeline,
        reference_u8=reference_u8,
        picture_u8=reference_u8,
        views_u8=views_u8,
        read_driving=lambda k: world.stretch(plan.first_frame(k), plan.frames_per_chunk)[1:],
        noise=lambda k: chunk_noise(seed, k, rollout.noise_shape),
        anchor_frame_indices=draw_anchor_indices(seed, plan.frames_per_chunk, num_drawn),
        prompt_embeds=pipeline.encode_prompt(prompts[job.camera] + default),
        num_chunks=plan.num_chunks,
        frames_per_chunk=plan.frames_per_chunk,
        overlap=plan.overlap,
        num_identity_slots=num_slots,
        num_inference_steps=job.num_steps,
        shift=defaults.shift,
        memory=arm.memory,
    )
    for made in rollout.run():
        if isinstance(made, Chunk):
            yield made.frames_u8


def score(
    made: Iterator[Frame], world: World, kept_indices: Sequence[int]
) -> tuple[dict[str, list[float]], list[Frame]]:
    """Figures of every frame against the truth, and a few frames to look at."""
    scores: dict[str, list[float]] = {}
    kept = []
    previous_u8 = None
    for index, made_u8 in enumerate(made):
        truth_u8, person = world.frame(index).rgb, world.person(index)
        shift = metrics.colour_shift(made_u8, truth_u8)
        figures = {
            "error": metrics.squared_error(made_u8, truth_u8),
            "ssim": metrics.ssim(made_u8, truth_u8),
            "person_share": float(person.mean()),
            "person_error": metrics.squared_error(made_u8, truth_u8, person)
            if person.any()
            else 0.0,
            "background_error": metrics.squared_error(made_u8, truth_u8, ~person),
            "jump": 0.0 if previous_u8 is None else metrics.frame_jump(previous_u8, made_u8),
            **shift._asdict(),
        }
        for name, value in figures.items():
            scores.setdefault(name, []).append(float(f"{value:.6g}"))
        previous_u8 = made_u8
        if index in kept_indices:
            kept.append(made_u8)
    return scores, kept


def kept_frames(num_frames: int, rate_fps: float) -> list[int]:
    """Positions of the frames that are kept to be looked at: one every 10 s, and the last."""
    every = round(KEEP_EVERY_S * rate_fps)
    return sorted({*range(0, num_frames, every), num_frames - 1})


def evaluate_one(job: Job) -> tuple[Job, float]:
    """Animate, score and write the result; returns the seconds that it took."""
    started_s, started_cpu_s = time.monotonic(), time.process_time()
    pipeline, defaults = load(job.model, job.lora, job.device)
    loaded_s = time.monotonic()
    world = World(job.camera, job.index, defaults)
    made, seams = make_frames(job, world, pipeline, defaults)
    made_s = 0.0

    def timed() -> Iterator[Frame]:
        nonlocal made_s
        while True:
            before_s = time.monotonic()
            frame_u8 = next(made, None)
            made_s += time.monotonic() - before_s
            if frame_u8 is None:
                return
            yield frame_u8

    chosen = kept_frames(job.num_frames, defaults.fps)
    scores, kept = score(islice(timed(), job.num_frames), world, chosen)
    job.path.parent.mkdir(parents=True, exist_ok=True)
    write_png(job.path.with_suffix(".png"), np.hstack(kept))
    seconds = time.monotonic() - started_s
    result = {
        "arm": job.arm,
        "camera": job.camera,
        "index": job.index,
        "seed": world.seed,
        "identity": job.identity,
        "num_frames": job.num_frames,
        "rate_fps": defaults.fps,
        "seams": seams,
        "kept": chosen,
        "seconds": {
            "all": round(seconds, 2),
            "loading": round(loaded_s - started_s, 2),
            "making": round(made_s, 2),
            "processor": round(time.process_time() - started_cpu_s, 2),
        },
        "scores": scores,
    }
    write_json(job.path, result)
    return job, seconds


def evaluate(options: argparse.Namespace, names: Sequence[str], defaults: ModelDefaults) -> None:
    """Animate and score what is missing, an arm after the other."""
    base = model_hash(options.model)
    jobs = []
    for name in names:
        arm = ARMS[name]
        lora = lora_of(options.work, arm.run) if arm.run else None
        if lora and not lora.exists():
            raise SystemExit(f"{lora} is missing. Run `train --arm {name}` first.")
        seconds = options.seconds or arm.seconds
        identity = {
            "model": base,
            "lora": sha256(lora) if lora else None,
            "steps": options.inference_steps if arm.memory else None,
        }
        jobs += [
            Job(
                arm=name,
                camera=camera,
                index=index,
                num_frames=round(seconds * defaults.fps),
                num_steps=options.inference_steps,
                model=options.model,
                device=options.device,
                lora=lora,
                identity=identity,
                path=options.work / "results" / name / f"{camera}-{index}.json",
            )
            for camera in options.camera
            for index in range(options.characters)
        ]
    waiting = [job for job in jobs if not job.is_done]
    say(f"evaluate: {len(jobs) - len(waiting)} of {len(jobs)} videos are done")
    results = in_processes(options.processes, evaluate_one, waiting)
    for done, (job, seconds) in enumerate(results, start=1):
        what = f"{job.arm}, {job.camera} {job.index}"
        say(f"evaluate: {what} in {seconds:.0f} s, {done} of {len(waiting)}")


# --- report --------------------------------------------------------------------------------------

# Measure -> (heading, unit, digits after the point)
MEASURES: dict[str, tuple[str, str, int]] = {
    "psnr": ("PSNR", " [dB]", 2),
    "ssim": ("SSIM", "", 4),
    "person": ("person", " [dB]", 2),
    "background": ("background", " [dB]", 2),
    "colour": ("colour shift", " [CIELAB]", 2),
    "seam": ("jump at seams over jump within chunks", "", 2),
}


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What an arm reached before one camera.

    Attributes:
        indices: Characters, rising.
        values: Measure -> [characters, windows].
        window_s: Length of a window.
    """

    indices: list[int]
    values: dict[str, np.ndarray]
    window_s: float

    @property
    def num_windows(self) -> int:
        """Of the shortest video."""
        return self.values["psnr"].shape[1]

    @functools.cached_property
    def slopes(self) -> dict[str, np.ndarray]:
        """Measure -> [characters] change per minute; empty for a single window."""
        if self.num_windows < 2:
            return {}
        middles_s = (np.arange(self.num_windows) + 0.5) * self.window_s
        return {
            name: np.array([metrics.slope_per_minute(middles_s, row) for row in rows])
            for name, rows in self.values.items()
        }

    def of(self, measure: str, place: int | None, indices: Sequence[int]) -> np.ndarray:
        """[characters] of a window, or the slopes for None."""
        rows = [self.indices.index(index) for index in indices]
        if place is None:
            return self.slopes[measure][rows]
        return self.values[measure][rows, place]


def window_figures(result: Mapping[str, Any], window_s: float) -> dict[str, list[float]]:
    """Every measure of one video, window by window."""
    scores = {name: np.array(values) for name, values in result["scores"].items()}
    num_frames, rate_fps = len(scores["error"]), result["rate_fps"]
    is_seam = np.zeros(num_frames, np.bool_)
    is_seam[[seam for seam in result["seams"] if seam < num_frames]] = True
    figures: dict[str, list[float]] = {name: [] for name in MEASURES}
    # Less than half a window at the end belongs to the one before.
    num_windows = max(1, round(num_frames / rate_fps / window_s))
    edges = [round(window * window_s * rate_fps) for window in range(num_windows)]
    for start, stop in pairwise((*edges, num_frames)):
        part = {name: values[start:stop] for name, values in scores.items()}
        shares = part["person_share"]
        shift = metrics.ColourShift(*(part[name].mean() for name in metrics.ColourShift._fields))
        # The first frame follows no other.
        first = int(start == 0)
        jumps, seams = part["jump"][first:], is_seam[start:stop][first:]
        has_seams = seams.any() and not seams.all()
        row = {
            "psnr": metrics.psnr_db(part["error"].mean()),
            "ssim": part["ssim"].mean(),
            "person": metrics.psnr_db((shares @ part["person_error"]) / max(shares.sum(), 1e-9)),
            "background": metrics.psnr_db(np.average(part["background_error"], weights=1 - shares)),
            "colour": shift.size,
            "seam": metrics.seam_jump(jumps, np.flatnonzero(seams).tolist())
            if has_seams
            else math.nan,
        }
        for name, value in row.items():
            figures[name].append(float(value))
    return figures


def read_figures(work: Path, window_s: float) -> dict[tuple[str, Camera], Figures]:
    """Whatever results there are, by arm and camera."""
    figures = {}
    models = set()
    for name in ARMS:
        for camera in CAMERAS:
            rows = {}
            for path in (work / "results" / name).glob(f"{camera}-*.json"):
                result = json.loads(path.read_text(encoding="utf-8"))
                models.add(result["identity"]["model"])
                rows[result["index"]] = window_figures(result, window_s)
            if not rows:
                continue
            shortest = min(len(row["psnr"]) for row in rows.values())
            indices = sorted(rows)
            values = {
                measure: np.array([rows[index][measure][:shortest] for index in indices])
                for measure in MEASURES
            }
            figures[name, camera] = Figures(indices=indices, values=values, window_s=window_s)
    if len(models) > 1:
        say(f"{work} holds results of {len(models)} models. Run `evaluate` again for all arms.")
    return figures


def window_name(place: int | None, window_s: float) -> str:
    """Such as "80-90 s"; "per minute" for None."""
    if place is None:
        return "per minute"
    return f"{place * window_s:g}-{(place + 1) * window_s:g} s"


def number(value: float, digits: int, sign: str = "") -> str:
    """A cell; a dash where there is no number."""
    return f"{value:{sign}.{digits}f}" if math.isfinite(value) else "-"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its columns after the first aligned to the right."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines)) + "\n"


def lay_out_summary(figures: Mapping[tuple[str, Camera], Figures], camera: Camera) -> str:
    """First and last window and the slopes of every arm, means over characters."""
    columns = (
        *(("psnr", 0), ("psnr", -1), ("psnr", None), ("ssim", 0), ("ssim", -1), ("ssim", None)),
        *(("person", -1), ("background", -1), ("background", None), ("colour", 0), ("colour", -1)),
        *(("seam", 0), ("seam", -1)),
    )
    of_camera = {name: one for (name, where), one in figures.items() if where == camera}
    longest = max(one.num_windows for one in of_camera.values())
    window_s = next(iter(of_camera.values())).window_s
    head = [f"{camera} camera", "characters"]
    for measure, place in columns:
        name = window_name(longest - 1 if place == -1 else place, window_s)
        head.append(f"{MEASURES[measure][0].partition(' over')[0]}, {name}")
    lines = []
    for name, one in of_camera.items():
        cells = [ARMS[name].title, str(len(one.indices))]
        for measure, place in columns:
            is_there = one.slopes if place is None else place == 0 or one.num_windows == longest
            mean = float(one.of(measure, place, one.indices).mean()) if is_there else math.nan
            cells.append(number(mean, MEASURES[measure][2], "+" if place is None else ""))
        lines.append(cells)
    return table(head, lines)


def lay_out_windows(
    figures: Mapping[tuple[str, Camera], Figures], camera: Camera, measure: str
) -> str:
    """One measure over time, means over characters."""
    of_camera = {name: one for (name, where), one in figures.items() if where == camera}
    longest = max(one.num_windows for one in of_camera.values())
    window_s = next(iter(of_camera.values())).window_s
    heading, unit, digits = MEASURES[measure]
    head = [
        f"{heading}{unit}, {camera} camera",
        *(window_name(w, window_s) for w in range(longest)),
    ]
    lines = []
    for name, one in of_camera.items():
        means = [*one.values[measure].mean(0), *[math.nan] * (longest - one.num_windows)]
        slope = float(one.slopes[measure].mean()) if one.slopes else math.nan
        cells = [ARMS[name].title, *(number(mean, digits) for mean in means)]
        lines.append([*cells, number(slope, digits, "+")])
    return table([*head, "per minute"], lines)


def compare(figures: Mapping[tuple[str, Camera], Figures]) -> list[dict[str, Any]]:
    """Paired differences between arms, in the first and last window they share and in slope."""
    rows = []
    for camera in CAMERAS:
        for name, over in COMPARISONS:
            ours, theirs = figures.get((name, camera)), figures.get((over, camera))
            if ours is None or theirs is None:
                continue
            indices = sorted({*ours.indices} & {*theirs.indices})
            last = min(ours.num_windows, theirs.num_windows) - 1
            if len(indices) < 2:
                continue
            # Slopes over different lengths are no pair.
            slopes = [None] if last and ours.num_windows == theirs.num_windows else []
            for place in (*dict.fromkeys((0, last)), *slopes):
                row: dict[str, Any] = {
                    "arm": name,
                    "over": over,
                    "camera": camera,
                    "window": window_name(place, ours.window_s),
                    "characters": len(indices),
                }
                for measure in ("psnr", "ssim", "person", "background", "colour"):
                    values = [one.of(measure, place, indices) for one in (ours, theirs)]
                    row[measure] = asdict(metrics.paired_bootstrap(*values))
                    if place is not None and measure in ("psnr", "ssim"):
                        gain = metrics.paired_bootstrap(*values, relative=True)
                        row[f"{measure}_gain"] = asdict(gain)
                rows.append(row)
    return rows


def lay_out_comparisons(rows: Sequence[Mapping[str, Any]], camera: Camera) -> str:
    """Differences with intervals; bold where the interval excludes zero."""

    def cell(row: Mapping[str, Any], key: str, digits: int, factor: float = 1) -> str:
        if key not in row:
            return "-"
        interval = metrics.Interval(*(factor * value for value in row[key].values()))
        low, high = (number(v, digits, "+") for v in (interval.low, interval.high))
        text = f"{number(interval.value, digits, '+')} [{low}, {high}]"
        return f"**{text}**" if interval.excludes_zero else text

    head = [f"{camera} camera", "characters", "window", "PSNR [dB]", "SSIM", "person [dB]"]
    head += ["background [dB]", "colour shift", "PSNR [%]", "SSIM [%]"]
    lines = [
        [
            f"{ARMS[row['arm']].title} over {ARMS[row['over']].title}",
            str(row["characters"]),
            row["window"],
            *(cell(row, measure, MEASURES[measure][2]) for measure in list(MEASURES)[:-1]),
            *(cell(row, f"{measure}_gain", 1, 100) for measure in ("psnr", "ssim")),
        ]
        for row in rows
        if row["camera"] == camera
    ]
    return table(head, lines)


def report(figures: Mapping[tuple[str, Camera], Figures]) -> str:
    """All tables."""
    comparisons = compare(figures)
    texts = ["Means over characters. Differences: paired 95 % intervals, bold if without zero.\n"]
    for camera in CAMERAS:
        if any(where == camera for _, where in figures):
            texts.append(lay_out_summary(figures, camera))
            texts.append(lay_out_comparisons(comparisons, camera))
            texts += [lay_out_windows(figures, camera, measure) for measure in MEASURES]
    return "\n".join(texts)


# Colours that also differ in brightness (Okabe and Ito), for arms that are shown together.
COLOURS = {
    **dict.fromkeys(("sink", "base-sink", "no-identity"), "#999999"),
    **dict.fromkeys(("pixel1", "base-pixel1", "exact"), "#E69F00"),
    **dict.fromkeys(("pixel5", "base-pixel5", "exact-no-gate"), "#D55E00"),
    **dict.fromkeys(("latent", "base-latent", "constant"), "#56B4E9"),
    "latent-rfm": "#0072B2",
    "no-augmentation": "#CC79A7",
    "copy": "#000000",
    "ceiling": "#009E73",
}
STYLES = {"main": "-", "ablation": "-.", "base": ":", "yardstick": "--"}
BASELINES = ("pixel1", "base-pixel1")


def plot(figures: Mapping[tuple[str, Camera], Figures], names: Sequence[str], path: Path) -> None:
    """PSNR and SSIM over time with 95 % bands, and PSNR over pixel carry of the same characters."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    cameras = [camera for camera in CAMERAS if any((name, camera) in figures for name in names)]
    if not cameras:
        raise SystemExit("no results of these arms to plot")
    baseline = next((name for name in BASELINES if (name, cameras[0]) in figures), None)
    panels: list[tuple[str, str | None]] = [("psnr", None), ("ssim", None)]
    panels += [("psnr", baseline)] if baseline else []
    canvas, axes = pyplot.subplots(
        len(panels),
        len(cameras),
        figsize=(5.5 * len(cameras), 3.2 * len(panels)),
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    for row, (measure, over) in enumerate(panels):
        heading, unit, _ = MEASURES[measure]
        axes[row, 0].set_ylabel(heading + (f" over {ARMS[over].title}" if over else "") + unit)
        for axis, camera in zip(axes[row], cameras, strict=True):
            base = figures.get((over, camera)) if over else None
            for name in names:
                one = figures.get((name, camera))
                is_shown = not over or (base and ARMS[name].group != "yardstick")
                if one and is_shown:
                    _draw_line(axis, name, one, base, measure)
            axis.grid(alpha=0.25, linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
    for axis, camera in zip(axes[0], cameras, strict=True):
        axis.set_title(f"{camera} camera")
    for axis in axes[-1]:
        axis.set_xlabel("time [s]")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="lower center", ncols=2 * len(cameras), frameon=False)
    canvas.tight_layout(rect=(0, 0.07, 1, 1))
    with atomic_path(path) as temporary:
        canvas.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    pyplot.close(canvas)


def _draw_line(axis: Any, name: str, one: Figures, base: Figures | None, measure: str) -> None:
    """An arm over time with its band; its difference to `base` if there is one."""
    indices = one.indices if base is None else sorted({*one.indices} & {*base.indices})
    num_windows = one.num_windows if base is None else min(one.num_windows, base.num_windows)
    columns = [one.of(measure, i, indices) for i in range(num_windows)]
    if base is not None:
        columns = [v - base.of(measure, i, indices) for i, v in enumerate(columns)]
    middles_s = (np.arange(num_windows) + 0.5) * one.window_s
    arm, colour = ARMS[name], COLOURS[name]
    means = [column.mean() for column in columns]
    style = STYLES[arm.group]
    axis.plot(middles_s, means, style, color=colour, label=arm.title, marker=".", linewidth=1.6)
    if len(indices) > 1 and arm.group != "yardstick":
        bands = [metrics.bootstrap(column) for column in columns]
        low, high = [band.low for band in bands], [band.high for band in bands]
        axis.fill_between(middles_s, low, high, color=colour, alpha=0.12, linewidth=0)


def draw_sheet(work: Path, defaults: ModelDefaults, names: Sequence[str], who: str) -> Frame:
    """The same moments of a character, truth above the arms.

    Args:
        work: Folder of the results.
        defaults: Of the model.
        names: Arms; those without this character are left out.
        who: Such as "still-0".
    """
    from everanimate_cli.demo import lay_out_sheet  # noqa: PLC0415

    results = {}
    for name in names:
        path = work / "results" / name / f"{who}.json"
        if path.exists():
            results[name] = json.loads(path.read_text(encoding="utf-8"))
    if not results:
        raise SystemExit(f"{work} has no results of {who}.")
    # An arm with a longer video than the others has frames that they have not.
    shared = set.intersection(*(set(result["kept"]) for result in results.values()))
    chosen = sorted(shared)
    camera, index = who.split("-")
    world = World(camera, int(index), defaults)
    rows = [("truth", np.stack([world.frame(i).rgb for i in chosen]))]
    for name, result in results.items():
        strip = read_image(work / "results" / name / f"{who}.png")
        frames = np.stack(np.hsplit(strip, len(result["kept"])))
        rows.append((ARMS[name].title, frames[[result["kept"].index(i) for i in chosen]]))
    return lay_out_sheet(world.frame(0).rgb, rows, [i / defaults.fps for i in chosen])


# --- command -------------------------------------------------------------------------------------


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Stages and options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "stages",
        nargs="*",
        help="dataset, train, evaluate; with --arm alone all three, with reports alone none",
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of everything")
    parser.add_argument("--arm", nargs="+", help=f"of {', '.join((*ARMS, *GROUPS))}, all")
    parser.add_argument("--model", default="toy", help="the base")
    parser.add_argument("--device", default="cpu", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--processes", type=int, default=1, help="at a time, one thread each")
    parser.add_argument("--videos", type=int, default=1200, help="of the dataset")
    parser.add_argument("--steps", type=int, default=2000, help="of the optimiser, both halves")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--train-options", default="", help='more for train-lora, as "--rank 16"')
    parser.add_argument("--characters", type=int, default=8, help="before each camera")
    parser.add_argument("--camera", nargs="+", choices=CAMERAS, default=CAMERAS)
    parser.add_argument("--seconds", type=float, help="of each video (default 90, ablations 30)")
    parser.add_argument("--inference-steps", type=int, default=NUM_STEPS)
    parser.add_argument("--window", type=float, default=10.0, help="seconds that are pooled")
    parser.add_argument("--table", action="store_true", help="print all tables as Markdown")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--plot", type=Path, help="PNG file; needs matplotlib")
    parser.add_argument("--sheet", type=Path, help="PNG file of frames of one character")
    parser.add_argument("--sheet-character", default="still-0", help="such as moving-3")
    options = parser.parse_args(arguments)
    unknown = {*options.stages} - {"dataset", "train", "evaluate"}
    if unknown:
        parser.error(f"unknown stage {', '.join(sorted(unknown))}")
    wants_report = options.table or options.json or options.plot or options.sheet
    if options.arm and not options.stages and not wants_report:
        options.stages = ["dataset", "train", "evaluate"]
    if not options.arm and {*options.stages} & {"train", "evaluate"}:
        parser.error("--arm says what to train or evaluate")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages that are asked for, then report."""
    options = parse_options(arguments)
    # Before torch is imported: tensors are small, so the cores are shared by processes.
    os.environ["OMP_NUM_THREADS"] = "1"
    names = choose_arms(options.arm or ["main", "yardstick"])
    if options.stages or options.sheet:
        from everanimate_cli import hub  # noqa: PLC0415

        defaults = hub.locate_model(options.model, lambda _event: None).defaults
    needs_videos = {*options.stages} & {"dataset", "train"}
    if needs_videos:
        manifest = make_dataset(options, defaults)
    if "train" in options.stages:
        train(options, names, manifest)
    if "evaluate" in options.stages:
        evaluate(options, names, defaults)
    if options.table or options.json or options.plot:
        figures = read_figures(options.work, options.window)
        if not figures:
            raise SystemExit(f"{options.work} has no results. Run `evaluate` first.")
        if options.table:
            sys.stdout.write(report(figures))
        if options.json:
            arms = [
                {"arm": name, "camera": camera, "characters": one.indices}
                | {measure: values.tolist() for measure, values in one.values.items()}
                for (name, camera), one in figures.items()
            ]
            write_json(options.json, {"arms": arms, "comparisons": compare(figures)})
        if options.plot:
            plot(figures, names, options.plot)
    if options.sheet:
        sheet = draw_sheet(options.work, defaults, names, options.sheet_character)
        write_png(options.sheet, sheet)


if __name__ == "__main__":
    main()
