"""The training loop of the toy networks: several processes, one checkpoint a minute, exact restart.

On a CPU single-threaded processes average their gradients, which is faster than one process with
threads at this size; on a GPU one process is used.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.multiprocessing
from torch import Tensor, distributed

log = logging.getLogger("everanimate.toy_training")

LOG_EVERY_S = 20.0
SAVE_EVERY_S = 60.0

Loss = dict[str, Tensor]  # "loss" is minimised, the rest is logged
LossFunction = Callable[[torch.nn.Module, np.random.Generator], Loss]


class Muon(torch.optim.Optimizer):
    """Momentum whose update matrix is orthogonalised (Jordan et al. 2024).

    Args:
        params: Weights of two and more axes; axes after the first are flattened.
        lr: Step length in units of the spectral norm.
        momentum: Nesterov momentum.
    """

    def __init__(self, params: list[Tensor], lr: float = 0.02, momentum: float = 0.95) -> None:
        super().__init__(params or [torch.zeros(0, 0)], {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        del closure
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                update = _orthogonalised(update)
                scale = math.sqrt(max(1.0, update.shape[0] / update.shape[1]))
                weight.add_(update.view_as(weight), alpha=-group["lr"] * scale)


def _orthogonalised(matrix: Tensor) -> Tensor:
    """Push the singular values of a matrix towards 1 by five Newton-Schulz steps of fifth order."""
    a, b, c = 3.4445, -4.7750, 2.0315
    transposed = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if transposed else matrix
    # The step only needs to be roughly orthogonal, so bfloat16 is enough.
    wide = (wide / (wide.norm() + 1e-7)).bfloat16()
    if wide.shape[1] < 4 * wide.shape[0]:
        for _ in range(5):
            gram = wide @ wide.T
            wide = a * wide + (b * gram + c * gram @ gram) @ wide
        result = wide.float()
    else:
        # Every step multiplies from the left by a polynomial of the Gram matrix, so that the long
        # side has to enter only twice. Powers of it need float32.
        gram = (wide @ wide.T).float()
        unit = torch.eye(gram.shape[0], device=gram.device)
        product = unit
        for _ in range(5):
            factor = a * unit + b * gram + c * gram @ gram
            product = factor @ product
            gram = factor @ factor @ gram
        result = product @ wide.float()
    return result.T if transposed else result


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How long and how fast one stage trains.

    Attributes:
        name: Of the checkpoint file in the work folder.
        minutes: Wall time in all, former runs included; the learning rate falls to zero over it.
        processes: Workers on a CPU.
        muon_lr: For weights of two and more axes inside the network.
        adam_lr: For everything else.
        ema: Decay of the weight average that is kept as the result.
        warmup_steps: Steps of rising learning rate.
        compile_each: Name of a list of modules in the network that are compiled one by one, which
            costs a minute at the start; empty for none.
    """

    name: str
    minutes: float
    processes: int
    muon_lr: float = 0.02
    adam_lr: float = 2e-3
    ema: float = 0.999
    warmup_steps: int = 50
    compile_each: str = ""


def train(
    work: Path,
    plan: TrainingPlan,
    build: Callable[[], torch.nn.Module],
    make_loss: Callable[[Path, torch.device], LossFunction],
    use_adam: Callable[[str], bool] = lambda _name: False,
) -> None:
    """Train one network; goes on from the last checkpoint of this name.

    Args:
        work: Folder of data and checkpoints.
        plan: Length and rates.
        build: Makes the network with fresh weights.
        make_loss: Given the folder and the device, makes the function that draws a batch and
            computes its loss.
        use_adam: Whether the matrix with this name is trained by AdamW all the same.
    """
    processes = 1 if torch.cuda.is_available() else plan.processes
    rendezvous = work / f"{plan.name}.rendezvous"
    rendezvous.unlink(missing_ok=True)
    arguments = (work, plan, build, make_loss, use_adam, processes)
    if processes == 1:
        _run_worker(0, *arguments)
    else:
        torch.multiprocessing.spawn(  # type: ignore[attr-defined]
            _run_worker, arguments, nprocs=processes
        )
    rendezvous.unlink(missing_ok=True)


