"""The versions attnpatch works with, checked from package metadata, without importing the packages."""

from __future__ import annotations

import json
import re
import sys
from importlib import metadata
from pathlib import Path

from attnpatch.errors import VersionError

ATTNPATCH = "0.1.0"
SUPPORTED = {"transformers": ((5, 14), (6, 0)), "torch": ((2, 11), None)}
"""Package -> first supported version, first unsupported one."""


def check() -> None:
    """Stop where a package is missing, too old or too new.

    Raises:
        VersionError: names the version found and the versions supported.
    """
    for package, (low, high) in SUPPORTED.items():
        window = f">= {'.'.join(map(str, low))}" + (f", < {'.'.join(map(str, high))}" if high else "")
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            raise VersionError(f"attnpatch {ATTNPATCH} needs {package} {window}, which is not installed") from None
        if not _inside(found, low, high):
            raise VersionError(f"attnpatch {ATTNPATCH} works with {package} {window}, but {found} is installed")


def check_at_import() -> None:
    """`check`, for the import of attnpatch: the `attnpatch` command, which has no code of its own before that import,
    ends here with one sentence (or JSON, with --json) and the exit code 2 of bad input.

    Raises:
        VersionError: in any other process.
    """
    try:
        check()
    except VersionError as error:
        if not _is_command():
            raise
        if "--json" in sys.argv:
            print(json.dumps({"error": str(error), "exit_code": 2}, indent=2))
        else:
            print(f"attnpatch: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _is_command() -> bool:
    """Whether this process is `attnpatch ...` or `python -m attnpatch ...`."""
    if sys.argv[:1] == ["-m"]:
        # Python puts the path of the module in its place only when it has found the module.
        return "-m" in sys.orig_argv and sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] == ["attnpatch"]
    return bool(sys.argv) and Path(sys.argv[0]).name in ("attnpatch", "attnpatch.exe")


def _inside(version: str, low: tuple[int, ...], high: tuple[int, ...] | None) -> bool:
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    return numbers >= low and (high is None or numbers < high)
