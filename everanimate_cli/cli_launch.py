"""What the processes that a launcher starts for one command do on the command line."""

import os
import signal
import sys
from typing import NoReturn, Protocol

import typer

from everanimate_cli.launch import Launch, read_launch


class _Failure(Protocol):
    """Of another process."""

    @property
    def message(self) -> str:
        """One line."""

    @property
    def exit_code(self) -> int:
        """Of the main process."""


def this_launch() -> Launch | None:
    """Who this process is; None where it is the only one."""
    return read_launch(os.environ)


def leave(failure: _Failure | None) -> NoReturn:
    """End this process at once, whatever it waits for: a run folder is whole at any moment."""
    exit_code = 0
    if failure is not None:
        if sys.stderr.isatty():
            typer.echo("\x1b[?25h", err=True)  # a new line, and the cursor that the bars hide
        typer.echo(f"error: {failure.message}", err=True)
        exit_code = failure.exit_code
    os._exit(exit_code)


def run_partner(launch: Launch) -> None:
    """Compute what the main process asks for, until it needs no more."""
    # Ctrl-C reaches all processes; the main one lets the others go.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from everanimate_cli.animate_processes import Processes
    from everanimate_cli.parallel_pipeline import serve

    serve(Processes(launch, leave))
