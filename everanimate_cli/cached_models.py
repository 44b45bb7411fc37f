"""Which models the local caches hold, and whether they are what their publishers state.

Checkpoints and LoRAs lie in the cache of the Hub, pose models and detectors in one of our own.

Loads none of torch, diffusers and transformers: what a script on a cluster asks is told at once.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub import constants as hub_constants

from everanimate_cli import downloads
from everanimate_cli.errors import InputError, WeightsError
from everanimate_cli.events import Note, OnEvent, PhaseAdvanced, PhaseStarted
from everanimate_cli.hub import (
    DEFAULT_NAMES,
    FAST_NAMES,
    RELEASED_LORAS,
    TOY_FOLDER,
    Asset,
    Download,
    UnreachableError,
    fetch,
    find_snapshot,
    lora_asset,
    model_asset,
    plan_download,
)
from everanimate_cli.hub_transfer import amount, check_space
from everanimate_cli.model_folder import find_layout
from everanimate_cli.model_table import DETECTORS, POSE_MODELS, ModelFile
from everanimate_cli.records import split_hub_id
from everanimate_cli.settings import HUB_MODEL, TOY_MODEL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

State = Literal["embedded", "folder", "complete", "partial", "absent"]
Kind = Literal["model", "lora", "pose model", "detector"]
Use = Literal["default", "fast"]

KNOWN_NAMES = (
    TOY_MODEL,
    HUB_MODEL,
    *RELEASED_LORAS,
    *FAST_NAMES,
    *(name for name, pose_model in POSE_MODELS.items() if pose_model.files),
    *(name for name, detector in DETECTORS.items() if detector.files),
)

_WAY_OUT = "or copy the cache of a machine that has it"
_ANOTHER_FILE = Path("transformer.safetensors")  # stands for the one that `animate` will be given
_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT_SHA1 = re.compile(r"[0-9a-f]{40}")
_BLOCK_BYTES = 2**22
_STATES: dict[State, str] = {
    "embedded": "embedded",
    "folder": "a folder",
    "complete": "in the cache",
    "partial": "partly in the cache",
    "absent": "not in the cache",
}
_USES: dict[Use, str] = {"default": "used by default", "fast": "used by animate --fast"}


@dataclass(frozen=True, kw_only=True)
class CachedModel:
    """A model of any kind, and what is on this machine of it.

    Attributes:
        name: As on the command line of `animate`.
        kind: What it is.
        state: Where it is.
        num_bytes: What is on this machine.
        path: Folder of a checkpoint, file of another model; None if nothing is there.
        revision: Commit on the Hub; None for what is not from there.
        size: About how much it is in all, for a reader; empty if unknown.
    """

    name: str
    kind: Kind
    state: State
    num_bytes: int
    path: Path | None
    revision: str | None
    size: str = ""

    @property
    def use(self) -> Use | None:
        """Which runs take it without being told."""
        if self.name in DEFAULT_NAMES:
            return "default"
        return "fast" if self.name in FAST_NAMES else None

    @property
    def is_whole(self) -> bool:
        """Whether it can be used as it is."""
        return self.state not in ("partial", "absent")

    def describe(self) -> str:
        """One line for a reader."""
        parts = [_STATES[self.state]]
        if self.num_bytes:
            parts.append(amount(self.num_bytes))
        if self.size and not self.is_whole:
            parts.append(f"{self.size} in all")
        if self.revision is not None:
            parts.append(f"revision {self.revision}")
        return f"{self.kind} {self.name}: {', '.join(parts)}"

    def describe_with_use(self) -> str:
        """The same for a list of models of which not all are needed."""
        return self.describe() + ("" if self.use is None else f", {_USES[self.use]}")

    def to_json(self) -> dict[str, Any]:
        """All about it."""
        return {
            "name": self.name,
            "kind": self.kind,
            "state": self.state,
            "num_bytes": self.num_bytes,
            "revision": self.revision,
            "path": None if self.path is None else str(self.path),
            "use": self.use,
        }


def inspect_model(name: str) -> CachedModel:
    """Look for a model; asks no network.

    Args:
        name: "toy", a checkpoint folder, `owner/name[@revision]`, the Hub id of a LoRA file, or
            the name of a pose model or detector.

    Raises:
        InputError: If the name fits nothing.
        SettingsError: If no repository can be called so.
    """
    if _pose_files(name):
        return _inspect_pose_model(name)
    folder = TOY_FOLDER if name == TOY_MODEL else Path(name)
    if name == TOY_MODEL or _is_folder(name):
        return CachedModel(
            name=name,
            kind="model",
            state="embedded" if name == TOY_MODEL else "folder",
            num_bytes=sum(path.stat().st_size for _, path in _list_files(folder)),
            path=folder,
            revision=None,
        )
    asset = asset_of(name)
    found = find_snapshot(asset)
    kind: Kind = "lora" if asset.hub_id.path else "model"
    files = []
    if found is not None:
        files = [path for file, path in _list_files(found.folder) if asset.selects(file)]
    if found is None or not files:  # another file of the repository may be there
        return CachedModel(
            name=name,
            kind=kind,
            state="absent",
            num_bytes=0,
            path=None,
            revision=None,
            size=asset.size,
        )
    return CachedModel(
        name=name,
        kind=kind,
        state="complete" if found.is_whole else "partial",
        num_bytes=sum(path.stat().st_size for path in files),
        path=found.folder / asset.hub_id.path if asset.hub_id.path else found.folder,
        revision=found.commit,
        size=asset.size,
    )


def _is_folder(name: str) -> bool:
    """Whether a name is that of a folder with a checkpoint.

    Raises:
        InputError: If it is a folder with something else.
    """
    if not name or not Path(name).is_dir():
        return False
    if find_layout(Path(name)) is None:
        raise InputError(
            f"{name} is a folder without a checkpoint: it has no transformer/config.json. "
            "Give a checkpoint folder in diffusers or the original layout."
        )
    return True


def _pose_files(name: str) -> tuple[ModelFile, ...]:
    """The files of a pose model or detector; none for any other name and for the toy's."""
    model = POSE_MODELS.get(name) or DETECTORS.get(name)
    return () if model is None else model.files


