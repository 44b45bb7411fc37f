"""What makes sampling faster, by name: attention kernels, the step cache, the fast preset.

Names and what each of them needs; whether it is there is found out without loading anything.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from everanimate_cli.errors import SettingsError

Attention = Literal[
    "auto",
    "sdpa",
    "sdpa-math",
    "sdpa-flash",
    "sdpa-efficient",
    "sdpa-cudnn",
    "flash",
    "flash3",
    "sage",
]
StepCacheKind = Literal["off", "mag"]

# Error that may gather over skipped steps, as a share of the blocks' update: see `step_cache`.
STEP_CACHE_THRESHOLD = 0.12


@dataclass(frozen=True, kw_only=True)
class AttentionKernel:
    """One way to compute attention.

    Attributes:
        backend: diffusers' name, of `AttentionBackendName`.
        package: Module that must be installed; "" for torch's own.
        install: How it is installed.
        devices: Where it runs.
        capability: Least compute capability of a CUDA card.
        half_only: Whether it takes bfloat16 and float16 only.
        exact: Whether it rounds only as others do. One that quantises queries and keys serves self
            attention alone, which is nearly all of the work; the few tokens of text, image and face
            would lose and not gain.
    """

    backend: str
    package: str = ""
    install: str = ""
    devices: tuple[str, ...] = ("cuda",)
    capability: tuple[int, int] = (0, 0)
    half_only: bool = True
    exact: bool = True


KERNELS: dict[str, AttentionKernel] = {
    "sdpa": AttentionKernel(backend="native", devices=("cuda", "mps", "cpu"), half_only=False),
    "sdpa-math": AttentionKernel(
        backend="_native_math", devices=("cuda", "mps", "cpu"), half_only=False
    ),
    "sdpa-flash": AttentionKernel(
        backend="_native_flash", devices=("cuda", "cpu"), capability=(8, 0)
    ),
    "sdpa-efficient": AttentionKernel(
        backend="_native_efficient", capability=(5, 0), half_only=False
    ),
    "sdpa-cudnn": AttentionKernel(backend="_native_cudnn", capability=(8, 0)),
    "flash": AttentionKernel(
        backend="flash",
        package="flash_attn",
        install="pip install flash-attn --no-build-isolation",
        capability=(8, 0),
    ),
    "flash3": AttentionKernel(
        backend="_flash_3",
        package="flash_attn_interface",
        install="build the folder `hopper` of github.com/Dao-AILab/flash-attention",
        capability=(9, 0),
    ),
    "sage": AttentionKernel(
        backend="sage",
        package="sageattention",
        install="pip install sageattention --no-build-isolation (2.1.1 or later)",
        capability=(8, 0),
        exact=False,
    ),
}


def check_installed(attention: Attention) -> None:
    """Refuse an attention kernel whose package is missing.

    Raises:
        SettingsError: With the command that installs it.
    """
    kernel = KERNELS.get(attention)
    if kernel is not None and kernel.package and find_spec(kernel.package) is None:
        raise SettingsError(
            f"--attention {attention} needs the package {kernel.package}, which is not installed. "
            f"To install it: {kernel.install}. Or give auto, which takes what is there."
        )
