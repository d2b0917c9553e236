"""What the demo shows: the table on the screen, table.md, results.json and the plot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from attnpatch import figures
from attnpatch.atomic import write_json, write_text

if TYPE_CHECKING:
    from attnpatch.demo.run import DemoResult, Row

WIDTH = 120
CONSOLE = Console(soft_wrap=True)
TITLE = "Synthetic German-English (built-in grammar)"
HEADINGS = (
    "variant",
    "stage",
    "parameters\nadded",
    "logit\ndrift",
    "BLEU\nbefore",
    "BLEU\nafter",
    "chrF\nafter",
    "tokens/s",
    "seconds",
)
"""Before and after training on; tokens a second of that training, source and target; seconds of the whole row."""


def write_report(result: DemoResult, out: Path) -> None:
    """Prints the table and the summary, and writes the files into `out`."""
    console = Console(width=None if CONSOLE.is_terminal else WIDTH)
    table = Table(title=f"{TITLE}: {_updates(result)}", title_justify="left")
    for index, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if index < 2 else "right", no_wrap=index == 0)
    for row in result.rows:
        table.add_row(*_cells(row), style="bold red" if row.changed else None)
    console.print()
    console.print(table)
    for line in (_signatures(result), result.summary):
        console.print(line, markup=False, highlight=False)
    write_text(out / "table.md", _markdown(result))
    write_plot(result, out)
    write_json(out / "results.json", result.to_dict(), default=str)
    console.print(
        f"{result.seconds:.0f} s in all. Written to {out}: results.json, table.md, bleu.png, bleu.svg",
        markup=False,
        highlight=False,
    )


def _updates(result: DemoResult) -> str:
    return f"BLEU before and after {result.config.further.updates} further updates"


def _cells(row: Row) -> list[str]:
    if row.drift is None:
        drift = "-"
    else:
        drift = f"{row.drift:.1e}" + (" CHANGED" if row.changed else " ok" if row.must_be_unchanged else "")
    return [
        row.variant,
        ", ".join(row.stages) or "-",
        f"{row.parameters_added:+,}" if row.stages else "-",
        drift,
        f"{row.before['bleu']:.1f}",
        f"{row.after['bleu']:.1f}" if row.after else "-",
        f"{row.after['chrf']:.1f}" if row.after else "-",
        f"{row.tokens_per_second:,.0f}" if row.tokens_per_second else "-",
        f"{row.seconds:.1f}",
    ]


def _signatures(result: DemoResult) -> str:
    scores = result.rows[0].before
    return (
        f"{scores['sentences']} synthetic test sentences; BLEU: {scores['bleu_signature']}; "
        f"chrF: {scores['chrf_signature']}. Logit drift: the largest change by the conversion, computed in "
        "float64; ok where there must be none but rounding, and is none. A row without scores after training on is for "
        "inference only."
    )


def _markdown(result: DemoResult) -> str:
    lines = [f"# {TITLE}: {_updates(result)}", ""]
    lines.append("| " + " | ".join(HEADINGS).replace("\n", " ") + " |")
    lines.append("|" + "".join(" --- |" if index < 2 else " ---: |" for index in range(len(HEADINGS))))
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in result.rows]
    return "\n".join([*lines, "", _signatures(result), "", result.summary, ""])


def write_plot(result: DemoResult, out: Path) -> None:
    """bleu.png and bleu.svg: a pair of bars for each variant, and the stock baseline as a line."""
    pyplot = figures.pyplot()
    from matplotlib.patches import Patch

    rows = result.rows
    places = range(len(rows))
    figure, axes = pyplot.subplots(figsize=(9, 0.52 * len(rows) + 2), layout="constrained")
    colors = {"before": "#b8c4d6", "after": "#2f6db3"}
    axes.barh([at - 0.19 for at in places], [row.before["bleu"] for row in rows], 0.36, color=colors["before"])
    for at, row in zip(places, rows, strict=True):
        _label(axes, row.before["bleu"], at - 0.19, f"{row.before['bleu']:.1f}")
        if row.after is None:
            _label(axes, 0, at + 0.19, "inference only, not trained on")
        else:
            axes.barh(at + 0.19, row.after["bleu"], 0.36, color=colors["after"])
            _label(axes, row.after["bleu"], at + 0.19, f"{row.after['bleu']:.1f}")
    baseline = rows[0].after or rows[0].before
    line = axes.axvline(baseline["bleu"], color="#c0392b", linestyle="--", linewidth=1.2, zorder=0)
    axes.set_yticks(list(places), [row.variant for row in rows])
    axes.invert_yaxis()
    highest = max(score["bleu"] for row in rows for score in (row.before, row.after) if score)
    axes.set_xlim(0, max(1.12 * highest, 1.0))
    axes.set_xlabel(f"BLEU on {rows[0].before['sentences']} synthetic test sentences (sacreBLEU)")
    updates = result.config.further.updates
    figure.suptitle(
        f"Synthetic German-English corpus: BLEU right after conversion and after {updates} further updates\n"
        "(a tiny Marian, one seed: no ranking of methods)",
        fontsize=11,
        x=0.01,
        horizontalalignment="left",
    )
    patches: list[Any] = [Patch(color=color) for color in colors.values()]
    axes.legend(
        [*patches, line],
        ["right after conversion", f"after {updates} updates", f"stock after {updates} updates"],
        loc="upper center",
        bbox_to_anchor=(0.4, -0.09),
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    figures.plain(axes)
    figures.save(figure, out / "bleu")


def _label(axes: Any, score: float, at: float, text: str) -> None:
    axes.annotate(text, (score, at), (3, 0), textcoords="offset points", va="center", fontsize=8)
