"""What the processes of the tests of several processes do."""

import errno
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from tiny import CLIP_DIM, LATENT_CHANNELS, TEXT_DIM, TRANSFORMER_CONFIG
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh

from everanimate_cli import context_parallel, generation, parallel_pipeline
from everanimate_cli.acceleration import compile_blocks
from everanimate_cli.cli import main
from everanimate_cli.context_parallel import SharedAttention, TokenShard, open_mesh, share_tokens
from everanimate_cli.errors import WeightsError
from everanimate_cli.transformer import EverAnimateTransformer3DModel

CPU = torch.device("cpu")

# (heads, identity slots, target slots, height, width, batch)
CASES = [
    (6, 4, 3, 6, 8, 1),  # 84 tokens: parts end within a slot
    (6, 4, 3, 6, 10, 2),  # 105 tokens: not to be halved
    (6, 4, 3, 10, 10, 1),  # 175 tokens: not to be divided by three either
    (6, 1, 5, 6, 8, 1),  # whole slots
    (5, 4, 3, 6, 8, 1),  # the last process has fewer heads
]


def build_transformer(num_heads: int) -> EverAnimateTransformer3DModel:
    """The tiny network with another number of heads; the same weights for the same number."""
    with torch.random.fork_rng():
        torch.manual_seed(num_heads)
        network = EverAnimateTransformer3DModel(
            **{
                **TRANSFORMER_CONFIG,
                "num_attention_heads": num_heads,
                "attention_head_dim": 8,
                "added_kv_proj_dim": 8 * num_heads,
            }
        )
    network.eval().requires_grad_(False)
    network.patch_embedding.weight.mul_(3)
    network.proj_out.weight.mul_(4)
    for adapter in network.face_adapter:  # fresh ones hardly change a token
        adapter.to_out.weight.mul_(20)
    return network


