"""Which clips a folder or a manifest lists; nothing is opened but the manifest."""

import json
from pathlib import Path

import pytest

from everanimate_cli.errors import InputError
from everanimate_cli.manifest import ClipEntry, read_dataset

ADVICE = "Give a folder of videos, or a .csv or .jsonl manifest that lists them."
COLUMNS = "Known: video, pose, face, pose_folder, prompt, start, end."


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def message(dataset: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_dataset(dataset)
    return str(caught.value)


# --- folders -------------------------------------------------------------------------------------


def test_a_folder_lists_its_videos_with_what_belongs_to_them(tmp_path: Path) -> None:
    for name in ("b.MP4", "a.webm", ".hidden.mp4", "notes.md"):
        write(tmp_path / name, "x")
    (tmp_path / "a_pose").mkdir()
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "below").mkdir()
    write(tmp_path / "below" / "c.mp4", "x")
    write(tmp_path / "b_pose", "a file is no pose folder")
    (tmp_path / "b.txt").write_bytes("\ufeff她在跳舞\r\n".encode())
    write(tmp_path / "a.txt", " \n")
    assert read_dataset(tmp_path) == [
        ClipEntry(label="a.webm", video=tmp_path / "a.webm", pose_folder=tmp_path / "a_pose"),
        ClipEntry(label="b.MP4", video=tmp_path / "b.MP4", prompt="她在跳舞"),
    ]
    assert [entry.is_raw for entry in read_dataset(tmp_path)] == [False, True]


def test_one_video_is_a_dataset_too(tmp_path: Path) -> None:
    video = write(tmp_path / "a.mp4", "x")
    (tmp_path / "a_pose").mkdir()
    write(tmp_path / "a.txt", "a dance")
    assert read_dataset(video) == [
        ClipEntry(label="a.mp4", video=video, pose_folder=tmp_path / "a_pose", prompt="a dance")
    ]


