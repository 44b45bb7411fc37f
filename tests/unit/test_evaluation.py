"""Whole evaluations of small videos: what is compared with what, and what comes of it."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from media import Frames, numbered_frames, write_media

from everanimate_cli import eval_subject, evaluation, learned_metrics, metrics
from everanimate_cli.errors import InputError, MediaError, SettingsError
from everanimate_cli.eval_manifest import EvalEntry
from everanimate_cli.eval_meters import choose_pose_models
from everanimate_cli.eval_result import EvalPlan, Evaluation, Measure, summarise
from everanimate_cli.eval_settings import EvalSettings, parse_horizons
from everanimate_cli.evaluation import evaluate
from everanimate_cli.evaluation_tables import lay_out, write_csv
from everanimate_cli.events import Note, PhaseAdvanced, PhaseStarted
from everanimate_cli.frame_metrics import Track, Unavailable, Whole
from everanimate_cli.frechet import PairSums
from everanimate_cli.hashes import hash_file

FRAME_METRICS = "psnr,ssim,l1,colour_drift,contrast_drift,saturation_drift,seam,flicker"
LOSSLESS = {"codec": "libx264rgb", "pixel_format": "rgb24", "options": {"qp": "0"}}


def video(path: str, frames: Frames, rate: Fraction | int = 25) -> Path:
    """A video whose frames come back to the last bit."""
    return write_media(Path(path), frames, rate=rate, **LOSSLESS)  # type: ignore[arg-type]


def noisy(count: int, seed: int = 0, height: int = 16, width: int = 24) -> Frames:
    return np.random.default_rng(seed).integers(90, 130, (count, height, width, 3), np.uint8)


def run(*paths: str, **given: object) -> tuple[Evaluation, list[str]]:
    """The evaluation and the notes on the way."""
    options = {"metrics": FRAME_METRICS, "download": False} | given
    notes: list[str] = []

    def on_event(event: object) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    settings = EvalSettings(generated=tuple(map(Path, paths)), **options)  # type: ignore[arg-type]
    found = evaluate(settings, on_event)
    assert isinstance(found, Evaluation)
    return found, notes


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- the same moment in both ---------------------------------------------------------------------


def test_every_frame_meets_its_own_truth() -> None:
    made, truth = noisy(20, 1), noisy(20, 2)
    video("made.mkv", made)
    video("truth.mkv", truth)
    found, notes = run("made.mkv", truth=Path("truth.mkv"))
    (result,) = found.methods
    assert notes == []
    assert result.metrics["psnr"].per_frame == pytest.approx(
        [metrics.psnr(a, b) for a, b in zip(made, truth, strict=True)], rel=1e-5
    )
    assert result.metrics["ssim"].per_frame == pytest.approx(
        [metrics.ssim(a, b) for a, b in zip(made, truth, strict=True)], rel=1e-5
    )
    assert result.metrics["psnr"].overall == pytest.approx(metrics.psnr(made, truth), rel=1e-5)
    assert (result.num_frames, result.compared_frames, result.size) == (20, 20, (16, 24))


def test_a_truth_of_another_rate_is_met_by_time() -> None:
    """30 frames a second against 25: at frame i of the video the truth shows round(i * 1.2)."""
    truth = numbered_frames(30, 16, 24)
    nearest = [round(i * 30 / 25) for i in range(25)]
    video("made.mkv", truth[nearest])
    video("truth.mkv", truth, 30)
    found, notes = run("made.mkv", truth=Path("truth.mkv"))
    assert set(found.methods[0].metrics["l1"].per_frame or ()) == {0.0}
    assert notes == ["made: the truth has 30 frames/s, compared at 25 by time stamps"]


def test_the_longer_one_is_compared_as_far_as_the_other_reaches() -> None:
    video("made.mkv", noisy(20, 1))
    video("truth.mkv", noisy(12, 1))
    found, notes = run("made.mkv", truth=Path("truth.mkv"))
    (result,) = found.methods
    assert notes == ["made lasts 0.80 s, the truth 0.48 s: 12 frames are compared"]
    assert result.compared_frames == 12
    assert [v is None for v in result.metrics["psnr"].per_frame or ()] == [False] * 12 + [True] * 8
    assert len(result.metrics["flicker"].per_frame or ()) == 20
    found, notes = run("truth.mkv", truth=Path("made.mkv"))
    assert notes == ["truth lasts 0.48 s, the truth 0.80 s: 12 frames are compared"]
    assert found.methods[0].metrics["psnr"].overall == 100


def test_the_truth_can_begin_later() -> None:
    truth = noisy(20, 1)
    video("made.mkv", truth[5:15])
    video("truth.mkv", truth)
    found, _ = run("made.mkv", truth=Path("truth.mkv"), start=0.2)
    assert found.methods[0].metrics["psnr"].overall == 100
    with pytest.raises(SettingsError) as caught:
        run("made.mkv", truth=Path("truth.mkv"), start=5.0)
    assert str(caught.value) == ("--truth: start 5 s is not within truth.mkv, which lasts 0.800 s.")


def test_a_truth_of_another_size_is_refused_unless_it_is_to_be_resized() -> None:
    video("made.mkv", np.full((4, 16, 24, 3), 90, np.uint8))
    video("truth.mkv", np.full((4, 32, 32, 3), 90, np.uint8))
    with pytest.raises(InputError) as caught:
        run("made.mkv", truth=Path("truth.mkv"))
    assert str(caught.value) == (
        "--truth truth.mkv is 32x32, but made is 24x16. Add --resize contain, cover or stretch to "
        "bring the truth to that size."
    )
    stretched, _ = run("made.mkv", truth=Path("truth.mkv"), resize="stretch")
    assert stretched.methods[0].metrics["l1"].overall == 0
    contained, _ = run("made.mkv", truth=Path("truth.mkv"), resize="contain")
    bars = 8 / 24  # black on both sides
    assert contained.methods[0].metrics["l1"].overall == pytest.approx(bars * 90 / 255, rel=1e-4)


def test_a_file_that_is_no_video_is_named_with_its_option() -> None:
    video("made.mkv", noisy(3))
    Path("text.mp4").write_text("no video")
    with pytest.raises(MediaError, match=r"^--truth text.mp4 "):
        run("made.mkv", truth=Path("text.mp4"))
    with pytest.raises(MediaError, match=r"^GENERATED text.mp4 "):
        run("text.mp4")


# --- what the settings beside a video say --------------------------------------------------------


def write_record(
    video_path: str, result: dict[str, object] | None = None, **effective: object
) -> None:
    record = {"settings": {}, "result": result or {}, "effective": effective}
    Path(video_path).with_suffix(".json").write_text(json.dumps(record))


def test_chunks_and_start_are_read_beside_the_video() -> None:
    truth = noisy(30, 1)
    video("made.mkv", truth[5:25])
    video("truth.mkv", truth)
    write_record("made.mkv", frames_per_chunk=9, overlap=4, start=0.2)
    found, notes = run("made.mkv", truth=Path("truth.mkv"))
    (result,) = found.methods
    assert result.chunk_joins == (9, 14, 19)
    assert result.metrics["psnr"].overall == 100
    assert notes[0] == "made: the truth from 0.2 s on, as made.json says"
    # What is given wins.
    found, notes = run(
        "made.mkv", truth=Path("truth.mkv"), frames_per_chunk=10, overlap=0, start=0.0
    )
    assert found.methods[0].chunk_joins == (10,)
    assert found.methods[0].metrics["psnr"].overall != 100
    assert "as made.json says" not in notes[0]


def write_poses(folder: str, frames: Frames, **record: object) -> Path:
    """A folder of poses, whose joints, if any, are where `record` has them."""
    path = Path(folder)
    path.mkdir()
    video(f"{folder}/pose.mkv", frames).rename(path / "pose.mp4")
    (path / "extract.json").write_text(json.dumps(record))
    return path


def pointing(columns: list[int]) -> Frames:
    """Poses [S, 16, 24, 3] that are one dot, at a column each."""
    frames = np.zeros((len(columns), 16, 24, 3), np.uint8)
    for frame, column in zip(frames, columns, strict=True):
        frame[8, column] = 255
    return frames


def masked_columns(**given: object) -> list[int | None]:
    """Where the person is in each frame of made.mkv."""
    entry = EvalEntry(generated=Path("made.mkv"), driving=Path("poses"), **given)  # type: ignore[arg-type]
    settings = EvalSettings(generated=(Path("made.mkv"),))
    subject = eval_subject.open_subject(entry, settings, lambda _: None)
    masks = eval_subject.PersonMasks(subject)
    found = [mask for i in range(0, 10, 4) for mask in masks.read(range(i, min(i + 4, 10)))]
    subject.close()
    return [None if mask is None else round(np.nonzero(mask)[1].mean()) for mask in found]


EXTENDED = {
    "pingpong": [2, 6, 10, 14, 10, 6, 2, 6, 10, 14],
    "loop": [2, 6, 10, 14, 2, 6, 10, 14, 2, 6],
    "hold": [2, 6, 10] + 7 * [14],
    "none": [2, 6, 10, 14] + 6 * [None],
}


@pytest.mark.parametrize("block", [3, 64])
@pytest.mark.parametrize("extend", EXTENDED)
def test_the_pose_of_every_frame_is_known_after_the_end_of_the_driving(
    extend: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eval_subject, "_BLOCK_FRAMES", block)
    video("made.mkv", noisy(10))
    write_poses("poses", pointing([2, 6, 10, 14]))
    assert masked_columns(extend=extend) == EXTENDED[extend]
    assert masked_columns() == EXTENDED["none"]  # nothing is known of it
    write_record("made.mkv", {"driving_frames": 4, "fps": 25.0}, extend=extend)
    assert masked_columns() == EXTENDED[extend]
    # A driving that was cut turns where it was cut; what is given wins.
    write_record("made.mkv", {"driving_frames": 3, "fps": 25.0}, extend="loop")
    assert masked_columns() == [2, 6, 10, 2, 6, 10, 2, 6, 10, 2]
    assert masked_columns(extend="hold") == [2, 6] + 8 * [10]
    # Counted at another rate it says nothing of these frames.
    write_record("made.mkv", {"driving_frames": 3, "fps": 12.5}, extend="loop")
    assert masked_columns() == EXTENDED["none"]


def test_what_follows_the_driving_has_a_pose_and_no_truth() -> None:
    truth = noisy(10)
    video("made.mkv", truth)
    video("truth.mkv", truth)
    write_poses("poses", pointing([2, 6, 10, 14]))
    write_record("made.mkv", {"driving_frames": 4, "fps": 25.0}, extend="pingpong")
    found, notes = run(
        "made.mkv",
        truth=Path("truth.mkv"),
        driving=Path("poses"),
        metrics="psnr,background_psnr",
        baseline=0.04,
    )
    (result,) = found.methods
    assert notes == [
        "made lasts 0.40 s, the driving 0.16 s: 4 frames are compared with the truth",
        "made lasts 0.40 s, the driving pose 0.16 s and goes on by pingpong: all frames are "
        "compared with it",
    ]
    measured = {
        name: [value is not None for value in result.metrics[name].per_frame or ()]
        for name in ("psnr", "background_psnr")
    }
    assert measured == {"psnr": [True] * 4 + [False] * 6, "background_psnr": [False] + [True] * 9}
    assert (result.compared_frames, result.extend, result.driving_frames) == (4, "pingpong", 4)
    found, notes = run("made.mkv", truth=Path("truth.mkv"), extend="none")
    assert (found.methods[0].compared_frames, notes) == (10, [])


def test_poses_of_a_part_of_the_truth_begin_where_the_part_begins() -> None:
    """`animate --start` on a raw video extracts from there, and counts from there on."""
    truth = noisy(30, 1)
    video("made.mkv", truth[15:25])
    video("truth.mkv", truth)
    digest = hash_file(Path("truth.mkv"))
    folder = write_poses("poses", pointing([2]), start_s=0.4, source_sha256=digest)
    write_record("made.mkv", start=0.2, driving="poses")
    found, notes = run("made.mkv", truth=Path("truth.mkv"), metrics="psnr")
    assert found.methods[0].metrics["psnr"].overall == 100
    assert (found.methods[0].start_s, found.methods[0].truth_start_s) == (0.2, 0.4 + 0.2)
    assert notes[0] == "made: the truth from 0.6 s on, as made.json says"
    # Another video begins where it begins.
    (folder / "extract.json").write_text(json.dumps({"start_s": 0.4, "source_sha256": "0"}))
    found, _ = run("made.mkv", truth=Path("truth.mkv"), metrics="psnr")
    assert found.methods[0].truth_start_s == 0.2


def test_drift_is_measured_against_the_first_chunk() -> None:
    frames = np.repeat(np.array([80] * 8 + [100] * 12, np.uint8), 16 * 24 * 3)
    video("made.mkv", frames.reshape(20, 16, 24, 3))
    first = run("made.mkv", frames_per_chunk=8, overlap=0)[0].methods[0].metrics
    assert first["colour_drift"].per_frame[7] == 0  # type: ignore[index]
    assert first["colour_drift"].per_frame[8] > 5  # type: ignore[index, operator]
    short = run("made.mkv")[0].methods[0].metrics["colour_drift"]
    assert short.unavailable == "needs a video that is longer than its first 50 frames"
    given = run("made.mkv", baseline=0.16)[0].methods[0].metrics["colour_drift"]
    assert given.per_frame == first["colour_drift"].per_frame


@pytest.mark.parametrize("text", ["no json", "[]", '{"effective": 5}', '{"effective": {}}'])
def test_another_file_of_that_name_is_no_matter(text: str) -> None:
    video("made.mkv", noisy(4))
    Path("made.json").write_text(text)
    found, _ = run("made.mkv")
    assert found.methods[0].chunk_joins == ()
    assert "needs the chunks" in str(found.methods[0].metrics["seam"].unavailable)


# --- what cannot be measured ---------------------------------------------------------------------


def test_what_cannot_be_measured_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = dict.fromkeys(("lpips", "fid", "fvd"), (("no_such_package",), "weights"))
    monkeypatch.setattr(learned_metrics, "PACKAGES", missing)
    video("made.mkv", noisy(4))
    found, _ = run("made.mkv", metrics=None, truth=Path("made.mkv"))
    reasons = {
        name: measure.unavailable
        for name, measure in found.methods[0].metrics.items()
        if measure.unavailable is not None
    }
    assert {name: reasons[name] for name in ("lpips", "fid", "fvd")} == dict.fromkeys(
        ("lpips", "fid", "fvd"), "needs pip install no_such_package"
    )
    assert reasons["identity"] == "needs --reference"
    for name in ("background_psnr", "background_lpips", "pose_pck", "pose_distance"):
        assert reasons[name] == "needs --driving"
    found, _ = run("made.mkv", metrics=None)
    for name in ("psnr", "ssim", "l1", "lpips", "fid", "fvd"):
        assert found.methods[0].metrics[name].unavailable == "needs --truth"


def test_the_background_has_an_lpips_where_the_weights_are(monkeypatch: pytest.MonkeyPatch) -> None:
    video("made.mkv", noisy(4, height=32, width=32))
    poses = np.zeros((4, 32, 32, 3), np.uint8)
    poses[:, 16, 16] = 255
    write_poses("poses", poses)
    given = {"driving": Path("poses"), "metrics": "background_lpips", "baseline": 0.04}
    missing = {"lpips": (("no_such_package",), "weights")}
    monkeypatch.setattr(learned_metrics, "PACKAGES", missing)
    found, _ = run("made.mkv", **given)
    assert lay_out(found) == ("background_lpips: not available: needs pip install no_such_package")
    monkeypatch.setattr(learned_metrics, "lacking", lambda *_, **__: None)
    monkeypatch.setattr(
        learned_metrics, "load_network", lambda *_, **__: lambda a, b: (a - b).abs().mean()
    )
    found, _ = run("made.mkv", **given, sample_fps=25.0)
    values = found.methods[0].metrics["background_lpips"].per_frame
    assert values is not None
    assert values[0] is None
    assert all(0 < value < 0.2 for value in values[1:] if value is not None)


def test_pose_models_are_those_of_the_driving_video() -> None:
    driving = Path("dance_pose")
    driving.mkdir()
    given = EvalSettings(generated=(Path("a.mp4"),))
    assert choose_pose_models(given, None) == ("rtmw", None)
    assert choose_pose_models(given, driving) == ("rtmw", None)
    record = {"settings": {"pose_model": "toy", "detector": "yolox-m"}}
    (driving / "extract.json").write_text(json.dumps(record))
    assert choose_pose_models(given, driving) == ("toy", "yolox-m")
    own = EvalSettings(generated=(Path("a.mp4"),), pose_model="vitpose-h")
    assert choose_pose_models(own, driving) == ("vitpose-h", None)
    own = EvalSettings(generated=(Path("a.mp4"),), detector="yolox-tiny")
    assert choose_pose_models(own, driving) == ("toy", "yolox-tiny")


# --- over time -----------------------------------------------------------------------------------


def measured(values: np.ndarray, horizons: str, fps: float = 10.0) -> Measure:
    return summarise("psnr", Track(values[:, None]), parse_horizons(horizons), fps)


def test_stretches_take_their_own_frames() -> None:
    values = np.arange(100.0)
    found = measured(values, "0-2,2-4,0-10,8+")
    assert found.horizons == (9.5, 29.5, 49.5, 89.5)
    assert found.overall == 49.5
    assert found.slope_per_minute == pytest.approx(600)
    assert found.interval is not None


def test_a_stretch_that_is_covered_by_less_than_half_has_no_number() -> None:
    found = measured(np.arange(60.0), "0-10,0-15,4-8,6+,5+")
    assert found.horizons == (29.5, None, 49.5, None, 54.5)


def test_a_metric_of_every_fifth_frame_covers_its_video() -> None:
    values = np.full(60, np.nan)
    values[::5] = 7
    assert measured(values, "0-6,0-12,0-12.1").horizons == (7, 7, None)


def test_nothing_measured_is_said_so() -> None:
    assert measured(np.full(4, np.nan), "0-1").unavailable == (
        "not defined: no frame could be measured"
    )
    whole = summarise("fid", Whole(3.25, (None, 1.5)), parse_horizons("0-1,1-2"), 10)
    assert (whole.overall, whole.horizons, whole.per_frame) == (3.25, (None, 1.5), None)
    lacking = summarise("fid", Unavailable("needs x"), parse_horizons("0-1"), 10)
    assert (lacking.unavailable, lacking.overall, lacking.horizons) == ("needs x", None, ())


# --- the result ----------------------------------------------------------------------------------


def test_the_result_is_plain_json() -> None:
    video("made.mkv", noisy(60, 1))
    video("peer.mkv", noisy(60, 2))
    found, _ = run("made.mkv", "peer.mkv", truth=Path("made.mkv"), horizons="0-1,1+")
    entries = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert entries["format_version"] == 1
    assert entries["horizons_s"] == [[0, 1], [1, None]]
    assert entries["truth"] == "made.mkv"
    assert entries["settings"] == found.settings.to_json()
    assert {"everanimate", "numpy", "av"} <= entries["versions"].keys()
    made, peer = entries["methods"]
    assert (made["name"], made["fps"], made["size"], made["seconds"]) == ("made", 25, [16, 24], 2.4)
    assert len(made["sha256"]) == 64
    assert made["metrics"]["psnr"] == {
        "unit": "dB",
        "better": "higher",
        "group": "quality",
        "about": "peak signal-to-noise ratio against the truth, peak 255",
        "per_frame": [100] * 60,
        "overall": 100,
        "horizons": [100, 100],
        "slope_per_minute": 0,
        "interval": None,
        "unavailable": None,
    }
    worst = [each for each in peer["worst_frames"] if each["metric"] == "psnr"]
    psnr = peer["metrics"]["psnr"]["per_frame"]
    assert worst[0] == {"frame": int(np.argmin(psnr)), "metric": "psnr", "value": min(psnr)}
    frames = sorted(each["frame"] for each in worst)
    assert len(frames) in (2, 3)
    assert min(np.diff(frames)) >= 25
    assert Measure.from_json("psnr", peer["metrics"]["psnr"]) == found.methods[1].metrics["psnr"]


def test_the_frames_come_in_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory does not grow with the video: nobody asks for many frames, or for one twice."""
    video("made.mkv", noisy(70, 1))
    asked: dict[int, list[int]] = {}

    class Reader(eval_subject.VideoReader):
        def read(self, indices: range) -> Frames:  # type: ignore[override]
            assert len(indices) <= 8
            asked.setdefault(id(self), []).extend(indices)
            return super().read(indices)

    monkeypatch.setattr(eval_subject, "VideoReader", Reader)
    run("made.mkv", truth=Path("made.mkv"))
    assert list(asked.values()) == [list(range(70))] * 2


