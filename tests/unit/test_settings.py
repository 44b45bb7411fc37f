"""Settings: defaults, refusals word for word, JSON, and what a model fills in."""

import json
from pathlib import Path
from typing import Any

import pytest

from everanimate_cli.errors import InputError, SettingsError, WeightsError
from everanimate_cli.records import LoraSpec, read_saved_options
from everanimate_cli.settings import (
    HUB_PRESET,
    AnimateSettings,
    DemoSettings,
    ExtractSettings,
    ModelDefaults,
    combine,
    read_model_defaults,
    resolve,
)

INPUTS: dict[str, Any] = {"ref": Path("anna.png"), "driving": Path("dance")}
TOY_DEFAULTS: dict[str, Any] = {
    "fps": 12.5,
    "width": 96,
    "height": 64,
    "num_inference_steps": 12,
    "shift": 5.0,
    "frames_per_chunk": 21,
    "overlap": 4,
    "identity_slots": 4,
    "face_size": 32,
    "prompt": "a person dances",
}
NO_DRIVING = "Give a video or a folder made by extract-pose, or --pose and --face."


def animate(**options: Any) -> AnimateSettings:
    return AnimateSettings(**{**INPUTS, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"driving": None}, f"DRIVING is missing. {NO_DRIVING}"),
        (
            {"driving": None, "pose": Path("p.mp4")},
            "--pose p.mp4 needs --face beside it.",
        ),
        (
            {"driving": None, "face": Path("f.mp4")},
            "--face f.mp4 needs --pose beside it.",
        ),
        (
            {"pose": Path("p.mp4"), "face": Path("f.mp4")},
            f"DRIVING dance and --pose p.mp4 exclude each other. {NO_DRIVING}",
        ),
        (
            {"minutes": 2.0, "frames": 10},
            "--minutes 2.0 and --frames 10 exclude each other. Give one of them.",
        ),
        ({"seconds": 0.0}, "--seconds 0.0 is too small. Give a number above 0."),
        ({"frames": 0}, "--frames 0 is too small. Give 1 or more."),
        ({"start": -1.0}, "--start -1.0 is too small. Give 0 or more."),
        ({"start": 3.0, "end": 3.0}, "--end 3.0 is not after --start 3.0."),
        ({"fps": float("nan")}, "--fps nan is not a finite number."),
        ({"fps": float("inf")}, "--fps inf is not a finite number."),
        ({"steps": 0}, "--steps 0 is too small. Give 1 or more."),
        ({"shift": 0.0}, "--shift 0.0 is too small. Give a number above 0."),
        ({"seed": -1}, "--seed -1 is too small. Give 0 or more."),
        ({"guidance_scale": 0.5}, "--guidance-scale 0.5 is too small. Give 1 or more."),
        (
            {"negative_prompt": "blurry"},
            "--negative-prompt 'blurry' has no effect at --guidance-scale 1. "
            "Give a larger scale, such as 3.",
        ),
        ({"frames_per_chunk": 20}, "--frames-per-chunk 20 is not 4n+1. Give 17 or 21."),
        ({"frames_per_chunk": 1}, "--frames-per-chunk 1 is too small. Give 5 or more."),
        ({"overlap": 6}, "--overlap 6 is not a multiple of 4. Give 4 or 8."),
        ({"overlap": 2}, "--overlap 2 is not a multiple of 4. Give 4."),
        (
            {"frames_per_chunk": 5, "overlap": 8},
            "--overlap 8 is not below --frames-per-chunk 5.",
        ),
        (
            {"identity_slots": 2, "view": (Path("a.png"), Path("b.png"))},
            "--view is given 2 times, but --identity-slots 2 has room for 1: "
            "the last slot holds the reference.",
        ),
        ({"memory": "pixels"}, "--memory pixels is unknown. Known: latent, pixel, sink."),
        ({"clip_image": "last"}, "--clip-image last is unknown. Known: previous, reference."),
        (
            {"carry_frames": 5},
            "--carry-frames 5 works with --memory pixel only, not with latent.",
        ),
        (
            {"memory": "pixel", "carry_frames": 3},
            "--carry-frames 3 is unknown. Known: 1, 5.",
        ),
        (
            {"memory": "pixel", "overlap": 4},
            "--overlap 4 does not fit --memory pixel, where --carry-frames is the overlap.",
        ),
        (
            {"memory": "pixel", "identity_slots": 4},
            "--identity-slots 4 does not fit --memory pixel, which has one slot.",
        ),
        (
            {"memory": "pixel", "clip_image": "previous"},
            "--clip-image previous does not fit --memory pixel, which shows CLIP the reference.",
        ),
        (
            {"memory": "pixel", "view": (Path("back.png"),)},
            "--view back.png does not fit --memory pixel, whose one slot holds the reference.",
        ),
        (
            {"size": "832"},
            "--size 832 is not a size. Write WIDTHxHEIGHT (832x480) or auto.",
        ),
        (
            {"size": "16400x64"},
            "--size 16400x64 is too large. Sides have 16384 pixels at most.",
        ),
        (
            {"output": Path("anna.avi")},
            "--output anna.avi does not end in .mp4. Give a name that does.",
        ),
        ({"crf": 52}, "--crf 52 is too large. Give 51 or less."),
        ({"crf": -1}, "--crf -1 is too small. Give 0 or more."),
        ({"codec": "av1"}, "--codec av1 is unknown. Known: h264, h265."),
    ],
)
def test_refusals_name_option_and_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        animate(**options)
    assert str(caught.value) == message


