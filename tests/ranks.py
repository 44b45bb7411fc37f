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
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from studio import Outcome

Failure = Literal["disk full", "clip gone", "not to be called"]
# How several processes share the work: as accelerate lets them on GPUs.
Sharing = Literal["ddp", "fsdp2", "fsdp2 offloading", "zero0", "zero1", "zero2", "zero3"]


@dataclass(frozen=True, kw_only=True)
class Command:
    """What to run.

    Attributes:
        words: Of the command line, after the program's name.
        sharing: What each process keeps; ZeRO needs the package deepspeed.
        configuration: Further words of DeepSpeed's configuration.
        rank: The process in which something goes wrong; None for none.
        place: What raises there: `module.name` below the package.
        failure: What it raises.
    """

    words: list[str]
    sharing: Sharing = "ddp"
    configuration: dict[str, Any] = field(default_factory=dict)
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
    """Let accelerate believe in FSDP2 or ZeRO on the CPU, where it would take no notice of them."""
    if command.sharing == "ddp":
        yield
        return
    from accelerate import PartialState  # noqa: PLC0415
    from accelerate.utils import DistributedType  # noqa: PLC0415

    is_zero = command.sharing.startswith("zero")
    launch = partial(_launch_zero if is_zero else _launch_fsdp, command)
    with mock.patch("everanimate_cli.training_processes.Accelerator", launch):
        yield
    # The processes stay for the next command, and accelerate takes over what they have been.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU


def _launch_fsdp(command: Command, **options: Any) -> Any:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin  # noqa: PLC0415
    from accelerate.utils import DistributedType  # noqa: PLC0415

    accelerator = Accelerator(**options)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_offload=command.sharing == "fsdp2 offloading"
    )
    accelerator.state.distributed_type = DistributedType.FSDP
    return accelerator


def _launch_zero(command: Command, **options: Any) -> Any:
    from accelerate import Accelerator, DeepSpeedPlugin, PartialState  # noqa: PLC0415
    from accelerate.utils import DistributedType  # noqa: PLC0415

    accelerator = Accelerator(**options)
    zero = {"stage": int(command.sharing[-1])} | command.configuration.get("zero_optimization", {})
    configuration = command.configuration | {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }
    plugin = DeepSpeedPlugin(hf_ds_config=configuration)
    plugin.set_mixed_precision(options["mixed_precision"])
    plugin.select(_from_accelerator_state=True)
    accelerator.state.distributed_type = DistributedType.DEEPSPEED
    PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    accelerator.state.deepspeed_plugins = plugin
    accelerator.deepspeed_engine_wrapped = None
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # which would hold for the next command too
    return accelerator


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
