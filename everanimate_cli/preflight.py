"""Checks of files and names that need no heavy import, so that a slip is told at once."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from everanimate_cli.analyze_settings import (
    ATTENTION_FILES,
    ROUNDTRIP_FILES,
    AttentionSettings,
    RoundtripSettings,
)
from everanimate_cli.errors import InputError, SettingsError, WeightsError
from everanimate_cli.eval_manifest import list_entries
from everanimate_cli.eval_settings import EvalSettings
from everanimate_cli.lora_config import PEFT_CONFIG, PEFT_WEIGHTS, lora_weights_file
from everanimate_cli.manifest import read_dataset
from everanimate_cli.model_folder import TRANSFORMER_SUFFIXES, find_layout
from everanimate_cli.model_table import check_models
from everanimate_cli.records import LoraSpec, option_name, split_hub_id
from everanimate_cli.runs import ExtractFolder, RunFolder, TrainFolder
from everanimate_cli.safetensors_header import read_tensor_shapes
from everanimate_cli.settings import (
    CANVAS_MULTIPLE,
    DEFAULT_POSE_MODEL,
    HUB_MODEL,
    POSE_SUFFIX,
    TOY_MODEL,
    AnimateSettings,
    DemoSettings,
    ExtractSettings,
    run_folder,
    with_name,
)
from everanimate_cli.speed_settings import check_installed
from everanimate_cli.train_settings import TrainSettings

DRIVING_FILES = ("pose.mp4", "face.mp4", "extract.json")
# All that an extraction may make, in the order in which it gets its place: with the last file the
# folder is whole.
POSE_FOLDER_FILES = (
    "preview.mp4",
    "reference.png",
    "keypoints.npz",
    "face.mp4",
    "pose.mp4",
    "extract.json",
)
_MAX_NAME_BYTES = 255  # of the usual file systems
_DRIVING_ADVICE = "Give a video or a folder made by extract-pose, or --pose and --face."
# The matrix that brings a layer down to the rank, in any naming.
_DOWN_MATRIX = re.compile(r".+\.(lora_A|lora_down)(\.[^.]+)?\.weight")
_EXTRACT_OPTIONS = ("pose_model", "detector", "person", "select", "retarget", "pose_folder")


def check_animate(settings: AnimateSettings) -> None:
    """Refuse a run whose inputs are missing or whose output cannot be written.

    Unless nothing is to be written, what a killed removal has left of an earlier run goes.

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
    check_installed(settings.attention)
    check_model(settings.model)
    if settings.transformer is not None:
        check_transformer(settings.transformer)
    for lora in settings.lora or ():
        check_lora(lora)
    inputs = [settings.ref, settings.pose, settings.face, *settings.view]
    if settings.driving is None or settings.driving.is_dir():
        for name in _EXTRACT_OPTIONS:
            value = getattr(settings, name)
            if value not in (None, False):
                text = option_name(name) if value is True else f"{option_name(name)} {value}"
                raise SettingsError(f"{text} needs a raw video as DRIVING.")
        if settings.driving is not None:
            inputs += [settings.driving / name for name in DRIVING_FILES]
    else:
        inputs.append(settings.driving)
        check_models(settings.pose_model or DEFAULT_POSE_MODEL, settings.detector)
    output = settings.default_output if settings.output is None else settings.output
    run = RunFolder(run_folder(output))
    if not settings.dry_run:
        run.finish_removal()
    # What an earlier run of the same result has made may be replaced: it is that run's own.
    continues = settings.resume and run.holds_run()
    may_replace = settings.overwrite or continues
    _check_output(output, may_replace=may_replace)
    if settings.driving is not None and not settings.driving.is_dir():
        folder = settings.pose_folder or default_pose_folder(output, settings.driving)
        _check_pose_folder("--pose-folder", folder)
    if output.resolve() in {path.resolve() for path in inputs if path is not None}:
        raise InputError(f"--output {output} is also an input. Give another name.")
    if settings.png is not None:
        pictures = run.read_pictures() if continues else None
        is_own = pictures is not None and pictures.folder == settings.png.resolve()
        _check_png_folder(settings.png, may_replace=settings.overwrite or is_own)


