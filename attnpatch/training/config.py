"""Reads a dataclass from YAML, overridden by `key=value` words.

Every key is known: an unknown one is an error that names the nearest. A string may hold `${NAME}` or
`${NAME:-default}`, which is replaced by an environment variable.
"""

from __future__ import annotations

import dataclasses
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from attnpatch.errors import nearest, one_line, unknown
from attnpatch.training.errors import ConfigError

T = TypeVar("T")


def one_of(*values: str) -> dict[str, Any]:
    """Field metadata: the values that a string may take."""
    return {"choices": values}


def named_once(key: str, items: Sequence[Any]) -> None:
    """Raises ConfigError when something stands in a list twice: it would be done once and counted twice."""
    for number, item in enumerate(items):
        if item in items[:number]:
            raise ConfigError(f"{key} has an item twice (number {number + 1}): name each once")


def at_least(low: float, high: float | None = None) -> dict[str, Any]:
    """Field metadata: the range of a number, both ends included."""
    return {"low": low, "high": high}


def load_config(cls: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """Reads the YAML file `path` into the dataclass `cls` and applies `overrides` such as `training.epochs=2`.

    Raises ConfigError for a missing or malformed file, an unknown key, or a value of the wrong type or range.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        path = Path(path)
        if not path.is_file():
            beside = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
            raise ConfigError(f"no config file {path}" + (f"; in {path.parent}: {', '.join(beside)}" if beside else ""))
        try:
            loaded = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid YAML: {one_line(error)}") from error
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(f"{path} must hold a mapping of sections, not a {type(loaded).__name__}")
        tree = loaded or {}
    own = set(tree)
    for word in overrides:
        _override(cls, tree, word)
    try:
        return _build(cls, tree, "", None)
    except _UnknownKey as error:
        given = [word.partition("=")[0].strip() for word in overrides]
        by_word = any(error.key == key or error.key.startswith(f"{key}.") for key in given)
        if path is None or error.key.split(".")[0] not in own or by_word:
            raise ConfigError(str(error)) from None
        other = "" if "." in error.key else ". Is it the config of another script?"
        raise ConfigError(f"{path}: {error}{other}") from None


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once: of two, PyYAML would keep the second without a word."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)  # before merges (<<), which may well give a key again
        keys = [key.value for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                problem = f"the key {key!r} stands twice in one mapping"
                raise yaml.constructor.ConstructorError(None, None, problem, node.value[number][0].start_mark)
        return node


def _override(cls: type, tree: dict[str, Any], word: str) -> None:
    key, equals, text = word.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{word!r} is not an override: write key=value, for example training.epochs=2")
    try:
        value = yaml.load(text, _Loader) if text else ""
    except yaml.YAMLError as error:
        raise ConfigError(f"the value in {word!r} is not valid YAML: {one_line(error)}") from error
    *sections, last = key.strip().split(".")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{key}: {section} is a value, not a section")
        node = child
    if isinstance(value, dict) and isinstance(node.get(last), dict) and (key.strip(), True) in _keys(cls):
        value = {**node[last], **value}  # what a mapping does not name stays
    node[last] = value


def _keys(cls: type, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Every key of a config, with dots, and whether it is a section."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        yield f"{prefix}{field.name}", dataclasses.is_dataclass(hint)
        if dataclasses.is_dataclass(hint):
            yield from _keys(typing.cast(type, hint), f"{prefix}{field.name}.")


class _UnknownKey(Exception):
    """A key that there is not; the message is a sentence for people."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def _unknown_key(root: type, prefix: str, name: str, fields: Iterable[str]) -> _UnknownKey:
    """Names the nearest key beside it, or the one key of that name in a section."""
    key = prefix + name
    beside = nearest(name, fields)
    elsewhere = [other for other, section in _keys(root) if other.rpartition(".")[2] == name and not section]
    guess = f"{prefix}{beside}" if beside else None
    if len(elsewhere) == 1 and (not prefix or not beside):
        guess = elsewhere[0]
    hint = f"; did you mean {guess!r}?" if guess else "."
    where = f"Known in {prefix[:-1]}" if prefix else "Known"
    return _UnknownKey(key, f"unknown key {key!r}{hint} {where}: {', '.join(sorted(fields))}")


def _build(cls: type[T], tree: dict[str, Any], prefix: str, start: T | None, root: type | None = None) -> T:
    """`cls` with the values of `tree`; what it does not name is as in `start`, or else as the class has it."""
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, value in tree.items():
        if name not in fields:
            raise _unknown_key(root or cls, prefix, name, fields)
        hint = hints[name]
        key = f"{prefix}{name}"
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                known = ", ".join(f.name for f in dataclasses.fields(hint))
                raise ConfigError(f"{key} is a section, not a value; its keys: {known}")
            default = getattr(start, name) if start is not None else _default(fields[name])
            values[name] = _build(typing.cast(type, hint), value, f"{key}.", default, root or cls)
        else:
            values[name] = _check(key, _convert(key, _expand(value), hint), fields[name].metadata)
    return cls(**values) if start is None else dataclasses.replace(start, **values)  # type: ignore[type-var]


def _default(field: Any) -> Any:
    """What a section is when nothing of it is named: None where the class says nothing."""
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def _expand(value: Any) -> Any:
    """Replaces ${NAME} and ${NAME:-default} in strings by environment variables."""
    if isinstance(value, list):
        return [_expand(item) for item in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        found = os.environ.get(name)
        if found:
            return found
        if default is None:
            raise ConfigError(f"the config needs the environment variable {name}, which is not set")
        return default

    return re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", replace, value)


def _convert(key: str, value: Any, hint: Any) -> Any:
    if hint is Any:
        return value
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        for option in options:
            if option is not type(None):
                try:
                    return _convert(key, value, option)
                except ConfigError:
                    continue
    elif origin is list:
        items = value if isinstance(value, list) else [] if value in (None, "") else [value]
        return [_convert(key, item, typing.get_args(hint)[0]) for item in items]
    elif hint is bool:
        if isinstance(value, bool):
            return value
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and value.is_integer():
            return int(value)
    elif hint is float:
        # YAML 1.1 reads 1e-3 as a string: it wants 1.0e-3.
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)
            except ValueError:
                pass
    elif hint is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    raise ConfigError(f"{key}={value!r}: expected {_describe(hint)}, not {type(value).__name__}")


def _describe(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    if origin is list:
        return f"a list of {_describe(typing.get_args(hint)[0])}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    return names.get(hint, str(hint))


def _check(key: str, value: Any, metadata: Any) -> Any:
    if value is None:
        return value
    choices = metadata.get("choices")
    if choices and value not in choices:
        raise ConfigError(unknown(f"value for {key}:", value, choices))
    low, high = metadata.get("low"), metadata.get("high")
    if low is not None and not value >= low:
        raise ConfigError(f"{key}={value}: must be at least {low}")
    if high is not None and not value <= high:
        raise ConfigError(f"{key}={value}: must be at most {high}")
    return value
