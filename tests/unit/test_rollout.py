"""Laws of the chunk loop, on a tiny random checkpoint."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import groupby
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny import LATENT_CHANNELS, TINY_DEFAULTS, build_tiny_pipeline
from torch import Tensor

from everanimate_cli.memory import (
    NUM_MASK_CHANNELS,
    chunk_noise,
    count_drawn_frames,
    draw_anchor_indices,
)
from everanimate_cli.pipeline import AnimatePipeline, Conditioning
from everanimate_cli.rollout import Chunk, Rollout, RolloutState, Step
from everanimate_cli.schedule import shifted_sigmas

Frames = NDArray[np.uint8]

HEIGHT, WIDTH, FACE_SIZE = TINY_DEFAULTS.height, TINY_DEFAULTS.width, TINY_DEFAULTS.face_size
NUM_SLOTS = TINY_DEFAULTS.identity_slots
NUM_STEPS = TINY_DEFAULTS.num_inference_steps
NUM_CHUNKS = 3


def random_frames(seed: int, num_frames: int, height: int = HEIGHT, width: int = WIDTH) -> Frames:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


VIEWS_U8 = list(random_frames(1, NUM_SLOTS - 1))
SETUPS: dict[str, dict[str, Any]] = {
    "latent": {},
    "two motion slots": {"frames_per_chunk": 13, "overlap": 8},
    "views": {"views_u8": VIEWS_U8[:2]},
    "views in all slots": {"views_u8": VIEWS_U8},
    "guided": {"guidance_scale": 3.0},
    "sink": {"memory": "sink", "clip_image": "reference"},
    "pixel": {"memory": "pixel", "num_identity_slots": 1, "overlap": 5},
}


@pytest.fixture(scope="module")
def shared_pipeline() -> AnimatePipeline:
    return build_tiny_pipeline()


@pytest.fixture
def pipeline(shared_pipeline: AnimatePipeline) -> AnimatePipeline:
    """A copy, so that a test may replace its methods; the networks are shared."""
    return replace(shared_pipeline)


@pytest.fixture(scope="module", params=SETUPS.values(), ids=SETUPS.keys())
def rollout(shared_pipeline: AnimatePipeline, request: pytest.FixtureRequest) -> Rollout:
    return build_rollout(shared_pipeline, **request.param)


@pytest.fixture(scope="module")
def made(rollout: Rollout) -> list[Step | Chunk]:
    """All that the loop yields."""
    return list(rollout.run())


@pytest.fixture(scope="module")
def chunks(made: list[Step | Chunk]) -> list[Chunk]:
    return [item for item in made if isinstance(item, Chunk)]


def build_rollout(pipeline: AnimatePipeline, **changes: Any) -> Rollout:
    """Three chunks; what the changes imply (drawn frames, negative prompt) follows."""
    options: dict[str, Any] = {
        "views_u8": [],
        "memory": "latent",
        "frames_per_chunk": TINY_DEFAULTS.frames_per_chunk,
        "overlap": TINY_DEFAULTS.overlap,
        "num_identity_slots": NUM_SLOTS,
        "guidance_scale": 1.0,
        **changes,
    }
    num_frames = options["frames_per_chunk"]
    num_drawn = 0
    if options["memory"] == "latent":
        num_drawn = count_drawn_frames(NUM_SLOTS, len(options["views_u8"]))
    if options["guidance_scale"] != 1:
        options["negative_prompt_embeds"] = pipeline.encode_prompt("blurred")

    def read_driving(chunk_index: int) -> tuple[Frames, Frames]:
        poses_u8 = random_frames(100 + chunk_index, num_frames)
        return poses_u8, random_frames(200 + chunk_index, num_frames, FACE_SIZE, FACE_SIZE)

    rollout = Rollout(
        pipeline=pipeline,
        reference_u8=random_frames(2, 1)[0],
        picture_u8=random_frames(3, 1, 40, 70)[0],
        read_driving=read_driving,
        noise=lambda chunk_index: chunk_noise(0, chunk_index, rollout.noise_shape),
        anchor_frame_indices=draw_anchor_indices(0, num_frames, num_drawn),
        prompt_embeds=pipeline.encode_prompt("a fox"),
        num_chunks=NUM_CHUNKS,
        num_inference_steps=NUM_STEPS,
        shift=TINY_DEFAULTS.shift,
        **options,
    )
    return rollout


def generate(rollout: Rollout, state: RolloutState | None = None) -> list[Chunk]:
    return [made for made in rollout.run(state) if isinstance(made, Chunk)]


def generate_and_record(rollout: Rollout) -> tuple[list[Chunk], list[Conditioning]]:
    """The chunks, and what the network was given for each."""
    given: list[Conditioning] = []
    denoise = rollout.pipeline.denoise

    def record(noise: Tensor, sigmas: Tensor, conditioning: Conditioning, **options: Any) -> Any:
        given.append(conditioning)
        return denoise(noise, sigmas, conditioning, **options)

    rollout.pipeline.denoise = record  # type: ignore[method-assign]
    return generate(rollout), given


@contextmanager
def count_calls(owner: object, *names: str) -> Iterator[Callable[[], list[int]]]:
    """Count the calls of methods that run as usual."""
    originals = [getattr(owner, name) for name in names]
    patches = [
        patch.object(owner, name, wraps=original)
        for name, original in zip(names, originals, strict=True)
    ]
    mocks = [patched.start() for patched in patches]
    try:
        yield lambda: [mock.call_count for mock in mocks]
    finally:
        for patched in patches:
            patched.stop()


@contextmanager
def record_timesteps(pipeline: AnimatePipeline) -> Iterator[list[Tensor]]:
    """The timestep of every pass through the network."""
    seen: list[Tensor] = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    yield seen
    hook.remove()


def is_same(first: Chunk, second: Chunk) -> bool:
    """Bit for bit, the state included."""
    states_are_same = all(
        np.array_equal(getattr(first.state, field.name), getattr(second.state, field.name))
        for field in fields(RolloutState)
    )
    return (
        states_are_same
        and first.chunk_index == second.chunk_index
        and torch.equal(first.latents, second.latents)
        and np.array_equal(first.frames_u8, second.frames_u8)
    )


def memory_of(given: Conditioning) -> tuple[Tensor, Tensor]:
    """Mask [1, 4, L, h, w] and latents [1, C, L, h, w] of a condition."""
    return given.condition[:, :NUM_MASK_CHANNELS], given.condition[:, NUM_MASK_CHANNELS:]


# --- what every setup obeys ---------------------------------------------------------------------


def test_yields_every_step_and_then_the_chunk(rollout: Rollout, made: list[Step | Chunk]) -> None:
    assert len(made) == NUM_CHUNKS * (NUM_STEPS + 1)
    for chunk_index in range(NUM_CHUNKS):
        *steps, chunk = made[chunk_index * (NUM_STEPS + 1) :][: NUM_STEPS + 1]
        assert steps == [Step(step_index=index) for index in range(NUM_STEPS)]
        assert isinstance(chunk, Chunk)
        assert chunk.chunk_index == chunk_index
        assert chunk.state.next_chunk == chunk_index + 1
        assert chunk.frames_u8.shape == (rollout.frames_per_chunk, HEIGHT, WIDTH, 3)
        num_target_slots = (rollout.frames_per_chunk - 1) // 4 + 1
        size = (HEIGHT // 8, WIDTH // 8)
        assert chunk.latents.shape == (1, LATENT_CHANNELS, num_target_slots, *size)


def test_going_on_from_any_state_gives_the_same_chunks(
    rollout: Rollout, chunks: list[Chunk]
) -> None:
    for finished in range(1, NUM_CHUNKS):
        # A copy of the rollout has encoded nothing yet, like a new process.
        later = generate(replace(rollout), chunks[finished - 1].state)
        assert len(later) == NUM_CHUNKS - finished
        assert all(map(is_same, chunks[finished:], later))
    assert generate(rollout, chunks[-1].state) == []


def test_a_state_can_be_saved_and_keeps_nothing_else_alive(chunks: list[Chunk]) -> None:
    for chunk in chunks:
        values = [getattr(chunk.state, field.name) for field in fields(RolloutState)]
        for tensor in [chunk.latents, *(value for value in values if isinstance(value, Tensor))]:
            assert tensor.device.type == "cpu"
            assert tensor.dtype == torch.float32
            assert tensor.is_contiguous()
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        assert chunk.state.last_frame_u8 is not None
        assert chunk.state.last_frame_u8.base is None
        assert np.array_equal(chunk.state.last_frame_u8, chunk.frames_u8[-1])


def test_decoded_floats_are_gone_when_the_next_chunk_is_sampled(rollout: Rollout) -> None:
    """At 720p they are 850 MB, on the device."""
    rollout = replace(rollout, pipeline=replace(rollout.pipeline), num_chunks=2)
    decode, decoded = rollout.pipeline.decode, []

    def decode_and_watch(latents: Tensor) -> Tensor:
        pixels = decode(latents)
        decoded.append(weakref.ref(pixels))
        return pixels

    rollout.pipeline.decode = decode_and_watch  # type: ignore[method-assign]
    for _ in rollout.run():
        assert not any(pixels() is not None for pixels in decoded)
    assert len(decoded) == 2


def test_what_the_steps_needed_is_gone_when_frames_are_decoded(rollout: Rollout) -> None:
    """At 480p the embedding of the pose takes 0.3 GiB."""
    pipeline = rollout.pipeline
    given: list[weakref.ref[Tensor]] = []
    num_alive: list[int] = []

    def keep(embed: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
        def embed_and_note(seen: Any) -> Tensor:
            embeds = embed(seen)
            given.append(weakref.ref(embeds))
            return embeds

        return embed_and_note

    def decode(latents: Tensor) -> Tensor:
        num_alive.append(sum(embeds() is not None for embeds in given))
        return AnimatePipeline.decode(pipeline, latents)

    with (
        patch.object(pipeline, "embed_pose", keep(pipeline.embed_pose)),
        patch.object(pipeline, "embed_face", keep(pipeline.embed_face)),
        patch.object(pipeline, "decode", decode),
    ):
        num_chunks = len(generate(rollout))
    assert len(given) == 2 * num_chunks
    assert num_alive == [0] * num_chunks


def test_frames_can_be_decoded_again(rollout: Rollout, chunks: list[Chunk]) -> None:
    for chunk in chunks:
        assert np.array_equal(rollout.decode_frames(chunk.latents), chunk.frames_u8)


def test_noise_and_length_touch_no_earlier_chunk(rollout: Rollout, chunks: list[Chunk]) -> None:
    drawn: list[int] = []

    def other_noise(chunk_index: int) -> Tensor:
        drawn.append(chunk_index)
        return chunk_noise(9 if chunk_index == 1 else 0, chunk_index, rollout.noise_shape)

    others = generate(replace(rollout, num_chunks=2, noise=other_noise))
    assert drawn == [0, 1]
    assert is_same(chunks[0], others[0])
    assert (chunks[1].latents - others[1].latents).abs().max() > 0.1


def test_nothing_is_computed_twice(rollout: Rollout) -> None:
    rollout = replace(rollout)
    transformer, pipeline = rollout.pipeline.transformer, rollout.pipeline
    num_passes = 1 if rollout.guidance_scale == 1 else 2
    with (
        count_calls(transformer, "embed_pose", "embed_face") as count_embeddings,
        count_calls(pipeline, "encode_pictures", "encode_clip", "decode") as count_codes,
        record_timesteps(pipeline) as timesteps,
    ):
        generate(rollout)
    assert len(timesteps) == NUM_CHUNKS * NUM_STEPS * num_passes
    # With guidance, once more for the black faces of all chunks.
    assert count_embeddings() == [NUM_CHUNKS, NUM_CHUNKS + num_passes - 1]

    num_pictures = 1 + bool(rollout.views_u8) + bool(rollout.anchor_frame_indices)
    num_clips = {"latent": NUM_CHUNKS, "sink": 1, "pixel": 0}[rollout.memory]
    assert count_codes() == [num_pictures, num_clips, NUM_CHUNKS]


def test_networks_that_take_turns_on_the_card_come_once_per_chunk(rollout: Rollout) -> None:
    asked: list[str] = []
    with patch.object(rollout.pipeline, "_need", asked.append):
        generate(replace(rollout))
    turns = [name for name, _ in groupby(asked)]
    assert turns.count("transformer") == NUM_CHUNKS
    assert turns.count("vae") == NUM_CHUNKS + 1  # before the first chunk, and after each
    assert turns.count("image_encoder") <= NUM_CHUNKS


def test_no_gradients_are_kept() -> None:
    pipeline = build_tiny_pipeline()
    pipeline.transformer.requires_grad_(True)
    pipeline.vae.requires_grad_(True)
    pipeline.image_encoder.requires_grad_(True)
    pipeline.text_encoder.requires_grad_(True)
    rollout = replace(build_rollout(pipeline), num_chunks=1)
    (chunk,), (conditioning,) = generate_and_record(rollout)
    assert chunk.latents.grad_fn is None
    for field in fields(Conditioning):
        value = getattr(conditioning, field.name)
        assert value is None or value.grad_fn is None


# --- identity memory ----------------------------------------------------------------------------


@pytest.mark.parametrize("num_views", [0, 1, NUM_SLOTS - 1])
def test_identity_slots(pipeline: AnimatePipeline, num_views: int) -> None:
    rollout = build_rollout(pipeline, views_u8=VIEWS_U8[:num_views])
    chunks, given = generate_and_record(rollout)
    reference = pipeline.encode_pictures(rollout.reference_u8[None])
    views = [pipeline.encode_pictures(view_u8[None]) for view_u8 in rollout.views_u8]
    num_between = NUM_SLOTS - 1 - num_views
    drawn = [
        pipeline.encode_pictures(chunks[0].frames_u8[index][None])
        for index in rollout.anchor_frame_indices
    ]
    assert len(drawn) == num_between
    first = torch.cat([*views, *[reference] * num_between, reference], dim=2)
    later = torch.cat([*views, *drawn, reference], dim=2)
    assert torch.equal(memory_of(given[0])[1][:, :, :NUM_SLOTS], first)
    for conditioning in given[1:]:
        assert torch.equal(memory_of(conditioning)[1][:, :, :NUM_SLOTS], later)


def test_mask_is_on_identity_slots_only(pipeline: AnimatePipeline) -> None:
    for conditioning in generate_and_record(build_rollout(pipeline))[1]:
        mask, latents = memory_of(conditioning)
        assert (mask[:, :, :NUM_SLOTS] == 1).all()
        assert (mask[:, :, NUM_SLOTS:] == 0).all()
        assert (latents[:, :, NUM_SLOTS + 1 :] == 0).all()


def test_other_drawn_frames_change_the_second_chunk(pipeline: AnimatePipeline) -> None:
    rollout = build_rollout(pipeline)
    chunks = generate(rollout)
    shifted = [index % (rollout.frames_per_chunk - 1) + 1 for index in rollout.anchor_frame_indices]
    others = generate(replace(rollout, anchor_frame_indices=shifted))
    assert torch.equal(chunks[0].latents, others[0].latents)
    assert (chunks[1].latents - others[1].latents).abs().max() > 1e-3


# --- motion memory ------------------------------------------------------------------------------


@pytest.mark.parametrize(("frames_per_chunk", "overlap"), [(9, 4), (13, 8)])
def test_motion_slots_are_the_sampled_latents_untouched(
    pipeline: AnimatePipeline, frames_per_chunk: int, overlap: int
) -> None:
    rollout = build_rollout(pipeline, frames_per_chunk=frames_per_chunk, overlap=overlap)
    chunks, given = generate_and_record(rollout)
    motion = slice(NUM_SLOTS, NUM_SLOTS + overlap // 4)
    assert (memory_of(given[0])[1][:, :, NUM_SLOTS:] == 0).all()
    for previous, conditioning in zip(chunks[:-1], given[1:], strict=True):
        latents = memory_of(conditioning)[1]
        assert torch.equal(latents[:, :, motion], previous.latents[:, :, -overlap // 4 :])
        assert (latents[:, :, motion.stop :] == 0).all()


def test_sink_gives_every_chunk_the_first_condition(pipeline: AnimatePipeline) -> None:
    views_u8 = VIEWS_U8[:1]
    _, latent = generate_and_record(build_rollout(pipeline, views_u8=views_u8))
    chunks, given = generate_and_record(build_rollout(pipeline, views_u8=views_u8, memory="sink"))
    for conditioning in given:
        assert torch.equal(conditioning.condition, latent[0].condition)
    assert chunks[-1].state.motion_latents is None
    assert chunks[-1].state.drawn_latents is None


def test_with_sink_and_reference_chunks_hang_on_their_own_noise_only(
    pipeline: AnimatePipeline,
) -> None:
    rollout = build_rollout(pipeline, memory="sink", clip_image="reference")
    second = generate(rollout)[1]
    other = replace(
        rollout, noise=lambda k: chunk_noise(0 if k == 1 else 9, k, rollout.noise_shape)
    )
    assert torch.equal(generate(other)[1].latents, second.latents)


# --- pixel memory -------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [1, 5])
def test_pixel_memory_carries_decoded_floats(pipeline: AnimatePipeline, overlap: int) -> None:
    rollout = build_rollout(pipeline, memory="pixel", num_identity_slots=1, overlap=overlap)
    chunks, given = generate_and_record(rollout)
    for chunk in chunks:
        carried = chunk.state.carried_pixels
        assert carried is not None
        decoded = pipeline.decode(chunk.latents)[None, :, -overlap:]
        assert torch.equal(carried, decoded)
        assert chunk.state.motion_latents is None
        assert chunk.state.drawn_latents is None
    masks = [memory_of(conditioning)[0] for conditioning in given]
    assert (masks[0][:, :, 1:] == 0).all()
    for mask in masks[1:]:
        assert mask[0, :, :, 0, 0].mean(0).tolist() == [1, 1, float(overlap == 5), 0]


def test_pixel_memory_shows_clip_the_whole_picture(pipeline: AnimatePipeline) -> None:
    rollout = build_rollout(pipeline, memory="pixel", num_identity_slots=1, overlap=1)
    expected = pipeline.encode_clip_as_stock(rollout.picture_u8)
    assert (expected - pipeline.encode_clip(rollout.reference_u8)).abs().max() > 0.1
    for conditioning in generate_and_record(rollout)[1]:
        assert torch.equal(conditioning.clip_embeds, expected)


# --- what the network sees beside the memory ----------------------------------------------------


def test_clip_sees_the_previous_chunk_or_the_reference(pipeline: AnimatePipeline) -> None:
    chunks, given = generate_and_record(build_rollout(pipeline))
    pictures_u8 = [build_rollout(pipeline).reference_u8]
    pictures_u8 += [chunk.frames_u8[-1] for chunk in chunks[:-1]]
    for picture_u8, conditioning in zip(pictures_u8, given, strict=True):
        assert torch.equal(conditioning.clip_embeds, pipeline.encode_clip(picture_u8))

    others, given = generate_and_record(build_rollout(pipeline, clip_image="reference"))
    for conditioning in given:
        assert torch.equal(conditioning.clip_embeds, pipeline.encode_clip(pictures_u8[0]))
    assert is_same(chunks[0], others[0])
    assert (chunks[1].latents - others[1].latents).abs().max() > 0.01


def test_guidance_moves_away_from_the_negative_prompt_and_black_faces(
    pipeline: AnimatePipeline,
) -> None:
    rollout = build_rollout(pipeline, guidance_scale=3.0)
    _, (conditioning, *_) = generate_and_record(rollout)
    sigmas = shifted_sigmas(1, 5.0)
    noise = rollout.noise(0)

    def velocity(given: Conditioning, guidance_scale: float) -> Tensor:
        (latents,) = pipeline.denoise(noise, sigmas, given, guidance_scale=guidance_scale)
        return noise - latents

    assert conditioning.negative_prompt_embeds is not None
    assert conditioning.blank_face_tokens is not None
    black = torch.full((1, 3, rollout.frames_per_chunk, FACE_SIZE, FACE_SIZE), -1.0)
    with torch.no_grad():
        black_tokens = pipeline.transformer.embed_face(black)
    torch.testing.assert_close(conditioning.blank_face_tokens, black_tokens, rtol=0, atol=1e-5)
    negative = replace(
        conditioning,
        prompt_embeds=conditioning.negative_prompt_embeds,
        face_tokens=conditioning.blank_face_tokens,
    )
    positive, away = velocity(conditioning, 1.0), velocity(negative, 1.0)
    guided = velocity(conditioning, 3.0)
    torch.testing.assert_close(guided, away + 3 * (positive - away), rtol=0, atol=1e-5)
    assert (guided - positive).abs().max() > 0.1


@pytest.mark.parametrize(
    ("memory", "expected"),
    [("latent", [1000.0, 832.0]), ("sink", [1000.0, 832.0]), ("pixel", [1000.0, 2500 / 3])],
)
def test_bfloat16_networks_get_rounded_timesteps_and_keep_float32_latents(
    memory: str, expected: list[float]
) -> None:
    pipeline = build_tiny_pipeline(dtype=torch.bfloat16)
    slots = {"num_identity_slots": 1} if memory == "pixel" else {}
    rollout = build_rollout(pipeline, memory=memory, **slots)
    with record_timesteps(pipeline) as timesteps:
        chunks, given = generate_and_record(rollout)
    assert [float(timestep) for timestep in timesteps[:NUM_STEPS]] == pytest.approx(expected)
    for chunk, conditioning in zip(chunks, given, strict=True):
        assert conditioning.condition.dtype == torch.float32
        assert conditioning.pose_embeds.dtype == torch.bfloat16
        assert conditioning.face_tokens.dtype == torch.bfloat16
        assert chunk.latents.dtype == torch.float32
        assert chunk.latents.isfinite().all()
        # Latents that were rounded to bfloat16 on the way would come back unchanged.
        assert (chunk.latents.bfloat16().float() != chunk.latents).float().mean() > 0.9


# --- parts that do not fit ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"anchor_frame_indices": [1, 2]}, "2 anchor frames for 3 slots"),
        ({"memory": "sink"}, "3 anchor frames for 0 slots"),
        ({"overlap": 5}, "latent memory cannot carry 5 frames"),
        ({"guidance_scale": 2.0}, "guidance needs a negative prompt"),
        (
            {"memory": "pixel", "anchor_frame_indices": []},
            "pixel memory has one identity slot, which holds the reference",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    pipeline: AnimatePipeline, changes: dict[str, Any], message: str
) -> None:
    rollout = build_rollout(pipeline)
    with pytest.raises(ValueError, match=message):
        replace(rollout, **changes)
