"""The chunked operator against the formulas of `emd`: values, gradients, chunks, and what it refuses."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from safecli.costs import Cost, DenseCost, Neighbours, SparseCost
from safecli.errors import UsageError
from safecli.losses import Anchor, Target, emd, linear_cross_entropy, linear_emd, linear_kl, onehot
from safecli.losses.fused import Bound, best_bound, divergences

T, V, D, K = 13, 40, 6, 5
POSSIBLE = [
    (bound, kind, target)
    for bound, kind, target in product(
        ("exact", "centroid", "covariance", "relaxed", "upper"), ("dense", "sparse"), ("onehot", "soft")
    )
    if not (bound == "exact" and target == "soft") and not (bound in ("centroid", "covariance") and kind == "sparse")
]


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.tensor(np.random.default_rng([seed, *shape]).normal(size=shape))


def _cost(kind: str) -> Cost:
    features = functional.normalize(_normal(V, K), dim=-1)
    if kind == "dense":
        return DenseCost(features)
    costs, indices = (1 - features @ features.T).topk(6, largest=False)
    return Neighbours(indices, costs, ceiling=1.1).symmetric().to(torch.device("cpu"), torch.float64)


def _target(kind: str) -> Target:
    if kind == "onehot":
        return onehot(torch.arange(T) * 3 % V)
    weights = torch.tensor(np.random.default_rng(1).dirichlet(np.ones(4), T))
    weights[0] = torch.tensor([0.0, 1.0, 0.0, 0.0])  # one token, and padding before it
    weights[1] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    weights[2] = torch.tensor([0.5, 0.5, 0.0, 0.0])
    return Target((torch.arange(T)[:, None] * 3 + torch.tensor([0, 1, 7, 20])) % V, weights)


def _dense(target: Target) -> Tensor:
    return torch.zeros(T, V, dtype=torch.float64).scatter_add(1, target.ids, target.weights.double())


def _reference(p: Tensor, target: Target, cost: Cost, bound: str) -> Tensor:
    matrix = cost.rows(torch.arange(V))
    if bound == "exact":
        return emd.exact_onehot(p, target.ids[:, 0], matrix)
    q = _dense(target)
    if bound in ("centroid", "covariance"):
        assert isinstance(cost, DenseCost)
        return getattr(emd, bound)(p, q, cost.features)
    return getattr(emd, bound)(p, q, matrix)


def _inputs(dtype: torch.dtype = torch.float64, head_trains: bool = False) -> tuple[Tensor, Tensor]:
    return _normal(T, D).to(dtype).requires_grad_(), _normal(V, D).to(dtype).requires_grad_(head_trains)


@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize(("bound", "kind", "shape"), POSSIBLE)
def test_value_and_gradients_are_those_of_the_formula(bound: Bound, kind: str, shape: str, head_trains: bool) -> None:
    cost, target, upstream = _cost(kind), _target(shape), _normal(T, seed=5)
    hidden, weight = _inputs(head_trains=head_trains)
    found = linear_emd(hidden, weight, target, cost, bound=bound, chunk_tokens=4)
    expected = -_reference((hidden @ weight.T).softmax(-1), target, cost, bound)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected)
    leaves = [hidden, weight] if head_trains else [hidden]
    for mine, reference in zip(
        torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("shape", ["onehot", "soft"])
def test_the_anchored_term_is_a_divergence_minus_the_bound(shape: str) -> None:
    cost, target, reference = _cost("dense"), _target(shape), _normal(T, D, seed=2)
    hidden, weight = _inputs(head_trains=True)
    found = linear_emd(hidden, weight, target, cost, anchor=Anchor(reference, 3.0), chunk_tokens=5)
    p, p_ref = (hidden @ weight.T).softmax(-1), (reference @ weight.detach().T).softmax(-1)
    bound = _reference(p, target, cost, "exact" if shape == "onehot" else "covariance")
    expected = (p * (p / p_ref).log()).sum(-1) - 3 * bound
    torch.testing.assert_close(found, expected)
    for mine, formula in zip(
        torch.autograd.grad(found.sum(), [hidden, weight]),
        torch.autograd.grad(expected.sum(), [hidden, weight]),
        strict=True,
    ):
        torch.testing.assert_close(mine, formula)


def test_gradient_descent_on_free_logits_ends_at_the_anchored_optimum() -> None:
    cost, x, strength = _cost("dense"), torch.tensor([3, 11]), 4.0
    reference = _normal(2, V, seed=3)
    logits = reference.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15)
    identity = torch.eye(V, dtype=torch.float64)

    def closure() -> float:
        optimiser.zero_grad()
        loss = linear_emd(logits, identity, onehot(x), cost, anchor=Anchor(reference, strength)).sum()
        loss.backward()
        return float(loss.detach())

    optimiser.step(closure)
    optimum = emd.anchored_optimum(reference.softmax(-1), x, cost.rows(torch.arange(V)), strength)
    torch.testing.assert_close(logits.softmax(-1).detach(), optimum, atol=1e-6, rtol=0)


@pytest.mark.parametrize("head_trains", [False, True])
def test_numerical_gradients_agree(head_trains: bool) -> None:
    hidden, weight = _inputs(head_trains=head_trains)
    anchor = None if head_trains else Anchor(_normal(T, D, seed=2), 2.0)  # a reference has no gradient to check

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return torch.stack(
            [linear_emd(hidden, weight, target, _cost("dense"), anchor=anchor, chunk_tokens=6) for target in targets]
        )

    targets = _target("onehot"), _target("soft")
    assert torch.autograd.gradcheck(loss, (hidden, weight))


@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize(("bound", "kind", "shape"), POSSIBLE)
def test_the_chunk_size_changes_nothing(bound: Bound, kind: str, shape: str, head_trains: bool) -> None:
    cost, target, anchor = _cost(kind), _target(shape), Anchor(_normal(T, D, seed=2), 2.0)
    results = []
    for chunk in (1, 5, T, None):
        hidden, weight = _inputs(head_trains=head_trains)
        loss = linear_emd(hidden, weight, target, cost, bound=bound, anchor=anchor, chunk_tokens=chunk)
        loss.sum().backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@pytest.mark.parametrize("head_trains", [False, True])
def test_no_positions_give_no_losses_and_a_zero_gradient(head_trains: bool) -> None:
    hidden = torch.zeros(0, D, requires_grad=True)
    weight = _normal(V, D).float().requires_grad_(head_trains)
    nothing = torch.zeros(0, dtype=torch.long)
    cost = _cost("dense").to(torch.device("cpu"))
    for losses in (
        linear_emd(hidden, weight, onehot(nothing), cost),
        linear_kl(hidden, weight, hidden.detach()),
        linear_cross_entropy(hidden, weight, nothing),
    ):
        assert losses.shape == (0,)
        (gradient,) = torch.autograd.grad(losses.sum(), hidden)
        assert gradient.shape == (0, D)


@pytest.mark.parametrize("head_trains", [False, True])
def test_divergence_and_cross_entropy_are_those_of_torch(head_trains: bool) -> None:
    hidden, weight = _inputs(head_trains=head_trains)
    reference, ids = _normal(T, D, seed=2), torch.arange(T)
    leaves = [hidden, weight] if head_trains else [hidden]
    log_p = (hidden @ weight.T).log_softmax(-1)
    log_ref = (reference @ weight.detach().T).log_softmax(-1)
    for mine, expected in (
        (
            linear_kl(hidden, weight, reference, chunk_tokens=4),
            functional.kl_div(log_p, log_ref, reduction="none", log_target=True).sum(-1),
        ),
        (
            linear_cross_entropy(hidden, weight, ids, chunk_tokens=4),
            functional.cross_entropy(hidden @ weight.T, ids, reduction="none"),
        ),
    ):
        torch.testing.assert_close(mine, expected)
        torch.testing.assert_close(
            torch.autograd.grad(mine.sum(), leaves), torch.autograd.grad(expected.sum(), leaves, retain_graph=True)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bound", "kind", "shape"), POSSIBLE)
def test_lower_precision_stays_near(bound: Bound, kind: str, shape: str, dtype: torch.dtype) -> None:
    hidden, weight = _inputs(torch.float32)
    cost, target = _cost(kind).to(torch.device("cpu")), _target(shape)
    target = Target(target.ids, target.weights.float())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = linear_emd(hidden, weight, target, cost, bound=bound)
    loss.sum().backward()
    exact, double = _inputs()
    expected = linear_emd(exact, double, _target(shape), _cost(kind), bound=bound)
    expected.sum().backward()
    assert loss.dtype == torch.float32
    assert hidden.grad is not None
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(loss.detach().double(), expected.detach(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(hidden.grad.double(), exact.grad, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("shape", ["onehot", "soft"])
def test_a_model_that_is_sure_of_the_unsafe_token_keeps_a_finite_gradient(shape: str) -> None:
    target = _target(shape)
    identity = torch.eye(V)
    hidden = (_dense(target).float() * 60).requires_grad_()
    cost = _cost("dense").to(torch.device("cpu"))
    bounds: list[Bound] = ["exact", "centroid"] if shape == "onehot" else ["centroid", "covariance", "relaxed"]
    for bound in bounds:
        loss = linear_emd(hidden, identity, Target(target.ids, target.weights.float()), cost, bound=bound)
        (gradient,) = torch.autograd.grad(loss.sum(), hidden)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()


def test_the_best_bound_is_exact_where_it_can_be() -> None:
    assert best_bound(_target("onehot"), _cost("sparse")) == "exact"
    assert best_bound(_target("soft"), _cost("dense")) == "covariance"
    assert best_bound(_target("soft"), _cost("sparse")) == "relaxed"


@pytest.mark.parametrize(
    ("bound", "kind", "shape", "remedy"),
    [
        ("exact", "dense", "soft", "use covariance"),
        ("centroid", "sparse", "onehot", "use exact"),
        ("covariance", "sparse", "soft", "relaxed"),
    ],
)
def test_an_impossible_bound_is_refused_with_the_possible_ones(
    bound: Bound, kind: str, shape: str, remedy: str
) -> None:
    hidden, weight = _inputs()
    with pytest.raises(UsageError, match=remedy):
        linear_emd(hidden, weight, _target(shape), _cost(kind), bound=bound)


def test_what_training_logs_is_the_divergence_the_distance_and_its_interval() -> None:
    hidden, weight, reference = _normal(T, D), _normal(V, D), _normal(T, D, seed=2)
    cost, target = _cost("dense"), _target("soft")
    found = divergences(hidden, weight, reference, target, cost, chunk_tokens=5)
    p, p_ref = (hidden @ weight.T).softmax(-1), (reference @ weight.T).softmax(-1)
    torch.testing.assert_close(found["kl"], (p * (p / p_ref).log()).sum(-1))
    torch.testing.assert_close(found["emd"], _reference(p, target, cost, "covariance"))
    torch.testing.assert_close(found["interval"], _reference(p, target, cost, "upper") - found["emd"])
    assert "interval" not in divergences(hidden, weight, reference, _target("onehot"), cost)


def test_rows_of_a_sparse_cost_are_its_entries_and_the_ceiling() -> None:
    cost = _cost("sparse")
    assert isinstance(cost, SparseCost)
    dense = torch.full((V, V), cost.ceiling, dtype=torch.float64)
    for token in range(V):
        part = slice(int(cost.starts[token]), int(cost.starts[token + 1]))
        dense[token, cost.neighbours[part]] = cost.costs[part]
    asked = torch.tensor([5, 0, V - 1, 5])
    torch.testing.assert_close(cost.rows(asked), dense[asked])


def test_losses_are_the_same_without_gradients() -> None:
    hidden, weight = torch.randn(5, 4), torch.randn(7, 4)
    ids = torch.tensor([0, 6, 2, 2, 1])
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, ids, reduction="none")
    with torch.inference_mode():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, ids), expected)
