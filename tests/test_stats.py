"""Intervals, tests and agreement against published values, hand counts and their own laws."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student_t

from safecli.stats import (
    Interval,
    any_of,
    corrected_rate,
    difference,
    holm,
    kappa,
    krippendorff,
    mcnemar,
    over_seeds,
    paired_bootstrap,
    paired_difference,
    rate,
    sampled_rate,
    wilson,
)

counts = st.integers(0, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@pytest.mark.parametrize(
    ("count", "n", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), pp. 857-872, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_agrees_with_published_intervals(count: int, n: int, low: float, high: float) -> None:
    assert wilson(count, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_of_nothing_is_everything() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("count", "n"), [(-1, 3), (4, 3)])
def test_wilson_refuses_an_impossible_count(count: int, n: int) -> None:
    with pytest.raises(ValueError, match="not between"):
        wilson(count, n)


@given(counts, st.floats(0.5, 0.999))
def test_wilson_holds_the_rate_and_is_symmetric(pair: tuple[int, int], level: float) -> None:
    count, n = pair
    low, high = wilson(count, n, level)
    assert 0 <= low <= high <= 1
    assert n == 0 or low <= count / n <= high
    mirrored = wilson(n - count, n, level)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-12)


@given(counts)
def test_wilson_widens_with_the_level(pair: tuple[int, int]) -> None:
    narrow, wide = wilson(*pair, level=0.8), wilson(*pair, level=0.99)
    assert wide[0] <= narrow[0]
    assert narrow[1] <= wide[1]


def test_wilson_is_where_the_score_test_turns() -> None:
    low, high = wilson(38, 80)
    for end in (low, high):
        z = (38 / 80 - end) / math.sqrt(end * (1 - end) / 80)
        assert abs(z) == pytest.approx(1.959964, abs=1e-6)


def test_rate_keeps_count_and_interval() -> None:
    low, high = wilson(3, 4)
    assert rate(3, 4) == {"count": 3, "n": 4, "rate": 0.75, "low": low, "high": high}
    assert rate(0, 0) == {"count": 0, "n": 0, "rate": 0.0, "low": 0.0, "high": 1.0}


@pytest.mark.parametrize(
    ("base_only", "model_only", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (0, 6, 2 / 64),
        (1, 5, 2 * (1 + 6) / 64),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
        (5, 5, 1.0),
    ],
)
def test_mcnemar_by_hand(base_only: int, model_only: int, p: float) -> None:
    assert mcnemar(base_only, model_only) == pytest.approx(p, rel=1e-12)


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_a_symmetric_probability(b: int, c: int) -> None:
    assert 0 < mcnemar(b, c) == mcnemar(c, b) <= 1


def test_mcnemar_of_thousands_is_finite() -> None:
    assert mcnemar(2500, 2500) == 1.0
    assert 0 <= mcnemar(100, 4900) < 1e-300


def test_kappa_by_hand() -> None:
    # Cohen's two-by-two example: 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no; p_o = 0.7, p_e = 0.5.
    a = "y" * 25 + "n" * 25
    b = "y" * 20 + "n" * 5 + "y" * 10 + "n" * 15
    assert kappa(a, b) == pytest.approx(0.4)


def test_kappa_at_its_ends() -> None:
    assert kappa("yynn", "yynn") == 1
    assert kappa("yynn", "nnyy") == -1
    assert kappa("yyyy", "yyyy") == 1
    assert kappa("yyyy", "nnnn") == 0
    with pytest.raises(ValueError, match="at least one"):
        kappa("", "")
    with pytest.raises(ValueError, match="shorter"):
        kappa("yy", "y")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=1))
def test_kappa_is_symmetric_and_bounded(labels: list[tuple[str, str]]) -> None:
    a, b = zip(*labels, strict=True)
    assert kappa(a, b) == pytest.approx(kappa(b, a))
    assert -1 - 1e-12 <= kappa(a, b) <= 1


def test_paired_difference_agrees_with_a_published_interval() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), pp. 2635-2650: 36 both, 12 the first only, 2 the second only
    found = paired_difference(both=36, base_only=2, model_only=12, neither=0)
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.0569, 0.3404), abs=5e-5)


@given(*[st.integers(0, 60)] * 4)
def test_paired_difference_holds_its_value_and_turns_with_the_sides(a: int, b: int, c: int, d: int) -> None:
    found, turned = paired_difference(a, b, c, d), paired_difference(a, c, b, d)
    assert -1 <= found.low <= found.value + 1e-12
    assert found.value - 1e-12 <= found.high <= 1
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low), abs=1e-12)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_bootstrap_sees_a_shift_and_nothing_where_there_is_none() -> None:
    rng = np.random.default_rng(0)
    before = rng.random(80)
    shifted, p = paired_bootstrap(before, before + 0.2 + rng.normal(0, 0.1, 80), draws=2000)
    assert shifted.low > 0.15
    assert p < 0.01
    _, p = paired_bootstrap(before, before, draws=200)
    assert p == 1


def test_one_sample_of_each_prompt_is_a_plain_rate() -> None:
    found = sampled_rate([[1], [0], [0], [1], [1]])
    assert (found.low, found.high) == pytest.approx(wilson(3, 5))


def test_samples_that_always_agree_count_once() -> None:
    once = np.array([1, 0, 0, 1, 0, 0, 1, 0, 0, 1])[:, None]
    found = sampled_rate(np.repeat(once, 8, 1))
    assert (found.low, found.high) == pytest.approx(wilson(4, 10), abs=0.01)


def test_any_of_counts_prompts() -> None:
    assert any_of([[0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 0, 0]]) == Interval(0.5, *wilson(2, 4))


def test_seeds_that_differ_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    prompts = rng.random(100)
    alike, _ = over_seeds(prompts + rng.normal(0, 0.05, (4, 100)))
    apart, _ = over_seeds(prompts + rng.normal(0, 0.05, (4, 100)) + np.array([[-0.2], [-0.1], [0.1], [0.2]]))
    assert apart.high - apart.low > 2 * (alike.high - alike.low)
    square = np.array([[0.0, 1.0], [0.5, 1.5]])  # as many seeds as prompts: mean squares 0.25 and 1, no residual
    found, _ = over_seeds(square)
    assert found.high - found.value == pytest.approx(student_t.ppf(0.975, 1.25**2 / 1.0625) * math.sqrt(1.25 / 4))
    with pytest.raises(ValueError, match="several seeds"):
        over_seeds([[1, 0, 1]])


def test_a_perfect_judge_corrects_nothing_and_a_guess_corrects_nothing_at_all() -> None:
    found = corrected_rate(30, 100, (10_000, 10_000), (10_000, 10_000))
    assert found.value == pytest.approx(0.3)
    assert (found.low, found.high) == pytest.approx(wilson(30, 100), abs=0.005)
    with pytest.raises(ValueError, match="no better than chance"):
        corrected_rate(30, 100, (50, 100), (50, 100))


def test_correction_by_hand() -> None:
    # of 200 answers 62 called unsafe by a judge that finds 90 % and clears 80 %: (0.31 + 0.8 − 1) / 0.7
    assert corrected_rate(62, 200, (90, 100), (160, 200)).value == pytest.approx(0.11 / 0.7)


def test_krippendorff_agrees_with_the_published_example() -> None:
    # Krippendorff, Computing Krippendorff's alpha-reliability (2011), example C: four readers, twelve items
    table = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    ]
    assert krippendorff(table) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff([["a", "a"], ["a", "a"]]) == 1
    with pytest.raises(ValueError, match="two readers"):
        krippendorff([["a", None], [None, "b"]])


RATES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95)
Draw = Callable[[float, np.random.Generator], tuple[float, float, float]]


def _wilson(p: float, rng: np.random.Generator) -> tuple[float, float, float]:
    return p, *wilson(int(rng.binomial(100, p)), 100)


def _paired(p: float, rng: np.random.Generator) -> tuple[float, float, float]:
    base = rng.random(100) < p
    model = np.where(rng.random(100) < 0.6, rng.random(100) < 0.7 * p, base)
    found = paired_difference(
        *(int(cell.sum()) for cell in (base & model, base & ~model, ~base & model, ~base & ~model))
    )
    return 0.6 * 0.7 * p + 0.4 * p - p, found.low, found.high


def _sampled(p: float, rng: np.random.Generator) -> tuple[float, float, float]:
    by_prompt = rng.beta(2 * p, 2 * (1 - p), 100)
    found = sampled_rate(rng.random((100, 5)) < by_prompt[:, None])
    return p, found.low, found.high


def _seeds(p: float, rng: np.random.Generator) -> tuple[float, float, float]:
    effects = rng.normal(0, 0.03, (4, 1)) + rng.normal(p, 0.3, 100)
    found, _ = over_seeds(effects + rng.normal(0, 0.2, (4, 100)))
    return p, found.low, found.high


def _judged(p: float, rng: np.random.Generator) -> tuple[float, float, float]:
    called = int(rng.binomial(150, p * 0.9 + (1 - p) * 0.15))
    found = corrected_rate(called, 150, (int(rng.binomial(150, 0.9)), 150), (int(rng.binomial(150, 0.85)), 150))
    return p, found.low, found.high


def _resampled(p: float, rng: np.random.Generator) -> tuple[float, float, float]:
    base = rng.beta(2, 3, 100)
    found, _ = paired_bootstrap(base, base + rng.normal(p, 0.2, 100), draws=300, seed=int(rng.integers(1 << 30)))
    return p, found.low, found.high


def _unpaired(p: float, rng: np.random.Generator) -> tuple[float, float, float]:
    found = difference(int(rng.binomial(120, p)), 120, int(rng.binomial(150, p / 2)), 150)
    return p / 2, found.low, found.high


@pytest.mark.parametrize("draw", [_wilson, _paired, _unpaired, _sampled, _seeds, _judged, _resampled])
def test_intervals_cover_the_truth_at_their_level(draw: Draw) -> None:
    rng = np.random.default_rng(1)
    held = [low <= truth <= high for p in RATES for truth, low, high in (draw(p, rng) for _ in range(300))]
    assert 0.93 <= np.mean(held) <= 0.97


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [((56, 70, 48, 80), 0.0524, 0.3339), ((9, 10, 3, 10), 0.1705, 0.8090), ((10, 10, 0, 20), 0.6791, 1.0)],
)
def test_difference_agrees_with_published_intervals(counts: tuple[int, int, int, int], low: float, high: float) -> None:
    """Newcombe 1998, table II, method 10."""
    found = difference(*counts)
    assert found.low == pytest.approx(low, abs=5e-5)
    assert found.high == pytest.approx(high, abs=5e-5)
