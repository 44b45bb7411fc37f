"""One pipeline over several processes: the main one has the networks, all share the transformer.

What the networks around the transformer compute (VAE, CLIP, text encoder) is computed once, by the
main process, and what comes of it is given to all before the first step of a chunk. With a spare
rank the main process has no transformer: its memory and time are those of the VAE, which decodes a
chunk while the others sample the next one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from everanimate_cli.animate_processes import Failure, Processes
from everanimate_cli.context_parallel import (
    SharedAttention,
    choose_attention,
    open_mesh,
    share_tokens,
)
from everanimate_cli.errors import EverAnimateError, SettingsError
from everanimate_cli.offloading import is_out_of_memory
from everanimate_cli.pipeline import AnimatePipeline, Conditioning

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from everanimate_cli.settings import Parallel
    from everanimate_cli.step_cache import StepCache
    from everanimate_cli.transformer import EverAnimateTransformer3DModel

    # Loads the transformer of a run on a device; picklable.
    LoadTransformer = Callable[[torch.device], EverAnimateTransformer3DModel]


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How the processes of a run share the transformer; from `plan_sharing`.

    Attributes:
        attention: How self-attention brings tokens together; None for one process.
        ranks: The processes that have the transformer, rising.
    """

    attention: SharedAttention | None
    ranks: tuple[int, ...]

    @property
    def first(self) -> int:
        """The first process that has the transformer."""
        return self.ranks[0]

    @property
    def has_spare_rank(self) -> bool:
        """Whether the main process has no transformer."""
        return self.first != 0

    def describe(self) -> str:
        """Such as "ulysses over 2 processes"."""
        alone = "transformer in one process"
        text = f"{self.attention} over {len(self.ranks)} processes" if self.attention else alone
        return f"{text}, VAE in a spare one" if self.has_spare_rank else text


def plan_sharing(
    wanted: Parallel,
    *,
    count: int,
    spare_rank: bool,
    num_heads: int,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
) -> Sharing:
    """Share the transformer among processes, or refuse.

    Args:
        wanted: `--parallel`.
        count: How many processes were started.
        spare_rank: Whether the main one is left without a transformer.
        num_heads: Of the transformer.
        device: Kind of device.
        dtype: Of the transformer.
        backend: Kernel of its attention, by diffusers' name.

    Raises:
        SettingsError: If it cannot be shared so.
    """
    ranks = tuple(range(int(spare_rank), count))
    if len(ranks) == 1:
        if wanted != "auto":
            raise SettingsError(
                f"--parallel {wanted} with --spare-rank leaves one of {count} processes to the "
                "transformer. Start three or more, or leave one of the two options out."
            )
        return Sharing(attention=None, ranks=ranks)
    attention = choose_attention(
        wanted,
        num_heads=num_heads,
        count=len(ranks),
        device=device,
        dtype=dtype,
        backend=backend,
    )
    return Sharing(attention=attention, ranks=ranks)


# --- what the main process has the others do -----------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Job:
    """Load this, and wait for work."""

    load_transformer: LoadTransformer
    sharing: Sharing
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class _Face:
    """Embed the face crops [F, Hf, Wf, 3] of a chunk, uint8."""

    face_u8: Tensor


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Sample a chunk; what `AnimatePipeline.denoise` takes, but the VAE's code as pose."""

    noise: Tensor
    sigmas: Tensor
    conditioning: Conditioning
    guidance_scale: float
    as_stock: bool
    step_caches: Sequence[StepCache]


# --- the main process ----------------------------------------------------------------------------


@dataclass(kw_only=True)
class ParallelPipeline(AnimatePipeline):
    """The pipeline of the main process; made by `open_shared_pipeline`.

    Attributes:
        processes: All of them.
        sharing: Who has the transformer.
    """

    processes: Processes
    sharing: Sharing

    def embed_pose(self, pose_latents: Tensor) -> Tensor:
        """The code as it is: its embedding is 40 times as large, and each process makes its own."""
        return pose_latents

    @torch.no_grad()
    def embed_face(self, face_u8: NDArray[np.uint8]) -> Tensor:
        """Face tokens of a chunk's face crops [F, Hf, Wf, 3], for all its steps."""
        if not self.sharing.has_spare_rank:
            return super().embed_face(face_u8)
        self.processes.share(_Face(face_u8=torch.from_numpy(face_u8)))
        tokens: Tensor = self.processes.share(None, source=self.sharing.first)
        return tokens

    def denoise(
        self,
        noise: Tensor,
        sigmas: Tensor,
        conditioning: Conditioning,
        *,
        guidance_scale: float = 1.0,
        as_stock: bool = False,
        step_caches: Sequence[StepCache] = (),
    ) -> Iterator[Tensor]:
        """As `AnimatePipeline.denoise`, by all processes; all steps must be taken."""
        chunk = _Chunk(
            noise=noise,
            sigmas=sigmas,
            conditioning=conditioning,
            guidance_scale=guidance_scale,
            as_stock=as_stock,
            step_caches=step_caches,
        )
        self.processes.share(chunk)
        if not self.sharing.has_spare_rank:
            yield from _denoise(self, chunk)
            return
        for _ in range(len(sigmas) - 1):
            yield self.processes.share(None, source=self.sharing.first)
        # What they have measured.
        used_caches = self.processes.share(None, source=self.sharing.first)
        for cache, used in zip(step_caches, used_caches, strict=True):
            vars(cache).update(vars(used))