def test_progress_counts_every_frame() -> None:
    video("made.mkv", noisy(12))
    events: list[object] = []
    evaluate(EvalSettings(generated=(Path("made.mkv"),), metrics="flicker"), events.append)
    assert events[0] == PhaseStarted(name="measuring made", total=12)
    assert events[1:] == [PhaseAdvanced(done=index + 1) for index in range(12)]


def test_a_test_set_is_summed_up() -> None:
    base = noisy(30, 1)
    for name, offset in (("one", 1), ("two", 3)):
        video(f"{name}.mkv", base)
        video(f"{name}_ours.mkv", base + np.uint8(offset))
        video(f"{name}_peer.mkv", base + np.uint8(10))
    lines = ["generated,method,truth"]
    lines += [f"{n}_{m}.mkv,{m},{n}.mkv" for n in ("one", "two") for m in ("ours", "peer")]
    Path("list.csv").write_text("\n".join(lines))
    found, _ = run(manifest=Path("list.csv"), metrics="l1,psnr,identity", horizons="0-1,0+")
    assert found.method_names == ["ours", "peer"]
    assert [m.entry.name for m in found.methods] == [
        "ours: one",
        "peer: one",
        "ours: two",
        "peer: two",
    ]
    ours = found.summary("ours")
    assert ours["l1"].overall == pytest.approx(2 / 255, rel=1e-5)
    assert ours["l1"].horizons == pytest.approx((2 / 255, 2 / 255), rel=1e-5)
    assert ours["identity"].unavailable == "needs --reference"
    entries = found.to_json()
    assert [each["method"] for each in entries["summary"]] == ["ours", "peer"]
    assert entries["summary"][0]["samples"] == ["one", "two"]


