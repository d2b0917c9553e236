"""What value_aware costs: the exact optimum against scipy's non-negative least squares, the selectors against SDPA.

exact      queries a second of the oracle at r = D + 1 (D = 64, 256 keys, float64), against a loop of
           scipy.optimize.nnls on the same problems; random values, softmax scores of several sharpnesses
selectors  attention with top_r and the practical selectors at r = 32, forward and backward, against
           F.scaled_dot_product_attention at T = 512
"""

from __future__ import annotations

from typing import Any

from attnpatch.bench.timing import BenchmarkError, Settings, check_close, compare, peak_bytes

HEAD_DIM, KEYS, QUERIES = 64, 256, 256
PEER_QUERIES = 64


def exact(settings: Settings) -> dict[str, Any]:
    import numpy as np
    import torch
    from scipy.optimize import nnls

    from attnpatch.functional import value_aware_weights

    heads = 8 if settings.device == "cpu" else 512
    results: dict[str, Any] = {
        "peer": f"a loop of scipy.optimize.nnls over {PEER_QUERIES} of the same queries, on one CPU thread",
        "queries": heads * QUERIES,
    }
    for sharpness in (0.5, 1.0, 2.0, 4.0):
        query, key, value = (torch.randn(1, heads, n, HEAD_DIM, dtype=torch.float64) for n in (QUERIES, KEYS, KEYS))
        weights = torch.softmax(query @ key.mT * HEAD_DIM**-0.5 * sharpness, -1)
        rows, values = weights[0, 0, :PEER_QUERIES].numpy(), value[0, 0].numpy()
        design = np.vstack([values.T, np.ones(KEYS)])
        targets = np.concatenate([rows @ values, np.ones((PEER_QUERIES, 1))], axis=1)
        weights, value = weights.to(settings.device), value.to(settings.device)

        def ours(weights: Any = weights, value: Any = value) -> Any:
            return value_aware_weights(weights, value, HEAD_DIM + 1)

        def peer(design: Any = design, targets: Any = targets) -> Any:
            return [nnls(design, target)[0] for target in targets]

        sparse = ours()
        if int((sparse > 0).sum(-1).max()) > HEAD_DIM + 1 or bool((sparse < 0).any()):
            raise BenchmarkError("more than D + 1 keys, or a negative weight: nothing was timed")
        error = check_close("the output", sparse @ value, weights @ value, 1e-12)
        residual = max(float(np.abs(design @ b - t).max()) for b, t in zip(peer(), targets, strict=True))
        timed = compare(ours, peer, settings.repeats, settings.device, PEER_QUERIES / (heads * QUERIES))
        results[f"sharpness {sharpness}"] = timed | {
            "relative_error": error,
            "peer_residual": residual,
            "queries_per_second": heads * QUERIES / timed["seconds"]["median"],
            "peer_queries_per_second": heads * QUERIES / timed["peer_seconds"]["median"],
        }
        settings.say(f"sharpness {sharpness}: {timed['speedup']['median']:.1f} times the peer's queries a second")
    return results


def selectors(settings: Settings) -> dict[str, Any]:
    import torch
    import torch.nn.functional as F

    from attnpatch.functional import top_r_attention, value_aware_attention

    tokens, r = 512, 32
    shape = (2, 12, tokens, HEAD_DIM)
    query, key, value = (torch.randn(shape, device=settings.device).requires_grad_() for _ in range(3))
    forms: dict[str, Any] = {"top_r": lambda n: top_r_attention(query, key, value, r=n)}
    for name in ("norm", "centered"):
        forms[name] = lambda n, name=name: value_aware_attention(query, key, value, r=n, selector=name)

    def step(output: Any) -> None:
        torch.autograd.grad(output.sum(), (query, key, value))

    def peer() -> None:
        step(F.scaled_dot_product_attention(query, key, value))

    results: dict[str, Any] = {"peer": "F.scaled_dot_product_attention, forward and backward", "shape": shape, "r": r}
    for name, form in forms.items():
        check_close(name, form(tokens), F.scaled_dot_product_attention(query, key, value), 1e-5)

        def ours(form: Any = form) -> None:
            step(form(r))

        timed = compare(ours, peer, settings.repeats, settings.device)
        results[name] = timed | {"peak_bytes": peak_bytes(ours, settings.device)}
        settings.say(f"{name}: {timed['ratio']['median']:.2f} times SDPA")
    results["peer_peak_bytes"] = peak_bytes(peer, settings.device)
    return results


PARTS = {"exact": exact, "selectors": selectors}
