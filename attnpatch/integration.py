"""Everything that touches transformers: the attention function, the config's mark, building and loading models.

A few of its methods are wrapped, each once and in the base class, so that every model and Auto class is covered:

    PreTrainedModel.post_init             builds the stages of a model whose config carries a spec
    PreTrainedModel.from_pretrained       turns a stock checkpoint into the patched model that its config asks for,
                                          and refuses missing or unexpected attention weights
    PreTrainedConfig.to_dict, to_diff_dict  write "attn_implementation": "attnpatch" beside a spec, which makes a
                                          transformers that does not know attnpatch stop instead of loading a
                                          stock model with random weights
    PreTrainedConfig._attn_implementation   reads that mark as "no backend chosen"
    PreTrainedConfig.__post_init__,         refuse attn_implementation="attnpatch" where nothing says which variant:
    PreTrainedModel.get_correct_attn_implementation   the model would be stock

A config without `attnpatch` takes the original path in all of them.
"""

from __future__ import annotations

import copy
import functools
import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NoReturn

IMPLEMENTATION = "attnpatch"
"""The name under which the attention function is registered, and the mark in config.json."""


# --- the attention function -----------------------------------------------------------------------------------


class ConfigView:
    """A model's config as its patched attention modules see it: the same, but for the attention function.

    transformers looks the function up by `config._attn_implementation`. The model's own config keeps the
    user's choice ("sdpa", "eager", ...), which decides the form of the mask; it is `backend` here.
    """

    def __init__(self, config: Any) -> None:
        object.__setattr__(self, "_config", config)

    @property
    def _attn_implementation(self) -> str:
        return IMPLEMENTATION

    def shows(self, config: Any) -> bool:
        """Whether this is a view of that very config."""
        return self.__dict__["_config"] is config

    @property
    def backend(self) -> str:
        # The plain form, which torch.compile can trace.
        chosen = self._config._attn_implementation
        return "sdpa" if chosen in (None, IMPLEMENTATION) else str(chosen)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_config" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["_config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_config"], name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return (ConfigView, (self.__dict__["_config"],))

    def __deepcopy__(self, memo: dict[int, Any]) -> ConfigView:
        return ConfigView(copy.deepcopy(self.__dict__["_config"], memo))


def route_through_pipeline(module: Any, off: bool = False) -> None:
    """Make an attention module call `attention_forward` (or, with `off`, what its model's config says)."""
    if off:
        if isinstance(module.config, ConfigView):
            module.config = module.config.__dict__["_config"]
    elif not isinstance(module.config, ConfigView):
        module.config = ConfigView(module.config)


