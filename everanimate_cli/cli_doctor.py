"""The command `doctor`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from everanimate_cli.cli_options import PROGRAM, AsJson
from everanimate_cli.errors import InputError
from everanimate_cli.preflight import check_model
from everanimate_cli.settings import HUB_MODEL, TOY_MODEL

if TYPE_CHECKING:
    from everanimate_cli.doctor import Diagnosis

DOCTOR_HELP = (
    "Say what this machine has, what of it a model would use, and what stands in the way.\n\n"
    "Nothing is downloaded or changed. Memory and time are estimates. The exit code is 1 if "
    "something that is needed is broken."
    f"""

\b
Examples:
  {PROGRAM} doctor
  {PROGRAM} doctor --model {TOY_MODEL}
  {PROGRAM} doctor --json
"""
)


def run_doctor(
    model: Annotated[
        str,
        typer.Option(metavar="MODEL", help="'toy' (embedded), a checkpoint folder, or a Hub id."),
    ] = HUB_MODEL,
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder where results would go.")
    ] = Path(),
    as_json: AsJson = False,
) -> None:
    """Run `everanimate doctor`."""
    if not output.is_dir():
        problem = "is a file" if output.exists() else "does not exist"
        raise InputError(f"--output {output} {problem}. Give a folder.")
    check_model(model)
    from everanimate_cli.doctor import examine

    found = examine(model, output)
    if as_json:
        typer.echo(json.dumps(found.to_json(), ensure_ascii=False))
    else:
        _show(found)
    if not found.is_usable:
        raise typer.Exit(1)


def _show(found: "Diagnosis") -> None:
    """Tables on a terminal, else plain lines."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    problems: list[tuple[str, str]] = [
        (problem.severity, f"{problem.text}. {problem.remedy}") for problem in found.problems
    ]
    sections = {**found.sections(), "Problems": problems or [("none", "")]}
    if not console.is_terminal:
        for heading, rows in sections.items():
            typer.echo(f"{heading}:")
            for name, value in rows:
                typer.echo(f"  {name}: {value}" if value else f"  {name}")
        return
    colours = {"error": "red", "warning": "yellow"}
    for heading, rows in sections.items():
        table = Table(title=heading, title_justify="left", show_header=False, box=None)
        # A long name leaves the rest of the line to what is said of it.
        table.add_column(style="bold", overflow="fold", max_width=max(console.width // 2, 1))
        table.add_column(overflow="fold")
        for name, value in rows:
            # Text keeps brackets in paths from being read as markup.
            table.add_row(Text(name, style=colours.get(name, "")), Text(value))
        console.print(table)
        console.print()
