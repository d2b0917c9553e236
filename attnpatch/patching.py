"""patch, unpatch, patched: rewrite the attention of a model in memory, and undo it exactly."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from attnpatch.auxiliary import install_loss_hooks, remove_loss_hooks
from attnpatch.calibrate import CalibrationPair, calibrate_projections
from attnpatch.checkpoint_files import source_name
from attnpatch.errors import PatchError, SpecError, UnsupportedModelError, unknown
from attnpatch.families.base import Site
from attnpatch.integration import ConfigView, install, route_through_pipeline
from attnpatch.methods.base import ProjectVariant, StageVariant, Variant
from attnpatch.patch_report import Change, PatchReport
from attnpatch.pipeline import CORE_STAGES, AttentionPipeline, pipeline_of
from attnpatch.registry import find_sites, get_variant
from attnpatch.spec import AttentionSpec
from attnpatch.stages import STAGES

# transformers is loaded for certain now; in a threaded start it may have been half-way when attnpatch was imported.
install()

REPORT_TOKENS = 128
"""Sequence length for which a report gives FLOPs."""

_UNDO = "_attnpatch_undo"


@dataclass
class _Undo:
    """How to take one stage out of one attention module again.

    For projections: (holder module, attribute, stock layer), where the stock layer is None when the model was
    built from a converted checkpoint, which no longer has it.
    """

    stage: str
    variant: str
    projections: list[tuple[nn.Module, str, nn.Module | None]]


@dataclass
class _Planned:
    site: Site
    module: nn.Module
    variant: Variant
    options: Any


def patch(
    model: nn.Module,
    spec: Any,
    layers: Any = None,
    sites: Any = None,
    init: str | None = None,
    *,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    keep_stock: bool = True,
) -> PatchReport:
    """Replace stages of a model's attention, in place.

    Either the whole patch is applied or, on an error, nothing is. The model keeps its class, its config object
    and its attention classes; `model.config.attnpatch` records the spec, so that it saves and reloads as patched.

    Args:
        model: a BERT, RoBERTa or Marian of transformers (any head), or of a registered family; one wrapped by
            PEFT is patched inside. A model on the meta device gets parameters there.
        spec: any form that `AttentionSpec.parse` reads. A second patch adds to the first; the same stage of the
            same module cannot be patched twice.
        layers, sites: restrict the spec's rules that name none.
        init: "preserve" (default), "paper" or "calibrate".
        calibration: for "calibrate": batches of keyword arguments for the model's forward pass.
        keep_stock: keep the replaced layers, which `unpatch` needs (the memory of the projections). Without them, a
            model whose patch failed half-way cannot be put back.

    Returns:
        A report of each module touched.

    Raises:
        SpecError: the spec is wrong, or names layers or sites that the model lacks.
        UnsupportedModelError: a model without known attention, compiled, quantised or wrapped for distribution.
        PatchError: a stage that is patched already.
    """
    inner = _unwrap(model)
    parsed = AttentionSpec.parse(spec, layers, sites, init)
    found = find_sites(inner)
    _check_whole(inner, found)
    parsed = parsed.resolved(found[0].family)
    if parsed.init == "calibrate" and calibration is None:
        raise SpecError("init='calibrate' needs calibration data: pass calibration=batches of model inputs")
    plan, notes = _plan(inner, parsed, found)
    parameters_before = sum(p.numel() for p in inner.parameters())
    undone: list[tuple[nn.Module, _Undo]] = []
    changes: list[Change] = []
    try:
        if parsed.init == "calibrate":
            replacements = _calibrated(inner, plan, calibration or [], notes)
        else:
            replacements = {}
        for planned in plan:
            undo, made = _apply(inner, planned, parsed.init, replacements, keep_stock)
            _remember(planned.module, undo)
            undone.append((planned.module, undo))
            changes += made
        _record(inner, parsed)
    except BaseException:
        if keep_stock:
            for module, undo in reversed(undone):
                _revert(module, undo)
        raise
    _protect(inner, undone)
    install_loss_hooks(inner)
    exact = parsed.init != "paper" and all(_preserves(p) for p in plan)
    notes += _init_notes(plan, parsed.init)
    return PatchReport(
        spec=str(parsed),
        init=parsed.init,
        exact=exact or not plan,
        changes=tuple(changes),
        parameters_before=parameters_before,
        tokens=REPORT_TOKENS,
        notes=tuple(notes),
    )


def unpatch(model: nn.Module, stages: Iterable[str] | None = None) -> None:
    """Take variants out of a model again: the stock modules and weights, bit for bit.

    Args:
        model: a patched model (one that is not patched is left alone).
        stages: only these of "project", "score", "select", "aggregate", "regularise"; None is all.

    Raises:
        PatchError: the model was built from a converted checkpoint, so that the stock projections are gone. The
            message names the checkpoint that has them, and nothing is changed. Other stages can be undone
            by naming them.
    """
    inner = _unwrap(model)
    chosen = _check_stages(stages)
    todo = [(module, undo) for module in inner.modules() for undo in _undo_list(module) if undo.stage in chosen]
    for _, undo in todo:
        if any(stock is None for _, _, stock in undo.projections):
            source = getattr(inner, "config", None)
            record = getattr(source, "attnpatch", None) or {}
            where = "the checkpoint that it was converted from"
            if record.get("source"):
                where += f", {record['source']}"
            raise PatchError(
                f"the stock projections that {undo.variant!r} replaced are not in this model: they are in {where}. "
                "Load that checkpoint, or undo only other stages: unpatch(model, stages=[...])"
            )
        for holder, attribute, _ in undo.projections:
            inside = holder.get_submodule(attribute).modules()
            adapter = next((m for m in inside if type(m).__module__.startswith("peft.")), None)
            if adapter is not None:
                raise PatchError(
                    f"the projections of {undo.variant!r} hold adapters ({type(adapter).__name__} of PEFT), which "
                    "would be lost: merge_and_unload() them first, or unpatch(model, stages=[...]) other stages"
                )
    for module, undo in reversed(todo):
        _revert(module, undo)
    _forget(inner, chosen)
    remove_loss_hooks(inner)
    if any(_undo_list(module) for module in inner.modules()):
        install_loss_hooks(inner)


@contextmanager
def patched(
    model: nn.Module,
    spec: Any,
    layers: Any = None,
    sites: Any = None,
    init: str | None = None,
    *,
    calibration: Iterable[Mapping[str, Any]] | None = None,
) -> Iterator[PatchReport]:
    """Patch a model for the length of a `with` block; yields the report.

    What this block patched is undone at its end, after an exception too; what was patched before stays.
    """
    inner = _unwrap(model)
    # The objects and not their ids, which a new object could get once an old one is gone.
    known = [undo for module in inner.modules() for undo in _undo_list(module)]
    had = copy.deepcopy(getattr(getattr(inner, "config", None), "attnpatch", None))
    report = patch(model, spec, layers, sites, init, calibration=calibration)
    try:
        yield report
    finally:
        for module in list(inner.modules()):
            for undo in reversed(_undo_list(module)):
                if not any(undo is other for other in known):
                    _revert(module, undo)
        # The config may be another object than before: the first patch of a model gives it its own.
        _set_record(getattr(inner, "config", None), had)
        remove_loss_hooks(inner)
        if any(_undo_list(module) for module in inner.modules()):
            install_loss_hooks(inner)


def build_from_config(model: nn.Module) -> None:
    """Patch a model that is being constructed from a config that carries a spec.

    Called at the end of every transformers model's `__init__`, innermost model first; what an inner model has
    built already is left as it is. The stock projections have random weights at this point and are not kept.
    """
    config: Any = model.config
    spec = AttentionSpec.from_dict(config.attnpatch)
    found = find_sites(model)
    plan, _ = _plan(model, spec.resolved(found[0].family), found, building=True)
    for planned in plan:
        undo, _ = _apply(model, planned, "paper", {}, keep_stock=False)
        _remember(planned.module, undo)
    install_loss_hooks(model)


def check_spec(model: nn.Module, spec: AttentionSpec) -> None:
    """Raise what `patch(model, spec)` would raise for its names, layers and sites; changes nothing."""
    _plan(model, spec, find_sites(model))


def patched_modules(model: nn.Module) -> dict[str, dict[str, str]]:
    """Path of every patched attention module -> stage -> variant."""
    return {
        path: {undo.stage: undo.variant for undo in _undo_list(module)}
        for path, module in model.named_modules()
        if _undo_list(module)
    }


def _unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT's wrapper; refuses wrappers that a patch would break."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"patch a model, not {type(model).__name__}")
    if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in model.modules()):
        raise UnsupportedModelError(
            "the model is compiled, and its compiled code would go on computing the old attention: "
            "patch first, then torch.compile"
        )
    kind = type(model).__name__
    if kind in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine") or (
        kind.startswith("FSDP")
    ):
        raise UnsupportedModelError(
            f"the model is wrapped in {kind}, which holds its parameters: patch first, then wrap"
        )
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        wrapper: Any = model
        model = wrapper.get_base_model()
    if not isinstance(model, PreTrainedModel):
        # Its config could not say which layers of which model are patched, and a save would lose the patch.
        inner = next((path for path, m in model.named_modules() if isinstance(m, PreTrainedModel)), None)
        hint = f"patch the model inside, .{inner}" if inner else "patch the whole model, and choose layers or sites"
        raise UnsupportedModelError(f"{kind} is not a transformers model: {hint}")
    return model


def _check_whole(model: nn.Module, found: Sequence[Site]) -> None:
    """Refuse the encoder or decoder of a model: they share its config, which would then speak for the other too."""
    kinds = {site.kind for site in found}
    config: Any = model.config
    ours = any(config.model_type in site.family.model_types for site in found)
    if ours and getattr(config, "is_encoder_decoder", False) and not {"encoder", "decoder"} <= kinds:
        raise UnsupportedModelError(
            f"{type(model).__name__} is a part of a model that has encoder and decoder: patch the whole model, with "
            f"sites={','.join(sorted(kinds))!r}"
        )


def _plan(
    model: nn.Module, spec: AttentionSpec, found: Sequence[Site], building: bool = False
) -> tuple[list[_Planned], list[str]]:
    """Which variant goes where; every reason to refuse is found here, before anything is touched.

    While a model is being built, an inner model may hold only some of a spec's sites, and what it has built is
    left to it.
    """
    modules = dict(model.named_modules())
    plan: list[_Planned] = []
    notes: list[str] = []
    for rule in spec.rules:
        chosen = [
            site
            for site in found
            if (rule.layers is None or site.layer in rule.layers) and (rule.sites is None or site.kind in rule.sites)
        ]
        if not building:
            _check_reach(rule.layers, rule.sites, found)
        for name in rule.variants:
            variant = get_variant(name)
            skipped = set()
            count = 0
            for site in chosen:
                options = rule.options(name, site.family)
                if not variant.applies(options, site, explicit=rule.sites is not None):
                    skipped.add(site.kind)
                    continue
                module = modules[site.path]
                count += 1
                if building and any(undo.stage == variant.stage for undo in _undo_list(module)):
                    continue
                planned = _Planned(site, module, variant, options)
                _check_free(model, planned, plan)
                plan.append(planned)
            if skipped:
                notes.append(f"{name} is not defined for {', '.join(sorted(skipped))} attention, which stays stock")
            if not count and not building:
                raise SpecError(
                    f"{name} applies to none of the chosen layers and sites; it takes the sites: "
                    f"{', '.join(variant.site_kinds)}"
                )
    return plan, notes


def plan_of(model: nn.Module, spec: AttentionSpec, found: Sequence[Site]) -> list[_Planned]:
    """Which variant, with which options, a resolved spec puts at which of a stock model's sites."""
    return _plan(model, spec, found)[0]


