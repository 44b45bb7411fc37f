"""Settings of `train-lora`: refusals word for word, presets of stages, what a model fills in."""

import json
from pathlib import Path
from typing import Any

import pytest

from everanimate_cli.errors import SettingsError
from everanimate_cli.settings import HUB_PRESET, ModelDefaults
from everanimate_cli.train_settings import (
    STAGES,
    ResolvedTrainSettings,
    TrainSettings,
    resolve_training,
)

TOY_DEFAULTS = ModelDefaults(
    fps=12.5,
    width=96,
    height=64,
    num_inference_steps=12,
    shift=3.0,
    frames_per_chunk=21,
    overlap=4,
    identity_slots=3,
    face_size=32,
    prompt="a person dances",
    pose_model="toy",
)
PROBABILITIES = [
    "degradation_probability",
    "memory_augmentation",
    "error_recycling",
    "first_chunk_probability",
    "reference_anchor_probability",
    "pose_drop",
    "degradation_min_sigma",
]


def train(**options: Any) -> TrainSettings:
    return TrainSettings(**{"dataset": Path("videos"), **options})


def resolved(**options: Any) -> ResolvedTrainSettings:
    return resolve_training(train(**options), HUB_PRESET)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": 0}, "--stage 0 is unknown. Known: 1, 2, 3."),
        ({"stage": 4}, "--stage 4 is unknown. Known: 1, 2, 3."),
        ({"steps": 0}, "--steps 0 is too small. Give 1 or more."),
        ({"batch_size": 0}, "--batch-size 0 is too small. Give 1 or more."),
        ({"accumulate": 0}, "--accumulate 0 is too small. Give 1 or more."),
        ({"lr": 0.0}, "--lr 0.0 is too small. Give a number above 0."),
        ({"lr": float("nan")}, "--lr nan is not a finite number."),
        ({"warmup": -1}, "--warmup -1 is too small. Give 0 or more."),
        ({"weight_decay": -0.1}, "--weight-decay -0.1 is too small. Give 0 or more."),
        ({"max_grad_norm": 0.0}, "--max-grad-norm 0.0 is too small. Give a number above 0."),
        ({"rank": 0}, "--rank 0 is too small. Give 1 or more."),
        ({"lora_alpha": 0.0}, "--lora-alpha 0.0 is too small. Give a number above 0."),
        ({"memory": "pixels"}, "--memory pixels is unknown. Known: latent, pixel, sink."),
        (
            {"carry_frames": 1},
            "--carry-frames 1 works with --memory pixel only, not with latent.",
        ),
        (
            {"memory": "sink", "carry_frames": 5},
            "--carry-frames 5 works with --memory pixel only, not with sink.",
        ),
        ({"carry_frames": -1}, "--carry-frames -1 is too small. Give 0 or more."),
        (
            {"memory": "pixel", "carry_frames": 3},
            "--carry-frames 3 is unknown. Known: 1, 5.",
        ),
        (
            {"memory": "pixel", "carry_frames": 0},
            "--carry-frames 0 is unknown. Known: 1, 5.",
        ),
        (
            {"memory": "pixel", "carry_frames": 5, "frames_per_chunk": 5},
            "--carry-frames 5 is not below --frames-per-chunk 5.",
        ),
        (
            {"memory": "pixel", "identity_slots": 4},
            "--identity-slots 4 does not fit --memory pixel, which has one slot.",
        ),
        (
            {"memory": "pixel", "memory_augmentation": 0.5},
            "--memory-augmentation 0.5 works with --memory latent only, not with pixel. "
            "Leave it out.",
        ),
        (
            {"memory": "sink", "error_recycling": 0.95},
            "--error-recycling 0.95 works with --memory latent only, not with sink. Leave it out.",
        ),
        (
            {"memory": "sink", "reference_anchor_probability": 0.1},
            "--reference-anchor-probability 0.1 works with --memory latent only, not with sink. "
            "Leave it out.",
        ),
        (
            {"memory": "sink", "first_chunk_probability": 0.5},
            "--first-chunk-probability 0.5 has no effect with --memory sink, "
            "where every chunk is like the first. Leave it out.",
        ),
        (
            {"correction": "bell"},
            "--correction bell is unknown. Known: gaussian, exact, constant.",
        ),
        ({"size": "832"}, "--size 832 is not a size. Write WIDTHxHEIGHT, such as 832x480."),
        ({"size": "auto"}, "--size auto is not a size. Write WIDTHxHEIGHT, such as 832x480."),
        ({"fit": "fill"}, "--fit fill is unknown. Known: contain, cover, stretch."),
        ({"fps": 0.0}, "--fps 0.0 is too small. Give a number above 0."),
        ({"frames_per_chunk": 20}, "--frames-per-chunk 20 is not 4n+1. Give 17 or 21."),
        ({"frames_per_chunk": 1}, "--frames-per-chunk 1 is too small. Give 5 or more."),
        ({"identity_slots": 0}, "--identity-slots 0 is too small. Give 1 or more."),
        ({"shift": 0.0}, "--shift 0.0 is too small. Give a number above 0."),
        (
            {"cache_samples": 8},
            "--cache-samples 8 has no effect without --latent-cache. Give a folder for it.",
        ),
        (
            {"latent_cache": Path("cache"), "cache_samples": 0},
            "--cache-samples 0 is too small. Give 1 or more.",
        ),
        ({"seed": -1}, "--seed -1 is too small. Give 0 or more."),
        ({"checkpoint_every": 0}, "--checkpoint-every 0 is too small. Give 1 or more."),
        ({"keep_checkpoints": 0}, "--keep-checkpoints 0 is too small. Give 1 or more."),
        ({"validate_every": -1}, "--validate-every -1 is too small. Give 0 or more."),
        (
            {"validation": Path("anna.mp4")},
            "--validation anna.mp4 has no effect without --validate-every. "
            "Give a number of steps for it.",
        ),
        (
            {"validation_chunks": 5},
            "--validation-chunks 5 has no effect without --validate-every. "
            "Give a number of steps for it.",
        ),
        (
            {"validation_steps": 8},
            "--validation-steps 8 has no effect without --validate-every. "
            "Give a number of steps for it.",
        ),
        (
            {"validate_every": 10, "validation_chunks": 0},
            "--validation-chunks 0 is too small. Give 1 or more.",
        ),
        (
            {"validate_every": 10, "validation_steps": 0},
            "--validation-steps 0 is too small. Give 1 or more.",
        ),
        ({"ema": -0.1}, "--ema -0.1 is too small. Give 0 or more."),
        ({"ema": 1.0}, "--ema 1.0 is too large. Give a number below 1."),
        (
            {"gradient_checkpointing": "yes"},
            "--gradient-checkpointing yes is unknown. Known: off, on, offload.",
        ),
        (
            {"quantize_base": "int4"},
            "--quantize-base int4 is unknown. Known: none, fp8, int8, nf4.",
        ),
        ({"mixed_precision": "fp8"}, "--mixed-precision fp8 is unknown. Known: no, bf16."),
        (
            {"dtype": "float16"},
            "--dtype float16 is too small a range for gradients. Give bfloat16 or float32.",
        ),
        ({"export": "kohya"}, "--export kohya is unknown. Known: diffusers, original."),
        ({"device": "tpu"}, "--device tpu is unknown. Known: auto, cuda, mps, cpu."),
        (
            {"dtype": "int8"},
            "--dtype int8 is unknown. Known: auto, float32, bfloat16, float16.",
        ),
    ],
)
def test_refusals_name_option_and_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        train(**options)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", PROBABILITIES)
def test_shares_lie_between_0_and_1(name: str) -> None:
    option = "--" + name.replace("_", "-")
    for value in (0.0, 1.0):
        assert getattr(train(**{name: value}), name) == value
    with pytest.raises(SettingsError) as caught:
        train(**{name: 1.1})
    assert str(caught.value) == f"{option} 1.1 is too large. Give 1 or less."
    with pytest.raises(SettingsError) as caught:
        train(**{name: -0.1})
    assert str(caught.value) == f"{option} -0.1 is too small. Give 0 or more."


