"""The `attnpatch` command: variants, convert, inspect, verify, revert, report, bench, bench-gpu, env.

Exit codes: 0 done; 1 a check of `verify` or `bench-gpu` failed; 2 bad input; 3 a fault of attnpatch itself; 130
interrupted; 143 terminated. Everything heavy is imported by the command that needs it, so that --help is quick.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

BAD_INPUT, FAULT, INTERRUPTED, TERMINATED = 2, 3, 130, 143

app = typer.Typer(
    name="attnpatch",
    help="Swap the attention of BERT, RoBERTa and Marian checkpoints for published variants, check it, and undo it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the hub.")]


@app.callback()
def _globals(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks, and what transformers has to say.")] = False,
    plugin: Annotated[
        list[str] | None,
        typer.Option("--plugin", metavar="MODULE", help="Import a module that registers families or variants."),
    ] = None,
) -> None:
    if debug:
        import logging

        logging.basicConfig(level=logging.INFO)
        from transformers.utils import logging as hf_logging

        hf_logging.set_verbosity_debug()
    if plugin:
        from attnpatch.registry import import_plugin

        for name in plugin:
            import_plugin(name)


# --- commands ---------------------------------------------------------------------------------------------------


@app.command()
def variants(as_json: AsJson = False) -> None:
    """List the variants with their stages and options."""
    from attnpatch.options import describe_options
    from attnpatch.registry import variants as registered

    found = registered()
    if as_json:
        _print_json(
            [
                {
                    "name": name,
                    "stage": v.stage,
                    "summary": v.summary,
                    "paper": v.paper,
                    "sites": list(v.site_kinds),
                    "options": describe_options(v.Options),
                }
                for name, v in found.items()
            ]
        )
        return
    table = _table("stage", "variant", "what it is", "options (with their defaults)")
    for name, v in found.items():
        options = "\n".join(f"{o['name']}={_plain(o['default'])}: {o['doc']}" for o in describe_options(v.Options))
        table.add_row(v.stage, name, f"{v.summary}\n{v.paper}", options or "none")
    _out().print(table)


@app.command()
def convert(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Folder or hub id of the checkpoint.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    variant: Annotated[str | None, typer.Option("--variant", help="Such as neural or neural+expressive.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="VARIANT.OPTION=VALUE", help="An option, such as neural.preset=marian."),
    ] = None,
    spec: Annotated[Path | None, typer.Option("--spec", help="YAML file with the spec, instead of --variant.")] = None,
    layers: Annotated[str | None, typer.Option("--layers", help="Such as 0-5 or 0,2; all if left out.")] = None,
    sites: Annotated[str | None, typer.Option("--sites", help="Of encoder, decoder and cross, by commas.")] = None,
    init: Annotated[str | None, typer.Option("--init", help="preserve (default), paper or calibrate.")] = None,
    calibration_text: Annotated[
        Path | None, typer.Option("--calibration-text", help="Text for --init calibrate, a sentence a line.")
    ] = None,
    calibration_target: Annotated[
        Path | None, typer.Option("--calibration-target", help="Its translation, for Marian; else the text itself.")
    ] = None,
    revision: Revision = None,
    seed: Annotated[int, typer.Option("--seed", help="Of new random parameters.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace DST if it holds a checkpoint.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a patched copy of a checkpoint, and say what changed."""
    wanted = _spec_from(variant, settings or [], spec)
    with _progress(as_json) as tell:
        from attnpatch.checkpoint import convert as run

        report = run(
            src,
            dst,
            wanted,
            init,
            layers,
            sites,
            calibration_text=calibration_text,
            calibration_target=calibration_target,
            force=force,
            seed=seed,
            revision=revision,
            progress=tell,
        )
    if as_json:
        _print_json(report.to_dict())
        return
    table = _table("module", "site", "stage", "change", "parameters")
    for change in report.patch.changes:
        swap = f"{change.replaced} -> {change.variant}"
        table.add_row(change.path, change.site, change.stage, swap, f"{change.parameters_added:+,}")
    out = _out()
    out.print(table)
    # The report's text without its table of modules.
    text = str(report).splitlines()
    out.print("\n".join(text[len(report.patch.changes) + 1 :]), highlight=False, markup=False, soft_wrap=True)


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(metavar="DIR", help="Checkpoint to look at.")],
    checksums: Annotated[bool, typer.Option(help="Check the weights against their checksums.")] = True,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint is, and what is patched in it."""
    from attnpatch.checkpoint import inspect as run

    info = run(path, revision=revision, checksums=checksums)
    if as_json:
        _print_json(info.to_dict())
        return
    out = _out()
    facts = _table("", "")
    counts = info.parameters
    exact = {True: "yes", False: "no", None: "unknown"}[info.exact]
    rows = [
        ("model", f"{', '.join(info.architectures) or info.model_type} (family {info.family})"),
        ("weights", info.dtype),
        ("spec", info.spec),
        ("init", info.init or "-"),
        ("source", info.source or "-"),
        ("same function as its source", exact if info.record else "-"),
        ("parameters", f"{counts['now']:,} (stock {counts['stock']:,}, {counts['added']:+,})"),
        ("written by", ", ".join(f"{k} {v}" for k, v in info.versions.items()) or "-"),
    ]
    if info.drift:
        rows.append(("drift when converted", f"max {info.drift['max']:.2e}, mean {info.drift['mean']:.2e}"))
    for name, value in rows:
        facts.add_row(name, value)
    sites = _table("attention", "site", "layer", "heads x dim", "project", "score", "select", "aggregate", "regularise")
    for row in info.sites:
        stages = [row["stages"].get(stage, "-") for stage in ("project", "score", "select", "aggregate", "regularise")]
        sites.add_row(row["path"], row["site"], str(row["layer"]), f"{row['heads']} x {row['head_dim']}", *stages)
    weights = _table("file", "bytes", "tensors", "checksum")
    for name, about in info.files.items():
        weights.add_row(name, f"{about['bytes']:,}", str(about["tensors"]), about["checksum"])
    for table in (facts, sites, weights):
        out.print(table)
    for what, keys in (("lacks", info.missing), ("has, against its spec,", info.unexpected)):
        if keys:
            out.print(f"The checkpoint {what} {len(keys)} attention tensors: {', '.join(keys[:3])} ...", markup=False)


@app.command()
def verify(
    path: Annotated[str, typer.Argument(metavar="DIR", help="Checkpoint to check.")],
    against: Annotated[str | None, typer.Option("--against", metavar="SRC", help="Its source, for the drift.")] = None,
    revision: Revision = None,
    against_revision: Annotated[
        str | None, typer.Option("--against-revision", help="Branch, tag or commit of SRC on the hub.")
    ] = None,
    tolerance: Annotated[float | None, typer.Option("--tolerance", help="Largest drift allowed in float32.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the random inputs.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Check a checkpoint; exit code 1 when a check fails."""
    with _progress(as_json) as tell:
        from attnpatch.verification import verify as run

        report = run(
            path,
            against,
            revision=revision,
            against_revision=against_revision,
            seed=seed,
            tolerance=tolerance,
            progress=tell,
        )
    if as_json:
        _print_json(report.to_dict())
    else:
        table = _table("check", "result", "value", "limit", "")
        colours = {"passed": "green", "failed": "bold red", "skipped": "dim", "measured": "cyan"}
        for check in report.checks:
            value = "" if check.value is None else f"{check.value:.2e}"
            limit = "" if check.limit is None else f"{check.limit:.0e}"
            result = f"[{colours[check.status]}]{check.status}[/]"
            table.add_row(check.name, result, value, limit, _escape(check.detail))
        _out().print(table)
        _out().print("all checks passed" if report.passed else "[bold red]FAILED[/]")
    if not report.passed:
        raise typer.Exit(1)


