"""The processes that animate one video together: how they meet, talk and stop.

The main process does all that a single one would. The others, its partners, compute what it asks
for and do nothing else: they read no input, write no file and print nothing. Messages go from one
process to all, in the same order everywhere.

Who fails leaves word in the launcher's store, which a thread in every process looks at: a process
that waits for another one in the middle of a computation does not come back by itself.
"""

from __future__ import annotations

import io
import json
import pickle
import signal
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from everanimate_cli.errors import EverAnimateError, RunError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from everanimate_cli.launch import Launch

    # Told the message and the exit code of a failure elsewhere; None: the main process is gone.
    # Must end this process, since its main thread may never come back.
    Leave = Callable[["Failure | None"], None]

# The main process may download a checkpoint before the others have anything to do.
_LONGEST_WAIT = timedelta(days=30)
_PERIOD_S = 0.2  # of looking at the store
# What a process says of a connection that broke may come before the word of who broke it.
_WORD_TIMEOUT_S = 5.0
_CPU = torch.device("cpu")

_STARTED, _STOPPED, _FAILED = "started", "stopped", "failed"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a process stopped, as the main one tells it.

    Attributes:
        message: One line.
        exit_code: Of the main process.
        is_shortage: Whether memory ran out.
    """

    message: str
    exit_code: int
    is_shortage: bool = False


class Processes:
    """This process among the others; made by `open_processes`.

    Attributes:
        launch: Who this process is.
        describe_shortage: Says in the main process what to do where memory runs out, also in
            another one; None as long as nothing is loaded.
        forget: Removes in the main process what a refusal must not leave behind; likewise.
    """

    def __init__(self, launch: Launch, leave: Leave) -> None:
        """Talk to nobody yet."""
        self.launch = launch
        self.describe_shortage: Callable[[], str] | None = None
        self.forget: Callable[[], None] | None = None
        self._leave = leave
        self._store: Store | None = None
        self._is_over = threading.Event()

    @property
    def count(self) -> int:
        """How many there are."""
        return self.launch.count

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.launch.is_main

    def local_device(self, device: torch.device) -> torch.device:
        """Where this process computes: each on a card of its own.

        Args:
            device: Kind of device.

        Raises:
            SettingsError: If processes cannot share work there, or there are too few cards.
        """
        if device.type == "mps":
            raise SettingsError(
                "--device mps cannot be shared by processes. Give --device cpu, or start one."
            )
        if device.type != "cuda":
            return device
        num_cards = torch.cuda.device_count()
        if num_cards < self.launch.local_count:
            raise SettingsError(
                f"{self.launch.local_count} processes were started on a machine with {num_cards} "
                f"CUDA device{'s' if num_cards > 1 else ''}. Start one for each."
            )
        return torch.device("cuda", self.launch.local_rank)

    def join(self, device_type: str | None = None) -> str:
        """Meet the others; all processes must call it.

        Args:
            device_type: What the main process computes on; the others learn it here.

        Returns:
            What all compute on.
        """
        store = self._open_store()
        store.set_timeout(_LONGEST_WAIT)
        threading.Thread(target=self._watch, daemon=True).start()
        if self.is_main:
            assert device_type is not None
            store.set(_STARTED, device_type)
        device_type = store.get(_STARTED).decode()
        if device_type == "cuda":
            torch.cuda.set_device(self.launch.local_rank)
        distributed.init_process_group(
            # Messages and sizes of parts go over the CPU, so that no card has to finish its queue.
            backend="cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo",
            store=store,
            rank=self.launch.rank,
            world_size=self.launch.count,
            timeout=_LONGEST_WAIT,
        )
        return device_type

    def share(self, message: Any, source: int = 0) -> Any:
        """Give a message from one process to all; every process must call it.

        Args:
            message: Picklable, used in `source` only. Tensors in it go from card to card.
            source: Who has it.

        Returns:
            The message, in `source` the very same; tensors of a card are on that of the process.
        """
        tensors: list[Tensor] = []
        header: list[Any] = [None]
        if self.launch.rank == source:
            pickled = _pickle(message, tensors)
            header = [(pickled, [(each.shape, each.dtype, each.is_cuda) for each in tensors])]
        distributed.broadcast_object_list(header, src=source, device=_CPU)
        pickled, forms = header[0]
        if self.launch.rank != source:
            tensors = [
                torch.empty(shape, dtype=dtype, device="cuda" if is_cuda else "cpu")
                for shape, dtype, is_cuda in forms
            ]
        for tensor in tensors:
            # As bytes, since not every channel knows every number format.
            distributed.broadcast(tensor.reshape(-1).view(torch.uint8), src=source)
        return message if self.launch.rank == source else _unpickle(pickled, tensors)

    def tell(self, failure: Failure) -> None:
        """Leave word of a failure of this process, for the main one to tell."""
        self._open_store().set(_FAILED, json.dumps(asdict(failure)))

    def explain(self, error: Exception) -> Exception:
        """What to raise for an error here, which may be that another process has failed."""
        if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
            return error
        # Connections break when a process ends, of which torch only says RuntimeError.
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            return error
        failure = self._wait_for_word()
        if failure is None:
            return RunError("another process of this run is gone. Run the same command again.")
        return _as_error(self._advise(failure))

    def _advise(self, failure: Failure) -> Failure:
        """Do and tell of a failure of another process what this one would of its own."""
        if failure.exit_code != RunError.exit_code and self.forget is not None:
            self.forget()
        if not failure.is_shortage or self.describe_shortage is None:
            return failure
        return replace(failure, message=self.describe_shortage())

    def was_stopped(self) -> bool:
        """Whether the main process is done or gone."""
        try:
            return self._open_store().check([_STOPPED])
        except RuntimeError:  # its store is gone with it
            return True

    def wait_for_stop(self) -> None:
        """Wait until the main process is done or gone."""
        while not self.was_stopped():
            time.sleep(_PERIOD_S)

    def leave_group(self) -> None:
        """Close all channels; all processes must call it."""
        self._is_over.set()
        distributed.destroy_process_group()

    def dismiss(self) -> None:
        """Tell the others that no more work comes."""
        if distributed.is_initialized():
            self.share(None)
            self.leave_group()
        self.close()

    def close(self) -> None:
        """Let the others go, whether they were met or not, and whatever they are at."""
        self._is_over.set()
        if self.is_main:
            with suppress(RuntimeError):  # the launcher may be gone after Ctrl-C
                self._open_store().set(_STOPPED, "")

    def _open_store(self) -> Store:
        """Of the launcher; it knows nothing of the video."""
        if self._store is None:
            self._store = _connect()
        return self._store

    def _wait_for_word(self) -> Failure | None:
        store = self._open_store()
        end_s = time.monotonic() + _WORD_TIMEOUT_S
        while time.monotonic() < end_s:
            failure = _read_failure(store)
            if failure is not None:
                return failure
            time.sleep(_PERIOD_S)
        return None

    def _watch(self) -> None:
        """End this process if another one has failed, or the main one is gone."""
        try:
            store = _connect()  # of its own: a wait in the main thread keeps the other one busy
            while not self._is_over.wait(_PERIOD_S):
                if self.is_main:
                    failure = _read_failure(store)
                    if failure is not None:
                        store.set(_STOPPED, "")
                        self._leave(self._advise(failure))
                elif store.check([_STOPPED]):
                    self._leave(None)
        except RuntimeError:  # the store is gone
            if not self._is_over.is_set() and not self.is_main:
                self._leave(None)


@contextmanager
def open_processes(launch: Launch | None, leave: Leave) -> Iterator[Processes | None]:
    """The processes of a video for as long as it is made; in the main process.

    Args:
        launch: Who this process is; None gives None.
        leave: Ends this process after a failure elsewhere, from another thread.
    """
    if launch is None:
        yield None
        return
    processes = Processes(launch, leave)
    before = signal.signal(signal.SIGINT, _interrupt_once)
    try:
        yield processes
    except KeyboardInterrupt:
        processes.close()
        raise
    except Exception as error:
        explained = processes.explain(error)
        processes.close()
        if explained is error:
            raise
        raise explained from error
    else:
        processes.dismiss()
    finally:
        if signal.getsignal(signal.SIGINT) is _interrupt_once:
            signal.signal(signal.SIGINT, before)


def _interrupt_once(_number: int, _frame: FrameType | None) -> None:
    """After a Ctrl-C the launcher sends another one, while this process says goodbye."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _connect() -> Store:
    store: Store = next(rendezvous("env://"))[0]
    return PrefixStore("everanimate", store)


def _read_failure(store: Store) -> Failure | None:
    if not store.check([_FAILED]):
        return None
    return Failure(**json.loads(store.get(_FAILED)))


def _as_error(failure: Failure) -> EverAnimateError:
    error = EverAnimateError(failure.message)
    error.exit_code = failure.exit_code
    return error


def _pickle(message: Any, tensors: list[Tensor]) -> bytes:
    """Pickle all but the tensors, which are put into a list instead."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> int | None:
            if not isinstance(value, Tensor):
                return None
            tensors.append(value.detach().contiguous())
            return len(tensors) - 1

    buffer = io.BytesIO()
    Pickler(buffer).dump(message)
    return buffer.getvalue()


def _unpickle(pickled: bytes, tensors: list[Tensor]) -> Any:
    class Unpickler(pickle.Unpickler):
        def persistent_load(self, number: int) -> Tensor:
            return tensors[number]

    return Unpickler(io.BytesIO(pickled)).load()
