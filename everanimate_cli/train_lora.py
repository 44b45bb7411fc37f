"""`everanimate train-lora`: persistent latent propagation and restorative flow matching.

One loop for one process and many: accelerate places the network and sums the gradients, everything
random is keyed by the position of a sample, and a checkpoint holds all that changes, so that a
training can be killed at any moment and goes on to the same result.
"""

from __future__ import annotations

import hashlib
import json
import math
import signal
import threading
import time
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from everanimate_cli import hub, weights
from everanimate_cli.errors import RunError, SettingsError
from everanimate_cli.events import Note, OnEvent, PhaseAdvanced, PhaseStarted, TrainStep
from everanimate_cli.images import atomic_path
from everanimate_cli.lora_adapter import (
    attach_lora,
    gather,
    load_initial_lora,
    lora_parameters,
    read_adapters,
    save_lora,
    scatter_like,
    store_blocks_as_fp8,
    write_adapters,
)
from everanimate_cli.loss_plot import plot_losses
from everanimate_cli.objective import correction_weight, training_pair, velocity_loss
from everanimate_cli.pipeline import AnimatePipeline, peak_memory_mib
from everanimate_cli.preflight import output_exists, unfit_size
from everanimate_cli.records import LoraSpec
from everanimate_cli.runs import TrainFolder
from everanimate_cli.schedule import model_timestep, training_schedule
from everanimate_cli.train_settings import ResolvedTrainSettings, TrainSettings, resolve_training
from everanimate_cli.training_clips import TrainingClip, open_clips
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
    from collections.abc import Callable, Iterator, Sequence
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
_ADAM_STATE = ("exp_avg", "exp_avg_sq")
_LOSS_SHARE = 0.1  # of the steps, over which the last loss is told


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a training made, or with `dry_run` what it would do.

    Attributes:
        output: The LoRA file.
        facts: JSON values.
    """

    output: Path
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All of it as one flat JSON object."""
        return {"output": str(self.output), **self.facts}


def train_lora(settings: TrainSettings, on_event: OnEvent) -> TrainResult | None:
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
    with ExitStack() as stack:
        accelerator = stack.enter_context(_processes(settings, device, dtype))
        is_main = accelerator.is_main_process
        report = on_event if is_main else _ignore
        with accelerator.main_process_first():  # downloads, and poses of raw videos
            work = _check(settings, dtype, report)
        resolved = work.settings
        facts = {
            "steps": resolved.steps,
            "samples_per_step": resolved.batch_size
            * resolved.accumulate
            * accelerator.num_processes,
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
            "processes": accelerator.num_processes,
        }
        folder = TrainFolder(resolved.output)
        if resolved.dry_run:
            facts |= _estimate_memory_mib(work, dtype)
            return TrainResult(output=folder.lora_path, facts=facts) if is_main else None
        request = _request(work, facts["samples_per_step"])
        if is_main:
            stack.enter_context(_open_folder(folder, resolved, request))
        accelerator.wait_for_everyone()
        with _memory_errors(resolved):
            source, pipeline, transformer = _prepare(work, accelerator, dtype, report)
            training = _Training(resolved, accelerator, folder, transformer, work.init, report)
            training.run(source, _validation(work, pipeline, accelerator))
            # Before the clean-up, so that a full-size network need not be gathered twice.
            record = {"settings": settings.to_json(), "effective": resolved.to_json()}
            facts |= training.finish(record | {"request": request}, facts)
        accelerator.wait_for_everyone()
    return TrainResult(output=folder.lora_path, facts=facts) if is_main else None


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
    source: weights.ModelSource
    model_hash: str
    init: Path | None
    clips: Sequence[TrainingClip]
    num_rejected: int
    num_pending: int
    validation: TrainingClip | None


@contextmanager
def _processes(
    settings: TrainSettings, device: torch.device, dtype: torch.dtype
) -> Iterator[Accelerator]:
    """This process among those that a launcher has started."""
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=settings.mixed_precision or ("bf16" if dtype == torch.bfloat16 else "no"),
        gradient_accumulation_steps=settings.accumulate,
    )
    try:
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise SettingsError(
                "DeepSpeed's state cannot be stored by train-lora. Launch it with DDP or FSDP2: "
                "what is trained is small, so that ZeRO has nothing to add."
            )
        yield accelerator
    finally:
        accelerator.free_memory()
        # The next call in this process may want another device or precision.
        accelerator.state._reset_state(reset_partial_state=not torch.distributed.is_initialized())


