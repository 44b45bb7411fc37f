"""Checks before any heavy import: each refusal word for word."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from everanimate_cli.errors import EverAnimateError, InputError, SettingsError, WeightsError
from everanimate_cli.preflight import (
    check_animate,
    check_demo,
    check_environment,
    check_extract,
)
from everanimate_cli.records import LoraSpec
from everanimate_cli.settings import AnimateSettings, DemoSettings, ExtractSettings

DRIVING_ADVICE = "Give a video or a folder made by extract-pose, or --pose and --face."
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


def write_run(name: str = "dance_anna.mp4.run", files: tuple[str, ...] = ("run.json",)) -> None:
    for file in files:
        write(f"{name}/{file}", b"{}")


def write_demo() -> None:
    write("demo/driving.json", json.dumps({"seed": 0, "seconds": 10.0}).encode())


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
            lambda: write("waltz.mp4", b""),
            {"driving": Path("waltz.mp4")},
            InputError,
            f"DRIVING waltz.mp4 is empty. {DRIVING_ADVICE}",
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
            "Give a checkpoint folder in diffusers or the original layout.",
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
            lambda: (write("dance_anna.mp4"), write_run()),
            {"resume": False},
            InputError,
            "--output dance_anna.mp4 exists. Add --overwrite to replace it, or give another name.",
        ),
        (
            lambda: (write("dance_anna.mp4"), write_run(files=("notes.txt", "lock"))),
            {},
            InputError,
            "--output dance_anna.mp4 exists. Add --overwrite to replace it, or give another name.",
        ),
        (
            lambda: write("dance_anna.mp4.run"),
            {},
            InputError,
            "--output dance_anna.mp4 needs a folder dance_anna.mp4.run beside it, but that is a "
            "file. Give another name.",
        ),
        (
            lambda: write("dance_anna.json/file"),
            {"overwrite": True},
            InputError,
            "--output dance_anna.mp4 needs a file dance_anna.json beside it, but that is a folder. "
            "Give another name.",
        ),
        (
            lambda: write("dance_anna.json", b'{"settings": {}}'),
            {},
            InputError,
            "--output dance_anna.mp4 would replace dance_anna.json by its own settings. "
            "Add --overwrite to do so, or give another name.",
        ),
        (
            nothing,
            {"output": Path("ä" * 124 + ".mp4")},
            InputError,
            f"--output {'ä' * 124}.mp4 has too long a name. Give a shorter one.",
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
            "--png out/frames cannot be made: the folder out does not exist. "
            "Make it first, or give another path.",
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
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path).suffix != ".run")
    write_run("anna.mp4.run")  # of another user
    with pytest.raises(InputError) as caught:
        check_animate(settings(output=Path("anna.mp4")))
    assert str(caught.value) == (
        "--output anna.mp4 cannot be written: the folder anna.mp4.run is not writable. "
        "Give another path."
    )
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path) != Path("locked"))
    with pytest.raises(InputError) as caught:
        check_animate(settings(png=Path("locked")))
    assert str(caught.value) == (
        "--png locked cannot be written: the folder locked is not writable. Give another path."
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


def test_the_run_that_made_a_result_may_replace_it() -> None:
    write_run(files=("run.json", "00000.safetensors"))
    write("dance_anna.mp4")
    write("dance_anna.json")
    check_animate(settings())


@pytest.mark.parametrize("files", [("00000.safetensors",), ("00003_4-9.mp4", "lock"), ("lock",)])
def test_what_a_killed_removal_has_left_goes(inputs: Path, files: tuple[str, ...]) -> None:
    write("dance_anna.mp4")
    before = sorted(inputs.rglob("*"))
    write_run(files=files)
    with_remains = sorted(inputs.rglob("*"))
    check_animate(settings(output=Path("other.mp4")))
    with pytest.raises(InputError, match=r"exists\. Add --overwrite"):
        check_animate(settings(dry_run=True))
    assert sorted(inputs.rglob("*")) == with_remains
    with pytest.raises(InputError, match=r"exists\. Add --overwrite"):
        check_animate(settings())
    assert sorted(inputs.rglob("*")) == before


def test_the_settings_of_an_earlier_result_may_be_replaced() -> None:
    record = {"settings": {}, "effective": {}, "result": {}}
    write("dance_anna.json", json.dumps(record).encode())
    check_animate(settings())


def test_a_run_may_go_on_in_its_own_folder_of_pictures_only() -> None:
    write("frames/000000.png")
    write_run(files=("run.json", "pictures.json"))
    note = {"folder": str(Path("frames").resolve()), "num_missing": 0}
    write("dance_anna.mp4.run/pictures.json", json.dumps(note).encode())
    check_animate(settings(png=Path("frames")))
    for options in ({"png": Path("dance")}, {"png": Path("frames"), "resume": False}):
        with pytest.raises(InputError, match="is not empty"):
            check_animate(settings(**options))


def test_an_unfinished_demo_is_continued_with_the_same_options_only() -> None:
    directory = Path("demo")
    write_demo()
    write("demo/reference.png")
    check_demo(DemoSettings(directory=directory))
    for options in ({"seed": 1}, {"seconds": 2.5}):
        with pytest.raises(InputError) as caught:
            check_demo(DemoSettings(directory=directory, **options))
        assert str(caught.value) == (
            "DIR demo holds an unfinished demo with --seed 0 --seconds 10. Give the same options "
            "to continue it, add --overwrite, or give another folder."
        )
        check_demo(DemoSettings(directory=directory, overwrite=True, **options))
    write("demo/demo.mp4")
    with pytest.raises(InputError, match="holds an earlier demo"):
        check_demo(DemoSettings(directory=directory))
    write_run("demo/demo.mp4.run")  # its removal was interrupted
    check_demo(DemoSettings(directory=directory))


@pytest.mark.parametrize("record", [b"", b"[]", b"{}", b'{"seed": {}, "seconds": 1}'])
def test_files_of_others_are_in_the_way_of_a_demo(record: bytes) -> None:
    write("demo/driving.json", record)
    with pytest.raises(InputError) as caught:
        check_demo(DemoSettings(directory=Path("demo")))
    assert str(caught.value) == (
        "DIR demo holds another driving.json. Add --overwrite to replace it, or give another "
        "folder."
    )
    check_demo(DemoSettings(directory=Path("demo"), overwrite=True))


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


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"person": 1}, "--person 1"),
        ({"select": "left"}, "--select left"),
        ({"retarget": True}, "--retarget"),
        ({"pose_model": "toy"}, "--pose-model toy"),
        ({"detector": "toy"}, "--detector toy"),
        ({"pose_folder": Path("p")}, "--pose-folder p"),
    ],
)
def test_options_of_an_extraction_need_a_raw_video(options: dict[str, Any], text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        check_animate(settings(**options))
    assert str(caught.value) == f"{text} needs a raw video as DRIVING."
    write("waltz.mp4")
    check_animate(settings(driving=Path("waltz.mp4"), **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"output": Path("waltz.mp4")},
            "--output waltz.mp4 is also an input. Give another name.",
        ),
        (
            {"output": Path("w.mp4"), "pose_folder": Path("anna.png")},
            "--pose-folder anna.png is a file. Give a folder.",
        ),
        (
            {"output": Path("w.mp4"), "pose_folder": Path("no/where")},
            "--pose-folder no/where cannot be made: the folder no does not exist. Make it first, "
            "or give another path.",
        ),
        (
            {"output": Path("no/w.mp4")},
            "--output no/w.mp4 cannot be written: the folder no does not exist. Make it first, or "
            "give another path.",
        ),
        (
            {"pose_model": "mine.onnx"},
            "--pose-model mine.onnx does not exist. Give an .onnx file.",
        ),
    ],
)
def test_a_raw_driving_video(options: dict[str, Any], message: str) -> None:
    write("waltz.mp4")
    with pytest.raises(InputError) as caught:
        check_animate(settings(driving=Path("waltz.mp4"), overwrite=True, **options))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"video": Path("no.mp4")},
            "VIDEO no.mp4 does not exist. Give a video of a moving person.",
        ),
        ({"video": Path("dance")}, "VIDEO dance is a folder. Give a video of a moving person."),
        (
            {"retarget": Path("eve.png")},
            "--retarget eve.png does not exist. Give a picture of the character.",
        ),
        (
            {"size": "830x480"},
            "--size 830x480 is not a multiple of 16 on both sides. Give 816x480 or 832x480.",
        ),
        ({"output": Path("anna.png")}, "--output anna.png is a file. Give a folder."),
        (
            {"output": Path("no/where")},
            "--output no/where cannot be made: the folder no does not exist. Make it first, or "
            "give another path.",
        ),
        (
            {"output": Path("dance")},
            "--output dance holds face.mp4. Add --overwrite to replace it, or give another folder.",
        ),
    ],
)
def test_an_extraction(options: dict[str, Any], message: str) -> None:
    write("waltz.mp4")
    with pytest.raises(EverAnimateError) as caught:
        check_extract(ExtractSettings(**{"video": Path("waltz.mp4"), **options}))
    assert str(caught.value) == message
    assert caught.value.exit_code == 2


# --- environment ---------------------------------------------------------------------------------


HUB = "Give an address such as https://huggingface.co"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"HF_ENDPOINT": ""}, f"HF_ENDPOINT is empty. {HUB}, or unset it."),
        (
            {"HF_ENDPOINT": "hf.example"},
            "HF_ENDPOINT hf.example is no address. Write https:// before it: https://hf.example.",
        ),
        (
            {"HF_ENDPOINT": "http://127.0.0.1:99999"},
            f"HF_ENDPOINT http://127.0.0.1:99999 is no address (Port out of range 0-65535). {HUB}.",
        ),
        (
            {"HF_ENDPOINT": "http://[::1"},
            f"HF_ENDPOINT http://[::1 is no address (Invalid IPv6 URL). {HUB}.",
        ),
        *(
            ({"HF_ENDPOINT": address}, f"HF_ENDPOINT {address} is no address of a Hub. {HUB}.")
            for address in ("http://", "ftp://hf.example", "https://hf example", "http://x:0")
        ),
        (
            {"HF_HUB_ETAG_TIMEOUT": "long"},
            "HF_HUB_ETAG_TIMEOUT long is not a whole number of seconds.",
        ),
    ],
)
def test_variables_at_which_the_hubs_library_would_stumble(
    environ: dict[str, str], message: str
) -> None:
    with pytest.raises(SettingsError) as error:
        check_environment(environ)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "address", ["https://hf.example", "http://127.0.0.1:8080/mirror/", "http://[::1]:80"]
)
def test_variables_that_can_be(address: str) -> None:
    check_environment({"HF_ENDPOINT": address, "HF_HUB_DOWNLOAD_TIMEOUT": "30"})
    check_environment({})
