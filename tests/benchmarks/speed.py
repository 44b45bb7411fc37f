"""What each option that makes sampling faster brings on this machine, as a Markdown table.

    python tests/benchmarks/speed.py [--model toy|FOLDER] [--chunks 3] [--steps 12] [--threads 1]
        [--repeats 5] [--only NAME ...] [--json FILE]

Every way is measured in turn with the plain one, neighbours in time, on the CPU in float32; the
median of their ratios counts, so that other work on the machine disturbs little. Times are CPU
seconds of the process, except for "overlap", whose point is the time on the wall. The time of a
chunk is that of the chunks after the first, which measures for the step cache and compiles.
PSNR is that of all frames after the first chunk to those of the plain way, whose own distance from
the truth of the toy world is printed for comparison.

once        What the steps of a chunk share (text, picture, positions) computed in every step, as
            before, and once.
math        `--attention sdpa-math`.
compile     `--compile`.
cache-X     `--step-cache mag --step-cache-threshold X`.
fast        `--fast`: fewer steps; the toy has no step-distilled LoRA.
vae-last    Encoding and decoding with the VAE's weights channels last, which is how they are.
overlap     Whole runs of `animate` without and with `--concurrent`, decoding, encoding and writing
            included; "-reference" with `--clip-image reference`, whose decoding overlaps too.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from animate_speed import LIBRARIES
from tables import describe_machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from everanimate_cli.pipeline import AnimatePipeline
    from everanimate_cli.rollout import Rollout
    from everanimate_cli.settings import ModelDefaults

    Frames = NDArray[np.uint8]
    Way = Callable[[], tuple[float, Frames | None]]

SEED = 2_000_000
START_S = 50.0
THRESHOLDS = (0.03, 0.06, 0.12, 0.24, 0.5)
STEPS_PER_SAMPLE = 10  # of "once": single steps are too short to be timed


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way beside the plain one.

    Attributes:
        name: Of the way.
        unit: What is timed.
        plain_s: Seconds of the plain way, median.
        seconds: Of this one, median.
        ratio: Median of the ratios of neighbours; below 1 is faster.
        spread: Lower and upper quartile of the ratios.
        psnr_db: Of the frames to those of the plain way; None where they are the same or none.
        is_equal: Whether they are the same to the bit; None where there are none.
    """

    name: str
    unit: str
    plain_s: float
    seconds: float
    ratio: float
    spread: tuple[float, float]
    psnr_db: float | None
    is_equal: bool | None


def compare(name: str, unit: str, plain: Way, other: Way, repeats: int) -> Row:
    """Measure two ways in turn, after a round that does not count."""
    pairs = []
    plain()
    other()
    for _ in range(repeats):
        (plain_s, expected), (other_s, made) = plain(), other()
        pairs.append((plain_s, other_s))
    ratios = sorted(other_s / plain_s for plain_s, other_s in pairs)
    quartiles = statistics.quantiles(ratios, n=4) if repeats > 1 else [ratios[0]] * 3
    equal = None if expected is None or made is None else bool((expected == made).all())
    return Row(
        name=name,
        unit=unit,
        plain_s=statistics.median(plain_s for plain_s, _ in pairs),
        seconds=statistics.median(other_s for _, other_s in pairs),
        ratio=statistics.median(ratios),
        spread=(quartiles[0], quartiles[2]),
        psnr_db=None if equal is not False else psnr(made, expected),
        is_equal=equal,
    )


def clock() -> float:
    """Seconds of work of this process: others on the machine count less than by the wall's."""
    return time.process_time()


def psnr(made: Frames, expected: Frames) -> float:
    """Over all values of uint8 frames [dB]."""
    import numpy as np  # noqa: PLC0415

    error = ((made.astype(np.float64) - expected) ** 2).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-12)))


