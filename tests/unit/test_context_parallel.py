"""One network over several processes gives what one process gives."""

from typing import Any

import pytest
import torch
from forks import run_ranks
from hypothesis import given
from hypothesis import strategies as st
from parallel_work import Comparison, compare_forward

from everanimate_cli.animate_processes import Processes
from everanimate_cli.context_parallel import (
    SharedAttention,
    choose_attention,
    shard_tokens,
    share_out,
)
from everanimate_cli.errors import SettingsError
from everanimate_cli.launch import Launch, read_launch
from everanimate_cli.parallel_pipeline import Sharing, plan_sharing

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HEADS = 40  # of the released network


# --- the network ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def differences() -> dict[Comparison, list[list[float]]]:
    """Of each process, from one start of three."""
    comparisons = [
        Comparison("ulysses", 3),
        Comparison("ulysses", 2),
        Comparison("ring", 3),
        Comparison("ulysses", 2, cases=(0,), is_wrong=True),
        Comparison("ulysses", 3, cases=(0,), is_counted=True),
    ]
    by_rank = run_ranks(3, compare_forward, comparisons)
    return dict(zip(comparisons, zip(*by_rank, strict=True), strict=True))


@pytest.mark.parametrize(
    "comparison", [Comparison("ulysses", 3), Comparison("ulysses", 2), Comparison("ring", 3)]
)
def test_several_processes_give_the_velocity_of_one(
    differences: dict[Comparison, list[list[float]]], comparison: Comparison
) -> None:
    """With identity slots and faces, tokens and heads that cannot be shared evenly, and a batch.

    Ring sums in another order. Its kernel, which is for CUDA, is one by hand here.
    """
    for rank, found in enumerate(differences[comparison]):
        assert len(found) == (len(comparison.cases) if rank < comparison.count else 0)
        assert max(found, default=0.0) < 1e-5


def test_the_plan_of_wan_shows_tokens_the_faces_of_other_slots(
    differences: dict[Comparison, list[list[float]]],
) -> None:
    """It runs all the same: the comparison above can fail."""
    found = differences[Comparison("ulysses", 2, cases=(0,), is_wrong=True)]
    assert min(map(max, found[:2])) > 1e-2


def test_ulysses_sends_as_much_as_it_says(
    differences: dict[Comparison, list[list[float]]],
) -> None:
    """4 b N inner (n - 1) / n^2 numbers in each process, and the face adapters nothing."""
    found = differences[Comparison("ulysses", 3, cases=(0,), is_counted=True)]
    assert found == ([4 * 4 * 84 * 48 * 2 / 9],) * 3


@pytest.mark.slow
def test_compiled_blocks_trade_tokens_without_a_break() -> None:
    """Traced by dynamo, with tokens and heads that cannot be shared evenly."""
    comparison = Comparison("ulysses", 2, cases=(1, 4), is_compiled=True)
    for (found,) in run_ranks(2, compare_forward, [comparison]):
        assert max(found) < 1e-5


@pytest.mark.gpus
@pytest.mark.parametrize("attention", ["ulysses", "ring"])
def test_two_cards_give_the_velocity_of_one(attention: SharedAttention) -> None:
    """In bfloat16, whose rounding changes these velocities by up to 0.08 (of 2.2 deviation)."""
    comparison = Comparison(attention, 2, on_cards=True)
    for (found,) in run_ranks(2, compare_forward, [comparison]):
        assert max(found) < 0.1


@given(
    num_slots=st.integers(1, 30),
    per_slot=st.integers(1, 40),
    data=st.data(),
)
def test_every_token_is_in_one_process_and_its_slots_are_whole_there(
    num_slots: int, per_slot: int, data: st.DataObject
) -> None:
    num_tokens = num_slots * per_slot
    count = data.draw(st.integers(1, min(9, num_tokens)))
    tokens = torch.arange(num_tokens)[None, :, None] + 1  # [1, N, 1], none is zero
    shards = [shard_tokens(num_tokens, num_slots, rank, count) for rank in range(count)]
    parts = [tokens[:, shard.tokens] for shard in shards]
    assert [len(part[0]) for part in parts] == [len(p[0]) for p in tokens.tensor_split(count, 1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), tokens)
    for shard, part in zip(shards, parts, strict=True):
        filled = shard.fill_slots(part)
        slots = tokens.unflatten(1, (num_slots, per_slot))[:, shard.slots]
        is_kept = filled != 0
        torch.testing.assert_close(filled[is_kept], slots.flatten(1, 2)[is_kept])
        assert filled.shape[1] == slots.shape[1] * per_slot
        torch.testing.assert_close(shard.drop_filling(filled), part)


