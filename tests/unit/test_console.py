"""The console: plain lines without a terminal, two bars on one, nothing when quiet."""

import io

import pytest
from rich.console import Console

from everanimate_cli.console import Tally, show_progress
from everanimate_cli.events import ChunkDone, ChunkStarted, Event, Note, StepDone, TrainStep


def run_of_two_chunks(first: int = 0) -> list[Event]:
    events: list[Event] = [Note(text="tiled [vae] decoding")]
    for chunk_index in range(first, first + 2):
        events += [
            ChunkStarted(chunk_index=chunk_index, num_chunks=4, num_steps=2),
            StepDone(step_index=0),
            StepDone(step_index=1),
            ChunkDone(chunk_index=chunk_index, num_frames=20, seconds=40.0, peak_memory_mib=512.4),
        ]
    return events


def shown(events: list[Event], *, terminal: bool, quiet: bool = False, width: int = 100) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=width, color_system=None)
    with show_progress(quiet=quiet, console=console) as on_event:
        for event in events:
            on_event(event)
    return stream.getvalue()


def test_without_a_terminal_each_chunk_is_one_plain_line() -> None:
    assert shown(run_of_two_chunks(), terminal=False) == (
        "tiled [vae] decoding\n"
        "chunk 1/4: 20 frames in 40.0 s, 0.5 frames/s, peak 512 MiB, 2:00 left\n"
        "chunk 2/4: 20 frames in 40.0 s, 0.5 frames/s, peak 512 MiB, 1:20 left\n"
    )


def test_one_frame_is_no_plural() -> None:
    chunk = ChunkDone(chunk_index=0, num_frames=1, seconds=2.0)
    assert Tally(num_chunks=1).chunk_line(chunk) == "chunk 1/1: 1 frame in 2.0 s"


def test_short_chunks_do_not_fill_a_log() -> None:
    events: list[Event] = []
    for chunk_index in range(100):
        events += [
            ChunkStarted(chunk_index=chunk_index, num_chunks=100, num_steps=2),
            ChunkDone(chunk_index=chunk_index, num_frames=5, seconds=0.5),
        ]
    lines = shown(events, terminal=False).splitlines()
    # One in ten seconds of work, and the last one.
    assert [line.partition("/")[0] for line in lines] == [
        "chunk 1",
        "chunk 21",
        "chunk 41",
        "chunk 61",
        "chunk 81",
        "chunk 100",
    ]
    assert lines[1] == "chunk 21/100: 5 frames in 0.5 s, 10.0 frames/s, 0:40 left"


def test_a_resumed_run_counts_only_its_own_chunks() -> None:
    lines = shown(run_of_two_chunks(first=2), terminal=False).splitlines()
    assert lines[1:] == [
        "chunk 3/4: 20 frames in 40.0 s, 0.5 frames/s, peak 512 MiB, 0:40 left",
        "chunk 4/4: 20 frames in 40.0 s, 0.5 frames/s, peak 512 MiB",
    ]


def test_long_lines_stay_whole_in_a_log() -> None:
    text = "word " * 60
    assert shown([Note(text=text)], terminal=False) == text + "\n"


def test_unknown_memory_and_immeasurable_time_are_left_out() -> None:
    tally = Tally(num_chunks=1)
    chunk = ChunkDone(chunk_index=0, num_frames=3, seconds=0.0)
    tally.add(chunk)
    assert tally.chunk_line(chunk) == "chunk 1/1: 3 frames in 0.0 s"


def test_hours_are_shown_as_hours() -> None:
    tally = Tally(num_chunks=101)
    chunk = ChunkDone(chunk_index=0, num_frames=73, seconds=73.0)
    tally.add(chunk)
    assert tally.chunk_line(chunk).endswith("1.0 frames/s, 2:01:40 left")


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_shows_nothing(terminal: bool) -> None:
    assert shown(run_of_two_chunks(), terminal=terminal, quiet=True) == ""


def test_a_process_without_events_leaves_the_terminal_alone() -> None:
    """Bars that showed nothing wiped the line of the process that had something to show."""
    assert shown([], terminal=True) == ""