def _inspect_pose_model(name: str) -> CachedModel:
    files = _pose_files(name)
    paths = [downloads.cache_folder() / file.name for file in files]
    present = [path for path in paths if path.is_file()]
    state: State = "complete" if len(present) == len(paths) else "partial"
    return CachedModel(
        name=name,
        kind="pose model" if name in POSE_MODELS else "detector",
        state=state if present else "absent",
        num_bytes=sum(path.stat().st_size for path in present),
        path=paths[0] if present else None,
        revision=None,
        size=f"about {sum(file.num_mb for file in files)} MB",
    )


def _fetch_pose_model(name: str, on_event: OnEvent, *, download: bool) -> None:
    """Download what is missing of a pose model; what is there is compared with its checksum."""
    for file in _pose_files(name):
        downloads.fetch(
            file.urls,
            name=file.name,
            sha256=file.sha256,
            label=name,
            way_out="copy the cache of a machine that has it",
            on_event=on_event,
            download=download,
        )


def asset_of(name: str) -> Asset:
    """What a name means on the Hub.

    Raises:
        InputError: If it means nothing there.
        SettingsError: If no repository can be called so.
    """
    hub_id = split_hub_id(name)
    if hub_id is None or Path(name).exists():
        raise InputError(
            f"{name or 'NAME'} is unknown. Give a Hub id such as {HUB_MODEL}, or of a LoRA such as "
            f"{RELEASED_LORAS[1]}, or a name that models list shows."
        )
    if not hub_id.path:
        return replace(model_asset(name, option=""), way_out=_WAY_OUT, command="")
    if not hub_id.path.endswith(".safetensors"):
        raise InputError(f"{name} is not a .safetensors file. Give the Hub id of a LoRA.")
    return replace(lora_asset(name, option=""), way_out=_WAY_OUT, command="")


def locate(name: str) -> Path:
    """Folder of a checkpoint, or file of another model.

    Raises:
        WeightsError: If it is not on this machine, or not all of it.
        InputError: If the name fits nothing.
    """
    found = inspect_model(name)
    if not found.is_whole or found.path is None:
        raise WeightsError(
            f"{name} is {_STATES[found.state]} ({_cache_of(found)}). "
            f"Run everanimate models pull {name}."
        )
    return found.path.absolute()


def _cache_of(model: CachedModel) -> str:
    is_ours = model.kind in ("pose model", "detector")
    return str(downloads.cache_folder()) if is_ours else hub_constants.HF_HUB_CACHE


