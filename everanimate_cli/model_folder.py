"""Which file of a checkpoint belongs to what, in the two layouts that checkpoints come in.

"diffusers": a folder for each network, with its `config.json`. "original": as the authors of
Wan2.2-Animate publish it, all in one folder, the text and image encoder and the VAE as pickles.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from everanimate_cli.errors import WeightsError
from everanimate_cli.settings import MODEL_DEFAULTS_FILE, ModelDefaults

Layout = Literal["diffusers", "original"]

ORIGINAL_TOKENIZER = "google/umt5-xxl"
TOKENIZER_SUFFIXES = (".json", ".model", ".txt")
TRANSFORMER_SUFFIXES = (".safetensors", ".gguf")  # of a file for `--transformer`

_NUM_LISTED = 3  # names that an error message lists before it counts the rest
_ADAPTER_CONFIG = "adapter_config.json"  # transformers follows it to the model that it names
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_SHARD = re.compile(r"[^/\\\0:]+\.safetensors")  # in the same folder on every system
_COMPLETE = {
    "diffusers": "Give a complete checkpoint in diffusers layout.",
    "original": "Give a complete checkpoint in the original layout.",
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """How the files of one network are called.

    Attributes:
        described_as: Class names that its `config.json` may carry.
        stem: Of its weight files in diffusers layout.
        original: Of its weight file in the original layout, as a pattern without suffix.
    """

    described_as: tuple[str, ...]
    stem: str
    original: str


PARTS = {
    "transformer": Part(
        described_as=("WanAnimateTransformer3DModel", "EverAnimateTransformer3DModel"),
        stem="diffusion_pytorch_model",
        original="diffusion_pytorch_model",
    ),
    "vae": Part(
        described_as=("AutoencoderKLWan",),
        stem="diffusion_pytorch_model",
        original="Wan2.1_VAE",
    ),
    "text_encoder": Part(
        described_as=("UMT5EncoderModel",),
        stem="model",
        original="models_t5_umt5-xxl-enc-bf16",
    ),
    "image_encoder": Part(
        described_as=("CLIPVisionModel", "CLIPVisionModelWithProjection"),
        stem="model",
        original="models_clip_open-clip-xlm-roberta-large-vit-huge-14*",
    ),
}
NETWORKS = tuple(PARTS)

_TRANSFORMER_WEIGHTS = ("transformer/*.safetensors*", "diffusion_pytorch_model*.safetensors*")
# What is loaded of a repository on the Hub, in either layout.
CHECKPOINT_PATTERNS = (
    "model_index.json",
    MODEL_DEFAULTS_FILE,
    "scheduler/*.json",
    "image_processor/*processor_config.json",  # the release has a tokenizer in there too
    *(f"{name}/*{suffix}" for name in NETWORKS for suffix in (".json", ".safetensors")),
    *(f"tokenizer/*{suffix}" for suffix in TOKENIZER_SUFFIXES),
    "diffusion_pytorch_model*.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    *(
        f"{PARTS[name].original}.{suffix}"
        for name in NETWORKS[1:]
        for suffix in ("safetensors", "pth")
    ),
    *(f"{ORIGINAL_TOKENIZER}/*{suffix}" for suffix in TOKENIZER_SUFFIXES),
)


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A checkpoint that is on this machine.

    Attributes:
        folder: In diffusers layout, or in the original one.
        defaults: What the model was trained for.
        name: As given with `--model`.
        revision: Commit on the Hub; None for a folder and the embedded model.
        transformer: File that stands in for the folder's transformer; None for the folder's own.
        known_configs: Configs by network, of a checkpoint that is known without its folder.
    """

    folder: Path
    defaults: ModelDefaults
    name: str
    revision: str | None = None
    transformer: Path | None = None
    known_configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)

    @property
    def label(self) -> str:
        """How an error calls the checkpoint."""
        return f"--model {self.name}"

    @property
    def layout(self) -> Layout:
        """Of the folder; a folder that is neither counts as an incomplete one of diffusers."""
        return find_layout(self.folder) or "diffusers"

    def label_of(self, name: str) -> str:
        """How an error calls where the weights of a network come from."""
        if name == "transformer" and self.transformer is not None:
            return f"--transformer {self.transformer}"
        return self.label

    def weight_files(self, name: str) -> list[Path]:
        """The files with the weights of a network, all of which exist.

        Raises:
            WeightsError: If one is missing, or all are pickles that can run code.
        """
        if name == "transformer" and self.transformer is not None:
            return [self.transformer]
        if self.layout == "original":
            return _original_files(self.label, self.folder, name)
        return _indexed_files(self.label, self.folder / name, PARTS[name].stem, name)

    def has_config(self, name: str) -> bool:
        """Whether a `config.json` describes a network; otherwise its weights do."""
        return name in self.known_configs or (name in PARTS and self.layout == "diffusers")

    def config_file(self, name: str) -> Path:
        """Where the `config.json` of a network lies in diffusers layout."""
        return self.folder / name / "config.json"

    def read_config(self, name: str) -> dict[str, Any]:
        """Content of a network's `config.json`, which names the right class.

        Raises:
            WeightsError: If there is none, or it describes another network.
        """
        if name in self.known_configs:
            return dict(self.known_configs[name])
        if not (self.folder / name).is_dir():
            raise WeightsError(f"{self.label} has no folder {name}. {_COMPLETE['diffusers']}")
        path = self.config_file(name)
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            architectures = list(config.get("architectures") or ["no network"])
            described = config.get("_class_name") or architectures[0]
        except OSError as error:
            raise WeightsError(f"{path} cannot be read: {error.strerror}.") from error
        except (ValueError, AttributeError, RecursionError) as error:
            raise WeightsError(f"{path} cannot be read: it holds no JSON object.") from error
        except TypeError as error:
            raise WeightsError(f"{path} cannot be read: its architectures are no list.") from error
        known = PARTS[name].described_as
        if described not in known:
            raise WeightsError(
                f"{self.label}: {name}/config.json describes {described}, not {known[0]}. "
                "Give a Wan2.2-Animate checkpoint."
            )
        # Both would let the libraries load other weights than those that were checked.
        if config.get("quantization_config") is not None:
            raise WeightsError(
                f"{self.label}: {name}/config.json describes quantised weights. "
                "Give plain ones, or a GGUF or float8 file with --transformer."
            )
        if path.with_name(_ADAPTER_CONFIG).exists():
            raise WeightsError(
                f"{self.label}: {name} holds an {_ADAPTER_CONFIG}, for an adapter on another "
                "model. Delete it, or give a complete checkpoint."
            )
        return cast("dict[str, Any]", config)

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer's files lie."""
        return self.folder / _tokenizer_name(self.layout)

    def tokenizer_files(self) -> list[Path]:
        """The files that a tokenizer is loaded from.

        Raises:
            WeightsError: If they are missing.
        """
        names = ("tokenizer.json", "spiece.model")
        folder = self.tokenizer_folder
        if not any((folder / name).is_file() for name in names):
            raise WeightsError(
                f"{self.label} has no {_tokenizer_name(self.layout)}/{names[0]}. "
                f"{_COMPLETE[self.layout]}"
            )
        return [path for path in folder.iterdir() if path.suffix in TOKENIZER_SUFFIXES]

    def check_files(self, networks: Sequence[str] = NETWORKS) -> None:
        """Refuse a checkpoint in which a file is missing.

        Args:
            networks: Those that are needed; the tokenizer goes with the text encoder.

        Raises:
            WeightsError: Naming the network and the files.
        """
        for name in networks:
            self.weight_files(name)
            if self.has_config(name):
                self.read_config(name)
        if "text_encoder" in networks:
            self.tokenizer_files()


