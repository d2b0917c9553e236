"""AttentionSpec: which variants, with which options, at which layers and sites. All that a config has to carry."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from attnpatch.errors import SpecError, one_line, unknown
from attnpatch.families.base import SITE_KINDS, Family
from attnpatch.methods.base import INITS
from attnpatch.options import build_options
from attnpatch.registry import get_variant
from attnpatch.stages import STAGES

FORMAT = 1
"""Version of the serialised form. Raise it when an older reader would misunderstand a newer spec."""


@dataclass(frozen=True)
class Rule:
    """Some variants at some places.

    Attributes:
        variants: name -> options as given (complete after `AttentionSpec.resolved`), in stage order.
        layers: layer numbers, counted in each stack from 0; None is all.
        sites: kinds of site ("encoder", "decoder", "cross"); None is all that the variant is defined for.
    """

    variants: Mapping[str, Mapping[str, Any]]
    layers: tuple[int, ...] | None = None
    sites: tuple[str, ...] | None = None

    def options(self, name: str, family: Family | None = None) -> Any:
        """The validated options object of one of the rule's variants, with `family`'s defaults."""
        variant = get_variant(name)
        defaults = family.defaults.get(name, {}) if family else {}
        options: Any = build_options(variant.Options, name, {**defaults, **self.variants[name]})
        variant.check(options)
        return options

    def to_dict(self) -> dict[str, Any]:
        return {
            "variants": {name: dict(options) for name, options in self.variants.items()},
            "layers": list(self.layers) if self.layers is not None else None,
            "sites": list(self.sites) if self.sites is not None else None,
        }

    def __str__(self) -> str:
        parts = []
        for name, options in self.variants.items():
            inner = ", ".join(f"{k}={v}" for k, v in options.items())
            parts.append(f"{name}({inner})" if inner else name)
        text = "+".join(parts)
        if self.layers is not None:
            text += f" @layers {','.join(map(str, self.layers))}"
        if self.sites is not None:
            text += f" @sites {','.join(self.sites)}"
        return text


@dataclass(frozen=True)
class AttentionSpec:
    """A list of rules, and the initialisation that new parameters get when they come from a stock checkpoint.

    Make one with `AttentionSpec.parse`; it is validated, immutable and comparable.
    """

    rules: tuple[Rule, ...] = ()
    init: str = "preserve"

    @classmethod
    def parse(
        cls,
        spec: Any,
        layers: Any = None,
        sites: Any = None,
        init: str | None = None,
    ) -> AttentionSpec:
        """Read a spec in any of its forms.

        Args:
            spec: "neural+expressive"; "stock" or None (no rules); a mapping such as
                {"variant": "neural", "options": {"neural": {"preset": "marian"}}, "layers": "0-5", "sites": ["cross"]}
                or {"neural": {"preset": "marian"}, "alignment": {}}; a list of such mappings; the serialised form;
                the path of a YAML file with any of these, or YAML text; an AttentionSpec.
            layers: restricts every rule that names none: "0-5", "0,2", 3, [0, 1].
            sites: likewise: "encoder,cross", ["decoder"].
            init: "preserve", "paper" or "calibrate"; overrides what the spec says.

        Raises:
            SpecError: unknown names, two variants on one stage, options outside their rule, a newer format.
        """
        parsed = cls._parse(spec)
        extra_layers, extra_sites = parse_layers(layers), parse_sites(sites)
        rules = tuple(
            dataclasses.replace(
                rule,
                layers=extra_layers if rule.layers is None else rule.layers,
                sites=extra_sites if rule.sites is None else rule.sites,
            )
            for rule in parsed.rules
        )
        result = cls(rules, parse_init(init if init is not None else parsed.init))
        result._check_overlap()
        return result

    @classmethod
    def _parse(cls, spec: Any) -> AttentionSpec:
        if spec is None:
            return cls()
        if isinstance(spec, AttentionSpec):
            return spec
        if isinstance(spec, Path):
            return cls._parse_file(spec)
        if isinstance(spec, str):
            return cls._parse_text(spec)
        if isinstance(spec, Mapping):
            if "rules" in spec or "format" in spec:
                return cls.from_dict(spec)
            return cls((_rule_from_mapping(spec),))
        if isinstance(spec, Sequence):
            rules: list[Rule] = []
            for item in spec:
                rules.extend(cls._parse(item).rules)
            return cls(tuple(rules))
        raise SpecError(f"a spec is text, a mapping or a list, not {type(spec).__name__}")

    @classmethod
    def _parse_file(cls, path: Path) -> AttentionSpec:
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise SpecError(f"spec file {str(path)!r} does not exist") from None
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(f"spec file {str(path)!r} cannot be read: {error}") from error
        return cls._parse(_load_yaml(text, f"spec file {str(path)!r}"))

    @classmethod
    def _parse_text(cls, text: str) -> AttentionSpec:
        text = text.strip()
        if text.lower() in ("stock", "none", ""):
            return cls()
        if "\n" not in text and text.endswith((".yaml", ".yml")):
            return cls._parse_file(Path(text))
        if any(mark in text for mark in ":{[\n"):
            return cls._parse(_load_yaml(text, "spec text"))
        return cls((_rule_from_mapping({"variant": text}),))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AttentionSpec:
        """Read the serialised form (`to_dict`), as it stands in config.json under "attnpatch".

        Raises:
            SpecError: it was written by a newer attnpatch, or is malformed.
        """
        written = data.get("format", FORMAT)
        if not isinstance(written, int) or written < 1:
            raise SpecError(f"the spec's format is {written!r}; it must be a number from 1 to {FORMAT}")
        if written > FORMAT:
            raise SpecError(
                f"the spec has format {written}, written by attnpatch {data.get('version', 'of a later version')}; "
                f"this attnpatch reads up to format {FORMAT}: upgrade attnpatch"
            )
        known = {"format", "version", "init", "rules", "source"}
        for key in data:
            if key not in known:
                raise SpecError(f"spec: {unknown('key', key, known)}")
        rules = data.get("rules")
        if not isinstance(rules, Sequence) or isinstance(rules, str):
            raise SpecError(f"the spec's rules are {rules!r}; they must be a list")
        made = []
        for rule in rules:
            if not isinstance(rule, Mapping) or not isinstance(rule.get("variants"), Mapping):
                raise SpecError(f"a rule of the spec is {rule!r}; it must map 'variants' to names with options")
            for key in rule:
                if key not in ("variants", "layers", "sites"):
                    raise SpecError(f"a rule of the spec: {unknown('key', key, ('variants', 'layers', 'sites'))}")
            made.append(_make_rule(rule["variants"], parse_layers(rule.get("layers")), parse_sites(rule.get("sites"))))
        return cls(tuple(made), parse_init(data.get("init", "preserve")))

    def to_dict(self) -> dict[str, Any]:
        """The serialised form: plain JSON types with a format number."""
        from attnpatch import __version__

        return {
            "format": FORMAT,
            "version": __version__,
            "init": self.init,
            "rules": [rule.to_dict() for rule in self.rules],
        }

    def resolved(self, family: Family) -> AttentionSpec:
        """The same spec with every option written out, `family`'s defaults applied: what a config stores."""
        rules = []
        for rule in self.rules:
            complete = {name: dataclasses.asdict(rule.options(name, family)) for name in rule.variants}
            rules.append(dataclasses.replace(rule, variants=complete))
        return dataclasses.replace(self, rules=tuple(rules))

    def merged(self, other: AttentionSpec) -> AttentionSpec:
        """Both specs' rules; the initialisation is the later one's."""
        return AttentionSpec(self.rules + other.rules, other.init)

    def without_stages(self, stages: Iterable[str]) -> AttentionSpec:
        """The spec less the variants of `stages`."""
        gone = set(stages)
        rules = []
        for rule in self.rules:
            kept = {n: o for n, o in rule.variants.items() if get_variant(n).stage not in gone}
            if kept:
                rules.append(dataclasses.replace(rule, variants=kept))
        return dataclasses.replace(self, rules=tuple(rules))

    def same_attention(self, other: AttentionSpec) -> bool:
        """Whether both build the same modules (the initialisation aside)."""
        return [r.to_dict() for r in self.rules] == [r.to_dict() for r in other.rules]

    def __bool__(self) -> bool:
        return bool(self.rules)

    def __str__(self) -> str:
        return "; ".join(map(str, self.rules)) or "stock"

    def _check_overlap(self) -> None:
        """Two rules that meet at some layer and site must not set the same stage."""
        for i, first in enumerate(self.rules):
            for second in self.rules[i + 1 :]:
                if not _meet(first.layers, second.layers) or not _meet(first.sites, second.sites):
                    continue
                for a in first.variants:
                    for b in second.variants:
                        if get_variant(a).stage == get_variant(b).stage:
                            raise SpecError(
                                f"two rules set the stage {get_variant(a).stage!r} at the same place: {a} ({first}) "
                                f"and {b} ({second}); give them different layers or sites"
                            )