@app.command()
def revert(
    path: Annotated[str, typer.Argument(metavar="DIR", help="Patched checkpoint.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Folder for the stock checkpoint.")],
    source: Annotated[
        str | None, typer.Option("--source", metavar="SRC", help="Where it came from, for projections that are gone.")
    ] = None,
    revision: Revision = None,
    source_revision: Annotated[
        str | None, typer.Option("--source-revision", help="Branch, tag or commit of SRC on the hub.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace DST if it holds a checkpoint.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the stock checkpoint that a patched one came from."""
    with _progress(as_json) as tell:
        from attnpatch.checkpoint import revert as run

        report = run(
            path,
            dst,
            source=source,
            revision=revision,
            source_revision=source_revision,
            force=force,
            progress=tell,
        )
    if as_json:
        _print_json(report.to_dict())
    else:
        _out().print(str(report), highlight=False, markup=False, soft_wrap=True)


@app.command()
def report(
    results: Annotated[list[str], typer.Argument(metavar="RESULTS...", help="results.json files, or folders of them.")],
    output: Annotated[Path, typer.Option("--output", help="Folder for report.md, report.json and figures.")] = Path(
        "report"
    ),
    page: Annotated[
        Path | None, typer.Option("--markdown", metavar="PAGE", help="Write the tables of this page anew as well.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare training runs: means over seeds, paired tests against stock, figures."""
    from attnpatch.reports.report import write_report
    from attnpatch.training.extra import REPORT, require

    require(REPORT)
    found = write_report(results, output, page)
    if as_json:
        _print_json(found)
        return
    for name, about in found["experiments"].items():
        _out().print(f"{name}: {len(about['runs'])} runs", highlight=False)
    _out().print(f"written: {output / 'report.md'}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Benchmarks, or parts such as toolkit.convert; else all but four."),
    ] = None,
    repeats: Annotated[int | None, typer.Option("--repeats", min=1, help="Of each pair that is timed; 5.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="On a CPU; all if not given.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu (default) or cuda.")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder with Multi30k, for training; else synthetic text.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", help="Folder for the JSON files, tables and the plot.")] = Path(
        "results/benchmarks"
    ),
    page: Annotated[
        Path | None,
        typer.Option("--markdown", metavar="PAGE", help="Measure nothing; write the tables of this page anew."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure what attention and training cost here, as ratios against named peers."""
    from attnpatch.bench import Settings, run, tables
    from attnpatch.bench.plot import draw
    from attnpatch.environment import available_cpus
    from attnpatch.errors import SpecError, unknown

    if device not in (None, *tables.DEVICES):
        raise SpecError(unknown("device", device, tables.DEVICES))
    files: list[Path] = []
    if page is not None:
        from attnpatch.atomic import write_text

        given = {"--repeats": repeats, "--threads": threads, "--data": data, "--device": device}
        words = [*(names or ()), *(option for option, value in given.items() if value is not None)]
        if words:
            raise SpecError(
                f"--markdown measures nothing, so {', '.join(words)} cannot go with it; each of the page's markers "
                "says its own device: <!-- table [DEVICE:]NAME -->"
            )
        write_text(page, tables.filled(page.read_text(encoding="utf-8"), tables.of_devices(output)))
        measured = [name for name in tables.DEVICES if tables.load(output, name)]
        files += [page, *(path for name in measured for path in tables.write(output, name))]
        device = measured[0]
    else:
        say = (lambda line: None) if as_json else (lambda line: _out().print(line, highlight=False, markup=False))
        device = device or "cpu"
        settings = Settings(repeats or 5, threads or available_cpus(), device, data, say)
        files += run(names or (), settings, output)
        files += [*tables.write(output, device), *draw(output, device)]
    targets = tables.held_against_aims(output, device)
    if as_json:
        _print_json({"files": [str(path) for path in files], "targets": targets})
        return
    _out().print(tables.terminal(targets))
    for path in files:
        _out().print(f"written: {path}", highlight=False, markup=False, soft_wrap=True)


@app.command("bench-gpu")
def bench_gpu(
    budget_minutes: Annotated[float, typer.Option("--budget-minutes", min=0.1, help="Stop cleanly after these.")] = 8.5,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Of each pair that is timed.")] = 7,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder with Multi30k, for training; else synthetic text.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", help="Folder for gpu-cuda.json.")] = Path("results/benchmarks"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tiny shapes on the CPU: tries the script; measures nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check every kernel on a CUDA device, then measure the most important ratios first, within a time budget."""
    if dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    from attnpatch.bench import gpu, tables
    from attnpatch.bench.timing import BenchmarkError, Settings
    from attnpatch.environment import available_cpus

    def say(line: str) -> None:
        if not as_json:
            _out().print(line, highlight=False, markup=False, soft_wrap=True)

    settings = Settings(1 if dry_run else repeats, available_cpus(), "cpu" if dry_run else "cuda", data, say)
    path, failed = gpu.run(settings, output, budget_minutes, dry_run)
    files = [path] if dry_run else [path, *tables.write(output, "cuda")]
    if not as_json and not dry_run:
        _out().print(tables.terminal(tables.held_against_aims(output, "cuda")))
    for file in files:
        say(f"written: {file}")
    if as_json:
        _print_json({"files": [str(file) for file in files], "failed": failed, "unchecked": "check" in failed})
    if "check" in failed:
        # Not only bad luck with a stage: what was timed after it may be wrong.
        if not as_json:
            print(f"attnpatch: the check failed; the timings are marked unchecked in {path}", file=sys.stderr)
        raise typer.Exit(1)
    if failed and as_json:
        raise typer.Exit(BAD_INPUT)
    if failed:
        raise BenchmarkError(f"these stages failed: {', '.join(failed)}; {path} says how")


@app.command()
def env(as_json: AsJson = False) -> None:
    """Show versions, the machine, families, variants and attention backends: what a bug report needs."""
    from attnpatch.environment import describe

    found = describe()
    if as_json:
        _print_json(found)
        return
    table = _table("", "")
    for name, value in _flat(found):
        table.add_row(name, value)
    _out().print(table)


# --- specs from options -----------------------------------------------------------------------------------------


def _spec_from(variant: str | None, settings: Sequence[str], file: Path | None) -> Any:
    from attnpatch.errors import SpecError

    if (variant is None) == (file is None):
        raise SpecError("give either --variant or --spec: the names of variants, or a YAML file with the spec")
    if file is not None:
        if settings:
            raise SpecError("--set goes with --variant; write the options into the spec file")
        return file
    options: dict[str, dict[str, str]] = {}
    for text in settings:
        where, equals, value = text.partition("=")
        name, dot, key = where.partition(".")
        if not equals or not dot or not name or not key:
            raise SpecError(f"--set has {text!r}; its form is VARIANT.OPTION=VALUE, such as neural.preset=marian")
        options.setdefault(name.strip(), {})[key.strip()] = value.strip()
    return {"variant": variant, "options": options}


# --- output -----------------------------------------------------------------------------------------------------


def _out() -> Console:
    from rich.console import Console

    # Without a terminal nothing knows the width; lines are then left long rather than folded.
    return Console(width=None if sys.stdout.isatty() else 200)


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_header=any(columns), pad_edge=False)
    for i, column in enumerate(columns):
        number = column in ("parameters", "bytes", "tensors", "value", "limit", "layer")
        table.add_column(column, justify="right" if number else "left", overflow="fold", no_wrap=i == 0)
    return table


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=2, default=str) + "\n")


def _plain(value: Any) -> str:
    return "none" if value is None else str(value)


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", ", ".join(map(str, value)) if isinstance(value, list) else _plain(value)


@contextmanager
def _progress(as_json: bool) -> Iterator[Callable[[str, float], None]]:
    """A progress bar on stderr; none without a terminal."""
    if as_json or not sys.stderr.isatty():
        yield lambda what, fraction: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<10}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("start", total=1.0)
        yield lambda what, fraction: bar.update(task, description=what, completed=fraction)


# --- the entry point --------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code. Errors are one sentence on stderr, or JSON on stdout with --json."""
    argv = _hoist(list(sys.argv[1:] if arguments is None else arguments))
    debug, as_json = "--debug" in argv, "--json" in argv
    with _terminable():
        try:
            code = app(args=argv, prog_name="attnpatch", standalone_mode=False)
        except SystemExit as stop:
            code = stop.code
            if code == TERMINATED:
                return _fail("terminated; nothing half-written was left behind", TERMINATED, as_json)
        except (Exception, KeyboardInterrupt) as error:
            if debug:
                traceback.print_exc()
            message, code = _explain(error)
            return _fail(message, code, as_json)
    if code == INTERRUPTED:
        return _fail("interrupted; nothing half-written was left behind", INTERRUPTED, as_json)
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int, as_json: bool) -> int:
    if as_json:
        _print_json({"error": message, "exit_code": code})
    elif message:
        print(f"attnpatch: {message}", file=sys.stderr)
    return code


def _explain(error: BaseException) -> tuple[str, int]:
    """An exception as one sentence, with its exit code."""
    from attnpatch.errors import AttnpatchError, one_line

    if isinstance(error, AttnpatchError):
        return one_line(error), BAD_INPUT
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return "interrupted; nothing half-written was left behind", INTERRUPTED
    if hasattr(error, "format_message"):
        context = getattr(error, "ctx", None)  # of the subcommand, once it is known
        return f"{error.format_message()} (see {context.command_path if context else 'attnpatch'} --help)", BAD_INPUT
    if isinstance(error, BrokenPipeError):
        # Whoever read our output has gone, `head` for instance; nothing is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return "", 1
    if isinstance(error, MemoryError):
        return "not enough memory for this model", BAD_INPUT
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return "no space left on the disk; nothing half-written was left behind", BAD_INPUT
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or one_line(error)}", BAD_INPUT
    hint = "run it again with --debug for the traceback"
    if type(error).__module__.partition(".")[0] in ("transformers", "safetensors", "huggingface_hub", "tokenizers"):
        return f"{one_line(error)} ({hint})", BAD_INPUT
    return f"unexpected {type(error).__name__}: {one_line(error)}; {hint}", FAULT


def _hoist(argv: list[str]) -> list[str]:
    """Global options may stand behind the command, too."""
    front, rest = [], []
    words = iter(argv)
    for word in words:
        if word == "--":
            rest += [word, *words]
        elif word == "--debug" or word.startswith("--plugin="):
            front.append(word)
        elif word == "--plugin":
            front += [word, *[value for value in [next(words, None)] if value is not None]]
        else:
            rest.append(word)
    return front + rest


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind as an exception, so that half-written folders are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: Any) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
