"""What a patch did: every module touched, what took its place, and what that costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Change:
    """One stage of one attention module.

    Attributes:
        path: dotted path of what was replaced (a projection) or added to (the attention module).
        site: encoder, decoder or cross. layer: its number in its stack. stage, variant: what was replaced, by what.
        replaced, replacement: class names.
        parameters_added: new parameters less those they replace.
        flops_added: FLOPs added to a forward pass over `PatchReport.tokens` tokens (for a projection: the
            attention module's share is counted once, on its first projection).
    """

    path: str
    site: str
    layer: int
    stage: str
    variant: str
    replaced: str
    replacement: str
    parameters_added: int
    flops_added: int


@dataclass(frozen=True)
class PatchReport:
    """What `attnpatch.patch` returns; `print` shows it as a table.

    Attributes:
        spec: the resolved spec in words. init: how new parameters were set.
        exact: whether the model computes what it did before, up to rounding.
        changes: one entry for each module touched.
        parameters_before: of the model before the patch. tokens: sequence length that flops_added refers to.
        notes: what a user should know, such as sites that a method is not defined for.
    """

    spec: str
    init: str
    exact: bool
    changes: tuple[Change, ...]
    parameters_before: int
    tokens: int
    notes: tuple[str, ...] = field(default=())

    @property
    def parameters_added(self) -> int:
        return sum(change.parameters_added for change in self.changes)

    @property
    def flops_added(self) -> int:
        return sum(change.flops_added for change in self.changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, with the sums."""
        return {
            **asdict(self),
            "changes": [asdict(change) for change in self.changes],
            "parameters_added": self.parameters_added,
            "flops_added": self.flops_added,
        }

    def __str__(self) -> str:
        rows = [("module", "site", "stage", "variant", "parameters")]
        rows += [
            (c.path, c.site, c.stage, f"{c.replaced} -> {c.variant}", f"{c.parameters_added:+,}") for c in self.changes
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        share = 100 * self.parameters_added / self.parameters_before if self.parameters_before else 0.0
        lines.append(
            f"{self.spec}: {len(self.changes)} changes, {self.parameters_added:+,} parameters ({share:+.1f}%), "
            f"{self.flops_added / 1e6:+,.1f} MFLOPs for {self.tokens} tokens; init {self.init}, "
            f"{'same function as before' if self.exact else 'NOT the same function as before'}"
        )
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)
