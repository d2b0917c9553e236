"""A Trainer for masked and causal language models: logits where a token is predicted, fixed evaluation masks."""

from __future__ import annotations

from typing import Any

import torch

from attnpatch.experiments.language_models.blocks import BlockCollator, FixedBlocks
from attnpatch.training.batching import IGNORE
from attnpatch.training.losses import perplexity, token_loss
from attnpatch.training.run_trainer import RunTrainer


class LanguageModelTrainer(RunTrainer):
    """Trains on rows of blocks.

    Args:
        eval_batch_size: blocks in an evaluation batch of a process.
        The others are RunTrainer's; `collator` is a BlockCollator, `eval_dataset` FixedBlocks.
    """

    data_collator: BlockCollator

    def __init__(self, *args: Any, eval_batch_size: int = 32, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eval_batch_size = eval_batch_size
        self._positions = PredictedPositions(self.model)

    def count_tokens(self, inputs: dict[str, Any]) -> tuple[int, int]:
        """Tokens read (padding not), and masked."""
        mask = inputs.get("attention_mask")
        read = inputs["input_ids"].numel() if mask is None else int(mask.sum())
        return read, int((inputs["labels"] != IGNORE).sum())

    def where(self, rows: Any) -> str:
        """The blocks and lines of a batch."""
        return "" if rows is None else f", in {self.data_collator.blocks.where(rows.tolist())}"

    def summed_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | int, Any]:
        """Cross-entropy of the predicted tokens, their number, and the outputs."""
        labels = inputs.pop("labels")
        chosen = labels != IGNORE
        if self.args.torch_compile:  # which wants one shape of logits
            outputs = model(**inputs)
            return token_loss(outputs["logits"], labels, 0.0), chosen.sum(), outputs
        with self._positions.only(chosen):
            outputs = model(**inputs)
        return token_loss(outputs["logits"], labels[chosen], 0.0), chosen.sum(), outputs

    def score(self, data: FixedBlocks) -> dict[str, Any]:
        """loss, perplexity and the number of predicted tokens of a whole set."""
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        starts = range(0, len(data), self.eval_batch_size)
        with self.evaluating() as model, torch.no_grad():
            for start, counts in self.my_share(starts):
                batch = self._prepare_inputs(data.batch(range(start, min(start + self.eval_batch_size, len(data)))))
                with self.accelerator.autocast():
                    loss, count, _ = self.summed_loss(model, batch)
                if counts:
                    total[0] += loss.double()
                    total[1] += count
        summed, count = self.accelerator.reduce(total, "sum").tolist()
        mean = summed / count
        return {"loss": mean, "perplexity": perplexity(mean), "predicted_tokens": int(count)}


class PredictedPositions:
    """Makes the head of a language model see only the places where a token is predicted.

    The head is a large part of a small model's work, and six of seven of its results are thrown away in masked
    language modelling. The losses are the same.
    """

    def __init__(self, model: Any) -> None:
        head = getattr(model, "lm_head", None) or getattr(model, "cls", None)
        if head is None:
            raise TypeError(f"{type(model).__name__} has no language-model head that is known here")
        self._chosen: torch.Tensor | None = None
        head.register_forward_pre_hook(self._select)

    def _select(self, module: torch.nn.Module, args: tuple[Any, ...]) -> Any:
        return None if self._chosen is None else (args[0][self._chosen], *args[1:])

    def only(self, chosen: torch.Tensor) -> PredictedPositions:
        """For a `with` block around one forward pass: logits [n, V] at the n places of chosen [B, T]."""
        self._chosen = chosen
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        self._chosen = None
