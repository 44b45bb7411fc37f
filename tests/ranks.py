"""Run command lines one after the other, in each process that a launcher has started.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/ranks.py FOLDER

FOLDER/commands.json holds the commands, see `Command`; FOLDER/rank-0.json and so on get the answers
of each process, a list of `Outcome` as JSON objects. The current folder of the commands is FOLDER.
"""

import errno
import io
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from studio import Outcome

Failure = Literal["disk full", "clip gone", "not to be called"]


@dataclass(frozen=True, kw_only=True)
class Command:
    """What to run.

    Attributes:
        words: Of the command line, after the program's name.
        sharded: Whether the processes share the weights, as accelerate's FSDP2 lets them on GPUs.
        rank: The process in which something goes wrong; None for none.
        place: What raises there: `module.name` below the package.
        failure: What it raises.
    """

    words: list[str]
    sharded: bool = False
    rank: int | None = None
    place: str = ""
    failure: Failure = "not to be called"


def run_command(command: Command) -> Outcome:
    """Run one command line in this process and catch what it says."""
    from everanimate_cli.cli import main  # noqa: PLC0415  # the launcher's child is started first

    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), _sharding(command), _failing(command):
        try:
            code = main(command.words)
        except BaseException:  # shown in the answer, and the next command runs
            traceback.print_exc()
            code = -1
    return Outcome(code, out.getvalue(), err.getvalue())


@contextmanager
def _sharding(command: Command) -> Iterator[None]:
    """Let accelerate believe in FSDP2 on the CPU, where it would take no notice of it."""
    if not command.sharded:
        yield
        return
    from accelerate import Accelerator, FullyShardedDataParallelPlugin  # noqa: PLC0415
    from accelerate.utils import DistributedType  # noqa: PLC0415

    def launch(**options: Any) -> Accelerator:
        accelerator = Accelerator(**options)
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        accelerator.state.distributed_type = DistributedType.FSDP
        return accelerator

    with mock.patch("everanimate_cli.training_processes.Accelerator", launch):
        yield


@contextmanager
def _failing(command: Command) -> Iterator[None]:
    if command.rank != int(os.environ["RANK"]):
        yield
        return
    from everanimate_cli.errors import RunError  # noqa: PLC0415

    errors: dict[Failure, Exception] = {
        "disk full": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        "clip gone": RunError("the clip is gone."),
        "not to be called": AssertionError("not by this process"),
    }
    with mock.patch(f"everanimate_cli.{command.place}", side_effect=errors[command.failure]):
        yield


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    os.chdir(folder)
    commands = [Command(**each) for each in json.loads(Path("commands.json").read_text())]
    answers = [asdict(run_command(command)) for command in commands]
    Path(f"rank-{os.environ['RANK']}.json").write_text(json.dumps(answers))
