"""The classifier of a run: a checkpoint with a new head, or a fresh model; with any attention spec."""

from __future__ import annotations

from typing import Any

from attnpatch.experiments.classification.config import ClassificationConfig
from attnpatch.experiments.classification.tasks import Task
from attnpatch.experiments.language_models.model import (
    check_block_size,
    check_vocabulary,
    fresh_config,
    prepare_encoder,
)
from attnpatch.training.errors import TrainingError
from attnpatch.training.modeling import from_checkpoint, from_scratch, override


def build_classifier(config: ClassificationConfig, task: Task, tokenizer: Any) -> Any:
    """A model for sequence classification with `task.outputs` outputs; its head is new.

    Raises TrainingError when the model has fewer positions or words than the texts and the tokenizer need, or a head
    for another number of classes.
    """
    import transformers

    size, head = config.model, _head(task)
    if size.pretrained is not None:

        def prepare(model_config: Any) -> None:
            prepare_encoder(size, model_config)
            heads = [name for name in model_config.architectures or () if name.endswith("ForSequenceClassification")]
            if heads and model_config.num_labels != task.outputs:
                raise TrainingError(
                    f"{size.pretrained} is a {heads[0]} of {model_config.num_labels} output(s), and {task.name} has "
                    f"{task.outputs}: start from a checkpoint without a head, or with one of that size"
                )
            override(model_config, head)

        # Checkpoints of language models have neither a head for classes nor, often, the pooler below it.
        new = ("classifier.", "bert.pooler.")
        model = from_checkpoint(config, transformers.AutoModelForSequenceClassification, prepare, may_be_new=new)
    else:
        roberta = size.family == "roberta"
        kind = transformers.RobertaForSequenceClassification if roberta else transformers.BertForSequenceClassification
        model = from_scratch(config, kind, fresh_config(size, tokenizer, config.task.max_length, **head))
    check_block_size(config.task.max_length, model, "task.max_length")
    check_vocabulary(tokenizer, model)
    return model


def _head(task: Task) -> dict[str, Any]:
    names = dict(enumerate(task.labels or ("score",)))
    return {
        "id2label": names,  # transformers counts these: num_labels
        "label2id": {name: i for i, name in names.items()},
        "problem_type": "regression" if task.is_regression else "single_label_classification",
    }
