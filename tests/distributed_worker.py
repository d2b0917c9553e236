"""What test_distribution.py lets two processes do, in one launch: torchrun distributed_worker.py OUT SEED.

Each case leaves OUT/CASE-RANK.pt; the test computes the same with one process.
"""

from __future__ import annotations

import math
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import torch
from test_training_trainer import make, rows, tiny_model

import attnpatch
from attnpatch.training.checkpoints import last_complete, load_weights
from attnpatch.training.errors import TrainingError
from attnpatch.training.sharding import is_sharded, shard

# The alignment loss weighs as much as the other, so that a wrong share of it shows in losses and weights.
SPEC = {"neural": {}, "expressive": {}, "query_value": {}, "alignment": {"weight": 300.0}}
FAMILIES = ("marian", "roberta")
ROWS = 27  # three are left over behind three steps of eight: one for one process, two for the other
STEPS = 3


def seeded(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)


def translation(folder: Path, seed: int, processes: int, **arguments: Any) -> Any:
    """A trainer of a patched Marian, with eight pairs of unequal length a step over all processes."""
    seeded(seed)
    data, model = rows(ROWS), tiny_model()
    attnpatch.patch(model, SPEC)
    models.wake(model)
    # Adam with a large epsilon: it would make much of rounding, and hide a wrong scale of the gradient.
    optimizer = {"optim": "adamw_torch", "adam_epsilon": 0.1, "learning_rate": 0.05, "max_grad_norm": 1.0}
    arguments = optimizer | {"num_train_epochs": 2} | arguments
    trainer = make(
        folder,
        model,
        data,
        batch=8 // processes,
        auxiliary=True,
        label_smoothing=0.1,
        processes=processes,
        arguments=arguments,
    )
    trainer.seen = []
    collate = trainer.data_collator

    def remember(batch: Any) -> Any:
        if "row" in batch[0]:
            trainer.seen.append([row["row"] for row in batch])
        return collate([{k: v for k, v in row.items() if k != "row"} for row in batch])

    trainer.train_dataset = data.add_column("row", list(range(ROWS)))
    trainer.data_collator = remember
    return trainer


def trained(trainer: Any) -> dict[str, Any]:
    """What a training gives, and what its model then says of the data, which is the dev set, too."""
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    seen = list(trainer.seen)
    return {
        "losses": [entry["loss"] for entry in logs],
        "auxiliary": [entry["auxiliary_loss"] for entry in logs],
        "norms": [float(entry["grad_norm"]) for entry in logs],
        "seen": seen,
        "eval": trainer.evaluate()["eval_loss"],
        "translations": trainer.translate(trainer.eval_dataset, 30, num_beams=2, max_length=10),
    }


def ddp(out: Path, seed: int, rank: int) -> dict[str, Any]:
    trainer = translation(out / "ddp", seed, 2)
    found = trained(trainer)
    return found | {"state": trainer.accelerator.unwrap_model(trainer.model).state_dict()}


def not_finite(out: Path, seed: int, rank: int) -> dict[str, Any]:
    """The loss of the second process is not a number in the third step."""
    trainer = translation(out / "nan", seed, 2)
    summed = trainer.summed_loss

    def broken(model: Any, inputs: Any) -> Any:
        total, *rest = summed(model, inputs)
        return total * (math.nan if rank == 1 and trainer.state.global_step == 2 else 1.0), *rest

    trainer.summed_loss = broken
    try:
        trainer.train()
    except TrainingError as error:
        return {"error": str(error)}
    return {"error": None}


def family_model(family: str, seed: int) -> Any:
    seeded(seed)
    model = models.masked_lm(family)
    attnpatch.patch(model, SPEC)
    return models.wake(model).train()


def family_batch(family: str, seed: int, rows: slice) -> dict[str, torch.Tensor]:
    """Sequences of one length: each half of the batch then has as many tokens."""
    seeded(seed + 1)
    ids, labels = models.tokens(4, 9), models.tokens(4, 9)
    return {"input_ids": ids[rows], "attention_mask": torch.ones_like(ids[rows]), "labels": labels[rows]}


