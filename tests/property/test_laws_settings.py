"""Laws of the settings over generated options."""

import json
import string
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from everanimate_cli.records import LoraSpec, parse_size, parse_time
from everanimate_cli.settings import (
    HUB_PRESET,
    AnimateSettings,
    DemoSettings,
    ModelDefaults,
    combine,
    resolve,
)
from everanimate_cli.train_settings import TrainSettings, resolve_training

names = st.text(string.ascii_letters + string.digits + "._-= äü人", min_size=1, max_size=12)
paths = names.map(Path)
positive = st.floats(min_value=1e-3, max_value=1e4)
# Any source, also one that ends like a scale.
loras = st.builds(
    LoraSpec,
    st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda text: text[0] != "="),
    st.floats(allow_nan=False, allow_infinity=False),
)
plans = st.tuples(st.integers(2, 30), st.integers(1, 4)).map(
    lambda pair: {"frames_per_chunk": 4 * (pair[0] + pair[1]) + 1, "overlap": 4 * pair[1]}
)


def optional(**strategies: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=strategies)


animate_settings = st.builds(
    lambda parts: AnimateSettings(**{key: part[key] for part in parts for key in part}),
    st.tuples(
        st.fixed_dictionaries({"ref": paths}),
        st.one_of(
            st.fixed_dictionaries({"driving": paths}),
            st.fixed_dictionaries({"pose": paths, "face": paths}),
        ),
        st.one_of(
            optional(minutes=positive),
            optional(seconds=positive),
            optional(frames=st.integers(1, 10**6)),
        ),
        optional(
            start=st.floats(0, 100),
            end=st.floats(101, 1000),
            output=names.map(lambda name: Path(f"{name}.mp4")),
            model=names,
            lora=st.lists(loras, max_size=3).map(tuple),
            size=st.one_of(st.just("auto"), st.just("832x480")),
            fit=st.sampled_from(["contain", "cover", "stretch"]),
            fps=positive,
            steps=st.integers(1, 100),
            shift=positive,
            seed=st.integers(0, 2**64),
            prompt=st.text(st.characters(codec="utf-8")),
            extend=st.sampled_from(["pingpong", "loop", "hold", "error"]),
            audio=st.booleans(),
            pose_beside=st.booleans(),
            codec=st.sampled_from(["h264", "h265"]),
            crf=st.integers(0, 51),
            png=paths,
            device=st.sampled_from(["auto", "cuda", "mps", "cpu"]),
            dtype=st.sampled_from(["auto", "float32", "bfloat16", "float16"]),
            resume=st.booleans(),
            overwrite=st.booleans(),
            keep_run=st.booleans(),
            dry_run=st.booleans(),
        ),
        st.one_of(
            st.just({}),
            st.fixed_dictionaries(
                {"guidance_scale": st.floats(1.01, 20), "negative_prompt": st.text("abc ")}
            ),
        ),
        st.one_of(
            st.fixed_dictionaries(
                {"memory": st.just("pixel")}, optional={"carry_frames": st.sampled_from([1, 5])}
            ),
            plans,
            st.fixed_dictionaries(
                {
                    "memory": st.sampled_from(["latent", "sink"]),
                    "clip_image": st.sampled_from(["previous", "reference"]),
                    "identity_slots": st.just(3),
                    "view": st.lists(paths, max_size=2).map(tuple),
                }
            ),
        ),
    ),
)
model_defaults = st.builds(
    lambda plan, **others: ModelDefaults(**plan, **others),
    plans,
    fps=positive,
    width=st.integers(1, 4000),
    height=st.integers(1, 4000),
    num_inference_steps=st.integers(1, 100),
    shift=positive,
    identity_slots=st.integers(3, 8),
    face_size=st.integers(1, 1024),
    prompt=st.text(st.characters(codec="utf-8")),
    negative_prompt=st.text(st.characters(codec="utf-8")),
    lora=st.lists(loras, max_size=2).map(tuple),
)
shares = st.floats(0, 1)
train_settings = st.builds(
    lambda parts: TrainSettings(**{key: part[key] for part in parts for key in part}),
    st.tuples(
        st.fixed_dictionaries({"dataset": paths}),
        optional(
            output=paths,
            stage=st.sampled_from([1, 2, 3]),
            init=names,
            steps=st.integers(1, 10**6),
            lr=positive,
            rank=st.integers(1, 256),
            lora_alpha=positive,
            correction=st.sampled_from(["gaussian", "exact", "constant"]),
            degradation_probability=shares,
            degradation_min_sigma=shares,
            pose_drop=shares,
            size=st.just("832x480"),
            fps=positive,
            frames_per_chunk=st.integers(2, 30).map(lambda number: 4 * number + 1),
            shift=positive,
            prompt=st.text(st.characters(codec="utf-8")),
            pose_folder=paths,
            seed=st.integers(0, 2**64),
            ema=st.floats(0, 0.999),
            compile=st.booleans(),
            resume=st.booleans(),
            overwrite=st.booleans(),
            dry_run=st.booleans(),
        ),
        st.one_of(
            st.fixed_dictionaries(
                {"memory": st.just("pixel")}, optional={"carry_frames": st.sampled_from([1, 5])}
            ),
            st.fixed_dictionaries(
                {"memory": st.just("sink")}, optional={"identity_slots": st.integers(1, 8)}
            ),
            optional(
                memory_augmentation=shares,
                error_recycling=shares,
                first_chunk_probability=shares,
                identity_slots=st.integers(1, 8),
            ),
        ),
    ),
)
relaxed = settings(deadline=None, max_examples=60)


