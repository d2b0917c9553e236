"""Several processes: they see what one process with as large a batch sees, shard what they should, and are not fewer
than were asked for."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from distributed_worker import FAMILIES, SPEC, STEPS, family_batch, family_model, steps, trained, translation

import attnpatch
from attnpatch.errors import CheckpointError
from attnpatch.experiments.translation.config import MarianTrainingConfig
from attnpatch.training import distribution
from attnpatch.training.batching import SentenceBatchSampler
from attnpatch.training.checkpoints import load_weights
from attnpatch.training.distribution import check_accelerator, check_before, check_launch, hold, releases_folders
from attnpatch.training.errors import ConfigError, TrainingError
from attnpatch.training.sharding import layers

ROOT = Path(__file__).resolve().parents[1]
ACCELERATE = ROOT / "configs" / "accelerate"
# One worker for all of them: the two processes are started once.
pytestmark = pytest.mark.xdist_group("distribution")
CLEAN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PMI_SIZE")


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in CLEAN and not k.startswith(("ACCELERATE_", "FSDP_"))}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TRANSFORMERS_VERBOSITY": "error"} | more


def torchrun(*words: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *map(str, words)]
    return subprocess.run(command, env=environment(**more), capture_output=True, text=True, timeout=1500)


# ---- two processes against one ----


SLOW_FSDP = pytest.param("fsdp", marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """What two processes leave behind, each case once (distributed_worker.py); FSDP2 takes a launch of its own."""
    out, seed = tmp_path_factory.mktemp("two"), random.randrange(10**6)

    def of(case: str) -> list[Any]:
        files = [out / f"{case}-{rank}.pt" for rank in (0, 1)]
        if not files[1].exists():
            cases = [case] if case in ("fsdp", "zero") else ["ddp", "not_finite", "fully_sharded"]
            done = torchrun(ROOT / "tests" / "distributed_worker.py", out, str(seed), *cases)
            assert done.returncode == 0, done.stderr[-4000:]
        return [torch.load(file, weights_only=False) for file in files]

    return SimpleNamespace(out=out, seed=seed, of=of)


@pytest.fixture(scope="module")
def one(two: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same training by one process with a batch of twice the size."""
    torch.set_num_threads(1)
    trainer = translation(tmp_path_factory.mktemp("one"), two.seed, 1)
    return trained(trainer) | {"state": trainer.model.state_dict()}


@pytest.mark.parametrize("case", ["ddp", SLOW_FSDP])
def test_two_processes_train_as_one_with_twice_the_batch(two: SimpleNamespace, one: dict[str, Any], case: str) -> None:
    """Unequal lengths, an unequal last batch, label smoothing, clipping and the alignment loss included."""
    ranks = two.of(case)
    assert len(one["losses"]) == 8
    for found in ranks:
        for what in ("losses", "auxiliary", "norms"):
            assert found[what] == pytest.approx(one[what], rel=2e-4), what
        assert found["eval"] == pytest.approx(one["eval"], rel=2e-4)
    assert one["auxiliary"][0] != 0
    if case == "ddp":
        for found in ranks:
            for name, value in one["state"].items():
                torch.testing.assert_close(found["state"][name], value, atol=2e-5, rtol=2e-4, msg=name)


def test_each_process_sees_its_own_part_of_every_batch(two: SimpleNamespace, one: dict[str, Any]) -> None:
    ranks = two.of("ddp")
    assert [sorted(a + b) for a, b in zip(ranks[0]["seen"], ranks[1]["seen"], strict=True)] == [
        sorted(rows) for rows in one["seen"]
    ]


@pytest.mark.parametrize("case", ["ddp", SLOW_FSDP])
def test_translations_of_two_processes(two: SimpleNamespace, case: str) -> None:
    """Every process has all of them, in order, each once: what the final model says to one row at a time."""
    ranks = two.of(case)
    assert ranks[0]["translations"] == ranks[1]["translations"]
    assert len(ranks[0]["translations"]) == 27


