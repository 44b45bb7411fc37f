"""The step cache: which steps are skipped, and that a skipped step adds the old update once."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor
from torch.testing import assert_close

from everanimate_cli.placement import Job, estimate, released_sizes
from everanimate_cli.placement_settings import Placement
from everanimate_cli.resume import load_chunk, save_chunk
from everanimate_cli.rollout import Chunk, Rollout, RolloutState, Step
from everanimate_cli.runs import RunFolder
from everanimate_cli.schedule import euler_step, model_timestep, shifted_sigmas
from everanimate_cli.step_cache import StepCache, plan_skips
from everanimate_cli.transformer import EverAnimateTransformer3DModel, Shared

NUM_STEPS = 8
K_ID, T = 2, 3


# --- the plan ------------------------------------------------------------------------------------


def test_error_gathers_until_a_step_is_computed() -> None:
    """Errors of 0.1 and then 0.1 + 0.19 = 0.29 in a row, worked out by hand."""
    ratios = [1.0] + [0.9] * 9
    one, two = "-x-x-x-x--", "-xx-xx-xx-"
    kept = {"retained_share": 0.0}
    assert written(plan_skips(ratios, 0.2899, **kept)) == one
    assert written(plan_skips(ratios, 0.2901, **kept)) == two
    assert written(plan_skips(ratios, 0.0999, **kept)) == "-" * 10
    assert written(plan_skips(ratios, 0.1001, **kept)) == one


def test_growing_magnitudes_are_errors_too() -> None:
    assert written(plan_skips([1, 1.2, 1.0, 1.0, 1.0], 0.19, retained_share=0)) == "--xx-"


def test_threshold_0_skips_nothing_even_without_error() -> None:
    assert not any(plan_skips([1.0] * 20, 0))


def test_few_in_a_row_and_neither_the_first_nor_the_last() -> None:
    assert written(plan_skips([1.0] * 12, 9)) == "---xx-xx-xx-"
    assert written(plan_skips([1.0] * 12, 9, max_consecutive=8)) == "---xxxxxxxx-"
    assert written(plan_skips([1.0] * 20, 9)) == "----xx-xx-xx-xx-xx--"
    assert written(plan_skips([1.0] * 2, 9)) == "--"
    assert written(plan_skips([1.0], 9)) == "-"


def written(skips: list[bool]) -> str:
    return "".join("-x"[is_skipped] for is_skipped in skips)


# --- the network ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformer() -> EverAnimateTransformer3DModel:
    return tiny.build_networks()["transformer"]


def draw_inputs(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "encoder_hidden_states": draw(1, 512, tiny.TEXT_DIM),
        "encoder_hidden_states_image": draw(1, 17, tiny.CLIP_DIM),
        "pose_embeds": draw(1, tiny.INNER_DIM, T, 3, 2),
        "face_tokens": draw(1, T, 5, tiny.INNER_DIM),
    }


def draw_latents(step_index: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step_index)
    channels = tiny.TRANSFORMER_CONFIG["in_channels"]
    return torch.randn(1, channels, K_ID + T, 6, 4, generator=generator)


def timestep_of(step_index: int) -> Tensor:
    return torch.tensor([900.0 - 100 * step_index], dtype=torch.float64)


@torch.no_grad()
def run_steps(
    network: EverAnimateTransformer3DModel, cache: StepCache | None, num_steps: int
) -> list[Tensor]:
    shared = Shared(step_cache=cache)
    inputs = draw_inputs()
    return [
        network(draw_latents(k), timestep_of(k), **inputs, shared=shared) for k in range(num_steps)
    ]


@contextmanager
def watched(network: EverAnimateTransformer3DModel) -> Iterator[dict[str, list[Any]]]:
    """What goes into the first block and the head, and which modules are called."""
    seen: dict[str, list[Any]] = {"before": [], "after": [], "blocks": [], "adapters": []}
    hooks = [
        network.blocks[0].register_forward_pre_hook(lambda _, args: seen["before"].append(args[0])),
        network.norm_out.register_forward_pre_hook(lambda _, args: seen["after"].append(args[0])),
    ]
    for name in ("blocks", "adapters"):
        modules = network.blocks if name == "blocks" else network.face_adapter
        hooks += [
            module.register_forward_hook(
                lambda module, args, result, name=name: seen[name].append((module, args, result))
            )
            for module in modules
        ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def head(network: EverAnimateTransformer3DModel, tokens: Tensor, step_index: int) -> Tensor:
    """Velocity from the tokens after the last block, written by hand after diffusers' forward."""
    embedder = network.condition_embedder
    half = network.config.freq_dim // 2
    exponents = torch.arange(half, dtype=torch.float64) / half
    angles = timestep_of(step_index)[:, None] * 10000.0**-exponents
    embeds = embedder.time_embedder(torch.cat([angles.cos(), angles.sin()], 1).float())
    shift, scale = (network.scale_shift_table + embeds[:, None]).chunk(2, dim=1)
    patches = network.proj_out(network.norm_out(tokens) * (1 + scale) + shift)
    grid = patches.reshape(1, K_ID + T, 3, 2, 1, 2, 2, tiny.LATENT_CHANNELS)
    return grid.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(1, tiny.LATENT_CHANNELS, K_ID + T, 6, 4)


