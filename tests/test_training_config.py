"""Configs: types, ranges, overrides, unknown keys, environment variables."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnpatch.experiments.translation.config import MarianTrainingConfig
from attnpatch.training.config import load_config
from attnpatch.training.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def load(*overrides: str, text: str = "", folder: Path | None = None) -> MarianTrainingConfig:
    path = None
    if folder is not None:
        path = folder / "config.yaml"
        path.write_text(text, encoding="utf-8")
    return load_config(MarianTrainingConfig, path, overrides)


def test_file_then_overrides(tmp_path: Path) -> None:
    text = "seed: 4\ntraining:\n  epochs: 2\n  learning_rate: 1e-3\ndata:\n  test: [a, b]\n"
    config = load("training.epochs=0.5", "spec=neural+expressive", "data.dev=valid", text=text, folder=tmp_path)
    assert config.seed == 4
    assert config.training.epochs == 0.5
    assert config.training.learning_rate == 1e-3  # which YAML 1.1 reads as text
    assert config.data.test == ["a", "b"]
    assert config.data.dev == ["valid"]
    assert config.spec == "neural+expressive"


def test_spec_may_be_a_mapping_and_stock_is_none() -> None:
    assert load("spec={variant: neural, layers: 0-1}").spec == {"variant": "neural", "layers": "0-1"}
    assert load("spec=stock").spec is None


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("training.epoch=3", ["'training.epoch'", "did you mean 'training.epochs'", "max_steps"]),
        ("sed=3", ["'sed'", "did you mean 'seed'", "training"]),
        ("training.schedule=linea", ["training.schedule", "did you mean 'linear'", "inverse_sqrt"]),
        ("training.epochs=many", ["training.epochs='many'", "a number"]),
        ("training.max_tokens=1.5", ["training.max_tokens", "a whole number"]),
        ("training.label_smoothing=1.5", ["at most 0.99"]),
        ("training.gradient_accumulation=0", ["at least 1"]),
        ("training=3", ["training is a section", "max_tokens"]),
        ("seed.x=3", ["seed=", "a whole number"]),
        ("training.epochs", ["key=value"]),
        ("model.heads=7", ["d_model=256", "heads=7"]),
        ("training.evaluate_every=sometimes", ["epoch, never"]),
        ("training.evaluate_every=50", ["final=best", "save_every"]),
        ("data.lowercase=3", ["true or false"]),
    ],
)
def test_bad_overrides(word: str, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(word)
    for part in expected:
        assert part in str(caught.value)


def test_a_section_keeps_the_values_that_are_not_named() -> None:
    """A script's own values for a section, not those of the section's class."""
    from attnpatch.experiments.language_models.config import MLMTrainingConfig
    from attnpatch.experiments.sequences.config import SequencesConfig

    for kind, word in ((MLMTrainingConfig, "output.quiet=true"), (SequencesConfig, "training.batch_size=8")):
        section, _, name = word.partition("=")[0].partition(".")
        before, after = (load_config(kind, None, words).as_dict() for words in ((), (word,)))
        assert before[section].pop(name) != after[section].pop(name)
        assert before == after


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["learning_rate=1"], "unknown key 'learning_rate'; did you mean 'training.learning_rate'? Known: data, "),
        (["packages=1"], "unknown key 'packages'"),
        (["data.path=x"], "unknown key 'data.path'"),
        (["training.zzz=1"], "unknown key 'training.zzz'. Known in training: adam_beta1, "),
        (["training.learning_rte=1"], "did you mean 'training.learning_rate'? Known in training: "),
    ],
)
def test_an_unknown_key_is_looked_for_everywhere(words: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*words)
    assert expected in str(caught.value)


def test_the_config_of_another_script(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"glue-cpu\.yaml: unknown key 'task'.*config of another script"):
        load_config(MarianTrainingConfig, CONFIGS / "glue-cpu.yaml")
    for word, key in (("task.name=sst2", "task"), ("training={epocs: 3}", "training.epocs")):
        with pytest.raises(ConfigError) as caught:  # here the file is right
            load_config(MarianTrainingConfig, CONFIGS / "multi30k-cpu.yaml", [word])
        assert str(caught.value).startswith(f"unknown key {key!r}")
    (tmp_path / "typo.yaml").write_text("training:\n  epocs: 3\n")
    with pytest.raises(ConfigError, match=r"typo\.yaml: unknown key 'training\.epocs'; did you mean") as caught:
        load_config(MarianTrainingConfig, tmp_path / "typo.yaml")
    assert "another script" not in str(caught.value)


def test_a_wrong_spec_is_told_with_the_config() -> None:
    from attnpatch.errors import SpecError

    with pytest.raises(SpecError, match="did you mean 'neural'"):
        load("spec=neurall")


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(text="a: [1,", folder=tmp_path)
    with pytest.raises(ConfigError, match="mapping"):
        load(text="- 1\n", folder=tmp_path)
    with pytest.raises(ConfigError, match=r"no config file .*other\.yaml; in .*config\.yaml"):
        load_config(MarianTrainingConfig, tmp_path / "other.yaml")


def test_a_key_stands_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not valid YAML: .*'training' stands twice"):
        load(text="training:\n  epochs: 2\nseed: 3\ntraining:\n  max_tokens: 5\n", folder=tmp_path)

    with pytest.raises(ConfigError, match="stands twice"):
        load("training={epochs: 1, epochs: 9}")
    text = "training:\n  <<: {epochs: 2, max_tokens: 7}\n  epochs: 3\n"  # which YAML allows
    assert load(text=text, folder=tmp_path).training.epochs == 3


def test_a_mapping_for_a_section_changes_what_it_names(tmp_path: Path) -> None:
    text = "training:\n  epochs: 2\n  batching: sentences\nspec: {neural: {preset: marian}}\n"
    config = load("training={epochs: 3}", "spec={expressive: {}}", text=text, folder=tmp_path)
    assert (config.training.epochs, config.training.batching) == (3, "sentences")
    assert config.spec == {"expressive": {}}  # no section: it is replaced


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_FOLDER", "/there")
    assert load("data.dir=${SOME_FOLDER}/x").data.dir == "/there/x"
    monkeypatch.delenv("SOME_FOLDER")
    assert load("data.dir=${SOME_FOLDER:-here}").data.dir == "here"
    with pytest.raises(ConfigError, match="SOME_FOLDER"):
        load("data.dir=${SOME_FOLDER}")


@pytest.mark.parametrize(
    "name", ["multi30k-cpu", "deen-base-cpu", "deen-base-gpu", "ted-neural-cpu", "ted-neural-gpu", "iwslt17-paper"]
)
def test_shipped_configs_load(name: str) -> None:
    config = load_config(MarianTrainingConfig, CONFIGS / f"{name}.yaml", ["spec=neural"])
    assert config.spec == "neural"
    assert not Path(config.data.dir).is_absolute()


def test_one_variable_names_the_folder_of_all_data(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnpatch.experiments.language_models.config import MLMTrainingConfig
    from attnpatch.experiments.value_aware.config import ValueAwareConfig

    monkeypatch.setenv("ATTNPATCH_DATA", "/there")
    path = CONFIGS / "multi30k-cpu.yaml"
    assert load_config(MarianTrainingConfig, path).data.dir == "/there/multi30k"
    assert load_config(MarianTrainingConfig, path, ["data.dir=/here/multi30k"]).data.dir == "/here/multi30k"
    for name in ("deen-base-cpu", "deen-base-gpu", "ted-neural-cpu", "ted-neural-gpu"):
        assert load_config(MarianTrainingConfig, CONFIGS / f"{name}.yaml").data.dir == "/there"
    for name in ("wikitext-cpu", "wikitext-gpu"):
        assert load_config(MLMTrainingConfig, CONFIGS / f"{name}.yaml").data.dir == "/there/wikitext"
    assert load_config(ValueAwareConfig, CONFIGS / "value-aware-cpu.yaml", ["models=[a]"]).data.dir == "/there/wikitext"
    monkeypatch.delenv("ATTNPATCH_DATA")
    assert load_config(MarianTrainingConfig, path).data.dir == "data/multi30k"


def test_paper_settings() -> None:
    config = load_config(MarianTrainingConfig, CONFIGS / "iwslt17-paper.yaml")
    training = config.training
    assert config.model.pretrained == "Helsinki-NLP/opus-mt-de-en"
    assert (training.batching, training.batch_size, training.epochs, config.seed) == ("sentences", 32, 6, 42)
    assert (training.learning_rate, training.adam_beta1, training.adam_beta2, training.adam_epsilon) == (
        5e-5,
        0.9,
        0.999,
        1e-8,
    )
    assert (training.schedule, training.warmup_steps, training.weight_decay) == ("linear", 0, 0.0)
    assert (training.clip_norm, training.precision, training.label_smoothing) == (1.0, "fp32", 0.0)
    assert (config.data.max_source_length, config.data.max_target_length) == (1024, 128)


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_the_arms_start_from_what_the_base_config_writes(scale: str) -> None:
    base = load_config(MarianTrainingConfig, CONFIGS / f"deen-base-{scale}.yaml")
    arms = load_config(MarianTrainingConfig, CONFIGS / f"ted-neural-{scale}.yaml")
    assert arms.model.pretrained == f"{base.output.dir}/model"
    assert arms.data.dev == base.data.dev
    assert arms.data.test == base.data.test
    assert not set(map(str, arms.data.train)) & set(map(str, base.data.train))


def test_calibration_needs_a_checkpoint() -> None:
    with pytest.raises(ConfigError, match=r"init=calibrate fits .* model\.pretrained"):
        load("spec=neural", "init=calibrate")
    assert load("spec=neural", "init=calibrate", "model.pretrained=x").init == "calibrate"
    assert load("init=calibrate").spec is None  # stock has nothing to fit
