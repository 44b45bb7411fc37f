"""What `everanimate train-lora` refuses before it loads anything: one line, code 2, no file."""

import json
import struct
from pathlib import Path

import pytest

from everanimate_cli.cli import main

NAMES = ".mp4, .mov, .mkv, .webm, .avi, .m4v"
DATASET_ADVICE = "Give a folder of videos, or a .csv or .jsonl manifest that lists them."


def write_header(path: Path, shapes: dict[str, list[int]]) -> None:
    """A safetensors file of float32 zeros."""
    header, start = {}, 0
    for name, shape in shapes.items():
        size = 4
        for side in shape:
            size *= side
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(start))


def lora_shapes(*ranks: int, naming: str = "lora_A.default") -> dict[str, list[int]]:
    up = naming.replace("lora_A", "lora_B").replace("lora_down", "lora_up")
    shapes: dict[str, list[int]] = {}
    for block, rank in enumerate(ranks):
        shapes[f"blocks.{block}.self_attn.q.{naming}.weight"] = [rank, 3]
        shapes[f"blocks.{block}.self_attn.q.{up}.weight"] = [5, rank]
    return shapes


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: datasets with and without poses, LoRAs, and things in the way."""
    monkeypatch.chdir(tmp_path)
    for folder in ("videos", "empty", "posed/dance_pose", "taken", "bare", "done", "cut"):
        Path(folder).mkdir(parents=True)
    for name in (
        "videos/dance.mp4",
        "posed/dance.mp4",
        "file",
        "notes.txt",
        "taken/holiday.jpg",
        "done/run.json",
        "done/lora.safetensors",
        "cut/checkpoint-000200.safetensors",
        "broken.safetensors",
    ):
        Path(name).write_bytes(b"content")
    Path("nothing.mp4").touch()
    Path("nothing.csv").write_text("video,prompt\n")
    Path("columns.csv").write_text("video,caption\na.mp4,waltz\n")
    write_header(Path("base.safetensors"), {"proj_out.weight": [3, 5], "proj_out.bias": [5]})
    write_header(Path("released.safetensors"), lora_shapes(32))
    write_header(Path("rank8.safetensors"), lora_shapes(8, naming="lora_A"))
    write_header(Path("mixed.safetensors"), lora_shapes(16, 4, naming="lora_down"))
    return tmp_path


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "DATASET is missing. Give a folder of videos or a manifest."),
        (["no"], f"DATASET no does not exist. {DATASET_ADVICE}"),
        (["empty"], f"DATASET empty holds no video ({NAMES}). {DATASET_ADVICE}"),
        (
            ["notes.txt"],
            f"DATASET notes.txt is neither a folder nor a .csv or .jsonl file. {DATASET_ADVICE}",
        ),
        (["nothing.csv"], "DATASET nothing.csv lists no video. Add a line for each video."),
        (
            ["columns.csv"],
            "DATASET columns.csv: the column 'caption' is unknown. "
            "Known: video, pose, face, pose_folder, prompt, start, end.",
        ),
        (["videos", "--stage", "4"], "--stage 4 is unknown. Known: 1, 2, 3."),
        (
            ["videos", "--lr", "fast"],
            "Invalid value for '--lr': fast is not a number. See 'everanimate train-lora --help'.",
        ),
        (
            ["videos", "--carry-frames", "5"],
            "--carry-frames 5 works with --memory pixel only, not with latent.",
        ),
        (
            ["videos", "--model", "tiny"],
            "--model tiny is unknown. Give 'toy' (embedded, works offline), a checkpoint folder, "
            "or a Hub id such as Wan-AI/Wan2.2-Animate-14B-Diffusers.",
        ),
        (
            ["videos", "--model", "bare"],
            "--model bare has no transformer/config.json. "
            "Give a checkpoint folder in diffusers or the original layout.",
        ),
        (
            ["videos", "--init", "no.safetensors"],
            "--init no.safetensors does not exist. Give a .safetensors file or a Hub id.",
        ),
        (
            ["videos", "--init", "notes.txt"],
            "--init notes.txt is not a .safetensors file. Give a .safetensors file or a Hub id.",
        ),
        (
            ["videos", "--init", "videos"],
            "--init videos is a folder without PEFT's adapter_config.json. Give a .safetensors "
            "file or a Hub id.",
        ),
        (
            ["videos", "--init", "broken.safetensors"],
            "--init broken.safetensors is not a safetensors file. Give one.",
        ),
        (
            ["videos", "--init", "base.safetensors"],
            "--init base.safetensors is no LoRA: none of its 2 tensors is a low-rank matrix. "
            "Give a file made by LoRA training.",
        ),
        (
            ["videos", "--init", "rank8.safetensors"],
            "--init rank8.safetensors has rank 8, not 32. Give --rank 8.",
        ),
        (
            ["videos", "--init", "mixed.safetensors", "--rank", "16"],
            "--init mixed.safetensors has several ranks (4, 16). Give a LoRA of one rank.",
        ),
        (
            ["videos", "--validate-every", "5", "--validation", "no.mp4"],
            f"--validation no.mp4 does not exist. {DATASET_ADVICE}",
        ),
        (
            ["videos", "--validate-every", "5", "--validation", "empty"],
            f"--validation empty holds no video ({NAMES}). {DATASET_ADVICE}",
        ),
        (
            ["videos", "--validation", "videos"],
            "--validation videos has no effect without --validate-every. "
            "Give a number of steps for it.",
        ),
        (
            ["videos", "--pose-model", "best"],
            "--pose-model best is unknown. Known: rtmw, rtmw-m, dwpose, vitpose, vitpose-l, toy, "
            "or give an .onnx file.",
        ),
        (["videos", "--pose-folder", "file"], "--pose-folder file is a file. Give a folder."),
        (
            ["videos", "--pose-folder", "no/poses"],
            "--pose-folder no/poses cannot be made: the folder no does not exist. "
            "Make it first, or give another path.",
        ),
        (
            ["posed", "--pose-model", "toy"],
            "--pose-model toy has no effect: all videos bring their poses. Leave it out.",
        ),
        (["videos", "--latent-cache", "file"], "--latent-cache file is a file. Give a folder."),
        (
            ["videos", "--latent-cache", "no/cache"],
            "--latent-cache no/cache cannot be made: the folder no does not exist. "
            "Make it first, or give another path.",
        ),
        (["videos", "-o", "file"], "--output file is a file. Give a folder."),
        (
            ["videos", "-o", "my.safetensors"],
            "--output my.safetensors is to be a folder. Give a name without .safetensors.",
        ),
        (
            ["videos", "-o", "no/here"],
            "--output no/here cannot be made: the folder no does not exist. "
            "Make it first, or give another path.",
        ),
        (
            ["videos", "-o", "taken"],
            "--output taken holds holiday.jpg, but no training. Give another folder.",
        ),
        (
            ["videos", "-o", "taken", "--overwrite"],
            "--output taken holds holiday.jpg, but no training. Give another folder.",
        ),
        (
            ["videos", "-o", "videos"],
            "--output videos holds dance.mp4, but no training. Give another folder.",
        ),
        (
            ["videos", "-o", "done", "--no-resume"],
            "--output done exists. Add --overwrite to replace it, or give another name.",
        ),
        (
            ["videos", "-o", "x" * 256],
            f"--output {'x' * 256} has too long a name. Give a shorter one.",
        ),
        (
            ["--config", "no.json"],
            "--config no.json cannot be read: No such file or directory.",
        ),
    ],
)
def test_refusals(
    place: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    before = tree(place)
    assert main(["train-lora", *words]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: {message}\n"
    assert captured.out == ""
    assert tree(place) == before


@pytest.mark.parametrize(
    ("option", "folder"),
    [("--output", "shut/here"), ("--latent-cache", "shut/cache"), ("--pose-folder", "shut/poses")],
)
def test_folders_that_cannot_be_written_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
    folder: str,
) -> None:
    Path("shut").mkdir()
    # Not by its mode: tests may run as a user to whom all is open.
    monkeypatch.setattr(
        "everanimate_cli.preflight.os.access", lambda path, _mode: Path(path).name != "shut"
    )
    assert main(["train-lora", "videos", option, folder]) == 2
    assert capsys.readouterr().err == (
        f"error: {option} {folder} cannot be written: the folder shut is not writable. "
        "Give another path.\n"
    )


class ReachedError(Exception):
    """The worker was to be called."""


@pytest.mark.parametrize(
    "words",
    [
        ["videos"],
        ["videos/dance.mp4"],
        ["posed"],
        ["videos", "--init", "released.safetensors"],
        ["videos", "--init", "rank8.safetensors", "--rank", "8"],
        ["videos", "--init", "owner/name/a.safetensors@v1"],
        ["videos", "-o", "empty"],
        ["videos", "-o", "done"],
        ["videos", "-o", "done", "--no-resume", "--overwrite"],
        ["videos", "-o", "cut"],
        ["posed", "--validate-every", "5", "--validation", "videos", "--pose-model", "toy"],
        ["videos", "--latent-cache", "taken", "--pose-folder", "taken"],
    ],
)
def test_what_can_work_reaches_the_worker(
    monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    def reach(*_: object) -> None:
        raise ReachedError

    monkeypatch.setattr("everanimate_cli.cli_train.resumable", reach)
    with pytest.raises(ReachedError):
        main(["train-lora", *words])