def _check_reach(layers: Sequence[int] | None, sites: Sequence[str] | None, found: Sequence[Site]) -> None:
    kinds = sorted({site.kind for site in found})
    for kind in sites or ():
        if kind not in kinds:
            raise SpecError(f"the model has no {kind} attention; its sites: {', '.join(kinds)}")
    numbers = sorted({site.layer for site in found if sites is None or site.kind in sites})
    for layer in layers or ():
        if layer not in numbers:
            raise SpecError(f"the model has no layer {layer}; its layers: {numbers[0]} to {numbers[-1]}")


def _check_free(model: nn.Module, planned: _Planned, plan: Sequence[_Planned]) -> None:
    """The stage must be stock, and projections plain linear layers."""
    site, variant = planned.site, planned.variant
    other = next((u.variant for u in _undo_list(planned.module) if u.stage == variant.stage), None)
    if other is None:
        other = next(
            (p.variant.name for p in plan if p.module is planned.module and p.variant.stage == variant.stage),
            None,
        )
    if other is not None:
        raise PatchError(
            f"{site.path}: the stage {variant.stage!r} is patched with {other!r} already, so {variant.name!r} cannot "
            "take it; unpatch first, or choose other layers or sites"
        )
    if isinstance(variant, ProjectVariant):
        for role in variant.roles(planned.options):
            path = site.family.projection_path(site.path, role)
            linear = model.get_submodule(path)
            if type(linear) is not nn.Linear:
                raise UnsupportedModelError(
                    f"{path} is a {type(linear).__module__}.{type(linear).__name__}, not a plain torch.nn.Linear: "
                    f"{variant.name!r} would throw it away. Patch before adding adapters or quantising"
                )