def test_sets_of_features_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The FID of a test set is that of all its frames, not the mean of its videos' FIDs."""
    monkeypatch.setattr(learned_metrics, "lacking", lambda *_, **__: None)
    monkeypatch.setattr(
        learned_metrics, "load_network", lambda *_, **__: lambda x: x.float().mean((2, 3))
    )
    made, truth = [noisy(10, seed) for seed in (1, 2)], [noisy(10, seed) for seed in (3, 4)]
    for index in (0, 1):
        video(f"truth{index}.mkv", truth[index] + np.uint8(40 * index))
        video(f"made{index}.mkv", made[index] + np.uint8(40 * index))
    Path("list.csv").write_text(
        "generated,truth,sample\nmade0.mkv,truth0.mkv,a\nmade1.mkv,truth1.mkv,b\n"
    )
    given = {"manifest": Path("list.csv"), "metrics": "fid", "horizons": "0-0.2,0+"}
    found, _ = run(**given, cache=Path("cache"))
    sums = PairSums()
    for index in (0, 1):
        pair = [(s[index] + np.uint8(40 * index)).mean((1, 2)) for s in (made, truth)]
        sums.add((), *pair)
    summary = found.summary("generated")["fid"]
    assert summary.overall == pytest.approx(sums.distance(), rel=1e-4)
    assert summary.horizons[1] == summary.overall
    singles = [result.metrics["fid"].overall for result in found.methods]
    assert summary.overall != pytest.approx(np.mean(singles), rel=0.01)  # type: ignore[arg-type]
    # The features are found again, also for other stretches of time.
    monkeypatch.setattr(learned_metrics, "lacking", lambda *_, **__: "needs luck")
    again, notes = run(**given, cache=Path("cache"))
    assert notes == [f"generated: {name}: 1 metrics from the cache" for name in "ab"]
    assert again.summary("generated") == found.summary("generated")
    parts, _ = run(**given | {"horizons": "0.2-0.4"}, cache=Path("cache"))
    late = PairSums()
    for index in (0, 1):
        pair = [(s[index][5:] + np.uint8(40 * index)).mean((1, 2)) for s in (made, truth)]
        late.add((), *pair)
    distance = parts.summary("generated")["fid"].horizons[0]
    assert distance == pytest.approx(late.distance(), rel=1e-4)
    for path in Path("cache").glob("*.npy"):
        path.write_bytes(path.read_bytes()[:100])
    damaged, _ = run(**given, cache=Path("cache"))
    assert damaged.summary("generated")["fid"].unavailable == "needs luck"