def _check(settings: TrainSettings, dtype: torch.dtype, on_event: OnEvent) -> _Work:
    """Find model and clips, and refuse what does not fit before anything is written."""
    download = not settings.dry_run
    source = hub.locate_model(settings.model, on_event, download=download)
    resolved = resolve_training(settings, source.defaults)
    init = None
    if settings.init is not None:
        init = hub.locate_lora(
            LoraSpec(settings.init), on_event, download=download, option="--init"
        )
    weights.check_checkpoint(source, [] if init is None else [init])
    geometry = weights.read_geometry(source)
    height, width = resolved.height_width
    if height % geometry.size_multiple or width % geometry.size_multiple:
        raise unfit_size((height, width), geometry.size_multiple)
    found = open_clips(resolved, geometry.face_size, on_event)
    model_hash = weights.checkpoint_hash(source)
    if resolved.latent_cache is not None:  # refuses one of another training
        open_cache(resolved, found.clips, model_hash=model_hash, dtype=dtype)
    return _Work(
        settings=resolved,
        source=source,
        model_hash=model_hash,
        init=init,
        clips=found.clips,
        num_rejected=len(found.rejected),
        num_pending=len(found.pending),
        validation=_choose_validation(resolved, found.clips, geometry.face_size, on_event),
    )


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


