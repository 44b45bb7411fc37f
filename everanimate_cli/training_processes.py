"""The processes of one training: how they start, wait for each other and stop together.

A launcher (`accelerate launch`, `torchrun`) starts them; without one there is a single process.
What they tell each other here goes over a CPU channel of their own, beside that of the gradients:
a wait for hours of pose extraction is no failure there, and no GPU has to finish its queue.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from torch import distributed
from torch.distributed.fsdp import CPUOffloadPolicy

from everanimate_cli.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from everanimate_cli.train_settings import TrainSettings

# The main process may download a checkpoint and extract the poses of many videos before the
# others have anything to do.
_LONGEST_WAIT = timedelta(days=30)

_Result = TypeVar("_Result")


class StoppedElsewhereError(Exception):
    """Another process of the training has failed, and says so itself."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among the others.

    Attributes:
        accelerator: Of accelerate, which places the network and sums the gradients.
        channel: Over which they talk; None for one process.
    """

    accelerator: Accelerator
    channel: distributed.ProcessGroup | None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and reports."""
        return bool(self.accelerator.is_main_process)

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self.accelerator.num_processes)

    @property
    def shard_weights(self) -> bool:
        """Whether each holds a part of the weights only (FSDP2)."""
        return bool(self.accelerator.distributed_type == DistributedType.FSDP)

    @property
    def offload_weights(self) -> bool:
        """Whether these parts wait in main memory."""
        policy = self.accelerator.state.fsdp_plugin.cpu_offload
        return isinstance(policy, CPUOffloadPolicy)

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process; every process must call it."""
        return any(self._flags(flag))

    @contextmanager
    def stopping_together(self) -> Iterator[None]:
        """Let no process wait for one that fails in this block; every process must enter it.

        Raises:
            StoppedElsewhereError: In a process that has nothing to tell: it has not failed, or the
                main process tells its own failure.
        """
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:
            if self.channel is None:
                raise
            error = caught
        failed = self._flags(error is not None)
        if not any(failed):
            return
        if error is None or (failed[0] and not self.is_main):
            raise StoppedElsewhereError
        raise error

    def joint(self, error: BaseException) -> BaseException:
        """What each process is to raise when all have found the same; only one tells it."""
        return error if self.is_main else StoppedElsewhereError()

    def of_main(self, work: Callable[[], _Result]) -> _Result:
        """Let the main process do something, and give all its result, which must be picklable.

        Raises:
            StoppedElsewhereError: In the others, if it fails.
        """
        results: list[Any] = [None]
        with self.stopping_together():
            if self.is_main:
                results = [work()]
        if self.channel is not None:
            distributed.broadcast_object_list(results, src=0, group=self.channel)
        result: _Result = results[0]
        return result

    def main_first(self, work: Callable[[], _Result]) -> _Result:
        """Do something in the main process, then in the others, which find what it has downloaded.

        Raises:
            StoppedElsewhereError: If it fails in another process.
        """
        results: list[_Result] = []
        for is_turn in (self.is_main, not self.is_main):
            with self.stopping_together():
                if is_turn:
                    results.append(work())
        return results[0]

    def wait(self) -> None:
        """Go on when all are here."""
        self._flags(False)

    def _flags(self, flag: bool) -> list[bool]:
        """Of all processes; the main one's comes first."""
        flags = torch.zeros(self.count, dtype=torch.int32)
        flags[self.accelerator.process_index] = flag
        if self.channel is not None:
            distributed.all_reduce(flags, group=self.channel)
        return [bool(each) for each in flags]


def computes_in_bf16(settings: TrainSettings, dtype: torch.dtype) -> bool:
    """Whether a network whose weights are in `dtype` is trained under autocast."""
    if settings.mixed_precision is None:
        return dtype == torch.bfloat16
    return settings.mixed_precision == "bf16"


@contextmanager
def open_processes(
    settings: TrainSettings, device: torch.device, dtype: torch.dtype
) -> Iterator[Processes]:
    """Join the processes that a launcher has started, if it has.

    Args:
        settings: Of the training: precision and batches per step.
        device: Kind of device to compute on.
        dtype: Number format of the network.

    Raises:
        SettingsError: If accelerate cannot do what its own options ask for, or training cannot.
    """
    try:
        try:
            accelerator = Accelerator(
                cpu=device.type == "cpu",
                mixed_precision="bf16" if computes_in_bf16(settings, dtype) else "no",
                # A plugin, since a bare number gives way to a variable of accelerate's.
                gradient_accumulation_plugin=GradientAccumulationPlugin(
                    num_steps=settings.accumulate, sync_with_dataloader=False
                ),
            )
        except (ImportError, ValueError, NotImplementedError) as error:
            reason = " ".join(str(error).split())
            raise SettingsError(f"accelerate cannot start: {reason}") from error
        channel = None
        if accelerator.num_processes > 1:
            channel = distributed.new_group(backend="gloo", timeout=_LONGEST_WAIT)
        processes = Processes(accelerator=accelerator, channel=channel)
        with processes.stopping_together():
            _check_launch(accelerator, settings)
        try:
            yield processes
        finally:
            accelerator.free_memory()
    finally:
        # The next call in this process may want another device or precision.
        AcceleratorState._reset_state(reset_partial_state=not distributed.is_initialized())


def _check_launch(accelerator: Accelerator, settings: TrainSettings) -> None:
    """Refuse ways of sharing the work that training does not know."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise SettingsError(
            "DeepSpeed's state cannot be stored by train-lora. Launch it with DDP or FSDP2: "
            "what is trained is small, so that ZeRO has nothing to add."
        )
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    if not getattr(accelerator, "is_fsdp2", False):
        raise SettingsError(
            "FSDP 1 cannot hold frozen and trained weights side by side. "
            "Launch with --fsdp_version 2."
        )
    if settings.quantize_base != "none":
        raise SettingsError(
            f"--quantize-base {settings.quantize_base} does not go with FSDP. "
            "Leave it out: FSDP splits the weights already."
        )
