"""Triton in a process of its own: its interpreter has to be asked for before it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run_interpreted(file: str) -> None:
    """Run the tests of a file beside this one in Triton's interpreter."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", HERE / file]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


def run_compiler(code: str, cache: Path) -> None:
    """Run code that compiles kernels for a GPU that is not there: the interpreter checks neither types nor sizes."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
