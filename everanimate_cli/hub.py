"""Find a checkpoint or a LoRA: embedded, in a folder, in the local cache, or on the Hub.

Loads none of torch, diffusers and transformers.
"""

from __future__ import annotations

import errno
import glob
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from shlex import quote
from typing import TYPE_CHECKING, NamedTuple

import huggingface_hub
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from everanimate_cli.errors import SettingsError, WeightsError
from everanimate_cli.events import Note, OnEvent
from everanimate_cli.hub_transfer import (
    ADDRESS_ERROR,
    HTTP_ERROR,
    DamagedError,
    Meter,
    RemoteFile,
    amount,
    check_space,
    count_arrived,
    fetch_files,
    keep_reference,
    quiet_hub,
    storage_folder,
)
from everanimate_cli.lora_config import PEFT_CONFIG, PEFT_WEIGHTS, lora_weights_file
from everanimate_cli.model_folder import (
    CHECKPOINT_PATTERNS,
    NETWORKS,
    ModelSource,
    left_out,
)
from everanimate_cli.model_table import POSE_MODELS
from everanimate_cli.preflight import check_lora, check_model, find_address_problem
from everanimate_cli.records import HubId, LoraSpec, split_hub_id
from everanimate_cli.safetensors_header import WrongSizeError, read_tensor_entries
from everanimate_cli.settings import (
    DEFAULT_POSE_MODEL,
    HUB_MODEL,
    HUB_PRESET,
    TOY_MODEL,
    read_model_defaults,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from huggingface_hub import ModelInfo
    from huggingface_hub.hf_api import RepoSibling

TOY_FOLDER = Path(__file__).parent / "toy_model"

# What a Hub id without "@revision" means; repositories that are not listed mean "main". The base
# is the upload that diffusers' authors made; its file pages name the commit in short. That of the
# released LoRAs could not be looked up where this was written, but the authors' script fetches them
# by these names since 2026-05-28.
HUB_REVISIONS = {HUB_MODEL: "6f4df10", "epfl-vita/everanimate": "2026-05-31"}
# The released base as diffusers' conversion script writes it: 17.275 B parameters of the
# transformer in float32, text and image encoder in bfloat16, VAE in float32.
_HUB_MODEL_BYTES = {
    "transformer": 69_100_000_000,
    "vae": 508_000_000,
    "text_encoder": 11_370_000_000,
    "image_encoder": 1_262_000_000,
}
RELEASED_LORAS = tuple(
    f"epfl-vita/everanimate/ckpts/everanimate-v1-lora32/{stage}.safetensors"
    for stage in ("stage1_480p", "stage2_480p", "stage3_720p_beta")
)
# What `animate` needs for a raw video if no model is named, and what `--fast` needs besides.
DEFAULT_NAMES = (
    HUB_MODEL,
    *(spec.source for spec in HUB_PRESET.lora),
    DEFAULT_POSE_MODEL,
    POSE_MODELS[DEFAULT_POSE_MODEL].detector,
)
FAST_NAMES = tuple(spec.source for spec in HUB_PRESET.fast_lora)


class KnownLora(NamedTuple):
    """What is known of a published LoRA on the released base without its file.

    Attributes:
        rank: Of its matrices, which are bfloat16.
        has_image_layers: Whether it changes the keys and values of CLIP's tokens too, beside the
            400 layers that EverAnimate's training adapts.
    """

    rank: int
    has_image_layers: bool

    @property
    def num_bytes(self) -> int:
        """About what the file takes."""
        num_sides = 40 * (8 * 2 * 5120 + 2 * (5120 + 13824))
        if self.has_image_layers:
            num_sides += 40 * 2 * 2 * 5120
        return 2 * self.rank * num_sides


# By repository and path; ranks as the names state them.
_KNOWN_LORAS = {
    **dict.fromkeys(RELEASED_LORAS, KnownLora(rank=32, has_image_layers=False)),
    **{name.partition("@")[0]: KnownLora(rank=64, has_image_layers=True) for name in FAST_NAMES},
}

_GB = 10**9
_HUB_TIMEOUT_S = 10.0
_NO_ACCESS = (401, 403, 404)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHORT_COMMIT = re.compile(r"[0-9a-f]{7,39}")  # as git and the Hub's pages write it
_DAY = re.compile(r"\d{4}-\d\d-\d\d")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Asset:
    """Files of a repository on the Hub that are used together.

    Attributes:
        name: As the user gave it.
        label: How an error calls it.
        hub_id: Where they are.
        patterns: Which files.
        without: Which of them are not needed.
        is_whole: Whether a folder holds all that is needed.
        refuse: Refuses a repository that lacks them, given the names of its files.
        way_out: What helps where they cannot be had.
        command: That downloads them beforehand; empty where it is that very command.
        known_bytes: About how much it is; None if unknown.
    """

    name: str
    label: str
    hub_id: HubId
    patterns: tuple[str, ...]
    without: tuple[str, ...] = ()
    is_whole: Callable[[Path], bool]
    refuse: Callable[[Sequence[str]], None]
    way_out: str
    command: str = ""
    known_bytes: int | None = None

    @property
    def size(self) -> str:
        """About how much it is, for a reader; empty if unknown."""
        if self.known_bytes is None:
            return ""
        if self.known_bytes >= _GB:
            return f"about {self.known_bytes / _GB:.0f} GB"
        return f"about {self.known_bytes / 10**6:.0f} MB"

    @property
    def revision(self) -> str:
        """Branch, tag or commit."""
        return self.hub_id.revision or HUB_REVISIONS.get(self.hub_id.repository, "main")

    def selects(self, name: str) -> bool:
        """Whether a file of the repository is one of them."""
        return any(fnmatch(name, pattern) for pattern in self.patterns) and not any(
            fnmatch(name, pattern) for pattern in self.without
        )


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What the local cache holds of an asset.

    Attributes:
        folder: With the files, which are links in most caches.
        is_whole: Whether all is there.
        damage: What is wrong with the first weight file that is cut short, as a clause; None if
            there is none.
    """

    folder: Path
    is_whole: bool
    damage: str | None = None

    @property
    def commit(self) -> str:
        """The cache names a snapshot after it."""
        return self.folder.name


@dataclass(frozen=True, kw_only=True)
class Download:
    """What is to be downloaded of an asset.

    Attributes:
        asset: What.
        commit: Of the repository.
        files: All that it consists of.
        missing: Those that are not in the cache.
        num_arrived: Bytes of them that an earlier download has left.
    """

    asset: Asset
    commit: str
    files: tuple[RemoteFile, ...]
    missing: tuple[RemoteFile, ...]
    num_arrived: int

    @property
    def num_bytes(self) -> int:
        """That the missing files take in all."""
        return sum(file.num_bytes for file in self.missing)


class AbsentError(WeightsError):
    """Files are not in the local cache, and were not to be downloaded.

    Attributes:
        asset: They.
    """

    def __init__(self, asset: Asset, message: str) -> None:
        """Keep what is missing."""
        super().__init__(message)
        self.asset = asset


class UnreachableError(WeightsError):
    """The Hub gives no answer, so that it is not known whether it has what is wanted."""


# --- models --------------------------------------------------------------------------------------


def locate_model(
    model: str,
    on_event: OnEvent,
    *,
    download: bool = True,
    transformer: Path | None = None,
    networks: Sequence[str] = NETWORKS,
) -> ModelSource:
    """Find a checkpoint, downloading it if it is on the Hub and not yet in the local cache.

    A repository in the cache is used as it is, without a question to the Hub, so that a result can
    be made again; another `@revision` fetches another one.

    Args:
        model: "toy", a checkpoint folder or a Hub id `owner/name[@revision]`.
        on_event: Told how far a download is.
        download: False refuses what is not in the cache.
        transformer: File to take instead of the model's transformer, which is then not downloaded.
        networks: Those that are needed, and downloaded.

    Returns:
        The folder with its defaults. Its weights are not checked yet, see `check_checkpoint`.

    Raises:
        SettingsError: If the name fits nothing.
        AbsentError: If it would have to be downloaded and may not.
        WeightsError: If the checkpoint is nowhere to be had, the disk has no room for it, or it
            says nothing usable of itself.
        OSError: If the disk is full.
    """
    check_model(model)
    revision = None
    if model == TOY_MODEL:
        folder = TOY_FOLDER
        if not folder.is_dir():
            raise WeightsError(
                f"--model {model} is missing in this installation ({folder}). "
                "Install everanimate again."
            )
    elif Path(model).is_dir() or split_hub_id(model) is None:
        folder = Path(model)
    else:
        asset = model_asset(model, transformer, networks=networks)
        folder = _provide(asset, on_event, download)
        revision = folder.name
    defaults = read_model_defaults(folder)
    return ModelSource(
        folder=folder, defaults=defaults, name=model, revision=revision, transformer=transformer
    )


def model_asset(
    model: str,
    transformer: Path | None = None,
    option: str = "--model",
    networks: Sequence[str] = NETWORKS,
) -> Asset:
    """The files of a checkpoint on the Hub.

    Args:
        model: Hub id `owner/name[@revision]`.
        transformer: File to take instead of the model's transformer.
        option: That names it, for errors.
        networks: Those that are needed.

    Raises:
        SettingsError: If no repository can be called so.
    """
    label = f"{option} {model}".strip()

    def is_whole(folder: Path) -> bool:
        try:
            defaults = read_model_defaults(folder)
            ModelSource(
                folder=folder, defaults=defaults, name=model, transformer=transformer
            ).check_files(networks)
        except WeightsError:
            return False
        return True

    def refuse(names: Sequence[str]) -> None:
        marks = ("transformer/config.json", "diffusion_pytorch_model.safetensors.index.json")
        if not any(mark in names for mark in marks):
            raise WeightsError(
                f"{label} has no {marks[0]}. Give a repository in diffusers or the original layout."
            )

    hub_id = _hub_id(label, model)
    command, known_bytes = "", None
    if set(networks) == set(NETWORKS):
        command = pull_command([model], without_transformer=transformer is not None)
    if hub_id.repository == HUB_MODEL:
        needed = [name for name in networks if name != "transformer" or transformer is None]
        known_bytes = sum(_HUB_MODEL_BYTES[name] for name in needed)
    return Asset(
        name=model,
        label=label,
        hub_id=hub_id,
        patterns=CHECKPOINT_PATTERNS,
        without=left_out(transformer, networks),
        is_whole=is_whole,
        refuse=refuse,
        way_out="give a checkpoint folder, or use --model toy, which works offline",
        command=command,
        known_bytes=known_bytes,
    )


def pull_command(names: Sequence[str], *, without_transformer: bool = False) -> str:
    """The command that downloads models, as short as it can be written.

    Args:
        names: As the options of `animate` take them; those that it takes by itself need not be
            named.
        without_transformer: Whether a file from elsewhere takes the place of the transformer.
    """
    words = ["everanimate", "models", "pull"]
    if without_transformer:
        words.append("--no-transformer")
    if not {*DEFAULT_NAMES, *FAST_NAMES}.issuperset(names):
        words += [quote(name) for name in names]
    elif not set(DEFAULT_NAMES).issuperset(names):
        words.append("--fast")
    return " ".join(words)


# --- LoRAs ---------------------------------------------------------------------------------------


def locate_lora(
    spec: LoraSpec,
    on_event: OnEvent | None = None,
    *,
    download: bool = True,
    option: str = "--lora",
) -> Path:
    """Find a LoRA file, downloading it if it is on the Hub and not yet in the local cache.

    Args:
        spec: A .safetensors file, a folder of PEFT or a Hub id
            `owner/name/path/to/file.safetensors[@revision]`.
        on_event: Told how far a download is.
        download: False refuses what is not in the cache.
        option: That names it, for errors.

    Returns:
        The file; its keys are not checked yet.

    Raises:
        InputError: If the file does not exist.
        AbsentError: If it would have to be downloaded and may not.
        WeightsError: If it is nowhere to be had, or the disk has no room for it; lists the
            repository's files if it names none.
        OSError: If the disk is full.
    """
    check_lora(spec, option)
    path = Path(spec.source)
    if split_hub_id(spec.source) is None or path.exists():
        return lora_weights_file(path)
    asset = lora_asset(spec.source, option)
    return _provide(asset, on_event or (lambda _event: None), download) / asset.hub_id.path


def lora_asset(source: str, option: str = "--lora") -> Asset:
    """The file of a LoRA on the Hub.

    Args:
        source: Hub id `owner/name/path/to/file.safetensors[@revision]`.
        option: That names it, for errors.

    Raises:
        SettingsError: If no repository can be called so.
    """
    label = f"{option} {source}".strip()
    hub_id = _hub_id(label, source)
    paths = [hub_id.path]
    # PEFT's matrices count as their configuration says.
    if PurePosixPath(hub_id.path).name == PEFT_WEIGHTS:
        paths.append(str(PurePosixPath(hub_id.path).with_name(PEFT_CONFIG)))

    def refuse(names: Sequence[str]) -> None:
        found = [name for name in names if name.endswith(".safetensors")]
        if hub_id.path not in found:
            problem = f"has no {hub_id.path}" if hub_id.path else "names no file"
            known = ", ".join(f"{hub_id.repository}/{name}" for name in found)
            raise WeightsError(f"{label} {problem}. Known: {known or 'no .safetensors file'}.")
        missing = [path for path in paths if path not in names]
        if missing:
            raise WeightsError(f"{label} has no {missing[0]} beside it. Give another LoRA.")

    way_out = "give a .safetensors file, or use --model toy, which works offline"
    known = known_lora(source)
    if not hub_id.path:
        way_out = f"or give {hub_id.repository}/PATH/TO/FILE.safetensors"
    return Asset(
        name=source,
        label=label,
        hub_id=hub_id,
        patterns=tuple(glob.escape(path) for path in paths),
        is_whole=lambda folder: (
            bool(hub_id.path) and all((folder / path).is_file() for path in paths)
        ),
        refuse=refuse,
        way_out=way_out,
        command=pull_command([source]) if hub_id.path else "",
        known_bytes=None if known is None else known.num_bytes,
    )


def known_lora(source: str) -> KnownLora | None:
    """What is known of a LoRA that is not on this machine; None if nothing is."""
    hub_id = split_hub_id(source)
    return None if hub_id is None else _KNOWN_LORAS.get(f"{hub_id.repository}/{hub_id.path}")


def _hub_id(label: str, text: str) -> HubId:
    hub_id = split_hub_id(text)
    assert hub_id is not None, text
    try:
        validate_repo_id(hub_id.repository)
    except HFValidationError as error:
        raise SettingsError(f"{label} is not a valid name of a Hub repository.") from error
    if PurePosixPath(hub_id.revision or "").is_absolute():  # becomes a path in the cache
        raise SettingsError(
            f"{label} has no valid revision. Give a branch, a tag or a commit after '@'."
        )
    return hub_id


# --- cache ---------------------------------------------------------------------------------------


def find_snapshot(asset: Asset) -> Snapshot | None:
    """What the local cache holds of an asset; asks no network."""
    storage = storage_folder(asset.hub_id.repository)
    commit = asset.revision
    if not _COMMIT.fullmatch(commit):
        commit = _find_commit(storage, asset.revision)
    folder = storage / "snapshots" / commit
    if not _COMMIT.fullmatch(commit) or not folder.is_dir():
        return None
    damage = _find_damage(asset, folder)
    is_whole = damage is None and asset.is_whole(folder)
    if is_whole:
        try:
            # Newer versions of the cache remember which files belong to a snapshot.
            with quiet_hub():
                huggingface_hub.snapshot_download(
                    asset.hub_id.repository,
                    revision=commit,
                    allow_patterns=list(asset.patterns),
                    ignore_patterns=list(asset.without),
                    local_files_only=True,
                )
        except LocalEntryNotFoundError:
            is_whole = False
    return Snapshot(folder=folder, is_whole=is_whole, damage=damage)


def _find_commit(storage: Path, revision: str) -> str:
    """What a branch, a tag or the beginning of a commit means in the cache; empty if unknown."""
    if _SHORT_COMMIT.fullmatch(revision):
        begun = [path.name for path in (storage / "snapshots").glob(f"{revision}*")]
        if len(begun) == 1:
            return begun[0]
    try:
        return (storage / "refs" / revision).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _find_damage(asset: Asset, folder: Path) -> str | None:
    """What `Snapshot.damage` tells; only headers and sizes are looked at."""
    for path in sorted(folder.rglob("*.safetensors")):
        name = path.relative_to(folder).as_posix()
        if asset.selects(name) and path.is_file():
            try:
                read_tensor_entries(path)
            except WrongSizeError:
                return f"{name} is cut short"
            except WeightsError:  # whole, and refused where it is used
                continue
    return None


def _provide(asset: Asset, on_event: OnEvent, download: bool) -> Path:
    """Folder of an asset in the local cache, downloaded before if need be."""
    found = find_snapshot(asset)
    if found is not None and found.is_whole:
        return found.folder
    if not download:
        problem = describe_absence(asset, found)
        remedy = f"Run {asset.command} first" if asset.command else "Run it without"
        raise AbsentError(
            asset,
            f"{asset.label} {problem}, and --dry-run downloads nothing. {remedy}, {asset.way_out}.",
        )
    return fetch(plan_download(asset), on_event)


def describe_absence(asset: Asset, found: Snapshot | None) -> str:
    """Why an asset has to be downloaded, as the predicate of a sentence."""
    if not any(asset.patterns):
        return "names no file"
    state = "is only partly" if found is not None else "is not"
    damage = "" if found is None or found.damage is None else f", where {found.damage},"
    return f"{state} in the cache ({hub_constants.HF_HUB_CACHE}){damage}"


# --- download ------------------------------------------------------------------------------------


def plan_download(asset: Asset) -> Download:
    """Ask the Hub what an asset consists of, and see what the cache lacks.

    What is there in part is completed as it was, wherever its branch has gone since.

    Raises:
        UnreachableError: If the Hub gives no answer.
        WeightsError: If the Hub cannot be asked or does not have it.
    """
    found = find_snapshot(asset)
    problem = describe_absence(asset, found)
    begun = found is not None and any(
        asset.selects(path.relative_to(found.folder).as_posix())
        for path in found.folder.rglob("*")
        if path.is_file()
    )
    if begun and found is not None:
        pinned = replace(asset, hub_id=asset.hub_id._replace(revision=found.commit))
        try:
            return _plan_from(pinned, _ask_hub(pinned, problem))
        except WeightsError as error:
            # Its publisher may have rewritten the history.
            if not isinstance(error.__cause__, RevisionNotFoundError):
                raise
    return _plan_from(asset, _ask_hub(asset, problem))


def _plan_from(asset: Asset, info: ModelInfo) -> Download:
    """What is to be downloaded of an asset as the Hub describes it."""
    commit = str(info.sha)
    try:
        described = [_describe_file(file) for file in info.siblings or ()]
        if not _COMMIT.fullmatch(commit):
            raise ValueError(commit)
    except (ValueError, TypeError) as error:
        raise _no_hub(asset) from error
    asset.refuse([file.name for file in described])
    files = tuple(file for file in described if asset.selects(file.name))
    snapshot = storage_folder(asset.hub_id.repository) / "snapshots" / commit
    missing = tuple(file for file in files if not _is_whole_file(snapshot / file.name, file))
    repository = asset.hub_id.repository
    return Download(
        asset=asset,
        commit=commit,
        files=files,
        missing=missing,
        num_arrived=sum(count_arrived(repository, file) for file in missing),
    )


def _is_whole_file(path: Path, file: RemoteFile) -> bool:
    """Whether a file is in the cache, of the size that the Hub states where it states one."""
    return path.exists() and file.num_bytes in (0, path.stat().st_size)


def _describe_file(file: RepoSibling) -> RemoteFile:
    """What the Hub says about a file; its hash becomes a name in the cache.

    Raises:
        ValueError: If that cannot be, such as a name outside of the repository.
        TypeError: Likewise.
    """
    path = PurePosixPath(file.rfilename)
    sha256 = None if file.lfs is None else file.lfs.sha256
    num_bytes = file.size
    if num_bytes is None:
        num_bytes = 0 if file.lfs is None else file.lfs.size
    is_outside = path.is_absolute() or ".." in path.parts
    if is_outside or num_bytes < 0 or (sha256 is not None and not _SHA256.fullmatch(sha256)):
        raise ValueError(file.rfilename)
    return RemoteFile(
        name=file.rfilename, num_bytes=num_bytes, sha256=sha256, git_sha1=file.blob_id or ""
    )


def fetch(download: Download, on_event: OnEvent) -> Path:
    """Download what is missing of an asset.

    All files are of the commit that was planned with, wherever the branch has gone since.

    Args:
        download: From `plan_download`.
        on_event: Told how far it is.

    Returns:
        The folder in the cache.

    Raises:
        WeightsError: If the disk has no room, the Hub refuses, or the connection is lost.
        OSError: If the disk is full.
    """
    asset = download.asset
    repository = asset.hub_id.repository
    check_space(asset.label, download.num_bytes - download.num_arrived)
    size = amount(download.num_bytes)
    if download.num_arrived:
        size += f", of which {amount(download.num_arrived)} are there"
    on_event(Note(text=f"downloading {asset.name}: {size}, to {hub_constants.HF_HUB_CACHE}"))
    meter = Meter(asset.name, download.num_bytes, download.num_arrived, on_event)
    try:
        with quiet_hub():
            # Larger files are not to be had over plain HTTP; huggingface_hub brings them by Xet.
            large = [
                file
                for file in download.missing
                if file.sha256 is not None
                and file.num_bytes <= hub_constants.MAX_HTTP_DOWNLOAD_SIZE
            ]
            blobs = storage_folder(repository) / "blobs"
            for file in download.missing:
                _discard(storage_folder(repository), f"snapshots/{download.commit}/{file.name}")
            absent = [file for file in large if not (blobs / str(file.sha256)).exists()]
            fetch_files(repository, download.commit, absent, meter, on_event)
            # Puts what has come to its place, and brings the small files.
            folder = huggingface_hub.snapshot_download(
                repository,
                revision=download.commit,
                allow_patterns=list(asset.patterns),
                ignore_patterns=list(asset.without),
                tqdm_class=meter.bar_class(),
            )
            keep_reference(repository, asset.revision, download.commit)
    except HfHubHTTPError as error:  # a gated repository tells its files, but gives none
        raise _refusal(asset, error) from error
    # hf_xet, which moves files whose sha256 is not stated, reports all trouble as RuntimeError;
    # huggingface_hub what it does not like of a file as ValueError.
    except (HTTP_ERROR, OSError, RuntimeError, ValueError, DamagedError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        if isinstance(error, OSError) and error.filename is not None:
            raise _unusable_cache(asset, error) from error
        raise WeightsError(
            f"{asset.label}: the download broke off ({_one_line(error)}). "
            "Run the same command again to go on; what has arrived is kept."
        ) from error
    meter.finish()
    return Path(folder)


def _discard(storage: Path, name: str) -> None:
    """Delete a file of another size than is stated, and what it links to within the cache."""
    path = storage / name
    if path.exists():
        content = path.resolve()
        path.unlink()
        if content.is_relative_to(storage.resolve()):  # links elsewhere are the user's own
            content.unlink(missing_ok=True)


def _ask_hub(asset: Asset, problem: str) -> ModelInfo:
    """What the Hub says about a repository: its commit, its files and their sizes.

    A request with a time limit. Without a network the download functions themselves retry for
    23 s, or wait for the system's own limit, and log every try.

    Args:
        asset: What is wanted of it.
        problem: Why the Hub is asked.
    """
    size = f" ({asset.size})" if asset.size else ""
    purpose = f"to download it{size}" if any(asset.patterns) else "to see its files"
    if asset.command:
        purpose = f"and run {asset.command}{size}"
    _check_endpoint(asset)
    try:
        with quiet_hub():
            return _describe_repository(asset.hub_id.repository, asset.revision)
    except OfflineModeIsEnabled as error:
        raise UnreachableError(
            f"{asset.label} {problem} and HF_HUB_OFFLINE is set. Unset it {purpose}, "
            f"{asset.way_out}."
        ) from error
    except HfHubHTTPError as error:
        raise _refusal(asset, error) from error
    except (HTTP_ERROR, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:  # of the token, in HF_HOME
            raise _unusable_cache(asset, error) from error
        raise UnreachableError(
            f"{asset.label} {problem} and {hub_constants.ENDPOINT} cannot be reached. "
            f"Connect to the network {purpose}, {asset.way_out}."
        ) from error
    except ADDRESS_ERROR as error:  # the Hub's own address has been looked at before
        raise WeightsError(
            f"{asset.label} {problem}, and a proxy of the environment has no valid address: "
            f"{_one_line(error)}. Check HTTPS_PROXY, HTTP_PROXY and ALL_PROXY."
        ) from error
    except UnicodeEncodeError as error:
        raise WeightsError(
            f"{asset.label} {problem}, and the token is none: it holds more than ASCII. Give "
            "another HF_TOKEN, or log in with 'hf auth login'."
        ) from error
    except ImportError as error:  # the proxy in the environment is of another kind than HTTP
        raise WeightsError(
            f"{asset.label} {problem}, and nothing can be asked: {_one_line(error)}."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _no_hub(asset) from error


def _describe_repository(repository: str, revision: str) -> ModelInfo:
    """A repository at a revision.

    Beside branches, tags and whole commits, which the Hub itself takes, the beginning of a commit
    of the main branch, or a day, which means the last commit of that day (UTC) or before.
    """

    def ask(revision: str) -> ModelInfo:
        return api.model_info(
            repository, revision=revision, files_metadata=True, timeout=_HUB_TIMEOUT_S
        )

    api = huggingface_hub.HfApi()
    if _DAY.fullmatch(revision):
        try:
            return ask(revision)  # a tag may be called so
        except RevisionNotFoundError:
            for commit in api.list_repo_commits(repository):  # the newest first
                if commit.created_at.astimezone(UTC).date().isoformat() <= revision:
                    return ask(commit.commit_id)
            raise
    if not _SHORT_COMMIT.fullmatch(revision):
        return ask(revision)
    newest = ask(hub_constants.DEFAULT_REVISION)
    if str(newest.sha).startswith(revision):
        return newest
    commits = [commit.commit_id for commit in api.list_repo_commits(repository)]
    begun = [commit for commit in commits if commit.startswith(revision)]
    return ask(begun[0] if len(begun) == 1 else revision)


def _unusable_cache(asset: Asset, error: OSError) -> WeightsError:
    return WeightsError(
        f"{asset.label} cannot be kept in the cache ({hub_constants.HF_HUB_CACHE}): "
        f"{error.strerror}, {error.filename}. Make it writable, or name another folder in HF_HOME."
    )


def _check_endpoint(asset: Asset) -> None:
    """Refuse an address that no Hub can have."""
    problem = find_address_problem(hub_constants.ENDPOINT)
    if problem is not None:
        raise WeightsError(
            f"{asset.label} cannot be downloaded: HF_ENDPOINT {hub_constants.ENDPOINT} {problem}."
        )


def _one_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def _no_hub(asset: Asset) -> UnreachableError:
    """What answers is something else, such as the page where a hotel asks for a login."""
    return UnreachableError(
        f"{asset.label} cannot be downloaded: {hub_constants.ENDPOINT} does not answer as the Hub "
        "does. Check HF_ENDPOINT, and in a browser whether the network asks for a login."
    )


def _refusal(asset: Asset, error: HfHubHTTPError) -> WeightsError:
    """The Hub's answer in one line."""
    endpoint = hub_constants.ENDPOINT
    if isinstance(error, GatedRepoError):
        return WeightsError(
            f"{asset.label} is gated. Ask for access at {endpoint}/{asset.hub_id.repository}, "
            "then log in with 'hf auth login'."
        )
    if isinstance(error, RevisionNotFoundError):
        return WeightsError(
            f"{asset.label} has no revision {asset.revision}. "
            "Give a branch, a tag or a commit after '@'."
        )
    # The Hub answers 401 for a wrong name too, so as not to betray private ones.
    if error.response.status_code in _NO_ACCESS:
        return WeightsError(
            f"{asset.label} is not on {endpoint}, or is private. "
            "Check the name, or log in with 'hf auth login'."
        )
    return UnreachableError(
        f"{asset.label} cannot be downloaded: {endpoint} answered {error.response.status_code}. "
        "Try again later."
    )