def chunk_inputs(
    network: EverAnimateTransformer3DModel,
    num_identity_slots: int,
    num_target_slots: int,
    height: int,
    width: int,
    batch_size: int,
) -> dict[str, Tensor]:
    """Inputs of a forward pass at random, the same for the same sizes."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch_size, *shape, generator=generator)

    num_slots = num_identity_slots + num_target_slots
    text = draw(512, TEXT_DIM)
    text[:, 7:] = 0
    size = network.config.motion_encoder_size
    face = draw(3, 4 * num_target_slots - 3, size, size).clamp(-1, 1)
    return {
        "hidden_states": draw(2 * LATENT_CHANNELS + 4, num_slots, height, width),
        "timestep": torch.full((batch_size,), 700.0),
        "encoder_hidden_states": text,
        "encoder_hidden_states_image": draw(17, CLIP_DIM),
        "pose_embeds": network.embed_pose(draw(LATENT_CHANNELS, num_target_slots, height, width)),
        "face_tokens": network.embed_face(face),
    }


@dataclass(frozen=True)
class Comparison:
    """A network over several processes against one.

    Attributes:
        attention: How they share self-attention.
        count: How many of the processes, the first ones.
        cases: Which of `CASES`.
        is_wrong: With the plan of Wan without faces.
        is_compiled: Whether the blocks are traced as for compilation, without compiling them.
        on_cards: In bfloat16 on CUDA devices, instead of float32 on the CPU.
        is_counted: How many numbers a process trades, instead of the difference.
    """

    attention: SharedAttention
    count: int
    cases: tuple[int, ...] = (0, 1, 2, 3, 4)
    is_wrong: bool = False
    is_compiled: bool = False
    on_cards: bool = False
    is_counted: bool = False


def compare_forward(comparisons: Sequence[Comparison]) -> list[list[float]]:
    """Largest difference of each case in this process; none where it has no part."""
    store, rank, count = next(distributed.rendezvous("env://"))
    device = CPU
    if comparisons[0].on_cards:
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=count)
    results = []
    for given in comparisons:
        mesh = open_mesh(given.attention, range(given.count), device)
        differences: list[float] = []
        with ExitStack() as stack:
            if given.is_wrong:
                stack.enter_context(_whole_faces())
            if device.type == "cpu":
                stack.enter_context(_ring_on_cpu())
            if rank < given.count:
                differences = [
                    _difference(given, CASES[case], mesh, device) for case in given.cases
                ]
        results.append(differences)
    distributed.barrier()
    distributed.destroy_process_group()
    return results


def _difference(
    given: Comparison, case: tuple[int, ...], mesh: DeviceMesh, device: torch.device
) -> float:
    heads, *sizes = case
    network = build_transformer(heads)
    if device.type == "cpu" and heads % 2 == 0:
        network.merge_padding()
    inputs = chunk_inputs(network, *sizes)
    if device.type == "cuda":
        network.to(device, torch.bfloat16)
        inputs = {name: value.to(device, torch.bfloat16) for name, value in inputs.items()}
    with torch.no_grad(), _counting() as trades:
        alone = network(**inputs)
        network._parallel = share_tokens(network, given.attention, mesh, device)
        if given.is_compiled:
            compile_blocks(network, backend="eager")
        together = network(**inputs)
    assert alone.std() > 0.1
    if given.is_counted:
        sizes = [each.kwargs["input_split_sizes"] for each in trades.call_args_list]
        return float(sum(sum(each) - each[mesh.get_local_rank("ulysses")] for each in sizes))
    return float((alone - together).abs().max())


def _counting() -> Any:
    return mock.patch.object(distributed, "all_to_all_single", wraps=distributed.all_to_all_single)


def _whole_faces() -> Any:
    """The plan that suits Wan without faces; runs if each part can be divided by all slots."""

    def shard(num_tokens: int, num_slots: int, rank: int, count: int) -> TokenShard:
        right = context_parallel_shard(num_tokens, num_slots, rank, count)
        return TokenShard(tokens=right.tokens, slots=slice(0, num_slots), before=0, after=0)

    context_parallel_shard = context_parallel.shard_tokens
    return mock.patch.object(context_parallel, "shard_tokens", shard)


def _ring_on_cpu() -> Any:
    """Kernels that tell their logarithm of the sum exist for CUDA only; here is one by hand."""

    def attend(
        _context: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *_options: Any,
        **_more: Any,
    ) -> tuple[Tensor, Tensor]:
        logits = torch.einsum("bqhd,bkhd->bqhk", query, key) / query.shape[-1] ** 0.5
        out = torch.einsum("bqhk,bkhd->bqhd", logits.softmax(dim=-1), value)
        return out, logits.logsumexp(dim=-1)

    return mock.patch.multiple(
        "diffusers.models.attention_dispatch", _native_flash_attention_forward_op=attend
    )


# --- the program ---------------------------------------------------------------------------------

Patch = AbstractContextManager[Any]


def run_command(words: Sequence[str], fault: str = "none") -> int:
    """Run a command line of which something goes wrong; the exit code."""
    rank = int(os.environ["RANK"])
    with FAULTS[fault](rank):
        return main(list(words))


def _none(_rank: int) -> Patch:
    return nullcontext()


def _interrupted(rank: int) -> Patch:
    """Ctrl-C reaches all processes, and the main one twice: the launcher sends it on."""
    save_chunk, denoise = generation.save_chunk, parallel_pipeline._denoise

    def save_and_interrupt(*args: Any) -> None:
        save_chunk(*args)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    def interrupt_and_denoise(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return denoise(*args)

    if rank == 0:
        return mock.patch.object(generation, "save_chunk", save_and_interrupt)
    return mock.patch.object(parallel_pipeline, "_denoise", interrupt_and_denoise)


def _disk_full(rank: int) -> Patch:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return (
        mock.patch.object(generation, "save_chunk", side_effect=full)
        if rank == 0
        else nullcontext()
    )


def _fails_to_load(rank: int) -> Patch:
    error = WeightsError("the weights are gone.")
    place = "everanimate_cli.weights.load_shared_transformer"
    return mock.patch(place, side_effect=error) if rank == 1 else nullcontext()


def _fails_to_denoise(error: Exception) -> Callable[[int], Patch]:
    def patch(rank: int) -> Patch:
        if rank == 0:
            return nullcontext()
        return mock.patch.object(parallel_pipeline, "_denoise", side_effect=error)

    return patch


def _killed(rank: int) -> Patch:
    def kill(*_args: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 0:
        return mock.patch("everanimate_cli.animate_processes._WORD_TIMEOUT_S", 0.3)
    return mock.patch.object(parallel_pipeline, "_denoise", kill)


FAULTS: dict[str, Callable[[int], Patch]] = {
    "none": _none,
    "interrupted": _interrupted,
    "disk full": _disk_full,
    "partner fails to load": _fails_to_load,
    "partner out of memory": _fails_to_denoise(torch.OutOfMemoryError("CUDA out of memory.")),
    "bug in partner": _fails_to_denoise(TypeError("a bug")),
    "partner killed": _killed,
}
