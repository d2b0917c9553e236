"""How well r keys can stand for all: loss and output error of sparse attention in a trained language model.

Value-aware Approximate Attention (Gupta & Berant, EMNLP 2021, arXiv 2103.09857): the figure of loss and error against r
for the value-oblivious optimum (OVO, `top_r`), the value-aware one (OVA, `oracle`), the practical selectors between
them, and exact attention as the floor. `run` is what scripts/eval_value_aware.py calls.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attnpatch
from attnpatch.atomic import write_json
from attnpatch.environment import available_cpus, machine, versions
from attnpatch.experiments.language_models.blocks import FixedBlocks, make_blocks
from attnpatch.experiments.language_models.model import FAMILIES, check_block_size
from attnpatch.experiments.language_models.text import LineText, load_text, merge_text
from attnpatch.experiments.value_aware.config import EXACT, ValueAwareConfig
from attnpatch.experiments.value_aware.report import draw
from attnpatch.functional import top_r_weights, value_aware_weights
from attnpatch.pipeline import AttentionPipeline, pipeline_of
from attnpatch.registry import find_sites
from attnpatch.stages.select import SelectStage
from attnpatch.training.batching import IGNORE
from attnpatch.training.distribution import check_alone, hold, releases_folders
from attnpatch.training.errors import TrainingError
from attnpatch.training.files import read_json, sha256_file, sha256_lines
from attnpatch.training.losses import perplexity, token_loss
from attnpatch.training.modeling import checkpoint_errors, load_whole
from attnpatch.training.results import count_parameters, write_results
from attnpatch.training.run_folder import check_folder
from attnpatch.training.runs import speaker
from attnpatch.training.tokenizers import load_fast_tokenizer


class OutputErrors(SelectStage):
    """Keeps all keys, and measures on the way what each sparse choice of them would do to the output.

    `total[method, r]` is the sum of ||o - o~|| / ||o|| over the queries seen so far, `queries` their number.
    """

    def __init__(self, choices: Sequence[tuple[str, int]], swaps: int) -> None:
        super().__init__()
        self.choices = list(choices)
        self.swaps = swaps
        self.total = dict.fromkeys(self.choices, 0.0)
        self.queries = 0

    def forward(self, weights: Tensor, value: Tensor) -> Tensor:
        value64 = value.double()
        output = weights.double() @ value64
        size = output.norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
        for method, r in self.choices:
            sparse = sparse_weights(method, weights, value, r, self.swaps).double()
            self.total[method, r] += float(((sparse @ value64 - output).norm(dim=-1) / size).sum())
        self.queries += size.numel()
        return weights


def sparse_weights(method: str, weights: Tensor, value: Tensor, r: int, swaps: int = 0) -> Tensor:
    """The weights [..., T, S] of one method at r."""
    if method == "top_r":
        return top_r_weights(weights, r)
    return value_aware_weights(weights, value, r, selector=method, swaps=swaps if method == "oracle" else 0)


def sparse_spec(method: str, r: int, swaps: int = 0) -> dict[str, dict[str, Any]]:
    """The spec that makes a model attend so."""
    if method == "top_r":
        return {"top_r": {"r": r}}
    options: dict[str, Any] = {"r": r, "selector": method}
    return {"value_aware": options | ({"swaps": swaps} if method == "oracle" and swaps else {})}


# Settings that no model's record depends on.
_FREE = ("models", "kernels", "data", "output", "device", "threads")


@releases_folders
def run(config: ValueAwareConfig) -> dict[str, Any]:
    """Evaluates every model under every kernel, and returns what stands in results.json.

    A model that was evaluated so before, by a run that was stopped or had fewer models, is not evaluated again.
    Raises an AttnpatchError with one sentence for anything a person can mend.
    """
    started = time.perf_counter()
    torch.set_num_threads(config.threads or available_cpus())
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    out = Path(config.output.dir)
    check_folder("output.dir", out)
    check_alone("a sweep over trained models is not shared out")
    hold(out)
    say = speaker(config.output.quiet, True)
    text = merge_text(load_text(config.data, "test"), "test")
    models = []
    for name in config.models:
        model, tokenizer = _load(config, name)
        trained = _kernel(name, model)
        data = _blocks(config, model, tokenizer, text)
        about = _about(config, name, model, tokenizer)
        for kernel in dict.fromkeys(trained if kernel == "own" else kernel for kernel in config.kernels):
            kept = _kept(config, kernel, model, about, text)
            if kept is not None and kept.is_file() and not config.is_smoke:
                record = dict(read_json(kept))
            else:
                record = _evaluate(config, name, trained, kernel, model, data)
                if kept is not None:
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    write_json(kept, record)
            record = about | record
            models.append(record)
            say(
                f"{name}, {record['kernel']} ({record['objective']}): exact perplexity "
                f"{record['exact']['perplexity']:.3f}, {record['seconds']:.1f} s"
            )
            for row in record["rows"]:
                say(
                    f"  {row['method']:9} r={row['r']:<4} perplexity {row['perplexity']:10.3f}  output error "
                    f"{row['output_error']:.4f}"
                )
    results = {
        "experiment": "value_aware",
        "models": models,
        "precision": "fp32",
        "seconds": {"this_process": round(time.perf_counter() - started, 2)},
        "versions": versions(),
        "machine": machine(),
        "data": {"test": [{"name": text.name, "lines": len(text), "files": text.files}]},
        "config": config.as_dict(),
    }
    draw(models, out / "value-aware")
    say(f"results: {write_results(out, results)}")
    return results


def _load(config: ValueAwareConfig, name: str) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    with checkpoint_errors(name):
        model_config = AutoConfig.from_pretrained(name)
        if model_config.model_type not in FAMILIES:
            raise TrainingError(
                f"{name} is a {model_config.model_type} model; this study takes masked and causal language models of "
                f"{' and '.join(FAMILIES)}"
            )
        auto = AutoModelForCausalLM if model_config.is_decoder else AutoModelForMaskedLM
        model = load_whole(auto, name, dtype=torch.float32).eval()
    if config.device == "auto" and torch.cuda.is_available():
        model = model.cuda()
    return model, load_fast_tokenizer(name)


def _blocks(config: ValueAwareConfig, model: Any, tokenizer: Any, text: LineText) -> FixedBlocks:
    size = config.data.block_size
    check_block_size(size, model)
    # Whole blocks alone: no query is padding then.
    masking = None if model.config.is_decoder else config.masking
    words = masking is not None and masking.whole_words
    blocks = make_blocks(text, tokenizer, size, keep_last=False, words=words)
    if len(blocks) < config.blocks:
        raise TrainingError(f"blocks={config.blocks}: the text has only {len(blocks)} whole blocks of {size} tokens")
    blocks.ids, blocks.lines = blocks.ids[: config.blocks], blocks.lines[: config.blocks]
    if blocks.word_starts is not None:
        blocks.word_starts = blocks.word_starts[: config.blocks]
    return FixedBlocks(blocks, tokenizer, masking)


def _evaluate(
    config: ValueAwareConfig, name: str, trained: str, kernel: str, model: Any, data: FixedBlocks
) -> dict[str, Any]:
    """The record of a model under a kernel; `trained`: the one that it has."""
    started = time.perf_counter()
    if kernel != trained and trained != "softmax":
        raise TrainingError(
            f"{name} was trained with {trained}, which cannot be exchanged for {kernel}: leave kernels=[own], or "
            "evaluate a model that was trained with softmax"
        )
    heads = {site.head_dim for site in find_sites(model)}
    if len(heads) > 1:
        raise TrainingError(f"{name} has heads of different widths ({sorted(heads)})")
    width = heads.pop()
    numbers = sorted({width + 1 if r == EXACT else int(r) for r in config.r})
    choices = [(method, r) for method in config.methods for r in numbers]
    with nullcontext() if kernel == trained else attnpatch.patched(model, kernel):
        exact, errors = _exact(config, model, data, choices)
        rows = []
        for method, r in choices:
            with attnpatch.patched(model, sparse_spec(method, r, config.swaps)):
                loss = _loss(config, model, data)
            by_layer = [layer.total[method, r] / layer.queries for layer in errors]
            rows.append(
                {
                    "method": method,
                    "r": r,
                    "loss": loss,
                    "perplexity": perplexity(loss),
                    "output_error": sum(by_layer) / len(by_layer),
                    "output_error_by_layer": by_layer,
                }
            )
    return {
        "kernel": kernel,
        "kernel_trained": trained,
        "objective": "causal" if model.config.is_decoder else "masked",
        "head_dim": width,
        "parameters": count_parameters(model),
        "blocks": len(data),
        "exact": {"loss": exact, "perplexity": perplexity(exact), "predicted_tokens": data.predicted},
        "rows": rows,
        "seconds": round(time.perf_counter() - started, 2),
    }


def _kernel(name: str, model: Any) -> str:
    """The kernel that all layers of a model have. Raises TrainingError for a model that this study is not about."""
    patched = attnpatch.patched_modules(model)
    stages = [patched.get(site.path, {}) for site in find_sites(model)]
    taken = sorted({found[stage] for found in stages for stage in ("select", "aggregate") if stage in found})
    if "select" in {stage for found in stages for stage in found}:
        raise TrainingError(f"{name} is sparse already ({taken[0]}): evaluate a model that attends to all keys")
    if taken:
        raise TrainingError(
            f"{name} has the variant {taken[0]}, whose output is no weighted sum of the values alone: evaluate a model "
            "that aggregates as stock attention does"
        )
    kernels = sorted({found.get("score", "softmax") for found in stages})
    if len(kernels) > 1:
        raise TrainingError(f"{name} has layers with different kernels ({', '.join(kernels)}): evaluate one with one")
    return kernels[0]


def _about(config: ValueAwareConfig, name: str, model: Any, tokenizer: Any) -> dict[str, Any]:
    """What is evaluated, as it stands in the results."""
    # Of the run that left the model: its folder is RUN/model.
    beside = Path(name).parent / "results.json"
    ours = Path(name).name == "model" and beside.is_file()
    weights = Path(name) / "model.safetensors"
    return {
        "path": name,
        "sha256": sha256_file(weights) if weights.is_file() else None,
        "seed": read_json(beside).get("seed") if ours else None,
        "spec": getattr(model.config, "attnpatch", None) or "stock",
        "tokenizer_sha256": sha256_lines([tokenizer.backend_tokenizer.to_str()]),
    }


def _exact(
    config: ValueAwareConfig, model: Any, data: FixedBlocks, choices: Sequence[tuple[str, int]]
) -> tuple[float, list[OutputErrors]]:
    """The loss of exact attention, and what each choice would do to each layer's output on the exact activations."""
    # Any variant of the stage builds the pipelines; its module is then replaced by one that measures.
    with attnpatch.patched(model, "top_r"):
        errors = []
        for pipeline in _pipelines(model):
            stage = OutputErrors(choices, config.swaps)
            pipeline.set_stage("select", stage)
            errors.append(stage)
        loss = _loss(config, model, data)
    return loss, errors


