from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from media import decode_video, frame_numbers, moving_frames, numbered_frames, write_media

from everanimate_cli.encode import VideoWriter
from everanimate_cli.images import contain_box, fit_frame, fit_size
from everanimate_cli.joining import join_videos
from everanimate_cli.settings import Fit
from everanimate_cli.video import Timeline, VideoReader

NUM_FRAMES = 40

# Short groups with B-frames, once closed and once leaning on their neighbours.
CLOSED = {"x264-params": "keyint=9:min-keyint=9:scenecut=0:bframes=3:b-adapt=0"}
OPEN = {"x264-params": "keyint=11:min-keyint=6:scenecut=0:bframes=3:b-adapt=0:open-gop=1"}

rates = st.fractions(min_value=1, max_value=120, max_denominator=1001)
sides = st.integers(1, 2000)


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[VideoReader, np.ndarray]]:
    """Readers that live through all examples, so that each starts where the last one ended."""
    folder = tmp_path_factory.mktemp("videos")
    frames = numbered_frames(NUM_FRAMES)
    paths = [
        write_media(folder / "closed.mp4", frames, options=CLOSED),
        write_media(folder / "open.mkv", frames, options=OPEN),
        write_media(folder / "stream.ts", frames, options=CLOSED),
        write_media(folder / "counted.avi", frames, options=CLOSED),
    ]
    return [(VideoReader(path), decode_video(path)[1]) for path in paths]


@given(st.lists(st.integers(0, NUM_FRAMES - 1), max_size=20), st.integers(0, 3))
@settings(max_examples=120, deadline=None)
def test_any_frames_in_any_order_equal_the_plain_decode(
    readers: list[tuple[VideoReader, np.ndarray]], indices: list[int], which: int
) -> None:
    reader, expected = readers[which]
    np.testing.assert_array_equal(reader.read(indices), expected[indices])


@given(st.integers(0, 100), st.integers(1, 30), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_ping_pong_runs_equal_the_plain_decode(
    readers: list[tuple[VideoReader, np.ndarray]], first: int, length: int, which: int
) -> None:
    reader, expected = readers[which]
    period = 2 * NUM_FRAMES - 2
    indices = [min(i % period, period - i % period) for i in range(first, first + length)]
    np.testing.assert_array_equal(reader.read(indices), expected[indices])


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5))
@settings(max_examples=15, deadline=None)
def test_a_join_has_the_frames_of_its_parts(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    frames = moving_frames(sum(lengths))
    parts = []
    for end, length in zip(np.cumsum(lengths), lengths, strict=True):
        path = folder / f"{end}.mp4"
        with VideoWriter(path, width=48, height=32, rate=25) as writer:
            writer.write(frames[end - length : end])
        parts.append(path)
    output = folder / "joined.mp4"
    join_videos(parts, output)
    times, decoded = decode_video(output)
    np.testing.assert_array_equal(decoded, np.concatenate([decode_video(p)[1] for p in parts]))
    assert times == list(range(0, len(frames) * 512, 512))
    assert VideoReader(output).info.rate == 25


@given(st.lists(st.integers(1, 400), min_size=1, max_size=40), rates, st.data())
def test_each_sampled_frame_is_the_nearest_in_time(
    steps: list[int], rate: Fraction, data: st.DataObject
) -> None:
    time_base = Fraction(1, 600)
    times = np.cumsum([0, *steps[:-1]]) + 77
    timeline = Timeline(times=times, end=int(times[-1]) + steps[-1], time_base=time_base)
    duration_s = float(timeline.duration_s)
    start_s = data.draw(st.floats(0, duration_s, exclude_max=True))
    end_s = data.draw(st.none() | st.floats(start_s, duration_s + 1))

    count = timeline.count_frames(rate, start_s, end_s)
    length_s = min(duration_s, duration_s if end_s is None else end_s) - start_s
    assert count <= length_s * rate + 1e-5 < count + 1 + 2e-5

    frames = timeline.nearest_frames(rate, count, start_s)
    assert len(frames) == count
    assert (np.diff(frames) >= 0).all()
    for position, frame in enumerate(frames):
        wanted_s = start_s + position / float(rate)
        distances = np.abs((times - times[0]) / 600 - wanted_s)
        assert distances[frame] <= distances.min() + 1e-9


@given(st.integers(1, 300), rates)
def test_the_own_rate_keeps_every_frame_once(num_frames: int, rate: Fraction) -> None:
    timeline = Timeline(times=np.arange(num_frames), end=num_frames, time_base=1 / rate)
    assert timeline.count_frames(rate) == num_frames
    assert timeline.nearest_frames(rate, num_frames).tolist() == list(range(num_frames))


@given(st.integers(2, 30), st.integers(1, 30), st.sampled_from(["mp4", "mkv"]))
@settings(max_examples=10, deadline=None)
def test_files_of_a_constant_rate_keep_every_frame_once(
    tmp_path_factory: pytest.TempPathFactory, num_frames: int, fps: int, suffix: str
) -> None:
    path = tmp_path_factory.mktemp("rates") / f"a.{suffix}"
    write_media(path, numbered_frames(num_frames), rate=fps)
    with VideoReader(path) as reader:
        assert (len(reader), reader.rate) == (num_frames, fps)
        assert frame_numbers(reader.read(range(num_frames))) == list(range(num_frames))


@given(sides, sides, sides, sides)
def test_contained_content_fills_one_side_and_sits_in_the_middle(
    source_height: int, source_width: int, height: int, width: int
) -> None:
    top, left, content_height, content_width = contain_box(
        source_height, source_width, height, width
    )
    assert content_height == height or content_width == width
    assert 1 <= content_height <= height
    assert 1 <= content_width <= width
    assert 0 <= height - content_height - 2 * top <= 1
    assert 0 <= width - content_width - 2 * left <= 1


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(["contain", "cover", "stretch"]),
)
def test_a_plain_frame_stays_plain(
    source_height: int, source_width: int, height: int, width: int, fit: Fit
) -> None:
    fitted = fit_frame(
        np.full((source_height, source_width, 3), 90, np.uint8),
        height,
        width,
        fit,
    )
    assert fitted.shape == (height, width, 3)
    assert set(np.unique(fitted)) <= ({0, 90} if fit == "contain" else {90})


@given(sides, sides, st.integers(1, 2_000_000), st.sampled_from([1, 2, 16, 32]))
def test_a_fitted_size_is_the_largest_of_the_aspect(
    reference_height: int, reference_width: int, area: int, multiple: int
) -> None:
    height, width = fit_size(reference_height, reference_width, area, multiple)
    assert height % multiple == width % multiple == 0
    assert height >= multiple
    assert width >= multiple
    if min(height, width) > multiple:
        assert height * width <= area
    # One step more on either side would exceed the size that has the area and the aspect.
    aspect = Fraction(reference_width, reference_height)
    assert (height + multiple) ** 2 * aspect > area
    assert (width + multiple) ** 2 / aspect > area


@given(st.integers(1, 80), st.integers(1, 80), st.sampled_from([8, 16]))
def test_a_size_that_fits_is_kept(rows: int, columns: int, multiple: int) -> None:
    height, width = rows * multiple, columns * multiple
    assert fit_size(height, width, height * width, multiple) == (height, width)
