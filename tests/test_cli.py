"""The command line: what it prints, its exit codes, and that errors are one sentence."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save
from transformers import GPT2Config

import attnpatch
from attnpatch import checkpoint_files
from attnpatch.cli import main
from attnpatch.errors import SpecError
from attnpatch.functional import expressive_attention
from attnpatch.kernels import dispatch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    return save(tmp_path / "stock")


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Any:
    def call(*words: Any) -> Result:
        capfd.readouterr()
        code = main([str(word) for word in words])
        out, err = capfd.readouterr()
        return Result(code, out, err)

    return call


def test_the_whole_way(run: Any, stock: Path, tmp_path: Path) -> None:
    new, back = tmp_path / "new", tmp_path / "back"
    result = run("convert", stock, new, "--variant", "neural+query_value", "--set", "query_value.phi=tanh")
    assert (result.code, result.err) == (0, "")
    for part in ("bert.encoder.layer.1.attention.self.value", "Linear -> neural", "drift against stock: max"):
        assert part in result.out
    result = run("inspect", new)
    assert (result.code, result.err) == (0, "")
    for part in ("phi=tanh", "BertForMaskedLM", "stock", "ok", "bert.encoder.layer.0.attention.self", "query_value"):
        assert part in result.out
    result = run("verify", new, "--against", stock)
    assert (result.code, result.err) == (0, "")
    assert "drift in bfloat16: mean" in result.out
    assert "all checks passed" in result.out
    result = run("revert", new, back)
    assert (result.code, result.err) == (0, "")
    assert "recovered" in result.out
    assert (back / "model.safetensors").read_bytes() == (stock / "model.safetensors").read_bytes()


def test_json_is_all_there_is(run: Any, stock: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    result = run("convert", stock, new, "--variant", "alignment", "--json")
    assert (result.code, result.err) == (0, "")
    assert result.json["drift"]["max"] <= 1e-5
    assert result.json["patch"]["exact"] is True
    assert result.json["files"]["model.safetensors"] > 10_000
    assert run("inspect", new, "--json").json["sites"][0]["stages"] == {"regularise": "alignment"}
    assert run("verify", new, "--against", stock, "--json").json["passed"] is True
    assert run("revert", new, tmp_path / "back", "--json").json["removed"]
    names = [entry["name"] for entry in run("variants", "--json").json]
    assert names == list(attnpatch.variants())
    found = run("env", "--json").json
    assert found["attnpatch"] == attnpatch.__version__
    assert found["variants"]["neural"] == "project"
    assert {"sdpa", "attnpatch"} <= set(found["attention backends"])
    assert found["packages"]["torch"]
    assert set(found["families"]) >= {"bert", "roberta", "marian"}


def test_lists(run: Any) -> None:
    result = run("variants")
    assert result.code == 0
    for name in attnpatch.variants():
        assert name in result.out
    assert "preset=roberta" in result.out
    result = run("env")
    assert result.code == 0
    assert "transformers" in result.out


def test_options_reach_the_conversion(run: Any, stock: Path, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text("- variant: expressive\n  layers: 0\n- variant: elu\n  options: {elu: {scale: 0.5}}\n  layers: 1\n")
    assert run("convert", stock, tmp_path / "a", "--spec", spec).code == 0
    info = attnpatch.inspect(tmp_path / "a")
    assert [row["stages"]["score"] for row in info.sites] == ["expressive", "elu"]
    assert info.record["rules"][1]["variants"]["elu"] == {"scale": 0.5}
    words = ["--variant", "neural", "--layers", "1", "--sites", "encoder", "--init", "paper", "--seed", "5"]
    assert run("convert", stock, tmp_path / "b", *words).code == 0
    info = attnpatch.inspect(tmp_path / "b")
    assert (info.init, [bool(row["stages"]) for row in info.sites]) == ("paper", [False, True])
    assert json.loads((tmp_path / "b/attnpatch_manifest.json").read_text())["seed"] == 5
    refused = run("convert", stock, tmp_path / "b", "--variant", "elu")
    assert refused.code == 2
    assert "--force" in refused.err
    assert run("convert", stock, tmp_path / "b", "--variant", "elu", "--force").code == 0
    assert run("revert", tmp_path / "a", tmp_path / "b", "--force").code == 0
    assert attnpatch.inspect(tmp_path / "b").record is None


def test_exit_code_of_a_failed_check(run: Any, stock: Path, tmp_path: Path) -> None:
    run("convert", stock, tmp_path / "new", "--variant", "neural")
    path = tmp_path / "new/model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    result = run("verify", tmp_path / "new")
    assert result.code == 1
    assert "FAILED" in result.out
    result = run("verify", tmp_path / "new", "--json")
    assert result.code == 1
    assert result.json["passed"] is False
    assert run("verify", tmp_path / "new", "--tolerance", "0").code == 1


BAD: list[tuple[list[str], str]] = [
    (["--variant", "neurall"], "unknown variant 'neurall'; did you mean 'neural'?"),
    (["--variant", "neural", "--set", "neural.prest=x"], "did you mean 'preset'?"),
    (["--variant", "neural", "--set", "neural.preset=marien"], "did you mean 'marian'?"),
    (["--variant", "neural", "--set", "elu.scale=1"], "unknown name 'elu'"),
    (["--variant", "neural", "--set", "preset"], "VARIANT.OPTION=VALUE"),
    (["--variant", "neural", "--layers", "9"], "no layer 9"),
    (["--variant", "neural", "--layers", "x"], "layers has 'x'"),
    (["--variant", "neural", "--sites", "encodr"], "did you mean 'encoder'?"),
    (["--variant", "neural", "--init", "papr"], "did you mean 'paper'?"),
    (["--variant", "neural", "--init", "calibrate"], "calibration text"),
    (["--variant", "neural+linear"], "both replace the stage 'project'"),
    (["--variant", "top_r", "--set", "top_r.r=0"], "top_r.r is 0; the rule is: 1 or more"),
    (["--variant", "alignment", "--set", "alignment.weight=-1"], "zero or more"),
    (["--spec", "nowhere.yaml"], "does not exist"),
    (["--spec", "nowhere.yaml", "--set", "neural.noise=1"], "--set goes with --variant"),
    ([], "either --variant or --spec"),
    (["--variant", "neural", "--nope"], "--nope"),
    (["--variant", "neural", "--seed", "x"], "'--seed'"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_bad_options(run: Any, stock: Path, tmp_path: Path, words: list[str], message: str) -> None:
    result = run("convert", stock, tmp_path / "new", *words)
    assert result.code == 2
    assert result.out == ""
    assert message in result.err
    assert result.err.startswith("attnpatch: ")
    assert result.err.count("\n") == 1
    result = run("convert", stock, tmp_path / "new", *words, "--json")
    assert (result.code, result.err) == (2, "")
    assert message in result.json["error"]
    assert {p.name for p in tmp_path.iterdir()} == {"stock"}


def test_bad_checkpoints(run: Any, stock: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    whole = (stock / "model.safetensors").read_bytes()
    (stock / "model.safetensors").write_bytes(whole[:-7])
    for path, message in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "empty", "no config.json: not a transformers checkpoint"),
        (tmp_path / "gpt2", "unknown model type 'gpt2'"),
        (stock, "is damaged"),
    ):
        for command in (
            ["convert", path, tmp_path / "new", "--variant", "neural"],
            ["inspect", path],
            ["verify", path],
            ["revert", path, tmp_path / "new"],
        ):
            result = run(*command)
            assert (result.code, result.out) == (2, "")
            assert message in result.err
            assert "Traceback" not in result.err
            assert result.err.count("\n") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"stock", "empty", "gpt2"}


def test_commands_that_do_not_exist(run: Any) -> None:
    result = run("convrt", "a", "b")
    assert result.code == 2
    assert "convert" in result.err
    assert "(see attnpatch --help)" in result.err


def test_a_wrong_option_leads_to_the_commands_own_help(run: Any) -> None:
    assert "(see attnpatch bench --help)" in run("bench", "--repeats", "0").err
    assert "(see attnpatch convert --help)" in run("convert", "a").err


@pytest.mark.parametrize("asked", ["trton", "plain", "blocked", "triton", "auto"])
def test_env_shows_what_a_call_gets(run: Any, monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    """As the environment variable sets it, which is read at the import."""
    monkeypatch.setattr(dispatch, "_asked", asked)
    result = run("env", "--json")
    x = torch.randn(1, 1, 512, 64)
    if asked == "trton":
        assert result.code == 2
        assert "unknown ATTNPATCH_KERNEL 'trton'; did you mean 'triton'?" in result.json["error"]
        return
    row = result.json["kernels"]["cpu float32"]
    if row.startswith("an error: "):
        with pytest.raises(SpecError, match=re.escape(row.split("(", 1)[1].removesuffix(")"))):
            expressive_attention(x, x, x)
    else:
        assert row == ("blocked" if asked == "auto" else asked)
        expressive_attention(x, x, x)


def test_debug_shows_the_traceback(run: Any, tmp_path: Path) -> None:
    level = _hf_verbosity()
    try:
        for words in (["--debug", "inspect", "nowhere/x/y"], ["inspect", "nowhere/x/y", "--debug"]):
            result = run(*words)
            assert result.code == 2
            assert "Traceback" in result.err
            assert result.err.rstrip().endswith("attnpatch: checkpoint 'nowhere/x/y' does not exist")
    finally:
        _hf_verbosity(level)


def _hf_verbosity(level: int | None = None) -> int:
    from transformers.utils import logging

    if level is not None:
        logging.set_verbosity(level)
    return int(logging.get_verbosity())


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_signals(
    run: Any, stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int, word: str
) -> None:
    before = (stock / "model.safetensors").read_bytes()
    write = checkpoint_files.write_weights

    def interrupted(folder: Path, *args: Any) -> dict[str, Any]:
        write(folder, *args)
        signal.raise_signal(number)
        return {}

    monkeypatch.setattr(checkpoint_files, "write_weights", interrupted)
    handler = signal.getsignal(signal.SIGTERM)
    # A process that a shell starts in the background ignores SIGINT, and so would this test.
    keyboard = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = run("convert", stock, tmp_path / "new", "--variant", "neural")
    finally:
        signal.signal(signal.SIGINT, keyboard)
    assert result.code == code
    assert result.err == f"attnpatch: {word}; nothing half-written was left behind\n"
    assert {p.name for p in tmp_path.iterdir()} == {"stock"}
    assert (stock / "model.safetensors").read_bytes() == before
    assert signal.getsignal(signal.SIGTERM) is handler


def test_faults_of_its_own(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnpatch import checkpoint

    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(checkpoint, "inspect", broken)
    result = run("inspect", "x")
    assert result.code == 3
    assert result.err == "attnpatch: unexpected ZeroDivisionError: oh; run it again with --debug for the traceback\n"


PLUGIN = """
from dataclasses import dataclass
from attnpatch import register_variant
from attnpatch.kernels.score import attention_weights
from attnpatch.methods.base import StageVariant
from attnpatch.stages.score import SoftmaxScore

