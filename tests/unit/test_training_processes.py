"""The processes of a training, as far as one can show; two of them are in the tests of the CLI."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DeepSpeedPlugin, DistributedType
from sample_fakes import train_settings
from torch import distributed

from everanimate_cli import training_processes
from everanimate_cli.errors import RunError, SettingsError
from everanimate_cli.training_processes import (
    Processes,
    StoppedElsewhereError,
    open_processes,
)

CPU = torch.device("cpu")


@dataclass(kw_only=True)
class FakeAccelerator:
    """One of several processes that a launcher has started."""

    num_processes: int = 1
    process_index: int = 0
    distributed_type: DistributedType = DistributedType.NO
    is_fsdp2: bool = False
    state: Any = None
    given: dict[str, Any] = field(default_factory=dict)

    @property
    def is_main_process(self) -> bool:
        return self.process_index == 0

    def __call__(self, **given: Any) -> "FakeAccelerator":
        self.given = given
        return self

    def free_memory(self) -> None:
        pass


def start(
    monkeypatch: pytest.MonkeyPatch,
    accelerator: FakeAccelerator,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Processes:
    monkeypatch.setattr(training_processes, "Accelerator", accelerator)
    with open_processes(train_settings(**changes), device, dtype) as processes:
        return processes


@pytest.mark.parametrize(
    ("device", "dtype", "changes", "is_cpu", "precision"),
    [
        ("cpu", torch.float32, {}, True, "no"),
        ("cpu", torch.bfloat16, {}, True, "bf16"),
        ("cuda", torch.bfloat16, {"mixed_precision": "no"}, False, "no"),
        ("cuda", torch.float32, {"mixed_precision": "bf16"}, False, "bf16"),
        ("mps", torch.float32, {}, False, "no"),
    ],
)
def test_the_device_asked_for_is_the_one_that_computes(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    dtype: torch.dtype,
    changes: dict[str, Any],
    is_cpu: bool,
    precision: str,
) -> None:
    """Also where a GPU is at hand, which accelerate would take by itself."""
    accelerator = FakeAccelerator()
    start(monkeypatch, accelerator, torch.device(device), dtype, accumulate=3, **changes)
    assert accelerator.given["cpu"] is is_cpu
    assert accelerator.given["mixed_precision"] == precision
    assert accelerator.given["gradient_accumulation_plugin"].num_steps == 3


def test_processes_wait_for_hours_of_preparation(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL gives a barrier ten minutes, in which no dataset gets its poses."""
    groups = []

    def new_group(**given: Any) -> Any:
        groups.append(given)
        return SimpleNamespace()

    monkeypatch.setattr(distributed, "new_group", new_group)
    monkeypatch.setattr(distributed, "all_reduce", lambda _flags, **_: None)
    start(monkeypatch, FakeAccelerator(num_processes=2))
    (given,) = groups
    assert given["backend"] == "gloo"
    assert given["timeout"] > timedelta(days=7)


@pytest.mark.parametrize(
    ("accelerator", "changes", "message"),
    [
        (
            FakeAccelerator(distributed_type=DistributedType.FSDP),
            {},
            "FSDP 1 cannot hold frozen and trained weights side by side. "
            "Launch with --fsdp_version 2.",
        ),
        (
            FakeAccelerator(distributed_type=DistributedType.FSDP, is_fsdp2=True),
            {"quantize_base": "fp8"},
            "--quantize-base fp8 does not go with FSDP. "
            "Leave it out: FSDP2 and ZeRO-3 split the weights already.",
        ),
        (
            FakeAccelerator(distributed_type=DistributedType.FSDP, is_fsdp2=True),
            {"quantize_base": "nf4"},
            "--quantize-base nf4 does not go with FSDP. "
            "Leave it out: FSDP2 and ZeRO-3 split the weights already.",
        ),
    ],
)
def test_ways_of_sharing_that_cannot_work_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    accelerator: FakeAccelerator,
    changes: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(SettingsError) as error:
        start(monkeypatch, accelerator, **changes)
    assert str(error.value) == message


def with_deepspeed(**configuration: Any) -> FakeAccelerator:
    """As accelerate leaves it, the package DeepSpeed apart."""
    zero = {"stage": 2} | configuration.pop("zero_optimization", {})
    plugin = DeepSpeedPlugin(
        hf_ds_config={
            "zero_optimization": zero,
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            **configuration,
        }
    )
    plugin.set_mixed_precision("bf16")
    return FakeAccelerator(
        num_processes=1,
        distributed_type=DistributedType.DEEPSPEED,
        state=SimpleNamespace(deepspeed_plugin=plugin),
    )


