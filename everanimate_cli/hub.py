"""Find a checkpoint or a LoRA: embedded, in a folder, in the local cache, or on the Hub."""

from __future__ import annotations

import errno
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import huggingface_hub
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm as hub_tqdm  # type: ignore[attr-defined]
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from everanimate_cli.errors import SettingsError, WeightsError
from everanimate_cli.events import Note, OnEvent
from everanimate_cli.preflight import check_lora, check_model
from everanimate_cli.records import HubId, LoraSpec, split_hub_id
from everanimate_cli.settings import HUB_MODEL, TOY_MODEL, read_model_defaults
from everanimate_cli.weights import (
    NETWORKS,
    TOKENIZER_SUFFIXES,
    ModelSource,
    check_files,
    quiet_libraries,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from huggingface_hub import ModelInfo

TOY_FOLDER = Path(__file__).parent / "toy_model"

# What a Hub id without "@revision" means; repositories that are not listed mean "main". The
# commits of the released files (method page section 5) could not be looked up where this was
# written. The branch is resolved once: from then on the local cache answers, and the commit is
# recorded with every result.
HUB_REVISIONS = {HUB_MODEL: "main", "epfl-vita/everanimate": "main"}
# The released base as diffusers' conversion script writes it: 17.275 B parameters of the
# transformer in float32, text and image encoder in bfloat16, VAE in float32.
_HUB_MODEL_GB = 82

_HUB_TIMEOUT_S = 10.0
_NO_ACCESS = (401, 403, 404)
# What huggingface_hub lets through from its HTTP library: httpx, from version 2 on httpx2.
_HTTP_ERROR = cast("type[Exception]", HfHubHTTPError.__bases__[0])

_NUM_REPORTS = 10  # of one download

_CHECKPOINT_PATTERNS = [
    "model_index.json",
    "everanimate.json",
    "scheduler/*.json",
    "image_processor/*.json",
    *(f"{name}/*{suffix}" for name in NETWORKS for suffix in (".json", ".safetensors")),
    *(f"tokenizer/*{suffix}" for suffix in TOKENIZER_SUFFIXES),
]


def locate_model(model: str, on_event: OnEvent, *, download: bool = True) -> ModelSource:
    """Find a checkpoint, downloading it if it is on the Hub and not yet in the local cache.

    A repository in the cache is used as it is, without a question to the Hub, so that a result can
    be made again; another `@revision` fetches another one.

    Args:
        model: "toy", a checkpoint folder or a Hub id `owner/name[@revision]`.
        on_event: Told how far a download is.
        download: False refuses what is not in the cache.

    Returns:
        The folder with its defaults. Its weights are not checked yet, see `check_checkpoint`.

    Raises:
        SettingsError: If the name fits nothing.
        WeightsError: If the checkpoint is nowhere to be had, or says nothing usable of itself.
        OSError: If the disk is full.
    """
    check_model(model)
    revision = None
    hub_id = split_hub_id(model)
    if model == TOY_MODEL:
        folder = TOY_FOLDER
        if not folder.is_dir():
            raise WeightsError(
                f"--model {model} is missing in this installation ({folder}). "
                "Install everanimate again."
            )
    elif hub_id is None or Path(model).is_dir():
        folder = Path(model)
    else:
        folder = _fetch_model(model, hub_id, on_event, download)
        revision = folder.name  # the cache names a snapshot after its commit
    defaults = read_model_defaults(folder)
    return ModelSource(folder=folder, defaults=defaults, name=model, revision=revision)


def locate_lora(
    spec: LoraSpec,
    on_event: OnEvent | None = None,
    *,
    download: bool = True,
    option: str = "--lora",
) -> Path:
    """Find a LoRA file, downloading it if it is on the Hub and not yet in the local cache.

    Args:
        spec: A .safetensors file or a Hub id `owner/name/path/to/file.safetensors[@revision]`.
        on_event: Told how far a download is.
        download: False refuses what is not in the cache.
        option: That names it, for errors.

    Returns:
        The file; its keys are not checked yet.

    Raises:
        InputError: If the file does not exist.
        WeightsError: If it is nowhere to be had; lists the repository's files if it names none.
        OSError: If the disk is full.
    """
    check_lora(spec, option)
    path = Path(spec.source)
    hub_id = split_hub_id(spec.source)
    if hub_id is None or path.exists():
        return path
    label = f"{option} {spec.source}"
    _check_repository_name(label, hub_id)
    revision = _default_revision(hub_id)
    if hub_id.path:
        try:
            return Path(
                huggingface_hub.hf_hub_download(
                    hub_id.repository, hub_id.path, revision=revision, local_files_only=True
                )
            )
        except LocalEntryNotFoundError:
            problem = f"is not in the cache ({hub_constants.HF_HUB_CACHE})"
        purpose = "to download it"
        way_out = "give a .safetensors file, or use --model toy, which works offline"
    else:
        problem, purpose = "names no file", "to see its files"
        way_out = f"or give {hub_id.repository}/PATH/TO/FILE.safetensors"
    if not download:
        raise _not_downloaded(label, problem, way_out)
    info = _ask_hub(label, hub_id, problem, purpose, way_out)
    names = [file.rfilename for file in info.siblings or ()]
    names = [name for name in names if name.endswith(".safetensors")]
    if hub_id.path not in names:
        problem = f"has no {hub_id.path}" if hub_id.path else "names no file"
        known = ", ".join(f"{hub_id.repository}/{name}" for name in names)
        raise WeightsError(f"{label} {problem}. Known: {known or 'no .safetensors file'}.")
    progress = _announce_download(spec.source, info, [hub_id.path], on_event)
    return _download(
        label,
        hub_id,
        lambda: huggingface_hub.hf_hub_download(
            hub_id.repository, hub_id.path, revision=revision, tqdm_class=progress
        ),
    )


def _check_repository_name(label: str, hub_id: HubId) -> None:
    try:
        validate_repo_id(hub_id.repository)
    except HFValidationError as error:
        raise SettingsError(f"{label} is not a valid name of a Hub repository.") from error


def _default_revision(hub_id: HubId) -> str:
    return hub_id.revision or HUB_REVISIONS.get(hub_id.repository, "main")


def _fetch_model(model: str, hub_id: HubId, on_event: OnEvent, download: bool) -> Path:
    """Folder of a repository in the local cache, downloaded before if need be."""
    label = f"--model {model}"
    _check_repository_name(label, hub_id)
    revision = _default_revision(hub_id)
    state = "is not"
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                hub_id.repository,
                revision=revision,
                allow_patterns=_CHECKPOINT_PATTERNS,
                local_files_only=True,
            )
        )
        check_files(label, folder)
    except (IncompleteSnapshotError, WeightsError):
        # Only newer versions of the cache remember which files belong to a snapshot.
        state = "is only partly"
    except LocalEntryNotFoundError:
        pass
    else:
        return folder
    problem = f"{state} in the cache ({hub_constants.HF_HUB_CACHE})"
    size = f" (about {_HUB_MODEL_GB} GB)" if hub_id.repository == HUB_MODEL else ""
    way_out = "give a checkpoint folder, or use --model toy, which works offline"
    if not download:
        raise _not_downloaded(label, problem, way_out)
    info = _ask_hub(label, hub_id, problem, f"to download it{size}", way_out)
    names = [file.rfilename for file in info.siblings or ()]
    if "transformer/config.json" not in names:
        raise WeightsError(
            f"{label} has no transformer/config.json. Give a repository in diffusers layout."
        )
    needed = [
        name for name in names if any(fnmatch(name, pattern) for pattern in _CHECKPOINT_PATTERNS)
    ]
    progress = _announce_download(model, info, needed, on_event)
    return _download(
        label,
        hub_id,
        lambda: huggingface_hub.snapshot_download(
            hub_id.repository,
            revision=revision,
            allow_patterns=_CHECKPOINT_PATTERNS,
            tqdm_class=progress,
        ),
    )


