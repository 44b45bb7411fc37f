"""Run folders on disk: what lies in them, which process holds one, which there are.

Layout of `NAME.mp4.run`, beside the result `NAME.mp4`:
    run.json                  what the run was asked to do; written first, deleted first
    00007_4-21.mp4            frames 4..20 of chunk 7, encoded; playable, joined at the end
    00007.safetensors         latents of chunk 7 and the state that chunk 8 needs; written last
    prompt-....safetensors    what the network sees of the prompt
    pictures.json             where the PNG pictures of these chunks are, if they were wanted
    joined.mp4, result.json   the result and its settings, until they get their place
    lock                      held by the process at work
Layout of `NAME.run`, beside the folder `NAME` of an extraction:
    run.json, lock            the same
    00007_pose.mp4, ...       videos of segment 7, encoded, joined at the end
    00007.npz                 its keypoints and the state that segment 8 needs; written last
    joined_pose.mp4, ...      the files of the result, until they get their place
Layout of the folder of a training, which is also its result:
    run.json, lock                  the same
    checkpoint-000200.safetensors   all that the training needs to go on
    metrics.jsonl                   a line a step, and a line a validation
    validation-000200.mp4           truth and result side by side
    tensorboard/                    the same curves for TensorBoard
    lora.safetensors                the result; made anew when the training is extended
    train.json, loss.png            its settings and facts, and the curve
Files are written under a temporary name first. Nothing heavy is imported here, so that
`everanimate runs` answers at once.
"""

import errno
import json
import os
import re
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar

from everanimate_cli.settings import run_folder

_REQUEST_FILE = "run.json"
_LOCK_FILE = "lock"
# Of folders with weights that wait on disk while a process works.
OFFLOAD_PREFIX = "offload-"
_TEMPORARY_FILE = re.compile(r"\..+\.[0-9a-f]{8}\.part")
_RUN_SUFFIX = run_folder(Path("x")).name.removeprefix("x")
# What file systems that cannot lock answer: some network and user-space ones.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
_MIB = 2**20
_CHECKPOINT = re.compile(r"checkpoint-(\d{6,})\.safetensors")


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """A run's folder of PNG pictures.

    Attributes:
        folder: Absolute; all it holds under the names of frames is this run's.
        num_missing: The first so many chunks were finished before pictures were wanted, or wanted
            there, and theirs are not known to be written.
    """

    folder: Path
    num_missing: int

    def to_json(self) -> dict[str, object]:
        """What `RunFolder.read_pictures` reads."""
        return {"folder": str(self.folder), "num_missing": self.num_missing}


@dataclass(frozen=True)
class WorkFolder(ABC):
    """The files of one piece of work that can be continued.

    Attributes:
        path: The folder; need not exist.
        unit: What is finished one after the other.
        part_file: Names of files of such a unit.
        other_file: Names of further files of this program. Only what it has written is ever
            deleted: the user may keep things beside it.
    """

    path: Path
    unit: ClassVar[str]
    part_file: ClassVar[re.Pattern[str]]
    other_file: ClassVar[re.Pattern[str]]

    @property
    def output(self) -> Path:
        """The result that the run is for."""
        return self.path.with_suffix("")

    @property
    def request_path(self) -> Path:
        """What the run was asked to do."""
        return self.path / _REQUEST_FILE

    @abstractmethod
    def part_path(self, index: int) -> Path:
        """The file of a unit that is written last: with it the unit is finished."""

    def has_result(self) -> bool:
        """Whether the result is there."""
        return self.output.exists()

    def count_finished(self) -> int:
        """Units that are finished without a gap from the first one on."""
        count = 0
        while self.part_path(count).exists():
            count += 1
        return count

    def holds_run(self) -> bool:
        """Whether there is a run that can go on."""
        return any(path.name == _REQUEST_FILE for path in self._files())

    def holds_files(self) -> bool:
        """Whether there is a run, or what a removal that was cut short has left of one."""
        return bool(self._files())

    def clear(self) -> None:
        """Delete the run's files and begin anew; the lock stays."""
        # Parts without a request belong to nobody, so a removal that is cut short does no harm.
        self.request_path.unlink(missing_ok=True)
        for path in self._files():
            if path.name != _LOCK_FILE:
                path.unlink(missing_ok=True)

    def clear_temporaries(self) -> None:
        """Delete what a killed process was about to write."""
        for path in self._files():
            if _TEMPORARY_FILE.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the run's files, and the folder unless it holds anything else."""
        self.clear()
        # Windows deletes no open file, and a folder with the user's own files stays.
        with suppress(OSError):
            (self.path / _LOCK_FILE).unlink()
            self.path.rmdir()

    def finish_removal(self) -> None:
        """Delete what a removal that was killed has left; not where a process is at work."""
        with suppress(OSError):  # whoever uses the folder next is told
            if not self.path.is_dir() or self.holds_run():
                return
            with self.hold() as is_ours:
                if is_ours and not self.holds_run():
                    self.remove()

    @contextmanager
    def hold(self) -> Iterator[bool]:
        """Take the folder for this process, making it if need be.

        Yields:
            False if another process has it.

        Raises:
            OSError: If the folder cannot be made.
        """
        lock_path = self.path / _LOCK_FILE
        while True:
            self.path.mkdir(exist_ok=True)
            try:
                lock = lock_path.open("a")
            except FileNotFoundError:  # removed just now by the process that had it
                continue
            with lock:
                if not try_lock(lock):
                    yield False
                    return
                # Removed between the opening and the locking: another process may hold its
                # successor.
                if _is_file_at(lock, lock_path):
                    yield True
                    return

    def is_held(self) -> bool:
        """Whether a process is at work on it; changes nothing, and no answer counts as yes."""
        try:
            with (self.path / _LOCK_FILE).open("rb") as lock:
                return not try_lock(lock)
        except FileNotFoundError:
            return False
        except OSError:
            return True

    def _files(self) -> list[Path]:
        """The run's own files; none where the folder is missing or cannot be read."""
        try:
            paths = list(self.path.iterdir())
        except OSError:
            return []
        return [path for path in paths if self._is_own(_final_name(path.name))]

    def _is_own(self, name: str) -> bool:
        patterns = (self.part_file, self.other_file)
        return name in (_REQUEST_FILE, _LOCK_FILE) or any(p.fullmatch(name) for p in patterns)

    def measure(self) -> tuple[int, float]:
        """(bytes on disk, time of the last change [s])."""
        num_bytes, newest_s = 0, 0.0
        for path in self._files():
            with suppress(OSError):  # a process at work renames and deletes
                status = path.stat()
                num_bytes += status.st_size
                newest_s = max(newest_s, status.st_mtime)
        return num_bytes, newest_s


