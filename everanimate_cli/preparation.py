"""What `animate` decides before it makes anything: inputs, plan, networks and where they go."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everanimate_cli import (
    acceleration,
    cached_models,
    checkpoint,
    hub,
    placement,
    weights,
)
from everanimate_cli.chunks import ChunkPlan
from everanimate_cli.errors import SettingsError
from everanimate_cli.events import Note, OnEvent
from everanimate_cli.generation import segment_writer
from everanimate_cli.hashes import hash_file
from everanimate_cli.hub_transfer import amount, free_bytes
from everanimate_cli.inputs import (
    Inputs,
    Media,
    check_media,
    choose_size,
    draw_anchors,
    open_motion,
)
from everanimate_cli.lora import LORA_TARGET_PATTERN, describe_lora, plan_lora
from everanimate_cli.lora_layers import choose_lora_mode, list_ranks, update_shapes
from everanimate_cli.model_folder import ModelSource
from everanimate_cli.model_table import POSE_MODELS
from everanimate_cli.parallel_pipeline import Sharing, open_shared_pipeline, plan_sharing
from everanimate_cli.pipeline import AnimatePipeline
from everanimate_cli.preflight import default_pose_folder
from everanimate_cli.records import LoraSpec
from everanimate_cli.runs import RunFolder
from everanimate_cli.settings import (
    HUB_MODEL,
    HUB_PRESET,
    AnimateSettings,
    LoraMode,
    ModelDefaults,
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
class Located:
    """The checkpoint and the LoRAs of a run, as far as they are on this machine.

    Attributes:
        source: The checkpoint; None in a dry run with the released base, if that is missing.
        defaults: What it was trained for.
        sizes: Of its networks.
        settings: With these defaults.
        loras: On top of it; without a file those that are missing in a dry run.
        lora_mode: From `lora_layers.choose_lora_mode`.
        missing: What would be downloaded.
    """

    source: ModelSource | None
    defaults: ModelDefaults
    sizes: placement.Sizes
    settings: ResolvedSettings
    loras: Sequence[tuple[LoraSpec, Path | None]]
    lora_mode: LoraMode
    missing: Sequence[hub.Asset]

    @property
    def files(self) -> list[tuple[LoraSpec, Path]]:
        """The LoRAs that are here."""
        return [(spec, path) for spec, path in self.loras if path is not None]

    def sizes_with_loras(self) -> placement.Sizes:
        """The same with what LoRAs beside the weights take.

        Of a missing one that is known the rank counts, of any other nothing.
        """
        if self.lora_mode == "fused" or not self.loras:
            return self.sizes
        shapes = self.sizes.shapes["transformer"]
        files = [(path, spec.scale) for spec, path in self.files]
        ranks = list_ranks(files, shapes, self.sizes.packed)
        for spec, path in self.loras:
            known = hub.known_lora(spec.source) if path is None else None
            if known is not None:
                image = r"|blocks\.\d+\.attn2\.add_[kv]_proj" if known.has_image_layers else ""
                target = re.compile(rf"({LORA_TARGET_PATTERN}{image})\.weight")
                for key in filter(target.fullmatch, shapes):
                    ranks[key] = ranks.get(key, 0) + known.rank
        transformer = {**shapes, **update_shapes(ranks, shapes)}
        return replace(self.sizes, shapes={**self.sizes.shapes, "transformer": transformer})


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
        networks: What is to be loaded; None in a dry run in which files are missing.
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
    networks: Networks | None
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
    # A plan can be made where there is no card: on a login node, or before one is bought.
    is_for_absent_card = (
        settings.dry_run
        and settings.vram != "auto"
        and settings.device == "auto"
        and device.type != "cuda"
    )
    target = placement.ABSENT_CARD if is_for_absent_card else device
    dtype = weights.choose_dtype(settings.dtype, target)
    if is_for_absent_card:  # what it can do is not known
        attention: Attention = "sdpa" if settings.attention == "auto" else settings.attention
    else:
        attention = acceleration.choose_attention(settings.attention, device, dtype)
        if settings.compile:
            acceleration.check_compile(device)
    located = _locate(settings, on_event)
    resolved, sizes = located.settings, located.sizes
    face_size = sizes.geometry.face_size
    size = choose_size(resolved, media.picture_u8, located.defaults, sizes.geometry.size_multiple)
    inputs, num_driving, chunks = open_motion(resolved, media, size, face_size, stack, on_event)
    anchors = draw_anchors(resolved, chunks)
    segment_writer(Path(), *size, resolved)  # refuses what no encoder takes
    run = RunFolder(run_folder(resolved.output))
    if not is_for_absent_card:
        geometry = sizes.geometry
        acceleration.check_scores(
            attention,
            device,
            dtype,
            num_heads=geometry.num_heads // (1 if processes is None else processes.count),
            num_tokens=geometry.count_tokens(
                *size, chunks.frames_per_chunk, resolved.identity_slots
            ),
        )
    memory = _plan_memory(resolved, target, dtype, located.sizes_with_loras(), size, run, processes)
    if is_for_absent_card:
        on_event(Note(text=f"no CUDA card is here: planned for one of {resolved.vram} GB"))
    sharing = None
    if processes is not None:
        sharing = _share(resolved, processes, sizes, device, dtype, memory.placement, attention)
    if resolved.fast and resolved.lora == located.defaults.lora:
        on_event(
            Note(
                text=f"--fast: no step-distilled LoRA is known for {resolved.model}, so that "
                f"{resolved.steps} steps instead of {located.defaults.num_inference_steps} "
                "cost quality"
            )
        )
    networks = None
    if located.source is not None and not located.missing:
        networks = Networks(
            source=located.source,
            loras=located.files,
            lora_mode=located.lora_mode,
            dtype=dtype,
            placement=memory.placement,
            attention=attention,
            compile=resolved.compile,
            sharing=sharing,
        )
    facts = {
        "frames": chunks.num_frames,
        "seconds": round(chunks.num_frames / resolved.fps, 3),
        "fps": resolved.fps,
        "size": f"{size[1]}x{size[0]}",
        "chunks": chunks.num_chunks,
        "frames_per_chunk": chunks.frames_per_chunk,
        "overlap": chunks.overlap,
        "steps": resolved.steps,
        "driving_frames": num_driving,
        "model": resolved.model,
        **({} if resolved.transformer is None else {"transformer": str(resolved.transformer)}),
        "device": str(target),
        "dtype": str(dtype).removeprefix("torch."),
        "placement": memory.placement.to_json(),
        "loras": _describe_loras(located),
        "speed": _describe_speed(resolved, attention, sharing),
    }
    if resolved.dry_run:
        facts |= _describe_downloads(located, media, on_event)
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
        facts=facts,
    )


def _locate(settings: AnimateSettings, on_event: OnEvent) -> Located:
    """Find and check the checkpoint and the LoRAs, downloading them but in a dry run."""
    missing: list[hub.Asset] = []
    source, defaults = None, HUB_PRESET
    try:
        source = hub.locate_model(
            settings.model,
            on_event,
            download=not settings.dry_run,
            transformer=settings.transformer,
        )
        defaults = source.defaults
    except hub.AbsentError as error:
        if error.asset.hub_id.repository != HUB_MODEL:  # of any other model nothing is known
            raise
        missing.append(error.asset)
    resolved = resolve(settings, defaults)
    loras: list[tuple[LoraSpec, Path | None]] = []
    for spec in resolved.lora:
        try:
            path = hub.locate_lora(spec, on_event, download=not settings.dry_run)
        except hub.AbsentError as error:
            if not error.asset.hub_id.path:  # names no file
                raise
            missing.append(error.asset)
            path = None
        loras.append((spec, path))
    files = [path for _, path in loras if path is not None]
    if source is None:
        sizes = placement.released_sizes()
        # Its weights come in 32 bits.
        lora_mode = "fused" if resolved.lora_mode == "auto" else resolved.lora_mode
        if settings.transformer is not None:
            released = ModelSource(
                folder=Path(),
                defaults=defaults,
                name=settings.model,
                transformer=settings.transformer,
                known_configs=placement.RELEASED_CONFIGS,
            )
            checkpoint.check_network(released, "transformer")
            sizes = replace(sizes, packed=checkpoint.packed_weights(released))
            lora_mode = choose_lora_mode(resolved.lora_mode, released)
        for path in files:
            plan_lora(path, sizes.shapes["transformer"])
    else:
        checkpoint.check_checkpoint(source, files)
        sizes = placement.read_sizes(source)
        lora_mode = choose_lora_mode(resolved.lora_mode, source)
    return Located(
        source=source,
        defaults=defaults,
        sizes=sizes,
        settings=resolved,
        loras=loras,
        lora_mode=lora_mode,
        missing=missing,
    )


def _describe_downloads(located: Located, media: Media, on_event: OnEvent) -> dict[str, Any]:
    """What a run would download first, and the command that does so beforehand."""
    settings = located.settings
    pose_models: list[str] = []
    if media.raw is not None:
        folder = settings.pose_folder or default_pose_folder(settings.output, media.raw)
        name = settings.pose_model or located.defaults.pose_model
        if not (folder / "extract.json").exists():
            detector = POSE_MODELS[name].detector if name in POSE_MODELS else ""
            pose_models = [name, settings.detector or detector]
    lacks = cached_models.find_lacks(located.missing, pose_models)
    if not lacks:
        return {"downloads": []}
    from_hub = {asset.name for asset in located.missing}
    num_bytes = sum(lack.num_bytes or 0 for lack in lacks if lack.name in from_hub)
    if num_bytes > free_bytes():
        on_event(
            Note(
                text=f"the downloads take {amount(num_bytes)}, but the disk of the cache has "
                f"{amount(free_bytes())} free: set HF_HOME to a folder on a larger one"
            )
        )
    return {
        "downloads": [lack.to_json() for lack in lacks],
        "download_command": hub.pull_command(
            [lack.name for lack in lacks],
            # Of a model that is here nothing is downloaded.
            without_transformer=settings.transformer is not None and located.source is None,
        ),
    }


def make_request(prepared: Preparation, networks: Networks, inputs: Inputs) -> dict[str, Any]:
    """Everything that shapes the encoded chunks; a run folder belongs to one such request.

    Where a file lies does not matter, what is in it does.
    """
    settings, facts = prepared.settings, prepared.facts
    loras = networks.loras
    paths = ("ref", "driving", "pose", "face", "view", "lora", "model", "transformer")
    saved = settings.to_json()
    request = {k: v for k, v in saved.items() if k not in (*_FREE_OPTIONS, *paths)}
    request |= {name: facts[name] for name in ("size", "dtype")}
    request["attention"] = networks.attention
    request["step_cache_threshold"] = settings.cache_threshold
    request["device type"] = prepared.device.type
    request["--model sha256"] = checkpoint.checkpoint_hash(networks.source)
    request |= {f"{name} sha256": digest for name, digest in inputs.hashes.items()}
    request["lora_mode"] = networks.lora_mode if loras else None
    for number, ((spec, path), said) in enumerate(zip(loras, facts["loras"], strict=True), start=1):
        request[f"--lora {number} sha256"] = hash_file(path)
        request[f"alpha of --lora {number}"] = said.get("alpha")  # may stand in a file of its own
        request[f"scale of --lora {number}"] = spec.scale
    names = ("everanimate", "torch", "diffusers", "av")
    request |= {f"{name} version": version(name) for name in names}
    return request | placement.pixel_options(prepared.memory.placement)


def _describe_loras(located: Located) -> list[dict[str, Any]]:
    """What is on top of the transformer, and what it says of itself."""
    shapes = located.sizes.shapes["transformer"]
    described = []
    for spec, path in located.loras:
        facts = {"source": spec.source, "scale": spec.scale, "mode": located.lora_mode}
        known = hub.known_lora(spec.source)
        if path is not None:
            facts |= describe_lora(path, shapes).to_json()
        elif known is not None:
            facts["rank"] = known.rank
        described.append(facts)
    return described


def _share(
    settings: ResolvedSettings,
    processes: Processes,
    sizes: placement.Sizes,
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
        num_heads=sizes.geometry.num_heads,
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
    processes: Processes | None,
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
    if device is placement.ABSENT_CARD:
        return placement.plan_for_absent_card(settings.placement_options, sizes, job)
    begun = run.read_begun() if settings.resume else None
    return placement.plan_for_machine(
        settings.placement_options,
        device,
        sizes,
        job,
        begun=begun,
        num_sharing=1 if processes is None else processes.launch.local_count,
    )


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
