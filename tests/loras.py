"""LoRAs in a whole network at once; the program adds them weight by weight while it loads."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from everanimate_cli.lora import LoraFiles, plan_loras


def fuse_loras(network: nn.Module, loras: Sequence[tuple[Path, float]]) -> int:
    """Add LoRAs to the weights of a network; the number of parameters changed."""
    parameters = dict(network.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    found = plan_loras(loras, shapes)
    with LoraFiles(loras) as files:
        for name, shares in found.items():
            weight = parameters[name].data
            weight.copy_(files.fuse(shares, weight))
    return len(found)
