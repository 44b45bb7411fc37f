"""Options of `eval`: stretches of time, gates, names, and what is refused word for word."""

import re
from pathlib import Path

import pytest

from everanimate_cli.errors import SettingsError
from everanimate_cli.eval_settings import (
    EvalSettings,
    Gate,
    Horizon,
    parse_horizons,
)
from everanimate_cli.metric_table import METRICS


def options(**given: object) -> EvalSettings:
    return EvalSettings(**({"generated": (Path("anna.mp4"),)} | given))


# --- stretches of time ---------------------------------------------------------------------------


def test_stretches_are_read_and_named() -> None:
    horizons = parse_horizons("0-10, 10-12.5,90+")
    assert horizons == (Horizon(0, 10), Horizon(10, 12.5), Horizon(90))
    assert [horizon.label for horizon in horizons] == ["0-10s", "10-12.5s", "90+s"]


def test_the_papers_stretches_both_begin_at_zero() -> None:
    assert parse_horizons("paper") == (Horizon(0, 10), Horizon(0, 90))


def test_a_stretch_holds_its_first_moment_and_not_its_end() -> None:
    horizon = Horizon(10, 30)
    assert [horizon.holds(t) for t in (9.99, 10, 29.99, 30)] == [False, True, True, False]
    assert Horizon(90).holds(1e6)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("10", "'10' is not a stretch of time"),
        ("0-10,", "'' is not a stretch of time"),
        ("10-10", "'10-10' is empty"),
        ("30-10", "'30-10' is empty"),
        ("0-10,0-10.0", "'0-10.0' is there twice"),
        ("-5-10", "'-5-10' is not a stretch of time"),
        ("0-1e3", "'0-1e3' is not a stretch of time"),
    ],
)
def test_other_texts_are_no_stretches(text: str, problem: str) -> None:
    with pytest.raises(SettingsError) as caught:
        options(horizons=text)
    assert str(caught.value) == f"--horizons {text}: {problem}."


# --- gates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("psnr<20", ("psnr", "overall", None, "<", 20.0)),
        ("psnr.overall <= 20", ("psnr", "overall", None, "<=", 20.0)),
        ("psnr.slope@ours<-1.5e-1", ("psnr", "slope", "ours", "<", -0.15)),
        (" ssim.90s@my own >= .8 ", ("ssim", "90s", "my own", ">=", 0.8)),
        ("colour_drift.10-30s>3.", ("colour_drift", "10-30s", None, ">", 3.0)),
        ("l1.90+s>+1", ("l1", "90+s", None, ">", 1.0)),
        ("psnr@a.slope<1", ("psnr", "overall", "a.slope", "<", 1.0)),
    ],
)
def test_gates_are_read(text: str, expected: tuple[object, ...]) -> None:
    gate = Gate.parse(text)
    assert (gate.metric, gate.place, gate.method, gate.sign, gate.limit) == expected


@pytest.mark.parametrize(
    ("sign", "below", "equal", "above"),
    [("<", True, False, False), ("<=", True, True, False), (">", False, False, True),
     (">=", False, True, True)],
)  # fmt: skip
def test_what_breaks_a_gate(sign: str, below: bool, equal: bool, above: bool) -> None:
    gate = Gate.parse(f"psnr{sign}20")
    assert [gate.is_broken_by(v) for v in (19.9, 20.0, 20.1)] == [below, equal, above]


NO_COMPARISON = (
    "it is no comparison. Write METRIC<NUMBER, such as psnr<20, psnr.90s<20, psnr.slope<-1 or "
    "'ssim.overall@ours<=0.8'"
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("psnr", NO_COMPARISON),
        ("psnr==20", NO_COMPARISON),
        ("psnr<20 and ssim<1", NO_COMPARISON),
        ("psnr.later<20", NO_COMPARISON),
        ("__import__('os')<1", NO_COMPARISON),
        ("psnr<nan", NO_COMPARISON),
        ("psnr<1e999", "1e999 is not a finite number"),
        ("vmaf<20", f"'vmaf' is unknown. Known: {', '.join(METRICS)}"),
        (
            "psnr.20s<20",
            "'20s' is no stretch of time. Known: 0-10s, 10-30s, 30-60s, 60-90s, 90+s",
        ),
        ("psnr@ours<20", "'ours' is no video. Known: anna"),
    ],
)
def test_wrong_gates_are_refused(text: str, problem: str) -> None:
    with pytest.raises(SettingsError) as caught:
        options(fail_if=(text,))
    assert str(caught.value) == f"--fail-if '{text}': {problem}."


def test_a_moment_that_ends_two_stretches_must_be_written_out() -> None:
    horizons = parse_horizons("0-90,60-90")
    with pytest.raises(ValueError, match=re.escape("'90s' could be several stretches of time")):
        Gate.parse("psnr.90s<20").horizon_index(horizons)
    assert Gate.parse("psnr.60-90s<20").horizon_index(horizons) == 1
    assert Gate.parse("psnr<20").horizon_index(horizons) is None


def test_a_gate_on_a_metric_that_is_not_measured_is_refused() -> None:
    with pytest.raises(SettingsError, match="'ssim' is not among --metrics psnr"):
        options(metrics="psnr", fail_if=("ssim<0.5",))


# --- the rest ------------------------------------------------------------------------------------


def test_metrics_come_in_the_order_of_the_table() -> None:
    assert options().metric_names == tuple(METRICS)
    assert options(metrics="flicker, psnr").metric_names == ("psnr", "flicker")
    with pytest.raises(SettingsError, match="--metrics psnr,vmaf: 'vmaf' is unknown"):
        options(metrics="psnr,vmaf")


def test_videos_have_names() -> None:
    settings = options(method=("ours=a/b.mp4", "peer one=x=y.mp4"))
    assert settings.methods_and_files == [
        ("anna", Path("anna.mp4")),
        ("ours", Path("a/b.mp4")),
        ("peer one", Path("x=y.mp4")),
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"generated": ()},
            "GENERATED is missing. Give a video, --method NAME=FILE or --manifest FILE.",
        ),
        (
            {"method": ("anna=other.mp4",)},
            "two videos are called 'anna'. Name them by --method NAME=FILE.",
        ),
        ({"method": ("ours",)}, "--method ours is not a named video. Write NAME=FILE."),
        ({"method": ("a@b=c",)}, "--method a@b=c is not a named video. Write NAME=FILE."),
        (
            {"manifest": Path("list.csv")},
            "GENERATED anna.mp4 and --manifest list.csv exclude each other: the manifest names "
            "all files. Leave one of them out.",
        ),
        (
            {"frames_per_chunk": 77},
            "--frames-per-chunk 77 needs --overlap beside it. Give --overlap 0 for chunks that "
            "share no frames.",
        ),
        ({"overlap": 4}, "--overlap 4 needs --frames-per-chunk beside it."),
        (
            {"frames_per_chunk": 5, "overlap": 5},
            "--overlap 5 is not below --frames-per-chunk 5.",
        ),
        ({"sample_fps": 0.0}, "--sample-fps 0.0 is too small. Give a number above 0."),
        ({"start": -1.0}, "--start -1.0 is too small. Give 0 or more."),
        (
            {"resize": "squash"},
            "--resize squash is unknown. Known: contain, cover, stretch.",
        ),
    ],
)
def test_what_cannot_work_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        options(**given)
    assert str(caught.value) == message


def test_every_metric_is_described() -> None:
    for name, kind in METRICS.items():
        assert kind.about
        assert set(kind.needs) <= {"--truth", "--reference", "--driving"}, name
