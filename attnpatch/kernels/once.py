"""Backward passes that cannot be differentiated again, and say so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def differentiable_once(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator of a `torch.autograd.Function.backward` whose gradients cannot be differentiated again.

    torch's `once_differentiable` raises only where the incoming gradient itself depends on something; elsewhere
    the second derivative is silently without this part. This one raises a RuntimeError, which names `what` is
    differentiated, whenever the gradient is taken with create_graph=True.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        once = once_differentiable(backward)

        @functools.wraps(backward)
        def checked(ctx: Any, *gradients: Any) -> Any:
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                raise RuntimeError(f"{what} has no second derivative: take its gradient without create_graph=True")
            return once(ctx, *gradients)

        return checked

    return decorate
