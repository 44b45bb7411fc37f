"""`everanimate runs`: what waits to be continued, and how to be rid of it."""

import json
import os
import re
import time
from pathlib import Path

import pytest
from studio import Animate, made_files

from everanimate_cli.cli import main
from everanimate_cli.runs import RunFolder, list_runs, remove_run


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_run(name: str, num_chunks: int = 2, age_s: float = 0.0) -> RunFolder:
    run = RunFolder(Path(name))
    run.path.mkdir()
    run.request_path.write_text("{}")
    (run.path / "lock").touch()
    for chunk_index in range(num_chunks):
        run.segment_path(chunk_index, range(4, 9)).write_bytes(bytes(200_000))
        run.part_path(chunk_index).write_bytes(bytes(324_288))
    for path in run.path.iterdir():
        os.utime(path, times=(time.time() - age_s,) * 2)
    return run


def names() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*"))


def test_runs_are_listed_oldest_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "no runs in .\n")
    write_run("b.mp4.run", num_chunks=1, age_s=300)
    write_run("a.MP4.run", age_s=9000)
    before = names()
    assert main(["runs"]) == 0
    assert capsys.readouterr().out == (
        "a.MP4.run: 2 chunks, 1.0 MiB, 2.5 h old\nb.mp4.run: 1 chunk, 0.5 MiB, 5 min old\n"
    )
    assert names() == before
    assert main(["runs", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(entry["path"], entry["output"], entry["chunks"]) for entry in listed] == [
        ("a.MP4.run", "a.MP4", 2),
        ("b.mp4.run", "b.mp4", 1),
    ]
    assert listed[0]["size_mib"] == 1.0
    assert listed[0]["age_s"] == pytest.approx(9000, abs=60)
    assert (listed[0]["at_work"], listed[0]["has_result"]) == (False, False)


def test_runs_are_removed_all_or_one(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b", "c"):
        write_run(f"{name}.mp4.run")
    Path("d").mkdir()
    write_run("d/e.mp4.run")
    assert main(["runs", "a.mp4.run", "--remove"]) == 0
    assert capsys.readouterr().out == "a.mp4.run: 2 chunks, 1.0 MiB, 0 min old, removed\n"
    assert not Path("a.mp4.run").exists()
    assert Path("b.mp4.run").exists()
    assert main(["runs", "--remove", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [(entry["path"], entry["removed"]) for entry in entries] == [
        ("b.mp4.run", True),
        ("c.mp4.run", True),
    ]
    assert [str(path) for path in Path().iterdir()] == ["d"]
    assert main(["runs", "d"]) == 0
    assert capsys.readouterr().out.startswith("d/e.mp4.run: ")


def test_a_run_at_work_is_never_removed(capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run("a.mp4.run")
    with run.hold() as is_ours:
        assert is_ours
        before = names()
        assert main(["runs", "--remove"]) == 0
        assert capsys.readouterr().out == "a.mp4.run: 2 chunks, 1.0 MiB, at work, not removed\n"
        assert not remove_run(run)
        assert names() == before
    assert remove_run(run)
    assert names() == []


def test_folders_of_others_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """No lock is made in them, and nothing that this program has not written is deleted."""
    foreign = ("movie.mp4.run", "results.run", "a.mp4")
    for name in foreign:
        Path(name).mkdir()
        Path(name, "run.txt").write_text("mine")
    Path("file.mp4.run").write_text("mine")
    before = names()
    assert main(["runs", "--remove"]) == 0
    assert capsys.readouterr().out == ""
    assert names() == before
    run = write_run("b.mp4.run")
    (run.path / "notes.txt").write_text("mine")
    (run.path / "0.mp4").write_text("mine")
    assert main(["runs", "--remove"]) == 0
    assert names() == sorted([*before, "b.mp4.run", "b.mp4.run/0.mp4", "b.mp4.run/notes.txt"])


def test_what_a_killed_removal_left_is_listed_and_removed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = write_run("a.mp4.run")
    run.request_path.unlink()
    run.part_path(0).unlink()
    (run.path / ".00001.safetensors.0123abcd.part").touch()
    assert main(["runs", "--remove"]) == 0
    assert capsys.readouterr().out == "a.mp4.run: 0 chunks, 0.7 MiB, 0 min old, removed\n"
    assert names() == []


def test_folders_that_cannot_be_read_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    write_run("a.mp4.run")
    write_run("b.mp4.run")
    iterate, opened = Path.iterdir, Path.open

    def refuse(path: Path) -> object:
        if path.name == "a.mp4.run":
            raise PermissionError
        return iterate(path)

    def refuse_lock(path: Path, *words: str) -> object:
        if path.name == "lock":
            raise PermissionError
        return opened(path, *words)

    # The superuser may read anything, so permission bits would not do.
    monkeypatch.setattr(Path, "iterdir", refuse)
    assert [run.folder.path.name for run in list_runs(Path())] == ["b.mp4.run"]
    monkeypatch.setattr(Path, "open", refuse_lock)
    assert [run.is_held for run in list_runs(Path())] == [True]


def test_a_folder_must_be_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "no"]) == 2
    assert capsys.readouterr().err == (
        "error: FOLDER no does not exist. Give a folder with results.\n"
    )
    Path("film.mp4").touch()
    assert main(["runs", "film.mp4"]) == 2
    assert capsys.readouterr().err == (
        "error: FOLDER film.mp4 is a file. Give a folder with results.\n"
    )


def test_a_kept_run_is_listed_too(
    animate: Animate, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert animate("-o", "a.mp4", "--frames", "1", "--steps", "1", "--keep-run").code == 0
    assert main(["runs"]) == 0
    assert re.fullmatch(
        r"a\.mp4\.run: 1 chunk, 0\.\d MiB, 0 min old, kept beside its result\n",
        capsys.readouterr().out,
    )
    # Kept on purpose, it is no news to other runs.
    assert "a.mp4.run" not in animate("-o", "b.mp4", "--frames", "1", "--steps", "1").err
    assert main(["runs", "--remove"]) == 0
    assert made_files(place) == ["a.json", "a.mp4", "b.json", "b.mp4"]


def test_a_lock_whose_folder_was_removed_meanwhile_is_no_lock() -> None:
    """Two processes that both hold "the" lock would write into one folder."""
    run = write_run("a.mp4.run")
    with run.hold() as is_ours:
        assert is_ours
        run.remove()
        with run.hold() as is_ours_too:  # another process begins anew
            assert is_ours_too
            with run.hold() as third:
                assert not third