def _not_downloaded(label: str, problem: str, way_out: str) -> WeightsError:
    """The refusal of what a plan alone is not worth."""
    return WeightsError(
        f"{label} {problem}, and --dry-run downloads nothing. Run it without, {way_out}."
    )


def _ask_hub(label: str, hub_id: HubId, problem: str, purpose: str, way_out: str) -> ModelInfo:
    """What the Hub says about a repository: its commit, its files and their sizes.

    One request with a time limit. Without a network the download functions themselves retry for
    23 s, or wait for the system's own limit, and log every try.

    Args:
        label: Option and value.
        hub_id: The repository.
        problem: Why the Hub is asked.
        purpose: What for.
        way_out: What helps if it cannot be asked.
    """
    try:
        with quiet_libraries():
            return huggingface_hub.HfApi().model_info(
                hub_id.repository,
                revision=_default_revision(hub_id),
                files_metadata=True,
                timeout=_HUB_TIMEOUT_S,
            )
    except OfflineModeIsEnabled as error:
        raise WeightsError(
            f"{label} {problem} and HF_HUB_OFFLINE is set. Unset it {purpose}, {way_out}."
        ) from error
    except HfHubHTTPError as error:
        raise _refusal(label, hub_id, error) from error
    except (_HTTP_ERROR, OSError) as error:
        raise WeightsError(
            f"{label} {problem} and {hub_constants.ENDPOINT} cannot be reached. "
            f"Connect to the network {purpose}, {way_out}."
        ) from error


