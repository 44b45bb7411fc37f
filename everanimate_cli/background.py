"""One job at a time beside the work of the main thread, in order, with nothing lost."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Generic, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

T = TypeVar("T")


class Background(Generic[T]):
    """A thread with room for one job, whose result is taken before the next job is started.

    Whatever happens in the main thread, Ctrl-C included, `with` is not left before the job is done,
    so that no file is written after that.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        """Start no thread yet.

        Args:
            enabled: False does each job at once where it is started; all else is the same.
        """
        self._enabled = enabled
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._job: Future[T] | None = None

    def __enter__(self) -> Self:
        """The thread is started by the first job."""
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for the job; its error is raised unless another one is on its way."""
        self._pool.shutdown(wait=True)
        if exc is None and self._job is not None:
            self._job.result()

    def start(self, work: Callable[[], T]) -> None:
        """Begin a job.

        Raises:
            ValueError: If the result of the one before was not taken.
        """
        if self._job is not None:
            raise ValueError("the result of the job before was not taken")
        if self._enabled:
            self._job = self._pool.submit(work)
            return
        self._job = Future()
        self._job.set_result(work())

    @property
    def is_done(self) -> bool:
        """Whether there is a result that `take` gives without waiting."""
        return self._job is not None and self._job.done()

    @property
    def is_busy(self) -> bool:
        """Whether there is a job whose result was not taken."""
        return self._job is not None

    def take(self) -> T:
        """The result of the job, or its error, as soon as it is there.

        Raises:
            ValueError: If there is no job.
        """
        if self._job is None:
            raise ValueError("no job was started")
        job, self._job = self._job, None
        return job.result()
