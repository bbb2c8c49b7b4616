"""The chunked operator against the formulas of `emd`: values, gradients, chunks, and what it refuses."""

import doctest
import subprocess
import sys
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from safecli.costs import Cost, DenseCost, Neighbours, SparseCost
from safecli.errors import RunError, UsageError
from safecli.losses import (
    Anchor,
    Head,
    Reference,
    Target,
    compiled,
    emd,
    linear_cross_entropy,
    linear_emd,
    linear_kl,
    linear_losses,
    onehot,
)
from safecli.losses.problem import Bound, best_bound

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


def _float(target: Target) -> Target:
    return Target(target.ids, target.weights.float())


CPU = torch.device("cpu")


@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize(("bound", "kind", "shape"), POSSIBLE)
def test_value_and_gradients_are_those_of_the_formula(bound: Bound, kind: str, shape: str, head_trains: bool) -> None:
    cost, target, upstream = _cost(kind), _target(shape), _normal(T, seed=5)
    hidden, weight = _inputs(head_trains=head_trains)
    found = linear_emd(hidden, weight, target, cost, bound=bound, reduction="none", chunk_tokens=4)
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
    frozen = Head(_normal(V, D, seed=9))
    for anchor, its_weight in (
        (Anchor(reference, 3.0), weight.detach()),
        (Anchor(reference, 3.0, frozen), frozen.weight),
    ):
        found = linear_emd(hidden, weight, target, cost, anchor=anchor, reduction="none", chunk_tokens=5)
        p, p_ref = (hidden @ weight.T).softmax(-1), (reference @ its_weight.T).softmax(-1)
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
        loss = linear_emd(logits, identity, x, cost, anchor=Anchor(reference, strength), reduction="sum")
        loss.backward()
        return float(loss.detach())

    optimiser.step(closure)
    optimum = emd.anchored_optimum(reference.softmax(-1), x, cost.rows(torch.arange(V)), strength)
    torch.testing.assert_close(logits.softmax(-1).detach(), optimum, atol=1e-6, rtol=0)


@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize(("bound", "kind", "shape"), POSSIBLE)
def test_numerical_gradients_agree(bound: Bound, kind: str, shape: str, head_trains: bool) -> None:
    cost, target = _cost(kind), _target(shape)
    anchor = Anchor(_normal(T, D, seed=2), 2.0, Head(_normal(V, D, seed=9)))

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_emd(hidden, weight, target, cost, bound=bound, anchor=anchor, chunk_tokens=6)

    assert torch.autograd.gradcheck(loss, _inputs(head_trains=head_trains))


@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize(("bound", "kind", "shape"), POSSIBLE)
def test_the_chunk_size_changes_nothing(bound: Bound, kind: str, shape: str, head_trains: bool) -> None:
    cost, target, anchor = _cost(kind), _target(shape), Anchor(_normal(T, D, seed=2), 2.0)
    results = []
    for chunk in (1, 5, T, None):
        hidden, weight = _inputs(head_trains=head_trains)
        loss = linear_emd(hidden, weight, target, cost, bound=bound, anchor=anchor, chunk_tokens=chunk)
        loss.backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def _heads() -> Iterator[Head]:
    weight, bias = _normal(V, D), _normal(V, seed=4)
    yield Head(weight, bias)
    yield Head(weight, scale=0.25)
    yield Head(weight, soft_cap=1.5)
    yield Head(weight, bias, scale=2.0, soft_cap=3.0)


