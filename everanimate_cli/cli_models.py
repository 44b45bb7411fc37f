"""The commands `models list`, `models pull`, `models verify` and `models path`."""

import json
from typing import Annotated

import typer

from everanimate_cli.cli_options import PROGRAM, RUN, AsJson, Quiet, resumable
from everanimate_cli.events import Note
from everanimate_cli.settings import HUB_MODEL, TOY_MODEL

MODELS_HELP = (
    "Download models beforehand, check them, and say where they are.\n\n"
    "Checkpoints and LoRAs lie in the cache of the Hugging Face Hub, where animate finds them: "
    "HF_HOME names another folder, HF_ENDPOINT a mirror, HF_TOKEN who asks, and HF_HUB_OFFLINE=1 "
    "forbids the network. NAME is written as after --model, --lora, --pose-model or --detector: "
    "owner/name, owner/name/path/to/lora.safetensors, rtmw. A branch, tag or commit can follow: "
    "owner/name@revision. What is in the cache is used as it is, and its commit is saved with "
    "every result."
)

LIST_HELP = (
    "List the known models, or those with the given NAMEs, and what is in the caches."
    f"""

\b
Examples:
  {PROGRAM} models list
  {PROGRAM} models list --json
"""
)

PULL_HELP = (
    "Download models into the cache, as far as they are missing there.\n\n"
    "Without NAME: all that animate takes by default, LoRA and pose model included. Only the files "
    "that are needed are taken, after a check that the disk has room for them. An interrupted "
    "download goes on when the same command is run again, and what is cut short comes again. The "
    "paths go to stdout."
    f"""

\b
Examples:
  {PROGRAM} models pull
  {PROGRAM} models pull --fast
  {PROGRAM} models pull --dry-run
  {PROGRAM} models pull {HUB_MODEL}@main
  {PROGRAM} models pull --no-transformer
"""
)

VERIFY_HELP = (
    "Check that models are whole, undamaged and the right networks.\n\n"
    "Without NAME: all known ones that are in the cache. Files are compared with the hashes that "
    "their publisher states, which the cache knows without the network, and names and shapes of "
    "all weights with the networks. The exit code is 1 if something is wrong."
    f"""

\b
Examples:
  {PROGRAM} models verify
  {PROGRAM} models verify {TOY_MODEL}
"""
)

PATH_HELP = (
    "Print where a model lies, for scripts.\n\n"
    "The exit code is 2 if it is not on this machine, or not all of it."
    f"""

\b
Examples:
  {PROGRAM} models path {TOY_MODEL}
  {PROGRAM} models path {HUB_MODEL}
"""
)

app = typer.Typer(help=MODELS_HELP)

_Names = Annotated[
    list[str] | None,
    typer.Argument(metavar="NAME", help="Models of any kind.", show_default=False),
]


@app.command("list", help=LIST_HELP)
def _list(names: _Names = None, as_json: AsJson = False) -> None:
    """Run `everanimate models list`."""
    from everanimate_cli.cached_models import KNOWN_NAMES, inspect_model

    models = [inspect_model(name) for name in names or KNOWN_NAMES]
    if as_json:
        typer.echo(json.dumps([model.to_json() for model in models], ensure_ascii=False))
        return
    for model in models:
        typer.echo(model.describe_with_use())


@app.command("pull", help=PULL_HELP)
def _pull(
    names: _Names = None,
    fast: Annotated[
        bool,
        typer.Option("--fast", help="Also what animate --fast needs: the step-distilled LoRA."),
    ] = False,
    no_transformer: Annotated[
        bool,
        typer.Option(
            "--no-transformer",
            help="Leave the model's transformer out, for animate with --transformer FILE.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print what is missing and stop.", rich_help_panel=RUN),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run `everanimate models pull`."""
    from everanimate_cli.cached_models import (
        describe_fast_lack,
        describe_step,
        plan_pull,
        pull,
    )
    from everanimate_cli.console import show_progress
    from everanimate_cli.hub import DEFAULT_NAMES, FAST_NAMES
    from everanimate_cli.hub_transfer import amount

    chosen = [*(names or DEFAULT_NAMES), *(FAST_NAMES if fast else ())]
    steps = plan_pull(list(dict.fromkeys(chosen)), without_transformer=no_transformer)
    if dry_run:
        plan = [describe_step(step) for step in steps]
        if as_json:
            typer.echo(json.dumps(plan, ensure_ascii=False))
            return
        for step in plan:
            count = step["missing_files"]
            files = "1 file" if count == 1 else f"{count} files"
            missing = f"{files}, {amount(step['missing_bytes'])}"
            typer.echo(f"{step['name']}: {missing} missing of {amount(step['num_bytes'])}")
        return
    with resumable("again"), show_progress(quiet=quiet) as on_event:
        models = [pull(step, on_event) for step in steps]
        if not names and not fast:
            for line in describe_fast_lack():
                on_event(Note(text=line))
    if as_json:
        typer.echo(json.dumps([model.to_json() for model in models], ensure_ascii=False))
        return
    for model in models:
        typer.echo(model.path)


@app.command("verify", help=VERIFY_HELP)
def _verify(names: _Names = None, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Run `everanimate models verify`."""
    from everanimate_cli.cached_models import KNOWN_NAMES, inspect_model, locate
    from everanimate_cli.console import show_progress

    for name in names or ():
        if inspect_model(name).path is None:
            locate(name)  # refuses it before torch is loaded
    chosen = names or [name for name in KNOWN_NAMES if inspect_model(name).path is not None]
    with resumable("again"):
        from everanimate_cli.verification import verify

        with show_progress(quiet=quiet) as on_event:
            verdicts = [verify(name, on_event) for name in chosen]
    if as_json:
        typer.echo(json.dumps([verdict.to_json() for verdict in verdicts], ensure_ascii=False))
    else:
        for verdict in verdicts:
            typer.echo(verdict.describe())
    if any(verdict.problems for verdict in verdicts):
        raise typer.Exit(1)


@app.command("path", help=PATH_HELP)
def _path(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Model of any kind.", show_default=False)
    ],
) -> None:
    """Run `everanimate models path`."""
    from everanimate_cli.cached_models import locate

    typer.echo(locate(name))
