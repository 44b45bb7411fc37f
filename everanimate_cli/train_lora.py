"""`everanimate train-lora`: persistent latent propagation and restorative flow matching.

One loop for one process and many: accelerate places the network and sums the gradients, everything
random is keyed by the position of a sample, and a checkpoint holds all that changes, so that a
training can be killed at any moment and goes on to the same result.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import signal
import threading
import time
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from everanimate_cli import checkpoint, estimates, hub, weights
from everanimate_cli.adapter_state import AdapterState, ZeroAdapterState
from everanimate_cli.atomic_files import write_json
from everanimate_cli.errors import RunError, SettingsError
from everanimate_cli.events import Note, OnEvent, PhaseAdvanced, PhaseStarted, TrainStep
from everanimate_cli.hashes import hash_file
from everanimate_cli.lora_adapter import (
    attach_lora,
    gather,
    ignore_frozen_weights,
    load_initial_lora,
    lora_parameters,
    save_lora,
    shard_network,
    write_adapters,
)
from everanimate_cli.loss_plot import plot_losses
from everanimate_cli.model_folder import ModelSource
from everanimate_cli.objective import correction_weight, training_pair, velocity_loss
from everanimate_cli.offloading import check_package
from everanimate_cli.pipeline import AnimatePipeline, peak_memory_mib
from everanimate_cli.placement import Sizes, read_sizes
from everanimate_cli.placement_settings import PRECISION_PACKAGES, Placement
from everanimate_cli.preflight import check_init_rank, output_exists, unfit_size
from everanimate_cli.records import CommandResult, LoraSpec
from everanimate_cli.runs import TrainFolder
from everanimate_cli.schedule import model_timestep, training_schedule
from everanimate_cli.train_settings import ResolvedTrainSettings, TrainSettings, resolve_training
from everanimate_cli.training_clips import ClipSet, TrainingClip, open_clips
from everanimate_cli.training_processes import (
    Processes,
    StoppedElsewhereError,
    computes_in_bf16,
    open_processes,
)
from everanimate_cli.training_samples import (
    SampleSource,
    TrainingExample,
    clip_prompt,
    fill_cache,
    missing_work,
    open_cache,
)
from everanimate_cli.training_state import (
    MetricsLog,
    load_checkpoint,
    read_metrics,
    save_checkpoint,
)
from everanimate_cli.training_validation import Validation
from everanimate_cli.workspace import open_work

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from everanimate_cli.transformer import EverAnimateTransformer3DModel

    Validate = Callable[[Path | None], dict[str, float]]

# What may change from one start of a training to the next: it shapes no weight after any step.
_FREE_OPTIONS = (
    *("output", "steps", "batch_size", "accumulate", "device", "compile", "gradient_checkpointing"),
    *("checkpoint_every", "keep_checkpoints", "export", "tensorboard"),
    *("validate_every", "validation", "validation_chunks", "validation_steps"),
    *("dataset", "init", "model", "pose_folder", "pose_model", "detector"),  # their content counts
)
# Layers of a block whose inputs are text and picture, which nothing trained has touched.
_OF_CONTEXT = re.compile(r"\.attn2\.(to_k|to_v|add_k_proj|add_v_proj)\.")
_LOSS_SHARE = 0.1  # of the steps, over which the last loss is told


def train_lora(settings: TrainSettings, on_event: OnEvent) -> CommandResult | None:
    """Train a LoRA as the settings say, or go on where an earlier run stopped.

    Args:
        settings: Checked options.
        on_event: Told of every step, and of what is worth a line.

    Returns:
        The LoRA and facts about it, with `settings.dry_run` the plan alone; None in all processes
        but the main one.

    Raises:
        EverAnimateError: If an input, option or checkpoint cannot be used; nothing is written then.
        RunError: If memory runs out or the loss is no number; the last checkpoint stays.
        OSError: If the disk is full; the same command goes on from the last checkpoint.
        KeyboardInterrupt: After Ctrl-C, once the step at work is done and stored.

    Source: method page section 3.
    """
    device = weights.choose_device(settings.device)
    dtype = weights.choose_dtype(settings.dtype, device)
    try:
        with open_processes(settings, device, dtype) as processes:
            return _train(settings, processes, dtype, on_event if processes.is_main else _ignore)
    except StoppedElsewhereError:
        return None


def _train(
    settings: TrainSettings, processes: Processes, dtype: torch.dtype, on_event: OnEvent
) -> CommandResult | None:
    """As `train_lora`, in one of the processes."""
    is_main, accelerator = processes.is_main, processes.accelerator
    with ExitStack() as stack:
        work = _check(settings, processes, dtype, on_event)
        resolved = work.settings
        facts: dict[str, Any] = {
            "steps": resolved.steps,
            "samples_per_step": resolved.batch_size * resolved.accumulate * processes.count,
            "clips": len(work.clips) + work.num_pending,
            "clips_rejected": work.num_rejected,
            "size": resolved.size,
            "frames_per_chunk": resolved.frames_per_chunk,
            "memory": resolved.memory,
            "degradation_probability": resolved.degradation_probability,
            "rank": resolved.rank,
            "model": work.source.name,
            "device": str(accelerator.device),
            "dtype": str(dtype).removeprefix("torch."),
            "processes": processes.count,
        }
        folder = TrainFolder(resolved.output)
        if resolved.dry_run:
            facts |= _estimate_memory_mib(work, dtype)
            return CommandResult(output=folder.lora_path, facts=facts) if is_main else None
        request = _request(work, facts["samples_per_step"], dtype)
        with processes.stopping_together():
            if is_main:
                stack.enter_context(_open_folder(folder, resolved, request))
        with _memory_errors(work, dtype):
            source, pipeline, transformer = _prepare(work, processes, dtype, on_event)
            training = _Training(resolved, processes, folder, transformer, work.init, on_event)
            training.run(source, _validation(work, pipeline))
            # Before the clean-up, so that a full-size network need not be gathered twice.
            record = {"settings": settings.to_json(), "effective": resolved.to_json()}
            facts |= training.finish(record | {"request": request}, facts)
    return CommandResult(output=folder.lora_path, facts=facts) if is_main else None


def _ignore(_event: object) -> None:
    """Take an event and tell nobody: the main process does."""


# --- before the first step -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What a training works on, found and checked.

    Attributes:
        settings: With the model's defaults.
        source: The base model.
        model_hash: Of the base model's files.
        init: LoRA to start from.
        clips: That can be used.
        num_rejected: Clips that cannot.
        num_pending: Clips whose poses a dry run does not extract.
        validation: What validation renders, if it is asked for.
    """

    settings: ResolvedTrainSettings
    source: ModelSource
    model_hash: str
    init: Path | None
    clips: Sequence[TrainingClip]
    num_rejected: int
    num_pending: int
    validation: TrainingClip | None


