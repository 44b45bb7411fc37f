"""The console on stderr: bars over phases, chunks and steps on a terminal, else plain lines."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from everanimate_cli.events import (
    ChunkDone,
    ChunkStarted,
    Event,
    Note,
    OnEvent,
    PhaseAdvanced,
    PhaseStarted,
    StepDone,
    TrainStep,
)
from everanimate_cli.records import counted

# Short chunks and steps would fill a log with their lines, so that one is printed this often at
# most, and for the first and the last of them.
_LINE_PERIOD_S = 10.0
# Speed and memory take a third of a usual terminal; on a narrower one the counts matter more.
_ROOM_FOR_SPEED = 60
_SHORT_BAR = 8
# The loss of one step depends most on the noise levels that it drew.
_LOSS_WINDOW = 100


@dataclass
class Tally:
    """What this run has made so far, as text; chunks of an earlier run do not count."""

    num_chunks: int = 0
    chunks_made: int = 0
    frames_made: int = 0
    seconds: float = 0.0
    peak_memory_mib: float | None = None

    def add(self, chunk: ChunkDone) -> None:
        """Count a finished chunk."""
        self.chunks_made += 1
        self.frames_made += chunk.num_frames
        self.seconds += chunk.seconds
        self.peak_memory_mib = chunk.peak_memory_mib

    def speed(self) -> str:
        """Frames of video per second of work, and peak memory where it is known."""
        parts = [f"{self.frames_made / self.seconds:.1f} frames/s"] if self.seconds > 0 else []
        if self.peak_memory_mib is not None:
            parts.append(f"peak {self.peak_memory_mib:.0f} MiB")
        return ", ".join(parts)

    def chunk_line(self, chunk: ChunkDone) -> str:
        """One line about the chunk just finished and the time that the rest will take."""
        parts = [
            f"chunk {chunk.chunk_index + 1}/{self.num_chunks}: "
            f"{counted(chunk.num_frames, 'frame')} in {chunk.seconds:.1f} s",
            self.speed(),
        ]
        chunks_left = self.num_chunks - chunk.chunk_index - 1
        if chunks_left > 0:
            parts.append(f"{_clock(chunks_left * self.seconds / self.chunks_made)} left")
        return ", ".join(part for part in parts if part)


@dataclass
class PhaseTally:
    """How fast a phase goes; what an earlier run has done does not count."""

    phase: PhaseStarted
    started_s: float
    done: int = 0

    def advance(self, done: int) -> None:
        """Take note of how many are done."""
        self.done = done

    def speed(self) -> str:
        """Such as "25.0 frames/s"; empty as long as nothing is known."""
        rate = self._rate()
        return f"{rate:.1f} {self.phase.unit}/s" if rate else ""

    def line(self) -> str:
        """One line: how many are done, how fast, and the time that the rest will take."""
        parts = [f"{self.phase.name}: {self.done}/{self.phase.total} {self.phase.unit}"]
        rate = self._rate()
        if rate:
            parts.append(self.speed())
            if self.done < self.phase.total:
                parts.append(f"{_clock((self.phase.total - self.done) / rate)} left")
        return ", ".join(parts)

    def _rate(self) -> float:
        seconds = time.monotonic() - self.started_s
        return max(0, self.done - self.phase.done) / seconds if seconds > 0 else 0.0


@dataclass
class TrainTally:
    """What this run has trained so far, as text; steps of an earlier run do not count."""

    steps_made: int = 0
    seconds: float = 0.0
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=_LOSS_WINDOW))

    def add(self, step: TrainStep) -> None:
        """Count a step."""
        self.steps_made += 1
        self.seconds += step.seconds
        self.losses.append(step.loss)

    def state(self, step: TrainStep) -> str:
        """Mean of the last losses, speed, and peak memory where it is known."""
        parts = [f"loss {sum(self.losses) / len(self.losses):.4f}"]
        if self.seconds > 0:
            rate = self.steps_made / self.seconds
            parts.append(f"{rate:.1f} steps/s" if rate >= 1 else f"{1 / rate:.1f} s/step")
        if step.peak_memory_mib is not None:
            parts.append(f"peak {step.peak_memory_mib:.0f} MiB")
        return ", ".join(parts)

    def line(self, step: TrainStep) -> str:
        """One line about the training after a step, and the time that the rest will take."""
        line = f"step {step.step}/{step.num_steps}: {self.state(step)}"
        steps_left = step.num_steps - step.step
        if steps_left <= 0 or self.seconds <= 0:
            return line
        return f"{line}, {_clock(steps_left * self.seconds / self.steps_made)} left"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def show_progress(*, quiet: bool = False, console: Console | None = None) -> Iterator[OnEvent]:
    """Give a worker something to report to, for as long as it works.

    Args:
        quiet: Show nothing.
        console: Where to write; None for stderr.
    """
    console = console or Console(stderr=True)
    if quiet:
        yield _ignore
    elif not console.is_terminal:
        yield LineReporter(console)
    else:
        is_wide = console.width >= _ROOM_FOR_SPEED
        speed = [TextColumn("{task.fields[speed]}")] if is_wide else []
        bars = Progress(
            TextColumn("{task.description}"),
            BarColumn() if is_wide else BarColumn(_SHORT_BAR),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            *speed,
            console=console,
            # Chunks can take minutes: the default of 30 s would forget all speed between them.
            speed_estimate_period=3600.0,
        )
        try:
            yield BarReporter(bars)
        finally:
            if bars.live.is_started:
                bars.stop()


def _ignore(_event: Event) -> None:
    """Take an event and show nothing."""


@dataclass
class _Pace:
    """Lets a line pass every ten seconds, on any clock, and the last one."""

    next_s: float = 0.0

    def is_due(self, now_s: float, *, is_last: bool) -> bool:
        if now_s < self.next_s and not is_last:
            return False
        self.next_s = now_s + _LINE_PERIOD_S
        return True


class LineReporter:
    """Prints events as plain lines, not more than a log can bear."""

    def __init__(self, console: Console) -> None:
        """Take the console to print on."""
        self._console = console
        self._phase: PhaseTally | None = None
        self._phase_pace = _Pace()
        self._chunks, self._chunk_pace = Tally(), _Pace()
        self._training, self._training_pace = TrainTally(), _Pace()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Note):
            _print_line(self._console, event.text)
        elif isinstance(event, PhaseStarted):
            self._phase = PhaseTally(event, time.monotonic(), event.done)
            self._phase_pace = _Pace(self._phase.started_s + _LINE_PERIOD_S)
        elif isinstance(event, PhaseAdvanced):
            self._advance(event.done)
        elif isinstance(event, ChunkStarted):
            self._chunks.num_chunks = event.num_chunks
        elif isinstance(event, ChunkDone):
            self._chunks.add(event)
            is_last = event.chunk_index + 1 == self._chunks.num_chunks
            if self._chunk_pace.is_due(self._chunks.seconds, is_last=is_last):
                _print_line(self._console, self._chunks.chunk_line(event))
        elif isinstance(event, TrainStep):
            self._training.add(event)
            is_last = event.step == event.num_steps
            if self._training_pace.is_due(self._training.seconds, is_last=is_last):
                _print_line(self._console, self._training.line(event))

    def _advance(self, done: int) -> None:
        if self._phase is None:
            return
        self._phase.advance(done)
        if self._phase_pace.is_due(time.monotonic(), is_last=done == self._phase.phase.total):
            _print_line(self._console, self._phase.line())


def _print_line(console: Console, text: str) -> None:
    # Text keeps brackets in paths from being read as markup; soft_wrap keeps a line whole in a log.
    console.print(Text(text), soft_wrap=True, highlight=False)


class BarReporter:
    """Draws events as bars: over chunks and the steps of the current one, a phase, a training."""

    def __init__(self, bars: Progress) -> None:
        """Take bars that are not started; tasks appear with the first event that needs them."""
        self._bars = bars
        self._tally = Tally()
        self._started: ChunkStarted | None = None
        self._chunks: TaskID | None = None
        self._steps: TaskID | None = None
        self._phase: tuple[PhaseTally, TaskID] | None = None
        self._training: tuple[TrainTally, TaskID] | None = None

    def __call__(self, event: Event) -> None:
        """Show one event."""
        # Not before: of several processes only one has events, and idle bars of the others would
        # wipe its line again and again.
        self._bars.start()
        if isinstance(event, Note):
            _print_line(self._bars.console, event.text)
        elif isinstance(event, ChunkStarted):
            self._start(event)
        elif isinstance(event, StepDone):
            self._step(event.step_index + 1)
        elif isinstance(event, PhaseStarted):
            tally = PhaseTally(event, time.monotonic(), event.done)
            task = self._bars.add_task(
                event.name, total=event.total, completed=event.done, speed=""
            )
            self._phase = tally, task
        elif isinstance(event, PhaseAdvanced):
            if self._phase is not None:
                tally, task = self._phase
                tally.advance(event.done)
                self._bars.update(task, completed=event.done, speed=tally.speed())
        elif isinstance(event, TrainStep):
            self._train(event)
        elif self._chunks is not None:
            self._tally.add(event)
            self._bars.update(self._chunks, speed=self._tally.speed())
            # The next chunk may be under way, and its steps have moved the bar further.
            if self._started is None or self._started.chunk_index <= event.chunk_index:
                self._bars.update(self._chunks, completed=event.chunk_index + 1)

    def _train(self, step: TrainStep) -> None:
        if self._training is None:
            # A resumed training starts its bar where the earlier one stopped, which is no speed.
            task = self._bars.add_task(
                "training", total=step.num_steps, completed=step.step - 1, speed=""
            )
            self._training = TrainTally(), task
        tally, task = self._training
        tally.add(step)
        self._bars.update(task, completed=step.step, speed=tally.state(step))

    def _step(self, steps_done: int) -> None:
        if self._started is None or self._chunks is None or self._steps is None:
            return
        self._bars.update(self._steps, completed=steps_done)
        # The chunk bar creeps along, so that a time left is known before the first chunk is done;
        # encoding and decoding count as one more step until a whole chunk has been measured.
        share = steps_done / (self._started.num_steps + 1)
        self._bars.update(self._chunks, completed=self._started.chunk_index + share)

    def _start(self, event: ChunkStarted) -> None:
        self._started = event
        if self._chunks is None or self._steps is None:
            # A resumed run starts its bar where the earlier one stopped, which is no speed.
            self._chunks = self._bars.add_task(
                "chunks", total=event.num_chunks, completed=event.chunk_index, speed=""
            )
            self._steps = self._bars.add_task("steps", total=event.num_steps, speed="")
        else:
            self._bars.reset(self._steps, total=event.num_steps)
