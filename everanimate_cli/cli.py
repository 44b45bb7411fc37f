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
from typing import Annotated, Any

import typer

from everanimate_cli import __version__
from everanimate_cli.errors import EverAnimateError, InputError, RunError, SettingsError
from everanimate_cli.preflight import check_animate, check_demo
from everanimate_cli.runs import list_runs, remove_run
from everanimate_cli.settings import (
    HUB_MODEL,
    AnimateSettings,
    ClipImage,
    Codec,
    DemoSettings,
    Device,
    Dtype,
    Extend,
    Fit,
    Memory,
    combine,
    option_name,
    read_saved_options,
)

PROGRAM = "everanimate"
INTERRUPTED = 130

APP_HELP = "Animate a character from one picture with the motion of a video, for minutes."

# The help keeps line breaks, so a paragraph is one line; a lone backspace keeps the lines below it.
ANIMATE_HELP = (
    "Animate the character in the picture REF with the motion in DRIVING.\n\n"
    "DRIVING is a folder with pose.mp4, face.mp4 and extract.json; or give --pose and --face. "
    "The result is DRIVING_REF.mp4 in the current folder unless --output says otherwise; its path "
    "is all that goes to stdout. An interrupted run continues when the same command is run again."
    f"""

\b
Examples:
  {PROGRAM} animate anna.png dance
  {PROGRAM} animate anna.png dance --minutes 2 -o anna.mp4
  {PROGRAM} animate anna.png dance --model toy --size auto
  {PROGRAM} animate anna.png dance --lora my.safetensors=0.8
  {PROGRAM} animate --config anna.json --seed 7 -o other.mp4
"""
)

DEMO_HELP = (
    "Render a character and a dance, and animate it with the embedded toy model.\n\n"
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
) -> Any:
    """An option whose value is None unless given, so that a settings file can stand behind it.

    Args:
        field_name: The settings field; its default is shown in the help.
        text: What the option does.
        panel: Heading of its group in the help.
        flags: How it is written, if not just `--field-name`.
        metavar: What stands for its value in the help.
        default: What to show instead of the field's default.
    """
    item = next(item for item in fields(AnimateSettings) if item.name == field_name)
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
            help="Folder with pose.mp4, face.mp4 and extract.json.",
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
    if as_json:
        typer.echo(json.dumps(result.to_json(), ensure_ascii=False))
    elif settings.dry_run:
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
