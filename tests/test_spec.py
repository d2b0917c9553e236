"""AttentionSpec: every form that it reads, what it refuses, and that writing and reading give the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import attnpatch
from attnpatch.errors import AttnpatchError, SpecError
from attnpatch.options import describe_options
from attnpatch.registry import families, get_variant, variants
from attnpatch.spec import AttentionSpec, parse_layers, parse_sites
from attnpatch.stages import STAGES


def names(spec: AttentionSpec) -> list[list[str]]:
    return [list(rule.variants) for rule in spec.rules]


@pytest.mark.parametrize("spec", [None, "stock", "none", "", " Stock ", AttentionSpec()])
def test_stock(spec: Any) -> None:
    parsed = AttentionSpec.parse(spec)
    assert not parsed
    assert str(parsed) == "stock"


@pytest.mark.parametrize(
    "spec",
    [
        "neural+alignment",
        " alignment + neural ",
        {"neural": {}, "alignment": {}},
        {"neural": None, "alignment": {}},
        {"variant": "neural+alignment"},
        {"variant": "alignment+neural", "options": {}},
        ["neural+alignment"],
        [{"variant": "neural"}, "alignment"],
        "variant: neural+alignment",
        "{neural: {}, alignment: {}}",
        "- neural\n- alignment\n",
        AttentionSpec.parse("neural+alignment"),
        AttentionSpec.parse("neural+alignment").to_dict(),
    ],
)
def test_forms(spec: Any) -> None:
    flat = [name for rule in names(AttentionSpec.parse(spec)) for name in rule]
    assert flat == ["neural", "alignment"]


def test_yaml_files(tmp_path: Path) -> None:
    content = {"variant": "top_r", "options": {"top_r": {"r": 7}}, "layers": "0-2,5", "sites": ["cross", "encoder"]}
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(content))
    for form in (path, str(path)):
        rule = AttentionSpec.parse(form).rules[0]
        assert rule.options("top_r").r == 7
        assert rule.layers == (0, 1, 2, 5)
        assert rule.sites == ("encoder", "cross")
    with pytest.raises(SpecError, match="does not exist"):
        AttentionSpec.parse(tmp_path / "none.yaml")
    path.write_text("a: [")
    with pytest.raises(SpecError, match="not valid YAML"):
        AttentionSpec.parse(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="cannot be read"):
        AttentionSpec.parse(path)


def test_stage_order_and_text() -> None:
    spec = AttentionSpec.parse("alignment+query_value+top_r+elu+neural")
    assert names(spec) == [["neural", "elu", "top_r", "query_value", "alignment"]]
    text = str(AttentionSpec.parse({"top_r": {"r": 3}}, layers="1", sites="cross"))
    assert text == "top_r(r=3) @layers 1 @sites cross"
    assert AttentionSpec.parse("neural+elu") == AttentionSpec.parse("elu+neural")


@pytest.mark.parametrize(
    "spec", ["neural", "neural+expressive+top_r+query_value+alignment", {"polynomial": {"degree": 6}}]
)
@pytest.mark.parametrize("family", ["bert", "roberta", "marian"])
def test_writing_and_reading(spec: Any, family: str) -> None:
    resolved = AttentionSpec.parse(spec, layers="0,3", sites="encoder", init="paper").resolved(families()[family])
    again = AttentionSpec.from_dict(json.loads(json.dumps(resolved.to_dict())))
    assert again == resolved
    assert again.init == "paper"
    assert again.same_attention(resolved)
    for rule in again.rules:
        for name, options in rule.variants.items():
            assert set(options) == {o["name"] for o in describe_options(get_variant(name).Options)}


def test_family_defaults() -> None:
    spec = AttentionSpec.parse("neural")
    presets = {
        name: spec.resolved(family).rules[0].options("neural").preset
        for name, family in families().items()
        if name in ("bert", "roberta", "marian")
    }
    assert presets == {"bert": "roberta", "roberta": "roberta", "marian": "marian"}
    forced = AttentionSpec.parse({"neural": {"preset": "roberta"}}).resolved(families()["marian"])
    assert forced.rules[0].options("neural").preset == "roberta"


def test_the_arguments_fill_only_what_is_open() -> None:
    spec = AttentionSpec.parse([{"variant": "neural", "layers": 1}, "elu"], layers="0", sites="decoder")
    assert [rule.layers for rule in spec.rules] == [(1,), (0,)]
    assert [rule.sites for rule in spec.rules] == [("decoder",), ("decoder",)]


@pytest.mark.parametrize(
    ("given", "layers"),
    [
        (None, None),
        ("all", None),
        (3, (3,)),
        ("0-2", (0, 1, 2)),
        ("4, 0-1", (0, 1, 4)),
        ([2, 0, 2], (0, 2)),
        (["1-2"], (1, 2)),
    ],
)
def test_layers(given: Any, layers: Any) -> None:
    assert parse_layers(given) == layers


@pytest.mark.parametrize("given", [-1, "-1", "a", "3-1", "1-", "", [], True, 1.5, [True], [-2], {}])
def test_layers_that_are_refused(given: Any) -> None:
    with pytest.raises(SpecError, match="layers"):
        parse_layers(given)


def test_sites() -> None:
    assert parse_sites("cross, encoder") == ("encoder", "cross")
    assert parse_sites(None) is parse_sites("all") is None
    for wrong, words in (
        ("encoders", "did you mean 'encoder'"),
        ([], "empty"),
        (3, "unknown site"),
        ("", "unknown site"),
    ):
        with pytest.raises(SpecError, match=words):
            parse_sites(wrong)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("neurall", "unknown variant 'neurall'; did you mean 'neural'"),
        ("stock+neural", "unknown variant 'stock'"),
        ("neural,expressive", "joined with \\+: 'neural\\+expressive'"),
        ("neural & elu", "joined with \\+: 'neural\\+elu'"),
        ({"variant": "neural elu+top_r"}, "joined with \\+: 'neural\\+elu\\+top_r'"),
        ("neural @layers 3", "unknown variant 'neural @layers 3'"),
        ("neural+", "empty name beside a '\\+'"),
        ("neural+linear", "neural and linear both replace the stage 'project'"),
        ("expressive+elu", "expressive and elu both replace the stage 'score'"),
        ({"variant": "neural+neural"}, "twice"),
        ("neural+neural", "twice"),
        ({"variant": 3}, "given by name"),
        ({"variant": "neural", "option": {}}, "did you mean 'options'"),
        ({"variant": "neural", "options": {"neurals": {}}}, "did you mean 'neural'"),
        ({"variant": "neural", "options": 3}, "map a variant's name"),
        ({"neural": 3}, "must map names to values"),
        ({"neural": {"preset": "bert"}}, "known: marian, roberta"),
        ({"neural": {"preset": 3}}, "must be str"),
        ({"neural": {"noise": -0.1}}, "zero or more"),
        ({"neural": {"noise": float("nan")}}, "zero or more|noise"),
        ({"top_r": {"r": 0}}, "1 or more"),
        ({"top_r": {"r": 2.5}}, "must be int"),
        ({"top_r": {"r": True}}, "must be int"),
        ({"top_r": {"r": "many"}}, "must be int"),
        ({"polynomial": {"degree": 3}}, "an even number from 2"),
        ({"expressive": {"scale": 0}}, "a positive number"),
        ({"expressive": {"scale": "modell"}}, "did you mean 'model'"),
        ({"expressive": {"scale": float("inf")}}, "scale"),
        ({"alignment": {"weight": -1}}, "zero or more"),
        ({"alignment": {"method": "cd"}}, "did you mean 'ct'"),
        ({"alignment": {"weight": float("nan")}}, "weight"),
        ({"query_value": {"gate": "query", "phi": "tanh"}}, "closed form"),
        ({"elu": {"degree": 2}}, "unknown option 'degree'"),
        ([["neural"], "linear"], "two rules set the stage 'project'"),
        ([{"variant": "neural", "layers": "0-2"}, {"variant": "linear", "layers": "2-4"}], "two rules set the stage"),
        (3.5, "not float"),
        ("a: [", "not valid YAML"),
        ({}, "names no variant"),
        ({"layers": "0"}, "names no variant"),
        ({"format": 99, "rules": []}, "upgrade attnpatch"),
        ({"format": 0, "rules": []}, "must be a number from 1"),
        ({"rules": [{"variants": {}}]}, "names no variant"),
        ({"rules": [3]}, "must map 'variants'"),
        ({"rules": [], "extra": 1}, "unknown key 'extra'"),
    ],
)
def test_what_is_refused(spec: Any, words: str) -> None:
    with pytest.raises(SpecError, match=f"(?i){words}") as caught:
        AttentionSpec.parse(spec)
    assert isinstance(caught.value, (AttnpatchError, ValueError))
    assert "\n" not in str(caught.value)


def test_rules_that_do_not_meet() -> None:
    AttentionSpec.parse([{"variant": "neural", "layers": "0-2"}, {"variant": "linear", "layers": "3-4"}])
    AttentionSpec.parse([{"variant": "neural", "sites": "cross"}, {"variant": "linear", "sites": "encoder"}])


def test_init() -> None:
    with pytest.raises(SpecError, match="did you mean 'preserve'"):
        AttentionSpec.parse("neural", init="preserved")
    assert AttentionSpec.parse("neural").init == "preserve"


def test_text_options_are_converted() -> None:
    rule = AttentionSpec.parse({"value_aware": {"r": "8", "swaps": "2"}, "expressive": {"scale": "0.5"}}).rules[0]
    assert (rule.options("value_aware").r, rule.options("value_aware").swaps) == (8, 2)
    assert rule.options("expressive").scale == 0.5
    assert AttentionSpec.parse({"value_aware": {"r": "none"}}).rules[0].options("value_aware").r is None


def test_specs_are_values() -> None:
    spec = AttentionSpec.parse("neural")
    with pytest.raises(AttributeError):
        spec.init = "paper"  # type: ignore[misc]
    merged = spec.merged(AttentionSpec.parse("elu"))
    assert names(merged) == [["neural"], ["elu"]]
    assert names(merged.without_stages(["project"])) == [["elu"]]
    assert names(spec) == [["neural"]]


def test_every_variant_describes_itself() -> None:
    listed = variants()
    assert attnpatch.variants() == tuple(listed)
    assert {v.stage for v in listed.values()} == set(STAGES)
    for name, variant in listed.items():
        assert variant.summary
        assert variant.paper
        assert variant.Options() == AttentionSpec.parse(name).rules[0].options(name)
        assert all(o["doc"] for o in describe_options(variant.Options))
