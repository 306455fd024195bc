"""Errors that tell a user what to change; the command line prints them without a traceback."""


class MixLLMError(Exception):
    """Base of every error caused by a user's files or options rather than by a bug."""


class OptionError(MixLLMError):
    """An option or argument has a value that cannot work (bits, group size, a prompt longer than the context)."""


class UnsupportedModelError(MixLLMError):
    """The model's architecture, activation function, rope type or tensor type is not one we can run."""


class CheckpointError(MixLLMError):
    """A checkpoint file or folder is damaged, incomplete, or contradicts itself."""


class OutputExistsError(MixLLMError):
    """The output folder exists already and was kept."""


class StorageError(MixLLMError):
    """Reading or writing failed for a reason outside the program: a full disk, missing permission, no network."""
