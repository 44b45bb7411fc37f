"""Laws of the metrics over generated frames: symmetry, identity, and which way each one moves."""

from itertools import pairwise

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everanimate_cli.eval_settings import EvalSettings, Gate, parse_horizons
from everanimate_cli.frame_metrics import (
    MAX_PSNR_DB,
    DriftMeter,
    ErrorMeter,
    Meter,
    Moment,
    MotionMeter,
    SsimMeter,
    Track,
)
from everanimate_cli.frechet import FeatureSums, frechet_distance, merge
from everanimate_cli.metric_table import METRICS
from everanimate_cli.person_metrics import cosine, pose_errors

relaxed = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def scene(seed: int, height: int = 40, width: int = 48) -> np.ndarray:
    """A picture with flat places, soft places and edges, far from black and white."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(70, 180, (5, 6, 3))
    picture = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(4):
        top, left = rng.integers(0, height - 12), rng.integers(0, width - 12)
        picture[top : top + 10, left : left + 9] = rng.uniform(70, 180, 3)
    return np.clip(picture, 60, 190).astype(np.uint8)


def distorted(frame: np.ndarray, kind: str, strength: float) -> np.ndarray:
    """Blur, colour cast, shift or noise; 0 leaves the frame as it is, 3 is strong."""
    if strength == 0:
        return frame
    if kind == "blur":
        return cv2.GaussianBlur(frame, (0, 0), strength)
    if kind == "cast":
        return np.clip(frame + strength * np.array([8.0, 0, -8]), 0, 255).astype(np.uint8)
    if kind == "shift":
        return np.roll(frame, round(2 * strength), axis=1)
    noise = np.random.default_rng(7).normal(0, 6 * strength, frame.shape)
    return np.clip(frame + noise, 0, 255).astype(np.uint8)


def overall(meter: Meter, moments: list[Moment]) -> dict[str, float]:
    for moment in moments:
        meter.add(moment)
    values = {}
    for name, outcome in meter.outcomes().items():
        assert isinstance(outcome, Track), name
        value = outcome.over(slice(None))
        assert value is not None
        values[name] = value
    return values


def against(made: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    moment = Moment(0, made, truth)
    return overall(ErrorMeter(), [moment]) | overall(SsimMeter(), [moment])


# --- against the truth ---------------------------------------------------------------------------


@relaxed
@given(seeds, seeds)
def test_made_and_truth_change_places(first: int, second: int) -> None:
    there, back = against(scene(first), scene(second)), against(scene(second), scene(first))
    assert there == pytest.approx(back, rel=1e-12)


@relaxed
@given(seeds)
def test_a_video_equals_itself(seed: int) -> None:
    found = against(scene(seed), scene(seed))
    assert found == pytest.approx({"psnr": MAX_PSNR_DB, "l1": 0, "ssim": 1})


@pytest.mark.parametrize("kind", ["blur", "cast", "shift", "noise"])
@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_more_distortion_is_worse_in_every_metric(kind: str, seed: int) -> None:
    truth = scene(seed)
    none, weak, strong = (against(distorted(truth, kind, s), truth) for s in (0, 1, 3))
    assert none["psnr"] > weak["psnr"] > strong["psnr"]
    assert none["ssim"] > weak["ssim"] > strong["ssim"]
    assert none["l1"] < weak["l1"] < strong["l1"]


@relaxed
@given(seed=seeds)
def test_psnr_of_noise_is_what_its_variance_says(seed: int) -> None:
    truth = np.full((64, 64, 3), 128, np.uint8)
    rng = np.random.default_rng(seed)
    made = np.clip(np.rint(truth + rng.normal(0, 10, truth.shape)), 0, 255).astype(np.uint8)
    assert against(made, truth)["psnr"] == pytest.approx(20 * np.log10(255 / 10), abs=0.2)


# --- drift ---------------------------------------------------------------------------------------


def drift(seed: int, kind: str, strength: float) -> dict[str, float]:
    """Of a video that stands still and then is distorted."""
    frame = scene(seed)
    later = distorted(frame, kind, strength)
    moments = [Moment(i, frame if i < 3 else later) for i in range(6)]
    return overall(DriftMeter(3), moments)


@relaxed
@given(seeds)
def test_what_does_not_change_does_not_drift(seed: int) -> None:
    assert drift(seed, "blur", 0) == pytest.approx(
        dict.fromkeys(("colour_drift", "contrast_drift", "saturation_drift", "sharpness_drift"), 0),
        abs=1e-9,
    )


@pytest.mark.parametrize(
    ("kind", "moved"),
    [
        ("blur", ("sharpness_drift", "contrast_drift")),
        ("cast", ("colour_drift",)),
        ("noise", ("sharpness_drift",)),
    ],
)
@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_each_drift_grows_with_its_distortion(kind: str, moved: tuple[str, ...], seed: int) -> None:
    weak, strong = drift(seed, kind, 1), drift(seed, kind, 3)
    for name in moved:
        assert 0 < weak[name] < strong[name]


@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_a_shift_is_no_drift(seed: int) -> None:
    """What moves is still there: colours stay, and so do edges but for the wrap-around's."""
    found = drift(seed, "shift", 3)
    for name in ("colour_drift", "contrast_drift", "saturation_drift"):
        assert found[name] == pytest.approx(0, abs=1e-6)