def test_a_terminal_shows_a_bar_over_chunks_and_one_over_steps() -> None:
    last = shown(run_of_two_chunks(), terminal=True).rpartition("chunks")[2]
    chunks_bar, steps_bar = last.splitlines()[:2]
    assert "2/4" in chunks_bar
    assert "0.5 frames/s, peak 512 MiB" in chunks_bar
    assert "2/2" in steps_bar
    assert "steps" in steps_bar


def test_a_narrow_terminal_keeps_the_counts_and_drops_the_speed() -> None:
    last = shown(run_of_two_chunks(), terminal=True, width=40).rpartition("chunks")[2]
    chunks_bar, steps_bar = last.splitlines()[:2]
    assert "2/4" in chunks_bar
    assert "2/2" in steps_bar
    assert "frames/s" not in last
    assert "…" not in last


def test_notes_stand_above_the_bars_as_they_are_written() -> None:
    assert "tiled [vae] decoding\n" in shown(run_of_two_chunks(), terminal=True)


def test_the_chunk_bar_of_a_resumed_run_starts_where_the_last_one_stopped() -> None:
    started = ChunkStarted(chunk_index=2, num_chunks=4, num_steps=2)
    assert "2/4" in shown([started], terminal=True)


def training(
    num_steps: int, seconds: float, *, first: int = 1, peak_memory_mib: float | None = 700.4
) -> list[Event]:
    """Steps `first` to `num_steps`, whose losses fall from 0.5 by a thousandth."""
    return [
        TrainStep(
            step=step,
            num_steps=num_steps,
            loss=0.5 - step / 1000,
            learning_rate=1e-4,
            seconds=seconds,
            peak_memory_mib=peak_memory_mib,
        )
        for step in range(first, num_steps + 1)
    ]


def test_without_a_terminal_a_training_tells_of_itself_every_ten_seconds() -> None:
    assert shown(training(60, 0.5), terminal=False) == (
        "step 1/60: loss 0.4990, 2.0 steps/s, peak 700 MiB, 0:30 left\n"
        "step 21/60: loss 0.4890, 2.0 steps/s, peak 700 MiB, 0:20 left\n"
        "step 41/60: loss 0.4790, 2.0 steps/s, peak 700 MiB, 0:10 left\n"
        "step 60/60: loss 0.4695, 2.0 steps/s, peak 700 MiB\n"
    )


def test_a_slow_training_is_told_in_seconds_per_step() -> None:
    assert shown(training(3, 12.0, peak_memory_mib=None), terminal=False) == (
        "step 1/3: loss 0.4990, 12.0 s/step, 0:24 left\n"
        "step 2/3: loss 0.4985, 12.0 s/step, 0:12 left\n"
        "step 3/3: loss 0.4980, 12.0 s/step\n"
    )


def test_the_loss_is_the_mean_of_the_last_hundred_steps() -> None:
    last = shown(training(300, 0.01), terminal=False).splitlines()[-1]
    # Of steps 201 to 300.
    assert last == "step 300/300: loss 0.2495, 100.0 steps/s, peak 700 MiB"


def test_a_resumed_training_counts_only_its_own_steps() -> None:
    first = shown(training(30, 2.0, first=21), terminal=False).splitlines()[0]
    assert first == "step 21/30: loss 0.4790, 2.0 s/step, peak 700 MiB, 0:18 left"


def test_a_step_of_no_time_has_no_speed() -> None:
    assert shown(training(1, 0.0, peak_memory_mib=None), terminal=False) == (
        "step 1/1: loss 0.4990\n"
    )


def test_a_terminal_shows_a_bar_over_the_steps_of_a_training() -> None:
    last = shown(training(40, 0.5, first=21), terminal=True).rpartition("training")[2]
    assert "40/40" in last
    assert "loss 0.4695, 2.0 steps/s, peak 700 MiB" in last


def test_the_bar_of_a_resumed_training_starts_where_the_last_one_stopped() -> None:
    page = shown(training(40, 0.5, first=21)[:1], terminal=True)
    assert "21/40" in page


def test_quiet_shows_no_training() -> None:
    assert shown(training(3, 1.0), terminal=True, quiet=True) == ""
