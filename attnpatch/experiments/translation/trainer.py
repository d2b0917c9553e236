"""A Seq2SeqTrainer for translation: its own loss, batches by length, exact evaluation, whole checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import Seq2SeqTrainer

from attnpatch.experiments.translation.data import ParallelText
from attnpatch.experiments.translation.decoding import lean_decoding
from attnpatch.training.batching import IGNORE, length_batches
from attnpatch.training.losses import perplexity, token_loss
from attnpatch.training.run_trainer import RunTrainer


class TranslationTrainer(RunTrainer, Seq2SeqTrainer):
    """Trains on rows with `input_ids` and `labels`.

    Args:
        label_smoothing: epsilon of the uniform part of the target distribution.
        eval_max_tokens: padded positions in an evaluation batch.
        dev_scores: given the trainer, extra figures for an evaluation during training (BLEU of the dev set).
        own_attention: whether a model that trains with `eager` or `sdpa` may translate with our attention.
        text: what the rows' column `row` counts in, for errors.
        The others are RunTrainer's.

    Trainer's own loss would average Marian's averages, because MarianMTModel ignores `num_items_in_batch`.
    """

    progress_unit = "target tokens"

    def __init__(
        self,
        *args: Any,
        label_smoothing: float = 0.0,
        eval_max_tokens: int = 4096,
        dev_scores: Any = None,
        own_attention: bool = False,
        text: ParallelText | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.label_smoothing = label_smoothing
        self.own_attention = own_attention
        self.eval_max_tokens = eval_max_tokens
        self.dev_scores = dev_scores
        self.text = text

    def where(self, rows: Any) -> str:
        """The lines of a batch."""
        return "" if rows is None or self.text is None else f", in {self.text.where(rows.tolist())}"

    def count_tokens(self, inputs: dict[str, Any]) -> tuple[int, int]:
        """Source and target tokens, </s> included and padding not."""
        return int(inputs["attention_mask"].sum()), int((inputs["labels"] != IGNORE).sum())

    @property
    def progress_tokens(self) -> int:
        """Target tokens."""
        return self.progress.target_tokens

    def summed_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | int, Any]:
        """Label-smoothed cross-entropy (while training), its number of target tokens, and the outputs."""
        labels = inputs.pop("labels")
        outputs = model(**inputs, use_cache=False)
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        smoothing = self.label_smoothing if model.training else 0.0
        return token_loss(logits, labels, smoothing), (labels != IGNORE).sum(), outputs

    # ---- evaluation ----

    def score(self, data: Any) -> dict[str, Any]:
        """Mean negative log-likelihood per target token over a whole set (no smoothing), and its perplexity; of the
        dev set also what `dev_scores` gives."""
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        lengths = [max(a, b) for a, b in zip(data["source_length"], data["target_length"], strict=True)]
        with self.evaluating() as model, torch.no_grad():
            for _, batch, counts in self._my_batches(data, lengths, self.eval_max_tokens):
                labels = batch.pop("labels")
                with self.accelerator.autocast():
                    logits = model(**batch, use_cache=False)["logits"]
                if not counts:
                    continue
                total[0] += token_loss(logits, labels, 0.0).double()
                total[1] += (labels != IGNORE).sum()
        summed, count = self.accelerator.reduce(total, "sum").tolist()
        found: dict[str, Any] = {"loss": summed / count, "perplexity": perplexity(summed / count)}
        if self.dev_scores is not None and data is self.eval_dataset:
            found |= self.dev_scores(self)
        return found

    def translate(self, data: Any, max_tokens: int, **generation: Any) -> list[list[int]]:
        """Token ids of each row's translation, in the rows' order, on every process.

        Batches hold sources of like length; `max_tokens` counts pairs x longest source x beams.
        """
        beams = int(generation.get("num_beams") or self.model.generation_config.num_beams or 1)
        rows: list[tuple[int, list[int]]] = []
        pad = self.model.config.pad_token_id
        with (
            self.evaluating() as model,
            lean_decoding(model, self.own_attention, **generation) as arguments,
            torch.no_grad(),
        ):
            sources = data.select_columns(["input_ids"])
            for indices, batch, counts in self._my_batches(sources, data["source_length"], max(max_tokens // beams, 1)):
                with self.accelerator.autocast():
                    ids = model.generate(**batch, **arguments(), synced_gpus=self.sharded)
                if not counts:
                    continue
                for index, row in zip(indices, ids.tolist(), strict=True):
                    rows.append((index, [token for token in row if token != pad]))
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            rows = gather_object(rows)
        return [ids for _, ids in sorted(rows)]

    def _my_batches(
        self, data: Any, lengths: Sequence[int], max_tokens: int
    ) -> Iterator[tuple[list[int], dict[str, torch.Tensor], bool]]:
        for indices, counts in self.my_share(length_batches(list(lengths), max_tokens)):
            batch = self.data_collator(data.select(indices).to_list())
            yield indices, self._prepare_inputs(batch), counts
