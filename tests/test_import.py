"""Importing attnpatch costs little, changes no stock model, and stops where the versions do not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import attnpatch
from attnpatch import _versions
from attnpatch.errors import VersionError


def python(code: str, *arguments: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_is_not_imported() -> None:
    code = """
import sys, attnpatch
heavy = [m for m in ("torch", "transformers.modeling_utils", "numpy", "yaml") if m in sys.modules]
assert not heavy, heavy
assert len(attnpatch.__all__) > 10 and "patch" in dir(attnpatch)
assert "torch" not in sys.modules
"""
    python(code)


STOCK = """
import hashlib, json, sys
if sys.argv[1] == "with":
    import attnpatch
import torch
torch.set_num_threads(1)
from transformers import BertConfig, BertForMaskedLM, MarianConfig, MarianMTModel
if sys.argv[1] == "with":
    attnpatch.patch
digest = hashlib.sha256()
small = dict(vocab_size=50, max_position_embeddings=20, pad_token_id=1)
bert = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, **small)
marian = MarianConfig(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                      decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
                      decoder_start_token_id=1, **small)
for cls, config in ((BertForMaskedLM, bert), (MarianMTModel, marian)):
    torch.manual_seed(3)
    model = cls(config).train()
    ids = torch.randint(2, 50, (2, 6))
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    for tensor in (out.logits, out.loss, *(p.grad for p in model.parameters() if p.grad is not None)):
        digest.update(tensor.detach().numpy().tobytes())
    for module in model.modules():
        digest.update(type(module).__qualname__.encode())
        assert not module._forward_hooks and "attnpatch" not in module._modules
    digest.update(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
print(digest.hexdigest())
"""


def test_stock_models_are_bit_identical() -> None:
    assert python(STOCK, "with") == python(STOCK, "without")


def test_attnpatch_after_transformers() -> None:
    """The other tests import it first."""
    code = """
import transformers.modeling_utils, attnpatch
from transformers import BertConfig, BertModel
config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
model = BertModel(attnpatch.patch_config(config, "neural+expressive"))
print(len(attnpatch.patched_modules(model)))
"""
    assert python(code).strip() == "1"


@pytest.mark.parametrize(
    ("package", "version", "words"),
    [
        ("transformers", "4.57.1", "attnpatch .* works with transformers >= 5.14, < 6.0, but 4.57.1 is installed"),
        ("transformers", "5.13.2", "5.13.2 is installed"),
        ("transformers", "6.0.0", "6.0.0 is installed"),
        ("torch", "2.10.1+cu128", "torch >= 2.11, but 2.10.1"),
        ("torch", None, "needs torch >= 2.11, which is not installed"),
    ],
)
def test_versions(monkeypatch: pytest.MonkeyPatch, package: str, version: str | None, words: str) -> None:
    real = metadata.version

    def fake(name: str) -> str:
        if name != package:
            return real(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", fake)
    with pytest.raises(VersionError, match=words) as caught:
        _versions.check()
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ImportError)


@pytest.mark.parametrize("version", ["5.14.0", "5.17.0", "5.23.0.dev0", "5.99"])
def test_versions_inside_the_window(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version if name == "transformers" else "2.13.0+cpu")
    _versions.check()


def test_an_unsupported_version_stops_the_import() -> None:
    code = """
from importlib import metadata
real = metadata.version
metadata.version = lambda name: "4.40.0" if name == "transformers" else real(name)
try:
    import attnpatch
except ImportError as error:
    print(error)
"""
    text = python(code).strip()
    assert "4.40.0" in text
    assert "5.14" in text


@pytest.mark.parametrize("way", ["script", "module"])
@pytest.mark.parametrize(
    ("package", "version", "words"),
    [
        ("transformers", "4.40.0", "transformers >= 5.14, < 6.0, but 4.40.0 is installed"),
        ("torch", None, "needs torch >= 2.11, which is not installed"),
    ],
)
def test_the_command_says_it_in_one_sentence(
    tmp_path: Path, way: str, package: str, version: str | None, words: str
) -> None:
    """The console script's first line is the import that fails: attnpatch's command line has not run yet."""
    (tmp_path / "sitecustomize.py").write_text(f"""
from importlib import metadata
real = metadata.version
def fake(name):
    found = {version!r} if name == {package!r} else real(name)
    if not found:
        raise metadata.PackageNotFoundError(name)
    return found
metadata.version = fake
""")
    script = tmp_path / "bin" / "attnpatch"
    script.parent.mkdir()
    script.write_text("import sys\nfrom attnpatch.cli import main\nsys.exit(main())\n")
    start = {"script": [str(script)], "module": ["-m", "attnpatch"]}[way]
    root = str(Path(attnpatch.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), root))}

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *start, *arguments], capture_output=True, text=True, env=environment)

    done = call("variants")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("attnpatch: attnpatch ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    done = call("env", "--json")
    assert (done.returncode, done.stderr) == (2, "")
    found = json.loads(done.stdout)
    assert words in found["error"]
    assert found["exit_code"] == 2


def test_names() -> None:
    assert set(attnpatch.variants()[:2]) == {"linear", "neural"}
    with pytest.raises(AttributeError, match="no attribute 'pach'"):
        _ = attnpatch.pach
    missing = [name for name in attnpatch.__all__ if not _importable(name)]
    assert not missing
    json.dumps(attnpatch.AttentionSpec.parse("neural").to_dict())


def _importable(name: str) -> bool:
    value: Any = getattr(attnpatch, name)
    return value is not None