def test_features_of_a_stopped_evaluation_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned_metrics, "lacking", lambda *_, **__: None)
    monkeypatch.setattr(
        learned_metrics, "load_network", lambda *_, **__: lambda x: x.float().mean((2, 3))
    )
    video("made.mkv", noisy(20))
    Path("list.csv").write_text("generated,truth\nmade.mkv,made.mkv\n")

    def stop(event: object) -> None:
        if isinstance(event, PhaseAdvanced) and event.done == 15:
            raise KeyboardInterrupt

    settings = EvalSettings(manifest=Path("list.csv"), metrics="fid", cache=Path("cache"))
    with pytest.raises(KeyboardInterrupt):
        evaluate(settings, stop)
    assert list(Path("cache").iterdir()) == []


# --- gates ---------------------------------------------------------------------------------------


def test_gates_are_broken_line_by_line() -> None:
    base = noisy(30, 1)
    video("made.mkv", base + np.uint8(2))
    video("peer.mkv", base + np.uint8(20))
    video("truth.mkv", base)
    gates = ("psnr<30", "psnr.1s@peer<30", "l1.10-30s>1", "ssim<-1")
    found, _ = run(
        "made.mkv", "peer.mkv", truth=Path("truth.mkv"), horizons="0-1,10-30", fail_if=gates
    )
    psnr = found.methods[1].metrics["psnr"].overall
    assert found.broken_gates() == [
        f"psnr<30: peer has {psnr:.6g}",
        f"psnr.1s@peer<30: peer has {psnr:.6g}",
        "l1.10-30s>1: made has no value (the video has no 10-30s value)",
        "l1.10-30s>1: peer has no value (the video has no 10-30s value)",
    ]


