"""The GLUE tasks that are at hand: their labels, metrics, and how their files and hub columns look."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Where label and texts stand in a tab-separated file: names of its header, or numbers from 0 without one."""

    label: str | int
    texts: tuple[str | int, ...]

    @property
    def has_header(self) -> bool:
        return isinstance(self.label, str)

    @property
    def columns(self) -> tuple[str | int, ...]:
        return (self.label, *self.texts)


@dataclass(frozen=True)
class Task:
    """One task of GLUE (Wang et al. 2019), with the metrics that GLUE scores it with.

    `labels` are the classes in the order of their numbers; empty for a regression, whose scores lie in `span`.
    `layouts`: the first whose columns a file's first line names, else the one without a header.
    `train` and `dev` are the files, relative to the data folder, and `hub` the columns of the hub's form.
    """

    name: str
    metrics: tuple[str, ...]
    labels: tuple[str, ...]
    layouts: tuple[Layout, ...]
    train: tuple[str, ...]
    dev: tuple[str, ...]
    hub: Layout
    adversarial: str | None = None  # its key in AdvGLUE's dev.json, and that set's config on the hub: adv_NAME
    span: tuple[float, float] | None = None

    @property
    def is_regression(self) -> bool:
        return not self.labels

    @property
    def outputs(self) -> int:
        """Width of the model's last layer."""
        return len(self.labels) or 1


_PAIR = ("sentence1", "sentence2")

TASKS = {
    task.name: task
    for task in (
        Task(
            "sst2",
            ("accuracy",),
            ("negative", "positive"),
            (Layout("label", ("sentence",)), Layout("label", ("content",))),
            ("SST-2/train.tsv",),
            ("SST-2/dev.tsv",),
            Layout("label", ("sentence",)),
            adversarial="sst2",
        ),
        Task(
            "cola",
            ("matthews",),
            ("unacceptable", "acceptable"),
            (Layout(1, (3,)),),
            ("CoLA/in_domain_train.tsv",),
            # GLUE's dev set is both of them.
            ("CoLA/in_domain_dev.tsv", "CoLA/out_of_domain_dev.tsv"),
            Layout("label", ("sentence",)),
        ),
        Task(
            "rte",
            ("accuracy",),
            ("entailment", "not_entailment"),
            (Layout("label", _PAIR),),
            ("RTE/train.tsv",),
            ("RTE/dev.tsv",),
            Layout("label", _PAIR),
            adversarial="rte",
        ),
        Task(
            "mrpc",
            ("accuracy", "f1"),
            ("not_equivalent", "equivalent"),
            (Layout("Quality", ("#1 String", "#2 String")),),
            ("MRPC/msr_paraphrase_train.txt",),
            # GLUE's dev set is 408 pairs of the training file, by a list that is not part of these files.
            ("MRPC/msr_paraphrase_test.txt",),
            Layout("label", _PAIR),
        ),
        Task(
            "stsb",
            ("pearson", "spearman"),
            (),
            (Layout("score", _PAIR), Layout(4, (5, 6))),
            ("STS-B/train.tsv",),
            ("STS-B/sts-dev.csv",),
            Layout("label", _PAIR),
            span=(0.0, 5.0),
        ),
    )
}
