"""Checks of files and names that need no heavy import, so that a slip is told at once."""

import os
from pathlib import Path

from everanimate_cli.errors import InputError, SettingsError, WeightsError
from everanimate_cli.settings import (
    HUB_MODEL,
    TOY_MODEL,
    AnimateSettings,
    DemoSettings,
    LoraSpec,
    split_hub_id,
)

DRIVING_FILES = ("pose.mp4", "face.mp4", "extract.json")
_DRIVING_ADVICE = "Give a folder with pose.mp4, face.mp4 and extract.json, or --pose and --face."


def check_animate(settings: AnimateSettings) -> None:
    """Refuse a run whose inputs are missing or whose output cannot be written.

    Raises:
        InputError: If a file or folder is missing, empty, of the wrong kind or in the way.
        SettingsError: If the model's or a LoRA's name fits nothing.
        WeightsError: If the model's folder is no checkpoint.
    """
    _check_file("REF", settings.ref, "Give a picture of the character.")
    for view in settings.view:
        _check_file("--view", view, "Give a picture of the character.")
    if settings.driving is not None:
        _check_driving(settings.driving)
    if settings.pose is not None:
        _check_file("--pose", settings.pose, "Give a video of drawn skeletons.")
    if settings.face is not None:
        _check_file("--face", settings.face, "Give a video of face crops.")
    check_model(settings.model)
    for lora in settings.lora or ():
        check_lora(lora)
    inputs = [settings.ref, settings.pose, settings.face, *settings.view]
    if settings.driving is not None:
        inputs += [settings.driving / name for name in DRIVING_FILES]
    output = settings.default_output if settings.output is None else settings.output
    _check_output(output, overwrite=settings.overwrite)
    if output.resolve() in {path.resolve() for path in inputs if path is not None}:
        raise InputError(f"--output {output} is also an input. Give another name.")
    if settings.png is not None:
        _check_png_folder(settings.png, overwrite=settings.overwrite)


def check_demo(settings: DemoSettings) -> None:
    """Refuse a demo whose folder cannot take its files.

    Raises:
        InputError: If a file is in the way, or an earlier demo without `--overwrite`.
    """
    directory = settings.directory
    if directory.exists() and not directory.is_dir():
        raise InputError(f"DIR {directory} is a file. Give a folder.")
    if settings.output.exists() and not settings.overwrite:
        raise InputError(
            f"DIR {directory} holds an earlier {settings.output.name}. "
            "Add --overwrite to replace it, or give another folder."
        )


def _check_file(label: str, path: Path, advice: str) -> None:
    if not path.exists():
        raise InputError(f"{label} {path} does not exist. {advice}")
    if path.is_dir():
        raise InputError(f"{label} {path} is a folder. {advice}")
    # A size of 0 says nothing about a pipe or a device.
    if path.is_file() and path.stat().st_size == 0:
        raise InputError(f"{label} {path} is empty. {advice}")


def _check_driving(driving: Path) -> None:
    if not driving.exists():
        raise InputError(f"DRIVING {driving} does not exist. {_DRIVING_ADVICE}")
    if not driving.is_dir():
        raise InputError(f"DRIVING {driving} is a file. {_DRIVING_ADVICE}")
    missing = [name for name in DRIVING_FILES if not (driving / name).is_file()]
    if missing:
        raise InputError(f"DRIVING {driving} has no {' and no '.join(missing)}. {_DRIVING_ADVICE}")


def check_model(model: str) -> None:
    """Refuse a model name that can be neither a folder nor a Hub id; asks no network.

    Raises:
        SettingsError: If the name fits nothing.
        WeightsError: If the folder is no checkpoint.
    """
    if model == TOY_MODEL:
        return
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "transformer" / "config.json").is_file():
            raise WeightsError(
                f"--model {model} has no transformer/config.json. "
                "Give a checkpoint folder in diffusers layout."
            )
        return
    hub_id = split_hub_id(model)
    if folder.exists() or hub_id is None or hub_id.path:
        raise SettingsError(
            f"--model {model} is unknown. Give '{TOY_MODEL}' (embedded, works offline), "
            f"a checkpoint folder, or a Hub id such as {HUB_MODEL}."
        )


def check_lora(lora: LoraSpec) -> None:
    """Refuse a LoRA that can be neither a file nor one on the Hub; asks no network.

    Raises:
        InputError: If the file is missing, empty or of another kind.
    """
    path = Path(lora.source)
    advice = "Give a .safetensors file or a Hub id, with its strength as FILE=SCALE."
    if path.exists():
        _check_file("--lora", path, advice)
        if path.suffix != ".safetensors":
            raise InputError(f"--lora {lora.source} is not a .safetensors file. {advice}")
        return
    hub_id = split_hub_id(lora.source)
    # owner/name.safetensors is a file that is missing: a repository is not called so.
    if hub_id is None or (not hub_id.path and path.suffix == ".safetensors"):
        raise InputError(f"--lora {lora.source} does not exist. {advice}")
    if hub_id.path and not hub_id.path.endswith(".safetensors"):
        raise InputError(f"--lora {lora.source} is not a .safetensors file. {advice}")


def _check_output(output: Path, *, overwrite: bool) -> None:
    folder = output.parent
    if not folder.is_dir():
        raise InputError(
            f"--output {output} cannot be written: the folder {folder} does not exist. "
            "Make it first, or give another path."
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(
            f"--output {output} cannot be written: the folder {folder} is not writable. "
            "Give another path."
        )
    if output.is_dir():
        raise InputError(f"--output {output} is a folder. Give a file name ending in .mp4.")
    if output.exists() and not overwrite:
        raise InputError(
            f"--output {output} exists. Add --overwrite to replace it, or give another name."
        )


def _check_png_folder(folder: Path, *, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--png {folder} is a file. Give a folder.")
    if not folder.parent.is_dir():
        raise InputError(
            f"--png {folder} cannot be made: the folder {folder.parent} does not exist."
        )
    if folder.is_dir() and not overwrite and any(folder.iterdir()):
        raise InputError(
            f"--png {folder} is not empty. Add --overwrite to write into it, "
            "or give another folder."
        )
