"""Checkpoints on disk: convert a stock one, look at one, and give the stock one back.

A conversion builds the model once, to patch it and to measure what that changed. What it writes is the source's
own tensors, byte for byte, less the replaced projections, plus the new parameters: dtype, names, sharding and
weights that the model class does not know stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnpatch import checkpoint_files
from attnpatch.atomic import write_json, writing_aside
from attnpatch.checkpoint_files import Entry, Weights
from attnpatch.environment import LIBRARIES, versions
from attnpatch.errors import AttnpatchError, CheckpointError, SpecError, UnsupportedModelError, one_line, unknown
from attnpatch.families.base import Family, Site
from attnpatch.integration import IMPLEMENTATION
from attnpatch.methods.base import ProjectVariant
from attnpatch.modelcard import model_card, read_front_matter
from attnpatch.patch_report import PatchReport
from attnpatch.patching import patch, patched_modules, plan_of
from attnpatch.probes import Drift, computing_in_float32, drift, length_for, make_probe, outputs_of
from attnpatch.registry import family_for_model_type, find_sites
from attnpatch.spec import AttentionSpec

MANIFEST_FORMAT = 1

Progress = Callable[[str, float], None]
"""Called with what is going on and the fraction of that step which is done, 0 to 1."""

_HUB_FILES = ["*.json", "*.txt", "*.model", "*.spm", "*.jinja", "LICENSE*", "README.md", "*_Pooling/*", "*_Dense/*"]


@dataclass(frozen=True)
class ConvertReport:
    """What `convert` did.

    Attributes:
        source, target: where from and where to. model_class: the class that the measurement used.
        patch: each module touched. drift: absolute difference of the outputs on random padded input, computed in
            float32 on the CPU. dtype: of the weights, unchanged. seed: of new random parameters and of the input.
        files: name -> bytes of what was written. notes: what a user should know.
    """

    source: str
    target: str
    model_class: str
    patch: PatchReport
    drift: Drift
    dtype: str
    seed: int
    files: dict[str, int]
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "patch": self.patch.to_dict(), "drift": self.drift.to_dict(), "notes": list(self.notes)}

    def __str__(self) -> str:
        lines = [str(self.patch)]
        lines.append(f"drift against {self.source}: max {self.drift.max:.2e}, mean {self.drift.mean:.2e} (float32)")
        total = sum(self.files.values())
        lines.append(f"wrote {self.target}: {len(self.files)} files, {total / 1e6:,.1f} MB, weights {self.dtype}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


@dataclass(frozen=True)
class CheckpointInfo:
    """What `inspect` finds, without loading the weights.

    Attributes:
        path, model_type, architectures, family, dtype: of the checkpoint.
        spec: the spec in words, "stock" for none. record: its serialised form. exact: whether the conversion kept
            the model's function, None where nothing says so.
        sites: one mapping an attention module: path, site, layer, heads, head_dim, stages (stage -> variant).
        parameters: "stock", "now" and "added", counted on the model's class.
        files: weight file -> {"bytes", "tensors", "checksum"}; checksum is "ok", "changed" or "not recorded".
        missing, unexpected: attention tensors that the spec asks for and the files lack, and the reverse.
        versions: what wrote it. drift: as measured by `convert`.
    """

    path: str
    model_type: str
    architectures: tuple[str, ...]
    family: str
    dtype: str
    spec: str
    init: str | None
    exact: bool | None
    source: str | None
    record: Mapping[str, Any] | None
    sites: tuple[dict[str, Any], ...]
    parameters: dict[str, int]
    files: dict[str, dict[str, Any]]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    versions: dict[str, str]
    drift: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.family} ({', '.join(self.architectures) or self.model_type}), {self.dtype}",
            f"spec: {self.spec}",
            f"parameters: {self.parameters['now']:,} ({self.parameters['added']:+,})",
        ]
        for row in self.sites:
            stages = ", ".join(f"{stage}: {variant}" for stage, variant in row["stages"].items()) or "stock"
            lines.append(f"  {row['path']} ({row['site']}): {stages}")
        lines += [f"{name}: {f['bytes']:,} bytes, checksum {f['checksum']}" for name, f in self.files.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class RevertReport:
    """What `revert` did.

    Attributes:
        removed: tensors of variants that were left out. recovered: stock projections read off the patched ones, bit
            for bit. from_source: those that had to come from `source`; everything else is the checkpoint's own.
    """

    path: str
    target: str
    spec: str
    removed: tuple[str, ...]
    recovered: tuple[str, ...]
    from_source: tuple[str, ...]
    source: str | None
    files: dict[str, int]
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.spec} -> stock in {self.target}"]
        lines.append(f"{len(self.removed)} tensors of variants removed, {len(self.recovered)} stock tensors recovered")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its folder, the name it goes by (hub id, or the folder's), config.json, and weights."""

    folder: Path
    name: str
    config: dict[str, Any]
    weights: Weights
    family: Family
    record: Mapping[str, Any] | None
    manifest: Mapping[str, Any] | None

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec.from_dict(self.record) if self.record else AttentionSpec()


