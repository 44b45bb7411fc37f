"""A Hub on this machine: as much of its API as downloads need, for files in memory."""

import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", "v1", COMMIT)
DAY, LATER_DAY = "2025-11-13", "2026-06-10"  # of this commit and of the one in `Hub.moves_to`
LARGE = (".safetensors", ".gguf", ".pth")  # files that git leaves to LFS

Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Request:
    """What was asked for."""

    method: str
    path: str
    headers: Mapping[str, str]


@dataclass
class Hub:
    """A Hub and the ways in which it can fail.

    Attributes:
        repositories: Repository -> path -> content.
        refused: What every request is answered with instead: status and headers.
        files_refused: What requests for files are answered with instead.
        corrupted: Files of which other bytes arrive than are stated.
        break_after: Bytes of a large file after which the connection is lost, each time; after the
            first time everything is refused with `refused_then`.
        refused_then: See `break_after`; None goes on.
        moves_to: What the branch `main` means after it was asked for once: a commit and its files,
            by repository.
        branches: Others than `main`; they mean the same commit.
        forgotten: Revisions that there are no more.
        requests: For repositories and files so far.
    """

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refused: tuple[int, dict[str, str]] | None = None
    files_refused: tuple[int, dict[str, str]] | None = None
    corrupted: set[str] = field(default_factory=set)
    break_after: int | None = None
    refused_then: tuple[int, dict[str, str]] | None = None
    moves_to: dict[str, tuple[str, dict[str, bytes]]] = field(default_factory=dict)
    branches: set[str] = field(default_factory=set)
    forgotten: set[str] = field(default_factory=set)
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._moved: set[str] = set()

    @property
    def num_requests(self) -> int:
        return len(self.requests)

    def sent_ranges(self) -> list[str]:
        """Parts of large files that were asked for; "" for a whole one."""
        return [
            request.headers.get("Range", "")
            for request in self.requests
            if request.path.startswith("/cdn/") and request.method == "GET"
        ]

    def add(self, repository: str, folder: Path) -> None:
        self.repositories[repository] = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }

    def answer(self, request: Request) -> Answer:
        api = re.fullmatch(
            r"/api/models/([\w-]+/[\w.-]+)/(revision|tree|commits)/([\w.-]+)(?:\?.*)?", request.path
        )
        file = re.fullmatch(r"/([\w-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)", request.path)
        stored = re.fullmatch(r"/cdn/([\w-]+/[\w.-]+)/([^?]+)(?:\?(\w+))?", request.path)
        if not (api or file or stored):  # the library also asks about other things now and then
            return 404, {}, b""
        self.requests.append(request)
        if self.refused is not None:
            return *self.refused, b""
        if api is not None:
            return self.describe(*api.groups())
        if self.files_refused is not None:
            return *self.files_refused, b""
        if stored is not None:
            repository, name, commit = stored.groups(COMMIT)
            return self.send_part(repository, commit, name, request.headers.get("Range"))
        assert file is not None
        # Another host to a client, to which tokens do not go.
        elsewhere = request.headers["Host"].replace("127.0.0.1", "localhost")
        return self.send(*file.groups(), f"http://{elsewhere}/cdn/{file[1]}/{file[3]}")

    def resolve(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]]:
        """Commit and files that a revision means now."""
        later = self.moves_to.get(repository)
        if later is not None and (
            revision == later[0] or (revision == "main" and repository in self._moved)
        ):
            return later
        return COMMIT, self.repositories[repository]

    def describe(self, repository: str, kind: str, revision: str) -> Answer:
        if repository not in self.repositories:
            return 401, {"X-Error-Message": "Invalid username or password."}, b""
        known = (*REVISIONS, *self.branches, *(commit for commit, _ in self.moves_to.values()))
        if revision not in known or revision in self.forgotten:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        commit, files = self.resolve(repository, revision)
        self._moved.add(repository)
        described: object
        if kind == "commits":
            described = [
                {"id": name, "authors": [], "title": "Upload", "message": ""}
                | {"date": f"{DAY if name == COMMIT else LATER_DAY}T23:30:00.000Z"}
                for name in dict.fromkeys((commit, COMMIT))
            ]
        elif kind == "revision":
            siblings = [
                {"rfilename": name, "size": len(data), "blobId": git_sha1(data)}
                | (
                    {"lfs": {"sha256": _sha256(data), "size": len(data), "pointerSize": 134}}
                    if name.endswith(LARGE)
                    else {}
                )
                for name, data in files.items()
            ]
            described = {"id": repository, "sha": commit, "siblings": siblings}
        else:
            described = [
                {"type": "file", "path": name, "size": len(data), "oid": git_sha1(data)}
                | (
                    {"lfs": {"oid": _sha256(data), "size": len(data), "pointerSize": 134}}
                    if name.endswith(LARGE)
                    else {}
                )
                for name, data in files.items()
            ]
        return 200, {"Content-Type": "application/json"}, json.dumps(described).encode()

    def send(self, repository: str, revision: str, name: str, elsewhere: str) -> Answer:
        """A small file; for a large one, where it is."""
        commit, files = self.resolve(repository, revision)
        content = files[name]
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not name.endswith(LARGE):
            return 200, headers | {"ETag": f'"{git_sha1(content)}"'}, content
        headers |= {
            "X-Linked-Etag": f'"{_sha256(content)}"',
            "X-Linked-Size": str(len(content)),
            "Location": elsewhere if commit == COMMIT else f"{elsewhere}?{commit}",
        }
        return 302, headers, b""

    def send_part(self, repository: str, revision: str, name: str, asked: str | None) -> Answer:
        content = self.resolve(repository, revision)[1][name]
        if name in self.corrupted:
            content = bytes([content[0] ^ 1]) + content[1:]
        if asked is None:
            return 200, {}, content
        first = int(asked.removeprefix("bytes=").removesuffix("-"))
        part = {"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"}
        return 206, part, content[first:]


def git_sha1(content: bytes) -> str:
    """What git calls a file's content by."""
    return sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _sha256(content: bytes) -> str:
    return sha256(content).hexdigest()


@contextmanager
def serve(current: list[Hub]) -> Iterator[str]:
    """Address of a server that answers for the last hub of a list."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub = current[-1]
            status, headers, content = hub.answer(Request(self.command, self.path, self.headers))
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "GET":
                return
            if hub.break_after is not None and self.path.startswith("/cdn/"):
                self.wfile.write(content[: hub.break_after])
                self.close_connection = len(content) > hub.break_after
                hub.refused = hub.refused or hub.refused_then
            else:
                self.wfile.write(content)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_args: object) -> None:
            """Keep the test's output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def use_hub(address: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the library, which reads the environment when it is imported, ask this address."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # What has arrived is written in pieces of 10 MB, which no test sends.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _seconds: None)
