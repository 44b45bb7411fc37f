import contextlib
import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from benchmarks import drift
from tiny import TINY_DEFAULTS, write_tiny_checkpoint

from everanimate_cli import metrics
from everanimate_cli.images import read_image
from everanimate_cli.train_settings import TrainSettings
from everanimate_cli.video import VideoReader

SCRIPTS = Path(__file__).parents[1] / "benchmarks"
SPEED_SCRIPT = SCRIPTS / "animate_speed.py"
EXTRACT_SCRIPT = SCRIPTS / "extract_speed.py"
NUM_CHUNKS, NUM_STEPS = 2, 2


@pytest.fixture(scope="module")
def speed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    """What the script prints, and its JSON."""
    folder = tmp_path_factory.mktemp("speed")
    figures = folder / "figures.json"
    arguments = {
        "--model": write_tiny_checkpoint(folder / "tiny"),
        "--chunks": NUM_CHUNKS,
        "--steps": NUM_STEPS,
        "--repeats": 1,
        "--json": figures,
    }
    words = [str(word) for pair in arguments.items() for word in pair]
    done = subprocess.run(
        [sys.executable, SPEED_SCRIPT, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(figures.read_text())


def test_each_side_makes_its_video(speed: tuple[str, dict]) -> None:
    _, figures = speed
    num_target_slots = (TINY_DEFAULTS.frames_per_chunk - 1) // 4 + 1
    rows = {row["side"]: row for row in figures["rows"]}
    assert {side: row["num_slots"] for side, row in rows.items()} == {
        "diffusers": 1 + num_target_slots,
        "pixel": 1 + num_target_slots,
        "latent": TINY_DEFAULTS.identity_slots + num_target_slots,
    }
    for row in rows.values():
        assert row["num_chunks"] == NUM_CHUNKS
        assert row["peak_mib"] > 100
        assert 0 < row["outside_share"] < 1
        inside_s = (1 - row["outside_share"]) * row["chunk_s"]
        assert sum(row["networks_s"].values()) == pytest.approx(inside_s)
        assert set(row["networks_s"]) == {"transformer", "vae", "image_encoder", "text_encoder"}
        assert NUM_STEPS * row["step_s"] < row["chunk_s"]
    assert rows["diffusers"]["time_ratio"] == rows["diffusers"]["step_ratio"] == 1
    for made in figures["rounds"][0]:
        assert len(made["steps_s"]) == NUM_CHUNKS * (NUM_STEPS - 1)


def test_diffusers_and_pixel_memory_do_the_same_work(speed: tuple[str, dict]) -> None:
    """Other noise gives 23 dB, one more step 29; both sides' encoders lose a little."""
    _, figures = speed
    assert figures["psnr_db"] > 40


def test_targets_are_judged_and_printed(speed: tuple[str, dict]) -> None:
    printed, figures = speed
    assert len(figures["targets"]) == 8
    for target in figures["targets"]:
        assert target["met"] == (target["value"] <= target["limit"])
        verdict = "ok" if target["met"] else "**short**"
        line = f"| {target['target']} | {target['value']:.3f} | {target['limit']:g} | {verdict} |"
        assert line in printed
    for row in figures["rows"]:
        assert f" {row['chunk_s']:.3f} | {row['time_ratio']:.2f} | " in printed


# --- extract_speed.py ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def extraction(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    """What the script prints, and its JSON."""
    figures = tmp_path_factory.mktemp("extraction") / "figures.json"
    words = ["--rounds", "1", "--detector-gflop", "0.1", "--pose-gflop", "0.1"]
    words += ["--clips", "192x108:0.8", "--memory-clip", "192x108:0.5:2"]
    words += ["--dances", "1", "--dance-clip", "224x128:0.8", "--json", str(figures)]
    done = subprocess.run(
        [sys.executable, EXTRACT_SCRIPT, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(figures.read_text())


def test_both_sides_extract_the_same_clip(extraction: tuple[str, dict]) -> None:
    _, figures = extraction
    rows = {row["side"]: row for row in figures["rows"]}
    assert set(rows) == {"rtmlib", "everanimate"}
    for row in rows.values():
        assert (row["clip"], row["num_frames"]) == ("0.8 s 192x108", 24)
        assert row["peak_mib"] > 100
        assert row["networks_ms"] > 0
        assert row["total_s"] > row["networks_ms"] * row["num_frames"] / 1000
    assert rows["rtmlib"]["detector_calls"] == 24
    # Frames 0, 8 and 16, and again before to choose the person.
    assert rows["everanimate"]["detector_calls"] <= 2 * 24 / 4
    # One fixed pose: all that differs is where the box went between two looks of the detector.
    assert figures["apart_share"] < 0.01


def test_ratios_are_to_the_rtmlib_loop(extraction: tuple[str, dict]) -> None:
    _, figures = extraction
    theirs, ours = figures["rows"]
    for name in ("total", "outside", "cpu", "outside_cpu"):
        assert theirs[f"{name}_ratio"] == 1
    assert ours["total_ratio"] == pytest.approx(ours["total_s"] / theirs["total_s"])
    assert ours["outside_ratio"] == pytest.approx(ours["outside_ms"] / theirs["outside_ms"])
    clip, first = (figures["rounds"][0][1][part] for part in ("clip", "first"))
    outside_s = (clip["wall_s"] - clip["networks_s"]) - (first["wall_s"] - first["networks_s"])
    assert (clip["num_frames"], first["num_frames"]) == (24, 1)
    assert ours["outside_ms"] == pytest.approx(1000 * outside_s / 23)


def test_keypoints_are_compared_with_rtmlibs(extraction: tuple[str, dict]) -> None:
    _, figures = extraction
    (dance,) = figures["dances"]
    assert (dance["frames"], dance["frames_without_person"]) == (24, [0, 0])
    every_frame, every_eighth = dance["detector_calls"]
    assert every_frame >= 24 > every_eighth
    assert dance["from_rtmlib_px"] < 1e-3
    assert 0 < dance["drift_share"] < dance["drift_share_95"]


def test_memory_is_that_of_a_clip_and_of_a_longer_one(extraction: tuple[str, dict]) -> None:
    _, figures = extraction
    assert [one["num_frames"] for one in figures["memory"]] == [15, 30]


def test_targets_of_the_extraction_are_judged_and_printed(extraction: tuple[str, dict]) -> None:
    printed, figures = extraction
    limits = [target["limit"] for target in figures["targets"]]
    assert limits == [0.5, pytest.approx((3 + 10) / 24), 1.1, 1e-3, 0.01]
    for target in figures["targets"]:
        assert target["met"] == (target["value"] <= target["limit"])
        verdict = "ok" if target["met"] else "**short**"
        values = f"{target['value']:.4f} | {target['limit']:.4g} | {verdict}"
        assert f"| {target['target']} | {values} |" in printed


def test_rtmlib_is_asked_for(tmp_path: Path) -> None:
    """The script is run with everything but rtmlib."""
    hidden = "import importlib.util as u; f = u.find_spec; "
    hidden += "u.find_spec = lambda name: None if name == 'rtmlib' else f(name); "
    hidden += f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); "  # as for a script by its path
    hidden += f"import runpy; runpy.run_path({str(EXTRACT_SCRIPT)!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", hidden], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 1
    assert "pip install --no-deps rtmlib==0.0.16" in done.stderr


# --- drift.py ------------------------------------------------------------------------------------

DRIFT_ARMS = ("base-latent", "base-pixel5", "copy", "ceiling")
DRIFT_FRAMES, WINDOW_FRAMES = 20, 10


@pytest.fixture(scope="module")
def drifting(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the script prints, and its folder."""
    work = tmp_path_factory.mktemp("drift")
    words = ["--work", str(work), "--model", str(write_tiny_checkpoint(work / "tiny"))]
    words += ["--arm", *DRIFT_ARMS, "--videos", "2", "--characters", "2"]
    words += ["--seconds", f"{DRIFT_FRAMES / 12.5}", "--window", f"{WINDOW_FRAMES / 12.5}"]
    reports = ["--table", "--json", str(work / "all.json"), "--plot", str(work / "plot.png")]
    reports += ["--sheet", str(work / "sheet.png"), "--sheet-character", "moving-1"]
    drift.main(["dataset", "evaluate", *words, "--inference-steps", "1"])
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        drift.main([*words, *reports])
    return printed.getvalue(), work


def read_result(work: Path, arm: str, who: str) -> dict:
    return json.loads((work / "results" / arm / f"{who}.json").read_text())


def test_training_videos_are_aligned_and_described(drifting: tuple[str, Path]) -> None:
    folder = drifting[1] / "dataset"
    with (folder / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["prompt"].split(",")[0] for row in rows] == ["still camera", "moving camera"]
    for row in rows:
        lengths, sizes = set(), []
        for track in ("video", "pose", "face"):
            with VideoReader(folder / row[track]) as reader:
                lengths.add(len(reader))
                sizes.append((reader.info.height, reader.info.width))
                assert float(reader.rate) == 12.5
        assert len(lengths) == 1
        assert 75 <= lengths.pop() <= 125
        assert sizes == [(48, 64), (48, 64), (16, 16)]


def test_scores_of_a_video_are_those_of_its_frames(drifting: tuple[str, Path]) -> None:
    """The reference over and over, against the world as it is."""
    _, work = drifting
    world = drift.World("moving", 1, TINY_DEFAULTS)
    frames = [world.frame(index).rgb.astype(float) for index in range(DRIFT_FRAMES)]
    errors = [((frame - frames[0]) ** 2).mean() for frame in frames]
    figures = json.loads((work / "all.json").read_text())
    (arm,) = (arm for arm in figures["arms"] if (arm["arm"], arm["camera"]) == ("copy", "moving"))
    for window, measured in enumerate(arm["psnr"][arm["characters"].index(1)]):
        part = errors[window * WINDOW_FRAMES : (window + 1) * WINDOW_FRAMES]
        assert measured == pytest.approx(10 * np.log10(255**2 / np.mean(part)), abs=1e-3)
    # What differs from the empty room is the person, whose error weighs as much as it is large.
    scores = read_result(work, "copy", "moving-1")["scores"]
    share, person, rest = (
        np.array(scores[name]) for name in ("person_share", "person_error", "background_error")
    )
    assert (share > 0.05).all()
    assert (share < 0.6).all()
    assert share * person + (1 - share) * rest == pytest.approx(np.array(errors), rel=1e-4)


def test_each_arm_has_its_own_memory(drifting: tuple[str, Path]) -> None:
    _, work = drifting
    made = {arm: read_result(work, arm, "still-0") for arm in DRIFT_ARMS}
    # F = 9: chunks follow each other by 5 frames with an overlap of 4, by 4 with one of 5.
    assert made["base-latent"]["seams"] == made["ceiling"]["seams"] == [9, 14, 19]
    assert made["base-pixel5"]["seams"] == [9, 13, 17]
    assert made["copy"]["seams"] == []
    assert len({tuple(result["scores"]["error"]) for result in made.values()}) == len(made)
    for result in made.values():
        assert {len(values) for values in result["scores"].values()} == {DRIFT_FRAMES}


def test_jumps_at_seams_are_told_from_the_others() -> None:
    num_frames = 8
    scores = {name: [1.0] * num_frames for name in ("error", "ssim", "person_error")}
    scores |= {name: [0.5] * num_frames for name in ("background_error", "person_share")}
    scores |= dict.fromkeys(metrics.ColourShift._fields, [2.0] * num_frames)
    scores["jump"] = [0.0, 1.0, 6.0, 1.0, 2.0, 2.0, 8.0, 2.0]
    result = {"scores": scores, "rate_fps": 2.0, "seams": [2, 6, 10]}
    figures = drift.window_figures(result, 2.0)
    assert figures["seam"] == [6.0, 4.0]  # nothing comes before the first frame
    assert figures["colour"] == pytest.approx([12**0.5] * 2)
    # Windows of 3.2 frames: the last one has the remaining 5.
    assert len(drift.window_figures(result, 1.6)["psnr"]) == 2


def test_what_is_done_is_not_done_again(drifting: tuple[str, Path]) -> None:
    _, work = drifting
    path = work / "results" / "copy" / "still-0.json"
    found = json.loads(path.read_text())
    given = {"arm": "copy", "camera": "still", "index": 0, "num_steps": 1, "model": "toy"}
    given |= {"device": "cpu", "lora": None, "path": path}

    def is_done(**changed: object) -> bool:
        shape = {"num_frames": DRIFT_FRAMES, "identity": found["identity"]}
        return drift.Job(**given | shape | changed).is_done

    assert is_done()
    assert is_done(num_frames=DRIFT_FRAMES - 1)
    assert not is_done(num_frames=DRIFT_FRAMES + 1)
    assert not is_done(identity=found["identity"] | {"model": "another"})
    assert not is_done(path=path.with_name("still-9.json"))


def test_arms_are_compared_and_drawn(drifting: tuple[str, Path]) -> None:
    printed, work = drifting
    for arm in DRIFT_ARMS:
        assert f"| {drift.ARMS[arm].title} | 2 | " in printed
    assert "| PSNR [dB], moving camera | 0-0.8 s | 0.8-1.6 s | per minute |" in printed
    # Reference and 2 kept frames, truth and four arms.
    assert read_image(work / "sheet.png").shape == (24 + 5 * 128, 96 + 128 + 16 + 2 * 128, 3)
    assert min(read_image(work / "plot.png").shape[:2]) > 500


def test_differences_are_paired_by_character() -> None:
    """An arm that is better by 1 dB throughout, of videos that differ by 20 dB."""
    theirs = np.array([[10.0, 9.0], [20.0, 19.0], [30.0, 29.0]])

    def figures(values: np.ndarray, indices: list[int]) -> drift.Figures:
        return drift.Figures(
            indices=indices, values=dict.fromkeys(drift.MEASURES, values), window_s=10.0
        )

    better = np.vstack([theirs + [[1.0, 2.0]], [[99.0, 99.0]]])  # noqa: RUF005  # a sum of arrays
    rows = drift.compare(
        {
            ("latent-rfm", "still"): figures(better, [0, 1, 2, 5]),
            ("pixel1", "still"): figures(theirs, [0, 1, 2]),
        }
    )
    assert [row["window"] for row in rows] == ["0-10 s", "10-20 s", "per minute"]
    for row, gain in zip(rows, (1.0, 2.0, 6.0), strict=True):
        assert (row["arm"], row["over"], row["characters"]) == ("latent-rfm", "pixel1", 3)
        assert row["psnr"] == pytest.approx({"value": gain, "low": gain, "high": gain})
    assert rows[0]["psnr_gain"]["value"] == pytest.approx(1 / 20)
    assert "**+2.00 [+2.00, +2.00]**" in drift.lay_out_comparisons(rows, "still")


def test_all_arms_get_the_same_training() -> None:
    """Halves of options that `train-lora` takes; an ablation differs in its own one only."""
    seen = {}
    for name, arm in drift.ARMS.items():
        if arm.run is None:
            continue
        assert arm.run.init is not None
        assert arm.run.init.init is None
        settings = []
        for run in (arm.run.init, arm.run):
            values = {
                option.removeprefix("--").replace("-", "_"): value
                for option, value in zip(run.options[::2], run.options[1::2], strict=True)
            }
            kinds = {"stage": int, "carry_frames": int, "memory": str, "correction": str}
            settings.append(
                TrainSettings(
                    dataset=Path("videos"),
                    **{key: kinds.get(key, float)(value) for key, value in values.items()},
                )
            )
        assert {one.memory for one in settings} == {arm.memory}
        assert {one.carry_frames for one in settings} == {arm.carry_frames}
        seen[name] = settings
    assert seen["latent"][0] == seen["latent"][1] == seen["latent-rfm"][0]
    restoring = vars(seen["latent-rfm"][1])
    for name, changed in {
        "no-identity": {"reference_anchor_probability"},
        "no-augmentation": {"memory_augmentation"},
        "exact": {"correction"},
        "exact-no-gate": {"correction", "degradation_min_sigma"},
        "constant": {"correction"},
    }.items():
        second = vars(seen[name][1])
        assert {key for key in second if second[key] != restoring[key]} == changed


def test_halves_are_trained_in_order_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    def pretend(words: list, **_given: object) -> subprocess.CompletedProcess:
        given = dict(zip(words[5::2], words[6::2], strict=True))
        folder = Path(given["--output"])
        trained.append((folder.name, given["--stage"], given["--steps"], given.get("--init")))
        folder.mkdir()
        (folder / "lora.safetensors").touch()
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(drift.subprocess, "run", pretend)
    manifest = tmp_path / "manifest.csv"
    manifest.touch()
    words = ["train", "--work", str(tmp_path), "--arm", "latent-rfm", "latent", "--steps", "10"]
    options = drift.parse_options(words)
    drift.train(options, options.arm, manifest)
    init = str(tmp_path / "lora" / "latent-half" / "lora.safetensors")
    expected = [("latent-half", "1", "5", None)]
    expected += [("latent-rfm", "2", "5", init), ("latent", "1", "5", init)]
    assert trained == expected
    drift.train(options, options.arm, manifest)
    assert trained == expected
    options.lr = 1.0
    with pytest.raises(SystemExit, match="latent-half was trained with other words"):
        drift.train(options, options.arm, manifest)
    manifest.write_text("changed")
    with pytest.raises(SystemExit, match="latent-half was trained with other words, manifest"):
        drift.train(options, options.arm, manifest)


def test_unknown_arms_are_refused() -> None:
    assert drift.choose_arms(["ceiling", "main"])[:2] == ["sink", "pixel1"]
    with pytest.raises(SystemExit, match="--arm best is unknown"):
        drift.choose_arms(["best"])
