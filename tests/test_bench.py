"""The benchmarks: names, refusals, what is written, and that a wrong result is never timed."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from attnpatch import bench, environment
from attnpatch.bench import Settings, gpu, gpu_checks, steps, tables, targets, timing
from attnpatch.bench.plot import draw, ratios
from attnpatch.bench.timing import BenchmarkError
from attnpatch.cli import app
from attnpatch.errors import SpecError
from attnpatch.kernels import triton_here


def test_every_benchmark_has_parts() -> None:
    for name in bench.BENCHMARKS:
        assert bench.parts_of(name)
    assert ("toolkit", "step") in bench.choose([])
    assert bench.choose(["toolkit.import", "alignment"])[0] == ("toolkit", "import")


def test_what_takes_long_and_nobody_waits_for_is_left_out_unless_named() -> None:
    everything = {f"{name}.{part}" for name, part in bench.choose([])}
    for extra in bench.EXTRA:
        assert extra not in everything
        name, part = extra.split(".")
        assert (name, part) in bench.choose([name])
        assert bench.choose([extra]) == [(name, part)]


def test_every_variant_is_measured_with_a_spec_that_parses() -> None:
    import attnpatch
    from attnpatch.spec import AttentionSpec

    found = steps.specs()
    names = {
        rule_name for spec in found.values() for rule in AttentionSpec.parse(spec).rules for rule_name in rule.variants
    }
    assert names == set(attnpatch.variants())
    assert found["top_r(r=16)"] == {"variant": "top_r", "options": {"top_r": {"r": 16}}}
    assert found["expressive"] == "expressive"


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(SpecError, match="alignment"):
        bench.choose(["alignmnt"])
    with pytest.raises(SpecError, match="convert"):
        bench.choose(["toolkit.convrt"])
    with pytest.raises(SpecError, match=r"'score\.' names no part"):
        bench.choose(["score."])


def test_a_part_named_twice_runs_once() -> None:
    assert bench.choose(["toolkit.import", "toolkit.import"]) == [("toolkit", "import")]
    assert bench.choose(["toolkit", "toolkit.import"]) == bench.choose(["toolkit"])


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


def ratio(*values: float) -> dict[str, Any]:
    return {"ratio": timing.summary(list(values))}


def test_targets_take_the_worst_case_and_the_right_direction() -> None:
    results = {
        "score": {
            "operator": {
                "expressive float32, T = 128": {"auto": {"forward": ratio(9.0)}},
                "expressive float32, T = 512": {"auto": {"forward": ratio(1.0, 1.1, 1.5), "memory": 1.05}},
                "expressive float32, T = 2048": {"auto": {"forward": ratio(1.19), "memory": 1.2}},
            }
        },
        "value_aware": {"exact": {"sharpness 0.5": ratio(0.04, 0.05, 0.1), "sharpness 4.0": ratio(0.01)}},
        "toolkit": {"idle": ratio(0.97)},
    }
    rows = {row["target"]: row for row in targets.summarise(results, "cpu")}
    forward = rows["expressive attention, T >= 512, forward"]
    # Not the short one, and of the others the worse median.
    assert forward["case"] == "expressive float32, T = 2048"
    assert forward["measured"]["median"] == 1.19
    assert forward["reached"] is True
    assert rows["expressive attention, T >= 512, inputs and outputs included"]["reached"] is False
    # Times the peer's rate: the fewest count, and what was the longest time is the lowest rate.
    exact = rows["value_aware exact optimum, r = D + 1"]
    assert exact["measured"] == pytest.approx({"median": 20.0, "min": 10.0, "max": 25.0, "n": 3})
    assert exact["reached"] is True
    assert rows["a stock model's step with attnpatch imported"]["reached"] is False
    assert rows["Marian training"]["reached"] is None
    assert {row["reached"] for row in targets.summarise({}, "cuda")} == {None}


def test_targets_lead_to_parts_that_exist() -> None:
    """And, where the part has been measured, to a figure of it."""
    results = tables.load(Path(__file__).parents[1] / "results" / "benchmarks", "cpu")
    for target in targets.TARGETS:
        name, part = target.part.split(".")
        assert part in bench.parts_of(name)
        if part in results.get(name, {}):
            assert list(targets.found(results[name][part], target.where)), f"{target.where} leads to nothing"


def test_tables_have_a_row_for_each_case() -> None:
    step = {
        "peer": "stock",
        "Marian": {"batch": 3, "variants": {"neural": {**ratio(1.0, 2.0, 4.0), "memory": 1.5}, "elu": ratio(3.0)}},
        "RoBERTa": {"batch": 3, "variants": {"elu": ratio(0.5, 0.7)}},
        "measured": {"repeats": 3},
    }
    assert tables.part_table("toolkit.step", step) == [
        ["", "Marian", "Marian: memory", "RoBERTa"],
        ["neural", "2.00 (1.00 to 4.00)", "1.50", ""],
        ["elu", "3.00 (n = 1)", "", "0.60 (0.50 to 0.70)"],
    ]
    assert tables.part_table("toolkit.idle", ratio(1.0, 1.2)) == [
        ["", "time over the peer's"],
        ["all", "1.10 (1.00 to 1.20)"],
    ]
    assert tables.part_table("value_aware.exact", {"sharp": ratio(0.1, 0.25)})[1][1].endswith("(4.00 to 10.00)")


def test_a_page_gets_its_tables_anew() -> None:
    page = "words\n<!-- table toolkit.idle -->\nold\n<!-- end -->\nmore\n<!-- table summary -->\n<!-- end -->\n"
    given = {"cpu": {"toolkit.idle": "| new |\n", "summary": "| sum |\n"}}
    found = tables.filled(page, given)
    assert found == page.replace("old\n", "| new |\n").replace("summary -->\n", "summary -->\n| sum |\n")
    assert tables.filled(found, given) == found
    # A part that was not measured says so; one that there is not is refused.
    assert "-->\nNot measured yet.\n<!--" in tables.filled(page, {"cpu": {"summary": ""}})
    with pytest.raises(BenchmarkError, match=r"toolkit\.idle"):
        tables.filled(page.replace("toolkit.idle", "toolkit.idel"), given)


def test_a_marker_takes_its_own_devices_table() -> None:
    page = "<!-- table summary -->\n<!-- end -->\n<!-- table cuda:summary -->\n<!-- end -->\n"
    found = tables.filled(page, {"cpu": {"summary": "slow\n"}, "cuda": {"summary": "fast\n"}})
    assert found == page.replace("table summary -->\n", "table summary -->\nslow\n").replace(
        "cuda:summary -->\n", "cuda:summary -->\nfast\n"
    )
    with pytest.raises(BenchmarkError, match="'cuda'"):
        tables.filled(page.replace("cuda", "cuad"), {})


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!-- table summary -->\nwords\n<!-- table toolkit.idle -->\n<!-- end -->\n", "line 1 of the page"),
        ("<!-- table summary -->\n<!-- end -->\nwords\n<!-- table toolkit.idle -->\n", "line 4 of the page"),
        ("<!-- table no name -->\n<!-- end -->\n", "unknown table 'no name'"),
        ("words\n", "no marker"),
    ],
)
def test_a_page_that_would_be_damaged_is_left_alone(tmp_path: Path, page: str, message: str) -> None:
    path, results = tmp_path / "page.md", tmp_path / "results"
    path.write_text(page)
    results.mkdir()
    (results / "toolkit-cpu.json").write_text(json.dumps({"idle": ratio(1.0)}))
    found = CliRunner().invoke(app, ["bench", "--markdown", str(path), "--output", str(results)])
    assert isinstance(found.exception, BenchmarkError)
    assert message in str(found.exception)
    assert path.read_text() == page


def test_a_page_is_not_emptied_without_results(tmp_path: Path) -> None:
    path, results = tmp_path / "page.md", tmp_path / "nowhere"
    path.write_text("<!-- table summary -->\nold\n<!-- end -->\n")
    words = ["bench", "--markdown", str(path), "--output", str(results)]
    found = CliRunner().invoke(app, words)
    assert "has no results" in str(found.exception)
    found = CliRunner().invoke(app, [*words, "--repeats", "3", "--device", "cuda"])
    assert "--repeats, --device cannot go with it" in str(found.exception)
    assert path.read_text() == "<!-- table summary -->\nold\n<!-- end -->\n"
    assert not results.exists()


def test_a_table_says_when_and_with_what_it_was_measured() -> None:
    about = {"date": "2026-01-02", "commit": "abc123+changes", "attnpatch": "0.1.0", "threads": 2, "repeats": 3}
    line = "\nMeasured 2026-01-02, commit abc123+changes, 2 threads, 3 repeats.\n"
    assert tables.measured_line({"measured": about}) == line
    about = {"date": "2026-01-02", "attnpatch": "0.1.0", "threads": 1, "repeats": 1}
    assert tables.measured_line({"measured": about}) == "\nMeasured 2026-01-02, attnpatch 0.1.0, 1 thread, 1 repeat.\n"
    assert tables.measured_line(ratio(1.0)) == ""


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_the_commit_of_a_checkout_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a checkout whose package this is: not of another project's that it is installed in."""

    def git(*words: str) -> str:
        names = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *names, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    package, deeper = tmp_path / "attnpatch", tmp_path / "lib" / "attnpatch"
    for folder in (package, deeper):
        folder.mkdir(parents=True)
        (folder / "environment.py").write_text("")
    monkeypatch.setattr(environment, "__file__", str(package / "environment.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment.code_commit() is None
    git("init")
    git("add", ".")
    git("commit", "-m", "x")
    commit = git("rev-parse", "HEAD")[:12]
    (tmp_path / "results.json").write_text("{}")
    assert environment.code_commit() == commit
    (package / "environment.py").write_text("changed = True")
    assert environment.code_commit() == f"{commit}+changes"
    monkeypatch.setattr(environment, "__file__", str(deeper / "environment.py"))
    assert environment.code_commit() is None


def test_the_page_has_the_numbers_of_the_results() -> None:
    root = Path(__file__).parents[1]
    page = (root / "docs" / "performance.md").read_text(encoding="utf-8")
    assert tables.filled(page, tables.of_devices(root / "results" / "benchmarks")) == page, (
        "run: attnpatch bench --markdown docs/performance.md"
    )


@pytest.mark.parametrize(
    "spec", [None, "expressive", {"variant": "alignment", "options": {"alignment": {"method": "ct"}}}]
)
def test_the_layer_is_checked_and_gives_all_gradients(spec: Any) -> None:
    from attnpatch.bench.layer import AttentionLayer

    layer = AttentionLayer(spec, 2, 16, "cpu")
    layer.module.eval()
    assert layer.relative_error() < 1e-5
    layer.module.train()
    gradients = layer.both()
    assert len(gradients) == 1 + len(list(layer.module.parameters()))
    assert all(bool(g.isfinite().all()) for g in gradients if g is not None)


def test_sides_that_do_other_work_are_not_compared() -> None:
    from attnpatch.bench.training import _same_work

    ours = {"parameters": {"total": 10}, "steps": 5, "tokens": {"target": 1000}}
    peer = {"parameters": 10, "updates": 5, "target_tokens": 1100}
    _same_work(ours, peer)
    for name, value in (("parameters", 11), ("updates", 6), ("target_tokens", 2000)):
        with pytest.raises(BenchmarkError, match="same work"):
            _same_work(ours, peer | {name: value})


def test_the_stock_step_is_measured_in_forks() -> None:
    """One turn of one pair; the script itself must not import attnpatch, or there would be nothing to compare."""
    from attnpatch.bench.timing import child

    script = Path(bench.__file__).with_name("stock_step.py")
    found = child(script, "1", "1", "1")
    assert {name: len(values) for name, values in found["seconds"].items()} == {"with": 1, "without": 1}
    assert 0.1 < found["ratio"][0] < 10
    lines = [line.strip() for line in script.read_text(encoding="utf-8").splitlines()]
    imports = [i for i, line in enumerate(lines) if line.startswith(("import attnpatch", "from attnpatch"))]
    assert [lines[i - 1] for i in imports] == ["if imported:"]


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


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("file", r"is a file; it must be a folder"),
        ("below a file", r"cannot be made"),
        ("no JSON", r"fake-cpu\.json is no JSON"),
        ("no parts", r"fake-cpu\.json holds no benchmark's parts"),
        ("no data", r"--data .*nowhere does not exist"),
        ("other data", r"--data .* has no files of train and test_2016_flickr"),
    ],
)
def test_input_is_checked_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, message: str
) -> None:
    def part(settings: Settings) -> Any:
        pytest.fail("it was measured")

    fake = ModuleType("fake")
    fake.__dict__.update(PARTS={"one": part})
    monkeypatch.setattr(bench, "BENCHMARKS", ("fake",))
    monkeypatch.setitem(sys.modules, "attnpatch.bench.fake", fake)
    out, data = tmp_path / "out", {"no data": tmp_path / "nowhere", "other data": tmp_path}.get(damage)
    if damage == "file":
        out.write_text("words")
    elif damage == "below a file":
        (tmp_path / "words").write_text("words")
        out = tmp_path / "words" / "out"
    elif damage.startswith("no ") and data is None:
        out.mkdir()
        (out / "fake-cpu.json").write_text("{" if damage == "no JSON" else '{"one": 3}')
    settings = Settings(repeats=1, threads=torch.get_num_threads(), data=data, say=lambda line: None)
    with pytest.raises(BenchmarkError, match=message):
        bench.run([], settings, out)


