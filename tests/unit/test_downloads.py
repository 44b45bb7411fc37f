"""Pose models over a bad line: what arrives is whole and the right one, or nothing is there."""

import hashlib
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from collections import namedtuple
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from everanimate_cli import downloads
from everanimate_cli.downloads import Fetched, cache_folder, fetch
from everanimate_cli.errors import InputError, SettingsError, WeightsError
from everanimate_cli.events import Event, Note
from everanimate_cli.hashes import hash_file
from everanimate_cli.model_table import (
    DETECTORS,
    POSE_MODELS,
    DetectorModel,
    PoseModel,
    check_models,
)

# Long enough for ten reports; begins as every ONNX file does.
CONTENT = b"\x08\x08" + bytes(range(251)) * 12_000  # 3.01 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()
OTHER = b"\x08\x09" + CONTENT[2:]
NAME = "model.onnx"
LABEL = "--pose-model rtmw"
WAY_OUT = "give --pose-model PATH.onnx"


class ModelServer(ThreadingHTTPServer):
    """Serves files with the manners of a content network, or with bad ones.

    Attributes:
        files: Content by path; an int is an answer without any.
        moved: Where a path redirects to.
        cuts: After how many bytes the next answers break off.
        has_ranges: Whether parts are sent.
        has_validator: Whether answers carry an ETag.
        ignores_if_range: Whether a part is sent of whatever is there now.
        has_length: Whether answers state their length.
        shift: Added to the first byte of every part.
        pause_s: How long an answer rests after 0.7 MB, unless `goes_on` is set.
        seen: Path and headers of every request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes | int] = {}
        self.moved: dict[str, str] = {}
        self.cuts: list[int] = []
        self.has_ranges = self.has_validator = self.has_length = True
        self.ignores_if_range = False
        self.shift = 0
        self.pause_s = 0.0
        self.goes_on = threading.Event()
        self.seen: list[tuple[str, dict[str, str]]] = []

    def url(self, path: str = f"/{NAME}") -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"

    @property
    def ranges(self) -> list[str | None]:
        """The `Range` of every request."""
        return [headers.get("Range") for _, headers in self.seen]


class Handler(BaseHTTPRequestHandler):
    server: ModelServer

    def do_GET(self) -> None:
        server = self.server
        server.seen.append((self.path, dict(self.headers)))
        if self.path in server.moved:
            self.send_response(302)
            self.send_header("Location", server.moved[self.path])
            self.end_headers()
            return
        content = server.files.get(self.path, 404)
        if isinstance(content, int):
            self.send_error(content)
            return
        tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        start = 0
        wanted = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        is_same = server.ignores_if_range or self.headers.get("If-Range", tag) == tag
        if wanted and server.has_ranges and is_same:
            start = int(wanted[1]) + server.shift
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            last = len(content) - 1
            self.send_header("Content-Range", f"bytes {start}-{last}/{len(content)}")
        else:
            self.send_response(200)
        if server.has_validator:
            self.send_header("ETag", tag)
        body = content[start:]
        if server.has_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with suppress(ConnectionError):  # the client may be gone
            if server.pause_s:
                self.wfile.write(body[:700_000])
                server.goes_on.wait(server.pause_s)
                body = body[700_000:]
            self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)

    def log_message(self, *args: Any) -> None:
        del args


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with ModelServer() as running:
        threading.Thread(target=partial(running.serve_forever, 0.01), daemon=True).start()
        running.files[f"/{NAME}"] = CONTENT
        yield running
        running.goes_on.set()
        running.shutdown()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(downloads, "_RETRY_WAIT_S", 0)
    for name in ("TORCH_HOME", "http_proxy", "HTTP_PROXY", "EVERANIMATE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "models"


def get(folder: Path | None, *urls: str, sha256: str | None = SHA256, **options: Any) -> Fetched:
    options = {"on_event": lambda _event: None, **options}
    return fetch(
        urls, name=NAME, sha256=sha256, label=LABEL, way_out=WAY_OUT, folder=folder, **options
    )


def refusal(folder: Path, *urls: str, **options: Any) -> str:
    with pytest.raises(WeightsError) as caught:
        get(folder, *urls, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def visible(folder: Path) -> list[str]:
    """What a user sees in the cache."""
    return sorted(path.name for path in folder.glob("[!.]*"))


def hidden(folder: Path) -> list[str]:
    """What is left of downloads, but for the lock."""
    return sorted(path.name for path in folder.glob(".*") if path.suffix != ".lock")


def zipped(**members: bytes) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return target.getvalue()


def sha(content: bytes) -> str:
    return f"{hashlib.sha256(content).hexdigest()[:12]}..."


# --- a good line ---------------------------------------------------------------------------------


def test_a_download_is_reported_and_kept(server: ModelServer, folder: Path) -> None:
    texts: list[str] = []

    def record(event: Event) -> None:
        assert isinstance(event, Note)
        texts.append(event.text)

    found = get(folder, server.url(), on_event=record)
    assert (found.path, found.sha256) == (folder / NAME, SHA256)
    assert found.path.read_bytes() == CONTENT
    assert visible(folder) == [NAME, f"{NAME}.json"]
    assert hidden(folder) == []
    assert texts[0] == f"downloading {NAME} from 127.0.0.1: 3.0 MB to {folder}"
    assert len(texts) == 10
    assert all(re.fullmatch(r"downloaded \d\.\d of 3\.0 MB", text) for text in texts[1:])
    assert texts[1:] == sorted(set(texts[1:]))
    assert get(folder, server.url(), on_event=record) == found
    assert len(server.seen) == 1
    assert len(texts) == 10


def test_a_kept_file_is_hashed_once(
    server: ModelServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = get(folder, server.url())
    monkeypatch.setattr(downloads, "hash_file", lambda path: pytest.fail(f"{path} hashed again"))
    assert get(folder, server.url()) == found


def test_a_file_put_there_by_hand_is_taken(server: ModelServer, folder: Path) -> None:
    folder.mkdir()
    (folder / NAME).write_bytes(CONTENT)
    assert get(folder, server.url()).sha256 == SHA256
    assert server.seen == []


def test_redirection(server: ModelServer, folder: Path) -> None:
    """The Hub answers with the address of another host."""
    server.moved["/resolve"] = server.url()
    assert get(folder, server.url("/resolve")).sha256 == SHA256


def test_chunked_answer_without_a_length(server: ModelServer, folder: Path) -> None:
    server.has_length = False
    assert get(folder, server.url()).sha256 == SHA256


# --- a bad line ----------------------------------------------------------------------------------


def test_a_cut_connection_is_taken_up_where_it_broke(server: ModelServer, folder: Path) -> None:
    server.cuts = [1_000_000]
    texts: list[str] = []
    found = get(folder, server.url(), on_event=lambda event: texts.append(event.text))
    assert found.path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=1000000-"]
    assert server.seen[1][1]["If-Range"].startswith('"')
    assert f"downloading {NAME} from 127.0.0.1 goes on at 1.0 of 3.0 MB" in texts
    assert hidden(folder) == []


def test_a_later_call_goes_on(server: ModelServer, folder: Path) -> None:
    server.cuts = [500_000, 500_000, 500_000]
    assert refusal(folder, server.url()) == (
        f"{LABEL} cannot be downloaded: 127.0.0.1 broke off after 1.5 of 3.0 MB. Run the same "
        f"command again to go on, 1.5 MB are kept, put {server.url()} at {folder / NAME}, or "
        f"{WAY_OUT}."
    )
    assert visible(folder) == []
    assert get(folder, server.url()).path.read_bytes() == CONTENT
    assert server.ranges[-1] == "bytes=1500000-"


def test_killed_between_the_last_byte_and_the_check(server: ModelServer, folder: Path) -> None:
    server.cuts = [500_000] * 3
    refusal(folder, server.url())
    (part,) = folder.glob(".*.part")
    part.write_bytes(CONTENT)
    assert get(folder, server.url()).sha256 == SHA256
    assert len(server.seen) == 3


def test_server_without_ranges(server: ModelServer, folder: Path) -> None:
    server.has_ranges = False
    server.cuts = [1_000_000]
    assert get(folder, server.url()).path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=1000000-"]


@pytest.mark.parametrize("ignores_if_range", [False, True])
def test_another_file_by_now(server: ModelServer, folder: Path, ignores_if_range: bool) -> None:
    """The halves of two files are never put together."""
    server.cuts = [2_000_000, 0, 0]
    refusal(folder, server.url(), sha256=None)
    server.ignores_if_range = ignores_if_range
    server.files[f"/{NAME}"] = OTHER[:1_500_000]  # shorter than what is here
    assert get(folder, server.url(), sha256=None).path.read_bytes() == OTHER[:1_500_000]


def test_another_part_than_asked_for(server: ModelServer, folder: Path) -> None:
    server.cuts = [1_000_000]
    server.shift = 7
    assert get(folder, server.url()).path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=1000000-", None]


def test_without_validator_and_checksum_all_is_fetched_again(
    server: ModelServer, folder: Path
) -> None:
    server.has_validator = False
    server.cuts = [1_000_000, 1_000_000]
    assert get(folder, server.url(), sha256=None).path.read_bytes() == CONTENT
    assert server.ranges == [None, None, None]


def test_with_a_checksum_no_validator_is_needed(server: ModelServer, folder: Path) -> None:
    server.has_validator = False
    server.cuts = [1_000_000]
    assert get(folder, server.url()).path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=1000000-"]


def test_missing_file_then_mirror(server: ModelServer, folder: Path) -> None:
    assert get(folder, server.url("/gone"), server.url()).sha256 == SHA256
    assert [path for path, _ in server.seen] == ["/gone", f"/{NAME}"]


def test_no_source_has_it(server: ModelServer, folder: Path) -> None:
    server.files["/broken"] = 503
    assert refusal(folder, server.url("/gone"), server.url("/broken")) == (
        f"{LABEL} cannot be downloaded: 127.0.0.1 answered 404 Not Found; 127.0.0.1 answered 503 "
        f"Service Unavailable. Connect to the network, put {server.url('/gone')} at "
        f"{folder / NAME}, or {WAY_OUT}."
    )
    assert len(server.seen) == 2


def test_no_network(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/rtmw.zip"
        message = refusal(folder, url, "https://openmmlab.invalid/rtmw.zip")
    assert re.fullmatch(
        rf"{LABEL} cannot be downloaded: 127\.0\.0\.1 cannot be reached \(Connection refused\); "
        rf"openmmlab\.invalid cannot be reached \(.+\)\. Connect to the network, put end2end\.onnx "
        rf"of {re.escape(url)} at {re.escape(str(folder / NAME))}, or {WAY_OUT}\.",
        message,
    )


def test_a_server_that_says_nothing(
    server: ModelServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "_TIMEOUT_S", 0.5)
    monkeypatch.setattr(downloads, "_NUM_TRIES", 1)
    server.pause_s = 30
    assert "127.0.0.1 broke off (timed out)" in refusal(folder, server.url())


def test_dry_run(server: ModelServer, folder: Path) -> None:
    assert refusal(folder, server.url("/a.zip"), download=False) == (
        f"{LABEL} is not in the cache ({folder}), and --dry-run downloads nothing. Run it without, "
        f"put end2end.onnx of {server.url('/a.zip')} at {folder / NAME}, or {WAY_OUT}."
    )
    assert server.seen == []
    assert not folder.exists()


# --- not what was wanted -------------------------------------------------------------------------


def test_wrong_checksum_then_mirror(server: ModelServer, folder: Path) -> None:
    server.files["/other"] = OTHER
    assert get(folder, server.url("/other"), server.url()).path.read_bytes() == CONTENT


def test_wrong_checksum_everywhere(server: ModelServer, folder: Path) -> None:
    server.files["/other"] = OTHER
    assert refusal(folder, server.url("/other")) == (
        f"{LABEL} cannot be downloaded: 127.0.0.1 sent another file (sha256 {sha(OTHER)}, not "
        f"{sha(CONTENT)}). Connect to the network, put {server.url('/other')} at {folder / NAME}, "
        f"or {WAY_OUT}."
    )
    assert (visible(folder), hidden(folder)) == ([], [])


def test_damaged_file_in_the_cache(server: ModelServer, folder: Path) -> None:
    folder.mkdir()
    (folder / NAME).write_bytes(OTHER)
    assert refusal(folder, server.url()) == (
        f"{LABEL}: {folder / NAME} is damaged or another file (sha256 {sha(OTHER)}, not "
        f"{sha(CONTENT)}). Delete {folder / NAME} to download it again, or {WAY_OUT}."
    )
    assert (folder / NAME).read_bytes() == OTHER


def test_first_use_counts_without_a_published_checksum(server: ModelServer, folder: Path) -> None:
    assert get(folder, server.url(), sha256=None).sha256 == SHA256
    assert json.loads((folder / f"{NAME}.json").read_text())["sha256"] == SHA256
    (folder / NAME).write_bytes(OTHER[:-1])
    assert refusal(folder, server.url(), sha256=None) == (
        f"{LABEL}: {folder / NAME} is not the file that was used first (sha256 {sha(OTHER[:-1])}, "
        f"not {sha(CONTENT)}). Delete {folder / NAME} and {NAME}.json beside it to download it "
        f"again, or {WAY_OUT}."
    )
    (folder / NAME).unlink()
    server.files[f"/{NAME}"] = OTHER
    note = folder / f"{NAME}.json"
    assert (
        f": 127.0.0.1 sent another file (sha256 {sha(OTHER)}, not {sha(CONTENT)}; delete {note} "
        "to accept it). "
    ) in refusal(folder, server.url(), sha256=None)
    note.unlink()
    assert get(folder, server.url(), sha256=None).path.read_bytes() == OTHER


def test_a_login_page_is_no_model(server: ModelServer, folder: Path) -> None:
    server.files[f"/{NAME}"] = b"<!DOCTYPE html><html>Log in to this network</html>"
    assert "127.0.0.1 sent a web page instead." in refusal(folder, server.url(), sha256=None)
    assert (visible(folder), hidden(folder)) == ([], [])


@pytest.mark.parametrize("has_length", [True, False])
def test_an_answer_without_end(
    server: ModelServer, folder: Path, has_length: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "_MAX_BYTES", 2_000_000)
    server.has_length = has_length
    words = "offers 3.0 MB, which is no pose model" if has_length else "sends without end"
    assert f"127.0.0.1 {words}." in refusal(folder, server.url())


@pytest.mark.parametrize("target", ["http://example.org/model.onnx", "ftp://example.org/model"])
def test_nothing_unencrypted(server: ModelServer, folder: Path, target: str) -> None:
    server.moved["/resolve"] = target
    scheme = target.partition(":")[0]
    problem = f"leads to {scheme}://example.org, which is not encrypted"
    assert f": example.org {problem}." in refusal(folder, target)
    assert f": 127.0.0.1 {problem}." in refusal(folder, server.url("/resolve"))


# --- zips ----------------------------------------------------------------------------------------


def test_only_the_network_of_a_zip_is_unpacked(server: ModelServer, folder: Path) -> None:
    server.files["/rtmw.zip"] = zipped(
        **{
            "20231122/rtmw_onnx/end2end.onnx": CONTENT,
            "20231122/rtmw_onnx/pipeline.json": b"{}",
            "../../evil.txt": b"evil",
        }
    )
    assert get(folder, server.url("/rtmw.zip")).path.read_bytes() == CONTENT
    assert visible(folder) == [NAME, f"{NAME}.json"]
    assert hidden(folder) == []
    assert not list(folder.parent.rglob("evil.txt"))


def test_a_member_that_wants_to_lie_elsewhere(server: ModelServer, folder: Path) -> None:
    server.files["/rtmw.zip"] = zipped(**{"../../end2end.onnx": CONTENT})
    assert get(folder, server.url("/rtmw.zip")).path == folder / NAME
    assert not list(folder.parent.glob("**/end2end.onnx"))


def test_zip_is_taken_up_too(server: ModelServer, folder: Path) -> None:
    archive = zipped(**{"end2end.onnx": CONTENT})
    server.files["/rtmw.zip"] = archive
    server.cuts = [len(archive) // 2]
    assert get(folder, server.url("/rtmw.zip")).sha256 == SHA256
    assert server.ranges == [None, f"bytes={len(archive) // 2}-"]


def test_a_zip_survives_a_full_disk(
    server: ModelServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The archive need not be fetched again for want of room to unpack it."""
    archive = zipped(**{"end2end.onnx": CONTENT})
    server.files["/rtmw.zip"] = archive
    with monkeypatch.context() as patch:
        fake_disk(patch, free=len(archive))
        assert "the disk is full: 3.0 MB are needed" in refusal(folder, server.url("/rtmw.zip"))
    assert get(folder, server.url("/rtmw.zip")).sha256 == SHA256
    assert len(server.seen) == 1


