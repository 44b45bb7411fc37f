"""How large files of the Hub get into its local cache: whole, checked, and with what was begun.

huggingface_hub throws away the part of a file that has arrived when a download stops, and takes
what it gets over HTTP without comparing checksums. Here the files whose sha256 the Hub states are
brought to where its cache keeps them; huggingface_hub then finds them there.
"""

from __future__ import annotations

import errno
import importlib
import os
import shutil
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils import tqdm as hub_tqdm  # type: ignore[attr-defined]

from everanimate_cli.errors import WeightsError
from everanimate_cli.events import Note, OnEvent, PhaseAdvanced, PhaseStarted
from everanimate_cli.hashes import hash_file
from everanimate_cli.runs import try_lock

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import IO

_NUM_WORKERS = 4  # files at the same time
_LOCK_WAIT_S = 0.5
_TIMEOUT_S = 10.0  # of asking where a file is
# What huggingface_hub lets through from its HTTP library: httpx, from version 2 on httpx2.
HTTP_ERROR = cast("type[Exception]", HfHubHTTPError.__bases__[0])
# Of the same library, for addresses that cannot be taken apart; it is of another kind.
ADDRESS_ERROR = cast(
    "type[Exception]", importlib.import_module(HTTP_ERROR.__module__.partition(".")[0]).InvalidURL
)


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file of a repository.

    Attributes:
        name: Path in the repository.
        num_bytes: Size.
        sha256: Of its content; None for small files, which git keeps itself.
        git_sha1: What git calls its content by, or the pointer to it; empty if unknown.
    """

    name: str
    num_bytes: int
    sha256: str | None
    git_sha1: str = ""


def storage_folder(repository: str) -> Path:
    """Where the cache keeps a repository: `blobs`, `refs` and `snapshots` lie in it."""
    cache = Path(hub_constants.HF_HUB_CACHE).expanduser()
    return cache / repo_folder_name(repo_id=repository, repo_type="model")


def part_path(repository: str, sha256: str) -> Path:
    """What has arrived of a file."""
    return storage_folder(repository) / "blobs" / f"{sha256}.everanimate.part"


def keep_reference(repository: str, revision: str, commit: str) -> None:
    """Note in the cache which commit a branch or tag means, as huggingface_hub does.

    A shared cache may be read-only; then the Hub is asked every time.

    Args:
        repository: `owner/name`.
        revision: Branch, tag, or a commit or its beginning.
        commit: Of which all files are there.
    """
    if commit.startswith(revision):
        return
    path = storage_folder(repository) / "refs" / revision
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(commit, encoding="utf-8")
        temporary.replace(path)


def count_arrived(repository: str, file: RemoteFile) -> int:
    """Bytes of a file that an earlier download has left."""
    if file.sha256 is None:
        return 0
    part = part_path(repository, file.sha256)
    return min(part.stat().st_size, file.num_bytes) if part.exists() else 0


def check_space(label: str, num_bytes: int) -> None:
    """Refuse a download for which the disk has no room.

    Raises:
        WeightsError: With what is needed and what is there.
    """
    cache, free = Path(hub_constants.HF_HUB_CACHE).expanduser(), free_bytes()
    if free < num_bytes:
        raise WeightsError(
            f"{label} takes {amount(num_bytes)} more, but {cache} has {amount(free)} free. Free "
            "some space, or set HF_HOME to a folder on a larger disk."
        )


def free_bytes() -> int:
    """Room for the cache on its disk."""
    cache = Path(hub_constants.HF_HUB_CACHE).expanduser()
    folder = next(path for path in (cache, *cache.absolute().parents) if path.exists())
    return shutil.disk_usage(folder).free


def amount(num_bytes: float) -> str:
    """Such as "82.31 GB" or "5.2 MB"."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 10**9 else f"{num_bytes / 1e6:.1f} MB"


