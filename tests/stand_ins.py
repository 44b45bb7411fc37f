"""A worker that does nothing, behind commands of the program."""

import sys
from types import ModuleType
from typing import Any

import pytest

from everanimate_cli.events import Event, OnEvent


class Worker:
    """Stands in for what a command calls: notes its settings, reports, returns or raises."""

    def __init__(self, result: Any, *events: Event) -> None:
        self.calls: list[Any] = []
        self.error: BaseException | None = None
        self.result = result
        self._events = events

    def __call__(self, settings: Any, on_event: OnEvent, processes: None = None) -> Any:
        assert processes is None  # no launcher started this one
        self.calls.append(settings)
        if self.result is not None:  # as in processes that do not report
            for event in self._events:
                on_event(event)
        if self.error is not None:
            raise self.error
        return self.result

    def put_behind(self, monkeypatch: pytest.MonkeyPatch, module: str, function: str) -> None:
        """Be the function of a module, which is not loaded."""
        stand_in = ModuleType(f"everanimate_cli.{module}")
        setattr(stand_in, function, self)
        monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