class RunFolder(WorkFolder):
    """The files of one run of `animate`."""

    unit = "chunk"
    part_file = re.compile(r"\d{5,}\.safetensors|\d{5,}_\d+-\d+\.mp4")
    other_file = re.compile(
        r"pictures\.json|joined\.mp4|result\.json|prompt-[0-9a-f]{32}\.safetensors"
    )

    def clear(self) -> None:
        """Delete the run's files and begin anew; the lock stays."""
        super().clear()
        self._remove_offload_folders()

    def clear_temporaries(self) -> None:
        """Delete what a killed process was about to write, or kept here while it worked."""
        super().clear_temporaries()
        self._remove_offload_folders()

    def _remove_offload_folders(self) -> None:
        for folder in self.path.glob(f"{OFFLOAD_PREFIX}*"):
            shutil.rmtree(folder, ignore_errors=True)

    def read_begun(self) -> dict[str, object]:
        """What the run was asked to do; empty if there is none, or none that can be read."""
        try:
            request = json.loads(self.request_path.read_bytes())
        except (OSError, ValueError):
            return {}
        return request if isinstance(request, dict) else {}

    @property
    def pictures_path(self) -> Path:
        """Where the PNG pictures are, see `read_pictures`."""
        return self.path / "pictures.json"

    @property
    def joined_path(self) -> Path:
        """The result until it gets its place, so that a killed run leaves nothing elsewhere."""
        return self.path / "joined.mp4"

    @property
    def record_path(self) -> Path:
        """The result's settings until they get their place."""
        return self.path / "result.json"

    def part_path(self, index: int) -> Path:
        """Latents and state of a chunk, which is finished when this file is there."""
        return self.path / f"{index:05d}.safetensors"

    def segment_path(self, chunk_index: int, kept: range) -> Path:
        """Where the encoded frames `kept` of a chunk are or go."""
        return self.path / f"{chunk_index:05d}_{kept.start}-{kept.stop}.mp4"

    def read_pictures(self) -> "Pictures | None":
        """Where the PNG pictures of the chunks are; None if none were wanted."""
        try:
            note = json.loads(self.pictures_path.read_bytes())
            return Pictures(folder=Path(note["folder"]), num_missing=int(note["num_missing"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None


class ExtractFolder(WorkFolder):
    """The files of one extraction of poses."""

    unit = "segment"
    part_file = re.compile(r"\d{5,}\.npz|\d{5,}_(pose|face|preview)\.mp4")
    other_file = re.compile(r"joined_(pose|face|preview|keypoints|extract|reference)\.\w+")

    def part_path(self, index: int) -> Path:
        """Keypoints and state of a segment, which is finished when this file is there."""
        return self.path / f"{index:05d}.npz"

    def video_path(self, index: int, name: str) -> Path:
        """One of the videos of a segment: "pose", "face" or "preview"."""
        return self.path / f"{index:05d}_{name}.mp4"

    def has_result(self) -> bool:
        """Whether the folder of the result is there and whole: this file gets its place last."""
        return (self.output / "extract.json").exists()

    def joined_path(self, name: str) -> Path:
        """A file of the result, `pose.mp4` and so on, until it gets its place."""
        return self.path / f"joined_{name}"


class TrainFolder(WorkFolder):
    """The files of one training; the folder itself is what `--output` names."""

    unit = "checkpoint"
    part_file = _CHECKPOINT
    other_file = re.compile(
        r"metrics\.jsonl|lora\.safetensors|train\.json|loss\.png|validation-\d{6,}\.mp4"
    )

    @property
    def output(self) -> Path:
        """The folder."""
        return self.path

    @property
    def lora_path(self) -> Path:
        """The result."""
        return self.path / "lora.safetensors"

    @property
    def record_path(self) -> Path:
        """Settings and facts of the result."""
        return self.path / "train.json"

    @property
    def plot_path(self) -> Path:
        """The loss curve."""
        return self.path / "loss.png"

    @property
    def metrics_path(self) -> Path:
        """The log, JSON lines."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard_path(self) -> Path:
        """Folder of event files."""
        return self.path / "tensorboard"

    def validation_path(self, step: int) -> Path:
        """The video rendered after a step."""
        return self.path / f"validation-{step:06d}.mp4"

    def part_path(self, index: int) -> Path:
        """The checkpoint after a step."""
        return self.path / f"checkpoint-{index:06d}.safetensors"

    def has_result(self) -> bool:
        """Whether a LoRA is there."""
        return self.lora_path.exists()

    def count_finished(self) -> int:
        """Number of checkpoints."""
        return len(self.checkpoints())

    def checkpoints(self) -> list[int]:
        """Steps of the checkpoints, rising."""
        names = (path.name for path in self.path.glob("checkpoint-*"))
        return sorted(int(match[1]) for name in names if (match := _CHECKPOINT.fullmatch(name)))

    def clear(self) -> None:
        """Delete the training's files and begin anew; the lock stays."""
        super().clear()
        for path in self.tensorboard_path.glob("events.out.tfevents.*"):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # it is not there, or holds the user's own files
            self.tensorboard_path.rmdir()

    def drop_checkpoints(self, num_kept: int) -> None:
        """Delete all checkpoints but the last ones."""
        for step in self.checkpoints()[:-num_kept]:
            self.part_path(step).unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What is worth knowing of a run folder.

    Attributes:
        folder: The folder.
        num_finished: Finished chunks, or segments of an extraction.
        num_bytes: Size on disk.
        age_s: Since the last change.
        is_held: Whether a process is at work on it.
        has_result: Whether a video is beside it: the run was kept, to be made longer.
    """

    folder: WorkFolder
    num_finished: int
    num_bytes: int
    age_s: float
    is_held: bool
    has_result: bool

    def describe(self) -> str:
        """Such as "3 chunks, 1.2 MiB, 5 min old"."""
        minutes = self.age_s / 60
        if self.is_held:
            age = "at work"
        elif minutes < 90:  # noqa: PLR2004  # one and a half hours, as people count
            age = f"{minutes:.0f} min old"
        else:
            age = f"{minutes / 60:.1f} h old"
        unit = self.folder.unit if self.num_finished == 1 else f"{self.folder.unit}s"
        kept = ", kept beside its result" if self.has_result else ""
        return f"{self.num_finished} {unit}, {self.num_bytes / _MIB:.1f} MiB, {age}{kept}"

    def to_json(self) -> dict[str, object]:
        """The same as a JSON object."""
        return {
            "path": str(self.folder.path),
            "output": str(self.folder.output),
            "has_result": self.has_result,
            f"{self.folder.unit}s": self.num_finished,
            "size_mib": round(self.num_bytes / _MIB, 3),
            "age_s": round(self.age_s),
            "at_work": self.is_held,
        }


def list_runs(folder: Path) -> list[RunSummary]:
    """Run folders that lie in a folder, or the folder itself if it is one, oldest first.

    Nothing is changed, and what cannot be read is passed over.
    """
    try:
        paths = [folder, *folder.iterdir()]
    except OSError:
        return []
    found = []
    for path in paths:
        name = path.name.lower()
        run = RunFolder(path) if name.endswith(f".mp4{_RUN_SUFFIX}") else ExtractFolder(path)
        if not name.endswith(_RUN_SUFFIX) or not run.holds_files():
            continue
        num_bytes, newest_s = run.measure()
        found.append(
            RunSummary(
                folder=run,
                num_finished=run.count_finished(),
                num_bytes=num_bytes,
                age_s=max(0.0, time.time() - newest_s),
                is_held=run.is_held(),
                has_result=run.has_result(),
            )
        )
    return sorted(found, key=lambda run: (-run.age_s, run.folder.path))


def remove_run(run: WorkFolder) -> bool:
    """Delete a run; False, and nothing is changed, if a process is at work on it."""
    with run.hold() as is_ours:
        if is_ours:
            run.remove()
    return is_ours


def _final_name(name: str) -> str:
    """The name that a file will get, for a temporary one; others as they are."""
    return name[1:].rsplit(".", 2)[0] if _TEMPORARY_FILE.fullmatch(name) else name


def _is_file_at(file: IO[str], path: Path) -> bool:
    """Whether an open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def try_lock(file: IO[str] | IO[bytes]) -> bool:
    """Take a file for this process until it is closed; False if another process has it."""
    try:
        import fcntl  # noqa: PLC0415  # absent on Windows
    except ImportError:
        import msvcrt  # noqa: PLC0415

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True
