"""One job beside the main thread: order, errors, and nothing left behind."""

import threading
from functools import partial

import pytest

from everanimate_cli.background import Background


def test_a_job_runs_in_another_thread_and_its_result_is_taken() -> None:
    with Background[int]() as background:
        assert not background.is_busy
        background.start(threading.get_ident)
        assert background.is_busy
        assert background.take() != threading.get_ident()
        assert not background.is_busy


def test_without_a_thread_the_job_is_done_at_once() -> None:
    with Background[int](enabled=False) as background:
        background.start(threading.get_ident)
        assert background.is_done
        assert background.take() == threading.get_ident()


def test_the_main_thread_goes_on_while_a_job_waits() -> None:
    event = threading.Event()
    with Background[bool]() as background:
        background.start(partial(event.wait, 20))
        assert not background.is_done
        event.set()  # which the job waits for
        assert background.take()


def test_a_second_job_before_the_result_of_the_first_is_a_bug() -> None:
    with Background[int]() as background:
        with pytest.raises(ValueError, match="no job"):
            background.take()
        background.start(lambda: 1)
        with pytest.raises(ValueError, match="not taken"):
            background.start(lambda: 2)
        assert background.take() == 1


def fail() -> None:
    raise OSError("disk full")


@pytest.mark.parametrize("enabled", [True, False])
def test_an_error_of_the_job_surfaces(enabled: bool) -> None:
    def work() -> None:
        with Background[None](enabled=enabled) as background:
            background.start(fail)
            background.take()
            pytest.fail("the error was lost")

    with pytest.raises(OSError, match="disk full"):
        work()


def test_an_error_nobody_took_surfaces_at_the_end() -> None:
    with pytest.raises(OSError, match="disk full"), Background[None]() as background:
        background.start(fail)


def test_ctrl_c_waits_for_the_job_and_wins_over_its_error() -> None:
    begun, finished = threading.Event(), threading.Event()

    def work() -> None:
        begun.wait(20)
        finished.set()
        fail()

    def interrupt() -> None:
        with Background[None]() as background:
            background.start(work)
            begun.set()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert finished.is_set()
