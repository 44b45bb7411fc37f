"""Where the networks lie and how their weights are stored: the presets for cards of every size.

A preset names four choices, each of which an option of its own overrides:

- precision: how the weights of the transformer's blocks are stored. They compute in `--dtype`.
- offload: what waits in main memory, or on disk, until it is needed. Changes no pixel.
- VAE tiling: whether frames are decoded in overlapping tiles. Encoding never is: what becomes
  memory is encoded whole, as in training.
- text device: where the text encoder runs, which it does once for a prompt.
"""

from dataclasses import dataclass, replace
from typing import Literal

from everanimate_cli.errors import SettingsError

Vram = Literal["auto", "80", "48", "24", "16", "12", "8"]
Precision = Literal["auto", "full", "fp8", "fp8-matmul", "torchao-fp8", "torchao-int8", "nf4"]
Offload = Literal["auto", "none", "model", "group", "disk"]
Tiling = Literal["auto", "on", "off"]
TextDevice = Literal["auto", "device", "cpu"]

# The package that a precision needs, and how that is installed.
PRECISION_PACKAGES = {
    "fp8-matmul": ("torchao", "pip install torchao"),
    "torchao-fp8": ("torchao", "pip install torchao"),
    "torchao-int8": ("torchao", "pip install torchao"),
    "nf4": ("bitsandbytes", "pip install bitsandbytes"),
}
# Weights that are no plain tensors can neither be written to disk nor, of bitsandbytes, be moved
# block by block.
_IMPOSSIBLE = {
    ("fp8-matmul", "disk"),
    ("torchao-fp8", "disk"),
    ("torchao-int8", "disk"),
    ("nf4", "disk"),
    ("nf4", "group"),
}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the networks lie and how they are stored; the default is all of them on the device.

    Attributes:
        precision: Of the blocks' linear layers: "full" keeps the network's dtype, "fp8-matmul" also
            multiplies in fp8.
        offload: "none"; "model": one network on the card at a time; "group": the transformer's
            blocks come one after the other, the next during the work of this one; "disk": the same
            from files.
        tile_decoding: Whether frames are decoded in tiles.
        text_device: "device", or "cpu".
        prefetch: Whether a block is copied during the work of the one before, which takes two
            blocks more on the card.
        preset: Size of the cards that it is made for [GB]; None where no card is concerned.
    """

    precision: Literal["full", "fp8", "fp8-matmul", "torchao-fp8", "torchao-int8", "nf4"] = "full"
    offload: Literal["none", "model", "group", "disk"] = "none"
    tile_decoding: bool = False
    text_device: Literal["device", "cpu"] = "device"
    prefetch: bool = True
    preset: str | None = None

    def describe(self) -> str:
        """Such as "preset 24: precision fp8, offload model, VAE tiling off, text on device"."""
        name = "" if self.preset is None else f"preset {self.preset}: "
        tiling = "on" if self.tile_decoding else "off"
        return (
            f"{name}precision {self.precision}, offload {self.offload}, VAE tiling {tiling}, "
            f"text on {self.text_device}"
        )

    def to_json(self) -> dict[str, str]:
        """The choices as the options are written."""
        preset = {} if self.preset is None else {"vram": self.preset}
        return {
            **preset,
            "precision": self.precision,
            "offload": self.offload,
            "vae_tiling": "on" if self.tile_decoding else "off",
            "text_device": self.text_device,
        }


# Largest first. For the released model at 832x480 with 77 frames; what each takes at another size
# is estimated by `placement.estimate`. To copy all blocks costs a second or two a step, during
# which a card of 24 GB is at work for ten times as long: it need not store them in fewer bits.
PRESETS = {
    preset.preset: preset
    for preset in (
        Placement(preset="80"),
        Placement(preset="48", offload="model"),
        Placement(preset="24", offload="group"),
        Placement(preset="16", precision="fp8", offload="group"),
        Placement(preset="12", precision="fp8", offload="group", text_device="cpu"),
        Placement(
            preset="8",
            precision="fp8",
            offload="group",
            tile_decoding=True,
            text_device="cpu",
            prefetch=False,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class PlacementOptions:
    """What the command line says of the placement; "auto" leaves a choice to the preset.

    Attributes:
        vram: Preset; "auto" takes the largest that fits the card.
        precision: See `Placement`.
        offload: See `Placement`.
        vae_tiling: Whether frames are decoded in tiles.
        text_device: See `Placement`.
    """

    vram: Vram = "auto"
    precision: Precision = "auto"
    offload: Offload = "auto"
    vae_tiling: Tiling = "auto"
    text_device: TextDevice = "auto"

    def override(self, preset: Placement) -> Placement:
        """The preset with the choices that were made one by one."""
        chosen: dict[str, object] = {}
        for name in ("precision", "offload", "text_device"):
            value = getattr(self, name)
            if value != "auto":
                chosen[name] = value
        if self.vae_tiling != "auto":
            chosen["tile_decoding"] = self.vae_tiling == "on"
        return replace(preset, **chosen)  # type: ignore[arg-type]  # of the same literals

    def candidates(self, device_type: str) -> list[Placement]:
        """All that the options leave open, the fastest first.

        Args:
            device_type: "cuda", "mps" or "cpu". Only a card has memory of its own: elsewhere
                nothing is stored or moved otherwise unless asked for.

        Raises:
            SettingsError: If an option has no effect on the device.
        """
        if device_type == "cuda":
            presets = list(PRESETS.values()) if self.vram == "auto" else [PRESETS[self.vram]]
            placements = [self.override(preset) for preset in presets]
            possible = [each for each in placements if is_possible(each)]
            # An option that a preset cannot follow shows in the first error.
            return possible or [_refuse(placements[0])]
        self._check_without_card(device_type)
        return [self.override(Placement())]

    def _check_without_card(self, device_type: str) -> None:
        reason = f"has no effect on {device_type}, which has no memory of its own."
        if self.vram != "auto":
            raise SettingsError(f"--vram {self.vram} {reason} Leave it out.")
        if self.offload == "model" or (self.offload == "group" and device_type == "mps"):
            raise SettingsError(f"--offload {self.offload} {reason} Give none or disk.")
        if self.text_device == "cpu" and device_type == "cpu":
            raise SettingsError("--text-device cpu is what --device cpu means. Leave it out.")


def is_possible(placement: Placement) -> bool:
    """Whether weights stored so can be offloaded so."""
    return (placement.precision, placement.offload) not in _IMPOSSIBLE


def check_placement(options: PlacementOptions) -> None:
    """Refuse options that exclude each other.

    Raises:
        SettingsError: Naming both.
    """
    if (options.precision, options.offload) in _IMPOSSIBLE:
        _refuse(Placement(precision=options.precision, offload=options.offload))  # type: ignore[arg-type]


def _refuse(placement: Placement) -> Placement:
    raise SettingsError(
        f"--precision {placement.precision} does not fit --offload {placement.offload}, which "
        "moves plain tensors only. Give --precision fp8, or --offload model."
    )
