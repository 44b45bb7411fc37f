"""Options of the analyses, and the checks before any heavy import, word for word."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from everanimate_cli.analyze_settings import AttentionSettings, RoundtripSettings, motion_slots
from everanimate_cli.errors import EverAnimateError, InputError, SettingsError, WeightsError
from everanimate_cli.preflight import check_analyze_attention, check_analyze_roundtrip
from everanimate_cli.records import LoraSpec
from everanimate_cli.settings import AnimateSettings, Memory


@pytest.fixture(autouse=True)
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a picture, a video and a driving folder, made the current one."""
    monkeypatch.chdir(tmp_path)
    Path("dance").mkdir()
    for name in ("anna.png", "film.mp4", "dance/pose.mp4", "dance/face.mp4", "dance/extract.json"):
        Path(name).write_bytes(b"content")


def roundtrip(**options: Any) -> RoundtripSettings:
    return RoundtripSettings(**{"video": Path("film.mp4"), "model": "toy", **options})


def attention(**options: Any) -> AttentionSettings:
    return AttentionSettings(
        **{"ref": Path("anna.png"), "driving": Path("dance"), "model": "toy", **options}
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trips": 0}, "--trips 0 is too small. Give 1 or more."),
        ({"quantise": "no"}, "--quantise no is unknown. Known: round, truncate, none."),
        ({"frames_per_chunk": 20}, "--frames-per-chunk 20 is not 4n+1. Give 17 or 21."),
        ({"start": 3.0, "end": 3.0}, "--end 3.0 is not after --start 3.0."),
        ({"end": 0.0}, "--end 0.0 is too small. Give a number above 0."),
        ({"size": "big"}, "--size big is not a size. Write WIDTHxHEIGHT (832x480) or auto."),
    ],
)
def test_roundtrip_options_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        roundtrip(**options)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": 6}, "--overlap 6 is not a multiple of 4. Give 4 or 8."),
        (
            {"carry_frames": 5},
            "--carry-frames 5 works with --memory pixel only, not with latent.",
        ),
        (
            {"seconds": 2.0, "frames": 3},
            "--seconds 2.0 and --frames 3 exclude each other. Give one of them.",
        ),
        ({"size": "big"}, "--size big is not a size. Write WIDTHxHEIGHT (832x480) or auto."),
    ],
)
def test_attention_refuses_what_animate_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        attention(**options)
    assert str(caught.value) == message


def test_single_frames_may_travel() -> None:
    assert roundtrip(frames_per_chunk=1).frames_per_chunk == 1


def test_default_folders_are_named_after_the_inputs() -> None:
    assert roundtrip().default_output == Path("film_roundtrip")
    assert attention().default_output == Path("dance_anna_attention")
    assert attention(driving=Path("film.mp4")).default_output == Path("film_anna_attention")


def test_all_that_animate_knows_too_goes_to_it() -> None:
    options: dict[str, Any] = {
        "frames": 30,
        "start": 1.5,
        "pose_model": "dwpose",
        "pose_folder": Path("poses"),
        "lora": (LoraSpec("a.safetensors", 0.5),),
        "view": (Path("back.png"),),
        "size": "64x48",
        "fit": "cover",
        "seed": 3,
        "steps": 4,
        "shift": 2.0,
        "prompt": "a fox",
        "frames_per_chunk": 13,
        "overlap": 8,
        "identity_slots": 3,
        "clip_image": "reference",
        "device": "cpu",
        "dtype": "float32",
        "overwrite": True,
    }
    settings = attention(**options)
    asked = settings.to_animate()
    shared = {item.name for item in fields(AttentionSettings)} - {"output", "dry_run"}
    assert shared <= {item.name for item in fields(AnimateSettings)}
    assert {name: getattr(asked, name) for name in shared} == {
        name: getattr(settings, name) for name in shared
    }
    pixel = attention(memory="pixel", carry_frames=5, seconds=2.0).to_animate()
    assert (pixel.memory, pixel.carry_frames, pixel.seconds) == ("pixel", 5, 2.0)


def test_defaults_are_those_of_animate() -> None:
    plain = AnimateSettings(ref=Path("anna.png"), driving=Path("dance"), model="toy", audio=False)
    assert attention().to_animate() == plain


@pytest.mark.parametrize(
    ("memory", "overlap", "expected"),
    [
        ("latent", 4, 1),
        ("latent", 8, 2),
        ("pixel", 1, 1),
        ("pixel", 5, 2),
        ("sink", 4, 1),
    ],
)
def test_slots_of_motion_memory(memory: Memory, overlap: int, expected: int) -> None:
    assert motion_slots(memory, overlap) == expected


