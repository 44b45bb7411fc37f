"""Hashes of files, whole and sampled."""

import hashlib
from pathlib import Path

import pytest

from everanimate_cli.hashes import add_samples


@pytest.mark.parametrize("change_at", [0, 2**20 - 1, 5 * 2**20 - 1])
def test_a_large_file_is_sampled_from_begin_to_end(tmp_path: Path, change_at: int) -> None:
    path = tmp_path / "large"

    def digest() -> str:
        state = hashlib.sha256()
        add_samples(state, path)
        return state.hexdigest()

    size = 5 * 2**20 if change_at > 2**20 else 2**20
    path.write_bytes(bytes(size))
    before = digest()
    with path.open("rb+") as file:
        file.seek(change_at)
        file.write(b"x")
    assert digest() != before
    path.write_bytes(bytes(size + 1))
    assert digest() != before
