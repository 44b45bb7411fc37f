"""What stands beside the matrices of a LoRA: the configuration of PEFT, and where a file has it.

PEFT writes a folder: `adapter_model.safetensors` and `adapter_config.json`. diffusers writes one
file and puts the configuration into its header. Both leave the matrices as they were trained, so
that their product has to be multiplied by alpha / rank, which only the configuration tells.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from everanimate_cli.errors import WeightsError
from everanimate_cli.safetensors_header import read_metadata

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"

_DIFFUSERS_KEY = "lora_adapter_metadata"
_DIFFUSERS_PREFIX = "transformer."
# Variants whose product is not simply added to the weight.
_VARIANTS = {"use_dora": "DoRA", "use_qalora": "QA-LoRA"}


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """How PEFT scales the product of two matrices.

    Attributes:
        alpha: Counts alpha / rank times.
        alpha_pattern: Patterns of module names -> an alpha of their own.
        has_root: Whether alpha is divided by the root of the rank instead (rsLoRA).
        base: The model that was trained on; None where it is not told.
    """

    alpha: float
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    has_root: bool = False
    base: str | None = None

    def alpha_of(self, module: str) -> float:
        """Alpha of a module by its name in the file, without prefix."""
        for pattern, alpha in self.alpha_pattern.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return alpha
        return self.alpha

    def strength(self, module: str, rank: int) -> float:
        """Factor on the product of a module's matrices."""
        return self.alpha_of(module) / (math.sqrt(rank) if self.has_root else rank)


def lora_weights_file(path: Path) -> Path:
    """The file with the matrices: the one in a folder of PEFT, else the path itself."""
    return path / PEFT_WEIGHTS if path.is_dir() else path


def read_lora_config(path: Path) -> LoraConfig | None:
    """The configuration that belongs to a LoRA file.

    Args:
        path: The file; a configuration of PEFT lies beside it.

    Returns:
        None where there is none, so that the product counts as it is.

    Raises:
        WeightsError: If it cannot be read, or describes something else than a plain LoRA.
    """
    config_path = path.with_name(PEFT_CONFIG)
    if path.name == PEFT_WEIGHTS and config_path.is_file():
        try:
            config = json.loads(config_path.read_text(encoding="utf-8"))
        except OSError as error:
            raise WeightsError(f"{config_path} cannot be read: {error.strerror}.") from error
        except (ValueError, RecursionError) as error:
            raise WeightsError(f"{config_path} cannot be read: it holds no JSON object.") from error
        return _interpret(config, str(config_path))
    stored = read_metadata(path).get(_DIFFUSERS_KEY)
    if stored is None:
        return None
    label = f"LoRA {path}: its entry {_DIFFUSERS_KEY}"
    try:
        config = {
            name.removeprefix(_DIFFUSERS_PREFIX): value
            for name, value in json.loads(stored).items()
        }
    except (ValueError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{label} cannot be read: it holds no JSON object.") from error
    return _interpret(config, label)


def _interpret(config: Any, label: str) -> LoraConfig:
    try:
        kind = str(config.get("peft_type") or "LORA")
        if kind != "LORA":
            raise WeightsError(f"{label} describes {kind}, not LORA. Give a plain LoRA.")
        for name, variant in _VARIANTS.items():
            if config.get(name):
                raise WeightsError(f"{label} describes a {variant}. Give a plain LoRA.")
        base = config.get("base_model_name_or_path")
        alpha_pattern = {
            str(name): float(alpha) for name, alpha in (config.get("alpha_pattern") or {}).items()
        }
        alpha = float(config["lora_alpha"])
        if not all(math.isfinite(each) for each in (alpha, *alpha_pattern.values())):
            raise WeightsError(f"{label} names an alpha that is not finite. Give another LoRA.")
        for pattern in alpha_pattern:
            re.compile(pattern)
        return LoraConfig(
            alpha=alpha,
            alpha_pattern=alpha_pattern,
            has_root=bool(config.get("use_rslora")),
            base=None if base is None else str(base),
        )
    except re.error as error:
        raise WeightsError(
            f"{label} holds an alpha_pattern that is no pattern: {error}. Give another LoRA."
        ) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{label} names no lora_alpha. Give a configuration of PEFT.") from error
