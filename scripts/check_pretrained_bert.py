"""Convert, verify and revert a pretrained sentence encoder with every variant, and compare its sentence embeddings.

    python scripts/check_pretrained_bert.py SRC [--pairs sts-dev.csv] [--out runs/pretrained-bert]

For each variant: the drift of the conversion, what `verify --against` says, whether `revert` gives back every tensor
bit for bit. With `--pairs` (a tab-separated file of the STS benchmark: score in column 5, sentences in 6 and 7), for
those that keep the function, the Spearman correlation of mean-pooled embeddings' cosine with the human scores.
Writes OUT/results.json, which `attnpatch report` makes a table and a figure of. Exit code: 0; 1 when a check fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr
from transformers import AutoModel, AutoTokenizer

try:
    import attnpatch
    from attnpatch.environment import machine, versions
    from attnpatch.training.files import sha256_file
    from attnpatch.training.results import write_results
except ImportError as error:  # an unsupported torch or transformers
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2) from None

SPECS = ("neural", "linear", "expressive", "polynomial", "elu", "top_r", "value_aware", "query_value", "alignment")
COMPOSED = "neural+expressive+alignment"


@torch.no_grad()
def embeddings(folder: Path, sentences: list[str], batch: int = 64) -> torch.Tensor:
    """Mean-pooled, unit-length sentence embeddings [N, d]."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    rows: dict[int, torch.Tensor] = {}
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = tokenizer([sentences[i] for i in chosen], padding=True, truncation=True, return_tensors="pt")
        hidden = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        pooled = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        rows.update(zip(chosen, pooled, strict=True))
    return torch.stack([rows[i] for i in range(len(sentences))])


def read_pairs(path: Path) -> tuple[list[str], list[str], list[float]]:
    """Sentences and scores of a file of the STS benchmark."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    return [r[5] for r in rows], [r[6] for r in rows], [float(r[4]) for r in rows]


def correlation(folder: Path, pairs: tuple[list[str], list[str], list[float]]) -> float:
    first, second, scores = pairs
    both = embeddings(folder, first + second)
    cosine = (both[: len(first)] * both[len(first) :]).sum(-1)
    return float(spearmanr(cosine.numpy(), scores).statistic)


def same_tensors(a: Path, b: Path) -> bool:
    """Whether two folders' weights agree in names, dtypes and every bit."""
    x, y = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return x.keys() == y.keys() and all(x[name].dtype == y[name].dtype and torch.equal(x[name], y[name]) for name in x)


def check(source: Path, spec: str, pairs: Any, scratch: Path) -> dict[str, Any]:
    target, back = scratch / "converted", scratch / "reverted"
    report = attnpatch.convert(source, target, spec)
    verified = attnpatch.verify(target, against=source)
    row: dict[str, Any] = {
        "variant": spec,
        "exact": report.patch.exact,
        "drift_max": report.drift.max,
        "drift_mean": report.drift.mean,
        "parameters_added": report.patch.parameters_added,
        "verify_passed": verified.passed,
    }
    if pairs is not None and report.patch.exact:
        row["spearman"] = correlation(target, pairs)
    row["revert_bit_identical"] = None
    if spec != "linear":  # whether a single linear layer was trained cannot be seen, so it is not recovered
        attnpatch.revert(target, back)
        row["revert_bit_identical"] = same_tensors(source, back)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/pretrained-bert"))
    arguments = parser.parse_args()
    pairs = read_pairs(arguments.pairs) if arguments.pairs else None
    parameters = sum(t.numel() for t in load_file(arguments.source / "model.safetensors").values())
    source: dict[str, Any] = {"parameters": parameters}
    files = []
    if pairs is not None:
        source["spearman"] = correlation(arguments.source, pairs)
        files = [{"file": arguments.pairs.name, "pairs": len(pairs[0]), "sha256": sha256_file(arguments.pairs)}]
    rows: list[dict[str, Any]] = []
    for spec in (*SPECS, COMPOSED):
        with tempfile.TemporaryDirectory() as scratch:
            rows.append(check(arguments.source, spec, pairs, Path(scratch)))
        print(json.dumps(rows[-1]), file=sys.stderr)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = {
        "experiment": "conversion",
        "date": date.today().isoformat(),
        "source": source,
        "variants": rows,
        "data": {"test": [{"files": files}]},
        "versions": versions(),
        "machine": machine(),
    }
    print(f"results: {write_results(arguments.out, results)}")
    good = all(row["verify_passed"] and row["revert_bit_identical"] is not False for row in rows)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