def test_settings_survive_json() -> None:
    settings = attention(lora=(), view=(Path("back.png"),), start=2.5, seed=4)
    assert AttentionSettings.from_json(settings.to_json()) == settings
    other = roundtrip(trips=3, quantise="none", flat=False, start=1.0, end=2.0)
    assert RoundtripSettings.from_json(other.to_json()) == other


def nothing() -> None:
    """No preparation."""


def fill(*names: str) -> Callable[[], None]:
    def write() -> None:
        Path("out").mkdir()
        for name in names:
            Path("out", name).write_text("x")

    return write


def check(settings: RoundtripSettings | AttentionSettings) -> None:
    if isinstance(settings, RoundtripSettings):
        check_analyze_roundtrip(settings)
    else:
        check_analyze_attention(settings)


@pytest.mark.parametrize(
    ("prepare", "settings", "error", "message"),
    [
        (
            nothing,
            lambda: roundtrip(video=Path("no.mp4")),
            InputError,
            "VIDEO no.mp4 does not exist. Give a video or a picture.",
        ),
        (
            nothing,
            lambda: roundtrip(video=Path("dance")),
            InputError,
            "VIDEO dance is a folder. Give a video or a picture.",
        ),
        (
            nothing,
            lambda: roundtrip(model="dance"),
            WeightsError,
            "--model dance has no transformer/config.json. "
            "Give a checkpoint folder in diffusers or the original layout.",
        ),
        (
            nothing,
            lambda: roundtrip(output=Path("anna.png")),
            InputError,
            "--output anna.png is a file. Give a folder.",
        ),
        (
            nothing,
            lambda: roundtrip(output=Path("no/out")),
            InputError,
            "--output no/out cannot be made: the folder no does not exist. "
            "Make it first, or give another path.",
        ),
        (
            nothing,
            lambda: roundtrip(output=Path()),
            InputError,
            "--output . has no name. Give the name of a folder to make.",
        ),
        (
            nothing,
            lambda: roundtrip(output=Path("n" * 256)),
            InputError,
            f"--output {'n' * 256} has too long a name. Give a shorter one.",
        ),
        (
            fill("roundtrip.csv", "roundtrip.json"),
            lambda: roundtrip(output=Path("out")),
            InputError,
            "--output out holds roundtrip.json. "
            "Add --overwrite to replace it, or give another folder.",
        ),
        (
            fill("notes.txt", "roundtrip.csv"),
            lambda: roundtrip(output=Path("out")),
            InputError,
            "--output out holds notes.txt. Add --overwrite to replace it, or give another folder.",
        ),
        (
            fill("roundtrip.json"),
            lambda: attention(output=Path("out")),
            InputError,
            "--output out holds roundtrip.json. "
            "Add --overwrite to replace it, or give another folder.",
        ),
        (
            nothing,
            lambda: attention(ref=Path("eve.png")),
            InputError,
            "REF eve.png does not exist. Give a picture of the character.",
        ),
        (
            nothing,
            lambda: attention(lora=(LoraSpec("no.safetensors"),)),
            InputError,
            "--lora no.safetensors does not exist. "
            "Give a .safetensors file or a Hub id, with its strength as FILE=SCALE.",
        ),
        (
            nothing,
            lambda: attention(pose_model="toy"),
            SettingsError,
            "--pose-model toy needs a raw video as DRIVING.",
        ),
    ],
)
def test_refusals(
    prepare: Callable[[], None],
    settings: Callable[[], RoundtripSettings | AttentionSettings],
    error: type[EverAnimateError],
    message: str,
) -> None:
    prepare()
    given = settings()
    with pytest.raises(error) as caught:
        check(given)
    assert str(caught.value) == message


@pytest.mark.parametrize("names", [(), ("roundtrip.csv",), ("roundtrip.csv", "sheet.png")])
def test_a_folder_without_a_whole_result_is_taken(names: tuple[str, ...]) -> None:
    fill(*names)()
    check_analyze_roundtrip(roundtrip(output=Path("out")))


def test_overwrite_takes_any_folder() -> None:
    fill("notes.txt", "roundtrip.json", "attention.json")()
    check_analyze_roundtrip(roundtrip(output=Path("out"), overwrite=True))
    check_analyze_attention(attention(output=Path("out"), overwrite=True))


def test_a_video_of_the_same_name_is_no_hindrance() -> None:
    """`animate` would refuse it: attention writes no video."""
    Path("dance_anna.mp4").write_bytes(b"video")
    Path("dance_anna_attention.mp4").write_bytes(b"video")
    check_analyze_attention(attention())
    check_analyze_attention(attention(output=Path("dance_anna_attention")))
