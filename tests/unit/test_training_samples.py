"""Training samples: which frames become which tensor, and what an example takes of them."""

import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sample_fakes import (
    FakeClip,
    FrameNumbers,
    covering,
    moving_clip,
    numbered_clip,
    shown_frames,
    train_settings,
)
from tiny import build_tiny_pipeline
from torch import Tensor

from everanimate_cli import training_samples
from everanimate_cli.degradation import Degradation
from everanimate_cli.errors import RunError, SettingsError
from everanimate_cli.latent_cache import LatentCache
from everanimate_cli.memory import from_uint8
from everanimate_cli.pipeline import AnimatePipeline
from everanimate_cli.schedule import training_schedule
from everanimate_cli.train_settings import ResolvedTrainSettings
from everanimate_cli.training_draws import Affine, SampleDraw, StepDraw, Windows
from everanimate_cli.training_samples import (
    BLANK_VIDEO,
    DROPPED_POSE,
    SampleSource,
    TrainingExample,
    assemble,
    encode_constant,
    encode_sample,
    fill_cache,
    missing_work,
    move_pixels,
    open_cache,
    training_noise,
    used_components,
    used_constants,
)

# Of a numbered clip: reference in 20..23, previous chunk 24..36, target 33..41.
START = 20
SAMPLE = SampleDraw(
    clip_index=0,
    start=START,
    reference_index=2,
    anchor_indices=(0, 3, 5, 12),
    affine=Affine(scale=1.0, x=0.0, y=0.0),
    degradation=Degradation(brightness=2.0),
    recycling=Degradation(brightness=3.0),
)
STEP = StepDraw(
    is_first=False,
    repeats_reference=False,
    augments=False,
    degrades=False,
    recycles=False,
    drops_pose=False,
    step_index=700,
)
REFERENCE = [22.0] * 4
ANCHORS = [[24.0] * 4, [27.0] * 4, [29.0] * 4, [36.0] * 4]
TARGET = covering(range(33, 42))
ZEROS = [[0.0] * 4]
HIGH, LOW = torch.tensor([0.8]), torch.tensor([0.4])


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def pipeline() -> AnimatePipeline:
    return build_tiny_pipeline()


@pytest.fixture(scope="module")
def clips() -> list[FakeClip]:
    return [
        moving_clip(26, 0.0),
        moving_clip(24, 3.0, prompt="a woman turns"),
        moving_clip(22, 5.0, prompt=""),
    ]


def numbered_parts(*names: str, sample: SampleDraw = SAMPLE) -> dict[str, Tensor]:
    frames = numbered_clip(60).read(START, 22)
    return encode_sample(FrameNumbers(), frames, sample, Windows(9), names)  # type: ignore[arg-type]


def all_parts(settings: ResolvedTrainSettings) -> dict[str, Tensor]:
    constants = {
        name: encode_constant(FrameNumbers(), name, 9, 16, 24)  # type: ignore[arg-type]
        for name in used_constants(settings)
    }
    return numbered_parts(*used_components(settings)) | constants


def equal(left: TrainingExample, right: TrainingExample) -> bool:
    """Bit for bit."""
    for item in fields(TrainingExample):
        one, other = getattr(left, item.name), getattr(right, item.name)
        if isinstance(one, Tensor):
            if one.dtype != other.dtype or not torch.equal(one, other):
                return False
        elif one != other:
            return False
    return True


def cache_of(settings: ResolvedTrainSettings, clips: Sequence[FakeClip]) -> LatentCache:
    return open_cache(settings, clips, model_hash="aa", dtype=torch.float32)


def fill(
    settings: ResolvedTrainSettings,
    clips: Sequence[FakeClip],
    pipeline: AnimatePipeline,
    rank: int = 0,
    world_size: int = 1,
) -> LatentCache:
    cache = cache_of(settings, clips)
    work = missing_work(cache, settings, clips, rank=rank, world_size=world_size)
    done = list(fill_cache(cache, work, settings, clips, pipeline))
    assert done == list(range(1, len(work) + 1))
    return cache


# --- encode ---


