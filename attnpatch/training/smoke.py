"""`--smoke`: the same run with few steps, few examples and a tiny evaluation, to see within a minute that it works."""

from __future__ import annotations

import copy
from typing import TypeVar

from attnpatch.training.errors import ConfigError
from attnpatch.training.run_config import ScriptConfig

SUFFIX = "-smoke"
T = TypeVar("T", bound=ScriptConfig)


def shrink(config: T) -> tuple[T, list[str]]:
    """A copy of `config` within the limits of its class (`smoke_limits`), in a folder of its own (output.dir-smoke),
    afresh; and what that changed, as `key=value`.

    A limit bounds a number, or how many items a list keeps; an unset (None) size becomes its limit, and words such
    as "epoch" stay. Model, spec and data are the user's. Raises ConfigError for a script that has no limits.
    """
    if not config.smoke_limits:
        raise ConfigError("this script has no --smoke: it is short as it is")
    small = copy.deepcopy(config)
    small.is_smoke = True
    changed = []
    settings = {**config.smoke_limits, "output.dir": SUFFIX}
    if hasattr(config, "training"):
        # What an earlier smoke left is not gone on with.
        settings |= {"training.resume": "never", "output.overwrite": True}
    for key, limit in settings.items():
        *sections, last = key.split(".")
        node = small
        for section in sections:
            node = getattr(node, section)
        value = _within(getattr(node, last), limit)
        if value != getattr(node, last):
            setattr(node, last, value)
            changed.append(f"{key}={value}")
    return small, changed


def _within(value: object, limit: object) -> object:
    if isinstance(limit, bool) or limit == "never":
        return limit
    if isinstance(limit, str):  # of a folder
        return str(value).rstrip("/") + limit
    if isinstance(value, list) and isinstance(limit, int):
        return value[:limit]
    if value is None:
        return limit
    if isinstance(value, (int, float)) and isinstance(limit, int):
        return min(value, limit)
    return value