def test_demo_refuses_a_length_of_zero() -> None:
    with pytest.raises(SettingsError, match=r"^--seconds 0\.0 is too small\."):
        DemoSettings(seconds=0.0)


def test_the_default_model_is_the_released_base_at_its_released_settings() -> None:
    resolved = resolve(animate(), HUB_PRESET)
    assert resolved.model == "Wan-AI/Wan2.2-Animate-14B-Diffusers"
    assert [str(lora) for lora in resolved.lora] == [
        "epfl-vita/everanimate/ckpts/everanimate-v1-lora32/stage2_480p.safetensors"
    ]
    assert resolved.height_width == (480, 832)
    assert (resolved.fps, resolved.steps, resolved.shift) == (25.0, 20, 5.0)
    assert (resolved.frames_per_chunk, resolved.overlap, resolved.identity_slots) == (77, 4, 4)
    assert resolved.prompt == "视频中的人在做动作"
    assert (resolved.guidance_scale, resolved.seed) == (1.0, 0)
    assert (resolved.memory, resolved.clip_image, resolved.carry_frames) == (
        "latent",
        "previous",
        None,
    )


def test_given_options_beat_the_model() -> None:
    settings = animate(
        fps=30.0, steps=4, shift=3.0, size="auto", prompt="", lora=(), identity_slots=2
    )
    resolved = resolve(settings, HUB_PRESET)
    assert (resolved.fps, resolved.steps, resolved.shift) == (30.0, 4, 3.0)
    assert (resolved.height_width, resolved.prompt, resolved.lora) == (None, "", ())
    assert (resolved.identity_slots, resolved.frames_per_chunk) == (2, 77)


@pytest.mark.parametrize("carry_frames", [None, 1, 5])
def test_pixel_memory_has_one_slot_and_overlaps_by_what_it_carries(
    carry_frames: int | None,
) -> None:
    resolved = resolve(animate(memory="pixel", carry_frames=carry_frames), HUB_PRESET)
    assert (resolved.carry_frames, resolved.overlap) == (carry_frames or 1, carry_frames or 1)
    assert (resolved.identity_slots, resolved.clip_image) == (1, "reference")


def test_the_models_negative_prompt_comes_with_guidance_only() -> None:
    defaults = ModelDefaults(**TOY_DEFAULTS, negative_prompt="blurry")
    assert resolve(animate(), defaults).negative_prompt == ""
    assert resolve(animate(guidance_scale=3.0), defaults).negative_prompt == "blurry"


def test_too_many_views_for_the_models_slots_are_refused() -> None:
    settings = animate(view=tuple(Path(f"{i}.png") for i in range(4)))
    with pytest.raises(SettingsError, match="--view is given 4 times, but --identity-slots 4 has"):
        resolve(settings, HUB_PRESET)


