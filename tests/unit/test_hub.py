"""Finding a checkpoint or a LoRA, on this machine or on a Hub that a local server plays."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import huggingface_hub
import pytest
import torch
from hub_server import COMMIT, DAY, LATER_DAY, Hub, use_hub
from original import build_original_networks, write_original
from tiny import TINY_DEFAULTS, write_tiny_checkpoint

from everanimate_cli import hub as hub_module
from everanimate_cli.checkpoint import check_checkpoint
from everanimate_cli.errors import EverAnimateError, SettingsError, WeightsError
from everanimate_cli.events import Event, Note, PhaseAdvanced, PhaseStarted
from everanimate_cli.hub import locate_lora, locate_model
from everanimate_cli.hub_transfer import ADDRESS_ERROR, Meter, part_path
from everanimate_cli.model_folder import ModelSource
from everanimate_cli.records import LoraSpec
from everanimate_cli.runs import try_lock
from everanimate_cli.settings import HUB_MODEL, HUB_PRESET, ModelDefaults
from everanimate_cli.weights import load_pipeline

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
    assert "\n" not in str(caught.value)
    return str(caught.value)


OFFLINE_HINT = "or use --model toy, which works offline."


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
        "image_processor/tokenizer.json": b"not needed",
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
    size = sum(len(hub.repositories["owner/tiny"][name]) for name in files)
    assert events[0] == Note(
        text=f"downloading owner/tiny: {size / 1e6:.1f} MB, to {tmp_path / 'cache'}"
    )
    num_mb = round(size / 1e6)
    assert events[1] == PhaseStarted(name="downloading owner/tiny", total=num_mb, done=0, unit="MB")
    told = [event.done for event in events[2:] if isinstance(event, PhaseAdvanced)]
    assert told == list(range(1, num_mb + 1))
    load_pipeline(source, [], torch.device("cpu"), torch.float32)

    num_requests = hub.num_requests
    assert locate_model("owner/tiny", ignore) == source
    assert locate_model(f"owner/tiny@{COMMIT}", ignore).folder == source.folder
    assert hub.num_requests == num_requests
    assert locate_model("owner/tiny@v1", ignore).revision == COMMIT
    assert hub.num_requests > num_requests


def test_a_download_tells_how_far_it_is() -> None:
    events: list[Event] = []
    meter = Meter("owner/tiny", 3 * 10**6, 5 * 10**5, events.append)
    bar_class = meter.bar_class()
    with (
        bar_class(total=3, unit="it") as files,
        bar_class(total=0, unit="B", name="huggingface_hub.snapshot_download.transfer") as sent,
        bar_class(total=0, unit="B", name="huggingface_hub.snapshot_download") as num_bytes,
    ):
        assert files.disable
        for _ in range(3):
            files.update()
        for _ in range(24):
            sent.update(10**5)
            num_bytes.update(10**5)
    meter.finish()
    assert events == [
        PhaseStarted(name="downloading owner/tiny", total=3, done=0, unit="MB"),
        *(PhaseAdvanced(done=megabytes) for megabytes in (1, 2, 3)),
    ]


def test_a_branch_that_moves_while_it_is_downloaded(
    hub: Hub, original: Path, tmp_path: Path
) -> None:
    """All files are of one commit; files of two would be another model, or none."""
    hub.add("owner/tiny", original)
    defaults = json.loads((original / "everanimate.json").read_text())
    other = "f" * 40
    later = {name: content[::-1] for name, content in hub.repositories["owner/tiny"].items()}
    later["everanimate.json"] = json.dumps(defaults | {"prompt": "another"}).encode()
    hub.moves_to["owner/tiny"] = (other, later)
    source = locate_model("owner/tiny", ignore)
    assert source.revision == COMMIT
    for path in original.rglob("*"):
        if path.is_file():
            found = source.folder / path.relative_to(original)
            assert found.read_bytes() == path.read_bytes()
    # What the branch means is kept, so that it is not asked for again.
    num_requests = hub.num_requests
    assert locate_model("owner/tiny", ignore) == source
    assert hub.num_requests == num_requests
    reference = tmp_path / "cache" / "models--owner--tiny" / "refs" / "main"
    assert reference.read_text() == COMMIT
    assert not any(f"/{other}/" in request.path for request in hub.requests)


def test_the_beginning_of_a_commit_names_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["owner/lora"] = {"a.safetensors": WEIGHTS}
    short = LoraSpec(f"{LORA.source}@{COMMIT[:7]}")
    path = locate_lora(short)
    assert path.parent.name == COMMIT
    num_requests = hub.num_requests
    # The cache knows it from then on; other beginnings of the same commit too.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for length in (7, 12, 40):
        assert locate_lora(LoraSpec(f"{LORA.source}@{COMMIT[:length]}")) == path
    assert hub.num_requests == num_requests
    assert not list((path.parents[2] / "refs").glob("*"))


def test_the_beginning_of_a_commit_means_it_when_the_branch_has_gone_on(hub: Hub) -> None:
    hub.repositories["owner/lora"] = {"a.safetensors": WEIGHTS}
    hub.moves_to["owner/lora"] = ("f" * 40, {"a.safetensors": WEIGHTS[1:]})
    endpoint = huggingface_hub.constants.ENDPOINT
    huggingface_hub.HfApi(endpoint).model_info("owner/lora", revision="main")
    path = locate_lora(LoraSpec(f"{LORA.source}@{COMMIT[:7]}"))
    assert (path.parent.name, path.read_bytes()) == (COMMIT, WEIGHTS)
    newest = locate_lora(LORA)
    assert (newest.parent.name, newest.read_bytes()) == ("f" * 40, WEIGHTS[1:])


def test_a_day_means_what_was_newest_then(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["owner/lora"] = {"a.safetensors": WEIGHTS}
    hub.moves_to["owner/lora"] = ("f" * 40, {"a.safetensors": WEIGHTS[1:]})
    found = [
        locate_lora(LoraSpec(f"{LORA.source}@{day}")).parent.name
        for day in (DAY, "2026-06-09", LATER_DAY, "2030-01-01")
    ]
    assert found == [COMMIT, COMMIT, "f" * 40, "f" * 40]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert locate_lora(LoraSpec(f"{LORA.source}@{DAY}")).parent.name == COMMIT


@pytest.mark.parametrize("name", ["decade5", "2025-11-12"])
def test_a_branch_may_be_called_like_a_commit_or_a_day(hub: Hub, name: str) -> None:
    hub.repositories["owner/lora"] = {"a.safetensors": WEIGHTS}
    assert f"has no revision {name}." in message_of(
        WeightsError, lambda: locate_lora(LoraSpec(f"{LORA.source}@{name}"))
    )
    hub.branches.add(name)
    assert locate_lora(LoraSpec(f"{LORA.source}@{name}")).parent.name == COMMIT


def test_the_released_loras_are_those_of_one_day(hub: Hub) -> None:
    (spec,) = HUB_PRESET.lora
    repository, name = "epfl-vita/everanimate", spec.source.split("/", 2)[2]
    hub.repositories[repository] = {name: WEIGHTS}
    hub.moves_to[repository] = ("f" * 40, {name: WEIGHTS[1:]})
    endpoint = huggingface_hub.constants.ENDPOINT
    huggingface_hub.HfApi(endpoint).model_info(repository, revision="main")
    assert locate_lora(spec).read_bytes() == WEIGHTS
    newest = LoraSpec(f"{spec.source}@main")
    assert locate_lora(newest).read_bytes() == WEIGHTS[1:]


def test_the_default_base_is_of_one_commit_wherever_its_branch_has_gone(
    hub: Hub, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(HUB_MODEL, original)
    assert message_of(WeightsError, lambda: locate_model(HUB_MODEL, ignore)) == (
        f"--model {HUB_MODEL} has no revision 6f4df10. Give a branch, a tag or a commit after '@'."
    )
    monkeypatch.setitem(hub_module.HUB_REVISIONS, HUB_MODEL, COMMIT[:7])
    hub.moves_to[HUB_MODEL] = ("f" * 40, {})
    assert locate_model(HUB_MODEL, ignore).revision == COMMIT


def test_what_a_link_in_the_cache_leads_to_elsewhere_is_not_deleted(
    hub: Hub, tmp_path: Path
) -> None:
    hub.repositories["owner/lora"] = {"a.safetensors": WEIGHTS}
    path = locate_lora(LORA)
    path.unlink()
    (tmp_path / "mine.safetensors").write_bytes(WEIGHTS[:9])
    path.symlink_to(tmp_path / "mine.safetensors")
    plan = hub_module.plan_download(hub_module.lora_asset(LORA.source))
    assert (hub_module.fetch(plan, ignore) / "a.safetensors").read_bytes() == WEIGHTS
    assert (tmp_path / "mine.safetensors").read_bytes() == WEIGHTS[:9]


def test_what_was_begun_is_completed_at_its_commit(hub: Hub, original: Path) -> None:
    """Of a branch that has moved; else one missing file would bring all of it again."""
    hub.add("owner/tiny", original)
    source = locate_model("owner/tiny", ignore)
    later = {**hub.repositories["owner/tiny"], VAE_FILE: b"another"}
    hub.moves_to["owner/tiny"] = ("f" * 40, later)
    (source.folder / VAE_FILE).resolve().unlink()  # the link stays, and leads nowhere
    hub.requests.clear()
    assert locate_model("owner/tiny", ignore) == source
    assert (source.folder / VAE_FILE).read_bytes() == (original / VAE_FILE).read_bytes()
    assert len(hub.sent_ranges()) == 1
    # Unless the publisher has rewritten the history.
    (source.folder / VAE_FILE).resolve().unlink()
    hub.forgotten.add(COMMIT)
    hub.moves_to["owner/tiny"] = ("f" * 40, hub.repositories["owner/tiny"])
    assert locate_model("owner/tiny", ignore).revision == "f" * 40


def test_a_download_that_stops_does_not_forget_what_is_there(hub: Hub) -> None:
    """The branch means the old commit until the new one is whole."""
    hub.repositories["owner/lora"] = {"a.safetensors": WEIGHTS, "b.safetensors": WEIGHTS[1:]}
    hub.moves_to["owner/lora"] = ("f" * 40, {"b.safetensors": WEIGHTS[2:]})
    path = locate_lora(LORA)
    hub.files_refused = UNAVAILABLE
    message_of(WeightsError, lambda: locate_lora(LoraSpec("owner/lora/b.safetensors")))
    assert locate_lora(LORA) == path
    hub.files_refused = None
    assert locate_lora(LoraSpec("owner/lora/b.safetensors")).read_bytes() == WEIGHTS[2:]


@pytest.mark.parametrize("name", [VAE_FILE, "transformer/config.json"])
def test_what_is_cut_short_in_the_cache(
    hub: Hub, original: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts as missing: weights wherever they are used, other files in a new download."""
    hub.add("owner/tiny", original)
    source = locate_model("owner/tiny", ignore)
    content = (original / name).read_bytes()
    for length in (len(content) // 2, 20, 0):
        (source.folder / name).resolve().write_bytes(content[:length])
        if name == VAE_FILE:
            with monkeypatch.context() as patch:
                patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
                assert message_of(WeightsError, lambda: locate_model("owner/tiny", ignore)) == (
                    f"--model owner/tiny is only partly in the cache ({tmp_path / 'cache'}), where "
                    f"{name} is cut short, and HF_HUB_OFFLINE is set. Unset it and run everanimate "
                    f"models pull owner/tiny, give a checkpoint folder, {OFFLINE_HINT}"
                )
        plan = hub_module.plan_download(hub_module.model_asset("owner/tiny"))
        assert [file.name for file in plan.missing] == [name]
        if name == VAE_FILE:
            assert locate_model("owner/tiny", ignore) == source
        else:
            assert hub_module.fetch(plan, ignore) == source.folder
        assert (source.folder / name).read_bytes() == content
        assert locate_model("owner/tiny", ignore) == source


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
        "HF_HUB_OFFLINE is set. Unset it and run everanimate models pull owner/tiny, give a "
        f"checkpoint folder, {OFFLINE_HINT}"
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
            "Give a repository in diffusers or the original layout.",
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


WEIGHTS = bytes(range(250)) * 100  # of a file in 25 pieces
LORA = LoraSpec("owner/lora/a.safetensors")
UNAVAILABLE = (503, {})


def arrived(cache: Path) -> list[int]:
    """Bytes of unfinished files."""
    return [path.stat().st_size for path in cache.rglob("*.part")]


def test_an_interrupted_download_goes_on_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["owner/lora"] = {"a.safetensors": WEIGHTS}
    hub.break_after, hub.refused_then = 10_500, UNAVAILABLE
    assert message_of(WeightsError, lambda: locate_lora(LORA)) == (
        f"--lora {LORA.source} cannot be downloaded: {address()} answered 503. Try again later."
    )
    assert arrived(tmp_path / "cache") == [10_000]
    hub.break_after = hub.refused = None
    hub.requests.clear()
    events: list[Event] = []
    assert locate_lora(LORA, events.append).read_bytes() == WEIGHTS
    assert hub.sent_ranges() == ["bytes=10000-"]
    assert events[0] == Note(
        text=f"downloading {LORA.source}: 0.0 MB, of which 0.0 MB are there, "
        f"to {tmp_path / 'cache'}"
    )
    assert arrived(tmp_path / "cache") == []


def test_a_connection_that_is_lost_again_and_again(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["owner/lora"] = {"a.safetensors": WEIGHTS}
    hub.break_after = 5_500
    assert locate_lora(LORA).read_bytes() == WEIGHTS
    assert hub.sent_ranges() == ["", *(f"bytes={5000 * i}-" for i in range(1, 5))]
    hub.repositories["owner/other"] = {"a.safetensors": WEIGHTS[1:]}
    hub.break_after = 500  # never a whole piece
    other = LoraSpec("owner/other/a.safetensors")
    message = message_of(WeightsError, lambda: locate_lora(other))
    assert message.startswith(f"--lora {other.source}: the download broke off (")
    assert message.endswith("Run the same command again to go on; what has arrived is kept.")
    assert arrived(tmp_path / "cache") == []


def test_stopping_keeps_what_has_arrived(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["owner/lora"] = {"a.safetensors": WEIGHTS * 100}

    def stop(event: Event) -> None:
        if isinstance(event, PhaseAdvanced):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        locate_lora(LORA, stop)
    (num_bytes,) = arrived(tmp_path / "cache")
    assert 900_000 <= num_bytes <= 10**6
    assert locate_lora(LORA).read_bytes() == WEIGHTS * 100
    assert hub.sent_ranges()[-1] == f"bytes={num_bytes}-"


def test_what_is_not_what_the_hub_states_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["owner/lora"] = {"a.safetensors": WEIGHTS}
    hub.corrupted.add("a.safetensors")
    message = message_of(WeightsError, lambda: locate_lora(LORA))
    assert message.startswith(
        f"--lora {LORA.source}: the download broke off (a.safetensors arrived damaged: sha256 "
    )
    assert not list((tmp_path / "cache").rglob("*.part"))
    assert not list((tmp_path / "cache").rglob("blobs/*"))
    hub.corrupted.clear()
    assert locate_lora(LORA).read_bytes() == WEIGHTS


def test_more_than_the_hub_states_is_refused(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would be thrown away and begun anew for ever."""
    hub.repositories["owner/lora"] = {"a.safetensors": WEIGHTS}
    monkeypatch.setattr(hub, "send_part", lambda *_: (200, {}, WEIGHTS * 2))
    assert message_of(WeightsError, lambda: locate_lora(LORA)) == (
        f"--lora {LORA.source}: the download broke off (a.safetensors is larger than the "
        f"{len(WEIGHTS)} bytes that are stated). "
        "Run the same command again to go on; what has arrived is kept."
    )
    assert not list((tmp_path / "cache").rglob("*.part"))
    monkeypatch.undo()


NO_HUB = (
    "--lora owner/lora/a.safetensors cannot be downloaded: {hub} does not answer as the Hub does. "
    "Check HF_ENDPOINT, and in a browser whether the network asks for a login."
)


@pytest.mark.parametrize("page", [b"<html>log in</html>", b"[]", b"null", b"{}", b"[" * 100_000])
def test_a_page_that_is_no_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch, page: bytes) -> None:
    monkeypatch.setattr(hub, "describe", lambda *_: (200, {"Content-Type": "text/html"}, page))
    assert message_of(WeightsError, lambda: locate_lora(LORA)) == NO_HUB.format(hub=address())


@pytest.mark.parametrize(
    "change",
    [
        {"sha": None},
        {"sha": "../../x"},
        {"rfilename": "../../a.safetensors"},
        {"rfilename": "/elsewhere/a.safetensors"},
        {"size": -1},
        {"size": "many"},
        {"lfs": {"sha256": "../../../../x", "size": 1, "pointerSize": 1}},
        {"lfs": {"sha256": "abc", "size": 1, "pointerSize": 1}},
    ],
    ids=str,
)
def test_a_description_that_leads_elsewhere(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    """Names, commits and hashes become paths in the cache."""
    hub.repositories["owner/lora"] = {"a.safetensors": WEIGHTS}
    status, headers, page = hub.describe("owner/lora", "revision", "main")
    described = json.loads(page)
    (described if "sha" in change else described["siblings"][0]).update(change)
    answer = (status, headers, json.dumps(described).encode())
    monkeypatch.setattr(hub, "describe", lambda *_: answer)
    assert message_of(WeightsError, lambda: locate_lora(LORA)) == NO_HUB.format(hub=address())
    assert not list(tmp_path.iterdir())


def test_a_hub_that_tells_sizes_of_large_files_only(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["owner/lora"] = {"a.safetensors": WEIGHTS}
    status, headers, page = hub.describe("owner/lora", "revision", "main")
    described = json.loads(page)
    del described["siblings"][0]["size"]
    describe = hub.describe
    monkeypatch.setattr(
        hub,
        "describe",
        lambda repository, kind, revision: (
            (status, headers, json.dumps(described).encode())
            if kind == "revision"
            else describe(repository, kind, revision)
        ),
    )
    assert locate_lora(LORA).read_bytes() == WEIGHTS


def test_what_is_too_large_for_http_is_left_to_the_library(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["owner/lora"] = {"a.safetensors": WEIGHTS}
    monkeypatch.setattr(huggingface_hub.constants, "MAX_HTTP_DOWNLOAD_SIZE", len(WEIGHTS) - 1)
    message = message_of(WeightsError, lambda: locate_lora(LORA))  # this hub has no Xet
    assert "Install `hf_xet`" in message


def test_a_cache_that_cannot_be_written(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["owner/lora"] = {"a.safetensors": WEIGHTS}
    (tmp_path / "cache").write_text("in the way")
    message = message_of(WeightsError, lambda: locate_lora(LORA))
    assert message.startswith(
        f"--lora {LORA.source} cannot be kept in the cache ({tmp_path}/cache)"
    )
    assert message.endswith("Make it writable, or name another folder in HF_HOME.")


def test_a_home_that_is_a_file(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token is looked for there; that used to count as a Hub that cannot be reached."""
    hub.repositories["owner/lora"] = {"a.safetensors": WEIGHTS}
    (tmp_path / "home").write_text("in the way")
    monkeypatch.setattr(
        huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token")
    )
    message = message_of(WeightsError, lambda: locate_lora(LORA))
    assert message == (
        f"--lora {LORA.source} cannot be kept in the cache ({tmp_path}/cache): Not a directory, "
        f"{tmp_path}/home/token. Make it writable, or name another folder in HF_HOME."
    )


def test_a_cache_that_may_not_be_written_is_used_as_it_is(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a tag that is not known yet, all files are there: nothing must be written."""
    hub.repositories["owner/lora"] = {"a.safetensors": WEIGHTS}
    path = locate_lora(LORA)
    write_text = Path.write_text

    def refuse(self: Path, *args: Any, **kwargs: Any) -> int:
        if "refs" in self.parts:
            raise PermissionError(13, "Permission denied", str(self))
        return write_text(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", refuse)
    assert locate_lora(LoraSpec(f"{LORA.source}@v1")) == path


def test_an_address_a_token_and_a_proxy_that_cannot_work(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["owner/lora"] = {"a.safetensors": WEIGHTS}
    locate = partial(locate_lora, LORA)
    monkeypatch.setenv("HF_TOKEN", "hf_ü")
    assert "the token is none: it holds more than ASCII" in message_of(WeightsError, locate)
    monkeypatch.delenv("HF_TOKEN")

    def lacks_socks(*_args: object, **_kwargs: object) -> None:
        raise ImportError("Using SOCKS proxy, but 'socksio' is missing.")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lacks_socks)
    assert message_of(WeightsError, locate).endswith(
        "and nothing can be asked: Using SOCKS proxy, but 'socksio' is missing."
    )
    monkeypatch.undo()

    def lacks_port(*_args: object, **_kwargs: object) -> None:
        raise ADDRESS_ERROR("Invalid port: ':1'")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lacks_port)
    assert message_of(WeightsError, locate).endswith(
        ", and a proxy of the environment has no valid address: Invalid port: ':1'. "
        "Check HTTPS_PROXY, HTTP_PROXY and ALL_PROXY."
    )
    monkeypatch.undo()
    use_hub("hf.example", Path("nowhere"), monkeypatch)
    assert message_of(WeightsError, locate) == (
        f"--lora {LORA.source} cannot be downloaded: HF_ENDPOINT hf.example is no address. "
        "Write https:// before it: https://hf.example."
    )


def test_a_token_is_not_sent_in_the_clear(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that is encrypted may not lead to its own unencrypted address."""
    sent: list[dict[str, str]] = []

    def find(url: str, **_kwargs: object) -> SimpleNamespace:
        return SimpleNamespace(location=url.replace("http:", "https:"))

    def receive(_url: str, content: IO[bytes], **kwargs: Any) -> None:
        sent.append(kwargs["headers"])
        content.write(WEIGHTS)

    hub.repositories["owner/lora"] = {"a.safetensors": WEIGHTS}
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", find)
    monkeypatch.setattr("everanimate_cli.hub_transfer.http_get", receive)
    assert locate_lora(LORA).read_bytes() == WEIGHTS
    assert ["authorization" in headers for headers in sent] == [False]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"../../..", b"main", b""])
def test_a_reference_that_is_no_commit_counts_as_none(
    no_network: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    storage = no_network / "models--owner--lora"
    (storage / "snapshots" / "main").mkdir(parents=True)
    (storage / "snapshots" / "main" / "a.safetensors").write_bytes(WEIGHTS)
    (no_network.parent / "a.safetensors").write_bytes(WEIGHTS)
    (storage / "refs").mkdir()
    (storage / "refs" / "main").write_bytes(content)
    assert "is not in the cache" in message_of(WeightsError, lambda: locate_lora(LORA))


def test_a_part_of_another_size_is_not_trusted(hub: Hub) -> None:
    hub.repositories["owner/lora"] = {"a.safetensors": WEIGHTS}
    locate = partial(locate_lora, LORA)
    hub.break_after, hub.refused_then = 10_500, UNAVAILABLE
    message_of(WeightsError, locate)
    (part,) = Path(huggingface_hub.constants.HF_HUB_CACHE).rglob("*.part")
    part.write_bytes(bytes(len(WEIGHTS) + 1))
    hub.break_after = hub.refused = None
    assert locate().read_bytes() == WEIGHTS


def test_the_disk_is_looked_at_before_the_download(
    hub: Hub, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("owner/tiny", original)
    seen: list[Path] = []

    def almost_full(folder: Path) -> object:
        seen.append(folder)
        return shutil._ntuple_diskusage(10**9, 10**9 - 10**5, 10**5)  # type: ignore[attr-defined]

    monkeypatch.setattr(shutil, "disk_usage", almost_full)
    size = sum(len(data) for data in hub.repositories["owner/tiny"].values())
    assert message_of(WeightsError, lambda: locate_model("owner/tiny", ignore)) == (
        f"--model owner/tiny takes {size / 1e6:.1f} MB more, but {tmp_path / 'cache'} has "
        "0.1 MB free. Free some space, or set HF_HOME to a folder on a larger disk."
    )
    assert seen == [tmp_path]
    assert hub.num_requests == 1
    assert not (tmp_path / "cache").exists()


def test_a_full_disk_is_for_the_command_line_to_tell(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["owner/lora"] = {"a.safetensors": WEIGHTS}

    def fill_up(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("everanimate_cli.hub_transfer.http_get", fill_up)
    with pytest.raises(OSError, match="No space left"):
        locate_lora(LORA)


def test_two_processes_do_not_disturb_each_other(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["owner/lora"] = {"a.safetensors": WEIGHTS}
    part = part_path(
        "owner/lora",
        hub_module.plan_download(hub_module.lora_asset(LORA.source)).files[0].sha256 or "",
    )
    part.parent.mkdir(parents=True)
    other = part.open("ab")
    assert try_lock(other)
    monkeypatch.setattr("everanimate_cli.hub_transfer._LOCK_WAIT_S", 0.01)
    texts: list[str] = []

    def finish(event: Event) -> None:
        if isinstance(event, Note):
            texts.append(event.text)
            if event.text.startswith("waiting"):
                other.write(WEIGHTS)
                other.flush()
                part.replace(part.with_name(part.name.partition(".")[0]))
                other.close()

    assert locate_lora(LORA, finish).read_bytes() == WEIGHTS
    assert texts[1:] == ["waiting for another process to download a.safetensors"]
    assert hub.sent_ranges() == []
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_without_a_file_for_the_transformer_it_is_left_out(
    hub: Hub, original: Path, tmp_path: Path
) -> None:
    hub.add("owner/tiny", original)
    file = tmp_path / "another.gguf"
    source = locate_model("owner/tiny", ignore, transformer=file)
    assert source.transformer == file
    assert not list(source.folder.glob("transformer/*.safetensors"))
    assert (source.folder / "transformer" / "config.json").is_file()
    num_requests = hub.num_requests
    locate_model("owner/tiny", ignore, transformer=file)
    assert hub.num_requests == num_requests
    locate_model("owner/tiny", ignore)
    assert list(source.folder.glob("transformer/*.safetensors"))


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("network", ["vae", "image_encoder"])
def test_a_network_alone_is_downloaded_alone(
    hub: Hub, original: Path, tmp_path: Path, network: str, layout: str
) -> None:
    folder = original
    if layout == "original":
        folder = write_original(tmp_path / "theirs", build_original_networks())
    hub.add("owner/tiny", folder)
    whole = ModelSource(folder=folder, defaults=TINY_DEFAULTS, name="")
    weights = {path.name for path in whole.weight_files(network)}
    events: list[Event] = []
    source = locate_model("owner/tiny", events.append, networks=(network,))
    found = [path for path in source.folder.rglob("*") if path.is_file()]
    assert {path.name for path in found if path.suffix != ".json"} == weights
    assert source.weight_files(network)
    num_requests = hub.num_requests
    assert locate_model("owner/tiny", ignore, networks=(network,)) == source
    assert hub.num_requests == num_requests
    # What needs all of it fetches the rest.
    assert locate_model("owner/tiny", ignore).folder == source.folder
    source.check_files()


def test_a_repository_in_the_original_layout(hub: Hub, tmp_path: Path) -> None:
    write_original(tmp_path / "wan", build_original_networks())
    hub.add("owner/wan", tmp_path / "wan")
    needed = set(hub.repositories["owner/wan"])
    hub.repositories["owner/wan"] |= {
        "config.json": b"{}",
        "process_checkpoint/det/yolov10m.onnx": b"not needed",
        "relighting_lora/adapter_model.safetensors": b"not needed",
    }
    source = locate_model("owner/wan", ignore)
    assert source.layout == "original"
    folder = source.folder
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == needed
    check_checkpoint(source)
    num_requests = hub.num_requests
    assert locate_model("owner/wan", ignore) == source
    assert hub.num_requests == num_requests


def test_a_token_goes_to_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["owner/lora"] = {"a.safetensors": WEIGHTS}
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    locate_lora(LORA)
    tokens = {
        request.path.startswith("/cdn/"): request.headers.get("authorization")
        for request in hub.requests
    }
    assert tokens == {False: "Bearer hf_secret", True: None}


@pytest.mark.parametrize(
    ("model", "named"),
    [(HUB_MODEL, " (about 82 GB)"), ("owner/name@v1", " owner/name@v1")],
    ids=["base", "other"],
)
def test_without_a_network(
    no_network: Path, model: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = partial(locate_model, model, ignore)
    started_s = time.monotonic()
    assert message_of(WeightsError, call) == (
        f"--model {model} is not in the cache ({no_network}) and http://127.0.0.1:9 cannot be "
        f"reached. Connect to the network and run everanimate models pull{named}, give a "
        f"checkpoint folder, {OFFLINE_HINT}"
    )
    assert time.monotonic() - started_s < 2  # the library's own retries take 23 s
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert message_of(WeightsError, call) == (
        f"--model {model} is not in the cache ({no_network}) and HF_HUB_OFFLINE is set. "
        f"Unset it and run everanimate models pull{named}, give a checkpoint folder, "
        f"{OFFLINE_HINT}"
    )


def test_a_lora_without_a_network(no_network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = HUB_PRESET.lora[0]
    assert message_of(WeightsError, lambda: locate_lora(spec)) == (
        f"--lora {spec.source} is not in the cache ({no_network}) and http://127.0.0.1:9 cannot "
        "be reached. Connect to the network and run everanimate models pull (about 307 MB), give "
        "a .safetensors file, "
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


def test_a_lora_of_peft_comes_with_its_configuration(hub: Hub) -> None:
    """Without it the matrices would count as if alpha were the rank."""
    files = {"x/adapter_model.safetensors": b"weights", "adapter_config.json": b"of another"}
    hub.repositories["owner/peft"] = files
    spec = LoraSpec("owner/peft/x/adapter_model.safetensors")
    assert message_of(WeightsError, lambda: locate_lora(spec)) == (
        f"--lora {spec.source} has no x/adapter_config.json beside it. Give another LoRA."
    )
    files["x/adapter_config.json"] = b"configuration"
    path = locate_lora(spec)
    assert path.read_bytes() == b"weights"
    assert path.with_name("adapter_config.json").read_bytes() == b"configuration"


@pytest.mark.parametrize("locate", [locate_model, lambda name, _: locate_lora(LoraSpec(name))])
def test_a_name_that_no_repository_can_have(locate: Callable[..., object]) -> None:
    message = message_of(SettingsError, lambda: locate("owner/two--dashes", ignore))
    assert message.partition(" ")[2] == (
        "owner/two--dashes is not a valid name of a Hub repository."
    )


def test_a_revision_that_leads_elsewhere(tmp_path: Path) -> None:
    """It becomes a path in the cache."""
    assert message_of(SettingsError, lambda: locate_model(f"owner/name@{tmp_path}", ignore)) == (
        f"--model owner/name@{tmp_path} has no valid revision. "
        "Give a branch, a tag or a commit after '@'."
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
        "OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"],
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == (
        f"--model {HUB_MODEL}@{COMMIT} is not in the cache ({tmp_path / 'hub'}) and "
        "http://127.0.0.1:9 cannot be reached. Connect to the network and run everanimate models "
        f"pull {HUB_MODEL}@{COMMIT} (about 82 GB), give a checkpoint folder, {OFFLINE_HINT}\n"
    )
    assert done.stderr.partition("begin\n")[2] == ""
