"""`rollout.safetensors` from pixels to pixels, through the chunk loop itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from everanimate_cli import pipeline as pipeline_module
from everanimate_cli.chunks import ChunkPlan, driving_indices
from everanimate_cli.memory import from_uint8
from everanimate_cli.pipeline import AnimatePipeline, Conditioning
from everanimate_cli.rollout import Chunk, Rollout, RolloutState, Step
from everanimate_cli.schedule import model_timestep
from everanimate_cli.settings import TEMPORAL_STRIDE

Golden = Callable[[str], dict[str, Tensor]]
Config = Callable[[str], dict[str, object]]

# One chunk from stored memory, and the whole rollout from pixels, where a difference of 1e-6
# before the cut to 8 bits can move a pixel that becomes memory.
CHUNK_TOLERANCE = 2e-4
ROLLOUT_TOLERANCE = 5e-3
# One pass through a network.
CODEC_TOLERANCE = 1e-5
MAX_SHARE_OFF_BY_ONE = 0.005


@dataclass(frozen=True, kw_only=True)
class GoldenRun:
    """The golden file, a rollout set up as its settings say, and what the network was given."""

    tensors: dict[str, Tensor]
    plan: ChunkPlan
    num_steps: int
    rollout: Rollout
    conditionings: list[Conditioning]

    def stored(self, chunk_index: int, name: str) -> Tensor:
        return self.tensors[f"clip{chunk_index}.{name}"]

    def state_before(self, chunk_index: int) -> RolloutState:
        """The memory with which the released code entered a chunk."""
        if chunk_index == 0:
            return RolloutState()
        num_drawn = len(self.tensors["anchor_frame_indices"])
        return RolloutState(
            next_chunk=chunk_index,
            drawn_latents=self.tensors["anchors_after_clip0"][None, :, :num_drawn],
            motion_latents=self.stored(chunk_index - 1, "motion_latent_out")[None],
            last_frame_u8=self.stored(chunk_index, "clip_image_u8").numpy(),
        )

    def sample_alone(self, chunk_index: int) -> Tensor:
        """Target latents of one chunk, from the released code's memory."""
        state = self.state_before(chunk_index)
        rollout = replace(self.rollout, num_chunks=chunk_index + 1)
        *_, chunk = rollout.run(state)
        assert isinstance(chunk, Chunk)
        return chunk.latents

    def stored_target(self, chunk_index: int, name: str) -> Tensor:
        return self.stored(chunk_index, name)[:, :, self.rollout.num_identity_slots :]


@pytest.fixture(scope="module")
def run(golden: Golden, config: Config, codec: AnimatePipeline) -> GoldenRun:
    tensors = golden("rollout")
    settings: dict[str, int] = config("rollout_settings")  # type: ignore[assignment]
    pipeline = replace(codec)  # a copy: other tests share the fixture
    pipeline.encode_clip = partial(encode_toy_clip, tensors)  # type: ignore[method-assign]
    conditionings: list[Conditioning] = []
    denoise = pipeline.denoise

    def denoise_and_record(
        noise: Tensor, sigmas: Tensor, conditioning: Conditioning, **options: object
    ) -> object:
        conditionings.append(conditioning)
        return denoise(noise, sigmas, conditioning, **options)  # type: ignore[arg-type]

    pipeline.denoise = denoise_and_record  # type: ignore[method-assign, assignment]

    assert settings["pingpong"]
    plan = ChunkPlan(
        num_frames=int(tensors["num_output_frames"]),
        frames_per_chunk=settings["frames_per_clip"],
        overlap=settings["num_overlap_frame"],
    )
    poses_u8, faces_u8 = tensors["pose_video_u8"].numpy(), tensors["face_video_u8"].numpy()

    def read_driving(chunk_index: int) -> tuple[np.ndarray, np.ndarray]:
        indices = driving_indices(plan, chunk_index, len(poses_u8), "pingpong")
        return poses_u8[indices], faces_u8[indices]

    reference_u8 = tensors["ref_image_u8"].numpy()
    rollout = Rollout(
        pipeline=pipeline,
        reference_u8=reference_u8,
        picture_u8=reference_u8,
        views_u8=[],
        read_driving=read_driving,
        noise=lambda chunk_index: tensors[f"clip{chunk_index}.noise"],
        anchor_frame_indices=tensors["anchor_frame_indices"].tolist(),
        prompt_embeds=tensors["text_embeds"],
        num_chunks=settings["num_clips"],
        frames_per_chunk=plan.frames_per_chunk,
        overlap=plan.overlap,
        num_identity_slots=settings["num_video_anchor_latents"],
        num_inference_steps=settings["num_inference_steps"],
        shift=settings["sigma_shift"],
    )
    return GoldenRun(
        tensors=tensors,
        plan=plan,
        num_steps=settings["num_inference_steps"],
        rollout=rollout,
        conditionings=conditionings,
    )