def load_average(work: Path, name: str, model: torch.nn.Module) -> torch.nn.Module:
    """The averaged weights of a stage in a network, ready to use."""
    saved = torch.load(work / f"{name}.checkpoint.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(saved["average"])
    return model.eval().requires_grad_(False)


def _run_worker(
    rank: int,
    work: Path,
    plan: TrainingPlan,
    build: Callable[[], torch.nn.Module],
    make_loss: Callable[[Path, torch.device], LossFunction],
    use_adam: Callable[[str], bool],
    processes: int,
) -> None:
    """One process from start to end."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
    if processes > 1:
        store = distributed.FileStore(  # type: ignore[attr-defined]
            str(work / f"{plan.name}.rendezvous"), processes
        )
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    torch.manual_seed(0)
    worker = _Worker(plan, build().to(device).train(), use_adam, device, processes)
    path = work / f"{plan.name}.checkpoint.pt"
    if path.exists():
        worker.restore(torch.load(path, map_location=device, weights_only=True))
    rng = np.random.default_rng([rank, worker.num_steps, 7])
    torch.manual_seed(1000 * worker.num_steps + rank)
    loss_of = make_loss(work, device)
    means: dict[str, float] = {}
    started_s = time.monotonic() - worker.spent_s
    logged_s, saved_s = 0.0, time.monotonic()
    while worker.advance(time.monotonic() - started_s, loss_of, rng, means):
        now_s = time.monotonic()
        if rank == 0 and now_s - logged_s > LOG_EVERY_S:
            log.info("%s", worker.describe(means))
            logged_s = now_s
        if rank == 0 and now_s - saved_s > SAVE_EVERY_S:
            worker.save(path)
            saved_s = now_s
    if rank == 0:
        worker.save(path)
        log.info("%s, finished", worker.describe(means))
    if processes > 1:
        distributed.destroy_process_group()


class _Worker:
    """A network with its optimisers and its running average.

    Attributes:
        num_steps: Steps made, former runs included.
        spent_s: Wall time spent, former runs included.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        model: torch.nn.Module,
        use_adam: Callable[[str], bool],
        device: torch.device,
        processes: int,
    ) -> None:
        self.num_steps, self.spent_s = 0, 0.0
        self._plan, self._device, self._processes = plan, device, processes
        self._model = model
        self._average = copy.deepcopy(model).requires_grad_(False)
        if plan.compile_each:
            # One version for each layout and each length of the text.
            torch._dynamo.config.recompile_limit = 64
            for module in model.get_submodule(plan.compile_each).children():
                module.compile(dynamic=False)
        self._matrices: list[Tensor] = []
        self._others: list[Tensor] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                is_matrix = parameter.ndim >= 2 and not use_adam(name)
                (self._matrices if is_matrix else self._others).append(parameter)
        self._optimizers: list[torch.optim.Optimizer] = [
            Muon(self._matrices, lr=plan.muon_lr),
            torch.optim.AdamW(self._others, lr=plan.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def advance(
        self,
        spent_s: float,
        loss_of: LossFunction,
        rng: np.random.Generator,
        means: dict[str, float],
    ) -> bool:
        """Make one step; False once the time is over."""
        self.spent_s = spent_s
        progress = torch.tensor(min(spent_s / (60 * self._plan.minutes), 1.0))
        if self._processes > 1:
            distributed.broadcast(progress, 0)  # all stop at the same step
        if progress >= 1:
            return False
        warm = min(1.0, (self.num_steps + 1) / self._plan.warmup_steps)
        factor = warm * (1 + math.cos(math.pi * float(progress))) / 2
        rates = (self._plan.muon_lr, self._plan.adam_lr)
        for optimizer, rate in zip(self._optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
        with torch.autocast(self._device.type, torch.bfloat16):
            losses = loss_of(self._model, rng)
        losses["loss"].backward()
        if self._processes > 1:
            self._average_gradients()
        torch.nn.utils.clip_grad_norm_(self._others, 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.num_steps += 1
        decay = min(self._plan.ema, (1 + self.num_steps) / (10 + self.num_steps))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self._average.parameters()), list(self._model.parameters()), 1 - decay
            )
        for key, value in losses.items():
            number = float(value.detach())
            means[key] = 0.98 * means.get(key, number) + 0.02 * number
        return True

    def _average_gradients(self) -> None:
        parameters = [p for p in self._matrices + self._others if p.grad is not None]
        flat = torch.cat([p.grad.flatten() for p in parameters])  # type: ignore[union-attr]
        distributed.all_reduce(flat)
        parts = (flat / self._processes).split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def describe(self, means: dict[str, float]) -> str:
        """One line of the log."""
        text = " ".join(f"{key} {value:.4f}" for key, value in means.items())
        return f"{self._plan.name} step {self.num_steps}, {self.spent_s / 60:.1f} min: {text}"

    def save(self, path: Path) -> None:
        """Write everything that a later run needs, whole or not at all."""
        state = {
            "model": self._model.state_dict(),
            "average": self._average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "step": self.num_steps,
            "spent_s": self.spent_s,
        }
        temporary = path.with_suffix(".partial")
        torch.save(state, temporary)
        temporary.replace(path)

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `save` wrote."""
        self._model.load_state_dict(state["model"])
        self._average.load_state_dict(state["average"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.num_steps, self.spent_s = state["step"], state["spent_s"]
