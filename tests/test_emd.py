"""The bounds of the Earth Mover Distance against the exact one, and their laws."""

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safecli.losses import emd


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """p, q [1, V] and unit features [V, k] in float64: zeros, equal tokens and sure distributions among them."""
    vocab, k = draw(st.integers(2, 8)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    features = rng.normal(size=(vocab, k))
    if draw(st.booleans()):
        features[-1] = features[0]
    if draw(st.booleans()):
        features[1] = -features[0]
    return _distribution(draw, vocab, rng), _distribution(draw, vocab, rng), _unit(features)


def _distribution(draw: st.DrawFn, vocab: int, rng: np.random.Generator) -> Tensor:
    if draw(st.booleans()):
        return torch.nn.functional.one_hot(torch.tensor([draw(st.integers(0, vocab - 1))]), vocab).double()
    weights = rng.dirichlet(np.full(vocab, draw(st.sampled_from([0.1, 1.0, 10.0]))))
    weights[draw(st.integers(0, vocab - 1))] = 0
    return torch.tensor(weights / weights.sum())[None] if weights.sum() > 0 else _distribution(draw, vocab, rng)


def _unit(features: np.ndarray) -> Tensor:
    return torch.nn.functional.normalize(torch.tensor(features), dim=-1)


def _cost(features: Tensor) -> Tensor:
    return (1 - features @ features.T).clamp(min=0)


def _transport(p: Tensor, q: Tensor, cost: Tensor) -> float:
    return float(ot.emd2(p[0].numpy(), q[0].numpy(), cost.numpy()))


@settings(max_examples=2000, deadline=None)
@given(problems())
def test_the_bounds_lie_around_the_exact_distance_in_order(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    p, q, features = problem
    cost = _cost(features)
    exact = _transport(p, q, cost)
    centroid, covariance = (float(bound(p, q, features)) for bound in (emd.centroid, emd.covariance))
    assert centroid <= covariance + 1e-9
    assert covariance <= exact + 1e-9
    assert float(emd.relaxed(p, q, cost)) <= exact + 1e-9
    assert exact <= float(emd.upper(p, q, cost)) + 1e-9


@given(problems(), st.data())
def test_with_a_onehot_target_all_but_the_centroid_are_exact(
    problem: tuple[Tensor, Tensor, Tensor], data: st.DataObject
) -> None:
    p, _, features = problem
    cost = _cost(features)
    x = torch.tensor([data.draw(st.integers(0, len(cost) - 1))])
    q = torch.nn.functional.one_hot(x, len(cost)).double()
    exact = _transport(p, q, cost)
    assert float(emd.exact_onehot(p, x, cost)) == pytest.approx(exact, abs=1e-7)
    assert float(emd.covariance(p, q, features)) == pytest.approx(exact, abs=1e-7)
    assert float(emd.relaxed(p, q, cost)) == pytest.approx(exact, abs=1e-7)
    assert float(emd.upper(p, q, cost)) == pytest.approx(exact, abs=1e-7)


@given(problems())
def test_the_interval_is_two_standard_deviations(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    p, q, features = problem
    gap = emd.upper(p, q, 1 - features @ features.T) - emd.covariance(p, q, features)
    spread = (1 - (p @ features).square().sum(-1)).clamp(min=0) * (1 - (q @ features).square().sum(-1)).clamp(min=0)
    assert float(gap) == pytest.approx(float(spread.sqrt()), abs=1e-7)


@given(problems(), st.floats(0.1, 20), st.data())
def test_no_distribution_beats_the_anchored_optimum(
    problem: tuple[Tensor, Tensor, Tensor], strength: float, data: st.DataObject
) -> None:
    other, _, features = problem
    cost = _cost(features)
    x = torch.tensor([data.draw(st.integers(0, len(cost) - 1))])
    seed = data.draw(st.integers(0, 1000))
    reference = torch.tensor(np.random.default_rng(seed).dirichlet(np.ones(len(cost))))[None]

    def value(p: Tensor) -> float:
        divergence = torch.special.xlogy(p, p / reference).sum(-1)
        return float(divergence - strength * emd.exact_onehot(p, x, cost))

    assert value(emd.anchored_optimum(reference, x, cost, strength)) <= value(other) + 1e-9
