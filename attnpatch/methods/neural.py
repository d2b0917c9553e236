"""neural: projections by a two-layer MLP (Zhang 2023, arXiv 2310.11398), and linear: its controls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnpatch.families.base import Site
from attnpatch.methods.base import ProjectVariant
from attnpatch.options import option
from attnpatch.registry import register_variant

PAPER = "Zhang 2023, arXiv 2310.11398"
PAPER_STD = 0.02
ROLES = {"marian": ("query", "key", "output"), "roberta": ("query", "key", "value")}


class NeuralProjection(nn.Module):
    """Linear(d, 2d) -> [LayerNorm(2d) ->] ReLU -> Linear(2d, d), on [..., d].

    Parameters: `up`, `norm` (absent without LayerNorm), `down`.
    """

    def __init__(self, in_features: int, out_features: int, layer_norm: bool) -> None:
        super().__init__()
        width = 2 * out_features
        self.up = nn.Linear(in_features, width)
        self.norm = nn.LayerNorm(width, eps=1e-5) if layer_norm else None
        self.down = nn.Linear(width, out_features)

    def features(self, inputs: Tensor) -> Tensor:
        """The hidden activations [..., 2d] that `down` reads."""
        hidden = self.up(inputs)
        if self.norm is not None:
            hidden = self.norm(hidden)
        return torch.relu(hidden)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.down(self.features(inputs))


class LinearPair(nn.Module):
    """Linear(d, 2d) -> Linear(2d, d): the size of a neural projection without its non-linearity."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.up = nn.Linear(in_features, 2 * out_features)
        self.down = nn.Linear(2 * out_features, out_features)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.down(self.up(inputs))


def init_paper(module: nn.Module) -> None:
    """Fresh N(0, 0.02) weights and zero biases in every linear layer of `module` (the released code's start)."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=PAPER_STD)
            nn.init.zeros_(layer.bias)


@torch.no_grad()
def _mirror(up: nn.Linear, down: nn.Linear, linear: nn.Linear, gain: float = 1.0) -> None:
    """up = [W; -W] and down = gain * [I, -I]: with a ReLU between, relu(z) - relu(-z) = z."""
    size = linear.out_features
    up.weight[:size].copy_(linear.weight)
    torch.neg(linear.weight, out=up.weight[size:])
    if linear.bias is not None:
        up.bias[:size].copy_(linear.bias)
        torch.neg(linear.bias, out=up.bias[size:])
    else:
        up.bias.zero_()
    down.weight.zero_()
    down.weight[:, :size].fill_diagonal_(gain)
    down.weight[:, size:].fill_diagonal_(-gain)
    down.bias.zero_()


def _length(linear: nn.Linear) -> float:
    """Root mean square of the layer's outputs for inputs of unit variance."""
    energy = linear.weight.detach().double().square().sum(dim=1)
    if linear.bias is not None:
        energy = energy + linear.bias.detach().double().square()
    return float(energy.mean().sqrt())


@torch.no_grad()
def _unmirror(up: nn.Linear, down: nn.Linear | None) -> nn.Linear | None:
    """The layer that `_mirror` was given, if nothing changed since; with `down` None, `up` alone is asked."""
    size = up.out_features // 2
    weight, bias = up.weight[:size], up.bias[:size]
    if not torch.equal(weight, -up.weight[size:]) or not torch.equal(bias, -up.bias[size:]):
        return None
    if down is not None:
        identity = torch.eye(size, dtype=down.weight.dtype, device=down.weight.device)
        mirrored = down.weight[0, 0] * torch.cat([identity, -identity], dim=1)
        if not torch.equal(down.weight, mirrored) or bool(down.bias.any()):
            return None
    linear = nn.Linear(up.in_features, size, device=weight.device, dtype=weight.dtype)
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)
    return linear


@dataclass(frozen=True)
class NeuralOptions:
    preset: str = option(
        "roberta",
        "marian: query, key and output, with LayerNorm; roberta: query, key and value, without",
        choices=("marian", "roberta"),
    )
    noise: float = option(
        0.0,
        "standard deviation of noise on the first layer's weights after a preserving init, which moves it off the "
        "symmetric point and makes it approximate",
        check=lambda x: x >= 0,
        rule="zero or more",
    )