def test_windows_by_numbered_frames() -> None:
    parts = numbered_parts("target", "pose", "face_tokens", "reference", "motion", "anchors4")
    assert shown_frames(parts["reference"]) == [REFERENCE]
    assert shown_frames(parts["anchors4"]) == ANCHORS
    assert shown_frames(parts["target"]) == TARGET
    # The last latent of the previous chunk covers exactly the target's first four frames.
    assert shown_frames(parts["motion"]) == [[33, 34, 35, 36]]
    assert parts["motion"].untyped_storage().nbytes() == 16  # and keeps no other in memory
    # Pose and face are of the same frames as the target.
    assert shown_frames(parts["pose"]) == covering(range(113, 122))
    assert parts["face_tokens"].flatten().tolist() == [193, 197, 201]


def test_what_clip_sees() -> None:
    parts = numbered_parts("clip_target", "clip_reference")
    assert parts["clip_target"].unique().tolist() == [33]
    assert parts["clip_reference"].unique().tolist() == [22]


def test_degradation_is_of_the_target_and_recycling_of_the_previous_chunk() -> None:
    parts = numbered_parts("target_degraded", "motion_recycled")
    assert shown_frames(parts["target_degraded"]) == covering(range(66, 84, 2))
    assert shown_frames(parts["motion_recycled"]) == [[99, 102, 105, 108]]


@pytest.mark.parametrize("num_frames", [1, 5])
def test_carried_frames_are_the_first_of_the_target_before_zeros(num_frames: int) -> None:
    name = f"carry{num_frames}"
    shown = shown_frames(numbered_parts(name)[name])
    grey = 127.5
    frames = [frame for latent in shown for frame in latent][3:]
    assert frames == [*range(33, 33 + num_frames), *[grey] * (9 - num_frames)]


def test_constants() -> None:
    codec: Any = FrameNumbers()
    assert encode_constant(codec, BLANK_VIDEO, 9, 16, 24).unique().tolist() == [127.5]
    assert encode_constant(codec, DROPPED_POSE, 9, 16, 24).unique().tolist() == [0]


def test_anchors_are_moved_before_each_is_encoded_alone(pipeline: AnimatePipeline) -> None:
    frames = moving_clip(22, 0.0).read(0, 22)
    sample = replace(SAMPLE, affine=Affine(scale=1.1, x=0.05, y=-0.1))
    names = ["anchors4", "anchors4_augmented"]
    parts = encode_sample(pipeline, frames, sample, Windows(9), names)
    anchors_u8 = frames.rgb_u8[[4, 7, 9, 16]]
    for slot, frame_u8 in enumerate(anchors_u8):
        plain = pipeline.encode_pictures(frame_u8[None])
        moved = pipeline.encode_video(move_pixels(from_uint8(frame_u8[None]), sample.affine))
        for name, expected in zip(names, (plain, moved), strict=True):
            torch.testing.assert_close(
                parts[name][:, :, slot : slot + 1], expected, rtol=0, atol=1e-5
            )
    assert (parts["anchors4"] - parts["anchors4_augmented"]).abs().max() > 0.1


def test_shift_by_hand() -> None:
    """0.10 grid units are 5 % of a side: the content moves by one of 20 columns."""
    pixels = torch.arange(1.0, 21).expand(1, 3, 2, 10, 20)
    moved = move_pixels(pixels, Affine(scale=1.0, x=0.1, y=0.0))
    expected = torch.tensor([*range(2, 21), 0.0])  # zero is mid-grey
    torch.testing.assert_close(moved, expected.expand_as(pixels), rtol=0, atol=1e-4)
    rows = torch.arange(1.0, 21)[:, None].expand(1, 3, 2, 20, 10)
    down = move_pixels(rows, Affine(scale=1.0, x=0.0, y=-0.1))
    expected = torch.tensor([0.0, *range(1, 20)])[:, None]
    torch.testing.assert_close(down, expected.expand_as(rows), rtol=0, atol=1e-4)


def test_scale_by_hand() -> None:
    """Content is magnified by 1 / scale about the middle; outside is grey."""
    ramp = torch.linspace(-0.95, 0.95, 20).expand(1, 3, 1, 20, 20)  # value = place
    larger = move_pixels(ramp, Affine(scale=0.8, x=0.0, y=0.0))
    torch.testing.assert_close(larger, 0.8 * ramp, rtol=0, atol=1e-5)
    smaller = move_pixels(torch.ones(1, 3, 1, 20, 20), Affine(scale=1.2, x=0.0, y=0.0))
    is_inside = (1.2 * ramp[0, 0, 0]).abs() < 0.95
    torch.testing.assert_close(smaller[0, 0, 0] > 0.999, is_inside & is_inside.T)
    assert smaller[0, 0, 0, 0].abs().max() == 0


