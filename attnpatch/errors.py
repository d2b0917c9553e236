"""The exceptions attnpatch raises. Each message says what was wrong, what is allowed, and the nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AttnpatchError(Exception):
    """Base of every error that attnpatch raises on purpose; the command line prints it as one sentence."""


class SpecError(AttnpatchError, ValueError):
    """A spec that cannot be: unknown name, option out of range, two variants on one stage."""


class UnsupportedModelError(AttnpatchError, TypeError):
    """A model, module or state of a model that attnpatch cannot rewrite."""


class PatchError(AttnpatchError, RuntimeError):
    """A patch or unpatch that cannot be carried out on this model."""


class CheckpointError(AttnpatchError, OSError):
    """A checkpoint folder or file that is missing, damaged or does not fit its config."""


class VersionError(AttnpatchError, ImportError):
    """transformers or torch outside the supported window."""


def one_line(error: BaseException, limit: int | None = None) -> str:
    """An exception's message on one line, cut after `limit` characters; the exception's name where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if limit is None or len(text) <= limit else text[:limit] + "..."


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None when nothing is similar."""
    matches = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """One sentence on an unknown name: what it was, what is known, the nearest.

    >>> unknown("variant", "neurall", ["neural", "elu"])
    "unknown variant 'neurall'; did you mean 'neural'? Known: elu, neural"
    """
    names = sorted(known)
    guess = nearest(str(name), names)
    hint = f" did you mean {guess!r}?" if guess else ""
    return f"unknown {kind} {str(name)!r}{';' + hint if hint else '.'} Known: {', '.join(names)}"
