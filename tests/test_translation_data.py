"""Readers of parallel text, and their errors with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attnpatch.experiments.translation.config import DataConfig
from attnpatch.experiments.translation.data import load_split, merge
from attnpatch.training.errors import DataError
from attnpatch.training.files import sha256_file


def put(folder: Path, **files: str | bytes) -> None:
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))


def config(folder: Path, **settings: object) -> DataConfig:
    return DataConfig(dir=str(folder), **settings)  # type: ignore[arg-type]


def test_two_files(tmp_path: Path) -> None:
    put(tmp_path, train__de="Ein Haus.\nZwei\u2028Häuser.\r\n", train__en="A house.\nTwo houses.\n")
    (text,) = load_split(config(tmp_path), "train")
    assert text.sources == ["Ein Haus.", "Zwei\u2028Häuser."]
    assert text.targets == text.references == ["A house.", "Two houses."]
    assert [f["sha256"] for f in text.files] == [sha256_file(tmp_path / n) for n in ("train.de", "train.en")]
    assert {f["pairs"] for f in text.files} == {2}


def test_lowercase_keeps_references(tmp_path: Path) -> None:
    put(tmp_path, train__de="Ein Haus.", train__en="A House.")
    (text,) = load_split(config(tmp_path, lowercase=True), "train")
    assert (text.sources, text.targets, text.references) == (["ein haus."], ["a house."], ["A House."])


def test_explicit_files_and_limit(tmp_path: Path) -> None:
    put(tmp_path, left__txt="a\nb\nc\n", right__txt="x\ny\nz\n")
    entry = {"source": "left.txt", "target": "right.txt"}
    (text,) = load_split(config(tmp_path, train=[entry], max_train_pairs=2), "train")
    assert list(zip(text.sources, text.targets, strict=True)) == [("a", "x"), ("b", "y")]


def test_sides_of_different_length(tmp_path: Path) -> None:
    put(tmp_path, train__de="a\nb\nc\n", train__en="x\ny\n")
    with pytest.raises(DataError, match=r"3 sentences .* 2; .*train\.de, line 3, is the first without a partner"):
        load_split(config(tmp_path), "train")


def test_empty_lines(tmp_path: Path) -> None:
    put(tmp_path, train__de="a\n \nc\nd\n", train__en="x\ny\nz\n\n")
    with pytest.raises(DataError, match=r"train\.de, line 2: empty sentence.*on_empty=skip"):
        load_split(config(tmp_path), "train")
    (text,) = load_split(config(tmp_path, on_empty="skip"), "train")
    assert (text.sources, text.targets, text.skipped) == (["a", "c"], ["x", "z"], 2)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_not_utf8(tmp_path: Path, mark: bytes) -> None:
    put(tmp_path, train__de=mark + "gut\nschön\n".encode() + "übel\n".encode("latin-1"), train__en="a\nb\nc\n")
    with pytest.raises(DataError, match=r"train\.de, line 3: not UTF-8 \(byte 0xfc\)"):
        load_split(config(tmp_path), "train")


def test_missing_files_name_what_is_needed(tmp_path: Path) -> None:
    put(tmp_path, train__de="a\n")
    with pytest.raises(DataError, match=r"missing \S*train\.en .*data\.dir=PATH.*Some Corpus"):
        load_split(config(tmp_path, about="Some Corpus"), "train")
    with pytest.raises(DataError, match="does not exist"):
        load_split(config(tmp_path / "nowhere"), "train")


def test_the_side_that_is_there_is_not_meant(tmp_path: Path) -> None:
    put(tmp_path, train__de="a\n", trian__en="b\n")
    with pytest.raises(DataError, match=r"missing \S*train\.en .*did you mean 'trian\.en'\?"):
        load_split(config(tmp_path), "train")
    (tmp_path / "trian.en").unlink()
    with pytest.raises(DataError) as caught:
        load_split(config(tmp_path), "train")
    assert "did you mean" not in str(caught.value)


def test_test_sets_have_names_of_their_own(tmp_path: Path) -> None:
    """Their translations would be one file."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        put(tmp_path / folder, test__de="x\n", test__en="y\n", train__de="x\n", train__en="y\n")
    with pytest.raises(DataError, match=r"data\.test has two entries called 'test'"):
        load_split(config(tmp_path, test=["a/test", "b/test"]), "test")
    assert len(load_split(config(tmp_path, train=["a/train", "b/train"]), "train")) == 2