def convert(
    src: str | Path,
    dst: str | Path,
    spec: Any,
    init: str | None = None,
    layers: Any = None,
    sites: Any = None,
    *,
    calibration_text: str | Path | None = None,
    calibration_target: str | Path | None = None,
    force: bool = False,
    seed: int = 0,
    revision: str | None = None,
    progress: Progress | None = None,
) -> ConvertReport:
    """Write a patched copy of a checkpoint.

    The source is never touched, and `dst` appears only once it is complete.

    Args:
        src: a folder, or the id of a model on the hub; safetensors or old .bin files, whole or in shards. One that
            is patched already gets the spec added.
        dst: the folder to write.
        spec, layers, sites: as for `attnpatch.patch`.
        init: "preserve" (default), "paper", or "calibrate", which needs `calibration_text`.
        calibration_text: a UTF-8 text file, one sentence a line, for init="calibrate".
        calibration_target: its translation, line by line, for sequence-to-sequence models; the text itself if None.
        force: replace `dst` if it holds a checkpoint.
        seed: of new random parameters, and of the random tokens on which drift is measured.
        revision: branch, tag or commit on the hub.
        progress: called with what is being done and how far it is.

    Raises:
        SpecError: the spec is wrong or does not fit the model. CheckpointError: the source is missing or damaged,
            the target cannot be written. UnsupportedModelError: no family serves the model. PatchError: the source
            has that stage patched already.
    """
    tell = progress or _silent
    parsed = AttentionSpec.parse(spec, layers, sites, init)
    if not parsed:
        raise SpecError("the spec is stock: there is nothing to convert")
    if (parsed.init == "calibrate") != (calibration_text is not None):
        raise SpecError("init='calibrate' and a calibration text belong together: give both or neither")
    target = Path(dst).expanduser()
    checkpoint_files.check_target(target, force)
    tell("open", 0.0)
    checkpoint = open_checkpoint(src, revision)
    checkpoint_files.check_target(target, force, [checkpoint.folder])
    if calibration_text is not None:
        from attnpatch.calibration_text import read_lines

        read_lines(calibration_text)
    tell("load", 0.0)
    model, notes = load_model(checkpoint)
    probe = make_probe(model, seed, length_for(parsed, model))
    tell("measure", 0.0)
    with computing_in_float32(model):
        before = outputs_of(model, probe, torch.float32)
    if not all(bool(value.isfinite().all()) for value in before.values()):
        raise CheckpointError(f"{checkpoint.name} gives outputs that are not finite: its weights are damaged")
    batches = None
    if calibration_text is not None:
        from attnpatch.calibration_text import text_batches

        batches = _counted(text_batches(checkpoint.folder, model, calibration_text, calibration_target), tell)
    tell("patch", 0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        report = patch(model, parsed, calibration=batches, keep_stock=False)
    tell("measure", 0.5)
    with computing_in_float32(model):
        moved = drift(before, outputs_of(model, probe, torch.float32))
    record = dict(model.config.attnpatch)
    record["source"] = (checkpoint.record or {}).get("source") or checkpoint.name
    entries, stock = _converted_entries(checkpoint.weights, model, report)
    manifest = _manifest(checkpoint, report, moved, seed, revision)
    manifest["stock"] = {**(checkpoint.manifest or {}).get("stock", {}), **stock}
    dtype = str(checkpoint_files.DTYPES[checkpoint.weights.dtype()]).removeprefix("torch.")
    model_class = type(model).__name__
    config = {**checkpoint.config, "attnpatch": record, "attn_implementation": IMPLEMENTATION}
    card = model_card(
        checkpoint.name, read_front_matter(checkpoint.folder), str(report.spec), report, moved, model_class, dtype, seed
    )
    written = _write(target, checkpoint, entries, config, manifest, card, tell)
    if not report.exact:
        notes.append("the converted model does not compute what the source does: fine-tune it")
    return ConvertReport(
        source=checkpoint.name,
        target=str(dst),
        model_class=model_class,
        patch=report,
        drift=moved,
        dtype=dtype,
        seed=seed,
        files=written,
        notes=tuple(notes),
    )


def inspect(path: str | Path, *, revision: str | None = None, checksums: bool = True) -> CheckpointInfo:
    """Describe a checkpoint, patched or stock, from its config and the headers of its weight files.

    Args:
        path: a folder or hub id. revision: on the hub.
        checksums: compare the weights with the checksums that `convert` wrote, which reads the files once.

    Raises:
        CheckpointError: missing or damaged. SpecError: the spec was written by a newer attnpatch.
    """
    checkpoint = open_checkpoint(path, revision)
    stock, model = meta_model(checkpoint, stock=True), meta_model(checkpoint)
    touched = patched_modules(model)
    sites = [
        {
            "path": site.path,
            "site": site.kind,
            "layer": site.layer,
            "heads": site.num_heads,
            "head_dim": site.head_dim,
            "stages": dict(touched.get(site.path, {})),
        }
        for site in find_sites(model)
    ]
    counts = {"stock": _count(stock), "now": _count(model)}
    counts["added"] = counts["now"] - counts["stock"]
    missing, unexpected = _compare_names(checkpoint, model)
    manifest = checkpoint.manifest or {}
    record = checkpoint.record
    return CheckpointInfo(
        path=str(path),
        model_type=str(checkpoint.config["model_type"]),
        architectures=tuple(checkpoint.config.get("architectures") or ()),
        family=checkpoint.family.name,
        dtype=str(checkpoint_files.DTYPES[checkpoint.weights.dtype()]).removeprefix("torch."),
        spec=str(checkpoint.spec),
        init=checkpoint.spec.init if record else None,
        exact=manifest.get("exact"),
        source=(record or {}).get("source"),
        record=record,
        sites=tuple(sites),
        parameters=counts,
        files=_describe_files(checkpoint, checksums),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        versions=dict(manifest.get("versions") or ({"attnpatch": str(record.get("version"))} if record else {})),
        drift=manifest.get("drift"),
    )


def revert(
    src: str | Path,
    dst: str | Path,
    *,
    source: str | Path | None = None,
    revision: str | None = None,
    source_revision: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> RevertReport:
    """Write the stock checkpoint that a patched one came from.

    Parameters of variants are left out, and every other tensor is copied byte for byte. Replaced projections are
    read off the patched ones where those still show them: after `convert` with "preserve" or "calibrate", without
    training of them. Otherwise they are taken from `source`.

    Args:
        src: a patched checkpoint. dst: the folder to write.
        source: the stock checkpoint that it was converted from, for projections that cannot be recovered.
        revision, source_revision: branch, tag or commit of `src` and of `source` on the hub.
        force: replace `dst` if it holds a checkpoint.

    Raises:
        CheckpointError: the checkpoint is not patched, is damaged, or its stock projections are gone; the message
            names the checkpoint that has them.
    """
    tell = progress or _silent
    target = Path(dst).expanduser()
    checkpoint_files.check_target(target, force)
    checkpoint = open_checkpoint(src, revision)
    if checkpoint.record is None:
        raise CheckpointError(f"{checkpoint.folder} is a stock checkpoint: there is nothing to revert")
    if source_revision is not None and source is None:
        raise CheckpointError(
            f"source_revision ({source_revision!r}) needs the checkpoint that it is a revision of: source"
        )
    origin = open_checkpoint(source, source_revision) if source is not None else None
    checkpoint_files.check_target(target, force, [checkpoint.folder, *([origin.folder] if origin else [])])
    if origin is not None and origin.record is not None:
        raise CheckpointError(f"{origin.name} is patched itself: give the stock checkpoint as the source")
    tell("open", 0.0)
    entries, removed, recovered, fetched = _reverted_entries(checkpoint, origin)
    config = {k: v for k, v in checkpoint.config.items() if k not in ("attnpatch", "attn_implementation")}
    card = None
    if origin is not None and (origin.folder / checkpoint_files.CARD).is_file():
        card = (origin.folder / checkpoint_files.CARD).read_text(encoding="utf-8")
    written = _write(target, checkpoint, entries, config, None, card, tell)
    notes = []
    if fetched and origin is not None:
        notes.append(
            f"{len(fetched)} stock tensors of replaced projections came from {origin.name}; everything else is the "
            "checkpoint's own"
        )
    return RevertReport(
        path=str(src),
        target=str(dst),
        spec=str(checkpoint.spec),
        removed=tuple(removed),
        recovered=tuple(recovered),
        from_source=tuple(fetched),
        source=origin.name if origin else None,
        files=written,
        notes=tuple(notes),
    )


# --- opening and loading --------------------------------------------------------------------------------------


def open_checkpoint(path: str | Path, revision: str | None = None) -> Checkpoint:
    """Read a checkpoint's config and the headers of its weights.

    Args:
        path: a folder, or a hub id, which is downloaded (or taken from the cache). revision: on the hub.

    Raises:
        CheckpointError: missing or damaged. UnsupportedModelError: no family serves it. SpecError: its spec is of
            a newer format.
    """
    folder, name = _locate(path, revision)
    if not (folder / checkpoint_files.CONFIG).is_file():
        if (folder / "adapter_config.json").is_file():
            raise CheckpointError(f"{folder} holds a PEFT adapter and no model: merge it into its base model first")
        raise CheckpointError(f"{folder} has no config.json: not a transformers checkpoint")
    config = checkpoint_files.read_json(folder / checkpoint_files.CONFIG)
    model_type = config.get("model_type")
    if not model_type:
        raise CheckpointError(f"{folder / checkpoint_files.CONFIG} names no model_type: not a transformers checkpoint")
    family = family_for_model_type(str(model_type))
    if config.get("quantization_config"):
        raise UnsupportedModelError(f"{name} is quantised: patch the original checkpoint, then quantise")
    record = config.get("attnpatch") or None
    if record is not None:
        if not isinstance(record, Mapping):
            raise CheckpointError(f"{folder / checkpoint_files.CONFIG} is damaged: its attnpatch entry is no mapping")
        AttentionSpec.from_dict(record)
    weights = checkpoint_files.open_weights(folder)
    return Checkpoint(folder, name, config, weights, family, record, checkpoint_files.read_manifest(folder))


def _locate(path: str | Path, revision: str | None) -> tuple[Path, str]:
    """The local folder of a checkpoint and the name it goes by."""
    text = str(path)
    folder = Path(path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"a revision ({revision!r}) belongs to a name on the hub, and {text} is a folder here"
            )
        return folder, checkpoint_files.source_name(folder)
    if folder.exists():
        raise CheckpointError(f"{text} is a file; give the folder of the checkpoint")
    if checkpoint_files.looks_local(path) or not text.strip():
        raise CheckpointError(f"checkpoint {text!r} does not exist")
    return _download(text, revision), text


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        safe = [*_HUB_FILES, "model.safetensors", "model-*-of-*.safetensors"]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=safe))
        if not any(folder.glob("model*.safetensors")):
            old = [*_HUB_FILES, "pytorch_model.bin", "pytorch_model-*-of-*.bin"]
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=old))
    except HFValidationError:
        raise CheckpointError(f"checkpoint {name!r} does not exist: no such folder, and no name of the hub") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, ConnectionError, OSError) as error:
        reason = " ".join(str(error).split(". ")[0].split())[:160]
        raise CheckpointError(
            f"checkpoint {name!r} is no folder here, and cannot be got from the hub ({type(error).__name__}: {reason})"
        ) from error
    return folder