def _request(work: _Work, num_samples: int) -> dict[str, object]:
    """All that shapes the weights after any step."""
    settings = work.settings
    values: dict[str, object] = {
        name: value for name, value in settings.to_json().items() if name not in _FREE_OPTIONS
    }
    clips = "\n".join(f"{clip.fingerprint} {clip.num_frames} {clip.prompt}" for clip in work.clips)
    # A cache brings samples back in another way than encoding them afresh.
    values["latent_cache"] = settings.latent_cache is not None
    values["samples per step"] = num_samples
    values["model sha256"] = work.model_hash
    values["clips sha256"] = hashlib.sha256(clips.encode()).hexdigest()
    if work.init is not None:
        with work.init.open("rb") as file:
            values["init sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    for package in ("torch", "diffusers", "peft"):
        values[f"{package} version"] = version(package)
    return values


@contextmanager
def _open_folder(
    folder: TrainFolder, settings: ResolvedTrainSettings, request: dict[str, object]
) -> Iterator[None]:
    """Hold the output folder."""
    if not settings.resume and folder.has_result() and not settings.overwrite:
        raise output_exists(folder.lora_path)
    folder.path.parent.mkdir(parents=True, exist_ok=True)
    with open_work(
        folder,
        request,
        label="--output",
        resume=settings.resume,
        overwrite=settings.overwrite,
    ):
        yield


def _estimate_memory_mib(work: _Work, dtype: torch.dtype) -> dict[str, Any]:
    """Weights, counted exactly, and what a step takes beside them, estimated."""
    settings = work.settings
    parts = weights.weights_mib(work.source, dtype)
    height, width = settings.height_width
    step = weights.read_geometry(work.source).training_step_mib(
        height,
        width,
        settings.frames_per_chunk,
        settings.identity_slots,
        dtype=dtype,
        checkpointing=settings.gradient_checkpointing,
    )
    # Without a cache the encoders stay beside the network.
    kept = ["transformer"] if settings.latent_cache is not None else list(parts)
    total = sum(parts[name] for name in kept) + settings.batch_size * step
    return {
        "weights_mib": {name: round(value, 1) for name, value in parts.items()},
        "estimated_memory_mib": round(total),
    }


@contextmanager
def _memory_errors(settings: ResolvedTrainSettings) -> Iterator[None]:
    """Turn running out of a card's memory into a line that says what lowers it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        ways = []
        if settings.gradient_checkpointing != "offload":
            better = "on" if settings.gradient_checkpointing == "off" else "offload"
            ways.append(f"--gradient-checkpointing {better}")
        if settings.latent_cache is None:
            ways.append("--latent-cache DIR, which keeps the encoders out of memory")
        if settings.batch_size > 1:
            ways.append("a smaller --batch-size with more --accumulate")
        ways.append(f"a --size below {settings.size} or fewer --frames-per-chunk")
        raise RunError(
            f"out of memory in training. Give {', or '.join(ways)}; "
            "--dry-run estimates what is needed."
        ) from error


def _prepare(
    work: _Work, accelerator: Accelerator, dtype: torch.dtype, on_event: OnEvent
) -> tuple[SampleSource, AnimatePipeline | None, EverAnimateTransformer3DModel]:
    """Where examples come from, and the networks: all of them, or the one in training alone."""
    settings, clips, device = work.settings, work.clips, accelerator.device

    def load() -> AnimatePipeline:
        return weights.load_pipeline(
            work.source, [], device, dtype, with_image_processor=settings.memory == "pixel"
        )

    if settings.latent_cache is None:
        whole = load()
        return SampleSource(settings, clips, whole, None), whole, whole.transformer
    cache = open_cache(settings, clips, model_hash=work.model_hash, dtype=dtype)
    share = missing_work(
        cache,
        settings,
        clips,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    pipeline: AnimatePipeline | None = None
    if len(share):
        pipeline = load()
        on_event(PhaseStarted(name="latents", total=len(share), unit="samples"))
        for done in fill_cache(cache, share, settings, clips, pipeline):
            on_event(PhaseAdvanced(done=done))
    accelerator.wait_for_everyone()
    # What other processes have added.
    cache = open_cache(settings, clips, model_hash=work.model_hash, dtype=dtype)
    source = SampleSource(settings, clips, None, cache)
    if settings.validate_every:
        pipeline = pipeline or load()
        return source, pipeline, pipeline.transformer
    transformer = (
        weights.load_transformer(work.source, device, dtype)
        if pipeline is None
        else pipeline.transformer
    )
    return source, None, transformer


def _validation(
    work: _Work,
    pipeline: AnimatePipeline | None,
    accelerator: Accelerator,
) -> Validate:
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
            with accelerator.autocast():
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
        accelerator: Accelerator,
        folder: TrainFolder,
        transformer: EverAnimateTransformer3DModel,
        init: Path | None,
        on_event: OnEvent,
    ) -> None:
        self.step = 0
        self._settings, self._accelerator, self._folder = settings, accelerator, folder
        self._on_event = on_event
        self._schedule = training_schedule(settings.shift)
        self._network_dtype = transformer.dtype
        if settings.quantize_base == "fp8":
            store_blocks_as_fp8(transformer)
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
        _keep_float32(transformer, accelerator.device)
        if settings.compile:
            for block in transformer.blocks:
                block.compile()
        transformer.train()
        self.transformer = transformer
        optimizer = torch.optim.AdamW(
            lora_parameters(transformer).values(),
            lr=settings.lr,
            weight_decay=settings.weight_decay,
        )
        self._network, self._optimizer = accelerator.prepare(transformer, optimizer)
        self._average = read_adapters(self._network) if settings.ema is not None else {}
        steps = folder.checkpoints()
        if steps:
            self._restore(steps[-1])

    def run(self, source: SampleSource, validate: Validate) -> None:
        """Make the steps that are missing."""
        settings, accelerator = self._settings, self._accelerator
        if self.step >= settings.steps:
            return
        self._on_event(Note(text=self._describe()))
        with ExitStack() as stack:
            log = None
            if accelerator.is_main_process:
                log = _Log(self._folder, self.step, self._on_event, board=settings.tensorboard)
                stack.callback(log.close)
            interrupted = stack.enter_context(_polite_interrupt(self._on_event))
            while self.step < settings.steps:
                started_s = time.monotonic()
                row = self._advance(source)
                seconds = time.monotonic() - started_s
                if log is not None:
                    log.write(row | {"seconds": round(seconds, 4)}, "training")
                self._on_event(
                    TrainStep(
                        step=self.step,
                        num_steps=settings.steps,
                        loss=row["loss"],
                        learning_rate=row["learning_rate"],
                        seconds=seconds,
                        peak_memory_mib=peak_memory_mib(accelerator.device),
                    )
                )
                stops = self._any(interrupted.is_set())
                is_last = self.step == settings.steps
                if stops or is_last or self.step % settings.checkpoint_every == 0:
                    self._save()
                if stops:
                    raise KeyboardInterrupt
                if settings.validate_every and self.step % settings.validate_every == 0:
                    path = self._folder.validation_path(self.step)
                    figures = validate(path if accelerator.is_main_process else None)
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
            batch, points = _stack([source.example(index) for index in indices])
            with accelerator.accumulate(self._network):
                with accelerator.autocast(), self._saving():
                    loss = self._loss(batch, points)
                accelerator.backward(loss)
                losses.append(loss.detach())
                if not accelerator.sync_gradients:
                    continue
                mean_loss = self._mean(torch.stack(losses))
                norm = float(
                    accelerator.clip_grad_norm_(
                        lora_parameters(self._network).values(), settings.max_grad_norm
                    )
                )
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

    def _saving(self) -> Any:
        """Where activations wait for the backward pass."""
        if self._settings.gradient_checkpointing != "offload":
            return nullcontext()
        pinned = self._accelerator.device.type == "cuda"
        return torch.autograd.graph.save_on_cpu(pin_memory=pinned)

    def _mean(self, losses: Tensor) -> float:
        """Over micro steps and processes."""
        return float(self._accelerator.gather(losses.float().mean()[None]).mean())

    def _any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        if self._accelerator.num_processes == 1:
            return flag
        flags = torch.tensor([flag], dtype=torch.float32, device=self._accelerator.device)
        return bool(self._accelerator.gather(flags).any())

    def _check_finite(self, loss: float, norm: float) -> None:
        """Stop before a broken gradient reaches the weights."""
        if math.isfinite(loss) and math.isfinite(norm):
            return
        steps = self._folder.checkpoints()
        kept = f"The checkpoint of step {steps[-1]} is good" if steps else "There is no checkpoint"
        raise RunError(
            f"the loss of step {self.step + 1} is {loss:g} with a gradient of {norm:g}. {kept}. "
            "Give a smaller --lr."
        )

    def _follow(self) -> None:
        """Move the average towards the weights."""
        if self._settings.ema is None:
            return
        # A short training must not be held back by its start.
        decay = min(self._settings.ema, (1 + self.step) / (10 + self.step))
        for key, parameter in lora_parameters(self._network).items():
            self._average[key].lerp_(gather(parameter), 1 - decay)

    # --- state ---

    def _save(self) -> None:
        """Write a checkpoint; every process must call it."""
        tensors = {f"lora/{key}": value for key, value in read_adapters(self._network).items()}
        tensors |= {f"ema/{key}": value for key, value in self._average.items()}
        for key, parameter in lora_parameters(self._network).items():
            state = self._optimizer.state.get(parameter, {})
            for name in _ADAM_STATE:
                if name in state:
                    tensors[f"{name}/{key}"] = gather(state[name])
        if self._accelerator.is_main_process:
            save_checkpoint(self._folder, self.step, tensors)
            self._folder.drop_checkpoints(self._settings.keep_checkpoints)

    def _restore(self, step: int) -> None:
        """Go on from a checkpoint."""
        tensors = load_checkpoint(self._folder, step)
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            kind, _, key = name.partition("/")
            parts.setdefault(kind, {})[key] = value
        write_adapters(self._network, parts["lora"])
        self._average = parts.get("ema", self._average)
        for key, parameter in lora_parameters(self._network).items():
            if key in parts.get(_ADAM_STATE[0], {}):
                state = {name: scatter_like(parts[name][key], parameter) for name in _ADAM_STATE}
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    **{name: value.clone() for name, value in state.items()},
                }
        self.step = step

    def finish(self, record: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
        """Write the result in the main process; every process must call it.

        Returns:
            Further facts.
        """
        settings, folder = self._settings, self._folder
        adapters = self._average or read_adapters(self._network)
        if not self._accelerator.is_main_process:
            return {}
        rows = read_metrics(folder.metrics_path, self.step)
        losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        plot_losses(folder.plot_path, losses)
        last = [loss for _, loss in losses[-max(1, round(_LOSS_SHARE * len(losses))) :]]
        found: dict[str, Any] = {
            "step": self.step,
            "mean_loss_at_end": round(sum(last) / len(last), 6),
            "loss_curve": str(folder.plot_path),
        }
        validations = [row["validation"] for row in rows if "validation" in row]
        if validations:
            found["validation"] = validations[-1]
        with atomic_path(folder.record_path) as temporary:
            text = json.dumps(record | {"result": facts | found}, ensure_ascii=False, indent=1)
            temporary.write_text(text + "\n", encoding="utf-8")
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


def _keep_float32(transformer: EverAnimateTransformer3DModel, device: torch.device) -> None:
    """Shield the time embedding from autocast: sampling computes it in float32.

    The other layers that diffusers keeps in float32 compute there by themselves.
    """
    embedder = transformer.condition_embedder.time_embedder
    if embedder.linear_1.weight.dtype == torch.float32:
        embedder.forward = torch.autocast(device.type, enabled=False)(embedder.forward)


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