def check_extract(settings: ExtractSettings, *, lists_only: bool = False) -> None:
    """Refuse an extraction whose inputs are missing or whose folder cannot be written.

    Args:
        settings: Options.
        lists_only: Nothing is written, the people in the video are listed only.

    Raises:
        InputError: If a file is missing, empty, of the wrong kind or in the way.
        SettingsError: If the size cannot be drawn.
    """
    _check_file("VIDEO", settings.video, "Give a video of a moving person.")
    for name in ("reference", "retarget"):
        path = getattr(settings, name)
        if path is not None:
            _check_file(f"--{name}", path, "Give a picture of the character.")
    check_models(settings.pose_model, settings.detector)
    size = settings.height_width
    if size is not None and any(side % CANVAS_MULTIPLE for side in size):
        raise unfit_size(size, CANVAS_MULTIPLE)
    if lists_only:
        return
    output = settings.default_output if settings.output is None else settings.output
    _check_pose_folder("--output", output)
    inputs = (settings.video, settings.reference, settings.retarget)
    resolved = {path.resolve() for path in inputs if path is not None}
    for name in POSE_FOLDER_FILES:
        if (output / name).resolve() in resolved:
            raise InputError(
                f"--output {output} would replace {output / name}, which is also an input. "
                "Give another folder."
            )
    work = ExtractFolder(run_folder(output))
    work.finish_removal()
    if settings.overwrite or (settings.resume and work.holds_run()):
        return
    present = [name for name in POSE_FOLDER_FILES if (output / name).exists()]
    if present:
        raise InputError(
            f"--output {output} holds {present[0]}. "
            "Add --overwrite to replace it, or give another folder."
        )


def check_train(settings: TrainSettings) -> None:
    """Refuse a training whose inputs are missing or whose folder cannot be written.

    Videos are not opened yet, and only a LoRA that lies on this machine is looked into.

    Raises:
        InputError: If a file or folder is missing, empty, of the wrong kind or in the way.
        SettingsError: If the model's name fits nothing, or an option does not fit the inputs.
        WeightsError: If the model's folder is no checkpoint, or the LoRA is none.
    """
    entries = read_dataset(settings.dataset)
    if settings.validation is not None:
        try:
            entries += read_dataset(settings.validation)
        except InputError as error:
            raise InputError(str(error).replace("DATASET", "--validation", 1)) from error
    check_model(settings.model)
    if settings.init is not None:
        _check_init(settings.init, settings.rank)
    if any(entry.pose is None and entry.pose_folder is None for entry in entries):
        _check_new_folder("--pose-folder", settings.pose_folder or settings.default_pose_folder)
        check_models(settings.pose_model or DEFAULT_POSE_MODEL, settings.detector)
    else:
        for name in ("pose_model", "detector", "pose_folder"):
            if getattr(settings, name) is not None:
                raise SettingsError(
                    f"{option_name(name)} {getattr(settings, name)} has no effect: "
                    "all videos bring their poses. Leave it out."
                )
    if settings.latent_cache is not None:
        _check_new_folder("--latent-cache", settings.latent_cache)
    _check_train_output(settings.output or settings.default_output, settings)


def _check_init(source: str, rank: int) -> None:
    check_lora(LoraSpec(source), "--init")
    path = Path(source)
    if path.exists():  # else it is on the Hub
        check_init_rank(source, lora_weights_file(path), rank)


def check_init_rank(source: str, path: Path, rank: int) -> None:
    """Refuse to start a training from a LoRA of another rank, or of several.

    Args:
        source: As given with `--init`.
        path: Where that is.
        rank: Of the training.

    Raises:
        WeightsError: If the file is no LoRA, or has several ranks.
        SettingsError: If it has another rank.
    """
    try:
        shapes = read_tensor_shapes(path)
    except WeightsError as error:
        raise WeightsError(f"--init {error}") from error
    ranks = sorted({shape[0] for key, shape in shapes.items() if _DOWN_MATRIX.fullmatch(key)})
    if not ranks:
        raise WeightsError(
            f"--init {source} is no LoRA: none of its {len(shapes)} tensors is a low-rank matrix. "
            "Give a file made by LoRA training."
        )
    if len(ranks) > 1:
        found = ", ".join(str(each) for each in ranks)
        raise WeightsError(f"--init {source} has several ranks ({found}). Give a LoRA of one rank.")
    if ranks != [rank]:
        raise SettingsError(
            f"--init {source} has rank {ranks[0]}, not {rank}. Give --rank {ranks[0]}."
        )