@register_variant
class Neural(ProjectVariant):
    """MLP projections on the full model vector, one for each projection and layer."""

    name = "neural"
    summary = "queries, keys and values (or outputs) projected by a two-layer MLP"
    paper = PAPER
    Options = NeuralOptions

    def roles(self, options: NeuralOptions) -> tuple[str, ...]:
        return ROLES[options.preset]

    def build(self, options: NeuralOptions, in_features: int, out_features: int) -> NeuralProjection:
        module = NeuralProjection(in_features, out_features, layer_norm=options.preset == "marian")
        init_paper(module)
        return module

    @torch.no_grad()
    def build_for_preserve(self, options: NeuralOptions, in_features: int, out_features: int) -> NeuralProjection:
        device = torch.get_default_device()
        with torch.device("meta"):
            module = NeuralProjection(in_features, out_features, layer_norm=options.preset == "marian")
        module.to_empty(device=device)
        if module.norm is not None:
            module.norm.reset_parameters()
        return module

    @torch.no_grad()
    def preserve(self, module: nn.Module, linear: nn.Linear, options: NeuralOptions) -> None:
        """Exact without LayerNorm. With it, LN([z; -z]) = [z; -z] / rms(z): the direction of z is kept, and its
        length replaced by the one it has on average when the inputs have unit variance. Calibration does better.
        """
        if not isinstance(module, NeuralProjection):
            raise TypeError(f"expected a NeuralProjection, got {type(module).__name__}")
        gain = 1.0
        if module.norm is not None and linear.weight.device.type != "meta":
            gain = _length(linear)
        _mirror(module.up, module.down, linear, gain)
        if options.noise > 0:
            module.up.weight.add_(torch.randn_like(module.up.weight), alpha=options.noise)

    def preserves(self, options: NeuralOptions) -> bool:
        return options.preset == "roberta" and options.noise == 0

    def recover(self, module: nn.Module, options: NeuralOptions, init: str) -> nn.Linear | None:
        if not isinstance(module, NeuralProjection):
            return None
        norm = module.norm
        if norm is not None and (not bool((norm.weight == 1).all()) or bool(norm.bias.any())):
            return None
        # Calibration fits `down` and leaves `up` as it was; training breaks the mirror of `up`, as each half
        # sees other inputs through the ReLU.
        if init == "calibrate":
            return _unmirror(module.up, None)
        linear = _unmirror(module.up, module.down)
        if linear is None:
            return None
        # Weight decay without a gradient scales both layers and keeps the mirror; the gain tells.
        gain = torch.tensor(_length(linear) if norm is not None else 1.0, dtype=module.down.weight.dtype)
        return linear if torch.equal(module.down.weight[0, 0].cpu(), gain) else None

    def features(self, module: nn.Module, inputs: Tensor) -> Tensor:
        return module.features(inputs)  # type: ignore[operator]

    def last_linear(self, module: nn.Module) -> nn.Linear:
        return module.down  # type: ignore[return-value]

    def flops(self, options: NeuralOptions, site: Site, tokens: int) -> int:
        stock, mlp = 2 * site.embed_dim**2, 8 * site.embed_dim**2
        return len(self.roles(options)) * tokens * (mlp - stock)


@dataclass(frozen=True)
class LinearOptions:
    form: str = option(
        "reinit",
        "reinit: one linear layer, re-initialised (the paper's baseline); matched: Linear(d, 2d) -> Linear(2d, d), "
        "a neural projection's size without its ReLU and LayerNorm",
        choices=("reinit", "matched"),
    )
    preset: str = option(
        "roberta",
        "which projections: marian is query, key and output; roberta is query, key and value",
        choices=("marian", "roberta"),
    )


@register_variant
class Linear(ProjectVariant):
    """The controls of `neural`: what is new about it without its non-linearity. Use it with init="paper"."""

    name = "linear"
    summary = "the controls of neural: re-initialised linear layers, or linear ones of neural's size"
    paper = PAPER
    Options = LinearOptions

    def roles(self, options: LinearOptions) -> tuple[str, ...]:
        return ROLES[options.preset]

    def build(self, options: LinearOptions, in_features: int, out_features: int) -> nn.Module:
        module: nn.Module
        if options.form == "reinit":
            module = nn.Linear(in_features, out_features)
        else:
            module = LinearPair(in_features, out_features)
        init_paper(module)
        return module

    @torch.no_grad()
    def preserve(self, module: nn.Module, linear: nn.Linear, options: LinearOptions) -> None:
        if isinstance(module, LinearPair):
            # [W; -W] then [I, -I] / 2: the same mirrored start as neural's, exact without its ReLU.
            _mirror(module.up, module.down, linear, gain=0.5)
        elif isinstance(module, nn.Linear):
            module.weight.copy_(linear.weight)
            if linear.bias is not None:
                module.bias.copy_(linear.bias)
            else:
                module.bias.zero_()

    def preserves(self, options: LinearOptions) -> bool:
        return True

    def recover(self, module: nn.Module, options: LinearOptions, init: str) -> nn.Linear | None:
        # Whether a single linear layer was trained cannot be seen. Without a ReLU the halves of `up` stay mirrored
        # in training, but not so `down`.
        if not isinstance(module, LinearPair) or module.down.weight[0, 0].item() != 0.5:
            return None
        return _unmirror(module.up, module.down)

    def flops(self, options: Any, site: Site, tokens: int) -> int:
        if options.form == "reinit":
            return 0
        return len(self.roles(options)) * tokens * 6 * site.embed_dim**2
