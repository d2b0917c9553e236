"""A fresh random seed every run (repeat one with ATTNPATCH_TEST_SEED), one thread per worker, no network."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest

SEED = "ATTNPATCH_TEST_SEED"


def pytest_configure(config: pytest.Config) -> None:
    # Set before xdist starts its workers, which inherit it.
    os.environ.setdefault(SEED, str(random.SystemRandom().randrange(2**31)))
    import torch
    import transformers

    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def pytest_report_header(config: pytest.Config) -> str:
    return f"{SEED}={os.environ[SEED]}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.failed:
        report.sections.append(("seed", f"repeat with {SEED}={os.environ[SEED]}"))
    return report


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """The run's seed mixed with the test's name, so that a test draws the same numbers run alone or in a suite."""
    import numpy
    import torch

    value = (int(os.environ[SEED]) + zlib.crc32(request.node.nodeid.rsplit("/", 1)[-1].encode())) % 2**31
    random.seed(value)
    numpy.random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Models this small are slower with more threads, much slower on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
