"""`attnpatch report`: runs of any experiment, grouped by variant, compared with stock; tables and figures."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from attnpatch import figures, pages
from attnpatch.atomic import write_json, write_text
from attnpatch.errors import nearest, one_line
from attnpatch.experiments.classification.metrics import draw_reliability, pooled
from attnpatch.experiments.sequences import report as sequences_report
from attnpatch.experiments.value_aware import report as value_aware_report
from attnpatch.reports import bootstrap, conversions
from attnpatch.reports.bootstrap import Bootstrap
from attnpatch.reports.records import STOCK, Metric, ReportError, Run, find_results, group, load_runs, metrics_of
from attnpatch.reports.statistics import TEST, Comparison, compare, summary

MANY_METRICS = 12
"""Beyond so many, or where there is a table of all cells, only the first has its own; all are in report.json."""


@dataclass(frozen=True)
class Details:
    """A table and a figure that an experiment has beside its scores, of the runs of a section."""

    heading: str
    figure: str  # what its file's name ends with
    table: Callable[[Any], list[str]]
    draw: Callable[[Any, Path], Any]
    collect: Callable[[Sequence[Run]], Any]  # what these two are given


def _grids(runs: Sequence[Run]) -> dict[str, list[Any]]:
    grids: dict[str, list[Any]] = {}
    for run in sorted(runs, key=lambda run: not run.is_stock):
        if run.details:
            grids.setdefault(run.label, []).extend(run.details)
    return grids


def _details(runs: Sequence[Run]) -> list[Any]:
    return [detail for run in runs for detail in run.details]


DETAILS = {
    "sequences": Details("Accuracy, cell by cell", "accuracy", sequences_report.table, sequences_report.draw, _grids),
    "value_aware": Details(
        "Against the number of keys, r", "sweep", value_aware_report.tables, value_aware_report.draw, _details
    ),
    "conversion": Details("What each conversion does", "drift", conversions.table, conversions.draw, _details),
}
"""By the first word of an experiment's name."""


@dataclass
class Row:
    """A variant under one metric."""

    variant: str
    parameters: int | None
    seeds: list[int | None]
    values: list[float]
    mean: float
    deviation: float | None
    baseline: str | None
    against: Comparison | None
    same_settings: bool = True  # of variant and baseline
    bootstrap: list[Bootstrap] = field(default_factory=list)  # of BLEU, by seed


@dataclass
class Section:
    """An experiment on one kind of data: its runs, and a table for each metric."""

    experiment: str
    runs: list[Run]
    tables: dict[Metric, list[Row]]
    figures: list[str]

    @property
    def slug(self) -> str:
        """For file names and links."""
        return re.sub(r"[^\w.-]+", "-", self.experiment).strip("-")

    def table_name(self, metric: Metric | str) -> str:
        """Under which the metric's table stands in report.json, and is asked for by a page."""
        return f"{self.experiment} / {metric}"

    @property
    def details(self) -> tuple[Details, Any] | None:
        """How to show what the runs have beside their scores, and that."""
        details = DETAILS.get(self.runs[0].experiment.split()[0])
        shown = details.collect(self.runs) if details is not None else None
        return (details, shown) if details is not None and shown else None

    @property
    def notes(self) -> list[str]:
        """What a reader has to know about the runs."""
        found = []
        for name in ("processor", "precision", "torch", "transformers"):
            values = sorted({run.environment.get(name, "unknown") for run in self.runs})
            if len(values) > 1:
                found.append(f"The runs differ in {name}: {'; '.join(values)}.")
        if not any(run.is_stock for run in self.runs):
            found.append("There is no stock run, so nothing to compare with.")
        return found