def test_a_gate_on_what_is_not_available_is_broken() -> None:
    video("made.mkv", noisy(4))
    found, _ = run("made.mkv", fail_if=("psnr<1", "flicker.slope>1"))
    assert found.broken_gates() == [
        "psnr<1: made has no value (needs --truth)",
        "flicker.slope>1: made has no value (the video has no slope value)",
    ]


# --- cache ---------------------------------------------------------------------------------------


def test_what_was_measured_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    video("made.mkv", noisy(12, 1))
    video("truth.mkv", noisy(12, 2))
    given = {"truth": Path("truth.mkv"), "cache": Path("cache")}
    first, notes = run("made.mkv", **given)
    assert notes == []
    Path("made.mkv").rename("moved.mkv")
    looked = []
    original = evaluation._moments
    monkeypatch.setattr(
        evaluation, "_moments", lambda *a, **k: (looked.append(1), original(*a, **k))[1]
    )
    again, notes = run("moved.mkv", **given)
    assert notes == ["moved: 8 metrics from the cache"]
    assert again.methods[0].metrics == first.methods[0].metrics
    assert again.methods[0].sha256 == first.methods[0].sha256
    assert looked == []
    # Other settings or another truth give other numbers.
    for change in ({"horizons": "0-1"}, {"truth": Path("moved.mkv")}, {"start": 0.04}):
        run("moved.mkv", **{**given, **change}, metrics="psnr")
        assert looked.pop()
    for path in Path("cache").iterdir():
        path.write_text("{")
    run("moved.mkv", **given, metrics="psnr")
    assert looked == [1]