def steps(model: Any, batch: dict[str, torch.Tensor]) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def fully_sharded(out: Path, seed: int, rank: int) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.tensor import DTensor

    found: dict[str, Any] = {}
    for family in FAMILIES:
        model = shard(family_model(family, seed), reshard_after_forward=True)
        whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
        batch = family_batch(family, seed, slice(2 * rank, 2 * rank + 2))
        losses = steps(model, batch)
        model.eval()
        with torch.no_grad():
            logits = model(**family_batch(family, seed, slice(0, 4))).logits
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank == 0:
            model.save_pretrained(out / f"sharded-{family}", state_dict=state)
        found[family] = {"losses": losses, "logits": logits, "not sharded": whole}
    return found


def force_fsdp() -> None:
    """accelerate shards GPUs only: tell it that these two CPUs are two. All that follows is its own FSDP2."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    os.environ |= {
        "ACCELERATE_TORCH_DEVICE": "cpu",
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


def fsdp(out: Path, seed: int, rank: int) -> dict[str, Any]:
    """The same training as `ddp`, sharded; its checkpoints; resumed from one in the middle."""
    from attnpatch.training.checkpoints import checkpoints

    force_fsdp()
    gpu = {"use_cpu": False, "dataloader_pin_memory": False, "save_strategy": "steps", "save_steps": 4}
    trainer = translation(out / "fsdp", seed, 2, **gpu)
    trainer.keep_checkpoints = 9
    found = trained(trainer)
    trainer.save_weights(out / "fsdp-model")
    found["sharded"] = is_sharded(trainer.model) and trainer.sharded
    found["checkpoints"] = [folder.name for folder in checkpoints(out / "fsdp")]
    load_weights(trainer.model, [out / "fsdp" / "checkpoint-4"])
    found["eval of checkpoint-4"] = trainer.evaluate()["eval_loss"]
    again = translation(out / "fsdp", seed, 2, **gpu)
    again.train(resume_from_checkpoint=str(out / "fsdp" / "checkpoint-4"))
    again.save_weights(out / "fsdp-resumed")
    found["last"] = str(last_complete(out / "fsdp"))
    return found


def zero(out: Path, seed: int, rank: int) -> dict[str, Any]:
    """DeepSpeed itself, on the CPU, with the settings that accelerate makes of configs/accelerate/zero*.yaml."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import yaml
    from accelerate.utils import DeepSpeedPlugin

    deepspeed.init_distributed("gloo")
    found: dict[str, Any] = {}
    for stage in (2, 3):
        text = (Path(__file__).parents[1] / "configs" / "accelerate" / f"zero{stage}.yaml").read_text()
        given = yaml.safe_load(text)["deepspeed_config"]
        del given["deepspeed_multinode_launcher"]
        settings = DeepSpeedPlugin(**given).deepspeed_config
        settings |= {"train_micro_batch_size_per_gpu": 2, "train_batch_size": 4, "gradient_accumulation_steps": 1}
        settings |= {"gradient_clipping": 0.0, "zero_allow_untested_optimizer": True}
        for family in FAMILIES:
            model = family_model(family, seed)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
            engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
            batch, losses = family_batch(family, seed, slice(2 * rank, 2 * rank + 2)), []
            for _ in range(STEPS):
                loss = engine(**batch).loss
                losses.append(loss.item())
                engine.backward(loss)
                engine.step()
            found[f"{family} {stage}"] = losses
    return found


CASES: tuple[Callable[[Path, int, int], dict[str, Any]], ...] = (ddp, not_finite, fully_sharded, fsdp, zero)


def main() -> None:
    out, seed = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    from accelerate import PartialState

    rank = PartialState(cpu=True).process_index
    only = sys.argv[3:]
    for case in CASES:
        if only and case.__name__ not in only:
            continue
        torch.save(case(out, seed, rank), out / f"{case.__name__}-{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
