"""The processes that `torchrun` starts for one video, as its variables tell of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from everanimate_cli.errors import SettingsError
from everanimate_cli.settings import AnimateSettings

_COMMAND = "torchrun --nproc-per-node 2 -m everanimate_cli animate ..."


@dataclass(frozen=True, kw_only=True)
class Launch:
    """This process among those that were started together.

    Attributes:
        rank: From 0; process 0 is the main one, which writes and reports.
        count: How many there are.
        local_rank: Among those of this machine.
        local_count: How many this machine has.
    """

    rank: int
    count: int
    local_rank: int
    local_count: int

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0


def read_launch(environ: Mapping[str, str]) -> Launch | None:
    """Who this process is; None where it is the only one.

    Args:
        environ: Variables of the process. Those of another launcher than torchrun are not enough:
            clusters set some of them for single processes too.
    """
    if "TORCHELASTIC_RUN_ID" not in environ or int(environ["WORLD_SIZE"]) == 1:
        return None
    return Launch(
        rank=int(environ["RANK"]),
        count=int(environ["WORLD_SIZE"]),
        local_rank=int(environ["LOCAL_RANK"]),
        local_count=int(environ["LOCAL_WORLD_SIZE"]),
    )


def check_launch(settings: AnimateSettings, launch: Launch | None) -> None:
    """Refuse options that need other processes where there are none.

    Raises:
        SettingsError: Naming the option.
    """
    if launch is not None:
        return
    if settings.parallel != "auto":
        raise SettingsError(
            f"--parallel {settings.parallel} has no effect on one process. "
            f"Start several: {_COMMAND}"
        )
    if settings.spare_rank:
        raise SettingsError(f"--spare-rank has no effect on one process. Start several: {_COMMAND}")
