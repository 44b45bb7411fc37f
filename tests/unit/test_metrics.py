"""Numbers against formulas written out here, and against scikit-image.

The numbers of scikit-image 0.25.2 (numpy 2.4.6) were made from `picture_pair` by

    peak_signal_noise_ratio(truth, made, data_range=255)
    structural_similarity(truth, made, data_range=255, gaussian_weights=True, sigma=1.5,
                          use_sample_covariance=False, channel_axis=-1)
    (rgb2lab(made) - rgb2lab(truth)).mean((0, 1))
"""

import math

import numpy as np
import pytest

from everanimate_cli import metrics

SCIKIT_IMAGE = {
    (23, 31): (
        27.464155930858666,
        0.8120967440855363,
        (-1.2068401775080744, 0.23212148089587023, 0.2715962175079705),
    ),
    (11, 64): (
        27.5153757023434,
        0.8305854528789453,
        (0.2273823217761968, -0.09100102891918625, 0.6144941593933744),
    ),
    (64, 48): (
        27.12513136429081,
        0.8328704737063738,
        (0.0860824185720536, -0.13236570030760939, 0.23779370149487725),
    ),
}


def picture_pair(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Made and truth, from whole numbers alone."""
    row, column, channel = np.indices((height, width, 3))
    truth = (40 + 3 * row + 5 * column + 25 * channel + row * column * 7 % 23) % 256
    made = np.clip(truth * 9 // 10 + (row * 31 + column * 17 + channel * 5) % 29, 0, 255)
    return made.astype(np.uint8), truth.astype(np.uint8)


def grey(value: int, height: int = 12, width: int = 14) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


@pytest.fixture(params=SCIKIT_IMAGE, ids=str)
def size(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param


# --- PSNR ----------------------------------------------------------------------------------------


def test_psnr_is_that_of_scikit_image(size: tuple[int, int]) -> None:
    made, truth = picture_pair(*size)
    assert metrics.psnr(made, truth) == pytest.approx(SCIKIT_IMAGE[size][0], abs=1e-9)


def test_psnr_follows_its_formula() -> None:
    made, truth = picture_pair(5, 7)
    total = 0
    for row in range(5):
        for column in range(7):
            for channel in range(3):
                total += (int(made[row, column, channel]) - int(truth[row, column, channel])) ** 2
    assert metrics.squared_error(made, truth) == pytest.approx(total / (5 * 7 * 3), rel=1e-12)
    expected = 10 * math.log10(255 * 255 / (total / (5 * 7 * 3)))
    assert metrics.psnr(made, truth) == pytest.approx(expected, rel=1e-12)


def test_differences_do_not_wrap_around() -> None:
    """In uint8, 0 - 255 is 1 and 16 * 16 is 0: white against black would be nearly equal."""
    assert metrics.squared_error(grey(0), grey(255)) == 255**2
    assert metrics.psnr(grey(255), grey(0)) == 0
    assert metrics.squared_error(grey(16), grey(0)) == metrics.squared_error(grey(0), grey(16))
    assert metrics.frame_jump(grey(0), grey(255)) == metrics.frame_jump(grey(255), grey(0)) == 255


def test_a_mask_leaves_out_the_rest() -> None:
    made, truth = grey(10), grey(10)
    mask = np.zeros(made.shape[:2], np.bool_)
    mask[2:5, 3] = True
    made[2:5, 3, 1] = 40  # one channel of three is off by 30
    made[0, 0] = 255
    assert metrics.squared_error(made, truth, mask) == pytest.approx(30**2 / 3)
    assert metrics.psnr(made, truth, ~mask) == pytest.approx(
        10 * math.log10(255**2 / (245**2 / (12 * 14 - 3)))
    )


def test_frames_of_a_video_are_pooled() -> None:
    made = np.stack([grey(3), grey(7)])
    truth = np.stack([grey(3), grey(3)])
    assert metrics.squared_error(made, truth) == 8
    late = np.zeros(made.shape[:3], np.bool_)
    late[1] = True
    assert metrics.squared_error(made, truth, late) == 16


def test_equal_frames_have_no_error() -> None:
    frame = picture_pair(16, 16)[1]
    assert metrics.psnr(frame, frame) == math.inf
    assert metrics.ssim(frame, frame) == 1
    assert metrics.colour_shift(frame, frame) == (0, 0, 0)


# --- SSIM ----------------------------------------------------------------------------------------


def test_ssim_is_that_of_scikit_image(size: tuple[int, int]) -> None:
    made, truth = picture_pair(*size)
    assert metrics.ssim(made, truth) == pytest.approx(SCIKIT_IMAGE[size][1], abs=1e-9)


def test_ssim_follows_its_formula() -> None:
    """Every window on its own, the weights from the exponential."""
    made, truth = picture_pair(13, 12)
    reach = range(-5, 6)
    weights = np.array([[math.exp(-(i * i + j * j) / (2 * 1.5**2)) for j in reach] for i in reach])
    weights /= weights.sum()
    first_constant, second_constant = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for row in range(5, 13 - 5):
        for column in range(5, 12 - 5):
            for channel in range(3):
                place = np.s_[row - 5 : row + 6, column - 5 : column + 6, channel]
                x, y = made[place].astype(float), truth[place].astype(float)
                mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
                variance_x = (weights * (x - mean_x) ** 2).sum()
                variance_y = (weights * (y - mean_y) ** 2).sum()
                covariance = (weights * (x - mean_x) * (y - mean_y)).sum()
                values.append(
                    (2 * mean_x * mean_y + first_constant)
                    * (2 * covariance + second_constant)
                    / (mean_x**2 + mean_y**2 + first_constant)
                    / (variance_x + variance_y + second_constant)
                )
    assert len(values) == 3 * 2 * 3
    assert metrics.ssim(made, truth) == pytest.approx(np.mean(values), abs=1e-10)


def test_flat_frames_differ_in_brightness_only() -> None:
    constant = (0.01 * 255) ** 2
    expected = (2 * 50 * 200 + constant) / (50**2 + 200**2 + constant)
    assert metrics.ssim(grey(50), grey(200)) == pytest.approx(expected, abs=1e-9)


def test_ssim_refuses_what_no_window_fits_in() -> None:
    with pytest.raises(ValueError, match="at least 11x11 pixels"):
        metrics.ssim(grey(0, height=10), grey(0, height=10))
    with pytest.raises(ValueError, match=r"not \(2, 12, 14, 3\)"):
        metrics.ssim(np.stack([grey(0)] * 2), np.stack([grey(0)] * 2))


# --- colour --------------------------------------------------------------------------------------


def test_colour_shift_is_that_of_scikit_image(size: tuple[int, int]) -> None:
    made, truth = picture_pair(*size)
    assert metrics.colour_shift(made, truth) == pytest.approx(SCIKIT_IMAGE[size][2], abs=1e-9)


def test_colours_of_the_text_book() -> None:
    """From black to a colour the shift is the colour; L*, a*, b* of sRGB's corners under D65."""
    corners = {
        (255, 255, 255): (100.0, 0.0, 0.0),
        (255, 0, 0): (53.24, 80.09, 67.20),
        (0, 0, 255): (32.30, 79.19, -107.86),
        (1, 2, 3): (0.51, -0.12, -0.47),  # on the straight part of both curves
    }
    for colour, expected in corners.items():
        frame = np.broadcast_to(np.array(colour, np.uint8), (4, 5, 3))
        shift = metrics.colour_shift(frame, np.zeros((4, 5, 3), np.uint8))
        assert shift == pytest.approx(expected, abs=0.01)


def test_opposite_shifts_cancel_and_masks_count() -> None:
    truth = grey(119)
    made = truth.copy()
    made[:, :7] = 139
    made[:, 7:] = 99
    left = np.zeros(made.shape[:2], np.bool_)
    left[:, :7] = True
    brighter = metrics.colour_shift(made, truth, left)
    darker = metrics.colour_shift(made, truth, ~left)
    assert brighter.lightness == pytest.approx(7.9, abs=0.1)
    assert brighter.size == pytest.approx(brighter.lightness, abs=1e-3)
    both = metrics.colour_shift(made, truth)
    assert both.lightness == pytest.approx((brighter.lightness + darker.lightness) / 2, abs=1e-9)
    assert abs(both.lightness) < 0.3


def test_size_of_a_shift() -> None:
    assert metrics.ColourShift(2.0, -3.0, 6.0).size == 7


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "measure",
    [metrics.squared_error, metrics.ssim, metrics.colour_shift, metrics.frame_jump],
    ids=lambda function: function.__name__,
)
def test_frames_that_do_not_fit_are_refused(measure) -> None:
    with pytest.raises(ValueError, match=r"of \(12, 14, 3\) against one of \(12, 15, 3\)"):
        measure(grey(0), grey(0, width=15))
    with pytest.raises(ValueError, match="a frame is float64"):
        measure(grey(0).astype(float), grey(0))
    with pytest.raises(ValueError, match="not uint8 RGB"):
        measure(grey(0), grey(0)[..., 0])


