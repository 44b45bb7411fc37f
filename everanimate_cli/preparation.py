"""What `animate` decides before it makes anything: inputs, plan, networks and where they go."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everanimate_cli import acceleration, checkpoint, hub, placement, weights
from everanimate_cli.chunks import ChunkPlan
from everanimate_cli.errors import SettingsError
from everanimate_cli.events import Note, OnEvent
from everanimate_cli.generation import segment_writer
from everanimate_cli.hashes import hash_file
from everanimate_cli.inputs import (
    Inputs,
    Media,
    check_media,
    choose_size,
    draw_anchors,
    open_motion,
)
from everanimate_cli.lora import describe_lora
from everanimate_cli.lora_layers import choose_lora_mode
from everanimate_cli.model_folder import ModelSource
from everanimate_cli.parallel_pipeline import Sharing, open_shared_pipeline, plan_sharing
from everanimate_cli.pipeline import AnimatePipeline
from everanimate_cli.records import LoraSpec
from everanimate_cli.runs import RunFolder
from everanimate_cli.settings import (
    AnimateSettings,
    LoraMode,
    ResolvedSettings,
    resolve,
    run_folder,
)
from everanimate_cli.speed_settings import KERNELS

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from everanimate_cli.animate_processes import Processes
    from everanimate_cli.placement_settings import Placement
    from everanimate_cli.speed_settings import Attention
    from everanimate_cli.transformer import EverAnimateTransformer3DModel

# Options that change neither a frame nor a byte of the encoded chunks, and the length, which may
# change between runs.
# How poses were made shows in the pose and face videos, whose content counts.
_FREE_OPTIONS = (
    *("minutes", "seconds", "frames", "output", "device", "audio", "png"),
    *("pose_model", "detector", "person", "select", "retarget", "pose_folder"),
    # What the other choices of a placement come to is in the request by itself.
    *("vram", "offload", "text_device"),
    # Steps, LoRAs and guidance tell what "fast" chose.
    *("concurrent", "fast"),
)


@dataclass(frozen=True, kw_only=True)
class Networks:
    """What is loaded, and how it computes; the same in all processes of a run.

    Attributes:
        source: The checkpoint.
        loras: On top of it.
        lora_mode: From `lora_layers.choose_lora_mode`.
        dtype: Of the networks.
        placement: How they are stored.
        attention: Kernels, from `acceleration.choose_attention`.
        compile: Whether the transformer's blocks are compiled.
        sharing: Which processes have the transformer; None for one process.
    """

    source: ModelSource
    loras: Sequence[tuple[LoraSpec, Path]]
    lora_mode: LoraMode
    dtype: torch.dtype
    placement: Placement
    attention: Attention
    compile: bool
    sharing: Sharing | None

    def load(
        self,
        device: torch.device,
        processes: Processes | None,
        settings: ResolvedSettings,
        offload_folder: Path | None,
    ) -> AnimatePipeline:
        """All that makes frames, with the other processes."""
        load = partial(
            self._load_pipeline,
            with_image_processor=settings.memory == "pixel",
            offload_folder=offload_folder,
        )
        if processes is None or self.sharing is None:
            return load(device)
        return open_shared_pipeline(
            processes, self.sharing, device, load=load, load_transformer=self.load_transformer
        )

    def _load_pipeline(
        self, device: torch.device, *, with_image_processor: bool, offload_folder: Path | None
    ) -> AnimatePipeline:
        without = ["text_encoder"]
        if self.sharing is not None and self.sharing.has_spare_rank:
            without.append("transformer")
        pipeline = weights.load_pipeline(
            self.source,
            self.loras,
            device,
            self.dtype,
            with_image_processor=with_image_processor,
            without=without,
            lora_mode=self.lora_mode,
            placement=self.placement,
            offload_folder=offload_folder,
        )
        self._accelerate(pipeline.transformer)
        return pipeline

    def load_transformer(self, device: torch.device) -> EverAnimateTransformer3DModel:
        """The transformer alone, for another process."""
        transformer = weights.load_shared_transformer(
            self.source,
            self.loras,
            device,
            self.dtype,
            lora_mode=self.lora_mode,
            placement=self.placement,
        )
        self._accelerate(transformer)
        return transformer

    def _accelerate(self, transformer: EverAnimateTransformer3DModel) -> None:
        acceleration.use_attention(transformer, self.attention)
        if self.compile:
            acceleration.compile_blocks(transformer)


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Everything that is decided before a run; nothing is written and no network loaded yet.

    Attributes:
        settings: With the model's defaults.
        media: The pictures, and where the motion is.
        inputs: Opened driving videos; None where poses must be extracted first.
        size: (height, width) of the video.
        face_size: Side of the face crops, pixels.
        chunks: The cut of the video.
        anchors: Frames of chunk 0 that become identity memory.
        device: Where the networks compute.
        networks: What is to be loaded.
        memory: Where it goes.
        run: The run folder, which need not exist.
        facts: What a plan tells, JSON values.
    """

    settings: ResolvedSettings
    media: Media
    inputs: Inputs | None
    size: tuple[int, int]
    face_size: int
    chunks: ChunkPlan
    anchors: list[int]
    device: torch.device
    networks: Networks
    memory: placement.Plan
    run: RunFolder
    facts: dict[str, Any]