def _check(
    settings: TrainSettings, processes: Processes, dtype: torch.dtype, on_event: OnEvent
) -> _Work:
    """Find model and clips, and refuse what does not fit before anything is written."""
    source, resolved, init = processes.main_first(partial(_find_model, settings, on_event))
    model_hash = checkpoint.checkpoint_hash(source)

    def find_clips() -> tuple[ClipSet, TrainingClip | None]:
        geometry = estimates.read_geometry(source)
        height, width = resolved.height_width
        if height % geometry.size_multiple or width % geometry.size_multiple:
            raise unfit_size((height, width), geometry.size_multiple)
        found = open_clips(resolved, geometry.face_size, on_event)
        # Refuses one of another training; of a plan not all clips are known yet.
        if resolved.latent_cache is not None and not found.pending:
            open_cache(resolved, found.clips, model_hash=model_hash, dtype=dtype)
        return found, _choose_validation(resolved, found.clips, geometry.face_size, on_event)

    # By the main process alone: it extracts poses, and others would try again what it could not.
    found, validation = processes.of_main(find_clips)
    return _Work(
        settings=resolved,
        source=source,
        model_hash=model_hash,
        init=init,
        clips=found.clips,
        num_rejected=len(found.rejected),
        num_pending=len(found.pending),
        validation=validation,
    )