def _apply(
    model: nn.Module,
    planned: _Planned,
    init: str,
    replacements: Mapping[str, nn.Module],
    keep_stock: bool,
) -> tuple[_Undo, list[Change]]:
    if isinstance(planned.variant, ProjectVariant):
        return _apply_projection(model, planned, init, replacements, keep_stock)
    return _apply_stage(planned, init)


def _apply_projection(
    model: nn.Module,
    planned: _Planned,
    init: str,
    replacements: Mapping[str, nn.Module],
    keep_stock: bool,
) -> tuple[_Undo, list[Change]]:
    site, variant, options = planned.site, planned.variant, planned.options
    if not isinstance(variant, ProjectVariant):
        raise TypeError(f"{variant.name} is no variant of project")
    flops = variant.flops(options, site, REPORT_TOKENS)
    # All are made before the first is put in place: running out of memory then leaves the module as it was.
    made = []
    for role in variant.roles(options):
        path = site.family.projection_path(site.path, role)
        linear = model.get_submodule(path)
        if not isinstance(linear, nn.Linear):
            raise UnsupportedModelError(f"{path} is no linear layer")
        made.append((path, linear, replacements.get(path) or new_projection(variant, linear, options, init)))
    undo = _Undo(variant.stage, variant.name, [])
    changes = []
    for path, linear, new in made:
        holder_path, _, attribute = path.rpartition(".")
        holder = model.get_submodule(holder_path)
        new.train(holder.training)
        setattr(holder, attribute, new)
        undo.projections.append((holder, attribute, linear if keep_stock else None))
        added = sum(p.numel() for p in new.parameters()) - sum(p.numel() for p in linear.parameters())
        changes.append(
            Change(
                path=path,
                site=site.kind,
                layer=site.layer,
                stage=variant.stage,
                variant=variant.name,
                replaced="Linear",
                replacement=type(new).__name__,
                parameters_added=added,
                flops_added=flops,
            )
        )
        flops = 0
    return undo, changes