def test_the_defaults_are_the_released_ones() -> None:
    """Method page section 3."""
    settings = train()
    assert (settings.rank, settings.lr, settings.weight_decay) == (32, 1e-4, 0.01)
    assert (settings.first_chunk_probability, settings.reference_anchor_probability) == (0.2, 0.05)
    assert (settings.pose_drop, settings.degradation_min_sigma) == (0.05, 0.5)
    assert (settings.correction, settings.memory) == ("gaussian", "latent")
    assert (settings.error_recycling, settings.gradient_checkpointing) == (0.0, "on")
    assert settings.model == "Wan-AI/Wan2.2-Animate-14B-Diffusers"


@pytest.mark.parametrize(
    ("stage", "degradation", "augmentation", "height_width"),
    [(1, 0.0, 0.0, (480, 832)), (2, 0.64, 0.5, (480, 832)), (3, 0.64, 0.5, (720, 1280))],
)
def test_presets_of_the_stages(
    stage: int, degradation: float, augmentation: float, height_width: tuple[int, int]
) -> None:
    settings = resolved(stage=stage)
    assert settings.degradation_probability == degradation
    assert settings.memory_augmentation == augmentation
    assert settings.height_width == height_width
    assert settings.steps == 3000
    assert settings.output == Path(f"videos_stage{stage}")


