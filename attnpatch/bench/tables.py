"""The results as tables: for a terminal, as Markdown, and in a page between markers.

A page holds `<!-- table [DEVICE:]BENCHMARK.PART -->` and `<!-- end -->`; what stands between is replaced by the part's
table. `summary` is the table of the targets; without a device it is the CPU's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnpatch import pages
from attnpatch.bench.targets import aim_text, inverse, summarise
from attnpatch.bench.timing import BenchmarkError
from attnpatch.errors import one_line, unknown

if TYPE_CHECKING:
    from rich.table import Table

DEVICES = ("cpu", "cuda")
_RATES = ("value_aware.exact", "training.marian")
"""Parts whose tables show the peer's time over ours: times the peer's rate."""
_METRICS = {
    "ratio": "",
    "time_ratio": "",
    "memory": "memory",
    "peer_memory": "the peer's memory",
    "time_ratio_over_flops_ratio": "over the ratio of the FLOPs",
}
_NOT_SHOWN = ("measured", "processor_time", "seconds", "peer_seconds", "speedup", "per_second", "check")
_ROW_KEYS = {"score.operator": 2, "score.causal": 2, "toolkit.convert": 1, "layer.attention": 1, "generation.marian": 1}
"""How many of the keys that lead to a number name its row; the others name its column. All, where it is not said."""
_COLUMN_FIRST = ("toolkit.step",)
"""Parts whose results are {column: {row: ...}}."""


def load(folder: Path, device: str) -> dict[str, dict[str, Any]]:
    """{benchmark: {part: results}} of the files in `folder`.

    Raises:
        BenchmarkError: one is damaged.
    """
    from attnpatch.bench import BENCHMARKS

    paths = {name: folder / f"{name}-{device}.json" for name in BENCHMARKS}
    return {name: read(path) for name, path in paths.items() if path.is_file()}


def held_against_aims(folder: Path, device: str) -> list[dict[str, Any]]:
    """`targets.summarise` of the files in `folder`, with those of a GPU run on a GPU.

    Raises:
        BenchmarkError: one is damaged.
    """
    gpu_run = folder / f"gpu-{device}.json"
    return summarise(load(folder, device), device, read(gpu_run) if gpu_run.is_file() else None)


def read(path: Path) -> dict[str, Any]:
    """{part: results} of a file that `bench.run` wrote.

    Raises:
        BenchmarkError: it is no JSON, or not of that form.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, and of UTF-8
        raise BenchmarkError(f"{path} is no JSON ({one_line(error)}): delete it and measure again") from error
    if not isinstance(results, dict) or not all(isinstance(part, dict) for part in results.values()):
        raise BenchmarkError(f"{path} holds no benchmark's parts by name: delete it and measure again")
    return results


def _spread(value: Mapping[str, float]) -> str:
    digits = 2 if value["median"] < 100 else 0
    if value.get("n", 2) < 2:
        return f"{value['median']:.{digits}f} (n = 1)"
    return f"{value['median']:.{digits}f} ({value['min']:.{digits}f} to {value['max']:.{digits}f})"


def _cells(
    tree: Mapping[str, Any], rate: bool, path: tuple[str, ...] = (), metric: str | None = None
) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """(keys, metric, text) of every ratio."""
    for key, value in tree.items():
        if key in _NOT_SHOWN or isinstance(value, str):
            continue
        inside = key if metric is None and key in _METRICS else metric
        here = path if key in (inside, "variants") else (*path, key)
        if isinstance(value, Mapping) and "median" not in value:
            yield from _cells(value, rate, here, inside)
        elif inside is not None and isinstance(value, Mapping):
            yield here, inside, _spread(inverse(value) if rate else value)
        elif inside is not None and isinstance(value, int | float) and "sdpa" not in path:
            yield here, inside, f"{value:.2f}"


def part_table(name: str, results: Mapping[str, Any]) -> list[list[str]]:
    """Header and rows of a part's ratios (median, min to max): times, and peaks of memory."""
    table: dict[str, dict[str, str]] = {}
    columns: dict[str, None] = {}
    for keys, metric, text in _cells(results, name in _RATES):
        if name in _COLUMN_FIRST:
            keys = keys[::-1]
        depth = 1 if name in _COLUMN_FIRST else _ROW_KEYS.get(name, len(keys))
        words = [re.sub(r"^both\b", "forward + backward", key) for key in keys[depth:]]
        words += [_METRICS[metric]] if _METRICS[metric] else []
        column = ": ".join(words) or ("times the peer's rate" if name in _RATES else "time over the peer's")
        table.setdefault(", ".join(keys[:depth]) or "all", {})[column] = text
        columns[column] = None
    return [["", *columns], *([row, *(cells.get(c, "") for c in columns)] for row, cells in table.items())]


