"""Processes for tests that talk to each other, on this machine alone.

They are forked from a server that has imported everything heavy once, so that each starts at once.
"""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from studio import Outcome
from torch.distributed import TCPStore

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["everanimate_cli.animate", "everanimate_cli.cli"])


def run_ranks(count: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `work(*args)` in processes that torchrun seems to have started.

    Args:
        count: How many.
        work: Of a module that can be imported by its name.
        args: Of the call; picklable, as its result.

    Returns:
        The result of each.
    """
    store = _open_store()
    pipes, processes = [], []
    for environ in _environs(count, store.port):
        ours, theirs = _context.Pipe()
        process = _context.Process(target=_call, args=(theirs, environ, work, args))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    results = []
    for pipe, process in zip(pipes, processes, strict=True):
        is_done, result = pipe.recv()
        process.join()
        assert is_done, result
        results.append(result)
    return results


def run_programs(count: int, work: Callable[..., int], folder: Path, *args: Any) -> list[Outcome]:
    """Run programs that may end at any moment in processes that torchrun seems to have started.

    Args:
        count: How many.
        work: `work(*args)` gives the exit code; of a module that can be imported by its name.
        folder: Current one of the processes; gets what they say.
        args: Of the call; picklable.

    Returns:
        Exit code and output of each.
    """
    store = _open_store()
    environs = _environs(count, store.port)
    processes = [
        _context.Process(target=_run, args=(folder, environ, work, args)) for environ in environs
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=100)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    said = [
        [(folder / f"rank-{rank}.{stream}").read_text() for stream in ("out", "err")]
        for rank in range(count)
    ]
    assert None not in codes, said
    return [Outcome(code or 0, *texts) for code, texts in zip(codes, said, strict=True)]


def _open_store() -> TCPStore:
    """The launcher's, which outlives the processes."""
    return TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


def _environs(count: int, port: int) -> list[dict[str, str]]:
    shared = {
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": 1,
    }
    environs = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
    return [{name: str(value) for name, value in environ.items()} for environ in environs]


def _call(
    pipe: Connection, environ: dict[str, str], work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(environ)
    try:
        pipe.send((True, work(*args)))
    except BaseException:  # shown by the test
        pipe.send((False, traceback.format_exc()))


def _run(
    folder: Path, environ: dict[str, str], work: Callable[..., int], args: tuple[Any, ...]
) -> None:
    os.environ.update(environ)
    os.chdir(folder)
    # What is said below Python counts too.
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        with Path(f"rank-{environ['RANK']}.{name}").open("wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    sys.exit(work(*args))
