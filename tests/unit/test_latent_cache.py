"""The folder of encoded samples: shared, resumable, and never of another training."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from everanimate_cli import latent_cache
from everanimate_cli.errors import InputError, RunError, SettingsError
from everanimate_cli.latent_cache import LatentCache

IDENTITY: Mapping[str, object] = {
    "--model sha256": "aa",
    "DATASET clips": 2,
    "size": "64x48",
    "fps": 12.5,
}


def open_cache(folder: Path, **changes: object) -> LatentCache:
    return LatentCache(folder=folder, identity={**IDENTITY, **changes}, num_samples=3)


def tensors(*names: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: torch.arange(6).view(2, 3).to(dtype) + len(name) for name in names}


@pytest.fixture
def cache(tmp_path: Path) -> LatentCache:
    cache = open_cache(tmp_path / "cache")
    cache.claim()
    return cache


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_looking_writes_nothing(tmp_path: Path) -> None:
    cache = open_cache(tmp_path / "deep" / "cache")
    assert cache.missing(0, ["target"]) == ["target"]
    assert not cache.has_prompt("a man")
    assert not cache.has_constant("blank")
    assert list(tmp_path.iterdir()) == []


def test_tensors_come_back_as_they_were(cache: LatentCache) -> None:
    stored = tensors("target") | tensors("tokens", dtype=torch.bfloat16)
    stored["motion"] = torch.arange(24.0).view(2, 3, 4).transpose(0, 2)  # not contiguous
    cache.save_sample(12, stored)
    cache.save_prompt("a man", stored["tokens"])
    cache.save_constant("blank", stored["target"])
    again = open_cache(cache.folder)
    loaded = again.load_sample(12, list(stored))
    assert loaded.keys() == stored.keys()
    for name, value in stored.items():
        torch.testing.assert_close(loaded[name], value, rtol=0, atol=0)
    assert again.load_sample(12, ["motion"]).keys() == {"motion"}
    torch.testing.assert_close(again.load_prompt("a man"), stored["tokens"], rtol=0, atol=0)
    torch.testing.assert_close(again.load_constant("blank"), stored["target"], rtol=0, atol=0)
    assert not again.has_prompt("a woman")
    assert len(names(cache.folder)) == 5  # identity and lock


def test_a_tensor_added_later_leaves_the_old_file_alone(cache: LatentCache) -> None:
    cache.save_sample(0, tensors("motion", "target"))
    (path,) = (cache.folder / "samples").iterdir()
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    again = open_cache(cache.folder)
    assert again.missing(0, ["pose", "target"]) == ["pose"]
    again.save_sample(0, tensors("pose"))
    assert again.missing(0, ["pose", "target"]) == []
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert open_cache(cache.folder).load_sample(0, ["pose", "target"]).keys() == {"pose", "target"}


def test_what_another_process_adds_is_found(cache: LatentCache) -> None:
    other = open_cache(cache.folder)
    other.save_sample(2, tensors("target"))
    assert cache.missing(2, ["target"]) == ["target"]
    torch.testing.assert_close(
        cache.load_sample(2, ["target"])["target"], tensors("target")["target"]
    )
    assert cache.missing(2, ["target"]) == []


def test_another_training_is_refused_with_each_difference(cache: LatentCache) -> None:
    with pytest.raises(SettingsError) as caught:
        open_cache(
            cache.folder, size="80x48", seed=4, **{"--model sha256": "bb", "DATASET clips": 3}
        )
    assert str(caught.value) == (
        f"--latent-cache {cache.folder} was filled for another training: --model has another "
        "content; DATASET clips was 2, is 3; --seed was not given, is 4; --size was 64x48, is "
        "80x48. Give another --latent-cache, or delete the folder."
    )


def test_two_trainings_that_claim_one_folder_at_once(tmp_path: Path) -> None:
    first, second = open_cache(tmp_path), open_cache(tmp_path, fps=25.0)
    first.claim()
    with pytest.raises(SettingsError, match=r"--fps was 12\.5, is 25\.0"):
        second.claim()


@pytest.mark.parametrize(
    ("content", "problem"), [(b"{", "is damaged (Expecting"), (b"[1]", "is damaged ("), (None, "")]
)
def test_a_folder_without_a_sound_identity(
    cache: LatentCache, content: bytes | None, problem: str
) -> None:
    path = cache.folder / "identity.json"
    if content is None:
        path.unlink()
        problem = "is missing. "
    else:
        path.write_bytes(content)
    with pytest.raises(RunError) as caught:
        open_cache(cache.folder)
    assert str(caught.value).startswith(f"{path} {problem}")
    assert str(caught.value).endswith("Give another --latent-cache, or delete the folder.")


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    path.write_text("notes")
    with pytest.raises(InputError) as caught:
        open_cache(path)
    assert str(caught.value) == f"--latent-cache {path} is a file. Give a folder."


def test_a_missing_tensor(cache: LatentCache) -> None:
    cache.save_sample(1, tensors("target"))
    with pytest.raises(RunError) as caught:
        cache.load_sample(1, ["pose", "motion", "target"])
    assert str(caught.value) == (
        f"--latent-cache {cache.folder} lacks motion, pose of sample 1. Start again: what is "
        "missing is encoded first."
    )
    with pytest.raises(RunError, match=r"is missing\. Start again"):
        cache.load_constant("blank")
    cache.sample_path(1, ["target"]).unlink()  # since the folder was listed
    with pytest.raises(RunError, match=r"is missing\. Start again"):
        cache.load_sample(1, ["target"])


@pytest.mark.parametrize("num_bytes", [0, 5, -1])
def test_a_damaged_file(cache: LatentCache, num_bytes: int) -> None:
    cache.save_sample(1, tensors("target"))
    path = cache.sample_path(1, ["target"])
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(RunError) as caught:
        open_cache(cache.folder).load_sample(1, ["target"])
    assert str(caught.value).startswith(f"{path} is damaged (")
    assert str(caught.value).endswith("Delete this file and start again: it is made anew.")


def test_a_failure_while_writing_leaves_nothing(
    cache: LatentCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = names(cache.folder)

    def fill_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_disk)
    with pytest.raises(OSError, match="No space left"):
        cache.save_sample(0, tensors("target"))
    assert names(cache.folder) == before
    assert cache.missing(0, ["target"]) == ["target"]


def test_leftovers_of_killed_processes_go_once_they_are_old(cache: LatentCache) -> None:
    old, new = (cache.folder / "samples" / f".0000.{i}.part" for i in range(2))
    for path in (old, new):
        path.write_bytes(b"torn")
    long_ago = time.time() - 2 * latent_cache._STALE_S
    os.utime(old, (long_ago, long_ago))
    again = open_cache(cache.folder)
    again.claim()
    assert (old.exists(), new.exists()) == (False, True)
    assert again.missing(0, ["target"]) == ["target"]


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
import torch
from everanimate_cli.latent_cache import LatentCache
cache = LatentCache(folder=Path(sys.argv[1]), identity={"seed": 1}, num_samples=3)
cache.claim()
cache.save_sample(0, {"target": torch.ones(2)})
def die(path, data):
    with path.open("wb") as file:
        file.write(data[: len(data) // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
Path.write_bytes = die
cache.save_sample(1, {"target": torch.ones(2)})
"""


def test_a_kill_while_writing_loses_that_sample_alone(tmp_path: Path) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_WRITER, str(tmp_path)], check=False, capture_output=True
    )
    assert killed.returncode == -9, killed.stderr
    assert len(list((tmp_path / "samples").glob(".*.part"))) == 1
    cache = LatentCache(folder=tmp_path, identity={"seed": 1}, num_samples=3)
    assert [cache.missing(i, ["target"]) for i in range(2)] == [[], ["target"]]
    cache.claim()
    cache.save_sample(1, {"target": torch.ones(2)})
    assert cache.load_sample(1, ["target"])["target"].sum() == 2