def test_a_loss_that_is_not_finite_stops_both(two: SimpleNamespace) -> None:
    first, second = (found["error"] for found in two.of("not_finite"))
    assert first.startswith("the loss of process 1 is not finite at step 3")
    assert second.startswith("the loss is nan at step 3 in process 1")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fully_sharded_model_trains_saves_and_reloads(two: SimpleNamespace, family: str) -> None:
    model = family_model(family, two.seed)
    losses = steps(model, family_batch(family, two.seed, slice(0, 4)))
    ranks = [found[family] for found in two.of("fully_sharded")]
    assert [found["not sharded"] for found in ranks] == [[], []]
    means = [sum(pair) / 2 for pair in zip(*(found["losses"] for found in ranks), strict=True)]
    assert len(losses) == STEPS
    assert means == pytest.approx(losses, rel=2e-4)
    folder = two.out / f"sharded-{family}"
    again = type(model).from_pretrained(folder).eval()
    assert json.loads((folder / "config.json").read_text())["architectures"] == [type(model).__name__]
    with torch.no_grad():
        batch = family_batch(family, two.seed, slice(0, 4))
        expected, logits = model.eval()(**batch).logits, again(**batch).logits
    torch.testing.assert_close(logits, ranks[0]["logits"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_zero_trains_as_one_process(two: SimpleNamespace, family: str, stage: int) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (pip install deepspeed)")
    losses = steps(family_model(family, two.seed), family_batch(family, two.seed, slice(0, 4)))
    ranks = [found[f"{family} {stage}"] for found in two.of("zero")]
    means = [sum(pair) / 2 for pair in zip(*ranks, strict=True)]
    assert losses[0] != losses[-1]
    assert means == pytest.approx(losses, rel=2e-4)


@pytest.mark.slow
def test_checkpoints_of_a_sharded_run(two: SimpleNamespace) -> None:
    """They are whole, load into the sharded model, and a run goes on from one as if it had not stopped."""
    ranks = two.of("fsdp")
    for found in ranks:
        assert found["sharded"]
        assert found["checkpoints"] == ["checkpoint-4", "checkpoint-8"]
        assert found["last"].endswith("checkpoint-8")
    models = {
        name: attnpatch_model(two.out / name)
        for name in ("fsdp-model", "fsdp-resumed", "fsdp/checkpoint-4", "fsdp/checkpoint-8")
    }
    state = models["fsdp-model"].state_dict()
    for name in ("fsdp-resumed", "fsdp/checkpoint-8"):
        for key, value in models[name].state_dict().items():
            torch.testing.assert_close(value, state[key], atol=1e-6, rtol=1e-5, msg=f"{name} {key}")
    trainer = translation(two.out / "single", two.seed, 1)
    load_weights(trainer.model, [two.out / "fsdp" / "checkpoint-4"])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(ranks[0]["eval of checkpoint-4"], rel=1e-5)


def attnpatch_model(folder: Path) -> Any:
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert model.config.attnpatch
    return model


# ---- batches ----


@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_a_step_of_several_processes_is_a_batch_of_one(group: bool, processes: int) -> None:
    count = random.randrange(200, 400)
    count += (processes - count % (6 * processes)) % (6 * processes) if count % (6 * processes) < processes else 0
    lengths, seed = [random.randint(2, 60) for _ in range(count)], random.randrange(1000)
    many = list(SentenceBatchSampler(lengths, 6, seed, processes, group))
    single = list(SentenceBatchSampler(lengths, 6 * processes, seed, 1, group))
    assert [list(chain(*many[i : i + processes])) for i in range(0, len(many), processes)] == single


def test_too_few_left_for_every_process() -> None:
    batches = list(SentenceBatchSampler([5] * 25, 2, 3, 4))
    assert len(batches) % 4 == 0
    assert sorted(chain(*batches)) == list(range(25))
    assert {len(batch) for batch in batches} == {1, 2}


# ---- what was asked for, and what is ----


def state(processes: int, kind: str) -> Any:
    return SimpleNamespace(num_processes=processes, distributed_type=f"DistributedType.{kind}")


LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no"}
FSDP, DEEPSPEED = {"ACCELERATE_USE_FSDP": "true"}, {"ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.mark.parametrize(
    ("given", "processes", "kind", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, 1, "NO", "asked for 2 processes, but this one knows of 1"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, 1, "NO", "asked for 4 processes"),
        ({"PMI_SIZE": "3"}, 1, "NO", "asked for 3 processes"),
        (LAUNCHED | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, 1, "NO", "asked for several processes"),
        (FSDP | {"WORLD_SIZE": "2"}, 2, "MULTI_CPU", r"asked for FSDP, but accelerate found MULTI_CPU with 2"),
        (FSDP, 1, "NO", r"asked for FSDP, but accelerate found a single process.*fsdp2\.yaml"),
        (DEEPSPEED | {"WORLD_SIZE": "2"}, 2, "MULTI_GPU", r"asked for DeepSpeed.*zero2\.yaml"),
    ],
)
def test_a_run_that_is_not_as_distributed_as_asked(given: Any, processes: int, kind: str, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        check_launch(state(processes, kind), given)


@pytest.mark.parametrize(
    ("given", "processes", "kind"),
    [
        ({}, 1, "NO"),
        (LAUNCHED, 1, "NO"),
        ({"MASTER_ADDR": "node1", "MASTER_PORT": "1"}, 1, "NO"),  # a batch script sets them for all that it starts
        ({"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"} | LAUNCHED, 1, "MULTI_GPU"),
        ({"WORLD_SIZE": "2", "RANK": "1", "PMI_SIZE": "1"}, 2, "MULTI_CPU"),
        ({"WORLD_SIZE": "16", "PMI_SIZE": "2"} | LAUNCHED, 16, "MULTI_GPU"),  # srun starts one launcher a node
        (FSDP | {"WORLD_SIZE": "2"}, 2, "MULTI_GPU"),  # accelerate calls it FSDP only once there is an Accelerator
        (DEEPSPEED | {"WORLD_SIZE": "2"}, 2, "DEEPSPEED"),
        ({"ACCELERATE_USE_FSDP": "false", "WORLD_SIZE": "2"}, 2, "MULTI_CPU"),
    ],
)
def test_launches_that_are_as_asked(given: Any, processes: int, kind: str) -> None:
    check_launch(state(processes, kind), given)


def test_what_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked, name in ((FSDP, "FSDP"), (DEEPSPEED, "DeepSpeed")):
        with pytest.raises(TrainingError, match=f"asked for {name}, but this run computes on the CPU.*torchrun"):
            check_before(True, asked)
    check_before(False, FSDP)
    check_before(True, {})
    monkeypatch.setattr(distribution.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrainingError, match="DeepSpeed, which is not installed: pip install deepspeed"):
        check_before(False, DEEPSPEED)


@pytest.mark.parametrize("script", ["train_sequences.py", "eval_value_aware.py"])
def test_work_of_one_process_refuses_several(script: str, tmp_path: Path) -> None:
    name = "nt-cpu" if script == "train_sequences.py" else "value-aware-cpu"
    words = [] if name == "nt-cpu" else ["models=[nowhere]"]
    out = tmp_path / "out"
    command = [
        sys.executable,
        ROOT / "scripts" / script,
        ROOT / "configs" / f"{name}.yaml",
        f"output.dir={out}",
        *words,
    ]
    run = subprocess.run(command, env=environment(WORLD_SIZE="2"), capture_output=True, text=True)
    assert run.returncode == 2, run.stderr
    assert "the launch asked for 2 processes, and this script wants one" in run.stderr
    assert not out.exists()


def test_the_accelerator_has_the_last_word() -> None:
    check_accelerator(state(2, "FSDP"), FSDP)
    with pytest.raises(TrainingError, match="asked for FSDP, but the model would be trained as MULTI_GPU with 2"):
        check_accelerator(state(2, "MULTI_GPU"), FSDP)


def test_precision_of_the_launch_and_of_the_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from transformers import TrainingArguments

    from attnpatch.training.runs import training_arguments

    config = MarianTrainingConfig()
    config.training.precision, config.training.device = "fp32", "cpu"
    config.output.dir = str(tmp_path)
    for launched, works in (("bf16", False), ("fp16", False), ("no", True)):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
        if works:
            assert training_arguments(TrainingArguments, config).mixed_precision == "no"
        else:
            with pytest.raises(ConfigError, match=f"mixed_precision={launched}, training.precision=fp32"):
                training_arguments(TrainingArguments, config)


def test_zero_3_cannot_read_a_checkpoint_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnpatch.training.runs import training_arguments

    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    with pytest.raises(ConfigError, match=r"training\.final=best reads a checkpoint back.*training\.final=last"):
        training_arguments(None, MarianTrainingConfig())


def test_a_folder_is_one_process_s(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from attnpatch.training.distribution import hold\n"
        "try: hold(Path(sys.argv[1]))\nexcept Exception as e: print(e)\nelse: print('taken')"
    )

    def other() -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], env=environment(), capture_output=True, text=True, check=True
        )
        return done.stdout

    @releases_folders
    def run(config: None) -> str:
        hold(tmp_path)
        hold(tmp_path)  # its own
        return other()

    assert f"another process is training in {tmp_path}" in run(None)
    assert other() == "taken\n"


