"""Laws of the chunk plan, for every length, chunk size and overlap."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from everanimate_cli.chunks import ChunkPlan, driving_index, driving_indices


@st.composite
def plans(draw: st.DrawFn) -> ChunkPlan:
    frames_per_chunk = 4 * draw(st.integers(1, 25)) + 1
    return ChunkPlan(
        num_frames=draw(st.integers(1, 1000)),
        frames_per_chunk=frames_per_chunk,
        overlap=draw(st.integers(1, frames_per_chunk - 1)),
    )


driving_lengths = st.integers(1, 200)
extensions = st.sampled_from(["pingpong", "loop", "hold"])


@given(plan=plans())
def test_every_output_frame_is_made_exactly_once_and_in_order(plan: ChunkPlan) -> None:
    made = [
        plan.first_frame(chunk_index) + frame
        for chunk_index in range(plan.num_chunks)
        for frame in plan.kept_frames(chunk_index)
    ]
    assert made == list(range(plan.num_frames))


@given(plan=plans())
def test_no_chunk_is_in_vain(plan: ChunkPlan) -> None:
    assert all(len(plan.kept_frames(index)) > 0 for index in range(plan.num_chunks))


@given(plan=plans(), num_driving_frames=driving_lengths, extend=extensions)
def test_neighbouring_chunks_agree_on_the_frames_they_share(
    plan: ChunkPlan, num_driving_frames: int, extend: str
) -> None:
    first, second = (driving_indices(plan, k, num_driving_frames, extend) for k in (0, 1))
    assert len(first) == len(second) == plan.frames_per_chunk
    assert first[plan.stride :] == second[: plan.overlap]


@given(
    plan=plans(), num_driving_frames=driving_lengths, extend=extensions, more=st.integers(0, 1000)
)
def test_a_longer_output_changes_no_driving_frame(
    plan: ChunkPlan, num_driving_frames: int, extend: str, more: int
) -> None:
    longer = replace(plan, num_frames=plan.num_frames + more)
    for chunk_index in (0, plan.num_chunks - 1):
        before = driving_indices(plan, chunk_index, num_driving_frames, extend)
        assert driving_indices(longer, chunk_index, num_driving_frames, extend) == before


@given(output_index=st.integers(0, 2000), num_driving_frames=st.integers(2, 200))
def test_pingpong_always_moves_by_one(output_index: int, num_driving_frames: int) -> None:
    here, there = (driving_index(output_index + step, num_driving_frames) for step in (0, 1))
    assert abs(here - there) == 1


@given(output_index=st.integers(0, 2000), num_driving_frames=driving_lengths, extend=extensions)
def test_the_driving_is_followed_while_it_lasts_and_never_left(
    output_index: int, num_driving_frames: int, extend: str
) -> None:
    index = driving_index(output_index, num_driving_frames, extend)
    assert 0 <= index < num_driving_frames
    if output_index < num_driving_frames:
        assert index == output_index
