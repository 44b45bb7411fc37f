"""How fast and how lean `animate` is beside diffusers' own pipeline, as Markdown tables.

    python tests/benchmarks/animate_speed.py [--model toy|PATH] [--chunks 5 20 80] [--steps 12]
        [--threads 1] [--repeats 3] [--json FILE]

Three sides make videos of as many chunks from the same model, reference, poses and faces, on the
CPU in float32, one after the other in every round, each time in a new process (not on Windows):

diffusers   Reads the poses and faces with our reader into the lists of pictures that
            `WanAnimatePipeline` takes, calls it once, writes what it returns with our writer. A
            scheduler with our noise levels makes it take our Euler steps, and it starts from the
            noise of our chunks, so that it makes the very video that "pixel" makes.
pixel       `animate` with `memory="pixel"`: the same network inputs in the same slots, through the
            product's whole path with segments on disk, run folder and joining.
latent      `animate` with the default memory, whose chunks have more slots.

Seconds are wall time of all this but the imports and the loading of the weights. A step lasts from
the end of the one before; the first of a chunk, before which much else is done, is not counted.
Ratios of time are taken between the neighbours of a round, and their median over the rounds
counts, so that other work on the machine disturbs little. Peak memory is that of the process,
libraries included.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tables import describe_machine, lay_out_targets, table

import everanimate_cli
from everanimate_cli.events import ChunkDone, Event, StepDone
from everanimate_cli.settings import (
    CARRY_FRAMES,
    TEMPORAL_STRIDE,
    TOY_MODEL,
    AnimateSettings,
    ModelDefaults,
    read_model_defaults,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# The heavy libraries are imported once, in the process that the measuring ones are forked from.
# Their memory then starts where the imports end, on all sides alike.
PRELOADED = ["everanimate_cli.animate", "diffusers.pipelines.wan.pipeline_wan_animate"]

SIDES = {
    "diffusers": "diffusers `WanAnimatePipeline`",
    "pixel": "everanimate `--memory pixel`",
    "latent": "everanimate `--memory latent`",
}
# Network -> its methods that compute.
CALLS = {
    "transformer": ("forward", "embed_pose", "embed_face"),
    "vae": ("encode", "decode"),
    "image_encoder": ("forward",),
    "text_encoder": ("forward",),
}
LIBRARIES = ("torch", "diffusers", "av")
SEED = 0
OVERLAP = CARRY_FRAMES[0]  # of pixel memory

MAX_TIME_RATIO = 0.9
MAX_MEMORY_RATIO = 1.05
MAX_COST_RATIO = 1.05  # last to first chunks of a run: "constant"
MAX_OUTSIDE_SHARE = 0.10


@dataclass(frozen=True, kw_only=True)
class Job:
    """One video to be made and measured.

    Attributes:
        side: Key of `SIDES`.
        model: Checkpoint folder.
        inputs: Folder with `reference.png`, `pose.mp4` and `face.mp4`, all of the model's sizes.
        output: Video to write.
        num_chunks: Length.
        steps: Euler steps per chunk.
        threads: Of torch.
    """

    side: str
    model: Path
    inputs: Path
    output: Path
    num_chunks: int
    steps: int
    threads: int

    @property
    def defaults(self) -> ModelDefaults:
        """What the model was trained for."""
        return read_model_defaults(self.model)

    @property
    def num_frames(self) -> int:
        """Frames that fill the chunks to the last."""
        defaults = self.defaults
        overlap = defaults.overlap if self.side == "latent" else OVERLAP
        stride = defaults.frames_per_chunk - overlap
        return defaults.frames_per_chunk + (self.num_chunks - 1) * stride

    @property
    def num_slots(self) -> int:
        """Latent frames of one chunk in the transformer."""
        num_identity_slots = self.defaults.identity_slots if self.side == "latent" else 1
        return num_identity_slots + (self.defaults.frames_per_chunk - 1) // TEMPORAL_STRIDE + 1


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was seen of one job.

    Attributes:
        side: Key of `SIDES`.
        num_chunks: Length.
        wall_s: From the input files to the video, without loading the weights.
        cpu_s: Processor time in `wall_s`, of all threads.
        networks_s: Network -> wall time of its calls in `wall_s`.
        inside_s: Part of `wall_s` in which a network computed; two may do so at a time.
        steps_s: Wall time of each step but the first of each chunk.
        chunks_s: Wall time of each chunk; empty for diffusers, which does not tell.
        peak_mib: Most memory of the process.
    """

    side: str
    num_chunks: int
    wall_s: float
    cpu_s: float
    networks_s: dict[str, float]
    inside_s: float
    steps_s: list[float]
    chunks_s: list[float]
    peak_mib: float

    @property
    def step_s(self) -> float | None:
        """Median seconds of a step; None where chunks have only one."""
        return statistics.median(self.steps_s) if self.steps_s else None

    @property
    def chunk_s(self) -> float:
        """Seconds per chunk, with everything that is done once."""
        return self.wall_s / self.num_chunks

    @property
    def outside_share(self) -> float:
        """Part of the time that passes outside the networks."""
        return 1 - self.inside_s / self.wall_s

    @property
    def cost_ratio(self) -> float:
        """Median cost of the last quarter of the chunks over that of the first quarter."""
        quarter = -(-len(self.chunks_s) // 4)
        first, last = self.chunks_s[:quarter], self.chunks_s[-quarter:]
        return statistics.median(last) / statistics.median(first)


# --- in the measuring processes ------------------------------------------------------------------


@dataclass
class Stopwatch:
    """Time spent in the blocks of `runs`, without those of `pauses`, and in calls of networks."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    networks_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CALLS, 0.0))
    inside_s: float = 0.0
    steps_s: list[float] = field(default_factory=list)
    _num_pauses: int = 0
    _num_calls: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _step_ended_s: float = 0.0

    @contextmanager
    def runs(self) -> Iterator[None]:
        """Count the time of a block."""
        self._add(-1)
        yield
        self._add(1)

    @contextmanager
    def pauses(self) -> Iterator[None]:
        """Do not count the time of a block within `runs`; may be nested."""
        if not self._num_pauses:
            self._add(1)
        self._num_pauses += 1
        yield
        self._num_pauses -= 1
        if not self._num_pauses:
            self._add(-1)

    def _add(self, sign: int) -> None:
        self.wall_s += sign * time.perf_counter()
        self.cpu_s += sign * time.process_time()

    def end_step(self, step_index: int) -> None:
        """Note that a step of a chunk is over."""
        now_s = time.perf_counter()
        if step_index > 0:
            self.steps_s.append(now_s - self._step_ended_s)
        self._step_ended_s = now_s

    def watch(self, **networks: Any) -> None:
        """Time all calls of networks from now on; None and other parts of a pipeline pass."""
        for name, network in networks.items():
            for method in CALLS[name] if network is not None else ():
                if hasattr(network, method):  # diffusers' transformer embeds within `forward`
                    setattr(network, method, self._timed(name, getattr(network, method)))

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started_s = self._count_call(1)
            try:
                return call(*args, **kwargs)
            finally:
                ended_s = self._count_call(-1)
                self.networks_s[name] += ended_s - started_s

        return timed

    def _count_call(self, change: int) -> float:
        """The time; what passes while any network computes is added to `inside_s`."""
        with self._lock:
            now_s = time.perf_counter()
            if self._num_calls == 0:
                self.inside_s -= now_s
            self._num_calls += change
            if self._num_calls == 0:
                self.inside_s += now_s
            return now_s


def measure(job: Job) -> Measurement:
    """Make a video in this process, which must not have made another one."""
    import torch  # noqa: PLC0415  # see `PRELOADED`

    torch.set_num_threads(job.threads)
    watch = Stopwatch()
    chunks_s: list[float] = []
    if job.side == "diffusers":
        run_diffusers(job, watch)
    else:
        run_everanimate(job, watch, chunks_s)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
    return Measurement(
        side=job.side,
        num_chunks=job.num_chunks,
        wall_s=watch.wall_s,
        cpu_s=watch.cpu_s,
        networks_s=watch.networks_s,
        inside_s=watch.inside_s,
        steps_s=watch.steps_s,
        chunks_s=chunks_s,
        peak_mib=peak / (2**20 if platform.system() == "Darwin" else 2**10),
    )


def run_everanimate(job: Job, watch: Stopwatch, chunks_s: list[float]) -> None:
    """Make the video with `animate`, as the command does."""
    from everanimate_cli import checkpoint, placement, weights  # noqa: PLC0415  # see `PRELOADED`
    from everanimate_cli.animate import animate  # noqa: PLC0415

    settings = AnimateSettings(
        ref=job.inputs / "reference.png",
        pose=job.inputs / "pose.mp4",
        face=job.inputs / "face.mp4",
        output=job.output,
        frames=job.num_frames,
        model=str(job.model),
        memory="latent" if job.side == "latent" else "pixel",
        steps=job.steps,
        seed=SEED,
        device="cpu",
        overwrite=True,
    )

    def not_timed(call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def paused(*args: Any, **kwargs: Any) -> Any:
            with watch.pauses():
                result = call(*args, **kwargs)
                if call is load_pipeline:
                    watch.watch(**{name: getattr(result, name) for name in CALLS})
                elif call is load_text_encoder:
                    watch.watch(text_encoder=result[0])
                return result

        return paused

    load_pipeline, load_text_encoder = weights.load_pipeline, weights.load_text_encoder
    for module, name in (
        (checkpoint, "check_checkpoint"),
        (checkpoint, "checkpoint_hash"),
        (placement, "read_sizes"),
        (weights, "load_pipeline"),
        (weights, "load_text_encoder"),
    ):
        setattr(module, name, not_timed(getattr(module, name)))

    def listen(event: Event) -> None:
        if isinstance(event, StepDone):
            watch.end_step(event.step_index)
        elif isinstance(event, ChunkDone):
            chunks_s.append(event.seconds)

    with watch.runs():
        animate(settings, listen)


def run_diffusers(job: Job, watch: Stopwatch) -> None:
    """Make the video with diffusers' pipeline, between our reader and our writer."""
    import numpy as np  # noqa: PLC0415  # see `PRELOADED`
    import torch  # noqa: PLC0415
    from diffusers import (  # noqa: PLC0415
        FlowMatchEulerDiscreteScheduler,
        WanAnimatePipeline,
    )
    from PIL import Image  # noqa: PLC0415

    from everanimate_cli.encode import VideoWriter  # noqa: PLC0415
    from everanimate_cli.memory import chunk_noise  # noqa: PLC0415
    from everanimate_cli.schedule import shifted_sigmas  # noqa: PLC0415
    from everanimate_cli.video import VideoReader  # noqa: PLC0415

    defaults = job.defaults

    class OurNoiseLevels(FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, num_inference_steps: int, device: torch.device) -> None:
            sigmas = shifted_sigmas(num_inference_steps, defaults.shift)[:-1].tolist()
            super().set_timesteps(sigmas=sigmas, device=device)

    class OurNoise(WanAnimatePipeline):
        num_chunks_begun = 0

        def prepare_latents(self, batch_size: int, **given: Any) -> torch.Tensor:
            stride = self.vae_scale_factor_spatial
            size = (given["height"] // stride, given["width"] // stride)
            shape = (batch_size, given["num_channels_latents"], job.num_slots, *size)
            self.num_chunks_begun += 1
            return chunk_noise(SEED, self.num_chunks_begun - 1, shape)

    pipeline = OurNoise.from_pretrained(job.model, dtype=torch.float32, local_files_only=True)
    pipeline.scheduler = OurNoiseLevels(shift=1.0)
    pipeline.set_progress_bar_config(disable=True)
    watch.watch(**{name: getattr(pipeline, name) for name in CALLS})

    def end_step(_: Any, step_index: int, *_others: Any) -> dict[str, Any]:
        watch.end_step(step_index)
        return {}

    with watch.runs():
        pictures = {}
        for name in ("pose", "face"):
            with VideoReader(job.inputs / f"{name}.mp4") as reader:
                frames_u8 = reader.read(range(job.num_frames))
            pictures[name] = [Image.fromarray(frame_u8) for frame_u8 in frames_u8]
        with Image.open(job.inputs / "reference.png") as opened:
            reference = opened.convert("RGB")
        frames = pipeline(
            image=reference,
            pose_video=pictures["pose"],
            face_video=pictures["face"],
            prompt=defaults.prompt,
            height=defaults.height,
            width=defaults.width,
            segment_frame_length=defaults.frames_per_chunk,
            prev_segment_conditioning_frames=OVERLAP,
            num_inference_steps=job.steps,
            guidance_scale=1.0,
            callback_on_step_end=end_step,
        ).frames[0]  # [S, H, W, 3] float32 in [0, 1]
        with VideoWriter(
            job.output, height=defaults.height, width=defaults.width, rate=defaults.fps
        ) as writer:
            for frame in frames:
                writer.write((frame[None] * 255).astype(np.uint8))


# --- in the main process -------------------------------------------------------------------------


def render_inputs(folder: Path, defaults: ModelDefaults, num_frames: int) -> None:
    """Write a reference and a dance of the toy world at the sizes that the model takes."""
    from everanimate_cli.encode import VideoWriter  # noqa: PLC0415
    from everanimate_cli.images import fit_frame, write_png  # noqa: PLC0415  # needs no torch
    from everanimate_cli.toyworld import ToyScene  # noqa: PLC0415

    height, width, side = defaults.height, defaults.width, defaults.face_size
    reference_u8 = ToyScene(SEED, SEED, height=height, width=width).reference()
    write_png(folder / "reference.png", reference_u8)
    writer = partial(VideoWriter, rate=defaults.fps, crf=12)
    with (
        writer(folder / "pose.mp4", height=height, width=width) as poses,
        writer(folder / "face.mp4", height=side, width=side) as faces,
    ):
        scene = ToyScene(SEED + 1, SEED, height=height, width=width)
        for frame in scene.frames(num_frames, rate_fps=defaults.fps):
            poses.write(frame.pose[None])
            faces.write(fit_frame(frame.face, side, side, "stretch")[None])


def psnr_of_videos(first: Path, second: Path) -> float:
    """How alike two videos are, in dB over all their frames."""
    import numpy as np  # noqa: PLC0415

    from everanimate_cli.video import VideoReader  # noqa: PLC0415

    with VideoReader(first) as one, VideoReader(second) as other:
        frames = (reader.read(range(len(reader))).astype(np.float64) for reader in (one, other))
        error = np.square(np.subtract(*frames)).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-12)))