@relaxed
@given(seeds, st.floats(1, 20))
def test_noise_that_changes_flickers_and_a_still_does_not(seed: int, strength: float) -> None:
    rng, frame = np.random.default_rng(seed), scene(seed)
    levels = [0.0, strength, 3 * strength]
    found = []
    for level in levels:
        frames = [
            np.clip(np.rint(frame + rng.normal(0, level, frame.shape)), 0, 255).astype(np.uint8)
            for _ in range(5)
        ]
        meter = MotionMeter(None)
        for index, each in enumerate(frames):
            meter.add(Moment(index, each))
        outcome = meter.outcomes()["flicker"]
        assert isinstance(outcome, Track)
        found.append(outcome.over(slice(None)))
    assert found[0] == 0
    assert found[0] < found[1] < found[2]  # type: ignore[operator]


# --- sets of features, poses ---------------------------------------------------------------------


def sums(features: np.ndarray) -> FeatureSums:
    total = FeatureSums()
    total.add(features)
    return total


@relaxed
@given(seeds, st.integers(2, 12), st.integers(2, 12), st.integers(1, 6))
def test_frechet_distance_is_symmetric_and_zero_for_the_same(
    seed: int, count: int, other: int, dimension: int
) -> None:
    rng = np.random.default_rng(seed)
    first, second = (sums(rng.normal(0, 2, (n, dimension))) for n in (count, other))
    there, back = frechet_distance(first, second), frechet_distance(second, first)
    assert there == pytest.approx(back, rel=1e-6, abs=1e-6)
    assert there >= 0
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)


@relaxed
@given(seeds, st.floats(0.1, 10))
def test_frechet_distance_of_moved_features_is_the_square_of_the_way(seed: int, way: float) -> None:
    features = np.random.default_rng(seed).normal(0, 1, (20, 4))
    moved = features + np.array([way, 0, 0, 0])
    assert frechet_distance(sums(features), sums(moved)) == pytest.approx(way**2, rel=1e-6)


@relaxed
@given(seeds, st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_sums_do_not_hang_on_how_features_come(seed: int, sizes: list[int]) -> None:
    features = np.random.default_rng(seed).normal(3, 2, (sum(sizes) + 2, 3))
    borders = np.cumsum(sizes)
    parts = merge(sums(part) for part in np.split(features, borders))
    whole = sums(features)
    np.testing.assert_allclose(parts.mean(), whole.mean(), rtol=1e-9)
    np.testing.assert_allclose(parts.covariance(), whole.covariance(), rtol=1e-7, atol=1e-9)


@relaxed
@given(seeds, st.floats(0.01, 1))
def test_a_pose_that_is_off_by_so_much_is_told_so(seed: int, away: float) -> None:
    rng = np.random.default_rng(seed)
    wanted = np.column_stack([rng.uniform(0, 500, (17, 2)), np.ones(17)])
    angle = rng.uniform(0, 2 * np.pi, 17)
    found = wanted.copy()
    found[:, :2] += 60 * away * np.column_stack([np.cos(angle), np.sin(angle)])
    errors = pose_errors(found, wanted, 60.0)
    assert errors.distance == pytest.approx(away)
    if abs(away - 0.2) > 1e-6 and abs(away - 0.1) > 1e-6:
        assert (errors.pck, errors.strict_pck) == (float(away < 0.2), float(away < 0.1))
    assert pose_errors(wanted, wanted, 60.0) == (1, 1, 0)


@relaxed
@given(seeds, st.floats(0.1, 10))
def test_the_cosine_knows_no_length(seed: int, factor: float) -> None:
    first, second = np.random.default_rng(seed).normal(0, 1, (2, 8))
    assert cosine(first, second) == pytest.approx(cosine(second, factor * first))
    assert cosine(first, factor * first) == pytest.approx(1)
    assert -1 - 1e-9 <= cosine(first, second) <= 1 + 1e-9


# --- options -------------------------------------------------------------------------------------

numbers = st.decimals(0, 999, places=1).map(float)


@relaxed
@given(st.lists(numbers, min_size=2, max_size=6, unique=True).map(sorted), st.booleans())
def test_stretches_are_read_back_as_they_were_written(ends: list[float], is_open: bool) -> None:
    parts = [f"{a:g}-{b:g}" for a, b in pairwise(ends)]
    text = ",".join([*parts, *([f"{ends[-1]:g}+"] if is_open else [])])
    horizons = parse_horizons(text)
    assert ",".join(h.label.removesuffix("s") for h in horizons) == text
    for moment in ends[:-1]:
        assert sum(h.holds(moment) for h in horizons) == 1


@relaxed
@given(
    st.sampled_from(list(METRICS)),
    st.sampled_from(["", ".overall", ".slope", ".10s", ".30-60s", ".90+s"]),
    st.sampled_from(["", "@anna"]),
    st.sampled_from(["<", "<=", ">", ">="]),
    st.floats(-1e6, 1e6),
)
def test_gates_are_read_back_as_they_were_written(
    metric: str, place: str, method: str, sign: str, limit: float
) -> None:
    text = f"{metric}{place}{method}{sign}{limit!r}"
    gate = Gate.parse(text)
    assert f"{gate.metric}{place}{method}{gate.sign}{gate.limit!r}" == text
    assert gate.place == (place.removeprefix(".") or "overall")
    EvalSettings.from_json({"generated": ["anna.mp4"], "fail_if": [text]})


@relaxed
@given(st.text(max_size=30))
def test_any_other_text_is_refused_and_not_run(text: str) -> None:
    try:
        gate = Gate.parse(text)
    except ValueError:
        return
    assert gate.metric in METRICS