def _refusal(label: str, hub_id: HubId, error: HfHubHTTPError) -> WeightsError:
    """The Hub's answer in one line."""
    endpoint = hub_constants.ENDPOINT
    if isinstance(error, GatedRepoError):
        return WeightsError(
            f"{label} is gated. Ask for access at {endpoint}/{hub_id.repository}, "
            "then log in with 'hf auth login'."
        )
    if isinstance(error, RevisionNotFoundError):
        return WeightsError(
            f"{label} has no revision {_default_revision(hub_id)}. "
            "Give a branch, a tag or a commit after '@'."
        )
    # The Hub answers 401 for a wrong name too, so as not to betray private ones.
    if error.response.status_code in _NO_ACCESS:
        return WeightsError(
            f"{label} is not on {endpoint}, or is private. "
            "Check the name, or log in with 'hf auth login'."
        )
    return WeightsError(
        f"{label} cannot be downloaded: {endpoint} answered {error.response.status_code}. "
        "Try again later."
    )


def _announce_download(
    name: str, info: ModelInfo, needed: Iterable[str], on_event: OnEvent | None
) -> type[hub_tqdm]:
    """Tell what is about to be downloaded; the class returned tells how far it is."""
    wanted = set(needed)
    num_bytes = sum(
        file.size or 0
        for file in info.siblings or ()
        if file.rfilename in wanted
        and not isinstance(
            huggingface_hub.try_to_load_from_cache(info.id, file.rfilename, revision=info.sha), str
        )
    )
    report = on_event or (lambda _event: None)
    report(Note(text=f"downloading {name}: {_gb(num_bytes)} GB to {hub_constants.HF_HUB_CACHE}"))
    return _progress_class(num_bytes, report)


def _progress_class(num_bytes: int, report: OnEvent) -> type[hub_tqdm]:
    """A bar for huggingface_hub that draws nothing and reports every tenth of a download."""
    num_told = 0

    class QuietBar(hub_tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._num_done = 0.0
            self._counts_bytes = kwargs.get("unit") == "B"  # another bar counts files
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal num_told
            self._num_done += n or 0
            num_reached = int(_NUM_REPORTS * self._num_done / max(num_bytes, 1))
            if self._counts_bytes and num_told < num_reached < _NUM_REPORTS:
                num_told = num_reached
                report(Note(text=f"downloaded {_gb(self._num_done)} of {_gb(num_bytes)} GB"))
            return cast("bool | None", super().update(n))

    return QuietBar


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f}"


def _download(label: str, hub_id: HubId, start: Callable[[], str]) -> Path:
    """Run a download; what goes wrong on the way becomes one line."""
    try:
        with quiet_libraries():
            return Path(start())
    except HfHubHTTPError as error:  # a gated repository tells its files, but gives none
        raise _refusal(label, hub_id, error) from error
    # hf_xet, which moves the large files, reports all trouble as RuntimeError.
    except (_HTTP_ERROR, OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise WeightsError(
            f"{label}: the download broke off ({reason}). "
            "Run the same command again; finished files are kept."
        ) from error
