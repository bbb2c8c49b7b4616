"""Intervals, tests and agreement for counts of outcomes: small samples, exact where it is cheap."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from math import comb, sqrt
from statistics import NormalDist


def wilson(count: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a proportion, (low, high) in [0, 1]; (0, 1) when nothing was counted.

    With p = count/n and z the normal quantile of `level` (two-sided), its ends are
    (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n): Wilson, JASA 22 (1927), pp. 209-212.
    """
    if not 0 <= count <= n:
        raise ValueError(f"a count of {count} is not between 0 and n = {n}")
    if n == 0:
        return 0.0, 1.0
    p, z = count / n, NormalDist().inv_cdf((1 + level) / 2)
    centre = p + z * z / (2 * n)
    half = z * sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    scale = 1 + z * z / n
    # The interval holds p; min and max only take away what rounding adds at p = 0 and p = 1.
    return max(0.0, min(p, (centre - half) / scale)), min(1.0, max(p, (centre + half) / scale))


def rate(count: int, n: int) -> dict[str, float]:
    """A proportion as results.json keeps it: count, n, rate (0 when n = 0), 95 % Wilson low and high."""
    low, high = wilson(count, n)
    return {"count": count, "n": n, "rate": count / n if n else 0.0, "low": low, "high": high}


def mcnemar(base_only: int, model_only: int) -> float:
    """Two-sided p of McNemar's exact test that two models do something equally often on the same prompts.

    `base_only` and `model_only` count the prompts on which just one of them does it. If the two were alike,
    either count would be Binomial(base_only + model_only, ½); p is twice the smaller tail, at most 1
    (McNemar, Psychometrika 12 (1947), in its exact form).
    """
    n = base_only + model_only
    tail = sum(comb(n, k) for k in range(min(base_only, model_only) + 1))
    return min(1.0, 2 * tail / (1 << n))


def kappa(a: Sequence[Hashable], b: Sequence[Hashable]) -> float:
    """Cohen's kappa of two readers' labels of the same items, (p_o − p_e) / (1 − p_e), in [−1, 1].

    p_o is how often they agree, p_e how often they would by chance, given how often each uses each label
    (Cohen, Educational and Psychological Measurement 20 (1960)). Two readers who only ever use the same
    single label agree perfectly: 1.
    """
    n = len(a)
    if not n:
        raise ValueError("kappa needs at least one item")
    agreed = sum(x == y for x, y in zip(a, b, strict=True)) / n
    used_a, used_b = Counter(a), Counter(b)
    chance = sum(used_a[label] * used_b[label] for label in used_a) / n**2
    return 1.0 if chance == 1 else (agreed - chance) / (1 - chance)
