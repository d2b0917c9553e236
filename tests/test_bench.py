"""The benchmarks: names, refusals, what is written, and that a wrong result is never timed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from attnpatch import bench
from attnpatch.bench import Settings, timing
from attnpatch.bench.plot import draw, ratios
from attnpatch.bench.timing import BenchmarkError
from attnpatch.cli import app
from attnpatch.errors import SpecError


def test_every_benchmark_has_parts() -> None:
    for name in bench.BENCHMARKS:
        assert bench.parts_of(name)
    assert ("toolkit", "convert") in bench.choose([])
    assert bench.choose(["toolkit.import", "alignment"])[0] == ("toolkit", "import")


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(SpecError, match="alignment"):
        bench.choose(["alignmnt"])
    with pytest.raises(SpecError, match="convert"):
        bench.choose(["toolkit.convrt"])


def test_a_wrong_result_is_not_timed() -> None:
    right = torch.randn(7)
    assert timing.check_close("x", right + 1e-9, right, 1e-6) < 1e-6
    with pytest.raises(BenchmarkError, match="nothing was timed"):
        timing.check_close("x", right + 1e-3, right, 1e-6)
    with pytest.raises(BenchmarkError, match="nothing was timed"):
        timing.check_close("x", right * float("nan"), right, 1e-6)


def test_ratio_is_of_the_same_work() -> None:
    ticks = iter(range(0, 10_000))
    calls = []

    def clock() -> float:
        return float(next(ticks))

    found = timing.compare(lambda: calls.append("a"), lambda: calls.append("b"), 3, scale=0.5, clock=clock)
    assert calls == ["a", "b"] * 4
    # Each call takes one tick; the peer does half the work in it.
    assert found["ratio"] == {"median": 0.5, "min": 0.5, "max": 0.5, "n": 3}
    assert found["speedup"]["median"] == 2.0


def test_results_are_kept_by_part_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def part(factor: float) -> Any:
        return lambda settings: {"peer": "p", "ratio": timing.summary([factor * n for n in range(1, settings.repeats)])}

    fake = ModuleType("fake")
    fake.__dict__.update(PARTS={"one": part(1.0), "two": part(2.0)}, CPU_PARTS=("one",))
    monkeypatch.setattr(bench, "BENCHMARKS", ("fake",))
    monkeypatch.setitem(sys.modules, "attnpatch.bench.fake", fake)
    assert bench.choose(["fake"], "cuda") == [("fake", "two")]
    settings = Settings(repeats=4, threads=torch.get_num_threads(), say=lambda line: None)
    bench.run(["fake"], settings, tmp_path)
    (path,) = bench.run(["fake.two"], Settings(repeats=6, threads=settings.threads, say=lambda line: None), tmp_path)
    results = json.loads(path.read_text())
    assert results["one"]["ratio"]["median"] == 2.0
    assert results["two"]["ratio"]["median"] == 6.0
    assert results["two"]["measured"]["repeats"] == 6
    assert dict(ratios(results))["one"]["max"] == 3.0
    assert not list(ratios({"generation": {"seconds": timing.summary([1.0])}}))
    assert {p.suffix for p in draw(tmp_path, "cpu")} == {".png", ".svg"}
    assert draw(tmp_path, "cuda") == []


def test_the_command_line_refuses(tmp_path: Path) -> None:
    runner = CliRunner()
    for words, named in ((["toolkt"], "toolkit"), (["--device", "gpu"], "cuda")):
        result = runner.invoke(app, ["bench", *words, "--output", str(tmp_path)])
        assert result.exit_code != 0
        assert named in str(result.exception)
    assert not list(tmp_path.iterdir())
    if not torch.cuda.is_available():
        result = runner.invoke(app, ["bench", "alignment", "--device", "cuda", "--output", str(tmp_path)])
        assert "no CUDA device" in str(result.exception)


def test_one_real_part(tmp_path: Path) -> None:
    """The import of attnpatch, in processes of its own, as `attnpatch bench toolkit.import` measures it."""
    quiet = Settings(repeats=1, threads=torch.get_num_threads(), say=lambda line: None)
    (path,) = bench.run(["toolkit.import"], quiet, tmp_path)
    assert 0 < json.loads(path.read_text())["import"]["ratio"]["median"] < 1
