"""Whether a run is as distributed as it was asked to be, and that one folder is one run's.

Some launches start processes that know nothing of each other, or fewer of them than were asked for, and say nothing
(accelerate 1.15: `accelerate launch --cpu --num_processes 2` starts one process; a config that asks for FSDP with
`use_cpu` starts two, and shards nothing). Each would train a model of its own in the same folder.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from attnpatch.errors import AttnpatchError
from attnpatch.training.errors import TrainingError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

C = TypeVar("C")
R = TypeVar("R")

LOCK = ".lock"
SHARDING = {"FSDP": "ACCELERATE_USE_FSDP", "DEEPSPEED": "ACCELERATE_USE_DEEPSPEED"}
"""accelerate's types of distribution that shard a model, and the variable by which its launcher asks for each."""
_NAMES = {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed"}
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # of torchrun, and of three MPIs
_HOW = (
    "torchrun --nproc_per_node N SCRIPT starts N processes that train together, on CPUs and on GPUs, and "
    "accelerate launch --multi_gpu --num_processes N SCRIPT does so, too"
)
_locks: dict[Path, int] = {}


def sharding_asked(environment: Mapping[str, str] = os.environ) -> str | None:
    """ "FSDP" or "DEEPSPEED" when the launcher asked for one, else None."""
    for kind, variable in SHARDING.items():
        if environment.get(variable, "").lower() in ("1", "true", "yes", "y", "on", "t"):
            return kind
    return None


def zero_stage(environment: Mapping[str, str] = os.environ) -> int | None:
    """The stage of ZeRO that the launcher asked for, None without DeepSpeed."""
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
    return int(stage) if sharding_asked(environment) == "DEEPSPEED" and stage.isdigit() else None


def check_before(cpu: bool, environment: Mapping[str, str] = os.environ) -> None:
    """What can be told before accelerate looks at the processes.

    Args:
        cpu: whether the run computes on the CPU.

    Raises TrainingError when the launch asked for what cannot be.
    """
    kind = sharding_asked(environment)
    if kind is None:
        return
    if cpu:
        raise TrainingError(
            f"the launch asked for {_NAMES[kind]}, but this run computes on the CPU, where accelerate shards nothing "
            "(its processes would train alone, or as plain DDP): use GPUs (and training.device=auto), or "
            "torchrun --nproc_per_node N SCRIPT for DDP on CPUs"
        )
    if kind == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        raise TrainingError(
            "the launch asked for DeepSpeed, which is not installed: pip install deepspeed, or take "
            "configs/accelerate/fsdp2.yaml, which shards a model without it"
        )


def check_alone(work: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raises TrainingError when the launch asked for several processes for `work`, which is one's."""
    asked = _processes(environment)
    if asked is not None and asked > 1:
        raise TrainingError(f"{work}: the launch asked for {asked} processes, and this script wants one")


def check_launch(state: Any, environment: Mapping[str, str] = os.environ) -> None:
    """Compares what the launcher asked for with accelerate's state of this process.

    Args:
        state: accelerate's PartialState.
        environment: as it was when the process started; PartialState writes into os.environ.

    Raises TrainingError when there are fewer processes, or another kind of them.
    """
    got = int(state.num_processes)
    asked = _processes(environment)
    if asked is not None and asked > got:
        raise TrainingError(
            f"the launch asked for {asked} processes, but this one knows of {got}: {asked} runs would write the same "
            f"folder; {_HOW}"
        )
    # accelerate's launcher sets these two for several processes, and no rank when it starts one nevertheless.
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environment
    if asked is None and by_accelerate and "MASTER_ADDR" in environment and "MASTER_PORT" in environment:
        raise TrainingError(
            "accelerate launch was asked for several processes (MASTER_ADDR and MASTER_PORT are set) and started one "
            f"without a rank, as it does with --cpu; {_HOW} (for one process: --num_processes 1, both variables unset)"
        )
    kind = sharding_asked(environment)
    found = _name(state)
    if kind is not None and (found in ("NO", "MULTI_CPU") or (kind == "DEEPSPEED" and found != "DEEPSPEED")):
        raise TrainingError(
            f"the launch asked for {_NAMES[kind]}, but accelerate found {_found(found, got)}: start the script with "
            f"accelerate launch --config_file configs/accelerate/{'fsdp2' if kind == 'FSDP' else 'zero2'}.yaml SCRIPT"
        )


def check_accelerator(accelerator: Any, environment: Mapping[str, str] = os.environ) -> None:
    """The same of the accelerator that trains: only that knows whether it shards.

    Raises TrainingError when it does not, though the launch asked for it.
    """
    kind, found = sharding_asked(environment), _name(accelerator)
    if kind is not None and found != kind:
        raise TrainingError(
            f"the launch asked for {_NAMES[kind]}, but the model would be trained as "
            f"{_found(found, int(accelerator.num_processes))}: {SHARDING[kind]} is set, accelerate does not follow it"
        )


def _processes(environment: Mapping[str, str]) -> int | None:
    for name in _SIZES:
        if environment.get(name, "").isdigit():
            return int(environment[name])
    return None


def _name(state: Any) -> str:
    return str(state.distributed_type).rsplit(".", 1)[-1]


def _found(name: str, processes: int) -> str:
    return "a single process" if name == "NO" else f"{name} with {processes} process(es)"


# ---- one folder, one run ----


def on_main(state: Any, action: Callable[[], None]) -> None:
    """Does something in the main process; when it fails there, every process raises the same TrainingError."""
    failed: list[str | None] = [None]
    if state.is_main_process:
        try:
            action()
        except (AttnpatchError, OSError) as error:
            if state.num_processes == 1:
                raise
            failed = [str(error)]
    if state.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(failed)
        if failed[0] is not None:
            raise TrainingError(failed[0])


def hold(folder: Path) -> None:
    """Takes a folder for this process, until the end of its run (`releases_folders`). For the main process of a run.

    Where the file system knows no locks nothing is held.

    Raises TrainingError when another process has it.
    """
    folder = folder.resolve()
    if fcntl is None or folder in _locks:
        return
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise TrainingError(
            f"another process is training in {folder}: wait for it, or choose another output.dir; if the two were "
            f"meant to be one run (srun starts independent processes): {_HOW}"
        ) from None
    except OSError:
        os.close(handle)
        return
    _locks[folder] = handle


def releases_folders(run: Callable[[C], R]) -> Callable[[C], R]:
    """A run that gives back the folders it took when it is over, so that another process can go on in them."""

    @functools.wraps(run)
    def wrapped(config: C) -> R:
        before = set(_locks)
        try:
            return run(config)
        finally:
            for folder in _locks.keys() - before:
                os.close(_locks.pop(folder))

    return wrapped
