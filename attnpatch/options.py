"""Typed, validated options of a variant: a frozen dataclass whose fields carry their rule and their meaning."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from attnpatch.errors import SpecError, unknown

T = TypeVar("T")


def option(
    default: Any,
    doc: str,
    *,
    choices: tuple[str, ...] | None = None,
    check: Callable[[Any], bool] | None = None,
    rule: str = "",
) -> Any:
    """A dataclass field with its meaning (`doc`) and its rule: `choices`, or `check` explained by `rule`."""
    return dataclasses.field(default=default, metadata={"doc": doc, "choices": choices, "check": check, "rule": rule})


def build_options(cls: type[T], owner: str, values: Mapping[str, Any]) -> T:
    """Make `cls` from a mapping, checking names, types and rules.

    Text as it comes from a command line ("true", "8", "0.5", "none") is converted to the field's type.

    Raises:
        SpecError: an unknown option, a value of the wrong type or outside its rule.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    converted: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            known = list(fields)
            if not known:
                raise SpecError(f"{owner} has no options, but {name!r} was given")
            raise SpecError(f"{owner}: {unknown('option', name, known)}")
        converted[name] = _convert(value, hints[name], f"{owner}.{name}")
    for name, value in converted.items():
        _check(value, fields[name].metadata, f"{owner}.{name}")
    return cls(**converted)


def describe_options(cls: type) -> list[dict[str, Any]]:
    """Name, type, default, choices and meaning of every option, for listings."""
    hints = typing.get_type_hints(cls)
    return [
        {
            "name": f.name,
            "type": _type_name(hints[f.name]),
            "default": f.default,
            "choices": list(f.metadata["choices"]) if f.metadata.get("choices") else None,
            "doc": f.metadata.get("doc", ""),
        }
        for f in dataclasses.fields(cls)
    ]


def _alternatives(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _type_name(hint: Any) -> str:
    names = ["none" if t is type(None) else getattr(t, "__name__", str(t)) for t in _alternatives(hint)]
    return " or ".join(names)


def _convert(value: Any, hint: Any, where: str) -> Any:
    alternatives = _alternatives(hint)
    if isinstance(value, str):
        lowered = value.strip().lower()
        if type(None) in alternatives and lowered in ("none", "null"):
            return None
        if bool in alternatives and lowered in ("true", "false"):
            return lowered == "true"
        for kind in (int, float):
            if kind in alternatives:
                try:
                    return kind(value)
                except ValueError:
                    continue
    if type(value) in alternatives:
        return value
    if float in alternatives and type(value) is int:
        return float(value)
    raise SpecError(f"{where} is {value!r}; it must be {_type_name(hint)}")


def _check(value: Any, metadata: Mapping[str, Any], where: str) -> None:
    choices = metadata.get("choices")
    # Choices restrict text only: an option may be "a named choice, or a number".
    if choices and isinstance(value, str) and value not in choices:
        raise SpecError(f"{where}: {unknown('value', value, choices)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise SpecError(f"{where} is {value!r}; it must be finite")
    check = metadata.get("check")
    if check and value is not None and not isinstance(value, str) and not check(value):
        raise SpecError(f"{where} is {value!r}; the rule is: {metadata['rule']}")