def write_report(paths: Iterable[str | Path], output: str | Path, page: str | Path | None = None) -> dict[str, Any]:
    """Reads results files (or folders of them) and writes report.md, report.json and figures into `output`.

    Args:
        page: a Markdown page whose tables are to be written anew, those between `<!-- table EXPERIMENT / METRIC -->`
            and `<!-- end -->`, with the names of report.md; the metric `details` is a grid's or a sweep's own table.
    Returns:
        What stands in report.json.
    Raises:
        ReportError: files are broken or must not be compared; the page cannot be read, has a marker that is not
            closed, or names a table that there is not. Then nothing is written.
    """
    files = find_results(paths)
    experiments = group(load_runs(files))
    out = Path(output)
    sections = []
    for name, runs in experiments.items():
        tables = {metric: _rows(runs, metric) for metric in metrics_of(runs)}
        for metric, rows in tables.items():
            if metric.name == "bleu":
                _bootstrap(runs, metric, rows)
        sections.append(Section(name, runs, tables, []))
    shown = {name: table for section in sections for name, table in _tables(section).items()}
    text = None if page is None else _filled(Path(page), shown)
    for section in sections:
        section.figures = _draw(section, out)
    document = {
        "test": TEST,
        "bootstrap": bootstrap.TEST,
        "files": [str(path) for path in files],
        "experiments": {section.experiment: _to_dict(section) for section in sections},
        "tables": shown,
    }
    write_text(out / "report.md", _markdown(sections, shown))
    write_json(out / "report.json", document, default=str)
    if page is not None and text is not None:
        write_text(Path(page).resolve(), text)
    return document


def _filled(page: Path, tables: Mapping[str, str]) -> str:
    """The page's text with its tables."""

    def table(name: str) -> str:
        if name not in tables:
            guess = nearest(name, list(tables))
            hint = f"; did you mean {guess!r}?" if guess else "."
            raise ReportError(f"the page {page} asks for {name!r}, which is no table{hint} All are in report.json")
        return tables[name]

    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"the page {page} cannot be read: {one_line(error)}") from error
    return pages.filled(text, table, ReportError, "EXPERIMENT / METRIC")


def _tables(section: Section) -> dict[str, str]:
    """The section's tables as Markdown, by "EXPERIMENT / METRIC"."""
    found = {str(metric): [*_table(rows), "", *_bootstrap_table(rows)] for metric, rows in section.tables.items()}
    if section.details is not None:
        details, shown = section.details
        found["details"] = details.table(shown)
    return {section.table_name(name): "\n".join(lines).rstrip() + "\n" for name, lines in found.items()}


def _rows(runs: Sequence[Run], metric: Metric) -> list[Row]:
    """Stock first, then in the order of the files."""
    labels = sorted(dict.fromkeys(run.label for run in runs), key=lambda label: not label.startswith(STOCK))
    by_label = {label: [r for r in runs if r.label == label and metric in r.scores] for label in labels}
    rows = []
    for label, members in by_label.items():
        if not members:
            continue
        scores = {run.seed: run.scores[metric] for run in members}
        mean, deviation, _ = summary(scores)
        base, same = _baseline(members[0], by_label)
        against = None
        if base is not None:
            stock = {run.seed: run.scores[metric] for run in by_label[base] if run.seed is not None}
            own = {seed: value for seed, value in scores.items() if seed is not None}
            against = compare(own, stock, metric.higher_is_better)
        parameters = members[0].parameters
        rows.append(Row(label, parameters, list(scores), list(scores.values()), mean, deviation, base, against, same))
    return rows


def _baseline(run: Run, by_label: dict[str, list[Run]]) -> tuple[str | None, bool]:
    """The stock runs with the same settings, or else those with the usual ones; and whether they are the same."""
    if run.is_stock and run.label == STOCK:
        return None, True
    suffix = run.label.removeprefix(run.variant)
    for label in (STOCK + suffix, STOCK):
        if by_label.get(label) and label != run.label:
            return label, label == STOCK + suffix
    return None, run.is_stock


def _bootstrap(runs: Sequence[Run], metric: Metric, rows: Sequence[Row]) -> None:
    """Fills the rows' `bootstrap`, where both runs of a seed kept BLEU's counts."""
    kept: dict[tuple[str, int | None], bootstrap.Rows] = {}
    for run in runs:
        if metric.test in run.statistics:
            kept[run.label, run.seed] = bootstrap.load(run.statistics[metric.test], run.scores[metric])
    for base, seed in [key for key in kept if key[0].startswith(STOCK)]:
        rivals = {row.variant: row for row in rows if row.baseline == base and (row.variant, seed) in kept}
        if rivals:
            found = bootstrap.compare_systems(kept[base, seed], {name: kept[name, seed] for name in rivals}, seed)
            for name, result in found.items():
                rivals[name].bootstrap.append(result)