@relaxed
@given(animate_settings)
def test_settings_survive_json_but_for_the_options_about_one_run(original: AnimateSettings) -> None:
    reread = AnimateSettings.from_json(json.loads(json.dumps(original.to_json())))
    defaults = {"resume": True, "overwrite": False, "keep_run": False, "dry_run": False}
    assert reread == replace(original, **defaults)


@relaxed
@given(st.builds(DemoSettings, directory=paths, seconds=positive, seed=st.integers(0)))
def test_demo_settings_survive_json(original: DemoSettings) -> None:
    assert DemoSettings.from_json(json.loads(json.dumps(original.to_json()))) == original


@relaxed
@given(model_defaults)
def test_model_defaults_survive_json(original: ModelDefaults) -> None:
    assert ModelDefaults.from_json(json.loads(json.dumps(original.to_json()))) == original


@relaxed
@given(animate_settings, model_defaults)
def test_resolving_keeps_what_was_given_and_leaves_nothing_to_another_model(
    asked: AnimateSettings, defaults: ModelDefaults
) -> None:
    resolved = resolve(asked, defaults)
    given_values = {key: value for key, value in vars(asked).items() if value is not None}
    assert {key: getattr(resolved, key) for key in given_values} == given_values
    assert resolve(resolved, HUB_PRESET) == resolved


@relaxed
@given(animate_settings)
def test_effective_settings_run_again_as_they_were(asked: AnimateSettings) -> None:
    resolved = resolve(asked, HUB_PRESET)
    again = AnimateSettings.from_json(json.loads(json.dumps(resolved.to_json())))
    assert resolve(again, HUB_PRESET).to_json() == resolved.to_json()


@relaxed
@given(animate_settings, animate_settings)
def test_any_complete_command_line_beats_any_file(
    saved: AnimateSettings, asked: AnimateSettings
) -> None:
    given_options = asked.to_json()
    assert combine(saved.to_json(), given_options) == given_options


@relaxed
@given(loras)
def test_a_lora_is_read_back_as_it_was_written(lora: LoraSpec) -> None:
    assert LoraSpec.parse(str(lora)) == lora


@given(st.integers(0, 99), st.integers(0, 59), st.integers(0, 59), st.integers(0, 999))
def test_times_add_up_in_every_notation(
    hours: int, minutes: int, seconds: int, thousandths: int
) -> None:
    tail = f"{seconds}.{thousandths:03}"
    expected = hours * 3600 + minutes * 60 + float(tail)
    assert parse_time(f"{hours}:{minutes:02}:{tail}") == expected
    assert parse_time(f"{minutes}:{tail}") == minutes * 60 + float(tail)
    assert parse_time(f"{hours * 3600 + minutes * 60 + seconds}.{thousandths:03}") == expected


@given(st.integers(1, 9999), st.integers(1, 9999))
def test_sizes_are_read_in_the_order_width_height(width: int, height: int) -> None:
    assert parse_size(f"{width}x{height}") == (height, width)


@relaxed
@given(train_settings)
def test_settings_of_a_training_survive_json_but_for_the_options_about_one_run(
    original: TrainSettings,
) -> None:
    reread = TrainSettings.from_json(json.loads(json.dumps(original.to_json())))
    assert reread == replace(original, resume=True, overwrite=False, dry_run=False)


@relaxed
@given(train_settings, model_defaults)
def test_resolving_a_training_keeps_what_was_given_and_leaves_nothing_to_another_model(
    asked: TrainSettings, defaults: ModelDefaults
) -> None:
    resolved = resolve_training(asked, defaults)
    given_values = {key: value for key, value in vars(asked).items() if value is not None}
    assert {key: getattr(resolved, key) for key in given_values} == given_values
    assert resolve_training(resolved, HUB_PRESET) == resolved
