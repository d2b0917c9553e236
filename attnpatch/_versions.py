"""The versions attnpatch works with, checked from package metadata, without importing the packages."""

from __future__ import annotations

import re
from importlib import metadata

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


def _inside(version: str, low: tuple[int, ...], high: tuple[int, ...] | None) -> bool:
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    return numbers >= low and (high is None or numbers < high)
