"""The error classes and their exit codes."""


class EverAnimateError(Exception):
    """What a user can mend; the message is one line that says what to do.

    A bug is any other exception and keeps its trace.
    """

    exit_code = 1


class RunError(EverAnimateError):
    """The work failed half-way (disk full, device lost); what was finished can be resumed."""


class InputError(EverAnimateError):
    """An input is missing, unreadable or does not fit the others."""

    exit_code = 2


class MediaError(InputError):
    """A picture or video file cannot be used."""


class SettingsError(EverAnimateError):
    """An option has a value that cannot work."""

    exit_code = 2


class WeightsError(EverAnimateError):
    """A checkpoint or LoRA is missing, incomplete or belongs to another network."""

    exit_code = 2