def encode_toy_clip(tensors: dict[str, Tensor], frame_u8: np.ndarray) -> Tensor:
    """The file's stand-in for CLIP: average-pool, scale by U, project by V."""
    scales, projection = tensors["toy_clip.U"], tensors["toy_clip.V"]
    side = round((scales.shape[1] / 3) ** 0.5)
    pixels = from_uint8(frame_u8[None])[:, :, 0]
    pooled = torch.nn.functional.adaptive_avg_pool2d(pixels, side).flatten()
    return (scales * pooled @ projection)[None]


@pytest.fixture(scope="module")
def made(run: GoldenRun) -> Sequence[Step | Chunk]:
    """All that the loop yields, from pixels."""
    run.conditionings.clear()
    return list(run.rollout.run())


@pytest.fixture(scope="module")
def chunks(made: Sequence[Step | Chunk]) -> Sequence[Chunk]:
    return [item for item in made if isinstance(item, Chunk)]


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def assert_same_pictures(actual_u8: np.ndarray, expected_u8: Tensor) -> None:
    assert actual_u8.shape == tuple(expected_u8.shape)
    difference = np.abs(actual_u8.astype(int) - expected_u8.numpy().astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < MAX_SHARE_OFF_BY_ONE


def test_order_of_steps_and_chunks(run: GoldenRun, made: Sequence[Step | Chunk]) -> None:
    steps = [Step(step_index=index) for index in range(run.num_steps)]
    per_chunk = len(steps) + 1
    assert len(made) == run.rollout.num_chunks * per_chunk
    for chunk_index in range(run.rollout.num_chunks):
        *before, chunk = made[chunk_index * per_chunk : (chunk_index + 1) * per_chunk]
        assert before == steps
        assert isinstance(chunk, Chunk)
        assert chunk.chunk_index == chunk_index
        assert chunk.state.next_chunk == chunk_index + 1


def test_output_frames(run: GoldenRun, chunks: Sequence[Chunk]) -> None:
    kept = [run.plan.kept_frames(chunk.chunk_index) for chunk in chunks]
    output_u8 = np.concatenate(
        [
            chunk.frames_u8[frames.start : frames.stop]
            for chunk, frames in zip(chunks, kept, strict=True)
        ]
    )
    assert len(output_u8) == run.tensors["num_output_frames"]
    assert_same_pictures(output_u8, run.tensors["output_frames_u8"])


def test_dropped_frames(run: GoldenRun, chunks: Sequence[Chunk]) -> None:
    for chunk in chunks[1:]:
        dropped_u8 = chunk.frames_u8[: run.plan.overlap]
        assert_same_pictures(dropped_u8, run.stored(chunk.chunk_index, "overlap_frames_u8"))


def test_driving_frames(run: GoldenRun, chunk_index: int) -> None:
    poses_u8, faces_u8 = run.rollout.read_driving(chunk_index)
    indices = run.stored(chunk_index, "driving_indices")
    assert_near(torch.from_numpy(poses_u8), run.tensors["pose_video_u8"][indices], 0)
    assert_near(torch.from_numpy(faces_u8), run.tensors["face_video_u8"][indices], 0)


def test_noise_shape(run: GoldenRun, chunk_index: int) -> None:
    assert run.rollout.noise_shape == tuple(run.stored(chunk_index, "noise").shape)


def test_what_the_network_is_given(
    run: GoldenRun, chunks: Sequence[Chunk], chunk_index: int
) -> None:
    assert len(chunks) > chunk_index
    given = run.conditionings[chunk_index]
    assert_near(given.condition, run.stored(chunk_index, "y"), ROLLOUT_TOLERANCE)
    assert_near(given.clip_embeds, run.stored(chunk_index, "clip_feature"), ROLLOUT_TOLERANCE)
    pose_embeds = run.rollout.pipeline.transformer.embed_pose(
        run.stored(chunk_index, "pose_latents")
    )
    assert_near(given.pose_embeds, pose_embeds, CHUNK_TOLERANCE)


def test_latents(run: GoldenRun, chunks: Sequence[Chunk], chunk_index: int) -> None:
    chunk = chunks[chunk_index]
    assert_near(chunk.latents, run.stored(chunk_index, "decoded_latents"), ROLLOUT_TOLERANCE)


def test_state(run: GoldenRun, chunks: Sequence[Chunk], chunk_index: int) -> None:
    state = chunks[chunk_index].state
    assert state.motion_latents is not None
    assert state.motion_latents.shape[2] * TEMPORAL_STRIDE == run.plan.overlap
    motion = run.stored(chunk_index, "motion_latent_out")[None]
    assert_near(state.motion_latents, motion, ROLLOUT_TOLERANCE)

    assert state.drawn_latents is not None
    anchors = run.tensors["anchors_after_clip0"][None]
    assert_near(state.drawn_latents, anchors[:, :, :-1], ROLLOUT_TOLERANCE)
    assert_near(run.tensors["user_anchor_latent"][None], anchors[:, :, -1:], CODEC_TOLERANCE)

    assert state.last_frame_u8 is not None
    if chunk_index + 1 < run.rollout.num_chunks:
        clip_image_u8 = run.stored(chunk_index + 1, "clip_image_u8")
        assert_same_pictures(state.last_frame_u8, clip_image_u8)
    assert state.carried_pixels is None


def test_clip_of_a_frame_at_the_videos_size(golden: Golden, codec: AnimatePipeline) -> None:
    """The real model this time, called as the loop calls it."""
    tensors = golden("clip")
    features = codec.encode_clip(tensors["resized_u8"].numpy())
    assert_near(features, tensors["clip_feature"], CODEC_TOLERANCE)


def test_a_chunk_from_the_released_memory(run: GoldenRun, chunk_index: int) -> None:
    latents = run.sample_alone(chunk_index)
    expected = run.stored_target(chunk_index, "final_latents_all")
    assert_near(latents, expected, CHUNK_TOLERANCE)


def test_a_chunk_with_bfloat16_timesteps(
    run: GoldenRun, chunk_index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the released runs, but with a float32 network, which is how the file was made."""

    def rounded(sigma: Tensor, _: torch.dtype, *, as_stock: bool) -> Tensor:
        return model_timestep(sigma, torch.bfloat16, as_stock=as_stock)

    monkeypatch.setattr(pipeline_module, "model_timestep", rounded)
    latents = run.sample_alone(chunk_index)
    expected = run.stored_target(chunk_index, "final_latents_all_bf16_timesteps")
    assert_near(latents, expected, CHUNK_TOLERANCE)
    # Unrounded timesteps are another result, so the test above can fail.
    unrounded = run.stored_target(chunk_index, "final_latents_all")
    assert (unrounded - expected).abs().max() > 2 * CHUNK_TOLERANCE


@pytest.mark.parametrize(
    "wrong",
    [
        {"motion_latents": None},
        {"drawn_latents": None},
        {"last_frame_u8": None},  # CLIP then sees the reference
    ],
    ids=["motion", "identity", "clip"],
)
def test_a_chunk_without_part_of_its_memory_misses(run: GoldenRun, wrong: dict[str, None]) -> None:
    rollout = replace(run.rollout, num_chunks=2)
    *_, chunk = rollout.run(replace(run.state_before(1), **wrong))
    assert isinstance(chunk, Chunk)
    expected = run.stored_target(1, "final_latents_all")
    assert (chunk.latents - expected).abs().max() > 2 * ROLLOUT_TOLERANCE