def test_a_skipped_step_adds_the_residual_of_blocks_and_adapters_once(
    transformer: EverAnimateTransformer3DModel,
) -> None:
    with watched(transformer) as seen:
        exact = run_steps(transformer, None, 4)
    residual = seen["after"][1] - seen["before"][1]
    expected = [head(transformer, seen["before"][k] + residual, k) for k in (2, 3)]

    with watched(transformer) as cached:
        made = run_steps(transformer, StepCache([False, False, True, True]), 4)
    for k in (0, 1):
        assert torch.equal(made[k], exact[k])
    for k in (2, 3):
        assert_close(made[k], expected[k - 2], rtol=0, atol=2e-6)
        assert not torch.allclose(made[k], exact[k], rtol=0, atol=1e-2)
    assert len(cached["blocks"]) == 2 * len(transformer.blocks)
    assert len(cached["adapters"]) == 2 * len(transformer.face_adapter)


@torch.no_grad()
def test_a_cache_of_the_blocks_alone_adds_the_faces_twice(
    transformer: EverAnimateTransformer3DModel,
) -> None:
    """What a stock cache would do: blocks pass their residual on, adapters run again."""
    with watched(transformer) as seen:
        run_steps(transformer, None, 3)
    residual = seen["after"][1] - seen["before"][1]
    doubled = seen["before"][2] + residual
    num_adapters = len(transformer.face_adapter)
    for module, args, _ in seen["adapters"][2 * num_adapters :]:
        doubled = doubled + module(doubled, args[1])
    wrong = head(transformer, doubled, 2)
    made = run_steps(transformer, StepCache([False, False, True]), 3)[2]
    assert (made - wrong).abs().max() > 0.05


def test_the_residual_is_that_of_the_last_computed_step(
    transformer: EverAnimateTransformer3DModel,
) -> None:
    with watched(transformer) as seen:
        run_steps(transformer, None, 4)
    made = run_steps(transformer, StepCache([False, True, False, True]), 4)
    for k in (1, 3):
        residual = seen["after"][k - 1] - seen["before"][k - 1]
        expected = head(transformer, seen["before"][k] + residual, k)
        assert_close(made[k], expected, rtol=0, atol=2e-6)


def test_a_measuring_cache_changes_nothing_and_sees_the_ratios(
    transformer: EverAnimateTransformer3DModel,
) -> None:
    cache = StepCache()
    with watched(transformer) as seen:
        exact = run_steps(transformer, None, 4)
    measured = run_steps(transformer, cache, 4)
    assert all(map(torch.equal, measured, exact))
    norms = [
        (after - before).norm(dim=2)
        for before, after in zip(seen["before"], seen["after"], strict=True)
    ]
    expected = [1.0, *((norms[k] / norms[k - 1]).mean().item() for k in (1, 2, 3))]
    assert_close(cache.ratios, torch.tensor(expected), rtol=1e-5, atol=0)
    assert cache.ratios[1:].sub(1).abs().min() > 1e-4


def test_processes_with_a_part_of_the_tokens_come_to_one_plan() -> None:
    tokens = torch.randn(1, 7, 3, generator=torch.Generator().manual_seed(0))
    factors = [1.0, 0.7]

    def run(cache: StepCache, part: slice, total: Any = None) -> None:
        for factor in factors:
            scale = torch.linspace(factor, 1, 7)[None, :, None]
            cache.apply(tokens[:, part], lambda x, s=scale: x + (tokens * s)[:, part], total=total)

    whole = StepCache()
    run(whole, slice(None))
    sums: list[list[Tensor]] = []
    for part in (slice(0, 4), slice(4, 7)):
        noted: list[Tensor] = []
        run(StepCache(), part, lambda x, noted=noted: noted.append(x) or x)
        sums.append(noted)
    shared = StepCache()
    totals = iter([first + second for first, second in zip(*sums, strict=True)])
    run(shared, slice(0, 4), lambda _: next(totals))
    assert_close(shared.ratios, whole.ratios, rtol=1e-6, atol=0)


def test_what_steps_share_is_computed_once(transformer: EverAnimateTransformer3DModel) -> None:
    calls: list[str] = []
    embedder = transformer.condition_embedder
    modules = {
        "text": embedder.text_embedder,
        "image": embedder.image_embedder,
        "rope": transformer.rope,
        "patch": transformer.patch_embedding,
    }
    hooks = [
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, module in modules.items()
    ]
    inputs = draw_inputs()
    try:
        shared = Shared()
        with torch.no_grad():
            made = [
                transformer(draw_latents(k), timestep_of(k), **inputs, shared=shared)
                for k in range(3)
            ]
            assert sorted(calls) == ["image", "patch", "patch", "patch", "rope", "text"]
            alone = [transformer(draw_latents(k), timestep_of(k), **inputs) for k in range(3)]
    finally:
        for hook in hooks:
            hook.remove()
    assert all(map(torch.equal, made, alone))