def test_tsv(tmp_path: Path) -> None:
    put(tmp_path, a__tsv='Hello\t"Hallo\nBye\tTschüss\n', b__tsv="id\ten\tde\n1\tHello\tHallo\n")
    (text,) = load_split(config(tmp_path, train=["a.tsv"], source_column=1, target_column=0), "train")
    assert (text.sources, text.targets) == (['"Hallo', "Tschüss"], ["Hello", "Bye"])
    (text,) = load_split(config(tmp_path, train=["b.tsv"], header=True), "train")
    assert (text.sources, text.targets) == (["Hallo"], ["Hello"])
    put(tmp_path, c__tsv="a\tb\nonly one\n")
    with pytest.raises(DataError, match=r"c\.tsv, line 2: 1 column"):
        load_split(config(tmp_path, train=["c.tsv"]), "train")
    with pytest.raises(DataError, match=r"no column 'fr'; it has id, en, de"):
        load_split(config(tmp_path, train=["b.tsv"], header=True, source_column="fr"), "train")


def test_jsonl(tmp_path: Path) -> None:
    rows = [{"de": "Ja", "en": "Yes"}, {"translation": {"de": "Nein", "en": "No"}}]
    put(tmp_path, a__jsonl="".join(json.dumps(row) + "\n" for row in rows))
    (text,) = load_split(config(tmp_path, train=["a.jsonl"]), "train")
    assert list(zip(text.sources, text.targets, strict=True)) == [("Ja", "Yes"), ("Nein", "No")]
    for bad, reason in (
        ("{", "not valid JSON"),
        ('{"de": "x"}', "no key 'en'"),
        ('{"de": 1, "en": ""}', "int, not text"),
    ):
        put(tmp_path, b__jsonl='{"de": "a", "en": "b"}\n' + bad + "\n")
        with pytest.raises(DataError, match=rf"b\.jsonl, line 2: .*{reason}"):
            load_split(config(tmp_path, train=["b.jsonl"]), "train")


XML = """<?xml version="1.0" encoding="UTF-8"?>
<mteval><refset setid="s"><doc docid="1">
<title>Not a sentence</title>
<seg id="1">  Erster &amp; Satz.  </seg>
<seg id="2"> {} </seg>
</doc></refset></mteval>
"""


def test_iwslt_xml_and_tags(tmp_path: Path) -> None:
    put(tmp_path, **{"tst__de__xml": XML.format("Zweiter"), "tst__en__xml": XML.format("Second")})
    (text,) = load_split(config(tmp_path, test=["tst"]), "test")
    assert text.sources == ["Erster & Satz.", "Zweiter"]
    put(tmp_path, **{"tst__en__xml": XML.format("")})
    with pytest.raises(DataError, match=r"tst\.en\.xml, line 5: empty sentence"):
        load_split(config(tmp_path, test=["tst"]), "test")
    put(tmp_path, **{"tst__en__xml": "<a>\n<b>\n</a>"})
    with pytest.raises(DataError, match=r"tst\.en\.xml, line 3: not valid XML"):
        load_split(config(tmp_path, test=["tst"]), "test")
    tags = "<url>u</url>\n{}\n<title>t</title>\n {} \n"
    put(tmp_path, **{"train__tags__de-en__de": tags.format("a", "b"), "train__tags__de-en__en": tags.format("x", "y")})
    (text,) = load_split(config(tmp_path, train=["train.tags.de-en"]), "train")
    assert (text.sources, text.targets) == (["a", "b"], ["x", "y"])


def test_folder_and_merge(tmp_path: Path) -> None:
    put(tmp_path, a__de="a\n", a__en="x\n", b__de="b\n", b__en="y\n")
    texts = load_split(config(tmp_path, train=["."]), "train")
    assert texts[0].sources == ["a", "b"]
    assert len(merge([*texts, *texts], "twice")) == 4
    (tmp_path / "b.en").unlink()
    with pytest.raises(DataError, match=r"b\.de has no other side"):
        load_split(config(tmp_path, train=["."]), "train")


def test_hub_layout_from_a_local_copy(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "iwslt2017-de-en" / "validation"
    folder.mkdir(parents=True)
    rows = [{"de": "Ja ", "en": "Yes"}, {"de": "Nein", "en": "No"}]
    datasets.Dataset.from_dict({"translation": rows}).to_parquet(str(folder / "0000.parquet"))
    settings = config(tmp_path, hub_id=str(tmp_path), hub_config="iwslt2017-de-en", dev=["validation"])
    (text,) = load_split(settings, "dev")
    assert (text.sources, text.targets) == (["Ja", "Nein"], ["Yes", "No"])
    settings.train = ["train"]
    with pytest.raises(DataError, match=r"cannot read iwslt2017-de-en/train/\*\.parquet .*local copy"):
        load_split(settings, "train")


def test_real_iwslt_files_agree() -> None:
    folder = Path(__file__).resolve().parents[2] / "shared" / "data" / "iwslt17"
    if not folder.is_dir():
        pytest.skip("no IWSLT data here")
    xml = load_split(config(folder / "xml", test=["IWSLT17.TED.tst2010.en-de"]), "test")[0]
    plain = load_split(config(folder, test=["tst2010"]), "test")[0]
    assert len(xml) == len(plain) == 1568
    assert sum(a == b for a, b in zip(xml.sources, plain.sources, strict=True)) > 1500
