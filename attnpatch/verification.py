"""verify: is a patched checkpoint whole, does it do what attention must do, and how far is it from its source?"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnpatch import checkpoint_files
from attnpatch.auxiliary import auxiliary_loss
from attnpatch.checkpoint import Checkpoint, load_model, open_checkpoint, quiet_transformers
from attnpatch.errors import AttnpatchError, CheckpointError, SpecError, unknown
from attnpatch.methods.base import ProjectVariant
from attnpatch.patching import patched_modules, plan_of
from attnpatch.probes import Probe, collect, drift, length_for, make_probe, outputs_of, parameters_of, random_tokens
from attnpatch.registry import find_sites, get_variant
from attnpatch.spec import AttentionSpec, Rule

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

EXACT_LIMIT = 1e-5
"""Drift in float32 of a conversion that keeps the model's function."""
SAME_LIMIT = 1e-6
"""For what must not change at all: the arithmetic is the same, only what it must ignore differs."""
ROUNDING_LIMIT = 2e-5
"""For the same function on tensors of other shapes, whose sums are formed in another order; relative to the
largest output, as an untrained model's logits may be large."""

BEAMS = 3

PASSED, FAILED, SKIPPED, MEASURED = "passed", "failed", "skipped", "measured"


@dataclass(frozen=True)
class Check:
    """One line of a report.

    Attributes:
        name: what was checked. value: what was found, limit: the most it may be (None where there is no number).
        status: passed, failed, skipped (does not apply here) or measured (a number without a limit).
        detail: the reason, or more about the number.
    """

    name: str
    status: str
    value: float | None = None
    limit: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found; `passed` when no check failed."""

    path: str
    against: str | None
    spec: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.status != FAILED for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "checks": [asdict(check) for check in self.checks], "passed": self.passed}

    def __str__(self) -> str:
        lines = []
        for check in self.checks:
            value = "" if check.value is None else f"{check.value:.2e}"
            limit = "" if check.limit is None else f"<= {check.limit:.0e}"
            lines.append(f"{check.name:<42} {check.status:<9} {value:>9} {limit:>9}  {check.detail}".rstrip())
        lines.append(f"{self.path}: {self.spec}: {'all checks passed' if self.passed else 'FAILED'}")
        return "\n".join(lines)


def verify(
    path: str | Path,
    against: str | Path | None = None,
    *,
    revision: str | None = None,
    against_revision: str | None = None,
    seed: int = 0,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    tolerance: float | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> VerifyReport:
    """Check a checkpoint, patched or stock.

    Args:
        path: folder or hub id. against: the checkpoint that it was converted from, for the drift.
        revision, against_revision: branch, tag or commit of each on the hub.
        seed: of the random inputs. dtypes: in which drift is measured: float32, bfloat16, float16.
        tolerance: largest drift allowed in float32; None is 1e-5 for a conversion that keeps the function as
            `convert` noted, and no limit otherwise.
        progress: called with the name of each check and the fraction done.

    Raises:
        CheckpointError: the checkpoint or `against` cannot be opened or loaded at all.
    """
    for name in dtypes:
        if name not in DTYPES:
            raise SpecError(unknown("dtype", name, DTYPES))
    if against_revision is not None and against is None:
        raise CheckpointError(
            f"against_revision ({against_revision!r}) needs the checkpoint that it is a revision of: against"
        )
    checkpoint = open_checkpoint(path, revision)
    origin = open_checkpoint(against, against_revision) if against is not None else None
    found: list[Check] = []
    steps: list[tuple[str, Callable[[], Iterable[Check]]]] = [("checksums", lambda: [_checksums(checkpoint)])]
    loaded: list[Any] = []
    steps.append(("weights", lambda: _load(checkpoint, loaded)))
    names = ("finite", "padding", "causality", "generation", "attentions", "save and load", "gradients")
    checks: tuple[Callable[[Any, int], Iterable[Check]], ...] = (
        _finite,
        _padding,
        _causality,
        _generation,
        _attentions,
        _save_load,
        _gradients,
    )
    for name, check in zip(names, checks, strict=True):
        steps.append((name, lambda check=check: check(loaded[0], seed)))  # type: ignore[misc]
    if origin is not None:
        steps.append(("drift", lambda: _drift(checkpoint, origin, loaded[0], seed, dtypes, tolerance)))
    for i, (name, step) in enumerate(steps):
        if progress is not None:
            progress(name, i / len(steps))
        if name not in ("checksums", "weights") and not loaded:
            found.append(Check(name, SKIPPED, detail="the model could not be loaded"))
            continue
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found += step()
    return VerifyReport(str(path), str(against) if against is not None else None, str(checkpoint.spec), tuple(found))


def _bounded(name: str, value: float, limit: float, detail: str = "") -> Check:
    # A value that is not a number fails.
    return Check(name, PASSED if value <= limit else FAILED, value, limit, detail)


# --- the files --------------------------------------------------------------------------------------------------


def _checksums(checkpoint: Checkpoint) -> Check:
    if not (checkpoint.manifest or {}).get("files"):
        reason = "no attnpatch_manifest.json: the weights were not written by convert"
        return Check("checksums of the weights", SKIPPED, detail=reason)
    changed = checkpoint_files.changed_tensors(checkpoint.weights, checkpoint.manifest or {})
    if changed:
        detail = f"changed since they were written: {', '.join(changed[:3])}{', ...' if len(changed) > 3 else ''}"
        return Check("checksums of the weights", FAILED, float(len(changed)), 0.0, detail)
    return Check("checksums of the weights", PASSED, 0.0, 0.0, f"{len(checkpoint.weights.entries)} tensors")


def _load(checkpoint: Checkpoint, loaded: list[Any]) -> Iterator[Check]:
    try:
        model, notes = load_model(checkpoint, torch.float32)
    except AttnpatchError as error:
        yield Check("weights complete", FAILED, detail=str(error))
        return
    loaded.append(model)
    yield Check("weights complete", PASSED, detail="; ".join(notes))


# --- behaviour --------------------------------------------------------------------------------------------------


def _finite(model: Any, seed: int) -> Iterator[Check]:
    outputs = outputs_of(model, make_probe(model, seed))
    bad = sum(int((~value.isfinite()).sum()) for value in outputs.values())
    yield _bounded("outputs finite", float(bad), 0.0, "" if not bad else "values that are not finite")


def _scale(outputs: Mapping[str, Tensor]) -> float:
    return max(1.0, *(float(value.abs().max()) for value in outputs.values()))


def _padding(model: Any, seed: int) -> Iterator[Check]:
    probe = make_probe(model, seed)
    reference = outputs_of(model, probe)
    changed = replace(probe, inputs=dict(probe.inputs))
    generator = torch.Generator().manual_seed(seed + 1)
    ids, mask = probe.inputs["input_ids"], probe.inputs["attention_mask"]
    other = random_tokens(model.config, tuple(ids.shape), _vocabulary(model, probe), generator)
    changed.inputs["input_ids"] = torch.where(mask.bool(), ids, other)
    if probe.has_cross:
        states, cross = probe.inputs["encoder_hidden_states"], probe.inputs["encoder_attention_mask"]
        changed.inputs["encoder_hidden_states"] = torch.where(cross.bool()[..., None], states, 10.0 * states + 5.0)
    gap = drift(reference, outputs_of(model, changed)).max
    yield _bounded("padding: what stands in it", gap, SAME_LIMIT * _scale(reference))

    longer = replace(probe, inputs=dict(probe.inputs))
    extra = 3
    for name, fill in (("input_ids", _pad(model)), ("attention_mask", 0)):
        if probe.kind == "decoder":
            continue
        value = longer.inputs[name]
        longer.inputs[name] = torch.cat([value, value.new_full((*value.shape[:-1], extra), fill)], dim=-1)
    if probe.has_cross:
        for name in ("encoder_hidden_states", "encoder_attention_mask"):
            value = longer.inputs[name]
            longer.inputs[name] = torch.cat([value, torch.zeros_like(value[:, :extra])], dim=1)
    if probe.kind == "encoder":
        longer = replace(longer, valid=torch.cat([probe.valid, probe.valid.new_zeros(len(probe.valid), extra)], dim=1))
    if probe.kind != "decoder":
        gap = drift(reference, outputs_of(model, longer)).max
        yield _bounded("padding: how much there is", gap, ROUNDING_LIMIT * _scale(reference))
        return
    yield from _left_padding(model, probe, reference, extra)


def _left_padding(model: Any, probe: Probe, reference: Mapping[str, Tensor], extra: int) -> Iterator[Check]:
    """A decoder's sequences moved to the right by padding, as in batched generation."""
    name = "padding: on the left"
    if "position_ids" not in parameters_of(model):
        yield Check(name, SKIPPED, detail=f"{type(model).__name__} takes no position_ids: padding moves its positions")
        return
    mask = probe.inputs["attention_mask"]
    moved = dict(probe.inputs)
    for key, fill in (("input_ids", _pad(model)), ("attention_mask", 0)):
        value = moved[key]
        moved[key] = torch.cat([value.new_full((len(value), extra), fill), value], dim=1)
    first = find_sites(model)[0].family.first_position(model.config)
    moved["position_ids"] = (moved["attention_mask"].cumsum(1) - 1 + first).clamp(min=0)
    valid = torch.cat([probe.valid.new_zeros(len(mask), extra), probe.valid], dim=1)
    gap = drift(reference, outputs_of(model, replace(probe, inputs=moved, valid=valid))).max
    yield _bounded(name, gap, ROUNDING_LIMIT * _scale(reference))