def _plain_logits(hidden: Tensor, head: Head) -> Tensor:
    z = head.scale * (hidden @ head.weight.T + (0 if head.bias is None else head.bias))
    return z if head.soft_cap is None else head.soft_cap * (z / head.soft_cap).tanh()


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("head", list(_heads()))
def test_heads_with_a_bias_a_scale_or_a_soft_cap(head: Head, trains: bool) -> None:
    hidden, cost, target, reference = (
        _normal(T, D).requires_grad_(),
        _cost("dense"),
        _target("soft"),
        _normal(T, D, seed=2),
    )
    own = Head(head.weight.clone().requires_grad_(trains), head.bias, head.scale, head.soft_cap)
    if head.bias is not None:
        own = Head(own.weight, head.bias.clone().requires_grad_(trains), head.scale, head.soft_cap)
    leaves = [hidden] + [part for part in (own.weight, own.bias) if trains and part is not None]
    found = linear_emd(hidden, own, target, cost, anchor=Anchor(reference, 2.0, head), reduction="sum", chunk_tokens=5)
    p, p_ref = _plain_logits(hidden, own).softmax(-1), _plain_logits(reference, head).softmax(-1)
    expected = ((p * (p / p_ref).log()).sum(-1) - 2 * _reference(p, target, cost, "covariance")).sum()
    torch.testing.assert_close(found, expected)
    for mine, formula in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(mine, formula)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_positions_are_weighted_and_ignored_as_by_torch(reduction: str) -> None:
    hidden, weight = _inputs()
    ids, token_weight = torch.arange(T) * 3 % V, _normal(T, seed=6).abs()
    ids[[0, 4, 5]] = -100
    expected = functional.cross_entropy(hidden @ weight.T, ids, reduction="none") * token_weight
    if reduction != "none":
        expected = expected.sum() / (token_weight[ids >= 0].sum() if reduction == "mean" else 1)
    found = linear_cross_entropy(hidden, weight, ids, token_weight=token_weight, reduction=reduction, chunk_tokens=4)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), hidden), torch.autograd.grad(expected.sum(), hidden))
    anchor, cost = Anchor(_normal(T, D, seed=2), 2.0), _cost("sparse")
    all_of_it = linear_emd(hidden, weight, ids.clamp(min=0), cost, anchor=anchor, reduction="none")
    some = linear_emd(hidden, weight, ids, cost, anchor=anchor, reduction="none")
    torch.testing.assert_close(some, all_of_it * (ids >= 0))


def test_micro_batches_add_up_to_the_gradient_of_the_whole_batch() -> None:
    hidden, weight = _inputs(torch.float32, head_trains=True)
    cost, ids = _cost("dense").to(CPU), torch.arange(T) * 3 % V
    whole = torch.autograd.grad(linear_emd(hidden, weight, ids, cost), [hidden, weight])
    parts = [slice(0, 2), slice(2, 9), slice(9, T)]
    total = sum(linear_emd(hidden[part], weight, ids[part], cost, reduction="sum") / T for part in parts)
    torch.testing.assert_close(torch.autograd.grad(total, [hidden, weight]), whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_positions_or_none_that_count_give_zero_and_a_zero_gradient(head_trains: bool, reduction: str) -> None:
    cost = _cost("dense").to(CPU)
    for rows in (0, 3):
        hidden = torch.ones(rows, D, requires_grad=True)
        weight = _normal(V, D).float().requires_grad_(head_trains)
        nothing = torch.full((rows,), -100)
        losses = [
            linear_emd(hidden, weight, nothing, cost, reduction=reduction),
            linear_cross_entropy(hidden, weight, nothing, reduction=reduction),
        ]
        if rows == 0:
            losses.append(linear_kl(hidden, weight, hidden.detach(), reduction=reduction))
        for loss in losses:
            assert not loss.any()
            (gradient,) = torch.autograd.grad(loss.sum(), hidden)
            assert gradient.shape == (rows, D)
            assert not gradient.any()


@pytest.mark.parametrize("head_trains", [False, True])
def test_divergences_and_cross_entropy_are_those_of_torch(head_trains: bool) -> None:
    hidden, weight = _inputs(head_trains=head_trains)
    reference, soft = _normal(T, D, seed=2), _target("soft")
    leaves = [hidden, weight] if head_trains else [hidden]
    log_p = (hidden @ weight.T).log_softmax(-1)
    log_ref = (reference @ weight.detach().T).log_softmax(-1)

    def divergence(p: Tensor, q: Tensor) -> Tensor:
        return functional.kl_div(q, p, reduction="batchmean", log_target=True)

    for mine, expected in (
        (linear_kl(hidden, weight, reference, chunk_tokens=4), divergence(log_ref, log_p)),
        (linear_kl(hidden, weight, reference, reverse=True, chunk_tokens=4), divergence(log_p, log_ref)),
        (linear_cross_entropy(hidden, weight, soft, chunk_tokens=4), -(_dense(soft) * log_p).sum(-1).mean()),
    ):
        torch.testing.assert_close(mine, expected)
        torch.testing.assert_close(
            torch.autograd.grad(mine, leaves), torch.autograd.grad(expected, leaves, retain_graph=True)
        )


def test_several_losses_in_one_pass_are_the_sum_of_each_alone() -> None:
    hidden, weight = _inputs(head_trains=True)
    reference, cost, target = Reference(_normal(T, D, seed=2)), _cost("dense"), _target("soft")
    weights = {"cross_entropy": 0.7, "kl": 0.3, "reverse_kl": 0.5, "emd": 2.0, "interval": 0.0}
    found, values = linear_losses(hidden, weight, weights, target, cost, reference=reference, chunk_tokens=5)
    detached = reference.hidden
    alone = {
        "cross_entropy": linear_cross_entropy(hidden, weight, target, reduction="none"),
        "kl": linear_kl(hidden, weight, detached, reduction="none"),
        "reverse_kl": linear_kl(hidden, weight, detached, reverse=True, reduction="none"),
        "emd": -linear_emd(hidden, weight, target, cost, reduction="none"),
    }
    p = (hidden @ weight.T).softmax(-1)
    torch.testing.assert_close(values["interval"], _reference(p, target, cost, "upper") - alone["emd"])
    expected = sum(weights[name] * (-loss if name == "emd" else loss) for name, loss in alone.items())
    torch.testing.assert_close(found, expected)
    for name, loss in alone.items():
        torch.testing.assert_close(values[name], loss.detach())
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), [hidden, weight]), torch.autograd.grad(expected.sum(), [hidden, weight])
    )