def _to_dict(section: Section) -> dict[str, Any]:
    return {
        "notes": section.notes,
        "figures": section.figures,
        "data": section.runs[0].data,
        "runs": [
            {
                "path": run.path,
                "variant": run.label,
                "seed": run.seed,
                "parameters": run.parameters,
                "scores": {str(metric): value for metric, value in run.scores.items()},
                **run.environment,
            }
            for run in section.runs
        ],
        "metrics": {
            str(metric): {"higher_is_better": metric.higher_is_better, "rows": [asdict(row) for row in rows]}
            for metric, rows in section.tables.items()
        },
    }


# ---- text ----


def _markdown(sections: Sequence[Section], shown: Mapping[str, str]) -> str:
    lines = ["# Report", ""]
    lines += [
        f"Against stock: {TEST}; n is the number of seeds, the standard deviation is that of a sample (n - 1), and p "
        "is not corrected for the number of comparisons.",
        "",
    ]
    if len({section.runs[0].experiment for section in sections}) < len(sections):
        lines += [
            "Sections of one experiment are on other data, from other checkpoints, or measured otherwise: they "
            "are not compared.",
            "",
        ]
    for section in sections:
        lines += [f"## {section.experiment}", ""]
        for split, sums in section.runs[0].data.items():
            if len(sums) <= 6:
                lines.append(f"- {split} data (SHA-256): {', '.join(value[:12] for value in sums) or 'none'}")
            else:
                lines.append(f"- {split} data: {len(sums)} sets, checksums in report.json")
        lines += [f"- {note}" for note in section.notes] + [""]
        metrics = list(section.tables)
        few = metrics[:1] if len(metrics) > MANY_METRICS or section.details is not None else metrics
        for metric in few:
            arrow = "higher" if metric.higher_is_better else "lower"
            lines += [f"### {metric} ({arrow} is better)", "", shown[section.table_name(metric)]]
        if len(few) < len(metrics):
            lines += [f"{len(metrics) - len(few)} more metrics are in report.json.", ""]
        if section.details is not None:
            lines += [f"### {section.details[0].heading}", "", shown[section.table_name("details")]]
        lines += [f"![{name}]({name}.png)" for name in section.figures] + [""]
    return "\n".join(lines)


def _table(rows: Sequence[Row]) -> list[str]:
    headings = ("variant", "parameters", "n", "mean", "sd", "difference to stock", "better in", "p")
    lines = ["| " + " | ".join(headings) + " |", "| --- " + "| ---: " * (len(headings) - 1) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(_cells(row)) + " |")
    # One sentence for each thing to know, with all rows that it is about.
    notes: dict[str, list[str]] = {}
    for row in rows:
        for note in _row_notes(row):
            notes.setdefault(note, []).append(row.variant)
    return [*lines, "", *(f"- {', '.join(names)}: {note}." for note, names in notes.items())] if notes else lines


def _row_notes(row: Row) -> list[str]:
    notes = []
    if row.baseline is None and row.variant != STOCK:
        notes.append("no stock run to compare with")
    elif row.baseline is not None and not row.same_settings:
        other = "compared" if row.variant.startswith(STOCK) else "no stock run has the same settings, so it is compared"
        notes.append(f"{other} with {row.baseline}, which has other settings")
    if row.baseline is not None and row.against is None and row.seeds != [None]:
        notes.append(f"no seed in common with {row.baseline}")
    if row.against is not None and row.against.reason:
        notes.append(row.against.reason)
    return notes


def _bootstrap_table(rows: Sequence[Row]) -> list[str]:
    found = [(row, result) for row in rows for result in row.bootstrap]
    if not found:
        return []
    first = found[0][1]
    lines = [
        f"Within each seed, {bootstrap.TEST}: {first.samples:,} resamples of {first.sentences:,} sentences, random "
        f"seed {first.random_seed}. It says how far the choice of test sentences explains a difference, and nothing of "
        "other training seeds.",
        "",
        "| variant | seed | difference to stock | p (bootstrap) |",
        "| --- | ---: | ---: | ---: |",
    ]
    lines += [f"| {row.variant} | {result.seed} | {result.difference:+.2f} | {result.p:.3f} |" for row, result in found]
    return [*lines, ""]


def _cells(row: Row) -> list[str]:
    cells = [
        row.variant,
        "-" if row.parameters is None else f"{row.parameters:,}",
        str(len(row.values)),
        f"{row.mean:.4g}",
        "-" if row.deviation is None else f"{row.deviation:.2g}",
    ]
    against = row.against
    if against is None:
        return [*cells, "-", "-", "-"]
    p = "no test" if against.p is None else f"{against.p:.3g} (n={len(against.seeds)})"
    return [*cells, f"{against.mean:+.3g}", f"{against.better} of {len(against.seeds)}", p]