@pytest.mark.parametrize("stage", STAGES)
def test_each_value_of_a_preset_has_an_option_that_wins(stage: int) -> None:
    settings = resolved(
        stage=stage, steps=5, degradation_probability=0.1, memory_augmentation=0.2, size="64x48"
    )
    assert (settings.steps, settings.height_width) == (5, (48, 64))
    assert (settings.degradation_probability, settings.memory_augmentation) == (0.1, 0.2)
    off = resolved(stage=stage, degradation_probability=0.0, memory_augmentation=0.0)
    assert (off.degradation_probability, off.memory_augmentation) == (0.0, 0.0)


def test_the_model_fills_in_what_is_left_open() -> None:
    settings = resolve_training(train(rank=8), TOY_DEFAULTS)
    assert settings.height_width == (64, 96)
    assert (settings.fps, settings.shift, settings.frames_per_chunk) == (12.5, 3.0, 21)
    assert (settings.identity_slots, settings.carry_frames) == (3, 0)
    assert (settings.prompt, settings.pose_model) == ("a person dances", "toy")
    assert settings.lora_alpha == 8.0
    assert settings.pose_folder == Path("videos_poses")


def test_given_options_beat_the_model() -> None:
    options: dict[str, Any] = {
        "fps": 30.0,
        "shift": 2.0,
        "frames_per_chunk": 9,
        "identity_slots": 2,
        "prompt": "",
        "pose_model": "dwpose",
        "pose_folder": Path("poses"),
        "lora_alpha": 4.0,
        "output": Path("here"),
    }
    settings = resolve_training(train(**options), TOY_DEFAULTS)
    assert {name: getattr(settings, name) for name in options} == options


@pytest.mark.parametrize("carry_frames", [None, 1, 5])
def test_pixel_memory_has_one_slot_and_no_augmentation(carry_frames: int | None) -> None:
    settings = resolved(memory="pixel", carry_frames=carry_frames, stage=2)
    assert (settings.carry_frames, settings.identity_slots) == (carry_frames or 1, 1)
    assert (settings.degradation_probability, settings.memory_augmentation) == (0.64, 0.0)


def test_a_sink_has_the_models_slots_and_no_augmentation() -> None:
    settings = resolved(memory="sink", stage=2)
    assert (settings.identity_slots, settings.carry_frames) == (4, 0)
    assert (settings.degradation_probability, settings.memory_augmentation) == (0.64, 0.0)


def test_carried_frames_must_fit_the_models_chunks() -> None:
    small = ModelDefaults.from_json({**TOY_DEFAULTS.to_json(), "frames_per_chunk": 5})
    with pytest.raises(SettingsError, match="--carry-frames 5 is not below --frames-per-chunk 5"):
        resolve_training(train(memory="pixel", carry_frames=5), small)


def test_folders_are_named_after_the_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "films.v2").mkdir()
    monkeypatch.chdir(tmp_path)
    for dataset, output, poses in [
        ("films.v2", "films.v2_stage1", "films.v2_poses"),
        ("lists/films.csv", "films_stage1", "lists/films_poses"),
        (str(tmp_path / "films.v2"), "films.v2_stage1", str(tmp_path / "films.v2_poses")),
    ]:
        settings = train(dataset=Path(dataset))
        assert settings.default_output == Path(output)
        assert settings.default_pose_folder == Path(poses)
    monkeypatch.chdir("films.v2")
    settings = train(dataset=Path(), stage=2)
    assert settings.default_output == Path("films.v2_stage2")
    assert settings.default_pose_folder == tmp_path / "films.v2_poses"


def test_json_holds_what_shapes_the_result_and_nothing_about_this_run() -> None:
    saved = train(init="a.safetensors", overwrite=True, dry_run=True, resume=False).to_json()
    assert (saved["dataset"], saved["init"], saved["steps"]) == ("videos", "a.safetensors", None)
    assert not {"overwrite", "dry_run", "resume"} & set(saved)
    reread = TrainSettings.from_json(json.loads(json.dumps(saved)))
    assert reread == train(init="a.safetensors")


@pytest.mark.parametrize("memory", ["latent", "pixel", "sink"])
def test_effective_settings_run_again_as_they_were(memory: str) -> None:
    settings = resolved(memory=memory, stage=3)
    again = TrainSettings.from_json(json.loads(json.dumps(settings.to_json())))
    assert resolve_training(again, TOY_DEFAULTS) == settings


def test_json_without_a_dataset_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"^DATASET is missing\.$"):
        TrainSettings.from_json({"stage": 1})
