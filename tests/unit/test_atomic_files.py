"""Files that are written whole or not at all."""

import errno
import json
import os
from pathlib import Path

import pytest

from everanimate_cli.atomic_files import atomic_path, write_json


def test_an_exception_keeps_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "result.bin"
    path.write_bytes(b"old")

    def fill_the_disk() -> None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left") as caught:
        fill_the_disk()
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_content_is_on_disk_before_the_name_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, synced = tmp_path / "result", []
    plain = os.fsync

    def recorded(descriptor: int) -> None:
        plain(descriptor)
        synced.append(path.exists())

    monkeypatch.setattr(os, "fsync", recorded)
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"new")
    assert synced == [False, True]  # the file, then the folder that names it


def test_a_result_has_the_usual_permissions(tmp_path: Path) -> None:
    """Files of the tempfile module are readable by their owner only, also after a rename."""
    usual = tmp_path / "usual"
    usual.touch()
    with atomic_path(tmp_path / "result") as temporary:
        temporary.write_bytes(b"new")
    assert (tmp_path / "result").stat().st_mode == usual.stat().st_mode


def test_a_long_name_still_has_a_temporary_name(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 250 + ".json")
    write_json(path, {"size": [1, 2]})
    assert json.loads(path.read_text()) == {"size": [1, 2]}