def model_class(config: Mapping[str, Any]) -> Any:
    """The transformers class for a config.json: the one it names, or the bare model of its type.

    Raises:
        UnsupportedModelError: it names a class that transformers does not have.
    """
    import transformers
    from transformers import AutoConfig, AutoModel

    names = config.get("architectures") or []
    if names:
        cls = getattr(transformers, str(names[0]), None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls
        prefix = str(config["model_type"]).lower()
        known = [n for n in dir(transformers) if n.lower().startswith(prefix) and "For" in n]
        raise UnsupportedModelError(f"config.json: {unknown('architecture', names[0], known)}")
    defaults = AutoConfig.for_model(str(config["model_type"]))
    return AutoModel._model_mapping[type(defaults)]


def load_config(checkpoint: Checkpoint, stock: bool = False) -> Any:
    """The config object of a checkpoint; with `stock`, without its spec."""
    from transformers import AutoConfig

    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(checkpoint.folder)
        except AttnpatchError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{checkpoint.folder / checkpoint_files.CONFIG} cannot be used: {one_line(error, 240)}"
            ) from error
    if stock and getattr(config, "attnpatch", None):
        del config.attnpatch
    return config


def meta_model(checkpoint: Checkpoint, stock: bool = False) -> Any:
    """The model of a checkpoint without weights, on the meta device."""
    config = load_config(checkpoint, stock)
    with quiet_transformers(), torch.device("meta"):
        return model_class(checkpoint.config)(config)


