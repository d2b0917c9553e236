"""init="calibrate": fit the last layer of each new projection on activations of the stock model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnpatch.errors import SpecError

if TYPE_CHECKING:
    from attnpatch.methods.base import ProjectVariant

RIDGE = 1e-2
"""Ridge strength, relative to the mean squared feature.

Mirrored features are nearly dependent: with 1e-6 the fit was no better (a small Marian's loss on other text 3.35 either
way, stock 3.32), but its weights were six times as large, and training at usual rates destroyed the model first.
"""


@dataclass(frozen=True)
class CalibrationPair:
    """A stock layer, its replacement, the variant that made it, and where it is: kind of site and role."""

    stock: nn.Linear
    new: nn.Module
    variant: ProjectVariant
    site: str
    role: str


def _mask_name(pair: CalibrationPair, batch: Mapping[str, Any]) -> str:
    """Which of a forward pass's masks belongs to what the layer reads."""
    reads_source = pair.site == "cross" and pair.role in ("key", "value")
    if "decoder_input_ids" in batch or "decoder_attention_mask" in batch:
        return "attention_mask" if pair.site == "encoder" or reads_source else "decoder_attention_mask"
    return "encoder_attention_mask" if reads_source else "attention_mask"


class _Normal:
    """Sums for the regression of y on [h, 1]: both in float64, as the Gram matrix squares the condition number."""

    def __init__(self) -> None:
        self.gram: Tensor | None = None
        self.cross: Tensor | None = None
        self.energy = 0.0
        self.rows = 0

    def add(self, features: Tensor, targets: Tensor) -> None:
        h = features.double()
        h = torch.cat([h, torch.ones_like(h[:, :1])], dim=1)
        y = targets.double()
        if self.gram is None or self.cross is None:
            self.gram, self.cross = h.T @ h, h.T @ y
        else:
            self.gram += h.T @ h
            self.cross += h.T @ y
        self.energy += float(y.square().sum())
        self.rows += h.shape[0]

    def solve(self, ridge: float) -> tuple[Tensor, float]:
        """Weights [width + 1, out], last row the bias, and the relative error left."""
        if self.gram is None or self.cross is None:
            raise SpecError("the calibration data reached no projection")
        penalty = ridge * self.gram.diagonal().mean() * torch.eye(len(self.gram), device=self.gram.device).double()
        penalty[-1, -1] = 0.0
        # Least squares by pseudo-inverse: mirrored or dead features leave the Gram matrix singular.
        solution = torch.linalg.lstsq((self.gram + penalty).cpu(), self.cross.cpu(), driver="gelsd").solution.to(
            self.gram.device
        )
        left = self.energy - 2 * (solution * self.cross).sum() + (solution * (self.gram @ solution)).sum()
        return solution, float((left.clamp(min=0) / max(self.energy, 1e-300)).sqrt())


@torch.no_grad()
def calibrate_projections(
    model: nn.Module,
    pairs: Mapping[str, CalibrationPair],
    batches: Iterable[Mapping[str, Any]],
    ridge: float = RIDGE,
) -> dict[str, float]:
    """Ridge regression of each new projection's last layer onto what its stock layer outputs.

    The stock model runs over `batches`; what the mask of a projection's own side marks as padding is left out. All
    layers are fitted at once, on the stock model's own activations.

    Args:
        model: the stock model, with the layers of `pairs` still in place.
        pairs: by path.
        batches: keyword arguments for the model's forward pass.
        ridge: relative to the mean squared feature.

    Returns:
        Path -> relative error ||fit - target|| / ||target|| on the calibration data.

    Raises:
        SpecError: no data, or fewer rows than features.
    """
    sums = {path: _Normal() for path in pairs}
    current: dict[str, Any] = {}

    def watch(path: str) -> Any:
        pair = pairs[path]

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            inputs, targets = args[0], output
            keep = current.get(_mask_name(pair, current))
            rows = inputs[keep.bool()] if keep is not None else inputs.flatten(0, -2)
            wanted = targets[keep.bool()] if keep is not None else targets.flatten(0, -2)
            sums[path].add(pair.variant.features(pair.new, rows), wanted)

        return pair.stock.register_forward_hook(hook)

    handles = [watch(path) for path in pairs]
    was_training = model.training
    model.eval()
    count = 0
    try:
        for batch in batches:
            current.clear()
            current.update(batch)
            model(**batch)
            count += 1
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    if not count:
        raise SpecError("the calibration data is empty")
    errors = {}
    for path, pair in pairs.items():
        last = pair.variant.last_linear(pair.new)
        if sums[path].rows < last.in_features:
            raise SpecError(
                f"calibration needs at least {last.in_features} tokens for {path}, but the data has "
                f"{sums[path].rows}: give more text"
            )
        solution, errors[path] = sums[path].solve(ridge)
        last.weight.copy_(solution[:-1].T)
        last.bias.copy_(solution[-1])
    return errors
