"""The console: plain lines without a terminal, two bars on one, nothing when quiet."""

import io

import pytest
from rich.console import Console

from everanimate_cli.console import Tally, show_progress
from everanimate_cli.events import ChunkDone, ChunkStarted, Event, Note, StepDone


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


def shown(events: list[Event], *, terminal: bool, quiet: bool = False) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100, color_system=None)
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


def test_a_terminal_shows_a_bar_over_chunks_and_one_over_steps() -> None:
    last = shown(run_of_two_chunks(), terminal=True).rpartition("chunks")[2]
    chunks_bar, steps_bar = last.splitlines()[:2]
    assert "2/4" in chunks_bar
    assert "0.5 frames/s, peak 512 MiB" in chunks_bar
    assert "2/2" in steps_bar
    assert "steps" in steps_bar


def test_notes_stand_above_the_bars_as_they_are_written() -> None:
    assert "tiled [vae] decoding\n" in shown(run_of_two_chunks(), terminal=True)


def test_the_chunk_bar_of_a_resumed_run_starts_where_the_last_one_stopped() -> None:
    started = ChunkStarted(chunk_index=2, num_chunks=4, num_steps=2)
    assert "2/4" in shown([started], terminal=True)
