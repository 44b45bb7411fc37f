"""Whether a model on this machine is whole, undamaged and the right network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everanimate_cli.cached_models import check_hashes, inspect_model
from everanimate_cli.checkpoint import check_checkpoint, check_network
from everanimate_cli.errors import WeightsError
from everanimate_cli.hub import RELEASED_LORAS
from everanimate_cli.lora import plan_lora
from everanimate_cli.model_folder import ModelSource
from everanimate_cli.safetensors_header import read_tensor_shapes
from everanimate_cli.settings import HUB_MODEL, read_model_defaults

if TYPE_CHECKING:
    from everanimate_cli.events import OnEvent


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found.

    Attributes:
        name: Of the model.
        num_hashed: Files whose content was compared with what their publisher states.
        has_weights: Whether names and shapes of weights were compared with a network's.
        problems: What is wrong, a sentence for each; empty if all is well.
    """

    name: str
    num_hashed: int
    has_weights: bool
    problems: tuple[str, ...]

    def describe(self) -> str:
        """One line for a reader."""
        hashed = "1 file has" if self.num_hashed == 1 else f"{self.num_hashed} files have"
        if self.problems:
            return f"{self.name}: {'. '.join(self.problems)}."
        parts = [f"{hashed} the stated hashes"] if self.num_hashed else []
        if self.has_weights:
            parts.append("names and shapes of all weights are right")
        return f"{self.name}: {', '.join(parts)}"

    def to_json(self) -> dict[str, Any]:
        """All about it."""
        return {
            "name": self.name,
            "is_right": not self.problems,
            "num_hashed": self.num_hashed,
            "problems": list(self.problems),
        }


def verify(name: str, on_event: OnEvent) -> Verdict:
    """Check a model: hashes of its files, then names and shapes of its weights.

    Args:
        name: As `cached_models.inspect_model` takes it.
        on_event: Told how far it is.

    Raises:
        WeightsError: If it is not on this machine.
        InputError: If the name fits nothing.
    """
    num_hashed, problems = check_hashes(name, on_event)
    found = inspect_model(name)
    assert found.path is not None
    # What is missing or damaged fits no network anyway.
    has_weights = found.kind in ("model", "lora") and not problems
    if has_weights:
        try:
            if found.kind == "lora":
                _check_lora(name, found.path)
            else:
                check_checkpoint(_source(name, found.path))
        except WeightsError as error:
            problems.append(str(error).removeprefix(f"--model {name}").lstrip(": ").rstrip("."))
    return Verdict(
        name=name,
        num_hashed=num_hashed,
        has_weights=has_weights,
        problems=tuple(problems),
    )


def _check_lora(name: str, path: Path) -> None:
    """Read the header; the released LoRAs are compared with their base, if that is here."""
    read_tensor_shapes(path)
    base = inspect_model(HUB_MODEL)
    if name.partition("@")[0] in RELEASED_LORAS and base.is_whole and base.path is not None:
        plan_lora(path, check_network(_source(HUB_MODEL, base.path), "transformer"))


def _source(name: str, folder: Path) -> ModelSource:
    return ModelSource(folder=folder, defaults=read_model_defaults(folder), name=name)