def _check_train_output(output: Path, settings: TrainSettings) -> None:
    if len(os.fsencode(output.name)) > _MAX_NAME_BYTES:
        raise InputError(f"--output {output} has too long a name. Give a shorter one.")
    if output.suffix == ".safetensors" and not output.exists():
        raise InputError(
            f"--output {output} is to be a folder. Give a name without {output.suffix}."
        )
    _check_new_folder("--output", output)
    if not output.is_dir():
        return
    folder = TrainFolder(output)
    names = sorted(path.name for path in output.iterdir())
    if names and not folder.holds_files():
        raise InputError(
            f"--output {output} holds {names[0]}, but no training. Give another folder."
        )
    # Without its request a LoRA belongs to no training that could go on.
    goes_on = settings.resume and folder.request_path.exists()
    if folder.has_result() and not (goes_on or settings.overwrite):
        raise output_exists(output)


def default_pose_folder(output: Path, video: Path) -> Path:
    """Where `animate` keeps the poses of a raw video: beside the result."""
    return output.parent / f"{with_name(video).stem}{POSE_SUFFIX}"


def _check_pose_folder(label: str, output: Path) -> None:
    folder = output.parent
    if output.name in ("", ".."):
        raise InputError(f"{label} {output} has no name. Give the name of a folder to make.")
    run = run_folder(output)
    if len(os.fsencode(run.name)) > _MAX_NAME_BYTES:
        raise InputError(f"{label} {output} has too long a name. Give a shorter one.")
    if output.suffix.lower() == ".mp4" and not output.is_file():  # as a result of `animate` does
        raise InputError(
            f"{label} {output} is to be a folder. Give a name without {output.suffix}."
        )
    # A link to nowhere does not exist, and yet is in the way.
    if not output.is_dir() and (output.exists() or output.is_symlink()):
        raise InputError(f"{label} {output} is a file. Give a folder.")
    if not folder.is_dir():
        raise InputError(
            f"{label} {output} cannot be made: the folder {folder} does not exist. "
            "Make it first, or give another path."
        )
    if run.exists() and not run.is_dir():
        raise InputError(
            f"{label} {output} needs a folder {run.name} beside it, but that is a file. "
            "Give another name."
        )
    for needed in (folder, output, run):
        if needed.is_dir() and not os.access(needed, os.W_OK | os.X_OK):
            raise InputError(
                f"{label} {output} cannot be written: the folder {needed} is not writable. "
                "Give another path."
            )


def unfit_size(size: tuple[int, int], multiple: int) -> SettingsError:
    """The refusal of a (height, width), with the neighbours that fit."""
    height, width = size
    below, above = (
        f"{_to_multiple(width, multiple, up)}x{_to_multiple(height, multiple, up)}"
        for up in (False, True)
    )
    return SettingsError(
        f"--size {width}x{height} is not a multiple of {multiple} on both sides. "
        f"Give {below} or {above}."
    )


