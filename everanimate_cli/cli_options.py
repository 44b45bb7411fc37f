"""What the commands share: how options are declared, how a run ends, how its result is shown."""

import errno
import json
import sys
from _thread import interrupt_main
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from threading import Timer
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from everanimate_cli.errors import RunError
from everanimate_cli.records import Options, option_name

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

PROGRAM = "everanimate"
INTERRUPTED = 130
_REPEAT_AFTER_S = 0.01

# Headings of the groups on the help pages.
CARD = "Memory of the card"
LENGTH = "Length and motion"
MEMORY = "Memory between chunks"
MODEL = "Model"
PICTURE = "Picture"
RESULT = "Result"
RUN = "Run"
SPEED = "Speed"

OF_MODEL = "the model's"  # a default

AsJson = Annotated[
    bool, typer.Option("--json", help="Write the result to stdout as JSON.", rich_help_panel=RUN)
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="No progress and no notes.", rich_help_panel=RUN),
]

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="Take the options of a saved run; others on the command line win.",
        rich_help_panel=RUN,
        metavar="FILE",
        show_default=False,
    ),
]


class _Result(Protocol):
    """What a worker returns."""

    @property
    def output(self) -> Path:
        """What was made."""

    def to_json(self) -> dict[str, Any]:
        """All about it."""


def option(
    of: type[Options],
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
        of: The settings that have the field.
        field_name: The settings field; its default is shown in the help.
        text: What the option does.
        panel: Heading of its group in the help.
        flags: How it is written, if not just `--field-name`.
        metavar: What stands for its value in the help.
        default: What to show instead of the field's default.
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
        # Times are read later.
        parser=None if "decode" in item.metadata else _PARSERS.get(item.type),
    )


def whole_number(text: str) -> int:
    """Read what an option takes.

    Raises:
        typer.BadParameter: Showing the text, which typer's own message does not.
    """
    try:
        return int(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text} is not a whole number.") from error


def number(text: str) -> float:
    """Read what an option takes, as `whole_number`."""
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text} is not a number.") from error


_PARSERS: dict[Any, Callable[[str], Any]] = {
    int: whole_number,
    int | None: whole_number,
    float: number,
    float | None: number,
}


@contextmanager
def _no_lost_interrupt() -> Iterator[None]:
    """Repeat a Ctrl-C that came while a finalizer ran: Python drops what is raised there."""
    before = sys.unraisablehook

    def repeat(lost: "UnraisableHookArgs") -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            again = Timer(_REPEAT_AFTER_S, interrupt_main)  # by then the finalizer is done
            again.daemon = True
            again.start()
        else:
            before(lost)

    sys.unraisablehook = repeat
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextmanager
def resumable(how: str) -> Iterator[None]:
    """Turn Ctrl-C and a full disk into a line that says how to go on."""
    try:
        with _no_lost_interrupt():
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


def show_result(result: _Result, *, as_json: bool, is_plan: bool) -> None:
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
    if isinstance(value, list):
        described = "; ".join(_join_parts(each) for each in value)
        return f"{words}: {described or 'none'}"
    if not isinstance(value, dict):
        return f"{words}: {value}{unit}"
    return f"{words}: {_join_parts(value)}{unit}"


def _join_parts(parts: Mapping[str, object]) -> str:
    return ", ".join(_part(name, value) for name, value in parts.items() if value is not None)


def _part(name: str, value: object) -> str:
    words, unit = name.removesuffix("_mb").replace("_", " "), " MB" if "_mb" in name else ""
    return f"{words} {value}{unit}"