class Bench:
    """The model, and a dance of the toy world for it."""

    def __init__(self, model: str, num_chunks: int, steps: int) -> None:
        import numpy as np  # noqa: PLC0415  # after the number of threads is set
        import torch  # noqa: PLC0415

        from everanimate_cli import hub, weights  # noqa: PLC0415
        from everanimate_cli.memory import chunk_noise, draw_anchor_indices  # noqa: PLC0415
        from everanimate_cli.rollout import Rollout  # noqa: PLC0415
        from everanimate_cli.toyworld import ToyScene  # noqa: PLC0415

        source = hub.locate_model(model, lambda _: None)
        self.defaults: ModelDefaults = source.defaults
        self.pipeline: AnimatePipeline = weights.load_pipeline(
            source, [], torch.device("cpu"), torch.float32
        )
        defaults, self.num_chunks, self.steps = source.defaults, num_chunks, steps
        per_chunk, overlap = defaults.frames_per_chunk, defaults.overlap
        stride = per_chunk - overlap
        scene = ToyScene(SEED, SEED, height=defaults.height, width=defaults.width)
        num_frames = (num_chunks - 1) * stride + per_chunk
        frames = [scene.frame_at(START_S + k / defaults.fps) for k in range(num_frames)]
        self.truth, pose, face = (
            np.stack([getattr(frame, name) for frame in frames]) for name in ("rgb", "pose", "face")
        )
        side = self.pipeline.face_size
        if face.shape[1] != side:
            from everanimate_cli.images import fit_frame  # noqa: PLC0415

            face = np.stack([fit_frame(one, side, side, "stretch") for one in face])

        def read_driving(chunk_index: int) -> tuple[Frames, Frames]:
            window = slice(chunk_index * stride, chunk_index * stride + per_chunk)
            return pose[window], face[window]

        num_slots = defaults.identity_slots
        self.rollout = Rollout(
            pipeline=self.pipeline,
            reference_u8=self.truth[0],
            picture_u8=self.truth[0],
            views_u8=[],
            read_driving=read_driving,
            noise=lambda k: chunk_noise(1, k, self.rollout.noise_shape),
            anchor_frame_indices=draw_anchor_indices(1, per_chunk, num_slots - 1),
            prompt_embeds=self.pipeline.encode_prompt(defaults.prompt),
            num_chunks=num_chunks,
            frames_per_chunk=per_chunk,
            overlap=overlap,
            num_identity_slots=num_slots,
            num_inference_steps=steps,
            shift=defaults.shift,
        )

    def later_chunks(self, rollout: Rollout) -> tuple[float, Frames]:
        """(seconds per chunk, frames) of the chunks after the first."""
        import numpy as np  # noqa: PLC0415

        from everanimate_cli.rollout import Chunk  # noqa: PLC0415

        started_s, made = 0.0, []
        for chunk in rollout.run():
            if not isinstance(chunk, Chunk):
                continue
            if chunk.chunk_index == 0:
                started_s = clock()
            else:
                made.append(chunk.frames_u8)
        return (clock() - started_s) / (self.num_chunks - 1), np.concatenate(made)

    def later_truth(self) -> Frames:
        """What the frames of `later_chunks` should show."""
        import numpy as np  # noqa: PLC0415

        stride = self.defaults.frames_per_chunk - self.defaults.overlap
        first = [k * stride for k in range(1, self.num_chunks)]
        return np.concatenate([self.truth[k : k + self.defaults.frames_per_chunk] for k in first])

    def plain(self) -> tuple[float, Frames]:
        """The chunk loop without any option."""
        return self.later_chunks(self.rollout)


def measure_transformer(
    bench: Bench, name: str, change: Callable[[Any], None], repeats: int
) -> Row:
    """A changed transformer beside the plain one."""
    first = bench.pipeline.transformer
    changed = copy.deepcopy(first)
    change(changed)

    def other() -> tuple[float, Frames]:
        bench.pipeline.transformer = changed
        try:
            return bench.plain()
        finally:
            bench.pipeline.transformer = first

    return compare(name, "chunk", bench.plain, other, repeats)


def measure_once(bench: Bench, repeats: int) -> Row:
    """Steps of the network that share nothing beside steps that do."""
    import torch  # noqa: PLC0415

    from everanimate_cli.rollout import RolloutState  # noqa: PLC0415
    from everanimate_cli.transformer import Shared  # noqa: PLC0415

    state = RolloutState()
    given = bench.rollout._conditioning(state, *bench.rollout.read_driving(0))
    latents = bench.rollout.noise(0)
    timestep = torch.tensor([700.0], dtype=torch.float64)

    def run(*, shares: bool) -> tuple[float, None]:
        shared = Shared()
        started_s = clock()
        for _ in range(STEPS_PER_SAMPLE):
            branch = shared if shares else Shared()
            bench.pipeline._velocity(latents, timestep, given, 1.0, [branch])
        return (clock() - started_s) / STEPS_PER_SAMPLE, None

    return compare("once", "step", lambda: run(shares=False), lambda: run(shares=True), 3 * repeats)


def measure_layout(bench: Bench, repeats: int) -> Iterator[Row]:
    """Encoding and decoding with contiguous weights beside channels last."""
    import torch  # noqa: PLC0415

    from everanimate_cli.acceleration import use_channels_last  # noqa: PLC0415
    from everanimate_cli.memory import from_uint8, to_uint8  # noqa: PLC0415

    first, last = copy.copy(bench.pipeline), copy.copy(bench.pipeline)
    first.vae, last.vae = copy.deepcopy(first.vae), copy.deepcopy(first.vae)
    for module in first.vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.weight.data = module.weight.data.contiguous()
    use_channels_last(last.vae)
    latents = bench.rollout.noise(0)[:, :, bench.defaults.identity_slots :]
    pixels = from_uint8(bench.rollout.read_driving(0)[0])

    def encode(pipeline: AnimatePipeline) -> tuple[float, None]:
        started_s = clock()
        pipeline.encode_video(pixels)
        return clock() - started_s, None

    def decode(pipeline: AnimatePipeline) -> tuple[float, Frames]:
        started_s = clock()
        frames_u8 = to_uint8(pipeline.decode(latents)).numpy()
        return clock() - started_s, frames_u8

    for name, unit, work in (("vae-last", "encoding", encode), ("vae-last", "decoding", decode)):
        yield compare(
            name, unit, lambda work=work: work(first), lambda work=work: work(last), 3 * repeats
        )