def test_what_is_no_dataset(tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    assert message(nothing) == f"DATASET {nothing} does not exist. {ADVICE}"
    assert message(tmp_path) == (
        f"DATASET {tmp_path} holds no video (.mp4, .mov, .mkv, .webm, .avi, .m4v). {ADVICE}"
    )
    text = write(tmp_path / "list.txt", "a.mp4")
    assert message(text) == (
        f"DATASET {text} is neither a folder nor a .csv or .jsonl file. {ADVICE}"
    )
    write(tmp_path / "extract.json", "{}")
    assert message(tmp_path) == (
        f"DATASET {tmp_path} is a folder made by extract-pose, which has no pictures of the "
        "person. Give the folder of the videos, with such folders as NAME_pose beside them."
    )


def test_a_prompt_that_is_no_text(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", "x")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    assert message(tmp_path) == f"{tmp_path / 'a.txt'} is not UTF-8 text. Save it as UTF-8."


# --- manifests -----------------------------------------------------------------------------------

ROWS = [
    {"video": "a.mp4", "pose": "p.mp4", "face": "f.mp4", "prompt": 'she said "go", twice'},
    {"video": "/films/b.mov", "pose_folder": "b_pose", "start": "1:02.5", "end": "70"},
    {"video": "c d.mp4", "start": "3"},
]


def expected(folder: Path) -> list[ClipEntry]:
    return [
        ClipEntry(
            label="a.mp4",
            video=folder / "a.mp4",
            pose=folder / "p.mp4",
            face=folder / "f.mp4",
            prompt='she said "go", twice',
        ),
        ClipEntry(
            label="/films/b.mov from 62.5 s to 70 s",
            video=Path("/films/b.mov"),
            pose_folder=folder / "b_pose",
            start=62.5,
            end=70.0,
        ),
        ClipEntry(label="c d.mp4 from 3 s", video=folder / "c d.mp4", start=3.0),
    ]


def test_csv(tmp_path: Path) -> None:
    manifest = tmp_path / "list.CSV"
    lines = [
        " video,pose,face,pose_folder,prompt,start,end",
        'a.mp4,p.mp4,f.mp4,,"she said ""go"", twice",,',
        "",
        "/films/b.mov,,,b_pose,,1:02.5, 70",
        ",,,,,,",
        "c d.mp4,,,,,3,",
    ]
    manifest.write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    assert read_dataset(manifest) == expected(tmp_path)


def test_jsonl(tmp_path: Path) -> None:
    rows = [*ROWS[:2], {"video": "c d.mp4", "start": 3, "end": None, "prompt": ""}]
    text = "\n\n".join(json.dumps(row) for row in rows)
    assert read_dataset(write(tmp_path / "list.jsonl", text)) == expected(tmp_path)


def test_text_of_jsonl_may_hold_any_character(tmp_path: Path) -> None:
    row = json.dumps({"video": "a.mp4", "prompt": "one\u2028two\u0085three"}, ensure_ascii=False)
    (entry,) = read_dataset(write(tmp_path / "list.jsonl", row))
    assert entry.prompt == "one\u2028two\u0085three"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", " is empty. Its first line must name the columns."),
        ("video,sound\na.mp4,b", f": the column 'sound' is unknown. {COLUMNS}"),
        ("video;pose\na.mp4;b", f": the column 'video;pose' is unknown. {COLUMNS}"),
        ("video,prompt,video\na,b,c", ": the column 'video' is there twice."),
        ("prompt\nhello", f" has no column 'video'. {COLUMNS}"),
        ("video\n\n", " lists no video. Add a line for each video."),
        (
            "video,prompt\na.mp4,one, two",
            " line 2: 3 values for 2 columns. Quote values with commas.",
        ),
        ("video,prompt\n,hello", " line 2: video is missing."),
        ('video\n"a.mp4', " line 2: unexpected end of data."),
        (
            "video,start\na.mp4,soon",
            " line 2: start soon is not a time. Write seconds (12.5) or minutes:seconds (1:02.5).",
        ),
        ("video,start,end\na.mp4,5,5", " line 2: end 5 is not after start 5."),
        ("video,end\na.mp4,0", " line 2: end 0.0 is too small. Give a number above 0."),
        ("video,pose\na.mp4,p.mp4", " line 2: pose needs face beside it."),
        ("video,face\na.mp4,f.mp4", " line 2: face needs pose beside it."),
        (
            "video,pose,face,pose_folder\na,b,c,d",
            " line 2: pose and pose_folder exclude each other. Give one of them.",
        ),
        ("video\na\0.mp4", ' line 2: video "a\\u0000.mp4" is not text.'),
    ],
)
def test_a_wrong_csv_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    manifest = write(tmp_path / "list.csv", text)
    assert message(manifest) == f"DATASET {manifest}{problem}"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"video": "a.mp4"', "not JSON (Expecting ',' delimiter: line 1 column 18 (char 17))."),
        ('["a.mp4"]', "not a JSON object."),
        ('{"video": 3}', "video 3 is not a path."),
        ('{"video": "a", "start": true}', "start true is not a number."),
        (
            '{"video": "a", "start": -1}',
            "start -1.0 is too small. Give 0 or more.",
        ),
        ('{"video": "a", "end": Infinity}', "end inf is not a finite number."),
        ('{"video": "a", "prompt": ["b"]}', 'prompt ["b"] is not text.'),
        ('{"video": "a", "prompt": "\\ud800"}', 'prompt "\\ud800" is not text.'),
        (
            '{"video": "a", "poses": "b"}',
            "'poses' is unknown. Known: end, face, pose, pose_folder, prompt, start, video.",
        ),
    ],
)
def test_a_wrong_line_of_jsonl_is_refused(tmp_path: Path, line: str, problem: str) -> None:
    manifest = write(tmp_path / "list.jsonl", '{"video": "first.mp4"}\n' + line)
    assert message(manifest) == f"DATASET {manifest} line 2: {problem}"


def test_deeply_nested_json_is_refused(tmp_path: Path) -> None:
    manifest = write(tmp_path / "list.jsonl", "[" * 100_000)
    assert message(manifest).startswith(f"DATASET {manifest} line 1: not JSON (")


def test_a_manifest_that_is_no_text(tmp_path: Path) -> None:
    manifest = tmp_path / "list.csv"
    manifest.write_bytes(b"video\n\xff\xfe")
    assert message(manifest) == f"{manifest} is not UTF-8 text. Save it as UTF-8."