# --- assemble ---


def test_continuation() -> None:
    settings = train_settings()
    latents = assemble(settings, STEP, all_parts(settings), HIGH)
    assert shown_frames(latents.clean) == ANCHORS + TARGET
    assert torch.equal(latents.endpoint, latents.clean)
    assert shown_frames(latents.condition[:, 4:]) == [*ANCHORS, [33, 34, 35, 36], *ZEROS * 2]
    assert shown_frames(latents.condition[:, :4]) == [[1] * 4] * 4 + ZEROS * 3


def test_first_chunk() -> None:
    settings = train_settings()
    for step in (
        replace(STEP, is_first=True),
        replace(STEP, is_first=True, repeats_reference=True, augments=True, recycles=True),
    ):
        latents = assemble(settings, step, all_parts(settings), HIGH)
        assert shown_frames(latents.clean) == [REFERENCE] * 4 + TARGET
        assert shown_frames(latents.condition[:, 4:]) == [REFERENCE] * 4 + ZEROS * 3


def test_reference_as_anchors_of_a_continuation() -> None:
    settings = train_settings()
    step = replace(STEP, repeats_reference=True, augments=True)  # the reference is never moved
    latents = assemble(settings, step, all_parts(settings), HIGH)
    assert shown_frames(latents.clean) == [REFERENCE] * 4 + TARGET
    assert shown_frames(latents.condition[:, 4:])[4:] == [[33, 34, 35, 36], *ZEROS * 2]


def test_augmented_anchors_are_in_condition_and_target_alike() -> None:
    settings = train_settings()
    parts = all_parts(settings)
    parts["anchors4_augmented"] = parts["anchors4"] + 0.5
    latents = assemble(settings, replace(STEP, augments=True, degrades=True), parts, HIGH)
    moved = [[value + 0.5 for value in anchor] for anchor in ANCHORS]
    for shown in (latents.clean, latents.endpoint, latents.condition[:, 4:]):
        assert shown_frames(shown)[:4] == moved


def test_degraded_endpoint_where_the_noise_is_high() -> None:
    settings = train_settings()
    parts = all_parts(settings)
    step = replace(STEP, degrades=True)
    high, low = (assemble(settings, step, parts, sigma) for sigma in (HIGH, LOW))
    assert shown_frames(high.endpoint) == ANCHORS + covering(range(66, 84, 2))
    assert shown_frames(high.clean) == ANCHORS + TARGET
    assert torch.equal(low.endpoint, low.clean)
    always = assemble(train_settings(degradation_min_sigma=0.0), step, parts, LOW)
    assert torch.equal(always.endpoint, high.endpoint)
    assert torch.equal(high.condition, low.condition)


def test_error_recycling_changes_the_motion_latent_alone() -> None:
    settings = train_settings(error_recycling=0.95)
    parts = all_parts(settings)
    plain, recycled = (
        assemble(settings, replace(STEP, recycles=recycles), parts, HIGH)
        for recycles in (False, True)
    )
    assert torch.equal(plain.clean, recycled.clean)
    assert torch.equal(plain.endpoint, recycled.endpoint)
    changed = (plain.condition != recycled.condition).any(dim=1).flatten().tolist()
    assert changed == [False] * 4 + [True] + [False] * 2
    assert shown_frames(recycled.condition[:, 4:])[4] == [99, 102, 105, 108]


def test_sink_memory_is_always_a_first_chunk() -> None:
    settings = train_settings(memory="sink")
    first = assemble(settings, replace(STEP, is_first=True), all_parts(settings), HIGH)
    later = assemble(settings, STEP, all_parts(settings), HIGH)
    assert torch.equal(first.condition, later.condition)
    assert shown_frames(later.condition[:, 4:]) == [REFERENCE] * 4 + ZEROS * 3
    assert shown_frames(later.clean) == [REFERENCE] * 4 + TARGET