def measure_overlap(bench: Bench, model: str, clip_image: str, repeats: int) -> Row:
    """Whole runs of `animate`, whose files must be the same."""
    import numpy as np  # noqa: PLC0415

    from everanimate_cli.animate import animate  # noqa: PLC0415
    from everanimate_cli.encode import VideoWriter  # noqa: PLC0415
    from everanimate_cli.images import write_png  # noqa: PLC0415
    from everanimate_cli.settings import AnimateSettings  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_png(folder / "reference.png", bench.truth[0])
        stride = bench.defaults.frames_per_chunk - bench.defaults.overlap
        for index, kind in enumerate(("pose", "face")):
            driving = [bench.rollout.read_driving(k)[index] for k in range(bench.num_chunks)]
            frames = np.concatenate([part[:stride] for part in driving])
            height, width = frames.shape[1:3]
            path = folder / f"{kind}.mp4"
            with VideoWriter(path, height=height, width=width, rate=bench.defaults.fps) as writer:
                writer.write(frames)

        def run(*, concurrent: bool) -> tuple[float, Frames]:
            settings = AnimateSettings(
                ref=folder / "reference.png",
                pose=folder / "pose.mp4",
                face=folder / "face.mp4",
                output=folder / "out.mp4",
                model=model,
                frames=len(bench.truth),
                steps=bench.steps,
                clip_image=clip_image,  # type: ignore[arg-type]
                concurrent=concurrent,
                device="cpu",
                dtype="float32",
                overwrite=True,
            )
            facts = animate(settings, lambda _: None).facts
            made = np.frombuffer((folder / "out.mp4").read_bytes(), np.uint8)
            return facts["timings"]["chunks_s"] / bench.num_chunks, made

        return compare(
            "overlap" if clip_image == "previous" else "overlap-reference",
            "chunk",
            lambda: run(concurrent=False),
            lambda: run(concurrent=True),
            repeats,
        )


def measure_all(bench: Bench, model: str, only: Sequence[str], repeats: int) -> Iterator[Row]:
    """The rows, one after the other; those of `only`, or all."""
    from everanimate_cli.acceleration import compile_blocks, use_attention  # noqa: PLC0415

    def is_wanted(name: str) -> bool:
        return not only or name in only

    if is_wanted("once"):
        yield measure_once(bench, repeats)
    if is_wanted("math"):
        yield measure_transformer(
            bench, "math", lambda network: use_attention(network, "sdpa-math"), repeats
        )
    if is_wanted("compile"):
        yield measure_transformer(bench, "compile", compile_blocks, repeats)
    ways = {f"cache-{x:g}": replace(bench.rollout, step_cache_threshold=x) for x in THRESHOLDS}
    ways["fast"] = replace(bench.rollout, num_inference_steps=bench.defaults.fast_steps)
    for name, rollout in ways.items():
        if is_wanted(name):
            yield compare(
                name,
                "chunk",
                bench.plain,
                lambda rollout=rollout: bench.later_chunks(rollout),  # type: ignore[misc]
                repeats,
            )
    if is_wanted("vae-last"):
        yield from measure_layout(bench, repeats)
    for clip_image in ("previous", "reference"):
        if is_wanted("overlap" if clip_image == "previous" else "overlap-reference"):
            yield measure_overlap(bench, model, clip_image, repeats)


def lay_out(row: Row) -> str:
    """One line of the table."""
    pixels = f"{row.psnr_db:.1f} dB" if row.psnr_db is not None else "same" if row.is_equal else ""
    low, high = row.spread
    return (
        f"| {row.name} | {row.unit} | {1e3 * row.plain_s:.1f} | {1e3 * row.seconds:.1f} | "
        f"**{row.ratio:.2f}** ({low:.2f} to {high:.2f}) | {pixels} |"
    )


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="toy", help="toy or a checkpoint folder")
    parser.add_argument("--chunks", type=int, default=3, help="length, at least 2")
    parser.add_argument("--steps", type=int, default=12, help="Euler steps per chunk")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of each row")
    parser.add_argument("--only", nargs="+", default=[], help="rows to measure")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # before torch is imported
    bench = Bench(options.model, options.chunks, options.steps)
    truth_db = psnr(bench.plain()[1], bench.later_truth())
    print(f"{describe_machine(*LIBRARIES)}; threads {options.threads}; {options.steps} steps.\n")
    print(f"Plain to the truth: {truth_db:.2f} dB.\n")
    print("| way | of a | plain [ms] | this [ms] | ratio (quartiles) | frames to plain |")
    print("|---|---|---:|---:|---|---|")
    rows = []
    for row in measure_all(bench, options.model, options.only, options.repeats):
        rows.append(row)
        print(lay_out(row), flush=True)
    if options.json is not None:
        figures = {
            "machine": describe_machine(*LIBRARIES),
            "threads": options.threads,
            "steps": options.steps,
            "chunks": options.chunks,
            "truth_psnr_db": truth_db,
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