def new_projection(variant: ProjectVariant, linear: nn.Linear, options: Any, init: str) -> nn.Module:
    """A projection in the place of `linear`, on its device and in its dtype."""
    weight = linear.weight
    with torch.device(weight.device):
        build = variant.build if init == "paper" else variant.build_for_preserve
        new = build(options, linear.in_features, linear.out_features)
    new = new.to(dtype=weight.dtype)
    if init != "paper" and weight.device.type != "meta":
        variant.preserve(new, linear, options)
    return new


def _apply_stage(planned: _Planned, init: str) -> tuple[_Undo, list[Change]]:
    site, variant, module = planned.site, planned.variant, planned.module
    if not isinstance(variant, StageVariant):
        raise TypeError(f"{variant.name} replaces no stage of the attention function")
    weight = next(module.parameters())
    with torch.device(weight.device):
        new = variant.build(planned.options, site)
    new = new.to(dtype=weight.dtype)
    if init != "paper" and weight.device.type != "meta":
        variant.preserve(new)
    pipeline = pipeline_of(module)
    if pipeline is None:
        pipeline = AttentionPipeline(site.kind)
        module.add_module("attnpatch", pipeline)
        route_through_pipeline(module)
    replaced = getattr(pipeline, variant.stage)
    pipeline.set_stage(variant.stage, new)
    pipeline.train(module.training)
    change = Change(
        path=site.path,
        site=site.kind,
        layer=site.layer,
        stage=variant.stage,
        variant=variant.name,
        replaced="none" if replaced is None else type(replaced).__name__,
        replacement=type(new).__name__,
        parameters_added=sum(p.numel() for p in new.parameters()),
        flops_added=variant.flops(planned.options, site, REPORT_TOKENS),
    )
    return _Undo(variant.stage, variant.name, []), [change]


