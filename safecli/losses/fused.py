"""The losses from hidden states and head weight, in chunks, so that [T, V] never exists whole.

Losses of different positions don't mix, so each chunk of positions computes its losses and, while its logits are
at hand, their gradient with respect to the chunk's hidden states; what is kept for the backward pass is [T, d].
With a head that trains, the chunk is computed again in the backward pass instead (activation checkpointing).

Products per T positions, frozen head: 2TVd for the logits and 2TVd for dh; a dense cost adds 2TVk for the row of
costs of a one-hot target, or 2TVk for mu and 2TVk for its gradient with the bounds on means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from safecli.costs import Cost, DenseCost
from safecli.errors import UsageError

Bound = Literal["exact", "centroid", "covariance", "relaxed", "upper"]

_CHUNK_BYTES = 1 << 25
_TINY = 1e-6


@dataclass(frozen=True)
class Target:
    """Unsafe targets: distributions over the vocabulary with few tokens each, `ids` and `weights` [T, m].

    Weights are >= 0 and sum to 1 over m; a weight of 0 pads.
    """

    ids: Tensor
    weights: Tensor

    @property
    def is_onehot(self) -> bool:
        """Whether every target is one token."""
        return self.ids.shape[1] == 1


def onehot(ids: Tensor) -> Target:
    """One-hot targets from token ids [T]."""
    return Target(ids[:, None], torch.ones(len(ids), 1, device=ids.device))


@dataclass(frozen=True)
class Anchor:
    """The reference of the anchored term: its last `hidden` [T, d], and the `strength` (lambda) of the EMD."""

    hidden: Tensor
    strength: float


def best_bound(target: Target, cost: Cost) -> Bound:
    """The tightest bound that target and cost allow."""
    if target.is_onehot:
        return "exact"
    return "covariance" if isinstance(cost, DenseCost) else "relaxed"


def check_bound(bound: Bound, target: Target, cost: Cost) -> None:
    """Refuse a bound that target and cost can't give; `UsageError` says which can."""
    if bound == "exact" and not target.is_onehot:
        raise UsageError("bound 'exact' needs one-hot targets: use covariance, centroid, relaxed or upper")
    if bound in ("centroid", "covariance") and not isinstance(cost, DenseCost):
        raise UsageError(f"bound '{bound}' needs a cost with features: use exact, relaxed or upper with this one")


class _PerPosition(torch.autograd.Function):
    """Losses [T] whose gradient with respect to hidden [T, d] is computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, chunk: int, losses: Callable[[Tensor, slice], Tensor]) -> Tensor:
        value = torch.empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        gradient = torch.empty_like(hidden)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            with torch.enable_grad():
                leaf = hidden[part].detach().requires_grad_()
                loss = losses(leaf, part)
                (gradient[part],) = torch.autograd.grad(loss.sum(), leaf)
            value[part] = loss.detach()
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0][:, None].to(gradient.dtype), None, None


def _per_position(
    hidden: Tensor, weight: Tensor, losses: Callable[[Tensor, slice], Tensor], chunk: int | None
) -> Tensor:
    chunk = chunk or max(16, _CHUNK_BYTES // (4 * weight.shape[0]))
    if torch.is_grad_enabled() and hidden.requires_grad and not weight.requires_grad:
        return _PerPosition.apply(hidden, chunk, losses)  # type: ignore[no-any-return,no-untyped-call]
    parts = [slice(start, start + chunk) for start in range(0, len(hidden), chunk)]
    if torch.is_grad_enabled() and weight.requires_grad:
        values = [checkpoint(losses, hidden[part], part, use_reentrant=False) for part in parts]
    else:
        values = [losses(hidden[part], part) for part in parts]
    return torch.cat([hidden[:0].sum(-1, dtype=torch.promote_types(hidden.dtype, torch.float32)), *values])


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits [t, V] in float32; double stays double."""
    logits = hidden.to(weight.dtype) @ weight.T
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _bound(p: Tensor, target: Target, cost: Cost, bound: Bound) -> Tensor:
    """The bound of the EMD at each position, [t], from probabilities p [t, V]."""
    ids, weights = target.ids, target.weights
    if bound in ("exact", "upper", "relaxed"):
        return (p * _linear_cost(ids, weights, cost, bound)).sum(-1)
    assert isinstance(cost, DenseCost)
    mu_p = p @ cost.features
    support = cost.features[ids]
    mu_q = (weights[..., None] * support).sum(1)
    if bound == "centroid":
        return (mu_p - mu_q).square().sum(-1) / 2
    variance_q = (weights * (support - mu_q[:, None]).square().sum(-1)).sum(-1)
    variance_p = (1 - mu_p.square().sum(-1)).clamp(min=_TINY)
    # Two roots, not one of the product: at a one-token target that root is 0 and its gradient NaN.
    return 1 - (mu_p * mu_q).sum(-1) - variance_p.sqrt() * variance_q.sqrt()