def _causality(model: Any, seed: int) -> Iterator[Check]:
    name = "causality: a later token and earlier outputs"
    probe = make_probe(model, seed)
    if probe.kind == "encoder":
        yield Check(name, SKIPPED, detail="an encoder: every token sees every other")
        return
    key = "decoder_input_ids" if probe.kind == "seq2seq" else "input_ids"
    ids = probe.inputs[key]
    at = ids.shape[1] // 2
    later = ids.clone()
    size = _vocabulary(model, probe, target=True)
    shift = random_tokens(model.config, (len(ids), ids.shape[1] - at), size, torch.Generator().manual_seed(seed + 2))
    later[:, at:] = torch.where(shift == ids[:, at:], (shift + 1) % size, shift)
    early = probe.valid.clone()
    early[:, at:] = False
    changed = replace(probe, inputs={**probe.inputs, key: later}, valid=early)
    first, second = outputs_of(model, replace(probe, valid=early)), outputs_of(model, changed)
    names = [n for n in first if n in ("logits", "prediction_logits", "last_hidden_state")]
    if not names or any(first[n].shape[0] != int(early.sum()) for n in names):
        yield Check(name, SKIPPED, detail=f"{type(model).__name__} has no output for each token")
        return
    gap = drift({n: first[n] for n in names}, {n: second[n] for n in names}).max
    yield _bounded(name, gap, SAME_LIMIT * _scale(first))