def find_layout(folder: Path) -> Layout | None:
    """Which layout a folder has; None for one that is no checkpoint."""
    if (folder / "transformer" / "config.json").is_file():
        return "diffusers"
    stems = (f"{PARTS['transformer'].original}*", *(PARTS[n].original for n in NETWORKS[1:]))
    is_original = any(
        path.suffix in (".safetensors", ".pth")
        for stem in stems
        for path in folder.glob(f"{stem}.*")
    )
    return "original" if is_original else None


def left_out(
    transformer: Path | None = None, networks: Sequence[str] = NETWORKS
) -> tuple[str, ...]:
    """Patterns of the files of a repository that are not needed.

    Configs, which tell the layout, always are.

    Args:
        transformer: File that stands in for the repository's transformer.
        networks: Those that are needed; the tokenizer goes with the text encoder.
    """
    patterns: list[str] = []
    if transformer is not None or "transformer" not in networks:
        patterns += _TRANSFORMER_WEIGHTS
    for name in NETWORKS[1:]:
        if name not in networks:
            patterns += [f"{name}/*.safetensors*", f"{PARTS[name].original}.*"]
    if "text_encoder" not in networks:
        patterns += ["tokenizer/*", f"{ORIGINAL_TOKENIZER}/*"]
    return tuple(patterns)