# --- the chunk loop ------------------------------------------------------------------------------


def build_rollout(threshold: float | None, guidance_scale: float = 1.0) -> Rollout:
    return tiny.build_tiny_rollout(
        guidance_scale=guidance_scale,
        num_inference_steps=NUM_STEPS,
        step_cache_threshold=threshold,
    )


def chunks_of(rollout: Rollout, state: RolloutState | None = None) -> list[Chunk]:
    return [made for made in rollout.run(state) if isinstance(made, Chunk)]


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_threshold_0_makes_the_same_bits(guidance_scale: float) -> None:
    without = chunks_of(build_rollout(None, guidance_scale))
    with_cache = chunks_of(build_rollout(0.0, guidance_scale))
    for expected, chunk in zip(without, with_cache, strict=True):
        assert torch.equal(chunk.latents, expected.latents)
        assert np.array_equal(chunk.frames_u8, expected.frames_u8)
        assert expected.state.step_ratios is None
        assert chunk.state.step_ratios is not None
        assert chunk.state.step_ratios.shape == (1 if guidance_scale == 1 else 2, NUM_STEPS)


def test_only_chunks_after_the_first_skip() -> None:
    rollout = build_rollout(9.0)
    blocks: list[int] = []
    rollout.pipeline.transformer.blocks[0].register_forward_hook(lambda *_: blocks.append(1))
    num_per_chunk, before = [], 0
    for made in rollout.run():
        if not isinstance(made, Step):
            num_per_chunk.append(len(blocks) - before)
            before = len(blocks)
    assert num_per_chunk == [8, 4, 4]  # --xx-xx-


def test_branches_of_guidance_have_caches_of_their_own() -> None:
    """With one cache for both, the second branch would take the first one's residual."""
    rollout = build_rollout(9.0, 2.0)
    first, second, _ = chunks_of(rollout)
    ratios = first.state.step_ratios
    assert ratios is not None
    assert not torch.equal(ratios[0], ratios[1])
    conditioning = rollout._conditioning(first.state, *rollout.read_driving(1))
    skips = plan_skips(ratios[0].tolist(), 9.0)
    swapped = replace(
        conditioning,
        prompt_embeds=conditioning.negative_prompt_embeds,
        face_tokens=conditioning.blank_face_tokens,
    )

    # The same by hand: each branch alone, with the latents of both.
    sigmas = shifted_sigmas(NUM_STEPS, 5.0)
    latents = rollout.noise(1)
    branches = [Shared(step_cache=StepCache(skips)) for _ in range(2)]
    for step_index in range(NUM_STEPS):
        sigma, following = sigmas[step_index], sigmas[step_index + 1]
        timestep = model_timestep(sigma[None], torch.float32)
        guided, unguided = (
            rollout.pipeline._velocity(latents, timestep, given, 1.0, [shared])
            for given, shared in zip((conditioning, swapped), branches, strict=True)
        )
        latents = euler_step(latents, unguided + 2.0 * (guided - unguided), sigma, following)
    assert_close(second.latents, latents[:, :, 1:], rtol=0, atol=1e-6)


def test_a_run_continued_from_disk_makes_the_same_bits(tmp_path: Path) -> None:
    whole = chunks_of(build_rollout(0.5))
    assert not torch.equal(whole[1].latents, chunks_of(build_rollout(None))[1].latents)
    run = RunFolder(tmp_path)
    for k in (0, 1):
        save_chunk(run, whole[k])
        _, state = load_chunk(run, k)
        rest = chunks_of(build_rollout(0.5), state)
        for chunk, expected in zip(rest, whole[k + 1 :], strict=True):
            assert torch.equal(chunk.latents, expected.latents)


def test_the_memory_of_a_cache_is_in_the_estimate() -> None:
    """37,440 tokens of 5,120 numbers in bfloat16 are 365.6 MiB; one for the tokens themselves."""
    job = Job(
        height=480, width=832, frames_per_chunk=77, num_identity_slots=4, dtype=torch.bfloat16
    )
    denoise = [
        estimate(
            released_sizes(), Placement(), replace(job, num_step_caches=num_caches)
        ).phases_mib["denoise"]
        for num_caches in (0, 1, 2)
    ]
    tokens_mib = 37_440 * 5_120 * 2 / 2**20
    assert denoise[1] - denoise[0] == pytest.approx(2 * tokens_mib)
    assert denoise[2] - denoise[0] == pytest.approx(3 * tokens_mib)