def load_model(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> tuple[Any, list[str]]:
    """The model of a checkpoint in evaluation mode, and notes on weights that its class has no place for.

    Args:
        checkpoint: patched or stock. dtype: None keeps that of the weights.

    Raises:
        CheckpointError: weights are missing or do not fit.
    """
    cls = model_class(checkpoint.config)
    own = checkpoint_files.DTYPES[checkpoint.weights.dtype()]
    if own not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise UnsupportedModelError(f"{checkpoint.name} has {own} weights: patch the original checkpoint")
    with quiet_transformers():
        try:
            model, info = cls.from_pretrained(
                checkpoint.folder, dtype=own if dtype is None else dtype, output_loading_info=True
            )
        except AttnpatchError:
            raise
        except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(
                f"{checkpoint.folder}: its weights cannot be loaded: {one_line(error, 240)}"
            ) from error
    # A base model saved without its pooler is common; whatever else is missing would be random.
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key.split("."))
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder} lacks {len(missing)} weights of {cls.__name__} ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}); they would be random. It was cut short, or its config.json names "
            "the wrong architecture"
        )
    notes = []
    if info["missing_keys"]:
        notes.append("the checkpoint has no pooler; the copy has none either")
    ignored = sorted(info["unexpected_keys"])
    if ignored:
        notes.append(f"{len(ignored)} tensors without a place in {cls.__name__} stay as they are ({ignored[0]}, ...)")
    return model.eval(), notes


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers without progress bars and load reports, which attnpatch turns into errors of its own."""
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    if level > logging.DEBUG:
        hf_logging.set_verbosity_error()
        hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


# --- names: a checkpoint's and the model's ----------------------------------------------------------------------


class _Names:
    """From a model's parameter names to a checkpoint's, which may have or lack the base model's prefix."""

    def __init__(self, weights: Weights, model: Any) -> None:
        self.weights = weights
        self.prefix = f"{getattr(model, 'base_model_prefix', '')}."

    def forms(self, name: str) -> tuple[str, str, str]:
        return name, name.removeprefix(self.prefix), self.prefix + name

    def of(self, name: str, site: str) -> str:
        """The checkpoint's name for the model's `name`, in the form that the tensors beneath `site` have."""
        for form, site_form in zip(self.forms(name), self.forms(site), strict=True):
            if any(key.startswith(site_form + ".") for key in self.weights.entries):
                return form
        raise CheckpointError(f"the checkpoint has no weights for {site}")

    def under(self, path: str) -> list[str]:
        """The checkpoint's tensors at or beneath a path in the checkpoint's form."""
        return [key for key in self.weights.entries if key.startswith(path + ".")]