def test_a_term_of_weight_zero_is_computed_and_has_no_gradient() -> None:
    hidden, weight = _inputs()
    terms = {"cross_entropy": 1.0, "reverse_kl": 0.0, "emd": 0.0}
    target, cost, reference = _target("onehot"), _cost("dense"), Reference(_normal(T, D, seed=2))
    found, values = linear_losses(hidden, weight, terms, target, cost, reference=reference)
    alone = linear_cross_entropy(hidden, weight, target, reduction="none")
    torch.testing.assert_close(torch.autograd.grad(found.sum(), hidden), torch.autograd.grad(alone.sum(), hidden))
    p = (hidden @ weight.T).softmax(-1).detach()
    torch.testing.assert_close(values["emd"], _reference(p, target, cost, "exact"))


def _held(dtype: torch.dtype, kind: str) -> tuple[list[Tensor], Cost]:
    """Hidden, head, reference and cost that dtype can hold, at logits of deviation 1: whoever computes rounds them."""
    scaled = (_normal(T, D) / D**0.5, _normal(V, D), _normal(T, D, seed=2) / D**0.5)
    cost = _cost(kind)
    if isinstance(cost, DenseCost):
        cost = DenseCost(cost.features.to(dtype).double())
    return [each.to(dtype).double() for each in scaled], cost


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bound", "kind", "shape"), POSSIBLE)
def test_lower_precision_stays_near(bound: Bound, kind: str, shape: str, dtype: torch.dtype, anchored: bool) -> None:
    inputs, cost = _held(dtype, kind)
    target = _target(shape)
    results = []
    for exact in (False, True):
        hidden, weight, reference = (each if exact else each.float() for each in inputs)
        hidden = hidden.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype, enabled=not exact and dtype != torch.float32):
            loss = linear_emd(
                hidden,
                weight,
                target if exact else _float(target),
                cost if exact else cost.to(CPU),
                bound=bound,
                anchor=Anchor(reference, 2.0) if anchored else None,
                reduction="none",
            )
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), hidden)))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert results[0][0].dtype == torch.float32
    for mine, right in zip(*results, strict=True):
        assert _relative(mine, right) < tolerance


