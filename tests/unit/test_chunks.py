"""The cut of the output into chunks, with the released numbers: 77 frames, overlap 4."""

import pytest

from everanimate_cli.chunks import ChunkPlan, driving_index, driving_indices
from everanimate_cli.errors import SettingsError


def released_plan(num_frames: int) -> ChunkPlan:
    return ChunkPlan(num_frames=num_frames, frames_per_chunk=77, overlap=4)


@pytest.mark.parametrize(
    ("num_frames", "num_chunks"), [(1, 1), (77, 1), (78, 2), (150, 2), (151, 3), (223, 3)]
)
def test_number_of_chunks(num_frames: int, num_chunks: int) -> None:
    assert released_plan(num_frames).num_chunks == num_chunks


def test_chunks_start_one_stride_apart() -> None:
    plan = released_plan(200)
    assert plan.stride == 73
    assert [plan.first_frame(index) for index in range(3)] == [0, 73, 146]


def test_kept_frames_drop_the_overlap_and_the_surplus() -> None:
    plan = released_plan(200)
    assert plan.kept_frames(0) == range(77)
    assert plan.kept_frames(1) == range(4, 77)
    assert plan.kept_frames(2) == range(4, 54)  # output frames 150 .. 199
    assert released_plan(5).kept_frames(0) == range(5)


@pytest.mark.parametrize(
    ("extend", "expected"),
    [
        ("pingpong", [0, 1, 2, 1, 0, 1, 2, 1, 0]),
        ("error", [0, 1, 2, 1, 0, 1, 2, 1, 0]),
        ("loop", [0, 1, 2, 0, 1, 2, 0, 1, 2]),
        ("hold", [0, 1, 2, 2, 2, 2, 2, 2, 2]),
    ],
)
def test_three_driving_frames_extended(extend: str, expected: list[int]) -> None:
    assert [driving_index(index, 3, extend) for index in range(9)] == expected


@pytest.mark.parametrize("extend", ["pingpong", "loop", "hold"])
def test_one_driving_frame_serves_all(extend: str) -> None:
    assert [driving_index(index, 1, extend) for index in range(4)] == [0, 0, 0, 0]


def test_chunk_reads_driving_frames_past_the_end_of_the_output() -> None:
    plan = ChunkPlan(num_frames=6, frames_per_chunk=5, overlap=1)
    assert driving_indices(plan, 0, 6) == [0, 1, 2, 3, 4]
    assert driving_indices(plan, 1, 6) == [4, 5, 4, 3, 2]
    assert driving_indices(plan, 1, 6, "loop") == [4, 5, 0, 1, 2]
    assert driving_indices(plan, 1, 6, "error") == [4, 5, 4, 3, 2]


def test_error_refuses_an_output_longer_than_the_driving() -> None:
    plan = ChunkPlan(num_frames=6, frames_per_chunk=5, overlap=1)
    with pytest.raises(SettingsError) as caught:
        driving_indices(plan, 0, 5, "error")
    assert str(caught.value) == (
        "--extend error: 6 output frames need as many driving frames, found 5. Ask for a shorter "
        "video, or give --extend pingpong, loop or hold."
    )


@pytest.mark.parametrize(
    ("num_frames", "frames_per_chunk", "overlap", "message"),
    [
        (0, 77, 4, "A video of 0 frames. Ask for at least 1."),
        (9, 76, 4, "--frames-per-chunk 76 is not 4n+1, at least 5. Give 73 or 77."),
        (9, 1, 1, "--frames-per-chunk 1 is not 4n+1, at least 5. Give 5 or 9."),
        (9, 5, 0, "--overlap 0 does not fit --frames-per-chunk 5. Give 1 to 4."),
        (9, 5, 5, "--overlap 5 does not fit --frames-per-chunk 5. Give 1 to 4."),
    ],
)
def test_impossible_plans_are_refused(
    num_frames: int, frames_per_chunk: int, overlap: int, message: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        ChunkPlan(num_frames=num_frames, frames_per_chunk=frames_per_chunk, overlap=overlap)
    assert str(caught.value) == message
