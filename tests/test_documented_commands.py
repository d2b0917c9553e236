"""What the documentation tells people to type: every command over a config parses, every config is some script's."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_script import SCRIPTS, config_class, entry_points

from attnpatch.training.config import load_config

ROOT = Path(__file__).resolve().parents[1]
TRAINING = ("train_marian", "train_mlm", "train_classifier", "train_sequences", "eval_value_aware")
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").glob("*.yaml"), *SCRIPTS.glob("*.py")]
# What a reader puts in the place of these words.
PLACES = {
    "[key=value ...]": "",
    "[key=value]": "",
    '"${@:3}"': "",
    "$1": "x",
    "$2": "2",
    "SEED": "1",
    "ARM": "",
    "SPEC": "neural",
    "TASK": "rte",
}


def commands(page: Path) -> Iterator[tuple[str, str, list[str]]]:
    """(script, config, settings) of each command on the page that names a config."""
    text = re.sub(r"\\\n[ #]*", " ", page.read_text(encoding="utf-8"))
    for script, config, rest in re.findall(r"scripts/(\w+)\.py (configs/[\w-]+\.yaml)([^`\n]*)", text):
        rest = re.split(r";|\s#|\s\|\s|\s--", rest)[0]
        for place, word in PLACES.items():
            rest = rest.replace(place, word)
        # A sentence may go on behind a command: only settings are of it.
        yield script, config, [word for word in shlex.split(rest) if re.match(r"[\w.]+=", word)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for script, config, words in commands(page):
        needed = ["models=[a]"] if script == "eval_value_aware" and not any("models=" in w for w in words) else []
        load_config(config_class(script), config, [*words, *needed])


def test_there_are_commands() -> None:
    found = {(script, config) for page in PAGES for script, config, _ in commands(page)}
    assert {script for script, _ in found} == {*TRAINING}
    assert len(found) > 12


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_is_some_scripts(config: Path) -> None:
    """By the script that its first lines name."""
    (script, *_) = re.findall(r"scripts/(\w+)\.py", config.read_text(encoding="utf-8"))
    load_config(config_class(script), config, ["models=[a]"] if script == "eval_value_aware" else [])


def test_a_wrong_key_is_told_before_torch_is_loaded() -> None:
    wheres = [entry_points(script) for script in (*TRAINING, "demo")]
    code = f"""
import sys
from attnpatch.training.cli import main
for config, run in {wheres}:
    assert main(["seeed=2"], None, config, run) == 2
assert not {{"torch", "transformers"}} & set(sys.modules), "loaded"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert done.stderr.count("error: unknown key") == len(wheres)