# --- what can be shared --------------------------------------------------------------------------


def share(
    wanted: str,
    count: int,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    backend: str = "native",
) -> str:
    return choose_attention(
        wanted, num_heads=HEADS, count=count, device=device, dtype=dtype, backend=backend
    )


def test_ulysses_shares_heads_also_unevenly() -> None:
    assert {share("auto", count) for count in range(2, 41)} == {"ulysses"}
    assert share("ulysses", 3) == "ulysses"
    assert share_out(HEADS, 3) == [14, 13, 13]


def test_ring_takes_over_where_heads_run_out() -> None:
    assert share("auto", 41, CUDA, torch.bfloat16) == "ring"
    assert share("ring", 2, CUDA, torch.bfloat16) == "ring"


@pytest.mark.parametrize(
    ("wanted", "options", "message"),
    [
        (
            "ring",
            (2, CPU),
            "--parallel ring needs CUDA devices. Give --device cuda, or --parallel ulysses.",
        ),
        (
            "ring",
            (2, CUDA),
            "--parallel ring needs kernels of 16 bits. Give --dtype bfloat16, "
            "or --parallel ulysses.",
        ),
        (
            "ring",
            (2, CUDA, torch.bfloat16, "_flash_3"),
            "--parallel ring has no way with these kernels of attention. Give --attention sdpa, "
            "or --parallel ulysses.",
        ),
        (
            "auto",
            (41, CPU),
            "--parallel auto: 41 processes cannot share the 40 heads of the network. "
            "Start 40 or fewer.",
        ),
        (
            "ulysses",
            (41, CUDA, torch.bfloat16),
            "--parallel ulysses: 41 processes cannot share the 40 heads of the network. "
            "Start 40 or fewer, or give --parallel ring.",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused(
    wanted: str, options: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        share(wanted, *options)
    assert str(caught.value) == message


def plan(count: int, *, wanted: str = "auto", spare_rank: bool = False) -> Sharing:
    return plan_sharing(
        wanted,
        count=count,
        spare_rank=spare_rank,
        num_heads=HEADS,
        device=CPU,
        dtype=torch.float32,
        backend="native",
    )


def test_a_spare_rank_leaves_the_transformer_to_the_others() -> None:
    assert plan(3) == Sharing(attention="ulysses", ranks=(0, 1, 2))
    assert plan(3, spare_rank=True) == Sharing(attention="ulysses", ranks=(1, 2))
    assert plan(2, spare_rank=True) == Sharing(attention=None, ranks=(1,))
    described = [plan(3).describe(), plan(3, spare_rank=True).describe()]
    assert described == [
        "ulysses over 3 processes",
        "ulysses over 2 processes, VAE in a spare one",
    ]
    assert plan(2, spare_rank=True).describe() == "transformer in one process, VAE in a spare one"
    with pytest.raises(SettingsError) as caught:
        plan(2, wanted="ulysses", spare_rank=True)
    assert str(caught.value) == (
        "--parallel ulysses with --spare-rank leaves one of 2 processes to the transformer. "
        "Start three or more, or leave one of the two options out."
    )


# --- who is there --------------------------------------------------------------------------------

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
}


def test_only_torchrun_makes_several_processes() -> None:
    launch = read_launch(TORCHRUN)
    assert launch == Launch(rank=5, count=8, local_rank=1, local_count=4)
    assert read_launch({}) is None
    assert read_launch({**TORCHRUN, "WORLD_SIZE": "1"}) is None
    # As clusters leave them for a single process.
    assert read_launch({k: v for k, v in TORCHRUN.items() if "ELASTIC" not in k}) is None


def test_each_process_has_a_card_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = read_launch(TORCHRUN)
    assert launch is not None
    processes = Processes(launch, leave=lambda _failure: None)
    assert processes.local_device(CPU) == CPU
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert processes.local_device(CUDA) == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SettingsError) as caught:
        processes.local_device(CUDA)
    assert str(caught.value) == (
        "4 processes were started on a machine with 2 CUDA devices. Start one for each."
    )
    with pytest.raises(SettingsError) as caught:
        processes.local_device(torch.device("mps"))
    assert str(caught.value) == (
        "--device mps cannot be shared by processes. Give --device cpu, or start one."
    )