def _generation(model: Any, seed: int) -> Iterator[Check]:
    steps, beam = "generation: cached logits against uncached", "generation: beams cached against uncached"
    probe = make_probe(model, seed)
    if probe.kind == "encoder" or not model.can_generate():
        for name in (steps, beam):
            yield Check(name, SKIPPED, detail=f"{type(model).__name__} does not generate")
        return
    with torch.no_grad():
        cached, full = _logits_with_cache(model, probe)
        limit = ROUNDING_LIMIT * max(1.0, float(full.abs().max()))
        yield _bounded(steps, float((cached - full).abs().max()), limit, f"{full.shape[1]} tokens")
        first, second = (_beams(model, probe, use_cache) for use_cache in (True, False))
    differ = float((first != second).any(dim=1).sum()) if first.shape == second.shape else float(len(first))
    yield _bounded(beam, differ, 0.0, f"sequences that differ, of {len(first)}, with {BEAMS} beams")


def _logits_with_cache(model: Any, probe: Probe) -> tuple[Tensor, Tensor]:
    """Logits [B, T, V] of one sequence fed token by token after a prefix, and of the whole sequence at once."""
    given = dict(probe.inputs)
    key = "decoder_input_ids" if probe.kind == "seq2seq" else "input_ids"
    ids = given.pop(key)
    if probe.kind == "seq2seq":
        # The encoder runs once, as in generation.
        encoder = model.get_encoder()
        given["encoder_outputs"] = encoder(given.pop("input_ids"), attention_mask=given["attention_mask"])
    else:
        # The same tokens without padding, which another check covers.
        given.pop("attention_mask")
        ids = torch.where(probe.valid, ids, ids[:1])
    full = model(**given, **{key: ids}, use_cache=False).logits
    prefix = ids.shape[1] // 2
    result = model(**given, **{key: ids[:, :prefix]}, use_cache=True)
    pieces = [result.logits]
    for at in range(prefix, ids.shape[1]):
        result = model(**given, **{key: ids[:, at : at + 1]}, past_key_values=result.past_key_values, use_cache=True)
        pieces.append(result.logits)
    return torch.cat(pieces, dim=1).float(), full.float()