@pytest.mark.parametrize("carry_frames", [1, 5])
def test_pixel_memory(carry_frames: int) -> None:
    settings = train_settings(memory="pixel", carry_frames=carry_frames)
    parts = all_parts(settings)
    first, later = (
        assemble(settings, replace(STEP, is_first=is_first), parts, HIGH)
        for is_first in (True, False)
    )
    assert shown_frames(later.clean) == [REFERENCE, *TARGET]
    assert shown_frames(first.condition[:, 4:]) == [REFERENCE, *[[127.5] * 4] * 3]
    assert shown_frames(first.condition[:, :4]) == [[1] * 4] + ZEROS * 3
    assert shown_frames(later.condition[:, 4:]) == [
        REFERENCE,
        *shown_frames(parts[f"carry{carry_frames}"]),
    ]
    carried_latents = {1: 1, 5: 2}[carry_frames]
    assert shown_frames(later.condition[:, :4]) == (
        [[1] * 4] * (1 + carried_latents) + ZEROS * (3 - carried_latents)
    )


@pytest.mark.parametrize(
    ("changes", "left_out", "added"),
    [
        ({}, set(), set()),
        ({"stage": 1}, {"target_degraded", "anchors4_augmented"}, set()),
        ({"memory_augmentation": 1.0}, {"anchors4"}, set()),
        (
            {"first_chunk_probability": 0.0, "reference_anchor_probability": 0.0},
            {"reference"},
            set(),
        ),
        ({"reference_anchor_probability": 1.0}, {"anchors4", "anchors4_augmented"}, set()),
        ({"first_chunk_probability": 1.0}, {"anchors4", "anchors4_augmented", "motion"}, set()),
        ({"error_recycling": 1.0}, {"motion"}, {"motion_recycled"}),
        ({"error_recycling": 0.5}, set(), {"motion_recycled"}),
        ({"pose_drop": 1.0}, {"pose"}, set()),
        ({"memory": "sink"}, {"anchors4", "anchors4_augmented", "motion"}, set()),
        (
            {"memory": "pixel", "carry_frames": 5},
            {"anchors4", "anchors4_augmented", "motion", "clip_target"},
            {"carry5", "clip_reference"},
        ),
        (
            {"identity_slots": 2},
            {"anchors4", "anchors4_augmented"},
            {"anchors2", "anchors2_augmented"},
        ),
    ],
)
def test_only_what_can_be_used_is_encoded(
    changes: dict[str, Any], left_out: set[str], added: set[str]
) -> None:
    settings = train_settings(**changes)
    every = "target target_degraded pose face_tokens reference motion clip_target"
    usual = {*every.split(), "anchors4", "anchors4_augmented"}
    components = set(used_components(settings))
    assert components == usual - left_out | added
    # No draw asks for anything else, and everything is asked for by some draw.
    wanted = set()
    for index in range(500):
        step = training_samples.draw_step(settings, 0, index)
        wanted |= set(training_samples._recipe(settings, step).names)
    assert wanted == components | set(used_constants(settings))


# --- examples ---


def test_shapes_and_dtypes_of_an_example(clips: list[FakeClip]) -> None:
    pipeline = build_tiny_pipeline(dtype=torch.bfloat16)
    example = SampleSource(train_settings(), clips, pipeline, None).example(4)
    found = {
        item.name: (tuple(value.shape), value.dtype)
        for item in fields(TrainingExample)
        if isinstance(value := getattr(example, item.name), Tensor)
    }
    assert found == {
        "clean_latents": ((1, 6, 7, 2, 4), torch.float32),
        "endpoint_latents": ((1, 6, 7, 2, 4), torch.float32),
        "condition": ((1, 10, 7, 2, 4), torch.float32),
        "pose_latents": ((1, 6, 3, 2, 4), torch.float32),
        "face_tokens": ((1, 3, 5, 48), torch.bfloat16),
        "prompt_embeds": ((1, 512, 20), torch.bfloat16),
        "clip_embeds": ((1, 17, 28), torch.bfloat16),
        "noise": ((1, 6, 7, 2, 4), torch.float32),
    }
    assert 0 <= example.step_index < 1000


