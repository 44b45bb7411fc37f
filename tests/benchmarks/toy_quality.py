"""How good the toy checkpoint is, on held-out characters, as a table.

    python tests/benchmarks/toy_quality.py [--model toy] [--characters 16] [--sheet FILE]

Every character is animated with its own motion (self-reenactment) from the first frame of the
stretch, through the product's own loader and chunk loop, with fixed seeds. PSNR is in dB on 8-bit
frames, the mean over characters. "person" counts only the pixels in which the frame differs from
the empty room.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from everanimate_cli import hub, weights
from everanimate_cli.demo import lay_out_sheet
from everanimate_cli.images import write_png
from everanimate_cli.memory import chunk_noise, draw_anchor_indices, from_uint8, to_uint8
from everanimate_cli.pipeline import AnimatePipeline
from everanimate_cli.rollout import Chunk, Rollout
from everanimate_cli.settings import ModelDefaults
from everanimate_cli.toyworld import Camera, ToyScene

FIRST_SEED = 2_000_000
START_S = 50.0
NUM_CHUNKS = 4
NUM_STEPS = 12
PERSON_THRESHOLD = 0.06 * 255  # a pixel of the person differs this much from the empty room

# (row, must, aim, whether more is better)
TARGETS = {
    "VAE, chunk of frames": (25.5, 27.0, True),
    "VAE, chunk of poses": (24.0, 26.0, True),
    "chunk 0 above copy-the-reference": (3.0, 5.0, True),
    "chunk 0 below the VAE's ceiling": (2.5, 1.5, False),
    "chunk 0, person": (17.0, 19.0, True),
    "seam / within-chunk difference": (2.0, 1.3, False),
    "seconds per chunk, 12 steps, 1 core": (3.0, 1.0, False),
}


def psnr(made: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None) -> float:
    """PSNR in dB of uint8 frames, over the pixels of a mask [S, H, W] if given."""
    error = (made.astype(np.float64) - truth.astype(np.float64)) ** 2
    mean = error.mean() if mask is None else error[mask].mean()
    return float(10 * np.log10(255**2 / max(mean, 1e-12)))


def measure(
    pipeline: AnimatePipeline, defaults: ModelDefaults, seed: int, camera: Camera
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """All figures of one character, and frames to look at."""
    frames_per_chunk, overlap = defaults.frames_per_chunk, defaults.overlap
    num_frames = NUM_CHUNKS * (frames_per_chunk - overlap) + overlap
    scene = ToyScene(seed, seed, height=defaults.height, width=defaults.width, camera=camera)
    times_s = [START_S + i / defaults.fps for i in range(num_frames)]
    world = [scene.frame_at(t) for t in times_s]
    truth, pose, face = (np.stack([getattr(f, n) for f in world]) for n in ("rgb", "pose", "face"))
    rooms = np.stack([scene.room_at(t) for t in times_s])
    person = np.abs(truth.astype(int) - rooms).max(-1) > PERSON_THRESHOLD
    first = slice(0, frames_per_chunk)

    def through_vae(frames_u8: np.ndarray) -> np.ndarray:
        return to_uint8(pipeline.decode(pipeline.encode_video(from_uint8(frames_u8)))).numpy()

    ceiling = through_vae(truth[first])
    figures = {
        "VAE, chunk of frames": psnr(ceiling, truth[first]),
        "VAE, chunk of poses": psnr(through_vae(pose[first]), pose[first]),
        "VAE, person": psnr(ceiling, truth[first], person[first]),
    }
    shape = (
        1,
        pipeline.latent_channels,
        defaults.identity_slots + (frames_per_chunk - 1) // 4 + 1,
        defaults.height // pipeline.spatial_stride,
        defaults.width // pipeline.spatial_stride,
    )

    def read_driving(chunk_index: int) -> tuple[np.ndarray, np.ndarray]:
        start = chunk_index * (frames_per_chunk - overlap)
        window = slice(start, start + frames_per_chunk)
        return pose[window], face[window]

    rollout = Rollout(
        pipeline=pipeline,
        reference_u8=truth[0],
        picture_u8=truth[0],
        views_u8=[],
        read_driving=read_driving,
        noise=lambda k: chunk_noise(1, k, shape),
        anchor_frame_indices=draw_anchor_indices(1, frames_per_chunk, defaults.identity_slots - 1),
        prompt_embeds=pipeline.encode_prompt(defaults.prompt),
        num_chunks=NUM_CHUNKS,
        frames_per_chunk=frames_per_chunk,
        overlap=overlap,
        num_identity_slots=defaults.identity_slots,
        num_inference_steps=NUM_STEPS,
        shift=defaults.shift,
    )
    started_s = time.monotonic()
    chunks = [made for made in rollout.run() if isinstance(made, Chunk)]
    figures["seconds per chunk, 12 steps, 1 core"] = (time.monotonic() - started_s) / NUM_CHUNKS
    made = np.concatenate([c.frames_u8[overlap * (c.chunk_index > 0) :] for c in chunks])
    copied = np.broadcast_to(truth[:1], truth[first].shape)
    figures["chunk 0"] = psnr(made[first], truth[first])
    figures["copy-the-reference"] = psnr(copied, truth[first])
    figures["chunk 0, person"] = psnr(made[first], truth[first], person[first])
    figures["copy-the-reference, person"] = psnr(copied, truth[first], person[first])
    figures["chunk 0 above copy-the-reference"] = figures["chunk 0"] - figures["copy-the-reference"]
    figures["chunk 0 below the VAE's ceiling"] = (
        figures["VAE, chunk of frames"] - figures["chunk 0"]
    )
    last = slice(num_frames - frames_per_chunk, num_frames)
    figures["last chunk"] = psnr(made[last], truth[last])
    jumps = np.abs(np.diff(made.astype(float), axis=0)).mean((1, 2, 3))
    stride = frames_per_chunk - overlap
    seams = [frames_per_chunk - 1 + k * stride for k in range(NUM_CHUNKS - 1)]
    within = np.delete(jumps, seams)
    figures["seam jump"], figures["within-chunk difference"] = jumps[seams].mean(), within.mean()
    return figures, {"truth": truth, "made": made, "pose": pose, "ceiling": ceiling}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="toy")
    parser.add_argument("--characters", type=int, default=16)
    parser.add_argument("--camera", choices=["still", "moving"], default="still")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sheet", type=Path, help="PNG with all characters, truth over result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = hub.locate_model(options.model, lambda _event: None)
    pipeline = weights.load_pipeline(source, [], torch.device("cpu"), torch.float32)
    rows, sheet = [], []
    for index in range(options.characters):
        figures, frames = measure(pipeline, source.defaults, FIRST_SEED + index, options.camera)
        rows.append(figures)
        chosen = np.linspace(0, len(frames["made"]) - 1, 8).round().astype(int)
        sheet += [(f"{index} truth", frames["truth"][chosen]), ("made", frames["made"][chosen])]
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    ratio = means.pop("seam jump") / means.pop("within-chunk difference")
    means["seam / within-chunk difference"] = ratio
    print(f"{options.characters} held-out characters, {options.camera} camera")
    print("| figure | measured | must | aim |")
    print("|---|---|---|---|")
    for name, value in means.items():
        must, aim, more = TARGETS.get(name, (None, None, True))
        mark = "" if must is None else " ok" if (value >= must) == more else " **short**"
        limits = "| | |" if must is None else f"| {must} | {aim} |"
        print(f"| {name} | {value:.2f}{mark} {limits}")
    if options.json:
        options.json.write_text(json.dumps({"means": means, "rows": rows}, indent=1))
    if options.sheet:
        reference = sheet[0][1][0]
        write_png(options.sheet, lay_out_sheet(reference, sheet, list(range(8))))


if __name__ == "__main__":
    main()