def _revert(module: nn.Module, undo: _Undo) -> None:
    """Undo one stage of one attention module."""
    for holder, attribute, stock in reversed(undo.projections):
        if stock is None:
            raise PatchError(f"the stock layer of {attribute!r} was not kept")
        reference = next(holder.get_submodule(attribute).parameters())
        parameter = next(stock.parameters())
        # The model may have been moved or cast since; the kept layer was out of its sight.
        if reference.device != parameter.device or reference.dtype != parameter.dtype:
            stock = stock.to(device=reference.device, dtype=reference.dtype)
        setattr(holder, attribute, stock.train(holder.training))
    if undo.stage in CORE_STAGES:
        pipeline = pipeline_of(module)
        if pipeline is not None:
            pipeline.set_stage(undo.stage, None)
            if pipeline.is_stock:
                del module._modules["attnpatch"]
                route_through_pipeline(module, off=True)
    undos = module.__dict__[_UNDO]
    undos.remove(undo)
    if not undos:
        del module.__dict__[_UNDO]


def _calibrated(
    model: nn.Module,
    plan: Sequence[_Planned],
    calibration: Iterable[Mapping[str, Any]],
    notes: list[str],
) -> dict[str, nn.Module]:
    """New projections, by path, whose last layer is fitted on the stock model's activations."""
    pairs: dict[str, CalibrationPair] = {}
    for planned in plan:
        if not isinstance(planned.variant, ProjectVariant):
            continue
        for role in planned.variant.roles(planned.options):
            path = planned.site.family.projection_path(planned.site.path, role)
            linear = model.get_submodule(path)
            if isinstance(linear, nn.Linear):
                new = new_projection(planned.variant, linear, planned.options, "preserve")
                pairs[path] = CalibrationPair(linear, new, planned.variant, planned.site.kind, role)
    if not pairs:
        raise SpecError("init='calibrate' fits projections, and the spec replaces none; use init='preserve'")
    errors = calibrate_projections(model, pairs, calibration)
    worst = max(errors, key=lambda path: errors[path])
    notes.append(
        f"calibrated {len(errors)} projections; relative error on the calibration data: "
        f"worst {errors[worst]:.2e} ({worst}), mean {sum(errors.values()) / len(errors):.2e}"
    )
    return {path: pair.new for path, pair in pairs.items()}