def _linear_cost(ids: Tensor, weights: Tensor, cost: Cost, bound: Bound) -> Tensor:
    """c [t, V] of the bounds that are linear in p: C_ix, sum_j q_j C_ij, or min over the support of q."""
    if bound == "upper" and isinstance(cost, DenseCost):
        return 1 - (weights[..., None] * cost.features[ids]).sum(1) @ cost.features.T
    total = cost.rows(ids[:, 0])
    if bound == "upper":
        total = total * weights[:, :1]
    elif bound == "relaxed":
        total = torch.where(weights[:, :1] > 0, total, torch.inf)
    for column in range(1, ids.shape[1]):
        row = cost.rows(ids[:, column])
        weight = weights[:, column : column + 1]
        total = total + weight * row if bound == "upper" else torch.where(weight > 0, total.minimum(row), total)
    return total


def linear_emd(
    hidden: Tensor,
    weight: Tensor,
    target: Target,
    cost: Cost,
    *,
    bound: Bound | None = None,
    anchor: Anchor | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Minus a bound of EMD(softmax(hidden W'), target) at each position, [T] float32.

    With an anchor: KL(p || p_ref) - strength * bound, whose optimum for one-hot targets is
    p_ref exp(strength C_x), normalised. `hidden` is [T, d], `weight` [V, d]. `None` takes the best bound.
    Errors: `UsageError` for a bound that target and cost can't give.
    """
    bound = bound or best_bound(target, cost)
    check_bound(bound, target, cost)

    def losses(chunk: Tensor, part: slice) -> Tensor:
        log_p = _logits(chunk, weight).log_softmax(-1)
        p = log_p.exp()
        gain = _bound(p, Target(target.ids[part], target.weights[part]), cost, bound)
        if anchor is None:
            return -gain
        with torch.no_grad():
            log_ref = _logits(anchor.hidden[part], weight).log_softmax(-1)
        return (p * (log_p - log_ref)).sum(-1) - anchor.strength * gain

    return _per_position(hidden, weight, losses, chunk_tokens)


def linear_kl(hidden: Tensor, weight: Tensor, reference: Tensor, *, chunk_tokens: int | None = None) -> Tensor:
    """KL(p_ref || p) at each position, [T] float32, from hidden states and those of the reference, both [T, d]."""

    def losses(chunk: Tensor, part: slice) -> Tensor:
        log_p = _logits(chunk, weight).log_softmax(-1)
        with torch.no_grad():
            log_ref = _logits(reference[part], weight).log_softmax(-1)
            entropy = (log_ref.exp() * log_ref).sum(-1)
        return entropy - (log_ref.exp() * log_p).sum(-1)

    return _per_position(hidden, weight, losses, chunk_tokens)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, ids: Tensor, *, chunk_tokens: int | None = None) -> Tensor:
    """Cross-entropy with token ids [T] at each position, [T] float32, from hidden states [T, d]."""

    def losses(chunk: Tensor, part: slice) -> Tensor:
        return torch.nn.functional.cross_entropy(_logits(chunk, weight), ids[part], reduction="none")

    return _per_position(hidden, weight, losses, chunk_tokens)


@torch.no_grad()
def divergences(
    hidden: Tensor,
    weight: Tensor,
    reference: Tensor,
    target: Target | None = None,
    cost: Cost | None = None,
    *,
    chunk_tokens: int = 256,
) -> dict[str, Tensor]:
    """What training logs at each position, [T] each: KL(p || p_ref), and with unsafe targets the EMD's bounds.

    `emd` is the best bound, exact for one-hot targets; with features `interval` is the certified gap between the
    upper and the covariance bound, 0 for one-hot targets.
    """
    kl, emd, gap = [], [], []
    for start in range(0, len(hidden), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        log_p = _logits(hidden[part], weight).log_softmax(-1)
        log_ref = _logits(reference[part], weight).log_softmax(-1)
        p = log_p.exp()
        kl.append((p * (log_p - log_ref)).sum(-1))
        if target is not None and cost is not None:
            here = Target(target.ids[part], target.weights[part])
            emd.append(_bound(p, here, cost, best_bound(here, cost)))
            if not here.is_onehot and isinstance(cost, DenseCost):
                gap.append(_bound(p, here, cost, "upper") - emd[-1])
    found = {"kl": kl, "emd": emd, "interval": gap}
    return {name: torch.cat(values) for name, values in found.items() if values}