def _meet(a: tuple[Any, ...] | None, b: tuple[Any, ...] | None) -> bool:
    return a is None or b is None or bool(set(a) & set(b))


def _split_names(text: Any) -> list[str]:
    if not isinstance(text, str):
        raise SpecError(f"a variant is given by name, such as 'neural+expressive', not {text!r}")
    names = [part.strip() for part in text.split("+")]
    words = [word for word in re.split(r"[\s,;+&]+", text) if word]
    if len(words) > len(names) and all(word.isidentifier() for word in words):
        raise SpecError(f"{text!r} is not the name of a variant; variants are joined with +: {'+'.join(words)!r}")
    if not all(names):
        raise SpecError(f"{text!r} has an empty name beside a '+'; write it as in 'neural+expressive'")
    return names


def _load_yaml(text: str, what: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"{what} is not valid YAML: {one_line(error)}") from None


def _rule_from_mapping(data: Mapping[str, Any]) -> Rule:
    layers, sites = parse_layers(data.get("layers")), parse_sites(data.get("sites"))
    if "variant" in data:
        known = {"variant", "options", "layers", "sites"}
        for key in data:
            if key not in known:
                raise SpecError(f"spec: {unknown('key', key, known)}")
        options = {} if data.get("options") is None else data["options"]
        names = _split_names(data["variant"])
        if not isinstance(options, Mapping):
            raise SpecError(f"the spec's options are {options!r}; they map a variant's name to its options")
        for key in options:
            if key not in names:
                raise SpecError(f"options were given for a variant that the spec lacks: {unknown('name', key, names)}")
        if len(set(names)) != len(names):
            raise SpecError(f"{data['variant']!r} names a variant twice")
        return _make_rule({name: {} if options.get(name) is None else options[name] for name in names}, layers, sites)
    named = {k: {} if v is None else v for k, v in data.items() if k not in ("layers", "sites")}
    return _make_rule(named, layers, sites)


