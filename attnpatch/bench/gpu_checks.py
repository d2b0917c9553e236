"""The Triton kernels against float64 on a GPU, and the compilation of what is timed later.

score        non-softmax attention: output, dq, dk, dv
select       top_r and value_aware attention: the chosen keys, and output, dq, dk, dv given these
query_value  the pairwise sum: output and the gradients of all inputs and parameters
alignment    the losses gan and ct: loss and the gradients of queries, keys and networks

Most of the time is the compiler's, which takes one core a process: the work is given to many. What they compile stays
in Triton's cache. Block sizes are not tuned here, which would take minutes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from attnpatch.bench.timing import BenchmarkError
from attnpatch.kernels.triton_here import TUNE_VARIABLE

HALF, SINGLE = ("bfloat16", "float16"), "float32"
CASES = ("none", "causal", "padding", "range", "causal range", "rows", "one query", "magnitudes", "dropout")
COMPILE = "compile"

Work = tuple[str, tuple[Any, ...], str, bool]
"""What is done, with what, on which device, and whether in the small sizes of a dry run."""


def run(device: str, dry: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, list[str]]]:
    """(what was found in each case, what was compiled, what is wrong by kind); see `CHECKS` for the kinds."""
    from attnpatch.environment import available_cpus

    work: list[Work] = [(kind, case, device, dry) for kind, (cases, _) in CHECKS.items() for case in cases(dry)]
    if dry:
        done = [_done(item) for item in work]
    else:
        work += [(COMPILE, case, device, dry) for case in CALLS]
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(14, available_cpus()), mp_context=spawn) as pool:
            done = list(pool.map(_done, work))
    wrong: dict[str, list[str]] = {kind: [] for kind in CHECKS}
    for (kind, case, *_), found in zip(work, done, strict=True):
        if kind != COMPILE:
            wrong[kind] += _faults(found, 1e-5 if SINGLE in case else 1e-2)
    checked = [found for (kind, *_), found in zip(work, done, strict=True) if kind != COMPILE]
    return checked, [found for (kind, *_), found in zip(work, done, strict=True) if kind == COMPILE], wrong


def _faults(found: dict[str, Any], allowed: float) -> list[str]:
    if "error" in found:
        return [f"{found['case']}: {found['error']}"]
    off = {what: error for what, error in found["errors"].items() if not error <= allowed}
    return (
        [f"{found['case']}: " + ", ".join(f"{what} {e:.1e} > {allowed:.0e}" for what, e in off.items())] if off else []
    )


def _done(work: Work) -> dict[str, Any]:
    """In a process of its own, unless the run is dry."""
    kind, case, device, dry = work
    label = {"case": " ".join(map(str, (kind, *case)))}
    try:
        with untuned():
            if kind != COMPILE:
                return {**label, "errors": CHECKS[kind][1](case, device, dry)}
            COMPILERS[case[0]](*case[1:], device)
            return label
    except Exception as error:
        return {**label, "error": f"{type(error).__name__}: {error}"[:600]}


@contextlib.contextmanager
def untuned() -> Iterator[None]:
    """Within it block sizes are not timed."""
    before = os.environ.get(TUNE_VARIABLE)
    os.environ[TUNE_VARIABLE] = "0"
    try:
        yield
    finally:
        os.environ.pop(TUNE_VARIABLE) if before is None else os.environ.__setitem__(TUNE_VARIABLE, before)


def relative_errors(names: Sequence[str], found: Sequence[Any], wanted: Sequence[Any]) -> dict[str, float]:
    """Of norms."""
    pairs = zip(names, found, wanted, strict=True)
    return {name: float(((a.double() - b).norm() / b.norm().clamp(min=1e-30)).detach()) for name, a, b in pairs}


# --- non-softmax attention ---------------------------------------------------------------------------------------


def cases(dry: bool) -> list[tuple[str, int, int, str, str]]:
    """(kernel, degree, D, dtype, case): everything for D = 64, and what a head size may break for the others."""
    if dry:
        return [("expressive", 2, 16, SINGLE, case) for case in CASES] + [("elu", 2, 20, "bfloat16", "rows")]
    found = [("expressive", 2, 64, dtype, case) for dtype in (*HALF, SINGLE) for case in CASES]
    found += [("expressive", 2, dim, dtype, "rows") for dim in (32, 80, 96, 128) for dtype in (*HALF, SINGLE)]
    found += [("expressive", 2, dim, "bfloat16", "dropout") for dim in (32, 80, 96, 128)]
    others = (("polynomial", 2), ("polynomial", 4), ("elu", 2))
    found += [(*kernel, 64, dtype, "rows") for kernel in others for dtype in ("bfloat16", SINGLE)]
    return found


def check_case(case: tuple[str, int, int, str, str], device: str, dry: bool) -> dict[str, float]:
    """Relative errors of output, dq, dk and dv."""
    import torch

    from attnpatch.kernels import score

    kernel, degree, dim, name, kind = case
    dtype = getattr(torch, name)
    torch.manual_seed(zlib.crc32(repr(case).encode()))  # hash() differs from process to process
    n_queries, n_keys = ((20, 20) if dry else (333, 333)) if "causal" in kind else ((20, 35) if dry else (333, 517))
    n_queries = 1 if kind == "one query" else n_queries
    heads = 1 if dry else 3
    q, k, v, g = (torch.randn(2, heads, n, dim, device=device) for n in (n_queries, n_keys, n_keys, n_queries))
    # Scores of both signs, away from 0: f'/f is unbounded there, and magnifies rounding where few keys are visible.
    q, k = q.abs() + 0.5, (k.abs() + 0.5) * torch.randn(n_keys, 1, device=device).sign()
    # Heads beside features in memory, as models have them.
    q, k, v, g = (x.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, g))
    mask, p = None, 0.3 if kind == "dropout" else 0.0
    if kind in ("padding", "one query"):
        mask = torch.rand(2, 1, 1, n_keys, device=device) < 0.6
    if kind == "range":
        lengths = torch.tensor([n_keys // 3, n_keys - 7], device=device)
        mask = (torch.arange(n_keys, device=device) < lengths[:, None])[:, None, None]
    if kind == "causal range":
        seen_from = torch.arange(n_keys, device=device) >= 3
        mask = seen_from & torch.ones(n_queries, n_keys, device=device, dtype=torch.bool).tril()
    if kind == "magnitudes":
        # Every other query's sum of weights is lost in float32, and computed again in a scale of its own.
        q = q * torch.where(torch.arange(n_queries, device=device) % 2 == 0, 1.0, 1e-15)[:, None].to(dtype)
    if kind == "rows":
        mask = torch.rand(2, heads, n_queries, n_keys, device=device) < 0.5
        mask[0, :, 0] = False
    arguments: dict[str, Any] = {
        "is_causal": kind == "causal",
        "scale": 1.0 / dim,
        "kernel": kernel,
        "degree": degree,
    }
    if p:
        # With the unit matrix for values the output is the weights, which shows what was dropped.
        seen = torch.eye(dim, device=device, dtype=dtype).expand(2, heads, -1, -1)
        k, v = k[:, :, :dim], v[:, :, :dim]
        torch.manual_seed(5)
        shown = score.kernel_attention(q, k, seen, None, p, implementation="triton", **arguments)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.manual_seed(5)
    output = score.kernel_attention(leaves[0], leaves[1], leaves[2], mask, p, implementation="triton", **arguments)
    found = (output, *torch.autograd.grad(output, leaves, g))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    if p:
        weights = score.attention_weights(exact[0], exact[1], **arguments) * (shown != 0) / (1.0 - p)
        kept = float((shown != 0).double().mean())
        if not abs(kept - (1.0 - p)) < 0.02 + 2 * dry:
            raise BenchmarkError(f"{case}: {kept:.3f} of the weights are kept, not {1.0 - p}")
        wanted = weights @ exact[2]
    else:
        wanted = score.kernel_attention(exact[0], exact[1], exact[2], mask, implementation="plain", **arguments)
    expected = (wanted, *torch.autograd.grad(wanted, exact, g.double()))
    return relative_errors(("output", "dq", "dk", "dv"), found, expected)


# --- attention over selected keys --------------------------------------------------------------------------------

SELECT_CASES = ("none", "causal", "padding", "rows", "bias", "dropout")


def select_cases(dry: bool) -> list[tuple[str, str, int, int, int, str, str]]:
    """(criterion, kernel, degree, r, D, dtype, case)."""
    criteria = ("weight", "norm", "centered")
    if dry:
        return [("centered", "softmax", 2, 3, 16, SINGLE, "dropout"), ("norm", "elu", 2, 3, 16, SINGLE, "bias")]
    usual = ("softmax", 2, 16, 64)
    found = [(criterion, *usual, "bfloat16", case) for criterion in criteria for case in SELECT_CASES]
    found += [(criterion, *usual, SINGLE, case) for criterion in criteria for case in ("none", "causal", "rows")]
    found += [(criterion, *usual, "float16", "rows") for criterion in criteria]
    found += [("centered", *usual, dtype, "offset") for dtype in ("bfloat16", SINGLE)]
    for dtype in ("bfloat16", SINGLE):
        for kernel in (("expressive", 2), ("polynomial", 4), ("elu", 2)):
            found.append(("centered", *kernel, 16, 64, dtype, "bias"))
        for r, dim in ((1, 32), (64, 80), (128, 128)):
            found.append(("centered", "softmax", 2, r, dim, dtype, "rows"))
    return found


def check_select(case: tuple[str, str, int, int, int, str, str], device: str, dry: bool) -> dict[str, float]:
    """Relative errors of output, dq, dk and dv given the keys that were chosen.

    Raises:
        BenchmarkError: others score more than these by more than rounding, or they are too few.
    """
    import torch

    from attnpatch.kernels import dispatch, score, select
    from attnpatch.kernels.select_blocked import Rule

    criterion, kernel, degree, r, dim, name, kind = case
    dtype = getattr(torch, name)
    torch.manual_seed(zlib.crc32(repr(case).encode()))
    n_queries, n_keys = ((20, 20) if dry else (333, 333)) if kind == "causal" else ((20, 35) if dry else (333, 517))
    heads = 1 if dry else 3
    q, k, v, g = (torch.randn(2, heads, n, dim, device=device) for n in (n_queries, n_keys, n_keys, n_queries))
    scale = dim**-0.5
    if kernel != "softmax":
        # As in `check_case`.
        scale, sign = 1.0 / dim, torch.randn(n_keys, 1, device=device).sign()
        q, k = q.abs() + 0.5, (k.abs() + 0.5) * sign
    v = v + (16.0 if kind == "offset" else 1.0)
    q, k, v, g = (x.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, g))
    mask: Any = None
    p = 0.3 if kind == "dropout" else 0.0
    if kind == "padding":
        lengths = torch.tensor([n_keys // 3, n_keys - 7], device=device)
        mask = (torch.arange(n_keys, device=device) < lengths[:, None])[:, None, None]
    if kind in ("rows", "bias"):
        mask = torch.rand(2, heads, n_queries, n_keys, device=device) < 0.5
        mask[0, :, 0] = False
    if kind == "bias":
        mask = torch.randn(mask.shape, device=device).masked_fill(~mask, -torch.inf)
    arguments: dict[str, Any] = {"is_causal": kind == "causal", "scale": scale, "kernel": kernel, "degree": degree}

    def attend(query: Any, key: Any, value: Any) -> torch.Tensor:
        torch.manual_seed(5)
        if criterion == "weight":
            return select.top_r_attention(query, key, value, mask, p, r=r, **arguments)
        return select.value_aware_attention(query, key, value, mask, p, r=r, selector=criterion, **arguments)

    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with dispatch.use_implementation("triton"):
        if reason := dispatch.why_not_fused_selection(q, v, r):
            raise BenchmarkError(f"the fused selection does not serve this: {reason}")
        output = attend(*leaves)
        found = (output, *torch.autograd.grad(output, leaves, g))
    rule = Rule(kernel, degree, scale, kind == "causal", r, criterion, 0.0)
    full = None if mask is None else mask.expand(*mask.shape[:-1], n_keys)
    index = dispatch.select_triton.selected_forward(q, k, v, full, None, rule, True)[2].mT.long()
    listed = (index >= 0).double()
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    bias = mask.double() if kind == "bias" else mask
    chosen = torch.zeros(*index.shape[:-1], n_keys, dtype=torch.float64, device=device)
    chosen = chosen.scatter_add(-1, index.clamp(min=0), listed)
    _check_choice(
        case, score.attention_weights(exact[0], exact[1], bias, **arguments).detach(), exact[2].detach(), chosen
    )
    given = bias.masked_fill(chosen == 0, -torch.inf) if kind == "bias" else chosen > 0
    arguments["is_causal"] = False
    weights = score.attention_weights(exact[0], exact[1], given, **arguments)
    if p:
        torch.manual_seed(5)
        kept = torch.empty(*index.mT.shape, dtype=torch.bool, device=device).bernoulli_(1.0 - p)
        weights = weights * torch.zeros_like(weights).scatter_add(-1, index.clamp(min=0), kept.mT * listed) / (1.0 - p)
    wanted = weights @ exact[2]
    expected = (wanted, *torch.autograd.grad(wanted, exact, g.double()))
    if r == 1:
        return relative_errors(("output", "dv"), (found[0], found[3]), (expected[0], expected[3]))  # others are 0
    return relative_errors(("output", "dq", "dk", "dv"), found, expected)


def _check_choice(case: tuple[Any, ...], weights: Any, value: Any, chosen: Any) -> None:
    """That the `chosen` keys (1 for each, [B, H, T, S]) are the r best, by weights and values in float64."""
    import torch

    from attnpatch.kernels.select import _value_scores

    criterion, _, _, r, *_ = case
    rank = weights if criterion == "weight" else _value_scores(weights, value, criterion == "centered")
    # Of weights that float32 does not know.
    possible = weights > 1e-30
    if bool((chosen > 1).any()) or bool((chosen.sum(-1) < possible.sum(-1).clamp(max=r)).any()):
        raise BenchmarkError(f"{case}: a key is chosen twice, or too few are")
    lowest = rank.masked_fill(chosen == 0, torch.inf).amin(-1)
    best_left = rank.masked_fill((chosen > 0) | ~possible, 0.0).amax(-1)
    worse = float(((best_left - lowest) / best_left.clamp(min=1e-30)).amax())
    if not worse <= 1e-4:
        raise BenchmarkError(f"{case}: a key that was not chosen scores more, by {worse:.1e}, than one that was")


# --- the pairwise query-value sum --------------------------------------------------------------------------------


def pairwise_cases(dry: bool) -> list[tuple[str, int, int, int, int, str]]:
    """(phi, heads, queries, keys, D, dtype)."""
    sizes = [(1, 5, 7, 8)] if dry else [(3, 333, 517, 64), (3, 65, 33, 80), (2, 1, 40, 128)]
    return [(phi, *size, SINGLE) for phi in ("product", "tanh") for size in sizes]


def check_pairwise(case: tuple[str, int, int, int, int, str], device: str, dry: bool) -> dict[str, float]:
    """Relative errors of the pairwise form of query_value, output and gradients, against itself in float64."""
    import torch

    from attnpatch.kernels import dispatch
    from attnpatch.kernels.query_value import pairwise_aggregate

    torch.manual_seed(0)
    phi, heads, n_queries, n_keys, dim, _ = case
    shapes: dict[str, tuple[int, ...]] = {"query": (2, heads, n_queries, dim)}
    shapes |= {"weights": (2, heads, n_queries, n_keys)}
    shapes |= {"value": (2, heads, n_keys, dim), "gate_query": (heads, dim, dim), "gate_value": (heads, dim, dim)}
    shapes |= {"gate_bias": (heads, dim), "strength": (heads,)}
    if phi == "tanh":
        shapes |= {"phi_query": (heads, dim, dim), "phi_value": (heads, dim, dim), "phi_bias": (heads, dim)}
    inputs = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    inputs = {name: x / dim**0.5 if x.shape[1:] == (dim, dim) else x for name, x in inputs.items()}
    inputs["weights"] = inputs["weights"].softmax(-1)
    found = []
    # On a CPU the interpreter's kernels are used where they are asked for.
    with dispatch.use_implementation("triton" if dry else "auto"):
        if reason := dispatch.why_not_fused_sum(inputs["weights"].flatten(0, 1), inputs["value"].flatten(0, 1)):
            raise BenchmarkError(f"the fused sum does not serve this: {reason}")
        for exact in (False, True):
            leaves = {name: (x.double() if exact else x).requires_grad_() for name, x in inputs.items()}
            arguments: dict[str, Any] = {**leaves, "phi": phi}
            out = pairwise_aggregate(**arguments)
            grad = torch.linspace(-1.0, 1.0, out.numel(), dtype=out.dtype, device=device).view_as(out)
            found.append((out, *torch.autograd.grad(out, list(leaves.values()), grad)))
    return relative_errors(("output", *inputs), *found)


# --- the alignment losses ----------------------------------------------------------------------------------------


def alignment_cases(dry: bool) -> list[tuple[str, int, int, int, int, str]]:
    """(method, D, hidden size, queries, keys, dtype)."""
    sizes = [(8, 5, 7, 9, SINGLE)] if dry else [(64, 64, 128, 128, "bfloat16"), (64, 64, 100, 77, SINGLE)]
    sizes += [] if dry else [(40, 24, 33, 130, "float16"), (32, 16, 1, 300, SINGLE)]
    return [(method, *size) for method in ("gan", "ct") for size in sizes]


def check_alignment(case: tuple[str, int, int, int, int, str], device: str, dry: bool) -> dict[str, float]:
    """Relative errors of a loss and of all its gradients against those of float64, with padding."""
    import copy

    import torch

    from attnpatch.kernels import alignment_networks as networks
    from attnpatch.kernels import dispatch
    from attnpatch.kernels.alignment import alignment_loss

    torch.manual_seed(0)
    method, dim, hidden, n_queries, n_keys, name = case
    kinds = {"gan": ("Discriminator",), "ct": ("Navigator", "Critic")}[method]
    parts = {kind.lower(): getattr(networks, kind)(dim, hidden).to(device) for kind in kinds}
    query, key = (torch.randn(4, n, 2 if dry else 12, dim, device=device).transpose(1, 2) for n in (n_queries, n_keys))
    query, key = query.to(getattr(torch, name)), key.to(getattr(torch, name))
    masks = [torch.rand(4, n, device=device) < 0.3 for n in (n_keys, n_queries)]
    masks[0][1] = True
    found = []
    with dispatch.use_implementation("triton" if dry else "auto"):
        for part in parts.values():
            if reason := networks.why_not_triton(part, query, key):
                raise BenchmarkError(f"the fused losses do not serve this: {reason}")
        for exact in (False, True):
            q, k = ((x.double() if exact else x).detach().requires_grad_() for x in (query, key))
            used = {kind: copy.deepcopy(part).double() if exact else part for kind, part in parts.items()}
            loss = alignment_loss(q, k, masks[0], method, masks[1], **used)
            inputs = [q, k, *(p for part in used.values() for p in part.parameters())]
            found.append((loss, *torch.autograd.grad(loss, inputs)))
    names = [f"{kind}.{n}" for kind, part in parts.items() for n, _ in part.named_parameters()]
    return relative_errors(("loss", "query", "key", *names), *found)


# --- compilation, and graphs -------------------------------------------------------------------------------------

CHECKS: dict[str, tuple[Callable[[bool], Sequence[tuple[Any, ...]]], Callable[..., dict[str, float]]]] = {
    "score": (cases, check_case),
    "select": (select_cases, check_select),
    "query_value": (pairwise_cases, check_pairwise),
    "alignment": (alignment_cases, check_alignment),
}
"""The cases of each kind of kernel, by whether the run is dry, and their check."""


def _compile_attention(length: int, masked: bool, dropout_p: float, device: str) -> None:
    """Queries and keys of that length."""
    import torch

    from attnpatch.kernels import score

    mask = torch.ones(1, 1, length, length, device=device, dtype=torch.bool) if masked else None
    q, k, v = (torch.randn(1, 2, length, 64, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    output = score.expressive_attention(q, k, v, mask, dropout_p)
    torch.autograd.grad(output.sum(), (q, k, v))


def _compile_selection(criterion: str, length: int, device: str) -> None:
    """In the layout and with the mask and dropout of a model that is trained."""
    import torch

    from attnpatch.kernels import dispatch, select

    x = torch.randn(2, length, 2, 64, device=device, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
    mask = torch.ones(2, 1, length, length, device=device, dtype=torch.bool)
    with dispatch.use_implementation("triton"):
        if criterion == "weight":
            output = select.top_r_attention(x, x, x, mask, 0.1, r=16)
        else:
            output = select.value_aware_attention(x, x, x, mask, 0.1, r=16, selector=criterion)
    torch.autograd.grad(output.sum(), x)


COMPILERS: dict[str, Callable[..., None]] = {"attention": _compile_attention, "selection": _compile_selection}
CALLS: tuple[tuple[Any, ...], ...] = (
    ("attention", 256, False, 0.0),
    ("attention", 2048, False, 0.0),
    ("attention", 256, True, 0.1),
    ("attention", 256, True, 0.0),
    ("selection", "weight", 512),
    ("selection", "centered", 512),
)
"""Kinds of calls that are timed later: one of COMPILERS and its arguments."""


def graph(device: str) -> str:
    """Captured in a CUDA graph, with dropout: each replay drops other weights."""
    import torch

    from attnpatch.functional import expressive_attention

    x = torch.randn(1, 2, 256, 64, device=device, dtype=torch.bfloat16)
    expressive_attention(x, x, x, None, 0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        output = expressive_attention(x, x, x, None, 0.5)
    graph.replay()
    first = output.clone()
    graph.replay()
    if not bool(first.isfinite().all()) or torch.equal(first, output):
        raise BenchmarkError("two replays of a CUDA graph drop the same weights, or are not finite")
    return "captured; replays drop different weights"