def _beams(model: Any, probe: Probe, use_cache: bool) -> Tensor:
    inputs = {name: value for name, value in probe.inputs.items() if name != "decoder_input_ids"}
    if probe.kind == "decoder":
        # Without encoder states: generate() gives a lone decoder a cache that has no room for them.
        inputs = {"input_ids": inputs["input_ids"][:1], "attention_mask": inputs["attention_mask"][:1]}
    new = 5
    # A generation config of nothing but this: the checkpoint's own settings must not meddle.
    stock = model.generation_config
    settings = type(stock)(
        max_new_tokens=new,
        min_new_tokens=new,
        num_beams=BEAMS,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=_pad(model),
        eos_token_id=stock.eos_token_id,
        bos_token_id=stock.bos_token_id,
        decoder_start_token_id=stock.decoder_start_token_id,
        # RoBERTa counts positions without padding, which a random model may well generate.
        suppress_tokens=[_pad(model)],
    )
    model.generation_config = settings
    try:
        sequences: Tensor = model.generate(**inputs)
    finally:
        model.generation_config = stock
    return sequences


def _attentions(model: Any, seed: int) -> Iterator[Check]:
    name = "attentions: returned, and rows sum to 1"
    probe = make_probe(model, seed)
    chosen = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            result = model(**probe.inputs, output_attentions=True)
    finally:
        model.set_attn_implementation(chosen)
    sites = find_sites(model)
    worst = 0.0
    count = 0
    for kind, key in _attention_outputs(result, probe, {site.kind for site in sites}):
        wanted = [site for site in sites if site.kind == kind]
        given = result.get(key)
        given = [] if given is None else [a for a in given if a is not None]
        if len(given) != len(wanted):
            yield Check(name, FAILED, detail=f"{key} has {len(given)} entries for {len(wanted)} {kind} layers")
            return
        for site, weights in zip(wanted, given, strict=True):
            if weights.dim() != 4 or weights.shape[1] != site.num_heads:
                detail = f"{key} of {site.path} is {list(weights.shape)}, not [batch, {site.num_heads}, T, S]"
                yield Check(name, FAILED, detail=detail)
                return
            rows = weights.float().sum(-1).transpose(1, 2)
            valid = probe.valid if kind != "encoder" else probe.inputs["attention_mask"].reshape(rows.shape[:2]).bool()
            worst = max(worst, float((rows[valid] - 1).abs().nan_to_num(nan=float("inf")).max()))
            count += 1
    yield _bounded(name, worst, 1e-4, f"{count} layers")


def _attention_outputs(result: Any, probe: Probe, kinds: set[str]) -> list[tuple[str, str]]:
    if probe.kind == "seq2seq":
        pairs = [("encoder", "encoder_attentions"), ("decoder", "decoder_attentions"), ("cross", "cross_attentions")]
    else:
        pairs = [(probe.kind, "attentions"), ("cross", "cross_attentions")]
    return [(kind, key) for kind, key in pairs if kind in kinds]


def _save_load(model: Any, seed: int) -> Iterator[Check]:
    probe = make_probe(model, seed)
    before = outputs_of(model, probe)
    with tempfile.TemporaryDirectory(prefix="attnpatch-verify-") as folder:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder, dtype=torch.float32).eval()
    same = patched_modules(again) == patched_modules(model)
    gap = drift(before, outputs_of(again, probe)).max
    detail = "" if same else "the reloaded model is patched otherwise"
    yield Check("save and load", PASSED if same and gap == 0.0 else FAILED, gap, 0.0, detail)


# --- training ---------------------------------------------------------------------------------------------------


def _gradients(model: Any, seed: int) -> Iterator[Check]:
    name = "gradients reach every new parameter"
    new = _new_parameters(model)
    if not new:
        yield Check(name, SKIPPED, detail="the spec adds no parameters")
        return
    closed = [str(Rule({n: r.variants[n]})) for r in _spec_of(model).rules for n in r.variants if not _trains(r, n)]
    if closed:
        yield Check(name, SKIPPED, detail=f"{closed[0]} is for inference and has no gradient, by design")
        return
    probe = make_probe(model, seed)
    with _trainable(model, new):
        model.train()
        result = model(**_training_inputs(model, probe))
        outputs = [value for value in collect(result, None).values() if value.requires_grad]
        loss = sum((value * torch.randn_like(value)).sum() for value in outputs) + auxiliary_loss(model)
        loss.backward()
        bad = [key for key, p in new.items() if not _is_sound(key, p.grad)]
    detail = f"{len(new)} tensors" if not bad else f"none, zero or not finite at {', '.join(bad[:3])}"
    yield _bounded(name, float(len(bad)), 0.0, detail)