@pytest.mark.parametrize("measure", [metrics.squared_error, metrics.colour_shift])
def test_an_empty_mask_is_refused(measure) -> None:
    with pytest.raises(ValueError, match="no pixel"):
        measure(grey(0), grey(0), np.zeros((12, 14), np.bool_))


# --- over time -----------------------------------------------------------------------------------


def test_seams_are_compared_with_the_frames_between() -> None:
    jumps = [2.0, 2.0, 9.0, 1.0, 3.0, 3.0]
    assert metrics.seam_jump(jumps, [2, 5]) == pytest.approx(6 / 2)
    assert math.isnan(metrics.seam_jump([0.0, 4.0, 0.0], [1]))
    for seams in ([], [0, 1, 2]):
        with pytest.raises(ValueError, match=f"{len(seams)} seams among 3"):
            metrics.seam_jump([1.0, 1.0, 1.0], seams)


def test_a_jump_is_the_mean_difference() -> None:
    following = grey(100)
    following[0, 0] = (90, 100, 130)
    assert metrics.frame_jump(grey(100), following) == pytest.approx((10 + 30) / (12 * 14 * 3))


def test_slope_of_a_line_and_of_a_cloud() -> None:
    times_s = [5.0, 15.0, 25.0, 35.0]
    assert metrics.slope_per_minute(times_s, [20.0, 19.5, 19.0, 18.5]) == pytest.approx(-3)
    values = [3.0, 1.0, 4.0, 1.0]
    # sum((t - 20) (v - 2.25)) / sum((t - 20)^2), per minute
    expected = ((-15) * 0.75 + (-5) * (-1.25) + 5 * 1.75 + 15 * (-1.25)) / 500 * 60
    assert metrics.slope_per_minute(times_s, values) == pytest.approx(expected)
    with pytest.raises(ValueError, match="two different moments"):
        metrics.slope_per_minute([4.0, 4.0], [1.0, 2.0])