def measure_in_turn(jobs: Sequence[Job], num_rounds: int) -> list[list[Measurement]]:
    """Do all jobs in every round, each in a new process; one line of progress for each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    rounds = []
    for round_index in range(num_rounds):
        rounds.append([])
        for job in jobs:
            with ProcessPoolExecutor(1, mp_context=context) as new_process:
                made = new_process.submit(measure, job).result()
            rounds[-1].append(made)
            sys.stderr.write(
                f"round {round_index + 1} of {num_rounds}, {job.num_chunks} chunks, {job.side}: "
                f"{made.chunk_s:.3f} s per chunk, {made.peak_mib:.0f} MiB\n"
            )
    return rounds


@dataclass(frozen=True, kw_only=True)
class Row:
    """Medians over the rounds of one job.

    Attributes:
        side: Key of `SIDES`.
        num_chunks: Length.
        num_slots: Latent frames of one chunk in the transformer.
        chunk_s: Seconds per chunk.
        chunk_cpu_s: Processor seconds per chunk, which other work on the machine changes less.
        frame_s: Seconds per frame of the video.
        time_ratio: Seconds over those of diffusers in the same round.
        step_s: Seconds of a step; None where chunks have only one.
        step_ratio: Seconds of a step over those of diffusers in the same round.
        networks_s: Network -> seconds per chunk.
        outside_share: Part of the time that passes outside the networks.
        cost_ratio: Last quarter of the chunks over the first; None for diffusers.
        peak_mib: Most memory of the process.
    """

    side: str
    num_chunks: int
    num_slots: int
    chunk_s: float
    chunk_cpu_s: float
    frame_s: float
    time_ratio: float
    step_s: float | None
    step_ratio: float | None
    networks_s: dict[str, float]
    outside_share: float
    cost_ratio: float | None
    peak_mib: float


def summarise(jobs: Sequence[Job], rounds: Sequence[Sequence[Measurement]]) -> list[Row]:
    """One row per job."""
    of_diffusers = {
        job.num_chunks: [made[index] for made in rounds]
        for index, job in enumerate(jobs)
        if job.side == "diffusers"
    }
    rows = []
    for index, job in enumerate(jobs):
        made = [one_round[index] for one_round in rounds]
        neighbours = list(zip(made, of_diffusers[job.num_chunks], strict=True))
        steps_s = [(a.step_s, b.step_s) for a, b in neighbours if a.step_s and b.step_s]
        has_costs = job.side != "diffusers"
        rows.append(
            Row(
                side=job.side,
                num_chunks=job.num_chunks,
                num_slots=job.num_slots,
                chunk_s=statistics.median(one.chunk_s for one in made),
                chunk_cpu_s=statistics.median(one.cpu_s for one in made) / job.num_chunks,
                frame_s=statistics.median(one.wall_s for one in made) / job.num_frames,
                time_ratio=statistics.median(a.wall_s / b.wall_s for a, b in neighbours),
                step_s=statistics.median(ours for ours, _ in steps_s) if steps_s else None,
                step_ratio=(
                    statistics.median(ours / theirs for ours, theirs in steps_s)
                    if steps_s
                    else None
                ),
                networks_s={
                    name: statistics.median(one.networks_s[name] for one in made) / job.num_chunks
                    for name in made[0].networks_s
                },
                outside_share=statistics.median(one.outside_share for one in made),
                cost_ratio=statistics.median(one.cost_ratio for one in made) if has_costs else None,
                peak_mib=statistics.median(one.peak_mib for one in made),
            )
        )
    return rows


def check(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The targets: what, its value, its limit and whether it is met."""
    targets: list[tuple[str, float, float]] = []
    for side in ("pixel", "latent"):
        of_side = sorted((row for row in rows if row.side == side), key=lambda row: row.num_chunks)
        shortest, longest = of_side[0], of_side[-1]
        if side == "pixel":
            targets += [
                (
                    f"time per chunk over diffusers', {row.num_chunks} chunks, pixel",
                    row.time_ratio,
                    MAX_TIME_RATIO,
                )
                for row in of_side
            ]
            if longest.step_ratio is not None:
                targets.append(
                    (
                        f"time per step over diffusers', {longest.num_chunks} chunks, pixel",
                        longest.step_ratio,
                        MAX_TIME_RATIO,
                    )
                )
        span = f"{longest.num_chunks} chunks over {shortest.num_chunks}"
        assert longest.cost_ratio is not None
        targets += [
            (
                f"peak memory, {span}, {side}",
                longest.peak_mib / shortest.peak_mib,
                MAX_MEMORY_RATIO,
            ),
            (
                f"cost of a chunk, last quarter over first of {longest.num_chunks}, {side}",
                longest.cost_ratio,
                MAX_COST_RATIO,
            ),
            (
                f"share of time outside the networks, {longest.num_chunks} chunks, {side}",
                longest.outside_share,
                MAX_OUTSIDE_SHARE,
            ),
        ]
    return [
        {"target": what, "value": value, "limit": limit, "met": value <= limit}
        for what, value, limit in targets
    ]