# --- pull ----------------------------------------------------------------------------------------


def plan_pull(names: Sequence[str], *, without_transformer: bool) -> list[Download | CachedModel]:
    """What is to be downloaded, in the order of the names.

    What is there is a `CachedModel`, and so are pose models, whose files are known without asking.

    Args:
        names: See `inspect_model`.
        without_transformer: Whether a file from elsewhere takes the place of the transformer.

    Raises:
        WeightsError: If the Hub cannot be asked or does not have one, or the disk has no room.
        InputError: If a name fits nothing.
        SettingsError: If no repository can be called so.
    """
    steps: list[Download | CachedModel] = []
    for name in names:
        if name == TOY_MODEL or _pose_files(name) or _is_folder(name):
            here = inspect_model(name)
            if hub_constants.HF_HUB_OFFLINE and not here.is_whole:
                raise WeightsError(
                    f"{name} is {_STATES[here.state]} ({_cache_of(here)}) and HF_HUB_OFFLINE is "
                    f"set. Unset it to download it ({here.size}), {_WAY_OUT}."
                )
            steps.append(here)
            continue
        asset = asset_of(name)
        if without_transformer and not asset.hub_id.path:
            partly = model_asset(name, transformer=_ANOTHER_FILE, option="")
            asset = replace(partly, way_out=_WAY_OUT, command="")
        found = find_snapshot(asset)
        if found is None or not found.is_whole:
            steps.append(plan_download(asset))
        else:
            steps.append(replace(inspect_model(name), state="complete"))
    downloads = [step for step in steps if isinstance(step, Download)]
    label = " and ".join(download.asset.name for download in downloads)
    check_space(label, sum(download.num_bytes - download.num_arrived for download in downloads))
    return steps


def describe_step(step: Download | CachedModel) -> dict[str, Any]:
    """A step of `plan_pull` as JSON."""
    if isinstance(step, CachedModel):
        missing = _missing_pose_files(step.name)
        num_bytes = sum(file.num_mb for file in missing) * 10**6
        return step.to_json() | {
            "num_bytes": step.num_bytes + num_bytes,
            "missing_files": len(missing),
            "missing_bytes": num_bytes,
        }
    return {
        "name": step.asset.name,
        "kind": "lora" if step.asset.hub_id.path else "model",
        "num_bytes": sum(file.num_bytes for file in step.files),
        "revision": step.commit,
        "missing_files": len(step.missing),
        "missing_bytes": step.num_bytes - step.num_arrived,
    }


@dataclass(frozen=True, kw_only=True)
class Lack:
    """What a run would have to download before it starts.

    Attributes:
        name: As on the command line of `animate`.
        num_bytes: How much; None if unknown.
        is_stated: Whether the Hub has said so, and not an estimate.
    """

    name: str
    num_bytes: int | None
    is_stated: bool

    def to_json(self) -> dict[str, Any]:
        """As a plan shows it."""
        known = "stated by the Hub" if self.is_stated else "estimated"
        return {
            "name": self.name,
            "size_mb": None if self.num_bytes is None else round(self.num_bytes / 10**6, 1),
            "size_is": "unknown" if self.num_bytes is None else known,
        }


def find_lacks(assets: Sequence[Asset], pose_models: Sequence[str]) -> list[Lack]:
    """How much is to be downloaded; without a network what is known of it.

    Args:
        assets: That the cache has not.
        pose_models: Names of pose models and detectors that may be in the cache; others are passed
            over.

    Raises:
        WeightsError: If the Hub says that it does not have one.
    """
    lacks, is_reachable = [], True
    for asset in assets:
        num_bytes, is_stated = asset.known_bytes, False
        if is_reachable:
            try:
                download = plan_download(asset)
                num_bytes, is_stated = download.num_bytes - download.num_arrived, True
            except UnreachableError:
                is_reachable = False  # each further question may take the time limit
        lacks.append(Lack(name=asset.name, num_bytes=num_bytes, is_stated=is_stated))
    for name in pose_models:
        num_bytes = sum(file.num_mb for file in _missing_pose_files(name)) * 10**6
        if num_bytes:
            lacks.append(Lack(name=name, num_bytes=num_bytes, is_stated=False))
    return lacks


