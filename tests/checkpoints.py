"""What tests of checkpoints share: what one takes in memory, and how one is refused."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from everanimate_cli.errors import EverAnimateError
from everanimate_cli.model_folder import ModelSource
from everanimate_cli.placement import read_sizes


def ignore(_event: object) -> None:
    """An `on_event` for nobody."""


def message_of(error: type[EverAnimateError], call: Callable[[], object]) -> str:
    """The one line by which a call fails."""
    with pytest.raises(error) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def weights_mib(source: ModelSource, dtype: torch.dtype) -> dict[str, float]:
    """Memory of the weights by network once they are loaded, as a plan counts it."""
    sizes = read_sizes(source)
    return {name: sum(sizes.stored_mib(name, "full", dtype).values()) for name in sizes.shapes}


def assert_same_weights(network: nn.Module, expected: nn.Module) -> None:
    torch.testing.assert_close(network.state_dict(), expected.state_dict(), rtol=0, atol=0)