def _to_multiple(value: int, multiple: int, up: bool) -> int:
    return max(multiple, (value + (multiple - 1 if up else 0)) // multiple * multiple)


def settings_path(output: Path) -> Path:
    """Where the settings of a result are saved: its name with `.json`."""
    return output.with_suffix(".json")


def output_exists(output: Path, label: str = "--output") -> InputError:
    """The refusal to replace a result."""
    return InputError(
        f"{label} {output} exists. Add --overwrite to replace it, or give another name."
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
    run = RunFolder(run_folder(settings.output))
    run.finish_removal()
    if settings.output.exists() and not run.holds_run():
        raise InputError(f"DIR {directory} holds an earlier {settings.output.name}. {advice}")
    names = (
        demo_record_path(directory).name,
        "driving.mp4",
        "driving_pose",
        "reference.png",
        "contact_sheet.png",
        settings_path(settings.output).name,
    )
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
    """What a demo shows, as the record beside its driving video keeps it."""
    return {"seed": settings.seed, "seconds": settings.seconds}


def demo_record_path(directory: Path) -> Path:
    """Where that record is."""
    return directory / "driving.json"


def read_demo_options(directory: Path) -> dict[str, float] | None:
    """What the demo in a folder shows; None if there is no demo."""
    try:
        record = json.loads(demo_record_path(directory).read_bytes())
        return {name: float(record[name]) for name in ("seed", "seconds")}
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
        _check_file("DRIVING", driving, _DRIVING_ADVICE)
        return
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
        if find_layout(folder) is None:
            raise WeightsError(
                f"--model {model} has no transformer/config.json. "
                "Give a checkpoint folder in diffusers or the original layout."
            )
        return
    hub_id = split_hub_id(model)
    if folder.exists() or hub_id is None or hub_id.path:
        raise SettingsError(
            f"--model {model} is unknown. Give '{TOY_MODEL}' (embedded, works offline), "
            f"a checkpoint folder, or a Hub id such as {HUB_MODEL}."
        )


def check_environment(environ: Mapping[str, str]) -> None:
    """Refuse variables at which the Hub's library would stumble while it is imported.

    Args:
        environ: Variables of the process.

    Raises:
        SettingsError: Naming the variable and its value.
    """
    address = environ.get("HF_ENDPOINT")
    if address is not None:
        problem = find_address_problem(address)
        if problem is not None:
            raise SettingsError(f"HF_ENDPOINT {address}".rstrip() + f" {problem}.")
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        value = environ.get(name)
        try:
            int(value or 0)
        except ValueError as error:
            raise SettingsError(f"{name} {value} is not a whole number of seconds.") from error


def find_address_problem(address: str) -> str | None:
    """What is wrong with the address of a Hub, and how to mend it; None for one that can be."""
    known = "Give an address such as https://huggingface.co"
    if not address:
        return f"is empty. {known}, or unset it"
    if "://" not in address:
        return f"is no address. Write https:// before it: https://{address}"
    try:
        parts = urlsplit(address)
        has_port = parts.port != 0
    except ValueError as error:  # in the words of the standard library
        return f"is no address ({str(error).partition(': ')[0]}). {known}"
    is_plain = address.isascii() and address.isprintable() and " " not in address
    if parts.scheme not in ("http", "https") or not parts.hostname or not has_port or not is_plain:
        return f"is no address of a Hub. {known}"
    return None


def check_transformer(path: Path) -> None:
    """Refuse a file that cannot hold a transformer; its content is looked at later.

    Raises:
        InputError: If the file is missing, empty or of another kind.
        SettingsError: If the package that reads it is not installed.
    """
    known = " or ".join(TRANSFORMER_SUFFIXES)
    advice = f"Give a {known} file of a Wan2.2-Animate transformer."
    _check_file("--transformer", path, advice)
    if path.suffix not in TRANSFORMER_SUFFIXES:
        raise InputError(f"--transformer {path} is not a {known} file. {advice}")
    if path.suffix == ".gguf" and find_spec("gguf") is None:
        raise SettingsError(
            f"--transformer {path} needs the package gguf. Run pip install 'everanimate[gguf]'."
        )


def check_lora(lora: LoraSpec, option: str = "--lora") -> None:
    """Refuse a LoRA that can be neither a file nor one on the Hub; asks no network.

    Args:
        lora: As given.
        option: That names it, for errors.

    Raises:
        InputError: If the file is missing, empty or of another kind, or a folder is not PEFT's.
    """
    path = Path(lora.source)
    advice = "Give a .safetensors file or a Hub id"
    advice += ", with its strength as FILE=SCALE." if option == "--lora" else "."
    if path.is_dir():
        for name in (PEFT_CONFIG, PEFT_WEIGHTS):
            if not (path / name).is_file():
                raise InputError(f"{option} {path} is a folder without PEFT's {name}. {advice}")
        return
    if path.exists():
        _check_file(option, path, advice)
        if path.suffix != ".safetensors":
            raise InputError(f"{option} {lora.source} is not a .safetensors file. {advice}")
        return
    hub_id = split_hub_id(lora.source)
    # owner/name.safetensors is a file that is missing: a repository is not called so.
    if hub_id is None or (not hub_id.path and path.suffix == ".safetensors"):
        raise InputError(f"{option} {lora.source} does not exist. {advice}")
    if hub_id.path and not hub_id.path.endswith(".safetensors"):
        raise InputError(f"{option} {lora.source} is not a .safetensors file. {advice}")


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
    _check_new_folder("--png", folder)
    if folder.is_dir() and not may_replace and any(folder.iterdir()):
        raise InputError(
            f"--png {folder} is not empty. Add --overwrite to write into it, "
            "or give another folder."
        )


def _check_new_folder(label: str, folder: Path) -> None:
    """Refuse what is no folder that can be written to, and cannot be made one."""
    # A link to nowhere does not exist, and yet is in the way.
    if not folder.is_dir() and (folder.exists() or folder.is_symlink()):
        raise InputError(f"{label} {folder} is a file. Give a folder.")
    if not folder.parent.is_dir():
        raise InputError(
            f"{label} {folder} cannot be made: the folder {folder.parent} does not exist. "
            "Make it first, or give another path."
        )
    writable = folder if folder.is_dir() else folder.parent
    if not os.access(writable, os.W_OK | os.X_OK):
        raise InputError(
            f"{label} {folder} cannot be written: the folder {writable} is not writable. "
            "Give another path."
        )


def check_analyze_roundtrip(settings: RoundtripSettings) -> None:
    """Refuse an analysis whose input is missing or whose folder cannot be written.

    Raises:
        InputError: If the file is missing or empty, or the folder is in the way.
        SettingsError: If the model's name fits nothing.
        WeightsError: If the model's folder is no checkpoint.
    """
    _check_file("VIDEO", settings.video, "Give a video or a picture.")
    check_model(settings.model)
    output = settings.output or settings.default_output
    _check_analysis_folder(output, ROUNDTRIP_FILES, settings.overwrite)


def check_analyze_attention(settings: AttentionSettings) -> None:
    """Refuse an analysis whose inputs are missing or whose folder cannot be written.

    Raises:
        InputError: If a file or folder is missing, empty, of the wrong kind or in the way.
        SettingsError: If the model's or a LoRA's name fits nothing.
        WeightsError: If the model's folder is no checkpoint.
    """
    output = settings.output or settings.default_output
    _check_analysis_folder(output, ATTENTION_FILES, settings.overwrite)
    # The video of this animation is never written.
    check_animate(replace(settings.to_animate(), overwrite=True))


def _check_analysis_folder(output: Path, files: Sequence[str], overwrite: bool) -> None:
    if output.name in ("", ".."):
        raise InputError(f"--output {output} has no name. Give the name of a folder to make.")
    if len(os.fsencode(output.name)) > _MAX_NAME_BYTES:
        raise InputError(f"--output {output} has too long a name. Give a shorter one.")
    _check_new_folder("--output", output)
    if overwrite or not output.is_dir():
        return
    present = {path.name for path in output.iterdir()}
    # An analysis that was interrupted while it wrote may be made again.
    if present and (files[-1] in present or not present.issubset(files)):
        shown = files[-1] if files[-1] in present else min(present)
        raise InputError(
            f"--output {output} holds {shown}. "
            "Add --overwrite to replace it, or give another folder."
        )


def check_eval(settings: EvalSettings) -> None:
    """Refuse an evaluation whose inputs are missing or whose files cannot be written.

    Videos are not opened yet.

    Raises:
        InputError: If a file or folder is missing, empty, of the wrong kind or in the way.
        SettingsError: If a model's name fits nothing.
        WeightsError: If the model's folder is no checkpoint.
    """
    inputs = set()
    for entry in list_entries(settings):
        _check_file("GENERATED", entry.generated, "Give a video to measure.")
        if entry.truth is not None:
            _check_file("--truth", entry.truth, "Give the video that it should equal.")
        if entry.reference is not None:
            _check_file("--reference", entry.reference, "Give a picture of the character.")
        if entry.driving is not None and not (entry.driving / "pose.mp4").is_file():
            problem = "has no pose.mp4" if entry.driving.is_dir() else "is no folder"
            problem = problem if entry.driving.exists() else "does not exist"
            raise InputError(
                f"--driving {entry.driving} {problem}. Give a folder made by extract-pose."
            )
        files = (entry.generated, entry.truth, entry.reference, settings.manifest)
        inputs |= {path.resolve() for path in files if path is not None}
    check_model(settings.model)
    if settings.pose_model is not None or settings.detector is not None:
        check_models(settings.pose_model or DEFAULT_POSE_MODEL, settings.detector)
    if settings.cache is not None:
        _check_new_folder("--cache", settings.cache)
    outputs = set()
    for name in ("output", "csv", "plot", "report"):
        path = getattr(settings, name)
        if path is None:
            continue
        label = option_name(name)
        _check_new_file(label, path, overwrite=settings.overwrite)
        if path.resolve() in inputs:
            raise InputError(f"{label} {path} is also an input. Give another name.")
        if path.resolve() in outputs:
            raise InputError(f"{label} {path} is also another result. Give another name.")
        outputs.add(path.resolve())


def _check_new_file(label: str, path: Path, *, overwrite: bool) -> None:
    """Refuse what is no file that can be made, or replaced with leave."""
    if path.is_dir():
        raise InputError(f"{label} {path} is a folder. Give a file name.")
    if not path.parent.is_dir():
        raise InputError(
            f"{label} {path} cannot be written: the folder {path.parent} does not exist. "
            "Make it first, or give another path."
        )
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(
            f"{label} {path} cannot be written: the folder {path.parent} is not writable. "
            "Give another path."
        )
    if path.exists() and not overwrite:
        raise output_exists(path, label)