def test_zero_3_does_not_fill_a_patched_model_from_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import models
    import transformers.integrations

    stock = models.masked_lm("roberta")
    stock.save_pretrained(tmp_path)
    config = attnpatch.patch_config(stock.config, "neural")
    monkeypatch.setattr(transformers.integrations, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(CheckpointError, match=r"under DeepSpeed ZeRO-3.*attnpatch convert"):
        type(stock).from_pretrained(tmp_path, config=config)


# ---- configs ----


@pytest.mark.parametrize("path", sorted(ACCELERATE.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configs(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert str(config.distributed_type).rsplit(".", 1)[-1] == kinds.get(path.stem, "NO")
    assert config.use_cpu == (path.stem == "cpu")
    assert config.mixed_precision == ("no" if path.stem == "cpu" else "bf16")
    # -1: accelerate launch wants --num_processes
    assert config.num_processes == (-1 if path.stem in kinds else 1)
    assert (config.fsdp_config or {}).get("fsdp_version") == (2 if path.stem == "fsdp2" else None)
    stage = {"zero2": 2, "zero3": 3}.get(path.stem)
    assert (config.deepspeed_config or {}).get("zero_stage") == stage
    given = set(yaml.safe_load(path.read_text()))
    assert given <= set(config.__dict__)


def test_there_is_a_config_for_each_way() -> None:
    assert {path.stem for path in ACCELERATE.glob("*.yaml")} == {"cpu", "gpu", "ddp", "fsdp2", "zero2", "zero3"}


@pytest.mark.parametrize("name", ["fsdp2", "zero2", "zero3"])
def test_accelerate_launch_passes_the_config_on(name: str, tmp_path: Path) -> None:
    """Up to the environment of the processes, by accelerate's own code; and that environment is refused on a CPU."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    words = ["--config_file", str(ACCELERATE / f"{name}.yaml"), "--num_processes", "2", "script.py"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert args.num_processes == 2
    if name == "fsdp2":
        found = prepare_multi_gpu_env(args)
        assert {
            key: found[key]
            for key in (
                "FSDP_VERSION",
                "FSDP_STATE_DICT_TYPE",
                "FSDP_CPU_RAM_EFFICIENT_LOADING",
                "FSDP_AUTO_WRAP_POLICY",
            )
        } == {
            "FSDP_VERSION": "2",
            "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
            "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        }
    else:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        found = prepare_deepspeed_cmd_env(args)[1]
        assert found["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == name[-1]
        assert found["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "false"
        assert distribution.zero_stage(found) == int(name[-1])
    assert distribution.sharding_asked(found) == {"fsdp2": "FSDP"}.get(name, "DEEPSPEED")
    with pytest.raises(TrainingError, match="computes on the CPU"):
        check_before(True, found)


@pytest.mark.parametrize("family", ["bert", *FAMILIES])
def test_layers_of_a_patched_model_keep_their_names(family: str) -> None:
    """What accelerate's wrap policy looks for, and what `shard` splits."""
    import models
    from accelerate.utils.dataclasses import get_module_class_from_name

    model = models.masked_lm(family)
    attnpatch.patch(model, SPEC)
    names = {
        "bert": ["BertLayer"],
        "roberta": ["RobertaLayer"],
        "marian": ["MarianEncoderLayer", "MarianDecoderLayer"],
    }[family]
    classes = {get_module_class_from_name(model, name) for name in names}
    assert None not in classes
    assert [type(layer) for layer in layers(model)] == [m for m in map(type, model.modules()) if m in classes]


# ---- whole scripts ----


def text(folder: Path) -> Path:
    """Lines of random words for train_mlm.py."""
    folder.mkdir()
    words = ["".join(random.choices("abcdefgh", k=random.randint(2, 6))) for _ in range(60)]
    for name, count in (("train", 200), ("valid", 20), ("test", 20)):
        lines = [" ".join(random.choices(words, k=random.randint(3, 9))) for _ in range(count)]
        (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    return folder


MLM = [
    *("model.hidden_size=32", "model.layers=1", "model.heads=2", "model.ffn_dim=48", "model.dropout=0"),
    *("data.block_size=16", "tokenizer.vocab_size=290", "training.schedule=constant", "training.max_steps=8"),
    *("training.evaluate_every=4", "training.save_every=4", "training.final=last", "training.log_every=1"),
    *(
        "training.threads=1",
        "training.precision=fp32",
        "training.device=cpu",
        "training.adam_epsilon=0.001",
        "spec=expressive+alignment",
    ),
]
LAUNCHES = {
    "accelerate launch --cpu": (["--cpu", "--num_processes", "2"], "asked for several processes"),
    "FSDP with use_cpu": (["--config_file", "fsdp.yaml"], "asked for FSDP, but this run computes on the CPU"),
}


@pytest.mark.slow
@pytest.mark.parametrize("launch", LAUNCHES)
def test_a_launch_that_would_not_share_anything_stops(tmp_path: Path, launch: str) -> None:
    config = yaml.safe_load((ACCELERATE / "fsdp2.yaml").read_text())
    (tmp_path / "fsdp.yaml").write_text(
        yaml.safe_dump(config | {"use_cpu": True, "num_processes": 2, "mixed_precision": "no"})
    )
    words, message = LAUNCHES[launch]
    out = tmp_path / "run"
    script = [str(ROOT / "scripts" / "train_mlm.py"), *MLM, f"data.dir={text(tmp_path / 'text')}", f"output.dir={out}"]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *words, *script],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert f"error: {'accelerate launch was' if 'several' in message else 'the launch'} {message}" in done.stderr
    assert "exit status 2" in done.stderr or "exitcode  : 2" in done.stderr
    assert not out.exists()


@pytest.mark.slow
def test_train_mlm_by_two_processes_is_that_by_one(tmp_path: Path) -> None:
    """Losses, masks, dev and test scores and weights; paused after a step and gone on with in between."""
    folder, script = text(tmp_path / "text"), ROOT / "scripts" / "train_mlm.py"
    common = [*MLM, f"data.dir={folder}"]
    first = subprocess.run(
        [sys.executable, str(script), *common, "training.batch_size=8", f"output.dir={tmp_path / 'one'}"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert first.returncode == 0, first.stderr[-3000:]
    two = [script, *common, "training.batch_size=4", f"output.dir={tmp_path / 'two'}"]
    paused = torchrun(*two, "training.stop_after_minutes=0")
    assert paused.returncode == 1  # torchrun's own; that of the processes is in its table
    assert "exitcode  : 75" in paused.stderr
    assert json.loads((tmp_path / "two" / "paused.json").read_text()) == {"step": 1, "steps": 8}
    alone = subprocess.run([sys.executable, *map(str, two)], env=environment(), capture_output=True, text=True)
    assert alone.returncode == 2
    assert "was written by 2 process(es), this run has 1" in alone.stderr
    done = torchrun(*two)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (tmp_path / "two" / "paused.json").exists()
    a, b = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert [entry["loss"] for entry in b["train"]] == pytest.approx([entry["loss"] for entry in a["train"]], rel=1e-4)
    assert [entry["loss"] for entry in b["dev"]] == pytest.approx([entry["loss"] for entry in a["dev"]], rel=1e-4)
    assert b["scores"]["test.txt"]["predicted_tokens"] == a["scores"]["test.txt"]["predicted_tokens"]
    assert b["scores"]["test.txt"]["loss"] == pytest.approx(a["scores"]["test.txt"]["loss"], rel=1e-4)
    assert (b["processes"], b["resumed_at"]) == (2, [1])
    assert b["tokens"]["predicted"] == a["tokens"]["predicted"]
