"""`everanimate eval`: from words to settings, files, tables and exit codes."""

import csv
import json
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from dances import write_dance_video
from media import Frames, decode_video, write_media
from studio import Outcome, Program

from everanimate_cli import evaluation
from everanimate_cli.cli import main
from everanimate_cli.encode import VideoWriter
from everanimate_cli.eval_result import EvalPlan
from everanimate_cli.eval_settings import EvalSettings
from everanimate_cli.images import write_png
from everanimate_cli.metric_table import METRICS

Run = Callable[..., Outcome]
LOSSLESS = {"codec": "libx264rgb", "pixel_format": "rgb24", "options": {"qp": "0"}}
CHEAP = ["--metrics", "psnr,ssim,flicker", "--no-download"]


def write_lossless(path: str, frames: Frames) -> None:
    write_media(Path(path), frames, **LOSSLESS)  # type: ignore[arg-type]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a video, its truth and a worse one."""
    monkeypatch.chdir(tmp_path)
    truth = np.random.default_rng(1).integers(60, 120, (30, 16, 24, 3), np.uint8)
    write_lossless("truth.mkv", truth)
    write_lossless("anna.mkv", truth + np.uint8(2))
    write_lossless("peer.mkv", truth + np.uint8(30))
    return tmp_path


@pytest.fixture
def run(place: Path, program: Program) -> Run:
    assert place.is_dir()

    def call(*words: str) -> Outcome:
        return program("eval", *words)

    return call


# --- options -------------------------------------------------------------------------------------

# Field -> (words, the value that they must lead to).
OPTIONS: dict[str, tuple[list[str], object]] = {
    "generated": (["anna.mkv", "peer.mkv"], (Path("anna.mkv"), Path("peer.mkv"))),
    "method": (["--method", "a=anna.mkv"], ("a=anna.mkv",)),
    "manifest": (["--manifest", "list.csv"], Path("list.csv")),
    "truth": (["anna.mkv", "--truth", "truth.mkv"], Path("truth.mkv")),
    "reference": (["anna.mkv", "--reference", "anna.png"], Path("anna.png")),
    "driving": (["anna.mkv", "--driving", "dance_pose"], Path("dance_pose")),
    "start": (["anna.mkv", "--start", "1:02.5"], 62.5),
    "extend": (["anna.mkv", "--extend", "loop"], "loop"),
    "resize": (["anna.mkv", "--resize", "cover"], "cover"),
    "horizons": (["anna.mkv", "--horizons", "paper"], "paper"),
    "metrics": (["anna.mkv", "--metrics", "psnr,ssim"], "psnr,ssim"),
    "baseline": (["anna.mkv", "--baseline", "1.5"], 1.5),
    "frames_per_chunk": (["anna.mkv", "--frames-per-chunk", "21", "--overlap", "4"], 21),
    "overlap": (["anna.mkv", "--frames-per-chunk", "21", "--overlap", "0"], 0),
    "sample_fps": (["anna.mkv", "--sample-fps", "5"], 5.0),
    "model": (["anna.mkv", "--model", "toy"], "toy"),
    "pose_model": (["anna.mkv", "--pose-model", "toy"], "toy"),
    "detector": (["anna.mkv", "--detector", "toy"], "toy"),
    "device": (["anna.mkv", "--device", "cpu"], "cpu"),
    "download": (["anna.mkv", "--no-download"], False),
    "fail_if": (["anna.mkv", "--fail-if", "psnr<3", "--fail-if", "l1>1"], ("psnr<3", "l1>1")),
    "cache": (["anna.mkv", "--cache", "cache"], Path("cache")),
    "output": (["anna.mkv", "-o", "out.json"], Path("out.json")),
    "csv": (["anna.mkv", "--csv", "out.csv"], Path("out.csv")),
    "plot": (["anna.mkv", "--plot", "out.png"], Path("out.png")),
    "report": (["anna.mkv", "--report", "out.html"], Path("out.html")),
    "report_media": (["anna.mkv", "--report-media", "stills"], "stills"),
    "overwrite": (["anna.mkv", "--overwrite"], True),
    "dry_run": (["anna.mkv", "--dry-run"], True),
}


@pytest.fixture
def settings_of(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., EvalSettings]:
    """The settings that words lead to."""
    seen: list[EvalSettings] = []

    def stop(settings: EvalSettings, _: object) -> EvalPlan:
        seen.append(settings)
        return EvalPlan(output=Path(), facts={})

    monkeypatch.setattr(evaluation, "evaluate", stop)
    write_png(Path("anna.png"), np.zeros((8, 8, 3), np.uint8))
    Path("dance_pose").mkdir()
    Path("dance_pose/pose.mp4").write_bytes(b"content")
    Path("list.csv").write_text("generated\nanna.mkv\n")

    def call(*words: str) -> EvalSettings:
        assert run(*words) == Outcome(0, "", "")
        return seen[-1]

    return call


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_reaches_its_field(settings_of: Callable[..., EvalSettings], name: str) -> None:
    words, value = OPTIONS[name]
    assert getattr(settings_of(*words), name) == value
    assert getattr(EvalSettings(generated=(Path("x"),)), name) != value


