"""The command line: options become settings, one worker is called, its path goes to stdout.

Nothing heavy is imported at module level: `--help`, a slip in an option and a missing file are
answered before torch or diffusers is loaded. Workers are imported inside the commands.
"""

import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from everanimate_cli import __version__, cli_analyze, cli_models
from everanimate_cli.cli_animate import ANIMATE_HELP, run_animate
from everanimate_cli.cli_doctor import DOCTOR_HELP, run_doctor
from everanimate_cli.cli_eval import EVAL_HELP, run_eval
from everanimate_cli.cli_extract import EXTRACT_HELP, run_extract_pose
from everanimate_cli.cli_launch import this_launch
from everanimate_cli.cli_options import (
    INTERRUPTED,
    PROGRAM,
    RESULT,
    AsJson,
    Quiet,
    number,
    resumable,
    whole_number,
)
from everanimate_cli.cli_train import TRAIN_HELP, run_train_lora
from everanimate_cli.errors import EverAnimateError, InputError
from everanimate_cli.preflight import check_demo, check_environment
from everanimate_cli.runs import list_runs, remove_run
from everanimate_cli.settings import DemoSettings

APP_HELP = "Animate a character from one picture with the motion of a video, for minutes."

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


app.command("animate", help=ANIMATE_HELP)(run_animate)
app.command("extract-pose", help=EXTRACT_HELP)(run_extract_pose)
app.command("train-lora", help=TRAIN_HELP)(run_train_lora)
app.command("eval", help=EVAL_HELP)(run_eval)
app.command("doctor", help=DOCTOR_HELP)(run_doctor)
app.add_typer(cli_analyze.app, name="analyze")
app.add_typer(cli_models.app, name="models")


@app.command("demo", help=DEMO_HELP)
def _demo(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Folder for all files; made if missing."),
    ] = DemoSettings.directory,
    seconds: Annotated[
        float, typer.Option(help="Length of the video.", rich_help_panel=RESULT, parser=number)
    ] = DemoSettings.seconds,
    seed: Annotated[
        int,
        typer.Option(
            help="Character, dance and noise follow from it.",
            rich_help_panel=RESULT,
            parser=whole_number,
        ),
    ] = DemoSettings.seed,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier demo.", rich_help_panel=RESULT)
    ] = DemoSettings.overwrite,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run `everanimate demo`."""
    settings = DemoSettings(directory=directory, seconds=seconds, seed=seed, overwrite=overwrite)
    check_demo(settings)
    with resumable("again"):
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
    launch = this_launch()
    if launch is None or launch.is_main or words[0] != "animate":
        code = _run(words)
        if argv is None and launch is None and code == INTERRUPTED:
            # Taking the libraries down takes a moment: another Ctrl-C ends it without a trace.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        return code
    # The main process tells the same, and its exit code counts.
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        _run(words)
    return 0


def _run(words: Sequence[str]) -> int:
    """Run a command line and turn what a user can mend into a line."""
    try:
        if not {"--help", "-h", "--version"}.intersection(words):
            check_environment(os.environ)
        # Outside standalone mode typer returns the code of an Exit, None after a command, and
        # leaves usage errors to us.
        code = app(list(words), prog_name=PROGRAM, standalone_mode=False)
    except EverAnimateError as error:
        return _fail(str(error), error.exit_code)
    except typer.TyperException as error:
        command = f"{PROGRAM} {_command_of(words)}".rstrip()
        # "Value error" is the type checker's remark on a choice that does not exist.
        message = error.format_message().replace("Value error, ", "").rstrip()
        stop = "" if message.endswith((".", "?")) else "."
        return _fail(f"{message}{stop} See '{command} --help'.", error.exit_code)
    return int(code or 0)


def _command_of(words: Sequence[str]) -> str:
    """The command that words begin with, such as "analyze roundtrip"; empty if there is none."""
    if words[0] in [command.name for command in app.registered_commands]:
        return words[0]
    groups = {"analyze": cli_analyze.app, "models": cli_models.app}
    if words[0] not in groups:
        return ""
    commands = [command.name for command in groups[words[0]].registered_commands]
    return " ".join(words[:2] if words[1:2] and words[1] in commands else words[:1])


def _fail(message: str, exit_code: int) -> int:
    line = " ".join(line.strip() for line in message.splitlines())
    # Names in files of others may hold what steers a terminal.
    shown = "".join(
        char if char.isprintable() or char.isspace() else ascii(char)[1:-1] for char in line
    )
    typer.echo(f"error: {shown}", err=True)
    return exit_code