def prepare(
    settings: AnimateSettings,
    processes: Processes | None,
    stack: ExitStack,
    on_event: OnEvent,
) -> Preparation:
    """Find and check all that a run needs, and decide how it is done.

    Args:
        settings: Checked options.
        processes: Those that share the transformer; None for this one alone.
        stack: Closes the videos that are opened.
        on_event: Told of downloads, and of what is worth a line.

    Raises:
        EverAnimateError: If an input, option or checkpoint cannot be used.
    """
    media = check_media(settings)  # before the model, which may take hours to download
    device = weights.choose_device(settings.device)
    dtype = weights.choose_dtype(settings.dtype, device)
    attention = acceleration.choose_attention(settings.attention, device, dtype)
    if settings.compile:
        acceleration.check_compile(device)
    download = not settings.dry_run
    source = hub.locate_model(
        settings.model, on_event, download=download, transformer=settings.transformer
    )
    resolved = resolve(settings, source.defaults)
    loras = [(spec, hub.locate_lora(spec, on_event, download=download)) for spec in resolved.lora]
    checkpoint.check_checkpoint(source, [path for _, path in loras])
    lora_mode = choose_lora_mode(resolved.lora_mode, source)
    sizes = placement.read_sizes(source)
    face_size = sizes.geometry.face_size
    size = choose_size(resolved, media.picture_u8, source, sizes.geometry.size_multiple)
    inputs, num_driving, chunks = open_motion(resolved, media, size, face_size, stack, on_event)
    anchors = draw_anchors(resolved, chunks)
    segment_writer(Path(), *size, resolved)  # refuses what no encoder takes
    run = RunFolder(run_folder(resolved.output))
    memory = _plan_memory(resolved, device, dtype, sizes, size, run)
    sharing = None
    if processes is not None:
        sharing = _share(resolved, processes, source, device, dtype, memory.placement, attention)
    if resolved.fast and resolved.lora == source.defaults.lora:
        on_event(
            Note(
                text=f"--fast: no step-distilled LoRA is known for {source.name}, so that "
                f"{resolved.steps} steps instead of {source.defaults.num_inference_steps} "
                "cost quality"
            )
        )
    networks = Networks(
        source=source,
        loras=loras,
        lora_mode=lora_mode,
        dtype=dtype,
        placement=memory.placement,
        attention=attention,
        compile=resolved.compile,
        sharing=sharing,
    )
    return Preparation(
        settings=resolved,
        media=media,
        inputs=inputs,
        size=size,
        face_size=face_size,
        chunks=chunks,
        anchors=anchors,
        device=device,
        networks=networks,
        memory=memory,
        run=run,
        facts={
            "frames": chunks.num_frames,
            "seconds": round(chunks.num_frames / resolved.fps, 3),
            "fps": resolved.fps,
            "size": f"{size[1]}x{size[0]}",
            "chunks": chunks.num_chunks,
            "frames_per_chunk": chunks.frames_per_chunk,
            "overlap": chunks.overlap,
            "steps": resolved.steps,
            "driving_frames": num_driving,
            "model": source.name,
            **({} if source.transformer is None else {"transformer": str(source.transformer)}),
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
            "placement": memory.placement.to_json(),
            "loras": _describe_loras(source, loras, lora_mode),
            "speed": _describe_speed(resolved, attention, sharing),
        },
    )


