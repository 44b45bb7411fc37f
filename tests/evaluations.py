"""Make up results of an evaluation: what `everanimate eval` would have found."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from everanimate_cli.encode import VideoWriter

HORIZONS_S: list[list[float | None]] = [[0, 10], [10, 30], [30, 60], [60, 90], [90, None]]
NEEDS_LPIPS = "not available: needs weights X"

# Group, unit, better, value at the start, change per minute, spread.
_CURVES: dict[str, tuple[str, str, str, float, float, float]] = {
    "psnr": ("quality", "dB", "higher", 24.0, -1.5, 0.8),
    "ssim": ("quality", "", "higher", 0.86, -0.03, 0.02),
    "l1": ("quality", "", "lower", 0.041, 0.012, 0.005),
    "identity": ("identity", "", "higher", 0.93, -0.04, 0.02),
    "background_psnr": ("drift", "dB", "higher", 31.0, -2.0, 0.3),
    "colour_drift": ("drift", "dE", "lower", 0.4, 1.1, 0.2),
    "sharpness_drift": ("drift", "%", "lower", 1.5, 2.0, 1.0),
    "pose_distance": ("motion", "", "lower", 0.131, 0.01, 0.02),
    "flicker": ("motion", "levels", "lower", 1.4, 0.1, 0.4),
}


def metric(
    per_frame: Sequence[float | None] | None,
    fps: float = 25.0,
    *,
    unit: str = "",
    better: str = "higher",
    group: str = "quality",
    unavailable: str | None = None,
) -> dict[str, Any]:
    """One metric as the evaluation writes it; the summaries are plain means."""
    frames = np.array([math.nan if v is None else v for v in per_frame or []], np.float64)
    times_s = np.arange(len(frames)) / fps

    def mean(begin_s: float, end_s: float | None) -> float | None:
        chosen = frames[(times_s >= begin_s) & (times_s < (end_s or math.inf))]
        chosen = chosen[~np.isnan(chosen)]
        return float(chosen.mean()) if len(chosen) else None

    overall = mean(0, None)
    slope = None
    if overall is not None and math.isfinite(overall):
        slope = float(np.polyfit(times_s, np.nan_to_num(frames, nan=overall), 1)[0]) * 60
    return {
        "unit": unit,
        "better": better,
        "group": group,
        "about": "made up",
        "per_frame": per_frame,
        "overall": overall,
        "horizons": [mean(begin_s or 0, end_s) for begin_s, end_s in HORIZONS_S],
        "slope_per_minute": slope,
        "interval": None if slope is None else [slope - 0.1, slope + 0.1],
        "unavailable": unavailable,
    }


def method(
    name: str,
    *,
    num_frames: int = 300,
    fps: float = 25.0,
    drift: float = 1.0,
    seed: int = 0,
    chunk_joins: Sequence[int] = (),
) -> dict[str, Any]:
    """One method; `drift` says how much faster than usual its values get worse."""
    rng = np.random.default_rng(seed)
    minutes = np.arange(num_frames) / fps / 60
    metrics = {}
    for key, (group, unit, better, start, change, spread) in _CURVES.items():
        # Neighbouring frames are alike, as in real videos.
        noise = np.convolve(rng.normal(size=num_frames + 24), np.ones(25) / 5, "valid")
        values: list[float | None] = (start + drift * change * minutes + spread * noise).tolist()
        metrics[key] = metric(values, fps, unit=unit, better=better, group=group)
    jumps: list[float | None] = [None] * num_frames
    for join in chunk_joins:
        jumps[join] = float(1 + drift * rng.random())
    metrics["seam"] = metric(jumps, fps, better="lower", group="motion")
    metrics["lpips"] = metric(None, better="lower", unavailable=NEEDS_LPIPS)
    psnr = metrics["psnr"]["per_frame"]
    worst = np.argsort(psnr)[:3].tolist()
    return {
        "name": name,
        "method": name,
        "sample": None,
        "truth": None,
        "reference": None,
        "driving": None,
        "path": f"videos/{name}.mp4",
        "sha256": f"{seed:064x}",
        "fps": fps,
        "size": [64, 48],
        "num_frames": num_frames,
        "seconds": num_frames / fps,
        "compared_frames": num_frames,
        "chunk_joins": list(chunk_joins),
        "metrics": metrics,
        "worst_frames": [{"frame": i, "metric": "psnr", "value": psnr[i]} for i in worst],
    }


def evaluation(*methods: dict[str, Any]) -> dict[str, Any]:
    """Everything that the evaluation of these methods says."""
    return {
        "format_version": 1,
        "created": "2026-03-01T12:00:00+00:00",
        "versions": {"everanimate": "0.1.0", "numpy": "2.4.0"},
        "settings": {"preset": "paper", "pose": {"threshold": 0.5}, "fail_if": ["psnr.90s<20"]},
        "horizons_s": HORIZONS_S,
        "reference": "anna.png",
        "truth": "truth.mp4",
        "methods": list(methods),
    }


def made_up_test_set(*makers: str, samples: Sequence[str], num_frames: int = 300) -> dict[str, Any]:
    """The evaluation of a test set: each method made a video of each sample."""
    methods = []
    for maker in makers:
        for sample in samples:
            facts = method(f"{maker}: {sample}", num_frames=num_frames, seed=len(methods))
            methods.append(facts | {"method": maker, "sample": sample})
    summary = []
    for maker in makers:
        members = [facts["metrics"] for facts in methods if facts["method"] == maker]
        means = {}
        for key, first in members[0].items():
            values = [of_video[key]["overall"] for of_video in members]
            mean = None if values[0] is None else sum(values) / len(values)
            means[key] = first | {"overall": mean}
            means[key] |= {"per_frame": None} if len(members) > 1 else {}
        summary.append({"method": maker, "samples": list(samples), "metrics": means})
    return evaluation(*methods) | {"summary": summary, "truth": None, "reference": None}


def write_frames(path: Path, num_frames: int, *, tint: int = 0, fps: float = 25.0) -> Path:
    """A square that wanders over a slope of colours, 64 high and 48 wide, as a video."""
    y, x = np.mgrid[:64, :48]
    with VideoWriter(path, height=64, width=48, rate=fps) as writer:
        for index in range(num_frames):
            frame = np.stack([2 * y + tint, 3 * x, np.full_like(x, 90)], axis=-1).astype(np.uint8)
            left = round(16 + 14 * math.sin(index / 9))
            frame[20:44, left : left + 14] = (230, 200, 60)
            writer.write(frame[None])
    return path
