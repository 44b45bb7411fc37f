"""Whole moments out of the flat parts of ZeRO, on a stand-in for DeepSpeed's optimiser.

The real one is in `tests/cli/test_train_deepspeed.py`.
"""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from everanimate_cli.adapter_state import MOMENTS, AdapterState, ZeroAdapterState
from everanimate_cli.lora_adapter import attach_lora, lora_parameters

RANK = 3
NUM_PROCESSES = 2


class Attention(nn.Module):
    """A block as far as adapters see it; 15 and 21 numbers, which two cannot share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(5, 7)


def build() -> nn.Module:
    network = nn.Module()
    network.blocks = nn.ModuleList([nn.Module()])
    network.blocks[0].attn1 = Attention()
    attach_lora(network, rank=RANK, alpha=RANK, seed=0)
    return network


def moments(network: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"{name}/{key}": torch.rand(parameter.shape, generator=generator)
        for name in MOMENTS
        for key, parameter in lora_parameters(network).items()
    }


class FakeStage3:
    """What a process of ZeRO-3 keeps: of every matrix the same share, padded at the end."""

    def __init__(self, parameters: list[nn.Parameter], rank: int) -> None:
        self.rank = rank
        self.optimizer = SimpleNamespace(state={})
        self.shares = [-(-value.numel() // NUM_PROCESSES) for value in parameters]
        self.fp32_partitioned_groups_flat = [torch.zeros(sum(self.shares))]
        for value, share in zip(parameters, self.shares, strict=True):
            value.ds_tensor = torch.empty(share)  # type: ignore[attr-defined]
        self.parameters = parameters

    def _get_param_partition_rank(self, _parameter: nn.Parameter) -> int:
        return self.rank

    def set_local(self, parameter: nn.Parameter, value: Tensor, name: str) -> None:
        index = next(i for i, each in enumerate(self.parameters) if each is parameter)
        start = sum(self.shares[:index])
        flat = self.optimizer.state[self.fp32_partitioned_groups_flat[0]][name]
        flat[start : start + self.shares[index]].copy_(value)


def test_moments_come_back() -> None:
    network = build()
    optimizer = torch.optim.AdamW(lora_parameters(network).values())
    state = AdapterState(network, optimizer)
    assert state.moments() == {}
    given = moments(network)
    state.load_moments(given, 7)
    assert {float(each["step"]) for each in optimizer.state.values()} == {7.0}
    found = state.moments()
    assert found.keys() == given.keys()
    assert all(torch.equal(value, given[key]) for key, value in found.items())


def test_each_process_of_zero_3_keeps_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's own call for whole values reaches beyond the end of the last share."""
    parts: list[Tensor] = []
    network = build()
    given = moments(network)
    for rank in range(NUM_PROCESSES):
        zero = FakeStage3(list(lora_parameters(network).values()), rank)
        utils: Any = ModuleType("deepspeed.utils")
        utils.safe_set_local_optimizer_state = zero.set_local
        utils.safe_set_full_optimizer_state = None
        monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
        monkeypatch.setitem(sys.modules, "deepspeed.utils", utils)
        state = ZeroAdapterState(network, SimpleNamespace(optimizer=zero), stage=3)
        state.load_moments(given, 5)
        flat = zero.optimizer.state[zero.fp32_partitioned_groups_flat[0]]
        assert float(flat["step"]) == 5
        parts.append(flat["exp_avg_sq"])
    start = 0
    for share, (key, parameter) in zip(zero.shares, lora_parameters(network).items(), strict=True):
        whole = torch.cat([part[start : start + share] for part in parts])
        assert torch.equal(whole[: parameter.numel()], given[f"exp_avg_sq/{key}"].flatten())
        assert not whole[parameter.numel() :].any()
        start += share


def test_nothing_is_put_back_where_nothing_was_kept() -> None:
    network = build()
    zero = FakeStage3(list(lora_parameters(network).values()), 0)
    ZeroAdapterState(network, SimpleNamespace(optimizer=zero), stage=3).load_moments({}, 0)
    assert zero.optimizer.state == {}
