"""The list of a test set, and how a slip in it is told."""

from pathlib import Path

import pytest

from everanimate_cli.errors import InputError
from everanimate_cli.eval_manifest import list_entries, read_manifest
from everanimate_cli.eval_settings import EvalSettings


def write(folder: Path, text: str, name: str = "list.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_table_becomes_entries(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "method,generated,truth,driving,start\n"
        "ours,a/waltz.mp4,truth/waltz.mp4,,1:02.5\n"
        "\n"
        "peer,b/waltz.mp4,truth/waltz.mp4,poses/waltz_pose,\n",
    )
    ours, peer = read_manifest(path)
    assert (ours.name, ours.method, ours.sample) == ("ours: waltz", "ours", "waltz")
    assert ours.generated == tmp_path / "a/waltz.mp4"
    assert (ours.truth, ours.driving) == (tmp_path / "truth/waltz.mp4", None)
    assert ours.start == 62.5
    assert peer.start is None
    assert peer.driving == tmp_path / "poses/waltz_pose"


def test_a_line_can_tell_its_chunks_and_how_it_goes_on(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "generated,frames_per_chunk,overlap,extend\na.mp4,21,1,loop\nb.mp4,,,\n",
    )
    settings = EvalSettings(manifest=path, frames_per_chunk=77, overlap=4, extend="hold")
    first, second = list_entries(settings)
    assert (first.frames_per_chunk, first.overlap, first.extend) == (21, 1, "loop")
    # The command line speaks for lines that do not.
    assert (second.frames_per_chunk, second.overlap, second.extend) == (77, 4, "hold")


def test_lines_of_json_say_the_same(tmp_path: Path) -> None:
    path = write(tmp_path, '{"generated": "a.mp4", "sample": "one", "start": 2}\n\n', "list.jsonl")
    (entry,) = read_manifest(path)
    assert (entry.name, entry.start) == ("generated: one", 2.0)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("l.csv", "generated\n", " lists no video. Add a line for each video."),
        ("l.csv", "video\na.mp4\n", " line 2: 'video' is unknown. Known: generated, method, "
         "sample, truth, reference, driving, start, extend, frames_per_chunk, overlap."),
        ("l.csv", "generated,truth\na.mp4\n", " line 2: 1 values for 2 columns. Quote values with "
         "commas."),
        ("l.csv", "generated,truth\n,b.mp4\n", " line 2: generated is missing."),
        ("l.csv", "generated,start\na.mp4,soon\n", " line 2: start soon is not a time. Write "
         "seconds (12.5) or minutes:seconds (1:02.5)."),
        ("l.csv", "generated,method\na.mp4,a<b\n", " line 2: method a<b holds <, >, = or @. Give a "
         "plain name."),
        ("l.csv", "generated\na.mp4\na.mp4\n", " line 3: generated: a is there twice. Give each a "
         "sample of its own."),
        ("l.csv", "generated,frames_per_chunk\na.mp4,21\n", " line 2: frames_per_chunk 21 needs "
         "overlap beside it. Give overlap 0 for chunks that share no frames."),
        ("l.csv", "generated,frames_per_chunk,overlap\na.mp4,21,x\n", " line 2: overlap x is not a "
         "whole number."),
        ("l.csv", "generated,extend\na.mp4,error\n", " line 2: extend error is unknown. Known: "
         "pingpong, loop, hold, none."),
        ("l.jsonl", "[1]\n", " line 1: not a JSON object."),
        ("l.jsonl", "{\n", " line 1: not JSON (Expecting property name enclosed in double quotes: "
         "line 1 column 2 (char 1))."),
        ("l.txt", "a.mp4", " is neither a .csv nor a .jsonl file. Give a .csv or .jsonl list with "
         "a line for each video."),
    ],
)  # fmt: skip
def test_slips_are_told_with_their_line(tmp_path: Path, name: str, text: str, problem: str) -> None:
    path = write(tmp_path, text, name)
    with pytest.raises(InputError) as caught:
        read_manifest(path)
    assert str(caught.value) == f"--manifest {path}{problem}"


def test_the_command_line_gives_every_video_the_same_company() -> None:
    settings = EvalSettings(
        generated=(Path("a<b.mp4"),), method=("x=y.mp4",), truth=Path("t.mp4"), start=3.0
    )
    first, second = list_entries(settings)
    assert (first.name, second.name) == ("a<b", "x")
    assert {first.truth, second.truth} == {Path("t.mp4")}
    assert (first.start, second.sample) == (3.0, None)
