"""Checks of files and names that need no heavy import, so that a slip is told at once."""

import json
import os
from pathlib import Path

from everanimate_cli.errors import InputError, SettingsError, WeightsError
from everanimate_cli.runs import RunFolder
from everanimate_cli.settings import (
    HUB_MODEL,
    TOY_MODEL,
    AnimateSettings,
    DemoSettings,
    LoraSpec,
    run_folder,
    split_hub_id,
)

DRIVING_FILES = ("pose.mp4", "face.mp4", "extract.json")
# What the demo gives as the models that saw its dance: it knows the joints.
DEMO_MODELS = {"detector": "toy world (exact)", "pose": "toy world (exact)"}
_MAX_NAME_BYTES = 255  # of the usual file systems
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
    # What an earlier run of the same result has made may be replaced: it is that run's own.
    continues = settings.resume and RunFolder(run_folder(output)).holds_run()
    may_replace = settings.overwrite or continues
    _check_output(output, may_replace=may_replace)
    if output.resolve() in {path.resolve() for path in inputs if path is not None}:
        raise InputError(f"--output {output} is also an input. Give another name.")
    if settings.png is not None:
        pictures = RunFolder(run_folder(output)).read_pictures() if continues else None
        is_own = pictures is not None and pictures.folder == settings.png.resolve()
        _check_png_folder(settings.png, may_replace=settings.overwrite or is_own)


def settings_path(output: Path) -> Path:
    """Where the settings of a result are saved: its name with `.json`."""
    return output.with_suffix(".json")


def output_exists(output: Path) -> InputError:
    """The refusal to replace a result."""
    return InputError(
        f"--output {output} exists. Add --overwrite to replace it, or give another name."
    )


def check_demo(settings: DemoSettings) -> None:
    """Refuse a demo whose folder cannot take its files.

    An unfinished demo of the same options is continued.

    Raises:
        InputError: If a file is in the way, or an earlier demo without `--overwrite`.
    """
    directory = settings.directory
    if directory.exists() and not directory.is_dir():
        raise InputError(f"DIR {directory} is a file. Give a folder.")
    if settings.overwrite:
        return
    advice = "Add --overwrite to replace it, or give another folder."
    continues = RunFolder(run_folder(settings.output)).holds_run()
    if settings.output.exists() and not continues:
        raise InputError(f"DIR {directory} holds an earlier {settings.output.name}. {advice}")
    names = ("driving", "reference.png", "contact_sheet.png", settings_path(settings.output).name)
    present = [name for name in names if (directory / name).exists()]
    if not present:
        return
    before = read_demo_options(directory)
    if before is None:
        raise InputError(f"DIR {directory} holds another {present[0]}. {advice}")
    if before != demo_options(settings):
        options = " ".join(f"--{name} {value:g}" for name, value in before.items())
        raise InputError(
            f"DIR {directory} holds an unfinished demo with {options}. "
            "Give the same options to continue it, add --overwrite, or give another folder."
        )


def demo_options(settings: DemoSettings) -> dict[str, float]:
    """What a demo shows, as `extract.json` of its driving folder keeps it."""
    return {"seed": settings.seed, "seconds": settings.seconds}


def read_demo_options(directory: Path) -> dict[str, float] | None:
    """What the demo in a folder shows; None if there is no demo."""
    try:
        record = json.loads((directory / "driving" / "extract.json").read_bytes())
        if record["models"] != DEMO_MODELS:
            return None
        return {name: float(record["settings"][name]) for name in ("seed", "seconds")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


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


def _check_output(output: Path, *, may_replace: bool) -> None:
    folder, run = output.parent, run_folder(output)
    if len(os.fsencode(run.name)) > _MAX_NAME_BYTES:
        raise InputError(f"--output {output} has too long a name. Give a shorter one.")
    if not folder.is_dir():
        raise InputError(
            f"--output {output} cannot be written: the folder {folder} does not exist. "
            "Make it first, or give another path."
        )
    for needed in (folder, run):
        if needed.is_dir() and not os.access(needed, os.W_OK | os.X_OK):
            raise InputError(
                f"--output {output} cannot be written: the folder {needed} is not writable. "
                "Give another path."
            )
    if output.is_dir():
        raise InputError(f"--output {output} is a folder. Give a file name ending in .mp4.")
    if output.exists() and not may_replace:
        raise output_exists(output)
    if run.exists() and not run.is_dir():
        raise InputError(
            f"--output {output} needs a folder {run.name} beside it, but that is a file. "
            "Give another name."
        )
    record = settings_path(output)
    if record.is_dir():
        raise InputError(
            f"--output {output} needs a file {record.name} beside it, but that is a folder. "
            "Give another name."
        )
    if record.exists() and not may_replace and not _is_settings_file(record):
        raise InputError(
            f"--output {output} would replace {record} by its own settings. "
            "Add --overwrite to do so, or give another name."
        )


def _is_settings_file(path: Path) -> bool:
    """Whether a file was saved beside a result."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and {"settings", "effective", "result"} <= record.keys()


def _check_png_folder(folder: Path, *, may_replace: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--png {folder} is a file. Give a folder.")
    if not folder.parent.is_dir():
        raise InputError(
            f"--png {folder} cannot be made: the folder {folder.parent} does not exist."
        )
    writable = folder if folder.is_dir() else folder.parent
    if not os.access(writable, os.W_OK | os.X_OK):
        raise InputError(
            f"--png {folder} cannot be written: the folder {writable} is not writable. "
            "Give another path."
        )
    if folder.is_dir() and not may_replace and any(folder.iterdir()):
        raise InputError(
            f"--png {folder} is not empty. Add --overwrite to write into it, "
            "or give another folder."
        )
