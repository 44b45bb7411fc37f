"""Checks before any heavy import: each refusal word for word."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from everanimate_cli.errors import EverAnimateError, InputError, SettingsError, WeightsError
from everanimate_cli.preflight import check_animate, check_demo
from everanimate_cli.settings import AnimateSettings, DemoSettings, LoraSpec

DRIVING_ADVICE = "Give a folder with pose.mp4, face.mp4 and extract.json, or --pose and --face."
PICTURE_ADVICE = "Give a picture of the character."
LORA_ADVICE = "Give a .safetensors file or a Hub id, with its strength as FILE=SCALE."


@pytest.fixture(autouse=True)
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a picture and a driving folder, made the current one."""
    monkeypatch.chdir(tmp_path)
    Path("anna.png").write_bytes(b"picture")
    Path("dance").mkdir()
    for name in ("pose.mp4", "face.mp4", "extract.json"):
        Path("dance", name).write_bytes(b"content")
    return tmp_path


def settings(**options: Any) -> AnimateSettings:
    return AnimateSettings(**{"ref": Path("anna.png"), "driving": Path("dance"), **options})


def write(name: str, content: bytes = b"content") -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content)


def nothing() -> None:
    """No preparation."""


@pytest.mark.parametrize(
    ("prepare", "options", "error", "message"),
    [
        (
            nothing,
            {"ref": Path("eve.png")},
            InputError,
            f"REF eve.png does not exist. {PICTURE_ADVICE}",
        ),
        (nothing, {"ref": Path("dance")}, InputError, f"REF dance is a folder. {PICTURE_ADVICE}"),
        (
            lambda: write("empty.png", b""),
            {"ref": Path("empty.png")},
            InputError,
            f"REF empty.png is empty. {PICTURE_ADVICE}",
        ),
        (
            nothing,
            {"view": (Path("anna.png"), Path("back.png"))},
            InputError,
            f"--view back.png does not exist. {PICTURE_ADVICE}",
        ),
        (
            nothing,
            {"driving": Path("waltz")},
            InputError,
            f"DRIVING waltz does not exist. {DRIVING_ADVICE}",
        ),
        (
            nothing,
            {"driving": Path("anna.png")},
            InputError,
            f"DRIVING anna.png is a file. {DRIVING_ADVICE}",
        ),
        (
            lambda: Path("dance/face.mp4").unlink(),
            {},
            InputError,
            f"DRIVING dance has no face.mp4. {DRIVING_ADVICE}",
        ),
        (
            lambda: Path("empty").mkdir(),
            {"driving": Path("empty")},
            InputError,
            f"DRIVING empty has no pose.mp4 and no face.mp4 and no extract.json. {DRIVING_ADVICE}",
        ),
        (
            lambda: write("p.mp4"),
            {"driving": None, "pose": Path("p.mp4"), "face": Path("f.mp4")},
            InputError,
            "--face f.mp4 does not exist. Give a video of face crops.",
        ),
        (
            lambda: write("p.mp4", b""),
            {"driving": None, "pose": Path("p.mp4"), "face": Path("f.mp4")},
            InputError,
            "--pose p.mp4 is empty. Give a video of drawn skeletons.",
        ),
        (
            nothing,
            {"model": "toyy"},
            SettingsError,
            "--model toyy is unknown. Give 'toy' (embedded, works offline), a checkpoint folder, "
            "or a Hub id such as Wan-AI/Wan2.2-Animate-14B-Diffusers.",
        ),
        (
            nothing,
            {"model": "./no/such/folder"},
            SettingsError,
            "--model ./no/such/folder is unknown. Give 'toy' (embedded, works offline), a "
            "checkpoint folder, or a Hub id such as Wan-AI/Wan2.2-Animate-14B-Diffusers.",
        ),
        (
            nothing,
            {"model": "dance"},
            WeightsError,
            "--model dance has no transformer/config.json. "
            "Give a checkpoint folder in diffusers layout.",
        ),
        (
            nothing,
            {"lora": (LoraSpec("my.safetensors", 0.8),)},
            InputError,
            f"--lora my.safetensors does not exist. {LORA_ADVICE}",
        ),
        (
            nothing,
            {"lora": (LoraSpec("loras/my.safetensors"),)},
            InputError,
            f"--lora loras/my.safetensors does not exist. {LORA_ADVICE}",
        ),
        (
            nothing,
            {"lora": (LoraSpec("anna.png"),)},
            InputError,
            f"--lora anna.png is not a .safetensors file. {LORA_ADVICE}",
        ),
        (
            nothing,
            {"lora": (LoraSpec("owner/name/ckpts/a.pt@v1"),)},
            InputError,
            f"--lora owner/name/ckpts/a.pt@v1 is not a .safetensors file. {LORA_ADVICE}",
        ),
        (
            nothing,
            {"output": Path("out/anna.mp4")},
            InputError,
            "--output out/anna.mp4 cannot be written: the folder out does not exist. "
            "Make it first, or give another path.",
        ),
        (
            lambda: Path("anna.mp4").mkdir(),
            {"output": Path("anna.mp4")},
            InputError,
            "--output anna.mp4 is a folder. Give a file name ending in .mp4.",
        ),
        (
            lambda: write("dance_anna.mp4"),
            {},
            InputError,
            "--output dance_anna.mp4 exists. Add --overwrite to replace it, or give another name.",
        ),
        (
            nothing,
            {"output": Path("dance/../dance/pose.mp4"), "overwrite": True},
            InputError,
            "--output dance/../dance/pose.mp4 is also an input. Give another name.",
        ),
        (
            nothing,
            {"png": Path("anna.png")},
            InputError,
            "--png anna.png is a file. Give a folder.",
        ),
        (
            nothing,
            {"png": Path("out/frames")},
            InputError,
            "--png out/frames cannot be made: the folder out does not exist.",
        ),
        (
            nothing,
            {"png": Path("dance")},
            InputError,
            "--png dance is not empty. Add --overwrite to write into it, or give another folder.",
        ),
    ],
)
def test_refusals(
    prepare: Callable[[], object],
    options: dict[str, Any],
    error: type[EverAnimateError],
    message: str,
) -> None:
    prepare()
    with pytest.raises(error) as caught:
        check_animate(settings(**options))
    assert type(caught.value) is error
    assert str(caught.value) == message
    assert caught.value.exit_code == 2