def make_request(prepared: Preparation, inputs: Inputs) -> dict[str, Any]:
    """Everything that shapes the encoded chunks; a run folder belongs to one such request.

    Where a file lies does not matter, what is in it does.
    """
    settings, facts = prepared.settings, prepared.facts
    loras = prepared.networks.loras
    paths = ("ref", "driving", "pose", "face", "view", "lora", "model", "transformer")
    saved = settings.to_json()
    request = {k: v for k, v in saved.items() if k not in (*_FREE_OPTIONS, *paths)}
    request |= {name: facts[name] for name in ("size", "dtype")}
    request["attention"] = prepared.networks.attention
    request["step_cache_threshold"] = settings.cache_threshold
    request["device type"] = prepared.device.type
    request["--model sha256"] = checkpoint.checkpoint_hash(prepared.networks.source)
    request |= {f"{name} sha256": digest for name, digest in inputs.hashes.items()}
    request["lora_mode"] = prepared.networks.lora_mode if loras else None
    for number, ((spec, path), said) in enumerate(zip(loras, facts["loras"], strict=True), start=1):
        request[f"--lora {number} sha256"] = hash_file(path)
        request[f"alpha of --lora {number}"] = said.get("alpha")  # may stand in a file of its own
        request[f"scale of --lora {number}"] = spec.scale
    names = ("everanimate", "torch", "diffusers", "av")
    request |= {f"{name} version": version(name) for name in names}
    return request | placement.pixel_options(prepared.memory.placement)


def _describe_loras(
    source: ModelSource, loras: Sequence[tuple[LoraSpec, Path]], mode: LoraMode
) -> list[dict[str, Any]]:
    """What is on top of the transformer, and what it says of itself."""
    if not loras:
        return []
    shapes = checkpoint.check_network(source, "transformer")
    return [
        {"source": spec.source, "scale": spec.scale, "mode": mode}
        | describe_lora(path, shapes).to_json()
        for spec, path in loras
    ]


def _share(
    settings: ResolvedSettings,
    processes: Processes,
    source: ModelSource,
    device: torch.device,
    dtype: torch.dtype,
    placed: Placement,
    attention: Attention,
) -> Sharing:
    """How the processes share the transformer, or why they cannot."""
    processes.local_device(device)  # refuses what has too few cards
    if placed.offload == "disk":
        raise SettingsError(
            "--offload disk is for one process: each would write a copy of its own. "
            "Give --offload group, or start one process."
        )
    return plan_sharing(
        settings.parallel,
        count=processes.count,
        spare_rank=settings.spare_rank,
        num_heads=int(checkpoint.full_config(source, "transformer").num_attention_heads),
        device=device,
        dtype=dtype,
        backend=KERNELS[attention].backend,
    )


def _plan_memory(
    settings: ResolvedSettings,
    device: torch.device,
    dtype: torch.dtype,
    sizes: placement.Sizes,
    size: tuple[int, int],
    run: RunFolder,
) -> placement.Plan:
    """Where the networks go on this machine; a begun run keeps what shows in its pixels."""
    num_step_caches = 0
    if settings.step_cache != "off":
        num_step_caches = 1 if settings.guidance_scale == 1 else 2
    job = placement.Job(
        height=size[0],
        width=size[1],
        frames_per_chunk=settings.frames_per_chunk,
        num_identity_slots=settings.identity_slots,
        dtype=dtype,
        num_step_caches=num_step_caches,
    )
    begun = run.read_begun() if settings.resume else None
    return placement.plan_for_machine(settings.placement_options, device, sizes, job, begun=begun)


def _describe_speed(
    settings: ResolvedSettings, attention: str, sharing: Sharing | None
) -> dict[str, str]:
    """What was chosen of all that makes sampling faster."""
    threshold = settings.cache_threshold
    return {
        "steps": f"{settings.steps}{' by --fast' if settings.fast else ''}",
        "guidance": "off" if settings.guidance_scale == 1 else f"{settings.guidance_scale:g}",
        "attention": attention,
        "compile": "on" if settings.compile else "off",
        "step_cache": "off" if threshold is None else f"{settings.step_cache} {threshold:g}",
        **({} if sharing is None else {"parallel": sharing.describe()}),
    }