def open_shared_pipeline(
    processes: Processes,
    sharing: Sharing,
    device: torch.device,
    *,
    load: Callable[[torch.device], AnimatePipeline],
    load_transformer: LoadTransformer,
) -> ParallelPipeline:
    """Load a pipeline whose transformer is shared; in the main process.

    Args:
        processes: Not met yet.
        sharing: From `plan_sharing`.
        device: Kind of device.
        load: Loads the pipeline; with a spare rank its transformer needs no weights.
        load_transformer: What the others load.

    Raises:
        SettingsError: If there are too few cards.
        EverAnimateError: As the two functions.
    """
    own_device = processes.local_device(device)
    processes.join(device.type)
    processes.share(_Job(load_transformer=load_transformer, sharing=sharing, device=device))
    pipeline = load(own_device)
    _share_tokens(pipeline.transformer, processes, sharing, own_device)
    return ParallelPipeline(**vars(pipeline), processes=processes, sharing=sharing)


def _share_tokens(
    transformer: EverAnimateTransformer3DModel,
    processes: Processes,
    sharing: Sharing,
    device: torch.device,
) -> None:
    """Let the transformers of all processes work together; every process must call it."""
    if sharing.attention is None:
        return
    mesh = open_mesh(sharing.attention, sharing.ranks, device)
    if processes.launch.rank in sharing.ranks:
        transformer._parallel = share_tokens(transformer, sharing.attention, mesh, device)


def _denoise(pipeline: AnimatePipeline, chunk: _Chunk) -> Iterator[Tensor]:
    """Sample a chunk in one of the processes that have the transformer."""
    given = chunk.conditioning
    with torch.no_grad():
        pipeline._need("transformer")
        pose_embeds = pipeline.transformer.embed_pose(given.pose_embeds)
    yield from AnimatePipeline.denoise(
        pipeline,
        chunk.noise,
        chunk.sigmas,
        replace(given, pose_embeds=pose_embeds),
        guidance_scale=chunk.guidance_scale,
        as_stock=chunk.as_stock,
        step_caches=chunk.step_caches,
    )


# --- the other processes -------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Transformer(AnimatePipeline):
    """A pipeline of the transformer alone."""

    def __post_init__(self) -> None:
        """Change nothing: the transformer is ready, and there is no other network."""


def serve(processes: Processes) -> None:
    """Compute what the main process asks for until it needs no more; in the others.

    Raises:
        Exception: A bug; all other failures are told by the main process.
    """
    try:
        processes.join()
        job: _Job | None = processes.share(None)
        if job is not None:
            _work(processes, job)
        processes.leave_group()
    except Exception as error:
        if processes.was_stopped():
            return  # its end is what broke
        rank = processes.launch.rank
        if isinstance(error, EverAnimateError):
            failure = Failure(message=str(error), exit_code=error.exit_code)
        elif isinstance(error, RuntimeError) and is_out_of_memory(error):
            text = f"process {rank} has no memory left."
            failure = Failure(message=text, exit_code=1, is_shortage=True)
        else:
            text = f"process {rank} failed: {type(error).__name__}: {error}"
            processes.tell(Failure(message=text, exit_code=1))
            raise
        processes.tell(failure)
        processes.wait_for_stop()


def _work(processes: Processes, job: _Job) -> None:
    """Do one task after the other."""
    device = processes.local_device(job.device)
    transformer = job.load_transformer(device)
    _share_tokens(transformer, processes, job.sharing, device)
    pipeline = _Transformer(
        transformer=transformer,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        image_encoder=None,
        image_processor=None,
        device=device,
    )
    answers = partial(processes.share, source=job.sharing.first)
    has_spare_rank = job.sharing.has_spare_rank
    while (task := processes.share(None)) is not None:
        if isinstance(task, _Face):
            is_asked = processes.launch.rank == job.sharing.first
            answers(pipeline.embed_face(task.face_u8.numpy()) if is_asked else None)
            continue
        for latents in _denoise(pipeline, task):
            if has_spare_rank:
                answers(latents)
        if has_spare_rank:
            answers(task.step_caches)