# --- tables --------------------------------------------------------------------------------------


def test_the_table_has_a_block_for_each_metric() -> None:
    base = noisy(60, 1)
    video("made.mkv", base + np.uint8(2))
    video("peer.mkv", base)
    found, _ = run(
        "made.mkv", "peer.mkv", truth=Path("peer.mkv"), metrics="l1,fid,identity", horizons="0-1,9+"
    )
    object.__setattr__(
        found.methods[1], "metrics", found.methods[1].metrics | {
            "l1": Measure(name="l1", unavailable="needs luck")}
    )  # fmt: skip
    object.__setattr__(
        found.methods[0], "metrics", found.methods[0].metrics | {
            "l1": Measure(name="l1", overall=2 / 255, horizons=(2 / 255, None),
                          slope_per_minute=-0.25, interval=(-0.5, 0.001))}
    )  # fmt: skip
    assert lay_out(found).split("\n\n")[0].splitlines() == [
        "l1, lower is better  overall    0-1s  9+s                  per minute",
        "  made                0.0078  0.0078    -  -0.2500 [-0.5000, +0.0010]",
        "  peer               not available: needs luck",
    ]
    assert lay_out(found).splitlines()[-1] == "identity: not available: needs --reference"


def test_the_csv_table_has_a_line_for_each_metric() -> None:
    video("made.mkv", noisy(30, 1))
    found, _ = run("made.mkv", truth=Path("made.mkv"), metrics="psnr,identity", horizons="0-1,1+")
    write_csv(found, Path("t.csv"))
    assert Path("t.csv").read_text() == (
        "method,sample,metric,unit,better,overall,0-1s,1+s,slope_per_minute,interval_low,"
        "interval_high,not_available\n"
        "made,,psnr,dB,higher,100.0,100.0,100.0,,,,\n"
        "made,,identity,CLIP cosine,higher,,,,,,,needs --reference\n"
    )


def test_a_plan_measures_nothing() -> None:
    video("made.mkv", noisy(30, 1))
    settings = EvalSettings(
        generated=(Path("made.mkv"),), metrics="psnr,flicker", horizons="0-1,1+", dry_run=True
    )
    plan = evaluate(settings, lambda _: None)
    assert isinstance(plan, EvalPlan)
    assert plan.to_json() == {
        "videos": {"made": "30 frames, 1.20 s"},
        "metrics": "flicker",
        "not_available": {"psnr": "needs --truth"},
        "horizons": "0-1s, 1+s",
    }
