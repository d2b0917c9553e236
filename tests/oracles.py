"""Slow, plain float64 versions of the attention functions: loops and NumPy, from the definitions."""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def strength(kernel: str, score: float, degree: int = 2) -> float:
    """f(z), unnormalised."""
    if kernel == "softmax":
        return math.exp(score)
    if kernel == "expressive":
        return score * score / (1.0 + score * score)
    if kernel == "polynomial":
        return float(score**degree)
    if kernel == "elu":
        return score + 1.0 if score > 0 else math.exp(score)
    raise ValueError(kernel)


def row_weights(kernel: str, scores: Array, log_prior: Array, degree: int = 2) -> Array:
    """Weights of one query; log_prior holds 0 for a visible key, -inf for an excluded one, or a bias."""
    prior = [math.exp(m) if m > -1e4 else 0.0 for m in log_prior]
    mass = [strength(kernel, float(z), degree) * p if p > 0 else 0.0 for z, p in zip(scores, prior, strict=True)]
    if sum(mass) == 0:
        mass = prior
    total = sum(mass)
    return np.array([m / total if total > 0 else 0.0 for m in mass])


def attention_weights(
    query: Array,
    key: Array,
    log_prior: Array | None = None,
    scale: float | None = None,
    kernel: str = "softmax",
    degree: int = 2,
) -> Array:
    """[B, H, T, D], [B, H, S, D], log_prior [B, H, T, S] -> [B, H, T, S], one query at a time."""
    n_batch, n_head, n_query, head_dim = query.shape
    n_key = key.shape[2]
    if scale is None:
        scale = 1.0 if kernel == "expressive" else head_dim**-0.5
    out = np.zeros((n_batch, n_head, n_query, n_key))
    for b, h, t in itertools.product(range(n_batch), range(n_head), range(n_query)):
        scores = np.array([scale * float(query[b, h, t] @ key[b, h, s]) for s in range(n_key)])
        bias = np.zeros(n_key) if log_prior is None else log_prior[b, h, t]
        out[b, h, t] = row_weights(kernel, scores, bias, degree)
    return out


def top_r(weights: Array, r: int, score: Array | None = None) -> Array:
    """One row: the r positive weights of largest score (ties: weight, then lower index), renormalised."""
    score = weights if score is None else score
    order = sorted((j for j in range(len(weights)) if weights[j] > 0), key=lambda j: (-score[j], -weights[j], j))
    out = np.zeros_like(weights)
    out[order[:r]] = weights[order[:r]]
    total = out.sum()
    return out / total if total > 0 else out


def optimal_error(weights: Array, value: Array, r: int) -> float:
    """min ||o - sum beta v|| over beta >= 0, sum 1, at most r positive: every support, every face."""
    target = weights @ value / weights.sum()
    visible = [j for j in range(len(weights)) if weights[j] > 0]
    best = math.inf
    for size in range(1, min(r, len(visible)) + 1):
        for support in itertools.combinations(visible, size):
            # Least squares in the affine hull; where that leaves the face, a smaller face holds the optimum.
            origin, rest = value[support[0]], value[list(support[1:])] - value[support[0]]
            step = np.linalg.lstsq(rest.T, target - origin, rcond=None)[0] if size > 1 else np.zeros(0)
            beta = np.concatenate([[1.0 - step.sum()], step])
            if beta.min() >= -1e-9:
                beta = np.clip(beta, 0.0, None) / np.clip(beta, 0.0, None).sum()
                best = min(best, float(np.linalg.norm(target - beta @ value[list(support)])))
    return best