def lay_out_rows(rows: Sequence[Row]) -> str:
    """The figures as a table; times of the networks in milliseconds per chunk."""
    head = [
        "",
        "slots",
        "chunks",
        "s / chunk",
        "over diffusers",
        "ms / step",
        "over diffusers",
        "CPU s / chunk",
        "ms / frame",
        "transformer ms",
        "VAE ms",
        "CLIP + text ms",
        "outside",
        "peak MiB",
    ]
    lines = []
    for row in rows:
        spent_ms = {name: 1000 * seconds for name, seconds in row.networks_s.items()}
        lines.append(
            [
                SIDES[row.side],
                f"{row.num_slots}",
                f"{row.num_chunks}",
                f"{row.chunk_s:.3f}",
                f"{row.time_ratio:.2f}",
                "" if row.step_s is None else f"{1000 * row.step_s:.1f}",
                "" if row.step_ratio is None else f"{row.step_ratio:.2f}",
                f"{row.chunk_cpu_s:.3f}",
                f"{1000 * row.frame_s:.1f}",
                f"{spent_ms['transformer']:.0f}",
                f"{spent_ms['vae']:.0f}",
                f"{spent_ms['image_encoder'] + spent_ms['text_encoder']:.0f}",
                f"{row.outside_share:.1%}",
                f"{row.peak_mib:.0f}",
            ]
        )
    return table(head, lines)


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=TOY_MODEL, help="toy or a checkpoint folder")
    parser.add_argument("--chunks", type=int, nargs="+", default=[5, 20, 80])
    parser.add_argument("--steps", type=int, default=12, help="Euler steps per chunk")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    # Before the process that the measuring ones are forked from reads it.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    toy_folder = Path(everanimate_cli.__file__).parent / "toy_model"
    model = toy_folder if options.model == TOY_MODEL else Path(options.model)
    defaults = read_model_defaults(model)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        jobs = [
            Job(
                side=side,
                model=model,
                inputs=work / f"{num_chunks}",
                output=work / f"{side}-{num_chunks}.mp4",
                num_chunks=num_chunks,
                steps=options.steps,
                threads=options.threads,
            )
            for num_chunks in options.chunks
            for side in SIDES
        ]
        for inputs in {job.inputs for job in jobs}:
            inputs.mkdir()
            num_frames = max(job.num_frames for job in jobs if job.inputs == inputs)
            render_inputs(inputs, defaults, num_frames)
        rounds = measure_in_turn(jobs, options.repeats)
        shortest = min(options.chunks)
        alike_db = psnr_of_videos(
            work / f"diffusers-{shortest}.mp4", work / f"pixel-{shortest}.mp4"
        )
    rows = summarise(jobs, rounds)
    targets = check(rows)
    setting = (
        f"{defaults.width}x{defaults.height}, {defaults.frames_per_chunk} frames per chunk, "
        f"{options.steps} steps, {options.threads} thread(s), median of {options.repeats}; "
        f"{describe_machine(*LIBRARIES)}."
    )
    same_work = f"PSNR between diffusers' video and that of pixel memory: {alike_db:.1f} dB."
    sys.stdout.write(
        "\n".join([setting, same_work, "", lay_out_rows(rows), lay_out_targets(targets)])
    )
    if options.json:
        figures = {
            "setting": setting,
            "psnr_db": alike_db,
            "rows": [asdict(row) for row in rows],
            "targets": targets,
            "rounds": [[asdict(one) for one in one_round] for one_round in rounds],
        }
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
