"""How fast `everanimate eval` measures: two videos of 832x480 at 25 frames a second.

    python tests/benchmarks/eval_speed.py [--seconds 20] [--cores 2]

Prints frames per second of decoding both videos and measuring, and how many times real time that
is, for groups of metrics; then the same for a video four times as long, whose time per frame must
not be more.
"""

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

SIZE = (480, 832)
FPS = 25
GROUPS = {
    "psnr": "psnr,l1",
    "psnr, ssim": "psnr,l1,ssim",
    "drift": "colour_drift,contrast_drift,saturation_drift,sharpness_drift",
    "motion": "seam,flicker",
    "all of frames": "psnr,l1,ssim,colour_drift,contrast_drift,saturation_drift,sharpness_drift,"
    "seam,flicker",
}


def write_pair(folder: Path, num_frames: int) -> tuple[Path, Path]:
    """A person who dances, and the same encoded worse."""
    from everanimate_cli.encode import VideoWriter  # noqa: PLC0415
    from everanimate_cli.toyworld import Dance, ToyScene  # noqa: PLC0415

    height, width = SIZE
    paths = folder / f"truth{num_frames}.mp4", folder / f"made{num_frames}.mp4"
    scene = ToyScene(1_000_001, Dance(1_000_000, turn_after_s=9.0), height=height, width=width)
    loop = [frame.rgb for frame in scene.frames(min(num_frames, 2 * FPS), rate_fps=FPS)]
    for path, crf in zip(paths, (12, 30), strict=True):
        with VideoWriter(path, height=height, width=width, rate=FPS, crf=crf) as writer:
            for index in range(num_frames):
                writer.write(loop[index % len(loop)][None])
    return paths


def measure(truth: Path, made: Path, metrics: str) -> float:
    """Wall time of one evaluation [s]."""
    from everanimate_cli.eval_settings import EvalSettings  # noqa: PLC0415
    from everanimate_cli.evaluation import evaluate  # noqa: PLC0415

    settings = EvalSettings(
        generated=(made,),
        truth=truth,
        metrics=metrics,
        frames_per_chunk=77,
        overlap=4,
        download=False,
    )
    started = time.perf_counter()
    evaluate(settings, lambda _event: None)
    return time.perf_counter() - started


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="length of the video")
    parser.add_argument("--cores", type=int, default=2, help="to run on")
    options = parser.parse_args(arguments)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    import cv2  # noqa: PLC0415  # takes as many threads as there are cores when it is loaded

    cv2.setNumThreads(options.cores)
    num_frames = max(4, round(options.seconds * FPS))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pair = write_pair(folder, num_frames)
        for group, metrics in GROUPS.items():
            rate = num_frames / measure(*pair, metrics)
            print(f"{group}: {rate:.1f} frames/s, {rate / FPS:.2f} times real time")
        longer = write_pair(folder, 4 * num_frames)
        times = [
            measure(*each, GROUPS["all of frames"]) / count
            for each, count in ((pair, num_frames), (longer, 4 * num_frames))
        ]
        print(f"time per frame, four times as long over once: {times[1] / times[0]:.2f}")
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory {peak_mib:.0f} MiB")


if __name__ == "__main__":
    main()
