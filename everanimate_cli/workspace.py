"""Open a folder of unfinished work, or refuse one that belongs to another request.

What lies in such a folder is described in `runs`.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from everanimate_cli.atomic_files import write_json
from everanimate_cli.errors import EverAnimateError, InputError, RunError, SettingsError
from everanimate_cli.preflight import output_exists
from everanimate_cli.records import option_name
from everanimate_cli.runs import WorkFolder

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_HASH = " sha256"
_Work = TypeVar("_Work", bound=WorkFolder)


@contextmanager
def open_work(
    work: _Work, request: Mapping[str, object], *, resume: bool, overwrite: bool
) -> Iterator[_Work]:
    """Hold the folder of a piece of work; only one process can.

    Args:
        work: The folder, which need not exist.
        request: All that shapes the result, JSON values; a folder made for another request is
            refused.
        resume: Continue what is there; False removes it first.
        overwrite: Whether a result that no such folder belongs to may be replaced.

    Yields:
        The folder, new or with what is finished.

    Raises:
        InputError: If another process is at work on the same result, or has just finished it.
        SettingsError: If the folder belongs to another request; the message names each difference.
        RunError: If the folder is damaged.
        OSError: If the disk is full.
    """
    with work.hold() as is_ours:
        if not is_ours:
            raise InputError(
                f"--output {work.output} is being made by another process. "
                "Wait for it, or give another --output."
            )
        if not resume:
            work.clear()
        is_new = not work.request_path.exists()
        if not is_new:
            _compare(work.output, _read_request(work), request)
            work.clear_temporaries()
        else:
            work.clear()
            if work.has_result() and not overwrite:
                work.remove()
                raise output_exists(work.output)
            write_json(work.request_path, request)
        try:
            yield work
        except EverAnimateError as error:
            # What is refused leaves nothing behind, however late it is found.
            if is_new and error.exit_code != RunError.exit_code and not work.count_finished():
                work.remove()
            raise


def _read_request(work: WorkFolder) -> dict[str, object]:
    path = work.request_path
    try:
        request = json.loads(path.read_text(encoding="utf-8"))
        return dict(request.items())
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"{path} is damaged ({error}). Start again with --no-resume.") from error


def _compare(output: Path, before: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Refuse to continue what was begun differently."""
    differences = list_differences(before, now)
    if differences:
        raise SettingsError(
            f"--output {output} has a run folder of another request: {'; '.join(differences)}. "
            "Give the same options to continue it, another --output, or --no-resume to start again."
        )


def list_differences(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Each difference of two requests in words."""
    return [
        _difference(key, before.get(key), now.get(key))
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]


def _difference(key: str, before: object, now: object) -> str:
    """One of them in words; only what is named as a settings field is an option."""
    name = key.removesuffix(_HASH)
    if name != key:
        if before is not None and now is not None:
            return f"{name} has another content"
        before, now = (value and "given" for value in (before, now))
    label = option_name(name) if name.isidentifier() and name.islower() else name
    return f"{label} was {_in_words(before)}, is {_in_words(now)}"


def _in_words(value: object) -> str:
    if value is None:
        return "not given"
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