DAMAGED = zipped(**{"end2end.onnx": CONTENT})


@pytest.mark.parametrize(
    ("archive", "words"),
    [
        (DAMAGED[: len(DAMAGED) // 2], "sent a damaged zip"),
        (DAMAGED[:200] + b"\xff\x00\xff" + DAMAGED[203:], "sent a damaged zip"),
        (CONTENT, "sent a damaged zip"),
        (zipped(**{"model.onnx": CONTENT}), "sent a zip with 0 files end2end.onnx"),
        (
            zipped(**{"a/end2end.onnx": CONTENT, "b/end2end.onnx": OTHER}),
            "sent a zip with 2 files end2end.onnx",
        ),
    ],
    ids=["truncated", "flipped", "no zip", "other member", "two members"],
)
def test_bad_zip(server: ModelServer, folder: Path, archive: bytes, words: str) -> None:
    server.files["/rtmw.zip"] = archive
    assert f"127.0.0.1 {words}." in refusal(folder, server.url("/rtmw.zip"))
    assert (visible(folder), hidden(folder)) == ([], [])


def test_a_zip_that_grows_without_end(
    server: ModelServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "_MAX_BYTES", 2_000_000)
    server.files["/rtmw.zip"] = zipped(**{"end2end.onnx": bytes(3_000_000)})
    assert "sent a zip that unpacks without end" in refusal(folder, server.url("/rtmw.zip"))


# --- the disk ------------------------------------------------------------------------------------


def fake_disk(patch: pytest.MonkeyPatch, free: int) -> None:
    usage = namedtuple("usage", "total used free")  # as the standard library's
    patch.setattr(shutil, "disk_usage", lambda _folder: usage(10**9, 10**9 - free, free))


def test_disk_full(server: ModelServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_disk(monkeypatch, free=3_000_000)
    assert refusal(folder, server.url()) == (
        f"{LABEL} does not fit into the cache ({folder}), the disk is full: 3.0 MB are needed. "
        "Free some space and run the same command again, name another folder in "
        f"EVERANIMATE_CACHE, or {WAY_OUT}."
    )


def test_a_folder_that_cannot_be_made(server: ModelServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "models"
    assert refusal(folder, server.url()) == (
        f"{LABEL} cannot be kept in the cache ({folder}): Not a directory. Make it usable, name "
        f"another folder in EVERANIMATE_CACHE, or {WAY_OUT}."
    )


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "caches" / "everanimate" / "pose"
    monkeypatch.setenv("EVERANIMATE_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("EVERANIMATE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "everanimate" / "pose"


def test_without_a_folder_the_cache_is_used(server: ModelServer) -> None:
    assert get(None, server.url()).path == cache_folder() / NAME


@pytest.mark.parametrize("home", ["caches/rtmlib", "torch"])
def test_files_of_rtmlib_are_used(
    server: ModelServer, tmp_path: Path, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if home == "torch":
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / home))
    theirs = tmp_path / home / "hub" / "checkpoints" / NAME
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(CONTENT)
    assert get(None, server.url()) == Fetched(theirs, SHA256)
    assert server.seen == []
    assert [path.name for path in theirs.parent.iterdir()] == [NAME]
    theirs.write_bytes(OTHER)  # not for this program to complain of
    assert get(None, server.url()) == Fetched(cache_folder() / NAME, SHA256)


FETCH = """
import sys
from pathlib import Path
from everanimate_cli.downloads import fetch
url, sha256, folder = sys.argv[1:]
found = fetch([url], name="model.onnx", sha256=sha256, label="--pose-model rtmw", way_out="",
              folder=Path(folder), on_event=lambda event: print(event.text, flush=True))
print(found.sha256)
"""


def start_fetch(url: str, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FETCH, url, SHA256, str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_two_processes_at_once(server: ModelServer, folder: Path) -> None:
    server.pause_s = 60
    first = start_fetch(server.url(), folder)
    assert next_line(first).startswith(f"downloading {NAME}")
    second = start_fetch(server.url(), folder)
    assert next_line(second) == f"waiting for another process to download {NAME}\n"
    server.goes_on.set()
    assert first.communicate()[0].splitlines()[-1] == SHA256
    assert second.communicate()[0].splitlines() == [SHA256]
    assert len(server.seen) == 1
    assert visible(folder) == [NAME, f"{NAME}.json"]


def test_killed_in_the_middle(server: ModelServer, folder: Path) -> None:
    """Neither the lock nor the part of a killed process is in the way."""
    server.pause_s = 60
    process = start_fetch(server.url(), folder)
    assert next_line(process).startswith("downloading")
    assert next_line(process).startswith("downloaded")
    process.kill()
    process.communicate()
    server.pause_s = 0
    assert get(folder, server.url()).sha256 == SHA256
    assert re.fullmatch(r"bytes=[1-9]\d+-", server.ranges[1] or "")
    assert hidden(folder) == []


# --- the table of models -------------------------------------------------------------------------


def test_every_entry_is_complete() -> None:
    models: list[PoseModel | DetectorModel] = [*POSE_MODELS.values(), *DETECTORS.values()]
    names = [file.name for model in models for file in model.files]
    assert len(names) == len(set(names))
    for model in models:
        for file in model.files:
            assert file.urls
            assert all(url.startswith("https://") for url in file.urls)
            assert file.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", file.sha256)
            assert file.num_mb > 0
    assert {model.detector for model in POSE_MODELS.values()} <= DETECTORS.keys()


def test_what_is_fetched_cannot_change_unseen() -> None:
    """A checksum or a commit, except for one file whose checksum nobody has published."""
    models: list[PoseModel | DetectorModel] = [*POSE_MODELS.values(), *DETECTORS.values()]
    loose = {
        file.name
        for model in models
        for file in model.files
        if file.sha256 is None and any("/resolve/main/" in url for url in file.urls)
    }
    assert loose == {"rtmw-dw-l-m_simcc-cocktail14_270e-256x192_20231122.onnx"}


def test_openmmlab_files_have_rtmlibs_names_and_mirror() -> None:
    """Both are its own rules: the zip's base name, and the same tail on the Hub."""
    (file,) = POSE_MODELS["rtmw"].files
    tail = "rtmw/onnx_sdk/rtmw-dw-x-l_simcc-cocktail14_270e-384x288_20231122.zip"
    assert file.urls[:2] == (
        f"https://download.openmmlab.com/mmpose/v1/projects/{tail}",
        f"https://huggingface.co/Tau-J/RTMPose/resolve/main/{tail}",
    )
    assert file.name == "rtmw-dw-x-l_simcc-cocktail14_270e-384x288_20231122.onnx"


def test_known_and_local_models_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.onnx").touch()
    Path("exported").mkdir()
    Path("exported/end2end.onnx").touch()
    check_models("rtmw", None)
    check_models("toy", "toy")
    check_models("mine.onnx", "exported")
    Path("rtmw").mkdir()  # a name stays a name
    check_models("rtmw", None)


@pytest.mark.parametrize(
    ("pose_model", "detector", "error", "message"),
    [
        (
            "rtmx",
            None,
            SettingsError,
            "--pose-model rtmx is unknown. Known: rtmw, rtmw-m, dwpose, vitpose, vitpose-l, toy, "
            "or give an .onnx file.",
        ),
        (
            "rtmw",
            "yolo",
            SettingsError,
            "--detector yolo is unknown. Known: yolox-m, yolox-tiny, yolox-l, yolov10m, toy, or "
            "give an .onnx file.",
        ),
        (
            "rtmw.onnx",
            None,
            InputError,
            "--pose-model rtmw.onnx does not exist. Give an .onnx file.",
        ),
        (
            "rtmw",
            "models/yolo",
            InputError,
            "--detector models/yolo does not exist. Give an .onnx file.",
        ),
        ("empty", None, InputError, "--pose-model empty has no end2end.onnx. Give an .onnx file."),
    ],
)
def test_unknown_models(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pose_model: str,
    detector: str | None,
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    with pytest.raises(error) as caught:
        check_models(pose_model, detector)
    assert str(caught.value) == message


def test_nothing_heavy_is_imported() -> None:
    heavy = ["numpy", "cv2", "onnxruntime", "torch", "huggingface_hub"]
    program = (
        "import sys, everanimate_cli.downloads\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_hash_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(CONTENT)
    assert hash_file(tmp_path / "x") == SHA256


def test_read_only_cache(
    server: ModelServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shared cache that nobody may write to is good enough."""
    folder.mkdir()
    (folder / NAME).write_bytes(CONTENT)

    def refuse(path: Path, content: object) -> None:
        del content
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(downloads, "_write_json", refuse)
    assert get(folder, server.url()).sha256 == SHA256
    assert visible(folder) == [NAME]
    assert server.seen == []