def _spec_of(model: Any) -> AttentionSpec:
    return AttentionSpec.from_dict(model.config.attnpatch)


def _trains(rule: Rule, name: str) -> bool:
    return get_variant(name).trains(rule.options(name))


def _is_sound(key: str, gradient: Tensor | None) -> bool:
    """There, finite, and not zero throughout; a bias may have zero: one that is added to every key alike moves all
    scores of a query by the same amount, which softmax takes out again, and `alignment` compares its critic only
    with itself."""
    if gradient is None or not bool(gradient.isfinite().all()):
        return False
    return bool(gradient.any()) or key.endswith("bias")


def _training_inputs(model: Any, probe: Probe) -> dict[str, Tensor]:
    inputs = dict(probe.inputs)
    takes = parameters_of(model)
    if "use_cache" in takes:
        inputs["use_cache"] = False  # type: ignore[assignment]
    return inputs


@contextmanager
def _trainable(model: Any, new: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Only the new parameters train, moved a little off their start, where a gate of exactly 0 would shield the
    parameters behind it; afterwards everything is as it was."""
    needed = {p: p.requires_grad for p in model.parameters()}
    kept = {key: p.detach().clone() for key, p in new.items()}
    try:
        model.requires_grad_(False)
        with torch.no_grad():
            for p in new.values():
                p.requires_grad_(True)
                p.add_(torch.randn_like(p), alpha=0.02)
        yield
    finally:
        model.eval()
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for key, p in new.items():
                p.copy_(kept[key])
        for p, value in needed.items():
            p.requires_grad_(value)


def _new_parameters(model: Any) -> dict[str, nn.Parameter]:
    """Parameters that the spec brought: of replaced projections and of stages."""
    record = getattr(model.config, "attnpatch", None)
    if not record:
        return {}
    with torch.device("meta"):
        stock = type(model)(_without_spec(model.config))
    old = {name for name, _ in stock.named_parameters()}
    # A re-initialised linear layer has the name of the one that it replaces.
    replaced = []
    found = find_sites(stock)
    for planned in plan_of(stock, _spec_of(model).resolved(found[0].family), found):
        if isinstance(planned.variant, ProjectVariant):
            site = planned.site
            roles = planned.variant.roles(planned.options)
            replaced += [site.family.projection_path(site.path, role) + "." for role in roles]
    prefixes = tuple(replaced)
    return {name: p for name, p in model.named_parameters() if name not in old or name.startswith(prefixes)}


def _without_spec(config: Any) -> Any:
    stock = copy.deepcopy(config)
    del stock.attnpatch
    return stock


# --- drift ------------------------------------------------------------------------------------------------------


def _drift(
    checkpoint: Checkpoint, origin: Checkpoint, model: Any, seed: int, dtypes: Sequence[str], tolerance: float | None
) -> Iterator[Check]:
    try:
        stock, _ = load_model(origin, torch.float32)
    except AttnpatchError as error:
        raise CheckpointError(f"the source cannot be loaded: {error}") from error
    probe = make_probe(model, seed, length=max(24, length_for(checkpoint.spec, model)), batch=4)
    exact = bool((checkpoint.manifest or {}).get("exact")) or not checkpoint.record
    for name in dtypes:
        stock.to(DTYPES[name])
        model.to(DTYPES[name])
        try:
            gap = drift(outputs_of(stock, probe), outputs_of(model, probe))
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise CheckpointError(f"{origin.name} does not take the inputs of {checkpoint.name}: {error}") from error
        if not gap.outputs:
            raise CheckpointError(f"{origin.name} and {checkpoint.name} have no output in common")
        limit = tolerance if tolerance is not None else EXACT_LIMIT if exact else None
        detail = f"mean {gap.mean:.2e}"
        if name == "float32" and limit is not None:
            yield _bounded(f"drift in {name}: max", gap.max, limit, detail)
        else:
            yield Check(f"drift in {name}: max", MEASURED, gap.max, detail=detail)
        yield Check(f"drift in {name}: mean", MEASURED, gap.mean)


def _pad(model: Any) -> int:
    pad = getattr(model.config, "pad_token_id", None)
    return 0 if pad is None else int(pad)


def _vocabulary(model: Any, probe: Probe, target: bool = False) -> int:
    config = model.config
    if target or probe.kind == "decoder":
        return int(getattr(config, "decoder_vocab_size", None) or config.vocab_size)
    return int(config.vocab_size)
