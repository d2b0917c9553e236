"""The demo as a command: what it prints before its slow imports, and what it raises in the end."""

from __future__ import annotations

from attnpatch.demo.config import DemoConfig
from attnpatch.training.errors import WrongResult


def run(config: DemoConfig) -> None:
    """Raises WrongResult when a conversion changed what it must not change."""
    print("attnpatch demo: loading torch and transformers", flush=True)
    from attnpatch.demo.run import run_demo

    result = run_demo(config)
    if result.failed:
        raise WrongResult(result.complaint)