def _compare_names(checkpoint: Checkpoint, model: Any) -> tuple[list[str], list[str]]:
    """Attention tensors that the model has and the files lack, and the reverse; in the checkpoint's form."""
    names = _Names(checkpoint.weights, model)
    state = model.state_dict()
    wanted: set[str] = set()
    held: set[str] = set()
    for site in find_sites(model):
        paths = [site.path, *(site.family.projection_path(site.path, role) for role in site.family.projections)]
        for path in paths:
            wanted.update(names.of(key, site.path) for key in state if key.startswith(path + "."))
            held.update(names.under(names.of(path, site.path)))
    return sorted(wanted - held), sorted(held - wanted)


# --- converting -------------------------------------------------------------------------------------------------


def _converted_entries(weights: Weights, model: Any, report: PatchReport) -> tuple[list[Entry], dict[str, Any]]:
    """Every tensor of the converted checkpoint, and the replaced ones with their checksums."""
    names = _Names(weights, model)
    sites = {site.path: site for site in find_sites(model)}
    state = model.state_dict()
    entries = dict(weights.entries)
    stock: dict[str, Any] = {}
    for change in report.changes:
        site = change.path if change.stage != "project" else _site_of(change.path, sites)
        at = change.path if change.stage == "project" else f"{change.path}.attnpatch.{change.stage}"
        path = names.of(at, site)
        beside = names.under(names.of(site, site))
        shard = weights.entries[beside[0]].shard
        if change.stage == "project":
            gone = names.under(path)
            if not gone:
                raise CheckpointError(f"the checkpoint has no weights for {change.path}")
            shard = weights.entries[gone[0]].shard
            for key in gone:
                entry = entries.pop(key)
                stock[key] = {"dtype": entry.dtype, "shape": list(entry.shape), "crc32": entry.crc32()}
        for key, value in state.items():
            if key.startswith(at + "."):
                name = path + key.removeprefix(at)
                entries[name] = checkpoint_files.entry_of(name, value, shard)
    return list(entries.values()), stock


