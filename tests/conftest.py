"""For all tests: one thread, which is fastest for small tensors and sums alike anywhere."""

import os
from collections.abc import Iterator

import pytest
from hub_server import Hub, serve

# Before torch is imported; processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what programs cache out of the user's folders, unless one is given for it."""
    with pytest.MonkeyPatch.context() as patch:
        if "EVERANIMATE_CACHE" not in os.environ:
            patch.setenv("EVERANIMATE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def hub_server() -> Iterator[tuple[str, list[Hub]]]:
    """Address of a server, and the Hub that it answers for."""
    current: list[Hub] = []
    with serve(current) as address:
        yield address, current
