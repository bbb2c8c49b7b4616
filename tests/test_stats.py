"""Intervals, tests and agreement against published values, hand counts and their own laws."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safecli.stats import kappa, mcnemar, rate, wilson

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
