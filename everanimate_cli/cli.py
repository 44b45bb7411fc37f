"""The command line: options become settings, one worker is called, its path goes to stdout.

Nothing heavy is imported at module level: `--help`, a slip in an option and a missing file are
answered before torch or diffusers is loaded. Workers are imported inside the commands.
"""

import errno
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everanimate_cli import __version__
from everanimate_cli.errors import EverAnimateError, InputError, RunError, SettingsError
from everanimate_cli.preflight import check_animate, check_demo, check_extract
from everanimate_cli.runs import list_runs, remove_run
from everanimate_cli.settings import (
    HUB_MODEL,
    AnimateSettings,
    ClipImage,
    Codec,
    DemoSettings,
    Device,
    DrawMode,
    Dtype,
    Extend,
    ExtractSettings,
    Fit,
    Memory,
    Provider,
    Reacquire,
    Select,
    combine,
    option_name,
    read_saved_options,
)

if TYPE_CHECKING:
    from everanimate_cli.animate import AnimateResult
    from everanimate_cli.extract import ExtractResult

PROGRAM = "everanimate"
INTERRUPTED = 130

APP_HELP = "Animate a character from one picture with the motion of a video, for minutes."

# The help keeps line breaks, so a paragraph is one line; a lone backspace keeps the lines below it.
ANIMATE_HELP = (
    "Animate the character in the picture REF with the motion in DRIVING.\n\n"
    "DRIVING is a video of a moving person, or the folder that extract-pose made of one; or give "
    "--pose and --face. The poses of a video are kept in VIDEO_pose beside the result. "
    "The result is DRIVING_REF.mp4 in the current folder unless --output says otherwise; its path "
    "is all that goes to stdout. An interrupted run continues when the same command is run again."
    f"""

\b
Examples:
  {PROGRAM} animate anna.png dance.mp4
  {PROGRAM} animate anna.png dance.mp4 --minutes 2 -o anna.mp4
  {PROGRAM} animate anna.png dance_pose --size auto
  {PROGRAM} animate anna.png dance.mp4 --model toy
  {PROGRAM} animate anna.png dance.mp4 --lora my.safetensors=0.8
  {PROGRAM} animate --config anna.json --seed 7 -o other.mp4
"""
)

EXTRACT_HELP = (
    "Turn VIDEO into pose and face videos, the folder that animate takes.\n\n"
    "One person is chosen and followed. The folder is VIDEO_pose in the current folder unless "
    "--output says otherwise; its path is all that goes to stdout. An interrupted extraction "
    "continues when the same command is run again. Models are downloaded once; --pose-model and "
    "--detector also take .onnx files."
    f"""

\b
Examples:
  {PROGRAM} extract-pose dance.mp4
  {PROGRAM} extract-pose dance.mp4 --size 480x832 --preview
  {PROGRAM} extract-pose dance.mp4 --list-persons
  {PROGRAM} extract-pose dance.mp4 --person 1 --start 1:10 --end 1:30
  {PROGRAM} extract-pose dance.mp4 --retarget anna.png -o dance_anna
"""
)

DEMO_HELP = (
    "Render a character and a dance, and animate it with the embedded toy models.\n\n"
    "The dance is a raw video: its poses are extracted first. "
    "Needs no network and no GPU. The inputs, the video and a contact sheet are written into DIR; "
    "the paths of the video and the sheet go to stdout."
    f"""

\b
Examples:
  {PROGRAM} demo
  {PROGRAM} demo my-demo --seconds 30 --seed 3
"""
)

RUNS_HELP = (
    "List the runs in FOLDER that can be continued, or delete them.\n\n"
    "An interrupted run waits in a folder NAME.mp4.run for its own command. So does a finished one "
    "that was made with --keep-run, beside its result. Results and runs at work are never deleted."
    f"""

\b
Examples:
  {PROGRAM} runs
  {PROGRAM} runs videos --remove
  {PROGRAM} runs videos/dance_anna.mp4.run --remove
"""
)