def test_an_example_is_what_its_draws_say(clips: list[FakeClip], pipeline: AnimatePipeline) -> None:
    settings = train_settings()
    source = SampleSource(settings, clips, pipeline, None)
    sigmas = training_schedule(5.0).sigmas
    seen = set()
    for index in range(8):
        step = training_samples.draw_step(settings, 3, index)
        sample = training_samples.draw_sample(settings, 3, index, [26, 24, 22])
        clip = clips[sample.clip_index]
        example = source.example(index)
        target_u8 = clip.rgb_u8[sample.start + 13 : sample.start + 22]
        target = pipeline.encode_video(from_uint8(target_u8))
        assert torch.equal(example.clean_latents[:, :, 4:], target)
        assert torch.equal(example.condition[:, 4:, :4], example.clean_latents[:, :, :4])
        is_degraded = not torch.equal(example.endpoint_latents, example.clean_latents)
        assert is_degraded == (step.degrades and bool(sigmas[step.step_index] >= 0.5))
        assert (example.condition[:, 4:, 4].abs().max() == 0) == step.is_first
        assert example.step_index == step.step_index
        assert torch.equal(example.noise, training_noise(3, index, (1, 6, 7, 2, 4)))
        prompt = clip.prompt if clip.prompt is not None else settings.prompt
        assert torch.equal(example.prompt_embeds, pipeline.encode_prompt(prompt))
        seen |= {(sample.clip_index, step.is_first, is_degraded)}
    assert len(seen) >= 5
    assert {clip.prompt for clip in clips} == {None, "a woman turns", ""}


def test_dropped_pose_is_a_black_video(clips: list[FakeClip], pipeline: AnimatePipeline) -> None:
    shown, dropped = (
        SampleSource(train_settings(pose_drop=share), clips, pipeline, None).example(0)
        for share in (0.0, 1.0)
    )
    black = pipeline.encode_video(torch.full((1, 3, 9, 16, 32), -1.0))
    assert torch.equal(dropped.pose_latents, black)
    assert not torch.equal(shown.pose_latents, black)
    assert torch.equal(dropped.clean_latents, shown.clean_latents)
    assert torch.equal(dropped.condition, shown.condition)


