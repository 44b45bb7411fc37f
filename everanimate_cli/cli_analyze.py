"""The commands `analyze roundtrip` and `analyze attention`."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from everanimate_cli.analyze_settings import AttentionSettings, Quantise, RoundtripSettings
from everanimate_cli.cli_options import (
    INTERRUPTED,
    LENGTH,
    MODEL,
    OF_MODEL,
    PICTURE,
    PROGRAM,
    RESULT,
    RUN,
    AsJson,
    Quiet,
    option,
    show_result,
)
from everanimate_cli.cli_sampling import (
    CarryFramesOption,
    ClipImageOption,
    DtypeOption,
    FitOption,
    FramesPerChunkOption,
    IdentitySlotsOption,
    LoraOption,
    MemoryOption,
    ModelOption,
    OverlapOption,
    PromptOption,
    SeedOption,
    ShiftOption,
    StartOption,
    StepsOption,
    ViewOption,
)
from everanimate_cli.errors import RunError
from everanimate_cli.preflight import check_analyze_attention, check_analyze_roundtrip
from everanimate_cli.settings import Device, Fit

ANALYZE_HELP = "Show why long animations drift: what the VAE damages, what attention looks at."

ROUNDTRIP_HELP = (
    "Encode and decode VIDEO again and again with the VAE, and show what is left of it.\n\n"
    "What carries decoded frames from chunk to chunk does this with every chunk. PSNR, SSIM and "
    "colour shift of every trip against the input and the trip before, also of flat colours, as "
    "tables, curves and pictures in the folder VIDEO_roundtrip, whose path goes to stdout."
    f"""

\b
Examples:
  {PROGRAM} analyze roundtrip anna.png --model toy
  {PROGRAM} analyze roundtrip dance.mp4 --end 6 --trips 40 -o trips
  {PROGRAM} analyze roundtrip anna.png --size 832x480 --quantise none
"""
)

ATTENTION_HELP = (
    "Animate REF with the motion in DRIVING, and measure what the network looks at.\n\n"
    "The share of self attention that target tokens give to identity memory, motion memory and "
    "each other, in every block and Euler step, beside the share of uniform attention; as tables, "
    "curves and heat maps over the frames in the folder DRIVING_REF_attention, whose path goes to "
    "stdout. The options are those of animate; the network computes the same video."
    f"""

\b
Examples:
  {PROGRAM} analyze attention anna.png dance.mp4 --model toy --seconds 10
  {PROGRAM} analyze attention anna.png dance_pose --memory sink -o sink
  {PROGRAM} analyze attention anna.png dance_pose --lora my.safetensors --steps 8
"""
)


_roundtrip = partial(option, RoundtripSettings)
_attention = partial(option, AttentionSettings)

app = typer.Typer(help=ANALYZE_HELP)


@app.command("roundtrip", help=ROUNDTRIP_HELP)
def run_roundtrip(
    video: Annotated[
        Path,
        typer.Argument(metavar="VIDEO", help="Video, or a picture.", show_default=False),
    ],
    trips: Annotated[
        int | None, _roundtrip("trips", "How often it is encoded and decoded.", "Trips")
    ] = None,
    quantise: Annotated[
        Quantise | None,
        _roundtrip(
            "quantise",
            "How decoded pixels become 8 bits: round, truncate or none.",
            "Trips",
            metavar="HOW",
        ),
    ] = None,
    flat: Annotated[
        bool | None,
        _roundtrip("flat", "Also send flat colours.", "Trips", flags=("--flat/--no-flat",)),
    ] = None,
    frames_per_chunk: Annotated[
        int | None,
        _roundtrip("frames_per_chunk", "Frames encoded together, 4n+1.", "Trips", default=OF_MODEL),
    ] = None,
    start: Annotated[
        str | None,
        _roundtrip("start", "Where to begin: 12.5 or 1:02.5.", PICTURE, metavar="TIME"),
    ] = None,
    end: Annotated[
        str | None,
        _roundtrip("end", "Where to end.", PICTURE, metavar="TIME", default="the video's end"),
    ] = None,
    size: Annotated[
        str | None,
        _roundtrip(
            "size",
            "Size of the frames; auto: the video's aspect at the model's area.",
            PICTURE,
            metavar="WxH|auto",
        ),
    ] = None,
    fit: Annotated[
        Fit | None, _roundtrip("fit", "How frames of another aspect fill it.", PICTURE)
    ] = None,
    model: Annotated[
        str | None,
        _roundtrip(
            "model",
            "'toy' (embedded), a checkpoint folder, or a Hub id.",
            MODEL,
            metavar="MODEL",
        ),
    ] = None,
    device: Annotated[Device | None, _roundtrip("device", "Where the VAE runs.", MODEL)] = None,
    output: Annotated[
        Path | None,
        _roundtrip(
            "output",
            "Folder for tables and pictures.",
            RESULT,
            flags=("--output", "-o"),
            metavar="DIR",
            default="VIDEO_roundtrip",
        ),
    ] = None,
    overwrite: Annotated[
        bool | None, _roundtrip("overwrite", "Replace an earlier result.", RESULT)
    ] = None,
    dry_run: Annotated[bool | None, _roundtrip("dry_run", "Print the plan and stop.", RUN)] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run `everanimate analyze roundtrip`."""
    given = {
        name: value
        for name, value in locals().items()
        if value is not None and name not in ("as_json", "quiet")
    }
    settings = RoundtripSettings.from_json(given)
    check_analyze_roundtrip(settings)
    with _stoppable():
        from everanimate_cli.console import show_progress
        from everanimate_cli.roundtrip import analyze_roundtrip

        with show_progress(quiet=quiet) as on_event:
            result = analyze_roundtrip(settings, on_event)
    show_result(result, as_json=as_json, is_plan=settings.dry_run)