def summary_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Header and rows of the targets, as `summarise` gives them."""
    table = [["target", "peer", "of", "measured", "aim", "reached"]]
    for row in rows:
        measured = _spread(row["measured"]) if row["measured"] else "not measured"
        case = f"; worst: {row['case']}" if row["case"] else ""
        reached = {True: "yes", False: "no", None: "-"}[row["reached"]]
        unit = row["unit"] + ("" if row["rate"] else " over the peer's")
        table.append([row["target"], row["peer"], unit, measured + case, aim_text(row["aim"]), reached])
    return table


def markdown(table: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]]) + "\n"


def measured_line(results: Mapping[str, Any]) -> str:
    """When, with which code and how a part was measured, as a line; nothing where its results do not say."""
    about = results.get("measured", {})
    kind = next((kind for kind in ("commit", "attnpatch") if kind in about), None)
    threads, repeats = about.get("threads"), about.get("repeats")
    words = (
        f"Measured {about['date']}" if "date" in about else None,
        f"{kind} {about[kind]}" if kind else None,
        f"{threads} thread{'s' * (threads != 1)}" if threads else None,
        f"{repeats} repeat{'s' * (repeats != 1)}" if repeats else None,
    )
    return f"\n{', '.join(word for word in words if word)}.\n" if words[0] else ""


def of_devices(folder: Path) -> dict[str, dict[str, str]]:
    """{device: `all_tables`} for `filled`.

    Raises:
        BenchmarkError: the folder has no results of any device.
    """
    if not any(load(folder, device) or (folder / f"gpu-{device}.json").is_file() for device in DEVICES):
        raise BenchmarkError(f"{folder} has no results of a benchmark; --output names their folder")
    return {device: all_tables(folder, device) for device in DEVICES}


def all_tables(folder: Path, device: str) -> dict[str, str]:
    """{"summary" or "benchmark.part": Markdown} of everything that was measured."""
    results = load(folder, device)
    tables = {"summary": markdown(summary_table(held_against_aims(folder, device)))}
    for benchmark, parts in results.items():
        for part, found in parts.items():
            table = part_table(f"{benchmark}.{part}", found)
            if len(table) > 1:
                tables[f"{benchmark}.{part}"] = markdown(table) + measured_line(found)
    return tables


def write(folder: Path, device: str) -> list[Path]:
    """Write summary-DEVICE.json and tables-DEVICE.md beside the results."""
    from attnpatch.atomic import write_json, write_text

    summary, tables = folder / f"summary-{device}.json", folder / f"tables-{device}.md"
    write_json(summary, {"device": device, "targets": held_against_aims(folder, device)})
    parts = all_tables(folder, device).items()
    write_text(tables, "\n".join(f"## {name}\n\n{table}" for name, table in parts))
    return [summary, tables]


def filled(page: str, tables: Mapping[str, Mapping[str, str]]) -> str:
    """`page` with its tables written anew; a part without results says so.

    Args:
        tables: {device: {name: Markdown}}, as `of_devices` gives them.

    Raises:
        BenchmarkError: it has no marker, one that is not closed, or one of no device or benchmark.
    """
    known = _known()

    def table(marker: str) -> str:
        device, _, name = marker.rpartition(":")
        if device and device not in DEVICES:
            raise BenchmarkError(unknown("device", device, DEVICES))
        if name not in known:
            raise BenchmarkError(unknown("table", name, known))
        return tables.get(device or "cpu", {}).get(name, "Not measured yet.\n")

    return pages.filled(page, table, BenchmarkError, "[DEVICE:]NAME")


def _known() -> set[str]:
    from attnpatch.bench import BENCHMARKS, parts_of

    return {"summary", *(f"{name}.{part}" for name in BENCHMARKS for part in parts_of(name))}


def terminal(rows: list[dict[str, Any]]) -> Table:
    """The targets for a terminal."""
    from rich import box
    from rich.table import Table

    header, *body = summary_table(rows)
    table = Table(*header, box=box.SIMPLE, pad_edge=False)
    colours = {"yes": "green", "no": "bold red", "-": "dim"}
    for row in body:
        table.add_row(*row[:-1], f"[{colours[row[-1]]}]{row[-1]}[/]")
    return table