def test_the_options_of_the_training_complete_the_configuration_of_deepspeed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """accelerate cannot work out what is "auto" without a data loader and a language model."""
    accelerator = with_deepspeed(
        zero_optimization={"reduce_bucket_size": "auto", "overlap_comm": True},
        gradient_clipping="auto",
        train_batch_size="auto",
    )
    processes = start(
        monkeypatch, accelerator, batch_size=3, accumulate=2, max_grad_norm=0.5, dtype="bfloat16"
    )
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["gradient_accumulation_steps"] == 2
    assert config["train_batch_size"] == 6
    assert config["gradient_clipping"] == 0.5
    assert config["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert config["bf16"] == config["fp16"] == {"enabled": False}
    assert processes.zero_stage == 2
    assert not processes.shard_weights


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_3_alone_shares_out_the_weights(monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    processes = start(monkeypatch, with_deepspeed(zero_optimization={"stage": stage}))
    assert processes.shard_weights is (stage == 3)
    assert not processes.uses_fsdp


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        (
            {"optimizer": {"type": "AdamW"}},
            "DeepSpeed's configuration has a section optimizer. Leave it out: AdamW is made from "
            "--lr and --weight-decay.",
        ),
        (
            {"scheduler": {"type": "WarmupLR"}},
            "DeepSpeed's configuration has a section scheduler. Leave it out: --warmup shapes the "
            "learning rate.",
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme"}}},
            "DeepSpeed's offload_param to NVMe keeps state where no checkpoint finds it. "
            "Give cpu or none.",
        ),
        (
            {"gradient_accumulation_steps": 4},
            "DeepSpeed's gradient_accumulation_steps is 4, --accumulate is 2. Give one value to "
            "both, or leave DeepSpeed's out.",
        ),
        (
            {"zero_optimization": {"stage": 0}},
            "DeepSpeed without ZeRO shares out nothing. Launch with --zero_stage 1, 2 or 3, or "
            "without --use_deepspeed.",
        ),
    ],
)
def test_configurations_of_deepspeed_that_would_be_passed_over_are_refused(
    monkeypatch: pytest.MonkeyPatch, configuration: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError) as error:
        start(monkeypatch, with_deepspeed(**configuration), accumulate=2)
    assert str(error.value) == message


def test_float16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = with_deepspeed()
    accelerator.state.deepspeed_plugin.deepspeed_config["fp16"] = {"enabled": True}
    with pytest.raises(SettingsError, match=r"fp16, in which gradients overflow\."):
        start(monkeypatch, accelerator)


def test_deepspeed_on_the_cpu_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate would train by DDP and say nothing."""
    accelerator = FakeAccelerator()
    accelerator.deepspeed_engine_wrapped = None  # type: ignore[attr-defined]
    with pytest.raises(SettingsError) as error:
        start(monkeypatch, accelerator)
    assert str(error.value) == (
        "accelerate runs DeepSpeed on GPUs only. Launch without --use_deepspeed, or leave out "
        "--device cpu."
    )


def test_what_accelerate_cannot_do_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise ImportError("DeepSpeed is not installed\n=> run `pip install deepspeed`.")

    monkeypatch.setattr(training_processes, "Accelerator", refuse)
    with (
        pytest.raises(SettingsError) as error,
        open_processes(train_settings(), CPU, torch.float32),
    ):
        pass
    assert str(error.value) == (
        "accelerate cannot start: DeepSpeed is not installed => run `pip install deepspeed`."
    )


@pytest.mark.parametrize("error", [RunError("no"), KeyboardInterrupt(), ZeroDivisionError()])
def test_one_process_fails_as_without_others(
    monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail() -> None:
        raise error

    processes = start(monkeypatch, FakeAccelerator())
    for way in (processes.of_main, processes.main_first):
        with pytest.raises(type(error)) as caught:
            way(fail)
        assert caught.value is error
    assert processes.joint(error) is error
    assert processes.of_main(lambda: 3) == processes.main_first(lambda: 3) == 3
    assert processes.any(True)
    assert not processes.any(False)


# What the others report, and what this one then ends with.
@pytest.mark.parametrize(
    ("index", "fails", "others", "ends"),
    [
        (0, False, [], None),
        (0, False, [1], StoppedElsewhereError),
        (0, True, [], RunError),
        (0, True, [1], RunError),
        (1, False, [0], StoppedElsewhereError),
        (1, True, [0], StoppedElsewhereError),
        (1, True, [], RunError),
        (1, True, [2], RunError),
    ],
)
def test_the_main_process_speaks_for_all_that_fail_with_it(
    monkeypatch: pytest.MonkeyPatch,
    index: int,
    fails: bool,
    others: list[int],
    ends: type[Exception] | None,
) -> None:
    def all_reduce(flags: torch.Tensor, **_: Any) -> None:
        flags[others] = 1

    monkeypatch.setattr(distributed, "new_group", lambda **_: SimpleNamespace())
    monkeypatch.setattr(distributed, "all_reduce", lambda _flags, **_: None)
    processes = start(monkeypatch, FakeAccelerator(num_processes=3, process_index=index))
    monkeypatch.setattr(distributed, "all_reduce", all_reduce)

    def work() -> None:
        with processes.stopping_together():
            if fails:
                raise RunError("mine")

    assert outcome_of(work) is ends


def outcome_of(work: Callable[[], None]) -> type[Exception] | None:
    try:
        work()
    except (RunError, StoppedElsewhereError) as error:
        return type(error)
    return None