# ---- figures ----


def _draw(section: Section, out: Path) -> list[str]:
    names = []
    if section.details is not None:
        details, shown = section.details
        names.append(f"{section.slug}-{details.figure}")
        details.draw(shown, out / names[-1])
    for kind in ("dev loss", "training loss"):
        if any(run.curves.get(kind) for run in section.runs):
            name = f"{section.slug}-{kind.replace(' ', '-')}"
            _curves(section, kind, out / name)
            names.append(name)
    diagrams = _reliability(section)
    if diagrams:
        name = f"{section.slug}-reliability"
        draw_reliability(diagrams, out / name, f"{section.experiment}, dev set")
        names.append(name)
    metric, rows = next(iter(section.tables.items()))
    if any(row.parameters is not None for row in rows):
        name = f"{section.slug}-parameters"
        _against_parameters(metric, rows, out / name)
        names.append(name)
    return names


def _reliability(section: Section) -> dict[str, list[dict[str, Any]]]:
    """The diagram of each variant, over all its seeds."""
    labels = [row.variant for row in next(iter(section.tables.values()))]
    members = {label: [run.reliability for run in section.runs if run.label == label] for label in labels}
    return {f"{label} (n={len(found)})": pooled(found) for label, found in members.items() if all(found)}


def _look(section_labels: Sequence[str]) -> dict[str, tuple[str, str]]:
    return {
        label: (figures.COLORS[i % len(figures.COLORS)], figures.MARKERS[i % len(figures.MARKERS)])
        for i, label in enumerate(section_labels)
    }


def _curves(section: Section, kind: str, stem: Path) -> None:
    """The mean over those seeds that have a step; of several, a band from their lowest to their highest."""
    figure, axes = figures.pyplot().subplots(figsize=(7.2, 4.2), layout="constrained")
    labels = [row.variant for row in next(iter(section.tables.values()))]
    banded = False
    for label, (color, _) in _look(labels).items():
        members = [run.curves[kind] for run in section.runs if run.label == label and run.curves.get(kind)]
        if not members:
            continue
        by_step: dict[float, list[float]] = {}
        for points in members:
            for step, loss in points:
                by_step.setdefault(step, []).append(loss)
        steps = sorted(step for step, values in by_step.items() if len(values) == len(members))
        values = [by_step[step] for step in steps]
        marker = "." if len(steps) < 12 else None
        means = [statistics.fmean(losses) for losses in values]
        axes.plot(steps, means, color=color, linewidth=1.6, marker=marker, label=f"{label} (n={len(members)})")
        if len(members) > 1:
            banded = True
            axes.fill_between(steps, list(map(min, values)), list(map(max, values)), color=color, alpha=0.2, lw=0)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(kind)
    axes.set_title(section.experiment + (": mean and range over seeds" if banded else ""), fontsize=10)
    figures.plain(axes)
    _legend(figure, axes)
    figures.save(figure, stem)


def _legend(figure: Any, axes: Any) -> None:
    """Below the axes, where it hides nothing: in two columns when the labels are short."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 1 if max(map(len, labels), default=0) > 45 else 2
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def _against_parameters(metric: Metric, rows: Sequence[Row], stem: Path) -> None:
    figure, axes = figures.pyplot().subplots(figsize=(7.2, 4.2), layout="constrained")
    for (label, (color, marker)), row in zip(_look([row.variant for row in rows]).items(), rows, strict=True):
        if row.parameters is None:
            continue
        axes.errorbar(
            row.parameters / 1e6,
            row.mean,
            yerr=row.deviation,
            color=color,
            marker=marker,
            capsize=3,
            linestyle="none",
            label=f"{label} (n={len(row.values)})",
        )
    axes.set_xlabel("trainable parameters (millions)")
    axes.set_ylabel(f"{metric} ({'higher' if metric.higher_is_better else 'lower'} is better)")
    if any(row.deviation is not None for row in rows):
        axes.set_title("mean and standard deviation over seeds", fontsize=10)
    figures.plain(axes)
    _legend(figure, axes)
    figures.save(figure, stem)
