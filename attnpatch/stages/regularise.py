"""Stage 5, regularise: a loss on query and key that is added in training. Stock: none.

The losses of one forward pass wait in slots, one for each attention module, until the model's output hook
adds them to `outputs.loss` or `attnpatch.auxiliary_loss` reads them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class RegulariseStage(nn.Module):
    """Gives a training loss. Subclasses set `weight` and override `forward`."""

    weight: float

    def forward(self, query: Tensor, key: Tensor, key_valid: Tensor | None) -> Tensor:
        """query [B, H, T, D], key [B, H, S, D], key_valid [B, S] (True: no padding) -> scalar loss, unweighted."""
        raise NotImplementedError(f"{type(self).__name__} must define forward()")


class LossSlot:
    """Where an attention module leaves the weighted loss of its latest forward pass.

    A tensor that belongs to a graph can be neither copied nor pickled, so the slot is empty after both.
    """

    def __init__(self) -> None:
        self.loss: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LossSlot:
        return LossSlot()

    def __getstate__(self) -> dict[str, None]:
        return {"loss": None}