def _missing_pose_files(name: str) -> list[ModelFile]:
    folder = downloads.cache_folder()
    return [file for file in _pose_files(name) if not (folder / file.name).is_file()]


def pull(step: Download | CachedModel, on_event: OnEvent) -> CachedModel:
    """Do one step of `plan_pull`.

    Returns:
        What is there now.

    Raises:
        WeightsError: If the Hub refuses or the connection is lost.
        OSError: If the disk is full.
    """
    if isinstance(step, CachedModel) and step.is_whole:
        on_event(Note(text=step.describe()))
        return step
    if isinstance(step, CachedModel):
        _fetch_pose_model(step.name, on_event, download=True)
        return inspect_model(step.name)
    fetch(step, on_event)
    found = inspect_model(step.asset.name)
    return replace(found, state="complete") if step.asset.without else found


def describe_fast_lack() -> list[str]:
    """What a user who has the default models should know of `--fast`; asks no network."""
    missing = [model for model in map(inspect_model, FAST_NAMES) if not model.is_whole]
    return [
        f"animate --fast needs another LoRA ({model.size}): everanimate models pull --fast"
        for model in missing[:1]
    ]


# --- verify --------------------------------------------------------------------------------------


def check_hashes(name: str, on_event: OnEvent) -> tuple[int, list[str]]:
    """Compare the files of a model in the cache with what their publisher states.

    The cache of the Hub calls the content of a file by its hash, so that no network is needed;
    where it keeps files under their own names (on Windows), the Hub is asked.

    Args:
        name: See `inspect_model`; of folders and of the toy nothing is known.
        on_event: Told how far it is.

    Returns:
        Number of files that were compared, and what is wrong, a sentence for each.

    Raises:
        WeightsError: If it is not in the cache, or hashes must be asked for and cannot.
    """
    found = inspect_model(name)
    if _pose_files(name) and found.path is not None:
        try:
            _fetch_pose_model(name, on_event, download=False)
        except WeightsError as error:
            return len(_pose_files(name)), [str(error).rstrip(".")]
        return len(_pose_files(name)), []
    if found.revision is None:
        locate(name)  # refuses what is not there
        return 0, []
    asset = asset_of(name)
    snapshot = find_snapshot(asset)
    assert snapshot is not None
    problems = []
    if not found.is_whole:
        where = "" if snapshot.damage is None else f", where {snapshot.damage}"
        problems = [f"only partly in the cache{where}. Run everanimate models pull {name}"]
    files = [(file, path) for file, path in _list_files(snapshot.folder) if asset.selects(file)]
    total = max(1, sum(path.stat().st_size for _, path in files) // 10**6)
    on_event(PhaseStarted(name=f"checking {name}", total=total, unit="MB"))
    stated: dict[str, str] | None = None
    num_done = 0
    for file, path in files:
        digest = path.resolve().name
        if not path.is_symlink() or not (_SHA256.fullmatch(digest) or _GIT_SHA1.fullmatch(digest)):
            if stated is None:
                pinned = asset.hub_id._replace(revision=snapshot.commit)
                stated = _ask_hashes(replace(asset, hub_id=pinned))
            digest = stated.get(file, "")

        def advance(num_bytes: int) -> None:
            nonlocal num_done
            before, num_done = num_done // 10**6, num_done + num_bytes
            if num_done // 10**6 != before:
                on_event(PhaseAdvanced(done=min(num_done // 10**6, total)))

        actual = _hash(path, is_git=not _SHA256.fullmatch(digest), advance=advance)
        if actual != digest and (snapshot.damage or "").partition(" ")[0] != file:
            problems.append(
                f"{file} is damaged: its hash is {actual[:12]}..., not {digest[:12]}.... "
                f"Delete {path.resolve()} and run everanimate models pull {name}"
            )
    on_event(PhaseAdvanced(done=total))
    return len(files), problems


def _ask_hashes(asset: Asset) -> dict[str, str]:
    download = plan_download(asset)
    return {file.name: file.sha256 or file.git_sha1 for file in download.files}


def _hash(path: Path, *, is_git: bool, advance: Callable[[int], None]) -> str:
    """The sha256 of a file, or what git calls its content by."""
    digest = hashlib.sha1(usedforsecurity=False) if is_git else hashlib.sha256()
    if is_git:
        digest.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def _list_files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path
