"""`everanimate demo`: a rendered character, a rendered dance with sound, and the toy models."""

from __future__ import annotations

import wave
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from PIL import Image, ImageDraw

from everanimate_cli.animate import animate
from everanimate_cli.atomic_files import write_json
from everanimate_cli.encode import VideoWriter
from everanimate_cli.events import Note, OnEvent
from everanimate_cli.hub import TOY_FOLDER
from everanimate_cli.images import write_png
from everanimate_cli.joining import AudioSource, join_videos
from everanimate_cli.preflight import demo_options, demo_record_path, read_demo_options
from everanimate_cli.settings import (
    TOY_MODEL,
    AnimateSettings,
    DemoSettings,
    read_model_defaults,
)
from everanimate_cli.toyworld import Dance, ToyScene
from everanimate_cli.video import VideoReader

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Frames = NDArray[np.uint8]

# People that the toy model was not trained on start here; two to a seed, the character and the
# dancer.
FIRST_HELD_OUT_PERSON = 1_000_000
RAW_SIZE_PX = 256  # width of the driving video
SOUND_RATE_HZ = 44_100
SHEET_COLUMNS = 8
SHEET_CELL_PX = 128
_SHEET_MARGIN_PX = 96


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Where everything is.

    Attributes:
        output: The animated video.
        contact_sheet: Reference, driving frames, poses and results over time in one picture.
        reference: The character.
        driving: The driving video.
        facts: What `animate` says of its run.
    """

    output: Path
    contact_sheet: Path
    reference: Path
    driving: Path
    facts: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """All of it as one JSON object."""
        paths = {
            name: str(getattr(self, name))
            for name in ("output", "contact_sheet", "reference", "driving")
        }
        return paths | self.facts


def run_demo(settings: DemoSettings, on_event: OnEvent) -> DemoResult:
    """Render the inputs, animate them with the embedded toy model, lay out a contact sheet.

    Args:
        settings: Checked options.
        on_event: Told of the phases and of every chunk.

    Returns:
        The paths of all that was made.

    Raises:
        EverAnimateError: If the folder cannot be used.
        OSError: If the disk is full.
    """
    folder = settings.directory
    folder.mkdir(parents=True, exist_ok=True)
    reference, driving = folder / "reference.png", folder / "driving.mp4"
    # An unfinished demo of other options is only there with `--overwrite`, see `check_demo`.
    continues = read_demo_options(folder) == demo_options(settings)
    on_event(Note(text=f"rendering a character and {settings.seconds:g} s of dance into {folder}"))
    render_inputs(reference, driving, settings)
    request = AnimateSettings(
        ref=reference,
        driving=driving,
        model=TOY_MODEL,
        output=settings.output,
        seed=settings.seed,
        resume=continues,
        overwrite=settings.overwrite,
    )
    result = animate(request, on_event)
    sheet = folder / "contact_sheet.png"
    pose = Path(result.facts["pose_folder"]) / "pose.mp4"
    write_png(sheet, contact_sheet(reference, driving, pose, settings.output))
    return DemoResult(
        output=result.output,
        contact_sheet=sheet,
        reference=reference,
        driving=driving,
        facts=result.facts,
    )


def render_inputs(reference: Path, driving: Path, settings: DemoSettings) -> None:
    """Write a reference picture and a driving video of the toy world.

    Args:
        reference: PNG to write: the character, standing.
        driving: MP4 to write: another person dancing to music, with a turn in the second half.
        settings: Length of the dance; character, dancer, dance and sound follow from the seed.
    """
    seconds, seed = settings.seconds, settings.seed
    defaults = read_model_defaults(TOY_FOLDER)
    height, width = defaults.height, defaults.width
    character = FIRST_HELD_OUT_PERSON + 2 * seed
    dance = Dance(character, turn_after_s=0.4 * seconds)
    num_frames = max(1, round(seconds * defaults.fps))
    # First of all, so that a demo that is interrupted here is known as one and goes on.
    write_json(demo_record_path(driving.parent), demo_options(settings))
    write_png(reference, ToyScene(character, dance, height=height, width=width).reference())
    # Larger than what the model makes, as in real life, and of even sides for the encoder.
    raw_height = 2 * round(RAW_SIZE_PX * height / width / 2)
    scene = ToyScene(character + 1, dance, height=raw_height, width=RAW_SIZE_PX)
    silent, sound = driving.with_name("silent.mp4"), driving.with_name("sound.wav")
    try:
        with VideoWriter(
            silent, height=raw_height, width=RAW_SIZE_PX, rate=defaults.fps, crf=12
        ) as writer:
            for index in range(num_frames):
                writer.write(scene.frame_at(index / defaults.fps).rgb[None])
        _write_music(sound, num_frames / defaults.fps, dance.beat_hz)
        join_videos([silent], driving, audio=AudioSource(path=sound))
    finally:
        for path in (silent, sound):
            path.unlink(missing_ok=True)


def _write_music(path: Path, seconds: float, beat_hz: float) -> None:
    """A bass drum on the beat under a plucked melody, as 16-bit WAV."""
    rng = np.random.default_rng(round(1000 * beat_hz))
    num_samples = round(seconds * SOUND_RATE_HZ)
    time_s = np.arange(num_samples) / SOUND_RATE_HZ
    note_s = 0.25 / beat_hz
    into_beat = time_s % (0.5 / beat_hz)
    drum = np.sin(2 * np.pi * 60 * into_beat * np.exp(-4 * into_beat)) * np.exp(-9 * into_beat)
    scale_hz = 220 * 2 ** (np.array([0, 3, 5, 7, 10, 12]) / 12)
    notes = scale_hz[rng.integers(len(scale_hz), size=int(seconds / note_s) + 1)]
    into_note = time_s % note_s
    tone = notes[(time_s / note_s).astype(int)]
    melody = np.sin(2 * np.pi * tone * into_note) * np.exp(-5 * into_note)
    samples = np.clip(0.5 * drum + 0.25 * melody, -1, 1) * 32_000
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SOUND_RATE_HZ)
        file.writeframes(samples.astype("<i2").tobytes())


def contact_sheet(reference: Path, driving: Path, pose: Path, result: Path) -> Frames:
    """Driving frames, poses and results at even times beside the reference, with labels.

    Args:
        reference: Picture of the character.
        driving: The driving video.
        pose: Its poses.
        result: The animated video, as long as the driving one.

    Returns:
        [H, W, 3] uint8 RGB.
    """
    rows: list[tuple[str, Frames]] = []
    with VideoReader(result) as reader:
        indices = np.linspace(0, len(reader) - 1, SHEET_COLUMNS).round().astype(int).tolist()
        times_s = [index / float(reader.rate) for index in indices]
        made = reader.read(indices)
    for label, path in (("driving", driving), ("pose", pose)):
        with VideoReader(path) as reader:
            rows.append((label, reader.read([min(i, len(reader) - 1) for i in indices])))
    rows.append(("result", made))
    with Image.open(reference) as picture:
        reference_u8 = np.asarray(picture.convert("RGB"))
    return lay_out_sheet(reference_u8, rows, times_s)


def lay_out_sheet(
    reference_u8: Frames, rows: Sequence[tuple[str, Frames]], times_s: Sequence[float]
) -> Frames:
    """A labelled grid: one row a label, one column a moment, the reference at the left.

    Args:
        reference_u8: [H, W, 3].
        rows: Label and [n, H, W, 3] frames each.
        times_s: [n] moments, written above the columns.

    Returns:
        [H, W, 3] uint8 RGB.
    """
    cell, margin, head = SHEET_CELL_PX, _SHEET_MARGIN_PX, 24
    left = margin + cell + 16
    canvas = Image.new("RGB", (left + cell * len(times_s), head + cell * len(rows)), (24, 24, 28))
    draw = ImageDraw.Draw(canvas)
    canvas.paste(Image.fromarray(_cell(reference_u8)), (margin, head))
    draw.text((8, head + cell // 2 - 6), "reference", fill=(230, 230, 230))
    for column, time_s in enumerate(times_s):
        draw.text((left + column * cell + 4, 6), f"{time_s:.1f} s", fill=(230, 230, 230))
    for row, (label, frames) in enumerate(rows):
        top = head + row * cell
        for column, frame in enumerate(frames):
            canvas.paste(Image.fromarray(_cell(frame)), (left + column * cell, top))
        draw.text((left + 4, top + cell - 14), label, fill=(255, 255, 255))
    return np.asarray(canvas)


def _cell(frame_u8: Frames) -> Frames:
    """The frame scaled to fit a square cell, on black; small pictures keep their pixels visible."""
    height, width = frame_u8.shape[:2]
    scale = SHEET_CELL_PX / max(height, width)
    size = (round(width * scale), round(height * scale))
    method = cv2.INTER_NEAREST if scale > 1 else cv2.INTER_AREA
    cell = np.zeros((SHEET_CELL_PX, SHEET_CELL_PX, 3), np.uint8)
    top, left = (SHEET_CELL_PX - size[1]) // 2, (SHEET_CELL_PX - size[0]) // 2
    cell[top : top + size[1], left : left + size[0]] = cv2.resize(
        frame_u8, size, interpolation=method
    )
    return cell
