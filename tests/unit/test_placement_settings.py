"""Presets and what the command line makes of them."""

from dataclasses import replace
from typing import Any

import pytest

from everanimate_cli.errors import SettingsError
from everanimate_cli.placement_settings import (
    PRESETS,
    Placement,
    PlacementOptions,
    check_placement,
)
from everanimate_cli.settings import AnimateSettings


def test_presets_are_named_by_the_card_and_get_smaller() -> None:
    assert list(PRESETS) == ["80", "48", "24", "16", "12", "8"]
    assert PRESETS["80"] == Placement(preset="80")
    assert [preset.precision for preset in PRESETS.values()] == ["full"] * 3 + ["fp8"] * 3
    assert [preset.offload for preset in PRESETS.values()] == ["none", "model", *["group"] * 4]
    assert [name for name, preset in PRESETS.items() if not preset.prefetch] == ["8"]
    assert [name for name, preset in PRESETS.items() if preset.tile_decoding] == ["8"]
    assert [name for name, preset in PRESETS.items() if preset.text_device == "cpu"] == ["12", "8"]


def test_on_a_card_all_presets_are_open_and_every_choice_can_be_overridden() -> None:
    assert PlacementOptions().candidates("cuda") == list(PRESETS.values())
    assert PlacementOptions(vram="24").candidates("cuda") == [PRESETS["24"]]
    chosen = PlacementOptions(
        vram="24", precision="fp8", offload="model", vae_tiling="on", text_device="cpu"
    )
    assert chosen.candidates("cuda") == [
        Placement(
            precision="fp8",
            offload="model",
            tile_decoding=True,
            text_device="cpu",
            preset="24",
        )
    ]
    assert not PlacementOptions(vram="8", vae_tiling="off").candidates("cuda")[0].tile_decoding


def test_without_a_card_nothing_changes_unless_asked_for() -> None:
    for device in ("cpu", "mps"):
        assert PlacementOptions().candidates(device) == [Placement()]
        asked = PlacementOptions(precision="fp8", offload="disk", vae_tiling="on")
        assert asked.candidates(device) == [
            Placement(precision="fp8", offload="disk", tile_decoding=True)
        ]
    assert PlacementOptions(offload="group").candidates("cpu") == [Placement(offload="group")]
    assert PlacementOptions(text_device="cpu").candidates("mps") == [Placement(text_device="cpu")]


@pytest.mark.parametrize(
    ("options", "device", "message"),
    [
        (
            {"vram": "24"},
            "cpu",
            "--vram 24 has no effect on cpu, which has no memory of its own. Leave it out.",
        ),
        (
            {"offload": "model"},
            "cpu",
            "--offload model has no effect on cpu, which has no memory of its own. "
            "Give none or disk.",
        ),
        (
            {"offload": "group"},
            "mps",
            "--offload group has no effect on mps, which has no memory of its own. "
            "Give none or disk.",
        ),
        (
            {"text_device": "cpu"},
            "cpu",
            "--text-device cpu is what --device cpu means. Leave it out.",
        ),
    ],
)
def test_what_has_no_effect_is_refused(options: Any, device: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        PlacementOptions(**options).candidates(device)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("precision", "offload"),
    [("nf4", "group"), ("nf4", "disk"), ("torchao-int8", "disk"), ("torchao-fp8", "disk")],
)
def test_packed_weights_go_neither_to_disk_nor_block_by_block(precision: Any, offload: Any) -> None:
    message = (
        f"--precision {precision} does not fit --offload {offload}, which moves plain tensors "
        "only. Give --precision fp8, or --offload model."
    )
    with pytest.raises(SettingsError) as caught:
        check_placement(PlacementOptions(precision=precision, offload=offload))
    assert str(caught.value) == message
    # In the settings of the command too, before anything is loaded.
    with pytest.raises(SettingsError) as caught:
        AnimateSettings(ref="a.png", driving="b", precision=precision, offload=offload)
    assert str(caught.value) == message
    # A preset that would lead there is passed over, and one that was asked for is refused.
    offloads = {each.offload for each in PlacementOptions(precision="nf4").candidates("cuda")}
    assert offloads == {"none", "model"}
    with pytest.raises(SettingsError, match="does not fit --offload group"):
        PlacementOptions(vram="16", precision="nf4").candidates("cuda")


def test_a_placement_tells_itself() -> None:
    placement = replace(PRESETS["12"], tile_decoding=True)
    assert placement.describe() == (
        "preset 12: precision fp8, offload group, VAE tiling on, text on cpu"
    )
    assert placement.to_json() == {
        "vram": "12",
        "precision": "fp8",
        "offload": "group",
        "vae_tiling": "on",
        "text_device": "cpu",
    }
    assert Placement().to_json() == {
        "precision": "full",
        "offload": "none",
        "vae_tiling": "off",
        "text_device": "device",
    }