def _site_of(path: str, sites: Mapping[str, Site]) -> str:
    for site in sites.values():
        if any(site.family.projection_path(site.path, role) == path for role in site.family.projections):
            return site.path
    raise CheckpointError(f"{path} belongs to no attention module")


def _manifest(
    checkpoint: Checkpoint, report: PatchReport, moved: Drift, seed: int, revision: str | None
) -> dict[str, Any]:
    before = (checkpoint.manifest or {}).get("exact", True) if checkpoint.record else True
    source: dict[str, Any] = {"name": checkpoint.name}
    if revision:
        source["revision"] = revision
    return {
        "format": MANIFEST_FORMAT,
        "source": source,
        "spec": report.spec,
        "init": report.init,
        "exact": bool(report.exact and before),
        "seed": seed,
        "drift": moved.to_dict(),
        "versions": versions(LIBRARIES),
    }


def _write(
    target: Path,
    checkpoint: Checkpoint,
    entries: list[Entry],
    config: Mapping[str, Any],
    manifest: dict[str, Any] | None,
    card: str | None,
    tell: Progress,
) -> dict[str, int]:
    weights = checkpoint.weights
    total = sum(entry.nbytes for entry in entries)
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        tell("write", done / max(total, 1))

    with writing_aside(target, needed=total) as aside:
        checkpoint_files.copy_small_files(checkpoint.folder, aside)
        sums = checkpoint_files.write_weights(aside, entries, weights.shards, weights.metadata, weights.sharded, count)
        write_json(aside / checkpoint_files.CONFIG, config)
        if card is not None:
            (aside / checkpoint_files.CARD).write_text(card, encoding="utf-8")
        if manifest is not None:
            write_json(aside / checkpoint_files.MANIFEST, {**manifest, "files": sums})
        return {str(p.relative_to(aside)): p.stat().st_size for p in sorted(aside.rglob("*")) if p.is_file()}


def _counted(batches: list[dict[str, Any]], tell: Progress) -> Iterator[dict[str, Any]]:
    for i, batch in enumerate(batches):
        tell("calibrate", i / len(batches))
        yield batch


def _silent(what: str, fraction: float) -> None:
    return None


# --- inspecting -------------------------------------------------------------------------------------------------


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _describe_files(checkpoint: Checkpoint, checksums: bool) -> dict[str, dict[str, Any]]:
    described: dict[str, dict[str, Any]] = {}
    recorded = (checkpoint.manifest or {}).get("files", {})
    for shard in checkpoint.weights.shards:
        held = [entry for entry in checkpoint.weights.entries.values() if entry.shard == shard]
        state = "not recorded"
        if shard in recorded:
            state = "not checked"
            if checksums:
                only = replace(checkpoint.weights, shards=(shard,))
                state = (
                    "changed" if checkpoint_files.changed_tensors(only, {"files": {shard: recorded[shard]}}) else "ok"
                )
        described[shard] = {"bytes": sum(e.nbytes for e in held), "tensors": len(held), "checksum": state}
    return described


# --- reverting --------------------------------------------------------------------------------------------------