def test_one_real_part(tmp_path: Path) -> None:
    """The import of attnpatch, in processes of its own, as `attnpatch bench toolkit.import` measures it."""
    quiet = Settings(repeats=1, threads=torch.get_num_threads(), say=lambda line: None)
    (path,) = bench.run(["toolkit.import"], quiet, tmp_path)
    found = json.loads(path.read_text())["import"]
    assert 0 < found["ratio"]["median"] < 1
    assert found["measured"].get("commit") == environment.code_commit()


def test_what_a_gpu_check_finds_wrong() -> None:
    found = {"case": "score", "errors": {"output": 1e-6, "dq": 2e-5, "dk": float("nan")}}
    (line,) = gpu_checks._faults(found, 1e-5)
    assert [what in line for what in ("output", "dq", "dk")] == [False, True, True]
    assert gpu_checks._faults({"case": "score", "error": "does not compile"}, 1.0) == ["score: does not compile"]
    assert len(gpu_checks._faults(found, 1.0)) == 1
    assert gpu_checks._faults({**found, "errors": {"dq": 0.0}}, 1e-5) == []
    assert set().union(*gpu.KINDS.values()) == set(gpu_checks.CHECKS)
    assert set(gpu.KINDS) <= set(gpu.STAGES)


def test_a_gpu_run_is_held_against_the_aims(tmp_path: Path) -> None:
    def ratio(median: float) -> dict[str, Any]:
        return {"median": median, "min": median - 0.1, "max": median + 0.1, "n": 7}

    row = {"auto": {"forward": {"ratio_over_best": 0.9}, "both": {"ratio_over_best": 1.2}, "memory": 1.01}}
    worse = {"auto": {"forward": {"ratio_over_best": 0.95}, "both": {"ratio_over_best": 0.8}, "memory": 1.0}}
    other = {"auto": {"memory": 9.0}}
    gpu_run = {
        "check": {"cases": []},
        "operator": {
            "bfloat16, T = 512": row,
            "bfloat16, T = 4096": worse,
            "float32, T = 512": other,
        },
        "steps": {
            gpu.step_label("alignment gan", "RoBERTa", 256, 128): {"ratio": ratio(1.05)},
            gpu.step_label("alignment gan", "Marian", 1024, 32): {"ratio": ratio(3.0)},
            gpu.step_label("neural", "RoBERTa", 256, 128): {
                "ratio": ratio(1.6),
                "time_ratio_over_flops_ratio": ratio(1.2),
            },
        },
        "roberta": {
            gpu.step_label("expressive", "RoBERTa-base", batch, 512): {"ratio": ratio(1.02 + i)}
            for i, batch in enumerate(gpu.ROBERTA_BATCHES)
        },
        "layer": {"query_value, 64 x 512 tokens": {"ratio": ratio(2.0)}},
        "solver": {"sharpness 1.0": {"ratio": ratio(0.5)}},
    }
    path = tmp_path / "gpu-cuda.json"
    path.write_text(json.dumps(gpu_run))
    found = {row["target"]: row for row in tables.held_against_aims(tmp_path, "cuda")}
    measured = {name: (row["measured"]["median"], row["reached"]) for name, row in found.items() if row["measured"]}
    assert measured == {
        "expressive attention, T >= 512, forward": (0.95, True),
        "expressive attention, T >= 512, forward + backward": (1.2, False),
        "expressive attention, T >= 512, inputs and outputs included": (1.01, True),
        "expressive training step, RoBERTa T = 512": (1.02, True),
        "alignment (gan) training step, T = 128": (1.05, True),
        "neural training step, over the ratio of the FLOPs": (1.2, False),
        "query_value layer, T = 512, forward + backward": (2.0, True),
        "value_aware exact optimum, r = D + 1": (2.0, False),
    }
    assert "1.20" in tables.of_devices(tmp_path)["cuda"]["summary"]
    # What was timed with kernels that are wrong is held against nothing.
    gpu_run["operator"]["unchecked"] = gpu_run["layer"]["unchecked"] = True
    path.write_text(json.dumps(gpu_run))
    left = {row["target"] for row in tables.held_against_aims(tmp_path, "cuda") if row["measured"]}
    gone = {"expressive attention", "query_value layer"}
    assert left == {name for name in measured if not any(name.startswith(word) for word in gone)}