app = typer.Typer(
    help=APP_HELP,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text} is not a whole number.") from error


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text} is not a number.") from error


def _option(
    field_name: str,
    text: str,
    panel: str,
    *,
    flags: Sequence[str] = (),
    metavar: str | None = None,
    default: str | None = None,
    of: type[AnimateSettings | ExtractSettings] = AnimateSettings,
) -> Any:
    """An option whose value is None unless given, so that a settings file can stand behind it.

    Args:
        field_name: The settings field; its default is shown in the help.
        text: What the option does.
        panel: Heading of its group in the help.
        flags: How it is written, if not just `--field-name`.
        metavar: What stands for its value in the help.
        default: What to show instead of the field's default.
        of: The settings that have the field.
    """
    item = next(item for item in fields(of) if item.name == field_name)
    value = item.default
    if default is None and isinstance(value, str | float | int) and value is not False:
        default = (
            "on" if value is True else f"{value:g}" if isinstance(value, float) else str(value)
        )
    return typer.Option(
        *(flags or (option_name(field_name),)),
        help=text if default is None else f"{text} (default: {default})",
        rich_help_panel=panel,
        metavar=metavar,
        show_default=False,
        # typer's own message for a number that is none does not show it; times are read later.
        parser=None if "decode" in item.metadata else _PARSERS.get(item.type),
    )


_PARSERS: dict[Any, Callable[[str], Any]] = {
    int: _whole_number,
    int | None: _whole_number,
    float: _number,
    float | None: _number,
}
_LENGTH = "Length and motion"
_MODEL = "Model"
_PICTURE = "Picture"
_SAMPLING = "Sampling"
_MEMORY = "Memory between chunks"
_RESULT = "Result"
_PERSON = "Person"
_DRAWING = "Drawing"
_RUN = "Run"
_OF_MODEL = "the model's"
_WHOLE = "all of it"

AsJson = Annotated[
    bool, typer.Option("--json", help="Write the result to stdout as JSON.", rich_help_panel=_RUN)
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="No progress and no notes.", rich_help_panel=_RUN),
]


@contextmanager
def _resumable(how: str) -> Iterator[None]:
    """Turn Ctrl-C and a full disk into a line that says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"interrupted. Run the same command {how} to continue.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(
            f"disk full: {error}. Free some space, then run the same command {how} to continue."
        ) from error


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit()


@app.callback()
def _program(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Take the options that stand before a command."""


