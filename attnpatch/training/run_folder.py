"""The folder of a run: what runs in it, whether that may be gone on with, and from which checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnpatch.atomic import write_json
from attnpatch.training.checkpoints import checkpoints, last_complete, read_record
from attnpatch.training.distribution import hold, on_main
from attnpatch.training.errors import ConfigError, TrainingError
from attnpatch.training.files import read_json

RUN_FILE = "run.json"
PAUSED_FILE = "paused.json"
FREE_TRAINING = {"resume", "log_every", "keep_checkpoints", "final", "average", "threads", "stop_after_minutes"}
"""Keys of `training` that do not change what is trained."""


def identity(
    config: Any,
    free: Mapping[str, set[str] | None],
    training_text: list[str],
    pretrained: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What must be equal for a run to be resumed: all settings that bear on training, the training text, and the
    weights that it started from.

    Args:
        free: the keys of each section that may differ; None is the whole section.
        training_text: checksums.
        pretrained: `checkpoint_identity`.
    """
    tree: dict[str, Any] = config.as_dict()
    for section, keys in free.items():
        if keys is None:
            del tree[section]
        else:
            tree[section] = {key: value for key, value in tree[section].items() if key not in keys}
    tree["training_text"] = training_text
    if pretrained is not None and "weights_sha256" in pretrained:  # a hub's revision is a setting already
        tree["pretrained"] = pretrained["weights_sha256"]
    return tree


def resume_point(config: Any, out: Path, known_as: dict[str, Any], state: Any) -> Path | None:
    """The checkpoint to go on from, if any; notes in the folder what runs in it.

    Raises TrainingError when the folder holds another run, or another process is training in it.
    """
    on_main(state, lambda: hold(out))
    checkpoint = last_complete(out)
    holds = checkpoint is not None or any((out / name).exists() for name in ("results.json", "model"))
    afresh = not may_go_on(config, out, known_as, holds)
    if afresh:
        checkpoint = None
    elif checkpoint is not None:
        world = read_record(checkpoint)["world_size"]
        if world != state.num_processes:
            raise TrainingError(
                f"{checkpoint} was written by {world} process(es), this run has {state.num_processes}: resume with as "
                "many, so that the batches stay the same"
            )
    state.wait_for_everyone()  # all have read the folder

    def begin() -> None:
        if afresh:
            clear(out)
        claim(out, known_as)

    on_main(state, begin)
    return checkpoint


def check_folder(key: str, folder: Path) -> None:
    """Raises ConfigError when a file stands where the folder of the setting `key` is to be, or on the way to it."""
    for place in (folder, *folder.parents):
        if place.is_dir():
            return
        if place.exists() or place.is_symlink():
            what = "a file, not a folder" if place.exists() else "a link that leads nowhere"
            raise ConfigError(f"{key}={folder}: {place} is {what}; choose another {key}")


def may_go_on(config: Any, out: Path, known_as: dict[str, Any], holds: bool) -> bool:
    """Whether to go on with what is in the folder; False: what an earlier run left there is to be cleared away.

    Args:
        known_as: the identity of this run.
        holds: whether the folder holds results or parts of them, which are to be compared with it.

    Raises:
        TrainingError: it holds another run, or one that must not be overwritten.
    """
    known: Any = None
    if (out / RUN_FILE).is_file():
        try:
            known = read_json(out / RUN_FILE)
        except ValueError as error:
            raise TrainingError(f"{out / RUN_FILE} is damaged ({error}): choose another output.dir") from error
    if config.training.resume == "never":
        if known is not None and not config.output.overwrite:
            raise TrainingError(
                f"{out} already holds a run: choose another output.dir, resume it (training.resume=auto), or set "
                "output.overwrite=true"
            )
        if known is None and holds:
            raise TrainingError(f"{out} holds a run, but not its {RUN_FILE}: choose another output.dir")
        _refuse_inside(config, out)
        return False
    if holds:
        if known is None:
            raise TrainingError(f"{out} holds a run, but not its {RUN_FILE}: choose another output.dir")
        if "pretrained" not in known:  # of a version that did not note the weights
            known_as = {key: value for key, value in known_as.items() if key != "pretrained"}
        found = differences(known, known_as)
        if found:
            raise TrainingError(
                f"{out} holds a run with other settings ({'; '.join(found[:4])}): choose another output.dir, or "
                "set training.resume=never output.overwrite=true to start afresh"
            )
    return True


def _refuse_inside(config: Any, out: Path) -> None:
    """Raises ConfigError when a run that clears its folder would start from something in it."""
    for key in ("model.pretrained", "tokenizer.path"):
        section, _, name = key.partition(".")
        path = getattr(getattr(config, section, None), name, None)
        if path and Path(path).exists() and Path(path).resolve().is_relative_to(out.resolve()):
            raise ConfigError(
                f"{key}={path} lies in output.dir={out}, which training.resume=never clears: choose another output.dir"
            )


def claim(out: Path, known_as: dict[str, Any]) -> None:
    """Notes in the folder what runs in it, and that it does."""
    out.mkdir(parents=True, exist_ok=True)
    (out / PAUSED_FILE).unlink(missing_ok=True)
    write_json(out / RUN_FILE, known_as, default=str)


def clear(out: Path) -> None:
    """Deletes what an earlier run left behind."""
    for folder in [*checkpoints(out), *filter(Path.is_dir, [out / "model"])]:
        shutil.rmtree(folder)
    for pattern in ("results.json", "*.hypotheses.*", "*.bleu.tsv.gz", "*.predictions.tsv", "reliability.[ps][nv]g"):
        for file in out.glob(pattern):
            file.unlink()


def differences(known: Any, now: Any, prefix: str = "") -> list[str]:
    """Where two trees of settings differ, in words."""
    if isinstance(known, dict) and isinstance(now, dict):
        found = []
        for key in sorted(known.keys() | now.keys()):
            found += differences(known.get(key), now.get(key), f"{prefix}{key}.")
        return found
    return [] if known == now else [f"{prefix[:-1]}: {known!r} there, {now!r} here"]