def attention_forward(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """The attention function that transformers calls for patched modules.

    query [B, H, T, D], key and value [B, H, S, D] -> output [B, T, H, D] and weights [B, H, T, S] or None.
    Weights are returned when asked for (`output_attentions`) and with the eager backend.
    """
    pipeline = module.attnpatch
    backend = module.config.backend
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if kwargs.get("cu_seq_lens_q") is not None:
        from attnpatch.errors import PatchError

        raise PatchError("patched attention cannot read sequences packed without padding: pad the batches")
    mask = _dense_mask(attention_mask, query, key, causal, backend)
    pipeline.add_loss(query, key, mask)
    need_weights = bool(kwargs.get("output_attentions")) or backend == "eager"
    if pipeline.has_stock_core and (backend == "eager" or not need_weights):
        stock = _stock_function(module, backend)
        if is_causal is not None:
            kwargs["is_causal"] = is_causal
        result: tuple[Any, Any] = stock(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return result
    output, weights = pipeline(
        query,
        key,
        value,
        mask,
        dropout,
        # As transformers has it: no mask and several queries mean causal, if the module is.
        causal and mask is None and query.shape[2] > 1,
        scaling if scaling is not None else query.shape[-1] ** -0.5,
        need_weights,
    )
    return output.transpose(1, 2).contiguous(), weights


def _stock_function(module: Any, backend: str) -> Callable[..., tuple[Any, Any]]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = None
    for cls in type(module).__mro__:
        eager = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if eager is not None:
            break
    function: Callable[..., tuple[Any, Any]] = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager)
    return function


def _dense_mask(mask: Any, query: Any, key: Any, causal: bool, backend: str) -> Any:
    """Any mask that transformers makes -> None, bool or float, broadcastable to [B, H, T, S].

    sdpa gives bool and eager float [B, 1, T, S]; flash attention gives the padding [B, S]; flex attention a
    BlockMask, which is exact only through its function.
    """
    import torch

    length, keys = query.shape[2], key.shape[2]
    if mask is None:
        if causal and "flash" in backend and 1 < length < keys:
            # Several new tokens on a cache: flash attention aligns them with the last keys, sdpa with the first.
            return torch.ones(length, keys, dtype=torch.bool, device=query.device).tril(keys - length)[None, None]
        return None
    if not isinstance(mask, torch.Tensor):
        from torch.nn.attention.flex_attention import create_mask

        batch = query.shape[0]
        return create_mask(mask.mask_mod, batch, 1, length, keys, device=str(query.device))
    if mask.dim() == 2:
        dense = mask[:, None, None, -keys:].bool()
        if causal and length > 1:
            visible = torch.ones(length, keys, dtype=torch.bool, device=query.device).tril(keys - length)
            dense = dense & visible
        return dense
    if not mask.is_floating_point() and mask.dtype != torch.bool:
        mask = mask.bool()
    return mask[..., :keys]


# --- configs --------------------------------------------------------------------------------------------------


def _mark(serialised: Any) -> Any:
    """Put the mark beside every spec in a serialised config, sub-configs included."""
    if isinstance(serialised, dict):
        if isinstance(serialised.get("attnpatch"), dict):
            serialised["attn_implementation"] = IMPLEMENTATION
        for name, value in serialised.items():
            if name != "attnpatch":
                _mark(value)
    return serialised


def _unmark(value: Any) -> Any:
    if value == IMPLEMENTATION:
        return None
    if isinstance(value, dict):
        return {name: _unmark(inner) for name, inner in value.items()}
    return value


def asks_for_attnpatch(value: Any) -> bool:
    """Whether a value of `attn_implementation`, a mapping for the parts of a model included, names attnpatch."""
    if isinstance(value, dict):
        return any(map(asks_for_attnpatch, value.values()))
    return bool(value == IMPLEMENTATION)


def _carries_spec(config: Any) -> bool:
    """Whether a config or that of a part of its model says which variants are patched in."""
    return any(getattr(part, "attnpatch", None) for part in (config, *vars(config).values()))


def _refuse_stock(what: str) -> NoReturn:
    from attnpatch.errors import SpecError

    raise SpecError(
        f"attn_implementation={IMPLEMENTATION!r} chooses no variant, and {what} is stock: use "
        "attnpatch.patch(model, 'neural'), or from_pretrained(..., config=attnpatch.patch_config(config, 'neural')), "
        "or attnpatch.convert(src, dst, 'neural')"
    )


def _extend_configs(module: ModuleType) -> None:
    cls = module.PreTrainedConfig

    def marking(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        @functools.wraps(original)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
            serialised: dict[str, Any] = _mark(original(self, *args, **kwargs))
            return serialised

        return wrapped

    cls.to_dict = marking(cls.to_dict)
    cls.to_diff_dict = marking(cls.to_diff_dict)
    stock = cls._attn_implementation

    def choose(self: Any, value: Any) -> None:
        # The first time is in its construction, before the spec is there; what follows is a choice of the user.
        if "_attn_implementation_internal" in vars(self) and asks_for_attnpatch(value) and not _carries_spec(self):
            _refuse_stock(f"this {type(self).__name__}")
        stock.fset(self, _unmark(value))

    cls._attn_implementation = property(stock.fget, choose, doc=stock.__doc__)
    stock_post_init = cls.__post_init__

    @functools.wraps(stock_post_init)
    def post_init(self: Any, **kwargs: Any) -> None:
        asked = asks_for_attnpatch(kwargs.get("attn_implementation"))
        stock_post_init(self, **kwargs)
        if asked and not _carries_spec(self):
            _refuse_stock(f"this {type(self).__name__}")

    cls.__post_init__ = post_init


# --- models ---------------------------------------------------------------------------------------------------


def _extend_models(module: ModuleType) -> None:
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    module.AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)

    cls = module.PreTrainedModel
    stock_post_init = cls.post_init
    stock_from_pretrained = cls.from_pretrained.__func__

    @functools.wraps(stock_post_init)
    def post_init(self: Any) -> None:
        if getattr(self.config, "attnpatch", None):
            from attnpatch.patching import build_from_config

            # Before the original, which gives the new layers transformers' own initialisation.
            build_from_config(self)
        elif any(getattr(part, "attnpatch", None) for part in vars(self.config).values()):
            from attnpatch.auxiliary import install_loss_hooks

            # A model made of models (EncoderDecoderModel): theirs are patched, and the loss is this one's.
            install_loss_hooks(self)
        stock_post_init(self)

    @functools.wraps(stock_from_pretrained)
    def from_pretrained(
        cls: Any, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        load = functools.partial(stock_from_pretrained, cls, pretrained_model_name_or_path, *args)
        from attnpatch.loading import load_patched

        return load_patched(load, pretrained_model_name_or_path, config, kwargs)

    stock_choice = cls.get_correct_attn_implementation

    @functools.wraps(stock_choice)
    def get_correct_attn_implementation(self: Any, requested_attention: Any, *args: Any, **kwargs: Any) -> Any:
        if requested_attention == IMPLEMENTATION:
            if not _carries_spec(self.config):
                _refuse_stock(f"this {type(self).__name__}")
            requested_attention = None
        return stock_choice(self, requested_attention, *args, **kwargs)

    cls.post_init = post_init
    cls.get_correct_attn_implementation = get_correct_attn_implementation
    cls.from_pretrained = classmethod(from_pretrained)


# --- PEFT -----------------------------------------------------------------------------------------------------


def _extend_peft(module: ModuleType) -> None:
    cls = module.BaseTuner
    stock_forward = cls.forward

    @functools.wraps(stock_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        from attnpatch.auxiliary import has_loss_hooks

        # PEFT before 0.21 calls the model's `forward`, past the hooks that add the auxiliary loss.
        if has_loss_hooks(self.model):
            return self.model(*args, **kwargs)
        return stock_forward(self, *args, **kwargs)

    cls.forward = forward


# --- installation ---------------------------------------------------------------------------------------------

_EXTENSIONS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.configuration_utils": _extend_configs,
    "transformers.modeling_utils": _extend_models,
    "peft.tuners.tuners_utils": _extend_peft,
}
_installed: set[str] = set()
_lock = threading.RLock()


def install() -> None:
    """Extend transformers: now where its modules are loaded, else at the moment they are.

    Importing them here would cost seconds (torch among them) that a process may never need.
    """
    for name in _EXTENSIONS:
        loaded = sys.modules.get(name)
        if loaded is not None and not getattr(getattr(loaded, "__spec__", None), "_initializing", False):
            _extend(loaded)
    if len(_installed) < len(_EXTENSIONS) and not any(isinstance(f, _AfterImport) for f in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _extend(module: ModuleType) -> None:
    with _lock:
        if module.__name__ not in _installed:
            _EXTENSIONS[module.__name__](module)
            _installed.add(module.__name__)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Runs the extension of a module right after the module's own code."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _EXTENSIONS or fullname in _installed:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                _run_after(spec.loader)
                return spec
        return None


def _run_after(loader: Any) -> None:
    original = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        original(module)
        _extend(module)

    loader.exec_module = exec_module


def spec_of(config: Any) -> Mapping[str, Any] | None:
    """The serialised spec that a config carries, if any."""
    record: Mapping[str, Any] | None = getattr(config, "attnpatch", None)
    return record or None
