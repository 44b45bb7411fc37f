"""How the files of published pose models get to this machine: whole, checked and only once.

A file without a published checksum is taken as it is seen first: its sha256 is written beside it,
and another content under the same name is refused from then on.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from everanimate_cli.errors import WeightsError
from everanimate_cli.events import Note, OnEvent
from everanimate_cli.hashes import hash_file
from everanimate_cli.model_table import FOLDER_MEMBER
from everanimate_cli.runs import try_lock

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from email.message import Message


_TIMEOUT_S = 30.0  # of connecting, and of each wait for more
_NUM_TRIES = 3  # of one address, if the connection breaks off
_RETRY_WAIT_S = 1.0
_LOCK_WAIT_S = 0.2
_NUM_REPORTS = 10  # of one download
_BLOCK_BYTES = 2**18
_MAX_BYTES = 8 * 10**9  # no model comes near; guards against an answer or a zip without end
_HEADERS = {"User-Agent": "everanimate", "Accept-Encoding": "identity"}
_PAGE_STARTS = (b"<!doctype", b"<html")


@dataclass(frozen=True)
class Fetched:
    """A file that is on this machine.

    Attributes:
        path: Where.
        sha256: Of its content, 64 hexadecimal digits.
    """

    path: Path
    sha256: str


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """What one call of `fetch` is after."""

    urls: tuple[str, ...]
    name: str
    sha256: str | None
    label: str
    way_out: str
    folder: Path
    elsewhere: tuple[Path, ...]
    on_event: OnEvent

    @property
    def path(self) -> Path:
        return self.folder / self.name

    @property
    def note_path(self) -> Path:
        """Keeps what was seen of the file."""
        return self.folder / f"{self.name}.json"

    @property
    def source(self) -> str:
        """What the user can fetch himself and put at `path`."""
        return f"{FOLDER_MEMBER} of {self.urls[0]}" if _is_zip(self.urls[0]) else self.urls[0]


class _SourceError(Exception):
    """One address does not give the file; the next may."""


class _BrokenOffError(_SourceError):
    """The connection was lost on the way; the rest may be had by asking again."""


class _StalePartError(_BrokenOffError):
    """The server does not go on with the part that is here; all of it may be had."""


def fetch(
    urls: Sequence[str],
    *,
    name: str,
    sha256: str | None,
    label: str,
    way_out: str,
    on_event: OnEvent,
    folder: Path | None = None,
    download: bool = True,
) -> Fetched:
    """Give a published file, downloading it if it is not in the cache yet.

    An interrupted download goes on where it stopped, in this call or in a later one. Two processes
    that want the same file do not disturb each other: the second waits for the first. The file
    appears under its name when it is whole and checked, not before.

    Args:
        urls: Where it can be had, in the order to try; of a zip the one member `end2end.onnx`.
        name: What it is called in the folder.
        sha256: Of the file; None to accept what comes first and only that from then on.
        label: What wants it, for messages: option and value.
        way_out: What helps where it cannot be had, such as "give --detector PATH.onnx".
        on_event: Told that a download begins and how far it is.
        folder: Where it is kept; None for `cache_folder`, and rtmlib's cache is looked at too.
        download: False refuses what is not there.

    Returns:
        The file and its checksum.

    Raises:
        WeightsError: If the file cannot be had or is not the one expected.
    """
    wanted = _Wanted(
        urls=tuple(urls),
        name=name,
        sha256=sha256,
        label=label,
        way_out=way_out,
        folder=cache_folder() if folder is None else folder,
        elsewhere=(_rtmlib_folder() / name,) if folder is None else (),
        on_event=on_event,
    )
    try:
        found = _find(wanted)
        if found is None and download:
            wanted.folder.mkdir(parents=True, exist_ok=True)
            with _hold(wanted):
                # Whoever held it before may have left it.
                found = _find(wanted) or _download(wanted)
    except OSError as error:
        raise _describe_os_error(wanted, error) from error
    if found is None:
        raise WeightsError(
            f"{label} is not in the cache ({wanted.folder}), and --dry-run downloads nothing. "
            f"Run it without, put {wanted.source} at {wanted.path}, or {way_out}."
        )
    return found


def cache_folder(kind: str = "pose") -> Path:
    """Where what is downloaded, or costly to compute, is kept.

    `$EVERANIMATE_CACHE`, or `everanimate/pose` in `$XDG_CACHE_HOME`, or in `~/.cache`.

    Args:
        kind: "pose" for pose models; anything else has a folder of this name there.
    """
    # The environment is otherwise read by the command line alone. Where caches lie is its business
    # on every system, and huggingface_hub asks it in the same way for the other models.
    folder = os.environ.get("EVERANIMATE_CACHE")
    if folder:
        return Path(folder).expanduser() / ("" if kind == "pose" else kind)
    return _user_caches() / "everanimate" / kind


def _user_caches() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


def _rtmlib_folder() -> Path:
    """Where rtmlib keeps the same files; it asks the environment too."""
    home = os.environ.get("TORCH_HOME")
    return (Path(home).expanduser() if home else _user_caches() / "rtmlib") / "hub/checkpoints"


def _find(wanted: _Wanted) -> Fetched | None:
    """The file where it may lie already, if it is the one expected."""
    for path in (wanted.path, *wanted.elsewhere):
        if path.is_file():
            found = _check_content(wanted, path)
            if found is not None:
                return found
    return None


def _check_content(wanted: _Wanted, path: Path) -> Fetched | None:
    """The file with its checksum; None for another program's file that is not the one expected.

    Hashing takes a second per gigabyte, so that a file of the same place, size and time as at the
    last look is taken to be the same.
    """
    note = _read_json(wanted.note_path)
    is_known = _look_at(path).items() <= note.items() and isinstance(note.get("sha256"), str)
    digest = str(note["sha256"]) if is_known else hash_file(path)
    expected = _expected_sha256(wanted) or digest
    if digest != expected:
        if path != wanted.path:
            return None
        remedy = f"Delete {path}"
        if wanted.sha256 is None:
            problem = "is not the file that was used first"
            remedy += f" and {wanted.note_path.name} beside it"
        else:
            problem = "is damaged or another file"
        raise WeightsError(
            f"{wanted.label}: {path} {problem} (sha256 {digest[:12]}..., not "
            f"{expected[:12]}...). {remedy} to download it again, or {wanted.way_out}."
        )
    if not is_known:
        _write_note(wanted, path, digest)
    return Fetched(path, digest)


def _expected_sha256(wanted: _Wanted) -> str | None:
    """What the file must have: what is published, or else what was seen first."""
    seen = _read_json(wanted.note_path).get("sha256")
    return wanted.sha256 or (seen if isinstance(seen, str) else None)


def _look_at(path: Path) -> dict[str, object]:
    """What tells without reading it that a file is still the same."""
    status = path.stat()
    return {"path": str(path), "num_bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _write_note(wanted: _Wanted, path: Path, digest: str) -> None:
    """Remember the checksum of a file."""
    # A shared cache may be read-only; then the file is hashed every time.
    with suppress(OSError):
        wanted.folder.mkdir(parents=True, exist_ok=True)
        _write_json(wanted.note_path, {"sha256": digest, **_look_at(path)})


@contextmanager
def _hold(wanted: _Wanted) -> Iterator[None]:
    """Be the only process that downloads this file; waits for another one that does."""
    # The lock file stays: deleting it could give two processes a lock each.
    with (wanted.folder / f".{wanted.name}.lock").open("a") as lock:
        if not try_lock(lock):
            wanted.on_event(Note(text=f"waiting for another process to download {wanted.name}"))
            while not try_lock(lock):
                time.sleep(_LOCK_WAIT_S)
        yield


def _download(wanted: _Wanted) -> Fetched:
    """Try one address after the other."""
    problems = []
    for url in wanted.urls:
        try:
            return _download_from(wanted, url)
        except _SourceError as error:
            problems.append(f"{urlsplit(url).hostname} {error}")
    kept = [_Partial(wanted, url).num_bytes for url in wanted.urls]
    if any(kept):
        remedy = f"Run the same command again to go on, {_mb(max(kept))} MB are kept"
    else:
        remedy = "Connect to the network"
    raise WeightsError(
        f"{wanted.label} cannot be downloaded: {'; '.join(problems)}. "
        f"{remedy}, put {wanted.source} at {wanted.path}, or {wanted.way_out}."
    )


def _download_from(wanted: _Wanted, url: str) -> Fetched:
    """Get the file from one address, check it and give it its name."""
    partial = _Partial(wanted, url)
    _receive_all(wanted, url, partial)
    made = partial.path
    try:
        if _is_zip(url):
            made = wanted.folder / f".{wanted.name}.unpacked.part"
            _unpack(partial.path, made)
        digest = _check_arrival(wanted, made)
    except _SourceError:
        partial.remove()  # what is whole but wrong would be wrong again
        raise
    else:
        made.replace(wanted.path)
        partial.remove()
    finally:
        if made != partial.path:
            made.unlink(missing_ok=True)
    _write_note(wanted, wanted.path, digest)
    return Fetched(wanted.path, digest)


def _check_arrival(wanted: _Wanted, path: Path) -> str:
    """The sha256 of what a server has sent, once it is on the disk and looks right."""
    with path.open("rb+") as file:
        start = file.read(16).lower()
        os.fsync(file.fileno())
    if start.startswith(_PAGE_STARTS):
        raise _SourceError("sent a web page instead")
    digest = hash_file(path)
    expected = _expected_sha256(wanted) or digest
    if digest != expected:
        known = "" if wanted.sha256 else f"; delete {wanted.note_path} to accept it"
        raise _SourceError(
            f"sent another file (sha256 {digest[:12]}..., not {expected[:12]}...{known})"
        )
    return digest


@dataclass(frozen=True)
class _Partial:
    """The part of a file that has arrived from one address; others need not send the same."""

    wanted: _Wanted
    url: str

    @property
    def path(self) -> Path:
        source = hashlib.sha256(self.url.encode()).hexdigest()[:8]
        return self.wanted.folder / f".{self.wanted.name}.{source}.part"

    @property
    def state_path(self) -> Path:
        """Keeps what the server said of the whole file."""
        return self.path.with_suffix(".part.json")

    @property
    def num_bytes(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def read_state(self) -> tuple[int, int | None, str | None]:
        """(bytes to keep, size of the whole, validator for `If-Range`)."""
        state, num_bytes = _read_json(self.state_path), self.num_bytes
        total, validator = state.get("total"), state.get("validator")
        if not isinstance(total, int) or num_bytes > total:
            return 0, None, None
        # Without a validator the halves could be of different files, which only a checksum finds.
        if not isinstance(validator, str):
            return (num_bytes if self.wanted.sha256 else 0), total, None
        return num_bytes, total, validator

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.state_path.unlink(missing_ok=True)


def _receive_all(wanted: _Wanted, url: str, partial: _Partial) -> None:
    """Bring what is missing, asking again if the connection breaks off."""
    for num_left in reversed(range(_NUM_TRIES)):
        try:
            _receive(wanted, url, partial)
        except _BrokenOffError as error:
            if isinstance(error, _StalePartError):
                partial.remove()
            if not num_left:
                raise
            time.sleep(_RETRY_WAIT_S)
        else:
            return


def _receive(wanted: _Wanted, url: str, partial: _Partial) -> None:
    """Bring what is missing in one request."""
    start, total, validator = partial.read_state()
    if start and start == total:
        return  # killed between the last byte and the check
    headers = dict(_HEADERS)
    if start:
        headers["Range"] = f"bytes={start}-"
        if validator:
            headers["If-Range"] = validator
    with _open(url, headers) as response:
        # A server that does not know ranges, or has another file by now, sends all of it.
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            start, total = 0, _read_length(response.headers)
        elif _read_range(response.headers) != (start, total):
            raise _StalePartError("sent another part of the file than asked for")
        if total is not None and total > _MAX_BYTES:
            raise _SourceError(f"offers {_mb(total)} MB, which is no pose model")
        _check_space(wanted.folder, (total or 0) - start)
        if not start:
            state = {"total": total, "validator": _read_validator(response.headers)}
            _write_json(partial.state_path, state)
        progress = _Progress(wanted, urlsplit(url).hostname, start, total)
        with partial.path.open("ab" if start else "wb") as file:
            for block in _read_blocks(response):
                file.write(block)
                progress.advance(len(block))
                if progress.num_done > _MAX_BYTES:
                    raise _SourceError("sends without end")
    if total is not None and progress.num_done < total:
        raise _BrokenOffError(f"broke off after {_mb(progress.num_done)} of {_mb(total)} MB")


class _Progress:
    """Reports every tenth of a download."""

    def __init__(self, wanted: _Wanted, host: str | None, start: int, total: int | None) -> None:
        self.num_done = start
        self._total = total
        self._on_event = wanted.on_event
        self._num_told = self._num_reached()
        what = f"downloading {wanted.name} from {host}"
        if start:
            self._report(f"{what} goes on at {_mb(start)} of {_mb(total or 0)} MB")
        else:
            size = f": {_mb(total)} MB" if total else ""
            self._report(f"{what}{size} to {wanted.folder}")

    def advance(self, num_bytes: int) -> None:
        self.num_done += num_bytes
        num_reached = self._num_reached()
        if self._total and self._num_told < num_reached < _NUM_REPORTS:
            self._num_told = num_reached
            self._report(f"downloaded {_mb(self.num_done)} of {_mb(self._total)} MB")

    def _num_reached(self) -> int:
        return int(_NUM_REPORTS * self.num_done / max(self._total or 1, 1))

    def _report(self, text: str) -> None:
        self._on_event(Note(text=text))


def _unpack(archive: Path, made: Path) -> None:
    """Write the one `end2end.onnx` of a zip to `made`; no other name in it is used."""
    try:
        with zipfile.ZipFile(archive) as zipped:
            members = [
                info
                for info in zipped.infolist()
                if PurePosixPath(info.filename).name == FOLDER_MEMBER
            ]
            if len(members) != 1:
                raise _SourceError(f"sent a zip with {len(members)} files {FOLDER_MEMBER}")
            if members[0].file_size > _MAX_BYTES:
                raise _SourceError("sent a zip that unpacks without end")
            _check_space(made.parent, members[0].file_size)
            # Reading ends at the stated size and compares the checksum in the zip.
            with zipped.open(members[0]) as source, made.open("wb") as target:
                shutil.copyfileobj(source, target, _BLOCK_BYTES)
    # An encrypted member is a RuntimeError, an unknown method a NotImplementedError.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise _SourceError("sent a damaged zip") from error


# --- the network ---------------------------------------------------------------------------------


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirection to where a download may come from, and to nowhere else."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: object,
        code: int,
        msg: str,
        headers: Message,
        newurl: str,
    ) -> urllib.request.Request | None:
        _check_url(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


def _check_url(url: str) -> None:
    """Refuse what is not encrypted; another computer could put in anything."""
    parts = urlsplit(url)
    is_own = parts.scheme == "http" and parts.hostname in ("localhost", "127.0.0.1", "::1")
    if parts.scheme != "https" and not is_own:
        raise _SourceError(f"leads to {parts.scheme}://{parts.hostname}, which is not encrypted")


def _open(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    """Ask for a file.

    Raises:
        _SourceError: With the answer in words, if it is not the file.
    """
    _check_url(url)
    opener = urllib.request.build_opener(_SafeRedirects())
    request = urllib.request.Request(url, headers=headers)
    try:
        response: http.client.HTTPResponse = opener.open(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        is_stale = error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
        with error:
            kind = _StalePartError if is_stale else _SourceError
            raise kind(f"answered {error.code} {error.reason}".rstrip()) from error
    except (OSError, http.client.HTTPException) as error:
        raise _SourceError(f"cannot be reached ({_reason(error)})") from error
    return response


def _read_blocks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while True:
        try:
            block = response.read(_BLOCK_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise _BrokenOffError(f"broke off ({_reason(error)})") from error
        if not block:
            return
        yield block


def _reason(error: Exception) -> str:
    """What the system says about a failed connection, in one line."""
    cause = getattr(error, "reason", error)
    text = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    return " ".join(str(text).split())


def _read_length(headers: Message) -> int | None:
    length = headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _read_range(headers: Message) -> tuple[int, int] | None:
    """(first byte, size of the whole file) of a partial answer."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range", ""))
    return match and (int(match[1]), int(match[2]))