@pytest.mark.parametrize("gap", [4.0, 8.0, 16.0, 40.0, 80.0])
@pytest.mark.parametrize(("bound", "shape"), [(b, s) for b, k, s in POSSIBLE if k == "dense"])
def test_float32_is_right_where_the_model_is_nearly_sure(bound: Bound, shape: str, gap: float) -> None:
    target, identity = _target(shape), torch.eye(V, dtype=torch.float64)
    logits = (_normal(T, V, seed=7) * 0.3).scatter_add(1, target.ids[:, -1:], torch.full((T, 1), gap).double())
    results = []
    for dtype in (torch.float32, torch.float64):
        hidden = logits.to(dtype).requires_grad_()
        cost, q = _cost("dense").to(CPU, dtype), Target(target.ids, target.weights.to(dtype))
        loss = linear_emd(hidden, identity.to(dtype), q, cost, bound=bound, reduction="none")
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), hidden)))
    (value, gradient), (exact, formula) = results
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-38)
    assert gradient.isfinite().all()
    for mine, right in zip(gradient, formula, strict=True):
        assert float((mine.double() - right).norm()) <= 1e-4 * float(right.norm()) + 1e-36


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_with_onehot_targets_all_but_centroid_are_equal(dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight = (each.detach().to(dtype) for each in _inputs())
    cost = _cost("dense").to(CPU, dtype)
    exact, *others = (
        linear_emd(hidden, weight, torch.arange(T), cost, bound=bound, reduction="none")
        for bound in ("exact", "covariance", "relaxed", "upper")
    )
    for other in others:
        torch.testing.assert_close(other, exact, rtol=tolerance, atol=tolerance)


def test_the_example_of_the_docstring_runs() -> None:
    failed, tried = doctest.testmod(sys.modules[linear_emd.__module__])[:2]
    assert tried
    assert not failed


def test_how_fast_the_gradient_vanishes_where_the_model_is_sure() -> None:
    """Of order eps^2 for centroid, eps for exact, and not at all for the cross-entropy's opposite number."""
    x, identity, cost = torch.tensor([3]), torch.eye(V, dtype=torch.float64), _cost("dense")
    norms: dict[str, list[float]] = {"exact": [], "centroid": []}
    for gap in (10.0, 20.0):
        logits = (functional.one_hot(x, V).double() * gap).requires_grad_()
        for bound in norms:
            (gradient,) = torch.autograd.grad(linear_emd(logits, identity, x, cost, bound=bound), logits)  # type: ignore[arg-type]
            norms[bound].append(float(gradient.norm().log()))
    slopes = {bound: (low - high) / 10 for bound, (low, high) in norms.items()}
    assert slopes["exact"] == pytest.approx(1, abs=0.01)
    assert slopes["centroid"] == pytest.approx(2, abs=0.01)


def test_a_cost_with_all_rows_equal_is_zero_everywhere() -> None:
    hidden, weight = _inputs()
    cost = DenseCost(functional.normalize(torch.ones(V, K, dtype=torch.float64), dim=-1))
    for bound, _, shape in [each for each in POSSIBLE if each[1] == "dense"]:
        loss = linear_emd(hidden, weight, _target(shape), cost, bound=bound)  # type: ignore[arg-type]
        assert abs(loss.item()) < 1e-12
        (gradient,) = torch.autograd.grad(loss, hidden)
        assert float(gradient.norm()) < 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_an_error_that_names_the_position(value: float) -> None:
    hidden, weight = _normal(T, D), _normal(V, D)
    hidden[7, 2] = value
    with pytest.raises(RunError, match="position 7 of 13"):
        linear_emd(hidden, weight, _target("onehot"), _cost("dense"))


def test_it_is_right_inside_a_compiled_function_and_under_checkpointing() -> None:
    cost, ids = _cost("dense"), torch.arange(T)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_emd(hidden * 2, weight, ids, cost)

    hidden, weight = _inputs()
    (expected,) = torch.autograd.grad(loss(hidden, weight), hidden)
    compiled = torch.compile(loss, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(hidden, weight), hidden), (expected,))
    saved = torch.utils.checkpoint.checkpoint(loss, hidden, weight, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(saved, hidden), (expected,))


def test_tied_embeddings_get_both_gradients() -> None:
    weight = _normal(V, D).requires_grad_()
    tokens, cost = torch.arange(T) * 2, _cost("dense")
    found = linear_emd(functional.embedding(tokens, weight).tanh(), weight, tokens + 1, cost, chunk_tokens=4)
    p = (weight[tokens].tanh() @ weight.T).softmax(-1)
    expected = -emd.exact_onehot(p, tokens + 1, cost.rows(torch.arange(V))).mean()
    torch.testing.assert_close(torch.autograd.grad(found, weight), torch.autograd.grad(expected, weight))


