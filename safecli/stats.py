"""Intervals, tests and agreement for counts of outcomes: small samples, exact where it is cheap."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student_t

LEVEL = 0.95
"""The level of every interval, where no other is asked for."""
BLOCK = 500
"""How many resamples the bootstrap holds at once."""


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its confidence interval."""

    value: float
    low: float
    high: float


def wilson(count: float, n: float, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval for a proportion, (low, high) in [0, 1]; (0, 1) when nothing was counted.

    With p = count/n and z the normal quantile of `level` (two-sided), its ends are
    (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n): Wilson, JASA 22 (1927), pp. 209-212.
    """
    if not 0 <= count <= n:
        raise ValueError(f"a count of {count} is not between 0 and n = {n}")
    if n == 0:
        return 0.0, 1.0
    p, z = count / n, _normal(level)
    centre = p + z * z / (2 * n)
    half = z * sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    scale = 1 + z * z / n
    # The interval holds p; min and max only take away what rounding adds at p = 0 and p = 1.
    return max(0.0, min(p, (centre - half) / scale)), min(1.0, max(p, (centre + half) / scale))


def _normal(level: float) -> float:
    """The two-sided quantile of the normal distribution: 1.96 at 95 %."""
    return NormalDist().inv_cdf((1 + level) / 2)


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


def paired_difference(both: int, base_only: int, model_only: int, neither: int, level: float = LEVEL) -> Interval:
    """Model's rate less the base's on the same prompts, in [−1, 1], from the four counts of a paired table.

    Newcombe's square-and-add interval from two Wilson intervals and the correlation φ of the pairs, with his
    correction of φ (Newcombe, Statistics in Medicine 17 (1998), pp. 2635-2650, method 10).
    """
    n = both + base_only + model_only + neither
    if n == 0:
        return Interval(0.0, -1.0, 1.0)
    before, after = both + base_only, both + model_only
    margins = before * (n - before) * after * (n - after)
    cross = both * neither - base_only * model_only
    phi = (max(cross - n / 2, 0) if cross > 0 else cross) / sqrt(margins) if margins else 0.0
    (low_b, high_b), (low_m, high_m) = wilson(before, n, level), wilson(after, n, level)
    p_b, p_m = before / n, after / n
    down = _joined(p_m - low_m, high_b - p_b, phi)
    up = _joined(high_m - p_m, p_b - low_b, phi)
    return Interval(p_m - p_b, max(-1.0, p_m - p_b - down), min(1.0, p_m - p_b + up))


def difference(count: int, n: int, base_count: int, base_n: int, level: float = LEVEL) -> Interval:
    """A rate less another's on other answers, in [−1, 1]: Newcombe's square-and-add interval without pairs.

    Newcombe, Statistics in Medicine 17 (1998), pp. 873-890, method 10.
    """
    (low_b, high_b), (low_m, high_m) = wilson(base_count, base_n, level), wilson(count, n, level)
    p_b, p_m = base_count / base_n if base_n else 0.5, count / n if n else 0.5
    down, up = _joined(p_m - low_m, high_b - p_b, 0.0), _joined(high_m - p_m, p_b - low_b, 0.0)
    return Interval(p_m - p_b, max(-1.0, p_m - p_b - down), min(1.0, p_m - p_b + up))


def _joined(a: float, b: float, phi: float) -> float:
    return sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))


def paired_bootstrap(
    base: ArrayLike, model: ArrayLike, draws: int = 10_000, seed: int = 0, level: float = LEVEL
) -> tuple[Interval, float]:
    """Mean of model − base over paired scores [N], its percentile interval, and a two-sided p that it is 0.

    Pairs are drawn with replacement; p is twice the share of resampled means on the far side of 0, with one
    added to both counts so that it is never 0 (Efron and Tibshirani, An Introduction to the Bootstrap, 1993).
    """
    differences = np.asarray(model, dtype=float) - np.asarray(base, dtype=float)
    if differences.ndim != 1 or not len(differences):
        raise ValueError("the bootstrap needs at least one pair of scores")
    rng = np.random.default_rng(seed)
    n = len(differences)
    blocks = [min(BLOCK, draws - start) for start in range(0, draws, BLOCK)]
    means = np.concatenate([differences[rng.integers(0, n, (block, n))].mean(1) for block in blocks])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    tail = min((means <= 0).sum(), (means >= 0).sum())
    p = min(1.0, 2 * (int(tail) + 1) / (draws + 1))
    return Interval(float(differences.mean()), float(low), float(high)), p


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for how many were looked at, in the given order: Holm, Scand. J. Statist. 6 (1979), 65-70.

    The k-th smallest of m is multiplied by m − k + 1, and none is smaller than one before it.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, least = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = least
    return adjusted


def sampled_rate(outcomes: ArrayLike, level: float = LEVEL) -> Interval:
    """The rate over several samples of each prompt, outcomes [prompts, samples] of 0 and 1.

    Samples of one prompt are alike, so the interval is Wilson's at the effective size p(1 − p) / SE², where SE is
    the standard error of the prompts' means; at least the prompts, at most all samples count.
    """
    table = np.atleast_2d(np.asarray(outcomes, dtype=float))
    prompts, samples = table.shape
    value = float(table.mean())
    error = table.mean(1).var(ddof=1) / prompts if prompts > 1 else 0.0
    size = value * (1 - value) / error if error > 0 else prompts
    size = min(max(size, prompts), prompts * samples)
    return Interval(value, *wilson(value * size, size, level))


def any_of(outcomes: ArrayLike, level: float = LEVEL) -> Interval:
    """The share of prompts on which any of their samples did it, outcomes [prompts, samples] of 0 and 1."""
    table = np.atleast_2d(np.asarray(outcomes, dtype=bool))
    count = int(table.any(1).sum())
    return Interval(count / len(table), *wilson(count, len(table), level))


def over_seeds(values: ArrayLike, level: float = LEVEL) -> tuple[Interval, float]:
    """The mean over training seeds and prompts, values [seeds, prompts], with both as sources of variance.

    Beside it the two-sided p of a mean of 0. Seeds and prompts are crossed random effects; with the mean squares of
    seeds S, prompts P and the rest R the mean has variance (S + P − R) / (seeds · prompts), estimated without bias,
    and Satterthwaite's degrees of freedom (Searle, Casella and McCulloch, Variance Components, 1992). At least two of
    each are needed.
    """
    table = np.asarray(values, dtype=float)
    if table.ndim != 2 or min(table.shape) < 2:
        raise ValueError("several seeds and several prompts are needed")
    seeds, prompts = table.shape
    mean, by_seed, by_prompt = table.mean(), table.mean(1), table.mean(0)
    rest = table - by_seed[:, None] - by_prompt + mean
    of_seeds, of_prompts = prompts * float(by_seed.var(ddof=1)), seeds * float(by_prompt.var(ddof=1))
    residual = float((rest**2).sum()) / ((seeds - 1) * (prompts - 1))
    total = max(of_seeds + of_prompts - residual, of_seeds, of_prompts)
    spread = of_seeds**2 / (seeds - 1) + of_prompts**2 / (prompts - 1)
    degrees = total**2 / spread if spread else 1.0
    error = sqrt(total / table.size)
    half = float(student_t.ppf((1 + level) / 2, degrees)) * error
    p = float(2 * student_t.sf(abs(mean) / error, degrees)) if error else float(mean == 0)
    return Interval(float(mean), float(mean) - half, float(mean) + half), p


def corrected_rate(
    count: int, n: int, sensitivity: tuple[int, int], specificity: tuple[int, int], level: float = LEVEL
) -> Interval:
    """The true rate behind `count` of `n` that an imperfect judge calls positive, in [0, 1].

    `sensitivity` counts the positives that the judge found of those that people labelled, `specificity` the
    negatives that it cleared. The value is Rogan and Gladen's (q + Sp − 1) / (Se + Sp − 1) (American Journal of
    Epidemiology 107 (1978)); the interval carries the errors of q, Se and Sp (Lang and Reiczigel, Preventive
    Veterinary Medicine 113 (2014)). `ValueError` for a judge no better than chance.
    """
    (found, positives), (cleared, negatives) = sensitivity, specificity
    if found / positives + cleared / negatives <= 1:
        raise ValueError("the judge is no better than chance on these labels, so nothing can be corrected")
    z = _normal(level)
    q = (count + z * z / 2) / (n + z * z)
    se, sp = (found + 1) / (positives + 2), (cleared + 1) / (negatives + 2)
    youden = se + sp - 1
    p = (q + sp - 1) / youden
    var_se, var_sp = se * (1 - se) / (positives + 2), sp * (1 - sp) / (negatives + 2)
    shift = 2 * z * z * (p * var_se - (1 - p) * var_sp)
    half = z * sqrt(q * (1 - q) / (n + z * z) + p * p * var_se + (1 - p) ** 2 * var_sp) / youden
    value = (count / n + cleared / negatives - 1) / (found / positives + cleared / negatives - 1)
    low, high = (min(max(end, 0.0), 1.0) for end in (p + shift - half, p + shift + half))
    return Interval(min(max(value, low), high), low, high)


def krippendorff(labels: Sequence[Sequence[Hashable | None]]) -> float:
    """Krippendorff's alpha of nominal labels, [readers][items], None where a reader gave none; at most 1.

    1 − D_o / D_e, from pairs of labels of the same item and from pairs of any labels (Krippendorff, Content
    Analysis, 2004, chapter 11). `ValueError` where no item has two labels; 1 where all labels are one.
    """
    items = [[label for label in item if label is not None] for item in zip(*labels, strict=True)]
    items = [item for item in items if len(item) > 1]
    if not items:
        raise ValueError("alpha needs an item that two readers labelled")
    used = Counter(label for item in items for label in item)
    total = sum(used.values())
    observed = sum(sum(a * (len(item) - a) for a in Counter(item).values()) / (len(item) - 1) for item in items)
    expected = sum(a * (total - a) for a in used.values()) / (total - 1)
    return 1.0 if expected == 0 else 1 - observed / expected