def test_what_samples_share_is_encoded_once(
    clips: list[FakeClip], pipeline: AnimatePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = train_settings(memory="pixel", first_chunk_probability=1.0, pose_drop=1.0, stage=1)
    prompts, videos = [], []
    encode_prompt, encode_video = pipeline.encode_prompt, pipeline.encode_video
    monkeypatch.setattr(pipeline, "encode_prompt", lambda p: prompts.append(p) or encode_prompt(p))
    monkeypatch.setattr(pipeline, "encode_video", lambda v: videos.append(v) or encode_video(v))
    source = SampleSource(settings, clips, pipeline, None)
    for index in range(6):
        source.example(index)
    assert sorted(prompts) == sorted({settings.prompt, "a woman turns", ""})
    assert sum(video.std() == 0 for video in videos) == 2  # blank video and dropped pose
    assert len(videos) == 2 + 2 * 6  # reference and target
    monkeypatch.setattr(training_samples, "_MAX_PROMPTS", 1)
    for index in range(6):
        source.example(index)
    assert len(source._prompts) == 3  # no more are added once the memory is full


def test_noise_is_of_seed_and_index() -> None:
    shape = (1, 6, 7, 6, 8)
    noise = training_noise(3, 5, shape)
    assert torch.equal(noise, training_noise(3, 5, shape))
    for seed, index in ((3, 6), (4, 5), (5, 3)):
        assert (noise - training_noise(seed, index, shape)).abs().mean() > 0.5
    assert noise.mean() == pytest.approx(0, abs=0.1)
    assert noise.std() == pytest.approx(1, abs=0.1)
    torch.testing.assert_close(
        training_noise(3, 5, (1, 2)), torch.tensor([[1.1739, 2.0653]]), rtol=0, atol=1e-4
    )


def test_neither_cache_nor_pipeline(clips: list[FakeClip]) -> None:
    with pytest.raises(ValueError, match="from a cache or from a pipeline"):
        SampleSource(train_settings(), clips, None, None)


# --- cache ---

ARMS: dict[str, dict[str, Any]] = {
    "stage 1": {"stage": 1},
    "stage 2": {},
    "recycling": {"error_recycling": 0.5},
    "sink": {"memory": "sink"},
    "pixel 1": {"memory": "pixel"},
    "pixel 5": {"memory": "pixel", "carry_frames": 5, "stage": 1},
    "two slots": {"identity_slots": 2},
}


def test_a_full_cache_gives_the_same_examples_without_networks_or_frames(
    clips: list[FakeClip], pipeline: AnimatePipeline, tmp_path: Path
) -> None:
    """All arms of an experiment in one cache."""
    sizes = []
    for changes in ARMS.values():
        settings = train_settings(latent_cache=tmp_path, cache_samples=3, **changes)
        fill(settings, clips, pipeline)
        sizes.append(len(list(tmp_path.glob("samples/*"))))
        unread = [replace(clip, reads=[]) for clip in clips]
        cached = SampleSource(settings, unread, None, cache_of(settings, clips))
        cached = pickle.loads(pickle.dumps(cached))  # for the workers of a data loader
        fresh = SampleSource(settings, clips, pipeline, None)
        for index in range(3):
            assert equal(cached.example(index), fresh.example(index))
        assert not any(clip.reads for clip in unread)
        assert not len(missing_work(cache_of(settings, clips), settings, clips))
    # Each arm but the sink adds something to every sample.
    assert sizes == [3, 6, 9, 9, 12, 15, 18]


def test_samples_come_again_with_other_draws_of_the_step(
    clips: list[FakeClip], pipeline: AnimatePipeline, tmp_path: Path
) -> None:
    settings = train_settings(
        latent_cache=tmp_path, cache_samples=2, stage=1, first_chunk_probability=0.0, pose_drop=0.0
    )
    source = SampleSource(settings, clips, None, fill(settings, clips, pipeline))
    once, again, other = (source.example(index) for index in (1, 3, 2))
    assert torch.equal(once.clean_latents, again.clean_latents)
    assert torch.equal(once.face_tokens, again.face_tokens)
    assert once.step_index != again.step_index
    assert not torch.equal(once.noise, again.noise)
    assert not torch.equal(other.clean_latents, again.clean_latents)


def test_number_of_samples(clips: list[FakeClip], tmp_path: Path) -> None:
    assert cache_of(train_settings(latent_cache=tmp_path), clips).num_samples == 12
    settings = train_settings(latent_cache=tmp_path, cache_samples=5)
    assert cache_of(settings, clips).num_samples == 5
    work = missing_work(cache_of(settings, clips), settings, clips)
    assert (work.samples, len(work.prompts), work.constants) == ([*range(5)], 3, [DROPPED_POSE])
    assert len(work) == 9


def test_filling_goes_on_where_it_stopped(
    clips: list[FakeClip], pipeline: AnimatePipeline, tmp_path: Path
) -> None:
    settings = train_settings(latent_cache=tmp_path, cache_samples=3)
    cache = cache_of(settings, clips)
    work = missing_work(cache, settings, clips)
    filling = fill_cache(cache, work, settings, clips, pipeline)
    assert [next(filling) for _ in range(5)] == [1, 2, 3, 4, 5]  # three prompts, pose, sample 0
    filling.close()
    left = missing_work(cache_of(settings, clips), settings, clips)
    assert (left.prompts, left.constants, left.samples) == ([], [], [1, 2])
    with pytest.raises(RunError, match=r"of sample 1\. Start again"):
        [SampleSource(settings, clips, None, cache_of(settings, clips)).example(i) for i in (0, 1)]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    fill(settings, clips, pipeline)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert not len(missing_work(cache_of(settings, clips), settings, clips))


def test_more_samples_later_leave_the_first_as_they_are(
    clips: list[FakeClip], pipeline: AnimatePipeline, tmp_path: Path
) -> None:
    few, more = (train_settings(latent_cache=tmp_path, cache_samples=n, stage=1) for n in (1, 3))
    fill(few, clips, pipeline)
    work = missing_work(cache_of(more, clips), more, clips)
    assert (work.samples, len(work)) == ([1, 2], 2)


def test_two_processes_fill_one_cache(
    clips: list[FakeClip], pipeline: AnimatePipeline, tmp_path: Path
) -> None:
    """Each its share; then two that do not know of each other, at the same time."""
    shared = train_settings(latent_cache=tmp_path / "shared", cache_samples=4)
    works = [
        missing_work(cache_of(shared, clips), shared, clips, rank=rank, world_size=2)
        for rank in (0, 1)
    ]
    assert [work.samples for work in works] == [[0, 2], [1, 3]]
    assert sorted(works[0].prompts + works[1].prompts) == sorted(
        {shared.prompt, "a woman turns", ""}
    )
    twice = train_settings(latent_cache=tmp_path / "twice", cache_samples=4)
    pipelines = [pipeline, build_tiny_pipeline()]  # a VAE has state while it encodes
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda rank: fill(shared, clips, pipelines[rank], rank, 2), (0, 1)))
        list(pool.map(lambda rank: fill(twice, clips, pipelines[rank]), (0, 1)))
    fresh = SampleSource(shared, clips, pipeline, None)
    for settings in (shared, twice):
        assert not len(missing_work(cache_of(settings, clips), settings, clips))
        cached = SampleSource(settings, clips, None, cache_of(settings, clips))
        assert all(equal(cached.example(i), fresh.example(i)) for i in range(4))
        assert not list(tmp_path.rglob("*.part"))