@app.command("attention", help=ATTENTION_HELP)
def run_attention(
    ref: Annotated[
        Path,
        typer.Argument(metavar="REF", help="Picture of the character.", show_default=False),
    ],
    driving: Annotated[
        Path,
        typer.Argument(
            metavar="DRIVING",
            help="Video of a moving person, or a folder made by extract-pose.",
            show_default=False,
        ),
    ],
    seconds: Annotated[
        float | None,
        _attention("seconds", "Length of the video.", LENGTH, default="the driving motion's"),
    ] = None,
    frames: Annotated[int | None, _attention("frames", "Or its length in frames.", LENGTH)] = None,
    start: StartOption = None,
    pose_model: Annotated[
        str | None,
        _attention(
            "pose_model",
            "Who estimates the poses of a raw video, see extract-pose.",
            LENGTH,
            metavar="NAME|FILE",
            default=OF_MODEL,
        ),
    ] = None,
    pose_folder: Annotated[
        Path | None,
        _attention(
            "pose_folder",
            "Where its poses are kept, and found again.",
            LENGTH,
            metavar="DIR",
            default="VIDEO_pose beside the result",
        ),
    ] = None,
    model: ModelOption = None,
    lora: LoraOption = None,
    device: Annotated[Device | None, _attention("device", "Where the networks run.", MODEL)] = None,
    dtype: DtypeOption = None,
    view: ViewOption = None,
    size: Annotated[
        str | None,
        _attention(
            "size",
            "Size of the video; auto: the reference's aspect at the model's area.",
            PICTURE,
            metavar="WxH|auto",
            default=OF_MODEL,
        ),
    ] = None,
    fit: FitOption = None,
    seed: SeedOption = None,
    steps: StepsOption = None,
    shift: ShiftOption = None,
    prompt: PromptOption = None,
    memory: MemoryOption = None,
    carry_frames: CarryFramesOption = None,
    frames_per_chunk: FramesPerChunkOption = None,
    overlap: OverlapOption = None,
    identity_slots: IdentitySlotsOption = None,
    clip_image: ClipImageOption = None,
    output: Annotated[
        Path | None,
        _attention(
            "output",
            "Folder for tables and pictures.",
            RESULT,
            flags=("--output", "-o"),
            metavar="DIR",
            default="DRIVING_REF_attention",
        ),
    ] = None,
    overwrite: Annotated[
        bool | None, _attention("overwrite", "Replace an earlier result.", RESULT)
    ] = None,
    dry_run: Annotated[bool | None, _attention("dry_run", "Print the plan and stop.", RUN)] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run `everanimate analyze attention`."""
    given = {
        name: value
        for name, value in locals().items()
        if value is not None and name not in ("as_json", "quiet")
    }
    settings = AttentionSettings.from_json(given)
    check_analyze_attention(settings)
    with _stoppable():
        from everanimate_cli.attention_shares import analyze_attention
        from everanimate_cli.console import show_progress

        with show_progress(quiet=quiet) as on_event:
            result = analyze_attention(settings, on_event)
    show_result(result, as_json=as_json, is_plan=settings.dry_run)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Turn Ctrl-C and a full disk into a line; an analysis is not continued but made again."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted. Run the same command to begin again.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(
            f"disk full: {error}. Free some space, then run the same command again."
        ) from error