@pytest.mark.parametrize(
    ("length", "frames"),
    [
        ({}, None),
        ({"minutes": 0.5}, 375),
        ({"seconds": 10.0}, 125),
        ({"seconds": 0.001}, 1),
        ({"frames": 7}, 7),
    ],
)
def test_requested_frames_at_12_5_fps(length: dict[str, Any], frames: int | None) -> None:
    resolved = resolve(animate(**length), ModelDefaults(**TOY_DEFAULTS))
    assert resolved.requested_frames == frames


@pytest.mark.parametrize(
    ("inputs", "name"),
    [
        ({}, "dance_anna.mp4"),
        (
            {"ref": Path("pictures/eve.v2.jpg"), "driving": Path("in/waltz.1/")},
            "waltz_eve.v2.mp4",
        ),
        ({"driving": Path("in/waltz.mp4")}, "waltz_anna.mp4"),
        ({"driving": None, "pose": Path("in/p.mp4"), "face": Path("f.mp4")}, "p_anna.mp4"),
    ],
)
def test_default_output_is_named_after_the_inputs(inputs: dict[str, Any], name: str) -> None:
    assert animate(**inputs).default_output == Path(name)
    assert resolve(animate(**inputs), HUB_PRESET).output == Path(name)


def test_default_output_has_the_name_of_a_link_not_of_what_it_leads_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("3fa8").touch()
    Path("waltz.mp4").symlink_to("3fa8")
    assert animate(driving=Path("waltz.mp4")).default_output == Path("waltz_anna.mp4")
    assert ExtractSettings(video=Path("waltz.mp4")).default_output == Path("waltz_pose")


def test_default_output_of_the_current_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tango"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert animate(driving=Path()).default_output == Path("tango_anna.mp4")
    # The folder of the poses of a video gives the same name as the video.
    for name in ("waltz_pose", "waltz.1"):
        Path(name).mkdir()
    assert animate(driving=Path("waltz_pose")).default_output == Path("waltz_anna.mp4")
    assert animate(driving=Path("waltz.1")).default_output == Path("waltz.1_anna.mp4")


def test_json_holds_what_shapes_the_result_and_nothing_about_this_run() -> None:
    saved = animate(
        lora=(LoraSpec("a.safetensors", 0.5),), overwrite=True, dry_run=True, keep_run=True
    ).to_json()
    assert saved["ref"] == "anna.png"
    assert saved["lora"] == ["a.safetensors=0.5"]
    assert saved["steps"] is None
    assert not {"overwrite", "dry_run", "keep_run", "resume"} & set(saved)
    assert AnimateSettings.from_json(json.loads(json.dumps(saved))) == animate(
        lora=(LoraSpec("a.safetensors", 0.5),)
    )


def test_json_accepts_times_as_written_on_the_command_line_and_no_lora_as_none() -> None:
    settings = AnimateSettings.from_json(
        {"ref": "a.png", "driving": "d", "start": "1:02.5", "end": 70, "lora": ["none"]}
    )
    assert (settings.start, settings.end, settings.lora) == (62.5, 70.0, ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": "20"}, "--steps 20 is not a whole number."),
        ({"steps": 20.0}, "--steps 20.0 is not a whole number."),
        ({"seed": True}, "--seed true is not a whole number."),
        ({"seed": None}, "--seed null is not a whole number."),
        ({"fps": "25"}, "--fps 25 is not a number."),
        ({"audio": 1}, "--audio 1 is not true or false."),
        ({"prompt": 3}, "--prompt 3 is not text."),
        ({"memory": 3}, "--memory 3 is not text."),
        ({"ref": 3}, "REF 3 is not a path."),
        ({"view": "back.png"}, "--view back.png is not a list."),
        ({"lora": ["=0.5"]}, "--lora =0.5 is not a LoRA. Write FILE or FILE=SCALE."),
        (
            {"start": "1:75"},
            "--start 1:75 is not a time. Write seconds (12.5) or minutes:seconds (1:02.5).",
        ),
    ],
)
def test_json_of_the_wrong_type_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        AnimateSettings.from_json({"ref": "a.png", "driving": "d", **change})
    assert str(caught.value) == message


def test_json_without_a_reference_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"^REF is missing\.$"):
        AnimateSettings.from_json({"driving": "d"})


