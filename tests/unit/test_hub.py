"""Finding a checkpoint or a LoRA, on this machine or on a Hub that a local server plays."""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from tiny import TINY_DEFAULTS, write_tiny_checkpoint

from everanimate_cli import hub as hub_module
from everanimate_cli.errors import EverAnimateError, SettingsError, WeightsError
from everanimate_cli.events import Event, Note
from everanimate_cli.hub import locate_lora, locate_model
from everanimate_cli.records import LoraSpec
from everanimate_cli.settings import HUB_MODEL, HUB_PRESET, ModelDefaults
from everanimate_cli.weights import (
    load_pipeline,
)

VAE_FILE = "vae/diffusion_pytorch_model.safetensors"


def ignore(_event: Event) -> None:
    """An `on_event` for nobody."""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that no test may change."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("original") / "tiny")


def message_of(error: type[EverAnimateError], call: Callable[[], object]) -> str:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    return str(caught.value)


COMMIT = "0123456789abcdef0123456789abcdef01234567"
OFFLINE_HINT = "or use --model toy, which works offline."


class Hub:
    """As much of the Hub's API as a download needs, for files in memory.

    Attributes:
        repositories: Repository -> path -> content.
        refused: What every request is answered with instead: status and headers.
        files_refused: What requests for files are answered with instead.
        num_requests: Requests for repositories and files so far.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.refused: tuple[int, dict[str, str]] | None = None
        self.files_refused: tuple[int, dict[str, str]] | None = None
        self.num_requests = 0

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        api = re.fullmatch(r"/api/models/(\w+/\w+)/(revision|tree)/([\w.]+)(?:\?.*)?", path)
        file = re.fullmatch(r"/(\w+/\w+)/resolve/[\w.]+/(.+)", path)
        if api is None and file is None:  # the library also asks about other things now and then
            return 404, {}, b""
        self.num_requests += 1
        if self.refused is not None:
            return *self.refused, b""
        if api is not None:
            return self.describe(*api.groups())
        assert file is not None
        if self.files_refused is not None:
            return *self.files_refused, b""
        content = self.repositories[file[1]][file[2]]
        return 200, {"ETag": f'"{sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}, content

    def describe(
        self, repository: str, kind: str, revision: str
    ) -> tuple[int, dict[str, str], bytes]:
        files = self.repositories.get(repository)
        if files is None:
            return 401, {"X-Error-Message": "Invalid username or password."}, b""
        if revision not in ("main", "v1", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        described: object
        if kind == "revision":
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            described = {"id": repository, "sha": COMMIT, "siblings": siblings}
        else:
            described = [
                {"type": "file", "path": name, "size": len(data), "oid": sha1(data).hexdigest()}
                for name, data in files.items()
            ]
        return 200, {"Content-Type": "application/json"}, json.dumps(described).encode()

    def add(self, repository: str, folder: Path) -> None:
        self.repositories[repository] = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }


@pytest.fixture(scope="module")
def hub_server() -> Iterator[tuple[str, list[Hub]]]:
    """Address of a server, and the hub that it answers for."""
    current: list[Hub] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, headers, content = current[-1].answer(self.path)
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_args: object) -> None:
            """Keep the test's output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", current
    server.shutdown()


