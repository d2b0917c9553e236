"""Finds and reads the parallel text of a run: local files of several formats, or a hub data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnpatch.errors import one_line
from attnpatch.experiments.translation.config import DataConfig
from attnpatch.experiments.translation.formats import Side, read_iwslt_xml, read_jsonl, read_tagged, read_text, read_tsv
from attnpatch.training.data_files import missing_file, refuse_doubles
from attnpatch.training.errors import DataError
from attnpatch.training.files import sha256_file, sha256_lines


@dataclass
class ParallelText:
    """Aligned sentences with a record of where they came from.

    `references` are the target sentences as they stand in the file; `targets` may be lower-cased for training.
    """

    name: str
    sources: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    files: list[dict[str, Any]] = field(default_factory=list)  # path, sha256, and pairs
    skipped: int = 0  # pairs dropped because a side was empty
    places: list[tuple[str, int]] = field(default_factory=list)  # of each pair: file of the source, and line in it

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def stem(self) -> str:
        """What the files that are written about it begin with."""
        return Path(self.name).name

    def where(self, pairs: Sequence[int]) -> str:
        """Where pairs stand, in words; the first eight of them."""
        found: dict[str, list[int]] = {}
        for name, line in sorted(self.places[pair] for pair in pairs[:8]):
            found.setdefault(name, []).append(line)
        text = ", ".join(f"{name} line {', '.join(map(str, lines))}" for name, lines in found.items())
        return text + (f" and {len(pairs) - 8} more" if len(pairs) > 8 else "")


def load_split(config: DataConfig, split: str) -> list[ParallelText]:
    """Reads the entries of `config.<split>` (split: train, dev or test), one ParallelText each.

    Raises DataError for missing files, sides of different length, empty lines and bytes that are not UTF-8.
    """
    limit = getattr(config, f"max_{split}_pairs")
    entries = getattr(config, split)
    if not entries and split == "train":
        raise DataError("data.train is empty: name at least one training text")
    load = _load_entry if config.hub_id is None else _load_hub
    texts = [load(config, entry) for entry in entries]
    if split == "test":
        refuse_doubles("data.test", [text.stem for text in texts])
    for text in texts:
        if not len(text):
            raise DataError(f"{text.name}: no sentence pairs in it")
        if limit is not None:
            text.sources, text.targets = text.sources[:limit], text.targets[:limit]
            text.references, text.places = text.references[:limit], text.places[:limit]
    return texts


def merge(texts: Sequence[ParallelText], name: str) -> ParallelText:
    """One text of several."""
    merged = ParallelText(name)
    for text in texts:
        merged.sources += text.sources
        merged.targets += text.targets
        merged.references += text.references
        merged.places += text.places
        merged.files += text.files
        merged.skipped += text.skipped
    return merged


def _load_entry(config: DataConfig, entry: Any) -> ParallelText:
    base = Path(config.dir)
    if isinstance(entry, dict):
        if set(entry) != {"source", "target"}:
            raise DataError(f"data entry {entry!r}: a mapping must have exactly the keys source and target")
        sides = [_read_side(base / str(entry[key])) for key in ("source", "target")]
        return _align(config, Path(str(entry["source"])).name, sides[0], sides[1])
    name = str(entry)
    path = base / name
    suffix = path.suffix.lower()
    if path.is_file():
        return _load_file(config, name, path, suffix)
    if path.is_dir():
        return _load_folder(config, name, path)
    for make in (_plain_name, _xml_name):
        source, target = (make(path, lang) for lang in (config.source_lang, config.target_lang))
        if source.is_file() and target.is_file():
            return _align(config, name, _read_side(source), _read_side(target))
    raise DataError(_missing(config, name, path))


def _plain_name(stem: Path, lang: str) -> Path:
    return stem.with_name(f"{stem.name}.{lang}")


def _xml_name(stem: Path, lang: str) -> Path:
    return stem.with_name(f"{stem.name}.{lang}.xml")


def _missing(config: DataConfig, name: str, path: Path) -> str:
    wanted = [_plain_name(path, config.source_lang), _plain_name(path, config.target_lang)]
    absent = [str(p) for p in wanted if not p.is_file()]
    message = (
        f"data entry {name!r} not found: missing {' and '.join(absent)} (also allowed: {name}.{config.source_lang}.xml "
        f"with {name}.{config.target_lang}.xml, a .tsv or .jsonl file, or a folder)"
    )
    return missing_file(config.dir, message, Path(absent[0]), config.about, wanted)


def _read_side(path: Path) -> Side:
    if not path.is_file():
        raise DataError(f"no file {path}")
    if path.suffix.lower() == ".xml":
        return read_iwslt_xml(path)
    if path.name.startswith("train.tags."):
        return read_tagged(path)
    return read_text(path)


def _load_file(config: DataConfig, name: str, path: Path, suffix: str) -> ParallelText:
    source, target = config.source_column, config.target_column
    if suffix in (".jsonl", ".json", ".ndjson"):
        sides = read_jsonl(path, str(source or config.source_lang), str(target or config.target_lang))
    elif suffix in (".tsv", ".tab"):
        if config.header:
            sides = read_tsv(
                path,
                config.source_lang if source is None else source,
                config.target_lang if target is None else target,
                True,
            )
        else:
            sides = read_tsv(path, 0 if source is None else source, 1 if target is None else target, False)
    elif source is not None and target is not None:  # columns were asked for: tab-separated under another name
        sides = read_tsv(path, source, target, config.header)
    else:
        raise DataError(
            f"{path}: a single file must be .tsv or .jsonl (or set data.source_column and data.target_column for "
            "tab-separated text under another name); for two aligned files give their common stem"
        )
    return _align(config, name, *sides)


def _load_folder(config: DataConfig, name: str, folder: Path) -> ParallelText:
    stems = []
    for end in (f".{config.source_lang}", f".{config.source_lang}.xml"):
        other = end.replace(config.source_lang, config.target_lang, 1)
        for path in sorted(folder.glob(f"*{end}")):
            stem = path.name.removesuffix(end)
            if not (folder / f"{stem}{other}").is_file():
                raise DataError(f"{path} has no other side: {folder / (stem + other)} is missing")
            stems.append((path, folder / f"{stem}{other}"))
    if not stems:
        raise DataError(
            f"the folder {folder} holds no pair of files *.{config.source_lang} and *.{config.target_lang} "
            "(or the same with .xml)"
        )
    return merge([_align(config, a.name, _read_side(a), _read_side(b)) for a, b in stems], name)


def _align(config: DataConfig, name: str, source: Side, target: Side) -> ParallelText:
    if len(source.sentences) != len(target.sentences):
        short, long = sorted((source, target), key=lambda side: len(side.sentences))
        line = long.lines[len(short.sentences)]
        at = f", line {line}," if line else ""
        raise DataError(
            f"the sides differ in length: {source.path} has {len(source.sentences)} sentences and {target.path} has "
            f"{len(target.sentences)}; {long.path}{at} is the first without a partner"
        )
    text = ParallelText(name)
    for i, (a, b) in enumerate(zip(source.sentences, target.sentences, strict=True)):
        if not a or not b:
            side = target if a else source
            if config.on_empty == "error":
                raise DataError(
                    f"{side.path}, line {side.lines[i]}: empty sentence; mend the file, or set data.on_empty=skip to "
                    "leave such pairs out"
                )
            text.skipped += 1
            continue
        text.sources.append(a.lower() if config.lowercase else a)
        text.targets.append(b.lower() if config.lowercase else b)
        text.references.append(b)
        text.places.append((source.path.name, source.lines[i] or i + 1))
    paths = dict.fromkeys((source.path, target.path))
    text.files = [{"path": str(path), "sha256": sha256_file(path), "pairs": len(text)} for path in paths]
    return text


def _load_hub(config: DataConfig, entry: Any) -> ParallelText:
    """Reads `{hub_config}/{entry}/*.parquet`: data set scripts are refused by datasets >= 4, the hub's parquet
    conversion of the same data is not."""
    import datasets

    hub_split = str(entry)
    folder = f"{config.hub_config}/" if config.hub_config else ""
    pattern = f"{folder}{hub_split}/*.parquet"
    local = Path(str(config.hub_id)).is_dir()
    revision = None if local else config.hub_revision
    name = f"{config.hub_id}:{config.hub_config or 'default'}:{hub_split}"
    try:
        data = datasets.load_dataset(
            str(config.hub_id), data_files={hub_split: pattern}, revision=revision, split=hub_split
        )
    except Exception as error:
        reason = one_line(error, 300)
        raise DataError(
            f"cannot read {pattern} of the hub data set {config.hub_id} (revision {revision}): {reason}; without a "
            "network, use a local copy: unset data.hub_id and give data.dir and data.train"
        ) from error
    text = ParallelText(name)
    languages = (config.source_lang, config.target_lang)
    for number, row in enumerate(data, 1):
        pair = row.get("translation", row)
        if any(not isinstance(pair.get(lang), str) for lang in languages):
            raise DataError(f"{name}, row {number}: no text for {' and '.join(languages)}; it has {', '.join(pair)}")
        a, b = (" ".join(pair[lang].split()) for lang in languages)
        if not a or not b:
            if config.on_empty == "error":
                raise DataError(f"{name}, row {number}: empty sentence; set data.on_empty=skip to leave such pairs out")
            text.skipped += 1
            continue
        text.sources.append(a.lower() if config.lowercase else a)
        text.targets.append(b.lower() if config.lowercase else b)
        text.references.append(b)
        text.places.append((name, number))
    digest = sha256_lines(line for pair in zip(text.sources, text.references, strict=True) for line in pair)
    text.files = [{"path": name, "revision": revision, "sha256": digest, "pairs": len(text)}]
    return text