def test_every_aim_of_a_gpu_has_its_place_in_the_run() -> None:
    stages = set(gpu.STAGES)
    for target in targets.TARGETS:
        assert (target.cuda is None) == (not target.gpu_run), target.name
        assert not target.gpu_run or target.gpu_run[0] in stages


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_gpu_run_on_a_cpu(tmp_path: Path) -> None:
    """The same stages as on a GPU, with tiny shapes in Triton's interpreter; a wrong kernel would fail the first."""
    command = [sys.executable, "-m", "attnpatch", "bench-gpu", "--dry-run", "--output", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    found = json.loads((tmp_path / "gpu-dry.json").read_text())
    assert found["measured"]["dry_run"]
    assert not any(found["check"]["wrong"].values())
    assert len(found["check"]["cases"]) >= 6
    assert found["operator"]["float32, T = 16"]["triton"]["both"]["milliseconds"] > 0
    assert set(gpu.STAGES) <= set(found)
    assert not any("failed" in found[name] for name in gpu.STAGES)


def test_a_stage_that_fails_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(gpu_run: gpu.GpuRun) -> None:
        raise BenchmarkError("off by 0.5")

    def right(gpu_run: gpu.GpuRun) -> None:
        gpu_run.results["second"] = {"ratio": 1.0}

    monkeypatch.setattr(gpu, "STAGES", {"first": (wrong, 0), "second": (right, 0), "third": (right, 10_000)})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(triton_here, "USABLE", True)
    path, failed = gpu.run(Settings(device="cuda", say=lambda line: None), tmp_path, 1.0)
    found = json.loads(path.read_text())
    assert failed == ["first"]
    assert "off by 0.5" in found["first"]["failed"]
    assert found["second"]["ratio"] == 1.0
    assert "budget" in found["third"]["left_out"]


@pytest.fixture
def gpu_stages(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the run's stages, on what it takes for a CUDA device."""

    def timed(gpu_run: gpu.GpuRun) -> None:
        gpu_run.results["operator"] = {"ratio": 1.0}

    def stages(check: Any, least: int = 0) -> None:
        monkeypatch.setattr(gpu, "STAGES", {"check": (check, least), "operator": (timed, 0)})

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(triton_here, "USABLE", True)
    return stages


def test_timings_after_a_failed_check_are_marked(gpu_stages: Any, tmp_path: Path) -> None:
    def wrong(gpu_run: gpu.GpuRun) -> None:
        raise BenchmarkError("off by 0.5")

    def right(gpu_run: gpu.GpuRun) -> None:
        gpu_run.results["check"] = {"wrong": []}

    words = ["bench-gpu", "--output", str(tmp_path)]
    for check, least, unchecked in ((wrong, 0, True), (right, 10_000, True), (right, 0, False)):
        gpu_stages(check, least)
        found = CliRunner().invoke(app, [*words, "--json"])
        assert found.exit_code == (1 if unchecked else 0)
        told = json.loads(found.stdout)
        assert told["unchecked"] is unchecked
        stages = json.loads(Path(told["files"][0]).read_text())
        assert stages["operator"].get("unchecked", False) is unchecked
        assert "unchecked" not in stages["check"]
    gpu_stages(wrong)
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 1
    assert "marked unchecked" in found.output


def test_an_earlier_gpu_run_is_kept(gpu_stages: Any, tmp_path: Path) -> None:
    gpu_stages(lambda gpu_run: None)
    settings = Settings(device="cuda", say=lambda line: None)
    (tmp_path / "gpu-cuda.json").write_text("first")
    for _ in range(2):
        gpu.run(settings, tmp_path, 1.0)
    assert (tmp_path / "gpu-cuda.previous.json").read_text() == "first"
    for name in ("gpu-cuda.previous-2.json", "gpu-cuda.json"):
        assert json.loads((tmp_path / name).read_text())["operator"]["ratio"] == 1.0
    with pytest.raises(BenchmarkError, match="--data"):
        gpu.run(Settings(device="cuda", data=tmp_path / "nowhere", say=lambda line: None), tmp_path, 1.0)
    with pytest.raises(BenchmarkError, match="must be a folder"):
        gpu.run(settings, tmp_path / "gpu-cuda.json", 1.0)


def test_a_gpu_run_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(triton_here, "USABLE", False)
    settings = Settings(say=lambda line: None)
    with pytest.raises(BenchmarkError, match="no CUDA device"):
        gpu.run(settings, tmp_path, 1.0)
    for installed, message in ((None, "Triton is not installed"), (object(), "needs TRITON_INTERPRET=1")):
        monkeypatch.setattr(triton_here, "INSTALLED", installed is not None)
        with pytest.raises(BenchmarkError, match=message):
            gpu.run(settings, tmp_path, 1.0, dry=True)