def test_data_parallel_training_gets_the_gradient_of_the_head() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        layer = torch.nn.Linear(D, V, bias=False, dtype=torch.float64)

        class Model(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head = layer

            def forward(self, hidden: Tensor) -> Tensor:
                return linear_emd(hidden, self.head.weight, torch.arange(T), _cost("dense"))

        torch.nn.parallel.DistributedDataParallel(Model())(_normal(T, D)).backward()
    finally:
        torch.distributed.destroy_process_group()
    alone = layer.weight.detach().clone().requires_grad_()
    linear_emd(_normal(T, D), alone, torch.arange(T), _cost("dense")).backward()
    torch.testing.assert_close(layer.weight.grad, alone.grad)


def test_importing_the_losses_needs_no_language_model_library() -> None:
    found = subprocess.run(
        [sys.executable, "-c", "import sys, safecli.losses; print('transformers' in sys.modules)"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == "False"


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


@pytest.mark.parametrize("scale", [1.0, -2.5])
def test_rows_of_a_cost_are_its_entries(scale: float) -> None:
    asked = torch.tensor([5, 0, V - 1, 5])
    sparse, dense = _cost("sparse"), _cost("dense")
    assert isinstance(sparse, SparseCost)
    assert isinstance(dense, DenseCost)
    entries = torch.full((V, V), sparse.ceiling, dtype=torch.float64)
    for token in range(V):
        part = slice(int(sparse.starts[token]), int(sparse.starts[token + 1]))
        entries[token, sparse.neighbours[part]] = sparse.costs[part]
    buffer = torch.empty(len(asked), V, dtype=torch.float64)
    for cost, matrix in ((sparse, entries), (dense, 1 - dense.features @ dense.features.T)):
        torch.testing.assert_close(cost.rows(asked, scale), scale * matrix[asked], atol=1e-12, rtol=1e-9)
        assert cost.rows(asked, scale, buffer).data_ptr() == buffer.data_ptr()
        torch.testing.assert_close(buffer, cost.rows(asked, scale))
        assert not cost.rows(asked, scale).gather(1, asked[:, None]).any()


def test_losses_are_the_same_without_gradients() -> None:
    hidden, weight = torch.randn(5, 4), torch.randn(7, 4)
    ids = torch.tensor([0, 6, 2, 2, 1])
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, ids)
    with torch.inference_mode():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, ids), expected)


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize(("bound", "kind", "shape"), POSSIBLE)
def test_what_is_compiled_gives_the_same(
    bound: Bound, kind: str, shape: str, anchored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "functions", lambda: (compiled.centred, compiled.gradient))  # the arithmetic alone
    cost, target, head = _cost(kind), _target(shape), Head(_normal(V, D), soft_cap=2.0)
    anchor = Anchor(_normal(T, D, seed=2), 2.0) if anchored else None
    results = []
    for fuse in (False, True):
        hidden, _ = _inputs()
        loss = linear_emd(hidden, head, target, cost, bound=bound, anchor=anchor, chunk_tokens=5, compiled=fuse)
        results.append((loss.detach(), *torch.autograd.grad(loss, hidden)))
    torch.testing.assert_close(*results)


def test_all_terms_compiled_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "functions", lambda: (compiled.centred, compiled.gradient))
    terms = {"cross_entropy": 0.7, "kl": 0.3, "reverse_kl": 0.5, "emd": 2.0, "interval": 0.0}
    reference, cost, target = Reference(_normal(T, D, seed=2)), _cost("dense"), _target("soft")
    results = []
    for fuse in (False, True):
        hidden, weight = _inputs(head_trains=True)
        loss, values = linear_losses(hidden, weight, terms, target, cost, reference=reference, compiled=fuse)
        results.append((loss.detach(), values, torch.autograd.grad(loss.sum(), [hidden, weight])))
    torch.testing.assert_close(*results)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize(("bound", "kind", "shape"), POSSIBLE)
def test_a_gpu_gives_what_the_formula_gives(
    bound: Bound, kind: str, shape: str, head_trains: bool, anchored: bool, dtype: torch.dtype
) -> None:
    inputs, cost = _held(dtype, kind)
    target = _target(shape)
    results = []
    for exact in (False, True):
        hidden, weight, reference = (each.clone() if exact else each.to("cuda", dtype) for each in inputs)
        leaves = [hidden.requires_grad_()] + [weight.requires_grad_()] * head_trains
        q = target if exact else Target(target.ids.cuda(), target.weights.float().cuda())
        anchor = Anchor(reference, 2.0) if anchored else None
        loss = linear_emd(hidden, weight, q, cost, bound=bound, anchor=anchor, reduction="none", chunk_tokens=5)
        results.append([each.cpu() for each in (loss.detach(), *torch.autograd.grad(loss.sum(), leaves))])
    for mine, right in zip(*results, strict=True):
        assert _relative(mine, right) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("bound", "anchored"), [("exact", False), ("covariance", False), ("exact", True)])
def test_a_gpu_gives_the_same_when_compiled(bound: Bound, anchored: bool) -> None:
    hidden, weight, reference = (_normal(*shape).to("cuda", torch.bfloat16) for shape in ((T, D), (V, D), (T, D)))
    target = Target(_target("soft").ids.cuda(), _target("soft").weights.float().cuda())
    ids = target.ids[:, 0] if bound == "exact" else target
    anchor = Anchor(reference + 1, 2.0) if anchored else None
    results = []
    for fuse in (False, True):
        leaf = hidden.clone().requires_grad_()
        loss = linear_emd(leaf, weight, ids, _cost("dense").to(CPU), bound=bound, anchor=anchor, compiled=fuse)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for mine, right in zip(*results, strict=True):
        assert _relative(mine, right.double()) < 1e-2