def _pipelines(model: Any) -> list[AttentionPipeline]:
    return [pipeline for pipeline in map(pipeline_of, model.modules()) if pipeline is not None]


def _kept(config: ValueAwareConfig, kernel: str, model: Any, about: Mapping[str, Any], text: LineText) -> Path | None:
    """The file of one model's record, named by all that it depends on; None for weights that are not in one file."""
    if about["sha256"] is None:
        return None
    settings = {key: value for key, value in config.as_dict().items() if key not in _FREE}
    sums = [file["text_sha256"] for file in text.files]
    own = {key: value for key, value in about.items() if key not in ("path", "seed")}
    shape = (model.config.to_json_string(), config.data.block_size)
    depends = [own, shape, kernel, settings, sums, str(model.device), versions()]
    return Path(config.output.dir) / "models" / f"{sha256_lines([repr(depends)])[:16]}.json"


@torch.no_grad()
def _loss(config: ValueAwareConfig, model: Any, data: FixedBlocks) -> float:
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for start in range(0, len(data), config.batch_size):
        batch = data.batch(range(start, min(start + config.batch_size, len(data))))
        batch = {name: value.to(device) for name, value in batch.items()}
        labels = batch.pop("labels")
        total += float(token_loss(model(**batch).logits, labels, 0.0))
        count += int((labels != IGNORE).sum())
    return total / count
