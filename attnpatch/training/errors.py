"""Errors of the training scripts. Each is one sentence for the person who runs them."""

from __future__ import annotations

from attnpatch.errors import AttnpatchError


class ConfigError(AttnpatchError, ValueError):
    """A config file, key or value that cannot be used."""


class DataError(AttnpatchError, ValueError):
    """A corpus that is missing or malformed; the message names the file and, where there is one, the line."""


class TrainingError(AttnpatchError, RuntimeError):
    """A run that cannot start, go on or be resumed."""


class RunPaused(TrainingError):
    """A run that ended at its time limit, with a checkpoint, and goes on when it is called again."""


class WrongResult(AttnpatchError):
    """A run that came to its end and found what must not be."""