def test_every_field_has_its_option() -> None:
    assert set(OPTIONS) == {item.name for item in fields(EvalSettings)}


@pytest.mark.parametrize("name", [name for name in OPTIONS if name in EvalSettings.saved_names()])
def test_saved_settings_set_what_the_option_sets(
    settings_of: Callable[..., EvalSettings], name: str
) -> None:
    given = settings_of(*OPTIONS[name][0])
    Path("saved.json").write_text(json.dumps({"settings": given.to_json()}))
    assert settings_of("--config", "saved.json") == given


# --- what comes out ------------------------------------------------------------------------------


def test_the_table_goes_to_stdout_and_progress_to_stderr(run: Run) -> None:
    found = run("anna.mkv", "--truth", "truth.mkv", *CHEAP, "--horizons", "0-1,1+")
    assert found.code == 0
    psnr = 20 * np.log10(255 / 2)
    assert found.out.splitlines()[:2] == [
        "psnr [dB], higher is better  overall   0-1s    1+s  per minute",
        f"  anna                         {psnr:.2f}  {psnr:.2f}  {psnr:.2f}           -",
    ]
    assert "ssim, higher is better" in found.out
    assert "flicker [levels], lower is better" in found.out
    assert found.err.startswith("measuring anna: 30/30 frames")


def test_json_goes_to_stdout_and_quiet_is_quiet(run: Run) -> None:
    found = run("anna.mkv", "--truth", "truth.mkv", "--json", "-q", "--no-download")
    assert (found.code, found.err) == (0, "")
    entries = json.loads(found.out)
    assert list(entries["methods"][0]["metrics"]) == list(METRICS)
    assert entries["methods"][0]["metrics"]["identity"]["unavailable"] == "needs --reference"


def test_files_are_written_and_not_replaced_without_leave(run: Run) -> None:
    words = ["anna.mkv", "--method", "worse=peer.mkv", "--truth", "truth.mkv", *CHEAP, "-q"]
    files = ["-o", "e.json", "--csv", "e.csv", "--plot", "e.png", "--report", "e.html"]
    assert run(*words, *files).code == 0
    entries = json.loads(Path("e.json").read_text())
    assert [method["name"] for method in entries["methods"]] == ["anna", "worse"]
    with Path("e.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["metric"]) for row in rows][:2] == [
        ("anna", "psnr"),
        ("anna", "ssim"),
    ]
    assert len(rows) == 6
    assert Path("e.png").read_bytes().startswith(b"\x89PNG")
    assert "worse" in Path("e.html").read_text(encoding="utf-8")
    again = run(*words, *files)
    assert again == Outcome(
        2,
        "",
        "error: --output e.json exists. Add --overwrite to replace it, or give another name.\n",
    )
    assert run(*words, *files, "--overwrite").code == 0


def test_the_saved_result_can_be_asked_again(run: Run) -> None:
    words = ["anna.mkv", "--truth", "truth.mkv", *CHEAP, "-o", "e.json"]
    assert run(*words).code == 0
    found = run("--config", "e.json", "--overwrite", "--metrics", "psnr", "-q")
    assert found.code == 0
    assert list(json.loads(Path("e.json").read_text())["methods"][0]["metrics"]) == ["psnr"]


def test_a_plan_measures_nothing(run: Run) -> None:
    found = run("anna.mkv", "--metrics", "psnr,flicker", "--dry-run")
    assert found == Outcome(
        0,
        "videos: anna 30 frames, 1.20 s\n"
        "metrics: flicker\n"
        "not available: psnr needs --truth\n"
        "horizons: 0-10s, 10-30s, 30-60s, 60-90s, 90+s\n",
        "",
    )


# --- gates ---------------------------------------------------------------------------------------


def test_broken_gates_end_with_one(run: Run) -> None:
    words = ["anna.mkv", "peer.mkv", "--truth", "truth.mkv", *CHEAP, "-q", "--horizons", "0-1,1-9"]
    psnr = f"{20 * np.log10(255 / 30):.4f}"
    found = run(*words, "--fail-if", "psnr<20", "--fail-if", "psnr.9s@peer>1", "-o", "e.json")
    assert found.code == 1
    assert found.err.splitlines() == [
        f"--fail-if psnr<20: peer has {psnr}",
        "--fail-if psnr.9s@peer>1: peer has no value (the video has no 9s value)",
    ]
    assert found.out.startswith("psnr [dB]")  # the result is there all the same
    assert Path("e.json").exists()
    assert run(*words, "--fail-if", "psnr@anna<20", "--fail-if", "ssim.1s<-1").code == 0


