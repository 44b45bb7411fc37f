"""Encoded training samples on disk, so that training needs neither VAE nor text or image encoder.

Layout of the folder:
    identity.json                           what shaped the tensors; a cache of others is refused
    samples/00000007.motion+target.safetensors   these tensors of sample 7
    prompts/<hash>.safetensors              text tokens of a prompt
    constants/dropped_pose.safetensors      what all samples share
    lock                                    held for the moment in which the folder is claimed
A file is never written twice: tensors that a later run needs on top go to files of their own, so
that runs with other options share a cache and processes fill it side by side. Files are written
under a temporary name first; a kill loses the sample at work.
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from everanimate_cli.atomic_files import atomic_path, write_json
from everanimate_cli.errors import InputError, RunError, SettingsError
from everanimate_cli.runs import try_lock
from everanimate_cli.workspace import list_differences

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from torch import Tensor

_VALUE = "value"  # the tensor in a file of its own
_LOCK_POLL_S = 0.02
# A sample is written within seconds; what has lain longer is of a process that was killed.
_STALE_S: Final = 3600.0


@dataclass(kw_only=True)
class LatentCache:
    """A folder of encoded samples.

    Attributes:
        folder: Need not exist.
        identity: Name -> JSON value of all that shapes the tensors. Names as in
            `workspace.list_differences`.
        num_samples: Samples that training goes through before the first one comes again. A cache
            may hold more or fewer.

    Raises:
        SettingsError: If the folder belongs to another identity; the message names each difference.
        InputError: If there is a file in its place.
        RunError: If the folder is damaged.
    """

    folder: Path
    identity: Mapping[str, object]
    num_samples: int
    # Sample -> tensor -> its file; what another process adds is found when it is asked for.
    _files: dict[int, dict[str, Path]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Compare identities and look what is there; nothing is written."""
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"--latent-cache {self.folder} is a file. Give a folder.")
        self._compare_identity()
        self._list_samples()

    def claim(self) -> None:
        """Make the folder, if need be, and note whose it is; several processes may do so at once.

        Raises:
            SettingsError: If another process has just claimed it for another identity.
            RunError: If the folder is damaged.
            OSError: If the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("a") as lock:
            while not try_lock(lock):
                time.sleep(_LOCK_POLL_S)
            self._compare_identity()
            if not self._identity_path.exists():
                write_json(self._identity_path, self.identity)
        for name in ("samples", "prompts", "constants"):
            (self.folder / name).mkdir(exist_ok=True)
        self._clear_stale()

    def missing(self, sample_index: int, names: Collection[str]) -> list[str]:
        """Those of the tensors that a sample lacks, sorted; others' work may not be seen yet."""
        return sorted(set(names) - self._files.get(sample_index, {}).keys())

    def has_prompt(self, prompt: str) -> bool:
        """Whether the text tokens of a prompt are there."""
        return self._prompt_path(prompt).exists()

    def has_constant(self, name: str) -> bool:
        """Whether a tensor that all samples share is there."""
        return self._constant_path(name).exists()

    def sample_path(self, sample_index: int, names: Collection[str]) -> Path:
        """The file of exactly these tensors of a sample."""
        return self.folder / "samples" / f"{sample_index:08d}.{'+'.join(sorted(names))}.safetensors"

    def save_sample(self, sample_index: int, tensors: Mapping[str, Tensor]) -> None:
        """Store tensors of a sample, all or none.

        Raises:
            OSError: If the disk is full.
        """
        path = self.sample_path(sample_index, tensors)
        _write(path, tensors)
        self._note(path)

    def save_prompt(self, prompt: str, prompt_embeds: Tensor) -> None:
        """Store the text tokens of a prompt; raises OSError if the disk is full."""
        _write(self._prompt_path(prompt), {_VALUE: prompt_embeds})

    def save_constant(self, name: str, value: Tensor) -> None:
        """Store a tensor that all samples share; raises OSError if the disk is full."""
        _write(self._constant_path(name), {_VALUE: value})

    def load_sample(self, sample_index: int, names: Collection[str]) -> dict[str, Tensor]:
        """Tensors of a sample by their names, in the dtype in which they were stored.

        Raises:
            RunError: If one is missing or its file is damaged.
        """
        if self.missing(sample_index, names):
            self._list_samples()
        missing = self.missing(sample_index, names)
        if missing:
            raise RunError(
                f"--latent-cache {self.folder} lacks {', '.join(missing)} of sample {sample_index}."
                " Start again: what is missing is encoded first."
            )
        files = self._files[sample_index]
        loaded: dict[str, Tensor] = {}
        for path in dict.fromkeys(files[name] for name in names):
            loaded |= _read(path, [name for name in names if files[name] == path])
        return loaded

    def load_prompt(self, prompt: str) -> Tensor:
        """Text tokens of a prompt; raises RunError if the file is missing or damaged."""
        return _read(self._prompt_path(prompt), [_VALUE])[_VALUE]

    def load_constant(self, name: str) -> Tensor:
        """A tensor that all samples share; raises RunError if the file is missing or damaged."""
        return _read(self._constant_path(name), [_VALUE])[_VALUE]

    @property
    def _identity_path(self) -> Path:
        return self.folder / "identity.json"

    def _prompt_path(self, prompt: str) -> Path:
        digest = hashlib.sha256(prompt.encode()).hexdigest()
        return self.folder / "prompts" / f"{digest[:32]}.safetensors"

    def _constant_path(self, name: str) -> Path:
        return self.folder / "constants" / f"{name}.safetensors"

    def _compare_identity(self) -> None:
        """Refuse a folder whose tensors were shaped by something else."""
        path = self._identity_path
        way_out = "Give another --latent-cache, or delete the folder."
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")).items())
        except FileNotFoundError as error:
            if (self.folder / "samples").exists():
                raise RunError(f"{path} is missing. {way_out}") from error
            return
        except (OSError, ValueError, AttributeError) as error:
            raise RunError(f"{path} is damaged ({error}). {way_out}") from error
        differences = list_differences(before, self.identity)
        if differences:
            raise SettingsError(
                f"--latent-cache {self.folder} was filled for another training: "
                f"{'; '.join(differences)}. {way_out}"
            )

    def _list_samples(self) -> None:
        self._files.clear()
        with suppress(FileNotFoundError):
            for path in (self.folder / "samples").iterdir():
                self._note(path)

    def _note(self, path: Path) -> None:
        """Remember a finished file by its name."""
        number, _, rest = path.name.partition(".")
        if number.isdecimal() and rest.endswith(".safetensors"):
            files = self._files.setdefault(int(number), {})
            files |= dict.fromkeys(rest.removesuffix(".safetensors").split("+"), path)

    def _clear_stale(self) -> None:
        """Delete what killed processes were about to write."""
        for path in self.folder.glob("*/.*.part"):
            with suppress(FileNotFoundError):  # several processes may be about it
                if time.time() - path.stat().st_mtime > _STALE_S:
                    path.unlink()


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # Through Python's own file, so that a full disk is an OSError like everywhere else.
    data = save({name: value.contiguous().cpu() for name, value in tensors.items()})
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def _read(path: Path, names: Collection[str]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}
    except FileNotFoundError as error:
        raise RunError(
            f"{path} is missing. Start again: what is missing is encoded first."
        ) from error
    except (SafetensorError, OSError) as error:
        raise RunError(
            f"{path} is damaged ({error}). Delete this file and start again: it is made anew."
        ) from error