def test_a_folder_without_write_permission_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # The superuser may write anywhere, so the permission bits are not enough for this test.
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path) != Path("locked"))
    Path("locked").mkdir()
    with pytest.raises(InputError) as caught:
        check_animate(settings(output=Path("locked/anna.mp4")))
    assert str(caught.value) == (
        "--output locked/anna.mp4 cannot be written: the folder locked is not writable. "
        "Give another path."
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model": "toy"},
        {"model": "owner/name"},
        {"model": "owner/name@v1.0"},
        {"lora": (LoraSpec("owner/name/a.safetensors@v1.0", 0.5),)},
        {"model": "checkpoint"},
        {"lora": (LoraSpec("owner/name/loras/a.safetensors"), LoraSpec("owner/name"))},
        {"lora": (LoraSpec("checkpoint/a.safetensors", 0.5),)},
        {"output": Path("old.mp4"), "overwrite": True},
        {"png": Path("frames")},
        {"png": Path("dance"), "overwrite": True},
        {"driving": None, "pose": Path("dance/pose.mp4"), "face": Path("dance/face.mp4")},
    ],
)
def test_what_can_work_passes_and_nothing_is_written(inputs: Path, options: dict[str, Any]) -> None:
    write("checkpoint/transformer/config.json")
    write("checkpoint/a.safetensors")
    write("old.mp4")
    before = sorted(inputs.rglob("*"))
    check_animate(settings(**options))
    assert sorted(inputs.rglob("*")) == before


def test_demo_needs_a_folder_without_an_earlier_demo() -> None:
    check_demo(DemoSettings(directory=Path("new/demo")))
    with pytest.raises(InputError) as caught:
        check_demo(DemoSettings(directory=Path("anna.png")))
    assert str(caught.value) == "DIR anna.png is a file. Give a folder."
    write(str(DemoSettings(directory=Path("old")).output))
    with pytest.raises(InputError) as caught:
        check_demo(DemoSettings(directory=Path("old")))
    assert str(caught.value) == (
        "DIR old holds an earlier demo.mp4. Add --overwrite to replace it, or give another folder."
    )
    check_demo(DemoSettings(directory=Path("old"), overwrite=True))