@register_variant
class Mine(StageVariant):
    name, stage, summary, paper = "mine", "score", "softmax again", "none"

    def build(self, options, site):
        return type("MineScore", (SoftmaxScore,), {})()

    def preserves(self, options):
        return True
"""


def test_plugins(run: Any, stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnpatch import registry

    (tmp_path / "my_plugin.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    registry.variants()
    monkeypatch.setattr(registry, "_variants", dict(registry._variants))
    for words in (["--plugin", "my_plugin", "variants"], ["variants", "--plugin=my_plugin"]):
        assert "softmax again" in run(*words).out
    assert run("--plugin", "my_plugin", "convert", stock, "new", "--variant", "mine").code == 0
    result = run("--plugin", "my_plugn", "variants")
    assert result.code == 2
    assert "plugin 'my_plugn' cannot be imported" in result.err
    (tmp_path / "my-plugin.py").write_text(PLUGIN.replace("mine", "other"))
    assert run("--plugin", "my-plugin", "variants").code == 0
    for path, module in (("./my_plugin.py", "my_plugin"), ("my_plugin.py", "my_plugin"), ("a/b.py", "a.b")):
        result = run("--plugin", path, "variants")
        assert result.code == 2
        assert (
            f"plugin {path!r} is a file, and a module is wanted, without folder and .py: --plugin {module},"
            in result.err
        )
    sys.modules.pop("my_plugin", None)


def python(code: str, *words: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, cwd=ROOT, timeout=300
    )


def test_help_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\nfrom attnpatch.cli import main\n"
        "for words in (['--help'], ['convert', '--help'], ['inspct']): main(words)\n"
        "assert not {'torch', 'transformers', 'rich'} & set(sys.modules), 'heavy imports'"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    for command in ("variants", "convert", "inspect", "verify", "revert", "report", "env", "--plugin", "--debug"):
        assert command in result.stdout


def test_revisions_of_the_hub(run: Any, stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command opens the revision that it was given, of the checkpoint and of its source apart."""
    import huggingface_hub

    revisions = {
        ("org/stock", "v1"): stock,
        ("org/new", "expressive"): tmp_path / "a",
        ("org/new", "neural"): tmp_path / "b",
    }
    asked = []

    def download(name: str, *, revision: str | None = None, **rest: Any) -> str:
        asked.append((name, revision))
        if (name, revision) not in revisions:
            raise huggingface_hub.errors.LocalEntryNotFoundError(f"{name} has no {revision}")
        return str(revisions[name, revision])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    for variant, folder in (("expressive", "a"), ("neural", "b")):
        result = run("convert", "org/stock", folder, "--variant", variant, "--revision", "v1", "--json")
        assert (result.code, result.json["source"]) == (0, "org/stock")
    for variant in ("expressive", "neural"):
        assert run("inspect", "org/new", "--revision", variant, "--json").json["spec"].startswith(variant)
    assert run("inspect", "org/new").code == 2
    words = ["verify", "org/new", "--revision", "neural", "--against", "org/stock", "--json"]
    assert run(*words).code == 2
    result = run(*words, "--against-revision", "v1")
    assert result.json["passed"] is True
    assert result.json["spec"].startswith("neural")
    result = run("revert", "org/new", "back", "--revision", "expressive", "--json")
    assert result.json["spec"].startswith("expressive")
    asked.clear()
    words = ["--source", "org/stock", "--source-revision", "v1", "--force"]
    assert run("revert", "org/new", "back", "--revision", "neural", *words).code == 0
    assert asked == [("org/new", "neural"), ("org/stock", "v1")]
    assert (tmp_path / "back/model.safetensors").read_bytes() == (stock / "model.safetensors").read_bytes()


def test_plain_transformers_refuses_a_converted_checkpoint(run: Any, stock: Path, tmp_path: Path) -> None:
    run("convert", stock, tmp_path / "new", "--variant", "neural")
    code = """
import sys
from transformers import AutoModel, BertForMaskedLM
for cls in (AutoModel, BertForMaskedLM):
    try:
        cls.from_pretrained(sys.argv[1])
    except ValueError as error:
        assert "attnpatch" in str(error), error
    else:
        raise SystemExit(f"{cls.__name__} loaded it")
assert "attnpatch" not in sys.modules
BertForMaskedLM.from_pretrained(sys.argv[2])
print("refused")
"""
    run("revert", tmp_path / "new", tmp_path / "back")
    result = python(code, tmp_path / "new", tmp_path / "back")
    assert result.returncode == 0, result.stderr
    assert "refused" in result.stdout