def _make_rule(
    variants: Mapping[str, Mapping[str, Any]],
    layers: tuple[int, ...] | None,
    sites: tuple[str, ...] | None,
) -> Rule:
    by_stage: dict[str, str] = {}
    if not variants:
        raise SpecError("a rule names no variant")
    for name, options in variants.items():
        variant = get_variant(name)
        if not isinstance(options, Mapping):
            raise SpecError(f"the options of {name} are {options!r}; they must map names to values")
        if variant.stage in by_stage:
            raise SpecError(
                f"{by_stage[variant.stage]} and {name} both replace the stage {variant.stage!r}; choose one"
            )
        by_stage[variant.stage] = name
    ordered = sorted(variants, key=lambda name: STAGES.index(get_variant(name).stage))
    rule = Rule({name: dict(variants[name]) for name in ordered}, layers, sites)
    for name in ordered:
        rule.options(name)
    return rule


def parse_init(init: Any) -> str:
    """Check the name of an initialisation."""
    if init not in INITS:
        raise SpecError(unknown("init", init, INITS))
    return str(init)


def parse_layers(layers: Any) -> tuple[int, ...] | None:
    """ "0-5,8", 3, [0, 1] or None (all) -> sorted layer numbers.

    Raises:
        SpecError: not of that form.
    """
    if layers is None:
        return None
    form = "layers are numbers from 0, such as 3, '0-5,8' or [0, 1]"
    if isinstance(layers, bool):
        raise SpecError(f"layers is {layers!r}; {form}")
    if isinstance(layers, int):
        layers = [layers]
    if isinstance(layers, str):
        if layers.strip().lower() in ("all", "none"):
            return None
        layers = [part.strip() for part in layers.split(",")]
    if not isinstance(layers, Iterable):
        raise SpecError(f"layers is {layers!r}; {form}")
    numbers: set[int] = set()
    for part in layers:
        if isinstance(part, int) and not isinstance(part, bool) and part >= 0:
            numbers.add(part)
            continue
        first, dash, last = str(part).partition("-")
        if not _is_number(first) or (dash and not _is_number(last)):
            raise SpecError(f"layers has {part!r}; {form}")
        low, high = int(first), int(last) if dash else int(first)
        if high < low:
            raise SpecError(f"layers has {part!r}, a range that runs backwards; {form}")
        numbers.update(range(low, high + 1))
    if not numbers:
        raise SpecError(f"layers is empty; {form}")
    return tuple(sorted(numbers))


def _is_number(text: str) -> bool:
    """A layer number as people write it; no model has 10,000 layers."""
    text = text.strip()
    return text.isascii() and text.isdecimal() and len(text) <= 4


def parse_sites(sites: Any) -> tuple[str, ...] | None:
    """ "encoder,cross", ["decoder"] or None (all) -> kinds of site.

    Raises:
        SpecError: an unknown kind.
    """
    if sites is None:
        return None
    if isinstance(sites, str):
        if sites.strip().lower() in ("all", "none"):
            return None
        sites = [part.strip() for part in sites.split(",")]
    if not isinstance(sites, Iterable):
        raise SpecError(f"sites is {sites!r}; {unknown('site', sites, SITE_KINDS)}")
    chosen = list(sites)
    for site in chosen:
        if site not in SITE_KINDS:
            raise SpecError(unknown("site", site, SITE_KINDS))
    if not chosen:
        raise SpecError(f"sites is empty; known sites: {', '.join(SITE_KINDS)}")
    return tuple(kind for kind in SITE_KINDS if kind in chosen)