# --- bootstrap -----------------------------------------------------------------------------------


def test_interval_of_a_mean_is_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(3).normal(10, 2, 400)
    interval = metrics.bootstrap(values)
    half_width = 1.96 * values.std() / math.sqrt(400)
    assert interval.value == pytest.approx(values.mean())
    assert interval.high - interval.value == pytest.approx(half_width, rel=0.05)
    assert interval.value - interval.low == pytest.approx(half_width, rel=0.05)
    narrow = metrics.bootstrap(values, confidence=0.5)
    assert narrow.high - narrow.low == pytest.approx(2 * 0.6745 / 1.96 * half_width, rel=0.05)


def test_two_videos_give_three_means() -> None:
    """Drawn twice from (1, 3): both 1, both 3 or one of each, so 95 % reach from 1 to 3."""
    assert metrics.bootstrap([1.0, 3.0]) == metrics.Interval(2.0, 1.0, 3.0)


def test_pairs_stay_together() -> None:
    """A steady gain is certain however much the videos differ; unpaired it would be lost."""
    theirs = np.array([10.0, 20.0, 30.0, 40.0])
    gain = metrics.paired_bootstrap(theirs + 0.5, theirs)
    assert (gain.value, gain.low, gain.high) == pytest.approx((0.5, 0.5, 0.5))
    assert gain.excludes_zero
    gain = metrics.paired_bootstrap(theirs * 1.08, theirs, relative=True)
    assert (gain.value, gain.low, gain.high) == pytest.approx((0.08, 0.08, 0.08))
    unsure = metrics.paired_bootstrap(theirs + np.array([-1, 1, -1, 1.2]), theirs)
    assert unsure.low < 0 < unsure.high
    assert not unsure.excludes_zero
    assert metrics.paired_bootstrap(theirs - 1, theirs).excludes_zero


def test_a_relative_gain_is_that_of_the_means() -> None:
    gain = metrics.paired_bootstrap([2.0, 8.0], [1.0, 7.0], relative=True)
    # Means of the resamples: 2/1, 10/8 and 8/7.
    assert (gain.value, gain.low, gain.high) == pytest.approx((0.25, 1 / 7, 1.0))


def test_resamples_follow_the_seed() -> None:
    values = [1.0, 2.0, 4.0, 8.0, 16.0]
    first = metrics.bootstrap(values, seed=1, num_resamples=50)
    assert first == metrics.bootstrap(values, seed=1, num_resamples=50)
    assert first != metrics.bootstrap(values, seed=2, num_resamples=50)


def test_too_few_videos_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 videos, not 1"):
        metrics.bootstrap([1.0])
    with pytest.raises(ValueError, match="2 against 1 videos"):
        metrics.paired_bootstrap([1.0, 2.0], [1.0])