def _preserves(planned: _Planned) -> bool:
    variant = planned.variant
    if isinstance(variant, (ProjectVariant, StageVariant)):
        return variant.preserves(planned.options)
    return False


def _init_notes(plan: Sequence[_Planned], init: str) -> list[str]:
    names = sorted({p.variant.name for p in plan if isinstance(p.variant, ProjectVariant) and not _preserves(p)})
    if not names or init != "preserve":
        return []
    return [
        f"{', '.join(names)}: this form cannot keep the source's function exactly (LayerNorm or noise inside); "
        "init='calibrate' comes closer"
    ]


def _protect(model: nn.Module, undone: Sequence[tuple[nn.Module, _Undo]]) -> None:
    """Mark what a patch added as initialised: a model that takes this one as a part would draw it anew."""
    for module, undo in undone:
        added = [holder.get_submodule(attribute) for holder, attribute, _ in undo.projections]
        pipeline = pipeline_of(module)
        if pipeline is not None and undo.stage in CORE_STAGES:
            added.append(pipeline)
        for part in (inner for new in added for inner in new.modules()):
            part._is_hf_initialized = True  # type: ignore[assignment]
            for parameter in part.parameters(recurse=False):
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]


def _own_config(model: nn.Module) -> None:
    """Give the model a config of its own: models that are built later from the caller's must stay stock."""
    old: Any = model.config
    new = copy.deepcopy(old)
    for module in model.modules():
        config = module.__dict__.get("config")
        if config is old:
            module.__dict__["config"] = new
        elif isinstance(config, ConfigView) and config.shows(old):
            module.__dict__["config"] = ConfigView(new)


def _record(model: nn.Module, spec: AttentionSpec) -> None:
    if not spec:
        return
    if not getattr(model.config, "attnpatch", None):
        _own_config(model)
    config: Any = model.config
    had = getattr(config, "attnpatch", None)
    merged = AttentionSpec.from_dict(had).merged(spec) if had else spec
    record = merged.to_dict()
    # The checkpoint that still has the stock weights, for the error that unpatch gives after a reload.
    source = (had or {}).get("source") or getattr(config, "_name_or_path", "") or None
    if source:
        record["source"] = source_name(source)
    _set_record(config, record)


def _set_record(config: Any, record: Mapping[str, Any] | None) -> None:
    if config is None:
        return
    if record:
        config.attnpatch = dict(record)
    elif hasattr(config, "attnpatch"):
        del config.attnpatch


def _forget(model: nn.Module, stages: Sequence[str]) -> None:
    config = getattr(model, "config", None)
    record = getattr(config, "attnpatch", None)
    if not record:
        return
    left = AttentionSpec.from_dict(record).without_stages(stages)
    _set_record(config, {**record, **left.to_dict()} if left else None)


def _check_stages(stages: Iterable[str] | None) -> tuple[str, ...]:
    if stages is None:
        return STAGES
    chosen = [stages] if isinstance(stages, str) else list(stages)
    for stage in chosen:
        if stage not in STAGES:
            raise SpecError(unknown("stage", stage, STAGES))
    return tuple(chosen)


def _undo_list(module: nn.Module) -> tuple[_Undo, ...]:
    """What was patched into this attention module, oldest first."""
    return tuple(module.__dict__.get(_UNDO, ()))


def _remember(module: nn.Module, undo: _Undo) -> None:
    # Outside the module system: the kept stock layers must not show up among the parameters.
    module.__dict__.setdefault(_UNDO, []).append(undo)