def test_unknown_json_keys_are_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingsError) as caught:
        DemoSettings.from_json({"second": 3, "seed": 1})
    assert str(caught.value) == ("'second' is unknown. Known: directory, overwrite, seconds, seed.")


def test_saved_options_stand_alone_or_beside_a_result(tmp_path: Path) -> None:
    plain, beside = tmp_path / "plain.json", tmp_path / "beside.json"
    plain.write_text('{"steps": 4}')
    beside.write_text('{"settings": {"steps": 4}, "versions": {"torch": "2"}}')
    assert (
        read_saved_options(plain, AnimateSettings)
        == read_saved_options(beside, AnimateSettings)
        == {"steps": 4}
    )


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, InputError, "--config {path} cannot be read: No such file or directory."),
        ("[1]", InputError, "--config {path} cannot be read: it holds no JSON object."),
        (
            '{"settings": 3}',
            InputError,
            "--config {path} cannot be read: its settings are not a JSON object.",
        ),
        (
            "{",
            InputError,
            "--config {path} cannot be read: Expecting property name enclosed in double quotes: "
            "line 1 column 2 (char 1).",
        ),
    ],
)
def test_unreadable_config_files(
    tmp_path: Path, content: str | None, error: type[Exception], message: str
) -> None:
    path = tmp_path / "saved.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(error) as caught:
        read_saved_options(path, AnimateSettings)
    assert str(caught.value) == message.format(path=path)


@pytest.mark.parametrize("key", ["stepz", "overwrite"])
def test_config_files_may_not_name_unknown_options_or_overwrite_anything(
    tmp_path: Path, key: str
) -> None:
    path = tmp_path / "saved.json"
    path.write_text(json.dumps({key: True}))
    with pytest.raises(SettingsError) as caught:
        read_saved_options(path, AnimateSettings)
    known = ", ".join(sorted(AnimateSettings.saved_names()))
    assert str(caught.value) == f"--config {path}: '{key}' is unknown. Known: {known}."


def test_the_command_line_wins_over_the_file_and_drops_what_it_excludes() -> None:
    saved = {"ref": "a.png", "pose": "p.mp4", "face": "f.mp4", "seconds": 4.0, "steps": 20}
    combined = combine(saved, {"driving": Path("d"), "minutes": 1.0, "steps": 4})
    assert combined == {"ref": "a.png", "driving": Path("d"), "minutes": 1.0, "steps": 4}


def test_pose_alone_on_the_command_line_keeps_the_face_of_the_file() -> None:
    saved = {"pose": "p.mp4", "face": "f.mp4"}
    assert combine(saved, {"pose": "q.mp4"}) == {"pose": "q.mp4", "face": "f.mp4"}


def test_model_defaults_are_read_from_the_folder(tmp_path: Path) -> None:
    (tmp_path / "everanimate.json").write_text(json.dumps(TOY_DEFAULTS))
    assert read_model_defaults(tmp_path) == ModelDefaults(**TOY_DEFAULTS)


def test_a_plain_copy_of_the_base_has_the_released_settings(tmp_path: Path) -> None:
    assert read_model_defaults(tmp_path) == HUB_PRESET


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[]", "cannot be read: it holds no JSON object."),
        (json.dumps({**TOY_DEFAULTS, "fps": "12"}), "cannot be used: fps 12 is not a number."),
        (
            json.dumps({**TOY_DEFAULTS, "frames_per_chunk": 20}),
            "cannot be used: frames_per_chunk 20 is not 4n+1. Give 17 or 21.",
        ),
        (
            json.dumps({**TOY_DEFAULTS, "overlap": 5}),
            "cannot be used: overlap 5 is not a multiple of 4. Give 4 or 8.",
        ),
        (json.dumps({"fps": 25}), "cannot be used: width is missing."),
        (json.dumps({**TOY_DEFAULTS, "height": 0}), "cannot be used: height 0 is too small. "),
        (
            json.dumps({**TOY_DEFAULTS, "frame_rate": 3}),
            "cannot be used: 'frame_rate' is unknown. ",
        ),
    ],
)
def test_bad_model_defaults_name_the_file(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "everanimate.json"
    path.write_text(content)
    with pytest.raises(WeightsError) as caught:
        read_model_defaults(tmp_path)
    assert str(caught.value).startswith(f"{path} {problem}")