def _find_model(
    settings: TrainSettings, on_event: OnEvent
) -> tuple[ModelSource, ResolvedTrainSettings, Path | None]:
    """The base model, what it means for the settings, and the LoRA to start from.

    Both are on this machine then and checked by their headers.
    """
    check_package(settings.base_precision, f"--quantize-base {settings.quantize_base}")
    download = not settings.dry_run
    source = hub.locate_model(settings.model, on_event, download=download)
    resolved = resolve_training(settings, source.defaults)
    init = None
    if settings.init is not None:
        init = hub.locate_lora(
            LoraSpec(settings.init), on_event, download=download, option="--init"
        )
        check_init_rank(settings.init, init, settings.rank)
    checkpoint.check_checkpoint(source, [] if init is None else [init])
    return source, resolved, init


def _choose_validation(
    settings: ResolvedTrainSettings,
    clips: Sequence[TrainingClip],
    face_size: int,
    on_event: OnEvent,
) -> TrainingClip | None:
    """The first clip of the validation set, else of the training set."""
    if not settings.validate_every or settings.dry_run:
        return None
    if settings.validation is None:
        return clips[0]
    return open_clips(replace(settings, dataset=settings.validation), face_size, on_event).clips[0]


def _request(work: _Work, num_samples: int, dtype: torch.dtype) -> dict[str, object]:
    """All that shapes the weights after any step."""
    settings = work.settings
    values: dict[str, object] = {
        name: value for name, value in settings.to_json().items() if name not in _FREE_OPTIONS
    }
    clips = "\n".join(f"{clip.fingerprint} {clip.num_frames} {clip.prompt}" for clip in work.clips)
    # "auto" is another one on another device.
    values["dtype"] = str(dtype).removeprefix("torch.")
    # A cache brings samples back in another way than encoding them afresh.
    values["latent_cache"] = settings.latent_cache is not None
    values["samples per step"] = num_samples
    values["model sha256"] = work.model_hash
    values["clips sha256"] = hashlib.sha256(clips.encode()).hexdigest()
    if work.init is not None:
        values["init sha256"] = hash_file(work.init)
    packages = ["torch", "diffusers", "peft"]
    if settings.base_precision in PRECISION_PACKAGES:
        packages.append(PRECISION_PACKAGES[settings.base_precision][0])
    for package in packages:
        values[f"{package} version"] = version(package)
    return values


@contextmanager
def _open_folder(
    folder: TrainFolder, settings: ResolvedTrainSettings, request: dict[str, object]
) -> Iterator[None]:
    """Hold the output folder."""
    # Without its request a LoRA belongs to no training that could go on.
    is_new = not settings.resume or not folder.request_path.exists()
    if is_new and folder.has_result() and not settings.overwrite:
        raise output_exists(folder.lora_path)
    folder.path.parent.mkdir(parents=True, exist_ok=True)
    with open_work(
        folder,
        request,
        resume=settings.resume,
        overwrite=settings.overwrite,
    ):
        last = max(folder.checkpoints(), default=0)
        if last > settings.steps:
            raise SettingsError(
                f"--steps {settings.steps} is less than the {last} that --output {folder.path} has "
                f"made. Give --steps {last} or more, or another --output."
            )
        yield


def _estimate_memory_mib(work: _Work, dtype: torch.dtype) -> dict[str, Any]:
    """Weights, counted exactly, and what a step takes beside them, estimated; for one process."""
    settings = work.settings
    sizes = read_sizes(work.source)
    parts = {
        name: sum(sizes.stored_mib(name, settings.base_precision, dtype).values())
        for name in sizes.shapes
    }
    height, width = settings.height_width
    step = sizes.geometry.training_step_mib(
        height,
        width,
        settings.frames_per_chunk,
        settings.identity_slots,
        dtype=dtype,
        autocast=computes_in_bf16(settings, dtype),
        checkpointing=settings.gradient_checkpointing,
    )
    # Without a cache the encoders stay beside the network.
    kept = ["transformer"] if settings.latent_cache is not None else list(parts)
    total = sum(parts[name] for name in kept) + settings.batch_size * step
    total += estimates.lora_mib(work.source, settings.rank)
    total += _unpacked_mib(sizes, settings, dtype)
    return {
        "weights_mib": {name: round(value, 1) for name, value in parts.items()},
        "estimated_memory_mib": round(total),
    }