def list_first(names: Sequence[str]) -> str:
    """Names as an error message lists them."""
    listed = ", ".join(names[:_NUM_LISTED])
    return f"first: {listed}" if len(names) > _NUM_LISTED else listed


def _tokenizer_name(layout: Layout) -> str:
    return "tokenizer" if layout == "diffusers" else ORIGINAL_TOKENIZER


def _original_files(label: str, folder: Path, name: str) -> list[Path]:
    stem = PARTS[name].original
    if name == "transformer":
        return _indexed_files(label, folder, stem, "")
    # Repackaged as safetensors by some; preferred, since opening it can run no code.
    for suffix in (".safetensors", ".pth"):
        paths = sorted(folder.glob(f"{stem}{suffix}"))
        if paths:
            return paths[:1]
    raise WeightsError(f"{label} has no {stem}.pth. {_COMPLETE['original']}")


def _indexed_files(label: str, folder: Path, stem: str, name: str) -> list[Path]:
    """One safetensors file, or those that an index beside them lists."""
    in_folder = f"{name}/" if name else ""
    whole = f"{stem}.safetensors"
    index = folder / f"{whole}.index.json"
    layout: Layout = "diffusers" if name else "original"
    if not index.is_file():
        if (folder / whole).is_file():
            return [folder / whole]
        pickles = [path.name for path in _sorted_files(folder) if path.suffix in _PICKLE_SUFFIXES]
        if name and pickles:
            raise WeightsError(
                f"{label}: {name} holds pickled weights only ({list_first(pickles)}), which can "
                "run code when they are opened. Convert them to safetensors."
            )
        raise WeightsError(f"{label} has no {in_folder}{whole}. {_COMPLETE[layout]}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        file_names = sorted(set(weight_map.values()))
        paths = [folder / file_name for file_name in file_names]
    except OSError as error:
        raise WeightsError(f"{index} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{index} cannot be read: it is no index of weights.") from error
    strange = [name for name in file_names if not _SHARD.fullmatch(name)]
    if strange or not paths:
        named = list_first([repr(name) for name in strange]) or "nothing"
        raise WeightsError(
            f"{index} names {named} where .safetensors files beside it are expected. "
            f"{_COMPLETE[layout]}"
        )
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise WeightsError(
            f"{label}: {name or 'transformer'} lacks {len(missing)} of its {len(paths)} weight "
            f"files ({list_first(missing)}). Download them."
        )
    return paths


def _sorted_files(folder: Path) -> Iterable[Path]:
    return sorted(folder.glob("*"))