def test_a_wrong_gate_ends_with_two(run: Run) -> None:
    found = run("anna.mkv", "--fail-if", "psnr.90s=20")
    assert (found.code, found.out) == (2, "")
    assert found.err.startswith("error: --fail-if 'psnr.90s=20': it is no comparison. Write ")


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eve.mkv"], "GENERATED eve.mkv does not exist. Give a video to measure."),
        (["."], "GENERATED . is a folder. Give a video to measure."),
        (
            ["anna.mkv", "--truth", "eve.mkv"],
            "--truth eve.mkv does not exist. Give the video that it should equal.",
        ),
        (
            ["anna.mkv", "--reference", "eve.png"],
            "--reference eve.png does not exist. Give a picture of the character.",
        ),
        (
            ["anna.mkv", "--driving", "truth.mkv"],
            "--driving truth.mkv is no folder. Give a folder made by extract-pose.",
        ),
        (
            ["anna.mkv", "--driving", "poses"],
            "--driving poses does not exist. Give a folder made by extract-pose.",
        ),
        (
            ["anna.mkv", "--driving", "."],
            "--driving . has no pose.mp4. Give a folder made by extract-pose.",
        ),
        (["anna.mkv", "-o", "."], "--output . is a folder. Give a file name."),
        (
            ["anna.mkv", "--csv", "no/e.csv"],
            "--csv no/e.csv cannot be written: the folder no does not exist. Make it first, or "
            "give another path.",
        ),
        (
            ["anna.mkv", "--csv", "anna.mkv", "--overwrite"],
            "--csv anna.mkv is also an input. Give another name.",
        ),
        (
            ["anna.mkv", "--csv", "e", "--plot", "e"],
            "--plot e is also another result. Give another name.",
        ),
        (["anna.mkv", "--cache", "anna.mkv"], "--cache anna.mkv is a file. Give a folder."),
        (
            ["--manifest", "list.csv"],
            "--manifest list.csv does not exist. Give a .csv or .jsonl list with a line for each "
            "video.",
        ),
        ([], "GENERATED is missing. Give a video, --method NAME=FILE or --manifest FILE."),
    ],
)
def test_inputs_that_cannot_work_are_told_in_a_line(
    run: Run, words: list[str], message: str
) -> None:
    assert run(*words) == Outcome(2, "", f"error: {message}\n")


def test_an_interruption_says_how_to_go_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "evaluate", interrupted)
    assert run("anna.mkv") == Outcome(
        130, "", "interrupted. Run the same command again to continue.\n"
    )


# --- with the toy networks -----------------------------------------------------------------------


def test_person_and_background_with_the_toy_models(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dance and its way back against itself: every joint is in its place.

    The way back goes on after the end of the driving.
    """
    write_dance_video(place / "dance.mp4", num_frames=26, height=128, width=192)
    words = ["extract-pose", "dance.mp4", "--pose-model", "toy", "-q"]
    assert main([*words, "--size", "192x128", "--fps", "12.5"]) == 0
    frames = decode_video(place / "dance.mp4")[1]
    with VideoWriter(place / "there.mp4", height=128, width=192, rate=12.5, crf=8) as writer:
        writer.write(np.concatenate([frames, frames[-2::-1]]))
    write_png(place / "anna.png", decode_video(place / "there.mp4")[1][0])
    capsys.readouterr()
    metrics = "identity,background_psnr,pose_pck,pose_pck_strict,pose_distance"
    words = ["eval", "there.mp4", "--driving", "dance_pose", "--reference", "anna.png"]
    words += ["--model", "toy", "--metrics", metrics, "--baseline", "1", "--json", "-q"]
    assert main([*words, "--sample-fps", "2.5", "--extend", "pingpong"]) == 0
    found = json.loads(capsys.readouterr().out)["methods"][0]["metrics"]
    assert {name: entry["unavailable"] for name, entry in found.items()} == dict.fromkeys(
        METRICS.keys() & found.keys()
    )
    assert found["pose_pck"]["overall"] > 0.97
    assert found["pose_pck_strict"]["overall"] > 0.95
    assert found["pose_distance"]["overall"] < 0.05
    assert found["identity"]["per_frame"][0] == pytest.approx(1, abs=1e-3)
    assert 0 < found["identity"]["overall"] < 1
    assert found["background_psnr"]["overall"] > 30
    for name in ("identity", "pose_pck"):
        places = [index for index, v in enumerate(found[name]["per_frame"]) if v is not None]
        assert places == list(range(0, 51, 5)), name


def test_a_model_that_is_not_here_is_a_row(
    place: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVERANIMATE_CACHE", str(place / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "caches"))
    write_png(Path("anna.png"), np.zeros((8, 8, 3), np.uint8))
    words = ["anna.mkv", "--reference", "anna.png", "--metrics", "identity", "--no-download", "-q"]
    found = run(*words)
    assert found.code == 0
    assert found.out == (
        "identity: not available: needs weights: the pose model rtmw or its detector is not on "
        "this machine, and --no-download fetches none\n"
    )


def test_nothing_heavy_is_needed_for_frames(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither networks nor the packages of `everanimate[eval]` are touched."""
    for name in ("torchvision", "torchmetrics", "torch_fidelity", "cdfvd"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name in ("learned_metrics", "person_metrics", "clip_features"):
        monkeypatch.setitem(sys.modules, f"everanimate_cli.{name}", None)
    assert run("anna.mkv", "--truth", "truth.mkv", *CHEAP).code == 0