def _unpacked_mib(sizes: Sizes, settings: ResolvedTrainSettings, dtype: torch.dtype) -> float:
    """Memory in MiB of packed weights in the format in which they compute, the most at a time.

    diffusers and torchao leave what a layer has unpacked to its backward pass, unless its inputs
    have no gradient; bitsandbytes unpacks it anew.
    """
    whole = sizes.stored_mib("transformer", "full", dtype)
    stored = sizes.stored_mib("transformer", settings.base_precision, dtype)
    in_bf16 = computes_in_bf16(settings, dtype)
    scale = torch.bfloat16.itemsize / dtype.itemsize if in_bf16 else 1.0
    unpacked = [
        scale * mib
        for key, mib in whole.items()
        if stored[key] != mib and not _OF_CONTEXT.search(key)
    ]
    if settings.quantize_base == "nf4":
        return max(unpacked)
    if settings.gradient_checkpointing == "off":
        return sum(unpacked)
    return sum(unpacked) / sizes.geometry.num_layers


@contextmanager
def _memory_errors(work: _Work, dtype: torch.dtype) -> Iterator[None]:
    """Turn running out of a card's memory into a line that says what lowers it."""
    settings = work.settings
    try:
        yield
    except RuntimeError as error:
        # Apple's MPS has no exception of its own for it.
        is_ours = isinstance(error, torch.OutOfMemoryError) or "MPS backend out of" in str(error)
        if not is_ours:
            raise
        ways = []
        if settings.gradient_checkpointing != "offload":
            better = "on" if settings.gradient_checkpointing == "off" else "offload"
            ways.append(f"--gradient-checkpointing {better}")
        if settings.latent_cache is None:
            ways.append("--latent-cache DIR, which keeps the encoders out of memory")
        if settings.batch_size > 1:
            ways.append("a smaller --batch-size with more --accumulate")
        ways.append(f"a --size below {settings.size} or fewer --frames-per-chunk")
        estimate = _estimate_memory_mib(work, dtype)["estimated_memory_mib"]
        raise RunError(
            f"out of memory in training, which takes about {estimate} MiB. "
            f"Give {', or '.join(ways)}; --dry-run tells the estimate."
        ) from error


def _prepare(
    work: _Work, processes: Processes, dtype: torch.dtype, on_event: OnEvent
) -> tuple[SampleSource, AnimatePipeline | None, EverAnimateTransformer3DModel]:
    """Where examples come from, and the networks: all of them, or the one in training alone."""
    settings, clips, device = work.settings, work.clips, processes.accelerator.device
    placement = Placement(precision=settings.base_precision)

    def load() -> AnimatePipeline:
        return weights.load_pipeline(
            work.source,
            [],
            device,
            dtype,
            with_image_processor=settings.memory == "pixel",
            placement=placement,
        )

    if settings.latent_cache is None:
        whole = load()
        return SampleSource(settings, clips, whole, None), whole, whole.transformer
    cache = open_cache(settings, clips, model_hash=work.model_hash, dtype=dtype)
    share = missing_work(
        cache,
        settings,
        clips,
        rank=processes.accelerator.process_index,
        world_size=processes.count,
    )
    pipeline: AnimatePipeline | None = None
    if len(share):
        pipeline = load()
        on_event(PhaseStarted(name="latents", total=len(share), unit="samples"))
        for done in fill_cache(cache, share, settings, clips, pipeline):
            on_event(PhaseAdvanced(done=done))
    processes.wait()
    # What other processes have added.
    cache = open_cache(settings, clips, model_hash=work.model_hash, dtype=dtype)
    source = SampleSource(settings, clips, None, cache)
    if settings.validate_every:
        pipeline = pipeline or load()
        return source, pipeline, pipeline.transformer
    if pipeline is not None:
        return source, None, pipeline.transformer
    if processes.shard_weights:  # what is shared out goes to its device part by part
        return source, None, weights.load_transformer(work.source, torch.device("cpu"), dtype)
    return (
        source,
        None,
        weights.load_shared_transformer(work.source, [], device, dtype, placement=placement),
    )