class Meter:
    """Counts what arrives, in whole MB, and tells it; may be used from several threads."""

    def __init__(self, name: str, num_bytes: int, num_arrived: int, on_event: OnEvent) -> None:
        """Begin a phase.

        Args:
            name: Of what is downloaded.
            num_bytes: That it takes in all.
            num_arrived: That an earlier download has left.
            on_event: Told of every MB.
        """
        self.stopped = threading.Event()
        self._on_event = on_event
        self._total = num_bytes
        self._done = num_arrived
        self._lock = threading.Lock()
        self._told = self._megabytes()
        total = max(1, round(num_bytes / 1e6))
        on_event(PhaseStarted(name=f"downloading {name}", total=total, done=self._told, unit="MB"))

    def add(self, num_bytes: float) -> None:
        """Count bytes, less than none if they have to come again."""
        if self.stopped.is_set():
            raise _StoppedError
        with self._lock:
            self._done += int(num_bytes)
            self._tell(self._megabytes())

    def finish(self) -> None:
        """End the phase: all is there."""
        with self._lock:
            self._done = self._total
            self._tell(max(1, round(self._total / 1e6)))

    def _megabytes(self) -> int:
        return int(min(self._done, self._total) // 10**6)

    def _tell(self, megabytes: int) -> None:
        if megabytes != self._told:
            self._told = megabytes
            self._on_event(PhaseAdvanced(done=megabytes))

    def bar_class(self, file: RemoteFile | None = None) -> type[hub_tqdm]:
        """A bar for huggingface_hub that draws nothing and counts here.

        Args:
            file: What it is for; more bytes than it has are refused before they are written.
        """
        meter = self

        class QuietBar(hub_tqdm):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                # Another bar counts files, and one more the bytes before they are unpacked.
                name = str(kwargs.get("name") or "")
                self._counts = kwargs.get("unit") == "B" and not name.endswith(".transfer")
                self._size = int(kwargs.get("initial") or 0)
                super().__init__(*args, **{**kwargs, "disable": True})

            def update(self, n: float | None = 1) -> bool | None:
                self._size += int(n or 0)
                if file is not None and self._size > file.num_bytes:
                    raise DamagedError(
                        f"{file.name} is larger than the {file.num_bytes} bytes that are stated"
                    )
                if self._counts:
                    meter.add(n or 0)
                return cast("bool | None", super().update(n))

        return QuietBar


class _StoppedError(Exception):
    """Another file failed, or the user has had enough."""


class DamagedError(Exception):
    """What arrived is not what the Hub states."""


def fetch_files(
    repository: str, commit: str, files: Sequence[RemoteFile], meter: Meter, on_event: OnEvent
) -> None:
    """Bring files of which the sha256 is known into the cache, several at a time.

    What has arrived of an unfinished file stays, and a later call goes on from there. Two processes
    do not disturb each other.

    Args:
        repository: `owner/name`.
        commit: Of the repository.
        files: Those that are missing.
        meter: Counts what arrives.
        on_event: Told if another process is at it.

    Raises:
        DamagedError: If a file is not what the Hub states; what arrived of it is deleted.
        HfHubHTTPError: If the Hub refuses a file.
        OSError: If the disk is full.
    """
    if not files:
        return
    (storage_folder(repository) / "blobs").mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(_NUM_WORKERS) as workers:
        tasks = [
            workers.submit(_fetch_file, repository, commit, file, meter, on_event) for file in files
        ]
        try:
            done, _ = wait(tasks, return_when=FIRST_EXCEPTION)
            errors = [task.exception() for task in done]
        finally:  # after Ctrl-C too; the workers notice with the next bytes
            meter.stopped.set()
            for task in tasks:
                task.cancel()
    meter.stopped.clear()
    # The first to fail may be among those that were stopped for it.
    for error in errors:
        if error is not None and not isinstance(error, _StoppedError):
            raise error


def _fetch_file(
    repository: str, commit: str, file: RemoteFile, meter: Meter, on_event: OnEvent
) -> None:
    assert file.sha256 is not None
    part = part_path(repository, file.sha256)
    blob = part.with_name(file.sha256)
    with _hold(part, file.name, meter, on_event) as content:
        if blob.exists():  # another process has done it
            part.unlink(missing_ok=True)
            return
        try:
            _receive(repository, commit, file, content, meter)
            digest = hash_file(part)
            if digest == file.sha256:
                part.replace(blob)
                return
            content.truncate(0)
            raise DamagedError(
                f"{file.name} arrived damaged: sha256 {digest[:12]}..., not {file.sha256[:12]}..."
            )
        finally:
            if part.exists() and not part.stat().st_size:
                part.unlink()


@contextmanager
def _hold(part: Path, name: str, meter: Meter, on_event: OnEvent) -> Iterator[IO[bytes]]:
    """Be the only process that writes to a file; waits for another one that does."""
    is_told = False
    while True:
        with part.open("ab") as content:
            while not try_lock(content):
                if not is_told:
                    on_event(Note(text=f"waiting for another process to download {name}"))
                    is_told = True
                if meter.stopped.wait(_LOCK_WAIT_S):
                    raise _StoppedError
            # The other process may have moved or deleted the file that was opened.
            if part.exists() and part.stat().st_ino == os.fstat(content.fileno()).st_ino:
                yield content
                return


def _receive(
    repository: str, commit: str, file: RemoteFile, content: IO[bytes], meter: Meter
) -> None:
    """Bring what is missing; asks again as long as something arrives each time."""
    url = huggingface_hub.hf_hub_url(
        repository, file.name, revision=commit, endpoint=hub_constants.ENDPOINT
    )
    while True:
        num_before = content.seek(0, 2)
        if num_before > file.num_bytes:
            num_before = content.truncate(0)
        try:
            # A file is often elsewhere, under an address that does not live long.
            found = huggingface_hub.get_hf_file_metadata(
                url, headers=build_hf_headers(), timeout=_TIMEOUT_S
            )
            headers = build_hf_headers()
            headers["Accept-Encoding"] = "identity"  # parts of what is packed do not fit together
            if urlsplit(found.location)[:2] != urlsplit(url)[:2]:
                headers.pop("authorization", None)  # is for the Hub alone, never in the clear
            http_get(
                found.location,
                content,  # type: ignore[arg-type]
                resume_size=num_before,
                headers=headers,
                expected_size=file.num_bytes,
                displayed_filename=file.name,
                tqdm_class=meter.bar_class(file),
            )
            content.flush()
        except DamagedError:
            content.truncate(0)
            raise
        except (HTTP_ERROR, OSError) as error:
            content.flush()
            is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            if is_full or content.seek(0, 2) <= num_before:
                raise
        else:
            return


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Keep huggingface_hub from logging on stderr, which is the console's."""
    before = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(before)