@app.command("animate", help=ANIMATE_HELP)
def _animate(
    ref: Annotated[
        Path | None,
        typer.Argument(metavar="REF", help="Picture of the character.", show_default=False),
    ] = None,
    driving: Annotated[
        Path | None,
        typer.Argument(
            metavar="DRIVING",
            help="Video of a moving person, or a folder made by extract-pose.",
            show_default=False,
        ),
    ] = None,
    pose: Annotated[
        Path | None, _option("pose", "Video of drawn skeletons, instead of DRIVING.", _LENGTH)
    ] = None,
    face: Annotated[
        Path | None, _option("face", "Video of face crops, instead of DRIVING.", _LENGTH)
    ] = None,
    minutes: Annotated[
        float | None,
        _option("minutes", "Length of the video.", _LENGTH, default="the driving motion's"),
    ] = None,
    seconds: Annotated[
        float | None, _option("seconds", "Or its length in seconds.", _LENGTH)
    ] = None,
    frames: Annotated[int | None, _option("frames", "Or its length in frames.", _LENGTH)] = None,
    start: Annotated[
        str | None,
        _option("start", "Where the motion begins: 12.5 or 1:02.5.", _LENGTH, metavar="TIME"),
    ] = None,
    end: Annotated[
        str | None,
        _option("end", "Where the motion ends.", _LENGTH, metavar="TIME", default="its own end"),
    ] = None,
    extend: Annotated[
        Extend | None,
        _option(
            "extend",
            "When the motion is shorter than asked: pingpong, loop, hold, or an error.",
            _LENGTH,
            metavar="HOW",
        ),
    ] = None,
    pose_model: Annotated[
        str | None,
        _option(
            "pose_model",
            "Who estimates the poses of a raw video, see extract-pose.",
            _LENGTH,
            metavar="NAME|FILE",
            default=_OF_MODEL,
        ),
    ] = None,
    detector: Annotated[
        str | None,
        _option(
            "detector",
            "Who finds the person in it.",
            _LENGTH,
            metavar="NAME|FILE",
            default="the pose model's",
        ),
    ] = None,
    person: Annotated[
        int | None,
        _option("person", "Whom to follow in it: a number of --list-persons.", _LENGTH),
    ] = None,
    select: Annotated[
        Select | None,
        _option("select", "Or by size or place in its first second.", _LENGTH, default="size"),
    ] = None,
    retarget: Annotated[
        bool | None,
        _option(
            "retarget",
            "Give its poses the limb lengths and the place of the character.",
            _LENGTH,
            flags=("--retarget/--no-retarget",),
            default="off",
        ),
    ] = None,
    pose_folder: Annotated[
        Path | None,
        _option(
            "pose_folder",
            "Where its poses are kept, and found again.",
            _LENGTH,
            metavar="DIR",
            default="VIDEO_pose beside the result",
        ),
    ] = None,
    model: Annotated[
        str | None,
        _option(
            "model",
            "'toy' (embedded), a checkpoint folder, or a Hub id.",
            _MODEL,
            metavar="MODEL",
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        _option(
            "lora",
            "LoRA file, or owner/name/file on the Hub; repeatable; 'none' for the bare model.",
            _MODEL,
            metavar="FILE[=SCALE]",
            default=f"{_OF_MODEL}; for {HUB_MODEL} the released stage 2",
        ),
    ] = None,
    device: Annotated[Device | None, _option("device", "Where the networks run.", _MODEL)] = None,
    dtype: Annotated[
        Dtype | None,
        _option(
            "dtype",
            "Their number format: auto, float32, bfloat16 or float16.",
            _MODEL,
            metavar="NAME",
        ),
    ] = None,
    view: Annotated[
        list[Path] | None,
        _option(
            "view",
            "Another picture of the character; repeatable, one slot each.",
            _PICTURE,
            metavar="FILE",
        ),
    ] = None,
    size: Annotated[
        str | None,
        _option(
            "size",
            "Size of the result; auto: the reference's aspect at the model's area.",
            _PICTURE,
            metavar="WxH|auto",
            default=_OF_MODEL,
        ),
    ] = None,
    fit: Annotated[
        Fit | None, _option("fit", "How pictures of another aspect fill the frame.", _PICTURE)
    ] = None,
    fps: Annotated[
        float | None,
        _option(
            "fps", "Frames per second; the motion keeps its speed.", _PICTURE, default=_OF_MODEL
        ),
    ] = None,
    seed: Annotated[
        int | None, _option("seed", "Every random draw follows from it.", _SAMPLING)
    ] = None,
    steps: Annotated[
        int | None, _option("steps", "Euler steps per chunk.", _SAMPLING, default=_OF_MODEL)
    ] = None,
    shift: Annotated[
        float | None, _option("shift", "Warp of the noise levels.", _SAMPLING, default=_OF_MODEL)
    ] = None,
    prompt: Annotated[
        str | None, _option("prompt", "Text that the model sees.", _SAMPLING, default=_OF_MODEL)
    ] = None,
    negative_prompt: Annotated[
        str | None,
        _option("negative_prompt", "Text to steer away from.", _SAMPLING, default=_OF_MODEL),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        _option("guidance_scale", "Above 1 every step costs twice.", _SAMPLING),
    ] = None,
    memory: Annotated[
        Memory | None,
        _option(
            "memory",
            "What a chunk hands on: its latents; its last frames (as Wan-Animate); nothing (sink).",
            _MEMORY,
        ),
    ] = None,
    carry_frames: Annotated[
        int | None,
        _option(
            "carry_frames", "Frames that pixel memory carries.", _MEMORY, metavar="1|5", default="1"
        ),
    ] = None,
    frames_per_chunk: Annotated[
        int | None,
        _option("frames_per_chunk", "Frames of one chunk, 4n+1.", _MEMORY, default=_OF_MODEL),
    ] = None,
    overlap: Annotated[
        int | None,
        _option("overlap", "Frames that two chunks share.", _MEMORY, default=_OF_MODEL),
    ] = None,
    identity_slots: Annotated[
        int | None,
        _option("identity_slots", "Slots of identity memory.", _MEMORY, default=_OF_MODEL),
    ] = None,
    clip_image: Annotated[
        ClipImage | None,
        _option(
            "clip_image",
            "What CLIP sees after chunk 0: the last frame of the previous chunk, or the reference.",
            _MEMORY,
            default="previous; with pixel memory always reference",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        _option(
            "output",
            "The video to write.",
            _RESULT,
            flags=("--output", "-o"),
            default="DRIVING_REF.mp4",
        ),
    ] = None,
    overwrite: Annotated[
        bool | None, _option("overwrite", "Replace an existing result.", _RESULT)
    ] = None,
    audio: Annotated[
        bool | None,
        _option("audio", "Keep the driving video's sound.", _RESULT, flags=("--audio/--no-audio",)),
    ] = None,
    pose_beside: Annotated[
        bool | None,
        _option(
            "pose_beside",
            "Show the pose beside the result.",
            _RESULT,
            flags=("--pose-beside/--no-pose-beside",),
            default="off",
        ),
    ] = None,
    codec: Annotated[Codec | None, _option("codec", "Video codec.", _RESULT)] = None,
    crf: Annotated[
        int | None, _option("crf", "Quality, 0 to 51; lower is better and larger.", _RESULT)
    ] = None,
    png: Annotated[
        Path | None,
        _option("png", "Also write every frame into this folder as PNG.", _RESULT, metavar="DIR"),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="Take the options of a saved run; others on the command line win.",
            rich_help_panel=_RUN,
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool | None,
        _option("resume", "Continue an unfinished run.", _RUN, flags=("--resume/--no-resume",)),
    ] = None,
    keep_run: Annotated[
        bool | None,
        _option("keep_run", "Keep the run folder, so that the video can be lengthened.", _RUN),
    ] = None,
    dry_run: Annotated[bool | None, _option("dry_run", "Print the plan and stop.", _RUN)] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run `everanimate animate`."""
    # The parameters are named as the settings fields; the other three are the command line's own.
    given = {
        name: value
        for name, value in locals().items()
        if value is not None and name not in ("config", "as_json", "quiet")
    }
    options = combine({} if config is None else read_saved_options(config), given)
    if "ref" not in options:
        raise SettingsError("REF is missing. Give a picture of the character.")
    settings = AnimateSettings.from_json(options)
    check_animate(settings)
    with _resumable("again" if settings.resume else "without --no-resume"):
        from everanimate_cli.animate import animate
        from everanimate_cli.console import show_progress

        with show_progress(quiet=quiet) as on_event:
            result = animate(settings, on_event)
    _show_result(result, as_json=as_json, is_plan=settings.dry_run)


@app.command("extract-pose", help=EXTRACT_HELP)
def _extract_pose(
    video: Annotated[
        Path, typer.Argument(metavar="VIDEO", help="Video of a moving person.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        _option(
            "output",
            "The folder to make.",
            _RESULT,
            flags=("--output", "-o"),
            default="VIDEO_pose",
            of=ExtractSettings,
        ),
    ] = None,
    overwrite: Annotated[
        bool | None,
        _option("overwrite", "Replace an existing result.", _RESULT, of=ExtractSettings),
    ] = None,
    size: Annotated[
        str | None,
        _option(
            "size",
            "Of the pose video; auto: the aspect of the reference, or else of the video.",
            _RESULT,
            metavar="WxH|auto",
            of=ExtractSettings,
        ),
    ] = None,
    fps: Annotated[
        float | None,
        _option(
            "fps", "Frames per second; the motion keeps its speed.", _RESULT, of=ExtractSettings
        ),
    ] = None,
    fit: Annotated[
        Fit | None,
        _option("fit", "How the video fills the pose video.", _RESULT, of=ExtractSettings),
    ] = None,
    crf: Annotated[
        int | None,
        _option(
            "crf", "Quality, 0 to 51; lower is better and larger.", _RESULT, of=ExtractSettings
        ),
    ] = None,
    lossless: Annotated[
        bool | None,
        _option(
            "lossless",
            "Exact colours (yuv444p, CRF 0); few players show such files.",
            _RESULT,
            of=ExtractSettings,
        ),
    ] = None,
    preview: Annotated[
        bool | None,
        _option(
            "preview",
            "Also write preview.mp4: source, pose and face side by side.",
            _RESULT,
            of=ExtractSettings,
        ),
    ] = None,
    face_size: Annotated[
        int | None, _option("face_size", "Side of the face video.", _RESULT, of=ExtractSettings)
    ] = None,
    start: Annotated[
        str | None,
        _option(
            "start", "Where to begin: 12.5 or 1:02.5.", _LENGTH, metavar="TIME", of=ExtractSettings
        ),
    ] = None,
    end: Annotated[
        str | None,
        _option(
            "end",
            "Where to end.",
            _LENGTH,
            metavar="TIME",
            default="the video's end",
            of=ExtractSettings,
        ),
    ] = None,
    list_persons: Annotated[
        bool,
        typer.Option(
            "--list-persons",
            help="List the people in the video, and stop.",
            rich_help_panel=_PERSON,
        ),
    ] = False,
    person: Annotated[
        int | None,
        _option(
            "person",
            "Whom to follow: a number of --list-persons, 0 is the largest at the start.",
            _PERSON,
            of=ExtractSettings,
        ),
    ] = None,
    select: Annotated[
        Select | None,
        _option(
            "select",
            "Or by size or place in the first second.",
            _PERSON,
            default="size",
            of=ExtractSettings,
        ),
    ] = None,
    reacquire: Annotated[
        Reacquire | None,
        _option(
            "reacquire",
            "Who may take over when this person is gone for long: the same one only, or any.",
            _PERSON,
            of=ExtractSettings,
        ),
    ] = None,
    max_gap: Annotated[
        float | None,
        _option(
            "max_gap",
            "Seconds without the person that are filled in.",
            _PERSON,
            of=ExtractSettings,
        ),
    ] = None,
    pose_model: Annotated[
        str | None,
        _option(
            "pose_model",
            "rtmw, rtmw-m, dwpose, vitpose, toy, or an .onnx file.",
            _MODEL,
            metavar="NAME|FILE",
            of=ExtractSettings,
        ),
    ] = None,
    detector: Annotated[
        str | None,
        _option(
            "detector",
            "yolox-m, yolox-tiny, yolov10m, toy, or an .onnx file.",
            _MODEL,
            metavar="NAME|FILE",
            default="the pose model's",
            of=ExtractSettings,
        ),
    ] = None,
    detect_every: Annotated[
        int | None,
        _option(
            "detect_every",
            "Frames from one look of the detector to the next; more looks where it is needed.",
            _MODEL,
            of=ExtractSettings,
        ),
    ] = None,
    provider: Annotated[
        Provider | None,
        _option("provider", "Where the networks run.", _MODEL, of=ExtractSettings),
    ] = None,
    threads: Annotated[
        int | None,
        _option(
            "threads",
            "Threads of a network on the CPU.",
            _MODEL,
            default="all cores",
            of=ExtractSettings,
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        _option(
            "reference",
            "Picture of the character, stored beside as the poses are fitted.",
            _DRAWING,
            metavar="REF",
            of=ExtractSettings,
        ),
    ] = None,
    retarget: Annotated[
        Path | None,
        _option(
            "retarget",
            "The same, and the poses get its limb lengths and its place.",
            _DRAWING,
            metavar="REF",
            of=ExtractSettings,
        ),
    ] = None,
    template_frame: Annotated[
        int | None,
        _option(
            "template_frame",
            "Frame that is compared with the reference.",
            _DRAWING,
            default="the first with a whole pose",
            of=ExtractSettings,
        ),
    ] = None,
    smooth: Annotated[
        bool | None,
        _option(
            "smooth",
            "Smooth the keypoints.",
            _DRAWING,
            flags=("--smooth/--no-smooth",),
            of=ExtractSettings,
        ),
    ] = None,
    face_smooth: Annotated[
        bool | None,
        _option(
            "face_smooth",
            "Smooth the face box.",
            _DRAWING,
            flags=("--face-smooth/--no-face-smooth",),
            default="off",
            of=ExtractSettings,
        ),
    ] = None,
    face_scale: Annotated[
        float | None,
        _option(
            "face_scale",
            "Area of the face crop over that of the landmarks.",
            _DRAWING,
            of=ExtractSettings,
        ),
    ] = None,
    face_square: Annotated[
        bool | None,
        _option("face_square", "Cut a square instead.", _DRAWING, of=ExtractSettings),
    ] = None,
    face_hold: Annotated[
        float | None,
        _option(
            "face_hold",
            "Seconds for which the last face box is used when the face turns away.",
            _DRAWING,
            of=ExtractSettings,
        ),
    ] = None,
    face_threshold: Annotated[
        float | None,
        _option(
            "face_threshold",
            "Least mean score of a face.",
            _DRAWING,
            default="the pose model's",
            of=ExtractSettings,
        ),
    ] = None,
    body_threshold: Annotated[
        float | None,
        _option(
            "body_threshold",
            "Least score of a drawn joint.",
            _DRAWING,
            default="the pose model's",
            of=ExtractSettings,
        ),
    ] = None,
    hand_threshold: Annotated[
        float | None,
        _option(
            "hand_threshold",
            "Least score of a drawn hand point.",
            _DRAWING,
            default="the pose model's",
            of=ExtractSettings,
        ),
    ] = None,
    draw_mode: Annotated[
        DrawMode | None,
        _option(
            "draw_mode",
            "canvas: drawn at the size of the result; native: at the video's, then shrunk.",
            _DRAWING,
            of=ExtractSettings,
        ),
    ] = None,
    resume: Annotated[
        bool | None,
        _option(
            "resume",
            "Continue an unfinished extraction.",
            _RUN,
            flags=("--resume/--no-resume",),
            of=ExtractSettings,
        ),
    ] = None,
    dry_run: Annotated[
        bool | None, _option("dry_run", "Print the plan and stop.", _RUN, of=ExtractSettings)
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run `everanimate extract-pose`."""
    # The parameters are named as the settings fields; the other three are the command line's own.
    given = {
        name: value
        for name, value in locals().items()
        if value is not None and name not in ("list_persons", "as_json", "quiet")
    }
    settings = ExtractSettings.from_json(given)
    check_extract(settings, lists_only=list_persons)
    with _resumable("again" if settings.resume else "without --no-resume"):
        from everanimate_cli import extract
        from everanimate_cli.console import show_progress

        with show_progress(quiet=quiet) as on_event:
            if list_persons:
                persons = extract.list_persons(settings, on_event)
            else:
                result = extract.extract(settings, on_event)
    if list_persons:
        if as_json:
            typer.echo(json.dumps([person.to_json() for person in persons], ensure_ascii=False))
        else:
            for person_seen in persons:
                typer.echo(person_seen.describe())
        return
    _show_result(result, as_json=as_json, is_plan=settings.dry_run)


def _show_result(result: "AnimateResult | ExtractResult", *, as_json: bool, is_plan: bool) -> None:
    """The path that was made, or a plan line by line, or all of it as JSON."""
    if as_json:
        typer.echo(json.dumps(result.to_json(), ensure_ascii=False))
    elif is_plan:
        for name, value in result.to_json().items():
            typer.echo(_plan_line(name, value))
    else:
        typer.echo(result.output)


def _plan_line(name: str, value: object) -> str:
    """One entry of a plan as text: its unit, which ends the name, goes behind the number."""
    words, unit = name.removesuffix("_mib").replace("_", " "), " MiB" if "_mib" in name else ""
    if not isinstance(value, dict):
        return f"{words}: {value}{unit}"
    parts = [f"{part.replace('_', ' ')} {number}" for part, number in value.items()]
    return f"{words}: {', '.join(parts)}{unit}"


@app.command("demo", help=DEMO_HELP)
def _demo(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Folder for all files; made if missing."),
    ] = DemoSettings.directory,
    seconds: Annotated[
        float, typer.Option(help="Length of the video.", rich_help_panel=_RESULT, parser=_number)
    ] = DemoSettings.seconds,
    seed: Annotated[
        int,
        typer.Option(
            help="Character, dance and noise follow from it.",
            rich_help_panel=_RESULT,
            parser=_whole_number,
        ),
    ] = DemoSettings.seed,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier demo.", rich_help_panel=_RESULT)
    ] = DemoSettings.overwrite,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run `everanimate demo`."""
    settings = DemoSettings(directory=directory, seconds=seconds, seed=seed, overwrite=overwrite)
    check_demo(settings)
    with _resumable("again"):
        from everanimate_cli.console import show_progress
        from everanimate_cli.demo import run_demo

        with show_progress(quiet=quiet) as on_event:
            result = run_demo(settings, on_event)
    if as_json:
        typer.echo(json.dumps(result.to_json(), ensure_ascii=False))
    else:
        typer.echo(result.output)
        typer.echo(result.contact_sheet)


@app.command("runs", help=RUNS_HELP)
def _runs(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Where to look, or one run folder.")
    ] = Path(),
    remove: Annotated[bool, typer.Option("--remove", help="Delete them.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run `everanimate runs`."""
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"FOLDER {folder} {problem}. Give a folder with results.")
    entries = []
    for run in list_runs(folder):
        entry = run.to_json()
        line = f"{run.folder.path}: {run.describe()}"
        if remove:
            entry["removed"] = remove_run(run.folder)
            line += ", removed" if entry["removed"] else ", not removed"
        entries.append(entry)
        if not as_json:
            typer.echo(line)
    if as_json:
        typer.echo(json.dumps(entries, ensure_ascii=False))
    elif not entries:
        typer.echo(f"no runs in {folder}", err=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program: the one place where an error becomes a line and an exit code.

    Args:
        argv: The words after the program's name; None for those of this process.

    Returns:
        0 done, 1 failed while working, 2 wrong usage or input, 130 interrupted. A bug is not
        turned into a line: its exception passes through.
    """
    words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        # Outside standalone mode typer returns the code of an Exit, None after a command, and
        # leaves usage errors to us.
        code = app(words, prog_name=PROGRAM, standalone_mode=False)
    except EverAnimateError as error:
        return _fail(str(error), error.exit_code)
    except typer.TyperException as error:
        named = words[0] in [command.name for command in app.registered_commands]
        command = f"{PROGRAM} {words[0]}" if named else PROGRAM
        # "Value error" is the type checker's remark on a choice that does not exist.
        message = error.format_message().replace("Value error, ", "").rstrip()
        stop = "" if message.endswith((".", "?")) else "."
        return _fail(f"{message}{stop} See '{command} --help'.", error.exit_code)
    return int(code or 0)


def _fail(message: str, exit_code: int) -> int:
    typer.echo(f"error: {' '.join(line.strip() for line in message.splitlines())}", err=True)
    return exit_code
