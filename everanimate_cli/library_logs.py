"""Keep diffusers, transformers and huggingface_hub off stderr, which is the console's."""

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the libraries from drawing bars and logging on stderr, which is the console's."""
    drawing = [
        library
        for library in (diffusers_logging, transformers_logging)
        if library.is_progress_bar_enabled()
    ]
    libraries = (diffusers_logging, transformers_logging, hub_logging)
    before = [library.get_verbosity() for library in libraries]
    try:
        for library in drawing:
            library.disable_progress_bar()
        for library in libraries:
            library.set_verbosity_error()
        yield
    finally:
        for library, verbosity in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
        for library in drawing:
            library.enable_progress_bar()