def _reverted_entries(
    checkpoint: Checkpoint, origin: Checkpoint | None
) -> tuple[list[Entry], list[str], list[str], list[str]]:
    """Stock tensors; names of those removed, recovered, and taken from `origin`."""
    stock_model = meta_model(checkpoint, stock=True)
    names = _Names(checkpoint.weights, stock_model)
    entries = dict(checkpoint.weights.entries)
    removed: list[str] = []
    recovered: list[str] = []
    fetched: list[str] = []
    found = find_sites(stock_model)
    for site in found:
        for key in names.under(names.of(f"{site.path}.attnpatch", site.path)):
            removed.append(key)
            del entries[key]
    for planned in plan_of(stock_model, checkpoint.spec.resolved(checkpoint.family), found):
        variant = planned.variant
        if not isinstance(variant, ProjectVariant):
            continue
        for role in variant.roles(planned.options):
            model_path = planned.site.family.projection_path(planned.site.path, role)
            path = names.of(model_path, planned.site.path)
            held = names.under(path)
            if not held:
                raise CheckpointError(f"{checkpoint.folder} lacks the weights of {path}, which its spec asks for")
            layer = stock_model.get_submodule(model_path)
            tensors = _recover(checkpoint, variant, planned.options, layer, path)
            shard = entries[held[0]].shard
            for key in held:
                del entries[key]
            if tensors is not None:
                recovered += tensors
            elif origin is not None:
                tensors = _fetch(checkpoint, origin, layer, path, names)
                fetched += tensors
            else:
                raise CheckpointError(_gone(checkpoint, variant.name, path))
            removed += [key for key in held if key not in tensors]
            for name, tensor in tensors.items():
                entries[name] = checkpoint_files.entry_of(name, tensor, shard)
    return list(entries.values()), removed, recovered, fetched


def _gone(checkpoint: Checkpoint, variant: str, path: str) -> str:
    source = (checkpoint.record or {}).get("source")
    where = f"they are in {source}, which it was converted from" if source else "they are in the one it came from"
    return (
        f"{checkpoint.folder}: the stock projections that {variant!r} replaced are gone from this checkpoint and "
        f"cannot be computed from it ({path} was trained, or not made to be recovered); {where}. Give that checkpoint: "
        "revert(..., source=...), or --source"
    )


def _recover(
    checkpoint: Checkpoint, variant: ProjectVariant, options: Any, layer: Any, path: str
) -> dict[str, torch.Tensor] | None:
    """The stock tensors of one projection, if the patched one shows them bit for bit."""
    recorded = (checkpoint.manifest or {}).get("stock", {})
    held = {
        key.removeprefix(path + "."): entry.tensor()
        for key, entry in checkpoint.weights.entries.items()
        if key.startswith(path + ".")
    }
    module = variant.build(options, layer.in_features, layer.out_features).to(next(iter(held.values())).dtype)
    try:
        module.load_state_dict(held)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint.folder}: {path} does not fit its spec: {one_line(error, 240)}") from error
    wanted = ["weight"] + (["bias"] if layer.bias is not None else [])
    known = all(f"{path}.{name}" in recorded for name in wanted)
    # With the source's checksums at hand, any candidate can be tried; without, only what proves itself.
    candidates = [variant.recover(module, options, checkpoint.spec.init)]
    if known:
        candidates += [variant.recover(module, options, "calibrate"), module if type(module) is nn.Linear else None]
    for candidate in candidates:
        if candidate is None:
            continue
        tensors = {f"{path}.{name}": getattr(candidate, name).detach() for name in wanted}
        if not known or all(_matches(tensors[key], recorded[key]) for key in tensors):
            return tensors
    return None


def _matches(tensor: torch.Tensor, record: Mapping[str, Any]) -> bool:
    entry = checkpoint_files.entry_of("", tensor, "")
    return entry.dtype == record["dtype"] and list(entry.shape) == record["shape"] and entry.crc32() == record["crc32"]


def _fetch(checkpoint: Checkpoint, origin: Checkpoint, layer: Any, path: str, names: _Names) -> dict[str, torch.Tensor]:
    """The stock tensors of one projection from the checkpoint that a conversion started from."""
    recorded = (checkpoint.manifest or {}).get("stock", {})
    tensors = {}
    for name in ["weight"] + (["bias"] if layer.bias is not None else []):
        key = f"{path}.{name}"
        entry = next((origin.weights.entries[f] for f in names.forms(key) if f in origin.weights.entries), None)
        if entry is None or tuple(entry.shape) != tuple(getattr(layer, name).shape):
            shape = list(getattr(layer, name).shape)
            raise CheckpointError(f"{origin.name} has no {key} of the shape {shape}: a wrong source")
        tensor = entry.tensor()
        if key in recorded and not _matches(tensor, recorded[key]):
            raise CheckpointError(
                f"{origin.name} is not the checkpoint that {checkpoint.folder} was converted from: {key} differs"
            )
        tensors[key] = tensor
    return tensors
