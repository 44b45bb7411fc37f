"""The processes of one training: how they start, wait for each other and stop together.

A launcher (`accelerate launch`, `torchrun`) starts them; without one there is a single process.
What they tell each other here goes over a CPU channel of their own, beside that of the gradients:
a wait for hours of pose extraction is no failure there, and no GPU has to finish its queue.
"""

from __future__ import annotations

import io
import logging
import sys
import warnings
from contextlib import contextmanager, redirect_stdout
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

    from torch import nn

    from everanimate_cli.train_settings import TrainSettings

# The main process may download a checkpoint and extract the poses of many videos before the
# others have anything to do.
_LONGEST_WAIT = timedelta(days=30)

_SHARDING_STAGE = 3  # of ZeRO, which shares out weights too
_NOT_ASKED = object()

_Result = TypeVar("_Result")


class StoppedElsewhereError(Exception):
    """Another process of the training has failed, and says so itself."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among the others.

    Attributes:
        accelerator: Of accelerate, which places the network and sums the gradients.
        channel: Over which they talk; None for one process.
        in_bf16: Whether the network computes under autocast.
    """

    accelerator: Accelerator
    channel: distributed.ProcessGroup | None
    in_bf16: bool

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and reports."""
        return bool(self.accelerator.is_main_process)

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self.accelerator.num_processes)

    @property
    def uses_fsdp(self) -> bool:
        """Whether FSDP2 shares out weights and optimiser."""
        return bool(self.accelerator.distributed_type == DistributedType.FSDP)

    @property
    def zero_stage(self) -> int | None:
        """What DeepSpeed shares out: 1, 2 the optimiser's state, 3 weights too; None without it."""
        if self.accelerator.distributed_type != DistributedType.DEEPSPEED:
            return None
        return _zero_stage(self.accelerator)

    @property
    def shard_weights(self) -> bool:
        """Whether each holds a part of the weights only (FSDP2, ZeRO-3)."""
        return self.uses_fsdp or self.zero_stage == _SHARDING_STAGE

    @property
    def offload_weights(self) -> bool:
        """Whether these parts wait in main memory."""
        policy = self.accelerator.state.fsdp_plugin.cpu_offload
        return isinstance(policy, CPUOffloadPolicy)

    def prepare(
        self, network: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, Any]:
        """Let accelerate wrap them for this way of sharing the work; not for FSDP2.

        Raises:
            SettingsError: If DeepSpeed's configuration cannot be used.
        """
        # pydantic's and DeepSpeed's own complaints about a configuration.
        complaints: tuple[type[Exception], ...] = (ValueError, AssertionError, ImportError)
        complaints += _deepspeed_errors(self.zero_stage)
        try:
            with redirect_stdout(io.StringIO()):  # DeepSpeed tells each thing that it compiles
                if self.zero_stage == _SHARDING_STAGE:
                    self._share_out(network)
                network, optimizer = self.accelerator.prepare(network, optimizer)
        except complaints as error:
            if self.zero_stage is None:
                raise
            raise self.joint(
                SettingsError(f"DeepSpeed cannot start: {' '.join(str(error).split())}")
            ) from error
        return network, optimizer

    def _share_out(self, network: nn.Module) -> None:
        """Leave each process a part of every weight of the blocks, one weight after the other.

        DeepSpeed's engine would first bring all of them to every device. It shares out the others,
        which are few.
        """
        from deepspeed import zero  # noqa: PLC0415  # optional package

        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        # Not the whole network: the engine prints it, and some of diffusers' layers cannot be
        # printed without their weights.
        zero.Init(module=network.get_submodule("blocks"), config_dict_or_path=config)
        for buffer in network.buffers():
            buffer.data = buffer.data.to(self.accelerator.device)

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

    DeepSpeed's configuration is complete then: what it leaves open and what the options of the
    training say is filled in.

    Args:
        settings: Of the training: precision and batches per step.
        device: Kind of device to compute on.
        dtype: Number format of the network.

    Raises:
        SettingsError: If accelerate cannot do what its own options ask for, or training cannot.
    """
    try:
        try:
            # DeepSpeed greets on stdout, where the result belongs, and keeps writing where
            # stdout was when it was imported.
            with redirect_stdout(sys.stderr):
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
        processes = Processes(
            accelerator=accelerator, channel=channel, in_bf16=computes_in_bf16(settings, dtype)
        )
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
    """Refuse ways of sharing the work that training does not know, and complete the others."""
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        _configure_deepspeed(accelerator, settings)
    elif getattr(accelerator, "deepspeed_engine_wrapped", _NOT_ASKED) is not _NOT_ASKED:
        raise SettingsError(
            "accelerate runs DeepSpeed on GPUs only. Launch without --use_deepspeed, or leave "
            "out --device cpu."
        )
    elif kind == DistributedType.FSDP and not getattr(accelerator, "is_fsdp2", False):
        raise SettingsError(
            "FSDP 1 cannot hold frozen and trained weights side by side. "
            "Launch with --fsdp_version 2."
        )
    others = {DistributedType.FSDP: "FSDP", DistributedType.DEEPSPEED: "DeepSpeed"}
    if kind in others and settings.quantize_base != "none":
        raise SettingsError(
            f"--quantize-base {settings.quantize_base} does not go with {others[kind]}. "
            "Leave it out: FSDP2 and ZeRO-3 split the weights already."
        )


def _deepspeed_errors(zero_stage: int | None) -> tuple[type[Exception], ...]:
    """Classes that derive from nothing better than Exception."""
    if zero_stage is None:
        return ()
    from deepspeed.runtime.config import DeepSpeedConfigError  # noqa: PLC0415  # optional package
    from deepspeed.runtime.zero.utils import ZeRORuntimeException  # noqa: PLC0415  # see above

    return DeepSpeedConfigError, ZeRORuntimeException


def _zero_stage(accelerator: Accelerator) -> int:
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    return int(config["zero_optimization"].get("stage", 0))


def _configure_deepspeed(accelerator: Accelerator, settings: TrainSettings) -> None:
    """Let DeepSpeed's configuration say what the training's options say, and refuse what it cannot.

    Source: DeepSpeed's documentation, "DeepSpeed Configuration JSON".
    """
    plugin = accelerator.state.deepspeed_plugin
    config = plugin.deepspeed_config
    zero = config["zero_optimization"]
    for handler in logging.getLogger("DeepSpeed").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)  # the result alone belongs on stdout
    # DeepSpeed calls what torch 2.13 has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if not _zero_stage(accelerator):
        raise SettingsError(
            "DeepSpeed without ZeRO shares out nothing. Launch with --zero_stage 1, 2 or 3, or "
            "without --use_deepspeed."
        )
    for section, instead in (
        ("optimizer", "AdamW is made from --lr and --weight-decay"),
        ("scheduler", "--warmup shapes the learning rate"),
    ):
        if section in config:
            raise SettingsError(
                f"DeepSpeed's configuration has a section {section}. Leave it out: {instead}."
            )
    if config.get("fp16", {}).get("enabled") is True:
        raise SettingsError(
            "DeepSpeed's configuration asks for fp16, in which gradients overflow. "
            "Give --mixed-precision bf16."
        )
    for part in ("optimizer", "param"):
        if zero.get(f"offload_{part}", {}).get("device") == "nvme":
            raise SettingsError(
                f"DeepSpeed's offload_{part} to NVMe keeps state where no checkpoint finds it. "
                "Give cpu or none."
            )
    for name, value, option in (
        ("train_micro_batch_size_per_gpu", settings.batch_size, "--batch-size"),
        ("gradient_accumulation_steps", settings.accumulate, "--accumulate"),
        ("gradient_clipping", settings.max_grad_norm, "--max-grad-norm"),
    ):
        given = config.get(name, "auto")
        # accelerate puts 1 accumulation step where nobody has said anything.
        if given not in ("auto", 1, value):
            raise SettingsError(
                f"DeepSpeed's {name} is {given}, {option} is {value}. Give one value to both, "
                "or leave DeepSpeed's out."
            )
        config[name] = value
    config["train_batch_size"] = (
        settings.batch_size * settings.accumulate * accelerator.num_processes
    )
    # Sizes that accelerate would work out from a language model's width: DeepSpeed has its own.
    for name in [name for name, value in zero.items() if value == "auto"]:
        del zero[name]
    # The network computes under autocast: DeepSpeed would round all weights, those that have to
    # stay float32 and the adapters too.
    config["bf16"] = {"enabled": False}
    config["fp16"] = {"enabled": False}
    # Without a compiler there is no AdamW of DeepSpeed's own; torch's steps what is small here.
    config["zero_force_ds_cpu_optimizer"] = False
    config["zero_allow_untested_optimizer"] = True
    # transformers would share out the encoders' weights as it loads them, for engines that
    # nobody makes.
    plugin.zero3_init_flag = False
    plugin.dschf = None