def use_hub(address: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Read from the environment when the library is imported; a test below does it that way.
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(hub_server: tuple[str, list[Hub]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """An empty Hub, with an empty cache in the folder `cache`."""
    address, current = hub_server
    current[:] = [Hub()]
    use_hub(address, tmp_path / "cache", monkeypatch)
    return current[0]


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty cache of a machine that reaches no Hub."""
    use_hub("http://127.0.0.1:9", tmp_path / "cache", monkeypatch)
    return tmp_path / "cache"


def address() -> str:
    return huggingface_hub.constants.ENDPOINT


def test_a_model_is_downloaded_once_and_then_needs_no_network(
    hub: Hub, original: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.add("owner/tiny", original)
    hub.repositories["owner/tiny"] |= {
        "transformer/diffusion_pytorch_model.bin": b"a pickle",
        "assets/film.mp4": b"not needed",
    }
    events: list[Event] = []
    source = locate_model("owner/tiny", events.append)
    assert capfd.readouterr() == ("", "")
    assert source.revision == COMMIT
    assert source.defaults == TINY_DEFAULTS
    files = {
        path.relative_to(source.folder).as_posix()
        for path in source.folder.rglob("*")
        if path.is_file()
    }
    assert files == {
        path.relative_to(original).as_posix() for path in original.rglob("*") if path.is_file()
    }
    texts = [event.text for event in events if isinstance(event, Note)]
    assert texts[0] == f"downloading owner/tiny: 0.00 GB to {tmp_path / 'cache'}"
    assert texts[1:]
    assert all(text == "downloaded 0.00 of 0.00 GB" for text in texts[1:])
    assert len(texts) <= 10
    load_pipeline(source, [], torch.device("cpu"), torch.float32)

    num_requests = hub.num_requests
    assert locate_model("owner/tiny", ignore) == source
    assert locate_model(f"owner/tiny@{COMMIT}", ignore).folder == source.folder
    assert hub.num_requests == num_requests
    assert locate_model("owner/tiny@v1", ignore).revision == COMMIT
    assert hub.num_requests > num_requests


def test_a_download_tells_how_far_it_is() -> None:
    events: list[Event] = []
    progress = hub_module._progress_class(2 * 10**9, events.append)
    with progress(total=3, unit="it") as files, progress(total=0, unit="B") as num_bytes:
        assert files.disable
        assert num_bytes.disable
        for _ in range(3):
            files.update()
        for _ in range(40):
            num_bytes.update(5 * 10**7)
    assert events == [
        Note(text=f"downloaded {tenth * 0.2:.2f} of 2.00 GB") for tenth in range(1, 10)
    ]


def test_a_partial_download_is_completed(
    hub: Hub, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("owner/tiny", original)
    source = locate_model("owner/tiny", ignore)
    (source.folder / VAE_FILE).unlink()
    hub.refused = (503, {})
    assert message_of(WeightsError, lambda: locate_model("owner/tiny", ignore)) == (
        f"--model owner/tiny cannot be downloaded: {address()} answered 503. Try again later."
    )
    hub.refused = None
    assert locate_model("owner/tiny", ignore) == source
    assert (source.folder / VAE_FILE).read_bytes() == (original / VAE_FILE).read_bytes()
    # A cache that does not remember what belongs to the snapshot; moved, since the process does.
    (source.folder / VAE_FILE).unlink()
    (tree,) = source.folder.parents[1].glob("trees/*")
    tree.unlink()
    moved = (tmp_path / "cache").rename(tmp_path / "moved")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(moved))
    assert (locate_model("owner/tiny", ignore).folder / VAE_FILE).is_file()


def test_a_partial_download_without_network(
    hub: Hub, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("owner/tiny", original)
    (locate_model("owner/tiny", ignore).folder / VAE_FILE).unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert message_of(WeightsError, lambda: locate_model("owner/tiny", ignore)) == (
        f"--model owner/tiny is only partly in the cache ({tmp_path / 'cache'}) and "
        "HF_HUB_OFFLINE is set. Unset it to download it, give a checkpoint folder, "
        f"{OFFLINE_HINT}"
    )


@pytest.mark.parametrize(
    ("model", "refused", "message"),
    [
        (
            "owner/wrong",
            None,
            "--model owner/wrong is not on {hub}, or is private. "
            "Check the name, or log in with 'hf auth login'.",
        ),
        (
            "owner/tiny@v9",
            None,
            "--model owner/tiny@v9 has no revision v9. Give a branch, a tag or a commit after '@'.",
        ),
        (
            "owner/lora",
            None,
            "--model owner/lora has no transformer/config.json. "
            "Give a repository in diffusers layout.",
        ),
        (
            "owner/tiny",
            (403, {"X-Error-Code": "GatedRepo"}),
            "--model owner/tiny is gated. Ask for access at {hub}/owner/tiny, "
            "then log in with 'hf auth login'.",
        ),
        (
            "owner/tiny",
            (500, {}),
            "--model owner/tiny cannot be downloaded: {hub} answered 500. Try again later.",
        ),
    ],
)
def test_the_hubs_refusals(
    hub: Hub,
    original: Path,
    model: str,
    refused: tuple[int, dict[str, str]] | None,
    message: str,
) -> None:
    hub.add("owner/tiny", original)
    hub.repositories["owner/lora"] = {"a.safetensors": b"weights"}
    hub.refused = refused
    call = partial(locate_model, model, ignore)
    assert message_of(WeightsError, call) == message.format(hub=address())


def test_a_gated_repository_shows_its_files_but_gives_none(hub: Hub, original: Path) -> None:
    hub.add("owner/tiny", original)
    hub.files_refused = (401, {"X-Error-Code": "GatedRepo"})
    assert message_of(WeightsError, lambda: locate_model("owner/tiny", ignore)) == (
        f"--model owner/tiny is gated. Ask for access at {address()}/owner/tiny, "
        "then log in with 'hf auth login'."
    )


def test_a_download_that_breaks_off(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["owner/lora"] = {"a.safetensors": b"weights"}

    def break_off(*_args: object, local_files_only: bool = False, **_kwargs: object) -> None:
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not there")
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", break_off)
    call = partial(locate_lora, LoraSpec("owner/lora/a.safetensors"))
    error: Exception = RuntimeError("Data processing error: connection reset.\nSee the log.")
    assert message_of(WeightsError, call) == (
        "--lora owner/lora/a.safetensors: the download broke off (Data processing error: "
        "connection reset). Run the same command again; finished files are kept."
    )
    error = OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space left"):  # the command line says what to do
        call()


@pytest.mark.parametrize(
    ("model", "size"), [(HUB_MODEL, " (about 82 GB)"), ("owner/name@v1", "")], ids=["base", "other"]
)
def test_without_a_network(
    no_network: Path, model: str, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = partial(locate_model, model, ignore)
    started_s = time.monotonic()
    assert message_of(WeightsError, call) == (
        f"--model {model} is not in the cache ({no_network}) and http://127.0.0.1:9 cannot be "
        f"reached. Connect to the network to download it{size}, give a checkpoint folder, "
        f"{OFFLINE_HINT}"
    )
    assert time.monotonic() - started_s < 2  # the library's own retries take 23 s
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert message_of(WeightsError, call) == (
        f"--model {model} is not in the cache ({no_network}) and HF_HUB_OFFLINE is set. "
        f"Unset it to download it{size}, give a checkpoint folder, {OFFLINE_HINT}"
    )


def test_a_lora_without_a_network(no_network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = HUB_PRESET.lora[0]
    assert message_of(WeightsError, lambda: locate_lora(spec)) == (
        f"--lora {spec.source} is not in the cache ({no_network}) and http://127.0.0.1:9 cannot "
        "be reached. Connect to the network to download it, give a .safetensors file, "
        f"{OFFLINE_HINT}"
    )
    call = partial(locate_lora, LoraSpec("owner/lora"))
    advice = "to see its files, or give owner/lora/PATH/TO/FILE.safetensors."
    assert message_of(WeightsError, call) == (
        "--lora owner/lora names no file and http://127.0.0.1:9 cannot be reached. "
        f"Connect to the network {advice}"
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert message_of(WeightsError, call) == (
        f"--lora owner/lora names no file and HF_HUB_OFFLINE is set. Unset it {advice}"
    )


def test_a_lora_from_the_hub(hub: Hub) -> None:
    hub.repositories["owner/lora"] = {
        "README.md": b"words",
        "ckpts/a.safetensors": b"weights a",
        "b.safetensors": b"weights b",
    }
    path = locate_lora(LoraSpec("owner/lora/ckpts/a.safetensors", 0.5))
    assert path.read_bytes() == b"weights a"
    num_requests = hub.num_requests
    assert locate_lora(LoraSpec(f"owner/lora/ckpts/a.safetensors@{COMMIT}")) == path
    assert hub.num_requests == num_requests
    known = "Known: owner/lora/ckpts/a.safetensors, owner/lora/b.safetensors."
    assert message_of(WeightsError, lambda: locate_lora(LoraSpec("owner/lora"))) == (
        f"--lora owner/lora names no file. {known}"
    )
    assert message_of(
        WeightsError, lambda: locate_lora(LoraSpec("owner/lora/c.safetensors@v1"))
    ) == (f"--lora owner/lora/c.safetensors@v1 has no c.safetensors. {known}")
    hub.repositories["owner/words"] = {"README.md": b"words"}
    assert message_of(WeightsError, lambda: locate_lora(LoraSpec("owner/words"))) == (
        "--lora owner/words names no file. Known: no .safetensors file."
    )


@pytest.mark.parametrize("locate", [locate_model, lambda name, _: locate_lora(LoraSpec(name))])
def test_a_name_that_no_repository_can_have(locate: Callable[..., object]) -> None:
    message = message_of(SettingsError, lambda: locate("owner/two--dashes", ignore))
    assert message.partition(" ")[2] == (
        "owner/two--dashes is not a valid name of a Hub repository."
    )


def test_an_unknown_name() -> None:
    assert message_of(SettingsError, lambda: locate_model("toyy", ignore)) == (
        "--model toyy is unknown. Give 'toy' (embedded, works offline), a checkpoint folder, "
        f"or a Hub id such as {HUB_MODEL}."
    )


def test_the_toy_is_embedded(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "TOY_FOLDER", original)
    source = locate_model("toy", ignore)
    assert (source.folder, source.name, source.revision) == (original, "toy", None)
    assert isinstance(source.defaults, ModelDefaults)
    monkeypatch.setattr(hub_module, "TOY_FOLDER", tmp_path / "gone")
    assert message_of(WeightsError, lambda: locate_model("toy", ignore)) == (
        f"--model toy is missing in this installation ({tmp_path / 'gone'}). "
        "Install everanimate again."
    )


def test_the_environment_counts_and_stderr_stays_clean(tmp_path: Path) -> None:
    """The library reads the environment when it is imported, and would log every retry."""
    code = (
        "from everanimate_cli.hub import locate_model\n"
        "from everanimate_cli.errors import WeightsError\n"
        "import sys, time\n"
        "sys.stderr.write('begin\\n')\n"
        "started_s = time.monotonic()\n"
        f"try: locate_model('{HUB_MODEL}@{COMMIT}', print)\n"
        "except WeightsError as error: print(error)\n"
        "assert time.monotonic() - started_s < 5\n"
    )
    environment = {
        "PATH": "",
        "PYTHONPATH": str(Path(hub_module.__file__).parents[1]),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == (
        f"--model {HUB_MODEL}@{COMMIT} is not in the cache ({tmp_path / 'hub'}) and "
        "http://127.0.0.1:9 cannot be reached. Connect to the network to download it "
        f"(about 82 GB), give a checkpoint folder, {OFFLINE_HINT}\n"
    )
    assert done.stderr.partition("begin\n")[2] == ""