def _read_validator(headers: Message) -> str | None:
    """What tells this content from a later one; a weak tag may not be used for parts."""
    tag = headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")


# --- the disk ------------------------------------------------------------------------------------


def _check_space(folder: Path, num_bytes: int) -> None:
    if shutil.disk_usage(folder).free < num_bytes:
        raise OSError(errno.ENOSPC, f"{_mb(num_bytes)} MB are needed")


def _describe_os_error(wanted: _Wanted, error: OSError) -> WeightsError:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "Free some space and run the same command again"
        problem = f"does not fit into the cache ({wanted.folder}), the disk is full: {reason}"
    else:
        remedy = "Make it usable"
        problem = f"cannot be kept in the cache ({wanted.folder}): {reason}"
    return WeightsError(
        f"{wanted.label} {problem}. {remedy}, name another folder in EVERANIMATE_CACHE, "
        f"or {wanted.way_out}."
    )


def _read_json(path: Path) -> dict[str, object]:
    """An object that `_write_json` wrote; empty for anything else."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    temporary = path.with_name(f".{path.name.lstrip('.')}.{os.getpid()}.new")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    temporary.replace(path)


def _is_zip(url: str) -> bool:
    return urlsplit(url).path.endswith(".zip")


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.{0 if num_bytes >= 10**7 else 1}f}"