def test_what_another_process_has_finished_is_not_encoded_again(
    clips: list[FakeClip], pipeline: AnimatePipeline, tmp_path: Path
) -> None:
    settings = train_settings(latent_cache=tmp_path, cache_samples=2, stage=1)
    slow = cache_of(settings, clips)
    work = missing_work(slow, settings, clips)
    fill(settings, clips, pipeline)
    unread = [replace(clip, reads=[]) for clip in clips]
    assert list(fill_cache(slow, work, settings, unread, pipeline))[-1] == len(work)
    assert not any(clip.reads for clip in unread)


def test_a_damaged_sample_is_made_anew_once_deleted(
    clips: list[FakeClip], pipeline: AnimatePipeline, tmp_path: Path
) -> None:
    settings = train_settings(latent_cache=tmp_path, cache_samples=2, stage=1)
    fill(settings, clips, pipeline)
    (path,) = tmp_path.glob("samples/00000001.*")
    path.write_bytes(path.read_bytes()[:200])
    source = SampleSource(settings, clips, None, cache_of(settings, clips))
    source.example(0)
    with pytest.raises(RunError, match=r"is damaged .* Delete this file and start again") as caught:
        source.example(1)
    assert str(path) in str(caught.value)
    path.unlink()
    fill(settings, clips, pipeline)
    source.example(1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 4}, "--seed was 3, is 4"),
        ({"size": "96x64"}, "--size was 32x16, is 96x64"),
        ({"fit": "cover"}, "--fit was contain, is cover"),
        ({"fps": 25.0}, "--fps was 12.5, is 25.0"),
        ({"frames_per_chunk": 5}, "--frames-per-chunk was 9, is 5"),
    ],
)
def test_a_cache_of_other_settings_is_refused(
    clips: list[FakeClip], tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    settings = train_settings(latent_cache=tmp_path, cache_samples=1)
    cache_of(settings, clips).claim()
    other = train_settings(latent_cache=tmp_path, cache_samples=1, **changes)
    with pytest.raises(SettingsError) as caught:
        cache_of(other, clips)
    assert str(caught.value) == (
        f"--latent-cache {tmp_path} was filled for another training: {named}. Give another "
        "--latent-cache, or delete the folder."
    )


def test_a_cache_of_another_model_or_dataset_is_refused(
    clips: list[FakeClip], tmp_path: Path
) -> None:
    settings = train_settings(latent_cache=tmp_path)
    cache_of(settings, clips).claim()
    with pytest.raises(SettingsError) as caught:
        open_cache(settings, clips[:2], model_hash="bb", dtype=torch.bfloat16)
    assert (
        "--model has another content; DATASET clips was 3, is 2; DATASET has another content; "
        "--dtype was float32, is bfloat16." in str(caught.value)
    )
    changed = [clips[0], replace(clips[1], fingerprint="other"), clips[2]]
    with pytest.raises(SettingsError, match=r"another training: DATASET has another content\. "):
        cache_of(settings, changed)
    with pytest.raises(SettingsError, match=r"another training: DATASET has another content\. "):
        cache_of(settings, [clips[1], clips[0], clips[2]])


def test_another_prompt_needs_no_other_cache(
    clips: list[FakeClip], pipeline: AnimatePipeline, tmp_path: Path
) -> None:
    settings = train_settings(latent_cache=tmp_path, cache_samples=2, stage=1)
    fill(settings, clips, pipeline)
    other = replace(settings, prompt="somebody dances")
    work = missing_work(cache_of(other, clips), other, clips)
    assert (work.prompts, work.samples) == (["somebody dances"], [])


def test_clips_are_read_in_one_piece(clips: list[FakeClip], pipeline: AnimatePipeline) -> None:
    read = [replace(clip, reads=[]) for clip in clips]
    source = SampleSource(train_settings(), read, pipeline, None)
    for index in range(3):
        source.example(index)
    assert [len(clip.reads) for clip in read] == [1, 1, 1]
    assert {count for clip in read for _, count in clip.reads} == {22}
    assert np.ptp([clip.num_frames for clip in read]) == 4