def _validation(work: _Work, pipeline: AnimatePipeline | None) -> Validate:
    """What renders the validation video; only called with `validate_every`."""
    settings = work.settings
    if not settings.validate_every:
        return _never
    assert pipeline is not None
    assert work.validation is not None
    clip = work.validation
    prompt_embeds = pipeline.encode_prompt(clip_prompt(settings, clip))
    if settings.latent_cache is not None:
        pipeline.release_text_encoder()
    validation = Validation(
        pipeline=pipeline,
        clip=clip,
        settings=settings,
        prompt_embeds=prompt_embeds,
        num_inference_steps=settings.validation_steps or work.source.defaults.num_inference_steps,
        overlap=settings.carry_frames
        if settings.memory == "pixel"
        else work.source.defaults.overlap,
    )

    def validate(path: Path | None) -> dict[str, float]:
        pipeline.transformer.eval()
        try:
            return validation.run(path)
        finally:
            pipeline.transformer.train()

    return validate


def _never(_path: Path | None) -> dict[str, float]:
    raise AssertionError("no validation was asked for")


# --- the loop ------------------------------------------------------------------------------------


class _Training:
    """A network with adapters, its optimiser, and how far they are.

    Attributes:
        step: Steps done, those of earlier runs included.
    """

    def __init__(
        self,
        settings: ResolvedTrainSettings,
        processes: Processes,
        folder: TrainFolder,
        transformer: EverAnimateTransformer3DModel,
        init: Path | None,
        on_event: OnEvent,
    ) -> None:
        self.step = 0
        accelerator = processes.accelerator
        self._settings, self._processes, self._folder = settings, processes, folder
        self._accelerator, self._on_event = accelerator, on_event
        self._schedule = training_schedule(settings.shift)
        self._network_dtype = transformer.dtype
        attach_lora(transformer, rank=settings.rank, alpha=settings.lora_alpha, seed=settings.seed)
        if init is not None:
            load_initial_lora(
                transformer,
                init,
                label=f"--init {settings.init}",
                rank=settings.rank,
                alpha=settings.lora_alpha,
            )
        if settings.gradient_checkpointing != "off":
            transformer.enable_gradient_checkpointing()
        last = processes.of_main(lambda: max(folder.checkpoints(), default=0))
        kept = self._read_checkpoint(last) if last else {}
        if last:
            # Before the weights are shared out, as long as each process holds them whole.
            write_adapters(transformer, _part(kept, "lora"))
        _compute_in(transformer, accelerator.device, in_bf16=processes.in_bf16)
        if settings.compile:
            for block in transformer.blocks:
                block.compile()
        transformer.train()
        self.transformer = transformer
        if processes.uses_fsdp:
            # Not by accelerate: it would round what has to stay float32, and split the network at
            # other places.
            shard_network(transformer, accelerator.device, offload=processes.offload_weights)
        elif processes.count > 1 and processes.zero_stage is None:
            ignore_frozen_weights(transformer)
        optimizer = torch.optim.AdamW(
            lora_parameters(transformer).values(),
            lr=settings.lr,
            weight_decay=settings.weight_decay,
        )
        self._network: Any = transformer
        self._optimizer: Any = optimizer
        if not processes.uses_fsdp:
            self._network, self._optimizer = processes.prepare(transformer, optimizer)
        self._adapters = AdapterState(self._network, self._optimizer)
        if processes.zero_stage is not None:
            self._adapters = ZeroAdapterState(
                self._network, self._optimizer, stage=processes.zero_stage
            )
        self._adapters.load_moments(kept, last)
        self._average: dict[str, Tensor] = {}
        if settings.ema is not None:
            self._average = _part(kept, "ema") or self._adapters.weights()
        self.step = last

    def run(self, source: SampleSource, validate: Validate) -> None:
        """Make the steps that are missing."""
        settings, processes = self._settings, self._processes
        # Killed between a checkpoint and the look at it, which takes longer.
        is_unseen = self._is_validated() and processes.of_main(self._lacks_validation)
        if self.step >= settings.steps and not is_unseen:
            return
        with ExitStack() as stack:
            log = None
            with processes.stopping_together():
                if processes.is_main:
                    log = _Log(self._folder, self.step, self._on_event, board=settings.tensorboard)
                    stack.callback(log.close)
            if is_unseen:
                self._validate(validate, log)
            if self.step < settings.steps:
                self._on_event(Note(text=self._describe()))
            interrupted = stack.enter_context(_polite_interrupt(self._on_event))
            while self.step < settings.steps:
                started_s = time.monotonic()
                row = self._advance(source)
                seconds = time.monotonic() - started_s
                with processes.stopping_together():
                    if log is not None:
                        log.write(row | {"seconds": round(seconds, 4)}, "training")
                self._on_event(
                    TrainStep(
                        step=self.step,
                        num_steps=settings.steps,
                        loss=row["loss"],
                        learning_rate=row["learning_rate"],
                        seconds=seconds,
                        peak_memory_mib=peak_memory_mib(self._accelerator.device),
                    )
                )
                stops = processes.any(interrupted.is_set())
                is_last = self.step == settings.steps
                if stops or is_last or self.step % settings.checkpoint_every == 0:
                    self._save()
                if stops:
                    raise processes.joint(KeyboardInterrupt())
                if self._is_validated():
                    self._validate(validate, log)

    def _is_validated(self) -> bool:
        """Whether a validation belongs to the step just made."""
        every = self._settings.validate_every
        return every > 0 and self.step > 0 and self.step % every == 0

    def _lacks_validation(self) -> bool:
        """Whether the log knows of none for this step."""
        rows = read_metrics(self._folder.metrics_path, self.step)
        return not any(row["step"] == self.step and "validation" in row for row in rows)

    def _validate(self, validate: Validate, log: _Log | None) -> None:
        """Render a validation; every process must call it."""
        path = self._folder.validation_path(self.step)
        with self._stopping_together():
            figures = validate(path if self._processes.is_main else None)
            if log is not None:
                log.write({"step": self.step} | figures, "validation")
            self._on_event(Note(text=_describe_validation(self.step, figures)))

    def _advance(self, source: SampleSource) -> dict[str, Any]:
        """One step of the optimiser; what the log says of it."""
        settings, accelerator = self._settings, self._accelerator
        learning_rate = settings.lr * min(1.0, (self.step + 1) / (settings.warmup + 1))
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        processes, batch_size = accelerator.num_processes, settings.batch_size
        first = self.step * processes * settings.accumulate * batch_size
        losses = []
        norm = math.nan
        for micro_step in range(settings.accumulate):
            # As many processes with one micro step each see the same samples as one with many.
            offset = (micro_step * processes + accelerator.process_index) * batch_size
            indices = range(first + offset, first + offset + batch_size)
            with self._stopping_together():
                batch, points = _stack([source.example(index) for index in indices])
            with accelerator.accumulate(self._network):
                with self._saving():
                    loss = self._loss(batch, points)
                accelerator.backward(loss)
                losses.append(loss.detach())
                if not accelerator.sync_gradients:
                    continue
                mean_loss = self._mean(torch.stack(losses))
                # DeepSpeed has cut the gradient and made its step by now; it tells the norm.
                norm = accelerator.clip_grad_norm_(
                    lora_parameters(self._network).values(), settings.max_grad_norm
                )
                norm = float(gather(torch.as_tensor(norm)))
                self._check_finite(mean_loss, norm)
                self._optimizer.step()
                self._optimizer.zero_grad()
        self.step += 1
        self._follow()
        return {
            "step": self.step,
            "loss": mean_loss,
            "learning_rate": learning_rate,
            "grad_norm": norm,
        }

    def _loss(self, batch: TrainingExample, points: Tensor) -> Tensor:
        """Weighted error of the velocity, the mean over a batch."""
        settings, schedule, device = self._settings, self._schedule, self._accelerator.device
        sigma = schedule.sigmas[points]
        pair = training_pair(
            batch.clean_latents.to(device),
            batch.noise.to(device),
            sigma,
            endpoint_latents=batch.endpoint_latents.to(device),
            weight=correction_weight(settings.correction, schedule, points),
        )
        network_input = torch.cat([pair.noisy_latents, batch.condition.to(device)], dim=1)
        with torch.no_grad():
            pose_embeds = self.transformer.embed_pose(batch.pose_latents)
        prediction = self._network(
            network_input,
            model_timestep(sigma, self._network_dtype, as_stock=settings.memory == "pixel"),
            batch.prompt_embeds.to(device),
            batch.clip_embeds.to(device),
            pose_embeds,
            batch.face_tokens.to(device),
        )
        return velocity_loss(prediction, pair.target, schedule.loss_weights[points])

    def _stopping_together(self) -> AbstractContextManager[None]:
        """For blocks in which the network or its encoders compute."""
        # Processes that share the weights wait for each other within: one that fails must end.
        shares = self._processes.shard_weights
        return nullcontext() if shares else self._processes.stopping_together()

    def _saving(self) -> Any:
        """Where activations wait for the backward pass."""
        if self._settings.gradient_checkpointing != "offload":
            return nullcontext()
        pinned = self._accelerator.device.type == "cuda"
        return torch.autograd.graph.save_on_cpu(pin_memory=pinned)

    def _mean(self, losses: Tensor) -> float:
        """Over micro steps and processes."""
        return float(self._accelerator.gather(losses.float().mean()[None]).mean())

    def _check_finite(self, loss: float, norm: float) -> None:
        """Stop before a broken gradient reaches the weights."""
        if math.isfinite(loss) and math.isfinite(norm):
            return
        steps = self._folder.checkpoints()
        kept = f"The checkpoint of step {steps[-1]} is good" if steps else "There is no checkpoint"
        raise self._processes.joint(
            RunError(
                f"the loss of step {self.step + 1} is {loss:g} with a gradient of {norm:g}. "
                f"{kept}. Give a smaller --lr and another --output."
            )
        )

    def _follow(self) -> None:
        """Move the average towards the weights."""
        if self._settings.ema is None:
            return
        # A short training must not be held back by its start.
        decay = min(self._settings.ema, (1 + self.step) / (10 + self.step))
        for key, value in self._adapters.weights().items():
            self._average[key].lerp_(value, 1 - decay)

    # --- state ---

    def _save(self) -> None:
        """Write a checkpoint; every process must call it."""
        tensors = {f"lora/{key}": value for key, value in self._adapters.weights().items()}
        tensors |= {f"ema/{key}": value for key, value in self._average.items()}
        tensors |= self._adapters.moments()
        with self._processes.stopping_together():
            if self._processes.is_main:
                save_checkpoint(self._folder, self.step, tensors)
                self._folder.drop_checkpoints(self._settings.keep_checkpoints)

    def _read_checkpoint(self, step: int) -> dict[str, Tensor]:
        """All tensors of a checkpoint; every process must call it."""
        with self._processes.stopping_together():
            return load_checkpoint(self._folder, step)

    def finish(self, record: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
        """Write the result in the main process; every process must call it.

        Returns:
            Further facts.
        """
        settings, folder = self._settings, self._folder
        adapters = self._average or self._adapters.weights()
        if not self._processes.is_main:
            return {}
        rows = read_metrics(folder.metrics_path, self.step)
        losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        found: dict[str, Any] = {"step": self.step}
        if losses:  # unless somebody has deleted the log
            plot_losses(folder.plot_path, losses)
            last = [loss for _, loss in losses[-max(1, round(_LOSS_SHARE * len(losses))) :]]
            found["mean_loss_at_end"] = round(sum(last) / len(last), 6)
            found["loss_curve"] = str(folder.plot_path)
        validations = [row["validation"] for row in rows if "validation" in row]
        if validations:
            found["validation"] = validations[-1]
        write_json(folder.record_path, record | {"result": facts | found})
        save_lora(
            folder.lora_path,
            adapters,
            strength=settings.lora_alpha / settings.rank,
            naming=settings.export,
            dtype=self._network_dtype,
            metadata={
                "format": "pt",
                "rank": str(settings.rank),
                "stage": str(settings.stage),
                "base": settings.model,
                "step": str(self.step),
                "settings": json.dumps(settings.to_json(), ensure_ascii=False),
            },
        )
        return found

    def _describe(self) -> str:
        start = f" from step {self.step}" if self.step else ""
        count = sum(value.numel() for value in lora_parameters(self._network).values())
        return f"training {count / 1e6:.1f} million weights{start} to step {self._settings.steps}"


class _Log:
    """The log on disk and, where it is installed, TensorBoard's."""

    def __init__(self, folder: TrainFolder, step: int, on_event: OnEvent, *, board: bool) -> None:
        self._metrics = MetricsLog(folder.metrics_path, step)
        self._board: Any = None
        if board and find_spec("tensorboard") is None:
            on_event(Note(text="no TensorBoard logs: install everanimate[train] to have them"))
        elif board:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  # optional, slow

            folder.tensorboard_path.mkdir(exist_ok=True)
            self._board = SummaryWriter(str(folder.tensorboard_path), purge_step=step + 1)

    def write(self, row: dict[str, Any], group: str) -> None:
        """Append numbers of a step; TensorBoard shows them as `group/name`."""
        step = row["step"]
        numbers = {name: value for name, value in row.items() if name != "step"}
        self._metrics.write({"step": step, group: numbers} if group == "validation" else row)
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        """Close both."""
        self._metrics.close()
        if self._board is not None:
            self._board.close()


@contextmanager
def _polite_interrupt(on_event: OnEvent) -> Iterator[threading.Event]:
    """Let Ctrl-C end the training after the step at work; a second one ends it at once."""
    asked = threading.Event()

    def ask(_signal: int, _frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        on_event(Note(text="stopping after this step; press Ctrl-C again to stop at once"))

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not the main thread, which no Ctrl-C reaches
        yield asked
        return
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _compute_in(
    transformer: EverAnimateTransformer3DModel, device: torch.device, *, in_bf16: bool
) -> None:
    """Let the network compute in the precision of the training, and nothing else.

    Not the VAE of a validation, then, which is float32 in `animate` too. Nor the time embedding:
    sampling computes it in float32. The other layers that diffusers keeps in float32 compute there
    by themselves.
    """
    for layer in transformer.modules():
        if in_bf16 and hasattr(layer, "compute_dtype"):  # bitsandbytes' take no notice of autocast
            layer.compute_dtype = torch.bfloat16
    mixed = torch.autocast(device.type, dtype=torch.bfloat16, enabled=in_bf16)
    for name in ("forward", "embed_pose"):
        setattr(transformer, name, mixed(getattr(transformer, name)))
    embedder = transformer.condition_embedder.time_embedder
    if embedder.linear_1.weight.dtype == torch.float32:
        plain = torch.autocast(device.type, enabled=False)
        embedder.forward = plain(embedder.forward)


def _part(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Those of one kind in a checkpoint, by the names of the adapters' matrices."""
    prefix = f"{kind}/"
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _stack(examples: Sequence[TrainingExample]) -> tuple[TrainingExample, Tensor]:
    """A batch, and the points of the schedule [B]."""
    tensors = {
        item.name: torch.cat([getattr(example, item.name) for example in examples])
        for item in fields(TrainingExample)
        if item.name != "step_index"
    }
    batch = TrainingExample(**tensors, step_index=examples[0].step_index)
    return batch, torch.tensor([example.step_index for example in examples])


def _describe_validation(step: int, figures: dict[str, float]) -> str:
    parts = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in figures.items())
    return f"validation after step {step}: {parts}"
