"""Records: how times, sizes, LoRAs and Hub ids are written, and what a record checks."""

import json
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import pytest

from everanimate_cli.errors import SettingsError
from everanimate_cli.records import (
    THIS_RUN,
    LoraSpec,
    Options,
    Record,
    option_name,
    parse_size,
    parse_time,
    split_hub_id,
)
from everanimate_cli.settings import HUB_MODEL


@dataclass(frozen=True, kw_only=True)
class Dance(Options):
    LEAST: ClassVar = {"turns": 1}
    MOST: ClassVar = {"turns": 9}
    ABOVE_ZERO: ClassVar = ("tempo",)

    turns: int
    tempo: float | None = None
    style: Literal["waltz", "tango"] = "waltz"
    again: bool = field(default=False, metadata=THIS_RUN)


@dataclass(frozen=True, kw_only=True)
class FastDance(Dance):
    tempo: float


@dataclass(frozen=True, kw_only=True)
class PlainDance(Record):
    MOST: ClassVar = {"turns": 9}

    turns: int


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"turns": 0}, "--turns 0 is too small. Give 1 or more."),
        ({"turns": 10}, "--turns 10 is too large. Give 9 or less."),
        ({"turns": 1, "tempo": 0.0}, "--tempo 0.0 is too small. Give a number above 0."),
        ({"turns": 1, "style": "polka"}, "--style polka is unknown. Known: waltz, tango."),
        ({"turns": 1.5}, "--turns 1.5 is not a whole number."),
        ({}, "--turns is missing."),
        ({"spins": 1}, "'spins' is unknown. Known: again, style, tempo, turns."),
    ],
)
def test_a_record_checks_its_values(options: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Dance.from_json(options)
    assert str(caught.value) == message


def test_limits_hold_for_records_that_say_more() -> None:
    with pytest.raises(SettingsError, match=r"^--tempo -1\.0 is too small\."):
        FastDance(turns=1, tempo=-1.0)


def test_a_record_that_is_no_options_names_its_keys() -> None:
    with pytest.raises(SettingsError, match=r"^turns 10 is too large\."):
        PlainDance(turns=10)


def test_json_leaves_out_what_is_about_one_run() -> None:
    assert json.dumps(Dance(turns=3, again=True).to_json()) == (
        '{"turns": 3, "tempo": null, "style": "waltz"}'
    )


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("12.5", 12.5), ("0", 0.0), ("75", 75.0), ("1:02.5", 62.5), ("1:00:03", 3603.0), ("0:5", 5.0)],
)
def test_times(text: str, seconds: float) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "1:75", "-1", "1:", ":5", "61:00:00:00", "1:60:00", "nan", "x"]
)
def test_texts_that_are_no_times(text: str) -> None:
    with pytest.raises(ValueError, match="is not a time"):
        parse_time(text)


def test_sizes_are_read_as_width_by_height() -> None:
    assert parse_size("832x480") == (480, 832)
    assert parse_size("auto") is None


@pytest.mark.parametrize("text", ["", "832", "0x480", "832x", "8e2x480", " 832x480", "832*480"])
def test_texts_that_are_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "source", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors=0.8", "a.safetensors", 0.8),
        ("rank=32.dir/a=b.safetensors", "rank=32.dir/a=b.safetensors", 1.0),
        ("C:/x@0.5/a:1.safetensors=-2", "C:/x@0.5/a:1.safetensors", -2.0),
        ("owner/name/ckpts/a.safetensors=1e-1", "owner/name/ckpts/a.safetensors", 0.1),
        ("a=nan", "a=nan", 1.0),
        ("a=1=1", "a=1", 1.0),
    ],
)
def test_lora_with_and_without_a_scale(text: str, source: str, scale: float) -> None:
    assert LoraSpec.parse(text) == LoraSpec(source, scale)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (HUB_MODEL, (HUB_MODEL, "", None)),
        ("owner/name@v1.0", ("owner/name", "", "v1.0")),
        ("owner/name/ckpts/a.safetensors", ("owner/name", "ckpts/a.safetensors", None)),
        ("owner/name/a b.safetensors@refs/pr/4", ("owner/name", "a b.safetensors", "refs/pr/4")),
        ("owner/name/", ("owner/name", "", None)),
        ("name", None),
        ("./owner/name", None),
        ("../name", None),
        ("~/models/name", None),
        ("/srv/models", None),
        ("owner/", None),
        ("owner/my name", None),
        ("owner/name@", None),
        ("owner@v1/name", None),
    ],
)
def test_hub_ids(text: str, parts: tuple[str, str, str | None] | None) -> None:
    assert split_hub_id(text) == parts


def test_option_names() -> None:
    assert option_name("frames_per_chunk") == "--frames-per-chunk"
    assert [option_name(name) for name in ("ref", "driving", "directory")] == [
        "REF",
        "DRIVING",
        "DIR",
    ]
