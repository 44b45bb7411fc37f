"""What a checkpoint holds of adapters in training, however the processes share them.

The tensors are whole and have the same names whether one process trains, several hold all of them
(DDP), a part of the optimiser's state (DeepSpeed's ZeRO 1 and 2) or a part of the weights too
(FSDP2, ZeRO-3). A training can therefore go on in another of these ways.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from everanimate_cli.lora_adapter import gather, lora_parameters, read_adapters, scatter_like

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's names, in DeepSpeed too


class AdapterState:
    """Adapters and the moments of AdamW, which a process holds whole or as parts of tensors.

    Every process must call each method.
    """

    def __init__(self, network: nn.Module, optimizer: Any) -> None:
        """Speak for a network and its optimiser.

        Args:
            network: With adapters, as accelerate or FSDP2 has wrapped it.
            optimizer: AdamW, or accelerate's wrapper of it.
        """
        self._parameters = lora_parameters(network)
        self._network, self._optimizer = network, optimizer

    def weights(self) -> dict[str, Tensor]:
        """The adapters' matrices by their diffusers names, float32 on the CPU."""
        return read_adapters(self._network)

    def moments(self) -> dict[str, Tensor]:
        """The moments, `exp_avg/<name of the matrix>` and so on; none before the first step."""
        return {
            f"{name}/{key}": gather(self._optimizer.state[parameter][name])
            for key, parameter in self._parameters.items()
            for name in MOMENTS
            if name in self._optimizer.state.get(parameter, {})
        }

    def load_moments(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Put back what `moments` gave.

        Args:
            tensors: May hold other things too.
            step: How many steps they come from.
        """
        for key, parameter in self._parameters.items():
            if f"{MOMENTS[0]}/{key}" in tensors:
                self._optimizer.state[parameter] = _first_state(step) | {
                    name: scatter_like(tensors[f"{name}/{key}"], parameter).clone()
                    for name in MOMENTS
                }


class ZeroAdapterState(AdapterState):
    """As `AdapterState`, where DeepSpeed's ZeRO keeps the moments in flat parts of its own.

    Source: DeepSpeed's documentation, "ZeRO", "Debugging" (`safe_get_full_optimizer_state` and
    others).
    """

    def __init__(self, network: nn.Module, optimizer: Any, *, stage: int) -> None:
        """Speak for an engine.

        Args:
            network: DeepSpeed's engine.
            optimizer: accelerate's wrapper of DeepSpeed's optimiser.
            stage: Of ZeRO, 1 to 3.
        """
        super().__init__(network, optimizer)
        self._stage = stage

    def weights(self) -> dict[str, Tensor]:
        """As `AdapterState.weights`."""
        if self._stage < 3:  # noqa: PLR2004  # ZeRO-3 leaves no weight whole
            return super().weights()
        from deepspeed.utils import safe_get_full_fp32_param  # noqa: PLC0415  # optional package

        return {
            key: gather(safe_get_full_fp32_param(parameter))
            for key, parameter in self._parameters.items()
        }

    def moments(self) -> dict[str, Tensor]:
        """As `AdapterState.moments`."""
        from deepspeed.utils import safe_get_full_optimizer_state  # noqa: PLC0415  # see above

        if not self._zero().optimizer.state:
            return {}
        return {
            f"{name}/{key}": gather(safe_get_full_optimizer_state(parameter, name))
            for key, parameter in self._parameters.items()
            for name in MOMENTS
        }

    def load_moments(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """As `AdapterState.load_moments`."""
        if not any(name.startswith(f"{MOMENTS[0]}/") for name in tensors):
            return
        zero = self._zero()
        # AdamW makes its state in the first step, which is over here.
        for part in self._parts():
            zero.optimizer.state[part] = _first_state(step) | {
                name: torch.zeros_like(part) for name in MOMENTS
            }
        if self._stage < 3:  # noqa: PLR2004
            # Lets each matrix find its stretch of the flat state, as ZeRO does after a first step.
            zero._lazy_init_hp_params_optimizer_state()
        for key, parameter in self._parameters.items():
            for name in MOMENTS:
                self._write(parameter, tensors[f"{name}/{key}"], name)

    def _write(self, parameter: nn.Parameter, value: Tensor, name: str) -> None:
        """Set the part of a moment that this process keeps."""
        from deepspeed.utils import (  # noqa: PLC0415  # see above
            safe_set_full_optimizer_state,
            safe_set_local_optimizer_state,
        )

        if self._stage < 3:  # noqa: PLR2004
            safe_set_full_optimizer_state(parameter, value, name)
            return
        # Not by the call for whole values, which fails where they cannot be shared out evenly.
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        start = self._zero()._get_param_partition_rank(parameter) * size
        own = value.flatten()[start : start + size]
        safe_set_local_optimizer_state(parameter, pad(own, (0, size - own.numel())), name)

    def _zero(self) -> Any:
        """DeepSpeed's optimiser, which has AdamW as `optimizer`."""
        return self._optimizer.optimizer

    def _parts(self) -> list[Tensor]:
        """The flat tensors that AdamW steps."""
        zero = self._zero()
        is_whole = self._stage < 3  # noqa: PLR2004
        found = (
            zero.single_partition_of_fp32_groups if is_whole else zero.fp32_partitioned_groups_flat
        )
        return list(found)


def _first_state(step: int) -> dict[str, Tensor]:
    return {"step": torch.tensor(float(step))}
