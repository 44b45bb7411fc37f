"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, which takes its place if the block ends without exception.

    The content is on the disk before the name changes, so that a power cut leaves the old file or
    the new one. After an exception nothing is left behind and an old `path` is untouched.

    Args:
        path: File to make or replace; its folder must exist.

    Yields:
        An empty file in the same folder.

    Raises:
        OSError: If the disk is full or the folder cannot be written.
    """
    # Not `tempfile`: its files are readable by the owner only, and would stay so after the rename.
    # The name is cut, since file systems allow 255 bytes.
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.part")
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_json(path: Path, values: object) -> None:
    """Write JSON values as readable text.

    Raises:
        OSError: As `atomic_path`.
    """
    text = json.dumps(values, ensure_ascii=False, indent=1)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def publish(made: Path, target: Path) -> None:
    """Move a finished file to its place, durably; both are in one file system."""
    made.replace(target)
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    if os.name == "posix":  # Windows cannot open a folder, and needs no second fsync.
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
